"""
tools/diff_upstream.py: its table, its pages, and each bad input's one line.
    python -m pytest tests/test_diff_upstream.py
"""
import hashlib
import re
import sys

import pytest
from conftest import ROOT, one_line

sys.path.insert(0, str(ROOT / "tools"))
import diff_upstream

TABLE = diff_upstream.MAP["definitions"]

def test_table_has_every_definition_of_record_60():
    """The names themselves are the table's keys; what they must be is kept as a hash, so that neither can change alone."""
    assert hashlib.sha256("\n".join(TABLE).encode()).hexdigest() == diff_upstream.MAP["names_sha256"], \
        "a definition of record #60 is missing from tools/upstream_map.json, or there is one that it does not have"

def test_table_is_not_stale():
    ours, numbered = diff_upstream.read_ours(), diff_upstream.reasons()
    used = set()
    for name, (status, counterpart, why) in TABLE.items():
        assert status in ("same", "differs", "replaced", "dropped"), name
        used |= set(re.findall(r"\bD\d+\b", why))
        if status in ("same", "differs"):
            assert name in ours and not counterpart, f"{name} is said to be here under its own name"
            assert why or status == "same", f"{name} differs for no reason"
        elif status == "replaced":
            assert counterpart and set(counterpart.split()) <= set(ours), f"{name}: {counterpart} is not here"
        else:
            assert why and not counterpart and name not in ours, f"{name} is said to be dropped"
    assert used == set(numbered), "a D number without a reason in README.md, or one that no definition has"
    assert all(len(cells) == 3 for cells in numbered.values()) and len(numbered) >= 14

@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A source with the definitions of record #60 by name, each with nothing in it: the real one is not ours to keep."""
    lines, script = ["import os", "code = 0", "os.environ['PYTORCH_ALLOC_CONF'] = 0", "dynamo.config.recompile_limit = 0"], False
    for name in list(TABLE)[3:]:
        script |= name == "args"
        if "register_fake" in name:
            lines += ["@" + name[3:-1], "def _(x):", "    return x"]
        elif not script and "." in name:
            lines += [f"    def {name.split('.')[1]}(self):", f"        return '{name}'"]
        elif script or name in ("polar_express_coeffs", "flash_attn_interface", "BOS_ID"):
            lines += [f"{name} = 0"]
        else:
            lines += [f"class {name}:", "    '<b>&'"] if name[0].isupper() and name != "XXT" else [f"def {name}(x):", "    return x"]
    path = tmp_path_factory.mktemp("upstream") / "train_gpt.py"
    path.write_text("\n".join(lines) + "\n")
    return path

def test_page_stands_alone_and_is_complete(upstream, tmp_path, capsys):
    diff_upstream.main([str(upstream), "--html", str(tmp_path / "a.html")])
    out, page = capsys.readouterr().out, (tmp_path / "a.html").read_text()
    assert "not the file of commit 0a43716d. Unknown to the table: 0 definitions; gone: 0" in out
    assert re.findall(r"^ +(\d+) (\w+)", out, re.M)[:4] == [
        (str(sum(row[0] == status for row in TABLE.values())), status) for status in ("same", "differs", "replaced", "dropped")]
    assert not re.search(r"<(img|link|script|iframe)|@import|url\(|(src|href)=.?http", page), "something is loaded from elsewhere"
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids), "a link that leads nowhere"
    for name in TABLE:
        assert f"</i>{name}</a>" in page, f"{name} is not in the table of contents"
    # every line of both sources has its place, once and in order
    rows = re.findall(r'^<tr><td class="n">(\d*)</td>.*<td class="n">(\d*)</td>', page, re.M)
    left, right = ([int(row[side]) for row in rows if row[side]] for side in (0, 1))
    assert left == list(range(1, len(upstream.read_text().splitlines()) + 1))
    ours = [x.start + k + 1 for x in diff_upstream.read_ours().values() for k in range(len(x.lines))]
    assert sorted(right) == sorted(ours) and len(ours) > 1500
    assert "&lt;b&gt;&amp;" in page and "<b>&'" not in page, "code must be escaped"
    assert '<a href="#D2">D2</a>' in page

def test_text_pairs_by_name(upstream, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    diff_upstream.main([str(upstream), "--name", "TrainingManager._build_mtp_schedule"])
    out = capsys.readouterr().out
    assert "== TrainingManager._build_mtp_schedule\n   replaced: D13: precompute calls it for each step" in out
    assert "return 'TrainingManager._build_mtp_schedule'" in out and "def get_mtp_weights(" in out and "def get_lr" not in out
    diff_upstream.main([str(upstream)])
    everything = capsys.readouterr().out
    assert re.findall(r"^== (\w+)", everything, re.M)[:3] == ["code", "mm_op", "_"]
    assert everything.count("def step_optimizers") == 2, "once on each side"

def test_align():
    left = ["a = 1", "for x in xs:", "    y = f(x, 1)", "    return y", "else:", "gone()"]
    right = ["    a = 1", "    for x in xs:", "        y = f(x, 2)", "        new()", "        return y"]
    assert diff_upstream.align(left, right) == [(0, 0, True), (1, 1, True), (2, 2, False), (None, 3, False), (3, 4, True),
                                                (4, None, False), (5, None, False)]
    assert diff_upstream.marked("f(x, 1)", "f(x, 2)") == ("f(x, <mark>1</mark>)", "f(x, <mark>2</mark>)")

def test_readme_commands_run(upstream, tmp_path, monkeypatch, capsys):
    """Each command of README.md for this tool, on a file made here."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    python tools/diff_upstream\.py ([^#\n]*)", (ROOT / "README.md").read_text(), re.M)
    for options in commands:
        diff_upstream.main(options.replace("/tmp/train_gpt.py", str(upstream)).split())
    assert commands and (tmp_path / "diff.html").exists()
    out = capsys.readouterr().out
    counts = [line.strip() for line in out.splitlines() if re.match(r" +\d+ (same|differs|replaced|dropped|new) ", line)]
    assert len(counts) == 5 and all(line in (ROOT / "README.md").read_text() for line in counts), "README.md shows other counts"

def test_a_log_holds_the_source(upstream, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(upstream.read_text() + "\n" + "=" * 100 + "\nRunning Python 3.12\n")
    assert diff_upstream.definitions(diff_upstream.read_upstream(str(log))) == diff_upstream.definitions(upstream.read_text())

def test_bad_upstream(tmp_path, upstream):
    bad = tmp_path / "bad.py"
    assert "no such file" in one_line(diff_upstream, bad) and "git show 0a43716d:train_gpt.py" in one_line(diff_upstream, bad)
    for content in ("", "step:0/4 val_loss:10\n", "def main():\n    pass\n", "\0"):
        bad.write_text(content)
        assert "is not upstream's train_gpt.py" in one_line(diff_upstream, bad)
    assert "this project's own" in one_line(diff_upstream, ROOT / "train_gpt_xla.py")
    assert "Is a directory" in one_line(diff_upstream, tmp_path)
    assert "did you mean GPT.forward?" in one_line(diff_upstream, upstream, "--name", "GPT.fowrard")
