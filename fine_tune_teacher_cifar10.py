"""Make a network, a ResNet18 unless told otherwise, an expert on real CIFAR-10: the teacher.

    python fine_tune_teacher_cifar10.py --epochs 15 --lr 0.001 --batch_size 128

trains on the 50,000 real training images with cross-entropy, tests on the 10,000 real test images
after every epoch, and writes teacher_cifar10_finetuned.pth when the last epoch is done. Plots,
metrics.csv and checkpoints are in runs/teacher-001 while it runs. What was measured, and where, is
in the README.
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import flags
import parallel
from data import REAL_SETS, TEST_BATCH_SIZE, DeviceLoader, load_demo
from engine import (
    TrainStep,
    WeightAverage,
    build_optimizer,
    build_scheduler,
    distribute,
    evaluate,
    label_loss,
    per_class_accuracy,
    train_one_epoch,
)
from experiment import Progress, Run, one_line_errors, pick_device, seed_everything
from models import ARCHITECTURES, STEMS, build_model, init_from, to_checkpoint
from plots import plot_run

# The published recipe, and the demo's.
RECIPE = dict(epochs=15, lr=1e-3, optimizer="adam", weight_decay=0.0, scheduler="none")
DEMO = dict(
    epochs=8,
    init="random",
    stem="imagenet",
    scheduler="onecycle",
    output=Path("runs/demo/teacher_cifar10_finetuned.pth"),
)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    flags.add_data_flags(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        default="resnet18",
        metavar="NAME",
        help=f"one of {', '.join(ARCHITECTURES)} [%(default)s]",
    )
    model.add_argument(
        "--stem",
        choices=STEMS,
        default="cifar",
        help="made for 32x32 pictures, or torchvision's own for 224x224 [%(default)s]",
    )
    model.add_argument(
        "--init",
        default="imagenet",
        metavar="START",
        help="imagenet: torchvision's IMAGENET1K_V1; random; or the path of a weight file for "
        "torchvision's network [%(default)s]",
    )
    flags.add_optimisation_flags(parser, **RECIPE)
    flags.add_augmentation_flags(parser)
    flags.add_run_flags(parser, "teacher", "teacher_cifar10_finetuned.pth")
    return flags.parse(parser, argv, "teacher", DEMO)


def main(args: Namespace) -> None:
    device, amp = pick_device(args.device, args.amp)
    parallel.start(device)

    # data
    with parallel.leader_first():
        if args.demo:
            train_set, test_set = load_demo("train"), load_demo("test")
        else:
            load = REAL_SETS[args.dataset]
            train_set, test_set = load(args.data_dir, train=True), load(args.data_dir, train=False)
    train_set, test_set = train_set.first(args.limit), test_set.first(args.limit)
    views = {"augment": args.augment, "mix": args.mix, "mix_alpha": args.mix_alpha}
    train_loader = DeviceLoader(train_set, args.batch_size, device, train=True, **views)
    test_loader = DeviceLoader(test_set, TEST_BATCH_SIZE, device, train=False)

    # model, optimizer, scheduler
    seed_everything(args.seed)
    teacher = build_model(args.arch, args.stem, len(test_set.classes))
    with parallel.leader_first():
        print(f"start: {init_from(teacher, args.init)}", flush=True)
    teacher.to(device)
    distributed = distribute(teacher, args.sync_bn)  # `teacher` itself, but with torchrun
    optimizer = build_optimizer(teacher, args)
    scheduler = build_scheduler(optimizer, args, args.epochs * len(train_loader))

    def loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return label_loss(distributed(images), labels)

    # the run
    average = WeightAverage(teacher, args.ema) if args.ema else None
    shown, trained = (average.model, teacher) if average else (teacher, None)
    step = TrainStep(loss_fn, optimizer, amp, not args.no_graph, average and average.update)
    run = Run(args, "teacher", {"train_images": len(train_set), "test_images": len(test_set)})
    first_epoch = run.restore(shown, optimizer, scheduler, trained)
    progress = Progress(first_epoch, args.epochs, len(train_loader) * args.batch_size)
    with run:
        for epoch in range(first_epoch, args.epochs + 1):
            began, lr = time.perf_counter(), float(scheduler.get_last_lr()[0])
            seed_everything(args.seed, epoch)
            train = train_one_epoch(teacher, train_loader, step, scheduler, progress.on_batch)
            parallel.average_statistics(teacher, shown)
            test = evaluate(shown, test_loader, amp)
            row = {
                "epoch": epoch,
                "lr": lr,
                "train_loss": train["loss"],
                "train_accuracy": train["hits"],
                "test_loss": test["loss"],
                "test_accuracy": test["accuracy"],
                "seconds": time.perf_counter() - began,
                "images_per_second": train["images_per_second"],
            }
            checkpoint = to_checkpoint(shown, test_set.classes)
            if run.record(row, checkpoint, optimizer, scheduler, trained):
                plot_run(run.folder)
            progress.epoch(row)
        progress.close()
        per_class = per_class_accuracy(shown, test_loader, amp)
        run.finish(to_checkpoint(shown, test_set.classes), per_class)
        if parallel.leads():
            plot_run(run.folder)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
