"""
Is it a record? What upstream's rules ask of the logs of several runs: the mean of the final losses is at most 3.28, shown by a
one-sided t-test with p < 0.01. Reads this project's logs and upstream's. Runs must be of one configuration, but for seeds and paths.

    python tools/record_stats.py logs/*.txt [--target 3.28]

Prints n, mean, sample deviation, p and the times, then a snippet for the README of a folder in records/.
"""
import argparse
import math
import statistics
import sys

import command
from run_log import Log, configuration, difference, read_logs, taken_for_same
from run_log import read_log as read_log  # a name of this module, too
from scipy.stats import ttest_1samp

P_MAX = 0.01  # upstream's README, "Rules"
RECORD_VAL_TOKENS = 10485760

def final(log: Log) -> tuple[float, float]:
    """The last loss and the time in seconds of a finished run; ValueError otherwise."""
    if not log.finished:
        raise ValueError(f"{log.path}: the run did not finish: it ends at step {log.last} of {log.num_steps} "
                         "and has no final validation; leave it out or run it again")
    loss = log.val_loss[log.num_steps]
    if not math.isfinite(loss):
        raise ValueError(f"{log.path}: the final loss is {loss}: this run diverged, and a record must count it as a failure")
    if log.num_steps not in log.time:
        raise ValueError(f"{log.path}: its last line has no time (train_time or step_avg is nan): the run ended before its clock started")
    return loss, log.time[log.num_steps] / 1000

def same_run(a: Log, b: Log) -> bool:
    """Losses and times are the same wherever both have them."""
    common = a.val_loss.keys() & b.val_loss.keys()
    return all((a.val_loss[s], a.time.get(s)) == (b.val_loss[s], b.time.get(s)) for s in common) and len(common) > 0

def p_value(losses: list[float], target: float) -> float:
    """How likely a mean this low is where the true mean is target: one-sided t-test. nan for one run, or for equal losses."""
    return float(ttest_1samp(losses, target, alternative="less").pvalue) if len(set(losses)) > 1 else math.nan

def spread(values: list[float]) -> str:
    deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "unknown"
    return f"mean {statistics.mean(values):.4f}, sample deviation {deviation}"

def report(logs: list[Log], target: float) -> str:
    validation = dict(val_tokens=RECORD_VAL_TOKENS, val_files="fineweb_val") | configuration(logs[0])
    notes = []
    if validation["val_tokens"] != RECORD_VAL_TOKENS or "fineweb_val" not in validation["val_files"]:
        notes += [f"validated on {validation['val_tokens']} tokens of {validation['val_files']}, so the losses compare with no record's"]
    for i, log in enumerate(logs):
        for other in logs[:i]:
            if found := difference(other, log):
                raise ValueError(f"{found}: give logs of one configuration")
            if same_run(other, log):
                raise ValueError(f"{log.path} is the same run as {other.path}: each run counts once")
            seed = log.hyperparameters.get("seed")
            if seed is not None and seed == other.hyperparameters.get("seed") and other.val_loss == log.val_loss:
                notes += [f"{log.path} has the seed and the losses of {other.path}, so it is no further sample"]
        if i and (remark := taken_for_same(logs[0], log)):
            notes += [remark]
        if len(logs) > 1 and not configuration(log) and not log.codes:
            notes += [f"{log.path} has neither hyperparameters nor a source, so whether it is of the same configuration is not known"]
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
    lines += [f"Note: {note}" for note in notes]
    digits = 4 if losses == [round(x, 4) for x in losses] else 6
    number = lambda values, digits: "[" + ", ".join(f"{x:.{digits}f}" for x in values) + "]"
    devices = {log.devices for log in logs} - {""}
    lines += ["", "--- for records/NAME/README.md ---", "### Timing and validation",
              runs + (f" on {', '.join(devices)}" if devices else "") + ":",
              "```python", "import statistics", "from scipy.stats import ttest_1samp", "",
              f"losses = {number(losses, digits)}", f"times = {number(times, 3)}  # seconds", ""]
    if not math.isnan(p):
        lines += [f'print("p=%.4f" % ttest_1samp(losses, {target:g}, alternative="less").pvalue)', f"# p={p:.4f}"]
    for name, values in dict(losses=losses, times=times).items():
        if len(values) > 1:
            lines += [f'print("{name}: %.4f %.4f" % (statistics.mean({name}), statistics.stdev({name})))',
                      f"# {name}: {statistics.mean(values):.4f} {statistics.stdev(values):.4f}"]
    return "\n".join(lines + ["```"])

def target_loss(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG")
    parser.add_argument("--target", type=target_loss, default=3.28, help="the loss to be at most (3.28)")
    args = parser.parse_args(argv)
    try:
        lines = report(read_logs(args.logs), args.target)
    except (ValueError, OSError) as e:
        sys.exit(f"record_stats.py: {e}")
    print(lines)

if __name__ == "__main__":
    command.run(main)
