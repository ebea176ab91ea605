"""Matching of the wavelet detail of logits."""

import itertools

import numpy as np
import pytest
import pywt
import torch
from kdzoo.distillers.figkd import FiGKD, confusion_order, wavelet_coefficients
from kdzoo.distillers.logitmse import LogitMSE
from scipy.special import rel_entr, softmax
from torch import nn

from kdzoo import Batch, Output
from kdzoo.errors import UserError


@pytest.fixture
def detail(data, batch):
    """The detail term of a pair of outputs, by keywords of the method."""

    def term(student, teacher, **keywords):
        classes = student.logits.shape[1]
        method = FiGKD(ce=0, **keywords).assemble(student, teacher, data(classes, superclasses=True))
        return method.loss(student, teacher, batch(classes))["detail"]

    return term


def logits_of(*outputs):
    return (o.logits.detach().double().numpy() for o in outputs)


def test_haar_detail_is_the_difference_of_neighbouring_classes(student, teacher, detail):
    z_s, z_t = logits_of(student, teacher)
    d_s, d_t = ((z[:, 0::2] - z[:, 1::2]) / np.sqrt(2) for z in (z_s, z_t))
    assert detail(student, teacher, level=1).item() == pytest.approx(np.mean((d_s - d_t) ** 2), rel=1e-5)


def test_few_classes_are_split_as_often_as_they_can_be(output, detail):
    student, teacher = output(classes=5), output(classes=5, phase=1.0)
    once, twice, by_default = (detail(student, teacher, level=level).item() for level in (1, 2, None))
    assert once != twice == by_default


@pytest.mark.parametrize("band", ["detail", "content", "all"])
def test_bands_of_several_levels_are_those_of_pywavelets(output, detail, band):
    student, teacher = output(classes=32), output(classes=32, phase=1.0)
    bands = [pywt.wavedec(z / 2, "db2", mode="periodization", level=2) for z in logits_of(student, teacher)]
    chosen = {"detail": slice(1, None), "content": slice(0, 1), "all": slice(None)}[band]
    d_s, d_t = (np.concatenate(b[chosen], axis=1) for b in bands)
    term = detail(student, teacher, wavelet="db2", level=2, temperature=2.0, band=band)
    assert term.item() == pytest.approx(np.mean((d_s - d_t) ** 2), rel=1e-5)


def test_all_bands_of_an_orthonormal_wavelet_are_the_plain_error(output, detail):
    student, teacher = output(classes=32), output(classes=32, phase=1.0)
    z_s, z_t = logits_of(student, teacher)
    plain = pytest.approx(np.mean((z_s - z_t) ** 2), rel=1e-5)
    assert detail(student, teacher, wavelet="db2", level=2, band="all").item() == plain
    assert detail(student, teacher, wavelet="db2", level=2, band="detail").item() != plain


@pytest.mark.parametrize(
    ("distance", "reference"),
    [
        ("mse", lambda s, t: np.mean((s - t) ** 2)),
        ("l1", lambda s, t: np.mean(np.abs(s - t))),
        ("smooth_l1", lambda s, t: np.mean(np.where(abs(s - t) < 1, (s - t) ** 2 / 2, abs(s - t) - 0.5))),
        ("cosine", lambda s, t: np.mean(1 - (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1))),
    ],
)
def test_each_distance_follows_its_formula(student, teacher, detail, distance, reference):
    d_s, d_t = ((z[:, 0::2] - z[:, 1::2]) / np.sqrt(2) for z in logits_of(student, teacher))
    assert detail(student, teacher, level=1, distance=distance).item() == pytest.approx(reference(d_s, d_t), rel=1e-5)


def test_standardized_logits_have_their_scale_removed_before_the_temperature(student, teacher, detail):
    scaled = student._replace(logits=3 * student.logits + 1)
    once, again = (detail(s, teacher, standardize=True).item() for s in (student, scaled))
    assert again == pytest.approx(once, rel=1e-4)
    assert detail(scaled, teacher).item() != pytest.approx(detail(student, teacher).item(), rel=0.1)
    warm = detail(student, teacher, standardize=True, temperature=2.0).item()
    assert warm == pytest.approx(once / 4, rel=1e-4)


@pytest.mark.parametrize("classes", [2, 10, 67, 101])
@pytest.mark.parametrize("padding", ["periodization", "symmetric"])
def test_every_class_keeps_its_gradient_the_last_of_an_odd_number_too(output, detail, classes, padding):
    student, teacher = output(classes=classes), output(classes=classes, phase=1.0)
    detail(student, teacher, padding=padding).backward()
    assert (student.logits.grad.abs().amax(dim=0) > 1e-4 / classes).all()


@pytest.mark.parametrize("classes", [10, 67])
def test_detail_does_not_see_a_constant_and_content_does(output, detail, waves, classes):
    student, teacher = output(classes=classes), output(classes=classes, phase=1.0)
    shifted = student._replace(logits=student.logits + 3 * waves(6, 1))
    assert detail(shifted, teacher).item() == pytest.approx(detail(student, teacher).item(), rel=1e-4)
    content, moved = (detail(s, teacher, band="content").item() for s in (student, shifted))
    assert moved != pytest.approx(content, rel=0.1)


@pytest.mark.parametrize("classes", [4, 5])
def test_over_all_orders_of_the_classes_haar_is_centred_logit_matching(output, detail, data, batch, classes):
    student, teacher = output(classes=classes), output(classes=classes, phase=1.0)
    orders = list(itertools.permutations(range(classes)))
    terms = [detail(student, teacher, level=1, class_order=order).item() for order in orders]
    mse = LogitMSE().assemble(student, teacher, data(classes)).loss(student, teacher, batch(classes))["mse"].item()
    assert np.mean(terms) == pytest.approx(classes / (classes - 1) * mse, rel=1e-5)
    assert max(terms) > 1.2 * min(terms)


