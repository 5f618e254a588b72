import os
import sys
from types import ModuleType

import numpy as np
import pytest
from torchvision.models import ResNet18_Weights

from experiment import UserError
from listings import (
    check_same_classes,
    list_images,
    list_validation,
    names_as_in_torchvision,
    read_classes,
)

WORDNET_IDS = [f"n{1440764 + 1000 * i:08d}" for i in range(20)]  # sorted, as any such list is
WORDS = [f"kind_{chr(97 + i)}" for i in range(20)]


def touch(folder, *names):
    """Empty files: a listing opens none."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def refuses(match: str):
    return pytest.raises(UserError, match=match)


# ---------------------------------------------------------------------------------- class folders


def test_wordnet_ids_are_classes_in_sorted_order(tmp_path):
    names = [f"{id}/{id}_{k}.JPEG" for id in reversed(WORDNET_IDS) for k in (7, 12)]
    files = list_images(touch(tmp_path, *names, ".DS_Store", f"{WORDNET_IDS[0]}/.hidden"), 20)
    assert files.classes == tuple(WORDNET_IDS)
    assert files.labels.tolist() == [i for i in range(20) for _ in range(2)]
    assert files.path(0) == str(tmp_path / WORDNET_IDS[0] / f"{WORDNET_IDS[0]}_12.JPEG")
    assert len(files) == 40


def test_stable_imagenet_folders_are_classes_by_number(tmp_path):
    names = [f"{i:03d}_{WORDS[i]}/{k:03d}_{9 * i}.jpg" for i in range(20) for k in range(2)]
    files = list_images(touch(tmp_path, *names), 20)
    assert files.classes == tuple(WORDS)
    assert files.labels.tolist() == [i for i in range(20) for _ in range(2)]


def test_plain_numbers_are_counted_as_numbers(tmp_path):
    files = list_images(touch(tmp_path, *(f"{i}/a.png" for i in range(20))), 20)
    assert [os.path.dirname(name).decode() for name in files.names][:4] == ["0", "1", "10", "11"]
    assert files.labels.tolist()[:4] == [0, 1, 10, 11]


def test_dmkd_files_are_classes_by_number(tmp_path):
    names = [f"class_{i}_seed_{s}_num_{k}.png" for i in (0, 3, 19) for s in (0, 1) for k in (0, 9)]
    files = list_images(touch(tmp_path, *names), 20)
    assert sorted(set(files.labels.tolist())) == [0, 3, 19]
    for name, label in zip(files.names, files.labels.tolist(), strict=True):
        assert name.decode().startswith(f"class_{label}_")


def test_a_part_of_the_classes_takes_the_list_of_all(tmp_path):
    folder = touch(tmp_path, f"{WORDNET_IDS[3]}/a.JPEG", f"{WORDNET_IDS[17]}/a.JPEG")
    with refuses("holds 2 class folders and not 20: a part of the classes needs a label file"):
        list_images(folder, 20)
    files = list_images(folder, 20, tuple(WORDNET_IDS))
    assert files.labels.tolist() == [3, 17]
    assert files.classes == tuple(WORDNET_IDS)


def test_spread_takes_some_of_every_class(tmp_path):
    names = [f"{i:03d}/{k}.jpg" for i in range(20) for k in range(5)]
    files = list_images(touch(tmp_path, *names), 20)
    assert files.spread(20).labels.tolist() == list(range(20))
    assert len(files.spread(None)) == len(files.spread(1000)) == 100
    assert len(set(files.spread(1000).names.tolist())) == 100
    assert isinstance(files.names, np.ndarray)
    assert files.names.dtype.kind == "S"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["000_tench/a.jpg", "readme.txt"], "000_tench: a folder where there should be images"),
        (["000_tench/a.jpg", "000_tench/b.gif"], "b.gif: not a .jpg, .jpeg or .png file"),
        (["000_tench/a.jpg", "000_tench/more/b.jpg"], "more: a folder where there should be"),
        (["000_tench/a.jpg", "tench/a.jpg"], "tench: its name is not <id> or <id>_<words>"),
        (["000_tench/a.jpg", "020_cock/a.jpg"], "020_cock: .* with an id below 20"),
        (["000_tench/a.jpg", "0_tench/a.jpg"], "two of its folders have the same number"),
        (["class_0_seed_0_num_0.png", "class_20_seed_0_num_0.png"], "class_20_.* an id below 20"),
        (["class_0_seed_0_num_0.png", "class_0_seed_0.png"], "class_0_seed_0.png: its name is not"),
        (["imagenet1k/000_tench/a.jpg"], "holds 1 class folders and not 20"),
        ([".DS_Store"], "there are no images in"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, names, message):
    with refuses(message):
        list_images(touch(tmp_path, *names), 20)


def test_no_folder(tmp_path):
    with refuses("there is no folder"):
        list_images(tmp_path / "nothing", 20)


# ------------------------------------------------------------------------------------ label files


@pytest.mark.parametrize("style", ["dict", "lines"])
def test_the_label_file_checks_numbered_folders(tmp_path, style):
    text = repr(dict(enumerate(WORDS))) if style == "dict" else "\n".join(WORDS) + "\n"
    (tmp_path / "labels.txt").write_text(text)
    classes = read_classes(tmp_path / "labels.txt", 20)
    assert classes == tuple(WORDS)
    folder = touch(tmp_path / "images", "003_Kind D/a.jpg", "004_kind_e/a.jpg")
    assert list_images(folder, 20, classes).labels.tolist() == [3, 4]
    touch(folder, "005_kind_b/a.jpg")
    with refuses("class 5 is kind_b, but kind_f in the list"):
        list_images(folder, 20, classes)


def test_a_synset_mapping_gives_wordnet_ids(tmp_path):
    lines = [f"{id} kind of fish, Piscis {i}" for i, id in enumerate(WORDNET_IDS)]
    path = tmp_path / "LOC_synset_mapping.txt"
    path.write_text("\n".join(lines) + "\n")
    assert read_classes(path, 20) == tuple(WORDNET_IDS)
    path.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    with refuses("its WordNet ids are not sorted"):
        read_classes(path, 20)


@pytest.mark.parametrize(
    "text", ["{0: 'a', 2: 'b'}", "{0: open('x')}", "{", "[" * 5000, "a\na", "", "{1: 'a'}"]
)
def test_a_bad_label_file_is_named(tmp_path, text):
    (tmp_path / "labels.txt").write_text(text)
    with refuses("labels.txt"):
        read_classes(tmp_path / "labels.txt", 2)


def test_sets_have_to_number_the_same_classes(tmp_path):
    by_id = list_images(touch(tmp_path / "a", *(f"{id}/a.jpg" for id in WORDNET_IDS)), 20)
    others = [*WORDNET_IDS[:-1], "n99999999"]
    by_other_id = list_images(touch(tmp_path / "b", *(f"{id}/a.jpg" for id in others)), 20)
    by_words = list_images(
        touch(tmp_path / "c", *(f"{i}_{w}/a.jpg" for i, w in enumerate(WORDS))), 20
    )
    fewer = list_images(touch(tmp_path / "d", *(f"{id}/a.jpg" for id in WORDNET_IDS[:5])), 5)
    check_same_classes(by_id, by_id)
    check_same_classes(by_id, by_words)
    with refuses("class 19 is n01459764 in .*a, and n99999999 in .*b"):
        check_same_classes(by_id, by_other_id)
    with refuses("a has 20 classes, and .*d has 5"):
        check_same_classes(by_id, fewer)


def test_words_in_another_order_than_torchvision_s_are_refused(tmp_path):
    names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert names_as_in_torchvision(names) == 1000
    assert names_as_in_torchvision([f"{name.replace(' ', '_')}, a fish" for name in names]) == 1000
    assert names_as_in_torchvision([*map(str, range(999)), "toilet tissue"]) == 1
    for others in (map(str, range(1000)), (f"n{i:08d}" for i in range(1000)), WORDS):
        assert names_as_in_torchvision(tuple(others)) is None
    by_alphabet = sorted(name.replace(" ", "_").replace("/", "_") for name in names)
    with refuses("only . of 1000 classes have the names .* the first is .*: another order"):
        list_images(touch(tmp_path, *(f"{name}/0.jpg" for name in by_alphabet)))


# ------------------------------------------------------------------------------ the validation set

# The devkit's order is not that of the ids: number n stands for class DEVKIT[n - 1].
DEVKIT = [(7 * i + 3) % 20 for i in range(20)]
LABELS = [(3 * i + 5) % 20 for i in range(40)]


@pytest.fixture
def flat(tmp_path):
    names = [f"ILSVRC2012_val_{k:08d}.JPEG" for k in range(1, 41)]
    return touch(tmp_path / "val", *names)


@pytest.fixture
def ground_truth(tmp_path):
    path = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("".join(f"{1 + DEVKIT.index(label)}\n" for label in LABELS))
    return path


def clsloc(folder):
    lines = [f"{WORDNET_IDS[label]} {n} kit_fox\n" for n, label in enumerate(DEVKIT, start=1)]
    (folder / "map_clsloc.txt").write_text("".join(lines))


def test_the_devkit_numbers_are_not_the_classes(tmp_path, flat, ground_truth):
    clsloc(tmp_path)
    files = list_validation(flat, 20, ground_truth)
    assert files.labels.tolist() == LABELS
    assert files.classes == tuple(WORDNET_IDS)
    assert files.labels.tolist() != [int(n) - 1 for n in ground_truth.read_text().split()]


def test_the_devkit_numbers_mean_nothing_alone(flat, ground_truth):
    with refuses("mean nothing without meta.mat or map_clsloc.txt beside it"):
        list_validation(flat, 20, ground_truth)


def test_meta_mat_is_read_where_there_is_scipy(tmp_path, flat, ground_truth, monkeypatch):
    (tmp_path / "meta.mat").touch()
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with refuses("to read .*meta.mat, `pip install scipy`"):
        list_validation(flat, 20, ground_truth)
    rows = [(n, WORDNET_IDS[i], "words", "gloss", 0) for n, i in enumerate(DEVKIT, start=1)]
    inner = (21, "n00001740", "entity", "gloss", 2)  # the devkit lists what is above them, too
    module = ModuleType("scipy.io")
    module.loadmat = lambda path, squeeze_me: {"synsets": [*rows, inner]}
    monkeypatch.setitem(sys.modules, "scipy", ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", module)
    assert list_validation(flat, 20, ground_truth).labels.tolist() == LABELS


def solution(folder, labels):
    """LOC_val_solution.csv: in no order, with a box or two after the id."""
    rows = [
        f"ILSVRC2012_val_{k:08d},{WORDNET_IDS[label]} 85 1 499 272 {WORDNET_IDS[label]} 1 2 3 4 \n"
        for k, label in enumerate(labels, start=1)
    ]
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows[::-1]))
    return folder / "LOC_val_solution.csv"


def test_kaggle_s_solution_names_the_classes(tmp_path, flat):
    files = list_validation(flat, 20, solution(tmp_path, LABELS))
    assert files.labels.tolist() == LABELS
    assert files.classes == tuple(WORDNET_IDS)


def test_a_validation_set_that_is_not_whole_is_refused(tmp_path, flat, ground_truth):
    clsloc(tmp_path)
    with refuses("its labels are needed"):
        list_validation(flat, 20)
    with refuses("39 rows for 40 images"):
        list_validation(flat, 20, solution(tmp_path, LABELS[:39]))
    with refuses("has 40 images of 20 classes; .* 1000 classes are wanted"):
        list_validation(flat, 1000, ground_truth)
    ground_truth.write_text("21\n" * 40)
    with refuses("does not hold the labels of .*val: 21"):
        list_validation(flat, 20, ground_truth)
    ground_truth.write_text("fox\n" * 40)
    with refuses("does not hold the labels"):
        list_validation(flat, 20, ground_truth)
    (flat / "ILSVRC2012_val_00000007.JPEG").unlink()
    with refuses("val_00000008.JPEG is not ILSVRC2012_val_00000007.JPEG"):
        list_validation(flat, 20, ground_truth)


def test_class_folders_bring_their_labels(tmp_path):
    folder = touch(tmp_path / "val", *(f"{id}/ILSVRC2012_val_1.JPEG" for id in WORDNET_IDS))
    assert list_validation(folder, 20).labels.tolist() == list(range(20))
    with refuses("has class folders: it takes no"):
        list_validation(folder, 20, tmp_path / "LOC_val_solution.csv")
