"""A run on disk, and the few things every run does: pick a device, seed, report, save, resume.

runs/student-001/
    config.json               every flag, the command, seed, git commit, versions, hardware, teacher
    metrics.csv               one row an epoch
    last.pt                   the network and all that is needed to go on training
    best.pt                   the network of the best epoch on the test set (for comparison only)
    train_val_losses.png      val_accuracy.png
"""

import csv
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm


class UserError(Exception):
    """What the person at the keyboard can put right: shown as one line, without a traceback."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can put right into one line on stderr and exit code 1. Bugs keep their traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def pick_device(name: str, amp: str) -> tuple[torch.device, torch.dtype | None]:
    """The device to run on, and the autocast dtype: bfloat16 on CUDA, None (plain float32) on the CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        if not cuda or (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here"
            )
        torch.backends.cudnn.benchmark = (
            True  # faster, and not bitwise repeatable: the README says so
        )
        torch.set_float32_matmul_precision("high")
    bf16 = amp == "bf16" or (amp == "auto" and device.type == "cuda")
    return device, torch.bfloat16 if bf16 else None


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed PyTorch from (seed, epoch), so that a resumed epoch draws what the unbroken run would have drawn.

    Weights are drawn at epoch 0, before training; epochs count from 1.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


class Run:
    """The folder of one run, described at the top of this file.

    `args` are the flags of the script: `run_dir`, `resume` and `output` are read here, all are written to
    `config.json`. So is `identity`, what must still hold when the run goes on after a stop: the size of the
    data, the teacher's checksum. The history lives in `last.pt`, and `metrics.csv` is written from it, whole,
    every epoch: the two cannot disagree, and no row is ever cut in half. Errors: UserError, OSError.
    """

    def __init__(self, args: Namespace, name: str, identity: dict, **notes) -> None:
        self.history: list[dict[str, float]] = []
        self.output = args.output
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if self.output.is_dir() or not os.access(self.output.parent, os.W_OK):
            raise UserError(f"--output {self.output} cannot be written")
        if args.resume:
            self.folder = args.resume
            self.config = read_config(self.folder)
            for key, value in identity.items():
                if self.config.get(key) != value:
                    was = self.config.get(key)
                    raise UserError(
                        f"{self.folder} cannot go on: {key} was {was} and is {value} now"
                    )
        else:
            self.folder = _new_folder(args.run_dir, name)
            self.config = {**_surroundings(), **identity, **notes, "args": vars(args)}
            with replacing(self.folder / "config.json") as file:
                file.write((json.dumps(self.config, indent=2, default=str) + "\n").encode())

    def restore(self, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR) -> int:
        """Load `last.pt`, if there is one, and return the epoch to train next, counted from 1."""
        path = self.folder / "last.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            self.history = state["history"]
            self._write_metrics()
        return len(self.history) + 1

    def record(
        self, row: dict[str, float], checkpoint: dict, optimizer: Optimizer, scheduler: LambdaLR
    ) -> None:
        """End an epoch: write `last.pt`, `metrics.csv`, and `best.pt` when no epoch was better."""
        if not math.isfinite(row["train_loss"]):
            raise UserError(
                f"the training loss of epoch {row['epoch']} is {row['train_loss']}, probably because the rate "
                f"{row['lr']:g} is too high; {self.folder} keeps the epochs before it"
            )
        self.history.append(row)
        checkpoint = {**checkpoint, "provenance": self._provenance()}
        if self.best is row:
            save(self.folder / "best.pt", checkpoint)
        training = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        save(self.folder / "last.pt", {**checkpoint, **training, "history": self.history})
        self._write_metrics()

    @property
    def best(self) -> dict[str, float]:
        """The row of the first epoch with the highest test accuracy. It is never used to choose anything."""
        return max(self.history, key=lambda row: row["test_accuracy"])

    def finish(self, checkpoint: dict) -> None:
        """Export the network of the last epoch to `--output` and print what came out."""
        save(self.output, {**checkpoint, "provenance": self._provenance()})
        last, best = self.history[-1], self.best
        minutes, seconds = divmod(round(sum(row["seconds"] for row in self.history)), 60)
        print(
            f"final  {last['test_accuracy']:.2f} % test accuracy at epoch {last['epoch']}, the last one"
        )
        print(
            f"best   {best['test_accuracy']:.2f} % at epoch {best['epoch']}, picked on the test set: only to compare"
        )
        print(
            f"took   {minutes} min {seconds} s for {last['epoch']} epochs on {self.config['hardware']}"
        )
        print(f"saved  {self.output}, and in {self.folder}: metrics.csv, plots, checkpoints")

    def _write_metrics(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.7g}" for key, value in row.items()} for row in self.history
        )
        with replacing(self.folder / "metrics.csv") as file:
            file.write(text.getvalue().encode())

    def _provenance(self) -> dict:
        known = {
            key: self.config.get(key) for key in ("command", "git_commit", "torch", "hardware")
        }
        last = self.history[-1]
        return {
            **known,
            "run": str(self.folder),
            "epoch": last["epoch"],
            "test_accuracy": last["test_accuracy"],
        }


def read_config(folder: str | Path) -> dict:
    """The `config.json` of a run. Errors: UserError when `folder` holds no run."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config["args"], dict):
            raise TypeError
    except OSError as error:
        raise UserError(f"{folder} is not a run: there is no readable config.json in it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the config.json of a run") from error
    return config


def _new_folder(run_dir: Path | None, name: str) -> Path:
    if run_dir is None:  # runs/student-001, runs/student-002, ...
        taken = [path.name.rpartition("-")[2] for path in Path("runs").glob(f"{name}-*")]
        number = 1 + max((int(t) for t in taken if t.isdecimal()), default=0)
        run_dir = Path("runs") / f"{name}-{number:03d}"
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(
            f"{run_dir} is not empty: continue that run with --resume {run_dir}, or name another --run_dir"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def _surroundings() -> dict:
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        commit = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": commit,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "hardware": gpu or f"{os.cpu_count()} CPU cores",
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside `path`, flush it to the disk and move it into place: `path` is old or new, never half."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save(path: Path, state: dict) -> None:
    """`torch.save`, through `replacing`."""
    with replacing(path) as file:
        torch.save(state, file)


class Progress:
    """tqdm bars for epochs and batches on a terminal; anywhere else, one printed line an epoch."""

    def __init__(self, first_epoch: int, epochs: int, images: int) -> None:
        quiet = not sys.stderr.isatty()
        self.epochs = tqdm(total=epochs, initial=first_epoch - 1, unit="epoch", disable=quiet)
        self.images = tqdm(total=images, unit="image", unit_scale=True, leave=False, disable=quiet)
        self.on_batch = None if quiet else self._on_batch
        self.next_reading = 0.0

    def _on_batch(self, count: int, loss: Tensor) -> None:
        if (
            time.monotonic() >= self.next_reading
        ):  # reading the loss waits for the device: once a second
            self.images.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            self.next_reading = time.monotonic() + 1
        self.images.update(count)

    def epoch(self, row: dict[str, float]) -> None:
        """Show one row of `metrics.csv`."""
        values = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "epoch")
        tqdm.write(f"epoch {row['epoch']}/{self.epochs.total}  {values}", file=sys.stdout)
        sys.stdout.flush()
        self.images.reset()
        self.epochs.update()

    def close(self) -> None:
        self.images.close()
        self.epochs.close()
