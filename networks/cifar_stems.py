"""CIFAR stems of torchvision's networks: for 32x32, the first layers downsample less."""

from torch import nn

from experiment.errors import UserError

TORCHVISION_NETWORKS = tuple(
    "resnet18 resnet34 resnet50 vgg11_bn mobilenet_v2 shufflenet_v2_x1_0".split()
)


def use_cifar_stem(model: nn.Module, arch: str) -> None:
    """Change a network of TORCHVISION_NETWORKS in place. Errors: UserError for any other."""
    if arch.startswith("resnet"):  # 3x3, no pooling (He et al. 2016, arXiv 1512.03385, section 4.2)
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif arch == "vgg11_bn":  # five poolings leave 1x1: one linear layer (Fang, arXiv 2105.08584)
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, model.classifier[-1].out_features)
        nn.init.normal_(model.classifier.weight, 0, 0.01)
        nn.init.zeros_(model.classifier.bias)
    elif arch == "mobilenet_v2":  # 4x4 at the end instead of 1x1
        model.features[0][0].stride = (1, 1)
        model.features[2].conv[1][0].stride = (1, 1)
    elif arch == "shufflenet_v2_x1_0":  # 4x4 at the end instead of 1x1
        model.conv1[0].stride = (1, 1)
        model.maxpool = nn.Identity()
    else:
        raise UserError(f"no CIFAR stem is written for {arch}")
