"""
Two whole steps, an even one and the odd one after it, on the plain path and by the kernels: losses, weights and all that the optimizer
keeps. While embed and lm_head are one, and after the split. The same for a device that takes its rows in turn.

    python -m pytest -q tests/test_step.py -m "not slow"    two minutes on an idle core
    python -m pytest -q tests/test_step.py                  after the split and in turn by the kernels, too
"""
import eager
import numpy as np
import pytest
import torch

import train_gpt_xla as train

T, D = 128, 64  # 6 heads make 384: kernels take multiples of 128
TOLERANCE = 1e-4

def build(head_dim: int = D) -> train.TrainingManager:
    torch.manual_seed(0)
    args = train.presets["rehearsal"](
        train_bs_schedule=(train.ROWS * T,) * 4, dc_window=40, head_dim=head_dim, model_dim=6 * head_dim, bigram_dim=6 * head_dim,
        bigram_vocab_size=64, bigram_sign_table_rows=7, vocab_size=250, bos_id=249, dtype="float32")
    manager = train.build(args, replay=False)
    state = manager.model.state_dict()
    for name, x in state.items():  # nothing may be zero, or what comes before it gets no gradient
        if name != "bigram_sign_table":
            state[name] = x + 0.3 * torch.randn(x.shape) * (0.2 if x.ndim < 2 else 2.0 if "embed" in name else x.size(-1) ** -0.5)
    manager.model.load_state_dict(state)
    manager.model.set_prefix_table(torch.randint(-1, 250, (256,)))
    manager.reset()
    for cfg in manager.optimizer.param_cfgs.values():
        if cfg.optim == "adam":
            cfg.eps = 1e-3  # otherwise Adam's first step follows the sign of a gradient, of however small a one
    return manager

def get_batch(step: int, rows: int) -> torch.Tensor:
    rng = np.random.default_rng(step)
    inputs = rng.integers(0, 249, (rows, T + 1), dtype=np.int32)
    starts = [[0, 20 + r, 70, 100, T] for r in range(rows)]
    for row, places in zip(inputs, starts, strict=True):
        row[places[:-1]] = 249
    return train.pack(inputs[:, :-1], inputs[:, 1:], np.array(starts, dtype=np.int32), train.get_bigram_hash(inputs[:, :-1], 64), 64)

def run_steps(kernels: bool, steps: tuple[int, ...], turns: int = 1, rows: int = 2, head_dim: int = D) -> list[dict[str, torch.Tensor]]:
    """After each step all that it leaves, by name."""
    results = []
    with eager.eager(kernels, turns):
        manager = build(head_dim)
        if steps[0] > manager.training_schedule.split_step:
            manager.optimizer.copy_lm_state_to_embed()
        for step in steps:
            manager.advance_schedule(step)
            losses = torch.cat(manager.run(get_batch(step, rows).split(rows // turns), manager.get_numbers()))
            assert bool(eager.calls) == kernels
            found = dict(losses=losses) | dict(manager.model.named_parameters())
            for name, state in manager._state().items():
                found |= {f"{name} {key}": torch.as_tensor(x).float() for key, x in state.items()}
            results.append({name: x.detach().clone() for name, x in found.items()})
    return results

def compare(steps: tuple[int, ...], want: list[dict], got: list[dict]):
    for step, a, b in zip(steps, want, got, strict=True):
        if step % 2:  # Adam has taken the sums; in turns they are cleared for the rows to come
            a, b = ({name: x for name, x in results.items() if not name.endswith(" grad")} for results in (a, b))
        if a.keys() != b.keys():  # in turns there are sums of the banks' gradients, too
            b = {name: x for name, x in b.items() if name in a}
        eager.check(b, a, TOLERANCE, f"step {step}")

slow = pytest.mark.slow

@pytest.mark.parametrize("steps, turns", [
    pytest.param((0, 1), 1, id="tied", marks=slow), pytest.param((60, 61), 1, id="split", marks=slow),
    pytest.param((0, 1), 2, id="tied, in turn", marks=slow)])
def test_kernels(steps, turns):
    """Of two rows, because the kernels are slow where they are interpreted; most of the time JAX compiles them."""
    compare(steps, run_steps(False, steps, turns), run_steps(True, steps, turns))

@pytest.mark.parametrize("turns", [2, pytest.param(train.ROWS, marks=slow)])
def test_rows_in_turn(turns):
    """Over the split, and two steps of Adam, because what the first one leaves behind shows in the second."""
    split = train.TrainingSchedule(train.presets["rehearsal"]()).split_step
    steps, size = range(split - 1, split + 3), dict(rows=train.ROWS, head_dim=8)
    want = run_steps(False, steps, **size)
    compare(steps, want, run_steps(False, steps, turns, **size))
    for before, after, moves in zip(want, want[1:], (True, False, True)):  # Adam steps on odd steps, NorMuon on all
        assert torch.equal(before["lm_head.weight"], after["lm_head.weight"]) != moves
        assert not torch.equal(before["mlp_bank"], after["mlp_bank"])
    tied, copied, _, apart = want
    assert not tied["embed.weight exp_avg"].any(), "while tied, lm_head's moments are embed's"
    for key in ("", " exp_avg", " exp_avg_sq"):
        assert torch.equal(copied[f"lm_head.weight{key}"], copied[f"embed.weight{key}"]), f"embed does not start from lm_head's {key}"
        assert not torch.equal(apart[f"lm_head.weight{key}"], apart[f"embed.weight{key}"]), f"embed still has lm_head's {key}"
    assert apart["lm_head.weight step"] == apart["embed.weight step"] == 2, "embed goes on with lm_head's count"

@slow
def test_backward_in_ones_own_loop():
    """Without a TrainingManager each parameter finds its gradient in .grad; lm_head that of embed with it, as long as they are one."""
    gradients = []
    for kernels in (False, True):
        with eager.eager(kernels):
            manager = build()
            manager.advance_schedule(0)
            losses = manager.forward(get_batch(0, 2), manager.get_numbers(), dict(manager.model.named_parameters()))
            losses.sum().backward()
            gradients.append({name: p.grad for name, p in manager.model.named_parameters() if p.grad is not None})
    want, got = gradients
    assert want.keys() ^ dict(manager.model.named_parameters()).keys() == {"embed.weight"}
    eager.check(got, want, TOLERANCE, "step 0")
