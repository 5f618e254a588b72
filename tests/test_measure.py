"""synthetic_data/measure.py, on made data."""

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import fails, snapshot

from data import CLASSES, load_cifake, load_cifar10, normalize
from experiment.files import save
from models import build_model, load_model, to_checkpoint
from synthetic_data import measure


@pytest.fixture
def argv(workdir, cifake, cifar10_binary) -> list[str]:
    torch.manual_seed(0)
    save(Path("teacher.pth"), to_checkpoint(build_model("wrn_16_1"), CLASSES))
    flags = f"{cifake} --output out --teacher_weights teacher.pth --data_dir {cifar10_binary}"
    return [*flags.split(), "--device", "cpu"]


def test_what_is_measured(argv, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    measure.main(measure.parse_args(argv))
    measures = json.loads(Path("out/measures.json").read_text())
    assert measures["count"] == 40
    made, teacher = load_cifake(argv[0]), load_model("teacher.pth").eval()
    with torch.no_grad():
        logits = teacher(normalize(made.images))
    probabilities, soft = logits.softmax(1), (logits.double() / 10).softmax(1)
    predictions = Counter(CLASSES[i] for i in probabilities.argmax(1))
    assert measures["predictions"] == {name: predictions[name] for name in CLASSES}
    assert measures["labels"] == dict.fromkeys(CLASSES, 4)
    right = (probabilities.argmax(1) == made.labels).sum().item()
    assert measures["teacher_accuracy"] == pytest.approx(100 * right / 40)
    confidence = 100 * probabilities.amax(1).mean().item()
    assert measures["confidence"] == pytest.approx(confidence, rel=1e-4)
    assert measures["entropy"] == pytest.approx(-(soft * soft.log()).sum(1).mean().item(), rel=1e-4)
    assert measures["entropy"] < math.log(10)
    real = load_cifar10(argv[-3], train=True).images.double().transpose(0, 1).flatten(1)
    assert measures["mean_of_cifar10"] == pytest.approx(real.mean(1).tolist())
    assert measures["std_of_cifar10"] == pytest.approx(real.std(1).tolist(), rel=1e-4)
    assert len(measures["mean"]) == len(measures["std"]) == 3
    assert measures["pixels"] == pytest.approx((53.5**2 + 73.9**2) ** 0.5, abs=5)
    assert measures["pixels_of_test_images"] == pytest.approx(2**0.5 * 73.9, abs=5)  # all is noise
    assert measures["fid"] is None
    assert "FID: not available, for want of torch-fidelity" in capsys.readouterr().out
    assert Path("out/nearest.png").exists()


@pytest.mark.parametrize(
    ("arch", "size"), [("resnet18", 512), ("wrn_16_1", 64), ("mobilenet_v2", 1280)]
)
def test_features_are_what_the_last_layer_sees(arch, size, cifar10_binary):
    real = load_cifar10(cifar10_binary, train=True).first(3)
    teacher = build_model(arch).eval()
    features = measure.as_features(real, teacher, torch.device("cpu"))
    assert features.shape == (3, size)
    assert torch.allclose(features.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_a_copy_is_found(kind, argv, cifar10_binary):
    real = load_cifar10(cifar10_binary, train=True)
    copies = replace(real.first(30), images=real.images[:30].clone())
    copies.images[::2] = copies.images[::2].flip(3)  # every other is mirrored
    view = partial(measure.as_pixels, device=torch.device("cpu"))
    if kind == "features":
        teacher = build_model(stem="imagenet").eval()
        view = partial(measure.as_features, teacher=teacher, device=torch.device("cpu"))
    distance, index = measure.nearest(view, copies, view(real))
    assert distance.max() < 0.1
    assert index.tolist() == list(range(30))


def test_bad_input(argv, capsys):
    for more, code, expected in (
        (["--neighbours", "3"], 2, "--neighbours: '3' is no whole number from 24"),
        (["--teacher_weights", "nothing"], 1, "there is no weight file nothing"),
        (["--data_dir", "teacher.pth/x"], 1, "CIFAR-10"),
    ):
        found, text = fails(measure, [*argv, *more], capsys)
        assert found == code
        assert expected in text
    assert "there is no folder nowhere" in fails(measure, ["nowhere", *argv[1:]], capsys)[1]
    for output in (argv[0], f"{argv[0]}/measures"):  # where the next student would stumble over it
        code, text = fails(measure, [*argv, "--output", output], capsys)
        assert (code, text) == (1, f"error: {output} is among the images: name another folder")


def test_no_file_is_written_over(argv, workdir, capsys):
    Path("out").mkdir()
    Path("theirs.json").write_text("precious")
    for name in measure.RESULTS:
        Path("out", name).symlink_to("theirs.json" if name.endswith("json") else "nothing")
        before = snapshot(workdir)
        assert f"out/{name} exists: name another --output" in fails(measure, argv, capsys)[1]
        assert snapshot(workdir) == before
        Path("out", name).unlink()
    assert "theirs.json" in fails(measure, [*argv, "--output", "theirs.json"], capsys)[1]
    assert Path("theirs.json").read_text() == "precious"


def test_a_teacher_of_other_classes_is_refused(argv, capsys):
    """Such as that of --demo, whose accuracy on these images would mean nothing."""
    save(Path("teacher.pth"), to_checkpoint(build_model("wrn_16_1"), tuple("abcdefghij")))
    code, text = fails(measure, argv, capsys)
    assert (code, "expected classes ['airplane'" in text) == (1, True)
    assert not Path("out").exists()
