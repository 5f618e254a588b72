"""Draw the plots of a run from the tables in its folder. The data are not needed.

    python plots.py runs/student-001                    # draw its plots again
    python plots.py runs/student-001 runs/student-002   # overlay several runs, in comparison/

Several runs share train_val_losses.png and val_accuracy.png. A single run also has confusion.png
and mistakes.png, once `save_predictions` has written their tables. A folder under results/ works
like one under runs/. A picture of the same name that plots.py did not draw is replaced in the run's
own folder only; in another folder it is an error.
"""

import argparse
import csv
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook names its own, which a venv of ours does not have

import matplotlib
import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

from data import ImageSet
from experiment import flags
from experiment.errors import UserError, one_line_errors
from experiment.files import atomic_write, check_regular, write_csv

Metrics = dict[str, list[float]]
# Which of these columns metrics.csv has tells what was trained. The values: what the column means,
# and title and unit of the training loss.
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
    "": ("", "Training: diffusion loss", "mean squared error"),  # a generator has no such column
}
TEST_LOSS = ("Test: cross-entropy on real images", "cross-entropy, nats")
GENERATOR_TEST_LOSS = ("Test: diffusion loss on real images", "mean squared error")
PICTURES = ("train_val_losses.png", "val_accuracy.png", "confusion.png", "mistakes.png")
MARK = "drawn by plots.py"  # in every picture
# as written, also if a folder is named $x$
AS_WRITTEN = matplotlib.rc_context({"text.parse_math": False, "text.usetex": False})


def read_metrics(folder: str | Path, classifier: bool = True) -> Metrics:
    """The columns of the `metrics.csv` in `folder`, by name.

    Errors: UserError when there is none or, with `classifier`, when it is not a classifier's.
    """
    path = Path(folder) / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{folder} is not a run with a finished epoch: it has no metrics.csv")
    with _reading(path) as rows:
        rows = [{k: float(v) for k, v in row.items()} for row in rows]
        metrics = {key: [row[key] for row in rows] for key in rows[0]}
        if not all(abs(value) < 1e30 for column in metrics.values() for value in column):
            raise ValueError("not finite, or too large to be drawn")
        needed = {"epoch", "train_loss", "test_loss"}
        if classifier or _kind(metrics) or "test_accuracy" in metrics:
            needed |= {"test_accuracy", _kind(metrics)}
        if not needed <= metrics.keys():
            raise KeyError
    return metrics


