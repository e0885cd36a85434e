"""
The smear gate, norm and the first product of MUDD's gates: the TPU kernels, interpreted, against the lines of GPT.forward.

    python -m pytest -q tests/test_smear.py
"""
import eager
import pytest
import torch
import torch.nn.functional as F

from kernels.smear import fused_smear
from train_gpt_xla import norm, scaled

NAMES = "x", "gate_w", "smear_lambda", "w1"

def plain(x, gate_w, smear_lambda, w1):
    gate = smear_lambda * torch.sigmoid(F.linear(x[..., :gate_w.size(-1)], gate_w).float())
    x0 = norm(x + scaled(gate, F.pad(x, (0, 0, 1, -1))))
    return x0, x0.clone(), F.linear(x0, w1)

def forward_backward(path, leaves, given):
    leaves = [x.clone().requires_grad_() for x in leaves]
    results = path(*leaves)
    gradients = torch.autograd.grad(results, leaves, given)
    return dict(zip(("x0", "x0_once", "h"), (x.detach() for x in results))), dict(zip(NAMES, gradients))

@pytest.mark.parametrize("B, T, d, dtype", [
    (2, 384, 256, torch.float32),  # three blocks of one strip: rows begin and end, shares cross blocks
    (1, 1024, 128, torch.bfloat16),  # two blocks of four strips
])
def test_smear(B, T, d, dtype):
    generator = torch.Generator().manual_seed(T)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    leaves = randn(B, T, d).to(dtype), randn(1, 12).to(dtype), torch.tensor(0.7), randn(64, d).to(dtype) / d**0.5
    given = [randn(B, T, n).to(dtype) for n in (d, d, 64)]
    want, want_gradients = forward_backward(plain, leaves, given)
    with eager.eager(kernels=True):
        got, gradients = forward_backward(fused_smear, leaves, given)
    assert eager.calls == ["smear_forward", "smear_backward"]
    exact = dtype == torch.float32
    eager.check(got, want, 1e-6 if exact else 5e-4, "results")
    eager.check(gradients, want_gradients, 1e-5 if exact else 1e-2, "gradients")
