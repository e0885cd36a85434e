"""
One run on 2 devices, stopped and gone on (programs/stop_and_go_on.py): what it logs, learns and leaves, bit-exact resume, and what a
run refuses to go on from. A few steps on 8 devices and on fewer (programs/few_steps.py): the same numbers, and others where they should
be.
    python -m pytest tests/test_run.py             (-m slow: replayed against traced steps, over the whole schedule; 1 and 4 devices)
"""
import gzip
import json
import math
import re
import shutil
from pathlib import Path

import eager
import numpy as np
import pytest
import torch
from conftest import ROOT, program, run_train, toy_options, write_shard
from programs import few_steps
from programs.stop_and_go_on import POINTS, RUN_ON
from test_checkpoint import TEMPLATE, cut, flip, same, save_safetensors

import checkpoint
import train_gpt_xla as t
from spmd import COMPILE_FAST

DEVICES = 2
EVERY_STEP = dict(train_loss_every=1, save_checkpoint=True)

def same_run(a: Path, b: Path):
    """Two checkpoints, but for the clock and the run's name."""
    a, b = (checkpoint.read(path) for path in (a, b))
    for key in a.keys() - {"time", "training_time_ms", "run_id"}:
        same(a[key], b[key], key)

def same_last_state(folder: Path, *runs: str):
    """What --save_checkpoint leaves of two runs, but for their names."""
    states = [torch.load(folder / f"logs/{run}/state_step000028.pt") for run in runs]
    assert [state.pop("run_id") for state in states] == [*runs]
    same(*states)

