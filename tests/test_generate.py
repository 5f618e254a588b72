"""synthetic_data/generate.py from end to end, with tiny random models of diffusers' own classes."""

import csv
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL_NETWORK, as_rank, fails, metrics, snapshot
from PIL import Image
from processes import Process

import main_train_cifar10 as student_script
from data import CLASSES, load_cifake
from experiment.device import hardware
from experiment.files import save
from experiment.folder import FORMAT
from models import build_model, load_model, to_checkpoint
from synthetic_data import diffusion, generate, generated_set
from synthetic_data.classes import load_classes, named
from synthetic_data.generated_set import Plan

QUICK = "--per_class 3 --steps 2 --device cpu".split()
PIPELINES = ("local", "dit", "stable-diffusion")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with a tiny random model for each pipeline."""
    import diffusers  # here, as it takes seconds
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, classes in (("local", CLASSES), ("local_two", ("left", "right"))):
        unet = diffusion.build_unet(len(classes), channels=8, layers=1)
        save(folder / name, {**diffusion.describe(unet, classes), "model": unet.state_dict()})

    def vae():
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )

    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=4,
    )
    scheduler = diffusers.DDPMScheduler()  # generate.py has to take DDIM in its place
    diffusers.DiTPipeline(transformer, vae(), scheduler).save_pretrained(folder / "dit")

    text = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer(folder),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "stable-diffusion")
    return folder


def tokenizer(folder: Path):
    """A CLIPTokenizer that knows the letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def command(models: Path, pipeline: str, output: str | Path, *more: str | int) -> list[str]:
    kind = pipeline.removesuffix("_two")
    argv = ["--pipeline", kind, "--model", models / pipeline, "--output", output, *QUICK, *more]
    return [str(word) for word in argv]


def run(models: Path, pipeline: str, output: str | Path, *more: str | int) -> None:
    generate.main(generate.parse_args(command(models, pipeline, output, *more)))


def images(output: str | Path) -> dict[str, str]:
    """The name and checksum of each image."""
    folder = Path(output, "images")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.md5(f.read_bytes()).hexdigest() for f in files}


def rows(output: str | Path) -> list[dict[str, str]]:
    with open(Path(output, "manifest.csv"), newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_set_is_what_the_loader_reads(pipeline, workdir, models):
    run(models, pipeline, "set")
    data = load_cifake("set/images")
    assert data.images.shape == (30, 3, 32, 32)
    assert torch.bincount(data.labels).tolist() == [3] * 10
    assert data.images.float().std() > 10  # not one grey
    names = sorted(name.removeprefix("images/") for name in images("set"))
    labels = dict(zip(names, data.labels.tolist(), strict=True))
    for row in rows("set"):
        assert row["class"] == CLASSES[labels[row["file"].removeprefix("images/")]]
        assert (row["guidance_scale"], row["steps"]) == ("2.0", "2")
        assert row["model"] == str(models / pipeline)
    assert len({row["seed"] for row in rows("set")}) == 30
    asked = {
        "local": [str(label) for label in range(10)],
        "dit": ["404", "436"],
        "stable-diffusion": ["a photograph of an airliner", "a photograph of a car on a road"],
    }[pipeline]
    assert [row["prompt"] for row in rows("set")][: len(asked)] == asked
    sheets = {path.name for path in Path("set/contact_sheets").iterdir()}
    assert sheets == {f"{name}.png" for name in CLASSES}
    config = json.loads(Path("set/config.json").read_text())
    assert config["args"]["guidance_scale"] == 2.0
    assert [part["hardware"] for part in config["parts"]] == [hardware(torch.device("cpu"))]
    assert {"command", "git_commit", "torch"} <= config["parts"][0].keys()


@pytest.mark.parametrize("pipeline", ["dit", "stable-diffusion"])
def test_sampling_starts_at_the_noisiest_step(pipeline, workdir, models, monkeypatch):
    """By default, four steps of a scheduler would start at 750, from noise that is too strong."""
    diffusers = pytest.importorskip("diffusers")
    step, taken = diffusers.DDIMScheduler.step, []

    def note(self, output, t, *args, **more):
        taken.append(int(t))
        return step(self, output, t, *args, **more)

    monkeypatch.setattr(diffusers.DDIMScheduler, "step", note)
    run(models, pipeline, "set", "--per_class", 1, "--steps", 4, "--batch_size", 100)
    assert taken[:4] == [999, 749, 499, 249]
    assert set(taken) == set(taken[:4])


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["local_two", "dit", "stable-diffusion"])
def test_an_image_depends_on_its_class_and_number_alone(pipeline, workdir, models, monkeypatch):
    Path("pets.csv").write_text("cat, a cat, 281\ndog, a dog; a puppy, 207\n")
    classes = () if pipeline == "local_two" else ("--classes", "pets.csv")
    run(models, pipeline, "whole", *classes)
    for rank in (1, 0):
        with monkeypatch.context() as patch:
            as_rank(patch, rank, 2)
            run(models, pipeline, "ranks", *classes, "--batch_size", 7)
        assert Path("ranks/manifest.csv").exists() == (rank == 0)  # the last one writes it
    run(models, pipeline, "more", *classes, "--per_class", 4)
    assert images("ranks") == images("whole")
    assert images("whole").items() <= images("more").items()
    assert Path("ranks/manifest.csv").read_text() == Path("whole/manifest.csv").read_text()


