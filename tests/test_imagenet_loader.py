"""Views, batches and the check of the data, against torchvision's and on made images."""

import gc
import itertools
import json
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import loader as benchmark
import numpy as np
import pytest
import torch
from conftest import as_rank
from PIL import Image
from processes import Process
from torchvision import transforms
from torchvision.models import ResNet18_Weights

from experiment.device import MEMORY_FORMAT, seed_everything
from experiment.errors import UserError
from experiment.signals import STOP_SIGNALS
from imagenet.index import ImageFiles, list_images
from imagenet.loader import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FolderLoader,
    center_view,
    check_data,
    load_view,
    random_view,
)

SIZE = 32


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes in colour with a little grain, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """20 class folders of 6 JPEGs, as Stable-ImageNet-1K has them."""
    folder = tmp_path_factory.mktemp("synthetic")
    for i in range(20):
        inside = folder / f"{i:03d}_kind_{chr(97 + i)}"
        inside.mkdir()
        for k in range(6):
            picture(96 + 8 * (k % 3), 72, 10 * i + k).save(inside / f"{k:03d}_{i}.jpg")
    return folder


@pytest.fixture
def files(made) -> ImageFiles:
    return list_images(made, 20)


def epoch(files, batch_size=24, seed=3, number=1, **options) -> list:
    """The batches of an epoch, seeded as a run seeds it."""
    loader = FolderLoader(files, batch_size, "cpu", size=SIZE, **{"train": True, **options})
    seed_everything(seed, number)
    return list(loader)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for left, right in zip(a, b, strict=True)
        for x, y in zip(left, right, strict=True)
    )


# ------------------------------------------------------------------------------------------- views


def test_a_random_view_is_that_of_torchvision():
    image = picture(130, 90)
    reference = transforms.Compose(
        [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), np.array]
    )
    for seed in range(20):
        view = random_view(image, SIZE, seed)
        torch.manual_seed(seed)
        wanted = torch.from_numpy(reference(image)).permute(2, 0, 1)
        assert view.dtype == torch.uint8
        assert (view.int() - wanted.int()).abs().max() <= 2  # tensors round unlike PIL


def test_the_centre_is_that_of_torchvision():
    image = picture(500, 375)
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), np.array])
    wanted = torch.from_numpy(reference(image)).permute(2, 0, 1)
    assert (center_view(image, 224).int() - wanted.int()).abs().max() <= 2


def test_decoding_at_reduced_size_is_near_the_full_one(tmp_path):
    path = tmp_path / "a.jpg"
    picture(1001, 751).save(path, quality=92)
    drafts = []
    for seed in range(30):
        with Image.open(path) as full, Image.open(path) as reduced:
            wanted = random_view(full, SIZE, seed, reduced=False).float()
            view = random_view(reduced, SIZE, seed).float()
            assert full.size == (1001, 751)
            drafts.append(round(1001 / reduced.width))
        assert (view - wanted).abs().mean() < 3  # of 255
    assert set(drafts) == {4, 8}  # a part has 8 times 32 pixels a side, or 4 times


def test_a_part_that_just_fits_is_not_reduced_below_the_output(tmp_path):
    picture(90, 90).save(tmp_path / "a.jpg")
    for seed in range(20):
        with Image.open(tmp_path / "a.jpg") as image:
            random_view(image, 48, seed)
            assert image.size == (90, 90)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_any_colours_become_rgb(tmp_path, mode):
    path = tmp_path / f"a.{'jpg' if mode == 'CMYK' else 'png'}"
    picture(60, 50).convert(mode).save(path)
    for seed in (None, 1):
        assert load_view(str(path), SIZE, seed).shape == (3, SIZE, SIZE)


# ----------------------------------------------------------------------------------------- batches


def test_training_sees_every_image_at_most_once(files):
    batches = epoch(files, batch_size=50)
    images, labels = batches[0]
    assert [tuple(images.shape) for images, _ in batches] == [(50, 3, SIZE, SIZE)] * 2
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=MEMORY_FORMAT)
    assert labels.dtype == torch.int64
    assert torch.bincount(torch.cat([labels for _, labels in batches])).max() <= 6


