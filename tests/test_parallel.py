"""Jobs of two ranks, over gloo on the CPU, started by torchrun as a person would."""

import csv
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import as_rank
from test_experiment import checkpoint, flags, parts, row

import parallel
from data import DeviceLoader, ImageSet
from experiment import Run, UserError

ROOT = Path(__file__).resolve().parent.parent
STUDENT = str(ROOT / "main_train_cifar10.py")
FROZEN = str(ROOT / "tests" / "frozen_batchnorm.py")
SMALL = "--demo --teacher_weights random --student_arch wrn_16_1 --stem cifar --limit 64".split()
SMALL += "--batch_size 16 --lr 0.001".split()


def command(ranks: int, script: list[str], *flags) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    start = [sys.executable, *(torchrun if ranks > 1 else [])]
    return [*start, *script, *map(str, flags)]


def run(ranks: int, script: list[str], *flags) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(ranks, script, *flags), capture_output=True, text=True, env=environment
    )


def table(folder: str) -> list[dict[str, str]]:
    with open(Path(folder, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(a: str, b: str) -> None:
    for one, other in zip(table(a), table(b), strict=True):
        for key in one.keys() - {"seconds", "images_per_second"}:
            assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-4), key
    weights, others = (torch.load(f"{name}.pth", weights_only=True)["model"] for name in (a, b))
    for key in weights:
        torch.testing.assert_close(weights[key], others[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_two_ranks_train_as_one_does(mix, workdir):
    for name, ranks in (("one", 1), ("two", 2)):
        flags = [*SMALL, "--epochs", 2, "--mix", mix, "--run_dir", name, "--output", f"{name}.pth"]
        done = run(ranks, [FROZEN, STUDENT], *flags)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1  # rank 0 alone prints
    assert_same_run("one", "two")


def test_a_stopped_job_goes_on_with_another_number_of_ranks(workdir):
    flags = [*SMALL, "--epochs", 12, "--output", "two.pth"]
    job = subprocess.Popen(
        command(2, [FROZEN, STUDENT], *flags, "--run_dir", "two"), stderr=subprocess.PIPE, text=True
    )
    while not Path("two/metrics.csv").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    _, stderr = job.communicate()
    assert job.returncode != 0
    assert re.search("stopped after epoch .* of 12; to go on:\ntorchrun .* --resume two", stderr)
    done = len(table("two"))
    assert 0 < done < 12
    assert run(1, [FROZEN, STUDENT], "--resume", "two").returncode == 0
    one = run(1, [FROZEN, STUDENT], *flags, "--run_dir", "one", "--output", "one.pth")
    assert one.returncode == 0
    assert_same_run("one", "two")


def test_a_rank_that_dies_ends_the_job(workdir):
    job = subprocess.Popen(
        command(2, [STUDENT], *SMALL, "--epochs", 1000, "--run_dir", "run"),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not Path("run/metrics.csv").exists():
        assert job.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    ranks = {rank_of(pid): int(pid) for pid in children if rank_of(pid) is not None}
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "another process of this job has died" in stderr or "stopped after epoch" in stderr
    assert re.search("to go on:\ntorchrun .* --resume run", stderr)
    assert run(1, [STUDENT, "--resume", "run", "--epochs", "2000"]).returncode == 2  # a run as any


def rank_of(pid: str) -> int | None:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(x[5:]) for x in environment if x.startswith(b"RANK=")), None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", 15], "error: --batch_size 15 cannot be shared by 2 processes"),
        (["--sync_bn"], "error: --sync_bn needs GPUs"),
        (["--run_dir", "."], "error: . is not empty"),
    ],
)
def test_what_is_wrong_is_said_once(flags, message, workdir):
    Path("mine.txt").touch()
    done = run(2, [STUDENT], *SMALL, *flags)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.startswith(message) for line in said] == [True]
    assert not list(Path().rglob("config.json"))


# ------------------------------------------------------------------------------ one rank at a time


@pytest.mark.parametrize("n", [0, 1, 7, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_row_has_one_rank(n, ranks, monkeypatch):
    rows = []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        rows += range(n)[parallel.own_part(n)]
    assert rows == list(range(n))


@pytest.mark.parametrize(("train", "mix"), [(True, "none"), (True, "mixup"), (False, "none")])
def test_the_parts_of_the_ranks_are_the_batches_of_one(train, mix, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (26, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageSet(images, torch.arange(26) % 10, tuple("abcdefghij"))

    def batches(rank: int, ranks: int) -> list:
        as_rank(monkeypatch, rank, ranks)
        torch.manual_seed(1)
        return list(DeviceLoader(data, 12, "cpu", train, mix=mix))

    whole, parts = batches(0, 1), [batches(rank, 3) for rank in range(3)]
    for what in (0, 1):
        if train:
            joined = [torch.cat([part[i][what] for part in parts]) for i in range(len(whole))]
        else:  # the ranks have a third of the images each, in order
            joined = [torch.cat([batch[what] for part in parts for batch in part])]
            whole = [tuple(torch.cat(column) for column in zip(*whole, strict=True))]
        for together, batch in zip(joined, whole, strict=True):
            assert torch.equal(together, batch[what])


def test_a_rank_that_does_not_lead_touches_nothing(workdir, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    run, (model, optimizer, scheduler) = Run(flags(), "student", {}), parts()
    with run:
        assert not run.record(row(1, 50.0), checkpoint(model), optimizer, scheduler)
        with pytest.raises(UserError, match="stopped after epoch 2: its training loss is nan"):
            run.record(row(2, 50.0, math.nan), checkpoint(model), optimizer, scheduler)
        run.finish(checkpoint(model), [50.0, 50.0])
    assert not any(workdir.iterdir())


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    as_rank(monkeypatch, 1, 3)
    data = ImageSet(torch.zeros(20, 3, 32, 32), torch.zeros(20), ("a",))
    with pytest.raises(UserError, match="16 cannot be shared by 3"):
        DeviceLoader(data, 16, "cpu", train=True)
