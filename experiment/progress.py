"""The console output of a run while it trains."""

import sys
import time

from torch import Tensor
from tqdm import tqdm

from experiment import parallel

FORECAST_AFTER = 20.0  # seconds of training
BAR = "{percentage:3.0f}% {bar} epoch {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """One line per epoch; on a terminal a progress bar, elsewhere a forecast in a long first epoch.

    In a resumed run, `done` of the `epochs` were trained before.
    """

    def __init__(self, done: int, epochs: int) -> None:
        self.done, self.left = done, epochs - done
        terminal = sys.stderr.isatty() and parallel.is_rank_zero()
        self.bar = tqdm(total=epochs, initial=done, bar_format=BAR, disable=not terminal)
        self.next_look = 0.0
        self.first: tuple[float, float] | None = None  # when the first batch was done, and its part

    def on_batch(self, fraction: float, loss: Tensor) -> None:
        """Show the fraction of the epoch that is done; once a second, wait for the loss."""
        now = time.monotonic()
        if self.bar.disable:
            self._forecast(fraction, now)
            return
        if now >= self.next_look:
            self.next_look = now + 1
            self.bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
        self.bar.update(self.done + fraction - self.bar.n)

    def _forecast(self, fraction: float, now: float) -> None:
        if self.first is None:  # the first batch takes longer than the others
            self.first = now, fraction
        began, part = self.first
        if self.left and now - began > FORECAST_AFTER:
            minutes = (now - began) / (fraction - part) * self.left / 60
            print(f"about {minutes:.0f} min of training for {self.left} epochs", flush=True)
            self.left = 0

    def show(self, row: dict[str, float]) -> None:
        """Print a row of metrics.csv."""
        values = "  ".join(f"{key} {_short(x)}" for key, x in row.items() if key != "epoch")
        tqdm.write(f"epoch {row['epoch']}/{self.bar.total}  {values}", file=sys.stdout)
        sys.stdout.flush()
        self.done, self.left = row["epoch"], 0
        self.bar.update(self.done - self.bar.n)


def _short(x: float) -> str:
    return f"{x:.4g}" if abs(x) < 1e4 else f"{x:.0f}"  # not 1.235e+04
