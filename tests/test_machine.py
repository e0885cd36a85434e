"""
chips.py and tools/machine.py: which TPU this is, and what is in its way. /sys, /dev and /proc are made up; each refusal is one line.

    python -m pytest -q tests/test_machine.py
"""
import errno
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import chips
from chips import CHIPS, TPUS, Refused

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import machine

ALONE = {"TPU_SKIP_MDS_QUERY": "1"}  # no question to Google's metadata server


def computer(root, *devices, nodes="vfio/{}"):
    """A machine with these PCI devices: an id, or an id and a class."""
    for i, device in enumerate(devices):
        pci, kind = device if isinstance(device, tuple) else (device, None)
        folder = root / f"sys/bus/pci/devices/0000:00:{i:02x}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text(f"{pci}\n")
        if kind:
            (folder / "class").write_text(f"{kind}\n")
        if nodes:
            node = root / "dev" / nodes.format(i)
            node.parent.mkdir(parents=True, exist_ok=True)
            node.touch()
    return str(root)


def process(root, pid, holds, command="python train me.py", parent=1):
    fds = Path(root) / f"proc/{pid}/fd"
    fds.mkdir(parents=True)
    (fds.parent / "cmdline").write_text(command.replace(" ", "\0") + "\0")
    (fds.parent / "status").write_text(f"Name:\tpython\nPPid:\t{parent}\nUid:\t1000\n")
    (fds / "0").symlink_to("/dev/null")
    if holds:
        (fds / "3").symlink_to(holds)


def refusal(root, environ=ALONE):
    with pytest.raises(Refused) as e:
        machine.find_tpu(str(root), environ)
    assert "\n" not in str(e.value)
    return str(e.value)

# -----------------------------------------------------------------------------
# The table

def test_figures_agree_with_each_other():
    """The peak is what the compiler counts for a product, at the clock; programs may have most of the memory; a name says the size."""
    for chip in CHIPS.values():
        assert chip.flop_per_cycle == pytest.approx(524288 if chip.name == "v6e" else 131072 * chip.cores, rel=0.01)
        assert 0.9 < chip.hbm_bytes / 2**30 / {"v6e": 32, "v5e": 16, "v5p": 96, "v4": 32}[chip.name] < 1
    assert (CHIPS["v6e"].bf16_flops, CHIPS["v6e"].hbm_bytes, CHIPS["v6e"].hbm_bandwidth) == (918e12, 31.25 * 2**30, 1638e9)
    assert [chip.generation for chip in CHIPS.values()] == [6, 5, 5, 4]
    for tpu in TPUS.values():
        kind, size = tpu.name.split("-")
        shape = [int(n) for n in tpu.topology.split(":")[1].split("x")]
        assert kind == tpu.chip.name == tpu.topology.split(":")[0] and int(size) == tpu.chips * tpu.chip.cores
        assert tpu.bounds == tuple(shape + [1] * (3 - len(shape))) and 8 % tpu.devices == 0
    assert TPUS["v4-8"].description["chip_config_name"] == "megacore" and "chip_config_name" not in TPUS["v5p-8"].description


@pytest.mark.parametrize("name, words", [("v5e-9", "did you mean v5e-8"), ("gpu", "There are v6e-8, v6e-4"), ("", "There are")])
def test_a_tpu_by_name(name, words):
    assert chips.tpu_named("v5litepod-8") is chips.tpu_named("V5E-8") is TPUS["v5e-8"]
    with pytest.raises(Refused, match=re.escape(f"no TPU {name!r} here") + ".*" + words):
        chips.tpu_named(name)

# -----------------------------------------------------------------------------
# Which one this is

def test_each_supported_tpu_is_found(tmp_path):
    for tpu in TPUS.values():
        for nodes in ("vfio/{}", "accel{}"):
            root = computer(tmp_path / tpu.name / nodes[:4], *[tpu.chip.pci] * tpu.chips, nodes=nodes)
            assert chips.this_chip(root + "/sys") is tpu.chip
            if tpu.trains:
                assert machine.find_tpu(root, ALONE) is tpu
            else:
                said = refusal(root)
                assert f"{tpu.chips} {tpu.chip.name} chip" in said and f"a {tpu.name}: the record trains on v6e-8" in said


def test_other_devices_of_google_are_no_tpu(tmp_path):
    root = computer(tmp_path, "0x0042", ("0x001f", "0x010802"), ("0x0099", "0x020000"))  # a network card, disks; a GPU is passed through
    assert machine.find_tpu(root, ALONE) is None and chips.this_chip(root + "/sys") is None
    assert machine.find_tpu(str(tmp_path / "nothing"), ALONE) is None


