"""Distil a student from a torchvision teacher on synthetic images of ImageNet's 1000 classes.

    python main_train_imagenet.py --check_data
    python main_train_imagenet.py --synthetic_data_dir imagenet/synthetic --val_dir imagenet/val
    torchrun --nproc_per_node=8 main_train_imagenet.py

The method is that of main_train_cifar10.py: a randomly initialised student matches the softened
outputs of a frozen teacher, T^2 * KL(teacher || student) at T = 10, on generated images alone, and
is tested on the real validation set after every epoch. The recipe is that of DM-KD's ImageNet
script (https://github.com/zhengli97/DM-KD). The images stay in their folders: listings.py tells
which layouts are known. Nothing has been trained to the end with this script here; with 140,000,
200,000 and 1.28 million images, the paper has 60.10, 61.61 and 68.25 % for a ResNet18 student.
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import flags
import parallel
from engine import (
    TrainStep,
    WeightAverage,
    build_optimizer,
    build_scheduler,
    distribute,
    evaluate,
    kd_loss,
    per_class_accuracy,
    train_one_epoch,
)
from experiment import Progress, Run, UserError, one_line_errors, pick_device, seed_everything
from folders import FolderLoader, check_data
from listings import ImageFiles, check_same_classes, list_images, list_validation, read_classes
from models import (
    FOR_CIFAR,
    build_model,
    cast_once,
    checksum,
    init_from,
    load_model,
    to_checkpoint,
)
from plots import plot_run

# The published recipe.
RECIPE = dict(epochs=100, lr=0.1, optimizer="sgd", weight_decay=1e-4, scheduler="multistep")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add(
        "--synthetic_data_dir",
        type=Path,
        default=Path("imagenet/synthetic"),
        metavar="DIR",
        help="the images to train on, in class folders or named as DM-KD names them [%(default)s]",
    )
    add(
        "--label_file",
        type=Path,
        metavar="FILE",
        help="all classes in order, where the folders do not tell: the label file of "
        "Stable-ImageNet-1K, or Kaggle's LOC_synset_mapping.txt",
    )
    add(
        "--val_dir",
        type=Path,
        default=Path("imagenet/val"),
        metavar="DIR",
        help="the real validation set, in class folders or flat [%(default)s]",
    )
    add(
        "--ground_truth",
        type=Path,
        metavar="FILE",
        help="the labels of a flat one: LOC_val_solution.csv, or the official file of numbers with "
        "meta.mat or map_clsloc.txt beside it",
    )
    add(
        "--check_data",
        action="store_true",
        help="count, look at a thousand images of each set, report, and end",
    )
    add(
        "--num_classes",
        type=flags.whole(1, 10**6),
        default=1000,
        metavar="N",
        help="other than ImageNet's, for a set of one's own [%(default)s]",
    )
    add(
        "--image_size",
        type=flags.whole(32, 4096),
        default=224,
        metavar="N",
        help="pixels a side [%(default)s]",
    )
    add(
        "--limit",
        type=flags.whole(1, 10**9),
        metavar="N",
        help="take only N images of each set, evenly spaced, for a quick try [all]",
    )
    add(
        "--workers",
        type=flags.whole(0, 1024),
        default=8,
        metavar="N",
        help="processes that decode images, for each GPU; has no effect on results [%(default)s]",
    )
    architectures = {"choices": tuple(FOR_CIFAR), "default": "resnet18", "metavar": "NAME"}
    add = parser.add_argument_group("model").add_argument
    add("--student_arch", help=f"one of {', '.join(FOR_CIFAR)} [%(default)s]", **architectures)
    flags.add_optimisation_flags(parser, **RECIPE)
    flags.add_augmentation_flags(parser, augmentations=())
    add = parser.add_argument_group("distillation").add_argument
    add("--arch", help="of the teacher [%(default)s]", **architectures)
    add(
        "--teacher_weights",
        default="imagenet",
        metavar="FILE",
        help="imagenet: torchvision's IMAGENET1K_V1; random, as a control; or a weight file "
        "[%(default)s]",
    )
    flags.add_temperature_flag(add)
    flags.add_run_flags(parser, "imagenet", "student_imagenet_kd.pth")
    parser.set_defaults(batch_size=256, milestones=[0.3, 0.6, 0.9])
    return flags.parse(parser, argv, "imagenet")


def main(args: Namespace) -> None:
    device, amp = pick_device(args.device, args.amp)
    parallel.start(device)

    # data: the student trains on synthetic images, and is tested on real ones
    train_files, test_files = list_data(args)
    if args.check_data:
        print(f"{check_data(train_files)}\n{check_data(test_files)}")
        return
    shape = {"workers": args.workers, "size": args.image_size}
    views = {"mix": args.mix, "mix_alpha": args.mix_alpha}
    train_loader = FolderLoader(train_files, args.batch_size, device, True, **shape, **views)
    test_loader = FolderLoader(test_files, args.batch_size, device, False, **shape)

    # models, optimizer, scheduler
    seed_everything(args.seed)
    student = build_model(args.student_arch, "imagenet", args.num_classes).to(device)
    distributed = distribute(student, args.sync_bn)  # `student` itself, but with torchrun
    with parallel.leader_first():
        teacher = load_teacher(args)
    teacher_sha256 = checksum(teacher)
    teacher = teacher.to(device).eval().requires_grad_(False)
    cast_once(teacher, amp)
    accuracy = evaluate(teacher, test_loader, amp)["accuracy"]
    print(f"teacher: {accuracy:.2f} % on {len(test_files):,} real test images", flush=True)
    optimizer = build_optimizer(student, args)
    scheduler = build_scheduler(optimizer, args, args.epochs * len(train_loader))

    def loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # the labels are not used
        with torch.inference_mode():
            teacher_logits = teacher(images)
        student_logits = distributed(images)
        loss = kd_loss(student_logits, teacher_logits, args.temperature)
        return loss, student_logits.argmax(1) == teacher_logits.argmax(1)

    # the run
    average = WeightAverage(student, args.ema) if args.ema else None
    shown, trained = (average.model, student) if average else (student, None)
    step = TrainStep(loss_fn, optimizer, amp, not args.no_graph, average and average.update)
    identity = {
        "train_images": len(train_files),
        "test_images": len(test_files),
        "teacher_sha256": teacher_sha256,
    }
    run = Run(args, "imagenet", identity, teacher_accuracy=accuracy)
    first_epoch = run.restore(shown, optimizer, scheduler, trained)
    progress = Progress(first_epoch, args.epochs, len(train_loader) * args.batch_size)
    with run:
        for epoch in range(first_epoch, args.epochs + 1):
            began, lr = time.perf_counter(), float(scheduler.get_last_lr()[0])
            seed_everything(args.seed, epoch)
            train = train_one_epoch(student, train_loader, step, scheduler, progress.on_batch)
            parallel.average_statistics(student, shown)
            test = evaluate(shown, test_loader, amp)
            row = {
                "epoch": epoch,
                "lr": lr,
                "train_loss": train["loss"],
                "train_agreement": train["hits"],
                "test_loss": test["loss"],
                "test_accuracy": test["accuracy"],
                "seconds": time.perf_counter() - began,
                "images_per_second": train["images_per_second"],
            }
            checkpoint = to_checkpoint(shown, test_files.classes)
            if run.record(row, checkpoint, optimizer, scheduler, trained):
                plot_run(run.folder)
            progress.epoch(row)
        progress.close()
        per_class = per_class_accuracy(shown, test_loader, amp)
        run.finish(to_checkpoint(shown, test_files.classes), per_class)
        if parallel.leads():
            plot_run(run.folder)


def list_data(args: Namespace) -> tuple[ImageFiles, ImageFiles]:
    """The synthetic images and the real validation set. Errors: UserError if they do not agree."""
    classes = read_classes(args.label_file, args.num_classes) if args.label_file else None
    train_files = list_images(args.synthetic_data_dir, args.num_classes, classes)
    test_files = list_validation(args.val_dir, args.num_classes, args.ground_truth)
    check_same_classes(train_files, test_files)
    return train_files.spread(args.limit), test_files.spread(args.limit)


def load_teacher(args: Namespace) -> nn.Module:
    """The teacher that `args` name, on the CPU. Errors: UserError."""
    if args.teacher_weights not in ("imagenet", "random"):
        expected = {"arch": args.arch, "stem": "imagenet", "num_classes": args.num_classes}
        return load_model(args.teacher_weights, **expected)
    if args.teacher_weights == "imagenet" and args.num_classes != 1000:
        raise UserError(f"torchvision's teachers have 1000 classes, and not {args.num_classes}")
    teacher = build_model(args.arch, "imagenet", args.num_classes)
    print(f"teacher: {init_from(teacher, args.teacher_weights)}", flush=True)
    return teacher


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
