"""
How long does a checkpoint hold up training? The state of the record's model (or of another width), on whatever devices PJRT
finds, saved by the code that train() saves with.

    python tools/bench_checkpoint.py [--model_dim 768] [--saves 3] [--folder .] [--json]        (bash run_tpu.sh bench has the step)

stall_s: what training waits for, the copy to the host and the hand-over to the writing thread. stall_cpu_s: processor time of this
process in the stall; where it is much less, the machine was busy with something else. write_s: the thread's time, checksum and
fsync included. Every line is one save. A CPU's virtual devices are copied from memory to memory; what it takes from a TPU has not been
measured. All that virtual devices hold lies in the machine's memory: of 8 of them, 10 GB at --model_dim 192 and about four times that at
768; of CPU_NUM_DEVICES=4, 18 GB at 384.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_dim", type=int, default=768)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", default=".", help="on the disk to be measured; what is written there is removed again")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.environ.setdefault("PJRT_DEVICE", "CPU") == "CPU":
        os.environ.setdefault("CPU_NUM_DEVICES", "8")

    import train_gpt_xla as t
    from checkpoint import KEYS, VERSION, Checkpoints
    t.setup_devices()
    args = t.Hyperparameters(head_dim=options.model_dim // 6, model_dim=options.model_dim, bigram_dim=options.model_dim)
    manager = t.build(args)
    t.xm.wait_device_ops()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, Checkpoints(folder, keep=1, say=lambda s: None) as checkpoints:
        state = manager.model.state_dict(), manager.get_state(lazy=True)  # as in train()'s warm-up
        del state
        for step in range(1, options.saves + 1):
            t0, cpu = time.perf_counter(), time.process_time()
            state = dict(model=manager.model.state_dict(), optimizer=manager.get_state(lazy=True), schedule=manager.get_schedule())
            checkpoints.save(step, dict.fromkeys(KEYS, 0) | dict(version=VERSION, step=step) | state)
            del state
            t1, cpu = time.perf_counter(), time.process_time() - cpu
            checkpoints.wait(must=True)
            t2 = time.perf_counter()
            result = dict(save=step, gigabytes=checkpoints.files()[-1][1].stat().st_size / 1e9, stall_s=t1 - t0, stall_cpu_s=cpu,
                          write_s=t2 - t1, devices=t.xr.global_runtime_device_count(), device=t.xr.device_type())
            line = ("save {save}: {gigabytes:.2f} GB, stall {stall_s:.2f} s ({stall_cpu_s:.2f} s of processor), "
                    "written in {write_s:.1f} s ({devices} {device} devices)")
            print(json.dumps(result) if options.json else line.format(**result), flush=True)

if __name__ == "__main__":
    main()
