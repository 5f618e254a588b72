import copy
from argparse import Namespace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

import main_train_cifar10 as student_script
import optimizers
from models import build_model
from optimizers import Muon, build_optimizer, build_scheduler, lr_factor, newton_schulz

RECIPE = student_script.parse_args([])


def tiny() -> nn.Sequential:
    """A network for (B, 3, 4, 4) with filters, a matrix and vectors, always the same."""
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 10))


def recipe(**changes) -> Namespace:
    return Namespace(**{**vars(RECIPE), **changes})


# ------------------------------------------------------------------------------------- optimizers


def test_optimizers_take_their_flags():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2))
    sgd = build_optimizer(model, recipe(nesterov=True))
    assert isinstance(sgd, torch.optim.SGD)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)
    assert group["nesterov"]
    adam = build_optimizer(model, recipe(optimizer="adam", lr=1e-3, weight_decay=0.1))
    assert type(adam) is torch.optim.Adam  # AdamW is one, too
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["weight_decay"]) == (1e-3, 0.1)
    muon = build_optimizer(model, recipe(optimizer="muon", lr=0.1, momentum=0.6, weight_decay=0.2))
    filters, matrices, vectors = muon.param_groups
    assert [len(group["params"]) for group in muon.param_groups] == [1, 1, 2]
    assert (filters["lr"], filters["momentum"], filters["weight_decay"]) == (0.1, 0.6, 0)
    assert (matrices["lr"], vectors["lr"]) == pytest.approx((0.0035, 0.022))
    for group in (matrices, vectors):
        assert (group["momentum"], group["weight_decay"]) == (0.85, 0.2)


@pytest.mark.parametrize("name", ["sgd", "adam", "muon"])
def test_every_trainable_parameter_moves_and_no_frozen_one(name):
    model = tiny()
    model.scale = nn.Parameter(torch.ones(1, 10, 1))  # neither a matrix nor filters
    model[1].weight.requires_grad_(False)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = build_optimizer(model, recipe(optimizer=name))
    (model(torch.randn(4, 3, 4, 4)) * model.scale.view(1, 10)).square().mean().backward()
    optimizer.step()
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key]) == (key == "1.weight"), key


# ------------------------------------------------------------------------------------------- Muon


def polynomial(x: torch.Tensor) -> torch.Tensor:
    return 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5


SHAPES = [(8, 27), (64, 216), (64, 24), (32, 32)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.025)])
def test_an_update_keeps_the_singular_vectors_and_maps_the_values(shape, dtype, tolerance):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    expected = u @ torch.diag(polynomial(polynomial(polynomial(s)))) @ v
    found = newton_schulz(matrix, dtype)
    assert (found.shape, found.dtype) == (matrix.shape, torch.float32)
    assert (found - expected).norm() <= tolerance * expected.norm()
    values = torch.linalg.svdvals(found)
    if shape != (32, 32):  # a square matrix has values next to zero, and three steps lift them less
        assert 0.5 < values.min() < values.max() < 1.3


