"""List the images and labels of an ImageNet-like folder, in any of the usual layouts.

Every name is checked, and no image is opened: loader.py does that.
"""

import ast
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from experiment.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png")
WORDNET_ID = re.compile(r"n\d{8}", re.ASCII)  # n01440764
NUMBERED = re.compile(r"(\d+)(?:_(.+))?", re.ASCII)  # 000_tench, or 0
DMKD = re.compile(r"class_(\d+)_seed_\d+_num_\d+\.png", re.ASCII)


@dataclass(frozen=True)
class ImageFiles:
    """names: bytes (N,), paths below `folder`; labels: int64 (N,), indices into `classes`.

    The names are one array. A list would be copied into every worker bit by bit, as the reference
    counts of its strings change (https://github.com/pytorch/pytorch/issues/13246).
    """

    folder: str
    names: np.ndarray
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.names[i]))

    def spread(self, n: int | None) -> "ImageFiles":
        """n evenly spaced images, or all for None. The first n would be of a class or two."""
        n = min(n or len(self), len(self))
        index = torch.arange(n) * len(self) // n
        return replace(self, names=self.names[index.numpy()], labels=self.labels[index])

    def sha256(self) -> str:
        """A checksum of all names and labels; no image is opened."""
        digest = hashlib.sha256(self.names.tobytes())
        digest.update(self.labels.numpy())
        return digest.hexdigest()


def list_images(
    folder: str | Path, num_classes: int = 1000, classes: tuple[str, ...] | None = None
) -> ImageFiles:
    """The images of a training or a validation set, sorted by name.

    n01440764/*.JPEG        one folder per class, by WordNet id, as in ImageNet
    000_tench/*.jpg         by number and words: Stable-ImageNet-1K (generate_imagenet1k.py of
                            github.com/vkinakh/stable-diffusion-imagenet); or plain numbers
    apple/*.png             by words
    class_0_seed_1_num_2.png    no class folders: DM-KD (AIGC_generate.py of
                            github.com/zhengli97/DM-KD)

    A number is the class, and classes may be missing. Other folders, sorted, are the classes, and
    there have to be `num_classes` of them. For the 1000 WordNet ids of ImageNet this is the order
    of every published network. Such folders for only some of the teacher's classes need `classes`:
    all of them in order, from `read_classes`. Numbered folders are checked against `classes`, and
    the names of 1000 classes against torchvision's. Only hidden files are skipped. Errors:
    UserError that names the file and the rule.
    """
    folder = str(folder)
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")
    entries = _visible(folder)
    folders = [entry.name for entry in entries if entry.is_dir()]
    if folders and len(folders) < len(entries):
        file = next(entry.name for entry in entries if not entry.is_dir())
        raise UserError(
            f"{folder} holds files beside folders, such as {file} beside {folders[0]}: images are "
            "either all in class folders, or there are no folders"
        )
    names, labels = [], []
    if folders:
        numbers, classes = _label_folders(folder, folders, num_classes, classes)
        for name, number in zip(folders, numbers, strict=True):
            inside = _images(_visible(os.path.join(folder, name)))
            if not inside:
                raise UserError(f"the class folder {os.path.join(folder, name)} is empty")
            names += [f"{name}/{file}" for file in inside]
            labels += [number] * len(inside)
    else:
        names = _images(entries)
        labels = [_number(name, DMKD, folder, num_classes) for name in names]
        classes = classes or tuple(map(str, range(num_classes)))
    if not names:
        raise UserError(f"there are no images in {folder}")
    names_as_in_torchvision(classes)
    as_bytes = np.array([os.fsencode(name) for name in names])
    return ImageFiles(folder, as_bytes, torch.tensor(labels), classes)


def _visible(folder: str) -> list[os.DirEntry]:
    """The entries of `folder` that are not hidden, sorted by name."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _images(entries: list[os.DirEntry]) -> list[str]:
    """The names of `entries`. Errors: UserError if one is no regular file with an image's name."""
    for entry in entries:
        if entry.is_dir():
            raise UserError(f"{entry.path}: a folder where there should be images")
        if not entry.is_file():  # opening a FIFO would wait for ever
            raise UserError(f"{entry.path}: not a regular file")
        if os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
            raise UserError(f"{entry.path}: not a .jpg, .jpeg or .png file")
    return [entry.name for entry in entries]


def _number(name: str, pattern: re.Pattern, folder: str, num_classes: int) -> int:
    match = pattern.fullmatch(name)
    if match is None or int(match[1]) >= num_classes:
        rule = {
            DMKD: "in no class folder, and not named class_<id>_seed_<n>_num_<k>.png",
            NUMBERED: "not named <id> or <id>_<words>",
        }[pattern]
        raise UserError(f"{folder}/{name} is {rule} with an id below {num_classes}")
    return int(match[1])


