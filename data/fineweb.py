"""
Your own text -> token shards that the record's loader reads.

    python data/fineweb.py INPUT... --out DIR [--shard_size N] [--val_tokens N] [--text_key text] [--workers N] [--bytes]

INPUT: .txt (documents end at <|endoftext|>, else a file is one document), .jsonl or .ndjson (a document a line), .parquet (a
document a row), or folders of these; text may be compressed (.gz, .zst, .bz2, .xz). Each file counts once, hidden ones in folders do
not, nor .json: name those that hold an object a line.
DIR gets fineweb_val_000000.bin (the first --val_tokens), then fineweb_train_000001.bin and so on, all of them or none. To train on
them: --out PLACE/data/fineweb10B, and DATA_PATH=PLACE; with run_tpu.sh also TRAIN_CHUNKS=0.

A shard is llm.c's .bin (shards.py), in which each document opens with BOS_ID. Differences from the record's fineweb.py:
- a shard ends with the document that fills it, so every shard opens with BOS_ID and none cuts a document;
- the validation shard has a size of its own, so that a corpus of less than 100M tokens leaves something to train on.
Output depends on the input and its order (folders are sorted) only, not on --workers.
"""
import argparse
import multiprocessing
import os
import shutil
import signal
import sys
from collections import defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from text import COMPRESSED, JSON_TYPES, parse_row, read_lines

import vocabulary
from shards import write_shard
from tools import command

BOS_ID = 50256  # <|endoftext|>, GPT-2's last token
SEPARATOR = "<|endoftext|>"
BATCH_CHARS = 1 << 20  # text handed to a worker at a time

# -----------------------------------------------------------------------------
# Tokens

def byte_tokens():
    """[256] uint16: byte -> GPT-2's token for it. Printable bytes come first (openai/gpt-2 encoder.py, bytes_to_unicode)."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    order = printable + [b for b in range(256) if b not in printable]
    table = np.empty(256, dtype=np.uint16)
    table[order] = np.arange(256)
    return table

def encoder(single_bytes=False, timeout=60):
    """Function text -> [n] uint16, BOS_ID first. OSError where tiktoken cannot get GPT-2's vocabulary in `timeout` seconds."""
    if single_bytes:
        table = byte_tokens()
        return lambda text: np.concatenate(([np.uint16(BOS_ID)], table[np.frombuffer(text.encode(errors="replace"), np.uint8)]))
    encoding = vocabulary.gpt2(timeout)
    return lambda text: np.array([BOS_ID, *encoding.encode_ordinary(text)], dtype=np.uint16)

# -----------------------------------------------------------------------------
# Documents: each reader yields (text, a function that tells how many bytes of the file are read)

def _open(path):
    raw = open(path, "rb")
    return raw, raw.tell if raw.seekable() else lambda: 0

def _read_txt(path, _):
    raw, place = _open(path)
    with raw:
        parts = []
        for line in read_lines(raw, path):
            if SEPARATOR in line:
                first, *others, line = line.split(SEPARATOR)
                for text in ("".join([*parts, first]), *others):
                    yield text.strip("\r\n"), place
                parts = []
            parts.append(line)
        yield "".join(parts).strip("\r\n"), place

def _text(value, where, key):
    if value is not None and type(value) is not str:
        raise ValueError(f"{where}: '{key}' holds {JSON_TYPES[type(value)]}, not text; mend the row, or name the text with --text_key")
    return value or ""

def _check_key(key, names, where):
    if key not in names:
        there = ", ".join([*names][:8]) + ", ..." * (len(names) > 8) or "nothing"
        raise ValueError(f"{where}: no '{key}' (there is: {there}); name the text with --text_key")

def _read_jsonl(path, key):
    raw, place = _open(path)
    with raw:
        for number, line in enumerate(read_lines(raw, path), 1):
            if line.strip():
                where = f"{path}:{number}"
                row = parse_row(line, where, key)
                _check_key(key, row, where)
                yield _text(row[key], where, key), place

