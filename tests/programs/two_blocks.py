"""
Two blocks, an embedding and lm_head with its loss, forward and backward, on n devices with two rows each: test_on_devices.py runs this.

    two_blocks.py run            by the kernels, interpreted, against the plain path: the same functions, on the same devices
    two_blocks.py export FILE    by the kernels, for a TPU: the program, not run
"""
import sys
import warnings

import torch
import torch_xla

import train_gpt_xla as train
from chips import CHIPS
from gradients import Gradients, Slot, Stack, Sum
from kernels import dispatch, lm_head_losses, lookup, takes_block, takes_lm_head
from spmd import device_count, enter, leave, setup_devices, to_device

H, D, T, V = 2, 128, 256, 384
C = H * D


def split(x):
    return enter(to_device(x, "data"), "data")


def whole(x):
    return enter(to_device(x))


def results(rows: int) -> dict[str, torch.Tensor]:
    """Losses and all gradients by name, [devices, ...]."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()
    blocks = [train.Block(C, D, H, 0, use_paired_head=True), train.Block(C, D, H, 3, use_paired_head=False)]
    params = {f"{i}.{name}": p for i, block in enumerate(blocks) for name, p in block.named_parameters()}
    params |= dict(table=torch.nn.Parameter(torch.empty(V, C)))
    leaves = {name: whole(randn(*p.shape) * (p.size(1)**-0.5)).requires_grad_() for name, p in params.items()}
    others = {name: whole(x).requires_grad_() for name, x in dict(
        gate=randn(H, 12), ve_gate=randn(H, 12), lambdas=torch.tensor([0.625, -0.75, 0.875, -1.5])).items()}
    others |= {name: split(randn(rows, T, C)).requires_grad_() for name in ("x0", "ve")}
    documents = torch.zeros(rows, T, dtype=torch.int32)
    for r in range(rows):
        documents[r, 40 + r:], documents[r, 130:] = 40 + r, 130
    documents, ids = split(documents), split(torch.randint(0, V, (rows, T), generator=generator, dtype=torch.int32))
    squares, mlp = Stack(3, 2), Stack(5, 4)
    addresses = {params[f"{i}.{name}"]: slot for i in range(2) for name, slot in {
        "attn.qkvo_w": Slot(squares, i), "mlp.c_fc": Slot(mlp, 2 * i), "mlp.c_proj": Slot(mlp, 2 * i + 1)}.items()}
    gradients = Gradients(addresses | {params["table"]: Sum(whole(randn(V, C)))})
    with gradients.receive({p: leaves[name] for name, p in params.items()}):
        x = lookup(ids, leaves["table"])
        lambda_qkv, lambda_o, *mix = others["lambdas"].unbind()
        for i, block in enumerate(blocks):
            yarn = (train.YarnPairedHead if block.attn.paired else train.Yarn)(D, 16)
            *freq, scale = yarn.numbers()
            weights = {name: leaves[f"{i}.{name}"] for name, _ in block.named_parameters()}
            x = torch.func.functional_call(block, weights, (x, train.AttnArgs(
                mix=(mix, others["x0"]) if i else ((), None), ve=others["ve"] if i else None, sa_lambdas=(lambda_qkv, lambda_o),
                documents=documents, bm_size=100, factors=yarn.factors(T, whole(torch.tensor(freq)), torch.bfloat16),
                attn_scale=whole(torch.tensor(scale)), key_offset=bool(i), attn_gate_w=others["gate"], ve_gate_w=others["ve_gate"])))
        x, weight, mtp_weights = train.norm(x), leaves["table"], whole(torch.tensor([1.0, 0.5]))
        cross_entropy = lm_head_losses if takes_lm_head(x, weight) else train.FusedSoftcappedCrossEntropy.apply
        losses = cross_entropy(x, weight, ids, mtp_weights, *([T] if takes_lm_head(x, weight) else []))
        losses.sum().backward()
    found = dict(losses=losses.detach()) | {name: gradients[p] for name, p in params.items()}
    found |= {name: x.grad for name, x in others.items()}
    return {name: leave(x) for name, x in found.items()}


mode, *file = sys.argv[1:]
setup_devices()
rows = 2 * device_count()
if mode == "run":
    want = results(rows)
    assert dispatch.lowered.cache_info().misses == 0
    dispatch.interpret = True
    got = results(rows)
    assert dispatch.lowered.cache_info().misses == 15, dispatch.lowered.cache_info()
    torch_xla.sync()
    for name in want:
        a, b = got[name].cpu().float(), want[name].cpu().float()
        error = float((a - b).norm() / b.norm())
        print(f"{name}: {error:.1e}")
        assert error < (0.1 if name == "lambdas" else 3e-2), name
else:
    warnings.simplefilter("always")
    dispatch.target = CHIPS["v6e"]
    outputs = list(results(rows).values())
    x, W = split(torch.zeros(rows, T, 6 * 64, dtype=torch.bfloat16)), whole(torch.zeros(4 * 6 * 64, 6 * 64, dtype=torch.bfloat16))
    for _ in range(2):  # heads of 64: one warning
        assert not takes_block(x, W, W, (6, 100, False))
    assert takes_block(x, W, W, None) and takes_block(x, W, W, (3, 100, False))
    with open(*file, "wb") as f:
        f.write(torch_xla._XLAC._get_xla_tensors_hlo_proto(outputs))
