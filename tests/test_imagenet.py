"""main_train_imagenet.py from end to end, on made images of 20 classes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from test_parallel import run
from test_scripts import assert_equal_weights, metrics, stop_after, without_times

import main_train_imagenet as script
from experiment import UserError
from models import build_model, load_model, to_checkpoint

WORDNET_IDS = [f"n{i:08d}" for i in range(101, 121)]


def write_set(folder: Path, per_class: int, seed: int) -> None:
    """20 class folders of JPEGs of 64x48 pixels, each of its own colour."""
    rng = np.random.default_rng(seed)
    for label, wordnet_id in enumerate(WORDNET_IDS):
        (folder / wordnet_id).mkdir(parents=True)
        colour = np.random.default_rng(label).integers(0, 256, 3)
        for number in range(per_class):
            pixels = (colour + rng.normal(0, 20, (48, 64, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / wordnet_id / f"{wordnet_id}_{number}.JPEG")


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    write_set(folder / "synthetic", per_class=50, seed=0)
    write_set(folder / "val", per_class=3, seed=1)
    torch.manual_seed(0)
    teacher = to_checkpoint(build_model("shufflenet_v2_x1_0", "imagenet", 20), tuple(WORDNET_IDS))
    torch.save(teacher, folder / "teacher.pth")
    return folder


@pytest.fixture
def tiny(sets) -> list[str]:
    return [
        *("--synthetic_data_dir", str(sets / "synthetic"), "--val_dir", str(sets / "val")),
        *("--teacher_weights", str(sets / "teacher.pth"), "--arch", "shufflenet_v2_x1_0"),
        *("--student_arch", "shufflenet_v2_x1_0", "--num_classes", "20", "--image_size", "32"),
        *"--epochs 2 --batch_size 50 --lr 0.01 --workers 0 --limit 100".split(),
    ]


def student(*flags) -> None:
    script.main(script.parse_args([*map(str, flags)]))


def test_the_published_recipe_is_the_default():
    args = script.parse_args([])
    wanted = dict(epochs=100, lr=0.1, batch_size=256, weight_decay=1e-4, temperature=10)
    wanted |= dict(milestones=[0.3, 0.6, 0.9], gamma=0.1, image_size=224, num_classes=1000)
    assert wanted.items() <= vars(args).items()


def test_a_student_learns_from_a_thousand_images(workdir, tiny, capsys):
    student(*tiny, "--limit", 1000, "--workers", 2)
    folder = Path("runs/imagenet-001")
    rows = metrics(folder)
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    config = json.loads((folder / "config.json").read_text())
    assert (config["train_images"], config["test_images"]) == (1000, 60)
    network = load_model("student_imagenet_kd.pth", classes=WORDNET_IDS)
    assert network.spec == {"arch": "shufflenet_v2_x1_0", "stem": "imagenet", "num_classes": 20}
    with open(folder / "per_class.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == WORDNET_IDS
    assert "final" in capsys.readouterr().out


def test_it_goes_on_bit_for_bit(workdir, tiny, monkeypatch):
    flags = [*tiny, "--mix", "cutmix", "--ema", "0.9"]
    student(*flags, "--run_dir", "unbroken", "--output", "unbroken.pth")
    with monkeypatch.context() as patch:
        stop_after(patch, script, 1)
        with pytest.raises(KeyboardInterrupt):
            student(*flags, "--run_dir", "stopped", "--output", "stopped.pth")
    student("--resume", "stopped", "--workers", 1)
    assert without_times(metrics(Path("stopped"))) == without_times(metrics(Path("unbroken")))
    assert_equal_weights(Path("stopped.pth"), Path("unbroken.pth"))


def test_two_ranks_go_through_it(workdir, tiny):
    done = run(2, [str(REPOSITORY / "main_train_imagenet.py")], *tiny, "--run_dir", "two")
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in metrics(Path("two"))] == ["1", "2"]
    assert done.stdout.count("epoch 2/2") == 1


def test_the_data_can_be_checked_beforehand(workdir, tiny, capsys):
    student(*tiny, "--check_data", "--limit", 1000)
    said = capsys.readouterr().out
    assert "1,000 images of 20 of 20 classes, 50 to 50 a class" in said
    assert "60 images of 20 of 20 classes, 3 to 3 a class" in said
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_classes", 30], "holds 20 class folders and not 30"),
        (["--teacher_weights", "imagenet"], "torchvision's teachers have 1000 classes, and not 20"),
        (["--teacher_weights", "nobody.pth"], "there is no weight file nobody.pth"),
        (["--arch", "resnet18"], "expected arch resnet18, found shufflenet_v2_x1_0"),
        (["--batch_size", 101], "--batch_size 101 is more than the 100 training images"),
        (["--val_dir", "nowhere"], "there is no folder nowhere"),
        (["--ground_truth", "x.csv"], "has class folders: it takes no x.csv"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(flags, message, workdir, tiny):
    with pytest.raises(UserError, match=message):
        student(*tiny, *flags)
    assert not any(workdir.iterdir())