@pytest.mark.parametrize("pipeline", ["local_two", "dit", "stable-diffusion"])
def test_seed_guidance_and_steps_change_the_images(pipeline, workdir, models):
    run(models, pipeline, "set", "--per_class", 1)
    for flag, value in (("--seed", 1), ("--guidance_scale", 4), ("--steps", 4)):
        run(models, pipeline, f"other{flag}", "--per_class", 1, flag, value)
        assert not images("set").items() & images(f"other{flag}").items()


def test_pixels_are_rounded_and_large_pictures_smoothed():
    assert generate.to_pixels(torch.full((1, 3, 8, 8), 0.501), 8).max() == 128
    stripes = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    middle = generate.to_pixels(stripes, 32)[0, 8:-8, 8:-8].astype(float)
    assert abs(middle - 127.5).max() < 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_goes_on(number, workdir, models, monkeypatch, capsys):
    run(models, "local_two", "whole")
    write, written = generate.write_image, []

    def interrupted(*args):
        if len(written) == 3:
            signal.raise_signal(number)
        written.append(write(*args))

    monkeypatch.setattr(generate, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped: 3 images are in set; the same command"):
        run(models, "local_two", "set")
    assert len(images("set")) == 3
    assert not Path("set/manifest.csv").exists()
    monkeypatch.setattr(generate, "write_image", write)
    run(models, "local_two", "set")
    assert images("set") == images("whole")

    Path("set/images/left/000001.png").unlink()
    Path("set/manifest.csv").unlink()
    run(models, "local_two", "set")
    assert images("set") == images("whole")
    before = snapshot(workdir)
    run(models, "local_two", "set")  # nothing is left to do
    assert snapshot(workdir) == before
    assert "set is finished: 6 images" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_process_leaves_whole_files(workdir, models):
    argv = command(models, "local", "set", "--per_class", 2000)
    process = Process(REPOSITORY / "synthetic_data" / "generate.py", *argv)
    while not Path("set/images").exists() or len(os.listdir("set/images")) < 30:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    data = load_cifake("set/images")  # all of them are whole, and there is nothing else
    assert len(data) >= 30
    run(models, "local", "other")
    assert images("other").items() <= images("set").items()


def test_classes_of_ones_own_get_folders(workdir, models):
    model = models / "local_two"
    run(models, "local", "two", "--model", model, "--image_size", 8)
    assert list(images("two")) == [f"{s}/00000{i}.png" for s in ("left", "right") for i in range(3)]
    assert Image.open("two/images/left/000000.png").size == (8, 8)

    Path("pets.csv").write_text("# mine\n\ncat\ntree_frog, a frog; a toad, 31 32\n")
    run(models, "stable-diffusion", "pets", "--classes", "pets.csv", "--prompt", "{class}, drawn")
    assert [row["prompt"] for row in rows("pets")] == [
        *("a cat, drawn", "a frog, drawn", "a cat, drawn", "a toad, drawn", "a cat, drawn"),
        "a frog, drawn",
    ]


def test_the_first_of_a_larger_set_are_the_smaller_one(models):
    args = generate.parse_args(command(models, "local", "set", "--per_class", 12))
    plan = Plan(named(list(CLASSES)), args, args.model)
    names = [plan.file(n) for n in range(len(plan))]
    assert sorted(names)[:30] == sorted(names[:30])  # what --limit 30 takes of 120


def test_no_two_images_share_their_noise(models):
    args = generate.parse_args(command(models, "local", "set", "--per_class", 50_000))
    plan = Plan(named(list(CLASSES)), args, args.model)
    assert len({plan.image_seed(n) for n in range(len(plan))}) == 500_000
    one, two = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.randn(3, generator=one), torch.randn(3, generator=two))  # the reason


