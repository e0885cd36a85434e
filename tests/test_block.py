"""
A layer on the plain path and by its kernels, from what attention reads to what comes after the MLP: the result and the gradient of every
input and weight.

    python -m pytest -q tests/test_block.py -m "not slow"
    python -m pytest -q tests/test_block.py               at the record's size, too, with each chip's blocks
"""
import itertools
import types
import warnings

import eager
import pytest
import torch

import train_gpt_xla as train
from chips import CHIPS, TPUS, GiB, Refused
from gradients import Gradients, Shared, Stack
from kernels import dispatch, takes_layers
from kernels.lm_head import lm_head_refuses

B, T, C = 2, 384, 128  # rows of three blocks of tokens
SHORT, LONG = 100, 250
TOLERANCE = 5e-5
BANKS = "qk_bank", "vo_bank", "mlp_bank"

# As the record wires them. i: of the three layers that the banks here have
LAYERS = {
    "paired, no bigram (0; 5)": dict(i=0, paired=True, bigram=False, heads=4),  # of four, pairs are not the even and the odd ones
    "paired, values (2, 9)": dict(i=2, paired=True, table=1, heads=4),
    "values (8)": dict(i=2, table=0),
    "values, XSA (1)": dict(i=1, table=2, xsa=True),
    "XSA (4, 7)": dict(i=2, xsa=True, small_values=True),
    "long window, key offset, XSA, gate (3)": dict(i=2, window=LONG, xsa=True, gate=True),
    "no attention (6)": dict(i=1, attention=False),
    "long window, key offset, MUDD's values, DC, gate (10)": dict(i=2, window=LONG, mudd=True, gate=True),
}
NO_ATTENTION, LAST = list(LAYERS)[-2:]

