"""What goes to the screen: bars, lines, errors; and a screen that cannot be written to."""

import io
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import as_rank, log, make_run, row

from experiment import errors, parallel, progress
from experiment.errors import UserError, one_line_errors
from experiment.flags import Parser
from experiment.progress import FORECAST_AFTER, Progress
from experiment.streams import OUTPUT_LOST, steady_output
from models import read_weights

# ---------------------------------------------------------------------------------------- errors

HINT = "Smaller batches or fewer images need less."


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("two\nlines"), "error: two lines"),
        (OSError("full"), "error: full"),
        (torch.OutOfMemoryError("Out.\nA"), f"error: Out. {HINT}"),
        (MemoryError(), f"error: out of memory. {HINT}"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
            f"error: CUDA error: CUBLAS_STATUS_ALLOC_FAILED. {HINT}",
        ),
        (
            RuntimeError("MPS backend out of memory (1 GB)."),
            f"error: MPS backend out of memory (1 GB). {HINT}",
        ),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_user_can_put_right_is_one_line(error, code):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == code


def test_a_lack_of_memory_that_another_error_hides_is_found():
    """The end of a CUDA graph's capture raises an error of its own."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except torch.OutOfMemoryError:
            raise RuntimeError("capture failed")  # noqa: B904
    assert stop.value.code == f"error: CUDA out of memory. {HINT}"


def test_a_line_does_not_fill_screens(capsys):
    """The name of a network in a file of others, say, or a value in a config.json."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise UserError(f"teacher.pth: {'a' * 10**6} is not known")
    assert len(stop.value.code) < 4000
    assert stop.value.code.startswith("error: teacher.pth: aaa")
    assert stop.value.code.endswith("aaa is not known")
    with pytest.raises(SystemExit):
        Parser("").error("a" * 10**6)
    assert len(capsys.readouterr().err) < 4000


def test_a_lack_of_memory_on_a_cpu_is_one_line():
    with pytest.raises(SystemExit) as stop, one_line_errors():
        torch.empty(2**60)
    assert "can't allocate memory" in stop.value.code
    assert stop.value.code.endswith(HINT)


def test_a_lack_of_memory_on_windows_is_one_line():
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
    assert stop.value.code.endswith(f"allocate 9 bytes. {HINT}")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        1 / 0  # noqa: B018


