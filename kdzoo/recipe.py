"""Training recipes: the settings of a protocol."""

from dataclasses import dataclass, field
from typing import Literal

from kdzoo.keywords import (
    at_least,
    between,
    by_name,
    checked_by,
    fraction,
    matching,
    not_negative,
    positive,
    rising,
    setting,
    share,
)

RAND_AUGMENT = r"rand(-(n[1-9]\d?|(m|p|mstd|mmax|inc|t)\d{1,3}(\.\d{1,9})?))*"


@dataclass(frozen=True)
class Augmentation:
    """The augmentations of training images; all are off by default."""

    crop: int = setting(0, between, 0, 1024)  # random crop after zero padding of this many pixels
    flip: bool = False  # horizontal, half of the images
    # Random resized crop: range of the area's share.
    resized_crop: tuple[float, float] | None = setting(None, rising, between, 1e-3, 1)
    jitter: float = setting(0.0, between, 0, 10)  # colour jitter of brightness, contrast, saturation
    rand_augment: str | None = setting(None, matching, RAND_AUGMENT, "timm's notation, such as rand-m9-mstd0.5-inc1")
    erasing: float = setting(0.0, share)  # probability of random erasing
    mixup: float = setting(0.0, between, 0, 100)  # alpha of mixup's beta distribution
    cutmix: float = setting(0.0, between, 0, 100)  # alpha of cutmix's beta distribution


@dataclass(frozen=True)
class Protocol:
    """A training recipe. Epochs count passes over the training set; learning rates are per optimiser step."""

    name: str = "quick"
    epochs: int = setting(10, between, 1, 10**6)
    batch_size: int = setting(64, between, 2, 2**24)  # images of a step, those of all devices together
    # The side that images are shown at; None: as the data set has them.
    image_size: int | None = setting(None, between, 1, 4096)
    # Share of the resized side that the test crop keeps (0.875: resize 256, crop 224).
    test_crop: float = setting(1.0, between, 0.05, 1)
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"  # muon: blocks' matrices by Muon, the rest by AdamW
    # Muon moves each matrix once in so many steps, by turns: cheaper where batches are small.
    muon_every: int = setting(1, between, 1, 1000)
    lr: float = setting(0.05, positive)
    # lr by network name, where the recipe has one.
    lr_of: dict[str, float] = field(default_factory=dict, metadata=checked_by(by_name, positive))
    momentum: float = setting(0.9, fraction)
    weight_decay: float = setting(5e-4, not_negative)
    decay_norms: bool = True  # whether norms and biases are decayed too
    schedule: Literal["constant", "step", "cosine"] = "step"
    # Epochs after which a step schedule multiplies lr by gamma.
    milestones: tuple[int, ...] = setting((), rising, at_least, 1)
    gamma: float = setting(0.1, positive)
    warmup: float = setting(0.0, between, 0, 10**6)  # epochs of linear warm-up
    min_lr: float = setting(0.0, not_negative)  # where the cosine ends
    clip: float = setting(0.0, not_negative)  # largest norm of a gradient; 0: unclipped
    label_smoothing: float = setting(0.0, fraction)
    ema: float = setting(0.0, fraction)  # decay of the weights' moving average; 0: none
    augmentation: Augmentation = field(default_factory=Augmentation)
