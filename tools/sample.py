"""
Text from a checkpoint, of this project or of upstream (logs/RUN_ID/state_step*.pt), on TPU or CPU.

    python tools/sample.py CHECKPOINT [--prompt TEXT ...] [--tokens 64] [--temperature 0.8] [--top_k 50] [--seed 0] [--bytes]

Eight prompts at a time, one a row; a standard list where none is given. --temperature 0 takes the likeliest token. --bytes: single
bytes as tokens, for a model trained on them (the rehearsal's is). The model's sizes come from the checkpoint, its schedule (windows,
YaRN) from the run's log beside it (logs/RUN_ID.txt), else from the preset with these sizes, else from the record; --preset and --FIELD
as in training go before all that.

The first token takes a forward pass over [8, T], which leaves keys and values of each layer in a cache; each further one takes a forward
pass over the last 16 tokens of each row. T is fixed, so these two compiled graphs serve all positions: what comes after a position does
not change it.
"""
import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch_xla.distributed.spmd as xs
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import command
import fineweb
from run_log import WATCHING, Log, configuration, first_difference, only, read_runs, source_hyperparameters, why_not

import train_gpt_xla as port
from checkpoint import load_weights
from chips import RECORD
from spmd import ROWS, begin_program, enter, leave, shard, to_device, to_host

PROMPTS = ["The capital of France is", "Once upon a time, there was", "The opposite of hot is", "Water boils at",
           "The first thing to do when baking bread is", "In 1969, astronauts", "def main():\n    ", "import os\nimport "]

def get_sizes(path: str, state: dict[str, Tensor]) -> dict[str, int]:
    """Hyperparameters that the shapes tell. ValueError where a table is missing or is none."""
    names = "embed.weight", "bigram_embed.weight", "bigram_sign_table"
    for name in names:
        if name not in state or state[name].ndim != 2:
            what = f"of shape {tuple(state[name].shape)}, not a table" if name in state else "missing"
            raise ValueError(f"{path}: {name} is {what}, so this is not a model of record #{RECORD}: --save_checkpoint true writes one")
    (_, model_dim), (bigram_vocab_size, bigram_dim), (rows, _) = (state[name].shape for name in names)
    return dict(head_dim=model_dim // port.Hyperparameters.num_heads, model_dim=model_dim, bigram_vocab_size=bigram_vocab_size,
                bigram_dim=bigram_dim, bigram_sign_table_rows=rows)

def find_log(path: str, checkpoint: dict, given: Path | None = None, figures: bool = True) -> Log | None:
    """
    The log of the run that had these weights, for its figures or for its hyperparameters alone: the given one, else logs/RUN_ID.txt
    beside the checkpoint's folder. None where there is none or where it is another run's; says on stderr why. ValueError, OSError for
    a given one that is no log of one run.
    """
    file = given or Path(f"{Path(path).resolve().parent}.txt")
    if not given and not file.is_file():
        return None
    sizes = get_sizes(path, checkpoint["model"]) | dict(vocab_size=len(checkpoint["model"]["embed.weight"]))
    named = given or not figures or "run_id" in checkpoint  # else only the names of folder and log say that they belong together
    try:
        runs = read_runs(str(file), started=figures)
        reasons = [why_not(run, checkpoint, sizes) for run in runs]
        fitting = [run for run, reason in zip(runs, reasons) if reason is None]
        if not fitting:
            why = f"{file} is not the log of {path}: {reasons[-1]}"
        elif not named and fitting[-1].hyperparameters.get("run_id", file.stem) != file.stem:
            why = (f"{file} is of a run called {fitting[-1].hyperparameters['run_id']}, so it is another's, or was renamed: --log {file} "
                   f"if it is the log of {path}")
        elif not given and not fitting[-1].hyperparameters and not (fitting[-1].codes and checkpoint.get("code")):
            why = f"{file} has neither hyperparameters nor a source that would show it to be the log of {path}"
        else:
            alike = not any(first_difference(fitting[-1], run, WATCHING | {"seed"}) for run in fitting)
            return fitting[-1] if alike and not figures else only(fitting)
    except ValueError as e:
        if given:
            raise
        why = str(e)
    print(f"{'figures' if figures else 'hyperparameters'} left out: {why}", file=sys.stderr)
    return None

