"""
Checkpoints that outlive the machine: how a state gets to the disk and back. What is in it, the training loop knows.

    with Checkpoints(f"logs/{run_id}", keep=3) as checkpoints:    # one run a folder
        path, state = checkpoints.find("latest")                  # (None, None) where there is none yet
        checkpoints.save(step, state)                             # in a thread; a second call waits for the first

torch.save and not safetensors: the state is nested, with numbers and names beside its tensors, and upstream's tools read it. It is
read with weights_only, so a file cannot run code. MAGIC and the SHA-256 of all that comes before stand at the end of the file
(torch.load passes over them); a file counts only if they do. It gets its name only once it is whole and on the disk.
"""
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import signal
import threading
import time
import warnings
import zipfile
from pathlib import Path

import torch

import shards
from chips import RECORD

VERSION = 3
MAGIC = b"modded-nanogpt-xla checkpoint\n"
# As upstream's, then what it takes to go on
KEYS = ("step", "code", "model", "optimizer", "version", "run_id", "hyperparameters", "data", "versions", "schedule", "loader", "rng",
        "losses", "training_time_ms", "time", "wandb")
OF_RECORD_60 = "record #60's, whose folder in records/ says which commit reads it"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a spot machine goes, Ctrl-C, the terminal is gone
PREEMPTED = 75  # exit status after one of them (sysexits' "try again later"): all is saved, the same command goes on
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

class Broken(ValueError):
    """A file that is not a whole checkpoint."""

class Hashing:
    """A file that sums up what is written into it."""
    def __init__(self, file):
        self.file, self.flush, self.sha = file, file.flush, hashlib.sha256()

    def write(self, data) -> int:
        self.sha.update(data)
        return self.file.write(data)

def write(path: Path, state: dict):
    """Atomic: after a crash at any point, path is what it was or all of the new file. OSError: nothing has changed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            file = Hashing(f)
            torch.save(state, file)
            f.write(MAGIC + file.sha.digest())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the name, too, is on the disk
    os.close(folder)

def read(path: Path) -> dict:
    """The state in a file that is whole and of this version. Broken, or ValueError for what another script wrote."""
    length = path.stat().st_size - len(MAGIC) - 32
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        f.seek(max(length, 0))
        end = f.read()
        if length < 0 or not end.startswith(MAGIC):
            kind = get_kind(path)
            what = "cut short, or not a checkpoint of this script" if kind == "torch" else f"not a checkpoint ({kind})"
            raise Broken(f"{path}: {what}: --resume takes checkpoint_step*.pt; --init_from takes upstream's state_step*.pt and safetensors")
        f.seek(0)
        while length:
            block = f.read(min(length, 1 << 22))
            sha.update(block)
            length -= len(block)
    if sha.digest() != end[len(MAGIC):]:
        raise Broken(f"{path}: its checksum does not hold, so the file is damaged; take an older one (--resume PATH)")
    state = load(path)
    if (version := state.get("version")) != VERSION:
        way_out = f"it is {OF_RECORD_60}" if version == 2 else "resume with the script that wrote it"
        raise ValueError(f"{path}: a checkpoint of version {version}, this script reads {VERSION}: {way_out}")
    for key in (*KEYS, *state):
        if (key in state) != (key in KEYS):
            raise ValueError(f"{path}: {key} is {'missing' if key in KEYS else 'unknown to this script'}; take another checkpoint "
                             "(--resume PATH) or start afresh under another --run_id")
    if name := not_finite(state):
        raise Broken(f"{path}: {name} holds a number that is not finite; take an older one (--resume PATH)")
    return state

# What people have at hand beside weights, by how it begins
KINDS = {
    b"\x93NUMPY": "a NumPy array", b"\x89HDF": "an HDF5 file", b"GGUF": "a GGUF file", b"\x80": "a pickle", b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed with gzip", b"\x28\xb5\x2f\xfd": "compressed with zstd", b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz", shards.MAGIC.to_bytes(4, "little"): "a token shard", b"<": "a web page", b"{": "JSON",
    b"version https://git-lfs": "Git LFS's pointer to a file, which 'git lfs pull' brings",
}
WEIGHTS = "give a state_step*.pt, as --save_checkpoint true or upstream writes it, or a model.safetensors of tools/hub.py"

def get_kind(path: Path) -> str:
    """What is in a file: "torch" or "safetensors", which can be read, or in words what else it is."""
    with open(path, "rb") as f:
        head = f.read(64)
    if head.startswith(b"PK\3\4"):
        if not zipfile.is_zipfile(path):
            return "cut short: the end of the archive is missing"
        names = zipfile.ZipFile(path).namelist()
        if any(name.endswith(".npy") for name in names):
            return "a NumPy archive"
        script = any(name.endswith("constants.pkl") for name in names)
        return "a TorchScript program" if script else "torch" if any(name.endswith("data.pkl") for name in names) else "a zip archive"
    if head.startswith(b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
        return "torch"  # as torch.save wrote before version 1.6
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:  # the length of a header in JSON
        return "safetensors"
    text = all(byte >= 32 or byte in b"\t\n\r" for byte in head)
    return next((kind for start, kind in KINDS.items() if head.startswith(start)),
                "empty" if not head else "text" if text else "of an unknown kind")

def load(path: Path) -> dict:
    """What torch.save wrote, ours or upstream's; Broken where it is anything else."""
    kind = get_kind(path)
    if kind == "torch":
        try:
            with warnings.catch_warnings(action="ignore"):
                state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
            if isinstance(state, dict):
                return state
            kind = f"a {type(state).__name__} of torch.save's"
        except Exception as e:  # torch.load raises what it likes, and advises to switch weights_only off
            found = re.search(r"(?:GLOBAL|[Ff]unction|class) ([\w.]+\.\w+)", str(e))
            kind = f"damaged: {type(e).__name__} in torch.load" if not found or found[1].startswith("torch._utils") else \
                f"it holds Python objects, {found[1]}, which could run code: save tensors, numbers and names alone"
    raise Broken(f"{path}: not a checkpoint ({kind}): {WEIGHTS}")

