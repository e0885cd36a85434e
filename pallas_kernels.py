"""
TPU kernels, each beside the plain-torch twin that CPUs run and that the tests hold it to. Upstream's counterparts are
FlashAttention-3 and the Triton kernels of train_gpt.py. Importing this file imports neither JAX nor torch_xla.
"""
import dataclasses
import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

target = None  # "TPU" makes window_attention trace its TPU kernel on any machine; None leaves the choice to the device

# -----------------------------------------------------------------------------
# Sliding-window attention within documents (upstream: flash_attn_varlen_func with cu_seqlens and window_size=(window, 0))

def window_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, scale: Tensor, paired: bool = False) -> Tensor:
    """
    softmax(scale * q @ k.T) @ v where position i sees positions max(documents[i], i - window) .. i, both ends included.

    q, k, v: [B, H, T, D]. documents: [B, T] int32, the position in its row at which each token's document starts.
    window: tokens. scale: 0-D float32. Returns [B, H, T, D] in q's dtype.
    paired: heads h and h + H/2 form one sequence of length 2T, in which they take turns (position 2t, then 2t + 1);
    window counts positions of that sequence.

    The TPU kernel takes exp(scale * q @ k.T) as it is, with no maximum subtracted: q and k must be normed (QK norm).
    """
    if for_tpu(q):
        if (why_not := kernel_refuses(q, k, v, paired)) is None:
            return WindowAttention.apply(q, k, v, documents, window, scale, paired)
        warn_once(f"window_attention: no TPU kernel for {tuple(q.shape)} ({why_not}): plain torch instead, which is several times slower")
    if not paired:
        return BandedAttention.apply(q, k, v, documents, window, scale)
    turns = lambda x: torch.stack(x.chunk(2, dim=1), dim=3).flatten(2, 3)  # [B, H, T, D] -> [B, H/2, 2T, D]
    y = BandedAttention.apply(turns(q), turns(k), turns(v), 2 * documents.repeat_interleave(2, dim=1), window, scale)
    return torch.cat(y.unflatten(2, (-1, 2)).unbind(3), dim=1)


def for_tpu(x: Tensor) -> bool:
    if x.device.type != "xla":
        return False
    import torch_xla.runtime as xr
    return target == "TPU" or xr.device_type() == "TPU"


def kernel_refuses(q: Tensor, k: Tensor, v: Tensor, paired: bool) -> str | None:
    """What keeps these tensors from the TPU kernel, or None. On other shapes it has not been compiled or tested."""
    B, H, T, D = q.shape
    if not (q.dtype == k.dtype == v.dtype == torch.bfloat16):
        return "it is for bfloat16"
    if D != 128:
        return "it is for heads of 128"
    if T % 128:
        return "it is for rows that are a multiple of 128 tokens"
    if H < 2 or (paired and H % 2):
        return "it is for two heads or more, paired ones even in number"
    devices = rows_are_spread_over()
    if B % devices:
        return f"{B} rows do not divide over {devices} devices"


@functools.cache
def warn_once(text: str):
    warnings.warn(text, stacklevel=3)

