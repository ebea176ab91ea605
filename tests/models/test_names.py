"""Networks by the names of other libraries, with keywords of their own and published weights."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from timm.models import save_for_hf

from kdzoo import DataSpec
from kdzoo.errors import UserError
from kdzoo.models import check_name, create, pretrained_classes
from kdzoo.resolve import resolve

DATA = DataSpec("fake", 10, tuple("abcdefghij"), 32, torch.arange(10))


def same(state, other):
    return state.keys() == other.keys() and all(value.equal(other[key]) for key, value in state.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network as timm saves it for the hub, of 10 classes and with statistics of its own."""
    path = tmp_path_factory.mktemp("hub") / "model"
    body = timm.create_model("resnet18", num_classes=10)
    body.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 64, 64))
    save_for_hf(body, path)
    return path, body.state_dict()


@pytest.mark.slow(reason="timm's vgg11, the smallest that shares a name, has 130 million weights")
def test_timms_own_network_is_made_where_a_short_name_is_the_same():
    ours, timms = (type(create(name, DATA).body) for name in ("vgg11", "timm/vgg11"))
    with torch.device("meta"):
        assert timms is type(timm.create_model("vgg11", num_classes=10))
    assert timms is not ours


def test_a_python_file_is_no_network_but_may_hold_one():
    outside = Path.cwd().parent / "mine.py"
    for file, module in (
        ("mine.py", "mine"),
        ("./mine.py", "mine"),
        ("nets/mine.py", r"nets\.mine"),
        (outside, "mine"),
    ):
        for member, factory in (("", "FACTORY"), (":plain", "plain")):
            with pytest.raises(UserError, match=f"mine.py{member}' names no network; expected {module}:{factory}, the"):
                check_name(f"{file}{member}")


@pytest.mark.parametrize(("member", "factory"), [("", "FACTORY"), (":plain", "plain")])
def test_code_of_the_running_script_is_refused_since_no_other_process_finds_it_nor_a_change_of_it(member, factory):
    said = f"__main__{member}' is code of the running script .* into a file, such as .*, and give mynets:{factory}"
    with pytest.raises(UserError, match=said):
        check_name(f"__main__{member}")


def test_a_folder_that_timm_saved_gives_its_network_and_its_weights(folder):
    path, state = folder
    network = create(f"local-dir:{path}", DATA, pretrained=True)
    assert same(network.body.state_dict(), state)
    assert network.image_size == 64
    assert network.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert pretrained_classes(f"local-dir:{path}") == 10


def test_a_folder_gives_the_architecture_alone_where_its_weights_are_not_asked_for(folder):
    path, state = folder
    network = create(f"local-dir:{path}", DATA)
    assert not same(network.body.state_dict(), state)
    wider = create(
        f"local-dir:{path}", DATA._replace(num_classes=7, class_names=tuple("abcdefg")), pretrained=True
    ).body
    assert wider.fc.weight.shape == (7, 512)
    assert wider.layer1[0].conv1.weight.equal(state["layer1.0.conv1.weight"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm/resnet17", r"unknown model 'timm/resnet17'; did you mean .*resnet"),
        ("mynets.plain", r"unknown model 'mynets\.plain'.*\(all: kdzoo list models; your own: MODULE:FACTORY\)$"),
        ("local-dir:nowhere", r"no config\.json in folder 'nowhere'"),
        ("hf-hub:resnet18", "expected hf-hub:OWNER/NAME"),
        ("torchvision:resnet17", "unknown torchvision model 'resnet17'"),
    ],
)
def test_names_that_lead_nowhere_are_refused(name, said):
    with pytest.raises(UserError, match=said):
        check_name(name)
    with pytest.raises(UserError, match=said):
        pretrained_classes(name)


def test_a_folder_that_timm_cannot_read_is_named_as_the_reason(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"')
    with pytest.raises(UserError, match=r"JSONDecodeError.*; check what its folder holds"):
        create(f"local-dir:{tmp_path}", DATA)


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch, caplog):
    def refuse(*_, **__):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", refuse)
    with pytest.raises(UserError, match=r"hf-hub:some/model.*no network.*check its name and the") as error:
        create("hf-hub:some/model", DATA, pretrained=True)
    assert "\n" not in str(error.value)
    assert not caplog.messages


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The weights of torchvision's ResNet-18 and SqueezeNet, drawn at random, where torchvision keeps its downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    states = {}
    for name in ("resnet18", "squeezenet1_1"):
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        states[name] = torchvision.models.get_model(name, weights=None).state_dict()
        torch.save(states[name], tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    return states


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_torchvisions_published_weights_come_with_their_size_and_statistics(name, published):
    thousand = DATA._replace(num_classes=1000, class_names=tuple(map(str, range(1000))))
    network = create(f"torchvision:{name}", thousand, pretrained=True)
    assert same(network.body.state_dict(), published[name])
    assert (network.image_size, network.adapted) == (224, ("images resized to 224 inside",))
    assert network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert pretrained_classes(f"torchvision:{name}") == 1000


@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc."), ("squeezenet1_1", "classifier.1.")])
def test_torchvisions_weights_get_a_new_head_for_other_classes(name, head, published):
    state = create(f"torchvision:{name}", DATA, pretrained=True).body.state_dict()
    kept = {key for key, value in state.items() if value.equal(published[name][key]) and "num_batches" not in key}
    assert kept == {key for key in state if not key.startswith(head) and "num_batches" not in key}


@pytest.mark.slow(reason="passes through large networks")
def test_torchvisions_architecture_is_made_without_its_weights_where_they_are_not_fetched(published):
    state = create("torchvision:resnet18", DATA, pretrained=True, fetch=False).body.state_dict()
    assert not state["conv1.weight"].equal(published["resnet18"]["conv1.weight"])
    assert state["conv1.weight"].shape == (64, 3, 7, 7)


def test_an_unknown_name_of_torchvisions_weights_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown weights 'IMAGENET1K_V7'; did you mean IMAGENET1K_V1"):
        create("torchvision:resnet18", DATA, pretrained=True, weights="IMAGENET1K_V7")


def test_keywords_of_a_network_are_settings_of_the_run():
    run = resolve(
        {"distiller": {"name": "kd"}, "teacher": {"name": "vit_pico"}, "student": {"name": "vit_pico"}},
        ["student.options.drop_path_rate=0.3", "teacher.options.img_size=48"],
    )
    assert run.settings.student.options == {"drop_path_rate": 0.3}
    assert run.settings.teacher.options == {"img_size": 48}
    assert json.loads(json.dumps(run.plain()))["student"]["options"] == {"drop_path_rate": 0.3}
    network = create("vit_pico", DATA, **run.settings.student.options)
    assert network.body.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert create("vit_pico", DATA, **run.settings.teacher.options).image_size == 48


def test_keywords_that_are_no_networks_are_refused():
    names = {"distiller": {"name": "none"}, "student": {"name": "resnet8"}}
    with pytest.raises(UserError, match=r"student\.options\.num_classes is no keyword to set"):
        resolve(names, ["student.options.num_classes=3"])
    with pytest.raises(UserError, match=r"'resnet8' cannot be built.*drop_pth"):
        create("resnet8", DATA, drop_pth=0.1)
