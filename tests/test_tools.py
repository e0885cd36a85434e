"""
The tools that read a log: what they make of it, and each bad input's one line.
    python -m pytest tests/test_tools.py
"""
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, one_line
from eager import eager

sys.path.insert(0, str(ROOT / "tools"))
import aot
import plot_log
import record_stats

import train_gpt_xla as t

# the final losses and times that upstream publishes with record #60, and its p
LOSSES = [3.2790, 3.2798, 3.2776, 3.2798, 3.2792, 3.2768, 3.2785, 3.2807, 3.2793, 3.2774]
TIMES = [105.726, 105.884, 105.759, 105.758, 105.774, 105.786, 105.772, 105.875, 105.783, 105.677]

SOURCE = 'code = open(__file__).read()\nprint0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{ms:.0f}ms")\n'
OURS = ("Running on 8 CPU devices: [{}]\n"
        "Hyperparameters(val_files='./data/demo/demo_val_*.bin', val_tokens=16384, "
        "num_scheduled_iterations=3, num_extension_iterations=1)\n")

def write_log(path, loss=3.27, seconds=100.0, steps=4, header="", train_loss="", end="peak memory allocated: 29148 MiB\n"):
    """A log of upstream's form; with header and train_loss, of ours."""
    lines = [f"step:0/{steps} val_loss:10.8309 train_time:0ms step_avg:0.03ms"]
    for step in range(1, steps + 1):
        ms = 1000 * seconds * step / steps
        lines += [f"step:{step}/{steps} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms{train_loss}"]
    lines += [f"step:{steps}/{steps} val_loss:{loss:.4f} train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / steps:.2f}ms"]
    path.write_text(SOURCE + "=" * 100 + "\n" + header + "=" * 100 + "\n" + "\n".join(lines) + "\n" + end)
    return path

@pytest.fixture
def stats(capsys):
    """record_stats.py on these arguments: what it prints."""
    def run(*argv):
        record_stats.main([str(x) for x in argv])
        return capsys.readouterr().out
    return run

def test_stats_of_the_record(tmp_path, stats):
    logs = [write_log(tmp_path / f"{i}.txt", *run) for i, run in enumerate(zip(LOSSES, TIMES))]
    out = stats(*logs)
    assert "\n10 runs of 4 steps\n" in out
    assert "losses: mean 3.2788, sample deviation 0.0012\n" in out
    assert "p = 0.0067, the rule p < 0.01 is met\n" in out
    assert "times:  mean 105.7794, sample deviation 0.0619, median 105.7730 s\n" in out
    assert "Note" not in out
    # with two runs less the rule is not met any more, and against another target it is something else
    assert "is not met" in stats(*logs[:4]) and "p = 1.0000" in stats(*logs, "--target", "3.27")

def test_snippet_runs_and_says_what_the_report_says(tmp_path, stats):
    out = stats(*(write_log(tmp_path / f"{i}.txt", *run) for i, run in enumerate(zip(LOSSES, TIMES))))
    code = re.search(r"```python\n(.*?)```", out, re.S).group(1)
    printed = []
    exec(code, dict(print=lambda s: printed.append(f"# {s}")))
    assert printed == re.findall(r"^# .*", code, re.M) and len(printed) == 3

def test_stats_of_one_rehearsal(tmp_path, stats):
    out = stats(write_log(tmp_path / "a.txt", 2.7474, header=OURS, train_loss=" train_loss:3.1000"))
    assert "1 run of 4 steps on 8 CPU devices:" in out and "undefined, as one run has no deviation" in out
    assert "Note: validated on 16384 tokens of ./data/demo/demo_val_*.bin" in out
    assert "nan" not in out

def test_half_written_last_line(tmp_path, stats):
    """Ignored after the final validation; without one, the run did not finish."""
    path = write_log(tmp_path / "a.txt", 3.2790, end="peak memory alloc")
    assert "val_loss 3.2790" in stats(path)
    text = path.read_text()
    path.write_text(text[:text.rindex("step_avg") + 10])
    assert "did not finish: it ends at step 4 of 4" in one_line(record_stats, path)
    path.write_text(text[:text.index("step:3/4") + 30])
    assert "did not finish: it ends at step 2 of 4" in one_line(record_stats, path)
    # a number at the very end may lack digits
    line = "step:{}/4 train_time:9ms step_avg:9.00ms train_loss:{}"
    path.write_text(line.format(1, "3.0000") + "\n" + line.format(2, "3"))
    assert record_stats.read_log(str(path)).train_loss == {1: 3.0}

