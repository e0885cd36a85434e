"""
Record #89 of KellerJordan/modded-nanogpt (train_gpt.py at f411b3d3: 2026-07-17, 1.23 minutes on 8xH100) for TPUs.
Same names, same order, same numbers; each difference is marked D1, D2, ... at its place and explained in DIFFERENCES.md.

    bash run_tpu.sh                               the real run on a TPU, the rehearsal anywhere else
    python train_gpt_xla.py --preset rehearsal    the rehearsal, on whatever devices PJRT finds
    python train_gpt_xla.py --val_loss_every 125  any field of Hyperparameters
    python train_gpt_xla.py --save_every 100 --run_id NAME    a run that goes on where it was stopped, by the same command

One process drives all chips with one program (SPMD). Upstream's 8 ranks are 8 rows of a batch: on 8 devices each has one, on fewer
they take turns (D24), and 1, 2, 4 or 8 compute the same thing. Forward and backward run on each device by itself; the optimizers' state
is split over all.
Shapes: B rows, T tokens, d model dim, H heads, D head dim, V vocabulary.
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
import vocabulary
from checkpoint import Checkpoints
from chips import Refused, this_chip
from gradients import Gradients, Shared
from kernels import (
    dc_attention,
    fused_attention,
    fused_dc,
    fused_mix,
    fused_smear,
    lm_head_losses,
    lookup,
    residual_mlp,
    takes_layers,
    takes_lm_head,
    window_attention,
)
from kernels.dispatch import Kept, warn_once, what_to_keep
from kernels.lm_head import SOFTCAP_A, SOFTCAP_B, SOFTCAP_C
from muon_xla import NorMuonAndAdam
from replay import Replay
from shards import find_shards, more, read_tokens, way_out
from spmd import (
    FUSE_ONCE,
    ROWS,
    assign,
    begin_program,
    device_count,
    enter,
    exchange,
    first_row,
    is_split,
    leave,
    setup_devices,
    shard,
    to_device,
    to_host,
    turns,
)
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

def weighted(*terms: tuple[Tensor | float, Tensor]):
    """The sum of factor * x over terms (factor, x), in float32 (D22), rounded once to x's dtype."""
    return sum(factor * x.float() for factor, x in terms).type_as(terms[0][1])

class CastedLinear(nn.Linear):
    # D1: no FP8. The v6e's matrix unit has no FP8 mode, so lm_head multiplies in bfloat16 like everything else.
    # D23: [out, in], where upstream's CastedLinearT is [in, out]; state_dict has upstream's
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.zero_()  # a projection that starts at zero: @Grad62304977 and others

    def forward(self, x: Tensor):
        return F.linear(x, self.weight.type_as(x))

class FusedLinearReLUSquareFunction(torch.autograd.Function):
    """
    relu(x @ W1.T)^2 @ W2, whose backward pass keeps one [.., 4d] tensor instead of two and forms dpre in x's dtype. D1: upstream's forward
    pass is in FP8.
    """
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

# squared ReLU (arXiv:2109.08668): @SKYLINEZ007, @Grad62304977
ReLUSqrdMLP = FusedLinearReLUSquareFunction.apply

def half_split(head_dim: int) -> Tensor:
    """
    D5: rotary pairs (2i, 2i + 1) stored as (i, i + D/2): index of upstream's dim for each of ours. Lanes 2i and 2i + 1 cannot
    be exchanged without a copy on a TPU; two halves can. Scores are sums over dims, so the order of dims is free.
    """
    return torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])

def still_dims(head_dim: int, device=None) -> Tensor:
    """Which of our dims, [D] bool, rotary embedding leaves alone: upstream's second half. Computed: no buffer is needed."""
    i = torch.arange(head_dim, device=device)
    return 2 * i % head_dim + 2 * i // head_dim >= head_dim // 2  # upstream's number of dim i comes first

