"""Weight files from the web, downloaded once."""

import hashlib
import os
import re
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

from experiment.errors import UserError
from experiment.files import load, temporary_beside

SCHEMES = ("https://", "http://", "file://")
TIMEOUT = 30  # seconds without an answer


def is_url(source: str) -> bool:
    """Whether `source` is the address of a weight file, and not its path."""
    return source.lower().startswith(SCHEMES)


def local_file(source: str) -> Path:
    """The path of a weight file, which is downloaded first if `source` is a URL.

    It is kept in PyTorch's hub cache. Its name there begins with a hash of the URL, as many hubs
    give all files the same name. `URL#sha256=HEX` checks the content. A file that is cut short, or
    that `torch.load` does not read with weights_only=True, does not enter the cache. Size and
    SHA-256 are printed. Errors: UserError.
    """
    if not is_url(source):
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
        with temporary_beside(path) as file:
            _download(url, file)
            file.close()
            _check_sha256(file.name, url, expected)
            try:
                load(file.name)
            except UserError as error:
                raise UserError(f"{url} gave no weight file, or not a safe one") from error
            os.replace(file.name, path)
    print(f"{url}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256(path)}", flush=True)
    return path


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check_sha256(path: str | Path, url: str, expected: str | None) -> None:
    found = sha256(path)
    if expected is not None and found != expected.lower():
        raise UserError(f"{url} has the SHA-256 {found}, not {expected!r}")


def _download(url: str, file: BinaryIO) -> None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            quiet = not sys.stderr.isatty()
            with tqdm(total=size or None, unit="B", unit_scale=True, disable=quiet) as bar:
                while block := answer.read(2**20):
                    file.write(block)
                    bar.update(len(block))
    except (HTTPException, urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url} cannot be downloaded: {reason}") from error
    except ValueError as error:  # an invalid address or header
        raise UserError(f"{url} cannot be downloaded: {error}") from error
    if size and file.tell() != size:
        raise UserError(f"{url}: the download was cut short, {file.tell()} of {size} bytes came")
