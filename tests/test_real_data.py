"""The real CIFAR-10 and CIFAKE, in the folder that DMKD_DATA names; skipped where it is unset."""

import pytest
import torch
from conftest import metrics

import data
import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
from data import ImageSet, load_cifake, load_cifar10
from models import read_weights

pytestmark = pytest.mark.slow


def statistics(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel, over all pixels, in units of 0 to 255."""
    channels = images.images.unbind(1)
    counts = torch.stack([torch.bincount(pixels.flatten(), minlength=256) for pixels in channels])
    shares, values = counts.double() / counts.sum(1, keepdim=True), torch.arange(256.0).double()
    mean = shares @ values
    return mean, (shares @ values.square() - mean.square()).sqrt()


def test_cifar10_is_the_original(real_data):
    train, test = load_cifar10(real_data, train=True), load_cifar10(real_data, train=False)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert torch.bincount(train.labels).tolist() == [5_000] * 10
    assert torch.bincount(test.labels).tolist() == [1_000] * 10
    assert train.labels[:6].tolist() == [6, 9, 9, 4, 1, 1]  # frog, truck, truck, deer, cars
    mean, std = statistics(train)
    assert mean.tolist() == pytest.approx([255 * m for m in data.CIFAR10_MEAN], abs=0.01)
    assert std.tolist() == pytest.approx([255 * s for s in data.CIFAR10_STD], abs=0.01)


def test_cifake_is_complete_and_balanced(real_data):
    cifake = load_cifake(real_data / "cifake_train_fake")
    assert len(cifake) == 50_000
    assert torch.bincount(cifake.labels).tolist() == [5_000] * 10
    assert len({image.numpy().tobytes() for image in cifake.images}) == 49_080
    mean, std = statistics(cifake)
    assert mean.tolist() == pytest.approx([115.4, 113.1, 99.2], abs=0.1)
    assert std.tolist() == pytest.approx([58.2, 58.7, 68.4], abs=0.1)


def test_another_decoder_reads_the_same_pixels(real_data):
    io = pytest.importorskip("torchvision.io", exc_type=ImportError)
    if not hasattr(io, "decode_image"):
        pytest.skip("this torchvision has no decoder")
    folder = real_data / "cifake_train_fake"
    names = sorted(folder.glob("*.jpg"))[:2_000]
    theirs = torch.stack([io.decode_image(str(name), io.ImageReadMode.RGB) for name in names])
    assert torch.equal(load_cifake(folder, limit=2_000).images, theirs)


def test_the_cpu_recipe_learns_in_seconds(real_data, workdir):
    """The recipe of scripts/cpu.sh in 32 steps: far from 93 %, and far from chance.

    400 test images are right by chance in 10 % of the cases, with a standard deviation of 1.5 %.
    """
    common = "--arch airbench94 --optimizer muon --lr 0.24 --momentum 0.6 --scheduler linear"
    common += " --augment reflect --epochs 2 --limit 400 --batch_size 25 --device cpu"
    common = [*common.split(), "--data_dir", str(real_data)]
    teacher_script.main(teacher_script.parse_args([*common, "--init", "random"]))
    teacher = read_weights("teacher_cifar10_finetuned.pth")[1]["provenance"]
    assert teacher["test_accuracy"] > 25

    fake = real_data / "cifake_train_fake"
    student_script.main(student_script.parse_args([*common, "--synthetic_data_dir", str(fake)]))
    student = read_weights("student_cifar10_kd.pth")[1]["provenance"]
    assert student["test_accuracy"] > 20
    assert [row["epoch"] for row in metrics("runs/student-001")] == ["1", "2"]
    assert float(metrics("runs/student-001")[1]["train_agreement"]) > 50
