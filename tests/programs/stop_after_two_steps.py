"""train_gpt_xla.py --run_id moved, preempted two steps after it has gone on."""
import os
import signal
from pathlib import Path

import train_gpt_xla as t

tensors = t.TrainingManager.tensors
start = max(int(path.stem[-6:]) for path in Path("logs/moved").glob("checkpoint_*.pt"))

def stop(self):
    resumed = "resumed" in Path("logs/moved.txt").read_text().rsplit("=" * 100, 1)[-1]
    if self.graph.train and self.step == start + 2 and resumed:
        os.kill(os.getpid(), signal.SIGTERM)
    return tensors(self)

t.TrainingManager.tensors = stop
t.main()
