"""
The reader of logs and record_stats.py: forms of lines, logs of several starts, and what may be pooled.
    python -m pytest tests/test_run_log.py
"""
import dataclasses
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import command
import record_stats
import run_log
from run_log import BAR, read_log

FIELDS = dict(train_files="./data/fineweb10B/fineweb_train_*.bin", val_files="./data/fineweb10B/fineweb_val_*.bin", val_tokens=10485760,
              train_max_seq_len=2048, num_scheduled_iterations=6, cooldown_frac=0.5, run_id="a", val_loss_every=250, ws_schedule=(3, 7),
              dtype="bfloat16", seed=0)

def header(*lines, devices="8 TPU devices", code="", **fields):
    """As train_gpt_xla.py prints it, with lines below."""
    printed = ", ".join(f"{name}={value!r}" for name, value in (FIELDS | fields).items())
    return "\n".join(["logs/a.txt", code, BAR, f"Running on {devices}: [{{}}]", f"Hyperparameters({printed})", BAR, *lines, ""])

def steps(first, last, loss=3.27, of=6, ms=10.0):
    """Lines from step first on (0: its validation), to last."""
    lines = [f"step:0/{of} val_loss:10.8309 train_time:0ms step_avg:0.03ms"] * (first == 0)
    lines += [f"step:{s}/{of} train_time:{s * ms:.0f}ms step_avg:{ms:.2f}ms" for s in range(max(first, 1), last + 1)]
    lines += [f"step:{of}/{of} val_loss:{loss:.4f} train_time:{of * ms:.0f}ms step_avg:{ms:.2f}ms"] * (last == of)
    return "\n".join([*lines, ""])