def test_a_resumed_run_counts_once(tmp_path):
    path = write_log(tmp_path / "a.txt", 3.2790)
    again = path.read_text().splitlines(keepends=True)
    path.write_text("".join(again[:-3] + again[-5:]))  # steps 3 and 4 once more
    assert record_stats.final(record_stats.read_log(str(path))) == (3.279, 100.0)

def test_bad_logs(tmp_path):
    good = write_log(tmp_path / "good.txt")
    bad = tmp_path / "bad.txt"
    assert "No such file" in one_line(record_stats, bad) and "bad.txt" in one_line(record_stats, good, bad)
    assert "Is a directory" in one_line(record_stats, tmp_path)
    for content, words in {"": "is empty", "epoch 1 loss 3.0\n": "is no log of", SOURCE: "is no log of",
                           SOURCE + "=" * 100 + "\n": "is the log of a run that stopped before its first step"}.items():
        bad.write_text(content)
        assert f"{bad} {words}" in one_line(record_stats, bad)
    bad.write_bytes(bytes(range(256)))
    assert "is no log of" in one_line(record_stats, bad)
    write_log(bad, steps=5)
    assert f"{bad} is a run of 5 steps, {good} one of 4" in one_line(record_stats, good, bad)
    write_log(bad, math.nan)
    assert "diverged" in one_line(record_stats, bad)
    bad.write_text(good.read_text() + good.read_text())
    assert "more than one run" in one_line(record_stats, bad)
    bad.write_text(good.read_text())
    assert "is the same run as" in one_line(record_stats, good, bad)

# -----------------------------------------------------------------------------
# README.md's commands

def test_readme_commands_run(tmp_path, monkeypatch):
    """Each command of README.md for one of these tools, on files made here."""
    write_log(tmp_path / "a.txt", 3.27)
    write_log(tmp_path / "b.txt", 3.26)
    monkeypatch.chdir(tmp_path)
    ran = re.findall(r"^    python tools/(record_stats|plot_log)\.py ([^#\n]*)", (ROOT / "README.md").read_text(), re.M)
    for tool, options in ran:
        sys.modules[tool].main(options.replace("logs/*.txt", "a.txt b.txt").split())
    assert {tool for tool, _ in ran} == {"record_stats", "plot_log"} and (tmp_path / "runs.png").exists()

def test_readme_names_what_exists(capsys):
    """Scripts, and words and options of run_tpu.sh and train_gpt_xla.py; other tools' commands are run by tests."""
    commands = re.findall(r"^    (?:\$ )?(?:python|bash) (\S+\.(?:py|sh)) ?([^#\n]*)", (ROOT / "README.md").read_text(), re.M)
    words = subprocess.run(["bash", ROOT / "run_tpu.sh", "--help"], capture_output=True, text=True, timeout=120, check=True).stdout
    for help_of in (t.parse_args, aot.main):
        with pytest.raises(SystemExit):
            help_of(["--help"])
    options = capsys.readouterr().out + words
    assert len(commands) > 20
    for script, given in commands:
        assert (ROOT / script).is_file(), f"README.md: no {script}"
        if script in ("run_tpu.sh", "train_gpt_xla.py"):
            for option in re.findall(r"(?<!\S)--?\w+", given):
                assert re.search(rf"(?<![\w-]){option}\b", options), f"README.md: {script} has no {option}"
            if script == "run_tpu.sh" and re.match(r"\w", given):
                assert f"bash run_tpu.sh {given.split()[0]} " in words, f"README.md: run_tpu.sh has no word {given}"

# -----------------------------------------------------------------------------
# plot_log.py

@pytest.fixture
def drawn(monkeypatch):
    """What plot_log.py draws: for each of the two pictures its curves [(label, x, y)], its texts, its vertical lines."""
    found = []
    def keep(figure):
        for ax in figure.axes:
            lines = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()]
            found.append(([x for x in lines if len(x[1]) != 2 or x[1][0] != x[1][1]], [text.get_text() for text in ax.texts],
                          [x[1][0] for x in lines if len(x[1]) == 2 and x[1][0] == x[1][1]]))
    monkeypatch.setattr(plot_log.plt, "close", keep)
    return found

