"""How fast a KD epoch is, beside the ordinary way to write one, measured in turn in the same run.

    python benchmarks/speed.py --quick        # minutes on two CPU cores
    python benchmarks/speed.py                # the full sizes: for a GPU
    python benchmarks/speed.py --whole        # the published experiment: both scripts, whole
    python benchmarks/speed.py --cpu_recipe   # hours of two whole recipes on a CPU, extrapolated

"plain" is the usual tutorial: PIL decodes and torchvision's transforms augment in the two workers
of a DataLoader, float32, channels-first, eager, `.item()` in every step. "ours" is what the scripts
do by default, through the very same functions. On a GPU there are also "ours, no graph" (every
kernel launched from Python) and "ours, compiled" (networks through torch.compile, then the graph);
on a CPU, whichever it does not do by default of "ours, direct" (float32, PyTorch's convolutions, as
"plain" has them) and "ours, Winograd" (float32, networks/winograd.py). Networks, data, batch size,
loss and optimizer are the same. Each way lives in a process of its own, and they take turns epoch
by epoch, so that a machine that slows down slows all. Ratios are taken within a turn. An epoch is
training and a test on a fifth as many images.

--cpu_recipe compares what a student costs on a CPU: by the published recipe in the plain way (a
ResNet18 teacher of 15 epochs, its student of 50), and by that of scripts/cpu.sh (airbench94 with
Muon, 10 and 24). It times two to eight steps of each and extrapolates to all images and epochs,
without start-up and saving. The accuracies that they reach are in results/.

Prints tables; writes runs/speed/DEVICE.json and DEVICE.png, DEVICE_whole.json or cpu_recipe.json.
Not for Windows, whose Python has no module `resource`.
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

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import fine_tune_teacher_cifar10
import main_train_cifar10
from data import TEST_BATCH_SIZE, DeviceLoader, ImageSet
from engine import TrainStep, evaluate, kd_loss, label_loss, train_one_epoch
from experiment import flags
from experiment.device import pick_device
from experiment.errors import one_line_errors
from experiment.files import write_json
from experiment.folder import provenance
from models import STEMS, build_model, cast_weights_
from networks import winograd
from networks.airbench import Airbench
from optimizers import build_optimizer, build_scheduler
from plots import Figure
from synthetic_data.demo_images import draw

REPOSITORY = Path(__file__).resolve().parent.parent
EPOCH = 50_000  # what "an epoch" means in the tables, whatever was measured
TEMPERATURE = 10.0

# The published recipes, and those of scripts/cpu.sh, as their scripts would get them.
DEFAULTS = dict(arch="resnet18", augment="crop", momentum=0.9, nesterov=False)
DEFAULTS |= dict(milestones=[0.5, 0.8], gamma=0.1, warmup=0.0)
TEACHER = Namespace(**DEFAULTS | fine_tune_teacher_cifar10.RECIPE, distil=False)
STUDENT = Namespace(**DEFAULTS | main_train_cifar10.RECIPE, distil=True)
CPU_RECIPE = dict(arch="airbench94", optimizer="muon", momentum=0.6, weight_decay=0.005)
CPU_RECIPE |= dict(scheduler="linear", augment="reflect")
CPU_TEACHER = Namespace(**vars(TEACHER) | CPU_RECIPE | dict(epochs=10, batch_size=1000, lr=0.24))
CPU_STUDENT = Namespace(**vars(STUDENT) | CPU_RECIPE | dict(epochs=24, batch_size=250, lr=0.12))


# ------------------------------------------------------------------------------------ the plain way


class JpegFolder(Dataset):
    def __init__(self, paths: list[Path], transform: Callable) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        return self.transform(Image.open(self.paths[i]).convert("RGB")), 0


def plain(
    paths: list[Path], stem: str, device: torch.device, recipe: Namespace = STUDENT
) -> Callable[[], float]:
    """Returns what trains and tests for one epoch, and returns the mean training loss."""
    winograd.ENABLED = False
    as_tensor = [
        transforms.ToTensor(),
        transforms.Normalize(data.CIFAR10_MEAN, data.CIFAR10_STD),
    ]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    train_set = JpegFolder(paths, transforms.Compose(augment + as_tensor))
    test_set = JpegFolder(paths[: len(paths) // 5], transforms.Compose(as_tensor))
    batch_size, layout = recipe.batch_size, torch.contiguous_format
    train_loader = DataLoader(train_set, batch_size, shuffle=True, num_workers=2, drop_last=True)
    test_loader = DataLoader(test_set, batch_size, num_workers=2)
    network = build_model(recipe.arch, stem).to(device, memory_format=layout)
    teacher = build_model(recipe.arch, stem).to(device, memory_format=layout).eval()
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters(), recipe.lr)
    else:
        optimizer = torch.optim.SGD(
            network.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )
    criterion = nn.KLDivLoss(reduction="batchmean")

    def loss_of(images, labels):
        if not recipe.distil:
            return F.cross_entropy(network(images), labels)
        with torch.no_grad():
            teacher_logits = teacher(images)
        log_p = F.log_softmax(network(images) / TEMPERATURE, dim=1)
        return criterion(log_p, F.softmax(teacher_logits / TEMPERATURE, dim=1)) * TEMPERATURE**2

    def epoch() -> float:
        network.train()
        running_loss = 0.0
        for images, labels in train_loader:
            loss = loss_of(images.to(device), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        network.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in test_loader:
                predictions = network(images.to(device)).argmax(1)
                correct += (predictions == labels.to(device)).sum().item()
        return running_loss / len(train_loader)

    return epoch


# ---------------------------------------------------------------------------------- this project's


def ours(
    paths: list[Path],
    stem: str,
    device: torch.device,
    recipe: Namespace = STUDENT,
    graph: bool = True,
    compiled: bool = False,
    amp: str = "auto",
    faster: bool = winograd.ENABLED,
) -> Callable[[], float]:
    """Returns what trains and tests for one epoch, as the scripts do it; see `plain`."""
    winograd.ENABLED = faster
    _, amp = pick_device(str(device), amp)
    images = torch.stack([data.load_image(path) for path in paths])
    image_set = ImageSet(images, torch.zeros(len(images), dtype=torch.int64), data.CLASSES)
    train_loader = DeviceLoader(
        image_set, recipe.batch_size, device, train=True, augment=recipe.augment
    )
    test_loader = DeviceLoader(
        image_set.first(len(paths) // 5), TEST_BATCH_SIZE, device, train=False
    )
    network = build_model(recipe.arch, stem)
    if isinstance(network, Airbench):
        network.whiten(data.normalize(images))
    network.to(device)
    teacher = build_model(recipe.arch, stem).to(device).eval().requires_grad_(False)
    cast_weights_(teacher, amp)
    if compiled:
        network, teacher = torch.compile(network), torch.compile(teacher)
    optimizer = build_optimizer(network, recipe, amp)
    scheduler = build_scheduler(optimizer, recipe, recipe.epochs * len(train_loader))

    def kd_loss_fn(images, labels):
        with torch.no_grad():
            teacher_logits = teacher(images)
        logits = network(images)
        loss = kd_loss(logits, teacher_logits, TEMPERATURE)
        return loss, logits.argmax(1) == teacher_logits.argmax(1)

    def label_loss_fn(images, labels):
        return label_loss(network(images), labels)

    loss_fn = kd_loss_fn if recipe.distil else label_loss_fn
    step = TrainStep(loss_fn, optimizer, amp, graph=graph)

    def epoch() -> float:
        train_loader.epoch += 1
        train = train_one_epoch(network, train_loader, step, scheduler)
        evaluate(network, test_loader, amp)
        return train["loss"]

    return epoch


WAYS = {
    "plain": plain,
    "ours": ours,
    "ours, no graph": functools.partial(ours, graph=False),
    "ours, compiled": functools.partial(ours, compiled=True),
    "ours, direct": functools.partial(ours, amp="off", faster=False),
    "ours, Winograd": functools.partial(ours, amp="off", faster=True),
}
# For --cpu_recipe: the recipe, its number of images, which are some batches, and the way.
RECIPES = {
    "published teacher, plain": (TEACHER, 256, plain),
    "published student, plain": (STUDENT, 256, plain),
    "teacher of cpu.sh": (CPU_TEACHER, 2000, ours),
    "student of cpu.sh": (CPU_STUDENT, 2000, ours),
}
WAYS |= {name: functools.partial(way, recipe=recipe) for name, (recipe, _, way) in RECIPES.items()}


def ways(device: torch.device) -> list[str]:
    """Those that differ on `device`."""
    if device.type == "cuda":
        return ["plain", "ours", "ours, no graph", "ours, compiled"]
    if device.type != "cpu":
        return ["plain", "ours"]
    float32 = ["ours, direct", "ours, Winograd"]
    if pick_device("cpu", "auto")[1] is None:  # one of them is what "ours" does
        float32.remove("ours, Winograd" if winograd.ENABLED else "ours, direct")
    return ["plain", "ours", *float32]


# ---------------------------------------------------------------------------------------- measuring


def work(way: str, stem: str, images: int, folder: Path, device: torch.device) -> None:
    """The other process: one line out when ready, then one line out for every line in."""
    paths = sorted(folder.glob("*.jpg"))
    paths = (paths * -(-images // len(paths)))[:images]
    epoch = WAYS[way](paths, stem, device)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        epoch()
        if device.type == "cuda":
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
            memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "memory_gb": memory / 1e9}), flush=True)


class Worker:
    """A process that stands by and runs an epoch when it is told to."""

    def __init__(self, way: str, stem: str, images: int, args: Namespace) -> None:
        command = [sys.executable, __file__, "--worker", way, "--stems", stem]
        command += ["--images", str(images), "--folder", str(args.folder), "--device", args.device]
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._answer()
        self.startup = time.perf_counter() - began
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


def take_turns(workers: dict[str, Worker], turns: int) -> list[dict[str, dict[str, float]]]:
    """Let each worker run an epoch in every turn; what they measured, turn by turn."""
    measured = [{way: worker.epoch() for way, worker in workers.items()} for _ in range(turns)]
    for worker in workers.values():
        worker.close()
    return measured


def spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def compare(stem: str, images: int, turns: int, args: Namespace) -> dict:
    """All ways in turn; every figure as [median, min, max] over the turns."""
    workers = {way: Worker(way, stem, images, args) for way in ways(torch.device(args.device))}
    measured = take_turns(workers, turns)
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


def compare_recipes(turns: int, args: Namespace) -> dict:
    """The recipes of RECIPES in turn, extrapolated to all their images and epochs.

    Every figure is [median, min, max] over the turns; "hours" has both recipes, teacher and student
    together, and "ratio" how many times the published one takes.
    """
    workers = {name: Worker(name, "cifar", n, args) for name, (_, n, _) in RECIPES.items()}
    measured = take_turns(workers, turns)
    result, totals = {"turns": turns, "extrapolated": True, "recipes": {}}, {}
    for name, (recipe, images, way) in RECIPES.items():
        epoch_seconds = [turn[name]["seconds"] * EPOCH / images for turn in measured]
        result["recipes"][name] = {
            "measured_images": images,
            "epochs": recipe.epochs,
            "epoch_seconds": spread(epoch_seconds),
            "memory_gb": measured[-1][name]["memory_gb"],
        }
        whose = "published recipe, plain" if way is plain else "scripts/cpu.sh"
        hours = [recipe.epochs * seconds / 3600 for seconds in epoch_seconds]
        totals[whose] = [a + b for a, b in zip(totals.get(whose, [0] * turns), hours, strict=True)]
    result["hours"] = {whose: spread(hours) for whose, hours in totals.items()}
    published, own = totals.values()
    result["ratio"] = spread([a / b for a, b in zip(published, own, strict=True)])
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
    return {"images": images, "seconds": spread(seconds)}


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
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        student, teacher = build_model(stem=stem), build_model(stem=stem).eval()
        images = torch.zeros(8, 3, 32, 32)
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
            if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode:
                raise SystemExit(1)  # it has said why
            seconds[script] = time.perf_counter() - began
    return seconds


# ---------------------------------------------------------------------------------------- reporting


def report(results: dict) -> None:
    """Print the tables of docs/speed.md."""
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


def report_recipes(results: dict) -> None:
    """Print the table of --cpu_recipe."""
    print(f"\n`{results['command']}`, {results['hardware']}, torch {results['torch']}\n")
    table = [["", "measured images", "s an epoch, extrapolated", "epochs", "hours, extrapolated"]]
    for name, row in results["recipes"].items():
        seconds = row["epoch_seconds"]
        table.append([name, str(row["measured_images"])])
        table[-1] += ["{:.0f} ({:.0f}-{:.0f})".format(*seconds), str(row["epochs"])]
        table[-1] += [f"{row['epochs'] * seconds[0] / 3600:.2f}"]
    print_table(table)
    for whose, hours in results["hours"].items():
        print("{}: {:.2f} hours ({:.2f}-{:.2f}), extrapolated".format(whose, *hours))
    print("ratio: {:.1f} ({:.1f}-{:.1f}), extrapolated".format(*results["ratio"]))


def print_table(rows: list[list[str]]) -> None:
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print(f"| {' | '.join(row)} |")
    print()


def draw_chart(results: dict, path: Path) -> None:
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
    add("--turns", type=flags.int_in(1, 1000), default=3, help="epochs of each way [%(default)s]")
    folder = Path("synthetic_data/cifake_train_fake")
    add("--folder", type=Path, default=folder, help="JPEGs; drawn ones where empty [%(default)s]")
    add("--whole", action="store_true", help="time the two scripts instead, on real data")
    add("--cpu_recipe", action="store_true", help="compare whole recipes on the CPU instead")
    add("--data_dir", type=Path, default=Path("data"), help="for --whole: CIFAR-10 [%(default)s]")
    add("--limit", type=flags.int_in(1, 10**9), help="for --whole: as in the scripts [all]")
    add("--output", type=Path, default=Path("runs/speed"), help="a folder [%(default)s]")
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
    device, amp = pick_device("cpu" if args.cpu_recipe else args.device, "auto")
    args.device = str(device)
    if args.worker:
        return work(args.worker, args.stems[0], args.images, args.folder, device)
    results = provenance(device, amp)
    name = "cpu" if device.type == "cpu" else results["hardware"].replace(" ", "_")
    if args.whole:
        name += "_whole"
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
            if args.cpu_recipe:
                name = "cpu_recipe"
                results |= compare_recipes(args.turns, args)
                report_recipes(results)
            else:
                results |= measure(args, device)
                report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / f"{name}.json", results)
    if "stems" in results:
        draw_chart(results, args.output / f"{name}.png")
    print(f"written: {args.output / name}.json")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
