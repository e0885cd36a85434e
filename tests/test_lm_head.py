"""
lm_head and its loss: the TPU kernels, interpreted, against train_gpt_xla.FusedSoftcappedCrossEntropy.

    python -m pytest -q tests/test_lm_head.py -m "not slow"
    python -m pytest -q tests/test_lm_head.py                 the whole grid, some minutes more
"""
import dataclasses

import eager
import numpy as np
import pytest
import torch
from test_attention import check

from chips import CHIPS
from kernels import dispatch
from kernels.lm_head import LmHead, get_lm_head, lm_head_refuses
from train_gpt_xla import FusedSoftcappedCrossEntropy


def lm_head_inputs(B: int, T: int, d: int, V: int, n: int, dtype):
    """x, weight [B, V, d], targets with runs of one id and the vocabulary's ends, mtp_weights, an uneven gradient of the losses."""
    generator = torch.Generator().manual_seed(T + V)
    x = torch.randn(B, T, d, generator=generator).to(dtype)
    weight = (torch.randn(B, V, d, generator=generator) * 3 * d**-0.5).to(dtype)
    targets = torch.randint(0, V, (B, T), generator=generator, dtype=torch.int32)
    targets[:, T // 2 - 3:T // 2 + 3] = 7  # across blocks of tokens
    targets[:, 1], targets[:, -1] = 0, V - 1
    weight[..., 0], x[:, 5, 0] = 1, -500  # a token to which all logits say no: what lies beyond the vocabulary would count
    return x, weight, targets, torch.tensor([1.0, 0.5, 0.25])[:n], torch.rand(B, T, generator=generator) * 2 - 0.5

def lm_head_twin(x, weight, targets, mtp_weights, grad) -> list[np.ndarray]:
    rows = []
    for r in range(len(x)):
        leaves = [x[r:r + 1].clone().requires_grad_(), weight[r].clone().requires_grad_()]
        losses = FusedSoftcappedCrossEntropy.apply(*leaves, targets[r:r + 1], mtp_weights)
        rows.append([losses.detach()[0], *(g.reshape(-1, g.size(-1)) for g in torch.autograd.grad(losses, leaves, grad[r:r + 1]))])
    return [torch.stack(x).float().numpy() for x in zip(*rows)]

def check_lm_head(B, T, d, V, n, kept, forward_block, backward_block, dtype):
    from kernels.tpu import lm_head
    x, weight, targets, mtp_weights, grad = tensors = lm_head_inputs(B, T, d, V, n, dtype)
    shapes, args = LmHead(B, T, d, V, n, kept, False, forward_block, backward_block), dict(x=x, w=weight, targets=targets)
    r = eager.call_kernel(lm_head.lm_head_losses_and_dx, shapes, **args, mtp_weights=mtp_weights)
    args |= dict(dx=r.dx, a=r.a, at_targets=r.at_targets, p=r.p, dlosses=grad)
    d = eager.call_kernel(lm_head.lm_head_dw, shapes, **args)
    alone = eager.call_kernel(lm_head.lm_head_losses, shapes, x=x, w=weight, targets=targets, mtp_weights=mtp_weights).losses
    want, tolerance = lm_head_twin(*tensors), 1e-5 if dtype == torch.float32 else 2e-2
    check([x.float() for x in (r.losses, d.dx, d.dw, alone)], want + want[:1], tolerance, ("losses", "dx", "dw", "losses alone"))
    before = weight[0] * float(np.abs(want[2]).max())
    in_place = B == 1  # of several rows the first one shows which of them comes on top
    before = before.float() if in_place else before
    d = eager.call_kernel(lm_head.lm_head_dw, dataclasses.replace(shapes, on_top=True, in_place=in_place), **args, before=before)
    assert d.dw.dtype == before.dtype
    want[2][0] += before.float().numpy()
    check([d.dw.float()], want[2:], tolerance, ["dw on top"])

def test_lm_head_compares_in_int32(monkeypatch):
    """As chips do whose vector unit has no 16-bit comparisons, v5e's and v5p's."""
    assert not CHIPS["v5e"].compares_int16 and CHIPS["v6e"].compares_int16
    monkeypatch.setattr(dispatch, "target", CHIPS["v5e"])
    check_lm_head(2, 256, 128, 512, 2, 256, (128, 256), (128, 256), torch.bfloat16)

@pytest.mark.parametrize("B, T, d, V, n, kept, forward_block, backward_block, dtype", [
    (2, 512, 128, 640, 3, 256, (128, 256), (128, 384), torch.float32),  # some of P kept; V ends within a block; rows
    (1, 256, 256, 384, 3, 256, (256, 512), (256, 4608), torch.bfloat16),  # one block of each; a block longer than V
    (1, 384, 128, 1152, 2, 0, (128, 384), (384, 768), torch.float32),  # none of P kept
    (2, 256, 128, 512, 1, 256, (128, 256), (128, 256), torch.bfloat16),
])
def test_lm_head(B, T, d, V, n, kept, forward_block, backward_block, dtype):
    check_lm_head(B, T, d, V, n, kept, forward_block, backward_block, dtype)

@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kept", [0, 256, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_lm_head_grid(dtype, kept, n):
    check_lm_head(2, 768, 128, 896, n, kept, (256, 512), (128, 512), dtype)

@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v6e", "v5e", "v5p"])
@pytest.mark.parametrize("kept", [0, 2048, 4096])
def test_lm_head_at_record_size(monkeypatch, kept, chip):
    """The record's dimension, a chip's blocks, a vocabulary of two of them and a bit."""
    monkeypatch.setattr(dispatch, "target", CHIPS[chip])
    x, weight = torch.zeros(1, 4096, 768, dtype=torch.bfloat16), torch.zeros(2 * 4608 + 128, 768, dtype=torch.bfloat16)
    s = get_lm_head(x, weight, 3, kept)
    check_lm_head(1, 4096, 768, weight.size(0), 3, kept, s.forward_block, s.backward_block, torch.bfloat16)

@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_lm_head_refuses(monkeypatch, chip):
    monkeypatch.setattr(dispatch, "target", chip)
    head = lambda T, V, d, dtype=torch.bfloat16: lm_head_refuses(torch.zeros(1, T, d, dtype=dtype), torch.zeros(1, V, d, dtype=dtype))
    assert head(256, 384, 128) is None
    for bad in (head(192, 384, 128), head(256, 300, 128), head(256, 384, 64), head(256, 384, 128, torch.float32), head(256, 384, 8192)):
        assert bad.startswith(("they take", "a dimension of 8192"))
    s = get_lm_head(torch.zeros(2, 3 * 16384, 128), torch.zeros(2, 384, 128), 1, 49152)  # both rows share what may be kept
    assert s.kept * s.rows == 49152 and s.kept % s.forward_block[0] == 0 == s.kept % s.backward_block[0]
