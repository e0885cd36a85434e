"""
State that comes back, files of weights, kills inside a save, disks, signals. (Resumed runs: test_run.py)
    python -m pytest tests/test_checkpoint.py               (-m slow: real processes, killed at random; a soak; other device counts)
"""
import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import program, run_train, toy_options, training, write_shard

import checkpoint
import train_gpt_xla as t
from replay import signature

TEMPLATE = "logs/{}/checkpoint_step{:06d}.pt"

def same(a, b, name="") -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            same(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{name}.{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    else:
        assert a == b, (name, a, b)

def cut(path: Path):
    os.truncate(path, path.stat().st_size // 2)

def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)

def test_state_comes_back_with_its_sharding():
    """On 8 devices: what is set is what is read, and compiled programs still fit."""
    args, _ = t.parse_args(toy_options(Path()))
    manager = t.build(args)
    before, generator = signature(manager.tensors()), torch.Generator().manual_seed(1)
    state = manager.get_state()
    for i, values in enumerate(state.values()):
        values.update({k: torch.randn(x.shape, generator=generator).to(x.dtype) if isinstance(x, torch.Tensor) else 5 + i
                       for k, x in values.items()})
    manager.advance_schedule(20)
    schedule = manager.get_schedule()
    manager.reset()
    manager.set_state(state, schedule)
    assert signature(manager.tensors()) == before
    same(manager.get_state(), state)
    same(manager.get_schedule(), schedule)
    assert schedule["ws_long"] == 11 and schedule["yarn"]["attn_scale"] != 0.1

def test_numbers_made_ahead():
    """They are those of each step in its turn, making them leaves the schedule as it was, and settings changed since are refused."""
    args, _ = t.parse_args(toy_options(Path()))
    manager = t.build(args)
    for step in range(9):
        manager.advance_schedule(step)
    ahead = manager.precompute(range(9, args.num_iterations))
    for step, numbers in enumerate(ahead, start=9):
        manager.advance_schedule(step)
        assert torch.equal(manager.get_numbers(), numbers), step
    assert {state["step"] for state in manager.optimizer.param_states.values() if "step" in state} == {args.num_iterations // 2}
    manager.constants()
    manager.optimizer.param_cfgs[manager.model.lm_head.weight].weight_decay *= 2
    with pytest.raises(ValueError, match="call precompute"):
        manager.constants()

# -----------------------------------------------------------------------------
# Weights to start with: which files are taken, and what the others are called

def weights(dtype=torch.float32) -> dict:
    return {name: torch.arange(3, dtype=dtype) for name in ("embed.weight", "qk_bank", "mudd_w1", "mudd_gate_w1")}

def save_safetensors(path: Path, **config):
    from safetensors.torch import save_file
    save_file(weights(), path)
    (path.parent / "config.json").write_text(json.dumps(config))

def save_script(path: Path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)

TAKEN = {
    "upstream's": (lambda path: torch.save(dict(step=7, model={f"_orig_mod.{k}": x for k, x in weights().items()}), path), dict(step=7)),
    "a resumable one": (lambda path: checkpoint.write(path, small(7) | dict(model=weights())), dict(step=7)),
    "a state_dict": (lambda path: torch.save(weights(), path), {}),
    "of torch before 1.6": (lambda path: torch.save(weights(), path, _use_new_zipfile_serialization=False), {}),
    "hub.py's": (lambda path: save_safetensors(path, model_type="modded-nanogpt", step=7, ws_long_schedule=[3, 7]),
                 dict(step=7, hyperparameters=dict(ws_long_schedule=(3, 7)))),
    "safetensors beside another's config": (lambda path: save_safetensors(path, model_type="gpt2", step=7), {}),
}

@pytest.mark.parametrize("case", TAKEN)
def test_weights_are_taken(tmp_path, case):
    make, values = TAKEN[case]
    make(tmp_path / "file")
    state = checkpoint.load_weights(tmp_path / "file")
    same(state["model"], weights())
    assert state.get("step") == values.get("step") and state.get("hyperparameters") in (values.get("hyperparameters"), 0)

def cut_safetensors(path: Path):
    save_safetensors(path)
    cut(path)

def poisoned(value, dtype=torch.bfloat16):
    return lambda path: torch.save(dict(model=weights(dtype) | {"mlp_bank": torch.tensor([1, value], dtype=dtype)}), path)

REFUSED = {
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>"), "web page"),
    "text": (lambda path: path.write_text("step:0/96 val_loss:10.7\n"), "not a checkpoint .text"),
    "JSON": (lambda path: path.write_text('{"lm_head.weight": 1}'), "JSON"),
    "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "nothing": (lambda path: path.touch(), "empty"),
    "a shard": (lambda path: write_shard(path, range(99)), "token shard"),
    "noise": (lambda path: path.write_bytes(bytes(range(128))), "unknown kind"),
    "a folder": (lambda path: (path.mkdir(), (path / "model.safetensors").touch()), "is a folder: give .*model.safetensors"),
    "a NumPy archive": (lambda path: np.savez(path.open("wb"), **weights()), "NumPy archive"),
    "a zip archive": (lambda path: zipfile.ZipFile(path, "w").writestr("weights.txt", "1"), "zip archive"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(weights())), "a pickle"),
    "a module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "Python objects, torch.nn.modules.linear.Linear"),
    "NumPy's numbers": (lambda path: torch.save(dict(model=weights(), loss=np.float64(3)), path), "Python objects, numpy"),
    "a program": (save_script, "TorchScript"),
    "half": (lambda path: (torch.save(weights(), path), cut(path)), "cut short"),
    "half of safetensors": (cut_safetensors, "safetensors that are cut short"),
    "a list": (lambda path: torch.save([1], path), "a list"),
    "another model": (lambda path: torch.save(dict(model={"wte.weight": torch.ones(3)}), path), "no embed.weight, so .* not record #89's"),
    "record #60's": (lambda path: torch.save(dict(model=weights() | {"_orig_mod.blocks.0.attn.qkvo_w": torch.ones(3)}), path),
                     "blocks.0.attn.qkvo_w, so it is record #60's, whose folder in records/ says which commit"),
    "no tensor": (lambda path: torch.save(dict(model=weights() | dict(x=1)), path), "x holds int"),
    "integers": (lambda path: torch.save(dict(model=weights(torch.int8)), path), "embed.weight holds torch.int8"),
    "nan": (poisoned(float("nan")), "mlp_bank holds a number that is not finite"),
    "inf": (poisoned(float("-inf"), torch.float32), "mlp_bank holds a number that is not finite"),
    "beyond float32": (poisoned(1e300, torch.float64), "mlp_bank holds a number that is not finite"),
}

@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_named(tmp_path, case):
    make, words = REFUSED[case]
    make(tmp_path / "file")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'file'}.*({words})") as e:
        checkpoint.load_weights(tmp_path / "file")
    assert "\n" not in str(e.value) and "weights_only" not in str(e.value)

# -----------------------------------------------------------------------------
# Files: kills inside a save, disks, locks. The state is small and there is no model, so that a case takes a moment.

def small(step: int, x=0.0) -> dict:
    return dict.fromkeys(checkpoint.KEYS, 0) | dict(version=checkpoint.VERSION, step=step, model=dict(x=torch.as_tensor(x)))

@pytest.mark.parametrize("content, words", [
    (dict(version=2), "of version 2, this script reads 3: it is record #60's, whose folder in records/ says which commit reads it"),
    (dict(version=4), "of version 4, this script reads 3: resume with the script that wrote it"),
    (dict(version=None), "of version None"), (dict(optimizers=[]), "optimizers is unknown to this script"),
])
def test_another_versions_are_refused(tmp_path, content, words):
    """And not passed over for an older one, whose steps would then be run again."""
    with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
        checkpoint.write(tmp_path / "checkpoint_step000001.pt", small(1))
        checkpoint.write(tmp_path / "checkpoint_step000002.pt", small(2) | content)
        with pytest.raises(ValueError, match=f"^{tmp_path}/checkpoint_step000002.pt: .*{words}"):
            checkpoints.find("latest")

def test_sigkill_loses_nothing(tmp_path):
    """28 of 28: a whole checkpoint is there, nothing half written is taken for one, and the resumed run ends in the same bits."""
    assert len(re.findall("^OK ", program("killed_in_a_save.py", 0, cwd=tmp_path).stdout, re.M)) == 28

def test_order_of_writing(tmp_path, monkeypatch):
    """What a power cut needs: data on the disk before the name, the name on the disk before an older file goes."""
    order = []
    def note(place, name):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args: order.append(name) or real(*args))
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, small(1))
        checkpoints.wait()
        for place, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
            note(place, name)
        checkpoints.save(2, small(2))
    assert order == ["fsync", "replace", "fsync", "unlink"]

