"""
The one reader of logs: this project's, and every form that upstream's scripts have written. It says what a run was and how it went, and
whether two logs, or a log and a checkpoint, belong together. Without torch, which takes seconds to import.

A log holds one run, but maybe several starts of it: one that failed, some that went on from a checkpoint, a finished run given again. In
some of upstream's, one start makes several runs, a seed each. A line of a step is this, with train_loss where that was read; times are in
ms or s; step_avg is nan until the clock starts, which upstream's older scripts did after ten steps:

    step:250/1775 val_loss:4.6062 train_time:7001ms step_avg:28.00ms
"""
import ast
import contextlib
import functools
import json
import math
import operator
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

# Hyperparameters that are about watching a run and not about its outcome: those that train_gpt_xla.hyperparameters leaves out
WATCHING = {"run_id", "train_files", "val_files", "train_loss_every", "save_checkpoint", "save_every", "keep_checkpoints"}
# What may differ between runs of one configuration. The data may not, but its path may (`same`)
MAY_DIFFER = WATCHING - {"train_files", "val_files"} | {"seed", "val_loss_every"}
VALIDATION = {"val_files", "val_tokens", "vocab_size"}  # what validation losses are losses of

SERIES = ("val_loss", "train_loss", "time", "step_avg")
BAR = "=" * 100

@dataclass
class Log:
    """
    A run. By step: losses; ms since the start of training, without validations and warm-up; ms a step. What the log lacks is empty:
    times from before the clock starts, and in upstream's logs all that stands after `last`, but for the source.
    """
    path: str
    num_steps: int = 0
    val_loss: dict[int, float] = field(default_factory=dict)
    train_loss: dict[int, float] = field(default_factory=dict)
    time: dict[int, float] = field(default_factory=dict)
    step_avg: dict[int, float] = field(default_factory=dict)
    first: int | None = None  # the steps of its first and last line
    last: int | None = None
    same_start: bool = False  # as the run before it in this log
    hyperparameters: dict = field(default_factory=dict)
    data: dict[str, list] = field(default_factory=dict)  # train_files, val_files: for each shard its name, and what tells it from others
    devices: str = ""
    init_from: str = ""
    codes: list[str] = field(default_factory=list)  # sources above the steps: one, or more where a changed script went on

    @property
    def finished(self) -> bool:
        return self.num_steps in self.val_loss

# -----------------------------------------------------------------------------
# Reading

def read_text(path: str) -> str:
    """Of a file in UTF-8, 16 or 32, with a byte-order mark or without; replacement characters where it is none of these."""
    content = Path(path).read_bytes()
    return content.decode(json.detect_encoding(content), "replace").replace("\r\n", "\n").replace("\r", "\n")

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv}

