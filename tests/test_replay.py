"""
Replay on a small program: the numbers of the traced one, state in place, and nothing silently stale.
    python -m pytest tests/test_replay.py
"""
import gc
import os
import re
from pathlib import Path

import pytest
import torch
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
from conftest import program

from replay import Replay
from spmd import shard, to_device, to_host

WIDE = 4096

class Toy:
    """A weight, its momentum split over the devices, and a step that updates both."""
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.w = torch.nn.Parameter(to_device(torch.randn(WIDE, 8, generator=generator)))
        self.m = to_device(torch.zeros(WIDE, 8), "data")
        self.written_only = to_device(torch.zeros(WIDE))
        self.decay = 0.9

    def constants(self):
        return (self.decay,)

    def state(self):
        return [self.w, self.m, self.written_only]

    def step(self, x, lr):
        loss = (x @ self.w[:16, :4]).square().mean() + self.w.square().sum()
        loss.backward()
        with torch.no_grad():
            self.m.copy_(self.m * self.decay + shard(self.w.grad, "data"))
            self.w.copy_(shard(self.w - lr * self.m))
            self.written_only.copy_(self.w.sum(1))
        self.w.grad = None
        return loss.detach()

def inputs(i: int, n: int = 32):
    return (to_device(torch.randn(n, 16, generator=torch.Generator().manual_seed(i)), "data"), to_device(torch.tensor(0.01 * (1 + i % 3))))

def run(enabled: bool, steps: int = 12, between=lambda toy, i: None):
    toy = Toy()
    step = Replay(toy.step, toy.state, toy.constants, enabled=enabled)
    losses = []
    for i in range(steps):
        between(toy, i)
        losses.append(step("step", *inputs(i)))
        xm.mark_step()
    return [x.item() for x in losses], [to_host(x) for x in toy.state()], step

def compiled() -> int:
    return met.metric_data("CompileTime")[0]

def test_replay_is_bit_identical_to_tracing():
    for x, y in zip(run(True)[:2], run(False)[:2], strict=True):
        for a, b in zip(x, y, strict=True):
            assert (a == b) if isinstance(a, float) else torch.equal(a, b)

def test_replay_compiles_once_and_traces_nothing():
    toy = Toy()
    calls = []
    step = Replay(lambda *x: calls.append(1) or toy.step(*x), toy.state)
    step("step", *inputs(0))
    before = compiled()
    for i in range(5):
        step("step", *inputs(i))
        xm.mark_step()
    assert len(calls) == 1 and compiled() == before

def test_a_change_by_the_user_is_seen():
    """Reading, changing in place, assigning new data and new Python values between steps give what tracing gives."""
    def meddle(toy, i):
        if i == 4:
            with torch.no_grad():
                toy.w.mul_(0.5)
        if i == 6:
            toy.m.data = to_device(torch.ones(WIDE, 8), "data")
        if i == 8:
            assert torch.isfinite(toy.w.detach().cpu()).all()
        if i == 9:
            toy.decay = 0.5
    assert run(True, between=meddle)[0] == run(False, between=meddle)[0]

def test_another_shape_dtype_or_sharding_is_recorded_anew():
    toy = Toy()
    step = Replay(toy.step, toy.state)
    def recorded(n):
        step("step", *inputs(0, n=n))
        return list(step.recordings.values())
    first, = recorded(32)
    assert recorded(32) == [first]
    other = recorded(64)
    assert len(other) == 2 and other[0] is first
    assert recorded(32) == other, "both shapes are kept: a batch of the other one records nothing"
    toy.m.data = to_device(torch.zeros(WIDE, 8))  # replicated, where it was split
    again = recorded(64)
    assert again[0] is first and again[1] is not other[1]

def test_a_tensor_from_elsewhere_is_refused_and_nothing_is_lost():
    toy = Toy()
    hidden = to_device(torch.ones(WIDE, 8))
    before = toy.w.detach().cpu().clone()
    step = Replay(lambda x, lr: toy.step(x, lr) + hidden.sum(), toy.state)
    with pytest.raises(ValueError, match=r"neither an argument nor in its state"):
        step("step", *inputs(0))
    assert torch.equal(before, toy.w.detach().cpu())

def test_state_is_donated():
    """A state tensor that is read and updated shares its memory with its successor: w whole and m's eighth, by XLA's own account."""
    process = program("donates.py", PT_XLA_DEBUG_LEVEL="2")
    aliased = [float(x) for x in re.findall(r"Aliased Input size: (\S+) GB", process.stderr)]
    assert aliased, process.stderr[-2000:]
    assert max(aliased) * 2**30 == pytest.approx(4 * (WIDE * 8 + WIDE * 8 / 8), rel=0.01)

def test_many_steps_leave_nothing_behind():
    """1,000 replayed steps: host memory and the number of live device tensors stay where they were after the first 200."""
    def live():
        return met.counter_value("CreateXlaTensor") - met.counter_value("DestroyXlaTensor")
    def resident_mib():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    toy = Toy()
    step = Replay(toy.step, toy.state)
    batch = inputs(0)
    for i in range(1200):
        if i == 200:
            gc.collect()
            tensors, memory = live(), resident_mib()
        loss = step("step", *batch)
        xm.mark_step()
        if i % 50 == 0:
            loss.item()
    gc.collect()
    assert live() - tensors <= 8, "device tensors pile up"
    assert resident_mib() - memory < 32, "host memory grows"
