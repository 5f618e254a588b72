"""Images a second that imagenet/loader.py decodes, beside torchvision's reference transforms.

    python benchmarks/loader.py                     # on a CPU, three minutes
    python benchmarks/loader.py --workers 4 8 16    # beside a GPU
    python benchmarks/loader.py --train_rate 5000   # instead of measuring a step

"reference" is the preset of torchvision's references/classification: a worker decodes the whole
picture with PIL, crops, resizes and mirrors it there, and normalises it as float32. "ours" decodes
a JPEG at reduced size where that is enough, crops before anything else, resizes uint8 tensors, and
leaves normalising to the device. Batches arrive on the device, normalised, and nothing learns from
them. The two take turns epoch by epoch on the same made files, which stay in the page cache: no
disk is measured. Ratios are taken within a turn.

A training step of distillation, ResNet18 from ResNet18, is timed on the same device (on a CPU, with
one thread), without a loader: the slower of the two is the bottleneck. Prints tables; writes
runs/loader/DEVICE.json.
"""

import io
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import opened
from engine import TrainStep, kd_loss
from experiment import flags
from experiment.device import pick_device
from experiment.errors import one_line_errors
from experiment.files import write_json
from experiment.folder import provenance
from imagenet.index import ImageFiles, list_images
from imagenet.loader import IMAGENET_MEAN, IMAGENET_STD, FolderLoader, random_view

# Width, height and quality of the JPEGs: a typical photo of ImageNet, and a picture of SDXL's size.
SIZES = {"500x375": (500, 375, 93), "1024x1024": (1024, 1024, 80)}
BATCH = 32
VIEWS = 200  # are timed one by one; the median counts


