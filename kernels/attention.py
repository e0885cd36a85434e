"""
Attention: what comes before it in a block (norm, projection, QK norm, rotary embedding, key offset, value embedding), sliding-window
attention within documents, and what comes after it (exclusive self-attention, a gate). The plain-torch twin of all of it is
CausalSelfAttention.forward in train_gpt_xla.py, with window_attention below; the TPU kernels are tpu/projection.py and tpu/attention.py.
Upstream's counterpart is FlashAttention-3 (flash_attn_varlen_func with cu_seqlens and window_size=(window, 0)).
"""
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gradients import stack_of
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
    xsa: bool = False  # exclusive self-attention follows
    gate: bool = False  # then a gate
    keep: bool = True  # store what the backward pass reads: y before these two
    more: bool = False  # backward, other gradients of q, k and v are added

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
    banks: tuple[int, int]  # matrices in qk_bank and vo_bank
    key_offset: bool
    tables: int  # of value embeddings, side by side; 0 without any
    aux_v: bool  # something else that is added to v
    keep: bool  # store what the backward pass reads: q and k before their norm
    block: int  # bt, tokens
    gate: int = 12  # features that the gate of value embeddings reads
    on_top: bool = False  # weights' gradients are added to float32 sums
    dve: str = "one"  # value embeddings' gradient: this table's; "new": memory for all tables' with it; "on": in such memory, which goes on
    dve_adds: bool = False  # with dve "on", it is added to what this table's part has
    dx_on_top: bool = False  # x's gradient is added to what came back to it by other ways


def get_band(B: int, H: int, T: int, D: int, window: int, paired: bool, xsa=False, gate=False, keep=True) -> Band | None:
    """None where no block fits in VMEM. Which operands there are doesn't change the block."""
    from kernels.tpu.attention import vmem_bytes
    choices = [Band(B, H, T, D, window, paired, block, *(not paired,) * 2, True, not paired) for block in (256, 128) if T % block == 0]
    largest = largest_fitting(choices, lambda band: vmem_bytes(band, "bfloat16"))
    return largest and dataclasses.replace(largest, xsa=xsa, gate=gate, keep=keep, more=False)


def get_projection(B: int, H: int, T: int, D: int, paired: bool, banks: tuple[int, int], key_offset: bool, tables: int, aux_v: bool,
                   keep: bool, gate: int = 12) -> Projection | None:
    """None where no block fits in VMEM. All calls of a step take the same, that of the largest."""
    from kernels.tpu.projection import vmem_bytes
    choices = [Projection(B, H, T, D, paired, banks, key_offset, 1, True, True, block, gate, dve="on", dve_adds=True, dx_on_top=True)
               for block in (512, 256, 128) if T % block == 0]
    largest = largest_fitting(choices, lambda shapes: vmem_bytes(shapes, "bfloat16"))
    return largest and dataclasses.replace(largest, tables=tables, aux_v=aux_v, keep=keep, dve="one", dve_adds=False, dx_on_top=False)


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
    if heads < 2 or heads % 2:
        return "they take pairs of heads"
    if get_band(B, heads, T, D, window, paired) is None:
        return f"a window of {window} does not fit in VMEM"
    if get_projection(B, heads, T, D, paired, (heads, 2), True, 1, True, True) is None:
        return f"a dimension of {C} does not fit in VMEM"
    return None


