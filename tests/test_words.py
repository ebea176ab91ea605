"""Users meet plain words: those that STYLE rules out stand in no docstring, message, help text or document."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RULED_OUT = re.compile(
    r"\b(shall|mend|mended|lest|whatever|nobody|to be had|at hand|of its own|goes on)\b", re.IGNORECASE
)
TEXTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        *(
            file
            for folder in ("kdzoo", "distillers", "examples", "benchmarks")
            for file in (ROOT / folder).rglob("*.py")
        ),
    ]
)


def found(text: str) -> list[str]:
    return [match[0].lower() for match in RULED_OUT.finditer(text)]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_word_is_ruled_out(file):
    assert found(file.read_text(encoding="utf-8")) == []


def test_words_are_found_in_any_case_and_only_whole():
    assert found("Whatever is at hand shall be mended") == ["whatever", "at hand", "shall", "mended"]
    assert found("a marshall's amendment, and it goes onwards") == []