@contextmanager
def _reading(path: Path) -> Iterator[list[dict[str, str]] | dict[str, np.ndarray]]:
    """The rows of a .csv, or the arrays of an .npz. What the block cannot read is a UserError."""
    check_regular(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                yield dict(arrays)
        else:
            with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                yield list(csv.DictReader(file))
    except Exception as error:  # a damaged table or archive raises nearly anything
        if getattr(error, "filename", None):  # an OSError: the file cannot be opened
            raise
        raise UserError(f"{path} is not the {path.name} of a run") from error


def save_predictions(
    folder: Path, test_set: ImageSet, logits: Tensor, teacher_logits: Tensor | None = None
) -> None:
    """Write a network's results on the test images to the folder of its run, in three files.

    per_class.csv has one row per class: accuracy in percent, mean cross-entropy in nats and, for a
    student, the percent of the images for which the teacher predicts the same class.
    predictions.csv has one row per image. Classes are numbers from 0, and `probability` is the
    prediction's. mistakes.npz has the same columns for the (up to) thirty mistakes of highest
    probability, and their `images`, uint8 (n, 32, 32, 3). Both logits: float (N, classes), on the
    CPU. Errors: UserError.
    """
    labels, prediction, logits = test_set.labels, logits.argmax(1), logits.double()
    table = {
        "index": torch.arange(len(labels)),
        "label": labels,
        "prediction": prediction,
        "probability": logits.softmax(1).amax(1),
    }
    scores = {
        "test_accuracy": 100.0 * (prediction == labels),
        "test_loss": F.cross_entropy(logits, labels, reduction="none"),
    }
    if teacher_logits is not None:
        table["teacher_prediction"] = teacher_logits.argmax(1)
        scores["teacher_agreement"] = 100.0 * (prediction == table["teacher_prediction"])
    means = (
        (name, *(f"{score[labels == label].mean():.7g}" for score in scores.values()))
        for label, name in enumerate(test_set.classes)
    )
    write_csv(folder / "per_class.csv", ["class", *scores], means)
    wrong = (prediction != labels).nonzero().flatten()
    wrong = wrong[table["probability"][wrong].argsort(descending=True, stable=True)[:30]]
    with atomic_write(folder / "mistakes.npz") as file:
        images = test_set.images[wrong].permute(0, 2, 3, 1)  # (30, 3, 32, 32) -> (30, 32, 32, 3)
        columns = {name: column[wrong].numpy() for name, column in table.items()}
        np.savez_compressed(file, images=images.numpy(), **columns)
    rows = zip(*(column.tolist() for column in table.values()), strict=True)
    write_csv(folder / "predictions.csv", table, rows)


@AS_WRITTEN
def plot_run(folder: str | Path, output: str | Path | None = None) -> list[Path]:
    """Draw the plots of one run to its folder, or to `output`; returns their paths.

    Errors: UserError that names the table.
    """
    folder, output = Path(folder), Path(output or folder)
    paths = plot_runs([folder], output)
    for source, draw in (("predictions.csv", _draw_confusion), ("mistakes.npz", _draw_mistakes)):
        if (folder / source).exists():
            paths.append(draw(folder, output))
    return paths


@AS_WRITTEN
def plot_runs(folders: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Draw the curves of several runs, overlaid, to `output`; returns the paths.

    Errors: UserError that names the table.
    """
    runs = {str(folder): read_metrics(folder, classifier=False) for folder in folders}
    Path(output).mkdir(parents=True, exist_ok=True)
    paths = [_draw_losses(runs, Path(output) / PICTURES[0])]
    if any(map(_kind, runs.values())):  # generators have no accuracy
        paths.append(_draw_accuracy(runs, Path(output) / PICTURES[1]))
    return paths


def _draw_losses(runs: dict[str, Metrics], path: Path) -> Path:
    # KD loss and cross-entropy cannot be compared: each has a panel of its own
    kinds = [kind for kind in KINDS if kind in map(_kind, runs.values())]
    titles = [KINDS[kind][1:] for kind in kinds]
    titles += dict.fromkeys(TEST_LOSS if kind else GENERATOR_TEST_LOSS for kind in kinds)
    figure = Figure(figsize=(5 * len(titles), 4), layout="constrained")
    panels = dict(zip(titles, figure.subplots(1, len(titles)), strict=True))
    lines = []
    for color, (name, metrics) in enumerate(runs.items()):
        kind, style = _kind(metrics), {"color": f"C{color}", "label": _label(name)}
        test = panels[TEST_LOSS if kind else GENERATOR_TEST_LOSS]
        panels[KINDS[kind][1:]].plot(metrics["epoch"], metrics["train_loss"], ".-", **style)
        lines += test.plot(metrics["epoch"], metrics["test_loss"], ".-", **style)
    for title, panel in panels.items():
        _finish(panel, *title)
    return _save(figure, path, lines)


def _draw_accuracy(runs: dict[str, Metrics], path: Path) -> Path:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, (name, metrics) in enumerate(runs.items()):
        if not _kind(metrics):
            continue
        epochs, accuracy = metrics["epoch"], metrics["test_accuracy"]
        best = accuracy.index(max(accuracy))
        what = "real test set" if len(runs) == 1 else _label(name)
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
    return _save(figure, path, axes.get_legend_handles_labels()[0])


def _draw_confusion(folder: Path, output: Path) -> Path:
    names = [_shown(name, 20) for name in _class_names(folder)]
    n, few = len(names), len(names) <= 20  # only so few have room for numbers
    with _reading(folder / "predictions.csv") as rows:
        pairs = [(int(row["label"]), int(row["prediction"])) for row in rows]
        label, prediction = np.array(pairs, np.uint32).T
        counts = np.zeros((n, n), int)
        np.add.at(counts, (label, prediction), 1)
        accuracy = 100 * counts.trace() / len(rows)
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    side = 0.75 * n if few else 13  # inches
    figure = Figure(figsize=(side + 1.4, side + 0.9), layout="constrained")
    axes = figure.subplots()
    norm = PowerNorm(0.5, 0, 100)  # lets rare mistakes show
    colors = axes.imshow(percent, "Blues", norm, aspect="auto")
    if few:
        for (row, column), count in np.ndenumerate(counts):
            color = "0.7" if count == 0 else "w" if percent[row, column] > 40 else "k"
            text = f"{count}\n{percent[row, column]:.1f} %"
            axes.text(column, row, text, color=color, ha="center", va="center")
    else:
        figure.colorbar(colors, label="percent of the label's images", shrink=0.6)
    if n <= 100:
        size, turned = (10 if few else 7), n > 10 or max(map(len, names)) > 10
        axes.set_xticks(range(n), names, fontsize=size, rotation=90 if turned else 0)
        axes.set_yticks(range(n), names, fontsize=size)
    title = f"Accuracy on {len(rows):,} test images: {accuracy:.2f} %"
    axes.set(title=title, xlabel="prediction", ylabel="label")
    return _save(figure, output / PICTURES[2])


def _draw_mistakes(folder: Path, output: Path) -> Path:
    names = [_shown(name, 10) for name in _class_names(folder)]
    with _reading(folder / "mistakes.npz") as table:
        images, teacher = table["images"], table.get("teacher_prediction")
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
            raise ValueError("no images")
        captions = []
        for i in range(len(images)):
            text = f"{names[table['label'][i]]} → {names[table['prediction'][i]]}\n"
            text += f"{100 * table['probability'][i]:.1f} %"
            captions.append(text if teacher is None else f"{text}\nteacher: {names[teacher[i]]}")
    height = 1.3 if teacher is None else 1.45  # of a row, whose columns are 1 wide
    figure = Figure(figsize=(9.6, 8 * height + 0.5))
    axes = figure.add_axes((0, 0, 1, 8 * height / (8 * height + 0.5)))  # thirty axes would be slow
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % 6, height * (i // 6 + 1)
        axes.imshow(image, extent=(x + 0.05, x + 0.95, y - 0.05, y - 0.95))
        axes.text(x + 0.5, y - 0.98, caption, ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(0, 6), ylim=(5 * height, 0))
    axes.axis("off")
    figure.suptitle("Wrong with most confidence: label → prediction, and its probability")
    return _save(figure, output / PICTURES[3])


def _class_names(folder: Path) -> list[str]:
    with _reading(folder / "per_class.csv") as rows:
        return [row["class"] for row in rows]


def _kind(metrics: Metrics) -> str:
    return next((column for column in KINDS if column in metrics), "")


def _teacher_accuracy(folder: str) -> float | None:
    path = Path(folder) / "config.json"
    try:
        check_regular(path)
        return float(json.loads(path.read_text())["teacher_accuracy"])
    except (UserError, OSError, ValueError, TypeError, KeyError):  # a teacher's, or a CSV alone
        return None


def _shown(text: str, width: int | None = None) -> str:
    """`text` on one line, with escapes for what cannot be encoded, cut to `width`."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def _label(folder: str) -> str:  # a legend leaves out what begins with an underscore
    return _shown(f"./{folder}" if folder.startswith("_") else folder)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path, named: Sequence[Artist] = ()) -> Path:
    if named:
        figure.set_figheight(figure.get_figheight() + 0.22 * max(0, len(named) - 4))
        figure.legend(handles=named, loc="outside lower center")
    with warnings.catch_warnings(), atomic_write(path) as file:  # never half a picture
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn for it
        figure.savefig(file, format="png", dpi=120, metadata={"Source": MARK})
    return path


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(__doc__, "RUN [RUN ...]")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with a metrics.csv")
    # fmt: off
    parser.add_argument("--output", type=Path, metavar="DIR",
        help="where the pictures go [a single run: its own folder; several: comparison]")
    # fmt: on
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    single = len(args.runs) == 1
    output = args.output or Path(args.runs[0] if single else "comparison")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: the pictures need a folder")
    if output.resolve() not in [Path(run).resolve() for run in args.runs]:
        for path in (output / name for name in (PICTURES if single else PICTURES[:2])):
            check_regular(path)
            if path.exists() and MARK.encode() not in path.read_bytes():
                raise UserError(f"{path} is not {MARK}: move it, or name another --output")
    begun = [run for run in args.runs if Path(run, "config.json").exists()]
    unfinished = [run for run in begun if not Path(run, "metrics.csv").exists()]
    runs = [run for run in args.runs if run not in unfinished] or args.runs
    paths = plot_run(runs[0], output) if single else plot_runs(runs, output)
    for run in unfinished:
        print(f"note: {_shown(run)} has no finished epoch: left out")
    print("\n".join(_shown(str(path)) for path in paths))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
