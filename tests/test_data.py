import hashlib
import io
import os
import pickle
import re
import shutil
import struct
import sys
import zlib
from dataclasses import replace
from http.client import BadStatusLine
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import as_rank, random_images
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as F

import augmentations
import data
from data import (
    DeviceLoader,
    ImageSet,
    cifake_label,
    load_cifake,
    load_cifar10,
    load_cifar100,
    load_class_folders,
    load_image,
    normalize,
)
from experiment.device import MEMORY_FORMAT
from experiment.errors import UserError
from synthetic_data.demo_images import draw, load_demo
from synthetic_data.download import download_cifake
from synthetic_data.shifts import with_shifted_copies


def made_set(n: int) -> ImageSet:
    return ImageSet(random_images(n), torch.arange(n), data.CLASSES)


# ----------------------------------------------------------------------------------------- CIFAKE


def test_names_give_the_classes():
    assert cifake_label("folder/1000.jpg") == 0
    assert [cifake_label(f"1000 ({k}).jpg") for k in range(2, 11)] == list(range(1, 10))
    assert [cifake_label(name) for name in ("0.JPEG", "12 (3).Png", "007 (10).jpg")] == [0, 2, 9]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "cat.jpg",
            "1000(2).jpg",
            "1000 (2) (3).jpg",
            "(2).jpg",
            "\u0661 (2).jpg",
            "1000  (2).jpg",
        ),
        *("1000 (1).jpg", "1000 (11).jpg", "1000 (0).jpg", "1000 (04).jpg", "1000 (\u0664).jpg"),
        *("1000.kitten.jpg", "1000 (3).backup.png", "1000.jpg.jpg", "1000.", "1000", "1000.jpg\n"),
        *("1000.gif", "1000.txt", ".jpg", "-1.jpg", "1e3.jpg"),
    ],
)
def test_a_name_that_does_not_parse_is_refused(name, cifake):
    with pytest.raises(UserError, match=r"not named 'NNNN\.jpg', or 'NNNN \(k\)\.jpg' with"):
        cifake_label(name)
    (cifake / "1000.jpg").rename(cifake / name)
    if not name.startswith("."):  # which is hidden
        with pytest.raises(UserError) as stop:
            load_cifake(cifake)
        assert str(stop.value).startswith(f"{cifake / name}: not named ")


def test_the_folder_of_a_set_is_not_the_one_of_its_images(cifake):
    (cifake / "manifest.csv").touch()
    with pytest.raises(UserError, match=f"its images are in {cifake}/images"):
        load_cifake(cifake)


def test_a_name_that_comes_twice_is_refused(cifake):
    for name in ("1000 (2).JPEG", "1000 (2).png", "1000 (2).JPG"):
        (cifake / name).write_bytes((cifake / "1000 (2).jpg").read_bytes())
        with pytest.raises(UserError, match=r"1000 \(2\)\.\w+: another file has this name"):
            load_cifake(cifake)
        (cifake / name).unlink()


def test_a_folder_loads_sorted_and_labelled(cifake):
    loaded = load_cifake(cifake)
    names = sorted(path.name for path in cifake.iterdir())
    assert loaded.images.shape == (40, 3, 32, 32)
    assert loaded.images.dtype == torch.uint8
    assert loaded.labels.tolist() == [cifake_label(name) for name in names]
    assert loaded.labels.unique().tolist() == list(range(10))
    assert loaded.classes == data.CLASSES
    for image, name in zip(loaded.images, names, strict=True):
        with Image.open(cifake / name) as picture:
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(picture))


def test_a_limit_takes_the_first_by_name(cifake):
    whole, part = load_cifake(cifake), load_cifake(cifake, limit=7)
    assert torch.equal(part.images, whole.images[:7])
    assert torch.equal(part.labels, whole.labels[:7])


