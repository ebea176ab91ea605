"""``kdzoo spectrum``: waves of known frequency land where they belong, and agreement is what CKA promises."""

import errno
import itertools
import math

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from torch import nn

import kdzoo
from kdzoo import DataSpec, Output
from kdzoo.cli import cli
from kdzoo.errors import StorageError, UserError
from kdzoo.experiments import spectrum
from kdzoo.results import spectrum_plot
from kdzoo.spectral import band_basis, fourier_filter, low_pass

SIDE = 16


class Shown:
    """A data set of the images that a test makes."""

    device = torch.device("cpu")
    is_judged = True

    def __init__(self, images):
        self.images, self.labels = images, torch.arange(len(images)) % 10
        self.spec = DataSpec("made", 10, tuple("0123456789"), SIDE, self.labels)
        self.test_size = len(images)

    def test_batches(self, batch_size, test_crop=1.0):
        return zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)


class Sampler(nn.Module):
    """A network whose stages are its images on grids of 16, 16, 8 and 4, through a filter where one is given."""

    def __init__(self, change=lambda images: images):
        super().__init__()
        self.change = change
        self.weight = torch.randn(3 * SIDE * SIDE, 10, generator=torch.Generator().manual_seed(1))

    def forward(self, images, show):
        images = self.change(images)
        logits = images.flatten(1) @ self.weight
        return Output(logits, logits, tuple(images[:, :, ::step, ::step] for step in (1, 1, 2, 4)))


def noise(count, *, seed=0):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def waves(cycles, count=8):
    """Horizontal waves of this many cycles per image, each with a phase of its own."""
    phases = torch.linspace(0, 3, count)[:, None, None, None]
    position = torch.arange(SIDE) / SIDE * 2 * math.pi * cycles
    return torch.cos(position + phases).expand(count, 3, SIDE, SIDE)


def values(table, measure, stage, network="student"):
    """By band."""
    found = table[(table.measure == measure) & (table.stage == stage) & (table.network == network)]
    return dict(zip(found.band, found.value, strict=True))


def look(images, student=None, batches=0):
    return spectrum.compare({"teacher": Sampler(), "student": student or Sampler()}, Shown(images), batches)


# Where energy is


@pytest.mark.parametrize(("cycles", "band"), [(0, "0"), (1, "0-1"), (2, "1-2"), (3, "2-4"), (4, "2-4"), (7, "4-8")])
def test_a_wave_is_found_at_its_frequency_and_nowhere_else(cycles, band):
    table = look(waves(cycles))
    power, energy = values(table, "power", "stage 1"), values(table, "energy", "stage 1")
    assert max(power, key=power.get) == str(cycles)
    assert sum(value for ring, value in power.items() if ring != str(cycles)) < 1e-6
    assert energy[band] == pytest.approx(1)
    assert sum(energy.values()) == pytest.approx(1)


def test_frequencies_are_the_images_own_on_every_grid():
    table = look(waves(3))
    for stage in ("stage 1", "stage 2", "stage 3"):
        assert values(table, "energy", stage)["2-4"] == pytest.approx(1)
    # A grid of 4 cannot hold it: sampled there, 3 cycles look like 1.
    assert values(table, "energy", "stage 4")["0-1"] == pytest.approx(1)


def test_white_noise_has_the_same_power_at_every_frequency():
    power = values(look(noise(256)), "power", "stage 1")
    assert all(value == pytest.approx(1 / SIDE**2, rel=0.2) for value in power.values())


def test_bands_end_where_the_finest_grid_does():
    assert spectrum.octaves([(16, 16), (4, 4)]) == (0, 1, 2, 4, 8)
    assert spectrum.octaves([(2, 2)]) == (0, 1)
    assert spectrum.octaves([(1, 1)]) == (0,)
    assert spectrum.band_names((0, 1, 2)) == ["0", "0-1", "1-2", ">2"]
    assert set(values(look(noise(8)), "energy", "stage 4")) == {"0", "0-1", "1-2", "2-4"}


def test_haar_tells_differences_of_neighbouring_classes_from_their_means():
    class Fixed(Sampler):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.tensor(logits)

        def forward(self, images, show):
            sizes = torch.arange(1.0, len(images) + 1)[:, None]
            return super().forward(images, show)._replace(logits=5 + sizes * self.logits)

    for logits, band in (
        ([1.0, -1.0] * 5, "detail"),
        ([2.0, 2.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0, -1.0, -1.0], "content"),
    ):
        energy = values(look(noise(8), Fixed(logits)), "energy", "logits")
        assert energy[band] == pytest.approx(1)
        assert sum(energy.values()) == pytest.approx(1)


