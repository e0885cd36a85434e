"""
The kernels inside torch_xla's SPMD graph: on virtual CPU devices, interpreted, against the plain path; and compiled by libtpu for v6e,
without a collective or a copy around them.

    python -m pytest -q tests/test_on_devices.py               about a minute
    python -m pytest -q tests/test_on_devices.py -m slow       1, 4 and 8 devices
"""
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, program

from chips import CHIPS
from kernels import dispatch, takes_layers
from spmd import COMPILE_FAST, setup_devices

TPU = dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v6e-8", TPU_WORKER_HOSTNAMES="localhost",
           ALLOW_MULTIPLE_LIBTPU_LOAD="1")

@pytest.mark.parametrize("n", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_run(n):
    program("two_blocks.py", "run", PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(n), XLA_FLAGS=COMPILE_FAST)

@pytest.mark.parametrize("n", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 2))])
def test_a_table_that_the_devices_share(n):
    program("shared_table.py", PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(n), XLA_FLAGS=COMPILE_FAST)

@pytest.mark.parametrize("n", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 2, 1))])
def test_compiles_for_v6e(n, tmp_path):
    graph = tmp_path / "graph.hlo.pb"
    traced = program("two_blocks.py", "export", graph, PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(n))
    assert traced.stderr.count("no TPU kernels for layers of (2, 256, 384), they take heads of 128") == 1, "the fallback must say so, once"
    hlo = program("compile_for_v6e.py", n, graph, **TPU).stdout
    # of two layers three kernels forward and three backward, one more each for DC; two embeddings', lm_head's two; three empty stacks
    assert hlo.count('custom_call_target="tpu_custom_call"') == 21
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {word}" not in hlo, f"a {word}: the kernel left its device's rows"
    # of an array by head, of a stack, and of what layers add up together no copy may be made around the kernels
    large = r"= bf16\[(2,(2|4|6),256,128|5,256,256|(6|3,2),1024,256|2,256,(256|1280))\]"
    copies = [line.strip()[:200] for line in hlo.splitlines() if re.search(large, line)
              and any(f" {op}(" in line for op in ("copy", "pad", "transpose", "concatenate")) and "transpose(%gather" not in line]
    assert not copies, copies

def test_imports_are_light():
    """The kernels' package brings neither JAX nor torch_xla. (Training brings no JAX: programs/stop_and_go_on.py)"""
    command = [sys.executable, "-c", "import sys, kernels, gradients; assert not {'jax', 'torch_xla'} & set(sys.modules)"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

def test_cpu_tensors_take_the_plain_path(monkeypatch, recwarn):
    monkeypatch.setattr(dispatch, "target", CHIPS["v6e"])
    x, bank = torch.zeros(1, 256, 256, dtype=torch.bfloat16), torch.zeros(1, 2, 1024, 256, dtype=torch.bfloat16)
    assert not takes_layers(x, bank, 2, 112, {(128, False)}) and not recwarn.list

@pytest.mark.parametrize("there, then", [
    (" --xla_cpu_enable_fast_math=false", f"--xla_cpu_enable_fast_math=false {COMPILE_FAST}"),  # as importing torch_xla leaves them
    ("--xla_backend_optimization_level=2", "--xla_backend_optimization_level=2")])  # a user's level stays
def test_flags_reach_xla_beside_torch_xlas(there, then, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", there)
    setup_devices(COMPILE_FAST)
    assert os.environ["XLA_FLAGS"] == then
