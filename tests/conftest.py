import csv
import hashlib
import os
import pickle
import signal
import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR100

import data
import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
from experiment.errors import one_line_errors
from experiment.run import Run
from experiment.signals import STOP_SIGNALS
from models import read_weights
from optimizers import build_scheduler

REPOSITORY = Path(__file__).parent.parent
# A run of a second or two that goes through all of a script.
TINY = "--demo --epochs 2 --limit 48 --batch_size 16 --device cpu".split()
SMALL_NETWORK = "--arch wrn_16_1 --stem cifar".split()
TIMES = ("seconds", "images_per_second")


def run_teacher(*argv: str | Path) -> None:
    """The teacher's script, with the smallest network unless `argv` names another."""
    argv = [*TINY, *SMALL_NETWORK, *map(str, argv)]
    teacher_script.main(teacher_script.parse_args(argv))


def run_student(*argv: str | Path) -> None:
    """The student's script, with the smallest network unless `argv` names another."""
    argv = [*TINY, *SMALL_NETWORK, *map(str, argv)]
    student_script.main(student_script.parse_args(argv))


def metrics(folder: str | Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with open(Path(folder, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of a metrics.csv without the columns that no two runs have in common."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_equal_weights(one: str | Path, two: str | Path) -> None:
    """Two weight files hold the same network, bit for bit."""
    one, two = read_weights(one)[0], read_weights(two)[0]
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


def fails(script, argv, capsys) -> tuple[int, str]:
    """Run a script as its last lines do; returns the exit code and the one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, one_line_errors():
        script.main(script.parse_args([str(word) for word in argv]))
    if isinstance(stop.value.code, str):  # sys.exit(text) prints it and exits with 1
        code, text = 1, stop.value.code
    else:
        code, text = stop.value.code, capsys.readouterr().err.removesuffix("\n")
    assert text.startswith("error: ")
    assert "\n" not in text
    return code, text


def snapshot(folder: Path) -> dict[str, tuple]:
    """All that is in a folder, with the inode, size and time of the last change of each."""
    stats = {str(path): path.lstat() for path in folder.rglob("*")}
    changes = {path: stat.st_mtime_ns for path, stat in stats.items() if not os.path.isdir(path)}
    return {path: (stats[path].st_ino, stats[path].st_size, changes.get(path)) for path in stats}


def stop_after(monkeypatch, script, epochs: int) -> None:
    """Make the script die at the start of the epoch after `epochs`, as if it were killed."""
    train, done = script.train_one_epoch, []

    def dying(*args, **kwargs):
        if len(done) == epochs:
            raise KeyboardInterrupt
        done.append(1)
        return train(*args, **kwargs)

    monkeypatch.setattr(script, "train_one_epoch", dying)


def random_images(n: int) -> torch.Tensor:
    """uint8 (n, 3, 32, 32), the same for the same n."""
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


# Instead of Python: notes its arguments, and makes the folder that variants.py would.
STUB = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$LOG"
echo >> "$LOG"
if [[ $1 == *variants.py ]]; then mkdir -p "${@: -1}"; touch "${@: -1}"/{1..50}.jpg; fi
"""


def started_by(workdir: Path, name: str, *argv: str) -> list[str]:
    """The commands that scripts/NAME starts, with something in place of Python that notes them.

    It is started from another folder, with the data where a path has a space.
    """
    (workdir / "scripts").symlink_to(REPOSITORY / "scripts")
    active = workdir / "active"  # a virtual environment
    python = active / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    (workdir / "the data" / "cifake_train_fake").mkdir(parents=True)
    (workdir / "the data" / "cifake_train_fake" / "1000.jpg").touch()
    for path in REPOSITORY.glob("requirements*.txt"):
        (workdir / path.name).touch()
    paths = {"LOG": workdir / "log", "DMKD_DATA": workdir / "the data", "VIRTUAL_ENV": active}
    environment = {**os.environ, **{name: str(path) for name, path in paths.items()}}
    command = ["bash", f"../scripts/{name}", *argv]
    done = subprocess.run(command, cwd=active, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 or name == "demo.sh", done.stderr  # it reads the runs' metrics.csv
    assert not Path(workdir, ".venv").exists()
    lines = (workdir / "log").read_text().splitlines()
    return [line for line in lines if not line.startswith("-m pip")]


# ------------------------------------------------------------------- a run without its training


def run_args(**changes) -> Namespace:
    """What `Run` reads of a script's flags."""
    given = {"demo": False, "run_dir": None, "resume": None, "output": Path("out.pth")}
    return Namespace(**{**given, "epochs": 9, "seed": 0, **changes})


def tiny_state() -> dict:
    """A tiny model with an optimizer and a scheduler that have some state."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = Namespace(scheduler="multistep", milestones=[0.5, 0.8], gamma=0.1, warmup=0.0)
    scheduler = build_scheduler(optimizer, schedule, 10)
    for _ in range(6):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def make_run(state: dict | None = None, must_match: dict | None = None, **more) -> Run:
    """A run of `state`; of `more`, the flags go to `run_args`, and the others to `Run`."""
    flags = {key: more.pop(key) for key in list(more) if key in vars(run_args())}
    about = {"arch": "linear", "classes": ["cat", "dog"]}
    given = {"name": "student", "device": torch.device("cpu"), "amp": None, **more}
    state, must_match = state or tiny_state(), must_match or {}
    return Run(run_args(**flags), state=state, about=about, must_match=must_match, **given)


def row(accuracy: float, loss: float = 1.0) -> dict[str, float]:
    """What a script gives to `Run.log`."""
    return {
        "train_loss": loss,
        "train_agreement": 50.0,
        "test_loss": 1.5,
        "test_accuracy": accuracy,
        "images_per_second": 1234.5,
    }


def log(run: Run, *accuracies: float) -> None:
    """As many epochs of a run as there are test accuracies."""
    for accuracy, _ in zip(accuracies, run.epochs(), strict=False):
        run.log(row(accuracy))


# --------------------------------------------------------------------------------------- fixtures


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch) -> None:
    """The scripts draw nothing, but in tests with the mark `draws`."""
    if "draws" not in request.keywords:
        for script in (teacher_script, student_script):
            monkeypatch.setattr(script, "plot_run", lambda folder: None)


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
    """nohup ignores SIGHUP, and a script's background job SIGINT: the tests may be either."""
    handlers = {number: signal.SIG_DFL for number in STOP_SIGNALS}
    handlers[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """An empty folder, and the current one: scripts write where they are started."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def demo_teacher(tmp_path_factory) -> Path:
    """The checkpoint of a hardly trained demo teacher."""
    folder = tmp_path_factory.mktemp("demo_teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_script, "plot_run", lambda folder: None)
        run_teacher("--run_dir", folder / "run", "--output", folder / "teacher.pth")
    return folder / "teacher.pth"


@pytest.fixture
def cifake(tmp_path) -> Path:
    """A folder of 40 made JPEGs under CIFAKE's names, four a class."""
    folder = tmp_path / "cifake"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(1000, 1004):
        for k in range(1, 11):
            suffix = "" if k == 1 else f" ({k})"
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}{suffix}.jpg")
    return folder


@pytest.fixture
def cifar10_binary(tmp_path, monkeypatch) -> Path:
    """A data folder with a made CIFAR-10 of 20 images a file, in the binary version."""
    folder = tmp_path / "data"
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    rng = np.random.default_rng(0)
    checksums = {}
    for name in data.BINARY_MD5:
        records = rng.integers(0, 256, (20, 3073), np.uint8)
        records[:, 0] = np.arange(20) % 10
        (folder / "cifar-10-batches-bin" / name).write_bytes(records.tobytes())
        checksums[name] = hashlib.md5(records.tobytes()).hexdigest()
    monkeypatch.setattr(data, "BINARY_MD5", checksums)
    return folder


@pytest.fixture
def cifar100(tmp_path, monkeypatch) -> Path:
    """A data folder with a made CIFAR-100: two images a class to train on, one to test on."""
    folder = tmp_path / "data100"
    (folder / "cifar-100-python").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"kind_{i:02d}" for i in range(100)]
    for part, labels in (("train", [*range(100), *range(100)]), ("test", [*range(100)])):
        pixels = rng.integers(0, 256, (len(labels), 3072), np.uint8)
        content = pickle.dumps({"data": pixels, "fine_labels": labels})
        (folder / "cifar-100-python" / part).write_bytes(content)
        md5 = hashlib.md5(content).hexdigest()
        monkeypatch.setattr(CIFAR100, f"{part}_list", [[part, md5]])
    content = pickle.dumps({"fine_label_names": names})
    (folder / "cifar-100-python" / "meta").write_bytes(content)
    monkeypatch.setattr(
        CIFAR100, "meta", {**CIFAR100.meta, "md5": hashlib.md5(content).hexdigest()}
    )
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real CIFAR-10 and CIFAKE."""
    folder = os.environ.get("DMKD_DATA")
    if not folder:
        pytest.skip("DMKD_DATA is not set: it names a folder with the real CIFAR-10 and CIFAKE")
    return Path(folder)


def as_rank(monkeypatch, rank: int, ranks: int) -> None:
    """Let this process take itself for one of several."""
    names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": 1}
    for name, value in {**names, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
