"""The command line that the scripts share: one name, one meaning and one check for every flag.

A script builds its parser from these groups and gives its own recipe as their defaults. Nothing
here touches the disk.
"""

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from experiment import parallel
from experiment.parser import Parser as Parser
from experiment.parser import as_tokens as as_tokens
from experiment.parser import device as device
from experiment.parser import float_in as float_in
from experiment.parser import int_in as int_in
from experiment.parser import parse as parse


def add_data_flags(parser: Parser, demo: dict) -> argparse._ArgumentGroup:
    """--dataset to --demo, whose defaults are `demo`; returns the group, for further flags."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=("cifar10", "cifar100"),
        default="cifar10",
        help="the real images and the classes [%(default)s]",
    )
    group.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder of the real images, which are downloaded if missing [%(default)s]",
    )
    group.add_argument(
        "--limit",
        type=int_in(1, 10**9),
        metavar="N",
        help="use only the first N images of each set, for a quick test [all]",
    )
    changes = " ".join(f"--{key} {as_typed(value)}" for key, value in demo.items())
    group.add_argument(
        "--demo",
        action="store_true",
        help="use small drawn pictures instead of data, about a minute on a CPU; the defaults are "
        f"then {changes}, and runs go to runs/demo",
    )
    for flag in ("dataset", "data_dir", "synthetic_data_dir", "download_synthetic", "train_on"):
        parser.add_need(flag, "leaving --demo out", lambda a: not a.demo)
    for flag in ("skip_bad_images", "download_synthetic"):
        parser.add_need(flag, "CIFAKE", _is_cifake)
    return group


def as_typed(value: object) -> str:
    """A default as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_cifake(args: Namespace) -> bool:
    return not args.demo and args.train_on == "synthetic" and args.dataset == "cifar10"


