"""Variants of CIFAKE: fewer images, those that a teacher disputes or not, renamed or degraded ones.

    python synthetic_data/variants.py subset --count 10000 runs/variants/10000
    python synthetic_data/variants.py disputed --teacher_weights t.pth runs/variants/disputed
    python synthetic_data/variants.py jpeg --quality 5 runs/variants/jpeg

`main_train_cifar10.py --synthetic_data_dir FOLDER` trains a student on one. Its images depend only
on these flags (and, where two classes are nearly as likely, on the device that the teacher runs
on): random choices use seed 0. The folder appears when it is complete, and is never changed
afterwards.

    subset     --count images
    disputed   all images for which the teacher predicts another class than the intended one
    agreed     of the other images, as many of each class as are disputed
    matched    of the other images, as many of each class as the teacher predicts for disputed ones
    undivided  of all images, as many of each class as are disputed
    renamed    all images, each with a name of the class that the teacher predicts
    blur       all images, after a Gaussian blur of --radius pixels
    jpeg       all images, as JPEGs of --quality

Disputed, agreed and undivided sets have the same intended classes, but other classes by the
teacher, and those are what its student learns: disputed and matched sets have the same of them. The
teacher is also less sure of disputed images.
"""

import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import TEST_BATCH_SIZE, DeviceLoader, ImageSet, load_cifake, visible
from engine import predict
from experiment import flags
from experiment.device import pick_device
from experiment.errors import UserError, one_line_errors
from models import load_model

JUDGED = ("disputed", "agreed", "matched", "undivided", "renamed")
SPOILT = ("blur", "jpeg")
KINDS = ("subset", *JUDGED, *SPOILT)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__, "KIND FOLDER")
    add = parser.add_argument
    add("kind", choices=KINDS, metavar="KIND", help="see above")
    add("folder", type=Path, metavar="FOLDER", help="the new folder")
    # fmt: off
    add("--synthetic_data_dir", type=Path, default=Path("synthetic_data/cifake_train_fake"),
        metavar="DIR",
        help="CIFAKE's images [%(default)s]")
    add("--count", type=flags.int_in(1, 10**9), default=10_000, metavar="N",
        help="number of images of a subset [%(default)s]")
    add("--teacher_weights", default="teacher_cifar10_finetuned.pth", metavar="FILE",
        help="the teacher that disputes or renames images [%(default)s]")
    add("--radius", type=flags.float_in(0, 32, above=True), default=1.0, metavar="X",
        help="radius of the blur, in pixels [%(default)s]")
    add("--quality", type=flags.int_in(1, 95), default=5, metavar="N",
        help="quality of the JPEGs [%(default)s]")
    # fmt: on
    need = parser.add_need
    need("count", "KIND subset", lambda a: a.kind == "subset")
    need("teacher_weights", f"KIND {' or '.join(JUDGED)}", lambda a: a.kind in JUDGED)
    need("radius", "KIND blur", lambda a: a.kind == "blur")
    need("quality", "KIND jpeg", lambda a: a.kind == "jpeg")
    return flags.parse(parser, argv)


def main(args: Namespace) -> None:
    if os.path.lexists(args.folder):
        raise UserError(f"{args.folder} exists: name a new folder")
    if args.synthetic_data_dir.resolve() in args.folder.resolve().parents:
        raise UserError(f"{args.folder} is among the images to choose from: name another folder")
    images = load_cifake(args.synthetic_data_dir)
    files = [args.synthetic_data_dir / name for name in visible(args.synthetic_data_dir)]
    predicted = predict_classes(images, args) if args.kind in JUDGED else images.labels
    chosen = choose(images, predicted, args)
    if len(chosen) == 0:
        raise UserError("the teacher disputes none of the images")
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    private = tempfile.TemporaryDirectory(dir=args.folder.parent, prefix=".", suffix=".tmp")
    with private as folder:
        partial = Path(folder, "images")  # with the permissions of any other folder
        partial.mkdir()
        for i in chosen.tolist():
            name = files[i].name
            if args.kind == "renamed":
                name = cifake_name(i, int(predicted[i])) + files[i].suffix
            write(files[i], images.images[i], partial / name, args)
        partial.rename(args.folder)
    print(f"{args.folder}: {len(chosen):,} images")


def write(file: Path, image: Tensor, target: Path, args: Namespace) -> None:
    """Degrade `image`, uint8 (3, 32, 32), as `args.kind` says, or copy its `file` unchanged."""
    if args.kind not in SPOILT:
        shutil.copyfile(file, target)
        return
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())  # (32, 32, 3)
    if args.kind == "blur":
        blurred = picture.filter(ImageFilter.GaussianBlur(args.radius))
        blurred.save(target.with_suffix(".png"))
    else:
        picture.save(target.with_suffix(".jpg"), quality=args.quality)


def cifake_name(number: int, label: int) -> str:
    """The stem of a file name of which `cifake_label` makes `label`."""
    return f"{number:06}" + f" ({label + 1})" * (label > 0)


def predict_classes(images: ImageSet, args: Namespace) -> Tensor:
    """The classes that the teacher sees, int64 (N,). Errors: UserError."""
    device, amp = pick_device("auto", "off")
    teacher = load_model(args.teacher_weights, num_classes=10, classes=list(images.classes))
    teacher = teacher.to(device)
    loader = DeviceLoader(images, TEST_BATCH_SIZE, device, train=False)
    return predict(teacher, loader, amp).argmax(1)


def choose(images: ImageSet, predicted: Tensor, args: Namespace) -> Tensor:
    """Indices into `images`, int64 (n,), of the images of `args.kind`. Errors: UserError."""
    if args.kind in ("renamed", *SPOILT):
        return torch.arange(len(images))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    if args.kind == "subset":
        if args.count > len(images):
            raise UserError(f"--count {args.count}: there are {len(images)} images")
        return order[: args.count]
    disputed = predicted != images.labels
    if args.kind == "disputed":
        return disputed.nonzero()[:, 0]
    if args.kind in ("agreed", "matched"):
        order = order[~disputed[order]]
    classes = predicted if args.kind == "matched" else images.labels
    counts = torch.bincount(classes[disputed], minlength=len(images.classes))
    of_classes = [order[images.labels[order] == label] for label in range(len(counts))]
    if any(len(own) < n for own, n in zip(of_classes, counts, strict=True)):
        raise UserError("of some class, more images are disputed than agreed with")
    return torch.cat([own[:n] for own, n in zip(of_classes, counts, strict=True)])


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
