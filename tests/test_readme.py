"""What the README and docs/ say can be done can be done, and what they name is there."""

import re
import shlex
from pathlib import Path

import pytest
import speed
import torch
from conftest import REPOSITORY

import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
import plots
from data import CLASSES
from experiment import folder
from imagenet import main_train_imagenet as imagenet_script
from models import build_model, to_checkpoint
from synthetic_data import generate, measure, train_diffusion

README = (REPOSITORY / "README.md").read_text()
PAGES = {
    path: path.read_text()
    for pattern in ("*.md", "docs/*.md", "imagenet/*.md", "synthetic_data/*.md", "weights/*.md")
    for path in sorted(REPOSITORY.glob(pattern))
}
SCRIPTS = {
    "fine_tune_teacher_cifar10.py": teacher_script,
    "main_train_cifar10.py": student_script,
    "imagenet/main_train_imagenet.py": imagenet_script,
    "plots.py": plots,
    "benchmarks/speed.py": speed,
    "synthetic_data/generate.py": generate,
    "synthetic_data/measure.py": measure,
    "synthetic_data/train_diffusion.py": train_diffusion,
}
START = r"^ *!?(?:python|torchrun --nproc_per_node=\d) "
TEXT = "\n".join([*PAGES.values(), *(s.__doc__.replace("\\\n", " ") for s in SCRIPTS.values())])
COMMANDS = sorted(set(re.findall(START + r"(\S+\.py\b.*?)\s*(?:#.*)?$", TEXT, re.MULTILINE)))


def test_the_readme_is_a_landing_page():
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 9_000


def test_the_two_published_commands_are_there_and_are_the_defaults():
    teacher = "fine_tune_teacher_cifar10.py --epochs 15 --lr 0.001 --batch_size 128"
    student = "main_train_cifar10.py --epochs 50 --lr 0.05 --batch_size 128 "
    student += "--teacher_weights teacher_cifar10_finetuned.pth"
    for command, script in ((teacher, teacher_script), (student, student_script)):
        assert f"\npython {command}\n" in README
        assert script.parse_args(shlex.split(command)[1:]) == script.parse_args([])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    script, *argv = shlex.split(command)
    if script not in SCRIPTS:
        assert (REPOSITORY / script).exists()
        return
    name = "teacher" if "teacher" in script else "student"
    stopped = {"name": name, "format": folder.FORMAT, "args": {"epochs": 3}}
    monkeypatch.setattr(folder, "read_config", lambda _: stopped)
    SCRIPTS[script].parse_args(argv)


def test_the_cpu_recipe_is_the_one_of_its_script():
    """The two lines for those without bash start the same runs as scripts/cpu.sh."""
    shell = (REPOSITORY / "scripts" / "cpu.sh").read_text()
    common = re.search(r'^airbench="(.*?)"$', shell, re.MULTILINE | re.DOTALL)[1].split()
    common = common[: common.index("--data_dir")]
    for script, kept in ((teacher_script, "fine_tune"), (student_script, "main_train")):
        line = next(c for c in COMMANDS if c.startswith(kept) and "muon" in c)
        started = re.search(rf"{kept}\S+ (.*?) \\\n(.*?)\$airbench", shell, re.DOTALL)
        words = re.sub(r"\\\n", " ", f"{started[1]} {started[2]}").split()
        pairs = dict(zip(words[::2], words[1::2], strict=True))
        for flag in ("--seed", "--teacher_weights", "--synthetic_data_dir"):
            pairs.pop(flag, None)
        argv = [*common, *(word for pair in pairs.items() for word in pair)]
        given = vars(script.parse_args(shlex.split(line)[1:]))
        expected = vars(script.parse_args(argv))
        given.pop("output"), expected.pop("output")
        assert given == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_a_page_links_to_is_there(page: Path):
    for link in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", PAGES[page]):
        assert (page.parent / link).exists(), link


def test_the_files_it_lists_are_there():
    rows = re.findall(r"^\| (`.*?) \|", README.split("## Files")[1].split("\n## ")[0], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) > 10
    for name in names:
        assert (REPOSITORY / name).exists(), name


def test_the_scripts_it_starts_exist_and_can_be_run():
    scripts = set(re.findall(r"bash (scripts/\S+\.sh)", TEXT))
    assert {"scripts/demo.sh", "scripts/test.sh", "scripts/cpu.sh"} <= scripts
    for script in scripts:
        assert (REPOSITORY / script).stat().st_mode & 0o111, script


def test_the_flags_it_lists_exist():
    table = README.split("## The flags that matter")[1].split("\n## ")[0]
    listed = re.findall(r"`(--\w+)", table)
    assert len(listed) > 10
    known = vars(student_script.parse_args([]))
    for flag in listed:
        assert flag.removeprefix("--") in known, flag


def test_the_columns_that_are_explained_are_the_columns_there_are(workdir, demo_teacher):
    columns = PAGES[REPOSITORY / "docs" / "metrics.md"].split("column of `metrics.csv`")[1]
    explained = re.findall(r"^\| `(\w+)` \|", columns, re.MULTILINE)
    header = (demo_teacher.parent / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    student = "train_agreement train_label_accuracy val_kd_loss val_agreement".split()
    assert [name for name in explained if name not in student] == header
    assert set(student) <= set(explained)


def test_its_example_classifies_a_picture(workdir, cifake, capsys):
    code = re.search(r"```python\n(from data.*?)```", README, re.DOTALL)[1]
    weights = Path(re.search(r'load_model\("(.*?)"\)', code)[1])
    weights.parent.mkdir(exist_ok=True, parents=True)
    torch.save(to_checkpoint(build_model(), CLASSES), weights)
    (cifake / "1000.jpg").rename("picture.jpg")
    exec(code, {})
    assert re.fullmatch(rf"({'|'.join(CLASSES)}) \d+\.\d%\n", capsys.readouterr().out)
