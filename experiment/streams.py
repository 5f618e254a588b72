"""Output that never ends a run: a broken pipe or an ASCII terminal does not stop a training."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

OUTPUT_LOST = "note: standard output cannot be written; it is dropped from here on\n"


class SteadyStream:
    """The text stream `stream`, which drops what it cannot write instead of raising.

    `lost` is printed on stderr when it begins to drop. `stream` is None if it was closed before
    Python started.
    """

    def __init__(self, stream: TextIO | None, lost: str = "") -> None:
        self.stream, self.lost = stream, lost
        if stream is None:
            self._drop()
        with suppress(AttributeError, OSError, ValueError):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except (OSError, ValueError):  # a pipe, a terminal or a file that is gone or full
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        nowhere = open(os.devnull, "w")  # noqa: SIM115
        with suppress(AttributeError, OSError, ValueError):  # what is buffered still leaves there
            os.dup2(nowhere.fileno(), self.stream.fileno())
        self.stream = nowhere
        if self.lost:
            sys.stderr.write(self.lost)


@contextmanager
def steady_output() -> Iterator[None]:
    """Make stdout and stderr steady: nothing that is printed in the block raises an error."""
    before = sys.stdout, sys.stderr
    sys.stderr = SteadyStream(sys.stderr)
    sys.stdout = SteadyStream(sys.stdout, OUTPUT_LOST)
    try:
        yield
    finally:
        sys.stdout.flush()  # here, where a broken pipe does no harm
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
