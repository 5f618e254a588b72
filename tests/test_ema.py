"""The moving average of the weights."""

import math

import pytest
import torch
from torch import nn

from synthetic_data.ema import EMA


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_an_average_of_weights_follows_the_network(decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    ema = EMA(model, decay)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for t in range(1, 13):
        model(torch.randn(8, 3)).square().sum().backward()
        for p in model.parameters():
            p.data -= 0.1 * p.grad
        ema.update()
        now = min(decay, (1 + t) / (10 + t))  # written out
        for key, value in model.state_dict().items():
            expected[key] = now * expected[key] + (1 - now) * value
    for key, value in ema.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], msg=key)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_the_random_start_is_soon_forgotten():
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.999)
    nn.init.ones_(model.weight)
    for _ in range(390):  # an epoch at the published batch size
        ema.update()
    left = math.prod(min(0.999, (1 + t) / (10 + t)) for t in range(1, 391))
    assert left < 1e-9
    assert ema.model.weight.item() == pytest.approx(1 - left)


def test_a_stored_average_continues_where_it_was():
    def trained(model, ema, steps):
        for step in steps:
            nn.init.constant_(model.weight, step)
            ema.update()

    one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    first, second = EMA(one, 0.9), EMA(two, 0.9)
    trained(one, first, range(6))
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for model, ema in ((one, first), (two, second)):
        trained(model, ema, range(6, 10))
    assert second.updates == 10
    assert torch.equal(first.model.weight, second.model.weight)


def test_without_decay_the_average_is_the_network():
    model = nn.Linear(2, 1)
    ema = EMA(model, 0)
    nn.init.ones_(model.weight)
    ema.update()
    torch.testing.assert_close(ema.model.weight, model.weight)
