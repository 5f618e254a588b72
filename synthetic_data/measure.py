"""Compare a set of synthetic images with CIFAR-10: fidelity, colours, copies.

    python synthetic_data/measure.py images/own/images --output images/own/measures
    python synthetic_data/measure.py synthetic_data/cifake_train_fake --output runs/cifake_measures

The first folder holds the images. The folder --output gets two files, which must not exist yet:

    measures.json    teacher_accuracy: percent of the images for which the teacher predicts the
                     intended class; confidence: mean of its highest probability, in percent;
                     entropy: that of its outputs at T = 10, in nats (2.303 if all ten are equal);
                     labels and predictions: images of each class, as intended and by the teacher;
                     mean and std of red, green and blue, of 255; pixels, features, fid: see below
    nearest.png      24 images, each followed by the training image that is nearest to it in pixels,
                     and by the one that is nearest in the teacher's features

Images of a generator that copies are nearer to its training images than real test images are.
`pixels` is the median distance of the images to the nearest training image or its mirror image
(root mean square, of 255). `features` is the same for the teacher's features at length one (the
cosine of a distance d is 1 - d^2 / 2). Both are also given for as many real test images.

The optional torch-fidelity computes the FID against the training images, and downloads the weights
for it. If either is missing, `fid` is null. It depends on the number of images: 50,000 are usual.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import CLASSES, TEST_BATCH_SIZE, DeviceLoader, ImageSet, load_cifake, load_cifar10
from engine import predict
from experiment import flags
from experiment.device import pick_device
from experiment.errors import UserError, one_line_errors
from experiment.files import atomic_write, write_json
from models import load_model

RESULTS = ("measures.json", "nearest.png")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__, "--output DIR IMAGES")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder with CIFAKE's names")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), metavar="DIR", help="CIFAR-10 [%(default)s]"
    )
    # fmt: off
    parser.add_argument("--teacher_weights", type=Path,
        default=Path("teacher_cifar10_finetuned.pth"), metavar="FILE",
        help="an expert on real CIFAR-10 [%(default)s]")
    parser.add_argument("--limit", type=flags.int_in(24, 10**9), metavar="N",
        help="use only the first N images of each set, for a quick test [all]")
    parser.add_argument("--neighbours", type=flags.int_in(24, 10**5), default=1000, metavar="N",
        help="number of images whose nearest training images are searched [%(default)s]")
    parser.add_argument("--device", type=flags.device, default="auto",
        help="auto, cpu, cuda, cuda:N, mps, xpu or xpu:N [%(default)s]")
    # fmt: on
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    for name in RESULTS:
        if os.path.lexists(args.output / name):
            raise UserError(f"{args.output / name} exists: name another --output, or delete it")
    output = args.output.resolve()
    if args.images.resolve() in (output, *output.parents):
        raise UserError(f"{args.output} is among the images: name another folder")
    device = pick_device(args.device, "off")[0]
    torch.set_float32_matmul_precision("highest")  # distances of near copies are small differences
    teacher = load_model(args.teacher_weights, num_classes=10, classes=list(CLASSES)).to(device)
    generated = load_cifake(args.images, args.limit)
    train_set = load_cifar10(args.data_dir, train=True).first(args.limit)
    test_set = load_cifar10(args.data_dir, train=False).first(args.limit)
    args.output.mkdir(parents=True, exist_ok=True)

    logits = predict(teacher, DeviceLoader(generated, TEST_BATCH_SIZE, device, train=False))
    predictions = logits.argmax(1)
    measures = {
        "images": str(args.images),
        "count": len(generated),
        "teacher": str(args.teacher_weights),
        "teacher_accuracy": 100 * (predictions == generated.labels).float().mean().item(),
        "confidence": 100 * logits.softmax(1).amax(1).mean().item(),
        "entropy": torch.special.entr((logits / 10).softmax(1)).sum(1).mean().item(),
        "labels": by_class(generated.labels),
        "predictions": by_class(predictions),
        **colours(generated),
        **{f"{key}_of_cifar10": value for key, value in colours(train_set).items()},
    }
    samples = generated.first(min(args.neighbours, len(test_set)))
    real = test_set.first(len(samples))
    found = {}
    for name, view in (
        ("pixels", partial(as_pixels, device=device)),
        ("features", partial(as_features, teacher=teacher, device=device)),
    ):
        bank = view(train_set)
        distance, found[name] = nearest(view, samples, bank)
        measures[name] = distance.median().item()
        measures[f"{name}_of_test_images"] = nearest(view, real, bank)[0].median().item()
    measures["fid"] = frechet_inception_distance(generated, train_set, device)

    columns = [
        samples.images,
        train_set.images[found["pixels"]],
        train_set.images[found["features"]],
    ]
    apart = torch.linspace(0, len(samples) - 1, min(24, len(samples))).long()
    rows = torch.stack([column[apart] for column in columns], dim=1)  # (24, 3, 3, 32, 32)
    write_json(args.output / "measures.json", measures)
    with atomic_write(args.output / "nearest.png") as file:
        save_image(rows.flatten(0, 1) / 255, file, nrow=12, format="png")
    print(json.dumps(measures, indent=2))


def by_class(classes: Tensor) -> dict[str, int]:
    """How many of `classes`, int64 (N,), are of each of CIFAR-10's."""
    counts = classes.bincount(minlength=len(CLASSES)).tolist()
    return dict(zip(CLASSES, counts, strict=True))


