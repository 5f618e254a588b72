"""Which images a folder holds, and of which classes: the layouts that ImageNet's like come in.

Every name is looked at, and no image is opened: folders.py does that.
"""

import ast
import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from experiment import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png")
WORDNET_ID = re.compile(r"n\d{8}", re.ASCII)  # n01440764
NUMBERED = re.compile(r"(\d+)(?:_(.+))?", re.ASCII)  # 000_tench, or 0
DMKD = re.compile(r"class_(\d+)_seed_\d+_num_\d+\.png", re.ASCII)


@dataclass(frozen=True)
class ImageFiles:
    """names: bytes (N,), paths below `folder`; labels: int64 (N,), indices into `classes`.

    The names are one array, as a list would be copied into every worker, bit by bit: counting the
    references to its strings writes to their memory (https://github.com/pytorch/pytorch/issues/13246).
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
        """n images, evenly spaced, as the first n would be of a class or two; all for None."""
        n = min(n or len(self), len(self))
        index = torch.arange(n) * len(self) // n
        return replace(self, names=self.names[index.numpy()], labels=self.labels[index])


# ------------------------------------------------------------------------------------ class folders


def list_images(
    folder: str | Path, num_classes: int = 1000, classes: tuple[str, ...] | None = None
) -> ImageFiles:
    """The images of a set for training, or of a validation set in class folders, sorted by name.

    n01440764/*.JPEG        a folder a class, by WordNet id, as ImageNet comes
    000_tench/*.jpg         by number and words: Stable-ImageNet-1K (generate_imagenet1k.py of
                            github.com/vkinakh/stable-diffusion-imagenet); plain numbers, too
    apple/*.png             by words
    class_0_seed_1_num_2.png    no class folders: DM-KD (AIGC_generate.py of
                            github.com/zhengli97/DM-KD)

    A number is the class, and some may lack images. Else the folders, sorted, are the classes, and
    have to be `num_classes`; for the 1000 WordNet ids of ImageNet this is the usual order, that of
    every published network. A folder with only some of its teacher's classes needs `classes`, all
    of them in order, from `read_classes`; numbered folders are checked against them, and words for
    1000 classes against torchvision's. Nothing but hidden files is passed over. Errors: UserError
    that names the file and the rule.
    """
    folder = str(folder)
    names, labels = [], []
    if _is_flat(folder):
        names = _entries(folder, folders=False)
        labels = [_number(name, DMKD, folder, num_classes) for name in names]
        classes = classes or tuple(map(str, range(num_classes)))
    else:
        folders = _entries(folder, folders=True)
        numbers, classes = _label_folders(folder, folders, num_classes, classes)
        for name, number in zip(folders, numbers, strict=True):
            inside = _entries(os.path.join(folder, name), folders=False)
            names += [f"{name}/{file}" for file in inside]
            labels += [number] * len(inside)
    if not names:
        raise UserError(f"there are no images in {folder}")
    names_as_in_torchvision(classes)
    return ImageFiles(folder, _as_bytes(names), torch.tensor(labels), classes)


def _is_flat(folder: str) -> bool:
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")
    with os.scandir(folder) as entries:
        return any(not entry.is_dir() for entry in entries if not entry.name.startswith("."))


def _entries(folder: str, folders: bool) -> list[str]:
    """The names in `folder`, sorted: class folders, or images. Errors: UserError on any other."""
    with os.scandir(folder) as entries:
        found = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    for name, is_folder in found:
        if is_folder != folders:
            what, rule = ("folder", "images") if is_folder else ("file", "class folders")
            raise UserError(f"{os.path.join(folder, name)}: a {what} where there should be {rule}")
        if not folders and os.path.splitext(name)[1].lower() not in EXTENSIONS:
            raise UserError(f"{os.path.join(folder, name)}: not a .jpg, .jpeg or .png file")
    return [name for name, _ in found]


def _as_bytes(names: list[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names])


def _number(name: str, pattern: re.Pattern, folder: str, num_classes: int) -> int:
    match = pattern.fullmatch(name)
    if match is None or int(match[1]) >= num_classes:
        rule = {DMKD: "class_<id>_seed_<n>_num_<k>.png", NUMBERED: "<id> or <id>_<words>"}[pattern]
        raise UserError(
            f"{os.path.join(folder, name)}: its name is not {rule} with an id below {num_classes}"
        )
    return int(match[1])


def _label_folders(
    folder: str, names: list[str], num_classes: int, classes: tuple[str, ...] | None
) -> tuple[list[int], tuple[str, ...]]:
    """The class of each folder, and the names of all classes."""
    if not names or NUMBERED.fullmatch(names[0]):
        numbers = [_number(name, NUMBERED, folder, num_classes) for name in names]
        words = {i: NUMBERED.fullmatch(name)[2] for i, name in zip(numbers, names, strict=True)}
        if len(words) < len(names):
            raise UserError(f"{folder}: two of its folders have the same number")
        for i in words if classes else ():
            if words[i] and plain(words[i]) != plain(classes[i]):
                raise UserError(f"{folder}: class {i} is {words[i]}, but {classes[i]} in the list")
        return numbers, classes or tuple(words.get(i) or str(i) for i in range(num_classes))
    if classes is None and len(names) != num_classes:
        raise UserError(
            f"{folder} holds {len(names)} class folders and not {num_classes}: a part of the "
            "classes needs a label file that lists them all"
        )
    index = {plain(name): i for i, name in enumerate(classes or names)}
    for name in names:
        if plain(name) not in index:
            raise UserError(f"{os.path.join(folder, name)}: none of the {num_classes} classes")
    return [index[plain(name)] for name in names], classes or tuple(names)


def plain(words: str) -> str:
    """The name of a class without what differs between lists: underscores and capitals."""
    return words.replace("_", " ").casefold().strip()


def read_classes(label_file: str | Path, num_classes: int) -> tuple[str, ...]:
    """The names of all classes in order. Errors: UserError.

    Either a Python dict as text, {0: 'tench', ...}, as the label file of Stable-ImageNet-1K, or a
    line a class: its name, or `n01440764 tench, Tinca tinca`, as Kaggle's LOC_synset_mapping.txt,
    of which the WordNet id is taken. Those have to be sorted: that is the order of the networks.
    """
    try:
        text = Path(label_file).read_text(encoding="utf-8").strip()
        if text.startswith("{"):
            table = ast.literal_eval(text)
            names = [str(table[i]) for i in range(len(table))]
        else:
            names = [line.strip() for line in text.splitlines()]
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"{label_file} is not a list of classes") from error
    ids = [name.split(" ")[0] for name in names]
    if are_wordnet_ids(ids):
        names = ids
        if names != sorted(names):
            raise UserError(f"{label_file}: its WordNet ids are not sorted; the classes are")
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise UserError(f"{label_file} lists {len(set(names))} classes and not {num_classes}")
    return tuple(names)


def check_same_classes(a: ImageFiles, b: ImageFiles) -> None:
    """Errors: UserError where two sets do not number the same classes, as far as names tell.

    WordNet ids and words do not compare: words have been compared with torchvision's instead.
    """
    if len(a.classes) != len(b.classes):
        raise UserError(
            f"{a.folder} has {len(a.classes)} classes, and {b.folder} has {len(b.classes)}"
        )
    if are_wordnet_ids(a.classes) == are_wordnet_ids(b.classes):
        for i, names in enumerate(zip(a.classes, b.classes, strict=True)):
            ours, theirs = map(plain, names)
            if ours != theirs and not ours.isdecimal() and not theirs.isdecimal():
                raise UserError(f"class {i} is {ours} in {a.folder}, and {theirs} in {b.folder}")


def names_as_in_torchvision(classes: Sequence[str]) -> int | None:
    """How many of 1000 classes have the name that torchvision's networks have in their place.

    None if the classes are not named by words, or are not 1000. Errors: UserError if hardly any is:
    the words of ImageNet in another order, by the alphabet, say, which no other check would see.
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


# ------------------------------------------------------------------------------- the validation set


def list_validation(
    folder: str | Path, num_classes: int = 1000, ground_truth: str | Path | None = None
) -> ImageFiles:
    """The validation set, in class folders, or flat with its labels in the file `ground_truth`.

    Flat, the files are ILSVRC2012_val_00000001.JPEG and on, and the labels come from

    LOC_val_solution.csv                       of Kaggle, which gives each image its WordNet id, or
    ILSVRC2012_validation_ground_truth.txt     of the official devkit, a number a line, 1 to 1000.

    The trap: these numbers are NOT the classes of any network. Networks count WordNet ids in sorted
    order, from 0; the devkit has an order of its own, from 1, so that its 490 for the first image
    is class 65. Taken as they are, they test any network at 0.1 %. What they stand for is read from
    meta.mat (which takes scipy) or map_clsloc.txt, one of which has to lie beside the file.
    Errors: UserError.
    """
    folder = str(folder)
    if not _is_flat(folder):
        if ground_truth is not None:
            raise UserError(f"{folder} has class folders: it takes no {ground_truth}")
        return list_images(folder, num_classes)
    names = _entries(folder, folders=False)
    for number, name in enumerate(names, start=1):
        if name != f"ILSVRC2012_val_{number:08d}.JPEG":
            raise UserError(f"{os.path.join(folder, name)} is not ILSVRC2012_val_{number:08d}.JPEG")
    if ground_truth is None:
        raise UserError(
            f"{folder} has no class folders: its labels are needed, LOC_val_solution.csv or "
            "ILSVRC2012_validation_ground_truth.txt"
        )
    read = _read_solution if str(ground_truth).endswith(".csv") else _read_devkit
    try:
        wordnet_ids, classes = read(Path(ground_truth), names)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{ground_truth} does not hold the labels of {folder}: {error}") from error
    if len(wordnet_ids) != len(names) or len(classes) != num_classes:
        raise UserError(
            f"{ground_truth} has {len(wordnet_ids)} images of {len(classes)} classes; {folder} has "
            f"{len(names)} images, and {num_classes} classes are wanted"
        )
    index = {wordnet_id: i for i, wordnet_id in enumerate(classes)}
    labels = torch.tensor([index[wordnet_id] for wordnet_id in wordnet_ids])
    return ImageFiles(folder, _as_bytes(names), labels, tuple(classes))


def _read_solution(path: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """The WordNet id of each image, and all of them, sorted."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    if len(rows) != len(names):
        raise ValueError(f"{len(rows)} rows for {len(names)} images")
    return [rows[name.removesuffix(".JPEG")] for name in names], sorted(set(rows.values()))


def _read_devkit(path: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """The same, from the official numbers and what lies beside them."""
    numbers = [int(line) for line in path.read_text(encoding="utf-8").split()]
    meta, text = path.with_name("meta.mat"), path.with_name("map_clsloc.txt")
    if text.exists():  # n02119789 1 kit_fox
        lines = [line.split() for line in text.read_text(encoding="utf-8").splitlines()]
        wordnet_ids = {int(line[1]): line[0] for line in lines}
    elif meta.exists():
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise UserError(f"to read {meta}, `pip install scipy`") from error
        synsets = loadmat(meta, squeeze_me=True)["synsets"]  # number, id, ..., children, ...
        wordnet_ids = {int(row[0]): str(row[1]) for row in synsets if row[4] == 0}  # leaves
    else:
        raise UserError(
            f"the numbers in {path} mean nothing without meta.mat or map_clsloc.txt beside it"
        )
    return [wordnet_ids[number] for number in numbers], sorted(set(wordnet_ids.values()))
