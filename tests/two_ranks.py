"""Several runs of the scripts in one job, as every start of a job takes seconds.

    torchrun --nproc_per_node=2 tests/two_ranks.py '[["main_train_cifar10", "--demo", ...], ...]'

Each run is divisible, see below. A name that starts with ~ leaves BatchNorm as it is.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import optimizers
from experiment import parallel
from experiment.errors import one_line_errors


def make_divisible(patch: pytest.MonkeyPatch, batchnorm: bool = False) -> None:
    """Let a batch in two halves give the gradient of the whole: two ranks have to do what one does.

    BatchNorm, unless `batchnorm`, always uses its running statistics and never changes them. Muon
    multiplies in float32, as bfloat16 makes much of little differences.
    """
    patch.setattr(optimizers, "has_bfloat16", lambda device: False)
    if not batchnorm:
        patch.setattr(
            nn.BatchNorm2d, "train", lambda module, _=True: nn.Module.train(module, False)
        )


def main(runs: list[list[str]]) -> None:
    parallel.init_process_group(torch.device("cpu"))
    for name, *argv in runs:
        script = importlib.import_module(name.removeprefix("~"))
        with pytest.MonkeyPatch.context() as patch:
            make_divisible(patch, batchnorm=name.startswith("~"))
            patch.setattr(parallel, "init_process_group", lambda device: None)  # it stands
            patch.setattr(script, "plot_run", lambda folder: None)
            script.main(script.parse_args(argv))


if __name__ == "__main__":
    with one_line_errors():
        main(json.loads(sys.argv[1]))
