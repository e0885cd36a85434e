"""
The product on plain CPU tensors, as a single device sees it: every operation runs when it is called, nothing is compiled but the kernels,
which JAX interprets. Small heads and float32 are let through, so that a wrong operand shows at 1e-5 instead of bfloat16's 1e-2.
What torch_xla makes of the same calls is the business of test_on_devices.py and of the runs on virtual devices.
"""
import contextlib
import functools
import gc
import types

import ml_dtypes
import numpy as np
import pytest
import torch
import torch_xla.core.xla_model as xm

import gradients
import kernels
import muon_xla
import spmd
import train_gpt_xla as train
from chips import CHIPS, Chip
from kernels import attention, dc, dispatch, embedding, lm_head, mix, mlp, smear

PRODUCT = gradients, kernels, attention, dc, dispatch, embedding, lm_head, mix, mlp, smear, muon_xla, spmd, train

def replace(patch: pytest.MonkeyPatch, name: str, value):
    """In every module of the product that has it: it may have been imported by name."""
    modules = [module for module in PRODUCT if hasattr(module, name)]
    assert modules, f"{name} is gone: tests/eager.py has to follow"
    for module in modules:
        patch.setattr(module, name, value)

@contextlib.contextmanager
def eager(kernels: bool, turns: int = 1, chip: str = "v6e"):
    """
    kernels: run those of the TPU, interpreted, as they are for that chip. Otherwise the plain path. turns: the device takes the 8 rows
    in so many of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        same = lambda x, *spec: x
        for name, value in dict(to_device=lambda x, *spec: x.clone(), to_host=lambda x, lazy=False: x.clone(), shard=same, enter=same,
                                leave=lambda x: x.unsqueeze(0), leave_rows=same, reduce_scatter=same, device_count=lambda: 1,
                                turns=lambda: turns, is_split=lambda x: False).items():
            replace(patch, name, value)
        patch.setattr(xm, "optimization_barrier_", lambda tensors: None)
        patch.setattr(xm, "mark_step", lambda: None)
        if kernels:
            patch.setattr(dispatch, "target", CHIPS[chip])
            replace(patch, "for_tpu", lambda x: True)
            for name in ("attention_refuses", "dc_refuses", "mlp_refuses", "lm_head_refuses", "embedding_refuses"):
                replace(patch, name, lambda *args: None)
            replace(patch, "call_kernel", call_kernel)
        calls.clear()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # several would wait for each other, busily, longer than such small tensors take
        gc.disable()  # it would go through JAX's many objects again and again
        try:
            yield
        finally:
            gc.enable()
            torch.set_num_threads(threads)

calls = []  # of kernels, by name, since eager() was entered

def call_kernel(call, shapes, **tensors: torch.Tensor | None) -> types.SimpleNamespace:
    calls.append(call.__name__)
    tensors = {name: x for name, x in tensors.items() if x is not None}
    dtype = min((x.dtype for x in tensors.values() if x.ndim > 1 and x.is_floating_point()), key=lambda dtype: dtype.itemsize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "interpret", True)
        results = compiled(call, shapes, dtype, dispatch.chip())(**{name: to_numpy(x) for name, x in tensors.items()})
    return types.SimpleNamespace(**{name: None if x is None else to_torch(x) for name, x in results.items()})

@functools.cache
def compiled(call, shapes, dtype: torch.dtype, chip: Chip):
    import jax
    dtype = {torch.float32: jax.numpy.float32, torch.bfloat16: jax.numpy.bfloat16}[dtype]
    return jax.jit(call(shapes, dtype, interpret=True), keep_unused=True, compiler_options=dict(xla_backend_optimization_level=0))

def check(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float, where: str):
    """The norm of each tensor's error, as a part of the tensor's."""
    assert got.keys() == want.keys(), f"{where}: {got.keys() ^ want.keys()} on one side only"
    wrong = {}
    for name, x in want.items():
        assert got[name].shape == x.shape and got[name].dtype == x.dtype, f"{where}: {name}"
        error, size = float((got[name] - x).norm()), float(x.norm())
        if not error <= tolerance * size:  # nor if it is not a number
            wrong[name] = f"{error:.1e} of {size:.1e}"
    assert not wrong, f"{where}: errors beyond {tolerance}: {wrong}"

def to_numpy(x: torch.Tensor) -> np.ndarray:
    x = x.detach().contiguous()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()

def to_torch(x) -> torch.Tensor:
    x = np.array(x)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == ml_dtypes.bfloat16 else torch.from_numpy(x)