@pytest.fixture(scope="module")
def driven(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("driven")
    process = run_train(folder, corpus, program="stop_and_go_on.py", devices=DEVICES, timeout=1200, **EVERY_STEP)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, process.stdout

def losses(log: Path) -> dict[int, list[str]]:
    return {s: re.findall(rf"^step:{s}/28 .*?((?:val|train)_loss:\S+)", log.read_text(), re.M) for s in range(29)}

@pytest.fixture(scope="module")
def toy_run(driven):
    """What the first run wrote to its log, and its last state."""
    folder, _ = driven
    return (folder / "logs/toy.txt").read_text(), torch.load(folder / "logs/toy/state_step000028.pt")

# -----------------------------------------------------------------------------
# Log and last state

def test_log_has_upstreams_form(toy_run):
    log, _ = toy_run
    source = (ROOT / "train_gpt_xla.py").read_text()
    assert log.startswith("logs/toy.txt\n" + source), "the log must open with the source that made it"
    rest = log[len(source):]
    assert re.search(r"^Running PyTorch 2\.9\.0\S* with torch_xla 2\.9\.0", rest, re.M)
    assert f"Running on {DEVICES} CPU devices" in rest
    steps = re.findall(r"^step:(\d+)/28 train_time:\d+ms step_avg:\d+\.\d\dms", rest, re.M)
    assert [int(s) for s in steps] == list(range(1, 29))
    val = re.findall(r"^step:(\d+)/28 val_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$", rest, re.M)
    assert [int(s) for s in val] == [0, 14, 28]

def test_log_tells_speed_and_cost(toy_run):
    log, _ = toy_run
    lines = re.findall(r"^step:(\d+)/28 train_time:(\d+)ms .* train_loss:\d+\.\d{4} ms:(\S+) tok/s:(\d+) eta:(\d+)s$", log, re.M)
    assert [int(line[0]) for line in lines] == list(range(2, 29)), "on a CPU there is no peak and no MFU"
    tokens, flops = t.work_until(t.parse_args(toy_options(Path()))[0])
    whole = 0
    for first, line in enumerate(lines):
        stop = int(line[0]) - 1  # the steps that have finished when this one's line is written
        seconds = (stop - first) * float(line[2]) / 1000
        whole += seconds
        assert float(line[3]) == pytest.approx((tokens[stop] - tokens[first]) / seconds, rel=0.01, abs=0.5)  # a whole number
        assert float(line[4]) == pytest.approx(seconds * (flops[-1] - flops[stop]) / (flops[stop] - flops[first]), abs=0.6)
        assert 1000 * whole == pytest.approx(float(line[1]), rel=0.01), "no time counts twice or not at all"
    total = float(re.search(r"^step:28/28 val_loss:\S+ train_time:(\d+)ms", log, re.M).group(1)) / 1000
    cost = re.search(r"^cost at \$3600 an hour: \$(\S+) for the training time, \$(\S+) with", log, re.M)
    assert float(cost.group(1)) == pytest.approx(total, abs=0.01) and float(cost.group(2)) > total
    assert float(re.search(r"^whole run: ms:(\S+)", log, re.M).group(1)) == pytest.approx(1000 * total / 28, abs=0.05)

def test_a_run_predicts_prefixes(driven, corpus):
    """Its vocabulary's: 10 begins with 1, 255 with 25. A new model has all tokens nearly equally probable, so a loss counts its targets."""
    table = torch.load(driven[0] / "prefix_table.pt")
    assert table.tolist() == [-1] * 10 + [i // 10 for i in range(10, 256)] + [-1] * (384 - 256), "the model's vocabulary is padded"
    (_, targets, *_), _, _ = next(t.train_batches(t.parse_args(toy_options(corpus))[0], range(1), [None]))
    n, prefixes = targets.shape[1], (table.numpy()[targets] >= 0).mean()
    count = 1 + 0.5 * (n - 1) / n + 0.25 * (n - 2) / n + 0.25 * prefixes  # a row's last tokens have fewer targets
    first, = losses(driven[0] / "logs/toy.txt")[2]  # read one step later
    assert float(first.split(":")[1]) == pytest.approx(count * math.log(384), rel=2e-3) and prefixes > 0.9

def test_loss_falls_below_unigram_entropy(toy_run):
    log, _ = toy_run
    entropy = float(re.search(r"^unigram entropy: (\S+) nats", log, re.M).group(1))
    val = [float(x) for x in re.findall(r"^step:\d+/28 val_loss:(\S+)", log, re.M)]
    assert val[0] > entropy > val[-1], (val, entropy)

def test_nothing_compiled_after_warmup_and_nothing_on_the_host(toy_run):
    log, _ = toy_run
    assert "graphs compiled after warm-up: 0\n" in log
    assert "operations run on the host: none\n" in log
    graphs, turns = int(re.search(r"Compiling (\d+) graphs", log).group(1)), t.ROWS // DEVICES
    assert graphs == len(re.findall(r"^warmup ", log, re.M)) == len(t.distinct_graphs(t.parse_args(toy_options(Path()))[0], turns)) > 11

def test_profile_holds_the_steps_asked_for(driven):
    trace, = driven[0].glob("logs/toy/profile/plugins/profile/*/*.trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb")), "what xprof reads"
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert names.count("ExecuteComputationWithBarrier") == 3 * (t.ROWS // DEVICES + 1), "of a step the rows in turn, then the update"

@pytest.mark.parametrize("steps", ["5", "0:3", "5:0", "a:b"])
def test_profile_of_no_steps(capsys, steps):
    with pytest.raises(SystemExit):
        t.parse_args(["--profile", steps])
    assert f"--profile: invalid STEP:STEPS value: '{steps}'" in capsys.readouterr().err

def test_checkpoint_has_upstreams_form(toy_run, corpus):
    log, checkpoint = toy_run
    assert checkpoint["step"] == 28 and checkpoint["code"] in log
    assert list(checkpoint)[:4] == ["step", "code", "model", "optimizer"], "upstream's"
    args, _ = t.parse_args(toy_options(corpus))
    assert checkpoint["run_id"] == "toy" and checkpoint["hyperparameters"] == t.hyperparameters(args)
    assert checkpoint["data"] == t.read_data(args) and f"\ndata: {checkpoint['data']}\n" in log, "what the tools know data by"
    upstream = np.load(ROOT / "tests" / "data" / "parity" / "A_f32" / "init.npz")
    model, optimizer = checkpoint["model"], checkpoint["optimizer"]
    assert set(model) == set(upstream) - {"prefix_table"}, "parameters under other names than upstream's"
    assert model["lm_head.weight"].shape == (48, 384) and model["value_embeds"].shape == (5 * 384, 48), "in upstream's layout"
    assert model["scalars"].dtype == torch.float32 and model["mlp_bank"].dtype == torch.bfloat16
    adam = {name: state["step"] for name, state in optimizer.items() if "step" in state}
    assert set(adam.values()) == {14}, "14 odd steps in 28, and embed takes over lm_head's count"
    assert set(optimizer) - set(adam) == {"qk_bank", "vo_bank", "mlp_bank"} and set(optimizer) == set(model) - {"bigram_sign_table"}
    # Q's and K's rows are not in upstream's order: each other weight is its float32 master with the lower half cut off
    for name, shape in dict(vo_bank=(24, 48, 48), mlp_bank=(24, 192, 48)).items():
        master = optimizer[name]["master"]
        assert master.shape == shape and (master.view(torch.int32) & 65535).any()
        assert torch.equal((master.view(torch.int32) & -65536).view(torch.float32), model[name].view(shape).float()), name

@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 2])
def test_replayed_and_traced_runs_are_identical(tmp_path, corpus, devices):
    logs = []
    for run_id, *option in (("replayed",), ("traced", "--no_replay")):
        process = run_train(tmp_path, corpus, *option, devices=devices, run_id=run_id, **EVERY_STEP)
        assert process.returncode == 0, process.stderr[-3000:]
        assert "graphs compiled after warm-up: 0\n" in process.stdout, "a traced step must be the warmed-up step"
        logs.append(losses(tmp_path / f"logs/{run_id}.txt"))
    assert logs[0] == logs[1] and [s for s, found in logs[0].items() if found] == [0, *range(2, 29)]
    same_last_state(tmp_path, "replayed", "traced")

