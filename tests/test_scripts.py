"""Both scripts from end to end, on the demo set and on made data."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import kill_test
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, run_student, run_teacher
from PIL import Image

import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
from experiment import UserError, read_config
from models import load_model, read_weights

TIMES = ("seconds", "images_per_second")


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_equal_weights(one: Path, two: Path) -> None:
    one, two = read_weights(one)[0], read_weights(two)[0]
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


def stop_after(monkeypatch, script, epochs: int) -> None:
    """Make the script die at the start of the epoch after `epochs`, as if it were killed."""
    train, done = script.train_one_epoch, []

    def dying(*args, **kwargs):
        if len(done) == epochs:
            raise KeyboardInterrupt
        done.append(1)
        return train(*args, **kwargs)

    monkeypatch.setattr(script, "train_one_epoch", dying)


def test_a_teacher_and_its_student(workdir, capsys):
    run_teacher()
    run_student()

    assert not list(workdir.glob("*.pth"))  # a demo stays under runs/
    demo = workdir / "runs" / "demo"
    for kind, column in (("teacher", "train_accuracy"), ("student", "train_agreement")):
        run = demo / f"{kind}-001"
        assert {path.name for path in run.iterdir()} == {
            *(".lock", "config.json", "metrics.csv", "last.pt", "best.pt"),
            *("train_val_losses.png", "val_accuracy.png", "per_class.csv"),
        }
        rows = metrics(run)
        assert list(rows[0]) == [
            *("epoch", "lr", "train_loss", column, "test_loss", "test_accuracy"),
            *TIMES,
        ]
        assert [row["epoch"] for row in rows] == ["1", "2"]
        for row in rows:
            assert 0 <= float(row["test_accuracy"]) <= 100
            assert 0 <= float(row[column]) <= 100
            assert float(row["images_per_second"]) > 0
    exported = read_weights(demo / "student_cifar10_kd.pth")[1]
    assert exported["classes"] == list(teacher_script.load_demo("test").classes)
    assert exported["provenance"]["epoch"] == 2
    assert_equal_weights(demo / "student_cifar10_kd.pth", demo / "student-001" / "last.pt")
    student = load_model(demo / "student_cifar10_kd.pth")
    assert student(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    config = json.loads((demo / "student-001" / "config.json").read_text())
    said = capsys.readouterr().out
    assert f"teacher: {config['teacher_accuracy']:.2f} % on 96 real test images" in said
    assert f"final  {float(rows[-1]['test_accuracy']):.2f} %" in said


def test_the_cifar_stem_goes_through_too(workdir):
    run_teacher("--stem", "cifar", "--epochs", 1, "--limit", 32)
    run_student("--stem", "cifar", "--epochs", 1, "--limit", 32)
    assert load_model("runs/demo/student_cifar10_kd.pth").spec["stem"] == "cifar"


def test_both_scripts_run_on_files(workdir, cifake, cifar10_binary):
    """No demo: CIFAR-10 and CIFAKE from disk, and the published file names."""
    common = "--epochs 1 --batch_size 20 --stem imagenet --device cpu".split()
    common += ["--data_dir", str(cifar10_binary)]
    teacher_script.main(teacher_script.parse_args([*common, "--init", "random"]))
    student_script.main(
        student_script.parse_args([*common, "--synthetic_data_dir", str(cifake), "--seed", "3"])
    )
    facts = read_weights("student_cifar10_kd.pth")[1]
    assert facts["classes"][0] == "airplane"
    for other in ("noise", "real"):
        argv = [*common, "--train_on", other, "--limit", "40", "--output", f"{other}.pth"]
        student_script.main(student_script.parse_args(argv))
        assert Path(f"{other}.pth").exists()
    config = json.loads(Path("runs/student-001/config.json").read_text())
    assert (config["train_images"], config["test_images"]) == (40, 20)
    assert len(config["teacher_sha256"]) == 64


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(kind, workdir, demo_teacher, monkeypatch):
    script, run = {
        "teacher": (teacher_script, run_teacher),
        "student": (student_script, run_student),
    }[kind]
    flags = ["--epochs", "3"] + (["--teacher_weights", demo_teacher] if kind == "student" else [])
    run(*flags, "--run_dir", "unbroken", "--output", "unbroken.pth")

    with monkeypatch.context() as patch:
        stop_after(patch, script, 2)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--run_dir", "stopped", "--output", "stopped.pth")
    assert not Path("stopped.pth").exists()
    assert len(metrics(Path("stopped"))) == 2
    script.main(script.parse_args(["--resume", "stopped"]))

    assert without_times(metrics(Path("stopped"))) == without_times(metrics(Path("unbroken")))
    assert_equal_weights(Path("stopped.pth"), Path("unbroken.pth"))
    for name in ("best.pt", "last.pt"):
        assert_equal_weights(Path("stopped", name), Path("unbroken", name))


def test_the_seed_decides_everything(workdir, demo_teacher):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        flags = ["--seed", seed, "--run_dir", name, "--output", f"{name}.pth"]
        run_student(*flags, "--teacher_weights", demo_teacher)
    a, b, c = (without_times(metrics(Path(name))) for name in "abc")
    assert a == b
    assert a != c
    assert_equal_weights(Path("a.pth"), Path("b.pth"))


def test_a_finished_run_exports_again_without_training(workdir, demo_teacher, monkeypatch):
    run_student("--teacher_weights", demo_teacher)
    exported = Path("runs/demo/student_cifar10_kd.pth")
    exported.unlink()
    stop_after(monkeypatch, student_script, 0)
    student_script.main(student_script.parse_args(["--resume", "runs/demo/student-001"]))
    assert_equal_weights(exported, Path("runs/demo/student-001/last.pt"))


def test_a_finished_network_is_never_lost(workdir, demo_teacher):
    """The same command again, and a teacher that lies under another name: nothing is in danger."""
    run_student("--teacher_weights", demo_teacher)
    exported = Path("runs/demo/student_cifar10_kd.pth")
    first = read_weights(exported)[0]
    run_student("--teacher_weights", demo_teacher, "--seed", 1)
    kept = exported.with_name("student_cifar10_kd.001.pth")
    assert read_weights(exported)[1]["provenance"]["run"] == "runs/demo/student-002"
    assert read_weights(kept)[1]["provenance"]["run"] == "runs/demo/student-001"
    assert torch.equal(read_weights(kept)[0]["conv1.weight"], first["conv1.weight"])

    copy = demo_teacher.parent / "run" / "last.pt"  # other bytes, the same weights
    argv = ["--resume", "runs/demo/student-002", "--teacher_weights", str(copy)]
    student_script.main(student_script.parse_args(argv))
    assert len(list(exported.parent.glob("*.pth"))) == 2  # its own export is replaced


def test_an_untrained_teacher_is_a_control(workdir):
    run_student("--teacher_weights", "random", "--epochs", 1)
    config = json.loads(Path("runs/demo/student-001/config.json").read_text())
    assert config["teacher_sha256"] is None
    assert 0 <= config["teacher_accuracy"] < 50


def test_several_teachers_are_one(workdir, demo_teacher, monkeypatch):
    run_teacher("--seed", 1, "--output", "other.pth")
    one, two, both = ([demo_teacher], ["other.pth"], [demo_teacher, "other.pth"])
    for name, members in (("one", one), ("two", two), ("both", both)):
        run_student("--teacher_weights", *members, "--run_dir", name, "--output", f"{name}.pth")
    digests = {read_config(Path(name))["teacher_sha256"] for name in ("one", "two", "both")}
    assert len(digests) == 3

    with monkeypatch.context() as patch:
        stop_after(patch, student_script, 1)
        with pytest.raises(KeyboardInterrupt):
            flags = ["--run_dir", "stopped", "--output", "stopped.pth"]
            run_student("--teacher_weights", *both, *flags)
    resume = ["--resume", "stopped"]
    with pytest.raises(UserError, match="cannot go on: teacher_sha256 was"):
        student_script.main(student_script.parse_args([*resume, "--teacher_weights", "other.pth"]))
    student_script.main(student_script.parse_args(resume))
    assert_equal_weights(Path("stopped.pth"), Path("both.pth"))


@pytest.mark.parametrize(
    "flags",
    [
        "--mix cutmix --augment strong --ema 0.9 --scheduler cosine --holdout 30",
        "--hard_labels --mix mixup",
        "--standardize_logits --temperature 2",
    ],
)
def test_levers_and_controls_run_and_resume_bit_for_bit(flags, workdir, demo_teacher, monkeypatch):
    flags = [*flags.split(), "--teacher_weights", demo_teacher]
    run_student(*flags, "--run_dir", "unbroken", "--output", "unbroken.pth")
    with monkeypatch.context() as patch:
        stop_after(patch, student_script, 1)
        with pytest.raises(KeyboardInterrupt):
            run_student(*flags, "--run_dir", "stopped", "--output", "stopped.pth")
    student_script.main(student_script.parse_args(["--resume", "stopped"]))
    rows = metrics(Path("stopped"))
    assert without_times(rows) == without_times(metrics(Path("unbroken")))
    assert_equal_weights(Path("stopped.pth"), Path("unbroken.pth"))
    assert ("train_label_accuracy" in rows[0]) == ("--hard_labels" in flags)
    if "--holdout" in flags:
        assert 0 <= float(rows[0]["val_agreement"]) <= 100


def test_a_teacher_takes_the_levers_too(workdir):
    run_teacher("--mix", "cutmix", "--augment", "strong", "--ema", 0.9)
    exported, last = (
        read_weights(Path("runs/demo", name))[0]
        for name in ("teacher_cifar10_finetuned.pth", "teacher-001/last.pt")
    )
    raw = torch.load("runs/demo/teacher-001/last.pt", weights_only=True)["trained"]
    assert torch.equal(exported["fc.weight"], last["fc.weight"])
    assert not torch.equal(exported["fc.weight"], raw["fc.weight"])


def test_a_student_may_have_another_stem_when_it_is_said(workdir, demo_teacher):
    flags = ["--teacher_weights", demo_teacher, "--limit", 32, "--epochs", 1, "--stem", "cifar"]
    with pytest.raises(UserError, match="expected stem cifar, found imagenet"):
        run_student(*flags)
    run_student(*flags, "--teacher_stem", "imagenet")


def test_teacher_and_student_may_be_other_networks(workdir):
    run_teacher("--arch", "wrn_16_1", "--stem", "cifar", "--epochs", 1)
    flags = ["--student_arch", "shufflenet_v2_x1_0", "--stem", "cifar", "--epochs", 1]
    with pytest.raises(UserError, match="expected arch resnet18, found wrn_16_1"):
        run_student(*flags, "--arch", "resnet18")
    run_student(*flags)
    specs = [load_model(path).spec for path in sorted(Path("runs/demo").glob("*.pth"))]
    assert [spec["arch"] for spec in specs] == ["shufflenet_v2_x1_0", "wrn_16_1"]


def test_cifar100_from_class_folders(workdir, cifar100):
    folder = workdir / "synthetic"
    for i in range(100):
        (folder / f"kind_{i:02d}").mkdir(parents=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"kind_{i:02d}" / "0.png")
    flags = f"--dataset cifar100 --data_dir {cifar100} --stem imagenet --epochs 1 --batch_size 50"
    flags = [*flags.split(), "--device", "cpu"]
    teacher = [*flags, "--init", "random", "--output", "teacher.pth"]
    teacher_script.main(teacher_script.parse_args(teacher))
    student = [*flags, "--teacher_weights", "teacher.pth", "--output", "student.pth"]
    for source in ("synthetic", "real", "noise"):
        more = ["--train_on", source, "--synthetic_data_dir", str(folder)]
        student_script.main(student_script.parse_args([*student, *more, "--limit", "100"]))
    with pytest.raises(UserError, match="are for CIFAKE alone"):
        student_script.main(student_script.parse_args([*student, "--skip_bad_images"]))
    network = load_model("student.pth", classes=[f"kind_{i:02d}" for i in range(100)])
    assert network.spec["num_classes"] == 100


def test_a_teacher_of_other_classes_is_refused(workdir, demo_teacher, cifake, cifar10_binary):
    flags = ["--data_dir", cifar10_binary, "--synthetic_data_dir", cifake, "--stem", "imagenet"]
    argv = [*flags, "--teacher_weights", demo_teacher, "--batch_size", 8]
    with pytest.raises(UserError, match=r"expected classes \['airplane'.*found \['disc'"):
        student_script.main(student_script.parse_args([*map(str, argv)]))
    assert not Path("runs").exists()


def test_everything_is_a_process_too(workdir):
    """The commands as a person runs them: what is printed, where, and the exit code."""

    def python(*argv):
        command = [sys.executable, *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, cwd=workdir)

    teacher = python(REPOSITORY / "fine_tune_teacher_cifar10.py", *TINY)
    assert (teacher.returncode, teacher.stderr) == (0, "")
    lines = teacher.stdout.splitlines()
    assert lines[0] == "start: random weights"
    assert lines[1] == "run: runs/demo/teacher-001 (after a stop: --resume runs/demo/teacher-001)"
    assert [line.split()[:2] for line in lines[2:4]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert [line.split()[0] for line in lines[4:7]] == ["final", "best", "time"]
    student = python(REPOSITORY / "main_train_cifar10.py", *TINY)
    assert (student.returncode, student.stderr) == (0, "")
    overlay = python(REPOSITORY / "plots.py", "runs/demo/teacher-001", "runs/demo/student-001")
    assert (overlay.returncode, overlay.stderr) == (0, "")
    assert (workdir / "comparison" / "val_accuracy.png").exists()
    wrong = python(REPOSITORY / "main_train_cifar10.py", "--epochs", "0")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.splitlines() == [
        "error: argument --epochs: '0' is no whole number from 1 to 100000 (--help lists the flags)"
    ]
    missing = python(REPOSITORY / "main_train_cifar10.py", *TINY, "--teacher_weights", "no.pth")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: no teacher at no.pth: make one with")
    assert len(missing.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_told_to_stop_says_how_to_go_on(number, workdir):
    script = str(REPOSITORY / "main_train_cifar10.py")
    command = [sys.executable, script, *TINY, "--epochs", "500", "--teacher_weights", "random"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("epoch 3/500"):
        assert process.poll() is None
    process.send_signal(number)
    said, errors = process.communicate()
    assert process.returncode == 128 + number
    finished = 3 + said.count("epoch ")
    assert errors.strip().splitlines() == [
        f"stopped after epoch {finished} of 500; to go on:",
        f"python {script} --resume runs/demo/student-001",
    ]
    assert [int(row["epoch"]) for row in metrics(Path("runs/demo/student-001"))] == [
        *range(1, finished + 1)
    ]
    assert read_weights("runs/demo/student-001/last.pt")[1]["provenance"]["epoch"] == finished


def test_killed_runs_end_as_if_nothing_had_happened(capsys):
    kill_test.main(kill_test.parse_args(["--kills", "3", "--scripts", kill_test.SCRIPTS[1]]))
    assert "0 different, 0 unreadable files" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_both_scripts_run_on_cuda(workdir):
    run_teacher("--device", "cuda")
    run_student("--device", "cuda")
    config = json.loads(Path("runs/demo/student-001/config.json").read_text())
    assert config["hardware"] == torch.cuda.get_device_name()
    exported = torch.load("runs/demo/student_cifar10_kd.pth", weights_only=True)["model"]
    assert not any(weight.is_cuda for weight in exported.values())  # it loads where there is no GPU
    assert 0 <= float(metrics(Path("runs/demo/student-001"))[-1]["test_accuracy"]) <= 100