@pytest.fixture
def write(tmp_path):
    def write(text, name="a.txt", encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        return str(path)
    return write

def refused(*argv) -> str:
    """record_stats.py ends with one line that names it."""
    with pytest.raises(SystemExit) as e:
        record_stats.main([str(x) for x in argv])
    assert str(e.value.code).startswith("record_stats.py: ") and "\n" not in e.value.code
    return e.value.code

# -----------------------------------------------------------------------------
# Forms of lines

@pytest.mark.parametrize("line, found", {
    "step:3/6 val_loss:3.2765 train_time:30ms step_avg:10.00ms": dict(val_loss=3.2765, time=30, step_avg=10),
    "step:3/6 val_loss:3.27655 train_time:0.030s step_avg:10.00ms": dict(val_loss=3.27655, time=30, step_avg=10),
    "step:3/6 train_loss:4.5000 train_time:30ms step_avg:10.00ms": dict(train_loss=4.5, time=30, step_avg=10),
    "step:3/6 train_time:30ms step_avg:9ms train_loss:4.5000 ms:9.87 tok/s:168 mfu:41.0% eta:1s": dict(train_loss=4.5, time=30, step_avg=9),
    "step:3/6 train_loss:4.5000 train_time:35910ms step_avg:nanms": dict(train_loss=4.5),
    "step:3/6 val_loss:4.1 val_avg_loss:4.2 val_ema_loss:4.3 train_time:30.5s step_avg:9ms": dict(val_loss=4.1, time=30500, step_avg=9),
    "step:3/6 val_loss:4.1 train_time:30ms step_avg:9ms extrap_rel:1.000e-03 handoff:keep": dict(val_loss=4.1, time=30, step_avg=9),
    "step:3/6 val_loss:4.1 val_time: 673ms train_time:1ms step_avg:0.85ms": dict(val_loss=4.1, time=1, step_avg=0.85),
    "step:3/6 val_loss:4.6062 train_time:30ms step_avg:10.00ms record:4.6062 (+0.0000)": dict(val_loss=4.6062, time=30, step_avg=10),
}.items())
def test_each_form_of_a_line(write, line, found):
    log = read_log(write(f"{BAR}\n{line}\n"))
    series = {name: getattr(log, name) for name in ("val_loss", "train_loss", "time", "step_avg")}
    assert log.num_steps == 6 and {name: values for name, values in series.items() if values} == {k: {3: x} for k, x in found.items()}

def test_the_clock_of_older_scripts(write):
    """They start it anew after ten steps: times of before are none, but step 0 is at 0."""
    lines = [f"step:{s}/20 train_loss:9.0000 train_time:{35000 + s if s <= 10 else 100 * (s - 10)}ms step_avg:{'nan' if s < 13 else 100}ms"
             for s in range(1, 21)]
    log = read_log(write("\n".join(["step:0/20 val_loss:10.9 train_time:475ms step_avg:nanms", *lines, ""])))
    assert log.val_loss == {0: 10.9} and len(log.train_loss) == 20
    assert log.time == {0: 0.0} | {s: 100 * (s - 10) for s in range(13, 21)}

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings_and_line_ends(write, encoding, newline):
    text = (header(code="x = 'é'\ny = 2") + steps(0, 6)).replace("\n", newline)
    log = read_log(write(text, encoding=encoding))
    assert log.val_loss == {0: 10.8309, 6: 3.27} and log.hyperparameters == FIELDS and log.codes == ["x = 'é'\ny = 2"]
    assert read_log(write(text.rstrip(), encoding=encoding)).val_loss[6] == 3.27, "the last line's end is missing"

def test_damaged_logs(write):
    assert "a.txt:4: cannot be read" in refused(write(steps(0, 6).replace("step:3/6 train_time:30ms", "step:3/6 train_time:3\0ms")))
    assert "a.txt:5: cannot be read (invalid syntax)" in refused(write(header().replace("seed=0", "seed=") + steps(0, 6)))
    assert "a.txt:7: cannot be read" in refused(write(header("data: {'val_files': [x]}") + steps(0, 6)))
    assert "llm.c" in refused(write("s:0 tel:10.9688\ns:0 trl:10.9656\n"))
    assert "diverged" in refused(write(steps(0, 6, float("inf"))))
    for time in ("step_avg:10.00", "train_time:60"):
        assert "before its clock started" in refused(write(steps(0, 6).replace(time, time.split(":")[0] + ":nan")))

@pytest.mark.parametrize("line", ["[rank0]: step:6/6 val_loss:3.27 train_time:60ms step_avg:10ms", "step:6/6 val_loss:3.27 train_time:60ms",
                                  "step: 6/6 val_loss:3.27 train_time:60ms step_avg:10ms"])
def test_steps_in_a_form_that_is_not_known(write, line):
    """Told as that, and not as a run that has no steps."""
    assert f"a.txt:7: a step's line that does not read, from its beginning, step:N/M ... train_time:Tms step_avg:Tms: '{line}'" in refused(
        write(header().replace("logs/a.txt", "step:1/2 of a source") + line + "\n"))
    assert "stopped before its first step" in refused(write(header() + "step:0/6 val"))

# -----------------------------------------------------------------------------
# Several starts in one log

def test_a_start_that_failed_does_not_describe_the_run(write):
    run = header(val_tokens=7, ws_schedule=(1, 2)) + steps(0, 6)
    whole_header = header("starting with the weights of x.pt", val_tokens=5, devices="4 TPU devices", code="y = 2")
    half_header = whole_header[:whole_header.index("Running")]
    stopped = header(val_tokens=5) + steps(0, 3)
    for failed in (whole_header, half_header, stopped, whole_header + half_header + stopped):
        log = read_log(write(failed + run))
        assert (log.hyperparameters["val_tokens"], log.devices, log.init_from) == (7, "8 TPU devices", ""), failed
        assert log.hyperparameters["ws_schedule"] == (1, 2) and log.val_loss == {0: 10.8309, 6: 3.27}
    for failed in (whole_header, half_header):
        log = read_log(write(run + failed))
        assert (log.hyperparameters["val_tokens"], log.devices, log.init_from) == (7, "8 TPU devices", ""), failed

def test_a_resumed_run(write):
    """Steps of both starts, each once, the later of two; the source and devices of both."""
    begun = header("starting with the weights of x.pt", code="y = 1") + steps(0, 5, ms=10)
    log = read_log(write(begun + header("resumed from c.pt at step 4", code="y = 2", devices="4 TPU devices") + steps(5, 6, ms=20)))
    assert log.time == {0: 0, 1: 10, 2: 20, 3: 30, 4: 40, 5: 100, 6: 120} and log.val_loss == {0: 10.8309, 6: 3.27}
    assert log.codes == ["y = 1", "y = 2"] and log.devices == "8 TPU devices, then 4 TPU devices" and log.init_from == "x.pt"
    stopped = read_log(write(begun + header() + steps(4, 4, ms=20)))
    assert stopped.time == {0: 0, 1: 10, 2: 20, 3: 30, 4: 80} and stopped.last == 4, "step 5 of the first start is gone"
    # the same source is not printed again
    assert read_log(write(begun + "peak memory allocated: 1 MiB\n" + header() + steps(5, 6))).codes == ["y = 1"]

def test_a_finished_run_given_again_counts_once(write, capsys):
    run = header() + steps(0, 6)
    log = read_log(write(run + header() + steps(5, 6, ms=20) + header() + steps(5, 6, ms=30)))
    assert record_stats.final(log) == (3.27, 0.06), "the time is that of the run, not of its repetition"
    assert "2 finished, with losses of 3.2700, 3.2701" in refused(write(run + header() + steps(5, 6, 3.2701)))
    assert "more than one run" in refused(write(run + header() + steps(0, 6))), "another run from the start, with a time of its own"
    assert "more than one run" in refused(write(run + header(cooldown_frac=0.6) + steps(5, 6))), "of another configuration"
    capsys.readouterr()
    assert read_log(write(run + header(seed=1) + steps(0, 4))).hyperparameters["seed"] == 0
    assert "a.txt: left out a later start, which ends at step 4 of 6" in capsys.readouterr().err

def test_one_start_may_make_several_runs(write, capsys):
    """As in upstream's track 3: a loop over seeds, with one header."""
    path = write(header() + "".join(f"trial:{i}/3 seed:{i}\n{steps(0, 6, 3.27 + i / 1000)}" for i in range(3)))
    record_stats.main([path])
    out = capsys.readouterr().out
    assert f"{path}, run 3  val_loss 3.2720" in out and "3 runs of 6 steps" in out and "mean 3.2710" in out
    with pytest.raises(ValueError, match="more than one run"):
        read_log(path)  # weights are those of one run

# -----------------------------------------------------------------------------
# What may be pooled

def test_fields_that_are_about_watching():
    import train_gpt_xla as t
    args = t.Hyperparameters()
    assert {f.name for f in dataclasses.fields(args)} - t.hyperparameters(args).keys() == run_log.WATCHING

UPSTREAM = '''import os
SEED = 1
@dataclass
class Hyperparameters:
    val_files: str = "data/fineweb10B/fineweb_val_*.bin" # to eval on
    val_tokens: int = 10 * 1024
    bs_schedule: tuple = (8 * 2048, 16 * 2048)
    run_id: str = f"{uuid.uuid4()}"
    val_loss_every: int = 250
args = Hyperparameters()
def get_lr(step):
    """the learning rate"""
    return step / args.val_tokens
class GPT(nn.Module):
    def forward(self, x):
        return norm(x)
'''

LATER = '''class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", ".")
    val_files: str = os.path.join(data_path, "data/fineweb10B/fineweb_val_*.bin")
    val_tokens: int = 10485760
    bigram_vocab_size: int = 50304 * 15 // 2
class TrainingSchedule:
    def __init__(self, stages: list, scheduled_iterations: int, extension_iterations: int, cooldown_frac: float = 0.5,
                 split_embed_stage: int = 2, ws_post_yarn_ext: int = 20):
        self.stages = stages
TRAINING_STAGES = [
    TrainingStage(duration=1/2, train_max_seq_len=896, batch_size=8 * 2048 * 8, window_sizes=(1, 3)),
    TrainingStage(train_max_seq_len=2048, batch_size=16 * 2048 * 8, window_sizes=(3, 7)),
]
training_schedule = TrainingSchedule(TRAINING_STAGES, 9, 1, cooldown_frac=0.60)
# training_schedule = TrainingSchedule(TRAINING_STAGES, 9, 1, cooldown_frac=0.55)
'''

def test_what_a_source_with_stages_says(write):
    """As record #89's, in the fields of train_gpt_xla.py."""
    stages = dict(train_bs_schedule=(131072, 262144), train_max_seq_len_schedule=(896, 2048), ws_short_schedule=(1, 3),
                  ws_long_schedule=(3, 7))
    known = dict(val_files="data/fineweb10B/fineweb_val_*.bin", val_tokens=10485760, bigram_vocab_size=377280, **stages)
    schedule = dict(cooldown_frac=0.6, ws_validate_post_yarn_ext=20)
    says = lambda *change: run_log.configuration(read_log(write(f"{LATER.replace(*change)}\n{BAR}\n{steps(0, 6)}")))
    assert says("", "") == known | schedule
    assert says("cooldown_frac=0.60", "ws_post_yarn_ext=19") == known | dict(cooldown_frac=0.5, ws_validate_post_yarn_ext=19)
    without = lambda *names: {name: x for name, x in (known | schedule).items() if name not in names}
    assert says("train_max_seq_len=2048, ", "") == without("train_max_seq_len_schedule")
    assert says("window_sizes=(3, 7)", "window_sizes=WINDOWS") == without("ws_short_schedule", "ws_long_schedule")
    assert says("window_sizes=(3, 7)", "window_sizes=7") == without("ws_short_schedule", "ws_long_schedule")
    assert says("cooldown_frac=0.60", "cooldown_frac=args.cooldown") == without("cooldown_frac")
    assert says("9, 1, cooldown_frac=0.60", "9, 1, 0.60") == without(*schedule), "by place, which this does not count"
    assert says("# training", "training") == without(*schedule), "two schedules"
    for other in (("TrainingStage(duration=1/2, ", "TrainingStage(1/2, "), ("# training_schedule =", "TRAINING_STAGES ="),
                  ("TRAINING_STAGES = [", "TRAINING_STAGES = [*OTHERS, ")):
        assert says(*other) == without(*stages, *schedule), "in another form, or changed later"

def test_validation_on_the_same_data_in_upstreams_words(write):
    ours, upstreams = (read_log(write(text + steps(0, 6))) for text in (header(), f"{LATER}\n{BAR}\n"))
    assert run_log.validation_difference(ours, upstreams) is None
    other = read_log(write(f"{LATER.replace('fineweb_val', 'other_val')}\n{BAR}\n{steps(0, 6)}"))
    assert "val_files" in run_log.validation_difference(ours, other)

def test_runs_of_one_configuration(write, capsys):
    logs = [write(header(seed=i, run_id=str(i), val_loss_every=5 * i, train_files=f"/disk{i}/data/fineweb10B/fineweb_train_*.bin",
                         code=f"x = 1  # {i}") + steps(0, 6, 3.27 + i / 1000), f"{i}.txt") for i in range(3)]
    record_stats.main(logs)
    out = capsys.readouterr().out
    assert "3 runs of 6 steps" in out
    assert re.findall("Note: (.*)", out) == [f"{logs[i]}: train_files is /disk{i}/data/fineweb10B/fineweb_train_*.bin, in {logs[0]} "
        "/disk0/data/fineweb10B/fineweb_train_*.bin: taken for the same, as not both logs list what is in them" for i in (1, 2)]
    sources = [UPSTREAM, UPSTREAM.replace("SEED = 1", "SEED = 2").replace("_every: int = 250", "_every: int = 5"),
               UPSTREAM.replace("the learning rate", "of step").replace(" # to eval on", "")]
    record_stats.main([write(f"{code}\n{BAR}\n{steps(0, 6, 3.27 + i / 1000)}", f"{i}.txt") for i, code in enumerate(sources)])
    assert "3 runs of 6 steps" in capsys.readouterr().out
    assert read_log(write(f"{BAR}\n{UPSTREAM}\n{BAR}\nRunning\n{BAR}\n{steps(0, 6)}")).codes == [UPSTREAM.strip()], "as the first scripts"
    record_stats.main([write(steps(0, 6, 3.27 + i / 1000), f"{i}.txt") for i in range(2)])
    assert "Note: " in capsys.readouterr().out.split("1.txt has neither hyperparameters nor a source")[0], "nothing says what they are"
    record_stats.main([write(header() + steps(0, 6, ms=10 + i), f"{i}.txt") for i in range(2)])
    assert "1.txt has the seed and the losses of" in capsys.readouterr().out

DATA = "data: {'train_files': [('a_1.bin', 100, 7), ('a_2.bin', 100, 8)], 'val_files': [('v.bin', 50, 9)]}"

@pytest.mark.parametrize("other, words", [
    (header(train_max_seq_len=1024), "b.txt: train_max_seq_len is 1024, in {a} it is 2048"),
    (header(cooldown_frac=0.6, dtype="float32"), "b.txt: cooldown_frac is 0.6, in {a} it is 0.5"),
    (header(ws_schedule=(3, 8)), "b.txt: ws_schedule is (3, 8), in {a} it is (3, 7)"),
    (header(new=1), "b.txt: new is 1, in {a} it is unknown"),
    (header(val_tokens=524288), "b.txt: val_tokens is 524288"),
    (header(val_files="./data/mine/val_*.bin"), "b.txt: val_files is ./data/mine/val_*.bin"),
    (header(train_files="./data/mine/fineweb_train_*.bin"), "b.txt: train_files is ./data/mine/fineweb_train_*.bin"),
    (header("starting with the weights of x.pt"), "b.txt: init_from is x.pt, in {a} it is nothing"),
    (header(devices="4 TPU devices"), "b.txt: devices is 4 TPU devices, in {a} it is 8 TPU devices"),
    (header(code="def get_lr(step):\n    return 2"), "b.txt: its source differs from that in {a}, first at get_lr"),
    ("", "{a} prints its hyperparameters, "),
])
def test_another_configuration_is_refused(write, other, words):
    a = write(header(code="def get_lr(step):\n    return 1") + steps(0, 6), "a.txt")
    found = refused(a, write(other + steps(0, 6, 3.28), "b.txt"))
    assert words.format(a=a) in found and found.endswith("give logs of one configuration")

@pytest.mark.parametrize("old, new, words", [
    ("10 * 1024", "20 * 1024", "val_tokens is 20480, in {a} it is 10240"),
    ("16 * 2048", "24 * 2048", "bs_schedule is (16384, 49152), in {a} it is (16384, 32768)"),
    ("step / args", "2 * step / args", "first at get_lr"),
    ("norm(x)", "x", "first at GPT.forward"),
    ("import os", "import os, sys", "first at statement 1"),
    ("def get_lr(step)", "def get_lr(step", "first at"),  # no Python
])
def test_upstreams_sources_tell_configurations_apart(write, old, new, words):
    a, b = (write(f"{code}\n{BAR}\n{steps(0, 6, loss)}", name) for code, loss, name in
            ((UPSTREAM, 3.27, "a.txt"), (UPSTREAM.replace(old, new), 3.28, "b.txt")))
    assert "b.txt: " in refused(a, b) and words.format(a=a) in refused(a, b)

def test_data_are_told_apart_by_what_is_in_them(write, capsys):
    a = write(header(DATA) + steps(0, 6), "a.txt")
    elsewhere = header(DATA.replace("a_1", "b_1").replace(", ('a_2.bin', 100, 8)", ""), train_files="x/b_*.bin", val_files="y/v.bin")
    record_stats.main([a, write(elsewhere + steps(0, 6, 3.28), "b.txt")])  # names and shards that were added do not matter
    out = capsys.readouterr().out
    assert "2 runs of 6 steps" in out and "Note" not in out
    assert "b.txt: val_files is" in refused(a, write(header(DATA.replace("9)", "8)")) + steps(0, 6, 3.28), "b.txt"))
    assert "b.txt: train_files is" in refused(a, write(header(DATA.replace("8)", "9)")) + steps(0, 6, 3.28), "b.txt"))

def test_one_run_in_two_forms_counts_once(write):
    a = write(header() + steps(0, 6), "a.txt")
    for again in (header() + steps(0, 6) + header() + steps(5, 6, ms=20), header() + "\n".join(steps(0, 6).split("\n")[-2:])):
        assert "is the same run as" in refused(a, write(again, "b.txt"))

@pytest.mark.parametrize("target", ["nan", "inf", "-1", "0", "", "three"])
def test_target_must_be_a_loss(write, target, capsys):
    with pytest.raises(SystemExit):
        record_stats.main([write(steps(0, 6)), "--target", target])
    assert "--target" in capsys.readouterr().err

def test_losses_of_more_digits_stay_what_they_are(write, capsys):
    record_stats.main([write(steps(0, 6).replace("3.2700", f"3.2700{i}"), f"[{i}].txt") for i in (1, 2)])  # [ in a path is no pattern
    assert "losses = [3.270010, 3.270020]" in capsys.readouterr().out

# -----------------------------------------------------------------------------
# `| head`

def test_output_that_nobody_reads(write):
    """A reader that has gone ends a tool quietly, with what it printed until then."""
    read, out = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import command; "
                           "command.run(lambda: print('x'))"], stdout=out, stderr=subprocess.PIPE, timeout=60)
    os.close(out)
    assert (done.returncode, done.stderr) == (141, b"")
    with pytest.raises(SystemExit, match="bad"):
        command.run(lambda: sys.exit("bad"))