def recorded_options(path: str, checkpoint: dict, log: Path | None = None) -> list[str]:
    """
    The run's hyperparameters as options, from the checkpoint, its log (find_log) or, because upstream's script takes no options, its
    source; none where nothing tells them. Says on stderr which of them this script does not take.
    """
    args, code = checkpoint.get("hyperparameters"), checkpoint.get("code", "")
    if not args:
        found = find_log(path, checkpoint, log, figures=False)
        args = configuration(found) if found else {} if "torch_xla" in code else source_hyperparameters(code)
    kinds, taken, others = {f.name: f.type for f in dataclasses.fields(port.Hyperparameters)}, [], []
    for name, value in args.items():
        kind = int if type(value) is int and kinds.get(name) is float else kinds.get(name)
        if name not in WATCHING:
            (taken if type(value) is kind else others).append(f"--{name}={value}")
    if others := [option for option in others if not option.startswith("--num_iterations=")]:  # the sum of the other two, in upstream's
        print(f"{path}: of its run's hyperparameters left out, because this script has no such: {' '.join(others)}", file=sys.stderr)
    return taken

def get_args(path: str, checkpoint: dict, options: list[str], log: Path | None = None) -> "port.Hyperparameters":
    """
    The run's hyperparameters: as it wrote them down, else a preset's, which is said on stderr; options, training's, go before. Sizes
    are the checkpoint's. ValueError, OSError.
    """
    for name, kind in dict(step=int, code=str, hyperparameters=dict, run_id=str).items():
        if type(value := checkpoint.get(name, kind())) is not kind or name == "step" and value < 0:
            raise ValueError(f"{path}: its {name} is {str(value)[:80]!r} ({type(value).__name__}), as neither this script nor upstream's "
                             "writes it")
    sizes = get_sizes(path, checkpoint["model"])
    if not any(option.startswith("--preset") for option in options):
        recorded = recorded_options(path, checkpoint, log)
        if not recorded:
            fits = [name for name, make in port.presets.items() if all(getattr(make(), k) == v for k, v in sizes.items())]
            recorded = ["--preset", (fits or ["record"])[0]]
            print(f"{path}: nothing tells its run's hyperparameters, so those of --preset {recorded[1]} are taken", file=sys.stderr)
        options = recorded + options
    args = dataclasses.replace(port.parse_args(options)[0], **sizes)
    try:
        port.check_args(args)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    rows = len(checkpoint["model"]["embed.weight"])  # the vocabulary and its padding
    if port.next_multiple_of_n(args.vocab_size, n=128) != rows:
        raise ValueError(f"{path}: its table has {rows:,} rows, which is none of a vocabulary of {args.vocab_size:,}: give the run's "
                         "--vocab_size and --bos_id")
    if checkpoint.get("step", 0) > args.num_iterations:
        raise ValueError(f"{path} is from step {checkpoint['step']}, this schedule has {args.num_iterations}: give the run's --preset, "
                         "or its --num_scheduled_iterations, --num_extension_iterations, --block_size and windows")
    return args

# -----------------------------------------------------------------------------
# The cache

# Tokens. The newest one needs two before it: smear, the bigram's sign and key offset look one back, and the key that is looked at there has
# a smear and a sign of its own. Its bigram comes with it.
CHUNK = 16

def probabilities(q: Tensor, k: Tensor, documents: Tensor, window: int, scale: Tensor, positions: Tensor) -> Tensor:
    """softmax(scale * q @ k.T), [B, H, C, T] float32, where a query sees max(its document's start, its position - window) .. itself."""
    first, last = (x[:, None, :, None] for x in (torch.maximum(documents, positions - window), positions))
    t = torch.arange(k.size(2), device=k.device, dtype=torch.int32)
    return (q.float() @ k.float().mT * scale).masked_fill((t < first) | (t > last), -torch.inf).softmax(-1)

def cached_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, scale: Tensor, paired: bool,
                     positions: Tensor) -> Tensor:
    """
    window_attention for queries at some positions only. q: [B, H, C, D], at positions [B, C] int32 of the row, whose documents start at
    documents [B, C]; k, v: [B, H, T, D], at positions 0 .. T-1. Returns [B, H, C, D].
    """
    if paired:
        turns = lambda x: torch.stack(x.chunk(2, dim=1), dim=3).flatten(2, 3)
        twice = lambda x: torch.stack([2 * x, 2 * x + 1], dim=2).flatten(1)
        starts = 2 * documents.repeat_interleave(2, dim=1)
        y = cached_attention(turns(q), turns(k), turns(v), starts, window, scale, False, twice(positions))
        return torch.cat(y.unflatten(2, (-1, 2)).unbind(3), dim=1)
    p = probabilities(q, k, documents, window, scale, positions)
    return (p.to(v.dtype).float() @ v.float()).to(q.dtype)

