"""What is measured where there are no labels or no classifier, against references written anew."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from kdzoo import Output, UserError
from kdzoo.engine import neighbours
from kdzoo.engine.measure import TEMPERATURES, Answers, compare, evaluate, joined, least, measured


def brute_force(rows, known, labels, classes, own):
    """The class of each row by a weighted vote of its 20 nearest, in float64 and one by one."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows.astype(float), known.astype(float))]
    found = []
    for i, row in enumerate(unit[0]):
        near = sorted(
            ((float(row @ other), labels[j]) for j, other in enumerate(unit[1]) if not (own and i == j)), reverse=True
        )[:20]
        votes = np.zeros(classes)
        for cosine, label in near:
            votes[label] += np.exp(cosine / 0.07)
        found.append((int(votes.argmax()), votes.max() / votes.sum()))
    return found


@pytest.mark.parametrize("own", [False, True])
def test_nearest_neighbours_vote_as_in_a_loop_over_all_images(own):
    random = np.random.default_rng(0)
    known, labels = random.normal(size=(50, 6)).astype(np.float32), random.integers(4, size=50)
    rows = known if own else random.normal(size=(30, 6)).astype(np.float32)
    classes, share = neighbours.vote(*map(torch.from_numpy, (rows, known, labels)), 4, 2, own)
    expected = brute_force(rows, known, labels, 4, own)
    assert classes[:, 0].tolist() == [label for label, _ in expected]
    assert share.tolist() == pytest.approx([share for _, share in expected], rel=1e-4)


def test_an_image_has_no_vote_for_itself():
    rows, labels = torch.eye(4), torch.arange(4)
    assert not (neighbours.vote(rows, rows, labels, 4, 1, own=True)[0][:, 0] == labels).any()
    assert (neighbours.vote(rows, rows, labels, 4, 1, own=False)[0][:, 0] == labels).all()
    assert not (neighbours.nearest(rows, 3)[0] == labels[:, None]).any()


def test_neighbours_are_the_same_however_many_rows_are_compared_at_once(monkeypatch):
    rows = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
    whole = [neighbours.closest(rows, rows, 4, own=True), neighbours.closest(rows[:9], rows, 4, own=False)]
    monkeypatch.setattr(neighbours, "BLOCK", 4)
    parts = [neighbours.closest(rows, rows, 4, own=True), neighbours.closest(rows[:9], rows, 4, own=False)]
    for (cosines, places), (others, same) in zip(whole, parts, strict=True):
        assert torch.equal(places, same)
        torch.testing.assert_close(cosines, others)
    assert (parts[0][1] != torch.arange(23)[:, None]).all()
    assert parts[1][1][:, 0].tolist() == list(range(9))  # who may be their own neighbours are


def test_a_linear_probe_tells_apart_what_is_apart_and_no_noise():
    labels = torch.arange(200) % 4
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 5, generator=random)
    apart = noise + 50 * nn.functional.one_hot(labels, 5)
    assert neighbours.probe(apart, labels) == 100
    assert neighbours.probe(apart, labels, apart, labels) == 100
    assert 10 < neighbours.probe(noise, labels) < 40


def test_a_probe_needs_two_images_of_some_class():
    assert neighbours.probe(torch.eye(3), torch.arange(3)) == 0


@pytest.mark.parametrize("labels", [[1] * 6, [0, 0, 0, 0, 0, 1]])
def test_a_probe_that_learns_one_class_alone_is_not_measured(labels):
    rows, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(labels)
    assert neighbours.probe(rows, labels) is None
    assert neighbours.probe(rows, labels, rows, torch.ones_like(labels)) is None
    assert neighbours.probe(rows, torch.arange(6) % 2) is not None


def test_an_image_without_another_has_no_neighbour_in_one_line():
    with pytest.raises(UserError, match="one test image has no other beside it") as caught:
        neighbours.nearest(torch.ones(1, 4), 5)
    assert "\n" not in str(caught.value)
    assert neighbours.nearest(torch.ones(2, 4), 5)[0].tolist() == [[1], [0]]
    assert neighbours.closest(torch.ones(1, 4), torch.ones(1, 4), 5, own=False)[1].tolist() == [[0]]


class Linear(nn.Module):
    """A network of one linear layer, with or without a classifier."""

    def __init__(self, seed, classes=10):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3 * 8 * 8, 10, generator=random) / 4)
        self.has_classifier = classes > 0

    def forward(self, images, show=None):
        found = images.flatten(1) @ self.weight
        return Output(found if self.has_classifier else found[:, :0], found)


@pytest.fixture
def unlabelled(tmp_path):
    """The digits without their labels."""
    from kdzoo.data import open_dataset

    file = tmp_path / "mine.py"
    file.write_text(
        "from kdzoo import ImageSet\nfrom kdzoo.datasets.digits import Digits\n\n\nclass Mine(ImageSet):\n"
        "    def load(self, root):\n        _, train, test = Digits().load(root)\n"
        "        return (), (train[0][:64], None), (test[0][:90], None)\n"
    )
    data = open_dataset(str(file))
    data.name_outputs([f"class {k}" for k in range(10)])
    return data


def answers_of(network, data):
    found = []
    top1, top5, _ = evaluate(network, data, "float32", answers=found)
    return top1, top5, joined(found)


