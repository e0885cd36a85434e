"""
The schedule of the real run, step by step against the record's own, YaRN's tables, and the list of distinct graphs.
    python -m pytest tests/test_schedule.py
"""
import dataclasses

import numpy as np
import pytest
import torch
from conftest import ROOT

import train_gpt_xla as t

args = t.presets["record"]()

@pytest.fixture(scope="module")
def reference():
    return dict(np.load(ROOT / "tests" / "data" / "parity" / "full_schedule.npz"))

def test_every_step_of_the_record(reference):
    columns = [str(c) for c in reference["columns"]]
    yarn, ws_long = t.Yarn(128, 128), 3
    assert len(reference["schedule"]) == args.num_iterations + 1 == 1776
    for row in reference["schedule"]:
        want = dict(zip(columns, row, strict=True))
        step = int(want["step"])
        new = t.get_ws(step, args)[1]
        if new != ws_long:
            yarn.apply(ws_long, new)
            ws_long = new
        mtp = t.get_mtp_weights(step, args)
        got = dict(step=step, lr=t.get_lr(step, args), muon_momentum=t.get_muon_momentum(step, args), ws_short=t.get_ws(step, args)[0],
                   ws_long=ws_long, batch_size=t.get_bs(step, args), n_mtp=len(mtp), attn_scale=yarn.attn_scale,
                   **{f"mtp{i}": w for i, w in enumerate((mtp + [0, 0])[:3])})
        assert got == pytest.approx(want, rel=1e-6, abs=1e-7), step

@pytest.mark.parametrize("D", [4, 8, 12, 20, 64, 128])
def test_dims_that_stand_still(D):
    upstream = torch.arange(D) % (D // 2) >= D // 4
    assert torch.equal(t.still_dims(D), upstream[t.half_split(D)])

@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_yarn_tables(reference, dtype):
    torch_dtype = dict(f32=torch.float32, bf16=torch.bfloat16)[dtype]
    back = t.half_split(128).argsort()
    rows = [*range(32), 1000, 4095]
    for name, yarn in (("yarn", t.Yarn(128, 128)), ("paired", t.YarnPairedHead(128, 128))):
        ws_long = 3
        for step in (0, *reference["transition_steps"].tolist()):
            new = t.get_ws(step, args)[1]
            if new != ws_long:
                yarn.apply(ws_long, new)
                ws_long = new
            tag = f"{dtype}/{name}/step{step}"
            assert torch.equal(yarn.angular_freq, torch.from_numpy(reference[f"{tag}/angular_freq"]))
            for k, factor in enumerate(yarn.factors(4096, torch.tensor(yarn.numbers()[:-1]), torch_dtype), start=1):
                factor = factor[..., back].float()
                factor = torch.cat(factor.unbind(), dim=-1) if factor.ndim == 3 else factor
                want = torch.from_numpy(reference[f"{tag}/factor{k}_rows_0_31_1000_4095"]).float()
                assert (factor[rows] - want).abs().max() <= (2e-6 if dtype == "f32" else 2 ** -8)

def test_split_and_transitions(reference):
    assert t.get_split_step(args) == int(reference["split_step"]) == 1157
    changes = [s for s in range(1, args.num_iterations) if t.get_ws(s, args) != t.get_ws(s - 1, args)]
    assert changes == reference["transition_steps"].tolist()

def test_distinct_graphs_cover_the_run():
    graphs = t.distinct_graphs(args)
    train = sorted(s for g, steps in graphs.items() if g.train for s in steps)
    val = sorted(s for g, steps in graphs.items() if not g.train for s in steps)
    assert train == list(range(1775)) and val == [*range(0, 1751, 250), 1775]
    assert len([g for g in graphs if g.train]) == 9 and len(graphs) == 14
    assert len({g.name for g in graphs}) == len(graphs), "a name must tell graphs apart"
    assert [s for g, steps in graphs.items() if g.copy_embed for s in steps] == [1157]
    for g, steps in graphs.items():
        for step in steps:
            assert t.get_graph(step, args, g.train) == g
    last = t.get_graph(1775, args, train=False)
    assert (last.ws_short, last.ws_long, last.split_embed) == (6, 20, True)

def test_rehearsal_passes_through_everything_the_record_does():
    graphs = t.distinct_graphs(t.presets["rehearsal"]())
    for name in ("ws_long", "n_mtp", "adam", "split_embed", "copy_embed"):
        of = lambda gs, name=name: {getattr(g, name) for g in gs}
        assert of(graphs) == of(t.distinct_graphs(args)), name
    assert len({g.tokens for g in graphs if g.train}) == 3

def test_options():
    got, options = t.parse_args(["--preset", "rehearsal", "--ws_schedule", "2,4,6", "--save_checkpoint", "true", "--no_replay"])
    assert got.ws_schedule == (2, 4, 6) and got.save_checkpoint is True and options.no_replay
    rest = {f.name for f in dataclasses.fields(got)} - {"ws_schedule", "save_checkpoint", "run_id", "train_files", "val_files"}
    assert all(getattr(got, n) == getattr(t.presets["rehearsal"](), n) for n in rest)
