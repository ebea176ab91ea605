"""What teacher and students hold in each frequency band of their features and logits, and where they agree.

Frequencies are cycles per image, so that maps of different grids have a common axis. ``kdzoo.results.spectrum_plot``
draws the tables that are computed here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from kdzoo import models
from kdzoo.data import Dataset
from kdzoo.engine.device import resolve_auto, use
from kdzoo.engine.progress import Progress
from kdzoo.errors import UserError
from kdzoo.experiments import teachers
from kdzoo.experiments.run import HERE, Here, compare_data, open_data, shipped_of
from kdzoo.outputs import Output, Show
from kdzoo.precision import PRECISIONS, autocast
from kdzoo.randomness import restored, seed_of, seed_torch
from kdzoo.resolve import resolve, stored
from kdzoo.settings import Run, Settings
from kdzoo.spectral import band_basis, cycles, radial_basis, spectral_power, wavelet_basis
from kdzoo.store.folder import RunFolder, find_runs
from kdzoo.tensors import full_precision

BATCH = 128  # images; agreement is estimated in each batch and averaged
COLUMNS = ["network", "stage", "grid", "measure", "band", "value"]


def octaves(grids: Iterable[Sequence[int]]) -> tuple[float, ...]:
    """Compute the edges 0, 1, 2, 4 ... of bands, as many as the finest of the grids (H, W) has waves for."""
    finest = max(float(cycles(*grid).max()) for grid in grids)
    edges = [0.0]
    while (edge := max(1.0, 2 * edges[-1])) < finest:
        edges.append(edge)
    return tuple(edges)


def band_names(edges: Sequence[float]) -> list[str]:
    """Name the bands between these edges, one more than there are edges."""
    between = [f"{low:g}-{high:g}" for low, high in pairwise(edges)]
    return [f"{edges[0]:g}", *between, f">{edges[-1]:g}"]


def band_passed(maps: Tensor, edges: Sequence[float]) -> list[Tensor]:
    """Part maps (B, C, H, W) into their Fourier coefficients in each band, (B, D) real; D is 0 in empty bands.

    With ``norm="ortho"`` inner products, thus Gram matrices, are those of the band-passed maps (Parseval).
    """
    spectrum = torch.fft.fft2(full_precision(maps), norm="ortho").flatten(2)
    masks = band_basis(maps.shape[2:], edges).bool().to(maps.device)
    return [torch.view_as_real(spectrum[:, :, mask]).flatten(1) for mask in masks]


def gram(rows: Tensor) -> Tensor:
    """Compute inner products of rows (B, D), less their mean: (B, B) in float64 on the CPU."""
    centred = rows - rows.mean(dim=0)  # changes no HSIC, and keeps float32 from cancelling
    return (centred @ centred.mT).cpu().double()


def hsic(one: Tensor, other: Tensor) -> float:
    """Estimate the Hilbert-Schmidt independence criterion of Gram matrices (B, B), B from 4, without bias.

    The usual estimate finds agreement between independent features wherever they are more than the images.

    Source: Song et al. 2012, eq. 5; by minibatch Nguyen, Raghu and Kornblith 2021, eq. 3.
    """
    n = len(one)
    k, l = (matrix - matrix.diag().diag() for matrix in (one, other))
    trace = (k * l).sum()
    outer = k.sum() * l.sum() / ((n - 1) * (n - 2))
    inner = k.sum(dim=0) @ l.sum(dim=0) * 2 / (n - 2)
    return float(trace + outer - inner) / (n * (n - 3))


class Agreement:
    """Linear CKA of two networks' features, batch by batch: 1 for equal ones, about 0 for independent ones."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # of both, of one alone, of the other alone

    def add(self, one: Tensor, other: Tensor) -> None:
        """Add features (B, D) and (B, E) of the same images; fewer than four say nothing and are passed over."""
        if len(one) >= 4 and one.shape[1] and other.shape[1]:
            k, l = gram(one), gram(other)
            self.sums += torch.tensor([hsic(k, l), hsic(k, k), hsic(l, l)], dtype=torch.float64)

    def value(self) -> float:
        """Compute the agreement; NaN where a network's features do not vary or have no such waves."""
        both, one, other = self.sums.tolist()
        return both / (one * other) ** 0.5 if min(one, other) > 0 else float("nan")


