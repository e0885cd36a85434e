"""
tools/diff_upstream.py: its map, what it makes of a record's source and of another's, and each bad input's one line.
    python -m pytest tests/test_diff_upstream.py
"""
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, one_line

sys.path.insert(0, str(ROOT / "tools"))
import diff_upstream as d

OURS = d.read_ours()

# -----------------------------------------------------------------------------
# The map

def test_map_has_every_definition_of_the_record():
    """The names are the map's keys; with what else comes from upstream's file they make a digest, so that neither can change alone."""
    assert d.digest(d.TABLE) == d.MAP["digest"], "the map was changed by hand where --update_map writes it, or lost a line"

def test_map_is_not_stale():
    numbered, used = d.reasons(), set()
    for name, (status, counterpart, why, _, _) in d.TABLE.items():
        assert status in ("same", "differs", "replaced", "dropped"), name
        used |= set(re.findall(r"\bD\d+\b", why))
        assert set(counterpart.split()) <= set(OURS), f"{name}: {counterpart} is not here"
        if status in ("same", "differs"):
            assert name in OURS, f"{name} is said to be here under its own name"
            assert why or status == "same", f"{name} differs for no reason"
        elif status == "replaced":
            assert counterpart, name
        else:
            assert why and not counterpart and name not in OURS, f"{name} is said to be dropped"
    assert used == set(numbered), "a D number without a reason in DIFFERENCES.md, or one that no definition has"
    assert all(len(cells) == 3 for cells in numbered.values()) and len(numbered) >= 14

def test_each_difference_is_marked_in_the_code():
    text = "\n".join(line for x in OURS.values() if x.name != d.HEAD for line in x.lines)
    assert [number for number in d.reasons() if not re.search(rf"\b{number}\b", text)] == []

def test_no_long_definition_stands_beside_nothing(monkeypatch):
    assert d.beside_nothing(OURS) == []
    monkeypatch.setitem(OURS, "GPT.__init__", d.Ours("GPT.__init__", "a.py", 0, ["self.make()"]))
    monkeypatch.setitem(d.TABLE, "XXT", d.TABLE["XXT"]._replace(counterpart=""))
    assert [x.split(":")[0] for x in d.beside_nothing(OURS)] == ["GPT.__init__", "XXT"]

# -----------------------------------------------------------------------------
# A source with the definitions of the record by name, each with nothing in it: the real one is not ours to keep

ASSIGNED = {"ReLUSqrdMLP", "rank", "world_size", "grad_accum_steps", "grad_scale", "device", "master_process", "polar_express_coeffs",
            "flash_attn_interface", "args", "training_schedule", "_dummy_f32", "ce_fwd_bwd_kernel"}

@pytest.fixture(scope="module")
def source() -> str:
    names = list(d.TABLE)
    classes = {name.split(".")[0] for name in names if re.match(r"_?[A-Z]\w+\.", name)}
    lines, script = ["code = 0", "os.environ['PYTORCH_ALLOC_CONF'] = 0", "import os"], False
    for name in names[3:]:
        script = (script or name == "logfile") and name != "_pid_to_block"
        if "register_fake" in name:
            lines += ["@" + name[3:-1], "def _(x):", "    return x"]
        elif name.split(".")[0] in classes and "." in name:
            lines += [f"    def {name.split('.')[1]}(self):", f"        return '{name}'"]
        elif script or name in ASSIGNED or re.fullmatch(r"[A-Z]+(_[A-Z]+)+|.*\..*", name):
            lines += [f"{name} = 0"]
        elif name in classes or re.match("[A-Z]+[a-z]", name):
            lines += [f"class {name}:", "    a = '<b>&'"]
        else:
            lines += [f"def {name}(x):", "    return x"]
    return "\n".join(lines) + "\n"

@pytest.fixture
def upstream(source, tmp_path, monkeypatch, capsys):
    """The file, and a map that speaks of it."""
    path = tmp_path / "train_gpt.py"
    path.write_text(source)
    monkeypatch.setattr(d, "MAP_FILE", tmp_path / "map.json")
    monkeypatch.setattr(d, "read_ours", lambda: OURS)
    d.main([str(path), "--update_map"])
    assert f"hashes of {len(d.TABLE)} definitions" in capsys.readouterr().out
    monkeypatch.setattr(d, "TABLE", {name: d.Entry(*row) for name, row in json.loads(d.MAP_FILE.read_text())["definitions"].items()})
    return path