@pytest.mark.parametrize("devices, words", [
    (["0x0027"] * 4, "is v2 or v3: the record trains on v6e-8, v6e-4"), (["0x0076"], "is 7x: "), (["0x0056"], "is v4 lite: "),
    (["0x0099"] * 8, "is an unknown chip (PCI 1ae0:0099)"), ([("0x0099", "0x120000")], "is an unknown chip"),
    (["0x006F"] * 3, "is 3 v6e chips: "), (["0x006f"] * 2, "is 2 v6e chips: "),
    (["0x006f"] * 16, "is 16 v6e chips: "), (["0x005e"] * 4, "is 4 v4 chips, a v4-8: "),
    (["0x006f"] * 4 + ["0x0063"] * 4, "is v5e and v6e: "),
])
def test_a_tpu_that_is_not_supported_is_refused_by_name(tmp_path, devices, words):
    said = refusal(computer(tmp_path, *devices))
    assert words in said and "the record trains on v6e-8" in said and "PJRT_DEVICE=CPU" in said


@pytest.mark.parametrize("environ, words", [
    ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "a slice of 4 machines"), ({"TPU_WORKER_HOSTNAMES": "a, b"}, "2 machines"),
    ({"TPU_ACCELERATOR_TYPE": "v6e-16"}, "several machines, a v6e-16"), ({"TPU_ACCELERATOR_TYPE": "v6e-256", **ALONE}, "a v6e-256"),
])
def test_several_hosts_are_refused(tmp_path, environ, words):
    root = computer(tmp_path, *["0x006f"] * 4)
    assert words in (said := refusal(root, ALONE | environ)) and "the record trains on v6e-8" in said
    for fine in ({"TPU_WORKER_HOSTNAMES": "localhost"}, {"TPU_WORKER_HOSTNAMES": ""}, {"TPU_ACCELERATOR_TYPE": "v6e-4"},
                 {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}):
        assert machine.find_tpu(root, ALONE | fine) is TPUS["v6e-4"]


def test_several_hosts_by_the_metadata_server(tmp_path, monkeypatch):
    """Where nothing is set, as on a VM of Google's: it may answer, know nothing, or not be there."""
    asked, answer = [], ["uid:8470:10.0.0.2,uid:8470:10.0.0.3"]

    class Server(http.server.BaseHTTPRequestHandler):
        log_message = lambda *_: None
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200 if answer[0] else 404)
            self.end_headers()
            self.wfile.write(answer[0].encode())
    root = computer(tmp_path, *["0x006f"] * 4)
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"GCE_METADATA_HOST": f"127.0.0.1:{server.server_port}"}
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it is not asked through a proxy
        monkeypatch.delenv("no_proxy", raising=False)
        assert "a slice of 2 machines" in refusal(root, environ)
        assert asked == [("/computeMetadata/v1/instance/attributes/worker-network-endpoints", "Google")]
        for answer[0] in ("uid:8470:10.0.0.2", ""):
            assert machine.find_tpu(root, environ) is TPUS["v6e-4"]
        server.shutdown()
    assert machine.find_tpu(root, {"GCE_METADATA_HOST": "127.0.0.1:9"}) is TPUS["v6e-4"]

# -----------------------------------------------------------------------------
# Whether it may be opened

def test_chips_without_device_files(tmp_path):
    assert "--privileged" in refusal(computer(tmp_path, *["0x006f"] * 8, nodes=None))


@pytest.mark.parametrize("nodes", ["vfio/{}", "accel{}"])
def test_a_busy_tpu_names_who_holds_it(tmp_path, monkeypatch, nodes):
    root = computer(tmp_path, *["0x006f"] * 8, nodes=nodes)
    process(root, 77, "/dev/vfio/vfio")  # the control file: holds no chip
    process(root, 78, None)
    assert machine.find_tpu(root, ALONE) is TPUS["v6e-8"]
    process(root, 4242, "/dev/" + nodes.format(2))
    process(root, 999999999, "/dev/" + nodes.format(3), command="python other.py")
    said = refusal(root)
    assert "process 4242 (python train me.py), process 999999999 (python other.py) holds it" in said and "kill 4242 999999999" in said
    assert "77" not in said and "78" not in said
    if os.geteuid() == 0:
        os.chown(tmp_path / "proc/4242", 54321, 54321)
        assert "process 4242 (python train me.py) of 54321, process 999999999 (python other.py) holds it" in refusal(root)
        monkeypatch.setattr(os, "geteuid", lambda: 1)
        assert "stop it: sudo kill 4242 999999999" in refusal(root)


