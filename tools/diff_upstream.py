"""
Record #60 and this port, side by side: every definition of upstream's train_gpt.py beside its counterpart here, in upstream's
order, with what became of it (same, differs, replaced, dropped) and why.

    git clone https://github.com/KellerJordan/modded-nanogpt ../modded-nanogpt
    git -C ../modded-nanogpt show 0a43716d:train_gpt.py > /tmp/train_gpt.py
    python tools/diff_upstream.py /tmp/train_gpt.py --html diff.html    # one page, two columns
    python tools/diff_upstream.py /tmp/train_gpt.py --name GPT.forward  # one definition, in the terminal

The file may also be a log of upstream's, which begins with the source, or /dev/stdin. What belongs to what is written down in
upstream_map.json, by name: [status, counterpart where it has another name, why]. The reasons D1, D2, ... are README.md's.
"""
import argparse
import ast
import difflib
import hashlib
import html
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("train_gpt_xla.py", "muon_xla.py", "pallas_kernels.py", "replay.py")
MAP = json.loads((ROOT / "tools" / "upstream_map.json").read_text())
GET = (f"'git clone https://github.com/KellerJordan/modded-nanogpt', then in it 'git show {MAP['commit']}:train_gpt.py > train_gpt.py'; "
       "a log of that record will do too")
STATUSES = dict(same="computes the same, in these or other words", differs="differs as the numbered reason says",
                replaced="done elsewhere, or by other means", dropped="has no counterpart", new="exists only here")
HEAD = "imports"  # the lines above the first definition

# -----------------------------------------------------------------------------
# The two sources

