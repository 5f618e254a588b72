"""Both scripts from end to end, on the demo set and on made data."""

import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import kill_test
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    REPOSITORY,
    SMALL_NETWORK,
    TINY,
    assert_equal_weights,
    metrics,
    run_student,
    run_teacher,
    stop_after,
    without_times,
)
from PIL import Image
from processes import Process
from torch import Tensor

import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
from data import DeviceLoader, ImageSet, load_cifake, load_cifar10, load_image, load_noise
from engine import TrainStep, compare, kd_loss, label_loss, predict, score
from experiment.device import seed_everything
from experiment.download import sha256
from experiment.errors import UserError
from experiment.files import load, save
from experiment.folder import read_config
from models import build_model, load_model, read_weights, to_checkpoint
from plots import MARK
from synthetic_data.demo_images import load_demo
from synthetic_data.shifts import with_shifted_copies

TEACHER = Path("runs/demo/teacher_cifar10_finetuned.pth")
STUDENT = Path("runs/demo/student_cifar10_kd.pth")


def logits_of(path: Path | str, images: ImageSet) -> Tensor:
    """What the network of a weight file says of an ImageSet, in float32 on the CPU."""
    return predict(load_model(path), DeviceLoader(images, 500, "cpu", train=False))


def resume(script, folder: str | Path, *argv: str | Path) -> None:
    script.main(script.parse_args(["--resume", str(folder), *map(str, argv)]))


# ---------------------------------------------------------------------------------- end to end


@pytest.mark.draws
@pytest.mark.slow
def test_a_resnet18_and_its_student(workdir, capsys):
    """The published network, and every file that a run leaves, beside its exported weights."""
    network = ("--arch", "resnet18", "--stem", "imagenet")
    run_teacher(*network)
    run_student(*network)

    assert not list(workdir.glob("*.pth"))  # a demo stays under runs/
    said = capsys.readouterr().out
    test_set = load_demo("test").first(48)
    taught = logits_of(TEACHER, test_set)
    accuracy = score(taught, test_set.labels)["accuracy"]
    for name, exported, column, began_with in (
        ("teacher", TEACHER, "train_accuracy", (4e-5, 4.626371e-4)),  # steps 0 and 3 of 6: onecycle
        ("student", STUDENT, "train_agreement", (0.05, 0.005)),  # dropped after half of the steps
    ):
        run, logits = Path(f"runs/demo/{name}-001"), logits_of(exported, test_set)
        rows = metrics(run)
        columns = ["epoch", "lr", "train_loss", column, "test_loss", "test_accuracy"]
        assert list(rows[0]) == [*columns, "images_per_second", "seconds"]
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert [float(row["lr"]) for row in rows] == pytest.approx(began_with, rel=1e-6)
        for row in rows:  # the seconds have the test in them, too
            assert 0 < 48 / float(row["images_per_second"]) < float(row["seconds"])
        scores = score(logits, test_set.labels)
        assert float(rows[-1]["test_accuracy"]) == pytest.approx(scores["accuracy"], rel=1e-6)
        assert float(rows[-1]["test_loss"]) == pytest.approx(scores["loss"], rel=1e-6)
        best = max(float(row["test_accuracy"]) for row in rows)
        assert f"final  {scores['accuracy']:.2f} % on the test set, epoch 2" in said
        assert f"best   {best:.2f} %, epoch " in said

        assert_equal_weights(exported, run / "last.pt")
        around = read_weights(exported)[1]
        assert around["classes"] == list(test_set.classes)
        assert (around["provenance"]["run"], around["provenance"]["epoch"]) == (str(run), 2)
        assert_what_is_left(run, test_set, logits, taught if name == "student" else None)

    assert read_config(run)["teacher_accuracy"] == pytest.approx(accuracy)
    assert f"teacher: resnet18 with the imagenet stem, {TEACHER}\n" in said
    assert f"teacher: {accuracy:.2f} % on 48 real test images" in said


