"""What a captured CUDA graph must not get wrong: exact, so that no tolerance can hide it."""

from argparse import Namespace

import pytest
import torch
from torch import Tensor, nn

import main_train_cifar10 as student_script
from augmentations import AUGMENTATIONS
from data import DeviceLoader, ImageSet
from engine import TrainStep, kd_loss, train_one_epoch
from models import build_model, cast_weights_
from optimizers import build_optimizer, build_scheduler
from synthetic_data.ema import EMA

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
OPTIMIZERS = ("sgd", "adam", "muon")
LR = 0.01
STEPS = TrainStep.WARM_UP + 5


@pytest.fixture(autouse=True)
def repeatable():
    """cuDNN picks algorithms that give the same bits every time."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def made(
    optimizer: str = "sgd",
    arch: str = "resnet18",
    amp: torch.dtype | None = torch.bfloat16,
    graph: bool = True,
    decay: float = 0.0,
    lr: float = LR,
) -> Namespace:
    """A student, its frozen teacher, and the step of main_train_cifar10.py."""
    torch.manual_seed(0)
    student = build_model(arch, "imagenet").to(DEVICE).train()
    teacher = build_model("resnet18", "imagenet").to(DEVICE).eval().requires_grad_(False)
    cast_weights_(teacher, amp)
    args = student_script.parse_args(["--optimizer", optimizer, "--lr", str(lr)])
    rule, ema = build_optimizer(student, args, amp), EMA(student, decay)

    def loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_logits = teacher(images)
        logits = student(images)
        loss = kd_loss(logits, teacher_logits, 10.0)
        return loss, logits.argmax(1) == teacher_logits.argmax(1)

    step = TrainStep(loss_fn, rule, amp, ema.update, graph)
    return Namespace(student=student, teacher=teacher, rule=rule, ema=ema, step=step, args=args)


def batch(seed: int, n: int = 32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    images = torch.randn(n, 3, 32, 32).to(DEVICE, memory_format=torch.channels_last)
    return images, torch.arange(n, device=DEVICE) % 10


def take_steps(step: TrainStep) -> None:
    """As many steps as need a capture and a few replays."""
    for seed in range(STEPS):
        step(*batch(seed))
    assert step.graph is not None


def set_rates(rule: torch.optim.Optimizer, factor: float) -> list[float]:
    """What a scheduler does; returns the rates there were."""
    before = [group["lr"].item() for group in rule.param_groups]
    for group, lr in zip(rule.param_groups, before, strict=True):
        group["lr"].fill_(factor * lr)
    return before


def clones(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_replay_reads_the_rate_of_the_moment(optimizer):
    it = made(optimizer)
    take_steps(it.step)
    before = [p.detach().clone() for p in it.student.parameters()]
    rates = set_rates(it.rule, 0.0)
    it.step(*batch(99))
    for p, was in zip(it.student.parameters(), before, strict=True):
        if optimizer == "muon" and p.ndim == 4:  # what it does to filters whatever the rate
            was.mul_(len(was) ** 0.5 / was.norm().clamp(min=1e-7))
        assert torch.equal(p, was)
    before = [p.detach().clone() for p in it.student.parameters()]
    for group, lr in zip(it.rule.param_groups, rates, strict=True):
        group["lr"].fill_(lr)
    it.step(*batch(99))
    pairs = zip(it.student.parameters(), before, strict=True)
    assert not any(torch.equal(p, was) for p, was in pairs)


def test_a_replay_reads_its_own_batch():
    it = made()
    take_steps(it.step)
    set_rates(it.rule, 0.0)
    one, again, other = (it.step(*batch(seed))[0].clone() for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_what_a_replay_returns_is_of_its_own_batch():
    it = made(amp=None)
    take_steps(it.step)
    set_rates(it.rule, 0.0)
    images, labels = batch(1)
    loss, matches = it.step(images, labels)
    with torch.no_grad():
        logits, teacher_logits = it.student(images), it.teacher(images)
    assert torch.equal(matches, logits.argmax(1) == teacher_logits.argmax(1))
    torch.testing.assert_close(loss, kd_loss(logits, teacher_logits, 10.0), rtol=1e-5, atol=0)


def test_batchnorm_counts_every_step_and_the_teachers_none():
    it = made()
    before = clones(it.teacher)
    take_steps(it.step)
    state = it.student.state_dict()
    counts = [value.item() for key, value in state.items() if key.endswith("batches_tracked")]
    assert set(counts) == {STEPS}
    assert_equal(it.teacher.state_dict(), before)


@pytest.mark.parametrize("decay", [0.3, 0.999])  # 0.3 is reached after three steps, 0.999 is not
def test_the_average_is_taken_in_every_replay(decay):
    it = made(decay=decay)
    beside = EMA(it.student, decay)  # follows outside of the graph
    for seed in range(STEPS):
        it.step(*batch(seed))
        beside.update()
        assert_equal(it.ema.model.state_dict(), beside.model.state_dict())
    assert it.ema.updates.item() == STEPS
    assert not torch.equal(it.ema.model.conv1.weight, it.student.conv1.weight)


def test_every_replay_draws_its_own_dropout():
    it = made(arch="mobilenet_v2")
    take_steps(it.step)
    set_rates(it.rule, 0.0)
    images = batch(7)
    torch.manual_seed(1)
    one, two = it.step(*images)[0].clone(), it.step(*images)[0].clone()
    torch.manual_seed(1)
    again = it.step(*images)[0].clone()
    assert not torch.equal(one, two)
    assert torch.equal(one, again)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_graph_trains_as_ordinary_steps_do(optimizer):
    """Through `train_one_epoch`, with a rate that changes in every step.

    What rounding makes of that is less than a hundredth of the way that each tensor goes: at this
    rate a seventh of that, if all gradients are off by 1e-7. A rate frozen in the graph makes a
    tenth of the way.
    """
    images = torch.randint(0, 256, (32 * STEPS, 3, 32, 32), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(len(images)) % 10, tuple("abcdefghij"))
    ends, rows = {}, {}
    for graph in (False, True):
        it = made(optimizer, amp=None, graph=graph, decay=0.9, lr=1e-4)
        start = [clones(it.student), clones(it.ema.model)]
        it.args.scheduler = "cosine"
        scheduler = build_scheduler(it.rule, it.args, 2 * STEPS)
        for group in it.rule.param_groups:  # as a graph has it: rounded to float32
            group["lr"] = torch.tensor(group["lr"], device=DEVICE)
        loader = DeviceLoader(data, 32, DEVICE, train=True)
        torch.manual_seed(1)
        rows[graph] = train_one_epoch(it.student, loader, it.step, scheduler)
        assert (it.step.graph is not None) == graph
        for group in it.rule.param_groups:
            assert group["lr"].item() == pytest.approx(group["initial_lr"] / 2)
        ends[graph] = [it.student.state_dict(), it.ema.model.state_dict()]
    assert rows[True]["loss"] == pytest.approx(rows[False]["loss"], rel=1e-4)
    for begun, ended, other in zip(start, ends[False], ends[True], strict=True):
        for key in begun:
            went, apart = ended[key] - begun[key], ended[key] - other[key]
            # the average's buffers stay where they are: 0 <= 0
            assert apart.float().norm() <= 0.01 * went.float().norm(), key


def test_float16_trains_on_cuda_without_a_graph():
    it = made(amp=torch.float16)
    before = clones(it.student)
    for seed in range(STEPS):
        it.step(*batch(seed))
    assert it.step.graph is None
    assert it.step.scaler.get_scale() > 1
    assert not torch.equal(it.student.conv1.weight, before["conv1.weight"])
    assert all(weight.isfinite().all() for weight in it.student.state_dict().values())


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches_are_channels_last_on_cuda(augment):
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(64) % 10, tuple("abcdefghij"))
    for views, _ in DeviceLoader(data, 32, DEVICE, train=True, augment=augment):
        assert views.device.type == DEVICE
        assert views.is_contiguous(memory_format=torch.channels_last)
