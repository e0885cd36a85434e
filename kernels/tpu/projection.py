"""
What comes before attention: norm, projection to q, k and v, QK norm, rotary embedding, key offset and what is added to v, in one pass
over x. XLA needs two dozen, forward and backward, and copies to exchange the halves of a head; in VMEM that is a rotation of lanes. The
vector unit prepares two heads while the matrix unit multiplies for the next two. The plain-torch twin is the beginning of
CausalSelfAttention.forward.
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import Projection
from kernels.tpu.common import (
    EPS,
    LANES,
    Operand,
    Operands,
    add,
    by_strips,
    f32,
    kernel_call,
    matmul,
    normed,
    scalar,
    scaled,
    sigmoid,
    stream,
)


def rotate(x, factors, h, back=False):
    """Yarn.rotary of head h of x [n, D], or its transpose, float32."""
    factor1, factor2 = factors[h % len(factors)]
    half = x.shape[-1] // 2
    return x * factor1 + (pltpu.roll(x * factor2, half, 1) if back else pltpu.roll(x, half, 1) * factor2)


def rotary_factors(r):
    return [(r.factor1[i].astype(f32), r.factor2[i].astype(f32)) for i in range(r.factor1.shape[0])]


def means(x, head_dim, dtype):
    """
    [n, k * head_dim] -> the mean of each row of each head, in all of its lanes, the terms rounded. By the matrix unit: the vector unit
    would wait for sums along its lanes.
    """
    head = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (x.shape[1],) * 2, axis) // head_dim
    return matmul(x.astype(dtype), jnp.where(head(0) == head(1), 1 / head_dim, 0.0).astype(dtype))


def by_layer(when, r, do, strip=32):
    """
    do(name of a bank, index of `strip` rows in the layer's part of it, their place in w, where Q, K and V are below each other) for all of
    the layer's weights, if `when`.
    """
    first = 0
    for name, bank in dict(qk=r.qk, vo=r.vo).items():
        n, rows, _ = bank.shape
        strips = rows // strip
        def turn(i, _, name=name, strips=strips, first=first):
            do(name, (i // strips, pl.ds(i % strips * strip, strip)), pl.ds((first + i) * strip, strip))
        jax.lax.fori_loop(0, jnp.where(when, n * strips, 0), turn, None)
        first += n * strips


def begin_weights(r, begins):
    """Puts lambda_w * W into r.w, and the gate's weights [H, n] into r.gate, behind them zeros."""
    def begin(bank, at, place):
        r.w[place] = scaled(r.lambda_w[0], getattr(r, bank)[at])
    by_layer(begins, r, begin)
    if r.ve_gate_w is not None:
        @pl.when(begins)
        def _():
            r.gate[...] = jnp.zeros_like(r.gate)
            r.gate[:, :r.ve_gate_w.shape[1]] = r.ve_gate_w[...]


def gate_features(r, x_normed):
    """[bt, LANES]: half of what the gate reads is of x, the other half, behind it, of the value embedding; then something."""
    half, lane = r.ve_gate_w.shape[1] // 2, jax.lax.broadcasted_iota(jnp.int32, (x_normed.shape[0], LANES), 1)
    ve = pltpu.roll(r.ve[0, :, :LANES].astype(f32), half, 1)
    return jnp.where(lane < half, x_normed[:, :LANES].astype(f32), ve).astype(x_normed.dtype)


def project_kernel(r, shapes: Projection):
    """One block of tokens, all heads."""
    H, D, bt, dtype = shapes.heads, shapes.dim, shapes.block, r.x.dtype
    begins = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
    begin_weights(r, begins)
    x_normed = normed(r.x[0])[0].astype(dtype)
    if shapes.tables:
        ve_gate = 2 * sigmoid(matmul(gate_features(r, x_normed), r.gate[...], transpose_b=True), dtype)
    factors = rotary_factors(r)

    def start(two):
        return matmul(x_normed, r.w[two[0] * D:two[1] * D], transpose_b=True)
    def turn(two, projected):
        for n, h in enumerate(range(*two)):
            y = projected[:, n * D:(n + 1) * D].astype(dtype)
            if h < 2 * H:
                if shapes.keep:
                    r.raw[0, h] = y
                y = y.astype(f32)
                y = rotate(y * jax.lax.rsqrt(means(y * y, D, dtype) + EPS), factors, h % H)
                if shapes.key_offset and h >= H:
                    t = jax.lax.broadcasted_iota(jnp.int32, (bt, D), 0)
                    last = y[bt - 1:]
                    first = jnp.where(pl.program_id(1) == 0, y[:1], r.before[h - H])
                    y = jnp.where(r.still[...] > 0, jnp.where(t == 0, first, pltpu.roll(y, 1, 0)), y)
                    r.before[h - H] = last
            else:
                g, at = h - 2 * H, slice((h - 2 * H) * D, (h - 2 * H + 1) * D)
                if shapes.tables:
                    y = y.astype(f32) + ve_gate[:, g:g + 1] * r.ve[0, :, at].astype(f32)
                if shapes.aux_v:
                    y = y.astype(f32) + r.aux_v[0, :, at].astype(f32)
            r.qkv[0, h] = y.astype(dtype)
    two_by_two = [(h, min(h + 2, 3 * H)) for h in range(0, 3 * H, 2)]  # 256 columns for the matrix unit
    stream(two_by_two, start, turn, lambda two, _: None)


def project_backward_kernel(r, shapes: Projection):
    """One block of tokens, from the row's last to its first, so that a key's gradient finds that of the key after it."""
    H, D, bt, dtype = shapes.heads, shapes.dim, shapes.block, r.x.dtype
    C, n = H * D, pl.num_programs(1) - 1 - pl.program_id(1)
    begins = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
    ends = (pl.program_id(0) == pl.num_programs(0) - 1) & (n == 0)

    if shapes.on_top:
        layer = r.layer[0]
        sums = [pltpu.make_async_copy(r.qk_stack.at[pl.ds(layer * H, H)], r.dqk, r.qk_arrived),
                pltpu.make_async_copy(r.vo_stack.at[pl.ds(2 * layer, 1)], r.dvo, r.vo_arrived)]
        @pl.when(begins)
        def _():
            for copy in sums:
                copy.start()
    @pl.when(begins)
    def _():
        for ref in (r.dgate_acc, r.dlambda_acc):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)
    def begin(strip):
        r.dw_acc[:, strip] = jnp.zeros((C, D), f32)
    by_strips(begins, 3 * C, begin, D)
    begin_weights(r, begins)

    x_normed, scale = normed(r.x[0])
    rounded = x_normed.astype(dtype)
    x_T, factors = rounded.T, rotary_factors(r)
    if shapes.tables:
        features = gate_features(r, rounded)
        ve_gate, dve_gate = 2 * sigmoid(matmul(features, r.gate[...], transpose_b=True), dtype), []

    def turn(third, _):  # q, k, v
        for h in range(H):
            at, dy = slice((third * H + h) * D, (third * H + h + 1) * D), (r.dq, r.dk, r.dv)[third][0, h]
            if third == 2:
                r.dqkv[:, at], lanes = dy, slice(h * D, (h + 1) * D)
                if shapes.aux_v:
                    r.daux_v[0, :, lanes] = dy
                if shapes.tables:
                    dy = dy.astype(f32)
                    r.dve[0, :, lanes] = (ve_gate[:, h:h + 1] * dy).astype(dtype)
                    dve_gate.append((dy * r.ve[0, :, lanes].astype(f32)).sum(1, keepdims=True))
                continue
            dy = dy.astype(f32)
            if shapes.key_offset and third == 1:
                t = jax.lax.broadcasted_iota(jnp.int32, (bt, D), 0)
                following = jnp.where(pl.program_id(1) == 0, 0.0, r.before[h])  # the row's last key has no successor
                moved = jnp.where(t == bt - 1, following, pltpu.roll(dy, bt - 1, 0))
                r.before[h] = dy[:1]
                dy = jnp.where(r.still[...] > 0, jnp.where(n * bt + t == 0, moved + dy, moved), dy)  # the first one kept its own
            dy, y = rotate(dy, factors, h, back=True), r.raw[0, third * H + h].astype(f32)
            both = means(jnp.concatenate([y * y, dy * y], axis=1), D, dtype)
            norm = jax.lax.rsqrt(both[:, :D] + EPS)
            r.dqkv[:, at] = (norm * (dy - y * (norm * norm * both[:, D:]))).astype(dtype)
    def finish(third, _):
        at = slice(third * C, (third + 1) * C)
        part = matmul(r.dqkv[:, at], r.w[at])
        r.dx_acc[...] = part if third == 2 else r.dx_acc[...] + part
        r.dw_acc[:, at] += matmul(x_T, r.dqkv[:, at])
    stream((2, 0, 1), lambda third: None, turn, finish)  # v first: it needs the vector unit least, and the matrix unit begins sooner

    if shapes.tables:
        dlogits = (jnp.concatenate(dve_gate, axis=1) * ve_gate * (1 - ve_gate / 2)).T.astype(dtype)  # [H, bt]
        r.dgate_acc[...] += matmul(dlogits, features)
        dfeatures, half = matmul(dlogits.T, r.gate[...]), shapes.gate // 2  # [bt, LANES]
        of_half = jax.lax.broadcasted_iota(jnp.int32, (bt, LANES), 1) < half
        r.dx_acc[:, :LANES] += jnp.where(of_half, dfeatures, 0.0)
        own, of_gate = r.dve[0, :, :LANES], jnp.where(of_half, pltpu.roll(dfeatures, LANES - half, 1), 0.0).astype(dtype)
        r.dve[0, :, :LANES] = (own.astype(f32) + of_gate.astype(f32)).astype(dtype)
        if shapes.dve_adds:
            r.dve[0] = add(r.dve[0], r.dve_so_far[0])
    d = r.dx_acc[...].astype(dtype).astype(f32)
    d = (scale * (d - x_normed * (d * x_normed).mean(1, keepdims=True))).astype(dtype)
    r.dx[0] = add(d, r.dx_so_far[0]) if shapes.dx_on_top else d

    def end(strip):
        r.w[strip] = r.dw_acc[:, strip].astype(dtype).T  # nothing reads w any more
    by_strips(ends, 3 * C, end, D)
    if shapes.on_top:
        @pl.when(ends)
        def _():
            for copy in sums:
                copy.wait()
    def end(bank, at, place):
        W, dW, dw = getattr(r, bank), getattr(r, f"d{bank}"), r.w[place]
        r.dlambda_acc[...] += (dw.astype(f32) * W[at].astype(f32)).reshape(-1, 8, C).sum(0)
        dw = scaled(r.lambda_w[0], dw)
        dW[at] = dW[at] + dw.astype(f32) if shapes.on_top else dw
    by_layer(ends, r, end)
    @pl.when(ends)
    def _():
        if shapes.tables:
            r.dve_gate_w[...] = r.dgate_acc[:, :shapes.gate].astype(dtype)
        r.dlambda_w[0] = r.dlambda_acc[...].sum()


