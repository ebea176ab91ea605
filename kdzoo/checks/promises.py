"""The checks: what every distiller promises, each checked with toy networks."""

import copy
import io
import pickle
import re
import sys
from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature

import torch
from torch import Tensor, nn

from kdzoo import toys
from kdzoo.checks.expect import (
    LEAST_AGREEMENT,
    LEAST_FALL,
    LEAST_TEACHING,
    MOST_GROWTH,
    TAUGHT,
    Narrow,
    expect,
    expect_equal,
    expect_finite,
    learning,
    promising,
    teaching,
)
from kdzoo.checks.running import promise
from kdzoo.distillation import Distillation
from kdzoo.distiller import Batch, Distiller, Fidelity
from kdzoo.errors import UserError
from kdzoo.keywords import keyword_settings
from kdzoo.outputs import Output
from kdzoo.process_state import check_compiler
from kdzoo.tensors import leaves, trained_by


def _keywords(distiller: Callable[..., Distiller]) -> dict[str, Parameter]:
    return {p.name: p for p in signature(distiller).parameters.values() if p.kind is Parameter.KEYWORD_ONLY}


# What a distiller is


@promise
def check_documented(distiller: type[Distiller]) -> None:
    """Module and class have docstrings, and every keyword has a default, a type and a line in Args."""
    cls = toys.class_of(distiller)
    paper, fidelity = getattr(cls, "paper", None), getattr(cls, "fidelity", None)
    expect(bool(sys.modules[cls.__module__].__doc__), "a docstring of the module", "none", "say what it does")
    expect(
        bool(cls.__dict__.get("__doc__")),
        f"a docstring of {cls.__name__}",
        "none",
        "give title, formula, Args and source",
    )
    expect(isinstance(paper, str) and bool(paper), "a paper, as a text", repr(paper), "set it on the class")
    expect(isinstance(fidelity, Fidelity), "a Fidelity", repr(fidelity), "set fidelity on the class")
    sections = [(base.__doc__ or "").partition("Args:")[2] for base in cls.__mro__]
    entries = re.findall(r"^[ \t]+(\w+(?:, \w+)*):", "\n".join(sections), re.MULTILINE)
    described = {name for entry in entries for name in entry.split(", ")}
    for name, keyword in _keywords(distiller).items():
        remedy = f"give '{name}' one in {cls.__name__}"
        expect(keyword.default is not Parameter.empty, "a default for each keyword", "none", remedy)
        expect(keyword.annotation is not Parameter.empty, "a type for each keyword", "none", remedy)
        expect(name in described, "a line in the docstring's Args for each keyword", "none", remedy)
    strange = set(getattr(cls, "search", {})) - _keywords(distiller).keys()
    expect(not strange, f"a keyword of {cls.__name__} in search", ", ".join(map(repr, strange)), "correct the name")
    keyword_settings(distiller, {})  # refuses types that no YAML can hold


@promise
def check_needs(distiller: type[Distiller]) -> None:
    """The method runs with exactly what its needs name: the teacher, the views and the network outputs."""
    student, teacher = toys.Toy(toys.STUDENT), toys.Toy(toys.TEACHER)
    method = distiller()
    together = Distillation(student, teacher if method.needs.teacher else toys.Absent(), method, data=toys.data())
    batch, needs = toys.batch_of(), method.needs
    strange = set(needs.views) - batch.views.keys()
    expect(not strange, f"views among {', '.join(batch.views)}", strange, "correct needs.views")
    batch = batch._replace(views={name: batch.views[name] for name in needs.views})
    together.train().prepare([batch])
    expect_finite(together, batch, f"no more than {needs}")


@promise
def check_embedding(distiller: type[Distiller]) -> None:
    """The method reads no embedding of the teacher where its needs say so: its logits may come from disk alone."""
    if distiller().needs.embedding:
        return
    teacher, blank = (copy.deepcopy(toys.taught()) for _ in range(2))
    blank.register_forward_hook(lambda _module, _images, output: _without_embedding(output))
    usual, without = (toys.distillation(distiller, teacher=each) for each in (teacher, blank))
    terms = toys.seeded(without, 1)
    expect_equal(terms, toys.seeded(usual, 1), "without the teacher's embedding", "leave embedding=False out of needs")
    expect_finite(without, toys.batch_of(), "a teacher without an embedding, as needs.embedding=False promises")


def _without_embedding(output: Output) -> Output:
    return output._replace(embedding=torch.full_like(output.embedding, torch.nan))