def test_plot_of_a_rehearsal(tmp_path, drawn):
    fields = ("num_scheduled_iterations=9, num_extension_iterations=3, train_bs_schedule=(512, 1024, 1536, 1536), "
              "train_max_seq_len_schedule=(32, 64, 64, 64), ws_short_schedule=(1, 3, 5, 6), ws_long_schedule=(3, 7, 11, 13), "
              "block_size=16, of_a_later_version=1")
    log = write_log(tmp_path / "a.txt", 2.7474, 60, 12, f"Hyperparameters({fields})\n",
                    " train_loss:3.1000 ms:5000.00 tok/s:100 eta:9s")
    plot_log.main([str(log), "-o", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (steps, texts, marks), (times, _, time_marks) = drawn
    assert steps == [("a: 2.7474", [0, 12], [10.8309, 2.7474]), ("training, all its targets", list(range(1, 13)), [3.1] * 12)]
    assert [x[1] for x in times] == [[0, 60], [5.0 * s for s in range(1, 13)]]
    assert texts == ["512 tokens\nwindows 16, 48", "1,024 tokens\nwindows 48, 112", "1,536 tokens\nwindows 80, 176",
                     "1,536 tokens\nwindows 96, 208"]
    assert marks == [3, 6, 9] and time_marks == [15.0, 30.0, 45.0]

def upstreams(**stage_2) -> str:
    """What of upstream's source says how record #89 runs; stage_2: arguments of its second stage that are others."""
    def stage(batch, windows, seq_len, **rest):
        arguments = dict(duration="1/3", train_max_seq_len=seq_len, batch_size=f"{batch} * 2048 * 8", window_sizes=windows) | rest
        return f"    TrainingStage({', '.join(f'{name}={value}' for name, value in arguments.items() if value)}),\n"
    return ("class Hyperparameters:\n    num_scheduled_iterations: int = 1270\n    num_extension_iterations: int = 15\n"
            f"TRAINING_STAGES = [\n{stage(8, (1, 3), 896)}{stage(16, (3, 7), 2048, **stage_2)}{stage(24, (5, 11), 2048)}"
            f"{stage(24, (6, 13), 2048, duration=None)}]\n")

def test_plot_of_upstreams_log_has_its_stages(tmp_path, drawn):
    path = write_log(tmp_path / "a.txt", steps=1285)
    text = path.read_text()
    for code, marks in ((upstreams(), [423, 847, 1270]), (upstreams(window_sizes=(1, 3), batch_size="8 * 2048 * 8"), [847, 1270])):
        path.write_text(code + text)
        plot_log.main([str(path), "-o", str(tmp_path / "a.png")])
        assert drawn[0][2] == marks and len(drawn[0][1]) == len(marks)  # the last stage is too short for its text
        drawn.clear()
    # of another schedule, or in words that are not understood: none
    for code in ("", upstreams(duration="1/4"), upstreams().replace("    TrainingStage(", "    Stage(), TrainingStage(", 1),
                 upstreams().replace("1270", "1271"), upstreams().replace("num_ext", "num_other"), upstreams(window_sizes=None),
                 upstreams(window_sizes="WINDOWS"), upstreams(batch_size="get()")):
        path.write_text(code + text)
        drawn.clear()
        plot_log.main([str(path), "-o", str(tmp_path / "a.png")])
        assert not drawn[0][1] and not drawn[0][2], code

def test_plot_of_an_older_versions_log_has_no_stages(tmp_path, drawn):
    """It prints the fields of record #60, whose schedule is another."""
    fields = ("num_scheduled_iterations=2, num_extension_iterations=2, train_bs_schedule=(512, 1024, 1536), train_bs_extension=1536, "
              "train_max_seq_len=2048, cooldown_frac=0.5, ws_schedule=(3, 7, 11), ws_final=13, block_size=16")
    plot_log.main([str(write_log(tmp_path / "a.txt", header=f"Hyperparameters({fields})\n")), "-o", str(tmp_path / "a.png")])
    assert drawn[0][0][0][0] == "a: 3.2700" and not drawn[0][1] and not drawn[0][2]

def test_plot_of_an_unfinished_run_and_bad_input(tmp_path, drawn):
    path = write_log(tmp_path / "a.txt", header=OURS)
    path.write_text(path.read_text()[:path.read_text().index("step:3/4") + 30])
    plot_log.main([str(path), "-o", str(tmp_path / "a.png")])
    assert drawn[0][0][0][:2] == ("a: 10.8309", [0])
    path.write_text("")
    assert "a.txt is empty" in one_line(plot_log, path, "-o", tmp_path / "a.png")
    path.write_text("epoch 1 loss 3.0")
    assert "is no log of" in one_line(plot_log, path, "-o", tmp_path / "a.png")
    assert "No such file" in one_line(plot_log, tmp_path / "none.txt", "-o", tmp_path / "a.png")
    path = write_log(path)
    assert "no folder" in one_line(plot_log, path, "-o", tmp_path / "none" / "a.png")
    assert "not supported" in one_line(plot_log, path, "-o", tmp_path / "a.xyz")

def test_plot_refuses_or_compares(tmp_path, drawn, capsys):
    """Other validation data never in one picture; another configuration only if asked for, and named in the legend."""
    fields = "Hyperparameters(val_files='{}/val_*.bin', val_tokens={}, train_max_seq_len={}, cooldown_frac=0.5, seed={})\n"
    logs = [write_log(tmp_path / f"{i}.txt", 3.27 + i / 100, header=fields.format(*values)) for i, values in
            enumerate([("x", 16384, 64, 0), ("/y/x", 16384, 64, 1), ("x", 16384, 32, 0), ("x", 8192, 64, 0), ("z", 16384, 64, 0)])]
    out = ["-o", tmp_path / "a.png"]
    plot_log.main([*map(str, logs[:2]), *map(str, out)])
    labels = lambda: [label for label, _, _ in drawn[0][0] if not label.startswith("_")]
    assert labels() == ["0: 3.2700", "1: 3.2800"]
    assert "2.txt: train_max_seq_len is 32, in " in (said := one_line(plot_log, logs[0], logs[2], *out)) and "--compare" in said
    for i, words in ((3, "val_tokens is 8192"), (4, "val_files is z/val_*.bin")):
        for compare in ([], ["--compare"]):
            assert f"{i}.txt: {words}" in (said := one_line(plot_log, logs[0], logs[i], *out, *compare)) and "do not compare" in said
    longer = write_log(tmp_path / "5.txt", steps=5)  # an upstream log, which does not say on what it validates
    assert "5.txt is a run of 5 steps" in one_line(plot_log, logs[0], longer, *out)
    drawn.clear()
    plot_log.main(["--compare", *map(str, [logs[0], logs[2]]), *map(str, out)])
    assert labels() == ["0, train_max_seq_len=64: 3.2700", "2, train_max_seq_len=32: 3.2900"]
    assert "2.txt: train_max_seq_len is 32" in capsys.readouterr().out
    plot_log.main(["--compare", *map(str, [logs[0], longer]), *map(str, out)])
    assert "5.txt is a run of 5 steps" in capsys.readouterr().out

def test_plot_has_no_times_from_before_the_clock_and_no_losses_that_are_none(tmp_path, drawn):
    """Upstream's older form: the training loss of each step, no time at first. A loss that is not finite is told in the legend."""
    path = tmp_path / "a.txt"
    path.write_text("step:0/4 val_loss:10.8 train_time:475ms step_avg:nanms\nstep:1/4 train_loss:9.5 train_time:9000ms step_avg:nanms\n"
                    "step:2/4 train_loss:nan train_time:20ms step_avg:10ms\nstep:3/4 train_loss:8.5 train_time:30ms step_avg:10ms\n"
                    "step:4/4 val_loss:inf train_time:0.04s step_avg:10ms\n")
    plot_log.main([str(path), "-o", str(tmp_path / "a.png")])
    (steps, _, _), (times, _, _) = drawn
    assert [x[1:] for x in steps] == [([0], [10.8]), ([1, 3], [9.5, 8.5])] and [x[1:] for x in times] == [([0], [10.8]), ([0.03], [8.5])]
    assert steps[0][0] == "a: inf"
    path.write_text("step:4/4 val_loss:nan train_time:0.04s step_avg:10ms\n")
    plot_log.main([str(path), "-o", str(tmp_path / "a.png")])

# -----------------------------------------------------------------------------
# The figures of the log line

def test_flops_are_those_of_the_model(monkeypatch):
    """Counted by torch in a whole forward and backward pass; attention apart, by the windows that the model asks for."""
    from torch.utils.flop_counter import FlopCounterMode
    args = t.Hyperparameters(vocab_size=301, head_dim=64, model_dim=384, block_size=16, dc_window=14, bigram_vocab_size=512, bigram_dim=384,
                             bigram_sign_table_rows=16, train_max_seq_len_schedule=(64, 64, 64, 64))
    windows = []
    monkeypatch.setattr(t, "window_attention", lambda q, k, v, documents, window, scale, paired: windows.append((window, paired)) or v)
    monkeypatch.setattr(t, "dc_attention", lambda qkv, y, w1, w2, documents, window, scale: windows.append((window - 1, False)) or y)
    model = t.GPT(args.vocab_size, args.num_layers, args.num_heads, args.head_dim, args.model_dim, args.block_size, args.dc_window,
                  args.bigram_vocab_size, args.bigram_sign_table_rows).float()
    graph = t.get_graph(0, t.TrainingSchedule(args))
    tokens = t.torch.zeros(8, 64, dtype=t.torch.int32)
    yarn = t.torch.tensor(model.yarn.numbers())
    ws_short, ws_long = (args.block_size * window for window in (graph.ws_short, graph.ws_long))
    config = t.ForwardScheduleConfig(t.torch.ones(graph.n_mtp), t.torch.ones(1), ws_short, ws_long, yarn, yarn)
    with eager(kernels=False), FlopCounterMode(display=False) as counter:
        model(tokens, tokens, tokens, tokens, config).sum().backward()
    assert len(windows) == 11
    keys = sum(np.mean([min(i, window) + 1 for i in range(64 * (1 + paired))]) for window, paired in windows)
    counted = counter.get_total_flops() / tokens.numel() + 12 * args.model_dim * keys
    assert t.flops_per_token(graph, args) == pytest.approx(counted, rel=0.01), "gates may make one percent"

def test_flops_of_the_record():
    args = t.Hyperparameters()
    tokens, flops = t.work_until(args)
    assert len(tokens) == 1286 and tokens[0] == 0 and tokens[-1] == 423 * 131072 + 424 * 262144 + (423 + 15) * 393216
    weights = 10 * 4 * 768**2 + 11 * 8 * 768**2 + 50304 * 768
    seen = lambda window, length: np.mean(np.minimum(np.arange(length), window) + 1)  # keys, on average
    total = 0.0
    for steps, batch, short, long, length in ((423, 131072, 128, 384, 896), (424, 262144, 384, 896, 2048), (423, 393216, 640, 1408, 2048),
                                              (15, 393216, 768, 1664, 2048)):
        keys = 4 * seen(short, 2 * length) + 4 * seen(short, length) + 2 * seen(long, length) + seen(111, length)  # the last: DC
        total += steps * batch * (6 * weights + 12 * 768 * keys)
    assert flops[-1] == pytest.approx(total, rel=1e-4)

def test_peak_by_pci_id(tmp_path, monkeypatch):
    def chip(i, device, vendor="0x1ae0"):
        folder = tmp_path / f"bus/pci/devices/0000:0{i}"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
    monkeypatch.setattr(t.xr, "device_type", lambda: "TPU")
    assert t.peak_flops(str(tmp_path)) is None, "no chip"
    chip(0, "0x0042")  # a network card of the same vendor
    chip(1, "0x006f", vendor="0x8086")
    assert t.peak_flops(str(tmp_path)) is None, "no TPU"
    for i in range(2, 6):
        chip(i, "0x006f")
    assert t.peak_flops(str(tmp_path)) == 8 * 918e12
    monkeypatch.setattr(t.xr, "device_type", lambda: "CPU")
    assert t.peak_flops(str(tmp_path)) is None, "a CPU has no peak, whatever else is in the machine"

def test_speed():
    work = [0, 100, 300], [0.0, 4e9, 8e9]
    assert t.speed(work, 0, 2, 500.0, None) == " ms:250.00 tok/s:600"
    assert t.speed(work, 1, 2, 500.0, 32e9) == " ms:500.00 tok/s:400 mfu:25.0%"

def test_price_must_be_one(capsys):
    for price in ("-1", "nan", "inf", "ten"):
        with pytest.raises(SystemExit):
            t.parse_args(["--price", price])
        assert "--price" in capsys.readouterr().err
    assert t.parse_args(["--price", "21.6"])[1].price == 21.6 and t.parse_args([])[1].price is None
