import csv
import io
import json
import os
import resource
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import experiment
from engine import build_scheduler
from experiment import (
    Progress,
    Run,
    Stopped,
    UserError,
    one_line_errors,
    pick_device,
    replacing,
    save,
    seed_everything,
)
from models import read_weights


def flags(**changes) -> Namespace:
    given = {"demo": False, "run_dir": None, "resume": None, "output": Path("out.pth")}
    return Namespace(**{**given, "device": "cpu", "epochs": 9, **changes})


def row(epoch: int, accuracy: float, loss: float = 1.0) -> dict[str, float]:
    return {
        "epoch": epoch,
        "lr": 0.05,
        "train_loss": loss,
        "train_agreement": 50.0,
        "test_loss": 1.5,
        "test_accuracy": accuracy,
        "seconds": 61.0,
        "images_per_second": 1234.5,
    }


def parts():
    """A tiny model with an optimizer and a scheduler that have some state."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = Namespace(scheduler="multistep", milestones=[0.5, 0.8], gamma=0.1)
    scheduler = build_scheduler(optimizer, schedule, 10)
    for _ in range(6):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def checkpoint(model):
    return {"arch": "linear", "classes": ["cat", "dog"], "model": model.state_dict()}


def test_runs_are_numbered_and_never_reused(workdir):
    folders = [Run(flags(), "student", {}).folder for _ in range(3)]
    assert [str(f) for f in folders] == [f"runs/student-00{n}" for n in (1, 2, 3)]
    (workdir / "runs" / "student-041").mkdir()
    (workdir / "runs" / "student-old").mkdir()
    assert Run(flags(), "student", {}).folder == Path("runs/student-042")
    assert Run(flags(), "teacher", {}).folder == Path("runs/teacher-001")
    assert Run(flags(demo=True), "student", {}).folder == Path("runs/demo/student-001")


def test_a_folder_with_something_in_it_is_refused(workdir):
    (workdir / "mine").mkdir()
    (workdir / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"mine is not empty.*--resume mine"):
        Run(flags(run_dir=Path("mine")), "student", {})
    assert [p.name for p in (workdir / "mine").iterdir()] == ["thesis.tex"]


def test_the_config_tells_where_a_run_comes_from(workdir):
    run = Run(flags(run_dir=Path("a/b")), "student", {"train_images": 7}, teacher_accuracy=81.5)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["kind"] == "student"
    assert config["train_images"] == 7
    assert config["teacher_accuracy"] == 81.5
    assert config["args"]["output"] == "out.pth"
    assert config["torch"] == str(torch.__version__)
    assert {"command", "started", "git_commit", "python", "torchvision", "hardware"} <= set(config)


@pytest.mark.parametrize("output", ["folder", "file/out.pth"])
def test_an_output_that_cannot_be_written_is_refused_before_training(output, workdir):
    (workdir / "folder").mkdir()
    (workdir / "file").write_text("")
    with pytest.raises((UserError, OSError)):
        Run(flags(output=Path(output)), "student", {})
    assert not (workdir / "runs").exists()


def test_metrics_hold_every_epoch_and_best_is_the_first_best(workdir, monkeypatch):
    monkeypatch.setattr(experiment, "SAVE_EVERY", 0)
    model, optimizer, scheduler = parts()
    run = Run(flags(), "student", {})
    for epoch, accuracy in enumerate([40.0, 60.0, 60.0, 50.0], start=1):
        run.record(row(epoch, accuracy), checkpoint(model), optimizer, scheduler)
        with open(run.folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(r["epoch"]) for r in rows] == list(range(1, epoch + 1))
    assert list(rows[0]) == list(row(1, 0))
    assert float(rows[3]["test_accuracy"]) == 50.0
    assert run.best["epoch"] == 2
    provenance = read_weights(run.folder / "best.pt")[1]["provenance"]
    assert (provenance["epoch"], provenance["test_accuracy"]) == (2, 60.0)
    assert read_weights(run.folder / "last.pt")[1]["provenance"]["epoch"] == 4
    assert not list(run.folder.glob("*.tmp"))


def test_a_run_goes_on_with_all_it_had(workdir):
    model, optimizer, scheduler = parts()
    run = Run(flags(), "student", {"train_images": 5})
    run.record(row(1, 40.0), checkpoint(model), optimizer, scheduler)
    (run.folder / "metrics.csv").unlink()  # stopped between the checkpoint and the table
    run.lock.close()  # as when a process ends

    again = Run(flags(resume=run.folder), "student", {"train_images": 5})
    other_model, other_optimizer, other_scheduler = parts()
    assert again.restore(other_model, other_optimizer, other_scheduler) == 2
    assert again.history == run.history
    assert (run.folder / "metrics.csv").exists()
    assert other_scheduler.get_last_lr() == scheduler.get_last_lr()
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(a, b)
        momentum = optimizer.state[a]["momentum_buffer"]
        assert torch.equal(momentum, other_optimizer.state[b]["momentum_buffer"])


def test_a_run_without_a_finished_epoch_starts_at_the_first(workdir):
    with Run(flags(), "student", {}) as run:
        pass
    assert Run(flags(resume=run.folder), "student", {}).restore(*parts()) == 1


def test_a_run_does_not_go_on_with_another_teacher(workdir):
    with Run(flags(), "student", {"teacher_sha256": "aaaa"}) as run:
        pass
    with pytest.raises(UserError, match="cannot go on: teacher_sha256 was aaaa, now bbbb"):
        Run(flags(resume=run.folder), "student", {"teacher_sha256": "bbbb"})


def test_what_waits_is_a_copy_and_is_written_at_the_end(workdir):
    """Short epochs are not written one by one; the last finished one is never lost."""
    model, optimizer, scheduler = parts()
    with pytest.raises(ZeroDivisionError), Run(flags(), "student", {}) as run:
        written = []
        for epoch, accuracy in enumerate([40.0, 60.0, 50.0], start=1):
            model.weight.data.fill_(epoch)
            written.append(
                run.record(row(epoch, accuracy), checkpoint(model), optimizer, scheduler)
            )
        assert written == [True, False, False]
        assert len((run.folder / "metrics.csv").read_text().splitlines()) == 2
        model.weight.data.fill_(99)  # the middle of the next epoch
        1 / 0  # noqa: B018
    assert len((run.folder / "metrics.csv").read_text().splitlines()) == 4
    assert read_weights(run.folder / "last.pt")[0]["weight"].unique().item() == 3
    assert read_weights(run.folder / "best.pt")[0]["weight"].unique().item() == 2


@pytest.mark.parametrize("broken", ["train_loss", "test_loss", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_epoch_ends_the_run_and_spares_the_last_good_one(value, broken, workdir):
    model, optimizer, scheduler = parts()
    with Run(flags(), "student", {}) as run:
        run.record(row(1, 40.0), checkpoint(model), optimizer, scheduler)
        run.record(row(2, 45.0), checkpoint(model), optimizer, scheduler)  # waits
        if broken == "weight":
            model.weight.data[0, 0] = value
        diverged = {**row(3, 10.0), broken: value} if broken != "weight" else row(3, 10.0)
        with pytest.raises(UserError, match=r"after epoch 3: its .*(nan|inf|not finite).*--lr"):
            run.record(diverged, checkpoint(model), optimizer, scheduler)
    weights, facts = read_weights(run.folder / "last.pt")
    assert facts["provenance"]["epoch"] == 2
    assert weights["weight"].isfinite().all()
    assert "nan" not in (run.folder / "metrics.csv").read_text()


@pytest.mark.parametrize("number", experiment.STOP_SIGNALS)
def test_a_signal_ends_a_run_with_what_is_finished(number, workdir, capsys):
    model, optimizer, scheduler = parts()
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, one_line_errors(), Run(flags(), "student", {}) as run:
        run.record(row(1, 40.0), checkpoint(model), optimizer, scheduler)
        run.record(row(2, 45.0), checkpoint(model), optimizer, scheduler)
        signal.raise_signal(number)
        pytest.fail("the signal was missed")
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err.splitlines()[1:] == [
        "stopped after epoch 2 of 9; to go on:",
        f"python {sys.argv[0]} --resume runs/student-001",
    ]
    assert read_weights(run.folder / "last.pt")[1]["provenance"]["epoch"] == 2
    assert signal.getsignal(number) == before


def test_a_signal_does_not_cut_into_the_end_of_an_epoch(workdir, monkeypatch):
    model, optimizer, scheduler = parts()

    told = []

    def save_and_be_told_to_stop(*args, **kwargs):
        if not told:
            signal.raise_signal(signal.SIGTERM)
        told.append(args)
        save(*args, **kwargs)

    monkeypatch.setattr(experiment, "save", save_and_be_told_to_stop)
    with pytest.raises(Stopped, match="after epoch 1"), Run(flags(), "student", {}) as run:
        run.record(row(1, 40.0), checkpoint(model), optimizer, scheduler)
    assert len(told) == 2
    assert len((run.folder / "metrics.csv").read_text().splitlines()) == 2
    assert read_weights(run.folder / "best.pt")


def test_a_folder_is_for_one_process_at_a_time(workdir):
    run = Run(flags(), "student", {})
    with pytest.raises(UserError, match=r"runs/student-001 is in use: another process"):
        Run(flags(resume=run.folder), "student", {})
    run.lock.close()  # the system does that for a killed process
    Run(flags(resume=run.folder), "student", {})


def test_the_end_exports_the_last_epoch_and_says_so(workdir, capsys):
    model, optimizer, scheduler = parts()
    run = Run(flags(output=Path("new/student.pth")), "student", {})
    run.record(row(1, 70.0), checkpoint(model), optimizer, scheduler)
    run.record(row(2, 65.5), checkpoint(model), optimizer, scheduler)
    run.finish(checkpoint(model), [60.0, 71.0])
    said = capsys.readouterr().out
    assert "final  65.50 % on the test set, epoch 2" in said
    assert "best   70.00 %, epoch 1: picked on the test set, only to compare" in said
    assert "time   2 min 2 s" in said
    assert "saved  new/student.pth" in said
    table = (run.folder / "per_class.csv").read_text()
    assert table == "class,test_accuracy\ncat,60\ndog,71\n"
    weights, facts = read_weights("new/student.pth")
    assert torch.equal(weights["weight"], model.weight)
    assert facts["provenance"]["test_accuracy"] == 65.5


def test_what_is_in_the_way_of_the_output_is_kept(workdir, capsys):
    model, optimizer, scheduler = parts()
    Path("notes.txt").write_text("years of work")
    for _ in range(2):
        run = Run(flags(output=Path("notes.txt")), "student", {})
        run.record(row(1, 70.0), checkpoint(model), optimizer, scheduler)
        run.finish(checkpoint(model), [60.0, 71.0])
        run.finish(checkpoint(model), [60.0, 71.0])  # its own file is replaced
    assert Path("notes.001.txt").read_text() == "years of work"
    provenance = [read_weights(f)[1]["provenance"]["run"] for f in ("notes.002.txt", "notes.txt")]
    assert provenance == ["runs/student-001", "runs/student-002"]
    assert "kept   notes.001.txt, the former notes.txt" in capsys.readouterr().out


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(workdir):
    path = workdir / "file"
    path.write_text("old")

    def fail():
        with replacing(path) as file:
            file.write(b"half of the n")
            raise OSError("disk full")

    with pytest.raises(UserError, match=r"file cannot be written: disk full"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(workdir) == ["file"]
    save(path, {"a": 1})
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert os.listdir(workdir) == ["file"]


def test_a_full_disk_is_one_line_and_spares_the_last_checkpoint(workdir, monkeypatch):
    monkeypatch.setattr(experiment, "SAVE_EVERY", 0)
    model, optimizer, scheduler = parts()
    with Run(flags(), "student", {}) as run:
        run.record(row(1, 40.0), checkpoint(model), optimizer, scheduler)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # bytes a file may have
        try:
            with pytest.raises(UserError, match=r"last.pt cannot be written: File too large"):
                run.record(row(2, 35.0), checkpoint(model), optimizer, scheduler)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert read_weights(run.folder / "last.pt")[1]["provenance"]["epoch"] == 1
        assert len((run.folder / "metrics.csv").read_text().splitlines()) == 2
        assert not list(run.folder.glob("*.tmp"))
    # by the end of the block there is room again
    assert read_weights(run.folder / "last.pt")[1]["provenance"]["epoch"] == 2


def test_every_epoch_draws_its_own_numbers_from_the_seed():
    def draw(seed, epoch=0):
        seed_everything(seed, epoch)
        return torch.rand(4).tolist()

    assert draw(0, 3) == draw(0, 3)
    draws = [draw(seed, epoch) for seed in range(3) for epoch in range(4)]
    assert len({tuple(d) for d in draws}) == 12


def test_the_device_is_the_best_there_is(monkeypatch):
    device, amp = pick_device("cpu", "auto")
    assert (device.type, amp) == ("cpu", None)
    assert pick_device("cpu", "bf16")[1] == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto", "auto")[0].type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    with pytest.raises(UserError, match="--device cuda: PyTorch finds 0 CUDA devices"):
        pick_device("cuda", "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device, amp = pick_device("auto", "auto")
    assert (device.type, amp) == ("cuda", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert pick_device("auto", "auto")[1] is None
    with pytest.raises(UserError, match="--device cuda:1: PyTorch finds 1 CUDA devices"):
        pick_device("cuda:1", "auto")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device, _ = pick_device("cuda:0", "auto")
    assert chosen == [device] == [torch.device("cuda", 0)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("two\nlines"), "error: two lines"),
        (OSError("full"), "error: full"),
        (torch.OutOfMemoryError("Out.\nA"), "error: Out. A smaller --batch_size takes less."),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_user_can_put_right_is_one_line(error, code):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == code


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        1 / 0  # noqa: B018


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_bars_with_loss_and_throughput(monkeypatch, capsys):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress(first_epoch=1, epochs=2, images=20)
    for _ in range(2):
        progress.on_batch(10, torch.tensor(0.25))
    progress.images.refresh()
    progress.epoch(row(1, 50.0))
    progress.close()
    assert "loss 0.2500" in screen.getvalue()
    assert "20.0/20.0" in screen.getvalue()
    assert "img/s" in screen.getvalue()
    assert "1/2" in screen.getvalue()
    assert capsys.readouterr().out.startswith(
        "epoch 1/2  lr 0.05  train_loss 1  train_agreement 50"
    )


def test_a_file_gets_one_line_an_epoch(capsys):
    progress = Progress(first_epoch=1, epochs=2, images=20)
    assert progress.on_batch is None
    progress.epoch(row(1, 50.0))
    progress.epoch(row(2, 51.0))
    progress.close()
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 2
