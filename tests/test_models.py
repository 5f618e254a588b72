import functools
import pickle
import re
import socket

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet18_Weights, ResNet50_Weights, WeightsEnum, resnet18, resnet34

import data
import models
from data import normalize
from experiment.device import MEMORY_FORMAT
from experiment.errors import UserError
from models import Ensemble, build_model, cast_weights_, init_from, load_model, to_checkpoint
from networks import winograd
from networks.cifar_stems import TORCHVISION_NETWORKS

CLASSES = tuple("abcdefghij")


def bare(path, model):
    torch.save(model.state_dict(), path)
    return path


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture
def candidates(monkeypatch):
    """Each network is built once for all comparisons of a test, which takes a second."""
    monkeypatch.setattr(models, "build_model", functools.cache(build_model))


def test_stems_differ_in_what_the_blocks_see():
    pictures = torch.zeros(2, 3, 32, 32, device="meta")
    for stem, size in (("cifar", 32), ("imagenet", 8)):
        with torch.device("meta"):
            model = build_model(stem=stem).eval()
        seen = []
        model.layer1.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0]))
        assert model(pictures).shape == (2, 10)
        assert seen[0].shape == (2, 64, size, size)


# Parameters in millions and forward multiply-adds in billions, for a 32x32 picture and 10 classes.
# Those of the ResNets, of VGG-11 and of WRN-40-2 (2.2 M, 0.33 G) are in many papers' tables; of
# WRN-16-1, whose 175,066 parameters are given as 0.17 M, and of airbench94 (1.97 M), too. The rest
# is torchvision's, or follows from the widths.
KNOWN = {
    "resnet18": (11.17, 0.56),
    "resnet34": (21.28, 1.16),
    "resnet50": (23.52, 1.30),
    "vgg11_bn": (9.23, 0.15),
    "mobilenet_v2": (2.24, 0.09),
    "shufflenet_v2_x1_0": (1.26, 0.05),
    "wrn_40_2": (2.24, 0.33),
    "wrn_16_2": (0.69, 0.10),
    "wrn_40_1": (0.56, 0.08),
    "wrn_16_1": (0.18, 0.03),
    "wrn_16_4": (2.75, 0.39),
    "airbench94": (1.97, 0.12),
    "airbench95": (4.61, 0.30),
}


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_parameters_and_macs_are_the_known_ones(arch):
    with torch.device("meta"):
        model, picture = build_model(arch).eval(), torch.zeros(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        assert model(picture).shape == (1, 10)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert (round(parameters, 2), round(counter.get_total_flops() / 2e9, 2)) == KNOWN[arch]


def test_parameter_counts_of_the_stems():
    def count(stem):
        with torch.device("meta"):
            return sum(p.numel() for p in build_model(stem=stem).parameters())

    assert count("cifar") == 11_173_962  # 11.17 million, as every CIFAR table has it
    assert count("imagenet") == count("cifar") + 64 * 3 * (7 * 7 - 3 * 3)


@pytest.mark.parametrize("arch", ["wrn_16_1", "airbench94", "airbench95"])
def test_a_network_for_small_images_has_no_imagenet_stem(arch):
    with pytest.raises(UserError, match=f"{arch} is made for 32x32 images: it needs --stem cifar"):
        build_model(arch, "imagenet")


def test_a_wide_resnet_computes_what_its_paper_says():
    """Pre-activation blocks, written out, with statistics that show in the logits."""
    model = build_model("wrn_16_2")
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32))
    w, images = model.eval().state_dict(), torch.randn(2, 3, 32, 32)

    def bn_relu(x, name):
        keys = (f"{name}.{key}" for key in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *(w[key] for key in keys)))

    x = F.conv2d(images, w["conv1.weight"], padding=1)
    for group, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2)):
        for i in (0, 1):  # two blocks: 16 = 6 * 2 + 4
            block, step = f"{group}.{i}", stride if i == 0 else 1
            first = bn_relu(x, f"{block}.bn1")
            out = F.conv2d(first, w[f"{block}.conv1.weight"], stride=step, padding=1)
            out = F.conv2d(bn_relu(out, f"{block}.bn2"), w[f"{block}.conv2.weight"], padding=1)
            x = out + (F.conv2d(first, w[f"{block}.shortcut.weight"], stride=step) if i == 0 else x)
    expected = bn_relu(x, "bn").mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]
    torch.testing.assert_close(model(images).detach(), expected, rtol=1e-4, atol=1e-4)