def test_another_rank_leaves_the_first_word_to_rank_zero(monkeypatch):
    as_rank(monkeypatch, 1, 2)
    slept = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise UserError("no data")
    assert stop.value.code == "error: rank 1: no data"
    assert slept == [5]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "lacks WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: RANK=1."),
        ({"WORLD_SIZE": "8"}, "lacks RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: WORLD_SIZE=8."),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "two"}, "lacks WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2", "all": "yes"}, "names no rank of a job"),
        ({"RANK": "x", "WORLD_SIZE": "2", "all": "yes"}, "names no rank of a job"),
        ({"RANK": "0", "WORLD_SIZE": "-1", "all": "yes"}, "names no rank of a job"),
    ],
)
def test_a_part_of_what_torchrun_sets_is_refused(environment, message, monkeypatch):
    if environment.pop("all", None):
        as_rank(monkeypatch, 0, 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        pytest.fail("the script has begun")
    assert stop.value.code.startswith("error: the environment ")
    assert message in stop.value.code


@pytest.mark.parametrize(
    "environment", [{"RANK": "0"}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {}]
)
def test_a_cluster_may_say_that_there_is_one_process(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with one_line_errors():
        assert (parallel.rank(), parallel.world_size()) == (0, 1)


# ------------------------------------------------------------------- a screen that is not there


class Screen(io.TextIOWrapper):
    """A stream as Python would have made it, of which `text()` is what has arrived."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding, errors="strict", write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode()


class Broken(Screen):
    """A pipe whose reader has gone, after `lines` lines."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.lines = lines

    def write(self, text: str) -> int:
        if self.lines <= 0:
            raise BrokenPipeError(32, "Broken pipe")
        self.lines -= text.count("\n")
        return super().write(text)


@pytest.fixture
def screens(monkeypatch):
    """A function that puts other streams in the place of stdout and stderr."""

    def replace(stdout, stderr=None) -> io.TextIOBase:
        stderr = stderr or Screen()
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        return stderr

    return replace


def test_a_broken_pipe_ends_no_run(screens, workdir):
    stderr = screens(stdout := Broken(lines=3))
    with one_line_errors(), make_run(epochs=3) as made:
        log(made, 40.0, 50.0, 60.0)
        made.finish()
    assert len(stdout.text().splitlines()) == 3
    assert stderr.text() == OUTPUT_LOST  # once
    assert read_weights("out.pth")[1]["provenance"]["epoch"] == 3


@pytest.mark.parametrize("stdout", [None, "closed"])
def test_a_closed_standard_output_ends_no_run(stdout, screens, workdir):
    if stdout == "closed":
        stdout = Screen()
        stdout.close()
    stderr = screens(stdout)
    with one_line_errors(), make_run(epochs=1) as made:
        log(made, 40.0)
        made.finish()
    assert stderr.text() == OUTPUT_LOST
    assert read_weights("out.pth")


def test_stdout_and_stderr_may_both_be_gone(screens, workdir):
    screens(Broken(lines=0), Broken(lines=0))
    with pytest.raises(SystemExit) as stop, one_line_errors(), make_run() as made:
        log(made, 40.0)
        raise KeyboardInterrupt
    assert stop.value.code == 130


def test_what_is_left_in_the_buffer_of_a_broken_pipe_does_no_harm_at_exit(monkeypatch):
    """Python flushes stdout when it ends; where that fails, the exit code is 120."""
    reader, writer = os.pipe()
    os.close(reader)
    stdout = open(writer, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stdout)
    with steady_output():
        print("as --help")
    stdout.flush()


def test_an_ascii_screen_shows_what_it_can(screens, workdir, tmp_path):
    folder = Path(os.fsdecode(b"r\xff")) / "läufe €"  # not UTF-8, and not ASCII
    stderr = screens(stdout := Screen("ascii"), Screen("ascii"))
    with pytest.raises(SystemExit), one_line_errors(), make_run(run_dir=folder) as made:
        log(made, 40.0)
        made.signals.received = 15
        made._stop(15)
    assert b"run: r\\udcff/l\\xe4ufe \\u20ac on" in stdout.buffer.getvalue()
    assert b"--resume 'r\\udcff/l\\xe4ufe \\u20ac'" in stderr.buffer.getvalue()
    assert len((folder / "metrics.csv").read_text().splitlines()) == 2


# ------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that a Progress sees, in seconds: its one item."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_gets_a_bar_with_the_loss(monkeypatch, capsys):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = Progress(0, 2)
    bar.on_batch(0.5, torch.tensor(0.25))
    bar.bar.refresh()
    bar.show({"epoch": 1, **row(50.0)})
    bar.bar.close()
    assert "loss 0.2500" in screen.getvalue()
    assert "epoch 0.50/2" in screen.getvalue()
    assert "epoch 1.00/2" in screen.getvalue()
    assert capsys.readouterr().out.startswith("epoch 1/2  train_loss 1  train_agreement 50")


def test_a_file_gets_one_line_an_epoch(capsys):
    bar = Progress(0, 2)
    for epoch in (1, 2):
        bar.on_batch(1.0, torch.tensor(0.25))
        bar.show({"epoch": epoch, **row(50.0), "images_per_second": 12345.6})
    bar.bar.close()
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 2
    assert "images_per_second 12346" in captured.out


def test_a_file_gets_one_forecast_in_the_first_epoch(clock, capsys):
    """100 batches a second's sixth each, but for the first: 8 epochs of 10 minutes are left."""
    bar = Progress(done=2, epochs=10)
    clock[0] = 500.0  # the first batch is slow
    for batch in range(1, 101):
        bar.on_batch(batch / 100, torch.tensor(0.25))
        clock[0] += 6.0
    bar.show({"epoch": 3, **row(50.0)})
    for batch in range(1, 101):
        bar.on_batch(batch / 100, torch.tensor(0.25))
        clock[0] += FORECAST_AFTER
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "about 80 min of training for 8 epochs"
    assert len(lines) == 2
