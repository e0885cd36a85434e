"""
A block's second half: x + relu(norm(x) @ W1.T)^2 @ W2, where x, in blocks with attention, first gets y @ W_o.T, attention's last
projection. The plain-torch twin is the end of Block.forward in train_gpt_xla.py (upstream: norm and FusedLinearReLUSquareFunction); the
TPU kernels are tpu/mlp.py.
"""
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from gradients import slots
from kernels.dispatch import call_kernel, largest_fitting


@dataclass(frozen=True)
class MLPShapes:
    """The shapes of one call on one device, and which operands there are. A key: each is lowered once."""
    tokens: int  # T, of all rows
    dim: int  # d
    hidden: int  # h, 4d
    keep: bool  # the forward pass stores relu(norm(x) @ W1.T) and the backward pass reads it
    attention: bool  # its last projection comes first
    block: int  # C, tokens
    on_top: bool = False  # weights' gradients are added to float32 sums


def get_mlp(x: Tensor, W1: Tensor, keep: bool, attention: bool) -> MLPShapes | None:
    """None where no block fits in VMEM. All calls of a step take the same, that of the largest."""
    from kernels.tpu.mlp import vmem_bytes
    (B, T, d), h = x.shape, W1.size(0)
    choices = [MLPShapes(B * T, d, h, True, True, block) for block in (512, 256, 128) if B * T % block == 0]
    largest = largest_fitting(choices, lambda shapes: vmem_bytes(shapes, "bfloat16"))
    return largest and dataclasses.replace(largest, keep=keep, attention=attention)


def mlp_refuses(x: Tensor, W1: Tensor, W2: Tensor) -> str | None:
    """What keeps these tensors from ResidualMLP, or None."""
    (_, T, d), h = x.shape, W1.size(0)
    if {x.dtype, W1.dtype, W2.dtype} != {torch.bfloat16}:
        return "they take bfloat16"
    if not W1.shape == W2.shape == (h, d):
        return f"they take two weights [4d, {d}], not {tuple(W1.shape)} and {tuple(W2.shape)}"
    if T % 128 or d % 128 or h % 256:
        return "they take multiples of 128 tokens and features, and of 256 hidden ones"
    if get_mlp(x, W1, True, True) is None:
        return f"weights of {h} x {d} do not fit in VMEM"
    return None


def residual_mlp(x: Tensor, W1: Tensor, W2: Tensor, y: Tensor | None = None, W: Tensor | None = None, factor: Tensor | None = None,
                 keep: bool = True) -> Tensor:
    """
    x + relu(norm(x) @ W1.T)^2 @ W2 by the TPU kernels. x: [B, T, d]; W1, W2: [4d, d].
    y [B, T, d], W [4d, d] and factor [1] float32, if given: x + y @ (factor * W_o).T takes the place of x, W_o being W's last d rows.
    keep: store relu(norm(x) @ W1.T), [4d, B * T], for the backward pass, which otherwise computes it again.
    """
    into = (*slots(W1, W2), *((None,) if W is None else slots(W)))
    return ResidualMLP.apply(x, W1, W2, y, W, factor, keep and torch.is_grad_enabled(), into)


class ResidualMLP(torch.autograd.Function):
    """
    residual_mlp. into: where the gradients of W1, W2 and W go (gradients.Slot); W1 and W2 share a stack, in which W1's slot is even and
    W2's the next.
    """
    @staticmethod
    def forward(ctx, x, W1, W2, y, W, factor, keep, into):
        from kernels.tpu import mlp
        ctx.shapes, ctx.into, shape = get_mlp(x, W1, keep, y is not None), into, x.shape
        y = None if y is None else y.flatten(0, 1)
        r = call_kernel(mlp.mlp_forward, ctx.shapes, x=x.flatten(0, 1), W1=W1, W2=W2, y=y, W=W, factor=factor)
        ctx.save_for_backward(x.flatten(0, 1) if y is None else r.x_sum, W1, W2, r.act, y, W, factor)
        return r.out.view(shape)

    @staticmethod
    def backward(ctx, dout):
        from kernels.tpu import mlp
        x, W1, W2, act, y, W, factor = ctx.saved_tensors
        slot1, slot2, slot_o = ctx.into
        assert slot1.stack is slot2.stack and slot2.number == slot1.number + 1 and slot1.number % 2 == 0
        shapes = dataclasses.replace(ctx.shapes, on_top=slot1.stack.on_top)
        d = call_kernel(
            mlp.mlp_backward, shapes, pair=slot1.index(x, pairs=True), slot_o=slot_o and slot_o.index(x), stack=slot1.so_far(W1),
            stack_o=slot_o and slot_o.so_far(W), x=x, W1=W1, W2=W2, dout=dout.flatten(0, 1), act=act, y=y, W=W, factor=factor)
        dW, dy = slot_o and slot_o.store(d.stack_o, "o"), None if y is None else d.dy.view_as(dout)
        return d.dx.view_as(dout), slot1.store(d.stack), slot2.store(d.stack), dy, dW, d.dfactor, None, None