def assert_what_is_left(run: Path, test_set: ImageSet, logits: Tensor, taught: Tensor | None):
    """The files in the folder of a finished run; the tables beside the logits of its network."""
    pictures = {"train_val_losses.png", "val_accuracy.png", "confusion.png", "mistakes.png"}
    assert {path.name for path in run.iterdir()} == pictures | {
        *(".lock", "config.json", "metrics.csv", "last.pt", "best.pt"),
        *("per_class.csv", "predictions.csv", "mistakes.npz"),
    }
    for picture in pictures:
        with Image.open(run / picture) as image:
            assert image.info["Source"] == MARK
            assert len(image.convert("L").getcolors()) > 10  # something is drawn

    table = np.genfromtxt(run / "predictions.csv", delimiter=",", names=True)
    assert np.array_equal(table["index"], np.arange(len(test_set)))
    assert np.array_equal(table["label"], test_set.labels)
    assert np.array_equal(table["prediction"], logits.argmax(1))
    np.testing.assert_allclose(table["probability"], logits.softmax(1).amax(1), rtol=1e-5)
    if taught is None:
        assert "teacher_prediction" not in table.dtype.names
    else:
        assert np.array_equal(table["teacher_prediction"], taught.argmax(1))

    wrong = table[table["label"] != table["prediction"]]
    assert len(wrong) > 30  # after two epochs
    with np.load(run / "mistakes.npz") as mistakes:
        surest = sorted(wrong["probability"], reverse=True)[:30]
        np.testing.assert_allclose(mistakes["probability"], surest)
        for column in ("label", "prediction", "probability"):
            np.testing.assert_allclose(mistakes[column], table[column][mistakes["index"]])
        images = test_set.images[mistakes["index"]].permute(0, 2, 3, 1)
        assert np.array_equal(mistakes["images"], images)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_first_step_is_the_one_that_the_flags_describe(name, workdir, demo_teacher):
    """Written out: images, views, loss and update of a run that has one step."""
    shutil.copy(demo_teacher, "expert.pth")
    flags = "--epochs 1 --limit 16 --seed 6 --amp off --augment reflect --run_dir run"
    flags += " --output out.pth --optimizer sgd --lr 0.3 --momentum 0.5 --weight_decay 0.1"
    if name == "teacher":
        run_teacher(*flags.split(), "--init", "expert.pth")
        network, images = load_model("expert.pth"), load_demo("train")
        column = "train_accuracy"
    else:
        run_student(*flags.split(), "--temperature", 4, "--teacher_weights", "expert.pth")
        seed_everything(6)
        network, images = build_model("wrn_16_1"), load_demo("synthetic")
        column = "train_agreement"

    loader = DeviceLoader(images.first(16), 16, "cpu", train=True, augment="reflect", seed=6)
    loader.epoch = 1
    seed_everything(6, 1)
    ((views, labels),) = loader
    logits = network.train()(views)
    if name == "teacher":
        loss, matches = label_loss(logits, labels)
    else:
        taught = load_model("expert.pth")(views)
        loss, matches = kd_loss(logits, taught, 4.0), logits.argmax(1) == taught.argmax(1)
    loss.backward()
    (row,) = metrics("run")
    assert float(row["train_loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(row[column]) == 100 * matches.float().mean()
    trained = read_weights("out.pth")[0]
    for key, p in network.named_parameters():
        torch.testing.assert_close(trained[key], p.detach() - 0.3 * (p.grad + 0.1 * p.detach()))

    if name == "teacher":
        assert read_config(Path("run"))["init_sha256"] == sha256("expert.pth")
        Path("expert.pth").unlink()  # a resumed run does not need it
        resume(teacher_script, "run")


@pytest.mark.slow
def test_what_a_student_trains_on(workdir, cifake, cifar10_binary, monkeypatch):
    """No demo: CIFAR-10 from disk, CIFAKE from a download, and the published file names."""
    shutil.copytree(cifake, workdir / "cache" / "train" / "FAKE")
    fake = SimpleNamespace(dataset_download=lambda handle: str(workdir / "cache"))
    monkeypatch.setitem(sys.modules, "kagglehub", fake)
    loaders = []

    def recording_loader(data, batch_size, device, train, **more):
        loaders.append((train, data))
        return DeviceLoader(data, batch_size, device, train, **more)

    monkeypatch.setattr(student_script.data, "DeviceLoader", recording_loader)
    common = [*"--epochs 1 --batch_size 20 --device cpu".split(), *SMALL_NETWORK]
    common += ["--data_dir", str(cifar10_binary)]
    teacher_script.main(teacher_script.parse_args([*common, "--init", "random"]))
    config = read_config(Path("runs/teacher-001"))
    assert (config["train_images"], config["test_images"]) == (100, 20)
    real = load_cifar10(cifar10_binary, train=True)
    test = load_cifar10(cifar10_binary, train=False)
    expected = {"synthetic": load_cifake(cifake), "real": real, "noise": load_noise(n=40)}
    for source, train_set in expected.items():
        loaders.clear()
        argv = [*common, "--limit", "40", "--output", f"{source}.pth"]
        download = ["--download_synthetic", "--synthetic_data_dir", "downloaded"]
        argv += download if source == "synthetic" else ["--train_on", source]
        student_script.main(student_script.parse_args(argv))
        (seen,) = [data for train, data in loaders if train]
        assert torch.equal(seen.images, train_set.images[:40]), source
        assert torch.equal(seen.labels, train_set.labels[:40]), source
        tested = next(data for train, data in loaders if not train)
        assert torch.equal(tested.images, test.images), source
        assert read_weights(f"{source}.pth")[1]["classes"][0] == "airplane"
    config = read_config(Path("runs/student-001"))
    assert (config["train_images"], config["test_images"]) == (40, 20)
    assert len(config["teacher_sha256"]) == 64
    next(Path("downloaded").iterdir()).unlink()
    with pytest.raises(UserError, match="train_images was 40, is 39"):
        resume(student_script, "runs/student-001")


@pytest.mark.slow
def test_cifar100_from_class_folders(workdir, cifar100, monkeypatch, capsys):
    folder = workdir / "synthetic"
    for i in range(100):
        (folder / f"kind_{i:02d}").mkdir(parents=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"kind_{i:02d}" / "0.png")
    monkeypatch.setattr(student_script.data, "load_noise", lambda classes: load_noise(classes, 50))
    flags = f"--dataset cifar100 --data_dir {cifar100} --epochs 1 --batch_size 50 --device cpu"
    flags = [*flags.split(), "--limit", "50", *SMALL_NETWORK]
    teacher = [*flags, "--init", "random", "--output", "teacher.pth"]
    teacher_script.main(teacher_script.parse_args(teacher))
    student = [*flags, "--teacher_weights", "teacher.pth", "--output", "student.pth"]
    for source in ("synthetic", "real", "noise"):
        synthetic = ["--synthetic_data_dir", str(folder)]
        more = synthetic if source == "synthetic" else ["--train_on", source]
        student_script.main(student_script.parse_args([*student, *more]))
    with pytest.raises(SystemExit):
        student_script.parse_args([*student, "--download_synthetic"])
    assert "error: --download_synthetic needs CIFAKE" in capsys.readouterr().err
    network = load_model("student.pth", classes=[f"kind_{i:02d}" for i in range(100)])
    assert network.spec["num_classes"] == 100


# ------------------------------------------------------------------------------------ teachers


def test_a_teacher_is_what_its_file_says(workdir, demo_teacher, capsys):
    flags = ["--teacher_weights", demo_teacher, "--epochs", 1, "--limit", 32]
    run_student(*flags, "--arch", "shufflenet_v2_x1_0", "--stem", "imagenet")
    assert f"teacher: wrn_16_1 with the cifar stem, {demo_teacher}\n" in capsys.readouterr().out
    assert load_model(STUDENT).spec == {
        "arch": "shufflenet_v2_x1_0",
        "stem": "imagenet",
        "num_classes": 10,
    }


@pytest.mark.slow
def test_an_untrained_teacher_is_a_control(workdir):
    taught, checksums = [], []
    for seed in (0, 1):
        run_student("--teacher_weights", "random", "--seed", seed, "--run_dir", f"run-{seed}")
        table = np.genfromtxt(f"run-{seed}/predictions.csv", delimiter=",", names=True)
        config = read_config(Path(f"run-{seed}"))
        assert config["teacher_files"] == {}
        checksums.append(config["teacher_sha256"])
        accuracy = 100 * (table["teacher_prediction"] == table["label"]).mean()
        assert config["teacher_accuracy"] == pytest.approx(accuracy)
        taught.append(table["teacher_prediction"])
    assert not np.array_equal(*taught)
    assert checksums[0] != checksums[1]  # as these are two, a resumed run is checked for its own


@pytest.mark.slow
def test_several_teachers_are_one(workdir, demo_teacher, monkeypatch):
    run_teacher("--seed", 1, "--output", "other.pth", "--epochs", 1)
    one, two, both = ([demo_teacher], ["other.pth"], [demo_teacher, "other.pth"])
    for name, members in (("one", one), ("two", two), ("both", both)):
        short = [] if name == "both" else ["--epochs", 1, "--limit", 16]
        given = [*members, *short, "--run_dir", name, "--output", f"{name}.pth"]
        run_student("--teacher_weights", *given)
    configs = {name: read_config(Path(name)) for name in ("one", "two", "both")}
    assert len({config["teacher_sha256"] for config in configs.values()}) == 3
    assert configs["both"]["teacher_files"] == {str(path): sha256(path) for path in both}
    assert "step" in load("both/last.pt")  # the scale of the loss in float16
    test_set = load_demo("test").first(48)
    mean = sum(logits_of(path, test_set) for path in both) / 2
    accuracy = score(mean, test_set.labels)["accuracy"]
    assert configs["both"]["teacher_accuracy"] == pytest.approx(accuracy)

    with monkeypatch.context() as patch:
        stop_after(patch, student_script, 1)
        with pytest.raises(KeyboardInterrupt):
            flags = ["--run_dir", "stopped", "--output", "stopped.pth"]
            run_student("--teacher_weights", *both, *flags)
    with pytest.raises(UserError, match="cannot be resumed with other files: teacher_sha256 was"):
        resume(student_script, "stopped", "--teacher_weights", "other.pth")
    resume(student_script, "stopped")
    assert_equal_weights("stopped.pth", "both.pth")


@pytest.mark.slow
def test_the_loss_may_be_another_one(workdir, demo_teacher, monkeypatch):
    """Its backward may need the teacher's logits themselves, which inference_mode would forbid."""

    def squared_error(student_logits: Tensor, teacher_logits: Tensor, _: float) -> Tensor:
        return F.mse_loss(student_logits.float(), teacher_logits.float())

    monkeypatch.setattr(student_script, "kd_loss", squared_error)
    run_student("--amp", "off", "--teacher_weights", demo_teacher, "--run_dir", "mse")
    losses = [float(row["train_loss"]) for row in metrics("mse")]
    assert losses[-1] < losses[0]


def test_a_run_is_not_resumed_with_other_images(workdir, demo_teacher, cifake, cifar10_binary):
    """As many, of which one pixel differs."""
    shutil.copytree(cifake, "images")
    flags = ["--data_dir", cifar10_binary, "--synthetic_data_dir", "images", *SMALL_NETWORK]
    flags += ["--teacher_weights", "random", "--epochs", 1, "--batch_size", 8, "--device", "cpu"]
    argv = [*map(str, flags), "--limit", "16", "--run_dir", "run", "--output", "out.pth"]
    student_script.main(student_script.parse_args(argv))
    shutil.move("images", "moved")
    resume(student_script, "run", "--synthetic_data_dir", "moved")
    first = min(Path("moved").glob("*.jpg"))
    pixels = load_image(first)
    pixels[0, 0, 0] ^= 128
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(first.with_suffix(".png"))
    first.unlink()
    with pytest.raises(UserError, match="cannot be resumed with other files: train_sha256 was"):
        resume(student_script, "run", "--synthetic_data_dir", "moved")


def test_before_its_first_epoch_a_teacher_resumes_from_the_same_start(workdir, monkeypatch):
    save(Path("start.pth"), to_checkpoint(build_model("wrn_16_1"), tuple("abcdefghij")))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, teacher_script, 0)
        run_teacher("--init", "start.pth", "--run_dir", "run", "--output", "out.pth")
    with pytest.raises(SystemExit):
        resume(teacher_script, "run", "--init", "random")
    save(Path("start.pth"), to_checkpoint(build_model("wrn_16_1"), tuple("abcdefghij")))
    with pytest.raises(UserError, match="cannot be resumed with other files: init_sha256 was"):
        resume(teacher_script, "run")


def test_a_teacher_of_other_classes_is_refused(workdir, demo_teacher, cifake, cifar10_binary):
    flags = ["--data_dir", cifar10_binary, "--synthetic_data_dir", cifake, *SMALL_NETWORK]
    argv = [*flags, "--teacher_weights", demo_teacher, "--batch_size", 8, "--device", "cpu"]
    with pytest.raises(UserError, match=r"expected classes \['airplane'.*found \['disc'"):
        student_script.main(student_script.parse_args([*map(str, argv)]))
    assert not Path("runs").exists()


# ------------------------------------------------------------------------ seeds, levers, stops


@pytest.mark.slow
def test_the_seed_decides_everything(workdir, demo_teacher):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        flags = ["--seed", seed, "--run_dir", name, "--output", f"{name}.pth"]
        run_student(*flags, "--teacher_weights", demo_teacher)
    a, b, c = (without_times(metrics(name)) for name in "abc")
    assert a == b
    assert all(
        ours["train_loss"] != theirs["train_loss"] for ours, theirs in zip(a, c, strict=True)
    )
    assert_equal_weights("a.pth", "b.pth")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("teacher", ""),
        ("student", ""),
        *(
            pytest.param(name, flags, marks=pytest.mark.slow)
            for name, flags in (
                ("teacher", "--augment rrc_jitter --scheduler onecycle"),
                ("student", "--augment rrc_jitter --scheduler cosine --holdout 15"),
                ("student", "--hard_labels"),
                ("student", "--optimizer muon --augment reflect --scheduler linear --warmup 0.2"),
            )
        ),
    ],
)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    name, flags, workdir, demo_teacher, monkeypatch
):
    script, run = {
        "teacher": (teacher_script, run_teacher),
        "student": (student_script, run_student),
    }[name]
    epochs = 2 if flags else 3  # of three, the second is pending when the run is stopped
    flags = ["--epochs", epochs, *flags.split()]
    flags += ["--teacher_weights", demo_teacher] if name == "student" else []
    run(*flags, "--run_dir", "unbroken", "--output", "unbroken.pth")

    with monkeypatch.context() as patch:
        stop_after(patch, script, epochs - 1)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--run_dir", "stopped", "--output", "stopped.pth")
    assert not Path("stopped.pth").exists()
    assert len(metrics("stopped")) == epochs - 1
    resume(script, "stopped")

    assert without_times(metrics("stopped")) == without_times(metrics("unbroken"))
    assert_equal_weights("stopped.pth", "unbroken.pth")
    for file in ("best.pt", "last.pt"):
        assert_equal_weights(Path("stopped", file), Path("unbroken", file))
    for file in ("predictions.csv", "per_class.csv", "mistakes.npz"):
        assert Path("stopped", file).read_bytes() == Path("unbroken", file).read_bytes()


