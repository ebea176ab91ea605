"""Distil on a folder of pictures, into a network of your own that no library knows.

python examples/own_data.py
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

import kdzoo


def small(num_classes: int) -> nn.Module:
    """Make the student: kdzoo finds its four stages by itself, and names it ``own_data:small``."""
    stages = [
        nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, stride, 1), nn.BatchNorm2d(fan_out), nn.ReLU())
        for fan_in, fan_out, stride in ((3, 8, 1), (8, 12, 2), (12, 16, 2), (16, 24, 2))
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_classes))


def draw(root: Path, images: int) -> None:
    """Write pictures of stripes as FOLDER/SPLIT/CLASS/NUMBER.png, the layout that kdzoo reads."""
    random = np.random.default_rng(0)
    for split, count in (("train", images), ("test", images // 4)):
        for name, axis in (("lying", 0), ("standing", 1)):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                wave = np.sin(np.arange(32) * random.uniform(0.5, 1.5) + random.uniform(0, 6))
                stripes = np.broadcast_to(wave[:, None] if axis == 0 else wave, (32, 32))
                noisy = 127 + 60 * stripes[..., None] + random.normal(0, 40, (32, 32, 3))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")


def main(out: str = "runs/own-data", images: int = 64, epochs: int = 3) -> kdzoo.Result:
    """Draw the pictures, train a teacher on them once, distil the student, and return its result."""
    folder = Path(out) / "pictures"
    draw(folder, images)
    result = kdzoo.run(
        "kd",
        teacher="resnet8x4",
        student="own_data:small",
        data=f"folder:{folder}",
        out=Path(out) / "runs",
        overrides=[f"protocol.epochs={epochs}", f"teacher.epochs={epochs}", "teacher.allow_weak=true"],
    )
    print(f"student: {result.top1:.1f} % of the test pictures; weights in {result.folder / 'student.safetensors'}")
    return result


if __name__ == "__main__":
    main()
