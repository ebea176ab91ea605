"""Contrast of two networks' embeddings against a memory."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.crd import CRD, draw_others, nce_loss

from kdzoo import Batch, DataSpec, Output
from kdzoo.errors import UserError


@pytest.fixture
def embedded(waves):
    """Outputs of 4 images with embeddings of 5 and 3 numbers, in double precision."""

    def build(phase=0.0):
        logits, dtype = torch.zeros(4, 4, dtype=torch.float64), torch.float64
        return [Output(logits, waves(4, d, phase=phase + d, dtype=dtype).requires_grad_(), ()) for d in (5, 3)]

    return build


def spec(labels):
    return DataSpec("sines", 4, tuple("abcd"), 32, torch.tensor(labels))


def rows(*index):
    return Batch.of(torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64), 4)._replace(index=torch.tensor(index))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def embeddings(method, outputs):
    layers = (method.embed_s, method.embed_t)
    pairs = [(o.embedding, layer.weight, layer.bias) for o, layer in zip(outputs, layers, strict=True)]
    return [unit(e.detach().numpy() @ w.detach().numpy().T + b.detach().numpy()) for e, w, b in pairs]


def test_the_contrast_is_noise_contrastive_estimation(waves):
    p, q = waves(3, dtype=torch.float64), 2 * waves(3, 8, phase=1.0, dtype=torch.float64)
    h = [np.exp(x.numpy()) / (np.exp(x.numpy()) + 0.25) for x in (p, q)]
    expected = -np.mean(np.log(h[0]) + np.log(1 - h[1]).sum(axis=1))
    assert nce_loss(p, q, 0.25).item() == pytest.approx(expected, rel=1e-9)


def test_the_contrast_is_finite_where_probabilities_leave_the_range_of_numbers():
    p, q = torch.tensor([-1e4, 1e4], requires_grad=True), torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = nce_loss(p, q, 0.25)
    loss.backward()
    assert loss.item() == pytest.approx(1e4, rel=1e-3)
    assert p.grad.isfinite().all()
    assert q.grad.isfinite().all()


def test_the_term_contrasts_both_networks_with_each_others_memory(embedded):
    # One image of each class and as many negatives as there are other images: what is drawn is known.
    outputs, index = embedded(), [2, 0, 3, 1]
    method = CRD(crd=0.5, negatives=3, tau=0.5, width=6).assemble(*outputs, spec([0, 1, 2, 3])).double()
    memories = [memory.clone().numpy() for memory in (method.memory_t, method.memory_s)]
    expected = 0.0
    for u, memory in zip(embeddings(method, outputs), memories, strict=True):
        p = np.exp(u @ memory.T / 0.5)
        p /= p.mean() * 4  # Z
        h = p / (p + 3 / 4)
        positive = np.arange(4) == np.array(index)[:, None]
        expected -= 0.5 * np.where(positive, np.log(h), np.log(1 - h)).sum(axis=1).mean()
    assert method.loss(*outputs, rows(*index))["crd"].item() == pytest.approx(expected, rel=1e-6)


def test_the_memory_moves_where_the_batch_is_and_nowhere_else(embedded):
    outputs = embedded()
    method = CRD(negatives=3, momentum=0.25, width=6).assemble(*outputs, spec([0, 1, 2, 3, 0, 1])).double()
    before = [memory.clone() for memory in (method.memory_s, method.memory_t)]
    method.loss(*outputs, rows(4, 1, 0, 3))
    for was, now, u in zip(before, (method.memory_s, method.memory_t), embeddings(method, outputs), strict=True):
        expected = unit(0.25 * was[[4, 1, 0, 3]].numpy() + 0.75 * u)
        torch.testing.assert_close(now[[4, 1, 0, 3]], torch.from_numpy(expected))
        assert torch.equal(now[[2, 5]], was[[2, 5]])


def test_the_memory_takes_the_images_of_other_ranks_too(embedded, monkeypatch):
    monkeypatch.setattr(
        "kdzoo.distillers.crd.gather",
        lambda tensor: torch.cat([tensor, 5 - tensor if tensor.dtype == torch.int64 else tensor.flip(0)]),
    )
    outputs = embedded()
    method = CRD(ce=0, negatives=3, momentum=0.0, width=6).assemble(*outputs, spec([0, 1, 2, 3, 0, 1])).double()
    outputs = [Output(o.logits[:2], o.embedding[:2], ()) for o in outputs]
    method.loss(*outputs, rows(4, 5))
    u_s, _ = embeddings(method, outputs)
    torch.testing.assert_close(method.memory_s[[4, 5, 1, 0]], torch.from_numpy(u_s[[0, 1, 1, 0]]))


def test_the_normalisation_is_estimated_once_and_saved(embedded):
    outputs, data = embedded(), spec([0, 1, 2, 3])
    method, other = (
        CRD(negatives=3, width=6).assemble(*outputs, data).double(),
        CRD(negatives=3, width=6).assemble(*outputs, data),
    )
    assert method.log_z.isinf().all()
    method.loss(*outputs, rows(0, 1, 2, 3))
    first = method.log_z.clone()
    assert first.isfinite().all()
    method.loss(*embedded(phase=1.0), rows(0, 1, 2, 3))
    assert torch.equal(method.log_z, first)
    other.double().load_state_dict(method.state_dict())
    for name in ("log_z", "memory_s", "memory_t"):
        assert torch.equal(getattr(other, name), getattr(method, name))
    terms = [each.loss(*outputs, rows(3, 2, 1, 0))["crd"] for each in (method, other)]
    assert terms[0] == terms[1]


def test_gradients_flow_to_the_student_and_both_maps(embedded):
    outputs = embedded()
    method = CRD(negatives=3, width=6).assemble(*outputs, spec([0, 1, 2, 3])).double()
    method.loss(*outputs, rows(0, 1, 2, 3))["crd"].backward()
    assert outputs[0].embedding.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    assert not method.memory_s.requires_grad


COUNTS = torch.tensor([5, 2, 0, 30])
STARTS = torch.tensor([0, 5, 7, 7])


@pytest.mark.parametrize("number", [1, 3, 7])
def test_negatives_are_different_and_of_other_groups(number):
    group = torch.tensor([0, 1, 3]).repeat_interleave(50)
    drawn = draw_others(group, COUNTS, STARTS, number)
    assert drawn.shape == (150, number)
    owner = torch.repeat_interleave(torch.arange(4), COUNTS)[drawn]
    assert not (owner == group[:, None]).any()
    assert all(len(row.unique()) == number for row in drawn)
    assert len({tuple(row) for row in drawn[:50].tolist()}) > 10  # and they differ from row to row


def test_every_image_of_other_groups_is_drawn_equally_often():
    drawn = draw_others(torch.zeros(20_000, dtype=torch.int64), COUNTS, STARTS, 10)
    frequency = torch.bincount(drawn.flatten(), minlength=37)
    assert frequency[:5].sum() == 0
    expected = 20_000 * 10 / 32
    assert ((frequency[5:] - expected).abs() < 5 * expected**0.5).all()


def test_where_there_are_fewer_images_each_is_drawn_about_equally_often():
    drawn = draw_others(torch.tensor([3, 3]), COUNTS, STARTS, 1000)
    for row in drawn:
        frequency = torch.bincount(row, minlength=37)
        assert frequency[7:].sum() == 0
        assert set(frequency[:7].tolist()) <= {142, 143}


def test_negatives_are_images_of_other_classes_however_these_lie_in_the_data(embedded):
    # Class 0 lies everywhere; the memory of all others is orthogonal to the student's, so they cost a known sum.
    outputs, labels = embedded(), [0, 1, 0, 2, 0, 3, 0, 0]
    method = CRD(negatives=3, tau=0.5, width=6).assemble(*outputs, spec(labels)).double()
    others = torch.tensor(labels) != 0
    method.memory_t.zero_()
    method.memory_t[~others] = 1.0
    method.log_z.zero_()
    u_s = torch.nn.functional.normalize(method.embed_s(outputs[0].embedding))
    u_t = torch.zeros_like(u_s)
    index = torch.tensor([0, 2, 4, 6])
    positive = u_s.sum(dim=1).exp().square()  # exp of the dot product over tau
    h, noise = positive / (positive + 3 / 8), 1 / (1 + 3 / 8)
    student = -h.log().mean() - 3 * np.log(1 - noise)
    teacher = -np.log(noise) - 3 * np.log(1 - noise)
    torch.testing.assert_close(method.contrast(u_s, u_t, index), student + teacher)


def test_a_weight_of_zero_leaves_its_term_its_modules_and_its_memory_out(embedded):
    outputs, data = embedded(), spec([0, 1, 2, 3])
    method = CRD(crd=0).assemble(*outputs, data)
    assert method.loss(*outputs, rows(0, 1, 2, 3)).keys() == {"ce"}
    assert not list(method.parameters())
    assert not list(method.buffers())
    assert CRD(ce=0).assemble(*outputs, data).double().loss(*outputs, rows(0, 1, 2, 3)).keys() == {"crd"}
    assert not CRD.needs.features


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"tau": 0}, "tau=0"),
        ({"negatives": 0}, "negatives=0"),
        ({"width": 0}, "width=0"),
        ({"momentum": 1.0}, "momentum=1"),
    ],
)
def test_a_bad_keyword_is_the_users_error(embedded, keywords, message):
    with pytest.raises(UserError, match=message):
        CRD(**keywords).assemble(*embedded(), spec([0, 1, 2, 3]))


def test_images_of_one_class_are_the_users_error(embedded):
    with pytest.raises(UserError, match="one class"):
        CRD().assemble(*embedded(), spec([1, 1, 1]))


def test_the_memory_starts_with_rows_of_length_one_on_average_that_differ(embedded):
    method = CRD().assemble(*embedded(), spec([0, 1, 2, 3] * 500))
    for memory in (method.memory_s, method.memory_t):
        assert memory.norm(dim=1).square().mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(method.memory_s, method.memory_t)
