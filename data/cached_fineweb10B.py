"""
Downloads FineWeb10B as GPT-2 tokens: the validation shard and the first N train shards of 100M tokens, 0.2 GB each.

    python data/cached_fineweb10B.py [N]        N: 0 to 103, all 103 (20.8 GB) by default; 9 are plenty for the record

They go to fineweb10B beside this script, or to $DATA_PATH/data/fineweb10B, where training looks. A shard has its name only
when complete; run again after an interruption to fetch what is missing. Source: huggingface.co/datasets/kjj0/fineweb10B-gpt2

Every shard's size and sha256 are compared with the Hub's, once: hub.json beside the shards remembers it, so that later calls need no
network. Shards of another origin are never mixed with FineWeb's: with N = 0 they are left as they are, else nothing is fetched.
"""
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from shards import FINEWEBS_TOKENS, HEADER_BYTES, read_tokens
from tools import command

REPO = "kjj0/fineweb10B-gpt2"
NUM_CHUNKS = 103
SHARD_BYTES = HEADER_BYTES + 2 * FINEWEBS_TOKENS
NOTE = "hub.json"

def data_folder():
    root = os.environ.get("DATA_PATH")
    return Path(root) / "data/fineweb10B" if root else HERE / "fineweb10B"

# -----------------------------------------------------------------------------
# What is known of a shard

