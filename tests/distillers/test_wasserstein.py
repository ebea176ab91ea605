"""Transport between classes, and statistics of maps."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.wasserstein import (
    CellStatistics,
    Wasserstein,
    class_distances,
    gaussian_distance,
    other_classes_cost,
    transport_cost,
)
from scipy.special import log_softmax, softmax
from torch import nn

from kdzoo import Batch, DataSpec, Distillation, Output
from kdzoo.errors import UserError


class Net(nn.Module):
    """A convolution, or one that rectifies, with the mean of its map classified; every stage is the same map."""

    def __init__(self, width, seed, rectifies=False):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.classifier, self.rectifies = nn.Conv2d(3, width, 1), nn.Linear(width, 4), rectifies

    def forward(self, images, show=None):
        maps = self.body(images)
        maps = maps.relu() if self.rectifies else maps
        embedding = maps.mean((2, 3))
        return Output(self.classifier(embedding), embedding, (maps,) * 4)


@pytest.fixture
def together(waves, data):
    """A prepared student and teacher, and the two batches of an epoch: no image of class 3."""

    def build(teacher=None, **keywords):
        student, teacher = Net(5, 1), teacher or Net(6, 2)
        images, labels = waves(8, 3, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0, 2, 2])
        batches = [Batch.of(images[rows], labels[rows], 4) for rows in (slice(0, 4), slice(4, 8))]
        made = Distillation(
            student, teacher, Wasserstein(**keywords).assemble(student(images), teacher(images), data(4))
        )
        made.prepare(batches)
        return made, batches

    return build


@pytest.fixture
def logits(waves):
    """Logits of five images by student and teacher, and the true class of each."""
    z_s, z_t = (2 * waves(5, 6, phase=phase, dtype=torch.float64) for phase in (0.0, 1.0))
    return z_s, z_t, torch.arange(6) == torch.tensor([0, 1, 2, 3, 5])[:, None]


@pytest.fixture
def costs(waves):
    rows = torch.nn.functional.normalize(waves(6, 4, phase=2.0, dtype=torch.float64))
    return (1 - (rows @ rows.mT - 1).exp()).relu() + 1e-8


def sinkhorn(p, q, cost, regulariser, steps):
    kernel, u = np.exp(-cost / regulariser), np.full(len(p), 1 / len(p))
    for _ in range(steps):
        v = q / (kernel.T @ u + 1e-8)
        u = p / (kernel @ v + 1e-8)
    return (u[:, None] * kernel * v * cost).sum()


def reference(z_s, z_t, target, temperature, cost, regulariser, steps):
    total = 0.0
    for s, t, y in zip(z_s.numpy(), z_t.numpy(), target.numpy(), strict=True):
        p, q = (softmax(z[~y] / temperature) for z in (s, t))
        total += sinkhorn(p, q, cost.numpy()[~y][:, ~y], regulariser, steps)
    return total / len(z_s)


def test_one_matrix_of_costs_gives_what_one_for_each_image_gives(logits, costs):
    found = other_classes_cost(*logits, 4.0, costs, (-costs / 0.05).exp(), 10).item()
    assert found == pytest.approx(reference(*logits, 4.0, costs, 0.05, 10), rel=1e-9)
    # JiamingLv/WKD@214cf88, wkd_logit_loss_with_speration in float32, less the true class's part
    assert found == pytest.approx(0.01581195369362831, rel=1e-5)
    assert reference(*logits, 4.0, costs.roll(1, 0), 0.05, 10) != pytest.approx(found, rel=0.1)


def test_the_true_class_is_of_no_account(logits, costs):
    z_s, z_t, target = logits
    given = 4.0, costs, (-costs / 0.05).exp(), 10
    before = other_classes_cost(z_s, z_t, target, *given)
    torch.testing.assert_close(other_classes_cost(z_s + 9.0 * target, z_t - 3.0 * target, target, *given), before)
    assert other_classes_cost(z_s + 9.0 * target.roll(1, 1), z_t, target, *given) > 2 * before


def test_equal_costs_make_the_distance_total_variation(logits):
    p, q = (z.softmax(1) for z in logits[:2])
    costs = 0.3 * (1 - torch.eye(6, dtype=torch.float64))
    found = transport_cost(p, q, torch.full_like(p, 1 / 6), costs, (-costs / 0.03).exp(), 2000)
    torch.testing.assert_close(found, 0.3 * (p - q).abs().sum(1) / 2, rtol=0.02, atol=0)


def test_distances_between_classes_are_those_of_cka_and_of_the_authors_code(waves):
    rows = waves(4, 6, 3, dtype=torch.float64)
    found = class_distances(rows.float())
    for i in range(4):
        for j in range(4):
            x, y = (rows[k].numpy() - rows[k].numpy().mean(0) for k in (i, j))
            cka = np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
            assert found[i, j].item() == pytest.approx(1 - cka, abs=1e-6)
    # JiamingLv/WKD@214cf88, linear_CKA_precenter
    expected = [0.0, 0.360505475, 0.159314834, 0.554006043]
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_distances_are_blind_to_scale_offset_and_rotation_and_see_which_rows_are_paired(waves):
    rows = waves(3, 40, 4)
    turn = torch.linalg.qr(waves(4, 4))[0]
    moved = torch.stack([rows[0] @ turn, 3 * rows[1], rows[2] + 1])
    torch.testing.assert_close(class_distances(moved), class_distances(rows), rtol=1e-4, atol=1e-6)
    assert class_distances(torch.stack([rows[0], rows[0] @ turn]))[0, 1].abs() < 1e-5
    assert class_distances(torch.stack([rows[0], rows[0].roll(1, 0)]))[0, 1] > 0.5


@pytest.mark.parametrize(("shape", "size"), [((8, 8), 1), ((7, 5), 4), ((3, 5), 4), ((1, 1), 4)])
def test_statistics_are_those_of_each_cell(waves, shape, size):
    maps = waves(5, 3, *shape) + 10
    mean, deviation = CellStatistics(shape, size)(maps)
    sides = [min(size, n) for n in shape]
    for cell, (row, column) in enumerate(np.ndindex(*sides)):
        ends = [(i * n // s, -(-(i + 1) * n // s)) for i, n, s in zip((row, column), shape, sides, strict=True)]
        pixels = maps.double().numpy()[:, :, slice(*ends[0]), slice(*ends[1])].reshape(5, 3, -1)
        np.testing.assert_allclose(mean[:, :, cell], pixels.mean(2), rtol=1e-5)
        variance = pixels.var(2, ddof=1) if pixels.shape[2] > 1 else 0 * pixels[:, :, 0]
        np.testing.assert_allclose(deviation[:, :, cell], np.sqrt(variance + 1e-5), rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "size", "mean", "deviation"),
    [  # JiamingLv/WKD@214cf88, wkd_feature_loss
        ((8, 8), 1, 0.02011560921672898, 0.02415455917993809),
        ((7, 5), 4, 0.37959799601714334, 0.47006934606591655),
    ],
)
def test_the_distance_of_statistics_is_what_the_authors_code_gives(waves, shape, size, mean, deviation):
    statistics = CellStatistics(shape, size).double()
    given = [statistics(waves(5, 3, *shape, phase=phase, dtype=torch.float64)) for phase in (0.0, 1.0)]
    assert gaussian_distance(*given, 0.0).item() == pytest.approx(deviation, rel=1e-5)
    assert gaussian_distance(*given, 3.0).item() == pytest.approx(3 * mean + deviation, rel=1e-5)


def test_the_terms_are_put_together_as_said(together):
    made, batches = together(ce=0, logit=3.0, feature=2.0, target=0.5, temperature=4.0, cost="logits", decay=1.0)
    terms, method = made(batches[0]), made.distiller
    z_s, z_t = (n(batches[0].images).logits.detach().double() for n in (made.student, made.teacher))
    y = batches[0].targets.bool()
    certain = -(softmax(z_t, 1) * log_softmax(z_s, 1))[y.numpy()].mean()
    assert terms["target"].item() == pytest.approx(0.5 * certain, rel=1e-5)
    expected = reference(z_s, z_t, y, 4.0, method.costs.double(), 0.05, 10)
    assert terms["logit"].item() == pytest.approx(3 * expected, rel=1e-4)
    f_s, f_t = (n(batches[0].images).features[0] for n in (made.student, made.teacher))
    statistics = [method.statistics(f) for f in (method.projector(f_s), f_t)]
    assert terms["feature"].item() == pytest.approx(2 * gaussian_distance(*statistics, 8.0).item(), rel=1e-4)


def test_costs_come_from_the_first_images_of_each_class(together):
    made, batches = together(cost="logits", images=2)
    logits = made.teacher(torch.cat([b.images for b in batches])).logits.detach()
    rows = torch.stack([logits[[0, 5]], logits[[1, 4]], logits[[2, 3]], 0 * logits[:2]])
    expected = (1 - (-class_distances(rows)).exp()).relu() + 1e-8
    torch.testing.assert_close(made.distiller.costs, expected)
    assert made.distiller.costs[3, 0].item() == pytest.approx(1 - np.exp(-1), rel=1e-5)  # no image: the farthest
    assert not torch.allclose(together(cost="maps", images=2)[0].distiller.costs, expected, rtol=0.01)


def test_costs_may_be_those_of_the_classifiers_rows(together):
    made, _ = together(cost="classifier", sharpness=0.0)
    rows = made.teacher.classifier.weight.detach().double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(made.distiller.costs, np.maximum(1 - rows @ rows.T, 0), rtol=1e-4, atol=1e-6)


def test_a_teacher_without_a_classifier_is_the_users_error_in_one_line(together):
    teacher = Net(6, 2)
    teacher.classifier = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(UserError, match="cost=classifier") as error:
        together(teacher, cost="classifier")
    assert "\n" not in str(error.value)


def test_the_students_map_is_rectified_where_the_teachers_is(together):
    made = [together(Net(6, 2, rectifies=each), logit=0)[0] for each in (True, False)]
    assert [bool(each.distiller.rectified) for each in made] == [True, False]
    maps = [each.distiller.projector(each.student(torch.ones(2, 3, 4, 4)).features[0]) for each in made]
    assert maps[0].min() < 0  # which the ReLU then takes away


def test_both_weights_fall_late_by_a_cosine(together):
    made, batches = together()
    early, start, middle, late = (
        made(batches[0]._replace(progress=torch.tensor(p))) for p in (0.1, 150 / 240, 195 / 240, 0.99999)
    )
    for name in ("logit", "feature"):
        assert early[name].item() == pytest.approx(start[name].item(), rel=1e-5)
        assert middle[name].item() == pytest.approx(early[name].item() / 2, rel=1e-4)
        assert late[name] < 1e-3 * early[name]
    assert late["target"].item() == pytest.approx(early["target"].item(), rel=1e-6)


def test_state_restores_what_was_found_before_training(together):
    made, batches = together()
    outputs = [n(batches[0].images) for n in (made.student, made.teacher)]
    fresh = Wasserstein().assemble(*outputs, DataSpec("four", 4, tuple("abcd"), 4, torch.arange(4)))
    assert fresh.costs.isnan().all()
    fresh.load_state_dict(made.distiller.state_dict())
    assert torch.equal(fresh.kernel, made.distiller.kernel)


def test_huge_logits_have_finite_gradients(logits, costs):
    z_s = (1e4 * logits[0]).float().requires_grad_()
    other_classes_cost(
        z_s, 1e4 * logits[1].float(), logits[2], 1.0, costs.float(), (-costs / 0.05).exp().float(), 10
    ).backward()
    assert z_s.grad.isfinite().all()


def test_a_weight_of_zero_leaves_its_term_and_its_modules_out(together):
    made, batches = together(logit=0)
    assert made(batches[0]).keys() == {"ce", "target", "feature"}
    assert not hasattr(made.distiller, "costs")
    made, batches = together(feature=0, cost="logits")
    assert made(batches[0]).keys() == {"ce", "target", "logit"}
    assert not list(made.distiller.parameters())
    assert not made.distiller.needs.features
    assert Wasserstein(feature=0).needs.features  # whose costs are of maps
    made, batches = together(logit=0, feature=0)
    assert made(batches[0]).keys() == {"ce", "target"}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"regulariser": 0.0}, "regulariser=0"),
        ({"cost": "map"}, "did you mean maps"),
        ({"steps": 0}, "steps=0"),
        ({"images": 1}, "images=1"),
        ({"grid": 0}, "grid=0"),
        ({"decay": 1.5}, "decay=1.5"),
    ],
)
def test_a_bad_keyword_is_the_users_error(keywords, message):
    with pytest.raises(UserError, match=message):
        Wasserstein(**keywords)
