"""
The scripts of data/: text is read or refused by name, the tokeniser loses nothing, downloads resume and are the Hub's, the demo corpus
is what it says.

    python -m pytest tests/test_data_scripts.py

The download is the real huggingface_hub client against a local stand-in of the Hub. Nothing here needs a network.
"""
import bz2
import errno
import gzip
import hashlib
import http.server
import json
import lzma
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path[:0] = [str(DATA), str(DATA.parent)]
import cached_fineweb10B
import demo
import fineweb
import text

import shards

BOS = 50256

def shard_bytes(tokens, magic=20240520, version=1, count=None):
    """A shard, built here and not by the code under test."""
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count).ljust(1024, b"\0")
    return header + np.asarray(tokens, dtype="<u2").tobytes()

def read(path):
    assert shards.shard_tokens(path) == (path.stat().st_size - 1024) // 2
    return np.fromfile(path, dtype="<u2", offset=1024)

def one_line(main, argv, *words):
    """main(argv) must exit with one line that holds all words."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    message = str(stop.value.code)
    assert "\n" not in message and all(str(word) in message for word in words), message

# -----------------------------------------------------------------------------
# Shards

def test_shard_format(tmp_path):
    tokens = [BOS, 0, 1, 198, 50255]
    shards.write_shard(tmp_path / "a.bin", tokens)
    assert (tmp_path / "a.bin").read_bytes() == shard_bytes(tokens)
    assert shards.shard_tokens(tmp_path / "a.bin") == 5
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]

@pytest.mark.parametrize("content", [
    shard_bytes([BOS, 1, 2])[:-1], shard_bytes([BOS, 1, 2]) + b"\0", shard_bytes([BOS, 1], count=1), shard_bytes([]), b"", b"\0" * 1023,
    shard_bytes([BOS, 1, 2], magic=20240521), shard_bytes([BOS, 1, 2], version=2), shard_bytes([BOS], count=-1)])
def test_broken_shard_is_named(tmp_path, content):
    (tmp_path / "broken.bin").write_bytes(content)
    with pytest.raises(ValueError, match="broken.bin"):
        shards.shard_tokens(tmp_path / "broken.bin")

@pytest.mark.parametrize("tokens", [[], [BOS, 50257], [BOS, -1]])
def test_no_shard_of_bad_tokens(tmp_path, tokens):
    with pytest.raises(ValueError, match="a.bin"):
        shards.write_shard(tmp_path / "a.bin", np.array(tokens, dtype=np.int64))
    assert not list(tmp_path.iterdir())

def test_failed_write_keeps_the_old_shard(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.bin", []
    shards.write_shard(path, [BOS, 1])

    def full(_):
        seen.append(path.read_bytes())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*a.bin"):
        shards.write_shard(path, [BOS, 2, 3])
    assert seen == [shard_bytes([BOS, 1])]  # the new tokens were not yet under the final name
    assert path.read_bytes() == shard_bytes([BOS, 1]) and list(tmp_path.iterdir()) == [path]

# -----------------------------------------------------------------------------
# Tokens

def test_byte_tokens_are_gpt2s(tmp_path, monkeypatch):
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    table = fineweb.byte_tokens()
    assert [table[b] for b in b"!A \n\0\xff"] == [0, 32, 220, 198, 188, 187]
    shifted = iter(range(256, 512))  # GPT-2's encoder.json writes unprintable bytes as the characters from 256 on
    chars = {chr(b) if 33 <= b <= 126 or b >= 161 and b != 173 else chr(next(shifted)): int(table[b]) for b in range(256)}
    (tmp_path / "encoder.json").write_text(json.dumps(chars))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = data_gym_to_mergeable_bpe_ranks(str(tmp_path / "vocab.bpe"), str(tmp_path / "encoder.json"))  # asserts that both agree
    assert ranks == {bytes([b]): table[b] for b in range(256)}

def test_gpt2_tokens():
    try:
        encode = fineweb.encoder(timeout=5)
    except OSError as error:
        pytest.skip(str(error))
    assert encode("Hello world<|endoftext|>").tolist() == [BOS, 15496, 995, 27, 91, 437, 1659, 5239, 91, 29]
    assert all(encode(chr(b)).tolist() == [BOS, fineweb.byte_tokens()[b]] for b in range(33, 127))

def test_silent_network_does_not_hang(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        env = {**os.environ, "HTTPS_PROXY": f"http://127.0.0.1:{silent.getsockname()[1]}", "TIKTOKEN_CACHE_DIR": str(tmp_path)}
        code = "import fineweb, sys\ntry: fineweb.encoder(timeout=1)\nexcept OSError as error: sys.exit(str(error))"
        run = subprocess.run([sys.executable, "-c", code], cwd=DATA, env=env, capture_output=True, text=True, timeout=20, check=False)
    assert run.returncode == 1 and "no answer in 1 s" in run.stderr and "--bytes" in run.stderr, run.stderr

# -----------------------------------------------------------------------------
# fineweb.py

def write_corpus(folder):
    """[documents] in the order in which they are to come out; several batches of text, every kind of file."""
    rng = random.Random(1)
    docs = ["".join(rng.choices("abc é\n漢", k=rng.choice([1, 50, 1000, 4000]))).strip("\n") + "." for _ in range(2400)]
    folder.mkdir()
    (folder / "a.txt").write_text("<|endoftext|>".join(docs[:800]))
    (folder / "b").mkdir()
    (folder / "b" / "x.jsonl").write_text("\n".join(json.dumps({"n": 1, "text": d}) for d in [*docs[800:1600], ""]) + "\n\n")
    pq.write_table(pa.table({"text": [*docs[1600:2399], None], "n": list(range(800))}), folder / "c.parquet")
    (folder / "d.txt").write_text(docs[2399])
    (folder / "ignored.md").write_text("no")
    return docs

def test_fineweb_loses_nothing_whatever_the_workers(tmp_path):
    docs = write_corpus(tmp_path / "in")
    assert sum(map(len, docs)) > 2 * fineweb.BATCH_CHARS  # several batches, or workers have nothing to reorder
    for workers in (1, 3):
        command = [sys.executable, DATA / "fineweb.py", tmp_path / "in", "--out", tmp_path / f"out{workers}", "--shard_size", "1_000_000",
                   "--val_tokens", "200_000", "--workers", str(workers), "--bytes"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    names = sorted(p.name for p in (tmp_path / "out1").iterdir())
    assert len(names) > 3
    assert names == [f"fineweb_train_{i:06d}.bin" for i in range(1, len(names))] + ["fineweb_val_000000.bin"]
    assert all((tmp_path / "out1" / n).read_bytes() == (tmp_path / "out3" / n).read_bytes() for n in names)
    shards = [read(tmp_path / "out1" / n) for n in names[-1:] + names[:-1]]
    longest = max(len(d.encode()) for d in docs) + 1
    for shard, size in zip(shards[:-1], [200_000] + [1_000_000] * (len(shards) - 2), strict=True):
        assert shard[0] == BOS and size <= len(shard) < size + longest
    to_byte = np.argsort(fineweb.byte_tokens())
    stream = np.concatenate(shards)
    starts = np.flatnonzero(stream == BOS)
    found = [to_byte[d[1:]].astype(np.uint8).tobytes().decode() for d in np.split(stream, starts[1:])]
    assert found == docs

def texts(*inputs):
    """The documents that fineweb.py finds, and what it says of the files."""
    files, left_out = fineweb.find_files(inputs)
    return [text for batch, _ in fineweb._batches(files, "text") for text in batch], left_out

DOCS = ["one é", "two\r\n漢\u2028字", "three"]
TXT, JSONL = "<|endoftext|>".join(DOCS), "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in DOCS)

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_every_encoding_with_a_mark(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("be") else ""
    # as if files with marks had been put together
    inner = (".txt", TXT.replace(">", ">\ufeff")), (".jsonl", JSONL.replace("{", "\ufeff{"))
    for ending, content in ((".txt", TXT), (".jsonl", JSONL), *inner):
        path = tmp_path / f"a{ending}"
        path.write_bytes((mark + content).encode(encoding))
        assert texts(path)[0] == DOCS, (ending, content)
        assert text.read_text(path).replace("\ufeff", "") == content.replace("\ufeff", "")

PACK = {".gz": gzip.compress, ".zst": zstd.compress, ".bz2": bz2.compress, ".xz": lzma.compress}

@pytest.mark.parametrize("ending", PACK)
def test_compressed_text(tmp_path, ending):
    pack, rng = PACK[ending], random.Random(0)
    (tmp_path / f"A.TXT{ending.upper()}").write_bytes(pack(TXT.encode()[:9]) + pack(TXT.encode()[9:]))  # as cat a.gz b.gz
    (tmp_path / f"b.ndjson{ending}").write_bytes(pack(JSONL.encode("utf-16")))
    (tmp_path / "c.txt").write_bytes(pack(TXT.encode()))  # whatever it is called
    assert texts(tmp_path) == (DOCS * 3, "")
    for content in ("ab".encode("utf-16") * fineweb.BATCH_CHARS, pack("ab".encode("utf-16") * fineweb.BATCH_CHARS)):
        (tmp_path / "c.txt").write_bytes(content)  # a batch ends with the file
        assert texts(tmp_path / "c.txt")[0] == ["ab" + "\ufeffab" * (fineweb.BATCH_CHARS - 1)]
    good = pack("".join(rng.choices("abc \n", k=200_000)).encode())
    bad = {"cut": good[:-20], "half": good[:len(good) // 2], "header": good[:7], "flipped": good[:-2000] + b"\0" * 9 + good[-1991:],
           "empty": b"", "plain": b"hello"}
    for name, content in bad.items():
        path = tmp_path / f"{name}.txt{ending}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.txt{ending}: .*again"):
            texts(path)

def test_zstd_windows_of_any_size(tmp_path):
    """zstd --long=31 makes frames that need more than the 128 MiB that decoders allow by default."""
    path = tmp_path / "a.txt.zst"
    with zstd.open(path, "w", options={zstd.CompressionParameter.window_log: 28}) as f:
        f.write(TXT.encode())
    assert texts(path)[0] == DOCS
    path.write_bytes(b"\x50\x2a\x4d\x18\4\0\0\0abcd" + zstd.compress(TXT.encode()))  # pzstd begins with a frame to skip
    assert texts(path)[0] == DOCS

def test_folders_are_read_as_people_expect(tmp_path):
    folder, elsewhere = tmp_path / "in[1]", tmp_path / "elsewhere"
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a.txt", "sub/B.TXT", "sub/c.ndjson", "sub/d.jsonl.gz", "notes.md", "e.csv",
                 "x.json", "f.parquet.gz", "a.txt.gz", "sub/.git/h.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = f'{{"text": "{name}"}}' if ".nd" in name or ".json" in name else name
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    elsewhere.mkdir()
    (elsewhere / "linked.txt").write_text("linked")
    (folder / "sub" / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a circle
    (folder / "twin.txt").symlink_to("a.txt")
    os.link(folder / "a.txt", folder / "hard.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    found = ["a.txt", "sub/B.TXT", "sub/c.ndjson", "sub/d.jsonl.gz", "linked"]
    docs, left_out = texts(folder)
    assert docs == found
    for words in ("3 hidden (._a.txt, .ipynb_checkpoints, .git)", "3 of another kind (e.csv, f.parquet.gz, notes.md)", "1 .json",
                  "2 broken links or pipes (gone.txt, pipe.txt)", "3 there twice (a.txt.gz, hard.txt, twin.txt)"):
        assert words in left_out, left_out
    assert texts(folder, folder / "sub", folder / "a.txt", elsewhere)[0] == found
    assert texts(folder / "x.json", folder / "._a.txt")[0] == ["x.json", "._a.txt"]  # named, so meant
    assert texts(folder / "sub" / "B.TXT", folder)[0] == ["sub/B.TXT", "a.txt", "sub/c.ndjson", "sub/d.jsonl.gz", "linked"]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "README.md").touch()
    one_line(fineweb.main, [tmp_path / "none", "--out", tmp_path / "o", "--bytes"], "none: nothing to read", "another kind (README.md)")

def table(folder, column):
    pq.write_table(pa.table({"text": column}), folder / "a.parquet")
    return folder / "a.parquet"

def test_parquet_columns_of_text(tmp_path):
    words = ["one", None, "two", "", "one"]
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        path = table(tmp_path, pa.array(words).cast(kind))
        assert texts(path)[0] == ["one", "", "two", "", "one"], kind
    for column in (pa.array([b"one"]), pa.array([["one"]]), pa.array([1]), pa.array([{"a": "b"}]), pa.array(["a"]).cast(pa.large_binary()),
                   pa.array([b"a"]).dictionary_encode()):
        with pytest.raises(ValueError, match=rf"a.parquet: row 1: 'text' holds {str(column.type).split('<')[0]}.*--text_key"):
            texts(table(tmp_path, column))
    path = table(tmp_path, pa.array(["fine"] * 99_999 + ["Zürich"]))
    path.write_bytes(path.read_bytes().replace("ü".encode(), b"\xff\xfe"))
    with pytest.raises(ValueError, match="a.parquet: row 100000: byte 0xff .*not UTF-8"):
        texts(path)
    for content in (path.read_bytes()[:-9], path.read_bytes()[:300] + b"\0" * 200 + path.read_bytes()[500:], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.parquet: "):
            texts(path)
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(ValueError, match="a.parquet: 2 columns are called 'text'"):
        texts(path)

@pytest.mark.parametrize(("name", "content", "options", "words"), [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', [], ["a.jsonl:2", "not JSON"]),
    ("a.jsonl", b'{"body": "x"}\n', [], ["a.jsonl:1", "'text'", "body", "--text_key"]),
    ("a.jsonl", b'{"text": 3}\n', [], ["a.jsonl:1", "a number", "--text_key"]),
    ("a.jsonl", b'\n{"text": ["x"]}\n', [], ["a.jsonl:2", "an array", "--text_key"]),
    ("a.jsonl", b'{"text": {"text": "x"}}\n', [], ["a.jsonl:1", "an object"]),
    ("a.jsonl", b'{"text": NaN}\n', [], ["a.jsonl:1", "a number"]),
    ("a.jsonl", b'{"text": true}\n', [], ["a.jsonl:1", "a boolean"]),
    ("a.json", b'[{"text": "x"}, {"text": "y"}]', [], ["a.json:1", "an array", "jq"]),
    ("a.json", b'{\n "text": "x"\n}', [], ["a.json:1", "not JSON"]),
    ("a.jsonl", b'{"text": "x", "a": 1, "text": "y"}', [], ["a.jsonl:1", "'text'", "twice"]),
    ("a.jsonl", b'{"text": "x"}\n{"text": "y", "n": ' + b"[" * 9999 + b"]" * 9999 + b"}", [], ["a.jsonl:2", "JSON array nested too deep"]),
    ("a.jsonl", b'{"text": ' + b'{"a": ' * 9999 + b"1" + b"}" * 10000, [], ["a.jsonl:1", "JSON object nested too deep"]),
    ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', [], ["a.jsonl:2", "byte 27", "0xe9", "UTF-8"]),
    ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), [], ["a.jsonl:1", "byte 1", "UTF-16LE"]),
    ("a.txt", b"caf\xe9", [], ["a.txt:1", "0xe9", "UTF-8", "iconv"]),
    ("a.txt", "漢\nab".encode("utf-16-le"), [], ["a.txt:2", "byte 3", "UTF-16LE"]),
    ("a.txt", "ab\n".encode("utf-16-be"), [], ["a.txt:1", "byte 0", "UTF-16BE"]),
    ("a.txt", "ab\n".encode("utf-32-le"), [], ["a.txt:1", "UTF-32LE"]),
    ("a.txt", "ab\n".encode("utf-32-be"), [], ["a.txt:1", "UTF-32BE"]),
    ("a.txt", b"one\ntwo" + b"\0" * 900, [], ["a.txt:2", "byte 7", "damaged"]),
    ("a.txt", "ab\ncd".encode("utf-16")[:-1], [], ["a.txt", "UTF-16 after line 1", "cut off"]),
    ("a.txt", b"\xff\xfea\0\n\0\0\xdca\0", [], ["a.txt", "UTF-16", "damaged"]),
    ("a.txt", "a\0b".encode("utf-16"), [], ["a.txt:1", "NUL"]),
    ("a.txt", b"", [], ["a.txt", "no text"]),
    ("a.parquet", b"PAR1 no", [], ["a.parquet", "not parquet"]),
    ("a.csv", b"x", [], [".jsonl"]),
    ("a.txt", b"one<|endoftext|>two", ["--val_tokens", "1000"], ["--val_tokens 1000", "8 tokens in 2"]),
    ("a.txt", b"one<|endoftext|>two", ["--workers", "0"], ["--workers", "'0'"]),
])
def test_fineweb_says_what_is_wrong(tmp_path, name, content, options, words):
    (tmp_path / name).write_bytes(content)
    one_line(fineweb.main, [tmp_path / name, "--out", tmp_path / "out", "--bytes", "--workers", 1, *options], *words)
    assert not list(tmp_path.glob("out/*"))

def test_a_part_of_a_corpus_never_passes_for_the_whole(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(["ten tokens"] * 9))
    out = tmp_path / "out"
    (out / ".unfinished").mkdir(parents=True)
    (out / ".unfinished" / "fineweb_train_000099.bin").touch()  # of a run that was killed
    seen, arrays = [], [[np.array([BOS, 1, 2])] * 9, None]

    def tokenize(*_):
        yield arrays[0], 1
        seen.extend(p.name for p in out.rglob("*.bin"))
        yield arrays[1], 2

    monkeypatch.setattr(fineweb, "tokenize", tokenize)
    with pytest.raises(TypeError):  # stands for whatever stops it halfway
        fineweb.write_shards([tmp_path / "a.txt"], out, shard_size=6, val_tokens=3, single_bytes=True)
    assert len(seen) > 2 and not list(out.iterdir())
    arrays[1] = [np.array([BOS, 3])]
    fineweb.write_shards([tmp_path / "a.txt"], out, shard_size=6, val_tokens=3, single_bytes=True)
    assert sorted(p.name for p in out.iterdir()) == [f"fineweb_train_{i:06d}.bin" for i in range(1, 6)] + ["fineweb_val_000000.bin"]

def test_reader_that_leaves_early():
    """As head does: the program ends without a word."""
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen([sys.executable, DATA / "fineweb.py", "--help"], stdout=write, stderr=subprocess.PIPE) as run:
        os.close(write)
        assert run.stderr.read() == b""

def test_fineweb_never_mixes_two_corpora(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "fineweb_train_000007.bin").write_bytes(shard_bytes([BOS]))
    one_line(fineweb.main, [tmp_path / "a.txt", "--out", tmp_path, "--bytes"], "fineweb_train_000007.bin", "delete them", "--out")
    status = (tmp_path / "fineweb_train_000007.bin").stat()
    cached_fineweb10B.write_note(tmp_path, {"fineweb_train_000007.bin": [status.st_size, status.st_mtime_ns, None]})
    one_line(fineweb.main, [tmp_path / "a.txt", "--out", tmp_path, "--bytes"], "1 shards of FineWeb, from the Hub", "--out")
    one_line(fineweb.main, [tmp_path / "b.txt", "--out", tmp_path / "o", "--bytes"], "b.txt", "no such")

def test_killed_worker_ends_the_run(tmp_path):
    os.mkfifo(tmp_path / "in.txt")  # so that the run cannot end before the kill
    command = [sys.executable, DATA / "fineweb.py", tmp_path / "in.txt", "--out", tmp_path / "out", "--workers", "1", "--bytes"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        with open(tmp_path / "in.txt", "w") as pipe:
            pipe.write("some words\n<|endoftext|>" * 60_000)  # more than a batch
            pipe.flush()
            deadline, worker = time.time() + 20, None
            while not worker and time.time() < deadline:
                children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
                worker = next((int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()), None)
                time.sleep(0.05)
            os.kill(worker, signal.SIGKILL)
        error = run.communicate(timeout=20)[1]
    assert run.returncode == 1 and "workers was killed" in error and "Traceback" not in error, error

# -----------------------------------------------------------------------------
# demo.py

@pytest.fixture(scope="module")
def demo_corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    demo.make(out, single_bytes=True)
    return out

def test_demo_corpus(demo_corpus, tmp_path):
    shards = {p.name: read(p) for p in demo_corpus.iterdir()}
    assert {n: len(s) for n, s in shards.items()} == {
        "demo_val_000000.bin": 300_000, "demo_train_000001.bin": 2_000_000, "demo_train_000002.bin": 2_000_000}
    for shard in shards.values():
        lengths = np.diff(np.flatnonzero(shard == BOS))
        assert shard[0] == BOS and shard[shard != BOS].max() < 256
        assert 500 < lengths.mean() < 1500 and lengths.min() < 100 and (lengths > 2048).mean() > 0.02
    demo.make(tmp_path, single_bytes=True)
    assert all(read(tmp_path / n).tobytes() == s.tobytes() for n, s in shards.items())

def test_demo_is_made_once_and_mended(demo_corpus, tmp_path):
    shutil.copytree(demo_corpus, tmp_path, dirs_exist_ok=True)
    good = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    demo.make(tmp_path, single_bytes=True)
    assert all(p.stat().st_mtime_ns == good[p.name][0] for p in tmp_path.iterdir())
    os.truncate(tmp_path / "demo_train_000002.bin", 5000)
    demo.make(tmp_path, single_bytes=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {n: content for n, (_, content) in good.items()}
    demo.make(tmp_path, tokens=1001, val_tokens=300, single_bytes=True)
    assert [len(read(p)) for p in sorted(tmp_path.iterdir())] == [501, 500, 300]

def test_demo_of_another_kind_is_made_again(tmp_path):
    for name, size in zip(demo.SHARDS, (50, 50, 20), strict=True):
        (tmp_path / name).write_bytes(shard_bytes([BOS] + [40000] * (size - 1)))
    demo.make(tmp_path, tokens=100, val_tokens=20)  # GPT-2 tokens will do
    assert read(tmp_path / demo.SHARDS[0])[1] == 40000
    demo.make(tmp_path, tokens=100, val_tokens=20, single_bytes=True)
    assert all(read(tmp_path / name)[1:].min() < 256 for name in demo.SHARDS)

def test_demo_interrupted_is_not_complete(demo_corpus, tmp_path, monkeypatch):
    shutil.copytree(demo_corpus, tmp_path, dirs_exist_ok=True)
    write, sizes = demo.write_shard, [2_000_000, 2_000_000, 200_000]

    def stop_after_first(path, tokens):
        if path.name == demo.SHARDS[1]:
            raise KeyboardInterrupt
        write(path, tokens)

    monkeypatch.setattr(demo, "write_shard", stop_after_first)
    with pytest.raises(KeyboardInterrupt):
        demo.make(tmp_path, val_tokens=200_000, single_bytes=True)
    assert not demo.complete(tmp_path, sizes, True) and not demo.complete(tmp_path, [*sizes[:2], 300_000], True)

def test_demo_repeats_only_training_text(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "documents", lambda _: [chr(65 + i) * 99 for i in range(20)])  # 100 tokens each
    demo.make(tmp_path, tokens=10_000, val_tokens=500, single_bytes=True)
    train, val = np.concatenate([read(tmp_path / n) for n in demo.SHARDS[:2]]), read(tmp_path / demo.SHARDS[2])
    assert len(np.unique(val)) == 6 and len(np.unique(train)) == 16 and not set(val) & set(train) - {BOS}
    with pytest.raises(ValueError, match="val_tokens"):
        demo.make(tmp_path, val_tokens=2001, single_bytes=True)
    with pytest.raises(ValueError, match="val_tokens"):
        demo.make(tmp_path, val_tokens=2000, single_bytes=True)

def test_demo_without_network_falls_back(tmp_path):
    env = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:1", "TIKTOKEN_CACHE_DIR": str(tmp_path / "none")}
    command = [sys.executable, DATA / "demo.py", "--out", tmp_path / "out", "--tokens", "5000", "--val_tokens", "500"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.count("\n") == 1 and "single-byte" in run.stdout and not run.stderr, run
    assert read(tmp_path / "out" / demo.SHARDS[2]).size == 500

# -----------------------------------------------------------------------------
# cached_fineweb10B.py, against a stand-in of the Hub

class Hub(http.server.ThreadingHTTPServer):
    """
    Serves files {name: content} as the Hub does; cut: names whose next GET breaks off halfway; stall: names that stop halfway; spoiled:
    what a proxy sends instead {name: content}; status: what it answers to anything, if not 200.
    """
    prefix = "/datasets/kjj0/fineweb10B-gpt2/resolve/main"

    def __init__(self, handler=None):
        super().__init__(("127.0.0.1", 0), handler or HubHandler)
        self.files, self.cut, self.stall, self.stalled, self.log = {}, set(), set(), threading.Event(), []
        self.spoiled, self.status = {}, 200

class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        prefix, _, name = self.path.rpartition("/")
        content, wanted = self.server.files.get(name), self.headers.get("Range")
        if name.endswith(".bin"):  # the client also asks for things that are no shards
            self.server.log.append((self.command, name, wanted))
        if self.server.status != 200:
            self.send_response(self.server.status)
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if prefix != self.server.prefix or content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        etag = hashlib.sha256(content).hexdigest()
        content = self.server.spoiled.get(name, content)
        first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if not body:
            return None
        if name in self.server.cut | self.server.stall:
            self.wfile.write(content[first:len(content) // 2])
            self.wfile.flush()
            if name in self.server.stall:
                self.server.stalled.set()
                time.sleep(3)
            self.server.cut.discard(name)
            self.close_connection = True
            return None
        self.wfile.write(content[first:])

    def log_message(self, *_):
        pass

Place = namedtuple("Place", "hub folder env")

@pytest.fixture
def place(tmp_path):
    """A Hub with validation and 3 train shards, and an empty DATA_PATH."""
    hub = Hub()
    rng = np.random.default_rng(0)
    for name in ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3)]:
        hub.files[name] = shard_bytes(rng.integers(0, BOS, 30_000))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1",
           "HF_HUB_OFFLINE": "0", "DATA_PATH": str(tmp_path / "place")}
    yield Place(hub, tmp_path / "place/data/fineweb10B", env)
    hub.shutdown()
    hub.server_close()

def download(place, *argv, before=""):
    """Runs the script in a process of its own; `before` is Python to run first."""
    code = f"{before}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(DATA / "cached_fineweb10B.py"), *argv]
    return subprocess.run(command, env=place.env, capture_output=True, text=True, timeout=30, check=False)

def held(place):
    return {p.name: p.read_bytes() for p in place.folder.iterdir() if p.suffix == ".bin"}

def failed(run, *words):
    """The run must have ended with one line that holds all words, and no traceback."""
    last = run.stderr.rstrip().rpartition("\n")[2]
    assert run.returncode == 1 and "Traceback" not in run.stderr and all(word in last for word in words), run.stderr

def test_download_then_nothing_more_to_fetch(place):
    run = download(place, "2")
    assert run.returncode == 0, run.stderr
    wanted = {n: place.hub.files[n] for n in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin")}
    assert held(place) == wanted and sorted(p.name for p in place.folder.iterdir()) == sorted([*wanted, "hub.json"])
    assert "size and sha256" in run.stdout
    place.hub.log.clear()
    run = download(place, "2")
    assert run.returncode == 0 and "0 fetched" in run.stdout and place.hub.log == [], run.stderr
    assert download(place, "3").returncode == 0
    assert [name for method, name, _ in place.hub.log if method == "GET"] == ["fineweb_train_000003.bin"]

def test_broken_connection_is_resumed(place):
    place.hub.files["fineweb_val_000000.bin"] = shard_bytes(np.arange(12_000_000) % BOS)  # the client writes 10 MiB at a time
    place.hub.cut.add("fineweb_val_000000.bin")
    run = download(place, "0")
    assert run.returncode == 0, run.stderr
    assert held(place) == {"fineweb_val_000000.bin": place.hub.files["fineweb_val_000000.bin"]}
    assert [wanted for method, _, wanted in place.hub.log if method == "GET"] == [None, f"bytes={10 * 2**20}-"]

def test_killed_download_leaves_no_half_file(place):
    place.hub.stall.add("fineweb_train_000001.bin")
    run = subprocess.Popen([sys.executable, DATA / "cached_fineweb10B.py", "1"], env=place.env, stderr=subprocess.DEVNULL)
    assert place.hub.stalled.wait(20)
    time.sleep(0.3)  # for the client to write what it got
    run.kill()
    run.wait()
    assert set(held(place)) == {"fineweb_val_000000.bin"}
    place.hub.stall.clear()
    place.hub.log.clear()
    assert download(place, "1").returncode == 0
    assert held(place) == {n: place.hub.files[n] for n in ("fineweb_val_000000.bin", "fineweb_train_000001.bin")}
    assert {name for _, name, _ in place.hub.log} == {"fineweb_train_000001.bin"}
    assert not (place.folder / ".incoming").exists()

def test_broken_shards_are_named_and_fetched_again(place):
    """One that is cut off, one whose second half was never written, and one that has been there for long."""
    place.folder.mkdir(parents=True)
    val, first, second = (place.hub.files[n] for n in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"))
    (place.folder / "fineweb_val_000000.bin").write_bytes(val)
    (place.folder / "fineweb_train_000001.bin").write_bytes(first[:-2])
    (place.folder / "fineweb_train_000002.bin").write_bytes(second[:30_000] + bytes(len(second) - 30_000))
    run = download(place, "2")
    assert run.returncode == 0, run.stderr
    assert "fineweb_train_000001.bin: header promises 30000 tokens" in run.stdout
    assert "fineweb_train_000002.bin: zeros from byte 30,720 on" in run.stdout
    assert list(held(place).values()).count(val) == 1 and held(place)["fineweb_train_000001.bin"] == first
    assert held(place)["fineweb_train_000002.bin"] == second
    assert {name for method, name, _ in place.hub.log if method == "GET"} == {"fineweb_train_000001.bin", "fineweb_train_000002.bin"}

def test_what_a_proxy_spoils_is_not_taken(place):
    good = place.hub.files["fineweb_val_000000.bin"]
    place.hub.spoiled["fineweb_val_000000.bin"] = good[:-2] + b"ab"  # of the right size, and a shard
    failed(download(place, "0"), "fineweb_val_000000.bin", "sha256", "HF_ENDPOINT")
    assert held(place) == {}

def test_a_token_that_expired(place):
    place.hub.status = 401
    failed(download(place._replace(env={**place.env, "HF_TOKEN": "hf_old"}), "0"), "401", "refuses HF_TOKEN", "hf auth login")

@pytest.mark.parametrize(("status", "token", "words"), [
    (401, None, ["401", "wants a token"]), (403, "hf_old", ["403", "refuses HF_TOKEN"]), (404, None, ["404", "HF_ENDPOINT"]),
    (503, None, ["503", "the Hub is there", "wait"])])
def test_what_the_hub_answers_is_told(folder, monkeypatch, status, token, words):
    """Also where there is nothing to fetch, only to compare."""
    def ask_hub(name):
        error = RuntimeError(f"{status} for {name}")
        error.response = SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setattr(cached_fineweb10B, "ask_hub", ask_hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setenv("HF_TOKEN", token or "")
    folder.put(0, VAL)
    one_line(cached_fineweb10B.main, ["0"], *words)

def test_what_is_no_shard_is_refused_by_name(place):
    good = place.hub.files["fineweb_train_000001.bin"]
    place.hub.files["fineweb_train_000001.bin"] = shard_bytes([BOS] * 100, magic=7)
    failed(download(place, "2"), "fineweb_train_000001.bin", "magic number 7", "HF_ENDPOINT")
    assert set(held(place)) == {"fineweb_val_000000.bin"}
    place.hub.files["fineweb_train_000001.bin"] = good
    assert download(place, "1").returncode == 0 and held(place)["fineweb_train_000001.bin"] == good

def test_shard_that_the_hub_lacks(place):
    del place.hub.files["fineweb_train_000002.bin"]
    failed(download(place, "3"), "fineweb_train_000002.bin", "404")
    assert set(held(place)) == {"fineweb_val_000000.bin", "fineweb_train_000001.bin"}

def test_no_network(place):
    place.env["HF_ENDPOINT"] = "http://127.0.0.1:1"
    run = download(place, "1", before="import time; time.sleep = lambda s: None")  # the client waits 23 s between its tries
    failed(run, "fineweb_val_000000.bin", "ConnectError", "check the network")

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where shards go, and a Hub that says what it has (tokens, by name) and sends nothing."""
    has = {"fineweb_val_000000.bin": [BOS, 5, 6], "fineweb_train_000001.bin": [BOS, 7], "fineweb_train_000002.bin": [BOS, 8, 9]}

    def ask_hub(name, **_):
        if has is None or "offline" in has:
            raise ConnectionError("no network")
        content = shard_bytes(has[name]) if name in has else None
        return content and SimpleNamespace(size=len(content), etag=hashlib.sha256(content).hexdigest())

    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    monkeypatch.setattr(cached_fineweb10B, "ask_hub", ask_hub)
    monkeypatch.setattr(cached_fineweb10B, "get", lambda folder, name, _: pytest.fail(f"{name} is fetched into {list(folder.iterdir())}"))
    folder = tmp_path / "data" / "fineweb10B"
    folder.mkdir(parents=True)
    return namedtuple("Folder", "path has put")(folder, has, lambda i, tokens: (
        folder / f"fineweb_{'train' if i else 'val'}_{i:06d}.bin").write_bytes(shard_bytes(tokens)))

