"""FBT: the three transfers against numpy, the fused network, and what teaches without being taught."""

import numpy as np
import pytest
import torch
from kdzoo.distillers.fbt import FBT, Local2Global

from kdzoo import Output, toys
from kdzoo.errors import UserError
from kdzoo.outputs import Show


def reference(source, learner, labels, scale, eps):
    """InfoNCE of the embeddings and the loss of OFA of the logits, by loops."""
    (e_i, z_i), (e_j, z_j) = source, learner
    e_i, e_j = (e / np.sqrt((e**2).sum(1, keepdims=True)) for e in (e_i, e_j))
    p_i, p_j = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (z_i, z_j))
    total = 0.0
    for row in range(len(e_j)):
        similar = np.exp(scale * (e_i @ e_j[row]))
        total -= np.log(similar[row] / similar.sum())
        for k in range(p_i.shape[1]):
            m = float(k == labels[row])
            total -= ((p_i[row, k] + m) ** eps - m) * np.log(p_j[row, k])
    return total / len(e_j)


def outputs(waves, dtype=torch.float64):
    return [Output(waves(6, 5, phase=p, dtype=dtype), waves(6, 8, phase=p + 0.3, dtype=dtype)) for p in (0.2, 1.1)]


@pytest.mark.parametrize("eps", [1.0, 1.5])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_a_transfer_is_the_contrast_of_embeddings_and_the_raised_cross_entropy_of_logits(waves, tau, eps):
    source, learner = outputs(waves)
    labels = np.array([0, 1, 2, 3, 4, 4])
    target = torch.arange(5) == torch.from_numpy(labels)[:, None]
    expected = reference(
        *[(o.embedding.numpy(), o.logits.numpy()) for o in (source, learner)], labels, scale=1 / tau, eps=eps
    )
    method = FBT(tau=tau, eps=eps)
    found = method.teach(source, learner, target, torch.tensor(1 / tau, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    turned = source._replace(embedding=source.embedding.flip(0))  # another image's embedding is no partner
    assert method.teach(turned, learner, target, torch.tensor(1 / tau)).item() != pytest.approx(expected, rel=1e-3)


def test_what_teaches_gets_no_gradient_and_what_learns_does(waves):
    source, learner = (
        Output(o.logits.requires_grad_(), o.embedding.requires_grad_()) for o in outputs(waves, torch.float32)
    )
    FBT().teach(source, learner, torch.eye(5, dtype=torch.bool)[[0, 1, 2, 3, 4, 4]], torch.tensor(5.0)).backward()
    assert source.logits.grad is None
    assert source.embedding.grad is None
    assert learner.logits.grad.any()
    assert learner.embedding.grad.any()


@pytest.mark.parametrize("source", [(6, 8, 8), (6, 7, 5), (6, 2, 2), (6, 1, 1), (6, 4, 3)])
def test_the_projector_leads_from_any_grid_to_the_others(waves, source):
    project = Local2Global(torch.empty(2, *source), torch.empty(2, 12, 4, 4))
    assert project(waves(2, *source)).shape == (2, 12, 4, 4)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_what_the_projector_gives_is_of_unit_size_however_large_its_weights_become(waves, size):
    project = Local2Global(torch.empty(2, 6, 8, 8), torch.empty(2, 12, 4, 4))
    with torch.no_grad():
        for weight in project.block.parameters():
            weight *= size
    given = project(waves(2, 6, 8, 8))
    torch.testing.assert_close(given.mean(1), torch.zeros(2, 4, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(given.square().mean(1), torch.ones(2, 4, 4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_the_fused_network_is_three_stages_of_one_the_projector_and_the_last_of_the_other(first):
    together, batch = toys.distillation(FBT, {"first": first}), toys.batch_of()
    method = together.distiller.eval()
    student, teacher = together.student.eval(), together.teacher
    with torch.no_grad():
        s, t = student(batch.images, Show()), teacher(batch.images, Show())
        early, late = (s, teacher) if first == "student" else (t, student)
        f = late.run_tail(late.run_stage(3, method.projector(early.features[2])).maps)
        embedding = f.embedding if first == "student" else method.embed(f.embedding)
        f = (embedding.double().numpy(), f.logits.double().numpy())
        s = (method.embed(s.embedding).double().numpy(), s.logits.double().numpy())
        t = (t.embedding.double().numpy(), t.logits.double().numpy())
        found = together(batch)
    labels, scale = batch.labels.numpy(), 1 / 0.07
    for name, pair in {"transfer": (t, s), "fuse": (t, f), "hand": (f, s)}.items():
        assert found[name].item() == pytest.approx(reference(*pair, labels, scale, 1.0), rel=1e-4)
    log_p = f[1] - np.log(np.exp(f[1]).sum(1, keepdims=True))
    assert found["fused"].item() == pytest.approx(-log_p[range(4), labels].mean(), rel=1e-5)


def test_the_fused_network_teaches_the_students_first_stages_and_leaves_the_teacher():
    together = toys.distillation(FBT)
    together(toys.batch_of())["fuse"].backward()
    reached = [
        any(p.grad is not None and p.grad.any() for p in stage.parameters()) for stage in together.student.stages
    ]
    assert reached == [True, True, True, False]
    assert all(p.grad is None for p in together.teacher.parameters())


def test_only_the_network_whose_last_stage_is_borrowed_is_called_by_stages():
    assert FBT().needs.stages == ("teacher",)
    assert FBT(first="teacher").needs.stages == ("student",)
    assert FBT(fused=0.0, transfer=0.0, fuse=0.0, hand=0.0).needs.stages == ()


def test_the_scale_of_similarities_is_learned_and_at_most_100():
    method = toys.distillation(FBT, {"tau": 0.2}).distiller
    assert method.scale().item() == pytest.approx(5)
    with torch.no_grad():
        method.log_scale.fill_(9.0)
    assert method.scale().item() == pytest.approx(100)
    assert method.log_scale.requires_grad


@pytest.mark.parametrize("wrong", [{"tau": 0.0}, {"eps": -1.0}, {"first": "both"}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match=r"expected|known"):
        FBT(**wrong)
