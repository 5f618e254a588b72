"""Our student's curve over the one that the earlier re-implementation printed.

    python scripts/plot_reproduction.py runs/reproduction/student-*/

Writes over_the_published_curve.png beside the folders.
"""

import csv
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment import flags
from experiment.errors import one_line_errors
from experiment.files import atomic_write
from plots import Figure, read_metrics

RESULTS = Path(__file__).resolve().parent.parent / "results"
PUBLISHED = RESULTS / "published" / "published_student_curve.csv"
PICTURE = "over_the_published_curve.png"


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__, "RUN [RUN ...]")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a student's folder")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    with open(PUBLISHED, newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    accuracy = [float(row["test_accuracy_percent"]) for row in rows]
    label = f"published, teacher of unknown test accuracy: last {accuracy[-1]:.2f} %"
    axes.plot(epochs, accuracy, ".-", color="0.6", label=label)
    for folder in args.runs:
        metrics = read_metrics(folder)
        label = f"ours, {folder.name}: last {metrics['test_accuracy'][-1]:.2f} %"
        axes.plot(metrics["epoch"], metrics["test_accuracy"], ".-", label=label)
    axes.set(title="Student on the real test set", xlabel="epoch", ylabel="percent")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic_write(args.runs[0].parent / PICTURE) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
