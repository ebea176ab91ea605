"""How each library of ``benchmarks/peers.py`` is driven: its own networks, loader and epoch, on one set of images.

Each function trains for ever. It gives its loader to ``pace`` and iterates over what it gets back, which waits where it
is another library's turn.
"""

import hashlib
import importlib
import importlib.util
import itertools
import pickle
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from measuring import Group, this_machine
from torch import nn
from torchvision import datasets, transforms

from kdzoo import DataSpec, models
from kdzoo.data import Dataset, open_dataset
from kdzoo.engine.device import find_device

THEIR_NAMES = {
    "vgg8": "vgg8",
    "shufflenetv1": "ShuffleV1",
    "shufflenetv2": "ShuffleV2",
    "mobilenetv2_half": "MobileNetV2",
}
LAYOUT = "cifar-100-python"  # torchvision's folder
OF_THE_WHOLE = {"path": ".", "io": "output"}  # torchdistill's name of a network's own output

Pace = Callable[[Any], Any]


def kdzoo(given: Namespace, folder: Path, pace: Pace) -> None:
    """This library: one lane."""
    machine = this_machine()
    dataset = open_dataset(given.data, device=machine.device)
    group = Group(given.teacher, given.student, [given.method], dataset, machine, given.batch_size, given.compile)
    for _ in pace(itertools.repeat(None)):
        group.step()


def mdistiller(given: Namespace, folder: Path, pace: Pace) -> None:
    """Its trainer's epoch, by its configuration of the method."""
    package = importing(folder, "mdistiller")
    images, engine = package("dataset.cifar100"), package("engine")
    images.get_data_folder = lambda: str(given.work)
    settings = package("engine.cfg").CFG
    settings.merge_from_file(str(folder / "configs" / "cifar100" / f"{given.method}.yaml"))
    names = ["DISTILLER.TEACHER", theirs(given.teacher), "DISTILLER.STUDENT", theirs(given.student)]
    settings.merge_from_list([*names, "LOG.WANDB", False, "LOG.PREFIX", str(given.work / "mdistiller")])
    settings.merge_from_list(["SOLVER.BATCH_SIZE", given.batch_size])
    if given.workers is not None:
        settings.merge_from_list(["DATASET.NUM_WORKERS", given.workers])
    train, test, count, classes = package("dataset").get_dataset(settings)
    known = package("models").cifar_model_dict
    teacher, student = (known[theirs(name)][0](num_classes=classes) for name in (given.teacher, given.student))
    kind = settings.DISTILLER.TYPE
    extra = (settings, count) if kind == "CRD" else (settings,)
    method = package("distillers").distiller_dict[kind](student, teacher, *extra)
    torch.backends.cudnn.benchmark = True
    trainer = engine.trainer_dict[settings.SOLVER.TRAINER]
    trainer("peers", nn.DataParallel(method.cuda()), pace(train), test, settings).train_epoch(1)


def repdistiller(given: Namespace, folder: Path, pace: Pace) -> None:
    """Its epoch of distillation, with the weights of its example of kd."""
    only_kd("RepDistiller", given.method)
    package = importing(folder)
    images, zoo = package("dataset.cifar100"), package("distiller_zoo")
    images.get_data_folder = lambda: str(given.work)
    workers = {} if given.workers is None else {"num_workers": given.workers}
    train, _, _ = images.get_cifar100_dataloaders(given.batch_size, is_instance=True, **workers)
    known = package("models").model_dict
    teacher, student = (known[theirs(name)](num_classes=100) for name in (given.teacher, given.student))
    networks = nn.ModuleList([student, teacher])
    losses = nn.ModuleList([nn.CrossEntropyLoss(), zoo.DistillKL(4), zoo.DistillKL(4)])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    if torch.cuda.is_available():
        networks.cuda()
        losses.cuda()
        torch.backends.cudnn.benchmark = True
    options = Namespace(distill="kd", gamma=0.1, alpha=0.9, beta=0.0, print_freq=100)
    package("helper.loops").train_distill(1, pace(train), networks, losses, optimizer, options)


def torchdistill(given: Namespace, folder: Path, pace: Pace) -> None:
    """The epoch of its image classification example, by the settings of its sample for CIFAR-100."""
    only_kd("torchdistill", given.method)
    package = importing(folder, "torchdistill")
    pictures = datasets.CIFAR100(
        str(given.work),
        transform=transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5070754, 0.48655024, 0.44091907), (0.26733398, 0.25643876, 0.2761503)),
            ]
        ),
    )
    spec = DataSpec("cifar100", 100, tuple(pictures.classes), 32, torch.tensor(pictures.targets))
    device = find_device("auto")
    teacher, student = (models.create(name, spec).body.to(device) for name in (given.teacher, given.student))
    ends = {f"{who}_module_{what}": value for who in ("student", "teacher") for what, value in OF_THE_WHOLE.items()}
    softened = {"temperature": 4.0, "alpha": 0.9, "reduction": "batchmean"}
    recipe = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler},
            "kwargs": {
                "batch_size": given.batch_size,
                "num_workers": 16 if given.workers is None else given.workers,
                "pin_memory": device.type == "cuda",
            },
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False, "wrapper": "DataParallel"},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": ends | softened}, "weight": 1.0}}},
        },
    }
    box = package("core.distillation").get_distillation_box(
        teacher, student, {"train": pictures}, recipe, device, [device.index or 0], False, 1
    )
    torch.backends.cudnn.benchmark = True
    box.train_data_loader = pace(box.train_data_loader)
    box.pre_epoch_process(epoch=0)
    example = script(folder / "examples" / "torchvision" / "image_classification.py")
    example.train_one_epoch(box, device, 0, 100)


LIBRARIES = {each.__name__: each for each in (kdzoo, mdistiller, repdistiller, torchdistill)}


def theirs(name: str) -> str:
    """The name of a network in the libraries that follow RepDistiller."""
    return THEIR_NAMES.get(name, name)


def only_kd(library: str, method: str) -> None:
    """Refuses other methods."""
    if method != "kd":
        raise SystemExit(f"{library} is measured with kd only, not with {method}")


def importing(folder: Path, package: str = "") -> Callable[[str], Any]:
    """What imports modules of a checkout by their names within ``package``."""
    sys.path.insert(0, str(folder))
    return lambda name: importlib.import_module(f"{package}.{name}" if package else name)


def script(file: Path) -> ModuleType:
    """A script of a checkout as a module."""
    found = importlib.util.spec_from_file_location(file.stem, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def write_cifar(dataset: Dataset, folder: Path) -> None:
    """The set in torchvision's layout of CIFAR-100: pickles of (N, 3072) bytes, channels first, with fine labels."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"train": dataset.spec.labels, "test": torch.cat([labels for _, labels in dataset.test_batches(1024)])}
    for split, pixels in (("train", dataset.train_pixels), ("test", dataset.test_pixels)):
        assert pixels is not None
        rows = pixels.permute(0, 3, 1, 2).flatten(1).cpu().numpy()
        entry = {"data": rows, "fine_labels": labels[split].tolist()}
        (folder / split).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": list(dataset.spec.class_names)}))


def accept(folder: Path) -> None:
    """Has torchvision expect these files' md5 sums, in the attributes where its class keeps them."""
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    datasets.CIFAR100.train_list = [["train", sums["train"]]]
    datasets.CIFAR100.test_list = [["test", sums["test"]]]
    datasets.CIFAR100.meta = {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}
