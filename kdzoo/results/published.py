"""Look up published accuracies in ``configs/published.csv``, by data, protocol, pair, method and epoch."""

from functools import cache
from typing import NamedTuple

import pandas as pd

from kdzoo.files import shipped_folder

KEY = ["dataset", "protocol", "teacher", "student", "method", "epoch"]

# The authors' name for a pair of recipes, and ours for CNN students and for token students.
# Source: OFA-KD trains the former by SGD and the latter by AdamW.
RECIPES = {
    ("cifar100", "ofa"): ("ofa-cnn", "ofa-vit"),
    ("imagenet", "ofa"): ("imagenet-cnn", "imagenet-vit"),
}
OTHERWISE_TRAINED = ("protocol=", "epochs=", "lr=", "pretrained=", "finetune=")  # settings of a teacher
TOKEN_STUDENTS = {"deit_t", "resmlp_s12", "swin_nano", "swin_pico"}


class Published(NamedTuple):
    """A published top-1 accuracy in percent, with its source."""

    top1: float
    std: float | None
    source: str
    status: str  # read: in the authors' own place; quoted: by others
    note: str = ""  # what others got who tried it again

    @property
    def origin(self) -> str:
        """The source, how the number was read there, and what is noted on it, as a footnote shows them."""
        return f"{self.source} ({self.status})" + (f", but {self.note}" if self.note else "")


@cache
def everything() -> pd.DataFrame:
    """Read all rows of the file, including unverified ones, with our names of the protocols."""
    with (shipped_folder() / "published.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file).fillna({"note": ""})
    named = zip(table["dataset"], table["protocol"], table["student"], strict=True)
    table["protocol"] = [_recipe(data, protocol, student) for data, protocol, student in named]
    return table


def find(
    data: str, protocol: str, teacher: str, student: str, method: str, epoch: str, ship: str = "", measured: str = ""
) -> Published | None:
    """Find the published number of exactly this setting, or None. Rows marked ``unverified`` do not count.

    Args:
        teacher: a name, which settings such as its weights may follow in brackets; nothing is published of one that
            was trained otherwise, nor of several, with plus signs between their names. ``-`` for a student trained
            alone, whose number does not depend on the teacher it stands beside.
        method: a method's name, or ``teacher`` for the teacher's own accuracy.
        epoch: ``last`` or ``best``.
        ship: the student that our runs keep, which no published number depends on.
        measured: what our top-1 is a share of; published ones are accuracies.
    """
    alone = teacher == "-"
    named, _, changes = teacher.partition(" (")
    is_another = " + " in teacher or any(change.startswith(OTHERWISE_TRAINED) for change in changes.split(", "))
    if is_another or measured not in ("", "accuracy"):
        return None
    numbers = _index(alone).get((data, protocol, "" if alone else named, student, method, epoch), [])
    return numbers[0] if len({number.top1 for number in numbers}) == 1 else None


@cache
def _index(alone: bool) -> dict[tuple[str, ...], list[Published]]:
    """The verified rows by their key; the teacher is left out of it where the student is ``alone``."""
    index: dict[tuple[str, ...], list[Published]] = {}
    for row in everything().to_dict("records"):
        if row["status"] != "unverified":
            key = tuple("" if alone and name == "teacher" else str(row[name]) for name in KEY)
            std = None if pd.isna(row["std"]) else float(row["std"])
            number = Published(float(row["top1"]), std, row["source"], row["status"], row["note"])
            index.setdefault(key, []).append(number)
    return index


def _recipe(data: str, protocol: str, student: str) -> str:
    cnn, token = RECIPES.get((data, protocol), (protocol, protocol))
    return token if student in TOKEN_STUDENTS else cnn
