"""The command line that the scripts share: one name, one meaning and one check for every flag.

A script builds its parser from these groups and names its own recipe where it calls them. Every
number is checked before anything else happens, and what is wrong is said in one line.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

import parallel
from augmentations import AUGMENTATIONS, MIXES
from experiment import UserError, read_config, refuse_if_used

# What may change when a run goes on: where things lie and what it runs on, not what it computes.
FREE_ON_RESUME = (
    *("resume", "output", "data_dir", "synthetic_data_dir", "val_dir", "teacher_weights"),
    *("ground_truth", "label_file", "device", "no_graph", "workers"),
)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and says in one line what is wrong with a command.

    `arguments` are those without a name, for the first line of --help.
    """

    def __init__(self, description: str, arguments: str = "") -> None:
        super().__init__(
            usage=f"python %(prog)s [flags] {arguments}".strip(),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.source = ""  # where the flags come from, when not from the command line

    def error(self, message: str) -> NoReturn:
        line = " ".join(f"error: {self.source}{message} (--help lists the flags)".split())
        self.exit(2, line + "\n")


def whole(low: int, high: int) -> Callable[[str], int]:
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


def number(low: float, high: float, above: bool = False) -> Callable[[str], float]:
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
    """An argparse type: auto, cpu, cuda or cuda:N."""
    try:
        kind = "cpu" if text == "auto" else torch.device(text).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda and cuda:N")
    return text


def add_data_flags(parser: Parser) -> argparse._ArgumentGroup:
    """From --dataset to --demo; returns the group, for what a script adds to it."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=("cifar10", "cifar100"),
        default="cifar10",
        help="the real images, and the classes [%(default)s]",
    )
    group.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="holds the real images, which are downloaded to there when absent [%(default)s]",
    )
    group.add_argument(
        "--limit",
        type=whole(1, 10**9),
        metavar="N",
        help="take only the first N images of each set, for a quick try [all]",
    )
    group.add_argument(
        "--demo",
        action="store_true",
        help="run on small drawn pictures, without any data and in about a minute on a CPU: other "
        "defaults, and all that is written goes to runs/demo",
    )
    return group


def add_optimisation_flags(parser: Parser, **recipe) -> None:
    """Everything from --epochs to --gamma; `recipe` holds the defaults of the script."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=whole(1, 10**5), metavar="N", help="length of the run [%(default)s]")
    add("--batch_size", type=whole(2, 10**6), metavar="N", help="images a step [%(default)s]")
    add("--optimizer", choices=("sgd", "adam"), help="rule of the update [%(default)s]")
    add("--lr", type=number(0, 1000, above=True), metavar="X", help="peak rate [%(default)s]")
    add("--momentum", type=number(0, 0.9999), metavar="X", help="of SGD [%(default)s]")
    add("--nesterov", action="store_true", help="use Nesterov's momentum in SGD")
    add(
        "--ema",
        type=number(0, 0.99999),
        metavar="X",
        help="test and keep an exponential moving average of the weights, of this decay a batch; "
        "0 for none [%(default)s]",
    )
    add("--weight_decay", type=number(0, 10), metavar="X", help="L2 penalty [%(default)s]")
    add(
        "--scheduler",
        choices=("none", "multistep", "cosine", "onecycle"),
        help="how the rate changes, batch by batch [%(default)s]",
    )
    add(
        "--milestones",
        type=number(0, 1, above=True),
        nargs="+",
        metavar="X",
        help="where multistep drops the rate, as fractions of the run %(default)s",
    )
    add("--gamma", type=number(0, 1, above=True), metavar="X", help="factor of each [%(default)s]")
    parser.set_defaults(
        batch_size=128, momentum=0.9, ema=0.0, milestones=[0.5, 0.8], gamma=0.1, **recipe
    )


def add_augmentation_flags(parser: Parser, augmentations: Sequence[str] = AUGMENTATIONS) -> None:
    """--augment, if there is a choice, --mix and --mix_alpha: what training images go through."""
    add = parser.add_argument_group("augmentation").add_argument
    if augmentations:
        add(
            "--augment",
            choices=tuple(augmentations),
            default="crop",
            help="crop: shifted by up to 4 pixels and mirrored; strong: resized parts with other "
            "colours, mirrored [%(default)s]",
        )
    add(
        "--mix",
        choices=("none", *MIXES),
        default="none",
        help="mix every batch with itself; teacher and student see the same [%(default)s]",
    )
    add(
        "--mix_alpha",
        type=number(0, 100, above=True),
        default=1.0,
        metavar="X",
        help="shares of mixed images come from Beta(X, X) [%(default)s]",
    )


def add_temperature_flag(add: Callable) -> None:
    """--temperature of the distillation, to a group whose `add_argument` is `add`."""
    add(
        "--temperature",
        "--kd_temp",
        type=number(0, 1000, above=True),
        default=10.0,
        metavar="T",
        help="softens the outputs of both [%(default)s]",
    )


def add_run_flags(parser: Parser, kind: str, output: str) -> None:
    """From --seed to --output: what any run of any script has."""
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
        help="bfloat16 autocast; auto means bf16 on CUDA and off on the CPU [%(default)s]",
    )
    add(
        "--no_graph",
        action="store_true",
        help="on CUDA, launch every kernel from Python instead of replaying a recorded graph",
    )
    add(
        "--sync_bn",
        action="store_true",
        help="with torchrun, on GPUs: BatchNorm over the whole batch, not a process's part of it",
    )
    add("--run_dir", type=Path, metavar="DIR", help=f"new folder of the run [runs/{kind}-001, ...]")
    add("--resume", type=Path, metavar="DIR", help="go on with the stopped run in DIR")
    add(
        "--output",
        type=Path,
        default=Path(output),
        metavar="FILE",
        help="the finished network [%(default)s]",
    )


