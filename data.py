"""The data: CIFAR-10, a CIFAKE folder and the demo set, and the loader that serves their batches.

    files -> ImageSet (uint8, all in memory) -> DeviceLoader -> normalised float batches

50,000 images of 32x32 are 154 MB: they live on the device as uint8, and each batch is augmented and
normalised there. No worker processes; an epoch copies a few vectors of draws to the device.
"""

import functools
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps  # comes with torchvision and matplotlib
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.v2.functional import resize

import parallel
from augmentations import AUGMENTATIONS, MIXES, draw_mixes, mix_labels
from experiment import UserError
from synthetic_data.demo_images import SHAPES, draw

CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())

# Channel statistics of the 50,000 training images of CIFAR-10. They serve every set alike: the
# student has to see a picture as the teacher sees it.
MEAN = (0.49140, 0.48216, 0.44653)
STD = (0.24703, 0.24349, 0.26159)

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
CIFAKE_BY_HAND = (
    f"download https://www.kaggle.com/datasets/{CIFAKE}, unzip it, and move the 50,000 images of "
    "its train/FAKE into {folder}"
)


@dataclass(frozen=True)
class ImageSet:
    """images: uint8 (N, 3, 32, 32), RGB; labels: int64 (N,), indices into `classes`.

    `skipped` counts the files that were left out because they could not be used.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def first(self, n: int | None) -> "ImageSet":
        """The first n images, or all of them for None."""
        return replace(self, images=self.images[:n], labels=self.labels[:n])

    def hold_out(self, n: int) -> tuple["ImageSet", "ImageSet"]:
        """All but n images, and those n: the same ones in every run. Errors: UserError."""
        if n >= len(self):
            raise UserError(f"--holdout {n} leaves nothing of {len(self)} training images")
        held = torch.zeros(len(self), dtype=torch.bool)
        held[torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:n]] = True
        rest, apart = (
            replace(self, images=self.images[which], labels=self.labels[which])
            for which in (~held, held)
        )
        return rest, apart


# ------------------------------------------------------------------------------------ real images


def load_cifar10(data_dir: str | Path, train: bool) -> ImageSet:
    """The 50,000 training or the 10,000 test images of CIFAR-10, in the order of its files.

    `data_dir` holds one of the official distributions: the binary version (cifar-10-batches-bin/)
    or the Python version (cifar-10-batches-py/), which torchvision downloads when neither is there.
    Every file is checked against its published MD5. Errors: UserError, OSError.
    """
    binary = Path(data_dir) / "cifar-10-batches-bin"
    if binary.is_dir():
        return _load_binary(binary, train)
    return _load_python(CIFAR10, data_dir, train, f"CIFAR-10 is neither in {binary} nor")


def load_cifar100(data_dir: str | Path, train: bool) -> ImageSet:
    """The 50,000 training or the 10,000 test images of CIFAR-100, with its 100 fine classes.

    `data_dir` holds the Python version (cifar-100-python/), which is downloaded when absent, and
    checked against its published MD5s. Errors: UserError, OSError.
    """
    return _load_python(CIFAR100, data_dir, train, "CIFAR-100 is not")


def _load_python(dataset: type[CIFAR10], data_dir: str | Path, train: bool, lack: str) -> ImageSet:
    python, new = Path(data_dir) / dataset.base_folder, not Path(data_dir).exists()
    try:
        cifar = dataset(data_dir, train, download=not python.is_dir())
    except (OSError, RuntimeError) as error:
        if python.is_dir():
            for name, md5 in dataset.train_list + dataset.test_list:
                _read_checked(python / name, md5)  # names the file that is missing or damaged
            raise UserError(f"{python} is not complete: {error}") from error
        if new and Path(data_dir).is_dir() and not any(Path(data_dir).iterdir()):
            Path(data_dir).rmdir()  # torchvision made it
        raise UserError(
            f"{lack} in {python}, and downloading it failed: {error}; "
            "the README says where to get it, and --demo needs no data"
        ) from error
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)  # (N, 32, 32, 3) -> (N, 3, 32, 32)
    return ImageSet(images.contiguous(), torch.tensor(cifar.targets), tuple(cifar.classes))


REAL_SETS = {"cifar10": load_cifar10, "cifar100": load_cifar100}


def _load_binary(folder: Path, train: bool) -> ImageSet:
    part = "data_batch" if train else "test_batch"
    files = [_read_checked(folder / n, md5) for n, md5 in BINARY_MD5.items() if n.startswith(part)]
    # a record is one label and the red, green and blue planes
    records = torch.from_numpy(
        np.frombuffer(b"".join(files), np.uint8).reshape(-1, 1 + 3 * 32 * 32).copy()
    )
    return ImageSet(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long(), CLASSES)


def _read_checked(path: Path, md5: str) -> bytes:
    data = path.read_bytes()
    if hashlib.md5(data).hexdigest() != md5:
        raise UserError(f"{path} is not the original file of CIFAR: its MD5 differs")
    return data


# ------------------------------------------------------------------------------- synthetic images


def cifake_label(name: str) -> int:
    """The class that the name of a CIFAKE image gives. Errors: ValueError.

    'NNNN.jpg' is class 0, airplane; 'NNNN (k).jpg' is class k - 1, for k from 2 to 10.
    """
    match = re.fullmatch(r"\d+(?: \((\d+)\))?", os.path.splitext(name)[0], re.ASCII)
    if match is None:
        raise ValueError("its name is neither 'NNNN' nor 'NNNN (k)'")
    if match[1] is None:
        return 0
    if not 2 <= int(match[1]) <= 10:
        raise ValueError(f"({match[1]}) is no class: k goes from 2 to 10")
    return int(match[1]) - 1


def load_cifake(
    folder: str | Path, limit: int | None = None, skip_bad_images: bool = False
) -> ImageSet:
    """The images in `folder`, sorted by name; with `limit`, the first so many.

    Files end in .jpg, .jpeg or .png, in any case, and are named as `cifake_label` expects, each
    name once. Nothing but hidden files is passed over, unless `skip_bad_images` says to leave out,
    count and report what cannot be used. Errors: UserError that names the file.
    """
    names = []
    if os.path.isdir(folder):
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if not names:
        raise UserError(
            f"there are no synthetic images in {folder}: {CIFAKE_BY_HAND.format(folder=folder)}; "
            "or `pip install kagglehub` and add --download_synthetic; --demo needs no data"
        )
    images = np.empty((min(limit or len(names), len(names)), 32, 32, 3), np.uint8)
    labels: list[int] = []
    stems: set[str] = set()
    bad: list[UserError] = []
    with _silent():
        for name in names:
            path = os.path.join(folder, name)
            try:
                label = _label(path, stems)
                if len(labels) < len(images):  # beyond the limit, the name alone is looked at
                    images[len(labels)] = _load_pixels(path)
                    labels.append(label)
            except UserError as error:
                if not skip_bad_images:
                    raise
                bad.append(error)
    if not labels:
        raise UserError(f"none of the {len(names)} files in {folder} can be used: {bad[0]}")
    if bad:
        print(f"skipped {len(bad)} of {len(names)} files in {folder}; the first: {bad[0]}")
    pixels = torch.from_numpy(images[: len(labels)]).permute(0, 3, 1, 2)  # (N, 3, 32, 32)
    return ImageSet(pixels.contiguous(), torch.tensor(labels), CLASSES, len(bad))


def _label(path: str, stems: set[str]) -> int:
    """The class of an image file, whose stem is added to those seen. Errors: UserError."""
    stem, extension = os.path.splitext(os.path.basename(path))
    if extension.lower() not in (".jpg", ".jpeg", ".png"):
        raise UserError(f"{path}: not a .jpg, .jpeg or .png file")
    try:
        label = cifake_label(stem)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if stem in stems:
        raise UserError(f"{path}: another file has this name and another extension")
    stems.add(stem)
    return label


def load_image(path: str | Path) -> Tensor:
    """A JPEG or PNG of any size, in grey, RGB, RGBA, palette or CMYK, as uint8 (3, 32, 32).

    Transparency is dropped, and a camera's note of which side is up is followed. An image that is
    cut short, has 16 bits a channel, moves, or has more than 89 million pixels is refused: none of
    them is quietly made into something else. Errors: UserError.
    """
    with _silent():
        return torch.from_numpy(_load_pixels(path)).permute(2, 0, 1).contiguous()


@contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is refused here, or harmless
        yield


def _load_pixels(path: str | Path) -> np.ndarray:
    """uint8 (32, 32, 3)."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:
            pixels = _pixels(picture)  # (H, W, 3)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too many pixels") from error
    except Exception as error:  # the decoders raise nearly anything on a broken or hostile file
        reason = f": {error.strerror}" if getattr(error, "strerror", None) else ""
        raise UserError(f"{path}: not an image that can be read{reason}") from error
    if pixels.shape[:2] == (32, 32):
        return pixels
    image = torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)
    return resize(image, [32, 32], antialias=True).permute(1, 2, 0).numpy()


