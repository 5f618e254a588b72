"""Our student's curve over the one that the earlier re-implementation printed.

    python scripts/plot_reproduction.py results/reproduction/student_*

Writes over_the_published_curve.png beside the folders.
"""

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.errors import one_line_errors
from experiment.files import atomic_write
from plots import read_metrics

RESULTS = Path(__file__).resolve().parent.parent / "results"
PUBLISHED = RESULTS / "published" / "published_student_curve.csv"
PICTURE = "over_the_published_curve.png"


def main(folders: list[str]) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    with open(PUBLISHED, newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    accuracy = [float(row["test_accuracy_percent"]) for row in rows]
    label = f"published, teacher of unknown test accuracy: last {accuracy[-1]:.2f} %"
    axes.plot(epochs, accuracy, ".-", color="0.6", label=label)
    for folder in map(Path, folders):
        metrics = read_metrics(folder)
        label = f"ours, {folder.name}: last {metrics['test_accuracy'][-1]:.2f} %"
        axes.plot(metrics["epoch"], metrics["test_accuracy"], ".-", label=label)
    axes.set(title="Student on the real test set", xlabel="epoch", ylabel="percent")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic_write(Path(folders[0]).parent / PICTURE) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {sys.argv[0]} RUN [RUN ...]")
    with one_line_errors():
        main(sys.argv[1:])
