"""
F.embedding whose gradient is a kernel, tpu/embedding.py. The plain-torch twin is F.embedding itself.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gradients import sum_of
from kernels.dispatch import call_kernel, takes


@dataclass(frozen=True)
class EmbeddingShapes:
    """The shapes of one call on one device. A key: each is lowered once."""
    rows: int  # R
    tokens: int  # T
    vocab: int  # V
    dim: int  # d
    on_top: bool  # the gradient comes on top of what there is of it already
    in_place: bool = False  # and takes its memory
    exact: bool = True  # which is float32


class Embedding(torch.autograd.Function):
    """lookup. into: where the gradient of weight goes (gradients.Sum)."""
    @staticmethod
    def forward(ctx, ids, weight, mine, into):
        ctx.vocab, ctx.into = weight.size(0), into
        ctx.save_for_backward(ids if mine is None else torch.where(mine, ids, ctx.vocab))  # of which the kernel finds no block
        return F.embedding(ids if mine is None else torch.where(mine, ids, 0), weight)

    @staticmethod
    def backward(ctx, dy):
        from kernels.tpu import embedding
        ids, = ctx.saved_tensors
        def add(before, after):
            shapes = EmbeddingShapes(*ids.shape, ctx.vocab, dy.size(2), before is not None, ctx.into.in_place,
                                     before is None or before.dtype == torch.float32)
            return call_kernel(embedding.embedding_scatter, shapes, ids=ids, dy=dy, before=before, after=after).dw.sum(0)
        return None, ctx.into.add(add), None, None


def lookup(ids: Tensor, weight: Tensor, mine: Tensor | None = None) -> Tensor:
    """
    F.embedding of ids [B, T] in weight [V, d], on a TPU with the kernel's gradient. mine [B, T] bool: only these ids are of this weight,
    the rows for the others mean nothing, and no gradient comes from them.
    """
    if takes(weight, f"the gradient of an embedding {tuple(weight.shape)}", lambda: embedding_refuses(ids, weight)):
        return Embedding.apply(ids, weight, mine, sum_of(weight))
    if mine is None:
        return F.embedding(ids, weight)
    return torch.where(mine.unsqueeze(-1), F.embedding(torch.where(mine, ids, 0), weight), 0.0)


def embedding_refuses(ids: Tensor, weight: Tensor) -> str | None:
    """What keeps these tensors from the TPU kernel, or None."""
    if weight.dtype != torch.bfloat16:
        return "they take bfloat16"
    if ids.size(1) % 128 or weight.size(1) % 128:
        return "they take multiples of 128 tokens and dimensions"
    return None
