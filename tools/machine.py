"""
Can this machine's TPU be used, and what is to be expected of it? run_tpu.sh asks before it does anything that takes long.

    machine.py find                          the TPU's name, nothing where there is none, or one line on what is in the way
    machine.py room GB VENV SHARDS DATA      is there room for GB more in VENV and for the shards that are not in DATA yet?
    machine.py open v6e-8 --price DOLLARS    opens the TPU, says what was found, how long training will take there, and cost

The system's Python runs this before there is an environment: but for `open`, nothing but Python 3.8 is needed.
"""
from __future__ import annotations

import argparse
import errno
import grp
import http.client
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from chips import RECORD, TPUS, Chip, Refused, Tpu, ids_on_bus, read, supported, this_chip, tpu_named

ON_CPU = "PJRT_DEVICE=CPU runs the rehearsal without it"

# -----------------------------------------------------------------------------
# In the way. root: where the machine's /sys, /dev and /proc are; tests have others

def find_tpu(root: str = "/", environ: dict = os.environ) -> Tpu | None:
    """This machine's TPU, which may be opened and which nobody holds; None without one. Refused says what is in the way."""
    try:
        chip = this_chip(os.path.join(root, "sys"))
    except Refused as e:
        raise Refused(f"{e}; {ON_CPU}") from None
    if chip is None:
        return None
    chips = len(ids_on_bus(os.path.join(root, "sys")))
    check_one_host(chip, environ)
    tpu = next((tpu for tpu in TPUS.values() if tpu.chip is chip and tpu.chips == chips), None)
    if tpu is None or not tpu.trains:
        what = f"this machine's TPU is {chips} {chip.name} chip{'s' * (chips > 1)}" + (f", a {tpu.name}" if tpu else "")
        raise Refused(f"{what}: {supported()}; {ON_CPU}")
    check_nodes(root, tpu)
    return tpu


def check_one_host(chip: Chip, environ: dict):
    """A slice of several machines looks like a small TPU on each, and waits for ever for the others."""
    names = environ.get("TPU_WORKER_HOSTNAMES") or ""
    hosts = len([name for name in names.split(",") if name.strip()]) or len(endpoints(environ))
    kind = re.fullmatch(r"v\d\w*-(\d+)", environ.get("TPU_ACCELERATOR_TYPE") or "")
    largest = max(int(tpu.name.split("-")[1]) for tpu in TPUS.values() if tpu.chip is chip)
    if hosts > 1 or (kind and int(kind.group(1)) > largest):
        what = f"{hosts} machines" if hosts > 1 else f"several machines, a {kind.group()}"
        raise Refused(f"this TPU is a slice of {what}, of which this one sees its own chips only: {supported()}, on one machine; {ON_CPU}")


def endpoints(environ: dict) -> list[str]:
    """The machines of this slice, as Google's metadata server knows them; none where there is no such server."""
    if environ.get("TPU_SKIP_MDS_QUERY"):
        return []
    host = environ.get("GCE_METADATA_HOST") or "169.254.169.254"  # metadata.google.internal, where a name server could take its time
    request = urllib.request.Request(f"http://{host}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
                                     headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=1) as answer:
            return answer.read().decode(errors="replace").split(",")
    except (OSError, http.client.HTTPException):
        return []


def check_nodes(root: str, tpu: Tpu):
    """Refused unless each chip's device file is there, nobody holds it and this user may open it."""
    nodes, folder = sorted([*Path(root, "dev/vfio").glob("[0-9]*"), *Path(root, "dev").glob("accel[0-9]*")]), Path(root, "dev/vfio")
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise Refused(f"the TPU may not be opened: /dev/vfio {permissions(folder)}. An administrator can let you, until the machine's next "
                      f"start, with `sudo chmod a+rx /dev/vfio`; {ON_CPU}")
    if not nodes:
        raise Refused(f"{tpu.chips} {tpu.chip.name} chips on the PCI bus, but no /dev/vfio/N or /dev/accelN: a container needs "
                      f"--privileged; {ON_CPU}")
    holders, hidden = processes(root)
    check_free(root, holders)
    for node in nodes:
        shown = "/" + os.path.relpath(node, root)
        try:
            os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        except OSError as e:
            if e.errno == errno.EBUSY or (e.errno == errno.EPERM and os.access(node, os.R_OK | os.W_OK)):
                perhaps = [told(root, pid) for pid in hidden if "python" in read(Path(root, f"proc/{pid}/cmdline"))][:3]
                why = (f"is busy: a process of another user or container holds {shown}" + f", perhaps {', '.join(perhaps)}" * bool(perhaps)
                       + f". `sudo fuser -v {shown}` names it. Wait for that, or have it stopped")
            elif e.errno in (errno.EACCES, errno.EPERM):
                every = re.sub(r"\d+$", "*", shown)
                why = (f"may not be opened: {shown} {permissions(node)}. An administrator can let you, until the machine's next start, "
                       f"with `sudo chmod a+rw {every}`; {ON_CPU}")
            else:
                why = f"does not open: {shown}: {e.strerror}. Restart the machine, or make a new one; {ON_CPU}"
            raise Refused(f"the TPU {why}") from None


