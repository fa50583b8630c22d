"""The one-file GPU benchmark is built from the package and runs with torch and transformers alone; what it measures on a CPU means nothing."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parents[1] / "nbs" / "benchmarks" / "gpu"
ROWS = ("gates", "2", "3", "4", "5", "6", "8", "attention")
NEEDS_GPU = {"bf16 grouped + compiled", "by hand, CUDA graphs"}
BLOCKED = ("pandas", "pyarrow", "IPython", "datasets", "accelerate", "psutil", "papermill", "nbformat", "nbclient", "matplotlib", "seaborn", "scipy", "sklearn", "statsmodels", "peft", "evaluate", "PIL", "faiss", "jupyter_client", "xtransfer", "sentencepiece")
BLOCKER = f"""
import importlib.machinery, importlib.util, runpy, sys
class Only(importlib.machinery.PathFinder):  # of what the machine would not have, only what the script brings with it is found
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r} and path is None:
            path = [p for p in sys.path if "gpu-benchmark-" in p]
        return super().find_spec(name, path, target)
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__name__', '') in ("BuiltinImporter", "FrozenImporter")] + [Only]
sys.argv = sys.argv[1:]
for name in {BLOCKED!r}:
    assert importlib.util.find_spec(name) is None, name
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "gpu_benchmark.py"
    runpy.run_path(str(GPU / "build.py"))["main"](path)
    return path


@pytest.fixture(scope="module")
def ran(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    around = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", BLOCKER, str(script), "--out", str(folder), "--device", "cpu", "--tiny", "--minutes", "1"], capture_output=True, text=True, timeout=300, env=around, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "results.json").read_text())


def test_it_is_the_same_from_the_same_sources_and_knows_no_machine(script, tmp_path):
    again = tmp_path / "again.py"
    runpy.run_path(str(GPU / "build.py"))["main"](again)
    assert again.read_bytes() == script.read_bytes() and script.stat().st_size < 2**21
    compile(script.read_text(), "gpu_benchmark.py", "exec")
    assert str(GPU.parents[2]) not in script.read_text()


def test_lengths_are_those_of_real_data():
    lengths = json.loads((GPU / "lengths.json").read_text())["lengths"]
    assert len(lengths) == 17 and all(len(v["quantiles"]) == 100 and v["quantiles"] == sorted(v["quantiles"]) for v in lengths.values())
    assert all(abs(sum(v["quantiles"]) / 100 - v["mean"]) < 0.02 * v["mean"] for v in lengths.values())
    assert sum(lengths[k]["sequences"] for k in lengths if k.startswith("xnli_test_")) == 15 * 5010


@pytest.mark.slow
def test_every_row_has_findings(ran):
    _, results = ran
    assert tuple(results["rows"]) == ROWS
    for name, row in results["rows"].items():
        assert isinstance(row["found"], list) and row["found"], f"{name}: {row['found']} {row.get('trace')}"
        for found in row["found"]:
            assert ("error" in found) == (found.get("against") in NEEDS_GPU), found
            if "ratio" in found:
                ratio = found["ratio"]
                assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["rounds"] >= 1
    assert results["environment"]["device"] == "cpu"


@pytest.mark.slow
def test_the_gates_hold(ran):
    _, results = ran
    found = results["rows"]["gates"]["found"]
    assert len(found) == 5 and all(gate["passed"] for gate in found), found
    assert all(gate["largest logit"] > 1e3 * gate["largest difference"] and gate["attention in training"].startswith("flat") for gate in found[:2])
    assert next(row for row in results["rows"]["8"]["found"] if row["against"] == "two searches")["same neighbours"] > 0.99


@pytest.mark.slow
def test_table_and_notebook_tell_the_same(ran):
    nbformat = pytest.importorskip("nbformat")
    folder, results = ran
    notebook, table = nbformat.read(folder / "gpu_benchmark.ipynb", as_version=4), (folder / "table.md").read_text()
    nbformat.validate(notebook)
    shown = [output["data"]["text/markdown"] for cell in notebook.cells for output in cell.get("outputs", ()) if "text/markdown" in output["data"]]
    assert len(shown) == len(ROWS) and all(part in table for part in shown)
    assert all(row["title"] in table for row in results["rows"].values()) and "nothing is compiled on a CPU" in table
    assert any("def row_5" in cell.source for cell in notebook.cells)


def test_arithmetic_of_the_roofline(script):
    """The operations of XLM-R Large and the bounds that follow, against numbers worked out by hand."""
    source = (GPU / "source.py").read_text()
    names = {"SHAPES": None, "linear_weights": None, "work": None}
    import ast

    import numpy as np

    parts = [node for node in ast.parse(source).body if getattr(node, "name", None) in names or isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names]
    space = {"np": np}
    exec(compile(ast.Module(body=parts, type_ignores=[]), "source", "exec"), space)
    assert space["linear_weights"]("large") == 24 * 12 * 1024**2 and space["linear_weights"]("base") == 12 * 12 * 768**2
    data = (None, np.array([0, 10, 40]))  # two sequences, of 10 and of 30 tokens
    operations, moved = space["work"]("large", data, 32, rows=1000)
    assert operations == 32 * (6 * 24 * 12 * 1024**2 * 20 + 12 * 24 * 1024 * 500) and moved == 36 * (24 * 12 * 1024**2 + 1000 * 1024) + 6 * 24 * 12 * 1024**2
