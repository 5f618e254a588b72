"""A set of synthetic images on disk: its images, their names, and how it is written.

OUTPUT/
    images/            the images, which a student reads, and nothing else
    config.json        the flags that the images depend on, and for each part of the job its
                       command, commit, versions and hardware
    contact_sheets/    64 images of each class; contact_sheet.png has ten of the first 100
    manifest.csv       one row per image; written last: a set that has one is finished

Several processes may write to one set. Each writes its own images. The other files are the same,
whichever process writes them.
"""

import csv
import functools
import io
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

from data import CLASSES
from experiment.errors import UserError
from experiment.files import atomic_write, write_json
from experiment.folder import FORMAT, read_config
from synthetic_data.classes import Category

# Flags that may differ when a stopped job is resumed: they change no image, but for rounding. The
# model and the dtype are compared separately, as their defaults depend on other flags.
FREE = ("output", "overwrite", "batch_size", "device", "model", "dtype")
# The files of a set, which --overwrite deletes, with those that a killed process may leave.
FILES = {
    "images": re.compile(r"([^/]+/)?\d{6}( \(\d+\))?\.png", re.DOTALL),
    "contact_sheets": re.compile(r"[^/]+\.(png|tmp)", re.DOTALL),
}


@dataclass(frozen=True)
class Plan:
    """The names, classes and seeds of a set's images; it makes none.

    Image n is number n // C of class n % C. So a set is balanced wherever it stops, and a smaller
    set has the first images of a larger one, as a student with --limit takes them.
    """

    categories: list[Category]
    args: Namespace  # of generate.py
    model: str  # its name or path

    def __len__(self) -> int:
        return len(self.categories) * self.args.per_class

    def file(self, n: int) -> str:
        """The path in images/: CIFAKE's names for CIFAR-10, see `data.cifake_label`; else folders.

        PNG is lossless: the pixels do not depend on the encoder's version or settings.
        """
        index, label = divmod(n, len(self.categories))
        if self._is_cifar10:
            return f"{index:06d}.png" if label == 0 else f"{index:06d} ({label + 1}).png"
        return f"{self.categories[label].folder}/{index:06d}.png"

    @functools.cached_property
    def _is_cifar10(self) -> bool:
        return tuple(category.name for category in self.categories) == CLASSES

    def condition(self, n: int) -> str | int:
        """What the model is conditioned on: a prompt, the number of an ImageNet class, a label."""
        index, label = divmod(n, len(self.categories))
        category = self.categories[label]
        if self.args.pipeline == "stable-diffusion":
            prompt = category.prompts[index % len(category.prompts)]
            return self.args.prompt.replace("{class}", prompt)
        if self.args.pipeline == "dit":
            return category.imagenet[index % len(category.imagenet)]
        return label

    def image_seed(self, n: int) -> int:
        """32 bits from (seed, class, number), for a `torch.Generator` on the CPU.

        PyTorch's CPU generator reads only 32 bits of a seed. With a hash of all three, some of
        500,000 images would share their noise. So the seeds are counted, from a start that depends
        on --seed.
        """
        index, label = divmod(n, len(self.categories))
        return (self._start + 4096 * index + label) % 2**32

    @functools.cached_property
    def _start(self) -> int:
        return int(np.random.SeedSequence(self.args.seed).generate_state(1)[0])

    def generators(self, numbers: range) -> list[torch.Generator]:
        """One for each image, whose noise then does not depend on the rest of its batch."""
        return [torch.Generator().manual_seed(self.image_seed(n)) for n in numbers]

    def manifest(self) -> Iterator[tuple]:
        """The header and the rows of manifest.csv."""
        args = self.args
        yield "file", "class", "prompt", "seed", "guidance_scale", "steps", "model"
        for n in range(len(self)):
            name, seed = self.categories[n % len(self.categories)].name, self.image_seed(n)
            origin = (args.guidance_scale, args.steps, self.model)
            yield f"images/{self.file(n)}", name, self.condition(n), seed, *origin