def parse(
    parser: Parser, argv: Sequence[str] | None, kind: str, demo: dict | None = None
) -> argparse.Namespace:
    """Parse `argv`; --demo brings the defaults in `demo`, --resume the flags of the stopped run.

    `kind` is what the script makes, such as "teacher". Flags that would make another run of the one
    to be resumed are refused. Errors: UserError when there is no such run.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    if demo is None:
        parser.set_defaults(demo=False)
    elif args.demo:
        parser.set_defaults(**demo)
    args = parser.parse_args(argv)
    data = ("dataset", "data_dir", "synthetic_data_dir", "download_synthetic")
    for key in (*data, "train_on", "skip_bad_images"):
        if args.demo and getattr(args, key, None) != parser.get_default(key):
            parser.error(f"--demo takes no data: leave --{key} out")
    if args.nesterov and args.momentum == 0:
        parser.error("--nesterov needs a --momentum above 0")
    if args.resume is None:
        if args.run_dir is not None and parallel.leads():
            refuse_if_used(args.run_dir)
        return args
    if args.run_dir is not None:
        parser.error("--resume goes on in the folder of the run: leave --run_dir out")
    config = read_config(args.resume)
    if config.get("kind") != kind:
        raise UserError(f"{args.resume} is the run of a {config.get('kind')}, not of a {kind}")
    stored = _as_tokens(config["args"])
    parser.source = f"{args.resume / 'config.json'}: "
    before = parser.parse_args(stored)
    parser.source = ""
    args = parser.parse_args([*stored, *argv])
    for key, value in vars(args).items():
        was = getattr(before, key)
        if value != was and key not in FREE_ON_RESUME:
            parser.error(f"{args.resume} was started with --{key} {was}: --resume cannot change it")
    return args


def _as_tokens(args: dict) -> list[str]:
    """The flags in a `config.json` as one would type them, so that argparse checks them again."""
    tokens = []
    for key, value in args.items():
        if key in ("resume", "run_dir") or value is None or value is False:
            continue
        if isinstance(value, list):
            tokens += [f"--{key}", *map(str, value)]
        else:
            tokens.append(f"--{key}" if value is True else f"--{key}={value}")
    return tokens
