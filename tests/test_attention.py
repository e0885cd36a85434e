"""
Sliding-window attention within documents: the plain-torch twin against a softmax over all T x T scores, and the TPU kernels, interpreted,
against the twin. What comes before attention, and XSA and the gate after it, are held to the plain path by test_block.py, DC by test_dc.py.

    python -m pytest -q tests/test_attention.py -m "not slow"
    python -m pytest -q tests/test_attention.py                 the whole grid, some minutes more
"""
import eager
import numpy as np
import pytest
import torch

from chips import CHIPS
from kernels import dispatch
from kernels.attention import Band, attention_refuses, fused_attention, window_attention

SCALE = 0.12

# Where documents start, by layout, in a row of T tokens
LAYOUTS = {
    "one document": lambda T: [0],
    "on block edges": lambda T: [0, 128, 256],
    "off block edges": lambda T: [0, 5, 127, 129, 300],
    "single tokens": lambda T: [0, 60, *range(120, 140), 250, *range(T - 130, T - 120)],
    "padded": lambda T: [0, 200, *range(T - 70, T)],
}

def documents(layout: str, rows: int, T: int) -> torch.Tensor:
    """[rows, T]. Later rows have their documents elsewhere, so that a mixed-up row shows."""
    first = torch.zeros(rows, T, dtype=torch.int32)
    for r in range(rows):
        for start in sorted({min(s + 37 * r, T - 1) for s in LAYOUTS[layout](T)} - {0}):
            first[r, start:] = start
    return first

def inputs(rows: int, H: int, T: int, D: int, dtype=torch.float32):
    """q and k as QK norm leaves them, v, and the gradient of y."""
    generator = torch.Generator().manual_seed(T + H)
    q, k, v, dy = (torch.randn(rows, H, T, D, generator=generator) for _ in range(4))
    q, k = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (q, k))
    return tuple(x.to(dtype) for x in (q, k, v, dy))

def forward_backward(attention, q, k, v, dy, *args) -> list[np.ndarray]:
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    y = attention(q, k, v, *args)
    return [x.detach().float().numpy() for x in (y, *torch.autograd.grad(y, (q, k, v), dy))]

def check(got, want, tolerance: float, names=("y", "dq", "dk", "dv")):
    """Largest error, as a part of the largest value."""
    for name, a, b in zip(names, got, want, strict=True):
        error = np.abs(np.asarray(a, dtype=np.float32) - b).max() / np.abs(b).max()
        assert error <= tolerance, f"{name}: error {error:.1e}"

# -----------------------------------------------------------------------------
# The twin

