"""Jobs of two ranks, over gloo on the CPU; one is started by torchrun, as a person would."""

import importlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, as_rank, make_run, metrics, row
from processes import Process
from two_ranks import make_divisible

import main_train_cifar10 as student_script
from experiment import parallel
from experiment.errors import UserError
from experiment.files import load
from experiment.folder import read_config

STUDENT = str(REPOSITORY / "main_train_cifar10.py")
DRIVER = str(REPOSITORY / "tests" / "two_ranks.py")
# 67: four batches and a rest, and a test set of which one rank gets an image more
SMALL = "--demo --arch wrn_16_1 --stem cifar --limit 67 --batch_size 16".split()
SMALL += "--device cpu --amp off".split()
RANDOM_TEACHER = [*SMALL, "--teacher_weights", "random"]

# What two ranks have to do as one does: the script, see two_ranks.py, and its flags.
RUNS = {
    "sgd": ("main_train_cifar10", *RANDOM_TEACHER, "--lr", "0.001"),
    "muon": (
        *("main_train_cifar10", *RANDOM_TEACHER, "--optimizer", "muon", "--lr", "0.01"),
        *("--momentum", "0.6", "--scheduler", "linear", "--augment", "reflect"),
    ),
    "teacher": ("fine_tune_teacher_cifar10", *SMALL, "--optimizer", "sgd", "--lr", "0.01"),
    "resumed": ("main_train_cifar10", *RANDOM_TEACHER, "--lr", "0.001"),
}


def run_here(name: str, *argv: str) -> None:
    """A script on the one rank that this process is, as tests/two_ranks.py runs it on two."""
    script = importlib.import_module(name.removeprefix("~"))
    with pytest.MonkeyPatch.context() as patch:
        make_divisible(patch, batchnorm=name.startswith("~"))
        script.main(script.parse_args(argv))


def named(run: Sequence[str], name: str, epochs: int = 2) -> list[str]:
    """`run` with the folder `name` and the network `name`.pth."""
    return [*run, "--epochs", str(epochs), "--run_dir", name, "--output", f"{name}.pth"]


def assert_same_run(one: str, two: str) -> None:
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for key in a.keys() - {"seconds", "images_per_second"}:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4), (two, key)
    weights, others = (load(Path(f"{name}.pth"))["model"] for name in (one, two))
    for key in weights:
        torch.testing.assert_close(
            weights[key],
            others[key],
            rtol=1e-3,
            atol=1e-5,
            msg=lambda text, k=key: f"{two} {k}: {text}",
        )


@pytest.mark.slow
def test_two_ranks_train_as_one_does(workdir, monkeypatch):
    for name in ("sgd", "muon", "teacher"):
        run_here(*named(RUNS[name], f"{name} 1"))
    statistics = ("~main_train_cifar10", *RANDOM_TEACHER, "--limit", "16")
    run_here(*named(statistics, "statistics 1", epochs=1))
    epochs = iter([student_script.train_one_epoch])  # there is none for the second
    monkeypatch.setattr(student_script, "train_one_epoch", lambda *given: next(epochs)(*given))
    with pytest.raises(StopIteration):
        run_here(*named(RUNS["resumed"], "resumed 2"))
    assert len(metrics("resumed 2")) == 1

    runs = {name: named(run, f"{name} 2") for name, run in RUNS.items()}
    runs["resumed"] = ["main_train_cifar10", "--resume", "resumed 2"]
    runs["statistics"] = named(statistics, "statistics 2", epochs=1)
    runs["wrong"] = ["main_train_cifar10", *RANDOM_TEACHER, "--batch_size", "15"]
    two = Process(DRIVER, json.dumps(list(runs.values())), ranks=2)
    stdout, stderr = two.communicate()
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: --batch_size 15 cannot be shared by 2 processes"], stderr
    assert two.returncode != 0
    assert not Path("runs").exists()  # where the wrong one would be
    assert stdout.count("epoch 2/2") == len(RUNS)  # rank 0 alone prints
    for name in RUNS:
        assert_same_run("sgd 1" if name == "resumed" else f"{name} 1", f"{name} 2")
    parts = read_config(Path("resumed 2"))["parts"]
    assert [part["hardware"].startswith("2 x ") for part in parts] == [False, True]

    # After one step the mean over two halves is that over the whole batch.
    one, both = (load(Path(f"statistics {ranks}.pth"))["model"] for ranks in (1, 2))
    first = next(key for key in one if key.endswith("running_mean"))
    assert one[first].abs().max() > 0.01
    torch.testing.assert_close(one[first], both[first], rtol=1e-4, atol=1e-6)


