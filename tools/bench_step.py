"""
What does a training step cost the host? The record's structure (11 layers, all parameters, both optimizers, its schedule) at toy
widths on 8 virtual CPU devices, which get cores of their own so that their work does not count; and the loader at the record's real
batch sizes.

    python tools/bench_step.py [--steps 30] [--json]        (bash run_tpu.sh bench)

retraced_ms: recording the step anew and handing it over, as without replay. replayed_ms: handing over the recorded step.
loader_ms: packing one batch, 8 rows with their document starts, from a shard of documents with FineWeb's lengths. Medians, with
quartiles. A replayed step should cost at most 3 ms and a twentieth of a retraced one; a batch at most 10 ms.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = sorted(os.sched_getaffinity(0))

def shard(path: Path, num_tokens: int, bos_id: int):
    """A shard of documents whose lengths are log-normal with a median of 400 tokens, as upstream says of FineWeb."""
    import numpy as np
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50256, num_tokens, dtype=np.uint16)
    starts = np.cumsum(np.maximum(2, rng.lognormal(np.log(400), 1.0, num_tokens // 300)).astype(int))
    tokens[starts[starts < num_tokens]] = bos_id
    tokens[0] = bos_id
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, num_tokens
    path.write_bytes(header.tobytes() + tokens.tobytes())

def spread(times: list[float]) -> dict:
    """Median and quartiles, in ms."""
    quartiles = statistics.quantiles(times, n=4)
    return dict(median=1e3 * statistics.median(times), low=1e3 * quartiles[0], high=1e3 * quartiles[2], n=len(times))

def bench_loader(port, num_tokens: int, steps: int, folder: Path) -> dict:
    path = folder / "bench_000.bin"
    if not path.exists():
        shard(path, 60_000_000, port.BOS_ID)
    loader = port.distributed_data_generator(str(path), num_tokens, port.Hyperparameters.train_max_seq_len)
    times = []
    for _ in range(steps):
        t0 = time.perf_counter()
        batch = port.pack(*next(loader)[0])
        times.append(time.perf_counter() - t0)
    assert batch.shape == (port.ROWS, 3, num_tokens // port.ROWS)
    return spread(times[1:])  # the first one opens the shard

def bench_step(port, args, graphs: list, steps: int, replay: bool) -> dict:
    """Host time of a step of this stage, its even and odd steps in turn, each after the devices are done with the last."""
    import torch
    manager = port.build(args)
    calls = []
    step_fn = port.Replay(lambda *x: calls.append(1) or manager.training_step(*x), manager.tensors, manager.constants, enabled=replay)
    batch = port.to_device(torch.zeros(port.ROWS, 3, graphs[0][0].tokens, dtype=torch.int32), "data")
    numbers = [port.to_device(x) for x in manager.precompute([example for _, example in graphs])]  # the loader's thread sends them
    times = []
    for i in range(steps + 2 * len(graphs)):
        graph, example = graphs[i % len(graphs)]
        if i == len(graphs):
            set_cores(CORES[:1], CORES[1:] or CORES)
        port.xm.wait_device_ops()
        t0 = time.perf_counter()
        manager.advance_schedule(example)
        losses = step_fn(manager.graph, batch, numbers[i % len(graphs)])
        if not replay:
            port.xm.mark_step()  # hashes the recording and hands it over; the devices run it in a thread
        times.append(time.perf_counter() - t0)
        if replay:
            port.xm.wait_device_ops()  # a CPU runs the step in the call that hands it over, a TPU does not: wait, then time
            t0 = time.perf_counter()
            port.xm.mark_step()  # finds nothing to do
            times[-1] += time.perf_counter() - t0
        assert losses.cpu().isfinite().all()
    assert len(calls) == (len(graphs) if replay else len(times)), "replay traced, or tracing was skipped: nothing was measured"
    set_cores(CORES, CORES)
    return spread(times[2 * len(graphs):])  # the first of each compiles

def set_cores(mine: list[int], others: list[int]):
    """The cores of this thread and of all others, which do the devices' work. It holds for threads that exist by now."""
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, mine if thread == threading.get_native_id() else others)

def estimates() -> dict:
    """Estimated ms of the chip by graph name, from the newest report of tools/aot.py in records/, if there is one."""
    reports = sorted(ROOT.glob("records/*/report.json"))
    return {g["name"]: g["est_ms"]["total"] for g in json.loads(reports[-1].read_text())["graphs"]} if reports else {}

def run(steps: int) -> dict:
    import train_gpt_xla as port

    port.setup_devices()
    record = port.Hyperparameters()
    toy = port.Hyperparameters(vocab_size=256, num_heads=2, head_dim=8, model_dim=16, block_size=1, train_bs_extension=8 * 48,
                               train_bs_schedule=(8 * 16, 8 * 32, 8 * 48), val_batch_size=8 * 16)
    real = [(g, s[0]) for g, s in port.distinct_graphs(record).items() if g.train and not g.copy_embed]
    small = [(g, s[0]) for g, s in port.distinct_graphs(toy).items() if g.train and not g.copy_embed]
    chip, stages = estimates(), []
    with tempfile.TemporaryDirectory() as folder:
        for key in dict.fromkeys((g.tokens, g.ws_long) for g, _ in real):
            chosen = [i for i, (g, _) in enumerate(real) if (g.tokens, g.ws_long) == key]
            graphs, toys = [real[i][0] for i in chosen], [small[i] for i in chosen]
            retraced = bench_step(port, toy, toys, steps, replay=False)
            replayed = bench_step(port, toy, toys, steps, replay=True)
            loader = bench_loader(port, key[0] * port.ROWS, steps, Path(folder))
            known = [chip[g.name] for g in graphs if g.name in chip]
            chip_ms = sum(known) / len(known) if len(known) == len(graphs) else None
            stages.append(dict(name=f"{key[0]}_ws{graphs[0].ws_short}_{key[1]}", retraced_ms=retraced["median"],
                               replayed_ms=replayed["median"], loader_ms=loader["median"], chip_est_ms=chip_ms,
                               replayed_of_chip=chip_ms and replayed["median"] / chip_ms,
                               spread=dict(retraced=retraced, replayed=replayed, loader=loader)))
    return dict(stages=stages, steps=steps, devices=8, cores=os.cpu_count())

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="steps a median is taken over, at least 30 for a figure to quote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.steps < 4:
        parser.error(f"--steps {options.steps}: a median with quartiles needs 4 at least")
    os.environ["PJRT_DEVICE"], os.environ["CPU_NUM_DEVICES"] = "CPU", "8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    sys.path.insert(0, str(ROOT))
    result = run(options.steps)
    if options.json:
        print(json.dumps(result))
        return
    print(f"host ms a step, medians of {options.steps}, quartiles in brackets; {result['cores']} cores")
    print(f"{'stage (tokens a chip)':24}{'retraced':>24}{'replayed':>24}{'loader':>24}   chip, est.   replayed/chip")
    for s in result["stages"]:
        cells = [f"{x['median']:.2f} [{x['low']:.2f} {x['high']:.2f}]" for x in s["spread"].values()]
        chip = f"{s['chip_est_ms']:9.1f} ms   {s['replayed_of_chip']:.3f}" if s["chip_est_ms"] else "     none in records/"
        print(f"{s['name']:24}" + "".join(f"{c:>24}" for c in cells) + "   " + chip)

if __name__ == "__main__":
    main()
