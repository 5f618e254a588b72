"""The command line that the scripts share: one name, one meaning and one check for every flag.

A script builds its parser from these groups and gives its own recipe as their defaults. Nothing
here touches the disk. The flags are tables, which `ruff format` leaves alone.
"""

import argparse
import functools
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from experiment.errors import one_line

# ------------------------------------------------------------------------------------- the parser


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, says errors in one line; `parse` checks what `add_need` adds.

    `arguments` names those that are required, for the first line of --help.
    """

    def __init__(self, description: str, arguments: str = "") -> None:
        super().__init__(
            prog=Path(sys.argv[0]).as_posix(),
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


def _number_in(
    kind: type, name: str, low: float, high: float, above: bool = False
) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`; with `above`, not `low` itself."""

    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            start = "above" if above else "from"
            raise argparse.ArgumentTypeError(f"{text!r} is no {name} {start} {low} to {high}")
        return value

    return check


int_in = functools.partial(_number_in, int, "whole number")
float_in = functools.partial(_number_in, float, "number")


def device(text: str) -> str:
    """An argparse type: auto, cpu, cuda, cuda:N, mps, xpu or xpu:N."""
    try:
        kind = "cpu" if text == "auto" else torch.device(text).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, mps, xpu")
    return text


def parse(parser: Parser, argv: Sequence[str] | None, demo: dict | None = None) -> Namespace:
    """Parse `argv`; with --demo, the defaults are those in `demo`."""
    if demo and parser.parse_args(argv).demo:
        parser.set_defaults(**demo)
    args = parser.parse_args(argv)
    for flag, needs, has in parser.needs:
        if getattr(args, flag) != parser.get_default(flag) and not has(args):
            parser.error(f"--{flag} needs {needs}")
    return args


