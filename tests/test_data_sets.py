"""A data set is a plug-in: one file with one class, found by name or by path, and nothing else is edited."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import numpy as np
import pytest
import torch
from PIL import Image

import kdzoo
from kdzoo import UserError, registry
from kdzoo.data import fingerprint, open_dataset, outline
from kdzoo.resolve import resolve
from kdzoo.results import table
from kdzoo.store.folder import find_runs

from . import made_runs

STRIPES = '''"""Stripes that lie or stand."""

import numpy as np

from kdzoo import ImageSet


class Stripes(ImageSet):
    num_classes = 2
    image_size = 8

    def __init__(self, *, images: int = 64):
        self.images = images

    def load(self, root):
        labels = np.arange(self.images) % 2
        lying = np.tile(np.arange(8)[:, None] % 2 * 200, (1, 8))
        pictures = np.stack([lying.T if label else lying for label in labels]).astype(np.uint8)
        return ["lying", "standing"], (pictures, labels), (pictures[:16], labels[:16])
'''


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    file = tmp_path / "stripes.py"
    file.write_text(STRIPES)
    return file


def giving(folder: Path, load: str, facts: str = "pass") -> str:
    """Write a set whose ``load`` has this body, and return its path."""
    file = folder / "mine.py"
    head = "import numpy as np\nfrom kdzoo import ImageSet\n"
    file.write_text(f"{head}class Mine(ImageSet):\n    {facts}\n    def load(self, root):\n{indent(load, ' ' * 8)}\n")
    return str(file)


def test_the_sets_of_kdzoo_are_found_by_their_entry_point() -> None:
    assert {"bands", "cifar10", "cifar100", "digits", "folder"} <= set(registry.data_sets.names())


def test_sets_are_listed_and_described_without_being_imported() -> None:
    code = (
        "import sys; sys.argv = ['kdzoo', 'list', 'data']\nfrom kdzoo.cli import main\ntry: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy', 'kdzoo.data', 'kdzoo.datasets.digits'} & set(sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in said.splitlines()] == [
        *("bands", "cifar10", "cifar100", "digits", "folder:PATH", "hf:PATH", "images:PATH")
    ]
    assert all(len(line.split()) > 5 for line in said.splitlines())


@pytest.mark.parametrize(("name", "options"), [("digits", {}), ("bands", {}), ("bands", {"classes": 4, "size": 24})])
def test_what_a_set_says_of_itself_is_what_it_loads(name: str, options: dict[str, int]) -> None:
    said, spec = registry.data_sets.load(name)(**options), open_dataset(name, options=options).spec
    assert (said.num_classes, said.image_size) == (spec.num_classes, spec.image_size)


def test_a_set_is_described_without_being_loaded_where_its_file_says_enough(tmp_path: Path) -> None:
    assert outline("cifar100")[1:4] == (100, tuple(map(str, range(100))), 32)
    with pytest.raises(UserError, match="RuntimeError: loaded"):  # it says nothing, so that it must be
        outline(giving(tmp_path, "raise RuntimeError('loaded')"))
    assert outline(giving(tmp_path, "raise RuntimeError", "num_classes = 3; image_size = 5")).num_classes == 3


@pytest.mark.slow(reason="starts a process")
def test_no_room_knows_a_set_by_name() -> None:
    package = Path(kdzoo.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name != "datasets":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert "kdzoo.datasets" not in str(getattr(node, "module", "")), path


def test_a_file_is_a_set_with_options_and_a_student_learns_from_it(stripes: Path, tmp_path: Path) -> None:
    assert registry.data_sets.find(str(stripes)).summary == "Stripes that lie or stand."
    data = open_dataset(str(stripes), options={"images": 40})
    assert (data.spec.class_names, data.spec.labels.tolist()) == (("lying", "standing"), [0, 1] * 20)
    images, _ = next(data.test_batches(2))
    assert torch.equal(images[0], images[1].transpose(1, 2))
    result = kdzoo.run(
        "none",
        student="resnet8",
        data=str(stripes),
        out=tmp_path / "runs",
        overrides=["protocol.epochs=8", "protocol.batch_size=16", "protocol.augmentation.crop=0"],
    )
    assert result.top1 == 100


def test_options_are_checked_as_those_of_any_set(stripes: Path) -> None:
    base = {"distiller": {"name": "none"}, "student": {"name": "resnet8"}, "data": {"name": str(stripes)}}
    assert resolve(base, ["data.options.images=32"]).settings.data.options == {"images": 32}
    with pytest.raises(UserError, match=r"unknown setting 'data.options.image'; did you mean data.options.images"):
        resolve(base, ["data.options.image=32"])


def test_an_edited_set_is_another_run_and_one_that_is_gone_leaves_its_results_readable(
    stripes: Path, tmp_path: Path
) -> None:
    overrides = [f"data.name={stripes}", "data.options.images=32"]
    before = made_runs.write(tmp_path / "runs", 80.0, 0, *overrides, data=str(stripes))
    stripes.write_text(STRIPES + "# another\n")
    after = made_runs.write(tmp_path / "runs", 80.0, 0, *overrides, data=str(stripes))
    assert before.path != after.path
    stripes.unlink()
    assert "images=32" in table.rows(find_runs([before.path]))["data"].item()


@pytest.mark.slow(reason="starts a process that imports torch")
def test_a_package_brings_sets_by_its_entry_point(tmp_path: Path) -> None:
    (tmp_path / "their_sets").mkdir()
    (tmp_path / "their_sets" / "__init__.py").write_text("")
    (tmp_path / "their_sets" / "stripes.py").write_text(STRIPES)
    (tmp_path / "theirs-1.0.dist-info").mkdir()
    (tmp_path / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (tmp_path / "theirs-1.0.dist-info" / "entry_points.txt").write_text("[kdzoo.datasets]\nall = their_sets\n")
    code = (
        "from kdzoo import registry; from kdzoo.data import open_dataset\n"
        "print(registry.data_sets.find('stripes').module, open_dataset('stripes').test_size)"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.split() == ["their_sets.stripes", "16"]
    assert "stripes" not in registry.data_sets.names()  # as the package is not here


def test_files_of_any_size_may_be_listed_and_are_streamed_or_kept_alike(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(6):
        noise = random.integers(0, 256, (10 + number, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    name = giving(
        tmp_path,
        "paths = [root / '0.png', '1.png', str(root / '2.png'), '3.png']\n"
        "return ('a', 'b'), (paths, [0, 1, 0, 1]), (['4.png', '5.png'], [1, 0])",
    )
    kept, streamed = (open_dataset(name, root=tmp_path, image_size=8, stream=stream) for stream in (False, True))
    assert kept.spec.labels.tolist() == [0, 1, 0, 1]
    assert [labels.tolist() for _, labels in streamed.test_batches(2)] == [[1, 0]]
    for ours, theirs in zip(kept.test_batches(2), streamed.test_batches(2), strict=True):
        assert ours[0].shape == theirs[0].shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match=r"cannot read image '.*/0\.png' \(FileNotFoundError\)"):
        open_dataset(name, root=tmp_path / "elsewhere")


@pytest.mark.parametrize("array", ["gray", "gray[..., None]", "np.repeat(gray[..., None], 3, 3)[:, :, :, ::-1]"])
def test_gray_images_and_arrays_that_are_only_read_are_taken(tmp_path: Path, array: str) -> None:
    load = (
        "gray = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)\ngray.flags.writeable = False\n"
        f"images = {array}\nreturn ['a', 'b', 'c'], (images, [0, 1, 2]), (images, np.array([2, 1, 0], np.uint8))"
    )
    images, labels = next(open_dataset(giving(tmp_path, load)).test_batches(3))
    assert torch.equal(images[:, 0].flatten() * 255, torch.arange(48.0))
    assert torch.equal(images[:, 0], images[:, 2])
    assert labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("digit", "unknown data 'digit'; did you mean digits"),
        ("folder", "data 'folder': expected folder:PATH"),
        ("digits:8", "data 'digits:8': expected digits"),
        ("", "unknown data ''; known: "),
        (
            "pictures",
            "data 'pictures' is a folder; expected folder:pictures where it has a folder for each class, or images:",
        ),
        ("stripes", "unknown data 'stripes'; did you mean stripes.py?"),
        ("./nowhere.py", "no file ./nowhere.py; expected a Python file that holds one subclass of kdzoo.ImageSet"),
    ],
)
def test_a_name_that_is_none_is_one_line(name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "stripes.py").write_text(STRIPES)
    with pytest.raises(UserError) as caught:
        open_dataset(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class Mine: pass", "holds 0 data sets; expected one subclass of kdzoo.ImageSet"),
        ("from kdzoo import ImageSet\nclass A(ImageSet): pass\nclass B(ImageSet): pass", "holds 2 data sets"),
        ("import nothing_like_this", "could not be imported (ModuleNotFoundError"),
    ],
)
def test_a_file_that_holds_no_single_set_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        open_dataset(str(file))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = "good = np.zeros((2, 4, 4, 3), np.uint8), [0, 1]\nother = np.zeros((2, 6, 6, 3), np.uint8), [0, 1]\n"


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("None", "load gives NoneType; expected (class names, (training images, labels), (test images, labels))"),
        ("['a', 'b'], good", "load gives (list, (uint8 (2, 4, 4, 3), list)); expected (class names,"),
        ("['a', 'b'], (iter(good[0]), [0, 1]), None", "load gives (list, (iterator, list), NoneType); expected"),
        ("['a', 'b'], good * 2, good", "load gives (list, tuple, (uint8 (2, 4, 4, 3), list)); expected"),
        ("'ab', good, good", "class names are str; expected a list of words"),
        ("[0, 1], good, good", "class names are list; expected a list of words"),
        ("['a', 'b', 'c'], good, good", "load gives 3 class names; expected 2, as num_classes says"),
        ("['a', 'b'], other, other", "sides of 6 (train) and 6 (test) pixels; expected 4 in both"),
        ("['a', 'b'], good, other", "sides of 4 (train) and 6 (test) pixels; expected 4 in both"),
        ("['a', 'b'], (good[0] / 255, [0, 1]), good", "train images are float64 (2, 4, 4, 3); expected uint8 (N, S, S"),
        ("['a', 'b'], (good[0].transpose(0, 3, 1, 2), [0, 1]), good", "train images are uint8 (2, 3, 4, 4)"),
        ("['a', 'b'], good, (good[0][:, 1:], [0, 1])", "test images are uint8 (2, 3, 4, 3)"),
        ("['a', 'b'], (['a.png', 'b.png'], [0, 1]), good", "train images are list; expected uint8"),
        (
            "['a', 'b'], ([1, 2], [0, 1]), ([1, 2], [0, 1])",
            "train images are a list that holds int; expected an array, or",
        ),
        ("['a', 'b'], (good[0], [0]), good", "2 train images with labels int64 (1,); expected a whole number for each"),
        ("['a', 'b'], (good[0], [0.0, 1.0]), good", "2 train images with labels float64 (2,)"),
        ("['a', 'b'], (good[0], [[0], [1, 1]]), good", "load gives (list, (uint8 (2, 4, 4, 3), list), (uint8"),
        ("['a', 'b'], good, ([], [])", "0 test images with labels"),
        ("['a', 'b'], (good[0], [1, 2]), good", "train labels from 1 to 2; expected 0 to 1, positions in the class"),
        ("['a', 'b'], good, (good[0], [-1, 0])", "test labels from -1 to 0; expected 0 to 1"),
    ],
)
def test_a_set_that_gives_something_else_is_one_line(tmp_path: Path, returned: str, said: str) -> None:
    facts = "num_classes = 2; image_size = 4"
    open_dataset(giving(tmp_path, f"{GOOD}return ['a', 'b'], good, good", facts))  # the one that is right
    name = giving(tmp_path, f"{GOOD}return {returned}", facts)
    with pytest.raises(UserError) as caught:
        open_dataset(name)
    assert f"data '{name}': {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_of_one_name_are_not_put_in_order_as_they_would_become_one(tmp_path: Path) -> None:
    name = giving(tmp_path, f"{GOOD}return ['crane', 'crane'], good, good")
    assert open_dataset(name).spec.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"data\.classes=text: two classes of the data are called 'crane'; rename one"):
        open_dataset(name, classes="text")


def test_classes_without_a_training_image_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = "pictures, labels = np.zeros((4, 8, 8), np.uint8), [0, 1, 1, 4]"
    shown = "(pictures, np.array(labels)), (pictures, np.arange(4))"
    open_dataset(giving(tmp_path, f"{given}\nreturn list('abcdefg'), {shown}"))
    assert "no training image shows c, d, f, ...; the student cannot learn what they look like" in caplog.text


def test_a_set_without_load_says_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from kdzoo import ImageSet\nclass Mine(ImageSet):\n    pass\n")
    with pytest.raises(UserError, match=r"Mine has no load\(root\)"):
        open_dataset(str(file))


@pytest.mark.parametrize("error", ["ValueError('no')", "SystemExit(0)", "BaseException('no')"])
@pytest.mark.parametrize("part", ["__init__", "load", "fingerprint"])
def test_a_set_of_ones_own_that_fails_is_one_line_which_names_the_part(tmp_path, part, error):
    file = tmp_path / "mine.py"
    text = "from kdzoo import ImageSet\n\n\nclass Mine(ImageSet):\n    def load(self, root):\n        return None\n\n"
    file.write_text(text + f"    def {part}(self, *_):\n        raise {error}\n")
    with pytest.raises(
        UserError, match=rf"mine.py': (its constructor|{part}) failed \({error[:9]}.*; correct its file"
    ):
        fingerprint(str(file))
