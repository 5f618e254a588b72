"""scripts/summarize.py, on made runs."""

import csv
import json
from pathlib import Path

import pytest

from experiment.errors import UserError
from scripts import summarize


def made_run(folder: str, accuracy: float, epochs: int = 2, seconds: float = 90.0) -> None:
    path = Path(folder)
    path.mkdir(parents=True)
    part = {"hardware": "CPU, 1 thread", "git_commit": "abc", "seconds": seconds}
    config = {"args": {"epochs": epochs}, "parts": [part], "teacher_accuracy": 93.0}
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.csv").write_text(
        "epoch,train_loss,train_agreement,test_loss,test_accuracy\n"
        f"1,2,50,2,{accuracy + 1}\n2,1,60,1,{accuracy}\n"
    )


def summary(*argv: str) -> list[dict[str, str]]:
    summarize.main(summarize.parse_args(argv))
    with open(Path(argv[0], "summary.csv"), newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_setting_has_the_last_epochs_of_its_seeds(workdir):
    made_run("runs/kd-0", 70)
    made_run("runs/kd-1", 74, seconds=150)
    made_run("runs/labels-0", 40)
    made_run("runs/labels-1", 44, epochs=3)  # stopped after two
    both, one = summary("runs", "runs/kd-0/", "runs/kd-1", "runs/labels-0", "runs/labels-1")
    assert (both["setting"], both["n"], both["teacher"]) == ("kd", "2", "93.00")
    assert (both["last_mean"], both["last_std"], both["best_mean"]) == ("72.00", "2.83", "73.00")
    assert (both["last"], one["last"]) == ("70.00 74.00", "40.00")
    assert (both["train_agreement"], both["minutes"], both["commit"]) == ("60.00", "2.00", "abc")
    assert (one["setting"], one["n"], one["last_mean"]) == ("labels", "1", "40.00")
    assert one["last_std"] == ""
    assert Path("runs/summary.png").stat().st_size > 1000


def test_runs_that_are_elsewhere_are_copied_and_a_copy_counts_once(workdir):
    made_run("runs/kd-0", 70)
    assert summary("results", "runs/kd-0")[0]["n"] == "1"
    assert sorted(p.name for p in Path("results/kd-0").iterdir()) == ["config.json", "metrics.csv"]
    (row,) = summary("results", "runs/kd-0", "results/kd-0")
    assert (row["n"], row["last_std"]) == ("1", "")


def test_seeds_of_different_recipes_are_noted(workdir, capsys):
    for name, recipe in (("a-0", {}), ("a-1", {"seed": 1, "data_dir": "b"}), ("b-0", {"lr": 1})):
        made_run(f"runs/{name}", 70)
        config = json.loads(Path("runs", name, "config.json").read_text())
        config["args"] |= {"seed": 0, "lr": 0.1, "data_dir": "a"} | recipe
        Path("runs", name, "config.json").write_text(json.dumps(config))
    summary("runs", "runs/a-0", "runs/a-1", "runs/b-0")
    assert "note" not in capsys.readouterr().out
    Path("runs/b-0").rename("runs/a-2")
    summary("runs", "runs/a-0", "runs/a-1", "runs/a-2")
    assert capsys.readouterr().out.startswith("note: the runs of a differ in --lr\n")


def test_two_runs_of_one_name_are_refused(workdir):
    made_run("runs/kd-0", 70)
    made_run("others/kd-0", 71, seconds=80)
    with pytest.raises(UserError, match="others/kd-0: another run has this name, too"):
        summary("results", "runs/kd-0", "others/kd-0")
    assert not Path("results").exists()  # all are read before one is copied


def test_a_run_in_the_output_is_not_overwritten(workdir):
    made_run("one/kd-0", 70)
    made_run("two/kd-0", 60, seconds=30)
    Path("two/kd-0/last.pt").touch()
    with pytest.raises(UserError, match="two/kd-0 is another run than one/kd-0"):
        summary("two", "one/kd-0")
    assert summary("two", "two/kd-0")[0]["last"] == "60.00"
    Path("two/kd-0/last.pt").unlink()  # a copy, as a summary makes them
    assert summary("two", "one/kd-0")[0]["last"] == "70.00"


def test_what_is_no_run_is_named(workdir):
    Path("runs/kd-0").mkdir(parents=True)
    with pytest.raises(OSError, match=r"runs/kd-0/config\.json"):
        summary("results", "runs/kd-0")
    made_run("runs/kd-1", 70)
    Path("runs/kd-1/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"runs/kd-1/config\.json is not the config\.json of a run"):
        summary("results", "runs/kd-1")
    assert not Path("results").exists()


def test_minutes_teacher_and_precision_are_those_of_all_parts_and_seeds(workdir):
    made_run("runs/kd-0", 70)
    made_run("runs/kd-1", 72)
    path = Path("runs/kd-0/config.json")
    config = json.loads(path.read_text())
    (part,) = config["parts"]
    parts = [part | {"precision": "float32"}, part | {"precision": "bfloat16"}]
    path.write_text(json.dumps(config | {"parts": parts, "teacher_accuracy": 91.0}))
    Path("runs/kd-0/per_class.csv").touch()
    (row,) = summary("out", "runs/kd-0", "runs/kd-1")
    assert (row["minutes"], row["teacher"]) == ("2.25", "92.00")
    assert row["precision"] == "bfloat16 / float32"  # the run without one is older
    assert Path("out/kd-0/per_class.csv").exists()


def test_minutes_of_a_config_without_seconds_are_those_of_its_epochs(workdir):
    made_run("runs/kd-0", 70)
    path = Path("runs/kd-0/config.json")
    path.write_text(path.read_text().replace("seconds", "former"))
    table = "epoch,train_loss,train_agreement,test_loss,test_accuracy,seconds"
    Path("runs/kd-0/metrics.csv").write_text(f"{table}\n1,2,50,2,60,30\n2,1,60,1,70,90\n")
    assert summary("out", "runs/kd-0")[0]["minutes"] == "2.00"