def test_an_ensemble_says_the_mean_of_its_members():
    members = [build_model("wrn_16_1").eval(), build_model("shufflenet_v2_x1_0").eval()]
    images = torch.randn(3, 3, 32, 32)
    one, two = (member(images) for member in members)
    torch.testing.assert_close(Ensemble(members)(images), (one + two) / 2)
    in_bf16 = Ensemble(members)
    cast_weights_(in_bf16, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_bf16(images).dtype == torch.float32


@pytest.mark.parametrize("arch", ["wrn_16_1", "airbench94"])
def test_a_teacher_that_is_cast_says_the_same(arch):
    torch.manual_seed(0)
    model, images = build_model(arch).eval(), torch.randn(4, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(images)
        for dtype in (None, torch.bfloat16):
            cast_weights_(model, dtype)
            convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
            assert {m.weight.dtype for m in convolutions} == {dtype or torch.float32}
            assert torch.equal(model(images), before)


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("stem", models.STEMS)
def test_a_checkpoint_brings_its_network_back(stem, tmp_path):
    torch.manual_seed(1)
    model = build_model(stem=stem, num_classes=7)
    torch.save(to_checkpoint(model, tuple("abcdefg")), tmp_path / "model.pth")
    again = load_model(tmp_path / "model.pth", num_classes=7, classes=list("abcdefg"))
    assert again.spec == {"arch": "resnet18", "stem": stem, "num_classes": 7}
    assert not again.training
    assert_same_weights(model, again)
    filters = again.layer1[0].conv1.weight  # the other layout is slower, and nothing would say so
    assert filters.is_contiguous(memory_format=MEMORY_FORMAT)
    assert filters.is_contiguous() == torch.backends.mps.is_available()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("arch", ["resnet18", "airbench94"])
def test_batch_norm_gets_the_layout_of_the_device(layout, arch, monkeypatch):
    """Contiguous tensors alone on a Mac, where it would train on wrong gradients."""
    for module in (models, data):
        monkeypatch.setattr(module, "MEMORY_FORMAT", layout)
    monkeypatch.setattr(winograd, "ENABLED", False)  # its outputs are always channels-last
    model, given = build_model(arch), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, images: given.append(images[0]))
    model(normalize(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)))
    assert len(given) > 5
    assert all(images.is_contiguous(memory_format=layout) for images in given)


def foreign_resnet18(stem: str, num_classes: int = 10) -> nn.Module:
    """As torchvision builds it or, for "cifar", as a hub's recipe for timm does."""
    torch.manual_seed(3)
    model = resnet18(num_classes=num_classes)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    for module in model.modules():  # so that every tensor shows in the logits
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.9, 1.1)
    return model.eval()


@pytest.mark.parametrize("stem", models.STEMS)
def test_a_resnet18_of_others_computes_the_same_here(stem, tmp_path):
    model, images = foreign_resnet18(stem), torch.randn(2, 3, 32, 32)
    again = load_model(bare(tmp_path / "bare.pth", model), num_classes=10, classes=list(CLASSES))
    assert again.spec == {"arch": "resnet18", "stem": stem, "num_classes": 10}
    torch.testing.assert_close(again(images), model(images), rtol=1e-4, atol=1e-5)


STATE = foreign_resnet18("cifar", 7).state_dict()
OTHER_SHAPES = {
    "DataParallel": {f"module.{key}": value for key, value in STATE.items()},
    "torch.compile": {f"_orig_mod.{key}": value for key, value in STATE.items()},
    "both": {f"module._orig_mod.{key}": value for key, value in STATE.items()},
    "and the other way round": {f"_orig_mod.module.{key}": value for key, value in STATE.items()},
    "timm": {"arch": "resnet18", "epoch": 3, "state_dict": STATE},
    "model": {"epoch": 3, "model": STATE},
    "before PyTorch 0.4.1": {k: v for k, v in STATE.items() if "num_batches_tracked" not in k},
    "parameters": {key: nn.Parameter(value, False) for key, value in STATE.items()},
    "float64": {key: value.double() for key, value in STATE.items()},
}


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_a_state_dict_is_known_however_it_was_stored(name, tmp_path):
    torch.save(OTHER_SHAPES[name], tmp_path / "model.pth")
    model = load_model(tmp_path / "model.pth")
    assert model.spec == {"arch": "resnet18", "stem": "cifar", "num_classes": 7}
    for key, value in model.state_dict().items():
        assert torch.equal(value, STATE[key]), key
        assert value.dtype == STATE[key].dtype


