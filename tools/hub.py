"""
A checkpoint to and from the Hugging Face Hub, as safetensors with config.json and a model card.

    python tools/hub.py push logs/RUN_ID/state_step001775.pt USER/NAME [--log FILE] [--private] [--dry_run]
    python tools/hub.py pull USER/NAME [-o FILE.pt]

push makes the files in the folder hub/ beside the checkpoint and sends them; without a token (hf auth login, or HF_TOKEN) or with
--dry_run it stops there. The card's figures are those of the checkpoint's step in its run's log (logs/RUN_ID.txt, or --log); what the log
lacks is left out, and so is a log that is another run's. The hyperparameters are the run's as far as the checkpoint or that log tells
them, then a preset's; --preset and --FIELD as for tools/sample.py.
pull writes a file that --init_from, tools/sample.py and tools/hellaswag.py take, by default logs/NAME/state_step*.pt.
"""
import argparse
import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import command
from run_log import WATCHING, Log
from sample import find_log, get_args

from checkpoint import MODEL_TYPE, load_config, load_weights
from chips import RECORD
from shards import FINEWEBS_TOKENS, is_fineweb

CARD = """---
license: mit
library_name: pytorch
pipeline_tag: text-generation
tags: [modded-nanogpt, nanogpt-speedrun]
{datasets}---
# {name}

A GPT as record #{record} of the [NanoGPT speedrun](https://github.com/KellerJordan/modded-nanogpt) has it, with {model_dim} dims,
{num_heads} heads and {num_layers} layers, for modded-nanogpt-xla. `model.safetensors` holds the parameters under upstream's names,
`config.json` the hyperparameters.

{figures}To use it, in a checkout of modded-nanogpt-xla:

    python tools/hub.py pull {repo}
    python tools/sample.py logs/{name}/{file} --prompt "The capital of France is"
"""

def weights_name(step: int | None) -> str:
    return "state.pt" if step is None else f"state_step{step:06d}.pt"

def get_figures(log: Log, step: int) -> list[tuple[str, str]]:
    """What a run's log says of this step and of the run, name and value; nothing that it lacks or that is not finite."""
    figures = []
    if math.isfinite(log.val_loss.get(step, math.nan)):
        figures.append(("validation loss", f"{log.val_loss[step]:.4f}"))
    figures.append(("at step", f"{step} of {log.num_steps}"))
    if step and math.isfinite(log.time.get(step, math.nan)):
        figures += [("training time", f"{log.time[step] / 1000:.1f} s"), ("time a step", f"{log.step_avg[step]:.2f} ms")]
    if log.init_from:
        figures.append(("starting with the weights of", Path(log.init_from).name))
    if log.devices:
        figures.append(("devices", log.devices))
    return figures

