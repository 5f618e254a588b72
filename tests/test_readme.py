"""What the pages and the docstrings say can be done can be done, and what they name is there."""

import functools
import importlib
import io
import os
import re
import shlex
import subprocess
from argparse import Namespace
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import REPOSITORY, started_by

import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
from data import CLASSES, load_cifake, load_cifar10
from engine import kd_loss
from experiment import folder
from experiment.download import sha256
from models import build_model, load_model, to_checkpoint

README = (REPOSITORY / "README.md").read_text()
PAGES = {
    path.relative_to(REPOSITORY): path.read_text()
    for pattern in (
        *("*.md", "docs/*.md", "imagenet/*.md", "synthetic_data/*.md", "weights/*.md"),
        *("results/*.md", "results/*/*.md"),
    )
    for path in sorted(REPOSITORY.glob(pattern))
}


def has_flags(path: Path) -> bool:
    return "def parse_args(" in path.read_text() and "__main__" in path.read_text()


SCRIPTS = {
    str(path.relative_to(REPOSITORY))
    for pattern in (
        "*.py",
        "benchmarks/*.py",
        "imagenet/*.py",
        "scripts/*.py",
        "synthetic_data/*.py",
    )
    for path in REPOSITORY.glob(pattern)
    if has_flags(path)
}


def module(script: str) -> ModuleType:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def docstring(script: str) -> str:
    return re.search(r'"""(.*?)"""', (REPOSITORY / script).read_text(), re.DOTALL)[1]


# A command has a line of its own, or stands in backticks. What is in <angle brackets>, and a
# variable of the shell, is for the reader to fill in.
COMMAND = r"!?(?:[A-Z_]+=\S+ )*(?:python|torchrun --nproc_per_node[= ]\d) (\S+\.py\b%s)"


def commands(text: str) -> set[str]:
    text = text.replace("\\\\\n", " ").replace("\\\n", " ")
    found = re.findall("^ *" + COMMAND % r".*?" + r"\s*(?:#.*)?$", text, re.MULTILINE)
    found += re.findall("`" + COMMAND % r"[^`]*" + "`", text)
    return {line.strip() for line in found}


def parse(command: str) -> None:
    """Let a script check the flags of a command that starts it.

    Of a command that ends in "...", all of them have to exist; of a script without flags, itself.
    """
    filled = re.sub(r"<[^>]*>", "something", command.replace("$seed", "0").replace("$amp", "off"))
    script, *argv = shlex.split(filled)
    if script not in SCRIPTS:
        assert (REPOSITORY / script).exists()
    elif "..." in argv:
        assert {word for word in argv if word.startswith("--")} <= known_flags(script)
    else:
        module(script).parse_args(argv)


@functools.cache
def known_flags(script: str) -> set[str]:
    """All flags that are in the --help of a script."""
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        module(script).parse_args(["--help"])
    return set(re.findall(r"--\w+", said.getvalue()))


def stopped(path: Path) -> dict:
    """The config.json of a run in the folder NAME-001."""
    name = path.name.rpartition("-")[0]
    return {"name": name, "format": folder.FORMAT, "args": {"epochs": 3}}


COMMANDS = sorted(set.union(*map(commands, [*PAGES.values(), *map(docstring, SCRIPTS)])))


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


def test_commands_are_found():
    """In a line, in backticks, in a notebook, with a comment, a variable, and over two lines."""
    page = """
    python plots.py A B    # a comment
    !python plots.py A
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=8 imagenet/main_train_imagenet.py
    python main_train_cifar10.py --epochs 1 \\
        --limit 5
    see `python benchmarks/speed.py --quick`, or `!torchrun --nproc_per_node 2 a/b.py ...`
    a python or a b.py is none
    """
    assert commands(page) == {
        *("plots.py A B", "plots.py A", "imagenet/main_train_imagenet.py"),
        *("benchmarks/speed.py --quick", "a/b.py ..."),
        "main_train_cifar10.py --epochs 1          --limit 5",
    }
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, workdir, monkeypatch):
    monkeypatch.setattr(folder, "read_config", stopped)
    parse(command)


EXPERIMENTS = [
    *("best.sh 0", "controls.sh teacher.pth 0", "cpu.sh 0", "demo.sh", "fidelity.sh"),
    *("fidelity.sh toy", "findings.sh teacher.pth 0", "pairs.sh 0", "reproduce.sh imagenet 0"),
    "search.sh teacher.pth 0",
]


def test_every_experiment_is_known():
    sourced, others = {"environment.sh", "once.sh"}, {"test.sh"}
    names = {path.name for path in (REPOSITORY / "scripts").glob("*.sh")}
    assert names == {command.split()[0] for command in EXPERIMENTS} | sourced | others


@pytest.mark.parametrize("command", EXPERIMENTS)
def test_every_command_of_an_experiment_parses(command, workdir):
    """Each of scripts/*.sh is run, with something in place of Python that notes the commands."""
    script, *argv = command.split()
    started = started_by(workdir, script, *argv)
    calls = "python|once|student|pair|on_variant|other_teacher|images|measures|measured|students"
    text = (REPOSITORY / "scripts" / script).read_text()
    assert len(started) >= len(re.findall(rf"^ *(?:{calls}) [^(]", text, re.MULTILINE)) - 1 > 0
    for line in started:
        parse(line)


