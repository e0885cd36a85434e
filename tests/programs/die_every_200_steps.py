"""train_gpt_xla.py, which dies when it comes to one of these steps for the first time."""
import os
import signal
from pathlib import Path

import train_gpt_xla as t

run = t.TrainingManager.run

def die(self, batch, numbers):
    if self.step % 200 == 187 and self.graph.train and not (mark := Path(f"died{self.step}")).exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, batch, numbers)

t.TrainingManager.run = die
t.main()