@promise
def check_without_labels(distiller: type[Distiller]) -> None:
    """On data without labels the method learns from the teacher, unless its label_terms say that nothing is left."""
    try:
        together = toys.distillation(distiller, labelled=False)
    except UserError:
        return
    with promising("terms that read no labels, beside those of label_terms"):
        expect_finite(together, toys.without_labels(toys.batch_of()), "a batch without labels")


@promise
def check_without_classifier(distiller: type[Distiller]) -> None:
    """Where its needs say that it reads no logits, the method learns beside networks without a classifier."""
    if distiller().needs.logits:
        return
    with promising("terms that read no logits, as needs.logits=False says"):
        together = toys.distillation(distiller, classes=0)
        expect_finite(together, toys.batch_of(), "networks without a classifier")


@promise
def check_terms(distiller: type[Distiller]) -> None:
    """The loss is a dict of float32 scalars, each named after the keyword that is its weight."""
    terms, keywords = toys.distillation(distiller)(toys.batch_of()), _keywords(distiller)
    expect(isinstance(terms, dict) and len(terms) > 0, "a dict of terms", terms, "return {'ce': ...}")
    for name, term in terms.items():
        known = f"the keywords {', '.join(keywords)}"
        expect(name in keywords, f"a keyword that weighs the term '{name}'", known, "rename one of them")
        expect(isinstance(term, Tensor), f"a tensor for '{name}'", type(term), "return the tensor itself")
        expect(term.ndim == 0, f"a scalar for '{name}'", tuple(term.shape), "take the mean over the batch")
        expect(term.dtype == torch.float32, f"'{name}' in float32", term.dtype, "compute it in float32")
        expect(term.requires_grad or not term.any(), f"a gradient of '{name}'", "none", TAUGHT)
    method = distiller()
    for attribute in ("label_terms", "logit_terms"):
        strange = set(getattr(method, attribute)) - {*method.weights, *Distiller.logit_terms}
        known = f"terms in {attribute} that the method has ({', '.join(method.weights)})"
        expect(not strange, known, ", ".join(map(repr, sorted(strange))), "correct the name")


@promise
def check_weights(distiller: type[Distiller]) -> None:
    """A term is proportional to the keyword of its name, and is left out at a weight of 0."""
    defaults = {name: keyword.default for name, keyword in _keywords(distiller).items()}
    weights = {name: value for name, value in defaults.items() if type(value) in (int, float)}
    usual = toys.distillation(distiller)(toys.batch_of())
    for name, default in weights.items():
        if name not in usual and (default != 0 or type(default) is int):
            continue  # a number that weighs no term
        weight = default or 0.5
        terms = toys.distillation(distiller, {name: weight})(toys.batch_of())
        if name not in terms:
            continue
        double = toys.distillation(distiller, {name: 2 * weight})(toys.batch_of())
        remedy = f"multiply the term by self.{name}, once"
        expect_equal({name: 2 * terms[name]}, {name: double[name]}, f"at twice the {name}", remedy, 1e-4)
        with promising(f"no work of '{name}' at a weight of 0, for which build() may not have been called"):
            without = toys.distillation(distiller, {name: 0.0})
            rest = without(toys.batch_of()).get(name, torch.zeros(()))
        expect(rest.item() == 0, f"no '{name}' at a weight of 0", rest.item(), "skip the term where it is 0")
        grads = torch.autograd.grad(rest, toys.trained(without), allow_unused=True) if rest.requires_grad else ()
        still = all(grad is None or not grad.any() for grad in grads)
        expect(still, f"no gradient of '{name}' at a weight of 0", "one", "skip the term where it is 0")


# What it must cope with


@promise
def check_feature_shapes(distiller: type[Distiller]) -> None:
    """Any student works with any teacher: different widths and grids, odd grids, 1x1 maps, tokens."""
    for where, (student, teacher) in toys.PAIRS.items():
        with promising(f"finite terms for {where}"):
            together = toys.distillation(distiller, student=toys.Toy(student), teacher=toys.Toy(teacher))
        expect_finite(together, toys.batch_of(), where)


@promise
def check_class_counts(distiller: type[Distiller]) -> None:
    """The method works with any number of classes, odd or even, from the fewest with which it teaches."""
    fewest = distiller().fewest_classes
    for classes in (fewest, 10, 67, 101):
        with promising(f"finite terms for {classes} classes"):
            together = toys.distillation(distiller, classes=classes)
        expect_finite(together, toys.batch_of(classes=classes), f"{classes} classes")
    few, many = (teaching(distiller, classes) for classes in (fewest, 10))
    remedy = "set fewest_classes on the class"
    expect(few >= LEAST_TEACHING * many, f"terms that teach with {fewest} classes", f"a gradient of {few:.2g}", remedy)


