"""
Is it a record? What upstream's rules ask of the logs of several runs: the mean of the final losses is at most 3.28, shown by a
one-sided t-test with p < 0.01. Reads this project's logs and upstream's, which have the same form.

    python tools/record_stats.py logs/*.txt [--target 3.28]

Prints n, mean, sample deviation, p and the times, then a snippet for the README of a folder in records/.
"""
import argparse
import ast
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import ttest_1samp

P_MAX = 0.01  # upstream's README, "Rules"
RECORD_VAL_TOKENS = "10485760"

@dataclass
class Log:
    """What a log says: losses by step; times in ms since the start of training, without validations and warm-up."""
    path: str
    num_steps: int
    val_loss: dict[int, float]
    train_loss: dict[int, float]
    time: dict[int, float]
    hyperparameters: str  # as printed; "" in upstream's logs
    devices: str  # the same

STEP = re.compile(r"^step:(\d+)/(\d+) (?:val_loss:(\S+) )?train_time:(\d+)ms step_avg:[\d.]+ms(?: train_loss:(\S+))?", re.M)

def read_log(path: str) -> Log:
    """ValueError for an empty file, one of another kind, or one of several runs. A half-written last line counts as not there."""
    text = Path(path).read_text(errors="replace")
    if not text.strip():
        raise ValueError(f"{path} is empty: a run writes logs/RUN_ID.txt, and its first lines before it compiles")
    steps = list(STEP.finditer(text))
    if not steps:
        reason = "is the log of a run that stopped before its first step" if re.search("^={100}$", text, re.M) else \
            "is no log of train_gpt_xla.py or train_gpt.py"
        raise ValueError(f"{path} {reason}: no line begins with step:N/M")
    log = Log(path, int(steps[0][2]), {}, {}, {}, *(
        (re.search(pattern, text, re.M) or [""])[0] for pattern in (r"^Hyperparameters\(.*\)$", r"(?<=^Running on )\d+ \w+ devices")))
    finals = [m for m in steps if m[3] and m[1] == m[2]]
    if len(finals) > 1 or len({m[2] for m in steps}) > 1:
        raise ValueError(f"{path} holds more than one run, as they had one run_id: give each its own --run_id, or cut the file")
    for m in steps:
        step, unfinished = int(m[1]), m.end() == len(text)  # a number at the very end may lack digits
        log.time[step] = float(m[4])
        if m[3]:
            log.val_loss[step] = float(m[3])
        if m[5] and not unfinished:
            log.train_loss[step] = float(m[5])
    return log

def fields(hyperparameters: str) -> dict:
    """Of Hyperparameters(...) as printed."""
    return {k.arg: ast.literal_eval(k.value) for k in ast.parse(hyperparameters, mode="eval").body.keywords}

def final(log: Log) -> tuple[float, float]:
    """The last loss and the time in seconds of a finished run; ValueError otherwise."""
    if log.num_steps not in log.val_loss:
        raise ValueError(f"{log.path}: the run did not finish: it ends at step {max(log.time)} of {log.num_steps} "
                         "and has no final validation; leave it out or run it again")
    loss = log.val_loss[log.num_steps]
    if not math.isfinite(loss):
        raise ValueError(f"{log.path}: the final loss is {loss}: this run diverged, and a record must count it as a failure")
    return loss, log.time[log.num_steps] / 1000

def p_value(losses: list[float], target: float) -> float:
    """How likely a mean this low is where the true mean is target: one-sided t-test. nan for one run, or for equal losses."""
    return float(ttest_1samp(losses, target, alternative="less").pvalue) if len(set(losses)) > 1 else math.nan

def spread(values: list[float]) -> str:
    deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "unknown"
    return f"mean {statistics.mean(values):.4f}, sample deviation {deviation}"

def report(logs: list[Log], target: float) -> str:
    for i, log in enumerate(logs):
        if log.num_steps != logs[0].num_steps:
            raise ValueError(f"{log.path} is a run of {log.num_steps} steps, {logs[0].path} one of {logs[0].num_steps}: "
                             "give logs of one configuration")
        for other in logs[:i]:
            if (log.time, log.val_loss) == (other.time, other.val_loss):
                raise ValueError(f"{log.path} is the same run as {other.path}: each run counts once")
    losses, times = zip(*(final(log) for log in logs))
    losses, times, p = list(losses), list(times), p_value(losses, target)
    if math.isnan(p):
        verdict = "undefined, " + ("as one run has no deviation" if len(losses) == 1 else "as the losses are all equal")
    else:
        verdict = f"p = {p:.4f}, the rule p < {P_MAX} is {'met' if p < P_MAX else 'not met'}"
    width = max(len(log.path) for log in logs)
    runs = f"{len(logs)} run{'s' * (len(logs) > 1)} of {logs[0].num_steps} steps"
    lines = [f"{log.path:{width}}  val_loss {loss:.4f}  time {time:.3f} s" for log, loss, time in zip(logs, losses, times)]
    lines += ["", runs,
              f"losses: {spread(losses)}",
              f"t-test that the mean is below {target:g}: {verdict}",
              f"times:  {spread(times)}, median {statistics.median(times):.4f} s"]
    for log in logs:
        data = dict(re.findall(r"\b(val_files|val_tokens)='?([^,']*)", log.hyperparameters))
        if data and (data["val_tokens"] != RECORD_VAL_TOKENS or "fineweb_val" not in data["val_files"]):
            lines += [f"Note: validated on {data['val_tokens']} tokens of {data['val_files']}, so the losses compare with no record's"]
            break
    number = lambda values, digits: "[" + ", ".join(f"{x:.{digits}f}" for x in values) + "]"
    devices = sorted({log.devices for log in logs} - {""})
    lines += ["", "--- for records/NAME/README.md ---", "### Timing and validation",
              runs + (f" on {', '.join(devices)}" if devices else "") + ":",
              "```python", "import statistics", "from scipy.stats import ttest_1samp", "",
              f"losses = {number(losses, 4)}", f"times = {number(times, 3)}  # seconds", ""]
    if not math.isnan(p):
        lines += [f'print("p=%.4f" % ttest_1samp(losses, {target:g}, alternative="less").pvalue)', f"# p={p:.4f}"]
    for name, values in dict(losses=losses, times=times).items():
        if len(values) > 1:
            lines += [f'print("{name}: %.4f %.4f" % (statistics.mean({name}), statistics.stdev({name})))',
                      f"# {name}: {statistics.mean(values):.4f} {statistics.stdev(values):.4f}"]
    return "\n".join(lines + ["```"])

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG")
    parser.add_argument("--target", type=float, default=3.28, help="the loss to be at most (3.28)")
    args = parser.parse_args(argv)
    try:
        print(report([read_log(path) for path in args.logs], args.target))
    except (ValueError, OSError) as e:
        sys.exit(f"record_stats.py: {e}")

if __name__ == "__main__":
    main()
