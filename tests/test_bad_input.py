"""Whatever is wrong: one clear line, exit code 2 for usage, else 1, and nothing is harmed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL_NETWORK, fails, snapshot
from torchvision.datasets import CIFAR10
from torchvision.models import resnet34

import data
import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
from experiment.errors import UserError
from experiment.folder import FORMAT
from models import build_model, to_checkpoint

BAD_FLAGS = [
    (["--epochs", "0"], "--epochs: '0' is no whole number from 1"),
    (["--epochs", "-3"], "--epochs: '-3' is no whole number"),
    (["--epochs", "1e3"], "--epochs: '1e3' is no whole number"),
    (["--epochs", "9999999"], "--epochs: '9999999' is no whole number"),
    (["--batch_size", "0"], "--batch_size: '0' is no whole number from 2"),
    (["--limit", "0"], "--limit: '0' is no whole number from 1"),
    (["--lr", "-0.1"], "--lr: '-0.1' is no number above 0"),
    (["--lr", "0"], "--lr: '0' is no number above 0"),
    (["--lr", "nan"], "--lr: 'nan' is no number"),
    (["--lr", "inf"], "--lr: 'inf' is no number"),
    (["--lr", "fast"], "--lr: 'fast' is no number"),
    (["--momentum", "1"], "--momentum: '1' is no number from 0 to 0.9999"),
    (["--weight_decay", "-1"], "--weight_decay: '-1' is no number from 0"),
    (["--milestones", "0.5", "25"], "--milestones: '25' is no number above 0 to 1"),
    (["--warmup", "1"], "--warmup: '1' is no number from 0 to 0.9"),
    (["--augment", "none"], "--augment: invalid choice: 'none'"),
    (["--gamma", "0"], "--gamma: '0' is no number above 0 to 1"),
    (["--seed", "-1"], "--seed: '-1' is no whole number from 0"),
    (["--stem", "vit"], "--stem: invalid choice: 'vit'"),
    (["--optimizer", "lion"], "--optimizer: invalid choice: 'lion'"),
    (["--scheduler", "poly"], "--scheduler: invalid choice: 'poly'"),
    (["--device", "tpu"], "--device: 'tpu' is none of auto, cpu, cuda"),
    (["--device", "meta"], "--device: 'meta' is none of auto, cpu, cuda"),
    (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["--run_dir"], "--run_dir: expected one argument"),
    (["--data_dir", "mine"], "--data_dir needs leaving --demo out"),
]


@pytest.mark.parametrize("script", [teacher_script, student_script])
@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_flags_that_make_no_sense(script, flags, message, workdir, capsys):
    code, text = fails(script, ["--demo", *flags], capsys)
    assert code == 2
    assert message in text
    assert not list(workdir.iterdir())


@pytest.mark.parametrize("name", ["--temperature", "--kd_temp"])
@pytest.mark.parametrize("value", ["0", "-4", "0.001", "1001", "nan", "hot"])
def test_temperatures_that_make_no_sense(name, value, workdir, capsys):
    code, text = fails(student_script, [name, value], capsys)
    assert code == 2
    assert f"--temperature/--kd_temp: '{value}' is no number from 0.01 to 1000" in text
    assert not list(workdir.iterdir())


# -------------------------------------------------------------------- a student, file by file


@pytest.fixture
def student(workdir, cifake, cifar10_binary, capsys):
    """A complete set of good files, and a function that runs the student on it with changes."""
    torch.save(to_checkpoint(build_model("wrn_16_1"), data.CLASSES), "teacher.pth")
    Path("student_cifar10_kd.pth").write_text("precious")
    good = {
        "data_dir": cifar10_binary,
        "synthetic_data_dir": cifake,
        "teacher_weights": "teacher.pth",
        "arch": "wrn_16_1",
        "batch_size": 8,
        "epochs": 1,
        "device": "cpu",
    }

    def expect(message: str, **changes) -> None:
        before = snapshot(workdir)
        argv = []
        for key, value in {**good, **changes}.items():
            argv += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        code, text = fails(student_script, argv, capsys)
        assert code == 1
        assert message in text
        assert snapshot(workdir) == before

    return expect


def test_synthetic_images(student, cifake, workdir):
    student("there is no folder nowhere: download http", synthetic_data_dir="nowhere")
    (workdir / "empty").mkdir()
    student("there are no synthetic images in empty", synthetic_data_dir="empty")
    rule = "not named 'NNNN.jpg', or 'NNNN (k).jpg' with k from 2 to 10"
    for name, message in [
        ("1000 (11).jpg", f"1000 (11).jpg: {rule}"),
        ("1000 (3).backup.png", f"1000 (3).backup.png: {rule}"),
        ("kitten.jpg", f"kitten.jpg: {rule}"),
        ("list.csv", f"list.csv: {rule}"),
        ("2001 (3).png", "2001 (3).png: not an image that can be read"),
    ]:
        (cifake / name).write_bytes(b"")
        student(message)
        (cifake / name).unlink()
    student("--batch_size 41 is more than the 40 training images", batch_size=41)
    student("--batch_size 8 is more than the 5 training images", limit=5)


def test_teachers(student, workdir, capsys):
    make = "make one with `python fine_tune_teacher_cifar10.py --output nobody.pth`"
    student(f"no teacher at nobody.pth: {make}", teacher_weights="nobody.pth")
    student("no teacher at data: make one with", teacher_weights="data")
    command = r"`python fine_tune_teacher_cifar10.py --demo`"
    assert command in fails(student_script, ["--demo"], capsys)[1]
    args = student_script.parse_args(["--dataset", "cifar100"])
    with pytest.raises(UserError, match=r"cifar10\.py --dataset cifar100`"):
        student_script.load_teacher(args, ("apple",))
    student("no teacher at other.pth: make", teacher_weights=["teacher.pth", "other.pth"])
    (workdir / "text.pth").write_text("I am a teacher")
    student("text.pth is not a weight file, or not a safe one", teacher_weights="text.pth")
    torch.save(to_checkpoint(build_model("wrn_16_1", "cifar", 100), data.CLASSES), "c100.pth")
    student("expected num_classes 10, found 100", teacher_weights="c100.pth")
    others = to_checkpoint(build_model("wrn_16_1"), data.CLASSES[::-1])
    torch.save(others, "others.pth")
    student("expected classes ['airplane'", teacher_weights="others.pth")
    torch.save({"fc.weight": torch.zeros(10, 3)}, "bare.pth")
    student("bare.pth fits none of the networks", teacher_weights="bare.pth")
    weights = {**others, "classes": list(data.CLASSES), "arch": "wrn_40_2"}
    torch.save(weights, "lies.pth")
    student("lies.pth is no wrn_40_2 with the cifar stem", teacher_weights="lies.pth")
    broken = build_model("wrn_16_1")
    broken.bn.running_var.fill_(-1)  # finite, but its root is not
    torch.save(to_checkpoint(broken, data.CLASSES), "broken.pth")
    student("the teacher's outputs on the real test images are not", teacher_weights="broken.pth")


def test_cifar10(student, cifar10_binary, workdir):
    path = cifar10_binary / "cifar-10-batches-bin" / "test_batch.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    message = "test_batch.bin is missing, or not the original file of CIFAR: its MD5 differs"
    student(message)
    path.unlink()
    student(message)


def test_cifar10_that_is_not_there(student, monkeypatch):
    def offline(self):
        Path("typo").mkdir(exist_ok=True)  # as torchvision does
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", offline)
    student("downloading it failed: no network", data_dir="typo")
    assert not Path("typo").exists()
    Path("typo/cifar-10-batches-py").mkdir(parents=True)
    student("typo/cifar-10-batches-py", data_dir="typo")


def test_outputs(student, workdir):
    (workdir / "file").write_text("in the way")
    student("file", run_dir="file/run")
    student("file", output="file/student.pth")
    (workdir / "folder").mkdir()
    student("--output folder cannot be written", output="folder")
    os.mkfifo("fifo")
    for output in ("fifo", "/dev/null", "new/run/last.pt"):
        student(f"--output {output} cannot be written", output=output, run_dir="new/run")
    student("File name too long", output="x" * 252 + ".pth", run_dir="new/run")
    (workdir / "folder" / "thesis.tex").write_text("years of work")
    student("folder is not empty", run_dir="folder")


# ------------------------------------------------------------------------------- the rest


def test_the_start_of_a_teacher(workdir, capsys):
    argv = ["--demo", "--limit", 64, "--batch_size", 32, *SMALL_NETWORK, "--init"]
    for name in ("weights.pth", "."):
        code, text = fails(teacher_script, [*argv, name], capsys)
        assert (code, text) == (1, f"error: there is no weight file {name}")
    torch.save(resnet34().state_dict(), "r34.pth")
    code, text = fails(teacher_script, [*argv, "r34.pth"], capsys)
    assert (code, "r34.pth is no wrn_16_1" in text) == (1, True)
    assert not Path("runs").exists()


def test_resuming_what_is_no_run(workdir, demo_teacher, capsys):
    run = workdir / "run"
    shutil.copytree(demo_teacher.parent / "run", run)

    def expect(script, code, message, *argv):
        before = snapshot(workdir)
        found, text = fails(script, argv, capsys)
        assert found == code
        assert message in text
        assert snapshot(workdir) == before

    expect(student_script, 1, "nowhere is not a run", "--resume", "nowhere")
    message = "is the run of another script: its name is teacher, not student"
    expect(student_script, 1, message, "--resume", run)
    expect(teacher_script, 2, "leave --run_dir out", "--resume", run, "--run_dir", "x")
    expect(teacher_script, 2, "was started with --lr 0.001", "--resume", run, "--lr", 0.1)
    expect(teacher_script, 2, "was started with --epochs 2", "--resume", run, "--epochs", 9)
    (run / "last.pt").write_bytes((demo_teacher.parent / "teacher.pth").read_bytes())
    expect(teacher_script, 1, "last.pt is not the checkpoint of this run", "--resume", run)
    for content in ("", "[]", "{}", '{"args": 3}', '{"name": "teacher", "args": [1]}'):
        (run / "config.json").write_text(content)
        expect(teacher_script, 1, "is not the config.json of a run", "--resume", run)
    (run / "config.json").write_text('{"kind": "teacher", "args": {}, "git_commit": "f94fdf4"}')
    expect(teacher_script, 1, "use the commit that made it, f94fdf4", "--resume", run)
    start = f'{{"name": "teacher", "format": {FORMAT}, "args": {{"epochs": '
    for value, problem in [('"many"', "'many' is no"), ("1.5", "'1.5' is no"), ("-1", "'-1' is")]:
        (run / "config.json").write_text(start + value + "}}")
        expect(teacher_script, 2, f"--epochs: {problem}", "--resume", run)
    (run / "config.json").write_text(start + "NaN}}")
    expect(teacher_script, 1, "is not the config.json of a run", "--resume", run)