def _label_folders(
    folder: str, names: list[str], num_classes: int, classes: tuple[str, ...] | None
) -> tuple[list[int], tuple[str, ...]]:
    """The class of each folder, and the names of all classes."""
    if NUMBERED.fullmatch(names[0]):
        numbers = [_number(name, NUMBERED, folder, num_classes) for name in names]
        words = {i: NUMBERED.fullmatch(name)[2] for i, name in zip(numbers, names, strict=True)}
        if len(words) < len(names):
            raise UserError(f"{folder}: two of its folders have the same number")
        for i in words if classes and not are_wordnet_ids(classes) else ():
            if words[i] and plain(words[i]) != plain(classes[i]):
                raise UserError(f"{folder}: class {i} is {words[i]}, but {classes[i]} in the list")
        return numbers, classes or tuple(words.get(i) or str(i) for i in range(num_classes))
    if classes is None and len(names) != num_classes:
        raise UserError(
            f"{folder} holds {len(names)} class folders and not {num_classes}: --num_classes names "
            "another number; training images of some classes need a --label_file that lists all"
        )
    if classes is None:
        return list(range(num_classes)), tuple(names)
    listed = [plain(name) for name in classes]
    for name in names:
        if listed.count(plain(name)) != 1:  # in ImageNet, cardigan is a garment and a dog
            what = "more than one" if plain(name) in listed else "none"
            raise UserError(f"{folder}/{name} is {what} of the {num_classes} classes")
    return [listed.index(plain(name)) for name in names], classes


def plain(words: str) -> str:
    """A class name without the differences between lists: underscores and capitals."""
    return words.replace("_", " ").casefold().strip()


def read_classes(label_file: str | Path, num_classes: int) -> tuple[str, ...]:
    """The names of all classes, in order.

    The file is a Python dict as text, {0: 'tench', ...}, as in Stable-ImageNet-1K, or has one line
    per class: its name, or `n01440764 tench, Tinca tinca` as in Kaggle's LOC_synset_mapping.txt,
    which gives the WordNet id. Ids have to be sorted, as the networks' outputs are. Two classes may
    have the same name: ImageNet has two cranes. Errors: UserError.
    """
    try:
        text = Path(label_file).read_text(encoding="utf-8-sig").strip()
        if text.startswith("{"):
            table = ast.literal_eval(text)
            names = [str(table[i]) for i in range(len(table))]
        else:
            names = [line.strip() for line in text.splitlines()]
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"{label_file} is not a list of classes") from error
    if len(names) != num_classes:
        raise UserError(f"{label_file} lists {len(names)} classes and not {num_classes}")
    ids = [re.split(r"\s", name)[0] for name in names]
    if not are_wordnet_ids(ids):
        return tuple(names)
    if ids != sorted(set(ids)):
        raise UserError(f"{label_file}: its WordNet ids are not sorted, or one comes twice")
    return tuple(ids)


def check_same_classes(a: ImageFiles, b: ImageFiles) -> None:
    """Errors: UserError if the names of two sets show that they number their classes differently.

    WordNet ids are not compared with words, which `list_images` has compared with torchvision's.
    """
    if are_wordnet_ids(a.classes) != are_wordnet_ids(b.classes):
        return
    for i, names in enumerate(zip(a.classes, b.classes, strict=True)):
        ours, theirs = map(plain, names)
        if ours != theirs and not ours.isdecimal() and not theirs.isdecimal():
            raise UserError(f"class {i} is {ours} in {a.folder}, and {theirs} in {b.folder}")


def names_as_in_torchvision(classes: Sequence[str]) -> int | None:
    """How many of 1000 classes have the name of torchvision's class with the same number.

    None if the classes are not named by words, or are not 1000. Errors: UserError for less than a
    tenth: ImageNet's words in another order, such as alphabetical.
    """
    names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    if len(classes) != len(names) or are_wordnet_ids(classes):
        return None
    pairs = [(a, b) for a, b in zip(classes, names, strict=True) if not a.isdecimal()]
    same = sum(plain(b) in (plain(a), plain(a.split(",")[0])) for a, b in pairs)
    if same < len(pairs) / 10:
        raise UserError(
            f"only {same} of {len(pairs)} classes have the names that torchvision's networks have "
            f"in their place; the first is {pairs[0][0]}, and there {pairs[0][1]}: another order?"
        )
    return same if pairs else None


def are_wordnet_ids(classes: Sequence[str]) -> bool:
    return all(WORDNET_ID.fullmatch(name) for name in classes)
