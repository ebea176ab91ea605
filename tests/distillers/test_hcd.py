"""HCD: every term against numpy loops over the mappers' logits, what each trains, and networks of any two shapes."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.hcd import HCD, Mapper, overlap
from scipy.special import log_softmax, rel_entr, softmax

from kdzoo.errors import UserError

LABELS = np.array([0, 1, 2, 3, 4, 4])


def penalty(logits, threshold):
    """The mean excess of one stage's cosines (6, k, K), squared, over images and ordered pairs."""
    found = []
    for row, label in zip(logits, LABELS, strict=True):
        vectors = row.copy()
        vectors[:, label] = 0
        for i, one in enumerate(vectors):
            for j, other in enumerate(vectors):
                if i != j:
                    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
                    found.append(max(0, cosine - threshold) ** 2)
    return np.mean(found)


@pytest.fixture
def built(student, teacher, data):
    def build(**keywords):
        torch.manual_seed(0)
        return HCD(**keywords).assemble(student, teacher, data())

    return build


def test_every_term_is_its_formula_summed_over_stages(student, teacher, batch, built):
    method = built(hcd=6.0, fused=0.7, diversity=3.0, kd=2.0, temperature=2.0, threshold=0.3, parts=3)
    fused = method.fuse(student, teacher).detach().double().numpy()
    assert fused.shape == (4, 6, 3, 10)
    z_s, z_t = (output.logits.detach().double().numpy() for output in (student, teacher))
    p_s = softmax(z_s / 2, axis=1)
    divergence = entropy = resemblance = 0.0
    for stage in fused:
        divergence += np.mean([4 * rel_entr(softmax(stage[:, j] / 2, axis=1), p_s).sum(axis=1) for j in range(3)])
        entropy -= np.mean([log_softmax(stage[:, j], axis=1)[np.arange(6), LABELS] for j in range(3)])
        resemblance += penalty(stage, 0.3)
    terms = method.loss(student, teacher, batch())
    assert resemblance > 0
    assert terms["hcd"].item() == pytest.approx(6 * divergence, rel=1e-5)
    assert terms["fused"].item() == pytest.approx(0.7 * entropy, rel=1e-5)
    assert terms["diversity"].item() == pytest.approx(3 * resemblance, rel=1e-5)
    assert terms["kd"].item() == pytest.approx(
        2 * 4 * rel_entr(softmax(z_t / 2, axis=1), p_s).sum(axis=1).mean(), rel=1e-5
    )
    assert terms["ce"].item() == pytest.approx(-log_softmax(z_s, axis=1)[np.arange(6), LABELS].mean(), rel=1e-5)


def test_mappers_join_the_pooled_stage_with_the_teachers_embedding(waves):
    torch.manual_seed(0)
    mapper = Mapper(inputs=4, halvings=0, width=9, embedding=5, parts=3, classes=7).double()
    maps, embedding = waves(2, 4, 3, 5, dtype=torch.float64), waves(2, 5, phase=1.0, dtype=torch.float64)
    weights = [value.detach().numpy() for value in mapper.parameters()]
    vector = np.concatenate([maps.numpy().mean(axis=(2, 3)) @ weights[0][:, :, 0, 0].T + weights[1], embedding], axis=1)
    hidden = np.maximum(vector @ weights[2].T + weights[3], 0)
    expected = (hidden @ weights[4].T + weights[5]).reshape(2, 3, 7)
    np.testing.assert_allclose(mapper(maps, embedding).detach().numpy(), expected, rtol=1e-9)


def test_overlap_is_the_penalty_and_does_not_see_the_true_class_or_the_scale(waves):
    logits = waves(1, 6, 4, 10, dtype=torch.float64)
    target = torch.from_numpy(np.eye(10, dtype=bool)[LABELS])
    found = overlap(logits, target, -0.2).item()
    assert found == pytest.approx(penalty(logits[0].numpy(), -0.2), rel=1e-9)
    raised = 3 * logits + 50 * target[:, None]
    assert overlap(raised, target, -0.2).item() == pytest.approx(found, rel=1e-9)
    assert overlap(raised, target.roll(1, 1), -0.2).item() != pytest.approx(found, rel=1e-2)


def test_orthogonal_logits_are_not_penalised_and_equal_ones_are():
    target = torch.arange(8).expand(1, 8) == 7
    assert overlap(torch.eye(4, 8)[None, None], target, 0.5).item() == 0
    assert overlap(torch.ones(1, 1, 4, 8), target, 0.5).item() == pytest.approx(0.25)
    assert torch.autograd.gradcheck(
        lambda z: overlap(z, target, -0.5), torch.linspace(-1, 2, 32).double().sin().view(1, 1, 4, 8).requires_grad_()
    )


@pytest.mark.parametrize("detached", [False, True])
def test_targets_move_towards_the_student_unless_they_are_detached(student, teacher, batch, built, detached):
    method = built(ce=0.0, kd=0.0, fused=0.0, diversity=0.0, detach_target=detached)
    method.loss(student, teacher, batch())["hcd"].backward()
    assert student.logits.grad.any()
    assert all((p.grad is not None and p.grad.any().item()) is not detached for p in method.mappers.parameters())


def test_fused_logits_are_the_teachers_where_the_mappers_add_nothing(student, teacher, batch, built):
    method = built()
    for mapper in method.mappers:
        for parameter in mapper.layers[-1].parameters():
            parameter.data.zero_()
    terms = method.loss(student, teacher, batch())
    assert terms["hcd"].item() == pytest.approx(6 * 4 * terms["kd"].item(), rel=1e-5)
    assert built().loss(student, teacher, batch())["hcd"].item() != pytest.approx(24 * terms["kd"].item(), rel=1e-3)


def test_without_its_own_terms_it_builds_nothing_and_asks_for_logits_alone(student, teacher, batch, built):
    plain = built(hcd=0.0, fused=0.0, diversity=0.0)
    assert not list(plain.parameters())
    assert not plain.needs.features
    assert plain.loss(student, teacher, batch()).keys() == {"ce", "kd"}
    assert built().needs.features


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": 1}, "parts=1: expected"),
        ({"threshold": 2.0}, "threshold=2"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"stages": (0, 7)}, "expected distinct numbers from 0 to 3"),
    ],
)
def test_values_without_a_meaning_are_refused(built, wrong, message):
    with pytest.raises(UserError, match=message):
        built(**wrong)
