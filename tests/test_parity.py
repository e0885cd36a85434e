"""
The port against the record's own numbers (tests/data/parity, made by running the record's maths on a CPU).
    python -m pytest tests/test_parity.py            # one case
    python -m pytest tests/test_parity.py -m ""      # all cases, and 1, 2 and 4 devices against 8: much longer
"""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

CASES = ROOT / "tests" / "data" / "parity"

def parity(case: Path, *options: str) -> dict:
    process = subprocess.run([sys.executable, ROOT / "tools" / "parity.py", case, "--json", *options],
                             capture_output=True, text=True, timeout=1200)
    assert process.stdout.startswith("{"), process.stderr[-3000:]
    report = json.loads(process.stdout)
    assert report["ok"] == (process.returncode == 0)
    return report

def failures(report: dict) -> dict:
    return {name: row for name, row in report["quantities"].items() if not row["ok"]}

def test_a_case_and_a_wrong_number_in_it(tmp_path):
    """C_f32 with one loss that is wrong by 1e-5: that one is noticed, and all else, losses of the same step too, agrees."""
    for file in (CASES / "C_f32").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    expected = dict(np.load(tmp_path / "expected.npz"))
    expected["train_loss_rows"][1, 3] *= 1 + 1e-5
    np.savez(tmp_path / "expected.npz", **expected)
    report = parity(tmp_path, "--devices", "4")  # two rows on each
    assert failures(report).keys() == {"losses to the split"}
    worst = report["quantities"]["losses to the split"]
    assert worst["where"] == "step 1 row 3" and worst["error"] == pytest.approx(1e-5, abs=worst["tolerance"])
    check_counts(report)
    losses = np.array(report["train_loss_rows"]) / expected["train_loss_rows"] - 1
    losses[1, 3] = 0
    assert abs(losses[:int(expected["split_step"]) + 1]).max() <= worst["tolerance"]

@pytest.mark.slow
@pytest.mark.parametrize("case, devices", [("A_bf16", 8), ("A_f32", 8), ("A_f32", 2), ("A_bf16", 1), ("A_bf16", 4)])
def test_case(case, devices):
    report = parity(CASES / case, "--devices", str(devices))
    assert not failures(report)
    check_counts(report)

def check_counts(report: dict):
    checks = {name: row["checks"] for name, row in report["quantities"].items()}
    assert checks["gradient norms"] > 60 and checks["parameter norms"] > 120 and checks["batches"] > 400, "checked less than there is"

@pytest.mark.slow
def test_devices_agree():
    """1, 2, 4 and 8 devices compute the record's numbers, and the same losses to 1e-6."""
    reports = {n: parity(CASES / "C_f32", "--devices", str(n)) for n in (1, 2, 4, 8)}
    assert not any(failures(report) for report in reports.values())
    rows = {n: report["train_loss_rows"] for n, report in reports.items()}
    for n, other in rows.items():
        worst = max(abs(a / b - 1) for x, y in zip(other, rows[8], strict=True) for a, b in zip(x, y, strict=True))
        assert worst <= 1e-6, f"{n} devices differ from 8 by {worst}"

def test_what_is_no_case_is_refused():
    process = subprocess.run([sys.executable, ROOT / "tools" / "parity.py", ROOT / "tests"], capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "it is not a reference case" in process.stderr
