"""
run_tpu.sh in a scratch repository: which Python, which installer, which device, which script. Nothing is downloaded: stand-ins
for python and uv write down what they are asked to do, and /sys, /dev and /proc are made up. What may be in a TPU's way: test_machine.py.

    python -m pytest -q tests/test_run_tpu.py
"""
import http.server
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "cat cp dirname env find flock grep ls mkdir mktemp mv readlink rm sleep sort timeout touch tr".split()
BASH = shutil.which("bash")
FITTING = tuple(sys.version_info)
SO = f"libpython3.{sys.version_info[1]}.so.1.0"

# Code given with -c runs in the real Python, after PATCH; venv makes a folder with this stand-in in it; the rest is written down.
PYTHON = """#!{bash}
case $1 in
  -c) exec {real!r} -c {patch!r}$'\\n'"$2" "${{@:3}}" ;;
  tools/machine.py) exec {real!r} "$@" ;;
esac
if [[ "$1 $2" == "-m venv" ]]; then
  mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python"
  exit
fi
echo "$PJRT_DEVICE|$CPU_NUM_DEVICES|$DATA_PATH|${{0##*/}} $*" >> {log!r}
case $* in
  "-m pip config list") echo "global.timeout='60'"; echo "${{PIP_IS_SET_TO:-}}" ;;
  *--target*) [[ -z ${{PIP_BRINGS_UV:-}} ]] && exit 1; mkdir -p "$6/bin"; cp {uv!r} "$6/bin/uv" ;;
  *"-r requirements.txt") touch {log!r}.installing; sleep "${{PIP_TAKES:-0}}"; echo "${{PIP_SAYS:-}}" >&2; exit "${{PIP_FAILS:-0}}" ;;
esac
"""
UV = """#!{bash}
echo "uv $*" >> {log!r}
case $1 in
  venv) [[ -n ${{UV_FAILS:-}} ]] && exit 2; for venv; do :; done; {fitting!r} -m venv "$venv" ;;
  pip) exit "${{UV_FAILS:-0}}" ;;
esac
"""


