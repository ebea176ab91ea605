"""Methods and networks of others that misbehave: what each does wrong, and the line that must tell."""

from pathlib import Path

METHOD = '''
"""A method for tests."""

import os

import torch
from torch import nn

from kdzoo import Distiller, Fidelity, Needs
from kdzoo.losses import cross_entropy, softened_kl


class Mute(Exception):
    def __str__(self):
        raise ValueError("it cannot say what it is")


class Foreign(Distiller):
    paper = "none"
    fidelity = Fidelity.EXACT

    def __init__(self, *, ce: float = 1.0, match: float = 1.0):
        super().__init__(ce=ce, match=match)
        self.steps = 0

    def build(self, student, teacher, data):
        {build}

    def prepare(self, student, teacher, batches):
        {prepare}

    def deploy(self, student):
        {deploy}

    def loss(self, student, teacher, batch):
        self.steps += 1
        terms = {{
            "ce": cross_entropy(student.logits, batch.targets),
            "match": softened_kl(student.logits, teacher.logits, 4.0),
        }}
        if self.steps == 2:
            {loss}
        return terms

    {more}
'''

# By what they do: where the harm lies, its code, and what the line says. The loss does its harm in step 1.
IN_LOSS = {
    "a float": ("terms['match'] = 1.0", r"returned a float as 'match' at step 1; expected a float32 tensor"),
    "None": ("return None", "returned None at step 1; expected a dictionary"),
    "no term": ("terms = {}", "has no loss term at step 1"),
    "a list": ("return [terms]", "returned a list at step 1"),
    "a generator": ("return (term for term in terms)", "returned a generator at step 1"),
    "a text": ("terms['match'] = 'x'", "returned a str as 'match'"),
    "float64": ("terms['match'] = terms['match'].double()", r"shape \(\) and float64"),
    "bfloat16": ("terms['match'] = terms['match'].bfloat16()", "bfloat16"),
    "complex numbers": ("terms['match'] = terms['match'] + 0j", "complex64"),
    "whole numbers": ("terms['match'] = torch.tensor(1)", "int64"),
    "a truth": ("terms['match'] = terms['match'] > 0", "bool"),
    "one value in a list": ("terms['match'] = terms['match'][None]", r"shape \(1,\)"),
    "a value for each image": ("terms['match'] = student.logits", r"shape \(16, 10\)"),
    "a sparse tensor": ("terms['match'] = terms['match'].to_sparse()", "sparse_coo on cpu"),
    "a tensor elsewhere": ("terms['match'] = torch.zeros((), device='meta')", "strided on meta"),
    "another term": ("terms = {'new': terms['match']}", "returned the terms new at step 1 in place of ce, match"),
    "one term more": ("terms['new'] = terms['match']", "returned the terms ce, match, new at step 1"),
    "one term less": ("terms.pop('match')", "returned the terms ce at step 1"),
    "a number for a name": ("terms[3] = terms['match']", "named a loss term 3 at step 1; expected a text"),
    "markup for a name": ("terms['[/x]'] = terms.pop('match')", r"returned the terms ce, \[/x\]"),
    "detached terms": ("return {k: v.detach() for k, v in terms.items()}", "depend on no trained weight at step 1"),
    "terms of the teacher": ("terms = dict.fromkeys(terms, teacher.logits.sum())", "depend on no trained weight"),
    "NaN": ("terms['match'] = terms['match'] * float('nan')", "'match' is not finite at step 1"),
    "a gradient of NaN": ("terms['match'].register_hook(lambda g: g * float('nan'))", "is not finite: student.body"),
    "a term without a weight": (
        "self.weigh(other=lambda: terms['match'])",
        r"has no weight for its term 'other'; pass one to super\(\).__init__\(other=...\)",
    ),
    "a backward pass": (
        "sum(terms.values()).backward()",
        "RuntimeError: Trying to backward through the graph a second",
    ),
    "a hook that raises": ("terms['match'].register_hook(lambda g: 1 / 0)", "at step 1: ZeroDivisionError"),
    "a hook that leaves": ("terms['match'].register_hook(lambda g: exit(0))", "at step 1: SystemExit: 0"),
    "exit": ("exit(0)", r"at step 1: SystemExit: 0 \(foreign"),
    "SystemExit": ("raise SystemExit", r"at step 1: SystemExit \(foreign"),
    "BaseException": ("raise BaseException('base')", "at step 1: BaseException: base"),
    "GeneratorExit": ("raise GeneratorExit", "at step 1: GeneratorExit"),
    "StopIteration": ("raise StopIteration", "at step 1: StopIteration"),
    "an error that cannot speak": ("raise Mute", r"at step 1: Mute \(foreign"),
    "an error of two lines": ("raise ValueError('one\\ntwo')", r"at step 1: ValueError: one \(foreign"),
    "an error of markup": ("raise ValueError('[/red]')", r"ValueError: \[/red\]"),
    "an error without end": ("raise ValueError('x' * 100_000)", "ValueError: x{300} "),
    "a recursion": ("self.loss.__func__(*[self] * 4)", "at step 1: AttributeError"),
    "images written": ("batch.images.zero_()", "changed the batch's images at step 1"),
    "labels written": ("batch.labels.zero_()", "changed the batch's labels at step 1"),
    "targets written": ("batch.targets.zero_()", "changed the batch's targets at step 1"),
    "the teacher's logits written": ("teacher.logits.clamp_(min=0)", "changed the teacher's outputs at step 1"),
    "another default dtype": ("torch.set_default_dtype(torch.float64)", "changed torch's default dtype at step 1"),
    "another default device": ("torch.set_default_device('meta')", "changed torch's default device at step 1"),
    "no gradients": ("torch.set_grad_enabled(False)", "changed whether torch computes gradients at step 1"),
    "another folder": ("os.chdir('/')", "changed the working folder at step 1"),
}
IN_BUILD = {
    "an error when it is built": ("raise IndexError('misbuilt')", "while it was built: IndexError: misbuilt"),
    "an exit when it is built": ("exit(0)", "while it was built: SystemExit: 0"),
    "BaseException when it is built": ("raise BaseException('x')", "while it was built: BaseException: x"),
    "another default dtype when it is built": (
        "torch.set_default_dtype(torch.float64)",
        "changed torch's default dtype, which all other code reads too",
    ),
    "modules in float64": ("self.layer = nn.Linear(2, 2).double()", r"distiller\.layer\.weight is float64"),
}
IN_PREPARE = {
    "an error before training": ("raise ValueError('unready')", "before training: ValueError: unready"),
    "an exit before training": ("raise SystemExit", "before training: SystemExit"),
    "BaseException before training": ("raise BaseException('x')", "before training: BaseException: x"),
    "a module made too late": (
        "self.late = nn.Linear(3, 3)",
        r"made or replaced distiller\.late\.weight before training",
    ),
    "a student in float64": ("student.network.double()", r"student\.body\.[\w.]+ is float64"),
    "a frozen student": ("student.network.requires_grad_(False)", "is frozen: no weight of it requires"),
    "a student elsewhere": ("student.network.to('meta')", r"made or replaced student\.body"),
    "a student of NaN": ("[p.data.fill_(float('nan')) for p in student.network.parameters()]", "not finite"),
}
IN_DEPLOY = {
    "nothing to ship": ("return None", "deploys a NoneType; expected a torch.nn.Module"),
    "a function to ship": ("return lambda images: images", "deploys a function; expected"),
    "an error when it ships": ("raise ValueError('no')", "ValueError: no"),
    "an exit when it ships": ("exit(0)", "SystemExit: 0"),
    "no logits to ship": ("return nn.Identity()", "Identity shows no logits; expected an Output with logits"),
}
ELSEWHERE = {
    "no copies": ("def __deepcopy__(self, memo): raise ValueError('no copies')", "set up: ValueError: no copies"),
    "no fidelity": ("del fidelity", "has no fidelity; set it, as in fidelity = Fidelity.EXACT"),
    "an unknown fidelity": ("fidelity = 'faithful'", "has no fidelity; set it"),
    "no weights": (
        "def __init__(self, *, ce: float = 1.0, match: float = 1.0): self.steps = 0",
        r"the constructor of Foreign does not call super\(\).__init__",
    ),
    "needs of another type": ("needs = {'teacher': True}", "needs of Foreign is of type dict; expected kdzoo.Needs"),
    "needs of an unknown network": (
        "needs = Needs(preactivations=('pupil',))",
        r"preactivations=\('pupil',\) in the needs of Foreign; expected",
    ),
    "needs that are one word": ("needs = Needs(stages='teacher')", "stages='teacher' in the needs of Foreign"),
    "no state": ("def state_dict(self, *_, **__): raise ValueError('no state')", "ValueError: no state"),
}
SOUND = {"build": "pass", "prepare": "pass", "deploy": "return student", "loss": "pass", "more": ""}
PLACES = {"loss": IN_LOSS, "build": IN_BUILD, "prepare": IN_PREPARE, "deploy": IN_DEPLOY, "more": ELSEWHERE}
METHODS = {name: (place, *rest) for place, harms in PLACES.items() for name, rest in harms.items()}