def value_of(node: ast.expr):
    """Of literals, sums, products and tuples of them, and paths below a folder that only the machine knew; the text of anything else."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.path.join" and node.args:
        return value_of(node.args[-1])
    if isinstance(node, ast.Tuple):
        return tuple(map(value_of, node.elts))
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        sides = value_of(node.left), value_of(node.right)
        if all(isinstance(x, (int, float)) for x in sides) and sides[1]:
            return ARITHMETIC[type(node.op)](*sides)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ast.unparse(node)

def number(text: str) -> float:
    """In ms, if there is a unit of time."""
    return float(re.sub(r"m?s$", "", text)) * (1000 if re.search(r"\ds$", text) else 1)

@contextlib.contextmanager
def at(path: str, i: int):
    """ValueError names the line."""
    try:
        yield
    except (ValueError, SyntaxError) as e:
        raise ValueError(f"{path}:{i}: cannot be read ({getattr(e, 'msg', e)}): damaged, or of a form that is not known; cut that line "
                         "out") from None

def read_header(path: str, lines: list[str], i: int) -> Log:
    """What stands above the steps of a start, from line i of the file on."""
    log = Log(path)
    printed = [k for k, line in enumerate(lines) if re.fullmatch(r"Hyperparameters\(.*\)", line)]
    bars = [k for k, line in enumerate(lines) if line == BAR and not (printed and k > printed[-1])]
    # the header begins at the last bar above the last hyperparameters: starts that failed may stand before it
    opening = len(bars) - 1 if printed else 1 if bars[:1] == [0] else 0  # upstream's first scripts drew one above the source, too
    begin, end = ([-1, *bars][opening], bars[opening]) if bars[opening:] else (-1, 0)
    code = lines[begin + 1:end]
    above = [k for k, line in enumerate(code) if re.match(r"logs/.*\.txt$|peak memory allocated: ", line)]
    code = "\n".join(code[above[-1] + 1 if above else 0:]).strip()
    log.codes = [code] if code else []  # who goes on with the same source does not print it again
    for k, line in enumerate(lines[end:], i + end):
        with at(path, k):
            if re.fullmatch(r"Hyperparameters\(.*\)", line):
                log.hyperparameters = {x.arg: value_of(x.value) for x in ast.parse(line, mode="eval").body.keywords}
            elif match := re.match(r"Running on (\d+ \w+ devices)", line):
                log.devices = match[1]
            elif match := re.match(r"starting with the weights of (.+)", line):
                log.init_from = match[1]
            elif match := re.fullmatch(r"data: (\{.*\})", line):
                log.data = ast.literal_eval(match[1])
    return log

def read_starts(path: str, text: str) -> list[Log]:
    """Each start of the script, in order. One without steps counts if it got as far as a header."""
    lines = text.split("\n")
    if lines[-1]:  # half written: a number at the very end may lack digits
        whole = re.match(r"step:.*?\bstep_avg:\s*\S+?ms", lines[-1])
        lines[-1] = whole[0] if whole else ""
    found, above, last = [], [], None  # last: what the line of a step before this one was, None at the first below a header
    for i, line in enumerate(lines, 1):
        match = re.match(r"step:(\d+)/(\d+) (.*)", line)
        values = dict(re.findall(r"(\w+):\s*(\S+)", match[3])) if match else {}
        if not {"train_time", "step_avg"} <= values.keys():
            above.append(line)
            last = None if line == BAR else last
            continue
        step, this = int(match[1]), (int(match[1]), "val_loss" in values)
        if last is None:
            found.append(read_header(path, above, i - len(above)))
        elif this <= last:  # no header, but it starts over
            found.append(replace(found[-1], first=None, same_start=True, **{name: {} for name in SERIES}))
        above, last, log = [], this, found[-1]
        log.num_steps, log.first, log.last = int(match[2]), step if log.first is None else log.first, step
        with at(path, i):
            for name in ("val_loss", "train_loss") & values.keys():
                getattr(log, name)[step] = number(values[name])
            time, step_avg = number(values["train_time"]), number(values["step_avg"])
        if math.isfinite(time + step_avg):
            log.time[step], log.step_avg[step] = time, step_avg
        elif step == 0:
            log.time[0] = 0.0
    if any(line == BAR or line.startswith("Hyperparameters(") for line in above):
        found.append(read_header(path, above, len(lines) + 1 - len(above)))
    return found

def go_on(before: Log, part: Log) -> Log:
    """The run of a start that went on from a checkpoint of the one before."""
    series = {name: {s: x for s, x in getattr(before, name).items() if s < part.first} | getattr(part, name) for name in SERIES}
    devices = [*dict.fromkeys(x for x in (*before.devices.split(", then "), part.devices) if x)]
    return replace(part, **series, first=before.first, devices=", then ".join(devices), init_from=before.init_from or part.init_from,
                   codes=[*dict.fromkeys(before.codes + part.codes)])

def read_runs(path: str, started: bool = True) -> list[Log]:
    """
    The runs in a log: those that finished or, if none did, the last. ValueError for an empty file, one of another kind and, unless started
    is False, one without a step. A half-written last line counts as not there.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty: a run writes logs/RUN_ID.txt, and its first lines before it compiles")
    starts, runs = read_starts(path, text), []
    for run in starts:
        if run.first is None:
            continue
        before = runs[-1] if runs else None
        if before and run.first > 1 and run.num_steps == before.num_steps and not first_difference(before, run, WATCHING):
            if before.finished and all(before.val_loss.get(s, loss) == loss for s, loss in run.val_loss.items()):
                continue  # a finished run given again: its end counts once
            if not before.finished:
                runs.pop()
            run = go_on(before, run)
        runs.append(run)
    finished = [run for run in runs if run.finished]
    if finished and not runs[-1].finished:
        print(f"{path}: left out a later start, which ends at step {runs[-1].last} of {runs[-1].num_steps}", file=sys.stderr)
    if runs or starts and not started:
        return finished or (runs or starts)[-1:]
    for i, line in reversed([*enumerate(text.split("\n")[:-1], 1)]):
        if line == BAR:
            break
        if re.search(r"step:\s*\d+/\d+\s", line):
            raise ValueError(f"{path}:{i}: a step's line that does not read, from its beginning, step:N/M ... train_time:Tms step_avg:Tms: "
                             f"{line.strip()[:100]!r}")
    if starts:
        raise ValueError(f"{path} is the log of a run that stopped before its first step: no line begins with step:N/M")
    llm_c = " (s:N tel:LOSS is llm.c's, which has no times and not the number of steps)" if re.search(r"^s:\d+ tel:", text, re.M) else ""
    raise ValueError(f"{path} is no log of train_gpt_xla.py or train_gpt.py: no line begins with step:N/M{llm_c}")

