"""An argument parser that refuses flags which would do nothing, and the types of its flags."""

import argparse
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from experiment.errors import one_line


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and reports an error in one line.

    `arguments` names the positional ones, for the first line of --help.
    """

    def __init__(self, description: str, arguments: str = "") -> None:
        super().__init__(
            usage=f"python %(prog)s [flags] {arguments}".strip(),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.source = ""  # the file of the flags, if not the command line
        self.needs: list[tuple[str, str, Callable[[Namespace], bool]]] = []

    def add_need(self, flag: str, needs: str, has: Callable[[Namespace], bool]) -> None:
        """Refuse `flag`, unless it has its default or `has(args)`; `needs` is for the message."""
        self.needs.append((flag, needs, has))

    def error(self, message: str) -> NoReturn:
        message = one_line(f"{self.source}{message} (--help lists the flags)")
        self.exit(2, f"error: {message}\n")


def int_in(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return value

    return check


def float_in(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`; with `above`, not `low` itself."""

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            start = "above" if above else "from"
            raise argparse.ArgumentTypeError(f"{text!r} is no number {start} {low:g} to {high:g}")
        return value

    return check


def device(text: str) -> str:
    """An argparse type: auto, cpu, cuda, cuda:N, mps, xpu or xpu:N."""
    try:
        kind = "cpu" if text == "auto" else torch.device(text).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N, mps, xpu")
    return text


def parse(parser: Parser, argv: Sequence[str] | None, demo: dict | None = None) -> Namespace:
    """Parse `argv`; with --demo, the defaults are those in `demo`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    if demo is None:
        parser.set_defaults(demo=False)
    elif args.demo:
        parser.set_defaults(**demo)
    args = parser.parse_args(argv)
    for flag, needs, has in parser.needs:
        if getattr(args, flag, None) != parser.get_default(flag) and not has(args):
            parser.error(f"--{flag} needs {needs}")
    return args


def as_tokens(args: dict) -> list[str]:
    """Flags from a config.json as one would type them, so that argparse checks them again."""
    tokens = []
    for key, value in args.items():
        if key in ("resume", "run_dir") or value is None or value is False:
            continue
        if isinstance(value, list) and len(value) > 1:
            tokens += [f"--{key}", *map(str, value)]
        elif isinstance(value, list):  # the one value may begin with a dash
            tokens += [f"--{key}={text}" for text in value]
        else:
            tokens.append(f"--{key}" if value is True else f"--{key}={value}")
    return tokens