def add_model_flags(
    parser: Parser, architectures: Sequence[str], stems: Sequence[str]
) -> argparse._ArgumentGroup:
    """--arch and --stem of the network that the script trains; the first of each is the default."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--arch",
        choices=tuple(architectures),
        default=architectures[0],
        metavar="NAME",
        help="the network that is trained; a teacher's is in its file: "
        f"{', '.join(architectures)} [%(default)s]",
    )
    group.add_argument(
        "--stem",
        choices=tuple(stems),
        default=stems[0],
        help="made for 32x32 images, or torchvision's own for 224x224 [%(default)s]",
    )
    return group


def add_optimisation_flags(parser: Parser, recipe: dict) -> None:
    """--epochs to --ema; `recipe` holds the defaults of the script."""
    recipe = dict(milestones=[0.5, 0.8], gamma=0.1, momentum=0.9, warmup=0.0, ema=0.0) | recipe
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int_in(1, 10**5), metavar="N", help="length of the run [%(default)s]")
    add("--batch_size", type=int_in(2, 10**6), metavar="N", help="images a step [%(default)s]")
    add("--optimizer", choices=("sgd", "adam", "muon"), help="optimizer [%(default)s]")
    add("--lr", type=float_in(0, 1000, above=True), metavar="X", help="peak rate [%(default)s]")
    add("--momentum", type=float_in(0, 0.9999), metavar="X", help="of SGD or Muon [%(default)s]")
    add("--nesterov", action="store_true", help="Nesterov momentum in SGD")
    add("--weight_decay", type=float_in(0, 10), metavar="X", help="L2 penalty [%(default)s]")
    add(
        "--scheduler",
        choices=("none", "multistep", "cosine", "onecycle", "linear"),
        help="schedule of the learning rate, applied every batch [%(default)s]",
    )
    add(
        "--milestones",
        type=float_in(0, 1, above=True),
        nargs="+",
        metavar="X",
        help="when multistep drops the learning rate, as fractions of the run "
        f"[{as_typed(recipe['milestones'])}]",
    )
    add(
        "--gamma",
        type=float_in(0, 1, above=True),
        metavar="X",
        help="factor of the learning rate at each milestone [%(default)s]",
    )
    add(
        "--warmup",
        type=float_in(0, 0.9),
        metavar="X",
        help="fraction of the run in which linear rises before it falls [%(default)s]",
    )
    add(
        "--ema",
        type=float_in(0, 0.99999),
        metavar="X",
        help="decay, per batch, of an exponential moving average of the weights, which is then "
        "tested and saved; 0 for none [%(default)s]",
    )
    parser.set_defaults(**recipe)
    need = parser.add_need
    need("momentum", "--optimizer sgd or muon", lambda a: a.optimizer != "adam")
    need("nesterov", "--optimizer sgd", lambda a: a.optimizer == "sgd")
    need("nesterov", "a --momentum above 0", lambda a: a.momentum > 0)
    need("milestones", "--scheduler multistep", lambda a: a.scheduler == "multistep")
    need("gamma", "--scheduler multistep", lambda a: a.scheduler == "multistep")
    need("warmup", "--scheduler linear", lambda a: a.scheduler == "linear")


def add_augmentation_flags(parser: Parser, choices: Sequence[str] = ()) -> None:
    """--augment, if there are `choices`, --mixup and --cutmix."""
    group = parser.add_argument_group("augmentation")
    if choices:
        group.add_argument(
            "--augment",
            choices=tuple(choices),
            default="crop",
            help="crop: a random crop after padding by 4, and a random flip; reflect: a random "
            "crop after reflecting 2 pixels, and a flip in every other epoch; rrc_jitter: a random "
            "resized crop, colour jitter and a random flip [%(default)s]",
        )
    for name in ("mixup", "cutmix"):
        group.add_argument(
            f"--{name}",
            type=float_in(0, 100),
            default=0.0,
            metavar="ALPHA",
            help=f"{name} of every batch, with shares from Beta(ALPHA, ALPHA); 0 for none "
            "[%(default)s]",
        )
    smallest = "an ALPHA of 0 or from 0.001"  # a smaller one can be 0 in float32: no Beta(0, 0)
    parser.add_need("mixup", smallest, lambda a: a.mixup == 0 or a.mixup >= 0.001)
    parser.add_need("cutmix", smallest, lambda a: a.cutmix == 0 or a.cutmix >= 0.001)
    parser.add_need("cutmix", "leaving --mixup out", lambda a: not a.mixup)


def add_temperature_flag(add: Callable) -> None:
    """--temperature of the distillation; `add` is the `add_argument` of its group."""
    add(
        "--temperature",
        "--kd_temp",
        type=float_in(0.01, 1000),
        default=10.0,
        metavar="T",
        help="softens the outputs of teacher and student [%(default)s]",
    )


def add_run_flags(parser: Parser, name: str, output: str) -> None:
    """--seed to --output."""
    add = parser.add_argument_group("run").add_argument
    add(
        "--seed",
        type=int_in(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="seed of initial weights, order of the images and augmentation [%(default)s]",
    )
    add(
        "--device",
        type=device,
        default="auto",
        help="auto, cpu, cuda, cuda:N, mps or xpu [%(default)s]",
    )
    add(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="autocast; auto is bf16 on GPUs and CPUs that have it in hardware, fp16 with loss "
        "scaling on older CUDA GPUs, else off [%(default)s]",
    )
    add(
        "--no_cuda_graph",
        action="store_true",
        help="on CUDA, launch every kernel from Python instead of replaying a CUDA graph",
    )
    add(
        "--sync_bn",
        action="store_true",
        help="with torchrun on GPUs: BatchNorm over the whole batch, not each process's slice",
    )
    add("--run_dir", type=Path, metavar="DIR", help=f"new folder of the run [runs/{name}-001, ...]")
    add("--resume", type=Path, metavar="DIR", help="resume the run in DIR, with its flags")
    add(
        "--output",
        type=Path,
        default=Path(output),
        metavar="FILE",
        help="the finished network [%(default)s]",
    )
    parser.add_need("sync_bn", "torchrun", lambda a: parallel.world_size() > 1)
    by_labels = "distillation, not --hard_labels"
    parser.add_need("temperature", by_labels, lambda a: not getattr(a, "hard_labels", False))
