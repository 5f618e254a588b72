"""A run on disk, and what every run does: pick a device, seed, report, save, go on after a stop.

runs/student-001/
    config.json    every flag, the command, git commit, versions, hardware, the teacher's checksum
    metrics.csv    one row an epoch
    last.pt        the network of the last finished epoch, and all that training goes on with
    best.pt        the network of the best epoch on the test set: only to compare with papers
    train_val_losses.png, val_accuracy.png
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
    """End a script on what its user can put right, with one line on stderr and exit code 1."""
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).splitlines()[0]} A smaller --batch_size takes less.")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)


def pick_device(name: str, amp: str) -> tuple[torch.device, torch.dtype | None]:
    """The device to run on, and the dtype of autocast; None stands for plain float32.

    `name` is auto (CUDA where there is one), cpu, cuda or cuda:N; `amp` is bf16, off or auto, which
    is bf16 on a GPU that has it in hardware. Errors: UserError when there is no such CUDA device.
    """
    count = torch.cuda.device_count()
    device = torch.device(name if name != "auto" else "cuda" if count else "cpu")
    if device.type == "cuda":
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: PyTorch finds {count} CUDA devices here")
        torch.backends.cudnn.benchmark = True  # faster, and why CUDA runs do not repeat bit for bit
        torch.set_float32_matmul_precision("high")
    bf16 = amp == "bf16"
    if amp == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if bf16 else None


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed PyTorch from (seed, epoch); epoch 0 is for the weights, before training.

    As every epoch is seeded by itself, a resumed one draws what it would have drawn in one go.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


# ---------------------------------------------------------------------------------- the run folder


class Run:
    """The folder of one run, described at the top of this file.

    `kind` is "teacher" or "student". `args` are the flags of the script; `demo`, `run_dir`,
    `resume` and `output` are read here, and all go into `config.json`. So do `identity`, what must
    not have changed when a run goes on (the size of the data, the teacher), and `notes`.

    The history is kept in `last.pt`, and `metrics.csv` is written from it, whole, after each epoch:
    they cannot disagree, and no row is ever cut in half. Errors: UserError, OSError.
    """

    def __init__(self, args: Namespace, kind: str, identity: dict, **notes) -> None:
        self.history: list[dict[str, float]] = []
        self.output = args.output
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if self.output.is_dir() or not os.access(self.output.parent, os.W_OK):
            raise UserError(f"--output {self.output} cannot be written")
        if args.resume:
            self.folder = args.resume
            self.config = read_config(self.folder)
            for key, value in identity.items():
                was = self.config.get(key)
                if was != value:
                    raise UserError(f"{self.folder} cannot go on: {key} was {was}, now {value}")
        else:
            self.folder = _new_folder(args.run_dir, f"demo/{kind}" if args.demo else kind)
            self.config = {
                "kind": kind,
                **surroundings(args.device),
                **identity,
                **notes,
                "args": vars(args),
            }
            with replacing(self.folder / "config.json") as file:
                file.write((json.dumps(self.config, indent=2, default=str) + "\n").encode())
        print(f"run: {self.folder} (after a stop: --resume {self.folder})", flush=True)

    def restore(self, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR) -> int:
        """Load `last.pt`, if there is one yet; returns the epoch to train next, counted from 1."""
        path = self.folder / "last.pt"
        if path.exists():
            state = load(path)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            self.history = state["history"]
            self._write_metrics()
        return len(self.history) + 1

    def record(
        self,
        row: dict[str, float],
        checkpoint: dict,
        optimizer: Optimizer,
        scheduler: LambdaLR,
    ) -> None:
        """End an epoch: write `last.pt` and `metrics.csv`, and `best.pt` when it is the best."""
        if not math.isfinite(row["train_loss"]):
            raise UserError(
                f"the training loss of epoch {row['epoch']} is {row['train_loss']}: --lr may be "
                f"too high; {self.folder} keeps the epochs before it"
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
        """The first row with the highest test accuracy. It is reported, and decides nothing."""
        return max(self.history, key=lambda row: row["test_accuracy"])

    def finish(self, checkpoint: dict) -> None:
        """Export the network of the last epoch to `--output`, and print what came out.

        A file that is already there is not lost, unless this very run has made it: it is renamed.
        """
        kept = None if self._made(self.output) else set_aside(self.output)
        save(self.output, {**checkpoint, "provenance": self._provenance()})
        last, best = self.history[-1], self.best
        minutes, seconds = divmod(round(sum(row["seconds"] for row in self.history)), 60)
        print(
            f"final  {last['test_accuracy']:.2f} % on the test set, epoch {last['epoch']}\n"
            f"best   {best['test_accuracy']:.2f} %, epoch {best['epoch']}: picked on the test set, "
            "only to compare\n"
            f"time   {minutes} min {seconds} s on {self.config['hardware']}\n"
            f"saved  {self.output}\n"
            f"       {self.folder}/metrics.csv, train_val_losses.png, val_accuracy.png, last.pt"
        )
        if kept:
            print(f"kept   {kept}, the former {self.output.name}")

    def _made(self, path: Path) -> bool:
        try:
            made_by = load(path)["provenance"]
            mine = {"run": str(self.folder), "started": self.config["started"]}
            return mine.items() <= made_by.items()
        except (UserError, KeyError, TypeError, AttributeError):
            return False

    def _write_metrics(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{x:.7g}" for key, x in row.items()} for row in self.history)
        with replacing(self.folder / "metrics.csv") as file:
            file.write(text.getvalue().encode())

    def _provenance(self) -> dict:
        origin = ("command", "started", "git_commit", "torch", "hardware")
        last = {key: self.history[-1][key] for key in ("epoch", "test_accuracy")}
        return {"run": str(self.folder), **last, **{key: self.config.get(key) for key in origin}}


def read_config(folder: Path) -> dict:
    """The `config.json` of a run. Errors: UserError when `folder` is not one."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config["args"], dict):
            raise TypeError
    except OSError as error:
        raise UserError(f"{folder} is not a run: it has no config.json that can be read") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the config.json of a run") from error
    return config