class Yarn(nn.Module):
    """
    Half-truncated RoPE with YaRN. angular_freq [D] (in upstream's order) and attn_scale are the host's state; each step's graph
    gets them as numbers and computes its own tables (D6: upstream keeps 2 x max_seq_len rows of them, 134 MB each).
    """
    def __init__(self, head_dim: int, paired: bool = False):
        super().__init__()
        self.head_dim = head_dim
        self.paired = paired
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
        """Windows in tokens."""
        rotations = old_window * self.angular_freq / (2 * torch.pi)
        scaling_factor = old_window / new_window
        interpolation_weight = torch.clamp((rotations - alpha) / (beta - alpha), 0, 1)
        self.angular_freq *= scaling_factor + interpolation_weight * (1 - scaling_factor)
        self.attn_scale *= 0.2 * math.log(new_window / old_window) + 1

    def numbers(self) -> list[float]:
        """What a step's graph needs: the D/4 frequencies that differ, then the scale of the scores."""
        return self.angular_freq[:self.head_dim//2:2].tolist() + [self.attn_scale]

    def factors(self, T: int, freq: Tensor, dtype: torch.dtype, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        factor1, factor2 in half-split order, from frequencies [D/4]: [T, D], or [B, 1, T, D] at positions [B, T]. Paired: [2, T, D] or
        [B, 1, 2, T, D], where heads of even number rotate by positions 2t, of odd number by 2t + 1.
        """
        t = torch.arange(T, dtype=torch.float32, device=freq.device) if positions is None else positions.unsqueeze(1)
        if self.paired:
            t = torch.stack([2 * t, 2 * t + 1], dim=-2)
        # tokens along the lanes, which they fill; products with 1, 0 and -1, which are exact, spread them over the dims
        theta, n = freq.unsqueeze(-1) * t.unsqueeze(-2), freq.numel()  # [.., D/4, T]
        one, zero = torch.eye(n, dtype=dtype, device=freq.device), torch.zeros(n, n, dtype=dtype, device=freq.device)
        cos, sin = theta.cos().to(dtype).mT @ torch.cat([one, zero, one, zero], dim=1), theta.sin().to(dtype).mT @ torch.cat(
            [one, zero, -one, zero], dim=1)
        return cos + still_dims(self.head_dim, freq.device), sin

@dataclass
class AttnArgs:
    layer: int  # of those with attention: 0 .. 9
    sa_lambdas: tuple[Tensor, Tensor]  # float32: on the weights of Q, K and V, and of O
    documents: Tensor  # [B, T] int32
    bm_size: int  # tokens
    factors: tuple[Tensor, Tensor]  # rotary
    attn_scale: Tensor
    key_offset: bool
    attn_gate_w: Tensor | None = None  # [B, T, H]
    ve: Tensor | None = None  # value embeddings [B, T, 5d], the layer's table, and its gate's weights
    table: int = 0
    ve_gate_w: Tensor | None = None
    ve_sum: Shared | None = None  # where kernels add up the gradients of ve
    aux_v: Tensor | None = None  # [B, T, d], added to V as it is
    xsa_alpha: Tensor | None = None  # [B, T, H]
    dc_w: tuple[Tensor, Tensor] | None = None  # [B, T, H] each
    dc_window: int = 0  # keys
    by_kernels: bool = False
    keep_qkv: bool = True  # for the backward pass (D25)
    attention: tuple[Callable, Callable] = (window_attention, dc_attention)

def dc_gate(dc_w: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[B, T, H] float32 each, rounded as they come: the first is normed over the heads."""
    dc_w1, dc_w2 = (w.float() for w in dc_w)
    normed = dc_w1 * torch.rsqrt(dc_w1.square().mean(-1, keepdim=True) + 1e-6)
    return normed.type_as(dc_w[0]).float(), dc_w2

class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, head_dim: int, num_heads: int, paired: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dim = dim
        self.paired = paired
        assert num_heads * head_dim == dim, "num_heads * head_dim must equal model_dim"
        # the weights are in GPT's banks

    def forward(self, x: Tensor, attn_args: AttnArgs, qk_bank: Tensor, vo_bank: Tensor):
        """
        x [B, T, d], before its norm -> all heads' results [B, T, d], and x for whoever else reads it: kernels add what comes back to it.
        D16: attention's last projection is in GPT.second_half, because on a TPU it is in the kernel of the MLP.
        Pairs (D8): heads h and h + H/2 form one sequence of twice the tokens; upstream interleaves the two, here window_attention does
        whatever its device likes best, and only the rotary tables differ.
        """
        if attn_args.by_kernels:
            return self.by_kernels(x, attn_args, qk_bank, vo_bank)
        H, D, j = self.num_heads, self.head_dim, attn_args.layer
        by_head = lambda x: x.unflatten(-1, (H, D)).transpose(1, 2)  # [B, T, d] -> [B, H, T, D]
        to_heads = lambda gate: gate.float().mT.unsqueeze(-1)  # [B, T, H] -> [B, H, T, 1]
        x_, x, (factor1, factor2) = x, norm(x), attn_args.factors

        # D7: heads before tokens, [B, H, T, D]. A TPU tiles the last two dims, so each head's [T, D] must lie together.
        w = torch.cat([qk_bank[j * H:(j + 1) * H].reshape(2 * self.dim, self.dim), vo_bank[2 * j]]).type_as(x)
        w = scaled(attn_args.sa_lambdas[0], w).view(3 * H, D, self.dim)
        q, k, v = torch.einsum('btc,hdc->bhtd', x, w).chunk(3, dim=1)
        q, k = norm(q), norm(k) # @Grad62304977
        if self.paired:
            pairs = lambda x: x.unflatten(1, (-1, 2))  # [B, H/2, 2, T, D]: heads of even and odd number
            q, k = (Yarn.rotary(pairs(x), factor1, factor2).flatten(1, 2) for x in (q, k))
        else:
            q, k = Yarn.rotary(q, factor1, factor2), Yarn.rotary(k, factor1, factor2)
        if attn_args.key_offset:
            # in the dims that stand still a key carries its predecessor's content, so one layer can do induction
            k = torch.where(still_dims(D, x.device), torch.cat([k[:, :, :1], k[:, :, :-1]], dim=2), k)
        if attn_args.ve is not None:
            # the gate reads x and the embedding: @photomz, after @KoszarskyB and @Grad62304977
            ve = attn_args.ve.chunk(5, dim=-1)[attn_args.table]
            gate = 2 * torch.sigmoid(F.linear(torch.cat([x[..., :6], ve[..., :6]], dim=-1), attn_args.ve_gate_w).float())
            v = v + scaled(to_heads(gate), by_head(ve))
        if attn_args.aux_v is not None:
            v = v + by_head(attn_args.aux_v)
        attention, dc = attn_args.attention
        y = attention(q, k, v, attn_args.documents, attn_args.bm_size, attn_args.attn_scale, self.paired)
        if attn_args.dc_w is not None:
            flat = y.transpose(1, 2).flatten(2)
            flat = dc(torch.cat([q, k, v], dim=1), flat, *dc_gate(attn_args.dc_w), attn_args.documents, attn_args.dc_window,
                      attn_args.attn_scale)
            y = by_head(flat)
        if attn_args.xsa_alpha is not None:
            # XSA (arXiv:2603.09078): y loses a learned part of what lies along its own value
            along = (y.float() * v.float()).sum(-1, keepdim=True) / v.float().square().sum(-1, keepdim=True).clamp_min(1e-8)
            y = weighted((1.0, y), (-torch.tanh(to_heads(attn_args.xsa_alpha)) * along, v))
        if attn_args.attn_gate_w is not None:
            y = scaled(to_heads(attn_args.attn_gate_w), y)
        return y.transpose(1, 2).flatten(2), x_

    def by_kernels(self, x: Tensor, attn_args: AttnArgs, qk_bank: Tensor, vo_bank: Tensor):
        """What forward does, on a TPU, where it is two kernels or, with DC, three (D15)."""
        dc, gate = attn_args.dc_w is not None, attn_args.attn_gate_w
        y, qkv, x = fused_attention(
            x, qk_bank, vo_bank, attn_args.layer, attn_args.sa_lambdas[0].view(1), attn_args.ve, attn_args.ve_gate_w, attn_args.aux_v,
            *attn_args.factors, still_dims(self.head_dim, x.device) if attn_args.key_offset else None, attn_args.documents,
            attn_args.bm_size, attn_args.attn_scale, self.paired, attn_args.xsa_alpha, None if dc else gate, attn_args.table,
            attn_args.ve_sum, attn_args.table == 0, attn_args.keep_qkv)  # the first table's gradient begins after the last layer
        if dc:
            y = fused_dc(qkv, y, gate.float(), *dc_gate(attn_args.dc_w), attn_args.documents, attn_args.dc_window, attn_args.attn_scale)
        return y, x

# -----------------------------------------------------------------------------
# Fused Softcapped Cross Entropy

LOGITS_CHUNK = 16384  # tokens of a row whose logits exist at once: 1.5 GiB of bfloat16 at the record's vocabulary

def softcapped_logits(x: Tensor, weight: Tensor, A=SOFTCAP_A, B=SOFTCAP_B, C=SOFTCAP_C) -> tuple[Tensor, Tensor]:
    """x [B, T, d] -> logits [V, B * T] in x's dtype, and their softcap A * sigmoid((logits + B) / C) in float32."""
    # D9: vocabulary first. The sums over it then run down sublanes, and one row of tokens is one vector register wide.
    logits = weight.type_as(x) @ x.flatten(0, 1).T
    return logits, A * torch.sigmoid((logits.float() + B) / C)

def token_weights(targets: Tensor, mtp_weights: Tensor, prefix: Tensor | None, prefix_weight: Tensor | None, start: int, stop: int,
                  vocab: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    For positions start..stop-1 of targets [B, T]: the weight of each vocabulary entry as a target, [V, B * (stop - start)], their sum,
    [1, B * (stop - start)], and the sum by which the gradient multiplies the softmax. Position i has targets i, i + 1, ... with
    mtp_weights, none beyond the row's end, and its prefix [B, T] with prefix_weight [1], where that is not -1. Upstream's gradient counts
    the targets beyond the row's end in the last of these sums.
    """
    B, T = targets.shape
    each, total, factor = 0.0, 0.0, mtp_weights.sum()
    for k, weight in enumerate(mtp_weights.unbind()):
        exists = torch.arange(start + k, stop + k, device=targets.device) < T
        target = torch.where(exists, F.pad(targets, (0, k))[:, start + k:stop + k], -1).flatten()
        each = each + torch.where(vocab == target, weight, 0.0)
        total = total + (exists * weight).expand(B, -1).reshape(1, -1)
    if prefix is not None:
        prefix = prefix[:, start:stop].reshape(1, -1)
        exists = (prefix >= 0) * prefix_weight
        each = each + torch.where(vocab == prefix, prefix_weight, 0.0)
        total, factor = total + exists, factor + exists
    return each, total, factor

class FusedSoftcappedCrossEntropy(torch.autograd.Function):
    """
    Softcapped cross entropy with multi-token and prefix token prediction, lm_head included, LOGITS_CHUNK tokens at a time.
    x [B, T, d], targets [B, T] int32, mtp_weights [n], prefix [B, T] int32 and prefix_weight [1] or None, weight [V, d] -> losses [B, T]
    float32. No maximum is subtracted: the softcap bounds the logits by 23, and exp(23) * V is far inside float32.
    """
    @staticmethod
    def forward(ctx, x, targets, mtp_weights, prefix, prefix_weight, weight):
        vocab = torch.arange(weight.size(0), device=x.device, dtype=targets.dtype).unsqueeze(1)
        losses, saved = [], []
        for start in range(0, x.size(1), LOGITS_CHUNK):
            stop = min(start + LOGITS_CHUNK, x.size(1))
            logits, z = softcapped_logits(x[:, start:stop], weight)
            each, total, _ = token_weights(targets, mtp_weights, prefix, prefix_weight, start, stop, vocab)
            lse = z.exp().sum(0, keepdim=True).log()
            losses.append((total * lse - (each * z).sum(0, keepdim=True)).view(x.size(0), -1))
            saved += [logits, lse]
        ctx.save_for_backward(x, weight, targets, mtp_weights, prefix, prefix_weight, vocab, *saved)
        return torch.cat(losses, dim=1)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, targets, mtp_weights, prefix, prefix_weight, vocab, *saved = ctx.saved_tensors
        A, B, C = SOFTCAP_A, SOFTCAP_B, SOFTCAP_C
        dx, dw = [], 0.0
        for start, logits, lse in zip(range(0, x.size(1), LOGITS_CHUNK), saved[::2], saved[1::2], strict=True):
            stop = min(start + LOGITS_CHUNK, x.size(1))
            sigmoid_u = torch.sigmoid((logits.float() + B) / C)
            z = A * sigmoid_u
            each, _, factor = token_weights(targets, mtp_weights, prefix, prefix_weight, start, stop, vocab)
            grad_z = grad_output[:, start:stop].reshape(1, -1) * (factor * (z - lse).exp() - each)
            grad_x = (grad_z * (1 / C) * z * (1 - sigmoid_u)).type_as(x)  # [V, B * T]
            dx.append((grad_x.T @ weight.type_as(x)).view(x.size(0), -1, x.size(2)))
            dw = dw + grad_x @ x[:, start:stop].flatten(0, 1)
        return torch.cat(dx, dim=1), None, None, None, None, dw

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

def build_prefix_table(vocab_size: int, byte_to_id: dict[bytes, int]) -> Tensor:
    """
    [vocab_size] int32: for each token the longest other token that its bytes begin with; -1 where there is none. From the vocabulary alone
    (byte_to_id: the bytes of each token), never from the data.
    """
    table = torch.full((vocab_size,), -1, dtype=torch.int32)
    open_tokens: list[bytes] = []  # sorted, what a token begins with comes before it: those that may go on, each a part of the next
    for token in sorted(byte_to_id):
        while open_tokens and not token.startswith(open_tokens[-1]):
            open_tokens.pop()
        if open_tokens:
            table[byte_to_id[token]] = byte_to_id[open_tokens[-1]]
        open_tokens.append(token)
    return table

@dataclass
class ForwardScheduleConfig:
    mtp_weights: Tensor  # [n] float32
    prefix_weight: Tensor | None  # [1] float32; None where there is no such term
    ws_short: int  # in tokens
    ws_long: int
    yarn: Tensor  # [D/4 + 1] float32: Yarn.numbers()
    yarn_paired_head: Tensor
    keep: Kept | None = None  # for the backward pass (D25)
    attention: tuple[Callable, Callable] | None = None  # in place of window_attention and dc_attention; no kernels of layers run then
    positions: Tensor | None = None  # [B, T] float32, in the row, by which heads rotate; 0 .. T-1 where there are none

class Exchange(torch.autograd.Function):
    """
    What a device has found for the slots of all, [devices * room, d] -> what their owners have found for its own tokens, [N, d]. slots
    [N]: each token's; token [devices * room]: whose each slot is, any token's where it is nobody's.
    An all-to-all, because XLA runs that beside other work, and a reduce-scatter not.
    """
    @staticmethod
    def forward(ctx, x, slots, token):
        ctx.save_for_backward(token)
        return F.embedding(slots, exchange(x))

    @staticmethod
    def backward(ctx, dy):
        token, = ctx.saved_tensors
        return exchange(F.embedding(token, dy)), None, None

def bigram_room(tokens: int) -> int:
    """How many of a device's tokens may have bigrams in one device's rows of the table: half as many again as if all had equally many."""
    return min(tokens, next_multiple_of_n(3 * tokens / (2 * device_count()) + 256, n=128))

def lookup_owned(ids: Tensor, slots: Tensor | None, weight: Tensor) -> Tensor:
    """
    F.embedding of ids [B, T] in a table of which each device has rows of its own, weight [rows / devices, d] (D4). Each token has a slot
    among those in which its row's owner is asked, and answers: slots [B, T] are get_bigram_slots', or None, then each owner has one for
    every token. Backward, the gradients go the same way back, and nothing is left to reduce.
    """
    n, N, rows = device_count(), ids.numel(), weight.size(0)
    if n == 1:
        return lookup(ids, weight)
    count = torch.arange(N, dtype=torch.int32, device=ids.device)
    flat, room = ids.flatten(), N if slots is None else bigram_room(N)
    slots = flat // rows * N + count if slots is None else slots.flatten()
    token = torch.full((n * room,), N, dtype=torch.int32, device=ids.device).index_put((slots,), count)  # N: nobody's
    asked = exchange(F.pad(flat, (0, 1), value=-1)[token]) - first_row(rows, ids)
    x = lookup(asked.unsqueeze(0), weight, (asked >= 0).unsqueeze(0))
    return Exchange.apply(x.squeeze(0), slots, token.clamp(max=N - 1)).view(*ids.shape, -1)

# Sums by kernels. The skip connection's: x, and cache[3] times its gate
SKIP = ((0, None), (1, 0)),
# MUDD's: the terms (which activation, which row of numbers, two rows for each half of the heads) of the gated value
# embeddings and of x before layer 10, and of x after it
MUDD_BEFORE = ((3, (6, 7)), (1, 0), (2, 1), (0, 2)), ((0, 5), (1, 3), (2, 4))  # of x, cache[0], cache[7], value embeddings
MUDD_AFTER = ((0, None), (1, 0), (2, 1), (3, 2), (5, 3), (4, 4)),  # of x, cache[0], cache[7], cache[9], cache[3], value embeddings

class GPT(nn.Module):
    def __init__(self, vocab_size: int, num_layers: int, num_heads: int, head_dim: int, model_dim: int, block_size: int = 128,
                 dc_window: int = 112, bigram_vocab_size: int = 50304 * 15 // 2, bigram_sign_table_rows: int = 8192):
        super().__init__()
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.block_size = block_size
        # the vocabulary is padded to a multiple of 128 (@Grad62304977, after Karpathy); the padding is in the softmax too
        self.vocab_size = next_multiple_of_n(vocab_size, n=128)

        # -1: no such token, which is what warm-up runs with; set_prefix_table fills it on the clock
        self.register_buffer("prefix_table", torch.full((self.vocab_size,), -1, dtype=torch.int32), persistent=False)

        self.lm_head = CastedLinear(model_dim, self.vocab_size)
        nn.init.normal_(self.lm_head.weight, mean=0, std=0.005)

        # D23: tied to lm_head until the split: until then it is not read, and state_dict gives lm_head's
        self.embed = nn.Embedding(self.vocab_size, model_dim)
        with torch.no_grad():
            self.embed.weight.copy_(self.lm_head.weight)
        self.split_embed = False

        self.init_attn(model_dim, head_dim, num_heads, num_layers)
        self.init_mlp(model_dim)
        self.init_misc(model_dim, num_layers, bigram_vocab_size, bigram_sign_table_rows)
        self.init_mudd(num_layers, model_dim)

        self.xsa_layers = [1, 3, 4, 7]
        self.dc_layers = [10]
        self.dc_window = dc_window
        self.attn_gate_layers = [3, 10]
        self.init_mudd_gate(model_dim)

        for name, param in self.named_parameters():
            param.label = name.replace('.weight', '')

    def init_attn(self, model_dim: int, head_dim: int, num_heads: int, num_layers: int):
        self.cache_layers = [3, 7]

        self.paired_head_layers = [0, 2, 5, 9]
        self.attn = CausalSelfAttention(model_dim, head_dim, num_heads, paired=False)
        self.attn_paired = CausalSelfAttention(model_dim, head_dim, num_heads, paired=True)
        self.yarn = Yarn(head_dim)
        self.yarn_paired_head = Yarn(head_dim, paired=True)

        # values added to V: @KoszarskyB, after @Grad62304977's value residual (arXiv:2410.17897); @ragulpr simplified them, @photomz chose
        # their start. D29: a token's five rows lie side by side, [V, 5d], where upstream has table after table: one lookup finds them all
        self.value_embeds = nn.Parameter(0.01 * torch.randn(self.vocab_size, 5 * model_dim))
        self.ve_gate_bank = nn.Parameter(torch.zeros(5, num_heads, 12))

        # banks, so that whole matrices can be split over the devices: @chrisjmccormick. No attention in layer 6: @YouJiacheng
        num_attn_layers = num_layers - 1
        # Q and K in pairs of heads, which NorMuon takes for one matrix each
        used = num_attn_layers * 2 * (num_heads // 2)
        self.qk_bank = nn.Parameter(torch.zeros(next_multiple_of_n(used, n=ROWS), head_dim * 2, model_dim))
        self.qk_bank.reshape, self.qk_bank.used = self.qk_bank.shape, used
        # V and O
        used = num_attn_layers * 2
        self.vo_bank = nn.Parameter(torch.zeros(next_multiple_of_n(used, n=ROWS), model_dim, model_dim))
        self.vo_bank.reshape, self.vo_bank.used = self.vo_bank.shape, used

        std = 0.5 * model_dim ** -0.5
        bound = (3 ** 0.5) * std # @YouJiacheng, @srashedll
        with torch.no_grad():
            for bank in (self.qk_bank, self.vo_bank):
                bank[:bank.used].uniform_(-bound, bound)

    def init_mlp(self, model_dim: int):
        # a layer of padding, so that 24 matrices divide by 8
        mlp_hdim = 4 * model_dim
        self.mlp_bank = nn.Parameter(torch.zeros(12, 2, mlp_hdim, model_dim))
        self.mlp_bank.reshape, self.mlp_bank.used = (24, mlp_hdim, model_dim), 2 * self.num_layers
        std = 0.5 * model_dim ** -0.5
        bound = (3 ** 0.5) * std # @YouJiacheng, @srashedll
        with torch.no_grad():
            self.mlp_bank[:, 0].uniform_(-bound, bound)  # c_fc; c_proj starts at zero: @Grad62304977

    def init_misc(self, model_dim: int, num_layers: int, bigram_vocab_size: int, bigram_sign_table_rows: int):
        self.smear_gate = CastedLinear(12, 1)

        self.bigram_embed = nn.Embedding(bigram_vocab_size, model_dim)
        nn.init.zeros_(self.bigram_embed.weight)
        self.register_buffer('bigram_sign_table', torch.randn(bigram_sign_table_rows, model_dim).sign())

        self.post_lambdas = nn.Parameter(torch.ones(num_layers, 2))

        # for attention and MLP: both together scale a layer's x by 1.1
        self.resid_lambdas = nn.Parameter(torch.full((num_layers, 2), 1.1**0.5))

        pad = (-num_layers * 2 - 2) % ROWS
        self.scalars = nn.Parameter(
            torch.cat(
                [
                    *[torch.tensor([0.5, 1.0]) for _ in range(num_layers)],  # attention lambdas, on QKV and on O
                    torch.zeros(1), # smear
                    -1.5 * torch.ones(1), # skip, through a sigmoid: 0.18
                    torch.ones(pad),
                ]
            )
        )

    def init_mudd(self, num_layers: int, model_dim: int):
        """
        Multiway Dynamic Dense Connections (arXiv:2502.12170), @lishengping: a small MLP's numbers, for each token, weigh what skips layers.

        Before layer 10, 14 of them:
          0 .. 2    cache[0], cache[7], x into V
          3 .. 5    cache[0], cache[7], x into x
          6, 7      gate of the value embedding, for the first and the second half of the heads
          8 .. 11   x, attention, cache[0], bigram after attention
          12, 13    x, MLP after the MLP
        After the last layer, 5: cache[0], cache[7], cache[9], the first value embedding, cache[3].
        """
        num_mudd_layers = 2
        self._mudd_scale = 0.1
        mudd_dim = 64
        max_num_coef = 14

        self.mudd_w1 = nn.Parameter(torch.empty(num_mudd_layers, mudd_dim, model_dim))
        for j in range(num_mudd_layers):
            nn.init.kaiming_uniform_(self.mudd_w1.data[j], a=math.sqrt(5))
        self.mudd_w2 = nn.Parameter(torch.zeros(num_mudd_layers, max_num_coef, mudd_dim))

        start = torch.zeros(num_mudd_layers, max_num_coef)  # the constants that earlier records had in these places
        start[0, 6:8] = 2.0
        start[0, [8, 12]] = 1.1**0.5
        start[0, [9, 13]] = 1.0
        start[0, 11] = 0.05
        start[1, 1] = -0.5  # what the first layers wrote for later ones to read, not for the prediction, is taken out again
        self.mudd_b2 = nn.Parameter(start / self._mudd_scale)

    def forward_mudd(self, x: Tensor, id: int, num_coef: int) -> list[Tensor]:
        """Numbers of block id (0 or 1) for each token of x [B, T, d], [B, T, 1] float32 each."""
        x = F.gelu(F.linear(x, self.mudd_w1[id]))
        # D22: in float32, the bias because its gradient is a sum over all tokens, the numbers because it puts up to 2 into them
        x = (F.linear(x, self.mudd_w2[id, :num_coef]).float() + self.mudd_b2[id, :num_coef].float()) * self._mudd_scale
        return x.split(1, dim=-1)

    def init_mudd_gate(self, model_dim: int):
        self._mudd_gate_scale = nn.Parameter(torch.tensor(0.1))
        mudd_gate_dim = 64
        assert self.num_heads == 6
        # before layer 0: XSA of layers 1 and 3 (12), gate of layer 3 (6), x0 and bigram of layers 0 to 3 (8)
        # before layer 4: XSA of 4 and 7 (12), gate of 10 (6), x0 and bigram of 4, 5, 7, 8, 9 (10), skip (1), DC of 10 (12)
        self._mudd_gate_pre_num_coef = 26
        self._mudd_gate_post_num_coef = 41
        max_num_coef = 41
        self.mudd_gate_w1 = nn.Parameter(torch.empty(2, mudd_gate_dim, model_dim))
        self.mudd_gate_w2 = nn.Parameter(torch.zeros(2, max_num_coef, mudd_gate_dim))
        for j in range(2):
            nn.init.kaiming_uniform_(self.mudd_gate_w1.data[j], a=math.sqrt(5))

        start = torch.zeros(2, max_num_coef)
        start[:, 12:18] = 0.25  # gates of attention
        start[0, 19:26:2] = start[1, 19:28:2] = 0.05  # bigram
        start[1, 28] = 0.5  # skip
        start[1, 29:35] = 1.0  # DC's first weights
        self.mudd_gate_b2 = nn.Parameter(start / 0.1)

    def forward_mudd_gate(self, h: Tensor, id: int, num_coef: int) -> Tensor:
        """h: x @ mudd_gate_w1[id].T, [B, T, 64]. Returns [B, T, num_coef] gates."""
        h = F.gelu(h)
        gate = F.linear(h, self.mudd_gate_w2[id, :num_coef]).float() + self.mudd_gate_b2[id, :num_coef].float()
        return (gate * self._mudd_gate_scale).type_as(h)

    def unpack_pre_mudd_gate(self, gate, xsa_alphas, attn_gates, x0_gates, bigram_gates):
        xsa_alphas[1] = gate[..., 0:6] # 6 heads
        xsa_alphas[3] = gate[..., 6:12]
        attn_gates[3] = gate[..., 12:18]
        for layer, offset in zip((0, 1, 2, 3), range(18, 26, 2)):
            x0_gates[layer] = gate[..., offset:offset + 1]
            bigram_gates[layer] = gate[..., offset + 1:offset + 2]

    def unpack_post_mudd_gate(self, gate, xsa_alphas, attn_gates, x0_gates, bigram_gates):
        xsa_alphas[4] = gate[..., 0:6]
        xsa_alphas[7] = gate[..., 6:12]
        attn_gates[10] = gate[..., 12:18]
        for layer, offset in zip((4, 5, 7, 8, 9), range(18, 28, 2)):
            x0_gates[layer] = gate[..., offset:offset + 1]
            bigram_gates[layer] = gate[..., offset + 1:offset + 2]
        return gate[..., 28:29]

    # -----------------------------------
    # On devices, and in upstream's form

    def to_devices(self, dtype: torch.dtype = torch.bfloat16):
        """Moves the parameters to the mesh: in dtype but for scalars and lambdas, replicated but for the bigram table's rows (D4)."""
        exact = self.scalars, self.post_lambdas, self.resid_lambdas, self._mudd_gate_scale
        exact = {id(p) for p in exact}
        for module in self.modules():
            for name, p in module._parameters.items():
                if p is None:
                    continue
                split = ("data",) if p is self.bigram_embed.weight else ()
                x = p.data if id(p) in exact else p.data.to(dtype)
                module._parameters[name] = nn.Parameter(to_device(x, *split))
                module._parameters[name].__dict__.update(p.__dict__)  # label, reshape, used
            for name, b in module._buffers.items():
                module._buffers[name] = to_device(b if b.dtype == torch.int32 else b.to(dtype))
        return self

    def enter_weights(self) -> dict[str, Tensor]:
        """The parameters as each device has them, by name."""
        return {name: enter(p.detach(), *(("data",) if name == "bigram_embed.weight" else ())) for name, p in self.named_parameters()}

    def set_prefix_table(self, table: Tensor):
        """table: [V] int, build_prefix_table's."""
        self.prefix_table.data = to_device(table.to(torch.int32))

    def to_upstream(self, name: str, x: Tensor) -> Tensor:
        """A parameter's value, or gradient, in upstream's layout."""
        if name == "qk_bank":
            return self._reorder(x, half_split(self.head_dim).argsort())
        if name == "value_embeds":
            return x.unflatten(1, (5, -1)).transpose(0, 1).flatten(0, 1).contiguous()
        return x.mT.contiguous() if name == "lm_head.weight" else x

    def from_upstream(self, name: str, x: Tensor) -> Tensor:
        if name == "qk_bank":
            return self._reorder(x, half_split(self.head_dim))
        if name == "value_embeds":
            return x.unflatten(0, (5, -1)).transpose(0, 1).flatten(1)
        return x.mT if name == "lm_head.weight" else x

    def _reorder(self, qk_bank: Tensor, index: Tensor) -> Tensor:
        return qk_bank.unflatten(1, (2, self.head_dim))[:, :, index].flatten(1, 2)  # D5

    def state_dict(self, *args, **kwargs):
        """On the CPU, under upstream's names, in upstream's layout: a checkpoint of either loads in the other."""
        state = {name: self.to_upstream(name, to_host(x)) for name, x in super().state_dict(*args, **kwargs).items()}
        if not self.split_embed:
            state["embed.weight"] = state["lm_head.weight"].mT.contiguous()
        return state

    def load_state_dict(self, state_dict):
        """Takes upstream's state_dict, with or without torch.compile's prefix. Nothing is changed if it does not fit."""
        state = {name.removeprefix("_orig_mod."): value for name, value in state_dict.items()}
        state = {name: value for name, value in state.items() if not name.startswith("_mlp_down_")}  # scales of upstream's FP8 (D1)
        mine = dict(self.named_parameters()) | {name: b for name, b in self.named_buffers() if name != "prefix_table"}
        for name in mine.keys() ^ state.keys():
            raise ValueError(f"state_dict: {name} is {'missing' if name in mine else 'not a parameter of this model'}")
        values = {}
        for name, x in mine.items():
            wanted = self.to_upstream(name, torch.empty(x.shape, device="meta")).shape
            if wanted != state[name].shape:
                raise ValueError(f"state_dict: {name} has shape {tuple(state[name].shape)}, this model wants {tuple(wanted)}")
            values[name] = self.from_upstream(name, state[name].detach().cpu().to(x.dtype)).contiguous()
        for name, x in mine.items():
            assign(x, values[name])

    # -----------------------------------

    def second_half(self, i: int, x: Tensor, y: Tensor | None, factors: list[Tensor], sa_lambda: Tensor | None, x0: Tensor | None,
                    x0_bigram: Tensor | None, by_kernels: bool, keep: bool, x0_sum: Shared | None,
                    bigram_sum: Shared | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        What layer i does after attention's y [B, T, d]: its last projection, the sum with x, x0 and the bigram, the MLP, the sum with that.
        factors: of x, attention, x0 and bigram in the first sum, of x and the MLP in the second, float32, one each or one a token
        [B, T, 1]. Without y (layer 6): of the second sum alone. Returns the result, and x and x0 for whoever else reads them, as attention.
        """
        j, x_ = i - (i > 6), x
        if by_kernels:  # D16
            factors = torch.cat([torch.as_tensor(f, device=x.device).float().expand(*x.shape[:2], 1) for f in factors], dim=-1).mT
            attention = {} if y is None else dict(y=y, vo_bank=self.vo_bank, j=j, lambda_o=sa_lambda.view(1), x0=x0, bigram=x0_bigram,
                                               x0_sum=x0_sum, bigram_sum=bigram_sum)
            return residual_mlp(x, self.mlp_bank, i, factors, keep=keep, **attention)
        *first, resid, post = factors
        if y is not None:
            # lambda on O's weights, not its output: @shenberg
            attn_out = F.linear(y, scaled(sa_lambda, self.vo_bank[2 * j + 1].type_as(y)))
            x = weighted(*zip(first, (x, attn_out, x0, x0_bigram), strict=True))
        c_fc, c_proj = self.mlp_bank[i]
        return weighted((resid, x), (post, ReLUSqrdMLP(norm(x), c_fc, c_proj))), x_, x0

    def forward(self, input_seq: Tensor, target_seq: Tensor | None, documents: Tensor, bigram_input_seq: Tensor,
                schedule_cfg: ForwardScheduleConfig, bigram_slots: Tensor | None = None):
        """
        input_seq, target_seq, documents, bigram_input_seq: [B, T] int32; documents holds where in its row each token's document starts
        (D10: upstream passes cu_seqlens), bigram_input_seq the bigrams' rows (get_bigram_hash), bigram_slots how they come to be looked up
        (lookup_owned). Returns a loss for each row, [B]: summed over tokens in training, their mean otherwise. Without target_seq, what
        lm_head reads, [B, T, d].
        """
        assert input_seq.ndim == 2
        T, dtype = input_seq.size(1), self.lm_head.weight.dtype

        # ---- Schedule and layer topology ----
        keep = schedule_cfg.keep or Kept(input_seq.numel(), True)
        ws_short, ws_long = schedule_cfg.ws_short, schedule_cfg.ws_long
        bm_sizes = [ws_short, ws_short, ws_short, ws_long, ws_short, ws_short, None, ws_short, ws_short, ws_short, ws_long]
        assert len(bm_sizes) == self.num_layers
        key_offset = [b==ws_long for b in bm_sizes] # where the window is long
        factors = [yarn.factors(T, cfg[:-1], dtype, schedule_cfg.positions) + (cfg[-1],) for yarn, cfg in
                   ((self.yarn, schedule_cfg.yarn), (self.yarn_paired_head, schedule_cfg.yarn_paired_head))]

        # ---- Unbind parameters ----
        sa_lambdas = self.scalars[: 2 * self.num_layers].view(-1, 2)
        smear_lambda = self.scalars[2 * self.num_layers]
        skip_lambda = self.scalars[2 * self.num_layers + 1]
        in_use = lambda lambdas: lambdas.to(dtype).float().unbind(0)  # rounded as upstream's
        resid_lambdas_attn, resid_lambdas_mlp = in_use(self.resid_lambdas[:, 0]), in_use(self.resid_lambdas[:, 1])
        post_lambdas_attn, post_lambdas_mlp = in_use(self.post_lambdas[:, 0]), in_use(self.post_lambdas[:, 1])
        nones = [None] * (self.num_layers - 6)
        veg = self.ve_gate_bank.unbind(0)
        attn_gates = [None] * self.num_layers
        ve_gates = [None, veg[0], veg[1], *nones, veg[2], veg[3], veg[4]]
        xsa_alphas = [None] * self.num_layers
        x0_gates = [None] * self.num_layers
        bigram_gates = [None] * self.num_layers
        assert len(ve_gates) == self.num_layers

        # ---- Embeddings and input preparation ----
        # D19: on a TPU a kernel adds up their gradients. D23: while tied lm_head's weight is what is read, so that no step copies it
        x = lookup(input_seq, self.embed.weight if self.split_embed else self.lm_head.weight)
        by_kernels = schedule_cfg.attention is None and takes_layers(x, self.mlp_bank, self.num_heads, self.dc_window, {
            (window, i in self.paired_head_layers) for i, window in enumerate(bm_sizes) if window is not None})

        # signs tell bigrams apart that share a row: @trianxy
        sign_idx = F.pad((input_seq[:, :-1] ^ input_seq[:, 1:]) % self.bigram_sign_table.size(0), (1, 0))
        x0_bigram = lookup_owned(bigram_input_seq, bigram_slots, self.bigram_embed.weight) * F.embedding(sign_idx, self.bigram_sign_table)

        ve = lookup(input_seq, self.value_embeds)
        tables = [None, 0, 1, *nones, 2, 3, 4]  # whose value embeddings a layer takes: @photomz
        assert len(tables) == self.num_layers

        # each token takes a gated share of the one before it: @classiclarryd. D21: the first one takes a share of zeros, where upstream
        # leaves it out, for T - 1 tokens lie askew in a TPU's tiles
        if by_kernels:  # D31
            x, x0, h = fused_smear(x, self.smear_gate.weight, smear_lambda, self.mudd_gate_w1[0])
        else:
            smear_gate_out = smear_lambda * torch.sigmoid(self.smear_gate(x[..., :self.smear_gate.weight.size(-1)]).float())
            x = x + scaled(smear_gate_out, F.pad(x, (0, 0, 1, -1)))
            x = x0 = norm(x)
            h = F.linear(x, self.mudd_gate_w1[0])

        pre_gate = self.forward_mudd_gate(h, id=0, num_coef=self._mudd_gate_pre_num_coef)
        self.unpack_pre_mudd_gate(pre_gate, xsa_alphas, attn_gates, x0_gates, bigram_gates)

        x = weighted((1.0, x), (bigram_gates[0], x0_bigram))
        cache = {0: x}  # x before layer 0, after layers 3 and 7, and before layer 10

        ve_first, *_, ve_last = ve.chunk(5, dim=-1)
        ve_sum, x0_sum, bigram_sum = map(Shared, (6, 9, 10)) if by_kernels and torch.is_grad_enabled() else (None, None, None)

        def pass_on(read: Tensor, passed: Tensor | None):
            """passed: what a kernel has passed on where it has read `read`. All later readers take that."""
            if passed is not None:
                cache.update({layer: passed for layer, x in cache.items() if x is read})

        for i in range(self.num_layers):
            is_paired = i in self.paired_head_layers
            *yarn, attn_scale = factors[is_paired]
            y, mu = None, None

            if i == 4:
                post_gate = self.forward_mudd_gate(F.linear(x, self.mudd_gate_w1[1]), id=1, num_coef=self._mudd_gate_post_num_coef)
                skip_gate = self.unpack_post_mudd_gate(post_gate, xsa_alphas, attn_gates, x0_gates, bigram_gates)
                dc_weights = post_gate[..., 29:35], post_gate[..., 35:41]

            if i == 6:  # no attention: @YouJiacheng
                skip_gate = scaled(torch.sigmoid(skip_lambda), skip_gate)
                if by_kernels:
                    (x,), (_, passed) = fused_mix([x, cache[3]], skip_gate.float().mT, SKIP)
                    pass_on(cache[3], passed)
                else:
                    x = weighted((1.0, x), (skip_gate, cache[3]))
                mix = [resid_lambdas_mlp[i], post_lambdas_mlp[i]]
            else:
                aux_v = None
                if i == self.num_layers - 1:
                    cache[9] = x
                    mu = self.forward_mudd(x, id=0, num_coef=14)
                    if by_kernels:  # D30
                        numbers = torch.cat([*mu[:5], 1 + mu[5], *mu[6:8]], dim=-1).mT
                        read = x, cache[0], cache[7]
                        (aux_v, x), passed = fused_mix([*read, ve], numbers, MUDD_BEFORE, 4, ve_sum)
                        for tensors in zip(read, passed):
                            pass_on(*tensors)
                    else:
                        first_half = torch.arange(x.size(-1), device=x.device) < x.size(-1) // 2  # of the heads
                        ve_gate = torch.where(first_half, mu[6], mu[7])
                        aux_v = weighted((ve_gate, ve_last), (mu[0], cache[0]), (mu[1], cache[7]), (mu[2], x))
                        x = weighted((1 + mu[5], x), (mu[3], cache[0]), (mu[4], cache[7]))
                    mix = [mu[8], mu[9], mu[10], mu[11], mu[12], mu[13]]
                else:
                    mix = [resid_lambdas_attn[i], post_lambdas_attn[i], x0_gates[i], bigram_gates[i] if i > 0 else 0.0,
                           resid_lambdas_mlp[i], post_lambdas_mlp[i]]
                attn_in = cache.get(7, x)
                attn = self.attn_paired if is_paired else self.attn
                y, passed = attn(attn_in, AttnArgs(
                    layer=i - (i > 6),
                    sa_lambdas=sa_lambdas[i],
                    documents=documents,
                    bm_size=bm_sizes[i],
                    factors=yarn,
                    attn_scale=attn_scale,
                    key_offset=key_offset[i],
                    attn_gate_w=attn_gates[i] if i in self.attn_gate_layers else None,
                    **(dict(ve=ve, table=tables[i], ve_gate_w=ve_gates[i], ve_sum=ve_sum) if mu is None and tables[i] is not None else {}),
                    aux_v=aux_v,
                    xsa_alpha=xsa_alphas[i] if i in self.xsa_layers else None,
                    dc_w=dc_weights if i in self.dc_layers else None,
                    dc_window=self.dc_window,
                    by_kernels=by_kernels,
                    keep_qkv=keep.qkv,
                    attention=schedule_cfg.attention or (window_attention, dc_attention),
                ), self.qk_bank, self.vo_bank)
                if attn_in is x:
                    x = passed
                pass_on(attn_in, passed)
            read = x, x0 if mu is None else cache[0]
            x, *passed = self.second_half(i, x, y, mix, sa_lambdas[i, 1] if y is not None else None, read[1], x0_bigram, by_kernels,
                                          keep.mlp, x0_sum if mu is None else None, bigram_sum)
            for tensors in zip(read, passed):
                pass_on(*tensors)
            if i in self.cache_layers:
                cache[i] = x

        mu = self.forward_mudd(x, id=1, num_coef=5)
        if by_kernels:
            activations = [x, cache[0], cache[7], cache[9], cache[3], ve]
            (x,), _ = fused_mix(activations, torch.cat(mu, dim=-1).mT, MUDD_AFTER, 0, ve_sum, normed=True)
        else:
            x = weighted((1.0, x), (mu[0], cache[0]), (mu[1], cache[7]), (mu[2], cache[9]), (mu[3], ve_first), (mu[4], cache[3]))
            x = norm(x)
        if target_seq is None:
            return x
        # softcap 23 * sigmoid((logits + 5) / 7.5): Gemma 2's tanh by @Grad62304977, its bound by @KoszarskyB, the sigmoid form
        # by @YouJiacheng, the constants by @classiclarryd
        mtp_weights = schedule_cfg.mtp_weights if self.training else None
        prefix_weight = schedule_cfg.prefix_weight if self.training else None
        prefix = None if prefix_weight is None else self.prefix_table[target_seq]
        if takes_lm_head(x, self.lm_head.weight):  # D17: on a TPU lm_head and the loss are one kernel
            losses = lm_head_losses(x, self.lm_head.weight, target_seq, mtp_weights, prefix, prefix_weight, keep.p_tokens)
        elif self.training:
            losses = FusedSoftcappedCrossEntropy.apply(x, target_seq, mtp_weights, prefix, prefix_weight, self.lm_head.weight)
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

TRAIN_MAX_NUM_DOCS = {16384: 64, 32768: 96, 49152: 128}

class Shard:
    # Packs whole documents into rows: @varunneal, after @classiclarryd
    # D11: a whole shard is scanned in 50 ms here, so its first 6 million tokens need no scan of their own.
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

def get_bigram_hash(x: np.ndarray, bigram_vocab_size: int = 50304 * 15 // 2) -> np.ndarray:
    """
    x [8, T] int32 -> for each token, with the one before it, a row of the bigram table, [8, T] int32. The row's first token has the last
    one. Products wrap as upstream's int32 do, and the second token's predecessor is the number that stands for the first.
    """
    rand_int_1, rand_int_2, mod = np.int32(36313), np.int32(27191), bigram_vocab_size - 1
    out = x.astype(np.int32)
    out[:, 0] = mod
    out[:, 1:] = ((rand_int_1 * out[:, 1:]) ^ (rand_int_2 * out[:, :-1])) % np.int32(mod)
    return out

def get_bigram_slots(bigram_inputs: np.ndarray, bigram_vocab_size: int) -> np.ndarray | None:
    """
    bigram_inputs [8, T] -> the slot in which each token's bigram is looked up, [8, T] int32 (lookup_owned): of an owner's room the first
    ones, in the tokens' order. None where more of a row's bigrams have one owner than there is room for.
    """
    n, T = device_count(), bigram_inputs.shape[1]
    owners = (bigram_inputs // (bigram_vocab_size // n)).astype(np.uint8)  # numpy sorts bytes fastest
    slots, room, place = np.empty_like(bigram_inputs), bigram_room(T), np.arange(T, dtype=np.int32)
    for row, owner in zip(slots, owners):
        counts = np.bincount(owner, minlength=n)
        if counts.max() > room:
            warn_once(f"more than {room} of a row's {T} bigrams are in one device's rows of the table (D4): such a batch takes a program "
                      "of its own, which is compiled when the first one comes; on a TPU that takes minutes")
            return None
        first = np.arange(n) * room - (counts.cumsum() - counts)  # slot - place in the order of owners
        row[owner.argsort(kind="stable")] = np.repeat(first.astype(np.int32), counts) + place
    return slots

def distributed_data_generator(filename_pattern: str, num_tokens: int, max_seq_len: int, align_to_bos: bool = True,
                               bos_id: int = BOS_ID, vocab_size: int = 50257, bigram_vocab_size: int = 50304 * 15 // 2,
                               max_num_docs: dict[int, int] | None = None, start: tuple[int, int] = (0, 0)):
    """
    Yields (inputs, targets, cum_seqlens, bigram_inputs), int32 arrays [8, T], cum_seqlens [8, at least upstream's max_num_docs], T =
    num_tokens / 8, and with them (shard, place in it) where the batch after this one begins: a generator with that as its start goes on
    from there. max_num_docs: upstream's room for documents by T, TRAIN_MAX_NUM_DOCS.
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
        finder = Shard(tokens, world_size, bos_id)
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
        room = (max_num_docs or TRAIN_MAX_NUM_DOCS).get(num_tokens_local, next_multiple_of_n(num_tokens_local // 300, n=128))

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

        room = max(room, 2 + max(map(len, cum_lengths)))  # many short documents: longer, where upstream fails
        _cum_lengths = np.full((world_size, room), num_tokens_local, dtype=np.int32)
        _cum_lengths[:, 0] = 0
        for row, lengths in zip(_cum_lengths, cum_lengths, strict=True):
            row[1:len(lengths) + 1] = lengths

        _inputs = buf[:, :-1].astype(np.int32)
        _bigram_inputs = get_bigram_hash(_inputs, bigram_vocab_size)

        new_params = yield (_inputs, buf[:, 1:].astype(np.int32), _cum_lengths, _bigram_inputs), (shard_idx, pos)

        if new_params is not None:
            # makes it possible for generator to receive new (num_tokens, max_seq_len) via .send()
            num_tokens, max_seq_len = new_params

def get_documents(cum_seqlens: np.ndarray) -> np.ndarray:
    """cum_seqlens [8, n] -> [8, T] int32, where in its row each token's document starts (D10)."""
    return np.stack([np.repeat(row[:-1], np.diff(row)) for row in cum_seqlens])

def pack(inputs: np.ndarray, targets: np.ndarray, cum_seqlens: np.ndarray, bigram_inputs: np.ndarray, bigram_vocab_size: int) -> Tensor:
    """
    A batch as the step takes it, in one piece so that it takes one transfer: inputs, targets, documents, bigrams and, on several devices,
    their slots, [8, 4 or 5, T] int32. A batch in which too many bigrams have one owner comes without: its step is another program, that
    has room for all.
    """
    slots = None if device_count() == 1 else get_bigram_slots(bigram_inputs, bigram_vocab_size)
    return torch.from_numpy(np.stack([inputs, targets, get_documents(cum_seqlens), bigram_inputs, *([] if slots is None else [slots])],
                                     axis=1))

def blank_batch(tokens: int) -> Tensor:
    """What pack makes of a batch of the turns of all devices, [devices, 4 or 5, tokens], all zeros: its shape, to trace with."""
    return torch.zeros(device_count(), 4 + (device_count() > 1), tokens, dtype=torch.int32)

def to_devices(batch: Tensor) -> list[Tensor]:
    """pack's batch -> on the devices, a row on each: [devices, 4 or 5, T] for each turn."""
    return [to_device(rows, "data") for rows in batch.split(device_count())]

def to_rows(losses: list[Tensor]) -> Tensor:
    """The losses of all 8 rows on the CPU, [8], from those of each turn. Waits for them."""
    return torch.cat([x.cpu() for x in losses])

def prefetch(batches, depth: int = 2):
    """
    Runs a generator of pack's arguments, position, numbers in a thread, depth batches ahead, and yields each as what a step
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

def of_stages(get: Callable):
    """A field of Hyperparameters: a number for each of TRAINING_STAGES, the record's by default."""
    return field(default_factory=lambda: tuple(get(stage) for stage in TRAINING_STAGES))

@dataclass
class Hyperparameters:
    # data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin" # shards in llm.c's format, read in the order of their names
    val_files: str = "data/fineweb10B/fineweb_val_*.bin" # the same, for validation
    val_tokens: int = 10485760 # validation tokens; another number gives losses that compare with nobody's
    # batch sizes
    val_batch_size: int = 4 * 64 * 1024 * 8
    # schedule
    num_scheduled_iterations: int = 1270  # the schedules are fractions of this
    num_extension_iterations: int = 15  # steps after that, at the last learning rate and windows
    cooldown_frac: float = 0.60  # part of the schedule in which the learning rate falls to 0.15
    # of each stage, in the place of TRAINING_STAGES' own
    train_bs_schedule: tuple = of_stages(lambda stage: stage.batch_size)
    train_max_seq_len_schedule: tuple = of_stages(lambda stage: stage.train_max_seq_len)
    ws_short_schedule: tuple = of_stages(lambda stage: stage.window_sizes[0])  # windows in blocks
    ws_long_schedule: tuple = of_stages(lambda stage: stage.window_sizes[1])
    ws_validate_post_yarn_ext: int = 20 # long windows of the last validation, with no further YaRN
    # evaluation and logging
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    train_loss_every: int = 25 # steps between reads of the training loss (upstream never reads it); 0: never
    val_loss_every: int = 250  # steps between validations; 0: only at the end
    save_checkpoint: bool = False # the last state in upstream's form, logs/RUN_ID/state_stepN.pt
    save_every: int = 0 # steps between checkpoints to resume from, logs/RUN_ID/checkpoint_stepN.pt; 0: none
    keep_checkpoints: int = 3 # how many of those are kept
    # bigram hash embedding
    bigram_vocab_size: int = 50304 * 15 // 2
    bigram_dim: int = 768  # model_dim
    bigram_sign_table_rows: int = 8192
    # the model: upstream writes these into its call of GPT
    block_size: int = 128
    dc_window: int = 112  # keys
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

@dataclass(frozen=True)
class TrainingStage:
    lr_mul: float
    batch_size: int
    window_sizes: tuple[int, int]  # (short, long) in blocks
    mtp_weights_start: list[float]
    mtp_weights_end: list[float]
    train_max_seq_len: int
    prefix_weight_start: float = 0.0
    prefix_weight_end: float = 0.0
    duration: float | None = None

class TrainingSchedule:
    """
    The stages of a run, from TRAINING_STAGES and args:
        1. Weights of the next tokens as targets: [1, 0.5, 0.25->0] -> [1, 0.5->0] -> [1] @varunneal
        2. Windows (1, 3) -> (3, 7) -> (5, 11) -> (6, 13), and YaRN where the long one changes
        3. lm_head and embed are one until 2/3 of training
        4. Batches of 8, 16 and 24 x 16384 tokens
        5. Long windows of 20 in the last validation
        6. Documents are cut to 896 tokens in the first stage, to 2048 from then on
    """
    def __init__(self, args: Hyperparameters, split_embed_stage: int = 2):
        self.args = args
        own = args.train_bs_schedule, args.train_max_seq_len_schedule, args.ws_short_schedule, args.ws_long_schedule
        self.stages = [replace(stage, batch_size=batch_size, train_max_seq_len=seq_len, window_sizes=(short, long))
                       for stage, batch_size, seq_len, short, long in zip(TRAINING_STAGES, *own, strict=True)]
        self.scheduled_iterations = args.num_scheduled_iterations
        self.cooldown_frac = args.cooldown_frac
        self.ws_post_yarn_ext = args.ws_validate_post_yarn_ext
        self.total_steps = args.num_iterations

        # the last stage is the extension
        ends = [0, *[round(c * self.scheduled_iterations) for c in itertools.accumulate(s.duration for s in self.stages[:-1])],
                self.total_steps]
        assert self.scheduled_iterations == ends[-2]
        self.boundaries = list(itertools.pairwise(ends))

        self.split_step = self.boundaries[split_embed_stage][0] | 1  # after an odd step, which Adam takes

        self.mtp_weights, self.prefix_weights = [], []
        for step in range(self.total_steps + 1):
            stage, t = self.lookup(step)
            self.mtp_weights.append([a + (b - a) * t for a, b in zip(stage.mtp_weights_start, stage.mtp_weights_end, strict=True)])
            self.prefix_weights.append(stage.prefix_weight_start + (stage.prefix_weight_end - stage.prefix_weight_start) * t)

    def lookup(self, step: int) -> tuple[TrainingStage, float]:
        """The stage of a step, and which part of it is over."""
        for stage, (start, end) in zip(self.stages, self.boundaries, strict=True):
            if step < end:
                return stage, (step - start) / (end - start)
        return self.stages[-1], 1.0

    def get_lr(self, step: int) -> float:
        """Learning rate factor: tied to the batch size, with a linear cooldown to 0.15."""
        lr = self.lookup(step)[0].lr_mul
        cd_start = int(self.scheduled_iterations * (1 - self.cooldown_frac))
        if step >= cd_start:
            t = min(1.0, (step - cd_start) / max(self.scheduled_iterations - cd_start, 1))
            lr = lr * (1 - t) + 0.15 * t
        return lr

TRAINING_STAGES = [
    TrainingStage(duration=1/3, train_max_seq_len=896, batch_size=8 * 2048 * 8, window_sizes=(1, 3), lr_mul=1.0,
                  mtp_weights_start=[1.0, 0.5, 0.25], mtp_weights_end=[1.0, 0.5, 0.0], prefix_weight_start=0.25, prefix_weight_end=0.25),
    TrainingStage(duration=1/3, train_max_seq_len=2048, batch_size=16 * 2048 * 8, window_sizes=(3, 7), lr_mul=1.52,  # (16/8)**0.6
                  mtp_weights_start=[1.0, 0.5], mtp_weights_end=[1.0, 0.0], prefix_weight_start=0.25, prefix_weight_end=0.0),
    TrainingStage(duration=1/3, train_max_seq_len=2048, batch_size=24 * 2048 * 8, window_sizes=(5, 11), lr_mul=1.73,  # (24/8)**0.5
                  mtp_weights_start=[1.0], mtp_weights_end=[1.0], prefix_weight_start=0.0, prefix_weight_end=0.0),
    # the extension
    TrainingStage(train_max_seq_len=2048, batch_size=24 * 2048 * 8, window_sizes=(6, 13), lr_mul=1.0,  # lr_mul is not used
                  mtp_weights_start=[1.0], mtp_weights_end=[1.0], prefix_weight_start=0.0, prefix_weight_end=0.0),
]

def get_muon_momentum(step: int, args: Hyperparameters, muon_warmup_steps=300, muon_cooldown_steps=50,
                      momentum_min=0.85, momentum_max=0.95):
    momentum_cd_start = args.num_iterations - muon_cooldown_steps
    if step < muon_warmup_steps:
        return momentum_min + step / muon_warmup_steps * (momentum_max - momentum_min)
    if step > momentum_cd_start:
        return momentum_max - (step - momentum_cd_start) / muon_cooldown_steps * (momentum_max - momentum_min)
    return momentum_max

@dataclass(frozen=True)
class Graph:
    """All that tells one compiled step from another. Steps that agree in it run the same program."""
    train: bool
    tokens: int  # a row
    ws_short: int
    ws_long: int
    n_mtp: int
    prefix: bool  # prefix token prediction
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
        step = f"{step if self.part == 'whole' else self.part}_mtp{self.n_mtp}{'_prefix' * self.prefix}" if self.train else "val"
        return f"{step}_{self.tokens}_ws{self.ws_short}_{self.ws_long}_{embed}"

    def programs(self, turns: int) -> list[tuple["Graph", int]]:
        """What runs for this step or this slice of validation, where each device takes so many turns; and how often."""
        if turns == 1 or not self.train:
            return [(self, turns)]
        row = replace(self, part="rows", adam=False, copy_embed=False)
        update = Graph(True, 0, 0, 0, 0, False, self.adam, self.adam and self.split_embed, self.copy_embed, "update")
        return [(row, turns), (update, 1)]

def get_graph(step: int, schedule: TrainingSchedule, train: bool = True) -> Graph:
    """The graph of training step `step`, or of the validation before it."""
    stage, _ = schedule.lookup(step)
    ws_short, ws_long = stage.window_sizes
    if not train and step == schedule.total_steps:
        ws_long = schedule.ws_post_yarn_ext  # longer still for the last validation, with no further YaRN
    prefix = train and (stage.prefix_weight_start, stage.prefix_weight_end) != (0.0, 0.0)
    return Graph(train, (stage.batch_size if train else schedule.args.val_batch_size) // ROWS, ws_short, ws_long,
                 len(stage.mtp_weights_start) if train else 0, prefix, train and step % 2 == 1, step > schedule.split_step,
                 train and step == schedule.split_step)

def is_val_step(step: int, args: "Hyperparameters") -> bool:
    return step == args.num_iterations or (args.val_loss_every > 0 and step % args.val_loss_every == 0)

def distinct_graphs(args: "Hyperparameters", turns: int = 1) -> dict[Graph, list[int]]:
    """
    Every graph of a run with the steps that use it, in order of first use. Warm-up, compilation ahead of time and tests go by it.
    turns: how often a device takes its turn in a step, spmd.turns().
    """
    graphs, schedule = {}, TrainingSchedule(args)
    for step in range(args.num_iterations + 1):
        for train in (False, True):
            if step < args.num_iterations if train else is_val_step(step, args):
                for graph, _ in get_graph(step, schedule, train).programs(turns):
                    graphs.setdefault(graph, []).append(step)
    return graphs

def flops_per_token(graph: Graph, args: "Hyperparameters") -> float:
    """
    FLOPs of training on one token with this graph, forward and backward (two products for each one forward): 6 for each weight of
    attention, MLPs and lm_head, 12 x model_dim for each key that a query sees. Those are the keys in its window in a document of
    the most tokens that a stage with these windows has, which is an upper bound: few documents are that long. Not counted: gates,
    embeddings, optimizers, whatever the backward pass computes again.
    """
    lengths = [n for n, *windows in zip(args.train_max_seq_len_schedule, args.ws_short_schedule, args.ws_long_schedule, strict=True)
               if windows == [graph.ws_short, graph.ws_long]]
    d, length, block = args.model_dim, min(max(lengths, default=graph.tokens), graph.tokens), args.block_size
    weights = (args.num_layers - 1) * 4 * d * d + args.num_layers * 8 * d * d + next_multiple_of_n(args.vocab_size, n=128) * d
    def keys(window, length):
        window = min(window, length - 1)
        return (window + 1) * (1 - window / (2 * length))  # the mean of min(i, window) + 1 over i < length
    short, long = graph.ws_short * block, graph.ws_long * block
    return 6 * weights + 12 * d * (4 * keys(short, 2 * length) + 4 * keys(short, length) + 2 * keys(long, length)  # 4 of paired heads
                                   + keys(args.dc_window - 1, length))

def work_until(args: "Hyperparameters") -> tuple[list[int], list[float]]:
    """Tokens and FLOPs of all training steps before step 0, 1, ... num_iterations."""
    graphs = [get_graph(step, schedule) for schedule in [TrainingSchedule(args)] for step in range(args.num_iterations)]
    tokens = [graph.tokens * ROWS for graph in graphs]
    per_token = {graph: flops_per_token(graph, args) for graph in set(graphs)}
    flops = [n * per_token[graph] for n, graph in zip(tokens, graphs, strict=True)]
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
    prefix_weight: list[float] | Tensor  # [1]
    yarn: list[float] | Tensor  # Yarn.numbers()
    yarn_paired_head: list[float] | Tensor
    muon_lr: float | Tensor
    muon_momentum: float | Tensor
    adam: dict[str, tuple]  # (step_size, eff_wd) by label

    def pack(self) -> Tensor:
        """[n] float32."""
        return torch.tensor([*self.mtp_weights, *self.prefix_weight, *self.yarn, *self.yarn_paired_head, self.muon_lr, self.muon_momentum,
                             *itertools.chain.from_iterable(self.adam.values())])

    @classmethod
    def unpack(cls, packed: Tensor, yarn: int, labels: list[str]) -> "StepNumbers":
        """yarn: how many numbers YaRN has; labels: Adam's, in order."""
        mtp_weights, prefix_weight, *yarns, muon, adam = packed.split([3, 1, yarn, yarn, 2, 2 * len(labels)])
        adam = adam.unbind()
        return cls(mtp_weights, prefix_weight, *yarns, *muon.unbind(), dict(zip(labels, zip(adam[::2], adam[1::2]))))

class TrainingManager():
    """
    Owns NorMuonAndAdam and all that changes from step to step.
        1. Scalars get more momentum @ChrisJMcCormick
        2. Adam steps on odd steps only, on the sum of two gradients @classiclarryd
        3. NorMuon's momentum rises and falls linearly, as learning rates fall
        4. lm_head and embed are one until 2/3 of training, then split @classiclarryd

    What changes with every step is computed ahead of the run by advance_schedule and get_numbers.
    """
    def __init__(self, model: GPT, args: "Hyperparameters", replay: bool = True):
        self.model = model
        self.args = args
        self.training_schedule = TrainingSchedule(args)
        # D14: torch.compile's counterpart. Each distinct program is traced once and replayed from then on
        self.replay = Replay(self.program, self.tensors, self.constants, enabled=replay)

        # rates and decay are multiplied by lr_mul and wd_mul
        self.param_table = {
            "qk_bank":        {"optim": "normuon", "comms": "sharded"},
            "vo_bank":        {"optim": "normuon", "comms": "sharded"},
            "mlp_bank":       {"optim": "normuon", "comms": "sharded"},
            "scalars":        {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.99], "lr_mul": 5.0,  "wd_mul": 0.0},
            "smear_gate":     {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.99], "lr_mul": 0.01, "wd_mul": 0.0},
            "ve_gate_bank":   {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.99]},
            "lm_head":        {"optim": "adam",    "comms": "sharded",    "adam_betas": [0.5,  0.95], "wd_mul": 150.},
            "bigram_embed":   {"optim": "adam",    "comms": "owned",      "adam_betas": [0.75, 0.95], "lr_mul": 75.,  "wd_mul": 5.0},
            "post_lambdas":   {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.95], "lr_mul": 1.0,  "wd_mul": 0.0},
            "resid_lambdas":  {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.95], "lr_mul": 5.0,  "wd_mul": 0.0},
            "value_embeds":   {"optim": "adam",    "comms": "sharded",    "adam_betas": [0.75, 0.95], "lr_mul": 75.,  "wd_mul": 5.0},
            "embed":          {"optim": "adam",    "comms": "sharded",    "adam_betas": [0.5,  0.95], "wd_mul": 150.},

            "mudd_w1":        {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.99], "lr_mul": 0.25},
            "mudd_w2":        {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.99], "lr_mul": 0.25},
            "mudd_b2":        {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.99], "lr_mul": 0.25, "wd_mul": 0.0},
            "mudd_gate_w1":   {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.99], "lr_mul": 0.1},
            "mudd_gate_w2":   {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.99], "lr_mul": 0.1},
            "mudd_gate_b2":   {"optim": "adam",    "comms": "replicated", "adam_betas": [0.9,  0.99], "lr_mul": 0.1,  "wd_mul": 0.0},
            "_mudd_gate_scale": {"optim": "adam",  "comms": "replicated", "adam_betas": [0.9,  0.99], "lr_mul": 0.1,  "wd_mul": 0.0},
        }
        # - D12: a table's gradient waits for the new weights before it, whose all-gather then runs beside the kernels that make it: the
        #   banks' beside value_embeds', value_embeds' beside lm_head's, which take as long. Upstream has the banks last
        self.work_order = [
            "qk_bank", "vo_bank", "mlp_bank",
            "value_embeds",
            "lm_head", "embed",
            "bigram_embed",
            "scalars", "smear_gate", "ve_gate_bank", "mudd_b2", "mudd_gate_b2", "_mudd_gate_scale",
            "post_lambdas", "resid_lambdas",
            "mudd_w2", "mudd_gate_w2", "mudd_w1", "mudd_gate_w1",
        ]

        adam_defaults = dict(
            lr=0.008,
            eps=1e-10,
            weight_decay=0.005,
        )
        normuon_defaults = dict(
            lr=0.023,
            beta2=0.9,
            weight_decay=1.2,
        )
        self.optimizer = NorMuonAndAdam(model.named_parameters(), self.param_table, self.work_order, adam_defaults, normuon_defaults)
        self.reset()
        self.adam_labels = list(self.optimizer.get_numbers(0.0))

    def advance_schedule(self, step: int, train: bool = True):
        """Host only: the graph of this step (or of the validation before it), YaRN where the window changes, Adam's count of its steps."""
        _, new_ws_long = self.training_schedule.lookup(step)[0].window_sizes
        if new_ws_long != self.ws_long:
            for yarn in self._yarns().values():
                yarn.apply(self.ws_long * self.model.block_size, new_ws_long * self.model.block_size)
        self.ws_long = new_ws_long
        self.step = step
        self.graph = get_graph(step, self.training_schedule, train)
        self.model.split_embed = self.graph.split_embed
        if self.model.training != train:
            self.model.train(train)
        if self.graph.adam:
            self.optimizer.advance(self.graph.split_embed)

    def get_numbers(self) -> Tensor:
        """Host only: StepNumbers of this step, packed."""
        lr = self.training_schedule.get_lr(self.step)
        return StepNumbers(
            mtp_weights = (self.training_schedule.mtp_weights[self.step] + [0.0, 0.0])[:3],
            prefix_weight = [self.training_schedule.prefix_weights[self.step]],
            yarn = self.model.yarn.numbers(),
            yarn_paired_head = self.model.yarn_paired_head.numbers(),
            muon_lr = self.optimizer.param_cfgs[self.model.qk_bank].initial_lr * lr,
            muon_momentum = get_muon_momentum(self.step, self.args),
            adam = self.optimizer.get_numbers(lr)
        ).pack()

    def precompute(self, steps) -> list[Tensor]:
        """
        Host only: the numbers of these training steps, the next ones. The schedule stays where it is, and the optimizers' settings have to:
        a step raises ValueError where they are no longer what its numbers were made with.
        """
        schedule, counts = self.get_schedule(), [state.get("step") for state in self.optimizer.param_states.values()]
        numbers = []
        for step in steps:
            self.advance_schedule(step)
            numbers.append(self.get_numbers())
        self.set_schedule(schedule)
        for state, count in zip(self.optimizer.param_states.values(), counts, strict=True):
            if count is not None:
                state["step"] = count
        self.precomputed = self.settings()
        return numbers

    def unpack(self, numbers: Tensor) -> "StepNumbers":
        return StepNumbers.unpack(numbers, len(self.model.yarn.numbers()), self.adam_labels)

    def get_forward_args(self, numbers: "StepNumbers"):
        return ForwardScheduleConfig(
            # the mean over ranks, which upstream's reduce_scatter takes: here, and no gradient has to be divided
            mtp_weights = numbers.mtp_weights[:self.graph.n_mtp] / ROWS,
            prefix_weight = numbers.prefix_weight / ROWS if self.graph.prefix else None,
            ws_short = self.graph.ws_short * self.model.block_size,
            ws_long = self.graph.ws_long * self.model.block_size,
            yarn = numbers.yarn,
            yarn_paired_head = numbers.yarn_paired_head,
            keep = self.what_to_keep(self.graph) if self.graph.train else None
        )

    def what_to_keep(self, graph: Graph) -> Kept:
        """Refused where the step cannot fit."""
        held = self.tensors()
        if graph.part == "whole":  # an even step does not read the gradients that lie there, so its own cannot take their place
            held += [state["grad"] for state in self.optimizer.param_states.values() if "grad" in state]
        held = sum(x.nbytes // (device_count() if is_split(x) else 1) for x in held)
        rows = ROWS // device_count() // turns()
        return what_to_keep(rows * graph.tokens, self.model.num_layers, *reversed(self.model.lm_head.weight.shape), held)

    def step_optimizers(self, gradients: Gradients, numbers: "StepNumbers"):
        self.optimizer.step(gradients, numbers.muon_lr, numbers.muon_momentum, numbers.adam if self.graph.adam else None)
        if self.graph.copy_embed:
            self.optimizer.copy_lm_state_to_embed()

    def forward(self, batch: Tensor, numbers: Tensor, weights: dict[str, Tensor], targets: bool = True) -> Tensor:
        """
        The model on each device's own rows of pack's batch: upstream's ranks. weights: on each device, by name. Returns what is on each
        device: the losses of its rows or, without targets, what lm_head reads.
        """
        # D18: what enters is one device's own, and XLA splits and moves nothing until it leaves
        buffers = {name: enter(b) for name, b in self.model.named_buffers()}
        input_seq, target_seq, documents, bigram_input_seq, *bigram_slots = enter(batch, "data").unbind(1)
        cfg = self.get_forward_args(self.unpack(enter(numbers)))
        inputs = input_seq, target_seq if targets else None, documents, bigram_input_seq, cfg, *bigram_slots
        return torch.func.functional_call(self.model, weights | buffers, inputs)

    def backward(self, batch: Tensor, numbers: Tensor) -> tuple[Tensor, Gradients]:
        """
        Forward and backward pass on a batch, or the rows whose turn it is. Returns what is on each device: the losses of its rows,
        and its gradients, in an odd step on top of those that it keeps from the even one, in turns of those of the rows before.
        """
        weights = {name: x.requires_grad_() for name, x in self.model.enter_weights().items()}
        rows = self.graph.part == "rows"
        gradients = Gradients(self.optimizer.addresses(on_top=rows or self.graph.adam, in_place=rows))
        with gradients.receive({p: weights[name] for name, p in self.model.named_parameters()}):
            losses = self.forward(batch, numbers, weights)
            losses.sum().backward()
        return losses.detach() * ROWS, gradients

    def training_step(self, batch: Tensor, numbers: Tensor) -> Tensor:
        """One whole step on pack's batch. Returns the loss of each row, [8]."""
        begin_program()
        losses, gradients = self.backward(batch, numbers)
        self.step_optimizers(gradients, self.unpack(numbers))
        return shard(leave(losses).flatten())

    def rows_step(self, batch: Tensor, numbers: Tensor) -> Tensor:
        """D24: on fewer than 8 devices, the turn of one row on each. Returns their losses, [devices]."""
        begin_program()
        losses, gradients = self.backward(batch, numbers)
        self.optimizer.keep(gradients)
        return shard(leave(losses).flatten())

    @torch.no_grad()
    def update_step(self, numbers: Tensor) -> Tensor:
        """After the turns of all 8 rows: the optimizers' step on their gradients. Returns the numbers."""
        begin_program()
        gradients = Gradients(self.optimizer.accumulated(self.graph.adam, self.graph.split_embed))
        self.step_optimizers(gradients, self.unpack(numbers))
        self.optimizer.clear(self.graph.adam, self.graph.split_embed)
        return shard(numbers.clone())

    def program(self, *inputs: Tensor) -> Tensor:
        """What self.graph says, traced."""
        if not self.graph.train:
            return self.validation_step(*inputs)
        return dict(whole=self.training_step, rows=self.rows_step, update=self.update_step)[self.graph.part](*inputs)

    def run(self, batch: list[Tensor], numbers: Tensor) -> list[Tensor]:
        """
        The training step or slice of validation that advance_schedule has come to, replayed. batch: to_devices', of each
        turn. Returns the losses of the rows, [devices] for each turn.
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
        """The mean loss of each row of pack's batch, [8]."""
        begin_program()
        losses = self.forward(batch, numbers, self.model.enter_weights())
        return shard(leave(losses).flatten())

    def constants(self) -> tuple:
        """What a step takes from Python: part of a recording's key, so that a change of any of it is recorded anew."""
        settings = self.settings()
        if self.precomputed not in (None, settings):
            before, now = next((a, b) for a, b in itertools.zip_longest(self.precomputed, settings) if a != b)
            raise ValueError(f"an optimizer's settings are {now}, but the numbers of the steps to come were made with {before}: set them "
                             "before training, or call precompute() again and send what it returns")
        return (tuple(map(type, self._modules())), tuple(self.model.paired_head_layers), self.model.block_size, self.model.dc_window,
                settings)

    def settings(self) -> tuple:
        """The optimizer's, of each parameter."""
        return tuple((cfg.label, cfg.initial_lr, cfg.weight_decay, cfg.lr_mul, cfg.wd_mul, cfg.adam_betas, cfg.eps, cfg.beta2)
                     for cfg in self.optimizer.param_cfgs.values())

    def tensors(self) -> list[Tensor]:
        """All tensors on the devices that a step reads or updates: weights and the optimizers' state."""
        return [*(x for m in self._modules() for x in (*m._parameters.values(), *m._buffers.values()) if x is not None),
                *self.optimizer.tensors()]

    def _modules(self) -> list[nn.Module]:
        """Those of the model, for every step: modules() would make up their names each time."""
        modules = [self.model]
        for m in modules:
            modules += filter(None, m._modules.values())
        return list(dict.fromkeys(modules))

    def _state(self) -> dict:
        return {name: self.optimizer.param_states[p] for name, p in self.model.named_parameters()}

    def get_state(self, lazy: bool = False) -> dict:
        """
        The optimizer's state on the CPU, as a dict of whole tensors for each parameter's name. For the end of an odd step: without the
        gradients that an even step leaves to the odd one, eight times as large as the model's. lazy: functions that return the tensors,
        which leaves the joining of their parts to another thread.
        """
        # one by one: the next copy takes the memory that the last one has just given back, and new memory is dear
        copy = lambda x: to_host(x, lazy) if isinstance(x, Tensor) else x
        return {name: {k: copy(x) for k, x in state.items() if k != "grad"} for name, state in self._state().items()}

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

    def set_state(self, optimizer: dict, schedule: dict):
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
        match("NorMuonAndAdam", states, optimizer)
        match("schedule", self.get_schedule(), schedule)
        for mine, value in pairs:
            if mine.device.type == "xla":
                assign(mine, value)
        for name, state in states.items():
            if "step" in state:
                state["step"] = optimizer[name]["step"]
        self.set_schedule(schedule)

    def reset(self):
        """Back to step 0, with the model's weights as they are."""
        self.precomputed = None
        self.optimizer.reset()
        self.model.split_embed = False
        _, self.ws_long = self.training_schedule.lookup(0)[0].window_sizes
        self.model.yarn.reset()
        self.model.yarn_paired_head.reset()

# -----------------------------------------------------------------------------
# int main

# Where a run's files are, and how it is watched. All other fields are about its result; the data are told apart by what is in them
WATCHING = ("run_id", "train_files", "val_files", "train_loss_every", "save_checkpoint", "save_every", "keep_checkpoints")

def hyperparameters(args: Hyperparameters) -> dict:
    """The fields that the numbers of a run depend on."""
    return {f.name: getattr(args, f.name) for f in fields(args) if f.name not in WATCHING}

# The smallest and the largest value of a number, or of each number in a tuple; a string's pattern, and in words what it stands for
INT32 = 2**31 - 1
STEPS = 10**6  # the numbers of all steps are made before the first
RANGES = dict(
    val_tokens=(1, INT32), train_bs_schedule=(128, INT32), train_max_seq_len_schedule=(2, INT32),
    val_batch_size=(128, INT32), num_scheduled_iterations=(3, STEPS), num_extension_iterations=(0, STEPS), cooldown_frac=(1e-6, 1),
    train_loss_every=(0, INT32), val_loss_every=(0, INT32), save_every=(0, INT32), keep_checkpoints=(1, INT32),
    block_size=(1, 2**14), dc_window=(1, 2**16), ws_short_schedule=(1, 2**16), ws_long_schedule=(1, 2**16),
    ws_validate_post_yarn_ext=(1, 2**16), bigram_vocab_size=(16, 2**30), bigram_dim=(12, 2**20), bigram_sign_table_rows=(1, 2**20),
    vocab_size=(2, 2**16), bos_id=(0, 2**16 - 1), num_layers=(11, 11), num_heads=(6, 6), head_dim=(4, 2**10), model_dim=(12, 2**20),
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
                       f"it must be {low}, which the record's wiring (windows, skips, gates) is for")
    for name in ("train_bs_schedule", "train_max_seq_len_schedule", "ws_short_schedule", "ws_long_schedule"):
        if not isinstance(getattr(args, name), tuple) or len(getattr(args, name)) != len(TRAINING_STAGES):
            refuse(name, f"it must be {len(TRAINING_STAGES)} numbers, one for each of TRAINING_STAGES")
    for name in ("train_bs_schedule", "val_batch_size"):
        value = getattr(args, name)
        if any(bs % (ROWS * 16) for bs in (value if isinstance(value, tuple) else (value,))):
            refuse(name, "batch sizes must be multiples of 8 rows x 16 tokens = 128")
    if args.val_tokens % args.val_batch_size:
        refuse("val_tokens", f"it must be a multiple of val_batch_size {args.val_batch_size}")
    if args.bos_id >= args.vocab_size:
        refuse("bos_id", f"it must be a token of the vocabulary, less than vocab_size {args.vocab_size}")
    if args.num_heads * args.head_dim != args.model_dim or args.head_dim % 4:
        raise ValueError(f"num_heads {args.num_heads} x head_dim {args.head_dim} must be model_dim {args.model_dim}, "
                         "with head_dim a multiple of 4")
    if args.bigram_dim != args.model_dim:
        refuse("bigram_dim", f"it must be model_dim {args.model_dim}")
    if args.bigram_vocab_size % ROWS:
        refuse("bigram_vocab_size", "it must be a multiple of 8, as the devices share its rows")
    if list(args.ws_long_schedule) != sorted(args.ws_long_schedule):
        refuse("ws_long_schedule", "long windows may only grow, as YaRN stretches the rotary frequencies from each to the next")

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

    schedule, most = TrainingSchedule(args), max(args.train_max_seq_len_schedule)
    steps, documents, usable = 0, 0, 0  # steps that the shards so far suffice for; tokens of documents cut to `most`
    for file in train:
        if steps == args.num_iterations:
            break
        tokens = _load_data_shard(file, args.vocab_size)
        finder = Shard(tokens, bos_id=args.bos_id)
        if not len(finder.bos_idx):
            raise no_document_start(file, args.bos_id)
        data["train_files"].append((file.name, len(tokens), zlib.crc32(tokens)))
        documents += len(finder.bos_idx)
        usable += int(np.minimum(np.diff(finder.bos_idx, append=len(tokens)), most).sum())
        with contextlib.suppress(StopIteration):
            while steps < args.num_iterations:
                stage, _ = schedule.lookup(steps)
                finder.next_batch(stage.batch_size // ROWS, stage.train_max_seq_len)
                steps += 1
    if steps < args.num_iterations:
        held, needed = sum(n for _, n, _ in data["train_files"]), work_until(args)[0][-1]
        raise ValueError(
            f"train_files {args.train_files}: {held:,} tokens in {documents:,} documents and {len(train)} shard{'s' * (len(train) > 1)} "
            f"last for {steps} of {args.num_iterations} steps, which take {needed:,} tokens and more at the ends of rows and shards. Of a "
            f"document, at most {most} tokens are read (train_max_seq_len_schedule), so {usable:,} in all: {more(train)}, "
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

def prefix_vocabulary(args: Hyperparameters) -> dict[bytes, int]:
    """
    What build_prefix_table takes: GPT-2's vocabulary, or nothing where the tokens are single bytes, which have no prefixes, or another
    vocabulary's. OSError where tiktoken cannot get it.
    """
    gpt2 = args.vocab_size == 50257 and args.bos_id == BOS_ID
    files = find_shards(args.train_files) if gpt2 else []
    if not any(((tokens >= 256) & (tokens != BOS_ID)).any() for tokens in (_load_data_shard(file, args.vocab_size) for file in files)):
        return {}
    return vocabulary.gpt2()._mergeable_ranks

def build(args: Hyperparameters, replay: bool = True) -> TrainingManager:
    """The model of args and its optimizers, on the devices."""
    model = GPT(
        vocab_size=args.vocab_size,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        head_dim=args.head_dim,
        model_dim=args.model_dim,
        block_size=args.block_size,
        dc_window=args.dc_window,
        bigram_vocab_size=args.bigram_vocab_size,
        bigram_sign_table_rows=args.bigram_sign_table_rows,
    )
    return TrainingManager(model.to_devices(getattr(torch, args.dtype)), args, replay)

# The rehearsal: all that the record does, small enough for 8 virtual devices on a CPU.
presets = {
    "record": Hyperparameters,
    "rehearsal": lambda **kwargs: Hyperparameters(**{**dict(
        train_files="data/demo/demo_train_*.bin", val_files="data/demo/demo_val_*.bin", val_tokens=8 * 2048,
        train_bs_schedule=(8 * 128, 8 * 256, 8 * 384, 8 * 384), train_max_seq_len_schedule=(64, 128, 128, 128), val_batch_size=8 * 1024,
        num_scheduled_iterations=78, num_extension_iterations=8, val_loss_every=43, block_size=16, dc_window=14,
        bigram_vocab_size=4096, bigram_dim=48, bigram_sign_table_rows=512, num_heads=6, head_dim=8, model_dim=48), **kwargs}),
}

# Flags of libtpu, for the run and for compilation ahead of time (tools/aot.py), beyond those that torch_xla sets: the bigram table's
# exchange runs beside other work, and so do all-gathers: several at a time, where libtpu's default is one, and beside elementwise fusions
# too, where it takes products only. What an all-gather replaces is not copied first.
LIBTPU_INIT_ARGS = " ".join([
    "--xla_tpu_enable_async_all_to_all=true",
    "--xla_max_concurrent_async_all_gathers=4",
    "--xla_tpu_async_collective_fusion_fuse_multiple_collectives=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions=true",
    "--xla_tpu_async_collective_fusion_with_start_done_only=true",
])

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
        """The loss of the last step, per token, with the weights of multi-token and prefix token prediction."""
        tokens = lambda step: self.work[0][step + 1] - self.work[0][step]
        read = lambda step, losses: to_rows(losses).mean().item() / (tokens(step) // ROWS)
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
    loader, schedule = None, TrainingSchedule(args)
    for step, n in zip(steps, numbers, strict=True):
        stage, _ = schedule.lookup(step)
        send_args = stage.batch_size, stage.train_max_seq_len
        if loader is None:
            loader = distributed_data_generator(args.train_files, *send_args, bos_id=args.bos_id, vocab_size=args.vocab_size,
                                                bigram_vocab_size=args.bigram_vocab_size, start=start)
            arrays, position = next(loader)
        else:
            arrays, position = loader.send(send_args)
        yield (*arrays, args.bigram_vocab_size), position, n

def val_batches(args: Hyperparameters, val_steps: int, numbers: Tensor):
    loader = distributed_data_generator(args.val_files, args.val_batch_size, -1, align_to_bos=False, bos_id=args.bos_id,
                                        vocab_size=args.vocab_size, bigram_vocab_size=args.bigram_vocab_size)
    for arrays, position in itertools.islice(loader, val_steps):
        yield (*arrays, args.bigram_vocab_size), position, numbers

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
    return dict(step=step, code=code, model=training_manager.model.state_dict(), optimizer=training_manager.get_state(lazy=True),
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
    byte_to_id = prefix_vocabulary(args)
    if not byte_to_id:
        print0("no prefix token prediction: the training data are single bytes or not of GPT-2's vocabulary", console=True)

    torch.manual_seed(args.seed)
    if xr.device_type() == "TPU":
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {LIBTPU_INIT_ARGS}".strip()
        xr.initialize_cache(os.path.expanduser("~/.cache/modded-nanogpt-xla"))
    # on a CPU most of a rehearsal is compilation: LLVM's level 1 takes three quarters of the time, and steps run as fast
    setup_devices(f"{FUSE_ONCE} --xla_backend_optimization_level=1")

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
    for graph in distinct_graphs(args, turns()):
        if graph.train:
            training_manager.what_to_keep(graph)  # now, not when some graphs have been compiled
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
            training_manager.set_state(saved["optimizer"], saved["schedule"])
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
    model.set_prefix_table(build_prefix_table(model.vocab_size, byte_to_id))
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
            print0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{training_time_ms:.0f}ms "
                   f"step_avg:{training_time_ms/max(step, 1):.2f}ms", console=True)
            if log.wandb:
                log.wandb.log(step, val_loss=val_loss, train_time_ms=training_time_ms)
            # start the clock again
            xm.wait_device_ops()
            t0 = time.perf_counter()

        if last_step:
            if args.save_checkpoint:
                state = dict(step=step, code=code, model=model.state_dict(), optimizer=training_manager.get_state(),
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
    except (ValueError, EOFError, OSError, FloatingPointError, Refused) as e:
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
