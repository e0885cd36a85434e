"""
DC: the plain-torch twin against all T x T probabilities, and the TPU kernels, interpreted, against the twin.

    python -m pytest -q tests/test_dc.py -m "not slow"
    python -m pytest -q tests/test_dc.py                 longer rows, other windows, and the record's size, some minutes more
"""
import eager
import pytest
import torch
from test_attention import LAYOUTS, SCALE, documents

from chips import CHIPS
from kernels import dispatch
from kernels.dc import dc_attention, dc_refuses, fused_dc, get_dc

TOLERANCE = 1e-5  # measured: 1e-6
NAMES = "qkv", "y", "gate", "w1", "w2"

def inputs(rows: int, H: int, T: int, D: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """q and k as QK norm leaves them; numbers of each head that no other one has; the gradient of the result."""
    generator = torch.Generator().manual_seed(T + H)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    q, k, v = (randn(rows, H, T, D) for _ in range(3))
    q, k = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (q, k))
    wide = dict(qkv=torch.cat([q, k, v], dim=1), y=randn(rows, T, H * D), dout=randn(rows, T, H * D))
    return {name: x.to(dtype) for name, x in wide.items()} | {name: randn(rows, T, H) for name in ("gate", "w1", "w2")}

def by_the_definition(qkv, y, gate, w1, w2, documents, window, scale):
    """A = sum_h w1_h P_h, of a softmax over i - (window - 1) <= j <= i in i's document; y_h + w2_h A v_h, times the gate."""
    q, k, v = qkv.chunk(3, dim=1)
    i = torch.arange(q.size(2))
    first = torch.maximum(documents, i - window + 1)[:, None, :, None]
    P = (q @ k.mT * scale).masked_fill((i < first) | (i > i[:, None]), -torch.inf).softmax(-1)
    A = torch.einsum("bth,bhts->bts", w1, P)
    y = y.unflatten(2, (v.size(1), -1)) + w2[..., None] * torch.einsum("bts,bhsd->bthd", A, v)
    return (gate[..., None] * y).flatten(2)

def twin(qkv, y, gate, w1, w2, *args):
    y = dc_attention(qkv, y, w1, w2, *args)
    return (gate[..., None] * y.float().unflatten(2, (gate.size(2), -1))).flatten(2).to(y.dtype)

def forward_backward(dc, x: dict[str, torch.Tensor], *args) -> dict[str, torch.Tensor]:
    """q, k and v apart: one that is wrong could hide behind the others."""
    leaves = [x[name].clone().requires_grad_() for name in NAMES]
    out = dc(*leaves, *args)
    gradients = dict(zip(NAMES, torch.autograd.grad(out, leaves, x["dout"].to(out.dtype)), strict=True))
    gradients |= dict(zip("qkv", gradients.pop("qkv").chunk(3, dim=1), strict=True))
    return {name: g.float() for name, g in dict(out=out.detach(), **gradients).items()}

# -----------------------------------------------------------------------------
# The twin

@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T, H, window", [(333, 6, 112), (300, 2, 40), (300, 3, 2), (260, 2, 1000)])
def test_twin(T, H, window, layout):
    x, where = inputs(2, H, T, 16), documents(layout, 2, T)
    want = forward_backward(by_the_definition, {name: t.double() for name, t in x.items()}, where, window, torch.tensor(SCALE).double())
    eager.check(forward_backward(twin, x, where, window, torch.tensor(SCALE)), want, TOLERANCE, layout)

def test_twin_with_a_window_of_one_key():
    """A probability of 1 has no gradient, so that q and k have none, nor is there a norm for an error to be a part of."""
    x, where = inputs(1, 2, 40, 16), documents("one document", 1, 40)
    got, want = (forward_backward(dc, x, where, 1, torch.tensor(SCALE)) for dc in (twin, by_the_definition))
    assert all(float(found.pop(name).abs().max()) < 1e-5 for name in "qk" for found in (got, want))
    eager.check(got, want, TOLERANCE, "one key")

# -----------------------------------------------------------------------------
# The kernels against the twin

def check_kernels(rows, H, T, D, window, layout, dtype, chip="v6e"):
    x, args = inputs(rows, H, T, D, dtype), (documents(layout, rows, T), window, torch.tensor(SCALE))
    want = forward_backward(twin, {name: t.float() for name, t in x.items()}, *args)
    with eager.eager(kernels=True, chip=chip):
        got = forward_backward(fused_dc, x, *args)
    assert eager.calls == ["dc_forward", "dc_backward"]
    eager.check(got, want, TOLERANCE if dtype == torch.float32 else 2e-2, layout)

@pytest.mark.parametrize("rows, H, T, window, layout, dtype", [
    (2, 2, 384, 112, "off block edges", torch.float32),  # the record's window; blocks of one tile; rows
    (1, 3, 512, 300, "single tokens", torch.float32),  # blocks of two tiles, a window that reaches over one; an odd number of heads
    (1, 2, 384, 1000, "one document", torch.float32),  # a window longer than the row
    (2, 2, 256, 112, "padded", torch.bfloat16),
])
def test_kernels(rows, H, T, window, layout, dtype):
    check_kernels(rows, H, T, 16, window, layout, dtype)

def test_dc_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "target", CHIPS["v6e"])
    def why_not(heads=6, T=1024, C=768, window=112, dtype=torch.bfloat16):
        return dc_refuses(torch.empty(1, T, C, dtype=dtype, device="meta"), heads, window)
    assert why_not() is None and why_not(T=262144) is None and why_not(T=128) is None
    for word, bad in {"bfloat16": dict(dtype=torch.float32), "128 tokens": dict(T=1000), "heads of 128": dict(heads=12),
                      "window of 40000": dict(T=262144, window=40000)}.items():
        assert word in why_not(**bad), (word, why_not(**bad))

@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T, window", [(384, 2), (384, 129), (768, 112), (768, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_kernels_grid(dtype, T, window, layout):
    check_kernels(1, 2, T, 16, window, layout, dtype)

@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v6e", "v5e", "v5p"])
@pytest.mark.parametrize("window", [112, 400])
def test_kernels_at_record_size(window, chip, monkeypatch):
    """The record's heads and head size, three rows a device, a chip's blocks."""
    monkeypatch.setattr(dispatch, "target", CHIPS[chip])
    assert get_dc(3, 6, 1024, 128, 112).block == 256
    check_kernels(3, 6, 1024, 128, window, "off block edges", torch.bfloat16, chip)
