"""
The gradient of an embedding: each vocabulary entry gets the sum of what came back to its tokens. XLA adds row by row; with the tokens
sorted by entry, the rows of a block of entries are neighbours, and a product with ones and zeros adds them up, in float32.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.embedding import EmbeddingShapes
from kernels.tpu.common import Operand, Operands, f32, kernel_call, matmul

ENTRIES, TOKENS = 384, 256  # of a block


def embedding_scatter_kernel(r, shapes: EmbeddingShapes):
    """A block of m entries against a chunk of n sorted tokens in which it may occur."""
    row, i = pl.program_id(0), pl.program_id(1)
    block, m = r.blocks[row, i], r.dw.shape[1]
    entry = block * m + jax.lax.broadcasted_iota(jnp.int32, (m, r.ids.shape[2]), 0)
    part = matmul(jnp.where(entry == r.ids[0], 1.0, 0.0).astype(r.dy.dtype), r.dy[0])
    new = (i == 0) | (block != r.blocks[row, jnp.maximum(i - 1, 0)])
    if shapes.in_place:
        start = r.before[0].astype(f32)
    else:
        start = jnp.where(row == 0, r.before[...].astype(f32), 0.0) if shapes.on_top else 0.0
    r.dw_acc[...] = part + jnp.where(new, start, r.dw_acc[...])
    r.dw[0] = r.dw_acc[...].astype(r.dw.dtype)


def embedding_scatter(s: EmbeddingShapes, dtype, interpret=False):
    """
    A function (ids [R, T] int32, dy [R, T, d], if s.on_top before [V, d]) -> dw [R, V, d], the first row's on top of before. s.in_place: of
    one row, before is f32 if s.exact, and dw takes its memory. after: as kernel_call has it.
    """
    R, T, V, d = s.rows, s.tokens, s.vocab, s.dim
    m, n = ENTRIES, math.gcd(T, TOKENS)
    steps = pl.cdiv(V, m) + T // n - 1  # in a walk from the first block and chunk to the last ones, one or the other goes on
    before = Operand((V, d), dtype, (m, d), lambda row, i, blocks, chunks: (blocks[row, i], 0)) if s.on_top else None
    dw = Operand((R, V, d), dtype, (1, m, d), lambda row, i, blocks, chunks: (row, blocks[row, i], 0))
    if s.in_place:
        assert s.on_top and R == 1
        before = dw = dataclasses.replace(dw, dtype=f32 if s.exact else dtype)
    operands = Operands(
        prefetch=("blocks", "chunks"),
        inputs=dict(
            ids=Operand((R, 1, T), jnp.int32, (1, 1, n), lambda row, i, blocks, chunks: (row, 0, chunks[row, i])),
            dy=Operand((R, T, d), dtype, (1, n, d), lambda row, i, blocks, chunks: (row, chunks[row, i], 0)),
            before=before),
        outputs=dict(
            dw=dw),
        in_place=dict(dw="before") if s.in_place else {},
        scratch=dict(
            dw_acc=((m, d), f32)))
    call = kernel_call(embedding_scatter_kernel, s, (R, steps), operands, interpret)

    def by_entry(ids):
        """
        [R, T] -> these ids block of entries by block, and where they were. Both lie in one number each, because XLA sorts one array in
        half the time of two, and compiles that in a ninth (compiled for v6e).
        """
        bits = (T - 1).bit_length()
        whole = V.bit_length() + bits <= 32  # V: an id of nobody's
        key = (ids if whole else ids // m).astype(jnp.uint32) << bits | jax.lax.broadcasted_iota(jnp.uint32, (R, T), 1)
        key = jax.lax.sort(key, is_stable=False)
        order = (key & (1 << bits) - 1).astype(jnp.int32)
        return (key >> bits).astype(jnp.int32) if whole else jnp.take_along_axis(ids, order, 1, mode="promise_in_bounds"), order

    def walk(ids):
        """ids [T], block by block -> the block of entries and the chunk of tokens of each step."""
        ends = jnp.concatenate([jnp.searchsorted(ids, jnp.arange(m, V, m, dtype=jnp.int32), method="scan_unrolled"), jnp.arange(n, T, n)])
        of_block = jnp.argsort(ends, stable=True) < pl.cdiv(V, m) - 1
        return [jnp.cumsum(jnp.pad(x.astype(jnp.int32), (1, 0)), dtype=jnp.int32) for x in (of_block, ~of_block)]

    def run(ids, dy, before=None, after=None):
        ids, order = by_entry(ids)  # once for all embeddings of the same ids, by CSE
        dy = jax.vmap(lambda dy, order: dy.at[order].get(mode="promise_in_bounds"))(dy, order)
        blocks, chunks = jax.vmap(walk)(ids)
        return call(blocks=blocks, chunks=chunks, ids=ids[:, None], dy=dy, before=before[None] if s.in_place else before, after=after)
    return run
