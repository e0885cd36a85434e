"""
Four steps of a small model in float32, over the split of lm_head and embed, on as many devices as there are; test_run.py compares what
different numbers of them make of it.

    few_steps.py FILE
"""
import sys

import numpy as np
import torch

import train_gpt_xla as t
from spmd import COMPILE_FAST, is_split, setup_devices

T = 32
STEPS = 0, 3, 4, 5  # with three targets and prefixes, then with one; embed takes over lm_head's weight in 3
ARGS = dict(train_bs_schedule=(t.ROWS * T,) * 4, num_scheduled_iterations=3, num_extension_iterations=3, vocab_size=250, bos_id=0,
            block_size=2, dc_window=5, bigram_vocab_size=512, dtype="float32")


def build(replay: bool = True, seed: int = 0) -> t.TrainingManager:
    torch.manual_seed(seed)
    manager = t.build(t.presets["rehearsal"](**ARGS), replay)
    assert manager.training_schedule.split_step == 3
    state = manager.model.state_dict()
    for name, p in state.items():  # nothing may be zero, or what comes before it gets no gradient
        if name != "bigram_sign_table":
            scale = 0.2 if p.ndim < 2 else 1.0 if "embed" in name else 0.5 if "gate" in name else p.size(-1) ** -0.5
            state[name] = (p if p.ndim < 2 else 0) + scale * torch.randn(p.shape)
    manager.model.load_state_dict(state)
    manager.reset()
    token = torch.arange(manager.model.vocab_size)
    manager.model.set_prefix_table(torch.where((token > 90) & (token < 250), token // 3, -1))
    return manager


def get_batch(step: int) -> torch.Tensor:
    """[8, 4, T]"""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 250, (t.ROWS, T + 1), dtype=np.int32)
    ends = np.array([[0, 7 + r, 20, T] for r in range(t.ROWS)], dtype=np.int32)
    return t.pack(tokens[:, :-1], tokens[:, 1:], ends, t.get_bigram_hash(tokens[:, :-1], ARGS["bigram_vocab_size"]),
                  ARGS["bigram_vocab_size"])


def take(manager: t.TrainingManager, step: int, batch: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """One step; the losses of its rows, and all that it leaves, by name."""
    manager.advance_schedule(step)
    batch = t.to_devices(get_batch(step) if batch is None else batch)
    losses = t.to_rows(manager.run(batch, t.to_device(manager.get_numbers())))
    found = dict(losses=losses) | manager.model.state_dict()
    for name, state in manager.get_state().items():
        found |= {f"{name} {key}": torch.as_tensor(x, dtype=torch.float32) for key, x in state.items()}
    return found


if __name__ == "__main__":
    setup_devices(COMPILE_FAST)
    manager = build()
    if t.device_count() > 1:
        table = manager.model.bigram_embed.weight
        assert all(map(is_split, (table, *(manager.optimizer.param_states[table][key] for key in ("exp_avg", "exp_avg_sq", "grad")))))
    torch.save([take(manager, step) for step in STEPS], sys.argv[1])
