"""A sound distiller, and one for each way to break a promise: ``fails`` names the check that must notice."""

import random
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdzoo import Batch, DataSpec, Distiller, Fidelity, Needs, NetworkView, Output


class Sound(Distiller):
    """Keeps every promise: a feature regression with a projector, noise, a moving centre and a phase before.

    Args:
        ce: weight of the cross-entropy with the targets.
        hint: weight of the regression.
        gap: weight of the squared difference of the logits; left out by default.
    """

    paper = "-"
    fidelity = Fidelity.EXACT

    def __init__(self, *, ce: float = 1.0, hint: float = 1.0, gap: float = 0.0):
        super().__init__(ce=ce, hint=hint, gap=gap)

    def build(self, student: Output, teacher: Output, data: DataSpec) -> None:
        narrow, wide = student.features[-1].shape[1], teacher.features[-1].shape[1]
        self.projector = nn.Conv2d(narrow, wide, 1)
        self.register_buffer("centre", torch.zeros(wide))
        self.register_buffer("offset", torch.zeros(wide))
        self.extend()

    def extend(self) -> None:
        """Make further modules of a subclass."""

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        if not self.is_active:
            return
        with torch.no_grad():
            means = [teacher(batch.images).features[-1].mean((0, 2, 3)) for batch in batches]
        self.offset.copy_(torch.stack(means).mean(0))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: F.cross_entropy(student.logits, batch.targets),
            hint=lambda: self.changed(self.regression(student, teacher), student, teacher, batch),
            gap=lambda: F.mse_loss(student.logits, teacher.logits),
        )

    def regression(self, student: Output, teacher: Output) -> Tensor:
        wanted = teacher.features[-1].mean((2, 3))  # (B, D)
        seen = self.projector(student.features[-1]).mean((2, 3))
        self.centre.lerp_(wanted.mean(0), 0.1)
        noise = 0.01 * torch.randn_like(wanted)
        return F.mse_loss(seen, wanted - self.centre - 0.1 * self.offset + noise)

    def changed(self, term: Tensor, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Change the regression's term in a subclass."""
        return term


# Those that one expression breaks: check -> what the distiller does wrong -> what it has in place of Sound's.
FAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "check_documented": {
        "names no paper": {"paper": ""},
        "would have a keyword varied that it does not have": {"search": {"hnt": (0.1, 10.0)}},
    },
    "check_needs": {
        "reads features and says that it does not": {"needs": Needs(features=False)},
        "needs the preactivations of an unknown network": {"needs": Needs(preactivations=("assistant",))},
        "needs an unknown view": {"needs": Needs(views=("upside down",))},
        "reads maps before the last ReLU and does not say so": {
            "changed": lambda self, term, s, t, batch: term + 0.1 * t.preactivations[-1].square().mean()
        },
        "reads a view that its needs do not name": {
            "forward": lambda self, s, t, batch: self.loss(s(batch.views["weak"]), t(batch.images), batch)
        },
    },
    "check_embedding": {
        "reads the teacher's embedding and says that it does not": {
            "needs": Needs(embedding=False),
            "changed": lambda self, term, s, t, batch: term + 0.1 * t.embedding.square().mean(),
        },
        "counts what is positive in the teacher's embedding and says that it does not read it": {
            "needs": Needs(embedding=False),
            "changed": lambda self, term, s, t, batch: term * (1 + (t.embedding > 0).float().mean()),
        },
    },
    "check_without_labels": {
        "reads labels in a term of its own and does not say so": {
            "changed": lambda self, term, s, t, batch: term * (1 + (batch.labels == 0).float().mean())
        },
        "reads targets in a term of its own and does not say so": {
            "changed": lambda self, term, s, t, batch: term + 0.1 * F.cross_entropy(s.logits, batch.targets)
        },
    },
    "check_without_classifier": {
        "reads logits and says that it does not": {
            "needs": Needs(logits=False),
            "changed": lambda self, term, s, t, batch: term + 0.1 * F.mse_loss(s.logits, t.logits),
        },
    },
    "check_terms": {
        "says of a term that it does not have that it reads labels": {"label_terms": ("ce", "hnit")},
        "says of a term that it does not have that it reads logits alone": {"logit_terms": ("ce", "hnit")},
        "returns a value for each image": {"changed": lambda self, term, s, t, batch: term.expand(len(batch.images))},
        "returns a term in float64": {"changed": lambda self, term, s, t, batch: term.double()},
    },
    "check_weights": {
        "takes a weight of 0 for none given": {
            "loss": lambda self, s, t, batch: (
                {"ce": F.cross_entropy(s.logits, batch.targets)} | Sound.loss(self, s, t, batch)
            )
        },
        "multiplies by a weight twice": {"changed": lambda self, term, s, t, batch: self.weights["hint"] * term},
    },
    "check_feature_shapes": {
        "takes both networks' maps for equally large": {
            "changed": lambda self, term, s, t, batch: F.mse_loss(self.projector(s.features[-1]), t.features[-1])
        },
        "takes maps for contiguous, as a transformer's are not": {
            "changed": lambda self, term, s, t, batch: (
                term + 0.1 * t.features[0].view(len(batch.images), -1).square().mean()
            )
        },
    },
    "check_class_counts": {
        "takes the number of classes for even, as a Haar transform does": {
            "changed": lambda self, term, s, t, batch: (
                term + F.mse_loss(*[o.logits[:, ::2] - o.logits[:, 1::2] for o in (s, t)])
            )
        },
        "compares standardised logits, of which two are the same for every network": {
            "changed": lambda self, term, s, t, batch: (
                0 * term + F.mse_loss(*[F.layer_norm(o.logits, o.logits.shape[1:]) for o in (s, t)])
            )
        },
    },
    "check_mixed_targets": {
        "looks for the class whose target is 1, where mixed images have none": {
            "changed": lambda self, term, s, t, batch: (
                term - (s.logits.log_softmax(1) * (batch.targets == 1)).sum() / (batch.targets == 1).sum()
            )
        },
    },
    "check_extreme_values": {
        "takes the logarithm of a softmax that may have underflowed": {
            "changed": lambda self, term, s, t, batch: (
                term - (t.logits.softmax(1) * s.logits.softmax(1).log()).sum(1).mean()
            )
        },
        "divides by a norm that may be 0": {
            "changed": lambda self, term, s, t, batch: (
                term + F.mse_loss(*[o.embedding.mean(1) / o.embedding.norm(dim=1) for o in (s, t)])
            )
        },
        "takes a root whose gradient at 0 is not finite, though the term is": {
            "changed": lambda self, term, s, t, batch: term + s.features[0].square().sum(1).sqrt().mean()
        },
    },
    "check_gradients": {
        "owns a module that it does not use": {
            "regression": lambda self, s, t: F.mse_loss(s.embedding.mean(1), t.embedding.mean(1))
        },
    },
    "check_inputs_unchanged": {
        "divides the teacher's logits in place": {
            "changed": lambda self, term, s, t, batch: (
                term + F.mse_loss(s.logits.softmax(1), t.logits.div_(4.0).softmax(1))
            )
        },
        "writes into the batch": {
            "loss": lambda self, s, t, batch: Sound.loss(self, s, t, batch._replace(targets=batch.targets.mul_(0.9)))
        },
    },
    "check_deterministic": {
        "draws where no seed of torch's reaches": {
            "changed": lambda self, term, s, t, batch: term * (1 + random.random())
        },
    },
    "check_float32": {
        "computes its loss in bfloat16": {
            "changed": lambda self, term, s, t, batch: (
                term + (s.logits.bfloat16() - t.logits.bfloat16()).square().mean().float()
            )
        },
        "reads the digits that a network in bfloat16 does not have": {
            "changed": lambda self, term, s, t, batch: term + ((2.0**14 * s.logits).frac() == 0).float().mean()
        },
    },
    "check_compiles": {
        "waits for the device in the midst of a step": {
            "changed": lambda self, term, s, t, batch: term if term.is_meta or term.item() < 1e6 else term.sqrt()
        },
    },
    "check_state": {
        "leaves a buffer out of what is saved": {
            "extend": lambda self: self.register_buffer("centre", torch.zeros_like(self.centre), persistent=False)
        },
    },
    "check_learns": {
        "ships a module that knows nothing of images": {
            "deploy": lambda self, student: nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
        },
    },
}
for check, by_fault in FAULTS.items():
    for fault, replaced in by_fault.items():  # in this module under their names, so that they can be pickled
        about = {"__doc__": fault, "__module__": __name__, "fails": check}
        globals()[fault] = type(fault, (Sound,), about | replaced)