# Agreement


def direct_hsic(k, l):
    """The mean over all choices of four different images, by which HSIC without bias is defined."""
    n = len(k)
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(n), 4)]
    return float(sum(terms) / len(terms))


def test_hsic_is_the_mean_over_different_images():
    rows, others = noise(7, seed=1).double().flatten(1), noise(7, seed=2).double().flatten(1)[:, :5]
    k, l = rows @ rows.mT, (rows[:, :5] + others) @ (rows[:, :5] + others).mT
    assert spectrum.hsic(k, l) == pytest.approx(direct_hsic(k, l))


def test_networks_that_show_the_same_agree_fully_in_every_band():
    table = look(noise(40))
    for stage in (*spectrum_plot.STAGES, "logits"):
        found = values(table, "cka", stage)
        assert list(found.values()) == pytest.approx([1.0] * len(found))


def test_scale_and_a_rotation_of_channels_change_nothing():
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))
    turned = Sampler(lambda images: 7 * torch.einsum("bchw,cd->bdhw", images, rotation) + 3)
    assert list(values(look(noise(40), turned), "cka", "stage 1").values()) == pytest.approx([1.0] * 6, abs=1e-4)


def test_independent_features_do_not_agree_though_they_are_more_than_the_images():
    one, other = noise(512, seed=1).flatten(1), noise(512, seed=2).flatten(1)
    agreement = spectrum.Agreement()
    for rows, others in zip(one.split(64), other.split(64), strict=True):
        agreement.add(rows, others)
    assert abs(agreement.value()) < 0.05
    k, l = (spectrum.gram(rows[:64]) for rows in (one, other))
    assert (k * l).sum() / (k.norm() * l.norm()) > 0.8  # the usual estimate, which cannot tell


def test_a_student_that_shares_the_low_waves_alone_agrees_in_the_low_bands_alone():
    mask = low_pass(SIDE, SIDE, 2.0)

    def mixed(images):
        other = noise(len(images), seed=9)
        return fourier_filter(images, mask) + fourier_filter(other, ~mask)

    found = values(look(noise(64), Sampler(mixed)), "cka", "stage 1")
    assert min(found[band] for band in ("0", "0-1", "1-2")) > 0.999
    assert max(abs(found[band]) for band in ("2-4", "4-8", ">8")) < 0.1


def test_inner_products_in_a_band_are_those_of_band_passed_maps():
    maps, edges = noise(5), (0.0, 1.0, 4.0)
    for band, rows in enumerate(spectrum.band_passed(maps, edges)):
        mask = band_basis((SIDE, SIDE), edges)[band].bool().view(SIDE, SIDE)
        passed = fourier_filter(maps, mask).flatten(1)
        torch.testing.assert_close(rows @ rows.mT, passed @ passed.mT, rtol=1e-4, atol=1e-3)


def test_where_there_is_nothing_to_compare_there_is_no_number():
    constant = Sampler(lambda images: torch.zeros_like(images))
    assert all(math.isnan(value) for value in values(look(noise(8), constant), "cka", "stage 1").values())
    few = values(look(noise(3)), "cka", "stage 1")
    assert all(math.isnan(value) for value in few.values())


def test_batches_are_averaged_and_a_cap_is_stated():
    whole, capped = look(noise(300)), look(noise(300), batches=1)
    assert spectrum_plot.title(whole).endswith("made, all 300 test images")
    assert spectrum_plot.title(capped).endswith("made, the first 128 of 300 test images")
    one, other = (values(table, "energy", "stage 1") for table in (whole, capped))
    assert one == pytest.approx(other, rel=0.1, abs=0.01)
    assert one != other


# The picture


def test_the_picture_names_its_axes_and_units():
    figure = spectrum_plot.draw(look(noise(40)))
    labels = {label for ax in figure.axes for label in (ax.get_xlabel(), ax.get_ylabel())}
    assert {"cycles per image", "band (cycles per image)", "Haar band", "share of energy"} <= labels
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[0].startswith("stage 1\n16")