VAL, ONE, TWO = [BOS, 5, 6], [BOS, 7], [BOS, 8, 9]  # the Hub's

@pytest.mark.parametrize(("tokens", "n", "words"), [
    ({0: [BOS, 1, 2, 3], 1: [BOS, 4, 5]}, 1, ["2 of 2", "fineweb_train_000001.bin: 1,030 bytes instead of 1,028"]),  # all one's own
    ({0: [BOS, 1, 2, 3], 1: [BOS, 4, 5]}, 2, ["2 of 2", "0 in place of N"]),
    ({0: VAL, 1: [BOS, 6]}, 1, ["1 of 2", "fineweb_train_000001.bin: of the same size, but sha256", "delete"]),  # of the same size
    ({0: VAL, 1: [BOS, 6]}, 0, ["1 of 2", "fineweb_train_000001.bin"]),  # beyond what is asked for, but training would read it
    ({0: VAL, 1: ONE, 104: [BOS, 4]}, 1, ["fineweb_train_000104.bin: no such file there"]),
    ({1: [BOS, 4, 5]}, 0, ["1 of 1"]),  # FineWeb's validation does not go beside them
    ({0: [BOS, 1, 2, 3]}, 0, ["1 of 1"]),
    ({0: [BOS, 1, 2, 3], 1: [BOS, 4, 5], 2: [0] * 2000}, 2, ["3 of 3", "fineweb_train_000002.bin: zeros from byte 1,024"]),
])
def test_shards_of_another_origin_are_not_mixed(folder, tokens, n, words):
    for i, content in tokens.items():
        folder.put(i, content)
    before = {p: p.read_bytes() for p in folder.path.iterdir()}
    one_line(cached_fineweb10B.main, [n], folder.path, "kjj0/fineweb10B-gpt2", "DATA_PATH", *words)
    assert {p: p.read_bytes() for p in folder.path.iterdir()} == before

