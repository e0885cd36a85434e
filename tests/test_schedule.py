"""
The schedule of the real run, step by step against the record's own, YaRN's tables, the bigrams' rows, and the list of distinct graphs.
    python -m pytest tests/test_schedule.py
"""
import dataclasses
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import eager
import numpy as np
import pytest
import torch
from conftest import ROOT

import train_gpt_xla as t

args = t.presets["record"]()

@pytest.fixture(scope="module")
def reference():
    return dict(np.load(ROOT / "tests" / "data" / "parity" / "full_schedule.npz"))

class Host(t.TrainingManager):
    """What a TrainingManager does on the host, without a model: Adam's numbers are how often it has stepped."""
    def __init__(self):
        self.training_schedule, self.args, self.ws_long, self.adam_labels = t.TrainingSchedule(args), args, 3, ["all", "embed"]
        self.counts = dict.fromkeys(self.adam_labels, 0)
        self.model = SimpleNamespace(block_size=args.block_size, yarn=t.Yarn(args.head_dim), yarn_paired_head=t.Yarn(args.head_dim, True),
                                     qk_bank="", training=True, train=lambda mode: None)
        self.optimizer = SimpleNamespace(param_cfgs={"": SimpleNamespace(initial_lr=0.023)}, advance=self.advance,
                                         get_numbers=lambda lr: {label: (float(n), lr) for label, n in self.counts.items()})

    def advance(self, split_embed: bool):
        self.counts = dict(all=self.counts["all"] + 1, embed=self.counts["embed"] + split_embed)

def steps_of_the_record() -> Iterator[tuple[int, Host]]:
    manager = Host()
    for step in range(args.num_iterations + 1):
        manager.advance_schedule(step)
        yield step, manager

def test_every_step_of_the_record(reference):
    columns = [str(c) for c in reference["columns"]]
    assert len(reference["schedule"]) == args.num_iterations + 1 == 1286
    adam_steps = 0
    for (step, manager), row in zip(steps_of_the_record(), reference["schedule"], strict=True):
        want = dict(zip(columns, row, strict=True))
        graph, numbers = manager.graph, manager.unpack(manager.get_numbers())
        lr = manager.training_schedule.get_lr(step)
        mtp = numbers.mtp_weights.tolist()
        got = dict(step=step, lr=lr, muon_momentum=float(numbers.muon_momentum), ws_short=graph.ws_short, ws_long=graph.ws_long,
                   batch_size=graph.tokens * t.ROWS, max_seq_len=manager.training_schedule.lookup(step)[0].train_max_seq_len,
                   n_mtp=graph.n_mtp, mtp0=mtp[0], mtp1=mtp[1], mtp2=mtp[2], prefix_weight=float(numbers.prefix_weight), adam=graph.adam,
                   attn_scale=manager.model.yarn.attn_scale)
        assert got == pytest.approx(want, rel=1e-6, abs=1e-7), step
        assert got["lr"] == pytest.approx(want["lr"], rel=1e-12) and got["attn_scale"] == pytest.approx(want["attn_scale"], rel=1e-12)
        assert graph.prefix == (want["prefix_weight"] > 0) and not any(mtp[graph.n_mtp:])
        adam_steps += graph.adam
        assert numbers.adam["all"][0] == adam_steps and numbers.adam["embed"][0] == max(0, adam_steps - 424)  # first at step 849
        assert float(numbers.muon_lr) == pytest.approx(0.023 * want["lr"]) and float(numbers.adam["all"][1]) == pytest.approx(want["lr"])
        for yarn, freq in ((manager.model.yarn, numbers.yarn), (manager.model.yarn_paired_head, numbers.yarn_paired_head)):
            assert freq.tolist() == pytest.approx(yarn.numbers(), rel=1e-7)
            assert float(freq[-1]) == pytest.approx(want["attn_scale"], rel=1e-6)

@pytest.mark.parametrize("D", [4, 8, 12, 20, 64, 128])
def test_dims_that_stand_still(D):
    upstream = torch.arange(D) >= D // 2
    assert torch.equal(t.still_dims(D), upstream[t.half_split(D)])

