import csv
import io
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from matplotlib.figure import Figure
from PIL import Image

import plots
from data import CLASSES as CIFAR10
from data import ImageSet
from experiment.errors import UserError
from plots import plot_run, plot_runs, read_metrics, save_predictions
from scripts import figure as readme_figure

CURVES = ("train_val_losses.png", "val_accuracy.png")
ALL = (*CURVES, "confusion.png", "mistakes.png")
HEADER = "epoch,lr,train_loss,{},test_loss,test_accuracy,seconds,images_per_second\n"
GENERATOR = "epoch,lr,train_loss,test_loss\n1,0.1,0.5,0.6\n2,0.1,0.4,0.5\n"


def made_run(folder, column="train_agreement", epochs=3):
    folder.mkdir()
    rows = [f"{e},0.05,{1 / e},{50 + e},{2 / e},{60 + e},12.5,900\n" for e in range(1, epochs + 1)]
    (folder / "metrics.csv").write_text(HEADER.format(column) + "".join(rows))
    return folder


def made_generator(folder):
    folder.mkdir()
    (folder / "metrics.csv").write_text(GENERATOR)
    return folder


def test_set(labels, classes):
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(images.repeat(1, 3, 32, 32), torch.tensor(labels), tuple(classes))


test_set.__test__ = False  # not one of the tests


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def texts(figure):
    """Every word in a figure."""
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    for axes in figure.axes:
        words += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    words += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return " | ".join(words)


@pytest.fixture
def figures(monkeypatch):
    """The figures by file name, which are not rendered: that takes most of the time."""
    saved = {}
    save = plots._save

    def keep(figure, path, *named):
        saved[path.name] = figure
        return save(figure, path, *named)

    monkeypatch.setattr(plots, "_save", keep)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: None)
    return saved


# ---------------------------------------------------------------------------------------- metrics


def test_columns_come_back_by_name(tmp_path):
    metrics = read_metrics(made_run(tmp_path / "run"))
    assert metrics["epoch"] == [1, 2, 3]
    assert metrics["test_accuracy"] == [61, 62, 63]


@pytest.mark.parametrize(
    "content",
    [
        *("", "epoch\n", "epoch,lr\n1,x\n", "a,b\n1,2\n", "epoch\n1,2\n"),
        "epoch,train_loss,test_loss,test_accuracy\n1,2,3,4\n",  # of what?
        "epoch,train_loss,test_loss,train_accuracy\n1,2,3,4\n",
    ],
)
def test_a_file_that_is_no_table_of_a_run_is_named(content, tmp_path):
    (tmp_path / "metrics.csv").write_text(content)
    for classifier in (True, False):
        with pytest.raises(UserError, match=r"metrics\.csv is not the metrics\.csv of a run"):
            read_metrics(tmp_path, classifier)
    with pytest.raises(UserError, match=r"has no metrics\.csv"):
        read_metrics(tmp_path / "nowhere")


def test_a_generator_is_no_classifier(tmp_path):
    run = made_generator(tmp_path / "run")
    assert read_metrics(run, classifier=False)["test_loss"] == [0.6, 0.5]
    with pytest.raises(UserError, match="is not the"):
        read_metrics(run)


# ----------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_students_plots_keep_the_two_losses_apart(epochs, tmp_path, figures):
    run = made_run(tmp_path / "run", epochs=epochs)
    (run / "config.json").write_text('{"teacher_accuracy": 82.25}')
    assert plot_run(run) == [run / name for name in CURVES]
    losses, accuracy = (texts(figures[name]) for name in CURVES)
    assert len(figures["train_val_losses.png"].axes) == 2
    assert "Training: KD loss" in losses
    assert "T² · KL(teacher ‖ student)" in losses
    assert "Test: cross-entropy on real images" in losses
    assert f"last {60 + epochs}.00 %, best {60 + epochs}.00 % (epoch {epochs})" in accuracy
    assert "teacher on the real test set: 82.25 %" in accuracy
    assert "agreement with the teacher" in accuracy