def test_a_given_order_decides_who_the_neighbours_are(student, teacher, detail):
    order = (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)
    moved = [o._replace(logits=o.logits[:, list(order)]) for o in (student, teacher)]
    assert detail(student, teacher, class_order=order).item() == pytest.approx(detail(*moved).item(), rel=1e-6)
    assert detail(student, teacher).item() != pytest.approx(detail(*moved).item(), rel=1e-3)


def test_superclasses_stand_together_in_their_own_order(student, teacher, detail):
    evens_first = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
    given, named = (detail(student, teacher, class_order=o).item() for o in (evens_first, "superclass"))
    assert named == given


def test_a_random_order_is_a_permutation_that_the_seed_decides(student, teacher, data):
    orders = []
    with torch.random.fork_rng():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            orders.append(FiGKD(class_order="random").assemble(student, teacher, data()).order.tolist())
    assert sorted(orders[0]) == list(range(10))
    assert orders[0] == orders[1] != orders[2]


class Confused(nn.Module):
    """A network that takes the class of an image (its first pixel) for class + 5, modulo 10, now and then."""

    def forward(self, images):
        label = images[:, 0, 0, 0].long()
        logits = 4.0 * nn.functional.one_hot(label, 10) + 3.0 * nn.functional.one_hot((label + 5) % 10, 10)
        return Output(logits, logits, ())


def test_confusion_makes_neighbours_of_the_classes_that_the_teacher_confuses(student, teacher, data, batch):
    labels = torch.arange(10)
    epoch = [
        Batch.of(labels[half].view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float(), labels[half], 10)
        for half in (slice(0, 4), slice(4, 10))
    ]
    method = FiGKD(class_order="confusion").assemble(student, teacher, data())
    assert method.order.tolist() == list(range(10))
    method.prepare(Confused(), Confused(), epoch)
    pairs = method.order.view(5, 2)
    assert sorted(method.order.tolist()) == list(range(10))
    assert ((pairs[:, 0] - pairs[:, 1]).abs() == 5).all()

    restored = FiGKD(class_order="confusion").assemble(student, teacher, data())
    restored.load_state_dict(method.state_dict())
    terms = [m.loss(student, teacher, batch())["detail"] for m in (method, restored)]
    assert torch.equal(*terms)


def test_other_orders_ask_the_teacher_nothing(student, teacher, data):
    def batches():
        raise AssertionError("an epoch was asked for")
        yield

    method = FiGKD().assemble(student, teacher, data())
    method.prepare(Confused(), Confused(), batches())
    assert method.order.tolist() == list(range(10))


@pytest.mark.parametrize("predictions", [np.zeros((5, 5)), np.full((3, 3), 1 / 3), np.eye(2), np.eye(7)])
def test_predictions_that_tell_nothing_still_give_a_permutation(predictions):
    assert sorted(confusion_order(predictions)) == list(range(len(predictions)))


def test_temperature_divides_logits_of_both_terms_and_kd_carries_its_square(student, teacher, data, batch):
    z_s, z_t = logits_of(student, teacher)
    kl = rel_entr(softmax(z_t / 3, axis=1), softmax(z_s / 3, axis=1)).sum(axis=1).mean()
    terms = FiGKD(kd=0.7, temperature=3.0).assemble(student, teacher, data()).loss(student, teacher, batch())
    plain = FiGKD().assemble(student, teacher, data()).loss(student, teacher, batch())
    assert terms["kd"].item() == pytest.approx(0.7 * 9 * kl, rel=1e-4)
    assert terms["detail"].item() == pytest.approx(plain["detail"].item() / 9, rel=1e-5)


def test_a_weight_of_zero_leaves_its_term_and_its_buffers_out(student, teacher, data, batch):
    plain = FiGKD().assemble(student, teacher, data())
    assert plain.loss(student, teacher, batch()).keys() == {"ce", "detail"}
    without = FiGKD(ce=0, detail=0, kd=1).assemble(student, teacher, data())
    assert without.loss(student, teacher, batch()).keys() == {"kd"}
    assert list(plain.buffers())
    assert not list(without.buffers())


@pytest.mark.parametrize("standardize", [False, True])
def test_gradients_of_the_coefficients_are_those_of_the_values(waves, standardize):
    logits, basis = (waves(*shape, dtype=torch.float64) for shape in ((3, 7), (4, 7)))
    assert torch.autograd.gradcheck(
        lambda z: wavelet_coefficients(z, basis, 2.0, standardize), (logits.requires_grad_(),)
    )


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": 0}, "temperature=0: expected"),
        ({"wavelet": "haaar"}, "did you mean haar"),
        ({"level": 9}, "the largest is 3"),
        ({"level": 0}, "the largest is 3"),
        ({"padding": "symmetrical"}, "did you mean symmetric"),
        ({"distance": "mle"}, "did you mean mse"),
        ({"band": "details"}, "did you mean detail"),
        ({"class_order": "confused"}, "did you mean confusion"),
        ({"class_order": "superclass"}, "defines no superclasses"),
        ({"class_order": (0, 1, 1)}, "expected each of 0 to 9 once"),
    ],
)
def test_a_bad_keyword_is_the_users_error_in_one_line(student, teacher, data, keywords, message):
    with pytest.raises(UserError, match=message) as error:
        FiGKD(**keywords).assemble(student, teacher, data())
    assert "\n" not in str(error.value)
