"""Studies in jobs of Snakemake: the plan and what jobs ask for, what is refused, a failing run, a killed driver, and a real Slurm where its packages are."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import cluster_proof
import slurm
import xtransfer.cluster as cluster
from conftest import TOYS, command, finished, xtransfer
from xtransfer.cluster import PLAN_NAME, grouped, job_table, make_jobs, own_gpus, read_run, refused, reports, run_job, write_plan, written_run
from xtransfer.core import Interrupted, XtransferError, write_json
from xtransfer.cost import H100, estimate
from xtransfer.driver import Executor, Pass, check_places, executor_profile, is_executor_profile, workflow_folder
from xtransfer.records import RECORD_NAME
from xtransfer.runs import Busy, Work
from xtransfer.studies import STUDIES, TEMPLATES, with_seeds

SMOKE = ("run", "toys", "--profile", "smoke", "--declare", TOYS, "--threads", 1)
SNAKEMAKE = (*SMOKE, "--executor", "snakemake")


@pytest.fixture(scope="module")
def planned():
    """A mini study's runs with their estimate on a GPU."""
    import xtransfer.catalogue  # noqa: F401

    study = with_seeds(STUDIES["multitask"].build("mini"), [0])
    work = [Work(run=run, keep_checkpoint=True) for run in study.plan()]
    return work, estimate(study, study.plan(), "nowhere", H100, 1, 1, 1)


def test_runs_survive_being_written(planned):
    for study, profile in (("stilts", "paper"), ("diversity", "mini")):
        for run in STUDIES[study].build(profile).plan()[::40]:
            back = read_run(json.loads(json.dumps(written_run(run))))
            assert back == run and back.id == run.id


def test_other_declarations_than_the_plan_s_are_noticed(planned):
    value = written_run(planned[0][0].run)
    value["stages"][0]["seed"] += 1
    with pytest.raises(XtransferError, match="the same version of the package"):
        read_run(value)


@pytest.mark.parametrize("seconds_of_job", [0, 10, 30, 1e9])
def test_every_run_is_in_one_job_and_jobs_wait_for_those_they_start_from(planned, seconds_of_job):
    work, found = planned
    jobs = make_jobs(work, found, 1, 1, 1, seconds_of_job)
    place = {item.run.digest: job.name for job in jobs for item in job.work}
    assert sorted(place) == sorted(item.run.digest for item in work) and len(place) == sum(len(job.work) for job in jobs)
    seen = set()
    for job in jobs:
        assert set(job.after) <= seen, "parents first"
        assert set(job.after) == {place[item.run.parent.digest] for item in job.work if item.run.parent}
        assert {item.run.template for item in job.work} == {job.kind} and job.kind in TEMPLATES
        assert re.fullmatch("[0-9a-f]{12}", job.name)
        seen.add(job.name)
    costs = dict(zip((run.digest for run in found.runs), found.seconds))
    for job in jobs:
        assert len(job.work) == 1 or sum(costs[item.run.digest] for item in job.work) <= seconds_of_job
    assert len(jobs) == len(work) if seconds_of_job == 0 else len(jobs) < len(work)


def test_large_runs_have_jobs_of_their_own_and_branches_do_not_wait_for_each_other(planned):
    work, _ = planned
    seconds = [1000.0 if item.run.stage.train and item.run.template != "target" else 1.0 for item in work]
    for group in grouped(work, seconds, 300):
        assert len(group) == 1 or all(seconds[i] == 1.0 for i in group)
    starts = {item.run.parent.digest for item in work if item.run.parent}
    small = [100.0 if item.run.template == "pretrain" else 1.0 for item in work]
    for group in grouped(work, small, 50):
        if any(work[i].run.digest in starts for i in group):
            assert len({work[i].run.parent for i in group}) == 1


def test_jobs_ask_for_what_the_estimate_says(planned):
    work, found = planned
    alone = make_jobs(work, found, 3, 0, 1, 0)
    many = make_jobs(work, found, 3, 1, 4, 0)
    for one, four in zip(alone, many):
        trains = bool(one.work[0].run.stage.train)
        assert (one.threads, one.gpus) == (3, 0) and (four.threads, four.gpus) == ((12, 4) if trains else (3, 1))
        assert one.memory > 1000 and one.minutes > 15 and (four.memory > one.memory)
    hours = replace(found, seconds=[3600.0] * len(work))
    assert all(job.minutes == 3 * 60 + 15 for job in make_jobs(work, hours, 1, 1))
    for wrong in (float("nan"), float("inf"), -1.0, -float("inf"), 1e300):
        assert all(15 <= job.minutes < 2**31 for job in make_jobs(work, replace(found, seconds=[wrong] * len(work)), 1, 1))


