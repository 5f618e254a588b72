"""Several processes at the same run: `torchrun --nproc_per_node=8 main_train_cifar10.py ...`.

torchrun starts one process, a rank, for each GPU
(https://docs.pytorch.org/docs/stable/elastic/run.html). All ranks go through the same script with
the same seeds; each trains on its part of every batch, and gradients are averaged. Rank 0 alone
prints and writes. Started with `python`, a script is a job of one rank, for which nothing here has
any effect.
"""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """The number of this process in its job, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes the job has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The number of this process on its machine, from 0: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def leads() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def launcher() -> str:
    """The word, or words, that start a job of this size."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return "python" if world_size() == 1 else f"torchrun --nproc_per_node={here}"


def start(device: torch.device) -> None:
    """Join the other ranks: over NCCL where `device` is a GPU, else over gloo."""
    if world_size() == 1:
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    atexit.register(_stop)
    if not leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def leader_first() -> Iterator[None]:
    """Rank 0 goes through the block before the others do: what it downloads is there for them.

    The ranks that share a disk with it find the files; on other machines they have to be there.
    """
    if world_size() > 1 and not leads():
        dist.barrier()
    yield
    if world_size() > 1 and leads():
        dist.barrier()


@torch.no_grad()
def average_statistics(*models: nn.Module) -> None:
    """Make BatchNorm's running statistics the mean over the ranks, which saw other images each."""
    if world_size() == 1:
        return
    for model in dict.fromkeys(models):  # one network may have two names
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world_size()


def total(values: Tensor) -> Tensor:
    """The sum of `values` over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def from_leader(value: object) -> object:
    """What rank 0 has given: any object that can be pickled."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def own_part(n: int) -> slice:
    """The rows of n that are this rank's: consecutive, and as many as another's, or one more."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def all_rows(own: Tensor, n: int) -> Tensor:
    """What each rank has for its `own_part` of n rows, put together on every rank."""
    if world_size() == 1:
        return own
    rows = own.new_zeros(n, *own.shape[1:])
    rows[own_part(n)] = own
    return total(rows)


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether this is what the death of another rank looks like from here."""
    signs = ("gloo", "nccl", "peer", "tcpstore")
    return (
        world_size() > 1
        and isinstance(error, RuntimeError)
        and any(sign in str(error).lower() for sign in signs)
    )
