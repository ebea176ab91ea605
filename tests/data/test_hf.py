"""Sets of Hugging Face's library: read from disk, written to the cache once, and told apart by their content."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdzoo.data import fingerprint, open_dataset
from kdzoo.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (14, 8, 8, 3), dtype=np.uint8)


def save(path: Path, splits: dict[str, tuple[int, int]], label: str = "classes") -> str:
    """Save these rows of the noise as splits; their classes are ant and bee in turn."""
    datasets = pytest.importorskip("datasets", reason="Hugging Face's library is not installed")
    pyarrow = pytest.importorskip("pyarrow")

    def encoded(image: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        return {"bytes": buffer.getvalue(), "path": None}

    kinds = {"classes": datasets.ClassLabel(names=["ant", "bee"]), "words": datasets.Value("string")}
    features = datasets.Features({"picture": datasets.Image(), "kind": kinds[label]})
    found = {}
    for split, (start, stop) in splits.items():
        rows = range(start, stop)
        names = [row % 2 if label == "classes" else ("ant", "bee")[row % 2] for row in rows]
        content = {"picture": [encoded(NOISE[row]) for row in rows], "kind": names}
        table = pyarrow.table(content, schema=features.arrow_schema)
        found[split] = datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="0")
    datasets.DatasetDict(found).save_to_disk(str(path))
    return f"hf:{path}"


@pytest.mark.parametrize(("label", "options"), [("classes", {}), ("words", {"label": "kind"})])
def test_a_saved_set_is_read_with_its_pixels_and_classes(tmp_path: Path, label: str, options: dict[str, str]) -> None:
    name = save(tmp_path / "set", {"train": (0, 10), "validation": (10, 14)}, label)
    data = open_dataset(name, options=options)
    assert data.spec.class_names == ("ant", "bee")
    assert data.spec.labels.tolist() == [0, 1] * 5
    assert data.train_pixels is not None
    assert torch.equal(data.train_pixels, torch.from_numpy(NOISE[:10]))
    assert torch.equal(next(data.test_batches(4))[1], torch.tensor([0, 1, 0, 1]))


def test_it_is_written_to_the_cache_once(tmp_path: Path, cache: Path) -> None:
    name = save(tmp_path / "set", {"train": (0, 10)})
    open_dataset(name, val=0.2)
    written = {path: path.stat().st_mtime_ns for path in (cache / "data" / "hf").rglob("*.img")}
    assert len(written) == 10
    open_dataset(name, val=0.2)
    assert {path: path.stat().st_mtime_ns for path in (cache / "data" / "hf").rglob("*.img")} == written


def test_its_fingerprint_is_that_of_its_content(tmp_path: Path) -> None:
    one, copy = (save(tmp_path / name, {"train": (0, 8), "test": (8, 12)}) for name in ("one", "copy"))
    other = save(tmp_path / "other", {"train": (2, 10), "test": (8, 12)})
    assert fingerprint(one) == fingerprint(copy) != fingerprint(other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image": "pic"}, "has no column of images 'pic' but picture, kind; name one by data.image=COLUMN"),
        ({"label": "species"}, "has no column of labels 'species'"),
    ],
)
def test_a_column_that_is_not_there_is_one_line(tmp_path: Path, options: dict[str, str], said: str) -> None:
    name = save(tmp_path / "set", {"train": (0, 4), "test": (4, 6)})
    with pytest.raises(UserError, match=said):
        open_dataset(name, options=options)


def test_a_library_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'kdzoo\[hf\]'"):
        open_dataset("hf:anywhere")
