"""The commit that a run notes is that of kdzoo's checkout, whichever way leads there, and of no other repository."""

import importlib.util
import shutil
import subprocess

import pytest

from kdzoo.resolve import resolve
from kdzoo.store import environment


def git(folder, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit, in which no file is kdzoo's."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", "README")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def put(folder):
    (folder / "kdzoo" / "store").mkdir(parents=True)
    shutil.copy(environment.__file__, folder / "kdzoo" / "store")


@pytest.fixture
def checkout(repository):
    """A repository that has the module at kdzoo's place."""
    put(repository)
    git(repository, "add", "kdzoo")
    git(repository, "commit", "-q", "-m", "second")
    return repository


def revision(folder):
    """The commit that the module notes which lies in the package ``folder``."""
    spec = importlib.util.spec_from_file_location("copied", folder / "store" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = resolve({"distiller": {"name": "none"}, "student": {"name": "resnet8"}}, ["engine.device=cpu"])
    return module.environment(run)["revision"]


def test_a_checkout_has_its_commit_and_a_mark_where_files_differ(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert revision(checkout / "kdzoo") == head
    (checkout / "README").write_text("edited")
    assert revision(checkout / "kdzoo") == f"{head}+"


def test_links_to_a_checkout_or_to_its_package_lead_to_its_commit(checkout, tmp_path):
    head = git(checkout, "rev-parse", "HEAD")
    (tmp_path / "link").symlink_to(checkout)
    assert revision(tmp_path / "link" / "kdzoo") == head
    (tmp_path / "package").symlink_to(checkout / "kdzoo")
    assert revision(tmp_path / "package") == head


def test_a_worktree_has_its_own_commit(checkout, tmp_path):
    git(checkout, "worktree", "add", "-q", str(tmp_path / "tree"))
    git(tmp_path / "tree", "commit", "-q", "--allow-empty", "-m", "third")
    assert revision(tmp_path / "tree" / "kdzoo") == git(tmp_path / "tree", "rev-parse", "HEAD")


@pytest.mark.parametrize("place", [".", "venv/site-packages"])
def test_a_package_that_was_installed_into_another_repository_has_no_commit(repository, place):
    put(repository / place)
    assert revision(repository / place / "kdzoo") is None
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "second")
    assert (revision(repository / place / "kdzoo") is None) == (place != ".")


def test_a_hook_of_another_repository_does_not_stand_in_for_it(checkout, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    head = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert revision(checkout / "kdzoo") == head
