"""The data: CIFAR-10 and -100, CIFAKE, class folders, and the loader that serves their batches.

    files -> ImageSet (uint8, all in memory) -> DeviceLoader -> normalised float batches

50,000 images of 32x32 are 154 MB: they live on the device as uint8, and each batch is augmented and
normalised there. There are no worker processes.
"""

import functools
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps  # comes with torchvision and matplotlib
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.v2.functional import resize

import augmentations
from experiment import parallel
from experiment.device import MEMORY_FORMAT
from experiment.download import timeout
from experiment.errors import UserError, is_lack_of_memory

CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())

# Of CIFAR-10's training images. They serve every set: the student sees what the teacher sees.
CIFAR10_MEAN = (0.49140, 0.48216, 0.44653)
CIFAR10_STD = (0.24703, 0.24349, 0.26159)

TEST_BATCH_SIZE = 500

# The official binary version (https://www.cs.toronto.edu/~kriz/cifar.html).
BINARY_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}

CIFAKE = "birdy654/cifake-real-and-ai-generated-synthetic-images"
BY_HAND = (
    f"download https://www.kaggle.com/datasets/{CIFAKE}, unzip it, and move the 50,000 images of "
    "its train/FAKE into"
)


@dataclass(frozen=True)
class ImageSet:
    """images: uint8 (N, 3, 32, 32), RGB; labels: int64 (N,), indices into `classes`."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def first(self, n: int | None) -> "ImageSet":
        """The first n images, or all of them for None."""
        return replace(self, images=self.images[:n], labels=self.labels[:n])

    def hold_out(self, n: int) -> tuple["ImageSet", "ImageSet"]:
        """Split the set: all but n images, and n held-out ones, the same in every run.

        An image that has duplicates is not held out. Errors: UserError.
        """
        if n == 0:
            return self, self.first(0)
        pixels = self.images.flatten(1)
        copies, counts = pixels.unique(dim=0, return_inverse=True, return_counts=True)[1:]
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        held = torch.zeros(len(self), dtype=torch.bool)
        held[order[counts[copies[order]] == 1][:n]] = True
        if held.sum() < n or n == len(self):
            raise UserError(f"--holdout {n} is too many of {len(self)} training images")

        def part(mask: Tensor) -> ImageSet:
            return replace(self, images=self.images[mask], labels=self.labels[mask])

        return part(~held), part(held)

    def sha256(self) -> str:
        """A checksum of all images and labels."""
        digest = hashlib.sha256(self.images.numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()


# ------------------------------------------------------------------------------------ real images


def load_cifar10(data_dir: str | Path, train: bool) -> ImageSet:
    """The 50,000 training or the 10,000 test images of CIFAR-10, in the order of its files.

    `data_dir` holds the official binary version (cifar-10-batches-bin/) or the Python version
    (cifar-10-batches-py/), which torchvision downloads when neither is there. Every file is checked
    against its published MD5. Errors: UserError, OSError.
    """
    binary = Path(data_dir) / "cifar-10-batches-bin"
    if binary.is_dir():
        return _load_binary(binary, train)
    return _load_python(CIFAR10, data_dir, train, f"CIFAR-10 is neither in {binary} nor")


def load_cifar100(data_dir: str | Path, train: bool) -> ImageSet:
    """CIFAR-100 with its 100 fine classes. Like `load_cifar10`, but the Python version only."""
    return _load_python(CIFAR100, data_dir, train, "CIFAR-100 is not")


def _load_python(dataset: type[CIFAR10], data_dir: str | Path, train: bool, lack: str) -> ImageSet:
    python, new = Path(data_dir) / dataset.base_folder, not Path(data_dir).exists()
    try:
        with timeout():
            cifar = dataset(data_dir, train, download=not python.is_dir())
    except (OSError, HTTPException, RuntimeError) as error:
        if python.is_dir():
            for name, md5 in dataset.train_list + dataset.test_list:
                _read_checked(python / name, md5)  # names the file that is missing or damaged
            raise UserError(f"{python} is not complete: {error}") from error
        if new and Path(data_dir).is_dir() and not any(Path(data_dir).iterdir()):
            Path(data_dir).rmdir()  # torchvision made it
        raise UserError(
            f"{lack} in {python}, and downloading it failed: {error}; "
            "the README says where to get it; `bash scripts/demo.sh` needs none"
        ) from error
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)  # (N, 32, 32, 3) -> (N, 3, 32, 32)
    return ImageSet(images.contiguous(), torch.tensor(cifar.targets), tuple(cifar.classes))


REAL_SETS = {"cifar10": load_cifar10, "cifar100": load_cifar100}


def _load_binary(folder: Path, train: bool) -> ImageSet:
    part = "data_batch" if train else "test_batch"
    files = [_read_checked(folder / n, md5) for n, md5 in BINARY_MD5.items() if n.startswith(part)]
    records = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    records = records.view(-1, 1 + 3 * 32 * 32)  # a label, and the red, green and blue planes
    images = records[:, 1:].reshape(-1, 3, 32, 32).contiguous()
    return ImageSet(images, records[:, 0].long(), CLASSES)


def _read_checked(path: Path, md5: str) -> bytes:
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.md5(data).hexdigest() != md5:
        raise UserError(
            f"{path} is missing, or not the original file of CIFAR: its MD5 differs; "
            f"without {path.parent}, CIFAR is downloaded again"
        )
    return data


# ------------------------------------------------------------------------------- synthetic images


def cifake_label(path: str) -> int:
    """The class in the name of a CIFAKE image file. Errors: UserError.

    'NNNN.jpg' is class 0, airplane; 'NNNN (k).jpg' is class k - 1. .jpeg and .png work, too.
    """
    pattern = r"\d+(?: \(([2-9]|10)\))?\.(?:jpe?g|png)"
    match = re.fullmatch(pattern, os.path.basename(path), re.ASCII | re.IGNORECASE)
    if match is None:
        rule = "'NNNN.jpg', or 'NNNN (k).jpg' with k from 2 to 10; .jpeg and .png work, too"
        raise UserError(f"{path}: not named {rule}")
    return int(match[1] or 1) - 1


def load_cifake(folder: str | Path, limit: int | None = None) -> ImageSet:
    """The images in `folder`, sorted by name; with `limit`, the first `limit` of them.

    Files are named as `cifake_label` expects, each name once. Hidden files are skipped, any other
    file is an error. Errors: UserError that names the file.
    """
    names = visible(folder)
    if not names:
        lack = "are no synthetic images in" if os.path.isdir(folder) else "is no folder"
        raise UserError(
            f"there {lack} {folder}: {BY_HAND} {folder}; or `pip install kagglehub` and "
            "main_train_cifar10.py --download_synthetic; `bash scripts/demo.sh` needs no data"
        )
    if "manifest.csv" in names:
        raise UserError(f"{folder} is a set of generate.py: its images are in {folder}/images")
    paths = [os.path.join(folder, name) for name in names]
    labels, stems = [cifake_label(path) for path in paths], set()
    for path in paths:
        if (stem := os.path.splitext(path)[0]) in stems:
            raise UserError(f"{path}: another file has this name and another extension")
        stems.add(stem)
    images = [_load_pixels(path) for path in paths[:limit]]  # beyond it, only names are checked
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (N, 3, 32, 32)
    return ImageSet(pixels.contiguous(), torch.tensor(labels[:limit]), CLASSES)


def load_class_folders(
    folder: str | Path, classes: tuple[str, ...], limit: int | None = None
) -> ImageSet:
    """The images in folders named like `classes`, at 32x32; with `limit`, the first of them.

    For synthetic images of CIFAR-100. The first image of every class comes before the second of
    any, as in CIFAKE: a limit of at least `len(classes)` keeps all of them. Errors: UserError that
    names the file or the folder.
    """
    for name in sorted({*classes, *visible(folder)}):
        if name not in classes or not visible(Path(folder, name)):
            rule = "every class needs a folder with images, and nothing else belongs there"
            raise UserError(f"{Path(folder, name)}: {rule}")
    files = [
        (number, label, Path(folder, name, image))
        for label, name in enumerate(classes)
        for number, image in enumerate(visible(Path(folder, name)))
    ]
    files = sorted(files)[:limit]
    images = torch.stack([load_image(path) for _, _, path in files])
    return ImageSet(images, torch.tensor([label for _, label, _ in files]), classes)


def visible(folder: str | Path) -> list[str]:
    """The names in a folder without hidden ones, sorted; none if there is no such folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if not name.startswith("."))