class Undocumented(Sound):
    """Has a keyword that no Args speak of."""

    fails = "check_documented"

    def __init__(self, *, ce: float = 1.0, hint: float = 1.0, gap: float = 0.0, warmup: int = 0):
        super().__init__(ce=ce, hint=hint, gap=gap)


class NoDefault(Sound):
    """Has a keyword that must be given: no method without a configuration."""

    fails = "check_documented"

    def __init__(self, *, ce: float):
        super().__init__(ce=ce)


class NoYaml(Sound):
    """Has a keyword of a type that no YAML can hold."""

    fails = "check_documented"

    def __init__(self, *, ce: Tensor = 1.0):  # type: ignore[assignment]
        super().__init__(ce=1.0)


class HidesItsFinalMap(Sound):
    """Classifies a part of the final map and does not say so."""

    fails = "check_needs"

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        cell = student(batch.images).final[:, :, 0, 0]
        terms = super().forward(student, teacher, batch)
        return {**terms, "hint": terms["hint"] + 0.1 * student.classify(cell).square().mean()}


class HidesItsTeacher(Sound):
    """Asks its teacher and says that it has none."""

    fails = "check_needs"
    needs = Needs(teacher=False)

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        pass

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        teacher(batch.images)
        return super().forward(student, teacher, batch)


class ReadsATeacherThatIsNotThere(Sound):
    """Reads its teacher's output and says that it has none."""

    fails = "check_needs"
    needs = Needs(teacher=False)

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        pass


