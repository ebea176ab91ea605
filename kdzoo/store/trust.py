"""Code that a run's settings name runs when they are used, so it runs only where it is one's own or trusted."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kdzoo import own_code
from kdzoo.errors import UserError
from kdzoo.files import digest

PARTS = ("distiller", "data", "teacher", "student")  # of a run, which may be code


def check_code(plain: Mapping[str, Any], run: Path, working: Path, parts: Collection[str] = PARTS) -> None:
    """Check that all code which a run's settings name is the user's: in the working folder, and as it was recorded.

    Nothing is imported. Files are looked for where the run was made, modules in the working folder of then too.

    Args:
        plain: the run's settings, as they stand in its file.
        run: its folder, in which nothing is the user's own.
        working: the user's working folder.
        parts: of the run, whose code would be used.

    Raises:
        UserError: some is not; names each, and the option that trusts it.
    """
    recorded = plain.get("files")
    known = recorded if isinstance(recorded, Mapping) else {}
    names = {part: str(plain[part]["name"] or "") if part in parts else "" for part in PARTS}
    others = [str(other.get("name") or "") for other in plain["teacher"].get("others", ()) if "teacher" in parts]
    networks = [names["teacher"], *others, names["student"]]
    data = [names["data"], str(plain["data"].get("test") or "") if "data" in parts else ""]
    found = own_code.named(names["distiller"], data, networks)
    strange = [
        name
        for name, files in found.items()
        if not files or not all(_is_own(file, run, working, known.get(key)) for key, file in files.items())
    ]
    if strange:
        raise UserError(
            f"{run} names code that would run here: {', '.join(strange)}. It is not in this working folder as it was "
            "when the run was made; read it, and pass --trust-code (trust_code=True) if you trust it"
        )


def _is_own(file: Path, run: Path, working: Path, recorded: object) -> bool:
    place = file.resolve()
    if not place.is_relative_to(working.resolve()) or place.is_relative_to(run.resolve()):
        return False
    return digest(place) == recorded
