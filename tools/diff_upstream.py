"""
Record #89 and this port, side by side: every definition of upstream's train_gpt.py and its two files of kernels beside its counterpart
here, in upstream's order, with what became of it (same, differs, replaced, dropped) and why.

    git clone https://github.com/KellerJordan/modded-nanogpt ../modded-nanogpt
    git -C ../modded-nanogpt checkout f411b3d3
    FILES=$(echo ../modded-nanogpt/{train_gpt,triton_kernels,dc_triton_kernels}.py)
    python tools/diff_upstream.py $FILES --html diff.html    # one page, two columns
    python tools/diff_upstream.py $FILES --name GPT.forward  # one definition, in the terminal

A log of upstream's, which begins with all of its source, or /dev/stdin will do in place of the files. What belongs to what is written
down in upstream_map.json, by name: [status, counterpart where it has another name, why, hash, lines]. The hash is of the definition's
syntax, so comments, docstrings and layout may change; where anything else does, in this or another record, the definition is told as
changed. The reasons D1, D2, ... are DIFFERENCES.md's.

To move the map to another record: write its commit into the map, and a line [status, counterpart, why] for each new definition. Then
--update_map fills in hashes and lines, or says which definitions are missing or gone.
"""
import argparse
import ast
import difflib
import functools
import hashlib
import html
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from run_log import read_text

ROOT = Path(__file__).resolve().parent.parent
FILES = ("train_gpt_xla.py", "muon_xla.py", "gradients.py", "spmd.py", "kernels", "replay.py", "vocabulary.py")  # a folder: its .py files

class Entry(NamedTuple):
    """What became of one definition of upstream's."""
    status: str
    counterpart: str  # names here, where they are not upstream's, or not only
    why: str
    hash: str = ""
    lines: int = 0

MAP_FILE = ROOT / "tools" / "upstream_map.json"
MAP = json.loads(MAP_FILE.read_text(encoding="utf-8"))
TABLE = {name: Entry(*row) for name, row in MAP["definitions"].items()}
RECORD, COMMIT = MAP["record"], MAP["commit"]
GET = (f"'git clone https://github.com/KellerJordan/modded-nanogpt', then in it 'git checkout {COMMIT}', and give train_gpt.py, "
       "triton_kernels.py and dc_triton_kernels.py; a log of that record will do too")
STATUSES = dict(same="computes the same, in these or other words", differs="differs as the numbered reason says",
                replaced="done elsewhere, or by other means", dropped="has no counterpart",
                changed=f"not as in record {RECORD}, so what the map says of it may not hold", unknown=f"not in record {RECORD}",
                gone=f"in record {RECORD}, but not in this file", new="exists only here")
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
HEAD = "imports"  # the lines down to the last import above the first function or class, and every other import

# -----------------------------------------------------------------------------
# The two sources

class Definition(NamedTuple):
    start: int  # lines [start, stop), from 0
    stop: int
    hash: str