def test_every_extension_size_and_mode_is_taken(tmp_path):
    red, grey = (200, 40, 40), (90, 90, 90)
    Image.new("RGB", (32, 32), red).save(tmp_path / "1.png")
    Image.new("RGB", (48, 64), red).save(tmp_path / "2.JPG", quality=100)
    Image.new("RGB", (8, 8), red).save(tmp_path / "3 (2).JpEg", quality=100)
    Image.new("L", (32, 32), 90).save(tmp_path / "4.jpg", quality=100)
    Image.new("RGBA", (32, 32), (*red, 128)).save(tmp_path / "5.PNG")
    Image.new("RGB", (32, 32), red).quantize().save(tmp_path / "6.png")
    Image.new("RGB", (32, 32), red).convert("CMYK").save(tmp_path / "7.jpg", quality=100)
    Image.new("RGB", (1, 1), red).save(tmp_path / "8.png")
    Image.new("RGB", (5000, 1), red).save(tmp_path / "9.png")
    Image.new("RGB", (32, 32), red).save(tmp_path / "10.jpg", format="png")  # misnamed, and clear
    os.symlink(tmp_path / "1.png", tmp_path / "11.png")
    (tmp_path / ".DS_Store").write_bytes(b"hidden files are passed over")

    loaded = load_cifake(tmp_path)
    names = "1.png 10.jpg 11.png 2.JPG 3 4.jpg 5.PNG 6.png 7.jpg 8.png 9.png".split()
    assert loaded.labels.tolist() == [int(name == "3") for name in names]
    for name, image in zip(names, loaded.images, strict=True):
        colour = torch.tensor(grey if name == "4.jpg" else red).view(3, 1, 1)
        assert (image.int() - colour).abs().max() <= 3, name


def test_another_size_is_resized_as_pillow_does(tmp_path):
    """With antialiasing: without, an image of 512x512 would be one pixel in 256 of it."""
    NOISE.resize((300, 200)).save(tmp_path / "large.png")
    NOISE.crop((0, 0, 20, 12)).save(tmp_path / "small.png")
    for name in ("large.png", "small.png"):
        with Image.open(tmp_path / name) as picture:
            theirs = np.array(picture.resize((32, 32), Image.Resampling.BILINEAR), np.int32)
        ours = load_image(tmp_path / name).permute(1, 2, 0).numpy().astype(np.int32)
        assert abs(ours - theirs).max() <= 1, name


def test_a_camera_that_was_turned_is_followed(tmp_path):
    picture = Image.new("RGB", (32, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 16))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # the row that comes first is the right-hand side
    picture.save(tmp_path / "1.png", exif=exif)
    image = load_image(tmp_path / "1.png")
    assert image[:, :, 16:].min() == 255
    assert image[:, :, :16].max() == 0


