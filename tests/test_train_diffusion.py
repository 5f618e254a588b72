"""synthetic_data/train_diffusion.py from end to end, on the demo set and on made data."""

import csv
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_equal_weights, fails, metrics, without_times
from PIL import Image

from data import CLASSES, ImageSet, load_cifake
from experiment.files import load
from synthetic_data import diffusion, generate, train_diffusion
from synthetic_data.demo_images import load_demo

SMALL = [*TINY, *"--limit 32 --batch_size 16 --channels 8".split()]


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    monkeypatch.setitem(train_diffusion.SHEET, "steps", 1)
    if "draws" not in request.keywords:
        monkeypatch.setattr(train_diffusion, "plot_run", lambda folder: None)
        monkeypatch.setattr(train_diffusion, "draw_samples", lambda *args: None)


def train(*argv: str | Path) -> None:
    train_diffusion.main(train_diffusion.parse_args([*SMALL, *map(str, argv)]))


@pytest.mark.slow
@pytest.mark.draws
def test_a_run(workdir, capsys):
    train("--run_dir", "run", "--output", "model.pth")
    names = {path.name for path in Path("run").iterdir()}
    written = {"config.json", "metrics.csv", "last.pt", "samples.png", "train_val_losses.png"}
    assert names == {".lock", *written}
    assert Image.open("run/samples.png").size == (2 + 8 * 34, 2 + 10 * 34)  # a row for each class
    rows = metrics(Path("run"))
    columns = "epoch lr train_loss test_loss images_per_second seconds".split()
    assert [list(row) for row in rows] == [columns] * 2
    unet, classes = diffusion.load_unet("model.pth")
    assert tuple(classes) == load_demo("test").classes
    assert unet.spec == {"num_classes": 10, "channels": 8, "layers": 1}
    checkpoint = load("model.pth")  # nothing but tensors and plain types
    assert checkpoint["provenance"]["run"] == "run"
    assert "model.pth" in capsys.readouterr().out

    trained = load("run/last.pt")["trained"]  # the moving average is what is exported
    assert_equal_weights(Path("model.pth"), Path("run/last.pt"))
    assert not torch.equal(checkpoint["model"]["conv_in.weight"], trained["conv_in.weight"])


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(workdir, monkeypatch):
    train("--run_dir", "whole", "--output", "whole.pth")
    loss, calls = train_diffusion.fixed_loss, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(train_diffusion, "fixed_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        train("--run_dir", "run", "--output", "model.pth")
    assert len(metrics(Path("run"))) == 1
    train_diffusion.main(train_diffusion.parse_args(["--resume", "run"]))
    assert_equal_weights(Path("whole.pth"), Path("model.pth"))
    assert without_times(metrics(Path("run"))) == without_times(metrics(Path("whole")))


@pytest.mark.slow
def test_from_cifar10_to_images(workdir, cifar10_binary):
    flags = "--limit 64 --batch_size 32 --epochs 1 --channels 8 --layers 1 --device cpu"
    argv = [*flags.split(), "--data_dir", str(cifar10_binary)]
    train_diffusion.main(train_diffusion.parse_args(argv))
    argv = "--pipeline local --per_class 1 --steps 1 --output set --device cpu".split()
    generate.main(generate.parse_args(argv))
    assert load_cifake("set/images").labels.sort().values.tolist() == list(range(10))
    with open("set/manifest.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(CLASSES)


def test_the_default_is_the_network_of_ddpm():
    with torch.device("meta"):
        unet = diffusion.build_unet(10)
    assert sum(weight.numel() for weight in unet.parameters()) == 35_751_939


@pytest.mark.slow
def test_it_learns_what_its_classes_look_like():
    """Two classes, dark and bright: after some steps, samples of one are brighter."""
    torch.manual_seed(0)
    unet = diffusion.build_unet(2, channels=8, layers=1)
    schedule = diffusion.build_schedule()
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    labels = torch.arange(8) % 2
    images = (labels - 0.5).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)  # -0.5 or 0.5
    for _ in range(50):
        optimizer.zero_grad()
        diffusion.diffusion_loss(unet, schedule, images, labels, 0.1).backward()
        optimizer.step()
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = diffusion.sample(unet.eval(), torch.arange(4) % 2, noise, 2.0, 5)
    dark, bright = samples[0::2], samples[1::2]
    assert bright.mean() - dark.mean() > 0.2  # of 0.5; untrained, they differ by 0.01


@pytest.mark.parametrize("steps", [1, 50, 61, 600])
def test_a_network_that_is_always_right_draws_the_image(steps):
    from diffusers.models.unets.unet_2d import UNet2DOutput

    image, schedule = torch.rand(1, 3, 8, 8) * 1.6 - 0.8, diffusion.build_schedule()

    class Net(torch.nn.Module):
        spec = {"num_classes": 10}  # noqa: RUF012

        def forward(self, noisy, t, class_labels):
            a = schedule.alphas_cumprod[max(0, t)]  # a network takes t = -1 for one like 0
            noise = (noisy - a.sqrt() * image) / (1 - a).sqrt()
            return UNet2DOutput(a.sqrt() * noise - (1 - a).sqrt() * image)

    noise = torch.randn(1, 3, 8, 8)
    drawn = diffusion.sample(Net(), torch.tensor([3]), noise, 1, steps)
    torch.testing.assert_close(drawn, image / 2 + 0.5, rtol=0, atol=1e-3)


def test_the_loss():
    """The error of a network that is always right is zero; labels are dropped as told."""
    from diffusers.models.unets.unet_2d import UNet2DOutput

    images, labels = torch.rand(64, 3, 32, 32) * 2 - 1, torch.arange(64) % 10
    schedule, seen = diffusion.build_schedule(), []

    class Net(torch.nn.Module):
        spec = {"num_classes": 10}  # noqa: RUF012

        def forward(self, noisy, t, class_labels):
            seen.append(class_labels)
            a = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
            noise = (noisy - a.sqrt() * images) / (1 - a).sqrt()
            v = a.sqrt() * noise - (1 - a).sqrt() * images
            return UNet2DOutput(v)

    for dropout, share in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        assert diffusion.diffusion_loss(Net(), schedule, images, labels, dropout) < 1e-4
        kept = seen[-1] != 10
        assert torch.equal(seen[-1][kept], labels[kept])
        assert abs((~kept).float().mean() - share) < 0.25


def test_batches_are_mirrored_and_in_a_new_order():
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    images[:, :, :, 0] = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1) + 1
    labels = torch.arange(40)
    torch.manual_seed(0)
    data = ImageSet(images, labels, tuple(map(str, range(40))))
    loader = train_diffusion.MirroredLoader(data, 16, torch.device("cpu"))
    batches = list(loader)
    assert len(loader) == 2
    assert [len(x) for x, _ in batches] == [16, 16]
    order = torch.cat([y for _, y in batches])
    assert len(order.unique()) == 32
    assert order.tolist() != sorted(order.tolist())
    batch = torch.cat([x for x, _ in batches])
    left, right = batch[:, 0, 0, 0], batch[:, 0, 0, -1]
    mirrored = right > -1
    assert 8 < mirrored.sum() < 24
    column = torch.where(mirrored, right, left)
    torch.testing.assert_close((column + 1) * 127.5, order.float() + 1)


