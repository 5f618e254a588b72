"""The inner loops and the losses. Nothing here prints or touches files.

Epochs and tests return plain dicts of floats. Sums stay on the device and are read once, when an
epoch ends.
"""

import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from data import DeviceLoader
from experiment import parallel


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


def label_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the labels, a scalar, and which predictions are correct, (B,) bool.

    logits: (B, classes); labels: int64 (B,).
    """
    return F.cross_entropy(logits, labels), logits.argmax(1) == labels


class TrainStep:
    """A training step, `loss, matches = step(images, labels)`: forward, backward, update.

    `loss_fn(images, labels)` returns the loss to minimise, a scalar, and `matches`, (B,) bool: true
    where the prediction equals its target (the label, or the teacher's choice). `amp` is the
    autocast dtype; `after_update()` is called after every update, and recorded with it.

    On CUDA, small networks are bound by kernel launches. After three ordinary steps the whole step
    (forward, backward, update) is captured as a CUDA graph and replayed
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). A graph reads and writes the
    same memory every time. So each batch is copied there and has to have the shape of the first,
    the learning rate becomes a tensor, and `loss` and `matches` last until the next step. A job of
    several ranks captures no graph.

    In float16 the loss is scaled, so that small gradients do not vanish. A step whose gradients
    overflow changes only BatchNorm's statistics and the scale, which is the state of a TrainStep.
    Detecting that waits for the device once a step, so there is no graph in float16
    (torch.amp.GradScaler). An overflow in the forward pass is not caught: it makes the loss nan.
    """

    WARM_UP = 3  # ordinary steps before the capture: cuDNN chooses, the optimizer makes its state

    def __init__(
        self,
        loss_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        optimizer: Optimizer,
        amp: torch.dtype | None = None,
        after_update: Callable[[], None] | None = None,
        graph: bool = True,
    ) -> None:
        self.loss_fn, self.optimizer, self.amp = loss_fn, optimizer, amp
        self.after_update = after_update
        self.device = optimizer.param_groups[0]["params"][0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == torch.float16)
        if self.scaler.is_enabled():
            # fused SGD would keep an uninitialised momentum, if the first step overflows
            optimizer._step_supports_amp_scaling = False
            # a scheduler mistakes the first skipped step for a missing one
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        one_gpu = self.device.type == "cuda" and parallel.world_size() == 1
        self.captures = graph and one_gpu and not self.scaler.is_enabled()
        # one for all warm-up steps: the allocator keeps freed memory for its stream
        self.stream = torch.cuda.Stream(self.device) if self.captures else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.count = 0

    def state_dict(self) -> dict:
        """The loss scale; empty but for float16."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore the loss scale, if this part of the run and the one before both have one."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self.captures:
            return self._step(images, labels)
        self.count += 1
        if self.count <= self.WARM_UP:
            return self._warm_up(images, labels)
        if self.graph is None:
            self._capture(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss, self.matches

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            loss, matches = self.loss_fn(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)  # skipped if a gradient is not finite
        before = self.scaler.get_scale() if self.after_update else 0.0  # waits in float16
        self.scaler.update()
        if self.after_update and self.scaler.get_scale() >= before:
            self.after_update()
        return loss.detach(), matches

    def _warm_up(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:  # a scheduler fills a tensor in place
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss, matches = self._step(images, labels)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss, matches

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        self.optimizer.zero_grad(set_to_none=True)  # gradients have to live in the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": another thread may pin memory meanwhile, as a DataLoader's does
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss, self.matches = self._step(self.images, self.labels)


def train_one_epoch(
    model: nn.Module,
    loader: DeviceLoader,
    step: TrainStep,
    scheduler: LambdaLR,
    on_batch: Callable[[float, Tensor], None] | None = None,
) -> dict[str, float]:
    """One pass over `loader`; the learning rate changes after every batch.

    `on_batch(fraction, loss)` gets the part of the epoch that is done and the batch's loss on this
    rank; reading the loss synchronises. Returns `loss` (mean), `matches` (percent) and
    `images_per_second`, over all ranks.
    """
    model.train()
    began = time.perf_counter()
    loss_sum = torch.zeros((), device=loader.device)
    match_sum = torch.zeros((), device=loader.device, dtype=torch.int64)
    count = 0
    for batch, (images, labels) in enumerate(loader, start=1):
        loss, matches = step(images, labels)
        scheduler.step()
        count += len(images)
        loss_sum += loss * len(images)
        match_sum += matches.sum()
        if on_batch is not None:
            on_batch(batch / len(loader), loss)
    parallel.average_buffers(model)
    sums = torch.stack([loss_sum, match_sum.float(), torch.full_like(loss_sum, count)])
    loss_sum, match_sum, count = parallel.all_reduce_sum(sums).tolist()  # waits
    return {
        "loss": loss_sum / count,
        "matches": 100 * match_sum / count,
        "images_per_second": count / (time.perf_counter() - began),
    }


@torch.inference_mode()
def predict(model: nn.Module, loader: DeviceLoader, amp: torch.dtype | None = None) -> Tensor:
    """The logits of `model` in eval mode for all of `loader`, in order: float32 (N, classes), CPU.

    Each rank computes its part of the images, and gets the logits of all.
    """
    model.eval()
    logits = []
    for images, _ in loader:
        with torch.autocast(loader.device.type, dtype=amp, enabled=amp is not None):
            logits.append(model(images).float())
    own = torch.cat(logits or [torch.empty(0, loader.classes, device=loader.device)])
    return parallel.gather_rows(own, len(loader.labels)).cpu()


def evaluate(
    model: nn.Module, loader: DeviceLoader, amp: torch.dtype | None = None
) -> dict[str, float]:
    """`loss`, the mean cross-entropy in nats, and `accuracy`, in percent, over all of `loader`."""
    return score(predict(model, loader, amp), loader.labels.cpu())


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`loss`, the mean cross-entropy in nats, and `accuracy`, in percent, of (N, classes)."""
    correct = (logits.argmax(1) == labels).sum().item()
    return {
        "loss": F.cross_entropy(logits.double(), labels).item(),
        "accuracy": 100 * correct / len(logits),
    }


def compare(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> dict[str, float]:
    """How well a student matches its teacher: `loss`, the mean KD loss, and `agreement`, percent.

    Neither needs a label or a real image, so a recipe can be chosen by them.
    """
    matches = (student_logits.argmax(1) == teacher_logits.argmax(1)).sum().item()
    return {
        "loss": kd_loss(student_logits, teacher_logits, temperature).item(),
        "agreement": 100 * matches / len(student_logits),
    }
