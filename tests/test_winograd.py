"""networks/winograd.py against PyTorch's own convolution, on every CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from networks import winograd
from networks.winograd import Winograd, WinogradConv2d, use_winograd


@pytest.fixture(autouse=True)
def enabled(monkeypatch):
    monkeypatch.setattr(winograd, "ENABLED", True)


def example(count, channels_in, channels, height, width):
    x = torch.randn(count, channels_in, height, width, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(channels, channels_in, 3, 3, dtype=torch.float64, requires_grad=True)
    return x, filters


def assert_near(own, expected):
    """In float32. A tolerance of single values would fail by chance, for those near zero."""
    assert (own - expected).norm() < 5e-6 * expected.norm()


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("height", range(1, 10))
@pytest.mark.parametrize("width", [1, 4, 7])
@pytest.mark.parametrize("cache", [1, winograd.CACHE])  # images one by one, or all at once
def test_the_outputs_are_those_of_a_convolution(monkeypatch, count, height, width, cache):
    monkeypatch.setattr(winograd, "CACHE", cache)
    x, filters = example(count, 2, 3, height, width)
    torch.testing.assert_close(Winograd.apply(x, filters), F.conv2d(x, filters, padding=1))


@pytest.mark.parametrize("size", [(1, 1), (4, 8), (7, 5)])
def test_the_gradients_are_those_of_a_convolution(monkeypatch, size):
    monkeypatch.setattr(winograd, "CACHE", 1_000)
    x, filters = example(5, 3, 2, *size)
    upstream = torch.randn(5, 2, *size, dtype=torch.float64)
    gradients = torch.autograd.grad(Winograd.apply(x, filters), (x, filters), upstream)
    expected = torch.autograd.grad(F.conv2d(x, filters, padding=1), (x, filters), upstream)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(("frozen", "spared"), [(0, "_convolve"), (1, "_filter_gradient")])
def test_no_gradient_is_computed_that_nobody_needs(monkeypatch, frozen, spared):
    inputs = example(2, 2, 2, 6, 6)
    inputs[frozen].requires_grad_(False)
    y = Winograd.apply(*inputs)
    monkeypatch.setattr(winograd, spared, None)  # calling it fails
    y.sum().backward()
    assert inputs[1 - frozen].grad is not None


def test_its_output_may_be_changed_in_place():
    x, filters = example(2, 3, 3, 5, 5)
    F.relu_(Winograd.apply(x, filters)).sum().backward()
    expected = torch.autograd.grad(F.relu(F.conv2d(x, filters, padding=1)).sum(), (x, filters))
    torch.testing.assert_close((x.grad, filters.grad), expected)


@pytest.mark.parametrize("channels", [64, 256])
def test_rounding_in_float32(channels):
    """A convolution of PyTorch's is two to eight times as close to float64."""
    x = torch.randn(4, channels, 15, 15, requires_grad=True)
    filters = torch.randn(channels, channels, 3, 3, requires_grad=True)
    upstream = torch.randn(4, channels, 15, 15)

    def results(convolve, *inputs):
        y = convolve(*inputs)
        return y, *torch.autograd.grad(y, inputs, upstream.to(y))

    exact = results(lambda x, w: F.conv2d(x, w, padding=1), x.double(), filters.double())
    for own, expected in zip(results(Winograd.apply, x, filters), exact, strict=True):
        assert_near(own, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_are_channels_last(layout):
    x = torch.randn(2, 8, 7, 7).to(memory_format=layout)
    y = Winograd.apply(x, torch.randn(8, 8, 3, 3))
    assert y.is_contiguous(memory_format=torch.channels_last)


def of_class(model, kind):
    return [name for name, module in model.named_modules() if type(module) is kind]


def test_only_the_convolutions_that_gain_are_replaced():
    resnet = of_class(build_model("resnet18"), WinogradConv2d)
    assert len(resnet) == 13  # 16 of the blocks, less the three that halve the size
    assert "conv1" not in resnet  # three channels
    assert "layer2.0.conv1" not in resnet
    assert len(of_class(build_model("airbench94"), WinogradConv2d)) == 5  # not 24 channels to 64
    assert of_class(build_model("mobilenet_v2"), WinogradConv2d) == []  # depthwise, and 1x1


@pytest.mark.parametrize(
    "other",
    [
        *(dict(stride=2), dict(dilation=2), dict(groups=2), dict(padding_mode="reflect")),
        *(dict(padding=0), dict(kernel_size=1), dict(in_channels=63), dict(out_channels=63)),
    ],
)
def test_other_convolutions_stay(other):
    usual = dict(in_channels=64, out_channels=64, kernel_size=3, padding=1)
    assert of_class(use_winograd(nn.Sequential(nn.Conv2d(**usual))), WinogradConv2d) == ["0"]
    model = nn.Sequential(nn.Conv2d(**usual | other))
    assert of_class(use_winograd(model), WinogradConv2d) == []


def test_a_forward_of_ones_own_stays():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = use_winograd(nn.Sequential(Doubled(64, 64, 3, padding=1)))
    assert of_class(model, Doubled) == ["0"]


def test_a_cpu_on_which_it_was_not_measured_keeps_its_own(monkeypatch):
    monkeypatch.setattr(winograd, "ENABLED", False)
    assert of_class(build_model("resnet18"), WinogradConv2d) == []


@pytest.mark.parametrize("arch", ["resnet18", "airbench94", "vgg11_bn"])
def test_a_network_computes_the_same(monkeypatch, arch):
    monkeypatch.setattr(winograd, "MIN_TILES", 1)
    model = build_model(arch).eval()
    monkeypatch.setattr(winograd, "ENABLED", False)
    direct = build_model(arch).eval()
    direct.load_state_dict(model.state_dict())
    assert [*direct.state_dict()] == [*model.state_dict()]
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(images), direct(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(images), model(images), rtol=0, atol=0)


def test_elsewhere_it_steps_aside(monkeypatch):
    layer = WinogradConv2d(64, 64, 3, padding=1)
    monkeypatch.setattr(Winograd, "apply", None)  # calling it fails
    images = torch.randn(64, 64, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images).dtype == torch.bfloat16
    assert layer.double()(images.double()).dtype == torch.float64
    assert layer.float().to("meta")(images.to("meta")).is_meta


# a batch of 64 tiles, and one of 63; images that fill half of their tiles, and less
@pytest.mark.parametrize(
    ("shape", "gains"),
    [
        *(((64, 4, 4), True), ((63, 4, 4), False), ((1, 32, 32), True), ((0, 4, 4), False)),
        *(((99, 3, 3), True), ((99, 2, 4), True), ((999, 2, 2), False), ((99, 1, 8), False)),
        *(((99, 7, 7), True), ((99, 5, 5), False)),
    ],
)
def test_small_images_and_batches_keep_the_direct_way(monkeypatch, shape, gains):
    count, *size = shape
    layer, images = WinogradConv2d(64, 64, 3, padding=1), torch.randn(count, 64, *size)
    calls = []

    def apply(x, filters):
        calls.append(x)
        return F.conv2d(x, filters, padding=1)

    monkeypatch.setattr(Winograd, "apply", apply)
    layer(images)
    assert bool(calls) == gains


def test_a_compiler_sees_one_convolution(monkeypatch):
    monkeypatch.setattr(winograd, "MIN_TILES", 1)
    graphs = []

    def backend(graph, _):
        graphs.append([node.op for node in graph.graph.nodes])
        return graph.forward

    layer = WinogradConv2d(64, 64, 3, padding=1)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    images = torch.randn(3, 64, 4, 4)
    assert_near(compiled(images), layer(images))
    assert graphs[0].count("call_function") == 1


def test_a_bias_is_added(monkeypatch):
    monkeypatch.setattr(winograd, "MIN_TILES", 1)
    layer = WinogradConv2d(64, 64, 3, padding=1)
    images = torch.randn(2, 64, 6, 6)
    plain = F.conv2d(images, layer.weight, layer.bias, padding=1)
    assert_near(layer(images), plain)
