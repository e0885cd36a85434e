"""
DC, dynamically composable attention, forward and backward, with the gate that follows. The plain-torch twin is kernels.dc.dc_attention.

A program of the grid has one block of a row, all heads of it, and goes through it by tiles of C queries. A tile sees all its N keys at
once: its own and those of the few tiles before it that the short window reaches. They lie in a band in VMEM that moves on by a block from
program to program, so that each comes from HBM once. So nothing of the softmax has to be kept for the backward pass, and A, the mix of all
heads, is whole before a head uses it.

- Scores lie as [N keys, C queries]: what belongs to a query (its sum, its weights) then runs along the lanes, as it does in HBM.
- No running maximum: QK norm keeps |scale * q @ k| below scale * D, about 18, so exp cannot overflow.
- Backward, dk and dv gather in bands that move as the keys' do, and are complete when they come to the beginning. dq waits in another, so
  that dq, dk and dv of a block leave together, as one block of the gradient of qkv.
- A head's share in A's gradient goes through its values: v @ dy.T. The gradient of w2 is the sum of A times that, and needs no A @ v.
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


def move_on(shapes: DCShapes, *bands):
    """By a block: the oldest goes, and the newest's place may be written."""
    for band in bands:
        for h in range(shapes.heads if shapes.late else 0):
            band[h, :shapes.late * shapes.block] = band[h, shapes.block:]


def by_tiles(shapes: DCShapes, do):
    """do(where in the block, where its keys are in the band) of each tile of queries. Unrolled: tiles then overlap."""
    for start in range(0, shapes.block, shapes.tile):
        end = shapes.late * shapes.block + start + shapes.tile  # in the band
        do(slice(start, start + shapes.tile), slice(end - shapes.keys, end))


def mask(r, shapes: DCShapes, i, tile):
    """[N keys, C queries]: 0 where they see each other, -1e9 where not, as before the row's first token."""
    N, C = shapes.keys, shapes.tile
    begin = i * shapes.block + tile.start
    query = begin + jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)
    key = begin + C - N + jax.lax.broadcasted_iota(jnp.int32, (N, C), 0)
    first = jnp.maximum(r.documents[0, :, tile], query - (shapes.window - 1))
    return jnp.where((key >= first) & (key <= query), 0.0, -1e9).astype(f32)


def mix(r, shapes: DCShapes, i, tile, keys, keep=lambda h, p, weight: None):
    """A [N, C] float32, the sum over heads of w1 * weight * p, where p are exponentials, and weight [1, C], one over their sum."""
    visible = mask(r, shapes, i, tile)
    total = []

    def to_scores(h):
        return matmul(r.k_band[h, keys], r.q[0, h, tile], transpose_b=True)

    def to_probs(h, scores):
        p = 2.0 ** (scores * (r.scale[0] * math.log2(math.e)) + visible)
        weight = 1 / p.sum(0, keepdims=True)
        keep(h, p, weight)
        mixed = p * (weight * r.w1[0, h:h + 1, tile])
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
    i = pl.program_id(1)
    start_row(r.k_band, r.v_band)
    move_on(shapes, r.k_band, r.v_band)
    r.k_band[:, -shapes.block:], r.v_band[:, -shapes.block:] = r.k[0], r.v[0]

    def correct(tile, keys):
        A = mix(r, shapes, i, tile, keys).astype(r.v.dtype).T
        w2, gate = columns(r.w2[0, :, tile]), columns(r.gate[0, :, tile])
        for h in range(shapes.heads):
            head = slice(h * shapes.dim, (h + 1) * shapes.dim)
            y = r.y[0, tile, head].astype(f32) + matmul(A, r.v_band[h, keys]) * w2(h)
            r.out[0, tile, head] = (y * gate(h)).astype(r.out.dtype)
    by_tiles(shapes, correct)


def shared(shapes: DCShapes, dtype, block):
    """What both kernels have: inputs, bands of keys and values, what is large. block: of queries, of a row's program n."""
    R, H, T, D, size, band = shapes.rows, shapes.heads, shapes.tokens, shapes.dim, shapes.block, shapes.band
    heads = lambda third: Operand((R, 3 * H, T, D), dtype, (1, H, size, D), lambda row, n: (row, third, block(n), 0))
    numbers = lambda m, dtype=f32: Operand((R, m, T), dtype, (1, m, size), lambda row, n: (row, 0, block(n)))
    tokens = Operand((R, T, H * D), dtype, (1, size, H * D), lambda row, n: (row, block(n), 0))
    inputs = dict(
        scale=scalar(),
        q=heads(0),
        k=heads(1),
        v=heads(2),
        documents=numbers(1, jnp.int32),
        y=tokens,
        gate=numbers(H),
        w1=numbers(H),
        w2=numbers(H))
    scratch = dict(
        k_band=((H, band, D), dtype),
        v_band=((H, band, D), dtype))
    large = dict(
        A=((shapes.keys, shapes.tile), f32),
        visible=((shapes.keys, shapes.tile), f32))
    return inputs, scratch, large


