"""Store a network in half precision, and test both versions.

    python scripts/half_precision.py runs/cpu/teacher-0.pth weights/airbench94_cifar10.pth

`models.load_model` reads both files. The second has half the size. The script prints what
weights/README.md has: accuracy on the real test set, size and SHA-256.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import CLASSES, TEST_BATCH_SIZE, DeviceLoader, load_cifar10
from engine import evaluate
from experiment import flags
from experiment.download import sha256
from experiment.errors import UserError, one_line_errors
from experiment.files import save
from models import load_model, to_checkpoint


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__, "FILE HALF")
    parser.add_argument("file", type=Path, metavar="FILE", help="the checkpoint of a run")
    parser.add_argument("half", type=Path, metavar="HALF", help="the new file")
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), metavar="DIR", help="CIFAR-10 [%(default)s]"
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    if args.half.exists():
        raise UserError(f"{args.half} is there already")
    model = load_model(args.file, num_classes=10, classes=list(CLASSES))
    checkpoint = to_checkpoint(model, CLASSES)
    for key, value in checkpoint["model"].items():
        if value.is_floating_point():
            checkpoint["model"][key] = value.half()
    args.half.parent.mkdir(parents=True, exist_ok=True)
    save(args.half, checkpoint)
    loader = DeviceLoader(load_cifar10(args.data_dir, train=False), TEST_BATCH_SIZE, "cpu", False)
    for path in (args.file, args.half):
        accuracy = evaluate(load_model(path), loader)["accuracy"]
        size = path.stat().st_size / 1e6
        print(f"{path}: {accuracy:.2f} %, {size:.1f} MB, SHA-256 {sha256(path)}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
