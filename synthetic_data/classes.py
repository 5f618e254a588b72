"""What to make images of: the classes of CIFAR-10, CIFAR-100 and ImageNet, or those of a file.

A file has a line a class: its name; then, after commas and where wanted, what to ask a text model
for (several are taken in turn, and are separated by semicolons), and the numbers of the ImageNet
classes that show it, for DiT. `classes/cifar10.csv` is one. Lines that start with # are comments.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from torchvision.models import ResNet18_Weights

from experiment import UserError

FILES = {
    name: Path(__file__).parent / "classes" / f"{name}.csv" for name in ("cifar10", "cifar100")
}


@dataclass(frozen=True)
class Category:
    """`subjects` are ways to ask for a class, `imagenet` the ImageNet classes that show it."""

    name: str
    folder: str
    subjects: tuple[str, ...]
    imagenet: tuple[int, ...] = ()


def load_classes(source: str) -> list[Category]:
    """The classes that `source` names: cifar10, cifar100, imagenet or a file. Errors: UserError."""
    if source == "imagenet":
        names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
        # numbered, so that the sorted folders are in ImageNet's order
        return [Category(n, f"{i:03d}_{n}", (_ask(n),), (i,)) for i, n in enumerate(names)]
    path = FILES.get(source, Path(source))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(
            f"--classes {source} is none of cifar10, cifar100, imagenet, nor is there such a file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8") from error
    categories: dict[str, Category] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            category = _category(line)
            if category.name in categories:
                raise ValueError(f"class {category.name} comes twice")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        categories[category.name] = category
    if not categories:
        raise UserError(f"{path} names no class")
    return list(categories.values())


def named(names: list[str]) -> list[Category]:
    """Classes of which nothing is known but their names."""
    return [Category(name, name, (_ask(name),)) for name in names]


def _category(line: str) -> Category:
    name, *rest = (part.strip() for part in line.split(",", 2))
    if not re.fullmatch(r"\w[\w .'()&+-]*", name) or name.endswith("."):
        raise ValueError(f"{name!r} cannot be the name of a folder")
    subjects = tuple(part.strip() for part in rest[0].split(";")) if rest and rest[0] else ()
    numbers = rest[1].split() if len(rest) > 1 else []
    if not all(number.isdecimal() and int(number) < 1000 for number in numbers):
        raise ValueError(f"{rest[1]!r} are no ImageNet classes: numbers from 0 to 999")
    return Category(name, name, subjects or (_ask(name),), tuple(map(int, numbers)))


def _ask(name: str) -> str:
    article = "an" if name[0].lower() in "aeiou" else "a"
    return f"{article} {name.replace('_', ' ')}"