class Case:
    """Layers that follow each other, with inputs and weights, and where their gradients go."""
    def __init__(self, dtype: torch.dtype, *layers: dict, heads=2, T=T, C=C, own_loop=False, on_top=False, keep=True):
        """
        own_loop: as someone finds it who calls backward() and no TrainingManager, nor shares gradients between layers. on_top: gradients
        are added to those of rows that had their turn before, and of later layers.
        """
        self.layers, self.H, self.T, self.keep, self.own_loop, self.on_top = layers, heads, T, keep, own_loop, on_top
        self.D, generator = C // heads, torch.Generator().manual_seed(T)
        randn = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().to(dtype)
        tokens = torch.logspace(-1, 1, T)[torch.randperm(T, generator=generator), None].to(dtype)  # from small to large
        self.used = dict(qk_bank=3 * heads, vo_bank=6, mlp_bank=6)
        self.leaves = leaves = dict(
            qk_bank=randn(3 * heads + 2, 2 * self.D, C) * C**-0.5, vo_bank=randn(8, C, C) * C**-0.5,
            mlp_bank=randn(4, 2, 4 * C, C) * C**-0.5, x=randn(B, T, C) * tokens, x0=randn(B, T, C), x0_bigram=randn(B, T, C),
            ve=randn(B, T, 5 * C))
        for n, layer in enumerate(layers):
            own = dict(resid_m=torch.tensor(0.875), post_m=torch.tensor(-1.25))
            if layer.get("attention", True):
                own |= dict(attn_in=randn(B, T, C) * tokens.flip(0), lambda_qkv=torch.tensor(0.625), lambda_o=torch.tensor(-0.75),
                            resid_a=torch.tensor(1.125), post_a=torch.tensor(0.5), x0_gate=randn(B, T, 1))
            if layer.get("attention", True) and layer.get("bigram", True):
                own |= dict(bigram_gate=randn(B, T, 1))
            if "table" in layer:
                own |= dict(ve_gate_w=randn(heads, 12))
            if layer.get("xsa"):
                own |= dict(xsa_alpha=randn(B, T, heads))
            if layer.get("gate"):
                own |= dict(attn_gate_w=randn(B, T, heads))
            if layer.get("mudd"):
                own |= {name: randn(B, T, 1) for name in ("resid_a", "post_a", "resid_m", "post_m")}
                own |= dict(aux_v=randn(B, T, C), dc_w1=randn(B, T, heads), dc_w2=randn(B, T, heads))
            if layer.get("small_values"):  # of the first head, whose square is about the least that XSA divides by
                leaves["vo_bank"][2 * layer["i"], :self.D] *= (1e-8 / self.D)**0.5 / own["lambda_qkv"]
            leaves |= {f"{n}.{name}": x for name, x in own.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        self.dout = randn(B, T, C)
        before = lambda x, dtype: torch.linspace(-9, 9, x.numel()).view(x.shape).to(dtype) if on_top else None
        self.before = {name: before(leaves[name], torch.float32 if name in BANKS else dtype) for name in (*BANKS, "ve", "x0", "x0_bigram")}
        self.documents = torch.zeros(B, T, dtype=torch.int32)
        for row, starts in zip(self.documents, ((5, 127, 129, 300), (40, 256)), strict=True):
            for start in starts:
                row[start:] = start

    def forward(self, by_kernels: bool, sums: dict[str, Shared | None]) -> torch.Tensor:
        """As GPT.forward calls its layers. What attention reads has another reader, whose gradient comes back through the kernel."""
        leaves, H = self.leaves, self.H
        model, x = types.SimpleNamespace(vo_bank=leaves["vo_bank"], mlp_bank=leaves["mlp_bank"]), leaves["x"]
        read_again = []
        for n, layer in enumerate(self.layers):
            take = lambda name, n=n: leaves.get(f"{n}.{name}")
            paired, window, mudd, y = layer.get("paired", False), layer.get("window", SHORT), layer.get("mudd"), None
            factors = [take(name) for name in ("resid_a", "post_a", "x0_gate", "bigram_gate", "resid_m", "post_m")]
            if layer.get("attention", True):
                yarn = train.Yarn(self.D, paired)
                *freq, scale = yarn.numbers()
                values = dict(ve=leaves["ve"], table=layer.get("table"), ve_gate_w=take("ve_gate_w"), ve_sum=sums["ve"])
                y, attn_in = train.CausalSelfAttention(H * self.D, self.D, H, paired)(take("attn_in"), train.AttnArgs(
                    layer=layer["i"], sa_lambdas=(take("lambda_qkv"), take("lambda_o")), documents=self.documents, bm_size=window,
                    factors=yarn.factors(self.T, torch.tensor(freq), x.dtype), attn_scale=torch.tensor(scale), key_offset=window == LONG,
                    attn_gate_w=take("attn_gate_w"), aux_v=take("aux_v"), xsa_alpha=take("xsa_alpha"),
                    dc_w=(take("dc_w1"), take("dc_w2")) if mudd else None, dc_window=40, by_kernels=by_kernels, keep_qkv=self.keep,
                    **(values if "table" in layer else {})), leaves["qk_bank"], leaves["vo_bank"])
                read_again.append(attn_in)
                factors[3] = 0.0 if factors[3] is None else factors[3]
            else:
                factors = factors[4:]
            x, *passed = train.GPT.second_half(model, layer["i"], x, y, factors, take("lambda_o"), leaves["x0"], leaves["x0_bigram"],
                                               by_kernels, self.keep, sums["x0"], sums["x0_bigram"])
            if self.own_loop or layer["i"] % 2:  # otherwise nobody reads them again
                read_again += passed if self.own_loop and y is not None else passed[:1]
        return sum(read_again, x)

    def stored(self, name: str, layer: dict) -> list[int]:
        """Which matrices of a bank a layer has."""
        i, attention = layer["i"], layer.get("attention", True)
        return dict(qk_bank=list(range(i * self.H, (i + 1) * self.H)) if attention else [],
                    vo_bank=[2 * i, 2 * i + 1] if attention else [], mlp_bank=[2 * i, 2 * i + 1])[name]

    def readers(self, name: str) -> int:
        return sum("table" in layer if name == "ve" else layer.get("attention", True) for layer in self.layers)

    def run(self, by_kernels: bool, chip="v6e") -> dict[str, torch.Tensor]:
        """Every result by name, gradients without what they were added to."""
        found, before, leaves = {}, self.before, self.leaves
        with eager.eager(by_kernels, chip=chip):
            shared = {name: Shared(self.readers(name)) if by_kernels and not self.own_loop and self.readers(name) else None
                      for name in ("ve", "x0", "x0_bigram")}
            for name, one in shared.items():
                if one is not None and before[name] is not None:
                    one.tensor = before[name].clone()
            if self.own_loop:
                out = self.forward(by_kernels, shared)
                out.backward(self.dout)
            else:
                params = {name: torch.nn.Parameter(leaves[name].detach()) for name in BANKS}
                clone = lambda x: None if x is None else x.view(-1, *x.shape[-2:]).clone()
                addresses = {p: Stack(self.used[name], clone(before[name]), self.on_top) for name, p in params.items()}
                with Gradients(addresses).receive({p: leaves[name] for name, p in params.items()}) as gradients:
                    out = self.forward(by_kernels, shared)
                    out.backward(self.dout)
                found = {name: gradients.get(p) for name, p in params.items()}
            assert bool(eager.calls) == by_kernels
        for name, x in leaves.items():
            found.setdefault(name, x.grad)
            x.grad = None
        for name in BANKS:
            mine = sorted({k for layer in self.layers for k in self.stored(name, layer)})
            if found[name] is None:
                assert not mine, name
                continue
            stack = found[name].view(-1, *found[name].shape[-2:])
            others = sorted({*range(len(stack))} - {*mine})
            if self.on_top:
                start = before[name].view_as(stack)
                assert torch.equal(stack[others], start[others]), f"{name}: a place of other layers has changed"
                stack = stack - start
            elif self.own_loop:
                assert not stack[others].any()
            assert self.on_top or not stack[self.used[name]:].any()
            found[name] = stack[mine] if mine else None
        tables = [layer["table"] for layer in self.layers if "table" in layer]
        if tables:
            # of other tables there is nothing where nobody made them a start
            apart = dict(enumerate(found["ve"].chunk(5, dim=-1)))
            found |= {f"ve.{table}": apart.pop(table) for table in tables}
            assert not (self.on_top and by_kernels) or all(
                torch.equal(x, before["ve"].chunk(5, dim=-1)[table]) for table, x in apart.items()), "another table's gradient"
        del found["ve"]
        if self.on_top and by_kernels:
            if 0 in tables:  # which is read after the last layer, too
                found["ve.0"] = found["ve.0"] - before["ve"].chunk(5, dim=-1)[0]
            found |= {name: found[name] - before[name] for name in ("x0", "x0_bigram") if self.readers(name)}
        return dict(out=out.detach()) | {name: x.float() for name, x in found.items() if x is not None}

def check(*layers: dict, chip="v6e", **options):
    case = Case(torch.float32, *layers, heads=options.pop("heads", max(layer.get("heads", 2) for layer in layers)), **options)
    want, got = (case.run(by_kernels, chip) for by_kernels in (False, True))
    eager.check(got, want, TOLERANCE, str(layers))

@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer):
    check(LAYERS[layer])

