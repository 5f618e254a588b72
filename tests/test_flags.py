import json
import re
from pathlib import Path

import pytest

import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
import main_train_imagenet as imagenet_script

SHARED = {"batch_size": 128, "momentum": 0.9, "nesterov": False, "stem": "cifar", "seed": 0}
STUDENT = {
    **SHARED,
    **{"epochs": 50, "optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4, "temperature": 10},
    **{"scheduler": "multistep", "milestones": [0.5, 0.8], "gamma": 0.1},
    **{
        "teacher_weights": ["teacher_cifar10_finetuned.pth"],
        "output": Path("student_cifar10_kd.pth"),
    },
}
TEACHER = {
    **SHARED,
    **{"epochs": 15, "optimizer": "adam", "lr": 1e-3, "weight_decay": 0, "scheduler": "none"},
    **{"init": "imagenet", "output": Path("teacher_cifar10_finetuned.pth")},
}


@pytest.mark.parametrize(
    ("script", "recipe"), [(teacher_script, TEACHER), (student_script, STUDENT)]
)
def test_no_flags_is_the_published_recipe(script, recipe):
    args = vars(script.parse_args([]))
    assert {key: args[key] for key in recipe} == recipe


def test_aliases_are_the_same_flag():
    args = student_script.parse_args(["--teacher_weights_path", "t.pth", "--kd_temp", "4"])
    assert (args.teacher_weights, args.temperature) == (["t.pth"], 4)


@pytest.mark.parametrize("script", [teacher_script, student_script])
def test_a_demo_changes_defaults_and_yields_to_flags(script):
    args = script.parse_args(["--demo"])
    assert args.stem == "imagenet"
    assert args.output.parent == Path("runs/demo")
    args = script.parse_args(["--stem", "cifar", "--demo", "--epochs", "7", "--output", "x.pth"])
    assert (args.stem, args.epochs, args.output) == ("cifar", 7, Path("x.pth"))


@pytest.mark.parametrize("script", [teacher_script, student_script, imagenet_script])
def test_help_shows_every_flag_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    assert stop.value.code == 0
    entries = re.split(r"\n  (?=--)", capsys.readouterr().out)
    for flag, default in vars(script.parse_args([])).items():
        if flag == "demo" and script is imagenet_script:
            continue
        (entry,) = (e for e in entries if re.match(rf"--{flag}[ ,\n]", e))
        if default is not None and default is not False:
            shown = str(default) if isinstance(default, list) else f"[{default}]"
            assert shown in " ".join(entry.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--demo", "--train_on", "noise"], "--demo takes no data: leave --train_on out"),
        (["--hard_labels", "--standardize_logits"], "--standardize_logits is for distillation"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        student_script.parse_args(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_resumed_run_takes_its_flags_from_the_config(tmp_path):
    argv = "--demo --epochs 4 --nesterov --milestones 0.3 0.6 --limit 50 --kd_temp 4.5".split()
    first = student_script.parse_args(argv)
    config = {"kind": "student", "args": vars(first)}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    again = student_script.parse_args(["--resume", str(tmp_path), "--device", "cuda:1"])
    changed = {"resume", "device"}
    assert again.resume == tmp_path
    assert again.device == "cuda:1"
    for key, value in vars(first).items():
        assert key in changed or getattr(again, key) == value, key
