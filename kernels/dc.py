"""
DC, dynamically composable attention: what a layer adds to attention's y. The probabilities of all heads, of a softmax over a short window
of its own, are mixed into one matrix (w1), which each head applies to its own values and weighs (w2). dc_attention is the plain-torch twin,
tpu/dc.py the TPU kernels. Upstream's counterpart is dc_triton_kernels.py, post-only.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import BandedAttention
from kernels.dispatch import call_kernel, largest_fitting

# -----------------------------------------------------------------------------
# The plain-torch twin of the kernels

def dc_attention(qkv: Tensor, y: Tensor, w1: Tensor, w2: Tensor, documents: Tensor, window: int, scale: Tensor) -> Tensor:
    """
    y_h + w2_h * (A @ v_h) with A = sum over heads of w1_h * softmax(scale * q_h @ k_h.T), where position i sees positions
    max(documents[i], i - (window - 1)) .. i, both ends included: window counts keys.

    qkv: [B, 3H, T, D], heads of q, then of k, then of v. y: [B, T, H * D]. w1, w2: [B, T, H], of the query.
    documents: [B, T] int32, the position in its row at which each token's document starts. scale: 0-D float32. Returns [B, T, H * D] in
    y's dtype.
    """
    return BandedDC.apply(qkv, y, w1, w2, documents, window, scale)

class BandedDC(torch.autograd.Function):
    """In blocks, as BandedAttention. The backward pass recomputes the probabilities."""
    @staticmethod
    def mixed(qkv, w1, w2, documents, window, scale):
        q_, k_, v_, visible, block, sizes = BandedAttention.bands(*qkv.chunk(3, dim=1), documents, window - 1)
        p = (q_ @ k_.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1)  # [B, H, nb, C, (n + 1) * C]
        w1_, w2_ = (block(w.mT.unsqueeze(-1)) for w in (w1, w2))  # [B, H, nb, C, 1]
        return q_, k_, v_, p, w1_, w2_, (w1_ * p).sum(1, keepdim=True), block, sizes

    @staticmethod
    def forward(ctx, qkv, y, w1, w2, documents, window, scale):
        _, _, v_, _, _, w2_, A, _, (T, _, _, _) = BandedDC.mixed(qkv, w1, w2, documents, window, scale)
        correction = (w2_ * (A.to(qkv.dtype).float() @ v_)).flatten(2, 3)[:, :, :T]
        ctx.window = window
        ctx.save_for_backward(qkv, w1, w2, documents, scale)
        return (y.float() + correction.transpose(1, 2).flatten(2)).to(y.dtype)

    @staticmethod
    def backward(ctx, dy):
        qkv, w1, w2, documents, scale = ctx.saved_tensors
        q_, k_, v_, p, w1_, w2_, A, block, (T, C, nb, n) = BandedDC.mixed(qkv, w1, w2, documents, ctx.window, scale)
        rounded = lambda x: x.to(qkv.dtype).float()
        dy_ = block(dy.unflatten(2, (-1, qkv.size(3))).transpose(1, 2))
        through_v = dy_ @ v_.mT  # [B, H, nb, C, (n + 1) * C]
        dw2 = (A * through_v).sum(-1, keepdim=True)
        dA = (w2_ * through_v).sum(1, keepdim=True)
        dw1 = (p * dA).sum(-1, keepdim=True)
        ds = rounded(w1_ * p * (dA - dw1) * scale)
        def unband(g):  # adds up what each key received from the n + 1 blocks of queries that see it
            parts = g.unflatten(3, (n + 1, C)).unbind(3)
            return sum(F.pad(x.flatten(2, 3), (0, 0, j * C, (n - j) * C)) for j, x in enumerate(parts))[:, :, n * C:n * C + T]
        dq = (ds @ k_).flatten(2, 3)[:, :, :T]
        dk = unband(ds.mT @ q_)
        dv = unband(rounded(A).mT @ rounded(w2_ * dy_))
        per_token = lambda x: x.flatten(2)[:, :, :T].mT
        return torch.cat([dq, dk, dv], dim=1).to(qkv.dtype), dy, per_token(dw1).to(w1.dtype), per_token(dw2).to(w2.dtype), None, None, None

# -----------------------------------------------------------------------------
# The kernels

@dataclass(frozen=True)
class DCShapes:
    """The shapes of the kernels on one device. A key: each is lowered once."""
    rows: int  # R
    heads: int  # H
    tokens: int  # T
    dim: int  # D, of a head
    window: int  # keys
    block: int  # tokens of a program of the grid
    tile: int = 128  # C, queries that meet their keys at once

    @property
    def blocks(self) -> int:
        return self.tokens // self.block

    @property
    def reach(self) -> int:
        """How many tiles back a tile of queries may see."""
        return min(-(-(self.window - 1) // self.tile), self.tokens // self.tile - 1)

    @property
    def keys(self) -> int:
        """N, those that a tile of queries may see."""
        return (self.reach + 1) * self.tile

    @property
    def late(self) -> int:
        """How many blocks back a block of queries may see."""
        return -(-self.reach * self.tile // self.block)

    @property
    def band(self) -> int:
        """Keys that are in VMEM at a time."""
        return (self.late + 1) * self.block


def get_dc(B: int, H: int, T: int, D: int, window: int) -> DCShapes | None:
    """None where no block fits in VMEM."""
    from kernels.tpu.dc import vmem_bytes
    choices = [DCShapes(B, H, T, D, window, block) for block in (256, 128) if T % block == 0]
    return largest_fitting(choices, lambda shapes: vmem_bytes(shapes, "bfloat16"))


def dc_refuses(x: Tensor, heads: int, window: int) -> str | None:
    """What keeps x [B, T, C] from the TPU kernels, or None."""
    B, T, C = x.shape
    if x.dtype != torch.bfloat16:
        return "they take bfloat16"
    if C != heads * 128:
        return "they take heads of 128"
    if T % 128:
        return "they take a multiple of 128 tokens"
    if get_dc(B, heads, T, 128, window) is None:
        return f"DC's window of {window} does not fit in VMEM"
    return None


def fused_dc(qkv: Tensor, y: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, documents: Tensor, window: int, scale: Tensor) -> Tensor:
    """dc_attention times the gate, by the TPU kernels. gate, w1, w2: [B, T, H] float32; the rest as dc_attention."""
    return FusedDC.apply(qkv, y, gate, w1, w2, documents, window, scale)


class FusedDC(torch.autograd.Function):
    """fused_dc. Of the forward pass nothing is kept but its operands."""
    @staticmethod
    def forward(ctx, qkv, y, gate, w1, w2, documents, window, scale):
        from kernels.tpu import dc
        B, heads, T, D = qkv.shape
        ctx.shapes = get_dc(B, heads // 3, T, D, window)
        inputs = dict(qkv=qkv, documents=documents, y=y, gate=gate.mT, w1=w1.mT, w2=w2.mT, scale=scale.float().reshape(1))
        ctx.names = list(inputs)
        ctx.save_for_backward(*inputs.values())
        return call_kernel(dc.dc_forward, ctx.shapes, **inputs).out

    @staticmethod
    def backward(ctx, dout):
        from kernels.tpu import dc
        inputs = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        d = call_kernel(dc.dc_backward, ctx.shapes, **inputs, dout=dout)
        return d.dqkv, d.dy, d.dgate.mT, d.dw1.mT, d.dw2.mT, None, None, None
