import pytest
from PIL import Image

import plots
from experiment import UserError
from plots import plot_runs, read_metrics

HEADER = "epoch,lr,train_loss,{},test_loss,test_accuracy,seconds,images_per_second\n"


def made_run(folder, column="train_agreement", epochs=3):
    folder.mkdir()
    rows = [f"{e},0.05,{1 / e},{50 + e},{2 / e},{60 + e},12.5,900\n" for e in range(1, epochs + 1)]
    (folder / "metrics.csv").write_text(HEADER.format(column) + "".join(rows))
    return folder


def texts(figure):
    """Every word in a figure."""
    words = []
    for axes in figure.axes:
        words += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    words += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return " | ".join(words)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, by file name."""
    saved = {}
    save = plots._save
    monkeypatch.setattr(
        plots,
        "_save",
        lambda figure, axes, path: (saved.update({path.name: figure}), save(figure, axes, path)),
    )
    return saved


def test_columns_come_back_by_name(tmp_path):
    metrics = read_metrics(made_run(tmp_path / "run"))
    assert metrics["epoch"] == [1, 2, 3]
    assert metrics["test_accuracy"] == [61, 62, 63]


@pytest.mark.parametrize(
    "content", ["", "epoch\n", "epoch,lr\n1,x\n", "a,b\n1,2\n", "epoch\n1,2\n"]
)
def test_a_file_that_is_no_table_of_a_run_is_named(content, tmp_path):
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.csv is not the metrics\.csv of a run"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"has no metrics\.csv"):
        read_metrics(tmp_path / "nowhere")


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_students_plots_keep_the_two_losses_apart(epochs, tmp_path, figures):
    run = made_run(tmp_path / "run", epochs=epochs)
    (run / "config.json").write_text('{"teacher_accuracy": 82.25}')
    plots.plot_run(run)
    losses, accuracy = texts(figures["train_val_losses.png"]), texts(figures["val_accuracy.png"])
    assert len(figures["train_val_losses.png"].axes) == 2
    assert "Training: KD loss" in losses
    assert "T² · KL(teacher ‖ student)" in losses
    assert "Test: cross-entropy on real images" in losses
    assert f"last {60 + epochs}.00 %, best {60 + epochs}.00 % (epoch {epochs})" in accuracy
    assert "teacher on the real test set: 82.25 %" in accuracy
    assert "agreement with the teacher" in accuracy
    for name in ("train_val_losses.png", "val_accuracy.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 400
    assert not list(run.glob("*.tmp"))


def test_a_teachers_plots_speak_of_real_images(tmp_path, figures):
    plots.plot_run(made_run(tmp_path / "run", "train_accuracy"))
    assert "cross-entropy on real images" in texts(figures["train_val_losses.png"])
    assert "accuracy on the real training images" in texts(figures["val_accuracy.png"])
    assert "KL" not in texts(figures["train_val_losses.png"])


def test_several_runs_are_overlaid_under_their_names(tmp_path, figures):
    runs = [made_run(tmp_path / "one"), made_run(tmp_path / "two", epochs=5)]
    plot_runs(runs, tmp_path / "both")
    for name in ("train_val_losses.png", "val_accuracy.png"):
        assert (tmp_path / "both" / name).exists()
        assert str(runs[0]) in texts(figures[name])
        assert str(runs[1]) in texts(figures[name])


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


def test_the_command_redraws_or_overlays(workdir, capsys):
    made_run(workdir / "one")
    made_run(workdir / "two", "train_accuracy")
    plots.main(plots.parse_args(["one"]))
    plots.main(plots.parse_args(["one", "two"]))
    plots.main(plots.parse_args(["two", "--output", "elsewhere"]))
    assert capsys.readouterr().out.split() == [
        f"{folder}/{name}"
        for folder in ("one", "comparison", "elsewhere")
        for name in ("train_val_losses.png", "val_accuracy.png")
    ]
    assert all(
        (workdir / f / "val_accuracy.png").exists() for f in ("one", "comparison", "elsewhere")
    )