@pytest.mark.slow(reason="draws pictures again and again")
def test_a_table_and_a_picture_are_written_completely_or_not_at_all(tmp_path, monkeypatch):
    def full(self, path, **options):
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    spectrum_plot.save(look(noise(8)), tmp_path / "new" / "seen.v1")
    before = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert sorted(before) == ["seen.v1.csv", "seen.v1.png"]
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(StorageError, match="is full"):
        spectrum_plot.save(look(noise(8)), tmp_path / "new" / "seen.v1")
    assert {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()} == before


@pytest.mark.parametrize("what", ["data", "network"])
@pytest.mark.slow(reason="draws pictures")
def test_a_picture_finds_no_formula_in_a_name(tmp_path, what):
    table = look(noise(8))
    if what == "data":
        table.attrs["data"] = "a$b_$"
    else:
        table["network"] = table["network"].replace("student", "a$b_$")
    assert all(file.is_file() for file in spectrum_plot.save(table, tmp_path / "seen"))


def test_more_networks_than_colours_are_refused():
    table = look(noise(8))
    many = pd.concat([table.assign(network=f"student {i}") for i in range(8)])
    many.attrs = table.attrs
    with pytest.raises(UserError, match="7 students do not fit one picture; give at most 6"):
        spectrum_plot.draw(many)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'kdzoo\[plots\]'"):
        spectrum_plot.require_matplotlib()


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    few = [
        "protocol.epochs=1",
        "data.limit=256",
        "teacher.epochs=2",
        "teacher.allow_weak=true",
        "engine.precision=float32",
    ]
    for method, seed in (("kd", 0), ("kd", 1), ("none", 0)):
        teacher = None if method == "none" else "resnet14"
        kdzoo.run(method, "resnet8", teacher, seed=seed, out=folder, overrides=few, quiet=True)
    return folder


def command(*arguments):
    result = CliRunner().invoke(cli, ["spectrum", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.slow(reason="trains several runs")
def test_finished_runs_become_a_table_and_a_picture(runs, tmp_path):
    result = command(runs, "--out", tmp_path / "new" / "seen")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "new" / "seen.csv", dtype={"band": str})
    assert list(table.network.unique()) == [
        "teacher resnet14",
        "resnet8 alone, seed 0",
        "resnet8 by kd, seed 0",
        "resnet8 by kd, seed 1",
    ]
    measured = table[table.measure == "top1"].set_index("network").value
    for folder in runs.iterdir():
        found = kdzoo.store.folder.RunFolder(folder)
        name = "resnet8 " + ("alone" if "none" in folder.name else "by kd") + f", seed {found.run().settings.seed}"
        assert measured[name] == pytest.approx(found.read_result().top1, abs=1e-3)
    assert (tmp_path / "new" / "seen.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow(reason="trains several runs")
def test_untrained_networks_need_no_run(tmp_path):
    out = tmp_path / "seen"
    assert command("--teacher", "resnet14", "--student", "resnet8", "--batches", 1, "--out", out).exit_code == 0
    table = pd.read_csv(f"{out}.csv")
    assert list(table.network.unique()) == ["teacher resnet14, untrained", "student resnet8, untrained"]
    again = spectrum.of_networks("resnet14", "resnet8", batches=1)
    assert again.value.tolist() == pytest.approx(table.value.tolist(), rel=1e-3, abs=1e-3, nan_ok=True)


def test_what_cannot_be_compared_is_one_line(runs, tmp_path):
    alone, taught = (next(runs.glob(f"*-{method}-s0-*")) for method in ("none", "kd"))
    empty = tmp_path / "empty"
    empty.mkdir()
    other = kdzoo.run(
        "none",
        "resnet8",
        out=tmp_path,
        overrides=["protocol.epochs=1", "data.limit=64", "protocol.image_size=12"],
        quiet=True,
    )
    for arguments, said in (
        ([], "expected finished runs, or both --teacher and --student"),
        ([taught, "--teacher", "resnet14"], "expected finished runs"),
        (["--teacher", "resnet14"], "expected finished runs"),
        ([alone], "none of these runs has a teacher"),
        ([tmp_path / "nowhere"], "no folder"),
        ([empty], "no finished run in"),
        ([taught, other.folder], "has other data than digits"),
    ):
        with pytest.raises(UserError) as caught:
            command(*arguments, "--out", tmp_path / "seen")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