def read_note(folder):
    """{name: [size, mtime in ns, the Hub's sha256 or None]} of the shards that were once the Hub's; none where there is no such note."""
    try:
        return {name: [int(size), int(mtime), sha] for name, (size, mtime, sha) in json.loads((folder / NOTE).read_text())[REPO].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # no note, or one that somebody edited
        return {}

def write_note(folder, note):
    part = folder / f".{NOTE}.{os.getpid()}.tmp"
    try:
        part.write_text(json.dumps({REPO: note}, indent=1) + "\n")
        os.replace(part, folder / NOTE)
    except OSError as error:  # a folder to read from only serves as well
        print(f"{folder / NOTE}: {error.strerror}, so the next call compares the shards again", flush=True)

def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def is_noted(path, note):
    """Whether path still is what the note says; its time in the note is brought up to date where only that is another (a copy)."""
    size, mtime, sha = note.get(path.name, (None, None, None))
    status = path.stat()
    if size != status.st_size:
        return False
    if mtime != status.st_mtime_ns:
        if sha is None or sha256(path) != sha:
            return False
        note[path.name][1] = status.st_mtime_ns
    return True

def from_hub(folder, paths):
    """Whether all paths, in folder, are noted there as the Hub's."""
    note = read_note(folder)
    return all(is_noted(path, note) for path in paths)

def problem(path):
    """Why path is no whole shard, "" where it is one: a header that does not fit, or a stretch that was never written."""
    try:
        tokens = read_tokens(path)
    except ValueError as error:
        return str(error).rpartition("; ")[0]  # the advice is to fetch it again
    full = len(tokens) // 512 * 512
    empty = np.append(~tokens[:full].reshape(-1, 512).any(1), full < len(tokens) and not tokens[full:].any())
    hole = empty[:-1] & empty[1:]  # 1024 zeros, or 512 and the end: no text repeats its "!" as often
    return f"{path}: zeros from byte {HEADER_BYTES + 1024 * int(hole.argmax()):,} on, where nothing was ever written" if hole.any() else ""

def ask_hub(name, retry=False):
    """What the Hub says of a file (size, etag); None where it has no such file. Raises whatever huggingface_hub does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # not at the top: slow
    from huggingface_hub.errors import RemoteEntryNotFoundError
    try:
        return get_hf_file_metadata(hf_hub_url(REPO, name, repo_type="dataset"), retry_on_errors=retry)
    except RemoteEntryNotFoundError:
        return None

def compare(path, hub, note):
    """How path differs from what the Hub says of it; "" where it does not, which is noted."""
    if hub is None:
        return "no such file there"
    status = path.stat()
    if status.st_size != (hub.size or status.st_size):
        return f"{status.st_size:,} bytes instead of {hub.size:,}"
    known = hub.etag if re.fullmatch("[0-9a-f]{64}", hub.etag or "") else None  # of a large file it is the sha256; a mirror may not tell
    if known and (own := sha256(path)) != known:
        return f"of the same size, but sha256 {own[:12]}... instead of {known[:12]}..."
    note[path.name] = [status.st_size, status.st_mtime_ns, known]
    return ""

# -----------------------------------------------------------------------------
# The download

def get(folder, name, note):
    """Fetches one shard. Raises whatever huggingface_hub does; exits where what came is not the Hub's file, or no shard."""
    from huggingface_hub import hf_hub_download

    staged = Path(hf_hub_download(repo_id=REPO, filename=name, repo_type="dataset", local_dir=folder / ".incoming"))
    if wrong := problem(staged) or compare(staged, ask_hub(name, retry=True), note):
        staged.unlink()
        sys.exit(f"cached_fineweb10B.py: {name}: {wrong}; that is what was sent: check HF_ENDPOINT "
                 f"({os.environ.get('HF_ENDPOINT', 'unset')}) and any proxy, then run it again")
    with open(staged, "rb") as f:
        os.fsync(f.fileno())
    os.replace(staged, folder / name)
    write_note(folder, note)

def status_of(error):
    """The HTTP status that the Hub answered with, None where it did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)

def reason_of(error):
    """The error that another one only wraps."""
    return error.__cause__ if "LocalEntryNotFound" in type(error).__name__ and error.__cause__ else error

def one_line(error):
    return f"{type(reason_of(error)).__name__}: {' '.join(str(reason_of(error)).split())[:300]}"

def way_out(error, folder):
    status = status_of(reason_of(error))
    if status in (401, 403):
        from huggingface_hub import constants, get_token
        token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else f"the token in {constants.HF_TOKEN_PATH}"
        return (f"the Hub refuses {token}, which may have expired: make a new one ('hf auth login') or take it away, the data needs none"
                if get_token() else "it wants a token: 'hf auth login', or set HF_TOKEN")
    if status == 404:
        return f"check HF_ENDPOINT ({os.environ.get('HF_ENDPOINT', 'unset')})"
    if status:
        return "the Hub is there, but does not give the file: wait, then run it again; complete shards are kept"
    if getattr(error, "errno", None) == errno.ENOSPC or folder.is_dir() and shutil.disk_usage(folder).free < SHARD_BYTES:
        return f"the disk of {folder} is full: free some, or set DATA_PATH to a larger one, and run again"
    if isinstance(error, ImportError):
        return "pip install -r requirements.txt"
    if getattr(error, "filename", None):
        return f"see that {folder} is a folder you may write to, or set DATA_PATH to one"
    return "check the network, then run it again: complete shards are kept"

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        return print(__doc__)
    text = " ".join(argv) if argv else str(NUM_CHUNKS)
    if not (text.isdecimal() and int(text) <= NUM_CHUNKS):
        sys.exit(f"cached_fineweb10B.py: '{text}' is not a number of train shards; give one from 0 to {NUM_CHUNKS}")
    num_chunks, folder = int(text), data_folder()
    name = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, num_chunks + 1)]
        there = sorted(p for kind in ("val", "train") for p in folder.glob(f"fineweb_{kind}_*.bin") if p.exists())
        note, broken, unknown, foreign = read_note(folder), {}, [], []
        for path in there:  # beyond names, too: training reads them all
            if is_noted(path, note):
                continue
            if wrong := problem(path):
                broken[path.name] = wrong
            else:
                unknown.append(path)
        wanted = [name for name in names if not (folder / name).exists()] + sorted(broken)
        try:
            hubs = [ask_hub(path.name) for path in unknown]
        except Exception as error:  # noqa: BLE001 (the client's, as below)
            if wanted or status_of(error):
                raise
            return print(f"{folder}: {len(there)} shards, nothing to fetch; whether they are {REPO}'s cannot be told ({one_line(error)})")
        for path, hub in zip(tqdm(unknown, unit="shard", desc="comparing", disable=not unknown), hubs, strict=True):
            if how := compare(path, hub, note):
                foreign.append(f"{path.name}: {how}")
        if foreign:
            if num_chunks == 0 and len(foreign) == len(there) > 1 and not wanted:
                return print(f"{folder}: {len(there)} shards of your own, not {REPO}'s ({foreign[0]}); nothing is fetched")
            foreign += broken.values()
            sys.exit(f"cached_fineweb10B.py: {folder}: {len(foreign)} of {len(there)} shards are not {REPO}'s ({'; '.join(foreign[:3])}): "
                     "FineWeb's do not go beside shards of your own (set DATA_PATH to another folder; to train on a whole set of your own "
                     "give 0 in place of N, run_tpu.sh TRAIN_CHUNKS=0); if these are damaged ones, delete them and run it again")
        for wrong in broken.values():
            print(f"{wrong}; fetching it again", flush=True)
        free, incoming = shutil.disk_usage(folder).free, sum(p.stat().st_size for p in folder.glob(".incoming/**/*.incomplete"))
        if free + incoming < len(wanted) * SHARD_BYTES:
            sys.exit(f"cached_fineweb10B.py: {len(wanted)} shards take {len(wanted) * SHARD_BYTES / 1e9:.1f} GB, {folder} has "
                     f"{free / 1e9:.1f} GB free; free some, set DATA_PATH to a larger disk, or ask for fewer than {num_chunks}")
        if note != read_note(folder):
            write_note(folder, note)
        for name in tqdm(wanted, unit="shard", desc="fineweb10B"):
            get(folder, name, note)
    except KeyboardInterrupt:
        sys.exit(f"cached_fineweb10B.py: stopped at {name}; run it again to go on from there")
    except Exception as error:  # noqa: BLE001 (the Hub's client, its HTTP and its Xet library each have their own)
        sys.exit(f"cached_fineweb10B.py: {name}: {one_line(error)}; {way_out(error, folder)}")
    shutil.rmtree(folder / ".incoming", ignore_errors=True)  # the client's records of finished downloads
    how = "size and sha256" if all(note[name][2] for name in names) else "size (the Hub told no sha256)"
    print(f"{folder}: {len(names)} shards complete, {len(wanted)} fetched now; they are {REPO}'s by {how}")

if __name__ == "__main__":
    command.run(main)