def test_a_muon_step_is_the_published_one():
    """Two steps of the update in kellerjordan.github.io/posts/muon, written out."""
    torch.manual_seed(0)
    filters, matrix, bias = torch.randn(8, 4, 3, 3), torch.randn(10, 8), torch.randn(10)
    ours = [nn.Parameter(p.clone()) for p in (filters, matrix, bias)]
    optimizer = Muon(ours, lr=0.1, momentum=0.6, weight_decay=0.01, head=2.8)
    momenta = [torch.zeros_like(p) for p in ours]
    sgd = [nn.Parameter(p.clone()) for p in (matrix, bias)]
    theirs = torch.optim.SGD(
        [{"params": sgd[:1], "lr": 0.28}, {"params": sgd[1:], "lr": 0.022}],
        momentum=0.85,
        nesterov=True,
        weight_decay=0.01,
    )
    for _ in range(2):
        gradients = [torch.randn_like(p) for p in ours]
        for p, gradient in zip([*ours, *sgd], [*gradients, *gradients[1:]], strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        theirs.step()
        momenta[0] = 0.6 * momenta[0] + gradients[0]
        update = newton_schulz((gradients[0] + 0.6 * momenta[0]).reshape(8, 36)).view(8, 4, 3, 3)
        filters = filters * 8**0.5 / filters.norm() - 0.1 * update
    torch.testing.assert_close(ours[0].detach(), filters)
    torch.testing.assert_close(ours[1:], sgd)


def test_a_head_learns_as_fast_whether_or_not_its_logits_are_divided_by_9():
    """At first order: the change of the logits, for the same features and the same gradient."""
    changes = {}
    for arch in ("airbench94", "resnet18"):
        model = build_model(arch)
        head = build_optimizer(model, recipe(optimizer="muon", lr=0.1)).param_groups[1]
        assert {len(p) for p in head["params"]} == {10}
        divisor = 9 if arch == "airbench94" else 1
        changes[arch] = head["lr"] / divisor**2
    assert changes["airbench94"] == 2.8 * 0.1 / 81  # as in the published runs, bit for bit
    assert changes["airbench94"] == pytest.approx(changes["resnet18"], rel=0.02)


@pytest.mark.parametrize("fast", [True, False])
def test_muon_multiplies_in_bfloat16_only_in_a_run_that_does(fast, monkeypatch):
    """`--amp off` is float32 throughout."""
    monkeypatch.setattr(optimizers, "has_bfloat16", lambda device: fast)
    args, expected = recipe(optimizer="muon"), torch.bfloat16 if fast else torch.float32
    assert build_optimizer(tiny(), args, torch.bfloat16).dtype == expected
    assert build_optimizer(tiny(), args).dtype == torch.float32


def gradients_of(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model.zero_grad()
    model(torch.randn(4, 3, 4, 4)).logsumexp(1).mean().backward()


def test_a_stored_muon_takes_the_next_step_of_the_first_one():
    ends = []
    for store in (False, True):
        model = tiny()
        optimizer = Muon(model.parameters(), 0.1, 0.6)
        for seed in range(4):
            if store and seed == 2:
                stored = copy.deepcopy(optimizer.state_dict())
                optimizer = Muon(model.parameters(), 0.1, 0.6)
                optimizer.load_state_dict(stored)
            gradients_of(model, seed)
            optimizer.step()
        ends.append(model)
    for one, two in zip(*(model.parameters() for model in ends), strict=True):
        assert torch.equal(one, two)


def test_zero_gradients_and_zero_filters_give_no_nan():
    filters = [nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.zeros(4, 3, 3, 3))]
    optimizer = Muon(filters, 0.1, 0.6)
    before = filters[0].detach().clone()
    for p in filters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(filters[0].detach(), before * 2 / before.norm())
    assert torch.equal(filters[1].detach(), torch.zeros(4, 3, 3, 3))
    filters[1].grad = torch.randn(4, 3, 3, 3)
    optimizer.step()
    assert filters[1].isfinite().all()


@pytest.mark.parametrize("name", ["sgd", "adam", "muon"])
def test_a_rate_in_a_tensor_does_what_a_number_does(name):
    """As in a CUDA graph, which reads it from memory, and which a scheduler has to fill."""
    ends = []
    for as_tensor in (False, True):
        model = tiny()
        args = recipe(optimizer=name, scheduler="linear")
        optimizer = build_optimizer(model, args)
        scheduler = build_scheduler(optimizer, args, 4)
        if as_tensor:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"])
        tensors = [group["lr"] for group in optimizer.param_groups]
        for seed in range(2):
            gradients_of(model, seed)
            optimizer.step()
            scheduler.step()
        if as_tensor:
            assert all(g["lr"] is t for g, t in zip(optimizer.param_groups, tensors, strict=True))
        ends.append(model)
    for one, two in zip(*(model.parameters() for model in ends), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------- schedules


def rates(scheduler, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", ["multistep", "cosine", "onecycle"])
@pytest.mark.parametrize("steps", [10, 50, 391])
def test_schedules_are_pytorchs_own(name, steps):
    ours = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.05)
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.05)
    reference = {
        "multistep": lambda: MultiStepLR(theirs, [-(-steps * 3 // 10), -(-steps * 4 // 5)], 0.2),
        "cosine": lambda: CosineAnnealingLR(theirs, steps),
        "onecycle": lambda: OneCycleLR(theirs, 0.05, total_steps=steps, cycle_momentum=False),
    }[name]()
    args = recipe(scheduler=name, milestones=[0.3, 0.8], gamma=0.2)  # not the defaults
    mine = rates(build_scheduler(ours, args, steps), steps)
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


def test_linear_is_a_straight_line_to_zero():
    factors = [lr_factor("linear", step, 8) for step in range(9)]
    assert factors == [1 - step / 8 for step in range(9)]  # airbench's; step 8 is never trained


@pytest.mark.parametrize("steps", [10, 100, 781])
@pytest.mark.parametrize("warmup", [0.1, 0.5, 0.9])
def test_linear_with_warmup_is_a_triangle(steps, warmup):
    args = recipe(scheduler="linear", warmup=warmup, lr=1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    factors = rates(build_scheduler(optimizer, args, steps), steps)
    top = max(range(steps), key=lambda step: factors[step])
    assert abs(top - warmup * steps) <= 1
    assert 1 - 1 / (warmup * steps + 1) <= factors[top] <= 1
    rise, fall = factors[: top + 1], [*factors[top + 1 :], 0.0]
    for line in (rise, fall):
        slopes = [b - a for a, b in pairwise(line)]
        assert slopes == pytest.approx(slopes[:1] * len(slopes), abs=1e-9)
    assert min(rise + fall[:-1]) > 0


@pytest.mark.parametrize("name", ["none", "multistep", "cosine", "onecycle", "linear"])
def test_the_shortest_runs_have_a_rate_to_learn_with(name):
    for steps in (1, 2, 3, 4):
        for warmup in (0.0, 0.1, 0.9):
            factors = [lr_factor(name, step, steps, warmup=warmup) for step in range(steps)]
            assert max(factors) > 0.5
            assert all(0 < factor <= 1 for factor in factors)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'lineal'"):
        lr_factor("lineal", 0, 10)
