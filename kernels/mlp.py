"""
A layer's second half: the residual stream with attention's result, x0 and the bigram embedding, each times a factor of the token, then the
MLP. The plain-torch twin is GPT.second_half in train_gpt_xla.py (upstream: the end of GPT.forward's loop and ReLUSqrdMLP); the
TPU kernels are tpu/mlp.py.
"""
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from gradients import Sum, stack_of
from kernels.dispatch import call_kernel, largest_fitting

# Of each token, in this order. Without attention it has the last two only.
FACTORS = ("resid_a", "post_a", "g_x0", "g_bigram", "resid_m", "post_m")


@dataclass(frozen=True)
class MLPShapes:
    """The shapes of one call on one device, and which operands there are. A key: each is lowered once."""
    rows: int  # R
    tokens: int  # T
    dim: int  # d
    hidden: int  # h, 4d
    keep: bool  # the forward pass stores relu(norm(x) @ fc.T) and the backward pass reads it
    attention: bool  # its last projection, x0 and the bigram embedding come first
    block: int  # C, tokens
    on_top: bool = False  # weights' gradients are added to float32 sums
    x0_on_top: bool = False  # x0's gradient is added to what other layers have found
    bigram_on_top: bool = False
    dx_on_top: bool = False  # x's gradient is added to what came back to it by other ways

    @property
    def factors(self) -> tuple[str, ...]:
        return FACTORS if self.attention else FACTORS[-2:]


def get_mlp(x: Tensor, mlp_bank: Tensor, keep: bool, attention: bool) -> MLPShapes | None:
    """None where no block fits in VMEM. All calls of a step take the same, that of the largest."""
    from kernels.tpu.mlp import vmem_bytes
    (B, T, d), h = x.shape, mlp_bank.size(2)
    choices = [MLPShapes(B, T, d, h, True, True, block, x0_on_top=True, bigram_on_top=True, dx_on_top=True)
               for block in (512, 256, 128) if T % block == 0]
    largest = largest_fitting(choices, lambda shapes: vmem_bytes(shapes, "bfloat16"))
    return largest and dataclasses.replace(largest, keep=keep, attention=attention, x0_on_top=False, bigram_on_top=False, dx_on_top=False)


def mlp_refuses(x: Tensor, mlp_bank: Tensor) -> str | None:
    """What keeps these tensors from ResidualMLP, or None."""
    (_, T, d), h = x.shape, mlp_bank.size(2)
    if {x.dtype, mlp_bank.dtype} != {torch.bfloat16}:
        return "they take bfloat16"
    if mlp_bank.shape[1:] != (2, h, d):
        return f"they take pairs of weights [4d, {d}], not a bank of {tuple(mlp_bank.shape)}"
    if T % 128 or d % 128 or h % 256:
        return "they take multiples of 128 tokens and features, and of 256 hidden ones"
    if get_mlp(x, mlp_bank, True, True) is None:
        return f"weights of {h} x {d} do not fit in VMEM"
    return None


def residual_mlp(
        x: Tensor,  # [B, T, d]
        mlp_bank: Tensor,  # [layers, 2, 4d, d], of which it takes fc and proj of `layer`
        layer: int,
        factors: Tensor,  # [B, 6, T] float32, as FACTORS; without y the last two, [B, 2, T]
        y: Tensor | None = None,  # [B, T, d]
        vo_bank: Tensor | None = None,  # [n, d, d], of which it takes O of attention j, 2j + 1
        j: int | None = None,
        lambda_o: Tensor | None = None,  # [1] float32
        x0: Tensor | None = None,  # [B, T, d]
        bigram: Tensor | None = None,  # [B, T, d]
        keep: bool = True,
        x0_sum: Sum | None = None,
        bigram_sum: Sum | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    By the TPU kernels, x_sum being x without y:

        x_sum = resid_a * x + post_a * (y @ (lambda_o * W_o).T) + g_x0 * x0 + g_bigram * bigram
        out = resid_m * x_sum + post_m * (relu(norm(x_sum) @ fc.T)^2 @ proj)

    keep: store relu(norm(x_sum) @ fc.T), [4d, B * T], for the backward pass, which otherwise computes it again.
    x0_sum, bigram_sum: what the gradient of x0 or bigram is added to, in its memory. Without one autograd gets it.
    Returns out, and x and, without x0_sum, x0 for whoever else reads them: what comes back to them is added in the kernel.
    """
    into = stack_of(mlp_bank), None if vo_bank is None else stack_of(vo_bank), x0_sum, bigram_sum
    return ResidualMLP.apply(x, mlp_bank, factors, y, vo_bank, lambda_o, x0, bigram, layer, j, keep and torch.is_grad_enabled(), into)


def index(place: int, like: Tensor) -> Tensor:
    """A number as a kernel takes it, on the device of `like`."""
    return torch.full((1,), place, dtype=torch.int32, device=like.device)


class ResidualMLP(torch.autograd.Function):
    """residual_mlp. into: where the gradients of the banks go (gradients.Stack), and those of x0 and bigram (gradients.Sum, or None)."""
    @staticmethod
    def forward(ctx, x, mlp_bank, factors, y, vo_bank, lambda_o, x0, bigram, layer, j, keep, into):
        from kernels.tpu import mlp
        ctx.shapes, ctx.into, ctx.places = get_mlp(x, mlp_bank, keep, y is not None), into, (layer, j)
        inputs = dict(x=x, mlp_bank=mlp_bank, factors=factors, y=y, vo_bank=vo_bank, lambda_o=lambda_o, x0=x0, bigram=bigram)
        r = call_kernel(mlp.mlp_forward, ctx.shapes, layer=index(layer, x), o=None if j is None else index(2 * j + 1, x), **inputs)
        saved = inputs | dict(x_sum=r.x_sum, act=r.act)
        ctx.names = list(saved)
        ctx.save_for_backward(*saved.values())
        ctx.set_materialize_grads(False)
        return r.out, x, x0 if into[2] is None else None

    @staticmethod
    def backward(ctx, dout, dx, dx0):
        from kernels.tpu import mlp
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        (layer, j), (stack, stack_o, *sums), mlp_bank, vo_bank = ctx.places, ctx.into, saved["mlp_bank"], saved["vo_bank"]
        before = [other if into is None else into.so_far() for into, other in zip(sums, (dx0, None))]
        shapes = dataclasses.replace(ctx.shapes, on_top=stack.on_top, x0_on_top=before[0] is not None, bigram_on_top=before[1] is not None,
                                     dx_on_top=dx is not None)
        here = {} if j is None else dict(o=index(2 * j + 1, dout), stack_o=stack_o.so_far(vo_bank))
        d = call_kernel(mlp.mlp_backward, shapes, layer=index(layer, dout), stack=stack.so_far(mlp_bank), **here, **saved, dout=dout,
                        x0_before=before[0], bigram_before=before[1], dx_so_far=dx)
        as_bank = lambda found, bank: found if found is None else found.view_as(bank)
        dmlp_bank = as_bank(stack.store(d.stack, ("mlp", layer)), mlp_bank)
        if j is None:
            return d.dx, dmlp_bank, d.dfactors, *[None] * 9
        dvo_bank = as_bank(stack_o.store(d.stack_o, ("o", j)), vo_bank)
        dx0, dbigram = (found if into is None else into.store(found) for found, into in zip((d.dx0, d.dbigram), sums))
        return d.dx, dmlp_bank, d.dfactors, d.dy, dvo_bank, d.dlambda_o, dx0, dbigram, *[None] * 4
