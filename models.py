"""Networks and their checkpoints.

    model = build_model("resnet18", stem="cifar", num_classes=10)
    model = load_model("student_cifar10_kd.pth")        # architecture, stem and classes are in the file

A checkpoint is a dict of tensors and plain types, loaded with `weights_only=True`, so that a file from
a stranger cannot run code:

    {"arch": "resnet18", "stem": "cifar", "num_classes": 10, "classes": [...], "model": state_dict, ...}
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

from experiment import UserError

ARCHITECTURES = {"resnet18": resnet18}
STEMS = ("cifar", "imagenet")


def build_model(arch: str = "resnet18", stem: str = "cifar", num_classes: int = 10) -> nn.Module:
    """A randomly initialised torchvision network that maps (B, 3, H, W) to logits (B, num_classes).

    stem "imagenet" is torchvision's own: 7x7 convolution of stride 2, then max-pooling; a 32x32 picture
    reaches the residual blocks as 8x8. stem "cifar" is the usual one for small pictures (He et al. 2016,
    section 4.2): 3x3 convolution of stride 1 and no pooling; the blocks see all of the 32x32.
    """
    model = ARCHITECTURES[arch](num_classes=num_classes)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.spec = {"arch": arch, "stem": stem, "num_classes": num_classes}
    return model.to(memory_format=torch.channels_last)


def to_checkpoint(model: nn.Module, classes: tuple[str, ...]) -> dict:
    """All that `load_model` needs to rebuild `model`; `classes` names its outputs in order."""
    return {**model.spec, "classes": list(classes), "model": model.state_dict()}


def read_checkpoint(path: str | Path) -> dict:
    """Load a weight file on the CPU, without ever running code from it. Errors: UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no weight file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # a broken or hostile file can raise nearly anything in the unpickler
        reason = type(error).__name__
        raise UserError(
            f"{path} is not a PyTorch weight file that is safe to load ({reason})"
        ) from error
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise UserError(
            f"{path} holds no network: expected a dict, found {type(checkpoint).__name__}"
        )
    return checkpoint


def state_dict_of(checkpoint: dict, path: str | Path) -> dict[str, Tensor]:
    """The weights inside one of our checkpoints, or inside a bare state dict."""
    weights = checkpoint.get("model", checkpoint)
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UserError(f"{path} holds no network: there is no state dict in it")
    return weights


def load_model(path: str | Path, **expected: str | int | list[str]) -> nn.Module:
    """Rebuild the network of a checkpoint, on the CPU and in train mode.

    `expected` may give the `arch`, `stem`, `num_classes` and `classes` that the file has to match. A bare
    state dict says nothing of itself: its `arch`, `stem` and `num_classes` are then read off the shapes of
    its tensors. Errors: UserError that says what was expected and what was found.
    """
    checkpoint = read_checkpoint(path)
    weights = state_dict_of(checkpoint, path)
    found = {**_spec_from_shapes(weights), **checkpoint}
    for key, value in expected.items():
        if found.get(key, value) != value:
            raise UserError(f"{path}: expected {key} {value}, found {found[key]}")
    arch, stem, num_classes = found["arch"], found["stem"], weights["fc.weight"].shape[0]
    if arch not in ARCHITECTURES or stem not in STEMS:
        raise UserError(f"{path}: no network here has the architecture {arch} and the stem {stem}")
    model = build_model(arch, stem, num_classes)
    _load_exactly(model, weights, path)
    return model


def _spec_from_shapes(weights: dict[str, Tensor]) -> dict:
    conv1, fc = weights.get("conv1.weight"), weights.get("fc.weight")
    if conv1 is None or fc is None or conv1.ndim != 4 or fc.ndim != 2:
        return {"arch": "unknown", "stem": "unknown", "num_classes": 0}
    stem = {3: "cifar", 7: "imagenet"}.get(conv1.shape[-1], f"{conv1.shape[-1]}x{conv1.shape[-1]}")
    blocks = sum(key.endswith(".conv1.weight") for key in weights)
    bottleneck = any(key.endswith(".conv3.weight") for key in weights)
    arch = {(8, False): "resnet18", (16, False): "resnet34", (16, True): "resnet50"}
    return {
        "arch": arch.get((blocks, bottleneck), "unknown"),
        "stem": stem,
        "num_classes": fc.shape[0],
    }


def _load_exactly(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    own = model.state_dict()
    for key in sorted(own.keys() | weights.keys()):
        expected = tuple(own[key].shape) if key in own else "nothing"
        found = tuple(weights[key].shape) if key in weights else "nothing"
        if expected != found:
            name = f"{model.spec['arch']} with the {model.spec['stem']} stem"
            raise UserError(
                f"{path} does not fit {name}: {key}: expected {expected}, found {found}"
            )
    model.load_state_dict(weights)


def init_from(model: nn.Module, source: str) -> str:
    """Start `model` from "random", "imagenet" (IMAGENET1K_V1) or a weight file; says in words what it took.

    The body is taken. The head is taken where its class count fits and stays random where it does not. For
    a 3x3 stem, the centre of a 7x7 kernel is taken. Weights may be float16. Errors: UserError, OSError.
    """
    if source == "random":
        return "random weights"
    if source == "imagenet":
        weights, source = _imagenet_weights(), "torchvision's IMAGENET1K_V1"
    else:
        weights = dict(state_dict_of(read_checkpoint(source), source))

    own = model.state_dict()
    conv1 = weights.get("conv1.weight")
    cropped = conv1 is not None and conv1.shape[-1] == 7 and own["conv1.weight"].shape[-1] == 3
    if cropped:
        weights["conv1.weight"] = conv1[:, :, 2:5, 2:5]
    new = [
        k
        for k in own
        if k.startswith("fc.") and getattr(weights.get(k), "shape", 0) != own[k].shape
    ]
    for key in new:
        weights[key] = own[key]
    for key in own:  # weight files from before PyTorch 0.4.1 lack these counters
        if key.endswith("num_batches_tracked"):
            weights.setdefault(key, own[key])
    _load_exactly(model, weights, source)
    taken = f"{len(own) - len(new)} of {len(own)} tensors from {source}"
    stem = ", conv1 from the centre of the 7x7 kernel" if cropped else ""
    return f"{taken}{stem}; new: {', '.join(new) or 'none'}"


def _imagenet_weights() -> dict[str, Tensor]:
    try:
        return dict(ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # no network, or a download that was cut short
        raise UserError(
            f"torchvision's ImageNet weights cannot be downloaded ({error}); start with --init random, "
            "or with --init PATH for a weight file that torchvision's ResNet18 can load"
        ) from error
