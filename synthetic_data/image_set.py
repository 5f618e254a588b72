"""A set of synthetic images on disk: which images it has, what they are called, how it is written.

OUTPUT/
    images/            what a student reads, and nothing else
    config.json        every flag, the command, git commit, versions, hardware
    contact_sheets/    64 images of each class; contact_sheet.png has ten of each
    manifest.csv       a row an image; written last: a set that has one is finished

Several processes may write to one set: each writes its own images, and the rest is the same
whoever writes it.
"""

import csv
import functools
import io
import json
import os
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
from experiment import UserError, read_config, replacing, surroundings
from synthetic_data.classes import Category

# What may differ when a stopped job goes on: what it runs on, not what it makes.
FREE = ("output", "overwrite", "batch_size", "device")


@dataclass(frozen=True)
class Plan:
    """Which images a set consists of, without making any.

    Image n shows class n % C as its number n // C. So a set is balanced wherever it stops, and the
    images of a smaller set are the first of a larger one, which is how a student's --limit takes
    them.
    """

    categories: list[Category]
    args: Namespace  # of generate.py

    def __len__(self) -> int:
        return len(self.categories) * self.args.per_class

    def label(self, n: int) -> int:
        return n % len(self.categories)

    def file(self, n: int) -> str:
        """The path in images/: CIFAKE's names for CIFAR-10, see `data.cifake_label`; else folders.

        PNG loses nothing, and no encoder's version or settings show in the pixels.
        """
        index, label = divmod(n, len(self.categories))
        if tuple(category.name for category in self.categories) == CLASSES:
            return f"{index:06d}.png" if label == 0 else f"{index:06d} ({label + 1}).png"
        return f"{self.categories[label].folder}/{index:06d}.png"

    def asked(self, n: int) -> str | int:
        """What the model is asked for: a prompt, the number of an ImageNet class, or a label."""
        index, label = divmod(n, len(self.categories))
        category = self.categories[label]
        if self.args.pipeline == "stable-diffusion":
            subject = category.subjects[index % len(category.subjects)]
            return self.args.prompt.replace("{class}", subject)
        if self.args.pipeline == "dit":
            return category.imagenet[index % len(category.imagenet)]
        return label

    def image_seed(self, n: int) -> int:
        """32 bits out of (seed, class, number), for a `torch.Generator` on the CPU.

        PyTorch's CPU generator reads no more than 32 bits of a seed: were they hashed from all
        three, some of 500,000 images would share their noise. So they are counted, from a place
        that depends on the seed.
        """
        index, label = divmod(n, len(self.categories))
        return (self._start + 4096 * index + label) % 2**32

    @functools.cached_property
    def _start(self) -> int:
        return int(np.random.SeedSequence(self.args.seed).generate_state(1)[0])

    def generators(self, numbers: range) -> list[torch.Generator]:
        """One for each image: its noise does not depend on the others of its batch."""
        return [torch.Generator().manual_seed(self.image_seed(n)) for n in numbers]

    def manifest(self) -> Iterator[tuple]:
        """The header and the rows of manifest.csv."""
        args = self.args
        yield "file", "class", "prompt", "seed", "guidance_scale", "steps", "model"
        for n in range(len(self)):
            name, seed = self.categories[self.label(n)].name, self.image_seed(n)
            origin = (args.guidance_scale, args.steps, args.model)
            yield f"images/{self.file(n)}", name, self.asked(n), seed, *origin


def claim(args: Namespace, identity: dict, tag: str) -> None:
    """Begin the set in --output, or go on with it. Errors: UserError when it is not this one.

    `identity` is what has to be the same beside the flags; `tag` tells processes apart.
    """
    path, images = args.output / "config.json", args.output / "images"
    stored = {key: value for key, value in vars(args).items() if key not in FREE}
    listed = [args.output.name] if args.output.exists() else []
    if args.output.is_dir():
        listed = [name for name in os.listdir(args.output) if not name.startswith(path.name)]
    config = read_config(args.output) if path.exists() else {}  # after looking: see the end
    if (listed or config) and config.get("kind") != "images" and not args.overwrite:
        raise UserError(f"{args.output} holds something else already: name a new folder")
    if config and images.exists() and existing(images):
        otherwise = "name another --output, or --overwrite this one"
        for key, value in stored.items():
            was = config["args"].get(key)
            if was != value:
                raise UserError(
                    f"{args.output} was made with --{key} {was}, not {value}: {otherwise}"
                )
        for key, value in identity.items():
            if config.get(key) != value:
                raise UserError(f"{args.output} was begun with another {key}: {otherwise}")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    config = {"kind": "images", **surroundings(args.device), **identity, "args": stored}
    with replacing(path, tag) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
    images.mkdir(exist_ok=True)  # last: another process that sees it has to find config.json


def discard(output: Path) -> None:
    """Delete a set, and nothing else that may lie beside it. Errors: UserError."""
    if not output.exists():
        return
    if not (output / "config.json").exists() or read_config(output).get("kind") != "images":
        raise UserError(f"{output} is no set of images: --overwrite does not delete it")
    (output / "manifest.csv").unlink(missing_ok=True)
    for folder in ("images", "contact_sheets"):
        shutil.rmtree(output / folder, ignore_errors=True)
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
    """uint8 (H, W, 3) as a PNG, by way of the file `partial`: images/ never holds half a file.

    There is no waiting for the disk, as in `experiment.replacing`: it would take longer than
    making the images. Killing the process does no harm; a power failure may. Errors: UserError.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(partial, format="PNG")
        os.replace(partial, path)
    except OSError as error:  # a full disk, say: it names no file
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written: {reason}; the images before it stay") from error
    finally:
        partial.unlink(missing_ok=True)


def finish(plan: Plan, tag: str) -> None:
    """Write the contact sheets and manifest.csv. Errors: UserError when it is another one."""
    output, size = plan.args.output, len(plan.categories)
    path, text = output / "manifest.csv", io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(plan.manifest())
    if path.exists():
        if path.read_text(encoding="utf-8") != text.getvalue():
            raise UserError(
                f"{path} disagrees with the flags: name another --output, or --overwrite this one"
            )
    else:
        (output / "contact_sheets").mkdir(exist_ok=True)
        for label, category in enumerate(plan.categories):
            numbers = range(label, len(plan), size)[:64]
            sheet = output / "contact_sheets" / f"{category.folder}.png"
            _write_sheet(sheet, plan, numbers, columns=8, tag=tag)
        rows = [n for label in range(min(size, 100)) for n in range(label, len(plan), size)[:10]]
        columns = min(10, plan.args.per_class)
        _write_sheet(output / "contact_sheet.png", plan, rows, columns, tag)
        with replacing(path, tag) as file:
            file.write(text.getvalue().encode())
    print(f"{output} is finished: {len(plan):,} images, manifest.csv, contact_sheet.png")


def _write_sheet(path: Path, plan: Plan, numbers: Sequence[int], columns: int, tag: str) -> None:
    pictures = []
    for n in numbers:
        with Image.open(plan.args.output / "images" / plan.file(n)) as picture:
            pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))  # (3, H, W)
    sheet = make_grid(torch.stack(pictures), nrow=columns, pad_value=255).permute(1, 2, 0)
    with replacing(path, tag) as file:
        Image.fromarray(sheet.numpy()).save(file, format="PNG")
