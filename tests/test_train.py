"""
The script as its user calls it: each bad input's one line, before anything is compiled, and signals. (A run: test_run.py)
    python -m pytest tests/test_train.py
"""
import io
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_xla
from conftest import BOS, make_tokens, toy_options, write_shard

import muon_xla
import train_gpt_xla as t
from gradients import Gradients
from replay import Recording


def one_line(message: str, *words: str):
    """A run stops with a single line that holds the words."""
    assert message.startswith("train_gpt_xla.py: ") and "\n" not in message.strip(), message[-2000:]
    for word in words:
        assert word in message, (word, message)

@pytest.fixture
def refused(tmp_path, corpus, monkeypatch):
    """main() on the toy model in this process, for what is refused before any device is touched."""
    def run(*words: str, **fields):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(t, "setup_devices", lambda *_: pytest.fail("not refused before the devices are set up"))
        with pytest.raises(SystemExit) as e:
            t.main(toy_options(corpus, **fields))
        one_line(str(e.value), *words)
    return run

BROKEN = {
    "wrong magic": (dict(magic=1), ["magic number 1"]),
    "wrong version": (dict(version=2), ["version 2"]),
    "header promises more": (dict(promised=9000), ["promises 9000 tokens", "has 8000"]),
    "header promises fewer": (dict(promised=7000), ["promises 7000 tokens", "has 8000"]),
}

