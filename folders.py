"""Images in folders, too many for the memory: checked, decoded by workers, served in batches.

    folder -> listings.ImageFiles -> FolderLoader -> normalised float batches

An ImageFiles holds names and labels. Workers decode, cut and resize to uint8; batches are
normalised, and mixed, on the device.
"""

import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

import parallel
from augmentations import MIXES, draw_mixes, mix_labels
from data import ImageSet, check_batch_size, load_image
from experiment import UserError
from listings import ImageFiles, list_images, names_as_in_torchvision

# Channel statistics of ImageNet, those that torchvision's published weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------- views


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """A JPEG or PNG that is not decoded yet. Whatever goes wrong within is a UserError."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=("JPEG", "PNG")) as picture:
            warnings.simplefilter("ignore")  # what Pillow warns of is refused, or harmless
            if picture.mode.startswith(("I", "F")) or "16" in str(picture.tile):
                raise ValueError("it does not have 8 bits a channel")
            yield picture
    except Exception as error:  # the decoders raise nearly anything on a broken or hostile file
        raise UserError(f"{path}: not an image that can be read: {error}") from error


def load_view(path: str, size: int, seed: int | None) -> Tensor:
    """uint8 (3, size, size), of channels last: a random view from `seed`, or the middle for None.

    As DM-KD and torchvision's reference, without a look at a camera's note of which side is up.
    Errors: UserError that names the file.
    """
    with opened(path) as picture:
        return middle(picture, size) if seed is None else random_view(picture, size, seed)


def random_view(picture: Image.Image, size: int, seed: int, reduced: bool = True) -> Tensor:
    """torchvision's RandomResizedCrop, 8 to 100 % of the area, and RandomHorizontalFlip.

    With `reduced`, a JPEG is decoded to the 1/2, 1/4 or 1/8 of its sides that libjpeg can make of
    its coefficients, where the part that is drawn has `size` pixels a side even so.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(
            picture, (0.08, 1.0), (3 / 4, 4 / 3)
        )
        flip = torch.rand(()) < 0.5
    full_width, full_height = picture.size
    fits = max(1, min(height, width) // size)
    if reduced and fits > 1:
        picture.draft(None, (full_width // fits, full_height // fits))
    times = round(full_width / picture.width)  # 1, 2, 4 or 8
    box = (round(x / times) for x in (left, top, left + width, top + height))
    image = _pixels(picture.crop(tuple(box)))
    image = F.resize(image, [size, size], antialias=True)
    return F.horizontal_flip(image) if flip else image


def middle(picture: Image.Image, size: int) -> Tensor:
    """The middle of a picture whose shorter side is made 8/7 of `size`: 256 for 224."""
    return F.center_crop(F.resize(_pixels(picture), [round(size * 8 / 7)], antialias=True), [size])


def _pixels(picture: Image.Image) -> Tensor:
    return F.pil_to_tensor(picture if picture.mode == "RGB" else picture.convert("RGB"))


# ---------------------------------------------------------------------------------------- checking


def check_data(files: ImageFiles, sample: int = 1000) -> str:
    """A report of three lines: counts, and what a random `sample` of the images shows.

    Errors: UserError where an image cannot be read, which would end a run hours later.
    """
    picks = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:sample]
    looks, broken = [], []
    for i in picks.tolist():
        try:
            looks.append(_look(files.path(i)))
        except UserError as error:
            broken.append(error)
    if broken:
        raise UserError(
            f"{len(broken)} of {len(picks)} images looked at cannot be read, so about "
            f"{len(broken) * len(files) // len(picks):,} of {len(files):,}; the first: {broken[0]}"
        )
    formats, pixels, blank, kilobytes, seconds = zip(*looks, strict=True)
    counts = torch.bincount(files.labels, minlength=len(files.classes))
    named = names_as_in_torchvision(files.classes)
    as_named = "" if named is None else f", {named} of them named as in torchvision"
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(formats).most_common())
    each, second = sum(kilobytes) / len(looks), sum(seconds) / len(looks)
    return (
        f"{files.folder}: {len(files):,} images of {(counts > 0).sum()} of {len(counts)} classes"
        f"{as_named}, {counts.min()} to {counts.max()} a class\n"
        f"  of {len(looks)} looked at: {kinds}; {len(set(pixels))} sizes, mostly "
        f"{Counter(pixels).most_common(1)[0][0]}; {sum(blank)} of one colour, as Stable "
        "Diffusion's safety checker leaves them\n"
        f"  {each:.0f} kB each, {each * len(files) / 1e6:.2f} GB in all; a core makes "
        f"{1 / second:.0f} views/s: an epoch takes it {second * len(files) / 60:.1f} minutes"
    )


def _look(path: str) -> tuple[str, str, bool, float, float]:
    """Of an image: format, size, whether it has one colour, kilobytes, and a view's seconds."""
    began = time.perf_counter()
    load_view(path, 224, seed=0)
    seconds = time.perf_counter() - began
    with opened(path) as picture:
        name, size = f"{picture.format} {picture.mode}", f"{picture.width}x{picture.height}"
        blank = all(low == high for low, high in picture.convert("RGB").getextrema())
    return name, size, blank, os.path.getsize(path) / 1e3, seconds


# ----------------------------------------------------------------------------------------- batches


class FolderLoader:
    """Batches of ImageFiles: float32 (B, 3, size, size) in channels-last, and labels, on `device`.

    The same views for a seed whatever the number of workers and of ranks: the order, and a seed for
    each view, come from PyTorch's CPU generator when an epoch begins. `batch_size` is that of all
    ranks together; each takes its own part of every batch, in training, or of the images, in
    testing. `labels` are those of all images. What else there is to say of `train`, `mix` and
    `mix_alpha` is said of data.DeviceLoader; a mix stays within a rank.

    `workers` processes decode to uint8, a quarter of the bytes; for 0, this one does. Errors:
    UserError that names the image, whoever met it, or says that a worker is gone.
    """

    def __init__(
        self,
        files: ImageFiles,
        batch_size: int,
        device: torch.device | str,
        train: bool,
        workers: int = 0,
        size: int = 224,
        mix: str = "none",
        mix_alpha: float = 1.0,
    ) -> None:
        if train:
            check_batch_size(batch_size, len(files))
        self.batch_size, self.device, self.train = batch_size, torch.device(device), train
        self.mix, self.mix_alpha = mix, mix_alpha
        self.classes, self.labels = len(files.classes), files.labels.to(self.device)
        self.mean, self.std = 255 * torch.tensor([MEAN, STD], device=device).view(2, 3, 1, 1)
        self.schedule: list[tuple[np.ndarray, np.ndarray | None]] = []  # of an epoch, by batches
        self.loader = DataLoader(
            _Batches(files, size),
            batch_size=None,  # the schedule is one of batches
            sampler=self.schedule,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # or it would draw from the one that seeds the views
        )

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        return full if self.train else full + (rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.train:
            order = torch.randperm(len(self.labels)).numpy()
            seeds = torch.randint(2**63 - 1, (len(order),)).numpy()
            own = parallel.own_part(self.batch_size)
            self.schedule[:] = [
                (order[i + own.start : i + own.stop], seeds[i + own.start : i + own.stop])
                for i in range(0, len(self) * self.batch_size, self.batch_size)
            ]
            if self.mix != "none":
                mixes = [x.to(self.device) for x in draw_mixes(len(self), self.mix_alpha)]
        else:
            index = np.arange(len(self.labels))[parallel.own_part(len(self.labels))]
            starts = range(0, len(index), self.batch_size)
            self.schedule[:] = [(index[i : i + self.batch_size], None) for i in starts]
        for i, (images, labels) in enumerate(self._decoded()):
            images, labels = (x.to(self.device, non_blocking=True) for x in (images, labels))
            images = images.to(torch.float32, memory_format=torch.channels_last)
            images.sub_(self.mean).div_(self.std)
            if self.train and self.mix != "none":
                images, own = MIXES[self.mix](images, *(values[i] for values in mixes))
                labels = mix_labels(labels, own, self.classes)
            yield images, labels

    def _decoded(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for batch in self.loader:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:  # of its queue, or its pipe
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "a worker that decodes images was killed: for want of memory, or of shared memory "
                "(/dev/shm); fewer --workers take less"
            ) from error


class _Batches(Dataset):
    """Whole batches: uint8 (B, 3, size, size) and int64 (B,) for the indices and the seeds."""

    def __init__(self, files: ImageFiles, size: int) -> None:
        self.files, self.size = files, size

    def __getitem__(self, batch: tuple[np.ndarray, np.ndarray | None]):
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
    """Leave signals to the process that saves the run; its handlers came along by forking.

    Ctrl-C, and a cluster's SIGTERM, reach every process. A worker goes on at the one, and ends with
    0 at the other, by which it is also sent home: any other end PyTorch takes for a failure, and
    raises an error in the process that is saving.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


# ------------------------------------------------------------------------ few and small enough


def load_class_folders(
    folder: str | Path, classes: tuple[str, ...], limit: int | None = None
) -> ImageSet:
    """The images in class folders named by `classes`, brought to 32x32, all in memory.

    For synthetic images of CIFAR-100. With `limit`, so many, evenly spaced. Errors: UserError that
    names the file.
    """
    files = list_images(folder, len(classes), classes).spread(limit)
    images = torch.stack([load_image(files.path(i)) for i in range(len(files))])
    return ImageSet(images, files.labels, classes)
