"""Networks and their checkpoints.

    model = build_model("resnet18", stem="cifar", num_classes=10)
    model = load_model("student_cifar10_kd.pth")  # the file says which network it holds

A checkpoint is a dict of tensors and plain types:

    {"arch": "resnet18", "stem": "cifar", "num_classes": 10, "classes": [...],
     "model": state dict, "provenance": {...}}

Weight files are only ever loaded with `weights_only=True`: a file from a stranger cannot run code.
"""

import functools
import hashlib
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from experiment import UserError, load
from wide_resnet import WideResNet

STEMS = ("cifar", "imagenet")
HEADS = ("fc.", "classifier.")  # where the names of the last layers' weights begin


def build_model(arch: str = "resnet18", stem: str = "cifar", num_classes: int = 10) -> nn.Module:
    """A randomly initialised network, one of ARCHITECTURES: (B, 3, H, W) -> (B, num_classes).

    The stem "imagenet" is torchvision's own, which halves the picture two to five times before it
    is small enough: a ResNet's blocks see 32x32 pictures at 8x8. The stem "cifar" is for 32x32, see
    the functions below. Errors: UserError for the ImageNet stem of a wide ResNet.
    """
    width = {f"wrn_{depth}_{width}": (depth, width) for depth, width in WIDE_RESNETS}
    if arch in width:
        if stem != "cifar":
            raise UserError(f"{arch} is made for 32x32 pictures: it has the cifar stem only")
        model = WideResNet(*width[arch], num_classes)
    else:
        model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
        if stem == "cifar":
            FOR_CIFAR[arch](model)
    model.spec = {"arch": arch, "stem": stem, "num_classes": num_classes}
    return model.to(memory_format=torch.channels_last)


def _small_resnet(model: nn.Module) -> None:
    """A 3x3 convolution of stride 1 and no pooling (He et al. 2016, arXiv 1512.03385, sec. 4.2)."""
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def _small_vgg(model: nn.Module) -> None:
    """One linear layer on the 512 channels that five poolings leave at 1x1, instead of three.

    As in the tables of data-free distillation (Fang et al. 2021, arXiv 2105.08584).
    """
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(512, model.classifier[-1].out_features)
    nn.init.normal_(model.classifier.weight, 0, 0.01)
    nn.init.zeros_(model.classifier.bias)


def _small_mobilenet(model: nn.Module) -> None:
    """Stride 1 in the first convolution and the second stage: 4x4 at the end instead of 1x1."""
    model.features[0][0].stride = (1, 1)
    model.features[2].conv[1][0].stride = (1, 1)


def _small_shufflenet(model: nn.Module) -> None:
    """Stride 1 in the first convolution and no pooling: 4x4 at the end instead of 1x1."""
    model.conv1[0].stride = (1, 1)
    model.maxpool = nn.Identity()


FOR_CIFAR = {
    "resnet18": _small_resnet,
    "resnet34": _small_resnet,
    "resnet50": _small_resnet,
    "vgg11_bn": _small_vgg,
    "mobilenet_v2": _small_mobilenet,
    "shufflenet_v2_x1_0": _small_shufflenet,
}
WIDE_RESNETS = ((40, 2), (16, 2), (40, 1), (16, 1), (16, 4))  # depth and width
ARCHITECTURES = (*FOR_CIFAR, *(f"wrn_{depth}_{width}" for depth, width in WIDE_RESNETS))


class Ensemble(nn.Module):
    """Several networks that teach as one: (B, C, H, W) -> the mean of their logits, (B, classes).

    In float32. The softened mean is the normalised geometric mean of what each would say (Hinton,
    Vinyals & Dean 2015, arXiv 1503.02531, section 1).
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images).float() for member in self.members]).mean(0)


def cast_once(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep the weights that autocast to `dtype` would cast anew in every step as what it makes.

    For a frozen network: it computes the same to the last bit, with twenty kernels less a step.
    """
    for module in model.modules():
        if dtype is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)


