import math
from argparse import Namespace

import pytest
import torch
from conftest import random_images, run_student
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import main_train_cifar10 as student_script
from augmentations import AUGMENTATIONS
from data import CLASSES, DeviceLoader, ImageSet, normalize
from engine import TrainStep, compare, evaluate, kd_loss, label_loss, predict, train_one_epoch
from models import build_model
from optimizers import build_optimizer, build_scheduler
from synthetic_data.ema import EMA

RECIPE = student_script.parse_args([])


def recipe(**changes) -> Namespace:
    return Namespace(**{**vars(RECIPE), **changes})


def made_set(n: int) -> ImageSet:
    return ImageSet(random_images(n), torch.arange(n) % 10, CLASSES)


# ------------------------------------------------------------------------------------------- loss


def test_label_loss_is_cross_entropy_and_what_is_right():
    logits, labels = torch.tensor([[2.0, 0, 0], [0, 3, 0], [1, 0, 0]]), torch.tensor([0, 1, 2])
    loss, matches = label_loss(logits, labels)
    by_hand = [math.log(math.e**2 + 2) - 2, math.log(math.e**3 + 2) - 3, math.log(math.e + 2)]
    assert loss.item() == pytest.approx(sum(by_hand) / 3)
    assert matches.tolist() == [True, True, False]


