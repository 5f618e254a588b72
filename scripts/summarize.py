"""Summarise finished runs in a CSV and a plot.

    python scripts/summarize.py runs/controls runs/controls/*/      # as scripts/controls.sh does
    python scripts/summarize.py results/controls runs/controls/*/   # to publish them

A run's folder is named SETTING-SEED. Of a run that is not in the first folder, config.json,
metrics.csv and per_class.csv are copied there.

summary.csv has one row per setting: the number of seeds, the teacher's accuracy, mean, sample
standard deviation and single values (in the order of the runs) of the last epoch's accuracy, the
mean of the best epochs (picked on the test set), other columns of the last epoch, the minutes of a
run, hardware, precision and commit. The minutes are those of the whole run or, if it did not record
them, of its epochs only.
"""

import json
import shutil
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment import flags
from experiment.errors import UserError, one_line_errors
from experiment.files import atomic_write, write_csv
from experiment.folder import MAY_CHANGE_ON_RESUME
from plots import Figure, read_metrics

KEPT = ("config.json", "metrics.csv", "per_class.csv")
ENDS = {"train_agreement": 2, "val_kd_loss": 4, "val_agreement": 2}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__, "OUTPUT RUN [RUN ...]")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a folder, new or not")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    runs: dict[str, dict] = {}
    for folder in args.runs:  # all are read before the first is copied
        config = read_config(folder)
        metrics = read_metrics(folder) if (folder / "metrics.csv").exists() else None
        if metrics is None or metrics["epoch"][-1] != config["epochs"]:
            print(f"{folder} is not finished: left out")
            continue
        run = runs.setdefault(folder.name, dict(folder=folder, config=config, metrics=metrics))
        if run["config"] != config:  # if it is the same, one is a copy of the other: it counts once
            raise UserError(f"{folder}: another run has this name, too")
        copy = args.output / folder.name
        if (copy / "last.pt").exists() and read_config(copy) != config:
            raise UserError(f"{copy} is another run than {folder}: name another OUTPUT")
    if not runs:
        return
    settings: dict[str, list[dict]] = {}
    for name, run in runs.items():
        keep(run["folder"], args.output / name)
        settings.setdefault(name.rpartition("-")[0] or name, []).append(run)
    rows = [summary(setting, runs) for setting, runs in settings.items()]
    write_csv(args.output / "summary.csv", rows[0], map(dict.values, rows))
    draw(settings, args.output / "summary.png")
    print((args.output / "summary.csv").read_text(encoding="utf-8"), end="")


def keep(folder: Path, copy: Path) -> None:
    """Copy the tables of the run in `folder` to `copy`, unless that is the same folder."""
    if copy.resolve() == folder.resolve():
        return
    copy.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in KEPT):
        if path.exists():  # older runs have no per_class.csv
            shutil.copyfile(path, copy / path.name)


def read_config(folder: Path) -> dict:
    """The config.json of a run. An older one has no "parts": it is one. Errors: UserError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        parts = config.get("parts") or [config]
        if not all(part["hardware"] and "git_commit" in part for part in parts):
            raise ValueError
        return {**config, "epochs": config["args"]["epochs"], "parts": parts}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the config.json of a run") from error


def summary(setting: str, runs: list[dict]) -> dict[str, str | int]:
    """The row of a setting, from the configuration and the metrics of its runs.

    Prints a note if their recipes differ.
    """
    tables, configs = [run["metrics"] for run in runs], [run["config"] for run in runs]
    last = [table["test_accuracy"][-1] for table in tables]
    for flag, value in configs[0]["args"].items():
        may_differ = flag in ("seed", "run_dir", *MAY_CHANGE_ON_RESUME)
        if not may_differ and any(config["args"].get(flag, value) != value for config in configs):
            print(f"note: the runs of {setting} differ in --{flag}")
    parts = [part for config in configs for part in config["parts"]]
    teachers = [config.get("teacher_accuracy") for config in configs]
    return {
        "setting": setting,
        "n": len(runs),
        "teacher": mean([x for x in teachers if x is not None]),
        "last_mean": mean(last),
        "last_std": f"{statistics.stdev(last):.2f}" if len(last) > 1 else "",
        "last": " ".join(f"{accuracy:.2f}" for accuracy in last),
        "best_mean": mean([max(table["test_accuracy"]) for table in tables]),
        **{
            key: mean([table[key][-1] for table in tables if key in table], digits)
            for key, digits in ENDS.items()
        },
        "minutes": mean([seconds(run) / 60 for run in runs]),
        "hardware": values(parts, "hardware"),
        "precision": values(parts, "precision"),
        "commit": values(parts, "git_commit"),
    }


def values(parts: list[dict], key: str) -> str:
    """All values of `key` in the parts of runs; older runs do not have every key."""
    return " / ".join(sorted({str(part[key]) for part in parts if key in part}))


def seconds(run: dict) -> float:
    """The seconds of all parts of a run, or of its epochs if a part has not recorded its own."""
    parts = run["config"]["parts"]
    if all("seconds" in part for part in parts):
        return sum(part["seconds"] for part in parts)
    return sum(run["metrics"]["seconds"])


def mean(values: list[float], digits: int = 2) -> str:
    return f"{statistics.mean(values):.{digits}f}" if values else ""


def draw(settings: dict[str, list[dict]], path: Path) -> None:
    """A dot for each run and a line for its teacher, setting by setting."""
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(settings)), layout="constrained")
    axes = figure.subplots()
    for y, runs in enumerate(settings.values()):
        for run in runs:
            axes.plot(run["metrics"]["test_accuracy"][-1], y, "o", color="C0", alpha=0.7)
            teacher = run["config"].get("teacher_accuracy")
            if teacher is not None:
                axes.plot(teacher, y, "|", color="0.4", ms=14)
    axes.set(yticks=range(len(settings)), yticklabels=settings, xlabel="percent")
    axes.set_title("Last epoch on the real test set: dot, the network; bar, its teacher")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