def load_weights(path: Path) -> dict:
    """
    A file of weights: "model", upstream's names -> tensors on the CPU, and whatever else it holds, such as "step" and "hyperparameters".
    Takes state_step*.pt, ours or upstream's, checkpoint_step*.pt, a bare state_dict, and safetensors, with tools/hub.py's config.json
    beside them if it is there. ValueError names the file and what it is instead.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(file.name for pattern in ("state_step*.pt", "*.safetensors", "checkpoint_step*.pt") for file in path.glob(pattern))
        raise ValueError(f"{path} is a folder: " + (f"give a file in it, such as {path / inside[-1]}" if inside else WEIGHTS))
    safe = get_kind(path) == "safetensors"
    state = load_config(path.with_name("config.json")) | dict(model=load_safetensors(path)) if safe else load(path)
    model = state.get("model", state)
    if not isinstance(model, dict):
        raise ValueError(f"{path}: not a checkpoint (its model is {type(model).__name__}, not a dict of tensors): {WEIGHTS}")
    model = {str(name).removeprefix("_orig_mod."): x for name, x in model.items()}  # torch.compile's
    if "blocks.0.attn.qkvo_w" in model:
        raise ValueError(f"{path}: its model has blocks.0.attn.qkvo_w, so it is {OF_RECORD_60}")
    if missing := {"embed.weight", "qk_bank", "mudd_w1", "mudd_gate_w1"} - model.keys():
        raise ValueError(f"{path}: its model has no {min(missing)}, so it is not record #{RECORD}'s: --save_checkpoint true writes one "
                         "that is")
    for name, x in model.items():
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            kind = str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{path}: {name} holds {kind}, not floating-point numbers")
        if not_finite({name: x.float()}):
            raise ValueError(f"{path}: {name} holds a number that is not finite: take an earlier checkpoint")
    return (state if "model" in state else {}) | dict(model=model)

def load_safetensors(path: Path) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path}: safetensors that are cut short or damaged ({e})") from None

MODEL_TYPE = "modded-nanogpt"  # in the config.json of tools/hub.py

def load_config(path: Path) -> dict:
    """"step" and "hyperparameters" from the config.json of tools/hub.py; {} where there is none, or another program's."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None
    if not isinstance(config, dict) or config.pop("model_type", None) != MODEL_TYPE:
        return {}
    step = dict(step=config.pop("step")) if "step" in config else {}
    return step | dict(hyperparameters={k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})

def not_finite(state, name: str = "") -> str | None:
    """The name of the first tensor that holds an infinity or a NaN."""
    if isinstance(state, torch.Tensor):
        return None if not state.is_floating_point() or torch.isfinite(state.sum(dtype=torch.float64)) else name
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return next((found for key, x in pairs if (found := not_finite(x, f"{name}.{key}".lstrip(".")))), None)

def join(state: dict | list):
    """Calls the functions that TrainingManager.get_state(lazy=True) leaves in it. In place: a tensor's parts go when it is there."""
    for key, x in state.items() if isinstance(state, dict) else enumerate(state):
        if callable(x):
            state[key] = x()
        elif isinstance(x, (dict, list)):
            join(x)

@contextlib.contextmanager
def handling(handler):
    """The SIGNALS go to handler(number, frame), but for those that are ignored from the start, as nohup has it."""
    before = {number: signal.signal(number, handler) for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)