def png(width: int, height: int, depth: int, pixels: bytes) -> bytes:
    """A PNG in RGB, of whatever its head claims."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
DEEP = Image.fromarray(np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32))
HUGE_JPEG = re.sub(b"(?s)(?<=\xff\xc0...).{4}", b"\xff" * 4, encoded(NOISE, "JPEG"))
BAD_IMAGES = {
    "empty": (b"", "not an image that can be read"),
    "text": (b"kitten", "not an image that can be read"),
    "a JPEG cut short": (encoded(NOISE, "JPEG")[:-200], "not an image that can be read"),
    "a PNG cut short": (encoded(NOISE, "PNG")[:-200], "not an image that can be read"),
    "a head alone": (encoded(NOISE, "PNG")[:60], "not an image that can be read"),
    "another format": (encoded(NOISE, "GIF"), "not an image that can be read"),
    "16 bits, grey": (encoded(DEEP, "PNG"), "not an image of 8 bits a channel"),
    "16 bits, colour": (png(32, 32, 16, (b"\0" + b"\1\2" * 96) * 32), "not an image of 8 bits"),
    "moving": (
        encoded(NOISE, "PNG", save_all=True, append_images=[NOISE.rotate(90)]),
        "not a still image",
    ),
    "100 megapixels": (png(10_000, 10_000, 8, b""), "too many pixels"),
    "3.6 gigapixels": (png(60_000, 60_000, 8, b""), "Image size (3600000000 pixels) exceeds"),
    "4.3 gigapixels": (HUGE_JPEG, "Image size (4294836225 pixels) exceeds"),
}


def test_a_side_of_160_pixels_is_no_depth_of_16_bits(tmp_path):
    Image.new("RGB", (160, 116)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").shape == (3, 32, 32)


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_named(name, cifake, capfd, recwarn):
    content, message = BAD_IMAGES[name]
    path = cifake / "1002 (3).jpg"
    path.write_bytes(content)
    with pytest.raises(UserError) as stop:
        load_cifake(cifake)
    assert str(stop.value).startswith(f"{path}: {message}")
    assert len(load_cifake(cifake, limit=5)) == 5  # beyond the limit it is not opened
    assert (capfd.readouterr(), len(recwarn)) == (("", ""), 0)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_too_little_memory_is_no_broken_image(error, cifake, monkeypatch):
    """Somebody might delete the image."""

    def array(picture):
        raise error

    monkeypatch.setattr(data.np, "array", array)
    with pytest.raises(UserError, match=r"\.jpg: too little memory to read it$"):
        load_image(cifake / "1002 (3).jpg")


NO_FILES = {
    "folder": lambda path: path.mkdir(),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "circular link": lambda path: path.symlink_to(path.name),
    "FIFO": os.mkfifo,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_regular_file_is_named_and_never_waited_for(kind, cifake):
    NO_FILES[kind](cifake / "2000.jpg")
    with pytest.raises(UserError, match=r"2000.jpg: not a regular file"):
        load_cifake(cifake)
    assert len(load_cifake(cifake, limit=40)) == 40  # its name is enough


def test_a_picture_that_is_not_there_is_told_from_a_bad_one(tmp_path):
    with pytest.raises(UserError, match=r"picture.jpg: no such file"):
        load_image(tmp_path / "picture.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read_is_named(cifake):
    (cifake / "2000.jpg").touch(mode=0)
    with pytest.raises(UserError, match=r"2000.jpg: Permission denied"):
        load_cifake(cifake)


def test_a_name_that_is_no_text_is_refused(cifake):
    open(os.fsencode(cifake) + b"/10\n\xff.jpg", "wb").close()
    with pytest.raises(UserError, match=r"not named 'NNNN\.jpg'"):
        load_cifake(cifake)


def test_a_missing_or_empty_folder_tells_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(
            UserError, match=f"kaggle.com.*train/FAKE.*{name}.*--download_synthetic"
        ):
            load_cifake(tmp_path / name)


def test_cifake_is_laid_out_from_the_download(cifake, tmp_path, monkeypatch):
    shutil.copytree(cifake, tmp_path / "cache" / "train" / "FAKE")
    asked = []

    def dataset_download(handle):
        asked.append(handle)
        return str(tmp_path / "cache")

    monkeypatch.setitem(
        sys.modules, "kagglehub", SimpleNamespace(dataset_download=dataset_download)
    )
    place = tmp_path / "synthetic_data"
    place.mkdir()
    (place / "notes").write_text("mine")
    download_cifake(place / "images")
    download_cifake(place / "images")  # it is there now: not fetched again
    assert asked == ["birdy654/cifake-real-and-ai-generated-synthetic-images"]
    assert torch.equal(load_cifake(place / "images").images, load_cifake(cifake).images)
    assert (place / "notes").read_text() == "mine"
    assert sorted(path.name for path in place.iterdir()) == ["images", "notes"]

    (tmp_path / "disk" / "images").mkdir(parents=True)
    (place / "link").symlink_to(tmp_path / "disk" / "images")
    download_cifake(place / "link")
    assert len(load_cifake(tmp_path / "disk" / "images")) == 40


def test_a_layout_that_is_interrupted_leaves_nothing(cifake, tmp_path, monkeypatch):
    shutil.copytree(cifake, tmp_path / "cache" / "train" / "FAKE")
    fake = SimpleNamespace(dataset_download=lambda handle: str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "kagglehub", fake)

    def full(source, target):
        target.mkdir()
        (target / "1000.jpg").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="No space"):
        download_cifake(tmp_path / "place" / "images")
    assert not list((tmp_path / "place").iterdir())


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_download_that_holds_more_than_images_is_refused(kind, cifake, tmp_path, monkeypatch):
    """What an archive could do: a member that is a link to a file outside."""
    secret = tmp_path / "secret.jpg"
    secret.write_text("not for the training set")
    shutil.copytree(cifake, tmp_path / "cache" / "train" / "FAKE")
    member = tmp_path / "cache" / "train" / "FAKE" / "5000.jpg"
    member.symlink_to(secret) if kind == "link" else member.mkdir()
    fake = SimpleNamespace(dataset_download=lambda handle: str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "kagglehub", fake)
    with pytest.raises(UserError, match=r"5000.jpg is not a plain file"):
        download_cifake(tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_download_does_not_touch_hidden_files(tmp_path):
    (tmp_path / ".DS_Store").touch()
    with pytest.raises(UserError, match="holds only hidden files"):
        download_cifake(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".DS_Store"]


def test_a_download_that_fails_tells_the_steps_by_hand(tmp_path, monkeypatch):
    def offline(handle):
        raise ConnectionError("no network")

    for module in (None, SimpleNamespace(dataset_download=offline)):  # None: not installed
        monkeypatch.setitem(sys.modules, "kagglehub", module)
        with pytest.raises(
            UserError, match=r"pip install kagglehub.* by hand, download https://www.kaggle.*cifake"
        ):
            download_cifake(tmp_path / "cifake")
        assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------- folders of CIFAR-100


@pytest.fixture
def class_folders(tmp_path):
    """Six pictures of one shade in each of the folders a and b: 10 to 15, and 20 to 25."""
    for number, name in enumerate("ab", start=1):
        (tmp_path / "folders" / name).mkdir(parents=True)
        for k in range(6):
            picture = Image.new("RGB", (32, 32), (10 * number + k,) * 3)
            picture.save(tmp_path / "folders" / name / f"{k}.png")
    return tmp_path / "folders"


def test_class_folders_are_interleaved(class_folders):
    """The first images, which whiten a first layer and which --limit takes, are of all classes."""
    (class_folders / ".DS_Store").touch()
    (class_folders / "a" / ".hidden").touch()
    (class_folders / "a" / "3.png").unlink()
    images = load_class_folders(class_folders, ("b", "a"))
    assert images.labels.tolist() == [0, 1] * 5 + [0]
    pixels = [20, 10, 21, 11, 22, 12, 23, 14, 24, 15, 25]  # of a, the fourth is missing
    assert images.images[:, 0, 0, 0].tolist() == pixels
    assert images.classes == ("b", "a")


def test_a_limit_takes_the_first_of_the_class_folders(class_folders):
    images = load_class_folders(class_folders, ("a", "b"), limit=5)
    assert images.labels.tolist() == [0, 1, 0, 1, 0]
    assert images.images[:, 0, 0, 0].tolist() == [10, 20, 11, 21, 12]
    assert len(load_class_folders(class_folders, ("a", "b"), limit=99)) == 12


def test_a_class_folder_that_is_missing_empty_or_strange_is_named(class_folders):
    def refused(name):
        with pytest.raises(UserError) as stop:
            load_class_folders(class_folders, ("a", "b", "c"))
        assert str(stop.value) == (
            f"{class_folders / name}: every class needs a folder with images, and nothing else "
            "belongs there"
        )

    refused("c")
    (class_folders / "c").mkdir()
    refused("c")
    (class_folders / "c").rmdir()
    (class_folders / "c").touch()
    refused("c")
    (class_folders / "c").unlink()
    shutil.copytree(class_folders / "a", class_folders / "c")
    (class_folders / "B").mkdir()
    refused("B")


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_regular_file_among_classes_is_named(kind, class_folders):
    NO_FILES[kind](class_folders / "b" / "9.png")
    with pytest.raises(UserError, match=r"b/9.png: not a regular file"):
        load_class_folders(class_folders, ("a", "b"))


# --------------------------------------------------------------------------------------- CIFAR-10


def test_the_binary_version_is_read_in_order(cifar10_binary):
    train, test = (
        load_cifar10(cifar10_binary, train=True),
        load_cifar10(cifar10_binary, train=False),
    )
    assert (len(train), len(test)) == (100, 20)
    assert train.labels.tolist() == list(range(10)) * 10
    record = (cifar10_binary / "cifar-10-batches-bin" / "data_batch_2.bin").read_bytes()[:3073]
    pixels = np.frombuffer(record[1:], np.uint8).reshape(3, 32, 32)
    assert np.array_equal(train.images[20].numpy(), pixels)
    assert record[0] == train.labels[20]
    assert train.sha256() != test.sha256()


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "missing", "FIFO"])
def test_a_damaged_binary_file_is_named(damage, cifar10_binary):
    path = cifar10_binary / "cifar-10-batches-bin" / "data_batch_3.bin"
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.unlink()
    if damage == "FIFO":
        os.mkfifo(path)
    elif damage != "missing":
        path.write_bytes(content if damage == "flipped byte" else content[:-1])
    with pytest.raises(UserError, match=r"data_batch_3\.bin is missing, or not the original file"):
        load_cifar10(cifar10_binary, train=True)
    assert len(load_cifar10(cifar10_binary, train=False)) == 20  # the others are none the worse


def test_the_python_version_gives_the_same_images(cifar10_binary, tmp_path, monkeypatch):
    folder = tmp_path / "python" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    checksums = {}
    for binary in (cifar10_binary / "cifar-10-batches-bin").iterdir():
        records = np.frombuffer(binary.read_bytes(), np.uint8).reshape(-1, 3073)
        batch = {"data": records[:, 1:].copy(), "labels": records[:, 0].tolist()}
        (folder / binary.stem).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(data.CLASSES)}))
    checksums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    batches = [[f"data_batch_{i}", checksums[f"data_batch_{i}"]] for i in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", batches)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": checksums["batches.meta"]})

    for train in (True, False):
        binary, python = load_cifar10(cifar10_binary, train), load_cifar10(folder.parent, train)
        assert torch.equal(binary.images, python.images)
        assert torch.equal(binary.labels, python.labels)

    (folder / "data_batch_4").write_bytes(b"something else")
    with pytest.raises(UserError, match="data_batch_4 is missing, or not the original file"):
        load_cifar10(folder.parent, train=True)
    assert (folder / "data_batch_4").read_bytes() == b"something else"


@pytest.mark.parametrize("error", [OSError("no network"), BadStatusLine("no network")])
def test_a_download_of_cifar10_that_fails_is_said(error, tmp_path, monkeypatch):
    def offline(self):
        raise error

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(UserError, match=r"CIFAR-10 is neither in .* failed: no network.*demo"):
        load_cifar10(tmp_path, train=True)


def test_cifar100_has_its_fine_classes(cifar100):
    train, test = load_cifar100(cifar100, train=True), load_cifar100(cifar100, train=False)
    assert train.images.shape == (200, 3, 32, 32)
    assert test.labels.tolist() == list(range(100))
    assert test.classes == tuple(f"kind_{i:02d}" for i in range(100))
    (cifar100 / "cifar-100-python" / "test").write_bytes(b"something else")
    with pytest.raises(UserError, match="test is missing, or not the original file of CIFAR"):
        load_cifar100(cifar100, train=False)


# ---------------------------------------------------------------------------------------- batches


def test_normalize_is_torchvisions():
    images = made_set(8).images
    ours = normalize(images)
    theirs = F.normalize(
        F.to_dtype(images, torch.float32, scale=True), data.CIFAR10_MEAN, data.CIFAR10_STD
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert ours.is_contiguous(memory_format=MEMORY_FORMAT)
    assert images.dtype == torch.uint8  # and it is left alone
    known = [(0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)]  # in many papers' code
    assert np.allclose([data.CIFAR10_MEAN, data.CIFAR10_STD], known, atol=1e-4)


def test_test_batches_are_all_the_images_in_order():
    images = made_set(23)
    batches = list(DeviceLoader(images, 10, "cpu", train=False))
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(23))
    assert torch.equal(torch.cat([batch for batch, _ in batches]), normalize(images.images))


def test_training_batches_are_full_shuffled_and_drawn_from_the_seed():
    images = made_set(50)
    loader = DeviceLoader(images, 16, "cpu", train=True)

    def epoch(seed):
        torch.manual_seed(seed)
        batches = list(loader)
        assert (
            [batch.shape for batch, _ in batches]
            == [(16, 3, 32, 32)] * 3
            == [(16, 3, 32, 32)] * len(loader)
        )
        return torch.cat([batch for batch, _ in batches]), torch.cat(
            [labels for _, labels in batches]
        )

    (views, labels), (again, labels_again), (other, other_labels) = epoch(1), epoch(1), epoch(2)
    assert torch.equal(views, again)
    assert torch.equal(labels, labels_again)
    assert len(set(labels.tolist())) == 48  # no image twice
    assert labels.tolist() != other_labels.tolist()
    assert not torch.equal(views, other)


def test_every_crop_and_both_flips_come_up():
    images = coordinates(1).images.expand(2000, 3, 32, 32)
    images = ImageSet(images, torch.zeros(2000, dtype=torch.int64), ("x",))
    torch.manual_seed(0)
    ((views, _),) = DeviceLoader(images, 2000, "cpu", train=True)
    views = pixels(views)
    falling = views[:, 1, 16, 15] > views[:, 1, 16, 16]
    corners = {tuple(corner) for corner in views[~falling, :2, 16, 16].tolist()}
    assert corners == {(y, x) for y in range(13, 22) for x in range(13, 22)}
    assert 0.45 < falling.float().mean() < 0.55


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="--batch_size 51 is more than the 50 training images"):
        DeviceLoader(made_set(50), 51, "cpu", train=True)
    assert len(DeviceLoader(made_set(50), 51, "cpu", train=False)) == 1


# A picture of its own coordinates tells which part of it was taken, and its third channel which
# picture it was.
def coordinates(n: int) -> ImageSet:
    y, x = torch.meshgrid(torch.arange(1, 33), torch.arange(1, 33), indexing="ij")
    images = torch.stack([torch.stack([y, x, torch.full_like(x, i)]) for i in range(n)])
    return ImageSet(images.to(torch.uint8), torch.arange(n), tuple(map(str, range(n))))


def pixels(views: torch.Tensor) -> torch.Tensor:
    std, mean = (
        torch.tensor(values).view(3, 1, 1) for values in (data.CIFAR10_STD, data.CIFAR10_MEAN)
    )
    return ((views * std + mean) * 255).round().int()


def test_alternating_flips_show_each_image_once_mirrored_in_two_epochs():
    loader = DeviceLoader(coordinates(60), 20, "cpu", train=True, augment="reflect", seed=3)

    def mirrored(epoch: int) -> dict[int, bool]:
        torch.manual_seed(epoch)
        loader.epoch = epoch
        views = pixels(torch.cat([images for images, _ in loader]))
        falling = views[:, 1, 16, 16] < views[:, 1, 16, 15]
        return dict(zip(views[:, 2, 16, 16].tolist(), falling.tolist(), strict=True))

    first, second, third, again = (mirrored(epoch) for epoch in (1, 2, 3, 2))
    assert len(first) == 60
    assert all(first[i] != second[i] and first[i] == third[i] for i in range(60))
    assert second == again
    assert 15 < sum(first.values()) < 45  # a coin for each image
    loader.seed = 4
    assert mirrored(1) != first


def test_reflected_crops_reach_two_pixels_and_show_no_border():
    torch.manual_seed(0)
    ((views, _),) = DeviceLoader(coordinates(600), 600, "cpu", train=True, augment="reflect")
    views = pixels(views)
    falling = views[:, 1, 16, 15] > views[:, 1, 16, 16]
    corners = {tuple(corner) for corner in views[~falling, :2, 16, 16].tolist()}
    assert corners == {(y, x) for y in range(15, 20) for x in range(15, 20)}
    assert views.min(dim=3)[0].min(dim=2)[0][:, :2].min() == 1  # zeros would be a border


@pytest.mark.parametrize("augment", augmentations.AUGMENTATIONS)
def test_two_ranks_see_together_what_one_sees(augment, monkeypatch):
    images = made_set(50)
    images = ImageSet(images.images, images.labels % 10, data.CLASSES)

    def epoch(rank, ranks):
        as_rank(monkeypatch, rank, ranks)
        loader = DeviceLoader(images, 16, "cpu", train=True, augment=augment)
        loader.epoch = 7
        torch.manual_seed(7)
        return list(loader)

    whole, left, right = epoch(0, 1), epoch(0, 2), epoch(1, 2)
    assert len(whole) == len(left) == len(right) == 3
    for one, *two in zip(whole, left, right, strict=True):
        for i in (0, 1):  # images, labels
            assert len(two[0][i]) == len(two[1][i]) == 8
            assert torch.equal(one[i], torch.cat([two[0][i], two[1][i]]))


def test_two_ranks_share_the_images_in_order(monkeypatch):
    seen = []
    for rank in (0, 1):
        as_rank(monkeypatch, rank, 2)
        seen += [labels for _, labels in DeviceLoader(made_set(23), 5, "cpu", train=False)]
    assert [len(labels) for labels in seen] == [5, 5, 1, 5, 5, 2]
    assert torch.cat(seen).tolist() == list(range(23))


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch):
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(UserError, match="--batch_size 15 cannot be shared by 2 processes"):
        DeviceLoader(made_set(50), 15, "cpu", train=True)
    for batch_size in (2, 3):
        with pytest.raises(UserError, match="BatchNorm needs two images in every process"):
            DeviceLoader(made_set(50), batch_size, "cpu", train=True)
    assert len(DeviceLoader(made_set(50), 4, "cpu", train=True)) == 12


@pytest.mark.parametrize("augment", ["crop", "reflect"])
def test_every_label_is_that_of_its_image(augment):
    for views, labels in DeviceLoader(coordinates(60), 20, "cpu", train=True, augment=augment):
        assert pixels(views)[:, 2, 16, 16].tolist() == labels.tolist()


def test_the_checksum_of_a_set_is_of_its_labels_too():
    images = made_set(3)
    assert images.sha256() != replace(images, labels=images.labels.flip(0)).sha256()


def test_noise_is_uniform_and_as_many_images_as_cifake():
    noise = data.load_noise()
    assert noise.images.shape == (50_000, 3, 32, 32)
    counts = torch.bincount(noise.images[:1000].flatten(), minlength=256)
    assert 11_000 < counts.min() <= counts.max() < 13_000


# ------------------------------------------------------------------------------- images held out


def test_images_held_out_are_the_same_in_every_run_and_in_no_batch():
    images = made_set(100)
    rest, held = images.hold_out(30)
    assert (len(rest), len(held)) == (70, 30)
    assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == list(range(100))
    assert held.labels.tolist() != list(range(70, 100))  # not the last ones: they are shuffled
    for part in (rest, held):
        assert torch.equal(part.images, images.images[part.labels])
    torch.manual_seed(5)
    assert torch.equal(images.hold_out(30)[1].images, held.images)
    rest, held = images.hold_out(0)
    assert (len(rest), len(held)) == (100, 0)
    assert torch.equal(rest.images, images.images)


def test_no_copy_of_a_training_image_is_held_out():
    images = made_set(100)
    images.images[50:80] = images.images[:30]  # 30 pairs and 40 single ones
    rest, held = images.hold_out(40)
    assert sorted(held.labels.tolist()) == [*range(30, 50), *range(80, 100)]
    assert len(rest) == 60
    with pytest.raises(UserError, match="--holdout 41 is too many of 100 training images"):
        images.hold_out(41)
    with pytest.raises(UserError, match="--holdout 100 is too many of 100"):
        made_set(100).hold_out(100)


def test_shifted_copies_follow_the_images():
    images = made_set(3)
    smooth = torch.linspace(40, 160, 3 * 3 * 32 * 32).view(3, 3, 32, 32).to(torch.uint8)
    images = ImageSet(smooth, images.labels, images.classes)
    shifted = with_shifted_copies(images)
    assert shifted.images.shape == (18, 3, 32, 32)
    assert shifted.images.dtype == torch.uint8
    assert shifted.labels.tolist() == [0, 1, 2] * 6
    plain, bright, pale, blurred, crushed, _ = shifted.images.float().split(3)
    assert torch.equal(plain, images.images.float())
    assert (bright - 1.4 * plain).abs().max() <= 1
    spread = [x.std(dim=1).mean() for x in (plain, pale)]  # of the three colours
    assert 0.35 < spread[1] / spread[0] < 0.45
    for copy in (blurred, crushed):
        assert 0 < (copy - plain).abs().mean() < 5
    rough = with_shifted_copies(made_set(3)).images.float().split(3)
    plain, blurred, sharp = (rough[i].diff(dim=3).abs().mean() for i in (0, 3, 5))
    assert blurred < plain < sharp
    assert len(with_shifted_copies(images.first(0))) == 0


# ------------------------------------------------------------------------------------------- demo


def test_the_demo_set_is_the_same_every_time_and_balanced():
    for part, count in (("train", 3000), ("test", 1000), ("synthetic", 3000)):
        images = load_demo(part)
        assert images.images.shape == (count, 3, 32, 32)
        assert images.images.dtype == torch.uint8
        assert torch.bincount(images.labels).tolist() == [count // 10] * 10
    for style in ("real", "synthetic"):
        assert all(
            np.array_equal(*pair)
            for pair in zip(draw(style, 50, 1), draw(style, 50, 1), strict=True)
        )
        assert not np.array_equal(draw(style, 50, 1)[0], draw(style, 50, 2)[0])


@pytest.mark.slow
def test_a_linear_classifier_finds_little_in_the_demo_set():
    """Ridge regression on pixels, its strength picked to its own advantage on the test set."""
    train, test = load_demo("train"), load_demo("test")

    def features(images):
        return torch.cat([images.images.flatten(1) / 255 - 0.5, torch.ones(len(images), 1)], 1)

    x, y = features(train), torch.nn.functional.one_hot(train.labels, 10).float()
    accuracies, gram = [], x.T @ x
    for strength in (1e3, 1e4):
        weights = torch.linalg.solve(gram + strength * torch.eye(x.shape[1]), x.T @ y)
        correct = (features(test) @ weights).argmax(1) == test.labels
        accuracies.append(correct.float().mean().item())
    assert max(accuracies) < 0.25
