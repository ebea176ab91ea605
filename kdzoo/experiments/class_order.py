"""Notice a teacher that knows the classes in another order: it is right, and every answer counts as wrong."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdzoo.data.classes import ORDERS, in_order
from kdzoo.errors import UserError
from kdzoo.quantities import counted


def check_order(teacher: str, class_names: Sequence[str], confusion: NDArray[np.int64]) -> None:
    """Check that a teacher's outputs stand for the classes of the same position.

    Args:
        teacher: its name.
        class_names: (K,) the classes in the data's order.
        confusion: (K, K) how many images of each class (row) it takes for each class (column).

    Raises:
        UserError: renaming its classes one to one makes it much better, so that it was trained with another order.
    """
    if (confusion.argmax(axis=1) == np.arange(len(confusion))).all():
        return  # each class is the commonest answer to its images, so no other order is better
    from scipy.optimize import linear_sum_assignment  # here, as it takes a third of a second

    rows, columns = linear_sum_assignment(confusion, maximize=True)
    images = confusion.sum()
    right, renamed = confusion.trace() / images, confusion[rows, columns].sum() / images
    error = np.sqrt(renamed * (1 - renamed) / images)
    commonest = confusion.sum(axis=1).max() / images  # which a teacher that knows nothing may be renamed to reach
    if renamed < 0.5 or renamed - max(right, commonest) < max(0.01, 3 * error):
        return
    first = int(np.flatnonzero(rows != columns)[0])
    # Its output ``columns[k]`` answers for class k, so its own k-th class is the one whose images it answers k for.
    theirs = [class_names[k] for k in np.argsort(columns).tolist()]
    known = next((order for order in ORDERS if list(in_order(class_names, order)) == theirs), None)
    if known:
        todo = f"its order is the {known} one: set data.classes={known}"
    else:
        todo = "set data.classes=FILE, with the class names in its order, one a line"
    raise UserError(
        f"teacher {teacher} reaches {100 * right:.2f} %, and {100 * renamed:.2f} % once its classes are renamed one to "
        f"one, such as '{class_names[columns[first]]}' to '{class_names[first]}': it was trained with its classes in "
        f"another order; {todo}"
    )


def check_same(one: tuple[str, Sequence[str]], other: tuple[str, Sequence[str]]) -> None:
    """Check that outputs of two teachers, given by their names and the classes of their outputs, mean the same.

    Raises:
        UserError: their classes are others, or stand in another order.
    """
    (first, classes), (second, others) = one, other
    if list(classes) == list(others):
        return
    place = next((k for k, (a, b) in enumerate(zip(classes, others, strict=False)) if a != b), None)
    if place is None:
        said = f"{len(classes)} and {counted(len(others), 'class')}"
    else:
        said = f"'{classes[place]}' and '{others[place]}' as output {place}"
    raise UserError(
        f"teachers {first} and {second} were trained with {said}: their common answer would mean nothing; give weights "
        "that were trained with the same classes in the same order"
    )