def test_disk_full(tmp_path):
    said = []
    with checkpoint.Checkpoints(tmp_path, 2, said.append) as checkpoints:
        checkpoints.save(1, small(1))
        checkpoints.wait()
        (tmp_path / "checkpoint_step000002.pt.tmp").symlink_to("/dev/full")
        checkpoints.save(2, small(2))
        checkpoints.wait()
        assert "No space left on device" in said[-1] and "step000002.pt" in said[-1] and "\n" not in said[-1]
        assert not list(tmp_path.glob("*.tmp")), "what was written is given back"
        assert checkpoints.find("latest")[1]["step"] == 1
        (tmp_path / "checkpoint_step000003.pt.tmp").symlink_to("/dev/full")
        checkpoints.save(3, small(3))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait(must=True)
        checkpoints.save(4, small(4))  # there is room again
        checkpoints.wait(must=True)
        assert checkpoints.find("latest")[1]["step"] == 4

def test_read_only_folder(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "run", 2) as checkpoints:
        checkpoints.save(1, small(1))
    tmp_path.chmod(0o755)
    try:
        assert "Permission denied: 'run/" in program("read_only_folder.py", cwd=tmp_path).stdout
        assert checkpoint.read(checkpoints.files()[0][1])["step"] == 1
    finally:
        (tmp_path / "run").chmod(0o755)

