"""The cache of decoded images: reused, rebuilt when damaged or outdated, never half written."""

import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdzoo.data import open_dataset
from kdzoo.errors import UserError

MakeTree = Callable[..., Path]


def shown(root: Path, **settings: object) -> torch.Tensor:
    data = open_dataset(f"folder:{root}", **settings)  # type: ignore[arg-type]
    return torch.cat([images for images, _ in data.test_batches(4)])


def arrays(cache: Path) -> dict[Path, int]:
    """The cache's arrays and when each was written."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}


def test_the_second_opening_decodes_nothing(make_tree: MakeTree, cache: Path) -> None:
    root = make_tree()
    first = shown(root)
    written = arrays(cache)
    assert len(written) == 2
    assert torch.equal(shown(root), first)
    assert arrays(cache) == written


def test_decoding_tells_how_far_it_is_and_an_opening_from_the_cache_nothing(make_tree: MakeTree, cache: Path) -> None:
    root, told = make_tree(), list[str]()
    shown(root, report=told.append)
    assert [line.split(":")[0] for line in told] == ["decoding train", "decoding test"]
    assert all(": 0 of " in line for line in told)
    again = list[str]()
    shown(root, report=again.append)
    assert again == []


def test_a_cache_folder_may_be_given(make_tree: MakeTree, cache: Path, tmp_path: Path) -> None:
    shown(make_tree(), cache=tmp_path / "mine")
    assert len(arrays(tmp_path / "mine")) == 2
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["flipped", "shortened", "emptied", "overwritten", "signed", "turned"])
def test_a_damaged_cache_is_rebuilt_and_says_so(
    make_tree: MakeTree, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_tree()
    first = shown(root)
    victim = next(path for path in arrays(cache) if path.name.startswith("test"))
    content = victim.read_bytes()
    victim.write_bytes(
        {
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "shortened": content[:-7],
            "emptied": b"",
            "overwritten": b"[1, 2]" + content[6:],
            "signed": content.replace(b"|u1", b"|i1", 1),
            "turned": content.replace(b"'fortran_order': False", b"'fortran_order': True ", 1),
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        again = shown(root)
    assert torch.equal(again, first)
    assert f"'{victim}' is damaged; rebuilding it" in caplog.text
    assert victim.read_bytes() == content


def test_an_array_without_its_checksum_is_rebuilt(make_tree: MakeTree, cache: Path) -> None:
    root = make_tree()
    first = shown(root)
    for victim in arrays(cache):
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")
        victim.with_suffix(".json").unlink()
    assert torch.equal(shown(root), first)


def test_two_processes_may_decode_the_same_images_at_once(make_tree: MakeTree, cache: Path, tmp_path: Path) -> None:
    root = make_tree(sizes=[(100, 100)])
    code = (
        f"from kdzoo.data import open_dataset; pixels = open_dataset('folder:{root}').train_pixels\n"
        "print(pixels.long().square().sum().item())"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    alone = open_dataset(f"folder:{root}", cache=tmp_path / "mine").train_pixels
    assert alone is not None
    said_and_warned = [process.communicate() for process in both]
    assert said_and_warned == [(f"{alone.long().square().sum()}\n", "")] * 2
    written = arrays(cache)
    shown(root)
    assert arrays(cache) == written


def test_a_changed_source_is_decoded_again_and_says_so(make_tree: MakeTree, caplog: pytest.LogCaptureFixture) -> None:
    root = make_tree()
    first = shown(root)
    victim = root / "test" / "ant" / "0.png"
    Image.new("RGB", (12, 12), (255, 0, 0)).save(victim)
    with caplog.at_level(logging.WARNING):
        again = shown(root)
    assert "outdated; rebuilding it" in caplog.text
    assert torch.equal(again[0, :, 5, 5], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(again[1:], first[1:])


def test_the_time_of_a_change_counts(make_tree: MakeTree, caplog: pytest.LogCaptureFixture) -> None:
    root = make_tree()
    shown(root)
    os.utime(root / "test" / "ant" / "0.png", ns=(1, 1))
    with caplog.at_level(logging.WARNING):
        shown(root)
    assert "outdated" in caplog.text


def test_a_cache_that_cannot_be_written_is_one_line(make_tree: MakeTree, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(UserError, match="cannot be written") as error:
        shown(make_tree(), cache=blocked / "below")
    assert "\n" not in str(error.value)


def test_a_disk_that_fills_up_leaves_nothing_behind(make_tree: MakeTree, cache: Path) -> None:
    @contextmanager
    def files_of_at_most(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    root = make_tree(sizes=[(100, 100)])
    with files_of_at_most(100_000), pytest.raises(UserError, match="cannot be written"):
        shown(root)
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert len(shown(root)) == 6


def test_a_corrupt_image_leaves_nothing_behind(make_tree: MakeTree, cache: Path) -> None:
    root = make_tree()
    victim = root / "train" / "bee" / "3.png"
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot read image"):
        shown(root)
    assert [path for path in cache.rglob("*") if path.is_file()] == []
