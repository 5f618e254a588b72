"""Step 1: train the teacher on real CIFAR-10.

    python fine_tune_teacher_cifar10.py

A ResNet18 with torchvision's ImageNet weights is trained on the 50,000 real training images with
cross-entropy. After every epoch it is tested on the 10,000 real test images. The last epoch's
teacher goes to teacher_cifar10_finetuned.pth. Plots, metrics.csv and checkpoints are in
runs/teacher-001.

Estimates: minutes on a GPU, one to two hours on two CPU cores with bfloat16. The flags of
scripts/cpu.sh train a smaller network there to 92.98 +- 0.29 % (n = 4) in 17 minutes.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

from augmentations import AUGMENTATIONS
from data import REAL_SETS, TEST_BATCH_SIZE, DeviceLoader, normalize
from engine import TrainStep, evaluate, label_loss, predict, train_one_epoch
from experiment import flags, folder, parallel
from experiment.device import pick_device, seed_everything
from experiment.download import local_file, sha256
from experiment.errors import one_line_errors
from experiment.run import Run
from models import ARCHITECTURES, STEMS, build_model, describe, init_from
from networks.airbench import WHITENING_IMAGES, Airbench
from optimizers import build_optimizer, build_scheduler
from plots import plot_run, save_predictions
from synthetic_data.demo_images import load_demo

# The published recipe, and what --demo changes.
RECIPE = dict(epochs=15, batch_size=128, optimizer="adam", lr=1e-3, weight_decay=0.0)
RECIPE |= dict(scheduler="none")
DEMO = dict(epochs=8, init="random", stem="imagenet", scheduler="onecycle")
DEMO |= dict(output=Path("runs/demo/teacher_cifar10_finetuned.pth"))
INITS = ("imagenet", "random")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    flags.add_data_flags(parser, DEMO)
    add = flags.add_model_flags(parser, ARCHITECTURES, STEMS).add_argument
    # fmt: off
    add("--init", default="imagenet", metavar="START",
        help="imagenet: torchvision's IMAGENET1K_V1; random; or the path or URL of a weight file "
        "(URL#sha256=HEX is checked) [%(default)s]")
    # fmt: on
    flags.add_optimisation_flags(parser, RECIPE)
    flags.add_augmentation_flags(parser, AUGMENTATIONS)
    flags.add_run_flags(parser, "teacher", "teacher_cifar10_finetuned.pth")
    return folder.parse_args(parser, argv, "teacher", DEMO)


def main(args: Namespace) -> None:
    device, amp = pick_device(args.device, args.amp)
    parallel.init_process_group(device)

    # data
    with parallel.rank_zero_first():
        if args.demo:
            train_set, test_set = load_demo("train"), load_demo("test")
        else:
            load = REAL_SETS[args.dataset]
            train_set, test_set = load(args.data_dir, train=True), load(args.data_dir, train=False)
    train_set, test_set = train_set.first(args.limit), test_set.first(args.limit)
    augmentation = dict(augment=args.augment, seed=args.seed)
    train_loader = DeviceLoader(train_set, args.batch_size, device, train=True, **augmentation)
    test_loader = DeviceLoader(test_set, TEST_BATCH_SIZE, device, train=False)

    # model, optimizer, scheduler
    seed_everything(args.seed)
    teacher = build_model(args.arch, args.stem, len(test_set.classes))
    must_match = {"train_images": len(train_set), "test_images": len(test_set)}
    if folder.is_new(args):
        with parallel.rank_zero_first():
            start = args.init if args.init in INITS else local_file(args.init)
            print(f"start: {init_from(teacher, start)}", flush=True)
            if args.init not in INITS:
                must_match["init_sha256"] = sha256(start)
        if args.init == "random" and isinstance(teacher, Airbench):
            teacher.whiten(normalize(train_set.images[:WHITENING_IMAGES]))
    teacher.to(device)
    distributed = parallel.distribute(teacher)  # `teacher` itself without torchrun
    optimizer = build_optimizer(teacher, args, amp)
    scheduler = build_scheduler(optimizer, args, args.epochs * len(train_loader))

    def loss_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return label_loss(distributed(images), labels)

    # the run: config.json, metrics.csv, checkpoints and plots in runs/teacher-001
    step = TrainStep(loss_fn, optimizer, amp, graph=not args.no_cuda_graph)
    state = dict(model=teacher, optimizer=optimizer, scheduler=scheduler, step=step)
    about = describe(teacher, test_set.classes)
    with Run(args, "teacher", state, about, device, amp, must_match, plot_run) as run:
        for epoch in run.epochs():
            train_loader.epoch = epoch
            train = train_one_epoch(teacher, train_loader, step, scheduler, run.on_batch)
            precision = None if epoch == args.epochs else amp  # last test: float32 (CUDA: TF32)
            test = evaluate(teacher, test_loader, precision)
            row = {"train_loss": train["loss"], "train_accuracy": train["matches"]}
            row |= {"test_loss": test["loss"], "test_accuracy": test["accuracy"]}
            run.log(row | {"images_per_second": train["images_per_second"]})
        logits = predict(teacher, test_loader)
        if parallel.is_rank_zero():
            save_predictions(run.folder, test_set, logits)
        run.finish()


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
