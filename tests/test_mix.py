"""
MUDD's sums of activations: the TPU kernels, interpreted, against train_gpt_xla.weighted and norm.

    python -m pytest -q tests/test_mix.py
"""
import eager
import pytest
import torch

from gradients import Shared
from kernels import fused_mix
from train_gpt_xla import norm, weighted

B = 2
TOLERANCE = 1e-6  # measured: 2e-7
NAMES = "x", "c0", "c3", "c7", "ve", "before_10", "at_the_end"
BEFORE_10 = ((3, (6, 7)), (1, 0), (2, 1), (0, 2)), ((0, 5), (1, 3), (2, 4))  # of x, c0, c7, ve: aux_v and x
AT_THE_END = ((0, None), (1, 0), (2, 1), (3, 2), (5, 3), (4, 4)),  # of x, c0, c7, c9, c3, ve

def inputs(T: int, d: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The leaves, and the gradients of what is read, by name."""
    generator = torch.Generator().manual_seed(T)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    read = "aux_v", "out", "c0_again", "c9_again", "x_again"
    wide = {name: randn(B, T, 5 * d if name == "ve" else d) for name in (*NAMES[:5], *(f"d{name}" for name in read))}
    # small ones at the end: x is the largest part of what is normed
    return {name: x.to(dtype) for name, x in wide.items()} | dict(before_10=randn(B, 8, T), at_the_end=0.3 * randn(B, 5, T))

def plain(x, c0, c3, c7, ve, before_10, at_the_end, ve_sum):
    """As GPT.forward has it."""
    d, tables, m, mu = x.size(-1), ve.chunk(5, dim=-1), before_10.unsqueeze(-1).unbind(1), at_the_end.unsqueeze(-1).unbind(1)
    gate = torch.where(torch.arange(d) < d // 2, m[6], m[7])
    aux_v = weighted((gate, tables[4]), (m[0], c0), (m[1], c7), (m[2], x))
    c9, x = x, weighted((m[5], x), (m[3], c0), (m[4], c7))
    out = norm(weighted((1.0, x), (mu[0], c0), (mu[1], c7), (mu[2], c9), (mu[3], tables[0]), (mu[4], c3)))
    return aux_v, out, c0.clone(), c9.clone(), x

def by_kernels(x, c0, c3, c7, ve, before_10, at_the_end, ve_sum):
    (aux_v, out), (c9, c0, c7) = fused_mix([x, c0, c7, ve], before_10, BEFORE_10, 4, ve_sum)
    (out,), (x, c0, c7, c9, c3) = fused_mix([out, c0, c7, c9, c3, ve], at_the_end, AT_THE_END, 0, ve_sum, normed=True)
    return aux_v, out, c0, c9, x

def forward_backward(path, x: dict[str, torch.Tensor], ve_sum=None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Results, and gradients, of the value embeddings table by table."""
    leaves = [x[name].clone().requires_grad_() for name in NAMES]
    aux_v, out, *again = path(*leaves, ve_sum)
    given = [x[f"d{name}"] for name in ("aux_v", "out", "c0_again", "c9_again", "x_again")]
    found = dict(zip(NAMES, torch.autograd.grad((aux_v, out, *again), leaves, given), strict=True))
    found |= {f"ve.{n}": g for n, g in enumerate(found.pop("ve").chunk(5, dim=-1))}
    return dict(aux_v=aux_v.detach(), out=out.detach(), x_again=again[-1].detach()), found

@pytest.mark.parametrize("T, d, dtype, on_top", [
    (384, 384, torch.float32, True),  # blocks of 128 tokens; the halves meet within a register's lanes
    (768, 128, torch.bfloat16, False),  # of 256
])
def test_mix(T, d, dtype, on_top):
    """The value embeddings' gradient is in memory that both uses share; on_top: of what other readers have put there."""
    x = inputs(T, d, dtype)
    want, want_gradients = forward_backward(plain, x)
    before, ve_sum = torch.linspace(-9, 9, B * T * 5 * d).view(B, T, 5 * d).to(dtype), Shared(2)
    if on_top:
        ve_sum.tensor = before.clone()
    with eager.eager(kernels=True):
        got, gradients = forward_backward(by_kernels, x, ve_sum)
    assert eager.calls == ["mix_forward"] * 2 + ["mix_backward"] * 2
    for n in (1, 2, 3):  # tables that none of the two reads
        del want_gradients[f"ve.{n}"]
        other = gradients.pop(f"ve.{n}")
        assert not on_top or torch.equal(other, before.chunk(5, dim=-1)[n])
    # in bfloat16, too, every rounding has its place, but that the twin rounds what comes to an input from each of its readers
    apart = [{name: found.pop(name) for name in ("x", "c0", "c7")} for found in (gradients, want_gradients)]
    eager.check(got | gradients, want | want_gradients, TOLERANCE if dtype == torch.float32 else 1e-4, str(dtype))
    eager.check(*apart, TOLERANCE if dtype == torch.float32 else 5e-3, str(dtype))

@pytest.mark.parametrize("table", [None, 1])
def test_gradients_for_autograd(table):
    """All of the wide input's, if there is one. One of two outputs has no reader, nor has one of the inputs another one."""
    generator, T, d = torch.Generator().manual_seed(0), 128, 128
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    x, c, ve, coefs = leaves = [t.requires_grad_() for t in (randn(B, T, d), randn(B, T, d), randn(B, T, 3 * d), randn(B, 4, T))]
    given, terms = (randn(B, T, d), randn(B, T, d)), ((0, 0), (1, 1))
    a, b, gate, unread = coefs.unsqueeze(-1).unbind(1)
    plain = [(a, x), (b, c)]
    if table is not None:
        terms, plain = (*terms, (2, 2)), [*plain, (gate, ve.chunk(3, dim=-1)[table])]
    out, other = weighted(*plain), weighted((unread, c))
    grad = lambda results: torch.autograd.grad(results, leaves, given, materialize_grads=True)
    want = out, other, *grad((out, c.clone()))
    with eager.eager(kernels=True):
        (out, other), (_, again) = fused_mix([x, c] if table is None else [x, c, ve], coefs, (terms, ((1, 3),)), table)
        got = out, other, *grad((out, again))
    named = lambda results: {name: t.detach() for name, t in zip(("out", "other", "dx", "dc", "dve", "dcoefs"), results, strict=True)}
    eager.check(named(got), named(want), TOLERANCE, f"table {table}")
