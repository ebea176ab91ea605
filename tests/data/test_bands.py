"""``bands``: the same knobs give the same bits, and the evidence of a class lies where the knobs put it."""

from typing import Any

import numpy as np
import pytest

from kdzoo.data import open_dataset
from kdzoo.datasets.bands import CUT, Bands, shape, texture
from kdzoo.errors import UserError
from kdzoo.resolve import resolve

CHANCE = 1 / 8


def radius(size: int) -> np.ndarray:
    """In cycles per image, of each coefficient of fft2."""
    return np.hypot(*np.meshgrid(*[np.fft.fftfreq(size, 1 / size)] * 2))


def coarse(images: np.ndarray) -> np.ndarray:
    """Low-passed pixels (N, D): where shapes are."""
    spectra = np.fft.fft2(images[..., 0] / 255 - 0.5)
    return np.fft.ifft2(spectra * (radius(images.shape[1]) <= CUT)).real.reshape(len(images), -1)


def fine(images: np.ndarray) -> np.ndarray:
    """Amplitudes of the high band (N, D): where textures are."""
    return np.abs(np.fft.fft2(images[..., 0] / 255 - 0.5))[:, radius(images.shape[1]) > CUT]


def coarse_amplitudes(images: np.ndarray) -> np.ndarray:
    """Amplitudes of the low band (N, D): shapes without their place."""
    return np.abs(np.fft.fft2(images[..., 0] / 255 - 0.5))[:, radius(images.shape[1]) <= CUT]


def nearest_centroid(train: Any, test: Any, view: Any) -> float:
    """The share of test images whose nearest mean of a class's training images is that of their own class."""
    (images, labels), (others, expected) = train, test
    seen, shown = view(images), view(others)
    centroids = np.stack([seen[labels == k].mean(0) for k in range(labels.max() + 1)])
    distances = ((shown[:, None] - centroids) ** 2).sum(2)
    return float((distances.argmin(1) == expected).mean())


@pytest.mark.parametrize(
    ("low", "high", "by_shape", "by_texture"),
    [
        (1.0, 0.0, (0.95, 1.0), (0.0, 0.2)),
        (0.0, 1.0, (0.0, 0.2), (0.95, 1.0)),
        (1.0, 1.0, (0.95, 1.0), (0.95, 1.0)),
        (0.0, 0.0, (0.0, 0.2), (0.0, 0.2)),
        # Shown with probability 1/2, else any of 8: right 1/2 + 1/16 of the time, give or take four deviations.
        (0.5, 0.5, (0.46, 0.66), (0.46, 0.66)),
    ],
)
def test_the_evidence_lies_where_the_knobs_put_it(
    low: float, high: float, by_shape: tuple[float, float], by_texture: tuple[float, float]
) -> None:
    _, train, test = Bands(low=low, high=high).load()
    assert by_shape[0] <= nearest_centroid(train, test, coarse) <= by_shape[1]
    assert by_texture[0] <= nearest_centroid(train, test, fine) <= by_texture[1]


def test_amplitudes_tell_much_of_a_shape_and_its_phases_the_rest() -> None:
    _, train, test = Bands(high=0.0).load()
    assert 0.6 < nearest_centroid(train, test, coarse_amplitudes) < 0.9
    assert nearest_centroid(train, test, coarse) > 0.95


def test_noise_hides_what_is_in_its_own_band_alone() -> None:
    _, train, test = Bands(noise_low=20, noise_high=0).load()
    assert nearest_centroid(train, test, coarse) < 3 * CHANCE
    assert nearest_centroid(train, test, fine) > 0.95
    _, train, test = Bands(noise_low=0, noise_high=20).load()
    assert nearest_centroid(train, test, coarse) > 0.95
    assert nearest_centroid(train, test, fine) < 3 * CHANCE


