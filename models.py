"""Networks and their checkpoints.

    model = build_model("resnet18", stem="cifar", num_classes=10)
    model = load_model("student_cifar10_kd.pth")  # the file names its network

A checkpoint is a dict of tensors and plain types:

    {"arch": "resnet18", "stem": "cifar", "num_classes": 10, "classes": [...],
     "model": state dict, "provenance": {...}}

Weight files are only ever loaded with `weights_only=True`: a file from a stranger cannot run code.
"""

import functools
import hashlib
import re
from contextlib import suppress
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from experiment.device import MEMORY_FORMAT
from experiment.download import timeout
from experiment.errors import UserError
from experiment.files import load
from networks.airbench import WIDTHS, Airbench
from networks.cifar_stems import TORCHVISION_NETWORKS, use_cifar_stem
from networks.wide_resnet import WideResNet
from networks.winograd import use_winograd

STEMS = ("cifar", "imagenet")
HEADS = ("fc.", "classifier.", "head.")  # the names of the last layers' weights start with these


def build_model(arch: str = "resnet18", stem: str = "cifar", num_classes: int = 10) -> nn.Module:
    """A randomly initialised network, one of ARCHITECTURES: (B, 3, H, W) -> (B, num_classes).

    The stem "imagenet" is torchvision's own for 224x224: a ResNet's blocks see 32x32 images at 8x8.
    The stem "cifar" is for 32x32. Errors: UserError for the ImageNet stem of a network without one.
    """
    if arch in FOR_32X32:
        if stem != "cifar":
            raise UserError(f"{arch} is made for 32x32 images: it needs --stem cifar")
        model = FOR_32X32[arch](num_classes=num_classes)
    else:
        model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
        if stem == "cifar":
            use_cifar_stem(model, arch)
    model.spec = {"arch": arch, "stem": stem, "num_classes": num_classes}
    return use_winograd(model).to(memory_format=MEMORY_FORMAT)


FOR_32X32 = {
    f"wrn_{depth}_{width}": functools.partial(WideResNet, depth, width)
    for depth, width in ((40, 2), (16, 2), (40, 1), (16, 1), (16, 4))
} | {name: functools.partial(Airbench, widths) for name, widths in WIDTHS.items()}
ARCHITECTURES = (*TORCHVISION_NETWORKS, *FOR_32X32)


class Ensemble(nn.Module):
    """Several networks that teach as one: (B, C, H, W) -> the mean of their logits, (B, classes).

    In float32. Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 1: the softened mean is the
    normalised geometric mean of the members' softened outputs.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images).float() for member in self.members]).mean(0)


def cast_weights_(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Store the convolutions and linear layers of a frozen network in `dtype`, if there is one.

    Autocast then need not cast them in every step. The output is bit-identical; afterwards the
    network only runs under autocast to `dtype`.
    """
    for module in model.modules():
        if dtype is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)


def checksum(model: nn.Module) -> str:
    """SHA-256 over the names and values of all weights, independent of the file they came in."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------ checkpoints


def describe(model: nn.Module, classes: tuple[str, ...]) -> dict:
    """What a checkpoint holds beside the weights; `classes` are the names of the outputs."""
    return {**model.spec, "classes": list(classes)}


def to_checkpoint(model: nn.Module, classes: tuple[str, ...]) -> dict:
    """What `load_model` rebuilds `model` from."""
    return {**describe(model, classes), "model": model.state_dict()}


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The state dict in a weight file, and the checkpoint around it, or {}.

    It is under "model" in our checkpoints and under "state_dict" in timm's. The prefixes that
    DataParallel and torch.compile put before each name are removed. Errors: UserError.
    """
    checkpoint = load(path)
    weights = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    named = isinstance(weights, dict) and all(isinstance(key, str) for key in weights)
    if not named or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no network: no state dict, but {[*checkpoint]}")
    for key, value in weights.items():
        dense = value.layout == torch.strided and not value.is_meta and not value.is_nested
        if not dense or not (value.is_floating_point() or value.dtype == torch.int64):
            raise UserError(f"{path}: {key} is not a dense tensor of real numbers")
        if not value.float().isfinite().all():
            raise UserError(f"{path}: {key} holds a number that is not finite")
    plain = {re.sub(r"^((module|_orig_mod)\.)+", "", key): weights[key] for key in weights}
    if len(plain) < len(weights):
        raise UserError(f"{path} holds two networks: some names come with and without module.")
    return plain, {} if weights is checkpoint else checkpoint


