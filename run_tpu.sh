#!/usr/bin/env bash
set -euo pipefail
usage() {
  cat <<'END'
The one entrance. Makes its own Python environment; later calls find it in a second.

    bash run_tpu.sh [--options]       train: the record on a TPU (setup, data, training), or where there is none
                                      the rehearsal, a small model on 8 virtual CPU devices
    bash run_tpu.sh --seeds N         N such runs in a row, seeds 0 to N - 1, then tools/record_stats.py on their logs
    bash run_tpu.sh setup             only make or check the environment
    bash run_tpu.sh test [options]    ruff, then the quick tests; options go to pytest (-m slow: the slow ones)
    bash run_tpu.sh aot [options]     compile the record's steps for a TPU that need not be there (tools/aot.py; --tpu v6e-8)
    bash run_tpu.sh bench [options]   time the step (tools/bench_step.py)
    bash run_tpu.sh data [N]          download FineWeb10B: the validation shard and N train shards

Options of training: .venv/bin/python train_gpt_xla.py --help (--wandb is installed when it is asked for). A run with --save_every N --run_id NAME goes on after any stop by the
same command; stopped by SIGTERM it exits with 75. Knobs, in the environment:

    PYTHON         a Python 3.11 or 3.12 to build from      (default: the first on the PATH that fits, else uv brings 3.12)
    VENV           the environment, from the repository     (.venv)
    TRAIN_CHUNKS   train shards to have; 0 with your own    (9)
    DATA_PATH      holds data/fineweb10B                    (the repository)
    TORCH_INDEX    where a torch without CUDA comes from    (https://download.pytorch.org/whl/cpu; PyPI's where that fails)
    PJRT_DEVICE    CPU: leave a TPU alone; with CPU_NUM_DEVICES (8)
END
}
PYTHON=${PYTHON:-}
VENV=${VENV:-.venv}
TRAIN_CHUNKS=${TRAIN_CHUNKS:-9}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
UV_PIN=uv==0.13.8
PYTHONS=(python3 python python3.12 python3.11 python3.10)  # of any version
later=  # train shards that will be fetched after setup, if any: there must be room for them too

say() { printf 'run_tpu.sh: %s\n' "$*"; }
die() { say "$@" >&2; exit 1; }

# What the caller named is relative to where the caller is; the rest is relative to the repository.
[[ $PYTHON != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
[[ -z ${DATA_PATH:-} || $DATA_PATH == /* ]] || export DATA_PATH="$PWD/$DATA_PATH"
cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
py=$VENV/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore HF_HUB_DISABLE_TELEMETRY=1
unset PYTHONDONTWRITEBYTECODE  # images of containers set it, and then each process parses torch and jax anew: 20 s, not 9

# ---- setup -------------------------------------------------------------------------------------------------------------------

# torch_xla's extension is linked to libpython3.x.so.1.0. Pythons that are one static executable (Debian's, uv's) either have
# that file beside them, or do not have it at all and cannot run torch_xla.
LIBPYTHON='
import ctypes, os, sys, sysconfig
so = f"libpython3.{sys.version_info[1]}.so.1.0"
paths = [os.path.join(d, so) for d in (sysconfig.get_config_var("LIBDIR") or "", os.path.join(sys.base_prefix, "lib"))]
paths = [p for p in paths if os.path.isfile(p)]
if not paths:
    ctypes.CDLL(so)
'
FITS='
import sys
if not (3, 11, 0, "final") <= sys.version_info < (3, 13):
    sys.exit(1)
import ensurepip, ssl, venv
'$LIBPYTHON
# The wheel looks for libraries in torch_xla/lib, so that is where a libpython that the system does not know goes.
FINISH=$LIBPYTHON'
lib = os.path.join(sysconfig.get_path("purelib"), "torch_xla", "lib")
os.makedirs(lib, exist_ok=True)
if paths and not os.path.lexists(os.path.join(lib, so)):
    os.symlink(paths[0], os.path.join(lib, so))
import jax, torch, torch_xla
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, torch_xla {torch_xla.__version__}, jax {jax.__version__}")
'
# What a complete environment is: this Python, these pins, and all of them there.
STATE='
import hashlib, re, sys
from importlib.metadata import version
text = "".join(open(path).read() for path in sys.argv[1:])
for name, pin in re.findall(r"^([\w-]+)(?:\[.*?\])?==(\S+)", text, re.M):
    assert version(name).split("+")[0] == pin, name
print(hashlib.sha256((sys.version + text).encode()).hexdigest())
'
REACHABLE='
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).read(1)
except urllib.error.HTTPError:
    sys.exit(2)  # there is a network
'
setup() (  # `setup -wandb` installs requirements-wandb.txt, too. A subshell: its lock and its scratch folder go when it ends
  extra=${1:-}
  [[ -e requirements$extra.txt ]] || extra=
  exec 9<requirements.txt
  flock -n 9 || { say "another setup is at work, waiting for it"; flock 9; }
  if complete "" && { [[ -z $extra ]] || complete "$extra"; }; then exit 0; fi
  scratch=$(mktemp -d)
  trap 'rm -rf -- "$scratch"' EXIT
  uv=
  complete "" || make
  [[ -z $extra ]] || add "$extra"
  say "$VENV is complete, after $SECONDS s"
)

complete() { [[ -s $VENV/.complete$1 && $(state "$1") == "$(<"$VENV/.complete$1")" ]]; }

state() { "$py" -c "$STATE" "requirements$1.txt" 2>/dev/null || true; }

finish() {
  state "$1" > "$scratch/complete"
  [[ -s $scratch/complete ]] || die "what was installed is not what requirements$1.txt says"
  mv -- "$scratch/complete" "$VENV/.complete$1"
}

make() {
  if [[ -e $VENV/pyvenv.cfg ]]; then
    say "$VENV is incomplete, broken or of other versions: making it anew"
    rm -rf -- "$VENV"
  elif [[ -e $VENV && -n $(ls -A -- "$VENV") ]]; then
    die "$VENV exists and is no virtual environment: remove it, or set VENV to another place"
  fi
  make_venv
  say "installing requirements.txt (under a minute with uv, 2 to 5 with pip)"
  torch_without_cuda
  install -r requirements.txt || give_up
  PJRT_DEVICE=CPU "$py" -c "$FINISH" || die "what was installed does not import, for the reason above; TORCH_INDEX=none takes PyPI's torch"
  finish ""
}

add() {
  say "installing requirements$1.txt"
  install -r "requirements$1.txt" -r requirements.txt || give_up
  finish "$1"
}

make_venv() {
  local p candidates=(python3.12 python3.11 python3 python)
  [[ -z $PYTHON ]] || candidates=("$PYTHON")
  for p in "${candidates[@]}"; do
    if "$p" -c "$FITS" >/dev/null 2>&1; then  # running it is the only test: a version manager's shim may be there and fail
      say "making $VENV with $(type -P "$p")"
      "$p" -m venv "$VENV"
      return
    fi
  done
  local needs="Python 3.11 or 3.12 with venv and libpython3.x.so"
  [[ -z $PYTHON ]] || die "PYTHON=$PYTHON does not run, or is not $needs"
  say "no $needs on the PATH: getting 3.12 through uv"
  if get_uv && UV_PYTHON_PREFERENCE=only-managed "$uv" venv -q --seed --python 3.12 "$VENV"; then return; fi
  ! offline || die "no $needs, and none can be fetched: $NO_INTERNET"
  die "no $needs, and uv could not bring one: install one (Ubuntu: python3.12-venv and libpython3.12) or set PYTHON=/path/to/python3.12"
}

get_uv() {  # sets uv; false where there is none and pip cannot bring it. A pip of any Python will do
  local p
  [[ -z $uv ]] || return 0
  if uv --version >/dev/null 2>&1; then uv=uv; return 0; fi
  for p in "$py" "${PYTHONS[@]}"; do
    if "$p" -m pip install -q --target "$scratch/uv" --retries 1 "$UV_PIN" >/dev/null 2>&1; then uv=$scratch/uv/bin/uv; return 0; fi
  done
  return 1
}

torch_without_cuda() {  # PyPI's torch brings CUDA packages and does not load without them; a TPU needs none
  if timeout 10 "$py" -c "$REACHABLE" "$TORCH_INDEX" 2>/dev/null; then
    room 3
    install --no-deps --index-url "$TORCH_INDEX" "$(grep -o '^torch==[^ ]*' requirements.txt)" ||
      { cat "$scratch/why" >&2; say "no such torch at $TORCH_INDEX: taking PyPI's"; }
  elif ! offline; then
    room 9 "; $TORCH_INDEX does not answer, and PyPI's torch brings 6 GB of CUDA packages"
    say "$TORCH_INDEX does not answer: taking PyPI's torch, with 6 GB of CUDA packages that nothing here uses"
  fi
}

install() {  # by uv in a quarter of pip's time, else by pip
  if get_uv; then
    if "$uv" pip install -q --python "$py" "$@" 2>"$scratch/why"; then return; fi
    offline || { cat "$scratch/why" >&2; say "uv failed, for the reason above: trying pip"; }
  fi
  "$py" -m pip install -q "$@" 2>"$scratch/why"
}

NO_INTERNET="pypi.org does not answer: there is no internet here. In a notebook switch it on (Kaggle: Settings > Turn on internet); behind a \
proxy set HTTPS_PROXY, with a mirror PIP_INDEX_URL"

give_up() {
  ! offline || die "the installation failed: $NO_INTERNET"
  cat "$scratch/why" >&2
  die "the installation failed, for the reason above; what is there is kept out of use"
}

offline() {  # where nothing but PyPI is set up to install from, and it does not answer
  local p status=0
  p=$(some_python)
  ! compgen -e | grep -qE '^(PIP|UV)_(NO_INDEX|FIND_LINKS|.*INDEX.*)$' || return 1
  [[ -n $p ]] && ! "$p" -m pip config list 2>/dev/null | grep -qE 'index|find-links' || return 1
  timeout 10 "$p" -c "$REACHABLE" https://pypi.org/simple 2>/dev/null || status=$?
  ((status == 1 || status == 124))
}

# ---- the TPU -----------------------------------------------------------------------------------------------------------------

some_python() {  # one that can run tools/machine.py, before there is an environment
  local p
  for p in "$py" "${PYTHONS[@]}"; do
    if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1; then echo "$p"; return; fi
  done
}

machine() { "$(some_python)" tools/machine.py "$@"; }

room() { machine room "$1" "$VENV" "${later:--1}" "${DATA_PATH:-.}" "${2:-}" || exit 1; }  # GB that the environment still takes

pick_device() {  # exports PJRT_DEVICE, sets tpu: its name, or nothing
  tpu=
  if [[ ${PJRT_DEVICE:-TPU} != TPU ]]; then
    say "PJRT_DEVICE=$PJRT_DEVICE is set: no TPU is used"
  else
    [[ $(some_python) ]] || setup
    tpu=$(machine find) || exit 1
    if [[ $tpu ]]; then
      export PJRT_DEVICE=TPU
      return
    fi
    [[ -z ${PJRT_DEVICE:-} ]] || die "PJRT_DEVICE=TPU is set, but this machine has no TPU; unset it for the rehearsal on CPU"
    say "no TPU on this machine: 8 virtual CPU devices stand in for its chips"
  fi
  on_cpu
}

on_cpu() { export PJRT_DEVICE="${PJRT_DEVICE:-CPU}" CPU_NUM_DEVICES="${CPU_NUM_DEVICES:-8}"; }

# A step of the host touches thousands of small objects, all over its memory: with huge pages it takes less. GLIBC_TUNABLES= does without.
huge_pages() { export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}"; }

# ---- training ----------------------------------------------------------------------------------------------------------------

take_seeds() {  # sets seeds, empty for one run as its options say, and options, the others
  seeds= options=()
  while (($#)); do
    case $1 in
      --seeds) seeds=${2:-none}; shift ;;
      --seeds=*) seeds=${1#*=}; seeds=${seeds:-none} ;;
      *) options+=("$1") ;;
    esac
    shift $(($# > 0))
  done
  [[ -z $seeds || $seeds =~ ^[1-9][0-9]{0,3}$ ]] || die "--seeds '$seeds' is not a number of runs"
  if [[ $seeds && " ${options[*]} " =~ \ --(seed|run_id)[=\ ] ]]; then
    die "--seeds chooses each run's --${BASH_REMATCH[1]} itself: leave one of the two out"
  fi
}

train() {  # one run of a preset, or one for each seed
  local seed id logs=()
  [[ $seeds ]] || exec "$py" train_gpt_xla.py --preset "$1" "${options[@]}"
  printf -v id '%(%Y%m%d-%H%M%S)T' -1
  for ((seed = 0; seed < seeds; seed++)); do
    say "run $((seed + 1)) of $seeds"
    "$py" train_gpt_xla.py --preset "$1" "${options[@]}" --seed "$seed" --run_id "$id-seed$seed" ||
      die "the run with seed $seed failed, for the reason above; $seed runs finished: ${logs[*]:-}"
    logs+=("logs/$id-seed$seed.txt")
  done
  exec "$py" tools/record_stats.py "${logs[@]}"
}

# ---- the words ---------------------------------------------------------------------------------------------------------------

word=train
if (($#)) && [[ $1 != --* || $1 == --help ]]; then word=$1; shift; fi
case $word in
  help | -h | --help)
    usage
    ;;
  train)
    take_seeds "$@"
    pick_device
    [[ -z $tpu ]] || later=$TRAIN_CHUNKS
    [[ -z $tpu ]] || room 0
    if [[ " ${options[*]} " =~ \ --wandb[=\ ] ]]; then setup -wandb; else setup; fi
    huge_pages
    if [[ $tpu ]]; then
      "$py" tools/machine.py open "$tpu" --runs "${seeds:-1}" "${options[@]}" || exit 1
      "$py" data/cached_fineweb10B.py "$TRAIN_CHUNKS"
      train record
    fi
    say "so this is the rehearsal: the same code, a small model and a small corpus"
    "$py" data/demo.py --bytes # with a network or without: README's figures, and 86 steps are too few for GPT-2's tokens
    train rehearsal
    ;;
  setup)
    (($# == 0)) || die "setup takes no arguments"
    setup
    ;;
  test)
    setup -wandb
    on_cpu
    "$py" -m ruff check .
    exec "$py" -m pytest -q -n 2 --dist loadfile -m "not slow" "$@"
    ;;
  aot)
    setup
    exec "$py" tools/aot.py "$@"
    ;;
  bench)
    setup
    on_cpu
    huge_pages
    exec "$py" tools/bench_step.py "$@"
    ;;
  data)
    later=${1:-$TRAIN_CHUNKS}
    setup
    exec "$py" data/cached_fineweb10B.py "${@:-$TRAIN_CHUNKS}"
    ;;
  *)
    say "no such word: '$word'. Usage: bash run_tpu.sh [setup|test|aot|bench|data|help] [options]" >&2
    exit 2
    ;;
esac
