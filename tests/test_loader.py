"""
Shards, and the loader beyond what the parity cases hold: shard ends, many short documents, bigrams, the stages' batches, the prefetch
thread's errors. And the table of prefixes, which is made from the vocabulary.
    python -m pytest tests/test_loader.py
"""
import dataclasses
import itertools
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import BOS, ROOT, make_tokens, write_shard

import shards
import train_gpt_xla as t
import vocabulary


@pytest.mark.parametrize("tokens", [[5], [0, 50256, 7], range(1000)])
def test_what_is_written_is_read(tmp_path, tokens):
    shards.write_shard(tmp_path / "a.bin", tokens)
    write_shard(tmp_path / "b.bin", tokens)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes(), "not llm.c's format"
    assert shards.shard_tokens(tmp_path / "a.bin") == len(tokens)
    assert shards.read_tokens(tmp_path / "a.bin").tolist() == list(tokens)
    assert len(list(tmp_path.iterdir())) == 2, "a temporary file is left"

@pytest.mark.parametrize("tokens, vocab_size", [([], 300), ([1, 300], 300), ([-1, 1], 300), ([65536], 70000)])
def test_what_does_not_fit_is_not_written(tmp_path, tokens, vocab_size):
    with pytest.raises(ValueError, match="a.bin"):
        shards.write_shard(tmp_path / "a.bin", np.array(tokens, dtype=np.int64), vocab_size)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("folder", ["a[1]", "a[b", "*", "x?"])
