"""Broken and hostile files, made by the hundred: each is taken, or refused with one clear line.

    FUZZ_EXAMPLES=2000 python -m pytest tests/test_fuzz.py    # 2,000 a test instead of 60

Anything else that is raised is a failure, and so is an example that takes more than ten seconds, or
a process that has grown by more than a gigabyte.
"""

import io
import json
import os
import resource
import tempfile
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import log, make_run, row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from test_data import NOISE, encoded

import main_train_cifar10 as student_script
import plots
from data import CLASSES, ImageSet, load_image
from experiment.errors import UserError, one_line_errors
from experiment.files import load
from experiment.folder import FORMAT, check_parts, read_config
from models import load_model
from plots import MARK, PICTURES, plot_run, read_metrics, save_predictions

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 60))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=10_000,  # milliseconds
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
)
SLOW_FUZZ = settings(FUZZ, max_examples=max(20, EXAMPLES // 20))


@pytest.fixture(autouse=True)
def bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1_000_000, "kilobytes"


@st.composite
def mutated(draw, originals: list[bytes]) -> bytes:
    """One of `originals` with a few bytes changed, cut out, repeated or put in."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([1, 1, 2, 4, 16, 256]))
        kind = draw(st.sampled_from(["change", "cut", "repeat", "insert", "end"]))
        if kind == "change":
            content[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "repeat":
            content[at:at] = content[at : at + length]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=length))
        else:
            del content[at:]
    return bytes(content)


# What a hand or a program could put where it does not belong, in JSON and in a checkpoint alike.
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["resnet18", "imagenet", "cifar", "student", "--resume", "-1", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def taken_or_refused(action, *args):
    """The value of `action(*args)`, or None if it was refused for its user to put right."""
    try:
        return action(*args)
    except UserError:
        return None


# ------------------------------------------------------------------------------------------ images


EXIF = Image.Exif()
EXIF[0x0112] = 6
IMAGES = [
    encoded(NOISE, "JPEG"),
    encoded(NOISE, "JPEG", progressive=True, exif=EXIF),
    encoded(NOISE.convert("CMYK"), "JPEG"),
    encoded(NOISE, "PNG", exif=EXIF),
    encoded(NOISE.quantize(), "PNG", transparency=3),
    encoded(NOISE, "PNG", save_all=True, append_images=[NOISE.rotate(90)]),
]


@FUZZ
@given(mutated(IMAGES))
def test_images(tmp_path, content):
    path = tmp_path / "1.jpg"
    path.write_bytes(content)
    image = taken_or_refused(load_image, path)
    assert image is None or (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)


# ------------------------------------------------------------------------------------- checkpoints


def saved(state, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


SMALL = {"arch": "resnet18", "classes": ["a"], "model": {"fc.bias": torch.zeros(2)}, "n": [1, 2.5]}
CHECKPOINTS = [saved(SMALL), saved(SMALL, _use_new_zipfile_serialization=False)]


@FUZZ
@given(mutated(CHECKPOINTS))
def test_damaged_weight_files(tmp_path, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert taken_or_refused(load_model, path) is None  # it lacks nearly all of its tensors


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["arch", "stem", "num_classes", "classes", "model", "conv1.weight", ""]),
        PLAIN | st.just(torch.zeros(3)) | st.just({"fc.bias": torch.zeros(2), "conv1.weight": 3}),
    )
)
def test_weight_files_that_hold_something_else(tmp_path, state):
    torch.save(state, tmp_path / "model.pth")
    assert taken_or_refused(load_model, tmp_path / "model.pth") is None


@pytest.fixture
def stopped(tmp_path) -> tuple[Path, dict, bytes]:
    """The folder of a run that was stopped after an epoch, its last.pt and its config.json."""
    with make_run(run_dir=tmp_path / "run", output=tmp_path / "out.pth") as run:
        log(run, 50.0)
    config = (run.folder / "config.json").read_bytes()
    return run.folder, load(run.folder / "last.pt"), config


@FUZZ
@given(
    st.sampled_from(["model", "optimizer", "scheduler", "history", "run_id"]),
    PLAIN,
    st.none() | st.integers(0, 9),
)
def test_checkpoints_of_a_run_that_hold_something_else(stopped, key, value, place):
    """In place of one of its parts, or of what is at one `place` in that part."""
    folder, good, config = stopped
    part = good[key]
    if place is not None and isinstance(part, dict):
        value = {**part, sorted(part)[place % len(part)]: value}
    elif place is not None:
        value = [value]
    torch.save({**good, key: value}, folder / "last.pt")
    (folder / "config.json").write_bytes(config)
    run = make_run(resume=folder, output=folder.parent / "out.pth")
    epoch = taken_or_refused(next, run.epochs())
    run.lock.close()
    if epoch is not None:
        assert epoch == len(run.history) + 1 == len(read_metrics(folder)["epoch"]) + 1


# -------------------------------------------------------------------------- tables and pictures


COLUMNS = ["epoch", "lr", *row(0), "seconds"]


def table(rows: list[list[float]]) -> bytes:
    return "\n".join([",".join(COLUMNS), *(",".join(map(repr, line)) for line in rows)]).encode()


@FUZZ
@given(mutated([table([[epoch, *[10.0 * epoch] * 7] for epoch in (1, 2, 3)])]))
def test_tables(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    metrics = taken_or_refused(read_metrics, tmp_path)
    assert metrics is None or len({len(column) for column in metrics.values()}) == 1


@pytest.mark.slow
@SLOW_FUZZ
@given(
    st.lists(
        st.lists(st.floats() | st.floats(-1e30, 1e30), min_size=8, max_size=8),
        min_size=1,
        max_size=4,
    )
)
def test_tables_of_any_numbers_can_be_drawn(tmp_path, rows):
    """Without a warning, unless there is a number that says it cannot."""
    (tmp_path / "metrics.csv").write_bytes(table(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = taken_or_refused(plot_run, tmp_path)
    assert (paths is not None) == all(abs(x) < 1e30 for line in rows for x in line)
    for path in paths or ():
        with Image.open(path) as picture:
            assert picture.info["Source"] == MARK


def saved_predictions() -> dict[str, bytes]:
    """What `save_predictions` writes, by file name."""
    images = torch.arange(40 * 3072).view(40, 3, 32, 32).to(torch.uint8)
    logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        test_set = ImageSet(images, torch.arange(40) % 10, CLASSES)
        save_predictions(Path(folder), test_set, logits, logits.flip(1))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


PREDICTIONS = saved_predictions()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PREDICTIONS))
@FUZZ
@given(data=st.data())
def test_predictions(name, tmp_path, monkeypatch, data):
    """The pictures are laid out but not rendered, and the curves left out: both take long."""
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)
    monkeypatch.setattr(plots, "plot_runs", lambda *args: [])
    pictures = dict(zip(("predictions.csv", "mistakes.npz"), PICTURES[2:], strict=True))
    if name in pictures:  # of the other table nothing has changed; the classes are in both
        pictures = {name: pictures[name]}
    for other in ("per_class.csv", *pictures):
        (tmp_path / other).write_bytes(PREDICTIONS[other])
    (tmp_path / name).write_bytes(data.draw(mutated([PREDICTIONS[name]])))
    paths = taken_or_refused(plot_run, tmp_path)
    assert paths is None or [path.name for path in paths] == list(pictures.values())


# ------------------------------------------------------------------------------- configurations


PART = {"from_epoch": 1, "precision": "float32", "hardware": "CPU", "seconds": 61.5}
CONFIG = {
    "name": "student",
    "format": FORMAT,
    "run_id": "0123456789abcdef",
    "teacher_accuracy": 81.5,
    "args": vars(student_script.parse_args([])),
    "parts": [PART],
}


def resumed(folder: Path, capsys) -> Namespace | None:
    """The flags of a run, read again; or None, if one line says why they cannot be."""
    try:
        with one_line_errors():
            args = student_script.parse_args(["--resume", str(folder)])
            check_parts(read_config(folder), folder)
            return args
    except SystemExit as stop:
        line = stop.code if isinstance(stop.code, str) else capsys.readouterr().err
        assert line.startswith("error: ")
        assert len(line.splitlines()) == 1
        return None


@FUZZ
@given(mutated([json.dumps(CONFIG, default=str, indent=2).encode()]))
def test_damaged_configurations(tmp_path, capsys, content):
    (tmp_path / "config.json").write_bytes(content)
    args = resumed(tmp_path, capsys)
    assert args is None or args.resume == tmp_path


@FUZZ
@given(st.sampled_from([*CONFIG, *CONFIG["args"], *PART]), PLAIN)
def test_configurations_that_hold_something_else(tmp_path, capsys, key, value):
    config = {**CONFIG, "args": dict(CONFIG["args"]), "parts": [dict(PART)]}
    owner = next(owner for owner in (config, config["args"], config["parts"][0]) if key in owner)
    owner[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    args = resumed(tmp_path, capsys)
    if args is not None and key not in CONFIG["args"]:
        assert key == "args" or vars(args) == {**CONFIG["args"], "resume": tmp_path}