def test_the_plan_is_complete_and_its_names_are_harmless(planned, tmp_path):
    work, found = planned
    jobs = make_jobs(work, found, 1, 1, 1, 5)
    folder = write_plan(jobs, tmp_path / "out put'; touch x", [str(TOYS)], threads=2)
    plan = json.loads((folder / PLAN_NAME).read_text())
    assert folder.parent == tmp_path / "out put'; touch x" / ".cluster" and re.fullmatch("[0-9a-f]{12}", folder.name)
    assert plan["declarations"] == [str(TOYS)] and Path(plan["outputs"]).is_absolute() and Path(plan["data"]).is_absolute() and plan["threads"] == 2
    for name, job in plan["jobs"].items():
        assert re.fullmatch("[0-9a-f]+", name) and job["kind"] in TEMPLATES and set(job["after"]) <= plan["jobs"].keys()
        assert all(isinstance(job[what], int) and job[what] > 0 for what in ("threads", "gpus", "mem_mb", "runtime"))
        for run in job["runs"]:
            assert re.fullmatch(r"[\w.+@-]+/[\w.+@-]+", run["id"]), run["id"]


def test_the_snakefile_has_a_rule_for_each_kind_of_step_and_commands_hold_digests_only():
    text = (workflow_folder() / "Snakefile").read_text()
    assert set(re.findall(r"^(?:use )?rule (\w+)(?: as (\w+))?", text, re.M)) == {("all", ""), ("pretrain", ""), *(("pretrain", kind) for kind in TEMPLATES if kind != "pretrain")}
    (shell,) = re.findall(r'shell:\s+"(.*)"', text)
    assert set(re.findall(r"{[^}]*}", shell)) == {"{sys.executable:q}", "{wildcards.job:q}"} and 'job="[0-9a-f]+"' in text


