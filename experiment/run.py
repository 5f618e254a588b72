"""The folder of a run, and what every run does: restore, seed, time, save, report, export.

runs/student-001/
    config.json    every flag, and for every part of the run its command, git commit, versions,
                   hardware, precision and seconds
    metrics.csv    one row an epoch
    last.pt        the network of the last finished epoch, and the state of the training
    best.pt        the network of the best epoch on the test set: only to compare with papers
    per_class.csv, predictions.csv, mistakes.npz
                   what the finished network says of the test images
    *.png          the plots
"""

import copy
import math
import shlex
import subprocess
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch

from experiment import folder, parallel
from experiment.device import seed_everything
from experiment.errors import Stopped, UserError, is_lack_of_memory
from experiment.files import load, save, save_without_overwriting, to_cpu, write_json
from experiment.progress import Progress
from experiment.signals import StopSignals

SAVE_EVERY = 60.0  # seconds: on a GPU, writing 135 MB can take longer than an epoch
IMPORTED = time.perf_counter()  # after PyTorch, whose import takes some seconds


class Run:
    """One run and its folder, described at the top of this file. The scripts show its use.

    `state` holds everything that training changes, each with a state_dict: "model", which is
    exported, "optimizer", "scheduler" and others. `about` is stored in every checkpoint, to rebuild
    the network. `must_match` has to be the same when the run is resumed, such as the number of
    images. It goes to config.json, as do `args` and `extra`. `on_save(folder)` draws the plots.
    `metric` names the column whose best epoch is kept in best.pt, if any.

    Every epoch the state is copied in memory, and written to disk at most every SAVE_EVERY seconds.
    Leaving the `with` block, also by a signal, writes the last copy. metrics.csv is written from
    the history in last.pt, right after it, and again by --resume. Only rank 0 writes to the folder.
    Errors: UserError, OSError.
    """

    def __init__(
        self,
        args: Namespace,
        name: str,
        state: dict,
        about: dict,
        device: torch.device,
        amp: torch.dtype | None,
        must_match: dict,
        on_save: Callable[[Path], None] | None = None,
        metric: str | None = "test_accuracy",
        **extra,
    ) -> None:
        self.args, self.state, self.about = args, state, about
        self.on_save, self.metric, self.float16 = on_save, metric, amp == torch.float16
        self.history: list[dict[str, float]] = []
        self.pending: dict[str, dict] = {}  # checkpoints to write, by file name
        self.saved_at = -math.inf
        self.progress: Progress | None = None
        self.signals = StopSignals(self._stop)
        self.folder, self.output = args.resume or args.run_dir, args.output
        if not parallel.is_rank_zero():
            return
        part = self.part = {"from_epoch": 1, **folder.provenance(device, amp)}
        if args.resume:
            self._open(must_match)
        else:
            place = f"demo/{name}" if args.demo else name
            self.folder = folder.claim_folder(args.run_dir, place, self.output)
            self.lock = folder.lock(self.folder)
            folder.refuse_if_used(self.folder)  # two runs may start at once: one ends here
            self.config = {"name": name, "format": folder.FORMAT, "run_id": uuid.uuid4().hex}
            self.config |= {**must_match, **extra, "args": vars(args), "parts": [part]}
            self._write_config()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        print(f"run: {self.folder} on {part['hardware']}, {part['precision']}", flush=True)
        print(f"to resume it after a stop: {self._resume_command()}", flush=True)

    def _open(self, must_match: dict) -> None:
        """Check and lock the folder of the run that is resumed."""
        folder.check_parts(folder.read_config(self.folder), self.folder)
        folder.check_output(self.output, self.folder)
        self.lock = folder.lock(self.folder)
        self.config = folder.read_config(self.folder)  # now that no other process writes it
        for key, value in must_match.items():
            was = self.config.get(key)
            if was != value:
                problem = f"with other files: {key} was {was}, is {value}"
                raise UserError(f"{self.folder} cannot be resumed {problem}")
        before, now = self.config["parts"][-1], self.part
        if before["precision"] != now["precision"]:
            print(f"note: so far it ran in {before['precision']}, now in {now['precision']}")
        old, new = before.get("git_commit"), now["git_commit"]
        if old != new or str(new).endswith("-dirty"):
            print(f"note: the code may have changed: so far it was commit {old}, now {new}")

    # ------------------------------------------------------------------------------- the epochs

    def epochs(self) -> Iterator[int]:
        """Restore the last checkpoint, then yield each epoch that is left, counted from 1.

        The random numbers of an epoch come from (seed, epoch).
        """
        self._restore()
        self.progress = Progress(len(self.history), self.args.epochs)
        self.on_batch = self.progress.on_batch  # for `train_one_epoch`
        self.began = time.perf_counter()
        for epoch in range(len(self.history) + 1, self.args.epochs + 1):
            self.epoch, self.lr = epoch, float(self.state["scheduler"].get_last_lr()[0])
            seed_everything(self.args.seed, epoch)
            yield epoch
        self.progress.bar.close()

    def log(self, row: dict[str, float]) -> None:
        """End the epoch: print `row`, copy the state and, every SAVE_EVERY seconds, write and plot.

        `row` gets the epoch, the learning rate it began with, and its seconds, which include saving
        and plotting the epoch before. Errors: UserError if a number is not finite.
        """
        row = {"epoch": self.epoch, "lr": self.lr, **row}
        self._check(row)
        now = time.perf_counter()
        row["seconds"], self.began = now - self.began, now
        with self.signals.held():  # history, files and screen agree again at its end
            self.history.append(row)
            if parallel.is_rank_zero():
                self._keep()
                if time.monotonic() - self.saved_at >= SAVE_EVERY:
                    self.flush()
            self.progress.show(row)

    def finish(self) -> None:
        """Print the result and export the network of the last epoch, on rank 0."""
        if not parallel.is_rank_zero():
            return
        self.flush(draw=True)  # again, with the tables that the script wrote at the end
        if self.metric:
            last, best = self.history[-1], self.best
            print(
                f"final  {last[self.metric]:.2f} % on the test set, epoch {last['epoch']}\n"
                f"best   {best[self.metric]:.2f} %, epoch {best['epoch']}: picked on the test set, "
                "only to compare"
            )
        kept = self._export()
        seconds = sum(part.get("seconds", 0) for part in self.config["parts"])
        minutes, seconds = divmod(round(seconds), 60)
        where = " / ".join(dict.fromkeys(part["hardware"] for part in self.config["parts"]))
        print(f"time   {minutes} min {seconds} s on {where}")
        print(f"saved  {self.output}")
        if kept:
            print(f"kept   {kept}, the former {self.output.name}")
        print(f"plots  {self.folder}", flush=True)

    @property
    def best(self) -> dict[str, float]:
        """The first row with the highest `metric`. It is only reported."""
        return max(self.history, key=lambda row: row[self.metric])

    def _check(self, row: dict[str, float]) -> None:
        weights = self.state["model"].state_dict().values()
        cause = "A too high --lr" + ", or float16 (try --amp off)," * self.float16
        if not torch.stack([weight.isfinite().all() for weight in weights]).all():
            problem = "the network holds a weight that is not finite"
        elif bad := [key for key, value in row.items() if not math.isfinite(value)]:
            problem = f"its {bad[0]} is {row[bad[0]]}"
        elif self.history and self.history[0].keys() != {*row, "seconds"}:
            problem, cause = "those before it have other columns", "Another commit"
        else:
            return
        message = f"stopped after epoch {row['epoch']}: {problem}. {cause} is the likely cause"
        raise UserError(f"{message}; the epochs before it are kept")

    # --------------------------------------------------------------------------------- the files

    def _restore(self) -> None:
        """Load last.pt, if there is one, and begin a new part of a resumed run."""
        if not folder.is_new(self.args):
            path = self.folder / "last.pt"
            saved = load(path)
            if parallel.is_rank_zero() and saved.get("run_id") != self.config["run_id"]:
                raise UserError(f"{path} is not the checkpoint of this run")
            try:
                self._load(saved)
            except Exception as error:  # a file that was tampered with can raise nearly anything
                if is_lack_of_memory(error):
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()[:200]
                raise UserError(f"{path} is not the checkpoint of this run: {reason}") from error
        if parallel.is_rank_zero() and self.args.resume:
            if len(self.history) < self.args.epochs:
                self.part["from_epoch"] = len(self.history) + 1
                self.config["parts"].append(self.part)
            else:
                print("note: all epochs are done; only the last files are written again")
            if self.history:
                self._write_metrics()
            self._write_config()

    def _load(self, saved: dict) -> None:
        for key, part in self.state.items():
            loaded = saved[key]
            if key == "optimizer":  # its options stay: `fused` depends on the device
                loaded = {**part.state_dict(), "state": loaded["state"]}
            part.load_state_dict(loaded)
        optimizer, scheduler = self.state["optimizer"], self.state["scheduler"]
        for weight, buffers in optimizer.state.items():  # a Mac's have a layout that CUDA refuses
            for key, value in buffers.items():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    buffers[key] = torch.empty_like(weight).copy_(value)
        for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = float(lr)
        self.history = saved["history"]
        columns = self.history[0].keys()
        if not all(isinstance(column, str) and column.isidentifier() for column in columns):
            raise ValueError(f"the columns of the history are {columns}")
        for number, row in enumerate(self.history, start=1):
            right = row["epoch"] == number and row.keys() == columns
            if not right or not math.isfinite(sum(row.values())):
                raise ValueError(f"row {number} of the history is {row}")

    def _keep(self) -> None:
        """Copy the state, on its device, for the next write."""
        state = copy.deepcopy({key: part.state_dict() for key, part in self.state.items()})
        if parallel.world_size() > 1:  # after a rank is lost, a GPU may give nothing back
            state = to_cpu(state)
        self.pending["last.pt"] = {**self._checkpoint(), **state, "history": list(self.history)}
        if self.metric and self.best is self.history[-1]:
            self.pending["best.pt"] = {**self._checkpoint(), "model": state["model"]}

    def _checkpoint(self) -> dict:
        provenance = {"run": str(self.folder), **self.history[-1], "parts": self.config["parts"]}
        return {**self.about, "run_id": self.config["run_id"], "provenance": provenance}

    def flush(self, draw: bool = False) -> None:
        """Write what is pending, and draw the plots after a new epoch, or with `draw`."""
        self._stamp()
        draw = draw or "last.pt" in self.pending
        for name in sorted(self.pending):  # best.pt before last.pt: a killed run repeats the epoch
            save(self.folder / name, to_cpu(self.pending[name]))
            if name == "last.pt":
                self._write_metrics()
                self._write_config()
            del self.pending[name]  # at the end: the next flush repeats what is interrupted
        self.saved_at = time.monotonic()
        try:
            if draw and self.on_save:
                self.on_save(self.folder)
        except Exception as error:  # the training is worth more than its plots
            print(f"note: no plots were drawn: {error}", flush=True)

    def _write_metrics(self) -> None:
        try:
            folder.write_metrics(self.folder, self.history)
        except UserError as error:
            if sys.platform != "win32" or not isinstance(error.__cause__, PermissionError):
                raise
            # it is open in Excel: the next save writes it, or --resume
            print(f"note: {error}", flush=True)

    def _export(self) -> Path | None:
        """Write the network to --output; returns the new name of an older file there, if any."""
        with self.signals.held():  # until the file is written
            self._stamp()
            state = {**self._checkpoint(), "model": to_cpu(self.state["model"].state_dict())}
            write = save_without_overwriting
            with suppress(UserError):  # there is no such file, or it is no network
                if load(self.output).get("run_id") == self.config["run_id"]:
                    write = save  # this run was finished before
            kept = write(self.output, state)
            self._write_config()
        return kept

    def _stamp(self) -> None:
        """Before every write: check the lock, and record the seconds since the imports."""
        folder.check_lock(self.lock, self.folder)
        self.part["seconds"] = round(time.perf_counter() - IMPORTED, 1)

    def _write_config(self) -> None:
        self._stamp()
        write_json(self.folder / "config.json", self.config)

    def __enter__(self) -> "Run":
        self.signals.install()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.signals.holding = True  # no signal interrupts the last write
        try:
            if self.progress:  # else no epoch has begun
                self.progress.bar.close()
            if self.progress and parallel.is_rank_zero():
                self.flush()
                self._write_config()
        finally:
            self.signals.restore()
            if parallel.is_rank_zero():
                self.lock.close()
        if parallel.is_rank_zero() and parallel.is_lost_rank(error):
            raise UserError(
                f"{error}: {parallel.RANK_LOST}; resume with {self._resume_command()}"
            ) from error
        if error is None and self.signals.received:
            self._stop(self.signals.received)

    def _stop(self, number: int) -> NoReturn:
        message = f"stopped after epoch {len(self.history)} of {self.args.epochs}"
        if parallel.is_rank_zero():
            message += f"; resume with\n{self._resume_command()}"
        raise Stopped(number, message)

    def _resume_command(self) -> str:
        script, *flags = sys.argv
        if not self.args.resume:  # else with the same flags again, such as another --data_dir
            flags = ["--resume", self.folder.as_posix()]
        join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
        return f"{parallel.launcher()} {join([Path(script).as_posix(), *flags])}"
