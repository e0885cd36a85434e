"""
A corpus for the rehearsal, from text that every machine has: the source of the running Python's standard library.

    python data/demo.py [--out data/demo] [--tokens 4_000_000] [--val_tokens 300_000] [--bytes]

Writes demo_val_000000.bin and two train shards, demo_train_000001.bin and demo_train_000002.bin, of exactly the sizes asked for.
GPT-2 tokens where tiktoken can get its vocabulary within 10 s, else GPT-2's 256 single-byte tokens. The same for the same Python.
"""
import argparse
import itertools
import os
import random
import sys
import sysconfig
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from fineweb import BOS_ID, encoder

from shards import read_tokens, shard_tokens, write_shard
from tools import command

SHARDS = "demo_train_000001.bin", "demo_train_000002.bin", "demo_val_000000.bin"
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # some distributions leave the tests out, anyone adds packages
MEAN_CHARS = 1000  # of a document: near FineWeb's 400 tokens in GPT-2's, half of the longest that is read in bytes

def documents(stdlib):
    """Texts [str], shuffled: source files cut at line ends into documents of log-normal length."""
    rng, texts = random.Random(0), []
    paths = []
    for folder, names, files in os.walk(stdlib):
        names[:] = sorted(set(names) - SKIP)  # in place: os.walk goes down these, in this order
        paths += [Path(folder, file) for file in sorted(files) if file.endswith(".py")]
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (UnicodeDecodeError, OSError):
            continue
        piece, size, limit = [], 0, 0
        for line in lines:
            if size >= limit:
                texts.append("".join(piece))
                piece, size, limit = [], 0, rng.lognormvariate(np.log(MEAN_CHARS) - 0.32, 0.8)
            piece.append(line)
            size += len(line)
        texts.append("".join(piece))
    texts = [text for text in texts if text.strip()]
    rng.shuffle(texts)
    return texts

def take(arrays, n):
    """The first n tokens of arrays [*] uint16, taking no array that it does not need."""
    parts, held = [], 0
    for tokens in arrays:
        parts.append(tokens)
        held += len(tokens)
        if held >= n:
            return np.concatenate(parts)[:n]
    raise ValueError(f"the standard library has only {held:,} tokens, {n:,} asked for; ask for fewer --val_tokens")

def complete(out, sizes, single_bytes):
    """True where out holds shards of these sizes (and of single bytes, if those are asked for)."""
    try:
        if [shard_tokens(out / name) for name in SHARDS] != sizes:
            return False
    except (OSError, ValueError):
        return False
    tokens = read_tokens(out / SHARDS[-1])
    return not single_bytes or bool(((tokens < 256) | (tokens == BOS_ID)).all())

def make(out_dir=HERE / "demo", tokens=4_000_000, val_tokens=300_000, single_bytes=False):
    """Writes the corpus to out_dir unless it is there already, and says so. ValueError or OSError where that cannot be done."""
    out, sizes = Path(out_dir), [tokens - tokens // 2, tokens // 2, val_tokens]
    if min(sizes) < 1:
        raise ValueError(f"{tokens} train and {val_tokens} validation tokens; give at least 2 and 1")
    if complete(out, sizes, single_bytes):
        return print(f"{out}: there already, {tokens:,} train and {val_tokens:,} validation tokens", flush=True)
    kind = "GPT-2's single-byte tokens"
    try:
        encode = encoder(single_bytes, timeout=10)
        if not single_bytes:
            kind = "GPT-2's tokens"
    except OSError:
        encode, kind = encoder(single_bytes=True), f"{kind}, as tiktoken cannot get the vocabulary"
    texts = documents(Path(sysconfig.get_path("stdlib")))
    rest = iter(texts)
    val = take(map(encode, rest), val_tokens)
    train = map(encode, itertools.cycle(list(rest)))  # text repeats where it is too short, never the validation text
    out.mkdir(parents=True, exist_ok=True)
    (out / SHARDS[-1]).unlink(missing_ok=True)  # written last: an interrupted make is not complete
    for name, shard in zip(SHARDS, (take(train, sizes[0]), take(train, sizes[1]), val), strict=True):
        write_shard(out / name, shard)
    mean = val_tokens / (val == BOS_ID).sum()
    print(f"{out}: {tokens:,} train and {val_tokens:,} validation tokens, {mean:.0f} a document, {kind}", flush=True)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"demo.py: {message} (see --help)")
    parser.add_argument("--out", type=Path, default=HERE / "demo")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of both train shards together")
    parser.add_argument("--val_tokens", type=int, default=300_000)
    parser.add_argument("--bytes", action="store_true", help="single-byte tokens, online or not")
    args = parser.parse_args(argv)
    try:
        make(args.out, args.tokens, args.val_tokens, args.bytes)
    except (ValueError, OSError) as error:
        sys.exit(f"demo.py: {error}")

if __name__ == "__main__":
    command.run(main)