def shared(s: Projection, dtype, block):
    """What both kernels have: inputs x to still, inputs ve to aux_v, scratch; operands by head. block: of program i of a row."""
    R, H, T, D, bt, C = s.rows, s.heads, s.tokens, s.dim, s.block, s.heads * s.dim
    n, fixed = 2 if s.paired else 1, lambda *shape, dtype=dtype: Operand(shape, dtype, shape, lambda row, i, *_: (0,) * len(shape), True)
    x = Operand((R, T, C), dtype, (1, bt, C), lambda row, i, *_: (row, block(i), 0))
    factor = Operand((n, T, D), dtype, (n, bt, D), lambda row, i, *_: (0, block(i), 0))
    first = dict(
        x=x,
        qk=qk_operand(s, dtype),
        vo=v_operand(s, dtype),
        lambda_w=scalar(),
        factor1=factor,
        factor2=factor,
        still=fixed(1, D, dtype=f32) if s.key_offset else None)
    then = dict(
        ve=table_operand(s, dtype, block) if s.tables else None,
        ve_gate_w=fixed(H, s.gate) if s.tables else None,
        aux_v=x if s.aux_v else None)
    scratch = dict(
        before=((H, 1, D), f32),  # keys before the block; backward, the first dk of the block that comes next in the row
        w=((3 * C, C), dtype),  # lambda_w * W
        gate=((H, LANES), dtype) if s.tables else None)  # its weights, padded with zeros to the lanes of a register
    by_head = lambda n: Operand((R, n, T, D), dtype, (1, n, bt, D), lambda row, i, *_: (row, 0, block(i), 0))
    return first, then, scratch, by_head