def _read_parquet(path, key):
    import pyarrow as pa
    import pyarrow.parquet as pq
    row = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as f:
            names = f.schema_arrow.names
            _check_key(key, names, path)
            if names.count(key) > 1:
                raise ValueError(f"{path}: {names.count(key)} columns are called '{key}'; rename all but one")
            kind = f.schema_arrow.field(key).type
            values = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not any(fits(values) for fits in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)):
                raise ValueError(f"{path}: row 1: '{key}' holds {kind}, not text; cast it to string, or name the text with --text_key")
            share = path.stat().st_size / max(1, f.metadata.num_rows)
            place = lambda: round(row * share)
            for batch in f.iter_batches(columns=[key]):
                for value in batch.column(0):
                    row += 1
                    yield value.as_py() or "", place
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise ValueError(f"{path}: row {row}: byte {bad:#04x} in '{key}' is not UTF-8; write the file again from decoded text") from error
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's, not the format's
            raise
        raise ValueError(f"{path}: not parquet, or damaged ({' '.join(str(error).split())[:120]}); download or convert it again") from error

READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_jsonl, ".parquet": _read_parquet}
WANTED = f"{', '.join(READERS)} files (text also {', '.join(COMPRESSED)}) or folders of them"

def _unpacked(path):
    """The path without the ending of a compressed file."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path

def _ending(path):
    """The ending that tells how to read path, "" where nothing here can."""
    plain = _unpacked(path)
    ending = plain.suffix.lower()
    return ending if ending in READERS and (plain == path or ending != ".parquet") else ""

def _identity(path):
    status = path.stat()
    return status.st_dev, status.st_ino

def _search(folder, left_out):
    """Files below folder, linked folders too, each folder once; left_out {why: [paths]} gets the others."""
    def fail(error):
        raise error

    entered, found = {_identity(folder)}, []
    for here, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        visible = []
        for path in [Path(here, name) for name in sorted(folders)]:
            if path.name.startswith("."):
                left_out["hidden"].append(path)
            elif _identity(path) not in entered:
                entered.add(_identity(path))
                visible.append(path.name)
        folders[:] = visible  # os.walk enters these
        for path in [Path(here, name) for name in names]:
            why = ("hidden" if path.name.startswith(".") else "broken links or pipes" if not path.is_file() else
                   "of another kind" if not _ending(path) else ".json, read where it is named" if _ending(path) == ".json" else "")
            (left_out[why] if why else found).append(path)
    return sorted(found)

def find_files(inputs):
    """Files to read, in order (folders are searched to the bottom and sorted), each once; and in words what was left out."""
    files, seen, left_out = [], set(), defaultdict(list)
    for item in map(Path, inputs):
        if not item.exists():
            raise ValueError(f"{item}: no such file or folder")
        found = _search(item, left_out) if item.is_dir() else [item] if _ending(item) else []
        if not found:
            raise ValueError(f"{item}: nothing to read{_in_words(left_out)}; give {WANTED}")
        for path in found:
            names = {_identity(path), _unpacked(path.resolve())}  # a copy unpacked beside the compressed file is the same text
            (left_out["there twice"] if names & seen else files).append(path)
            seen |= names
    return files, _in_words(left_out)

def _in_words(left_out):
    words = [f"{len(paths)} {why} ({', '.join(p.name for p in sorted(paths)[:3])}{', ...' * (len(paths) > 3)})"
             for why, paths in sorted(left_out.items())]
    return f", left out: {'; '.join(words)}" if words else ""

def _batches(files, key):
    """Yields (texts, bytes of the files read so far), about BATCH_CHARS of text each."""
    texts, size, before = [], 0, 0
    for path in files:
        for text, place in READERS[_ending(path)](path, key):
            texts.append(text.lstrip("\ufeff"))  # the mark of a file that was put in here
            size += len(text) + 64  # a short document costs something, too
            if size >= BATCH_CHARS:
                yield texts, before + place()
                texts, size = [], 0
        before += path.stat().st_size
    if texts:
        yield texts, before

# -----------------------------------------------------------------------------
# Parallel tokenising

def _init_worker(single_bytes):
    global _encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _encode = encoder(single_bytes)

def _encode_batch(texts):
    return [_encode(text) for text in texts if text]  # an empty document would be a lone BOS_ID

def tokenize(files, key, workers, single_bytes):
    """Yields (list of [n] uint16 documents, bytes of the files read so far), in the order of the input."""
    # spawn: the parent may have threads (pyarrow's, tqdm's). A window, not map(): bounded memory, and a killed worker raises
    context, window = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_init_worker, initargs=(single_bytes,)) as pool:
        for texts, place in _batches(files, key):
            window.append((pool.submit(_encode_batch, texts), place))
            if len(window) > 2 * workers:
                future, place = window.popleft()
                yield future.result(), place
        for future, place in window:
            yield future.result(), place

def write_shards(files, out, key="text", shard_size=10**8, val_tokens=10_500_000, workers=1, single_bytes=False):
    """Tokenises files into out. ValueError, OSError or BrokenProcessPool where that cannot be done."""
    if not single_bytes:
        encoder()  # fail here, with one clear line, and leave the vocabulary in tiktoken's cache for the workers
    out.mkdir(parents=True, exist_ok=True)
    if old := sorted(out.glob("fineweb_*.bin")):
        from cached_fineweb10B import from_hub  # not at the top: it imports this module
        whose, way_out = ("of FineWeb, from the Hub ", "") if from_hub(out, old) else ("", "delete them or ")
        raise ValueError(f"{out}: already holds {len(old)} shards {whose}({old[0].name} first); {way_out}choose another --out")
    shard, held, index, documents, total = [], 0, 0, 0, 0
    unfinished = out / ".unfinished"  # nothing finds them there: a part of a corpus must not pass for the whole
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        with tqdm(total=sum(p.stat().st_size for p in files), unit="B", unit_scale=True) as bar:

            def flush():
                nonlocal shard, held, index
                write_shard(unfinished / f"fineweb_{'train' if index else 'val'}_{index:06d}.bin", np.concatenate(shard))
                shard, held, index = [], 0, index + 1

            for arrays, place in tokenize(files, key, workers, single_bytes):
                bar.update(place - bar.n)
                for tokens in arrays:
                    if held >= (shard_size if index else val_tokens):  # asked before adding: validation is written once training follows
                        flush()
                    shard.append(tokens)
                    held += len(tokens)
                documents, total = documents + len(arrays), total + sum(map(len, arrays))
                bar.set_postfix_str(f"{total:,} tokens, shard {index}")
            if not documents:
                raise ValueError(f"{files[0]}{' and the others' * (len(files) > 1)}: no text, nothing but empty rows")
            if index == 0:
                raise ValueError(f"{total:,} tokens in {documents:,} documents leave nothing to train on after --val_tokens {val_tokens}; "
                                 f"try --val_tokens {total // 20 + 1}" + (" and more documents" if documents < 2 else ""))
            flush()
        for path in sorted(unfinished.iterdir()):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    mean = total / documents
    print(f"{out}: {documents:,} documents, {total:,} tokens ({mean:.0f} a document), 1 validation and {index - 1} train shards")
    if mean > 2048:
        print("training reads the first 2048 tokens of a document, in its first third 896 (train_max_seq_len_schedule): cut long ones with "
              "<|endoftext|> or into rows")

def main(argv=None):
    def positive(text):
        if not (text.replace("_", "").isdecimal() and 0 < int(text) <= 10**9):
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 to 10**9")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"fineweb.py: {message} (see --help)")
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards")
    parser.add_argument("--shard_size", type=positive, default=10**8, help="tokens a train shard")
    parser.add_argument("--val_tokens", type=positive, default=10_500_000, help="tokens of validation; the record reads 10485760")
    parser.add_argument("--text_key", default="text", help="key or column that holds the text")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes")
    parser.add_argument("--bytes", action="store_true", help="GPT-2's 256 single-byte tokens: no download, about 4 times the tokens")
    args = parser.parse_args(argv)
    try:
        files, left_out = find_files(args.inputs)
        print(f"files to read: {len(files):,}{left_out}", flush=True)
        write_shards(files, args.out, args.text_key, args.shard_size, args.val_tokens, args.workers, args.bytes)
    except BrokenProcessPool:
        sys.exit(f"fineweb.py: one of {args.workers} workers was killed, most often for memory; try fewer --workers or smaller documents")
    except (ValueError, OSError) as error:
        sys.exit(f"fineweb.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"fineweb.py: stopped; nothing was written to {args.out}")

if __name__ == "__main__":
    command.run(main)
