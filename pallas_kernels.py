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

# None: the device decides. "TPU": trace the TPU kernels on any machine, to compile for one. "interpret": run them on a CPU, slowly.
target = None

# -----------------------------------------------------------------------------
# Sliding-window attention within documents (upstream: flash_attn_varlen_func with cu_seqlens and window_size=(window, 0))

def window_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, scale: Tensor, paired: bool = False) -> Tensor:
    """
    softmax(scale * q @ k.T) @ v where position i sees positions max(documents[i], i - window) .. i, both ends included.

    q, k, v: [B, H, T, D]. documents: [B, T] int32, the position in its row at which each token's document starts.
    window: tokens. scale: 0-D float32. Returns [B, H, T, D] in q's dtype.
    paired: heads h and h + H/2 form one sequence of length 2T, in which they take turns (position 2t, then 2t + 1);
    window counts positions of that sequence.

    The plain-torch twin of FusedAttention's middle part.
    """
    if not paired:
        return BandedAttention.apply(q, k, v, documents, window, scale)
    turns = lambda x: torch.stack(x.chunk(2, dim=1), dim=3).flatten(2, 3)  # [B, H, T, D] -> [B, H/2, 2T, D]
    y = BandedAttention.apply(turns(q), turns(k), turns(v), 2 * documents.repeat_interleave(2, dim=1), window, scale)
    return torch.cat(y.unflatten(2, (-1, 2)).unbind(3), dim=1)


def for_tpu(x: Tensor) -> bool:
    if x.device.type != "xla":
        return False
    import torch_xla.runtime as xr
    return target is not None or xr.device_type() == "TPU"


def takes_block(x: Tensor, W1: Tensor, W2: Tensor, attention: tuple[int, int, bool] | None) -> bool:
    """
    Whether a block's kernels, FusedAttention and ResidualMLP, run here; a warning says why not where one would expect it to.
    attention: heads, window, paired.
    """
    if not for_tpu(x):
        return False
    why_not = mlp_refuses(x, W1, W2) or (attention and attention_refuses(x, *attention))
    if why_not:
        warn_once(f"no TPU kernels for a block of {tuple(x.shape)}, {why_not}: plain torch instead, several times slower")
    return not why_not


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
    band = get_band(B, heads, T, D, window, paired)
    if (band.reach + 2) * heads * band.block * D * 8 > VMEM_LIMIT // 2:
        return f"a window of {window} does not fit in VMEM"
    if 30 * C * C + 58 * math.gcd(T, 512) * C > PROJECT_VMEM_LIMIT:  # weights, twice, their gradient, bf16 and f32; blocks
        return f"a dimension of {C} does not fit in VMEM"
    return None


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
# A row is cut into blocks of C tokens. A program of the grid has one block of one row, all heads of it, and goes through the blocks
# that this one meets (forward: the keys that its queries see; backward: the queries that see its keys), from the diagonal outwards,
# as far as the window and the documents reach. Blocks that later programs will meet again wait in rings in VMEM, so that each comes
# from HBM once, and nothing is padded, summed or copied outside.
#
# - Scores lie as [C keys, C queries]: what belongs to a query (where its view begins, its sum, its delta) then runs along the lanes,
#   as it does in HBM. Results come out as [D, C], which fills the 256 x 256 matrix unit twice as well as [C, D] would; the price is
#   that blocks are transposed as they come and go.
# - No running maximum: QK norm keeps |scale * q @ k| below scale * D, about 18, so exp cannot overflow.
# - Paired heads are two streams of T tokens whose positions are 2t and 2t + 1. Only the mask knows: nothing is interleaved.
# - A loop ends where the documents do: with documents of 600 tokens, the work of a window of 1408 is about half (simulated).
#   On a TPU none of this has been timed: compiled for v6e, its instruction bundles counted, and run in interpret mode.

EPS = torch.finfo(torch.float32).eps  # of RMSNorm
VMEM_LIMIT = 48 * 2**20  # bytes, of a v6e's 128 MiB

jax = jnp = pl = pltpu = None  # import_jax fills them in: only a trace for TPU needs them