def cached_dc(q: Tensor, k: Tensor, v: Tensor, y: Tensor, w1: Tensor, w2: Tensor, documents: Tensor, window: int, scale: Tensor,
              positions: Tensor) -> Tensor:
    """dc_attention for the queries of cached_attention. y: [B, C, H * D], w1, w2: [B, C, H], window in keys. Returns [B, C, H * D]."""
    w1, w2 = (w.mT.unsqueeze(-1) for w in (w1, w2))
    A = (w1 * probabilities(q, k, documents, window - 1, scale, positions)).sum(1, keepdim=True)
    correction = w2 * (A.to(v.dtype).float() @ v.float())
    return (y.float() + correction.transpose(1, 2).flatten(2)).to(y.dtype)

def pick(x: Tensor, here: Tensor) -> Tensor:
    """The one [..., 1, d] of x [..., T, d] where here, [..., T] or fewer dims, is true; whatever the others hold."""
    return torch.where(here.unsqueeze(-1), x, 0).sum(-2, keepdim=True)

class Cache:
    """Keys and values of all positions, [8, H, T, D] of each layer with attention, split over the devices as the rows are."""
    def __init__(self, model: port.GPT, T: int):
        self.T = T
        zeros = torch.zeros(ROWS, model.num_heads, T, model.head_dim, dtype=model.qk_bank.dtype)
        self.tensors = [to_device(zeros, "data") for _ in range(2 * (model.num_layers - 1))]  # layer 6 has no attention

    def attention(self, positions: Tensor, newest: Tensor, whole: bool) -> tuple[Callable, Callable]:
        """
        For one forward pass, in place of window_attention and dc_attention. whole: over all positions, whose keys and values are kept. Else
        over those of positions [B, C], for which the cache has the keys and values up to newest [B, 1]: its own come from the chunk and are
        kept.
        """
        tensors, seen = iter(self.tensors), None  # seen: the layer's keys and values, for DC, which comes after attention
        def attend(q, k, v, documents, window, scale, paired):
            nonlocal seen
            kept = next(tensors), next(tensors)
            if whole:
                y = port.window_attention(q, k, v, documents, window, scale, paired)
            else:
                here = (positions == newest).unsqueeze(1)
                there = (torch.arange(self.T, device=q.device, dtype=torch.int32) == newest)[:, None, :, None]
                k, v = seen = [torch.where(there, pick(x, here), enter(old, "data")) for x, old in zip((k, v), kept)]
                y = cached_attention(q, k, v, documents, window, scale, paired, positions.clamp(min=0))
            for old, x in zip(kept, (k, v)):
                old.copy_(shard(leave(x).flatten(0, 1), "data"))
            return y
        def dc(qkv, y, w1, w2, documents, window, scale):
            if whole:
                return port.dc_attention(qkv, y, w1, w2, documents, window, scale)
            return cached_dc(qkv.chunk(3, dim=1)[0], *seen, y, w1, w2, documents, window, scale, positions.clamp(min=0))
        return attend, dc

