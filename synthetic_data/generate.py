"""Make a set of synthetic images with a diffusion model, to train a student on.

    python synthetic_data/generate.py --pipeline local --guidance_scale 2 --output images/own
    python synthetic_data/generate.py --pipeline stable-diffusion --output images/sd
    python synthetic_data/generate.py --pipeline dit --steps 100 --output images/dit

`local` is a model of train_diffusion.py. diffusers loads `stable-diffusion` and `dit` from its hub
or a folder. The paper calls guidance 2 with 100 steps low fidelity, and 4 with 250 high. A student
reads the images with `--synthetic_data_dir images/own/images`. Beside that folder are config.json,
contact sheets and manifest.csv, which is written last: a set that has one is finished. Images of
CIFAR-10's classes get CIFAKE's names; other classes get a folder each.

The noise of an image depends on --seed, its class and its number only, and not on the rest of the
set, on stops or on the number of GPUs. On the CPU, with the same number of threads, the files are
the same bit for bit. On GPUs, images may differ in the last bit with --batch_size and the GPU
model. After a stop, the same command resumes.

`torchrun --nproc_per_node 8 synthetic_data/generate.py ...` splits the work over eight GPUs.
"""

import hashlib
import sys
import tempfile
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment import flags, parallel
from experiment.device import pick_device
from experiment.download import sha256
from experiment.errors import Stopped, UserError, one_line_errors
from experiment.folder import provenance
from experiment.signals import StopSignals
from synthetic_data import diffusion
from synthetic_data.classes import Category, load_classes, named
from synthetic_data.generated_set import (
    Plan,
    add_part,
    claim,
    discard,
    existing,
    finish,
    write_image,
)

# Where each pipeline finds its model, when --model does not say.
MODELS = {
    "stable-diffusion": "CompVis/stable-diffusion-v1-4",  # as CIFAKE
    "dit": "facebook/DiT-XL-2-256",  # as the paper
    "local": "diffusion_cifar10.pth",
}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Draw = Callable[[range], Tensor]


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.Parser(__doc__, "--pipeline NAME --output DIR")
    add = parser.add_argument_group("model").add_argument
    add("--pipeline", choices=tuple(MODELS), required=True, help="what makes the images")
    # fmt: off
    add("--model", metavar="NAME",
        help="a name on diffusers' hub, a folder of the same form, or for local a file; defaults: "
        + ", ".join(MODELS.values()))
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="auto is bf16 or fp16 on a CUDA GPU, else float32 [%(default)s]")
    add = parser.add_argument_group("images").add_argument
    add("--classes", metavar="NAME",
        help="cifar10, cifar100, imagenet, or a file with one class per line, like those in "
        "synthetic_data/classes/ [cifar10; local: the classes of the model]")
    add("--prompt", type=prompt, default="a photograph of {class}", metavar="TEXT",
        help="for stable-diffusion; {class} stands for a prompt of the class [%(default)s]")
    add("--per_class", type=flags.int_in(1, 999_999), default=5000, metavar="N",
        help="number of images of each class [%(default)s]")
    add("--image_size", type=flags.int_in(8, 4096), default=32, metavar="N",
        help="pixels a side; larger images are resized with antialiasing [%(default)s]")
    add = parser.add_argument_group("sampling").add_argument
    add("--guidance_scale", type=flags.float_in(1, 100), default=2.0, metavar="X",
        help="1 is none; with a higher one, images are more typical and less varied [%(default)s]")
    add("--steps", type=flags.int_in(1, 1000), default=50, metavar="N",
        help="evaluations of the network per image, doubled by guidance; for dit and "
        "stable-diffusion, a divisor of 1000 [%(default)s]")
    add("--seed", type=flags.int_in(0, 2**32 - 1), default=0, metavar="N",
        help="seed of the images' noise [%(default)s]")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="the folder of the set")
    add("--overwrite", action="store_true", help="delete the set in --output first")
    add("--batch_size", type=flags.int_in(1, 10**5), default=64, metavar="N",
        help="images at a time on a GPU; a CPU makes one at a time [%(default)s]")
    add("--device", type=flags.device, default="auto",
        help="auto, cpu, cuda, cuda:N, mps, xpu or xpu:N [%(default)s]")
    # fmt: on
    parser.add_need(
        "prompt", "--pipeline stable-diffusion", lambda args: args.pipeline == "stable-diffusion"
    )
    parser.add_need(
        "steps",
        "to divide 1000, except for --pipeline local",
        lambda args: args.pipeline == "local" or 1000 % args.steps == 0,
    )
    return flags.parse(parser, argv)