def test_yarn_tables(reference):
    back = t.half_split(128).argsort()
    rows = torch.from_numpy(reference["factor_rows"])
    at = {0, *reference["transition_steps"].tolist()}
    for step, manager in steps_of_the_record():
        if step not in at:
            continue
        for (name, yarn), (dtype, torch_dtype) in itertools.product(
                dict(yarn=manager.model.yarn, paired=manager.model.yarn_paired_head).items(),
                dict(f32=torch.float32, bf16=torch.bfloat16).items()):
            tag = f"{dtype}/{name}/step{step}"
            assert torch.equal(yarn.angular_freq, torch.from_numpy(reference[f"{tag}/angular_freq"])), tag
            freq = torch.tensor(yarn.numbers()[:-1])
            found = yarn.factors(len(rows), freq, torch_dtype, rows[None].float())
            counted = yarn.factors(1001, freq, torch_dtype)
            for k, (factor, other) in enumerate(zip(found, counted, strict=True), start=1):
                factor = factor[0, 0, ..., back].float()  # [37, 128], paired [2, 37, 128]
                assert torch.equal(factor[..., :33, :], other[..., rows[:33], :][..., back].float()), "without positions, another table"
                factor = torch.cat(factor.unbind(), dim=-1) if name == "paired" else factor
                want = torch.from_numpy(reference[f"{tag}/factor{k}_rows"]).float()
                assert (factor - want).abs().max() <= (1e-6 if dtype == "f32" else 2 ** -8), f"{tag} factor{k}"

def test_bigrams_of_the_record(reference, monkeypatch):
    """From the loader's numbers to what the model looks up, with tables of the record's sizes that hold their rows' numbers."""
    tokens = np.tile(reference["bigram/tokens"], (t.ROWS, 1))
    batch = torch.from_numpy(np.stack([tokens, tokens, np.zeros_like(tokens), t.get_bigram_hash(tokens)], axis=1))
    assert (batch[:, 3].numpy() == reference["bigram/hash"]).all()

    class Found(Exception):
        pass
    def weighted(x0, bigram):  # cache[0]
        raise Found(bigram[1])
    monkeypatch.setattr(t, "weighted", weighted)
    with eager.eager(kernels=False), torch.no_grad():
        model = t.GPT(args.vocab_size, args.num_layers, 6, 4, 24, bigram_vocab_size=args.bigram_vocab_size,
                      bigram_sign_table_rows=args.bigram_sign_table_rows)
        model.bigram_embed.weight.fill_(1.0)
        model.bigram_embed.weight[:, 0] = torch.arange(len(model.bigram_embed.weight))
        model.bigram_sign_table.fill_(1.0)
        model.bigram_sign_table[:, 1] = torch.arange(len(model.bigram_sign_table))
        numbers = [torch.tensor(yarn.numbers()) for yarn in (model.yarn, model.yarn_paired_head)]
        with pytest.raises(Found) as found:
            model(*batch.unbind(1), t.ForwardScheduleConfig(torch.ones(1), None, 128, 384, *numbers))
    x0_bigram = found.value.args[0].numpy()
    assert (x0_bigram[..., 0] == reference["bigram/hash"]).all() and (x0_bigram[..., 1] == reference["bigram/sign_row"]).all()

def test_boundaries_and_split(reference):
    schedule = t.TrainingSchedule(args)
    assert schedule.boundaries == [tuple(b) for b in reference["boundaries"].tolist()]
    assert schedule.split_step == int(reference["split_step"]) == 847
    windows = [schedule.lookup(s)[0].window_sizes for s in range(args.num_iterations)]
    assert [s for s in range(1, args.num_iterations) if windows[s] != windows[s - 1]] == reference["transition_steps"].tolist()
    last = t.get_graph(1285, schedule, train=False)
    assert (last.ws_short, last.ws_long) == tuple(reference["validation_windows_last"]) == (6, 20) and last.split_embed

@pytest.mark.parametrize("scheduled, ends, split", [
    (87, (29, 58, 87), 59), (13, (4, 9, 13), 9), (3, (1, 2, 3), 3), (100, (33, 67, 100), 67)])