def syntax(node) -> str:
    """A node of the syntax tree, the same in each version of Python: no layout, no comments, no docstrings."""
    if isinstance(node, list):
        return f"[{','.join(map(syntax, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    found = dict(ast.iter_fields(node))
    if isinstance(node, FUNCTION | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
        found["body"] = node.body[1:]
    return f"{type(node).__name__}({','.join(f'{k}={syntax(v)}' for k, v in found.items() if v not in (None, []))})"

@functools.cache
def definitions(text: str) -> dict[str, Definition]:
    """
    Classes, methods, functions and module-level assignments of a source, in order, after its HEAD.
    Comments above belong to what follows; a class ends where its first method begins; statements that define nothing belong to
    the definition before them, the head of a loop to the one after it. A name that is assigned again goes on where it began.
    Each statement is in the hash of one definition, so nothing can change unseen.
    """
    module = ast.parse(text)
    body = module.body
    spans, said, heads = {}, {HEAD: []}, []
    stop, last = 0, HEAD
    def add(name, end, *nodes):
        nonlocal stop, last
        start, _ = spans.get(name, (stop, 0))
        spans[name] = start, end
        said.setdefault(name, []).extend([*heads, *map(syntax, nodes)])
        heads.clear()
        stop, last = end, name
    def walk(body, prefix=""):
        nonlocal stop
        for node in body:
            if isinstance(node, FUNCTION):
                decorators = f" ({ast.unparse(node.decorator_list[0])})" if node.name == "_" and node.decorator_list else ""
                add(prefix + node.name + decorators, node.end_lineno, node)
            elif isinstance(node, ast.ClassDef):
                methods = [x for x in node.body if isinstance(x, FUNCTION)]
                rest = ast.ClassDef(**{**dict(ast.iter_fields(node)), "body": [x for x in node.body if x not in methods]})
                add(node.name, node.body[node.body.index(methods[0]) - 1].end_lineno if methods and methods[0] is not node.body[0]
                    else node.lineno if methods else node.end_lineno, rest)
                walk(methods, f"{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    add(ast.unparse(target), node.end_lineno, node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                said[HEAD].append(syntax(node))
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                pass  # the docstring of a file of kernels
            elif isinstance(node, ast.If | ast.For | ast.While | ast.With):
                blocks = [node.body, getattr(node, "orelse", [])]
                heads.append(syntax(type(node)(**{**dict(ast.iter_fields(node)), "body": [], "orelse": []})))
                for block in blocks:
                    walk(block)
                    heads.append("end")
            else:
                said[last].extend([*heads, syntax(node)])
                heads.clear()
            if last != HEAD and node.end_lineno > stop:
                spans[last] = spans[last][0], node.end_lineno
                stop = node.end_lineno
    walk(body)
    said[last] += heads
    above = itertools.takewhile(lambda node: not isinstance(node, FUNCTION | ast.ClassDef), body)
    imports = [node.end_lineno for node in above if isinstance(node, ast.Import | ast.ImportFrom)]
    spans = {HEAD: (0, imports[-1] if imports else 0), **spans}
    return {name: Definition(*span, hashlib.sha256("\n".join(said[name]).encode()).hexdigest()[:8]) for name, span in spans.items()}

@dataclass
class Ours:
    """A definition of this project."""
    name: str
    file: str
    start: int  # of its lines, from 0
    lines: list[str]

def read_ours() -> dict[str, Ours]:
    """
    All definitions of this project by name, in the order of FILES, and the first file's HEAD. Of a name that several files have, the
    one in a folder goes by "FILE:NAME".
    """
    everything = []
    for path in (path for file in FILES for path in (sorted((ROOT / file).rglob("*.py")) if (ROOT / file).is_dir() else [ROOT / file])):
        text = path.read_text(encoding="utf-8")
        lines, spans = text.splitlines(), definitions(text)
        for name, (start, stop, _) in spans.items():
            start = max(start, spans[HEAD].stop) if name != HEAD else 0
            while start < stop and not lines[start].strip():
                start += 1
            if stop > start and (name != HEAD or not everything):
                everything.append(Ours(name, path.relative_to(ROOT).as_posix(), start, lines[start:stop]))
    files = Counter(x.name for x in everything)
    found = {}
    for x in everything:
        if files[x.name] > 1 and ("/" in x.file or x.name in found):
            x.name = f"{x.file}:{x.name}"
        found[x.name] = x
    return found

def reasons() -> dict[str, list[str]]:
    """The table of DIFFERENCES.md: "D1" -> [what the CUDA record has, what is here, why]."""
    rows = re.findall(r"^\| (D\d+) \| (.*) \| (.*) \| (.*) \|$", (ROOT / "DIFFERENCES.md").read_text(encoding="utf-8"), re.M)
    return {number: cells for number, *cells in rows}

RULE = "# " + "-" * 38

def numbered(lines: list[str]) -> list[tuple[str, int | str, str]]:
    """(file, number in it, text) of the lines that read_upstream returns; "" for the number of a line between two files."""
    found, file, begin = [], "train_gpt.py", 0
    for i, line in enumerate(lines):
        if line.startswith("# ") and lines[i - 1] == RULE and lines[i + 1:i + 2] == [RULE]:
            while found and found[-1][2] in ("", RULE):
                found.pop()
            found += [(file, "", x) for x in lines[len(found):i]]
            file, begin = line[2:], i + 3
        found.append((file, i - begin + 1 if i >= begin else "", line))
    return found

def read_upstream(paths: list[str]) -> str:
    """The source in upstream's script or log, followed by its files of kernels as in a log; ValueError with the way to get it."""
    text = read_source(paths[0]) + "".join(f"\n\n\n{RULE}\n# {Path(x).name}\n{RULE}\n\n{read_source(x)}" for x in paths[1:])
    path = " + ".join(paths)
    names = re.findall(r"sys\.argv\[0\]\), '(\w+\.py)'", text)
    if missing := [name for name in names if f"\n# {name}\n" not in text]:
        raise ValueError(f"{path} reads {' and '.join(missing)}, which this tool needs, too: give all files of the record, in this order: "
                         f"train_gpt.py {' '.join(names)}")
    if re.search(r"^import torch_xla", text, re.M):
        raise ValueError(f"{path} is this project's own source or log. The other half is upstream's: {GET}")
    try:
        known = definitions(text).keys() & TABLE.keys() - {HEAD}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        where = f": line {e.lineno} is no Python {sys.version_info[0]}.{sys.version_info[1]} ({e.msg})" if getattr(e, "lineno", 0) else ""
        raise ValueError(f"{path} is not upstream's train_gpt.py, nor a log that begins with it{where}. To get that: {GET}") from None
    if len(known) < len(TABLE) // 4:
        raise ValueError(f"{path} has {len(known)} of record {RECORD}'s {len(TABLE) - 1} definitions: it is another script, or a record "
                         f"too old to stand beside this port. To get {RECORD}'s: {GET}")
    return text

def read_source(path: str) -> str:
    """What a file or a log has above its first double rule, in any encoding of Unicode: older PowerShells' `>` writes UTF-16."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file. It is upstream's: {GET}") from None
    text = re.split(r"^={100}$", re.sub(r"\A={100}\n", "", text), maxsplit=1, flags=re.M)[0].rstrip()
    return re.sub(r"^-{40}$", RULE, text, flags=re.M)  # around the name of each further file in a log

def commit_of(path: str) -> str:
    """The commit and subject of a file that stands unchanged in a clone of upstream, otherwise ""."""
    folder, name = os.path.split(os.path.realpath(path))
    git = lambda *words: subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, errors="replace")
    try:
        if git("cat-file", "-e", COMMIT).returncode or git("diff", "--quiet", "HEAD", "--", f":(literal){name}").returncode:
            return ""
        return git("log", "-1", "--format=%h, %s", "--", f":(literal){name}").stdout.strip()
    except OSError:
        return ""  # no git

# -----------------------------------------------------------------------------
# Pairs

@dataclass
class Unit:
    """Upstream's lines beside ours: some definitions of upstream, with what became of each."""
    names: list[str]
    statuses: list[str]  # one for each name, as are the notes
    notes: list[str]
    left: list[tuple[str, int | str, str]]  # (file, number, text) of its lines
    right: list[Ours]

    @property
    def status(self) -> str:
        return next((x for x in ("changed", "unknown") if x in self.statuses), self.statuses[-1])

def target(name: str, ours: dict[str, Ours]) -> list[str]:
    """The names here that stand beside one of upstream's."""
    if name not in TABLE:
        return [name] if name in ours else []
    return [name] * (TABLE[name].status in ("same", "differs")) + TABLE[name].counterpart.split()

def pair(text: str, ours: dict[str, Ours]) -> list[Unit]:
    """
    Upstream's whole source in units, in its order; what is only here follows what stands above it here. A counterpart of several is
    shown beside each of them.
    """
    lines, spans, units = numbered(text.split("\n")), definitions(text), []
    first = spans[HEAD].stop
    shown = set()
    targets = {name: target(name, ours) for name in [*spans, *TABLE]}
    taken = {x for names in targets.values() for x in names}
    if taken - ours.keys():
        raise ValueError(f"{MAP_FILE.name} speaks of what {', '.join(FILES)} no longer have: {', '.join(sorted(taken - ours.keys()))}")

    def judge(name):
        """(status, note) of one definition."""
        if name not in TABLE:
            return "unknown", ""
        status, _, why, hash, _ = TABLE[name]
        if name not in spans or spans[name].hash != hash:
            return "changed" if name in spans else "gone", f"the map says of {RECORD}'s: {status}" + (f", {why}" if why else "")
        return status, why
    def add(names, start, stop, rights):
        while start < stop and not lines[start][2].strip():
            start += 1
        units.append(Unit(names, *map(list, zip(*map(judge, names))), lines[start:stop], [ours[x] for x in rights]))
        shown.update(rights)
        for x in rights:
            if x in names or x not in spans:
                follow(ours[x])
    def add_new(x):
        shown.add(x.name)
        units.append(Unit([x.name], ["new"], [""], [], [x]))
    def follow(x):
        """What is only here and stands next in the same file."""
        everything = list(ours)
        for name in everything[everything.index(x.name) + 1:]:
            if name in taken or name in shown or ours[name].file != x.file:
                break
            add_new(ours[name])

    above = [n for n, x in spans.items() if x.start < first]
    add(above, 0, first, [HEAD])
    i, rest = 0, [n for n in spans if n not in above]
    starts = [max(first, spans[n].start) for n in rest] + [len(lines)]
    while i < len(rest):
        # neighbours with one counterpart, which bears no name of upstream's, are one unit: upstream's script and train
        j = i + 1
        rights = targets[rest[i]]
        while j < len(rest) and rights and targets[rest[j]] == rights and rights[0] not in spans:
            j += 1
        add(rest[i:j], starts[i], starts[j], rights)
        i = j
    for rights, names in itertools.groupby((n for n in TABLE if n not in spans), targets.get):
        add(list(names), 0, 0, [x for x in rights if x not in shown])
    for name, x in ours.items():
        if name not in shown:
            add_new(x)
    return units

def align(left: list[str], right: list[str]) -> list[tuple[int | None, int | None, bool]]:
    """Rows (line of left, line of right, the same text but for indentation), None where a side has no such line."""
    a, b = [x.strip() for x in left], [x.strip() for x in right]
    rows = []
    def similar(i0, i1, j0, j1):
        """Pairs the two most similar lines of a block, then what is above and below them."""
        best, at = 0.6, None
        for i, j in itertools.product(range(i0, i1), range(j0, j1)):
            matcher = difflib.SequenceMatcher(None, a[i], b[j], autojunk=False)
            if a[i] and b[j] and matcher.real_quick_ratio() > best and matcher.quick_ratio() > best and matcher.ratio() > best:
                best, at = matcher.ratio(), (i, j)
        if at is None:
            rows.extend((i, j, False) for i, j in itertools.zip_longest(range(i0, i1), range(j0, j1)))
        else:
            similar(i0, at[0], j0, at[1])
            rows.append((*at, a[at[0]] == b[at[1]]))
            similar(at[0] + 1, i1, at[1] + 1, j1)
    often = {line for side in (a, b) for line, n in Counter(side).items() if n > 1 or not line}  # "else:" is no landmark
    matcher = difflib.SequenceMatcher(lambda line: line in often, a, b, autojunk=False)
    for op, i0, i1, j0, j1 in matcher.get_opcodes():
        if op == "equal":
            rows.extend((i, j, True) for i, j in zip(range(i0, i1), range(j0, j1)))
        else:
            similar(i0, i1, j0, j1)
    return rows

def right_lines(unit: Unit) -> list[tuple[str, int, str]]:
    """(file, number, text) of the lines on our side."""
    return [(x.file, x.start + k + 1, line) for x in unit.right for k, line in enumerate(x.lines)]

def texts(lines: list[tuple]) -> list[str]:
    return [line for _, _, line in lines]

def counts(units: list[Unit]) -> dict[str, int]:
    """How many definitions of the file that was given have which status, in the order of STATUSES."""
    found = Counter(status for unit in units for status in unit.statuses)
    return {status: found[status] for status in STATUSES if found[status] or status not in ("changed", "unknown", "gone")}

def verdict(path: str, units: list[Unit]) -> list[str]:
    """Whether this is the record that the map speaks of, and if it is not, what still is."""
    by_status = {status: [] for status in STATUSES}
    for unit in units:
        for name, status in zip(unit.names, unit.statuses):
            by_status[status].append(name)
    order = [name for unit in units for name in unit.names if name in TABLE]
    changed, unknown, gone = (by_status[status] for status in ("changed", "unknown", "gone"))
    still = [name for name in order if name not in changed + gone]
    if not changed + unknown + gone:
        moved = "" if order == list(TABLE) else ", in another order"
        return [f"{path} is record {RECORD} ({COMMIT}): each of its {len(TABLE)} definitions is the one that the map speaks of{moved}"]
    commit = commit_of(path)
    lines = [f"Note: {path} is not record {RECORD}'s file ({COMMIT})" + (f", but that of commit {commit}" if commit else "")]
    for words, names in ((f"still {RECORD}'s", still), ("changed", changed), ("unknown", unknown), ("gone", gone)):
        lines += [f"{len(names)} {words}: {', '.join(names)}"] if names else []
    return lines

def tally(units: list[Unit]) -> list[str]:
    return [f"{n:4} {status:9} {STATUSES[status]}" for status, n in counts(units).items()]

# -----------------------------------------------------------------------------
# The map

def beside_nothing(ours: dict[str, Ours]) -> list[str]:
    """Long definitions that are not dropped, but have no counterpart; or one of their own name whose body has moved elsewhere."""
    here = {name: sum(len(ours[x].lines) for x in target(name, ours) if x in ours) for name in TABLE}
    return [f"{name}: {x.lines} lines beside {here[name]}" for name, x in TABLE.items() if x.lines > 20 and (
        here[name] < x.lines / 12 if x.status in ("same", "differs") else x.status == "replaced" and not here[name])]

def digest(table: dict[str, Entry]) -> str:
    """Of what comes from upstream's file, so that no line of the map is lost or altered by hand."""
    return hashlib.sha256(repr([(name, x.hash, x.lines) for name, x in table.items()]).encode()).hexdigest()[:16]

def update_map(text: str) -> list[str]:
    """Writes this source's hashes and lines into the map, in its order; ValueError unless both have the same definitions."""
    spans = definitions(text)
    lacks = {"it lacks": [n for n in spans if n not in TABLE], "the file lacks": [n for n in TABLE if n not in spans]}
    lost = [f"{words} {', '.join(names)}" for words, names in lacks.items() if names]
    if lost:
        raise ValueError(f"{MAP_FILE.name} and this file must have the same definitions, but {'; '.join(lost)}")
    stops = [x.start for x in spans.values()][1:] + [len(text.split("\n"))]
    table = {name: TABLE[name]._replace(hash=x.hash, lines=stop - x.start) for (name, x), stop in zip(spans.items(), stops)}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in table.items())
    head = "".join(f"{json.dumps(k)}: {json.dumps(v)},\n" for k, v in (MAP | dict(digest=digest(table))).items() if k != "definitions")
    MAP_FILE.write_text(f'{{\n{head}"definitions": {{\n{rows}\n}}}}\n', encoding="utf-8")
    changed = [name for name, x in table.items() if TABLE[name].hash not in ("", x.hash)]
    return [f"{MAP_FILE.name} has the hashes of {len(table)} definitions now",
            f"their text changed, so read again what the map says of them: {', '.join(changed) or 'none'}"]

# -----------------------------------------------------------------------------
# Text

def title(unit: Unit) -> str:
    return ", ".join(unit.names)

def explain(unit: Unit) -> list[str]:
    """Status and reason in words, a line for each name of the unit that has one."""
    if len(unit.names) == 1:
        by = f" by {', '.join(x.name for x in unit.right)}" if unit.status == "replaced" else ""
        return [f"{unit.status}{by}" + (f": {unit.notes[0]}" if unit.notes[0] else "")]
    return [f"{name}: {status}" + (f", {note}" if note else "") for name, status, note in zip(unit.names, unit.statuses, unit.notes)
            if note or status in ("changed", "unknown")]

def print_text(units: list[Unit], width: int):
    column = (width - 15) // 2
    for unit in units:
        print(f"\n== {title(unit)}")
        for line in explain(unit):
            print(f"   {line}")
        right = right_lines(unit)
        for i, j, same in align(texts(unit.left), texts(right)):
            mark = " " if same else "<" if j is None else ">" if i is None else "|"
            old, new = "" if i is None else unit.left[i][2].rstrip(), "" if j is None else right[j][2].rstrip()
            numbers = "" if i is None else unit.left[i][1], "" if j is None else right[j][1]
            for k in range(0, max(len(old), len(new), 1), column):
                print(f"{numbers[0]:>5} {old[k:k + column]:{column}} {mark} {numbers[1]:>5} {new[k:k + column]}".rstrip())
                numbers = "", ""

# -----------------------------------------------------------------------------
# HTML

STYLE = """
:root { --bg: #fff; --fg: #1f2328; --dim: #6e7781; --line: #d8dee4; --old: #ffebe9; --new: #e6ffec; --oldw: #ffb8b3; --neww: #a0edb2;
        --head: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --bg: #0d1117; --fg: #d1d7e0; --dim: #8b949e; --line: #30363d; --old: #3c1a1d; --new: #12301d; --oldw: #8c2f33; --neww: #1d6b37;
          --head: #161b22 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif; display: grid;
       grid-template-columns: 17rem minmax(0, 1fr) }
nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; padding: 1rem; border-right: 1px solid var(--line); font-size: 12px }
nav a { display: block; color: inherit; text-decoration: none; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
nav a:hover { text-decoration: underline }
nav a.inner { padding-left: 1rem }
main { padding: 1rem 1.5rem 6rem; max-width: 120rem }
h1 { font-size: 1.5rem; margin: .2rem 0 }
h2 { font: 600 1rem ui-monospace, monospace; margin: 0; overflow-wrap: anywhere }
h2 a { color: inherit; text-decoration: none }
section { margin-top: 1.6rem; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; scroll-margin-top: .5rem }
header { background: var(--head); padding: .5rem .8rem; border-bottom: 1px solid var(--line) }
header p { margin: .1rem 0; color: var(--dim); font-size: 13px }
table { border-collapse: collapse; width: 100% }
table.code { table-layout: fixed; font: 12px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
table.code td { padding: 0 .4rem; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere }
col.n { width: 3.2rem } td.n { color: var(--dim); text-align: right; user-select: none }
td.old { background: var(--old) } td.new { background: var(--new) }
td.old mark { background: var(--oldw); color: inherit } td.new mark { background: var(--neww); color: inherit }
td.file { color: var(--dim); border-bottom: 1px solid var(--line) }
table.plain td, table.plain th { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top;
                                 font-size: 13px }
table.plain { margin: .8rem 0 } :target > td { background: var(--head); font-weight: 600 }
b.tag { display: inline-block; min-width: 4.6rem; text-align: center; border-radius: 4px; color: #fff;
        font: 600 11px/1.6 system-ui, sans-serif }
i.dot { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin-right: .35rem }
.changed, .unknown, .gone { background: #8250df } .same { background: #57606a } .differs { background: #9a6700 }
.replaced { background: #0969da } .dropped { background: #cf222e }
.tag.new, .dot.new { background: #1a7f37 }
"""

def escape(text: str) -> str:
    return html.escape(text, quote=False)

def code(text: str) -> str:
    """Escaped, Markdown's `code` made code."""
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(text))

