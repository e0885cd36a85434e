"""
The port against the record's own numbers (tests/data/parity, made by running the record's maths on a CPU).
    python -m pytest tests/test_parity.py            # two steps of one case: 40 s
    python -m pytest tests/test_parity.py -m ""      # whole cases, and 1, 2 and 4 devices against 8: much longer
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
                             capture_output=True, text=True, timeout=1800)
    assert process.stdout.startswith("{"), process.stderr[-3000:]
    report = json.loads(process.stdout)
    assert report["ok"] == (process.returncode == 0) == (not report["failures"])
    return report

def check_counts(report: dict, case: Path, whole: bool):
    """All that the case has has been compared."""
    expected = np.load(case / "expected.npz")
    numbers = lambda kind, *tags: [key for key in expected if any(key.startswith(f"{tag}{kind}/") for tag in tags)]
    matrices = lambda kind, *tags: sum(len(expected[key]) for key in numbers(kind, *tags))
    tags = ["params_after_step0", "params_after_step1"] + ["params_after_split", "params_final"] * whole
    want = {"initial parameters": 20, "gradient norms": 36, "gradient norms of matrices": matrices("norms", "grad"),
            "gradient elements": len(numbers("", "grad")), "losses before Adam": 16, "parameter norms": len(numbers("_norm", *tags)),
            "parameter norms of matrices": matrices("_norms", *tags)}
    if whole:
        rows, split_step = len(expected["train_loss_rows"]), int(expected["split_step"])
        want |= {"losses to the split": 8 * (split_step - 1), "losses after the split": 8 * (rows - 1 - split_step), "Adam step counts": 16,
                 "Adam moments": 32, "NorMuon moments": 6, "NorMuon shapes": 3, "validation loss": len(expected["val_steps"])}
    checks = {name: row["checks"] for name, row in report["quantities"].items()}
    wrong = {name: (checks.get(name, 0), n) for name, n in want.items() if checks.get(name, 0) != n}
    assert not wrong and len(numbers("norm", "grad")) == 40, f"compared, to compare: {wrong}"  # of lm_head and embed the sum
    # where rounding decides which way Adam's first step goes: a handful of elements
    assert {"lm_head.weight", "value_embeds", "bigram_embed.weight"} < report["undecided"].keys()
    assert all(n <= 1e-3 * of for n, of in report["undecided"].values()), report["undecided"]

def test_a_case_and_wrong_numbers_in_it(tmp_path):
    """C_f32, two rows on each of 4 devices, with a loss that is wrong by 1e-5, and a matrix' gradient by 1e-4: these alone are noticed."""
    for file in (CASES / "C_f32").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    expected = dict(np.load(tmp_path / "expected.npz"))
    expected["train_loss_rows"][1, 3] *= 1 + 1e-5
    expected["gradnorms/step1/qk_bank"][33] *= 1 + 1e-4
    np.savez(tmp_path / "expected.npz", **expected)
    report = parity(tmp_path, "--devices", "4", "--steps", "2")
    planted = [("losses before Adam", 1e-5, "step 1 row 3", "1 of 16"),
               ("gradient norms of matrices", 1e-4, "step1 qk_bank 33", "1 of 234")]
    found = sorted(report["failures"], key=lambda row: row["error"])
    assert [(row["quantity"], row["where"], row["failed"]) for row in found] == [(name, *rest) for name, _, *rest in planted], found
    for row, (_, error, *_) in zip(found, planted, strict=True):
        assert row["error"] == pytest.approx(error, abs=row["tolerance"])
    check_counts(report, tmp_path, whole=False)

@pytest.mark.slow
@pytest.mark.parametrize("case, devices", [("A_bf16", 8), ("A_f32", 8), ("A_f32", 2), ("A_bf16", 1), ("A_bf16", 4)])
def test_case(case, devices):
    report = parity(CASES / case, "--devices", str(devices))
    assert not report["failures"]
    check_counts(report, CASES / case, whole=True)

@pytest.mark.slow
def test_devices_agree():
    """1, 2, 4 and 8 devices compute the record's numbers, and the same losses to 1e-6."""
    reports = {n: parity(CASES / "C_f32", "--devices", str(n)) for n in (1, 2, 4, 8)}
    for n, report in reports.items():
        assert not report["failures"], n
        check_counts(report, CASES / "C_f32", whole=True)
    rows = {n: report["train_loss_rows"] for n, report in reports.items()}
    for n, other in rows.items():
        worst = max(abs(a / b - 1) for x, y in zip(other, rows[8], strict=True) for a, b in zip(x, y, strict=True))
        assert worst <= 1e-6, f"{n} devices differ from 8 by {worst}"

def test_what_is_no_case_is_refused():
    process = subprocess.run([sys.executable, ROOT / "tools" / "parity.py", ROOT / "tests"], capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "it is not a reference case" in process.stderr
