"""scripts/plot_fidelity.py, on made results; test_readme.py runs scripts/fidelity.sh."""

import json
from pathlib import Path

import pytest

from experiment.errors import UserError
from scripts import plot_fidelity


def student(top: Path, name: str, accuracy: float) -> None:
    run = top / name
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text(
        "epoch,train_loss,train_agreement,test_loss,test_accuracy\n"
        f"1,2,50,2,5\n2,1,60,1,{accuracy}\n"
    )
    run.with_suffix(".pth").touch()


def test_table_and_plot(workdir):
    top = Path("fidelity")
    for name in ("g1.5-s10", "cifake"):
        (top / "measures" / name).mkdir(parents=True)
        measures = {"teacher_accuracy": 91.5, "confidence": 80.25, "fid": None}
        (top / "measures" / name / "measures.json").write_text(json.dumps(measures))
        for seed, accuracy in enumerate((70, 74)):
            student(top / "students" / name, f"expert-{seed}", accuracy)
    (top / "images" / "g1.5-s10").mkdir(parents=True)
    config = {"args": {"guidance_scale": 1.5, "steps": 10}}
    (top / "images" / "g1.5-s10" / "config.json").write_text(json.dumps(config))
    student(top / "counts", "1000-0", 60)
    plot_fidelity.main(plot_fidelity.parse_args(["fidelity", "out"]))
    table = Path("out/table.md").read_text()
    assert "| g1.5-s10 | 1.5 | 10 | 91.50 | 80.25 |  | expert | 72.00 ± 2.83 | 2 |" in table
    assert "| cifake |  |  | 91.50 | 80.25 |  | expert | 72.00 ± 2.83 | 2 |" in table
    assert len(Path("out/fidelity.csv").read_text().splitlines()) == 5
    assert Path("out/counts.csv").read_text().splitlines()[1] == "1000,0,60.0"
    assert Path("out/fidelity.png").exists()


def test_nothing_is_drawn_before_a_student_is_finished(workdir):
    Path("fidelity").mkdir()
    with pytest.raises(UserError, match="no student in fidelity is finished yet"):
        plot_fidelity.main(plot_fidelity.parse_args(["fidelity", "out"]))
    assert not Path("out").exists()
