"""Data parallelism with torchrun: `torchrun --nproc_per_node=8 main_train_cifar10.py ...`.

torchrun starts one process, a rank, for each GPU
(https://docs.pytorch.org/docs/stable/elastic/run.html). All ranks run the same script with the same
seeds; each trains on its slice of every batch, and gradients are averaged. Rank 0 alone writes,
and prints all but errors. With plain `python` there is one rank, and everything here is a no-op.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(hours=1)  # for rank 0's downloads: torchrun notices a dead rank earlier
RANK_LOST = "another process of this job has died, or cannot be reached"
TORCHRUN_SETS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """The number of this process in its job, from 0."""
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """How many processes the job has."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """The number of this process on its machine, from 0, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def environment_problem() -> str | None:
    """What is wrong with torchrun's variables: a cluster's shell may set some of them. Or None."""
    given = {name: os.environ.get(name, "") for name in TORCHRUN_SETS}
    if given["WORLD_SIZE"] in ("", "1") and given["RANK"] in ("", "0"):
        return None  # one process, whatever the others are
    missing = [name for name, value in given.items() if not value]
    numbers = [given[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if missing:
        problem = f"lacks {', '.join(missing)}"
    elif not all(text.isdecimal() for text in numbers) or int(numbers[0]) >= int(numbers[1]):
        problem = "names no rank of a job"
    else:
        return None
    found = " ".join(f"{name}={value}" for name, value in given.items() if value)
    return f"the environment {problem}: {found}. Start with torchrun, or unset RANK and WORLD_SIZE"


def is_rank_zero() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def launcher() -> str:
    """`python`, or `torchrun --nproc_per_node=N`: what starts a job of this size on one machine."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return "python" if world_size() == 1 else f"torchrun --nproc_per_node={here}"


def init_process_group(device: torch.device) -> None:
    """Join the other ranks: over NCCL where `device` is a GPU, else over gloo."""
    if world_size() == 1:
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    if not is_rank_zero():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leave_process_group() -> None:
    """Leave the job, but only after success: NCCL waits for all ranks, also for dead ones."""
    if world_size() > 1 and dist.is_initialized():
        dist.destroy_process_group()


def distribute(model: nn.Module) -> nn.Module:
    """Wrap `model` in DistributedDataParallel; returns `model` itself on one process.

    Training calls the wrapper; `model` itself is saved and tested. BatchNorm uses the statistics
    of each rank's own slice of the batch.
    """
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer PyTorch renames broadcast_buffers
        return DistributedDataParallel(model, broadcast_buffers=False)


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the block first. The other ranks then find what it has downloaded.

    All ranks have to share a disk.
    """
    if world_size() > 1 and not is_rank_zero():
        dist.barrier()
    yield
    if world_size() > 1 and is_rank_zero():
        dist.barrier()


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Average BatchNorm's running statistics over the ranks, each of which saw other images."""
    if world_size() == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world_size()


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of `values` over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def rank_slice(n: int) -> slice:
    """This rank's rows of n: consecutive. The shares of any two ranks differ by at most one row."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def gather_rows(own: Tensor, n: int) -> Tensor:
    """All n rows on every rank; each rank passes its own `rank_slice` of them."""
    if world_size() == 1:
        return own
    rows = own.new_zeros(n, *own.shape[1:])
    rows[rank_slice(n)] = own
    return all_reduce_sum(rows)


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether `error` is one of the communication between ranks: most likely one has died."""
    signs = ("gloo", "nccl", "peer", "tcpstore")
    return (
        world_size() > 1
        and isinstance(error, RuntimeError)
        and any(sign in str(error).lower() for sign in signs)
    )