@pytest.mark.parametrize("layer", [NO_ATTENTION, "values, XSA (1)"])
def test_activations_are_not_kept(layer):
    """Neither the MLP's hidden ones nor q, k and v, which the backward pass computes again."""
    check(LAYERS[layer], keep=False)

@pytest.mark.parametrize("layers", [["values, XSA (1)", "values (8)"], [NO_ATTENTION], [LAST]],
                         ids=["values", "no attention", "last"])
def test_on_top_of_other_rows(layers):
    """And of what other layers have found of x0, the bigram and the value embeddings. Places of other layers stay as they are."""
    check(*map(LAYERS.get, layers), on_top=True)

def test_layers_share_gradients():
    """The later layer begins what both add up, in stacks that nobody has made before."""
    check(LAYERS["values, XSA (1)"], LAYERS["values (8)"])

@pytest.mark.parametrize("layer", [NO_ATTENTION, "values (8)"])
def test_backward_in_ones_own_loop(layer):
    """Nobody has made addresses, so that each bank has its gradient in .grad, as x0 and the value embeddings have."""
    check(LAYERS[layer], own_loop=True)

@pytest.mark.parametrize("layer", [NO_ATTENTION, "values, XSA (1)"])
def test_without_gradients(layer):
    """As in validation, which stores nothing for a backward pass."""
    case, found = Case(torch.float32, LAYERS[layer]), []
    for by_kernels in (False, True):
        with eager.eager(by_kernels), torch.no_grad():
            found.append(case.forward(by_kernels, dict.fromkeys(("ve", "x0", "x0_bigram"))))
            assert bool(eager.calls) == by_kernels
    eager.check(dict(out=found[1]), dict(out=found[0]), TOLERANCE, layer)

