"""Runs through the real papermill engine: complete records, equal after kill -9, Ctrl-C and company on the same folder."""

import json
import multiprocessing.popen_forkserver
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from conftest import TOYS, command, finished, hashes, xtransfer
from xtransfer.core import XtransferError
from xtransfer.metrics import METRICS
from xtransfer.records import NOTEBOOK_NAME, RECORD_NAME, load_records, read_record
from xtransfer.runs import execute, remaining, run_study
from xtransfer.studies import STUDIES
from xtransfer.tasks import TASKS

SMOKE = ("run", "toys", "--profile", "smoke", "--declare", TOYS, "--workers", 1, "--threads", 1)


def outcome(folder):
    """What must not depend on when and where a study ran: scores and predictions of every run, and its training."""
    found = {}
    for path in sorted(Path(folder).glob(f"*/*/{RECORD_NAME}")):
        record = json.loads(path.read_text())
        predictions = path.with_name("predictions.parquet")
        log = [json.loads(line) for line in path.with_name("log.jsonl").read_text().splitlines()]
        found[record["run"]] = (record["scores"], record["training"], [d["fingerprint"] for d in record["data"]], log,
                                pd.read_parquet(predictions).to_dict("records") if predictions.exists() else None)
    return found


def kernels(folder):
    """Processes that work below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd().startswith(str(folder)):
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def gone(folder, seconds=3.0):
    """Wait until nothing works below a folder any more."""
    end = time.monotonic() + seconds
    while kernels(folder) and time.monotonic() < end:
        time.sleep(0.1)
    return not kernels(folder)


def in_the_middle(process, folder, wait=120):
    """Wait until the first notebook runs."""
    end = time.monotonic() + wait
    while not kernels(folder) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every template through the warm engine, in this process: records and folder of the toy study's mini profile."""
    from xtransfer.studies import load_declarations

    load_declarations([str(TOYS)])
    folder = tmp_path_factory.mktemp("everything")
    study = STUDIES["toys"].build("mini")
    result = run_study(study, folder, workers=1, threads=1, declarations=[str(TOYS)], report=lambda line: None)
    assert not result.failed, result.failed
    return study, folder, {run.id: read_record(folder / run.id) for run in study.plan()}


def test_every_template_leaves_a_complete_record(everything, toys):
    study, folder, records = everything
    assert {r.template for r in records.values()} == {"pretrain", "intermediate", "target", "retrieval"} and len(records) == len(study.plan())
    for run in study.plan():
        record, place = records[run.id], folder / run.id
        assert record.status == "complete" and record.digest == run.digest and record.parent == (run.parent.id if run.parent else None)
        assert len(record.stages) == len(run.stages) and record.parameters["seed"] == run.stage.seed and record.backbone["name"] == "toy-encoder"
        assert {"python", "packages", "cpus", "device", "threads"} <= set(record.environment) and record.environment["packages"]["torch"]
        assert record.seconds["total"] > 0 and record.peak_memory_mb > 0 and record.started <= record.ended
        assert all({"task", "language", "split", "rows", "capped", "fingerprint", "revision"} <= set(d) for d in record.data)
        assert bool(record.training.get("steps")) == bool(run.stage.train) and (record.tokens_per_second or 0) > 0 or not run.stage.train
        assert {(s.task, s.language) for s in record.scores} == {(t, g) for t in run.stage.score for g in TASKS[t].languages}
        assert {s.selection for s in record.scores} == (set() if not run.stage.score else {"best", "last"} if run.stage.train else {"none"})
        assert all(0 <= s.value <= 100 and s.n > 0 for s in record.scores)
        notebook = json.loads((place / NOTEBOOK_NAME).read_text())
        assert all(c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code") and str(folder) not in json.dumps(notebook["metadata"])
        assert {p.name for p in place.iterdir()} <= {NOTEBOOK_NAME, RECORD_NAME, "predictions.parquet", "log.jsonl", "checkpoint"}
        assert (place / "checkpoint").exists() == any(other.parent and other.parent.digest == run.digest for other in study.plan())
    read = next(cell.run for cell in study.cells if cell.target == "toy_retrieval")
    assert read.parent.stage.score == ("toy_tags",) and read.parent.id in records, "a target that trains the same is the preparation"
    assert not list(folder.glob("*/.work-*"))
    table = load_records(study, folder)
    assert set(table["arm"]) == {"none", "multi"} and not table["value"].isna().any()


def test_kept_predictions_score_what_the_record_says(everything, toys):
    _, folder, records = everything
    checked = set()
    for run, record in records.items():
        if not record.scores:
            continue
        kept = pd.read_parquet(folder / run / "predictions.parquet")
        for (name, language, split, selection), part in kept.groupby(["task", "language", "split", "selection"], sort=False):
            task = TASKS[name]
            if task.format == "bitext_mining":
                continue  # the gold pairs that were not found are not among the predictions
            predictions, references = [[json.loads(v) for v in part[column]] for column in ("prediction", "reference")]
            for metric in task.metrics:
                for key, value in METRICS[metric].compute(predictions, references).items():
                    said = [s.value for s in record.scores if (s.task, s.language, s.split, s.selection, s.metric) == (name, language, split, selection, key)]
                    assert said == [pytest.approx(value, abs=1e-9)]
                    checked.add((name, key))
    assert {n for n, _ in checked} == {"toy_tags", "toy_qa2", "toy_choice", "toy_ranked", "toy_retrieval"}


def test_a_finished_study_is_left_alone(toy_outputs, toys):
    before = hashes(toy_outputs)
    started = time.monotonic()
    code, out, err = xtransfer(*SMOKE, "--outputs", toy_outputs)
    assert code == 0 and "0 to execute" in out and "report:" in out, out + err
    after = hashes(toy_outputs)
    assert {k: v for k, v in after.items() if not k.startswith("reports")} == {k: v for k, v in before.items() if not k.startswith("reports")}
    study = STUDIES["toys"].build("smoke")
    assert not remaining(study, toy_outputs) and execute(study.plan()[0], toy_outputs).run == study.plan()[0].id
    assert time.monotonic() - started < 60


def test_killed_at_random_moments_the_same_command_ends_with_equal_records(toy_outputs, tmp_path):
    rng, longest, kills = random.Random(20), 4.0, 0
    while kills < 3:
        process = command(*SMOKE, "--outputs", tmp_path)
        while not kernels(tmp_path) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.2, longest))
        if process.poll() is None:
            kills += 1
            os.kill(process.pid, signal.SIGKILL)
        else:  # it was done before the kill: on a fast machine kills must come earlier
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
            longest = max(0.3, longest / 2)
        finished(process)
        assert gone(tmp_path), "kernels outlive the process that was killed"
    code, out, err = xtransfer(*SMOKE, "--outputs", tmp_path)
    assert code == 0, out + err
    assert outcome(tmp_path) == outcome(toy_outputs)
    assert not list(tmp_path.glob("*/.work-*")) and not list(tmp_path.glob("*/.old-*"))


