"""Measures how fast files are classified beside the bare network, and how long each export takes.

    python benchmarks/export.py [--student resnet18] [--size 224] [--images 512] [--rounds 3]

A student is trained for a moment on pictures that are drawn here, JPEG files of 500 x 375 pixels; its accuracy means
nothing. ``bare`` is the network on batches of 64 that lie in memory; ``predict`` reads, decodes and classifies the
files, the start of its processes included, and the loading of the student not. They take turns. An export is timed as
a command, from the start of its process to its end, so torch's import counts.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from measuring import arguments_of, file_of, publish, take_turns, this_machine, waiting
from PIL import Image

import kdzoo
from kdzoo.engine.device import find_precision
from kdzoo.experiments.predictions import BATCH, predict
from kdzoo.precision import PRECISIONS, autocast

WIDTH, HEIGHT = 500, 375
EXPORTS = {
    "timm": ["--format", "timm"],
    "hub": ["--format", "hub"],
    "torch": ["--format", "torch"],
    "onnx": ["--format", "onnx"],
    "onnx int8": ["--format", "onnx", "--quantize", "int8"],
}


def draw(folder: Path, count: int, seed: int) -> None:
    """Pictures with shapes of many sizes and some noise, so that their files are about as large as photographs'."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        picture = random.normal(0, 6, (HEIGHT, WIDTH, 3))
        for side in (4, 16, 64):
            shapes = random.integers(256, size=(side, side, 3), dtype=np.uint8)
            large = Image.fromarray(shapes).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            picture += np.asarray(large, np.float64) / 3
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)


def bare(run: Path, device: torch.device, precision: str, count: int) -> Callable[[], None]:
    """What classifies as many images that lie in memory."""
    network = kdzoo.load(run).network.to(device).to(memory_format=torch.channels_last)
    size = kdzoo.load(run).image_size
    images = torch.rand(BATCH, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    def work() -> None:
        with torch.inference_mode(), autocast(device.type, PRECISIONS[precision]):
            for _ in range(count // BATCH):
                network(images)

    return work


def main() -> None:
    """Parses, measures, prints and writes the table."""
    parser = arguments_of(__doc__)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--size", type=int, default=224, help="side in pixels of the images that it reads")
    parser.add_argument("--images", type=int, default=512, help="files to classify, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exports", nargs="*", default=list(EXPORTS), choices=list(EXPORTS))
    given = parser.parse_args()
    machine = this_machine()
    precision = find_precision("auto", machine.device)
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        for place, count in (("train/a", 64), ("train/b", 64), ("test/a", 128), ("test/b", 128)):
            draw(folder / "pictures" / place, count, len(place))
        draw(folder / "files", given.images, 7)
        overrides = [f"protocol.image_size={given.size}", "protocol.epochs=1", f"engine.device={machine.device}"]
        data = f"folder:{folder / 'pictures'}"
        made = kdzoo.run("none", given.student, data=data, out=folder / "runs", overrides=overrides, quiet=True)

        ready = [predict(made.folder, [folder / "files"]) for _ in range(given.rounds)]

        def classify() -> None:
            assert sum(1 for _ in ready.pop()) == given.images

        works = {"bare": bare(made.folder, machine.device, precision, given.images), "predict": classify}
        seconds = take_turns(works, given.rounds, waiting(machine.device))
        speeds = {work: given.images / median(times) for work, times in seconds.items()}
        for work, speed in speeds.items():
            rows.append({"what": work, "images_per_second": round(speed, 1), "share": round(speed / speeds["bare"], 3)})
        for number, kind in enumerate(given.exports):
            out = ["--out", str(folder / f"export{number}")]
            command = [sys.executable, "-m", "kdzoo.cli", "export", str(made.folder), *EXPORTS[kind], *out]
            begun = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"what": f"export {kind}", "seconds": round(time.monotonic() - begun, 1)})
            print(done.stdout, flush=True)
    publish(pd.DataFrame(rows), file_of(given.results, f"export-{given.student}-{given.size}px", machine))


if __name__ == "__main__":
    main()
