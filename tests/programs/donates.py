"""One step of test_replay.py's toy, for XLA's account of what it donates (PT_XLA_DEBUG_LEVEL=2)."""
from test_replay import Toy, inputs

import train_gpt_xla as t
from replay import Replay

t.setup_devices()
toy = Toy()
Replay(toy.step, toy.state)("step", *inputs(0))
