"""
DC, dynamically composable attention, forward and backward, with the gate that follows. The plain-torch twin is kernels.dc.dc_attention.

A row is cut into blocks of C tokens. A program of the grid has one block of queries, all heads of it, and sees all keys of theirs at
once: those of its own block and of the few before it that the short window reaches, which wait in VMEM as a band of N keys that moves on
by a block from program to program. So nothing of the softmax has to be kept for the backward pass, and A, the mix of all heads, is whole
before a head uses it.

- Scores lie as [N keys, C queries]: what belongs to a query (its sum, its weights) then runs along the lanes, as it does in HBM.
- No running maximum: QK norm keeps |scale * q @ k| below scale * D, about 18, so exp cannot overflow.
- Backward, dk and dv of a block are complete when the block `reach` after it has been a block of queries. They gather in bands that move
  as the keys' do; dq waits in another, so that dq, dk and dv of a block leave together, as one block of the gradient of qkv.
- A head's share in A's gradient goes through its values: G = v @ dy.T. That of w2 is the sum of A * G, and needs no A @ v.
"""
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.dc import DCShapes
from kernels.tpu.common import Operand, Operands, f32, kernel_call, matmul, scalar, stream

# -----------------------------------------------------------------------------
# What both kernels do

def start_row(*bands):
    """Before a row's first block there is nothing."""
    @pl.when(pl.program_id(1) == 0)
    def _():
        for band in bands:
            band[...] = jnp.zeros(band.shape, band.dtype)


def move_on(C, *bands):
    """Bands [H, N, D] by a block: the oldest goes, and the newest's place may be written."""
    for band in bands:
        H, N, _ = band.shape
        for h in range(H if N > C else 0):
            band[h, :N - C] = band[h, C:]


def mask(r, shapes: DCShapes, i):
    """[N keys, C queries]: 0 where they see each other, -1e9 where not, as before the row's first token."""
    N, C = shapes.band, shapes.block
    query = i * C + jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)
    key = (i + 1) * C - N + jax.lax.broadcasted_iota(jnp.int32, (N, C), 0)
    first = jnp.maximum(r.documents[0], query - (shapes.window - 1))
    return jnp.where((key >= first) & (key <= query), 0.0, -1e9).astype(f32)


def mix(r, shapes: DCShapes, i, keep=lambda h, p, weight: None):
    """A [N, C] float32, the sum over heads of weight * p, where p are exponentials, and weight [1, C], w1 over their sum."""
    visible = mask(r, shapes, i)
    total = []

    def to_scores(h):
        return matmul(r.k_band[h], r.q[0, h], transpose_b=True)

    def to_probs(h, scores):
        p = 2.0 ** (scores * (r.scale[0] * math.log2(math.e)) + visible)
        weight = 1 / p.sum(0, keepdims=True)
        keep(h, p, weight)
        mixed = p * (weight * r.w1[0, h:h + 1])
        total[:] = [total[0] + mixed if total else mixed]
    stream(range(shapes.heads), to_scores, to_probs, lambda h, _: None)
    return total[0]


def columns(numbers):
    """[H, C] -> a function of h: [C, 1]."""
    numbers = numbers.T
    return lambda h: numbers[:, h:h + 1]

# -----------------------------------------------------------------------------
# The kernels

def dc_forward_kernel(r, shapes: DCShapes):
    """One block of queries: y plus the correction, times the gate."""
    i, C, D = pl.program_id(1), shapes.block, shapes.dim
    start_row(r.k_band, r.v_band)
    move_on(C, r.k_band, r.v_band)
    r.k_band[:, -C:], r.v_band[:, -C:] = r.k[0], r.v[0]
    A = mix(r, shapes, i).astype(r.v.dtype).T
    w2, gate = columns(r.w2[0]), columns(r.gate[0])
    for h in range(shapes.heads):
        at = slice(h * D, (h + 1) * D)
        y = r.y[0, :, at].astype(f32) + matmul(A, r.v_band[h]) * w2(h)
        r.out[0, :, at] = (y * gate(h)).astype(r.out.dtype)


