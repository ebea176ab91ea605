"""Training recipes: the settings of a protocol."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Augmentation:
    """The augmentations of training images; all are off by default."""

    crop: int = 0  # random crop after zero padding of this many pixels
    flip: bool = False  # horizontal, half of the images
    resized_crop: tuple[float, float] | None = None  # random resized crop: range of the area's share
    jitter: float = 0.0  # colour jitter of brightness, contrast, saturation
    rand_augment: str | None = None  # timm's notation, such as rand-m9-mstd0.5-inc1
    erasing: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of mixup's beta distribution
    cutmix: float = 0.0  # alpha of cutmix's beta distribution


@dataclass(frozen=True)
class Protocol:
    """A training recipe. Epochs count passes over the training set; learning rates are per optimiser step."""

    name: str = "quick"
    epochs: int = 10
    batch_size: int = 64  # images of a step, those of all devices together
    image_size: int | None = None  # the side images are shown at; None: as the data set has them
    test_crop: float = 1.0  # share of the resized side that the test crop keeps (0.875: resize 256, crop 224)
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"  # muon: blocks' matrices by Muon, the rest by AdamW
    muon_every: int = 1  # Muon moves each matrix once in so many steps, by turns: cheaper where batches are small
    lr: float = 0.05
    lr_of: dict[str, float] = field(default_factory=dict)  # lr by network name, where the recipe has one
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_norms: bool = True  # whether norms and biases are decayed too
    schedule: Literal["constant", "step", "cosine"] = "step"
    milestones: tuple[int, ...] = ()  # epochs after which a step schedule multiplies lr by gamma
    gamma: float = 0.1
    warmup: float = 0.0  # epochs of linear warm-up
    min_lr: float = 0.0  # where the cosine ends
    clip: float = 0.0  # largest norm of a gradient; 0: unclipped
    label_smoothing: float = 0.0
    ema: float = 0.0  # decay of the weights' moving average; 0: none
    augmentation: Augmentation = field(default_factory=Augmentation)
