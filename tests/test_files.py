"""Files are whole or not there, and no network is lost."""

import errno
import json
import os
import stat
from contextlib import nullcontext
from pathlib import Path, PureWindowsPath

import pytest
import torch

from experiment import files
from experiment.errors import UserError
from experiment.files import atomic_write, load, save, save_without_overwriting, write_json


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(workdir):
    path = workdir / "file"
    path.write_text("old")

    def fail():
        with atomic_write(path) as file:
            file.write(b"half of the n")
            raise OSError("disk full")

    with pytest.raises(UserError, match=r"file cannot be written: disk full"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(workdir) == ["file"]
    save(path, {"a": 1})
    assert load(path) == {"a": 1}
    assert os.listdir(workdir) == ["file"]


def test_on_a_full_disk_the_network_that_was_there_stays(workdir, monkeypatch):
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Path("student.pth").write_text("old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"student\.pth cannot be written: No space left"):
        save_without_overwriting(Path("student.pth"), {"a": 1})
    assert Path("student.pth").read_text() == "old"
    assert os.listdir(workdir) == ["student.pth"]


@pytest.mark.parametrize(("platform", "tries"), [("win32", 3), ("linux", 1)])
def test_windows_gets_time_to_close_the_old_file(platform, tries, workdir, monkeypatch):
    """A virus scanner reads what was just written; elsewhere a refusal is one for good."""
    replace, asked, waited = os.replace, [], []

    def refuse(source, target):
        asked.append(target)
        if len(asked) < 3:
            raise PermissionError(errno.EACCES, "used by another process")
        replace(source, target)

    monkeypatch.setattr(files.sys, "platform", platform)
    monkeypatch.setattr(files.os, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", waited.append)
    with nullcontext() if tries == 3 else pytest.raises(UserError, match="used by another process"):
        save(Path("last.pt"), {"a": 1})
    assert (len(asked), waited) == (tries, [0.1, 1][: tries - 1])
    assert os.listdir(workdir) == ["last.pt"] * (tries == 3)


def test_a_file_has_the_permissions_of_any_other(workdir):
    before = os.umask(0o027)
    try:
        save(workdir / "file", {"a": 1})
        assert stat.S_IMODE((workdir / "file").stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_name_of_any_length_and_bytes(workdir):
    for name in (b"x" * 251 + b".pth", b"\xff\xfe.pth"):
        path = Path(os.fsdecode(os.fsencode(workdir) + b"/" + name))
        save(path, {"run": str(path)})
        assert load(path)["run"] == str(path)


def test_what_another_process_writes_meanwhile_is_kept(workdir, monkeypatch):
    path, serialised = workdir / "student.pth", files._serialised

    def be_late(state):
        monkeypatch.setattr(files, "_serialised", serialised)
        save_without_overwriting(path, {"theirs": 1})
        return serialised(state)

    monkeypatch.setattr(files, "_serialised", be_late)
    assert save_without_overwriting(path, {"mine": 1}) == workdir / "student.001.pth"
    assert (load(path), load(workdir / "student.001.pth")) == ({"mine": 1}, {"theirs": 1})


def test_nothing_is_overwritten(workdir):
    path = workdir / "student.pth"
    path.write_text("old")
    path.with_name("student.001.pth").symlink_to("nowhere")
    assert save_without_overwriting(path, {"a": 1}) == workdir / "student.002.pth"
    assert (workdir / "student.002.pth").read_text() == "old"
    assert save_without_overwriting(workdir / "new.pth", {"a": 2}) is None
    assert (load(path), load(workdir / "new.pth")) == ({"a": 1}, {"a": 2})
    assert len(os.listdir(workdir)) == 4


def test_a_folder_in_the_way_stays(workdir):
    (workdir / "student.pth").mkdir()  # made during the training
    with pytest.raises(UserError, match=r"student\.pth is not a regular file"):
        save_without_overwriting(workdir / "student.pth", {"a": 1})
    assert os.listdir(workdir) == ["student.pth"]


def test_other_systems_read_the_paths_of_windows(workdir):
    write_json(Path("config.json"), {"args": {"data_dir": PureWindowsPath("C:\\data", "cifar")}})
    assert json.loads(Path("config.json").read_text()) == {"args": {"data_dir": "C:/data/cifar"}}


def test_a_bit_that_a_disk_has_flipped_is_noticed(workdir):
    """In the middle of the weights, where it makes another network."""
    path = Path("last.pt")
    save(path, {"run_id": "a", "model": {"weight": torch.zeros(1000)}})
    assert load(path)["model"]["weight"].sum() == 0
    content = bytearray(path.read_bytes())
    zeros = content.index(bytes(1000))
    content[zeros + 503] ^= 0x40
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["model"]["weight"].sum() != 0
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        load(path)


def test_a_file_that_may_not_be_read_says_so(workdir, monkeypatch):
    save(Path("last.pt"), {"a": 1})

    def refuse(*args, **flags):  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied", "last.pt")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match=r"last\.pt cannot be read: Permission denied"):
        load("last.pt")


def test_what_has_its_name_is_on_the_disk(workdir, monkeypatch):
    seen = []
    monkeypatch.setattr(files.os, "fsync", lambda number: seen.append(os.listdir(workdir)))
    save(workdir / "file", {"a": 1})
    assert len(seen) == 1
    assert "file" not in seen[0]
