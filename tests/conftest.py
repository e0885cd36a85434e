"""What several test files use: a toy corpus, and the training script run on it in a process of its own."""
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("CPU_NUM_DEVICES", "8")
import numpy as np
import pytest

# A shell that starts a job in the background has it ignore these, and what it starts in turn: tests of signals need them as they are.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
BOS = 300

def write_shard(path: Path, tokens, magic=20240520, version=1, promised=None):
    """A shard in llm.c's format, or a broken one."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if promised is None else promised
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())

def make_tokens(n: int, seed: int) -> np.ndarray:
    """Documents of 5 to 90 tokens whose next token is nearly always one of two: easy to learn, far below its unigram entropy."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros(n, dtype=np.uint16)
    i = 0
    while i < n:
        length, x = rng.integers(5, 90), rng.integers(0, 256)
        document = [BOS]
        for _ in range(length):
            document.append(x)
            x = (5 * x + rng.choice([1, 7])) % 256
        tokens[i:i + len(document)] = document[:n - i]
        i += len(document)
    return tokens

@pytest.fixture(scope="session", autouse=True)
def devices():
    """Before any test: autograd counts the devices at its first backward pass, and would miss those that come later."""
    import train_gpt_xla
    from spmd import COMPILE_FAST
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", COMPILE_FAST)  # for this process, whose compilations take longer than they run
        train_gpt_xla.setup_devices()
        train_gpt_xla.to_device(train_gpt_xla.torch.ones(8)).add(1).cpu()  # XLA reads its flags when it compiles

@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Two training shards, the first of which ends within a run, and a validation shard."""
    folder = tmp_path_factory.mktemp("corpus")
    write_shard(folder / "train_000.bin", make_tokens(7_500, 1))
    write_shard(folder / "train_001.bin", make_tokens(120_000, 2))
    write_shard(folder / "val_000.bin", make_tokens(6_000, 3))
    return folder

TOY = dict(vocab_size=301, bos_id=BOS, head_dim=8, model_dim=48, bigram_vocab_size=1024, bigram_dim=48, bigram_sign_table_rows=37,
           block_size=8, dc_window=14, train_bs_schedule="256,512,768,768", train_max_seq_len_schedule="24,32,32,32", val_batch_size=1024,
           val_tokens=2048, num_scheduled_iterations=24, num_extension_iterations=4, val_loss_every=14, train_loss_every=5, run_id="toy")

def toy_options(corpus: Path, **fields) -> list[str]:
    fields = TOY | dict(train_files=corpus / "train_*.bin", val_files=corpus / "val_*.bin") | fields
    return [x for name, value in fields.items() for x in (f"--{name}", str(value))]

IMPORTS = dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))

def program(name: str, *args, cwd: Path | None = None, **environment) -> subprocess.CompletedProcess:
    """One of tests/programs, finished without an error."""
    command = [sys.executable, ROOT / "tests/programs" / name, *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **IMPORTS, **environment}, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return result

def training(program: str, *options: str, devices: int) -> tuple[list, dict]:
    """Command and environment of train_gpt_xla.py, or of one of tests/programs that calls it."""
    from spmd import COMPILE_FAST
    env = dict(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(devices), XLA_FLAGS=COMPILE_FAST)
    script = ROOT / "tests/programs" / program if program else ROOT / "train_gpt_xla.py"
    return [sys.executable, script, *options], os.environ | IMPORTS | env

def run_train(folder: Path, corpus: Path, *options: str, devices: int = 8, program: str = "", timeout: int = 600, **fields):
    """train_gpt_xla.py, or a program that calls it, in `folder` on the toy model. Returns the finished process."""
    command, env = training(program, *options, *toy_options(corpus, **fields), devices=devices)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)

def one_line(tool, *argv) -> str:
    """A tool refuses, with one line that names it."""
    with pytest.raises(SystemExit) as e:
        tool.main([str(x) for x in argv])
    assert isinstance(e.value.code, str) and e.value.code.startswith(tool.__name__ + ".py: ") and "\n" not in e.value.code
    return e.value.code
