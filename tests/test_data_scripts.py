"""
The scripts of data/: shards are whole or absent, downloads resume, the tokeniser loses nothing, the demo corpus is what it says.

    python -m pytest tests/test_data_scripts.py

The download is the real huggingface_hub client against a local stand-in of the Hub. Nothing here needs a network.
"""
import errno
import hashlib
import http.server
import json
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

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))
import cached_fineweb10B
import demo
import fineweb

BOS = 50256

def shard_bytes(tokens, magic=20240520, version=1, count=None):
    """A shard, built here and not by the code under test."""
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count).ljust(1024, b"\0")
    return header + np.asarray(tokens, dtype="<u2").tobytes()

def read(path):
    assert fineweb.check_shard(path) == (path.stat().st_size - 1024) // 2
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
    fineweb.write_shard(tmp_path / "a.bin", tokens)
    assert (tmp_path / "a.bin").read_bytes() == shard_bytes(tokens)
    assert fineweb.check_shard(tmp_path / "a.bin") == 5
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]

@pytest.mark.parametrize("content", [
    shard_bytes([BOS, 1, 2])[:-1], shard_bytes([BOS, 1, 2]) + b"\0", shard_bytes([BOS, 1], count=1), shard_bytes([]), b"", b"\0" * 1023,
    shard_bytes([BOS, 1, 2], magic=20240521), shard_bytes([BOS, 1, 2], version=2), shard_bytes([BOS], count=-1)])
def test_broken_shard_is_named(tmp_path, content):
    (tmp_path / "broken.bin").write_bytes(content)
    with pytest.raises(ValueError, match="broken.bin"):
        fineweb.check_shard(tmp_path / "broken.bin")

@pytest.mark.parametrize("tokens", [[], [BOS, 50257], [BOS, -1]])
def test_no_shard_of_bad_tokens(tmp_path, tokens):
    with pytest.raises(ValueError, match="a.bin"):
        fineweb.write_shard(tmp_path / "a.bin", np.array(tokens, dtype=np.int64))
    assert not list(tmp_path.iterdir())

def test_failed_write_keeps_the_old_shard(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.bin", []
    fineweb.write_shard(path, [BOS, 1])

    def full(_):
        seen.append(path.read_bytes())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*a.bin"):
        fineweb.write_shard(path, [BOS, 2, 3])
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
    import pyarrow as pa
    import pyarrow.parquet as pq
    rng = random.Random(1)
    docs = ["".join(rng.choices("abc é\n漢", k=rng.choice([1, 50, 900, 4000]))).strip("\n") + "." for _ in range(2400)]
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
    assert sum(map(len, docs)) > 2.5 * fineweb.BATCH_BYTES / 2  # several batches (counted in bytes), or workers have nothing to reorder
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

@pytest.mark.parametrize(("name", "content", "options", "words"), [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', [], ["a.jsonl:2", "not JSON"]),
    ("a.jsonl", b'{"body": "x"}\n', [], ["a.jsonl:1", "'text'", "body", "--text_key"]),
    ("a.jsonl", b'{"text": 3}\n', [], ["a.jsonl:1", "--text_key"]),
    ("a.txt", b"caf\xe9", [], ["a.txt", "0xe9", "UTF-8"]),
    ("a.parquet", b"PAR1 no", [], ["a.parquet", "not parquet"]),
    ("a.csv", b"x", [], [".jsonl"]),
    ("a.txt", b"one<|endoftext|>two", ["--val_tokens", "1000"], ["--val_tokens 1000", "8 tokens in 2"]),
    ("a.txt", b"one<|endoftext|>two", ["--workers", "0"], ["--workers", "'0'"]),
])
def test_fineweb_says_what_is_wrong(tmp_path, name, content, options, words):
    (tmp_path / name).write_bytes(content)
    one_line(fineweb.main, [tmp_path / name, "--out", tmp_path / "out", "--bytes", "--workers", 1, *options], *words)
    assert not list(tmp_path.glob("out/*"))

def test_fineweb_never_mixes_two_corpora(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "fineweb_train_000007.bin").write_bytes(shard_bytes([BOS]))
    one_line(fineweb.main, [tmp_path / "a.txt", "--out", tmp_path, "--bytes"], "fineweb_train_000007.bin", "--out")
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
    """Serves files {name: content} as the Hub does; cut: names whose next GET breaks off halfway; stall: names that stop halfway."""
    prefix = "/datasets/kjj0/fineweb10B-gpt2/resolve/main"

    def __init__(self, handler=None):
        super().__init__(("127.0.0.1", 0), handler or HubHandler)
        self.files, self.cut, self.stall, self.stalled, self.log = {}, set(), set(), threading.Event(), []

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
        if prefix != self.server.prefix or content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(name.encode()).hexdigest()}"')  # a body that a proxy spoils has the good one's
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
    assert held(place) == wanted and sorted(p.name for p in place.folder.iterdir()) == sorted(wanted)
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

def test_truncated_shard_is_named_and_fetched_again(place):
    place.folder.mkdir(parents=True)
    (place.folder / "fineweb_val_000000.bin").write_bytes(place.hub.files["fineweb_val_000000.bin"])
    (place.folder / "fineweb_train_000001.bin").write_bytes(place.hub.files["fineweb_train_000001.bin"][:-2])
    run = download(place, "1")
    assert run.returncode == 0 and "fineweb_train_000001.bin: 61,022 bytes" in run.stdout, run.stderr
    assert held(place) == {n: place.hub.files[n] for n in ("fineweb_val_000000.bin", "fineweb_train_000001.bin")}
    assert {name for _, name, _ in place.hub.log} == {"fineweb_train_000001.bin"}

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
