"""Compare three methods over two seeds and read which differences hold: a suite of your own, as in a notebook.

python examples/compare.py
"""

from pathlib import Path

import pandas as pd

import kdzoo

SUITE = """
data: digits
protocol: {name: quick, epochs: %(epochs)d}
pairs: [[resnet14, resnet8]]
distillers: [none, kd, dist]
seeds: [0, 1]
teacher: {epochs: %(epochs)d, allow_weak: true}
"""


def main(out: str = "runs/compare", epochs: int = 2) -> pd.DataFrame:
    """Train every method with every seed, and return the table of paired differences to kd."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "three.yaml"
    file.write_text(SUITE % {"epochs": epochs})
    report = kdzoo.bench(str(file), out=folder / "runs")
    assert not report.failed, report.failed
    table = kdzoo.table([folder / "runs"], baseline="kd")
    print(table[["method", "top1_mean", "difference", "difference_low", "difference_high", "verdict"]].to_string())
    return table


if __name__ == "__main__":
    main()
