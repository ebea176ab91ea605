"""Runs on pictures without labels, and from teachers without a classifier: trained, read, measured and shown again."""

import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import kdzoo
from kdzoo import UserError
from kdzoo.cli import cli
from kdzoo.engine.progress import Progress
from kdzoo.experiments.predictions import predict
from kdzoo.experiments.run import evaluate_run, open_data
from kdzoo.experiments.teachers import output_names
from kdzoo.models import written_facts
from kdzoo.resolve import resolve
from kdzoo.results import layout, table
from kdzoo.results.last_screen import result_table
from kdzoo.results.render import markdown
from kdzoo.results.report.page import page
from kdzoo.store import predictions
from kdzoo.store.folder import RunFolder, find_runs

TINY = ["engine.device=cpu", "engine.precision=float32", "protocol.epochs=2", "protocol.batch_size=8"]
TINY += ["teacher.allow_weak=true", "teacher.epochs=1", "engine.checkpoint_seconds=0"]
NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Bright and dark pictures of three classes."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 8)):
        for shade, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(70 * shade, 70 * shade + 90, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def run(out, data, *more, distiller="kd", student="resnet8", teacher="resnet8", **options):
    return kdzoo.run(distiller, student, teacher, data=data, out=out, overrides=[*TINY, *more], quiet=True, **options)


@pytest.fixture(scope="module")
def weights(pictures, tmp_path_factory):
    """The file of a small network that was trained on them with labels."""
    out = tmp_path_factory.mktemp("teacher")
    return run(out, f"folder:{pictures}", distiller="none", teacher=None).folder / "student.safetensors"


@pytest.fixture(scope="module")
def runs(pictures, weights, tmp_path_factory):
    """Runs by what their top-1 is a share of."""
    given, out = f"teacher.weights={weights}", tmp_path_factory.mktemp("runs")
    unlabelled, bare = f"images:{pictures}", [given, "teacher.classifier=false"]
    return {
        "agreement": run(out, unlabelled, given),
        "accuracy": run(out, unlabelled, given, f"data.test=folder:{pictures}"),
        "neighbours": run(out, unlabelled, *bare, distiller="pkt"),
        "knn": run(out, f"folder:{pictures}", *bare, distiller="pkt"),
    }


KINDS = ("agreement", "accuracy", "neighbours", "knn")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow(reason="trains several runs")
def test_a_run_says_what_it_measured_and_measures_the_same_again(runs, kind):
    result = runs[kind]
    assert result.measured == kind
    assert (result.teacher_top1 is None) is (kind in ("agreement", "neighbours"))
    assert evaluate_run(result.folder) == (result.top1, result.top5)
    done = CliRunner().invoke(cli, ["eval", str(result.folder), "--device", "cpu"])
    assert f"top-1 {result.top1:.2f} %" in done.output
    assert ("nearest neighbour" in done.output) is (kind in ("neighbours", "knn"))


def test_the_agreement_is_the_hand_count_of_what_the_run_kept(runs):
    found = predictions.read(runs["agreement"].folder / "predictions.safetensors", 3)
    assert 100 * float((found.student == found.teacher).mean()) == pytest.approx(runs["agreement"].top1)
    assert runs["agreement"].agreement == pytest.approx(runs["agreement"].top1)
    assert (found.labels == found.teacher).all()


def test_labels_in_the_names_of_folders_are_not_read(pictures, weights, runs, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    order = sorted(file.relative_to(pictures) for file in (pictures / "train").rglob("*.png"))
    shutil.rmtree(moved / "train")
    for i, file in enumerate(order):  # in the same order, in other folders
        (moved / "train" / f"{i:03d}").mkdir(parents=True)
        shutil.copy(pictures / file, moved / "train" / f"{i:03d}" / "x.png")
    again = run(tmp_path / "runs", f"images:{moved}", f"teacher.weights={weights}")
    assert same_student(again, runs["agreement"])


def same_student(one, other):
    one, other = (load_file(result.folder / "student.safetensors") for result in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_weights_of_several_teachers_are_not_learned_without_labels(pictures, weights, tmp_path):
    others = f"teacher.others=[{{name: resnet8, weights: {weights}}}]"
    given = (f"images:{pictures}", f"teacher.weights={weights}", others)
    assert run(tmp_path, *given).measured == "agreement"
    with pytest.raises(UserError, match=r"teacher\.combine=learned learns from labels, and data .* have none"):
        run(tmp_path, *given, "teacher.combine=learned")


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize("kind", ["agreement", "neighbours"])
def test_an_interrupted_run_ends_with_the_same_bits(pictures, weights, runs, tmp_path, monkeypatch, kind):
    more = [f"teacher.weights={weights}"] + ["teacher.classifier=false"] * (kind == "neighbours")
    options = {"distiller": "pkt" if kind == "neighbours" else "kd"}
    from kdzoo.engine import loop

    finish_epoch, calls = loop.finish_epoch, []

    def interrupt(*given, **named):
        finish_epoch(*given, **named)
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish_epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, f"images:{pictures}", *more, **options)
    assert calls == [1]
    resumed = run(tmp_path, f"images:{pictures}", *more, **options)
    assert same_student(resumed, runs[kind])
    assert (resumed.top1, resumed.top5, resumed.kl) == (runs[kind].top1, runs[kind].top5, runs[kind].kl)
    files = {(result.folder / "predictions.safetensors").read_bytes() for result in (resumed, runs[kind])}
    assert len(files) == 1


def test_a_run_that_lost_the_teachers_answers_says_so(runs, tmp_path):
    for kind in ("agreement", "neighbours"):
        moved = shutil.copytree(runs[kind].folder, tmp_path / kind)
        (moved / "predictions.safetensors").unlink()
        with pytest.raises(
            UserError, match=r"has lost its predictions\.safetensors, which holds the teacher's answers"
        ):
            evaluate_run(moved)


def test_a_run_is_not_measured_again_by_answers_for_other_images(runs, pictures, tmp_path):
    other = shutil.copytree(pictures, tmp_path / "other")
    shutil.rmtree(other / "test" / "ant")
    from kdzoo.experiments.run import Here

    with pytest.raises(UserError, match=r"answers for 24 test images, and data .* have 16"):
        evaluate_run(runs["agreement"].folder, Here(data=f"images:{other}"))


def test_answers_for_other_images_measure_nothing_and_labels_are_told_of(runs, pictures, tmp_path):
    other = shutil.copytree(pictures, tmp_path / "other")
    for name in ("0.png", "1.png"):  # as many images as before
        Image.new("RGB", (16, 16)).save(other / "test" / "ant" / name)
    command = ["eval", str(runs["agreement"].folder), "--device", "cpu", "--data"]
    refused, judged = (CliRunner().invoke(cli, [*command, f"{kind}:{other}"]) for kind in ("images", "folder"))
    assert "which are for other images than data" in str(refused.exception)
    assert judged.exit_code == 0, judged.output
    assert "top-1" in judged.output
    assert "take for the same class" not in judged.output  # it is accuracy


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_used_by_its_folder_alone(runs, kind):
    student, images = kdzoo.load(runs[kind].folder), torch.rand(2, 3, 16, 16)
    bare = kind in ("neighbours", "knn")
    assert student.classes == (() if bare else NAMES)
    assert student(images).shape == (2, 64 if bare else 3)
    output = student.network(images)
    assert torch.equal(student(images), output.embedding if bare else output.logits)
    assert written_facts(runs[kind].folder / "student.safetensors")["classifier"] is not bare


def test_a_student_without_a_classifier_names_no_classes(runs, pictures):
    with pytest.raises(UserError, match=r"no classifier to name classes by; kdzoo\.load gives its embedding"):
        list(predict(runs["knn"].folder, [pictures / "test"], device="cpu"))


@pytest.mark.slow(reason="trains several runs")
@pytest.mark.parametrize("kind", ["agreement", "neighbours"])
def test_an_exported_program_is_compared_without_the_teacher(runs, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("kdzoo.experiments.run.teachers", None)
    made = kdzoo.export(runs[kind].folder, "torch", out=tmp_path / kind)
    record = json.loads((made.folder / "export.json").read_text())["model.pt2"]
    assert record["max_difference"] < 1e-4
    assert (record["top1"] is None) is (kind == "neighbours")
    assert ("embeddings" in made.lines[0]) is (kind == "neighbours")
    student, images = kdzoo.load(runs[kind].folder), torch.rand(3, 3, 16, 16)
    program = torch.export.load(made.folder / "model.pt2").module()
    assert torch.allclose(program(images), student(images), atol=1e-5)


@pytest.mark.slow(reason="writes and runs ONNX models")
@pytest.mark.parametrize("kind", ["agreement", "neighbours"])
def test_an_onnx_model_is_compared_without_the_teacher(runs, kind, tmp_path):
    made = kdzoo.export(runs[kind].folder, "onnx", out=tmp_path / kind, quantize="int8")
    assert json.loads((made.folder / "export.json").read_text())["model.onnx"]["max_difference"] < 1e-3


@pytest.mark.slow(reason="trains several runs")
def test_timm_reads_a_student_without_a_classifier_and_its_card_says_what_it_is(pictures, weights, tmp_path):
    bare = [f"teacher.weights={weights}", "teacher.classifier=false", "protocol.image_size=32", "protocol.epochs=1"]
    result = run(tmp_path / "runs", f"images:{pictures}", *bare, student="test_vit", distiller="rkd")
    made = kdzoo.export(result.folder, "hub", out=tmp_path / "hub")
    card = (made.folder / "README.md").read_text()
    assert "timm reads it" in made.lines[0]
    theirs, images = timm.create_model(f"local-dir:{made.folder}", pretrained=True).eval(), torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    assert theirs.num_classes == 0
    assert torch.allclose(theirs((images - mean) / std), kdzoo.load(result.folder)(images), atol=1e-5)
    assert "image-feature-extraction" in card
    assert "accurac" not in card.lower()
    assert "nearest neighbour" in card


@pytest.mark.slow(reason="trains several runs")
def test_tables_reports_and_screens_never_call_it_accuracy(runs, tmp_path):
    root = runs["agreement"].folder.parent
    sections = layout.long(table.rows(find_runs([root])), "kd")
    assert len(sections) == 4
    by_title = {section.title: markdown([section]) for section in sections}
    [agreed] = [text for title, text in by_title.items() if title.endswith("measured by agreement")]
    assert "take for the same class: the data have no labels" in agreed
    assert "Accurac" not in agreed
    assert sum("Accuracies in percent" in text for text in by_title.values()) == 1  # negative control
    assert layout.pivoted(table.rows(find_runs([root])), "kd")
    text = page([root])
    assert "agreement with the teacher" in text
    for kind in KINDS:
        rows = str(list(result_table(runs[kind]).columns[0].cells))
        assert ("top-1 is the share of" in rows) is (kind != "accuracy")
        assert "accuracy" not in rows


def test_a_report_of_runs_without_classes_has_no_confusions_and_no_complaint(runs):
    from kdzoo.results.report.gather import gather
    from kdzoo.results.report.one_run import Panes

    gathered = gather([runs["neighbours"].folder.parent])
    panes = dict(
        zip([one.row["measured"] for one in gathered.kept], Panes(gathered.kept, "kd").all()["runs"], strict=True)
    )
    assert not panes["neighbours"]["notes"]
    assert "accuracy" not in panes["neighbours"]
    assert panes["agreement"]["words"][0] == "the teacher's class"
    assert "confusions" not in panes["agreement"]
    assert panes["accuracy"]["words"][0] == "true class"
    assert "confusions" in panes["accuracy"]


@pytest.mark.parametrize("kind", KINDS)
def test_spectra_are_measured_of_such_runs_too(runs, kind):
    from kdzoo.experiments import spectrum
    from kdzoo.results.spectrum_plot import draw

    found = spectrum.of_runs([runs[kind].folder], batches=1)
    assert ("top1" in set(found["measure"])) is (kind in ("agreement", "accuracy"))
    draw(found)


def test_spectra_compare_a_student_alone_with_a_teacher_that_has_no_classifier(runs, pictures, tmp_path):
    from kdzoo.experiments import spectrum
    from kdzoo.results.spectrum_plot import draw

    alone = run(tmp_path, f"folder:{pictures}", distiller="none", teacher=None)
    found = spectrum.of_runs([alone.folder, runs["knn"].folder], batches=1)
    logits = found[found["stage"] == "logits"]
    assert set(logits["network"]) == {"resnet8 alone"}
    assert logits[logits["measure"] == "cka"]["value"].isna().all()
    assert logits[logits["measure"] == "top1"]["value"].notna().all()
    draw(found)


def test_spectra_of_untrained_networks_need_no_labels(pictures):
    from kdzoo.experiments import spectrum

    found = spectrum.of_networks("resnet8", "resnet14", f"images:{pictures}")
    assert found.attrs["images"] == 24
    assert set(found["measure"]) == {"power", "energy", "cka"}
    assert set(found["stage"]) == {f"stage {number}" for number in (1, 2, 3, 4)}


@pytest.mark.slow(reason="trains several runs")
def test_a_suite_without_labels_is_trained_once_and_compared_by_agreement(pictures, weights, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"{{data: {{name: 'images:{pictures}'}}, protocol: {{name: quick, epochs: 1, batch_size: 8}}, "
        f"teacher: {{weights: {weights}}}, pairs: [[resnet8, resnet8]], distillers: [kd, pkt], seeds: [0, 1]}}"
    )
    command = ["bench", str(suite), "--out", str(tmp_path / "runs"), *TINY[:2]]
    first, again = (CliRunner().invoke(cli, command) for _ in range(2))
    assert (first.exit_code, again.exit_code) == (0, 0), first.output + again.output
    found = list(table.rows(find_runs([tmp_path / "runs"])).itertuples())
    assert sorted((row.distiller, row.seed, row.measured) for row in found) == [
        (method, seed, "agreement") for method in ("kd", "pkt") for seed in (0, 1)
    ]
    for output in (first.output, again.output):  # the second is made from what the first left
        assert "measured by agreement" in output
        assert "Accurac" not in output


@pytest.mark.parametrize(("distiller", "said"), [("pkt", True), ("kd", False)])
def test_a_classifier_that_nothing_trains_is_told_of(pictures, weights, tmp_path, capfd, distiller, said):
    given = [*TINY, f"teacher.weights={weights}", "protocol.epochs=1"]
    kdzoo.run(distiller, "resnet8", "resnet8", data=f"images:{pictures}", out=tmp_path, overrides=given)
    lines = capfd.readouterr().err
    assert "ce left out of the loss: the data have no labels" in lines
    assert ("without ce nothing trains the student's classifier" in lines) is said


def test_a_method_that_reads_labels_says_so_before_anything_is_trained(pictures, weights, tmp_path):
    given = f"teacher.weights={weights}"
    with pytest.raises(UserError, match="DKD learns from labels, and the data have none"):
        run(tmp_path, f"images:{pictures}", given, distiller="dkd")
    with pytest.raises(
        UserError, match=r"KD learns from logits, and the teacher has no classifier.*such as fitnet or pkt"
    ):
        run(tmp_path, f"folder:{pictures}", given, "teacher.classifier=false")


@pytest.mark.parametrize("more", [["engine.accumulate=2"], ["protocol.augmentation.mixup=0.5"]])
@pytest.mark.parametrize("bare", [False, True])
def test_micro_batches_and_mixing_work_without_labels(pictures, weights, tmp_path, more, bare):
    if bare:
        more = [*more, "teacher.classifier=false"]
    method = "pkt" if bare else "kd"
    given = f"teacher.weights={weights}"
    assert run(tmp_path, f"images:{pictures}", given, "protocol.epochs=1", *more, distiller=method).epochs == 1


@pytest.mark.slow(reason="trains several runs")
def test_kept_logits_are_those_of_pictures_without_labels(pictures, weights, tmp_path):
    given = [f"teacher.weights={weights}", "teacher.keep=logits"]
    first, again = (run(tmp_path / place, f"images:{pictures}", *given) for place in ("one", "other"))
    assert same_student(first, again)


def wanted(pictures, *overrides, teacher="resnet8"):
    values = {"distiller": {"name": "kd"}, "student": {"name": "resnet8"}, "teacher": {"name": teacher}}
    return resolve({**values, "data": {"name": f"images:{pictures}"}}, overrides)


def test_outputs_are_named_by_the_file_beside_the_weights_by_a_file_or_by_number(pictures, weights, tmp_path):
    assert output_names(wanted(pictures, f"teacher.weights={weights}")) == NAMES
    order = tmp_path / "names.txt"
    order.write_text("x\ny\nz\n")
    assert output_names(wanted(pictures, f"teacher.weights={weights}", f"data.classes={order}")) == ("x", "y", "z")
    plain = tmp_path / "plain.pth"
    network = kdzoo.models.create("resnet8", kdzoo.DataSpec("x", 3, NAMES, 16, torch.zeros(0)))
    torch.save(network.body.state_dict(), plain)
    assert output_names(wanted(pictures, f"teacher.weights={plain}")) == ("class 0", "class 1", "class 2")
    assert output_names(wanted(pictures, f"teacher.weights={plain}", f"data.classes={order}")) == ("x", "y", "z")
    order.write_text("x\ny\n")
    with pytest.raises(UserError, match=re.escape("names 2 outputs, and teacher resnet8 has 3; name each of them")):
        output_names(wanted(pictures, f"teacher.weights={plain}", f"data.classes={order}"))
    assert output_names(wanted(pictures, f"teacher.weights={plain}", "teacher.classifier=false")) == ()
    torch.save({k: v for k, v in network.body.state_dict().items() if not k.startswith("fc")}, plain)
    with pytest.raises(UserError, match="classifier"):
        output_names(wanted(pictures, f"teacher.weights={plain}"))


def test_published_weights_say_how_many_classes_they_have(pictures):
    names = output_names(wanted(pictures, "teacher.pretrained=true", teacher="resnet18.tv_in1k"))
    assert (len(names), names[-1]) == (1000, "class 999")
    assert output_names(wanted(pictures, "teacher.pretrained=true", teacher="vit_small_patch14_dinov2.lvd142m")) == ()


def test_nothing_names_the_outputs_without_a_trained_teacher(pictures):
    with pytest.raises(UserError, match=r"no labels to train teacher resnet8 on; give --teacher-weights FILE"):
        output_names(wanted(pictures))
    with pytest.raises(UserError, match="no teacher is named to learn from; pass --teacher NAME"):
        output_names(wanted(pictures, teacher=None))


def test_names_that_only_partly_fit_the_labelled_set_are_refused(pictures, weights, tmp_path):
    order = tmp_path / "names.txt"
    order.write_text("ant\nbee\ncow\n")
    made = wanted(pictures, f"teacher.weights={weights}", f"data.classes={order}", f"data.test=folder:{pictures}")
    with Progress(quiet=True) as progress, pytest.raises(UserError, match="1 class not among the 3"):
        open_data(made, torch.device("cpu"), progress)


def test_a_recommendation_is_planned_without_labels(pictures, weights, tmp_path):
    done = CliRunner().invoke(
        cli,
        [
            *("recommend", "--teacher", "resnet8", "--teacher-weights", str(weights), "--student", "resnet8"),
            *("--data", f"images:{pictures}", "--methods", "at,sp,dkd", "--settings", "1", "--epochs", "2"),
            "--dry-run",
            *("--out", str(tmp_path / "search"), "engine.device=cpu", "engine.precision=float32"),
            "protocol.batch_size=8",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "kd, logitmse, at, sp" in done.output
    assert "none: NoDistillation learns from labels" in done.output
    assert "finalists, with kd beside them, for 2 epochs" in " ".join(done.output.split())


@pytest.mark.slow(reason="a whole search")
def test_a_search_without_labels_ranks_by_agreement(pictures, weights, tmp_path):
    found = kdzoo.recommend(
        "resnet8", "resnet8", methods=["at"], settings=1, epochs=2, data=f"images:{pictures}", weights=str(weights),
        out=tmp_path, overrides=[*TINY[:2], *TINY[3:4]], quiet=True,
    )  # fmt: skip
    assert {one.results[0].measured for one in found.answers[0].finalists} == {"agreement"}
    assert found.answers[0].reference("none") is None
    assert "as by its teacher" in found.sentences()[0]


def test_one_test_image_without_a_classifier_is_one_line_and_with_one_is_measured(pictures, weights, tmp_path):
    (tmp_path / "few").mkdir()
    for i, file in enumerate(sorted((pictures / "train").rglob("*.png"))[:9]):
        shutil.copy(file, tmp_path / "few" / f"{i}.png")
    data, given = f"images:{tmp_path / 'few'}", [f"teacher.weights={weights}", "data.val=0.1"]
    with pytest.raises(UserError, match="one test image has no other beside it"):
        run(tmp_path, data, *given, "teacher.classifier=false", distiller="pkt")
    assert run(tmp_path, data, *given).measured == "agreement"


@pytest.mark.parametrize("images", [1, 8])
def test_test_images_of_one_class_are_measured_and_their_embedding_is_not_probed(pictures, weights, tmp_path, images):
    other = tmp_path / "other"
    for split in ("train", "test"):
        shutil.copytree(pictures / split / "ant", other / split / "ant")
    for i in range(images, 8):
        (other / "test" / "ant" / f"{i}.png").unlink()
    found = run(tmp_path, f"images:{pictures}", f"teacher.weights={weights}", f"data.test=folder:{other}")
    assert (found.measured, found.probe, found.knn is None) == ("accuracy", None, images == 1)


@pytest.mark.slow(reason="trains a teacher")
def test_a_teacher_that_lacks_its_classifier_is_trained_with_one(pictures, tmp_path, capfd):
    bare = run(tmp_path, f"folder:{pictures}", "teacher.classifier=false", "teacher.seed=7", distiller="pkt")
    assert bare.measured == "knn"
    run(tmp_path, f"folder:{pictures}", "teacher.seed=7", distiller="pkt")
    capfd.readouterr()
    kdzoo.run(
        "pkt", "resnet8", "resnet8", data=f"folder:{pictures}", out=tmp_path, fresh=True,
        overrides=[*TINY, "teacher.classifier=false", "teacher.seed=7"],
    )  # fmt: skip
    assert "not trained yet" not in capfd.readouterr().err  # with and without its classifier it is the same one


@pytest.mark.slow(reason="trains by a network at the size of its published weights")
def test_published_weights_without_their_classifier_are_the_teacher_on_any_data(pictures, tmp_path):
    out = tmp_path / "runs"
    made = run(out, f"folder:{pictures}", "protocol.image_size=32", student="test_vit", distiller="none", teacher=None)
    folder = kdzoo.export(made.folder, "timm", out=tmp_path / "published").folder
    given, two = ("teacher.pretrained=true", "protocol.image_size=32"), tmp_path / "two"
    for split in ("train", "test"):
        shutil.copytree(pictures / split, two / split, ignore=shutil.ignore_patterns("cat"))
    for data, measured in ((f"images:{pictures}", "neighbours"), (f"folder:{two}", "knn")):
        found = run(out, data, *given, "teacher.classifier=false", teacher=f"local-dir:{folder}", distiller="pkt")
        assert found.measured == measured
    assert run(out, f"images:{pictures}", *given, teacher=f"local-dir:{folder}").measured == "agreement"


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("kind", ["images", "folder"])
def test_a_teacher_of_outputs_that_are_not_finite_is_named_before_training(
    pictures, weights, tmp_path, monkeypatch, kind, bare
):
    state = load_file(weights)
    state["stem.0.weight"] *= 1e38  # finite as it is, and not what follows
    save_file(state, tmp_path / "large.safetensors")
    given = [f"teacher.weights={tmp_path / 'large.safetensors'}"] + ["teacher.classifier=false"] * bare
    with pytest.raises(UserError, match=r"teacher resnet8 gives outputs that are not finite for \d+ of 24 test images"):
        run(tmp_path, f"{kind}:{pictures}", *given, distiller="pkt")


@pytest.mark.parametrize(
    ("classes", "said"), [(NAMES, ""), (NAMES[::-1], "'ant' and 'cat' as output 0"), (NAMES[:2], "3 and 2 classes")]
)
def test_teachers_whose_outputs_stand_for_other_classes_do_not_answer_together(
    pictures, weights, tmp_path, classes, said
):
    (tmp_path / "other").mkdir()
    other = shutil.copy(weights, tmp_path / "other" / "student.safetensors")
    (tmp_path / "other" / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    given = f"teacher.weights={weights}", f"teacher.others=[{{name: resnet8, weights: {other}}}]"
    if not said:
        assert run(tmp_path, f"images:{pictures}", *given).measured == "agreement"
        return
    with pytest.raises(UserError, match=f"teachers resnet8 and resnet8 were trained with {said}") as caught:
        run(tmp_path, f"images:{pictures}", *given)
    assert "\n" not in str(caught.value)


def test_several_teachers_of_which_one_lacks_a_classifier_are_refused_before_any_is_trained(pictures, tmp_path, capfd):
    new = "teacher.others=[{name: resnet14, classifier: false, seed: 11}]"
    with pytest.raises(UserError, match="only where each has a classifier"):
        kdzoo.run(
            "pkt",
            "resnet8",
            "resnet8",
            data=f"folder:{pictures}",
            out=tmp_path,
            overrides=[*TINY, new, "teacher.seed=11"],
        )
    assert "not trained yet" not in capfd.readouterr().err


def test_a_teacher_that_nothing_is_known_of_is_one_line(pictures, tmp_path):
    with pytest.raises(UserError, match="unknown model 'resnt8'; did you mean resnet8"):
        run(tmp_path, f"images:{pictures}", teacher="resnt8")


def test_a_student_alone_cannot_lack_its_classifier(pictures, weights, tmp_path):
    with pytest.raises(UserError, match=r"the student gives 0 logits, expected 3.*teacher\.classifier=false"):
        run(tmp_path, f"folder:{pictures}", f"teacher.weights={weights}", "student.classifier=false")


def test_a_student_without_a_classifier_is_trained_on_with_one(runs, pictures, tmp_path):
    begun = f"student.weights={runs['knn'].folder / 'student.safetensors'}"
    found = run(tmp_path, f"folder:{pictures}", begun, distiller="none", teacher=None)
    assert found.measured == "accuracy"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "lists no class; expected one name a line"),
        ("text", "orders the classes of labels"),
        ("ant\ncat\nbee\n", "has the classes of teacher resnet8 in another order than the file beside its weights"),
        ("ant\nbee\n", "names 2 outputs, and teacher resnet8 has 3; name each of them, or leave data.classes out"),
    ],
)
def test_names_of_outputs_that_cannot_be_are_one_line(pictures, weights, tmp_path, content, said):
    file = tmp_path / "names.txt"
    file.write_text(content)
    names = "text" if content == "text" else file
    with pytest.raises(UserError, match=said) as caught:
        run(tmp_path, f"images:{pictures}", f"teacher.weights={weights}", f"data.classes={names}")
    assert "\n" not in str(caught.value)


def test_what_is_left_out_for_want_of_labels_and_of_a_classifier_is_told_apart(pictures, weights, tmp_path, capfd):
    given = [*TINY, f"teacher.weights={weights}", "teacher.classifier=false"]
    kdzoo.run("uhkd", "resnet8", "resnet8", data=f"images:{pictures}", out=tmp_path, overrides=given)
    said = capfd.readouterr().err
    assert "ce left out of the loss: the data have no labels" in said
    assert "kd left out of the loss: the teacher has no classifier" in said


def test_a_result_of_an_earlier_version_is_read_and_a_damaged_measure_is_refused(runs, tmp_path):
    folder = RunFolder(shutil.copytree(runs["accuracy"].folder, tmp_path / "moved"))
    found = json.loads(folder.result.read_text())
    new = ("measured", "agreement", "kl", "knn", "probe")
    folder.result.write_text(json.dumps({key: value for key, value in found.items() if key not in new}))
    assert (folder.read_result().measured, folder.read_result().kl) == ("accuracy", None)
    folder.result.write_text(json.dumps({**found, "measured": "taste"}))
    with pytest.raises(UserError, match="measured=taste is none of accuracy, agreement, knn, neighbours"):
        folder.read_result()