def colours(data: ImageSet) -> dict[str, list[float]]:
    """Mean and standard deviation of red, green and blue, of 255."""
    count = len(data) * data.images[0, 0].numel()
    sums, squares = torch.zeros(2, 3, dtype=torch.float64)
    for part in data.images.split(10_000):  # half a million images as float64 are 12 GB
        sums += part.double().sum((0, 2, 3))
        squares += part.double().square().sum((0, 2, 3))
    mean = sums / count
    return {"mean": mean.tolist(), "std": (squares / count - mean**2).sqrt().tolist()}


def as_pixels(data: ImageSet, device: torch.device) -> Tensor:
    """float32 (N, 3072), scaled so that distances are root mean squares, of 255."""
    pixels = data.images.flatten(1).to(device).float()
    return pixels / pixels.shape[1] ** 0.5


def as_features(data: ImageSet, teacher: nn.Module, device: torch.device) -> Tensor:
    """float32 (N, D): inputs of the teacher's last layer at length one; D is 512 in a ResNet18."""
    seen = []
    last = [module for module in teacher.modules() if isinstance(module, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    predict(teacher, DeviceLoader(data, TEST_BATCH_SIZE, device, train=False))
    hook.remove()
    return F.normalize(torch.cat(seen), dim=1)


def nearest(
    view: Callable[[ImageSet], Tensor], queries: ImageSet, bank: Tensor
) -> tuple[Tensor, Tensor]:
    """The distance of each query, or of its mirror image, to the nearest row of `bank` (N, D).

    `view` turns images into rows. Mirror images count, as the generator has seen both. Returns
    float32 (Q,) and int64 (Q,), on the CPU.
    """
    mirrored = replace(queries, images=queries.images.flip(3))
    found = []
    for data in (queries, mirrored):
        parts = [torch.cdist(part, bank).min(1) for part in view(data).split(100)]
        found.append([torch.cat(column) for column in zip(*parts, strict=True)])
    (one, one_index), (two, two_index) = found
    return torch.minimum(one, two).cpu(), torch.where(one <= two, one_index, two_index).cpu()


def frechet_inception_distance(
    generated: ImageSet, train_set: ImageSet, device: torch.device
) -> float | None:
    """The FID by torch-fidelity. None if it is not available: a line says why."""
    try:
        import torch_fidelity

        metrics = torch_fidelity.calculate_metrics(  # it asks for a Dataset
            input1=Subset(generated.images, range(len(generated))),
            input2=Subset(train_set.images, range(len(train_set))),
            cuda=device.type == "cuda",
            fid=True,
            verbose=False,
        )
    except ImportError:
        print("FID: not available, for want of torch-fidelity: `pip install torch-fidelity`")
        return None
    except OSError as error:  # URLError is one
        print(f"FID: not available, as the weights of its network are not: {error}")
        return None
    return metrics["frechet_inception_distance"]


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
