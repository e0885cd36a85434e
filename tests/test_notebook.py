"""
The notebook, cell for cell in a kernel, in a clone without a TPU: the rehearsal, cut to three steps.
    python -m pytest tests/test_notebook.py -m slow
"""
import re
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest
from conftest import ROOT

from spmd import COMPILE_FAST

NOTEBOOK = "notebooks/speedrun.ipynb"
# On one device, a step of each stage, with no batch, window or embedding but the first: what takes time here is compiling.
CUT = ("--num_scheduled_iterations 3 --num_extension_iterations 0 --val_loss_every 1 --val_tokens 1024 --val_batch_size 1024 "
       "--train_bs_schedule 256,256,256,256 --ws_short_schedule 1,1,1,1 --ws_long_schedule 3,3,3,3 --ws_validate_post_yarn_ext 3")

@pytest.fixture
def clone(tmp_path):
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, tmp_path / file)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path

def run(folder, monkeypatch, options: str, sampling: str) -> nbformat.NotebookNode:
    """The notebook after all of its cells, in folder/notebooks, as Jupyter opens it there. The first that fails ends it with its output."""
    for name, value in dict(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="1", XLA_FLAGS=COMPILE_FAST).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(folder / NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\noptions += ' {options}'\nsampling += ' {sampling}'"
    nbclient.NotebookClient(notebook, timeout=600, resources=dict(metadata=dict(path=str(folder / "notebooks")))).execute()
    return notebook

def printed(notebook) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))

@pytest.mark.slow
def test_from_nothing_to_a_sample(clone, monkeypatch):
    notebook = run(clone, monkeypatch, CUT, "--bytes --tokens 8")
    text = printed(notebook)
    assert "step:3/3 val_loss:" in text and "graphs compiled after warm-up: 0" in text
    assert "> In 1969," in text
    pictures = [output.data["image/png"] for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert len(pictures) == 1 and (clone / "notebook.png").stat().st_size > 10_000
    assert {file.name for file in (clone / "logs/notebook").iterdir()} >= {"state_step000003.pt"}

@pytest.mark.slow
def test_a_command_that_fails_ends_it(clone, monkeypatch):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="the line above says why"):
        run(clone, monkeypatch, "--model_dim 65", "")
    assert not list(clone.glob("logs/notebook/state*"))

def test_stored_without_outputs_and_one_home():
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    page, cells = (ROOT / "README.md").read_text(), "".join(cell.source for cell in notebook.cells)
    homes = [re.findall(r"github\.com/[\w-]+/modded-nanogpt-xla", text) for text in (cells, page)]
    assert min(map(len, homes)) >= 1 and len({*homes[0], *homes[1]}) == 1
    assert "git clone --depth 1 https://github.com/" in cells and NOTEBOOK in page
