"""How fast a KD epoch is, beside the ordinary way to write one, measured in turn in the same run.

    python benchmarks/speed.py --quick    # two or three minutes on two CPU cores
    python benchmarks/speed.py            # the full sizes: for a GPU
    python benchmarks/speed.py --whole    # the published experiment: both scripts, start to exit

"plain" is the usual tutorial: PIL decodes and torchvision's transforms augment in the two workers
of a DataLoader, float32, channels-first, eager, `.item()` in every step. "ours" is what
main_train_cifar10.py does, through the very same functions. On a GPU there are also "ours, no
graph" (every kernel launched from Python) and "ours, compiled" (networks through torch.compile,
then the graph); on a CPU "ours, bf16" (with --amp bf16, which is the default on a GPU). Networks,
data, batch size, loss and optimizer are the same. Each way lives in a process of its own, and they
take turns epoch by epoch, so that a machine that slows down slows all. Ratios are taken within a
turn. An epoch is training and a test on a fifth as many images.

Prints tables; writes results/speed/DEVICE.json and DEVICE.png, or DEVICE_whole.json.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

BEGAN = time.perf_counter()
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torchvision import transforms  # noqa: E402

import data  # noqa: E402
import flags  # noqa: E402
import main_train_cifar10  # noqa: E402
from data import TEST_BATCH_SIZE, DeviceLoader, ImageSet  # noqa: E402
from engine import (  # noqa: E402
    TrainStep,
    build_optimizer,
    build_scheduler,
    evaluate,
    kd_loss,
    train_one_epoch,
)
from experiment import one_line_errors, pick_device, replacing, surroundings  # noqa: E402
from models import STEMS, build_model, cast_once  # noqa: E402
from synthetic_data.demo_images import draw  # noqa: E402

RECIPE = main_train_cifar10.parse_args([])
TEMPERATURE, BATCH = RECIPE.temperature, RECIPE.batch_size
EPOCH = 50_000  # what "an epoch" means in the tables, whatever was measured


# ------------------------------------------------------------------------------------ the plain way


class JpegFolder(Dataset):
    def __init__(self, paths: list[Path], transform: Callable) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        return self.transform(Image.open(self.paths[i]).convert("RGB")), 0


def plain(paths: list[Path], stem: str, device: torch.device) -> Callable[[], None]:
    """Returns what trains and tests for one epoch."""
    as_tensor = [transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    train_set = JpegFolder(paths, transforms.Compose(augment + as_tensor))
    test_set = JpegFolder(paths[: len(paths) // 5], transforms.Compose(as_tensor))
    train_loader = DataLoader(train_set, BATCH, shuffle=True, num_workers=2, drop_last=True)
    test_loader = DataLoader(test_set, BATCH, num_workers=2)
    student = build_model(stem=stem).to(device, memory_format=torch.contiguous_format)
    teacher = build_model(stem=stem).to(device, memory_format=torch.contiguous_format).eval()
    optimizer = torch.optim.SGD(
        student.parameters(), RECIPE.lr, RECIPE.momentum, weight_decay=RECIPE.weight_decay
    )
    criterion = nn.KLDivLoss(reduction="batchmean")

    def epoch() -> None:
        student.train()
        running_loss = 0.0
        for images, _ in train_loader:
            images = images.to(device)
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = student(images)
            log_p = F.log_softmax(logits / TEMPERATURE, dim=1)
            loss = criterion(log_p, F.softmax(teacher_logits / TEMPERATURE, dim=1)) * TEMPERATURE**2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        student.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in test_loader:
                predictions = student(images.to(device)).argmax(1)
                correct += (predictions == labels.to(device)).sum().item()

    return epoch


# ---------------------------------------------------------------------------------- this project's


def ours(
    paths: list[Path],
    stem: str,
    device: torch.device,
    graph: bool = True,
    compiled: bool = False,
    amp: str = "auto",
) -> Callable[[], None]:
    """Returns what trains and tests for one epoch, built as main_train_cifar10.py builds it."""
    _, amp = pick_device(str(device), amp)
    images = torch.stack([data.load_image(path) for path in paths])
    image_set = ImageSet(images, torch.zeros(len(images), dtype=torch.int64), data.CLASSES)
    train_loader = DeviceLoader(image_set, BATCH, device, train=True)
    test_loader = DeviceLoader(
        image_set.first(len(paths) // 5), TEST_BATCH_SIZE, device, train=False
    )
    student = build_model(stem=stem).to(device)
    teacher = build_model(stem=stem).to(device).eval().requires_grad_(False)
    cast_once(teacher, amp)
    if compiled:
        student, teacher = torch.compile(student), torch.compile(teacher)
    optimizer = build_optimizer(student, RECIPE)
    scheduler = build_scheduler(optimizer, RECIPE, RECIPE.epochs * len(train_loader))

    def loss_fn(images, labels):
        with torch.inference_mode():
            teacher_logits = teacher(images)
        student_logits = student(images)
        loss = kd_loss(student_logits, teacher_logits, TEMPERATURE)
        return loss, student_logits.argmax(1) == teacher_logits.argmax(1)

    step = TrainStep(loss_fn, optimizer, amp, graph)

    def epoch() -> None:
        train_one_epoch(student, train_loader, step, scheduler)
        evaluate(student, test_loader, amp)

    return epoch


WAYS = {
    "plain": plain,
    "ours": ours,
    "ours, no graph": functools.partial(ours, graph=False),
    "ours, compiled": functools.partial(ours, compiled=True),
    "ours, bf16": functools.partial(ours, amp="bf16"),
}
MORE = {"cuda": ["ours, no graph", "ours, compiled"], "cpu": ["ours, bf16"]}


# ---------------------------------------------------------------------------------------- measuring


def work(way: str, stem: str, images: int, folder: Path, device: torch.device) -> None:
    """The other process: one line out when ready, then one line out for every line in."""
    paths = sorted(folder.glob("*.jpg"))
    paths = (paths * -(-images // len(paths)))[:images]
    epoch = WAYS[way](paths, stem, device)
    print(json.dumps({"startup": time.perf_counter() - BEGAN}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        epoch()
        if device.type == "cuda":
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "memory_gb": memory / 1e9}), flush=True)


class Worker:
    """A process that stands by and runs an epoch when it is told to."""

    def __init__(self, way: str, stem: str, images: int, args: Namespace) -> None:
        command = [sys.executable, __file__, "--worker", way, "--stems", stem]
        command += ["--images", str(images), "--folder", str(args.folder), "--device", args.device]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.startup = self._answer()["startup"]
        self.epoch()  # the first one warms up: allocations, autotuning, compilation

    def epoch(self) -> dict[str, float]:
        """Run an epoch; returns its `seconds` and the peak memory so far, `memory_gb`."""
        self.process.stdin.write("go\n")
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a worker ended with exit code {self.process.wait()}")
        return json.loads(line)


def compare(stem: str, images: int, turns: int, args: Namespace) -> dict:
    """All ways in turn; every figure as [median, min, max] over the turns."""
    ways = ["plain", "ours", *MORE[torch.device(args.device).type]]
    workers = {way: Worker(way, stem, images, args) for way in ways}
    measured = [{way: worker.epoch() for way, worker in workers.items()} for _ in range(turns)]
    for worker in workers.values():
        worker.close()

    def spread(values: list[float]) -> list[float]:
        return [statistics.median(values), min(values), max(values)]

    result = {"images": images, "turns": turns}
    for way, worker in workers.items():
        seconds = [turn[way]["seconds"] for turn in measured]
        result[way] = {
            "images_per_second": spread([images / s for s in seconds]),
            "epoch_seconds": spread([s * EPOCH / images for s in seconds]),
            "ratio": spread([t["plain"]["seconds"] / t[way]["seconds"] for t in measured]),
            "memory_gb": measured[-1][way]["memory_gb"],
            "startup_seconds": worker.startup,
        }
    return result


def growth(stem: str, sizes: Sequence[int], args: Namespace) -> list[dict]:
    """Time and memory of one epoch of ours on more and more images."""
    rows = []
    for images in sizes:
        worker = Worker("ours", stem, images, args)
        rows.append({"images": images, "startup_seconds": worker.startup, **worker.epoch()})
        worker.close()
    return rows


def decoding(folder: Path, turns: int) -> dict:
    """Seconds to read and decode a folder as the student does; every image, `turns` times."""
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        images = len(data.load_cifake(folder))
        seconds.append(time.perf_counter() - began)
    return {"images": images, "seconds": [statistics.median(seconds), min(seconds), max(seconds)]}


def matmul_peak(device: torch.device) -> float | None:
    """TFLOP/s of a bfloat16 matrix product on CUDA, the best of ten; None on a CPU.

    There, convolutions can run at twice the speed of PyTorch's matrix product: it is no peak.
    """
    if device.type != "cuda":
        return None
    size, best = 8192, float("inf")
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    for _ in range(13):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12


def step_gflop(stem: str) -> float:
    """GFLOP an image of one KD step, counted: student forward and backward, teacher forward."""
    student, teacher = build_model(stem=stem), build_model(stem=stem).eval()
    images = torch.zeros(8, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher_logits = teacher(images)
        kd_loss(student(images), teacher_logits, TEMPERATURE).backward()
    return counter.get_total_flops() / len(images) / 1e9


def whole(stem: str, args: Namespace) -> dict[str, float]:
    """Seconds of the two scripts with the published recipe, each from its start to its exit.

    The teacher starts from random weights, as there may be no network to fetch others by.
    """
    seconds = {}
    data_dir, synthetic = args.data_dir.resolve(), args.folder.resolve()
    with tempfile.TemporaryDirectory() as folder:
        for script, extra in (
            ("fine_tune_teacher_cifar10", ["--init", "random"]),
            ("main_train_cifar10", ["--synthetic_data_dir", str(synthetic)]),
        ):
            command = [sys.executable, str(REPOSITORY / f"{script}.py"), *extra, "--stem", stem]
            command += ["--data_dir", str(data_dir), "--device", args.device]
            command += ["--limit", str(args.limit)] if args.limit else []
            began = time.perf_counter()
            subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
            seconds[script] = time.perf_counter() - began
    return seconds


# ---------------------------------------------------------------------------------------- reporting


def report(results: dict) -> None:
    """Print the tables of the README."""
    print(f"\n`{results['command']}`, {results['hardware']}, torch {results['torch']}\n")
    table = [["stem", "", "images/s", "s an epoch", "ratio", "of peak", "GB", "start s"]]
    for stem, result in results["stems"].items():
        for way in filter(result.get, WAYS):
            row = result[way]
            rate, low, high = row["images_per_second"]
            share = "-"
            if results["matmul_tflops"]:
                share = f"{rate * result['step_gflop'] / 1e3 / results['matmul_tflops']:.0%}"
            ratio = "{:.2f} ({:.2f}-{:.2f})".format(*row["ratio"])
            table.append([stem, way, f"{rate:.0f} ({low:.0f}-{high:.0f})"])
            table[-1] += [f"{row['epoch_seconds'][0]:.2f}", ratio, share]
            table[-1] += [f"{row['memory_gb']:.2f}", f"{row['startup_seconds']:.1f}"]
    print_table(table)
    table = [["images (ours, ImageNet stem)", "s", "images/s", "GB", "start s"]]
    for row in results["growth"]:
        rate = row["images"] / row["seconds"]
        table.append([f"{row['images']:,}", f"{row['seconds']:.2f}", f"{rate:.0f}"])
        table[-1] += [f"{row['memory_gb']:.2f}", f"{row['startup_seconds']:.1f}"]
    print_table(table)
    row = results["decoding"]
    print("{:,} images decoded in {:.2f} s ({:.2f}-{:.2f})".format(row["images"], *row["seconds"]))


def print_table(rows: list[list[str]]) -> None:
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print(f"| {' | '.join(row)} |")
    print()


def draw_chart(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results["stems"]), 3.5), layout="constrained")
    panels = figure.subplots(1, len(results["stems"]), squeeze=False)[0]
    for axes, (stem, result) in zip(panels, results["stems"].items(), strict=True):
        for way in filter(result.get, WAYS):
            rate, low, high = result[way]["images_per_second"]
            bar = axes.bar(way, rate, yerr=[[rate - low], [high - rate]], capsize=6)
            axes.bar_label(bar, fmt="%.0f", label_type="center", color="white")
        ratio = result["ours"]["ratio"][0]
        axes.set(title=f"{stem} stem: {ratio:.2f}x", ylabel="images/s, KD and test")
    figure.suptitle(results["hardware"])
    figure.savefig(path, dpi=120)


def draw_jpegs(folder: Path) -> Path:
    """Drawn pictures as JPEGs, for where there is no CIFAKE."""
    for i, image in enumerate(draw("synthetic", 2000, seed=0)[0]):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:05d}.jpg")
    return folder


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes, for a CPU")
    add("--device", type=flags.device, default="auto", help="as in the scripts [%(default)s]")
    add("--stems", nargs="+", choices=STEMS, default=["imagenet", "cifar"], help="[both]")
    add("--turns", type=flags.whole(1, 1000), default=3, help="epochs of each way [%(default)s]")
    folder = Path("synthetic_data/cifake_train_fake")
    add("--folder", type=Path, default=folder, help="JPEGs; drawn ones where empty [%(default)s]")
    add("--whole", action="store_true", help="time the two scripts instead, on real data")
    add("--data_dir", type=Path, default=Path("data"), help="for --whole: CIFAR-10 [%(default)s]")
    add("--limit", type=flags.whole(1, 10**9), help="for --whole: as in the scripts [all]")
    add("--output", type=Path, default=REPOSITORY / "results" / "speed", help="[results/speed]")
    add("--worker", choices=WAYS, help=argparse.SUPPRESS)
    add("--images", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(args: Namespace, device: torch.device) -> dict:
    images, sizes = {"imagenet": EPOCH, "cifar": EPOCH}, (12_500, 25_000, 50_000, 200_000)
    if args.quick:
        images, sizes = {"imagenet": 1_280, "cifar": 256}, (640, 1_280, 5_120)
    results = {"matmul_tflops": matmul_peak(device), "stems": {}}
    for stem in args.stems:
        result = compare(stem, images[stem], args.turns, args)
        results["stems"][stem] = {"step_gflop": step_gflop(stem), **result}
    results["growth"] = growth("imagenet", sizes, args)
    results["decoding"] = decoding(args.folder, args.turns)
    return results


def main(args: Namespace) -> None:
    device, _ = pick_device(args.device, "auto")
    args.device = str(device)
    if args.worker:
        return work(args.worker, args.stems[0], args.images, args.folder, device)
    results = surroundings(args.device)
    if args.whole:
        results["limit"] = args.limit
        for stem in args.stems:
            turns = [whole(stem, args) for _ in range(args.turns)]
            results[stem] = turns
            both = sorted(sum(turn.values()) for turn in turns)
            print(f"{stem} stem: {statistics.median(both):.1f} s ({both[0]:.1f}-{both[-1]:.1f})")
    else:
        with tempfile.TemporaryDirectory() as made:
            if not any(args.folder.glob("*.jpg")):
                args.folder = draw_jpegs(Path(made))
            results |= measure(args, device)
        report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    name = "cpu" if device.type == "cpu" else results["hardware"].replace(" ", "_")
    name += "_whole" * args.whole
    with replacing(args.output / f"{name}.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    if not args.whole:
        draw_chart(results, args.output / f"{name}.png")
    print(f"written: {args.output / name}.json")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
