"""A record's notebook is executed again by hand: the same scores, and the record stays as it was."""

import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from conftest import CACHE, TOYS, hashes
from test_tutorials import EXECUTE, printed
from xtransfer.core import XtransferError, read_json, write_json
from xtransfer.records import RECORD_NAME, run_folder
from xtransfer.rerun import Rerun, use_data_beside_records
from xtransfer.restore import main, recorded_run, restore
from xtransfer.runs import execute, has_checkpoint
from xtransfer.seals import with_checksum
from xtransfer.warm import KERNEL_LOG, use_warm_kernels

EQUAL = "The same as the record: all "


DROP_DAC_OVERRIDE = (24, 1, 0, 0, 0)  # of prctl: PR_CAPBSET_DROP, CAP_DAC_OVERRIDE; without it permissions hold for root too


def unprivileged():
    """Let permissions hold in the process that is about to start."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(*DROP_DAC_OVERRIDE)


@contextmanager
def read_only(place):
    """Nothing below a folder can be written."""
    paths = [place, *place.rglob("*")]
    try:
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


def by_hand(folder, save_as):
    """Run All of a record's notebook, in its own folder, with an ordinary kernel that may not write there; the notebook, and what nbclient says when a cell fails."""
    around = {name: value for name, value in os.environ.items() if name != "JUPYTER_DEFAULT_PROVISIONER_NAME"} | {"XTRANSFER_CACHE": CACHE.name}
    done = subprocess.run([sys.executable, "-c", EXECUTE, str(folder / "notebook.ipynb"), str(folder), str(save_as)], capture_output=True, text=True, timeout=300, env=around, preexec_fn=unprivileged)
    return nbformat.read(save_as, 4) if done.returncode == 0 else None, done.stderr


def by_warm_hand(folder):
    """The same with a kernel that is forked from a process which has imported everything, in a second instead of ten."""
    use_warm_kernels()
    notebook = nbformat.read(folder / "notebook.ipynb", 4)
    try:
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    except CellExecutionError as error:
        return None, str(error)
    finally:
        (folder / KERNEL_LOG).unlink(missing_ok=True)
    return notebook, ""


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """Records of every template in a folder of their own: pretrain, intermediate, target, retrieval, probe."""
    import xtransfer.catalogue  # noqa: F401
    from xtransfer.backbones import BACKBONES
    from xtransfer.studies import STUDIES, Stage, lineage, load_declarations
    from xtransfer.tasks import TASKS

    before = [(registry, dict(registry)) for registry in (TASKS, BACKBONES, STUDIES)]
    load_declarations([str(TOYS)])
    outputs = tmp_path_factory.mktemp("place") / "outputs"
    target = next(cell.run for cell in STUDIES["toys"].build("smoke").cells if cell.arm == "qa")
    measured = (Stage(score=("toy_retrieval",), recipe=target.stage.recipe, seed=0), Stage(measure=("toy_pair", "toy_tags"), recipe=replace(target.stage.recipe, epochs=1.0, dev_limit=20), seed=0))
    runs = [*lineage(target), *(replace(target, stages=(*target.stages[:-1], stage)) for stage in measured)]
    for run in runs:
        execute(run, outputs, declarations=[str(TOYS)], keep_checkpoint=run in lineage(target)[:-1])
    yield outputs, {run.template: run for run in runs}
    for registry, entries in before:
        registry._entries = entries


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "intermediate", "target", "retrieval", "probe"])
def test_a_record_runs_again_by_hand_to_the_same_scores(every_kind, kind, tmp_path, monkeypatch):
    outputs, runs = every_kind
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder, before = run_folder(outputs, runs[kind]), hashes(outputs)
    if kind == "target":
        with read_only(outputs):
            notebook, said = by_hand(folder, tmp_path / "again.ipynb")
    else:
        notebook, said = by_warm_hand(folder)
    assert notebook is not None, said
    out = printed(notebook)
    assert EQUAL in out and "holds the finished record of " + runs[kind].id in out
    assert hashes(outputs) == before, "nothing of any record has changed"
    assert not Path(re.search(r"this notebook writes to (\S+), which is removed", out)[1]).exists()
    assert '"name": "stderr"' not in out, "no warnings"
    if kind in ("pretrain", "intermediate", "target"):
        assert "step 40 of 40, loss" in out, "the bar shows in a cell"


@pytest.mark.slow
def test_a_rerun_that_differs_says_so_and_why(every_kind, tmp_path):
    outputs, runs = every_kind
    copy = tmp_path / "outputs"
    shutil.copytree(outputs, copy, ignore=shutil.ignore_patterns(".locks"))
    folder = run_folder(copy, runs["target"])
    record = read_json(folder / RECORD_NAME)
    record["scores"][0]["value"] += 7.5
    record["environment"]["packages"]["numpy"] = "1.0"
    write_json(folder / RECORD_NAME, with_checksum(record))
    notebook, said = by_warm_hand(folder)
    assert notebook is not None, said
    out = printed(notebook)
    assert "the largest difference is 7.5: toy_pair en test accuracy" in out and "then 1.0" in out and EQUAL not in out