def test_stale_temporary_file(tmp_path):
    (tmp_path / "checkpoint_step000007.pt.tmp").write_bytes(b"half of a checkpoint")
    with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.find(None) == (None, None) and not list(tmp_path.glob("*.tmp"))

def test_two_runs_in_one_folder(tmp_path):
    with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, small(1))
        with pytest.raises(ValueError, match=rf"process {os.getpid()} is at work on this run: wait for it, or choose another --run_id"):
            checkpoint.Checkpoints(tmp_path, 2).__enter__()
    with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:  # free again
        assert checkpoints.find("latest")[1]["step"] == 1

def test_the_newest_are_kept_and_latest_passes_over_a_broken_one(tmp_path):
    said = []
    with checkpoint.Checkpoints(tmp_path, 3, said.append) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, small(step))
        checkpoints.wait()
        assert [step for step, _ in checkpoints.files()] == [5, 6, 7]
        flip(checkpoints.files()[-1][1])
        assert checkpoints.find("latest")[1]["step"] == 6
        assert said[-1].startswith("skipped") and "step000007.pt" in said[-1]
        cut(checkpoints.files()[-2][1])
        assert checkpoints.find(None)[1]["step"] == 5
        checkpoints.save(6, small(6))  # going on from 5: the broken 7 must not push it out
        checkpoints.wait()
        assert checkpoints.find(None)[1]["step"] == 6

def test_what_is_not_finite_is_not_saved(tmp_path):
    with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, small(1))
        checkpoints.save(2, small(2, [1.0, float("inf")]))
        with pytest.raises(FloatingPointError, match="model.x holds .* after step 2"):
            checkpoints.save(3, small(3))
        assert [step for step, _ in checkpoints.files()] == [1]

@pytest.mark.parametrize("number", checkpoint.SIGNALS)
def test_the_same_signal_twice(tmp_path, capfd, number):
    """Some tools send a signal to a process and to its group."""
    before = signal.signal(number, signal.default_int_handler)  # in the background it may be ignored
    with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
        for _ in range(2):
            os.kill(os.getpid(), number)
        time.sleep(0)
        assert checkpoints.preempted.is_set() and checkpoints.signal == number.name
    assert signal.signal(number, before) == signal.default_int_handler
    assert capfd.readouterr().err == f"{number.name}: stopping after the step in hand, once it is saved\n"

def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
        signal.raise_signal(signal.SIGTERM)
        checkpoints.asked -= 2  # seconds ago
        kills = []
        monkeypatch.setattr(os, "kill", lambda pid, number: kills.append((pid, number, signal.getsignal(number))))
        signal.raise_signal(signal.SIGTERM)
        assert not kills
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert kills == [(os.getpid(), signal.SIGINT, signal.SIG_DFL)]

