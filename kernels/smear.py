"""
Where the residual stream begins: the smear gate, norm, and the first product of MUDD's gates before layer 0. The plain-torch twin is in
GPT.forward; the TPU kernels are tpu/smear.py.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import call_kernel, largest_fitting


@dataclass(frozen=True)
class SmearShapes:
    """The shapes of one call on one device. A key: each is lowered once."""
    rows: int  # R
    tokens: int  # T
    dim: int  # d
    hidden: int  # of MUDD's gates
    block: int  # C, tokens


def get_smear(x: Tensor, w1: Tensor) -> SmearShapes | None:
    """None where no block fits in VMEM."""
    from kernels.tpu.smear import vmem_bytes
    B, T, d = x.shape
    choices = [SmearShapes(B, T, d, w1.size(0), block) for block in (512, 256, 128) if T % block == 0]
    return largest_fitting(choices, lambda shapes: vmem_bytes(shapes, "bfloat16"))


def fused_smear(
        x: Tensor,  # [B, T, d], embeddings
        gate_w: Tensor,  # [1, n], the smear gate's
        smear_lambda: Tensor,  # float32, 0-D
        w1: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [64, d], MUDD's
    """
    x0 = norm(x + gate * (x one token before)), gate = smear_lambda * sigmoid(x[..., :n] @ gate_w.T), [B, T, d]; the same for one more
    reader, because the kernel adds up what comes back to it; x0 @ w1.T, [B, T, 64].
    """
    return Smear.apply(x, F.pad(gate_w.float(), (0, 128 - gate_w.size(1))), smear_lambda.view(1), w1)


class Smear(torch.autograd.Function):
    """fused_smear, with gate_w [1, 128] float32, zeros at the end, and smear_lambda [1]."""
    @staticmethod
    def forward(ctx, x, gate_w, smear_lambda, w1):
        from kernels.tpu import smear
        ctx.shapes = get_smear(x, w1)
        r = call_kernel(smear.smear_forward, ctx.shapes, x=x, gate_w=gate_w, smear_lambda=smear_lambda, w1=w1)
        ctx.save_for_backward(x, gate_w, smear_lambda, w1, r.x0)
        return r.x0, r.x0.view_as(r.x0), r.h.mT

    @staticmethod
    def backward(ctx, dx0, dx0_once, dh):
        from kernels.tpu import smear
        x, gate_w, smear_lambda, w1, x0 = ctx.saved_tensors
        d = call_kernel(smear.smear_backward, ctx.shapes, x=x, gate_w=gate_w, smear_lambda=smear_lambda, w1=w1, dx0=dx0, dx0_once=dx0_once,
                        dh=dh.mT)
        return d.dx, d.dgate_w, d.dlambda, dh.flatten(0, 1).T @ x0.flatten(0, 1)
