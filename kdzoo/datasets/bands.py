"""Images whose class evidence lies in low frequencies, in high ones, or in both, in known shares.

An image is the sum of a coarse shape, a fine texture, and noise in the band of either. A shape is a fixed pattern of
waves of up to ``CUT`` cycles per image that moves a little from image to image: amplitudes of its spectrum tell it,
and phases more so. A texture is a fixed set of fine waves whose phases are drawn anew for every image: amplitudes
alone tell it. Nothing else differs between classes, so it is known what a method has to transfer.
"""

from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from kdzoo import ImageSet
from kdzoo.errors import UserError
from kdzoo.image_set import Loaded, Split
from kdzoo.randomness import seed_of

CUT = 4.0  # cycles per image: shapes and their noise lie at or below it, textures and theirs above
CONTRAST = 0.16  # deviation of the gray values around 0.5: three of them fit, so clipping moves hardly any energy
DRIFT = 1 / 16  # how far a shape may lie from its place, either way, as a share of the side
WAVES = 4  # of each texture, besides their mirror images
CHUNK = 1024  # images that are drawn at a time

Spectrum = NDArray[np.complex128]  # (size, size // 2 + 1), as rfft2 has it


class Bands(ImageSet):
    """Draw gray images whose classes are pairs of a shape and a texture: a function of these options alone.

    Class k is the pair of shape k * shapes // classes and texture k % textures. An image of it shows that shape with
    probability ``low``, else any, and that texture with probability ``high``, else any. Patterns contain their own
    mirror images, so that an image flipped left to right keeps its class.

    Args:
        low: how reliably the shape tells the class: 1 always, 0 never.
        high: how reliably the texture tells the class.
        noise_low: deviation of the noise up to ``CUT``, where the shape's is 1.
        noise_high: deviation of the noise above ``CUT``, where the texture's is 1. As it is spread over many more
            waves than a texture has, 3 hides textures from a small network about as well as 1 hides shapes below.
        classes: how many classes there are.
        shapes: how many shapes they share; 0: each has its own, so that a shape by itself can tell the class.
        textures: the same of textures.
        size: side in pixels, from 24.
        train: training images of each class.
        test: test images of each class.

    Raises:
        UserError: an option is out of its range, or there are fewer pairs than classes.
    """

    num_classes: int = 8
    image_size: int = 32

    def __init__(
        self,
        *,
        low: float = 1.0,
        high: float = 1.0,
        noise_low: float = 1.0,
        noise_high: float = 3.0,
        classes: int = num_classes,
        shapes: int = 0,
        textures: int = 0,
        size: int = image_size,
        train: int = 200,
        test: int = 50,
    ):
        shapes, textures = shapes or classes, textures or classes
        for name, value, floor, ceiling in (
            ("low", low, 0, 1),
            ("high", high, 0, 1),
            ("noise_low", noise_low, 0, 100),
            ("noise_high", noise_high, 0, 100),
            ("classes", classes, 2, 1000),
            ("shapes", shapes, 1, 1000),
            ("textures", textures, 1, 1000),
            ("size", size, 24, 1024),
            ("train", train, 1, 10**6),
            ("test", test, 1, 10**6),
        ):
            if not floor <= value <= ceiling:
                raise UserError(f"data.options.{name} is {value}; expected a number from {floor} to {ceiling}")
        if shapes * textures < classes:
            raise UserError(
                f"{shapes} shapes and {textures} textures make {shapes * textures} pairs, too few for {classes} "
                "classes; raise data.options.shapes or data.options.textures"
            )
        self.low, self.high, self.noise_low, self.noise_high = low, high, noise_low, noise_high
        self.shapes, self.textures, self.train, self.test = shapes, textures, train, test
        self.num_classes, self.image_size = classes, size

    def load(self, root: Path = Path()) -> Loaded:
        """Draw the images; nothing is read."""
        pairs = [(k * self.shapes // self.num_classes, k % self.textures) for k in range(self.num_classes)]
        names = tuple(f"shape {number}, texture {other}" for number, other in pairs)
        return names, self._split("train", self.train, pairs), self._split("test", self.test, pairs)

    def fingerprint(self, root: Path) -> str:
        """Return an empty text: the options say everything."""
        return ""

    def _split(self, name: str, count: int, pairs: list[tuple[int, int]]) -> Split:
        """Draw so many images of each class, (N, size, size, 1), and their labels (N,)."""
        size = self.image_size
        coarse = np.stack([shape(number, size) for number in range(self.shapes)])
        fine = np.stack([texture(number, size) for number in range(self.textures)])
        random = np.random.default_rng(seed_of("bands", name))
        labels = random.permutation(np.repeat(np.arange(len(pairs)), count))
        images = []
        for own in np.split(np.array(pairs)[labels], range(CHUNK, len(labels), CHUNK)):
            shown = (
                _shown(random, own[:, 0], self.shapes, self.low),
                _shown(random, own[:, 1], self.textures, self.high),
            )
            drawn = _drifted(random, coarse[shown[0]]) + _rephased(random, fine[shown[1]])
            drawn += _noise(random, len(own), size, self.noise_low, self.noise_high)
            # All four parts are independent, so their variances add.
            scale = CONTRAST / np.sqrt(2 + self.noise_low**2 + self.noise_high**2)
            gray = 0.5 + scale * np.fft.irfft2(drawn, s=(size, size))
            images.append((gray.clip(0, 1) * 255).round().astype(np.uint8))
        return np.concatenate(images)[..., None], labels


def shape(number: int, size: int) -> Spectrum:
    """Draw a coarse pattern of mean 0 and deviation 1; the same at every size."""
    count = int(CUT)
    random = np.random.default_rng(seed_of("bands", "shape", number))
    spectrum = np.zeros((size, size // 2 + 1), np.complex128)
    drawn = random.normal(size=(2 * count + 1, count + 1, 2)) @ np.array([1, 1j])
    spectrum[-count:, : count + 1], spectrum[: count + 1, : count + 1] = np.split(drawn, [count])
    radius = _radius(size)
    pattern = np.fft.irfft2(np.where((radius > 0) & (radius <= CUT), spectrum, 0), s=(size, size))
    pattern += pattern[:, ::-1]
    return np.fft.rfft2(pattern / pattern.std())


def texture(number: int, size: int) -> Spectrum:
    """Draw a fine pattern of mean 0 and deviation 1: waves of 2.7 to 4 pixels, all of the same strength."""
    radius = _radius(size)
    radius[[0, *range(size // 2, size)]] = 0  # upward waves only, and none along an axis, which mirrors itself
    radius[:, 0] = 0
    candidates = np.argwhere((radius >= size / 4) & (radius <= 3 * size / 8))
    random = np.random.default_rng(seed_of("bands", "texture", number))
    rows, columns = random.choice(candidates, WAVES, replace=False).T
    spectrum = np.zeros((size, size // 2 + 1), np.complex128)
    spectrum[rows, columns] = spectrum[-rows, columns] = 1
    return spectrum / np.fft.irfft2(spectrum, s=(size, size)).std()


def _shown(random: Generator, own: NDArray[np.int64], count: int, share: float) -> NDArray[np.int64]:
    """Draw which of ``count`` patterns each image shows: its class's ``own`` (N,) in this share, else any."""
    return np.where(random.random(len(own)) < share, own, random.integers(count, size=len(own)))


def _drifted(random: Generator, spectra: Spectrum) -> Spectrum:
    """Move each of the patterns (N, size, size // 2 + 1) along both axes, circularly."""
    size = spectra.shape[1]
    down, right = 2 * np.pi * DRIFT * random.uniform(-1, 1, (2, len(spectra), 1, 1))
    return spectra * np.exp(-1j * (down * np.fft.fftfreq(size, 1 / size)[:, None] + right * np.arange(size // 2 + 1)))


def _rephased(random: Generator, spectra: Spectrum) -> Spectrum:
    """Move every wave of the patterns (N, size, size // 2 + 1) by a draw for itself."""
    return spectra * np.exp(2j * np.pi * random.random(spectra.shape))


def _noise(random: Generator, count: int, size: int, low: float, high: float) -> Spectrum:
    """Draw noise (count, size, size // 2 + 1) of mean 0, white up to ``CUT`` and white above, of these deviations."""
    radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(size, 1 / size)] * 2))
    is_low = radius <= CUT
    shares = (is_low.sum() - 1) / size**2, (~is_low).sum() / size**2  # of white noise, without the mean
    weight = np.where(is_low, low / np.sqrt(shares[0]), high / np.sqrt(shares[1]))
    weight[0, 0] = 0
    return np.fft.rfft2(random.normal(size=(count, size, size))) * weight[:, : size // 2 + 1]


def _radius(size: int) -> NDArray[np.float64]:
    """Compute the radius in cycles per image of each coefficient of rfft2: (size, size // 2 + 1)."""
    return np.hypot(np.fft.fftfreq(size, 1 / size)[:, None], np.arange(size // 2 + 1))
