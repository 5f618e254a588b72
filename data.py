"""The data: CIFAR-10, a CIFAKE folder and the demo set, and the loader that keeps them on the device.

    files -> ImageSet (uint8, all of it in memory) -> DeviceLoader -> normalised float batches

At 32x32 a data set is 154 MB. It lives on the device as uint8, and each batch is cropped, flipped and
normalised there: no worker process, and nothing is copied to the device but four small index vectors an epoch.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize

from experiment import UserError
from synthetic_data.demo_images import SHAPES, draw

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# Per channel, over the 50,000 training images of CIFAR-10. Synthetic images are normalised alike: the
# student is to see the world through the teacher's eyes.
MEAN = (0.49140, 0.48216, 0.44653)
STD = (0.24703, 0.24349, 0.26159)

# The official binary version, https://www.cs.toronto.edu/~kriz/cifar.html
CIFAR10_BINARY_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
CIFAKE = "birdy654/cifake-real-and-ai-generated-synthetic-images"


@dataclass(frozen=True)
class ImageSet:
    """images: uint8 (N, 3, 32, 32), RGB; labels: int64 (N,), indices into `classes`."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def first(self, n: int | None) -> "ImageSet":
        """The first n images; all of them for None."""
        return ImageSet(self.images[:n], self.labels[:n], self.classes)


# ---------------------------------------------------------------------------------------------------------
# real images


def load_cifar10(data_dir: str | Path, train: bool) -> ImageSet:
    """The 50,000 training or 10,000 test images of CIFAR-10, in the order of the files.

    Under `data_dir`, the official binary version (`cifar-10-batches-bin/`) is taken where it is there, else
    the Python version (`cifar-10-batches-py/`), which torchvision downloads where it is absent. Both are
    checked against their published MD5s. Errors: UserError, OSError.
    """
    binary = Path(data_dir) / "cifar-10-batches-bin"
    if binary.is_dir():
        return _load_cifar10_binary(binary, train)
    python = Path(data_dir) / CIFAR10.base_folder
    if python.is_dir():
        for name, md5 in CIFAR10.train_list if train else CIFAR10.test_list:
            _read_checked(python / name, md5)
    try:
        cifar10 = CIFAR10(data_dir, train, download=not python.is_dir())
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 is neither in {binary} nor in {python}, and could not be downloaded ({error}): "
            "see the README, or try the scripts without any data by --demo"
        ) from error
    images = (
        torch.from_numpy(cifar10.data).permute(0, 3, 1, 2).contiguous()
    )  # (N, 32, 32, 3) -> (N, 3, 32, 32)
    return ImageSet(images, torch.tensor(cifar10.targets), CIFAR10_CLASSES)


def _load_cifar10_binary(folder: Path, train: bool) -> ImageSet:
    names = [
        name
        for name in CIFAR10_BINARY_MD5
        if name.startswith("data_batch" if train else "test_batch")
    ]
    records = [
        np.frombuffer(_read_checked(folder / name, CIFAR10_BINARY_MD5[name]), np.uint8)
        for name in names
    ]
    records = torch.from_numpy(
        np.concatenate(records).reshape(-1, 1 + 3 * 32 * 32)
    )  # a label, then the planes
    return ImageSet(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long(), CIFAR10_CLASSES)


def _read_checked(path: Path, md5: str) -> bytes:
    data = path.read_bytes()
    if hashlib.md5(data).hexdigest() != md5:
        raise UserError(
            f"{path} is not the original CIFAR-10 file (its MD5 differs): remove it and get it anew"
        )
    return data


# ---------------------------------------------------------------------------------------------------------
# synthetic images


def cifake_label(name: str) -> int:
    """The class in the name of a CIFAKE image: 'NNNN.jpg' is 0 (airplane), 'NNNN (k).jpg' is k-1, k = 2..10.

    Errors: ValueError.
    """
    match = re.fullmatch(r"\d+(?: \((\d+)\))?", Path(name).stem)
    if match is None:
        raise ValueError("the name is neither 'NNNN.jpg' nor 'NNNN (k).jpg'")
    if match[1] is None:
        return 0
    if not 2 <= int(match[1]) <= 10:
        raise ValueError(f"({match[1]}) is no class: it has to be from (2) to (10)")
    return int(match[1]) - 1