def test_settings_leave_the_other_students_out(workdir, monkeypatch):
    monkeypatch.setenv("SETTINGS", "cifake agreed epochs_16")
    started = started_by(workdir, "findings.sh", "teacher.pth", "0")
    students = [re.search(r"runs/\w+/(\w+)-0 ", line)[1] for line in started if "main_" in line]
    assert students == ["cifake", "agreed", "epochs_16"]
    assert not any("fine_tune" in line for line in started)  # no teacher that has no student
    assert sum("variants.py" in line for line in started) == 1


def test_students_of_small_sets_see_as_many_views(workdir, monkeypatch):
    """The stand-in for variants.py makes 50 images, so 50,000 views are a thousand epochs."""
    monkeypatch.setenv("EPOCHS", "3")
    started = started_by(workdir, "findings.sh", "teacher.pth", "0")
    students = [shlex.split(line)[1:] for line in started if line.startswith("main_train")]
    given = {args.run_dir.name: args.epochs for args in map(student_script.parse_args, students)}
    variants = ("disputed", "agreed", "matched", "undivided", "blur", "jpeg", "images_25000")
    assert [given[f"{name}-0"] for name in variants] == [3000] * len(variants)
    others = ("cifake", "temperature_4", "of_teacher_2", "epochs_16")
    assert [given[f"{name}-0"] for name in others] == [3, 3, 3, 16]


def test_settings_leave_the_teachers_of_other_pairs_out(workdir, monkeypatch):
    monkeypatch.setenv("SETTINGS", "vgg11_bn_to_resnet18")
    started = started_by(workdir, "pairs.sh", "0")
    archs = [re.search(r"--arch (\w+)", line)[1] for line in started if "--arch" in line]
    assert archs == ["vgg11_bn", "resnet18"]


def test_a_setting_that_is_misspelt_is_named(workdir, monkeypatch):
    monkeypatch.setenv("SETTINGS", "noise riel")
    with pytest.raises(AssertionError, match="error: SETTINGS: there is no riel; the first lines"):
        started_by(workdir, "controls.sh", "teacher.pth", "0")
    log = (workdir / "log").read_text()
    assert "noise-0" in log  # what is known was trained
    assert "summarize.py" in log  # and is in the table


def test_a_stopped_run_is_resumed_with_the_flags_of_its_script(workdir):
    """Which are refused, if they are not those it was started with."""
    Path("runs/controls/cifake-0").mkdir(parents=True)
    Path("runs/controls/cifake-0/config.json").touch()
    first, second, *_ = started_by(workdir, "controls.sh", "teacher.pth", "0")
    resumed = "main_train_cifar10.py --resume runs/controls/cifake-0 --seed 0 --epochs 8 "
    assert first.startswith(resumed)
    assert second.startswith("main_train_cifar10.py --run_dir runs/controls/hard_labels-0 ")


SEEDED = [command for command in EXPERIMENTS if command.endswith(" 0")]


