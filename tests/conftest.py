import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100

import data
import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script

REPOSITORY = Path(__file__).parent.parent
# A run of a second or two that goes through all of a script.
TINY = "--demo --epochs 2 --limit 96 --batch_size 32 --device cpu".split()


def run_teacher(*argv: str | Path) -> None:
    teacher_script.main(teacher_script.parse_args([*TINY, *map(str, argv)]))


def run_student(*argv: str | Path) -> None:
    student_script.main(student_script.parse_args([*TINY, *map(str, argv)]))


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """An empty folder, and the current one: scripts write where they are started."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def demo_teacher(tmp_path_factory) -> Path:
    """The checkpoint of a hardly trained demo teacher with the ImageNet stem."""
    folder = tmp_path_factory.mktemp("demo_teacher")
    run_teacher("--run_dir", folder / "run", "--output", folder / "teacher.pth")
    return folder / "teacher.pth"


@pytest.fixture
def cifake(tmp_path) -> Path:
    """A folder of 40 made JPEGs under CIFAKE's names, four a class."""
    folder = tmp_path / "cifake"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(1000, 1004):
        for k in range(1, 11):
            suffix = "" if k == 1 else f" ({k})"
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}{suffix}.jpg")
    return folder


@pytest.fixture
def cifar10_binary(tmp_path, monkeypatch) -> Path:
    """A data folder with a made CIFAR-10 of 20 images a file, in the binary version."""
    folder = tmp_path / "data"
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    rng = np.random.default_rng(0)
    checksums = {}
    for name in data.BINARY_MD5:
        records = rng.integers(0, 256, (20, 3073), np.uint8)
        records[:, 0] = np.arange(20) % 10
        (folder / "cifar-10-batches-bin" / name).write_bytes(records.tobytes())
        checksums[name] = hashlib.md5(records.tobytes()).hexdigest()
    monkeypatch.setattr(data, "BINARY_MD5", checksums)
    return folder


@pytest.fixture
def cifar100(tmp_path, monkeypatch) -> Path:
    """A data folder with a made CIFAR-100: two images a class to train on, one to test on."""
    folder = tmp_path / "data100"
    (folder / "cifar-100-python").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"kind_{i:02d}" for i in range(100)]
    for part, labels in (("train", [*range(100), *range(100)]), ("test", [*range(100)])):
        pixels = rng.integers(0, 256, (len(labels), 3072), np.uint8)
        content = pickle.dumps({"data": pixels, "fine_labels": labels})
        (folder / "cifar-100-python" / part).write_bytes(content)
        md5 = hashlib.md5(content).hexdigest()
        monkeypatch.setattr(CIFAR100, f"{part}_list", [[part, md5]])
    content = pickle.dumps({"fine_label_names": names})
    (folder / "cifar-100-python" / "meta").write_bytes(content)
    monkeypatch.setattr(
        CIFAR100, "meta", {**CIFAR100.meta, "md5": hashlib.md5(content).hexdigest()}
    )
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real CIFAR-10 and CIFAKE."""
    folder = os.environ.get("DMKD_DATA")
    if not folder:
        pytest.skip("DMKD_DATA is not set: it names a folder with the real CIFAR-10 and CIFAKE")
    return Path(folder)


def as_rank(monkeypatch, rank: int, ranks: int) -> None:
    """Let this process take itself for one of several."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
