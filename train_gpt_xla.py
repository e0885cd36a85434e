"""
Record #60 of KellerJordan/modded-nanogpt (train_gpt.py at 0a43716d: 2026-01-16, 1.765 minutes on 8xH100) for TPUs.
Same names, same order, same numbers; each difference is marked D1, D2, ... at its place and explained in DIFFERENCES.md.

    bash run_tpu.sh                               the real run on a TPU, the rehearsal anywhere else
    python train_gpt_xla.py --preset rehearsal    the rehearsal, on whatever devices PJRT finds
    python train_gpt_xla.py --val_loss_every 125  any field of Hyperparameters
    python train_gpt_xla.py --save_every 100 --run_id NAME    a run that goes on where it was stopped, by the same command

One process drives all chips with one program (SPMD). Upstream's 8 ranks are 8 rows of a batch: on 8 devices each has one, on fewer
they take turns (D24), and 1, 2, 4 or 8 compute the same thing. Forward and backward run on each device by itself; the optimizers' state
is split over all.
Shapes: B rows, T tokens, H heads, D head dim, V vocabulary.
"""
import argparse
import contextlib
import difflib
import gc
import itertools
import math
import os
import queue
import re
import signal
import sys
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own progress notes
import numpy as np
import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.debug.profiler as xp
import torch_xla.runtime as xr
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from checkpoint import Checkpoints
from chips import this_chip
from gradients import Gradients
from kernels import fused_attention, lm_head_losses, lookup, residual_mlp, takes_block, takes_lm_head, window_attention
from kernels.dispatch import Kept, what_to_keep
from kernels.lm_head import SOFTCAP_A, SOFTCAP_B, SOFTCAP_C
from muon_xla import DistAdam, NorMuon
from replay import Replay
from shards import find_shards, more, read_tokens, way_out
from spmd import ROWS, assign, begin_program, device_count, enter, is_split, leave, setup_devices, shard, to_device, to_host, turns
from wandb_run import WandbRun, get_client

warnings.filterwarnings("ignore", message="Use torch_xla.sync", category=DeprecationWarning)

# -----------------------------------------------------------------------------
# The model's parts