@pytest.mark.parametrize("pattern", ["train_files", "val_files"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_shard(tmp_path, refused, case, pattern):
    kwargs, words = BROKEN[case]
    write_shard(tmp_path / "bad_000.bin", make_tokens(8000, 5), **kwargs)
    refused("bad_000.bin", *words, **{pattern: tmp_path / "bad_*.bin"})

def test_truncated_shards(tmp_path, refused):
    write_shard(tmp_path / "cut_000.bin", make_tokens(8000, 5))
    os.truncate(tmp_path / "cut_000.bin", 1024 + 2 * 8000 - 101)
    refused("cut_000.bin", "promises 8000 tokens", train_files=tmp_path / "cut_*.bin")
    os.truncate(tmp_path / "cut_000.bin", 500)
    refused("cut_000.bin", "shorter than its header", train_files=tmp_path / "cut_*.bin")

def test_token_beyond_vocabulary(tmp_path, refused):
    tokens = make_tokens(8000, 5)
    tokens[4321] = 301
    write_shard(tmp_path / "oov_000.bin", tokens)
    refused("oov_000.bin", "token 301", "vocabulary of 301", val_files=tmp_path / "oov_*.bin")

def test_no_shard(tmp_path, refused):
    refused("none_*.bin", "data/fineweb.py", train_files=tmp_path / "none_*.bin")

# Beside each field's name: a value that is none, and others that must be in its line
OUTSIDE = [
    (dict(train_bs_schedule="512,1000,1536,1536"), "1000"), (dict(train_bs_schedule=""), "()"),
    (dict(train_bs_schedule="512,0,512,512"), "0"),
    (dict(train_bs_schedule="512,512,512,-128"), "-128"), (dict(val_batch_size=0), "0"), (dict(val_tokens=4000), "4000", "1024"),
    (dict(val_tokens=0), "0", "from 1"), (dict(val_tokens=-4096), "-4096"), (dict(train_max_seq_len_schedule="0,2,2,2"), "0"),
    (dict(train_max_seq_len_schedule="32,32,32,1"), "1", "from 2"), (dict(train_max_seq_len_schedule="32,-64,32,32"), "-64"),
    *((dict([(name, schedule)]), "4 numbers, one for each of TRAINING_STAGES") for name in (
        "train_bs_schedule", "train_max_seq_len_schedule", "ws_short_schedule", "ws_long_schedule")
      for schedule in ("128", "128,128,128", "128,128,128,128,128")),
    (dict(num_scheduled_iterations=0), "0"), (dict(num_scheduled_iterations=2), "from 3"),
    (dict(num_scheduled_iterations=10**400), "1000000"), (dict(num_extension_iterations=-1), "-1"),
    *((dict(cooldown_frac=x), x) for x in ("0.0", "-0.5", "1.5", "nan", "inf")),
    (dict(train_loss_every=-1), "-1"), (dict(val_loss_every=-1), "-1"), (dict(save_every=-1), "-1"), (dict(keep_checkpoints=0), "0"),
    (dict(block_size=0), "0"), (dict(block_size=-16), "-16"), (dict(dc_window=0), "0"), (dict(dc_window=65537), "65536"),
    (dict(ws_short_schedule="1,3,0,6"), "0"), (dict(ws_short_schedule="1,3,-5,6"), "-5"), (dict(ws_long_schedule="3,-7,11,13"), "-7"),
    (dict(ws_long_schedule="3,7,13,11"), "only grow"), (dict(ws_validate_post_yarn_ext=0), "0"), (dict(vocab_size=0), "0"),
    (dict(vocab_size=-301), "-301"), (dict(vocab_size=65537), "65536"), (dict(bos_id=301), "vocab_size 301"), (dict(bos_id=-1), "-1"),
    (dict(bigram_vocab_size=1028), "1028", "multiple of 8"), (dict(bigram_vocab_size=8), "from 16"), (dict(bigram_vocab_size=-16), "-16"),
    (dict(bigram_dim=40), "40", "model_dim 48"), (dict(bigram_dim=96), "96"), (dict(bigram_sign_table_rows=0), "0"),
    (dict(num_layers=12), "12"), (dict(num_heads=4), "must be 6"), (dict(num_heads=0), "0"), (dict(head_dim=6, model_dim=36), "6"),
    (dict(head_dim=4), "head_dim 4", "model_dim 48"), (dict(model_dim=-48), "-48"), (dict(model_dim=8), "from 12"),
    (dict(dtype="float16"), "float16"), (dict(seed=-1), "-1"), *((dict(run_id=x), repr(x)) for x in ("", "..", "a/b", "a\nb")),
    (dict(profile="27:3"), "27:3", "28 steps"),
]

@pytest.mark.parametrize("fields, words", [(fields, words) for fields, *words in OUTSIDE])
def test_fields_that_cannot_run(refused, fields, words):
    refused(next(iter(fields)), *words, **fields)
    assert not os.path.exists("logs")

@pytest.mark.parametrize("name, value", [
    ("val_tokens", True), ("seed", 1.0), ("cooldown_frac", "0.5"), ("cooldown_frac", True), ("dc_window", None), ("save_checkpoint", 1),
    ("train_bs_schedule", [512] * 4), ("train_bs_schedule", (512.0,) * 4), ("ws_long_schedule", (3, 7, 11, True)), ("bigram_dim", 768.0),
    ("run_id", 5)])
def test_values_of_another_type(name, value):
    args = t.Hyperparameters()
    t.check_args(args)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"{name} is {re.escape(repr(value))}: "):
        t.check_args(args)

def test_every_field_has_a_range():
    for make in t.presets.values():
        t.check_args(make())
    for f in t.fields(t.Hyperparameters):
        args = t.Hyperparameters()
        setattr(args, f.name, object())
        with pytest.raises(ValueError, match=f.name):
            t.check_args(args)
    assert set(t.WATCHING) < {f.name for f in t.fields(t.Hyperparameters)}

def test_unknown_field_names_the_nearest(corpus, capsys):
    with pytest.raises(SystemExit) as e:
        t.main(toy_options(corpus, val_loss_evry=3))
    assert e.value.code == 2 and "did you mean --val_loss_every?" in capsys.readouterr().err

def test_unwritable_log_folder(tmp_path, refused):
    (tmp_path / "logs").write_text("a file where the folder should be")
    refused("logs")

def test_no_disk_space(tmp_path, refused):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "toy.txt").symlink_to("/dev/full")
    refused("No space left on device", "logs/toy.txt")

def test_devices_that_do_not_divide_rows(tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t.xr, "global_runtime_device_count", lambda: 3)
    with pytest.raises(SystemExit) as e:
        t.main(toy_options(corpus))
    one_line(e.value.code, "3 devices", "8 rows")

def test_no_document_start(tmp_path, refused):
    """Shards of another tokenizer, whose documents begin with another token; also where one comes after what validation reads."""
    for pattern in ("train_files", "val_files"):
        write_shard(tmp_path / f"{pattern}_000.bin", np.arange(8000) % 300)
        refused(f"no document start (token {BOS})", f"{pattern}_000.bin", "--bos_id", **{pattern: tmp_path / f"{pattern}_*.bin"})
    write_shard(tmp_path / "late_000.bin", [*np.arange(8000) % 300, BOS, 1])
    refused("no document start", "late_000.bin", val_files=tmp_path / "late_*.bin")

NEEDED = t.work_until(t.parse_args(toy_options(Path()))[0])[0][-1]