def test_guidance(monkeypatch):
    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DOutput

    class Net(torch.nn.Module):
        spec = {"num_classes": 10}  # noqa: RUF012

        def forward(self, x, t, class_labels):
            v = x * 0.1 + class_labels.view(-1, 1, 1, 1) / 10
            return UNet2DOutput(v)

    noise = torch.randn(2, 3, 32, 32) / 10
    labels = torch.tensor([3, 10])
    scheduler = diffusers.DDIMScheduler.from_config(
        diffusion.build_schedule().config, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    free = noise * 0.1 + 1
    for scale, v in ((1, labels / 10), (3, 1 + 3 * (labels / 10 - 1))):
        v = free - 1 + v.view(-1, 1, 1, 1)
        expected = (scheduler.step(v, 999, noise).prev_sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(diffusion.sample(Net(), labels, noise, scale, 1), expected)


# -------------------------------------------------------------------------------------- bad input

FLAGS = [
    (["--guidance_scale", "0.5"], "--guidance_scale: '0.5' is no number from 1"),
    (["--steps", "0"], "--steps: '0' is no whole number from 1"),
    (["--per_class", "0"], "--per_class: '0' is no whole number"),
    (["--image_size", "4"], "--image_size: '4' is no whole number"),
    (["--batch_size", "0"], "--batch_size: '0' is no whole number"),
    (["--seed", "-1"], "--seed: '-1' is no whole number"),
    (["--pipeline", "gan"], "--pipeline: invalid choice: 'gan'"),
    (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["--prompt", "a cat"], "--prompt: 'a cat' says nowhere {class}"),
    (["--prompt", "a {class}"], "--prompt needs --pipeline stable-diffusion"),
    (["--pipeline", "dit", "--steps", "150"], "--steps needs to divide 1000"),
    (["--guidance", "3"], "unrecognized arguments: --guidance 3"),
    (["--device", "tpu"], "--device: 'tpu' is none of"),
]


@pytest.mark.parametrize(("argv", "expected"), FLAGS)
def test_bad_flags(argv, expected, workdir, models, capsys):
    code, text = fails(generate, command(models, "local", "set", *argv), capsys)
    assert code == 2
    assert expected in text
    assert not list(workdir.iterdir())


def damaged(models: Path, folder: Path, pipeline: str, part: str) -> Path:
    """A copy of a model without one of its parts."""
    shutil.copytree(models / pipeline, folder / "model")
    shutil.rmtree(folder / "model" / part)
    return folder / "model"


@pytest.mark.parametrize(
    ("pipeline", "part"),
    [("stable-diffusion", "text_encoder"), ("dit", "vae"), ("dit", "scheduler")],
)
def test_a_model_that_lacks_a_part(pipeline, part, workdir, models, capsys):
    model = damaged(models, workdir, pipeline, part)
    code, text = fails(generate, command(models, pipeline, "set", "--model", model), capsys)
    assert code == 1
    assert text.startswith(f"error: {model} cannot be loaded as a ")
    run(models, pipeline, "set", "--per_class", 1)  # with a whole one, as nothing was made yet


MODELS = [
    (
        "local",
        "nothing.pth",
        "no model at nothing.pth: synthetic_data/train_diffusion.py makes one",
    ),
    ("local", "note.txt", "note.txt is not a weight file"),
    ("local", "teacher.pth", "teacher.pth is no diffusion model"),
    ("local", "partial.pth", "partial.pth is not a whole diffusion model"),
    ("dit", "some/name", "some/name cannot be loaded as a DiTPipeline"),
    ("dit", "note.txt", "note.txt cannot be loaded as a DiTPipeline"),
    ("dit", "stable-diffusion", "cannot be loaded as a DiTPipeline"),
    ("stable-diffusion", "dit", "cannot be loaded as a StableDiffusionPipeline"),
]


@pytest.mark.parametrize(("pipeline", "model", "expected"), MODELS)
def test_bad_models(pipeline, model, expected, workdir, models, capsys):
    Path("note.txt").write_text("not a model")
    save(Path("teacher.pth"), to_checkpoint(build_model("wrn_16_1"), CLASSES))
    partial = torch.load(models / "local")
    partial["model"].popitem()
    save(Path("partial.pth"), partial)
    if (models / model).exists():
        model = models / model
    code, text = fails(generate, command(models, pipeline, "set", "--model", model), capsys)
    assert code == 1
    assert expected in text


CLASS_FILES = [
    (None, "none of cifar10, cifar100, imagenet, nor is there such a file"),
    (b"", "classes.csv names no class"),
    (b"cat\n../dog\n", "classes.csv, line 2: '../dog' cannot be the name of a folder"),
    (b"cat\n.hidden\n", "line 2: '.hidden' cannot be the name of a folder"),
    (b"cat\n\ncat\n", "classes.csv, line 3: class cat comes twice"),
    (b"cat, a cat, 1000\n", "line 1: '1000' are no ImageNet classes: numbers from 0 to 999"),
    (b"cat, a cat; \n", "line 1: an empty prompt"),
    (b"cat, a cat, tabby\n", "line 1: 'tabby' are no ImageNet classes"),
    (b"\xff\xfe\n", "classes.csv is not a text file in UTF-8"),
    (b"cat\n", "class cat has no ImageNet number"),
]


@pytest.mark.parametrize(("content", "expected"), CLASS_FILES)
def test_bad_class_files(content, expected, workdir, models, capsys):
    if content is not None:
        Path("classes.csv").write_bytes(content)
    argv = command(models, "dit", "set", "--classes", "classes.csv")
    code, text = fails(generate, argv, capsys)
    assert code == 1
    assert expected in text
    assert not Path("set").exists()


def test_the_lists_of_classes():
    assert tuple(category.name for category in load_classes("cifar10")) == CLASSES
    assert len(load_classes("cifar100")) == 100
    imagenet = load_classes("imagenet")
    folders = [category.folder for category in imagenet]
    assert folders == sorted(folders)
    assert imagenet[207].prompts == ("a golden retriever",)


@pytest.mark.slow
def test_another_model_or_list_of_classes(workdir, models, capsys):
    run(models, "local", "set")
    argv = command(models, "local", "set", "--classes", "cifar100")
    assert "knows other classes: airplane, " in fails(generate, argv, capsys)[1]
    Path("one.csv").write_text("cat\ndog\n")
    run(models, "stable-diffusion", "pets", "--classes", "one.csv")
    Path("one.csv").write_text("cat\ncow\n")
    argv = command(models, "stable-diffusion", "pets", "--classes", "one.csv")
    assert "pets was made with classes_sha256 " in fails(generate, argv, capsys)[1]


@pytest.mark.slow
def test_nothing_is_overwritten(workdir, models, capsys):
    run(models, "local_two", "set")
    other = workdir / "holiday"
    (other / "images").mkdir(parents=True)
    (other / "images" / "beach.png").write_bytes(b"mine")
    Path("run").mkdir()
    Path("run/config.json").write_text(
        json.dumps({"name": "student", "format": FORMAT, "args": {}})
    )
    Path("early").mkdir()  # another process is about to write its config.json
    Path("early/config.json.1.tmp").touch()
    run(models, "local_two", "early")
    before = snapshot(workdir)
    for argv, expected in (
        (["--guidance_scale", 4], "set was made with --guidance_scale 2.0, not 4.0: name another"),
        (["--per_class", 2], "set was made with --per_class 3, not 2"),
        (["--output", other], f"{other} holds something else already"),
        (["--output", other, "--overwrite"], f"{other} is no set of images"),
        (["--output", "run"], "run holds something else already"),
        (["--output", "run", "--overwrite"], "run is no set of images"),
        (["--output", "set/config.json"], "set/config.json holds something else already"),
    ):
        code, text = fails(generate, command(models, "local_two", "set", *argv), capsys)
        assert code == 1
        assert expected in text
        assert snapshot(workdir) == before

    manifest = Path("set/manifest.csv")
    manifest.write_text(manifest.read_text().replace("left", "west"))
    text = fails(generate, command(models, "local_two", "set"), capsys)[1]
    assert "set/manifest.csv disagrees with the flags" in text

    Path("set/notes.txt").write_text("mine")
    Path("set/images").rename("elsewhere")
    Path("set/images").symlink_to(workdir / "elsewhere")
    before = snapshot(workdir)
    text = fails(generate, command(models, "local_two", "set", "--overwrite"), capsys)[1]
    assert "set/images leads to another place: --overwrite keeps all of it" in text
    assert snapshot(workdir) == before
    Path("set/images").unlink()
    Path("elsewhere").rename("set/images")
    run(models, "local_two", "set", "--guidance_scale", 4, "--overwrite")
    run(models, "local_two", "fresh", "--guidance_scale", 4)
    assert images("set") == images("fresh")
    assert Path("set/notes.txt").exists()


def test_overwriting_is_not_for_many(workdir, models, monkeypatch, capsys):
    run(models, "local_two", "set")
    as_rank(monkeypatch, 0, 2)
    text = fails(generate, command(models, "local_two", "set", "--overwrite"), capsys)[1]
    assert text == "error: --overwrite is for one process: delete set yourself"


def test_a_set_is_overwritten_only_by_a_model_that_can_be_loaded(workdir, models, capsys):
    run(models, "local_two", "set")
    before = images("set")
    argv = command(models, "dit", "set", "--model", "no/such-model", "--overwrite")
    assert fails(generate, argv, capsys)[0] == 1
    assert images("set") == before


def test_a_full_disk(workdir, models, monkeypatch, capsys):
    move, moved = os.replace, []

    def full(source, target):
        if len(moved) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if str(target).endswith(".png"):
            moved.append(target)
        move(source, target)

    monkeypatch.setattr(generated_set.os, "replace", full)
    code, text = fails(generate, command(models, "local_two", "set"), capsys)
    assert code == 1
    assert "cannot be written: No space left on device; the images before it stay" in text
    assert len(images("set")) == 5
    assert not list(Path("set").glob(".*.tmp"))


@pytest.mark.parametrize(("size", "advice"), [(64, "--batch_size 32"), (1, "--dtype bf16")])
def test_out_of_gpu_memory(size, advice, workdir, models, monkeypatch, capsys):
    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(diffusion, "sample", too_much)
    argv = command(models, "local_two", "set", "--batch_size", size)
    code, text = fails(generate, argv, capsys)
    assert code == 1
    assert f"out of GPU memory at --batch_size {size}: try {advice}" in text


def test_a_model_that_makes_nan(workdir, models, capsys):
    broken = torch.load(models / "local")
    broken["model"]["conv_out.bias"].fill_(float("nan"))
    save(Path("broken.pth"), broken)
    argv = command(models, "local", "set", "--model", "broken.pth")
    assert "makes values that are not finite" in fails(generate, argv, capsys)[1]
    assert images("set") == {}


def test_fp16_needs_a_gpu(workdir, models, capsys):
    argv = command(models, "local", "set", "--dtype", "fp16")
    assert "--dtype fp16 needs a GPU" in fails(generate, argv, capsys)[1]


def test_without_diffusers(workdir, models, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    text = fails(generate, command(models, "local", "set"), capsys)[1]
    assert "this needs diffusers: `pip install -r requirements-generate.txt`" in text


@pytest.mark.slow
def test_a_student_learns_from_a_set(workdir, models, cifar10_binary):
    run(models, "local", "set")
    argv = "--teacher_weights random --epochs 1 --batch_size 10 --device cpu".split()
    places = ["--synthetic_data_dir", "set/images", "--data_dir", str(cifar10_binary)]
    student_script.main(student_script.parse_args([*argv, *SMALL_NETWORK, *places]))
    assert load_model("student_cifar10_kd.pth", classes=list(CLASSES)).spec["arch"] == "wrn_16_1"
    assert float(metrics("runs/student-001")[0]["train_loss"]) > 0
