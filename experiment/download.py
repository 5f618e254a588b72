"""Weight files from the web, downloaded once."""

import hashlib
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import torch

from experiment.errors import UserError
from experiment.files import load

SCHEMES = ("https://", "http://", "file://")
TIMEOUT = 30  # seconds without an answer


def local_file(source: str) -> Path:
    """The path of a weight file, which is downloaded first if `source` is a URL.

    It is kept in PyTorch's hub cache. Its name there begins with a hash of the URL, as many hubs
    give all files the same name. `URL#sha256=HEX` checks the content. A file that is cut short, or
    that `torch.load` does not read with weights_only=True, does not enter the cache. Size and
    SHA-256 are printed. Errors: UserError.
    """
    if not source.lower().startswith(SCHEMES):
        return Path(source)
    url, asked, expected = source.partition("#sha256=")
    expected = expected if asked else None  # an empty one matches no file
    name = re.split("[?#]", url)[0].rpartition("/")[2] or "weights"
    tag = hashlib.sha256(os.fsencode(url)).hexdigest()[:16]
    path = Path(torch.hub.get_dir(), "checkpoints", f"{tag}-{name[-50:]}")  # 255 bytes at most
    if path.is_file():
        _check_sha256(path, url, expected)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as private:
            new = Path(private, "weights")
            _download(url, new)
            _check_sha256(new, url, expected)
            os.replace(new, path)
    print(f"{url}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256(path)}", flush=True)
    return path


@contextmanager
def timeout() -> Iterator[None]:
    """A block in which a download without an answer fails; PyTorch would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _check_sha256(path: Path, url: str, expected: str | None) -> None:
    if expected is not None and (found := sha256(path)) != expected.lower():
        raise UserError(f"{url} has the SHA-256 {found}, not {expected!r}")


def _download(url: str, path: Path) -> None:
    try:
        with timeout():
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
    except (HTTPException, OSError, ValueError) as error:  # ValueError: an invalid address
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url} cannot be downloaded: {reason}") from error
    try:
        load(path)
    except UserError as error:
        why = "no weight file, not a safe one, or only a part of one"
        raise UserError(f"{url} gave {why}") from error