def only(runs: list[Log]) -> Log:
    """ValueError if there is more than one."""
    if len(runs) > 1:
        ends = ", ".join(f"{run.val_loss[run.num_steps]:.4f}" for run in runs[:3]) + ", ..." * (len(runs) > 3)
        raise ValueError(f"{runs[0].path} holds more than one run ({len(runs)} finished, with losses of {ends}): give each its own "
                         "--run_id, or cut the file")
    return runs[0]

def read_log(path: str) -> Log:
    """The run in a log. ValueError as by read_runs, or if it holds several."""
    return only(read_runs(path))

def read_logs(paths: list[str]) -> list[Log]:
    """The run in each log, or the runs where one start made several. ValueError as by read_log."""
    logs = []
    for path in paths:
        runs = read_runs(path)
        loop = len(runs) > 1 and all(run.same_start and run.first < 2 for run in runs[1:])
        logs += [replace(run, path=f"{path}, run {i}") for i, run in enumerate(runs, 1)] if loop else [only(runs)]
    return logs

# -----------------------------------------------------------------------------
# What belongs together

def parse(code: str) -> list[ast.stmt]:
    """Of a source, or of several as upstream prints them, with their names between. Nothing where it is not this Python's."""
    try:
        return [statement for file in re.split(r"^-{40}\n# \S+\.py\n-{40}$", code, flags=re.M) for statement in ast.parse(file).body]
    except (SyntaxError, ValueError, RecursionError):
        return []

def name_of(node: ast.stmt) -> str:
    """What a statement defines or assigns to; "" for others."""
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return ast.unparse(targets[0]) if targets[0] is not None else getattr(node, "name", "")

@functools.cache
def definitions(code: str) -> dict[str, str]:
    """A source's statements by name, those of classes one by one, without comments, docstrings, seeds and what MAY_DIFFER; or its lines."""
    found = {}
    def add(body: list[ast.stmt], prefix: str):
        for i, node in enumerate(body, 1):
            name = name_of(node) or f"statement {i}"
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{prefix}{name}.")
                node.body = []
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner) is not None:
                    del inner.body[0]
            is_string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not is_string and name not in MAY_DIFFER and "seed" not in name.lower():
                found[prefix + name] = found.get(prefix + name, "") + ast.dump(node)
    add(parse(code), "")
    return found or {f"line {i}": line for i, line in enumerate(code.split("\n"), 1)}

