"""A run and its folder: what is written, restored, refused, and kept when something goes wrong."""

import errno
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, as_rank, log, make_run, metrics, row, tiny_state

from experiment import files, flags, folder, run
from experiment.device import hardware, pick_device, seed_everything
from experiment.errors import Stopped, UserError, one_line_errors
from experiment.files import load, save
from experiment.folder import FORMAT, parse_args, read_config
from experiment.signals import STOP_SIGNALS
from models import read_weights
from synthetic_data.ema import EMA


@pytest.fixture
def every_epoch(monkeypatch):
    """Every epoch is written at once, however short it is."""
    monkeypatch.setattr(run, "SAVE_EVERY", 0)


def resumed(path: Path, state: dict | None = None, **more) -> run.Run:
    return make_run(state, resume=path, **more)


# --------------------------------------------------------------------------------- a new folder


def test_runs_are_numbered_and_never_reused(workdir):
    folders = [make_run().folder for _ in range(3)]
    assert [str(f) for f in folders] == [f"runs/student-00{n}" for n in (1, 2, 3)]
    (workdir / "runs" / "student-041").mkdir()
    (workdir / "runs" / "student-old").mkdir()
    assert make_run().folder == Path("runs/student-042")
    assert make_run(name="teacher").folder == Path("runs/teacher-001")
    assert make_run(demo=True).folder == Path("runs/demo/student-001")


def test_two_runs_that_start_at_once_take_two_numbers(workdir, monkeypatch):
    check = folder.check_output

    def check_while_another_run_starts(*args):
        check(*args)
        Path("runs/student-001").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(folder, "check_output", check_while_another_run_starts)
    assert make_run().folder == Path("runs/student-002")


def test_a_folder_with_something_in_it_is_refused(workdir):
    (workdir / "mine").mkdir()
    (workdir / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"mine is not empty.*--resume mine"):
        make_run(run_dir=Path("mine"))
    assert [p.name for p in (workdir / "mine").iterdir()] == ["thesis.tex"]


def test_what_a_killed_start_left_is_no_obstacle(workdir):
    (workdir / "run").mkdir()
    for name in (".lock", ".x1y2.tmp"):
        (workdir / "run" / name).touch()
    make_run(run_dir=Path("run"))


def test_the_config_tells_where_a_run_comes_from(workdir):
    made = make_run(None, {"train_images": 7}, run_dir=Path("a/b"), teacher_accuracy=81.5)
    config = json.loads((made.folder / "config.json").read_text())
    expected = {"name": "student", "format": FORMAT, "train_images": 7, "teacher_accuracy": 81.5}
    assert {key: config[key] for key in expected} == expected
    assert len(config["run_id"]) == 32
    assert config["args"]["output"] == "out.pth"
    (part,) = config["parts"]
    assert part["torch"] == str(torch.__version__)
    assert (part["from_epoch"], part["precision"]) == (1, "float32")
    assert part["command"] == shlex.join(["python", *sys.argv])
    assert part["hardware"] == hardware(torch.device("cpu"))
    assert {"started", "git_commit", "python", "torchvision"} <= set(part)


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("folder", "not a regular file"),
        (".", "not a regular file"),
        ("/", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("fifo", "not a regular file"),
        ("run", "not a regular file"),  # which is a folder before long
        ("runs", "not a regular file"),
        ("file/out.pth", "file is not a folder"),
        ("run/last.pt", "a run writes"),
        ("run/BEST.pt", "a run writes"),
        ("link/config.json", "a run writes"),
        ("run/.lock", "a run writes"),
        ("run/val_accuracy.png", "a run writes"),
        ("run/metrics.csv", "a run writes"),
        ("other/last.pt", "a run writes"),
    ],
    ids=lambda text: text[:20],
)
def test_an_output_that_cannot_be_written_is_refused_before_training(output, problem, workdir):
    for name in ("folder", "other"):
        (workdir / name).mkdir()
    (workdir / "other" / "config.json").write_text("{}")
    (workdir / "file").write_text("")
    (workdir / "link").symlink_to("run")
    os.mkfifo("fifo")
    before = sorted(workdir.rglob("*"))
    run_dir = Path("runs/new" if output == "runs" else "run")
    with pytest.raises(UserError, match=rf"--output {output} cannot be written: .*{problem}"):
        make_run(output=Path(output), run_dir=run_dir)
    assert sorted(workdir.rglob("*")) == before