def test_kd_loss_is_the_formula_worked_out_by_hand():
    student, teacher, temperature = [[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], [[2.0, 0.0, 1.0]] * 2, 4.0

    def softened(logits):
        powers = [math.exp(z / temperature) for z in logits]
        return [power / sum(powers) for power in powers]

    divergences = []
    for p_logits, q_logits in zip(student, teacher, strict=True):
        p, q = softened(p_logits), softened(q_logits)
        divergences.append(sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))
    by_hand = temperature**2 * sum(divergences) / 2

    loss = kd_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_kd_loss_is_zero_only_where_student_and_teacher_agree():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    assert kd_loss(logits, logits + 3.0, 10.0).item() == pytest.approx(0, abs=1e-5)
    assert kd_loss(logits, logits.flip(1), 10.0).item() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kd_loss_is_computed_in_float32(dtype):
    """At T = 10 the log-probabilities are near -2.3, where bfloat16 has steps of 2**-7."""
    student, teacher = torch.randn(2, 16, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = kd_loss(student.float(), teacher.float(), 10.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = kd_loss(student, teacher, 10.0)
    assert torch.equal(loss, expected)


def test_t_squared_keeps_the_size_of_the_gradient():
    """As T grows the gradient tends to (z - v) / classes, for centred logits (section 2.1)."""
    generator = torch.Generator().manual_seed(0)
    z, v = torch.randn(2, 8, 10, generator=generator)
    z, v = z - z.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    z.requires_grad_()
    for temperature in (50.0, 500.0):
        (gradient,) = torch.autograd.grad(kd_loss(z, v, temperature), z)
        assert torch.allclose(gradient * len(z), (z - v).detach() / 10, atol=0.5 / temperature)


def test_the_gradient_reaches_the_student_alone():
    student, teacher = torch.randn(2, 4, 10).unbind()
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    kd_loss(student, teacher, 10.0).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


# ------------------------------------------------------------------------------------------ loops


@pytest.mark.parametrize("source", ["file", "random"])
def test_a_run_leaves_its_teacher_as_it_was_loaded(source, demo_teacher, workdir, monkeypatch):
    """The script's own teacher: neither trained, nor drifting with its BatchNorm statistics."""
    load, kept = student_script.load_teacher, {}

    def load_teacher(*args):
        teacher, *rest = load(*args)
        kept["teacher"] = teacher.train()  # it is for the script to freeze it
        kept["state"] = {key: value.clone() for key, value in teacher.state_dict().items()}
        return teacher, *rest

    monkeypatch.setattr(student_script, "load_teacher", load_teacher)
    weights = demo_teacher if source == "file" else source
    run_student("--teacher_weights", weights, "--amp", "off", "--run_dir", "run", "--epochs", 1)
    teacher, state = kept["teacher"], kept["state"]
    assert any(key.endswith("running_mean") for key in state)  # the buffers are compared too
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


class Found(TorchDispatchMode):
    """Notes every operation that a tensor of a given dtype takes part in."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.operations, self.count = dtype, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += 1
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor) and x.dtype == self.dtype:
                self.operations.add(str(function))
        return result


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_nothing_that_a_device_computes_is_float64(optimizer, augment):
    """MPS has no float64."""
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.AdaptiveAvgPool2d(1))
    model = model.append(nn.Flatten()).append(nn.Linear(10, 10))
    args = recipe(optimizer=optimizer, scheduler="linear", warmup=0.1)
    images = made_set(32)

    def loss_fn(images, labels):
        loss, matches = label_loss(model(images), labels)
        return loss + kd_loss(model(images), ema.model(images), 4.0), matches

    with Found(torch.float64) as found:
        rule = build_optimizer(model, args)
        scheduler, ema = build_scheduler(rule, args, 2), EMA(model, 0.9)
        loader = DeviceLoader(images, 16, "cpu", train=True, augment=augment)
        train_one_epoch(model, loader, TrainStep(loss_fn, rule, None, ema.update), scheduler)
        predict(ema.model, DeviceLoader(made_set(9), 5, "cpu", train=False))
    assert found.count > 100  # it has seen the training
    assert not found.operations
    with Found(torch.float64) as found:  # and it does find what it looks for
        torch.ones(3).double()
    assert found.operations


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_a_step_takes_the_average_after_the_update(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rule, ema = build_optimizer(model, recipe(optimizer=optimizer)), EMA(model, 0.9)
    step = TrainStep(lambda x, y: label_loss(model(x), y), rule, None, ema.update)
    expected = model[0].weight.detach().clone()
    for t in range(1, 4):
        step(torch.randn(4, 3, 8, 8), torch.arange(4))
        decay = (1 + t) / (10 + t)
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(ema.model[0].weight, expected)


def test_a_step_computes_in_the_precision_it_was_told():
    model, seen = nn.Linear(4, 4), []

    def loss_fn(images, labels):
        logits = model(images)
        seen.append(logits.dtype)
        return label_loss(logits, labels)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for amp in (None, torch.bfloat16):
        loss, matches = TrainStep(loss_fn, optimizer, amp)(torch.randn(4, 4), torch.arange(4))
        assert loss.dtype == torch.float32
        assert not loss.requires_grad
        assert (matches.shape, matches.dtype) == ((4,), torch.bool)
    assert seen == [torch.float32, torch.bfloat16]


def test_how_well_a_student_matches_is_agreement_and_loss():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 50, 10)
    result = compare(ours, theirs, 4.0)
    assert result["loss"] == pytest.approx(kd_loss(ours, theirs, 4.0).item())
    same = sum(int(a.argmax() == b.argmax()) for a, b in zip(ours, theirs, strict=True))
    assert 0 < same < 50
    assert result["agreement"] == pytest.approx(100 * same / 50)
    assert compare(theirs, theirs, 4.0) == {"loss": pytest.approx(0, abs=1e-5), "agreement": 100}


def test_training_means_are_over_images_and_batches_are_reported():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

    model, seen, correct = Counting().eval(), [], []
    loader = DeviceLoader(made_set(20), 8, "cpu", train=True)
    losses = iter([1.0, 3.0])

    def loss_fn(images, labels):
        correct.extend((labels < 5).tolist())
        assert model.training
        return model.weight * 0 + next(losses), labels < 5

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = build_scheduler(optimizer, RECIPE, 2)
    step = TrainStep(loss_fn, optimizer)
    result = train_one_epoch(
        model, loader, step, scheduler, on_batch=lambda part, loss: seen.append((part, loss))
    )
    assert set(result) == {"loss", "matches", "images_per_second"}
    assert result["loss"] == 2.0
    assert result["matches"] == pytest.approx(100 * sum(correct) / 16)
    assert len(correct) == 16
    assert result["images_per_second"] > 0
    assert [(part, loss.item()) for part, loss in seen] == [(0.5, 1.0), (1.0, 3.0)]
    assert scheduler.last_epoch == 2


class Linear(nn.Module):
    """Logits from pixels, in float32 to the last bit of every batch size."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(images)[:, :, :2, :2].flatten(1)[:, :10]


def test_evaluation_is_exact_on_an_uneven_last_batch():
    torch.manual_seed(0)
    model, images = Linear(), made_set(23)
    logits = predict(model, DeviceLoader(images, 23, "cpu", train=False))
    assert torch.equal(logits, model(normalize(images.images)))
    assert not model.training
    whole = evaluate(model, DeviceLoader(images, 23, "cpu", train=False))
    assert whole["loss"] == pytest.approx(nn.functional.cross_entropy(logits, images.labels).item())
    for batch_size in (1, 7, 10, 500):
        loader = DeviceLoader(images, batch_size, "cpu", train=False)
        assert torch.equal(predict(model, loader), logits)
        assert evaluate(model, loader) == whole


def test_predictions_in_bfloat16_are_float32_numbers():
    torch.manual_seed(0)
    model, loader = build_model("wrn_16_1"), DeviceLoader(made_set(5), 5, "cpu", train=False)
    exact, rounded = predict(model, loader), predict(model, loader, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_evaluation_counts_right_and_wrong():
    images = made_set(25)

    class Oracle(nn.Module):  # right on all but the labels 0 and 1
        def forward(self, batch):
            start = getattr(self, "start", 0)
            self.start = start + len(batch)
            labels = images.labels[start : self.start]
            return nn.functional.one_hot(torch.where(labels < 2, 9, labels), 10).float()

    result = evaluate(Oracle(), DeviceLoader(images, 10, "cpu", train=False))
    assert result["accuracy"] == pytest.approx(100 * 19 / 25)