def definitions(text: str) -> dict[str, tuple[int, int]]:
    """
    Classes, methods, functions and module-level assignments of a source, in order: name -> its lines [start, stop), from 0.
    Comments above belong to what follows; a class ends where its first method begins; statements that define nothing belong to
    the definition before them. A name that is assigned again goes on where it began.
    """
    found, stop, last = {}, 0, ""
    def add(name, end):
        nonlocal stop, last
        start, _ = found.get(name, (stop, 0))
        found[name] = start, end
        stop, last = end, name
    def walk(body, prefix=""):
        for node in body:
            if isinstance(node, ast.FunctionDef):
                decorators = f" ({ast.unparse(node.decorator_list[0])})" if node.name == "_" else ""
                add(prefix + node.name + decorators, node.end_lineno)
            elif isinstance(node, ast.ClassDef):
                methods = [x for x in node.body if isinstance(x, ast.FunctionDef)]
                add(node.name, node.body[node.body.index(methods[0]) - 1].end_lineno if methods and methods[0] is not node.body[0]
                    else node.lineno if methods else node.end_lineno)
                walk(methods, f"{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    add(ast.unparse(target), node.end_lineno)
            elif isinstance(node, ast.If | ast.For | ast.With):
                walk(node.body)
            if last and node.end_lineno > stop:
                add(last, node.end_lineno)
    walk(ast.parse(text).body)
    return found

@dataclass
class Ours:
    """A definition of this project."""
    name: str
    file: str
    start: int  # of its lines, from 0
    lines: list[str]

def read_ours() -> dict[str, Ours]:
    """All definitions of this project by name, in the order of FILES; and the lines above the first one."""
    found = {}
    for file in FILES:
        text = (ROOT / file).read_text()
        lines = text.splitlines()
        spans = definitions(text)
        first = head(text)
        for name, (start, stop) in {HEAD: (0, first), **spans}.items():
            start = max(start, first) if name != HEAD else 0
            while start < stop and not lines[start].strip():
                start += 1
            if stop > start and name not in found:
                found[name] = Ours(name, file, start, lines[start:stop])
    return found

def head(text: str) -> int:
    """How many lines there are above the first function or class, and the comment on it."""
    body = ast.parse(text).body
    i = next(i for i, node in enumerate(body) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return body[i - 1].end_lineno

def reasons() -> dict[str, list[str]]:
    """README.md's table of differences: "D1" -> [what the CUDA record has, what is here, why]."""
    rows = re.findall(r"^\| (D\d+) \| (.*) \| (.*) \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    return {number: cells for number, *cells in rows}

def read_upstream(path: str) -> str:
    """The source in upstream's script or log; ValueError with the way to get it."""
    try:
        text = Path(path).read_text(errors="replace")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file. It is upstream's: {GET}") from None
    text = re.split(r"^={100}$", text, maxsplit=1, flags=re.M)[0]
    if "import torch_xla" in text:
        raise ValueError(f"{path} is this project's own source or log. The other half is upstream's: {GET}")
    try:
        known = definitions(text).keys() & MAP["definitions"].keys()
    except (SyntaxError, ValueError):
        known = ()
    if len(known) < len(MAP["definitions"]) / 4:
        raise ValueError(f"{path} is not upstream's train_gpt.py, nor a log of it. To get that: {GET}")
    return text

# -----------------------------------------------------------------------------
# Pairs

@dataclass
class Unit:
    """Upstream's lines beside ours: some definitions of upstream, each with its entry of the table."""
    names: list[str]
    status: str
    notes: list[str]  # why, one for each name
    start: int
    left: list[str]
    right: list[Ours]
    see: list[str]  # counterparts that are shown elsewhere

def pair(text: str, ours: dict[str, Ours]) -> list[Unit]:
    """Upstream's whole source in units, in its order; what is only here follows what stands above it here."""
    lines, spans, table, units = text.splitlines(), definitions(text), MAP["definitions"], []
    first = head(text)
    entry = lambda name: table.get(name, ["dropped", "", f"not in record #60 ({MAP['commit']}), so the table does not know it"])
    target = lambda name: entry(name)[1].split() or ([name] if entry(name)[0] in ("same", "differs") else [])
    taken = {x for name in spans for x in target(name)} | {HEAD}
    shown = set()

    def add(names, start, stop, rights):
        notes = [entry(n)[2] for n in names] if names else [""]
        see = [x for x in rights if x in shown or x not in names and x in spans]
        right = [ours[x] for x in rights if x not in see]
        shown.update(x.name for x in right)
        while start < stop and not lines[start].strip():
            start += 1
        status = entry(names[-1])[0] if names else "new"
        units.append(Unit(names or rights, status, notes, start, lines[start:stop], right, see))
        for x in right:
            follow(x)
    def follow(x):
        """What is only here and stands next in the same file."""
        everything = list(ours)
        for name in everything[everything.index(x.name) + 1:]:
            if name in taken or name in shown or ours[name].file != x.file or x.file not in FILES[:2]:
                break
            shown.add(name)
            units.append(Unit([name], "new", [""], 0, [], [ours[name]], []))

    above = [n for n, (start, _) in spans.items() if start < first]
    add(above, 0, first, [HEAD])
    units[0].status = "differs"
    i, rest = 0, [n for n in spans if n not in above]
    starts = [max(first, spans[n][0]) for n in rest] + [len(lines)]
    while i < len(rest):
        # neighbours with one counterpart, which bears no name of upstream's, are one unit: upstream's script and train
        j = i + 1
        while j < len(rest) and target(rest[i]) and target(rest[j]) == target(rest[i]) and target(rest[i])[0] not in spans:
            j += 1
        add(rest[i:j], starts[i], starts[j], target(rest[i]))
        i = j
    for name, x in ours.items():
        if name not in shown:
            units.append(Unit([name], "new", [""], 0, [], [x], []))
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

def counts(units: list[Unit]) -> dict[str, int]:
    known = Counter(MAP["definitions"][name][0] for name in MAP["definitions"])
    return {**{status: known[status] for status in STATUSES}, "new": sum(unit.status == "new" for unit in units)}

def summary(text: str, units: list[Unit]) -> list[str]:
    lines = []
    if hashlib.sha256(text.strip().encode()).hexdigest() != MAP["sha256"]:
        names, known = definitions(text), MAP["definitions"]
        lines += [f"Note: this is not the file of commit {MAP['commit']}. Unknown to the table: {len(names.keys() - known.keys())} "
                  f"definitions; gone: {len(known.keys() - names.keys())}"]
    lines += [f"{n:4} {status:9} {STATUSES[status]}" for status, n in counts(units).items()]
    return lines

# -----------------------------------------------------------------------------
# Text

def title(unit: Unit) -> str:
    return ", ".join(dict.fromkeys(unit.names))

def explain(unit: Unit) -> list[str]:
    """Status and reason in words, a line for each name of the unit that has one."""
    see = f" by {', '.join(unit.see)}" if unit.see and unit.status == "replaced" else ""
    if len(unit.names) == 1:
        return [f"{unit.status}{see}" + (f": {unit.notes[0]}" if unit.notes[0] else "")]
    return [f"{name}: {MAP['definitions'].get(name, [unit.status])[0]}" + (f", {note}" if note else "")
            for name, note in zip(unit.names, unit.notes) if note]

def print_text(units: list[Unit], width: int):
    column = (width - 15) // 2
    for unit in units:
        print(f"\n== {title(unit)}")
        for line in explain(unit):
            print(f"   {line}")
        right = right_lines(unit)
        for i, j, same in align(unit.left, [line for _, _, line in right]):
            mark = " " if same else "<" if j is None else ">" if i is None else "|"
            old, new = "" if i is None else unit.left[i].rstrip(), "" if j is None else right[j][2].rstrip()
            numbers = "" if i is None else unit.start + i + 1, "" if j is None else right[j][1]
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
.same { background: #57606a } .differs { background: #9a6700 } .replaced { background: #0969da } .dropped { background: #cf222e }
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
    see = ", ".join(f'<a href="#{anchors(x)}">{escape(x)}</a>' for x in unit.see)
    notes = explain(unit) if len(unit.names) > 1 else [note for note in unit.notes if note]
    notes = [f"<p>{linked(note)}</p>" for note in notes] + ([f"<p>shown at {see}</p>"] if see else [])
    name = title(unit) if len(unit.names) < 4 else f"{unit.names[0]} ... {unit.names[-1]}"
    out = [f'<section id="{anchor}"><header><h2><b class="tag {unit.status}">{unit.status}</b> <a href="#{anchor}">{escape(name)}</a></h2>',
           *notes, '</header><table class="code"><colgroup><col class="n"><col><col class="n"><col></colgroup>',
           f'<tr><td class="n"></td><td class="file">{"train_gpt.py" if unit.left else ""}</td>',
           f'<td class="n"></td><td class="file">{where}</td></tr>']
    for i, j, same in align(unit.left, [line for _, _, line in right]):
        old, new = "" if i is None else unit.left[i], "" if j is None else right[j][2]
        if not same and i is not None and j is not None and difflib.SequenceMatcher(None, old.strip(), new.strip()).ratio() > 0.6:
            cells = marked(old, new)
        else:
            cells = escape(old), escape(new)
        kinds = ("", "") if same else (' class="old"' if old.strip() else "", ' class="new"' if new.strip() else "")
        out.append(f'<tr><td class="n">{"" if i is None else unit.start + i + 1}</td><td{kinds[0]}>{cells[0]}</td>'
                   f'<td class="n">{"" if j is None else right[j][1]}</td><td{kinds[1]}>{cells[1]}</td></tr>')
    return "\n".join(out) + "</table></section>"

def anchors(name: str) -> str:
    return "d-" + re.sub(r"\W+", "-", name)

def page(text: str, units: list[Unit]) -> str:
    """The whole HTML page; nothing is loaded from elsewhere."""
    toc, body = [], []
    for unit in units:
        anchor = anchors(unit.right[0].name if unit.right and unit.right[0].name not in unit.names else unit.names[0])
        for name in dict.fromkeys(unit.names):
            status = "new" if unit.status == "new" else MAP["definitions"].get(name, [unit.status])[0]
            method = ' class="inner"' if re.match("[A-Z][a-z]?[A-Za-z]*[.]", name) else ""
            toc.append(f'<a href="#{anchor}"{method} title="{status}"><i class="dot {status}"></i>{escape(name)}</a>')
        body.append(html_unit(unit, anchor))
    table = "".join(f'<tr id="{number}"><td>{number}</td>' + "".join(f"<td>{code(cell)}</td>" for cell in cells) + "</tr>"
                    for number, cells in reasons().items())
    note = "".join(f"<p><strong>{escape(line)}</strong></p>" for line in summary(text, units) if line.startswith("Note"))
    tally = "".join(f'<tr><td><b class="tag {status}">{status}</b></td><td>{n}</td><td>{STATUSES[status]}</td></tr>'
                    for status, n in counts(units).items())
    return "\n".join([
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Record #60 beside its XLA port</title><style>{STYLE}</style>",
        f"<nav><strong>Definitions</strong>{''.join(toc)}</nav><main><h1>Record #60 beside its XLA port</h1>",
        f"<p>Left: <code>train_gpt.py</code> of modded-nanogpt, {len(text.splitlines())} lines. Right: this project. In upstream's order;",
        f"lines that differ are coloured, and where two are similar, the words.</p>{note}",
        f'<table class="plain" style="width: auto">{tally}</table>',
        f'<table class="plain"><tr><th></th><th>CUDA record</th><th>here</th><th>why</th></tr>{table}</table>',
        *body, "</main></html>", ""])

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="train_gpt.py", help="upstream's script, or a log that begins with it")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page instead of text")
    parser.add_argument("--name", help="only this definition, of upstream's or ours")
    args = parser.parse_args(argv)
    try:
        text = read_upstream(args.path)
        units = pair(text, read_ours())
        if args.html:
            Path(args.html).write_text(page(text, units))
        else:
            chosen = [u for u in units if not args.name or args.name in u.names or args.name in [x.name for x in u.right]]
            if not chosen:
                near = difflib.get_close_matches(args.name, [n for u in units for n in u.names], 1)
                raise ValueError(f"{args.name} is no definition of either side" + (f": did you mean {near[0]}?" if near else ""))
            print_text(chosen, shutil.get_terminal_size((200, 50)).columns)
    except (ValueError, OSError) as e:
        sys.exit(f"diff_upstream.py: {e}")
    print("\n".join(["", *summary(text, units)] if not args.html else [*summary(text, units), f"written: {args.html}"]))

if __name__ == "__main__":
    main()