def qk_operand(s: Projection, dtype) -> Operand:
    """A bank of Q's and K's: of a layer, H matrices of two heads each."""
    C = s.heads * s.dim
    return Operand((s.banks[0], 2 * s.dim, C), dtype, (s.heads, 2 * s.dim, C), lambda row, i, layer, *_: (layer[0], 0, 0), True)


def v_operand(s: Projection, dtype) -> Operand:
    """A bank of V's and O's in turn: V of a layer."""
    C = s.heads * s.dim
    return Operand((s.banks[1], C, C), dtype, (1, C, C), lambda row, i, layer, *_: (2 * layer[0], 0, 0), True)


def table_operand(s: Projection, dtype, block) -> Operand:
    """The embeddings of all tables side by side: those of one."""
    C = s.heads * s.dim
    return Operand((s.rows, s.tokens, s.tables * C), dtype, (1, s.block, C), lambda row, i, layer, table: (row, block(i), table[0]))


def prefetched(s: Projection) -> tuple[str, ...]:
    """What chooses the layer's part of an operand: one lowered kernel is for all layers of its kind."""
    return ("layer", "table") if s.tables else ("layer",)


def forward_operands(s: Projection, dtype) -> Operands:
    first, then, scratch, by_head = shared(s, dtype, lambda i: i)
    return Operands(
        prefetch=prefetched(s),
        inputs=first | then,
        outputs=dict(
            qkv=by_head(3 * s.heads),
            raw=by_head(2 * s.heads) if s.keep else None),
        scratch=scratch,
        large=dict(
            x_normed=((s.block, s.heads * s.dim), f32)))


