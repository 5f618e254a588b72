"""The layouts of image folders, each made of empty files: an index opens no image."""

import os
from pathlib import Path

import pytest
from torchvision.models import ResNet18_Weights

from experiment.errors import UserError
from imagenet.index import (
    check_same_classes,
    list_images,
    names_as_in_torchvision,
    read_classes,
)

WORDNET_IDS = [f"n{1440764 + 1000 * i:08d}" for i in range(20)]
WORDS = [f"kind_{chr(97 + i)}" for i in range(20)]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def refuses(match: str):
    return pytest.raises(UserError, match=match)


# ---------------------------------------------------------------------------------------- layouts


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
    assert len(files) == 12
    for name, label in zip(files.names, files.labels.tolist(), strict=True):
        assert name.decode().startswith(f"class_{label}_")


def test_a_label_file_of_windows_or_of_the_devkit(tmp_path):
    """It begins with a mark of its encoding; the id ends with a tab."""
    (tmp_path / "a.txt").write_text("tench\ngoldfish\n", encoding="utf-8-sig")
    assert read_classes(tmp_path / "a.txt", 2) == ("tench", "goldfish")
    (tmp_path / "b.txt").write_text("n01440764\ttench\nn01443537\tgoldfish\n")
    assert read_classes(tmp_path / "b.txt", 2) == ("n01440764", "n01443537")


def test_any_name_of_a_class_folder_stays_as_it_is(tmp_path):
    names = ["drake, male", "line\nbreak", '"quoted"', "naïve"]
    files = list_images(touch(tmp_path, *(f"{name}/a, b.jpg" for name in names)), 4)
    assert files.classes == tuple(sorted(names))
    assert all(os.path.isfile(files.path(i)) for i in range(4))


def test_a_part_of_the_classes_needs_the_list_of_all(tmp_path):
    folder = touch(tmp_path, f"{WORDNET_IDS[3]}/a.JPEG", f"{WORDNET_IDS[17]}/a.JPEG")
    with refuses("holds 2 class folders and not 20: --num_classes names another .* --label_file"):
        list_images(folder, 20)
    files = list_images(folder, 20, tuple(WORDNET_IDS))
    assert files.labels.tolist() == [3, 17]
    assert files.classes == tuple(WORDNET_IDS)


def test_spread_takes_some_of_every_class(tmp_path):
    names = [f"{i:03d}/{k}.jpg" for i in range(20) for k in range(5)]
    files = list_images(touch(tmp_path, *names), 20)
    assert files.spread(20).labels.tolist() == list(range(20))
    assert len(files.spread(None)) == 100
    assert len(set(files.spread(1000).names.tolist())) == 100


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["000_tench/a.jpg", "readme.txt"], "files beside folders, .* readme.txt beside 000_tench"),
        (["000_tench/a.jpg", "000_tench/b.gif"], "b.gif: not a .jpg, .jpeg or .png file"),
        (["000_tench/a.jpg", "000_tench/more/b.jpg"], "more: a folder where there should be"),
        (["000_tench/a.jpg", "tench/a.jpg"], "tench is not named <id> or <id>_<words>"),
        (["000_tench/a.jpg", "020_cock/a.jpg"], "020_cock is .* with an id below 20"),
        (["000_tench/a.jpg", "0_tench/a.jpg"], "two of its folders have the same number"),
        (["000_tench/a.jpg", "001_cock/.hidden"], "the class folder .*001_cock is empty"),
        (["class_0_seed_0_num_0.png", "class_20_seed_0_num_0.png"], "class_20_.* an id below 20"),
        (["class_0_seed_0_num_0.png", "class_0_seed_0.png"], "class_0_seed_0.png is .* not named"),
        (["ILSVRC2012_val_00000001.JPEG"], "00000001.JPEG is in no class folder, and not named"),
        (["imagenet1k/000_tench/a.jpg"], "holds 1 class folders and not 20"),
        ([".DS_Store"], "there are no images in"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, names, message):
    with refuses(message):
        list_images(touch(tmp_path, *names), 20)


