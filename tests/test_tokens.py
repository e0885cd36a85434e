"""
What enters a model for tools/sample.py and tools/hellaswag.py: the run's own tokens or none, and questions that are questions.

    python -m pytest tests/test_tokens.py

No model runs here: one that is asked for anything fails the test.
"""
import gzip
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_checkpoint_tools import QUESTIONS, one_line, tables

import train_gpt_xla as t

sys.path.insert(0, str(ROOT / "tools"))
import hellaswag
import sample


def run_of(vocab_size, bos_id):
    return t.Hyperparameters(run_id="", vocab_size=vocab_size, bos_id=bos_id, block_size=16)

class Model:
    """Stands for a loaded checkpoint: its run's hyperparameters, its table's rows, its windows."""
    def __init__(self, args, rows):
        self.args, self.graph = args, SimpleNamespace(ws_long=2)
        self.model = SimpleNamespace(lm_head=SimpleNamespace(weight=torch.zeros(rows, 1)))

    def __call__(self, wanted, batch):
        pytest.fail(f"{batch[:, 0].max()} enters a model of {self.args.vocab_size}")

@pytest.fixture
def gpt2(monkeypatch):
    """GPT-2's tokens, without its vocabulary: a text's words are its tokens."""
    encoder = lambda single_bytes: lambda text: np.array([50256, *map(int, text.split())], dtype=np.uint16)
    def decode(token):
        if token > 50256:
            raise KeyError(token)
        return f" {token}".encode()
    monkeypatch.setattr(sample.fineweb, "encoder", encoder)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: SimpleNamespace(decode_single_token_bytes=decode))

def test_a_text_begins_with_the_runs_own_bos():
    for bos_id, vocab_size in ((300, 301), (50256, 50257), (256, 257), (65535, 65536), (70000, 70001)):
        encode, decode = sample.tokenizer(True, run_of(vocab_size, bos_id))
        tokens = encode("né\n")
        assert tokens[0] == bos_id and tokens.max() == bos_id and decode(tokens[1:].tolist()) == "né\n"

@pytest.mark.parametrize(("single_bytes", "vocab_size", "bos_id", "rows", "words"), [
    (True, 200, 199, 256, ["vocabulary of 200", "bos_id 199", "0 to 255", "leave out --bytes"]),  # the table has room: padding
    (True, 257, 65, 384, ["bos_id 65", "0 to 255"]),
    (True, 301, 301, 384, ["vocabulary of 301", "bos_id 301"]),
    (True, 301, -1, 384, ["bos_id -1"]),
    (False, 32000, 1, 32000, ["vocabulary of 32,000", "bos_id 1,", "0 to 50,255", "--bytes", "tokenizer"]),
    (False, 50257, 0, 50304, ["bos_id 0,", "GPT-2's tokens"]),
    (False, 50256, 50255, 50304, ["vocabulary of 50,256"]),
])
def test_tokens_that_the_model_does_not_have(gpt2, monkeypatch, single_bytes, vocab_size, bos_id, rows, words):
    """Whether or not those of one text would fit by chance."""
    if single_bytes:
        monkeypatch.undo()
    for tool, argv in ((sample, ["--prompt", "7"]), (hellaswag, ["--data", QUESTIONS])):
        monkeypatch.setattr(tool, "load_model", lambda *_: Model(run_of(vocab_size, bos_id), rows))
        one_line(tool.main, ["run/state.pt", *argv, *["--bytes"] * single_bytes], "run/state.pt: ", *words)

@pytest.mark.parametrize("vocab_size", [50257, 100, 385])
def test_a_vocabulary_that_is_not_the_tables(vocab_size):
    """As where nothing tells the run's: no tool takes one that the table has no rows for, or too many."""
    state = tables(384, 48, 512, 64)
    options = lambda n: [f"--vocab_size={n}", "--bos_id=7"]
    with pytest.raises(ValueError, match=f"run/state.pt: its table has 384 rows.*vocabulary of {vocab_size:,}: give.*--vocab_size"):
        sample.get_args("run/state.pt", dict(model=state), options(vocab_size))
    assert sample.get_args("run/state.pt", dict(model=state), options(384)).vocab_size == 384

def test_gpt2s_tokens_in_a_larger_vocabulary(gpt2, capsys):
    """Of 50,304 with a document start of its own; what GPT-2 does not have comes back as a number."""
    encode, decode = sample.tokenizer(False, run_of(50304, 50300), "run/state.pt")
    assert encode("5 6").tolist() == [50300, 5, 6] and decode([5, 50290, 6]) == " 5<|50290|> 6"
    assert not capsys.readouterr().err
    sample.tokenizer(False, run_of(65000, 64999), "run/state.pt")
    assert "run/state.pt: taken for a model of GPT-2's tokens, though its vocabulary has 65,000" in capsys.readouterr().err
    _, decode = sample.tokenizer(True, run_of(301, 300))
    assert decode([64, 270, 65]) == "a<|270|>b"