def load_image(path: str | Path) -> Tensor:
    """A JPEG or PNG of any size, in grey, RGB, RGBA, palette or CMYK, as uint8 (3, 32, 32).

    Transparency is dropped and the EXIF orientation applied. An image that is cut short, animated,
    has 16 bits a channel or more than 89 million pixels is refused, and so is anything but a
    regular file. Errors: UserError that names the file.
    """
    return torch.from_numpy(_load_pixels(path)).permute(2, 0, 1).contiguous()


def _load_pixels(path: str | Path) -> np.ndarray:
    """uint8 (32, 32, 3), in NumPy: a tensor for each image would take as long as decoding it."""
    with opened(path) as picture:
        if picture.format == "PNG" and picture.n_frames > 1:
            raise UserError("not a still image")
        if "exif" in picture.info:
            picture = ImageOps.exif_transpose(picture)
        pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))  # (H, W, 3)
    if pixels.shape[:2] == (32, 32):
        return pixels
    image = torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)
    return resize(image, [32, 32], antialias=True).permute(1, 2, 0).numpy()


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A JPEG or PNG that is not decoded yet. Any error in the block becomes a UserError."""
    try:
        if not os.path.isfile(path):  # opening a FIFO would wait for ever
            raise UserError("not a regular file" if os.path.lexists(path) else "no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is refused here, or harmless
            with Image.open(path, formats=("JPEG", "PNG")) as picture:
                if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:  # before it is decoded
                    raise UserError("too many pixels")
                deep = any("16" in str(tile[3]) for tile in picture.tile)  # its raw mode, "RGB;16B"
                if deep or picture.mode.startswith("I"):
                    raise UserError("not an image of 8 bits a channel")
                yield picture
    except Exception as error:  # the decoders raise nearly anything on a broken or hostile file
        told = isinstance(error, (UserError, Image.DecompressionBombError))
        lack = "too little memory to read it" if is_lack_of_memory(error) else None
        reason = error if told else lack or getattr(error, "strerror", None)
        raise UserError(f"{path}: {reason or 'not an image that can be read'}") from error


def load_noise(classes: tuple[str, ...] = CLASSES, n: int = 50_000) -> ImageSet:
    """Uniform noise, the same in every run: training images for a control. All labels are 0."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.zeros(n, dtype=torch.int64), classes)


