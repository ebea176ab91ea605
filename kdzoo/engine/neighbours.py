"""Measure networks without a classifier: by the images that lie nearest to each in their embedding."""

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 20  # that vote for a class
TEMPERATURE = 0.07  # of their votes
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
    similar = cosines(rows, known, own)
    near = similar.topk(min(NEIGHBOURS, len(known) - own))
    votes = similar.new_zeros(len(rows), classes).scatter_add_(
        1, labels[near.indices], (near.values / TEMPERATURE).exp()
    )
    ranked = votes.topk(best)
    return ranked.indices, ranked.values[:, 0] / votes.sum(dim=1)


def nearest(rows: Tensor, best: int) -> tuple[Tensor, Tensor]:
    """Find the nearest others of each image: (N, best) rows, the nearest first, and (N,) the first one's cosine."""
    near = cosines(rows, rows, own=True).topk(min(best, len(rows) - 1))
    return near.indices, near.values[:, 0].clamp(0, 1)


def cosines(rows: Tensor, others: Tensor, own: bool) -> Tensor:
    """Compute the cosine of each row (N, D) with each of the others (M, D): (N, M); -2 of a row with itself."""
    found = F.normalize(rows.float(), dim=1) @ F.normalize(others.float(), dim=1).mT
    return found.fill_diagonal_(-2.0) if own else found


def probe(rows: Tensor, labels: Tensor, known: Tensor | None = None, known_labels: Tensor | None = None) -> float:
    """Measure how well a linear classifier of embeddings does: top-1 in percent.

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

    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    x, y = rows.float().cpu().numpy(), labels.cpu().numpy()
    if known is None or known_labels is None:
        folds = min(5, int(torch.bincount(labels).max()))
        return 100 * float(cross_val_score(linear, x, y, cv=folds).mean()) if folds > 1 else 0.0
    return 100 * float(linear.fit(known.float().cpu().numpy(), known_labels.cpu().numpy()).score(x, y))
