"""
A whole Block on the plain path and by its kernels: the result and the gradient of every input and weight.

    python -m pytest -q tests/test_block.py -m "not slow"
    python -m pytest -q tests/test_block.py               at the record's size, too, with each chip's blocks
"""
import itertools

import eager
import pytest
import torch

import train_gpt_xla as train
from chips import CHIPS, TPUS, GiB
from gradients import Gradients, Slot, Stack
from kernels import dispatch
from kernels.attention import attention_refuses
from kernels.lm_head import lm_head_refuses
from kernels.mlp import mlp_refuses

B, T, C = 2, 384, 128  # rows of three blocks of tokens
SHORT, LONG = 100, 250
TOLERANCE = 5e-5  # measured: 3e-6, of a lambda whose gradient is a small difference of large sums; all others 1e-6
WEIGHTS = "attn.qkvo_w", "mlp.c_fc", "mlp.c_proj"

# As the record wires them: layer, paired, window
LAYERS = {
    "first: paired, values, no mix": dict(layer=0, paired=True, values=True, mix=False),
    "short window, values": dict(layer=1, values=True),
    "paired": dict(layer=2, paired=True, heads=4),  # of four, pairs are not the even and the odd ones
    "long window, key offset": dict(layer=3, window=LONG),
    "no attention": dict(layer=6),
    "no attention, no mix": dict(layer=6, mix=False),
    "long window, key offset, values": dict(layer=10, window=LONG, values=True),
}