def import_jax():
    """JAX lowers the kernels and runs nothing: told to stay on the CPU, it leaves the TPU to torch_xla."""
    global jax, jnp, pl, pltpu
    import jax
    jax.config.update("jax_platforms", "cpu")
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class Band:
    """The shapes of one call on one device, and which blocks and heads meet. A key: each Band is lowered once."""
    rows: int
    heads: int
    tokens: int
    dim: int
    window: int  # in positions: two to a token if paired
    paired: bool
    block: int  # C
    places: tuple[int, int, int] = (0, 0, 0)  # q, k, v are these H heads of their arrays: (0, 1, 2) takes all from one [B, 3H, T, D]

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

    def first_seen(self, documents):
        """[rows, T] -> [rows, blocks]: the first block of keys that each block of queries sees (documents never decrease)."""
        s, C = self.streams, self.block
        start = jax.lax.slice(documents, (0, 0), documents.shape, (1, C))  # of the document of each block's first query
        return jnp.maximum(s * start, s * C * jnp.arange(self.blocks, dtype=jnp.int32) - self.window) // (s * C)

    def last_seen_by(self, documents):
        """[rows, T] -> [rows, blocks]: the last block of queries that sees each block of keys."""
        keys = jnp.arange(self.blocks, dtype=jnp.int32)[:, None]
        return jnp.sum(self.first_seen(documents)[:, None] <= keys, axis=-1, dtype=jnp.int32) - 1

    def view(self, documents, i, a):
        """documents [1, C] of block i -> [1, C]: the first position that each query of stream a sees."""
        t = i * self.block + jax.lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        return jnp.maximum(self.streams * documents, self.streams * t + a - self.window)

    def masks(self, views, j, diagonal):
        """For each two streams [C keys of block j, C queries]: 0 where they see each other, -1e9 where not."""
        s, C = self.streams, self.block
        keys, queries = (s * jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
        def mask(a, b):
            visible = keys >= views[a] - (s * C * j + b)
            if diagonal:
                visible &= keys + b <= queries + a
            return jnp.where(visible, 0.0, -1e9).astype(jnp.float32)
        return {(a, b): mask(a, b) for a in range(s) for b in range(s)}


def matmul(a, b, transpose_b=False):
    if target == "interpret":  # torch_xla's CPU runtime has no bfloat16 x bfloat16 -> float32
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jax.lax.dot_general(a, b, (((1,), (1 if transpose_b else 0,)), ((), ())), preferred_element_type=jnp.float32)


def pipeline(n, depth, first, to_scores, to_probs, consume, ahead, behind):
    """
    Meetings 0 .. n-1 of two blocks, in the order that keeps the matrix unit busy: while the vector unit turns the scores of
    meeting m into probabilities, the matrix unit computes the scores of m + depth and consumes the probabilities of m - depth.
    An empty matrix unit takes hundreds of cycles to fill, so the ends reach into the neighbouring blocks, through VMEM: the last
    scores computed here are the next block's first. first: there is no previous block. drain does what the last one leaves.

    to_scores(m, step) -> arrays and consume(m, step, arrays) are the matmuls of this block (step 0), the previous (-1) or the
    next (1; it may not exist, then nothing uses its scores); to_probs(m, arrays) -> arrays. ahead, behind: [depth, arrays, C, C].
    """
    scores = {m: to_scores(m, 0) if first else load(ahead, m) for m in range(depth)}
    probs = {} if first else {m - depth: load(behind, m) for m in range(depth)}
    for m in range(n):
        if m + depth < n:
            scores[m + depth] = to_scores(m + depth, 0)
        else:
            store(ahead, m + depth - n, to_scores(m + depth - n, 1))
        if m - depth in probs:
            consume((m - depth) % n, 0 if m >= depth else -1, probs.pop(m - depth))
        probs[m] = to_probs(m, scores.pop(m))
    for m in range(depth):
        store(behind, m, probs.pop(n - depth + m))

def drain(n, depth, consume, behind):
    for m in range(depth):
        consume(n - depth + m, -1, load(behind, m))

def load(ref, m):
    return tuple(ref[m, x] for x in range(ref.shape[1]))

def store(ref, m, arrays):
    for x, array in enumerate(arrays):
        ref[m, x] = array


def forward_kernel(first_seen, scale, q, k, v, documents, gate, y, sums, k_ring, v_ring, y_acc, sums_acc, ahead, behind, *, band):
    """
    One block of queries: y, and for the backward pass the sums of exponentials. Blocks: q, k, v [1, H, C, D], y [1, C, H * D],
    documents [1, 1, C], gate, sums [1, H, C]. In VMEM: k_ring [slots, H, C, D], v_ring [slots, H, D, C], y_acc [H, D, C], sums_acc
    [H, 8, C].
    """
    r, i = pl.program_id(0), pl.program_id(1)
    slots, H, C, D = k_ring.shape
    slot = lambda j: jax.lax.rem(j + slots, slots)  # of block j; the pipeline may ask for block -1
    views = [band.view(documents[0], i, a) for a in range(band.streams)]
    meetings, depth = band.meetings, ahead.shape[0]

    def bring_in(h):
        k_ring[slot(i), h] = k[0, h]
        v_ring[slot(i), h] = v[0, h].T
        y_acc[h] = jnp.zeros((D, C), jnp.float32)
        sums_acc[h] = jnp.zeros((8, C), jnp.float32)
    bring_in = functools.cache(bring_in)  # once a head

    def consume(j, m, step, probs):
        _, _, h, g = meetings[m]
        y_acc[h] += matmul(v_ring[slot(j - step), g], probs[0])

    def meet(j, diagonal):
        masks = band.masks(views, j, diagonal)
        def to_scores(m, step):
            _, _, h, g = meetings[m]
            if diagonal and step == 0:
                bring_in(h), bring_in(g)
            return (matmul(k_ring[slot(j - step), g], q[0, h], transpose_b=True),)
        def to_probs(m, scores):
            a, b, h, _ = meetings[m]
            p = 2.0 ** (scores[0] * (scale[0] * math.log2(math.e)) + masks[a, b])
            sums_acc[h] += p.reshape(C // 8, 8, C).sum(0)
            return (p.astype(q.dtype),)
        pipeline(len(meetings), depth, diagonal, to_scores, to_probs, functools.partial(consume, j), ahead, behind)

    meet(i, diagonal=True)
    jax.lax.fori_loop(1, i - first_seen[r, i] + 1, lambda n, _: meet(i - n, diagonal=False), None)
    drain(len(meetings), depth, functools.partial(consume, first_seen[r, i] - 1), behind)
    for h in range(H):
        total = sums_acc[h].sum(0, keepdims=True)
        sums[0, h] = total[0]
        y[0, :, h * D:(h + 1) * D] = (y_acc[h] * (gate[0, h:h + 1] / total)).astype(y.dtype).T


def backward_kernel(last_seen_by, scale, q, k, v, documents, gate, y, sums, dy, dq, dk, dv, delta, q_ring, dy_ring, dq_ring,
                    delta_ring, lse_ring, view_ring, k_T, dk_acc, dv_acc, ahead, behind, *, band):
    """
    One block of keys, from the row's last to its first: its dk and dv, and its share of the dq of the queries that see it. The dq
    of a block is complete, and leaves, with the block `reach` before it; the last `reach` programs of a row do nothing else.
    Rings, of blocks of queries: q, dy, dq [slots, H, D, C]; delta, lse [slots, H, 1, C]; view [slots, streams, 1, C].
    k_T, dk_acc, dv_acc [H, D, C]. Blocks of y, dy: [1, C, H * D]. y is gated, so its sum with dy, delta, is gate times the gate's gradient.
    """
    r, j = pl.program_id(0), band.blocks - 1 - pl.program_id(1)
    slots, H, D, C = q_ring.shape
    slot = lambda i: jax.lax.rem(i, slots)
    meetings, depth = band.meetings, ahead.shape[0]

    def bring_in(h):
        at = slice(h * D, (h + 1) * D)
        dy_T = dy[0, :, at].T.astype(jnp.float32)
        q_ring[slot(j), h], dy_ring[slot(j), h], k_T[h] = q[0, h].T, (dy_T * gate[0, h:h + 1]).astype(dy.dtype), k[0, h].T
        delta_ring[slot(j), h] = (dy_T * y[0, :, at].T.astype(jnp.float32)).sum(0, keepdims=True)
        delta[0, h:h + 1] = delta_ring[slot(j), h]
        lse_ring[slot(j), h] = jnp.log2(sums[0, h:h + 1])
        dq_ring[slot(j), h] = dk_acc[h] = dv_acc[h] = jnp.zeros((D, C), jnp.float32)
    bring_in = functools.cache(bring_in)  # once a head

    def send_dq(h):
        dq[0, h] = (dq_ring[slot(j + band.reach), h] * scale[0]).astype(dq.dtype).T

    def consume(i, m, step, probs):
        _, _, h, g = meetings[m]
        p, ds = probs
        dv_acc[g] += matmul(dy_ring[slot(i + step), h], p, transpose_b=True)
        dk_acc[g] += matmul(q_ring[slot(i + step), h], ds, transpose_b=True)
        dq_ring[slot(i + step), h] += matmul(k_T[g], ds)

    def meet(i, diagonal):
        masks = band.masks(view_ring[slot(i)], j, diagonal)
        def to_scores(m, step):
            _, _, h, g = meetings[m]
            if diagonal and step == 0:
                bring_in(h), bring_in(g)
            return matmul(k[0, g], q_ring[slot(i + step), h]), matmul(v[0, g], dy_ring[slot(i + step), h])
        def to_probs(m, scores):
            a, b, h, _ = meetings[m]
            p = 2.0 ** (scores[0] * (scale[0] * math.log2(math.e)) + masks[a, b] - lse_ring[slot(i), h])
            ds = p * (scores[1] - delta_ring[slot(i), h])
            return p.astype(q.dtype), ds.astype(q.dtype)
        pipeline(len(meetings), depth, diagonal, to_scores, to_probs, functools.partial(consume, i), ahead, behind)

    @pl.when(j >= 0)
    def _():
        for a in range(band.streams):
            view_ring[slot(j), a] = band.view(documents[0], j, a)
        meet(j, diagonal=True)
        jax.lax.fori_loop(j + 1, last_seen_by[r, j] + 1, lambda i, _: meet(i, diagonal=False), None)
        drain(len(meetings), depth, functools.partial(consume, last_seen_by[r, j] + 1), behind)
        for h in range(H):
            dk[0, h] = (dk_acc[h] * scale[0]).astype(dk.dtype).T
            dv[0, h] = dv_acc[h].astype(dv.dtype).T
            send_dq(h)

    @pl.when(j < 0)
    def _():
        for h in range(H):
            send_dq(h)


def forward_call(band: Band, dtype, interpret=False):
    """
    A function (q, k, v [rows, H, T, D], documents [rows, T] int32, gate [rows, H, T] f32, scale [1] f32) -> gate * y [rows, T, H * D], sums
    of exponentials [rows, H, T] f32.
    """
    C, H, D, slots, depth, f32 = band.block, band.heads, band.dim, band.reach + 1, min(2, len(band.meetings)), jnp.float32
    heads = lambda place: pl.BlockSpec((1, H, C, D), lambda r, i, *_: (r, place, i, 0))
    lanes = lambda n: pl.BlockSpec((1, n, C), lambda r, i, *_: (r, 0, i))
    scratch = [((slots, H, C, D), dtype), ((slots, H, D, C), dtype), ((H, D, C), f32), ((H, 8, C), f32),
               ((depth, 1, C, C), f32), ((depth, 1, C, C), dtype)]
    call = pallas_call(
        forward_kernel, band, (band.rows, band.blocks), scratch, interpret,
        in_specs=[*map(heads, band.places), lanes(1), lanes(H)],
        out_specs=[pl.BlockSpec((1, C, H * D), lambda r, i, *_: (r, i, 0)), lanes(H)],
        out_shape=[((band.rows, band.tokens, H * D), dtype), ((band.rows, H, band.tokens), f32)])
    return lambda q, k, v, documents, gate, scale: call(band.first_seen(documents), scale, q, k, v, documents[:, None], gate)


def backward_call(band: Band, dtype, interpret=False):
    """A function (what forward_call's takes, what it returns, dy as y) -> dq, dk, dv [rows, H, T, D], gate * dgate [rows, H, T] f32."""
    C, H, D, slots, depth, f32 = band.block, band.heads, band.dim, band.reach + 1, 1, jnp.float32
    here = lambda n: jnp.maximum(band.blocks - 1 - n, 0)  # the block of keys of a row's program n
    done = lambda n: jnp.minimum(band.blocks - 1 - n + band.reach, band.blocks - 1)  # the block whose dq leaves
    heads = lambda block, place=0: pl.BlockSpec((1, H, C, D), lambda r, n, *_: (r, place, block(n), 0))
    lanes = lambda rows: pl.BlockSpec((1, rows, C), lambda r, n, *_: (r, 0, here(n)))
    tokens = pl.BlockSpec((1, C, H * D), lambda r, n, *_: (r, here(n), 0))
    scratch = [((slots, H, D, C), dtype), ((slots, H, D, C), dtype), ((slots, H, D, C), f32), ((slots, H, 1, C), f32),
               ((slots, H, 1, C), f32), ((slots, band.streams, 1, C), jnp.int32),
               ((H, D, C), dtype), ((H, D, C), f32), ((H, D, C), f32), ((depth, 2, C, C), f32), ((depth, 2, C, C), dtype)]
    call = pallas_call(
        backward_kernel, band, (band.rows, band.blocks + band.reach), scratch, interpret,
        in_specs=[*(heads(here, place) for place in band.places), lanes(1), lanes(H), tokens, lanes(H), tokens],
        out_specs=[heads(done), heads(here), heads(here), lanes(H)],
        out_shape=[((band.rows, H, band.tokens, D), dtype)] * 3 + [((band.rows, H, band.tokens), f32)])
    return lambda q, k, v, documents, gate, scale, y, sums, dy: call(
        band.last_seen_by(documents), scale, q, k, v, documents[:, None], gate, y, sums, dy)


# -----------------------------------------------------------------------------
# What comes before attention: the mix of x with x0, norm, projection to q, k and v, gates, QK norm, rotary embedding, key offset and value
# embedding, in one pass over x. XLA needs three dozen, forward and backward, and copies to exchange the halves of a head; in VMEM that is a
# rotation of lanes. The vector unit prepares two heads while the matrix unit multiplies for the next two.

PROJECT_VMEM_LIMIT = 96 * 2**20  # bytes, of a v6e's 128 MiB
LANES = 128  # of a vector register. Gates read the first 12 features: their weights are padded with zeros to as many, in VMEM

@dataclasses.dataclass(frozen=True)
class Heads:
    """The shapes of one call on one device."""
    rows: int
    heads: int
    tokens: int
    dim: int
    paired: bool
    key_offset: bool
    ve: bool  # value embeddings
    mix: bool  # x is mixed with x0 first
    keep: bool  # store what the backward pass reads: q and k before their norm
    gate: int = 12  # features that gates read

    @property
    def block(self) -> int:
        return math.gcd(self.tokens, 512)

    @property
    def lambdas(self) -> int:
        return 1 + 2 * self.mix

    def arguments(self, refs: tuple) -> tuple[tuple, tuple, tuple]:
        """The last arguments of a kernel: what value embeddings bring, what the mix brings, the rest."""
        ve, mix = 2 * self.ve, int(self.mix)
        return refs[:ve], refs[ve:ve + mix], refs[ve + mix:]


def scaled(factor, x):
    """factor * x, rounded as x."""
    return (factor * x.astype(jnp.float32)).astype(x.dtype)


def mixed(x, lambdas, x0):
    """A block of x [1, bt, C], with its share of x0, if x0 is (x0,) and not (): float32, rounded as x."""
    if not x0:
        return x[0].astype(jnp.float32)
    return (lambdas[1][0] * x[0].astype(jnp.float32) + lambdas[2][0] * x0[0][0].astype(jnp.float32)).astype(x.dtype).astype(jnp.float32)


def rotate(x, factors, h, back=False):
    """Yarn.rotary of head h of x [n, D], or its transpose, float32."""
    factor1, factor2 = factors[h % len(factors)]
    half = x.shape[-1] // 2
    return x * factor1 + (pltpu.roll(x * factor2, half, 1) if back else pltpu.roll(x, half, 1) * factor2)


def by_strips(when, features, do, strip=256):
    """do(`strip` features) for all of them, if `when`: a loop that may be empty, for its program is short."""
    jax.lax.fori_loop(0, jnp.where(when, features // strip, 0), lambda n, _: do(pl.ds(n * strip, strip)), None)


def means(x, head_dim, dtype):
    """
    [n, k * head_dim] -> the mean of each row of each head, in all of its lanes, the terms rounded. By the matrix unit: the vector unit
    would wait for sums along its lanes.
    """
    head = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (x.shape[1],) * 2, axis) // head_dim
    return matmul(x.astype(dtype), jnp.where(head(0) == head(1), 1 / head_dim, 0.0).astype(dtype))


def sigmoid(x, dtype):
    """Of a matmul's result, rounded before and after, float32."""
    return jax.nn.sigmoid(x.astype(dtype).astype(jnp.float32)).astype(dtype).astype(jnp.float32)


def normed(x):
    """[C, d] -> norm of each row, and what it was multiplied by, float32."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt((x * x).mean(1, keepdims=True) + EPS)
    return x * scale, scale


def widen(wide, *narrow):
    """Puts weights [H, n] into [., H, 128], behind them zeros."""
    for i, w in enumerate(narrow):
        wide[i] = jnp.zeros(wide.shape[1:], wide.dtype)
        wide[i, :, :w.shape[1]] = w[...]


def project_kernel(x, W, *refs, heads):
    """
    Blocks: x [1, bt, C], W [3C, C], gate_w [H, n], factors [1 or 2, bt, D], still [1, D]; with value embeddings ve [1, bt, C], ve_gate_w
    [H, n]; with a mix x0 [1, bt, C]; lambdas [1] float32 in SMEM: W's, and with a mix those of x and x0; qkv [1, 3H, bt, D], gate
    [1, H, bt] float32, raw [1, 2H, bt, D] if kept, y [1, bt, C], the mix. In VMEM: before [H, 1, D], the keys before the block; w [3C, C],
    its lambda times W; gates [2, H, 128], the weights of the gates.
    """
    lambdas, (gate_w, factor1, factor2, still, *refs) = refs[:heads.lambdas], refs[heads.lambdas:]
    values, x0, (qkv, gate, *rest, before, w, gates) = heads.arguments(refs)
    raw, y = rest[:heads.keep], rest[heads.keep:]
    H, D, bt, dtype, f32 = heads.heads, heads.dim, heads.block, x.dtype, jnp.float32
    begins = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
    def begin(strip):
        w[strip] = scaled(lambdas[0][0], W[strip])
    by_strips(begins, W.shape[0], begin, 32)
    pl.when(begins)(lambda: widen(gates, gate_w, *values[1:]))
    x_mixed = mixed(x, lambdas, x0)
    if x0:
        y[0][0] = x_mixed.astype(dtype)
    x_normed = normed(x_mixed)[0].astype(dtype)
    gate[0] = sigmoid(matmul(gates[0], x_normed[:, :LANES], transpose_b=True), dtype)
    if values:
        ve, ve_gate = values[0], 2 * sigmoid(matmul(x_normed[:, :LANES], gates[1], transpose_b=True), dtype)
    factors = [(factor1[i].astype(f32), factor2[i].astype(f32)) for i in range(factor1.shape[0])]

    def start(two):
        return matmul(x_normed, w[two[0] * D:two[1] * D], transpose_b=True)
    def turn(two, projected):
        for n, h in enumerate(range(*two)):
            y = projected[:, n * D:(n + 1) * D].astype(dtype)
            if h < 2 * H:
                if raw:
                    raw[0][0, h] = y
                y = y.astype(f32)
                y = rotate(y * jax.lax.rsqrt(means(y * y, D, dtype) + EPS), factors, h % H)
                if heads.key_offset and h >= H:
                    t = jax.lax.broadcasted_iota(jnp.int32, (bt, D), 0)
                    last = y[bt - 1:]
                    first = jnp.where(pl.program_id(1) == 0, y[:1], before[h - H])
                    y = jnp.where(still[...] > 0, jnp.where(t == 0, first, pltpu.roll(y, 1, 0)), y)
                    before[h - H] = last
            elif values:
                g = h - 2 * H
                y = y.astype(f32) + ve_gate[:, g:g + 1] * ve[0, :, g * D:(g + 1) * D].astype(f32)
            qkv[0, h] = y.astype(dtype)
    two_by_two = [(h, min(h + 2, 3 * H)) for h in range(0, 3 * H, 2)]  # 256 columns for the matrix unit
    stream(two_by_two, start, turn, lambda two, _: None)


def project_backward_kernel(slot, stack, x, W, *refs, heads):
    """
    From the row's last block to its first. Blocks as above; dq, dk, dv [1, H, bt, D], delta [1, H, bt], the gate's gradient times the gate;
    dx [1, bt, C], dW [1, 3C, C], a place in the stack, which stays where it is, dlambdas, dgate_w, dve_gate_w [H, n], dve [1, bt, C]; with
    a mix also dy [1, bt, C], what came back to it by other ways, and dx0 [1, bt, C]. In VMEM: after [H, 1, D], the first dk of the block
    that comes next in the row; w and gates as above; dqkv [bt, 3C], dx_acc [bt, C], dw_acc [C, 3C], dgates_acc [2, H, 128], dlambdas_acc
    [lambdas, 8, C].
    """
    lambdas, (gate_w, factor1, factor2, still, raw, dq, dk, dv, gate, delta, *refs) = refs[:heads.lambdas], refs[heads.lambdas:]
    values, x0, rest = heads.arguments(refs)
    dy_mix, (dx, dW, *rest) = rest[:heads.mix], rest[heads.mix:]
    dlambdas, (dgate_w, *rest) = rest[:heads.lambdas], rest[heads.lambdas:]
    dvalues, dx0, (after, w, gates, dqkv, dx_acc, dw_acc, dgates_acc, dlambdas_acc) = heads.arguments(rest)
    H, D, bt, dtype, f32 = heads.heads, heads.dim, heads.block, x.dtype, jnp.float32
    C, n = H * D, pl.num_programs(1) - 1 - pl.program_id(1)
    begins = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
    ends = (pl.program_id(0) == pl.num_programs(0) - 1) & (n == 0)

    @pl.when(begins)
    def _():
        widen(gates, gate_w, *values[1:])
        for ref in (dgates_acc, dlambdas_acc):
            ref[...] = jnp.zeros_like(ref)
    def begin(strip):
        dw_acc[:, strip] = jnp.zeros((C, D), f32)
    by_strips(begins, 3 * C, begin, D)
    def begin(strip):
        w[strip] = scaled(lambdas[0][0], W[strip])
    by_strips(begins, 3 * C, begin, 32)
    def to_lambda(i, d, x):
        dlambdas_acc[i] += (d.astype(f32) * x.astype(f32)).reshape(-1, 8, C).sum(0)

    x_normed, scale = normed(mixed(x, lambdas, x0))
    rounded = x_normed.astype(dtype)
    x_T, first = rounded.T, rounded[:, :LANES]
    factors = [(factor1[i].astype(f32), factor2[i].astype(f32)) for i in range(factor1.shape[0])]
    if values:
        ve, ve_gate, dve_gate = values[0], 2 * sigmoid(matmul(first, gates[1], transpose_b=True), dtype), []

    def turn(third, _):  # q, k, v
        for h in range(H):
            at, dy = slice((third * H + h) * D, (third * H + h + 1) * D), (dq, dk, dv)[third][0, h]
            if third == 2:
                dqkv[:, at] = dy
                if values:
                    dy, lanes = dy.astype(f32), slice(h * D, (h + 1) * D)
                    dvalues[0][0, :, lanes] = (ve_gate[:, h:h + 1] * dy).astype(dtype)
                    dve_gate.append((dy * ve[0, :, lanes].astype(f32)).sum(1, keepdims=True))
                continue
            dy = dy.astype(f32)
            if heads.key_offset and third == 1:
                t = jax.lax.broadcasted_iota(jnp.int32, (bt, D), 0)
                following = jnp.where(pl.program_id(1) == 0, 0.0, after[h])  # the row's last key has no successor
                moved = jnp.where(t == bt - 1, following, pltpu.roll(dy, bt - 1, 0))
                after[h] = dy[:1]
                dy = jnp.where(still[...] > 0, jnp.where(n * bt + t == 0, moved + dy, moved), dy)  # the first one kept its own
            dy, y = rotate(dy, factors, h, back=True), raw[0, third * H + h].astype(f32)
            both = means(jnp.concatenate([y * y, dy * y], axis=1), D, dtype)
            r = jax.lax.rsqrt(both[:, :D] + EPS)
            dqkv[:, at] = (r * (dy - y * (r * r * both[:, D:]))).astype(dtype)
    def finish(third, _):
        at = slice(third * C, (third + 1) * C)
        part = matmul(dqkv[:, at], w[at])
        dx_acc[...] = dx_acc[...] + part if third else part
        dw_acc[:, at] += matmul(x_T, dqkv[:, at])
    stream(range(3), lambda third: None, turn, finish)

    def back_through(i, dlogits):  # [H, bt]
        dlogits = dlogits.astype(dtype)
        dgates_acc[i] += matmul(dlogits, first)
        dx_acc[:, :LANES] += matmul(dlogits.T, gates[i])
    back_through(0, delta[0] * (1 - gate[0]))
    if values:
        back_through(1, (jnp.concatenate(dve_gate, axis=1) * ve_gate * (1 - ve_gate / 2)).T)
    d = dx_acc[...].astype(dtype).astype(f32)
    d = scale * (d - x_normed * (d * x_normed).mean(1, keepdims=True))
    if x0:
        d = d.astype(dtype).astype(f32) + dy_mix[0][0].astype(f32)
        to_lambda(1, d, x[0])
        to_lambda(2, d, x0[0][0])
        dx0[0][0] = (lambdas[2][0] * d).astype(dtype)
        d = lambdas[1][0] * d
    dx[0] = d.astype(dtype)
    def end(strip):
        dW[0, strip] = dw_acc[:, strip].astype(dtype).T
    by_strips(ends, 3 * C, end, D)
    def end(strip):
        dw = dW[0, strip]
        to_lambda(0, dw, W[strip])
        dW[0, strip] = scaled(lambdas[0][0], dw)
    by_strips(ends, 3 * C, end, 32)
    @pl.when(ends)
    def _():
        for i, dgate in enumerate((dgate_w, *dvalues[1:])):
            dgate[...] = dgates_acc[i, :, :dgate.shape[1]].astype(dtype)
        for i, dlambda in enumerate(dlambdas):
            dlambda[0] = dlambdas_acc[i].sum()


def project_call(heads: Heads, dtype, interpret=False):
    """
    A function (x [rows, T, C], W [4C, C], of which it takes 3C, a lambda [1] f32 or, with a mix, three, gate_w [H, n], factor1, factor2
    [1 or 2, T, D], still [1, D] f32, with value embeddings ve [rows, T, C], ve_gate_w [H, n], with a mix x0 [rows, T, C]) -> qkv
    [rows, 3H, T, D] for attention, its gate [rows, H, T] f32, if heads.keep q and k before their norm [rows, 2H, T, D], with a mix the sum
    of x and x0 by the other two lambdas.
    """
    return project_pallas_call(project_kernel, heads, dtype, interpret, lambda i: i,
                               "xW" + "l" * heads.lambdas + "gff1" + "xg" * heads.ve + "x" * heads.mix,
                               "3G" + "2" * heads.keep + "x" * heads.mix, [])


def project_backward_call(heads: Heads, dtype, interpret=False):
    """
    A function (slot [1] int32, stack [n, 4C, C], x, W, lambdas, gate_w, factor1, factor2, still as above, q and k before their norm, dq,
    dk, dv [rows, H, T, D], gate, its gradient times gate [rows, H, T] f32, ve, ve_gate_w, x0 and the gradient of the mix) -> dx, the stack
    with dW's 3C rows in that slot, dlambdas, dgate_w, with value embeddings dve, dve_gate_w, with a mix dx0.
    """
    last, bt, C, f32 = heads.tokens // heads.block - 1, heads.block, heads.heads * heads.dim, jnp.float32
    scratch = [((bt, 3 * C), dtype), ((bt, C), f32), ((C, 3 * C), f32), ((2, heads.heads, LANES), f32), ((heads.lambdas, 8, C), f32)]
    return lambda slot, stack, *more: project_pallas_call(
        project_backward_kernel, heads, dtype, interpret, lambda i: last - i,
        "sxW" + "l" * heads.lambdas + "gff12HHHGG" + "xg" * heads.ve + "xx" * heads.mix,
        "xs" + "l" * heads.lambdas + "g" + "xg" * heads.ve + "x" * heads.mix, scratch, stack.shape[0])(slot, stack, *more)


def project_pallas_call(kernel, heads, dtype, interpret, block, inputs: str, outputs: str, scratch, stacked=0):
    """
    inputs, outputs: a letter for each array: x [rows, T, C], W the first [3C, C] of [4C, C], g [H, n], f a factor, 1 [1, D] float32,
    H, 2, 3 [rows, H, 2H, 3H, T, D], G [rows, H, T] float32, l a lambda; s, a stack [stacked, 4C, C] in HBM: of one place, whose number
    comes before all else, the first 3C rows are written. block: which one a program has.
    """
    R, H, T, D, bt, f32 = heads.rows, heads.heads, heads.tokens, heads.dim, heads.block, jnp.float32
    C, n, once = H * D, 2 if heads.paired else 1, dict(pipeline_mode=pl.Buffered(1))
    by_head = lambda n: ((R, n, T, D), dtype, pl.BlockSpec((1, n, bt, D), lambda r, i, *_: (r, 0, block(i), 0)))
    whole = lambda dtype, *shape: (shape, dtype, pl.BlockSpec(shape, lambda r, i, *_: (0,) * len(shape), **once))
    arrays = {"x": ((R, T, C), dtype, pl.BlockSpec((1, bt, C), lambda r, i, *_: (r, block(i), 0))),
              "W": ((4 * C, C), dtype, pl.BlockSpec((3 * C, C), lambda r, i, *_: (0, 0), **once)),
              "s": ((stacked, 4 * C, C), dtype, pl.BlockSpec((1, 3 * C, C), lambda r, i, slot: (slot[0], 0, 0), **once)),
              "g": whole(dtype, H, heads.gate), "1": whole(f32, 1, D),
              "f": ((n, T, D), dtype, pl.BlockSpec((n, bt, D), lambda r, i, *_: (0, block(i), 0))),
              "l": ((1,), f32, pl.BlockSpec(memory_space=pltpu.SMEM)),
              "H": by_head(H), "2": by_head(2 * H), "3": by_head(3 * H),
              "G": ((R, H, T), f32, pl.BlockSpec((1, H, bt), lambda r, i, *_: (r, 0, block(i))))}
    return pl.pallas_call(
        functools.partial(kernel, heads=heads), name=kernel.__name__, interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=int(stacked > 0), grid=(R, T // bt),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY) if x == "s" else arrays[x][2] for x in inputs],
            out_specs=[arrays[x][2] for x in outputs],
            scratch_shapes=[pltpu.VMEM((H, 1, D), f32), pltpu.VMEM((3 * C, C), dtype), pltpu.VMEM((2, H, LANES), dtype),
                            *(pltpu.VMEM(*x) for x in scratch)]),
        out_shape=[jax.ShapeDtypeStruct(*arrays[x][:2]) for x in outputs], input_output_aliases={1: 1} if stacked else {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=PROJECT_VMEM_LIMIT))


def pallas_call(kernel, band, grid, scratch, interpret, in_specs, out_specs, out_shape):
    """The kernel's first two arguments, how far to go and the scale, are scalars in SMEM; `scratch` is VMEM that lives on."""
    return pl.pallas_call(
        functools.partial(kernel, band=band), name=f"window_attention_{kernel.__name__}", interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=2, grid=grid, in_specs=in_specs, out_specs=out_specs,
                                               scratch_shapes=[pltpu.VMEM(*x) for x in scratch]),
        out_shape=[jax.ShapeDtypeStruct(*x) for x in out_shape],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT))

# -----------------------------------------------------------------------------
# lm_head with softcapped cross entropy (upstream: FusedSoftcappedCrossEntropy's Triton kernels)
#
# With th = tanh((x @ w.T + 5) / 15): softcap z = 11.5 * (1 + th), e = exp(z - 11.5) = exp(11.5 * th), and sum = e.sum over V.
# The gradient of a logit is A * (e * (1 - th^2) - [its own, at targets]), where A, one number a token, waits for sum and for the
# gradient of the loss. So the forward pass, in one sweep over V, multiplies P = e * (1 - th^2) by w for dx before sum is known, and
# what is left for the backward pass is dw = P.T @ (A * x). Of the last `kept` tokens of a row P is kept; the others' is computed again.
# Targets never meet the sweep: their rows of w are gathered, and what P should be there replaces it on its way into dw.
# On a TPU none of this has been timed: compiled for v6e, its instruction bundles counted, and run in interpret mode.

SOFTCAP_A, SOFTCAP_B, SOFTCAP_C = 23.0, 5.0, 7.5  # A * sigmoid((logits + B) / C)
LM_HEAD_VMEM_LIMIT = 100 * 2**20  # bytes, of a v6e's 128 MiB
LM_HEAD_KEPT = 49152  # tokens of a device whose P is kept: 4.6 GiB at the record's vocabulary

@dataclasses.dataclass(frozen=True)
class LmHead:
    """The shapes of one call on one device. A key: each is lowered once. Token blocks divide tokens and kept, V's need not divide V."""
    rows: int
    tokens: int
    dim: int
    vocab: int
    targets: int  # of each token: itself and those after it
    kept: int  # tokens at a row's end whose P [kept, V] stays in HBM for the backward pass
    on_top: bool  # dw comes on top of what there is of it already
    forward_block: tuple[int, int]  # tokens, vocabulary
    backward_block: tuple[int, int]

    def ids(self, targets):
        """[rows, T] -> [rows, targets, T]: each token's own and the next ones; -1 where the row has ended."""
        return jnp.stack([jnp.pad(targets[:, k:], ((0, 0), (0, k)), constant_values=-1) for k in range(self.targets)], axis=1)


def columns(rows):
    """[n, m] -> [m, n], for n up to 8, float32. In HBM tokens lie along the lanes: n numbers of each would take 128."""
    which = jax.lax.broadcasted_iota(jnp.int32, (8, rows.shape[1]), 0)
    return sum(jnp.where(which == k, rows[k:k + 1], 0.0) for k in range(rows.shape[0])).T[:, :rows.shape[0]]


def to_rows(columns):
    """[m, 1] float32, n of them, -> [n, m]."""
    which = jax.lax.broadcasted_iota(jnp.int32, (columns[0].shape[0], 128), 1)
    return sum(jnp.where(which == k, column, 0.0) for k, column in enumerate(columns)).T[:len(columns)]


def exp_softcap(logits, b=SOFTCAP_B):
    """th and e of float32 logits; b: number or row that is added to them."""
    th = jnp.tanh((logits + b) * (1 / (2 * SOFTCAP_C)))
    return th, 2.0 ** (th * (SOFTCAP_A / 2 * math.log2(math.e)))


def wide_matmul(a, b, transpose_b=False):
    """matmul, 256 columns at a time: compiled for v6e, a pass over blocks of 512 x 512 then takes 7% fewer bundles."""
    columns = [b[i:i + 256] if transpose_b else b[:, i:i + 256] for i in range(0, b.shape[0 if transpose_b else 1], 256)]
    return jnp.concatenate([matmul(a, c, transpose_b) for c in columns], axis=1)


def stream(units, start, turn, finish):
    """finish(turn(start(unit))) of each unit, each a matmul, vector work, a matmul, in the order that lets them overlap."""
    started, turned = start(units[0]), None
    for i, unit in enumerate(units):
        current, started = started, start(units[i + 1]) if i + 1 < len(units) else None
        if i:
            finish(units[i - 1], turned)
        turned = turn(unit, current)
    finish(units[-1], turned)


def losses_kernel(bias, weights, x, w, w_rows, next_rows, numbers, *refs, head):
    """
    A block of tokens against a block of the vocabulary; after the last of these the targets. Blocks: bias [1, Vb] float32, weights
    [1, targets, Tb] float32, x [1, Tb, d], w [1, Vb, d], w_rows, next_rows [1, Tb, d], [1, 16, d], the rows of w of this block's ids and
    of the next one's first; numbers [1, targets + 1, Tb] float32: th at each target, then the sum of exponentials. For a backward pass
    dx [1, Tb, d] and, if any is kept, P [1, Tb, Vb]. In VMEM: sum_acc [Tb, 128], row_buffer [Tb + 16, d] and, with dx, dx_acc [Tb, d].
    """
    results = max(0, len(refs) - 3)
    (dx, p), (sum_acc, row_buffer, *dx_acc) = (*refs[:results], None, None)[:2], refs[results:]
    v, last = pl.program_id(2), pl.num_programs(2) - 1
    Tb, Vb, n = x.shape[1], w.shape[1], head.targets

    @pl.when(v == 0)
    def _():
        for ref in (sum_acc, *dx_acc):
            ref[...] = jnp.zeros_like(ref)
    rest = -head.vocab % Vb
    if rest:
        @pl.when(v == last)
        def _():  # beyond the vocabulary lies whatever memory held
            w[0, Vb - rest:] = jnp.zeros((rest, head.dim), w.dtype)

    def start(t):
        return wide_matmul(x[0, t], w[0], transpose_b=True)
    def turn(t, logits):
        th, e = exp_softcap(logits, bias[...])
        sum_acc[t] += sum(e[:, i:i + 128] for i in range(0, Vb, 128))
        if dx is None:
            return None
        q = (e * (1 - th * th)).astype(x.dtype)
        if p is not None:
            p[0, t] = q
        return q
    def finish(t, q):
        if dx is not None:
            dx_acc[0][t] += wide_matmul(q, w[0])
    step = 1024 if dx is None else 512
    stream([slice(t, min(t + step, Tb)) for t in range(0, Tb, step)], start, turn, finish)

    @pl.when(v == last)
    def _():
        row_buffer[:Tb], row_buffer[Tb:] = w_rows[0], next_rows[0]
        m = min(Tb, 128)
        def at_targets(i, _):
            t = pl.ds(pl.multiple_of(i * m, m), m)
            weight, found = columns(weights[0, :, t]), []
            total = sum_acc[t].sum(1, keepdims=True) - rest * math.exp(-SOFTCAP_A / 2)  # beyond the vocabulary th is -1
            if dx is not None:
                slope = SOFTCAP_A / (4 * SOFTCAP_C)
                d = slope * weight.sum(1, keepdims=True) / total * dx_acc[0][t]
            rows = row_buffer[pl.ds(pl.multiple_of(i * m, m), m + 16)].astype(jnp.float32)
            for k in range(n):
                row = (pltpu.roll(rows, m + 16 - k, 0) if k else rows)[:m]  # of the target k later
                th, _ = exp_softcap((x[0, t].astype(jnp.float32) * row).sum(1, keepdims=True))
                found.append(th)
                if dx is not None:
                    d -= slope * weight[:, k:k + 1] * (1 - th * th) * row
            numbers[0, :, t] = to_rows([*found, total])
            if dx is not None:
                dx[0, t] = d.astype(dx.dtype)
        jax.lax.fori_loop(0, Tb // m, at_targets, None)


def dw_kernel(ids, values, x, scale, w, *refs, head):
    """
    A block of the vocabulary against a block of tokens. Blocks: ids, values [1, targets, Tb] int32 and float32, x [1, Tb, d], scale
    [1, 1, Tb] float32, w [1, Vb, d], perhaps before [Vb, d], P [1, Tb, Vb] if any is kept; dw [1, Vb, d]. In VMEM: x_T [d, Tb], scale * x;
    dw_acc [d, Vb] float32.
    """
    before, (*p, dw, x_T, dw_acc) = refs[:head.on_top], refs[head.on_top:]
    r, v, t = (pl.program_id(axis) for axis in range(3))
    Tb, Vb = x.shape[1], dw.shape[1]
    x_T[...] = (x[0].T.astype(jnp.float32) * scale[0]).astype(x.dtype)  # here: XLA would lay out the whole network for this transpose
    slices = lambda n, step: [(i, min(step, n - i)) for i in range(0, n, step)]
    offset = columns(jnp.clip(ids[0] - v * Vb, -1, Vb).astype(jnp.float32)).astype(jnp.int32).astype(jnp.int16)  # two to a lane, as P
    value = columns(values[0]).astype(x_T.dtype)

    @pl.when(t == 0)
    def _():
        dw_acc[...] = jnp.zeros_like(dw_acc)

    def sweep(kept):
        # what is computed again takes a loop: its program is long
        tile, group = (256, Vb) if kept or Vb % 384 else (512, Vb // 3)
        @functools.cache
        def lanes(k, r, m):
            return [jnp.broadcast_to(a[r:r + m, k:k + 1], (m, 128)) for a in (offset, value)]
        def put_targets(q, first, r, m):
            iota = jax.lax.broadcasted_iota(jnp.int32, (m, 128), 1)
            parts = [q[:, i:i + 128] for i in range(0, q.shape[1], 128)]
            for i, part in enumerate(parts):
                column = (iota + (first + 128 * i)).astype(jnp.int16)
                for k in range(head.targets):
                    at, number = lanes(k, r, m)
                    part = jnp.where(column == at, number, part)
                parts[i] = part
            return jnp.concatenate(parts, axis=1)
        def entries(g, unit):
            (c, n), (r, m) = unit
            return pl.ds(pl.multiple_of(g * group + c, 128), n)
        def body(g, _):
            def start(unit):
                _, (r, m) = unit
                return None if kept else wide_matmul(x[0, r:r + m], w[0, entries(g, unit)], transpose_b=True)
            def turn(unit, logits):
                (c, _), (r, m) = unit
                if kept:
                    q = p[0][0, r:r + m, entries(g, unit)]
                else:
                    th, e = exp_softcap(logits)
                    q = (e * (1 - th * th)).astype(x_T.dtype)
                return put_targets(q, g * group + c, r, m)
            def finish(unit, q):
                _, (r, m) = unit
                dw_acc[:, entries(g, unit)] += wide_matmul(x_T[:, r:r + m], q)
            stream([(a, b) for a in slices(group, 512) for b in slices(Tb, tile)], start, turn, finish)
        jax.lax.fori_loop(0, Vb // group, body, None)

    again = (head.tokens - head.kept) // Tb
    if head.kept:
        pl.when(t >= again)(lambda: sweep(True))
    if again:
        pl.when(t < again)(lambda: sweep(False))

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        for c, n in slices(Vb, 512):
            part = dw_acc[:, c:c + n].astype(dw.dtype).T
            dw[0, c:c + n] = jnp.where(r == 0, add(part, before[0][c:c + n]), part) if before else part


def lm_head_call(kernel, head, grid, scratch, interpret, in_specs, out_specs, out_shape):
    return pl.pallas_call(
        functools.partial(kernel, head=head), name=f"lm_head_{kernel.__name__}", interpret=interpret, grid=grid,
        in_specs=[pl.BlockSpec(*x) for x in in_specs], out_specs=[pl.BlockSpec(*x) for x in out_specs],
        out_shape=[jax.ShapeDtypeStruct(*x) for x in out_shape], scratch_shapes=[pltpu.VMEM(*x) for x in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=LM_HEAD_VMEM_LIMIT))


def losses_call(head: LmHead, dtype, interpret=False, gradients=False):
    """
    A function (x [rows, T, d], w [rows, V, d], targets [rows, T] int32, mtp_weights [targets] f32) -> losses [rows, T] f32. With
    gradients, for gradients of 1 also: dx; A [rows, T] f32; what P is at the targets [rows, targets, T] f32; P [rows, kept, V] if any is.
    """
    f32, (R, T, d, V), (Tb, Vb), n = jnp.float32, (head.rows, head.tokens, head.dim, head.vocab), head.forward_block, head.targets
    blocks, skipped = pl.cdiv(V, Vb), (T - head.kept) // Tb
    tokens = lambda r, t, v: (r, t, 0)
    lanes = lambda r, t, v: (r, 0, t)
    in_specs = [((1, Vb), lambda r, t, v: (0, v)), ((1, n, Tb), lanes), ((1, Tb, d), tokens), ((1, Vb, d), lambda r, t, v: (r, v, 0)),
                ((1, Tb, d), tokens), ((1, 16, d), lambda r, t, v: (r, jnp.minimum((t + 1) * (Tb // 16), T // 16 - 1), 0))]
    out_specs, out_shape = [((1, n + 1, Tb), lanes)], [((R, n + 1, T), f32)]
    scratch = [((Tb, 128), f32), ((Tb + 16, d), dtype)]
    if gradients:
        out_specs, out_shape, scratch = out_specs + [((1, Tb, d), tokens)], out_shape + [((R, T, d), dtype)], scratch + [((Tb, d), f32)]
    if gradients and head.kept:  # what is not kept lands where the first kept block will overwrite it before it leaves VMEM
        out_specs += [((1, Tb, Vb), lambda r, t, v: (r, jnp.maximum(t - skipped, 0), jnp.where(t < skipped, 0, v)))]
        out_shape += [((R, head.kept, V), dtype)]
    call = lm_head_call(losses_kernel, head, (R, T // Tb, blocks), scratch, interpret, in_specs, out_specs, out_shape)

    def run(x, w, targets, mtp_weights):
        bias = jnp.where(jnp.arange(blocks * Vb) < V, SOFTCAP_B, -1e9).astype(f32)[None]  # no exponential beyond the vocabulary
        ids = head.ids(targets)
        weights = jnp.where(ids >= 0, mtp_weights[:, None], 0.0)
        w_rows = jax.vmap(lambda w, t: w.at[t].get(mode="promise_in_bounds"))(w, targets)
        numbers, *saved = call(bias, weights, x, w, w_rows, w_rows)
        th, sums, total = numbers[:, :n], numbers[:, n], weights.sum(1)
        losses = total * jnp.log(sums) - SOFTCAP_A / 2 * (weights * th).sum(1)
        if not gradients:
            return [losses]
        a = SOFTCAP_A / (4 * SOFTCAP_C) * total / sums
        same = jnp.where(ids[:, :, None] == ids[:, None], weights[:, None], 0.0).sum(2)  # a token may have one id twice
        e = jnp.exp(SOFTCAP_A / 2 * th) - same * (sums / jnp.where(total == 0, 1.0, total))[:, None]
        return [losses, saved[0], a, e * (1 - th * th), *saved[1:]]
    return run


def losses_and_dx_call(head: LmHead, dtype, interpret=False):
    return losses_call(head, dtype, interpret, gradients=True)


def dw_call(head: LmHead, dtype, interpret=False):
    """
    A function (x, w, targets as losses_call's; dx, A, P at the targets and perhaps P as it returned them; the gradient of the losses
    [rows, T] f32; if head.on_top before [V, d]) -> dx [rows, T, d], dw [rows, V, d], the first row's on top of before.
    """
    f32, (R, T, d, V), (Tb, Vb) = jnp.float32, (head.rows, head.tokens, head.dim, head.vocab), head.backward_block
    again = (T - head.kept) // Tb
    numbers = (1, head.targets, Tb), lambda r, v, t: (r, 0, t)
    # what a block of tokens has no use for is what the one before it had, and is not fetched again
    in_specs = [numbers, numbers, ((1, Tb, d), lambda r, v, t: (r, t, 0)), ((1, 1, Tb), lambda r, v, t: (r, 0, t)),
                ((1, Vb, d), lambda r, v, t: (r, v if again else 0, 0)), *[((Vb, d), lambda r, v, t: (v, 0))] * head.on_top]
    if head.kept:
        in_specs += [((1, Tb, Vb), lambda r, v, t: (r, jnp.maximum(t - again, 0), v))]
    call = lm_head_call(dw_kernel, head, (R, pl.cdiv(V, Vb), T // Tb), [((d, Tb), dtype), ((d, Vb), f32)], interpret, in_specs=in_specs,
                        out_specs=[((1, Vb, d), lambda r, v, t: (r, v, 0))], out_shape=[((R, V, d), dtype)])

    def run(x, w, targets, dx, a, at_targets, *rest):
        *p, dy = rest[:1 + bool(head.kept)]
        before = rest[1 + bool(head.kept):]
        return [(dy[..., None] * dx.astype(f32)).astype(dtype), *call(head.ids(targets), at_targets, x, (a * dy)[:, None], w, *before, *p)]
    return run


# -----------------------------------------------------------------------------
# The gradient of an embedding: each vocabulary entry gets the sum of what came back to its tokens. XLA adds row by row; with the tokens
# sorted by entry, the rows of a block of entries are neighbours, and a product with ones and zeros adds them up, in float32.

SCATTER_ENTRIES, SCATTER_TOKENS = 384, 256  # of a block

def scatter_kernel(blocks, chunks, ids, dy, *refs):
    """
    A block of entries against a chunk of sorted tokens in which it may occur. Blocks: ids [1, 1, n], dy [1, n, d], perhaps before [m, d],
    dw [1, m, d]. In VMEM dw_acc [m, d].
    """
    *before, dw, dw_acc = refs
    r, i = pl.program_id(0), pl.program_id(1)
    block = blocks[r, i]
    entry = block * dw.shape[1] + jax.lax.broadcasted_iota(jnp.int32, (dw.shape[1], ids.shape[2]), 0)
    part = matmul(jnp.where(entry == ids[0], 1.0, 0.0).astype(dy.dtype), dy[0])
    new = (i == 0) | (block != blocks[r, jnp.maximum(i - 1, 0)])
    start = jnp.where(r == 0, before[0][...].astype(jnp.float32), 0.0) if before else 0.0
    dw_acc[...] = part + jnp.where(new, start, dw_acc[...])
    dw[0] = dw_acc[...].astype(dw.dtype)


def scatter_call(shapes: tuple[int, int, int, int, bool], dtype, interpret=False):
    """
    shapes: rows, tokens of each, vocabulary, d, on_top. A function (ids [rows, T] int32, dy [rows, T, d], if on_top before [V, d]) -> dw
    [rows, V, d], the first row's on top of before.
    """
    R, T, V, d, on_top = shapes
    m, n = SCATTER_ENTRIES, math.gcd(T, SCATTER_TOKENS)
    steps = pl.cdiv(V, m) + T // n - 1  # in a walk from the first block and chunk to the last ones, one or the other goes on
    call = pl.pallas_call(
        scatter_kernel, name=scatter_kernel.__name__, interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(R, steps),
            in_specs=[pl.BlockSpec((1, 1, n), lambda r, i, blocks, chunks: (r, 0, chunks[r, i])),
                      pl.BlockSpec((1, n, d), lambda r, i, blocks, chunks: (r, chunks[r, i], 0)),
                      *[pl.BlockSpec((m, d), lambda r, i, blocks, chunks: (blocks[r, i], 0))] * on_top],
            out_specs=pl.BlockSpec((1, m, d), lambda r, i, blocks, chunks: (r, blocks[r, i], 0)),
            scratch_shapes=[pltpu.VMEM((m, d), jnp.float32)]),
        out_shape=jax.ShapeDtypeStruct((R, V, d), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT))

    def walk(ids):
        """Sorted ids [T] -> the block of entries and the chunk of tokens of each step."""
        ends = jnp.concatenate([jnp.searchsorted(ids, jnp.arange(m, V, m, dtype=jnp.int32), method="compare_all"), jnp.arange(n, T, n)])
        of_block = jnp.argsort(ends, stable=True) < pl.cdiv(V, m) - 1
        return [jnp.cumsum(jnp.pad(x.astype(jnp.int32), (1, 0)), dtype=jnp.int32) for x in (of_block, ~of_block)]

    def run(ids, dy, *before):
        ids, order = jax.lax.sort((ids, jax.lax.broadcasted_iota(jnp.int32, (R, T), 1)), num_keys=1)  # once for all embeddings, by CSE
        dy = jax.vmap(lambda dy, order: dy.at[order].get(mode="promise_in_bounds"))(dy, order)
        return [call(*jax.vmap(walk)(ids), ids[:, None], dy, *before)]
    return run


# -----------------------------------------------------------------------------
# The kernels in torch_xla's graph

def call_kernel(call, key, *tensors: Tensor) -> list[Tensor]:
    """
    call(key, bfloat16, interpret)(*tensors) as one node in torch_xla's graph. XLA cannot split a kernel over devices, so this
    belongs in the program of a single device (muon_xla.enter).
    """
    import torch_xla.core.xla_builder as xb
    arguments = tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors)
    return xb.xla_computation_as_func(lowered(call, key, arguments, target == "interpret"))(list(tensors))


@functools.cache
def lowered(call, key, arguments: tuple, interpret: bool):
    """The kernel as an XLA computation. Cached, for a step is traced several times."""
    import torch_xla.core.xla_builder as xb
    import_jax()
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    traced = jax.jit(call(key, jnp.bfloat16, interpret), keep_unused=True).trace(*arguments)
    hlo = traced.lower(lowering_platforms=("cpu" if interpret else "tpu",)).compiler_ir("hlo")
    return xb.computation_from_module_proto(call.__name__, hlo.as_serialized_hlo_module_proto())


def number(n: int, like: Tensor) -> Tensor:
    """As a kernel takes it, on the device of `like`."""
    return torch.full((1,), n, dtype=torch.int32, device=like.device)


class GradientStack:
    """
    Where the gradients of `used` weights come to lie as one tensor [n, ...], zeros at its end: each kernel writes its own into the memory
    that holds the others already, where a stack made of them afterwards would be a copy. tensor: None before the first.
    """
    def __init__(self, n: int, used: int):
        self.n, self.used, self.tensor = n, used, None

    def begin(self, weight: Tensor) -> Tensor:
        if self.tensor is None:
            self.tensor, = call_kernel(stack_call, (self.n, self.used, *weight.shape), weight)
        return self.tensor


class GradientSum:
    """
    Where the gradient of a table [V, d] adds up, kernel by kernel, each on top of what there is. before: of the step before, or None.
    tensor: None before the first kernel.
    """
    def __init__(self, before: Tensor | None = None):
        self.before, self.tensor = before, None

    def so_far(self) -> list[Tensor]:
        return [x for x in (self.before if self.tensor is None else self.tensor,) if x is not None]

    def total(self, grad: Tensor | None) -> Tensor | None:
        """With what autograd found. None if neither it nor a kernel found any."""
        return self.tensor if grad is None else sum(self.so_far(), start=grad)


def get_gradient(weight: Tensor) -> Tensor | None:
    """Of a leaf, after a backward pass: what autograd has left, or kernels in its place."""
    place = getattr(weight, "place", None)
    if isinstance(place, GradientSum):
        return place.total(weight.grad)
    return weight.grad if place is None or place[0].tensor is None else place[0].tensor[place[1]]


def stack_kernel(weight, out):
    out[...] = jnp.zeros_like(out)


def stack_call(shape: tuple[int, int, int, int], dtype, interpret=False):
    """
    shape: n, used, rows, columns. A function of a weight, to be on its device, -> [n, rows, columns]: zeros behind the first `used`, which
    are not written at all.
    """
    n, used, *matrix = shape
    first = min(used, n - 1)
    return pl.pallas_call(
        stack_kernel, name=stack_kernel.__name__, interpret=interpret, grid=(n - first,), in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=[pl.BlockSpec((1, *matrix), lambda i: (first + i, 0, 0))], out_shape=[jax.ShapeDtypeStruct((n, *matrix), dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=MLP_VMEM_LIMIT))


class FusedAttention(torch.autograd.Function):
    """
    All that comes before attention, window_attention and its gate, by two kernels. x [B, T, C]; W [4C, C], of which it takes the first 3C
    rows; x0 [B, T, C] or None; gate_w [H, n], the result's gate, which reads n features; factor1, factor2 [T, D] or, paired, [2, T, D];
    still [D] bool, the dims of the key offset; ve [B, T, C] and its gate, ve_gate_w [H, n], or None twice; the rest as window_attention.
    keep: there will be a backward pass. lambdas, [1] float32: W's and, if there is x0, those of x and x0. Returns y [B, T, C], tokens
    before heads, as matmuls want it, and lambdas[1] * x + lambdas[2] * x0, or x.
    W needs a place, (a GradientStack, a number), in which its gradient comes to lie instead of autograd's.
    """
    @staticmethod
    def forward(ctx, x, W, x0, gate_w, factor1, factor2, still, ve, ve_gate_w, documents, window, scale, key_offset, paired, keep,
                *lambdas):
        (B, T, _), D, H = x.shape, still.numel(), gate_w.size(0)
        ctx.heads = Heads(B, H, T, D, paired, key_offset, ve is not None, x0 is not None, keep, gate_w.size(1))
        ctx.band = dataclasses.replace(get_band(B, H, T, D, window, paired), places=(0, 1, 2))
        ctx.place = getattr(W, "place", None)
        inputs = [x, W, *lambdas, gate_w] + [t.view(-1, T, D) for t in (factor1, factor2)] + [still.view(1, D).float()]
        more = ([] if ve is None else [ve, ve_gate_w]) + ([] if x0 is None else [x0])
        scale = scale.float().reshape(1)
        qkv, gate, *rest = call_kernel(project_call, ctx.heads, *inputs, *more)
        y, sums = call_kernel(forward_call, ctx.band, qkv, qkv, qkv, documents, gate, scale)
        ctx.save_for_backward(*inputs, documents, scale, qkv, gate, y, sums, *rest[:keep], *more)
        return y, rest[keep] if ctx.heads.mix else x

    @staticmethod
    def backward(ctx, dy, dx_mixed):
        n = ctx.heads.lambdas
        *inputs, documents, scale, qkv, gate, y, sums, raw = ctx.saved_tensors[:n + 13]
        more, mix = ctx.saved_tensors[n + 13:], [dx_mixed] if ctx.heads.mix else []
        *dqkv, delta = call_kernel(backward_call, ctx.band, qkv, qkv, qkv, documents, gate, scale, y, sums, dy)
        stack, slot = ctx.place
        arguments = number(slot, dy), stack.begin(inputs[1]), *inputs, raw, *dqkv, gate, delta, *more, *mix
        dx, stack.tensor, *rest = call_kernel(project_backward_call, ctx.heads, *arguments)
        dlambdas, (dgate_w, *dmore) = rest[:n], rest[n:]
        dve, dve_gate_w = dmore[:2] if ctx.heads.ve else (None, None)
        dx, dx0 = (dx, dmore[-1]) if mix else (dx + dx_mixed, None)
        return dx, None, dx0, dgate_w, None, None, None, dve, dve_gate_w, *[None] * 6, *dlambdas


class Embedding(torch.autograd.Function):
    """
    F.embedding of ids [B, T] int32 in weight [V, d], whose gradient is a kernel. weight needs a place, a GradientSum, where it goes instead
    of to autograd.
    """
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.vocab, ctx.place = weight.size(0), getattr(weight, "place", None)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        (ids,), before = ctx.saved_tensors, ctx.place.so_far()
        ctx.place.tensor = call_kernel(scatter_call, (*ids.shape, ctx.vocab, dy.size(2), bool(before)), ids, dy, *before)[0].sum(0)
        return None, None


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """F.embedding of ids [B, T] in weight [V, d], on a TPU with the kernel's gradient."""
    fits = weight.dtype == torch.bfloat16 and ids.size(1) % 128 == 0 == weight.size(1) % 128
    return Embedding.apply(ids, weight) if for_tpu(weight) and fits else F.embedding(ids, weight)


class SoftcappedCrossEntropy(torch.autograd.Function):
    """
    x [B, T, d], weight [V, d], targets [B, T] int32, mtp_weights [n] float32 -> losses [B, T] float32, by the TPU kernels. weight needs a
    place as in Embedding. The twin is train_gpt_xla.FusedSoftcappedCrossEntropy.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, mtp_weights):
        ctx.place = getattr(weight, "place", None)
        ctx.head, w = get_lm_head(x, weight, mtp_weights.numel()), weight.expand(x.size(0), -1, -1)
        losses, *saved = call_kernel(losses_and_dx_call, ctx.head, x, w, targets, mtp_weights)
        ctx.save_for_backward(x, weight, targets, *saved)
        return losses

    @staticmethod
    def backward(ctx, grad_output):
        (x, weight, targets, *saved), before = ctx.saved_tensors, ctx.place.so_far()
        head = dataclasses.replace(ctx.head, on_top=bool(before))
        dx, dw = call_kernel(dw_call, head, x, weight.expand(x.size(0), -1, -1), targets, *saved, grad_output, *before)
        ctx.place.tensor = dw.sum(0)
        return dx, None, None, None


def softcapped_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What SoftcappedCrossEntropy returns for one target and no gradient: without its temporaries."""
    head, one = get_lm_head(x, weight, 1, gradients=False), torch.ones(1, device=x.device)
    return call_kernel(losses_call, head, x, weight.expand(x.size(0), -1, -1), targets, one)[0]


def takes_lm_head(x: Tensor, weight: Tensor) -> bool:
    """Whether these two run here."""
    return for_tpu(x) and lm_head_refuses(x, weight) is None


def lm_head_refuses(x: Tensor, weight: Tensor) -> str | None:
    """What keeps these tensors from the TPU kernels, or None."""
    (_, T, d), V = x.shape, weight.size(-2)
    if {x.dtype, weight.dtype} != {torch.bfloat16}:
        return "they take bfloat16"
    if T % 128 or V % 128 or d % 128:
        return "they take multiples of 128 tokens, dimensions and vocabulary entries"
    if d > 1024:
        return f"a dimension of {d} does not fit in VMEM"
    return None


def get_lm_head(x: Tensor, weight: Tensor, targets: int, gradients: bool = True) -> LmHead:
    (B, T, d), V = x.shape, weight.size(-2)
    block = lambda most: math.gcd(T, most)  # a power of two
    kept = min(T, LM_HEAD_KEPT // B // block(2048) * block(2048)) if gradients else 0
    return LmHead(B, T, d, V, targets, kept, False, (block(2048 if gradients else 4096), 512), (block(512), 4608))


def get_band(B: int, H: int, T: int, D: int, window: int, paired: bool) -> Band:
    return Band(B, H, T, D, window, paired, block=256 if T % 256 == 0 else 128)

# -----------------------------------------------------------------------------
# A block's second half: x + relu(norm(x) @ W1.T)^2 @ W2, where x, in blocks with attention, first gets y @ W_o.T, attention's last
# projection. The plain-torch twin is the end of Block.forward in train_gpt_xla.py (upstream: norm and FusedLinearReLUSquareFunction).
#
# A program has one block of C tokens. The weights stay in VMEM, and in the backward pass so do the sums of their gradients,
# in f32. What has 4d features lies as [4d, C]: then every matmul streams a weight or such an array as it lies, and only [d, C] blocks
# are transposed, besides W2 (forward) or W1 (backward) once. The rounding is the twin's.

MLP_VMEM_LIMIT = 96 * 2**20  # bytes, of a v6e's 128 MiB

class ResidualMLP(torch.autograd.Function):
    """
    x + relu(norm(x) @ W1.T)^2 @ W2 by the TPU kernels. x: [B, T, d]; W1, W2: [4d, d].
    keep: store relu(norm(x) @ W1.T), [4d, B * T], for the backward pass, which otherwise computes it again; without one, say False.
    y [B, T, d], W [4d, d] and factor [1] float32, if given: x + y @ (factor * W_o).T takes the place of x, W_o being W's last d rows.
    W1 and W need places, (a GradientStack, a number), W1 an even one, in which their gradients come to lie, and W2's behind W1's, instead
    of autograd's.
    """
    @staticmethod
    def forward(ctx, x, W1, W2, keep, y=None, W=None, factor=None):
        ctx.shapes, ctx.places, shape = get_mlp(x, W1, keep, y is not None), [getattr(w, "place", None) for w in (W1, W)], x.shape
        attention = [y.flatten(0, 1), W, factor] if ctx.shapes.attention else []
        out, *rest = call_kernel(mlp_forward_call, ctx.shapes, x.flatten(0, 1), W1, W2, *attention)
        x, *kept = rest if attention else (x.flatten(0, 1), *rest)
        ctx.save_for_backward(x, W1, W2, *kept, *attention)
        return out.view(shape)

    @staticmethod
    def backward(ctx, dy):
        x, W1, W2, *rest = ctx.saved_tensors
        (stack, slot), place = ctx.places
        arguments = [x, W1, W2, dy.flatten(0, 1), *rest]
        if not place:
            dx, stack.tensor = call_kernel(mlp_backward_call, ctx.shapes, number(slot // 2, x), stack.begin(W1), *arguments)
            return dx.view_as(dy), *[None] * 6
        stack_o, slot_o = place
        where = number(slot // 2, x), number(slot_o, x), stack.begin(W1), stack_o.begin(rest[-2])
        dx, stack.tensor, stack_o.tensor, d, dfactor = call_kernel(mlp_backward_call, ctx.shapes, *where, *arguments)
        return dx.view_as(dy), None, None, None, d.view_as(dy), None, dfactor


def mlp_refuses(x: Tensor, W1: Tensor, W2: Tensor) -> str | None:
    """What keeps these tensors from ResidualMLP, or None."""
    (_, T, d), h = x.shape, W1.size(0)
    if {x.dtype, W1.dtype, W2.dtype} != {torch.bfloat16}:
        return "they take bfloat16"
    if not W1.shape == W2.shape == (h, d):
        return f"they take two weights [4d, {d}], not {tuple(W1.shape)} and {tuple(W2.shape)}"
    if T % 128 or d % 128 or h % 256:
        return "they take multiples of 128 tokens and features, and of 256 hidden ones"
    block = get_mlp(x, W1, True, True).block
    if 18 * h * d + 10 * d * d + 2 * block * (10 * d + 14 * h) > MLP_VMEM_LIMIT:  # weights, their gradients, bf16 and f32; blocks
        return f"weights of {h} x {d} do not fit in VMEM"
    return None


@dataclasses.dataclass(frozen=True)
class MLPShapes:
    """The shapes of one call on one device. A key: each is lowered once."""
    tokens: int  # of all rows
    dim: int  # d
    hidden: int  # 4d
    keep: bool  # the forward pass stores relu(norm(x) @ W1.T) and the backward pass reads it
    attention: bool  # its last projection comes first

    @property
    def block(self) -> int:
        return math.gcd(self.tokens, 512)


def get_mlp(x: Tensor, W1: Tensor, keep: bool, attention: bool) -> MLPShapes:
    B, T, d = x.shape
    return MLPShapes(B * T, d, W1.size(0), keep, attention)


def add(x, y):
    """The sum of two blocks in their dtype."""
    return (x.astype(jnp.float32) + y.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)


def to_hidden(W, x, dtype):
    """W [4d, d] @ x [C, d].T, rounded."""
    return matmul(W, x, transpose_b=True).astype(dtype)


def mlp_forward_kernel(x, W1, W2, *refs, shapes):
    """
    Blocks: x, y [C, d], W1, W2 [4d, d], out [C, d], kept [4d, C]; with attention y [C, d], W_o [d, d], its factor [1] float32 in SMEM, and
    their sum with x, [C, d]. In VMEM W2_T [d, 4d], with attention w_o [d, d], the factor times W_o.
    """
    n = 3 * shapes.attention
    attention, (out, *rest), (W2_T, *w_o) = refs[:n], refs[n:-1 - shapes.attention], refs[-1 - shapes.attention:]
    def begin(strip):
        W2_T[:, strip] = W2[strip].T
    by_strips(pl.program_id(0) == 0, W2.shape[0], begin)
    x_sum = x[...]
    if attention:
        y, W_o, factor = attention
        def begin(strip):
            w_o[0][strip] = scaled(factor[0], W_o[strip])
        by_strips(pl.program_id(0) == 0, W_o.shape[0], begin, 32)
        x_sum = add(x_sum, matmul(y[...], w_o[0][...], transpose_b=True))
        rest[0][...] = x_sum
    act = jnp.maximum(to_hidden(W1[...], normed(x_sum)[0].astype(x.dtype), x.dtype), 0)
    if shapes.keep:
        rest[-1][...] = act
    out[...] = add(x_sum, matmul(W2_T[...], act * act).astype(out.dtype).T)


def mlp_backward_kernel(*refs, shapes):
    """
    Blocks: x, the sum, dout, dx [C, d], W1, W2 [4d, d], kept [4d, C], dW [2, 4d, d], a pair of the stack, which stays where it is; with
    attention y, dy [C, d], W_o [d, d] and its factor, dW_o [1, d, d], in its stack, dfactor [1]. In VMEM: W1_T [d, 4d], dW1_acc, dW2_acc
    [4d, d], with attention w_o, the factor times W_o, and dW_o_acc [d, d], dfactor_acc [8, d].
    """
    n = 1 + shapes.attention  # stacks; their numbers come first
    (x, W1, W2, dout), refs = refs[2 * n:2 * n + 4], refs[2 * n + 4:]
    kept, refs = refs[:shapes.keep], refs[shapes.keep:]
    attention, (dx, dW, *rest) = refs[:3 * (n - 1)], refs[3 * (n - 1):]
    dattention, (W1_T, dW1_acc, dW2_acc, *acc_o) = rest[:3 * (n - 1)], rest[3 * (n - 1):]
    first, last = pl.program_id(0) == 0, pl.program_id(0) == pl.num_programs(0) - 1
    def begin(strip):
        W1_T[:, strip] = W1[strip].T
    by_strips(first, W1.shape[0], begin)
    for acc in (dW1_acc, dW2_acc, *acc_o[1:]):
        def begin(strip, acc=acc):
            acc[strip] = jnp.zeros((strip.size, x.shape[1]), jnp.float32)
        by_strips(first, acc.shape[0], begin, min(128, acc.shape[0]))
    if attention:
        (y, W_o, factor), (dW_o, dy, dfactor), (w_o, dW_o_acc, dfactor_acc) = attention, dattention, acc_o
        def begin(strip):
            w_o[strip] = scaled(factor[0], W_o[strip])
        by_strips(first, W_o.shape[0], begin, 32)
    x_normed, scale = normed(x[...])
    rounded = x_normed.astype(x.dtype)
    act = kept[0][...] if kept else jnp.maximum(to_hidden(W1[...], rounded, x.dtype), 0)
    dpre = 2 * to_hidden(W2[...], dout[...], x.dtype) * act
    dW2_acc[...] += matmul(act * act, dout[...])
    dW1_acc[...] += matmul(dpre, rounded)
    d = matmul(W1_T[...], dpre).astype(dx.dtype).T.astype(jnp.float32)
    d = add(dout[...], scale * (d - x_normed * (d * x_normed).mean(1, keepdims=True)))
    dx[...] = d
    if attention:
        dy[...] = matmul(d, w_o[...]).astype(dy.dtype)
        dW_o_acc[...] += matmul(d.T, y[...])
    for i, acc in enumerate((dW1_acc, dW2_acc)):
        def end(strip, i=i, acc=acc):
            dW[i, strip] = acc[strip].astype(dW.dtype)
        by_strips(last, acc.shape[0], end, 128)
    if attention:
        def end(strip):
            dw_o = dW_o_acc[strip].astype(dW_o.dtype)
            dfactor_acc[...] += (dw_o.astype(jnp.float32) * W_o[strip].astype(jnp.float32)).reshape(-1, 8, x.shape[1]).sum(0)
            dW_o[0, strip] = scaled(factor[0], dw_o)
        by_strips(last, W_o.shape[0], end, 32)
        @pl.when(last)
        def _():
            dfactor[0] = dfactor_acc[...].sum()


def mlp_forward_call(shapes: MLPShapes, dtype, interpret=False):
    """
    A function (x [tokens, d], W1, W2 [4d, d] and, if shapes.attention, y as x, W [4d, d], of which it takes the last d rows, and their
    factor [1] f32) -> out as x; if shapes.attention the sum that stands for x from then on; if shapes.keep relu(norm(x) @ W1.T)
    transposed, [4d, tokens].
    """
    d = shapes.dim
    return mlp_pallas_call(mlp_forward_kernel, shapes, dtype, interpret, "xww" + "xol" * shapes.attention,
                           "x" + "x" * shapes.attention + "h" * shapes.keep,
                           [((d, shapes.hidden), dtype), *[((d, d), dtype)] * shapes.attention])


def mlp_backward_call(shapes: MLPShapes, dtype, interpret=False):
    """
    A function (pair [1] int32, with attention slot [1] int32; stack [n, 4d, d], with attention stack_o as it; x, or the sum, W1, W2, dout
    as x, what the forward pass kept; y, W, factor) -> dx, the stack with dW1 and dW2 as that pair; with attention stack_o with dW_o as the
    last d rows of that slot, dy, dfactor [1] f32.
    """
    d, acc, f32 = shapes.dim, ((shapes.hidden, shapes.dim), jnp.float32), jnp.float32
    scratch = [((d, shapes.hidden), dtype), acc, acc, *[((d, d), dtype), ((d, d), f32), ((8, d), f32)] * shapes.attention]
    return mlp_pallas_call(mlp_backward_kernel, shapes, dtype, interpret, "xwwx" + "h" * shapes.keep + "xol" * shapes.attention,
                           "x" + "s" + "axl" * shapes.attention, scratch)


def mlp_pallas_call(kernel, shapes, dtype, interpret, inputs: str, outputs: str, scratch):
    """
    inputs, outputs: a letter for each array: x [tokens, d], w [4d, d] or o, the last [d, d] of [4d, d] (in VMEM once, not twice), h
    [4d, tokens], l [1] float32; in outputs s and a, stacks [n, 4d, d] in HBM: of the first a pair is written, of the second the last d rows
    of one place. Their numbers come before all else, and then the stacks as they were.
    """
    T, d, h, C = shapes.tokens, shapes.dim, shapes.hidden, shapes.block
    once, stacks = dict(pipeline_mode=pl.Buffered(1)), [i for i, x in enumerate(outputs) if x in "sa"]
    shape = {"x": (T, d), "w": (h, d), "o": (4 * d, d), "h": (h, T)}
    spec = {"x": pl.BlockSpec((C, d), lambda i, *_: (i, 0)), "h": pl.BlockSpec((h, C), lambda i, *_: (0, i)),
            "w": pl.BlockSpec((h, d), lambda i, *_: (0, 0), **once), "o": pl.BlockSpec((d, d), lambda i, *_: (3, 0), **once),
            "s": pl.BlockSpec((2, h, d), lambda i, pair, *_: (pair[0], 0, 0), **once),
            "a": pl.BlockSpec((1, d, d), lambda i, _, slot: (slot[0], 3, 0), **once), "l": pl.BlockSpec(memory_space=pltpu.SMEM)}
    def call(*arguments):
        n = len(stacks)
        out = {x: jax.ShapeDtypeStruct(shape[x], dtype) for x in shape} | {"l": jax.ShapeDtypeStruct((1,), jnp.float32)}
        out |= {outputs[i]: jax.ShapeDtypeStruct(x.shape, dtype) for i, x in zip(stacks, arguments[n:], strict=False)}
        return pl.pallas_call(
            functools.partial(kernel, shapes=shapes), name=kernel.__name__, interpret=interpret,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=n, grid=(T // C,),
                in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * n + [spec[x] for x in inputs],
                out_specs=[spec[x] for x in outputs], scratch_shapes=[pltpu.VMEM(*x) for x in scratch]),
            out_shape=[out[x] for x in outputs], input_output_aliases={n + i: place for i, place in enumerate(stacks)},
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=MLP_VMEM_LIMIT))(*arguments)
    return call
