import json
import re
from pathlib import Path

import pytest

import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
from experiment.flags import as_typed
from experiment.folder import FORMAT
from imagenet import main_train_imagenet as imagenet_script
from synthetic_data import generate

SHARED = {"batch_size": 128, "momentum": 0.9, "nesterov": False, "seed": 0}
SHARED |= {"arch": "resnet18", "stem": "cifar", "augment": "crop"}
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


@pytest.mark.parametrize("script", [teacher_script, student_script])
def test_help_shows_what_a_demo_changes(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    entry = " ".join(re.search(r"\n  --demo.*?\n\n", capsys.readouterr().out, re.S)[0].split())
    plain, demo = vars(script.parse_args([])), vars(script.parse_args(["--demo"]))
    changed = {key for key in plain if plain[key] != demo[key]} - {"demo"}
    assert changed
    for key in changed:
        assert f"--{key} {as_typed(demo[key])}" in entry


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
            assert f"[{as_typed(default)}]" in " ".join(entry.split())


def test_help_begins_with_the_command_as_it_was_typed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["synthetic_data/generate.py"])
    with pytest.raises(SystemExit):
        generate.parse_args(["--help"])
    usage = "usage: python synthetic_data/generate.py [flags] --pipeline NAME --output DIR\n"
    assert capsys.readouterr().out.startswith(usage)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--demo --data_dir mine", "--data_dir needs leaving --demo out"),
        ("--demo --train_on noise", "--train_on needs leaving --demo out"),
        ("--train_on real --download_synthetic", "--download_synthetic needs CIFAKE"),
        (
            "--train_on real --synthetic_data_dir x",
            "--synthetic_data_dir needs --train_on synthetic",
        ),
        ("--dataset cifar100 --download_synthetic", "--download_synthetic needs CIFAKE"),
        ("--hard_labels --temperature 4", "--temperature needs distillation, not --hard_labels"),
        ("--optimizer adam --momentum 0.8", "--momentum needs --optimizer sgd or muon"),
        ("--optimizer muon --nesterov", "--nesterov needs --optimizer sgd"),
        ("--momentum 0 --nesterov", "--nesterov needs a --momentum above 0"),
        ("--scheduler cosine --milestones 0.1", "--milestones needs --scheduler multistep"),
        ("--scheduler cosine --gamma 0.2", "--gamma needs --scheduler multistep"),
        ("--warmup 0.1", "--warmup needs --scheduler linear"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        student_script.parse_args(argv.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message} (--help lists the flags)\n"


def write_config(folder: Path, args: dict, name: str = "student") -> None:
    config = {"name": name, "format": FORMAT, "args": args}
    (folder / "config.json").write_text(json.dumps(config, default=str))


@pytest.mark.parametrize(
    "argv",
    [
        "--demo --epochs 4 --nesterov --milestones 0.3 0.6 --limit 50 --kd_temp 4.5",
        "--optimizer muon --scheduler linear --warmup 0.1 --teacher_weights=-t.pth",
        "--hard_labels --train_on noise --teacher_weights a.pth b.pth --seed 1",
        "--hard_labels --holdout 9 --temperature 4",  # of the loss on the held-out images
    ],
)
def test_a_resumed_run_takes_its_flags_from_the_config(argv, tmp_path):
    first = student_script.parse_args(argv.split())
    write_config(tmp_path, vars(first))
    again = student_script.parse_args(["--resume", str(tmp_path), "--device", "cuda:1"])
    assert again.resume == tmp_path
    assert again.device == "cuda:1"
    expected, found = (
        {key: value for key, value in vars(args).items() if key not in ("resume", "device")}
        for args in (first, again)
    )
    assert found == expected


@pytest.mark.parametrize(
    "change",
    [
        *("--seed 1", "--epochs 60", "--batch_size 64", "--lr 0.1", "--momentum 0.8", "--nesterov"),
        *("--optimizer adam", "--weight_decay 0", "--scheduler cosine", "--milestones 0.3"),
        *("--gamma 0.2", "--limit 5", "--arch wrn_16_1", "--stem imagenet", "--augment reflect"),
        *("--temperature 4", "--train_on real", "--hard_labels", "--holdout 9"),
        "--dataset cifar100",
    ],
)
def test_what_a_run_computes_cannot_change_when_it_is_resumed(change, tmp_path, capsys):
    write_config(tmp_path, vars(student_script.parse_args([])))
    with pytest.raises(SystemExit) as stop:
        student_script.parse_args(["--resume", str(tmp_path), *change.split()])
    assert stop.value.code == 2
    name = change.split()[0]
    assert f"was started with {name} " in capsys.readouterr().err


def test_where_the_files_are_and_the_precision_may_change_when_a_run_is_resumed(tmp_path):
    write_config(tmp_path, vars(student_script.parse_args([])))
    change = "--data_dir a --synthetic_data_dir b --teacher_weights c.pth --output d.pth"
    argv = ["--resume", str(tmp_path), *change.split(), "--no_cuda_graph", "--download_synthetic"]
    argv += ["--amp", "off"]  # as the error advises, when float16 overflows
    args = student_script.parse_args(argv)
    assert (args.data_dir, args.synthetic_data_dir) == (Path("a"), Path("b"))
    assert (args.teacher_weights, args.output) == (["c.pth"], Path("d.pth"))
    assert args.no_cuda_graph
    assert args.download_synthetic
    assert args.amp == "off"
