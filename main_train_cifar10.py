"""Distil a student from a teacher, on synthetic images alone, and test it on real CIFAR-10.

    python main_train_cifar10.py --epochs 50 --lr 0.05 --batch_size 128 \\
        --teacher_weights teacher_cifar10_finetuned.pth

A randomly initialised network, a ResNet18 unless told otherwise, sees the 50,000 AI-generated
images of CIFAKE and learns to match the teacher's softened outputs, T^2 * KL(teacher || student) at
T = 10. It is shown no real image and no label; after every epoch it is tested on the 10,000 real
test images. student_cifar10_kd.pth is written when the last epoch is done. Plots, metrics.csv and
checkpoints are in runs/student-001 while it runs. What was measured, and where, is in the README.
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import flags
import parallel
from data import (
    REAL_SETS,
    TEST_BATCH_SIZE,
    DeviceLoader,
    ImageSet,
    download_cifake,
    load_cifake,
    load_demo,
    load_noise,
)
from engine import (
    TrainStep,
    WeightAverage,
    build_optimizer,
    build_scheduler,
    distribute,
    evaluate,
    evaluate_kd,
    kd_loss,
    label_loss,
    per_class_accuracy,
    standardize,
    train_one_epoch,
)
from experiment import Progress, Run, UserError, one_line_errors, pick_device, seed_everything
from folders import load_class_folders
from models import (
    ARCHITECTURES,
    STEMS,
    Ensemble,
    build_model,
    cast_once,
    checksum,
    load_model,
    to_checkpoint,
)
from plots import plot_run

# The published recipe, and the demo's.
RECIPE = dict(epochs=50, lr=0.05, optimizer="sgd", weight_decay=5e-4, scheduler="multistep")
DEMO = dict(
    epochs=8,
    stem="imagenet",
    teacher_weights=["runs/demo/teacher_cifar10_finetuned.pth"],
    output=Path("runs/demo/student_cifar10_kd.pth"),
)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    data = flags.add_data_flags(parser)
    data.add_argument(
        "--synthetic_data_dir",
        type=Path,
        default=Path("synthetic_data/cifake_train_fake"),
        metavar="DIR",
        help="holds the images of CIFAKE's train/FAKE, or others named like them; for CIFAR-100, a "
        "folder for each class [%(default)s]",
    )
    data.add_argument(
        "--download_synthetic",
        action="store_true",
        help="fetch CIFAKE to there first, with the optional package kagglehub",
    )
    data.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="leave out, count and report synthetic images that cannot be used; without it, the "
        "first one stops the script",
    )
    data.add_argument(
        "--holdout",
        type=flags.whole(0, 10**9),
        default=0,
        metavar="N",
        help="keep N training images apart, to choose a recipe by how well the student matches the "
        "teacher on them: columns val_kd_loss and val_agreement [%(default)s]",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--student_arch",
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
    flags.add_optimisation_flags(parser, **RECIPE)
    flags.add_augmentation_flags(parser)
    distillation = parser.add_argument_group("distillation")
    distillation.add_argument(
        "--teacher_weights",
        "--teacher_weights_path",
        nargs="+",
        default=["teacher_cifar10_finetuned.pth"],
        metavar="FILE",
        help="the teacher; 'random' is an untrained one, as a control. Of several, the mean of "
        "their logits teaches %(default)s",
    )
    distillation.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        metavar="NAME",
        help="the network that the teacher has to be [what its file holds; random: resnet18]",
    )
    distillation.add_argument(
        "--teacher_stem",
        choices=STEMS,
        help="the stem that the teacher has to have [the same as --stem]",
    )
    flags.add_temperature_flag(distillation.add_argument)
    distillation.add_argument(
        "--standardize_logits",
        action="store_true",
        help="bring the logits of both to the same mean and deviation first",
    )
    controls = parser.add_argument_group("controls")
    controls.add_argument(
        "--train_on",
        choices=("synthetic", "real", "noise"),
        default="synthetic",
        help="the training images; noise is uniform [%(default)s]",
    )
    controls.add_argument(
        "--hard_labels",
        action="store_true",
        help="learn the labels of the images by cross-entropy; the teacher is only compared with",
    )
    flags.add_run_flags(parser, "student", "student_cifar10_kd.pth")
    args = flags.parse(parser, argv, "student", DEMO)
    if args.hard_labels and args.standardize_logits:
        parser.error("--standardize_logits is for distillation, and --hard_labels does without")
    return args


def main(args: Namespace) -> None:
    device, amp = pick_device(args.device, args.amp)
    parallel.start(device)

    # data: the student trains on synthetic images, and is tested on real ones
    with parallel.leader_first():
        load_real = REAL_SETS[args.dataset]
        test_set = load_demo("test") if args.demo else load_real(args.data_dir, train=False)
        train_set, held_out = load_train_set(args, test_set.classes).hold_out(args.holdout)
    test_set = test_set.first(args.limit)
    views = {"augment": args.augment, "mix": args.mix, "mix_alpha": args.mix_alpha}
    train_loader = DeviceLoader(train_set, args.batch_size, device, train=True, **views)
    held_out_loader = DeviceLoader(held_out, TEST_BATCH_SIZE, device, train=False)
    test_loader = DeviceLoader(test_set, TEST_BATCH_SIZE, device, train=False)

    # models, optimizer, scheduler
    seed_everything(args.seed)
    student = build_model(args.student_arch, args.stem, len(test_set.classes)).to(device)
    distributed = distribute(student, args.sync_bn)  # `student` itself, but with torchrun
    teacher, teacher_sha256 = load_teacher(args, test_set.classes)
    teacher = teacher.to(device).eval().requires_grad_(False)
    cast_once(teacher, amp)
    accuracy = evaluate(teacher, test_loader, amp)["accuracy"]
    print(f"teacher: {accuracy:.2f} % on {len(test_set):,} real test images", flush=True)
    optimizer = build_optimizer(student, args)
    scheduler = build_scheduler(optimizer, args, args.epochs * len(train_loader))

    def loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # the labels are not used
        with torch.inference_mode():
            teacher_logits = teacher(images)
        student_logits = distributed(images)
        if args.standardize_logits:
            student_logits, teacher_logits = map(standardize, (student_logits, teacher_logits))
        loss = kd_loss(student_logits, teacher_logits, args.temperature)
        return loss, student_logits.argmax(1) == teacher_logits.argmax(1)

    def hard_loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # a control
        return label_loss(distributed(images), labels)

    # the run
    average = WeightAverage(student, args.ema) if args.ema else None
    shown, trained = (average.model, student) if average else (student, None)
    chosen = hard_loss_fn if args.hard_labels else loss_fn
    step = TrainStep(chosen, optimizer, amp, not args.no_graph, average and average.update)
    identity = {
        "train_images": len(train_set),
        "skipped_images": train_set.skipped,
        "test_images": len(test_set),
        "teacher_sha256": teacher_sha256,
    }
    run = Run(args, "student", identity, teacher_accuracy=accuracy)
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
                "train_label_accuracy" if args.hard_labels else "train_agreement": train["hits"],
                "test_loss": test["loss"],
                "test_accuracy": test["accuracy"],
            }
            if args.holdout:
                how = (args.temperature, amp, args.standardize_logits)
                val = evaluate_kd(shown, teacher, held_out_loader, *how)
                row |= {"val_kd_loss": val["loss"], "val_agreement": val["agreement"]}
            row["seconds"] = time.perf_counter() - began
            row["images_per_second"] = train["images_per_second"]
            checkpoint = to_checkpoint(shown, test_set.classes)
            if run.record(row, checkpoint, optimizer, scheduler, trained):
                plot_run(run.folder)
            progress.epoch(row)
        progress.close()
        per_class = per_class_accuracy(shown, test_loader, amp)
        run.finish(to_checkpoint(shown, test_set.classes), per_class)
        if parallel.leads():
            plot_run(run.folder)


def load_train_set(args: Namespace, classes: tuple[str, ...]) -> ImageSet:
    """The images that `--demo` and `--train_on` name, up to `--limit`; `classes` are the test's."""
    if args.demo:
        return load_demo("synthetic").first(args.limit)
    if args.train_on == "noise":
        return replace(load_noise().first(args.limit), classes=classes)
    if args.train_on == "real":
        return REAL_SETS[args.dataset](args.data_dir, train=True).first(args.limit)
    if args.dataset != "cifar10":
        if args.download_synthetic or args.skip_bad_images:
            raise UserError("--download_synthetic and --skip_bad_images are for CIFAKE alone")
        return load_class_folders(args.synthetic_data_dir, classes, args.limit)
    if args.download_synthetic:
        download_cifake(args.synthetic_data_dir)
    return load_cifake(args.synthetic_data_dir, args.limit, args.skip_bad_images)


def load_teacher(args: Namespace, classes: tuple[str, ...]) -> tuple[nn.Module, str | None]:
    """The teacher, and a checksum of its weights: a run has to go on with the same."""
    members = [load_member(args, source, classes) for source in args.teacher_weights]
    teacher = members[0] if len(members) == 1 else Ensemble(members)
    return teacher, None if "random" in args.teacher_weights else checksum(teacher)


def load_member(args: Namespace, source: str, classes: tuple[str, ...]) -> nn.Module:
    """One of the networks that teach: an untrained one, or that of a weight file."""
    stem = args.teacher_stem or args.stem
    if source == "random":
        return build_model(args.arch or "resnet18", stem, len(classes))
    if not Path(source).is_file():
        raise UserError(
            f"no teacher at {source}: make one with `python fine_tune_teacher_cifar10.py`"
        )
    expected = {"stem": stem, "num_classes": len(classes), "classes": list(classes)}
    return load_model(source, **expected, **({"arch": args.arch} if args.arch else {}))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