@pytest.mark.parametrize("place", ["000_tench/b.jpg", "class_0_seed_0_num_1.png"])
def test_a_fifo_among_the_images_is_refused_without_waiting_for_it(tmp_path, place):
    touch(tmp_path, place.replace("b", "a").replace("num_1", "num_0"))
    os.mkfifo(tmp_path / place)
    with refuses(f"{place}: not a regular file"):
        list_images(tmp_path, 20)


def test_a_link_to_an_image_is_one_and_a_broken_link_is_not(tmp_path):
    touch(tmp_path, "elsewhere.jpg", "set/0/a.jpg")
    (tmp_path / "set" / "0" / "b.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    assert len(list_images(tmp_path / "set", 20)) == 2
    (tmp_path / "elsewhere.jpg").unlink()
    with refuses("b.jpg: not a regular file"):
        list_images(tmp_path / "set", 20)


def test_no_folder(tmp_path):
    with refuses("there is no folder"):
        list_images(tmp_path / "nothing", 20)


# ------------------------------------------------------------------------------- names of classes


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


def test_two_classes_of_the_same_words_need_numbers(tmp_path):
    """The label files in use have 'crane' twice, the bird and the machine."""
    (tmp_path / "labels.txt").write_text("{0: 'crane', 1: 'tench', 2: 'crane'}")
    classes = read_classes(tmp_path / "labels.txt", 3)
    numbered = touch(tmp_path / "numbered", "0_crane/a.jpg", "2_crane/a.jpg")
    assert list_images(numbered, 3, classes).labels.tolist() == [0, 2]
    with refuses("crane is more than one of the 3 classes"):
        list_images(touch(tmp_path / "words", "crane/a.jpg"), 3, classes)


def test_a_folder_that_is_no_class_of_the_list_is_named(tmp_path):
    with refuses("cock is none of the 2 classes"):
        list_images(touch(tmp_path, "tench/a.jpg", "cock/a.jpg"), 2, ("tench", "shark"))


def test_a_synset_mapping_gives_wordnet_ids(tmp_path):
    lines = [f"{id} kind of fish, Piscis {i}" for i, id in enumerate(WORDNET_IDS)]
    path = tmp_path / "LOC_synset_mapping.txt"
    path.write_text("\n".join(lines) + "\n")
    classes = read_classes(path, 20)
    assert classes == tuple(WORDNET_IDS)
    numbered = touch(tmp_path / "numbered", "003_kind_d/a.jpg")  # words, which ids say nothing of
    assert list_images(numbered, 20, classes).labels.tolist() == [3]
    for wrong in ([lines[1], lines[0], *lines[2:]], [lines[0], *lines[:-1]]):
        path.write_text("\n".join(wrong))
        with refuses("its WordNet ids are not sorted, or one comes twice"):
            read_classes(path, 20)


@pytest.mark.parametrize(
    "text", ["{0: 'a', 2: 'b'}", "{0: open('x')}", "{", "[" * 5000, "a\nb\nc", "", "{1: 'a'}"]
)
def test_a_bad_label_file_is_named(tmp_path, text):
    (tmp_path / "labels.txt").write_text(text)
    with refuses("labels.txt"):
        read_classes(tmp_path / "labels.txt", 2)


def test_sets_have_to_number_the_same_classes(tmp_path):
    by_id = list_images(touch(tmp_path / "a", *(f"{id}/a.jpg" for id in WORDNET_IDS)), 20)
    others = [*WORDNET_IDS[:-1], "n99999999"]
    by_other_id = list_images(touch(tmp_path / "b", *(f"{id}/a.jpg" for id in others)), 20)
    words = (f"{i}_{word}/a.jpg" for i, word in enumerate(WORDS))
    by_words = list_images(touch(tmp_path / "c", *words), 20)
    check_same_classes(by_id, by_id)
    check_same_classes(by_id, by_words)
    with refuses("class 19 is n01459764 in .*a, and n99999999 in .*b"):
        check_same_classes(by_id, by_other_id)


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
