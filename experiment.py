"""A run on disk, and what every run does: pick a device, seed, report, save, go on after a stop.

runs/student-001/
    config.json    every flag, the command, git commit, versions, hardware, the teacher's checksum
    metrics.csv    one row an epoch
    last.pt        the network of the last finished epoch, and all that training goes on with
    best.pt        the network of the best epoch on the test set: only to compare with papers
    per_class.csv  the accuracy of each class at the end
    train_val_losses.png, val_accuracy.png
"""

import csv
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import parallel

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None

SAVE_EVERY = 10.0  # seconds: on a GPU, writing 135 MB can take longer than an epoch
LOCK = ".lock"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class UserError(Exception):
    """What the person at the keyboard can put right: shown as one line, without a traceback."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM while a run is going on; `number` is that of the signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a script on what its user can put right, with one line on stderr and exit code 1."""
    try:
        yield
    except (UserError, OSError) as error:
        _exit(str(error))
    except torch.OutOfMemoryError as error:
        _exit(f"{str(error).splitlines()[0]} A smaller --batch_size takes less.")
    except Stopped as stop:
        if parallel.leads():
            sys.stderr.write(f"\n{stop}\n")
        sys.exit(128 + stop.number)
    except RuntimeError as error:
        if not parallel.is_lost_rank(error):
            raise
        _exit("another process of this job has died")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)


def _exit(message: str) -> NoReturn:
    if not parallel.leads():
        time.sleep(5)  # rank 0 has most likely said the same, and torchrun ends this one meanwhile
        message = f"rank {parallel.rank()}: {message}"
    sys.exit("error: " + " ".join(message.split()))