def test_nohup(tmp_path):
    """A signal that is ignored from the start stays so, and what comes back at the end is what there was."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
            signal.raise_signal(signal.SIGHUP)
            assert not checkpoints.preempted.is_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)

# -----------------------------------------------------------------------------
# Real processes, with one device and stages that differ in little: what is slow is starting them

ALIKE = dict(train_bs_schedule="512,512,512,512", ws_short_schedule="1,1,1,1", ws_long_schedule="3,3,3,3", ws_validate_post_yarn_ext=3,
             num_extension_iterations=0, train_loss_every=1)
SHORT = ALIKE | dict(val_tokens=2048, save_checkpoint=True)

def start(folder: Path, corpus: Path, *options: str, program: str = "", **fields) -> subprocess.Popen:
    """The script, or a program that calls it, in a process of its own, on one device, its output in folder/output."""
    command, env = training(program, *options, *toy_options(corpus, **SHORT | fields), devices=1)
    with open(folder / "output", "a") as out:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)

def curve(log: Path) -> dict[str, str]:
    """Losses by step and kind; steps that were run twice must have had the same."""
    result = {}
    for step, loss in re.findall(r"^step:(\d+)/\d+ .*?((?:val|train)_loss:\S+)", log.read_text(), re.M):
        kind = loss.split(":")[0]
        assert result.setdefault(f"{step} {kind}", loss) == loss, (step, loss)
    return result

def same_end(a: Path, b: Path, steps: int):
    assert curve(a / "logs/toy.txt") == curve(b / "logs/toy.txt")
    same(*(torch.load(folder / f"logs/toy/state_step{steps:06d}.pt") for folder in (a, b)))

@pytest.fixture(scope="session")
def long_corpus(tmp_path_factory):
    """Enough for 2,000 steps, in shards that end within them."""
    from conftest import make_tokens
    folder = tmp_path_factory.mktemp("long")
    for i in range(8):
        write_shard(folder / f"train_{i:03d}.bin", make_tokens(330_000, 10 + i))
    write_shard(folder / "val_000.bin", make_tokens(6_000, 3))
    return folder

@contextlib.contextmanager
def beside_an_undisturbed_run(tmp_path: Path, corpus: Path, **fields):
    """Yields a folder for a run that is stopped and goes on; it must end as the one beside it that nobody stops."""
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    folder.mkdir()
    process = start(whole, corpus, **fields)
    try:
        yield folder
        assert process.wait() == 0, (whole / "output").read_text()[-3000:]
    finally:
        process.kill()
    same_end(whole, folder, fields["num_scheduled_iterations"])

def until_step(folder: Path, process, step: int):
    log = folder / "logs/toy.txt"
    while process.poll() is None and not (log.exists() and re.search(rf"^step:{step}/\d+ train_time", log.read_text(), re.M)):
        time.sleep(0.02)

@pytest.mark.slow
def test_sigterm_ten_times(tmp_path, long_corpus):
    """One run, stopped by two SIGTERMs ten times and started again by the same command each time."""
    fields = dict(num_scheduled_iterations=66, val_loss_every=0)
    with beside_an_undisturbed_run(tmp_path, long_corpus, **fields) as folder:
        for i in range(10):
            process = start(folder, long_corpus, save_every=1000, **fields)
            until_step(folder, process, 6 * (i + 1))
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == checkpoint.PREEMPTED, (folder / "output").read_text()[-3000:]
        assert start(folder, long_corpus, save_every=1000, **fields).wait() == 0
        assert len(re.findall("^SIGTERM: stopped at", (folder / "logs/toy.txt").read_text(), re.M)) == 10

@pytest.mark.slow
def test_sigkill_of_real_runs(tmp_path, long_corpus):
    """Killed five times at random moments after the first checkpoint, and gone on."""
    fields = dict(num_scheduled_iterations=66, val_loss_every=0)
    random = np.random.default_rng(0)
    with beside_an_undisturbed_run(tmp_path, long_corpus, **fields) as folder:
        for i in range(5):
            process = start(folder, long_corpus, save_every=3, **fields)
            until_step(folder, process, 10 * (i + 1))
            time.sleep(random.uniform(0, 0.3))
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert start(folder, long_corpus, save_every=3, **fields).wait() == 0

@pytest.mark.slow
def test_soak(tmp_path, long_corpus):
    """2,000 steps with a save every 50 and a kill every 200: the undisturbed run's losses and its last state."""
    fields = dict(num_scheduled_iterations=2000, val_loss_every=500)
    codes = []
    with beside_an_undisturbed_run(tmp_path, long_corpus, **fields) as folder:
        while (code := start(folder, long_corpus, program="die_every_200_steps.py", save_every=50, **fields).wait()) == -signal.SIGKILL:
            codes.append(code)
        assert code == 0 and len(codes) == 10, ((folder / "output").read_text()[-3000:], codes)

@pytest.mark.slow
def test_another_number_of_devices(tmp_path, corpus):
    """In float32, stopped on 8 devices, gone on with on 4, 2, 1 and 8: the losses of the run on 8 to 1e-6."""
    fields = ALIKE | dict(dtype="float32", num_scheduled_iterations=18, val_loss_every=0, save_every=4, keep_checkpoints=99)
    assert run_train(tmp_path, corpus, run_id="whole", **fields).returncode == 0
    (tmp_path / "logs/moved").mkdir()
    shutil.copy(tmp_path / TEMPLATE.format("whole", 4), tmp_path / "logs/moved")
    for devices in (4, 2, 1, 8):
        stopped = "" if devices == 8 else "stop_after_two_steps.py"
        process = run_train(tmp_path, corpus, "--resume", devices=devices, program=stopped, run_id="moved", **fields)
        assert process.returncode == (0 if devices == 8 else checkpoint.PREEMPTED), process.stderr[-3000:]
        assert f"'devices': {dict(zip((4, 2, 1, 8), (8, 4, 2, 1)))[devices]}" in process.stdout
    for step in range(8, 18, 4):
        a, b = (checkpoint.read(tmp_path / TEMPLATE.format(run, step))["losses"] for run in ("whole", "moved"))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