# At import: the code, and what the line says.
IMPORTS = {
    "an exit": ("exit(0)", r"could not be imported \(SystemExit: 0"),
    "an error": ("raise ValueError('no')", r"could not be imported \(ValueError: no"),
    "BaseException": ("raise BaseException('x')", r"could not be imported \(BaseException: x"),
    "GeneratorExit": ("raise GeneratorExit", r"could not be imported \(GeneratorExit"),
    "no Python": ("def (", "SyntaxError"),
    "a module that is not there": ("import nowhere_to_be_found", "ModuleNotFoundError"),
    "another default dtype": ("import torch; torch.set_default_dtype(torch.float64)", "changed torch's default dtype"),
    "another default device": ("import torch; torch.set_default_device('meta')", "changed torch's default device"),
    "no gradients": ("import torch; torch.set_grad_enabled(False)", "changed whether torch computes gradients"),
    "another folder": ("import os; os.chdir('/')", "changed the working folder"),
}

NETWORK = """
import os

import torch
from torch import nn

{top}


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        sides = [(3, 8, 1), (8, 8, 2), (8, 16, 2), (16, 16, 2)]
        self.stages = nn.ModuleList(nn.Conv2d(one, two, 3, stride, 1) for one, two, stride in sides)
        self.norm, self.fc = nn.BatchNorm2d(16), nn.Linear(16, num_classes)
        {init}

    def forward(self, x):
        {before}
        for stage in self.stages:
            x = stage(x).relu()
        y = self.fc(self.norm(x).mean((2, 3)))
        {after}
        return y


def make(num_classes):
    {factory}
    return Net(num_classes)
"""
TRAINING = "if self.training: "
NO_LOGITS = "expected logits of shape"
# By what they do: where, the code, and what the line says; empty where nothing is wrong with it.
NETWORKS = {
    "a sound one": ("after", "pass", ""),
    "frozen in part": ("init", "self.fc.requires_grad_(False)", ""),
    "a tuple in training": ("after", TRAINING + "return y, x", ""),
    "logits in float64": ("after", "y = y.double()", ""),
    "images written": ("before", "x.zero_()", ""),
    "shared weights": ("init", "self.again = self.fc", ""),
    "frozen": ("init", "self.requires_grad_(False)", "is frozen: no weight of it requires a gradient"),
    "detached": ("after", "y = y.detach()", "depend on no trained weight at step 0"),
    "float64": ("init", "self.double(); self.register_forward_pre_hook(lambda _, x: x[0].double())", "is float64"),
    "bfloat16": (
        "init",
        "self.bfloat16(); self.register_forward_pre_hook(lambda _, x: x[0].bfloat16())",
        "is bfloat16",
    ),
    "complex weights": ("init", "self.z = nn.Parameter(torch.zeros(2) + 0j)", "is complex64"),
    "logits of whole numbers": ("after", "y = y.long()", "failed|no trained weight"),
    "weights of NaN": ("init", "self.fc.weight.data.fill_(float('nan'))", "not finite"),
    "logits of NaN": ("after", "y = y * float('nan')", "not finite"),
    "a row for all images": ("after", "y = y[:1]", NO_LOGITS),
    "logits of a batch in one row": ("after", "y = y.flatten()", NO_LOGITS),
    "logits turned around": ("after", "y = y.T", NO_LOGITS),
    "three dimensions": ("after", "y = y[:, None]", NO_LOGITS),
    "text": ("after", "y = 'x'", NO_LOGITS),
    "nothing": ("after", "y = None", NO_LOGITS),
    "an empty tuple": ("after", "y = ()", NO_LOGITS),
    "a softmax": ("after", "y = y.softmax(1)", "ends in a softmax"),
    "other classes": ("factory", "num_classes = 3", "gives 3 logits, expected 10"),
    "an error in training": ("before", TRAINING + "raise ValueError('only here')", "at step 0: ValueError: only here"),
    "an exit in training": ("before", TRAINING + "exit(0)", "at step 0: SystemExit: 0"),
    "BaseException in training": ("before", TRAINING + "raise BaseException('x')", "at step 0: BaseException: x"),
    "nothing in training": ("after", TRAINING + "return None", "no row of logits for each of 16 images in training"),
    "fewer logits in training": ("after", TRAINING + "return y[:, :3]", "at step 0"),
    "fewer rows in training": ("after", TRAINING + "return y[:1]", "no row of logits for each of 16 images"),
    "NaN in training": ("after", TRAINING + "return y * float('nan')", "not finite"),
    "a recursion": ("before", "return self(x)", "RecursionError"),
    "two images at most": ("before", "assert len(x) <= 2", "AssertionError"),
    "a weight made in training": ("before", TRAINING + "self.late = nn.Parameter(torch.zeros(3))", "at step|sees"),
    "a part that cannot be copied": ("init", "self.copies = (each for each in ())", r"it cannot be copied \(TypeError"),
    "an error in the factory": (
        "factory",
        "raise ValueError('no')",
        r"make\(num_classes=10\) failed \(ValueError: no\)",
    ),
    "an exit in the factory": ("factory", "exit(0)", r"failed \(SystemExit: 0\)"),
    "BaseException in the factory": ("factory", "raise BaseException('x')", r"failed \(BaseException: x\)"),
    "another default dtype": ("factory", "torch.set_default_dtype(torch.float64)", "changed torch's default dtype"),
    "no module": ("factory", "return {'model': Net(num_classes)}", r"returned dict, expected a torch.nn.Module"),
    "a class": ("factory", "return Net", r"returned type, expected a torch.nn.Module"),
    "an exit at import": ("top", "exit(0)", r"importing '\w+' failed \(SystemExit: 0\)"),
    "BaseException at import": ("top", "raise BaseException('x')", r"failed \(BaseException: x\)"),
    "no gradients at import": ("top", "torch.set_grad_enabled(False)", "changed whether torch computes gradients"),
}
INTACT = dict.fromkeys(("top", "init", "before", "after", "factory"), "pass")


def write_method(folder: Path, number: int, name: str) -> str:
    """Write the file of a misbehaving method and return its path."""
    place, code, _ = METHODS[name]
    file = folder / f"foreign{number}.py"
    file.write_text(METHOD.format(**SOUND | {place: code}))
    return str(file)


def write_network(folder: Path, number: int, name: str) -> str:
    """Write the file of a misbehaving network and return its name."""
    place, code, _ = NETWORKS[name]
    (folder / f"foreign_net{number}.py").write_text(NETWORK.format(**INTACT | {place: code}))
    return f"foreign_net{number}:make"
