"""Several networks that answer as one: the formulas, what leaves them as they are, and whose features are shown."""

import copy

import pytest
import torch

from kdzoo import DataSpec
from kdzoo.models import Ensemble, combined, create, frozen, learned_shares
from kdzoo.outputs import EVERYTHING, LOGITS, NetworkView, Show
from kdzoo.precision import PRECISIONS, autocast

DATA = DataSpec("fake", 5, tuple("abcde"), 32, torch.arange(5))
WAYS = ("probabilities", "logits", "learned")
UNEVEN = torch.tensor([0.2, 0.7, 0.1])


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return [create(name, DATA).eval().requires_grad_(False) for name in ("resnet8", "resnet14", "test_vit")]


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def answers(*shape, seed=2):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shares", [torch.full((3,), 1 / 3), UNEVEN])
@pytest.mark.parametrize("way", WAYS)
def test_the_answer_is_that_of_the_formula_in_float64(way, shares):
    logits = answers(3, 6, 5)
    exact, weights = logits.double(), shares.double()[:, None, None]
    found = combined(logits, way, shares)
    if way == "logits":
        torch.testing.assert_close(found.double(), (weights * exact).sum(0), rtol=1e-5, atol=1e-6)
    else:
        probabilities = (weights * exact.exp() / exact.exp().sum(2, keepdim=True)).sum(0) / weights.sum()
        torch.testing.assert_close(found.double().softmax(1), probabilities, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.double(), probabilities.log(), rtol=1e-5, atol=1e-5)


def test_the_two_means_differ():
    logits, shares = answers(3, 6, 5), torch.full((3,), 1 / 3)
    one, other = (combined(logits, way, shares).softmax(1) for way in ("probabilities", "logits"))
    assert (one - other).abs().max() > 0.05


def test_half_precision_is_combined_in_float32():
    logits = answers(3, 6, 5).bfloat16()
    for way in WAYS:
        assert torch.equal(combined(logits, way, UNEVEN), combined(logits.float(), way, UNEVEN))


def test_logits_far_apart_stay_finite():
    logits = torch.tensor([[[1000.0, 0.0]], [[0.0, 1000.0]]])
    found = combined(logits, "probabilities", torch.full((2,), 0.5))
    assert torch.equal(found.softmax(1), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("way", WAYS)
def test_equal_networks_are_one_network(networks, images, way):
    alone, twice = networks[0](images).logits, Ensemble([networks[0]] * 2, way)(images).logits
    torch.testing.assert_close(twice.softmax(1), alone.softmax(1))
    if way == "logits":
        assert torch.equal(twice, alone)  # halves are exact


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_the_networks_changes_no_answer(networks, images, way):
    order = [2, 0, 1]
    one = Ensemble(networks, way, weights=UNEVEN)(images).logits
    other = Ensemble([networks[i] for i in order], way, weights=UNEVEN[order])(images).logits
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, Ensemble(networks, way, weights=UNEVEN[order])(images).logits)


def test_learned_weights_have_the_highest_likelihood_of_all():
    labels = torch.randint(5, (80,), generator=torch.Generator().manual_seed(3))
    logits = answers(2, 80, 5)
    logits[0].scatter_add_(1, labels[:, None], torch.full((80, 1), 2.0))
    right = logits.double().softmax(2).gather(2, labels.expand(2, -1)[:, :, None])[:, :, 0]  # (2, N)
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)[1:-1]
    best = grid[(grid[:, None] * right[0] + (1 - grid[:, None]) * right[1]).log().sum(1).argmax()]
    shares = learned_shares(logits, labels)
    assert 0.55 < best < 0.95
    assert shares[0].item() == pytest.approx(best.item(), abs=1e-3)
    assert shares.sum().item() == pytest.approx(1)


def test_networks_that_answer_alike_count_alike():
    logits, labels = answers(1, 40, 5).expand(3, -1, -1), torch.arange(40) % 5
    torch.testing.assert_close(learned_shares(logits, labels), torch.full((3,), 1 / 3))


def test_a_network_that_knows_beside_one_that_guesses_counts_for_nearly_all():
    labels = torch.arange(100) % 5
    knows = 10 * torch.eye(5)[labels]
    for place in (0, 1):
        both = [answers(100, 5), answers(100, 5)]
        both[place] = knows
        shares = learned_shares(torch.stack(both), labels)
        assert shares[place] > 0.99
        assert shares.min() > 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_all_but_the_logits_is_of_the_network_that_is_shown(networks, images, place):
    together, one = Ensemble(networks, shown=place), networks[place]
    seen, alone = together(images, EVERYTHING), one(images, EVERYTHING)
    assert torch.equal(seen.embedding, alone.embedding)
    for shown, own in zip(seen.features, alone.features, strict=True):
        assert torch.equal(shown, own)
    assert not torch.allclose(seen.logits, alone.logits)
    assert together.classifier is one.classifier
    assert (together.inseparable, together.stageless) == (one.inseparable, one.stageless)
    assert (together.image_size, together.facts()) == (one.image_size, one.facts())
    assert [maps.shape for maps in together.shapes().features] == [maps.shape for maps in one.shapes().features]
    if alone.final is not None:
        means = torch.rand(3, alone.final.shape[1])
        assert torch.equal(together.classify(means), one.classify(means))
    assert bool(one.inseparable) == (place == 2)  # a transformer that torch.fx cannot cut
    if not one.inseparable:
        whole, own = (NetworkView(network, stages=True).run_from(0, images) for network in (together, one))
        assert torch.equal(whole.logits, own.logits)
        assert torch.equal(whole.features[2], alone.features[2])


def test_what_is_not_asked_for_is_not_computed(networks, images):
    together = Ensemble(networks)
    assert together(images).features == ()
    asked = []
    handles = [
        network.register_forward_hook(lambda _network, given, _output: asked.append(given[1])) for network in networks
    ]
    together(images, Show(features=True))
    for handle in handles:
        handle.remove()
    assert asked == [Show(features=True), LOGITS, LOGITS]


def test_networks_take_turns_only_where_that_is_asked_for(networks):
    for turns, expected in ((True, [0, 1, 2, 0]), (False, [1, 1, 1, 1])):
        together, seen = Ensemble(networks, shown=1, turns=turns), []
        for step in range(4):
            together.take_turn(step)
            seen.append(together.shown)
        assert seen == expected


def test_networks_that_take_turns_can_be_cut_into_stages_only_if_all_can(networks):
    assert Ensemble(networks, turns=True).inseparable == networks[2].inseparable != ""
    assert Ensemble(networks[:2], turns=True).inseparable == Ensemble(networks).inseparable == ""


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_copy_for_fast_passes_answers_the_same_and_takes_the_same_turns(networks, images, precision):
    together = Ensemble(networks, "learned", weights=UNEVEN, turns=True)
    fast = frozen(together, PRECISIONS[precision])
    assert fast is not together
    for step in range(3):
        together.take_turn(step)
        assert fast.shown == together.shown == step
        with autocast("cpu", PRECISIONS[precision]):
            seen = fast(images, Show())
        expected = together(images, Show())
        near = {"rtol": 1e-3, "atol": 1e-4} if precision == "float32" else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(seen.logits, expected.logits, **near)
        assert [maps.shape for maps in seen.features] == [maps.shape for maps in expected.features]


def test_a_deep_copy_takes_turns_of_its_own(networks):
    together = Ensemble(networks, turns=True)
    copied = copy.deepcopy(together)
    together.take_turn(2)
    assert (together.shown, copied.shown) == (2, 0)