def forward_operands(shapes: DCShapes, dtype) -> Operands:
    R, H, T, D, C, N = shapes.rows, shapes.heads, shapes.tokens, shapes.dim, shapes.block, shapes.band
    heads = lambda third: Operand((R, 3 * H, T, D), dtype, (1, H, C, D), lambda row, i: (row, third, i, 0))
    numbers = lambda n, dtype=f32: Operand((R, n, T), dtype, (1, n, C), lambda row, i: (row, 0, i))
    tokens = Operand((R, T, H * D), dtype, (1, C, H * D), lambda row, i: (row, i, 0))
    return Operands(
        inputs=dict(
            scale=scalar(),
            q=heads(0),
            k=heads(1),
            v=heads(2),
            documents=numbers(1, jnp.int32),
            y=tokens,
            gate=numbers(H),
            w1=numbers(H),
            w2=numbers(H)),
        outputs=dict(out=tokens),
        scratch=dict(
            k_band=((H, N, D), dtype),
            v_band=((H, N, D), dtype)),
        large=dict(
            A=((N, C), f32),
            visible=((N, C), f32)))


def dc_forward(shapes: DCShapes, dtype, interpret=False):
    """
    A function (qkv [R, 3H, T, D], documents [R, T] int32, y [R, T, H * D], gate, w1, w2 [R, H, T] f32, scale [1] f32) -> out as y.
    """
    call = kernel_call(dc_forward_kernel, shapes, (shapes.rows, shapes.blocks), forward_operands(shapes, dtype), interpret)

    def run(qkv, documents, y, gate, w1, w2, scale):
        return call(scale=scale, q=qkv, k=qkv, v=qkv, documents=documents[:, None], y=y, gate=gate, w1=w1, w2=w2)
    return run


def dc_backward_kernel(r, shapes: DCShapes):
    """
    One block of queries: its dy, dgate, dw1, dw2 and dq, and its share of dk and dv. The last `reach` programs of a row only send what
    waits.
    """
    i, H, C, D, N = pl.program_id(1), shapes.heads, shapes.block, shapes.dim, shapes.band
    start_row(r.k_band, r.v_band, r.dq_band, r.dk_band, r.dv_band)
    move_on(C, r.k_band, r.v_band, r.dq_band, r.dk_band, r.dv_band)

    def gather(band, h, share):
        if N > C:
            band[h, :N - C] += share[:N - C]
        band[h, N - C:] = share[N - C:]

    @pl.when(i < shapes.blocks)
    def _():
        r.k_band[:, -C:], r.v_band[:, -C:] = r.k[0], r.v[0]
        weights = {}

        def keep(h, p, weight):
            r.p[h], weights[h] = p, weight
        A = mix(r, shapes, i, keep)
        rounded = A.astype(r.v.dtype)
        w2, gate = columns(r.w2[0]), columns(r.gate[0])
        dA, dys = [], {}

        # through the values
        def to_shares(h):
            at = slice(h * D, (h + 1) * D)
            dout = r.dout[0, :, at].astype(f32)
            dy = (dout * gate(h)).astype(r.dy.dtype)
            r.dy[0, :, at] = dy
            r.dgate[0, h:h + 1] = (dout * r.y[0, :, at].astype(f32)).T.sum(0, keepdims=True)
            dys[h] = (dy.astype(f32) * w2(h)).astype(dy.dtype)
            return matmul(r.v_band[h], r.dout[0, :, at], transpose_b=True)

        def to_sums(h, shares):  # shares [N, C]: of dout, that is of dy without the gate
            w2, gate, along = r.w2[0, h:h + 1], r.gate[0, h:h + 1], (A * shares).sum(0, keepdims=True)
            r.dw2[0, h:h + 1] = along * gate
            r.dgate[0, h:h + 1] += along * w2
            weighted = shares * (w2 * gate)
            dA[:] = [dA[0] + weighted if dA else weighted]
        stream(range(H), to_shares, to_sums, lambda h, _: gather(r.dv_band, h, matmul(rounded, dys[h])))

        # through the probabilities
        def to_ds(h, _):
            p = r.p[h]
            dw1 = (p * dA[0]).sum(0, keepdims=True) * weights[h]
            r.dw1[0, h:h + 1] = dw1
            return (p * (dA[0] - dw1) * (weights[h] * r.w1[0, h:h + 1])).astype(r.q.dtype)

        def to_dq_dk(h, ds):
            gather(r.dk_band, h, matmul(ds, r.q[0, h]))
            r.dq_band[h, -C:] = (matmul(ds.T, r.k_band[h]) * r.scale[0]).astype(r.dq_band.dtype)
        stream(range(H), lambda h: None, to_ds, to_dq_dk)

    for h in range(H):
        r.dqkv[0, h] = r.dq_band[h, :C]
        r.dqkv[0, H + h] = (r.dk_band[h, :C] * r.scale[0]).astype(r.dqkv.dtype)
        r.dqkv[0, 2 * H + h] = r.dv_band[h, :C].astype(r.dqkv.dtype)


