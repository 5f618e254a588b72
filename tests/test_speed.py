"""The fast path computes what the plain one does, and the benchmark compares like with like."""

import functools
import shlex
from argparse import Namespace

import pytest
import speed
import torch
from conftest import started_by
from torch import Tensor, nn
from torch.utils.data import DataLoader

import augmentations
import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
from engine import kd_loss
from models import build_model
from networks import winograd

CPU = torch.device("cpu")


def gradient(
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
    amp: torch.dtype | None = None,
) -> Tensor:
    """Of one KD step on fixed weights and images: all gradients in one vector, as float64."""
    torch.manual_seed(0)
    student, teacher = (
        build_model("wrn_16_1").to(dtype=dtype, memory_format=layout) for _ in range(2)
    )
    images = torch.randn(32, 3, 32, 32).to(dtype=dtype, memory_format=layout)
    teacher.eval()
    with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
        with torch.no_grad():
            teacher_logits = teacher(images)
        loss = kd_loss(student(images), teacher_logits, 10.0)
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in student.parameters()])


def distance(vector: Tensor, reference: Tensor) -> float:
    return ((vector - reference).norm() / reference.norm()).item()


def test_channels_last_changes_nothing_but_rounding():
    """In float64, where rounding is 1e-16. The loss itself is computed in float32."""
    plain, fast = (
        gradient(torch.float64, layout) for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert distance(fast, plain) < 1e-7


def test_bfloat16_changes_a_gradient_by_its_rounding():
    """Each of about a hundred roundings, forward and backward, is one of 2**-9: 2 % in all."""
    exact = gradient(torch.float64)
    assert distance(gradient(), exact) < 1e-3
    assert 1e-3 < distance(gradient(amp=torch.bfloat16), exact) < 0.1


# ------------------------------------------------------------------------------------ the benchmark


@pytest.fixture
def losses(cifake, monkeypatch):
    """The losses of three epochs of a way, without augmentation, the images in a single batch."""
    monkeypatch.setattr(winograd, "ENABLED", winograd.ENABLED)  # a way changes it
    for name in ("RandomCrop", "RandomHorizontalFlip"):
        monkeypatch.setattr(speed.transforms, name, lambda *_, **__: nn.Identity())
    monkeypatch.setattr(  # processes for forty images, two in every epoch and every test
        speed, "DataLoader", lambda *given, **more: DataLoader(*given, **{**more, "num_workers": 0})
    )
    unchanged = (lambda n: (), lambda images: images)
    monkeypatch.setitem(augmentations.AUGMENTATIONS, "crop", unchanged)
    paths = sorted(cifake.glob("*.jpg"))

    def losses(way: str, recipe: Namespace = speed.STUDENT, **more) -> list[float]:
        changes = {"arch": "wrn_16_1", "batch_size": len(paths)}
        recipe = Namespace(**{**vars(recipe), **changes})
        torch.manual_seed(0)
        epoch = speed.WAYS[way](paths, "cifar", CPU, recipe=recipe, **more)
        return [epoch() for _ in range(3)]

    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "ways"),
    [
        (speed.STUDENT, [name for name in speed.WAYS if name.startswith("ours")]),
        (speed.TEACHER, ["ours"]),
    ],
    ids=["student", "teacher"],
)
def test_all_ways_train_alike(recipe, ways, losses, monkeypatch):
    """Same weights, images, loss and optimizer: the same losses, to rounding in float32."""
    # the compiler traces the networks, and leaves their kernels as they are: that takes no minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain = losses("plain", recipe)
    assert plain[2] < plain[1] < plain[0]
    for way in ways:
        assert losses(way, recipe, amp="off") == pytest.approx(plain, rel=1e-4), way


@pytest.mark.parametrize(
    ("script", "published", "of_cpu_sh"),
    [
        (teacher_script, speed.TEACHER, speed.CPU_TEACHER),
        (student_script, speed.STUDENT, speed.CPU_STUDENT),
    ],
    ids=["teacher", "student"],
)
def test_recipes_are_those_of_the_scripts(script, published, of_cpu_sh, workdir):
    lines = [shlex.split(line) for line in started_by(workdir, "cpu.sh")]
    argv = next(flags for path, *flags in lines if path == f"{script.__name__}.py")
    for recipe, args in ((published, []), (of_cpu_sh, argv)):
        expected = {key: value for key, value in vars(recipe).items() if key != "distil"}
        given = script.parse_args(args)
        assert {key: getattr(given, key) for key in expected} == expected


@pytest.mark.parametrize("way", ["teacher of cpu.sh", "student of cpu.sh"])
def test_the_recipes_of_cpu_sh_learn_twenty_images_by_heart(way, cifake):
    recipe = Namespace(**{**vars(speed.RECIPES[way][0]), "batch_size": 20, "lr": 0.01})
    torch.manual_seed(0)
    paths = sorted(cifake.glob("*.jpg"))[:20]
    epoch = speed.WAYS[way](paths, "cifar", CPU, recipe=recipe, amp="off")
    losses = [epoch() for _ in range(3)]
    assert losses[2] < 0.8 * losses[0]


def test_the_arithmetic_is_counted():
    """Four times a forward (the student's, its backward of two, the teacher's).

    Only the gradient of the images is left out.
    """
    with torch.device("meta"):  # shapes are enough
        model, images, macs = build_model(stem="cifar"), torch.zeros(1, 3, 32, 32), {}
        counted = speed.step_gflop("cifar")

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        macs[module] = output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(images)
    expected = 2 * (4 * sum(macs.values()) - macs[model.conv1])
    assert counted == pytest.approx(expected / 1e9, rel=1e-9)
