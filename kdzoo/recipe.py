"""Training recipes: the settings of a protocol."""

from dataclasses import dataclass, field
from typing import Literal

from kdzoo.keywords import (
    at_least,
    between,
    by_name,
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

    crop: int = setting(0, "Random crop after zero padding of so many pixels", between, 0, 1024)
    flip: bool = setting(False, "Mirror half of the images, left to right")
    resized_crop: tuple[float, float] | None = setting(
        None, "Random crop, resized: smallest and largest share of the image's area", rising, between, 1e-3, 1
    )
    jitter: float = setting(0.0, "Strength of random changes of brightness, contrast and saturation", between, 0, 10)
    rand_augment: str | None = setting(
        None,
        "RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1",
        matching,
        RAND_AUGMENT,
        "timm's notation, such as rand-m9-mstd0.5-inc1",
    )
    erasing: float = setting(0.0, "Probability that a random rectangle of an image is erased", share)
    mixup: float = setting(0.0, "Alpha of mixup's beta distribution (0: no mixup)", between, 0, 100)
    cutmix: float = setting(0.0, "Alpha of CutMix's beta distribution (0: no CutMix)", between, 0, 100)


@dataclass(frozen=True)
class Protocol:
    """A training recipe. Epochs count passes over the training set; learning rates are per optimiser step."""

    name: str = setting("quick", "Training recipe: a name of 'kdzoo list protocols', or a YAML file")
    epochs: int = setting(10, "Number of passes over the training images", between, 1, 10**6)
    batch_size: int = setting(64, "Images of a step, those of all devices together", between, 2, 2**24)
    image_size: int | None = setting(
        None, "Side in pixels that images are brought to (null: as the data set has them)", between, 1, 4096
    )
    test_crop: float = setting(
        1.0,
        "Share of the resized side that the crop of a test image keeps (0.875: resize to 256, crop 224)",
        between,
        0.05,
        1,
    )
    optimizer: Literal["sgd", "adamw", "muon"] = setting(
        "sgd", "Optimiser: sgd, adamw, or muon (Muon for the weight matrices of blocks, AdamW for the rest)"
    )
    muon_every: int = setting(
        1, "Muon moves each matrix in one of so many steps, by turns: cheaper where batches are small", between, 1, 1000
    )
    lr: float = setting(0.05, "Learning rate of a step; given beside a recipe it holds for every network", positive)
    lr_of: dict[str, float] = setting(
        dict, "Learning rates of some students by their names, instead of lr", by_name, positive
    )
    momentum: float = setting(0.9, "Momentum of sgd and Muon", fraction)
    weight_decay: float = setting(5e-4, "Weight decay", not_negative)
    decay_norms: bool = setting(True, "Apply weight decay to normalisation layers and biases too")
    schedule: Literal["constant", "step", "cosine"] = setting("step", "Schedule of the learning rate")
    milestones: tuple[int, ...] = setting(
        (), "Epochs after which the step schedule multiplies the learning rate by gamma", rising, at_least, 1
    )
    gamma: float = setting(0.1, "Factor of the step schedule", positive)
    warmup: float = setting(0.0, "Epochs in which the learning rate rises from 0", between, 0, 10**6)
    min_lr: float = setting(
        0.0, "Learning rate at which the cosine schedule ends; a lower one stays as it is", not_negative
    )
    clip: float = setting(
        0.0, "Largest norm of the gradient, to which larger ones are scaled (0: no limit)", not_negative
    )
    label_smoothing: float = setting(0.0, "Share of the label's probability that is spread over all classes", fraction)
    ema: float = setting(0.0, "Decay of a moving average of the student's weights, which is kept (0: none)", fraction)
    teacher_view: Literal["same", "plain", "weak", "strong"] = setting(
        "same",
        "Picture that the teacher sees: same: the student's; plain: the student's crop, mirrored alike, without "
        "changes of colour or erased patches; weak: another draw of crop and mirror; strong: a third, with "
        "RandAugment. Mixup and cutmix mix it as the student's",
    )
    augmentation: Augmentation = field(default_factory=Augmentation)
