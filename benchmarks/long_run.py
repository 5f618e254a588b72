"""Does a long run grow? Resident memory and open files over 200 short epochs of the student.

    python benchmarks/long_run.py

Runs the demo's student in this process, with an untrained teacher and small epochs, and writes
checkpoints, table and plots after every one of them. Linux only: it reads /proc/self.
"""

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_train_cifar10 as student_script
from experiment import flags, run
from experiment.errors import one_line_errors


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__)
    add, count = parser.add_argument, flags.int_in(1, 10**5)
    add("--epochs", type=count, default=200, help="length of the run [%(default)s]")
    add("--every", type=count, default=10, help="epochs from one line to the next [%(default)s]")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    run.SAVE_EVERY = 0
    epochs, train_one_epoch = 0, student_script.train_one_epoch

    def counted(*given):
        nonlocal epochs
        epochs += 1
        if epochs % args.every == 0:
            files = len(os.listdir("/proc/self/fd"))
            print(f"{epochs}, {resident_mb():.0f} MB, {files}", file=sys.stderr)
        return train_one_epoch(*given)

    student_script.train_one_epoch = counted
    print("epoch, resident, open files", file=sys.stderr)
    argv = f"--demo --epochs {args.epochs} --limit 64 --batch_size 32 --teacher_weights random"
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            student_script.main(student_script.parse_args([*argv.split(), "--device", "cpu"]))
        finally:
            os.chdir(before)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
