"""
lm_head with softcapped cross entropy. The plain-torch twin is train_gpt_xla.FusedSoftcappedCrossEntropy.

With th = tanh((x @ w.T + 5) / 15): softcap z = 11.5 * (1 + th), e = exp(z - 11.5) = exp(11.5 * th), and sum = e.sum over V.
The gradient of a logit is A * (e * (1 - th^2) - [its own, at targets]), where A, one number a token, waits for sum and for the
gradient of the loss. So the forward pass, in one sweep over V, multiplies P = e * (1 - th^2) by w for dx before sum is known, and
what is left for the backward pass is dw = P.T @ (A * x). Of the last `kept` tokens of a row P is kept; the others' is computed again.
Targets never meet the sweep: their rows of w are gathered, and what P should be there replaces it on its way into dw. A token's prefix,
where it has one, is one more target.

The softmax's part of the gradient has all the weights of multi-token prediction for a factor, at a row's end those of targets that
are not there, too, whose losses do not count: A is not what differentiating the losses would give there, but what upstream has.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch
from kernels.lm_head import SOFTCAP_A, SOFTCAP_B, SOFTCAP_C, LmHead
from kernels.tpu.common import LANES, Operand, Operands, add, columns, f32, kernel_call, stream, to_rows, wide_matmul

SLOPE = SOFTCAP_A / (4 * SOFTCAP_C)  # of the softcap, times 1 - th^2


def exp_softcap(logits, b=SOFTCAP_B):
    """th and e of float32 logits; b: number or row that is added to them."""
    th = jnp.tanh((logits + b) * (1 / (2 * SOFTCAP_C)))
    return th, 2.0 ** (th * (SOFTCAP_A / 2 * math.log2(math.e)))


def all_ids(shapes: LmHead, targets, prefix):
    """[R, T] -> [R, n or n + 1, T]: each token's own target, the next ones, its prefix; -1 where the row has ended or there is none."""
    ids = [jnp.pad(targets[:, k:], ((0, 0), (0, k)), constant_values=-1) for k in range(shapes.targets)]
    return jnp.stack([*ids, prefix] if shapes.prefix else ids, axis=1)


