"""The short form of the chaos tool (`python tests/chaos/run.py`): other kills at every run of the tests, some targeted faults, and what each repair is for."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("chaos")))

import faults
from conftest import CACHE, TOYS, xtransfer
from drive import Starter, differences, leftovers
from xtransfer.core import XtransferError, read_json, write_json
from xtransfer.publishing import is_publishable, replaced_by, work_folder
from xtransfer.records import check_checkpoint, check_records, damage, load_records, read_record, run_folder
from xtransfer.runs import execute, run_study
from xtransfer.seals import is_whole, unsealed
from xtransfer.studies import STUDIES

CHOSEN = ("killed: in the middle of the tensors of a state", "killed: in the middle of the checkpoint", "killed: between the two renames", "killed: in the middle of an entry of the store", "full disk: the predictions", "damage: unpublished record cut short",
          "damage: training state, state-*/tensors.safetensors with one bit changed", "damage: training state, best-*.safetensors with one bit changed", "clock: files of days to come")


@pytest.fixture(scope="module")
def lab(toy_outputs, tmp_path_factory):
    """Where faults are tried, beside the toy study that was run undisturbed."""
    found = faults.Lab(tmp_path_factory.mktemp("chaos"))
    found.reference, found.cache = toy_outputs, Path(CACHE.name)
    yield found
    if Starter.process is not None:
        Starter.process.kill()
        Starter.process.wait()
        Starter.process.stdin.close(), Starter.process.stdout.close()
        Starter.process = None


@pytest.fixture
def study(lab, tmp_path, toys):
    """The toy study, and a copy of its records."""
    outputs = lab.begin((), f"copy-{tmp_path.name}")
    return STUDIES["toys"].build("smoke"), outputs


@pytest.mark.parametrize("name", CHOSEN)
def test_a_targeted_fault(name, lab):
    (fault,) = [f for f in faults.FAULTS if f.name == name]
    found = faults.try_fault(lab, fault)
    assert not found["wrong"], found


def test_kills_at_moments_drawn_anew(lab):
    seed = random.SystemRandom().randrange(10**6)
    rng, outputs = random.Random(seed), lab.begin(("pretrain", "target"), "drawn")
    for way in ("driver", "everything", "kernel"):
        command = lab.command(outputs)
        while command.poll() is None and "kernel" not in command.members():
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.5))
        command.kill({"driver": ["driver"], "kernel": ["kernel"], "everything": ["driver", "server", "kernel"]}[way])
        ended = command.ended()
        assert not ended.ugly, (seed, ended)
    last = lab.command(outputs)
    ended = last.ended()
    assert ended.code == 0 and not ended.ugly and last.gone(), (seed, ended)
    assert differences(outputs, lab.reference) + leftovers(outputs) == [], seed


def test_every_damage_of_a_finished_record_is_said(study):
    plan, outputs = study
    target = run_folder(outputs, plan.plan()[-1])
    for name in ("record.json", "predictions.parquet", "log.jsonl", "notebook.ipynb"):
        for change in (faults.flip, faults.cut, lambda path: path.write_bytes(b""), Path.unlink):
            if (name, change) in (("notebook.ipynb", faults.flip), ("record.json", Path.unlink)):
                continue  # a notebook may be saved again by hand; without a record nothing is finished
            kept = (target / name).read_bytes()
            change(target / name)
            with pytest.raises(XtransferError, match="damaged.*(delete|restore)") as error:
                check_records(plan, outputs)
            assert "\n" not in str(error.value) and target.name in str(error.value)
            (target / name).write_bytes(kept)
    check_records(plan, outputs)
    assert is_whole(read_json(target / "record.json")) and damage(target, read_record(target)) is None


def test_a_number_that_was_changed_in_a_record_is_said(study):
    plan, outputs = study
    path = run_folder(outputs, plan.plan()[-1]) / "record.json"
    value = read_json(path)["scores"][0]["value"]
    path.write_text(path.read_text().replace(f'"value": {value}', f'"value": {value + 1}', 1))
    code, out, err = xtransfer("run", "toys", "--profile", "smoke", "--declare", TOYS, "--outputs", outputs)
    assert code == 1 and "does not hold what was written" in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_a_damaged_checkpoint_is_not_started_from(study):
    plan, outputs = study
    child = next(run for run in plan.plan() if run.parent)
    faults.flip(run_folder(outputs, child.parent) / "checkpoint" / "model.safetensors")
    final = run_folder(outputs, child)
    final.rename(final.with_name("gone"))
    with pytest.raises(XtransferError, match="model.safetensors is not what was written; delete that folder"):
        execute(child, outputs, declarations=[str(TOYS)])


def swapped(one, other):
    """Give two folders each other's name."""
    one.rename(one.with_name("between"))
    other.rename(one)
    one.with_name("between").rename(other)