# -----------------------------------------------------------------------------
# A few steps, on 8 devices in this process

@pytest.fixture(scope="module")
def eight() -> list[dict[str, torch.Tensor]]:
    """What each of the steps leaves."""
    manager = few_steps.build()
    return [few_steps.take(manager, step) for step in few_steps.STEPS]

@pytest.mark.parametrize("n", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_fewer_devices_compute_the_same(eight, tmp_path, n):
    """With rows in turn, and a table of bigrams in fewer parts."""
    program("few_steps.py", tmp_path / "results.pt", PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(n), XLA_FLAGS=COMPILE_FAST)
    for step, want, got in zip(few_steps.STEPS, eight, torch.load(tmp_path / "results.pt"), strict=True):
        eager.check(got, want, 1e-4, f"step {step} on {n} devices")

def test_tie_and_split(eight):
    lm_head, embed = ([results[name] for results in eight] for name in ("lm_head.weight", "embed.weight"))
    assert torch.equal(embed[0], lm_head[0].T) and torch.equal(embed[1], lm_head[1].T) and not torch.equal(embed[0], embed[1])
    assert torch.equal(embed[2], embed[1]) and torch.equal(lm_head[2], lm_head[1]), "an even step, which Adam does not take"
    assert not torch.equal(embed[3], embed[2]) and not torch.equal(lm_head[3], lm_head[2]) and not torch.equal(embed[3], lm_head[3].T)
    of_both = lambda key: [[results[f"{name} {key}"] for name in ("lm_head.weight", "embed.weight")] for results in eight]
    for key in ("exp_avg", "exp_avg_sq"):
        (_, none), (a, b), (c, d), (e, f) = of_both(key)
        assert not none.any() and a.any() and all(torch.equal(a, x) for x in (b, c, d)) and not torch.equal(e, f), key
    assert [[int(x) for x in both] for both in of_both("step")] == [[0, 0], [1, 0], [1, 0], [2, 2]], "embed's own first step is its second"

def test_a_state_goes_on(eight):
    """In a model of other weights, after the split: bit for bit."""
    first, then = few_steps.build(), few_steps.build(seed=1)
    for step in (0, 3):
        few_steps.take(first, step)
    then.model.load_state_dict(first.model.state_dict())
    then.set_state(first.get_state(), first.get_schedule())
    for step, want in zip((4, 5), eight[2:], strict=True):
        same(few_steps.take(then, step), want, f"step {step}")

def test_a_state_that_does_not_fit(eight):
    manager = few_steps.build()
    state, schedule, before = manager.get_state(), manager.get_schedule(), manager.get_state()
    table = "bigram_embed.weight"
    for change, words in {
            "NorMuonAndAdam: qk_bank: master is missing": lambda s: s["qk_bank"].pop("master"),
            "NorMuonAndAdam: scalars is missing": lambda s: s.pop("scalars"),
            "NorMuonAndAdam: extra is not part of it": lambda s: s.update(extra={}),
            f"NorMuonAndAdam: {table}: exp_avg is (64, 48) torch.float32, this run wants (512, 48)": lambda s: s[table].update(
                exp_avg=torch.zeros(64, 48)),
            "NorMuonAndAdam: embed.weight: step is a float, not a int": lambda s: s["embed.weight"].update(step=1.0),
            "NorMuonAndAdam: lm_head.weight: exp_avg_sq is (256, 48) torch.bfloat16": lambda s: s["lm_head.weight"].update(
                exp_avg_sq=torch.zeros(256, 48, dtype=torch.bfloat16))}.items():
        wrong = {name: {key: x + 1 for key, x in values.items()} for name, values in state.items()}
        words(wrong)
        with pytest.raises(ValueError, match="^" + re.escape(change)):
            manager.set_state(wrong, schedule)
    same(manager.get_state(), before, "nothing is taken of a state that is refused")

def test_replayed_and_traced_steps_are_identical(eight):
    manager = few_steps.build(replay=False)
    for step, want in zip((0, 3), eight, strict=False):
        same(few_steps.take(manager, step), want, f"step {step}")

def test_each_row_has_its_own_loss(eight):
    """Another number in one row of what a step takes changes the loss of that row, and of no other."""
    manager, changed = few_steps.build(), {}
    state = manager.model.state_dict()
    def losses(change=None, **weights):
        manager.model.load_state_dict(state | weights)
        manager.reset()
        batch = few_steps.get_batch(0)
        if change:
            change(batch)
        return few_steps.take(manager, 0, batch)["losses"]
    base = losses()
    assert torch.equal(base, eight[0]["losses"]), "the same again"
    def token(batch):
        batch[5, 0, 9] = 77
    def target(batch):
        batch[3, 1, 31] = (batch[3, 1, 31] + 1) % 250
    def documents(batch):
        batch[6, 2, 20:] = batch[6, 2, 19]
    def bigram(batch):
        batch[2, 3, 4] = (batch[2, 3, 4] + 256) % 512  # of another device
    for change, row in ((token, 5), (target, 3), (documents, 6), (bigram, 2)):
        changed[change.__name__] = (losses(change) != base).nonzero().flatten().tolist() == [row]
    assert all(changed.values()), changed
    table, bigrams = state["bigram_embed.weight"].clone(), few_steps.get_batch(0)[:, 3]
    last = int(bigrams[7, 5])
    table[last] += 1
    readers = (bigrams == last).any(1)
    assert not readers.all() and torch.equal(losses(**{"bigram_embed.weight": table}) != base, readers)
    manager.model.set_prefix_table(torch.full((256,), -1))
    assert (losses() < base).all(), "without prefixes a sum of fewer terms"

# -----------------------------------------------------------------------------
# Stopped and gone on

@pytest.mark.parametrize("point", POINTS)
def test_resume_is_bit_exact(driven, point):
    folder, _ = driven
    n = POINTS[point]
    loaders = [checkpoint.read(folder / TEMPLATE.format("toy", i))["loader"] for i in (8, 10)]
    assert [shard for shard, _ in loaders] == [0, 1], "the first shard is to end here"
    last = min(28, n + RUN_ON)
    for step in range(n + 2, min(last + 1, 28), 2):
        same_run(folder / TEMPLATE.format("toy", step), folder / TEMPLATE.format(f"from{n}", step))
    if last == 28:
        same_last_state(folder, "toy", f"from{n}")
    whole, resumed = losses(folder / "logs/toy.txt"), losses(folder / f"logs/from{n}.txt")
    assert {s: x for s, x in whole.items() if n < s <= last} == {s: x for s, x in resumed.items() if x}

def test_signals_save_and_the_same_command_goes_on(driven):
    folder, stdout = driven
    assert re.findall(r"^EXIT again (\d+)$", stdout, re.M) == [str(checkpoint.PREEMPTED)]
    assert re.findall(r"^(SIG\w+): stopped at step", stdout, re.M) == ["SIGTERM", *["SIGHUP"] * (len(set(POINTS.values())) - 1), "SIGINT"]
    log = (folder / "logs/again.txt").read_text()
    assert "SIGINT: stopped at step 14" in log and "resumed from logs/again/checkpoint_step000014.pt at step 14" in log
    assert log.count((ROOT / "train_gpt_xla.py").read_text()) == 1, "the source is printed once"
    assert losses(folder / "logs/again.txt") == losses(folder / "logs/toy.txt")
    same_last_state(folder, "toy", "again")
    times = [int(x) for x in re.findall(r"train_time:(\d+)ms", log)]
    assert times == sorted(times), "the clock goes on"

def test_a_finished_run_is_finished(driven):
    """The same command says so, and leaves the log as it is; of other hyperparameters it is another run, which is refused."""
    folder, stdout = driven
    loss, time = re.search(r"^step:28/28 (val_loss:\S+) (train_time:\S+)", (folder / "logs/again.txt").read_text(), re.M).groups()
    assert re.findall(r"^logs/again: this run is finished: (.*?)\. Another", stdout, re.M) == [f"step 28, {loss} {time}"]
    assert "EXIT again train_gpt_xla.py: logs/again: seed was 0, now it is 1" in stdout

def test_a_resumed_run_goes_on_in_wandb(driven):
    from test_wandb import read
    folder, _ = driven
    first, second = read(folder)
    assert first[0] == second[0] and first[0].startswith("again-") and (first[3], second[3]) == (checkpoint.PREEMPTED, 0)
    assert first[1]["model_dim"] == 48 and first[1]["seed"] == 0 and first[1]["run_id"] == "again"
    log = losses(folder / "logs/again.txt")
    assert sorted(first[2]) == [0, *range(2, 15)] and sorted(second[2]) == list(range(15, 29))
    for step, numbers in (first[2] | second[2]).items():
        assert log[step] == [f"{k}:{numbers[k]:.4f}" for k in ("train_loss", "val_loss") if k in numbers], step
    assert {"ms", "tok/s", "eta"} < second[2][20].keys()

def test_a_loss_that_is_not_finite_is_not_saved(driven):
    """Step 10 goes wrong; a save at step 12 is the first to look, finds the step, and keeps what is there."""
    folder, stdout = driven
    stop, = re.findall("^EXIT nan train_gpt_xla.py: (.*)", stdout, re.M)
    assert "the loss of step 10 is nan" in stop and stop.endswith("the last good checkpoint is logs/nan/checkpoint_step000008.pt")
    assert [path.name for path in sorted((folder / "logs/nan").glob("*.pt"))] == [f"checkpoint_step{n:06d}.pt" for n in (4, 8)]

def test_a_loss_that_is_not_finite_without_checkpoints(driven):
    """It stops where it is next read, which is at step 2."""
    folder, stdout = driven
    stop, = re.findall("^EXIT bare train_gpt_xla.py: (.*)", stdout, re.M)
    assert "the loss of step 1 is nan: see logs/bare.txt" in stop and "checkpoint" not in stop
    assert not re.search(r"^step:[3-9]/28 ", (folder / "logs/bare.txt").read_text(), re.M)

def test_graphs_are_compiled_once(driven):
    """The resumed runs of the process execute the programs of the first: same shapes, same shardings."""
    _, stdout = driven
    assert set(re.findall(r"graphs compiled after warm-up: (\d+)", stdout)) == {"0"}

def test_init_from_takes_upstreams_names(driven):
    """From toy's initial weights, under another seed."""
    folder, _ = driven
    a, b = (checkpoint.read(folder / TEMPLATE.format(run, 4)) for run in ("toy", "init"))
    for key in ("model", "optimizer", "losses", "loader"):
        same(a[key], b[key], key)

# -----------------------------------------------------------------------------
# Broken files and refusals: one line each, and the folder stays as it was

@pytest.fixture
def refused(driven, tmp_path, corpus, monkeypatch, capsys):
    """main() in this process on a folder with the toy run's checkpoints of steps 12 and 14; spoil(path of 14) comes first."""
    def run(spoil, *words: str, options=("--resume",), **fields):
        folder = tmp_path / "logs/toy"
        folder.mkdir(parents=True)
        for step in (12, 14):
            shutil.copy(driven[0] / TEMPLATE.format("toy", step), folder)
        spoil(folder / "checkpoint_step000014.pt")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(t, "prefetch", lambda *args: pytest.fail("not refused before the warm-up"))
        with pytest.raises(SystemExit) as e:
            t.main([*toy_options(corpus, **EVERY_STEP | fields), *options])
        assert e.value.code.startswith("train_gpt_xla.py: ") and "\n" not in e.value.code, e.value.code
        for word in words:
            assert word in e.value.code, (word, e.value.code)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == before
    return run

def edited(change):
    """Spoils a checkpoint with a valid checksum."""
    def spoil(path: Path):
        state = checkpoint.read(path)
        change(state)
        checkpoint.write(path, state)
    return spoil

BROKEN = {
    "truncated": (cut, ["step000014.pt", "cut short"]),
    "flipped bit": (flip, ["step000014.pt", "checksum", "--resume PATH"]),
    "missing optimizer": (edited(lambda s: s.pop("optimizer")), ["step000014.pt", "optimizer is missing"]),
    "missing moment": (edited(lambda s: s["optimizer"]["scalars"].pop("exp_avg")), ["NorMuonAndAdam: scalars: exp_avg is missing"]),
    "missing loader position": (edited(lambda s: s.pop("loader")), ["step000014.pt", "loader is missing", "--run_id"]),
    "wrong shape": (edited(lambda s: s["optimizer"]["mlp_bank"].update(master=torch.zeros(24, 192, 16))),
                    ["NorMuonAndAdam: mlp_bank: master", "(24, 192, 16)"]),
    "wrong weight": (edited(lambda s: s["model"].update({"embed.weight": torch.zeros(384, 16)})), ["embed.weight", "(384, 16)"]),
    "extra key": (edited(lambda s: s.update(surprise=1)), ["surprise is unknown"]),
    "extra parameter": (edited(lambda s: s["model"].update(surprise=torch.ones(1))), ["surprise is not a parameter"]),
    "another format": (lambda path: np.savez(path.open("wb"), a=np.ones(3)), ["step000014.pt", "not a checkpoint", "--init_from"]),
    "upstream's": (lambda path: torch.save(dict(step=1, code="", model={}, optimizer={}), path), ["not a checkpoint", "--init_from"]),
    "other version": (edited(lambda s: s.update(version=1)), ["version 1", f"reads {checkpoint.VERSION}"]),
    "safetensors": (lambda path: save_safetensors(path), ["step000014.pt: not a checkpoint (safetensors)", "--init_from takes"]),
    "a web page": (lambda path: path.write_text("<html>"), ["step000014.pt: not a checkpoint (a web page)"]),
    "not finite": (edited(lambda s: s["model"]["scalars"].fill_(float("nan"))), ["model.scalars holds a number that is not finite"]),
}

@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(refused, case):
    spoil, words = BROKEN[case]
    refused(spoil, *words, options=("--resume", "logs/toy/checkpoint_step000014.pt"))

def test_empty_folder(refused):
    refused(lambda path: [file.unlink() for file in path.parent.iterdir()], "logs/toy", "no checkpoint", "--resume")

def test_a_folder_is_no_checkpoint(refused):
    refused(lambda path: None, "logs: a folder: --resume takes latest or a checkpoint_step*.pt", options=("--resume", "logs"))

def test_nothing_whole_is_not_a_fresh_start(refused):
    refused(lambda path: [cut(file) for file in path.parent.iterdir()], "none of its 2 checkpoints is whole", options=(), save_every=5)

@pytest.mark.parametrize("fields, words", [
    (dict(vocab_size=302), ["vocab_size was 301, now it is 302", "--run_id"]),
    (dict(head_dim=16, model_dim=96, bigram_dim=96), ["bigram_dim was 48, now it is 96"]),
    (dict(seed=3), ["seed was 0, now it is 3"]),
    (dict(train_bs_schedule="256,512,1024,768"), ["train_bs_schedule was (256, 512, 768, 768), now it is (256, 512, 1024, 768)"]),
])
def test_other_hyperparameters(refused, fields, words):
    refused(lambda path: None, *words, **fields)

@pytest.mark.parametrize("name, field, i", [("train_000.bin", "train_files", 1), ("train_001.bin", "train_files", 2),
                                            ("val_000.bin", "val_files", 1)])
def test_data_rewritten_in_the_middle(refused, corpus, tmp_path, name, field, i):
    """A few tokens trade places, far from either end: also in a shard that the run has left behind, and in one that it has not read."""
    shutil.copytree(corpus, tmp_path / "data")
    tokens = np.fromfile(corpus / name, dtype=np.uint16)[512:]
    middle = len(tokens) // 2
    tokens[middle:middle + 20] = tokens[middle:middle + 20][::-1].copy()
    write_shard(tmp_path / "data" / name, tokens)
    fields = dict(train_files=tmp_path / "data/train_*.bin", val_files=tmp_path / "data/val_*.bin")
    refused(lambda path: None, f"shard {i} of {field} was {name} with (tokens, checksum) ({len(tokens)}, ", "--run_id", **fields)

def test_another_runs_checkpoints_are_not_overwritten(refused, driven):
    other = driven[0] / TEMPLATE.format("toy", 6)
    refused(lambda path: None, "logs/toy has checkpoints of its own", options=("--resume", str(other)))

def test_a_run_that_saves_needs_a_name(capsys):
    for options in (["--save_every", "5"], ["--resume"]):
        with pytest.raises(SystemExit) as e:
            t.main(options)
        assert e.value.code == 2 and "need --run_id NAME" in capsys.readouterr().err