def forward_operands(shapes: DCShapes, dtype) -> Operands:
    inputs, scratch, large = shared(shapes, dtype, lambda n: n)
    return Operands(inputs=inputs, outputs=dict(out=inputs["y"]), scratch=scratch, large=large)


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
    One block of queries: its dy, dgate, dw1, dw2 and dq, and its share of dk and dv. The last `late` programs of a row only send what
    waits.
    """
    i, H, D, C, block = pl.program_id(1), shapes.heads, shapes.dim, shapes.tile, shapes.block
    start_row(r.k_band, r.v_band, r.dq_band, r.dk_band, r.dv_band)
    move_on(shapes, r.k_band, r.v_band, r.dq_band, r.dk_band, r.dv_band)

    def gather(band, h, keys, share):  # a tile's own keys get theirs for the first time
        if shapes.reach:
            band[h, keys.start:keys.stop - C] += share[:-C]
        band[h, keys.stop - C:keys.stop] = share[-C:]

    def gradients(tile, keys):
        weights, dys, dA = {}, {}, []

        def keep(h, p, weight):
            r.p[h], weights[h] = p, weight
        A = mix(r, shapes, i, tile, keys, keep)
        rounded = A.astype(r.v.dtype)
        w2, gate = columns(r.w2[0, :, tile]), columns(r.gate[0, :, tile])

        # through the values
        def to_shares(h):
            head = slice(h * D, (h + 1) * D)
            dout = r.dout[0, tile, head]
            r.dgate[0, h:h + 1, tile] = (dout.astype(f32) * r.y[0, tile, head].astype(f32)).T.sum(0, keepdims=True)
            r.dy[0, tile, head] = dy = (dout.astype(f32) * gate(h)).astype(r.dy.dtype)
            dys[h] = (dy.astype(f32) * w2(h)).astype(dy.dtype)
            return matmul(r.v_band[h, keys], dout, transpose_b=True)

        def to_sums(h, shares):  # shares [N, C]: of dout, that is of dy without the gate
            w2, gate, along = r.w2[0, h:h + 1, tile], r.gate[0, h:h + 1, tile], (A * shares).sum(0, keepdims=True)
            r.dw2[0, h:h + 1, tile] = along * gate
            r.dgate[0, h:h + 1, tile] += along * w2
            weighted = shares * (w2 * gate)
            dA[:] = [dA[0] + weighted if dA else weighted]
        stream(range(H), to_shares, to_sums, lambda h, _: gather(r.dv_band, h, keys, matmul(rounded, dys[h])))

        # through the probabilities
        def to_ds(h, _):
            p = r.p[h]
            dw1 = (p * dA[0]).sum(0, keepdims=True) * weights[h]
            r.dw1[0, h:h + 1, tile] = dw1
            return (p * (dA[0] - dw1) * (weights[h] * r.w1[0, h:h + 1, tile])).astype(r.q.dtype)

        def to_dq_dk(h, ds):
            gather(r.dk_band, h, keys, matmul(ds, r.q[0, h, tile]))
            r.dq_band[h, keys.stop - C:keys.stop] = (matmul(ds.T, r.k_band[h, keys]) * r.scale[0]).astype(r.dq_band.dtype)
        stream(range(H), lambda h: None, to_ds, to_dq_dk)

    @pl.when(i < shapes.blocks)
    def _():
        r.k_band[:, -block:], r.v_band[:, -block:] = r.k[0], r.v[0]
        by_tiles(shapes, gradients)

    for h in range(H):
        r.dqkv[0, h] = r.dq_band[h, :block]
        r.dqkv[0, H + h] = (r.dk_band[h, :block] * r.scale[0]).astype(r.dqkv.dtype)
        r.dqkv[0, 2 * H + h] = r.dv_band[h, :block].astype(r.dqkv.dtype)


def backward_operands(shapes: DCShapes, dtype) -> Operands:
    R, H, T, D, block, band = shapes.rows, shapes.heads, shapes.tokens, shapes.dim, shapes.block, shapes.band
    here = lambda n: jnp.minimum(n, shapes.blocks - 1)  # the block of queries of a row's program n
    done = lambda n: jnp.maximum(n - shapes.late, 0)  # the block whose gradients leave
    inputs, scratch, large = shared(shapes, dtype, here)
    return Operands(
        inputs=inputs | dict(dout=inputs["y"]),
        outputs=dict(
            dqkv=Operand((R, 3 * H, T, D), dtype, (1, 3 * H, block, D), lambda row, n: (row, 0, done(n), 0)),
            dy=inputs["y"],
            dgate=inputs["gate"],
            dw1=inputs["w1"],
            dw2=inputs["w2"]),
        scratch=scratch | dict(
            dq_band=((H, band, D), dtype),
            dk_band=((H, band, D), f32),
            dv_band=((H, band, D), f32),
            p=((H, shapes.keys, shapes.tile), f32)),
        large=large | dict(
            dA=((shapes.keys, shapes.tile), f32)))


def dc_backward(shapes: DCShapes, dtype, interpret=False):
    """A function (what dc_forward's takes, dout as y) -> dqkv [R, 3H, T, D], dy, dgate, dw1, dw2 [R, H, T] f32."""
    grid = shapes.rows, shapes.blocks + shapes.late
    call = kernel_call(dc_backward_kernel, shapes, grid, backward_operands(shapes, dtype), interpret)

    def run(qkv, documents, y, gate, w1, w2, scale, dout):
        return call(scale=scale, q=qkv, k=qkv, v=qkv, documents=documents[:, None], y=y, gate=gate, w1=w1, w2=w2, dout=dout)
    return run


def vmem_bytes(shapes: DCShapes, dtype) -> int:
    return max(forward_operands(shapes, dtype).vmem_bytes, backward_operands(shapes, dtype).vmem_bytes)
