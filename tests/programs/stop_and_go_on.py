"""
One process trains once, with a checkpoint after every odd step, then resumes from some of them, so that the graphs are compiled once;
test_run.py looks at what that leaves in the folder it runs in. Takes the options of train_gpt_xla.py.
"""
import os
import signal
import sys

import train_gpt_xla as t

# the toy run's stages begin at steps 8 and 16, the embedding splits after step 17, a validation comes before step 14, the first
# training shard ends before step 10, the extension begins at step 24
POINTS = dict(before_a_stage=6, at_a_stage=8, after_a_stage=10, shard=10, validation=14, before_the_split=16, after_the_split=18,
              extension=26)
# the toy's own vocabulary: 12 begins with 1, and 123 with 12
VOCABULARY = {str(i).encode(): i for i in range(256)}
RUN_ON = 4  # steps after which the resumed runs are stopped, but for the last: what is the same so far stays so; `again` runs on

get_numbers, run = t.TrainingManager.get_numbers, t.TrainingManager.run
to_devices, distinct_graphs = t.GPT.to_devices, t.distinct_graphs
set_prefix_table = t.GPT.set_prefix_table


def main(*options, stop=None, by=signal.SIGTERM, poison=None):
    """stop: two signals while this step is in hand. poison: this step's numbers are not numbers. Both without a warm-up."""
    def in_hand(self, batch, numbers):
        if self.step == stop and self.graph.train:
            os.kill(os.getpid(), by)
            os.kill(os.getpid(), by)
        return run(self, batch, numbers)
    t.TrainingManager.run = in_hand
    t.TrainingManager.get_numbers = lambda self: get_numbers(self) * (float("nan") if self.step == poison else 1)
    t.distinct_graphs = distinct_graphs if stop is poison is None else lambda args, turns: {}
    try:
        t.main(sys.argv[1:] + list(options))
    except SystemExit as e:
        print("EXIT", options[1], e.code, flush=True)


def keep_initial(model, dtype):
    model = to_devices(model, dtype)
    t.torch.save(dict(model={"_orig_mod." + name: x for name, x in model.state_dict().items()}), "initial.pt")
    t.GPT.to_devices = to_devices
    return model


def keep_prefix_table(model, table):
    set_prefix_table(model, table)
    t.torch.save(t.to_host(model.prefix_table), "prefix_table.pt")
    t.GPT.set_prefix_table = set_prefix_table


if __name__ == "__main__":
    assert "jax" not in sys.modules, "importing train_gpt_xla imports no JAX"
    os.environ["WANDB_MODE"] = "offline"
    for number in (signal.SIGINT, signal.SIGHUP):  # a test in the background may find them ignored
        signal.signal(number, signal.SIG_DFL)
    t.GPT.to_devices, t.GPT.set_prefix_table = keep_initial, keep_prefix_table
    t.prefix_vocabulary = lambda args: VOCABULARY
    every = ("--save_every", "2", "--keep_checkpoints", "99")
    main("--run_id", "toy", *every, "--price", "3600", "--profile", "5:3")
    main("--run_id", "init", *every, "--seed", "9", "--init_from", "initial.pt", stop=2)
    for n in sorted(set(POINTS.values())):
        end = n + RUN_ON - 1 if n + RUN_ON < 28 else None
        main("--run_id", f"from{n}", *every, "--resume", f"logs/toy/checkpoint_step{n:06d}.pt", stop=end, by=signal.SIGHUP)
    main("--run_id", "again", "--save_every", "1000", "--wandb", stop=12, by=signal.SIGINT)
    main("--run_id", "again", "--save_every", "1000", "--wandb")
    end = open("logs/again.txt").read()
    main("--run_id", "again", "--save_every", "1000", "--resume")
    main("--run_id", "again", "--save_every", "1000", "--seed", "1")
    assert open("logs/again.txt").read() == end
    main("--run_id", "nan", "--save_every", "4", "--train_loss_every", "0", poison=9)
    main("--run_id", "bare", "--train_loss_every", "2", "--val_loss_every", "0", poison=0)