def norm(x: Tensor):
    """RMSNorm over the last dim, in float32 with float32's epsilon, as upstream's F.rms_norm does for bfloat16 too."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)).type_as(x)

def scaled(factor: Tensor, x: Tensor):
    """
    factor (float32, a lambda or a gate) * x, in x's dtype. D22: the product is in float32, so the sum over x in the factor's gradient is,
    too. XLA adds up bfloat16 in bfloat16, where 65,536 ones make 2,048; CUDA adds them up in float32.
    """
    return (factor * x.float()).type_as(x)

def mixed(x: Tensor, lambdas: tuple[Tensor, ...], x0: Tensor | None):
    """The residual stream as a block finds it: lambdas[0] * x + lambdas[1] * x0, or x."""
    return x if x0 is None else (lambdas[0] * x.float() + lambdas[1] * x0.float()).type_as(x)

class CastedLinear(nn.Linear):
    # D1: no FP8. The v6e's matrix unit has no FP8 mode, so lm_head multiplies in bfloat16 like everything else.
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.zero_()  # a projection that starts at zero: @Grad62304977 and others

    def forward(self, x: Tensor):
        return F.linear(x, self.weight.type_as(x))

def half_split(head_dim: int) -> Tensor:
    """
    D5: rotary pairs (2i, 2i + 1) stored as (i, i + D/2): index of upstream's dim for each of ours. Lanes 2i and 2i + 1 cannot
    be exchanged without a copy on a TPU; two halves can. Scores are sums over dims, so the order of dims is free.
    """
    return torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])

def still_dims(head_dim: int, device=None) -> Tensor:
    """Which of our dims, [D] bool, rotary embedding leaves alone: upstream's [D/4 : D/2] and [3D/4 : D]. Computed: no buffer is needed."""
    i = torch.arange(head_dim, device=device)
    return (2 * i % head_dim + 2 * i // head_dim) % (head_dim // 2) >= head_dim // 4  # upstream's number of dim i comes first

class Yarn(nn.Module):
    """
    Half-truncated RoPE with YaRN. angular_freq [D] (in upstream's order) and attn_scale are the host's state; each step's graph
    gets them as numbers and computes its own tables (D6: upstream keeps 2 x max_seq_len rows of them, 134 MB each).
    """
    def __init__(self, head_dim: int, block_size: int):
        super().__init__()
        self.head_dim = head_dim
        self.block_size = block_size
        self.reset()

    @staticmethod
    def rotary(x_BHTD: Tensor, factor1: Tensor, factor2: Tensor):
        x1, x2 = x_BHTD.chunk(2, dim=-1)
        return factor1 * x_BHTD + factor2 * torch.cat([x2, x1], dim=-1)

    def reset(self):
        angular_freq = (1 / 1024) ** torch.linspace(0, 1, steps=self.head_dim//4, dtype=torch.float32)
        angular_freq = angular_freq.repeat_interleave(2)
        # the second half of the dims never rotates: @YouJiacheng, who also chose the base
        self.angular_freq = torch.cat([angular_freq, angular_freq.new_zeros(self.head_dim//2)])
        # smaller than 1/sqrt(D), as q and k are normed: after @leloykun's 0.12 and @brendanh0gan's learned scales
        self.attn_scale = 0.1

    def apply(self, old_window: int, new_window: int, alpha: int = 1, beta: int = 32):
        rotations = self.block_size * old_window * self.angular_freq / (2 * torch.pi)
        scaling_factor = old_window / new_window
        interpolation_weight = torch.clamp((rotations - alpha) / (beta - alpha), 0, 1)
        self.angular_freq *= scaling_factor + interpolation_weight * (1 - scaling_factor)
        self.attn_scale *= 0.2 * math.log(new_window / old_window) + 1

    def numbers(self) -> list[float]:
        """What a step's graph needs: the D/4 frequencies that differ, then the scale of the scores."""
        return self.angular_freq[:self.head_dim//2:2].tolist() + [self.attn_scale]

    @staticmethod
    def tables(t: Tensor, freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """factor1, factor2 [..., T, D] for positions t [..., T] and frequencies [D/4], in half-split order."""
        zero = torch.zeros_like(freq)
        theta = t.reshape(*t.shape, 1) * torch.cat([freq, zero, -freq, zero])
        return theta.cos().to(dtype), theta.sin().to(dtype)

    def factors(self, T: int, freq: Tensor, dtype: torch.dtype, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, D] each, for all heads; [B, 1, T, D] at positions [B, T]."""
        t = torch.arange(T, dtype=torch.float32, device=freq.device) if positions is None else positions.unsqueeze(1)
        return self.tables(t, freq, dtype)

class YarnPairedHead(Yarn):
    def factors(self, T: int, freq: Tensor, dtype: torch.dtype, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[2, T, D] each, or [B, 1, 2, T, D]: heads of even number rotate by positions 2t, of odd number by 2t + 1."""
        t = torch.arange(T, dtype=torch.float32, device=freq.device) if positions is None else positions.unsqueeze(1)
        even, odd = self.tables(2 * t, freq, dtype), self.tables(2 * t + 1, freq, dtype)
        return torch.stack([even[0], odd[0]], dim=-3), torch.stack([even[1], odd[1]], dim=-3)

@dataclass
class AttnArgs:
    mix: tuple[tuple[Tensor, Tensor], Tensor] | tuple[tuple[()], None]
    ve: Tensor
    sa_lambdas: tuple[Tensor, Tensor]
    documents: Tensor
    bm_size: int
    factors: tuple[Tensor, Tensor]
    attn_scale: Tensor
    key_offset: bool
    attn_gate_w: Tensor
    ve_gate_w: Tensor
    keep_mlp: bool = True
    attention: Callable | None = None

class CausalSelfAttention(nn.Module):
    paired = False

    def __init__(self, dim: int, head_dim: int, num_heads: int, layer_idx: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dim = dim
        self.hdim = num_heads * head_dim

        assert self.hdim == self.dim, "num_heads * head_dim must equal model_dim"
        std = self.dim ** -0.5
        bound = (3 ** 0.5) * std # uniform with this bound has the deviation std: @YouJiacheng
        # Q, K, V and O in one tensor: many asked for it, @fernbear.bsky.social and @YouJiacheng built it, @chrisjmccormick laid it out
        self.qkvo_w = nn.Parameter(torch.empty(self.dim * 4, self.hdim, dtype=torch.bfloat16))
        self.qkvo_w.label = 'attn'

        with torch.no_grad():
            self.qkvo_w[:self.dim * 3].uniform_(-bound, bound)
            self.qkvo_w[self.dim * 3:].zero_() # each block starts as the identity

    def to_upstream(self, qkvo_w: Tensor) -> Tensor:
        """qkvo_w with the dims of Q and K in upstream's order (D5)."""
        return self.reorder(qkvo_w, half_split(self.head_dim).argsort())

    def from_upstream(self, qkvo_w: Tensor) -> Tensor:
        return self.reorder(qkvo_w, half_split(self.head_dim))

    def reorder(self, qkvo_w: Tensor, index: Tensor) -> Tensor:
        qk = qkvo_w[:self.dim * 2].unflatten(0, (-1, self.head_dim))[:, index].flatten(0, 1)
        return torch.cat([qk, qkvo_w[self.dim * 2:]])

    def forward(self, x: Tensor, attn_args: AttnArgs):
        B, T = x.size(0), x.size(1) # rows, tokens a row
        assert T % 16 == 0
        ve, sa_lambdas, (factor1, factor2) = attn_args.ve, attn_args.sa_lambdas, attn_args.factors
        # a gate on every head lets it opt out of a token: @classiclarryd. Value embeddings, where a layer has one, have theirs
        gate = lambda w: torch.sigmoid(F.linear(x[..., :12], w).float()).mT.unsqueeze(-1)  # [B, H, T, 1]

        # D7: heads before tokens, [B, H, T, D]. A TPU tiles the last two dims, so each head's [T, D] must lie together.
        w = scaled(sa_lambdas[0], self.qkvo_w[:self.dim * 3].type_as(x)).view(3 * self.num_heads, self.head_dim, self.dim)
        q, k, v = torch.einsum('btc,hdc->bhtd', x, w).chunk(3, dim=1)
        q, k = norm(q), norm(k) # @Grad62304977
        if self.paired:
            pairs = lambda x: x.unflatten(1, (-1, 2))  # [B, H/2, 2, T, D]: heads of even and odd number
            q, k = (Yarn.rotary(pairs(x), factor1, factor2).flatten(1, 2) for x in (q, k))
        else:
            q, k = Yarn.rotary(q, factor1, factor2), Yarn.rotary(k, factor1, factor2)
        if attn_args.key_offset:
            # in the dims that stand still a key carries its predecessor's content, so one layer can do induction
            k = torch.where(still_dims(self.head_dim, x.device), torch.cat([k[:, :, :1], k[:, :, :-1]], dim=2), k)
        if ve is not None:
            ve = ve.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
            v = v + scaled(2 * gate(attn_args.ve_gate_w), ve) # @KoszarskyB, @Grad62304977
        attention = attn_args.attention or window_attention
        y = attention(q, k, v, attn_args.documents, attn_args.bm_size, attn_args.attn_scale, self.paired)
        y = scaled(gate(attn_args.attn_gate_w), y).transpose(1, 2).flatten(2)
        return F.linear(y, scaled(sa_lambdas[1], self.qkvo_w[self.dim * 3:].type_as(y))) # lambda on O's weights, not its output: @shenberg

class PairedHeadCausalSelfAttention(CausalSelfAttention):
    """
    Pairs up heads h and h + H/2: a query of one attends to the keys of both. Upstream interleaves the two into a sequence of
    2T; here window_attention does whatever its device likes best, and only the rotary tables differ (D8).
    """
    paired = True

class FusedLinearReLUSquareFunction(torch.autograd.Function):
    """relu(x @ W1.T)^2 @ W2, whose backward pass keeps one [.., 4d] tensor instead of two and forms dpre in x's dtype."""
    @staticmethod
    def forward(ctx, x, W1, W2):
        pre = x @ W1.T
        ctx.save_for_backward(x, W1, W2, pre)
        return pre.relu().square() @ W2

    @staticmethod
    def backward(ctx, grad_output):
        x, W1, W2, pre = ctx.saved_tensors
        post = pre.relu()
        dW2 = post.square().flatten(0, -2).T @ grad_output.flatten(0, -2)
        dpre = 2 * (grad_output @ W2.T) * post
        dW1 = dpre.flatten(0, -2).T @ x.flatten(0, -2)
        return dpre @ W1, dW1, dW2

class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        hdim = 4 * dim
        # both 4d x d, so that one stack holds them
        self.c_fc = nn.Parameter(torch.empty(hdim, dim, dtype=torch.bfloat16))
        self.c_proj = nn.Parameter(torch.empty(hdim, dim, dtype=torch.bfloat16))
        self.c_fc.label = 'mlp'
        self.c_proj.label = 'mlp'
        self.c_proj.lr_mul = 2.

        std = 0.5 * (dim ** -0.5)
        bound = (3 ** 0.5) * std # @YouJiacheng
        with torch.no_grad():
            self.c_fc.uniform_(-bound, bound)
            self.c_proj.zero_() # @Grad62304977

    def forward(self, x: Tensor):
        # squared ReLU (arXiv:2109.08668): @SKYLINEZ007, @Grad62304977
        return FusedLinearReLUSquareFunction.apply(x, self.c_fc, self.c_proj)

class Block(nn.Module):
    def __init__(self, dim: int, head_dim: int, num_heads: int, layer_idx: int, use_paired_head: bool):
        super().__init__()
        # no attention in the seventh block: @YouJiacheng
        if use_paired_head:
            self.attn = PairedHeadCausalSelfAttention(dim, head_dim, num_heads, layer_idx)
        else:
            self.attn = CausalSelfAttention(dim, head_dim, num_heads, layer_idx) if layer_idx != 6 else None
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, attn_args: AttnArgs):
        lambdas, x0 = attn_args.mix  # D20: upstream mixes before the block
        attn = self.attn and (self.attn.num_heads, attn_args.bm_size, self.attn.paired)
        if attn_args.attention is None and takes_block(x, self.mlp.c_fc, self.mlp.c_proj, attn):
            return self.by_kernels(x, attn_args)
        x = mixed(x, lambdas, x0)
        if self.attn is not None:
            x = x + self.attn(norm(x), attn_args)
        return x + self.mlp(norm(x))

    def by_kernels(self, x: Tensor, attn_args: AttnArgs):
        """What forward does, on a TPU, where it is three kernels: up to q, k and v (D15), attention (D15), what comes after it (D16)."""
        (lambdas, x0), attn = attn_args.mix, self.attn
        if attn is None:
            return residual_mlp(mixed(x, lambdas, x0), self.mlp.c_fc, self.mlp.c_proj, keep=attn_args.keep_mlp)
        lambda_x, lambda_x0 = (lambdas[0].view(1), lambdas[1].view(1)) if lambdas else (None, None)
        lambda_qkv, lambda_o = (factor.view(1) for factor in attn_args.sa_lambdas)
        y, x = fused_attention(
            x, lambda_x, x0, lambda_x0, attn.qkvo_w, lambda_qkv, attn_args.attn_gate_w, attn_args.ve, attn_args.ve_gate_w,
            *attn_args.factors, still_dims(attn.head_dim, x.device) if attn_args.key_offset else None, attn_args.documents,
            attn_args.bm_size, attn_args.attn_scale, attn.paired)
        return residual_mlp(x, self.mlp.c_fc, self.mlp.c_proj, y, attn.qkvo_w, lambda_o, keep=attn_args.keep_mlp)

# -----------------------------------------------------------------------------
# Fused Softcapped Cross Entropy

LOGITS_CHUNK = 16384  # tokens of a row whose logits exist at once: 1.5 GiB of bfloat16 at the record's vocabulary

def softcapped_logits(x: Tensor, weight: Tensor, A=SOFTCAP_A, B=SOFTCAP_B, C=SOFTCAP_C) -> tuple[Tensor, Tensor]:
    """x [B, T, d] -> logits [V, B * T] in x's dtype, and their softcap A * sigmoid((logits + B) / C) in float32."""
    # D9: vocabulary first. The sums over it then run down sublanes, and one row of tokens is one vector register wide.
    logits = weight.type_as(x) @ x.flatten(0, 1).T
    return logits, A * torch.sigmoid((logits.float() + B) / C)

def token_weights(targets: Tensor, mtp_weights: Tensor, start: int, stop: int, vocab: Tensor) -> tuple[Tensor, Tensor]:
    """
    For positions start..stop-1 of targets [B, T]: the weight of each vocabulary entry as a target, [V, B * (stop - start)],
    and their sum, [1, B * (stop - start)]. Position i has targets i, i + 1, ... with mtp_weights; none beyond the row's end.
    """
    B, T = targets.shape
    each, total = 0.0, 0.0
    for k, weight in enumerate(mtp_weights.unbind()):
        exists = torch.arange(start + k, stop + k, device=targets.device) < T
        target = torch.where(exists, F.pad(targets, (0, k))[:, start + k:stop + k], -1).flatten()
        each = each + torch.where(vocab == target, weight, 0.0)
        total = total + (exists * weight).expand(B, -1).reshape(1, -1)
    return each, total

class FusedSoftcappedCrossEntropy(torch.autograd.Function):
    """
    Softcapped cross entropy with multi-token prediction, lm_head included, LOGITS_CHUNK tokens at a time.
    x [B, T, d], weight [V, d], targets [B, T] int32, mtp_weights [n] -> losses [B, T] float32.
    No maximum is subtracted: the softcap bounds the logits by 23, and exp(23) * V is far inside float32.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, mtp_weights):
        vocab = torch.arange(weight.size(0), device=x.device, dtype=targets.dtype).unsqueeze(1)
        losses, saved = [], []
        for start in range(0, x.size(1), LOGITS_CHUNK):
            stop = min(start + LOGITS_CHUNK, x.size(1))
            logits, z = softcapped_logits(x[:, start:stop], weight)
            each, total = token_weights(targets, mtp_weights, start, stop, vocab)
            lse = z.exp().sum(0, keepdim=True).log()
            losses.append((total * lse - (each * z).sum(0, keepdim=True)).view(x.size(0), -1))
            saved += [logits, lse]
        ctx.save_for_backward(x, weight, targets, mtp_weights, vocab, *saved)
        return torch.cat(losses, dim=1)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, targets, mtp_weights, vocab, *saved = ctx.saved_tensors
        A, B, C = SOFTCAP_A, SOFTCAP_B, SOFTCAP_C
        dx, dw = [], 0.0
        for start, logits, lse in zip(range(0, x.size(1), LOGITS_CHUNK), saved[::2], saved[1::2], strict=True):
            stop = min(start + LOGITS_CHUNK, x.size(1))
            sigmoid_u = torch.sigmoid((logits.float() + B) / C)
            z = A * sigmoid_u
            each, total = token_weights(targets, mtp_weights, start, stop, vocab)
            grad_z = grad_output[:, start:stop].reshape(1, -1) * (total * (z - lse).exp() - each)
            grad_x = (grad_z * (1 / C) * z * (1 - sigmoid_u)).type_as(x)  # [V, B * T]
            dx.append((grad_x.T @ weight.type_as(x)).view(x.size(0), -1, x.size(2)))
            dw = dw + grad_x @ x[:, start:stop].flatten(0, 1)
        return torch.cat(dx, dim=1), dw, None, None

def softcapped_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Validation's loss: next-token cross entropy [B, T] float32, no gradient, LOGITS_CHUNK tokens at a time."""
    vocab = torch.arange(weight.size(0), device=x.device, dtype=targets.dtype).unsqueeze(1)
    losses = []
    for start in range(0, x.size(1), LOGITS_CHUNK):
        stop = min(start + LOGITS_CHUNK, x.size(1))
        _, z = softcapped_logits(x[:, start:stop], weight)
        hit = torch.where(vocab == targets[:, start:stop].flatten(), z, 0.0)
        losses.append((z.exp().sum(0).log() - hit.sum(0)).view(x.size(0), -1))
    return torch.cat(losses, dim=1)

# -----------------------------------------------------------------------------
# The main model

def next_multiple_of_n(v: float | int, *, n: int):
    return max(n, math.ceil(v / n) * n)

@dataclass
class ForwardScheduleConfig:
    mtp_weights: Tensor  # [n] float32
    ws_short: int  # in blocks
    ws_long: int
    yarn: Tensor  # [D/4 + 1] float32: Yarn.numbers()
    yarn_paired_head: Tensor
    keep: Kept | None = None  # for the backward pass (D25)
    attention: Callable | None = None  # in place of window_attention, with its arguments; the blocks' kernels do not run then
    positions: Tensor | None = None  # [B, T] float32, in the row, by which heads rotate; 0 .. T-1 where there are none

class GPT(nn.Module):
    def __init__(self, vocab_size: int, num_layers: int, num_heads: int, head_dim: int, model_dim: int, block_size: int = 128):
        super().__init__()
        self.num_layers = num_layers
        self.block_size = block_size
        vocab_size = next_multiple_of_n(vocab_size, n=128)

        self.smear_gate = CastedLinear(12, 1)
        self.smear_gate.weight.label = 'smear_gate'
        self.smear_gate.weight.lr_mul = 0.01
        self.smear_gate.weight.wd_mul = 0.0

        self.skip_gate = CastedLinear(12, 1)
        self.skip_gate.weight.label = 'skip_gate'
        self.skip_gate.weight.lr_mul = 0.05
        self.skip_gate.weight.wd_mul = 0.0

        # tables of values added to V: @KoszarskyB, after @Grad62304977's value residual (arXiv:2410.17897); @ragulpr simplified them
        self.value_embeds = nn.ModuleList([nn.Embedding(vocab_size, model_dim) for _ in range(3)])
        for embed in self.value_embeds:
            nn.init.zeros_(embed.weight)
        for ve in self.value_embeds:
            ve.weight.label = 'value_embed'

        self.attn_gate_bank = nn.Parameter(torch.zeros(10, num_heads, 12)) # a gate a head for the 10 layers with attention
        self.attn_gate_bank.label = 'attn_gate_bank'
        self.ve_gate_bank = nn.Parameter(torch.zeros(5, num_heads, 12)) # and for the 5 with a value embedding
        self.ve_gate_bank.label = 've_gate_bank'

        self.paired_head_layers = [0, 2, 5, 9]
        self.blocks = nn.ModuleList([Block(model_dim, head_dim, num_heads, i, i in self.paired_head_layers) for i in range(num_layers)])
        self.yarn = Yarn(head_dim, block_size)
        self.yarn_paired_head = YarnPairedHead(head_dim, block_size)
        # the vocabulary is padded to a multiple of 128 (@Grad62304977, after Karpathy); the padding is in the softmax too
        self.lm_head = CastedLinear(model_dim, vocab_size)
        nn.init.normal_(self.lm_head.weight, mean=0, std=0.005)
        self.lm_head.weight.label = 'lm_head'

        self.embed = nn.Embedding(vocab_size, model_dim)
        self.embed.weight.label = 'embed'

        # apart from the other scalars because Adam treats them differently
        self.x0_lambdas = nn.Parameter(torch.zeros(num_layers))
        self.x0_lambdas.label = 'x0_lambdas'
        self.x0_lambdas.lr_mul = 5.0
        self.x0_lambdas.wd_mul = 0.0

        pad = (-num_layers * 3 - 3) % ROWS
        self.scalars = nn.Parameter(
            torch.cat(
                [
                    1.1 * torch.ones(num_layers),  # residual lambdas
                    *[torch.tensor([0.5, 1.0]) for _ in range(num_layers)],  # attention lambdas, on QKV and on O
                    torch.zeros(1), # smear
                    0.5 * torch.ones(1), # backout
                    -1.5 * torch.ones(1), # skip, through a sigmoid: 0.18
                    torch.ones(pad),
                ]
            )
        )

        self.scalars.label = 'scalars'
        for param in self.value_embeds.parameters():
            param.lr_mul = 75.
            param.wd_mul = 5.
        for param in self.embed.parameters():
            param.wd_mul = 150.
        for param in self.lm_head.parameters():
            param.wd_mul = 150.
        self.scalars.lr_mul = 5.0
        self.scalars.wd_mul = 0.0

        self.split_embed = False

    def to_devices(self, dtype: torch.dtype = torch.bfloat16):
        """Moves the parameters to the mesh, replicated: matrices, embeddings and gates in dtype, scalars in float32."""
        for module in self.modules():
            for name, p in module._parameters.items():
                if p is None:
                    continue
                x = p.data if p is self.scalars or p is self.x0_lambdas else p.data.to(dtype)
                module._parameters[name] = nn.Parameter(to_device(x))
                module._parameters[name].__dict__.update(p.__dict__)  # label, lr_mul, wd_mul
            for name, b in module._buffers.items():
                module._buffers[name] = to_device(b)
        return self

    def state_dict(self, *args, **kwargs):
        """On the CPU, under upstream's names, in upstream's layout: a checkpoint of either loads in the other."""
        state = {name: p.detach().cpu() for name, p in super().state_dict(*args, **kwargs).items()}
        for i, block in enumerate(self.blocks):
            if block.attn is not None:
                state[f"blocks.{i}.attn.qkvo_w"] = block.attn.to_upstream(state[f"blocks.{i}.attn.qkvo_w"])
        return state

    def load_state_dict(self, state_dict):
        """Takes upstream's state_dict, with or without torch.compile's prefix. Nothing is changed if it does not fit."""
        state = {name.removeprefix("_orig_mod."): value for name, value in state_dict.items()}
        params = dict(self.named_parameters())
        for name in params.keys() ^ state.keys():
            raise ValueError(f"state_dict: {name} is {'missing' if name in params else 'not a parameter of this model'}")
        for name, p in params.items():
            if p.shape != state[name].shape:
                raise ValueError(f"state_dict: {name} has shape {tuple(state[name].shape)}, this model wants {tuple(p.shape)}")
        for name, p in params.items():
            value = state[name].detach().cpu().to(p.dtype)
            if name.endswith("qkvo_w"):
                value = self.blocks[int(name.split(".")[1])].attn.from_upstream(value)
            p.data = to_device(value.contiguous())

    def forward(self, input_seq: Tensor, target_seq: Tensor | None, documents: Tensor, schedule_cfg: ForwardScheduleConfig):
        """
        input_seq, target_seq, documents: [B, T] int32; documents holds where in its row each token's document starts (D10:
        upstream passes cu_seqlens). Returns a loss for each row, [B]: summed over tokens in training, their mean otherwise.
        Without target_seq, what lm_head reads, [B, T, d].
        """
        assert input_seq.ndim == 2
        T, dtype = input_seq.size(1), self.lm_head.weight.dtype

        ws_short, ws_long = schedule_cfg.ws_short, schedule_cfg.ws_long

        skip_connections = []
        skip_in = [3] # the first layer with a long window
        skip_out = [6] # which has no attention of its own
        x_backout = None
        backout_layer = 7

        scalars = self.scalars.unbind()
        resid_lambdas = scalars[: 1 * self.num_layers]
        x0_lambdas = self.x0_lambdas.unbind()
        sa_lambdas = scalars[1 * self.num_layers: 3 * self.num_layers]
        sa_lambdas = list(zip(sa_lambdas[::2], sa_lambdas[1::2], strict=True))
        smear_lambda = scalars[3 * self.num_layers]
        backout_lambda = scalars[3 * self.num_layers+1]
        skip_lambda = scalars[3 * self.num_layers+2]

        short_bm = ws_short * self.block_size
        long_bm = ws_long * self.block_size
        bm_sizes = [short_bm, short_bm, short_bm, long_bm, short_bm, short_bm, None, short_bm, short_bm, short_bm, long_bm]
        assert len(bm_sizes) == self.num_layers
        key_offset = [b==long_bm for b in bm_sizes] # where the window is long
        factors = [yarn.factors(T, cfg[:-1], dtype, schedule_cfg.positions) + (cfg[-1],) for yarn, cfg in
                   ((self.yarn, schedule_cfg.yarn), (self.yarn_paired_head, schedule_cfg.yarn_paired_head))]

        # D19: on a TPU a kernel adds up their gradients
        x = lookup(input_seq, self.embed.weight if self.split_embed else self.lm_head.weight)
        ve = [lookup(input_seq, value_embed.weight) for value_embed in self.value_embeds]
        # the tables in the order 1 2 ... 0 1 2: @YouJiacheng, after @leloykun's U-net
        ve = [ve[1], ve[2]] + [None] * (self.num_layers - 5) + [ve[0], ve[1], ve[2]]
        assert len(ve) == self.num_layers

        # each token takes a gated share of the one before it: @classiclarryd. D21: the first one takes a share of zeros, where upstream
        # leaves it out, for T - 1 tokens lie askew in a TPU's tiles
        smear_gate_out = smear_lambda * torch.sigmoid(self.smear_gate(x[..., :self.smear_gate.weight.size(-1)].float()))
        x = x + scaled(smear_gate_out, F.pad(x, (0, 0, 1, -1)))
        x = x0 = norm(x)

        ag = self.attn_gate_bank.unbind(0)
        veg = self.ve_gate_bank.unbind(0)
        attn_gates = [*ag[:6], None, *ag[6:]]
        ve_gates = [veg[0], veg[1]] + [None] * (self.num_layers - 5) + [veg[2], veg[3], veg[4]]
        assert len(attn_gates) == self.num_layers
        assert len(ve_gates) == self.num_layers

        for i in range(self.num_layers):
            *yarn, attn_scale = factors[i in self.paired_head_layers]
            attn_args = AttnArgs(
                mix=((resid_lambdas[i], x0_lambdas[i]), x0) if i > 0 else ((), None),
                ve=ve[i],
                sa_lambdas=sa_lambdas[i],
                documents=documents,
                bm_size=bm_sizes[i],
                factors=yarn,
                attn_scale=attn_scale,
                key_offset=key_offset[i],
                attn_gate_w=attn_gates[i],
                ve_gate_w=ve_gates[i],
                keep_mlp=schedule_cfg.keep is None or schedule_cfg.keep.mlp,
                attention=schedule_cfg.attention
            )
            if i in skip_out:
                skip_gate_out = self.skip_gate(x0[..., :self.skip_gate.weight.size(-1)].float())
                skip_gate_out = torch.sigmoid(skip_lambda) * 2 * torch.sigmoid(skip_gate_out)
                x = x + scaled(skip_gate_out, skip_connections.pop())
            if i == 0:  # the other blocks mix x with x0 themselves (D20)
                x = scaled(resid_lambdas[0] + x0_lambdas[0], x)
            x = self.blocks[i](x, attn_args)
            if i in skip_in:
                skip_connections.append(x)
            if i == backout_layer:
                x_backout = x

        # what the first blocks wrote for later blocks to read, not for the prediction, is taken out again
        x = x - scaled(backout_lambda, x_backout)
        x = norm(x)
        if target_seq is None:
            return x
        # softcap 23 * sigmoid((logits + 5) / 7.5): Gemma 2's tanh by @Grad62304977, its bound by @KoszarskyB, the sigmoid form
        # by @YouJiacheng, the constants by @classiclarryd
        mtp_weights = schedule_cfg.mtp_weights if self.training else None
        if takes_lm_head(x, self.lm_head.weight):  # D17: on a TPU lm_head and the loss are one kernel
            p_tokens = schedule_cfg.keep.p_tokens if schedule_cfg.keep else x.size(0) * T
            losses = lm_head_losses(x, self.lm_head.weight, target_seq, mtp_weights, p_tokens)
        elif self.training:
            losses = FusedSoftcappedCrossEntropy.apply(x, self.lm_head.weight, target_seq, mtp_weights)
        else:
            losses = softcapped_cross_entropy(x, self.lm_head.weight, target_seq)
        return losses.sum(1) if self.training else losses.mean(1)

# -----------------------------------------------------------------------------
# Distributed data loader

def no_document_start(file: Path, bos_id: int) -> ValueError:
    return ValueError(f"no document start (token {bos_id}) in {file}: if its documents begin with another token, that is --bos_id; "
                      f"otherwise {way_out(file)}")

def _load_data_shard(file: Path, vocab_size: int) -> np.ndarray:
    """Tokens of one shard, [n] uint16, memory-mapped. ValueError names the file and what is wrong with it."""
    tokens = read_tokens(file)
    if tokens.max() >= vocab_size:
        raise ValueError(f"{file}: token {tokens.max()} is beyond the vocabulary of {vocab_size} (--vocab_size): {way_out(file)}")
    return tokens

BOS_ID = 50256

class BOSFinder:
    # Packs whole documents into rows: @varunneal, after @classiclarryd
    # D11: no quickload. A whole shard is scanned in 50 ms here, so its first 4 million tokens need no scan of their own.
    def __init__(self, tokens: np.ndarray, world_size: int = ROWS, bos_id: int = BOS_ID):
        self.tokens = tokens
        self.size = len(tokens)
        self.bos_idx = np.flatnonzero(tokens == bos_id)
        self.i = 0
        self.world_size = world_size

    def next_batch(self, num_tokens_local: int, max_seq_len: int):
        """Document starts and ends for each row, cut to max_seq_len and to num_tokens_local + 1 in all. StopIteration at the tail."""
        n = len(self.bos_idx)
        starts = [[] for _ in range(self.world_size)]
        ends = [[] for _ in range(self.world_size)]

        idx = self.i
        for r in range(self.world_size):
            cur_len = 0
            while cur_len <= num_tokens_local:
                if idx >= n:
                    raise StopIteration("Insufficient BOS ahead; hit tail of shard.")
                cur = int(self.bos_idx[idx])
                starts[r].append(cur)
                end = min(int(self.bos_idx[idx + 1]) if idx + 1 < n else self.size,
                          cur + max_seq_len,
                          cur + num_tokens_local - cur_len + 1)
                ends[r].append(end)
                cur_len += end - cur
                idx += 1

            assert cur_len == num_tokens_local + 1
        self.i = idx
        return starts, ends

class DataPreloader:
    # Opens and scans the next shard in a thread
    def __init__(self, file_iter, load):
        self.file_iter = file_iter
        self.load = load

    def _load(self):
        try:
            self.data = self.load(next(self.file_iter, None))
        except Exception as e:  # raised where the shard is asked for, not in this thread
            self.data = e

    def start(self):
        self.thread = threading.Thread(target=self._load, daemon=True)
        self.thread.start()

    def get(self):
        self.thread.join()
        if isinstance(self.data, Exception):
            raise self.data
        return self.data

def distributed_data_generator(filename_pattern: str, num_tokens: int, max_seq_len: int, align_to_bos: bool = True,
                               bos_id: int = BOS_ID, vocab_size: int = 50257, start: tuple[int, int] = (0, 0)):
    """
    Yields (inputs, targets, cum_seqlens), int32 arrays [8, T], [8, T] and [8, at least upstream's max_num_docs], T = num_tokens / 8, and
    with them (shard, place in it) where the batch after this one begins: a generator with that as its start goes on from there.
    align_to_bos: each row begins with a document, documents are cut to max_seq_len. send((num_tokens, max_seq_len)) changes
    both for the next batch. D12: all 8 rows at once, where each upstream rank reads its own.
    """
    files = find_shards(filename_pattern)
    world_size = ROWS
    shard_idx, pos = start
    if shard_idx >= len(files):
        raise ValueError(f"{filename_pattern} has {len(files)} shards, the next batch starts in number {shard_idx + 1}: fetch them again")

    def load(file):
        if file is None:
            return None
        tokens = _load_data_shard(file, vocab_size)
        finder = BOSFinder(tokens, world_size, bos_id)
        if not len(finder.bos_idx):
            raise no_document_start(file, bos_id)
        return tokens, finder

    preloader = DataPreloader(iter(files[shard_idx:]), load)
    preloader.start()

    def next_shard():
        data = preloader.get()
        if data is None:  # upstream waits here for ever
            raise EOFError(f"the {len(files)} shards of {filename_pattern} are used up: {more(files)}")
        preloader.start()
        return data

    tokens, finder = next_shard()
    finder.i = pos

    while True:
        if num_tokens % (world_size * 16):
            raise ValueError(f"batch size {num_tokens} is not divisible by 8 rows x 16 tokens: take {num_tokens // 128 * 128 or 128}")
        num_tokens_local = num_tokens // world_size
        max_num_docs = next_multiple_of_n(num_tokens_local // 300, n=128)  # upstream's room for documents

        if align_to_bos:
            try:
                seq_starts, seq_ends = finder.next_batch(num_tokens_local, max_seq_len)
            except StopIteration:
                # the whole step starts again on the next shard
                tokens, finder = next_shard()
                shard_idx += 1
                continue
            buf = np.concatenate([tokens[i:j] for starts, ends in zip(seq_starts, seq_ends, strict=True)
                                  for i, j in zip(starts, ends, strict=True)]).reshape(world_size, -1)
            lengths = [np.subtract(ends, starts) for starts, ends in zip(seq_starts, seq_ends, strict=True)]
            for row in lengths:
                row[-1] -= 1  # the last document gave one token more, the last target
            cum_lengths = [row.cumsum() for row in lengths]
            pos = finder.i
        else:
            while pos + num_tokens + 1 >= len(tokens):
                tokens, pos = next_shard()[0], 0
                shard_idx += 1
            buf = np.stack([tokens[pos + r * num_tokens_local: pos + (r + 1) * num_tokens_local + 1] for r in range(world_size)])
            cum_lengths = [np.flatnonzero(row[:-1] == bos_id) for row in buf]
            pos += num_tokens

        max_num_docs = max(max_num_docs, 2 + max(map(len, cum_lengths)))  # many short documents: longer, where upstream fails
        _cum_lengths = np.full((world_size, max_num_docs), num_tokens_local, dtype=np.int32)
        _cum_lengths[:, 0] = 0
        for row, lengths in zip(_cum_lengths, cum_lengths, strict=True):
            row[1:len(lengths) + 1] = lengths

        new_params = yield (buf[:, :-1].astype(np.int32), buf[:, 1:].astype(np.int32), _cum_lengths), (shard_idx, pos)

        if new_params is not None:
            # makes it possible for generator to receive new (num_tokens, max_seq_len) via .send()
            num_tokens, max_seq_len = new_params

def get_documents(cum_seqlens: np.ndarray) -> np.ndarray:
    """cum_seqlens [8, n] -> [8, T] int32, where in its row each token's document starts."""
    return np.stack([np.repeat(row[:-1], np.diff(row)) for row in cum_seqlens])

def pack(inputs: np.ndarray, targets: np.ndarray, cum_seqlens: np.ndarray) -> Tensor:
    """A batch as the step takes it, in one piece so that it takes one transfer: inputs, targets, documents, [8, 3, T] int32."""
    return torch.from_numpy(np.stack([inputs, targets, get_documents(cum_seqlens)], axis=1))

def to_devices(batch: Tensor) -> list[Tensor]:
    """[8, 3, T] -> on the devices, a row on each: [devices, 3, T] for each turn."""
    return [to_device(rows, "data") for rows in batch.split(device_count())]

def to_rows(losses: list[Tensor]) -> Tensor:
    """The losses of all 8 rows on the CPU, [8], from those of each turn. Waits for them."""
    return torch.cat([x.cpu() for x in losses])

def prefetch(batches, depth: int = 2):
    """
    Runs a generator of (inputs, targets, cum_seqlens), position, numbers in a thread, depth batches ahead, and yields each as what a step
    takes, on the devices, the packed batch and the numbers, and the position. Its errors are raised here.
    """
    ready, stop = queue.Queue(depth), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                pass
    def work():
        try:
            for arrays, position, numbers in batches:
                put((to_devices(pack(*arrays)), to_device(numbers), position))
                if stop.is_set():
                    return
            put(None)
        except Exception as e:
            put(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        stop.set()
        thread.join()

# -----------------------------------------------------------------------------
# Training Management. Upstream's functions read a global args; these take it, so that a test or a tool can pass its own.

def get_bs(step: int, args: "Hyperparameters"):
    if step >= args.num_scheduled_iterations:
        return args.train_bs_extension
    x = step / args.num_scheduled_iterations
    return args.train_bs_schedule[int(len(args.train_bs_schedule) * x)]

def get_ws(step: int, args: "Hyperparameters"):
    """(short, long) windows in blocks; the short one is half of the long one."""
    if step >= args.num_scheduled_iterations:
        return args.ws_final // 2, args.ws_final
    x = step / args.num_scheduled_iterations
    ws_long = args.ws_schedule[int(len(args.ws_schedule) * x)]
    return ws_long // 2, ws_long

def get_lr(step: int, args: "Hyperparameters"):
    """Learning rate factor: tied to the batch size schedule, with a linear cooldown to 0.1."""
    if step > args.num_scheduled_iterations:
        return 0.1
    lr_max = 1.0
    x = step / args.num_scheduled_iterations
    if x > 1/3:
        lr_max = 1.52  # (16/8)**0.6
    if x > 2/3:
        lr_max = 1.73  # (24/8)**0.5
    if x >= 1 - args.cooldown_frac:
        w = (1 - x) / args.cooldown_frac
        return lr_max * w + (1 - w) * 0.1
    return lr_max

def get_muon_momentum(step: int, args: "Hyperparameters", muon_warmup_steps=300, muon_cooldown_steps=50,
                      momentum_min=0.85, momentum_max=0.95):
    momentum_cd_start = args.num_iterations - muon_cooldown_steps
    if step < muon_warmup_steps:
        return momentum_min + step / muon_warmup_steps * (momentum_max - momentum_min)
    if step > momentum_cd_start:
        return momentum_max - (step - momentum_cd_start) / muon_cooldown_steps * (momentum_max - momentum_min)
    return momentum_max

def get_mtp_weights(step: int, args: "Hyperparameters") -> list[float]:
    """Weights of the next tokens as targets: [1, 0.5, 0.25->0] -> [1, 0.5->0] -> [1], @varunneal."""
    x = step / args.num_scheduled_iterations
    if x < 1/3:
        return [1.0, 0.5, 0.25 * (1 - 3*x)]
    if x < 2/3:
        return [1.0, 0.5 * (1 - (3*x - 1))]
    return [1.0]

def get_split_step(args: "Hyperparameters") -> int:
    return math.ceil(args.split_embed_frac * args.num_scheduled_iterations) | 1  # after an odd step, which Adam takes

@dataclass(frozen=True)
class Graph:
    """All that tells one compiled step from another. Steps that agree in it run the same program."""
    train: bool
    tokens: int  # a row
    ws_short: int
    ws_long: int
    n_mtp: int
    adam: bool  # Adam steps too (odd steps)
    split_embed: bool
    copy_embed: bool  # after this step, embed starts from lm_head
    part: str = "whole"  # of a step; where rows take turns (D24) "rows", the turn of a row on each device, and "update"

    @property
    def name(self) -> str:
        embed = "copy" if self.copy_embed else "split" if self.split_embed else "tied"
        step = "odd" if self.adam else "even"
        if self.part == "update":
            return f"update_{step}_{embed}" if self.adam else f"update_{step}"
        step = f"{step if self.part == 'whole' else self.part}_mtp{self.n_mtp}" if self.train else "val"
        return f"{step}_{self.tokens}_ws{self.ws_short}_{self.ws_long}_{embed}"

    def programs(self, turns: int) -> list[tuple["Graph", int]]:
        """What runs for this step or this slice of validation, where each device takes so many turns; and how often."""
        if turns == 1 or not self.train:
            return [(self, turns)]
        row = replace(self, part="rows", adam=False, copy_embed=False)
        update = Graph(True, 0, 0, 0, 0, self.adam, self.adam and self.split_embed, self.copy_embed, "update")
        return [(row, turns), (update, 1)]

def get_graph(step: int, args: "Hyperparameters", train: bool = True) -> Graph:
    """The graph of training step `step`, or of the validation before it."""
    ws_short, ws_long = get_ws(step, args)
    if not train and step == args.num_iterations:
        ws_long = args.ws_validate_post_yarn_ext  # longer still for the last validation, with no further YaRN
    return Graph(train, (get_bs(step, args) if train else args.val_batch_size) // ROWS, ws_short, ws_long,
                 len(get_mtp_weights(step, args)) if train else 0, train and step % 2 == 1, step > get_split_step(args),
                 train and step == get_split_step(args))

def is_val_step(step: int, args: "Hyperparameters") -> bool:
    return step == args.num_iterations or (args.val_loss_every > 0 and step % args.val_loss_every == 0)

def distinct_graphs(args: "Hyperparameters", turns: int = 1) -> dict[Graph, list[int]]:
    """
    Every graph of a run with the steps that use it, in order of first use. Warm-up, compilation ahead of time and tests go by it.
    turns: how often a device takes its turn in a step, spmd.turns().
    """
    graphs = {}
    for step in range(args.num_iterations + 1):
        for train in (False, True):
            if step < args.num_iterations if train else is_val_step(step, args):
                for graph, _ in get_graph(step, args, train).programs(turns):
                    graphs.setdefault(graph, []).append(step)
    return graphs

def flops_per_token(graph: Graph, args: "Hyperparameters") -> float:
    """
    FLOPs of training on one token with this graph, forward and backward (two products for each one forward): 6 for each weight of
    attention, MLPs and lm_head, 12 x model_dim for each key that a query sees. Those are the keys in its window in a document of
    train_max_seq_len tokens, which is an upper bound: few documents are that long. Not counted: gates, embeddings, optimizers,
    whatever the backward pass computes again.
    """
    d, length, block = args.model_dim, min(args.train_max_seq_len, graph.tokens), args.block_size
    weights = (args.num_layers - 1) * 4 * d * d + args.num_layers * 8 * d * d + next_multiple_of_n(args.vocab_size, n=128) * d
    def keys(window, length):
        window = min(window, length - 1)
        return (window + 1) * (1 - window / (2 * length))  # the mean of min(i, window) + 1 over i < length
    short, long = graph.ws_short * block, graph.ws_long * block
    return 6 * weights + 12 * d * (4 * keys(short, 2 * length) + 4 * keys(short, length) + 2 * keys(long, length))  # 4 of paired heads

def work_until(args: "Hyperparameters") -> tuple[list[int], list[float]]:
    """Tokens and FLOPs of all training steps before step 0, 1, ... num_iterations."""
    tokens = [get_bs(step, args) for step in range(args.num_iterations)]
    flops = [n * flops_per_token(get_graph(step, args), args) for step, n in enumerate(tokens)]
    return list(itertools.accumulate(tokens, initial=0)), list(itertools.accumulate(flops, initial=0.0))

def peak_flops(sys_root: str = "/sys") -> float | None:
    """FLOP/s of bfloat16 products of all devices together; None where there is no TPU."""
    chip = this_chip(sys_root) if xr.device_type() == "TPU" else None
    return chip and chip.bf16_flops * xr.global_runtime_device_count()

def rates(work: tuple[list[int], list[float]], first: int, stop: int, ms: float, peak: float | None) -> dict[str, float]:
    """ms a step, tokens/s and, where the peak is known, MFU in percent of steps first to stop - 1, which took ms in all."""
    tokens, flops = (x[stop] - x[first] for x in work)
    return {"ms": ms / (stop - first), "tok/s": 1000 * tokens / ms} | ({"mfu": flops / ms / peak * 1e5} if peak else {})

FORMATS = {"train_loss": "{:.4f}", "ms": "{:.2f}", "tok/s": "{:.0f}", "mfu": "{:.1f}%", "eta": "{:.0f}s"}

def in_log(numbers: dict[str, float]) -> str:
    return "".join(f" {name}:{FORMATS[name].format(value)}" for name, value in numbers.items())

def speed(work: tuple[list[int], list[float]], first: int, stop: int, ms: float, peak: float | None) -> str:
    return in_log(rates(work, first, stop, ms, peak))

@dataclass
class StepNumbers:
    """
    All that changes with every step. D13: computed on the host, sent as one small vector beside the batch, and used as 0-D tensors, so
    that no step has constants of its own to be compiled in.
    """
    mtp_weights: list[float] | Tensor  # [3], zeros at the end
    yarn: list[float] | Tensor  # Yarn.numbers()
    yarn_paired_head: list[float] | Tensor
    muon_lr: float | Tensor
    muon_momentum: float | Tensor
    adam: dict[str, tuple]  # (step_size, eff_wd) by label

    def pack(self) -> Tensor:
        """[n] float32."""
        return torch.tensor([*self.mtp_weights, *self.yarn, *self.yarn_paired_head, self.muon_lr, self.muon_momentum,
                             *itertools.chain.from_iterable(self.adam.values())])

    @classmethod
    def unpack(cls, packed: Tensor, yarn: int, labels: list[str]) -> "StepNumbers":
        """yarn: how many numbers YaRN has; labels: Adam's, in order."""
        mtp_weights, *yarns, muon, adam = packed.split([3, yarn, yarn, 2, 2 * len(labels)])
        adam = adam.unbind()
        return cls(mtp_weights, *yarns, *muon.unbind(), dict(zip(labels, zip(adam[::2], adam[1::2]))))

class TrainingManager():
    """
    Owns the optimizers and all that changes from step to step.
        1. NorMuon for matrices, with a linear warm-up and cooldown of its momentum; Adam for the rest, with betas by label
        2. Adam steps on odd steps only, on the sum of two gradients @classiclarryd
        3. Learning rate, windows, batch size and multi-token prediction follow the schedules above
        4. YaRN updates to RoPE when the long window changes
        5. lm_head and embed are one until 2/3 of training, then split @classiclarryd

    What changes with every step is computed ahead of the run by advance_schedule and get_numbers.
    """
    def __init__(self, model: GPT, args: "Hyperparameters", replay: bool = True):
        self.model = model
        self.args = args
        # D14: torch.compile's counterpart. Each distinct program is traced once and replayed from then on
        self.replay = Replay(self.program, self.tensors, self.constants, enabled=replay)
        adam_betas = {
            'lm_head': [0.5, 0.95],
            'smear_gate': [0.9, 0.99],
            'attn_gate_bank': [0.9, 0.99],
            've_gate_bank': [0.9, 0.99],
            'skip_gate': [0.9, 0.99],
            'x0_lambdas': [0.65, 0.95],
            'scalars': [0.9, 0.99],
            'embed': [0.5, 0.95],
            'value_embed': [0.75, 0.95]
        }
        adam_labels = list(adam_betas.keys())
        adam_beta_values = list(adam_betas.values())
        muon_labels = ['attn', 'mlp']
        adam_params = [p for p in model.parameters() if getattr(p, 'label', None) in adam_labels]
        muon_params = [p for p in model.parameters() if getattr(p, 'label', None) in muon_labels]
        assert set(getattr(p, 'label', None) for p in model.parameters()) == set(adam_labels + muon_labels), "All params must have label"

        self.adam_opt = DistAdam(adam_params, adam_labels, adam_beta_values, lr=0.008, eps=1e-10, weight_decay=0.005)
        self.muon_opt = NorMuon(muon_params, lr=0.023, momentum=0.95, beta2=0.95, weight_decay=1.2)
        self.optimizers = [self.adam_opt, self.muon_opt]
        self.adam_labels = adam_labels
        self.initial_lr = {opt: opt.defaults["lr"] for opt in self.optimizers}
        self.reset()

    def advance_schedule(self, step: int, train: bool = True):
        """Host only: the graph of this step (or of the validation before it), YaRN where the window changes, Adam's count of its steps."""
        _, new_ws_long = get_ws(step, self.args)
        if new_ws_long != self.ws_long:
            self.model.yarn.apply(self.ws_long, new_ws_long)
            self.model.yarn_paired_head.apply(self.ws_long, new_ws_long)
        self.ws_long = new_ws_long
        self.step = step
        self.graph = get_graph(step, self.args, train)
        self.model.split_embed = self.graph.split_embed
        if self.model.training != train:
            self.model.train(train)
        if self.graph.adam:
            self.adam_opt.advance(self.graph.split_embed)

    def get_numbers(self) -> Tensor:
        """Host only: StepNumbers of this step, packed."""
        lr = get_lr(self.step, self.args)
        for group in self.adam_opt.param_groups:
            group["lr"] = self.initial_lr[self.adam_opt] * lr
        return StepNumbers(
            mtp_weights = (get_mtp_weights(self.step, self.args) + [0.0, 0.0])[:3],
            yarn = self.model.yarn.numbers(),
            yarn_paired_head = self.model.yarn_paired_head.numbers(),
            muon_lr = self.initial_lr[self.muon_opt] * lr,
            muon_momentum = get_muon_momentum(self.step, self.args),
            adam = self.adam_opt.get_numbers()
        ).pack()

    def precompute(self, steps) -> list[Tensor]:
        """
        Host only: the numbers of these training steps, the next ones. The schedule stays where it is, and the optimizers' settings have to:
        a step raises ValueError where they are no longer what its numbers were made with.
        """
        schedule, counts = self.get_schedule(), [state["step"] for state in self.adam_opt.state.values()]
        numbers = []
        for step in steps:
            self.advance_schedule(step)
            numbers.append(self.get_numbers())
        self.set_schedule(schedule)
        for state, count in zip(self.adam_opt.state.values(), counts, strict=True):
            state["step"] = count
        self.precomputed = self.settings()
        return numbers

    def unpack(self, numbers: Tensor) -> "StepNumbers":
        return StepNumbers.unpack(numbers, len(self.model.yarn.numbers()), self.adam_labels)

    def get_forward_args(self, numbers: "StepNumbers"):
        return ForwardScheduleConfig(
            mtp_weights = numbers.mtp_weights[:self.graph.n_mtp],
            ws_short = self.graph.ws_short,
            ws_long = self.graph.ws_long,
            yarn = numbers.yarn,
            yarn_paired_head = numbers.yarn_paired_head,
            keep = self.what_to_keep() if self.graph.train else None
        )

    def what_to_keep(self) -> Kept:
        state = sum(x.nbytes // (device_count() if is_split(x) else 1) for x in self.tensors())
        rows = ROWS // device_count() // turns()
        return what_to_keep(rows * self.graph.tokens, self.model.num_layers, *reversed(self.model.lm_head.weight.shape), state)

    def step_optimizers(self, gradients: Gradients, numbers: "StepNumbers"):
        if self.graph.adam:
            self.adam_opt.step(gradients, numbers.adam)
        elif self.graph.part == "whole":
            self.adam_opt.keep(gradients)
        self.muon_opt.step(gradients, numbers.muon_lr, numbers.muon_momentum)
        if self.graph.copy_embed:
            self.adam_opt.copy_lm_to_embed()

    def forward(self, batch: Tensor, numbers: Tensor, weights: dict[str, Tensor], targets: bool = True) -> Tensor:
        """
        The model on each device's own rows of batch [8, 3, T]: upstream's ranks. weights: on each device, by name. Returns what is on each
        device: the losses of its rows or, without targets, what lm_head reads.
        """
        # D18: what enters is one device's own, and XLA splits and moves nothing until it leaves
        buffers = {name: enter(b) for name, b in self.model.named_buffers()}
        input_seq, target_seq, documents = enter(batch, "data").unbind(1)
        cfg = self.get_forward_args(self.unpack(enter(numbers)))
        return torch.func.functional_call(self.model, weights | buffers, (input_seq, target_seq if targets else None, documents, cfg))

    def backward(self, batch: Tensor, numbers: Tensor) -> tuple[Tensor, Gradients]:
        """
        Forward and backward pass on batch [8, 3, T], or the rows whose turn it is. Returns what is on each device: the losses of its rows,
        and its gradients, in an odd step on top of those that it keeps from the even one, in turns of those of the rows before.
        """
        weights = {name: enter(p.detach()).requires_grad_() for name, p in self.model.named_parameters()}
        rows = self.graph.part == "rows"
        gradients = Gradients(self.muon_opt.addresses() | self.adam_opt.addresses(on_top=rows or self.graph.adam, in_place=rows))
        with gradients.receive({p: weights[name] for name, p in self.model.named_parameters()}):
            losses = self.forward(batch, numbers, weights)
            (losses.sum() / ROWS).backward()  # the mean over ranks that upstream's reduce_scatter takes
        return losses.detach(), gradients

    def training_step(self, batch: Tensor, numbers: Tensor) -> Tensor:
        """One whole step on batch [8, 3, T]. Returns the loss of each row, [8]."""
        begin_program()
        losses, gradients = self.backward(batch, numbers)
        self.step_optimizers(gradients, self.unpack(numbers))
        return shard(leave(losses).flatten())

    def rows_step(self, batch: Tensor, numbers: Tensor) -> Tensor:
        """D24: on fewer than 8 devices, the turn of one row on each, batch [devices, 3, T]. Returns their losses, [devices]."""
        losses, gradients = self.backward(batch, numbers)
        for opt in self.optimizers:
            opt.keep(gradients)
        return shard(leave(losses).flatten())

    @torch.no_grad()
    def update_step(self, numbers: Tensor) -> Tensor:
        """After the turns of all 8 rows: the optimizers' step on their gradients. Returns the numbers."""
        begin_program()
        gradients = Gradients(self.muon_opt.accumulated() | self.adam_opt.accumulated(self.graph.split_embed))
        self.step_optimizers(gradients, self.unpack(numbers))
        self.muon_opt.clear()
        if self.graph.adam:
            self.adam_opt.clear(self.graph.split_embed)
        return shard(numbers.clone())

    def program(self, *inputs: Tensor) -> Tensor:
        """What self.graph says, traced."""
        if not self.graph.train:
            return self.validation_step(*inputs)
        return dict(whole=self.training_step, rows=self.rows_step, update=self.update_step)[self.graph.part](*inputs)

    def run(self, batch: list[Tensor], numbers: Tensor) -> list[Tensor]:
        """
        The training step or slice of validation that advance_schedule has come to, replayed. batch: [devices, 3, T] for each turn
        (to_devices). Returns the losses of the rows, [devices] for each turn.
        """
        step, losses = self.graph, []
        for graph, times in step.programs(turns()):
            results = [self.run_graph(graph, batch[turn], numbers) for turn in range(times)]
            losses += results if graph.part != "update" else []
        self.graph = step
        return losses

    def run_graph(self, graph: Graph, batch: Tensor, numbers: Tensor) -> Tensor:
        self.graph = graph
        result = self.replay(graph, *(() if graph.part == "update" else (batch,)), numbers)
        xm.mark_step()  # while the result is held, because a traced program computes what someone holds
        return result

    @torch.no_grad()
    def validation_step(self, batch: Tensor, numbers: Tensor) -> Tensor:
        """The mean loss of each row of batch [8, 3, T], [8]."""
        losses = self.forward(batch, numbers, {name: enter(p) for name, p in self.model.named_parameters()})
        return shard(leave(losses).flatten())

    def constants(self) -> tuple:
        """What a step takes from Python: part of a recording's key, so that a change of any of it is recorded anew."""
        settings = self.settings()
        if self.precomputed not in (None, settings):
            before, now = next((a, b) for a, b in itertools.zip_longest(self.precomputed, settings) if a != b)
            raise ValueError(f"an optimizer's settings are {now}, but the numbers of the steps to come were made with {before}: set them "
                             "before training, or call precompute() again and send what it returns")
        return tuple(map(type, self._modules())), tuple(self.model.paired_head_layers), self.model.block_size, settings

    def settings(self) -> tuple:
        """Of the optimizers: initial learning rates, then weight_decay, beta2, betas and eps of each group that has them."""
        return (*self.initial_lr.values(), *((group["weight_decay"], group.get("beta2"), *group.get("betas", ()), group.get("eps"))
                                             for opt in self.optimizers for group in opt.param_groups))

    def tensors(self) -> list[Tensor]:
        """All tensors on the devices that a step reads or updates: weights and the optimizers' state."""
        return [*(x for m in self._modules() for x in (*m._parameters.values(), *m._buffers.values()) if x is not None),
                *(x for group in self.muon_opt.param_groups for x in group.values() if isinstance(x, Tensor) and x.ndim),
                *(x for state in self.adam_opt.state.values() for x in state.values() if isinstance(x, Tensor))]

    def _modules(self) -> list[nn.Module]:
        """Those of the model, for every step: modules() would make up their names each time."""
        modules = [self.model]
        for m in modules:
            modules += filter(None, m._modules.values())
        return list(dict.fromkeys(modules))

    def _state(self) -> list[dict]:
        names = {p: name for name, p in self.model.named_parameters()}
        return [{names[p]: state for p, state in self.adam_opt.state.items()},
                {group["params"][0].label: {k: group[k] for k in ("momentum_buffer", "second_momentum_buffer", "master")}
                 for group in self.muon_opt.param_groups}]

    def get_state(self, lazy: bool = False) -> list[dict]:
        """
        The optimizers' state on the CPU, as dicts of whole tensors: DistAdam's by parameter name, NorMuon's by label. For the end of an
        odd step: without the gradients that an even step leaves to the odd one, eight times as large as the model's. lazy: functions
        that return the tensors, which leaves the joining of their parts to another thread.
        """
        # one by one: the next copy takes the memory that the last one has just given back, and new memory is dear
        copy = lambda x: to_host(x, lazy) if isinstance(x, Tensor) else x
        return [{name: {k: copy(x) for k, x in state.items() if k != "grad"} for name, state in states.items()} for states in self._state()]

    def get_schedule(self) -> dict:
        """What advance_schedule has made of YaRN so far."""
        return dict(ws_long=self.ws_long) | {name: dict(angular_freq=yarn.angular_freq.clone(), attn_scale=yarn.attn_scale)
                                             for name, yarn in self._yarns().items()}

    def set_schedule(self, schedule: dict):
        """Takes get_schedule's values back."""
        self.ws_long = schedule["ws_long"]
        for name, yarn in self._yarns().items():
            yarn.angular_freq, yarn.attn_scale = schedule[name]["angular_freq"].clone(), schedule[name]["attn_scale"]

    def _yarns(self) -> dict[str, Yarn]:
        return dict(yarn=self.model.yarn, yarn_paired_head=self.model.yarn_paired_head)

    def set_state(self, optimizers: list[dict], schedule: dict):
        """Takes get_state's and get_schedule's values back. ValueError for the first that does not fit; then nothing is changed."""
        pairs = []
        def match(name, mine, value):
            if isinstance(mine, dict):
                if not isinstance(value, dict):
                    raise ValueError(f"{name} is no dict")
                keys = [k for k in mine if k != "grad"]
                for key in [*keys, *value]:
                    if key not in keys or key not in value:
                        raise ValueError(f"{name}: {key} is {'missing' if key in keys else 'not part of it'}")
                    match(f"{name}: {key}", mine[key], value[key])
            elif type(mine) is not type(value):
                raise ValueError(f"{name} is a {type(value).__name__}, not a {type(mine).__name__}")
            elif isinstance(mine, Tensor):
                if (mine.shape, mine.dtype) != (value.shape, value.dtype):
                    raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}, this run wants {tuple(mine.shape)} {mine.dtype}")
                pairs.append((mine, value))
        states = self._state()
        if len(optimizers) != len(states):
            raise ValueError(f"optimizers: {len(optimizers)} instead of {len(states)}")
        for name, mine, value in zip(("DistAdam", "NorMuon"), states, optimizers, strict=True):
            match(name, mine, value)
        match("schedule", self.get_schedule(), schedule)
        for mine, value in pairs:
            if mine.device.type == "xla":
                assign(mine, value)
        for name, state in states[0].items():
            state["step"] = optimizers[0][name]["step"]
        self.set_schedule(schedule)

    def reset(self):
        """Back to step 0, with the model's weights as they are."""
        self.precomputed = None
        for opt in self.optimizers:
            opt.reset()
        self.model.split_embed = False
        _, self.ws_long = get_ws(0, self.args)
        self.model.yarn.reset()
        self.model.yarn_paired_head.reset()

# -----------------------------------------------------------------------------
# int main

@dataclass
class Hyperparameters:
    # data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin" # shards in llm.c's format, read in the order of their names
    val_files: str = "data/fineweb10B/fineweb_val_*.bin" # the same, for validation
    val_tokens: int = 10485760 # validation tokens; another number gives losses that compare with nobody's
    # batch sizes
    train_bs_schedule: tuple = (8 * 2048 * 8, 16 * 2048 * 8, 24 * 2048 * 8)
    train_bs_extension: int = 24 * 2048 * 8
    train_max_seq_len: int = 128 * 16
    val_batch_size: int = 4 * 64 * 1024 * 8
    # optimization
    num_scheduled_iterations: int = 1735  # the schedules are fractions of this
    num_extension_iterations: int = 40  # steps after that, at the last learning rate and windows
    cooldown_frac: float = 0.50  # part of the schedule in which the learning rate falls to 0.1
    split_embed_frac: float = 2/3  # part of the schedule before embed and lm_head part
    # evaluation and logging
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    train_loss_every: int = 25 # steps between reads of the training loss (upstream never reads it); 0: never
    val_loss_every: int = 250  # steps between validations; 0: only at the end
    save_checkpoint: bool = False # the last state in upstream's form, logs/RUN_ID/state_stepN.pt
    save_every: int = 0 # steps between checkpoints to resume from, logs/RUN_ID/checkpoint_stepN.pt; 0: none
    keep_checkpoints: int = 3 # how many of those are kept
    # attention windows, in blocks
    block_size: int = 128
    ws_schedule: tuple = (3, 7, 11)
    ws_final: int = 13 # in the extension @classiclarryd
    ws_validate_post_yarn_ext: int = 20 # long windows of the last validation, with no further YaRN
    # the model: upstream writes these into its call of GPT
    vocab_size: int = 50257
    bos_id: int = BOS_ID
    num_layers: int = 11
    num_heads: int = 6
    head_dim: int = 128
    model_dim: int = 768
    dtype: str = "bfloat16"
    seed: int = 0

    @property
    def num_iterations(self) -> int:
        return self.num_scheduled_iterations + self.num_extension_iterations

# Where a run's files are, and how it is watched. All other fields are about its result; the data are told apart by what is in them
WATCHING = ("run_id", "train_files", "val_files", "train_loss_every", "save_checkpoint", "save_every", "keep_checkpoints")

def hyperparameters(args: Hyperparameters) -> dict:
    """The fields that the numbers of a run depend on."""
    return {f.name: getattr(args, f.name) for f in fields(args) if f.name not in WATCHING}

# The smallest and the largest value of a number, or of each number in a tuple; a string's pattern, and in words what it stands for
INT32 = 2**31 - 1
STEPS = 10**6  # the numbers of all steps are made before the first
RANGES = dict(
    val_tokens=(1, INT32), train_bs_schedule=(128, INT32), train_bs_extension=(128, INT32), train_max_seq_len=(2, INT32),
    val_batch_size=(128, INT32), num_scheduled_iterations=(1, STEPS), num_extension_iterations=(0, STEPS), cooldown_frac=(1e-6, 1),
    split_embed_frac=(0, 1), train_loss_every=(0, INT32), val_loss_every=(0, INT32), save_every=(0, INT32), keep_checkpoints=(1, INT32),
    block_size=(1, 2**14), ws_schedule=(2, 2**16), ws_final=(2, 2**16), ws_validate_post_yarn_ext=(2, 2**16),  # short windows are half
    vocab_size=(2, 2**16), bos_id=(0, 2**16 - 1), num_layers=(11, 11), num_heads=(2, 2**10), head_dim=(4, 2**10), model_dim=(12, 2**20),
    seed=(0, 2**63 - 1), dtype=("bfloat16|float32", "bfloat16 or float32"), train_files=(".+", "a path, or a pattern of several"),
    val_files=(".+", "a path, or a pattern of several"),
    run_id=(r"(?!\.{1,2}$)[^/\x00-\x1f\x7f]{1,150}", "what a file may be named, without a slash, of 1 to 150 characters"),
)

def check_args(args: Hyperparameters):
    """ValueError that names the first field, its value and its range, before anything is compiled."""
    def refuse(name: str, range_: str):
        raise ValueError(f"{name} is {getattr(args, name)!r}: {range_}")
    def number(x, kind) -> bool:
        return isinstance(x, (int, float) if kind is float else int) and not isinstance(x, bool)
    for f in fields(args):
        value, (low, high) = getattr(args, f.name), RANGES.get(f.name, (None, None))
        if f.type is bool:
            if not isinstance(value, bool):
                refuse(f.name, "it must be True or False")
        elif f.type is str:
            if not isinstance(value, str) or not re.fullmatch(low, value):
                refuse(f.name, f"it must be {high}")
        else:
            kind = "a number" if f.type is float else "a whole number" if f.type is int else "one or more whole numbers"
            members = value if f.type is tuple and isinstance(value, tuple) else (value,)
            if not members or not all(number(x, f.type) and low <= x <= high for x in members):
                refuse(f.name, f"it must be {kind} from {low} to {high}" if low < high else
                       f"it must be {low}, which the record's wiring (windows, skips, value embeddings) is for")
    for name in ("train_bs_schedule", "train_bs_extension", "val_batch_size"):
        value = getattr(args, name)
        if any(bs % (ROWS * 16) for bs in (value if isinstance(value, tuple) else (value,))):
            refuse(name, "batch sizes must be multiples of 8 rows x 16 tokens = 128")
    if args.val_tokens % args.val_batch_size:
        refuse("val_tokens", f"it must be a multiple of val_batch_size {args.val_batch_size}")
    if args.bos_id >= args.vocab_size:
        refuse("bos_id", f"it must be a token of the vocabulary, less than vocab_size {args.vocab_size}")
    if args.num_heads * args.head_dim != args.model_dim or args.num_heads % 2 or args.head_dim % 4:
        raise ValueError(f"num_heads {args.num_heads} x head_dim {args.head_dim} must be model_dim {args.model_dim}, "
                         "with an even number of heads and head_dim a multiple of 4")
    windows = (*args.ws_schedule, args.ws_final)
    if list(windows) != sorted(windows):
        raise ValueError(f"ws_schedule is {args.ws_schedule} and ws_final {args.ws_final}: long windows may only grow, as YaRN stretches "
                         "the rotary frequencies from each to the next")

def read_data(args: Hyperparameters) -> dict[str, list[tuple[str, int, int]]]:
    """
    Reads ahead what a run reads, before anything is compiled: ValueError where a shard is damaged, has tokens beyond the vocabulary or no
    document start, or where they do not suffice. Returns the name, tokens and checksum of each shard that the run needs, by field.
    """
    train, val = find_shards(args.train_files), find_shards(args.val_files)
    if both := {file.resolve() for file in train} & {file.resolve() for file in val}:
        raise ValueError(f"{min(both)} is among both train_files {args.train_files} and val_files {args.val_files}: the validation loss "
                         "would be that of training data")
    data = dict(train_files=[], val_files=[])

    steps, documents, usable = 0, 0, 0  # steps that the shards so far suffice for; tokens of documents cut to train_max_seq_len
    for file in train:
        if steps == args.num_iterations:
            break
        tokens = _load_data_shard(file, args.vocab_size)
        finder = BOSFinder(tokens, bos_id=args.bos_id)
        if not len(finder.bos_idx):
            raise no_document_start(file, args.bos_id)
        data["train_files"].append((file.name, len(tokens), zlib.crc32(tokens)))
        documents += len(finder.bos_idx)
        usable += int(np.minimum(np.diff(finder.bos_idx, append=len(tokens)), args.train_max_seq_len).sum())
        with contextlib.suppress(StopIteration):
            while steps < args.num_iterations:
                finder.next_batch(get_bs(steps, args) // ROWS, args.train_max_seq_len)
                steps += 1
    if steps < args.num_iterations:
        held, needed = sum(n for _, n, _ in data["train_files"]), sum(get_bs(step, args) for step in range(args.num_iterations))
        raise ValueError(
            f"train_files {args.train_files}: {held:,} tokens in {documents:,} documents and {len(train)} shard{'s' * (len(train) > 1)} "
            f"last for {steps} of {args.num_iterations} steps, which take {needed:,} tokens and more at the ends of rows and shards. Of a "
            f"document, train_max_seq_len {args.train_max_seq_len} tokens are read, so {usable:,} in all: {more(train)}, "
            + ("cut long documents, " if 2 * usable < held else "") + "or choose fewer steps or smaller batches")

    batches = total = args.val_tokens // args.val_batch_size
    for file in val:
        if not batches:
            break
        tokens = _load_data_shard(file, args.vocab_size)
        data["val_files"].append((file.name, len(tokens), zlib.crc32(tokens)))
        n = min(batches, max(0, len(tokens) - 2) // args.val_batch_size)
        if not (tokens[:n * args.val_batch_size or None] == args.bos_id).any():
            raise no_document_start(file, args.bos_id)
        batches -= n
    if batches:
        held, needed = sum(n for _, n, _ in data["val_files"]), args.val_tokens + 2
        raise ValueError(
            f"val_files {args.val_files}: {held:,} tokens in {len(val)} shard{'s' * (len(val) > 1)} hold {total - batches} of {total} "
            f"batches; validation needs {needed:,} tokens, whole batches of {args.val_batch_size:,} from each shard: {more(val)}, or "
            "choose a smaller val_tokens or val_batch_size")
    return data

def build(args: Hyperparameters, replay: bool = True) -> TrainingManager:
    """The model of args and its optimizers, on the devices."""
    model = GPT(
        vocab_size=args.vocab_size,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        head_dim=args.head_dim,
        model_dim=args.model_dim,
        block_size=args.block_size,
    )
    return TrainingManager(model.to_devices(getattr(torch, args.dtype)), args, replay)

# The rehearsal: all that the record does, small enough for 8 virtual devices on a CPU.
presets = {
    "record": Hyperparameters,
    "rehearsal": lambda **kwargs: Hyperparameters(**{**dict(
        train_files="data/demo/demo_train_*.bin", val_files="data/demo/demo_val_*.bin", val_tokens=8 * 2048,
        train_bs_schedule=(8 * 128, 8 * 256, 8 * 384), train_bs_extension=8 * 384, train_max_seq_len=128, val_batch_size=8 * 1024,
        num_scheduled_iterations=87, num_extension_iterations=9, val_loss_every=48, block_size=16,
        num_heads=4, head_dim=16, model_dim=64), **kwargs}),
}

# Validation losses of the CUDA record's own log, by step
RECORD_VAL_LOSS = {0: 10.8309, 250: 4.6062, 500: 4.2740, 750: 4.0061, 1000: 3.7358, 1250: 3.5104, 1500: 3.3792, 1750: 3.2870, 1775: 3.2807}

def is_record(args: Hyperparameters) -> bool:
    """Whether losses of a run with args compare with RECORD_VAL_LOSS."""
    return hyperparameters(args) | dict(seed=0, val_loss_every=250) == hyperparameters(Hyperparameters())

# Flags of libtpu, for the run and for compilation ahead of time (tools/aot.py), beyond those that torch_xla sets: none saves a
# millisecond now. The record's README has those tried, with what each did.
LIBTPU_INIT_ARGS = ""

def first_and_number(s: str) -> tuple[int, int]:
    first, number = map(int, s.split(":"))
    if min(first, number) < 1:
        raise ValueError
    return first, number
first_and_number.__name__ = "STEP:STEPS"  # for argparse's message

def parse_args(argv: list[str]) -> tuple[Hyperparameters, argparse.Namespace]:
    """The options that main() names and --FIELD VALUE for any field of Hyperparameters. A field that does not exist is refused."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], add_help=True, allow_abbrev=False)
    parser.add_argument("--preset", choices=presets, default="record")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of the machine for an hour: the log ends with what the run cost")
    parser.add_argument("--no_replay", action="store_true", help="trace every step instead of replaying it: slower, for debugging")
    parser.add_argument("--resume", nargs="?", const="latest", metavar="latest|PATH",
                        help="go on from a checkpoint; an error where there is none, while --save_every starts afresh then")
    parser.add_argument("--init_from", metavar="FILE",
                        help="start with these weights: a state_step*.pt, ours or upstream's, or safetensors")
    parser.add_argument("--wandb", nargs="?", const="modded-nanogpt-xla", metavar="PROJECT",
                        help="losses and speed to Weights & Biases (requirements-wandb.txt); without a login, to a folder under logs/wandb")
    parser.add_argument("--profile", type=first_and_number, metavar="STEP:STEPS",
                        help="trace STEPS steps from STEP on, counted as in the log, to logs/RUN_ID/profile for xprof; takes time")
    defaults = Hyperparameters(run_id="")
    for f in fields(Hyperparameters):
        default = getattr(defaults, f.name)
        def kind(s, default=default):
            if isinstance(default, tuple):
                return tuple(int(x) for x in s.strip("()").split(",") if x.strip())
            return {"true": True, "false": False}[s.lower()] if isinstance(default, bool) else type(default)(s)
        kind.__name__ = "comma-separated integers" if isinstance(default, tuple) else type(default).__name__
        parser.add_argument(f"--{f.name}", type=kind, default=argparse.SUPPRESS, metavar="VALUE", help=f"record: {default}")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        parser.error(f"{unknown[0]} is not an option" + (f": did you mean {near[0]}?" if near else ", see --help"))
    if known.price is not None and not 0 <= known.price < math.inf:
        parser.error(f"--price {known.price:g} is not a number of dollars")
    values = {f.name: getattr(known, f.name) for f in fields(Hyperparameters) if hasattr(known, f.name)}
    args = presets[known.preset](**values)
    if (args.save_every or known.resume) and "run_id" not in values:
        parser.error("--save_every and --resume need --run_id NAME: a restart finds the log and the checkpoints by it")
    data_path = os.environ.get("DATA_PATH", ".")
    args.train_files = os.path.join(data_path, args.train_files)
    args.val_files = os.path.join(data_path, args.val_files)
    return args, known

def check_resumable(path: Path, saved: dict, args: Hyperparameters, data: dict[str, list]):
    """ValueError that names the first difference between the run that was saved and this one."""
    way_out = "resume with what it was, or start afresh under another --run_id"
    now = hyperparameters(args)
    for name in (*now, *saved["hyperparameters"]):
        then = saved["hyperparameters"].get(name, "unknown")
        if then != now.get(name, "unknown"):
            raise ValueError(f"{path}: {name} was {then}, now it is {now.get(name, 'unknown')}: {way_out}")
    for name, shards in data.items():
        for i, then in enumerate(saved["data"][name]):  # shards that were added since do no harm
            if i >= len(shards) or shards[i] != then:
                file, found = (shards[i][0], shards[i][1:]) if i < len(shards) else ("no file", "")
                raise ValueError(f"{path}: shard {i + 1} of {name} was {then[0]} with (tokens, checksum) {then[1:]}, now it is {file} "
                                 f"{found}: {way_out}")

def graphs_compiled() -> int:
    data = met.metric_data("CompileTime")
    return data[0] if data else 0

def operations_on_host() -> list[str]:
    """Operations that torch_xla does not know and ran on the CPU."""
    return [f"{name} x {met.counter_value(name)}" for name in met.counter_names()
            if name.startswith("aten::") and name != "aten::_local_scalar_dense"]  # which is how a 0-D tensor is read, x.item()

def unigram_entropy(args: Hyperparameters) -> float:
    """In nats, of the validation tokens: what a model reaches that knows the frequency of each token and nothing else."""
    counts, files = np.zeros(args.vocab_size, dtype=np.int64), iter(find_shards(args.val_files))
    while (left := args.val_tokens - counts.sum()) > 0:
        counts += np.bincount(_load_data_shard(next(files), args.vocab_size)[:left], minlength=args.vocab_size)
    p = counts / counts.sum()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())

class Log:
    """logs/RUN_ID.txt, what of it goes to the console, above a progress bar where that is a terminal, and wandb where it is asked for."""
    def __init__(self, args: Hyperparameters):
        os.makedirs("logs", exist_ok=True)
        self.file = f"logs/{args.run_id}.txt"
        self.bar = tqdm(total=args.num_iterations, unit="step", disable=not sys.stdout.isatty(), dynamic_ncols=True)
        self.wandb = None

    def print0(self, s: str, console: bool = False):
        try:
            with open(self.file, "a") as f:
                print(s, file=f)
        except OSError as e:
            raise OSError(e.errno, e.strerror, self.file) from None
        if console:
            self._show(lambda: self.bar.write(s) if not self.bar.disable else print(s, flush=True))

    def update(self, steps: int = 1):
        self._show(lambda: self.bar.update(steps))

    def _show(self, call):
        try:
            call()
        except OSError:  # the terminal is gone, or the program that read the output
            self.bar.disable = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            os.kill(os.getpid(), signal.SIGHUP)

class Meter:
    """
    The training loss and the speed. Losses stay on the devices until they are read, because that waits for their step. check_finite
    takes a loss, and what it is the loss of, and raises FloatingPointError.
    """
    def __init__(self, args: Hyperparameters, start: int, training_time_ms: float, losses: list[Tensor] | None, check_finite):
        self.args, self.check_finite = args, check_finite
        self.work, self.peak = work_until(args), peak_flops()
        self.unread = [] if losses is None else [(start - 1, losses)]  # (step, loss of each row) since the last reading, which is the first
        self.timed = start, training_time_ms  # steps that had finished when a loss was last read, and the training time then

    def read(self) -> float:
        """The loss of the last step, per token, with the weights of multi-token prediction."""
        read = lambda step, losses: to_rows(losses).mean().item() / (get_bs(step, self.args) // ROWS)
        loss = read(*self.unread[-1]) if self.unread else 0.0
        if not math.isfinite(loss):
            for step, losses in self.unread:  # the first such step is the one to look at
                self.check_finite(read(step, losses), f"step {step + 1}")
        del self.unread[:-1]
        return loss

    def progress(self, step: int, clock) -> dict[str, float]:
        """The loss of the last step, the speed since this was last asked, seconds that are left. clock() is the training time in ms."""
        loss, (first, before), (_, flops) = self.read(), self.timed, self.work
        if step <= first:
            return dict(train_loss=loss)
        self.timed = step, clock()
        ms = self.timed[1] - before
        eta = ms / 1000 * (flops[-1] - flops[step]) / (flops[step] - flops[first])
        return dict(train_loss=loss) | rates(self.work, first, step, ms, self.peak) | dict(eta=eta)

def train_batches(args: Hyperparameters, steps, numbers: list[Tensor], start: tuple[int, int] = (0, 0)):
    """The batches of these steps, from a place in the data on, each with where the next one starts and with its step's numbers."""
    loader = None
    for step, n in zip(steps, numbers, strict=True):
        send_args = (get_bs(step, args), args.train_max_seq_len)
        if loader is None:
            loader = distributed_data_generator(args.train_files, *send_args, bos_id=args.bos_id, vocab_size=args.vocab_size, start=start)
            yield *next(loader), n
        else:
            yield *loader.send(send_args), n

def val_batches(args: Hyperparameters, val_steps: int, numbers: Tensor):
    loader = distributed_data_generator(args.val_files, args.val_batch_size, -1, align_to_bos=False, bos_id=args.bos_id,
                                        vocab_size=args.vocab_size)
    for batch in itertools.islice(loader, val_steps):
        yield *batch, numbers

def warm_up(args: Hyperparameters, training_manager: TrainingManager, start: int, print0, preempted):
    """Runs each distinct graph from start on once, on real data, which compiles it. The state is then another. Ends if preempted()."""
    graphs = {graph: steps for graph, steps in distinct_graphs(args, turns()).items() if steps[-1] >= start}
    print0(f"Compiling {len(graphs)} graphs and warming up", console=True)
    first_steps = [steps[0] for graph, steps in graphs.items() if graph.train]
    train_loader = prefetch(train_batches(args, first_steps, training_manager.precompute(first_steps)))
    training_manager.advance_schedule(start, train=False)
    val_loader = prefetch(val_batches(args, 1, training_manager.get_numbers()))
    val_batch = next(val_loader)
    for graph, steps in graphs.items():
        if preempted():
            break
        t0 = time.perf_counter()
        training_manager.advance_schedule(steps[0], train=graph.train)
        batch, numbers, _ = next(train_loader) if graph.train else val_batch
        training_manager.run_graph(graph, batch[0], numbers)
        xm.wait_device_ops()
        print0(f"warmup {graph.name}: {len(steps)} steps, {time.perf_counter() - t0:.1f}s", console=True)
    train_loader.close()
    val_loader.close()

def validate(args: Hyperparameters, training_manager: TrainingManager) -> float:
    val_steps, val_losses = args.val_tokens // args.val_batch_size, []
    for batch, numbers, _ in prefetch(val_batches(args, val_steps, training_manager.get_numbers())):
        val_losses += training_manager.run(batch, numbers)
    return to_rows(val_losses).mean().item()

def get_checkpoint(args: Hyperparameters, training_manager: TrainingManager, step: int, code: str, **rest) -> dict:
    """What it takes to go on bit for bit (checkpoint.KEYS), upstream's four entries first; rest is what the training loop alone knows."""
    return dict(step=step, code=code, model=training_manager.model.state_dict(), optimizers=training_manager.get_state(lazy=True),
                version=checkpoint.VERSION, run_id=args.run_id, hyperparameters=hyperparameters(args),
                schedule=training_manager.get_schedule(), rng=torch.get_rng_state(), time=time.time(), **rest)

def train(args: Hyperparameters, replay: bool = True, code: str = "", checkpoints: Checkpoints | None = None, resume: str | None = None,
          init_from: str | None = None, price: float | None = None, profile: tuple[int, int] | None = None,
          wandb: str | None = None) -> float:
    """
    The whole run, with args that check_args lets pass: set up, warm up, train, validate. Returns the last validation loss. With
    checkpoints it goes on from the one that resume names, or from the newest; SystemExit once it has saved after a signal.
    price: dollars an hour. profile: first step and number of steps to trace. wandb: the project that gets its figures.
    """
    began = time.perf_counter()
    if profile and sum(profile) - 1 > args.num_iterations:
        raise ValueError(f"--profile {profile[0]}:{profile[1]} goes beyond the run's {args.num_iterations} steps")
    if wandb:
        get_client()
    data = read_data(args)
    if checkpoints and resume in (None, "latest") and (result := checkpoints.finished()):
        check_resumable(checkpoints.folder, result, args, data)
        print(f"{checkpoints.folder}: this run is finished: step {result['step']}, val_loss:{result['val_loss']:.4f} "
              f"train_time:{result['training_time_ms']:.0f}ms. Another --run_id starts afresh; --resume PATH repeats what follows a "
              "checkpoint")
        return result["val_loss"]

    # begin logging
    run_id = args.run_id
    log = Log(args)
    logfile, bar, print0 = log.file, log.bar, log.print0
    saved, start = None, 0
    if checkpoints:
        checkpoints.say = lambda s: print0(s, console=True)
        path, saved = checkpoints.find(resume)
    if saved:
        check_resumable(path, saved, args, data)
        start = saved["step"]
        log.update(start)
    weights = checkpoint.load_weights(init_from)["model"] if init_from and not saved else None
    print0(logfile, console=True)

    # begin by printing the code
    if not saved or saved["code"] != code:
        print0(code)
    print0("="*100)
    entropy = unigram_entropy(args)

    torch.manual_seed(args.seed)
    if xr.device_type() == "TPU":
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {LIBTPU_INIT_ARGS}".strip()
        xr.initialize_cache(os.path.expanduser("~/.cache/modded-nanogpt-xla"))
    # on a CPU most of a rehearsal is compilation: LLVM's level 1 takes three quarters of the time, and steps run as fast
    setup_devices("--xla_backend_optimization_level=1")

    print0(f"Running Python {sys.version}")
    print0(f"Running PyTorch {torch.__version__} with torch_xla {torch_xla.__version__}")
    print0(f"Running on {xr.global_runtime_device_count()} {xr.device_type()} devices: {xr.global_runtime_device_attributes()}")
    versions = dict(python=sys.version.split()[0], torch=str(torch.__version__), torch_xla=torch_xla.__version__,
                    device=xr.device_type(), devices=xr.global_runtime_device_count())
    print0(f"{args}")
    print0(f"data: {data}")
    print0("="*100)
    print0(f"unigram entropy: {entropy:.4f} nats", console=True)
    if wandb:
        goes_on = saved and saved["run_id"] == run_id
        log.wandb = WandbRun(wandb, run_id, asdict(args) | versions, lambda s: print0(s, console=True), saved["wandb"] if goes_on else None)
    wandb_id = log.wandb.id if log.wandb else saved and saved["wandb"]

    training_manager = build(args, replay)
    model = training_manager.model
    if weights:
        try:
            model.load_state_dict(weights)
        except ValueError as e:
            raise ValueError(f"{init_from}: {e}") from None
        training_manager.reset()  # the optimizers' float32 weights are these
        print0(f"starting with the weights of {init_from}", console=True)

    def check_finite(loss, which):
        if not math.isfinite(loss):
            older = checkpoints.files() if checkpoints else []
            raise FloatingPointError(f"the loss of {which} is {loss}: see {logfile}; a smaller learning rate or float32 "
                                     "(--dtype float32) tells whether the data or the numbers are at fault"
                                     + (f"; the last good checkpoint is {older[-1][1]}" if older else ""))
    def restore():
        model.load_state_dict(initial_state)
        training_manager.reset()
        if saved:
            training_manager.set_state(saved["optimizers"], saved["schedule"])
    def preempted():
        return checkpoints is not None and checkpoints.preempted.is_set()
    def stop(where):
        print0(f"{checkpoints.signal}: stopped {where}; the same command goes on from there", console=True)
        if log.wandb:
            log.wandb.finish(checkpoint.PREEMPTED)
        sys.exit(checkpoint.PREEMPTED)

    ########################################
    #            Warmup kernels            #
    ########################################
    # Run each distinct step once on real data, then put the state back so that nothing is learned off the clock
    initial_state = saved["model"] if saved else model.state_dict()
    if saved:
        try:
            restore()
        except ValueError as e:
            raise ValueError(f"{path}: {e}; take another checkpoint (--resume PATH) or start afresh under another --run_id") from None
    warm_up(args, training_manager, start, print0, preempted)
    if preempted():
        stop(f"in the warm-up of step {start}, with nothing new to save")
    if checkpoints:
        training_manager.get_state(lazy=True)  # from now on there is memory for a copy: the first save takes no longer than others
    print0("Resetting Model", console=True)
    restore()
    initial_state = weights = None
    compiled = graphs_compiled()

    ########################################
    #        Training and validation       #
    ########################################
    position, training_time_ms, losses = (0, 0), 0, None  # where the next batch starts; the losses of the last step
    if saved:
        torch.set_rng_state(saved["rng"])  # the host's: no step draws random numbers on the devices
        position, training_time_ms, losses = tuple(saved["loader"]), saved["training_time_ms"], [saved["losses"]]
        other = {k: v for k, v in saved["versions"].items() if versions[k] != v}
        print0(f"resumed from {path} at step {start}: train_time goes on from {training_time_ms:.0f}ms, without the "
               f"{time.time() - saved['time']:.0f}s since then" + (f"; it was written with {other}" if other else ""), console=True)
    saved = None
    steps = range(start, args.num_iterations)
    train_loader = prefetch(train_batches(args, steps, training_manager.precompute(steps), position))
    meter = Meter(args, start, training_time_ms, losses, check_finite)

    gc.collect()

    # start the clock
    xm.wait_device_ops()
    t0 = time.perf_counter()
    clock = lambda: training_time_ms + 1000 * (time.perf_counter() - t0)
    # begin training
    train_steps, due = args.num_iterations, False
    for step in range(start, train_steps + 1):
        last_step = (step == train_steps)
        # --------------- VALIDATION SECTION -----------------
        if is_val_step(step, args) and not step == start > 0:  # a checkpoint is written after its validation
            # stop the clock
            xm.wait_device_ops()
            training_time_ms += 1000 * (time.perf_counter() - t0)
            meter.read()
            training_manager.advance_schedule(step, train=False)
            val_loss = validate(args, training_manager)
            check_finite(val_loss, f"the validation at step {step}")
            record = RECORD_VAL_LOSS.get(step) if is_record(args) and not init_from else None
            record = "" if record is None else f" record:{record:.4f} ({val_loss - record:+.4f})"
            print0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{training_time_ms:.0f}ms "
                   f"step_avg:{training_time_ms/max(step, 1):.2f}ms{record}", console=True)
            if log.wandb:
                log.wandb.log(step, val_loss=val_loss, train_time_ms=training_time_ms)
            # start the clock again
            xm.wait_device_ops()
            t0 = time.perf_counter()

        if last_step:
            if args.save_checkpoint:
                state = dict(step=step, code=code, model=model.state_dict(), optimizers=training_manager.get_state(),
                             run_id=run_id, hyperparameters=hyperparameters(args), data=data)  # these tell tools whose it is
                os.makedirs(f"logs/{run_id}", exist_ok=True)
                torch.save(state, f"logs/{run_id}/state_step{step:06d}.pt")
            # the last step only has the validation loop, so break to avoid training
            break

        # --------------- CHECKPOINT SECTION -----------------
        # after odd steps only: no gradients wait for the next step then
        stopping = preempted() and step % 2 == 0
        due = due or args.save_every > 0 and step > start and step % args.save_every == 0
        if step > start and step % 2 == 0 and (stopping or due):
            due = False
            meter.read()  # what is not finite is not worth keeping
            state = get_checkpoint(args, training_manager, step, code, data=data, versions=versions, loader=position,
                                   losses=to_rows(losses), wandb=wandb_id)
            checkpoints.save(step, state | dict(training_time_ms=clock()))  # with what the copy took
            del state
        if stopping:
            checkpoints.wait(must=True)
            stop(f"at step {step}")

        # --------------- TRAINING SECTION -----------------
        if profile and step + 1 == profile[0]:
            xp.start_trace(f"logs/{run_id}/profile")
        training_manager.advance_schedule(step)
        batch, numbers, position = next(train_loader)
        losses = training_manager.run(batch, numbers)
        if profile and step + 2 == sum(profile):
            xm.wait_device_ops()
            xp.stop_trace()

        # logging
        train_loss = ""
        if args.train_loss_every > 0 and (step + 1) % args.train_loss_every == 0 and meter.unread:
            # the step before this one has finished, or nearly: reading it leaves the devices busy with this one
            progress = meter.progress(step, clock)
            train_loss = in_log(progress)
            if log.wandb:
                log.wandb.log(step + 1, **progress)
        meter.unread.append((step, losses))
        approx_training_time_ms = clock()
        print0(f"step:{step+1}/{train_steps} train_time:{approx_training_time_ms:.0f}ms "
               f"step_avg:{approx_training_time_ms/(step + 1):.2f}ms{train_loss}", console=bar.disable)
        log.update()

    train_loader.close()
    bar.close()
    print0(f"whole run:{speed(meter.work, 0, train_steps, training_time_ms, meter.peak)}", console=True)
    if price is not None:
        dollars = [price * seconds / 3600 for seconds in (training_time_ms / 1000, time.perf_counter() - began)]
        print0(f"cost at ${price:g} an hour: ${dollars[0]:.2f} for the training time, ${dollars[1]:.2f} with set-up, compilation and "
               "validation", console=True)
    print0(f"graphs compiled after warm-up: {graphs_compiled() - compiled}", console=True)
    print0(f"operations run on the host: {', '.join(operations_on_host()) or 'none'}", console=True)
    try:
        peak = f"{xm.get_memory_info()['peak_bytes_used'] // 1024 // 1024} MiB a chip"
    except (RuntimeError, KeyError):  # not every backend says, and SPMD's virtual device need not
        peak = "not reported by this backend"
    print0(f"peak memory allocated: {peak}", console=True)
    if checkpoints:
        checkpoints.finish(dict(step=step, val_loss=val_loss, training_time_ms=training_time_ms, hyperparameters=hyperparameters(args),
                                data=data))
    if log.wandb:
        log.wandb.finish()
    return val_loss

def main(argv: list[str] | None = None):
    with open(__file__) as f:
        code = f.read()  # first of all: the log must hold what ran, whatever is edited meanwhile
    args, options = parse_args(sys.argv[1:] if argv is None else argv)
    def interrupt(number, _):
        raise KeyboardInterrupt(number)
    try:
        check_args(args)
        saving = args.save_every or options.resume
        with Checkpoints(f"logs/{args.run_id}", args.keep_checkpoints) if saving else checkpoint.handling(interrupt) as checkpoints:
            train(args, not options.no_replay, code, checkpoints, options.resume, options.init_from, options.price, options.profile,
                  options.wandb)
    except (ValueError, EOFError, OSError, FloatingPointError) as e:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"train_gpt_xla.py: {e}")  # one line: what is wrong, with which file or value, and the way out
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT
        with contextlib.suppress(OSError):  # where the terminal is gone
            print(f"\ntrain_gpt_xla.py: {signal.Signals(number).name}: stopped, and nothing of this run is kept: with --save_every N "
                  "--run_id NAME the same command goes on", file=sys.stderr)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # so that the exit status is the signal's

if __name__ == "__main__":
    main()
