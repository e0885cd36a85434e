"""
Attention: what comes before it in a block (the mix of x with x0, norm, projection, gates, QK norm, rotary embedding, key offset, value
embedding), and sliding-window attention within documents. The plain-torch twin of all of it is Block.forward and
CausalSelfAttention.forward in train_gpt_xla.py, with window_attention below; the TPU kernels are tpu/projection.py and tpu/attention.py.
Upstream's counterpart is FlashAttention-3 (flash_attn_varlen_func with cu_seqlens and window_size=(window, 0)).
"""
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gradients import slots
from kernels.dispatch import call_kernel, largest_fitting

# -----------------------------------------------------------------------------
# The plain-torch twin of the attention kernels

def window_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, scale: Tensor, paired: bool = False) -> Tensor:
    """
    softmax(scale * q @ k.T) @ v where position i sees positions max(documents[i], i - window) .. i, both ends included.

    q, k, v: [B, H, T, D]. documents: [B, T] int32, the position in its row at which each token's document starts.
    window: tokens. scale: 0-D float32. Returns [B, H, T, D] in q's dtype.
    paired: heads h and h + H/2 form one sequence of length 2T, in which they take turns (position 2t, then 2t + 1);
    window counts positions of that sequence.
    """
    if not paired:
        return BandedAttention.apply(q, k, v, documents, window, scale)
    turns = lambda x: torch.stack(x.chunk(2, dim=1), dim=3).flatten(2, 3)  # [B, H, T, D] -> [B, H/2, 2T, D]
    y = BandedAttention.apply(turns(q), turns(k), turns(v), 2 * documents.repeat_interleave(2, dim=1), window, scale)
    return torch.cat(y.unflatten(2, (-1, 2)).unbind(3), dim=1)

