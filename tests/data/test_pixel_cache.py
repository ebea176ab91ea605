"""The cache of decoded images: reused, rebuilt when damaged or outdated, never half written."""

import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def rewritten(file: Path, content: bytes) -> None:
    """Write to a file of the cache, which is none to write to."""
    file.chmod(0o644)
    file.write_bytes(content)


def test_the_second_opening_decodes_nothing(make_tree: MakeTree, cache: Path) -> None:
    root = make_tree()
    first = shown(root)
    written = arrays(cache)
    assert len(written) == 2
    assert torch.equal(shown(root), first)
    assert arrays(cache) == written


def test_a_folder_with_the_longest_of_names_has_a_cache_too(make_tree: MakeTree, cache: Path, tmp_path: Path) -> None:
    root = make_tree().rename(tmp_path / ("\u00e9" * 127))  # 254 bytes
    shown(root)
    assert len(arrays(cache)) == 2


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
    rewritten(
        victim,
        {
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "shortened": content[:-7],
            "emptied": b"",
            "overwritten": b"[1, 2]" + content[6:],
            "signed": content.replace(b"|u1", b"|i1", 1),
            "turned": content.replace(b"'fortran_order': False", b"'fortran_order': True ", 1),
        }[damage],
    )
    with caplog.at_level(logging.WARNING):
        again = shown(root)
    assert torch.equal(again, first)
    assert f"'{victim}' is damaged; rebuilding it" in caplog.text
    assert victim.read_bytes() == content


HEADERS = {
    "negative": "(-9, 12, 12, 3)",
    "huge": "(10000000000, 10000000000, 10000000000, 3)",
    "beyond whole numbers": f"({10**30}, 12, 12, 3)",
    "no whole number": "(18.0, 12, 12, 3)",
    "nested deeply": "(" * 90 + ")" * 90,
    "none": "None",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_an_array_with_a_harmed_header_is_rebuilt(
    make_tree: MakeTree, cache: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_tree()
    first = shown(root)
    victim = next(path for path in arrays(cache) if path.name.startswith("train"))
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {HEADERS[kind]}}}".encode().ljust(246) + b"\n"
    magic = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little")
    rewritten(victim, magic + head + victim.read_bytes()[128:])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(shown(root), first)
    assert f"'{victim}' is damaged; rebuilding it" in caplog.text


def facts(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def harm(file: Path) -> None:
        noted = json.loads(file.read_text())
        change(noted)
        file.write_text(json.dumps(noted))

    return harm


HARMED_FACTS: dict[str, Callable[[Path], object]] = {
    "other brightness": facts(lambda noted: noted["facts"].update({"all at 12": [[0.0] * 3, [1.0] * 3]})),
    "another size": facts(lambda noted: noted["facts"].update(size=8)),
    "a size of text": facts(lambda noted: noted["facts"].update(size="x")),
    "another version": facts(lambda noted: noted.update(format=99)),
    "a key too many": facts(lambda noted: noted.update(more=1)),
    "no mapping": lambda file: file.write_text("[]"),
    "nested deeply": lambda file: file.write_text("[" * 100_000),
    "empty": lambda file: file.write_text(""),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
}


@pytest.mark.skipif(os.name != "posix", reason="pipes and links of POSIX")
@pytest.mark.parametrize("kind", HARMED_FACTS)
def test_facts_that_do_not_belong_to_the_pixels_are_measured_again(make_tree: MakeTree, cache: Path, kind: str) -> None:
    root = make_tree()
    first = open_dataset(f"folder:{root}").spec
    [notes] = cache.rglob("train.json")
    HARMED_FACTS[kind](notes)
    again = open_dataset(f"folder:{root}").spec
    assert (again.mean, again.std, again.image_size) == (first.mean, first.std, first.image_size)
    assert json.loads(notes.read_text())["facts"]["size"] == 12


def test_pixels_are_written_once_and_replaced_never_changed(make_tree: MakeTree, cache: Path) -> None:
    """A process that has mapped them would end by a signal where they were cut short under way."""
    first = shown(root := make_tree())
    assert all(path.stat().st_mode & 0o222 == 0 for path in arrays(cache))
    before = {path: path.stat().st_ino for path in arrays(cache)}
    os.utime(root / "train" / "ant" / "0.png", ns=(0, 0))
    assert torch.equal(shown(root), first)
    assert any(path.stat().st_ino != before[path] for path in arrays(cache))


def test_an_array_without_its_checksum_is_rebuilt(make_tree: MakeTree, cache: Path) -> None:
    root = make_tree()
    first = shown(root)
    for victim in arrays(cache):
        rewritten(victim, victim.read_bytes()[:-1] + b"?")
        victim.with_suffix(".json").unlink()
    assert torch.equal(shown(root), first)


@pytest.mark.slow(reason="starts two processes, each of which imports torch")
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


def test_a_file_put_back_with_its_former_time_and_size_is_decoded_again(make_tree: MakeTree) -> None:
    root = make_tree()
    victim = root / "test" / "ant" / "0.png"
    state, content = victim.stat(), victim.read_bytes()
    victim.write_bytes(bytes(len(content)))
    os.utime(victim, ns=(state.st_atime_ns, state.st_mtime_ns))
    damaged = open_dataset(f"folder:{root}", skip_damaged=True)
    victim.write_bytes(content)
    os.utime(victim, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert open_dataset(f"folder:{root}", skip_damaged=True).test_size == damaged.test_size + 1


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