def test_of_two_networks_in_a_file_none_is_taken_by_chance(tmp_path):
    torch.save({**STATE, **OTHER_SHAPES["DataParallel"]}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"model\.pth holds two networks"):
        load_model(tmp_path / "model.pth")


@pytest.mark.slow
def test_every_architecture_is_known_again_by_its_shapes(candidates):
    for arch in models.ARCHITECTURES:
        for stem in models.STEMS if arch in TORCHVISION_NETWORKS else ("cifar",):
            with torch.device("meta"):
                weights = build_model(arch, stem, num_classes=3).state_dict()
            found = models._recognise(weights, "model.pth")
            leaves_no_trace = arch in ("mobilenet_v2", "shufflenet_v2_x1_0")  # only strides differ
            stem = "cifar" if leaves_no_trace else stem
            assert found == {"arch": arch, "stem": stem, "num_classes": 3}


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"num_classes": 100}, "model.pth: expected num_classes 100, found 10"),
        ({"classes": ["x"]}, "model.pth: expected classes"),
    ],
)
def test_another_network_than_expected_is_named(expected, message, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(to_checkpoint(build_model("wrn_16_1"), CLASSES), path)
    with pytest.raises(UserError, match=message):
        load_model(path, **expected)


def test_the_expected_stem_is_taken_where_the_shapes_do_not_tell(tmp_path):
    torch.save(build_model("shufflenet_v2_x1_0", "imagenet").state_dict(), tmp_path / "bare.pth")
    for stem in ("imagenet", "cifar"):
        assert load_model(tmp_path / "bare.pth", stem=stem).spec["stem"] == stem


def test_a_bare_state_dict_of_another_number_of_classes_is_named(tmp_path):
    torch.save(STATE, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"bare.pth: expected num_classes 10, found 7"):
        load_model(tmp_path / "bare.pth", num_classes=10)


@pytest.mark.slow
def test_a_network_we_do_not_have_is_refused(candidates, tmp_path):
    other, linear = models.WideResNet(10, 1).state_dict(), nn.Linear(3, 3).state_dict()
    for weights in (other, linear, {**STATE, "layer5.weight": torch.zeros(3)}, {}):
        torch.save(weights, tmp_path / "bare.pth")
        first = re.escape(next(iter(weights), "nothing"))
        names = rf"networks resnet18, .* airbench95: it begins with {first}$"
        with pytest.raises(UserError, match=f"fits none of the {names}"):
            load_model(tmp_path / "bare.pth")


def test_a_checkpoint_that_lies_about_itself_is_refused(tmp_path):
    path = tmp_path / "model.pth"

    def refused(checkpoint, message):
        torch.save(checkpoint, path)
        with pytest.raises(UserError, match=message):
            load_model(path)

    checkpoint = to_checkpoint(build_model("wrn_16_1"), CLASSES)
    refused({**checkpoint, "arch": "wrn_16_2"}, "is no wrn_16_2 with the cifar stem: size mismatch")
    refused({**checkpoint, "stem": "imagenet"}, "wrn_16_1 is made for 32x32 images")
    refused({**checkpoint, "num_classes": 9}, r"is no wrn_16_1 .* size mismatch for fc.bias")
    for key, lie in (
        *(("arch", "resnet101"), ("arch", ["wrn_16_1"]), ("arch", None), ("stem", 7)),
        *(("num_classes", 10**9), ("num_classes", 0), ("num_classes", "10"), ("num_classes", 2.5)),
    ):
        refused({**checkpoint, key: lie}, "holds a network that is not known here")
    weights = {k: v for k, v in checkpoint["model"].items() if k != "bn.weight"}
    refused({**checkpoint, "model": weights}, r"Missing key\(s\) in state_dict: \"bn.weight\"")
    weights = {**checkpoint["model"], "conv1.weight": torch.zeros(16, 3, 5, 5)}
    refused({**checkpoint, "model": weights}, r"size mismatch for conv1.weight: .*5, 5")
    for counter in (torch.zeros(0, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)):
        weights = {**checkpoint["model"], "bn.num_batches_tracked": counter}
        refused({**checkpoint, "model": weights}, "is no wrn_16_1 with the cifar stem: ")


def test_an_airbench_network_of_another_width_is_refused(candidates, tmp_path):
    model = models.Airbench((32, 64, 64))
    with pytest.raises(UserError, match="fits none of the networks"):
        load_model(bare(tmp_path / "bare.pth", model))
    model.spec = {"arch": "airbench94", "stem": "cifar", "num_classes": 10}
    torch.save(to_checkpoint(model, CLASSES), tmp_path / "model.pth")
    with pytest.raises(UserError, match="is no airbench94 with the cifar stem: size mismatch"):
        load_model(tmp_path / "model.pth")


ODD_TENSORS = {
    "sparse": lambda w: w.to_sparse(),
    "sparse, compressed": lambda w: w.flatten(1).to_sparse_csr(),
    "quantised": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "complex": lambda w: w.to(torch.complex64),
    "meta": lambda w: w.to("meta"),
    "nested": lambda w: torch.nested.nested_tensor(list(w)),
    "int8": lambda w: w.to(torch.int8),
    "bool": lambda w: w > 0,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.parametrize("say", [True, False])
def test_a_tensor_that_is_not_a_plain_one_is_refused(kind, say, tmp_path):
    checkpoint = to_checkpoint(build_model("wrn_16_1"), CLASSES)
    weights = checkpoint["model"]
    weights["conv1.weight"] = ODD_TENSORS[kind](weights["conv1.weight"])
    torch.save(checkpoint if say else weights, tmp_path / "model.pth")
    with pytest.raises(UserError) as stop:
        load_model(tmp_path / "model.pth")
    assert "\n" not in str(stop.value)
    assert str(stop.value).startswith(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300])
def test_a_network_that_is_not_finite_is_refused(value, tmp_path):
    """Its student would learn NaN; a float64 of 1e300 is infinite in float32."""
    checkpoint = to_checkpoint(build_model("wrn_16_1").double(), CLASSES)
    checkpoint["model"]["fc.bias"][3] = value
    torch.save(checkpoint, tmp_path / "model.pth")
    message = r"model.pth: fc.bias holds a number that is not finite"
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "model.pth")
    with pytest.raises(UserError, match=message):
        init_from(build_model("wrn_16_1"), str(tmp_path / "model.pth"))


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(UserError, match="there is no weight file"):
        load_model(path)
    whole = bare(path, build_model("wrn_16_1")).read_bytes()
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 neither", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a weight file, or not a safe one"):
            load_model(path)
    for state in ([1, 2], {"model": "weights"}, {"epoch": 3}, torch.zeros(3), {0: torch.zeros(3)}):
        torch.save(state, path)
        with pytest.raises(UserError, match="holds no network"):
            load_model(path)
    torch.save({"net": STATE, "epoch": 3}, path)
    with pytest.raises(UserError, match=r"holds no network: no state dict, but \['net', 'epoch'\]"):
        load_model(path)


