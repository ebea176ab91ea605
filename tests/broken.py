"""A sound distiller, and one for each way to break a promise: ``fails`` names the check that must notice."""

import random
from typing import ClassVar

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
        self.centre: Tensor
        self.offset: Tensor
        self.register_buffer("centre", torch.zeros(wide))
        self.register_buffer("offset", torch.zeros(wide))
        self.extend()

    def extend(self) -> None:
        """Make further modules of a subclass."""

    def prepare(self, student: nn.Module, teacher: nn.Module, batches: list[Batch]) -> None:  # type: ignore[override]
        if not self.is_active:
            return
        with torch.no_grad():
            means = [teacher(batch.images).features[-1].mean((0, 2, 3)) for batch in batches]
        self.offset.copy_(torch.stack(means).mean(0))

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        return self.weigh(
            ce=lambda: F.cross_entropy(student.logits, batch.targets),
            hint=lambda: self.regression(student, teacher, batch),
            gap=lambda: F.mse_loss(student.logits, teacher.logits),
        )

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        wanted = teacher.features[-1].mean((2, 3))  # (B, D)
        seen = self.projector(student.features[-1]).mean((2, 3))
        self.centre.lerp_(wanted.mean(0), 0.1)
        noise = 0.01 * torch.randn_like(wanted)
        return F.mse_loss(seen, wanted - self.centre - 0.1 * self.offset + noise)


class Undocumented(Sound):
    """Has a keyword that no Args speak of."""

    fails = "check_documented"

    def __init__(self, *, ce: float = 1.0, hint: float = 1.0, gap: float = 0.0, warmup: int = 0):
        super().__init__(ce=ce, hint=hint, gap=gap)


class NoDefault(Sound):
    """Has a keyword that must be given: no method without a configuration.

    Args:
        ce: weight of the cross-entropy.
    """

    fails = "check_documented"

    def __init__(self, *, ce: float):
        super().__init__(ce=ce)


class NoYaml(Sound):
    """Has a keyword of a type that no YAML can hold.

    Args:
        ce: weight of the cross-entropy.
    """

    fails = "check_documented"

    def __init__(self, *, ce: Tensor = 1.0):  # type: ignore[assignment]
        super().__init__(ce=1.0)


class NoSource(Sound):
    """Names no paper."""

    fails = "check_documented"
    paper = ""


class HidesItsNeeds(Sound):
    """Reads features and says that it does not."""

    fails = "check_needs"
    needs = Needs(features=False)


class HidesItsPreactivations(Sound):
    """Reads maps before the last ReLU and does not say so."""

    fails = "check_needs"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return super().regression(student, teacher, batch) + 0.1 * teacher.preactivations[-1].square().mean()


class PreactivationsOfOthers(Sound):
    """Needs the preactivations of a network that there is not."""

    fails = "check_needs"
    needs = Needs(preactivations=("assistant",))


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

    def prepare(self, student: nn.Module, teacher: nn.Module, batches: list[Batch]) -> None:  # type: ignore[override]
        pass

    def forward(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, Tensor]:
        teacher(batch.images)
        return super().forward(student, teacher, batch)


