"""
Shards, and the loader beyond what the parity cases hold: shard ends, many short documents, the prefetch thread's errors.
    python -m pytest tests/test_loader.py
"""
import threading
import time

import numpy as np
import pytest
from conftest import BOS, make_tokens, write_shard

import shards
import train_gpt_xla as t


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
        (inputs, targets, cum_seqlens), _ = next(batches)
        assert inputs.shape == targets.shape == (8, 64) and (inputs[:, 0] == BOS).all()
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        documents = t.get_documents(cum_seqlens)
        for row, starts in zip(inputs, documents, strict=True):
            assert (np.unique(starts) == np.flatnonzero(row == BOS)).all()

def test_documents_are_cut_to_max_seq_len(tmp_path):
    write_shard(tmp_path / "a.bin", [BOS, *range(200)] * 40)
    (inputs, targets, cum_seqlens), _ = next(loader(tmp_path, num_tokens=1024, max_seq_len=50))
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
    (_, _, cum_seqlens), _ = next(loader(tmp_path, num_tokens=8 * 512))
    assert (t.get_documents(cum_seqlens) == np.arange(512) // 2 * 2).all()

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

BATCH = (np.zeros((8, 16), np.int32), np.zeros((8, 16), np.int32), np.tile(np.int32([0, 16]), (8, 1))), (0, 7), t.torch.ones(5)

def test_errors_of_the_thread_are_raised_where_batches_are_taken(monkeypatch):
    monkeypatch.setattr(t, "to_device", lambda x, *spec: x)
    def batches():
        yield BATCH
        raise ValueError("the reason")
    taken = t.prefetch(batches())
    (batch,), numbers, position = next(taken)
    assert batch.shape == (8, 3, 16) and numbers is BATCH[2] and position == (0, 7)
    with pytest.raises(ValueError, match="the reason"):
        next(taken)

def test_a_closed_prefetch_stops_its_thread(monkeypatch):
    import itertools
    import threading
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