def test_agreement_is_the_share_of_images_that_both_take_for_one_class(unlabelled):
    teacher, student = Linear(0), Linear(0)
    student.weight.data += 0.1 * Linear(1).weight.data
    *_, theirs = answers_of(teacher, unlabelled)
    unlabelled.answered_by(theirs.classes.numpy())
    top1, _, ours = answers_of(student, unlabelled)
    images = next(unlabelled.test_batches(90))[0]
    same = (teacher(images).logits.argmax(1) == student(images).logits.argmax(1)).sum().item()
    assert 0 < same < 90
    assert top1 == pytest.approx(100 * same / 90)
    assert measured(unlabelled, student) == "agreement"
    assert isinstance(ours, Answers)
    found = compare(student, teacher, unlabelled, "float32", 1.0)
    assert found.agreement == pytest.approx(top1)
    assert found.knn is None
    assert found.probe is None


def test_the_divergence_is_that_of_a_float64_reference(unlabelled):
    teacher, student = Linear(0), Linear(1)
    images = next(unlabelled.test_batches(90))[0]
    p, q = (network(images).logits.double().softmax(1) for network in (teacher, student))
    expected = (p * (p / q).log()).sum(1).mean().item()
    assert compare(student, teacher, unlabelled, "float32", 1.0).kl == pytest.approx(expected, rel=1e-5)
    assert compare(teacher, teacher, unlabelled, "float32", 1.0)[:2] == (100, pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_student_whose_logits_are_no_numbers_has_no_divergence(unlabelled, bad):
    student = Linear(1)
    student.forward = lambda images: Linear.forward(student, images)._replace(logits=torch.full((len(images), 10), bad))
    assert compare(student, Linear(0), unlabelled, "float32", 1.0).kl is None


def test_a_divergence_is_never_below_0(unlabelled):
    for step in (1e-5, 1e-4, 1e-3):
        student = Linear(0)
        student.weight.data += step * Linear(1).weight.data
        assert compare(student, Linear(0), unlabelled, "float32", 1.0).kl >= 0


def test_networks_that_are_the_same_have_all_neighbours_in_common_and_others_have_few(unlabelled):
    unlabelled.name_outputs([])
    teacher = Linear(0, classes=0)
    *_, theirs = answers_of(teacher, unlabelled)
    unlabelled.answered_by(theirs.classes.numpy())
    assert measured(unlabelled, teacher) == "neighbours"
    assert answers_of(teacher, unlabelled)[:2] == (100, 100)
    assert answers_of(Linear(1, classes=0), unlabelled)[0] < 90


def test_labelled_images_are_classified_by_the_training_images_that_lie_nearest(dataset):
    network = Linear(0, classes=0)
    assert measured(dataset, network) == "knn"
    top1, top5, found = answers_of(network, dataset)
    assert 60 < top1 < top5 <= 100
    assert compare(network, None, dataset, "float32", 1.0).knn == pytest.approx(top1)
    labels = next(dataset.test_batches(dataset.test_size))[1]
    assert found.labels.tolist() == labels.tolist()


def best_likelihood(logits, labels):
    """The least mean negative log-likelihood over all temperatures, in float64."""

    def at(log_scale):
        rows = logits.double() * np.exp(log_scale)
        return nn.functional.cross_entropy(rows, labels).item()

    return minimize_scalar(at, bounds=(-5, 5), method="bounded").fun


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_the_likelihood_is_that_at_the_temperature_that_suits_best(dataset, scale):
    images, labels = (torch.cat(parts) for parts in zip(*dataset.test_batches(64), strict=True))
    network = Linear(0)  # of the mean images of five of ten classes
    means = torch.stack([images[(labels == k) & (k < 5)].sum(0).flatten() for k in range(10)])
    network.weight.data = (means - means.mean(0)).T
    with torch.no_grad():
        network.weight *= scale / network(images).logits.std()
        logits = network(images).logits
    found = evaluate(network, dataset, "float32", batch_size=50)
    assert found.nll == pytest.approx(best_likelihood(logits, labels), rel=2e-3)
    assert found.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


@pytest.mark.parametrize("margin", [1.0, 2.0, 4.0, 8.0])
def test_the_likelihood_of_answers_that_are_nearly_all_right_is_above_0_and_close_to_the_best(margin):
    logits = torch.zeros(10_000, 100, dtype=torch.float64)
    logits[:, 0] = 10.0
    logits[0, 1] = 10.0 + margin  # the one mistake
    labels = torch.zeros(10_000, dtype=torch.int64)
    curve = [nn.functional.cross_entropy(logits / scale, labels).item() for scale in TEMPERATURES]
    assert least(curve) == pytest.approx(best_likelihood(logits, labels), rel=0.2)


def test_every_module_of_a_measured_network_has_its_own_mode_again(dataset):
    network = nn.Sequential(Linear(0), nn.Dropout(), nn.Dropout())
    network.forward = lambda images: network[0](images)
    network.train()[1].eval()
    evaluate(network, dataset, "float32")
    compare(network, None, dataset, "float32", 1.0)
    assert [module.training for module in network.modules()] == [True, True, False, True]


def test_logits_that_are_no_numbers_have_no_likelihood(dataset):
    network = Linear(0)
    network.weight.data[0, 0] = float("nan")
    assert evaluate(network, dataset, "float32").nll is None


def test_a_network_without_a_classifier_has_no_likelihood(dataset):
    assert evaluate(Linear(0, classes=0), dataset, "float32").nll is None
