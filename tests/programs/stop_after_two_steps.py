"""train_gpt_xla.py --run_id moved, preempted two steps after it has gone on."""
import os
import signal
from pathlib import Path

import train_gpt_xla as t

run = t.TrainingManager.run  # no program of the warm-up goes through it
start = max(int(path.stem[-6:]) for path in Path("logs/moved").glob("checkpoint_*.pt"))

def stop(self, batch, numbers):
    if self.graph.train and self.step == start + 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return run(self, batch, numbers)

t.TrainingManager.run = stop
t.main()
