"""
What does a training step cost the host? The record's structure (11 layers, all parameters, its optimizer and schedule) at toy widths
on virtual CPU devices, which get cores of their own so that their work does not count; and the loader at the record's real batch sizes.

    python tools/bench_step.py [--steps 30] [--devices 8] [--json]        (bash run_tpu.sh bench)

retraced_ms: recording the step anew and handing it over, as without replay. replayed_ms: handing over the recorded step.
loader_ms: packing one batch, 8 rows with their document starts and bigrams, from a shard of documents with FineWeb's lengths. Medians,
with quartiles. A replayed step should cost at most 3 ms and a twentieth of a retraced one; a batch at most 10 ms. On one device a step is 8
programs, one for each row, and the update (D24): beside it stands what they should take on a v6e-1, which must be longer.
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

def bench_loader(port, num_tokens: int, max_seq_len: int, steps: int, folder: Path) -> dict:
    path = folder / "bench_000.bin"
    if not path.exists():
        shard(path, 60_000_000, port.BOS_ID)
    loader = port.distributed_data_generator(str(path), num_tokens, max_seq_len)
    times = []
    for _ in range(steps):
        t0 = time.perf_counter()
        batch = port.pack(*next(loader)[0], port.Hyperparameters.bigram_vocab_size)
        times.append(time.perf_counter() - t0)
    assert batch.shape == (port.ROWS, port.blank_batch(1).size(1), num_tokens // port.ROWS)
    return spread(times[1:])  # the first one opens the shard

def bench_step(port, args, steps: list[int], n: int, replay: bool) -> dict:
    """Host time of n steps, these of one stage in turn: what it takes to hand over their programs, while the devices have nothing to do."""
    manager = port.build(args)
    calls = []
    step_fn = port.Replay(lambda *x: calls.append(1) or manager.program(*x), manager.tensors, manager.constants, enabled=replay)
    graph_of = lambda step: port.get_graph(step, manager.training_schedule)
    batch = port.to_device(port.blank_batch(graph_of(steps[0]).tokens), "data")
    numbers = [port.to_device(x) for x in manager.precompute(steps)]  # the loader's thread sends them
    times, programs = [], []
    for i in range(n + 2 * len(steps)):
        step = steps[i % len(steps)]
        if i == len(steps):
            set_cores(CORES[:1], CORES[1:] or CORES)
        port.xm.wait_device_ops()
        t0 = time.perf_counter()
        manager.advance_schedule(step)
        times.append(time.perf_counter() - t0)
        for graph in [g for g, turns in graph_of(step).programs(port.turns()) for _ in range(turns)]:
            programs.append(graph)
            t0 = time.perf_counter()
            manager.graph = graph
            result = step_fn(graph, *(() if graph.part == "update" else (batch,)), numbers[i % len(steps)])
            if not replay:
                port.xm.mark_step()  # hashes the recording and hands it over; the devices run it in a thread
            times[-1] += time.perf_counter() - t0
            port.xm.wait_device_ops()  # a CPU runs the step in the call that hands it over, a TPU does not: wait, then time
            t0 = time.perf_counter()
            port.xm.mark_step()  # replayed, it finds nothing to do
            times[-1] += time.perf_counter() - t0 if replay else 0
            assert result.cpu().isfinite().all()
    assert len(calls) == len(set(programs) if replay else programs), "replay traced, or tracing was skipped: nothing was measured"
    set_cores(CORES, CORES)
    return spread(times[2 * len(steps):])  # the first of each compiles

def set_cores(mine: list[int], others: list[int]):
    """The cores of this thread and of all others, which do the devices' work. It holds for threads that exist by now."""
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, mine if thread == threading.get_native_id() else others)

def estimates(devices: int) -> dict[int, float]:
    """Estimated ms a step on a v6e with so many chips, by tokens a row; none where no report in records/ has them."""
    from machine import TPUS, newest_report
    report = newest_report(TPUS[name]) if (name := f"v6e-{devices}") in TPUS else None
    return {int(tokens): ms for tokens, ms in report["step_est_ms"].items()} if report else {}

def run(n: int, devices: int) -> dict:
    import train_gpt_xla as port
    from spmd import COMPILE_FAST

    port.setup_devices(COMPILE_FAST)
    record = port.Hyperparameters()
    toy = port.Hyperparameters(vocab_size=256, head_dim=8, model_dim=48, block_size=1, dc_window=7, bigram_vocab_size=512, bigram_dim=48,
                               bigram_sign_table_rows=64, train_bs_schedule=(8 * 16, 8 * 32, 8 * 48, 8 * 48), val_batch_size=8 * 16)
    schedule = port.TrainingSchedule(record)
    stages, ms = {}, estimates(devices)
    for graph, steps in port.distinct_graphs(record).items():
        if graph.train and not graph.copy_embed:  # one step of each, even and odd ones; the toy's schedule is the record's
            stages.setdefault((graph.tokens, graph.ws_short, graph.ws_long), []).append(steps[0])
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for (tokens, short, long), steps in stages.items():
            retraced = bench_step(port, toy, steps, n, replay=False)
            replayed = bench_step(port, toy, steps, n, replay=True)
            stage, _ = schedule.lookup(steps[0])
            loader = bench_loader(port, stage.batch_size, stage.train_max_seq_len, n, Path(folder))
            results.append(dict(name=f"{tokens}_ws{short}_{long}", retraced_ms=retraced["median"], replayed_ms=replayed["median"],
                                loader_ms=loader["median"], chip_est_ms=ms.get(tokens),
                                replayed_of_chip=ms.get(tokens) and replayed["median"] / ms[tokens],
                                spread=dict(retraced=retraced, replayed=replayed, loader=loader)))
    return dict(stages=results, steps=n, devices=devices, cores=os.cpu_count())

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="steps a median is taken over, at least 30 for a figure to quote")
    parser.add_argument("--devices", type=int, default=8, choices=(1, 2, 4, 8), help="on fewer than 8 a step's rows take turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.steps < 4:
        parser.error(f"--steps {options.steps}: a median with quartiles needs 4 at least")
    os.environ["PJRT_DEVICE"], os.environ["CPU_NUM_DEVICES"] = "CPU", str(options.devices)
    sys.path.insert(0, str(ROOT))
    result = run(options.steps, options.devices)
    if options.json:
        print(json.dumps(result))
        return
    print(f"host ms a step, medians of {options.steps}, quartiles in brackets; {options.devices} virtual devices, {result['cores']} cores")
    print(f"{'stage (tokens a chip)':24}{'retraced':>24}{'replayed':>24}{'loader':>24}   chip, est.   replayed/chip")
    for s in result["stages"]:
        cells = [f"{x['median']:.2f} [{x['low']:.2f} {x['high']:.2f}]" for x in s["spread"].values()]
        chip = f"{s['chip_est_ms']:9.1f} ms   {s['replayed_of_chip']:.3f}" if s["chip_est_ms"] else "     none in records/"
        print(f"{s['name']:24}" + "".join(f"{c:>24}" for c in cells) + "   " + chip)

if __name__ == "__main__":
    main()
