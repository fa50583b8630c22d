"""Tutorials do what they say: executed from the first cell to the last, offline, and what they print can be shown to others."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest

from xtransfer.backbones import Backbone, Family

ROOT = Path(__file__).resolve().parents[1]
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[3])
"""
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))


def printed(notebook):
    """All that a notebook's cells left, as text."""
    return "\n".join(json.dumps(cell.outputs) for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_runs_offline_and_leaves_nothing(path, tmp_path, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tmp").mkdir(), (tmp_path / "here").mkdir()
    monkeypatch.delenv("JUPYTER_DEFAULT_PROVISIONER_NAME", raising=False)  # a reader's kernel is an ordinary one, whatever this process has used before
    done = subprocess.run([sys.executable, "-c", EXECUTE, str(path), str(tmp_path / "here"), str(tmp_path / "executed.ipynb")], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(tmp_path / "executed.ipynb", 4)
    out = printed(notebook)
    assert '"output_type": "error"' not in out and len(out) > 1000
    for place in (tmp_path, ROOT, Path(sys.prefix), Path.home(), "/tmp/", "site-packages"):
        assert str(place) not in out, f"{place} is printed: ...{out[max(0, out.find(str(place)) - 200):][:400]}"
    assert not list((tmp_path / "here").iterdir()) and not [p for p in (tmp_path / "tmp").iterdir() if p.name.startswith("tmp")], "nothing is left where it ran"
    assert all(not cell.outputs or not any(o.get("name") == "stderr" for o in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"), "no warnings"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_reads_as_a_document(path):
    notebook = nbformat.read(path, 4)
    first, kinds = notebook.cells[0], [cell.cell_type for cell in notebook.cells]
    assert first.cell_type == "markdown" and re.match(r"# \S.*\n> \S.*[.?!]\n", first.source)
    assert "\n".join(kinds).count("code\ncode\ncode\ncode") == 0 and kinds.count("markdown") >= 10, "told, not only shown"
    assert not any(cell.get("outputs") for cell in notebook.cells) and (path.parent / ".notest").exists()
    assert max(len(cell.source.splitlines()) for cell in notebook.cells if cell.cell_type == "code") <= 40


def test_every_field_is_explained():
    told = "\n".join(cell.source for cell in nbformat.read(ROOT / "nbs" / "tutorials" / "add_a_backbone.ipynb", 4).cells if cell.cell_type == "markdown")
    missing = [f.name for kind in (Backbone, Family) for f in fields(kind) if f"`{f.name}`" not in told]
    assert not missing, f"the tutorial does not explain {missing}"
