"""What a reader meets in JupyterLab: the start notebook, and a study that runs in a cell, shows how far it is and can be stopped."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.provisioning import KernelProvisionerFactory
from nbclient import NotebookClient

from conftest import TOYS
from test_tutorials import printed
from xtransfer.progress import StudyLine

ROOT = Path(__file__).resolve().parents[1]
RUN = f"""
import os
import xtransfer.catalogue
from xtransfer.runs import run_study
from xtransfer.studies import STUDIES, load_declarations
print("process", os.getpid())
load_declarations([{str(TOYS)!r}])
study = STUDIES["toys"].build("smoke")
outcome = run_study(study, "runs", workers=1, threads=1, declarations=[{str(TOYS)!r}])
"""


def text_of(cell):
    """All that a cell shows."""
    return "".join(output.get("text", "") or "".join(output.get("data", {}).get("text/plain", "")) for output in cell.outputs)


def execute(notebook, folder, **options):
    """Execute with an ordinary kernel, whatever this process has used before."""
    factory = KernelProvisionerFactory.instance()  # it asks for the default once in the life of a process
    before, factory.default_provisioner_name = factory.default_provisioner_name, "local-provisioner"
    try:
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, **options).execute()
    finally:
        factory.default_provisioner_name = before
    return notebook


@pytest.mark.slow
def test_a_study_in_a_cell_shows_how_far_it_is_and_the_stop_button_loses_nothing(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(RUN), nbformat.v4.new_code_cell("outcome = run_study(study, 'runs', workers=1, threads=1, declarations=[%r])\noutcome" % str(TOYS))])
    seen = []

    def stop():
        """Press the stop button when the first run has ended: the signal goes to the kernel's whole group, as Jupyter sends it."""
        for _ in range(3000):
            time.sleep(0.05)
            text = text_of(notebook.cells[0])
            seen.append(text)
            if "[1/" in text:
                os.killpg(int(re.search(r"process (\d+)", text)[1]), signal.SIGINT)
                return

    presser = threading.Thread(target=stop, daemon=True)
    presser.start()
    execute(notebook, tmp_path, allow_errors=True)
    presser.join()
    first, second = notebook.cells
    assert "KeyboardInterrupt" in [output.get("ename") for output in first.outputs] and "stopped; nothing is lost" in text_of(first)
    assert any(re.search(r"0 of \d runs have ended; now toy_text\.s0 \(\d+ s\)", text) for text in seen), "the line below says what is executed"
    total = int(re.search(r"\[1/(\d)\]", text_of(first))[1])
    assert re.search(r"\[1/\d\] +\d+\.\d s  toy-encoder/toy_text.*\(about .* left\)", text_of(first))
    ended = int(re.search(r"(\d) of (\d) runs have ended", text_of(second))[1])
    assert 0 < ended < total and "failed={}" in text_of(second), "what had ended was not executed again"
    assert "widget" not in printed(notebook).lower()


@pytest.mark.slow
def test_the_start_notebook_shows_the_committed_records(tmp_path):
    path = ROOT / "nbs" / "start.ipynb"
    notebook = nbformat.read(path, 4)
    assert not any(cell.get("outputs") for cell in notebook.cells) and re.match(r"# \S.*\n> \S", notebook.cells[0].source)
    state = sorted((p, p.stat().st_mtime_ns) for p in (ROOT / "outputs").glob("*") if p.is_file() or p.is_dir())
    execute(notebook, path.parent)
    out = printed(notebook)
    assert '"output_type": "error"' not in out and '"name": "stderr"' not in out
    figures = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(figures) >= 5, "gains, intervals, languages, one run, its training"
    assert "210 recorded, 0 missing" in out and "stilts-mini.html" in out and "prediction" in out and "world_xnli" in out
    assert state == sorted((p, p.stat().st_mtime_ns) for p in (ROOT / "outputs").glob("*") if p.is_file() or p.is_dir()), "it only reads"


def test_a_terminal_shows_one_line_that_is_replaced_and_a_pipe_none(monkeypatch, capsys):
    told = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    line = StudyLine(told.append)
    line.show("0 of 2 runs have ended")
    line.tell("[1/2] 1.0 s")
    err = capsys.readouterr().err
    assert err == "\r\x1b[K0 of 2 runs have ended\r\x1b[K" and told == ["[1/2] 1.0 s"]
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    StudyLine(told.append).show("0 of 2 runs have ended")
    assert capsys.readouterr().err == ""