def gradients_of(block: train.Block, weights: dict[str, torch.Tensor], x, attn_args, dout,
                 own_loop: bool, on_top: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The block's result and its weights' gradients, wherever they go; those of the other leaves are in .grad."""
    if own_loop:
        out = torch.func.functional_call(block, weights, (x, attn_args))
        out.backward(dout)
        return out.detach(), {name: weight.grad for name, weight in weights.items()}
    rows, C = weights["mlp.c_fc"].shape
    sums = lambda n: torch.linspace(-9, 9, n * rows * C).view(n, rows, C) if on_top else None
    squares, mlp = Stack(4, 3, sums(4), on_top), Stack(5, 4, sums(5), on_top)
    params = dict(block.named_parameters())
    slots = dict(zip(WEIGHTS, (Slot(squares, 2), Slot(mlp, 2), Slot(mlp, 3)), strict=True))
    gradients = Gradients({p: slots[name] for name, p in params.items()})
    with gradients.receive({p: weights[name] for name, p in params.items()}):
        out = torch.func.functional_call(block, weights, (x, attn_args))
        out.backward(dout)
    return out.detach(), {name: gradients[p] for name, p in params.items()}

def run(kernels: bool, dtype: torch.dtype, layer: int, paired=False, values=False, mix=True, window=SHORT, heads=2, T=T, C=C,
        own_loop=False, on_top=False, chip="v6e") -> dict[str, torch.Tensor]:
    """
    Every result by name. own_loop: as someone finds it who calls backward() and no TrainingManager. on_top: weights' gradients are added to
    those of rows that had their turn before.
    """
    H, D = heads, C // heads
    generator = torch.Generator().manual_seed(layer)
    randn = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().to(dtype)
    block = train.Block(C, D, H, layer, paired)
    weights = {name: randn(*p.shape) * p.size(1)**-0.5 for name, p in block.named_parameters()}
    tokens = torch.logspace(-1, 1, T)[torch.randperm(T, generator=generator), None].to(dtype)  # from small to large
    leaves = dict(x=randn(B, T, C) * tokens, attn_gate_w=randn(H, 12), lambda_qkv=torch.tensor(0.625), lambda_o=torch.tensor(-0.75))
    if mix:
        leaves |= dict(x0=randn(B, T, C), lambda_x=torch.tensor(0.875), lambda_x0=torch.tensor(-1.5))
    if values:
        leaves |= dict(ve=randn(B, T, C), ve_gate_w=randn(H, 12))
    dout = randn(B, T, C)
    for leaf in (*weights.values(), *leaves.values()):
        leaf.requires_grad_()
    documents = torch.zeros(B, T, dtype=torch.int32)
    for row, starts in zip(documents, ((5, 127, 129, 300), (40, 256)), strict=True):
        for start in starts:
            row[start:] = start
    yarn = (train.YarnPairedHead if paired else train.Yarn)(D, 16)
    *freq, scale = yarn.numbers()
    take = leaves.get
    attn_args = train.AttnArgs(
        mix=((take("lambda_x"), take("lambda_x0")), take("x0")) if mix else ((), None), ve=take("ve"),
        sa_lambdas=(take("lambda_qkv"), take("lambda_o")), documents=documents, bm_size=window if layer != 6 else None,
        factors=yarn.factors(T, torch.tensor(freq), dtype), attn_scale=torch.tensor(scale), key_offset=window == LONG,
        attn_gate_w=take("attn_gate_w"), ve_gate_w=take("ve_gate_w"))
    with eager.eager(kernels, chip=chip):
        out, gradients = gradients_of(block, weights, take("x"), attn_args, dout, own_loop, on_top)
        assert bool(eager.calls) == kernels
    gradients |= {name: leaf.grad for name, leaf in leaves.items()}
    return dict(out=out) | {name: gradient.float() for name, gradient in gradients.items() if gradient is not None}

@pytest.mark.parametrize("layer", LAYERS)
def test_block(layer):
    want, got = (run(kernels, torch.float32, **LAYERS[layer]) for kernels in (False, True))
    eager.check(got, want, TOLERANCE, layer)

@pytest.mark.parametrize("layer", ["no attention", "long window, key offset, values"])
def test_backward_in_ones_own_loop(layer):
    """Nobody has made addresses, so that each weight has its gradient in .grad."""
    want, got = (run(kernels, torch.float32, own_loop=True, **LAYERS[layer]) for kernels in (False, True))
    eager.check(got, want, TOLERANCE, layer)

@pytest.mark.parametrize("layer", ["no attention", "paired", "long window, key offset, values"])
def test_on_top_of_other_rows(layer):
    want, got = (run(kernels, torch.float32, on_top=True, **LAYERS[layer]) for kernels in (False, True))
    eager.check(got, want, TOLERANCE, layer)

@pytest.mark.slow
@pytest.mark.parametrize("on_top", [False, True])
@pytest.mark.parametrize("chip", ["v6e", "v5e", "v5p"])
@pytest.mark.parametrize("layer", ["paired", "no attention", "long window, key offset, values"])
def test_block_at_record_size(chip, layer, on_top):
    """The record's dimensions, and blocks of tokens as that chip's VMEM allows."""
    size = LAYERS[layer] | dict(heads=6, T=1024, C=768, on_top=on_top)
    want, got = (run(kernels, torch.float32, **size, chip=chip) for kernels in (False, True))
    eager.check(got, want, TOLERANCE, layer)

def test_kernels_take_the_record_on_each_tpu(monkeypatch):
    empty = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
    for tpu in TPUS.values():
        monkeypatch.setattr(dispatch, "target", tpu.chip)
        for tokens in (16384, 32768, 49152, 262144):
            x, W, head = empty(1, tokens, 768), empty(3072, 768), empty(50304, 768)
            why = [attention_refuses(x, 6, 20 * 128, True), mlp_refuses(x, W, W), lm_head_refuses(x, head)]
            assert not any(why) if tpu.trains else all("fit in VMEM" in w for w in why), (tpu.name, tokens, why)

def test_what_is_kept_is_what_fits(monkeypatch):
    """P of lm_head first, then all hidden activations; more memory never keeps less."""
    keep = lambda tokens, gib: dispatch.what_to_keep(tokens, 11, 768, 50304, int(gib * GiB))
    for chip, tokens, mlp in (("v6e", 49152, True), ("v5e", 32768, True), ("v5e", 49152, False)):
        monkeypatch.setattr(dispatch, "target", CHIPS[chip])
        assert keep(tokens, 1.1) == dispatch.Kept(tokens, mlp)
    for more, less in itertools.pairwise(keep(49152, gib / 10) for gib in range(0, 120, 2)):
        assert more.p_tokens >= less.p_tokens and more.mlp >= less.mlp and (not less.mlp or less.p_tokens == 49152)
    assert less == dispatch.Kept(0, False)
