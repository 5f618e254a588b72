"""The moving average of a network's weights, which the generator is tested and saved with."""

import copy

import torch
from torch import nn


class EMA:
    """`ema.model` is an exponential moving average of the weights of `model`.

    Update t, from 1, is average <- d * average + (1 - d) * model with d = min(decay, (1 + t) /
    (10 + t)), so that the random start is soon forgotten (as in timm and diffusers). BatchNorm's
    statistics are not averaged; the U-Net has none.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        self.average, self.latest = list(self.model.parameters()), list(model.parameters())
        # on the device, where a replayed CUDA graph counts too
        self.updates = torch.zeros((), device=self.latest[0].device)

    def state_dict(self) -> dict:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.updates.copy_(state["updates"])

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after a training step."""
        self.updates += 1
        decay = torch.clamp((1 + self.updates) / (10 + self.updates), max=self.decay)
        step = torch._foreach_sub(self.latest, self.average)  # on CUDA, a few kernels for all
        torch._foreach_mul_(step, 1 - decay)
        torch._foreach_add_(self.average, step)