class Measured:
    """Sums over batches for one network, and its agreement with the teacher.

    Args:
        shapes: its output's shapes.
        edges: of the bands, in cycles per image.
    """

    def __init__(self, shapes: Output, edges: Sequence[float]):
        self.edges, self.bands = edges, band_names(edges)
        self.grids = [tuple(maps.shape[2:]) for maps in shapes.features]
        self.rings = [radial_basis(grid) for grid in self.grids]
        self.masks = [band_basis(grid, edges) for grid in self.grids]
        classes = shapes.logits.shape[1]
        self.haar = wavelet_basis(classes, "haar", 1, "periodization") if classes else ()
        self.power, self.energy = ([torch.zeros(len(m)) for m in matrices] for matrices in (self.rings, self.masks))
        self.logits = torch.zeros(2)
        self.agreement = {(stage, band): Agreement() for stage in range(5) for band in range(len(self.bands))}
        self.hits = self.images = 0

    def add(self, seen: Output, teacher: Output, labels: Tensor) -> None:
        """Add one batch of this network and of its teacher, whose bands are the same."""
        self.images += len(labels)
        if self.haar:
            self.hits += int((seen.logits.argmax(dim=1) == labels).sum())
        for stage, maps in enumerate(seen.features):
            for sums, basis in ((self.power, self.rings), (self.energy, self.masks)):
                power = spectral_power(maps, basis[stage].to(maps.device, torch.float32))
                sums[stage] += power.mean(dim=1).sum(dim=0).cpu()
            both = zip(band_passed(maps, self.edges), band_passed(teacher.features[stage], self.edges), strict=True)
            for band, (ours, theirs) in enumerate(both):
                self.agreement[stage, band].add(ours, theirs)
        answers = self.split(teacher.logits) if teacher.logits.shape[1] else []
        for part, ours in enumerate(self.split(seen.logits)):
            self.logits[part] += ours.square().sum().cpu()
            if answers:
                self.agreement[4, part].add(ours, answers[part])

    def split(self, logits: Tensor) -> list[Tensor]:
        """Part logits (B, K), less each row's mean, which no softmax sees, into content (B, M) and detail (B, N)."""
        centred = logits.float() - logits.float().mean(dim=1, keepdim=True)
        return [centred @ basis.to(logits.device, torch.float32).mT for basis in self.haar]

    def rows(self) -> list[tuple[str, str, str, str, float]]:
        """List (stage, grid, measure, band, value) of all that was measured."""
        found: list[tuple[str, str, str, str, float]] = []
        for stage, grid in enumerate(self.grids):
            place = f"stage {stage + 1}", f"{grid[0]}x{grid[1]}"
            whole = float(self.energy[stage].sum()) or 1.0
            present = self.masks[stage].any(dim=1).tolist()
            found += [(*place, "power", f"{ring}", float(v) / whole) for ring, v in enumerate(self.power[stage])]
            for band, name in enumerate(self.bands):
                if present[band]:
                    found.append((*place, "energy", name, float(self.energy[stage][band]) / whole))
                    found.append((*place, "cka", name, self.agreement[stage, band].value()))
        if not self.haar:
            return found
        place = "logits", f"{self.haar[0].shape[1]}"
        for part, name in enumerate(("content", "detail")):
            found.append((*place, "energy", name, float(self.logits[part] / self.logits.sum())))
            found.append((*place, "cka", name, self.agreement[4, part].value()))
        return [*found, (*place, "top1", "", 100 * self.hits / self.images)]


def compare(
    networks: Mapping[str, nn.Module], dataset: Dataset, batches: int = 0, precision: str = "float32", crop: float = 1.0
) -> pd.DataFrame:
    """Measure spectra of networks over test images, and the agreement of each with the first, the teacher.

    Args:
        networks: by their names in the result; each gives four feature maps.
        dataset: whose test images are shown.
        batches: at most this many batches of 128 images; 0: all.
        precision: of the networks; the rest is float32.
        crop: share of the resized side that the test crop keeps.

    Returns:
        A table with a row for each value, and in ``attrs`` how many ``images`` were seen of how many ``tests``:

        - ``power`` by ring (cycles, rounded): mean power of a frequency, as a share of the map's energy;
        - ``energy`` by band: share of the map's energy, or of the centred logits' energy;
        - ``cka`` by band: linear CKA with the teacher, missing where there is nothing to compare;
        - ``top1`` on these images, in percent, against the teacher's answers where they have no labels; missing, as the
          logits' rows are, for networks without a classifier.

    Raises:
        UserError: a network does not show four stages.
    """
    for network in networks.values():
        models.channels_last(network.to(dataset.device)).eval()
    measured: dict[str, Measured] = {}
    with torch.inference_mode():
        for images, labels in islice(dataset.test_batches(BATCH, test_crop=crop), batches or None):
            with autocast(images.device.type, PRECISIONS[precision]):
                outputs = {name: network(images, Show(features=True)).float() for name, network in networks.items()}
            if not measured:
                measured = _begin(outputs)
            teacher = next(iter(outputs.values()))
            for name, seen in outputs.items():
                measured[name].add(seen, teacher, labels)
    table = pd.DataFrame([(name, *row) for name, one in measured.items() for row in one.rows()], columns=COLUMNS)
    seen_images = next(iter(measured.values())).images
    table.attrs = {"data": dataset.spec.name, "images": seen_images, "tests": dataset.test_size}
    return table