def fused_attention(
        x: Tensor,  # [B, T, C]
        qk_bank: Tensor,  # [n, 2D, C], of a layer H of them: H/2 pairs of heads of Q, then of K
        vo_bank: Tensor,  # [m, C, C], V and O of each layer
        layer: int,
        lambda_w: Tensor,  # [1] float32, multiplies Q, K and V
        ve: Tensor | None,  # value embeddings [B, T, tables * C]
        ve_gate_w: Tensor | None,  # [H, n], of their gate, which reads n/2 features of norm(x) and n/2 of the embedding
        aux_v: Tensor | None,  # [B, T, C], added to v
        factor1: Tensor,  # rotary, [T, D] or, paired, [2, T, D]
        factor2: Tensor,
        still: Tensor | None,  # [D] bool, the dims of the key offset; None without one
        documents: Tensor,  # as window_attention, with the next three
        window: int,
        scale: Tensor,
        paired: bool,
        xsa: Tensor | None,  # [B, T, H] float32, how much of y along v is taken away: its tanh
        gate: Tensor | None,  # [B, T, H] float32, multiplies y then
        table: int = 0,  # whose embeddings these are
        ve_sum=None,
        ve_adds: bool = False,
        keep: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """
    norm(x) @ W.T and all else that comes before attention, window_attention, XSA and the gate, by two kernels.
    Returns y [B, T, C], tokens before heads, as matmuls want it, what attention has read, qkv [B, 3H, T, D], and x for whoever else reads
    it: what comes back to it is added in the kernel.

    ve_sum: where the gradient of ve goes. so_far() -> memory as ve with the other tables' share, or None if this is the first one: then
    in what is stored only this table's share means something. store(tensor) -> what autograd gets. None: all of it goes to autograd.
    ve_adds: the memory has a share of this table, too, to which this layer's is added. Otherwise it is overwritten.
    keep: qkv, and q and k before their norm, are stored for the backward pass, which otherwise computes them again.
    """
    into, grad = (stack_of(qk_bank), stack_of(vo_bank), None if ve is None else ve_sum), torch.is_grad_enabled()
    return FusedAttention.apply(x, qk_bank, vo_bank, layer, lambda_w, ve, ve_gate_w, aux_v, factor1, factor2, still, documents, window,
                                scale, paired, xsa, gate, table, grad, into, ve_adds, keep)


class FusedAttention(torch.autograd.Function):
    """fused_attention. grad: there will be a backward pass. into: where the gradients of qk_bank, vo_bank (gradients.Stack) and ve go."""
    @staticmethod
    def forward(ctx, x, qk_bank, vo_bank, layer, lambda_w, ve, ve_gate_w, aux_v, factor1, factor2, still, documents, window, scale, paired,
                xsa, gate, table, grad, into, ve_adds, keep):
        from kernels.tpu import attention, projection
        ctx.set_materialize_grads(False)
        (B, T, C), D = x.shape, factor1.size(-1)
        number = lambda n: torch.full((1,), n, dtype=torch.int32, device=x.device)
        by_head = lambda x: None if x is None else x.float().transpose(1, 2)
        tables, banks = 0 if ve is None else ve.size(2) // C, (len(qk_bank), len(vo_bank))
        shapes = get_projection(B, C // D, T, D, paired, banks, still is not None, tables, aux_v is not None, grad,
                                12 if ve is None else ve_gate_w.size(1))
        band = get_band(B, C // D, T, D, window, paired, xsa is not None, gate is not None, grad)
        inputs = dict(
            layer=number(layer), table=None if ve is None else number(table), x=x, qk=qk_bank, vo=vo_bank, lambda_w=lambda_w,
            factor1=factor1.view(-1, T, D), factor2=factor2.view(-1, T, D), still=None if still is None else still.view(1, D).float(),
            ve=ve, ve_gate_w=ve_gate_w, aux_v=aux_v)
        then = dict(documents=documents, scale=scale.float().reshape(1), xsa=by_head(xsa), gate=by_head(gate))
        before = call_kernel(projection.project, dataclasses.replace(shapes, keep=grad and keep), **inputs)
        after = call_kernel(attention.attention_forward, band, qkv=before.qkv, **then)
        ctx.shapes, ctx.band, ctx.part, ctx.into, ctx.names = shapes, band, (layer, table, ve_adds), into, (list(inputs), list(then))
        ctx.save_for_backward(*inputs.values(), *then.values(), before.raw, before.qkv if keep else None,
                              after.y if after.y_raw is None else after.y_raw, after.sums)
        return after.y, before.qkv, x

    @staticmethod
    def backward(ctx, dy, dqkv, dx):
        from kernels.tpu import attention, projection
        names, (layer, table, ve_adds), (into_qk, into_vo, into_ve) = ctx.names, ctx.part, ctx.into
        *saved, raw, qkv, y, sums = ctx.saved_tensors
        inputs, then = dict(zip(names[0], saved)), dict(zip(names[1], saved[len(names[0]):], strict=True))
        if raw is None:
            again = call_kernel(projection.project, ctx.shapes, **inputs)
            qkv, raw = again.qkv, again.raw
        band = dataclasses.replace(ctx.band, more=dqkv is not None)
        after = call_kernel(attention.attention_backward, band, qkv=qkv, **then, y=y, sums=sums, dy=dy, dqkv=dqkv)
        assert into_qk.on_top == into_vo.on_top
        so_far = None if into_ve is None else into_ve.so_far()
        shapes = dataclasses.replace(ctx.shapes, on_top=into_qk.on_top, dve="one" if into_ve is None else "new" if so_far is None else "on",
                                     dve_adds=ve_adds and so_far is not None, dx_on_top=dx is not None)
        d = call_kernel(
            projection.project_backward, shapes, **inputs, qk_stack=into_qk.so_far(inputs["qk"]), vo_stack=into_vo.so_far(inputs["vo"]),
            dve_so_far=so_far, dx_so_far=dx, raw=raw, dq=after.dq, dk=after.dk, dv=after.dv)
        dve, by_token = d.dve, lambda x: None if x is None else x.transpose(1, 2)
        if into_ve is not None:
            dve = into_ve.store(dve)
        elif shapes.tables > 1:
            C = dy.size(2)
            dve = F.pad(dve, (table * C, (shapes.tables - 1 - table) * C))
        return (d.dx, into_qk.store(d.qk_stack, ("qk", layer)), into_vo.store(d.vo_stack, ("v", layer)), None, d.dlambda_w, dve,
                d.dve_gate_w, d.daux_v, *[None] * 7, by_token(after.dxsa), by_token(after.dgate), *[None] * 5)
