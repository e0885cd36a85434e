"""
lm_head and its loss: the plain-torch twin, train_gpt_xla.FusedSoftcappedCrossEntropy, against the definition, and the TPU kernels,
interpreted, against the twin.

    python -m pytest -q tests/test_lm_head.py -m "not slow"
    python -m pytest -q tests/test_lm_head.py                 the whole grid, some minutes more
"""
import dataclasses

import eager
import pytest
import torch

import train_gpt_xla as train
from chips import CHIPS
from gradients import Gradients, Sum
from kernels import dispatch, lm_head_losses, takes_lm_head
from kernels.lm_head import get_lm_head, lm_head_refuses

MTP = [1.0, 0.5, 0.25]
TOLERANCE = 1e-5

def inputs(B: int, T: int, d: int, V: int, dtype) -> dict[str, torch.Tensor]:
    """
    targets with runs of one id and the vocabulary's ends; prefixes: none, a token's own target or one of the next, others, at a row's end,
    too; an uneven gradient of the losses.
    """
    generator = torch.Generator().manual_seed(T + V)
    x = torch.randn(B, T, d, generator=generator).to(dtype)
    weight = (torch.randn(V, d, generator=generator) * 3 * d**-0.5).to(dtype)
    targets = torch.randint(0, V, (B, T), generator=generator, dtype=torch.int32)
    targets[:, T // 2 - 3:T // 2 + 3] = 7  # across blocks of tokens
    targets[:, 1], targets[:, -1] = 0, V - 1
    weight[..., 0], x[:, 5, 0] = 1, -500  # a token to which all logits say no: what lies beyond the vocabulary would count
    prefix = torch.where(torch.rand(B, T, generator=generator) < 0.3, -1, torch.randint(0, V, (B, T), generator=generator)).int()
    prefix[:, 10:20], prefix[:, 20:30], prefix[:, T // 2 - 3:T // 2 + 1] = targets[:, 10:20], targets[:, 21:31], 7
    prefix[:, 0], prefix[:, 1], prefix[:, -3], prefix[:, -2], prefix[:, -1] = -1, V - 1, V - 1, 3, -1
    prefix[0, -1] = targets[0, -1]
    return dict(x=x, weight=weight, targets=targets, prefix=prefix, prefix_weight=torch.tensor([0.375]),
                dlosses=torch.rand(B, T, generator=generator) * 2 - 0.5)

def forward_backward(tensors: dict[str, torch.Tensor], n: int, with_prefix: bool, sum_: Sum | None, p_tokens: int = 0):
    """The losses and both gradients, as GPT.forward calls it. sum_: where the weight's gradient goes; None: to autograd."""
    x, weight = (tensors[name].clone().requires_grad_() for name in ("x", "weight"))
    mtp_weights = torch.tensor(MTP[:n])
    prefixes = (tensors["prefix"], tensors["prefix_weight"]) if with_prefix else (None, None)
    def losses_of():
        if takes_lm_head(x, weight):
            return lm_head_losses(x, weight, tensors["targets"], mtp_weights, *prefixes, p_tokens)
        return train.FusedSoftcappedCrossEntropy.apply(x, tensors["targets"], mtp_weights, *prefixes, weight)
    if sum_ is None:
        losses = losses_of()
        losses.backward(tensors["dlosses"])
        return dict(losses=losses.detach(), x=x.grad.float(), weight=weight.grad.float())
    p = torch.nn.Parameter(weight.detach())
    with Gradients({p: sum_}).receive({p: weight}) as gradients:
        losses = losses_of()
        losses.backward(tensors["dlosses"])
    return dict(losses=losses.detach(), x=x.grad.float(), weight=gradients.get(p))

# -----------------------------------------------------------------------------
# The twin

def by_the_definition(tensors: dict[str, torch.Tensor], n: int, with_prefix: bool) -> dict[str, torch.Tensor]:
    """
    Dense, in float64. A token's loss counts the targets that the row has; the softmax's factor in its gradient counts all n weights, and
    its prefix's if there is one.
    """
    x, w, dlosses, targets = (tensors[name].double() for name in ("x", "weight", "dlosses", "targets"))
    (B, T, _), V = x.shape, w.size(0)
    s = torch.sigmoid((x @ w.T + 5) / 7.5)
    logp, wanted, factor = (23 * s).log_softmax(-1), torch.zeros(B, T, V, dtype=torch.double), torch.full((B, T), sum(MTP[:n])).double()
    for b in range(B):
        for t in range(T):
            for k in range(min(n, T - t)):
                wanted[b, t, int(targets[b, t + k])] += MTP[k]
            if with_prefix and tensors["prefix"][b, t] >= 0:
                wanted[b, t, tensors["prefix"][b, t]] += tensors["prefix_weight"].double()[0]
                factor[b, t] += tensors["prefix_weight"].double()[0]
    dlogits = dlosses[..., None] * (factor[..., None] * logp.exp() - wanted) * 23 / 7.5 * s * (1 - s)
    return dict(losses=-(wanted * logp).sum(-1), x=dlogits @ w, weight=torch.einsum("btv,btd->vd", dlogits, x))

@pytest.mark.parametrize("n, with_prefix", [(1, False), (2, True), (3, True)])
def test_twin(n, with_prefix, monkeypatch):
    """Chunks of tokens, the last one not whole."""
    monkeypatch.setattr(train, "LOGITS_CHUNK", 48)
    tensors = inputs(2, 128, 16, 40, torch.float32)
    want = {name: x.float() for name, x in by_the_definition(tensors, n, with_prefix).items()}
    eager.check(forward_backward(tensors, n, with_prefix, None), want, TOLERANCE, f"{n}")
    if n == 1:
        losses = train.softcapped_cross_entropy(tensors["x"], tensors["weight"], tensors["targets"])
        eager.check(dict(losses=losses), dict(losses=want["losses"]), TOLERANCE, "validation")

# -----------------------------------------------------------------------------
# The kernels against the twin

def check_lm_head(B, T, d, V, n, kept, forward_block, backward_block, dtype, with_prefix=True, before=None, chip="v6e"):
    """kept: tokens of a row. before: what the weight's gradient comes on top of, "on top" or "in place"."""
    tensors, tolerance = inputs(B, T, d, V, dtype), TOLERANCE if dtype == torch.float32 else 2e-2
    want = forward_backward({name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}, n, with_prefix, None)
    small = lambda *args, **options: dataclasses.replace(
        get_lm_head(*args, **options), forward_block=forward_block, backward_block=backward_block,
        kept=kept if options.get("gradients", True) else 0)
    start = None if before is None else torch.linspace(-1, 1, V * d).view(V, d) * want["weight"].abs().max()
    start = start if start is None or before == "in place" else start.to(dtype)
    with pytest.MonkeyPatch.context() as patch, eager.eager(kernels=True, chip=chip):
        patch.setattr("kernels.lm_head.get_lm_head", small)
        got = forward_backward(tensors, n, with_prefix, Sum(start, in_place=before == "in place"), B * kept)
        assert got["weight"].dtype == (torch.float32 if before == "in place" else dtype)
        got["weight"] = got["weight"].float() - (0 if start is None else start.float())
        alone = lm_head_losses(tensors["x"], tensors["weight"], tensors["targets"])
        assert eager.calls == ["lm_head_losses_and_dx", "lm_head_dw", "lm_head_losses"]
    eager.check(got, want, tolerance, "training")
    x, weight = (tensors[name].float() for name in ("x", "weight"))
    eager.check(dict(losses=alone), dict(losses=train.softcapped_cross_entropy(x, weight, tensors["targets"])), tolerance, "validation")

def test_lm_head_compares_in_int32():
    """As chips do whose vector unit has no 16-bit comparisons, v5e's and v5p's."""
    assert not CHIPS["v5e"].compares_int16 and CHIPS["v6e"].compares_int16
    check_lm_head(2, 256, 128, 512, 2, 256, (128, 256), (128, 256), torch.bfloat16, chip="v5e")

@pytest.mark.parametrize("B, T, d, V, n, kept, forward_block, backward_block, dtype, with_prefix, before", [
    (2, 512, 128, 640, 3, 256, (128, 256), (128, 384), torch.float32, True, "on top"),  # some of P kept; V ends within a block; rows
    (1, 256, 256, 384, 3, 256, (256, 512), (256, 4608), torch.bfloat16, True, "in place"),  # one block of each; a block longer than V
    (1, 384, 128, 1152, 2, 0, (128, 384), (384, 768), torch.float32, True, "in place"),  # none of P kept
    (2, 256, 128, 512, 1, 256, (128, 256), (128, 256), torch.float32, False, None),
])
def test_lm_head(B, T, d, V, n, kept, forward_block, backward_block, dtype, with_prefix, before):
    check_lm_head(B, T, d, V, n, kept, forward_block, backward_block, dtype, with_prefix, before)

@pytest.mark.slow
@pytest.mark.parametrize("n, with_prefix", [(1, False), (1, True), (2, True), (3, False), (3, True)])
@pytest.mark.parametrize("kept", [0, 256, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_lm_head_grid(dtype, kept, n, with_prefix):
    check_lm_head(2, 768, 128, 896, n, kept, (256, 512), (128, 512), dtype, with_prefix)

@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v6e", "v5e", "v5p"])
@pytest.mark.parametrize("kept", [0, 2048, 4096])
def test_lm_head_at_record_size(monkeypatch, kept, chip):
    """The record's dimension, a chip's blocks, a vocabulary of two of them and a bit."""
    monkeypatch.setattr(dispatch, "target", CHIPS[chip])
    x, weight = torch.zeros(1, 4096, 768, dtype=torch.bfloat16), torch.zeros(2 * 4608 + 128, 768, dtype=torch.bfloat16)
    s = get_lm_head(x, weight, 3, kept, prefix=True)
    check_lm_head(1, 4096, 768, weight.size(0), 3, kept, s.forward_block, s.backward_block, torch.bfloat16, chip=chip)

@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_lm_head_refuses(monkeypatch, chip):
    monkeypatch.setattr(dispatch, "target", chip)
    head = lambda T, V, d, dtype=torch.bfloat16: lm_head_refuses(torch.zeros(1, T, d, dtype=dtype), torch.zeros(1, V, d, dtype=dtype))
    assert head(256, 384, 128) is None
    for bad in (head(192, 384, 128), head(256, 300, 128), head(256, 384, 64), head(256, 384, 128, torch.float32), head(256, 384, 8192)):
        assert bad.startswith(("they take", "a dimension of 8192"))
    s = get_lm_head(torch.zeros(2, 3 * 16384, 128), torch.zeros(2, 384, 128), 1, 49152)  # both rows share what may be kept
    assert s.kept * s.rows == 49152 and s.kept % s.forward_block[0] == 0 == s.kept % s.backward_block[0]
