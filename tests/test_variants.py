"""synthetic_data/variants.py, on made images."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, snapshot
from PIL import Image

from data import CLASSES, DeviceLoader, ImageSet, load_cifake
from engine import predict
from experiment.files import save
from models import build_model, load_model, to_checkpoint
from synthetic_data import variants


@pytest.fixture
def source(workdir, cifake) -> Path:
    """The made CIFAKE, and a teacher that takes each image for an airplane or an automobile."""
    torch.manual_seed(0)
    teacher = build_model("wrn_16_1")
    with torch.no_grad():
        teacher.fc.bias[2:] -= 1e6
    save(Path("teacher.pth"), to_checkpoint(teacher, CLASSES))
    return cifake


def make(source: Path, kind: str, folder: str, *more: str) -> None:
    argv = [kind, folder, "--synthetic_data_dir", str(source), *more]
    variants.main(variants.parse_args(argv))


def test_a_subset_is_drawn_with_seed_0_and_copied_bit_for_bit(source):
    for folder in ("one", "sub/two"):
        make(source, "subset", folder, "--count", "15")
    names = sorted(path.name for path in Path("one").iterdir())
    assert len(names) == 15
    assert names == sorted(path.name for path in Path("sub/two").iterdir())
    for name in names:
        assert Path("one", name).read_bytes() == (source / name).read_bytes()


def test_disputed_images_and_as_many_of_each_class_of_all(source):
    given = ("--teacher_weights", "teacher.pth")
    make(source, "disputed", "disputed", *given)
    make(source, "undivided", "undivided", *given)
    disputed, undivided = load_cifake("disputed"), load_cifake("undivided")
    assert (disputed.labels >= 2).sum() == 32  # no image of another class is agreed on
    counts = [torch.bincount(part.labels, minlength=10) for part in (disputed, undivided)]
    assert torch.equal(*counts)


def test_what_agreed_and_matched_images_have_in_common_with_disputed_ones():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (2000,), generator=generator)
    noise = torch.randint(10, (2000,), generator=generator)
    predicted = torch.where(torch.rand(2000, generator=generator) < 0.3, noise // 2, labels)
    disputed = predicted != labels
    images = ImageSet(torch.zeros(2000, 3, 32, 32, dtype=torch.uint8), labels, CLASSES)
    for kind, classes in (("agreed", labels), ("matched", predicted)):
        chosen = variants.choose(images, predicted, Namespace(kind=kind))
        assert len(chosen.unique()) == len(chosen) == disputed.sum()
        assert not disputed[chosen].any()
        counts = [torch.bincount(classes[part], minlength=10) for part in (chosen, disputed)]
        assert torch.equal(*counts)


def test_renamed_images_have_the_classes_of_the_teacher(source):
    before, teacher = load_cifake(source), load_model("teacher.pth")
    loader = DeviceLoader(before, 40, "cpu", train=False)
    with torch.no_grad():
        teacher.fc.bias -= predict(teacher, loader).median(0).values  # it sees several classes
    save(Path("teacher.pth"), to_checkpoint(teacher, CLASSES))
    make(source, "renamed", "renamed", "--teacher_weights", "teacher.pth")
    after = load_cifake("renamed")
    assert torch.equal(before.images, after.images)  # in the same order
    assert torch.equal(after.labels, predict(teacher, loader).argmax(1))
    assert len(after.labels.unique()) > 2


@pytest.mark.parametrize(("kind", "flag", "suffix"), [("blur", 2, ".png"), ("jpeg", 5, ".jpg")])
def test_spoilt_images_keep_their_classes(kind, flag, suffix, source):
    make(source, kind, "spoilt", "--radius" if kind == "blur" else "--quality", str(flag))
    before, after = load_cifake(source), load_cifake("spoilt")
    assert torch.equal(before.labels.sort().values, after.labels.sort().values)
    assert {path.suffix for path in Path("spoilt").iterdir()} == {suffix}
    name = next(Path("spoilt").iterdir()).stem
    edges = [
        np.diff(np.asarray(Image.open(path).convert("L"), np.float32))
        for path in (source / f"{name}.jpg", Path("spoilt", name + suffix))
    ]
    assert abs(edges[1]).mean() < 0.6 * abs(edges[0]).mean()  # noise has lost its detail


@pytest.mark.parametrize(
    ("kind", "flags", "code", "message"),
    [
        ("subset", ["--count", "41"], 1, "--count 41: there are 40 images"),
        ("subset", ["--quality", "6"], 2, "--quality needs KIND jpeg"),
        ("jpeg", ["--teacher_weights", "x.pth"], 2, "--teacher_weights needs KIND disputed"),
        ("agreed", ["--teacher_weights", "teacher.pth"], 1, "images are disputed than agreed with"),
        ("disputed", ["--teacher_weights", "x.pth"], 1, "there is no weight file x.pth"),
        ("disputed", ["--synthetic_data_dir", "no"], 1, "there is no folder no"),
    ],
)
def test_bad_input(kind, flags, code, message, source, workdir, capsys):
    before = snapshot(workdir)
    argv = [kind, "new", "--synthetic_data_dir", source, *flags]
    found, text = fails(variants, argv, capsys)
    assert (found, message in text) == (code, True), text
    assert snapshot(workdir) == before


@pytest.mark.parametrize("kind", ["disputed", "renamed"])
def test_a_plain_state_dict_of_other_classes_is_refused(kind, source, capsys):
    save(Path("hundred.pth"), build_model("wrn_16_1", num_classes=100).state_dict())
    argv = [kind, "new", "--synthetic_data_dir", source, "--teacher_weights", "hundred.pth"]
    code, text = fails(variants, argv, capsys)
    assert (code, "100" in text, Path("new").exists()) == (1, True, False), text


def test_what_is_there_is_not_touched(source, workdir, capsys):
    """Nor is what looks like a folder of our own, or the images to choose from."""
    Path("folder").mkdir()
    Path("file").write_text("mine")
    Path("link").symlink_to("nothing")
    os.mkfifo("fifo")
    before = snapshot(workdir)
    for name in ("folder", "file", "link", "fifo", "/dev/null", source):
        argv = ["subset", name, "--count", "3", "--synthetic_data_dir", source]
        assert fails(variants, argv, capsys) == (1, f"error: {name} exists: name a new folder")
    for name, message in (
        ("file/new", "file"),
        (source / "new", "is among the images to choose from: name another folder"),
    ):
        argv = ["subset", name, "--count", "3", "--synthetic_data_dir", source]
        code, text = fails(variants, argv, capsys)
        assert (code, message in text) == (1, True), text
    assert snapshot(workdir) == before
    make(source, "subset", "new", "--count", "3")
    shutil.rmtree("new")
    assert snapshot(workdir) == before


def test_a_variant_appears_whole_or_not_at_all(source, workdir, monkeypatch, capsys):
    before, written = snapshot(workdir), []

    def full(*args):
        written.append(args)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(variants, "write", full)
    argv = ["subset", "new", "--count", "9", "--synthetic_data_dir", source]
    assert "No space left on device" in fails(variants, argv, capsys)[1]
    assert snapshot(workdir) == before
