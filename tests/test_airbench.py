"""The airbench networks: what is frozen, how they start, and that bfloat16 computes each layer."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, TINY
from torch import nn

import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
from data import load_cifake, load_cifar10, normalize
from models import build_model, load_model, read_weights
from networks.airbench import BatchNorm
from synthetic_data.demo_images import load_demo


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return normalize(load_demo("train").images[:64])


def test_whitened_patches_are_uncorrelated_and_of_variance_one(pictures):
    model = build_model("airbench94")
    model.whiten(pictures)
    filters = model.whitening.weight
    assert torch.equal(filters[:12], -filters[12:])
    projections = F.conv2d(pictures.double(), filters[:12].double()).transpose(0, 1).flatten(1)
    moments = projections @ projections.T / projections.shape[1]
    patches = F.unfold(pictures.double(), 2).transpose(1, 2).reshape(-1, 12)
    values = torch.linalg.eigvalsh(patches.T @ patches / len(patches))
    assert values.min() > 1e-6  # else there would be nothing to be whitened
    torch.testing.assert_close(moments, torch.diag(values / (values + 5e-4)), rtol=0, atol=1e-3)


def test_a_network_starts_as_an_identity_and_trains_all_but_what_is_frozen():
    model = build_model("airbench94")
    convolutions = [m for m in model.groups.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 6
    for conv in convolutions:
        images = torch.randn(2, conv.in_channels, 5, 5)
        torch.testing.assert_close(conv(images)[:, : conv.in_channels], images)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    norms = {n for n, module in model.named_modules() if isinstance(module, BatchNorm)}
    assert frozen == {"whitening.weight", *(f"{name}.weight" for name in norms)}
    assert len(norms) == 6
    assert not model.whitening.bias.any()


def test_the_logits_are_those_of_the_published_network(pictures):
    """Its layers in the order of airbench94_muon.py, written out, with the weights we give away."""
    model = load_model(REPOSITORY / "weights" / "airbench94_cifar10.pth")
    w = model.state_dict()

    def norm(x, name):
        statistics = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, *statistics, None, w[f"{name}.bias"], eps=1e-12)

    x = F.gelu(F.conv2d(pictures, w["whitening.weight"], w["whitening.bias"]))
    for group in ("groups.1", "groups.2", "groups.3"):
        x = F.max_pool2d(F.conv2d(x, w[f"{group}.0.weight"], padding=1), 2)
        x = F.gelu(norm(x, f"{group}.2"))
        x = F.gelu(norm(F.conv2d(x, w[f"{group}.4.weight"], padding=1), f"{group}.5"))
    expected = F.max_pool2d(x, 3).flatten(1) @ w["head.weight"].T / 9
    torch.testing.assert_close(model(pictures).detach(), expected, rtol=1e-4, atol=1e-4)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert {(module.eps, module.momentum) for module in norms} == {(1e-12, 0.4)}


@pytest.mark.slow
def test_every_layer_computes_in_bfloat16_what_it_does_in_float32(pictures):
    """Each by itself, on the inputs and the gradients that it has in float32."""
    torch.manual_seed(0)
    model = build_model("airbench94").train()
    model.whiten(pictures)
    layers = {n: m for n, m in model.named_modules() if n and not list(m.children())}
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    model(pictures[:16])
    assert seen.keys() == layers.keys()
    for name, (given, expected) in seen.items():
        gradient = torch.randn_like(expected)
        results = {}
        for amp in (False, True):
            inputs = given.detach().clone().requires_grad_()
            weights = [p for p in layers[name].parameters() if p.requires_grad]
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                output = layers[name](inputs)
            gradients = torch.autograd.grad(output, [inputs, *weights], gradient.to(output.dtype))
            results[amp] = [output.detach().float(), *(g.float() for g in gradients)]
        for exact, rounded in zip(results[False], results[True], strict=True):
            assert (rounded - exact).norm() < 0.02 * exact.norm() + 1e-6, name


@pytest.mark.slow
def test_a_students_filters_come_from_its_own_images(workdir, cifake, cifar10_binary):
    """No real image reaches a student."""
    flags = "--arch airbench94 --optimizer muon --epochs 1 --batch_size 20 --device cpu".split()
    flags += ["--data_dir", str(cifar10_binary)]
    teacher = [*flags, "--init", "random", "--limit", "40", "--output", "teacher.pth"]
    teacher_script.main(teacher_script.parse_args(teacher))
    student = [*flags, "--synthetic_data_dir", str(cifake), "--teacher_weights", "teacher.pth"]
    student_script.main(student_script.parse_args([*student, "--output", "student.pth"]))
    for file, images in (
        ("teacher.pth", load_cifar10(cifar10_binary, train=True).images[:40]),
        ("student.pth", load_cifake(cifake).images),
        ("runs/student-001/last.pt", load_cifake(cifake).images),
    ):
        expected = build_model("airbench94")
        expected.whiten(normalize(images))
        filters = read_weights(Path(file))[0]["whitening.weight"]
        assert torch.equal(filters, expected.whitening.weight), file


@pytest.mark.slow
def test_muon_keeps_the_norm_of_the_filters_in_a_run(workdir):
    argv = [*TINY, "--arch", "airbench94", "--stem", "cifar", "--optimizer", "muon", "--lr", "0.2"]
    argv += ["--momentum", "0.6", "--epochs", "1", "--output", "out.pth"]
    teacher_script.main(teacher_script.parse_args(argv))
    weights = read_weights(Path("out.pth"))[0]
    filters = [w for name, w in weights.items() if w.ndim == 4 and "whitening" not in name]
    assert len(filters) == 6
    for bank in filters:  # renormalised before each step, which then adds 0.2 of about one a row
        assert bank.norm() / len(bank) ** 0.5 == pytest.approx(1, abs=0.25)


@pytest.mark.slow
def test_a_start_from_a_file_keeps_its_filters(workdir):
    source = REPOSITORY / "weights" / "airbench94_cifar10.pth"
    argv = [*TINY, "--arch", "airbench94", "--stem", "cifar", "--init", str(source)]
    teacher_script.main(teacher_script.parse_args([*argv, "--epochs", "1", "--output", "out.pth"]))
    ours, theirs = (read_weights(path)[0]["whitening.weight"] for path in ("out.pth", source))
    assert torch.equal(ours, theirs.float())
