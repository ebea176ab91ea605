"""FDL: numpy and scipy references, the authors' number, and what a distribution of a spectrum does not see."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.fdl import FDL, sliced_distance, unit_directions
from scipy.stats import wasserstein_distance
from torch.nn import functional as F

from kdzoo import Output
from kdzoo.errors import UserError


def spectra(logits):
    return np.fft.rfft(logits.numpy(), axis=1, norm="ortho")[:, 1:]


def reference(student, teacher, directions):
    """The mean difference of sorted projections of signals (B, C, F), by loops."""
    width, found = directions.shape[2], []
    for s, t in zip(student, teacher, strict=True):
        for direction in directions:
            ordered = [
                np.sort([np.sum(signal[:, i : i + width] * direction) for i in range(signal.shape[1] - width + 1)])
                for signal in (s, t)
            ]
            found.append(np.abs(ordered[0] - ordered[1]).mean())
    return np.mean(found)


@pytest.fixture
def term(data, batch):
    """One term of the method, built from one seed, for logits of a student and a teacher."""

    def compute(name, student, teacher, **keywords):
        classes = student.shape[1]
        outputs = [Output(rows, torch.zeros(6, 3)) for rows in (student, teacher)]
        torch.manual_seed(3)
        method = FDL(**keywords).assemble(*outputs, data(classes))
        return method, method.loss(*outputs, batch(classes))[name].item()

    return compute


@pytest.mark.parametrize("classes", [3, 10, 67])
def test_both_terms_compare_sorted_projections_of_patches(logits, term, classes):
    student, teacher = logits(0.0, classes), logits(1.0, classes)
    s, t = spectra(student), spectra(teacher)
    method, found = term("amplitude", student, teacher, projections=8, amplitude=0.5)
    directions = method.amplitude_directions.double().numpy()
    expected = reference(np.abs(s)[:, None], np.abs(t)[:, None], directions)
    assert found == pytest.approx(0.5 * expected, rel=1e-5)
    method, found = term("phase", student, teacher, projections=8, phase=2.0)
    turns = [np.stack([np.cos(np.angle(z)), np.sin(np.angle(z))], axis=1) for z in (s, t)]
    assert found == pytest.approx(2 * reference(*turns, method.phase_directions.double().numpy()), rel=1e-5)


def test_the_authors_code_gives_the_same(logits, waves):
    """Number of ``FDL_pytorch/FDL.py`` of eezkni/FDL@325a6d5 in float64, for maps of height 1."""
    directions = F.normalize(waves(4, 3, dtype=torch.float64), dim=1)[:, None]
    signals = [torch.from_numpy(np.abs(spectra(logits(phase))))[:, None] for phase in (0.0, 1.0)]
    assert sliced_distance(*signals, directions).item() == pytest.approx(0.6032901013485746, rel=1e-12)


def test_with_patches_of_one_frequency_it_is_the_wasserstein_distance_of_amplitudes(logits, term):
    student, teacher = logits(), logits(1.0)
    pairs = zip(np.abs(spectra(student)), np.abs(spectra(teacher)), strict=True)
    expected = np.mean([wasserstein_distance(s, t) for s, t in pairs])
    assert term("amplitude", student, teacher, patch=1)[1] == pytest.approx(expected, rel=1e-5)
    assert term("amplitude", student, teacher, patch=3)[1] != pytest.approx(expected, rel=1e-2)


def test_amplitudes_do_not_see_a_shift_of_the_classes_and_phases_do(logits, term):
    student, teacher = logits(), logits(1.0)
    before = {name: term(name, student, teacher)[1] for name in ("amplitude", "phase")}
    after = {name: term(name, student.roll(3, 1), teacher)[1] for name in ("amplitude", "phase")}
    assert after["amplitude"] == pytest.approx(before["amplitude"], rel=1e-5)
    assert after["phase"] != pytest.approx(before["phase"], rel=1e-2)


def test_the_order_of_the_classes_counts(logits, term):
    order = torch.arange(10) * 7 % 10
    student, teacher = logits(), logits(1.0)
    shuffled = term("amplitude", student[:, order], teacher[:, order])[1]
    assert shuffled != pytest.approx(term("amplitude", student, teacher)[1], rel=1e-2)


@pytest.mark.parametrize("name", ["amplitude", "phase"])
def test_a_constant_is_not_seen_and_equal_logits_cost_nothing(logits, waves, term, name):
    student, teacher = logits(), logits(1.0)
    before = term(name, student, teacher)[1]
    assert term(name, student + waves(6, 1, dtype=torch.float64), teacher)[1] == pytest.approx(before, rel=1e-5)
    assert term(name, student, student + 3.0)[1] == pytest.approx(0, abs=1e-6)
    assert before > 1e-2


def test_phases_do_not_see_the_scale_and_amplitudes_do(logits, term):
    student, teacher = logits(), logits(1.0)
    assert term("phase", 3 * student, teacher)[1] == pytest.approx(term("phase", student, teacher)[1], rel=1e-4)
    assert term("amplitude", 3 * student, teacher)[1] != pytest.approx(term("amplitude", student, teacher)[1], rel=0.1)


def test_directions_have_length_1_and_travel_with_the_state(logits, term):
    drawn = unit_directions(50, 2, 5)
    torch.testing.assert_close(drawn.square().sum(dim=(1, 2)), torch.ones(50))
    saved = term("phase", logits(), logits(1.0))[0]
    assert {"amplitude_directions", "phase_directions"} <= saved.state_dict().keys()


def test_gradients_are_those_of_the_formula_and_finite_for_constant_logits(waves, data, batch):
    directions = unit_directions(6, 2, 3).double()
    teacher = waves(2, 2, 7, phase=1.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: sliced_distance(z, teacher, directions), waves(2, 2, 7, dtype=torch.float64).requires_grad_()
    )
    flat = torch.full((6, 10), 3.0, requires_grad=True)
    outputs = Output(flat, flat), Output(waves(6, 10), flat)
    terms = FDL().assemble(*outputs, data()).loss(*outputs, batch())
    sum(terms.values()).backward()
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize("wrong", [{"patch": 0}, {"projections": 0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        FDL(**wrong)
