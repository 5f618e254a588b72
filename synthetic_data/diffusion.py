"""A small class-conditional diffusion model of 32x32 images, built from diffusers.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,  e ~ N(0, 1),  t = 0 ... 999

The network sees x_t, t and the class, and predicts v = sqrt(a_t) e - sqrt(1 - a_t) x_0 (Salimans &
Ho 2022, arXiv 2202.00512); a_t falls along a cosine (Nichol & Dhariwal 2021, arXiv 2102.09672). The
network is the U-Net of DDPM on CIFAR-10 (Ho, Jain & Abbeel 2020, arXiv 2006.11239): four
resolutions of 128, 256, 256 and 256 channels, attention at 16x16, 35.8 million parameters. One
extra class means "any". Training replaces some labels by it, so that one network gives both terms
of classifier-free guidance.
"""

import math
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.device import MEMORY_FORMAT
from experiment.errors import UserError
from experiment.files import load

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


def import_diffusers() -> ModuleType:
    """The optional package diffusers. Errors: UserError that says how to install it."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"this needs diffusers: `pip install -r requirements-generate.txt` ({error})"
        ) from error
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    return diffusers


def build_unet(num_classes: int, channels: int = 128, layers: int = 2) -> nn.Module:
    """A randomly initialised U-Net, from (B, 3, 32, 32), t (B,) and labels (B,) to v.

    `channels`, a multiple of 8, is the width at full resolution, `layers` the number of residual
    blocks at each. Label `num_classes` means "any".
    """
    plain, attention = "DownBlock2D", "AttnDownBlock2D"
    unet = import_diffusers().UNet2DModel(
        sample_size=32,
        block_out_channels=(channels, 2 * channels, 2 * channels, 2 * channels),
        down_block_types=(plain, attention, plain, plain),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=layers,
        attention_head_dim=channels // 2,
        norm_num_groups=math.gcd(32, channels),
        num_class_embeds=num_classes + 1,
    )
    unet.spec = {"num_classes": num_classes, "channels": channels, "layers": layers}
    return unet.to(memory_format=MEMORY_FORMAT)


def build_schedule() -> "DDPMScheduler":
    """diffusers' DDPMScheduler for the formulas above."""
    return import_diffusers().DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )


def diffusion_loss(
    unet: nn.Module,
    schedule: "DDPMScheduler",
    images: Tensor,
    labels: Tensor,
    label_dropout: float = 0.0,
) -> Tensor:
    """The mean squared error of v, a scalar, at a random t and with random noise for each image.

    images: float (B, 3, 32, 32), -1 to 1; labels: int64 (B,), each of which becomes "any" with
    probability `label_dropout`. All draws are made on the device of `images`.
    """
    device = images.device
    noise = torch.randn(images.shape, device=device)
    t = torch.randint(len(schedule), (len(images),), device=device)
    dropped = torch.rand(len(images), device=device) < label_dropout
    labels = torch.where(dropped, unet.spec["num_classes"], labels)
    noisy = schedule.add_noise(images, noise, t)
    v = unet(noisy, t, class_labels=labels).sample
    return F.mse_loss(v.float(), schedule.get_velocity(images, noise, t))


@torch.inference_mode()
def sample(
    unet: nn.Module, labels: Tensor, noise: Tensor, guidance_scale: float, steps: int
) -> Tensor:
    """Images of the classes `labels`, float32 (B, 3, 32, 32), 0 to 1, from their `noise`.

    labels: int64 (B,); noise: float32 (B, 3, 32, 32), from N(0, 1). DDIM (Song, Meng & Ermon 2021,
    arXiv 2010.02502) adds no noise: an image depends on these two alone. Classifier-free
    guidance (Ho & Salimans 2022, arXiv 2207.12598):

        v = v(x, "any") + guidance_scale * (v(x, label) - v(x, "any"))

    At 1 this is v(x, label); the paper's w is guidance_scale - 1. The first step starts at the
    noisiest t (Lin et al. 2024, arXiv 2305.08891: "trailing"). diffusers' DDIMScheduler goes back
    by 1000 // steps each time, which is right only if `steps` divides 1000.
    """
    alphas_cumprod = [*build_schedule().alphas_cumprod, torch.ones(())]  # the last: no noise
    times = [round(1000 - 1000 * i / steps) - 1 for i in range(steps + 1)]  # from 999 to -1
    any_class = torch.full_like(labels, unet.spec["num_classes"])
    x = noise.to(memory_format=MEMORY_FORMAT)
    for t, after in pairwise(times):
        if guidance_scale == 1:
            v = unet(x, t, class_labels=labels).sample.float()
        else:
            both = unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, any_class])).sample
            cond, uncond = both.float().chunk(2)
            v = uncond + guidance_scale * (cond - uncond)
        a, b = alphas_cumprod[t], alphas_cumprod[after]
        x0 = (a**0.5 * x - (1 - a) ** 0.5 * v).clamp(-1, 1)
        eps = a**0.5 * v + (1 - a) ** 0.5 * x
        x = b**0.5 * x0 + (1 - b) ** 0.5 * eps
    return (x / 2 + 0.5).clamp(0, 1)


def describe(unet: nn.Module, classes: tuple[str, ...]) -> dict:
    """What a checkpoint holds beside the weights; `classes` names the labels, in order."""
    return {"kind": "diffusion", **unet.spec, "classes": list(classes)}


def load_unet(path: str | Path) -> tuple[nn.Module, list[str]]:
    """The network of a file by train_diffusion.py, on the CPU in eval mode, and its classes.

    Errors: UserError when the file is anything else.
    """
    checkpoint = load(path)
    if checkpoint.get("kind") != "diffusion":
        raise UserError(f"{path} is no diffusion model: train_diffusion.py makes one")
    try:
        unet = build_unet(*(checkpoint[key] for key in ("num_classes", "channels", "layers")))
        unet.load_state_dict(checkpoint["model"])
        classes = [str(name) for name in checkpoint["classes"]]
        if len(classes) != checkpoint["num_classes"]:
            raise ValueError("names and classes differ in number")
    except UserError:
        raise
    except Exception as error:  # a file that was tampered with can raise nearly anything
        raise UserError(
            f"{path} is not a whole diffusion model ({type(error).__name__})"
        ) from error
    return unet.eval().requires_grad_(False), classes
