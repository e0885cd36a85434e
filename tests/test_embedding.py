"""
The gradient of an embedding: the TPU kernel, interpreted, against F.embedding's.

    python -m pytest -q tests/test_embedding.py
"""
import eager
import pytest
import torch
import torch.nn.functional as F
from test_attention import check

from kernels.embedding import EmbeddingShapes


@pytest.mark.parametrize("rows, T, V, most, dtype", [
    (2, 512, 1000, 1000, torch.float32),  # the last block of entries is not a whole one; rows
    (1, 384, 2000, 700, torch.float32),  # chunks of 128 tokens; entries that no token has, at the end whole blocks of them
    (1, 1024, 640, 20, torch.bfloat16),  # many tokens an entry, more than a chunk
    (1, 256, 128, 128, torch.bfloat16),  # one block, one chunk
])
def test_embedding(rows, T, V, most, dtype):
    from kernels.tpu import embedding
    generator = torch.Generator().manual_seed(T)
    ids = torch.randint(0, most, (rows, T), generator=generator, dtype=torch.int32)
    ids[:, 7:300:3], ids[:, 0], ids[:, -1] = 5, most - 1, 0
    dy = torch.randn(rows, T, 64, generator=generator).to(dtype)
    weights = torch.zeros(rows, V, 64, requires_grad=True)
    for row, (weight, grad) in enumerate(zip(weights, dy)):
        F.embedding(ids[row], weight).backward(grad.float())
    want, before = weights.grad.numpy(), torch.randn(V, 64, generator=generator)
    in_place = rows == 1  # of several rows the first one shows which of them comes on top
    for more in (None, before if in_place else before.to(dtype)):
        shapes = EmbeddingShapes(rows, T, V, 64, more is not None, in_place and more is not None)
        d = eager.call_kernel(embedding.embedding_scatter, shapes, ids=ids, dy=dy, before=more)
        check([d.dw.float()], [want], 1e-5 if dtype == torch.float32 else 1e-2, ["dw"])
        want[0] += before.numpy()
