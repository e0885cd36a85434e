"""
Sliding-window attention within documents, forward and backward. The plain-torch twin is kernels.attention.window_attention.

A row is cut into blocks of C tokens. A program of the grid has one block of one row, all heads of it, and goes through the blocks
that this one meets (forward: the keys that its queries see; backward: the queries that see its keys), from the diagonal outwards,
as far as the window and the documents reach. Blocks that later programs will meet again wait in rings in VMEM, so that each comes
from HBM once, and nothing is padded, summed or copied outside.

- Scores lie as [C keys, C queries]: what belongs to a query (where its view begins, its sum, its delta) then runs along the lanes,
  as it does in HBM. Results come out as [D, C], which fills the 256 x 256 matrix unit twice as well as [C, D] would; the price is
  that blocks are transposed as they come and go.
- No running maximum: QK norm keeps |scale * q @ k| below scale * D, about 18, so exp cannot overflow.
- Paired heads are two streams of T tokens whose positions are 2t and 2t + 1. Only the mask knows: nothing is interleaved.
- A loop ends where the documents do: with documents of 600 tokens, the work of a window of 1408 is about half (simulated).
- What comes between attention and its last projection, exclusive self-attention and a gate, happens as results leave. Its backward pass
  happens as their gradients come; it reads y as it was before, because no gradient of a gate of 0 can be had from what it leaves.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.attention import Band
from kernels.tpu.common import Operand, Operands, f32, kernel_call, matmul

# -----------------------------------------------------------------------------
# Who sees whom

def first_seen(band: Band, documents):
    """[R, T] -> [R, blocks]: the first block of keys that each block of queries sees (documents never decrease)."""
    s, C = band.streams, band.block
    start = jax.lax.slice(documents, (0, 0), documents.shape, (1, C))  # of the document of each block's first query
    return jnp.maximum(s * start, s * C * jnp.arange(band.blocks, dtype=jnp.int32) - band.window) // (s * C)


def last_seen_by(band: Band, documents):
    """[R, T] -> [R, blocks]: the last block of queries that sees each block of keys."""
    keys = jnp.arange(band.blocks, dtype=jnp.int32)[:, None]
    return jnp.sum(first_seen(band, documents)[:, None] <= keys, axis=-1, dtype=jnp.int32) - 1


def view(band: Band, documents, i, a):
    """documents [1, C] of block i -> [1, C]: the first position that each query of stream a sees."""
    t = i * band.block + jax.lax.broadcasted_iota(jnp.int32, (1, band.block), 1)
    return jnp.maximum(band.streams * documents, band.streams * t + a - band.window)


def masks(band: Band, views, j, diagonal):
    """For each two streams [C keys of block j, C queries]: 0 where they see each other, -1e9 where not."""
    s, C = band.streams, band.block
    keys, queries = (s * jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    def mask(a, b):
        visible = keys >= views[a] - (s * C * j + b)
        if diagonal:
            visible &= keys + b <= queries + a
        return jnp.where(visible, 0.0, -1e9).astype(f32)
    return {(a, b): mask(a, b) for a in range(s) for b in range(s)}

# -----------------------------------------------------------------------------
# A software pipeline across the pairs of heads that meet in two blocks, and across blocks

def pipeline(n, depth, first, to_scores, to_probs, consume, ahead, behind):
    """
    Pairs 0 .. n-1 of one block of queries and one of keys. In turn m the matrix unit makes the scores of pair m + depth and uses up the
    probabilities of pair m - depth, while the vector unit turns the scores of pair m into probabilities. With depth 2:

                  turn 0      turn 1      turn 2      turn 3           turn n-2        turn n-1
        MXU       scores 2    scores 3    scores 4    scores 5   ...   scores 0'       scores 1'      ': of the next block
        VPU       probs 0     probs 1     probs 2     probs 3    ...   probs n-2       probs n-1
        MXU       values n-2" values n-1" values 0    values 1   ...   values n-4      values n-3     ": of the previous block

    Filling an empty matrix unit takes hundreds of cycles, so neighbouring blocks share prologue and epilogue: the epilogue of a block
    makes the next block's first scores, which wait in `ahead`, and leaves its last probabilities in `behind`. Only the first block has a
    prologue of its own (first), and `drain` is the epilogue of the last one.

    to_scores(m, step) -> arrays and consume(m, step, arrays) are the matmuls of this block (step 0), the previous (-1) or the
    next (1; it may not exist, then nothing uses its scores); to_probs(m, arrays) -> arrays. ahead, behind: [depth, arrays, C, C].
    """
    # prologue
    scores = {m: to_scores(m, 0) if first else load(ahead, m) for m in range(depth)}
    probs = {} if first else {m - depth: load(behind, m) for m in range(depth)}
    for m in range(n):  # steady state, but for scores of the next block in the last turns
        if m + depth < n:
            scores[m + depth] = to_scores(m + depth, 0)
        else:
            store(ahead, m + depth - n, to_scores(m + depth - n, 1))
        if m - depth in probs:
            consume((m - depth) % n, 0 if m >= depth else -1, probs.pop(m - depth))
        probs[m] = to_probs(m, scores.pop(m))
    # epilogue
    for m in range(depth):
        store(behind, m, probs.pop(n - depth + m))


def drain(n, depth, consume, behind):
    """The epilogue of the last block: uses up the probabilities that it has left."""
    for m in range(depth):
        consume(n - depth + m, -1, load(behind, m))


def load(ref, m):
    return tuple(ref[m, x] for x in range(ref.shape[1]))


def store(ref, m, arrays):
    for x, array in enumerate(arrays):
        ref[m, x] = array

# -----------------------------------------------------------------------------
# After attention, of one head of one block of tokens: y, v, dy [D, C], gates [1, C], all float32

SMALLEST = 1e-8  # that |v|^2 counts as


def share_of_v(v):
    """(1 / |v|^2, its derivative by |v|^2)"""
    square = (v * v).sum(0, keepdims=True)
    inverse = 1 / jnp.maximum(square, SMALLEST)
    return inverse, jnp.where(square > SMALLEST, -inverse * inverse, 0.0)


def exclude(y, v, xsa, dtype):
    """XSA: y without tanh(xsa) of its part along v, rounded."""
    along = (y * v).sum(0, keepdims=True) * share_of_v(v)[0]
    return (y - jnp.tanh(xsa) * along * v).astype(dtype).astype(f32)


def exclude_backward(y, v, xsa, dy):
    """dy, dv, dxsa of exclude."""
    inverse, slope = share_of_v(v)
    strength, dot, ddot = jnp.tanh(xsa), (y * v).sum(0, keepdims=True), (dy * v).sum(0, keepdims=True)
    dv = -strength * (inverse * (ddot * y + dot * dy) + 2 * slope * dot * ddot * v)
    return dy - strength * inverse * ddot * v, dv, -(1 - strength * strength) * inverse * dot * ddot

# -----------------------------------------------------------------------------
# The kernels. Rings hold the last `slots` blocks of a row, block j in slot j % slots

def attention_forward_kernel(r, band: Band):
    """One block of queries: y, and for the backward pass the sums of exponentials."""
    row, i = pl.program_id(0), pl.program_id(1)
    slots, H, C, D = r.k_ring.shape
    slot = lambda j: jax.lax.rem(j + slots, slots)  # of block j; the pipeline may ask for block -1
    views = [view(band, r.documents[0], i, a) for a in range(band.streams)]
    meetings, depth = band.meetings, r.ahead.shape[0]

    def bring_in(h):
        r.k_ring[slot(i), h] = r.k[0, h]
        r.v_ring[slot(i), h] = r.v[0, h].T
        r.y_acc[h] = jnp.zeros((D, C), f32)
        r.sums_acc[h] = jnp.zeros((8, C), f32)
    bring_in = functools.cache(bring_in)  # once a head

    def consume(j, m, step, probs):
        _, _, h, g = meetings[m]
        r.y_acc[h] += matmul(r.v_ring[slot(j - step), g], probs[0])

    def meet(j, diagonal):
        mask = masks(band, views, j, diagonal)
        def to_scores(m, step):
            _, _, h, g = meetings[m]
            if diagonal and step == 0:
                bring_in(h), bring_in(g)
            return (matmul(r.k_ring[slot(j - step), g], r.q[0, h], transpose_b=True),)
        def to_probs(m, scores):
            a, b, h, _ = meetings[m]
            p = 2.0 ** (scores[0] * (r.scale[0] * math.log2(math.e)) + mask[a, b])
            r.sums_acc[h] += p.reshape(C // 8, 8, C).sum(0)
            return (p.astype(r.q.dtype),)
        pipeline(len(meetings), depth, diagonal, to_scores, to_probs, functools.partial(consume, j), r.ahead, r.behind)

    meet(i, diagonal=True)
    jax.lax.fori_loop(1, i - r.first_seen[row, i] + 1, lambda n, _: meet(i - n, diagonal=False), None)
    drain(len(meetings), depth, functools.partial(consume, r.first_seen[row, i] - 1), r.behind)
    for h in range(H):
        total, at = r.sums_acc[h].sum(0, keepdims=True), slice(h * D, (h + 1) * D)
        r.sums[0, h] = total[0]
        y = (r.y_acc[h] * (1 / total)).astype(r.y.dtype)
        if r.y_raw is not None:
            r.y_raw[0, :, at] = y.T
        if band.xsa:
            y = exclude(y.astype(f32), r.v_ring[slot(i), h].astype(f32), r.xsa[0, h:h + 1], y.dtype)
        if band.gate:
            y = y.astype(f32) * r.gate[0, h:h + 1]
        r.y[0, :, at] = y.astype(r.y.dtype).T


def forward_operands(band: Band, dtype) -> Operands:
    R, H, T, D, C = band.rows, band.heads, band.tokens, band.dim, band.block
    slots, depth = band.reach + 1, min(2, len(band.meetings))
    heads = lambda third: Operand((R, 3 * H, T, D), dtype, (1, H, C, D), lambda row, i, *_: (row, third, i, 0))
    numbers = lambda n, dtype=f32: Operand((R, n, T), dtype, (1, n, C), lambda row, i, *_: (row, 0, i))
    tokens = Operand((R, T, H * D), dtype, (1, C, H * D), lambda row, i, *_: (row, i, 0))
    return Operands(
        prefetch=("first_seen", "scale"),
        inputs=dict(
            q=heads(0),
            k=heads(1),
            v=heads(2),
            documents=numbers(1, jnp.int32),
            xsa=numbers(H) if band.xsa else None,
            gate=numbers(H) if band.gate else None),
        outputs=dict(
            y=tokens,
            sums=numbers(H),
            y_raw=tokens if band.keep and (band.xsa or band.gate) else None),
        scratch=dict(
            k_ring=((slots, H, C, D), dtype),
            v_ring=((slots, H, D, C), dtype),
            y_acc=((H, D, C), f32),
            sums_acc=((H, 8, C), f32),
            ahead=((depth, 1, C, C), f32),
            behind=((depth, 1, C, C), dtype)))


def attention_forward(band: Band, dtype, interpret=False):
    """
    A function (qkv [R, 3H, T, D], documents [R, T] int32, scale [1] f32; xsa, gate [R, H, T] f32 as band says) -> y [R, T, H * D], sums
    of exponentials [R, H, T] f32; y_raw, if band.keep what y was before XSA and gate, if there is one.
    """
    call = kernel_call(attention_forward_kernel, band, (band.rows, band.blocks), forward_operands(band, dtype), interpret)

    def run(qkv, documents, scale, **gates):
        return call(first_seen=first_seen(band, documents), scale=scale, q=qkv, k=qkv, v=qkv, documents=documents[:, None], **gates)
    return run


def attention_backward_kernel(r, band: Band):
    """
    One block of keys, from the row's last to its first: its dk and dv, and its share of the dq of the queries that see it. The dq
    of a block is complete, and leaves, with the block `reach` before it; the last `reach` programs of a row do nothing else.
    """
    row, j = pl.program_id(0), band.blocks - 1 - pl.program_id(1)
    slots, H, D, C = r.q_ring.shape
    slot = lambda i: jax.lax.rem(i, slots)
    meetings, depth = band.meetings, r.ahead.shape[0]

    def bring_in(h):
        at, dtype = slice(h * D, (h + 1) * D), r.dy.dtype
        y, dy, dv = r.y[0, :, at].T.astype(f32), r.dy[0, :, at].T.astype(f32), jnp.zeros((D, C), f32)
        if band.xsa:
            v, xsa = r.v[0, h].T.astype(f32), r.xsa[0, h:h + 1]
        if band.gate:
            r.dgate[0, h:h + 1] = (dy * (exclude(y, v, xsa, dtype) if band.xsa else y)).sum(0, keepdims=True)
            dy = (dy * r.gate[0, h:h + 1]).astype(dtype).astype(f32)
        if band.xsa:
            dy, dv, r.dxsa[0, h:h + 1] = exclude_backward(y, v, xsa, dy)
        dy = dy.astype(dtype)
        r.q_ring[slot(j), h], r.dy_ring[slot(j), h], r.k_T[h] = r.q[0, h].T, dy, r.k[0, h].T
        r.delta_ring[slot(j), h] = (dy.astype(f32) * y).sum(0, keepdims=True)
        r.lse_ring[slot(j), h] = jnp.log2(r.sums[0, h:h + 1])
        r.dq_ring[slot(j), h] = r.dk_acc[h] = jnp.zeros((D, C), f32)
        r.dv_acc[h] = dv
    bring_in = functools.cache(bring_in)  # once a head

    def send(to, h, gradient, more):
        """gradient: [D, C]. more: what came back to q, k or v by other ways."""
        if more is None:
            to[0, h] = gradient.astype(to.dtype).T
        else:
            to[0, h] = (gradient.T + more[0, h].astype(f32)).astype(to.dtype)

    def send_dq(h):
        send(r.dq, h, r.dq_ring[slot(j + band.reach), h] * r.scale[0], r.dq_more)

    def consume(i, m, step, probs):
        _, _, h, g = meetings[m]
        p, ds = probs
        r.dv_acc[g] += matmul(r.dy_ring[slot(i + step), h], p, transpose_b=True)
        r.dk_acc[g] += matmul(r.q_ring[slot(i + step), h], ds, transpose_b=True)
        r.dq_ring[slot(i + step), h] += matmul(r.k_T[g], ds)

    def meet(i, diagonal):
        mask = masks(band, r.view_ring[slot(i)], j, diagonal)
        def to_scores(m, step):
            _, _, h, g = meetings[m]
            if diagonal and step == 0:
                bring_in(h), bring_in(g)
            return matmul(r.k[0, g], r.q_ring[slot(i + step), h]), matmul(r.v[0, g], r.dy_ring[slot(i + step), h])
        def to_probs(m, scores):
            a, b, h, _ = meetings[m]
            p = 2.0 ** (scores[0] * (r.scale[0] * math.log2(math.e)) + mask[a, b] - r.lse_ring[slot(i), h])
            ds = p * (scores[1] - r.delta_ring[slot(i), h])
            return p.astype(r.q.dtype), ds.astype(r.q.dtype)
        pipeline(len(meetings), depth, diagonal, to_scores, to_probs, functools.partial(consume, i), r.ahead, r.behind)

    @pl.when(j >= 0)
    def _():
        for a in range(band.streams):
            r.view_ring[slot(j), a] = view(band, r.documents[0], j, a)
        meet(j, diagonal=True)
        jax.lax.fori_loop(j + 1, r.last_seen_by[row, j] + 1, lambda i, _: meet(i, diagonal=False), None)
        drain(len(meetings), depth, functools.partial(consume, r.last_seen_by[row, j] + 1), r.behind)
        for h in range(H):
            send(r.dk, h, r.dk_acc[h] * r.scale[0], r.dk_more)
            send(r.dv, h, r.dv_acc[h], r.dv_more)
            send_dq(h)

    @pl.when(j < 0)
    def _():
        for h in range(H):
            send_dq(h)


def backward_operands(band: Band, dtype) -> Operands:
    R, H, T, D, C = band.rows, band.heads, band.tokens, band.dim, band.block
    slots, depth = band.reach + 1, 1
    here = lambda n: jnp.maximum(band.blocks - 1 - n, 0)  # the block of keys of a row's program n
    done = lambda n: jnp.minimum(band.blocks - 1 - n + band.reach, band.blocks - 1)  # the block whose dq leaves
    heads = lambda third, block=here: Operand((R, 3 * H, T, D), dtype, (1, H, C, D), lambda row, n, *_: (row, third, block(n), 0))
    gradient = lambda block: Operand((R, H, T, D), dtype, (1, H, C, D), lambda row, n, *_: (row, 0, block(n), 0))
    numbers = lambda m, dtype=f32: Operand((R, m, T), dtype, (1, m, C), lambda row, n, *_: (row, 0, here(n)))
    tokens = Operand((R, T, H * D), dtype, (1, C, H * D), lambda row, n, *_: (row, here(n), 0))
    return Operands(
        prefetch=("last_seen_by", "scale"),
        inputs=dict(
            q=heads(0),
            k=heads(1),
            v=heads(2),
            documents=numbers(1, jnp.int32),
            xsa=numbers(H) if band.xsa else None,
            gate=numbers(H) if band.gate else None,
            y=tokens,
            sums=numbers(H),
            dy=tokens,
            dq_more=heads(0, done) if band.more else None,
            dk_more=heads(1) if band.more else None,
            dv_more=heads(2) if band.more else None),
        outputs=dict(
            dq=gradient(done),
            dk=gradient(here),
            dv=gradient(here),
            dxsa=numbers(H) if band.xsa else None,
            dgate=numbers(H) if band.gate else None),
        scratch=dict(
            q_ring=((slots, H, D, C), dtype),
            dy_ring=((slots, H, D, C), dtype),
            dq_ring=((slots, H, D, C), f32),
            delta_ring=((slots, H, 1, C), f32),
            lse_ring=((slots, H, 1, C), f32),
            view_ring=((slots, band.streams, 1, C), jnp.int32),
            k_T=((H, D, C), dtype),
            dk_acc=((H, D, C), f32),
            dv_acc=((H, D, C), f32),
            ahead=((depth, 2, C, C), f32),
            behind=((depth, 2, C, C), dtype)))


def attention_backward(band: Band, dtype, interpret=False):
    """
    A function (what attention_forward's takes; y before XSA and gate, sums, dy as y; if band.more dqkv, to which dq, dk and dv are added)
    -> dq, dk, dv [R, H, T, D], dxsa, dgate [R, H, T] f32.
    """
    call = kernel_call(attention_backward_kernel, band, (band.rows, band.blocks + band.reach), backward_operands(band, dtype), interpret)

    def run(qkv, documents, scale, y, sums, dy, dqkv=None, **gates):
        more = {} if dqkv is None else dict(dq_more=dqkv, dk_more=dqkv, dv_more=dqkv)
        return call(last_seen_by=last_seen_by(band, documents), scale=scale, q=qkv, k=qkv, v=qkv, documents=documents[:, None], y=y,
                    sums=sums, dy=dy, **more, **gates)
    return run


def vmem_bytes(band: Band, dtype) -> int:
    return max(forward_operands(band, dtype).vmem_bytes, backward_operands(band, dtype).vmem_bytes)
