import math
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

import main_train_cifar10 as student_script
from data import DeviceLoader, ImageSet, normalize
from engine import (
    TrainStep,
    WeightAverage,
    build_optimizer,
    build_scheduler,
    evaluate,
    evaluate_kd,
    kd_loss,
    lr_factor,
    per_class_accuracy,
    standardize,
    train_one_epoch,
)
from models import build_model

RECIPE = student_script.parse_args([])


def made_set(n: int) -> ImageSet:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(n) % 10, tuple("abcdefghij"))


def rates(scheduler, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


# ------------------------------------------------------------------------------------------- loss


def test_standardized_logits_are_those_of_the_paper():
    logits = 5 * torch.randn(4, 10) + 3
    rows = [[(x - row.mean()) / row.std(correction=0) for x in row] for row in logits]
    assert torch.allclose(standardize(logits), torch.tensor(rows), atol=1e-5)
    assert torch.equal(standardize(torch.ones(1, 10)), torch.zeros(1, 10))  # and not nan


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


def test_an_epoch_leaves_the_teacher_as_it_was_and_moves_the_student():
    torch.manual_seed(0)
    student, teacher = build_model(stem="imagenet"), build_model(stem="imagenet")
    teacher.eval().requires_grad_(False)
    teacher_before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student_before = {key: value.clone() for key, value in student.state_dict().items()}
    loader = DeviceLoader(made_set(40), 16, "cpu", train=True)
    optimizer = build_optimizer(student, RECIPE)
    scheduler = build_scheduler(optimizer, RECIPE, len(loader))

    def loss_fn(images, labels):
        with torch.inference_mode():
            teacher_logits = teacher(images)
        logits = student(images)
        return kd_loss(logits, teacher_logits, 10.0), logits.argmax(1) == teacher_logits.argmax(1)

    result = train_one_epoch(student, loader, TrainStep(loss_fn, optimizer), scheduler)

    assert set(result) == {"loss", "hits", "images_per_second"}
    assert math.isfinite(result["loss"])
    assert 0 <= result["hits"] <= 100
    assert "bn1.running_mean" in teacher_before  # the buffers are compared too
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, teacher_before[key]), key
    for key, value in student.state_dict().items():
        assert not torch.equal(value, student_before[key]), key


def test_an_average_of_weights_follows_the_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, decay=0.9)
    expected = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        model(torch.randn(8, 3)).sum().backward()
        for p in model.parameters():
            p.data -= 0.1 * p.grad
        average.update()
        expected = [
            0.9 * e + 0.1 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)
        ]
    for mean, by_hand in zip(average.model.parameters(), expected, strict=True):
        assert torch.allclose(mean, by_hand)
        assert not mean.requires_grad
    assert average.model[1].num_batches_tracked == 3
    assert not torch.equal(average.model[1].running_mean, torch.zeros(2))
    assert not average.model.training


def test_how_well_a_student_matches_needs_no_label():
    torch.manual_seed(0)
    student, teacher = build_model(stem="imagenet"), build_model(stem="imagenet").eval()
    images = made_set(23)
    loader = DeviceLoader(images, 10, "cpu", train=False)
    result = evaluate_kd(student, teacher, loader, 4.0)
    with torch.inference_mode():
        ours, theirs = student(normalize(images.images)), teacher(normalize(images.images))
    assert result["loss"] == pytest.approx(kd_loss(ours, theirs, 4.0).item(), rel=1e-4)
    agreement = (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
    assert result["agreement"] == pytest.approx(100 * agreement)
    assert evaluate_kd(teacher, teacher, loader, 4.0)["agreement"] == 100
    loss = evaluate_kd(student, teacher, loader, 4.0, standardized=True)["loss"]
    by_hand = kd_loss(standardize(ours), standardize(theirs), 4.0).item()
    assert loss == pytest.approx(by_hand, rel=1e-4)


def test_accuracy_by_class_adds_up():
    torch.manual_seed(0)
    model, images = build_model(stem="imagenet"), made_set(40)
    loader = DeviceLoader(images, 15, "cpu", train=False)
    per_class = per_class_accuracy(model, loader)
    assert len(per_class) == 10
    assert sum(per_class) / 10 == pytest.approx(evaluate(model, loader)["accuracy"])


def test_training_means_are_over_images_and_batches_are_reported():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

    model, seen = Counting(), []
    loader = DeviceLoader(made_set(20), 8, "cpu", train=True)
    losses = iter([1.0, 3.0])

    def loss_fn(images, labels):
        return model.weight * 0 + next(losses), labels < 5

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = build_scheduler(optimizer, RECIPE, 2)
    step = TrainStep(loss_fn, optimizer)
    result = train_one_epoch(
        model, loader, step, scheduler, on_batch=lambda n, loss: seen.append((n, loss))
    )
    assert result["loss"] == 2.0
    assert [(n, loss.item()) for n, loss in seen] == [(8, 1.0), (8, 3.0)]


def test_evaluation_is_exact_on_an_uneven_last_batch():
    torch.manual_seed(0)
    model, images = build_model(stem="imagenet"), made_set(23)
    whole = evaluate(model, DeviceLoader(images, 23, "cpu", train=False))
    for batch_size in (1, 7, 10, 500):
        parts = evaluate(model, DeviceLoader(images, batch_size, "cpu", train=False))
        assert parts["accuracy"] == whole["accuracy"]
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert not model.training


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


# -------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", ["multistep", "cosine", "onecycle"])
@pytest.mark.parametrize("steps", [10, 50, 391])
def test_schedules_are_pytorchs_own(name, steps):
    ours = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.05)
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.05)
    reference = {
        "multistep": lambda: MultiStepLR(theirs, [-(-steps // 2), -(-steps * 4 // 5)], 0.1),
        "cosine": lambda: CosineAnnealingLR(theirs, steps),
        "onecycle": lambda: OneCycleLR(theirs, 0.05, total_steps=steps, cycle_momentum=False),
    }[name]()
    recipe = Namespace(**{**vars(RECIPE), "scheduler": name})
    mine = rates(build_scheduler(ours, recipe, steps), steps)
    expected = []
    for step in range(steps):  # OneCycleLR refuses a step after the last
        expected.append(reference.get_last_lr()[0])
        if step < steps - 1:
            theirs.step()
            reference.step()
    assert mine == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 50])
def test_milestones_keep_their_place_in_a_run_of_any_length(epochs):
    factors = [lr_factor("multistep", step, epochs * 390) for step in range(epochs * 390)]
    assert factors[0] == 1
    changes = [s for s in range(1, len(factors)) if factors[s] != factors[s - 1]]
    assert changes == [epochs * 390 * 5 // 10, epochs * 390 * 8 // 10]
    assert factors[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["none", "multistep", "cosine", "onecycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_shortest_runs_have_a_rate_to_learn_with(name, steps):
    factors = [lr_factor(name, step, steps) for step in range(steps)]
    assert max(factors) > 0.5
    assert all(0 < factor <= 1 for factor in factors)


def test_optimizers_take_their_flags():
    model = nn.Linear(2, 2)
    sgd = build_optimizer(model, Namespace(**{**vars(RECIPE), "nesterov": True}))
    assert isinstance(sgd, torch.optim.SGD)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)
    assert group["nesterov"]
    adam = build_optimizer(model, Namespace(**{**vars(RECIPE), "optimizer": "adam"}))
    assert isinstance(adam, torch.optim.Adam)
    assert adam.param_groups[0]["lr"] == 0.05