class Inference(port.TrainingManager):
    """The model with windows, YaRN and embedding as the validation at a step has them, and no optimizer."""
    wanted = "losses"
    cache = None

    def __init__(self, model: port.GPT, args: port.Hyperparameters, step: int):
        self.model, self.args, self.training_schedule = model, args, port.TrainingSchedule(args)
        self.optimizer = SimpleNamespace(param_cfgs={}, reset=lambda: None)
        self.reset()
        for i in range(step + 1):
            self.advance_schedule(i, train=False)
        self.numbers = to_device(torch.tensor([*model.yarn.numbers(), *model.yarn_paired_head.numbers()]))
        self.replay = port.Replay(self.step_fn, self.tensors, self.constants)

    def unpack(self, numbers: Tensor) -> port.StepNumbers:
        return port.StepNumbers(numbers[:0], numbers[:0], *numbers.chunk(2), muon_lr=None, muon_momentum=None, adam={})

    def tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers(), *(self.cache.tensors if self.cache else ())]

    def get_forward_args(self, numbers: port.StepNumbers) -> port.ForwardScheduleConfig:
        return dataclasses.replace(super().get_forward_args(numbers), **self.replaced)

    @torch.no_grad()
    def step_fn(self, batch: Tensor, numbers: Tensor) -> Tensor:
        begin_program()
        weights = self.model.enter_weights()
        targets, self.replaced = enter(batch, "data")[:, 1], {}
        if self.wanted != "losses":
            newest = targets.amax(1, keepdim=True)
            attention = self.cache.attention(targets, newest, whole=self.wanted == "first")
            self.replaced = dict(attention=attention, positions=targets.clamp(min=0).float())
        x, lm_head = self.forward(batch, numbers, weights, targets=False), weights["lm_head.weight"]
        if self.wanted == "losses":
            results = port.softcapped_cross_entropy(x, lm_head, targets)
        else:
            results = port.softcapped_logits(pick(x, targets == newest), lm_head)[1].T
        return shard(leave(results).flatten(0, 1), "data")

    def __call__(self, wanted: str, batch: Tensor) -> Tensor:
        """
        On the CPU, of batch [8, 4, T] int32, tokens, targets, documents and bigrams: "losses" [8, T]. With positions for targets, -1 after
        the newest: "first" or "next" logits [8, V], of what follows the newest, from all positions or from a chunk of them and the cache.
        """
        self.wanted = wanted
        result = self.replay((wanted, batch.shape), to_device(batch, "data"), self.numbers)
        port.xm.wait_device_ops()
        return to_host(result)  # where .cpu() would compile

    def logits(self, rows: list[list[int]], T: int | None = None) -> Tensor:
        """
        What follows each of up to 8 rows of tokens, each one document: [rows, V], on the CPU. T: the most tokens that a row may come to
        have; begins new rows. Without it each row is that of the last call, at most one token longer.
        """
        if T and (self.cache is None or self.cache.T != T):
            self.cache = Cache(self.model, T)
        batch = np.zeros((ROWS, 4, T or CHUNK), dtype=np.int32)
        batch[:, 1] = -1
        for i, row in enumerate(rows):
            start = 0 if T else max(0, len(row) - CHUNK)
            bigrams = port.get_bigram_hash(np.array([row]), self.args.bigram_vocab_size)[0]  # the row's start is unlike a chunk's
            batch[i, [0, 1, 3], :len(row) - start] = row[start:], range(start, len(row)), bigrams[start:]
        return self("first" if T else "next", torch.from_numpy(batch))[:len(rows)]

def load_model(path: str, options: list[str]) -> Inference:
    """The checkpoint's model on the devices, which are set up if they are not yet; says on stderr what it is. ValueError, OSError."""
    checkpoint = load_weights(path)
    args = get_args(path, checkpoint, options)
    state = checkpoint["model"]
    if xs.get_global_mesh() is None:
        port.setup_devices()
    model = port.GPT(args.vocab_size, args.num_layers, args.num_heads, args.head_dim, args.model_dim, args.block_size, args.dc_window,
                     args.bigram_vocab_size, args.bigram_sign_table_rows)
    model.to_devices(getattr(torch, args.dtype))
    try:
        model.load_state_dict(state)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    step = checkpoint.get("step", args.num_iterations)
    manager = Inference(model, args, step)
    short, long = (ws * args.block_size for ws in (manager.graph.ws_short, manager.graph.ws_long))
    print(f"{path}: step {step} of {args.num_iterations}, {args.model_dim} dims, {args.num_heads} heads, windows of {short} and {long} "
          f"tokens, {args.dtype}", file=sys.stderr)
    return manager