def brute_force(q, k, v, documents, window, scale, paired=False):
    """The definition: position i sees max(documents[i], i - window) .. i. Paired heads take turns in a row of 2T."""
    B, H, T, D = q.shape
    if paired:
        interleave = lambda x: torch.stack([x[:, :H // 2], x[:, H // 2:]], dim=3).reshape(B, H // 2, 2 * T, D)
        y = brute_force(*map(interleave, (q, k, v)), (2 * documents).repeat_interleave(2, dim=1), window, scale)
        return torch.cat([y[:, :, 0::2], y[:, :, 1::2]], dim=1)
    i = torch.arange(T)
    first = torch.maximum(documents, i - window)[:, None, :, None]
    scores = (q @ k.mT * scale).masked_fill((i < first) | (i > i[:, None]), -torch.inf)
    return scores.softmax(-1) @ v

@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T, window, paired", [(333, 64, False), (333, 101, True), (300, 700, False), (300, 1, True)])
def test_twin(T, window, paired, layout):
    args = documents(layout, 2, T), window, torch.tensor(SCALE), paired
    x = inputs(2, 4, T, 16)
    check(forward_backward(window_attention, *x, *args), forward_backward(brute_force, *x, *args), 1e-5)

# -----------------------------------------------------------------------------
# The kernels against the twin

def kernels(q, k, v, dy, documents, window, paired, block):
    """y, dq, dk, dv by the Pallas kernels."""
    from kernels.tpu import attention
    B, H, T, D = q.shape
    band, qkv = Band(B, H, T, D, window, paired, block), torch.cat([q, k, v], dim=1)
    args = dict(qkv=qkv, documents=documents, scale=torch.tensor([SCALE]))
    r = eager.call_kernel(attention.attention_forward, band, **args)
    d = eager.call_kernel(attention.attention_backward, band, **args, y=r.y, sums=r.sums, dy=dy.transpose(1, 2).flatten(2))
    return r.y.unflatten(2, (H, D)).transpose(1, 2).float(), *(x.float() for x in (d.dq, d.dk, d.dv))

def check_kernels(rows, H, T, D, window, paired, layout, dtype, block):
    x, where = inputs(rows, H, T, D, dtype), documents(layout, rows, T)
    want = forward_backward(window_attention, *x, where, window, torch.tensor(SCALE), paired)
    check([x.numpy() for x in kernels(*x, where, window, paired, block)], want, 1e-5 if dtype == torch.float32 else 2e-2)

@pytest.mark.parametrize("rows, H, T, window, paired, layout, dtype", [
    (2, 3, 512, 128, False, "single tokens", torch.float32),  # a window of one block; rows
    (1, 2, 384, 200, False, "off block edges", torch.bfloat16),
    (1, 2, 384, 1000, False, "one document", torch.float32),  # a window longer than the row
    (1, 4, 384, 301, True, "off block edges", torch.float32),  # an odd window; pairs of heads
    (2, 2, 384, 256, True, "padded", torch.bfloat16),
])
def test_kernels(rows, H, T, window, paired, layout, dtype):
    check_kernels(rows, H, T, 16, window, paired, layout, dtype, block=128)

class Memory:
    """Where the gradient of the value embeddings goes: what is there before, and what a kernel leaves."""
    def __init__(self, before: torch.Tensor | None):
        self.before = before

    def so_far(self):
        return self.before

    def store(self, total):
        self.after = total

def test_gradient_of_value_embeddings_adds():
    """To this table's share, once and rounded once, or overwrites it; nobody else's share changes."""
    H, T, D, table = 2, 384, 64, 1  # three blocks, which the kernel takes from the last to the first
    C, generator = H * D, torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()
    x, ve, ve_gate_w, before, dy = randn(2, T, C), randn(2, T, 3 * C), randn(H, 12), randn(2, T, 3 * C), randn(2, T, C)
    qk_bank, vo_bank, factors = (C**-0.5 * randn(2 * H, 2 * D, C)).requires_grad_(), C**-0.5 * randn(4, C, C), randn(2, T, D)
    def dve(before, ve_adds) -> torch.Tensor:
        memory = Memory(before)
        with eager.eager(kernels=True):
            y, _, _ = fused_attention(x, qk_bank, vo_bank, 1, torch.ones(1), ve, ve_gate_w, None, *factors, None, documents("padded", 2, T),
                                      100, torch.tensor(SCALE), False, None, None, table, memory, ve_adds)
            y.backward(dy)
        return memory.after.view(2, T, 3, C)
    own, parts = dve(None, ve_adds=False)[:, :, table], before.view(2, T, 3, C)
    assert float(own.float().norm(dim=-1).min()) > 0 and float(own[..., :12].float().norm()) > 0
    for ve_adds, want in {False: own, True: parts[:, :, table] + own}.items():
        got = dve(before, ve_adds)
        assert torch.equal(got[:, :, table], want), f"ve_adds={ve_adds}"
        assert torch.equal(got[:, :, ::2], parts[:, :, ::2]), "another table's share"
    assert torch.equal(dve(None, ve_adds=True)[:, :, table], own), "the first one has nothing to add to"

def test_attention_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "target", CHIPS["v6e"])
    def why_not(heads=6, T=1024, D=128, window=384, paired=False, dtype=torch.bfloat16):
        return attention_refuses(torch.empty(1, T, heads * D, dtype=dtype, device="meta"), heads, window, paired)
    assert why_not() is None and why_not(T=262144, window=2560) is None and why_not(paired=True) is None
    for word, bad in {"bfloat16": dict(dtype=torch.float32), "128 tokens": dict(T=1000), "heads of 128": dict(D=64),
                      "pairs of heads": dict(heads=1), "take pairs of heads": dict(heads=5),
                      "a window of 40000": dict(T=262144, window=40000), "a dimension of 2560": dict(heads=20)}.items():
        assert word in why_not(**bad), (word, why_not(**bad))

@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 128, 384, 420, 900])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_kernels_grid(dtype, paired, window, layout):
    check_kernels(1, 4, 640, 16, window, paired, layout, dtype, block=128)

@pytest.mark.slow
@pytest.mark.parametrize("H, window, paired", [(6, 384, False), (6, 384, True), (6, 768, False), (6, 900, True)])
def test_kernels_at_record_size(H, window, paired):
    """The record's heads, head size and block, three rows a device."""
    check_kernels(3, H, 1024, 128, window, paired, "off block edges", torch.bfloat16, block=256)