def project(s: Projection, dtype, interpret=False):
    """
    A function (layer [1] int32, x [R, T, C], qk [n, 2D, C], vo [m, C, C], lambda_w [1] f32, factor1, factor2 [1 or 2, T, D]; with a key
    offset still [1, D] f32; with value embeddings table [1] int32, ve [R, T, tables * C], ve_gate_w [H, gate]; with aux_v that,
    [R, T, C]) -> qkv [R, 3H, T, D] for attention, if s.keep raw, q and k before their norm [R, 2H, T, D].
    """
    return kernel_call(project_kernel, s, (s.rows, s.tokens // s.block), forward_operands(s, dtype), interpret)


def backward_operands(s: Projection, dtype) -> Operands:
    last, bt, C, H = s.tokens // s.block - 1, s.block, s.heads * s.dim, s.heads
    block = lambda i: last - i
    first, then, scratch, by_head = shared(s, dtype, block)
    sums, dve = f32 if s.on_top else dtype, None
    if s.tables:
        dve = first["x"] if s.dve == "one" else table_operand(s, dtype, block)
    goes_on = s.tables and s.dve == "on"
    dve_so_far = dve if s.dve_adds else Operand((s.rows, s.tokens, s.tables * C), dtype)
    return Operands(
        prefetch=prefetched(s),
        inputs=dict(
            qk_stack=Operand((s.banks[0], 2 * s.dim, C), sums),
            vo_stack=Operand((s.banks[1], C, C), sums),
            dve_so_far=dve_so_far if goes_on else None,
            **first,
            raw=by_head(2 * H),
            dq=by_head(H),
            dk=by_head(H),
            dv=by_head(H),
            dx_so_far=first["x"] if s.dx_on_top else None,
            **then),
        outputs=dict(
            dx=first["x"],
            dqk=qk_operand(s, sums),
            dvo=v_operand(s, sums),
            dlambda_w=scalar(),
            dve=dve,
            dve_gate_w=then["ve_gate_w"],
            daux_v=then["aux_v"]),
        in_place=dict(dqk="qk_stack", dvo="vo_stack") | (dict(dve="dve_so_far") if goes_on else {}),
        scratch=scratch | dict(
            dqkv=((bt, 3 * C), dtype),
            dx_acc=((bt, C), f32),
            dw_acc=((C, 3 * C), f32),
            qk_arrived=pltpu.SemaphoreType.DMA if s.on_top else None,
            vo_arrived=pltpu.SemaphoreType.DMA if s.on_top else None,
            dgate_acc=((H, LANES), f32) if s.tables else None,
            dlambda_acc=((8, C), f32)),
        large=dict(
            x_normed=((bt, C), f32),
            x_T=((C, bt), dtype),
            dw=((C, C), f32)))


def project_backward(s: Projection, dtype, interpret=False):
    """
    A function (project's inputs; qk_stack, vo_stack, as the banks, of which dqk and dvo take the layer's part, or are added to it, f32,
    if s.on_top; with s.dve "on" dve_so_far as ve, of which dve takes the table's part, or is added to it, if s.dve_adds; with s.dx_on_top
    dx_so_far as x, to which dx is added; raw as it returned it, dq, dk, dv [R, H, T, D]) -> dx, qk_stack, vo_stack and the gradients of
    project's inputs, under their names with a d before.
    """
    call = kernel_call(project_backward_kernel, s, (s.rows, s.tokens // s.block), backward_operands(s, dtype), interpret)
    def run(**arrays):
        return {dict(dqk="qk_stack", dvo="vo_stack").get(name, name): x for name, x in call(**arrays).items()}
    return run


def vmem_bytes(s: Projection, dtype) -> int:
    return max(forward_operands(s, dtype).vmem_bytes, backward_operands(s, dtype).vmem_bytes)