@pytest.mark.parametrize("tokens", [[], [300, 301], [300, -1], [300, 50256]])
def test_ids_are_checked_where_they_enter(tokens):
    manager = Model(run_of(301, 300), 384)
    with pytest.raises(ValueError, match="301|without tokens"):
        sample.generate(manager, [[300, 1], tokens], 4, 0, 0, 0)
    with pytest.raises(ValueError, match="301|without tokens"):
        hellaswag.ending_losses(manager, [(np.array([300, 1, 2]), 1), (np.array(tokens, dtype=int), 1)], 128)

def test_a_prompt_beyond_the_window_is_told(monkeypatch, capsys):
    class Likes(Model):
        def logits(self, rows, T=None):
            assert T in (256, None) and rows[0][0] == 300
            return torch.eye(384)[64].repeat(len(rows), 1)
    monkeypatch.setattr(sample, "load_model", lambda *_: Likes(run_of(301, 300), 384))
    sample.main(["x.pt", "--bytes", "--tokens", "2", "--temperature", "0", "--prompt", "b" * 200, ""])
    out, err = capsys.readouterr()
    assert "201 tokens" in err and "looks back 32" in err and out.endswith("> \naa\n\n")

@pytest.mark.parametrize("option", [["--limit", "-1"], ["--limit", "0"], ["--limit", "x"], ["--tokens", "-128"], ["--tokens", "0"]])
def test_numbers_that_mean_nothing(option):
    one_line(hellaswag.main, ["x.pt", "--data", QUESTIONS, *option], "hellaswag.py: ", *option)
    if option[0] == "--tokens":
        one_line(sample.main, ["x.pt", *option], "sample.py: ", option[0])

# -----------------------------------------------------------------------------
# Questions

GOOD = dict(ctx="A man is", endings=["one", "two", "three", "four"], label=2)

@pytest.mark.parametrize("wrong", [
    *(dict(label=x) for x in (1.9, 1.0, True, None, -1, 4, "", "x", "4", " 1", [1], {"a": 1}, float("nan"), 1e30)),
    *(dict(endings=x) for x in ("abcd", ["a", "b", "c"], ["a"] * 5, [], ["a", "b", "c", ""], ["a", "b", " ", "d"], ["a", "b", 3, "d"],
                                ["a", "b", None, "d"], {"a": 1, "b": 2, "c": 3, "d": 4}, None)),
    *(dict(ctx=x) for x in ("", "  ", None, 3, ["a"]))])
def test_questions_of_wrong_types(tmp_path, wrong):
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD | wrong)}\n")
    one_line(hellaswag.main, ["x.pt", "--data", path], f"q.jsonl:2: {[*wrong][0]} ", "not a HellaSwag question")
    assert hellaswag.read_questions(path, 1) == [GOOD]

@pytest.mark.parametrize(("content", "words"), [
    (b'{"ctx": "m\xe9n"', ["q.jsonl:1", "0xe9", "UTF-8"]), (json.dumps(GOOD).encode("utf-16-le"), ["q.jsonl:1", "UTF-16LE"]),
    (b'{"ctx": ' + b"[" * 9999, ["q.jsonl:1", "too deep"]), (b'{"label": 1, ' + json.dumps(GOOD).encode()[1:], ["q.jsonl:1", "twice"]),
    (gzip.compress(json.dumps(GOOD).encode(), mtime=0)[:-9], ["q.jsonl", "cut off"]), (b"[]", ["q.jsonl:1", "an array"])])
def test_files_that_are_none_of_questions(tmp_path, content, words):
    (tmp_path / "q.jsonl").write_bytes(content)
    one_line(hellaswag.main, ["x.pt", "--data", tmp_path / "q.jsonl"], "hellaswag.py: ", *words)

def test_files_of_questions(tmp_path):
    """With a mark, in UTF-16, compressed; labels as text, which is how the Hub's copy has them."""
    for encoding, pack in (("utf-8-sig", bytes), ("utf-16", bytes), ("utf-8", gzip.compress)):
        path = tmp_path / "q.jsonl"
        path.write_bytes(pack("".join(json.dumps(GOOD | dict(label=label)) + "\n" for label in (2, "2")).encode(encoding)))
        assert hellaswag.read_questions(path) == [GOOD, GOOD]

def test_a_page_in_place_of_the_questions(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("<html>log in</html>")
    monkeypatch.setattr(hellaswag, "URL", page.as_uri())
    with pytest.raises(OSError, match="cannot fetch.*--data FILE"):
        hellaswag.fetch(tmp_path / "data" / "hellaswag_val.jsonl")
    assert not list((tmp_path / "data").iterdir())
    page.write_text(json.dumps(GOOD))
    hellaswag.fetch(tmp_path / "data" / "hellaswag_val.jsonl")
    assert hellaswag.read_questions(tmp_path / "data" / "hellaswag_val.jsonl") == [GOOD]