def test_split_follows_an_odd_step(scheduled, ends, split):
    """Ends are rounded; embed leaves lm_head after Adam's first step in the third stage, and Adam steps on odd ones."""
    schedule = t.TrainingSchedule(dataclasses.replace(args, num_scheduled_iterations=scheduled, num_extension_iterations=5))
    assert [end for _, end in schedule.boundaries] == [*ends, scheduled + 5] and schedule.split_step == split
    copies = [s for s in range(scheduled + 5) if t.get_graph(s, schedule).copy_embed]
    assert copies == [split] and t.get_graph(split, schedule).adam
    assert [t.get_graph(s, schedule).split_embed for s in (split - 1, split, split + 1)] == [False, False, True]

def test_distinct_graphs_cover_the_run():
    graphs, schedule = t.distinct_graphs(args), t.TrainingSchedule(args)
    train = sorted(s for g, steps in graphs.items() if g.train for s in steps)
    val = sorted(s for g, steps in graphs.items() if not g.train for s in steps)
    assert train == list(range(1285)) and val == [*range(0, 1251, 250), 1285]
    assert len([g for g in graphs if g.train]) == 9 and len(graphs) == 13
    assert len({g.name for g in graphs}) == len(graphs), "a name must tell graphs apart"
    assert [s for g, steps in graphs.items() if g.copy_embed for s in steps] == [847]
    assert not any(g.n_mtp or g.prefix or g.adam for g in graphs if not g.train), "validation has one target a token"
    for g, steps in graphs.items():
        for step in steps:
            assert t.get_graph(step, schedule, g.train) == g

@pytest.mark.parametrize("turns", [2, 4, 8])
def test_graphs_of_rows_in_turn(turns):
    """A program for the rows of each kind of forward pass, and one for each kind of update; both in every step."""
    graphs = t.distinct_graphs(args, turns)
    by_part = {part: {g: steps for g, steps in graphs.items() if g.part == part} for part in ("rows", "update", "whole")}
    assert [len(x) for x in by_part.values()] == [5, 4, 4] and not any(g.train for g in by_part["whole"])
    assert len({g.name for g in graphs}) == len(graphs), "a name must tell graphs apart"
    for part in ("rows", "update"):
        assert sorted(s for steps in by_part[part].values() for s in steps) == list(range(1285))
    assert not any(g.adam or g.copy_embed for g in by_part["rows"])
    schedule = t.TrainingSchedule(args)
    for step in range(1285):
        whole = t.get_graph(step, schedule)
        (row, times), (update, once) = whole.programs(turns)
        assert (times, once) == (turns, 1) and step in by_part["rows"][row] and step in by_part["update"][update]
        assert dataclasses.replace(row, part="whole", adam=whole.adam, copy_embed=whole.copy_embed) == whole
        assert (update.adam, update.copy_embed) == (whole.adam, whole.copy_embed)

def test_rehearsal_passes_through_everything_the_record_does():
    graphs = t.distinct_graphs(t.presets["rehearsal"]())
    for name in ("ws_short", "ws_long", "n_mtp", "prefix", "adam", "split_embed", "copy_embed"):
        of = lambda gs, name=name: {getattr(g, name) for g in gs}
        assert of(graphs) == of(t.distinct_graphs(args)), name
    assert len({g.tokens for g in graphs if g.train}) == 3

def test_options():
    got, options = t.parse_args(["--preset", "rehearsal", "--ws_long_schedule", "2,4,6,8", "--save_checkpoint", "true", "--no_replay"])
    assert got.ws_long_schedule == (2, 4, 6, 8) and got.save_checkpoint is True and options.no_replay
    assert [stage.window_sizes for stage in t.TrainingSchedule(got).stages] == [(1, 2), (3, 4), (5, 6), (6, 8)]
    rest = {f.name for f in dataclasses.fields(got)} - {"ws_long_schedule", "save_checkpoint", "run_id", "train_files", "val_files"}
    assert all(getattr(got, n) == getattr(t.presets["rehearsal"](), n) for n in rest)
