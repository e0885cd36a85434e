"""
The second half of a layer. The plain-torch twin is GPT.second_half.

A program has one block of C tokens. The weights stay in VMEM, and in the backward pass so do the sums of their gradients,
in f32. What has 4d features lies as [4d, C]: then every matmul streams a weight or such an array as it lies, and only [d, C] blocks
are transposed, besides proj (forward) or fc (backward) once. Weights and their gradients are those of the banks; which layer's, a
prefetched number says, so that all layers have one program.

The gradient of a factor is, of each token, a sum of products over d. Those of post_m and post_a need nothing that the backward pass does
not have: sum(dout * mlp) over d is sum(act^2 * (proj @ dout)) over 4d, and sum(dx_sum * (y @ W_o.T)) is sum(y * (dx_sum @ W_o)).
"""
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.mlp import MLPShapes
from kernels.tpu.common import Operand, Operands, add, by_strips, columns, f32, kernel_call, matmul, normed, scalar, scaled, stream, to_rows


def to_hidden(W, x):
    """W [4d, d] @ x [C, d].T, float32."""
    return matmul(W, x, transpose_b=True)


def factors_of(r, shapes: MLPShapes) -> dict:
    """[C, 1] of each."""
    factors = columns(r.factors[0])
    return {name: factors[:, k:k + 1] for k, name in enumerate(shapes.factors)}


def weighted(dtype, *terms):
    """The sum of factor * block for these pairs, rounded once."""
    return sum(factor * x.astype(f32) for factor, x in terms).astype(dtype)


