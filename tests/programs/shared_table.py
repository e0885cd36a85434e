"""
lookup_owned and its gradient against the whole table's: bigrams spread over all owners, in the slots that get_bigram_slots gives them; a
row whose bigrams are all of one device, which has no room for them; and such a row of few tokens, for which there is always room.
"""
import warnings

import numpy as np
import torch

import train_gpt_xla as train
from spmd import COMPILE_FAST, begin_program, device_count, enter, leave, leave_rows, to_device

V, d = 1024, 16
train.setup_devices(COMPILE_FAST)
rng = np.random.default_rng(0)
for T, same, fits in ((3072, False, True), (3072, True, False), (128, True, True)):
    ids = rng.integers(0, V, (train.ROWS, T), dtype=np.int32)
    if same:
        ids[1] %= V // device_count()
    with warnings.catch_warnings(record=True) as said:
        batch = train.pack(ids, ids, np.array([[0, T]] * train.ROWS, dtype=np.int32), ids, V)
    assert [f"more than {train.bigram_room(T)} of a row's {T} bigrams" in str(x.message) for x in said] == [True] * (not fits), said
    assert batch.shape == (train.ROWS, 5 if fits else 4, T), batch.shape
    assert train.bigram_room(T) * device_count() < 2.5 * T or T == 128
    ids, table, dy = torch.from_numpy(ids), torch.randn(V, d), torch.randn(train.ROWS, T, d)
    found, dtable = [], 0
    for rows, dy_rows in zip(train.to_devices(batch), dy.split(device_count())):
        weight = enter(to_device(table, "data"), "data").requires_grad_()
        bigrams, *slots = enter(rows, "data").unbind(1)[3:]
        begin_program()
        x = train.lookup_owned(bigrams, slots[0] if slots else None, weight)
        x.backward(enter(to_device(dy_rows, "data"), "data"))
        found.append(leave(x.detach()).cpu().flatten(0, 1))
        dtable += leave_rows(weight.grad).cpu()
    assert torch.equal(torch.cat(found), table[ids])
    torch.testing.assert_close(dtable, torch.zeros_like(table).index_add_(0, ids.flatten(), dy.flatten(0, 1)))