class Checkpoints:
    """
    The folder of one run. `with` locks it, clears away what a killed run left half written, and turns the first of SIGNALS into
    `preempted`, which the training loop looks at. say: where to tell what happened.
    """
    def __init__(self, folder, keep: int, say=print):
        self.folder, self.keep, self.say = Path(folder), keep, say
        self.preempted = threading.Event()
        self.signal = self.thread = self.error = None
        self.handling = handling(self._stop)

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError:
            self.lock.seek(0)
            raise ValueError(f"{self.folder}: process {self.lock.read() or 'unknown'} is at work on this run: wait for it, or choose "
                             "another --run_id") from None
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()
        for stale in self.folder.glob("*.tmp"):
            stale.unlink()
        # malloc gives large blocks back to the system, and touching new ones takes several times as long as the copy into them
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
        if mallopt:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
        self.handling.__enter__()
        return self

    def __exit__(self, *error):
        try:
            self.wait()
        finally:
            self.handling.__exit__(None, None, None)
            self.lock.close()

    def _stop(self, number, _):
        """Further signals change nothing, but for a second Ctrl-C, which ends at once: what is being written has no name yet."""
        if not self.preempted.is_set():
            self.signal, self.asked = signal.Signals(number).name, time.monotonic()
            self.preempted.set()
            with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, f"{self.signal}: stopping after the step in hand, once it is saved\n".encode())
        elif number == signal.SIGINT and time.monotonic() > self.asked + 1:  # some tools send one twice
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def finish(self, result: dict):
        """Notes that the run has ended, and how."""
        write(self.folder / "finished.pt", result)

    def finished(self) -> dict | None:
        path = self.folder / "finished.pt"
        return load(path) if path.exists() else None

    def files(self) -> list[tuple[int, Path]]:
        """(step, file), oldest step first."""
        found = ((re.fullmatch(r"checkpoint_step(\d+)\.pt", path.name), path) for path in self.folder.iterdir())
        return sorted((int(match[1]), path) for match, path in found if match)

    def find(self, which: str | None) -> tuple[Path, dict] | tuple[None, None]:
        """
        which: a file; "latest", the newest that is whole; or None, the same, but there may be none yet. Where files are there but
        none is whole, that is an error: to start from nothing would overwrite them.
        """
        files = self.files()
        if which not in (None, "latest"):
            path = Path(which)
            if not path.is_file():
                what = "a folder" if path.is_dir() else "no such file"
                raise ValueError(f"{path}: {what}: --resume takes latest or a checkpoint_step*.pt")
            if files and path.resolve().parent != self.folder.resolve():
                raise ValueError(f"{self.folder} has checkpoints of its own, which those that follow {path} would overwrite: "
                                 "choose another --run_id")
            return path, read(path)
        for _, path in reversed(files):
            try:
                return path, read(path)
            except Broken as e:
                self.say(f"skipped {e}")
        if files:
            raise ValueError(f"{self.folder}: none of its {len(files)} checkpoints is whole: remove the folder to start afresh, or choose "
                             "another --run_id")
        if which:
            raise ValueError(f"{self.folder}: holds no checkpoint to resume from: leave out --resume to start afresh")
        return None, None

    def save(self, step: int, state: dict):
        """Writes a state that nobody will change any more. Raises what went wrong with the save before, if its state was not finite."""
        self.wait()
        self.thread = threading.Thread(target=self._save, args=(step, state))
        self.thread.start()

    def _save(self, step: int, state: dict):
        path, t0 = self.folder / f"checkpoint_step{step:06d}.pt", time.perf_counter()
        try:
            self.error = None
            join(state)
            if name := not_finite(state):
                raise FloatingPointError(f"{name} holds a number that is not finite after step {step}: not saved, older checkpoints are "
                                         f"in {self.folder}")
            write(path, state)
            said = f"checkpoint {path}: {path.stat().st_size / 2**20:.1f} MiB in {time.perf_counter() - t0:.1f}s, beside training"
            older = [file for n, file in self.files() if n < step]
            for file in older[:max(0, len(older) - self.keep + 1)]:
                file.unlink()
        except FloatingPointError as e:
            self.error = e
            return
        except (OSError, RuntimeError) as e:  # a full disk does not end a run
            self.error = OSError(f"{path}: {getattr(e, 'strerror', None) or e}; older checkpoints are as they were")
            said = f"checkpoint failed: {self.error}; training goes on"
        with contextlib.suppress(OSError):  # where the log cannot be written to, the training loop will find out
            self.say(said)

    def wait(self, must: bool = False):
        """Until the last save is on the disk. Raises its error, one of the disk only if it must be there."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
            if isinstance(self.error, FloatingPointError) or must and self.error:
                raise self.error
