"""
The port against the record's own numbers (tests/data/parity, made by running the record's maths on a CPU).
    python -m pytest tests/test_parity.py            # two cases
    python -m pytest tests/test_parity.py -m ""      # all cases, and 1, 2 and 4 devices against 8: much longer
"""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

CASES = ROOT / "tests" / "data" / "parity"

def parity(case: str, *options: str) -> dict:
    process = subprocess.run([sys.executable, ROOT / "tools" / "parity.py", CASES / case, "--json", *options],
                             capture_output=True, text=True, timeout=1200)
    assert process.stdout.startswith("{"), process.stderr[-3000:]
    report = json.loads(process.stdout)
    assert report["ok"] == (process.returncode == 0)
    return report

def failures(report: dict) -> dict:
    return {name: row for name, row in report["quantities"].items() if not row["ok"]}

@pytest.mark.parametrize("case, devices", [
    ("C_f32", 4),
    pytest.param("A_bf16", 8, marks=pytest.mark.slow),
    pytest.param("A_f32", 8, marks=pytest.mark.slow),
    pytest.param("A_f32", 2, marks=pytest.mark.slow),
    pytest.param("C_f32", 1, marks=pytest.mark.slow),
    pytest.param("A_bf16", 1, marks=pytest.mark.slow),
    pytest.param("A_bf16", 4, marks=pytest.mark.slow),
])
def test_case(case, devices):
    report = parity(case, "--devices", str(devices))
    assert not failures(report)
    checks = {name: row["checks"] for name, row in report["quantities"].items()}
    assert checks["gradient norms"] > 60 and checks["parameter norms"] > 120 and checks["batches"] > 400, "checked less than there is"

@pytest.mark.slow
def test_devices_agree():
    """1, 2, 4 and 8 devices compute the same losses, to 1e-6."""
    rows = {n: parity("C_f32", "--devices", str(n))["train_loss_rows"] for n in (1, 2, 4, 8)}
    for n, other in rows.items():
        worst = max(abs(a / b - 1) for x, y in zip(other, rows[8], strict=True) for a, b in zip(x, y, strict=True))
        assert worst <= 1e-6, f"{n} devices differ from 8 by {worst}"

def test_a_wrong_reference_is_noticed(tmp_path):
    """The tool can fail: one expected loss off by 1e-5, and a folder that is no case."""
    import numpy as np
    for file in (CASES / "C_f32").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    expected = dict(np.load(tmp_path / "expected.npz"))
    # a run of two steps is enough: cut the reference to it
    config.update(num_scheduled_iterations=2, num_extension_iterations=0, val_loss_every=0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected["train_loss_rows"][1, 3] *= 1 + 1e-5
    np.savez(tmp_path / "expected.npz", **expected)
    process = subprocess.run([sys.executable, ROOT / "tools" / "parity.py", tmp_path], capture_output=True, text=True, timeout=600)
    assert process.returncode == 1 and "FAIL losses to the split" in process.stdout, process.stdout + process.stderr[-2000:]
    process = subprocess.run([sys.executable, ROOT / "tools" / "parity.py", ROOT / "tests"], capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "it is not a reference case" in process.stderr
