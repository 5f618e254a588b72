"""Kill both scripts again and again, resume them, and compare with runs that were left alone.

    python benchmarks/kill_test.py --kills 100

Runs of the demo, on the CPU, get SIGKILL at random moments, about half of the time as soon as a
file is being written. After each kill every file of the run has to be readable. The run is resumed
until it ends by itself: its weights, its predictions and its metrics.csv, but for the times, have
to be those of a run that was never killed, bit for bit. Exit code 1 if anything differs.
"""

import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment import flags
from experiment.errors import one_line_errors
from experiment.files import load
from experiment.folder import read_config
from plots import read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = ("fine_tune_teacher_cifar10.py", "main_train_cifar10.py")
SIZE = "--demo --epochs 6 --limit 128 --batch_size 32 --device cpu".split()
# Files are written after every epoch here, not once a minute: more moments to be hit in.
DRIVER = (
    "import runpy, sys, experiment.run; experiment.run.SAVE_EVERY = 0; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def start(script: str, argv: Sequence[str], folder: Path) -> subprocess.Popen:
    """One of the scripts, in `folder`; what it prints is appended to log.txt there."""
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(REPOSITORY / script), *argv],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def half_written(folder: Path) -> set[Path]:
    """Temporary files; a killed process leaves those that it was writing."""
    return set(folder.rglob("*.tmp"))


def kill(process: subprocess.Popen, folder: Path, after: float, in_a_write: bool) -> str | None:
    """SIGKILL after so many seconds, or in the next write; returns what was going on.

    None if the process had ended by itself.
    """
    deadline, before = time.monotonic() + after, half_written(folder)
    while process.poll() is None and time.monotonic() < deadline:
        if in_a_write and half_written(folder) - before:
            break
        time.sleep(0.0005)
    if process.poll() is not None:
        return None
    process.kill()
    process.wait()
    if half_written(folder) - before:
        return "writing a file"
    return "training" if (folder / "run" / "config.json").exists() else "starting"


def unreadable(folder: Path) -> list[str]:
    """The files of a run that cannot be read; half-written ones beside them do not count."""
    readers = {".pt": load, ".pth": load, ".png": lambda path: Image.open(path).load()}
    readers |= {".csv": lambda path: read_metrics(path.parent)}
    readers |= {".npz": lambda path: dict(np.load(path))}
    readers |= {".json": lambda path: read_config(path.parent)}
    bad = []
    for path in folder.rglob("*"):
        if path.suffix in readers:
            try:
                readers[path.suffix](path)
            except Exception as error:
                bad.append(f"{path}: {error}")
    return bad


def results(folder: Path) -> tuple[tuple[list[dict], str], dict[str, torch.Tensor]]:
    """The rows of a run without its times and its predictions, and its exported weights."""
    with open(folder / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["images_per_second"]
    predictions = (folder / "run" / "predictions.csv").read_text()
    return (rows, predictions), load(folder / "out.pth")["model"]


def same(one: Path, two: Path) -> bool:
    (tables, weights), (other_tables, other_weights) = results(one), results(two)
    if tables != other_tables or weights.keys() != other_weights.keys():
        return False
    return all(torch.equal(weights[key], other_weights[key]) for key in weights)


def unbroken(script: str, extra: list[str], folder: Path) -> float:
    """A run that nobody disturbs; returns its seconds."""
    folder.mkdir()
    began = time.monotonic()
    new = [*SIZE, *extra, "--run_dir", "run", "--output", "out.pth"]
    if start(script, new, folder).wait():
        raise SystemExit(f"error: {(folder / 'log.txt').read_text()}")
    return time.monotonic() - began


def broken(
    script: str, extra: list[str], folder: Path, seconds: float, kills: int, draw: random.Random
) -> tuple[Counter, list[str]]:
    """A run that is killed up to `kills` times on its way; returns when, and what was damaged."""
    folder.mkdir()
    moments, damage = Counter(), []
    new = [*SIZE, *extra, "--run_dir", "run", "--output", "out.pth"]
    while True:
        begun = (folder / "run" / "config.json").exists()
        process = start(script, ["--resume", "run"] if begun else new, folder)
        if moments.total() == kills:
            code = process.wait()
            moment = None
        else:
            in_a_write = draw.random() < 0.5
            moment = kill(process, folder, draw.uniform(0, 1.2 * seconds), in_a_write)
            code = process.returncode
        if moment is None:
            if code:
                damage.append((folder / "log.txt").read_text().splitlines()[-1])
            return moments, damage + unreadable(folder)
        moments[moment] += 1
        damage += unreadable(folder)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--kills", type=flags.int_in(1, 10**6), default=100, help="in all [%(default)s]")
    add("--seed", type=flags.int_in(0, 2**32 - 1), default=0, help="of the moments [%(default)s]")
    add("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="[both]")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    draw = random.Random(args.seed)
    moments, runs, different, damage = Counter(), 0, 0, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        references = {}
        for script in args.scripts:
            whole = folder / script
            extra = ["--teacher_weights", "random"] if script == SCRIPTS[1] else []
            references[script] = whole, extra, unbroken(script, extra, whole)
        while moments.total() < args.kills:
            script = args.scripts[runs % len(args.scripts)]
            whole, extra, seconds = references[script]
            trial = folder / f"trial-{runs}"
            found, bad = broken(script, extra, trial, seconds, args.kills - moments.total(), draw)
            runs, moments, damage = runs + 1, moments + found, damage + bad
            different += bool(bad) or not same(whole, trial)
            print(f"{moments.total()} kills, {runs} runs, {different} different", flush=True)
    print(f"{moments.total()} kills: " + ", ".join(f"{n} while {m}" for m, n in moments.items()))
    print(f"{runs} runs went to their end: {different} different, {len(damage)} unreadable files")
    print("\n".join(damage), end="\n" * bool(damage))
    if different or damage:
        raise SystemExit(1)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