def _pixels(picture: Image.Image) -> np.ndarray:
    if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        raise UserError("too many pixels")
    if picture.format == "PNG":
        if "16" in str(picture.tile) or picture.mode.startswith("I"):
            raise UserError("not an image of 8 bits a channel")
        if picture.n_frames > 1:
            raise UserError("not a still image")
    if "exif" in picture.info:
        picture = ImageOps.exif_transpose(picture)
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def download_cifake(folder: str | Path) -> None:
    """Fetch CIFAKE with the optional kagglehub and lay its train/FAKE out as `folder`.

    A folder that already holds something is left alone. Errors: UserError, OSError.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        return
    by_hand = CIFAKE_BY_HAND.format(folder=folder)
    try:
        import kagglehub
    except ImportError as error:
        raise UserError(
            f"--download_synthetic needs kagglehub: `pip install kagglehub`; or, by hand, {by_hand}"
        ) from error
    try:
        fake = (Path(kagglehub.dataset_download(CIFAKE)) / "train" / "FAKE").resolve(strict=True)
    except Exception as error:  # kagglehub lets the errors of the HTTP libraries below it through
        raise UserError(
            f"kagglehub could not download CIFAKE ({error}); by hand: {by_hand}"
        ) from error
    for path in fake.iterdir():
        if path.is_symlink() or not path.is_file():
            raise UserError(f"the downloaded {path} is not a plain file: CIFAKE has no other")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(fake, partial)
    partial.replace(folder)


def load_noise(n: int = 50_000) -> ImageSet:
    """Uniform noise, the same in every run: what a student learns from without any pictures."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.zeros(n, dtype=torch.int64), CLASSES)


