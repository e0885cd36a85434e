"""
The loader beyond what the parity cases hold: shard ends, many short documents, the prefetch thread's errors.
    python -m pytest tests/test_loader.py
"""
import threading
import time

import numpy as np
import pytest
from conftest import BOS, make_tokens, write_shard

import train_gpt_xla as t


def loader(folder, num_tokens=512, max_seq_len=64, **kwargs):
    return t.distributed_data_generator(str(folder / "*.bin"), num_tokens, max_seq_len, bos_id=BOS, vocab_size=301, **kwargs)

def test_rows_begin_with_documents_and_targets_follow_inputs(tmp_path):
    write_shard(tmp_path / "a.bin", make_tokens(20_000, 1))
    batches = loader(tmp_path)
    for _ in range(20):
        inputs, targets, cum_seqlens = next(batches)
        assert inputs.shape == targets.shape == (8, 64) and (inputs[:, 0] == BOS).all()
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        documents = t.get_documents(cum_seqlens)
        for row, starts in zip(inputs, documents, strict=True):
            assert (np.unique(starts) == np.flatnonzero(row == BOS)).all()

def test_documents_are_cut_to_max_seq_len(tmp_path):
    write_shard(tmp_path / "a.bin", [BOS, *range(200)] * 40)
    inputs, targets, cum_seqlens = next(loader(tmp_path, num_tokens=1024, max_seq_len=50))
    assert np.diff(cum_seqlens[0])[:3].tolist() == [50, 50, 28]
    assert targets[0, 49] == BOS, "the target of a cut document's last token is the next document's first"

def test_a_step_restarts_on_the_next_shard(tmp_path):
    write_shard(tmp_path / "a.bin", [BOS, *[1] * 63] * 20)  # a row of 64 + 1 takes two: 16 for one batch, then not enough
    write_shard(tmp_path / "b.bin", [BOS, *[2] * 64] * 30)
    batches = loader(tmp_path, max_seq_len=1000)
    assert (np.unique(next(batches)[0]) == [1, BOS]).all()
    for _ in range(2):
        assert (np.unique(next(batches)[0]) == [2, BOS]).all()

def test_a_new_batch_size_takes_effect_at_once(tmp_path):
    write_shard(tmp_path / "a.bin", make_tokens(20_000, 1))
    batches = loader(tmp_path)
    next(batches)
    assert batches.send((1024, 32))[0].shape == (8, 128)

def test_many_short_documents(tmp_path):
    """More documents in a row than upstream has room for (128 here)."""
    write_shard(tmp_path / "a.bin", [BOS, 1] * 8000)
    inputs, _, cum_seqlens = next(loader(tmp_path, num_tokens=8 * 512))
    assert (t.get_documents(cum_seqlens) == np.arange(512) // 2 * 2).all()

def test_unaligned_rows_are_consecutive(tmp_path):
    tokens = make_tokens(5000, 4)
    write_shard(tmp_path / "a.bin", tokens)
    batches = loader(tmp_path, num_tokens=1024, align_to_bos=False)
    got = np.concatenate([next(batches)[0].flatten() for _ in range(3)])
    assert (got == tokens[:3072]).all()

@pytest.mark.parametrize("align", [True, False])
def test_used_up(tmp_path, align):
    write_shard(tmp_path / "a.bin", make_tokens(3000, 1))
    batches = loader(tmp_path, align_to_bos=align)
    with pytest.raises(EOFError, match="used up"):
        for _ in range(20):
            next(batches)

BATCH = (np.zeros((8, 16), np.int32), np.zeros((8, 16), np.int32), np.tile(np.int32([0, 16]), (8, 1))), t.torch.ones(5)

def test_errors_of_the_thread_are_raised_where_batches_are_taken(monkeypatch):
    monkeypatch.setattr(t, "to_device", lambda x, *spec: x)
    def batches():
        yield BATCH
        raise ValueError("the reason")
    taken = t.prefetch(batches())
    batch, numbers = next(taken)
    assert batch.shape == (8, 3, 16) and numbers is BATCH[1]
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
