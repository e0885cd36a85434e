"""
The script as its user calls it: each bad input's one line, before anything is compiled, and signals. (A run: test_run.py)
    python -m pytest tests/test_train.py
"""
import io
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_xla
from conftest import BOS, make_tokens, toy_options, write_shard

import train_gpt_xla as t
from gradients import Gradients


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
        monkeypatch.setattr(t, "setup_devices", lambda: pytest.fail("not refused before the devices are set up"))
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
    (dict(train_bs_schedule="512,1000,1536"), "1000"), (dict(train_bs_schedule=""), "()"), (dict(train_bs_schedule="512,0"), "0"),
    (dict(train_bs_extension=100), "100"), (dict(train_bs_extension=-128), "-128"), (dict(val_batch_size=0), "0"),
    (dict(val_tokens=4000), "4000", "1024"), (dict(val_tokens=0), "0", "from 1"), (dict(val_tokens=-4096), "-4096"),
    (dict(train_max_seq_len=0), "0"), (dict(train_max_seq_len=1), "1"), (dict(train_max_seq_len=-64), "-64"),
    (dict(num_scheduled_iterations=0), "0"), (dict(num_scheduled_iterations=10**400), "1000000"), (dict(num_extension_iterations=-1), "-1"),
    *((dict(cooldown_frac=x), x) for x in ("0.0", "-0.5", "1.5", "nan", "inf")),
    *((dict(split_embed_frac=x), x) for x in ("-0.1", "2.0", "nan")),
    (dict(train_loss_every=-1), "-1"), (dict(val_loss_every=-1), "-1"), (dict(save_every=-1), "-1"), (dict(keep_checkpoints=0), "0"),
    (dict(block_size=0), "0"), (dict(block_size=-16), "-16"), (dict(ws_schedule=""), "()"), (dict(ws_schedule="3,-7,11"), "-7"),
    (dict(ws_schedule="1,7,11"), "from 2"), (dict(ws_schedule="7,3"), "only grow"), (dict(ws_schedule="3,7", ws_final=5), "ws_final 5"),
    (dict(ws_final=0), "0"), (dict(ws_validate_post_yarn_ext=0), "0"), (dict(vocab_size=0), "0"), (dict(vocab_size=-301), "-301"),
    (dict(vocab_size=65537), "65536"), (dict(bos_id=301), "vocab_size 301"), (dict(bos_id=-1), "-1"), (dict(num_layers=12), "12"),
    (dict(num_heads=3), "3"), (dict(num_heads=0), "0"), (dict(head_dim=6, model_dim=24), "6"), (dict(model_dim=-32), "-32"),
    (dict(model_dim=8, num_heads=2, head_dim=4), "from 12"), (dict(dtype="float16"), "float16"), (dict(seed=-1), "-1"),
    *((dict(run_id=x), repr(x)) for x in ("", "..", "a/b", "a\nb")),
    (dict(profile="27:3"), "27:3", "28 steps"),
]

@pytest.mark.parametrize("fields, words", [(fields, words) for fields, *words in OUTSIDE])
def test_fields_that_cannot_run(refused, fields, words):
    refused(next(iter(fields)), *words, **fields)
    assert not os.path.exists("logs")

@pytest.mark.parametrize("name, value", [
    ("val_tokens", True), ("seed", 1.0), ("cooldown_frac", "0.5"), ("cooldown_frac", True), ("ws_final", None), ("save_checkpoint", 1),
    ("train_bs_schedule", [512]), ("train_bs_schedule", (512.0,)), ("run_id", 5)])
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

NEEDED = sum(t.get_bs(step, t.parse_args(toy_options(Path()))[0]) for step in range(28))

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
                "last for 0" if i == 0 else "last for", "train_max_seq_len 32", "cut long documents",
                train_files=tmp_path / "books_*.bin", num_scheduled_iterations=200)

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

def test_training_on_validation_data(refused, corpus):
    refused("val_000.bin", "train_files", "val_files", train_files=corpus / "*.bin")

def test_the_loader_agrees_with_what_was_read_ahead(corpus):
    """All steps of the toy, and all batches of its validation, from the shards that read_data names."""
    args = t.parse_args(toy_options(corpus))[0]
    data = t.read_data(args)
    *_, (_, (shard, _), _) = t.train_batches(args, range(28), [None] * 28)
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
    manager = t.build(t.parse_args(toy_options(Path(), dtype="bfloat16", head_dim=32, num_heads=2, model_dim=64))[0])
    manager.advance_schedule(1)
    batch = t.to_device(torch.zeros(8, 3, manager.graph.tokens, dtype=torch.int32), "data")
    results = [manager.training_step(batch, t.to_device(manager.get_numbers())), *manager.tensors()]
    hlo = torch_xla._XLAC._get_xla_tensors_hlo(results)
    sums = re.findall(r"= bf16\[[\d,]*\]\S* reduce\(bf16\[([\d,]*)\].*?dimensions=\{([\d,]*)\}", hlo)
    assert sums and re.search(r" = f32\[\]\S* reduce\(f32\[", hlo), "the pattern finds none"
    for shape, dims in sums:
        assert np.prod([int(shape.split(",")[int(d)]) for d in dims.split(",")]) <= t.ROWS, f"a sum over dims {dims} of bf16[{shape}]"

def test_muon_takes_the_stack_that_kernels_make():
    """Gradients one by one, or in a stack as on a TPU, but for those of a block that kernels refuse: the same step."""
    manager = t.build(t.parse_args(toy_options(Path()))[0])
    manager.advance_schedule(0)
    generator, results, groups = torch.Generator().manual_seed(0), [], manager.muon_opt.param_groups
    grads = {p: torch.randn(p.shape, generator=generator) for group in groups for p in group["params"]}
    for stacked in (0, 2):
        manager.reset()
        numbers, gradients = manager.unpack(t.to_device(manager.get_numbers())), Gradients(manager.muon_opt.addresses())
        for group in groups:
            params = group["params"]
            found = [None if i % 3 < stacked else grads[p].to(p.dtype) for i, p in enumerate(params)]
            gradients.leaves |= {p: SimpleNamespace(grad=grad if grad is None else t.enter(t.to_device(grad)))
                                 for p, grad in zip(params, found)}
            if stacked:
                stack = gradients.addresses[params[0]].stack
                tensor = torch.stack([grads[p] if grad is None else torch.full_like(grads[p], torch.nan) for p, grad in zip(params, found)]
                                     + [torch.zeros_like(grads[params[0]])] * (stack.n - len(params)))
                stack.tensor = t.enter(t.to_device(tensor.to(params[0].dtype)))
        manager.muon_opt.step(gradients, numbers.muon_lr, numbers.muon_momentum)
        results.append([t.to_host(group["momentum_buffer"]) for group in groups])
    for one_by_one, stacked in zip(*results, strict=True):
        assert one_by_one.abs().max() > 0 and torch.equal(one_by_one, stacked)
