"""
Token shards in llm.c's format (https://github.com/karpathy/llm.c): a header of 256 int32 (magic 20240520, version 1, number of tokens,
zeros), then the tokens as uint16, all little-endian. Needs numpy only: training reads shards with this, data/ writes them.
"""
import glob
import os
import re
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
FINEWEBS_TOKENS = 10**8  # in each shard of kjj0/fineweb10B-gpt2; data/fineweb.py ends a shard with a whole document instead

def find_shards(pattern: str) -> list[Path]:
    """The files that match, sorted by name. What is there under its very name is no pattern, even with [, * or ? in it."""
    path = Path(pattern)
    there = next((p for p in (path, *path.parents) if p.exists()), Path())
    if there == path and path.is_dir():
        raise ValueError(f"{path} is a folder: name its shards, such as '{path}/*.bin'")
    files = sorted(glob.glob(os.path.join(glob.escape(str(there)), *path.parts[len(there.parts):])) if there != path else [pattern])
    if not files:
        get = {"fineweb": "'bash run_tpu.sh data' fetches FineWeb", "demo": "'python data/demo.py' makes the rehearsal's corpus"}
        get = get.get(path.name.split("_")[0], "'python data/fineweb.py' makes shards of your own text")
        raise FileNotFoundError(f"no shard matches {pattern}: {get}, and DATA_PATH names the folder that holds data/")
    return [Path(file) for file in files]

def shard_tokens(path: Path) -> int:
    """The number of tokens of a shard whose header and size agree; ValueError otherwise."""
    with open(path, "rb") as f:
        header, size = f.read(HEADER_BYTES), os.fstat(f.fileno()).st_size
    again = f"delete it and {way_out(path)}"
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes, shorter than its header of {HEADER_BYTES} bytes; {again}")
    magic, version, num_tokens = np.frombuffer(header, "<i4")[:3].tolist()
    if magic != MAGIC:
        raise ValueError(f"{path}: magic number {magic} instead of {MAGIC}, so not a token shard; {again}")
    if version != VERSION:
        raise ValueError(f"{path}: version {version} instead of {VERSION}; {again}")
    if num_tokens <= 0 or size != HEADER_BYTES + 2 * num_tokens:
        raise ValueError(f"{path}: header promises {num_tokens} tokens, the file has {(size - HEADER_BYTES) / 2:g}; {again}")
    return num_tokens

def read_tokens(path: Path) -> np.ndarray:
    """The tokens of a shard, [n] uint16, memory-mapped."""
    return np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES, shape=(shard_tokens(path),)).view(np.ndarray)

def write_shard(path: Path, tokens: np.ndarray, vocab_size: int = 50257):
    """Writes tokens [n] to path, whole or not at all. ValueError where they do not fit the vocabulary or the format."""
    path, tokens = Path(path), np.asarray(tokens)
    if not 0 < len(tokens) < 2**31:
        raise ValueError(f"{path}: {len(tokens):,} tokens; a shard holds 1 to 2**31 - 1, choose another shard size")
    if tokens.min() < 0 or tokens.max() >= min(vocab_size, 2**16):
        token = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(f"{path}: token {token} is not one of a vocabulary of {vocab_size}: 0 to {min(vocab_size, 2**16) - 1}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # hidden: no glob for *.bin finds it
    try:
        with open(temporary, "wb") as f:
            f.write(header.tobytes())
            f.write(np.ascontiguousarray(tokens, dtype="<u2"))
            f.flush()
            os.fsync(f.fileno())  # otherwise a crash could leave the new name with no content
        os.replace(temporary, path)
    except OSError as error:
        need = f"{error.strerror} for {HEADER_BYTES + 2 * len(tokens):,} bytes, make room or choose another folder"
        raise OSError(error.errno, need, str(path)) from error  # a failed write does not name its file
    finally:
        temporary.unlink(missing_ok=True)

def is_fineweb(path: Path) -> bool:
    """By its name. Shards of one's own text may have it too (data/fineweb.py), but hardly ever FINEWEBS_TOKENS."""
    return bool(re.fullmatch(r"fineweb_(train|val)_\d{6}\.bin", Path(path).name))

def way_out(path: Path) -> str:
    """How to get a shard of this name again."""
    if Path(path).name.startswith("demo_"):
        return "make it again with data/demo.py"
    own = "write it again with data/fineweb.py"
    return f"fetch it again ('bash run_tpu.sh data'), or if it is your own text {own}" if is_fineweb(path) else own

def more(files: list[Path]) -> str:
    """How to get more shards like these."""
    if all(is_fineweb(file) and shard_tokens(file) == FINEWEBS_TOKENS for file in files):
        return "fetch more ('bash run_tpu.sh data N')"
    demo = all(Path(file).name.startswith("demo_") for file in files)
    return f"make more ({'data/demo.py --tokens N --val_tokens N' if demo else 'data/fineweb.py, from more text'})"
