"""FCFD: the losses of the authors' code on small networks, the mixed networks drawn, and bridges between any grids."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.fcfd import FCFD, appearance_loss, bridge
from torch import nn

from kdzoo import Batch, DataSpec, Output, toys
from kdzoo.errors import UserError


class Chain(nn.Module):
    """Four convolutions with a ReLU, and a linear layer; also a method's view of itself, in float64."""

    def __init__(self, widths, classes=5):
        super().__init__()
        pairs = zip((3, *widths), widths, (1, 1, 2, 2), strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(fan_in, fan_out, 3, stride, 1) for fan_in, fan_out, stride in pairs)
        self.fc = nn.Linear(widths[-1], classes)

    def run_from(self, number, maps):
        features = []
        for conv in self.convs[number:]:
            maps = conv(maps).relu()
            features.append(maps)
        return Output(self.fc(maps.mean((2, 3))), maps.mean((2, 3)), tuple(features))

    def __call__(self, images):
        return self.run_from(0, images)


def fill(module, waves, phase):
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(0.4 * waves(*parameter.shape, phase=phase + 0.1 * i, dtype=torch.float64))
    return module


@pytest.fixture
def case(waves):
    """Student, teacher, method and batch in float64, with parameters of a closed form."""

    def build(**keywords):
        student, teacher = Chain((3, 4, 4, 5)).double(), Chain((4, 5, 6, 8)).double()
        fill(teacher, waves, 0.0).requires_grad_(False)
        fill(student, waves, 1.0)
        images = waves(6, 3, 8, 8, phase=0.7, dtype=torch.float64)
        data = DataSpec("sines", 5, tuple("abcde"), 8, torch.arange(5))
        method = FCFD(**{"paths": 4, **keywords}).assemble(student(images), teacher(images), data).double()
        for place, stage in enumerate(method.stages):
            fill(method.to_teacher[place], waves, stage)
            fill(method.to_student[place], waves, stage + 0.3)
        batch = Batch.of(images, torch.arange(6) % 5, 5, progress=0.5)
        return student, teacher, method.train(), batch

    return build


def test_all_terms_and_a_gradient_are_those_of_the_authors(case):
    """LiuDongyang6/FCFD@2aefb7b, classification/models/meta.py and cifar/main.py, with all four mixed networks.

    The networks here have no batch norms, as the authors' teacher uses the statistics of the batch.
    """
    student, teacher, method, batch = case()
    terms = method(student, teacher, batch)
    assert terms["appearance"].item() == pytest.approx(5 * 54.03000280252407, rel=1e-6)
    assert terms["function"].item() == pytest.approx(7.4339815083305, rel=1e-6)
    assert terms["kd"].item() == pytest.approx(2.3701861199843925, rel=1e-6)
    (terms["appearance"] + terms["function"] + terms["kd"]).backward()
    slope = student.convs[1].weight.grad
    assert slope.sum().item() == pytest.approx(-18.506320707966673, rel=1e-6)
    assert slope.norm().item() == pytest.approx(26.142805830623598, rel=1e-6)


def reference(maps, target, last):
    loss = ((maps - target) ** 2).mean()
    if last:
        pooled, wanted = (np.maximum(m, 0).mean((2, 3)) for m in (maps, target))
        loss += ((pooled - wanted) ** 2).mean()
    return loss


@pytest.mark.parametrize("last", [False, True])
def test_appearance_is_a_mean_squared_error_and_at_the_last_stage_that_of_rectified_means_too(waves, last):
    maps, target = (waves(6, 5, 4, 3, phase=phase, dtype=torch.float64) for phase in (0.4, 1.3))
    expected = reference(maps.numpy(), target.numpy(), last)
    assert appearance_loss(maps, target, last).item() == pytest.approx(expected, rel=1e-9)
    assert appearance_loss(target, target, last).item() == 0


def test_mixed_networks_are_the_first_stages_of_one_a_bridge_and_the_rest_of_the_other(case):
    student, teacher, method, batch = case(ways="student first", paths=2)
    t, s = teacher(batch.images), student(batch.images)
    bridged = method.to_teacher[1](s.features[2])
    last = teacher.convs[3](bridged).relu()
    expected = method.kl(teacher.fc(last.mean((2, 3))), t)
    deeper = teacher.convs[2](method.to_teacher[0](s.features[1])).relu()
    maps = teacher.convs[3](deeper).relu()
    expected = expected + method.kl(teacher.fc(maps.mean((2, 3))), t)
    assert method(student, teacher, batch)["function"].item() == pytest.approx(expected.item(), rel=1e-9)


