"""What the README says can be done can be done, and what it names is there."""

import re
import shlex

import pytest
import speed
from conftest import REPOSITORY

import fine_tune_teacher_cifar10 as teacher_script
import flags
import main_train_cifar10 as student_script
import main_train_imagenet as imagenet_script
import plots
from data import CLASSES
from models import build_model, to_checkpoint
from synthetic_data import generate, measure, train_diffusion

README = (REPOSITORY / "README.md").read_text()
SCRIPTS = {
    "fine_tune_teacher_cifar10.py": teacher_script,
    "main_train_cifar10.py": student_script,
    "main_train_imagenet.py": imagenet_script,
    "plots.py": plots,
    "benchmarks/speed.py": speed,
    "synthetic_data/generate.py": generate,
    "synthetic_data/measure.py": measure,
    "synthetic_data/train_diffusion.py": train_diffusion,
}
START = r"(?:python|torchrun --nproc_per_node=8) "
COMMANDS = re.findall(r"^ *" + START + r"(\S+\.py .*?)\s*(?:#.*)?$", README, re.MULTILINE)
DOCSTRINGS = [s.__doc__.replace("\\\n", " ") for s in SCRIPTS.values()]
COMMANDS += re.findall(
    r"^ +" + START + r"(\S+\.py .*?)\s*(?:#.*)?$", "\n".join(DOCSTRINGS), re.MULTILINE
)


def test_the_two_published_commands_are_there():
    assert "fine_tune_teacher_cifar10.py --epochs 15 --lr 0.001 --batch_size 128" in COMMANDS
    student = "main_train_cifar10.py --epochs 50 --lr 0.05 --batch_size 128 "
    assert student + "--teacher_weights teacher_cifar10_finetuned.pth" in COMMANDS


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_parses(command, monkeypatch):
    script, *argv = shlex.split(command)
    kind = "teacher" if "teacher" in script else "student"
    monkeypatch.setattr(flags, "read_config", lambda _: {"kind": kind, "args": {"epochs": 3}})
    SCRIPTS[script].parse_args(argv)


def test_the_published_commands_are_the_defaults():
    for script, module in (
        ("fine_tune", teacher_script),
        ("main_train", student_script),
        ("synthetic_data/train_diffusion", train_diffusion),
    ):
        published = [c for c in COMMANDS if c.startswith(script) and "--batch_size" in c]
        assert published
        for command in published:
            assert module.parse_args(shlex.split(command)[1:]) == module.parse_args([]), command


def test_what_it_links_to_and_lists_is_in_the_repository():
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    files = README.split("## Files")[1]
    listed = re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)? \|", files, re.MULTILINE)
    names = links + [name for row in listed for name in row if name]
    assert len(names) > 10
    for name in names:
        assert (REPOSITORY / name).exists(), name


def test_the_scripts_it_starts_exist_and_can_be_run():
    for script in re.findall(r"^bash (\S+)", README, re.MULTILINE):
        assert (REPOSITORY / script).stat().st_mode & 0o111


def test_the_columns_it_explains_are_the_columns_there_are(workdir, demo_teacher):
    columns = README.split("column of `metrics.csv`")[1]
    explained = re.findall(r"^\| `(\w+)` \|", columns, re.MULTILINE)
    header = (demo_teacher.parent / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    student = "train_agreement train_label_accuracy val_kd_loss val_agreement".split()
    assert [name for name in explained if name not in student] == header
    assert set(student) <= set(explained)


def test_its_example_classifies_a_picture(workdir, cifake, capsys):
    import torch

    torch.save(to_checkpoint(build_model(), CLASSES), "student_cifar10_kd.pth")
    (cifake / "1000.jpg").rename("picture.jpg")
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})
    assert re.fullmatch(rf"({'|'.join(CLASSES)}) \d+\.\d%\n", capsys.readouterr().out)