def test_a_link_as_output_needs_a_folder_that_can_be_written_to(workdir, monkeypatch):
    """The link is replaced by the file, in the folder of the link and not in its target's."""
    for name in ("locked", "open"):
        (workdir / name).mkdir()
    (workdir / "locked" / "out.pth").symlink_to(workdir / "open" / "target.pth")
    (workdir / "open" / "out.pth").symlink_to(workdir / "locked" / "target.pth")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # for root
    with pytest.raises(UserError, match="locked is not a folder that can be written to"):
        make_run(output=Path("locked/out.pth"), run_dir=Path("run"))
    with make_run(output=Path("open/out.pth"), run_dir=Path("run"), epochs=1) as made:
        log(made, 40.0)
        made.finish()
    assert not (workdir / "open" / "out.pth").is_symlink()


def test_a_network_may_lie_in_the_folder_of_its_run(workdir):
    with make_run(run_dir=Path("run"), output=Path("run/new/student.pth"), epochs=1) as made:
        log(made, 40.0)
        made.finish()
    assert read_weights("run/new/student.pth")


def test_a_resumed_run_may_not_write_over_its_own_files(workdir):
    with make_run(run_dir=Path("run")) as made:
        log(made, 40.0)
    with pytest.raises(UserError, match=r"--output run/last\.pt cannot be written"):
        resumed(Path("run"), output=Path("run/last.pt"))
    resumed(Path("run"))


def test_a_folder_that_another_run_has_used_meanwhile_is_refused(workdir, monkeypatch):
    lock = folder.lock

    def late(path):
        monkeypatch.setattr(folder, "lock", lock)
        with make_run(run_dir=path) as other:
            log(other, 40.0)
        return lock(path)

    monkeypatch.setattr(folder, "lock", late)
    with pytest.raises(UserError, match="run is not empty"):
        make_run(run_dir=Path("run"))
    assert len(metrics("run")) == 1


# --------------------------------------------------------------------------------- what is kept


def test_metrics_hold_every_epoch_and_best_is_the_first_best(workdir, every_epoch):
    made = make_run()
    for epoch, accuracy in zip(made.epochs(), [40.0, 60.0, 60.0, 50.0], strict=False):
        made.log(row(accuracy))
        rows = metrics(made.folder)
        assert [int(r["epoch"]) for r in rows] == list(range(1, epoch + 1))
        if epoch == 4:
            break
    assert list(rows[0]) == ["epoch", "lr", *row(0), "seconds"]
    assert float(rows[3]["test_accuracy"]) == 50.0
    assert made.best["epoch"] == 2
    provenance = read_weights(made.folder / "best.pt")[1]["provenance"]
    assert (provenance["epoch"], provenance["test_accuracy"]) == (2, 60.0)
    assert read_weights(made.folder / "last.pt")[1]["provenance"]["epoch"] == 4
    assert not list(made.folder.glob("*.tmp"))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_run_is_resumed_with_all_it_had(decay, workdir):
    def state() -> dict:
        state = tiny_state()
        ema = EMA(state["model"], decay)
        return {**state, "model": ema.model, "trained": state["model"], "ema": ema}

    first, second = state(), state()
    first["ema"].update()
    made = make_run(first, {"train_images": 5})
    log(made, 40.0)
    (made.folder / "metrics.csv").unlink()  # killed between the checkpoint and the table
    made.lock.close()  # as when a process ends

    again = resumed(made.folder, second, must_match={"train_images": 5})
    assert next(again.epochs()) == 2
    assert again.history == made.history
    assert [r["epoch"] for r in metrics(made.folder)] == ["1"]
    assert second["scheduler"].get_last_lr() == first["scheduler"].get_last_lr()
    torch.testing.assert_close(second["ema"].state_dict(), first["ema"].state_dict())
    for name in ("model", "trained"):
        torch.testing.assert_close(
            second[name].state_dict(), first[name].state_dict(), rtol=0, atol=0
        )
    pairs = zip(first["trained"].parameters(), second["trained"].parameters(), strict=True)
    for a, b in pairs:
        momentum = first["optimizer"].state[a]["momentum_buffer"]
        assert torch.equal(momentum, second["optimizer"].state[b]["momentum_buffer"])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_run_from_a_mac_gets_the_layout_of_this_device(optimizer, workdir):
    """Fused updates of CUDA refuse momentum in another layout than the weights'."""

    def state(layout: torch.memory_format) -> dict:
        state = tiny_state()
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=layout)
        options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        rule = optimizer(model.parameters(), 0.1, **options)
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        rule.step()
        state["scheduler"].optimizer = rule
        return {**state, "model": model, "optimizer": rule}

    on_mac, here = state(torch.contiguous_format), state(torch.channels_last)
    with make_run(on_mac) as made:
        log(made, 40.0)
    next(resumed(made.folder, here).epochs())
    weight, old = here["model"].weight, on_mac["optimizer"].state[on_mac["model"].weight]
    buffers = here["optimizer"].state[weight]
    assert buffers.keys() == old.keys()
    for name, value in buffers.items():
        assert torch.equal(value, old[name])
        if value.ndim:
            assert value.stride() == weight.stride() != old[name].stride()


