"""The classes to make images of: those of CIFAR-10, CIFAR-100, ImageNet or a file.

A file is a CSV with one row per class and up to three columns: its name; prompts for a text model,
separated by semicolons and used in turn; and the numbers of the ImageNet classes that show it, for
DiT. A prompt with a comma needs double quotes around the column. Lines that start with # are
comments. `classes/cifar10.csv` is such a file.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from torchvision.models import ResNet18_Weights

from experiment.errors import UserError

FILES = {
    name: Path(__file__).parent / "classes" / f"{name}.csv" for name in ("cifar10", "cifar100")
}


@dataclass(frozen=True)
class Category:
    """A class: `prompts` are ways to ask for it, `imagenet` the ImageNet classes that show it."""

    name: str
    folder: str
    prompts: tuple[str, ...]
    imagenet: tuple[int, ...] = ()


def load_classes(source: str) -> list[Category]:
    """The classes that `source` names: cifar10, cifar100, imagenet or a file. Errors: UserError."""
    if source == "imagenet":
        names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
        # numbered, so that the sorted folders are in ImageNet's order
        return [Category(n, f"{i:03d}_{n}", (_ask(n),), (i,)) for i, n in enumerate(names)]
    path = FILES.get(source, Path(source))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except FileNotFoundError as error:
        raise UserError(
            f"--classes {source} is none of cifar10, cifar100, imagenet, nor is there such a file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8") from error
    categories: dict[str, Category] = {}
    reader = csv.reader(
        ("\n" if line.lstrip().startswith("#") else line for line in lines), skipinitialspace=True
    )
    try:
        for row in reader:
            if not any(row):
                continue
            category = _category(*(column.strip() for column in row))
            if category.name in categories:
                raise ValueError(f"class {category.name} comes twice")
            categories[category.name] = category
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error
    if not categories:
        raise UserError(f"{path} names no class")
    return list(categories.values())


def named(names: list[str]) -> list[Category]:
    """Classes that are known by their names only. Errors: UserError.

    The names come from a model's file and become folders: a name that leads elsewhere is refused.
    """
    for name in names:
        if not name or name.startswith(".") or re.search(r"[/\\\0]", name):
            raise UserError(f"the class {name!r} of the model cannot be the name of a folder")
    if len(set(names)) < len(names):
        raise UserError("the model has two classes of one name")
    return [Category(name, name, (_ask(name),)) for name in names]


def _category(name: str, prompts: str = "", imagenet: str = "", *more: str) -> Category:
    if not re.fullmatch(r"\w[\w .'()&+-]*", name) or name.endswith("."):
        raise ValueError(f"{name!r} cannot be the name of a folder")
    if more:
        raise ValueError("more than three columns: prompts with a comma need double quotes")
    numbers = imagenet.split()
    if not all(number.isdecimal() and int(number) < 1000 for number in numbers):
        raise ValueError(f"{imagenet!r} are no ImageNet classes: numbers from 0 to 999")
    ways = tuple(part.strip() for part in prompts.split(";")) if prompts else (_ask(name),)
    if not all(ways):
        raise ValueError("an empty prompt")
    return Category(name, name, ways, tuple(map(int, numbers)))


def _ask(name: str) -> str:
    article = "an" if name[0].lower() in "aeiou" else "a"
    return f"{article} {name.replace('_', ' ')}"