def test_own_shards_are_left_alone(folder, capsys):
    """TRAIN_CHUNKS=0 bash run_tpu.sh trains on them."""
    folder.put(0, [BOS, 1, 2, 3])
    folder.put(1, [BOS, 4, 5])
    cached_fineweb10B.main(["0"])
    assert "2 shards of your own, not kjj0/fineweb10B-gpt2's" in capsys.readouterr().out
    folder.has["offline"] = True
    cached_fineweb10B.main(["0"])
    assert "cannot be told (ConnectionError: no network)" in capsys.readouterr().out

def test_what_was_compared_is_remembered(folder, capsys, monkeypatch):
    say = lambda n: (cached_fineweb10B.main([n]), capsys.readouterr().out)[1]
    for i, tokens in enumerate((VAL, ONE, TWO)):
        folder.put(i, tokens)
    assert "2 shards complete, 0 fetched now; they are kjj0/fineweb10B-gpt2's by size and sha256" in say("1")
    folder.has["offline"] = True
    assert "3 shards complete" in say("2")
    hashed = []
    monkeypatch.setattr(cached_fineweb10B, "sha256", lambda path, sha256=cached_fineweb10B.sha256: hashed.append(path.name) or sha256(path))
    assert "3 shards complete" in say("2") and not hashed
    os.utime(folder.path / "fineweb_train_000001.bin", (1, 1))  # as a copy that keeps no times
    assert "3 shards complete" in say("2") and "3 shards complete" in say("2") and hashed == ["fineweb_train_000001.bin"]
    folder.put(2, [BOS, 8, 8])
    assert "cannot be told" in say("2")
    del folder.has["offline"]
    one_line(cached_fineweb10B.main, ["2"], "fineweb_train_000002.bin: of the same size, but sha256")
    folder.put(2, TWO)
    for note in ("", "[]", '{"kjj0/fineweb10B-gpt2": {"fineweb_val_000000.bin": 3}}', '{"kjj0/fineweb10B-gpt2": {"a": [1, "x", null]}}'):
        (folder.path / "hub.json").write_text(note)
        assert "3 shards complete" in say("2"), note
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    (folder.path / "hub.json").unlink()
    out = say("2")
    assert "3 shards complete" in out and "hub.json: Read-only file system" in out

