"""
Kills in the middle of a save: killed_in_a_save.py SEED. At each point of it, and at 20 moments by chance: a whole checkpoint is there,
nothing half written is taken for one, and the run that goes on ends in the same bits. There is no model, so that a case takes a moment.
"""
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import checkpoint

torch.set_num_threads(1)
save = 6  # the one that is struck

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def train(folder, steps=12):
    said = []
    with checkpoint.Checkpoints(folder, 2, said.append) as checkpoints:
        _, saved = checkpoints.find(None)
        start, x = (saved["step"], saved["model"]["x"]) if saved else (0, torch.ones(500_000))
        for step in range(start, steps):
            x = torch.sin(1.7 * x + step)
            state = dict.fromkeys(checkpoint.KEYS, 0) | dict(version=checkpoint.VERSION, step=step + 1, model=dict(x=x))
            checkpoints.save(step + 1, state)
    assert not any(s.startswith("skipped") for s in said), said
    torch.save(x, Path(folder) / "result")

def run(fn, *args, after=None):
    pid = os.fork()
    if not pid:
        try:
            fn(*args)
            os._exit(0)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

def strike(place, name, n, before):
    """Dies at the n-th call of place.name."""
    real, calls = getattr(place, name), []
    def fake(*args, **kwargs):
        calls.append(1)
        if len(calls) == n and before:
            die()
        result = real(*args, **kwargs)
        if len(calls) == n:
            die()
        return result
    setattr(place, name, fake)

def opening(*args):
    if args[-1] == "wb" and "000006" in str(args[0]):
        die()
    return open(*args)

def half(self, data):
    if "000006" in self.file.name and len(data) > 1000:
        self.file.write(bytes(data)[:len(data) // 2])
        self.file.flush()
        die()
    return write(self, data)

write = checkpoint.Hashing.write
checkpoint.open = open

# what to do in the child, and the newest checkpoint that must be there afterwards
points = dict(
    before_the_temporary_file=(lambda: setattr(checkpoint, "open", opening), 5),
    in_the_middle_of_it=(lambda: setattr(checkpoint.Hashing, "write", half), 5),
    before_fsync=(lambda: strike(os, "fsync", 2 * save - 1, True), 5),
    after_fsync=(lambda: strike(os, "fsync", 2 * save - 1, False), 5),
    before_rename=(lambda: strike(os, "replace", save, True), 5),
    after_rename=(lambda: strike(os, "replace", save, False), 6),
    during_pruning=(lambda: strike(Path, "unlink", save - 2, False), 6),
    before_exit=(lambda: strike(torch, "save", 13, True), 12),  # 12 checkpoints, then the result
)

def killed(folder, prepare):
    prepare()
    train(folder)

def check(name, folder, status, newest=None):
    assert os.WIFSIGNALED(status) or name.startswith("random"), (name, status)
    def look():
        with checkpoint.Checkpoints(folder, 2) as checkpoints:
            path, state = checkpoints.find("latest")
            assert state["step"] == int(path.stem[-6:]) and newest in (None, state["step"]), (name, state["step"], newest)
    assert run(look) == 0, name
    assert run(train, folder) == 0, name
    assert torch.equal(torch.load(folder / "result"), reference), name
    print("OK", name, flush=True)

t0 = time.perf_counter()
assert run(train, "whole") == 0
duration = time.perf_counter() - t0
reference = torch.load("whole/result")
for name, (prepare, newest) in points.items():
    check(name, Path(name), run(killed, name, prepare), newest)
random.seed(int(sys.argv[1]))
for i in range(20):
    folder = Path(f"random{i}")
    assert run(train, folder, 1) == 0  # so that there is something to lose
    (folder / "result").unlink()
    check(folder.name, folder, run(train, folder, after=random.uniform(0, duration)))
