"""imagenet/main_train_imagenet.py from end to end, on made images of four classes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_equal_weights, metrics, stop_after, without_times
from PIL import Image
from processes import Process

from experiment.device import seed_everything
from experiment.download import sha256
from experiment.errors import UserError
from experiment.files import load, save
from experiment.folder import FORMAT, read_config
from imagenet import main_train_imagenet as script
from models import build_model, checksum, load_model, to_checkpoint

WORDNET_IDS = [f"n{i:08d}" for i in range(101, 105)]


def write_set(folder: Path, per_class: int, seed: int) -> None:
    """A folder for each class, with JPEGs of 64x48 pixels in its own colour."""
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
    write_set(folder / "synthetic", per_class=40, seed=0)
    write_set(folder / "val", per_class=3, seed=1)
    torch.manual_seed(0)
    for stem in ("imagenet", "cifar"):
        teacher = build_model("shufflenet_v2_x1_0", stem, 4)
        torch.save(to_checkpoint(teacher, tuple(WORDNET_IDS)), folder / f"{stem}_stem.pth")
    return folder


@pytest.fixture
def tiny(sets) -> list[str]:
    return [
        *("--synthetic_data_dir", str(sets / "synthetic"), "--val_dir", str(sets / "val")),
        *("--teacher_weights", str(sets / "imagenet_stem.pth"), "--arch", "shufflenet_v2_x1_0"),
        *"--num_classes 4 --image_size 32 --epochs 2 --batch_size 20 --lr 0.01".split(),
        *"--workers 0 --limit 40 --device cpu --amp off".split(),
    ]


def student(*flags) -> None:
    script.main(script.parse_args([*map(str, flags)]))


def test_the_published_recipe_is_the_default():
    args = script.parse_args([])
    expected = dict(epochs=100, batch_size=256, optimizer="sgd", lr=0.1, momentum=0.9)
    expected |= dict(weight_decay=1e-4, scheduler="multistep", milestones=[0.3, 0.6, 0.9])
    expected |= dict(gamma=0.1, temperature=10, image_size=224, num_classes=1000)
    expected |= dict(arch="resnet18", teacher_weights="resnet18", nesterov=False)
    assert expected.items() <= vars(args).items()


@pytest.mark.slow
def test_a_student_learns_from_folders(workdir, tiny, capsys, monkeypatch):
    loaded = []
    load = script.load_teacher
    monkeypatch.setattr(script, "load_teacher", lambda args: loaded.append(load(args)) or loaded[0])
    kd_loss, steps = script.kd_loss, []

    def recording(ours, theirs, temperature):
        steps.append((temperature, (ours.argmax(1) == theirs.argmax(1)).float().mean().item()))
        return kd_loss(ours, theirs, temperature)

    monkeypatch.setattr(script, "kd_loss", recording)
    student(*tiny, "--limit", 160, "--workers", 2, "--temperature", 4)
    folder = Path("runs/imagenet-001")
    rows = metrics(folder)
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    temperatures, agreements = zip(*steps, strict=True)  # of two epochs of eight steps
    assert set(temperatures) == {4}
    expected = [100 * sum(part) / 8 for part in (agreements[:8], agreements[8:])]
    assert [float(row["train_agreement"]) for row in rows] == pytest.approx(expected, rel=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert (config["train_images"], config["test_images"]) == (160, 12)
    teacher, teacher_sha256, files = loaded[0]
    assert config["teacher_files"] == files == {tiny[5]: sha256(tiny[5])}
    assert not teacher.training
    assert checksum(teacher) == teacher_sha256 == config["teacher_sha256"]  # it did not learn
    network = load_model("student_imagenet_kd.pth", classes=WORDNET_IDS)
    assert network.spec == {"arch": "shufflenet_v2_x1_0", "stem": "imagenet", "num_classes": 4}
    assert {path.name for path in folder.glob("*.png")} == {
        "train_val_losses.png",
        "val_accuracy.png",
    }
    assert f"final  {float(rows[1]['test_accuracy']):.2f} %" in capsys.readouterr().out


@pytest.mark.slow
def test_it_resumes_bit_for_bit(workdir, tiny, monkeypatch):
    monkeypatch.setattr(script, "plot_run", lambda folder: None)
    student(*tiny, "--run_dir", "unbroken", "--output", "unbroken.pth")
    with monkeypatch.context() as patch:
        stop_after(patch, script, 1)
        with pytest.raises(KeyboardInterrupt):
            student(*tiny, "--run_dir", "stopped", "--output", "stopped.pth")
    assert len(metrics("stopped")) == 1
    student("--resume", "stopped", "--workers", 1)
    assert without_times(metrics("stopped")) == without_times(metrics("unbroken"))
    assert_equal_weights("stopped.pth", "unbroken.pth")

    for key, flag, original in (("train", *tiny[:2]), ("test", *tiny[2:4])):
        shutil.copytree(original, other := f"other_{key}")
        image = Path(other, WORDNET_IDS[0], f"{WORDNET_IDS[0]}_0.JPEG")
        image.rename(image.with_name(f"{WORDNET_IDS[0]}_00.JPEG"))  # still the first
        with pytest.raises(UserError, match=f"with other files: {key}_names_sha256 was"):
            student("--resume", "stopped", flag, other)


@pytest.mark.slow
def test_two_ranks_go_through_it(workdir, tiny):
    path = REPOSITORY / "imagenet" / "main_train_imagenet.py"
    said, errors = (two := Process(path, *tiny, "--run_dir", "two", ranks=2)).communicate()
    assert two.returncode == 0, errors
    assert [row["epoch"] for row in metrics("two")] == ["1", "2"]
    assert said.count("epoch 2/2") == 1  # rank 0 alone prints


def test_the_data_can_be_checked_beforehand(workdir, tiny, capsys):
    student(*tiny, "--check_data", "--limit", 1000)
    printed = capsys.readouterr().out
    assert "160 images of 4 of 4 classes, 40 to 40 a class" in printed
    assert "12 images of 4 of 4 classes, 3 to 3 a class" in printed
    assert not Path("runs").exists()


def test_the_teacher_is_torchvision_s_or_an_untrained_network(monkeypatch):
    sources = []
    monkeypatch.setattr(script, "init_from", lambda model, source: sources.append(source))
    teacher, teacher_sha256, files = script.load_teacher(script.parse_args([]))
    assert teacher.spec == {"arch": "resnet18", "stem": "imagenet", "num_classes": 1000}
    assert (sources, teacher_sha256, files) == (["imagenet"], checksum(teacher), {})
    flags = "--teacher_weights random --arch shufflenet_v2_x1_0 --num_classes 4".split()
    teacher, teacher_sha256, files = script.load_teacher(script.parse_args(flags))
    assert teacher.spec == {"arch": "shufflenet_v2_x1_0", "stem": "imagenet", "num_classes": 4}
    assert (sources, teacher_sha256, files) == (["imagenet"], checksum(teacher), {})


def test_the_teacher_s_weight_file_has_a_path_or_a_url(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = sets / "imagenet_stem.pth"
    checksums = {checksum(load_model(path))}
    for source in (str(path), path.as_uri()):
        args = script.parse_args(["--teacher_weights", source, "--num_classes", "4"])
        checksums.add(script.load_teacher(args)[1])
    assert len(checksums) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_classes", 30], "holds 4 class folders and not 30"),
        (["--teacher_weights", "resnet18"], "torchvision's resnet18 has 1000 classes, and not 4"),
        (["--teacher_weights", "nobody.pth"], "there is no weight file nobody.pth"),
        (["--teacher_weights", "{sets}/cifar_stem.pth"], "expected stem imagenet, found cifar"),
        (["--batch_size", 41], "--batch_size 41 is more than the 40 training images"),
        (["--val_dir", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_written(flags, message, workdir, tiny, sets):
    with pytest.raises(UserError, match=message):
        student(*tiny, *(str(flag).format(sets=sets) for flag in flags))
    assert not any(workdir.iterdir())


def test_only_a_run_of_this_script_is_resumed(tmp_path):
    """test_it_resumes_bit_for_bit resumes a run of its own."""
    config = {"name": "student", "format": FORMAT, "args": vars(script.parse_args([]))}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(UserError, match=r" is the run of .*\bstudent\b.* not .*\bimagenet\b"):
        script.parse_args(["--resume", str(tmp_path)])


def test_the_cifar10_scripts_load_nothing_of_imagenet():
    folders = [".", "experiment", "networks", "synthetic_data"]
    paths = [path for folder in folders for path in (REPOSITORY / folder).glob("*.py")]
    assert len(paths) > 20
    for path in paths:
        assert not re.search(r"^\s*(from|import) imagenet\b", path.read_text(), re.MULTILINE), path


def test_the_seed_decides_the_first_weights(workdir, tiny, monkeypatch):
    kept = []
    monkeypatch.setattr(script, "train_one_epoch", lambda model, *_: kept.append(model) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        student(*tiny, "--seed", 3)
    seed_everything(3)
    expected = build_model("shufflenet_v2_x1_0", "imagenet", 4)
    assert torch.equal(kept[0].fc.weight, expected.fc.weight)


def test_precision_rates_and_record_of_a_run(workdir, tiny, monkeypatch):
    """Of two epochs of four batches."""
    tested, steps, evaluate = [], [], script.evaluate

    def recording(model, loader, amp=None):
        result = evaluate(model, loader, amp)
        tested.append((amp, result["accuracy"]))
        return result

    class Step(script.TrainStep):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            steps.append(self)

    monkeypatch.setattr(script, "evaluate", recording)
    monkeypatch.setattr(script, "TrainStep", Step)
    monkeypatch.setattr(script, "plot_run", lambda folder: None)
    student(*tiny, "--amp", "bf16", "--scheduler", "linear", "--limit", 80, "--run_dir", "run")
    assert [amp for amp, _ in tested] == [None, torch.bfloat16, None]
    assert steps[0].amp == torch.bfloat16
    assert [float(row["lr"]) for row in metrics("run")] == [0.01, 0.005]
    assert read_config(Path("run"))["teacher_accuracy"] == tested[0][1]
    assert "step" in load("run/last.pt")


def test_a_teacher_whose_outputs_are_not_finite_is_refused(workdir, tiny):
    broken = build_model("shufflenet_v2_x1_0", "imagenet", 4)
    broken.conv5[1].running_var.fill_(-1)
    save(Path("broken.pth"), to_checkpoint(broken, tuple(WORDNET_IDS)))
    with pytest.raises(UserError, match="outputs on the real test images are not finite"):
        student(*tiny, "--teacher_weights", "broken.pth")
