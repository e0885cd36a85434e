"""
The second half of a block. The plain-torch twin is the end of Block.forward.

A program has one block of C tokens. The weights stay in VMEM, and in the backward pass so do the sums of their gradients,
in f32. What has 4d features lies as [4d, C]: then every matmul streams a weight or such an array as it lies, and only [d, C] blocks
are transposed, besides W2 (forward) or W1 (backward) once. The rounding is the twin's.
"""
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.mlp import MLPShapes
from kernels.tpu.common import Operand, Operands, add, by_strips, f32, kernel_call, matmul, normed, scalar, scaled


def to_hidden(W, x, dtype):
    """W [4d, d] @ x [C, d].T, rounded."""
    return matmul(W, x, transpose_b=True).astype(dtype)


def mlp_forward_kernel(r, shapes: MLPShapes):
    def begin(strip):
        r.W2_T[:, strip] = r.W2[strip].T
    by_strips(pl.program_id(0) == 0, r.W2.shape[0], begin)
    x_sum = r.x[...]
    if shapes.attention:
        def begin(strip):
            r.w_o[strip] = scaled(r.factor[0], r.W_o[strip])
        by_strips(pl.program_id(0) == 0, r.W_o.shape[0], begin, 32)
        x_sum = add(x_sum, matmul(r.y[...], r.w_o[...], transpose_b=True))
        r.x_sum[...] = x_sum
    act = jnp.maximum(to_hidden(r.W1[...], normed(x_sum)[0].astype(r.x.dtype), r.x.dtype), 0)
    if shapes.keep:
        r.act[...] = act
    r.out[...] = add(x_sum, matmul(r.W2_T[...], act * act).astype(r.out.dtype).T)


def mlp_backward_kernel(r, shapes: MLPShapes):
    dtype, first, last = r.x.dtype, pl.program_id(0) == 0, pl.program_id(0) == pl.num_programs(0) - 1
    def begin(strip):
        r.W1_T[:, strip] = r.W1[strip].T
    by_strips(first, r.W1.shape[0], begin)
    if shapes.on_top:  # the sums themselves come to VMEM, in the place of dW1_acc and dW2_acc
        sums = [pltpu.make_async_copy(r.stack.at[pl.ds(2 * r.pair[0], 2)], r.dW, r.arrived.at[0])]
        if shapes.attention:
            sums.append(pltpu.make_async_copy(r.stack_o.at[r.slot_o[0], pl.ds(3 * shapes.dim, shapes.dim)], r.dW_o.at[0], r.arrived.at[1]))
        @pl.when(first)
        def _():
            for copy in sums:
                copy.start()
    dW1_acc, dW2_acc = (r.dW.at[0], r.dW.at[1]) if shapes.on_top else (r.dW1_acc, r.dW2_acc)
    apart = () if shapes.on_top else (dW1_acc, dW2_acc)  # from dW, which takes them at the end
    for acc in (*apart, *((r.dW_o_acc, r.dfactor_acc) if shapes.attention else ())):
        def begin(strip, acc=acc):
            acc[strip] = jnp.zeros((strip.size, shapes.dim), f32)
        by_strips(first, acc.shape[0], begin, min(128, acc.shape[0]))
    if shapes.attention:
        def begin(strip):
            r.w_o[strip] = scaled(r.factor[0], r.W_o[strip])
        by_strips(first, r.W_o.shape[0], begin, 32)
    x_normed, scale = normed(r.x[...])
    rounded = x_normed.astype(dtype)
    act = r.act[...] if shapes.keep else jnp.maximum(to_hidden(r.W1[...], rounded, dtype), 0)
    dpre = 2 * to_hidden(r.W2[...], r.dout[...], dtype) * act
    if shapes.on_top:
        pl.when(first)(sums[0].wait)
    dW2_acc[...] += matmul(act * act, r.dout[...])
    dW1_acc[...] += matmul(dpre, rounded)
    d = matmul(r.W1_T[...], dpre).astype(dtype).T.astype(f32)
    d = add(r.dout[...], scale * (d - x_normed * (d * x_normed).mean(1, keepdims=True)))
    r.dx[...] = d
    if shapes.attention:
        r.dy[...] = matmul(d, r.w_o[...]).astype(dtype)
        r.dW_o_acc[...] += matmul(d.T, r.y[...])
    for i, acc in enumerate(apart):
        def end(strip, i=i, acc=acc):
            r.dW[i, strip] = acc[strip].astype(dtype)
        by_strips(last, acc.shape[0], end, 128)
    if shapes.attention:
        if shapes.on_top:
            pl.when(last)(sums[1].wait)
        def end(strip):
            dw_o = r.dW_o_acc[strip].astype(dtype)
            r.dfactor_acc[...] += (dw_o.astype(f32) * r.W_o[strip].astype(f32)).reshape(-1, 8, shapes.dim).sum(0)
            dw_o = scaled(r.factor[0], dw_o)
            r.dW_o[0, strip] = r.dW_o[0, strip] + dw_o.astype(f32) if shapes.on_top else dw_o
        by_strips(last, r.W_o.shape[0], end, 32)
        @pl.when(last)
        def _():
            r.dfactor[0] = r.dfactor_acc[...].sum()