def load_cifake(folder: str | Path, limit: int | None = None) -> ImageSet:
    """The synthetic images in `folder` (.jpg, .jpeg or .png in any case), sorted by name; the first `limit`.

    Images of another size are resized to 32x32, grey and RGBA ones turned into RGB. Every file has to be an
    image with a name that `cifake_label` understands; only hidden files are passed over. Errors: UserError.
    """
    folder = Path(folder)
    paths = (
        sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    )
    if not paths:
        raise UserError(
            f"no synthetic images in {folder}: download https://www.kaggle.com/datasets/{CIFAKE}, unzip it and move "
            f"the 50,000 files of its train/FAKE into {folder}; or `pip install kagglehub` and add "
            "--download_synthetic; or try the scripts without any data by --demo"
        )
    for path in paths:
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            raise UserError(
                f"{path} is not a .jpg, .jpeg or .png file: keep only the images of train/FAKE there"
            )
    labels = []
    for path in paths:
        try:
            labels.append(cifake_label(path.name))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    paths = paths[:limit]
    images = torch.empty((len(paths), 3, 32, 32), dtype=torch.uint8)
    for i, path in enumerate(paths):
        images[i] = load_image(path)
    return ImageSet(images, torch.tensor(labels[:limit]), CIFAR10_CLASSES)


def load_image(path: str | Path) -> Tensor:
    """One picture as the networks take it, before `normalize`: uint8 (3, 32, 32), RGB. Errors: UserError."""
    try:
        image = decode_image(str(path), ImageReadMode.RGB)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not an image that can be read") from error
    if image.shape[1:] != (32, 32):
        image = resize(image, [32, 32], antialias=True)
    return image


def download_cifake(folder: str | Path) -> None:
    """Fetch CIFAKE with the optional kagglehub and lay its train/FAKE out as `folder`. Errors: UserError."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder} is there already: nothing to download")
        return
    try:
        import kagglehub
    except ImportError as error:
        raise UserError(
            "--download_synthetic needs `pip install kagglehub`; by hand: download "
            f"https://www.kaggle.com/datasets/{CIFAKE}, unzip it and move the 50,000 files of train/FAKE into {folder}"
        ) from error
    try:
        fake = Path(kagglehub.dataset_download(CIFAKE)) / "train" / "FAKE"
    except Exception as error:  # kagglehub lets the errors of several HTTP libraries through
        raise UserError(f"kagglehub could not download {CIFAKE}: {error}") from error
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(fake, partial)
    partial.replace(folder)


def load_demo(part: str) -> ImageSet:
    """The demo set: `part` is "train" or "test" (the "real" style), or "synthetic". No data, no network."""
    style, seed, count = {
        "train": ("real", 1, 4000),
        "test": ("real", 2, 1000),
        "synthetic": ("synthetic", 3, 4000),
    }[part]
    images, labels = draw(style, count, seed)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), SHAPES)


# ---------------------------------------------------------------------------------------------------------
# batches


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, channels-last, zero mean and unit variance over CIFAR-10."""
    mean = 255 * torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = 255 * torch.tensor(STD, device=images.device).view(3, 1, 1)
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.sub_(mean).div_(std)


def augment(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int = 4) -> Tensor:
    """Random crop of a zero-padded picture, then a horizontal flip, with the draws given: (B, 3, H, W) -> same.

    `top` and `left` are int64 (B,) in [0, 2 * padding], as in torchvision's RandomCrop; `flip` is bool (B,).
    """
    size = images.shape[-2:]
    padded = F.pad(images, [padding] * 4)
    windows = padded.unfold(2, size[0], 1).unfold(3, size[1], 1)  # (B, 3, 9, 9, H, W), a view
    crops = windows[torch.arange(len(images), device=images.device), :, top, left]  # (B, 3, H, W)
    return torch.where(flip[:, None, None, None], crops.flip(3), crops)


class DeviceLoader:
    """Batches of an ImageSet that lives on `device`: float32 (B, 3, 32, 32) in channels-last, int64 (B,).

    For training, the set is shuffled and each image cropped (padding 4) and flipped at random; the images
    that do not fill a last batch sit this epoch out, so that every step sees the same shapes and no batch is
    too small for BatchNorm. Otherwise the images come in order, as they are, and the last batch may be
    smaller. Draws come from PyTorch's CPU generator, so a seed gives the same views on any device.
    Errors: UserError when there is not one full training batch.
    """

    def __init__(
        self, data: ImageSet, batch_size: int, device: torch.device | str, train: bool
    ) -> None:
        if train and batch_size > len(data):
            raise UserError(
                f"--batch_size {batch_size} is larger than the {len(data)} training images"
            )
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size, self.device, self.train = batch_size, torch.device(device), train

    def __len__(self) -> int:
        n = len(self.images)
        return n // self.batch_size if self.train else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.train:
            for images, labels in zip(
                self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
            ):
                yield normalize(images), labels
            return
        n = len(self.images)
        order = torch.randperm(n).to(self.device)
        top, left = torch.randint(0, 9, (2, n)).to(self.device)
        flip = (torch.rand(n) < 0.5).to(self.device)
        for i in range(len(self)):
            batch = slice(i * self.batch_size, (i + 1) * self.batch_size)
            index = order[batch]
            yield (
                normalize(augment(self.images[index], top[batch], left[batch], flip[batch])),
                self.labels[index],
            )
