"""
Sums of activations, each times a number of the token, for which XLA reads them several times, forward and backward: here once. The
plain-torch twin is train_gpt_xla.weighted, followed by norm where the sum is normed. On a v6e the instructions of both kernels take less
than two thirds of the time that HBM does.
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.mix import Factor, MixShapes, Term
from kernels.tpu.common import LANES, Operand, Operands, add, columns, f32, kernel_call, normed, to_rows


def strips(shapes: MixShapes, do):
    """do(slice of LANES tokens) for all of a block's, in a loop, because its program is short."""
    jax.lax.fori_loop(0, shapes.block // LANES, lambda n, _: do(pl.ds(pl.multiple_of(n * LANES, LANES), LANES)), None)


def read(r, shapes: MixShapes, strip):
    """The inputs [LANES, d], float32, and coefs [LANES, n]."""
    return [getattr(r, f"x{i}")[0, strip].astype(f32) for i in range(shapes.inputs)], columns(r.coefs[0, :, strip])


def in_first_half(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < x.shape[1] // 2


def times(coefs, factor: Factor, x):
    column = lambda k: coefs[:, k:k + 1]
    if factor is None:
        return x
    return x * (column(factor) if isinstance(factor, int) else jnp.where(in_first_half(x), *map(column, factor)))


def mixed(terms: tuple[Term, ...], x, coefs, dtype):
    """The sum of an output's terms, rounded once."""
    return sum(times(coefs, factor, x[i]) for i, factor in terms).astype(dtype)


def mix_forward_kernel(r, shapes: MixShapes):
    dtype = r.x0.dtype
    def do(strip):
        x, coefs = read(r, shapes, strip)
        for o, terms in enumerate(shapes.outputs):
            out = mixed(terms, x, coefs, dtype)
            getattr(r, f"out{o}")[0, strip] = normed(out)[0].astype(dtype) if shapes.normed else out
    strips(shapes, do)


def mix_backward_kernel(r, shapes: MixShapes):
    dtype = r.x0.dtype
    def do(strip):
        x, coefs = read(r, shapes, strip)
        dx, dcoefs = [0.0] * shapes.inputs, [jnp.zeros((LANES, 1), f32)] * shapes.coefs
        for o, terms in enumerate(shapes.outputs):
            d = getattr(r, f"dout{o}")[0, strip].astype(f32)
            if shapes.normed:
                y, scale = normed(mixed(terms, x, coefs, dtype))
                d = (scale * (d - y * (d * y).mean(1, keepdims=True))).astype(dtype).astype(f32)
            for i, factor in terms:
                dx[i] += times(coefs, factor, d)
                if factor is None:
                    continue
                product = d * x[i]
                if isinstance(factor, int):
                    shares = {factor: product}
                else:
                    first = in_first_half(product)
                    shares = dict(zip(factor, (jnp.where(first, product, 0.0), jnp.where(first, 0.0, product))))
                for k, share in shares.items():
                    dcoefs[k] += share.sum(1, keepdims=True)
        for i, d in enumerate(dx):
            before, d = getattr(r, f"before{i}", None), d.astype(dtype)
            getattr(r, f"dx{i}")[0, strip] = d if before is None else add(d, before[0, strip])
        r.dcoefs[0, :, strip] = to_rows(dcoefs)
    strips(shapes, do)


def shared(s: MixShapes, dtype):
    """A block of tokens, one of a table of the wide input, of coefs; the inputs by name."""
    tokens = Operand((s.rows, s.tokens, s.dim), dtype, (1, s.block, s.dim), lambda row, i: (row, i, 0))
    wide = Operand((s.rows, s.tokens, s.tables * s.dim), dtype, (1, s.block, s.dim), lambda row, i: (row, i, s.table))
    coefs = Operand((s.rows, s.coefs, s.tokens), f32, (1, s.coefs, s.block), lambda row, i: (row, 0, i))
    return tokens, wide, coefs, {f"x{i}": tokens if i < s.narrow else wide for i in range(s.inputs)}


def forward_operands(s: MixShapes, dtype) -> Operands:
    tokens, _, coefs, inputs = shared(s, dtype)
    return Operands(inputs=dict(**inputs, coefs=coefs), outputs={f"out{o}": tokens for o in range(len(s.outputs))})


def mix_forward(s: MixShapes, dtype, interpret=False):
    """A function (x0, x1, .. [R, T, d], the last one [R, T, tables * d] if s.tables; coefs [R, n, T] f32) -> out0, .. [R, T, d]."""
    return kernel_call(mix_forward_kernel, s, (s.rows, s.tokens // s.block), forward_operands(s, dtype), interpret)


def backward_operands(s: MixShapes, dtype) -> Operands:
    tokens, wide, coefs, inputs = shared(s, dtype)
    last = s.inputs - 1
    return Operands(
        inputs=dict(
            dve_so_far=Operand(wide.shape, dtype) if s.dve == "on" else None,
            **inputs,
            coefs=coefs,
            **{f"dout{o}": tokens for o in range(len(s.outputs))},
            **{f"before{i}": tokens if there else None for i, there in enumerate(s.on_top)}),
        outputs={f"dx{i}": tokens if i < s.narrow or s.dve == "one" else wide for i in range(s.inputs)} | dict(dcoefs=coefs),
        in_place={f"dx{last}": "dve_so_far"} if s.dve == "on" else {})


def mix_backward(s: MixShapes, dtype, interpret=False):
    """
    A function (what mix_forward's takes; dout0, .. as its outputs; where s.on_top says so before0, .. [R, T, d], to which dx0, .. is added;
    with s.dve "on" dve_so_far as the wide input, of which its gradient takes the table's part) -> dx0, dx1, .. as the inputs, but the
    wide one's with s.dve "one" [R, T, d]; dcoefs [R, n, T] f32.
    """
    return kernel_call(mix_backward_kernel, s, (s.rows, s.tokens // s.block), backward_operands(s, dtype), interpret)


def vmem_bytes(s: MixShapes, dtype) -> int:
    return max(forward_operands(s, dtype).vmem_bytes, backward_operands(s, dtype).vmem_bytes)
