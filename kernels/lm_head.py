"""
lm_head with softcapped cross entropy. The plain-torch twins are FusedSoftcappedCrossEntropy and softcapped_cross_entropy in
train_gpt_xla.py (upstream: FusedSoftcappedCrossEntropy's Triton kernels); the TPU kernels are tpu/lm_head.py.
"""
import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradients import sum_of
from kernels.dispatch import call_kernel, largest_fitting, takes

SOFTCAP_A, SOFTCAP_B, SOFTCAP_C = 23.0, 5.0, 7.5  # A * sigmoid((logits + B) / C)


@dataclass(frozen=True)
class LmHead:
    """The shapes of one call on one device. A key: each is lowered once. Token blocks divide tokens and kept, V's need not divide V."""
    rows: int  # R
    tokens: int  # T
    dim: int  # d
    vocab: int  # V
    targets: int  # n, of each token: its own and those of the tokens after it
    kept: int  # tokens at a row's end whose P [kept, V] stays in HBM for the backward pass
    on_top: bool  # dw comes on top of what there is of it already
    forward_block: tuple[int, int]  # tokens, vocabulary
    backward_block: tuple[int, int]
    in_place: bool = False  # dw takes the memory of what it comes on top of, float32
    prefix: bool = False  # a token may have one more, its prefix

    @property
    def ids(self) -> int:
        """Vocabulary entries that a token's loss names."""
        return self.targets + self.prefix


def get_lm_head(x: Tensor, weight: Tensor, targets: int, p_tokens: int, gradients: bool = True, prefix: bool = False) -> LmHead | None:
    """p_tokens: whose P may be kept. None where no blocks fit in VMEM."""
    from kernels.tpu.lm_head import backward_vmem_bytes, forward_vmem_bytes
    (B, T, d), V = x.shape, weight.size(-2)
    block = lambda most: math.gcd(T, most)  # a power of two
    kept = min(T, p_tokens // B // block(2048) * block(2048)) if gradients else 0
    whole = LmHead(B, T, d, V, targets, kept, gradients, (block(2048 if gradients else 4096), 512), (block(512), 4608),
                   prefix=prefix)
    replace = dataclasses.replace
    forward = largest_fitting([replace(whole, forward_block=(block(Tb), 512)) for Tb in (whole.forward_block[0], 1024, 512)],
                              lambda shapes: forward_vmem_bytes(shapes, "bfloat16"))
    backward = largest_fitting([replace(whole, backward_block=(block(512), Vb)) for Vb in (4608, 2304, 1152)],
                               lambda shapes: backward_vmem_bytes(shapes, "bfloat16"))
    if forward is None or backward is None:
        return None
    return replace(whole, on_top=False, forward_block=forward.forward_block, backward_block=backward.backward_block)


def takes_lm_head(x: Tensor, weight: Tensor) -> bool:
    """Whether lm_head_losses runs here."""
    return takes(x, f"lm_head of {tuple(x.shape)}", lambda: lm_head_refuses(x, weight))


def lm_head_refuses(x: Tensor, weight: Tensor) -> str | None:
    """What keeps these tensors from the TPU kernels, or None."""
    (_, T, d), V = x.shape, weight.size(-2)
    if {x.dtype, weight.dtype} != {torch.bfloat16}:
        return "they take bfloat16"
    if T % 128 or V % 128 or d % 128:
        return "they take multiples of 128 tokens, dimensions and vocabulary entries"
    if get_lm_head(x, weight, 3, p_tokens=x.size(0) * T, prefix=True) is None:
        return f"a dimension of {d} does not fit in VMEM"
    return None


def lm_head_losses(x: Tensor, weight: Tensor, targets: Tensor, mtp_weights: Tensor | None = None, prefix: Tensor | None = None,
                   prefix_weight: Tensor | None = None, p_tokens: int = 0) -> Tensor:
    """
    x [B, T, d], weight [V, d], targets [B, T] int32, mtp_weights [n] float32 -> losses [B, T] float32, by the TPU kernels. Without
    mtp_weights: for one target and no gradient, without temporaries. p_tokens: of how many tokens P may be kept for the backward pass.
    prefix [B, T] int32: one more target of each token, or -1, with prefix_weight [1] float32.

    Targets beyond a row's end count in no loss, but their weights do in the gradient, in the softmax's factor (as upstream).
    """
    if mtp_weights is not None:
        return SoftcappedCrossEntropy.apply(x, weight, targets, mtp_weights, prefix, prefix_weight, p_tokens, sum_of(weight))
    from kernels.tpu import lm_head
    shapes, one = get_lm_head(x, weight, 1, 0, gradients=False), torch.ones(1, device=x.device)
    return call_kernel(lm_head.lm_head_losses, shapes, x=x, w=weight.expand(x.size(0), -1, -1), targets=targets, mtp_weights=one).losses


class SoftcappedCrossEntropy(torch.autograd.Function):
    """lm_head_losses with multi-token prediction and prefixes. into: where the gradient of weight goes (gradients.Sum)."""
    @staticmethod
    def forward(ctx, x, weight, targets, mtp_weights, prefix, prefix_weight, p_tokens, into):
        from kernels.tpu import lm_head
        ctx.into, ctx.shapes = into, get_lm_head(x, weight, mtp_weights.numel(), p_tokens, prefix=prefix is not None)
        w = weight.expand(x.size(0), -1, -1)
        r = call_kernel(lm_head.lm_head_losses_and_dx, ctx.shapes, x=x, w=w, targets=targets, mtp_weights=mtp_weights, prefix=prefix,
                        prefix_weight=prefix_weight)
        ctx.save_for_backward(x, weight, targets, prefix, r.dx, r.a, r.at_targets, r.p)
        return r.losses

    @staticmethod
    def backward(ctx, dlosses):
        from kernels.tpu import lm_head
        x, weight, targets, prefix, dx, a, at_targets, p = ctx.saved_tensors
        def add(before, after):
            shapes = dataclasses.replace(ctx.shapes, on_top=before is not None, in_place=ctx.into.in_place)
            return call_kernel(lm_head.lm_head_dw, shapes, x=x, w=weight.expand(x.size(0), -1, -1), targets=targets, prefix=prefix,
                               scale=a * dlosses, at_targets=at_targets, p=p, before=before, after=after).dw.sum(0)
        return (dlosses.unsqueeze(-1) * dx.float()).type_as(dx), ctx.into.add(add), *[None] * 6