@pytest.mark.parametrize("command, above, words", [
    ("python3 -m ipykernel_launcher -f kernel.json", False, "a notebook's kernel, process 4242 (python3 -m ipykernel_launcher"),
    ("python3 -m colab_kernel_launcher", False, "a notebook's kernel"), ("python my_own_notebook", True, "this notebook's own kernel"),
])
def test_a_notebook_that_holds_it_is_told_so(tmp_path, command, above, words):
    root = computer(tmp_path, *["0x006f"] * 8)
    process(root, 4242, "/dev/vfio/0", command)
    process(root, os.getpid(), None, "python machine.py", parent=4241)
    process(root, 4241, None, "bash run_tpu.sh", parent=4242 if above else 1)
    said = refusal(root)
    assert words in said and "Restart session" in said and "kill" not in said


@pytest.mark.parametrize("error, access, words", [
    (errno.EBUSY, True, "busy: a process of another user or container holds /dev/vfio/3, perhaps process 91 (python theirs.py). "
                         "`sudo fuser -v /dev/vfio/3`"),
    (errno.EPERM, True, "busy: a process of another user"),  # /dev/accel's driver
    (errno.EPERM, False, "may not be opened: /dev/vfio/3 belongs to "), (errno.EACCES, False, "may not be opened: /dev/vfio/3 belongs to "),
    (errno.ENODEV, True, "does not open: /dev/vfio/3: No such device. Restart the machine"), (errno.EIO, True, "Input/output error"),
])
def test_a_device_that_this_user_cannot_open(tmp_path, monkeypatch, error, access, words):
    root, real, look = computer(tmp_path, *["0x006f"] * 8), os.open, Path.iterdir
    for pid, command in ((91, "python theirs.py"), (92, "sshd")):
        process(root, pid, "/dev/vfio/3", command)
    def hides(folder):
        if "proc" in folder.parts:
            raise PermissionError
        return look(folder)
    monkeypatch.setattr(Path, "iterdir", hides)
    (tmp_path / "dev/vfio/3").chmod(0o660)
    def fails(path, *args, **kwargs):
        if str(path).endswith("/3"):
            raise OSError(error, os.strerror(error), path)
        return real(path, *args, **kwargs)
    monkeypatch.setattr(os, "open", fails)
    monkeypatch.setattr(os, "access", lambda path, _: access or not str(path).endswith("/3"))
    said = refusal(root)
    assert words in said
    if "may not" in words:
        assert ", mode 0660, and you are " in said and "`sudo chmod a+rw /dev/vfio/*`" in said and "PJRT_DEVICE=CPU" in said


def test_a_folder_of_devices_that_this_user_cannot_enter(tmp_path, monkeypatch):
    """Otherwise it would look empty, and a container would be blamed."""
    root, access = computer(tmp_path, *["0x006f"] * 8), os.access
    (tmp_path / "dev/vfio").chmod(0o700)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != root + "/dev/vfio" and access(path, mode))
    said = refusal(root)
    assert "may not be opened: /dev/vfio belongs to " in said and "mode 0700" in said and "`sudo chmod a+rx /dev/vfio`" in said


def test_users_without_names(tmp_path, monkeypatch):
    """A container's users need not have any."""
    def nobody(number):
        raise KeyError(number)
    monkeypatch.setattr(machine.pwd, "getpwuid", nobody)
    monkeypatch.setattr(machine.grp, "getgrgid", nobody)
    (tmp_path / "node").touch(0o600)
    assert re.fullmatch(r"belongs to \d+:\d+, mode 0600, and you are \d+", machine.permissions(tmp_path / "node"))
    assert "cannot be looked at" in machine.permissions(tmp_path / "nothing")


@pytest.mark.parametrize("code, words", [
    ("import sys; print('W fine'); sys.exit('RuntimeError: resource busy.')", "does not open: RuntimeError: resource busy. Restart"),
    ("import os; print('F1121 08:13 tpu.cc:1] Check failed', flush=True); os.abort()", "does not open: F1121 08:13 tpu.cc:1] Check failed"),
    ("raise ValueError('no\\n\\nchips')", "does not open: ValueError: no"), ("import os; os.abort()", "does not open: status -6"),
    ("import time; time.sleep(60)", "did not answer within 0 s"), ("print('devices 4 TPU')", "torch_xla finds 4 TPU devices on a v6e-8"),
    ("print('devices 8 CPU')", "torch_xla finds 8 CPU devices"), ("print('devices 1 TPU')", "unset TPU_VISIBLE_CHIPS"),
])
def test_a_tpu_that_does_not_open(monkeypatch, code, words):
    monkeypatch.setattr(machine, "OPENS", code)
    if "unset" in words:
        monkeypatch.setenv("TPU_VISIBLE_CHIPS", "0")
    with pytest.raises(Refused) as e:
        machine.open_tpu(TPUS["v6e-8"], timeout=0.2 if "sleep" in code else 60)
    assert words in str(e.value) and "PJRT_DEVICE=CPU" in str(e.value) and "\n" not in str(e.value)
    monkeypatch.setattr(machine, "OPENS", "print('a warning'); print('devices 8 TPU')")
    machine.open_tpu(TPUS["v6e-8"])

