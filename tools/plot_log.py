"""
Draws runs from their logs: training and validation loss against step and against time, with the changes of batch size and window. Reads
upstream's logs too. Several runs in one picture look like samples of one thing, so they must be of one configuration; --compare draws
others, too, and says what differs.

    python tools/plot_log.py logs/*.txt -o runs.png [--compare]
"""
import argparse
import math
import os
import re
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # draws into files; a notebook's own backend, which its commands inherit, is not installed here
import command
import matplotlib.pyplot as plt
from run_log import (
    MAY_DIFFER,
    OF_STAGE,
    Log,
    configuration,
    difference,
    read_logs,
    same,
    source_stages,
    taken_for_same,
    validation_difference,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("PJRT_DEVICE", "CPU")  # reading a log must not take a TPU
import train_gpt_xla as port


def hyperparameters(log: Log) -> port.Hyperparameters | None:
    """With the schedule that the log says, if it is one that this script can have: as many stages, as long. None otherwise."""
    needed = {"num_scheduled_iterations", "num_extension_iterations", *OF_STAGE}
    known = {name: value for name, value in configuration(log).items() if name in needed | {"block_size"}}
    lasts = [stage.duration for stage in port.TRAINING_STAGES]
    if needed - known.keys() or any(not isinstance(known[name], tuple) or len(known[name]) != len(lasts) for name in OF_STAGE):
        return None
    theirs = [stage.get("duration") for stage in source_stages(log.codes[-1])] if log.codes else []
    args = port.Hyperparameters(**known)
    return args if theirs in ([], lasts) and args.num_iterations == log.num_steps else None

def stages(args: port.Hyperparameters) -> dict[int, str]:
    """The steps at which batch size or windows change, from step 0 on, and what they are from there."""
    found, before, schedule = {}, None, port.TrainingSchedule(args)
    for step in range(args.num_iterations):
        stage, _ = schedule.lookup(step)
        now = stage.batch_size, stage.window_sizes
        if now != before:
            found[step] = f"{now[0]:,} tokens\nwindows {now[1][0] * args.block_size}, {now[1][1] * args.block_size}"
        before = now
    return found

def check(logs: list[Log], compare: bool):
    """ValueError where losses do not compare or, unless that is the point, where the configurations differ. Says how they do."""
    for i, log in enumerate(logs):
        for other in logs[:i]:
            if found := validation_difference(other, log):
                raise ValueError(f"{found}: losses on other validation data do not compare")
            if (found := difference(other, log)) and not compare:
                raise ValueError(f"{found}: give logs of one configuration, or --compare")
        if i and (found := difference(logs[0], log) or taken_for_same(logs[0], log)):
            print(found)

def labels(logs: list[Log]) -> list[str]:
    """Of each run: its name, or of a run_id by chance the first digits, and the first hyperparameters in which not all runs are alike."""
    common = [name for name in configuration(logs[0]) if name not in MAY_DIFFER and all(name in configuration(log) for log in logs)]
    unlike = [name for name in common if not all(same(name, logs[0], log) for log in logs)][:3]
    name = lambda log: re.sub(r"^([0-9a-f]{8})(-[0-9a-f]+){4}$", r"\1", Path(log.path).stem)
    return [", ".join([name(log), *(f"{x}={configuration(log)[x]}" for x in unlike)]) for log in logs]

def draw(logs: list[Log], path: str):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    runs = [hyperparameters(log) for log in logs]
    for i, (log, name) in enumerate(zip(logs, labels(logs))):
        seconds = {step: ms / 1000 for step, ms in log.time.items()}
        losses = [{s: x for s, x in series.items() if math.isfinite(x)} for series in (log.val_loss, log.train_loss)]
        last = [f": {loss:.4f}" for loss in log.val_loss.values()][-1:] or [""]
        for ax, x in zip(axes, ({s: s for s in [*log.val_loss, *log.train_loss]}, seconds)):
            val_loss, train_loss = ({s: y for s, y in series.items() if s in x} for series in losses)
            ax.plot([x[s] for s in val_loss], list(val_loss.values()), "o-", ms=4, color=f"C{i}", label=name + last[0])
            ax.plot([x[s] for s in train_loss], list(train_loss.values()), lw=1, alpha=0.6, color=f"C{i}",
                    marker="." if len(train_loss) < 20 else "", label="training, all its targets" if not i and train_loss else None)
    if runs[0] is not None and all(args is not None and stages(args) == stages(runs[0]) for args in runs):
        for step, text in stages(runs[0]).items():
            if step:
                axes[0].axvline(step, color="gray", lw=0.8, ls=":")
            end = min([s for s in stages(runs[0]) if s > step], default=runs[0].num_iterations)
            if end - step > runs[0].num_iterations / 6:  # no room over a shorter one
                axes[0].text((step + end) / 2, 0.99, text, transform=axes[0].get_xaxis_transform(), ha="center", va="top", fontsize=7,
                             color="dimgray")
            for i, log in enumerate(logs):
                if step in log.time and step:
                    axes[1].axvline(log.time[step] / 1000, color=f"C{i}", lw=0.8, ls=":")
    axes[0].set(xlabel="step", ylabel="loss", yscale="log")
    axes[1].set(xlabel="training time, seconds")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high * (high / low) ** 0.12)  # room for the stages' text
    for ax in axes:
        ax.grid(alpha=0.25, which="both")
        ax.tick_params(which="both", labelsize=8)
    axes[0].legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.87), title="validation: last loss", title_fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.png", help="or .svg or .pdf")
    parser.add_argument("--compare", action="store_true", help="the runs may be of different configurations")
    args = parser.parse_args(argv)
    try:
        if not Path(args.output).absolute().parent.is_dir():
            raise ValueError(f"there is no folder {Path(args.output).parent} for {args.output}")
        logs = read_logs(args.logs)
        check(logs, args.compare)
        draw(logs, args.output)
    except (ValueError, OSError) as e:
        sys.exit(f"plot_log.py: {e}")
    print(f"written: {args.output}")

if __name__ == "__main__":
    command.run(main)
