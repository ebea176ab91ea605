"""ScaleKD: losses and projector of the authors' code, the frequency view as a centred map, and the way taken."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.scalekd import AttentionProjector, ScaleKD, centred, direction_loss

from kdzoo import toys
from kdzoo.outputs import Show
from kdzoo.spectral import cosine_basis, separable

WIDE = toys.Shape((6, 8, 8, 12), toys.FINE), toys.Shape((8, 12, 16, 20), toys.FINE)


def reference(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for row in range(s.shape[1]):
            for column in range(s.shape[2]):
                a, b = s[:, row, column], t[:, row, column]
                total += ((a / np.sqrt((a**2).sum()) - b / np.sqrt((b**2).sum())) ** 2).sum()
    return total / len(student)


def test_the_distance_is_that_of_unit_vectors_at_each_position(waves):
    s, t = waves(3, 8, 4, 5, phase=0.5, dtype=torch.float64), waves(3, 8, 4, 5, phase=1.0, dtype=torch.float64)
    assert direction_loss(s, t).item() == pytest.approx(reference(s.numpy(), t.numpy()), rel=1e-9)
    assert direction_loss(7 * s, t).item() == pytest.approx(direction_loss(s, t).item(), rel=1e-9)
    assert direction_loss(t, t).item() == 0


def test_the_distances_are_those_of_the_authors(waves):
    """deep-optimization/ScaleKD@478a7db, mmcls/models/dis_losses/fmdv2.py, both losses over their alpha."""
    tokens = waves(3, 16, 8, phase=0.2, dtype=torch.float64)
    student, teacher = tokens.mT.reshape(3, 8, 4, 4), waves(3, 8, 4, 4, phase=1.0, dtype=torch.float64)
    assert direction_loss(student, teacher).item() == pytest.approx(33.724848301790146, rel=1e-6)
    frequency = direction_loss(centred(student), centred(teacher)).item()
    assert frequency == pytest.approx(33.71781552179648, rel=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (2, 3)])
def test_a_dct_without_its_first_coefficient_and_back_is_the_map_minus_its_spatial_mean(waves, grid):
    maps = waves(3, 8, *grid, dtype=torch.float64)
    rows, columns = (cosine_basis(n) for n in grid)
    spectrum = separable(maps, rows, columns)
    assert torch.allclose(separable(spectrum, rows.mT, columns.mT), maps, atol=1e-12)  # the way back is one
    spectrum[:, :, 0, 0] = 0
    assert torch.allclose(separable(spectrum, rows.mT, columns.mT), centred(maps), atol=1e-12)
    spectrum[:, :, 0, 1] = 0  # another coefficient is no mean
    assert not torch.allclose(separable(spectrum, rows.mT, columns.mT), centred(maps), atol=1e-3)


def filled_like_the_authors(projector, waves):
    """Parameters by a closed form, in the order in which the authors' projector has them."""
    order = [
        "positions",
        *(f"{name}.{leaf}" for name in ("ask.0", "enter.0", "enter.1") for leaf in ("weight", "bias")),
    ]
    order += [
        f"{name}.{leaf}" for name in ("q", "k", "v", "out", "mlp.0", "mlp.2", "norm") for leaf in ("weight", "bias")
    ]
    parameters = dict(projector.named_parameters())
    with torch.no_grad():
        for i, name in enumerate(order):
            parameters[name].copy_(0.3 * waves(*parameters[name].shape, phase=0.1 * i, dtype=torch.float64))
        table = 0.3 * waves(16, 8, phase=0.1 * len(order), dtype=torch.float64)
        projector.queries.copy_(table.mT.reshape(1, 8, 4, 4))
    return projector


def test_the_projector_is_that_of_the_authors(waves):
    """deep-optimization/ScaleKD@478a7db, mmcls/models/dis_losses/fmdv2.py, project_feat_spat with two heads."""
    student, teacher = waves(3, 6, 4, 4, phase=0.5, dtype=torch.float64), waves(3, 8, 4, 4, dtype=torch.float64)
    projector = filled_like_the_authors(AttentionProjector(student, teacher, 2, 5.0, asked=False).double(), waves)
    found = projector(student)
    assert found.shape == (3, 8, 4, 4)
    assert found.sum().item() == pytest.approx(107.80302435657151, rel=1e-6)
    assert found.square().sum().item() == pytest.approx(234.56087511528744, rel=1e-6)


def test_queries_may_be_given_and_then_no_table_is_learned(waves):
    student, teacher = waves(3, 6, 5, 3), waves(3, 8, 4, 4)
    projector = AttentionProjector(student, teacher, 4, 5.0, asked=True)
    assert projector.queries is None
    assert projector(student, teacher).shape == teacher.shape
    assert not torch.equal(projector(student, teacher), projector(student, teacher + 1))


@pytest.mark.parametrize("heads", [3, 8, 100])
def test_the_number_of_heads_is_reduced_to_a_divisor_of_the_width(waves, heads):
    projector = AttentionProjector(waves(2, 6, 4, 4), waves(2, 12, 4, 4), heads, 5.0, asked=False)
    assert 12 % projector.heads == 0
    assert projector(waves(2, 6, 4, 4)).shape == (2, 12, 4, 4)


def distillation(**keywords):
    torch.manual_seed(0)
    student, teacher = (toys.Toy(shape) for shape in WIDE)
    return toys.distillation(ScaleKD, keywords, student=student, teacher=teacher)


def test_the_third_map_passes_the_teachers_last_stage_and_asks_the_fourth():
    together, batch = distillation(), toys.batch_of()
    teacher, method = together.teacher, together.distiller.eval()
    student = together.student.eval()
    with torch.no_grad():
        s, t = student(batch.images, Show()), teacher(batch.images, Show())
        expected = {}
        for name, seen in (("spatial", lambda maps: maps), ("frequency", centred)):
            view = method.views[name]
            deeper = teacher.run_stage(3, view.third(s.features[2])).maps
            maps = deeper, view.fourth(s.features[3], deeper)
            pairs = [(seen(m).double().numpy(), seen(t.features[3]).double().numpy()) for m in maps]
            expected[name] = sum(reference(*pair) for pair in pairs)
        found = together(batch)
    assert found["spatial"].item() == pytest.approx(0.08 * expected["spatial"], rel=1e-5)
    assert found["frequency"].item() == pytest.approx(0.06 * expected["frequency"], rel=1e-5)


def test_all_that_is_built_is_trained_and_the_teacher_is_not():
    together = distillation()
    terms = together(toys.batch_of())
    (terms["spatial"] + terms["frequency"]).backward()
    assert all(p.grad is not None and p.grad.any() for p in together.distiller.parameters())
    assert all(p.grad is None for p in together.teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in together.student.parameters())


def test_a_weight_of_0_builds_no_view():
    assert list(distillation(frequency=0.0).distiller.views) == ["spatial"]
    assert set(distillation(frequency=0.0)(toys.batch_of())) == {"ce", "kd", "spatial"}
    assert distillation(spatial=0.0, frequency=0.0).distiller.needs.stages == ()
