"""The fast path computes what the plain one does, and the benchmark's two ways are runnable."""

from argparse import Namespace

import pytest
import speed
import torch
import torch.nn.functional as F
from torch import nn

from engine import TrainStep, kd_loss
from models import build_model, cast_once
from optimizers import build_optimizer, build_scheduler


def loss_and_gradient(
    channels_last: bool, amp: torch.dtype | None, batch: int = 0
) -> tuple[torch.Tensor, ...]:
    """One KD step on a fixed batch and fixed weights: the loss, and all gradients in one vector."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    student = build_model(stem="imagenet").to(memory_format=layout)
    teacher = build_model(stem="imagenet").to(memory_format=layout).eval()
    images = torch.randn(batch + 1, 32, 3, 32, 32)[batch].to(memory_format=layout)
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


def test_rounding_to_bf16_changes_a_gradient_less_than_another_batch_does():
    (_, plain), (_, fast) = (loss_and_gradient(True, amp) for amp in (None, torch.bfloat16))
    _, other = loss_and_gradient(True, None, batch=1)
    by_rounding = (plain - fast).norm() / plain.norm()
    assert by_rounding < (plain - other).norm() / plain.norm()


def test_the_plain_way_has_the_same_loss():
    student, teacher = torch.randn(2, 16, 10).unbind()
    plain = nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(student / 10, dim=1), F.softmax(teacher / 10, dim=1)
    )
    assert kd_loss(student, teacher, 10.0).item() == pytest.approx(100 * plain.item(), rel=1e-4)


def test_a_teacher_cast_once_is_the_same_to_the_last_bit():
    torch.manual_seed(0)
    teacher = build_model(stem="imagenet").eval()
    images = torch.randn(8, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = teacher(images)
        cast_once(teacher, torch.bfloat16)
        after = teacher(images)
    assert teacher.conv1.weight.dtype == torch.bfloat16
    assert teacher.bn1.weight.dtype == torch.float32
    assert torch.equal(before, after)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_recorded_graph_trains_as_the_ordinary_steps_do(optimizer):
    """Same weights, same batches, a rate that changes in every step: the same losses."""
    recipe = Namespace(**{**vars(speed.RECIPE), "optimizer": optimizer, "scheduler": "cosine"})
    recipe.lr = 0.001
    losses = {}
    for graph in (False, True):
        torch.manual_seed(0)
        model = build_model(stem="imagenet").cuda().train()
        batches = torch.randn(12, 32, 3, 32, 32, device="cuda")
        labels = torch.arange(32, device="cuda") % 10
        adam_or_sgd = build_optimizer(model, recipe)
        scheduler = build_scheduler(adam_or_sgd, recipe, len(batches))

        def loss_fn(images, labels, model=model):
            logits = model(images)
            return F.cross_entropy(logits, labels), logits.argmax(1) == labels

        step, losses[graph] = TrainStep(loss_fn, adam_or_sgd, None, graph), []
        for images in batches:
            losses[graph].append(step(images, labels)[0].item())
            scheduler.step()
        assert (step.graph is not None) == graph
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


@pytest.mark.parametrize("way", speed.WAYS)
def test_each_way_runs_an_epoch(way, cifake, monkeypatch):
    # compiling takes a minute, and a compiler
    monkeypatch.setattr(torch, "compile", lambda model: model)
    paths = sorted(cifake.glob("*.jpg")) * 4
    speed.WAYS[way](paths, "imagenet", torch.device("cpu"))()


def test_the_arithmetic_is_counted():
    assert speed.step_gflop("cifar") == pytest.approx(4.44, abs=0.05)
