"""The versions that setup.cfg allows begin where those begin that the tests run with."""

from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LINES = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
OLDEST = {line.partition("==")[0]: Version(line.partition("==")[2]) for line in LINES if not line.startswith("#")}
UNTRIED = {"ray", "datasets", "mlflow-skinny", "SQLAlchemy", "alembic", "wandb"}
TOOLS = {"hypothesis", "mypy", "pandas-stubs", "pytest", "pytest-xdist", "ruff"}
TOOLS |= {"scipy-stubs", "selenium", "types-psutil", "types-PyYAML"}
TOOLS |= {"latex2mathml", "mkdocs", "mkdocs-material", "mkdocstrings", "ziamath"}


def requirements() -> list[Requirement]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    found = {line for text in lines for line in text.split("\n") if line and not line.startswith("%")}
    return [Requirement(line) for line in sorted(found)]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_the_oldest_version_allowed_is_one_that_the_tests_run_with(requirement):
    if requirement.name in UNTRIED | TOOLS:
        return
    [floor] = requirement.specifier
    assert floor.operator == ">="
    assert Version(floor.version) == OLDEST[requirement.name]