def linked(text: str) -> str:
    """Escaped, D numbers made links to their reasons."""
    return re.sub(r"\bD(\d+)\b", r'<a href="#D\1">D\1</a>', escape(text))

def marked(old: str, new: str) -> tuple[str, str]:
    """Two similar lines, escaped, the words in which they differ marked."""
    a, b = (re.findall(r"\w+|\s+|.", x.lstrip()) for x in (old, new))
    sides = [x[:len(x) - len(x.lstrip())] for x in (old, new)]
    for op, i0, i1, j0, j1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for k, words in enumerate((a[i0:i1], b[j0:j1])):
            piece = escape("".join(words))
            sides[k] += piece if op == "equal" or not piece.strip() else f"<mark>{piece}</mark>"
    return tuple(sides)

def html_unit(unit: Unit, anchor: str) -> str:
    right = right_lines(unit)
    where = ", ".join(f"{x.file}:{x.start + 1}" for x in unit.right)
    notes = [f"<p>{linked(note)}</p>" for note in (explain(unit) if len(unit.names) > 1 else filter(None, unit.notes))]
    name = title(unit) if len(unit.names) < 4 else f"{unit.names[0]} ... {unit.names[-1]}"
    out = [f'<section id="{anchor}"><header><h2><b class="tag {unit.status}">{unit.status}</b> <a href="#{anchor}">{escape(name)}</a></h2>',
           *notes, '</header><table class="code"><colgroup><col class="n"><col><col class="n"><col></colgroup>',
           f'<tr><td class="n"></td><td class="file">{", ".join(dict.fromkeys(file for file, _, _ in unit.left))}</td>',
           f'<td class="n"></td><td class="file">{where}</td></tr>']
    for i, j, same in align(texts(unit.left), texts(right)):
        old, new = "" if i is None else unit.left[i][2], "" if j is None else right[j][2]
        if not same and i is not None and j is not None and difflib.SequenceMatcher(None, old.strip(), new.strip()).ratio() > 0.6:
            cells = marked(old, new)
        else:
            cells = escape(old), escape(new)
        kinds = ("", "") if same else (' class="old"' if old.strip() else "", ' class="new"' if new.strip() else "")
        out.append(f'<tr><td class="n">{"" if i is None else unit.left[i][1]}</td><td{kinds[0]}>{cells[0]}</td>'
                   f'<td class="n">{"" if j is None else right[j][1]}</td><td{kinds[1]}>{cells[1]}</td></tr>')
    return "\n".join(out) + "</table></section>"

