"""The optimizers and the learning-rate schedules."""

import math
import warnings
from argparse import Namespace
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from experiment.device import has_bfloat16
from networks.airbench import Airbench

# ------------------------------------------------------------------------------------- optimizers


def build_optimizer(model: nn.Module, args: Namespace, amp: torch.dtype | None = None) -> Optimizer:
    """SGD, Adam or Muon, from `optimizer`, `lr`, `momentum`, `nesterov`, `weight_decay` of `args`.

    `amp` is the autocast dtype; if there is one, Muon multiplies in bfloat16 where the device has
    it. On CUDA the update of SGD and Adam is one fused kernel; on a CPU the plain loop is the
    fastest.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if args.optimizer == "muon":
        dtype = torch.bfloat16 if amp and has_bfloat16(parameters[0].device) else torch.float32
        head = Muon.AIRBENCH_HEAD if isinstance(model, Airbench) else Muon.HEAD
        return Muon(parameters, args.lr, args.momentum, args.weight_decay, dtype, head)
    cuda = parameters[0].is_cuda
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": cuda}
    if args.optimizer == "adam":
        # capturable: it counts its steps on the device, for a CUDA graph; and warns before it
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable")
        return torch.optim.Adam(parameters, **options, capturable=cuda)
    return torch.optim.SGD(parameters, **options, momentum=args.momentum, nesterov=args.nesterov)


class Muon(Optimizer):
    """Muon for the filters of convolutions, Nesterov SGD for all other weights.

    The momentum of a filter bank W, as a matrix G with a row for each output channel, is replaced
    by a matrix with the same singular vectors, whose singular values are all about one:

        B <- momentum * B + gradient            Nesterov: G = gradient + momentum * B
        W <- W * sqrt(rows) / |W| - lr * newton_schulz(G)

    Every direction then learns at the same pace, and no weight decay is needed (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). Linear layers take Nesterov SGD at `head` * lr, vectors
    (biases, BatchNorm) at VECTOR_RATE * lr, both with momentum 0.85 and `weight_decay`. VECTOR_RATE
    and AIRBENCH_HEAD are the numbers of airbench94_muon.py (github.com/KellerJordan/
    cifar10-airbench), which sums its loss over 2,000 images and divides its logits by 256.
    `Airbench` divides them by 9, which slows its head 81-fold. HEAD, for networks that do not, is
    as much smaller, and so is their head's weight decay. `dtype` is for the multiplications of
    `newton_schulz`.
    """

    AIRBENCH_HEAD, HEAD, VECTOR_RATE, OTHER_MOMENTUM = 2.8, 0.035, 0.22, 0.85

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        head: float = HEAD,
    ) -> None:
        parameters = list(parameters)
        filters = [p for p in parameters if p.ndim == 4]
        matrices = [p for p in parameters if p.ndim == 2]
        vectors = [p for p in parameters if p.ndim not in (2, 4)]
        rest = {"momentum": self.OTHER_MOMENTUM, "weight_decay": weight_decay, "muon": False}
        groups = [
            {"params": filters, "lr": lr, "muon": True},
            {"params": matrices, "lr": head * lr, **rest},
            {"params": vectors, "lr": self.VECTOR_RATE * lr, **rest},
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad.add(p, alpha=group["weight_decay"])
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].mul_(group["momentum"]).add_(gradient)
                update = gradient.add_(momentum, alpha=group["momentum"])
                if group["muon"]:
                    p.mul_(len(p) ** 0.5 / p.norm().clamp(min=1e-7))
                    update = newton_schulz(update.flatten(1), self.dtype).view(p.shape)
                p.sub_(update * group["lr"])  # lr may be a tensor, see `TrainStep`


def newton_schulz(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U p(p(p(S))) V^T for the float matrix U S V^T, (rows, columns), brought to Frobenius norm 1.

    p(x) = 3.4445 x - 4.7750 x^3 + 2.0315 x^5 pushes small singular values up quickly and lets the
    others scatter around one. `dtype` is for the multiplications (Jordan et al. 2024).
    """
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    if tall := len(x) > x.shape[1]:
        x = x.T
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


# -------------------------------------------------------------------------------------- schedules


def build_scheduler(optimizer: Optimizer, args: Namespace, total_steps: int) -> LambdaLR:
    """A scheduler that is stepped after every batch; see `lr_factor`."""
    shape = args.milestones, args.gamma, args.warmup
    return LambdaLR(optimizer, lambda step: lr_factor(args.scheduler, step, total_steps, *shape))


def lr_factor(
    name: str,
    step: int,
    total_steps: int,
    milestones: tuple[float, ...] = (0.5, 0.8),
    gamma: float = 0.1,
    warmup: float = 0.0,
) -> float:
    """The learning rate of batch `step` (from 0), as a factor of the peak rate.

    none        always 1
    multistep   times `gamma` at each of `milestones`, which are fractions of the run: epochs 25 and
                40 of 50, and the middle of a single one
    linear      a line from 1 to 0, after a linear rise over the fraction `warmup` of the run
    cosine      half a cosine from 1 to 0 (Loshchilov & Hutter 2017, arXiv 1608.03983)
    onecycle    along cosines from 1/25 to 1 at 30 % of the run, and down to 1/250,000: PyTorch's
                OneCycleLR with the momentum left alone (Smith & Topin 2018, arXiv 1708.07120)
    """
    if name == "none":
        return 1.0
    if name == "multistep":
        # round: 0.55 * 100 is 55.00000000000001; max: the first batch always has the full rate
        drops = [max(1, math.ceil(round(fraction * total_steps, 6))) for fraction in milestones]
        return gamma ** sum(step >= drop for drop in drops)
    if name == "linear":
        rise = warmup * total_steps
        return min((step + 1) / (rise + 1), (total_steps - step) / (total_steps - rise))
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
