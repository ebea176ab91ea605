"""Matching of means and remainders, over space and over channels."""

import numpy as np
import pytest
import scipy.fft
import torch
from kdzoo.distillers.ufdkd import UFDKD, AttentionProjector, decoupled, direction_distance
from torch import nn

from kdzoo.errors import UserError

TERMS = ("spatial_dc", "spatial_ac", "channel_dc", "channel_ac")
PAIRS = [((4, 6, 6), (8, 3, 5)), ((4, 7, 5), (20, 2, 2)), ((5, 1, 1), (64, 3, 3)), ((5, 1, 1), (7, 1, 1))]


def by_cosines(maps, axis):
    """DC and AC of maps (B, C, H, W) by scipy's DCT, over space or channels: tokens (B, H * W, C)."""
    axes = (2, 3) if axis == 1 else (1,)
    spectrum = scipy.fft.dctn(maps, axes=axes)
    dc = np.zeros_like(spectrum)
    first = (slice(None), slice(None), 0, 0) if axis == 1 else (slice(None), 0)
    dc[first] = spectrum[first]
    parts = (scipy.fft.idctn(part, axes=axes) for part in (dc, spectrum - dc))
    return [part.reshape(*part.shape[:2], -1).swapaxes(1, 2) for part in parts]


def reference_distance(student, teacher, axis):
    s, t = (tokens / np.linalg.norm(tokens, axis=axis, keepdims=True) for tokens in (student, teacher))
    return ((s - t) ** 2).sum() / len(s)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (2, 1)])
def test_parts_are_those_of_the_cosine_transform(waves, grid, axis):
    maps = waves(3, 4, *grid, dtype=torch.float64)
    for ours, theirs in zip(decoupled(maps.flatten(2).mT, axis), by_cosines(maps.numpy(), axis), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("axis", [1, 2])
def test_the_distance_is_between_directions(waves, axis):
    student, teacher = waves(3, 6, 5, dtype=torch.float64), waves(3, 6, 5, phase=1.0, dtype=torch.float64)
    expected = reference_distance(student.numpy(), teacher.numpy(), axis)
    assert direction_distance(student, teacher, axis).item() == pytest.approx(expected, rel=1e-6)
    assert direction_distance(3 * student, teacher, axis).item() == pytest.approx(expected, rel=1e-6)
    assert direction_distance(student, student, axis).item() == 0


def test_terms_are_the_weighed_distances_of_projected_and_given_parts(student, teacher, data, batch):
    weights = dict(zip(TERMS, (0.5, 1.0, 2.0, 4.0), strict=True))
    method = UFDKD(stage=2, **weights).assemble(student, teacher, data()).eval()
    terms = method.loss(student, teacher, batch())
    maps = teacher.features[2].detach().double().numpy()
    for kind, axis in (("spatial", 1), ("channel", 2)):
        tokens = method.projectors[kind](student.features[2]).detach().double().numpy()
        seen = tokens.swapaxes(1, 2).reshape(maps.shape)
        for part, s, t in zip(("dc", "ac"), by_cosines(seen, axis), by_cosines(maps, axis), strict=True):
            expected = weights[f"{kind}_{part}"] * reference_distance(s, t, 3 - axis)
            assert terms[f"{kind}_{part}"].item() == pytest.approx(expected, rel=1e-4)


def test_the_projector_is_attention_by_its_queries(waves):
    student, teacher = waves(2, 4, 6, 5), waves(2, 8, 3, 2)
    project = AttentionProjector(student, teacher, head_width=4, sharpness=5.0).eval().double()
    conv, norm = project.convolve[:2]
    tokens = (norm(conv(student.double())).relu() + project.position).flatten(2).mT
    asked = project.ask(project.queries)[0]
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = torch.einsum("qc,bkc->bqk", asked[:, head], project.key(tokens)[..., head]) * 5 / 2
        heads.append(scores.exp() / scores.exp().sum(dim=2, keepdim=True) @ project.value(tokens)[..., head])
    answer = project.norm(project.project(torch.cat(heads, dim=2)))
    torch.testing.assert_close(project(student.double()), answer + project.mlp(answer), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_any_pair_of_maps_goes_and_all_that_trains_gets_a_gradient(output, data, batch, student, teacher):
    student, teacher = output((student,)), output((teacher,), phase=1.0)
    method = UFDKD(stage=0).assemble(student, teacher, data())
    terms = method.loss(student, teacher, batch())
    assert set(terms) == {"ce", "kd", *TERMS}
    sum(terms[name] for name in TERMS).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert all(project.value.weight.grad.any() for project in method.projectors.values())


@pytest.mark.parametrize(("width", "heads"), [(768, 24), (64, 2), (80, 2), (20, 1), (97, 1)])
def test_heads_divide_any_width(waves, width, heads):
    assert AttentionProjector(waves(1, 3, 2, 2), waves(1, width, 2, 2), head_width=32, sharpness=5.0).heads == heads


def test_terms_are_blind_to_the_scale_of_the_teacher(student, teacher, data, batch):
    method = UFDKD().assemble(student, teacher, data()).eval()
    scaled = teacher._replace(features=tuple(3 * f for f in teacher.features))
    moved = teacher._replace(features=tuple(f + 3 for f in teacher.features))
    usual, same, other = (method.loss(student, t, batch()) for t in (teacher, scaled, moved))
    assert all(same[name].item() == pytest.approx(usual[name].item(), rel=1e-4) for name in TERMS)
    assert usual["spatial_ac"].item() == pytest.approx(other["spatial_ac"].item(), rel=1e-3)  # knows no mean
    assert usual["spatial_dc"].item() != pytest.approx(other["spatial_dc"].item(), rel=1e-2)


def test_constants_have_no_remainder(output, data, batch):
    student, teacher = output(constant=1.0), output(((5, 3, 4),) * 4, constant=1.0)
    method = UFDKD(stage=1).assemble(student, teacher, data())
    terms = method.loss(student, teacher, batch())
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_terms_that_weigh_nothing_build_nothing(student, teacher, data, batch):
    method = UFDKD(channel_dc=0, channel_ac=0).assemble(student, teacher, data())
    assert set(method.projectors) == {"spatial"}
    assert set(method.loss(student, teacher, batch())) == {"ce", "kd", "spatial_dc", "spatial_ac"}
    none = UFDKD(**dict.fromkeys(TERMS, 0.0)).assemble(student, teacher, data())
    assert not none.needs.features
    assert not list(none.parameters())


def test_each_position_asks_for_something_else_by_its_query(waves):
    maps = waves(2, 4, 6, 6)
    project = AttentionProjector(maps, waves(2, 8, 3, 3), head_width=4, sharpness=5.0).eval()
    assert project(maps).std(dim=1).mean() > 0.01  # each position asks for something else
    nn.init.zeros_(project.ask[2].weight)  # all ask the same
    assert project(maps).std(dim=1).mean() < 1e-5


def test_what_cannot_be_is_refused(student, teacher, data):
    for keywords, message in (
        ({"stage": 4}, "from 0 to 3"),
        ({"head_width": 0}, "from 1"),
        ({"temperature": 0}, "above 0"),
    ):
        with pytest.raises(UserError, match=message):
            UFDKD(**keywords).assemble(student, teacher, data())