@pytest.mark.parametrize("command", [*SEEDED, "fidelity.sh toy"])
def test_what_is_no_seed_is_refused_before_anything_is_installed(command, workdir):
    script, *argv = command.split()
    path = str(REPOSITORY / "scripts" / script)
    environment = {"PATH": os.environ["PATH"], "VIRTUAL_ENV": str(workdir), "PYTHON": "false"}
    for wrong in (["--help"], *([*argv[:-1], seed] for seed in ("--help", "-1", "0.5"))):
        given = ["bash", path, *wrong]
        done = subprocess.run(given, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.endswith(f"; the first lines of {path} say how to use it\n")


def test_the_cpu_recipe_is_the_one_of_its_script(workdir):
    """The lines for those without bash start the same runs as scripts/cpu.sh."""
    started = started_by(workdir, "cpu.sh", "0")
    for script, name in ((teacher_script, "fine_tune"), (student_script, "main_train")):
        of_script, *_ = (shlex.split(line)[1:] for line in started if line.startswith(name))
        expected = vars(script.parse_args(of_script))
        others = commands(PAGES[Path("results/cpu_off/README.md")])  # a former recipe
        lines = [c for c in COMMANDS if c.startswith(name) and "muon" in c and c not in others]
        assert lines
        for line in lines:
            given = vars(script.parse_args(shlex.split(line)[1:]))
            paths = {"output", "run_dir", "teacher_weights", "data_dir", "synthetic_data_dir"}
            names = given.keys() - paths
            assert {n: given[n] for n in names} == {n: expected[n] for n in names}, line


@pytest.mark.parametrize("counts", ["20 9", "81"])
def test_counts_of_images_that_cannot_be_compared_are_refused(counts, workdir, monkeypatch):
    """Fewer would shorten the test set, too; more than are made would be the same again."""
    monkeypatch.setenv("COUNTS", counts)
    with pytest.raises(AssertionError, match=f"COUNTS: {counts.split()[-1]} is not from 20 to 80"):
        started_by(workdir, "fidelity.sh", "toy")


@pytest.mark.parametrize(
    ("name", "values", "bad"),
    [
        *(("GUIDANCE", "1 0.5", "0.5"), ("GUIDANCE", "101", "101"), ("STEPS", "50 1001", "1001")),
        *(("STEPS", "0", "0"), ("SEEDS", "0 -1", "-1"), ("COUNTS", "20 many", "many")),
    ],
)
def test_lists_are_checked_before_hours_are_spent(name, values, bad, workdir, monkeypatch):
    monkeypatch.setenv(name, values)
    with pytest.raises(AssertionError, match=f"error: {name}: '{bad}' does not fit"):
        started_by(workdir, "fidelity.sh", "toy")
    assert not (workdir / "log").exists()  # not even an installation


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_what_a_page_links_to_is_there(page):
    for link in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", PAGES[page]):
        assert (REPOSITORY / page.parent / link).exists(), link
    for heading in re.findall(r"\]\(#([^)]+)\)", PAGES[page]):
        titles = re.findall(r"^#+ (.*)", PAGES[page], re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


PATH = r"`((?:docs|experiment|networks|imagenet|synthetic_data|scripts|benchmarks|tests)/[\w./]+)`"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_files_and_flags_that_a_page_names_are_there(page):
    for path in re.findall(PATH, PAGES[page]):
        assert (REPOSITORY / path).exists() or "cifake_train_fake" in path, path
    if page.parts[0] != "results":  # whose commits may have had other flags
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", PAGES[page]))
        foreign = {"--index-url", "--nproc_per_node", "--shm-size"}
        assert named <= foreign.union(*map(known_flags, SCRIPTS))


def test_the_files_it_lists_are_there():
    rows = re.findall(r"^\| (`.*?) \|", README.split("## Files")[1].split("\n## ")[0], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) > 10
    for name in names:
        assert (REPOSITORY / name).exists(), name


def test_the_scripts_it_starts_exist_and_can_be_run():
    text = "\n".join(PAGES.values())
    scripts = set(re.findall(r"bash (scripts/\S+\.sh)", text))
    assert {"scripts/demo.sh", "scripts/test.sh", "scripts/cpu.sh"} <= scripts
    for script in scripts:
        assert (REPOSITORY / script).stat().st_mode & 0o111, script
    for path in re.findall(r"-m pytest .*?(tests/\w+\.py)", text):
        assert (REPOSITORY / path).exists(), path


def test_the_flags_it_lists_exist():
    table = README.split("## The flags that matter")[1].split("\n## ")[0]
    listed = re.findall(r"`(--\w+)", table)
    assert len(listed) > 10
    known = vars(student_script.parse_args([]))
    for flag in listed:
        assert flag.removeprefix("--") in known, flag


def test_the_columns_that_are_explained_are_the_columns_there_are(workdir, demo_teacher):
    columns = PAGES[Path("docs/metrics.md")].split("column of `metrics.csv`")[1]
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


LOSS, MIXTURE, TEST = re.findall(
    "```python\n(.*?)```", PAGES[Path("docs/experiments.md")], re.DOTALL
)


def test_the_example_of_a_loss_sees_neither_scale_nor_offset():
    student, other = torch.randn(2, 8, 10)
    names = {"kd_loss": kd_loss, "args": Namespace(temperature=2.0), "student_logits": student}
    losses = []
    for teacher in (3 * student + 1, other):
        exec(LOSS, names | {"teacher_logits": teacher}, found := {})
        losses.append(found["loss"])
    assert losses[0].abs() < 1e-5 < 0.1 < losses[1]


def test_the_example_adds_real_images_to_synthetic_ones(workdir, cifake, cifar10_binary):
    Path("images").mkdir()
    cifake.rename("images/mixed")
    synthetic, real = load_cifake("images/mixed"), load_cifar10("data", train=True)
    exec(MIXTURE, {})
    mixed = load_cifake("images/mixed")
    assert len(mixed) == len(synthetic) + len(real)
    labels = {image.numpy().tobytes(): mixed.labels[i] for i, image in enumerate(mixed.images)}
    assert [labels[image.numpy().tobytes()] for image in real.images] == real.labels.tolist()


def test_the_example_tests_a_saved_network(workdir, cifar10_binary, capsys):
    torch.save(to_checkpoint(build_model(), CLASSES), "student_cifar10_kd.pth")
    exec(TEST, {})
    assert re.fullmatch(r"\{'loss': \d.*, 'accuracy': \d.*\}\n", capsys.readouterr().out)


def test_the_weights_are_the_files_that_their_page_describes():
    files = sorted((REPOSITORY / "weights").glob("*.pth"))
    assert len(files) == 2
    page = (REPOSITORY / "weights" / "README.md").read_text()
    for file in files:
        row = next(line for line in page.splitlines() if f"| `{file.name}` |" in line)
        assert f"`{sha256(file)}`" in row
        assert load_model(file).spec["arch"] in row
