"""PAT: regions, aligners and prompts of the authors' code, and the teacher that prompts run through."""

import copy

import pytest
import torch
from kdzoo.distillers.pat import PAT, Aligner, Prompt, Regions, sinusoids

from kdzoo import toys
from kdzoo.connectors import Pyramid
from kdzoo.errors import UserError
from kdzoo.losses import context_loss
from kdzoo.outputs import NetworkView, Show

GRIDS = (4, 8, 8), (6, 8, 8), (8, 4, 4), (10, 2, 2)


def filled(module, waves):
    """Parameters by a closed form, in their order, which is that of the authors' modules."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(0.3 * waves(*parameter.shape, phase=0.1 * i, dtype=torch.float64))
    return module


def sums(maps):
    return maps.sum().item(), maps.square().sum().item()


@pytest.fixture
def features(waves):
    return [waves(3, *grid, phase=0.2 * i, dtype=torch.float64) for i, grid in enumerate(GRIDS)]


@pytest.fixture
def regions(features, waves):
    module = filled(Regions(features, 16, 4).double(), waves)
    module.positions.zero_()  # the authors encode the image's place in its batch
    return module


def test_regions_attend_as_those_of_the_authors(regions, features):
    """jimmylin0979/PAT@a7aff3f, distillers/pat.py, RegionAttention without its positions."""
    expected = (
        (-98.7557431232132, 530.0220050429566),
        (-97.75777494565155, 524.2307341819555),
        (-98.48790159022073, 528.9323347063595),
        (-98.89680996192934, 529.0843917253698),
    )
    found = regions(features)
    assert [maps.shape for maps in found] == [(3, 16, 4, 4)] * 4
    for maps, wanted in zip(found, expected, strict=True):
        assert sums(maps) == pytest.approx(wanted, rel=1e-6)


def test_aligned_regions_and_their_loss_are_those_of_the_authors(regions, features, waves):
    """jimmylin0979/PAT@a7aff3f, distillers/pat.py, ViT2CNNProjector and hcl_loss."""
    target = waves(3, 8, 8, 8, phase=1.0, dtype=torch.float64)
    found = filled(Aligner(16, target).double(), waves)(regions(features)[1])
    assert sums(found) == pytest.approx((287.5758910559385, 1950.6821981491728), rel=1e-6)
    assert context_loss(found, target, Pyramid((8, 8))).item() == pytest.approx(1.8666812393821677, rel=1e-6)


def test_a_prompt_is_that_of_the_authors_and_the_same_at_each_position(waves):
    """jimmylin0979/PAT@a7aff3f, distillers/pat.py, PromptBlock with the same feedback for all images."""
    maps, told = (waves(n, 64, 4, 4, phase=p, dtype=torch.float64) for n, p in ((3, 0.4), (1, 0.9)))
    prompt = filled(Prompt(maps, told).double(), waves)
    with torch.no_grad():
        prompt.beta.fill_(0.7)
    found = prompt(maps, told)
    assert sums(found) == pytest.approx((235.45352879244567, 3836.655035527398), rel=1e-6)
    added = found - maps
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-12)
    assert not torch.allclose(added[0], added[1])


def test_at_first_a_prompt_adds_nothing(waves):
    maps, told = waves(3, 6, 4, 4), waves(1, 9, 2, 2)
    assert torch.equal(Prompt(maps, told)(maps, told), maps)


@pytest.mark.parametrize("width", [16, 7])
def test_positions_are_told_apart_by_sines_and_cosines(width):
    table = sinusoids(64, width)
    assert table.shape == (64, width)
    assert torch.allclose(table[5, 0], torch.tensor(5.0).sin())
    assert torch.allclose(table[5, 1], torch.tensor(5.0).cos())
    assert (torch.cdist(table, table) + torch.eye(64)).min() > 0.1


def test_the_order_of_regions_matters_and_that_of_images_does_not(features):
    torch.manual_seed(0)
    module = Regions([maps.float() for maps in features], 16, 4)
    maps = [maps.float() for maps in features]
    whole, turned = module(maps), module([m.flip(0) for m in maps])
    assert all(torch.allclose(one, other.flip(0), atol=1e-6) for one, other in zip(whole, turned, strict=True))
    mirrored = module([m.flip(3) for m in maps])
    assert not torch.allclose(whole[0], mirrored[0].flip(3), atol=1e-4)


def distillation(beta=0.5, **keywords):
    """A pair of toys whose prompts do something."""
    together = toys.distillation(PAT, {"width": 16, "heads": 4, **keywords})
    with torch.no_grad():
        for prompt in together.distiller.prompts:
            for parameter in prompt.parameters():
                parameter.mul_(3)
            prompt.beta.fill_(beta)
    return together


def test_prompts_stand_before_each_stage_of_the_teacher_but_the_first():
    together, batch = distillation(), toys.batch_of()
    method, teacher = together.distiller.eval(), together.teacher
    view = NetworkView(teacher, stages=True)
    with torch.no_grad():
        maps = teacher.run_stage(0, batch.images).maps
        wanted = [maps]
        for stage in (1, 2, 3):
            maps = teacher.run_stage(stage, method.prompts[stage - 1](maps, method.get_buffer(f"told{stage}"))).maps
            wanted.append(maps)
        found = method.prompted(view, batch.images)
        plain = teacher(batch.images, Show())
    assert all(torch.equal(one, other) for one, other in zip(found.features, wanted, strict=True))
    assert torch.allclose(found.logits, teacher.run_tail(maps).logits)
    assert not torch.allclose(found.logits, plain.logits, atol=1e-4)


def test_without_prompts_it_is_the_teacher_and_the_term_that_holds_them_is_0():
    together, batch = distillation(beta=0.0), toys.batch_of()
    view = NetworkView(together.teacher, stages=True)
    found, plain = together.distiller.prompted(view, batch.images), together.teacher(batch.images, Show())
    assert torch.allclose(found.logits, plain.logits, atol=1e-6)
    assert together(batch)["prompt"].item() == pytest.approx(0, abs=1e-6)
    assert distillation()(batch)["prompt"].item() > 1e-6


def test_the_next_step_is_told_the_mean_gap_of_this_one():
    together, batch = distillation(), toys.batch_of()
    method, view = together.distiller, NetworkView(together.teacher, stages=True)
    before = copy.deepcopy(method)
    with torch.no_grad():
        prompted = before.prompted(view, batch.images)
        student = copy.deepcopy(together.student)(batch.images, Show())
        seen = [align(maps) for align, maps in zip(before.aligners, before.regions(student.features), strict=True)]
    assert not any(method.get_buffer(f"told{stage}").any() for stage in (1, 2, 3))
    together(batch)
    for stage in (1, 2, 3):
        expected = (seen[stage] - prompted.features[stage]).mean(0, keepdim=True)
        assert torch.allclose(method.get_buffer(f"told{stage}"), expected, atol=1e-5)
    told = method.prompted(view, batch.images).features[1]
    assert not torch.allclose(told, prompted.features[1], atol=1e-4)


def test_once_prompts_do_something_all_that_is_built_is_trained_and_the_teacher_is_not():
    together = distillation()
    together(toys.batch_of())  # from which the next step is told something
    terms = together(toys.batch_of())
    (terms["feature"] + terms["prompt"]).backward()
    still = [name for name, p in together.distiller.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    assert all(p.grad is None for p in together.teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in together.student.parameters())


@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (8, 12, 16, 20)])
def test_what_the_next_step_is_told_leaves_the_gradients_of_this_one(widths):
    """Where stages share a grid, a prompt reads the buffer itself, which is written before the backward pass."""
    teacher = toys.Toy(toys.Shape(widths, toys.ODD))
    together = toys.distillation(PAT, {"width": 16, "heads": 4}, teacher=teacher)
    for seed in (1, 2):
        toys.total(together(toys.batch_of(seed))).backward()
    assert together.distiller.get_buffer("told1").any()


def test_a_weight_of_0_builds_nothing_and_calls_no_stage():
    together = toys.distillation(PAT, {"feature": 0.0, "prompt": 0.0})
    assert not list(together.distiller.parameters())
    assert together.distiller.needs.stages == ()
    assert set(together(toys.batch_of())) == {"ce", "kd"}


@pytest.mark.parametrize("wrong", [{"heads": 7}, {"width": 0}, {"temperature": 0.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        PAT(**wrong)