def _begin(outputs: Mapping[str, Output]) -> dict[str, Measured]:
    for name, seen in outputs.items():
        if len(seen.features) != 4:
            raise UserError(f"{name} shows {len(seen.features)} feature maps; expected a network of four stages")
    edges = octaves(maps.shape[2:] for seen in outputs.values() for maps in seen.features)
    return {name: Measured(seen, edges) for name, seen in outputs.items()}


def of_networks(teacher: str, student: str, data: str = "digits", batches: int = 0, here: Here = HERE) -> pd.DataFrame:
    """Compare two networks as they are before any training, by their names, see ``compare``.

    Raises:
        UserError: an unknown name.
    """
    run = resolve_auto(
        resolve(
            {
                "distiller": {"name": "none"},
                "teacher": {"name": teacher, "classifier": False},  # nothing tells classes where data have no labels
                "student": {"name": student},
                "data": {"name": data, **({} if here.root is None else {"root": here.root})},
                "engine": {"device": here.device, "precision": here.precision or "auto"},
            }
        )
    )
    networks: dict[str, nn.Module] = {}
    device = use(run.place)
    with restored(device), Progress() as progress:
        dataset = open_data(run, device, progress)
        for role, name in (("teacher", teacher), ("student", student)):
            seed_torch(seed_of(run.settings.seed, role))
            networks[f"{role} {name}, untrained"] = models.create(name, dataset.spec)
        with progress.doing("comparing the networks"):
            return compare(networks, dataset, batches, run.settings.engine.precision)


def of_runs(paths: Sequence[Path], batches: int = 0, here: Here = HERE) -> pd.DataFrame:
    """Compare the teacher and the students of the finished runs in or below ``paths``, see ``compare``.

    Raises:
        UserError: there is no finished run, none has a teacher, or they differ in teacher or data.
    """
    folders = find_runs([path.resolve() for path in paths])
    if not folders:
        raise UserError(f"no finished run in {', '.join(map(str, paths))}")
    runs = [(folder, here.place(folder)) for folder in folders]
    runs = sorted(runs, key=lambda run: _distilled(run[1].settings))
    taught = next(((folder, run) for folder, run in runs if run.settings.teacher.name), None)
    if taught is None:
        raise UserError("none of these runs has a teacher; add one that was distilled, or pass --teacher and --student")
    home, first = taught
    shared = first.settings
    for folder, run in runs:
        settings = run.settings
        if _images(settings) != _images(shared):
            raise UserError(f"{folder.path.name} has other data than {shared.data.name} here; give runs that share it")
        if settings.teacher.name and _teacher(settings) != _teacher(shared):
            raise UserError(f"{folder.path.name} has another teacher than the rest; give runs that share one")
    device = use(first.place)
    with restored(device), Progress() as progress:
        with home.home():
            dataset = open_data(first, device, progress)
            teacher = teachers.obtain(first, dataset, progress, made=stored(home.read_config()).settings)
        networks: dict[str, nn.Module] = {f"teacher {shared.teacher.title}": teacher.network}
        for name, (folder, run) in zip(_names(runs), runs, strict=True):
            with folder.home():
                compare_data(run, folder, dataset, progress)
                networks[name] = shipped_of(run, dataset, folder, progress)
        with progress.doing("comparing the networks"):
            table = compare(networks, dataset, batches, shared.engine.precision, shared.protocol.test_crop)
    if not dataset.is_judged:
        table.attrs["top1"] = "as the teacher"
    if options := shared.data.options:
        table.attrs["data"] += f" ({', '.join(f'{key}={value}' for key, value in options.items())})"
    return table


def _distilled(settings: Settings) -> bool:
    return settings.distiller.name != "none"


def _images(settings: Settings) -> tuple[Any, ...]:
    """What decides the test images."""
    return replace(settings.data, limit=None), settings.protocol.image_size, settings.protocol.test_crop


def _teacher(settings: Settings) -> tuple[Any, ...]:
    """What decides the teacher's weights."""
    wanted = settings.teacher
    return replace(wanted, protocol=wanted.protocol or settings.protocol.name), settings.data.limit


def _names(runs: Sequence[tuple[RunFolder, Run]]) -> list[str]:
    """Name students by their method, and by seed or folder where that does not tell them apart."""
    made = [run.settings for _, run in runs]
    short = [f"{s.student.name} " + (f"by {s.distiller.name}" if _distilled(s) else "alone") for s in made]
    seeds = [f"{name}, seed {s.seed}" for name, s in zip(short, made, strict=True)]
    return next((names for names in (short, seeds) if len(set(names)) == len(runs)), [f.path.name for f, _ in runs])
