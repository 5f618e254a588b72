"""The pictures of a run, drawn from its `metrics.csv`.

    python plots.py runs/student-001                    # draw its two plots again
    python plots.py runs/student-001 runs/student-002   # overlay several runs, in comparison/

A folder under results/ serves as well as one under runs/.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import flags
from experiment import UserError, one_line_errors, replacing

Metrics = dict[str, list[float]]
# What was trained is told by a column of the CSV. Its meaning, and the training loss beside it:
KINDS = {
    "train_agreement": (
        "agreement with the teacher on the training images",
        "Training: KD loss",
        "T² · KL(teacher ‖ student), nats",
    ),
    "train_accuracy": (
        "accuracy on the real training images",
        "Training: cross-entropy on real images",
        "cross-entropy, nats",
    ),
    "train_label_accuracy": (
        "accuracy on the labels of the training images",
        "Training: cross-entropy, without a teacher",
        "cross-entropy, nats",
    ),
}


def read_metrics(folder: str | Path) -> Metrics:
    """The columns of the `metrics.csv` in `folder`, by name. Errors: UserError when it has none."""
    path = Path(folder) / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{folder} is not a run with a finished epoch: it has no metrics.csv")
    try:
        with open(path, newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        metrics = {key: [row[key] for row in rows] for key in rows[0]}
        if not all(abs(value) < 1e30 for column in metrics.values() for value in column):
            raise ValueError("not finite, or too large to be drawn")
        needed = {"epoch", "train_loss", "test_loss", "test_accuracy"}
        if not needed <= metrics.keys() or not KINDS.keys() & metrics.keys():
            raise KeyError
    except (ValueError, TypeError, KeyError, IndexError, csv.Error) as error:
        raise UserError(f"{path} is not the metrics.csv of a run") from error
    return metrics


def plot_run(folder: str | Path) -> None:
    """Draw `train_val_losses.png` and `val_accuracy.png` of one run into its folder."""
    plot_runs([folder], folder)


def plot_runs(folders: Sequence[str | Path], output: str | Path) -> None:
    """Draw the same two plots of several runs over one another, into `output`."""
    runs = {str(folder): read_metrics(folder) for folder in folders}
    Path(output).mkdir(parents=True, exist_ok=True)
    _draw_losses(runs, Path(output) / "train_val_losses.png")
    _draw_accuracy(runs, Path(output) / "val_accuracy.png")


def _draw_losses(runs: dict[str, Metrics], path: Path) -> None:
    # a KD loss and a cross-entropy are different measures: each has a panel of its own
    kinds = [kind for kind in KINDS if kind in map(_kind, runs.values())]
    figure = Figure(figsize=(5 * len(kinds) + 5, 4), layout="constrained")
    *panels, test = figure.subplots(1, len(kinds) + 1)
    for color, (name, metrics) in enumerate(runs.items()):
        style = {"color": f"C{color}", "label": name}
        train = panels[kinds.index(_kind(metrics))]
        train.plot(metrics["epoch"], metrics["train_loss"], ".-", **style)
        test.plot(metrics["epoch"], metrics["test_loss"], ".-", **style)
    for panel, kind in zip(panels, kinds, strict=True):
        _finish(panel, *KINDS[kind][1:])
    _finish(test, "Test: cross-entropy on real images", "cross-entropy, nats")
    _save(figure, test, path)


def _draw_accuracy(runs: dict[str, Metrics], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, (name, metrics) in enumerate(runs.items()):
        epochs, accuracy = metrics["epoch"], metrics["test_accuracy"]
        best = accuracy.index(max(accuracy))
        what = "real test set" if len(runs) == 1 else name
        label = f"last {accuracy[-1]:.2f} %, best {accuracy[best]:.2f} % (epoch {epochs[best]:.0f})"
        axes.plot(epochs, accuracy, ".-", color=f"C{color}", label=f"{what}: {label}", zorder=3)
        axes.plot(epochs[best], accuracy[best], "o", color=f"C{color}", ms=10, fillstyle="none")
    if len(runs) == 1:
        kind, teacher = _kind(metrics), _teacher_accuracy(name)
        axes.plot(epochs, metrics[kind], ".-", color="0.7", label=KINDS[kind][0])
        if teacher is not None:
            label = f"the teacher on the real test set: {teacher:.2f} %"
            axes.axhline(teacher, color="0.4", linestyle="--", label=label)
    _finish(axes, "Accuracy after each epoch (circle: the best, picked on the test set)", "percent")
    _save(figure, axes, path)


def _kind(metrics: Metrics) -> str:
    return next(column for column in KINDS if column in metrics)


def _teacher_accuracy(folder: str) -> float | None:
    try:
        return float(json.loads((Path(folder) / "config.json").read_text())["teacher_accuracy"])
    except (OSError, ValueError, TypeError, KeyError):  # a teacher's own run, or a CSV alone
        return None


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _save(figure: Figure, named: Axes, path: Path) -> None:
    figure.legend(*named.get_legend_handles_labels(), loc="outside lower center")
    with replacing(path) as file:  # whoever watches a run never sees half a picture
        figure.savefig(file, format="png", dpi=120)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(__doc__, "RUN [RUN ...]")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with a metrics.csv")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the plots go [a single run: its own folder; several: comparison]",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    output = args.output or Path(args.runs[0] if len(args.runs) == 1 else "comparison")
    plot_runs(args.runs, output)
    print(f"{output / 'train_val_losses.png'}\n{output / 'val_accuracy.png'}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