def test_records_of_each_other_s_runs_are_said(study):
    plan, outputs = study
    one, other = [run for run in plan.plan() if run.template == "target"][:2]
    swapped(run_folder(outputs, one), run_folder(outputs, other))
    for look in (check_records, load_records, lambda *_: execute(one, outputs, keep_checkpoint=False, declarations=[str(TOYS)])):
        with pytest.raises(XtransferError, match=f"holds the record of run {other.id}, not that of {one.id}; put it back to its place, or delete the folder and run it again.$"):
            look(plan, outputs)
    swapped(run_folder(outputs, one), run_folder(outputs, other))
    check_records(plan, outputs)


def test_what_was_finished_for_another_run_is_not_published(study):
    plan, outputs = study
    one, other = [run for run in plan.plan() if run.template == "target"][:2]
    child = next(run for run in plan.plan() if run.parent and run.parent.parent)
    said, work = [], work_folder(outputs, one)
    shutil.copytree(run_folder(outputs, other), work)
    assert not is_publishable(one, work, said.append) and f"holds the record of run {other.id}" in said[-1] and not (work / "record.json").exists()
    work = work_folder(outputs, child.parent)
    shutil.copytree(run_folder(outputs, child.parent), work)
    assert is_publishable(child.parent, work, said.append) and len(said) == 1
    shutil.rmtree(work / "checkpoint")
    shutil.copytree(run_folder(outputs, child.parent.parent) / "checkpoint", work / "checkpoint")
    assert not is_publishable(child.parent, work, said.append) and "checksums.json is that of" in said[-1]


def test_weights_of_each_other_s_runs_are_not_started_from(study, tmp_path):
    plan, outputs = study
    child = next(run for run in plan.plan() if run.parent and run.parent.parent)
    one, other = (run_folder(outputs, run) / "checkpoint" for run in (child.parent, child.parent.parent))
    shutil.copytree(one, tmp_path / "mine")
    assert unsealed(tmp_path / "mine") is unsealed(one) is None, "a copy anywhere is as good as the original"
    swapped(one, other)
    with pytest.raises(XtransferError, match=f"checksums.json is that of {other.parent.name}/checkpoint, not of {one.parent.name}/checkpoint"):
        check_checkpoint(one, child.parent.id)
    with pytest.raises(XtransferError, match="damaged: checkpoint/checksums.json is that of"):
        check_records(plan, outputs)
    final = run_folder(outputs, child)
    final.rename(final.with_name("gone"))
    with pytest.raises(XtransferError, match="is that of .*; delete that folder and give the same command again, which makes the weights anew"):
        execute(child, outputs, declarations=[str(TOYS)])
    for folder in (one, other):  # as earlier versions have sealed them
        write_json(folder / "checksums.json", {name: known for name, known in read_json(folder / "checksums.json").items() if name})
    check_checkpoint(one, child.parent.id)


def test_a_seal_of_nothing_is_damaged(study):
    plan, outputs = study
    folder = next(run_folder(outputs, run.parent) / "checkpoint" for run in plan.plan() if run.parent)
    whole = read_json(folder / "checksums.json")
    faults.flip(folder / "model.safetensors")
    for noted in ({}, {"": whole[""]}, [], None, 3):
        write_json(folder / "checksums.json", noted)
        with pytest.raises(XtransferError, match="checksums.json is damaged; delete that folder"):
            check_checkpoint(folder)


@pytest.mark.parametrize("cells", (3, None, "text", [1], [{}], {"a": 1}))
def test_a_notebook_that_is_none_is_said(cells, study):
    plan, outputs = study
    target = run_folder(outputs, plan.plan()[-1])
    write_json(target / "notebook.ipynb", read_json(target / "notebook.ipynb") | {"cells": cells})
    with pytest.raises(XtransferError, match="is damaged: notebook.ipynb cannot be read; restore"):
        check_records(plan, outputs)