class Reference(Dataset):
    """ImageFiles through torchvision's ClassificationPresetTrain, as it is without flags."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(224),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int):
        image = Image.open(self.files.path(i)).convert("RGB")
        return self.transform(image), self.files.labels[i].item()


def reference(files: ImageFiles, workers: int, device: torch.device) -> Iterable:
    return DataLoader(
        Reference(files),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def ours(files: ImageFiles, workers: int, device: torch.device) -> Iterable:
    return FolderLoader(files, BATCH, device, train=True, workers=workers)


WAYS = {"reference": reference, "ours": ours}


# ---------------------------------------------------------------------------------------- measuring


def make_photos(folder: Path, width: int, height: int, quality: int, count: int) -> ImageFiles:
    """`count` JPEGs of 20 different pictures in 20 classes: smooth shapes, with a grain."""
    rng = np.random.default_rng(0)
    for i in range(20):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        photo = smooth + rng.normal(0, 12, (height, width, 1))
        file = io.BytesIO()
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
        (folder / f"{i:03d}").mkdir()
        for k in range(count // 20):
            (folder / f"{i:03d}" / f"{k}.jpg").write_bytes(file.getvalue())
    return list_images(folder, 20)


def epoch_rate(loader: Iterable, device: torch.device) -> float:
    """Images a second through `loader`, to the device."""
    count, began = 0, time.perf_counter()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        count += len(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def compare(files: ImageFiles, workers: int, turns: int, device: torch.device) -> dict:
    """Both ways in turn: `rate`, images a second, and `ratio`, as [median, min, max]."""
    loaders = {way: build(files, workers, device) for way, build in WAYS.items()}
    for loader in loaders.values():  # starts the workers, which stay
        epoch_rate(loader, device)
    rates = [
        {way: epoch_rate(loader, device) for way, loader in loaders.items()} for _ in range(turns)
    ]
    return {
        "workers": workers,
        **{way: spread([turn[way] for turn in rates]) for way in WAYS},
        "ratio": spread([turn["ours"] / turn["reference"] for turn in rates]),
    }


def view_milliseconds(files: ImageFiles) -> dict[str, float]:
    """Milliseconds of a core for a random view, reduced and not, in turns; medians of VIEWS.

    Processor time, which other work on the machine does not change.
    """
    seconds = {"reduced": [], "full": []}
    for seed in range(VIEWS):
        for way, times in seconds.items():
            began = time.process_time()
            with opened(files.path(seed % len(files))) as picture:
                random_view(picture, 224, seed, reduced=way == "reduced")
            times.append(time.process_time() - began)
    return {way: 1e3 * statistics.median(times) for way, times in seconds.items()}


def train_rate(device: torch.device, amp: torch.dtype | None) -> float:
    """Images a second of distillation, on one batch that is there already; the best of five."""
    size, steps = (256, 20) if device.type == "cuda" else (BATCH, 1)
    images = torch.randn(size, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    student, teacher = (resnet18().to(device, memory_format=torch.channels_last) for _ in range(2))
    teacher.eval().requires_grad_(False)

    def loss_fn(images, labels):
        with torch.inference_mode():
            teacher_logits = teacher(images)
        student_logits = student(images)
        return kd_loss(student_logits, teacher_logits, 10.0), student_logits[:, 0] > 0

    step = TrainStep(loss_fn, torch.optim.SGD(student.parameters(), 0.1), amp, graph=False)
    labels, best = torch.zeros(size, dtype=torch.int64, device=device), 0.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(steps):
            loss, _ = step(images, labels)
        loss.item()  # waits
        best = max(best, steps * size / (time.perf_counter() - began))
    return best


# ---------------------------------------------------------------------------------------- reporting


def report(results: dict) -> None:
    """Print the tables of results/loader/README.md."""
    print(f"\n`{results['command']}`, {results['hardware']}, torch {results['torch']}\n")
    print("| pixels | kB | workers | reference, images/s | ours, images/s | ratio |")
    print("|---|---|---|---|---|---|")
    for name, result in results["sizes"].items():
        for row in result["loaders"]:
            cells = [name, f"{result['kb']:.0f}", str(row["workers"])]
            cells += ["{:.0f} ({:.0f}-{:.0f})".format(*row[way]) for way in WAYS]
            print(f"| {' | '.join(cells)} | {'{:.2f} ({:.2f}-{:.2f})'.format(*row['ratio'])} |")
    print("\n| pixels | one view, ms of a core | decoded at full size |\n|---|---|---|")
    for name, result in results["sizes"].items():
        print("| {} | {:.2f} | {:.2f} |".format(name, *result["view_ms"].values()))
    trained = results["train_rate"]
    print(f"\ntraining: {trained:.0f} images/s, {results['train_rate_from']}")
    for name, result in results["sizes"].items():
        cores = trained * result["view_ms"]["reduced"] / 1e3
        short = [row["workers"] for row in result["loaders"] if row["ours"][0] < trained]
        verdict = f"the loader with {short} workers, else training" if short else "training"
        print(f"{name}: that takes {cores:.2f} cores of decoding; the bottleneck is {verdict}")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--device", type=flags.device, default="auto", help="as in the scripts [%(default)s]")
    add("--workers", type=flags.int_in(0, 256), nargs="+", default=[0, 1, 2], help="[0 1 2]")
    add("--turns", type=flags.int_in(1, 1000), default=5, help="epochs of each way [%(default)s]")
    add("--images", type=flags.int_in(40, 10**6), default=320, help="of an epoch [%(default)s]")
    add("--train_rate", type=flags.float_in(0, 1e9, above=True), help="images/s [measured]")
    add("--output", type=Path, default=Path("runs/loader"), help="a folder [%(default)s]")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    device, amp = pick_device(args.device, "auto")
    torch.set_num_threads(1)  # as every worker has
    results = {**provenance(device, amp), "turns": args.turns, "sizes": {}}
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as made:
            files = make_photos(Path(made), *size, args.images)
            results["sizes"][name] = {
                "kb": Path(files.path(0)).stat().st_size / 1e3,
                "view_ms": view_milliseconds(files),
                "loaders": [compare(files, n, args.turns, device) for n in args.workers],
            }
    results["train_rate"] = args.train_rate or train_rate(device, amp)
    results["train_rate_from"] = (
        "--train_rate" if args.train_rate else "measured: ResNet18 to ResNet18"
    )
    report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    name = "cpu" if device.type == "cpu" else results["hardware"].replace(" ", "_")
    write_json(args.output / f"{name}.json", results)
    print(f"written: {args.output / name}.json")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
