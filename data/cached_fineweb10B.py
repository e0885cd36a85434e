"""
Downloads FineWeb10B as GPT-2 tokens: the validation shard and the first N train shards of 100M tokens, 0.2 GB each.

    python data/cached_fineweb10B.py [N]        N: 0 to 103, all 103 (20.8 GB) by default; 9 are plenty for the record

They go to fineweb10B beside this script, or to $DATA_PATH/data/fineweb10B, where training looks. A shard has its name only
when complete; run again after an interruption to fetch what is missing. Source: huggingface.co/datasets/kjj0/fineweb10B-gpt2
"""
import errno
import os
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for an import as data.cached_fineweb10B
from fineweb import check_shard

REPO = "kjj0/fineweb10B-gpt2"
NUM_CHUNKS = 103
SHARD_BYTES = 1024 + 2 * 10**8

def data_folder():
    root = os.environ.get("DATA_PATH")
    return Path(root) / "data/fineweb10B" if root else Path(__file__).resolve().parent / "fineweb10B"

def missing(folder, names):
    """Names without a complete shard in folder; says which are broken."""
    wanted = []
    for name in names:
        try:
            check_shard(folder / name)
        except FileNotFoundError:
            wanted.append(name)
        except ValueError as error:
            print(f"{error}; fetching it again", flush=True)
            wanted.append(name)
    return wanted

def get(folder, name):
    """Fetches one shard. Raises whatever huggingface_hub does; exits where the Hub's file is no shard."""
    from huggingface_hub import hf_hub_download  # not at the top: slow

    staged = Path(hf_hub_download(repo_id=REPO, filename=name, repo_type="dataset", local_dir=folder / ".incoming"))
    try:
        check_shard(staged)
    except ValueError as error:
        staged.unlink()
        sys.exit(f"cached_fineweb10B.py: {error}; that is what the Hub sent: check HF_ENDPOINT "
                 f"({os.environ.get('HF_ENDPOINT', 'unset')}) and any proxy, then run it again")
    with open(staged, "rb") as f:
        os.fsync(f.fileno())
    os.replace(staged, folder / name)

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
        wanted = missing(folder, names)
        free = shutil.disk_usage(folder).free
        if free < len(wanted) * SHARD_BYTES:
            sys.exit(f"cached_fineweb10B.py: {len(wanted)} shards take {len(wanted) * SHARD_BYTES / 1e9:.1f} GB, {folder} has "
                     f"{free / 1e9:.1f} GB free; free some, set DATA_PATH to a larger disk, or ask for fewer than {num_chunks}")
        for name in tqdm(wanted, unit="shard", desc="fineweb10B"):
            get(folder, name)
    except KeyboardInterrupt:
        sys.exit(f"cached_fineweb10B.py: stopped at {name}; run it again to go on from there")
    except Exception as error:  # noqa: BLE001 (the Hub's client, its HTTP and its Xet library each have their own)
        reason = error.__cause__ if "LocalEntryNotFound" in type(error).__name__ and error.__cause__ else error
        line = f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
        if getattr(error, "errno", None) == errno.ENOSPC or folder.is_dir() and shutil.disk_usage(folder).free < SHARD_BYTES:
            way_out = f"the disk of {folder} is full: free some, or set DATA_PATH to a larger one, and run again"
        elif isinstance(error, ImportError):
            way_out = "pip install -r requirements.txt"
        elif getattr(error, "filename", None):
            way_out = f"see that {folder} is a folder you may write to, or set DATA_PATH to one"
        else:
            way_out = "check the network, then run it again: complete shards are kept"
        sys.exit(f"cached_fineweb10B.py: {name}: {line}; {way_out}")
    shutil.rmtree(folder / ".incoming", ignore_errors=True)  # the client's records of finished downloads
    print(f"{folder}: {len(names)} shards complete, {len(wanted)} fetched now")

if __name__ == "__main__":
    main()