def test_batches_are_views_normalised_on_the_device(files):
    images, labels = epoch(files, train=False)[0]
    preset = ResNet18_Weights.IMAGENET1K_V1.transforms()
    mean, std = torch.tensor([preset.mean, preset.std]).view(2, 3, 1, 1)
    views = torch.stack([load_view(files.path(i), SIZE, None) for i in range(24)])
    torch.testing.assert_close(images, (views / 255 - mean) / std)
    assert labels.tolist() == files.labels[:24].tolist()


def test_testing_comes_in_order_and_whole(files):
    loader = FolderLoader(files, 50, "cpu", train=False, size=SIZE)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [50, 50, 20]
    assert len(loader) == 3
    assert torch.cat([labels for _, labels in batches]).equal(loader.labels)
    assert same(batches, list(loader))
    assert loader.classes == 20


def test_training_has_random_views_in_random_order(files):
    batches = epoch(files, seed=3)
    seed_everything(3, 1)
    order, seeds = torch.randperm(120).tolist(), torch.randint(2**63 - 1, (120,)).tolist()
    assert torch.cat([labels for _, labels in batches]).equal(files.labels[order])
    first = zip(order[:24], seeds[:24], strict=True)
    views = torch.stack([load_view(files.path(i), SIZE, seed) for i, seed in first])
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
    torch.testing.assert_close(batches[0][0], (views / 255 - mean) / std)


@pytest.mark.parametrize("train", [True, False])
def test_workers_change_nothing(files, train):
    alone = epoch(files, train=train)
    assert same(alone, epoch(files, train=train, workers=1))
    assert same(alone, epoch(files, train=train, workers=2))


def test_an_epoch_depends_on_its_seed_and_number_alone(files):
    loader = FolderLoader(files, 24, "cpu", train=True, workers=2, size=SIZE)
    for number in (1, 2):  # the workers live on
        seed_everything(3, number)
        unbroken = list(loader)
    assert same(unbroken, epoch(files, number=2))  # resumed, in a process with another past
    assert not same(unbroken, epoch(files, number=1))
    assert not same(unbroken, epoch(files, number=2, seed=4))


def test_an_epoch_left_early_does_not_spoil_the_next(files):
    loader = FolderLoader(files, 24, "cpu", train=True, workers=2, size=SIZE)
    seed_everything(3, 1)
    next(iter(loader))
    seed_everything(3, 2)
    assert same(list(loader), epoch(files, number=2))


def test_decoding_here_leaves_the_generator_alone(files):
    drawn = []
    for workers in (0, 1):
        epoch(files, workers=workers)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batches_of_one(files, ranks, monkeypatch):
    whole, parts = epoch(files), []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        parts.append(epoch(files))
    joined = [
        tuple(torch.cat(x) for x in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)
    ]
    assert same(whole, joined)


def test_ranks_share_the_test(files, monkeypatch):
    labels = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        loader = FolderLoader(files, 24, "cpu", False, size=SIZE)
        assert loader.labels.equal(files.labels)
        batches = [batch.tolist() for _, batch in loader]
        assert {len(batch) for batch in batches} == {8}  # in memory, as in training
        labels += itertools.chain(*batches)
    assert labels == files.labels.tolist()


def test_batches_that_cannot_be_are_refused(files, monkeypatch):
    with pytest.raises(UserError, match="--batch_size 121 is more than the 120 training images"):
        FolderLoader(files, 121, "cpu", train=True)
    as_rank(monkeypatch, 1, 2)
    with pytest.raises(UserError, match="--batch_size 25 cannot be shared by 2 processes"):
        FolderLoader(files, 25, "cpu", train=True)


# ------------------------------------------------------------------------------------ broken images


