"""A trained student to use elsewhere: whole pictures go in, logits come out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import functional as vision

from kdzoo.errors import UserError
from kdzoo.tensors import warn_of_bytes


class Student(nn.Module):
    """Classify pictures as the run that trained this student measured it.

    A picture of another size than ``image_size`` is resized, its short side to ``image_size / test_crop``, and its
    centre is cut out, as with the test images of the run. One of ``image_size`` is read as it is. Normalisation, and a
    resize to what the network itself reads, happen inside.

    Attributes:
        network: images (B, 3, S, S) in [0, 1] -> an ``Output``, without any of that cutting.
        classes: (K,) the name of the class that each logit stands for; none where it has no classifier.
        image_size: S, side in pixels of the images that the run gave it.
        test_crop: share of the resized side that the crop keeps.
    """

    def __init__(self, network: nn.Module, *, classes: Sequence[str], image_size: int, test_crop: float = 1.0):
        super().__init__()
        self.network, self.classes = network, tuple(classes)
        self.image_size, self.test_crop = image_size, test_crop
        self.is_called = False
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, K), or the embedding (B, D) where the network has no classifier.

        Args:
            images: (B, 3, H, W), uint8 or float in [0, 1].

        Raises:
            UserError: they have another shape or type.
        """
        if not isinstance(images, Tensor):
            kind = type(images).__name__
            raise UserError(f"images are of type {kind}; expected a torch.Tensor, such as torch.as_tensor(images)")
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"images have the shape {tuple(images.shape)}; expected (B, 3, H, W)")
        if images.dtype == torch.uint8:
            images = images.to(torch.get_default_dtype()) / 255
        elif not images.is_floating_point():
            raise UserError(f"images are {images.dtype}; expected torch.uint8, or floats from 0 to 1")
        if not (torch.compiler.is_compiling() or self.is_called or images.is_meta):
            self.is_called = True
            warn_of_bytes(images, "or pass whole numbers as torch.uint8")
        output = self.network(self.cut(images))
        return output.logits if output.logits.shape[1] else output.embedding

    def cut(self, images: Tensor) -> Tensor:
        """Resize images (B, 3, H, W) and cut out their centre: (B, 3, S, S)."""
        side = self.image_size
        if images.shape[-2:] == (side, side):
            return images
        resized = vision.resize(images, [int(side / self.test_crop)], antialias=True)
        return vision.center_crop(resized, [side, side])