def load_demo(part: str) -> ImageSet:
    """The demo set: `part` is "train" or "test", in the real style, or "synthetic"."""
    style, count, seed = {
        "train": ("real", 3000, 1),
        "test": ("real", 1000, 2),
        "synthetic": ("synthetic", 3000, 3),
    }[part]
    images, labels = draw(style, count, seed)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), SHAPES)


# ---------------------------------------------------------------------------------------- batches


def normalize(images: Tensor) -> Tensor:
    """(B, 3, H, W), 0 to 255 -> float32 in channels-last, standardised with `MEAN` and `STD`."""
    mean, std = _statistics(images.device)
    images = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
    return images.sub_(mean).div_(std)


@functools.cache  # a copy from the host in every batch would wait for the device
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # whoever asks first, the others may use them in training
        mean, std = 255 * torch.tensor([MEAN, STD], device=device).view(2, 3, 1, 1)
    return mean, std


def check_batch_size(batch_size: int, images: int) -> None:
    """Errors: UserError if the ranks of a job cannot fill one training batch, equally."""
    if batch_size > images:
        raise UserError(f"--batch_size {batch_size} is more than the {images} training images")
    if batch_size % parallel.world_size():
        raise UserError(
            f"--batch_size {batch_size} cannot be shared by {parallel.world_size()} processes"
        )


class DeviceLoader:
    """Batches of an ImageSet that lives on `device`: float32 (B, 3, 32, 32), int64 (B,).

    With `train`, the order and the draws of `augment`, one of AUGMENTATIONS, are made anew for each
    epoch, from PyTorch's CPU generator: a seed gives the same views on every device. The few images
    left over by the last full batch sit that epoch out, so that every step has the same shapes.
    With `mix`, one of MIXES, every batch is mixed, by shares from Beta(mix_alpha, mix_alpha), and
    labels become shares of the classes, float32 (B, classes). Without `train`, every image comes
    once, in order and as it is. In a job of several ranks, each gets its part of every batch, or of
    the images that come in order. Errors: UserError if there is no full training batch.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        device: torch.device | str,
        train: bool,
        augment: str = "crop",
        mix: str = "none",
        mix_alpha: float = 1.0,
    ) -> None:
        if train:
            check_batch_size(batch_size, len(data))
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size, self.device, self.train = batch_size, torch.device(device), train
        self.augment, self.mix, self.mix_alpha = augment, mix, mix_alpha
        self.classes = len(data.classes)

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.train else full + (rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.train:
            own = parallel.own_part(len(self.images))
            images, labels = self.images[own], self.labels[own]
            for i in range(0, len(images), self.batch_size):
                batch = slice(i, i + self.batch_size)
                yield normalize(images[batch]), labels[batch]
            return
        own = parallel.own_part(self.batch_size)
        order = torch.randperm(len(self.images)).to(self.device)
        draw, augment = AUGMENTATIONS[self.augment]
        draws = [values.to(self.device) for values in draw(len(self.images))]
        if self.mix != "none":
            mixes = [x.to(self.device) for x in draw_mixes(len(self), self.mix_alpha)]
        for i in range(len(self)):
            first, size = i * self.batch_size, self.batch_size
            if self.mix == "none":
                first, size = first + own.start, own.stop - own.start
            batch = slice(first, first + size)  # all of it where images are mixed with one another
            index = order[batch]
            labels = self.labels[index]
            images = normalize(augment(self.images[index], *(values[batch] for values in draws)))
            if self.mix != "none":
                images, share = MIXES[self.mix](images, *(values[i] for values in mixes))
                images, labels = images[own], mix_labels(labels, share, self.classes)[own]
            yield images, labels