def test_shapes_and_textures_share_no_frequency() -> None:
    for size in (24, 32, 64):
        halves = radius(size)[:, : size // 2 + 1]
        for number in range(20):
            assert np.abs(shape(number, size)[halves > CUT]).max() < 1e-9
            assert np.abs(texture(number, size)[halves <= CUT]).max() == 0
            for pattern in (shape(number, size), texture(number, size)):
                assert np.fft.irfft2(pattern, s=(size, size)).std() == pytest.approx(1)


def test_images_hold_as_much_energy_as_their_parts_have_in_each_band() -> None:
    _, (images, _), _ = Bands(noise_low=2, noise_high=1).load()
    power = np.abs(np.fft.fft2(images[..., 0] / 255 - 0.5, norm="forward")) ** 2
    low, high = (power[:, mask].sum(1).mean() for mask in (radius(32) <= CUT, radius(32) > CUT))
    assert low / high == pytest.approx((1 + 2**2) / (1 + 1**2), rel=0.05)  # pattern and noise, squared deviations
    assert np.isin(images, (0, 255)).mean() < 0.005


def test_a_mirrored_image_keeps_its_class() -> None:
    _, train, (images, labels) = Bands().load()
    mirrored = images[:, :, ::-1], labels
    assert nearest_centroid(train, mirrored, coarse) > 0.95
    assert nearest_centroid(train, mirrored, fine) > 0.95


def test_the_same_knobs_give_the_same_bits_and_others_do_not() -> None:
    one, same, other = Bands(train=20).load(), Bands(train=20).load(), Bands(train=20, noise_low=1.1).load()
    assert one[0] == same[0]
    for ours, theirs in zip(one[1:], same[1:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not np.array_equal(one[1][0], other[1][0])


def test_training_and_test_images_are_disjoint() -> None:
    _, (train, _), (test, _) = Bands(noise_low=0, noise_high=0).load()
    everything = [image.tobytes() for image in (*train, *test)]
    assert len(set(everything)) == len(everything)


def test_sizes_and_counts_are_those_asked_for() -> None:
    options = {"classes": 6, "shapes": 2, "textures": 3, "size": 24, "train": 5, "test": 2}
    data = open_dataset("bands", options=options)
    assert data.fits
    assert (data.spec.image_size, data.spec.num_classes) == (24, 6)
    assert data.spec.labels.bincount().tolist() == [5] * 6
    images, labels = next(data.test_batches(100))
    assert images.shape == (12, 3, 24, 24)
    assert labels.bincount().tolist() == [2] * 6
    assert len(open_dataset("bands", options=options, limit=12).spec.labels) == 12


def test_every_class_is_a_pair_of_its_own_and_patterns_are_used_alike() -> None:
    for classes, shapes, textures in ((8, 8, 8), (6, 2, 3), (8, 2, 8), (8, 8, 2), (7, 3, 3), (8, 1, 8)):
        names, _, _ = Bands(classes=classes, shapes=shapes, textures=textures, train=1, test=1).load()
        assert len(set(names)) == classes
        assert len({name.split(",")[0] for name in names}) == min(shapes, classes)
        assert len({name.split(",")[1] for name in names}) == min(textures, classes)


def test_a_shape_that_two_classes_share_leaves_the_texture_to_tell_them_apart() -> None:
    _, train, test = Bands(classes=8, shapes=4).load()
    assert 0.35 < nearest_centroid(train, test, coarse) < 0.65
    assert nearest_centroid(train, test, fine) > 0.95


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lo": 1.0}, "unknown setting 'data.options.lo'; did you mean data.options.low"),
        ({"low": 1.5}, "data.options.low is 1.5; expected a number from 0 to 1"),
        ({"low": "much"}, "data.options.low: 'much' is no number"),
        ({"noise_high": float("nan")}, "data.options.noise_high=nan: expected a finite number"),
        ({"size": 16}, "data.options.size is 16; expected a number from 24"),
        ({"size": 32.5}, "data.options.size: '32.5' is no whole number"),
        ({"classes": True}, "data.options.classes: 'True' is no whole number"),
        ({"shapes": 2, "textures": 3}, "make 6 pairs, too few for 8 classes"),
    ],
)
def test_a_wrong_knob_is_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        open_dataset("bands", options=options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["digits", "cifar100"])
def test_sets_without_options_refuse_them(name: str) -> None:
    with pytest.raises(UserError, match=rf"data '{name}' has no options, and data.options.low was given; leave it out"):
        open_dataset(name, options={"low": 1.0})


def test_options_come_from_the_command_line_and_make_another_run() -> None:
    base = {"distiller": {"name": "none"}, "student": {"name": "resnet8"}, "data": {"name": "bands"}}
    plain, low = resolve(base).settings, resolve(base, ["data.options.low=0.5", "data.options.size=48"]).settings
    assert (low.data.options["low"], low.data.options["size"], low.data.options["high"]) == (0.5, 48, 1.0)
    assert plain.identity() != low.identity()
    with pytest.raises(UserError, match=r"data.options"):
        resolve(base, ["data.options=3"])


def test_a_number_is_the_same_option_however_it_is_written() -> None:
    base = {"distiller": {"name": "none"}, "student": {"name": "resnet8"}, "data": {"name": "bands"}}
    runs = [resolve(base, more) for more in ([], ["data.options.low=1"], ["data.options.low=1.0"])]
    assert len({run.settings.identity() for run in runs}) == 1