@pytest.mark.slow
def test_labels_take_the_place_of_the_teacher_only_when_it_is_said(workdir, demo_teacher):
    """Another teacher changes nothing for a student of labels, and all for one of the teacher."""
    for flags in ([], ["--hard_labels"]):
        for weights in (demo_teacher, "random"):
            run = ["--run_dir", f"{Path(weights).stem}{''.join(flags)}", "--epochs", 1]
            run_student(*flags, *run, "--teacher_weights", weights, "--output", f"{run[1]}.pth")
    assert_equal_weights("teacher--hard_labels.pth", "random--hard_labels.pth")
    taught, untaught = (read_weights(f"{name}.pth")[0] for name in ("teacher", "random"))
    assert not torch.equal(taught["fc.weight"], untaught["fc.weight"])
    assert "train_agreement" in metrics("teacher")[0]
    assert "train_label_accuracy" in metrics("teacher--hard_labels")[0]


def test_held_out_images_are_compared_in_the_end(workdir, demo_teacher):
    run_student("--teacher_weights", demo_teacher, "--holdout", 15, "--temperature", 4)
    train_set, held_out = load_demo("synthetic").first(48).hold_out(15)
    assert read_config(Path("runs/demo/student-001"))["train_images"] == len(train_set) == 33
    images = with_shifted_copies(held_out)
    expected = compare(logits_of(STUDENT, images), logits_of(demo_teacher, images), 4.0)
    last = metrics("runs/demo/student-001")[-1]
    assert float(last["val_agreement"]) == pytest.approx(expected["agreement"], rel=1e-6)
    assert float(last["val_kd_loss"]) == pytest.approx(expected["loss"], rel=1e-5)