def as_typed(value: object) -> str:
    """A default as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


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


# ------------------------------------------------------------------------------ groups of flags


def add_data_flags(parser: Parser, demo: dict) -> argparse._ArgumentGroup:
    """--dataset to --demo, whose defaults are `demo`; returns the group, for further flags."""
    group = parser.add_argument_group("data")
    changes = " ".join(f"--{key} {as_typed(value)}" for key, value in demo.items())
    add, need = group.add_argument, parser.add_need
    # fmt: off
    add("--dataset", choices=("cifar10", "cifar100"), default="cifar10",
        help="the real images and the classes [%(default)s]")
    add("--data_dir", type=Path, default=Path("data"), metavar="DIR",
        help="folder of the real images, which are downloaded if missing [%(default)s]")
    add("--limit", type=int_in(1, 10**9), metavar="N",
        help="use only the first N images of each set, for a quick test [all]")
    add("--demo", action="store_true",
        help="use small drawn pictures instead of data, about a minute on a CPU; the defaults are "
        f"then {changes}, and runs go to runs/demo")
    # fmt: on
    for flag in ("dataset", "data_dir"):
        need(flag, "leaving --demo out", lambda a: not a.demo)
    return group


def add_model_flags(
    parser: Parser, architectures: Sequence[str], stems: Sequence[str]
) -> argparse._ArgumentGroup:
    """--arch and --stem of the network that the script trains; the first of each is the default."""
    group = parser.add_argument_group("model")
    names = ", ".join(architectures)
    # fmt: off
    group.add_argument("--arch", choices=architectures, default=architectures[0], metavar="NAME",
        help=f"the network to train: {names} [%(default)s]")
    group.add_argument("--stem", choices=stems, default=stems[0],
        help="made for 32x32 images, or torchvision's own for 224x224 [%(default)s]")
    # fmt: on
    return group


def add_optimisation_flags(parser: Parser, recipe: dict) -> None:
    """--epochs to --warmup; `recipe` holds the defaults of the script."""
    recipe = dict(milestones=[0.5, 0.8], gamma=0.1, momentum=0.9, warmup=0.0) | recipe
    add, need = parser.add_argument_group("optimisation").add_argument, parser.add_need
    # fmt: off
    add("--epochs", type=int_in(1, 10**5), metavar="N", help="length of the run [%(default)s]")
    add("--batch_size", type=int_in(2, 10**6), metavar="N", help="images a step [%(default)s]")
    add("--optimizer", choices=("sgd", "adam", "muon"), help="optimizer [%(default)s]")
    add("--lr", type=float_in(0, 1000, above=True), metavar="X",
        help="peak rate; of Muon, the filters' [%(default)s]")
    add("--momentum", type=float_in(0, 0.9999), metavar="X",
        help="of SGD, or of Muon's filters [%(default)s]")
    add("--nesterov", action="store_true", help="Nesterov momentum in SGD")
    add("--weight_decay", type=float_in(0, 10), metavar="X",
        help="L2 penalty; with Muon, of all but the filters [%(default)s]")
    add("--scheduler", choices=("none", "multistep", "cosine", "onecycle", "linear"),
        help="schedule of the learning rate, applied every batch [%(default)s]")
    add("--milestones", type=float_in(0, 1, above=True), nargs="+", metavar="X",
        help="when multistep drops the learning rate, as fractions of the run "
        f"[{as_typed(recipe['milestones'])}]")
    add("--gamma", type=float_in(0, 1, above=True), metavar="X",
        help="factor of the learning rate at each milestone [%(default)s]")
    add("--warmup", type=float_in(0, 0.9), metavar="X",
        help="fraction of the run in which linear rises before it falls [%(default)s]")
    # fmt: on
    parser.set_defaults(**recipe)
    need("momentum", "--optimizer sgd or muon", lambda a: a.optimizer != "adam")
    need("nesterov", "--optimizer sgd", lambda a: a.optimizer == "sgd")
    need("nesterov", "a --momentum above 0", lambda a: a.momentum > 0)
    need("milestones", "--scheduler multistep", lambda a: a.scheduler == "multistep")
    need("gamma", "--scheduler multistep", lambda a: a.scheduler == "multistep")
    need("warmup", "--scheduler linear", lambda a: a.scheduler == "linear")


def add_augmentation_flags(parser: Parser, choices: Collection[str]) -> None:
    """--augment, one of `choices`."""
    add = parser.add_argument_group("augmentation").add_argument
    # fmt: off
    add("--augment", choices=choices, default="crop",
        help="crop: a random crop after padding by 4, and a random flip; reflect: a random crop "
        "after reflecting 2 pixels, and a flip in every other epoch; rrc_jitter: a random resized "
        "crop, colour jitter and a random flip [%(default)s]")
    # fmt: on


def add_run_flags(parser: Parser, name: str, output: str) -> None:
    """--seed to --output."""
    add = parser.add_argument_group("run").add_argument
    # fmt: off
    add("--seed", type=int_in(0, 2**32 - 1), default=0, metavar="N",
        help="seed of initial weights, order of the images and augmentation [%(default)s]")
    add("--device", type=device, default="auto",
        help="auto, cpu, cuda, cuda:N, mps, xpu or xpu:N [%(default)s]")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="autocast; auto is bf16 on CUDA GPUs from Ampere on and, on Linux, on CPUs with "
        "avx512_bf16 or amx_bf16, fp16 with loss scaling on older CUDA GPUs, else off "
        "[%(default)s]")
    add("--no_cuda_graph", action="store_true",
        help="on CUDA, launch every kernel from Python instead of replaying a CUDA graph")
    add("--run_dir", type=Path, metavar="DIR", help=f"new folder of the run [runs/{name}-001, ...]")
    add("--resume", type=Path, metavar="DIR", help="resume the run in DIR, with its flags")
    add("--output", type=Path, default=Path(output), metavar="FILE",
        help="the finished network [%(default)s]")
    # fmt: on
    parser.set_defaults(demo=False)  # also where there is no --demo
