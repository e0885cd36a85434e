"""
What comes before attention: the mix of x with x0, norm, projection to q, k and v, gates, QK norm, rotary embedding, key offset and value
embedding, in one pass over x. XLA needs three dozen, forward and backward, and copies to exchange the halves of a head; in VMEM that is a
rotation of lanes. The vector unit prepares two heads while the matrix unit multiplies for the next two. The plain-torch twin is the
beginning of Block.forward and CausalSelfAttention.forward.
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import Projection
from kernels.tpu.common import EPS, LANES, Operand, Operands, by_strips, f32, kernel_call, matmul, normed, scalar, scaled, sigmoid, stream


def mixed(r):
    """The block of x [1, bt, C], with its share of x0 if there is one: float32, rounded as x. The twin is train_gpt_xla.mixed."""
    if r.x0 is None:
        return r.x[0].astype(f32)
    return (r.lambda_x[0] * r.x[0].astype(f32) + r.lambda_x0[0] * r.x0[0].astype(f32)).astype(r.x.dtype).astype(f32)


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


def widen(wide, *narrow):
    """Puts weights [H, n] into [., H, 128], behind them zeros."""
    for i, w in enumerate(narrow):
        wide[i] = jnp.zeros(wide.shape[1:], wide.dtype)
        wide[i, :, :w.shape[1]] = w[...]


def gate_weights(r):
    return [r.gate_w] if r.ve is None else [r.gate_w, r.ve_gate_w]


def project_kernel(r, shapes: Projection):
    """One block of tokens, all heads."""
    H, D, bt, dtype = shapes.heads, shapes.dim, shapes.block, r.x.dtype
    begins = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
    def begin(strip):
        r.w[strip] = scaled(r.lambda_w[0], r.W[strip])
    by_strips(begins, r.W.shape[0], begin, 32)
    pl.when(begins)(lambda: widen(r.gates, *gate_weights(r)))
    x_mixed = mixed(r)
    if shapes.mix:
        r.x_mixed[0] = x_mixed.astype(dtype)
    x_normed = normed(x_mixed)[0].astype(dtype)
    r.gate[0] = sigmoid(matmul(r.gates[0], x_normed[:, :LANES], transpose_b=True), dtype)
    if shapes.ve:
        ve_gate = 2 * sigmoid(matmul(x_normed[:, :LANES], r.gates[1], transpose_b=True), dtype)
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
            elif shapes.ve:
                g = h - 2 * H
                y = y.astype(f32) + ve_gate[:, g:g + 1] * r.ve[0, :, g * D:(g + 1) * D].astype(f32)
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
        sums = pltpu.make_async_copy(r.stack.at[r.slot[0], pl.ds(0, 3 * C)], r.dW.at[0], r.arrived)
        pl.when(begins)(sums.start)
    @pl.when(begins)
    def _():
        widen(r.gates, *gate_weights(r))
        for ref in (r.dgates_acc, r.dlambdas_acc):
            ref[...] = jnp.zeros_like(ref)
    def begin(strip):
        r.dw_acc[:, strip] = jnp.zeros((C, D), f32)
    by_strips(begins, 3 * C, begin, D)
    def begin(strip):
        r.w[strip] = scaled(r.lambda_w[0], r.W[strip])
    by_strips(begins, 3 * C, begin, 32)
    def to_lambda(i, d, x):
        r.dlambdas_acc[i] += (d.astype(f32) * x.astype(f32)).reshape(-1, 8, C).sum(0)

    x_normed, scale = normed(mixed(r))
    rounded = x_normed.astype(dtype)
    x_T, first = rounded.T, rounded[:, :LANES]
    factors = rotary_factors(r)
    if shapes.ve:
        ve_gate, dve_gate = 2 * sigmoid(matmul(first, r.gates[1], transpose_b=True), dtype), []

    def turn(third, _):  # q, k, v
        for h in range(H):
            at, dy = slice((third * H + h) * D, (third * H + h + 1) * D), (r.dq, r.dk, r.dv)[third][0, h]
            if third == 2:
                r.dqkv[:, at] = dy
                if shapes.ve:
                    dy, lanes = dy.astype(f32), slice(h * D, (h + 1) * D)
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
        r.dx_acc[...] = r.dx_acc[...] + part if third else part
        r.dw_acc[:, at] += matmul(x_T, r.dqkv[:, at])
    stream(range(3), lambda third: None, turn, finish)

    def back_through(i, dlogits):  # [H, bt]
        dlogits = dlogits.astype(dtype)
        r.dgates_acc[i] += matmul(dlogits, first)
        r.dx_acc[:, :LANES] += matmul(dlogits.T, r.gates[i])
    back_through(0, r.delta[0] * (1 - r.gate[0]))
    if shapes.ve:
        back_through(1, (jnp.concatenate(dve_gate, axis=1) * ve_gate * (1 - ve_gate / 2)).T)
    d = r.dx_acc[...].astype(dtype).astype(f32)
    d = scale * (d - x_normed * (d * x_normed).mean(1, keepdims=True))
    if shapes.mix:
        d = d.astype(dtype).astype(f32) + r.dx_mixed[0].astype(f32)
        to_lambda(1, d, r.x[0])
        to_lambda(2, d, r.x0[0])
        r.dx0[0] = (r.lambda_x0[0] * d).astype(dtype)
        d = r.lambda_x[0] * d
    r.dx[0] = d.astype(dtype)
    dw_rounded, at = (r.w, ()) if shapes.on_top else (r.dW, (0,))  # nothing reads w any more
    def end(strip):
        dw_rounded[(*at, strip)] = r.dw_acc[:, strip].astype(dtype).T
    by_strips(ends, 3 * C, end, D)
    if shapes.on_top:
        pl.when(ends)(sums.wait)
    def end(strip):
        dw = dw_rounded[(*at, strip)]
        to_lambda(0, dw, r.W[strip])
        dw = scaled(r.lambda_w[0], dw)
        r.dW[0, strip] = r.dW[0, strip] + dw.astype(f32) if shapes.on_top else dw
    by_strips(ends, 3 * C, end, 32)
    @pl.when(ends)
    def _():
        for i, dgate_w in enumerate([r.dgate_w] if r.dve_gate_w is None else [r.dgate_w, r.dve_gate_w]):
            dgate_w[...] = r.dgates_acc[i, :, :dgate_w.shape[1]].astype(dtype)
        for i, dlambda in enumerate((r.dlambda_w, r.dlambda_x, r.dlambda_x0) if shapes.mix else (r.dlambda_w,)):
            dlambda[0] = r.dlambdas_acc[i].sum()


def shared(s: Projection, dtype, block):
    """What both kernels have: inputs x to still, inputs ve to x0, scratch; operands by head and by token. block: of program i of a row."""
    R, H, T, D, bt, C = s.rows, s.heads, s.tokens, s.dim, s.block, s.heads * s.dim
    n, fixed = 2 if s.paired else 1, lambda *shape, dtype=dtype: Operand(shape, dtype, shape, lambda row, i, *_: (0,) * len(shape), True)
    x = Operand((R, T, C), dtype, (1, bt, C), lambda row, i, *_: (row, block(i), 0))
    factor = Operand((n, T, D), dtype, (n, bt, D), lambda row, i, *_: (0, block(i), 0))
    first = dict(
        x=x,
        W=Operand((4 * C, C), dtype, (3 * C, C), lambda row, i, *_: (0, 0), True),  # its first three quarters: Q, K and V
        lambda_w=scalar(),
        lambda_x=scalar() if s.mix else None,
        lambda_x0=scalar() if s.mix else None,
        gate_w=fixed(H, s.gate),
        factor1=factor,
        factor2=factor,
        still=fixed(1, D, dtype=f32) if s.key_offset else None)
    then = dict(
        ve=x if s.ve else None,
        ve_gate_w=fixed(H, s.gate) if s.ve else None,
        x0=x if s.mix else None)
    scratch = dict(
        before=((H, 1, D), f32),  # keys before the block; backward, the first dk of the block that comes next in the row
        w=((3 * C, C), dtype),  # lambda_w * W
        gates=((2, H, LANES), dtype))  # weights of the gates, padded with zeros to the lanes of a register
    by_head = lambda n: Operand((R, n, T, D), dtype, (1, n, bt, D), lambda row, i, *_: (row, 0, block(i), 0))
    gate = Operand((R, H, T), f32, (1, H, bt), lambda row, i, *_: (row, 0, block(i)))
    return first, then, scratch, by_head, gate


def forward_operands(s: Projection, dtype) -> Operands:
    first, then, scratch, by_head, gate = shared(s, dtype, lambda i: i)
    return Operands(
        inputs=first | then,
        outputs=dict(
            qkv=by_head(3 * s.heads),
            gate=gate,
            raw=by_head(2 * s.heads) if s.keep else None,
            x_mixed=first["x"] if s.mix else None),
        scratch=scratch,
        large=dict(
            x_normed=((s.block, s.heads * s.dim), f32)))


def project(s: Projection, dtype, interpret=False):
    """
    A function (x [R, T, C], W [4C, C], lambda_w [1] f32, gate_w [H, n], factor1, factor2 [1 or 2, T, D]; with a key offset still [1, D]
    f32; with value embeddings ve [R, T, C], ve_gate_w [H, n]; with a mix x0 [R, T, C], lambda_x, lambda_x0 [1] f32) -> qkv [R, 3H, T, D]
    for attention, its gate [R, H, T] f32, if s.keep raw, q and k before their norm [R, 2H, T, D], with a mix x_mixed [R, T, C].
    """
    return kernel_call(project_kernel, s, (s.rows, s.tokens // s.block), forward_operands(s, dtype), interpret)


def backward_operands(s: Projection, dtype, slots: int = 1) -> Operands:
    last, bt, C, H = s.tokens // s.block - 1, s.block, s.heads * s.dim, s.heads
    first, then, scratch, by_head, gate = shared(s, dtype, lambda i: last - i)
    sums = f32 if s.on_top else dtype
    return Operands(
        prefetch=("slot",),
        inputs=dict(
            stack=Operand((slots, 4 * C, C), sums),
            **first,
            raw=by_head(2 * H),
            dq=by_head(H),
            dk=by_head(H),
            dv=by_head(H),
            gate=gate,
            delta=gate,
            **then,
            dx_mixed=first["x"] if s.mix else None),
        outputs=dict(
            dx=first["x"],
            dW=Operand((slots, 4 * C, C), sums, (1, 3 * C, C), lambda row, i, slot: (slot[0], 0, 0), True),
            dlambda_w=scalar(),
            dlambda_x=first["lambda_x"],
            dlambda_x0=first["lambda_x0"],
            dgate_w=first["gate_w"],
            dve=then["ve"],
            dve_gate_w=then["ve_gate_w"],
            dx0=then["x0"]),
        in_place=dict(dW="stack"),
        scratch=scratch | dict(
            dqkv=((bt, 3 * C), dtype),
            dx_acc=((bt, C), f32),
            dw_acc=((C, 3 * C), f32),
            arrived=pltpu.SemaphoreType.DMA if s.on_top else None,
            dgates_acc=((2, H, LANES), f32),
            dlambdas_acc=((3 if s.mix else 1, 8, C), f32)),
        large=dict(
            x_normed=((bt, C), f32),
            x_T=((C, bt), dtype),
            dw=((C, C), f32)))


def project_backward(s: Projection, dtype, interpret=False):
    """
    A function (slot [1] int32; stack [n, 4C, C], of which dW takes the first 3C rows of that slot, or is added to them, f32, if
    s.on_top; project's inputs; raw as it returned it, dq, dk, dv [R, H, T, D], gate, delta [R, H, T] f32, the gate's gradient times the
    gate; with a mix dx_mixed [R, T, C], what came back to it by other ways) -> dx, stack and the gradients of project's
    inputs, under their names with a d before.
    """
    def run(stack, **arrays):
        operands = backward_operands(s, dtype, stack.shape[0])
        results = kernel_call(project_backward_kernel, s, (s.rows, s.tokens // s.block), operands, interpret)(stack=stack, **arrays)
        return {"stack" if name == "dW" else name: x for name, x in results.items()}
    return run


def vmem_bytes(s: Projection, dtype) -> int:
    return max(forward_operands(s, dtype).vmem_bytes, backward_operands(s, dtype).vmem_bytes)
