"""Batches of images that do not fit in memory: checked, and decoded by workers.

    folder -> index.ImageFiles -> FolderLoader -> normalised float batches

Workers decode, crop and resize to uint8. Batches are normalised on the device.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from data import check_batch_size, opened
from experiment import parallel
from experiment.device import MEMORY_FORMAT
from experiment.errors import UserError
from experiment.signals import STOP_SIGNALS
from imagenet.index import ImageFiles, names_as_in_torchvision

# Channel statistics of ImageNet, with which torchvision's published weights were trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------- views


def load_view(path: str, size: int, seed: int | None) -> Tensor:
    """uint8 (3, size, size), channels-last: a random view from `seed`, or the centre for None.

    EXIF orientation is ignored, as in DM-KD and torchvision's reference. Errors: UserError that
    names the file.
    """
    with opened(path) as picture:
        return center_view(picture, size) if seed is None else random_view(picture, size, seed)


def random_view(picture: Image.Image, size: int, seed: int, reduced: bool = True) -> Tensor:
    """torchvision's RandomResizedCrop, 8 to 100 % of the area, and RandomHorizontalFlip.

    With `reduced`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is faster, if the crop
    then still has at least `size` pixels a side.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(
            picture, (0.08, 1.0), (3 / 4, 4 / 3)
        )
        flip = torch.rand(()) < 0.5
    full_width, full_height = picture.size
    spare = max(1, min(height, width) // size)
    if reduced and spare > 1:
        picture.draft(None, (full_width // spare, full_height // spare))
    reduction = round(full_width / picture.width)  # 1, 2, 4 or 8
    box = (round(x / reduction) for x in (left, top, left + width, top + height))
    image = F.resize(_pixels(picture.crop(tuple(box))), [size, size], antialias=True)
    return F.horizontal_flip(image) if flip else image


def center_view(picture: Image.Image, size: int) -> Tensor:
    """The centre of a picture whose shorter side is resized to 8/7 of `size`: 256 for 224."""
    return F.center_crop(F.resize(_pixels(picture), [round(size * 8 / 7)], antialias=True), [size])


def _pixels(picture: Image.Image) -> Tensor:
    return F.pil_to_tensor(picture if picture.mode == "RGB" else picture.convert("RGB"))


# ---------------------------------------------------------------------------------------- checking


def check_data(files: ImageFiles, size: int = 224, sample: int = 1000) -> str:
    """A report of three lines: counts, and the properties of a random `sample` of the images.

    `size` is that of the views whose speed it reports.
    Errors: UserError if an image cannot be read, which would end a run hours later.
    """
    picks = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:sample]
    looks, broken = [], []
    for i in picks.tolist():
        try:
            looks.append(_look(files.path(i), size))
        except UserError as error:
            broken.append(error)
    if broken:
        raise UserError(
            f"{len(broken)} of {len(picks)} images looked at cannot be read, so about "
            f"{len(broken) * len(files) // len(picks):,} of {len(files):,}; the first: {broken[0]}"
        )
    formats, sizes, blank, kilobytes, seconds = zip(*looks, strict=True)
    counts = torch.bincount(files.labels, minlength=len(files.classes))
    named = names_as_in_torchvision(files.classes)
    as_named = "" if named is None else f", {named} of them named as in torchvision"
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(formats).most_common())
    common_size, of_that_size = Counter(sizes).most_common(1)[0]
    kilobyte, second = sum(kilobytes) / len(looks), sum(seconds) / len(looks)
    return (
        f"{files.folder}: {len(files):,} images of {(counts > 0).sum()} of {len(counts)} classes"
        f"{as_named}, {counts.min()} to {counts.max()} a class\n"
        f"  of {len(looks)} looked at: {kinds}; {of_that_size} of {common_size} pixels; "
        f"{sum(blank)} of one colour, which Stable Diffusion's safety checker leaves\n"
        f"  {kilobyte:.0f} kB each, {kilobyte * len(files) / 1e6:.2f} GB in all; one core makes "
        f"{1 / second:.0f} views/s, an epoch in {second * len(files) / 60:.1f} minutes"
    )


def _look(path: str, size: int) -> tuple[str, str, bool, float, float]:
    """Format, size, whether it has one colour, kilobytes, and the seconds of a view of an image."""
    began = time.perf_counter()
    load_view(path, size, seed=0)
    seconds = time.perf_counter() - began
    with opened(path) as picture:
        name, pixels = f"{picture.format} {picture.mode}", f"{picture.width}x{picture.height}"
        blank = all(low == high for low, high in picture.convert("RGB").getextrema())
    return name, pixels, blank, os.path.getsize(path) / 1e3, seconds


# ----------------------------------------------------------------------------------------- batches


class FolderLoader:
    """Batches of ImageFiles: float32 (B, 3, size, size) in channels-last, and labels, on `device`.

    A seed gives the same views with any number of workers and ranks: the order, and a seed for each
    view, are drawn from PyTorch's CPU generator when an epoch begins. `batch_size` is the global
    one: each rank gets its slice of every training batch, or of the images in order. `train` is as
    in data.DeviceLoader. `labels` has the labels of all images.

    `workers` processes decode to uint8, a quarter of the bytes; with 0, this process does. Errors:
    UserError that names an image which cannot be read, or reports a killed worker.
    """

    def __init__(
        self,
        files: ImageFiles,
        batch_size: int,
        device: torch.device | str,
        train: bool,
        workers: int = 0,
        size: int = 224,
    ) -> None:
        if train:
            check_batch_size(batch_size, len(files))
        self.batch_size, self.device, self.train = batch_size, torch.device(device), train
        self.classes, self.labels = len(files.classes), files.labels.to(self.device)
        statistics = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=self.device)
        self.mean, self.std = 255 * statistics.view(2, 3, 1, 1)
        self.schedule: list[tuple[np.ndarray, np.ndarray | None]] = []  # an epoch's, by batches
        self.loader = DataLoader(
            _Batches(files, size),
            batch_size=None,  # the schedule has whole batches
            sampler=self.schedule,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its own: the default one seeds the views
        )

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        return full if self.train else full + (rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.schedule[:] = self._training_schedule() if self.train else self._test_schedule()
        pinned = self.device.type == "cuda"  # MPS would copy after the source is freed
        for images, labels in self._decoded():
            images, labels = (x.to(self.device, non_blocking=pinned) for x in (images, labels))
            images = images.to(torch.float32, memory_format=MEMORY_FORMAT)
            images.sub_(self.mean).div_(self.std)
            yield images, labels

    def _training_schedule(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """This rank's slice of every batch: indices in random order, and a seed for each view."""
        order = torch.randperm(len(self.labels)).numpy()
        seeds = torch.randint(2**63 - 1, (len(order),)).numpy()
        own = parallel.rank_slice(self.batch_size)
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        parts = [slice(start + own.start, start + own.stop) for start in starts]
        return [(order[part], seeds[part]) for part in parts]

    def _test_schedule(self) -> list[tuple[np.ndarray, None]]:
        """This rank's slice of the images, in order and without seeds."""
        index = np.arange(len(self.labels))[parallel.rank_slice(len(self.labels))]
        size = max(1, self.batch_size // parallel.world_size())  # a rank's, as in training
        return [(index[start : start + size], None) for start in range(0, len(index), size)]

    def _decoded(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for batch in self.loader:
                if isinstance(batch, UserError):  # raised itself, it would keep the workers alive:
                    raise UserError(str(batch))  # its traceback leads to a frame that holds it
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:  # from its queue or pipe
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "a worker that decodes images was killed, probably for lack of memory or of shared "
                "memory (/dev/shm): try fewer --workers"
            ) from error


class _Batches(Dataset):
    """Whole batches: uint8 (B, 3, size, size) and int64 (B,) for the indices and the seeds."""

    def __init__(self, files: ImageFiles, size: int) -> None:
        self.files, self.size = files, size

    def __getitem__(
        self, batch: tuple[np.ndarray, np.ndarray | None]
    ) -> tuple[Tensor, Tensor] | UserError:
        index, seeds = batch
        images = torch.empty(len(index), self.size, self.size, 3, dtype=torch.uint8)
        images = images.permute(0, 3, 1, 2)  # (B, 3, size, size) in channels-last
        try:
            for k, i in enumerate(index):
                seed = None if seeds is None else int(seeds[k])
                images[k] = load_view(self.files.path(i), self.size, seed)
        except UserError as error:  # returned: raised in a worker, it would come with a traceback
            return error
        return images, self.files.labels[torch.from_numpy(index)]


def _start_worker(worker: int) -> None:
    """Leave signals to the process that saves the run, whose handlers a fork may have copied.

    Ctrl-C, a closed terminal and a cluster's SIGTERM reach every process. A worker exits with 0 at
    SIGTERM, which is also how PyTorch ends it, and ignores the others: any other exit is a failure
    to PyTorch, which raises an error in the process that is saving.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