def test_a_finished_run_exports_again_without_training(workdir, demo_teacher, monkeypatch):
    run_student("--teacher_weights", demo_teacher)
    STUDENT.unlink()
    stop_after(monkeypatch, student_script, 0)
    resume(student_script, "runs/demo/student-001")
    assert_equal_weights(STUDENT, "runs/demo/student-001/last.pt")


@pytest.mark.slow
def test_a_finished_network_is_never_lost(workdir, demo_teacher):
    """The same command again, and a teacher that lies under another name: nothing is in danger."""
    run_student("--teacher_weights", demo_teacher)
    first = read_weights(STUDENT)[0]
    run_student("--teacher_weights", demo_teacher, "--seed", 1)
    kept = STUDENT.with_name("student_cifar10_kd.001.pth")
    assert read_weights(STUDENT)[1]["provenance"]["run"] == "runs/demo/student-002"
    assert read_weights(kept)[1]["provenance"]["run"] == "runs/demo/student-001"
    assert torch.equal(read_weights(kept)[0]["conv1.weight"], first["conv1.weight"])

    copy = demo_teacher.parent / "run" / "last.pt"  # other bytes, the same weights
    resume(student_script, "runs/demo/student-002", "--teacher_weights", copy)
    assert len(list(STUDENT.parent.glob("*.pth"))) == 2  # its own export is replaced


