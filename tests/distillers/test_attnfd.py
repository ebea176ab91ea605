"""Gates of channels and positions, and the direction of refined maps."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.attnfd import AttnFD, Gates, direction_loss, plain_gates
from torch.nn import functional as F

from kdzoo.connectors import connector
from kdzoo.errors import UserError


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain(maps):
    maps = maps * sigmoid(maps.mean(axis=(2, 3), keepdims=True) + maps.max(axis=(2, 3), keepdims=True))
    return maps * sigmoid(maps.mean(axis=1, keepdims=True) + maps.max(axis=1, keepdims=True))


def apart(student, teacher):
    """Two minus twice the cosine of each image's maps, mean over the images."""
    a, b = (maps.reshape(len(maps), -1) for maps in (student, teacher))
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return np.mean(2 - 2 * cosine)


def filled(module, waves):
    for i, parameter in enumerate(module.double().parameters()):
        parameter.data.copy_(0.2 * waves(*parameter.shape, phase=0.3 * i, dtype=torch.float64))
    return module


def test_the_teachers_gates_are_the_sigmoid_of_mean_plus_maximum(waves):
    maps = waves(3, 4, 5, 2, dtype=torch.float64)
    np.testing.assert_allclose(plain_gates(maps).numpy(), plain(maps.numpy()), rtol=1e-9)


def test_the_loss_of_one_image_is_that_of_the_authors_code(waves):
    gates, connect = filled(Gates(8, 4), waves), filled(connector(8, 6), waves)
    f_s, f_t = waves(1, 8, 5, 5, dtype=torch.float64), waves(1, 6, 5, 5, phase=1.0, dtype=torch.float64)
    # CBAM and the loss of AmirMansurian/AttnFD@f090bbe, cbam.py and distiller.py, with these parameters
    found = direction_loss(connect(gates(f_s)), plain_gates(f_t)).item()
    assert found == pytest.approx(1.8481299957429567, rel=1e-9)


def test_the_loss_is_two_minus_twice_the_cosine(waves):
    f_s, f_t = waves(3, 4, 5, 2, dtype=torch.float64), waves(3, 4, 5, 2, phase=1.0, dtype=torch.float64)
    assert direction_loss(f_s, f_t).item() == pytest.approx(apart(f_s.numpy(), f_t.numpy()), rel=1e-9)
    torch.testing.assert_close(direction_loss(3 * f_s, f_t / 2), direction_loss(f_s, f_t))
    assert direction_loss(-f_t, f_t).item() == pytest.approx(4)


def test_the_loss_does_not_shrink_as_the_batch_grows(waves):
    f_s, f_t = waves(3, 4, 5, 2), waves(3, 4, 5, 2, phase=1.0)
    torch.testing.assert_close(direction_loss(f_s.repeat(4, 1, 1, 1), f_t.repeat(4, 1, 1, 1)), direction_loss(f_s, f_t))


def test_the_term_sums_the_stages_on_their_common_grids(student, teacher, data, batch):
    method = AttnFD(attnfd=3.0, stages=(0, 2)).assemble(student, teacher, data()).eval()
    expected = 0.0
    for stage, side, refine in zip((0, 2), (7, 4), method.refine, strict=True):
        f_s, f_t = (F.adaptive_avg_pool2d(o.preactivations[stage], side).detach() for o in (student, teacher))
        expected += 3 * apart(refine(f_s).detach().double().numpy(), plain(f_t.double().numpy()))
    assert method.loss(student, teacher, batch())["attnfd"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_for_constant_maps(output, teacher, data, batch, constant):
    student = output(constant=constant)
    method = AttnFD().assemble(student, teacher, data())
    method.loss(student, teacher, batch())["attnfd"].backward()
    assert all(f.grad.isfinite().all() for f in student.preactivations)


def test_gates_of_few_channels_keep_one(waves):
    for width, middle in ((4, 1), (32, 2)):
        gates = Gates(width, 16)
        assert gates(waves(3, width, 5, 2)).shape == (3, width, 5, 2)
        assert sorted({p.numel() for p in gates.channels.parameters()}) == sorted({middle, width, middle * width})


def test_networks_that_hide_their_preactivations_are_refused(student, teacher, data):
    with pytest.raises(UserError, match=r"let its stages end in torch\.nn\.ReLU"):
        AttnFD().assemble(student, teacher._replace(preactivations=()), data())


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(student, teacher, data, batch):
    method = AttnFD(attnfd=0).assemble(student, teacher, data())
    assert method.loss(student, teacher, batch()).keys() == {"ce"}
    assert not list(method.parameters())


@pytest.mark.parametrize("wrong", [{"reduction": 0}, {"stages": (0, 4)}])
def test_values_without_a_meaning_are_refused(student, teacher, data, wrong):
    with pytest.raises(UserError, match="expected"):
        AttnFD(**wrong).assemble(student, teacher, data())