def backward_operands(shapes: DCShapes, dtype) -> Operands:
    R, H, T, D, C, N = shapes.rows, shapes.heads, shapes.tokens, shapes.dim, shapes.block, shapes.band
    here = lambda n: jnp.minimum(n, shapes.blocks - 1)  # the block of queries of a row's program n
    done = lambda n: jnp.maximum(n - shapes.reach, 0)  # the block whose gradients leave
    heads = lambda third: Operand((R, 3 * H, T, D), dtype, (1, H, C, D), lambda row, n: (row, third, here(n), 0))
    numbers = lambda m, dtype=f32: Operand((R, m, T), dtype, (1, m, C), lambda row, n: (row, 0, here(n)))
    tokens = Operand((R, T, H * D), dtype, (1, C, H * D), lambda row, n: (row, here(n), 0))
    return Operands(
        inputs=dict(
            scale=scalar(),
            q=heads(0),
            k=heads(1),
            v=heads(2),
            documents=numbers(1, jnp.int32),
            y=tokens,
            gate=numbers(H),
            w1=numbers(H),
            w2=numbers(H),
            dout=tokens),
        outputs=dict(
            dqkv=Operand((R, 3 * H, T, D), dtype, (1, 3 * H, C, D), lambda row, n: (row, 0, done(n), 0)),
            dy=tokens,
            dgate=numbers(H),
            dw1=numbers(H),
            dw2=numbers(H)),
        scratch=dict(
            k_band=((H, N, D), dtype),
            v_band=((H, N, D), dtype),
            dq_band=((H, N, D), dtype),
            dk_band=((H, N, D), f32),
            dv_band=((H, N, D), f32),
            p=((H, N, C), f32)),
        large=dict(
            A=((N, C), f32),
            visible=((N, C), f32),
            dA=((N, C), f32)))


def dc_backward(shapes: DCShapes, dtype, interpret=False):
    """A function (what dc_forward's takes, dout as y) -> dqkv [R, 3H, T, D], dy, dgate, dw1, dw2 [R, H, T] f32."""
    grid = shapes.rows, shapes.blocks + shapes.reach
    call = kernel_call(dc_backward_kernel, shapes, grid, backward_operands(shapes, dtype), interpret)

    def run(qkv, documents, y, gate, w1, w2, scale, dout):
        return call(scale=scale, q=qkv, k=qkv, v=qkv, documents=documents[:, None], y=y, gate=gate, w1=w1, w2=w2, dout=dout)
    return run


def vmem_bytes(shapes: DCShapes, dtype) -> int:
    return max(forward_operands(shapes, dtype).vmem_bytes, backward_operands(shapes, dtype).vmem_bytes)
