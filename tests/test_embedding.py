"""
The gradient of an embedding: the TPU kernel, interpreted, against F.embedding's.

    python -m pytest -q tests/test_embedding.py
"""
import re

import eager
import pytest
import torch
import torch_xla.core.xla_builder as xb

from chips import CHIPS
from gradients import Gradients, Sum
from kernels import dispatch, lookup
from kernels.embedding import EmbeddingShapes, embedding_refuses
from kernels.tpu.embedding import embedding_scatter


def looked_up(ids: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, before: Sum) -> dict[str, torch.Tensor]:
    """What lookup finds, and the gradient of the table, by whichever path."""
    p, leaf = torch.nn.Parameter(weight), weight.clone().requires_grad_()
    with Gradients({p: before}).receive({p: leaf}) as gradients:
        x = lookup(ids, leaf)
        x.backward(dy)
    return dict(x=x.detach(), dw=gradients.get(p))

@pytest.mark.parametrize("rows, T, V, d, most, dtype", [
    (2, 512, 1000, 64, 1000, torch.float32),  # the last block of entries is not a whole one; rows
    (1, 384, 2000, 64, 700, torch.float32),  # chunks of 128 tokens; entries that no token has, at the end whole blocks of them
    (1, 1024, 640, 64, 20, torch.bfloat16),  # many tokens an entry, more than a chunk
    (1, 256, 128, 64, 128, torch.bfloat16),  # one block, one chunk
    (1, 49152, 70000, 8, 70000, torch.float32),  # an id and its place are more than 32 bits
    (2, 256, 500, 5 * 128, 400, torch.float32),  # wide rows, as those of five value embeddings
])
def test_embedding(rows, T, V, d, most, dtype):
    generator = torch.Generator().manual_seed(T)
    ids = torch.randint(0, most, (rows, T), generator=generator, dtype=torch.int32)
    ids[:, 7:300:3], ids[:, 0], ids[:, -1] = 5, most - 1, 0
    weight, dy = (torch.randn(*shape, d, generator=generator).to(dtype) for shape in ((V,), (rows, T)))
    with eager.eager(kernels=False):
        want = looked_up(ids, weight.float(), dy.float(), Sum())
    before = torch.randn(V, d, generator=generator)
    in_place = rows == 1  # of several rows the first one shows which of them comes on top
    for start in (None, *((before, before.to(dtype)) if in_place else (before.to(dtype),))):
        with eager.eager(kernels=True):
            got = looked_up(ids, weight, dy, Sum(None if start is None else start.clone(), in_place=in_place and start is not None))
            assert eager.calls == ["embedding_scatter"]
        assert got["dw"].dtype == (dtype if start is None else start.dtype)
        got = {name: x.float() for name, x in got.items()}
        got["dw"] -= 0 if start is None else start.float()
        eager.check(got, want, 1e-5 if dtype == torch.float32 else 1e-2, "on top" if start is not None else "alone")

def test_a_gradient_waits(monkeypatch):
    """In the graph, its kernel depends on `after`."""
    monkeypatch.setattr(dispatch, "target", CHIPS["v6e"])
    shapes, arguments = EmbeddingShapes(1, 128, 512, 128, on_top=False), [("ids", (1, 128), "int32"), ("dy", (1, 128, 128), "bfloat16")]
    def graph(*more):
        computation, outputs = dispatch.lowered(embedding_scatter, shapes, (*arguments, *more), CHIPS["v6e"], False)
        assert outputs == dict(dw=True)
        return xb.get_computation_hlo(computation)
    assert "bf16[3]" not in graph()
    text = graph(("after", (3,), "bfloat16"))
    after, = re.findall(r"(\S+) = bf16\[3\]\S* parameter", text)
    kernel, = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert re.search(rf"{re.escape(after)}[,)]", kernel.partition("custom-call(")[2]), kernel[:500]

def test_embedding_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "target", CHIPS["v6e"])
    def why_not(T=256, d=768, dtype=torch.bfloat16):
        return embedding_refuses(torch.empty(1, T, dtype=torch.int32, device="meta"), torch.empty(500, d, dtype=dtype, device="meta"))
    assert why_not() is None and why_not(d=5 * 768) is None
    for word, bad in {"bfloat16": dict(dtype=torch.float32), "128 tokens": dict(T=1000), "and dimensions": dict(d=64)}.items():
        assert word in why_not(**bad), (word, why_not(**bad))
