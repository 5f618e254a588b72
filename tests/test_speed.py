"""The fast path computes what the plain one does, and the benchmark's two ways are runnable."""

import pytest
import speed
import torch
import torch.nn.functional as F
from torch import nn

from engine import kd_loss
from models import build_model


def loss_and_gradient(channels_last: bool, amp: torch.dtype | None) -> tuple[torch.Tensor, ...]:
    """One KD step on a fixed batch and fixed weights: the loss, and all gradients in one vector."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    student = build_model(stem="imagenet").to(memory_format=layout)
    teacher = build_model(stem="imagenet").to(memory_format=layout).eval()
    images = torch.randn(32, 3, 32, 32).to(memory_format=layout)
    with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
        with torch.inference_mode():
            teacher_logits = teacher(images)
        loss = kd_loss(student(images), teacher_logits, 10.0)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.reshape(-1) for p in student.parameters()])


def test_channels_last_changes_nothing_but_rounding():
    plain_loss, plain_gradient = loss_and_gradient(False, None)
    fast_loss, fast_gradient = loss_and_gradient(True, None)
    assert fast_loss.item() == pytest.approx(plain_loss.item(), rel=1e-4)
    assert F.cosine_similarity(plain_gradient, fast_gradient, dim=0) > 0.9999


def test_the_loss_in_bf16_stays_close_to_float32():
    plain_loss, _ = loss_and_gradient(False, None)
    fast_loss, _ = loss_and_gradient(True, torch.bfloat16)
    assert fast_loss.item() == pytest.approx(plain_loss.item(), rel=0.05)


def test_the_plain_way_has_the_same_loss():
    student, teacher = torch.randn(2, 16, 10).unbind()
    plain = nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(student / 10, dim=1), F.softmax(teacher / 10, dim=1)
    )
    assert kd_loss(student, teacher, 10.0).item() == pytest.approx(100 * plain.item(), rel=1e-4)


@pytest.mark.parametrize("way", ["plain", "ours"])
def test_each_way_runs_an_epoch(way, cifake):
    paths = sorted(cifake.glob("*.jpg")) * 4
    getattr(speed, way)(paths, "imagenet", torch.device("cpu"))()


def test_the_arithmetic_is_counted():
    assert speed.step_gflop("cifar") == pytest.approx(4.44, abs=0.05)