BAD = [
    (["--channels", "12"], 2, "--channels 12 is no multiple of 8"),
    (["--channels", "4"], 2, "--channels: '4' is no whole number from 8"),
    (["--label_dropout", "2"], 2, "--label_dropout: '2' is no number from 0 to 1"),
    (["--batch_size", "33"], 1, "--batch_size 33 is more than the 32 training images"),
    (["--ema", "1"], 2, "--ema: '1' is no number from 0"),
    (["--resume", "nothing"], 1, "nothing is not a run: it has no config.json"),
    (
        ["--lr", "1000"],
        1,
        "the network holds a weight that is not finite. A too high --lr is the likely cause",
    ),
]


@pytest.mark.parametrize(("argv", "code", "expected"), BAD)
def test_bad_input(argv, code, expected, workdir, capsys):
    found, text = fails(train_diffusion, [*SMALL, *argv], capsys)
    assert found == code
    assert expected in text
    assert not list(workdir.glob("**/*.pth"))


def test_labels_are_dropped_as_the_flag_says_and_the_rate_falls_over_all_epochs(
    workdir, monkeypatch
):
    """The fixed loss is that of the average and drops none."""
    seen, loss = set(), diffusion.diffusion_loss

    def recording(unet, *given):
        seen.add((unet.training, given[3:]))
        return loss(unet, *given)

    monkeypatch.setattr(diffusion, "diffusion_loss", recording)
    train("--label_dropout", 0.3, "--scheduler", "linear", "--limit", 64, "--run_dir", "run")
    assert seen == {(True, (0.3,)), (False, ())}
    first, second = (float(row["lr"]) for row in metrics("run"))
    assert second == pytest.approx(first / 2)


def test_the_fixed_loss_is_a_mean_over_images(monkeypatch):
    """Of batches of 500 and 100."""
    monkeypatch.setattr(diffusion, "diffusion_loss", lambda *given: given[2].mean())
    images = torch.zeros(600, 3, 32, 32, dtype=torch.uint8)
    images[500:] = 255  # 1, and the others -1
    data = ImageSet(images, torch.zeros(600), ("x",))
    loss = train_diffusion.fixed_loss(None, None, data, torch.device("cpu"), None)
    assert loss == pytest.approx(-400 / 600)


def test_the_noise_grows_along_a_cosine():
    """Equation 17 of Nichol & Dhariwal 2021 (arXiv 2102.09672)."""
    found = diffusion.build_schedule().alphas_cumprod.double()
    t = torch.arange(1001, dtype=torch.float64) / 1000
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(found[:-1], f[1:-1] / f[0], rtol=0, atol=1e-3)