# -----------------------------------------------------------------------------
# Room, time, money

def test_room_on_each_disk(tmp_path, monkeypatch):
    free = {}
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: SimpleNamespace(free=free["all"]))
    free["all"] = 5e9
    env, data = tmp_path / "not there yet/.venv", tmp_path / "data"
    machine.check_room((3, env, "the environment"), (1.9, data, "shards"))
    with pytest.raises(Refused, match=r"5.0 GB are free at .*, and 3.0 GB for the environment and 2.1 GB for shards are needed: make room"):
        machine.check_room((3, env, "the environment"), (2.1, data, "shards"))  # it is one disk
    machine.check_room((0, env, "the environment"), (5, data, "shards"))
    free["all"] = 0
    machine.check_room((0, env, "the environment"), (0, data, "shards"))  # nothing to come


def test_shards_that_are_there_need_no_room(tmp_path):
    assert machine.shards_to_come(9, tmp_path) == pytest.approx(2) and machine.shards_to_come(-1, tmp_path) == 0
    folder = tmp_path / "data/fineweb10B"
    folder.mkdir(parents=True)
    for i in range(3):
        with open(folder / f"fineweb_train_{i:06}.bin", "wb") as f:
            f.truncate(200_001_024)
    (folder / "fineweb_val_000000.bin").write_bytes(b"half")
    assert machine.shards_to_come(9, tmp_path) == pytest.approx(1.4) and machine.shards_to_come(0, tmp_path) == 0


def test_what_to_expect(tmp_path):
    def report(folder, **content):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "report.json").write_text(json.dumps(content))
    assert machine.estimate(TPUS["v6e-8"], tmp_path) is None
    assert "no estimate for v6e-8" in machine.expectation(TPUS["v6e-8"], 36.0, records=tmp_path)
    report("2026-01-01_One", record=chips.RECORD, topology="v6e:2x4", preset="record", total_est_s=96.0, graphs=[{}] * 14)
    report("2026-01-02_Toy", record=chips.RECORD, topology="v6e:2x4", preset="rehearsal", total_est_s=1.0, graphs=[{}])
    report("2026-01-03_All", record=chips.RECORD,
           tpus=[{"tpu": "v5e-8", "total_est_s": 300.0, "of": 14}, {"tpu": "v6e-8", "total_est_s": None, "of": 14}])
    report("2026-01-04_Old", topology="v6e:2x4", preset="record", total_est_s=90.0, graphs=[{}] * 14)  # before reports named the record
    report("2026-01-05_Old", record=chips.RECORD - 1, topology="v6e:2x4", preset="record", total_est_s=90.0, graphs=[{}] * 14)
    assert machine.estimate(TPUS["v6e-8"], tmp_path) == (96, 14) and machine.estimate(TPUS["v5e-8"], tmp_path) == (300, 14)
    assert machine.estimate(TPUS["v6e-4"], tmp_path) is None
    said = machine.expectation(TPUS["v6e-8"], 36.0, 10, records=tmp_path)
    assert "1.6 minutes, 10 runs 16.0, and $9.60 at $36 an hour. " in said and "14 graphs" in said and "the compiler's estimate" in said
    assert "$" not in machine.expectation(TPUS["v6e-8"], records=tmp_path)


def test_the_command(tmp_path, monkeypatch, capsys):
    """With training's options, whatever they are; a price that is none is told by training."""
    monkeypatch.setattr(machine, "open_tpu", lambda tpu: None)
    monkeypatch.setattr(machine, "estimate", lambda *_: (96.0, 14))  # whatever lies in records/
    for options in (["--price", "7", "--lr", "x", "--wandb"], ["--price=7"]):
        machine.main(["open", "v6e-8", "--runs", "1", *options])
        assert "run_tpu.sh: TPU found: 8 v6e chips, a v6e-8; the record's" in (said := capsys.readouterr().out) and "at $7 an hour" in said
    machine.main(["open", "v6e-8", "--runs", "1", "--price", "dear", "-x"])
    assert "$" not in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-S", ROOT / "tools/machine.py", "find"], capture_output=True, text=True,  # no packages
                          env={"SYS_ROOT": computer(tmp_path, *["0x0076"] * 4)})
    assert done.returncode == 1 and done.stdout == "" and re.fullmatch(r"run_tpu.sh: this machine's TPU is 7x: .*\n", done.stderr)
