"""What a device without float64, such as Apple's MPS, would refuse."""

from argparse import Namespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import DeviceLoader, ImageSet
from engine import TrainStep, kd_loss, predict, train_one_epoch
from models import build_model
from optimizers import build_optimizer, build_scheduler
from synthetic_data.demo_images import load_demo
from synthetic_data.ema import EMA


class NoFloat64(TorchDispatchMode):
    """Fails on any operation that takes or makes a float64 tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise AssertionError(f"{func} has a float64 tensor of shape {tuple(value.shape)}")
        return result


def test_the_guard_finds_float64():
    with pytest.raises(AssertionError, match="float64"), NoFloat64():
        torch.ones(3).double()


@pytest.mark.parametrize(
    ("optimizer", "augmentation"),
    [
        ("sgd", {"augment": "crop"}),
        ("adam", {"augment": "reflect"}),
        ("muon", {"augment": "rrc_jitter"}),
        ("sgd", {"mixup": 1.0}),
    ],
)
def test_nothing_on_the_path_of_the_device_is_float64(optimizer, augmentation):
    demo = load_demo("train")
    images = ImageSet(demo.images[:32], demo.labels[:32], demo.classes)
    recipe = Namespace(optimizer=optimizer, lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.1)
    recipe.scheduler, recipe.milestones, recipe.gamma, recipe.warmup = "linear", [0.5], 0.1, 0.1
    with NoFloat64():
        loader = DeviceLoader(images, 16, "cpu", train=True, **augmentation)
        student, teacher = build_model("wrn_16_1"), build_model("wrn_16_1").eval()
        rule = build_optimizer(student, recipe)
        scheduler = build_scheduler(rule, recipe, len(loader))
        ema = EMA(student, 0.9)

        def loss_fn(images, labels):
            logits, teacher_logits = student(images), teacher(images)
            return kd_loss(logits, teacher_logits, 10.0), logits.argmax(1) == labels.argmax(-1)

        for epoch in (1, 2):
            loader.epoch = epoch
            train_one_epoch(student, loader, TrainStep(loss_fn, rule, None, ema.update), scheduler)
        predict(ema.model, DeviceLoader(images, 16, "cpu", train=False))