def permissions(node: Path) -> str:
    """'belongs to root:vfio, mode 0660, and you are ada'; in a container whose rules forbid the device, modes say nothing."""
    try:
        found = node.stat()
    except OSError as e:
        return f"cannot be looked at ({e.strerror})"
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        group = str(found.st_gid)
    return f"belongs to {user(found.st_uid)}:{group}, mode {found.st_mode & 0o7777:04o}, and you are {user(os.geteuid())}"


def user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # a container's users need not have names
        return str(number)


def processes(root: str) -> tuple[list[int], list[int]]:
    """Those that hold a chip, and those of other users, which do not show what they hold."""
    holders, hidden = [], []
    for fds in Path(root, "proc").glob("[0-9]*/fd"):
        pid, links = int(fds.parent.name), []
        try:
            for fd in fds.iterdir():
                try:
                    links.append(os.readlink(fd))
                except OSError:  # closed by now
                    pass
        except PermissionError:
            hidden.append(pid)
        except OSError:  # it has ended
            pass
        if any(re.match(r"/dev/(vfio/|vfio/devices/vfio|accel)\d", link) for link in links):
            holders.append(pid)
    return sorted(holders), sorted(hidden)


def owner(root: str, pid: int) -> int:
    try:
        return Path(root, f"proc/{pid}").stat().st_uid
    except OSError:  # it has ended
        return os.geteuid()


def told(root: str, pid: int) -> str:
    """'process 77 (python train.py) of ada'"""
    of = f" of {user(owner(root, pid))}" if owner(root, pid) != os.geteuid() else ""
    return f"process {pid} ({read(Path(root, f'proc/{pid}/cmdline'))[:100]}){of}"


def check_free(root: str, holders: list[int]):
    """One process at a time can hold a chip."""
    if not holders:
        return
    above, pid = set(), os.getpid()  # the processes that this one was called from
    while pid > 0 and pid not in above:
        above.add(pid)
        parent = re.search(r"^PPid:\s*(\d+)", read(Path(root, f"proc/{pid}/status")), re.M)
        pid = int(parent.group(1)) if parent else os.getppid() if pid == os.getpid() else 0
    who = ", ".join(told(root, pid) for pid in holders)
    kernel = r"ipykernel|colab_kernel|jupyter"
    if above & set(holders) or any(re.search(kernel, read(Path(root, f"proc/{pid}/cmdline"))) for pid in holders):
        own = "this notebook's own kernel" if above & set(holders) else "a notebook's kernel"
        raise Refused(f"the TPU is busy: {own}, {who}, holds it since it imported torch_xla or used jax. Restart that kernel (in Kaggle "
                      "Run, in Colab Runtime > Restart session), and import neither before training")
    sudo = "sudo " * (os.geteuid() != 0 and any(owner(root, pid) != os.geteuid() for pid in holders))
    raise Refused(f"the TPU is busy: {who} holds it. Wait for that, or stop it: {sudo}kill {' '.join(map(str, holders))}")


def check_room(*wanted: tuple[float, Path, str]):
    """Each: GB, where, for what. Those on one disk need their sum."""
    disks = {}
    for gb, place, what in wanted:
        place = place.absolute()
        while not place.exists():
            place = place.parent
        if gb > 0:
            disks.setdefault(place.stat().st_dev, []).append((gb, place, what))
    for parts in disks.values():
        need, free, place = sum(gb for gb, _, _ in parts), shutil.disk_usage(parts[0][1]).free / 1e9, parts[0][1]
        if need > free:
            each = " and ".join(f"{gb:.1f} GB for {what}" for gb, _, what in parts)
            raise Refused(f"no room on disk: {free:.1f} GB are free at {place}, and {each} are needed: make room, or set VENV and "
                          "DATA_PATH to places on a larger disk")


def shards_to_come(shards: int, folder: Path) -> float:
    """GB of FineWeb that data/cached_fineweb10B.py will fetch: the validation shard and `shards` of training; -1: nothing."""
    there = [path for path in (folder / "data" / "fineweb10B").glob("fineweb_*.bin") if path.stat().st_size > 199e6]
    return 0.2 * max(0, shards + 1 - len(there))


