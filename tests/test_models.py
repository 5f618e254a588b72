import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet18_Weights, resnet18, resnet34, resnet101, vgg11_bn

import models
from experiment import UserError
from models import Ensemble, build_model, cast_once, init_from, load_model, to_checkpoint

CLASSES = tuple("abcdefghij")


def bare(path, model):
    torch.save(model.state_dict(), path)
    return path


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_stems_differ_in_what_the_blocks_see():
    pictures = torch.zeros(2, 3, 32, 32)
    for stem, size in (("cifar", 32), ("imagenet", 8)):
        model = build_model(stem=stem).eval()
        seen = []
        model.layer1.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0]))
        assert model(pictures).shape == (2, 10)
        assert seen[0].shape == (2, 64, size, size)


# Parameters in millions and forward multiply-adds in billions, for a 32x32 picture and 10 classes.
# Those of the ResNets, of VGG-11 and of WRN-40-2 (2.2 M, 0.33 G) are in many papers' tables; of
# WRN-16-1, whose 175,066 parameters are given as 0.17 M, too. The rest is torchvision's.
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
        return sum(p.numel() for p in build_model(stem=stem).parameters())

    assert count("cifar") == 11_173_962  # 11.17 million, as every CIFAR table has it
    assert count("imagenet") == count("cifar") + 64 * 3 * (7 * 7 - 3 * 3)


@pytest.mark.parametrize("stem", models.STEMS)
def test_a_checkpoint_brings_its_network_back(stem, tmp_path):
    torch.manual_seed(1)
    model = build_model(stem=stem, num_classes=7)
    torch.save(to_checkpoint(model, tuple("abcdefg")), tmp_path / "model.pth")
    again = load_model(tmp_path / "model.pth")
    assert again.spec == {"arch": "resnet18", "stem": stem, "num_classes": 7}
    assert not again.training
    assert_same_weights(model, again)


@pytest.mark.parametrize("stem", models.STEMS)
def test_a_bare_state_dict_is_recognised_by_its_shapes(stem, tmp_path):
    model = build_model(stem=stem)
    again = load_model(bare(tmp_path / "bare.pth", model), stem=stem, classes=list(CLASSES))
    assert_same_weights(model, again)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"arch": "resnet34"}, "expected arch resnet34, found resnet18"),
        ({"stem": "imagenet"}, "expected stem imagenet, found cifar"),
        ({"num_classes": 100}, "expected num_classes 100, found 10"),
        ({"classes": ["x"]}, "expected classes"),
    ],
)
def test_another_network_than_expected_is_named(expected, message, tmp_path):
    torch.save(to_checkpoint(build_model(), CLASSES), tmp_path / "model.pth")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "model.pth", **expected)


def test_a_network_we_do_not_have_is_refused(tmp_path):
    for network in (resnet101(num_classes=10), torch.nn.Linear(3, 3)):
        with pytest.raises(UserError, match=r"expected one of resnet18, .* found none of them"):
            load_model(bare(tmp_path / "bare.pth", network))


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_every_architecture_is_known_again_by_its_shapes(arch, tmp_path):
    stems = ("cifar", "imagenet") if arch in models.FOR_CIFAR and arch != "vgg11_bn" else ("cifar",)
    for stem in stems:
        model = build_model(arch, stem, num_classes=3)
        again = load_model(bare(tmp_path / "bare.pth", model), stem=stem)
        assert again.spec == {"arch": arch, "stem": stem, "num_classes": 3}
        assert_same_weights(model, again)


def test_vgg_with_torchvisions_own_head_is_known_by_its_shapes():
    shapes = models._shapes("vgg11_bn", "imagenet", 10)
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    spec = models._recognise(weights, {})
    assert spec == {"arch": "vgg11_bn", "stem": "imagenet", "num_classes": 10}


def test_a_network_without_a_trace_of_its_stem_needs_a_hint(tmp_path):
    path = bare(tmp_path / "bare.pth", build_model("mobilenet_v2", "imagenet"))
    assert load_model(path).spec["stem"] == "cifar"
    assert load_model(path, stem="imagenet").spec["stem"] == "imagenet"