def test_too_little_training_data(tmp_path, refused):
    """As much as all steps take, but not what is lost at the ends of rows; upstream would wait for ever in the middle of the run."""
    tokens = make_tokens(60_000, 6)
    write_shard(tmp_path / "short_000.bin", tokens[:NEEDED])
    refused("short_*.bin", f"{NEEDED:,} tokens", "1 shard last", "of 28 steps", "data/fineweb.py", train_files=tmp_path / "short_*.bin")
    write_shard(tmp_path / "short_001.bin", tokens[NEEDED:])
    args = t.parse_args(toy_options(tmp_path, train_files=tmp_path / "short_*.bin", val_files=tmp_path / "val_*.bin"))[0]
    write_shard(tmp_path / "val_000.bin", make_tokens(4098, 3))
    assert [name for name, _, _ in t.read_data(args)["train_files"]] == ["short_000.bin", "short_001.bin"]

def test_books(tmp_path, refused):
    """Plenty of tokens in few documents, of each of which 32 are read; in a single document a shard has no step at all."""
    for i, (n, usable) in enumerate(((1, 32), (1000, 32 + 32_000))):
        write_shard(tmp_path / f"books_{i:03d}.bin", np.where(np.arange(100_000) % (100_000 // n) == 0, BOS, 7))
        refused("books_*.bin", f"{100_000 * (i + 1):,} tokens in {1 + 1000 * i:,} documents", f"so {usable:,} in all", "of 204 steps",
                "last for 0" if i == 0 else "last for", "most 32 tokens", "train_max_seq_len_schedule", "cut long documents",
                train_files=tmp_path / "books_*.bin", num_scheduled_iterations=200)

def test_documents_are_read_as_far_as_each_stage_says(tmp_path, refused):
    """Documents of 100 tokens, of which the first 8 steps take all or 10 each: as many steps as the loader makes of them."""
    write_shard(tmp_path / "long_000.bin", np.where(np.arange(40_000) % 100 == 0, BOS, 7))
    found = []
    for schedule in ("100,10,10,10", "10,100,100,100"):
        fields = dict(train_max_seq_len_schedule=schedule, train_files=tmp_path / "long_*.bin")
        batches, steps = t.train_batches(t.parse_args(toy_options(tmp_path, **fields))[0], range(28), [None] * 28), 0
        with pytest.raises(EOFError):
            for _ in batches:
                steps += 1
        refused("long_*.bin", f"last for {steps} of 28 steps", "at most 100 tokens", **fields)
        found.append(steps)
    assert found[0] != found[1] and min(found) > 8, found

def test_fineweb_is_fetched_where_it_is_fineweb(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(t.sys.modules["shards"], "FINEWEBS_TOKENS", 8000)
    theirs = "fineweb_train_000001.bin"
    for name, n, way_out in ((theirs, 8000, "fetch more ('bash run_tpu.sh data"), (theirs, 8001, "make more (data/fineweb.py"),
                             ("demo_train_000001.bin", 8000, "data/demo.py")):
        write_shard(tmp_path / name, make_tokens(n, 1))
        refused(way_out, train_files=tmp_path / f"{name.split('_')[0]}_*.bin")

@pytest.mark.parametrize("sizes, batches", [([2049], 1), ([1026, 1025], 1), ([1000, 1000, 1000], 0), ([1], 0)])
def test_too_little_validation_data(tmp_path, refused, sizes, batches):
    for i, n in enumerate(sizes):
        write_shard(tmp_path / f"few_{i:03d}.bin", make_tokens(n, i))
    refused("few_*.bin", f"{sum(sizes):,} tokens", f"hold {batches} of 2 batches", "needs 2,050 tokens", "1,024",
            val_files=tmp_path / "few_*.bin")

def test_unigram_entropy_is_of_all_that_validation_reads(tmp_path):
    for i, tokens in enumerate(([BOS, 1], [BOS, 1, 2, 3], [9] * 8)):
        write_shard(tmp_path / f"val_{i}.bin", tokens)
    entropy = t.unigram_entropy(t.Hyperparameters(val_files=str(tmp_path / "val_*.bin"), val_tokens=6, vocab_size=301))
    assert entropy == pytest.approx(2 * np.log(3) / 3 + np.log(6) / 3)

@pytest.fixture
def gpt2s(tmp_path):
    """The options for data of GPT-2's vocabulary: tokens, behind a document start."""
    def make(*tokens: int) -> dict:
        for name, n in (("train", 8 * 4000), ("val", 4000)):
            write_shard(tmp_path / f"gpt2_{name}.bin", [t.BOS_ID, *tokens] * (n // (1 + len(tokens))))
        return dict(vocab_size=50257, bos_id=t.BOS_ID, train_files=tmp_path / "gpt2_train.bin", val_files=tmp_path / "gpt2_val.bin")
    return make

def test_no_vocabulary_to_be_had(refused, gpt2s, monkeypatch):
    """Tokens that can have prefixes need tiktoken, and without it a run does not begin."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    refused("tiktoken cannot get GPT-2's vocabulary", "TIKTOKEN_CACHE_DIR", **gpt2s(*range(7, 2000, 80)))

@pytest.mark.parametrize("bytes_alone", [True, False])
def test_where_prefixes_are_predicted(tmp_path, gpt2s, monkeypatch, capsys, bytes_alone):
    """Single bytes and another vocabulary have none: said, and nobody asked. What tiktoken knows of GPT-2's is what a run takes."""
    class Reached(ValueError):
        """The devices: all that can be refused has been."""
    def reached(*_):
        raise Reached("here")
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t, "setup_devices", reached)
    monkeypatch.setattr(t.vocabulary, "gpt2", lambda: asked.append(1) or SimpleNamespace(_mergeable_ranks={b"a": 64}))
    ours = gpt2s(*range(7, 37)) if bytes_alone else gpt2s(*range(7, 36), 256)
    with pytest.raises(SystemExit, match="here"):
        t.main(toy_options(tmp_path, **ours))
    said = "no prefix token prediction" in capsys.readouterr().out
    assert (said, asked) == ((True, []) if bytes_alone else (False, [1]))

def test_training_on_validation_data(refused, corpus):
    refused("val_000.bin", "train_files", "val_files", train_files=corpus / "*.bin")

def test_the_loader_agrees_with_what_was_read_ahead(corpus):
    """All steps of the toy, and all batches of its validation, from the shards that read_data names."""
    args = t.parse_args(toy_options(corpus))[0]
    data = t.read_data(args)
    batches = list(t.train_batches(args, range(28), [None] * 28))
    longest = [np.diff(cum_seqlens).max() for (_, _, cum_seqlens, *_), _, _ in batches]
    assert longest == [24] * 8 + [32] * 20, "documents are cut as each stage says"
    _, (shard, _), _ = batches[-1]
    assert shard == len(data["train_files"]) - 1 == 1
    assert len(list(t.val_batches(args, 2, None))) == 2 and len(data["val_files"]) == 1

# -----------------------------------------------------------------------------
# Signals and lost terminals, without checkpoints (tests/test_checkpoint.py has those)

@pytest.fixture
def killed(monkeypatch, corpus, tmp_path):
    """main() whose training is the function given; what signal it then kills itself with."""
    def run(train, ignored=()):
        kills = []
        before = {number: signal.signal(number, signal.SIG_IGN if number in ignored else signal.default_int_handler)
                  for number in t.checkpoint.SIGNALS}
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(t, "train", train)
        monkeypatch.setattr(t.os, "kill", lambda pid, number: kills.append((pid, number, signal.getsignal(number))))
        try:
            t.main(toy_options(corpus))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        (pid, number, handler), = kills
        assert pid == os.getpid() and handler == signal.SIG_DFL, "the status must be the signal's"
        return number
    return run

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_without_checkpoints(killed, capsys, number):
    assert killed(lambda *_: signal.raise_signal(number)) == number
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and err.startswith(f"train_gpt_xla.py: {number.name}: stopped") and "--save_every N --run_id NAME" in err

def test_nohup(killed):
    """What is ignored at the start stays so."""
    hang_up, stop = signal.SIGHUP, signal.SIGINT
    assert killed(lambda *_: (signal.raise_signal(hang_up), signal.raise_signal(stop)), ignored=[hang_up]) == stop

@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_a_lost_console_is_a_lost_terminal(monkeypatch, tmp_path, error):
    """| head has read enough, or the terminal is closed: as SIGHUP, once; the log goes on."""
    class Gone(io.StringIO):
        def write(self, s):
            raise error
        def fileno(self):
            return fd
    kills, fd = [], os.open(os.devnull, os.O_WRONLY)
    monkeypatch.chdir(tmp_path)
    log = t.Log(t.Hyperparameters(run_id="x"))
    monkeypatch.setattr(t.os, "kill", lambda pid, number: kills.append(number))
    monkeypatch.setattr(t.sys, "stdout", Gone())
    log.print0("step:1/2", console=True)
    monkeypatch.undo()
    os.close(fd)
    assert kills == [signal.SIGHUP] and (tmp_path / "logs/x.txt").read_text() == "step:1/2\n"

def test_no_long_sum_is_in_bfloat16():
    """XLA adds up bfloat16 in bfloat16: 65,536 ones make 2,048. Only sums over the devices may (upstream's collectives do the same)."""
    manager = t.build(t.parse_args(toy_options(Path(), dtype="bfloat16", head_dim=32, model_dim=192, bigram_dim=192))[0])
    manager.advance_schedule(1)
    batch = t.to_device(torch.zeros(8, 4, manager.graph.tokens, dtype=torch.int32), "data")
    results = [manager.training_step(batch, t.to_device(manager.get_numbers())), *manager.tensors()]
    hlo = torch_xla._XLAC._get_xla_tensors_hlo(results)
    sums = re.findall(r"= bf16\[[\d,]*\]\S* reduce\(bf16\[([\d,]*)\].*?dimensions=\{([\d,]*)\}", hlo)
    assert sums and re.search(r" = f32\[\]\S* reduce\(f32\[", hlo), "the pattern finds none"
    terms = {f"dims {dims} of bf16[{shape}]": np.prod([int(shape.split(",")[int(d)]) for d in dims.split(",")]) for shape, dims in sums}
    assert not {name: n for name, n in terms.items() if n > t.ROWS}

def test_memory_is_reckoned_with_what_a_step_makes_beside_its_state(monkeypatch):
    """An even step's gradients for Adam take nothing's place: XLA can give them no argument's memory."""
    manager = t.build(t.parse_args(toy_options(Path()))[0])
    manager.advance_schedule(manager.training_schedule.split_step + 1)
    state, inputs = manager.tensors(), [t.to_device(t.blank_batch(manager.graph.tokens), "data"), t.to_device(manager.get_numbers())]
    step = Recording(manager.program, inputs, state, hlo=True)
    monkeypatch.setattr(t, "what_to_keep", lambda *sizes: sizes[-1])
    held = lambda tensors: sum(x.nbytes // (t.device_count() if t.is_split(x) else 1) for x in tensors)
    beside = held(state[i] for i in step.changed if i not in step.sources)
    assert beside and manager.what_to_keep(manager.graph) == held(state) + beside
    assert manager.what_to_keep(replace(manager.graph, part="rows")) == held(state)

def test_the_optimizer_has_one_state(monkeypatch):
    """A second one, made in passing, is gone before a step, but the record's two did not fit into 24 GB, where `aot` traces it."""
    sent, send = [], t.to_device
    monkeypatch.setattr(muon_xla, "to_device", lambda x, *spec: sent.append(tuple(x.shape)) or send(x, *spec))
    optimizer = t.build(t.parse_args(toy_options(Path()))[0]).optimizer
    kept = [x for state in optimizer.param_states.values() for x in state.values() if isinstance(x, torch.Tensor)]
    kept += [cfg.per_matrix_lr_mul for cfg in optimizer.param_cfgs.values() if cfg.optim == "normuon"]
    assert sorted(sent) == sorted(tuple(x.shape) for x in kept)

def test_banks_take_the_stacks_that_kernels_make():
    """A bank's gradient from autograd, or in a stack as on a TPU, layer by layer: the same step, and none for the padding."""
    manager = t.build(t.parse_args(toy_options(Path()))[0])
    manager.advance_schedule(0)
    optimizer, generator, results = manager.optimizer, torch.Generator().manual_seed(0), []
    banks = [p for p, cfg in optimizer.param_cfgs.items() if cfg.optim == "normuon"]
    assert [p.label for p in banks] == ["qk_bank", "vo_bank", "mlp_bank"]
    grads = [torch.randn(p.reshape, generator=generator).to(p.dtype) for p in banks]
    for p, grad in zip(banks, grads, strict=True):
        grad[p.used:] = 0
    weights = manager.model.state_dict()
    for stacked in (False, True):
        manager.model.load_state_dict(weights)
        manager.reset()
        numbers, gradients = manager.unpack(t.to_device(manager.get_numbers())), Gradients(optimizer.addresses(on_top=False))
        for p, grad in zip(banks, grads, strict=True):
            if stacked:
                gradients.addresses[p].store(t.enter(t.to_device(grad)), ("all", 0))
            gradients.leaves[p] = SimpleNamespace(grad=None if stacked else t.enter(t.to_device(grad.view(p.shape))))
        optimizer.step(gradients, numbers.muon_lr, numbers.muon_momentum, None)
        results.append([(t.to_host(optimizer.param_states[p]["momentum_buffer"]), t.to_host(p)) for p in banks])
    for p, (a, b), (c, d) in zip(banks, *results, strict=True):
        assert a[:p.used].abs().amin((1, 2)).min() > 0 and not a[p.used:].any() and torch.equal(a, c) and torch.equal(b, d), p.label