OPENS = """
import torch_xla.runtime as xr
print("devices", xr.global_runtime_device_count(), xr.device_type())
"""


def open_tpu(tpu: Tpu, timeout: float = 300):
    """Refused unless torch_xla finds all chips of the TPU. In a process of its own, because what goes wrong there ends processes."""
    try:
        done = subprocess.run([sys.executable, "-c", OPENS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                              timeout=timeout, cwd=ROOT)
    except subprocess.TimeoutExpired:
        raise Refused(f"the TPU does not open: it did not answer within {timeout:.0f} s. Restart the machine; {ON_CPU}") from None
    found = re.search(r"^devices (\d+) (\w+)$", done.stdout, re.M)
    if not found:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or [f"status {done.returncode}"]
        telling = [line for line in lines if re.match(r"\w*(Error|Exception)\b|F\d{4} ", line)]
        why = (telling or lines)[-1][:400].rstrip(".")
        raise Refused(f"the TPU does not open: {why}. Restart the machine, or make a new one; {ON_CPU}")
    if found.groups() != (str(tpu.devices), "TPU"):
        knobs = sorted(name for name in os.environ if re.match(r"TPU_(VISIBLE|CHIPS|PROCESS|HOST)", name))
        raise Refused(f"torch_xla finds {found.group(1)} {found.group(2)} devices on a {tpu.name}, which has {tpu.devices}"
                      + (f": unset {', '.join(knobs)}" if knobs else ": restart the machine") + f"; {ON_CPU}")

# -----------------------------------------------------------------------------
# What to expect

def newest_report(tpu: Tpu, records: Path = ROOT / "records") -> dict | None:
    """What the newest report of `aot` that has a total for the record on this TPU says of it."""
    for path in sorted(records.glob("*/report.json"), reverse=True):
        report = json.loads(path.read_text())
        for part in report.get("tpus", [report]):
            same = part.get("tpu", tpu.name if part.get("topology") == tpu.topology else None) == tpu.name
            if report.get("record") == RECORD and same and part.get("total_est_s") and part.get("preset", "record") == "record":
                return part
    return None


def estimate(tpu: Tpu, records: Path = ROOT / "records") -> tuple[float, int] | None:
    """(seconds of training, graphs) of the record on this TPU, where a report has them."""
    report = newest_report(tpu, records)
    return report and (report["total_est_s"], report.get("of") or len(report["graphs"]))


def expectation(tpu: Tpu, price: float | None = None, runs: int = 1, records: Path = ROOT / "records") -> str:
    """How long training takes and, with a price of the machine for an hour, what it costs."""
    known = estimate(tpu, records)
    if known is None:
        return f"how long training takes on it is not known: records/ has no estimate for {tpu.name}"
    seconds, graphs = known
    text = f"the record's training takes {seconds / 60:.1f} minutes" + (f", {runs} runs {runs * seconds / 60:.1f}" if runs > 1 else "")
    if price is not None:
        text += f", and ${runs * price * seconds / 3600:.2f} at ${price:g} an hour"
    return (f"{text}. That is the compiler's estimate, not a measurement. Before it {graphs} graphs are compiled, which takes minutes the "
            "first time")


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip(), allow_abbrev=False)
    words = parser.add_subparsers(dest="word", required=True)
    words.add_parser("find")
    room = words.add_parser("room")
    room.add_argument("gb", type=float)
    room.add_argument("venv", type=Path)
    room.add_argument("shards", type=int)
    room.add_argument("data", type=Path)
    room.add_argument("why", nargs="?", default="")
    opens = words.add_parser("open", allow_abbrev=False)
    opens.add_argument("tpu")
    opens.add_argument("--price")
    opens.add_argument("--runs", type=int)
    options, _ = parser.parse_known_args(argv)  # the others are training's, and so is it to say what is wrong with a price
    if options.word == "find":
        tpu = find_tpu(os.environ.get("SYS_ROOT") or "/")
        print(tpu.name if tpu else "")
    elif options.word == "room":
        check_room((options.gb, options.venv, f"the environment{options.why}"),
                   (shards_to_come(options.shards, options.data), options.data, "FineWeb's shards"))
    else:
        tpu = tpu_named(options.tpu)
        open_tpu(tpu)
        try:
            price = float(options.price)
        except (TypeError, ValueError):
            price = None
        print(f"run_tpu.sh: TPU found: {tpu.chips} {tpu.chip.name} chips, a {tpu.name}; {expectation(tpu, price, options.runs)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as e:
        sys.exit(f"run_tpu.sh: {e}")