@promise
def check_batch_sizes(distiller: type[Distiller]) -> None:
    """The batch size may change from step to step, and terms do not grow with it."""
    together = toys.distillation(distiller)
    for size in (8, 2):
        expect_finite(together, toys.batch_of(size=size), f"a batch of {size}")
    once, twice = (
        toys.distillation(distiller)(batch) for batch in (toys.batch_of(size=8), toys.twice(toys.batch_of(size=8)))
    )
    for name, term in once.items():
        got = f"{term.item():.4g} for 8 images, and {twice[name].item():.4g} for each of them twice"
        grown = twice[name].abs() > MOST_GROWTH * term.abs() + 1e-3
        expect(not grown, f"a '{name}' that does not grow with the batch", got, "take the mean over the batch")


@promise
def check_mixed_targets(distiller: type[Distiller]) -> None:
    """Images may be mixed, and targets mixed and smoothed."""
    expect_finite(toys.distillation(distiller), toys.batch_of(mixed=True), "mixed images and smoothed targets")


@promise
def check_extreme_values(distiller: type[Distiller]) -> None:
    """Terms and gradients stay finite when networks give zeros, constants or very large logits."""
    zeros, ones, normal = torch.zeros, torch.ones, torch.randn
    for where, student, teacher, scale in (
        ("zeros", zeros, zeros, 1.0),
        ("ones", ones, ones, 1.0),
        ("a student of zeros", zeros, normal, 1.0),
        ("a teacher of zeros", normal, zeros, 1.0),
        ("logits of 1e4", normal, normal, 1e4),
    ):
        students, teachers = toys.Replay(toys.STUDENT, student, scale), toys.Replay(toys.TEACHER, teacher, scale)
        expect_finite(toys.distillation(distiller, student=students, teacher=teachers), toys.batch_of(), where)


# What it must leave alone


@promise
def check_gradients(distiller: type[Distiller]) -> None:
    """All that the loss trains is a registered parameter, and every parameter that is shipped or built is trained."""
    together = toys.distillation(distiller)
    trained = {id(p): name for name, p in together.named_parameters() if p.requires_grad}
    shipped = trained_by(together.deploy()(toys.batch_of().images).logits)
    wanted = {id(p) for p in (*together.distiller.parameters(), *shipped)}
    moved: set[int] = set()
    for seed in range(4):
        together.zero_grad()
        loss = toys.total(together(toys.batch_of(seed, progress=(seed + 1) / 5)))
        strays = [tuple(leaf.shape) for leaf in trained_by(loss) if id(leaf) not in trained]
        expect(not strays, "all that trains to be a parameter", f"others of shape {strays}", "register them")
        loss.backward()
        moved |= {id(p) for p in together.parameters() if p.grad is not None and p.grad.any()}
    still = [name for key, name in trained.items() if key in wanted - moved]
    expect(not still, "a gradient for every parameter", f"none for {still}", "use them or leave them out")


@promise
def check_teacher_frozen(distiller: type[Distiller]) -> None:
    """The teacher does not change: no gradient, no new values, evaluation mode."""
    teacher = toys.Toy(toys.TEACHER)
    before = copy.deepcopy(teacher.state_dict())
    toys.train(toys.distillation(distiller, teacher=teacher), steps=2)
    remedy = "take the teacher as given, and copy what you train"
    changed = [name for name, value in teacher.state_dict().items() if not torch.equal(value, before[name])]
    expect(not changed, "the teacher's values as before", f"new ones in {changed}", remedy)
    graded = [name for name, p in teacher.named_parameters() if p.grad is not None or p.requires_grad]
    expect(not graded, "no gradient for the teacher", f"one for {graded}", remedy)
    training = [name or "all of it" for name, module in teacher.named_modules() if module.training]
    expect(not training, "a teacher in evaluation mode", f"training mode in {training}", remedy)


@promise
def check_inputs_unchanged(distiller: type[Distiller]) -> None:
    """The method writes nothing into batch and outputs, which others read too, and the student keeps its mode."""
    together, batch = toys.distillation(distiller), toys.batch_of()
    seen: list[tuple[Tensor, Tensor]] = []  # what a distiller is given, and a copy of it

    def keep(given: Batch | Output) -> None:
        seen.extend((leaf, leaf.detach().clone()) for leaf in leaves(given))

    keep(batch)
    for network in together.student, together.teacher:
        assert network is not None
        network.register_forward_hook(lambda _module, _images, output: keep(output))
    together(batch)
    same = all(torch.equal(value, before) for value, before in seen)
    expect(same, "batch and outputs as before", "new values in them", "no in-place operation on arguments")
    training = all(module.training for module in together.student.modules())
    expect(training, "a student in training mode", "evaluation mode", "give back the mode you found")


