"""Measure networks without a classifier: by the images that lie nearest to each in their embedding."""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from kdzoo.errors import UserError

NEIGHBOURS = 20  # that vote for a class
TEMPERATURE = 0.07  # of their votes
BLOCK = 1024  # images whose cosines with all others are in memory at once
REFERENCE = 5000  # training images at most among which they are sought, spread over the classes


def vote(rows: Tensor, known: Tensor, labels: Tensor, classes: int, best: int, own: bool) -> tuple[Tensor, Tensor]:
    r"""Find the classes of images by those of their nearest neighbours: a weighted vote.

    A class has the votes :math:`\sum_i \exp(\cos(x, x_i) / 0.07)` of those of the 20 nearest that belong to it.

    Source: Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric Instance Discrimination, section 3.4.

    Args:
        rows: (N, D) embeddings.
        known: (M, D) embeddings of images whose classes are known.
        labels: (M,) int64, these classes.
        classes: K.
        best: how many classes are wanted for each.
        own: whether row i of ``known`` is row i of ``rows``, which has no vote for itself.

    Returns:
        (N, best) classes, the likeliest first, and (N,) the share of the votes for the first.
    """
    values, indices = closest(rows, known, NEIGHBOURS, own)
    votes = values.new_zeros(len(rows), classes).scatter_add_(1, labels[indices], (values / TEMPERATURE).exp())
    ranked = votes.topk(best)
    return ranked.indices, ranked.values[:, 0] / votes.sum(dim=1)


def nearest(rows: Tensor, best: int) -> tuple[Tensor, Tensor]:
    """Find the nearest others of each image: (N, best) rows, the nearest first, and (N,) the first one's cosine."""
    values, indices = closest(rows, rows, best, own=True)
    return indices, values[:, 0].clamp(0, 1)


def closest(rows: Tensor, others: Tensor, count: int, own: bool) -> tuple[Tensor, Tensor]:
    """Find the others (M, D) of the highest cosine with each row (N, D): cosines and places (N, count), highest first.

    With ``own``, row i of both is the same image, which is not its own neighbour. There may be fewer than ``count``.

    Raises:
        UserError: there is no other.
    """
    if len(others) <= own:
        raise UserError(
            "one test image has no other beside it, and a network without a classifier is measured by the images that "
            "lie nearest; expected two test images or more, as by data.val=0.1 of 20 images"
        )
    left, right = (F.normalize(each.float(), dim=1) for each in (rows, others))
    found = []
    for start in range(0, len(left), BLOCK):
        similar = left[start : start + BLOCK] @ right.mT
        if own:
            places = torch.arange(len(similar), device=similar.device)
            similar[places, places + start] = -2.0
        found.append(similar.topk(min(count, len(right) - own)))
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def probe(
    rows: Tensor, labels: Tensor, known: Tensor | None = None, known_labels: Tensor | None = None
) -> float | None:
    """Measure how well a linear classifier of embeddings does: top-1 in percent; None if it has one class to learn.

    Args:
        rows: (N, D) embeddings that are classified.
        labels: (N,) their classes.
        known: (M, D) embeddings that the classifier learns from; None: it learns from four fifths of ``rows`` and is
            measured on the last, five times by turns.
        known_labels: (M,) their classes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    most, second = torch.bincount(labels if known_labels is None else known_labels, minlength=2).topk(2).values.tolist()
    if not second or (known is None and second < 2 <= most):  # then some four fifths are of one class
        return None
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    x, y = rows.float().cpu().numpy(), labels.cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes of few images, and of the last digit of weights
        if known is None or known_labels is None:
            folds = min(5, most)
            return 100 * float(cross_val_score(linear, x, y, cv=folds).mean()) if folds > 1 else 0.0
        return 100 * float(linear.fit(known.float().cpu().numpy(), known_labels.cpu().numpy()).score(x, y))