def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """A token from logits [V]: the likeliest at temperature 0, else drawn from the top_k likeliest, or from all at top_k 0."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))

def generate(manager: Inference, prompts: list[list[int]], num_tokens: int, temperature: float, top_k: int, seed: int) -> list[list[int]]:
    """Up to num_tokens after each prompt (tokens, the first of them bos_id); a row ends before the next bos_id."""
    bos_id, vocab_size = manager.args.bos_id, manager.args.vocab_size  # no entries of the vocabulary's padding
    for prompt in prompts:
        check_tokens(prompt, manager.args)
    T = port.next_multiple_of_n(max(map(len, prompts), default=0) + num_tokens, n=128)
    texts, seconds, tokens = [], 0.0, 0
    for first in range(0, len(prompts), ROWS):
        rows = [list(prompt) for prompt in prompts[first:first + ROWS]]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(rows))]  # a row's text is its own
        ended = [False] * len(rows)
        for n in range(num_tokens):
            start = time.perf_counter()
            logits = manager.logits(rows, None if n else T)[:, :vocab_size]
            if n > 1:  # the first two compile
                seconds, tokens = seconds + time.perf_counter() - start, tokens + ended.count(False)
            if not logits.isfinite().all():
                raise FloatingPointError("the model's logits are not finite: try --dtype float32, or an earlier checkpoint")
            for i, row in enumerate(rows):
                if not ended[i]:
                    row.append(choose(logits[i], temperature, top_k, generators[i]))
                    ended[i] = row[-1] == bos_id
            if all(ended):
                break
        texts += [row[len(prompt):len(row) - end] for row, prompt, end in zip(rows, prompts[first:first + ROWS], ended, strict=True)]
    if tokens:
        print(f"{tokens / seconds:.1f} tokens a second", file=sys.stderr)
    return texts

def check_tokens(tokens, args: port.Hyperparameters):
    """ValueError where there are none, or one that the run's vocabulary lacks: XLA would quietly take the table's last row."""
    if not len(tokens):
        raise ValueError(f"a text without tokens: it begins with the run's bos_id, {args.bos_id}")
    if (worst := np.max(tokens)) >= args.vocab_size or (worst := np.min(tokens)) < 0:
        raise ValueError(f"token {worst} is not in the run's vocabulary of {args.vocab_size:,} (bos_id {args.bos_id})")

def tokenizer(single_bytes: bool, args: port.Hyperparameters | None = None, path: str = "the model") -> tuple:
    """
    encode(text) -> tokens, the run's bos_id first; decode(tokens) -> text, in which a token that the tokenizer lacks is a number.
    OSError where GPT-2's vocabulary cannot be had; ValueError where the run with args, at path, was not trained on such tokens.
    """
    args = args or port.Hyperparameters(run_id="")
    encode_text = fineweb.encoder(single_bytes)
    if single_bytes:
        count, kind, way_out = 256, "single bytes", "leave out --bytes"
        to_byte = {int(token): bytes([byte]) for byte, token in enumerate(fineweb.byte_tokens())}
        to_bytes = to_byte.__getitem__
    else:
        import tiktoken
        count, kind, way_out = fineweb.BOS_ID, "GPT-2's tokens", "try --bytes"
        to_bytes = tiktoken.get_encoding("gpt2").decode_single_token_bytes
    if not count <= args.bos_id < args.vocab_size:
        raise ValueError(f"{path}: the run has a vocabulary of {args.vocab_size:,} and bos_id {args.bos_id}, {kind} are 0 to "
                         f"{count - 1:,}: it was not trained on these; {way_out}, or use the tokenizer of its data")
    if not single_bytes and args.vocab_size > port.next_multiple_of_n(count + 1, n=128):
        print(f"{path}: taken for a model of GPT-2's tokens, though its vocabulary has {args.vocab_size:,}", file=sys.stderr)

    def encode(text: str) -> np.ndarray:
        return np.concatenate(([args.bos_id], encode_text(text)[1:])).astype(np.int32)

    def decode(tokens: list[int]) -> str:
        raw = b""
        for token in tokens:
            try:
                raw += to_bytes(token)
            except KeyError:
                raw += f"<|{token}|>".encode()
        return raw.decode(errors="replace")

    return encode, decode

def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=64, help="tokens after each prompt")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_k", type=int, default=50, help="0: the whole vocabulary")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (a prompt adds its number)")
    parser.add_argument("--bytes", action="store_true", help="tokens are single bytes")
    parser.error = lambda message: sys.exit(f"sample.py: {message} (see --help)")
    options, rest = parser.parse_known_args(argv)
    if options.tokens < 1 or options.top_k < 0 or not 0 <= options.temperature < float("inf"):
        parser.error("--tokens must be 1 or more, --top_k and --temperature 0 or more")
    try:
        manager = load_model(options.checkpoint, rest)
        encode, decode = tokenizer(options.bytes, manager.args, options.checkpoint)
        prompts = [encode(text).tolist() for text in options.prompt]
        window = manager.graph.ws_long * manager.args.block_size
        if (longest := max(map(len, prompts))) > window:
            print(f"sample.py: a prompt has {longest:,} tokens, the model looks back {window:,}", file=sys.stderr)
        texts = generate(manager, prompts, options.tokens, options.temperature, options.top_k, options.seed)
    except (ValueError, OSError, FloatingPointError) as e:
        sys.exit(f"sample.py: {e}")
    for prompt, text in zip(options.prompt, texts, strict=True):
        print(f"> {prompt}\n{decode(text)}\n")

if __name__ == "__main__":
    command.run(main)