@pytest.fixture
def says(upstream, capsys, monkeypatch):
    """What the tool says of a source: (its first line, the names under each heading, the tally)."""
    monkeypatch.setenv("COLUMNS", "100000")
    def run(text, encoding="utf-8"):
        upstream.write_bytes(text.encode(encoding))
        d.main([str(upstream), "--name", "norm"])
        note, *lines = capsys.readouterr().out.split("\n\n")[-1].splitlines()
        named = {head: re.split(r", (?![^(]*\))", names) for head, names in re.findall(r"^\d+ (.+?): (.*)", "\n".join(lines), re.M)}
        return note, named, {status: int(n) for n, status in re.findall(r"^ *(\d+) (\w+)  ", "\n".join(lines), re.M)}
    return run

def test_the_record_is_told_as_the_record(says, source):
    note, named, tally = says(source)
    assert f"is record #89 (f411b3d3): each of its {len(d.TABLE)} definitions is the one that the map speaks of" in note and not named
    statuses = [x.status for x in d.TABLE.values()]
    assert {k: v for k, v in tally.items() if k != "new"} == {k: statuses.count(k) for k in ("same", "differs", "replaced", "dropped")}
    assert tally["new"] > 100

def test_a_changed_definition_is_told_as_changed(says, source):
    _, _, before = says(source)
    note, named, tally = says(source.replace("def norm(x):\n    return x", "def norm(x):\n    return 2 * x"))
    assert "is not record #89's file (f411b3d3)" in note
    assert named.pop("changed") == ["norm"] and list(named) == ["still #89's"] and len(named["still #89's"]) == len(d.TABLE) - 1
    assert tally == before | dict(same=before["same"] - 1, changed=1)

def test_another_record_is_told_as_another(says, source):
    """With a definition gone, one under another name, one that is new and an import more."""
    _, _, before = says(source)
    other = source.replace("def dc_gate(x):", "def dc_gates(x):").replace("def mm_t_op(x):\n    return x\n", "")
    other += "import new\nclass New: pass\ndef dc_gate_of_new(): pass\n"
    note, named, tally = says(other.replace("def norm(x):", "def norm(x, dc_gate):") + "def dc_gate(): pass\n")
    assert named["changed"] == ["imports", "norm", "dc_gate"] and named["gone"] == ["mm_t_op"]
    assert named["unknown"] == ["dc_gates", "New", "dc_gate_of_new"] and len(named["still #89's"]) == len(d.TABLE) - 4
    same = sum(d.TABLE[x].status == "same" for x in named["still #89's"])
    assert (tally["same"], tally["changed"], tally["unknown"], tally["gone"]) == (same, 3, 3, 1) and same < before["same"]

def test_what_is_gone_stands_beside_our_counterpart(source, upstream):
    text = source.replace("class Shard:", "class Finder:")
    units = {name: unit for unit in d.pair(text, OURS) for name in unit.names}
    with pytest.raises(ValueError, match="map.json speaks of what .* no longer have: Shard"):
        d.pair(text, {name: x for name, x in OURS.items() if name != "Shard"})
    assert units["Shard"].status == "gone" and "D11" in units["Shard"].notes[0]
    assert [x.name for x in units["Shard"].right] == ["Shard"] and units["Finder"].status == "unknown"

def test_another_order_is_told(says, source):
    a, b = "t0 = 0\n", "train_steps = 0\n"
    assert a + b in source
    assert says(source.replace(a + b, b + a))[0].endswith("speaks of, in another order")

CODE = '''"""A module."""
import os
import sys

RATE = 1e-3
def f(x, y=1):
    """What it does."""
    # a comment
    return g(x + y)  # another

class C(Base):
    """A class."""
    size: int = 4
    @property
    def p(self):
        return self.size

args = C()
for step in range(9):
    last = step == 8
    if last:
        stop()
        save(step)
    else:
        go(step)
print("end")
'''