def claim(args: Namespace, identity: dict, part: dict) -> None:
    """Begin the set in --output, or resume it. Errors: UserError when it is another one.

    `identity` has to be the same, beside the flags; `part` is the provenance of the images.
    """
    images = args.output / "images"
    stored = {key: value for key, value in vars(args).items() if key not in FREE}
    listed = [args.output.name] if args.output.exists() else []
    if args.output.is_dir():
        names = os.listdir(args.output)
        listed = [name for name in names if name != "config.json" and not name.endswith(".tmp")]
    begun = (args.output / "config.json").exists()  # after looking: see the end
    config = read_config(args.output) if begun else {}
    if (listed or begun) and config.get("name") != "images" and not args.overwrite:
        raise UserError(f"{args.output} holds something else already: name a new folder")
    if begun and images.exists() and existing(images):
        before = {f"--{key}": value for key, value in config["args"].items()} | config
        for key, value in ({f"--{key}": x for key, x in stored.items()} | identity).items():
            if before.get(key) != value:
                raise UserError(
                    f"{args.output} was made with {key} {before.get(key)}, not {value}: name "
                    "another --output, or --overwrite this one"
                )
        return
    args.output.mkdir(parents=True, exist_ok=True)
    config = {"name": "images", "format": FORMAT, **identity, "args": stored, "parts": [part]}
    write_json(args.output / "config.json", config)
    images.mkdir(exist_ok=True)  # last: another process that sees it has to find config.json


def add_part(output: Path, part: dict) -> None:
    """Add the provenance of a resumed job's images to config.json. Errors: UserError."""
    config = read_config(output)
    write_json(output / "config.json", {**config, "parts": [*config["parts"], part]})


def discard(output: Path) -> None:
    """Delete a set, and no other files beside it. Errors: UserError."""
    if not output.exists():
        return
    if not (output / "config.json").exists() or read_config(output).get("name") != "images":
        raise UserError(f"{output} is no set of images: --overwrite does not delete it")
    folders = [folder for name in FILES if (folder := output / name).is_dir()]
    for folder in folders:
        if folder.is_symlink():
            raise UserError(f"{folder} leads to another place: --overwrite keeps all of it")
        for file in existing(folder):
            if not FILES[folder.name].fullmatch(file):
                raise UserError(f"{folder / file} is not of the set: --overwrite keeps all of it")
    (output / "manifest.csv").unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder)
    (output / "contact_sheet.png").unlink(missing_ok=True)
    (output / "config.json").unlink()  # last: it says that the rest may be deleted


def existing(images: Path) -> set[str]:
    """The files of a set that are there, as `Plan.file` names them."""
    files = set()
    for entry in os.scandir(images):
        if entry.is_dir():
            files.update(f"{entry.name}/{name}" for name in os.listdir(entry.path))
        else:
            files.add(entry.name)
    return files


def write_image(path: Path, pixels: np.ndarray, partial: Path) -> None:
    """Write uint8 (H, W, 3) as a PNG, first to `partial`: images/ never holds half a file.

    Unlike `atomic_write` it does not wait for the disk, which would take longer than making the
    images. Killing the process does no harm; a power failure may. Errors: UserError.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(partial, format="PNG")
        os.replace(partial, path)
    except OSError as error:  # on a full disk the error names no file
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written: {reason}; the images before it stay") from error


def finish(plan: Plan) -> None:
    """Write the contact sheets and manifest.csv. Errors: UserError when it is another one."""
    output, size = plan.args.output, len(plan.categories)
    path, text = output / "manifest.csv", io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # also for a "\r"
    writer.writerows(plan.manifest())
    manifest = text.getvalue().encode(errors="surrogateescape")  # a path need not be UTF-8
    if path.exists():
        if path.read_bytes() != manifest:
            raise UserError(
                f"{path} disagrees with the flags: name another --output, or --overwrite this one"
            )
    else:
        (output / "contact_sheets").mkdir(exist_ok=True)
        for label, category in enumerate(plan.categories):
            numbers = range(label, len(plan), size)[:64]
            sheet = output / "contact_sheets" / f"{category.folder}.png"
            _write_sheet(sheet, plan, numbers, columns=8)
        rows = [n for label in range(min(size, 100)) for n in range(label, len(plan), size)[:10]]
        _write_sheet(output / "contact_sheet.png", plan, rows, min(10, plan.args.per_class))
        with atomic_write(path) as file:
            file.write(manifest)
    print(f"{output} is finished: {len(plan):,} images, manifest.csv, contact_sheet.png")


def _write_sheet(path: Path, plan: Plan, numbers: Sequence[int], columns: int) -> None:
    pictures = []
    for n in numbers:
        with Image.open(plan.args.output / "images" / plan.file(n)) as picture:
            pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))  # (3, H, W)
    sheet = make_grid(torch.stack(pictures), nrow=columns, pad_value=255).permute(1, 2, 0)
    with atomic_write(path) as file:
        Image.fromarray(sheet.numpy()).save(file, format="PNG")
