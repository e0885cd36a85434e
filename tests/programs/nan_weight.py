"""train_gpt_xla.py with a weight that is not a number, as an overflow would leave it, and no warm-up: what runs before the end compiles."""
import train_gpt_xla as t

to_devices = t.GPT.to_devices

def poisoned(model, dtype):
    model.blocks[4].mlp.c_fc.data[0, 0] = float("nan")
    return to_devices(model, dtype)

t.GPT.to_devices = poisoned
t.distinct_graphs = lambda args, turns: {}
t.main()
