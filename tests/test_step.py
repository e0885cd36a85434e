"""
Two whole steps, an even one and the odd one after it, on the plain path and by the kernels: losses, weights and all that the optimizers
keep. While embed and lm_head are one, and after the split. The same for a device that takes its rows in turn.

    python -m pytest -q tests/test_step.py
"""
import eager
import pytest
import torch

import train_gpt_xla as train

T, H, D = 128, 2, 64
TOLERANCE = 1e-4  # measured: 9e-6, of a weight after its odd step

def build() -> train.TrainingManager:
    torch.manual_seed(0)
    manager = train.build(train.presets["rehearsal"](
        train_bs_schedule=(train.ROWS * T,) * 3, train_bs_extension=train.ROWS * T, ws_schedule=(3, 3, 3), num_heads=H, head_dim=D,
        model_dim=H * D, vocab_size=256, dtype="float32"))
    state = manager.model.state_dict()
    for name, p in state.items():  # nothing may be zero, or what comes before it gets no gradient
        scale = 0.2 if p.ndim < 2 else 1.0 if "embed" in name else 0.5 if "gate" in name else p.size(-1) ** -0.5
        state[name] = (p if p.ndim < 2 else 0) + scale * torch.randn(p.shape)
    manager.model.load_state_dict(state)
    manager.reset()
    return manager

def get_batch(step: int) -> torch.Tensor:
    batch = torch.randint(0, 250, (train.ROWS, 3, T), generator=torch.Generator().manual_seed(step), dtype=torch.int32)
    batch[:, 2] = 0
    for r, row in enumerate(batch):
        for start in (20 + r, 70, 100):
            row[2, start:] = start
    return batch

def run_steps(kernels: bool, steps: tuple[int, ...], turns: int = 1) -> list[dict[str, torch.Tensor]]:
    """After each step all that it leaves, by name."""
    results = []
    with eager.eager(kernels, turns):
        manager = build()
        manager.replay.enabled = False
        if steps[0] > train.get_split_step(manager.args):
            manager.adam_opt.copy_lm_to_embed()
        for step in steps:
            manager.advance_schedule(step)
            losses = torch.cat(manager.run(get_batch(step).split(train.ROWS // turns), manager.get_numbers()))
            assert bool(eager.calls) == kernels
            adam, muon = manager._state()
            found = dict(losses=losses) | dict(manager.model.named_parameters())
            for name, tensors in (adam | muon).items():
                found |= {f"{name} {key}": x for key, x in tensors.items() if key != "step"}
            results.append({name: x.detach().clone() for name, x in found.items()})
    return results

@pytest.mark.parametrize("steps, turns", [((0, 1), 1), ((60, 61), 1), ((0, 1), train.ROWS)], ids=["tied", "split", "tied, in turn"])
def test_kernels(steps, turns):
    for step, want, got in zip(steps, run_steps(False, steps, turns), run_steps(True, steps, turns), strict=True):
        eager.check(got, want, TOLERANCE, f"step {step}")

def test_rows_in_turn():
    """Over the split, and two steps of Adam, because what the first one leaves behind shows in the second."""
    steps = 58, 59, 60, 61
    for step, want, got in zip(steps, run_steps(False, steps), run_steps(False, steps, train.ROWS), strict=True):
        if step % 2:  # Adam has taken the sums; they are cleared for the rows to come
            want, got = ({name: x for name, x in results.items() if not name.endswith(" grad")} for results in (want, got))
        eager.check(got, want, TOLERANCE, f"step {step}")

def test_backward_in_ones_own_loop():
    """Without a TrainingManager each parameter finds its gradient in .grad; lm_head that of embed with it, as long as they are one."""
    gradients = []
    for kernels in (False, True):
        with eager.eager(kernels):
            manager = build()
            manager.advance_schedule(0)
            losses = manager.forward(get_batch(0), manager.get_numbers(), dict(manager.model.named_parameters()))
            losses.sum().backward()
            gradients.append({name: p.grad for name, p in manager.model.named_parameters() if p.grad is not None})
    want, got = gradients
    assert want.keys() ^ dict(manager.model.named_parameters()).keys() == {"embed.weight"}
    eager.check(got, want, TOLERANCE, "step 0")