def test_interrupted_it_says_how_to_go_on_and_leaves_no_process(tmp_path, toy_outputs):
    process = command(*SMOKE, "--outputs", tmp_path)
    in_the_middle(process, tmp_path)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGINT)
    code, out, err = finished(process, 30)
    assert code == 130 and "same command" in err and "Traceback" not in err, out + err
    assert gone(tmp_path)


def test_interrupted_twice_before_the_first_kernel_is_there_it_stops_as_well(tmp_path):
    """The fork server imports then, and the kernels are still to come."""
    process = command(*SMOKE, "--outputs", tmp_path)
    while not list(tmp_path.glob("*/.work-*")) and process.poll() is None:
        time.sleep(0.02)
    for pause in (0.4, 1.0):
        time.sleep(pause)
        os.kill(process.pid, signal.SIGINT)
    code, out, err = finished(process, 60)
    assert code == 130 and "same command" in err and "Traceback" not in out + err, out + err
    assert gone(tmp_path) and not list(tmp_path.glob("*/*/record.json"))


def test_a_reader_that_goes_away_stops_the_study_and_the_exit_code_says_so(tmp_path, toy_outputs):
    process = command(*SMOKE, "--outputs", tmp_path)
    process.stdout.readline()
    process.stdout.close()
    err, code = process.stderr.read(), process.wait(120)
    assert code == 1 and len(err.splitlines()) == 1 and "nobody reads any more" in err, err
    assert gone(tmp_path)
    assert xtransfer(*SMOKE, "--outputs", tmp_path)[0] == 0 and outcome(tmp_path) == outcome(toy_outputs)


def test_two_processes_on_the_same_outputs(tmp_path, toy_outputs):
    """Two at once, in another folder than the first time: nothing is spoilt, and everything is bit for bit what it was."""
    both = [command(*SMOKE, "--outputs", tmp_path) for _ in range(2)]
    ended = [finished(p) for p in both]
    for code, out, err in ended:
        assert "Traceback" not in err and (code == 0 or "another process" in err), out + err
    if any(code for code, _, _ in ended):
        assert xtransfer(*SMOKE, "--outputs", tmp_path)[0] == 0
    assert outcome(tmp_path) == outcome(toy_outputs)


def test_a_script_without_a_main_guard_executes_a_run_and_the_folder_for_temporary_files_has_a_long_name(tmp_path):
    long = tmp_path / ("long" * 30)
    long.mkdir()
    script = tmp_path / "one_cell.py"
    script.write_text(f"""
print("starting")
import xtransfer.catalogue
from xtransfer.runs import execute
from xtransfer.studies import STUDIES, load_declarations
load_declarations([{str(TOYS)!r}])
run = STUDIES["toys"].build("smoke").plan()[0]
print(execute(run, {str(tmp_path / "records")!r}, declarations=[{str(TOYS)!r}]).status)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, env=os.environ | {"TMPDIR": str(long)})
    assert done.returncode == 0 and done.stdout.split() == ["starting", "complete"], done.stdout + done.stderr


def test_a_fork_server_that_dies_while_a_kernel_starts_is_a_lost_kernel(tmp_path, toys, monkeypatch):
    """As after kill -9 between its request and its answer; the same command finds a new one."""
    answers = iter([EOFError("unexpected EOF"), ConnectionResetError(104, "reset")])
    real = multiprocessing.popen_forkserver.forkserver.read_signed

    def read_signed(handle):
        if (error := next(answers, None)) is not None:
            raise error
        return real(handle)

    monkeypatch.setattr(multiprocessing.popen_forkserver.forkserver, "read_signed", read_signed)
    run = STUDIES["toys"].build("smoke").plan()[0]
    for _ in range(2):
        with pytest.raises(XtransferError, match="lost its kernel .the process that starts kernels was killed.; it goes on"):
            execute(run, tmp_path, declarations=[str(TOYS)])
    assert execute(run, tmp_path, declarations=[str(TOYS)]).status == "complete"