# Hyperparameters of train_gpt_xla.py that are arguments in upstream's sources: of each TrainingStage, and of TrainingSchedule
OF_STAGE = dict(train_bs_schedule=lambda stage: stage["batch_size"], train_max_seq_len_schedule=lambda stage: stage["train_max_seq_len"],
                ws_short_schedule=lambda stage: stage["window_sizes"][0], ws_long_schedule=lambda stage: stage["window_sizes"][1])
OF_SCHEDULE = dict(cooldown_frac="cooldown_frac", ws_validate_post_yarn_ext="ws_post_yarn_ext")

@functools.cache
def source_stages(code: str) -> list[dict]:
    """The arguments of each TrainingStage in TRAINING_STAGES, by name; none where a source has no such list, or one of another form."""
    found = [node.value for node in parse(code) if name_of(node) == "TRAINING_STAGES"]
    calls = found[0].elts if len(found) == 1 and isinstance(found[0], ast.List) else []
    if not all(isinstance(call, ast.Call) and not call.args for call in calls):
        return []
    return [{x.arg: value_of(x.value) for x in call.keywords} for call in calls]

def schedule_arguments(code: str) -> dict:
    """Of the one call of TrainingSchedule: what it passes by name, and else the defaults."""
    body = parse(code)
    calls = [x for node in body for x in ast.walk(node) if isinstance(x, ast.Call) and ast.unparse(x.func) == "TrainingSchedule"]
    if len(calls) != 1 or len(calls[0].args) > 3:  # the stages and the numbers of steps
        return {}
    found = {}
    for node in (x for y in body if name_of(y) == "TrainingSchedule" and isinstance(y, ast.ClassDef) for x in y.body):
        if name_of(node) == "__init__":
            found = {x.arg: value_of(default) for x, default in zip(reversed(node.args.args), reversed(node.args.defaults))}
    return found | {x.arg: value_of(x.value) for x in calls[0].keywords}

@functools.cache
def source_hyperparameters(code: str) -> dict:
    """What a source says itself: in class Hyperparameters and, where it has stages, in these and their schedule."""
    found = {name_of(x): value_of(x.value) for node in parse(code) if name_of(node) == "Hyperparameters" and isinstance(node, ast.ClassDef)
             for x in node.body if getattr(x, "value", None) is not None and not isinstance(x, ast.Expr)}
    found.pop("data_path", None)  # a folder that only the machine knew
    if stages := source_stages(code):
        for name, get in OF_STAGE.items():
            with contextlib.suppress(KeyError, IndexError, TypeError):  # other stages than record #89's
                values = tuple(map(get, stages))
                found |= {name: values} if all(type(x) is int for x in values) else {}
        arguments = schedule_arguments(code)
        found |= {name: arguments[x] for name, x in OF_SCHEDULE.items() if isinstance(arguments.get(x), (int, float))}
    return found

def configuration(log: Log) -> dict:
    """The hyperparameters that a log prints or, in upstream's, those that the source says with which it begins."""
    return log.hyperparameters or (source_hyperparameters(log.codes[-1]) if log.codes else {})

def same_shards(ours: list, theirs: list) -> bool:
    """Whether they have the same content, as far as both have so many; their names do not matter."""
    return all(x[1:] == y[1:] for x, y in zip(ours, theirs))

def same(name: str, a: Log, b: Log) -> bool:
    """
    Whether a hyperparameter is the same in both. Of data files the contents count, as far as both have so many shards; if a log does not
    list them, their folder and name.
    """
    ours, theirs = configuration(a).get(name), configuration(b).get(name)
    if name not in ("train_files", "val_files"):
        return ours == theirs
    if a.data.get(name) and b.data.get(name):
        return same_shards(a.data[name], b.data[name])
    return Path(str(ours)).parts[-2:] == Path(str(theirs)).parts[-2:]