def lm_head_losses_kernel(r, shapes: LmHead):
    """A block of tokens against a block of the vocabulary; after the last of these the targets."""
    v, last = pl.program_id(2), pl.num_programs(2) - 1
    Tb, Vb, n, gradients = r.x.shape[1], r.w.shape[1], shapes.targets, r.dx is not None

    @pl.when(v == 0)
    def _():
        for ref in (r.sum_acc, r.dx_acc) if gradients else (r.sum_acc,):
            ref[...] = jnp.zeros_like(ref)
    rest = -shapes.vocab % Vb
    if rest:
        @pl.when(v == last)
        def _():  # beyond the vocabulary lies whatever memory held
            r.w[0, Vb - rest:] = jnp.zeros((rest, shapes.dim), r.w.dtype)

    def start(t):
        return wide_matmul(r.x[0, t], r.w[0], transpose_b=True)
    def turn(t, logits):
        th, e = exp_softcap(logits, r.bias[...])
        r.sum_acc[t] += sum(e[:, i:i + LANES] for i in range(0, Vb, LANES))
        if not gradients:
            return None
        q = (e * (1 - th * th)).astype(r.x.dtype)
        if r.p is not None:
            r.p[0, t] = q
        return q
    def finish(t, q):
        if gradients:
            r.dx_acc[t] += wide_matmul(q, r.w[0])
    step = 512 if gradients else 1024
    stream([slice(t, min(t + step, Tb)) for t in range(0, Tb, step)], start, turn, finish)

    @pl.when(v == last)
    def _():
        r.row_buffer[:Tb], r.row_buffer[Tb:] = r.w_rows[0], r.next_rows[0]
        m = min(Tb, 128)
        def at_targets(i, _):
            t = pl.ds(pl.multiple_of(i * m, m), m)
            weight, found = columns(r.weights[0, :, t]), []
            total = r.sum_acc[t].sum(1, keepdims=True) - rest * math.exp(-SOFTCAP_A / 2)  # beyond the vocabulary th is -1
            if gradients:
                d = SLOPE * weight[:, shapes.ids:] / total * r.dx_acc[t]
            rows = r.row_buffer[pl.ds(pl.multiple_of(i * m, m), m + 16)].astype(f32)
            for k in range(shapes.ids):
                if k == n:
                    row = r.prefix_rows[0, t].astype(f32)
                else:
                    row = (pltpu.roll(rows, m + 16 - k, 0) if k else rows)[:m]  # of the target k later
                th, _ = exp_softcap((r.x[0, t].astype(f32) * row).sum(1, keepdims=True))
                found.append(th)
                if gradients:
                    d -= SLOPE * weight[:, k:k + 1] * (1 - th * th) * row
            r.numbers[0, :, t] = to_rows([*found, total])
            if gradients:
                r.dx[0, t] = d.astype(r.dx.dtype)
        jax.lax.fori_loop(0, Tb // m, at_targets, None)


def lm_head_dw_kernel(r, shapes: LmHead):
    """A block of the vocabulary against a block of tokens."""
    row, v, t = (pl.program_id(axis) for axis in range(3))
    Tb, Vb = r.x.shape[1], r.dw.shape[1]
    r.x_T[...] = (r.x[0].T.astype(f32) * r.scale[0]).astype(r.x.dtype)  # here: XLA would lay out the whole network for this transpose
    slices = lambda n, step: [(i, min(step, n - i)) for i in range(0, n, step)]
    integer, number = (jnp.int16, r.x_T.dtype) if dispatch.chip().compares_int16 else (jnp.int32, f32)
    offset = columns(jnp.clip(r.ids[0] - v * Vb, -1, Vb).astype(f32)).astype(jnp.int32).astype(integer)
    value = columns(r.values[0]).astype(number)

    @pl.when(t == 0)
    def _():
        r.dw_acc[...] = jnp.zeros_like(r.dw_acc)

    copies = []
    if shapes.in_place:  # what dw comes on top of arrives in dw meanwhile; V's last block may be a shorter one
        last = t == pl.num_programs(2) - 1
        whole, rest = divmod(shapes.vocab, Vb)
        for there, n in (v < whole, Vb), (v == whole, rest):
            if n and (n < Vb or whole):
                at = pl.ds(pl.multiple_of(v * Vb, LANES), n)
                copies.append((there, pltpu.make_async_copy(r.before.at[0, at], r.dw.at[0, pl.ds(0, n)], r.arrived)))
    for there, copy in copies:
        pl.when((t == 0) & there)(copy.start)

    def sweep(kept):
        # what is computed again takes a loop: its program is long
        tile, group = (256, Vb) if kept or Vb % 384 else (512, Vb // 3)
        @functools.cache
        def lanes(k, first, m):
            return [jnp.broadcast_to(a[first:first + m, k:k + 1], (m, LANES)) for a in (offset, value)]
        def put_targets(q, first, at, m):
            iota = jax.lax.broadcasted_iota(jnp.int32, (m, LANES), 1)
            parts = [q[:, i:i + LANES].astype(number) for i in range(0, q.shape[1], LANES)]
            for i, part in enumerate(parts):
                column = (iota + (first + LANES * i)).astype(integer)
                for k in range(shapes.ids):
                    entry, its_own = lanes(k, at, m)
                    part = jnp.where(column == entry, its_own, part)
                parts[i] = part
            return jnp.concatenate(parts, axis=1).astype(q.dtype)
        def entries(g, unit):
            (c, n), _ = unit
            return pl.ds(pl.multiple_of(g * group + c, LANES), n)
        def body(g, _):
            def start(unit):
                _, (at, m) = unit
                return None if kept else wide_matmul(r.x[0, at:at + m], r.w[0, entries(g, unit)], transpose_b=True)
            def turn(unit, logits):
                (c, _), (at, m) = unit
                if kept:
                    q = r.p[0, at:at + m, entries(g, unit)]
                else:
                    th, e = exp_softcap(logits)
                    q = (e * (1 - th * th)).astype(r.x_T.dtype)
                return put_targets(q, g * group + c, at, m)
            def finish(unit, q):
                _, (at, m) = unit
                r.dw_acc[:, entries(g, unit)] += wide_matmul(r.x_T[:, at:at + m], q)
            stream([(a, b) for a in slices(group, 512) for b in slices(Tb, tile)], start, turn, finish)
        jax.lax.fori_loop(0, Vb // group, body, None)

    again = (shapes.tokens - shapes.kept) // Tb
    if shapes.kept:
        pl.when(t >= again)(lambda: sweep(True))
    if again:
        pl.when(t < again)(lambda: sweep(False))

    for there, copy in copies:
        pl.when(last & there)(copy.wait)
    @pl.when(last if copies else t == pl.num_programs(2) - 1)
    def _():
        for c, n in slices(Vb, 512):
            part = r.dw_acc[:, c:c + n].astype(r.dw.dtype).T
            if shapes.in_place:
                part = r.dw[0, c:c + n] + part
            elif shapes.on_top:
                part = jnp.where(row == 0, add(part, r.before[c:c + n]), part)
            r.dw[0, c:c + n] = part


def losses_operands(s: LmHead, dtype, gradients: bool) -> Operands:
    (R, T, d, V), (Tb, Vb), n = (s.rows, s.tokens, s.dim, s.vocab), s.forward_block, s.ids
    blocks, skipped = pl.cdiv(V, Vb), (T - s.kept) // Tb
    tokens = Operand((R, T, d), dtype, (1, Tb, d), lambda row, t, v: (row, t, 0))
    numbers = lambda n: Operand((R, n, T), f32, (1, n, Tb), lambda row, t, v: (row, 0, t))
    # what is not kept lands where the first kept block will overwrite it before it leaves VMEM
    p = Operand((R, s.kept, V), dtype, (1, Tb, Vb),
                lambda row, t, v: (row, jnp.maximum(t - skipped, 0), jnp.where(t < skipped, 0, v)))
    return Operands(
        inputs=dict(
            bias=Operand((1, blocks * Vb), f32, (1, Vb), lambda row, t, v: (0, v)),
            weights=numbers(n + 1),  # of each target, 0 where there is none, then the softmax's
            x=tokens,
            w=Operand((R, V, d), dtype, (1, Vb, d), lambda row, t, v: (row, v, 0)),
            w_rows=tokens,  # the rows of w that are this block's targets
            next_rows=Operand((R, T, d), dtype, (1, 16, d), lambda row, t, v: (row, jnp.minimum((t + 1) * (Tb // 16), T // 16 - 1), 0)),
            prefix_rows=tokens if s.prefix else None),
        outputs=dict(
            numbers=numbers(n + 1),  # th at each target, then the sum of exponentials
            dx=tokens if gradients else None,
            p=p if gradients and s.kept else None),
        scratch=dict(
            sum_acc=((Tb, LANES), f32),
            row_buffer=((Tb + 16, d), dtype),
            dx_acc=((Tb, d), f32) if gradients else None))


def losses_call(s: LmHead, dtype, interpret: bool, gradients: bool):
    """
    A function (x [R, T, d], w [R, V, d], targets [R, T] int32, mtp_weights [n] f32; with s.prefix prefix [R, T] int32, -1 for none, and
    prefix_weight [1] f32) -> losses [R, T] f32. With gradients, for gradients of 1, also: dx; a, A of each token [R, T] f32; at_targets,
    what P is there [R, s.ids, T] f32; p [R, kept, V] if any is.
    """
    (T, V), (Tb, Vb), n = (s.tokens, s.vocab), s.forward_block, s.ids
    blocks = pl.cdiv(V, Vb)
    call = kernel_call(lm_head_losses_kernel, s, (s.rows, T // Tb, blocks), losses_operands(s, dtype, gradients), interpret)

    def run(x, w, targets, mtp_weights, prefix=None, prefix_weight=None):
        bias = jnp.where(jnp.arange(blocks * Vb) < V, SOFTCAP_B, -1e9).astype(f32)[None]  # no exponential beyond the vocabulary
        ids = all_ids(s, targets, prefix)
        weights = jnp.where(ids >= 0, (jnp.concatenate([mtp_weights, prefix_weight]) if s.prefix else mtp_weights)[:, None], 0.0)
        total = mtp_weights.sum() + weights[:, s.targets:].sum(1)  # of the gradient: those that a row's end cuts off are in it
        rows_of = jax.vmap(lambda w, t: w.at[t].get(mode="promise_in_bounds"))
        w_rows, prefix_rows = rows_of(w, targets), rows_of(w, jnp.maximum(prefix, 0)) if s.prefix else None
        r = call(bias=bias, weights=jnp.concatenate([weights, total[:, None]], axis=1), x=x, w=w, w_rows=w_rows, next_rows=w_rows,
                 prefix_rows=prefix_rows)
        th, sums = r["numbers"][:, :n], r["numbers"][:, n]
        losses = weights.sum(1) * jnp.log(sums) - SOFTCAP_A / 2 * (weights * th).sum(1)
        if not gradients:
            return dict(losses=losses)
        a = SLOPE * total / sums
        same = jnp.where(ids[:, :, None] == ids[:, None], weights[:, None], 0.0).sum(2)  # a token may have one id twice
        e = jnp.exp(SOFTCAP_A / 2 * th) - same * (sums / jnp.where(total == 0, 1.0, total))[:, None]
        return dict(losses=losses, dx=r["dx"], a=a, at_targets=e * (1 - th * th), p=r["p"])
    return run


def lm_head_losses_and_dx(s: LmHead, dtype, interpret=False):
    return losses_call(s, dtype, interpret, gradients=True)


def lm_head_losses(s: LmHead, dtype, interpret=False):
    return losses_call(s, dtype, interpret, gradients=False)


def dw_operands(s: LmHead, dtype) -> Operands:
    (R, T, d, V), (Tb, Vb) = (s.rows, s.tokens, s.dim, s.vocab), s.backward_block
    again = (T - s.kept) // Tb
    numbers = lambda n, dtype=f32: Operand((R, n, T), dtype, (1, n, Tb), lambda row, v, t: (row, 0, t))
    # what a block of tokens has no use for is what the one before it had, and is not fetched again
    p = Operand((R, s.kept, V), dtype, (1, Tb, Vb), lambda row, v, t: (row, jnp.maximum(t - again, 0), v))
    before = Operand((V, d), dtype, (Vb, d), lambda row, v, t: (v, 0)) if s.on_top else None
    if s.in_place:
        assert s.on_top and R == 1
        before = Operand((R, V, d), f32)
    return Operands(
        inputs=dict(
            ids=numbers(s.ids, jnp.int32),
            values=numbers(s.ids),  # what P should be at the targets
            x=Operand((R, T, d), dtype, (1, Tb, d), lambda row, v, t: (row, t, 0)),
            scale=numbers(1),  # of x: A times the gradient of the loss
            w=Operand((R, V, d), dtype, (1, Vb, d), lambda row, v, t: (row, v if again else 0, 0)),
            before=before,
            p=p if s.kept else None),
        outputs=dict(
            dw=Operand((R, V, d), f32 if s.in_place else dtype, (1, Vb, d), lambda row, v, t: (row, v, 0))),
        in_place=dict(dw="before") if s.in_place else {},
        scratch=dict(
            arrived=pltpu.SemaphoreType.DMA if s.in_place else None,
            x_T=((d, Tb), dtype),  # scale * x
            dw_acc=((d, Vb), f32)))


def lm_head_dw(s: LmHead, dtype, interpret=False):
    """
    A function (x, w, targets, with s.prefix prefix as losses_call's; scale [R, T] f32, the a that it returned times the gradient of the
    losses; at_targets and perhaps p as it returned them; if s.on_top before [V, d]) -> dw [R, V, d], the first row's on top of before.
    s.in_place: of one row, before is f32, and dw takes its memory. after: as kernel_call has it.
    """
    Tb, Vb = s.backward_block
    call = kernel_call(lm_head_dw_kernel, s, (s.rows, pl.cdiv(s.vocab, Vb), s.tokens // Tb), dw_operands(s, dtype), interpret)

    def run(x, w, targets, scale, at_targets, prefix=None, p=None, before=None, after=None):
        before = before[None] if s.in_place else before
        return call(ids=all_ids(s, targets, prefix), values=at_targets, x=x, scale=scale[:, None], w=w, before=before, p=p, after=after)
    return run


def forward_vmem_bytes(s: LmHead, dtype) -> int:
    return losses_operands(s, dtype, gradients=s.kept > 0).vmem_bytes


def backward_vmem_bytes(s: LmHead, dtype) -> int:
    return dw_operands(s, dtype).vmem_bytes