def _new_folder(run_dir: Path | None, name: str) -> Path:
    if run_dir is None:  # runs/student-001, runs/student-002, ...
        taken = [path.name.rpartition("-")[2] for path in Path("runs").glob(f"{name}-*")]
        number = 1 + max((int(end) for end in taken if end.isdecimal()), default=0)
        run_dir = Path("runs", f"{name}-{number:03d}")
        run_dir.mkdir(parents=True)  # of two runs that start at once, one ends here
        return run_dir
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty: name a new folder, or --resume {run_dir}")
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def surroundings(device: str) -> dict:
    """Where a number comes from: command, time, commit, versions, and the hardware of `device`."""
    git = "git describe --always --dirty --abbrev=12 --exclude=*".split()
    try:
        here = Path(__file__).parent
        done = subprocess.run(git, cwd=here, capture_output=True, text=True, check=True)
        commit = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a copy without its history
        commit = None
    threads = torch.get_num_threads()
    hardware = f"CPU, {threads} thread{'s' * (threads > 1)}"
    if torch.cuda.is_available() and device != "cpu":
        hardware = torch.cuda.get_device_name(None if device == "auto" else device)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_commit": commit,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "hardware": hardware,
    }


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write beside `path`, flush it to the disk, move it into place: never half a file."""
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


def set_aside(path: Path) -> Path | None:
    """Rename what is at `path` to name.001.pth or the next free number; None for nothing."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number:03d}{path.suffix}")).exists():
        number += 1
    return path.rename(aside)


def load(path: str | Path) -> dict:
    """Load on the CPU what `save` wrote, without ever running code from it. Errors: UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no weight file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything on a broken or hostile file
        kind = type(error).__name__
        raise UserError(f"{path} is not a weight file, or not a safe one ({kind})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no network: there is no state dict in it")
    return state


# -------------------------------------------------------------------------------------- the screen


class Progress:
    """On a terminal, tqdm bars for epochs and batches; anywhere else, one printed line an epoch."""

    def __init__(self, first_epoch: int, epochs: int, images: int) -> None:
        quiet = not sys.stderr.isatty()
        self.epochs = tqdm(total=epochs, initial=first_epoch - 1, unit="epoch", disable=quiet)
        self.images = tqdm(total=images, unit="img", unit_scale=True, leave=False, disable=quiet)
        self.on_batch = None if quiet else self._on_batch
        self.next_look = 0.0

    def _on_batch(self, count: int, loss: Tensor) -> None:
        if time.monotonic() >= self.next_look:  # looking at the loss waits for the device
            self.next_look = time.monotonic() + 1
            self.images.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
        self.images.update(count)

    def epoch(self, row: dict[str, float]) -> None:
        """Show a row of `metrics.csv`."""
        values = "  ".join(f"{key} {x:.4g}" for key, x in row.items() if key != "epoch")
        tqdm.write(f"epoch {row['epoch']}/{self.epochs.total}  {values}", file=sys.stdout)
        sys.stdout.flush()
        self.images.reset()
        self.epochs.update()

    def close(self) -> None:
        """Take the bars off the screen's last lines."""
        self.images.close()
        self.epochs.close()