def anchors(name: str) -> str:
    return "d-" + re.sub(r"\W+", "-", name)

def page(path: str, text: str, units: list[Unit]) -> str:
    """The whole HTML page; nothing is loaded from elsewhere."""
    toc, body = [], []
    for unit in units:
        anchor = anchors(unit.names[0])
        for name, status in zip(unit.names, unit.statuses):
            method = ' class="inner"' if re.match("[A-Z][a-z]?[A-Za-z]*[.]", name) else ""
            toc.append(f'<a href="#{anchor}"{method} title="{status}"><i class="dot {status}"></i>{escape(name)}</a>')
        body.append(html_unit(unit, anchor))
    table = "".join(f'<tr id="{number}"><td>{number}</td>' + "".join(f"<td>{code(cell)}</td>" for cell in cells) + "</tr>"
                    for number, cells in reasons().items())
    first, *more = map(escape, verdict(path, units))
    note = f"<p><strong>{first}</strong></p>" + "".join(f"<p>{line}</p>" for line in more)
    rows = "".join(f'<tr><td><b class="tag {status}">{status}</b></td><td>{n}</td><td>{STATUSES[status]}</td></tr>'
                    for status, n in counts(units).items())
    return "\n".join([
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>The CUDA record beside its XLA port</title><style>{STYLE}</style>",
        f"<nav><strong>Definitions</strong>{''.join(toc)}</nav><main><h1>The CUDA record beside its XLA port</h1>",
        f"<p>Left: modded-nanogpt's <code>train_gpt.py</code> and its kernels, {len(text.splitlines())} lines. Right: this",
        f"project. In upstream's order; lines that differ are coloured, and where two are similar, the words.</p>{note}",
        f'<table class="plain" style="width: auto">{rows}</table>',
        f'<table class="plain"><tr><th></th><th>CUDA record</th><th>here</th><th>why</th></tr>{table}</table>',
        *body, "</main></html>", ""])

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="train_gpt.py", help="upstream's script, then its files of kernels; or a log")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--html", metavar="FILE", help="write one self-contained page instead of text")
    what.add_argument("--name", help="only this definition, of upstream's or ours")
    what.add_argument("--update_map", action="store_true", help="write the hashes of this source into upstream_map.json")
    args = parser.parse_args(argv)
    width = shutil.get_terminal_size((200, 50)).columns
    try:
        text = read_upstream(args.paths)
        if args.update_map:
            return print("\n".join(update_map(text)))
        units = pair(text, read_ours())
        chosen = [u for u in units if args.name in (None, *u.names, *(x.name for x in u.right))]
        if not chosen:
            near = difflib.get_close_matches(args.name, [n for u in units for n in u.names], 1)
            raise ValueError(f"{args.name} is no definition of either side" + (f": did you mean {near[0]}?" if near else ""))
        if args.html:
            if any(os.path.exists(args.html) and os.path.samefile(args.html, path) for path in args.paths):
                raise ValueError(f"--html {args.html} would overwrite upstream's source")
            Path(args.html).write_text(page(args.paths[0], text, units), encoding="utf-8")
        else:
            print_text(chosen, width)
    except (ValueError, OSError) as e:
        sys.exit(f"diff_upstream.py: {e}")
    if not args.html:
        print()
    for line in verdict(args.paths[0], units):
        print(textwrap.fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))
    print("\n".join(tally(units) + ([f"written: {args.html}"] if args.html else [])))

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    main()
