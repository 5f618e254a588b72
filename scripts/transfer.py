"""What passes from a teacher to its student: both on CIFAKE, on real training and on test images.

    python scripts/transfer.py weights/airbench94_cifar10.pth weights/airbench94_cifake.pth \\
        --augment rrc_jitter --output results/transfer

Nothing is trained. Writes three tables to --output:

    sets.csv        accuracy of both (on CIFAKE: of its own labels), their agreement, the student's
                    KD loss at T = 10, and the teacher's confidence, its mean highest probability.
                    `weighted` is the agreement if the set had the confidences of the test set
    confidence.csv  agreement by the teacher's confidence
    statistics.csv  the student's accuracy on the test set with BatchNorm statistics of 5,000 images
                    of CIFAKE, or of real training images, under --augment
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from augmentations import AUGMENTATIONS
from data import CLASSES, TEST_BATCH_SIZE, DeviceLoader, ImageSet, load_cifake, load_cifar10
from engine import compare, evaluate, predict, score
from experiment import flags
from experiment.device import pick_device, seed_everything
from experiment.errors import one_line_errors
from experiment.files import write_csv
from models import load_model

TEMPERATURE = 10.0
EDGES = (0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)  # of the teacher's confidence


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__, "TEACHER STUDENT")
    add = parser.add_argument
    add("teacher", type=Path, metavar="TEACHER", help="its weight file")
    add("student", type=Path, metavar="STUDENT", help="its weight file")
    add("--data_dir", type=Path, default=Path("data"), metavar="DIR", help="CIFAR-10 [%(default)s]")
    # fmt: off
    add("--synthetic_data_dir", type=Path, default=Path("synthetic_data/cifake_train_fake"),
        metavar="DIR", help="the images of CIFAKE's train/FAKE [%(default)s]")
    add("--augment", choices=AUGMENTATIONS, default="crop",
        help="what the student was trained with [%(default)s]")
    add("--limit", type=flags.int_in(1, 10**9), metavar="N",
        help="use only the first N images of each set")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder of the tables")
    # fmt: on
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    device, _ = pick_device("auto", "off")
    pair = [
        load_model(path, num_classes=10, classes=list(CLASSES)).to(device)
        for path in (args.teacher, args.student)
    ]
    sets = {
        "real test": load_cifar10(args.data_dir, train=False).first(args.limit),
        "real training": load_cifar10(args.data_dir, train=True).first(args.limit),
        "CIFAKE": load_cifake(args.synthetic_data_dir, args.limit),
    }
    loaders = {
        name: DeviceLoader(images, TEST_BATCH_SIZE, device, train=False)
        for name, images in sets.items()
    }
    rows, bins, shares = [], [], None
    for name, images in sets.items():
        logits = [predict(model, loaders[name]) for model in pair]
        counts, agreement = by_confidence(*logits)
        for i, (low, high) in enumerate(pairwise(EDGES)):
            bins.append([name, low, high, counts[i].item(), agreement[i].item()])
        shares = counts / counts.sum() if shares is None else shares  # of the test set
        same = compare(logits[1], logits[0], TEMPERATURE)
        row = [name, *(score(x, images.labels)["accuracy"] for x in logits), same["agreement"]]
        row += [weighted(counts, agreement, shares).item(), same["loss"]]
        rows.append([*row, 100 * logits[0].softmax(1).amax(1).mean().item()])
    columns = "set teacher student agreement weighted kd_loss confidence"
    write(args.output / "sets.csv", columns, rows)
    write(args.output / "confidence.csv", "set from to images agreement", bins)
    accuracies = [["stored", rows[0][2]]]  # of the student on the test set
    for name in ("CIFAKE", "real training"):
        student = with_statistics(pair[1], sets[name], args.augment)
        accuracies.append([name, evaluate(student, loaders["real test"])["accuracy"]])
    write(args.output / "statistics.csv", "statistics student", accuracies)


def by_confidence(of_teacher: Tensor, of_student: Tensor) -> tuple[Tensor, Tensor]:
    """Between EDGES, how many images and their agreement in percent, from logits (N, classes)."""
    confidence = of_teacher.softmax(1).amax(1).clamp(max=1)
    matches = of_teacher.argmax(1) == of_student.argmax(1)
    inside = [(confidence > low) & (confidence <= high) for low, high in pairwise(EDGES)]
    counts = torch.stack([own.sum() for own in inside])
    return counts, torch.stack([100 * matches[own].float().mean() for own in inside])


def weighted(counts: Tensor, agreement: Tensor, shares: Tensor) -> Tensor:
    """The agreement if the bins had these shares; bins without images are left out."""
    there = counts > 0
    return (shares[there] * agreement[there]).sum() / shares[there].sum()


@torch.no_grad()
def with_statistics(model: nn.Module, images: ImageSet, augment: str) -> nn.Module:
    """A copy of `model` whose BatchNorm has the mean statistics of views of 5,000 `images`."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    seed_everything(0)
    images, device = images.first(5000), next(model.parameters()).device
    size = min(TEST_BATCH_SIZE, len(images))
    for views, _ in DeviceLoader(images, size, device, train=True, augment=augment):
        model(views)
    return model.eval()


def write(path: Path, columns: str, rows: Sequence[Sequence]) -> None:
    """Write a table, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [[f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows]
    write_csv(path, columns.split(), texts)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