@pytest.mark.slow
@pytest.mark.parametrize("on_top", [False, True])
@pytest.mark.parametrize("chip", ["v6e", "v5e", "v5p"])
@pytest.mark.parametrize("layer", ["paired, values (2, 9)", NO_ATTENTION, "long window, key offset, XSA, gate (3)", LAST])
def test_layer_at_record_size(chip, layer, on_top):
    """The record's dimensions, and blocks of tokens as that chip's VMEM allows."""
    check(LAYERS[layer], heads=6, T=1024, C=768, on_top=on_top, chip=chip)

def test_two_gradients_have_no_one_place():
    """Layers of one number, or backward passes without new addresses in between."""
    with pytest.raises(ValueError, match="a second gradient"):
        Case(torch.float32, *[LAYERS[NO_ATTENTION]] * 2).run(by_kernels=True)

# -----------------------------------------------------------------------------
# Where they run

def test_kernels_take_the_record_on_each_tpu(monkeypatch, recwarn):
    """Where it trains, in every program of a run; elsewhere a warning says why not."""
    args, empty = train.Hyperparameters(), lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
    bank, head = empty(12, 2, 3072, 768), empty(50304, 768)
    eager.replace(monkeypatch, "for_tpu", lambda x: True)
    warnings.simplefilter("always")
    for tpu in TPUS.values():
        monkeypatch.setattr(dispatch, "target", tpu.chip)
        for graph in train.distinct_graphs(args):
            dispatch.warn_once.cache_clear()
            x = empty(1, graph.tokens, 768)
            windows = {(graph.ws_short * 128, True), (graph.ws_short * 128, False), (graph.ws_long * 128, False)}
            taken = takes_layers(x, bank, 6, args.dc_window, windows), lm_head_refuses(x, head) is None
            said = [str(w.message) for w in recwarn.list]
            recwarn.clear()
            assert taken[0] == (not said), (tpu.name, graph, said)
            assert all(taken) if tpu.trains else not any(taken) and "fit in VMEM" in said[0], (tpu.name, graph, said)

def test_all_layers_run_by_kernels_or_none(monkeypatch, recwarn):
    """One that does not fit keeps the others from them: they would share a stack of gradients."""
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    eager.replace(monkeypatch, "for_tpu", lambda x: True)
    warnings.simplefilter("always")
    monkeypatch.setattr(dispatch, "target", CHIPS["v6e"])
    def takes(**other) -> bool:
        record = dict(x=empty(1, 65536, 768), mlp_bank=empty(12, 2, 3072, 768), heads=6, dc_window=112)
        return takes_layers(**record | dict(attentions={(384, True), (768, False)}) | other)
    assert takes() and not recwarn.list
    for why, bad in {
            "they take bfloat16": dict(x=empty(1, 1024, 768, dtype=torch.float32)), "a multiple of 128 tokens": dict(x=empty(1, 1000, 768)),
            "they take heads of 128": dict(heads=12), "a window of 40000": dict(attentions={(384, True), (40000, False)}),
            "they take pairs of weights": dict(mlp_bank=empty(24, 3072, 768)), "DC's window of 50000": dict(dc_window=50000),
            "of 256 hidden ones": dict(mlp_bank=empty(12, 2, 384, 768))}.items():
        recwarn.clear()
        dispatch.warn_once.cache_clear()
        assert not takes(**bad) and not takes(**bad)
        said, = recwarn.list  # once
        assert "no TPU kernels for layers of" in str(said.message) and why in str(said.message).replace("multiples", "a multiple"), said

def test_what_is_kept_is_what_fits(monkeypatch):
    """All of q, k and v first, then P of lm_head, then all hidden activations; more memory never keeps less."""
    keep = lambda tokens, gib: dispatch.what_to_keep(tokens, 11, 768, 50304, int(gib * GiB))
    for chip, tokens, mlp in (("v6e", 49152, True), ("v5e", 32768, True), ("v5e", 49152, False)):
        monkeypatch.setattr(dispatch, "target", CHIPS[chip])
        assert keep(tokens, 1.0) == dispatch.Kept(tokens, mlp)
    for more, less in itertools.pairwise(keep(49152, gib / 10) for gib in range(0, 58, 2)):
        assert more.p_tokens >= less.p_tokens and more.mlp >= less.mlp and (not less.mlp or less.p_tokens == 49152)
    assert less == dispatch.Kept(0, False) and not keep(49152, 5.7).qkv and not keep(49152, 8.7).qkv
    with pytest.raises(Refused, match="49152 tokens takes some 5.0 GiB beside 8.8 of state and 2.0 of programs.*15.75: take more chips"):
        keep(49152, 8.8)