class Repo:
    """A copy of run_tpu.sh with a PATH of its own, `bin`, and a machine of its own, `root`."""

    def __init__(self, tmp):
        self.dir, self.bin, self.root, self.log = tmp / "a repo", tmp / "bin", tmp / "root", tmp / "log"
        for folder in (self.dir, self.bin, self.root, tmp / "stand-ins"):
            folder.mkdir()
        (self.dir / "tools").mkdir()
        for name in ("run_tpu.sh", "chips.py", "tools/machine.py"):
            shutil.copy(ROOT / name, self.dir / name)
        pins = "".join(f"{name}=={version(name).split('+')[0]}  # a pin\n" for name in ("torch", "pytest"))
        (self.dir / "requirements.txt").write_text(pins)
        for name in ("jax", "torch", "torch_xla/__init__"):  # importing the real ones takes seconds
            (self.dir / f"{name}.py").parent.mkdir(exist_ok=True)
            (self.dir / f"{name}.py").write_text("__version__ = 'made up'\n")
        self.devices(8)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.uv = tmp / "stand-ins/uv"
        self.venv = self.dir / ".venv"
        fitting = self.python("python", where=tmp / "stand-ins")
        self.write(self.uv, UV.format(bash=BASH, log=str(self.log), fitting=str(fitting)))
        lib = tmp / "base/lib"  # where the stand-ins say their libpython is
        lib.mkdir(parents=True)
        for minor in (10, 11, 12, 13):
            (lib / f"libpython3.{minor}.so.1.0").touch()

    def devices(self, n):
        """What torch_xla will find on the TPU."""
        (self.dir / "torch_xla/runtime.py").write_text(f"global_runtime_device_count, device_type = lambda: {n}, lambda: 'TPU'\n")

    def write(self, path, text):
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def python(self, name, version_info=FITTING, libpython=True, where=None):
        """A stand-in for a Python of that version, on the PATH."""
        base = self.log.parent / ("base" if libpython else "elsewhere")
        patch = f"import ctypes, sys, sysconfig; sys.version_info = {version_info!r}; sys.base_prefix = {str(base)!r}; "
        patch += f"sysconfig.get_config_var = lambda _: None; sysconfig.get_path = lambda _: {str(self.venv / 'site')!r}"
        if not libpython:
            patch += "; ctypes.CDLL = open"  # raises as CDLL does
        text = PYTHON.format(bash=BASH, real=sys.executable, patch=patch, log=str(self.log), uv=str(self.uv))
        return self.write((where or self.bin) / name, text)

    def tpu(self, chips=8, device="0x006f", nodes="vfio/{}"):
        for i in range(chips):
            pci = self.root / f"sys/bus/pci/devices/0000:00:0{i}.0"
            pci.mkdir(parents=True)
            (pci / "vendor").write_text("0x1ae0\n")
            (pci / "device").write_text(f"{device}\n")
            if nodes:
                node = self.root / "dev" / nodes.format(i)
                node.parent.mkdir(parents=True, exist_ok=True)
                node.touch()

    def process(self, pid, target, cmdline=b"python\0train me.py\0"):
        fds = self.root / f"proc/{pid}/fd"
        fds.mkdir(parents=True)
        (fds.parent / "cmdline").write_bytes(cmdline)
        (fds / "3").symlink_to(target)

    def env(self, **more):
        nowhere = "http://127.0.0.1:9"
        env = {"PATH": str(self.bin), "HOME": str(self.root), "SYS_ROOT": str(self.root), "TORCH_INDEX": nowhere, "PIP_INDEX_URL": nowhere,
               "TPU_SKIP_MDS_QUERY": "1"}
        return {name: value for name, value in (env | more).items() if value is not None}

    def run(self, *args, cwd="/", script=None, **env):
        """(exit status, output) of `bash run_tpu.sh args`."""
        command = [BASH, str(script or self.dir / "run_tpu.sh"), *args]
        done = subprocess.run(command, cwd=cwd, env=self.env(**env), text=True, capture_output=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def asked(self):
        """What the stand-ins were asked since the last time, a line each: "PJRT_DEVICE|CPU_NUM_DEVICES|DATA_PATH|program args"."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def complete(self):
        return (self.venv / ".complete").exists()


@pytest.fixture
def repo(tmp_path):
    return Repo(tmp_path)


@pytest.fixture
def ready(repo):
    """A repository that is set up."""
    repo.python("python3")
    assert repo.run("setup")[0] == 0 and repo.complete()
    repo.asked()
    return repo


def test_unknown_word_is_refused_in_one_line(repo):
    for word in ("tset", "-x", ""):
        status, out = repo.run(word)
        assert status == 2 and f"'{word}'" in out and "setup|test|aot|bench|data" in out and out.count("\n") == 1
    assert not repo.venv.exists()


def test_help_starts_nothing(repo):
    for word in ("help", "-h", "--help"):
        status, out = repo.run(word)
        assert status == 0 and "TRAIN_CHUNKS" in out and "bench" in out
    assert not repo.venv.exists()


# ---- which device ------------------------------------------------------------------------------------------------------------


def test_tpu_trains_the_record(ready):
    ready.tpu()
    ready.process(77, "/dev/vfio/vfio")  # the control node: holds no chip
    status, out = ready.run("--seed", "2", "--price", "36", PJRT_DEVICE="TPU")
    assert status == 0 and "TPU found: 8 v6e chips, a v6e-8" in out and "no estimate for v6e-8" in out  # no records/ here
    data, train = ready.asked()
    assert data.endswith("data/cached_fineweb10B.py 9")
    assert train.startswith("TPU|") and train.endswith("train_gpt_xla.py --preset record --seed 2 --price 36")
    assert ready.run()[0] == 0 and ready.asked()[1].startswith("TPU|")  # unasked, too


def test_no_tpu_rehearses(ready):
    ready.tpu(chips=2, device="0x0042", nodes=None)  # Google's network controller, in every Google VM
    (ready.root / "dev/vfio").mkdir(parents=True)
    (ready.root / "dev/vfio/0").touch()  # a GPU that is passed through
    status, out = ready.run("--seed", "2")
    assert status == 0 and "no TPU" in out and "rehearsal" in out
    demo, train = ready.asked()
    assert demo.startswith("CPU|8|") and demo.endswith("data/demo.py --bytes")
    assert train.startswith("CPU|8|") and train.endswith("train_gpt_xla.py --preset rehearsal --seed 2")
    ready.run(CPU_NUM_DEVICES="2")
    assert all(line.startswith("CPU|2|") for line in ready.asked())


def test_seeds_are_runs_in_a_row_and_their_statistics(ready):
    status, out = ready.run("--price", "9", "--seeds", "3", "--train_files", "a b")
    assert status == 0 and "run 3 of 3" in out
    _, *runs, stats = [line.split("python ")[1] for line in ready.asked()]
    logs = stats.split()[1:]
    assert stats.startswith("tools/record_stats.py logs/") and len(set(logs)) == len(runs) == 3
    for seed, (run, log) in enumerate(zip(runs, logs)):
        assert run == f"train_gpt_xla.py --preset rehearsal --price 9 --train_files a b --seed {seed} --run_id {log[5:-4]}"
    for options, words in {("--seeds",): "not a number of runs", ("--seeds", "0"): "'0'", ("--seeds=x",): "'x'",
                           ("--seeds", "2", "--seed", "5"): "--seed itself", ("--seeds=2", "--run_id=a"): "--run_id itself"}.items():
        status, out = ready.run(*options)
        assert status == 1 and words in out and out.count("\n") == 1, out
    assert not ready.asked()


def test_a_failing_seed_ends_the_series(ready):
    ready.write(ready.venv / "bin/python", (ready.venv / "bin/python").read_text() + '[[ $* != *"--seed 1"* ]]\n')
    status, out = ready.run("--seeds", "3")
    assert status == 1 and "the run with seed 1 failed" in out and "1 runs finished: logs/" in out
    assert not any("record_stats" in line or "--seed 2" in line for line in ready.asked())


def test_pjrt_device_is_respected(ready):
    assert ready.run(PJRT_DEVICE="TPU")[0] == 1 and not ready.asked()  # there is none
    ready.tpu()
    ready.process(4242, "/dev/vfio/0")
    assert ready.run(PJRT_DEVICE="CPU")[0] == 0  # a busy TPU does not matter then
    assert ready.asked()[1].endswith("--preset rehearsal")


def test_what_is_in_a_tpus_way_is_told_before_anything_is_made(repo):
    """One line each, no "TPU found" before it, and nothing installed, fetched or trained."""
    repo.python("python3", version_info=(3, 10, 12, "final", 0))  # a TPU image's own
    def refused(words, **env):
        status, out = repo.run(**env)
        assert status == 1 and words in out and out.startswith("run_tpu.sh: ") and out.count("\n") == 1, out
        assert "TPU found" not in out and not repo.asked() and not repo.venv.exists()
    repo.tpu(nodes=None)
    refused("--privileged")
    shutil.rmtree(repo.root / "sys")
    repo.tpu()
    refused("a slice of 4 machines", TPU_WORKER_HOSTNAMES="a,b,c,d")
    refused("200000000.0 GB for FineWeb's shards", TRAIN_CHUNKS="999999999")
    repo.process(4242, "/dev/vfio/2")
    refused("process 4242 (python train me.py) holds it")
    shutil.rmtree(repo.root / "sys")
    repo.tpu(device="0x0027", nodes=None)
    refused("v2 or v3: the record trains on v6e-8")
    assert repo.run("setup", PIP_BRINGS_UV="1")[0] == 0  # a TPU is not looked at for the other words


def test_a_tpu_that_does_not_open_ends_before_data(ready):
    ready.tpu()
    ready.devices(4)
    status, out = ready.run()
    assert status == 1 and "torch_xla finds 4 TPU devices on a v6e-8" in out and "TPU found" not in out and not ready.asked()


# ---- which Python ------------------------------------------------------------------------------------------------------------


def test_python_that_does_not_run_or_fit_is_passed_over(repo):
    repo.write(repo.bin / "python3.12", f"#!{BASH}\necho 'no such version'; exit 127\n")  # a version manager's shim
    repo.python("python3.11", version_info=(3, 11, 0, "candidate", 1))  # Ubuntu 22.04's
    repo.python("python3", version_info=(3, 13, 0, "final", 0))  # libtpu has no wheel for it
    repo.python("python")
    status, out = repo.run("setup")
    assert status == 0 and f"with {repo.bin}/python\n" in out and repo.complete()


def test_only_python_310_gets_uv_through_pip(repo):
    repo.python("python3", version_info=(3, 10, 13, "final", 0))
    status, out = repo.run("setup", PIP_BRINGS_UV="1")
    assert status == 0 and repo.complete(), out
    asked = repo.asked()
    assert any("--target" in line and "uv==" in line for line in asked)
    assert any(line.startswith("uv venv") and "--python 3.12" in line for line in asked)
    assert repo.run("setup", PIP_BRINGS_UV="1") == (0, "") and not repo.asked()


def test_python_without_its_shared_library_is_passed_over(repo):
    repo.python("python3.12", libpython=False)
    status, out = repo.run("setup")
    assert status == 1 and "libpython" in out and "PYTHON=" in out
    assert repo.run("setup", PIP_BRINGS_UV="1")[0] == 0 and repo.complete()


def test_no_python_at_all_is_one_clear_line(repo):
    status, out = repo.run("setup")
    assert status == 1 and "PYTHON=/path/to/python3.12" in out.splitlines()[-1] and len(out.splitlines()) == 2


def test_python_knob(repo, tmp_path):
    chosen = repo.python("my python", where=tmp_path)
    status, out = repo.run("setup", PYTHON="./my python", cwd=tmp_path)
    assert status == 0 and repo.complete() and chosen.name in out
    repo.python("python3")
    status, out = repo.run("setup", PYTHON="/none", VENV=".other")
    assert status == 1 and "PYTHON=/none" in out  # not another one in silence


# ---- a complete environment, or none -----------------------------------------------------------------------------------------


def test_second_setup_does_nothing(ready):
    assert ready.run("setup") == (0, "") and not ready.asked()


def test_changed_pins_missing_packages_and_dead_python_make_it_anew(ready):
    with open(ready.dir / "requirements.txt", "a") as f:
        f.write("# changed\n")
    assert "anew" in ready.run("setup")[1] and ready.complete() and ready.asked()
    (ready.venv / "bin/python").unlink()
    (ready.venv / "bin/stale").touch()
    assert "anew" in ready.run("setup")[1] and ready.complete() and not (ready.venv / "bin/stale").exists()
    (ready.dir / "requirements.txt").write_text("pytest==0.0.1\n")  # as if another had been installed by hand
    status, out = ready.run("setup")
    assert status == 1 and "not what requirements.txt says" in out and not ready.complete()


def test_failed_install_is_not_complete(repo):
    repo.python("python3")
    status, out = repo.run("setup", PIP_FAILS="1")
    assert status == 1 and "failed" in out and not repo.complete()
    assert repo.run("setup")[0] == 0 and repo.complete()


def test_no_internet_is_told_in_one_line(repo):
    repo.python("python3")
    offline = dict(PIP_INDEX_URL=None, HTTPS_PROXY="http://127.0.0.1:9", PIP_FAILS="1", PIP_SAYS="WARNING: Retrying")
    status, out = repo.run("setup", **offline)
    assert status == 1 and "there is no internet here" in out.splitlines()[-1] and "WARNING" not in out and not repo.complete()
    assert "CUDA" not in out
    for known in ({"UV_DEFAULT_INDEX": "http://mirror"}, {"PIP_IS_SET_TO": "global.index-url='http://mirror'"}):
        status, out = repo.run("setup", **{**offline, **known})  # then it is not PyPI that counts
        assert status == 1 and "no internet" not in out and "WARNING" in out
    (repo.bin / "python3").unlink()
    repo.python("python3", version_info=(3, 10, 12, "final", 0))
    shutil.rmtree(repo.venv)
    assert "none can be fetched: pypi.org does not answer" in repo.run("setup", **offline)[1]


def test_no_room_is_told_before_installing(repo):
    """PyPI's torch needs more of it."""
    repo.python("python3")
    df = repo.dir / "sitecustomize.py"  # of a small disk
    df.write_text("import collections, shutil\nshutil.disk_usage = lambda _: collections.namedtuple('usage', 'free')(4e9)\n")
    status, out = repo.run("setup", PYTHONPATH=str(repo.dir))
    assert status == 1 and "no room on disk: 4.0 GB are free" in out and "9.0 GB for the environment" in out
    assert not any("-r requirements.txt" in line for line in repo.asked()) and not repo.complete()
    df.write_text(df.read_text().replace("4e9", "10e9"))
    assert repo.run("setup", PYTHONPATH=str(repo.dir))[0] == 0


def test_wandb_is_installed_when_it_is_asked_for(repo):
    repo.python("python3")
    wanted = repo.dir / "requirements-wandb.txt"
    assert repo.run("--wandb", "mine")[0] == 0 and repo.complete()  # no such file: nothing to do
    repo.asked()
    wanted.write_text(f"ruff=={version('ruff')}  # stands in for it\n")
    installs = lambda: [line for line in repo.asked() if "pip install" in line and "--target" not in line]
    assert repo.run()[0] == 0 and not installs()
    for options in (["--lr", "1", "--wandb"], ["--wandb=mine"], ["test"]):
        (repo.venv / ".complete-wandb").unlink(missing_ok=True)
        assert repo.run(*options)[0] == 0
        [line] = installs()
        assert line.endswith("install -q -r requirements-wandb.txt -r requirements.txt")
    for options in (["--wandb", "mine"], []):  # it is there, and in no one's way
        assert repo.run(*options)[0] == 0 and not installs()
    wanted.write_text("ruff==0.0.1\n")
    status, out = repo.run("--wandb")
    assert status == 1 and "not what requirements-wandb.txt says" in out and repo.complete()
    assert repo.run()[0] == 0


def test_install_that_does_not_import_is_not_complete(repo):
    repo.python("python3")
    (repo.dir / "torch_xla/__init__.py").write_text("raise ImportError('undefined symbol')\n")
    status, out = repo.run("setup")
    assert status == 1 and "undefined symbol" in out and not repo.complete()


def installing(repo, seconds):
    """A setup that is in the middle of its installation."""
    command = [BASH, str(repo.dir / "run_tpu.sh"), "setup"]
    process = subprocess.Popen(command, env=repo.env(PIP_TAKES=seconds), start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not Path(f"{repo.log}.installing").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_interrupted_setup_is_not_complete(repo):
    repo.python("python3")
    process = installing(repo, "60")
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(10)
    assert (repo.venv / "bin/python").exists() and not repo.complete()
    status, out = repo.run("setup")
    assert status == 0 and "anew" in out and repo.complete()


def test_second_setup_at_the_same_time_waits(repo):
    repo.python("python3")
    first = installing(repo, "1")
    status, out = repo.run("setup")
    assert status == 0 and "waiting" in out and "anew" not in out and first.wait(10) == 0
    assert sum(line.endswith("-r requirements.txt") for line in repo.asked()) == 1


def test_bytecode_is_kept_whatever_the_image_says(repo):
    repo.python("python3")
    assert repo.run("setup", PYTHONDONTWRITEBYTECODE="1")[0] == 0
    assert list(repo.dir.glob("__pycache__/torch.*.pyc"))


def test_a_folder_that_is_no_environment_is_left_alone(repo):
    repo.python("python3")
    repo.venv.mkdir()
    (repo.venv / "thesis.tex").touch()
    status, out = repo.run("setup")
    assert status == 1 and "no virtual environment" in out and (repo.venv / "thesis.tex").exists()


def test_libpython_is_linked_where_torch_xla_looks(ready):
    link = ready.venv / "site/torch_xla/lib" / SO
    assert link.is_symlink() and link.exists()


# ---- which installer, which torch --------------------------------------------------------------------------------------------


def test_uv_installs_and_pip_stands_in(repo):
    repo.python("python3")
    shutil.copy(repo.uv, repo.bin / "uv")
    assert repo.run("setup")[0] == 0
    installs = [line for line in repo.asked() if line.endswith("-r requirements.txt")]
    assert len(installs) == 1 and installs[0].startswith("uv pip install")
    (repo.venv / ".complete").unlink()
    assert repo.run("setup", UV_FAILS="1")[0] == 0 and repo.complete()
    installs = [line for line in repo.asked() if line.endswith("-r requirements.txt")]
    assert len(installs) == 2 and "python -m pip install" in installs[1]


def test_torch_without_cuda_where_its_index_answers(repo):
    repo.python("python3")
    with http.server.HTTPServer(("127.0.0.1", 0), type("Index", (http.server.BaseHTTPRequestHandler,), {
        "do_GET": lambda self: (self.send_response(200), self.end_headers()), "log_message": lambda *_: None,
    })) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/whl/cpu"
        assert repo.run("setup", TORCH_INDEX=url)[0] == 0
        server.shutdown()
    first, second = [line for line in repo.asked() if "--target" not in line]
    assert first.endswith(f"--no-deps --index-url {url} torch=={version('torch').split('+')[0]}")
    assert second.endswith("-r requirements.txt")


# ---- the other words ---------------------------------------------------------------------------------------------------------


def test_words_run_their_scripts(ready):
    ready.tpu()
    for args, expected in {
        ("test", "-k", "x y"): ["CPU|8||python -m ruff check .", "CPU|8||python -m pytest -q -n 2 --dist loadfile -m not slow -k x y"],
        ("aot", "--T", "1"): ["|||python tools/aot.py --T 1"],
        ("bench", "--n", "1"): ["CPU|8||python tools/bench_step.py --n 1"],
        ("data",): ["|||python data/cached_fineweb10B.py 9"],
        ("data", "1"): ["|||python data/cached_fineweb10B.py 1"],
    }.items():
        assert ready.run(*args)[0] == 0 and ready.asked() == expected
    assert ready.run("setup", "now")[0] == 1


def test_through_a_link_with_relative_paths(ready, tmp_path):
    link = tmp_path / "go"
    link.symlink_to(ready.dir / "run_tpu.sh")
    assert ready.run("data", script=link, cwd=tmp_path, DATA_PATH="my data", TRAIN_CHUNKS="3")[0] == 0
    assert ready.asked() == [f"||{tmp_path}/my data|python data/cached_fineweb10B.py 3"]


def test_a_failing_step_fails_the_run(ready):
    ready.write(ready.venv / "bin/python", (ready.venv / "bin/python").read_text() + '[[ $* != data/* && $* != *ruff* ]]\n')
    assert ready.run()[0] == 1 and len(ready.asked()) == 1  # no training without data
    assert ready.run("test")[0] == 1 and len(ready.asked()) == 1