def test_hub_that_tells_no_hash(folder, capsys, monkeypatch):
    monkeypatch.setattr(cached_fineweb10B, "ask_hub", lambda name, **_: SimpleNamespace(size=1030, etag='W/"12"'))
    folder.put(0, VAL)
    cached_fineweb10B.main(["0"])
    assert "by size (the Hub told no sha256)" in capsys.readouterr().out

def test_disk_full(place, tmp_path):
    patch = "import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9e9, 8e9, 1e9)"
    failed(download(place, "9", before=patch), "10 shards take 2.0 GB", "1.0 GB free", "DATA_PATH")
    assert place.hub.log == []
    patch = "import huggingface_hub\ndef full(**_): raise OSError(28, 'No space left on device')\nhuggingface_hub.hf_hub_download = full"
    failed(download(place, "1", before=patch), "fineweb_val_000000.bin", "No space left", "is full", "DATA_PATH")
    (tmp_path / "place2").write_text("a file")
    failed(download(place._replace(env={**place.env, "DATA_PATH": str(tmp_path / "place2")}), "1"), "place2", "DATA_PATH")

@pytest.mark.parametrize("argv", [["104"], ["-1"], ["nine"], ["1", "2"], ["1.5"], [""]])
def test_number_of_shards(argv):
    one_line(cached_fineweb10B.main, argv, f"'{' '.join(argv)}'", "0 to 103")

def test_data_folder(monkeypatch):
    monkeypatch.delenv("DATA_PATH", raising=False)
    assert cached_fineweb10B.data_folder() == DATA / "fineweb10B"
    monkeypatch.setenv("DATA_PATH", "/somewhere")
    assert cached_fineweb10B.data_folder() == Path("/somewhere/data/fineweb10B")
