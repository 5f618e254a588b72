"""Errors that a user can put right: one line on stderr and an exit code, without a traceback."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from experiment import parallel
from experiment.streams import steady_output

# the CPU, on Linux and on Windows; MPS and CUDA; cuBLAS
NO_MEMORY = "can't allocate memory|not enough memory|out of memory|ALLOC_FAILED"


class UserError(Exception):
    """Something that the user can put right; its message is shown as one line."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the run; `number` is the signal's."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn UserError, OSError and lack of memory into one line on stderr and exit code 1.

    In the block, output that cannot be written is dropped: see experiment.streams. After success
    the process leaves the other ranks.
    """
    if problem := parallel.environment_problem():
        sys.exit(f"error: {problem}")
    with steady_output():
        try:
            yield
            parallel.leave_process_group()
        except (UserError, OSError) as error:
            _exit(str(error))
        except Stopped as stop:
            if parallel.is_rank_zero():
                sys.stderr.write(f"\n{stop}\n")
            sys.exit(128 + stop.number)
        except (MemoryError, RuntimeError) as error:  # CUDA's lack of memory is a RuntimeError, too
            for cause in (error, error.__context__):  # the end of a graph's capture hides the first
                if is_lack_of_memory(cause):
                    first = [*str(cause).splitlines(), "out of memory."][0]
                    _exit(f"{first.rstrip('.')}. Smaller batches or fewer images need less.")
            if not parallel.is_lost_rank(error):
                raise
            _exit(f"{parallel.RANK_LOST}: {error}")
        except KeyboardInterrupt:
            sys.stderr.write("\ninterrupted\n")
            sys.exit(130)


def is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether the CPU or the device had too little memory, whatever the error's type."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or bool(re.search(NO_MEMORY, str(error)))


def one_line(message: str) -> str:
    """The message without line breaks, and without its middle if it is very long."""
    line = " ".join(message.split())
    return line if len(line) <= 4000 else f"{line[:3000]} [...] {line[-900:]}"


def _exit(message: str) -> NoReturn:
    if not parallel.is_rank_zero():
        time.sleep(5)  # rank 0 most likely reports the same, and torchrun then ends this process
        message = f"rank {parallel.rank()}: {message}"
    sys.exit("error: " + one_line(message))
