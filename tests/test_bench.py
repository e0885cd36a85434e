"""
The bench measures what it says, and fails where it measured nothing.
    python -m pytest tests/test_bench.py -m slow
"""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

BENCH = ROOT / "tools" / "bench_step.py"

@pytest.mark.slow
def test_bench_prints_every_stage():
    process = subprocess.run([sys.executable, BENCH, "--json", "--steps", "6"], capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, process.stderr[-2000:]
    result = json.loads(process.stdout)
    assert [s["name"] for s in result["stages"]] == ["16384_ws1_3", "32768_ws3_7", "49152_ws5_11", "49152_ws6_13"]
    for stage in result["stages"]:
        assert 0 < stage["replayed_ms"] < stage["retraced_ms"] / 5
        assert 0 < stage["loader_ms"] < 1000
        assert all(x["n"] >= 5 and x["low"] <= x["median"] <= x["high"] for x in stage["spread"].values())

def test_checkpoints_bench_saves_and_says_what_it_took(tmp_path):
    """At a narrow width, where the state is tables with a row of each token, seven, and of each bigram, all with float32 moments."""
    process = subprocess.run([sys.executable, ROOT / "tools" / "bench_checkpoint.py", "--model_dim", "48", "--saves", "2", "--json",
                              "--folder", tmp_path], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    saves = [json.loads(line) for line in process.stdout.splitlines()]
    assert [s["save"] for s in saves] == [1, 2] and not list(tmp_path.iterdir())
    for save in saves:
        tables = (7 * 50304 + 377280) * 48 * (2 + 4 + 4)
        assert tables < 1e9 * save["gigabytes"] < 1.1 * tables
        assert save["stall_s"] > 0 and save["write_s"] > 0

def test_too_few_steps_are_refused():
    process = subprocess.run([sys.executable, BENCH, "--steps", "1"], capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and "--steps 1" in process.stderr

def test_a_bench_that_measured_nothing_fails(monkeypatch):
    """A Replay that traces although it should replay is caught by the count of traced steps."""
    import train_gpt_xla as port
    sys.path.insert(0, str(BENCH.parent))
    import bench_step

    class Traces:
        def __init__(self, fn, state, constants, enabled):
            self.fn = fn
        def __call__(self, key, *inputs):
            return self.fn(*inputs)
    class Manager:
        graph, tensors, constants = None, None, None
        def __init__(self, model, args, replay):
            self.training_schedule = port.TrainingSchedule(args)
        def advance_schedule(self, step): ...
        def precompute(self, steps):
            return [port.torch.zeros(1)]
        def program(self, batch, numbers):
            return batch.float().sum()
    monkeypatch.setattr(port, "Replay", Traces)
    monkeypatch.setattr(port, "TrainingManager", Manager)
    monkeypatch.setattr(port.GPT, "to_devices", lambda model, dtype: model)
    args = port.Hyperparameters(vocab_size=128, head_dim=8, model_dim=48, bigram_vocab_size=16)
    with pytest.raises(AssertionError, match="nothing was measured"):
        bench_step.bench_step(port, args, [0], 4, replay=True)