class BandedAttention(torch.autograd.Function):
    """
    Queries in blocks of C, each against its own block of keys and the n before it that the window can reach, so memory is
    O(T x window). The backward pass recomputes the probabilities, as FlashAttention does.
    """
    @staticmethod
    def bands(q, k, v, documents, window):
        T = q.size(2)
        C = 1 << min(9, max(4, window.bit_length() - 1))  # largest power of two within the window, from 16 to 512
        nb = -(-T // C)
        n = min(-(-window // C), nb - 1)
        block = lambda x: F.pad(x, (0, 0, 0, nb * C - T)).unflatten(2, (nb, C)).float()  # [B, H, nb, C, D]
        def band(x):  # [B, H, nb, (n + 1) * C, D]
            x = F.pad(x, (0, 0, n * C, nb * C - T))
            return torch.cat([x[:, :, j * C:(j + nb) * C].unflatten(2, (nb, C)) for j in range(n + 1)], dim=3).float()
        pos = torch.arange(nb * C, device=q.device, dtype=torch.int32)
        first = torch.maximum(F.pad(documents, (0, nb * C - T)), pos - window)  # [B, nb * C]
        first = torch.minimum(first, pos).view(-1, 1, nb, C, 1)
        q_pos = pos.view(nb, C, 1)
        k_pos = q_pos[:, :1] + torch.arange(-n * C, C, device=q.device, dtype=torch.int32)  # [nb, 1, (n + 1) * C]
        return block(q), band(k), band(v), (k_pos >= first) & (k_pos <= q_pos), block, (T, C, nb, n)

    @staticmethod
    def forward(ctx, q, k, v, documents, window, scale):
        q_, k_, v_, visible, _, (T, C, nb, n) = BandedAttention.bands(q, k, v, documents, window)
        s = (q_ @ k_.mT * scale).masked_fill(~visible, -torch.inf)
        lse = s.logsumexp(-1, keepdim=True)  # [B, H, nb, C, 1]
        y = ((s - lse).exp().to(v.dtype).float() @ v_).flatten(2, 3)[:, :, :T].to(q.dtype)
        ctx.window = window
        ctx.save_for_backward(q, k, v, documents, scale, y, lse)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, documents, scale, y, lse = ctx.saved_tensors
        q_, k_, v_, visible, block, (T, C, nb, n) = BandedAttention.bands(q, k, v, documents, ctx.window)
        dy_ = block(dy)
        p = (q_ @ k_.mT * scale - lse).masked_fill(~visible, -torch.inf).exp()
        delta = (dy_ * block(y)).sum(-1, keepdim=True)
        ds = (p * (dy_ @ v_.mT - delta) * scale).to(q.dtype).float()
        def unband(g):  # adds up what each key received from the n + 1 blocks of queries that see it
            parts = g.unflatten(3, (n + 1, C)).unbind(3)
            return sum(F.pad(x.flatten(2, 3), (0, 0, j * C, (n - j) * C)) for j, x in enumerate(parts))[:, :, n * C:n * C + T]
        dq = (ds @ k_).flatten(2, 3)[:, :, :T]
        dk = unband(ds.mT @ q_)
        dv = unband(p.to(q.dtype).float().mT @ dy_)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None

# -----------------------------------------------------------------------------
# The kernels

@dataclass(frozen=True)
class Band:
    """The shapes of the attention kernels on one device, and which blocks and heads meet. A key: each Band is lowered once."""
    rows: int  # R
    heads: int  # H
    tokens: int  # T
    dim: int  # D, of a head
    window: int  # in positions: two to a token if paired
    paired: bool
    block: int  # C, tokens

    @property
    def streams(self) -> int:
        return 2 if self.paired else 1

    @property
    def blocks(self) -> int:
        return self.tokens // self.block

    @property
    def reach(self) -> int:
        """How many blocks back a block of queries may see."""
        return min(-(-self.window // (self.streams * self.block)), self.blocks - 1)

    @property
    def meetings(self) -> list[tuple[int, int, int, int]]:
        """(stream of the queries, stream of the keys, head of the queries, head of the keys) of all heads that meet."""
        n = self.heads // self.streams
        return [(a, b, a * n + h, b * n + h) for a in range(self.streams) for b in range(self.streams) for h in range(n)]


@dataclass(frozen=True)
class Projection:
    """The shapes of the projection kernels on one device, and which operands there are. A key: each is lowered once."""
    rows: int  # R
    heads: int  # H
    tokens: int  # T
    dim: int  # D, of a head
    paired: bool
    key_offset: bool
    ve: bool  # value embeddings
    mix: bool  # x is mixed with x0 first
    keep: bool  # store what the backward pass reads: q and k before their norm
    gate: int  # features that gates read
    block: int  # bt, tokens
    on_top: bool = False  # W's gradient is added to a float32 sum


def get_band(B: int, H: int, T: int, D: int, window: int, paired: bool) -> Band | None:
    """None where no block fits in VMEM."""
    from kernels.tpu.attention import vmem_bytes
    choices = [Band(B, H, T, D, window, paired, block) for block in (256, 128) if T % block == 0]
    return largest_fitting(choices, lambda band: vmem_bytes(band, "bfloat16"))


def get_projection(B: int, H: int, T: int, D: int, paired: bool, key_offset: bool, ve: bool, mix: bool, keep: bool,
                   gate: int = 12) -> Projection | None:
    """None where no block fits in VMEM. All calls of a step take the same, that of the largest."""
    from kernels.tpu.projection import vmem_bytes
    choices = [Projection(B, H, T, D, paired, key_offset, True, True, True, gate, block) for block in (512, 256, 128) if T % block == 0]
    largest = largest_fitting(choices, lambda shapes: vmem_bytes(shapes, "bfloat16"))
    return largest and dataclasses.replace(largest, ve=ve, mix=mix, keep=keep)


def attention_refuses(x: Tensor, heads: int, window: int, paired: bool) -> str | None:
    """What keeps x [B, T, C] from the TPU kernels, or None."""
    B, T, C = x.shape
    D = C // heads
    if x.dtype != torch.bfloat16:
        return "they take bfloat16"
    if D != 128:
        return "they take heads of 128"
    if T % 128:
        return "they take a multiple of 128 tokens"
    if heads < 2 or (paired and heads % 2):
        return "they take two heads or more, paired ones even in number"
    if get_band(B, heads, T, D, window, paired) is None:
        return f"a window of {window} does not fit in VMEM"
    if get_projection(B, heads, T, D, paired, True, True, True, True) is None:
        return f"a dimension of {C} does not fit in VMEM"
    return None


def fused_attention(
        x: Tensor,  # [B, T, C]
        lambda_x: Tensor | None,  # [1] float32
        x0: Tensor | None,  # [B, T, C]
        lambda_x0: Tensor | None,
        W: Tensor,  # [4C, C], of which it takes the first 3C rows
        lambda_w: Tensor,
        gate_w: Tensor,  # [H, n], of the result's gate, which reads n features
        ve: Tensor | None,  # value embeddings [B, T, C]
        ve_gate_w: Tensor | None,  # [H, n]
        factor1: Tensor,  # rotary, [T, D] or, paired, [2, T, D]
        factor2: Tensor,
        still: Tensor | None,  # [D] bool, the dims of the key offset; None without one
        documents: Tensor,  # the rest as window_attention
        window: int,
        scale: Tensor,
        paired: bool) -> tuple[Tensor, Tensor]:
    """
    All that comes before attention, window_attention and its gate, by two kernels.
    Returns y [B, T, C], tokens before heads, as matmuls want it, and lambda_x * x + lambda_x0 * x0, or x.
    """
    (into,) = slots(W)
    return FusedAttention.apply(x, lambda_x, x0, lambda_x0, W, lambda_w, gate_w, ve, ve_gate_w, factor1, factor2, still, documents, window,
                                scale, paired, torch.is_grad_enabled(), into)


class FusedAttention(torch.autograd.Function):
    """fused_attention. keep: there will be a backward pass. into: where the gradient of W goes (gradients.Slot)."""
    @staticmethod
    def forward(ctx, x, lambda_x, x0, lambda_x0, W, lambda_w, gate_w, ve, ve_gate_w, factor1, factor2, still, documents, window, scale,
                paired, keep, into):
        from kernels.tpu import attention, projection
        (B, T, _), H, D = x.shape, gate_w.size(0), factor1.size(-1)
        shapes = ctx.shapes = get_projection(B, H, T, D, paired, still is not None, ve is not None, x0 is not None, keep, gate_w.size(1))
        band = ctx.band = get_band(B, H, T, D, window, paired)
        ctx.into, scale = into, scale.float().reshape(1)
        factor1, factor2 = factor1.view(-1, T, D), factor2.view(-1, T, D)
        still = None if still is None else still.view(1, D).float()
        inputs = dict(x=x, W=W, lambda_w=lambda_w, lambda_x=lambda_x, lambda_x0=lambda_x0, gate_w=gate_w, factor1=factor1, factor2=factor2,
                      still=still, ve=ve, ve_gate_w=ve_gate_w, x0=x0)
        before = call_kernel(projection.project, shapes, **inputs)
        qkv = before.qkv
        after = call_kernel(attention.attention_forward, band, qkv=qkv, documents=documents, gate=before.gate, scale=scale)
        saved = inputs | dict(documents=documents, scale=scale, qkv=qkv, gate=before.gate, y=after.y, sums=after.sums, raw=before.raw)
        ctx.names = list(saved)
        ctx.save_for_backward(*saved.values())
        return after.y, before.x_mixed if shapes.mix else x

    @staticmethod
    def backward(ctx, dy, dx_mixed):
        from kernels.tpu import attention, projection
        s = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        documents, scale, qkv, gate, y, sums, raw = (s.pop(name) for name in ("documents", "scale", "qkv", "gate", "y", "sums", "raw"))
        ve, ve_gate_w, x0 = (s.pop(name) for name in ("ve", "ve_gate_w", "x0"))
        d = call_kernel(attention.attention_backward, ctx.band, qkv=qkv, documents=documents, gate=gate, scale=scale, y=y, sums=sums, dy=dy)
        shapes = dataclasses.replace(ctx.shapes, on_top=ctx.into.stack.on_top)
        d = call_kernel(
            projection.project_backward, shapes, slot=ctx.into.index(dy), stack=ctx.into.so_far(s["W"]), **s, raw=raw, dq=d.dq, dk=d.dk,
            dv=d.dv, gate=gate, delta=d.delta, ve=ve, ve_gate_w=ve_gate_w, x0=x0, dx_mixed=dx_mixed if ctx.shapes.mix else None)
        dx = d.dx if ctx.shapes.mix else d.dx + dx_mixed
        dW = ctx.into.store(d.stack, "qkv")
        return dx, d.dlambda_x, d.dx0, d.dlambda_x0, dW, d.dlambda_w, d.dgate_w, d.dve, d.dve_gate_w, *[None] * 9
