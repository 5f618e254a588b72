"""The moving average of a network's weights, which the generator is tested and saved with."""

import copy

import torch
from torch import nn


class EMA:
    """`ema.model` is an exponential moving average of the weights and statistics of `model`.

    Update t, from 1, is average <- d * average + (1 - d) * model with d = min(decay, (1 + t) /
    (10 + t)), so that the random start is soon forgotten (as in timm and diffusers). With decay 0
    `ema.model` is `model` itself.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        # on the device, where a replayed CUDA graph counts too
        self.updates = torch.zeros((), device=next(model.parameters()).device)
        if decay == 0:
            return
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        states = (self.model.state_dict().values(), model.state_dict().values())
        pairs = list(zip(*states, strict=True))
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    def state_dict(self) -> dict:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.updates.copy_(state["updates"])

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after a training step."""
        if self.decay == 0:
            return
        self.updates += 1
        decay = torch.clamp((1 + self.updates) / (10 + self.updates), max=self.decay)
        average, latest = zip(*self.floats, strict=True)
        step = torch._foreach_sub(latest, average)  # on CUDA, a few kernels for all tensors
        torch._foreach_mul_(step, 1 - decay)
        torch._foreach_add_(average, step)
        for counter, now in self.counters:
            counter.copy_(now)