class BandedAttention(torch.autograd.Function):
    """
    The plain-torch twin: queries in blocks of C, each against its own block of keys and the n before it that the window
    can reach, so memory is O(T x window). The backward pass recomputes the probabilities, as FlashAttention does.
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
# The TPU kernels behind it, in Pallas
#
# A row is cut into blocks of C tokens. A program of the grid has one block of one row and all of its heads; it goes through the
# blocks on the other side of the band (forward: the keys that its queries see; backward: the queries that see its keys), from
# the diagonal outwards, as far as the window and the documents reach. Blocks that it has had, and will need again, wait in
# rings in VMEM, so that each crosses from HBM once and nothing is padded or copied outside.
#
# - Scores lie as [C keys, C queries]: what belongs to a query (its document's start, its sum of exponentials, its delta) then
#   runs along the lanes, as it does in HBM. Sums over tokens come out as [D, C], which fills the 256 x 256 matrix unit twice as
#   well as [C, D] would, at the price of transposing blocks as they come and go.
# - No running maximum: q and k are normed, so |scale * q @ k| stays below scale * D, about 18, and exp cannot overflow.
# - Paired heads are two streams of T tokens whose positions are 2t and 2t + 1. Only the mask knows: nothing is interleaved.
# - The matrix unit must never wait for the vector unit, see `pipeline`.

VMEM_LIMIT = 64 * 2**20  # of a v6e's 128 MiB

jax = jnp = pl = pltpu = None  # import_jax fills them in: only a trace for TPU needs them

def import_jax():
    """JAX lowers the kernels and runs nothing: told to stay on the CPU, it leaves the TPU to torch_xla."""
    global jax, jnp, pl, pltpu
    if jax is None:
        import jax as jax_
        jax_.config.update("jax_platforms", "cpu")
        import jax.numpy as jnp_
        from jax.experimental import pallas as pl_
        from jax.experimental.pallas import tpu as pltpu_
        jax, jnp, pl, pltpu = jax_, jnp_, pl_, pltpu_

def matmul(a, b, transpose_b=False):
    return jax.lax.dot_general(a, b, (((1,), (1 if transpose_b else 0,)), ((), ())), preferred_element_type=jnp.float32)

@dataclasses.dataclass(frozen=True)
class Band:
    """Which blocks and heads meet. Hashable: a lowered kernel is kept for each."""
    rows: int
    heads: int
    tokens: int
    dim: int
    window: int  # in positions: two to a token if paired
    paired: bool
    block: int

    @property
    def streams(self) -> int:
        return 2 if self.paired else 1

    @property
    def blocks(self) -> int:
        return self.tokens // self.block

    @property
    def reach(self) -> int:
        """How many blocks back a block of queries can see."""
        return min(-(-self.window // (self.streams * self.block)), self.blocks - 1)

    @property
    def meetings(self) -> list[tuple[int, int, int, int]]:
        """(stream of the queries, stream of the keys, head of the queries, head of the keys)"""
        n = self.heads // self.streams
        return [(a, b, a * n + h, b * n + h) for a in range(self.streams) for b in range(self.streams) for h in range(n)]

    def first_seen(self, documents):
        """[rows, T] -> [rows, blocks]: the first block of keys that each block of queries sees. Starts of documents never decrease."""
        s, C = self.streams, self.block
        first_query = jnp.arange(0, self.tokens, C, dtype=jnp.int32)
        return jnp.maximum(s * documents[:, ::C], s * first_query - self.window) // (s * C)

    def last_seen_by(self, documents):
        """[rows, T] -> [rows, blocks]: the last block of queries that sees each block of keys."""
        keys = jnp.arange(self.blocks, dtype=jnp.int32)[:, None]
        return jnp.sum(self.first_seen(documents)[:, None] <= keys, axis=-1, dtype=jnp.int32) - 1

    def first_visible(self, documents, i):
        """documents [1, C] of query block i -> for each stream [1, C]: the first position that each query sees"""
        s, C = self.streams, self.block
        t = i * C + jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)
        return [jnp.maximum(s * documents, s * t + a - self.window) for a in range(s)]

    def masks(self, first_visible, j, diagonal):
        """For each two streams [C keys of block j, C queries]: 0 where they see each other, -1e9 where not."""
        s, C = self.streams, self.block
        keys, queries = (s * jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
        def mask(a, b):
            visible = keys >= first_visible[a] - (s * j * C + b)
            if diagonal:
                visible &= keys + b <= queries + a
            return jnp.where(visible, 0.0, -1e9).astype(jnp.float32)
        return {(a, b): mask(a, b) for a in range(s) for b in range(s)}


def pipeline(n, depth, first, to_scores, to_probs, consume, scores_ahead, probs_behind):
    """
    Heads 0 .. n-1 of one meeting of two blocks, as the hardware likes it: while the vector unit turns the scores of head h
    into probabilities, the matrix unit computes the scores of head h + depth and consumes the probabilities of head h - depth.
    Each end of the pipeline reaches into the neighbouring meeting, through scratch memory, for an empty matrix unit takes
    hundreds of cycles to fill: so the last scores computed here are the next meeting's first.

    to_scores(h, step) -> arrays and consume(h, step, arrays) do the matmuls of this (step 0), the previous (-1) or the next (1)
    meeting; to_probs(h, arrays) -> arrays. After the last meeting: drain. scores_ahead, probs_behind: [depth, arrays, C, C].
    """
    load = lambda ref, m: tuple(ref[m, x] for x in range(ref.shape[1]))
    def store(ref, m, arrays):
        for x, array in enumerate(arrays):
            ref[m, x] = array
    scores = {h: to_scores(h, 0) if first else load(scores_ahead, h) for h in range(depth)}
    probs = {} if first else {h - depth: load(probs_behind, h) for h in range(depth)}
    for h in range(n):
        if h + depth < n:
            scores[h + depth] = to_scores(h + depth, 0)
        else:
            store(scores_ahead, h + depth - n, to_scores(h + depth - n, 1))
        if h - depth in probs:
            consume((h - depth) % n, 0 if h >= depth else -1, probs.pop(h - depth))
        p = to_probs(h, scores.pop(h))
        if h + depth < n:
            probs[h] = p
        else:
            store(probs_behind, h + depth - n, p)

def drain(n, depth, consume, probs_behind):
    for m in range(depth):
        consume(n - depth + m, -1, tuple(probs_behind[m, x] for x in range(probs_behind.shape[1])))

def forward_kernel(first_seen, scale, q, k, v, documents, y, sums_out, k_ring, v_ring, sums, acc, scores_ahead, probs_behind, *, band):
    """
    One block of queries: y and the sums of exponentials. In HBM: q, k, v, y [rows, H, T, D], documents [rows, 1, T], sums_out
    [rows, H, T]; here a block of each. Rings: k [slots, H, C, D], v [slots, H, D, C]. sums [H, 8, C] and acc [H, D, C] grow.
    """
    r, i = pl.program_id(0), pl.program_id(1)
    slots, H, C, D = k_ring.shape
    slot = lambda j: jax.lax.rem(j + slots, slots)  # of block j; block -1 is asked for, though never used
    meetings, depth = band.meetings, scores_ahead.shape[0]
    first_visible = band.first_visible(documents[0], i)
    to_exponent = scale[0] * math.log2(math.e)

    k_ring[slot(i)] = k[0]
    for h in range(H):
        v_ring[slot(i), h] = v[0, h].T
    sums[...] = jnp.zeros_like(sums)
    acc[...] = jnp.zeros_like(acc)

    def meet(j, diagonal):
        masks = band.masks(first_visible, j, diagonal)
        def to_scores(m, step):
            _, _, h, g = meetings[m]
            return (matmul(k_ring[slot(j - step), g], q[0, h], transpose_b=True),)
        def to_probs(m, scores):
            a, b, h, _ = meetings[m]
            p = 2.0 ** (scores[0] * to_exponent + masks[a, b])
            sums[h] += p.reshape(C // 8, 8, C).sum(0)
            return (p.astype(q.dtype),)
        pipeline(len(meetings), depth, diagonal, to_scores, to_probs, functools.partial(consume, j), scores_ahead, probs_behind)
    def consume(j, m, step, probs):
        _, _, h, g = meetings[m]
        acc[h] += matmul(v_ring[slot(j - step), g], probs[0])

    meet(i, diagonal=True)
    jax.lax.fori_loop(1, i - first_seen[r, i] + 1, lambda n, _: meet(i - n, diagonal=False), None)
    drain(len(meetings), depth, functools.partial(consume, first_seen[r, i] - 1), probs_behind)
    for h in range(H):
        total = sums[h].sum(0, keepdims=True)
        sums_out[0, h] = total[0]
        y[0, h] = (acc[h] / total).astype(y.dtype).T


def backward_kernel(last_seen_by, scale, q, k, v, documents, y, sums, dy, dq, dk, dv,
                    q_ring, dy_ring, dq_ring, delta_ring, lse_ring, first_visible_ring, dk_acc, dv_acc, scores_ahead, probs_behind,
                    *, band):
    """
    One block of keys, from the row's last to its first: dk, dv, and its part in the dq of the queries that see it. The dq of a
    block is done when the farthest block that it could see has been; in the last `reach` programs only those come out.
    Rings, for blocks of queries: q, dy, dq [slots, H, D, C]; delta, lse [slots, H, 1, C]; first_visible [slots, streams, 1, C].
    """
    r, j = pl.program_id(0), band.blocks - 1 - pl.program_id(1)
    slots, H, D, C = q_ring.shape
    slot = lambda i: jax.lax.rem(i, slots)
    meetings, depth = band.meetings, scores_ahead.shape[0]
    to_exponent = scale[0] * math.log2(math.e)

    @pl.when(j >= 0)
    def _():
        for a, visible in enumerate(band.first_visible(documents[0], j)):
            first_visible_ring[slot(j), a] = visible
        for h in range(H):
            q_ring[slot(j), h] = q[0, h].T
            dy_ring[slot(j), h] = dy[0, h].T
            delta_ring[slot(j), h] = (dy[0, h].T.astype(jnp.float32) * y[0, h].T.astype(jnp.float32)).sum(0, keepdims=True)
            lse_ring[slot(j), h] = jnp.log2(sums[0, h:h + 1])
        k_T = [k[0, h].T for h in range(H)]
        dq_ring[slot(j)] = jnp.zeros((H, D, C), jnp.float32)
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

        def meet(i, diagonal):
            masks = band.masks(first_visible_ring[slot(i)], j, diagonal)
            def to_scores(m, step):
                _, _, h, g = meetings[m]
                return matmul(k[0, g], q_ring[slot(i + step), h]), matmul(v[0, g], dy_ring[slot(i + step), h])
            def to_probs(m, scores):
                a, b, h, _ = meetings[m]
                p = 2.0 ** (scores[0] * to_exponent + masks[a, b] - lse_ring[slot(i), h])
                ds = p * (scores[1] - delta_ring[slot(i), h])
                return p.astype(q.dtype), ds.astype(q.dtype)
            pipeline(len(meetings), depth, diagonal, to_scores, to_probs, functools.partial(consume, i), scores_ahead, probs_behind)
        def consume(i, m, step, probs):
            _, _, h, g = meetings[m]
            p, ds = probs
            dv_acc[g] += matmul(dy_ring[slot(i + step), h], p, transpose_b=True)
            dk_acc[g] += matmul(q_ring[slot(i + step), h], ds, transpose_b=True)
            dq_ring[slot(i + step), h] += matmul(k_T[g], ds)

        meet(j, diagonal=True)
        jax.lax.fori_loop(j + 1, last_seen_by[r, j] + 1, lambda i, _: meet(i, diagonal=False), None)
        drain(len(meetings), depth, functools.partial(consume, last_seen_by[r, j] + 1), probs_behind)
        for h in range(H):
            dk[0, h] = (dk_acc[h] * scale[0]).astype(dk.dtype).T
            dv[0, h] = dv_acc[h].astype(dv.dtype).T

    for h in range(H):
        dq[0, h] = (dq_ring[slot(j + band.reach), h] * scale[0]).astype(dq.dtype).T


def forward_call(band, dtype, interpret=False):
    """(q, k, v [rows, H, T, D], documents [rows, T] int32, scale [1] f32) -> y [rows, H, T, D], sums of exponentials [rows, H, T] f32"""
    C, slots, H, D, depth = band.block, band.reach + 1, band.heads, band.dim, min(2, len(band.meetings))
    tokens = pl.BlockSpec((1, H, C, D), lambda r, i, *_: (r, 0, i, 0))
    lanes = lambda rows: pl.BlockSpec((1, rows, C), lambda r, i, *_: (r, 0, i))
    call = pl.pallas_call(
        functools.partial(forward_kernel, band=band), name="window_attention_forward", interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(band.rows, band.blocks),
            in_specs=[tokens, tokens, tokens, lanes(1)], out_specs=[tokens, lanes(H)],
            scratch_shapes=[pltpu.VMEM(shape, dtype or jnp.float32) for shape, dtype in (
                ((slots, H, C, D), dtype), ((slots, H, D, C), dtype), ((H, 8, C), None), ((H, D, C), None),
                ((depth, 1, C, C), None), ((depth, 1, C, C), dtype))]),
        out_shape=[jax.ShapeDtypeStruct((band.rows, H, band.tokens, D), dtype), jax.ShapeDtypeStruct((band.rows, H, band.tokens), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT))
    return lambda q, k, v, documents, scale: call(band.first_seen(documents), scale, q, k, v, documents[:, None])


def backward_call(band, dtype, interpret=False):
    """(..., y, sums, dy [rows, H, T, D]) -> dq, dk, dv [rows, H, T, D]; the first five arguments and y, sums as forward_call has them"""
    C, slots, H, D, depth = band.block, band.reach + 1, band.heads, band.dim, 1
    at = lambda n: jnp.maximum(band.blocks - 1 - n, 0)  # the block of keys of program n of a row
    done = lambda n: jnp.minimum(band.blocks - 1 - n + band.reach, band.blocks - 1)  # the block whose dq leaves
    tokens = pl.BlockSpec((1, H, C, D), lambda r, n, *_: (r, 0, at(n), 0))
    lanes = lambda rows: pl.BlockSpec((1, rows, C), lambda r, n, *_: (r, 0, at(n)))
    call = pl.pallas_call(
        functools.partial(backward_kernel, band=band), name="window_attention_backward", interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(band.rows, band.blocks + band.reach),
            in_specs=[tokens, tokens, tokens, lanes(1), tokens, lanes(H), tokens],
            out_specs=[pl.BlockSpec((1, H, C, D), lambda r, n, *_: (r, 0, done(n), 0)), tokens, tokens],
            scratch_shapes=[pltpu.VMEM(shape, dtype or jnp.float32) for shape, dtype in (
                ((slots, H, D, C), dtype), ((slots, H, D, C), dtype), ((slots, H, D, C), None),
                ((slots, H, 1, C), None), ((slots, H, 1, C), None), ((slots, band.streams, 1, C), jnp.int32),
                ((H, D, C), None), ((H, D, C), None), ((depth, 2, C, C), None), ((depth, 2, C, C), dtype))]),
        out_shape=[jax.ShapeDtypeStruct((band.rows, H, band.tokens, D), dtype)] * 3,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT))
    return lambda q, k, v, documents, scale, y, sums, dy: call(
        band.last_seen_by(documents), scale, q, k, v, documents[:, None], y, sums, dy)

# -----------------------------------------------------------------------------
# The kernels in torch_xla

class WindowAttention(torch.autograd.Function):
    """window_attention by the TPU kernels, each device on its own rows."""
    @staticmethod
    def forward(ctx, q, k, v, documents, window, scale, paired):
        scale = scale.float().reshape(1)
        y, sums = call_kernel("forward", window, paired, q, k, v, documents, scale)
        ctx.window, ctx.paired = window, paired
        ctx.save_for_backward(q, k, v, documents, scale, y, sums)
        return y

    @staticmethod
    def backward(ctx, dy):
        dq, dk, dv = call_kernel("backward", ctx.window, ctx.paired, *ctx.saved_tensors, dy)
        return dq, dk, dv, None, None, None, None


def rows_are_spread_over() -> int:
    """The number of devices along the mesh's axis "data"; 1 if there is no mesh."""
    import torch_xla.distributed.spmd as xs
    mesh = xs.get_global_mesh()
    return 1 if mesh is None else mesh.shape()["data"]


