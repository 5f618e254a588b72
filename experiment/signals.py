"""SIGINT, SIGTERM and SIGHUP stop a run, but never in the middle of a write."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from experiment import parallel

# SIGHUP: the terminal, or the connection to it, is closed. Windows has no such signal.
STOP_SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP"))


class StopSignals:
    """Calls `stop(number)`, which raises, when a signal arrives or, in `held()`, after the block.

    A second signal of the same kind ends the process at once. One of another kind does not: a
    logout sends SIGHUP and SIGTERM. Under torchrun none does: it sends a second signal itself, and
    kills later.
    """

    def __init__(self, stop: Callable[[int], None]) -> None:
        self.stop = stop
        self.received: int | None = None
        self.holding = False
        self.handlers: dict[int, object] = {}

    def install(self) -> None:
        """Replace the signal handlers."""
        for number in STOP_SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            # nohup's SIGHUP stays ignored; SIGINT, which a script's "&" ignores, is handled again
            if number == signal.SIGINT or not ignored:
                self.handlers[number] = signal.signal(number, self._on_signal) or signal.SIG_DFL

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that no signal interrupts: one that arrives in it stops the run at its end."""
        before, self.holding = self.holding, True
        try:
            yield
        finally:
            self.holding = before
        if self.received and not self.holding:
            self.stop(self.received)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.received is None:
            self.received = number
            if not self.holding:
                self.stop(number)
        elif number == self.received and parallel.world_size() == 1:
            self.restore()
            signal.raise_signal(number)