# ---------------------------------------------------------------------------------------- batches


def normalize(images: Tensor) -> Tensor:
    """(B, 3, H, W), 0 to 255 -> float32 in MEMORY_FORMAT, standardised by CIFAR-10's statistics."""
    mean, std = _statistics(images.device)
    images = images.to(torch.float32, memory_format=MEMORY_FORMAT, copy=True)
    return images.sub_(mean).div_(std)


@functools.cache  # a copy from the host in every batch would wait for the device
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # cached inference tensors could not be used in training
        mean, std = 255 * torch.tensor([CIFAR10_MEAN, CIFAR10_STD], device=device).view(2, 3, 1, 1)
    return mean, std


def check_batch_size(batch_size: int, images: int) -> None:
    """Errors: UserError if a training batch cannot be filled, or not be shared by the ranks."""
    ranks = parallel.world_size()
    if batch_size > images:
        raise UserError(f"--batch_size {batch_size} is more than the {images} training images")
    if batch_size < 2 * ranks:
        raise UserError(f"--batch_size {batch_size}: BatchNorm needs two images in every process")
    if batch_size % ranks:
        raise UserError(f"--batch_size {batch_size} cannot be shared by {ranks} processes")


class DeviceLoader:
    """Batches of an ImageSet that lives on `device`: float32 (B, 3, 32, 32), int64 (B,).

    With `train`, each epoch draws a new order and new parameters of `augment`, one of
    AUGMENTATIONS, from PyTorch's CPU generator: a seed gives the same views on every device. The
    few images left over after the last full batch are skipped in that epoch, so that every step has
    the same shapes. The flips of "reflect" alternate: an image is mirrored in every other `epoch`,
    and `seed` decides which.

    Without `train`, every image comes once, in order and unchanged. Each rank of a job gets its
    part of every training batch, or of the images in order. Errors: UserError if there is no full
    training batch.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        device: torch.device | str,
        train: bool,
        augment: str = "crop",
        seed: int = 0,
    ) -> None:
        if train:
            check_batch_size(batch_size, len(data))
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size, self.device, self.train = batch_size, torch.device(device), train
        self.classes, self.augment, self.seed, self.epoch = len(data.classes), augment, seed, 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.train else full + (rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._augmented() if self.train else self._in_order()

    def _in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        own = parallel.rank_slice(len(self.images))
        images, labels = self.images[own], self.labels[own]
        for i in range(0, len(images), self.batch_size):
            batch = slice(i, i + self.batch_size)
            yield normalize(images[batch]), labels[batch]

    def _augmented(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, own = len(self.images), parallel.rank_slice(self.batch_size)
        order = torch.randperm(n)
        draw, augment = augmentations.AUGMENTATIONS[self.augment]
        draws = draw(n)
        if self.augment == "reflect":
            first = torch.rand(n, generator=torch.Generator().manual_seed(self.seed)) < 0.5
            draws = (*draws, (first ^ (self.epoch % 2 == 1))[order])
        order, *draws = (values.to(self.device) for values in (order, *draws))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = slice(start + own.start, start + own.stop)  # of this rank
            index, values = order[part], (values[part] for values in draws)
            yield normalize(augment(self.images[index], *values)), self.labels[index]