def call_kernel(direction: str, window: int, paired: bool, *tensors: Tensor) -> list[Tensor]:
    """
    One node in torch_xla's graph. With a mesh the tensors are [B, ...] sharded over "data" and the kernel sees one device's rows:
    the partitioner is kept out by marking what goes in and out as sharded by hand.
    """
    import torch_xla.core.xla_builder as xb
    import torch_xla.distributed.spmd as xs
    devices = rows_are_spread_over()
    B, H, T, D = tensors[0].shape
    band = Band(B // devices, H, T, D, window, paired, block=256 if T % 256 == 0 else 128)
    run = xb.xla_computation_as_func(lowered(direction, band), f"window_attention_{direction}")
    if xs.get_global_mesh() is None:
        return run(list(tensors))
    spec = lambda x: ("data",) + (None,) * (x.dim() - 1) if x.dim() > 1 else (None,)
    local = [xs.enable_manual_sharding(x, spec(x)).global_tensor for x in tensors]
    return [xs.disable_manual_sharding(x, spec(x), (B, *x.shape[1:])).global_tensor for x in run(local)]


@functools.cache
def lowered(direction: str, band: Band):
    """The kernel as an XLA computation. Made once: a step is traced several times."""
    import torch_xla.core.xla_builder as xb
    import_jax()
    rows = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((band.rows, *shape), dtype)
    x, per_query = rows(band.heads, band.tokens, band.dim), rows(band.heads, band.tokens, dtype=jnp.float32)
    args = [x, x, x, rows(band.tokens, dtype=jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)]
    call, args = (forward_call, args) if direction == "forward" else (backward_call, [*args, x, per_query, x])
    hlo = jax.jit(call(band, jnp.bfloat16), keep_unused=True).trace(*args).lower(lowering_platforms=("tpu",)).compiler_ir("hlo")
    return xb.computation_from_module_proto(f"window_attention_{direction}", hlo.as_serialized_hlo_module_proto())