def test_the_seed_decides_the_first_weights_of_a_teacher(workdir, monkeypatch):
    kept = []
    monkeypatch.setattr(teacher_script, "init_from", lambda model, _: kept.append(model))
    stop_after(monkeypatch, teacher_script, 0)
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            run_teacher("--seed", seed)
        seed_everything(seed)
        assert torch.equal(kept[seed].conv1.weight, build_model("wrn_16_1").conv1.weight)


@pytest.mark.parametrize(
    ("script", "function", "precisions"),
    [
        (teacher_script, "evaluate", [torch.bfloat16, None]),
        (student_script, "predict", [None, None, torch.bfloat16, None, None]),  # 2 of the teacher
    ],
)
def test_the_rate_falls_over_all_epochs_and_the_last_test_is_in_float32(
    script, function, precisions, workdir, demo_teacher, monkeypatch
):
    tested, test = [], getattr(script, function)

    def recording(model, loader, amp=None):
        tested.append(amp)
        return test(model, loader, amp)

    monkeypatch.setattr(script, function, recording)
    flags = "--amp bf16 --scheduler linear --epochs 2 --lr 0.01 --run_dir run".split()
    if script is student_script:
        run_student("--teacher_weights", demo_teacher, *flags)
    else:
        run_teacher(*flags)
    assert tested == precisions
    assert [float(row["lr"]) for row in metrics("run")] == [0.01, 0.005]


