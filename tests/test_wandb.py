"""
--wandb with the real client, offline: what a run's folder holds, a run that goes on, and all that can be missing.
    python -m pytest tests/test_wandb.py
"""
import json
import struct
import sys

import pytest
from conftest import toy_options

import train_gpt_xla as t
from wandb_run import WandbRun


def records(file):
    """The records of a .wandb file, which is a log of LevelDB's form: blocks of 32 KiB, in them pieces with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", data[at:at + 7])
        if left < 7 or not kind:
            at += left
            continue
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last piece
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""

def read(folder):
    """(run id, config, {step: numbers}, exit code) of each offline run, oldest first."""
    import wandb
    wandb.teardown()  # all is on the disk then
    for file in sorted(folder.glob("logs/wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        run, history, code = None, {}, None
        for record in records(file):
            if record.HasField("run"):
                run = record.run
            if record.HasField("history"):
                items = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
                history[items.pop("_step")] = {k: v for k, v in items.items() if not k.startswith("_")}
            if record.HasField("exit"):
                code = record.exit.exit_code
        yield run.run_id, {u.key: json.loads(u.value_json) for u in run.config.update}, history, code

@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder, and no login of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield tmp_path
    if sys.modules.get("wandb"):
        sys.modules["wandb"].teardown()  # its settings are those of the first run otherwise

def test_a_run_and_its_continuation_offline(place):
    said = []
    run = WandbRun("speedrun", "my run: 1", dict(ws_long_schedule=(3, 7), seed=0), said.append)
    run.log(5, train_loss=3.5, ms=12.0)
    run.log(5, val_loss=3.25)
    run.log(10, train_loss=float("nan"))
    run.finish(75)
    again = WandbRun("speedrun", "my run: 1", dict(ws_long_schedule=(3, 7), seed=0), said.append, run.id)
    again.log(15, train_loss=3.0)
    again.finish()
    (id1, config, history, code), (id2, _, more, _) = read(place)
    assert id1 == id2 == run.id and config["ws_long_schedule"] == [3, 7] and config["seed"] == 0 and code == 75
    assert history[5] == dict(train_loss=3.5, ms=12.0, val_loss=3.25) and set(history) == {5, 10} and more == {15: dict(train_loss=3.0)}
    assert len(said) == 2 and all("wandb sync logs/wandb/offline-run-" in line and "no login" in line for line in said)
    other = WandbRun("speedrun", "my run: 1", {}, said.append)
    other.finish()
    assert other.id != run.id, "a run that starts afresh is another run"

@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])  # the client waits for 10 s
def test_a_server_that_does_not_answer(place, monkeypatch, real):
    if real:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    else:
        import wandb
        monkeypatch.setattr(wandb, "login", lambda prompt: (_ for _ in ()).throw(OSError("no route\nto 127.0.0.1:9")))
    said = []
    run = WandbRun("speedrun", "x", {}, said.append)
    run.log(5, train_loss=3.5)
    run.finish()
    assert "127.0.0.1:9" in said[0] and "wandb sync" in said[0] and len(said) == 1
    assert [history for _, _, history, _ in read(place)] == [{5: dict(train_loss=3.5)}]

def test_what_fails_later_does_not_end_the_run(place):
    said = []
    run = WandbRun("speedrun", "x", {}, said.append)
    run.run.finish()
    for step in (1, 2):
        run.log(step, train_loss=1.0)
    run.finish()
    assert len(said) == 2 and said[1].startswith("wandb failed") and "\n" not in said[1]

def test_no_client(place, monkeypatch, corpus):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as e:
        t.main([*toy_options(corpus), "--wandb"])
    assert str(e.value).startswith("train_gpt_xla.py: --wandb needs") and "pip install -r requirements-wandb.txt" in str(e.value)
    assert not list((place / "logs").iterdir()), "told before there is a log"
    assert t.parse_args(["--wandb"])[1].wandb and t.parse_args(["--wandb", "mine"])[1].wandb == "mine"
    assert t.parse_args([])[1].wandb is None
