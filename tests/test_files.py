"""The cache is its owner's alone."""

import os
import stat

import pytest

from kdzoo.errors import StorageError, UserError
from kdzoo.files import cache_folder


def test_the_cache_is_made_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "new" / "cache"))
    before = os.umask(0)
    try:
        folder = cache_folder()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache_folder() == folder


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_cache_that_others_can_write_to_is_refused_with_the_remedy(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path))
    tmp_path.chmod(mode)
    with pytest.raises(UserError, match=rf"other users .* run 'chmod go-w {tmp_path}'"):
        cache_folder()
    tmp_path.chmod(0o755)  # that they read it is no harm
    assert cache_folder() == tmp_path


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KDZOO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="cannot be written"):
        cache_folder()
