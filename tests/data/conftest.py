"""Image trees made on the spot, and a cache folder of each test's own."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeTree = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("KDZOO_CACHE", str(folder))
    return folder


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """Writes a tree of noise: per class six training and two test images, sizes and formats in turn."""

    def make(
        sizes: Sequence[tuple[int, int]] = ((12, 12),),
        suffixes: Sequence[str] = (".png",),
        test: str = "test",
        classes: Sequence[str] = ("cat", "ant", "bee"),
    ) -> Path:
        random = np.random.default_rng(0)
        root = tmp_path / "tree"
        for split, count in (("train", 6), (test, 2)):
            for name in classes:
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    width, height = sizes[i % len(sizes)]
                    noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
                    Image.fromarray(noise).save(folder / f"{i}{suffixes[i % len(suffixes)]}")
        return root

    return make