def shared(s: MLPShapes, dtype):
    """A block of tokens, one of hidden activations, W1 or W2, W_o as the last quarter of qkvo_w."""
    tokens = Operand((s.tokens, s.dim), dtype, (s.block, s.dim), lambda i, *_: (i, 0))
    hidden = Operand((s.hidden, s.tokens), dtype, (s.hidden, s.block), lambda i, *_: (0, i))
    weight = Operand((s.hidden, s.dim), dtype, (s.hidden, s.dim), lambda i, *_: (0, 0), True)
    W_o = Operand((4 * s.dim, s.dim), dtype, (s.dim, s.dim), lambda i, *_: (3, 0), True)
    return tokens, hidden, weight, W_o


def forward_operands(s: MLPShapes, dtype) -> Operands:
    d, h, C, (tokens, hidden, weight, W_o) = s.dim, s.hidden, s.block, shared(s, dtype)
    only = lambda operand, there=s.attention: operand if there else None
    return Operands(
        inputs=dict(
            x=tokens,
            W1=weight,
            W2=weight,
            y=only(tokens),
            W_o=only(W_o),
            factor=only(scalar())),
        outputs=dict(
            out=tokens,
            x_sum=only(tokens),
            act=only(hidden, s.keep)),
        scratch=dict(
            W2_T=((d, h), dtype),
            w_o=only(((d, d), dtype))),  # factor * W_o
        large=dict(
            pre=((h, C), f32),
            act=((h, C), dtype)))


def mlp_forward(s: MLPShapes, dtype, interpret=False):
    """
    A function (x [T, d], W1, W2 [4d, d]; with s.attention y as x, W [4d, d], of which it takes the last d rows, and their factor [1] f32)
    -> out as x; with s.attention x_sum, which stands for x from then on; with s.keep act, relu(norm(x) @ W1.T) transposed, [4d, T].
    """
    call = kernel_call(mlp_forward_kernel, s, (s.tokens // s.block,), forward_operands(s, dtype), interpret)

    def run(W=None, **arrays):
        return call(W_o=W, **arrays)
    return run


def backward_operands(s: MLPShapes, dtype, slots: int = 2, slots_o: int = 1) -> Operands:
    d, h, C, (tokens, hidden, weight, W_o) = s.dim, s.hidden, s.block, shared(s, dtype)
    only = lambda operand, there=s.attention: operand if there else None
    stack, stack_o, sums = (slots, h, d), (slots_o, 4 * d, d), f32 if s.on_top else dtype
    return Operands(
        prefetch=("pair", "slot_o") if s.attention else ("pair",),
        inputs=dict(
            stack=Operand(stack, sums),
            stack_o=only(Operand(stack_o, sums)),
            x=tokens,
            W1=weight,
            W2=weight,
            dout=tokens,
            act=only(hidden, s.keep),
            y=only(tokens),
            W_o=only(W_o),
            factor=only(scalar())),
        outputs=dict(
            dx=tokens,
            dW=Operand(stack, sums, (2, h, d), lambda i, pair, *_: (pair[0], 0, 0), True),
            dW_o=only(Operand(stack_o, sums, (1, d, d), lambda i, _, slot_o: (slot_o[0], 3, 0), True)),
            dy=only(tokens),
            dfactor=only(scalar())),
        in_place=dict(dW="stack", dW_o="stack_o"),
        scratch=dict(
            W1_T=((d, h), dtype),
            dW1_acc=only(((h, d), f32), not s.on_top),
            dW2_acc=only(((h, d), f32), not s.on_top),
            arrived=only(pltpu.SemaphoreType.DMA((2,)), s.on_top),
            w_o=only(((d, d), dtype)),  # factor * W_o
            dW_o_acc=only(((d, d), f32)),
            dfactor_acc=only(((8, d), f32))),
        large=dict(
            dact=((h, C), f32),
            act=((h, C), dtype),
            dpre=((h, C), dtype)))


def mlp_backward(s: MLPShapes, dtype, interpret=False):
    """
    A function (pair [1] int32, stack [n, 4d, d], of which dW1 and dW2 take this pair of slots; with s.attention slot_o [1] int32 and
    stack_o [m, 4d, d], of which dW_o takes the last d rows of that slot; x, or x_sum, W1, W2, dout as x, act if it was kept; with
    s.attention y, W, factor) -> dx, the stack; with s.attention stack_o, dy, dfactor [1] f32. s.on_top: both stacks are f32, and what they
    take is added to what they have there.
    """
    def run(stack, stack_o=None, W=None, **arrays):
        operands = backward_operands(s, dtype, len(stack), 1 if stack_o is None else len(stack_o))
        call = kernel_call(mlp_backward_kernel, s, (s.tokens // s.block,), operands, interpret)
        results = call(stack=stack, stack_o=stack_o, W_o=W, **arrays)
        return {dict(dW="stack", dW_o="stack_o").get(name, name): x for name, x in results.items()}
    return run


def vmem_bytes(s: MLPShapes, dtype) -> int:
    return max(forward_operands(s, dtype).vmem_bytes, backward_operands(s, dtype).vmem_bytes)
