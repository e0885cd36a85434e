"""
The smear gate, norm and the first product of MUDD's gates, for which XLA passes three times over the residual stream, and four on the
way back. Backward, blocks and strips go from the last to the first: a token's share in the next one comes back from there.
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.smear import SmearShapes
from kernels.tpu.common import LANES, Operand, Operands, f32, kernel_call, matmul, normed, scalar

STRIP, TILE = 128, 16  # tokens


def smeared(r, n, begins):
    """
    Strip n of a block -> x and x one token before, float32 [STRIP, d]; the gate's sigmoid [STRIP, 1]; the sum, before its norm. begins:
    whether this is the first block of a row, before whose first token there is nothing.
    """
    dtype = r.x.dtype
    x = r.x[0, pl.ds(pl.multiple_of(n * STRIP, STRIP), STRIP)].astype(f32)
    inside = r.x[0, pl.ds(pl.multiple_of(jnp.maximum(n * STRIP - TILE, 0), TILE), TILE)].astype(f32)
    last = jnp.where(n > 0, inside, jnp.where(begins, 0.0, r.x_before[0].astype(f32)))[TILE - 1:]
    first = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == 0
    before = jnp.where(first, last, pltpu.roll(x, 1, 0))
    logits = (x[:, :LANES] * r.gate_w[...]).sum(1, keepdims=True).astype(dtype)
    sigmoid = jax.nn.sigmoid(logits.astype(f32))
    share = (r.smear_lambda[0] * sigmoid * before).astype(dtype)
    return x, before, sigmoid, (x + share.astype(f32)).astype(dtype)


def smear_forward_kernel(r, shapes: SmearShapes):
    begins = pl.program_id(1) == 0
    def do(n, _):
        strip = pl.ds(pl.multiple_of(n * STRIP, STRIP), STRIP)
        x0 = normed(smeared(r, n, begins)[-1])[0].astype(r.x0.dtype)
        r.x0[0, strip] = x0
        r.h[0, :, strip] = matmul(r.w1[...], x0, transpose_b=True).astype(r.h.dtype)
    jax.lax.fori_loop(0, shapes.block // STRIP, do, None)


def smear_backward_kernel(r, shapes: SmearShapes):
    i, blocks, strips = pl.program_id(1), pl.num_programs(1), shapes.block // STRIP
    @pl.when((pl.program_id(0) == 0) & (i == 0))
    def _():
        r.dgate_w[...] = jnp.zeros_like(r.dgate_w)
        r.dlambda[0] = 0.0
    @pl.when(i == 0)  # the row's last block
    def _():
        r.from_next[...] = jnp.zeros_like(r.from_next)

    def do(k, _):
        n = strips - 1 - k
        strip = pl.ds(pl.multiple_of(n * STRIP, STRIP), STRIP)
        x, before, sigmoid, total = smeared(r, n, i == blocks - 1)
        y, scale = normed(total)
        from_h = matmul(r.dh[0, :, strip].astype(f32).T.astype(r.dh.dtype), r.w1[...])
        d = r.dx0[0, strip].astype(f32) + r.dx0_once[0, strip].astype(f32) + from_h
        d = scale * (d - y * (d * y).mean(1, keepdims=True))
        dgate = (d * before).sum(1, keepdims=True)
        dlogits = dgate * r.smear_lambda[0] * sigmoid * (1 - sigmoid)
        r.dlambda[0] += (dgate * sigmoid).sum()
        r.dgate_w[...] += (dlogits * x[:, :LANES]).sum(0, keepdims=True)
        share = r.smear_lambda[0] * sigmoid * d
        last = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == STRIP - 1
        dx = d + jnp.where(last, r.from_next[:1], pltpu.roll(share, STRIP - 1, 0))
        r.from_next[...] = share[:8]
        r.dx[0, strip, :LANES] = (dx[:, :LANES] + dlogits * r.gate_w[...]).astype(r.dx.dtype)
        if shapes.dim > LANES:
            r.dx[0, strip, LANES:] = dx[:, LANES:].astype(r.dx.dtype)
    jax.lax.fori_loop(0, strips, do, None)


def shared(s: SmearShapes, dtype, block_of):
    """A block of tokens, one of h, the smear gate's weights; what both kernels read. block_of: program id -> block."""
    tokens = Operand((s.rows, s.tokens, s.dim), dtype, (1, s.block, s.dim), lambda row, i: (row, block_of(i), 0))
    h = Operand((s.rows, s.hidden, s.tokens), dtype, (1, s.hidden, s.block), lambda row, i: (row, 0, block_of(i)))
    gate_w = Operand((1, LANES), f32, (1, LANES), lambda row, i: (0, 0), True)
    return tokens, h, gate_w, dict(
        x=tokens,
        x_before=Operand(tokens.shape, dtype, (1, TILE, s.dim),
                         lambda row, i: (row, jnp.maximum(block_of(i) * (s.block // TILE) - 1, 0), 0)),
        gate_w=gate_w,
        smear_lambda=scalar(),
        w1=Operand((s.hidden, s.dim), dtype, (s.hidden, s.dim), lambda row, i: (0, 0), True))


def forward_operands(s: SmearShapes, dtype) -> Operands:
    tokens, h, _, inputs = shared(s, dtype, lambda i: i)
    return Operands(inputs=inputs, outputs=dict(x0=tokens, h=h))


def smear_forward(s: SmearShapes, dtype, interpret=False):
    """A function (x [R, T, d], gate_w [1, 128] f32, smear_lambda [1] f32, w1 [n, d]) -> x0 as x, h [R, n, T]."""
    call = kernel_call(smear_forward_kernel, s, (s.rows, s.tokens // s.block), forward_operands(s, dtype), interpret)
    return lambda x, **arrays: call(x=x, x_before=x, **arrays)


def backward_operands(s: SmearShapes, dtype) -> Operands:
    blocks = s.tokens // s.block
    tokens, h, gate_w, inputs = shared(s, dtype, lambda i: blocks - 1 - i)
    return Operands(
        inputs=inputs | dict(
            dx0=tokens,
            dx0_once=tokens,
            dh=h),
        outputs=dict(
            dx=tokens,
            dgate_w=gate_w,
            dlambda=scalar()),
        scratch=dict(
            from_next=((8, s.dim), f32)))  # what comes back to a token from the next one, of another strip


def smear_backward(s: SmearShapes, dtype, interpret=False):
    """A function (what smear_forward's takes; dx0, dx0_once as x, dh as h) -> dx, dgate_w [1, 128] f32, dlambda [1] f32."""
    call = kernel_call(smear_backward_kernel, s, (s.rows, s.tokens // s.block), backward_operands(s, dtype), interpret)
    return lambda x, **arrays: call(x=x, x_before=x, **arrays)


def vmem_bytes(s: SmearShapes, dtype) -> int:
    return max(forward_operands(s, dtype).vmem_bytes, backward_operands(s, dtype).vmem_bytes)