@promise
def check_deterministic(distiller: type[Distiller]) -> None:
    """The same seed gives the same loss, and the method never sets a seed itself."""
    first, second = toys.distillation(distiller), toys.distillation(distiller)
    remedy = "draw from torch's own generator, and never set its seed"
    expect_equal(toys.seeded(first, 5), toys.seeded(second, 5), "from the same seed", remedy)
    drawn = []
    for seed in (1, 2):
        toys.seeded(first, seed)
        drawn.append(torch.rand(()).item())
    expect(drawn[0] != drawn[1], "other numbers after another seed", "the same", remedy)


# How it computes


@promise
def check_float32(distiller: type[Distiller]) -> None:
    """Losses are computed in float32, and bfloat16 networks change them little."""
    together = toys.distillation(distiller)
    with Narrow() as narrow:
        together(toys.batch_of())
    expect(not narrow.found, "float32 alone", f"less from {sorted(narrow.found)}", "drop the conversion")
    exact, rounded = (toys.distillation(distiller, teacher=copy.deepcopy(toys.taught())) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        terms = toys.seeded(rounded, 1, size=8)
    remedy = "look for steps and cancellation"
    expect_equal(terms, toys.seeded(exact, 1, size=8), "from bfloat16 networks, to a fifth", remedy, 0.2)


@promise
def check_meta(distiller: type[Distiller]) -> None:
    """All tensors of the method move with .to(device), and it runs on the meta device, where only shapes exist."""
    together = toys.distillation(distiller, prepared=False).to("meta")
    for name, term in together(toys.to_meta(toys.batch_of())).items():
        expect(term.device.type == "meta", f"'{name}' on the meta device", term.device, "use register_buffer")


@promise
def check_compiles(distiller: type[Distiller]) -> None:
    """The method compiles as one graph, once for all batches, with the same results as without compilation."""
    torch.compiler.reset()
    check_compiler()
    # Outputs that are stored compile sooner than networks do, but their stages compute nothing.
    made = toys.Toy if distiller().needs.stages else partial(toys.Replay, make=torch.randn, scale=1.0)
    plain = toys.distillation(distiller, student=made(toys.STUDENT), teacher=made(toys.TEACHER))
    inner = copy.deepcopy(plain)
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    for step in (1, 2, 3):
        terms = toys.seeded(plain, step)
        toys.total(terms).backward()
        with torch.compiler.set_stance("default" if step == 1 else "fail_on_recompile"):
            others = toys.seeded(compiled, step)
        toys.total(others).backward()
        expect_equal(others, terms, "compiled and not", "look for state that lives in Python", 1e-4)
    slopes = [{"gradient": nn.utils.get_total_norm(toys.gradients(each))} for each in (inner, plain)]
    expect_equal(slopes[0], slopes[1], "compiled and not", "look at custom autograd functions", 1e-3)


# What becomes of it


@promise
def check_state(distiller: type[Distiller]) -> None:
    """A fresh instance that loads a saved state continues where the saved one stopped."""
    saved, fresh = toys.distillation(distiller), toys.distillation(distiller, seed=9, prepared=False)
    toys.train(saved, steps=2)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    remedy = "keep all state in parameters and buffers"
    expect_equal(toys.seeded(fresh, 5), toys.seeded(saved, 5), "after saving and loading", remedy)


@promise
def check_copies(distiller: type[Distiller]) -> None:
    """The method can be pickled and copied during training."""
    together = toys.distillation(distiller)
    toys.train(together, steps=1)
    pickled, copied = pickle.loads(pickle.dumps(together)), copy.deepcopy(together)
    terms = toys.seeded(together, 5)
    remedy = "keep all state in parameters and buffers"
    expect_equal(toys.seeded(pickled, 5), terms, "after being pickled", remedy)
    expect_equal(toys.seeded(copied, 5), terms, "after being copied", remedy)


@promise
def check_learns(distiller: type[Distiller]) -> None:
    """On an easy problem the loss falls, and the shipped network learns to agree with labels or teacher."""
    found = learning(distiller)
    remedy = "look at the sign and the scale of each term"
    expect(found.fall > LEAST_FALL, "a falling loss", f"a fall by {found.fall:.0%} of its size", remedy)
    better = found.agreement > max(LEAST_AGREEMENT, found.agreement_before)
    got = f"agreement {found.agreement_before:.2f}, then {found.agreement:.2f}"
    expect(better, "a student that learns", got, remedy)