def load_model(path: str | Path, **expected: int | str | list[str]) -> nn.Module:
    """Rebuild the network of a weight file, on the CPU and in eval mode.

    Our checkpoints name their network; any other is recognised by the shapes of its tensors.
    `expected` holds the `stem`, `num_classes` or `classes` that the file has to have, if it names
    them. Errors: UserError.
    """
    weights, said = read_weights(path)
    if "stem" not in said:
        said = _recognise(weights, path, expected.get("stem"))
    arch, stem, num_classes = (said.get(key) for key in ("arch", "stem", "num_classes"))
    known = arch in ARCHITECTURES and stem in STEMS and isinstance(num_classes, int)
    if not known or not 0 < num_classes < 10**5:
        raise UserError(f"{path} holds a network that is not known here: {arch}, stem {stem}")
    for key, value in expected.items():
        if said.get(key, value) != value:
            raise UserError(f"{path}: expected {key} {value}, found {said[key]}")
    model = build_model(arch, stem, num_classes)
    _load_weights(model, weights, path)
    return model.eval()


def _recognise(weights: dict[str, Tensor], path: str | Path, expected: str | None = None) -> dict:
    """The first network in ARCHITECTURES that a state dict fits. Errors: UserError.

    MobileNetV2 and ShuffleNetV2 fit either stem: the `expected` one is taken, or the CIFAR one.
    """
    stems = sorted(STEMS, key=lambda stem: stem != expected)
    heads = [len(w) for key, w in weights.items() if key.startswith(HEADS) and w.ndim == 2]
    for arch in ARCHITECTURES if heads else ():
        for stem in stems if arch in TORCHVISION_NETWORKS else ("cifar",):
            with torch.device("meta"):  # no memory, and no random numbers are drawn
                model = build_model(arch, stem, heads[-1])
            with suppress(UserError):
                _load_weights(model, weights, path, assign=True)
                return model.spec
    names = f"{', '.join(ARCHITECTURES)}: it begins with {next(iter(weights), 'nothing')}"
    raise UserError(f"{path} fits none of the networks {names}")


def _load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | Path, assign: bool = False
) -> None:
    """Load all of `weights`. Errors: UserError that gives one reason why they do not fit."""
    try:
        model.load_state_dict(weights, assign=assign)
    except (RuntimeError, IndexError) as error:  # IndexError: a counter without an element
        reason = str(error).splitlines()[-1].strip()
        network = f"{model.spec['arch']} with the {model.spec['stem']} stem"
        raise UserError(f"{path} is no {network}: {reason[:200]}") from error


def init_from(model: nn.Module, source: str | Path) -> str:
    """Start `model` from "random", "imagenet" (IMAGENET1K_V1) or the path of a weight file.

    All layers but the head (a VGG's last three) are loaded, and the head if it has as many classes.
    A 3x3 stem gets the centre of the kernels of a 7x7 stem. Returns a line that says what was
    loaded and what stays random. Errors: UserError.
    """
    if source == "random":
        return "random weights"
    weights = _imagenet_weights(model) if source == "imagenet" else read_weights(source)[0]
    own, cropped = model.state_dict(), ""
    if "conv1.weight" in own.keys() & weights.keys():
        kernels = weights["conv1.weight"]
        if (kernels.shape[2:], own["conv1.weight"].shape[2:]) == ((7, 7), (3, 3)):
            weights["conv1.weight"] = kernels[:, :, 2:5, 2:5]
            cropped = ", conv1 from the centre of its 7x7 kernels"

    def head(state: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in state.items() if key.startswith(HEADS)}

    new = [] if head(own) == head(weights) else list(head(own))
    body = {key: weights[key] for key in weights if not (new and key.startswith(HEADS))}
    _load_weights(model, body | {key: own[key] for key in new}, source)
    taken = f"{len(own) - len(new)} of {len(own)} tensors from {source}{cropped}"
    return f"{taken}; new: {', '.join(new) or 'none'}"


def _imagenet_weights(model: nn.Module) -> dict[str, Tensor]:
    if (arch := model.spec["arch"]) not in TORCHVISION_NETWORKS:
        raise UserError(f"torchvision has no ImageNet weights of {arch}: use --init random")
    weights = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
    try:
        with timeout():
            return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except Exception as error:  # no network, or a download cut short
        hint = "use --init random, or --init PATH with torchvision's file"
        raise UserError(f"{arch}'s weights cannot be downloaded ({error}); {hint}") from error