@pytest.mark.parametrize("old, new", [
    ("# a comment\n    ", ""), ("    # a", "    # another"), ("What it does.", "What else."), ("A class.", "No class."),
    ("A module.", "No module."),
    ("g(x + y)", "g(x\n+y)"), ("\n\nclass", "\n\n# -----\n\n\nclass"), ("        return", "          return"), ('"end"', "'end'"),
    ("1e-3", "0.001")])
def test_layout_and_comments_do_not_count(old, new):
    hashes = [{name: x.hash for name, x in d.definitions(text).items()} for text in (CODE, CODE.replace(old, new, 1))]
    assert old in CODE and CODE.replace(old, new, 1) != CODE and hashes[0] == hashes[1]

@pytest.mark.parametrize("old, new, name", [
    ("1e-3", "1e-4", "RATE"), ("y=1", "y=2", "f"), ("x + y", "x - y", "f"), ("def f", "async def f", "f"), ("(Base)", "()", "C"),
    ("= 4", "= 5", "C"), ("@property\n    ", "", "C.p"), ("import sys", "import sys as s", "imports"), ("range(9)", "range(8)", "last"),
    ("if last", "if not last", "last"), ("    else:\n        go", "    go", "last"),
    ("    else:\n        go", "    if 1:\n        go", "last"), ("go(step)", "go(0)", "last"),
    ('print("end")', "", "last"), ("        go(step)\nprint", "        go(step)\n    print", "last"),
    ("        stop()\n        save(step)", "        save(step)\n        stop()", "last")])
def test_anything_else_counts(old, new, name):
    assert CODE.count(old) == 1
    before, after = (d.definitions(text) for text in (CODE, CODE.replace(old, new)))
    assert [x for x in before if before[x].hash != after[x].hash] == [name] and list(before) == list(after)

# -----------------------------------------------------------------------------
# Pages

def test_page_stands_alone_and_is_complete(upstream, tmp_path, capsys):
    d.main([str(upstream), "--html", str(tmp_path / "a.html")])
    page = (tmp_path / "a.html").read_text()
    assert not re.search(r"<(img|link|script|iframe)|@import|url\(|(src|href)=.?http", page), "something is loaded from elsewhere"
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids), "a link that leads nowhere"
    for name in d.TABLE:
        assert f"</i>{name}</a>" in page, f"{name} is not in the table of contents"
    # every line of upstream has its place, once and in order; every line of ours has one
    rows = re.findall(r'^<tr><td class="n">(\d*)</td>.*<td class="n">(\d*)</td>', page, re.M)
    left, right = ([int(row[side]) for row in rows if row[side]] for side in (0, 1))
    assert left == list(range(1, len(upstream.read_text().splitlines()) + 1))
    ours = [x.start + k + 1 for x in OURS.values() for k in range(len(x.lines))]
    assert set(right) == set(ours) and len(right) >= len(ours) > 1500
    assert "&lt;b&gt;&amp;" in page and "<b>&'" not in page, "code must be escaped"
    assert '<a href="#D2">D2</a>' in page

def test_each_counterpart_is_shown(source, upstream):
    """Beside every definition that has one, also where it is the counterpart of several."""
    units = d.pair(source.rstrip(), OURS)
    assert [unit.names for unit in units if not unit.right and set(unit.statuses) != {"dropped"}] == []
    assert {x.name for unit in units for x in unit.right} == set(OURS)