def make_files(path: str, repo: str, log_path: Path | None, options: list[str]) -> Path:
    """model.safetensors, config.json and README.md, in hub/ beside the checkpoint. ValueError or OSError where that cannot be."""
    from safetensors.torch import save_file

    checkpoint = load_weights(path)
    args = dataclasses.asdict(get_args(path, checkpoint, options, log_path))
    step = checkpoint.get("step")
    log = find_log(path, checkpoint, log_path) if step is not None else None
    if step is None:
        print(f"the card has no figures: {path} does not say of which step it is", file=sys.stderr)
    elif not log:
        print("the card has no figures: --log FILE gives the log of the checkpoint's run", file=sys.stderr)
    elif not math.isfinite(log.val_loss.get(step, math.nan)):
        print(f"the card has no validation loss: {log.path} has none of step {step}", file=sys.stderr)
    figures = get_figures(log, step) if log else []
    folder, name = Path(path).parent / "hub", repo.split("/")[-1]
    folder.mkdir(exist_ok=True)
    # each tensor a copy of its own: safetensors refuses tensors that share memory
    save_file({k: v.contiguous().clone() for k, v in checkpoint["model"].items()}, folder / "model.safetensors", {"format": "pt"})
    config = dict(model_type=MODEL_TYPE, step=step) | {k: v for k, v in args.items() if k not in WATCHING}
    if step is None:
        del config["step"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
    rows = "".join(f"| {name} | {value} |\n" for name, value in figures)
    shards = (checkpoint.get("data") or (log.data if log else {})).get("train_files", [])
    fineweb = shards and all(is_fineweb(name) and tokens == FINEWEBS_TOKENS for name, tokens, _ in shards)
    (folder / "README.md").write_text(CARD.format(
        **{k: args[k] for k in ("model_dim", "num_heads", "num_layers")}, record=RECORD, name=name, repo=repo, file=weights_name(step),
        datasets="datasets: [kjj0/fineweb10B-gpt2]\n" if fineweb else "",
        figures=f"From the log of its run:\n\n| | |\n| --- | --- |\n{rows}\n" if figures else ""))
    return folder

def push(path: str, repo: str, log_path: Path | None, private: bool, dry_run: bool, options: list[str]):
    from huggingface_hub import HfApi, get_token

    folder = make_files(path, repo, log_path, options)
    for file in sorted(folder.iterdir()):
        print(f"{file}: {file.stat().st_size:,} bytes")
    if dry_run or not get_token():
        reason = "--dry_run" if dry_run else "there is no token: 'hf auth login', or set HF_TOKEN"
        return print(f"nothing is sent to {repo} ({reason})")
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Checkpoint {Path(path).name}")
    print(commit.commit_url)

def pull(repo: str, out: Path | None):
    from huggingface_hub import hf_hub_download

    known = load_config(Path(hf_hub_download(repo, "config.json")))
    if not known:
        raise ValueError(f"{repo} is no {MODEL_TYPE} by its config.json: only what 'tools/hub.py push' sent can be pulled")
    # a run_id that no log here has: one that lies beside it is another run's
    state = load_weights(Path(hf_hub_download(repo, "model.safetensors"))) | known | dict(code="", optimizer={}, run_id=repo)
    get_args(repo, state, [])
    out = out or Path("logs", repo.split("/")[-1], weights_name(state.get("step")))
    if out.exists():
        raise ValueError(f"{out} is there already: move it, or give another name with -o")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    try:
        torch.save(state, part)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    print(out)

def explain(error: BaseException, repo: str) -> str:
    """What went wrong and the way out. The Hub's client buries the status of an answer under errors about the network."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    answer = next((cause.response for cause in causes if getattr(cause, "response", None) is not None), None)
    if answer is not None:
        status, said = answer.status_code, answer.headers.get("X-Error-Message") or answer.reason_phrase
        if status == 401 and get_token():
            way_out = "the token is invalid or has expired: 'hf auth login', or another HF_TOKEN"
        elif status == 401:
            way_out = f"without a token it shows no {repo}: check the name or, if it is private, 'hf auth login'"
        elif status == 403:
            way_out = f"the token may not do this: it needs write access to push, and for a gated {repo} its owner's consent"
        elif status == 404 and isinstance(error, EntryNotFoundError):
            way_out = f"{repo} lacks {answer.url.path.rpartition('/')[2]}: only what 'tools/hub.py push' sent can be pulled"
        elif status == 404:
            way_out = f"there is no {repo}, or it is private and not for the owner of this token: check the name"
        elif status == 429:
            way_out = "too many requests: wait some minutes, then run it again"
        else:
            way_out = "run it again later" if status >= 500 else "check the name"
        return f"the Hub answers {status} ({said}): {way_out}"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return f"the Hub is not asked for {repo}, as HF_HUB_OFFLINE is set: unset it"
    said = " ".join(str(causes[-1] if isinstance(error, LocalEntryNotFoundError) else error).split())[:400]
    if isinstance(error, (HTTPError, LocalEntryNotFoundError)):
        return f"the Hub does not answer ({said}): check the network and HF_ENDPOINT, then run it again"
    return said if type(error) in (ValueError, FileNotFoundError) else f"{type(error).__name__}: {said}"

def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    words = parser.add_subparsers(dest="word", required=True)
    pushing = words.add_parser("push", allow_abbrev=False)
    pushing.add_argument("checkpoint")
    pushing.add_argument("repo", metavar="USER/NAME")
    pushing.add_argument("--log", type=Path, help="the run's log, where it is not logs/RUN_ID.txt beside the checkpoint's folder")
    pushing.add_argument("--private", action="store_true")
    pushing.add_argument("--dry_run", action="store_true")
    pulling = words.add_parser("pull", allow_abbrev=False)
    pulling.add_argument("repo", metavar="USER/NAME")
    pulling.add_argument("-o", "--out", type=Path, metavar="FILE.pt")
    options, rest = parser.parse_known_args(argv)
    try:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo):
            raise ValueError(f"{options.repo!r} is not USER/NAME, as in the address of a model on the Hub")
        if options.word == "pull":
            if rest:
                parser.error(f"{rest[0]} is not an option of pull")
            return pull(options.repo, options.out)
        return push(options.checkpoint, options.repo, options.log, options.private, options.dry_run, rest)
    except BrokenPipeError:
        raise
    except Exception as e:  # noqa: BLE001 (the Hub's client and its HTTP library raise what they like)
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"hub.py: {explain(e, options.repo)}")

if __name__ == "__main__":
    command.run(main)
