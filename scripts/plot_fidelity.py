"""The table and the plots of scripts/fidelity.sh, from the runs that are finished.

    python scripts/plot_fidelity.py runs/fidelity runs/fidelity

Writes to the second folder: fidelity.csv, one row per student; table.md, one row per set of images
and teacher; counts.csv; and fidelity.png: the students' accuracy over the teacher's accuracy on the
images, over guidance, and over the number of images. Accuracies are the last epoch's.
"""

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment import flags
from experiment.errors import UserError, one_line_errors
from experiment.files import atomic_write, write_csv
from plots import Axes, Figure, read_metrics


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__, "RUNS OUTPUT")
    parser.add_argument("runs", type=Path, metavar="RUNS", help="the folder of all its runs")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a folder, new or not")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    top, output = args.runs, args.output
    students, counts = read_students(top), read_counts(top)
    if not students:
        raise UserError(f"no student in {top} is finished yet")
    output.mkdir(parents=True, exist_ok=True)
    groups = over_seeds(students, "images", "teacher")
    write_csv(output / "fidelity.csv", students[0], map(dict.values, students))
    with atomic_write(output / "table.md") as file:
        file.write(table(groups).encode())
    if counts:
        write_csv(output / "counts.csv", counts[0], map(dict.values, counts))
    draw(groups, over_seeds(counts, "images"), output / "fidelity.png")
    print(table(groups))


def last_accuracy(folder: Path) -> float:
    return read_metrics(folder)["test_accuracy"][-1]


def finished(folder: Path, pattern: str) -> list[Path]:
    """The networks of the runs, without expert-0.001.pth, which is an older expert-0.pth."""
    return [path for path in sorted(folder.glob(pattern)) if "." not in path.stem]


def read_students(top: Path) -> list[dict]:
    """A row for each finished student: its images, its teacher and its accuracy."""
    rows = []
    for path in finished(top / "students", "*/*.pth"):
        name = path.parent.name
        measures = json.loads((top / "measures" / name / "measures.json").read_text())
        args = {}
        if name != "cifake":
            args = json.loads((top / "images" / name / "config.json").read_text())["args"]
        teacher, _, seed = path.stem.rpartition("-")
        row = {"images": name, "guidance": args.get("guidance_scale"), "steps": args.get("steps")}
        row |= {"teacher": teacher, "seed": int(seed)}
        row |= {key: measures[key] for key in ("teacher_accuracy", "confidence", "fid")}
        rows.append(row | {"student_accuracy": last_accuracy(path.with_suffix(""))})
    return rows


def read_counts(top: Path) -> list[dict]:
    rows = []
    for path in finished(top / "counts", "*.pth"):
        count, seed = map(int, path.stem.split("-"))
        rows.append(
            {"images": count, "seed": seed, "student_accuracy": last_accuracy(path.with_suffix(""))}
        )
    return sorted(rows, key=lambda row: (row["images"], row["seed"]))


def over_seeds(rows: list[dict], *keys: str) -> list[tuple[dict, float, float]]:
    """A row per group that shares `keys`, and mean and standard deviation over its students."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for group in groups.values():
        values = [row["student_accuracy"] for row in group]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found.append(({**group[0], "n": len(group)}, statistics.mean(values), spread))
    return found


def table(groups: list[tuple[dict, float, float]]) -> str:
    lines = [
        "| images | guidance | steps | expert's accuracy on them | its confidence | FID "
        "| teacher | student | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, mean, spread in groups:
        accuracy = f"{mean:.2f} ± {spread:.2f}" if row["n"] > 1 else f"{mean:.2f}"
        fid = "" if row["fid"] is None else f"{row['fid']:.2f}"
        lines.append(
            f"| {row['images']} | {row['guidance'] or ''} | {row['steps'] or ''} "
            f"| {row['teacher_accuracy']:.2f} | {row['confidence']:.2f} | {fid} "
            f"| {row['teacher']} | {accuracy} | {row['n']} |"
        )
    return "\n".join(lines) + "\n"


def draw(students: list[tuple[dict, float, float]], counts: list, path: Path) -> None:
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    fidelity, guidance, number = figure.subplots(1, 3)
    for row, mean, spread in students:
        if row["teacher"] == "expert":
            style = {"fmt": "*", "ms": 12} if row["images"] == "cifake" else {"fmt": "o"}
            fidelity.errorbar(row["teacher_accuracy"], mean, spread, color="C0", **style)
            fidelity.annotate(row["images"], (row["teacher_accuracy"], mean), fontsize=7)
    made = [group for group in students if group[0]["guidance"] is not None]
    for teacher, steps in sorted({(row["teacher"], row["steps"]) for row, _, _ in made}):
        line = [g for g in made if (g[0]["teacher"], g[0]["steps"]) == (teacher, steps)]
        curve(guidance, line, "guidance", f"{teacher}, {steps} steps")
    if counts:
        curve(number, counts, "images", "the same number of updates")
        number.set_xscale("log")
    fidelity.set(title="Fidelity", xlabel="accuracy of the expert on the images, percent")
    guidance.set(title="Guidance", xlabel="guidance scale")
    number.set(title="Number of images", xlabel="synthetic images")
    for axes in (fidelity, guidance, number):
        axes.set_ylabel("student on the real test set, percent")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def curve(axes: Axes, groups: list[tuple[dict, float, float]], key: str, label: str) -> None:
    points = sorted((row[key], mean, spread) for row, mean, spread in groups)
    axes.errorbar(*zip(*points, strict=True), fmt="o-", capsize=3, label=label)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