def test_gpus_are_those_of_the_scheduler_or_free_ones(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("xtransfer.cluster.BUSY_WAIT", 0.01)
    for given, count, expected in (("3", 1, "3"), ("3,5", 2, "3,5"), ("3,5", 0, "3,5"), ("", 0, None), ("GPU-aa,GPU-bb", 2, "GPU-aa,GPU-bb")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        with own_gpus(count) as environment:
            assert environment.get("CUDA_VISIBLE_DEVICES") == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("xtransfer.cluster.gpu_count", lambda: 4)
    with own_gpus(2) as one, own_gpus(1) as two, own_gpus(1) as three:
        held = [environment["CUDA_VISIBLE_DEVICES"].split(",") for environment in (one, two, three)]
    assert sorted(sum(held, [])) == ["0", "1", "2", "3"]
    with own_gpus(0) as none:
        assert none == {"CUDA_VISIBLE_DEVICES": ""}, "a job that asked for none does not take another's"


def test_a_failure_is_tried_again_unless_the_package_refused(tmp_path):
    entry, job = {"started": "1", "ended": "", "final": False, "sentence": "s", "seconds": 1.0}, {"job": "0a", "kind": "target", "gpus": "", "scheduler": "", "process": 1}
    write_json(tmp_path / "jobs" / "a.json", job | {"node": "n1", "started": "1", "runs": [entry | {"run": "lost", "state": "running"}, entry | {"run": "wrong", "state": "failed", "final": True}]})
    current = Pass(folder=tmp_path, work=(), seconds={})
    assert [run["run"] for run in current.ended()] == ["wrong"] and set(refused(tmp_path)) == {"wrong"}
    write_json(tmp_path / "jobs" / "b.json", job | {"node": "n2", "started": "2", "runs": [entry | {"run": "lost", "state": "done"}]})
    assert [(run["run"], run["node"]) for run in current.ended()] == [("lost", "n2")] and not current.ended({"wrong"})
    (tmp_path / "jobs" / "c.json").write_text("{")
    assert len(reports(tmp_path)) == 2, "what a shared file system just replaces is read later"


def test_what_is_no_report_is_passed_over(tmp_path):
    entry = {"run": "a/b", "state": "failed", "started": "1", "ended": "", "seconds": 1.0, "sentence": "s", "final": True}
    whole = {"job": "0a", "kind": "target", "node": "n1", "gpus": "", "scheduler": "", "process": 1, "started": "1", "runs": [entry]}
    jobs = tmp_path / ".cluster" / "plan" / "jobs"
    wrong = ([], None, 3, "text", {}, {k: v for k, v in whole.items() if k != "runs"}, *(whole | other for other in ({"started": 3}, {"node": None}, {"runs": None}, {"runs": [3]}, {"runs": {"a": 1}}, {"runs": [entry, {}]}, {"runs": [entry | {"started": 3}]}, {"runs": [entry | {"seconds": "text"}]})))
    for i, content in enumerate((*wrong, whole)):
        write_json(jobs / f"{i}.json", content)
    (jobs / "deep.json").write_text("[" * 100_000)
    (jobs / "digits.json").write_text("9" * 5000)
    assert reports(jobs.parent) == [whole] and set(refused(jobs.parent)) == {"a/b"} and list(job_table(tmp_path)["node"]) == ["n1"]
    assert [run["run"] for run in Pass(folder=jobs.parent, work=(), seconds={}).ended()] == ["a/b"]


@pytest.mark.parametrize("options, said", [
    (("--executor-profile", "slurm"), "--executor-profile belongs to --executor snakemake"),
    (("--gpus", 1), "--gpus belongs to --executor snakemake"),
    (("--job-minutes", 3), "--job-minutes belongs to --executor snakemake"),
    (("--executor", "snakemake", "--job-minutes", "nan"), "--job-minutes is nan"),
    (("--executor", "snakemake", "--gpus", -1), "--gpus is -1"),
    (("--executor", "snakemake", "--executor-profile", "slrum"), "did you mean 'slurm'?"),
    (("--executor", "snakemake", "--executor-profile", "EMPTY"), "holds no config.yaml"),
    (("--profile", "CONFIGURED"), "is named by --executor-profile"),
    (("--executor", "slurm"), "invalid choice: 'slurm'"),
])
def test_what_makes_no_sense_is_refused_in_one_sentence(options, said, tmp_path, capsys, monkeypatch):
    from xtransfer.cli import main

    folders = {"EMPTY": tmp_path / "empty", "CONFIGURED": tmp_path / "configured"}
    for folder in folders.values():
        folder.mkdir()
    (folders["CONFIGURED"] / "config.yaml").write_text("executor: slurm\n")
    assert main(["run", "stilts", "--profile", "smoke", "--outputs", str(tmp_path / "outputs"), *(str(folders.get(o, o)) for o in options)]) == 1
    out, err = capsys.readouterr()
    assert said in err and err.strip().count("\n") == 0 and not list(tmp_path.glob("outputs/*")), err


@pytest.mark.parametrize("error,state,final", [(XtransferError("the loss is not finite."), "failed", True), (Interrupted("rank 1 of 2 was killed (SIGKILL)."), "failed", False), (Busy("b."), "busy", None), (KeyError("x"), "failed", False)])
def test_what_was_refused_is_final_and_what_was_stopped_is_not(planned, tmp_path, monkeypatch, error, state, final):
    def refuse(*given):
        raise error

    monkeypatch.setattr(cluster, "execute", refuse)
    became = cluster._go(written_run(planned[0][0].run) | {"id": "a run", "keep_checkpoint": True}, {"processes": 1, "sharding": "", "outputs": str(tmp_path), "threads": 1, "declarations": []}, {}, {"a run"})
    assert (became["state"], became.get("final")) == (state, final)


def test_a_parent_that_another_node_has_written_is_waited_for(planned, tmp_path, monkeypatch):
    child, seen = next(item.run for item in planned[0] if item.run.parent), []
    monkeypatch.setattr(cluster, "PARENT_WAIT", 5)
    monkeypatch.setattr(cluster, "has_checkpoint", lambda run, outputs: bool(seen) or seen.append(run))  # from the second look on
    monkeypatch.setattr(cluster, "execute", lambda *given: seen.append("executed"))
    became = cluster._go(written_run(child) | {"keep_checkpoint": True}, {"processes": 1, "sharding": "", "outputs": str(tmp_path), "threads": 1, "declarations": []}, {}, {"a run"})
    assert became == {"state": "done"} and seen == [child.parent, "executed"]


@pytest.mark.parametrize("name", ["a$HOME", "it's", 'say "so"', "`date`", "back\\slash", "new\nline", "now!"])
def test_a_scheduler_s_shell_never_sees_a_strange_path(name, tmp_path):
    with pytest.raises(XtransferError, match="which the shell of a scheduler takes for its own"):
        check_places(Executor(profile=executor_profile("slurm")), tmp_path / name)
    check_places(Executor(), tmp_path / name)  # Snakemake itself quotes
    check_places(Executor(profile=executor_profile("slurm")), tmp_path / "a plain {name}; & more")


def test_without_snakemake_one_sentence_names_the_extra(tmp_path, capsys, monkeypatch):
    from xtransfer.cli import main

    monkeypatch.setattr("xtransfer.driver.importlib.util.find_spec", lambda name: None)
    assert main(["run", "stilts", "--profile", "smoke", "--executor", "snakemake", "--outputs", str(tmp_path)]) == 1
    assert "folder of the repository with: .venv/bin/pip install -e '.[cluster]'" in capsys.readouterr().err


def test_profiles_are_shipped_or_folders(tmp_path):
    assert is_executor_profile(executor_profile("slurm")) and "executor: slurm" in (executor_profile("slurm") / "config.yaml").read_text()
    (tmp_path / "config.v8+.yaml").write_text("executor: slurm\n")
    assert executor_profile(str(tmp_path)) == tmp_path
    there = Executor(profile=tmp_path, workers=7).command(tmp_path / "plan")
    assert there[there.index("--profile") + 1] == str(tmp_path) and there[-2:] == ["--jobs", "7"] and there[there.index("--directory") + 1] == str(tmp_path / "plan")


def test_a_job_that_is_not_in_the_plan(tmp_path):
    write_json(tmp_path / PLAN_NAME, {"jobs": {}})
    with pytest.raises(XtransferError, match="has no job 'abc'"):
        run_job(tmp_path, "abc")


def test_the_proof_sees_a_shared_gpu_and_a_changed_result(tmp_path):
    row = {"plan": "p", "kind": "target", "scheduler": "1", "run": "a/b", "state": "done", "seconds": 1.0}
    def uses(*rows):
        columns = ("job", "node", "gpus", "process", "started", "ended", "state")
        return pd.DataFrame([row | dict(zip(columns, values)) for values in rows])
    apart = uses(("x", "n1", "0", 1, "10", "20", "done"), ("y", "n1", "0", 2, "20", "30", "done"), ("z", "n2", "0", 3, "15", "25", "done"), ("w", "n1", "1", 4, "15", "25", "done"))
    assert not cluster_proof.overlaps(apart, {})
    assert len(cluster_proof.overlaps(uses(("x", "n1", "0,1", 1, "10", "20", "done"), ("y", "n1", "1", 2, "19", "30", "done")), {})) == 1
    killed = uses(("x", "n1", "0", 1, "10", "", "running"), ("y", "n1", "0", 2, "19", "30", "done"))
    assert len(cluster_proof.overlaps(killed, {})) == 1 and not cluster_proof.overlaps(killed, {"n1": ["05", "18"]})
    for name, value in (("one", 50.0), ("two", 50.0), ("three", 50.00000000000001)):
        write_json(tmp_path / name / "b" / "r" / RECORD_NAME, {"run": "b/r", "scores": [{"value": value}], "training": {}, "data": []})
        (tmp_path / name / "b" / "r" / "predictions.parquet").write_bytes(b"x")
    one, two, three = (cluster_proof.results(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three
    (tmp_path / "two" / "b" / "r" / "predictions.parquet").write_bytes(b"y")
    assert cluster_proof.results(tmp_path / "two") != one


BROKEN = """
from xtransfer.studies import STUDIES
from dataclasses import replace
import runpy
runpy.run_path({toys!r})
from xtransfer.tasks import TASKS
def refuse(language, split):
    from xtransfer.core import XtransferError
    raise XtransferError("the letters of toy_qa are lost; look for them.")
TASKS.register(replace(TASKS["toy_qa"], load=refuse))
"""


def same(folder, other):
    """Scores and predictions of all records, compared."""
    def read(base):
        return {p.parent.name: (json.loads(p.read_text())["scores"], p.with_name("predictions.parquet").read_bytes() if p.with_name("predictions.parquet").exists() else b"") for p in sorted(Path(base).glob(f"*/*/{RECORD_NAME}"))}
    assert read(folder) == read(other)


@pytest.mark.slow
def test_a_failed_run_takes_only_its_descendants_with_it(tmp_path, toy_outputs):
    """On this machine, in jobs: a run that is refused, then the same command with it mended; equal to the local executor."""
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN.format(toys=str(TOYS)))
    asked = ("run", "toys", "--profile", "smoke", "--threads", 1, "--workers", 2, "--executor", "snakemake", "--outputs", tmp_path / "o")
    code, out, err = xtransfer(*asked, "--declare", broken)
    assert code == 1 and "the letters of toy_qa are lost; look for them." in err and "1 runs failed and 1 were not started because of them" in err and "Traceback" not in err, out + err
    assert "failed  toy-encoder/toy_text.toy_qa" in out and "[3/4]" in out
    assert len(list((tmp_path / "o").glob(f"*/*/{RECORD_NAME}"))) == 2
    code, out, err = xtransfer(*asked, "--declare", TOYS)
    assert code == 0 and "2 to execute" in out and "report:" in out, out + err
    same(tmp_path / "o", toy_outputs)
    table = job_table(tmp_path / "o")
    assert list(table["state"]).count("done") == 4 and list(table["state"]).count("failed") == 1 and (table["gpus"] == "").all()


def jobs_begun(outputs):
    return len(job_table(outputs)) if (outputs / ".cluster").exists() else 0


def wait(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


@pytest.mark.slow
def test_interrupted_it_stops_everything_and_says_how_to_go_on(tmp_path, toy_outputs):
    process = command(*SNAKEMAKE, "--outputs", tmp_path)
    wait(lambda: jobs_begun(tmp_path))
    os.kill(process.pid, signal.SIGINT)
    code, out, err = finished(process, 60)
    assert code == 130 and "same command" in err and "Traceback" not in err, out + err
    wait(lambda: not [p for p in slurm.processes().values() if str(tmp_path) in p[1]], 20)


@pytest.mark.slow
def test_on_a_real_slurm_a_stopped_and_a_killed_driver_are_started_again(tmp_path, toy_outputs):
    """Two nodes with stand-in GPUs: Ctrl-C cancels the jobs; then the driver is killed while a job runs, and the job is not disturbed by the next start."""
    import yaml

    if reason := slurm.missing():
        pytest.skip(reason)
    settings = yaml.safe_load((executor_profile("slurm") / "config.yaml").read_text())
    settings |= {"jobs": 4, "latency-wait": 5, "slurm-init-seconds-before-status-checks": 2, "slurm-no-account": True, "slurm-status-command": "squeue"}
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "config.yaml").write_text(yaml.safe_dump(settings))
    asked = (*SNAKEMAKE, "--outputs", tmp_path / "o", "--executor-profile", tmp_path / "profile", "--gpus", 1, "--job-minutes", 0)
    with slurm.cluster(tmp_path / "slurm"):
        stopped = command(*asked)
        wait(lambda: jobs_begun(tmp_path / "o"))
        os.kill(stopped.pid, signal.SIGINT)
        code, out, err = finished(stopped, 90)
        assert code == 130 and "same command" in err, out + err
        wait(lambda: not slurm.said("squeue", "-h"), 20)
        begun = jobs_begun(tmp_path / "o")
        first = command(*asked)
        wait(lambda: jobs_begun(tmp_path / "o") > begun)
        first.kill()
        first.wait()
        assert not [p for p in slurm.processes().values() if "snakemake.cli" in p[1] and str(tmp_path) in p[1]], "Snakemake outlives its driver"
        assert slurm.said("squeue", "-h", "-t", "R"), "the job went with its driver"
        code, out, err = xtransfer(*asked)
        assert code == 0, out + err + (tmp_path / "slurm" / "slurmctld.log").read_text()[-3000:]
    same(tmp_path / "o", toy_outputs)
    table = job_table(tmp_path / "o")
    later = table[table["plan"] != table["plan"].iloc[0]]  # the jobs of the first start were cancelled
    assert later["plan"].nunique() > 1 and (later["state"] == "done").all() and not (table["state"] == "failed").any()
    assert (table["gpus"].isin(["0", "1"])).all() and (table["node"].isin(["n1", "n2"])).all() and table["scheduler"].nunique() >= 4