# ----------------------------------------------------------------------------------- processes


def test_ranks_decode_at_the_same_time(workdir, demo_teacher, monkeypatch):
    """Rank 0 goes first through what downloads; the images are decoded after that."""
    load_train_set, first, waiting, loaded = student_script.load_train_set, [], [], []

    @contextmanager
    def rank_zero_first():
        waiting.append(True)
        first.append(True)
        yield
        waiting.pop()

    def load(*args):
        loaded.append(bool(waiting))
        return load_train_set(*args)

    monkeypatch.setattr(student_script.parallel, "rank_zero_first", rank_zero_first)
    monkeypatch.setattr(student_script, "load_train_set", load)
    run_student("--teacher_weights", demo_teacher, "--epochs", 1)
    assert first
    assert loaded == [False]


@pytest.mark.slow
def test_processes_need_not_import_the_scripts(workdir):
    """Else every one of them takes seconds more, and nothing says so."""
    code = "import sys; sys.exit('main_train_cifar10' not in sys.modules)"
    assert Process("-c", code, cwd=workdir).wait() == 0


# Runs a script as `python -I` does, but for PyTorch, which is there: the project is imported anew,
# and is not looked for where the script lies.
ALONE = """
import runpy, sys
from pathlib import Path
root = Path(sys.argv[1]).parent

def ours(path):
    return root in (path, *path.parents) and "site-packages" not in path.parts  # of a .venv there

for name, module in list(sys.modules.items()):
    if ours(Path(getattr(module, "__file__", None) or "/")):
        del sys.modules[name]
sys.path[:] = [path for path in sys.path if not ours(Path(path))]
assert not sys.modules.keys() & {"plots", "data", "experiment"}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_everything_is_a_process_too(workdir):
    """The commands as a person runs them: what is printed, where, and the exit code."""
    teacher = Process(REPOSITORY / "fine_tune_teacher_cifar10.py", *TINY, *SMALL_NETWORK)
    said, errors = teacher.communicate()
    assert (teacher.returncode, errors) == (0, "")
    lines = said.splitlines()
    assert lines[0] == "start: random weights"
    assert lines[1].startswith("run: runs/demo/teacher-001 on ")
    assert lines[2].endswith("fine_tune_teacher_cifar10.py --resume runs/demo/teacher-001")
    assert [line.split()[:2] for line in lines[3:5]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert [line.split()[0] for line in lines[5:]] == ["final", "best", "time", "saved", "plots"]
    # -I, as -P and PYTHONSAFEPATH: modules are not looked for where a script lies
    student = [sys.executable, "-I", str(REPOSITORY / "main_train_cifar10.py")]
    student = subprocess.run([*student, *TINY, *SMALL_NETWORK], capture_output=True, text=True)
    assert (student.returncode, student.stderr) == (0, "")
    runs = "runs/demo/teacher-001", "runs/demo/student-001"
    overlay = Process("-c", ALONE, REPOSITORY / "plots.py", *runs)
    said, errors = overlay.communicate()
    assert (overlay.returncode, errors) == (0, "")
    assert said.split() == [
        "comparison/train_val_losses.png",
        "comparison/val_accuracy.png",
    ]
    assert all(Path(path).stat().st_size > 1000 for path in said.split())
    wrong = Process(REPOSITORY / "main_train_cifar10.py", "--epochs", "0")
    line = "argument --epochs: '0' is no whole number from 1 to 100000 (--help lists the flags)"
    assert wrong.communicate() == ("", f"error: {line}\n")
    assert wrong.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_told_to_stop_says_how_to_go_on(number, workdir):
    script = str(REPOSITORY / "main_train_cifar10.py")
    flags = [*TINY, *SMALL_NETWORK, "--epochs", "500", "--teacher_weights", "random"]
    process = Process(script, *flags)
    while "epoch 3/500" not in process.said():
        assert process.poll() is None, process.errors()
        time.sleep(0.01)
    process.send_signal(number)
    said, errors = process.communicate()
    assert process.returncode == 128 + number
    finished = said.count("\nepoch ")
    assert errors.strip().splitlines() == [
        f"stopped after epoch {finished} of 500; resume with",
        f"python {script} --resume runs/demo/student-001",
    ]
    run = Path("runs/demo/student-001")
    assert [int(row["epoch"]) for row in metrics(run)] == [*range(1, finished + 1)]
    assert read_weights(run / "last.pt")[1]["provenance"]["epoch"] == finished


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(monkeypatch, capsys):
    def start(script, argv, folder):
        code, log = kill_test.DRIVER, folder / "log.txt"
        return Process("-c", code, REPOSITORY / script, *argv, cwd=folder, log=log)

    monkeypatch.setattr(kill_test, "start", start)
    monkeypatch.setattr(kill_test, "SIZE", [*kill_test.SIZE, *SMALL_NETWORK, "--epochs", "3"])
    kill_test.main(kill_test.parse_args(["--kills", "2", "--scripts", kill_test.SCRIPTS[1]]))
    assert "2 kills: " in (said := capsys.readouterr().out)
    assert "0 different, 0 unreadable files" in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_both_scripts_run_on_cuda(workdir, monkeypatch):
    """From recorded graphs; what they export is tested again, on the CPU."""
    steps = []

    def recording_step(*args, **kwargs):
        steps.append(TrainStep(*args, **kwargs))
        return steps[-1]

    for script in (teacher_script, student_script):
        monkeypatch.setattr(script, "TrainStep", recording_step)
    run_teacher("--device", "cuda")
    run_student("--device", "cuda")
    test_set = load_demo("test").first(48)
    for name, exported in (("teacher", TEACHER), ("student", STUDENT)):
        run = Path(f"runs/demo/{name}-001")
        assert read_config(run)["parts"][0]["hardware"] == torch.cuda.get_device_name()
        weights = torch.load(exported, weights_only=True)["model"]
        assert not any(weight.is_cuda for weight in weights.values())  # it loads without a GPU
        scores = score(logits_of(exported, test_set), test_set.labels)
        last = metrics(run)[-1]
        assert float(last["test_loss"]) == pytest.approx(scores["loss"], rel=0.01)  # TF32
        assert float(last["test_accuracy"]) == pytest.approx(scores["accuracy"], abs=3)
    if torch.cuda.is_bf16_supported(including_emulation=False):  # float16 records none
        assert all(step.graph is not None for step in steps)
    assert len(steps) == 2
