"""The inner loops, the losses and the schedules. Nothing here prints, or knows of files.

The loops return plain dicts of floats. Sums are kept on the device and read when an epoch ends: the
only places that wait for the device.
"""

import copy
import math
import time
import warnings
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import parallel
from data import DeviceLoader
from experiment import UserError

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


def standardize(logits: Tensor) -> Tensor:
    """Each row of (B, classes) at mean 0 and standard deviation 1, in float32.

    Then a student has to match the order and the proportions of its teacher's logits, whatever
    their size (Sun et al. 2024, arXiv 2403.01427).
    """
    logits = logits.float()
    centred = logits - logits.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-7)


def label_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, a scalar, and the hits, (B,) bool: learning without a teacher.

    logits: (B, classes); labels: int64 (B,), or shares of the classes, float (B, classes), of mixed
    images, where the class with the largest share counts as the right one.
    """
    right = labels if labels.ndim == 1 else labels.argmax(1)
    return F.cross_entropy(logits, labels), logits.argmax(1) == right


class TrainStep:
    """A step of training, `loss, hits = step(images, labels)`: forward, backward, update.

    `loss_fn(images, labels)` returns the loss to minimise, a scalar, and the hits: (B,) bool, true
    where the prediction equals its target (the label, or the teacher's choice). `amp` is the
    autocast dtype; `after` is called when the weights are new.

    A GPU is done with a step's hundreds of kernels before Python has launched them. So, with
    `graph` and on CUDA, the steps after the first few are replays of one recorded CUDA graph, a
    single launch (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). A graph reads
    and writes the same memory every time: each batch is copied there and has to have the shape of
    the first, the learning rate becomes a tensor, and `loss` and `hits` last until the next step.
    A job of several ranks records no graph.
    """

    WARM_UP = 3  # ordinary steps before the recording: cuDNN chooses, the optimizer makes its state

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: Optimizer,
        amp: torch.dtype | None = None,
        graph: bool = True,
        after: Callable[[], None] | None = None,
    ) -> None:
        self.loss_fn, self.optimizer, self.amp, self.after = loss_fn, optimizer, amp, after
        self.device = optimizer.param_groups[0]["params"][0].device
        self.records = graph and self.device.type == "cuda" and parallel.world_size() == 1
        self.graph: torch.cuda.CUDAGraph | None = None
        self.count = 0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self.records:
            return self._step(images, labels)
        self.count += 1
        if self.count <= self.WARM_UP:
            return self._warm_up(images, labels)
        if self.graph is None:
            self._record(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss, self.hits

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            loss, hits = self.loss_fn(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.after is not None:
            self.after()
        return loss.detach(), hits

    def _warm_up(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:  # a scheduler fills a tensor in place
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device)
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            loss, hits = self._step(images, labels)
        main.wait_stream(side)
        return loss, hits

    def _record(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        self.optimizer.zero_grad(set_to_none=True)  # gradients have to live in the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": another thread may pin memory meanwhile, as a DataLoader's does
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss, self.hits = self._step(self.images, self.labels)


def train_one_epoch(
    model: nn.Module,
    loader: DeviceLoader,
    step: TrainStep,
    scheduler: LambdaLR,
    on_batch: Callable[[int, Tensor], None] | None = None,
) -> dict[str, float]:
    """One pass over `loader`; the rate changes after every batch.

    `on_batch(images, loss)` is told the size of each batch and this rank's loss of it; reading the
    loss synchronises. Returns `loss` (mean), `hits` (percent) and `images_per_second`, over all
    ranks.
    """
    model.train()
    began = time.perf_counter()
    loss_sum = torch.zeros((), device=loader.device, dtype=torch.float64)
    hit_sum = torch.zeros((), device=loader.device, dtype=torch.int64)
    count = 0
    for images, labels in loader:
        loss, hits = step(images, labels)
        scheduler.step()
        count += len(images)
        loss_sum += loss * len(images)
        hit_sum += hits.sum()
        if on_batch is not None:
            on_batch(len(images) * parallel.world_size(), loss)
    sums = torch.stack([loss_sum, hit_sum.double(), torch.full_like(loss_sum, count)])
    loss_sum, hit_sum, count = parallel.total(sums).tolist()  # waits
    return {
        "loss": loss_sum / count,
        "hits": 100 * hit_sum / count,
        "images_per_second": count / (time.perf_counter() - began),
    }


def distribute(model: nn.Module, sync_batchnorm: bool = False) -> nn.Module:
    """`model` as it has to be called in training, for gradients to be averaged over the ranks.

    It has the weights of `model`, which stays what is saved and tested. BatchNorm takes the
    statistics of a rank's own part of the batch or, with `sync_batchnorm`, of the whole batch.
    Errors: UserError, as PyTorch synchronises BatchNorm on GPUs only.
    """
    if parallel.world_size() == 1:
        return model
    if sync_batchnorm:
        if not next(model.parameters()).is_cuda:
            raise UserError("--sync_bn needs GPUs")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.15 has a longer name for it
        return DistributedDataParallel(model, broadcast_buffers=False)


class WeightAverage:
    """`average.model` follows `model`: an exponential moving average of its weights and statistics.

    After each update it holds `decay` of what it held and 1 - decay of what `model` holds now.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.pairs = list(
            zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        )

    @torch.no_grad()
    def update(self) -> None:
        for average, now in self.pairs:
            if average.is_floating_point():
                average.lerp_(now, 1 - self.decay)
            else:  # a counter
                average.copy_(now)


@torch.inference_mode()
def predict(model: nn.Module, loader: DeviceLoader, amp: torch.dtype | None = None) -> Tensor:
    """The logits of `model` in eval mode for all of `loader`, float32 (N, classes), in order.

    Each rank goes through its part of the images, and gets the logits of all.
    """
    model.eval()
    logits = []
    for images, _ in loader:
        with torch.autocast(loader.device.type, dtype=amp, enabled=amp is not None):
            logits.append(model(images).float())
    own = torch.cat(logits or [torch.empty(0, loader.classes, device=loader.device)])
    return parallel.all_rows(own, len(loader.labels))


def evaluate(
    model: nn.Module, loader: DeviceLoader, amp: torch.dtype | None = None
) -> dict[str, float]:
    """`loss`, the mean cross-entropy in nats, and `accuracy`, in percent, over all of `loader`."""
    logits = predict(model, loader, amp)
    hits = (logits.argmax(1) == loader.labels).sum().item()
    loss = F.cross_entropy(logits.double(), loader.labels).item()
    return {"loss": loss, "accuracy": 100 * hits / len(logits)}


def evaluate_kd(
    student: nn.Module,
    teacher: nn.Module,
    loader: DeviceLoader,
    temperature: float,
    amp: torch.dtype | None = None,
    standardized: bool = False,
) -> dict[str, float]:
    """How well a student matches its teacher: `loss`, the mean KD loss, and `agreement`, percent.

    Neither needs a label or a real image, so that a recipe can be chosen by them. `standardized`:
    the loss is that of the logits after `standardize`.
    """
    ours, theirs = predict(student, loader, amp), predict(teacher, loader, amp)
    if standardized:
        ours, theirs = standardize(ours), standardize(theirs)
    hits = (ours.argmax(1) == theirs.argmax(1)).sum().item()
    return {
        "loss": kd_loss(ours, theirs, temperature).item(),
        "agreement": 100 * hits / len(ours),
    }


def per_class_accuracy(
    model: nn.Module, loader: DeviceLoader, amp: torch.dtype | None = None
) -> list[float]:
    """Percent of the images of each class that are classified rightly, in the order of classes."""
    labels = loader.labels
    right = labels[predict(model, loader, amp).argmax(1) == labels]
    hits, counts = (torch.bincount(x, minlength=loader.classes) for x in (right, labels))
    return (100 * hits / counts.clamp(min=1)).tolist()


def build_optimizer(model: nn.Module, args: Namespace) -> Optimizer:
    """SGD or Adam, from `optimizer`, `lr`, `momentum`, `nesterov` and `weight_decay` of `args`.

    On CUDA the update is one fused kernel; on a CPU the plain loop is the fastest.
    """
    cuda = next(model.parameters()).is_cuda
    if args.optimizer == "adam":
        return torch.optim.Adam(
            model.parameters(),
            args.lr,
            weight_decay=args.weight_decay,
            fused=cuda,
            capturable=cuda,  # it counts its steps on the device, as a CUDA graph needs it
        )
    return torch.optim.SGD(
        model.parameters(),
        args.lr,
        momentum=args.momentum,
        nesterov=args.nesterov,
        weight_decay=args.weight_decay,
        fused=cuda,
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
