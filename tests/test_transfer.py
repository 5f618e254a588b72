"""scripts/transfer.py: what passes from a teacher to its student."""

import csv
import math
from pathlib import Path

import pytest
import torch
from conftest import fails

from data import CLASSES, DeviceLoader, load_cifake
from engine import predict
from experiment.files import save
from models import build_model, load_model, to_checkpoint
from scripts import transfer


def rows(name: str) -> list[dict]:
    with open(f"tables/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_network_agrees_with_itself_on_every_set(workdir, cifake, cifar10_binary):
    save(Path("net.pth"), to_checkpoint(build_model("wrn_16_1"), CLASSES))
    places = ["--data_dir", str(cifar10_binary), "--synthetic_data_dir", str(cifake)]
    argv = ["net.pth", "net.pth", *places, "--output", "tables"]
    transfer.main(transfer.parse_args(argv))
    assert [row["set"] for row in rows("sets")] == ["real test", "real training", "CIFAKE"]
    for row in rows("sets"):
        assert float(row["agreement"]) == float(row["weighted"]) == 100
        assert float(row["kd_loss"]) == pytest.approx(0, abs=1e-6)
        assert row["teacher"] == row["student"]
    counts = {name: 0 for name in ("real test", "real training", "CIFAKE")}
    for row in rows("confidence"):
        counts[row["set"]] += int(row["images"])
    assert list(counts.values()) == [20, 100, 40]
    assert [row["statistics"] for row in rows("statistics")] == [
        "stored",
        "CIFAKE",
        "real training",
    ]


def test_a_plain_state_dict_of_other_classes_is_refused(workdir, cifake, cifar10_binary, capsys):
    save(Path("net.pth"), build_model("wrn_16_1", num_classes=100).state_dict())
    places = ["--data_dir", cifar10_binary, "--synthetic_data_dir", cifake]
    code, text = fails(transfer, ["net.pth", "net.pth", *places, "--output", "tables"], capsys)
    assert (code, "100" in text, Path("tables").exists()) == (1, True, False), text


def test_agreement_is_counted_where_the_teacher_is_as_sure():
    teacher = torch.tensor([[0.0, 0.0], [9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])  # 50 % and 99.99 %
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    counts, agreement = transfer.by_confidence(teacher, student)
    sure, unsure = len(transfer.EDGES) - 2, transfer.EDGES.index(0.5) - 1
    assert counts.sum() == 4
    assert (counts[unsure], agreement[unsure]) == (1, 100)
    assert counts[sure] == 3
    assert agreement[sure].item() == pytest.approx(200 / 3)


def test_agreement_is_weighted_by_the_shares_of_the_test_set():
    counts, agreement = torch.tensor([8, 2, 0]), torch.tensor([50.0, 100.0, math.nan])
    weighted = transfer.weighted(counts, agreement, torch.tensor([0.2, 0.4, 0.4]))
    assert weighted.item() == pytest.approx(50 / 0.6)


def test_statistics_change_nothing_for_a_network_that_has_them(workdir, cifake):
    images, model = load_cifake(cifake), build_model("wrn_16_1")
    save(Path("net.pth"), to_checkpoint(transfer.with_statistics(model, images, "crop"), CLASSES))
    once, loader = load_model("net.pth"), DeviceLoader(images, 40, "cpu", train=False)
    twice = transfer.with_statistics(once, images, "crop")
    torch.testing.assert_close(predict(twice, loader), predict(once, loader))
    assert not torch.allclose(predict(model.eval(), loader), predict(once, loader))
    assert model.bn.running_mean.abs().max() == 0  # the network itself is left as it was
