"""Our student over the curve that the earlier re-implementation printed.

    python scripts/plot_reproduction.py results/reproduction/student_*

Writes results/reproduction/over_the_published_curve.png.
"""

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "results"
PUBLISHED = RESULTS / "published" / "published_student_curve.csv"


def curve(path: Path, column: str) -> tuple[list[int], list[float]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [int(row["epoch"]) for row in rows], [float(row[column]) for row in rows]


def main(folders: list[str]) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    epochs, accuracy = curve(PUBLISHED, "test_accuracy_percent")
    label = f"published, teacher of unknown test accuracy: last {accuracy[-1]:.2f} %"
    axes.plot(epochs, accuracy, ".-", color="0.6", label=label)
    for folder in map(Path, folders):
        epochs, accuracy = curve(folder / "metrics.csv", "test_accuracy")
        label = f"ours, {folder.name}: last {accuracy[-1]:.2f} %"
        axes.plot(epochs, accuracy, ".-", label=label)
    axes.set(title="Student on the real test set", xlabel="epoch", ylabel="percent")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(RESULTS / "reproduction" / "over_the_published_curve.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