def test_two_of_the_mixed_networks_are_drawn_anew_in_each_step_and_none_twice(case):
    method = case(paths=2)[2]
    torch.manual_seed(0)
    drawn = [tuple(sorted(method.drawn())) for _ in range(60)]
    assert set(drawn) == {(a, b) for a in method.mixed for b in method.mixed if a < b}
    torch.manual_seed(0)
    assert [tuple(sorted(method.drawn())) for _ in range(60)] == drawn


@pytest.mark.parametrize(("ways", "names"), [("both", 4), ("student first", 2), ("teacher first", 2)])
def test_the_ways_that_are_drawn_from(case, ways, names):
    method = case(ways=ways)[2]
    assert len(method.mixed) == names
    built = sum(isinstance(module, nn.Sequential) for module in method.to_student)
    assert built == (0 if ways == "student first" else 2)  # a bridge that no network crosses is not built


def test_without_mixed_networks_the_bridged_maps_remain(case):
    student, teacher, method, batch = case(paths=0)
    t, s = teacher(batch.images), student(batch.images)
    pairs = [(stage, method.to_teacher[place](s.features[stage])) for place, stage in enumerate((1, 2, 3))]
    expected = sum(reference(m.detach().numpy(), t.features[l].numpy(), l == 3) for l, m in pairs)
    terms = method(student, teacher, batch)
    assert terms["appearance"].item() == pytest.approx(5 * expected, rel=1e-6)
    assert terms["function"].item() == 0


def test_the_error_of_maps_rises_over_the_warm_up_and_the_other_terms_do_not(case):
    student, teacher, method, batch = case(warmup=0.5)
    quarter = method(student, teacher, batch._replace(progress=torch.tensor(0.25, dtype=torch.float64)))
    whole = method(student, teacher, batch)
    assert quarter["appearance"].item() == pytest.approx(whole["appearance"].item() / 2, rel=1e-9)
    assert quarter["function"].item() == pytest.approx(whole["function"].item(), rel=1e-9)


@pytest.mark.parametrize("source", [(4, 8, 8), (4, 4, 4), (4, 2, 2), (4, 3, 5), (4, 1, 1), (4, 8, 4)])
def test_a_bridge_leads_from_any_grid_to_any_other(waves, source):
    target = torch.empty(2, 6, 4, 4)
    found = bridge(torch.empty(2, *source), target, leaky=True)(waves(2, *source))
    assert found.shape == target.shape
    assert (found < 0).any()
    assert not isinstance(bridge(torch.empty(2, *source), target, leaky=False)[-1], nn.LeakyReLU)


def test_the_students_statistics_are_those_of_its_own_maps():
    together, plain = toys.distillation(FCFD, {"paths": 4}), toys.distillation(FCFD, {"paths": 0})
    for distillation in (together, plain):
        distillation(toys.batch_of())
    for one, other in zip(together.student.buffers(), plain.student.buffers(), strict=True):
        assert torch.equal(one, other)
    assert together.student.stages[3][1].num_batches_tracked == 1


@pytest.mark.slow(reason="torch.compile takes seconds")
def test_with_all_mixed_networks_it_compiles_as_one_graph():
    plain, inner = (toys.distillation(FCFD, {"paths": 4}) for _ in range(2))
    compiled = torch.compile(inner, fullgraph=True, backend="eager")
    expected, found = toys.seeded(plain, 3), toys.seeded(compiled, 3)
    for name, term in expected.items():
        assert found[name].item() == pytest.approx(term.item(), rel=1e-5)


def test_a_weight_of_0_builds_no_bridge_and_calls_no_stage():
    together = toys.distillation(FCFD, {"function": 0.0, "appearance": 0.0})
    assert together.distiller.needs.stages == ()
    assert set(together(toys.batch_of())) == {"ce", "kd"}


@pytest.mark.parametrize("wrong", [{"ways": "sideways"}, {"paths": -1}, {"leaky": ("both",)}, {"warmup": 2.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match=r"expected|known"):
        FCFD(**wrong)
