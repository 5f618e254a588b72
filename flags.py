"""The command line that the scripts share: one spelling, one meaning and one check for every flag.

A script builds its parser out of these groups, naming its own recipe where it calls them.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiment import read_config

# What may differ when a run goes on: where things lie and what they run on, but nothing that shapes the result.
FREE_ON_RESUME = {
    "resume",
    "run_dir",
    "device",
    "output",
    "data_dir",
    "synthetic_data_dir",
    "teacher_weights",
}


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows `description` as it is and takes no abbreviated flags."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    return parse


def real(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number from `low` to `high`; with `above`, `low` itself is excluded."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number {'above' if above else 'from'} {low:g} to {high:g}"
            )
        return value

    return parse


def device(text: str) -> str:
    """An argparse type: auto, cpu, cuda or cuda:N."""
    if text != "auto":
        try:
            kind = torch.device(text).type
        except RuntimeError:
            kind = None
        if kind not in ("cpu", "cuda"):
            raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda and cuda:N")
    return text


def add_data_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--data_dir, --limit and --demo; returns the group, for what a script adds to it."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="holds CIFAR-10, which is downloaded to there when absent [%(default)s]",
    )
    group.add_argument(
        "--limit",
        type=whole(1, 10**9),
        metavar="N",
        help="only the first N images of each set, for a quick try [all]",
    )
    group.add_argument(
        "--demo",
        action="store_true",
        help="drawn pictures instead of any data: no files, no network, a minute on a CPU; "
        "the defaults shrink with it, and all it writes is under runs/demo",
    )
    return group


def add_optimisation_flags(parser: argparse.ArgumentParser, **recipe) -> None:
    """Everything from --epochs to --gamma; `recipe` gives the defaults that differ between scripts."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=whole(1, 100_000), metavar="N", help="length of the run [%(default)s]")
    add("--batch_size", type=whole(2, 10**6), metavar="N", help="images a step [%(default)s]")
    add("--optimizer", choices=("sgd", "adam"), help="[%(default)s]")
    add(
        "--lr", type=real(0, 1000, above=True), metavar="X", help="peak learning rate [%(default)s]"
    )
    add("--momentum", type=real(0, 0.9999), metavar="X", help="of SGD [%(default)s]")
    add("--nesterov", action="store_true", help="take Nesterov's momentum for SGD")
    add("--weight_decay", type=real(0, 10), metavar="X", help="[%(default)s]")
    add(
        "--scheduler",
        choices=("none", "multistep", "cosine", "onecycle"),
        help="how the rate changes, batch by batch [%(default)s]",
    )
    add(
        "--milestones",
        type=real(0, 1, above=True),
        nargs="+",
        metavar="X",
        help="where multistep drops the rate, as fractions of the run [0.5 0.8]",
    )
    add(
        "--gamma",
        type=real(0, 1, above=True),
        metavar="X",
        help="factor of each drop [%(default)s]",
    )
    shared = dict(batch_size=128, momentum=0.9, milestones=[0.5, 0.8], gamma=0.1)
    parser.set_defaults(**shared, **recipe)


def add_run_flags(parser: argparse.ArgumentParser, name: str, output: str) -> None:
    """--seed, --device, --amp, --run_dir, --resume and --output."""
    add = parser.add_argument_group("run").add_argument
    add(
        "--seed",
        type=whole(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of the weights, the order of the images and their augmentation [%(default)s]",
    )
    add("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    add(
        "--amp",
        choices=("auto", "bf16", "off"),
        default="auto",
        help="bfloat16 autocast; auto: on CUDA, not on the CPU [%(default)s]",
    )
    add(
        "--run_dir",
        type=Path,
        metavar="DIR",
        help=f"a new folder for the run [runs/{name}-001 ...]",
    )
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the stopped run in DIR, as it was started",
    )
    add(
        "--output",
        type=Path,
        default=Path(output),
        metavar="FILE",
        help="the finished network [%(default)s]",
    )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, demo: dict
) -> argparse.Namespace:
    """Parse `argv`; --demo brings the defaults of `demo`, --resume the flags of the stopped run.

    Flags that would turn the resumed run into another one are refused. Errors: UserError when there is
    no run to resume.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**demo)
        args = parser.parse_args(argv)
    if args.resume is None:
        return args
    stored = _as_tokens(read_config(args.resume)["args"])
    before, args = parser.parse_args(stored), parser.parse_args([*stored, *argv])
    for key, value in vars(args).items():
        if key not in FREE_ON_RESUME and value != (was := getattr(before, key)):
            parser.error(f"{args.resume} was started with --{key} {was}: --resume cannot change it")
    return args


def _as_tokens(args: dict) -> list[str]:
    """The flags in a `config.json` as one would have typed them, so that argparse checks them again."""
    tokens = []
    for key, value in args.items():
        if key in ("resume", "run_dir") or value is None or value is False:
            continue
        if isinstance(value, list):
            tokens += [f"--{key}", *map(str, value)]
        else:
            tokens.append(f"--{key}" if value is True else f"--{key}={value}")
    return tokens