def test_text_pairs_by_name(upstream, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    d.main([str(upstream), "--name", "NorMuonAndAdam._init_state"])
    out = capsys.readouterr().out
    assert "== NorMuonAndAdam._init_state\n   replaced by NorMuonAndAdam.reset: D12: whole tensors" in out
    assert "return 'NorMuonAndAdam._init_state'" in out and "def reset(" in out and "def get_numbers(" not in out
    d.main([str(upstream)])
    everything = capsys.readouterr().out
    assert re.findall(r"^== (\w+)", everything, re.M)[:2] == ["imports", "ReLUSqrdMLP"]
    assert everything.count("def step_optimizers") == 2, "once on each side"

def test_align():
    left = ["a = 1", "for x in xs:", "    y = f(x, 1)", "    return y", "else:", "gone()"]
    right = ["    a = 1", "    for x in xs:", "        y = f(x, 2)", "        new()", "        return y"]
    assert d.align(left, right) == [(0, 0, True), (1, 1, True), (2, 2, False), (None, 3, False), (3, 4, True),
                                    (4, None, False), (5, None, False)]
    assert d.marked("f(x, 1)", "f(x, 2)") == ("f(x, <mark>1</mark>)", "f(x, <mark>2</mark>)")

def test_names_that_two_files_have(tmp_path, monkeypatch):
    """A folder stands for its files; the second definition of a name is not lost."""
    (tmp_path / "kernels" / "tpu").mkdir(parents=True)
    (tmp_path / "a.py").write_text("def f(): pass\n")
    (tmp_path / "kernels" / "b.py").write_text("import a\ndef f(): return 1\n")
    (tmp_path / "kernels" / "tpu" / "c.py").write_text("def g(): pass\ndef h(): pass\n")
    (tmp_path / "kernels" / "tpu" / "d.py").write_text("def h(): return 1\n")
    monkeypatch.setattr(d, "ROOT", tmp_path)
    monkeypatch.setattr(d, "FILES", ("a.py", "kernels"))
    assert list(d.read_ours()) == ["f", "kernels/b.py:f", "g", "kernels/tpu/c.py:h", "kernels/tpu/d.py:h"]

def test_readme_commands_run(upstream, tmp_path, monkeypatch):
    """Each command of README.md for this tool, on a file made here."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    python tools/diff_upstream\.py \S*\.py ([^#\n]*)", (ROOT / "README.md").read_text(), re.M)
    for options in commands:
        d.main([str(upstream), *options.split()])
    assert commands and (tmp_path / "diff.html").exists()

# -----------------------------------------------------------------------------
# What people give it

@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(says, source, encoding):
    """With a mark or without, scripts and logs, with the line ends of Windows."""
    for text in (source, source + "\n" + "=" * 100 + "\nstep:0/4 val_loss:10.8\n"):
        assert "is record #89" in says("# d’où\n" + text.replace("\n", "\r\n"), encoding)[0]
    assert says("# d’où\n" + source.replace("def norm(x)", "def norm(y)"), encoding)[1]["changed"] == ["norm"]

def test_a_log_holds_the_source(says, source):
    rule = "\n" + "=" * 100 + "\n"
    for rest in ("Running Python 3.12" + rule + "step:0/4 val_loss:10.8\n", ""):
        assert "is record #89" in says(source + rule + rest)[0]
    # later records have their kernels in further files, which their logs hold too
    first, kernels = source.split("def _pid_to_block")
    kernels = "import triton\ndef _pid_to_block" + kernels
    text = first + "\n\n" + "-" * 40 + "\n# triton_kernels.py\n" + "-" * 40 + "\n\n" + kernels
    assert says(text + rule)[1]["changed"] == ["imports"]
    # logs of 2024 have a rule above the source, too
    assert "is record #89" in says(rule.lstrip() + source + rule)[0]
    # a log that breaks off
    assert says(source[:source.index("args = 0")] + rule)[1]["gone"][0] == "args"

def test_files_of_kernels(source, upstream, tmp_path, capsys):
    """Each has its name and its lines' numbers, in a log, too; what is in its docstring does not count."""
    first, kernels = source.split("def _pid_to_block")
    kernels = '"""Kernels."""\ndef _pid_to_block' + kernels
    (tmp_path / "a.py").write_text(first)
    (tmp_path / "b.py").write_text(kernels)
    paths = [str(tmp_path / "a.py"), str(tmp_path / "b.py")]
    d.main([*paths, "--name", "norm"])
    assert f"{tmp_path / 'a.py'} is record #89" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "log.txt").write_text(first + f"\n\n{'-' * 40}\n# b.py\n{'-' * 40}\n\n" + kernels + "=" * 100 + "\n")
    for given in (paths, [str(tmp_path / "log.txt")]):
        units = d.pair(d.read_upstream(given), OURS)
        files = {name: {file for file, _, _ in unit.left} for unit in units for name in unit.names}
        assert files["norm"] == {"train_gpt.py"} and files["XXT"] == {"b.py"}
        assert all(text == kernels.splitlines()[n - 1] for unit in units for file, n, text in unit.left if file == "b.py" and n)
        d.main([*given, "--html", str(tmp_path / "page.html")])
        rows = re.findall(r'^<tr><td class="n">(\d*)</td>', (tmp_path / "page.html").read_text(), re.M)
        lines = [*range(1, len(first.splitlines()) + 1), *range(1, len(kernels.splitlines()) + 1)]
        assert [int(row) for row in rows if row] == lines