def test_a_network_without_a_cifar_stem_is_named():
    """TORCHVISION_NETWORKS is where one is added."""
    with pytest.raises(UserError, match="no CIFAR stem is written for squeezenet1_1"):
        build_model("squeezenet1_1")
    assert build_model("squeezenet1_1", "imagenet").spec["arch"] == "squeezenet1_1"


class Malice:
    def __reduce__(self):
        return exec, ("open('ran.txt', 'w').close()",)


def test_a_pickle_that_would_run_code_does_not_run(workdir):
    (workdir / "model.pth").write_bytes(pickle.dumps(Malice(), protocol=2))
    torch.save({"model": Malice()}, workdir / "model.pt")
    for name in ("model.pth", "model.pt"):
        with pytest.raises(UserError, match=r"not a safe one .* a model, save its state_dict\(\)"):
            load_model(name)
    assert not (workdir / "ran.txt").exists()


def test_nor_does_one_in_place_of_torchvisions_weights(workdir, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(workdir))
    path = workdir / "hub" / "checkpoints" / ResNet50_Weights.IMAGENET1K_V1.url.split("/")[-1]
    path.parent.mkdir(parents=True)
    torch.save({"conv1.weight": Malice()}, path)
    with pytest.raises(UserError):
        init_from(build_model("resnet50"), "imagenet")
    assert not (workdir / "ran.txt").exists()