@pytest.fixture
def broken(tmp_path) -> ImageFiles:
    """20 folders of an image each; that of class 13 is cut short."""
    for i in range(20):
        (tmp_path / f"{i}").mkdir()
        picture(40, 40, i).save(tmp_path / f"{i}" / "a.jpg")
    whole = (tmp_path / "13" / "a.jpg").read_bytes()
    (tmp_path / "13" / "a.jpg").write_bytes(whole[: len(whole) // 2])
    return list_images(tmp_path, 20)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_a_broken_image_is_named_in_one_line(broken, workers, train):
    with pytest.raises(UserError, match=r"\A.*13/a\.jpg: not an image that can be read.*\Z"):
        epoch(broken, batch_size=4, workers=workers, train=train)


def test_after_an_error_no_worker_stays(broken):
    gc.collect()
    before = set(multiprocessing.active_children())
    gc.disable()  # what waits for it may be freed in a worker of another loader, which then fails
    try:
        with suppress(UserError):
            epoch(broken, batch_size=4, workers=2)
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


def test_an_image_that_is_gone_is_named(files, tmp_path):
    gone = ImageFiles(str(tmp_path), files.names, files.labels, files.classes)
    with pytest.raises(UserError, match=r"jpg: no such file"):
        epoch(gone)


# PyTorch's own cleaning up may come across the dead worker, too
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_is_reported(files):
    loader = FolderLoader(files, 4, "cpu", train=True, workers=1, size=SIZE)
    with pytest.raises(UserError, match="a worker that decodes images was killed"):
        for _ in loader:
            for process in loader.loader._iterator._workers:
                os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_all_processes_stops_only_the_one_that_saves(made, number):
    """As from Ctrl-C, or from a cluster: no worker fails first, and the process ends soon."""
    process = Process("-c", ENDLESS, made, int(number))
    while not process.said():
        assert process.poll() is None, process.errors()
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.communicate(timeout=30) == ("first batch\n", "\nsaved\n")
    assert process.returncode == 128 + number


ENDLESS = """
import signal, sys, time, warnings
from experiment.errors import Stopped, one_line_errors
from imagenet.index import list_images
from imagenet.loader import FolderLoader

def stop(number, frame):
    raise Stopped(number, "saved")

warnings.simplefilter("ignore")  # PyTorch warns of two workers on one core
with one_line_errors():
    loader = FolderLoader(list_images(sys.argv[1], 20), 8, "cpu", train=True, workers=2)
    while True:
        for i, _ in enumerate(loader):
            if i == 0:  # as in a run: the workers of the test are there before its handlers
                signal.signal(int(sys.argv[2]), stop)
                print("first batch", flush=True)
                while True:  # signal.pause() would sleep on after one that comes just before it
                    time.sleep(0.01)
"""


# ---------------------------------------------------------------------------------------- checking


def test_the_report_of_a_good_set(files, made):
    report = check_data(files, sample=50)
    assert f"{made}: 120 images of 20 of 20 classes, 6 to 6 a class\n" in report
    assert "of 50 looked at: 50 JPEG RGB; " in report
    assert "x72 pixels; 0 of one colour" in report
    assert "kB each, 0.00 GB in all; one core makes" in report


def test_the_report_counts_what_is_missing(tmp_path):
    for i in (0, 2):
        (tmp_path / f"{i}_x").mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / f"{i}_x" / "a.png")
    report = check_data(list_images(tmp_path, 20))
    assert "2 images of 2 of 20 classes, 0 to 1 a class" in report
    assert "2 PNG RGB; 2 of 40x30 pixels; 2 of one colour" in report


def test_broken_images_are_counted_and_the_first_is_named(broken):
    with pytest.raises(UserError, match=r"1 of 20 .* about 1 of 20; the first: .*13/a\.jpg"):
        check_data(broken)


# --------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_compares_and_names_the_bottleneck(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "SIZES", {"80x60": (80, 60, 90)})
    monkeypatch.setattr(benchmark, "VIEWS", 3)
    flags = "--images 40 --turns 1 --workers 0 1 --train_rate 1e9 --device cpu".split()
    threads = torch.get_num_threads()
    benchmark.main(benchmark.parse_args([*flags, "--output", str(tmp_path)]))
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "the bottleneck is the loader with [0, 1] workers, else training" in printed
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["workers"] for row in result["sizes"]["80x60"]["loaders"]] == [0, 1]