def pick_device(name: str, amp: str) -> tuple[torch.device, torch.dtype | None]:
    """The device to run on, and the dtype of autocast; None stands for plain float32.

    `name` is auto (CUDA where there is one), cpu, cuda or cuda:N; `amp` is bf16, off or auto, which
    is bf16 on a GPU that has it in hardware. Each rank of a job has a GPU of its own. Errors:
    UserError when there is no such CUDA device.
    """
    count = torch.cuda.device_count()
    device = torch.device(name if name != "auto" else "cuda" if count else "cpu")
    if device.type == "cuda":
        if parallel.world_size() > 1:
            device = torch.device("cuda", parallel.local_rank())
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: PyTorch finds {count} CUDA devices here")
        if device.index is not None:
            torch.cuda.set_device(device)  # streams, graphs and NCCL go by the current one
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

    `kind` says which script's run it is, such as "teacher". `args` are the flags of the script;
    `demo`, `run_dir`, `resume` and `output` are read here, and all go into `config.json`. So do
    `identity`, what must not have changed when a run goes on (the size of the data, the teacher),
    and `notes`.

    After each epoch a copy of all that training goes on with is made; it is written when the last
    writing is `SAVE_EVERY` seconds ago. The block `with run:` ends, at the latest at SIGINT or
    SIGTERM, with writing what waits. The history is kept in `last.pt`, and `metrics.csv` is written
    from it, whole: they cannot disagree, and no row is ever cut in half. In a job of several ranks,
    rank 0 alone touches the folder. Errors: UserError, OSError.
    """

    def __init__(self, args: Namespace, kind: str, identity: dict, **notes) -> None:
        self.history: list[dict[str, float]] = []
        self.waiting: dict[str, dict] = {}  # what is to be written, by file name
        self.saved_at = -math.inf
        self.epochs = args.epochs
        self.score = "test_loss" if kind == "diffusion" else "test_accuracy"  # every row has it
        self.stop_signal: int | None = None
        self.busy = False
        self.output, self.folder = args.output, args.resume or args.run_dir
        if not parallel.leads():
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if self.output.is_dir() or not os.access(self.output.parent, os.W_OK):
            raise UserError(f"--output {self.output} cannot be written")
        if args.resume:
            self.config = read_config(self.folder)
            self.lock = _lock(self.folder)
            for key, value in identity.items():
                was = self.config.get(key)
                if was != value:
                    raise UserError(f"{self.folder} cannot go on: {key} was {was}, now {value}")
        else:
            self.folder = args.run_dir or _next_folder(f"demo/{kind}" if args.demo else kind)
            refuse_if_used(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = _lock(self.folder)
            refuse_if_used(self.folder)  # of two runs that start at once, one ends here
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

    def restore(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        trained: nn.Module | None = None,
    ) -> int:
        """Load `last.pt`, if there is one yet; returns the epoch to train next, counted from 1.

        `trained` is the network that training goes on with, where `model` is its average.
        """
        path = self.folder / "last.pt" if parallel.leads() else None
        state = parallel.from_leader(load(path) if path and path.exists() else None)
        if state is not None:
            try:
                model.load_state_dict(state["model"])
                if trained is not None:
                    trained.load_state_dict(state["trained"])
                own = optimizer.state_dict()  # its options: what is fused depends on the device
                optimizer.load_state_dict({**own, "state": state["optimizer"]["state"]})
                scheduler.load_state_dict(state["scheduler"])
                for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                    group["lr"] = float(lr)
                self.history = _checked(state["history"], self.score)
            except Exception as error:  # a file that was tampered with can raise nearly anything
                raise UserError(f"{path} is not the checkpoint of this run") from error
            if parallel.leads():
                self._write_metrics()
        return len(self.history) + 1

    def record(
        self,
        row: dict[str, float],
        checkpoint: dict,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        trained: nn.Module | None = None,
    ) -> bool:
        """End an epoch; true if its files were written at once. `trained`: see `restore`."""
        self._check(row, checkpoint["model"])
        self.busy = True  # a signal waits until history and files agree again
        self.history.append(row)
        due = parallel.leads() and self._keep(checkpoint, optimizer, scheduler, trained)
        self.busy = False
        if self.stop_signal:
            self._stop()
        return due

    def _keep(
        self,
        checkpoint: dict,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        trained: nn.Module | None,
    ) -> bool:
        checkpoint = {**checkpoint, "provenance": self._provenance()}
        training = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        if trained is not None:
            training["trained"] = trained.state_dict()
        last = _copied({**checkpoint, **training, "history": self.history})
        self.waiting["last.pt"] = last
        if self.score == "test_accuracy" and self.best is self.history[-1]:
            self.waiting["best.pt"] = {key: last[key] for key in checkpoint}
        due = time.monotonic() - self.saved_at >= SAVE_EVERY
        if due:
            self.flush()
        return due

    def flush(self) -> None:
        """Write what waits: `best.pt`, `last.pt`, and then `metrics.csv`."""
        for name in sorted(self.waiting):
            save(self.folder / name, self.waiting[name])
            del self.waiting[name]  # not before: a signal may come in between
            if name == "last.pt":
                self._write_metrics()
        self.saved_at = time.monotonic()

    def _check(self, row: dict[str, float], weights: dict[str, Tensor]) -> None:
        finite = torch.stack([weight.isfinite().all() for weight in weights.values()]).all()
        for what, good in (
            (f"training loss is {row['train_loss']}", math.isfinite(row["train_loss"])),
            (f"test loss is {row['test_loss']}", math.isfinite(row["test_loss"])),
            ("network holds a weight that is not finite", finite),
        ):
            if not good:
                raise UserError(
                    f"stopped after epoch {row['epoch']}: its {what}. A too high --lr is the "
                    f"likely cause, or a teacher that is broken; {self.folder} keeps the epochs "
                    "before it"
                )

    def __enter__(self) -> "Run":
        self.handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if parallel.world_size() == 1:
            self._give_back_signals()
        self.busy = True  # where other ranks have died, torchrun's signal must not end the writing
        self.flush()
        self._give_back_signals()
        if parallel.leads():
            self.lock.close()
            if parallel.is_lost_rank(error):
                raise UserError(
                    f"another process of this job has died; {self._way_on()}"
                ) from error

    def _on_signal(self, number: int, frame: object) -> None:
        if parallel.world_size() == 1:
            self._give_back_signals()  # a second one ends at once
        else:
            for other in STOP_SIGNALS:  # torchrun sends a second one at once, and kills later
                signal.signal(other, signal.SIG_IGN)
        self.stop_signal = number
        if not self.busy:
            self._stop()

    def _give_back_signals(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _stop(self) -> None:
        way_on = self._way_on() if parallel.leads() else ""
        message = f"stopped after epoch {len(self.history)} of {self.epochs}; {way_on}"
        raise Stopped(self.stop_signal, message)

    def _way_on(self) -> str:
        script, folder = shlex.quote(sys.argv[0]), shlex.quote(str(self.folder))
        return f"to go on:\n{parallel.launcher()} {script} --resume {folder}"

    @property
    def best(self) -> dict[str, float]:
        """The first row with the highest test accuracy. It is reported, and decides nothing."""
        return max(self.history, key=lambda row: row["test_accuracy"])

    def finish(self, checkpoint: dict, per_class: list[float]) -> None:
        """Write what came out, print it, and export the network of the last epoch: on rank 0.

        `per_class`, the accuracy of each class in percent, goes to `per_class.csv`.
        """
        if not parallel.leads():
            return
        self.flush()
        table = zip(checkpoint["classes"], per_class, strict=True)
        with replacing(self.folder / "per_class.csv") as file:
            file.write(b"class,test_accuracy\n")
            file.write("".join(f"{name},{value:.7g}\n" for name, value in table).encode())
        last, best = self.history[-1], self.best
        print(
            f"final  {last['test_accuracy']:.2f} % on the test set, epoch {last['epoch']}\n"
            f"best   {best['test_accuracy']:.2f} %, epoch {best['epoch']}: picked on the test set, "
            "only to compare"
        )
        self.export(checkpoint, "metrics.csv, train_val_losses.png, val_accuracy.png, ...")

    def export(self, checkpoint: dict, files: str) -> None:
        """Write a network to `--output`; print the time it took, and `files`, what else there is.

        A file that is already there is not lost, unless this very run has made it: it is renamed.
        """
        kept = None if self._made(self.output) else set_aside(self.output)
        state = _copied({**checkpoint, "provenance": self._provenance()})
        save(self.output, state, tag=f".{self.folder.name}")
        minutes, seconds = divmod(round(sum(row["seconds"] for row in self.history)), 60)
        print(f"time   {minutes} min {seconds} s on {self.config['hardware']}")
        print(f"saved  {self.output}\n       {self.folder}/{files}")
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
        last = {key: self.history[-1][key] for key in ("epoch", self.score)}
        return {"run": str(self.folder), **last, **{key: self.config.get(key) for key in origin}}


def _checked(history: list[dict[str, float]], score: str) -> list[dict[str, float]]:
    for number, row in enumerate(history, start=1):
        if row["epoch"] != number or not math.isfinite(sum(row.values()) + row[score]):
            raise ValueError(f"row {number} of the history is {row}")
    if not history:
        raise ValueError("the history is empty")
    return history


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


def _next_folder(name: str) -> Path:  # runs/student-001, runs/student-002, ...
    taken = [path.name.rpartition("-")[2] for path in Path("runs").glob(f"{name}-*")]
    number = 1 + max((int(end) for end in taken if end.isdecimal()), default=0)
    return Path("runs", f"{name}-{number:03d}")


def refuse_if_used(folder: Path) -> None:
    """Errors: UserError when there is anything in the folder of a run that is to be new."""
    nothing = (LOCK, "config.json.tmp")  # what a run leaves that is killed in its first moment
    if folder.is_dir() and any(path.name not in nothing for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty: name a new folder, or --resume {folder}")


def _lock(folder: Path) -> BinaryIO:
    """Keep other processes out of `folder` while the file is open: until this process is gone."""
    file = open(folder / LOCK, "ab")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder} is in use: another process is at work on this run") from error
    except OSError:  # some network file systems have no locks
        pass
    return file


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
    if parallel.world_size() > 1:
        hardware = f"{parallel.world_size()} x {hardware}"
    return {
        "command": shlex.join([*parallel.launcher().split(), *sys.argv]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_commit": commit,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "hardware": hardware,
    }


def _copied(state):
    """A copy of nested dicts, lists and tensors, all of them on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, (list, tuple)) else state


@contextmanager
def replacing(path: Path, tag: str = "") -> Iterator[BinaryIO]:
    """Write beside `path`, flush it to the disk, move it into place: never half a file.

    `tag` keeps those apart who write to the same path at the same time.
    """
    beside = path.with_name(f"{path.name}{tag}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:  # a full disk, say: it names no file
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def save(path: Path, state: dict, tag: str = "") -> None:
    """`torch.save`, through `replacing`."""
    buffer = io.BytesIO()  # writing to a file, torch.save hides that the disk is full
    torch.save(state, buffer)
    with replacing(path, tag) as file:
        file.write(buffer.getbuffer())


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd file, which is refused below if it is bad
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
        quiet = not (sys.stderr.isatty() and parallel.leads())
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
