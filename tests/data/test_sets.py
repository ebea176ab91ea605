"""The sets that have names of their own: their splits, their measures, and what a limit keeps of them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from kdzoo import registry
from kdzoo.data import open_dataset
from kdzoo.data.sources import open_source
from kdzoo.errors import UserError


def test_digits_are_split_by_class_once_and_for_all() -> None:
    one, other = open_dataset("digits"), open_dataset("digits")
    assert one.fits
    assert one.device == next(one.test_batches(1))[0].device == torch.device("cpu")
    assert one.spec.num_classes == 10
    assert one.spec.image_size == 8
    assert len(one.spec.labels) == 1437
    assert one.test_size == 360
    assert torch.equal(one.spec.labels, other.spec.labels)
    images, labels = next(one.test_batches(360))
    assert images.shape == (360, 3, 8, 8)
    assert images.max() == 1
    counts = torch.bincount(labels)
    assert counts.min() >= 34
    assert counts.max() <= 37


def test_digits_that_are_kept_in_the_cache_are_those_of_scikit_learn_and_made_again_where_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded() -> bytes:
        _, train, test = registry.data_sets.load("digits")().load(tmp_path)
        assert test is not None
        return b"".join(np.asarray(array).tobytes() for array in (*train, *test))

    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path))
    file = tmp_path / "data" / "digits.npz"
    made, whole = loaded(), file.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:middle], whole[:middle] + bytes(9) + whole[middle + 9 :]):
        file.write_bytes(damaged)
        assert loaded() == made
        assert file.read_bytes() != damaged
    for others in ({"train": np.zeros(3)}, {name: np.zeros(2, np.uint8) for name in np.load(file).files}):
        np.savez(file, **others)  # type: ignore[arg-type]  # as the code that writes it
        assert loaded() == made
    kept = file.stat().st_mtime_ns
    assert loaded() == made
    assert file.stat().st_mtime_ns == kept
    file.unlink()
    file.mkdir()  # where nothing can be written
    assert loaded() == made


def test_mean_and_deviation_are_those_of_the_training_images() -> None:
    data = open_dataset("digits")
    source = open_source("digits", Path())
    pixels = source.train.array.astype(np.float64) / 255  # type: ignore[union-attr]
    assert np.allclose(data.spec.mean, pixels.mean((0, 1, 2)), atol=1e-5)
    assert np.allclose(data.spec.std, pixels.std((0, 1, 2)), atol=1e-5)


def test_a_limit_keeps_every_class_share_and_the_test_set() -> None:
    few = open_dataset("digits", limit=50)
    assert torch.bincount(few.spec.labels).tolist() == [5] * 10
    assert few.test_size == 360
    assert torch.equal(few.spec.labels, open_dataset("digits", limit=50).spec.labels)
    with pytest.raises(UserError, match="limit is 0"):
        open_dataset("digits", limit=0)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean digits"):
        open_dataset("digit")


@pytest.mark.parametrize(
    ("name", "classes", "key", "names"),
    [("cifar10", 10, "labels", "label"), ("cifar100", 100, "fine_labels", "fine_label")],
)
def test_cifar_is_read_from_torchvision_s_files(
    name: str, classes: int, key: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.uint16).astype(np.uint8).reshape(2, 3072)
    for file, _ in (*kind.train_list, *kind.test_list):
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: [1, 0]}))
    named = [f"class {number}" for number in range(classes)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({f"{names}_names": named}))
    data = open_dataset(name, root=tmp_path)
    images, labels = next(data.test_batches(2))
    assert data.spec.class_names == tuple(named)
    assert labels.tolist() == [1, 0]
    assert np.array_equal(images.numpy(), pixels.reshape(2, 3, 32, 32) / np.float32(255))


def test_cifar_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", offline)
    with pytest.raises(UserError, match=r"cifar100 is not under .* \(no route\)") as error:
        open_dataset("cifar100", root=tmp_path)
    assert "\n" not in str(error.value)