def wait_for_an_epoch(two: Process | subprocess.Popen, folder: str) -> None:
    while not Path(folder, "metrics.csv").exists():
        assert two.poll() is None, two.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
def test_a_stopped_job_is_resumed_by_another_number_of_ranks(workdir):
    run = RUNS["sgd"]
    two = Process(DRIVER, json.dumps([named(run, "two", epochs=8)]), ranks=2)
    wait_for_an_epoch(two, "two")
    two.send_signal(signal.SIGTERM)
    _, stderr = two.communicate()
    assert two.returncode != 0
    done = len(metrics("two"))
    assert 0 < done < 8
    assert f"stopped after epoch {done} of 8; resume with\ntorchrun --nproc_per_node=2 " in stderr
    run_here(run[0], "--resume", "two")
    run_here(*named(run, "one", epochs=8))
    assert_same_run("one", "two")


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_which_can_be_resumed(workdir):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = subprocess.Popen(
        [*torchrun, STUDENT, *named(RANDOM_TEACHER, "run", epochs=8)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for_an_epoch(two, "run")
    children = Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text().split()
    os.kill(next(int(pid) for pid in children if is_rank_one(pid)), signal.SIGKILL)
    _, stderr = two.communicate(timeout=60)
    assert two.returncode != 0
    said = rf"({parallel.RANK_LOST}|stopped after epoch \d+ of 8); resume with\s"
    command = shlex.split(re.search(rf"{said}(torchrun .*)", stderr)[2])
    assert command == ["torchrun", "--nproc_per_node=2", STUDENT, "--resume", "run"]
    assert 0 < len(metrics("run")) < 8

    student_script.main(student_script.parse_args(command[3:]))
    assert [int(row["epoch"]) for row in metrics("run")] == list(range(1, 9))
    assert load(Path("run.pth"))["provenance"]["epoch"] == 8


def is_rank_one(pid: str) -> bool:
    return b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


# ------------------------------------------------------------------------------ one rank at a time


def test_rank_0_alone_looks_for_the_folder(monkeypatch, workdir):
    """What stops rank 0 ends the job."""
    Path("mine.txt").touch()
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(UserError, match=r"\. is not empty"):
        student_script.parse_args(["--run_dir", "."])
    as_rank(monkeypatch, 1, 2)
    student_script.parse_args(["--run_dir", "."])


def test_every_row_has_one_rank(monkeypatch):
    for n in (0, 1, 7, 100):
        for ranks in (1, 2, 3, 8):
            rows = []
            for rank in range(ranks):
                as_rank(monkeypatch, rank, ranks)
                rows += range(n)[parallel.rank_slice(n)]
            assert rows == list(range(n))


def test_a_rank_that_does_not_lead_touches_nothing(workdir, monkeypatch, capsys):
    as_rank(monkeypatch, 1, 2)
    with make_run() as run:
        epochs = run.epochs()
        assert next(epochs) == 1
        run.log(row(50.0))
        assert next(epochs) == 2
        with pytest.raises(UserError, match="stopped after epoch 2: its train_loss is nan"):
            run.log(row(50.0, math.nan))
        run.finish()
    assert not any(workdir.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_goes_first(rank, monkeypatch):
    as_rank(monkeypatch, rank, 2)
    seen = []
    monkeypatch.setattr(parallel.dist, "barrier", lambda: seen.append("barrier"))
    with parallel.rank_zero_first():
        seen.append("block")
    assert seen == [["block", "barrier"], ["barrier", "block"]][rank]
