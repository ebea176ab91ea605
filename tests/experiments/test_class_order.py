"""The order of classes: given by a word or a file, kept with the run, and noticed where a teacher has another."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdzoo
from kdzoo import UserError
from kdzoo.data import open_dataset
from kdzoo.experiments.class_order import check_order
from kdzoo.experiments.run import evaluate_run
from kdzoo.resolve import resolve

NUMBERS = [str(number) for number in range(12)]
TEXT = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]
QUICK = ["protocol.epochs=12", "protocol.batch_size=16", "protocol.augmentation.crop=0", "protocol.lr=0.02"]
QUICK += ["engine.device=cpu", "engine.precision=float32"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve classes that are named by numbers, each a colour."""
    root, random = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    colours = random.permutation(27)[:12]
    for split, count in (("train", 10), ("test", 5)):
        for name, colour in zip(NUMBERS, colours, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shade = np.array([colour // 9, colour // 3 % 3, colour % 3]) * 100 + random.integers(0, 30, (8, 8, 3))
                Image.fromarray(shade.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def names(root: Path, classes: str | None) -> list[str]:
    return list(open_dataset(f"folder:{root}", classes=classes).spec.class_names)


def test_classes_stand_in_the_order_that_is_asked_for(tree: Path, tmp_path: Path) -> None:
    assert names(tree, None) == names(tree, "text") == TEXT
    assert names(tree, "natural") == NUMBERS
    backwards = tmp_path / "classes.txt"
    backwards.write_text("\n".join(reversed(NUMBERS)) + "\n\n")
    assert names(tree, str(backwards)) == NUMBERS[::-1]


def test_every_image_keeps_its_class(tree: Path) -> None:
    text, natural = (open_dataset(f"folder:{tree}", classes=order) for order in ("text", "natural"))
    one, other = next(text.test_batches(60)), next(natural.test_batches(60))
    assert (one[0] == other[0]).all()
    assert [TEXT[label] for label in one[1]] == [NUMBERS[label] for label in other[1]]
    assert (one[1] != other[1]).any()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (NUMBERS[:-1], "lacks 1 class, such as '11'"),
        ([*NUMBERS, "12"], "lists 1 class, such as '12', which the data do not have"),
        ([*NUMBERS, "3"], "lists the class '3' twice"),
        (None, "expected text, natural, or a file with one class name a line"),
    ],
)
def test_a_file_of_other_classes_is_refused(tree: Path, tmp_path: Path, content: list[str] | None, said: str) -> None:
    file = tmp_path / "classes.txt"
    if content is not None:
        file.write_text("\n".join(content))
    with pytest.raises(UserError, match=said):
        names(tree, str(file))


def test_another_order_and_another_content_of_its_file_are_another_run(tmp_path: Path) -> None:
    base = {"distiller": {"name": "none"}, "student": {"name": "resnet8"}, "data": {"name": "cifar100"}}
    file = tmp_path / "classes.txt"
    identities = {resolve(base, [f"data.classes={order}"]).settings.identity() for order in ("null", "text", "natural")}
    for content in ("a\nb\n", "b\na\n"):
        file.write_text(content)
        identities.add(resolve(base, [f"data.classes={file}"]).settings.identity())
    assert len(identities) == 5


def permuted(order: list[str], accuracy: float = 1.0, images: int = 50) -> np.ndarray:
    """What a teacher of this order answers to NUMBERS: right in this share of images, spread over all else."""
    counts = np.full((12, 12), round(images * (1 - accuracy) / 11))
    for place, name in enumerate(NUMBERS):
        counts[place, order.index(name)] = images - counts[place].sum() + counts[place, 0]
    return counts


@pytest.mark.parametrize(
    ("order", "todo"),
    [
        (TEXT, "its order is the text one: set data.classes=text"),
        (NUMBERS[::-1], "set data.classes=FILE, with the class names in its order"),
    ],
)
@pytest.mark.parametrize("accuracy", [1.0, 0.7])
def test_a_teacher_of_another_order_is_refused_with_that_reason(order: list[str], todo: str, accuracy: float) -> None:
    with pytest.raises(UserError, match="was trained with its classes in another order") as caught:
        check_order("mine", NUMBERS, permuted(order, accuracy))
    assert todo in str(caught.value)
    assert "\n" not in str(caught.value)
    check_order("mine", NUMBERS, permuted(NUMBERS, accuracy))


def test_two_classes_that_changed_places_are_noticed() -> None:
    swapped = [*NUMBERS[:10], "11", "10"]
    with pytest.raises(UserError, match=r"reaches 83\.33 %, and 100\.00 % .* such as '11' to '10'"):
        check_order("mine", NUMBERS, permuted(swapped))


@pytest.mark.parametrize("tested", [1, 2])
def test_a_teacher_that_answers_one_class_to_all_is_weak_and_not_accused(tested: int) -> None:
    counts = np.zeros((4, 4), np.int64)
    counts[:tested, 3] = 20  # images of so many classes, all taken for the last
    check_order("mine", NUMBERS[:4], counts)
    with pytest.raises(UserError, match="another order"):  # negative control: two classes that are told apart
        check_order("mine", NUMBERS[:4], np.array([[0, 20, 0, 0], [20, 0, 0, 0], [0] * 4, [0] * 4]))


@pytest.mark.parametrize("seed", range(5))
def test_a_weak_teacher_of_the_right_order_is_not_accused(seed: int) -> None:
    random = np.random.default_rng(seed)
    for accuracy, images in ((0.55, 20), (0.3, 50), (1 / 12, 50)):
        shares = np.full((12, 12), (1 - accuracy) / 11)
        np.fill_diagonal(shares, accuracy)
        check_order("mine", NUMBERS, np.stack([random.multinomial(images, row) for row in shares]))
    always_the_first = np.zeros((12, 12), int)
    always_the_first[:, 0] = 50
    check_order("mine", NUMBERS, always_the_first)


@pytest.mark.slow(reason="trains several runs")
def test_weights_of_another_order_are_refused_and_the_run_keeps_its_own(tree: Path, tmp_path: Path) -> None:
    data = f"folder:{tree}"
    one = kdzoo.run("none", "resnet8", data=data, out=tmp_path, overrides=QUICK, quiet=True)
    assert (one.folder / "classes.txt").read_text().split() == TEXT
    assert one.top1 > 80
    given = [*QUICK, f"teacher.weights={one.folder / 'student.safetensors'}"]
    with pytest.raises(UserError, match=r"set data\.classes=text"):
        kdzoo.run("kd", "resnet8", "resnet8", data=data, out=tmp_path, overrides=[*given, "data.classes=natural"])
    short = [*given, "protocol.epochs=1"]
    assert kdzoo.run("kd", "resnet8", "resnet8", data=data, out=tmp_path, overrides=short).teacher_top1 == one.top1


def test_a_student_is_not_measured_on_classes_of_another_order(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(NUMBERS))
    short = ["protocol.epochs=1", "protocol.batch_size=16", f"data.classes={file}"]
    run = kdzoo.run("none", "resnet8", data=f"folder:{tree}", out=tmp_path / "runs", overrides=short, quiet=True)
    assert evaluate_run(run.folder) == (run.top1, run.top5)
    kept = shutil.copy(run.folder / "classes.txt", tmp_path / "kept.txt")
    file.write_text("\n".join(TEXT))
    with pytest.raises(UserError, match="the classes of the data are not those of"):
        evaluate_run(run.folder)
    shutil.copy(kept, file)
    assert evaluate_run(run.folder) == (run.top1, run.top5)