def mlp_forward_kernel(r, shapes: MLPShapes):
    dtype, first = r.x.dtype, (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
    fc, proj = r.weights.at[0, 0], r.weights.at[0, 1]
    def begin(strip):
        r.proj_T[:, strip] = proj[strip].T
    by_strips(first, shapes.hidden, begin)
    factor, x_sum = factors_of(r, shapes), r.x[0]
    if shapes.attention:
        def begin(strip):
            r.w_o[strip] = scaled(r.lambda_o[0], r.W_o[0, strip])
        by_strips(first, shapes.dim, begin, 32)
        o = matmul(r.y[0], r.w_o[...], transpose_b=True).astype(dtype)
        blocks = x_sum, o, r.x0[0], r.bigram[0]
        x_sum = weighted(dtype, *((factor[name], block) for name, block in zip(shapes.factors, blocks)))
        r.x_sum[0] = x_sum
    act = jnp.maximum(to_hidden(fc[...], normed(x_sum)[0].astype(dtype)).astype(dtype), 0)
    if shapes.keep:
        r.act[...] = act
    r.out[0] = weighted(dtype, (factor["resid_m"], x_sum), (factor["post_m"], matmul(r.proj_T[...], act * act).astype(dtype).T))


def mlp_backward_kernel(r, shapes: MLPShapes):
    dtype, last = r.dout.dtype, (pl.program_id(0) == pl.num_programs(0) - 1) & (pl.program_id(1) == pl.num_programs(1) - 1)
    first = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
    fc, proj = r.weights.at[0, 0], r.weights.at[0, 1]
    def begin(strip):
        r.fc_T[:, strip] = fc[strip].T
    by_strips(first, shapes.hidden, begin)
    if shapes.on_top:  # the sums themselves come to VMEM, in the place of dfc_acc and dproj_acc
        sums = [pltpu.make_async_copy(r.stack.at[pl.ds(2 * r.layer[0], 2)], r.dW, r.arrived.at[0])]
        if shapes.attention:
            sums.append(pltpu.make_async_copy(r.stack_o.at[pl.ds(r.o[0], 1)], r.dW_o, r.arrived.at[1]))
        @pl.when(first)
        def _():
            for copy in sums:
                copy.start()
    dfc_acc, dproj_acc = (r.dW.at[0], r.dW.at[1]) if shapes.on_top else (r.dfc_acc, r.dproj_acc)
    apart = () if shapes.on_top else (dfc_acc, dproj_acc)  # from dW, which takes them at the end
    for acc in (*apart, *((r.dW_o_acc, r.dlambda_acc) if shapes.attention else ())):
        def begin(strip, acc=acc):
            acc[strip] = jnp.zeros((strip.size, shapes.dim), f32)
        by_strips(first, acc.shape[0], begin, min(128, acc.shape[0]))
    if shapes.attention:
        def begin(strip):
            r.w_o[strip] = scaled(r.lambda_o[0], r.W_o[0, strip])
        by_strips(first, shapes.dim, begin, 32)
    factor, n, x_sum = factors_of(r, shapes), len(shapes.factors), r.x_sum[0] if shapes.attention else r.x[0]
    x_normed, scale = normed(x_sum)
    rounded = x_normed.astype(dtype)
    act = r.act[...] if shapes.keep else jnp.maximum(to_hidden(fc[...], rounded).astype(dtype), 0)
    dpre = to_hidden(proj[...], r.dout[0]) * act.astype(f32)  # but for 2 * post_m
    r.dfactors[0, n - 1:] = (dpre * act.astype(f32)).sum(0, keepdims=True)
    dpre = (2 * r.factors[0, n - 1:] * dpre).astype(dtype)
    if shapes.on_top:
        pl.when(first)(sums[0].wait)
    back, squares, dmlp = matmul(r.fc_T[...], dpre).astype(dtype), act * act, weighted(dtype, (factor["post_m"], r.dout[0]))

    # 256 tokens at a time the vector unit goes back through norm and sum, while the matrix unit makes a strip of the weights' gradients
    width, found, dy = min(256, shapes.block), {}, {}
    parts, h = range(0, shapes.block, width), shapes.hidden * width // shapes.block
    part, strip = lambda t: slice(t, t + width), lambda t: slice(t // width * h, (t // width + 1) * h)
    to_factor = lambda d, x: (d.astype(f32) * x.astype(f32)).sum(1, keepdims=True)
    def to_fc(t):
        dfc_acc[strip(t)] += matmul(dpre[strip(t)], rounded)
    def through_norm(t, _):
        d, y = back[:, part(t)].T.astype(f32), x_normed[part(t)]
        d = scale[part(t)] * (d - y * (d * y).mean(1, keepdims=True))
        return (factor["resid_m"][part(t)] * r.dout[0, part(t)].astype(f32) + d).astype(dtype)
    def to_y(t, d):
        found[t], dy[t] = d, matmul(d, r.w_o[...]) if shapes.attention else None
    def to_proj(t):
        dproj_acc[strip(t)] += matmul(squares[strip(t)], dmlp)
    def through_sum(t, _):
        d, dfactors = found[t], [to_factor(r.dout[0, part(t)], x_sum[part(t)])]
        if shapes.attention:
            terms = (d, r.x), (dy[t], r.y), (d, r.x0), (d, r.bigram)
            dfactors = [*(to_factor(dterm, x[0, part(t)]) for dterm, x in terms), *dfactors]
            r.dy[0, part(t)] = weighted(dtype, (factor["post_a"][part(t)], dy[t]))
            for name, dx, before in (("g_x0", r.dx0, r.x0_before), ("g_bigram", r.dbigram, r.bigram_before)):
                more = () if before is None else [(1, before[0, part(t)])]
                dx[0, part(t)] = weighted(dtype, (factor[name][part(t)], d), *more)
            d, found[t] = (weighted(dtype, (factor[name][part(t)], d)) for name in ("resid_a", "post_a"))
        r.dx[0, part(t)] = add(d, r.dx_so_far[0, part(t)]) if shapes.dx_on_top else d
        r.dfactors[0, :n - 1, part(t)] = to_rows(dfactors)
    stream(parts, to_fc, through_norm, to_y)
    stream(parts, to_proj, through_sum, lambda t, _: None)
    if shapes.attention:
        r.dW_o_acc[...] += matmul(jnp.concatenate([found[t] for t in parts]).T, r.y[0])

    for i, acc in enumerate(apart):
        def end(strip, i=i, acc=acc):
            r.dW[i, strip] = acc[strip].astype(dtype)
        by_strips(last, acc.shape[0], end, 128)
    if shapes.attention:
        if shapes.on_top:
            pl.when(last)(sums[1].wait)
        def end(strip):
            dw_o = r.dW_o_acc[strip].astype(dtype)
            r.dlambda_acc[...] += (dw_o.astype(f32) * r.W_o[0, strip].astype(f32)).reshape(-1, 8, shapes.dim).sum(0)
            dw_o = scaled(r.lambda_o[0], dw_o)
            r.dW_o[0, strip] = r.dW_o[0, strip] + dw_o.astype(f32) if shapes.on_top else dw_o
        by_strips(last, shapes.dim, end, 32)
        @pl.when(last)
        def _():
            r.dlambda_o[0] = r.dlambda_acc[...].sum()


def shared(s: MLPShapes, dtype, layers: int, matrices: int):
    """A block of tokens, one of hidden activations, of factors; fc and proj; W_o."""
    blocks, n = s.tokens // s.block, len(s.factors)
    tokens = Operand((s.rows, s.tokens, s.dim), dtype, (1, s.block, s.dim), lambda row, i, *_: (row, i, 0))
    hidden = Operand((s.hidden, s.rows * s.tokens), dtype, (s.hidden, s.block), lambda row, i, *_: (0, row * blocks + i))
    factors = Operand((s.rows, n, s.tokens), f32, (1, n, s.block), lambda row, i, *_: (row, 0, i))
    bank = Operand((layers, 2, s.hidden, s.dim), dtype, (1, 2, s.hidden, s.dim), lambda row, i, layer, *_: (layer[0], 0, 0, 0), True)
    W_o = Operand((matrices, s.dim, s.dim), dtype, (1, s.dim, s.dim), lambda row, i, _, o: (o[0], 0, 0), True)
    return tokens, hidden, factors, bank, W_o


def forward_operands(s: MLPShapes, dtype, layers: int = 1, matrices: int = 1) -> Operands:
    d, h, C, (tokens, hidden, factors, bank, W_o) = s.dim, s.hidden, s.block, shared(s, dtype, layers, matrices)
    only = lambda operand, there=s.attention: operand if there else None
    return Operands(
        prefetch=("layer", "o") if s.attention else ("layer",),
        inputs=dict(
            x=tokens,
            weights=bank,
            factors=factors,
            y=only(tokens),
            W_o=only(W_o),
            lambda_o=only(scalar()),
            x0=only(tokens),
            bigram=only(tokens)),
        outputs=dict(
            out=tokens,
            x_sum=only(tokens),
            act=only(hidden, s.keep)),
        scratch=dict(
            proj_T=((d, h), dtype),
            w_o=only(((d, d), dtype))),  # lambda_o * W_o
        large=dict(
            pre=((h, C), f32),
            act=((h, C), dtype)))


def mlp_forward(s: MLPShapes, dtype, interpret=False):
    """
    A function (layer [1] int32, x [R, T, d], mlp_bank [layers, 2, 4d, d], factors [R, n, T] f32 as s.factors; with s.attention o [1] int32,
    the place of W_o in vo_bank [m, d, d], its factor lambda_o [1] f32, and y, x0, bigram as x) -> out as x; with s.attention x_sum, which
    stands for x from then on; with s.keep act, relu(norm(x) @ fc.T) transposed, [4d, R * T].
    """
    def run(mlp_bank, vo_bank=None, **arrays):
        operands = forward_operands(s, dtype, len(mlp_bank), 1 if vo_bank is None else len(vo_bank))
        call = kernel_call(mlp_forward_kernel, s, (s.rows, s.tokens // s.block), operands, interpret)
        return call(weights=mlp_bank, W_o=vo_bank, **arrays)
    return run


def backward_operands(s: MLPShapes, dtype, layers: int = 1, matrices: int = 1) -> Operands:
    d, h, C, (tokens, hidden, factors, bank, W_o) = s.dim, s.hidden, s.block, shared(s, dtype, layers, matrices)
    only = lambda operand, there=s.attention: operand if there else None
    stack, stack_o, sums = (2 * layers, h, d), (matrices, d, d), f32 if s.on_top else dtype
    return Operands(
        prefetch=("layer", "o") if s.attention else ("layer",),
        inputs=dict(
            stack=Operand(stack, sums),
            stack_o=only(Operand(stack_o, sums)),
            x=tokens,
            weights=bank,
            factors=factors,
            dout=tokens,
            act=only(hidden, s.keep),
            x_sum=only(tokens),
            y=only(tokens),
            W_o=only(W_o),
            lambda_o=only(scalar()),
            x0=only(tokens),
            bigram=only(tokens),
            x0_before=only(tokens, s.attention and s.x0_on_top),
            bigram_before=only(tokens, s.attention and s.bigram_on_top),
            dx_so_far=only(tokens, s.dx_on_top)),
        outputs=dict(
            dx=tokens,
            dW=Operand(stack, sums, (2, h, d), lambda row, i, layer, *_: (layer[0], 0, 0), True),
            dfactors=factors,
            dW_o=only(Operand(stack_o, sums, (1, d, d), lambda row, i, _, o: (o[0], 0, 0), True)),
            dy=only(tokens),
            dlambda_o=only(scalar()),
            dx0=only(tokens),
            dbigram=only(tokens)),
        in_place=dict(dW="stack", dW_o="stack_o") | (dict(dx0="x0_before") if s.x0_on_top else {})
        | (dict(dbigram="bigram_before") if s.bigram_on_top else {}),
        scratch=dict(
            fc_T=((d, h), dtype),
            dfc_acc=only(((h, d), f32), not s.on_top),
            dproj_acc=only(((h, d), f32), not s.on_top),
            arrived=only(pltpu.SemaphoreType.DMA((2,)), s.on_top),
            w_o=only(((d, d), dtype)),  # lambda_o * W_o
            dW_o_acc=only(((d, d), f32)),
            dlambda_acc=only(((8, d), f32))),
        large=dict(
            dact=((h, C), f32),
            act=((h, C), dtype),
            dpre=((h, C), dtype)))


def mlp_backward(s: MLPShapes, dtype, interpret=False):
    """
    A function (what mlp_forward's takes, and with s.attention x_sum, with s.keep act, as it returned them; dout as x; stack [2 * layers,
    4d, d], of which dfc and dproj take the layer's pair; with s.attention stack_o [m, d, d], of which dW_o takes place o; with s.x0_on_top
    or s.bigram_on_top x0_before or bigram_before as x, to which dx0 or dbigram is added, in its memory; with s.dx_on_top dx_so_far as x, to
    which dx is added) -> dx, stack, dfactors as factors; with s.attention stack_o, dy, dlambda_o [1] f32, dx0, dbigram. s.on_top: both
    stacks are f32, and what they take is added to what they have there.
    """
    def run(mlp_bank, vo_bank=None, **arrays):
        operands = backward_operands(s, dtype, len(mlp_bank), 1 if vo_bank is None else len(vo_bank))
        call = kernel_call(mlp_backward_kernel, s, (s.rows, s.tokens // s.block), operands, interpret)
        results = call(weights=mlp_bank, W_o=vo_bank, **arrays)
        return {dict(dW="stack", dW_o="stack_o").get(name, name): x for name, x in results.items()}
    return run


def vmem_bytes(s: MLPShapes, dtype) -> int:
    return max(forward_operands(s, dtype).vmem_bytes, backward_operands(s, dtype).vmem_bytes)