def test_a_teachers_plots_speak_of_real_images(tmp_path, figures):
    plot_run(made_run(tmp_path / "run", "train_accuracy"))
    assert "cross-entropy on real images" in texts(figures["train_val_losses.png"])
    assert "accuracy on the real training images" in texts(figures["val_accuracy.png"])
    assert "KL" not in texts(figures["train_val_losses.png"])


def test_a_generator_has_losses_alone(tmp_path, figures):
    run = made_generator(tmp_path / "generator")
    assert plot_run(run) == [run / "train_val_losses.png"]
    assert sorted(path.name for path in run.iterdir()) == ["metrics.csv", "train_val_losses.png"]
    assert "cross-entropy" not in texts(figures["train_val_losses.png"])

    plot_runs([run, made_run(tmp_path / "student")], tmp_path / "both")
    panels = {axes.get_title(): len(axes.lines) for axes in figures["train_val_losses.png"].axes}
    assert panels == {
        "Training: KD loss": 1,
        "Training: diffusion loss": 1,
        "Test: cross-entropy on real images": 1,
        "Test: diffusion loss on real images": 1,
    }
    (legend,) = figures["val_accuracy.png"].legends
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == [
        str(tmp_path / "student")
    ]


def test_a_teacher_and_a_student_share_no_axis_of_training_losses(tmp_path, figures):
    runs = [made_run(tmp_path / "student"), made_run(tmp_path / "teacher", "train_accuracy")]
    plot_runs(runs, tmp_path / "both")
    kd, cross_entropy, test = figures["train_val_losses.png"].axes
    assert [len(axes.lines) for axes in (kd, cross_entropy, test)] == [1, 1, 2]
    assert "KD loss" in kd.get_title()
    assert "cross-entropy on real" in cross_entropy.get_title()
    assert kd.lines[0].get_color() != cross_entropy.lines[0].get_color()
    assert {line.get_color() for line in test.lines} == {"C0", "C1"}
    assert {line.get_color() for line in figures["val_accuracy.png"].axes[0].lines} == {"C0", "C1"}
    for name in CURVES:
        assert str(runs[0]) in texts(figures[name])
        assert str(runs[1]) in texts(figures[name])


