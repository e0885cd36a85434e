"""Prints what goes wrong where the folder run/ may not be written to; as root, who may, becomes somebody else."""
import os

import checkpoint

os.chmod("run", 0o555)
if os.getuid() == 0:
    os.setuid(65534)
try:
    with checkpoint.Checkpoints("run", 2) as checkpoints:
        pass
except OSError as e:
    print(e)
