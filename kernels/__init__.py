"""
The TPU kernels, each beside its plain-torch twin or a pointer to it; tests hold the one to the other. This is what the model may call.
Importing it imports neither JAX nor torch_xla.

    smear.py        the smear gate and norm, before layer 0      tpu/smear.py
    attention.py    up to q, k and v, and attention itself       tpu/projection.py, tpu/attention.py
    dc.py           what DC adds to attention in layer 10        tpu/dc.py
    mlp.py          attention's last projection and the MLP      tpu/mlp.py
    mix.py          sums of activations, MUDD's                  tpu/mix.py
    lm_head.py      lm_head and the loss                         tpu/lm_head.py
    embedding.py    the gradient of embeddings                   tpu/embedding.py
    dispatch.py     when a kernel runs, and how it gets into torch_xla's graph
"""
from torch import Tensor

from kernels.attention import attention_refuses, fused_attention, window_attention
from kernels.dc import dc_attention, dc_refuses, fused_dc
from kernels.dispatch import takes
from kernels.embedding import lookup
from kernels.lm_head import lm_head_losses, takes_lm_head
from kernels.mix import fused_mix
from kernels.mlp import mlp_refuses, residual_mlp
from kernels.smear import fused_smear

__all__ = ["dc_attention", "fused_attention", "fused_dc", "fused_mix", "fused_smear", "lm_head_losses", "lookup", "residual_mlp",
           "takes_layers", "takes_lm_head", "window_attention"]


def takes_layers(x: Tensor, mlp_bank: Tensor, heads: int, dc_window: int, attentions: set[tuple[int, bool]]) -> bool:
    """
    Whether the layers' kernels run here, those of all layers or none: they share stacks of gradients. x: [B, T, d]. dc_window: keys.
    attentions: (window, paired) of the layers.
    """
    def refuses() -> str | None:
        reasons = (attention_refuses(x, heads, *attention) for attention in sorted(attentions))
        return mlp_refuses(x, mlp_bank) or next(filter(None, reasons), None) or dc_refuses(x, heads, dc_window)
    return takes(x, f"layers of {tuple(x.shape)}", refuses)
