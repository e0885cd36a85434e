"""
HellaSwag (arXiv:1905.07830): does the model find the true ending of four the likeliest? Upstream's optional evaluation.

    python tools/hellaswag.py CHECKPOINT [--data FILE.jsonl] [--limit N] [--tokens N] [--bytes]

acc: the ending with the least loss in all; acc_norm: the least loss a token, which is what upstream reports. Without --data the
validation set (10,042 questions) is fetched to data/hellaswag/. --bytes, --preset and --FIELD as for tools/sample.py.

Packed: contexts with an ending are documents in the 8 rows, --tokens of them a row. Differences from upstream's evaluation: a
document opens with BOS_ID, as in training, and two lone BOS_ID stand before it, three at a row's start. The smear, the bigram and
the key offset look one token back, across documents; this way they find the same there wherever a document lies, and its loss does
not depend on its neighbours.
"""
import argparse
import os
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import command
from sample import ROOT, ROWS, check_tokens, load_model, port, tokenizer
from text import parse_row, read_lines

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"

def fetch(path: Path):
    """Downloads the validation set to path, whole or not at all. OSError or ValueError names the way out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with urllib.request.urlopen(URL, timeout=30) as answer:
            part.write_bytes(answer.read())
        read_questions(part)  # a proxy may have sent a page of its own
    except (OSError, HTTPException, ValueError) as e:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot fetch {URL} ({e}): go online, or fetch it elsewhere and give it with --data FILE") from None
    os.replace(part, path)

def read_question(line: str, where: str) -> dict:
    """The question of a line, with ctx, four endings and label; ValueError where it has none."""
    q = parse_row(line, where, "ctx", "endings", "label")
    ctx, endings, label = (q.get(key) for key in ("ctx", "endings", "label"))
    if type(label) is str and label in ("0", "1", "2", "3"):  # the Hub's copy has them as text
        label = int(label)
    if type(ctx) is not str or not ctx.strip():
        raise ValueError(f"{where}: ctx is no text")
    if type(endings) is not list or len(endings) != 4 or any(type(x) is not str or not x.strip() for x in endings):
        raise ValueError(f"{where}: endings are not four texts")
    if type(label) is not int or not 0 <= label < 4:
        raise ValueError(f"{where}: label {label!r} is not 0, 1, 2 or 3")
    return dict(ctx=ctx, endings=endings, label=label)

def read_questions(path: Path, limit: int | None = None) -> list[dict]:
    """The first `limit` questions, one JSON object a line. ValueError names the line that is none."""
    questions = []
    with open(path, "rb") as raw:
        for i, line in enumerate(read_lines(raw, path), 1):
            try:
                questions.append(read_question(line, f"{path}:{i}"))
            except ValueError as e:
                raise ValueError(f"{e}; not a HellaSwag question (ctx, four endings and a label of 0 to 3, as JSON): the original is "
                                 f"{URL}") from None
            if len(questions) == limit:
                break
    if not questions:
        raise ValueError(f"{path} is empty: without --data the validation set is fetched")
    return questions

def get_endings(questions: list[dict], encode) -> list[tuple[np.ndarray, int]]:
    """For each ending of each question: BOS_ID, context and ending as tokens, and where the ending starts."""
    endings = []
    for q in questions:
        context = encode(q["ctx"])
        endings += [(np.concatenate([context, encode(" " + ending)[1:]]), len(context)) for ending in q["endings"]]
    return endings

def pack(endings: list[tuple[np.ndarray, int]], T: int, args: port.Hyperparameters):
    """
    Lays the endings out in rows of T, in order. Yields batches [8, 4, T] int32 (inputs, targets, where each token's document
    starts, bigrams), each with its places: (index of the ending, row, first and last + 1 of the positions whose target is in the ending).
    """
    first = 1  # bigrams at a row's positions 0 and 1 are unlike all others, so neither may stand right before a document
    def empty():
        batch = np.full((ROWS, 4, T), args.bos_id, dtype=np.int32)
        batch[:, 2] = np.arange(T)  # padding: documents of one token
        return batch, []
    def full(batch):
        batch[:, 3] = port.get_bigram_hash(batch[:, 0], args.bigram_vocab_size)
        return torch.from_numpy(batch)
    (batch, places), row, pos = empty(), 0, first
    for i, (tokens, start) in enumerate(endings):
        n = len(tokens) - 1
        if pos + 2 + n > T:
            row, pos = row + 1, first
        if row == ROWS:
            yield full(batch), places
            (batch, places), row = empty(), 0
        pos += 2  # the lone BOS_ID
        batch[row, :3, pos:pos + n] = tokens[:-1], tokens[1:], np.full(n, pos)
        places.append((i, row, pos + start - 1, pos + n))
        pos += n
    yield full(batch), places

def ending_losses(manager, endings: list[tuple[np.ndarray, int]], tokens: int) -> np.ndarray:
    """[n, 2] float64: each ending's loss, summed over its tokens and their mean."""
    T = port.next_multiple_of_n(max(tokens, max(len(x) for x, _ in endings) + 2), n=128)
    result = np.full((len(endings), 2), np.nan)
    for x, _ in endings:
        check_tokens(x, manager.args)
    for batch, places in pack(endings, T, manager.args):
        losses = manager("losses", batch).double().numpy()
        for i, row, first, stop in places:
            result[i] = losses[row, first:stop].sum(), losses[row, first:stop].mean()
    if not np.isfinite(result).all():
        raise FloatingPointError("the model's losses are not finite: try --dtype float32, or an earlier checkpoint")
    return result

def score(losses: np.ndarray, labels: list[int]) -> tuple[float, float]:
    """acc and acc_norm from losses [4 * n, 2] and the n labels."""
    return tuple((losses.reshape(-1, 4, 2).argmin(1) == np.array(labels)[:, None]).mean(0))

def main(argv: list[str] | None = None):
    def positive(text):
        if not text.isdecimal() or not int(text):
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 on")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", type=Path, metavar="FILE", help="questions, one JSON object a line")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    parser.add_argument("--tokens", type=positive, metavar="N", help="of a row; shorter rows take less memory (16384, on a CPU 1024)")
    parser.add_argument("--bytes", action="store_true", help="tokens are single bytes")
    parser.error = lambda message: sys.exit(f"hellaswag.py: {message} (see --help)")
    options, rest = parser.parse_known_args(argv)
    try:
        path = options.data or ROOT / "data" / "hellaswag" / "hellaswag_val.jsonl"
        if not options.data and not path.exists():
            fetch(path)
        questions = read_questions(path, options.limit)
        manager = load_model(options.checkpoint, rest)
        encode, _ = tokenizer(options.bytes, manager.args, options.checkpoint)
        endings = get_endings(questions, encode)
        losses = ending_losses(manager, endings, options.tokens or (16384 if port.xr.device_type() == "TPU" else 1024))
    except (ValueError, OSError, FloatingPointError) as e:
        sys.exit(f"hellaswag.py: {e}")
    acc, acc_norm = score(losses, [q["label"] for q in questions])
    n = len(questions)
    error = lambda p: (p * (1 - p) / n) ** 0.5  # standard error of a share
    print(f"HellaSwag: {n} questions, acc {acc:.4f} (+-{error(acc):.4f}), acc_norm {acc_norm:.4f} (+-{error(acc_norm):.4f}), chance 0.25")

if __name__ == "__main__":
    command.run(main)
