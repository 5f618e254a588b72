"""Step 2: distil a student from the teacher on synthetic images alone, and test it on real ones.

    python main_train_cifar10.py

A ResNet18 with random weights sees the 50,000 AI-generated images of CIFAKE and learns to match the
teacher's softened outputs, T^2 * KL(teacher || student) at T = 10. It sees no real image and no
label. After every epoch it is tested on the 10,000 real test images of CIFAR-10. The last epoch's
student goes to student_cifar10_kd.pth. Plots, metrics.csv and checkpoints are in runs/student-001.

Estimates: minutes on a GPU, five to nine hours on two CPU cores with bfloat16. The flags of
scripts/cpu.sh train a smaller student there to 89.60 +- 0.26 % (n = 3) in 55 minutes.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

import data
import models
from augmentations import AUGMENTATIONS
from engine import TrainStep, compare, kd_loss, label_loss, predict, score, train_one_epoch
from experiment import flags, folder, parallel
from experiment.device import pick_device, seed_everything
from experiment.download import local_file, sha256
from experiment.errors import UserError, one_line_errors
from experiment.run import Run
from networks.airbench import WHITENING_IMAGES, Airbench
from optimizers import build_optimizer, build_scheduler
from plots import plot_run, save_predictions
from synthetic_data.demo_images import load_demo
from synthetic_data.download import download_cifake
from synthetic_data.shifts import with_shifted_copies

# The published recipe, and what --demo changes.
RECIPE = dict(epochs=50, batch_size=128, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)
RECIPE |= dict(scheduler="multistep", milestones=[0.5, 0.8], gamma=0.1)
TEACHER = "teacher_cifar10_finetuned.pth"
DEMO = dict(epochs=8, stem="imagenet", teacher_weights=[f"runs/demo/{TEACHER}"])
DEMO |= dict(output=Path("runs/demo/student_cifar10_kd.pth"))


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    add = flags.add_data_flags(parser, DEMO).add_argument
    # fmt: off
    add("--synthetic_data_dir", type=Path, default=Path("synthetic_data/cifake_train_fake"),
        metavar="DIR", help="the images of CIFAKE's train/FAKE, or others named like them; for "
        "CIFAR-100, one folder per class [%(default)s]")
    add("--download_synthetic", action="store_true",
        help="first download CIFAKE to --synthetic_data_dir, with the optional package kagglehub")
    add("--holdout", type=flags.int_in(0, 10**9), default=0, metavar="N",
        help="hold N training images out, to choose a recipe by the student's agreement with the "
        "teacher on them and on altered copies of them [%(default)s]")
    flags.add_model_flags(parser, models.ARCHITECTURES, models.STEMS)
    flags.add_optimisation_flags(parser, RECIPE)
    flags.add_augmentation_flags(parser, AUGMENTATIONS)
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher_weights", "--teacher_weights_path", nargs="+", metavar="FILE", default=[TEACHER],
        help="the teacher's file or URL (URL#sha256=HEX is checked); several form an ensemble: "
        "the student matches the mean of their logits; random is an untrained network with --arch "
        f"and --stem, a control [{TEACHER}]")
    add("--temperature", "--kd_temp", type=flags.float_in(0.01, 1000), default=10.0, metavar="T",
        help="softens the outputs of teacher and student [%(default)s]")
    add = parser.add_argument_group("controls").add_argument
    add("--train_on", choices=("synthetic", "real", "noise"), default="synthetic",
        help="the training images; noise is uniform [%(default)s]")
    add("--hard_labels", action="store_true",
        help="train on the images' own labels with cross-entropy; the teacher is only tested")
    need, cifake = parser.add_need, ("cifar10", "synthetic")
    for flag in ("synthetic_data_dir", "download_synthetic", "train_on"):
        need(flag, "leaving --demo out", lambda a: not a.demo)
    need("download_synthetic", "CIFAKE", lambda a: (a.dataset, a.train_on) == cifake)
    need("synthetic_data_dir", "--train_on synthetic", lambda a: a.train_on == "synthetic")
    need("temperature", "distillation, not --hard_labels",
        lambda a: not a.hard_labels or a.holdout > 0)
    # fmt: on
    flags.add_run_flags(parser, "student", "student_cifar10_kd.pth")
    return folder.parse_args(parser, argv, "student", DEMO)


def main(args: Namespace) -> None:
    device, amp = pick_device(args.device, args.amp)
    parallel.init_process_group(device)

    # data: the student trains on synthetic images, and is tested on real ones
    with parallel.rank_zero_first():  # rank 0 downloads; below, all ranks decode at once
        load_real = data.REAL_SETS[args.dataset]
        test_set = load_demo("test") if args.demo else load_real(args.data_dir, train=False)
        if args.download_synthetic:
            download_cifake(args.synthetic_data_dir)
    train_set = load_train_set(args, test_set.classes)
    test_set = test_set.first(args.limit)
    train_set, held_out = train_set.first(args.limit).hold_out(args.holdout)
    augmentation = dict(augment=args.augment, seed=args.seed)
    train_loader = data.DeviceLoader(train_set, args.batch_size, device, train=True, **augmentation)
    test_loader = data.DeviceLoader(test_set, data.TEST_BATCH_SIZE, device, train=False)
    held_out = with_shifted_copies(held_out)
    held_out_loader = data.DeviceLoader(held_out, data.TEST_BATCH_SIZE, device, train=False)

    # teacher and student, optimizer, scheduler
    seed_everything(args.seed)
    student = models.build_model(args.arch, args.stem, len(test_set.classes))
    if isinstance(student, Airbench):
        student.whiten(data.normalize(train_set.images[:WHITENING_IMAGES]))
    student.to(device)
    distributed = parallel.distribute(student)  # `student` itself without torchrun
    with parallel.rank_zero_first():
        teacher, teacher_sha256, files = load_teacher(args, test_set.classes)
    teacher = teacher.to(device).eval().requires_grad_(False)
    teacher_logits = predict(teacher, test_loader)
    if not teacher_logits.isfinite().all():
        raise UserError("the teacher's outputs on the real test images are not finite")
    accuracy = score(teacher_logits, test_set.labels)["accuracy"]
    print(f"teacher: {accuracy:.2f} % on {len(test_set):,} real test images", flush=True)
    held_out_logits = predict(teacher, held_out_loader)
    models.cast_weights_(teacher, amp)
    optimizer = build_optimizer(student, args, amp)
    scheduler = build_scheduler(optimizer, args, args.epochs * len(train_loader))

    def loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # the labels are not used
        with torch.no_grad():
            teacher_logits = teacher(images)
        student_logits = distributed(images)
        loss = kd_loss(student_logits, teacher_logits, args.temperature)
        return loss, student_logits.argmax(1) == teacher_logits.argmax(1)

    def hard_loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # a control
        return label_loss(distributed(images), labels)

    # the run: config.json, metrics.csv, checkpoints and plots in runs/student-001
    loss_fn = hard_loss_fn if args.hard_labels else loss_fn
    step = TrainStep(loss_fn, optimizer, amp, graph=not args.no_cuda_graph)
    state = dict(model=student, optimizer=optimizer, scheduler=scheduler, step=step)
    about = models.describe(student, test_set.classes)
    must_match = {"train_images": len(train_set), "test_images": len(test_set)}
    must_match |= {"train_sha256": train_set.sha256(), "teacher_sha256": teacher_sha256}
    extra = {"teacher_accuracy": accuracy, "teacher_files": files}
    with Run(args, "student", state, about, device, amp, must_match, plot_run, **extra) as run:
        for epoch in run.epochs():
            train_loader.epoch = epoch
            train = train_one_epoch(student, train_loader, step, scheduler, run.on_batch)
            precision = None if epoch == args.epochs else amp  # last test: float32 (CUDA: TF32)
            test = score(predict(student, test_loader, precision), test_set.labels)
            matches = "train_label_accuracy" if args.hard_labels else "train_agreement"
            row = {"train_loss": train["loss"], matches: train["matches"]}
            row |= {"test_loss": test["loss"], "test_accuracy": test["accuracy"]}
            if args.holdout:
                logits = predict(student, held_out_loader, precision)
                val = compare(logits, held_out_logits, args.temperature)
                row |= {"val_kd_loss": val["loss"], "val_agreement": val["agreement"]}
            run.log(row | {"images_per_second": train["images_per_second"]})
        logits = predict(student, test_loader)
        if parallel.is_rank_zero():
            save_predictions(run.folder, test_set, logits, teacher_logits)
        run.finish()


def load_train_set(args: Namespace, classes: tuple[str, ...]) -> data.ImageSet:
    """The images that --demo or --train_on name. `classes`: the test set's. Errors: UserError."""
    if args.demo:
        return load_demo("synthetic")
    if args.train_on == "noise":
        return data.load_noise(classes)
    if args.train_on == "real":
        return data.REAL_SETS[args.dataset](args.data_dir, train=True)
    if args.dataset == "cifar100":
        return data.load_class_folders(args.synthetic_data_dir, classes, args.limit)
    return data.load_cifake(args.synthetic_data_dir, args.limit)


def load_teacher(args: Namespace, classes: tuple[str, ...]) -> tuple[nn.Module, str, dict]:
    """The teacher, a checksum of its weights, and the SHA-256 of its files. Errors: UserError."""
    members, files = [], {}
    for source in args.teacher_weights:
        if source == "random":
            members.append(models.build_model(args.arch, args.stem, len(classes)))
            continue
        if not (path := local_file(source)).is_file():
            command = "python fine_tune_teacher_cifar10.py" + " --demo" * args.demo
            command += " --dataset cifar100" * (args.dataset == "cifar100")
            command += f" --output {source}" * (not args.demo and source != TEACHER)
            raise UserError(f"no teacher at {source}: make one with `{command}`")
        member = models.load_model(path, num_classes=len(classes), classes=list(classes))
        print(f"teacher: {member.spec['arch']} with the {member.spec['stem']} stem, {source}")
        members.append(member)
        files[source] = sha256(path)
    teacher = members[0] if len(members) == 1 else models.Ensemble(members)
    return teacher, models.checksum(teacher), files


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
