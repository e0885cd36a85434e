"""
Sums of activations, each times a number of the token: MUDD's dense connections. The plain-torch twin is train_gpt_xla.weighted, and norm;
the TPU kernels are tpu/mix.py.
"""
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import call_kernel, largest_fitting

Factor = None | int | tuple[int, int]  # 1; row k of coefs; row k for the first half of the columns, row l for the second
Term = tuple[int, Factor]  # of a sum: which input


@dataclass(frozen=True)
class MixShapes:
    """The shapes of one call on one device, and what it adds up. A key: each is lowered once."""
    rows: int  # R
    tokens: int  # T
    dim: int  # d
    inputs: int
    coefs: int  # n
    outputs: tuple[tuple[Term, ...], ...]
    tables: int  # of the last input, side by side; 0 where it is as the others
    table: int | None  # the one that is read
    normed: bool
    block: int  # C, tokens
    on_top: tuple[bool, ...] = ()  # of the inputs but the wide one: the gradient is added to what came back by other ways
    dve: str = "one"  # the wide input's gradient: this table's; "new": memory for all tables' with it; "on": in such memory, which goes on

    @property
    def narrow(self) -> int:
        """How many inputs are [R, T, d]; they come first."""
        return self.inputs - (self.tables > 0)


def get_mix(inputs: list[Tensor], coefs: Tensor, outputs: tuple[tuple[Term, ...], ...], table: int | None,
            normed: bool) -> MixShapes | None:
    """None where no block fits in VMEM. The backward pass takes the same one, whatever comes on top in it."""
    from kernels.tpu.mix import vmem_bytes
    B, T, d = inputs[0].shape
    tables, on_top = 0 if table is None else inputs[-1].size(2) // d, (True,) * (len(inputs) - (table is not None))
    choices = [MixShapes(B, T, d, len(inputs), coefs.size(1), outputs, tables, table, normed, block, on_top) for block in (512, 256, 128)
               if T % block == 0]
    return largest_fitting(choices, lambda shapes: vmem_bytes(shapes, "bfloat16"))


def fused_mix(
        inputs: list[Tensor],  # [B, T, d]; with a table the last one is wide, [B, T, tables * d]
        coefs: Tensor,  # [B, n, T] float32, n up to 8
        outputs: tuple[tuple[Term, ...], ...],  # the terms of each
        table: int | None = None,  # of the wide input, the one that is read
        ve_sum=None,
        normed: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """
    Each output is the sum of its terms, factor * input, in float32, rounded once, [B, T, d]; if normed, norm of that. Returns the outputs,
    and the inputs but the wide one for whoever else reads them: what comes back to them is added in the kernel.

    ve_sum: where the wide input's gradient goes, as fused_attention has it. None: all of it goes to autograd.
    """
    results = FusedMix.apply(coefs, outputs, table, ve_sum, normed, *inputs)
    return list(results[:len(outputs)]), list(results[len(outputs):])


class FusedMix(torch.autograd.Function):
    """fused_mix. Of the forward pass nothing is kept but its operands."""
    @staticmethod
    def forward(ctx, coefs, outputs, table, ve_sum, normed, *inputs):
        from kernels.tpu import mix
        ctx.set_materialize_grads(False)
        ctx.shapes, ctx.into = get_mix(inputs, coefs, outputs, table, normed), ve_sum
        ctx.save_for_backward(coefs, *inputs)
        r = call_kernel(mix.mix_forward, ctx.shapes, coefs=coefs, **{f"x{i}": x for i, x in enumerate(inputs)})
        return *(getattr(r, f"out{o}") for o in range(len(outputs))), *inputs[:ctx.shapes.narrow]

    @staticmethod
    def backward(ctx, *d):
        from kernels.tpu import mix
        (coefs, *inputs), n, into = ctx.saved_tensors, len(ctx.shapes.outputs), ctx.into
        douts, before = [torch.zeros_like(inputs[0]) if dout is None else dout for dout in d[:n]], d[n:]
        so_far = None if into is None else into.so_far()
        shapes = dataclasses.replace(ctx.shapes, on_top=tuple(x is not None for x in before),
                                     dve="one" if into is None else "new" if so_far is None else "on")
        named = lambda name, tensors: {f"{name}{i}": x for i, x in enumerate(tensors)}
        r = call_kernel(mix.mix_backward, shapes, coefs=coefs, dve_so_far=so_far, **named("x", inputs), **named("dout", douts),
                        **named("before", before))
        *dx, dlast = (getattr(r, f"dx{i}") for i in range(len(inputs)))
        if into is not None:
            dlast = into.store(dlast)
        elif shapes.tables > 1:
            dlast = F.pad(dlast, (shapes.table * shapes.dim, (shapes.tables - 1 - shapes.table) * shapes.dim))
        return r.dcoefs, *[None] * 4, *dx, dlast
