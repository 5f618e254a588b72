"""The files and the rules of a run's folder, and the provenance of its numbers."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

import torch
import torchvision

from experiment import flags, parallel
from experiment.device import hardware
from experiment.errors import UserError
from experiment.files import check_regular, write_csv

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None

FORMAT = 5  # of config.json and last.pt
LOCK = ".lock"
# Names of files that a run writes into its folder, which --output may not take.
CHECKPOINTS = ("last.pt", "best.pt", LOCK)
OTHER_SUFFIXES = (".json", ".csv", ".png", ".npz", ".tmp")
# Where files are, what computes and how: only these flags may change when a run is resumed.
MAY_CHANGE_ON_RESUME = (
    "resume output data_dir synthetic_data_dir download_synthetic val_dir teacher_weights "
    "label_file device amp no_cuda_graph workers"
).split()


def parse_args(
    parser: flags.Parser, argv: Sequence[str] | None, name: str, demo: dict | None = None
) -> Namespace:
    """Parse `argv`; with --resume, the flags are the stopped run's.

    `name` is what the script makes, such as "teacher". A flag that would change what the resumed
    run computes is refused. Errors: UserError when there is no such run.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(argv)
    if given.resume is None:
        args = flags.parse(parser, argv, demo)
        if args.run_dir is not None and parallel.is_rank_zero():
            refuse_if_used(args.run_dir)
        return args
    if given.run_dir is not None:
        parser.error("a resumed run continues in its own folder: leave --run_dir out")
    config = read_config(given.resume)
    if config.get("name") != name:
        found = f"its name is {config.get('name')}, not {name}"
        raise UserError(f"{given.resume} is the run of another script: {found}")
    stored = flags.as_tokens(config["args"])
    parser.source = f"{given.resume / 'config.json'}: "
    before = flags.parse(parser, stored, demo)
    parser.source = ""
    args = flags.parse(parser, [*stored, *argv], demo)
    for key, value in vars(args).items():
        was = getattr(before, key)
        if value != was and key not in MAY_CHANGE_ON_RESUME:
            parser.error(f"{args.resume} was started with --{key} {was}: --resume cannot change it")
    return args


def is_new(args: Namespace) -> bool:
    """Whether training starts from initial weights, and not from a last.pt."""
    return args.resume is None or not (args.resume / "last.pt").exists()


def read_config(folder: Path) -> dict:
    """The config.json of a run. Errors: UserError when `folder` is not one, or an older one."""
    path = folder / "config.json"
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=_refuse)
        if not isinstance(config["args"], dict) or "\\u0000" in text:  # NUL ends a path in C
            raise ValueError
        json.dumps(config, ensure_ascii=False).encode("utf-8", "surrogateescape")
        made_by = config.get("format", 1)
    except OSError as error:
        raise UserError(f"{folder} is not a run: it has no config.json that can be read") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not the config.json of a run") from error
    if made_by != FORMAT:
        raise UserError(
            f"{path} has the format {made_by} of another version, this one's is {FORMAT}: use the "
            f"commit that made it, {config.get('git_commit', 'which it names')}"
        )
    return config


def _refuse(constant: str) -> NoReturn:  # NaN and Infinity are not JSON
    raise ValueError(constant)


def check_parts(config: dict, folder: Path) -> None:
    """Errors: UserError if `folder` lacks what a resumed run reads beside its flags."""
    if (folder / "metrics.csv").exists() and not (folder / "last.pt").exists():
        raise UserError(f"{folder} cannot be resumed: it has epochs, but no last.pt")
    try:
        seconds = [part.get("seconds", 0) for part in config["parts"]]
        names = [part[key] for part in config["parts"] for key in ("precision", "hardware")]
        texts = [config["run_id"], *names]
        if not (seconds and math.isfinite(sum(seconds)) and all(isinstance(t, str) for t in texts)):
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / 'config.json'} is not the config.json of a run") from error


def write_metrics(folder: Path, history: list[dict[str, float]]) -> None:
    """Write metrics.csv, a line for each row. Errors: UserError."""
    rows = ([f"{row[column]:.7g}" for column in history[0]] for row in history)
    write_csv(folder / "metrics.csv", history[0], rows)


def claim_folder(run_dir: Path | None, name: str, output: Path) -> Path:
    """Make the folder of a new run: `run_dir`, or the next of runs/NAME-001, runs/NAME-002, ...

    Errors: UserError, before anything is made, when it is used or `output` cannot be written.
    """
    while True:
        folder = run_dir or _next_folder(name)
        refuse_if_used(folder)
        check_output(output, folder)
        try:
            folder.mkdir(parents=True, exist_ok=run_dir is not None)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise
            # another run has just taken that number


def _next_folder(name: str) -> Path:
    taken = [path.name.rpartition("-")[2] for path in Path("runs").glob(f"{name}-*")]
    number = 1 + max((int(end) for end in taken if end.isdecimal()), default=0)
    return Path("runs", f"{name}-{number:03d}")


def refuse_if_used(folder: Path) -> None:
    """Errors: UserError when the folder of a new run is not empty."""
    if folder.is_dir():
        names = [path.name for path in folder.iterdir()]
        if any(name != LOCK and not name.endswith(".tmp") for name in names):
            raise UserError(f"{folder} is not empty: name a new folder, or --resume {folder}")


def check_output(path: Path, folder: Path) -> None:
    """Errors: UserError if the run in `folder` cannot write its network to --output `path`."""
    real, run = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    own = Path(os.path.realpath(path.parent))  # a symbolic link is replaced, in its own folder
    parent = next((above for above in (own, *own.parents) if above.exists()), own)
    name = path.name.casefold()  # some file systems do not tell LAST.PT from last.pt
    in_a_run = real.parent == run or (real.parent / "config.json").exists()
    if (path.exists() and not path.is_file()) or real in (run, *run.parents):
        problem = "it is not a regular file"
    elif in_a_run and (name in CHECKPOINTS or name.endswith(OTHER_SUFFIXES)):
        problem = "a run writes a file of that name there itself"
    elif not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        problem = f"{parent} is not a folder that can be written to"
    else:
        return
    raise UserError(f"--output {path} cannot be written: {problem}")


def lock(folder: Path) -> BinaryIO:
    """Keep other processes out of `folder` until the file is closed, or this process ends.

    Not on Windows, nor on a disk without locks. Errors: UserError if another process has locked it.
    """
    check_regular(folder / LOCK)
    file = open(folder / LOCK, "ab")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"{folder} is in use: another process is at work on this run") from error
    except OSError:  # some network file systems have no locks
        pass
    return file


def check_lock(file: BinaryIO, folder: Path) -> None:
    """Errors: UserError if `file` is no longer the lock of `folder`."""
    try:
        same = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
    except OSError:
        same = False
    if not same:
        raise UserError(f"{folder} was moved or removed: this run cannot write there any more")


def provenance(device: torch.device, amp: torch.dtype | None) -> dict:
    """Where numbers come from: command, time, commit, versions, hardware and precision."""
    here, commit = Path(__file__), None
    ours = ["git", "ls-files", "--error-unmatch", here.name]  # not a copy in another repository
    describe = "git describe --always --dirty --abbrev=12 --exclude=*".split()
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        for git in (ours, describe):
            done = subprocess.run(git, cwd=here.parent, capture_output=True, text=True, check=True)
        commit = done.stdout.strip()
    return {
        "command": shlex.join([*parallel.launcher().split(), *sys.argv]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_commit": commit,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "hardware": hardware(device),
        "precision": "float32" if amp is None else str(amp).removeprefix("torch."),
    }