@pytest.mark.parametrize("name", ["t_0[1].bin", "t_00.bin"])
def test_names_with_characters_of_patterns(tmp_path, folder, name, monkeypatch):
    for place in (tmp_path / "x1", tmp_path / folder):
        place.mkdir()
        write_shard(place / name, [1])
    for pattern in (name, "t_*.bin"):
        assert t.find_shards(str(tmp_path / folder / pattern)) == [tmp_path / folder / name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_PATH", folder)
    args, _ = t.parse_args(["--train_files", "t_*.bin"])
    assert [file.resolve() for file in t.find_shards(args.train_files)] == [tmp_path / folder / name]

def test_patterns_of_folders_are_patterns(tmp_path):
    for folder in ("x2", "x1", "y"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "t.bin", [1])
    assert t.find_shards(str(tmp_path / "x[12]" / "t*.bin")) == [tmp_path / "x1" / "t.bin", tmp_path / "x2" / "t.bin"]

@pytest.mark.parametrize("name, words", [("fineweb_train_*.bin", "run_tpu.sh data"), ("demo_val_*.bin", "data/demo.py"),
                                         ("mine_*.bin", "data/fineweb.py"), ("", "is a folder")])
def test_no_shard(tmp_path, name, words):
    with pytest.raises((ValueError, OSError), match=f"{tmp_path}.*{words}"):
        t.find_shards(str(tmp_path / name))


def loader(folder, num_tokens=512, max_seq_len=64, **kwargs):
    return t.distributed_data_generator(str(folder / "*.bin"), num_tokens, max_seq_len, bos_id=BOS, vocab_size=301, **kwargs)

def test_rows_begin_with_documents_and_targets_follow_inputs(tmp_path):
    write_shard(tmp_path / "a.bin", make_tokens(20_000, 1))
    batches = loader(tmp_path)
    for _ in range(20):
        (inputs, targets, cum_seqlens, _), _ = next(batches)
        assert inputs.shape == targets.shape == (8, 64) and (inputs[:, 0] == BOS).all()
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        documents = t.get_documents(cum_seqlens)
        for row, starts in zip(inputs, documents, strict=True):
            assert (np.unique(starts) == np.flatnonzero(row == BOS)).all()

def test_documents_are_cut_to_max_seq_len(tmp_path):
    write_shard(tmp_path / "a.bin", [BOS, *range(200)] * 40)
    (_, targets, cum_seqlens, _), _ = next(loader(tmp_path, num_tokens=1024, max_seq_len=50))
    assert np.diff(cum_seqlens[0])[:3].tolist() == [50, 50, 28]
    assert targets[0, 49] == BOS, "the target of a cut document's last token is the next document's first"

def test_a_step_restarts_on_the_next_shard(tmp_path):
    write_shard(tmp_path / "a.bin", [BOS, *[1] * 63] * 20)  # a row of 64 + 1 takes two: 16 for one batch, then not enough
    write_shard(tmp_path / "b.bin", [BOS, *[2] * 64] * 30)
    batches = loader(tmp_path, max_seq_len=1000)
    assert (np.unique(next(batches)[0][0]) == [1, BOS]).all()
    for _ in range(2):
        assert (np.unique(next(batches)[0][0]) == [2, BOS]).all()

@pytest.mark.parametrize("align", [True, False])
def test_a_batchs_position_is_where_the_next_one_starts(tmp_path, align):
    for i in range(3):
        write_shard(tmp_path / f"{i}.bin", make_tokens(3000 + 500 * i, i))
    batches = loader(tmp_path, align_to_bos=align)
    taken = [next(batches) for _ in range(8)]
    assert {shard for _, (shard, _) in taken} >= {0, 1}
    for i in range(7):
        again = loader(tmp_path, align_to_bos=align, start=taken[i][1])
        for arrays, position in taken[i + 1:i + 4]:
            other, place = next(again)
            assert place == position and all((x == y).all() for x, y in zip(arrays, other, strict=True))

def test_shards_that_are_smaller_than_a_batch_are_passed_over(tmp_path):
    for i, n in enumerate((100, 700, 20, 513, 514)):  # a batch needs 514 tokens
        write_shard(tmp_path / f"{i}.bin", [BOS, *[i] * (n - 1)])
    batches = loader(tmp_path, align_to_bos=False)
    assert [next(batches)[0][0].max(axis=1).tolist()[1] for _ in range(2)] == [1, 4]
    with pytest.raises(EOFError, match="used up"):
        next(batches)

@pytest.mark.parametrize("align", [True, False])
def test_no_document_start(tmp_path, align):
    write_shard(tmp_path / "nobos_000.bin", np.ones(8000))
    with pytest.raises(ValueError, match=f"no document start .token {BOS}. in .*nobos_000.bin.*--bos_id"):
        next(loader(tmp_path, align_to_bos=align))

def test_a_new_batch_size_takes_effect_at_once(tmp_path):
    write_shard(tmp_path / "a.bin", make_tokens(20_000, 1))
    batches = loader(tmp_path)
    next(batches)
    assert batches.send((1024, 32))[0][0].shape == (8, 128)

def test_many_short_documents(tmp_path):
    """More documents in a row than upstream has room for (128 here)."""
    write_shard(tmp_path / "a.bin", [BOS, 1] * 8000)
    (_, _, cum_seqlens, _), _ = next(loader(tmp_path, num_tokens=8 * 512))
    assert cum_seqlens.shape == (8, 259)
    assert (t.get_documents(cum_seqlens) == np.arange(512) // 2 * 2).all()

@pytest.mark.parametrize("T, room", [(16384, 64), (32768, 96), (49152, 128), (45056, 256), (64, 128)])
def test_room_for_documents(tmp_path, T, room):
    """As much as upstream has, by the length of a row; a case's own list has precedence."""
    write_shard(tmp_path / "a.bin", [BOS, *[7] * 1099] * (9 * T // 1100 + 8))
    for lists, width in ((None, room), ({T: 80}, 80)):
        (_, _, cum_seqlens, _), _ = next(loader(tmp_path, num_tokens=8 * T, max_seq_len=2048, max_num_docs=lists))
        assert cum_seqlens.shape == (8, width)
        documents = -(-T // 1100)
        assert (cum_seqlens[:, :documents] == 1100 * np.arange(documents)).all() and (cum_seqlens[:, documents:] == T).all()

def wrapped(x: int) -> int:
    """As int32 keeps it."""
    return (x + 2**31) % 2**32 - 2**31

@pytest.mark.parametrize("rows", [1000, 377280])
@pytest.mark.parametrize("align", [True, False])
def test_bigrams(tmp_path, rows, align):
    """
    A row of the table for each token and the one before it, over the starts of documents, too. The first token has the last row, and for
    the second one that row's number stands for it.
    """
    write_shard(tmp_path / "a.bin", make_tokens(20_000, 5))
    for (inputs, _, _, bigrams), _ in itertools.islice(loader(tmp_path, align_to_bos=align, bigram_vocab_size=rows), 3):
        assert bigrams.shape == inputs.shape and bigrams.dtype == np.int32 and (bigrams[:, 0] == rows - 1).all()
        for tokens, found in zip(inputs.tolist(), bigrams.tolist(), strict=True):
            before = [None, rows - 1, *tokens[1:]]
            want = [(wrapped(36313 * b) ^ wrapped(27191 * a)) % (rows - 1) for a, b in zip(before[1:], tokens[1:])]
            assert found[1:] == want and max(want) < rows - 1

def stages_args(folder, **fields) -> t.Hyperparameters:
    """6 + 2 steps: 0 and 1, 2 and 3, 4 and 5, 6 and 7."""
    return t.Hyperparameters(**dict(
        train_files=str(folder / "t_*.bin"), val_files=str(folder / "v_*.bin"), num_scheduled_iterations=6, num_extension_iterations=2,
        train_bs_schedule=(512, 1024, 2048, 1536), train_max_seq_len_schedule=(20, 40, 60, 30), vocab_size=301, bos_id=BOS,
        bigram_vocab_size=1000, val_batch_size=1024, val_tokens=3072) | fields)

def test_batches_of_the_stages(tmp_path):
    """The length of rows and that to which documents are cut change at once; each step's numbers come with its batch."""
    for i in range(2):
        write_shard(tmp_path / f"t_{i}.bin", make_tokens(12_000, i))
    args = stages_args(tmp_path)
    numbers = [t.torch.full((1,), step) for step in range(8)]
    batches = list(t.train_batches(args, range(8), numbers))
    for step, ((inputs, _, cum_seqlens, bigrams, size), _, n) in enumerate(batches):
        stage = step // 2
        assert inputs.shape == bigrams.shape == (8, args.train_bs_schedule[stage] // 8), step
        assert np.diff(cum_seqlens).max() == args.train_max_seq_len_schedule[stage], step  # there are longer documents
        assert n is numbers[step] and bigrams.max() == size - 1 == 999
    assert batches[-1][1][0] == 1, "no shard ended"
    for first in (1, 2, 5):  # a run that goes on
        again = list(t.train_batches(args, range(first, 8), numbers[first:], batches[first - 1][1]))
        for (x, *place), (y, *other) in zip(again, batches[first:], strict=True):
            assert place == other and all(map(np.array_equal, x, y))

def test_what_is_read_ahead_is_what_the_stages_take(tmp_path):
    """read_data refuses as many tokens as train_batches cannot do with, and no more."""
    tokens = make_tokens(30_000, 3)
    write_shard(tmp_path / "v_0.bin", make_tokens(4000, 9))
    args, numbers = stages_args(tmp_path), [None] * 8
    def enough(n):
        write_shard(tmp_path / "t_0.bin", tokens[:n])
        try:
            steps = len(list(t.train_batches(args, range(8), numbers)))
        except EOFError:
            steps = 0
        try:
            t.read_data(args)
        except ValueError as e:
            assert steps == 0 and " of 8 steps" in str(e)
        else:
            assert steps == 8
        return steps == 8
    low, high = 5_000, 30_000
    assert not enough(low) and enough(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)

def test_validation_batches(tmp_path):
    """As they come: not cut, not aligned, all of them with the same numbers."""
    tokens = make_tokens(5000, 9)
    write_shard(tmp_path / "v_0.bin", tokens)
    batches = list(t.val_batches(stages_args(tmp_path), 3, numbers := t.torch.ones(1)))
    assert (np.concatenate([inputs.flatten() for (inputs, *_), _, _ in batches]) == tokens[:3072]).all()
    assert all(n is numbers and bigrams.max() == size - 1 == 999 for (*_, bigrams, size), _, n in batches)
    assert max(np.diff(cum_seqlens).max() for (_, _, cum_seqlens, *_), _, _ in batches) > 60, "cut as in training"

def test_unaligned_rows_are_consecutive(tmp_path):
    tokens = make_tokens(5000, 4)
    write_shard(tmp_path / "a.bin", tokens)
    batches = loader(tmp_path, num_tokens=1024, align_to_bos=False)
    got = np.concatenate([next(batches)[0][0].flatten() for _ in range(3)])
    assert (got == tokens[:3072]).all()

@pytest.mark.parametrize("align", [True, False])
def test_used_up(tmp_path, align):
    write_shard(tmp_path / "a.bin", make_tokens(3000, 1))
    batches = loader(tmp_path, align_to_bos=align)
    with pytest.raises(EOFError, match="used up"):
        for _ in range(20):
            next(batches)

def rows_of(n: int) -> np.ndarray:
    return np.full((8, 16), n, np.int32)

BATCH = (rows_of(1), rows_of(2), np.tile(np.int32([0, 4, 16]), (8, 1)), rows_of(3), 64), (0, 7), t.torch.ones(5)

def test_errors_of_the_thread_are_raised_where_batches_are_taken(monkeypatch):
    monkeypatch.setattr(t, "to_device", lambda x, *spec: x)
    def batches():
        yield BATCH
        raise ValueError("the reason")
    taken = t.prefetch(batches())
    (batch,), numbers, position = next(taken)
    assert (batch == t.torch.tensor([[1] * 16, [2] * 16, [0] * 4 + [4] * 12, [3] * 16, range(16)]).expand(8, -1, -1)).all()
    assert numbers is BATCH[2] and position == (0, 7)
    with pytest.raises(ValueError, match="the reason"):
        next(taken)

def test_a_closed_prefetch_stops_its_thread(monkeypatch):
    monkeypatch.setattr(t, "to_device", lambda x, *spec: x)
    before = threading.active_count()
    taken = t.prefetch(itertools.repeat(BATCH))
    next(taken)
    assert threading.active_count() == before + 1
    taken.close()
    assert threading.active_count() == before

@pytest.mark.parametrize("ends", ["with the data", "with an error"])
def test_prefetch_stops_where_nobody_takes_its_end(ends):
    """A run that stops a few steps before its end: the queue is full, and behind it waits the end or an error."""
    def batches():
        yield from [BATCH] * 3
        if ends == "with an error":
            raise ValueError("no more")
    loader = t.prefetch(batches())
    next(loader)
    time.sleep(0.5)
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive(), "the thread waits for room in the queue for ever"

# -----------------------------------------------------------------------------
# Prefixes

def longest_prefixes(size: int, byte_to_id: dict[bytes, int]) -> list[int]:
    table = [-1] * size
    for token, i in byte_to_id.items():
        others = [x for x in byte_to_id if x != token and token.startswith(x)]
        if others:
            table[i] = byte_to_id[max(others, key=len)]
    return table

@pytest.mark.parametrize("seed", range(3))
def test_prefix_table(seed):
    """Against every pair of tokens. Bytes of both ends, tokens within tokens, some of whose prefixes are none."""
    draw = random.Random(seed)
    words = {bytes(draw.choice(b"\x00ab\xff") for _ in range(draw.randint(1, 7))) for _ in range(400)}
    words = (words | {b"\xff" * n for n in (1, 3, 4, 9)} | {b"ab" * n for n in (1, 3, 4, 6)}) - {b"a", b"\x00"}
    byte_to_id = dict(zip(draw.sample(sorted(words), len(words)), draw.sample(range(500), len(words)), strict=True))
    want = longest_prefixes(512, byte_to_id)
    assert t.build_prefix_table(512, byte_to_id).tolist() == want
    assert len({len(next(w for w, i in byte_to_id.items() if i == p)) for p in want if p >= 0}) >= 4 and want.count(-1) > 20

def test_prefix_table_of_gpt2():
    reference = np.load(ROOT / "tests" / "data" / "parity" / "prefix_table_gpt2.npz")
    try:
        byte_to_id = vocabulary.gpt2(timeout=5)._mergeable_ranks
    except OSError as error:
        pytest.skip(str(error))
    table = t.build_prefix_table(50304, byte_to_id).numpy()
    assert (table == reference["table"]).all()
    assert (table >= 0).sum() == 50000 and table.sum(dtype=np.int64) == 548403601 == reference["table_sum"]

def test_whose_prefixes_are_known(tmp_path, monkeypatch):
    """GPT-2's, where there are tokens that can have any; and then there is no way around the vocabulary."""
    monkeypatch.setattr(vocabulary, "gpt2", lambda: SimpleNamespace(_mergeable_ranks={b"a": 3}))
    args = t.Hyperparameters(train_files=str(tmp_path / "*.bin"))
    write_shard(tmp_path / "a.bin", [t.BOS_ID, 255, 0, t.BOS_ID])
    assert t.prefix_vocabulary(args) == {}
    write_shard(tmp_path / "b.bin", [t.BOS_ID, 255, 256])
    assert t.prefix_vocabulary(args) == {b"a": 3}
    for other in (dict(vocab_size=50258), dict(bos_id=1)):
        assert t.prefix_vocabulary(dataclasses.replace(args, **other)) == {}
    def offline():
        raise OSError("no network")
    monkeypatch.setattr(vocabulary, "gpt2", offline)
    with pytest.raises(OSError, match="no network"):
        t.prefix_vocabulary(args)
