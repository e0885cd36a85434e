"""
The TPU kernels, each beside its plain-torch twin or a pointer to it; tests hold the one to the other. This is what the model may call.
Importing it imports neither JAX nor torch_xla.

    attention.py    up to q, k and v, and attention itself       tpu/projection.py, tpu/attention.py
    mlp.py          attention's last projection and the MLP      tpu/mlp.py
    lm_head.py      lm_head and the loss                         tpu/lm_head.py
    embedding.py    the gradient of embeddings                   tpu/embedding.py
    dispatch.py     when a kernel runs, and how it gets into torch_xla's graph
"""
from torch import Tensor

from kernels.attention import attention_refuses, fused_attention, window_attention
from kernels.dispatch import takes
from kernels.embedding import lookup
from kernels.lm_head import lm_head_losses, takes_lm_head
from kernels.mlp import mlp_refuses, residual_mlp

__all__ = ["fused_attention", "lm_head_losses", "lookup", "residual_mlp", "takes_block", "takes_lm_head", "window_attention"]


def takes_block(x: Tensor, W1: Tensor, W2: Tensor, attention: tuple[int, int, bool] | None) -> bool:
    """Whether a block's kernels, fused_attention and residual_mlp, run here. attention: heads, window, paired."""
    return takes(x, f"a block of {tuple(x.shape)}", lambda: mlp_refuses(x, W1, W2) or (attention and attention_refuses(x, *attention)))