@pytest.mark.slow
def test_without_the_parents_weights_one_sentence_says_what_makes_them_and_it_does(every_kind, tmp_path, capsys):
    outputs, runs = every_kind
    copy = tmp_path / "my outputs"
    shutil.copytree(outputs, copy, ignore=shutil.ignore_patterns("checkpoint", ".locks"))  # as records are committed
    parent, child = run_folder(copy, runs["intermediate"]), run_folder(copy, runs["target"])
    notebook, said = by_warm_hand(child)
    assert notebook is None and f"records are kept without weights, and `python -m xtransfer.restore '{parent}'` makes these again." in said
    before = hashes(copy)
    assert main([str(parent)]) == 0
    assert EQUAL in capsys.readouterr().out
    assert has_checkpoint(runs["intermediate"], copy) and has_checkpoint(runs["pretrain"], copy)
    after = hashes(copy)
    assert {name: after[name] for name in before} == before and all("/checkpoint/" in name for name in after.keys() - before.keys()), "only weights were added"
    assert hashes(parent / "checkpoint").keys() == hashes(run_folder(outputs, runs["intermediate"]) / "checkpoint").keys()
    assert (parent / "checkpoint" / "model.safetensors").read_bytes() == (run_folder(outputs, runs["intermediate"]) / "checkpoint" / "model.safetensors").read_bytes()
    notebook, said = by_warm_hand(child)
    assert notebook is not None and EQUAL in printed(notebook), said
    assert restore(parent) == ""  # they are there


@pytest.mark.parametrize("where", ("copytree", "one file", "replace"))
def test_a_full_disk_while_weights_are_restored_is_one_sentence(where, every_kind, tmp_path, capsys, monkeypatch):
    outputs, runs = every_kind
    copy = tmp_path / "outputs"
    shutil.copytree(outputs, copy, ignore=shutil.ignore_patterns(".locks"))
    shutil.rmtree(run_folder(copy, runs["intermediate"]) / "checkpoint")
    before = hashes(copy)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if where == "replace":  # the weights are made, and cannot be moved
        place = run_folder(copy / ".locks" / f"restore-{runs['intermediate'].digest}", runs["intermediate"])
        shutil.copytree(run_folder(outputs, runs["intermediate"]), place)
    with monkeypatch.context() as patched:
        for name in {"copytree": ("shutil.copytree",), "one file": ("os.link", "shutil.copy2"), "replace": ("os.replace",)}[where]:
            patched.setattr(name, full)
        assert main([str(run_folder(copy, runs["intermediate"]))]) == 1
    said = capsys.readouterr().err
    assert said.startswith("xtransfer: run ") and "No space left on device" in said and said.count("\n") == 1 and "[(" not in said
    after = hashes(copy)
    assert {name: after[name] for name in before} == before
    if where == "one file":  # the same command goes on
        assert main([str(run_folder(copy, runs["intermediate"]))]) == 0 and has_checkpoint(runs["intermediate"], copy)


def test_what_cannot_be_restored_is_said(every_kind, tmp_path, capsys):
    outputs, runs = every_kind
    shutil.copytree(outputs, tmp_path / "outputs", ignore=shutil.ignore_patterns("checkpoint", ".locks"))
    moved = run_folder(tmp_path / "outputs", runs["intermediate"])
    os.rename(moved, moved.with_name("elsewhere"))
    with pytest.raises(XtransferError, match="belongs into a folder of that name"):
        recorded_run(moved.with_name("elsewhere"))
    os.rename(moved.with_name("elsewhere"), moved)
    record = read_json(moved / RECORD_NAME)
    write_json(moved / RECORD_NAME, with_checksum(record | {"parameters": record["parameters"] | {"seed": 5}}))
    assert main([str(moved)]) == 1
    assert "as things are declared now" in capsys.readouterr().err
    assert not list((tmp_path / "outputs").rglob("checkpoint"))


def test_the_temporary_folder_goes_with_the_rerun(tmp_path):
    rerun = Rerun(tmp_path, None)
    (rerun.folder / "weights").write_text("")
    folder = rerun.folder
    del rerun
    assert not folder.exists()


def test_data_beside_the_records_are_found(tmp_path, monkeypatch):
    home = tmp_path / "outputs" / "backbone" / "run"
    home.mkdir(parents=True), (tmp_path / "data").mkdir()
    monkeypatch.delenv("XTRANSFER_DATA", raising=False)
    monkeypatch.chdir(home)
    use_data_beside_records(Path("."))
    assert os.environ["XTRANSFER_DATA"] == str(tmp_path / "data")
    monkeypatch.setenv("XTRANSFER_DATA", "mine")
    use_data_beside_records(Path("."))
    assert os.environ["XTRANSFER_DATA"] == "mine"