# ------------------------------------------------------------------------------------------ starts


def test_a_weight_file_with_another_head_gives_the_body(tmp_path):
    torch.manual_seed(2)
    source = resnet18(num_classes=200).half()
    model = build_model(stem="imagenet")
    head = model.fc.weight.clone()
    said = init_from(model, str(bare(tmp_path / "body.pth", source)))
    assert said == f"120 of 122 tensors from {tmp_path / 'body.pth'}; new: fc.weight, fc.bias"
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.conv1.weight, source.conv1.weight.float())
    assert torch.equal(model.layer4[1].bn2.weight, source.layer4[1].bn2.weight.float())
    assert model.conv1.weight.dtype == torch.float32


def test_the_cifar_stem_takes_the_centre_of_the_kernel(tmp_path):
    source, model = resnet18(num_classes=10), build_model(stem="cifar")
    said = init_from(model, str(bare(tmp_path / "body.pth", source)))
    assert "centre of its 7x7 kernels; new: none" in said
    assert torch.equal(model.conv1.weight, source.conv1.weight[:, :, 2:5, 2:5])
    assert torch.equal(model.fc.weight, source.fc.weight)


def test_imagenet_weights_without_counters_are_taken(monkeypatch):
    weights = {k: w for k, w in resnet18().state_dict().items() if "num_batches" not in k}
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: weights)
    model = build_model(stem="imagenet")
    assert (
        init_from(model, "imagenet") == "120 of 122 tensors from imagenet; new: fc.weight, fc.bias"
    )
    assert torch.equal(model.conv1.weight, weights["conv1.weight"])


def test_imagenet_weights_that_cannot_be_had_name_the_other_starts(monkeypatch):
    def offline(*_, **__):
        assert socket.getdefaulttimeout() == 30  # PyTorch sets none, and would wait for ever
        raise OSError("no network")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded.*--init random.*--init PATH"):
        init_from(build_model(), "imagenet")


def test_a_start_that_does_not_fit_is_refused(tmp_path):
    path = str(tmp_path / "body.pth")
    torch.save(STATE, path)
    with pytest.raises(UserError, match=r"no resnet18 with the imagenet stem: size .*conv1.weight"):
        init_from(build_model(stem="imagenet"), path)
    with pytest.raises(UserError, match=r"Unexpected key\(s\) in state_dict: .layer1.2.conv1"):
        init_from(build_model(stem="imagenet"), str(bare(tmp_path / "big.pth", resnet34())))


@pytest.mark.slow
def test_vgg_for_cifar_takes_torchvisions_convolutions(tmp_path):
    with torch.device("meta"):  # torchvision's head has 100 million weights to draw
        model = build_model("vgg11_bn")
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.zero_()
    weights = {k: v + 1 for k, v in model.state_dict().items() if k.startswith("features.")}
    head = {f"classifier.{i}.weight": torch.zeros(3, 3) for i in (0, 3, 6)}
    torch.save(weights | head, tmp_path / "body.pth")
    said = init_from(model, str(tmp_path / "body.pth"))
    assert said.endswith("new: classifier.weight, classifier.bias")
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)


def test_torchvision_has_no_wide_resnet_for_cifar():
    with pytest.raises(UserError, match="no ImageNet weights of wrn_16_1"):
        init_from(build_model("wrn_16_1"), "imagenet")


def test_a_random_start_takes_nothing():
    model = build_model("wrn_16_1")
    before = model.conv1.weight.clone()
    assert init_from(model, "random") == "random weights"
    assert torch.equal(model.conv1.weight, before)


def test_the_weights_of_imagenet_are_the_first_ones_and_are_checked(monkeypatch):
    asked = []

    def get_state_dict(weights, **more):
        asked.append((weights, more))
        return {}

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    with pytest.raises(UserError):
        init_from(build_model("resnet50"), "imagenet")
    safely = {"progress": False, "check_hash": True, "weights_only": True}
    assert asked == [(ResNet50_Weights.IMAGENET1K_V1, safely)]


@pytest.mark.parametrize("arch", ["resnet18", "wrn_16_4"])
def test_filters_start_as_in_he_et_al(arch):
    """Normal with the variance 2 / fan_out (arXiv 1502.01852)."""
    torch.manual_seed(0)
    for conv in (m for m in build_model(arch).modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