def test_a_resumed_epoch_draws_what_the_unbroken_one_would_have(workdir):
    whole = [torch.rand(3).tolist() for _ in make_run(epochs=3).epochs()]
    assert whole[0] != whole[1] != whole[2] != whole[0]
    with make_run(epochs=3) as made:
        log(made, 40.0)
    rest = [torch.rand(3).tolist() for _ in resumed(made.folder, epochs=3).epochs()]
    assert rest == whole[1:]


def test_every_part_of_a_run_tells_its_own_story(workdir):
    """Stopped before the first epoch, after it, and resumed twice: config.json and the network."""
    with make_run(epochs=2) as made:
        pass
    with resumed(made.folder, epochs=2) as made:
        log(made, 40.0)
    with resumed(made.folder, epochs=2, amp=torch.bfloat16) as made:
        log(made, 50.0)
        made.finish()
    parts = read_config(made.folder)["parts"]
    assert [part["from_epoch"] for part in parts] == [1, 1, 2]
    assert [part["precision"] for part in parts] == ["float32", "float32", "bfloat16"]
    assert all(part["seconds"] > 0 for part in parts)
    exported = read_weights("out.pth")[1]["provenance"]["parts"]
    assert [part["from_epoch"] for part in exported] == [1, 1, 2]


def test_a_copy_in_another_repository_has_no_commit(workdir):
    """A ZIP file that is unpacked there: that repository's commit says nothing of it."""
    shutil.copytree(REPOSITORY / "experiment", "theirs/experiment")
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init"], ["commit", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    code = "import torch; from experiment.folder import provenance as of; "
    code += "print(of(torch.device('cpu'), None)['git_commit'])"
    commits = []
    for added in (False, True):
        if added:
            subprocess.run(["git", "add", "theirs"], check=True)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd="theirs", check=True, capture_output=True, text=True)
        commits.append(done.stdout.strip())
    assert commits[0] == "None"
    assert re.fullmatch(r"[0-9a-f]{12}-dirty", commits[1])


def test_a_config_that_changes_before_the_lock_is_read_again(workdir, monkeypatch):
    """The process that stops writes its seconds last."""
    with make_run(epochs=2) as made:
        log(made, 40.0)
    lock = folder.lock

    def late(path: Path):
        config = read_config(path)
        config["parts"][0]["seconds"] = 77.0
        files.write_json(path / "config.json", config)
        return lock(path)

    monkeypatch.setattr(folder, "lock", late)
    assert resumed(made.folder, epochs=2).config["parts"][0]["seconds"] == 77.0


def test_a_finished_run_that_is_resumed_gets_no_further_part(workdir, capsys):
    with make_run(epochs=1) as made:
        log(made, 40.0)
        made.finish()
    before = read_config(made.folder)
    with resumed(made.folder, epochs=1) as again:
        assert list(again.epochs()) == []
        again.finish()
    assert read_config(made.folder) == before
    assert "note: all epochs are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("commit", "amp", "note"),
    [
        ("abc", None, None),
        ("abc", torch.bfloat16, "so far it ran in float32, now in bfloat16"),
        ("def", None, "the code may have changed: so far it was commit abc, now def"),
        ("abc-dirty", None, "the code may have changed: so far it was commit abc, now abc-dirty"),
    ],
)
def test_another_precision_or_code_is_mentioned_when_a_run_is_resumed(
    commit, amp, note, workdir, monkeypatch, capsys
):
    here = folder.provenance(torch.device("cpu"), None)
    monkeypatch.setattr(folder, "provenance", lambda *_: {**here, "git_commit": "abc"})
    with make_run() as made:
        log(made, 40.0)
    precision = str(amp or torch.float32).removeprefix("torch.")
    there = {**here, "git_commit": commit, "precision": precision}
    monkeypatch.setattr(folder, "provenance", lambda *_: there)
    capsys.readouterr()
    resumed(made.folder)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert notes == ([f"note: {note}"] if note else [])


