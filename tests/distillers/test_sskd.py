"""SSKD: the authors' numbers, references by loops, and the teacher's head that is trained before the student."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.sskd import SSKD, four_views, partners, similarities, trusted, trusted_kl
from scipy.special import rel_entr, softmax
from torch import nn
from torch.nn import functional as F

from kdzoo import Batch, Output
from kdzoo.errors import UserError

LABELS = torch.tensor([0, 1, 2, 3, 4, 4])


@pytest.fixture
def seen(waves):
    """Logits (6, 4, 10) and embeddings (6, 4, 5 or 7) of six images in four rotations: the student's, the teacher's."""
    z_s, z_t = (2 * waves(6, 4, 10, phase=phase, dtype=torch.float64) for phase in (0.0, 1.0))
    e_s, e_t = waves(6, 4, 5, phase=2.0, dtype=torch.float64), waves(6, 4, 7, phase=3.0, dtype=torch.float64)
    return (z_s, e_s), (z_t + 2 * F.one_hot(LABELS, 10)[:, None], e_t + 1.5 * e_t[:, :1])


class Shown(nn.Module):
    """A network that gives stored outputs for any images."""

    def __init__(self, logits, embedding):
        super().__init__()
        self.output = Output(logits.flatten(0, 1), embedding.flatten(0, 1))

    def forward(self, images):
        assert images.shape == (24, 3, 2, 2)
        return self.output


@pytest.fixture
def given():
    images = torch.zeros(6, 3, 2, 2)
    return Batch.of(images, LABELS, 10)._replace(views={"rotations": torch.zeros(6, 4, 3, 2, 2)})


@pytest.fixture
def method(data):
    """The method for embeddings of 5 and 7 numbers, in float64."""

    def build(**keywords):
        torch.manual_seed(0)
        shapes = [Output(torch.zeros(1, 10), torch.zeros(1, width)) for width in (5, 7)]
        return SSKD(**keywords).assemble(*shapes, data()).double()

    return build


def test_the_authors_code_gives_the_same(seen, given, method):
    """Numbers of the lines of ``student.py`` of xuguodong03/SSKD@661b972 that make its losses, in float64."""
    built = method(ce=1.0, kd=1.0, turned=1.0, similarity=1.0, kept_turned=0.0)
    built.head_s, built.head_t = nn.Identity(), nn.Identity()  # the embeddings above are what heads give
    terms = built(*(Shown(*pair) for pair in seen), given)
    expected = [1.8359389563561777, 1.367928393118689, 0.9771697650378804, 0.2105486721339759]
    assert [terms[name].item() for name in ("ce", "kd", "turned", "similarity")] == pytest.approx(expected, rel=1e-9)


def test_similarities_are_cosines_of_turned_with_upright_images(seen):
    embeddings = seen[1][1]
    found = similarities(embeddings)
    assert found.shape == (18, 6)
    for row in range(18):
        for column in range(6):
            turned, upright = embeddings[row // 3, 1 + row % 3].numpy(), embeddings[column, 0].numpy()
            cosine = turned @ upright / np.linalg.norm(turned) / np.linalg.norm(upright)
            assert found[row, column].item() == pytest.approx(cosine, rel=1e-9)
    assert partners(found).tolist() == [row // 3 for row in range(18)]


def chosen(scores, truth, kept):
    ranks = [sorted(row, reverse=True).index(row[t]) for row, t in zip(scores.tolist(), truth.tolist(), strict=True)]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    right = ranks.count(0)
    return set(order[: right + int((len(ranks) - right) * kept)])


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.75, 1.0])
def test_rows_are_trusted_by_the_rank_of_their_truth(logits, kept):
    scores, truth = logits(1.0).repeat(3, 1) + logits().repeat_interleave(3, 0), LABELS.repeat(3)
    rows = trusted(scores, truth, kept)
    assert set(rows.nonzero().flatten().tolist()) == chosen(scores, truth, kept)
    assert rows[scores.argmax(dim=1) == truth].all()
    assert rows.all().item() is (kept == 1.0)


def test_the_divergence_is_a_mean_over_trusted_rows_and_others_have_no_gradient(logits):
    student, teacher, rows = logits().requires_grad_(), logits(1.0), torch.arange(6) % 3 == 0
    p_t, p_s = (softmax(z.detach().numpy() / 2, axis=1) for z in (teacher, student))
    loss = trusted_kl(student, teacher, rows, 2.0)
    assert loss.item() == pytest.approx(4 * rel_entr(p_t, p_s).sum(axis=1)[rows.numpy()].mean(), rel=1e-6)
    loss.backward()
    assert not student.grad[~rows].any()
    assert student.grad[rows].any(dim=1).all()
    assert trusted_kl(student, teacher, torch.zeros(6, dtype=torch.bool), 2.0).item() == 0
    assert torch.autograd.gradcheck(lambda z: trusted_kl(z, teacher, rows, 2.0), logits().requires_grad_())


class Corners(nn.Module):
    """A network whose embedding is the image, so that a head has to learn what turning does."""

    def forward(self, images):
        return Output(torch.zeros(len(images), 10), images[:, 0].flatten(1))


@pytest.fixture
def epoch(waves):
    """Two batches of eight pictures of 4 x 4 pixels in four rotations."""
    images = waves(16, 1, 4, 4).expand(-1, 3, -1, -1)
    turned = torch.stack([images.rot90(k, (2, 3)) for k in range(4)], dim=1)
    return [
        Batch.of(images[half], torch.arange(8), 10)._replace(views={"rotations": turned[half]})
        for half in (slice(0, 8), slice(8, 16))
    ]


def found_partners(built, batches):
    scores = [similarities(built.head_t(four_views(Corners(), batch).embedding)) for batch in batches]
    return torch.cat([s.argmax(dim=1) == partners(s) for s in scores]).double().mean().item()


def test_the_phase_before_training_teaches_the_teachers_head_and_leaves_it_frozen(data, epoch):
    shape = Output(torch.zeros(1, 10), torch.zeros(1, 16))
    torch.manual_seed(0)
    built = SSKD(head_epochs=40).assemble(shape, shape, data())
    parameters, before = list(built.head_t.parameters()), found_partners(built, epoch)
    student = [value.clone() for value in built.head_s.parameters()]
    built.prepare(Corners(), Corners(), epoch)
    assert found_partners(built, epoch) > before + 0.2
    assert all(one is other for one, other in zip(parameters, built.head_t.parameters(), strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in parameters)
    assert all(torch.equal(one, other) for one, other in zip(student, built.head_s.parameters(), strict=True))


def test_without_similarities_there_is_no_head_and_no_phase(seen, given, method, epoch):
    built = method(similarity=0.0)
    assert not list(built.parameters())

    def batches():
        raise AssertionError("an epoch was asked for")
        yield

    built.prepare(Corners(), Corners(), batches())
    assert built(*(Shown(*pair) for pair in seen), given).keys() == {"ce", "kd", "turned"}


def test_only_the_students_head_is_trained_with_it(seen, given, method):
    built = method()
    (z_s, e_s), teacher = seen
    built(Shown(z_s, e_s.requires_grad_()), Shown(*teacher), given)["similarity"].backward()
    assert e_s.grad.any()
    assert all(p.grad.any() for p in built.head_s.parameters())
    assert not any(p.requires_grad for p in built.head_t.parameters())


@pytest.mark.parametrize(
    "wrong", [{"kept_turned": 1.5}, {"head_epochs": 0}, {"temperature": 0.0}, {"similarity_temperature": 0.0}]
)
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        SSKD(**wrong)