def prompt(text: str) -> str:
    """An argparse type: a text with {class} in it."""
    if "{class}" not in text:
        raise ArgumentTypeError(f"{text!r} says nowhere {{class}}")
    return text


def main(args: Namespace) -> None:
    rank, world_size = parallel.rank(), parallel.world_size()
    device, dtype = pick_device_and_dtype(args)
    model = args.model or MODELS[args.pipeline]
    categories, checksums = load_categories(args, model)
    plan, images = Plan(categories, args, model), args.output / "images"
    part = provenance(device, None if dtype == torch.float32 else dtype)
    load = local if args.pipeline == "local" else from_hub
    draw = None
    if args.overwrite:
        if world_size > 1:
            raise UserError(f"--overwrite is for one process: delete {args.output} yourself")
        draw = load(plan, device, dtype)  # it may fail: before the old set is deleted
        discard(args.output)
    claim(args, {"model": model, "dtype": part["precision"], **checksums}, part)

    # The last bits of a network's output depend on the size of its batch. So a resumed job makes
    # whole batches again, and the CPU, which gains little from batches, makes one image at a time.
    size = 1 if device.type == "cpu" else args.batch_size
    batches = [range(i, min(i + size, len(plan))) for i in range(0, len(plan), size)]
    done = existing(images)

    def is_left(batch: range) -> bool:
        return not done.issuperset(map(plan.file, batch))

    todo = list(filter(is_left, batches[rank::world_size]))
    with stopping(args):
        if done and rank == 0 and any(map(is_left, batches)):
            add_part(args.output, part)
        if todo:
            make(plan, todo, draw or load(plan, device, dtype), rank)
        if existing(images).issuperset(map(plan.file, range(len(plan)))):  # the last process
            finish(plan)


def pick_device_and_dtype(args: Namespace) -> tuple[torch.device, torch.dtype]:
    """From --device and --dtype; under torchrun, each process has a GPU of its own.

    On a CPU "auto" is float32, so that every CPU makes the same images; on MPS and XPU, too.
    """
    device, amp = pick_device(args.device, "auto" if args.dtype == "auto" else "off")
    auto = amp if amp and device.type != "cpu" else torch.float32
    dtype = DTYPES.get(args.dtype, auto)
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("--dtype fp16 needs a GPU: a CPU has float32 and bf16")
    return device, dtype


def load_categories(args: Namespace, model: str) -> tuple[list[Category], dict]:
    """The classes, and the checksums that a resumed set has to match: theirs and the model's."""
    model_sha256 = None
    if args.pipeline == "local":
        if not Path(model).is_file():
            raise UserError(f"no model at {model}: synthetic_data/train_diffusion.py makes one")
        categories = named(diffusion.load_unet(model)[1])
        model_sha256 = sha256(model)
        if args.classes:
            names = [category.name for category in categories]
            if [category.name for category in load_classes(args.classes)] != names:
                raise UserError(f"{model} knows other classes: {', '.join(names)}")
    else:
        categories = load_classes(args.classes or "cifar10")
    for category in categories:
        if args.pipeline == "dit" and not category.imagenet:
            raise UserError(
                f"class {category.name} has no ImageNet number, and DiT knows nothing else: see "
                "synthetic_data/README.md"
            )
    if len(categories) > 4096:  # see Plan.image_seed
        raise UserError(f"{len(categories)} classes: with more than 4096, images would share noise")
    classes = hashlib.sha256(repr(categories).encode()).hexdigest()
    return categories, {"model_sha256": model_sha256, "classes_sha256": classes}