def test_seconds_are_from_the_wall(workdir, every_epoch, monkeypatch, capsys):
    """Those of an epoch have saving and drawing in them; those of a part have all since the start.

    Here an epoch's training takes 10 s, its plots 100 s and the start of the script 1,000 s.
    """
    now = [run.IMPORTED + 1000.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    with make_run(on_save=lambda folder: pass_time(100), epochs=2) as made:
        for _ in made.epochs():
            pass_time(10)
            made.log(row(40.0))
        made.finish()
    assert [float(r["seconds"]) for r in metrics(made.folder)] == [10, 110]
    assert read_config(made.folder)["parts"][0]["seconds"] == 1320
    assert "time   22 min 0 s on" in capsys.readouterr().out
    assert read_weights("out.pth")[1]["provenance"]["parts"][0]["seconds"] == 1320


def test_what_is_pending_is_a_copy_and_is_written_at_the_end(workdir):
    """Short epochs are not written one by one; the last finished one is never lost."""
    state = tiny_state()
    with pytest.raises(ZeroDivisionError), make_run(state) as made:
        for epoch, accuracy in zip(made.epochs(), [40.0, 60.0, 50.0], strict=False):
            state["model"].weight.data.fill_(epoch)
            made.log(row(accuracy))
            assert len(metrics(made.folder)) == 1  # that of the first
            if epoch == 3:
                break
        state["model"].weight.data.fill_(99)  # the middle of the next epoch
        for buffers in state["optimizer"].state.values():
            buffers["momentum_buffer"].fill_(99)
        1 / 0  # noqa: B018
    assert len(metrics(made.folder)) == 3
    assert read_weights(made.folder / "last.pt")[0]["weight"].unique().item() == 3
    assert read_weights(made.folder / "best.pt")[0]["weight"].unique().item() == 2
    kept = load(made.folder / "last.pt")["optimizer"]["state"].values()
    assert not any((buffers["momentum_buffer"] == 99).any() for buffers in kept)


@pytest.mark.parametrize("broken", ["train_loss", "test_loss", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_epoch_ends_the_run_and_spares_the_last_good_one(value, broken, workdir):
    state = tiny_state()
    with make_run(state) as made:
        epochs = made.epochs()
        for accuracy in (40.0, 45.0):  # the second one is pending
            next(epochs)
            made.log(row(accuracy))
        next(epochs)
        if broken == "weight":
            state["model"].weight.data[0, 0] = value
        diverged = {**row(10.0), broken: value} if broken != "weight" else row(10.0)
        with pytest.raises(UserError, match=r"after epoch 3: .*(nan|inf|not finite).*--lr is"):
            made.log(diverged)
    weights, facts = read_weights(made.folder / "last.pt")
    assert facts["provenance"]["epoch"] == 2
    assert weights["weight"].isfinite().all()
    assert "nan" not in (made.folder / "metrics.csv").read_text()


def test_a_diverged_epoch_in_float16_may_be_an_overflow(workdir):
    with make_run(amp=torch.float16) as made:
        next(made.epochs())
        with pytest.raises(UserError, match=r"A too high --lr, or float16 \(try --amp off\), is"):
            made.log(row(10.0, loss=math.nan))


def test_best_pt_is_written_before_last_pt(workdir, monkeypatch):
    """After a kill between the two, the epoch is repeated."""
    names = []
    monkeypatch.setattr(run, "save", lambda path, state: names.append(path.name))
    with make_run() as made:
        log(made, 40.0)
    assert names == ["best.pt", "last.pt"]


def test_what_a_full_disk_kept_from_the_table_is_written_at_the_end(workdir, monkeypatch):
    """The disk is full between last.pt and metrics.csv, and has room again a moment later."""
    full, write = iter([UserError("disk full")]), folder.write_metrics

    def write_metrics(*given):
        for error in full:
            raise error
        write(*given)

    monkeypatch.setattr(folder, "write_metrics", write_metrics)
    with pytest.raises(UserError, match="disk full"), make_run() as made:
        log(made, 40.0)
    assert len(metrics(made.folder)) == 1


def test_a_run_does_not_get_other_columns_on_the_way(workdir):
    """As when it is resumed by a commit that logs more. Its table and its checkpoint stay."""
    with make_run() as made:
        log(made, 40.0)
    with resumed(made.folder) as again:
        next(again.epochs())
        with pytest.raises(UserError, match=r"after epoch 2: those before it have other columns"):
            again.log({**row(50.0), "val_agreement": 3.0})
    assert len(metrics(made.folder)) == 1
    with resumed(made.folder) as again:
        log(again, 50.0)
    assert len(metrics(made.folder)) == 2


def test_a_full_disk_is_one_line_and_spares_the_last_checkpoint(workdir, every_epoch):
    with make_run() as made:
        epochs = made.epochs()
        next(epochs)
        made.log(row(40.0))
        next(epochs)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # bytes a file may have
        try:
            with pytest.raises(UserError, match=r"last.pt cannot be written: File too large"):
                made.log(row(35.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert read_weights(made.folder / "last.pt")[1]["provenance"]["epoch"] == 1
        assert len(metrics(made.folder)) == 1
        assert not list(made.folder.glob("*.tmp"))
    # by the end of the block there is room again
    assert read_weights(made.folder / "last.pt")[1]["provenance"]["epoch"] == 2


def test_a_table_that_is_open_in_excel_is_no_reason_to_stop(
    workdir, every_epoch, monkeypatch, capsys
):
    replace, opened = os.replace, [True]

    def refuse(source, target):
        if opened and Path(target).name == "metrics.csv":
            raise PermissionError(errno.EACCES, "used by another process")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    refused = pytest.raises(UserError, match=r"metrics\.csv cannot be written")
    with refused, make_run(run_dir=Path("elsewhere")) as made:
        log(made, 40.0)
    monkeypatch.setattr(run.sys, "platform", "win32")
    with make_run(epochs=2) as made:
        log(made, 40.0)
        assert not (made.folder / "metrics.csv").exists()
        opened.clear()
        log(made, 50.0)
    assert [r["epoch"] for r in metrics(made.folder)] == ["1", "2"]
    assert "metrics.csv cannot be written: used by another" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [UserError, PermissionError])
def test_plots_that_cannot_be_drawn_are_no_reason_to_stop(kind, workdir, every_epoch, capsys):
    def fail(folder: Path) -> None:
        raise kind("the loss is 1e33, too large to be drawn")

    with make_run(on_save=fail, epochs=2) as made:
        log(made, 40.0, 50.0)
        made.finish()
    assert "note: no plots were drawn: the loss is 1e33" in capsys.readouterr().out
    assert len(metrics(made.folder)) == 2


# -------------------------------------------------------------------------------- what is refused


@pytest.fixture
def stopped(workdir) -> Path:
    """The folder of a run that was stopped after an epoch."""
    with make_run(None, {"teacher_sha256": "aaaa"}, run_dir=Path("stopped")) as made:
        log(made, 40.0)
    return made.folder


def test_a_run_is_not_resumed_with_another_teacher(stopped):
    problem = "cannot be resumed with other files: teacher_sha256 was aaaa, is bbbb"
    with pytest.raises(UserError, match=problem):
        resumed(stopped, must_match={"teacher_sha256": "bbbb"})


def test_a_network_that_has_changed_is_named(stopped):
    """The code may have been edited meanwhile."""
    state = {**tiny_state(), "model": torch.nn.Linear(4, 2)}
    reason = r"last\.pt is not the checkpoint of this run: size mismatch for weight: .*2, 3"
    with pytest.raises(UserError, match=reason):
        next(resumed(stopped, state, must_match={"teacher_sha256": "aaaa"}).epochs())


def test_lack_of_memory_is_not_taken_for_a_bad_checkpoint(stopped, monkeypatch):
    """Somebody might delete it."""

    def lack(*args, **flags):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    made = resumed(stopped, must_match={"teacher_sha256": "aaaa"})
    monkeypatch.setattr(made.state["model"], "load_state_dict", lack)
    with pytest.raises(torch.OutOfMemoryError):
        next(made.epochs())
    monkeypatch.setattr(torch, "load", lack)
    with pytest.raises(UserError, match=r"last\.pt cannot be read: too little memory"):
        load(stopped / "last.pt")


@pytest.mark.parametrize("change", ["another run", "an older format", "no history", "ragged"])
def test_a_checkpoint_that_is_not_of_this_run_is_refused(change, stopped):
    saved = load(stopped / "last.pt")
    if change == "another run":
        with make_run() as other:
            log(other, 70.0)
        saved = load(other.folder / "last.pt")
    elif change == "an older format":
        del saved["run_id"]
    elif change == "no history":
        saved["history"] = []
    else:
        saved["history"] = [saved["history"][0], {"epoch": 2}]
    save(stopped / "last.pt", saved)
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with (
        pytest.raises(UserError, match=r"stopped/last\.pt is not the checkpoint of this run"),
        resumed(stopped) as made,
    ):
        log(made, 50.0)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        '"seconds": NaN',
        '"seconds": 1e999',
        '"seconds": [1]',
        '"hardware": 3',
        '"precision": null',
        '"command": "\\u0000"',
        '"command": "\\ud800"',
    ],
)
def test_a_config_that_was_tampered_with_is_refused(change, stopped):
    config = (stopped / "config.json").read_text()
    key = change.split(":")[0]
    changed = re.sub(rf"{key}: [^\n]*[^,\n]", lambda _: change, config)
    assert changed != config
    (stopped / "config.json").write_text(changed)
    with pytest.raises(UserError, match=r"stopped/config\.json is not the config\.json of a run"):
        resumed(stopped)
    assert (stopped / "config.json").read_text() == changed


@pytest.mark.parametrize("lost", ["parts", "run_id"])
def test_a_config_without_what_a_run_needs_is_refused(lost, stopped):
    config = read_config(stopped)
    del config[lost]
    (stopped / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"stopped/config\.json is not the config\.json of a run"):
        resumed(stopped)


@pytest.mark.parametrize("link", [None, "nowhere", "last.pt"])
def test_the_record_of_a_run_without_its_checkpoint_is_not_trained_over(link, stopped):
    """As those in results/ are."""
    (stopped / "last.pt").unlink()
    if link:
        (stopped / "last.pt").symlink_to(link)
    before = (stopped / "metrics.csv").read_bytes()
    with pytest.raises(UserError, match=r"it has epochs, but no last\.pt"):
        resumed(stopped)
    assert (stopped / "metrics.csv").read_bytes() == before


def test_a_config_of_an_older_version_names_its_commit(stopped):
    config = {"kind": "student", "git_commit": "f94fdf4", "args": {}}
    (stopped / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"format 1 of another version.*the commit .*f94fdf4"):
        read_config(stopped)


@pytest.mark.parametrize("name", ["config.json", ".lock", "last.pt"])
def test_a_fifo_is_refused_and_never_waited_for(name, stopped):
    (stopped / name).unlink()
    os.mkfifo(stopped / name)
    with pytest.raises(UserError, match=rf"{name}"), resumed(stopped) as made:
        log(made, 50.0)


def test_nested_json_is_no_traceback(stopped):
    (stopped / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not the config"):
        read_config(stopped)


@pytest.mark.parametrize("another", [True, False])
def test_a_run_whose_folder_is_moved_leaves_the_next_one_alone(another, workdir, every_epoch):
    with (
        pytest.raises(UserError, match="run was moved or removed"),
        make_run(run_dir=Path("run")) as made,
    ):
        epochs = made.epochs()
        next(epochs)
        made.log(row(40.0))
        next(epochs)
        os.rename("run", "old")
        if another:
            with make_run(run_dir=Path("run")) as second:
                log(second, 70.0)
            before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
        made.log(row(50.0))
    assert len(metrics("old")) == 1
    if another:
        assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
    else:
        assert not Path("run").exists()


def test_a_folder_is_for_one_process_at_a_time(workdir):
    made = make_run()
    with pytest.raises(UserError, match=r"runs/student-001 is in use: another process"):
        resumed(made.folder)
    made.lock.close()  # the system does that for a killed process
    resumed(made.folder)


def test_resuming_checks_flags_with_those_of_the_run(tmp_path):
    """--warmup needs --scheduler linear: the run has it, what is typed to resume it has not."""

    def parse(*argv: str):
        parser = flags.Parser("")
        flags.add_optimisation_flags(parser, {"optimizer": "sgd", "scheduler": "multistep"})
        flags.add_run_flags(parser, "student", "out.pth")
        return parse_args(parser, argv, "student")

    args = vars(parse("--scheduler", "linear", "--warmup", "0.2"))
    config = {"name": "student", "format": FORMAT, "args": args}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    again = parse("--resume", str(tmp_path), "--warmup", "0.2")
    assert (again.scheduler, again.warmup) == ("linear", 0.2)


# --------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_run_with_what_is_finished(number, workdir, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, one_line_errors(), make_run() as made:
        log(made, 40.0, 45.0)
        signal.raise_signal(number)
        pytest.fail("the signal was missed")
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err.splitlines()[1:] == [
        "stopped after epoch 2 of 9; resume with",
        f"python {sys.argv[0]} --resume runs/student-001",
    ]
    assert read_weights(made.folder / "last.pt")[1]["provenance"]["epoch"] == 2
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("platform", "quoted"), [("linux", "'the data'"), ("win32", '"the data"')])
def test_a_resumed_run_is_resumed_with_the_same_flags_again(platform, quoted, workdir, monkeypatch):
    """Its data may have moved."""
    with make_run() as made:
        log(made, 40.0)
    monkeypatch.setattr(run.sys, "platform", platform)
    flags = ["--resume", "runs/student-001", "--data_dir", "the data"]
    monkeypatch.setattr(sys, "argv", ["main.py", *flags])
    with pytest.raises(Stopped) as stop, resumed(made.folder):
        signal.raise_signal(signal.SIGTERM)
    command = f"python main.py --resume runs/student-001 --data_dir {quoted}"
    assert str(stop.value).splitlines()[-1] == command


def test_the_terminal_may_be_closed_on_sighup_too():
    assert signal.SIGHUP in STOP_SIGNALS


def test_a_run_under_nohup_outlives_its_terminal(workdir):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with make_run() as made:
            signal.raise_signal(signal.SIGHUP)
            log(made, 40.0)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_signals_at_once_are_one_stop(workdir, monkeypatch):
    """As a logout sends them. Both have arrived before Python looks."""
    lost, both = [], [signal.SIGHUP, signal.SIGTERM]
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    with pytest.raises(Stopped, match="after epoch 2"), make_run() as made:
        log(made, 40.0, 45.0)  # the second one is pending
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        pytest.fail("the signals were missed")
    assert lost == []
    assert len(metrics(made.folder)) == 2


def test_the_same_signal_once_more_ends_the_process_at_once(workdir):
    with make_run() as made:
        with pytest.raises(KeyboardInterrupt) as stop, made.signals.held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it waits for the block to end")
        assert not isinstance(stop.value, Stopped)
        made.signals.received = None


def interrupted_saves(monkeypatch) -> list:
    """Let SIGINT arrive in the first file that is saved from now on; returns what is saved."""
    saved = []

    def save_and_be_interrupted(*args) -> None:
        if not saved:
            signal.raise_signal(signal.SIGINT)
        saved.append(args)
        save(*args)

    monkeypatch.setattr(run, "save", save_and_be_interrupted)
    return saved


def test_a_signal_does_not_cut_into_the_end_of_an_epoch(workdir, monkeypatch, capsys):
    saved = interrupted_saves(monkeypatch)
    with pytest.raises(Stopped, match="after epoch 1"), make_run() as made:
        log(made, 40.0)
    assert len(saved) == 2  # best.pt and last.pt
    assert len(metrics(made.folder)) == 1
    assert "epoch 1/9" in capsys.readouterr().out  # as many as are finished


def test_a_signal_does_not_cut_into_the_last_writing(workdir, monkeypatch):
    with pytest.raises(UserError, match="a broken image"), make_run() as made:
        log(made, 40.0, 50.0)  # the second one is pending
        saved = interrupted_saves(monkeypatch)
        raise UserError("a broken image")
    assert len(saved) == 2
    assert len(metrics(made.folder)) == 2


def test_a_signal_in_the_export_waits_for_the_file(workdir, monkeypatch):
    def save_and_be_interrupted(path: Path, state: dict) -> None:
        signal.raise_signal(signal.SIGINT)
        save(path, state)

    monkeypatch.setattr(run, "save_without_overwriting", save_and_be_interrupted)
    with pytest.raises(Stopped, match="after epoch 1 of 1"), make_run(epochs=1) as made:
        log(made, 40.0)
        made.finish()
    assert read_weights("out.pth")


# ------------------------------------------------------------------------------------- the export


def test_the_end_exports_the_last_epoch_and_says_so(workdir, capsys):
    state, drawn = tiny_state(), []
    with make_run(
        state, output=Path("new/student.pth"), epochs=2, on_save=lambda folder: drawn.append(1)
    ) as made:
        log(made, 70.0, 65.5)
        made.finish()
    said = capsys.readouterr().out
    assert "final  65.50 % on the test set, epoch 2" in said
    assert "best   70.00 %, epoch 1: picked on the test set, only to compare" in said
    assert "saved  new/student.pth" in said
    weights, facts = read_weights("new/student.pth")
    assert torch.equal(weights["weight"], state["model"].weight)
    assert facts["provenance"]["test_accuracy"] == 65.5
    assert len(drawn) == 2  # after the first epoch, and at the end


def test_a_run_without_a_metric_has_no_best_epoch(workdir, capsys):
    with make_run(epochs=1, metric=None) as made:
        next(made.epochs())
        made.log({"train_loss": 1.0})
        made.finish()
    assert not (made.folder / "best.pt").exists()
    assert "best" not in capsys.readouterr().out


def test_what_is_in_the_way_of_the_output_is_kept(workdir, capsys):
    Path("notes.txt").write_text("years of work")
    for _ in range(2):
        with make_run(output=Path("notes.txt"), epochs=1) as made:
            log(made, 70.0)
            made.finish()
            made.finish()  # its own file is replaced
    assert Path("notes.001.txt").read_text() == "years of work"
    provenance = [read_weights(f)[1]["provenance"]["run"] for f in ("notes.002.txt", "notes.txt")]
    assert provenance == ["runs/student-001", "runs/student-002"]
    assert "kept   notes.001.txt, the former notes.txt" in capsys.readouterr().out


def test_runs_of_the_same_second_and_name_are_told_apart(workdir, monkeypatch):
    """From two folders, with one seed and one output: the second one keeps the first one's file."""
    monkeypatch.setattr(folder.time, "strftime", lambda form: "2026-01-01 00:00:00 +0000")
    output = workdir / "out.pth"
    for name in ("a", "b"):
        (workdir / name).mkdir()
        monkeypatch.chdir(workdir / name)
        seed_everything(0)
        with make_run(output=output, epochs=1) as made:
            log(made, 70.0)
            made.finish()
    ids = {read_weights(path)[1]["run_id"] for path in (output, workdir / "out.001.pth")}
    assert len(ids) == 2


# --------------------------------------------------------------------------------- seeds, devices


def test_every_epoch_draws_its_own_numbers_from_the_seed():
    def draw(seed, epoch=0):
        seed_everything(seed, epoch)
        return torch.rand(4).tolist()

    assert draw(0, 3) == draw(0, 3)
    draws = [draw(seed, epoch) for seed in range(3) for epoch in range(4)]
    assert len({tuple(d) for d in draws}) == 12


def test_ranks_share_the_draws_of_the_data_and_not_those_of_dropout(monkeypatch):
    """Imitated: a CPU has one generator for both. Else all GPUs had the same dropout masks."""
    seeds, cpu = [], []
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or cpu.append(n))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda n: seeds.__setitem__(-1, n))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for rank in range(4):
        as_rank(monkeypatch, rank, 4)
        seed_everything(0, 1)
    assert (len(set(seeds)), len(set(cpu))) == (4, 1)


@pytest.mark.parametrize("name", ["cuda:1", "cuda"])
def test_a_gpu_with_a_number_becomes_the_current_one(name, monkeypatch):
    """The number is that of --device or, under torchrun, that of the rank on its machine."""
    if name == "cuda":
        as_rank(monkeypatch, 9, 16)
        monkeypatch.setenv("LOCAL_RANK", "1")
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    precision = torch.get_float32_matmul_precision()
    try:
        device, amp = pick_device(name, "off")
    finally:
        torch.set_float32_matmul_precision(precision)
    assert chosen == [device] == [torch.device("cuda", 1)]
    assert amp is None


# ----------------------------------------------------------------------------------- imports


def test_experiment_imports_nothing_of_the_project_outside_itself():
    root = Path(folder.__file__).parent
    project = {path.stem for path in root.parent.iterdir() if path.suffix == ".py"}
    project |= {path.parent.name for path in root.parent.glob("*/*.py")} - {"experiment"}
    found = set()
    for path in root.glob("*.py"):
        found |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    assert "torch" in found
    assert not found & project
