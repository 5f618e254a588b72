"""Train a small generator of one's own on CIFAR-10, for when no model can be downloaded.

    python synthetic_data/train_diffusion.py --epochs 100 --lr 0.0005 --batch_size 256

A class-conditional diffusion model of 35.8 million parameters (synthetic_data/diffusion.py) learns
from the 50,000 real training images of CIFAR-10, mirrored at random, and is written to
diffusion_cifar10.pth when the last epoch is done: the moving average of its weights.
`python synthetic_data/generate.py --pipeline local` makes images with it. As in the paper, the
generator has then seen real images of the domain, and the student still has not.

The run has a folder, runs/diffusion-001: config.json, metrics.csv, last.pt, and at the end
samples.png, a row a class. `--demo` spends about a minute of one CPU core on the drawn pictures of
demo_images.py: enough to see that it works, not to see a shape. Not yet run on a GPU: whether 100
epochs take less than 20 minutes of an H200, as they are meant to, is not known.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.utils import save_image  # noqa: E402

import flags  # noqa: E402
import parallel  # noqa: E402
from data import REAL_SETS, ImageSet, load_demo  # noqa: E402
from engine import TrainStep, WeightAverage, build_optimizer, build_scheduler  # noqa: E402
from experiment import (  # noqa: E402
    Progress,
    Run,
    UserError,
    one_line_errors,
    pick_device,
    replacing,
    seed_everything,
)
from synthetic_data import diffusion  # noqa: E402

# The recipe, and the demo's.
RECIPE = dict(epochs=100, lr=5e-4, optimizer="adam", weight_decay=0.0, scheduler="onecycle")
DEMO = dict(
    epochs=2,
    batch_size=32,
    lr=2e-3,
    channels=16,
    layers=1,
    ema=0.98,
    output=Path("runs/demo/diffusion_cifar10.pth"),
)

SHEET = dict(guidance_scale=2.0, steps=20)  # of samples.png


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    flags.add_data_flags(parser)
    model = parser.add_argument_group("model (U-Net)")
    model.add_argument(
        "--channels",
        type=flags.whole(8, 1024),
        default=128,
        metavar="N",
        help="width at full resolution, a multiple of 8 [%(default)s]",
    )
    model.add_argument(
        "--layers",
        type=flags.whole(1, 8),
        default=2,
        metavar="N",
        help="residual blocks at each of the four resolutions [%(default)s]",
    )
    model.add_argument(
        "--label_dropout",
        type=flags.number(0, 1),
        default=0.1,
        metavar="X",
        help='share of the labels that become "any", for guidance [%(default)s]',
    )
    flags.add_optimisation_flags(parser, **RECIPE)
    parser.set_defaults(batch_size=256, ema=0.9995)
    flags.add_run_flags(parser, "diffusion", "diffusion_cifar10.pth")
    args = flags.parse(parser, argv, "diffusion", DEMO)
    if args.channels % 8:
        parser.error(f"--channels {args.channels} is no multiple of 8")
    return args


def main(args: Namespace) -> None:
    if parallel.world_size() > 1:
        raise UserError("one process trains the generator: start it with python")
    device, amp = pick_device(args.device, args.amp)

    # data
    load_real = REAL_SETS[args.dataset]
    train_set, test_set = (
        (load_demo(part) if args.demo else load_real(args.data_dir, part == "train"))
        for part in ("train", "test")
    )
    train_set, test_set = train_set.first(args.limit), test_set.first(args.limit)
    images, labels = train_set.images.to(device), train_set.labels.to(device)
    steps = len(images) // args.batch_size
    if steps == 0:
        raise UserError(f"--batch_size {args.batch_size} is more than the {len(images)} images")

    # model, optimizer, scheduler
    seed_everything(args.seed)
    unet = diffusion.build_unet(len(train_set.classes), args.channels, args.layers)
    unet.to(device)
    schedule = diffusion.build_schedule()
    optimizer = build_optimizer(unet, args)
    scheduler = build_scheduler(optimizer, args, args.epochs * steps)
    average = WeightAverage(unet, args.ema)
    size = sum(weight.numel() for weight in unet.parameters())
    print(f"{size / 1e6:.1f} million parameters, {steps} steps an epoch", flush=True)

    def loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss = diffusion.diffusion_loss(unet, schedule, images, labels, args.label_dropout)
        return loss, labels  # nothing is classified: TrainStep hands the second on, unread

    # the run
    step = TrainStep(loss_fn, optimizer, amp, not args.no_graph, average.update)
    run = Run(args, "diffusion", {"train_images": len(train_set), "test_images": len(test_set)})
    first_epoch = run.restore(average.model, optimizer, scheduler, unet)
    progress = Progress(first_epoch, args.epochs, steps * args.batch_size)
    with run:
        for epoch in range(first_epoch, args.epochs + 1):
            began, lr = time.perf_counter(), float(scheduler.get_last_lr()[0])
            seed_everything(args.seed, epoch)
            loss_sum = torch.zeros((), device=device)
            for batch in mirrored_batches(images, labels, args.batch_size):
                loss, _ = step(*batch)
                scheduler.step()
                loss_sum += loss
                if progress.on_batch is not None:
                    progress.on_batch(args.batch_size, loss)
            train_loss = loss_sum.item() / steps  # waits for the device
            trained = time.perf_counter()
            row = {
                "epoch": epoch,
                "lr": lr,
                "train_loss": train_loss,
                "test_loss": fixed_loss(average.model, schedule, test_set, device, amp),
                "seconds": time.perf_counter() - began,
                "images_per_second": steps * args.batch_size / (trained - began),
            }
            checkpoint = diffusion.to_checkpoint(average.model, train_set.classes)
            run.record(row, checkpoint, optimizer, scheduler, unet)
            progress.epoch(row)
        progress.close()
        draw_samples(average.model, len(train_set.classes), run.folder / "samples.png", device, amp)
        checkpoint = diffusion.to_checkpoint(average.model, train_set.classes)
        run.export(checkpoint, "samples.png, metrics.csv, ...")


def mirrored_batches(
    images: Tensor, labels: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """All full batches of an epoch, in a new order, half of the images mirrored.

    images: uint8 (N, 3, 32, 32) and labels: int64 (N,), which live on the device. Yields float32
    (B, 3, 32, 32), -1 to 1, and int64 (B,). The draws are made on the CPU, for every device alike.
    """
    order = torch.randperm(len(images)).to(images.device)
    mirror = (torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device)
    for start in range(0, len(images) - batch_size + 1, batch_size):
        index = order[start : start + batch_size]
        batch = images[index]
        batch = torch.where(mirror[index], batch.flip(3), batch)
        yield _scaled(batch), labels[index]


def _scaled(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def fixed_loss(
    unet: nn.Module, schedule, data: ImageSet, device: torch.device, amp: torch.dtype | None
) -> float:
    """The mean loss over `data`, with the same noise every time and all labels given.

    If it rose on the test images while the training loss falls, the network would be learning the
    training images by heart.
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
    with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        images = diffusion.sample(unet, labels.to(device), noise.to(device), **SHEET)
    with replacing(path) as file:
        save_image(images, file, nrow=8, format="png")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
