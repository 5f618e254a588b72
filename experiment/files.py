"""Files that are complete or absent: atomic writes and safe loads."""

import csv
import io
import itertools
import json
import os
import sys
import time
import uuid
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import BinaryIO

import torch
from torch import Tensor

from experiment.errors import UserError, is_lack_of_memory


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write to a temporary file, flush it to the disk, move it to `path`: never half a file.

    Errors: UserError.
    """
    name = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(name, "xb") as file:
            yield file
            _flush(file)
        _replace(name, path)
    except OSError as error:  # on a full disk the error names no file
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            name.unlink()


def write_json(path: Path, value: object) -> None:
    """Write `value`, in which other types become strings. Errors: UserError."""

    def text(other: object) -> str:  # of a path, one that every system reads
        return other.as_posix() if isinstance(other, PurePath) else str(other)

    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, default=text) + "\n").encode())


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Write a table with a line for each row. Errors: UserError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def _replace(name: Path, path: Path) -> None:
    """`os.replace`, which Windows refuses for as long as a virus scanner reads the old file."""
    for seconds in (0.1, 1, 5):
        try:
            return os.replace(name, path)
        except PermissionError:
            if sys.platform != "win32":
                raise
            time.sleep(seconds)
    os.replace(name, path)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def save(path: Path, state: dict) -> None:
    """`torch.save`, atomically. Errors: UserError."""
    with atomic_write(path) as file:
        file.write(_serialised(state))


def save_without_overwriting(path: Path, state: dict) -> Path | None:
    """`save`; a file that is at `path` already is renamed to name.001.pth, or the next free number.

    Returns its new name. The new file is complete before the old one moves. Errors: UserError.
    """
    check_regular(path)
    kept = None
    with atomic_write(path) as file:
        file.write(_serialised(state))
        _flush(file)
        if os.path.lexists(path):  # now, as another process may have written it meanwhile
            numbered = (f"{path.stem}.{number:03d}{path.suffix}" for number in itertools.count(1))
            kept = next(new for new in map(path.with_name, numbered) if not os.path.lexists(new))
            os.rename(path, kept)
    return kept


def check_regular(path: Path) -> None:
    """Errors: UserError if `path` is a FIFO, a device or a folder: reading it may never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file")


def _serialised(state: dict) -> memoryview:
    buffer = io.BytesIO()  # writing to a file, torch.save hides that the disk is full
    torch.save(state, buffer)
    return buffer.getbuffer()


def load(path: str | Path) -> dict:
    """Load on the CPU what `save` wrote, without ever running code from it. Errors: UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no weight file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bad file is refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything on a broken or hostile file
        lack = "too little memory" if is_lack_of_memory(error) else None
        if reason := lack or getattr(error, "strerror", None):
            raise UserError(f"{path} cannot be read: {reason}") from error
        problem = f"not a weight file, or not a safe one ({type(error).__name__})"
        raise UserError(f"{path} is {problem}; of a model, save its state_dict()") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no network: there is no state dict in it")
    if "run_id" in state and _is_damaged(path):
        raise UserError(f"{path} is damaged: its content has changed since it was written")
    return state


def _is_damaged(path: str | Path) -> bool:
    """Whether a checksum of what `save` wrote is wrong; torch.load checks none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except Exception:  # the archive itself may be damaged
        return True


def to_cpu(state: object) -> object:
    """Nested dicts, lists and tensors with all tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    return [to_cpu(value) for value in state] if isinstance(state, (list, tuple)) else state
