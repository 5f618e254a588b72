"""Networks and their checkpoints.

    model = build_model("resnet18", stem="cifar", num_classes=10)
    model = load_model("student_cifar10_kd.pth")  # the file says which network it holds

A checkpoint is a dict of tensors and plain types:

    {"arch": "resnet18", "stem": "cifar", "num_classes": 10, "classes": [...],
     "model": state dict, "provenance": {...}}

Weight files are only ever loaded with `weights_only=True`: a file from a stranger cannot run code.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

from experiment import UserError, load

ARCHITECTURES = {"resnet18": resnet18}
STEMS = ("cifar", "imagenet")


def build_model(arch: str = "resnet18", stem: str = "cifar", num_classes: int = 10) -> nn.Module:
    """A randomly initialised torchvision network, from (B, 3, H, W) to logits (B, num_classes).

    The stem "imagenet" is torchvision's own: a 7x7 convolution of stride 2, then max-pooling, so
    that the residual blocks see 32x32 pictures at 8x8. The stem "cifar" is a 3x3 convolution of
    stride 1 and no pooling: the blocks see all 32x32 (He et al. 2016, arXiv 1512.03385, section
    4.2).
    """
    model = ARCHITECTURES[arch](num_classes=num_classes)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.spec = {"arch": arch, "stem": stem, "num_classes": num_classes}
    return model.to(memory_format=torch.channels_last)


def cast_once(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep the weights that autocast to `dtype` would cast anew in every step as what it makes.

    For a frozen network: it computes the same to the last bit, with twenty kernels less a step.
    """
    for module in model.modules():
        if dtype is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)


def to_checkpoint(model: nn.Module, classes: tuple[str, ...]) -> dict:
    """What `load_model` rebuilds `model` from; `classes` are the names of its outputs, in order."""
    return {**model.spec, "classes": list(classes), "model": model.state_dict()}


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The state dict in a weight file, and all that the file says beside it. Errors: UserError.

    The file is one of our checkpoints, or a bare state dict, which says nothing of itself.
    """
    checkpoint = load(path)
    weights = checkpoint.get("model", checkpoint)
    named = isinstance(weights, dict) and all(isinstance(key, str) for key in weights)
    if not named or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no network: there is no state dict in it")
    return weights, {} if weights is checkpoint else checkpoint


def load_model(path: str | Path, **expected: str | int | list[str]) -> nn.Module:
    """Rebuild the network of a weight file, on the CPU and in eval mode.

    `expected` names what the file has to match of `arch`, `stem`, `num_classes` and `classes`. What
    the file does not say itself is read off the shapes of its tensors; unnamed classes match any.
    Errors: UserError, which says what was expected and what was found.
    """
    weights, said = read_weights(path)
    shapes = _spec_from_shapes(weights)
    found = {**shapes, **said}
    for key, value in expected.items():
        if found.get(key, value) != value:
            raise UserError(f"{path}: expected {key} {value}, found {found[key]}")
    if shapes["arch"] not in ARCHITECTURES or shapes["stem"] not in STEMS:
        network = "{arch} with the {stem} stem".format(**shapes)
        raise UserError(f"{path}: expected one of {', '.join(ARCHITECTURES)}, found {network}")
    for key, value in shapes.items():
        if found[key] != value:
            raise UserError(f"{path} says that its {key} is {found[key]}, but it is {value}")
    model = build_model(**shapes)
    _load_exactly(model, weights, path)
    return model.eval()


def _spec_from_shapes(weights: dict[str, Tensor]) -> dict:
    """Which ResNet a state dict belongs to, by its kernels, its blocks and its head."""
    conv1, bias = weights.get("conv1.weight"), weights.get("fc.bias")
    if conv1 is None or conv1.ndim != 4 or bias is None or bias.ndim != 1:
        return {"arch": "no ResNet", "stem": "unknown", "num_classes": 0}
    kernel = conv1.shape[-1]
    blocks = sum(key.endswith(".bn1.weight") for key in weights)
    depth = 3 if any(key.endswith(".conv3.weight") for key in weights) else 2
    return {
        "arch": f"resnet{depth * blocks + 2}",
        "stem": {3: "cifar", 7: "imagenet"}.get(kernel, f"{kernel}x{kernel}"),
        "num_classes": len(bias),
    }


def _load_exactly(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    own = model.state_dict()
    for key in sorted(own.keys() | weights.keys()):
        expected = tuple(own[key].shape) if key in own else "nothing"
        found = tuple(weights[key].shape) if key in weights else "nothing"
        if expected != found:
            name = "{arch} with the {stem} stem".format(**model.spec)
            raise UserError(f"{source} is no {name}: {key}: expected {expected}, found {found}")
    model.load_state_dict(weights)


def init_from(model: nn.Module, source: str) -> str:
    """Start `model` from "random", "imagenet" (IMAGENET1K_V1) or the path of a weight file.

    The body is taken, and the head if it has as many classes. A 3x3 stem takes the centre of a 7x7
    one. Returns a line that says what was taken and what stays random. Errors: UserError.
    """
    if source == "random":
        return "random weights"
    weights = _imagenet_weights() if source == "imagenet" else read_weights(source)[0]
    own, weights = model.state_dict(), dict(weights)
    for key in own:
        if key.endswith("num_batches_tracked"):  # files from before PyTorch 0.4.1 lack these
            weights.setdefault(key, own[key])

    cropped, stem = "", weights.get("conv1.weight", own["conv1.weight"])
    if stem.shape[2:] == (7, 7) and model.spec["stem"] == "cifar":
        weights["conv1.weight"] = stem[:, :, 2:5, 2:5]
        cropped = ", conv1 from the centre of its 7x7 kernels"
    new = [k for k in ("fc.weight", "fc.bias") if k in weights and weights[k].shape != own[k].shape]
    weights |= {key: own[key] for key in new}

    _load_exactly(model, weights, source)
    taken = f"{len(own) - len(new)} of {len(own)} tensors from {source}{cropped}"
    return f"{taken}; new: {', '.join(new) or 'none'}"


def _imagenet_weights() -> dict[str, Tensor]:
    try:
        return ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a download cut short
        raise UserError(
            f"torchvision's ImageNet weights cannot be downloaded ({error}); use --init random, or "
            "--init PATH with a weight file for torchvision's ResNet18"
        ) from error
