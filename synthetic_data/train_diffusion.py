"""Train a small generator on CIFAR-10, for when no model can be downloaded.

    python synthetic_data/train_diffusion.py --epochs 100 --lr 0.0005 --batch_size 256

A class-conditional diffusion model of 35.8 million parameters (synthetic_data/diffusion.py) learns
from the 50,000 real training images of CIFAR-10, mirrored at random. The moving average of its
weights goes to diffusion_cifar10.pth, from which `generate.py --pipeline local` makes images. As in
the paper, the generator has seen real images of the domain, and the student has not.

The run is in runs/diffusion-001. Its samples.png has one row per class. `--demo` takes a minute on
a CPU and only checks that everything works. docs/roadmap.md has the time to expect on a GPU.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import REAL_SETS, ImageSet, check_batch_size
from engine import TrainStep, train_one_epoch
from experiment import flags, folder, parallel
from experiment.device import MEMORY_FORMAT, pick_device, seed_everything
from experiment.errors import UserError, one_line_errors
from experiment.files import atomic_write
from experiment.run import Run
from optimizers import build_optimizer, build_scheduler
from plots import plot_run
from synthetic_data import diffusion
from synthetic_data.demo_images import load_demo
from synthetic_data.ema import EMA

# The recipe, and what --demo changes.
RECIPE = dict(epochs=100, batch_size=256, optimizer="adam", lr=5e-4, weight_decay=0.0)
RECIPE |= dict(scheduler="onecycle", ema=0.9995)
DEMO = dict(epochs=2, batch_size=32, lr=2e-3, channels=16, layers=1, ema=0.98)
DEMO |= dict(output=Path("runs/demo/diffusion_cifar10.pth"))

SHEET = dict(guidance_scale=2.0, steps=20)  # of samples.png


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    flags.add_data_flags(parser, DEMO)
    add = parser.add_argument_group("model (U-Net)").add_argument
    # fmt: off
    add("--channels", type=flags.int_in(8, 1024), default=128, metavar="N",
        help="width at full resolution, a multiple of 8 [%(default)s]")
    add("--layers", type=flags.int_in(1, 8), default=2, metavar="N",
        help="residual blocks at each of the four resolutions [%(default)s]")
    add("--label_dropout", type=flags.float_in(0, 1), default=0.1, metavar="X",
        help='share of the labels that become "any", for guidance [%(default)s]')
    add = parser.add_argument_group("average").add_argument
    add("--ema", type=flags.float_in(0, 0.99999), metavar="X",
        help="decay, per batch, of the exponential moving average of the weights, which is tested "
        "and saved; 0 for the weights themselves [%(default)s]")
    # fmt: on
    flags.add_optimisation_flags(parser, RECIPE)
    flags.add_run_flags(parser, "diffusion", "diffusion_cifar10.pth")
    args = folder.parse_args(parser, argv, "diffusion", DEMO)
    if args.channels % 8:
        parser.error(f"--channels {args.channels} is no multiple of 8")
    return args


def main(args: Namespace) -> None:
    if parallel.world_size() > 1:
        raise UserError("one process trains the generator: start it with python")
    device, amp = pick_device(args.device, args.amp)

    # data
    if args.demo:
        train_set, test_set = load_demo("train"), load_demo("test")
    else:
        load = REAL_SETS[args.dataset]
        train_set, test_set = load(args.data_dir, train=True), load(args.data_dir, train=False)
    train_set, test_set = train_set.first(args.limit), test_set.first(args.limit)
    train_loader = MirroredLoader(train_set, args.batch_size, device)

    # model, optimizer, scheduler
    seed_everything(args.seed)
    unet = diffusion.build_unet(len(train_set.classes), args.channels, args.layers).to(device)
    size = sum(weight.numel() for weight in unet.parameters())
    print(f"{size / 1e6:.1f} million parameters, {len(train_loader)} steps an epoch", flush=True)
    noise_schedule = diffusion.build_schedule()
    optimizer = build_optimizer(unet, args, amp)
    scheduler = build_scheduler(optimizer, args, args.epochs * len(train_loader))
    ema = EMA(unet, args.ema)

    def loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss = diffusion.diffusion_loss(unet, noise_schedule, images, labels, args.label_dropout)
        return loss, labels < 0  # nothing is classified: no matches

    # the run: config.json, metrics.csv, checkpoints and plots in runs/diffusion-001
    step = TrainStep(loss_fn, optimizer, amp, ema.update, graph=not args.no_cuda_graph)
    state = dict(model=ema.model, trained=unet, ema=ema, step=step)
    state |= dict(optimizer=optimizer, scheduler=scheduler)
    about = diffusion.describe(unet, train_set.classes)
    sizes = {"train_images": len(train_set), "test_images": len(test_set)}
    with Run(args, "diffusion", state, about, device, amp, sizes, plot_run, metric=None) as run:
        for _ in run.epochs():
            train = train_one_epoch(unet, train_loader, step, scheduler, run.on_batch)
            row = {"train_loss": train["loss"]}
            row["test_loss"] = fixed_loss(ema.model, noise_schedule, test_set, device, amp)
            run.log(row | {"images_per_second": train["images_per_second"]})
        draw_samples(ema.model, len(train_set.classes), run.folder / "samples.png", device, amp)
        run.finish()


class MirroredLoader:
    """All full batches of an epoch, in a new order, half of the images mirrored.

    Yields float32 (B, 3, 32, 32), -1 to 1, and int64 (B,). The images live on `device`; the draws
    are made on the CPU, the same for every device. Errors: UserError if there is no full batch.
    """

    def __init__(self, data: ImageSet, batch_size: int, device: torch.device) -> None:
        check_batch_size(batch_size, len(data))
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size, self.device = batch_size, device

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images)).to(self.device)
        mirror = (torch.rand(len(self.images), 1, 1, 1) < 0.5).to(self.device)
        for index in order.split(self.batch_size)[: len(self)]:
            images = self.images[index]
            images = torch.where(mirror[index], images.flip(3), images)
            yield _scaled(images), self.labels[index]


def _scaled(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).contiguous(memory_format=MEMORY_FORMAT)


@torch.inference_mode()
def fixed_loss(
    unet: nn.Module, schedule, data: ImageSet, device: torch.device, amp: torch.dtype | None
) -> float:
    """The mean loss over `data`, with the same noise every time and all labels given.

    If it rises on the test images while the training loss falls, the network is overfitting.
    """
    seed_everything(0)
    loss_sum = torch.zeros((), device=device)
    for images, labels in zip(data.images.split(500), data.labels.split(500), strict=True):
        images, labels = _scaled(images.to(device)), labels.to(device)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            loss_sum += len(images) * diffusion.diffusion_loss(unet, schedule, images, labels)
    return loss_sum.item() / len(data)


def draw_samples(
    unet: nn.Module, classes: int, path: Path, device: torch.device, amp: torch.dtype | None
) -> None:
    """A picture with a row of eight samples for each class."""
    labels = torch.arange(classes).repeat_interleave(8)
    noise = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = []
    with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        for some, start in zip(labels.split(80), noise.split(80), strict=True):  # CIFAR-100: 800
            images.append(diffusion.sample(unet, some.to(device), start.to(device), **SHEET))
    with atomic_write(path) as file:
        save_image(torch.cat(images), file, nrow=8, format="png")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
