"""
TPU kernels, each beside the plain-torch twin that CPUs run and that the tests hold it to. Upstream's counterparts are
FlashAttention-3 and the Triton kernels of train_gpt.py.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

# -----------------------------------------------------------------------------
# Sliding-window attention within documents (upstream: flash_attn_varlen_func with cu_seqlens and window_size=(window, 0))

def window_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, scale: Tensor, paired: bool = False) -> Tensor:
    """
    softmax(scale * q @ k.T) @ v where position i sees positions max(documents[i], i - window) .. i, both ends included.

    q, k, v: [B, H, T, D]. documents: [B, T] int32, the position in its row at which each token's document starts.
    window: tokens. scale: 0-D float32. Returns [B, H, T, D] in q's dtype.
    paired: heads h and h + H/2 form one sequence of length 2T, in which they take turns (position 2t, then 2t + 1);
    window counts positions of that sequence.
    """
    if not paired:
        return BandedAttention.apply(q, k, v, documents, window, scale)
    turns = lambda x: torch.stack(x.chunk(2, dim=1), dim=3).flatten(2, 3)  # [B, H, T, D] -> [B, H/2, 2T, D]
    y = BandedAttention.apply(turns(q), turns(k), turns(v), 2 * documents.repeat_interleave(2, dim=1), window, scale)
    return torch.cat(y.unflatten(2, (-1, 2)).unbind(3), dim=1)


class BandedAttention(torch.autograd.Function):
    """
    The plain-torch twin: queries in blocks of C, each against its own block of keys and the n before it that the window
    can reach, so memory is O(T x window). The backward pass recomputes the probabilities, as FlashAttention does.
    """
    @staticmethod
    def bands(q, k, v, documents, window):
        T = q.size(2)
        C = 1 << min(9, max(4, window.bit_length() - 1))  # largest power of two within the window, from 16 to 512
        nb = -(-T // C)
        n = min(-(-window // C), nb - 1)
        block = lambda x: F.pad(x, (0, 0, 0, nb * C - T)).unflatten(2, (nb, C)).float()  # [B, H, nb, C, D]
        def band(x):  # [B, H, nb, (n + 1) * C, D]
            x = F.pad(x, (0, 0, n * C, nb * C - T))
            return torch.cat([x[:, :, j * C:(j + nb) * C].unflatten(2, (nb, C)) for j in range(n + 1)], dim=3).float()
        pos = torch.arange(nb * C, device=q.device, dtype=torch.int32)
        first = torch.maximum(F.pad(documents, (0, nb * C - T)), pos - window)  # [B, nb * C]
        first = torch.minimum(first, pos).view(-1, 1, nb, C, 1)
        q_pos = pos.view(nb, C, 1)
        k_pos = q_pos[:, :1] + torch.arange(-n * C, C, device=q.device, dtype=torch.int32)  # [nb, 1, (n + 1) * C]
        return block(q), band(k), band(v), (k_pos >= first) & (k_pos <= q_pos), block, (T, C, nb, n)

    @staticmethod
    def forward(ctx, q, k, v, documents, window, scale):
        q_, k_, v_, visible, _, (T, C, nb, n) = BandedAttention.bands(q, k, v, documents, window)
        s = (q_ @ k_.mT * scale).masked_fill(~visible, -torch.inf)
        lse = s.logsumexp(-1, keepdim=True)  # [B, H, nb, C, 1]
        y = ((s - lse).exp().to(v.dtype).float() @ v_).flatten(2, 3)[:, :, :T].to(q.dtype)
        ctx.window = window
        ctx.save_for_backward(q, k, v, documents, scale, y, lse)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, documents, scale, y, lse = ctx.saved_tensors
        q_, k_, v_, visible, block, (T, C, nb, n) = BandedAttention.bands(q, k, v, documents, ctx.window)
        dy_ = block(dy)
        p = (q_ @ k_.mT * scale - lse).masked_fill(~visible, -torch.inf).exp()
        delta = (dy_ * block(y)).sum(-1, keepdim=True)
        ds = (p * (dy_ @ v_.mT - delta) * scale).to(q.dtype).float()
        def unband(g):  # adds up what each key received from the n + 1 blocks of queries that see it
            parts = g.unflatten(3, (n + 1, C)).unbind(3)
            return sum(F.pad(x.flatten(2, 3), (0, 0, j * C, (n - j) * C)) for j, x in enumerate(parts))[:, :, n * C:n * C + T]
        dq = (ds @ k_).flatten(2, 3)[:, :, :T]
        dk = unband(ds.mT @ q_)
        dv = unband(p.to(q.dtype).float().mT @ dy_)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None