def test_a_wide_resnet_has_no_imagenet_stem():
    with pytest.raises(UserError, match="wrn_16_1 is made for 32x32 pictures"):
        build_model("wrn_16_1", "imagenet")


def test_an_ensemble_says_the_mean_of_its_members():
    members = [build_model("wrn_16_1").eval(), build_model("shufflenet_v2_x1_0").eval()]
    images = torch.randn(3, 3, 32, 32)
    one, two = (member(images) for member in members)
    torch.testing.assert_close(Ensemble(members)(images), (one + two) / 2)
    in_bf16 = Ensemble(members)
    cast_once(in_bf16, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_bf16(images).dtype == torch.float32


def test_a_checkpoint_that_lies_about_itself_is_refused(tmp_path):
    checkpoint = to_checkpoint(build_model(stem="cifar"), CLASSES)
    for key, lie in (("stem", "imagenet"), ("arch", ["resnet18"]), ("num_classes", 10**9)):
        torch.save({**checkpoint, key: lie}, tmp_path / "model.pth")
        with pytest.raises(UserError, match=f"says that its {key} is .*, but it is"):
            load_model(tmp_path / "model.pth")
    checkpoint["model"]["layer1.0.conv1.weight"] = torch.zeros(64, 64, 5, 5)
    torch.save(checkpoint, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"conv1.weight: expected \(64, 64, 3, 3\), found"):
        load_model(tmp_path / "model.pth")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(UserError, match="there is no weight file"):
        load_model(path)
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 neither"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a weight file, or not a safe one"):
            load_model(path)
    for state in ([1, 2], {"model": "weights"}, {"epoch": 3}, torch.zeros(3), {0: torch.zeros(3)}):
        torch.save(state, path)
        with pytest.raises(UserError, match="holds no network"):
            load_model(path)


class Malice:
    def __reduce__(self):
        return exec, ("open('ran.txt', 'w').close()",)


def test_a_pickle_that_would_run_code_does_not_run(workdir):
    (workdir / "model.pth").write_bytes(pickle.dumps(Malice(), protocol=2))
    torch.save({"model": Malice()}, workdir / "model.pt")
    for name in ("model.pth", "model.pt"):
        with pytest.raises(UserError, match="not a weight file, or not a safe one"):
            load_model(name)
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
    assert "torchvision" not in init_from(model, "imagenet")
    assert torch.equal(model.conv1.weight, weights["conv1.weight"])


def test_imagenet_weights_that_cannot_be_had_name_the_other_starts(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded.*--init random.*--init PATH"):
        init_from(build_model(), "imagenet")


def test_a_start_that_does_not_fit_is_refused(tmp_path):
    path = str(bare(tmp_path / "body.pth", build_model(stem="cifar")))
    with pytest.raises(UserError, match=r"expected \(64, 3, 7, 7\), found \(64, 3, 3, 3\)"):
        init_from(build_model(stem="imagenet"), path)
    with pytest.raises(UserError, match="expected nothing, found"):
        init_from(build_model(stem="imagenet"), str(bare(tmp_path / "big.pth", resnet34())))


def test_vgg_for_cifar_takes_torchvisions_convolutions(tmp_path):
    source, model = vgg11_bn(num_classes=7, init_weights=False), build_model("vgg11_bn")
    said = init_from(model, str(bare(tmp_path / "body.pth", source)))
    assert said.endswith("new: classifier.weight, classifier.bias")
    assert torch.equal(model.features[0].weight, source.features[0].weight)


def test_torchvision_has_no_wide_resnet_for_cifar():
    with pytest.raises(UserError, match="no ImageNet weights of wrn_16_1"):
        init_from(build_model("wrn_16_1"), "imagenet")


def test_a_random_start_takes_nothing():
    model = build_model()
    before = model.conv1.weight.clone()
    assert init_from(model, "random") == "random weights"
    assert torch.equal(model.conv1.weight, before)