@contextmanager
def stopping(args: Namespace) -> Iterator[None]:
    """In this block, a signal to stop ends the script with a line that says how to resume."""

    def stop(number: int) -> None:
        count = len(existing(args.output / "images"))
        same = "the same command" + ", without --overwrite," * args.overwrite
        raise Stopped(number, f"stopped: {count:,} images are in {args.output}; {same} resumes")

    signals = StopSignals(stop)
    signals.install()
    try:
        yield
    finally:
        signals.restore()


def make(plan: Plan, batches: list[range], draw: Draw, rank: int) -> None:
    """Make the images of `batches`. Errors: UserError."""
    args = plan.args
    interval = 0.5 if sys.stderr.isatty() else 60.0  # seconds: a log file needs no more
    bar = tqdm(total=sum(map(len, batches)), unit="img", mininterval=interval, disable=rank > 0)
    private = tempfile.TemporaryDirectory(dir=args.output, prefix=".", suffix=".tmp")
    with bar, private as folder:
        for batch in batches:
            try:
                pictures = draw(batch)
            except torch.OutOfMemoryError as error:
                less = f"--batch_size {args.batch_size // 2}"
                raise UserError(
                    f"out of GPU memory at --batch_size {args.batch_size}: try "
                    f"{less if args.batch_size > 1 else '--dtype bf16, or a larger GPU'}; the "
                    "images that are made stay"
                ) from error
            for n, pixels in zip(batch, to_pixels(pictures, args.image_size), strict=True):
                write_image(args.output / "images" / plan.file(n), pixels, Path(folder, "image"))
            bar.update(len(batch))


def to_pixels(pictures: Tensor, size: int) -> np.ndarray:
    """float (B, 3, H, W), 0 to 1 -> uint8 (B, size, size, 3). Errors: UserError."""
    pictures = pictures.float().cpu()  # on MPS, PyTorch 2.6 has no antialiasing
    if not pictures.isfinite().all():
        raise UserError("the model makes values that are not finite: try --dtype float32")
    if pictures.shape[2:] != (size, size):
        pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
    return (255 * pictures.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------------------------- the pipelines


def from_hub(plan: Plan, device: torch.device, dtype: torch.dtype) -> Draw:
    """Stable Diffusion or DiT, from diffusers' hub or a folder. Errors: UserError.

    Stable Diffusion's safety filter is off: it sometimes replaces a harmless image by black. Both
    are sampled by DDIM from the noisiest step on, with as many evaluations as --steps says, which
    has to divide 1000: see `diffusion.sample`. The paper has DDPM for DiT: diffusers' pipeline
    would draw its noise for the whole batch at once, and an image would depend on the others in
    its batch.
    """
    diffusers, model = diffusion.import_diffusers(), plan.model
    name, options = "DiTPipeline", {}
    if plan.args.pipeline == "stable-diffusion":
        name = "StableDiffusionPipeline"
        options = {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = getattr(diffusers, name).from_pretrained(model, dtype=dtype, **options)
    except Exception as error:  # diffusers and its libraries raise nearly anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{model} cannot be loaded as a {name}: {reason}") from error
    pipeline.to(device).set_progress_bar_config(disable=True)
    options = {"timestep_spacing": "trailing", "clip_sample": False}  # latents are not from -1 to 1
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **options)

    def draw(numbers: range) -> Tensor:
        return pipeline(
            [plan.condition(n) for n in numbers],  # prompts, or numbers of classes
            guidance_scale=plan.args.guidance_scale,
            num_inference_steps=plan.args.steps,
            generator=plan.generators(numbers),
            output_type="pt",
        ).images

    return draw


def local(plan: Plan, device: torch.device, dtype: torch.dtype) -> Draw:
    """The model of train_diffusion.py."""
    unet = diffusion.load_unet(plan.model)[0].to(device)

    def draw(numbers: range) -> Tensor:
        labels = torch.tensor([plan.condition(n) for n in numbers], device=device)
        noise = [torch.randn(3, 32, 32, generator=g) for g in plan.generators(numbers)]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return diffusion.sample(
                unet,
                labels,
                torch.stack(noise).to(device),  # (B, 3, 32, 32)
                plan.args.guidance_scale,
                plan.args.steps,
            )

    return draw


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
