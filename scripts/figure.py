"""The figure of the README: the student's training images, its test images, and its accuracy.

    python scripts/figure.py TEACHER_RUN STUDENT_RUN --data_dir DIR --synthetic_data_dir DIR \\
        --output docs/images/student_and_exam.png

The images are not selected: of every class they are the first four of the CIFAKE folder, sorted by
name, and the first four of the CIFAR-10 test set. The accuracies are the last epoch's: by class
from per_class.csv, and over all classes from metrics.csv.
"""

import csv
import io
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import CLASSES, ImageSet, load_cifake, load_cifar10
from experiment import flags
from experiment.errors import UserError, one_line_errors
from experiment.files import atomic_write
from plots import Figure, read_metrics

# Lengths are in pixels of the picture. GitHub shows it at half its size.
WIDTH, HEIGHT = 1800, 1090
LEFT, COLUMN = 74, 172  # where the first class begins, and the width of each
SIZE, GAP = 80, 2  # of an image, and between the four of a class
MARGIN = (COLUMN - 2 * SIZE - GAP) // 2
SYNTHETIC, REAL, CHART, BOTTOM = 120, 370, 660, 1030  # tops of the three parts, end of the last
# Blue and vermilion of Okabe and Ito, which the colour-blind tell apart.
TEACHER, STUDENT, INK, GREY = "#0072b2", "#d55e00", "#24292f", "#57606a"

Accuracy = tuple[float, list[float]]  # over all classes, and that of each, in percent


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__, "TEACHER_RUN STUDENT_RUN")
    add = parser.add_argument
    add("teacher", type=Path, metavar="TEACHER_RUN", help="folder of the teacher's finished run")
    add("student", type=Path, metavar="STUDENT_RUN", help="folder of the student's finished run")
    add("--data_dir", type=Path, default=Path("data"), metavar="DIR", help="CIFAR-10 [%(default)s]")
    # fmt: off
    add("--synthetic_data_dir", type=Path, default=Path("synthetic_data/cifake_train_fake"),
        metavar="DIR",
        help="the images of CIFAKE's train/FAKE [%(default)s]")
    add("--output", type=Path, default=Path("docs/images/student_and_exam.png"), metavar="FILE",
        help="the picture; a former one is replaced [%(default)s]")
    # fmt: on
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    teacher, student = read_run(args.teacher), read_run(args.student)
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    draw_images(canvas, SYNTHETIC, load_cifake(args.synthetic_data_dir, limit=1000))
    draw_images(canvas, REAL, load_cifar10(args.data_dir, train=False))
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
    figure.figimage(canvas, zorder=-1)
    write(figure, 46, "The student learns from AI-generated images, CIFAKE")
    write(figure, REAL - 24, "It is tested on real photographs, CIFAR-10")
    write(figure, CHART - 60, "Accuracy on the real images, in percent")
    for i, name in enumerate(CLASSES):
        x, y = (LEFT + (i + 0.5) * COLUMN) / WIDTH, 1 - (SYNTHETIC - 24) / HEIGHT
        figure.text(x, y, name, fontsize=17, color=GREY, ha="center")
    draw_accuracy(figure, teacher, student)
    save(figure, args.output)
    print(args.output)


def read_run(folder: Path) -> Accuracy:
    """The accuracy of a run's last epoch. Errors: UserError."""
    path = folder / "per_class.csv"
    if not path.is_file():
        raise UserError(f"{folder} is not a finished run: it has no per_class.csv")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            accuracy = {row["class"]: float(row["test_accuracy"]) for row in csv.DictReader(file)}
        by_class = [accuracy[name] for name in CLASSES]
        if not all(0 <= value <= 100 for value in by_class):  # nan: no image, after --limit
            raise ValueError
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{path} is not the per_class.csv of a run on CIFAR-10") from error
    return read_metrics(folder)["test_accuracy"][-1], by_class


def draw_images(canvas: np.ndarray, top: int, data: ImageSet) -> None:
    """Put the first four images of every class on `canvas`, uint8 (HEIGHT, WIDTH, 3)."""
    for label in range(len(CLASSES)):
        images = data.images[data.labels == label][:4].permute(0, 2, 3, 1)  # (4, 32, 32, 3)
        for i, image in enumerate(images.numpy()):
            x = LEFT + label * COLUMN + MARGIN + i % 2 * (SIZE + GAP)
            y = top + i // 2 * (SIZE + GAP)
            # for a small file: no blending of pixels, and without the lowest bit, which none sees
            larger = Image.fromarray(image & 0xFE).resize((SIZE, SIZE), Image.Resampling.NEAREST)
            canvas[y : y + SIZE, x : x + SIZE] = larger


def draw_accuracy(figure: Figure, teacher: Accuracy, student: Accuracy) -> None:
    """A dot for the teacher and one for the student under the images of each class."""
    area = (LEFT / WIDTH, 1 - BOTTOM / HEIGHT, 10 * COLUMN / WIDTH, (BOTTOM - CHART) / HEIGHT)
    axes = figure.add_axes(area)
    lower = [min(pair) for pair in zip(teacher[1], student[1], strict=True)]
    left, right = np.arange(10) - 0.19, np.arange(10) + 0.19
    axes.plot([left, right], [teacher[1], student[1]], color="#b4bbc4", linewidth=3)
    for name, x, (overall, by_class), color, marker in (
        ("teacher, trained on real images", left, teacher, TEACHER, "o"),
        ("student", right, student, STUDENT, "D"),
    ):
        label = f"{name}: {overall:.2f} %"
        axes.plot(x, by_class, marker, color=color, markersize=14, label=label)
        for point, limit in zip(zip(x, by_class, strict=True), lower, strict=True):
            # the upper value above its dot, the lower one below: no line crosses them
            offset, side = ((0, 14), "bottom") if point[1] > limit else ((0, -15), "top")
            style = {"color": color, "fontsize": 15, "ha": "center", "va": side}
            style["bbox"] = {"color": "white", "pad": 1}  # instead of a line of the grid
            axes.annotate(f"{point[1]:.1f}", point, offset, textcoords="offset points", **style)
    lowest = max(0, 10 * ((min(lower) - 6) // 10))
    axes.set(xlim=(-0.5, 9.5), ylim=(lowest, 102))
    axes.set_xticks(range(10), CLASSES, fontsize=17, color=GREY)
    axes.set_yticks(np.arange(lowest, 101, 10))
    axes.tick_params("y", labelsize=15, labelcolor=GREY)
    axes.tick_params(length=0, pad=10)
    axes.grid(axis="y", color="#dfe3e8")
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1 - MARGIN / 10 / COLUMN, 1.11),
        ncols=2,
        fontsize=18,
        labelcolor="linecolor",
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.5,
        borderaxespad=0,
    )


def write(figure: Figure, y: float, title: str) -> None:
    """A title whose baseline is `y` pixels below the top."""
    x = LEFT + MARGIN
    figure.text(x / WIDTH, 1 - y / HEIGHT, title, fontsize=19, weight="bold", color=INK)


def save(figure: Figure, path: Path) -> None:
    pixels = io.BytesIO()
    figure.savefig(pixels, format="rgba")
    picture = Image.frombytes("RGBA", (WIDTH, HEIGHT), pixels.getvalue()).convert("RGB")

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        picture.save(file, "PNG", optimize=True)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
