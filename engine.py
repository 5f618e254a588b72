"""The inner loops, the losses and the schedules. Nothing here prints, or knows of files.

The loops return plain dicts of floats. Sums are kept on the device and read when an epoch ends: the
only places that wait for the device.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from data import DeviceLoader

LossFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch.

    Both logits are (B, classes); the result is a float32 scalar. No gradient reaches the teacher.
    The factor T^2 keeps the size of the gradient independent of T to first order (Hinton, Vinyals &
    Dean 2015, arXiv 1503.02531, section 2). Reduction "batchmean" is the mathematical KL; PyTorch's
    default "mean" would also divide by the number of classes.
    """
    log_p = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_q = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def train_one_epoch(
    model: nn.Module,
    loader: DeviceLoader,
    loss_fn: LossFn,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    amp: torch.dtype | None = None,
    on_batch: Callable[[int, Tensor], None] | None = None,
) -> dict[str, float]:
    """One pass over `loader`; the rate changes after every batch.

    `loss_fn(images, labels)` returns the loss to minimise, a scalar, and the hits: (B,) bool, true
    where the prediction equals its target (the label, or the teacher's choice). `amp` is the
    autocast dtype. `on_batch(images, loss)` is told the size and the loss of each batch; reading
    the loss synchronises.

    Returns `loss` (mean), `hits` (percent) and `images_per_second`.
    """
    model.train()
    began = time.perf_counter()
    loss_sum = torch.zeros((), device=loader.device, dtype=torch.float64)
    hit_sum = torch.zeros((), device=loader.device, dtype=torch.int64)
    count = 0
    for images, labels in loader:
        with torch.autocast(loader.device.type, dtype=amp, enabled=amp is not None):
            loss, hits = loss_fn(images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        count += len(images)
        loss_sum += loss.detach() * len(images)
        hit_sum += hits.sum()
        if on_batch is not None:
            on_batch(len(images), loss.detach())
    loss, hits = loss_sum.item() / count, 100 * hit_sum.item() / count  # waits
    return {"loss": loss, "hits": hits, "images_per_second": count / (time.perf_counter() - began)}


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: DeviceLoader, amp: torch.dtype | None = None
) -> dict[str, float]:
    """`loss`, the mean cross-entropy in nats, and `accuracy`, in percent, over all of `loader`."""
    model.eval()
    loss_sum = torch.zeros((), device=loader.device, dtype=torch.float64)
    hit_sum = torch.zeros((), device=loader.device, dtype=torch.int64)
    for images, labels in loader:
        with torch.autocast(loader.device.type, dtype=amp, enabled=amp is not None):
            logits = model(images)
        loss_sum += F.cross_entropy(logits.float(), labels, reduction="sum")
        hit_sum += (logits.argmax(1) == labels).sum()
    count = len(loader.images)
    return {"loss": loss_sum.item() / count, "accuracy": 100 * hit_sum.item() / count}


def build_optimizer(model: nn.Module, args: Namespace) -> Optimizer:
    """SGD or Adam, from `optimizer`, `lr`, `momentum`, `nesterov` and `weight_decay` of `args`."""
    if args.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        args.lr,
        momentum=args.momentum,
        nesterov=args.nesterov,
        weight_decay=args.weight_decay,
    )


def build_scheduler(optimizer: Optimizer, args: Namespace, total_steps: int) -> LambdaLR:
    """A scheduler that is stepped after every batch; see `lr_factor`."""
    return LambdaLR(
        optimizer,
        lambda step: lr_factor(args.scheduler, step, total_steps, args.milestones, args.gamma),
    )


def lr_factor(
    name: str,
    step: int,
    total_steps: int,
    milestones: tuple[float, ...] = (0.5, 0.8),
    gamma: float = 0.1,
) -> float:
    """The learning rate of batch `step` (from 0), as a factor of the peak rate.

    none        1 all along
    multistep   times `gamma` at each of `milestones`, which are fractions of the run. Counted in
                batches they keep their place in a run of any length: epochs 25 and 40 of 50, and
                the middle of a single one
    cosine      half a cosine from 1 to 0 (Loshchilov & Hutter 2017, arXiv 1608.03983)
    onecycle    along cosines from 1/25 to 1 at 30 % of the run, and down to 1/250,000: PyTorch's
                OneCycleLR with the momentum left alone (Smith & Topin 2018, arXiv 1708.07120)
    """
    if name == "none":
        return 1.0
    if name == "multistep":
        # round: 0.8 * 19500 is 15600.000000000002; max: the first batch always has the full rate
        drops = [max(1, math.ceil(round(fraction * total_steps, 6))) for fraction in milestones]
        return gamma ** sum(step >= drop for drop in drops)
    if name == "cosine":
        return _cosine(1.0, 0.0, step / total_steps)
    if name == "onecycle":
        peak = max(0.0, 0.3 * total_steps - 1)
        if step < peak:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 250_000, min(1.0, (step - peak) / max(1.0, total_steps - 1 - peak)))
    raise ValueError(f"unknown schedule {name!r}")


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
