"""scripts/plot_fidelity.py, on made results, and what scripts/fidelity.sh calls."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

import fine_tune_teacher_cifar10 as teacher_script
import main_train_cifar10 as student_script
from synthetic_data import measure, train_diffusion

SCRIPT = (REPOSITORY / "scripts" / "fidelity.sh").read_text()


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
    script = REPOSITORY / "scripts" / "plot_fidelity.py"
    subprocess.run([sys.executable, script, top, "out"], check=True)
    table = Path("out/table.md").read_text()
    assert "| g1.5-s10 | 1.5 | 10 | 91.50 | 80.25 |  | expert | 72.00 ± 2.83 | 2 |" in table
    assert "| cifake |  |  | 91.50 | 80.25 |  | expert | 72.00 ± 2.83 | 2 |" in table
    assert len(Path("out/fidelity.csv").read_text().splitlines()) == 5
    assert Path("out/counts.csv").read_text().splitlines()[1] == "1000,0,60.0"
    assert Path("out/fidelity.png").exists()


def test_the_flags_of_the_study_parse():
    parsers = {
        "generator": train_diffusion,
        "expert": teacher_script,
        "beginner": teacher_script,
        "student": student_script,
    }
    sgd = re.search(r'^ +sgd="(.*)"$', SCRIPT, re.MULTILINE)[1]
    for name, script in parsers.items():
        found = re.findall(rf'^ +{name}="(--.*)"$', SCRIPT, re.MULTILINE)
        assert found
        for line in found:
            script.parse_args(shlex.split(line.replace("$sgd", sgd)))
    measure.parse_args(["images", "--output", "out", "--limit", "100", "--neighbours", "24"])