@pytest.mark.parametrize("field, value", [("files", None), ("files", []), ("files", 3), ("data", None), ("data", [3]), ("scores", {"a": 1}), ("scores", [{"value": "text"}]), ("seconds", {"total": None}), ("environment", []), ("parameters", None), ("digest", 3), ("files", {"log.jsonl": 3})], ids=str)
def test_a_field_of_another_kind_is_said_without_a_checksum_too(field, value, study):
    """Records of before version 0.6 have no checksum."""
    plan, outputs = study
    path = run_folder(outputs, plan.plan()[-1]) / "record.json"
    record = read_json(path)
    if value == [{"value": "text"}]:
        value = [record["scores"][0] | value[0]]
    write_json(path, {name: part for name, part in record.items() if name != "checksum"} | {field: value})
    with pytest.raises(XtransferError, match="record.json is damaged: .*; delete its folder and run it again.$") as error:
        check_records(plan, outputs)
    assert "\n" not in str(error.value)


def test_a_record_that_was_being_replaced_is_cleared(study):
    plan, outputs = study
    old = replaced_by(run_folder(outputs, plan.plan()[0]))
    old.mkdir()
    run_study(plan, outputs, workers=1, declarations=[str(TOYS)], report=lambda line: None)
    assert not old.exists()


def test_a_run_that_another_process_holds_is_waited_for(study, tmp_path):
    plan, outputs = study
    run, said = plan.plan()[-1], []
    final = run_folder(outputs, run)
    final.rename(tmp_path / "kept")
    holder = f"import sys; from pathlib import Path; from filelock import FileLock\nwith FileLock({str(outputs / '.locks' / f'{run.digest}.lock')!r}): print('held', flush=True); sys.stdin.readline()"
    other = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"

    def report(line):
        said.append(line)
        if "another process" in line:  # it ends, and its record is there
            (tmp_path / "kept").rename(final)
            other.stdin.write("\n"), other.stdin.close()

    outcome = run_study(plan, outputs, workers=1, declarations=[str(TOYS)], report=report)
    other.wait()
    other.stdout.close()
    assert not outcome.failed and outcome.done == [run.id] and sum("another process" in line for line in said) == 1


def test_a_full_disk_in_the_driver_is_one_sentence(study, monkeypatch):
    import xtransfer.publishing

    plan, outputs = study
    run = plan.plan()[-1]
    work = work_folder(outputs, run)
    run_folder(outputs, run).rename(work)  # finished, but not published

    def full(*given):
        raise OSError(28, "No space left on device", str(given[-1]))

    with monkeypatch.context() as patched:
        patched.setattr(xtransfer.publishing.os, "replace", full)
        with pytest.raises(XtransferError, match="No space left .* given again") as error:
            execute(run, outputs, declarations=[str(TOYS)])
    assert "\n" not in str(error.value) and execute(run, outputs, declarations=[str(TOYS)], keep_checkpoint=False).run == run.id and not work.exists()


def test_parts_of_killed_writers_are_not_published(study):
    plan, outputs = study
    run = plan.plan()[-1]
    work = work_folder(outputs, run)
    run_folder(outputs, run).rename(work)
    for name in (".results.json.77-00.part", "results.json", "kernel.log", "error.txt"):
        (work / name).write_text("{")
    execute(run, outputs, declarations=[str(TOYS)], keep_checkpoint=False)
    assert leftovers(outputs) == []


def test_the_first_of_two_processes_does_not_live_without_its_notebook():
    """torchrun is told who started it: a parent that has died before it was asked for is noticed."""
    from xtransfer.distributed import PROGRAM

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(dead.pid), "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stdout


@pytest.mark.parametrize("damage", ("[]", "{", '{"DIGEST": 3}', "\x00", "[" * 100_000, "9" * 5000), ids=lambda damage: ascii(damage)[:20])
def test_a_damaged_measurement_of_this_machine_is_made_again(damage, tmp_path, monkeypatch, given_machine):
    import xtransfer.cost
    from xtransfer.core import digest

    monkeypatch.setenv("XTRANSFER_CACHE", str(tmp_path))
    (tmp_path / xtransfer.cost.MACHINES_NAME).write_text(damage.replace("DIGEST", digest(xtransfer.cost.machine_key(1, 1))))
    monkeypatch.setattr(xtransfer.cost, "_measured", lambda threads, workers: [given_machine])
    assert xtransfer.cost.this_machine(1, 1) is None and xtransfer.cost.this_machine(1, 1, measuring=lambda: None).update_seconds == given_machine["update_seconds"]