def checksum(model: nn.Module) -> str:
    """SHA-256 over the names and the values of all weights, whatever file they came in."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


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
    hint = {**expected, **said}
    spec = _recognise(weights, hint)
    if spec is None:
        if hint.get("arch") in list(ARCHITECTURES) and hint.get("stem") in STEMS:
            likely = (hint["arch"], hint["stem"], _outputs(weights))
            _refuse_misfits(likely, weights, path)
        raise UserError(f"{path}: expected one of {', '.join(ARCHITECTURES)}, found none of them")
    found = {**spec, **said}
    for key, value in expected.items():
        if found.get(key, value) != value:
            raise UserError(f"{path}: expected {key} {value}, found {found[key]}")
    for key, value in spec.items():
        if found[key] != value:
            raise UserError(f"{path} says that its {key} is {found[key]}, but it is {value}")
    model = build_model(**spec)
    model.load_state_dict(weights)
    return model.eval()


def _recognise(weights: dict[str, Tensor], hint: dict) -> dict | None:
    """The network that a state dict fits: that of `hint`, or else any; None if there is none.

    MobileNetV2 and ShuffleNetV2 have the same shapes with either stem, as strides leave no trace in
    a state dict: without a hint, these are taken for the first of STEMS.
    """
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    specs = [
        {"arch": arch, "stem": stem, "num_classes": _outputs(weights)}
        for arch in ARCHITECTURES
        for stem in STEMS
        if _outputs(weights) and (stem == "cifar" or arch in FOR_CIFAR)
    ]
    specs.sort(key=lambda spec: sum(hint.get(key) != value for key, value in spec.items()))
    return next((spec for spec in specs if _shapes(*spec.values()) == shapes), None)


def _outputs(weights: dict[str, Tensor]) -> int:
    """How many classes a state dict tells apart."""
    heads = sorted(key for key in weights if key.startswith(HEADS) and key.endswith("bias"))
    return weights[heads[-1]].numel() if heads else 0


@functools.cache
def _shapes(arch: str, stem: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # no memory, and no random numbers are drawn
        state = build_model(arch, stem, num_classes).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


def _refuse_misfits(
    spec: tuple[str, str, int], weights: dict[str, Tensor], source: str | Path
) -> None:
    """Errors: UserError that names the first tensor which is not that of the network `spec`."""
    own = _shapes(*spec)
    for key in sorted(own.keys() | weights.keys()):
        expected = own.get(key, "nothing")
        found = tuple(weights[key].shape) if key in weights else "nothing"
        if expected != found:
            name = f"{spec[0]} with the {spec[1]} stem"
            raise UserError(f"{source} is no {name}: {key}: expected {expected}, found {found}")


def init_from(model: nn.Module, source: str) -> str:
    """Start `model` from "random", "imagenet" (IMAGENET1K_V1) or the path of a weight file.

    The body is taken, and the head if it has as many classes. A 3x3 stem takes the centre of a 7x7
    one. Returns a line that says what was taken and what stays random. Errors: UserError.
    """
    if source == "random":
        return "random weights"
    arch = model.spec["arch"]
    weights = _imagenet_weights(arch) if source == "imagenet" else read_weights(source)[0]
    own, weights = model.state_dict(), dict(weights)
    for key in own:
        if key.endswith("num_batches_tracked"):  # files from before PyTorch 0.4.1 lack these
            weights.setdefault(key, own[key])

    cropped, conv1 = "", own.get("conv1.weight")
    stem = weights.get("conv1.weight", conv1)
    if conv1 is not None and (stem.shape[2:], conv1.shape[2:]) == ((7, 7), (3, 3)):
        weights["conv1.weight"] = stem[:, :, 2:5, 2:5]
        cropped = ", conv1 from the centre of its 7x7 kernels"
    heads = {key for key in own.keys() | weights.keys() if key.startswith(HEADS)}
    fits = all(_same_shape(own, weights, key) for key in heads)
    new = [] if fits else sorted(heads & own.keys(), reverse=True)
    weights = {key: value for key, value in weights.items() if fits or key not in heads}
    weights |= {key: own[key] for key in new}

    _refuse_misfits(tuple(model.spec.values()), weights, source)
    model.load_state_dict(weights)
    taken = f"{len(own) - len(new)} of {len(own)} tensors from {source}{cropped}"
    return f"{taken}; new: {', '.join(new) or 'none'}"


def _same_shape(a: dict[str, Tensor], b: dict[str, Tensor], key: str) -> bool:
    return key in a and key in b and a[key].shape == b[key].shape


def _imagenet_weights(arch: str) -> dict[str, Tensor]:
    if arch not in FOR_CIFAR:
        raise UserError(f"torchvision has no ImageNet weights of {arch}: use --init random")
    weights = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a download cut short
        raise UserError(
            f"torchvision's ImageNet weights cannot be downloaded ({error}); use --init random, or "
            f"--init PATH with a weight file for torchvision's {arch}"
        ) from error
