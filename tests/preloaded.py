"""What the server of tests/processes.py imports and draws once, for all of its processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot
import torch.distributed.launcher.api

import fine_tune_teacher_cifar10
import imagenet.main_train_imagenet
import main_train_cifar10
from synthetic_data.demo_images import load_demo

__all__ = ["fine_tune_teacher_cifar10", "imagenet", "main_train_cifar10", "matplotlib", "torch"]

for part in ("test", "synthetic"):
    load_demo(part)
