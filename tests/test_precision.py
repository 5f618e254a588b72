"""Devices and precisions: what a CPU can show of float16, and of devices that are not here."""

import copy

import pytest
import torch
from conftest import assert_equal_weights, metrics, run_student, run_teacher, stop_after
from torch import nn

import fine_tune_teacher_cifar10 as script
from engine import TrainStep, label_loss
from experiment import device as devices
from experiment.device import has_kernels, pick_device
from experiment.errors import UserError
from optimizers import Muon
from synthetic_data.ema import EMA

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
    "muon": lambda parameters: Muon(parameters, 0.1, momentum=0.6),
}


FEW = "--limit 8 --batch_size 4".split()  # convolutions in float16 are slow on a CPU


def tiny(optimizer: str, amp: torch.dtype | None, decay: float = 0.0):
    """A convolution and a linear layer, and a step whose loss can be made to overflow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    rule = OPTIMIZERS[optimizer](model.parameters())
    ema = EMA(model, decay)
    factor = torch.ones(())

    def loss_fn(images, labels):
        loss, matches = label_loss(model(images), labels)
        return loss * factor, matches

    return model, rule, ema, factor, TrainStep(loss_fn, rule, amp, ema.update)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 10


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float16_trains_as_float32_does(optimizer):
    losses = {}
    for amp in (None, torch.float16):
        step = tiny(optimizer, amp)[-1]
        losses[amp] = torch.stack([step(*batch(seed))[0] for seed in range(8)])
    torch.testing.assert_close(losses[None], losses[torch.float16], rtol=0.02, atol=0)
    assert not torch.equal(losses[None], losses[torch.float16])  # it was float16


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_overflow_skips_the_step_and_halves_the_scale(optimizer, decay):
    model, rule, ema, factor, step = tiny(optimizer, torch.float16, decay)
    for seed in range(2):
        step(*batch(seed))
    before = copy.deepcopy([model.state_dict(), rule.state_dict()["state"], ema.model.state_dict()])
    updates, scale = copy.deepcopy(ema.state_dict()), step.scaler.get_scale()
    factor.fill_(torch.inf)
    step(*batch(2))
    after = [model.state_dict(), rule.state_dict()["state"], ema.model.state_dict()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert ema.state_dict() == updates
    assert step.scaler.get_scale() == scale / 2
    factor.fill_(1)
    step(*batch(2))
    assert not torch.equal(model[0].weight, before[0]["0.weight"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_first_step_that_overflows_leaves_nothing_behind(optimizer):
    """Fused SGD would otherwise go on with a momentum of uninitialised memory."""
    ends = {}
    for overflows in (True, False):
        model, _, _, factor, step = tiny(optimizer, torch.float16)
        if overflows:
            factor.fill_(torch.inf)
            step(*batch(0))
            factor.fill_(1)
        for seed in (1, 2):
            step(*batch(seed))
        ends[overflows] = model.state_dict()
    torch.testing.assert_close(ends[True], ends[False], rtol=1e-3, atol=1e-5)


def test_the_scale_is_saved_and_restored():
    factor, step = tiny("sgd", torch.float16)[-2:]
    factor.fill_(torch.inf)
    step(*batch(0))
    saved = copy.deepcopy(step.state_dict())
    other = tiny("sgd", torch.float16)[-1]
    other.load_state_dict(saved)
    assert other.state_dict() == saved
    in_float32 = tiny("sgd", None)[-1]
    assert in_float32.state_dict() == {}
    in_float32.load_state_dict(saved)  # a run that is resumed in another precision
    other.load_state_dict({})
    assert other.state_dict() == saved


@pytest.mark.slow
def test_a_float16_run_is_resumed_bit_for_bit(workdir, monkeypatch):
    flags = [*FEW, "--amp", "fp16"]
    run_teacher(*flags, "--run_dir", "whole", "--output", "whole.pth")
    with monkeypatch.context() as patch:
        stop_after(patch, script, 1)
        with pytest.raises(KeyboardInterrupt):
            run_teacher(*flags, "--run_dir", "cut", "--output", "cut.pth")
    script.main(script.parse_args(["--resume", "cut"]))
    assert_equal_weights("whole.pth", "cut.pth")
    saved = torch.load("cut/last.pt", weights_only=True)["step"]
    assert saved["scale"] > 1


@pytest.mark.slow
def test_a_student_trains_in_float16_as_in_float32(workdir, demo_teacher, capsys):
    for amp in ("fp16", "off"):
        flags = ["--amp", amp, "--run_dir", amp, "--output", f"{amp}.pth", "--epochs", 1]
        run_student(*FEW, *flags, "--teacher_weights", demo_teacher)
        assert f", {'float16' if amp == 'fp16' else 'float32'}\n" in capsys.readouterr().out
    half, single = (float(metrics(amp)[0]["train_loss"]) for amp in ("fp16", "off"))
    assert half == pytest.approx(single, rel=0.01)
    assert half != single  # it was float16


class Backend:
    """A stand-in for torch.cuda, torch.mps or torch.xpu."""

    def __init__(self, count: int) -> None:
        self.count = count

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count


def test_auto_takes_the_accelerator_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: Backend(1))
    assert pick_device("auto", "auto") == (torch.device("mps"), None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pick_device("auto", "off") == (torch.device("cpu"), None)


@pytest.mark.parametrize("name", ["cuda", "cuda:2", "cuda:200", "cuda:999", "mps", "xpu"])
def test_a_device_that_is_not_there_is_one_line(name, monkeypatch):
    count = 2 if ":" in name else 0
    monkeypatch.setattr(torch, "get_device_module", lambda _: Backend(count))
    with pytest.raises(UserError, match=rf"--device {name}: PyTorch finds {count} "):
        pick_device(name, "auto")


def test_torchrun_is_for_cuda_and_cpus(monkeypatch):
    monkeypatch.setattr(devices.parallel, "world_size", lambda: 2)
    with pytest.raises(UserError, match="not for mps"):
        pick_device("mps", "auto")


def test_float16_is_for_cuda_and_cpus(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda _: Backend(1))
    with pytest.raises(UserError, match="--amp fp16 is for CUDA and CPUs, not for mps"):
        pick_device("mps", "fp16")
    assert pick_device("mps", "bf16")[1] == torch.bfloat16


@pytest.mark.parametrize(
    ("cuda_has_bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float16)]
)
def test_auto_is_float16_on_a_gpu_without_bfloat16(cuda_has_bfloat16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: cuda_has_bfloat16)
    assert devices._autocast_dtype(torch.device("cuda"), "auto") == expected
    assert devices._autocast_dtype(torch.device("cuda"), "off") is None


@pytest.mark.parametrize(
    ("features", "expected"), [("avx2 amx_bf16", True), ("avx2 avx512f", False)]
)
def test_auto_is_bfloat16_on_a_cpu_that_multiplies_it(features, expected, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_info", lambda _: features)
    assert (devices._autocast_dtype(torch.device("cpu"), "auto") is not None) == expected


def test_a_gpu_without_kernels_is_recognised():
    wheels = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "compute_120"]
    assert not has_kernels((6, 0), wheels)  # a P100
    assert has_kernels((7, 5), wheels)  # a T4
    assert has_kernels((8, 9), wheels)  # an L4 runs what was built for sm_86
    assert not has_kernels((7, 0), wheels)  # a V100 does not run what was built for sm_75
    assert has_kernels((12, 1), wheels)  # by PTX
    assert has_kernels((9, 0), ["sm_90a"])
    assert has_kernels((9, 0), ["gfx900", "gfx90a"])  # AMD