class StrangeName(Sound):
    """Names a term after no keyword."""

    fails = "check_terms"

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return {f"loss_{name}": term for name, term in super().loss(student, teacher, batch).items()}


class HidesAWeight(Sound):
    """Gets a weight wrong that is 0 by default."""

    fails = "check_weights"

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(student, teacher, batch)
        return {name: term * self.weights["gap"] if name == "gap" else term for name, term in terms.items()}


class KnowsOneBatchSize(Sound):
    """Takes every batch for as large as the first."""

    fails = "check_batch_sizes"
    rows = 0

    def changed(self, term: Tensor, student: Output, teacher: Output, batch: Batch) -> Tensor:
        self.rows = self.rows or len(batch.images)
        wanted = teacher.features[-1].mean((2, 3)).reshape(self.rows, -1)
        return F.mse_loss(self.projector(student.features[-1]).mean((2, 3)), wanted)


class SumsOverTheBatch(Sound):
    """Adds up over the images, so that its weight depends on how many there are."""

    fails = "check_batch_sizes"

    def changed(self, term: Tensor, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return term * len(batch.images)


class VarianceInAList(Sound):
    """Keeps what it learns in a list, where no optimiser looks."""

    fails = "check_gradients"

    def extend(self) -> None:
        self.variances = [torch.zeros((), requires_grad=True)]

    def changed(self, term: Tensor, student: Output, teacher: Output, batch: Batch) -> Tensor:
        variance = F.softplus(self.variances[0]) + 0.1
        return term / variance + variance.log()


class StudentCutOff(Sound):
    """Trains its projector on features that are detached, and the student not at all."""

    fails = "check_gradients"

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            seen = student(batch.images)
        return self.loss(seen, teacher(batch.images), batch)


class WakesTheTeacher(Sound):
    """Lets the teacher's batch norms learn."""

    fails = "check_teacher_frozen"

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        teacher.network.train()
        return super().forward(student, teacher, batch)


class MovesTheTeacher(Sound):
    """Turns the teacher into something else before training."""

    fails = "check_teacher_frozen"

    def prepare(self, student: NetworkView, teacher: NetworkView, batches: Iterable[Batch]) -> None:
        with torch.no_grad():
            for parameter in teacher.network.parameters():
                parameter.mul_(0.9)


class LeavesItInEvalMode(Sound):
    """Looks at the student in evaluation mode and leaves it there."""

    fails = "check_inputs_unchanged"

    def forward(self, student: NetworkView, teacher: NetworkView, batch: Batch) -> dict[str, Tensor]:
        terms = super().forward(student, teacher, batch)
        student.network.eval()
        return terms


class Reseeds(Sound):
    """Sets everybody's seed."""

    fails = "check_deterministic"

    def regression(self, student: Output, teacher: Output) -> Tensor:
        torch.manual_seed(0)
        return super().regression(student, teacher)


class UnderAutocast(Sound):
    """Turns autocast on for its own modules."""

    fails = "check_float32"

    def regression(self, student: Output, teacher: Output) -> Tensor:
        with torch.autocast(student.logits.device.type, torch.bfloat16):
            return super().regression(student, teacher).float()


class ConstantLeftBehind(Sound):
    """Keeps a constant where .to(device) does not find it."""

    fails = "check_meta"

    def extend(self) -> None:
        self.mask = torch.linspace(1.0, 2.0, steps=20)

    def changed(self, term: Tensor, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return term + (self.mask * teacher.embedding).square().mean()


class CountsInPython(Sound):
    """Counts its steps in Python, and so compiles anew at each."""

    fails = "check_compiles"
    steps = 0

    def changed(self, term: Tensor, student: Output, teacher: Output, batch: Batch) -> Tensor:
        self.steps += 1
        return term * min(1.0, self.steps / 1000)


class PreparesInVain(Sound):
    """Keeps what it found out before training as a plain tensor."""

    fails = "check_state"

    def extend(self) -> None:
        del self.offset
        self.offset = torch.zeros_like(self.centre)

    def regression(self, student: Output, teacher: Output) -> Tensor:
        self.offset = self.offset.to(student.logits.device)
        return super().regression(student, teacher)


class HoldsALambda(Sound):
    """Keeps a function that cannot be pickled."""

    fails = "check_copies"

    def extend(self) -> None:
        self.scale = lambda term: term * 2

    def changed(self, term: Tensor, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return self.scale(term)


class KeepsItsLastTerm(Sound):
    """Keeps a tensor with its graph, of which no copy can be made."""

    fails = "check_copies"

    def changed(self, term: Tensor, student: Output, teacher: Output, batch: Batch) -> Tensor:
        self.last = term
        return term


class WrongSign(Sound):
    """Climbs where it should descend."""

    fails = "check_learns"

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(student, teacher, batch)
        return {name: -term if name == "ce" else term for name, term in terms.items()}


class ExpectedToFail(WrongSign):
    """Says itself which promise it breaks."""

    fails = ""
    expected_failures: ClassVar[dict[str, str]] = {"check_learns": "it climbs"}
