"""Broken and hostile files, made by the hundred: each is taken, or refused with one clear line.

    FUZZ_EXAMPLES=2000 python -m pytest tests/test_fuzz.py    # 2,000 a test instead of 60

Anything else that is raised is a failure, and so is an example that takes more than ten seconds, or
a process that has grown by more than a gigabyte.
"""

import csv
import io
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import NOISE, encoded
from test_experiment import checkpoint, flags, parts, row

import main_train_cifar10 as student_script
from data import load_image
from experiment import Run, UserError, one_line_errors, read_config
from models import load_model
from plots import plot_run, read_metrics

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


@FUZZ
@given(st.sampled_from(["model", "optimizer", "scheduler", "history"]), PLAIN, st.booleans())
def test_checkpoints_of_a_run_that_hold_something_else(tmp_path, key, value, inside):
    model, optimizer, scheduler = parts()
    good = {
        **checkpoint(model),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "history": [row(1, 50.0)],
    }
    if inside and isinstance(good[key], dict):
        good[key] = {**good[key], sorted(good[key])[0]: value}
    else:
        good[key] = [value] if inside else value
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"kind": "student", "args": {}}')
    torch.save(good, folder / "last.pt")
    with Run(flags(resume=folder, output=tmp_path / "out.pth"), "student", {}) as run:
        epoch = taken_or_refused(run.restore, model, optimizer, scheduler)
        assert epoch is None or len(read_metrics(folder)["epoch"]) == epoch - 1 == len(run.history)


# -------------------------------------------------------------------------- tables, configurations


def table() -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, row(1, 0))
    writer.writeheader()
    writer.writerows(row(epoch, 10.0 * epoch) for epoch in (1, 2, 3))
    return text.getvalue().encode()


@FUZZ
@given(mutated([table()]))
def test_tables(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    metrics = taken_or_refused(read_metrics, tmp_path)
    assert metrics is None or len({len(column) for column in metrics.values()}) == 1


@SLOW_FUZZ
@given(st.lists(st.lists(st.floats(), min_size=8, max_size=8), min_size=1, max_size=4))
def test_tables_of_any_numbers_can_be_drawn(tmp_path, rows):
    lines = [",".join(row(1, 0)), *(",".join(map(repr, values)) for values in rows)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    taken_or_refused(plot_run, tmp_path)


CONFIG = {
    "kind": "student",
    "teacher_accuracy": 81.5,
    "args": vars(student_script.parse_args([])),
}


def resumed(folder: Path, capsys) -> None:
    """Reading the flags of a run again: they come back, or one line is said."""
    try:
        with one_line_errors():
            read_config(folder)
            student_script.parse_args(["--resume", str(folder)])
    except SystemExit as stop:
        line = stop.code if isinstance(stop.code, str) else capsys.readouterr().err
        assert line.startswith("error: ")
        assert len(line.splitlines()) == 1


@FUZZ
@given(mutated([json.dumps(CONFIG, default=str, indent=2).encode()]))
def test_damaged_configurations(tmp_path, capsys, content):
    (tmp_path / "config.json").write_bytes(content)
    resumed(tmp_path, capsys)


@FUZZ
@given(st.sampled_from([*CONFIG, *CONFIG["args"]]), PLAIN)
def test_configurations_that_hold_something_else(tmp_path, capsys, key, value):
    config = {**CONFIG, "args": dict(CONFIG["args"])}
    (config if key in config else config["args"])[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    resumed(tmp_path, capsys)