class HidesItsViews(Sound):
    """Reads a view that its needs do not name."""

    fails = "check_needs"

    def forward(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.loss(student(batch.views["weak"]), teacher(batch.images), batch)


class UnknownView(Sound):
    """Needs a view that there is not."""

    fails = "check_needs"
    needs = Needs(views=("upside down",))


class StrangeName(Sound):
    """Names a term after no keyword."""

    fails = "check_terms"

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(student, teacher, batch)
        return {f"loss_{name}": term for name, term in terms.items()}


class PerSample(Sound):
    """Returns a value for each image."""

    fails = "check_terms"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return super().regression(student, teacher, batch).expand(len(batch.images))


class Double(Sound):
    """Returns a term in float64."""

    fails = "check_terms"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return super().regression(student, teacher, batch).double()


class InsistsOnItsWeight(Sound):
    """Takes a weight of 0 for none given."""

    fails = "check_weights"

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(student, teacher, batch)
        return {"ce": F.cross_entropy(student.logits, batch.targets)} | terms


class WeighsTwice(Sound):
    """Multiplies by a weight twice."""

    fails = "check_weights"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return self.weights["hint"] * super().regression(student, teacher, batch)


class HidesAWeight(Sound):
    """Gets a weight wrong that is 0 by default."""

    fails = "check_weights"

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(student, teacher, batch)
        return {name: term * self.weights["gap"] if name == "gap" else term for name, term in terms.items()}


class NeedsOneGrid(Sound):
    """Takes both networks' maps for equally large."""

    fails = "check_feature_shapes"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return F.mse_loss(self.projector(student.features[-1]), teacher.features[-1])


class NeedsContiguousMaps(Sound):
    """Takes maps for contiguous, as a transformer's are not."""

    fails = "check_feature_shapes"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        energy = teacher.features[0].view(len(batch.images), -1).square().mean()
        return super().regression(student, teacher, batch) + 0.1 * energy


class PairsClasses(Sound):
    """Takes the number of classes for even, as a Haar transform does."""

    fails = "check_class_counts"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        details = [o.logits[:, ::2] - o.logits[:, 1::2] for o in (student, teacher)]
        return super().regression(student, teacher, batch) + F.mse_loss(details[0], details[1])


class KnowsOneBatchSize(Sound):
    """Takes every batch for as large as the first."""

    fails = "check_batch_sizes"
    rows = 0

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        self.rows = self.rows or len(batch.images)
        wanted = teacher.features[-1].mean((2, 3)).reshape(self.rows, -1)
        return F.mse_loss(self.projector(student.features[-1]).mean((2, 3)), wanted)


class WantsHardTargets(Sound):
    """Looks for the class whose target is 1, where mixed images have none."""

    fails = "check_mixed_targets"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        hard = (batch.targets == 1).float()
        chosen = -(student.logits.log_softmax(1) * hard).sum() / hard.sum()
        return super().regression(student, teacher, batch) + chosen


class LogOfSoftmax(Sound):
    """Takes the logarithm of a softmax that may have underflowed."""

    fails = "check_extreme_values"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        kl = -(teacher.logits.softmax(1) * student.logits.softmax(1).log()).sum(1).mean()
        return super().regression(student, teacher, batch) + kl


class UnguardedNorm(Sound):
    """Divides by a norm that may be 0."""

    fails = "check_extreme_values"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        directions = [o.embedding.mean(1) / o.embedding.norm(dim=1) for o in (student, teacher)]
        return super().regression(student, teacher, batch) + F.mse_loss(directions[0], directions[1])


class UnguardedRoot(Sound):
    """Takes a root whose gradient at 0 is not finite, though the term is."""

    fails = "check_extreme_values"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return super().regression(student, teacher, batch) + student.features[0].square().sum(1).sqrt().mean()


class VarianceInAList(Sound):
    """Keeps what it learns in a list, where no optimiser looks."""

    fails = "check_gradients"

    def extend(self) -> None:
        self.variances = [torch.zeros((), requires_grad=True)]

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        variance = F.softplus(self.variances[0]) + 0.1
        return super().regression(student, teacher, batch) / variance + variance.log()


class UnusedProjector(Sound):
    """Owns a module that it does not use."""

    fails = "check_gradients"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return F.mse_loss(student.embedding.mean(1), teacher.embedding.mean(1))


class StudentCutOff(Sound):
    """Trains its projector on features that are detached, and the student not at all."""

    fails = "check_gradients"

    def forward(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            seen = student(batch.images)
        return self.loss(seen, teacher(batch.images), batch)


class WakesTheTeacher(Sound):
    """Lets the teacher's batch norms learn."""

    fails = "check_teacher_frozen"

    def forward(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, Tensor]:
        teacher.train()
        return super().forward(student, teacher, batch)


class MovesTheTeacher(Sound):
    """Turns the teacher into something else before training."""

    fails = "check_teacher_frozen"

    def prepare(self, student: nn.Module, teacher: nn.Module, batches: list[Batch]) -> None:  # type: ignore[override]
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(0.9)


class ScalesInPlace(Sound):
    """Divides the teacher's logits where they lie."""

    fails = "check_inputs_unchanged"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        soft = teacher.logits.div_(4.0).softmax(1)
        return super().regression(student, teacher, batch) + F.mse_loss(student.logits.softmax(1), soft)


class SharpensTargets(Sound):
    """Writes into the batch."""

    fails = "check_inputs_unchanged"

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        batch.targets.mul_(0.9)
        return super().loss(student, teacher, batch)


class LeavesItInEvalMode(Sound):
    """Looks at the student in evaluation mode and leaves it there."""

    fails = "check_inputs_unchanged"

    def forward(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, Tensor]:
        terms = super().forward(student, teacher, batch)
        student.eval()
        return terms


class Reseeds(Sound):
    """Sets everybody's seed."""

    fails = "check_deterministic"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        torch.manual_seed(0)
        return super().regression(student, teacher, batch)


class RollsItsOwnDice(Sound):
    """Draws where no seed of torch's reaches."""

    fails = "check_deterministic"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return super().regression(student, teacher, batch) * (1 + random.random())


class InBfloat16(Sound):
    """Computes its loss in bfloat16."""

    fails = "check_float32"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        gap = student.logits.bfloat16() - teacher.logits.bfloat16()
        return super().regression(student, teacher, batch) + gap.square().mean().float()


class UnderAutocast(Sound):
    """Turns autocast on for its own modules."""

    fails = "check_float32"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        with torch.autocast(batch.images.device.type, torch.bfloat16):
            return super().regression(student, teacher, batch).float()


class MagnifiesRounding(Sound):
    """Reads the digits that a network in bfloat16 does not have."""

    fails = "check_float32"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        coarse = ((2.0**14 * student.logits).frac() == 0).float().mean()
        return super().regression(student, teacher, batch) + coarse


class ConstantLeftBehind(Sound):
    """Keeps a constant where .to(device) does not find it."""

    fails = "check_meta"

    def extend(self) -> None:
        self.mask = torch.linspace(1.0, 2.0, steps=20)

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return super().regression(student, teacher, batch) + (self.mask * teacher.embedding).square().mean()


class ReadsAValue(Sound):
    """Waits for the device in the midst of a step."""

    fails = "check_compiles"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        term = super().regression(student, teacher, batch)
        return term if term.device.type == "meta" or term.item() < 1e6 else term.sqrt()


class CountsInPython(Sound):
    """Counts its steps in Python, and so compiles anew at each."""

    fails = "check_compiles"
    steps = 0

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        self.steps += 1
        return super().regression(student, teacher, batch) * min(1.0, self.steps / 1000)


class ForgetsItsBank(Sound):
    """Leaves a buffer out of what is saved."""

    fails = "check_state"

    def extend(self) -> None:
        self.register_buffer("centre", torch.zeros_like(self.centre), persistent=False)


class PreparesInVain(Sound):
    """Keeps what it found out before training as a plain tensor."""

    fails = "check_state"

    def extend(self) -> None:
        del self.offset
        self.offset = torch.zeros_like(self.centre)

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        self.offset = self.offset.to(batch.images.device)
        return super().regression(student, teacher, batch)


class HoldsALambda(Sound):
    """Keeps a function that cannot be pickled."""

    fails = "check_copies"

    def extend(self) -> None:
        self.scale = lambda term: term * 2

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        return self.scale(super().regression(student, teacher, batch))


class KeepsItsLastTerm(Sound):
    """Keeps a tensor with its graph, of which no copy can be made."""

    fails = "check_copies"

    def regression(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        self.last = super().regression(student, teacher, batch)
        return self.last


class WrongSign(Sound):
    """Climbs where it should descend."""

    fails = "check_learns"

    def loss(self, student: Output, teacher: Output, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(student, teacher, batch)
        return {name: -term if name == "ce" else term for name, term in terms.items()}


class ShipsTheProjector(Sound):
    """Ships a module that knows nothing of images."""

    fails = "check_learns"

    def deploy(self, student: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))


class ExpectedToFail(WrongSign):
    """Says itself which promise it breaks."""

    fails = ""
    expected_failures: ClassVar[dict[str, str]] = {"check_learns": "it climbs"}