def first_difference(a: Log, b: Log, ignored: set[str]) -> str | None:
    """The first hyperparameter that differs, in words. None where a log has none at all."""
    ours, theirs = configuration(a), configuration(b)
    for name in (*ours, *theirs) if ours and theirs else ():
        if name not in ignored and not same(name, a, b):
            return f"{b.path}: {name} is {theirs.get(name, 'unknown')}, in {a.path} it is {ours.get(name, 'unknown')}"
    return None

def taken_for_same(a: Log, b: Log) -> str | None:
    """Of data files in other folders, which only their names show to be the same, a remark."""
    for name in ("train_files", "val_files"):
        ours, theirs = configuration(a).get(name), configuration(b).get(name)
        if ours != theirs and not (a.data.get(name) and b.data.get(name)):
            return f"{b.path}: {name} is {theirs}, in {a.path} {ours}: taken for the same, as not both logs list what is in them"
    return None

def difference(a: Log, b: Log) -> str | None:
    """The first thing by which two runs are not of one configuration, in words. What a log does not say is not looked at."""
    if a.num_steps != b.num_steps:
        return f"{b.path} is a run of {b.num_steps} steps, {a.path} one of {a.num_steps}"
    if bool(a.hyperparameters) != bool(b.hyperparameters):
        with_them, without = (a.path, b.path) if a.hyperparameters else (b.path, a.path)
        return f"{with_them} prints its hyperparameters, {without} does not: they are of different scripts"
    if found := first_difference(a, b, MAY_DIFFER):
        return found
    for name in ("init_from", "devices"):
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs and (name == "init_from" or ours and theirs):
            return f"{b.path}: {name} is {theirs or 'nothing'}, in {a.path} it is {ours or 'nothing'}"
    if a.codes and b.codes and a.codes[-1] != b.codes[-1]:
        ours, theirs = definitions(a.codes[-1]), definitions(b.codes[-1])
        for name in (*ours, *theirs):
            if ours.get(name) != theirs.get(name):
                return f"{b.path}: its source differs from that in {a.path}, first at {name}"
    return None

def validation_difference(a: Log, b: Log) -> str | None:
    """The first thing by which the losses of two runs do not compare, in words. What one log does not say is not looked at."""
    ours, theirs = configuration(a).keys(), configuration(b).keys()
    return first_difference(a, b, (ours | theirs) - (ours & theirs & VALIDATION))

def why_not(log: Log, checkpoint: dict, sizes: dict[str, int]) -> str | None:
    """
    Why it cannot be that the run of this log had these weights, in words; None if it can. checkpoint: as torch.save wrote it; sizes: the
    hyperparameters that its tensors tell, of the vocabulary the multiple of 128 that its tables have.
    """
    theirs = checkpoint.get("hyperparameters", {}) | {k: x for k, x in checkpoint.items() if k == "run_id"} | sizes
    for name, value in log.hyperparameters.items():
        padded = -(-value // 128) * 128 if name == "vocab_size" and isinstance(value, int) else value
        if name in theirs.keys() - (WATCHING - {"run_id"}) and theirs[name] not in (value, padded):
            return f"{name} is {value} there, {theirs[name]} in the checkpoint"
    for name, shards in log.data.items():
        if not same_shards(shards, checkpoint.get("data", {}).get(name, shards)):
            return f"the shards of {name} are others there than the checkpoint's"
    code = (checkpoint.get("code") or "").strip()
    if code and log.codes and code not in log.codes:
        return "it begins with another source than the checkpoint's"
    if log.last is not None and checkpoint.get("step", 0) > log.last:
        return f"it ends at step {log.last}, the checkpoint is from step {checkpoint['step']}"
    return None