def test_a_file_of_kernels_that_is_missing(source, upstream, tmp_path, capsys):
    """Upstream's script reads it beside itself, for the log."""
    upstream.write_text(source.replace("code = 0", "code = open(os.path.join(os.path.dirname(sys.argv[0]), 'b.py')).read()"))
    assert "reads b.py, which this tool needs, too" in one_line(d, upstream)
    (tmp_path / "b.py").write_text("x = 1\n")
    d.main([str(upstream), str(tmp_path / "b.py"), "--name", "norm"])
    assert "1 unknown: x" in capsys.readouterr().out

def test_a_clone_knows_its_commit(upstream, source, tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *words], check=True,
                                        capture_output=True, text=True).stdout.strip()
    assert d.commit_of(str(upstream)) == ""
    git("init", "-q")
    git("add", "train_gpt.py")
    git("commit", "-qm", "New record")
    assert d.commit_of(str(upstream)) == "", "not a clone of upstream"
    monkeypatch.setattr(d, "COMMIT", git("rev-parse", "HEAD"))
    assert re.fullmatch(r"[0-9a-f]{7,}, New record", d.commit_of(str(upstream)))
    (tmp_path / "other.py").write_text(source)
    assert d.commit_of(str(tmp_path / "other.py")) == ""
    upstream.write_text(source + "x = 1\n")
    assert d.commit_of(str(upstream)) == "", "it was changed since"

def test_the_map_moves_only_when_it_is_complete(upstream, source, capsys):
    before = d.MAP_FILE.read_text()
    upstream.write_text(source.replace("def norm(", "def rms("))
    said = one_line(d, upstream, "--update_map")
    assert "it lacks rms; the file lacks norm" in said and d.MAP_FILE.read_text() == before
    upstream.write_text(source.replace("def norm(x)", "def norm(y)"))
    d.main([str(upstream), "--update_map"])
    assert capsys.readouterr().out.strip().endswith("read again what the map says of them: norm")
    old, new = (json.loads(text) for text in (before, d.MAP_FILE.read_text()))
    assert new["digest"] != old["digest"] and [x for x in old["definitions"] if old["definitions"][x] != new["definitions"][x]] == ["norm"]

def test_bad_upstream(tmp_path, upstream, source):
    bad = tmp_path / "a [1].py"
    assert "no such file" in one_line(d, bad) and "git checkout f411b3d3" in one_line(d, bad)
    for content, words in {"": "has 0 of record #89's", "def main():\n    pass\n": "is another script",
                           "\0": "is not upstream's train_gpt.py",
                           source + "step:0/4 val_loss:10\n": f"line {source.count(chr(10)) + 1} is no Python",
                           source[:source.index("class ParamConfig")]: "a record too old"}.items():
        bad.write_text(content)
        assert words in one_line(d, bad) and "git checkout f411b3d3" in one_line(d, bad)
    assert "this project's own" in one_line(d, ROOT / "train_gpt_xla.py")
    assert "Is a directory" in one_line(d, tmp_path)
    assert "did you mean GPT.forward?" in one_line(d, upstream, "--name", "GPT.fowrard")
    assert "would overwrite" in one_line(d, upstream, "--html", upstream) and upstream.read_text() == source
    bad.write_text(source)
    d.main([str(bad), "--html", str(tmp_path / "[a].html")])
    assert (tmp_path / "[a].html").exists()

def test_a_pipe_may_close(upstream):
    run = subprocess.run(["bash", "-c", '"$0" "$@" | head -1', sys.executable, ROOT / "tools" / "diff_upstream.py", upstream],
                         capture_output=True, text=True, timeout=60)
    assert run.stderr == ""
