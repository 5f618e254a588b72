"""Distil a student from a torchvision teacher on synthetic images of ImageNet's 1000 classes.

    python imagenet/main_train_imagenet.py --check_data
    python imagenet/main_train_imagenet.py
    torchrun --nproc_per_node=8 imagenet/main_train_imagenet.py

The method is the one of main_train_cifar10.py, and the recipe the one of DM-KD's ImageNet script
(https://github.com/zhengli97/DM-KD). A ResNet18 with random weights sees only synthetic images,
which are read from their folders. After every epoch it is tested on the real validation set. The
last epoch's student goes to student_imagenet_kd.pth. Plots, metrics.csv and checkpoints are in
runs/imagenet-001. imagenet/README.md describes the data and estimates the cost.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import TrainStep, evaluate, kd_loss, train_one_epoch
from experiment import flags, folder, parallel
from experiment.device import pick_device, seed_everything
from experiment.download import local_file, sha256
from experiment.errors import UserError, one_line_errors
from experiment.run import Run
from imagenet.index import ImageFiles, check_same_classes, list_images, read_classes
from imagenet.loader import FolderLoader, check_data
from models import build_model, cast_weights_, checksum, describe, init_from, load_model
from networks.cifar_stems import TORCHVISION_NETWORKS
from optimizers import build_optimizer, build_scheduler
from plots import plot_run

# The published recipe.
RECIPE = dict(epochs=100, batch_size=256, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
RECIPE |= dict(scheduler="multistep", milestones=[0.3, 0.6, 0.9], gamma=0.1)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    networks = f"one of {', '.join(TORCHVISION_NETWORKS)}"
    count, side = flags.int_in(1, 10**9), flags.int_in(32, 4096)
    add = parser.add_argument_group("data").add_argument
    # fmt: off
    add("--synthetic_data_dir", type=Path, default=Path("data/imagenet/synthetic"), metavar="DIR",
        help="the training images, in class folders or named as DM-KD names them [%(default)s]")
    add("--val_dir", type=Path, default=Path("data/imagenet/val"), metavar="DIR",
        help="the real validation set, in class folders [%(default)s]")
    add("--label_file", type=Path, metavar="FILE",
        help="lists all classes in order, if the training images are of some of them only: the "
        "label file of Stable-ImageNet-1K, or Kaggle's LOC_synset_mapping.txt")
    add("--check_data", action="store_true", help="count and sample the images, report and exit")
    add("--num_classes", type=count, default=1000, metavar="N", help="of both sets [%(default)s]")
    add("--image_size", type=side, default=224, metavar="N", help="pixels a side [%(default)s]")
    add("--limit", type=count, metavar="N", help="use N images of each set, evenly spaced [all]")
    add("--workers", type=flags.int_in(0, 1024), default=8, metavar="N",
        help="processes that decode training images, and as many again for test images, for each "
        "GPU; no effect on results [%(default)s]")
    add = parser.add_argument_group("student").add_argument
    add("--arch", choices=TORCHVISION_NETWORKS, default="resnet18", metavar="NAME",
        help=f"{networks} [%(default)s]")
    flags.add_optimisation_flags(parser, RECIPE)
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher_weights", default="resnet18", metavar="TEACHER",
        help=f"{networks}, with torchvision's IMAGENET1K_V1 weights; a weight file or a URL "
        "(URL#sha256=HEX is checked); or random, an untrained network, as a control [%(default)s]")
    add("--temperature", "--kd_temp", type=flags.float_in(0.01, 1000), default=10.0, metavar="T",
        help="softens the outputs of teacher and student [%(default)s]")
    # fmt: on
    flags.add_run_flags(parser, "imagenet", "student_imagenet_kd.pth")
    return folder.parse_args(parser, argv, "imagenet")


def main(args: Namespace) -> None:
    device, amp = pick_device(args.device, args.amp)
    parallel.init_process_group(device)

    # data: the student trains on synthetic images, and is tested on real ones
    train_files, test_files = list_data(args)
    if args.check_data:
        for files in (train_files, test_files):
            print(check_data(files, args.image_size))
        return
    reading = dict(batch_size=args.batch_size, workers=args.workers, size=args.image_size)
    train_loader = FolderLoader(train_files, device=device, train=True, **reading)
    test_loader = FolderLoader(test_files, device=device, train=False, **reading)

    # teacher and student, optimizer, scheduler
    seed_everything(args.seed)
    student = build_model(args.arch, "imagenet", args.num_classes).to(device)
    distributed = parallel.distribute(student)  # `student` itself without torchrun
    with parallel.rank_zero_first():
        teacher, teacher_sha256, files = load_teacher(args)
    teacher = teacher.to(device).eval().requires_grad_(False)
    teacher_test = evaluate(teacher, test_loader)
    if not math.isfinite(teacher_test["loss"]):
        raise UserError("the teacher's outputs on the real test images are not finite")
    accuracy = teacher_test["accuracy"]
    print(f"teacher: {accuracy:.2f} % on {len(test_files):,} real test images", flush=True)
    cast_weights_(teacher, amp)
    optimizer = build_optimizer(student, args, amp)
    scheduler = build_scheduler(optimizer, args, args.epochs * len(train_loader))

    def loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # the labels are not used
        with torch.no_grad():
            teacher_logits = teacher(images)
        student_logits = distributed(images)
        loss = kd_loss(student_logits, teacher_logits, args.temperature)
        return loss, student_logits.argmax(1) == teacher_logits.argmax(1)

    # the run: config.json, metrics.csv, checkpoints and plots in runs/imagenet-001
    step = TrainStep(loss_fn, optimizer, amp, graph=not args.no_cuda_graph)
    state = dict(model=student, optimizer=optimizer, scheduler=scheduler, step=step)
    about = describe(student, test_files.classes)
    must_match = {"train_images": len(train_files), "test_images": len(test_files)}
    must_match |= {"train_names_sha256": train_files.sha256(), "teacher_sha256": teacher_sha256}
    must_match |= {"test_names_sha256": test_files.sha256()}
    extra = {"teacher_accuracy": accuracy, "teacher_files": files}
    with Run(args, "imagenet", state, about, device, amp, must_match, plot_run, **extra) as run:
        for epoch in run.epochs():
            train = train_one_epoch(student, train_loader, step, scheduler, run.on_batch)
            precision = None if epoch == args.epochs else amp  # last test: float32 (CUDA: TF32)
            test = evaluate(student, test_loader, precision)
            row = {"train_loss": train["loss"], "train_agreement": train["matches"]}
            row |= {"test_loss": test["loss"], "test_accuracy": test["accuracy"]}
            run.log(row | {"images_per_second": train["images_per_second"]})
        run.finish()


def list_data(args: Namespace) -> tuple[ImageFiles, ImageFiles]:
    """The synthetic images and the real validation set. Errors: UserError if they do not agree."""
    classes = read_classes(args.label_file, args.num_classes) if args.label_file else None
    train_files = list_images(args.synthetic_data_dir, args.num_classes, classes)
    test_files = list_images(args.val_dir, args.num_classes)
    check_same_classes(train_files, test_files)
    return train_files.spread(args.limit), test_files.spread(args.limit)


def load_teacher(args: Namespace) -> tuple[nn.Module, str, dict[str, str]]:
    """The teacher, the checksum of its weights, and the SHA-256 of its file.

    Errors: UserError when there is no such teacher, or it has other classes.
    """
    source, files = args.teacher_weights, {}
    if source == "random":
        teacher = build_model(args.arch, "imagenet", args.num_classes)
    elif source not in TORCHVISION_NETWORKS:
        path = local_file(source)
        teacher = load_model(path, stem="imagenet", num_classes=args.num_classes)
        files[source] = sha256(path)
        print(f"teacher: {teacher.spec['arch']}, {source}")
    elif args.num_classes == 1000:
        teacher = build_model(source, "imagenet", 1000)
        print(f"teacher: torchvision's {source}, {init_from(teacher, 'imagenet')}")
    else:
        raise UserError(f"torchvision's {source} has 1000 classes, and not {args.num_classes}")
    return teacher, checksum(teacher), files


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