def test_odd_names_stand_in_the_legend_as_they_are(workdir, monkeypatch):
    drawn = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda f, *rest: (drawn.append(f), save(f, *rest))[1])
    monkeypatch.setitem(plots.matplotlib.rcParams, "text.usetex", True)  # as somebody may have it
    names = [r"$\bad$", "_hidden", "a\nb", os.fsdecode(b"no\xffutf"), "run 日本"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_runs([made_run(workdir / name).relative_to(workdir) for name in names], "all")
    shown = [r"$\bad$", "./_hidden", r"a\nb", r"no\udcffutf", "run 日本"]
    for figure in drawn:
        (legend,) = figure.legends
        assert [text.get_text().split(": last")[0] for text in legend.get_texts()] == shown


def test_many_runs_leave_room_for_the_curves(tmp_path, figures):
    plot_runs([made_run(tmp_path / f"run-{i}") for i in range(20)], tmp_path / "all")
    figure = figures["train_val_losses.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of axes that collapsed
        figure.draw_without_rendering()
    assert figure.axes[0].get_position().height * figure.get_figheight() > 2  # inches


# ------------------------------------------------------------------------------------ predictions


CLASSES = ("air, plane", 'a "car"', "two\nlines", "$x_1$", "nothing")
LABELS = [0, 0, 1, 1, 2, 3]
LOGITS = torch.tensor([[9.0, 0, 0, 0, 0], [0, 5, 0, 0, 0], [0, 1, 0, 0, 0]]).repeat(2, 1)
TEACHER = torch.eye(5)[[0, 0, 1, 2, 1, 1]]


@pytest.fixture
def student(tmp_path):
    """A run with predictions: right, wrong, right, wrong, wrong, wrong."""
    run = made_run(tmp_path / "student")
    save_predictions(run, test_set(LABELS, CLASSES), LOGITS, TEACHER)
    return run


def test_predictions_come_back(student):
    rows = rows_of(student / "predictions.csv")
    assert list(rows[0]) == ["index", "label", "prediction", "probability", "teacher_prediction"]
    assert [int(row["index"]) for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [int(row["label"]) for row in rows] == LABELS
    assert [int(row["prediction"]) for row in rows] == [0, 1, 1, 0, 1, 1]
    assert [int(row["teacher_prediction"]) for row in rows] == [0, 0, 1, 2, 1, 1]
    expected = [np.exp(x) / (np.exp(x) + 4) for x in (9, 5, 1, 9, 5, 1)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected)


def test_the_table_of_classes_quotes_their_names(student):
    rows = rows_of(student / "per_class.csv")
    assert [row["class"] for row in rows] == list(CLASSES)
    assert [float(row["test_accuracy"]) for row in rows[:4]] == [50, 50, 0, 0]
    assert [float(row["teacher_agreement"]) for row in rows[:4]] == [50, 50, 100, 100]
    right, wrong = np.log(1 + 4 * np.exp(-9)), np.log(np.exp(5) + 4)
    assert float(rows[0]["test_loss"]) == pytest.approx((right + wrong) / 2, rel=1e-5)
    assert rows[4]["test_accuracy"] == "nan"  # the class has no test image


def test_mistakes_are_in_order_and_hold_no_pickles(student):
    with np.load(student / "mistakes.npz", allow_pickle=False) as file:
        mistakes = dict(file)
    assert mistakes["index"].tolist() == [3, 1, 4, 5]
    assert mistakes["label"].tolist() == [1, 0, 2, 3]
    assert mistakes["prediction"].tolist() == [0, 1, 1, 1]
    assert mistakes["teacher_prediction"].tolist() == [2, 0, 1, 1]
    assert mistakes["images"].dtype == np.uint8
    assert mistakes["images"].shape == (4, 32, 32, 3)
    assert mistakes["images"][:, 0, 0, 0].tolist() == [3, 1, 4, 5]


def test_a_teacher_has_no_columns_of_a_teacher_and_at_most_thirty_mistakes(tmp_path):
    save_predictions(tmp_path, test_set([1] * 40, "ab"), torch.eye(2)[[0] * 40])
    assert list(rows_of(tmp_path / "predictions.csv")[0])[-1] == "probability"
    assert list(rows_of(tmp_path / "per_class.csv")[0]) == ["class", "test_accuracy", "test_loss"]
    with np.load(tmp_path / "mistakes.npz", allow_pickle=False) as file:
        assert file["index"].tolist() == list(range(30))
        assert "teacher_prediction" not in file
    assert {path.name for path in tmp_path.iterdir()} == {
        *("predictions.csv", "per_class.csv", "mistakes.npz")
    }


@pytest.mark.slow
def test_all_pictures_are_drawn_and_every_time_the_same(student, tmp_path):
    assert plot_run(student) == [student / name for name in ALL]
    plot_run(student, tmp_path / "again")
    sizes = [(1200, 480), (960, 540), (618, 558), (1152, 1452)]
    for name, size in zip(ALL, sizes, strict=True):
        with Image.open(student / name) as picture:
            picture.load()
            assert (picture.format, picture.size) == ("PNG", size)
            assert picture.text["Source"] == "drawn by plots.py"
        assert (student / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert not list(student.glob("*.tmp"))


def test_the_confusion_matrix_has_counts_and_percent(student, figures):
    plot_run(student)
    (axes,) = figures["confusion.png"].axes
    cells = {text.get_position(): text.get_text() for text in axes.texts}  # (column, row)
    assert len(cells) == 25
    assert cells[0, 0] == cells[1, 0] == "1\n50.0 %"
    assert cells[1, 3] == "1\n100.0 %"
    assert cells[4, 4] == "0\n0.0 %"
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["air, plane", 'a "car"', r"two\nlines", "$x_1$", "nothing"]
    assert not axes.get_yticklabels()[3].get_parse_math()
    assert axes.get_title() == "Accuracy on 6 test images: 33.33 %"


def test_more_than_twenty_classes_have_no_numbers(tmp_path, figures):
    run = made_run(tmp_path / "run")
    classes = [f"kind {i}" for i in range(21)]
    save_predictions(run, test_set([*range(21)], classes), torch.eye(21).roll(1, 0))
    plot_run(run)
    axes = figures["confusion.png"].axes[0]
    assert not axes.texts
    assert axes.images[0].get_array()[1, 0] == 100  # the image of class 1, taken for class 0
    assert axes.images[0].get_array().sum() == 21 * 100
    assert [label.get_text() for label in axes.get_xticklabels()] == classes


def test_mistakes_are_named(student, figures):
    plot_run(student)
    (axes,) = figures["mistakes.png"].axes
    assert [text.get_text() for text in axes.texts] == [
        'a "car" → air, plane\n100.0 %\nteacher: two\\nlines',
        'air, plane → a "car"\n97.4 %\nteacher: air, plane',
        'two\\nlines → a "car"\n97.4 %\nteacher: a "car"',
        '$x_1$ → a "car"\n40.5 %\nteacher: a "car"',
    ]
    assert [image.get_array()[0, 0, 0] for image in axes.images] == [3, 1, 4, 5]


def test_a_network_without_mistakes_has_an_empty_picture(tmp_path, figures):
    run = made_run(tmp_path / "run", "train_accuracy")
    save_predictions(run, test_set([0, 1], "ab"), torch.eye(2))
    plot_run(run)
    assert not figures["mistakes.png"].axes[0].images


def archive(dtype: type = int, **arrays: list) -> bytes:
    """An .npz; one of the dtype `object` can run code when it is read."""
    file = io.BytesIO()
    np.savez(file, **{name: np.array(values, dtype) for name, values in arrays.items()})
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("predictions.csv", b""),
        ("predictions.csv", b"label,prediction\n0,5\n"),
        ("predictions.csv", b"label,prediction\n0,-1\n"),
        ("predictions.csv", b"label,prediction\n0,cat\n"),
        ("per_class.csv", b"name\ncat\n"),
        ("mistakes.npz", b"not an archive"),
        ("mistakes.npz", b"PK\x03\x04"),
        ("mistakes.npz", archive(images=[0] * 99)[:50] + archive(images=[0] * 99)[51:]),
        ("mistakes.npz", archive(object, images=[], label=[], prediction=[])),
    ],
)
def test_damaged_tables_are_named(name, content, student, figures):
    (student / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is not the {name} of a run"):
        plot_run(student)


# ------------------------------------------------------------------------------------ the command


def test_the_backend_of_a_notebook_is_not_needed():
    """Its kernel names one in the environment, which a virtual environment may lack."""
    environment = {**os.environ, "MPLBACKEND": "module://missing_inline.backend"}
    command = [sys.executable, "-c", "import plots"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = ("", "benchmarks", "experiment", "imagenet", "networks", "scripts", "synthetic_data")
    paths = [path for folder in folders for path in (REPOSITORY / folder).glob("*.py")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
    imports = [name for name, text in texts.items() if re.search("(import|from) matplotlib", text)]
    assert imports == ["plots.py"]  # which others may not import too late


def test_the_command_redraws_or_overlays(student, workdir, capsys, figures):
    made_run(workdir / "one")
    for argv in ("one", "one student", "student --output elsewhere"):
        plots.main(plots.parse_args(argv.split()))
    assert capsys.readouterr().out.split() == [
        *(f"one/{name}" for name in CURVES),
        *(f"comparison/{name}" for name in CURVES),
        *(f"elsewhere/{name}" for name in ALL),
    ]
    assert all((workdir / "elsewhere" / name).exists() for name in ALL)
    assert not (student / "confusion.png").exists()


def test_a_run_without_an_epoch_is_left_out_of_a_comparison(student, workdir, capsys, figures):
    failed = workdir / "failed"
    failed.mkdir()
    (failed / "config.json").touch()
    made_run(workdir / "one")
    plots.main(plots.parse_args(["one", "failed", "student"]))
    assert "note: failed has no finished epoch: left out" in capsys.readouterr().out
    for argv in (["failed"], ["failed", "failed"], ["one", "nowhere"]):
        with pytest.raises(UserError, match="not a run with a finished epoch"):
            plots.main(plots.parse_args([*argv, "--output", "elsewhere"]))


def test_a_picture_of_others_is_not_replaced(student, workdir, figures):
    args = plots.parse_args(["student", "--output", "others"])
    picture = workdir / "others" / "mistakes.png"
    picture.parent.mkdir()
    Image.new("RGB", (9, 9)).save(picture)
    foreign = picture.read_bytes()
    with pytest.raises(UserError, match=r"others/mistakes\.png is not drawn by plots\.py"):
        plots.main(args)
    assert [path.read_bytes() for path in picture.parent.iterdir()] == [foreign]

    plots.main(plots.parse_args(["student", "student", "--output", "others"]))  # draws no mistakes
    assert picture.read_bytes() == foreign
    for path in picture.parent.iterdir():
        path.write_bytes(foreign + b"drawn by plots.py")
    plots.main(args)
    assert foreign not in picture.read_bytes()


def test_in_the_folder_of_a_run_any_picture_is_replaced(student, workdir, figures):
    (student / "mistakes.png").write_bytes(b"another")
    plots.main(plots.parse_args(["student", "--output", str(student)]))
    assert (student / "mistakes.png").read_bytes() != b"another"


@pytest.mark.parametrize("name", ["metrics.csv", "per_class.csv", "mistakes.npz"])
def test_a_fifo_among_the_tables_is_named_and_never_waited_for(name, student):
    (student / name).unlink()
    os.mkfifo(student / name)
    with pytest.raises(UserError, match=name):
        plot_run(student)


def test_a_fifo_elsewhere_is_not_waited_for_either(student, workdir, figures):
    (student / "config.json").unlink(missing_ok=True)
    os.mkfifo(student / "config.json")
    plot_run(student)
    (workdir / "others").mkdir()
    os.mkfifo(workdir / "others" / "mistakes.png")
    with pytest.raises(UserError, match=r"others/mistakes\.png is not a regular file"):
        plots.main(plots.parse_args(["student", "--output", "others"]))


def test_an_output_that_is_a_file_is_refused(student, workdir):
    (workdir / "comparison").write_text("mine")
    for argv in (["student", "--output", "comparison"], ["student", "student"]):
        with pytest.raises(UserError, match="comparison is a file: the pictures need a folder"):
            plots.main(plots.parse_args(argv))
    assert (workdir / "comparison").read_text() == "mine"


def test_a_path_that_no_terminal_can_show_is_printed_with_escapes(workdir, capsys, figures):
    made_run(workdir / os.fsdecode(b"no\xffutf"))
    plots.main(plots.parse_args([os.fsdecode(b"no\xffutf")]))
    assert capsys.readouterr().out.splitlines()[0] == rf"no\udcffutf/{CURVES[0]}"


# ----------------------------------------------------------------------------- the README's figure


def test_the_readmes_figure_shows_the_first_images(tmp_path, monkeypatch, capsys):
    first = test_set([*range(10)] * 5, CIFAR10)
    monkeypatch.setattr(readme_figure, "load_cifar10", lambda folder, train: first)
    monkeypatch.setattr(readme_figure, "load_cifake", lambda folder, limit: first)
    runs = [made_run(tmp_path / "teacher", "train_accuracy"), made_run(tmp_path / "student")]
    for run in runs:
        save_predictions(run, first, torch.eye(10).repeat(5, 1))
    path = tmp_path / "docs" / "figure.png"
    argv = [*map(str, runs), "--output", str(path)]
    readme_figure.main(readme_figure.parse_args(argv))
    assert capsys.readouterr().out == f"{path}\n"
    with Image.open(path) as picture:
        assert (picture.format, picture.width) == ("PNG", 1800)
        x, y = readme_figure.LEFT + readme_figure.MARGIN, readme_figure.REAL
        size = readme_figure.SIZE + readme_figure.GAP
        corners = [(x, y), (x + size, y), (x, y + size), (x + size, y + size)]
        # the first four of class 0 are the images 0, 10, 20 and 30, which are as bright
        assert [picture.getpixel(corner)[0] for corner in corners] == [0, 10, 20, 30]


def test_the_readmes_figure_refuses_other_runs(student):
    with pytest.raises(UserError, match=r"per_class\.csv is not the .* of a run on CIFAR-10"):
        readme_figure.read_run(student)
    (student / "per_class.csv").unlink()
    with pytest.raises(UserError, match=r"has no per_class\.csv"):
        readme_figure.read_run(student)
