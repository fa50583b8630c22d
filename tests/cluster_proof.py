"""A study on a real Slurm of two nodes, with a node killed in the middle and the driver killed and started again, against the same study on the local executor.

    python tests/cluster_proof.py --seed 7 --report tests/reports/cluster

As root, where slurm-wlm, munge and Snakemake are installed. The seed draws what dies, when, and in which order. At the end every score, prediction file and hash of weights must be equal
bit for bit, no stand-in GPU may have been used by two jobs at a time, and both nodes must have worked. Arguments after -- choose another study than the default, a cut form of the mini
profile: `python tests/cluster_proof.py --seed 7 -- stilts --profile smoke`.
"""

import argparse
import datetime
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import yaml

import slurm
from xtransfer.asked import chosen_study
from xtransfer.cli import make_parser
from xtransfer.cluster import job_table
from xtransfer.driver import executor_profile
from xtransfer.records import RECORD_NAME

STUDY = ["multitask", "--profile", "mini", "--seeds", "0", "--set", "max_steps=15", "--train-limit", "200", "--score-limit", "20"]  # 33 runs in about 13 jobs
COMMON = ["--threads", "1", "--keep-checkpoints"]
MAIN = [sys.executable, "-c", "import sys; from xtransfer.cli import main; sys.exit(main())"]


def write_profile(folder: Path, **others) -> Path:
    """The shipped Slurm profile, with what this small cluster lacks and with less waiting."""
    settings = yaml.safe_load((executor_profile("slurm") / "config.yaml").read_text())
    settings |= {"latency-wait": 5, "slurm-init-seconds-before-status-checks": 3, "slurm-no-account": True, "slurm-status-command": "squeue"} | others
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def results(outputs: Path) -> dict[str, dict]:
    """What must not depend on where a run was executed: scores, training, predictions and weights."""
    found = {}
    for path in sorted(outputs.glob(f"*/*/{RECORD_NAME}")):
        record = json.loads(path.read_text())
        files = [path.with_name("predictions.parquet"), path.parent / "checkpoint" / "model.safetensors"]
        found[record["run"]] = {"scores": record["scores"], "training": {k: v for k, v in record["training"].items() if k != "seconds"}, "data": [d["fingerprint"] for d in record["data"]],
                                **{f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.exists()}}
    return found


def overlaps(table, died: dict[str, list[str]]) -> list[str]:
    """Pairs of jobs that used the same GPU of a node at the same time; a job that was killed with its node ended then."""
    found, uses = [], []
    for (plan, job, node, gpus, _), part in table.groupby(["plan", "job", "node", "gpus", "process"], sort=False):
        begun, ended = part["started"].min(), part["ended"].max()
        if (part["state"] == "running").any():
            ended = next((when for when in died.get(node, []) if when >= begun), "9999")
        uses += [(node, gpu, begun, ended, f"{plan}/{job}") for gpu in gpus.split(",") if gpu]
    for i, (node, gpu, begun, ended, job) in enumerate(uses):
        found += [f"GPU {gpu} of {node}: {job} and {other[4]}" for other in uses[:i] if other[:2] == (node, gpu) and begun < other[3] and other[2] < ended]
    return found


class Proof:
    """One course of the proof, with a log of what happened."""

    def __init__(self, seed: int, study: list[str], folder: Path) -> None:
        self.rng, self.study, self.folder, self.began = random.Random(seed), study, folder, time.monotonic()
        self.outputs, self.events, self.died = folder / "cluster", [], {}

    def note(self, what: str) -> None:
        self.events.append({"seconds": round(time.monotonic() - self.began), "runs finished": self.finished(), "event": what})
        print(f"{self.events[-1]['seconds']:5} s  {self.events[-1]['runs finished']:3} runs  {what}", flush=True)

    def finished(self) -> int:
        return len(list(self.outputs.glob(f"*/*/{RECORD_NAME}")))

    def start(self) -> subprocess.Popen:
        """The command of a user, in a session of its own."""
        asked = ["--outputs", str(self.outputs), *COMMON, "--executor", "snakemake", "--executor-profile", str(self.folder / "profile"), "--gpus", "1", "--job-minutes", "0.1"]
        log = open(self.folder / "driver.log", "a")
        return subprocess.Popen([*MAIN, "run", *self.study, *asked], stdout=log, stderr=log, start_new_session=True)

    def wait_for(self, runs: int, driver: subprocess.Popen) -> bool:
        """Wait until so many runs have finished and jobs are running; False when the driver has ended before."""
        while driver.poll() is None:
            busy = slurm.said("squeue", "-h", "-t", "R", "-o", "%N").split()
            if self.finished() >= runs and busy:
                time.sleep(self.rng.uniform(0, 8))
                return driver.poll() is None
            time.sleep(0.5)
        return False

    def kill_node(self, driver: subprocess.Popen) -> subprocess.Popen:
        busy = sorted(set(slurm.said("squeue", "-h", "-t", "R", "-o", "%N").split())) or ["n1"]
        node = self.rng.choice(busy)
        killed = slurm.kill_node(node)
        self.died.setdefault(node, []).append(datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"))
        self.note(f"node {node} killed with its {killed} processes")
        time.sleep(self.rng.uniform(slurm.SLURMD_TIMEOUT, 4 * slurm.SLURMD_TIMEOUT))
        slurm.start_node(node)
        self.note(f"node {node} started again")
        return driver

    def kill_driver(self, driver: subprocess.Popen) -> subprocess.Popen:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        self.note(f"driver killed while {len(slurm.said('squeue', '-h', '-t', 'R', '-o', '%i').split())} jobs run")
        time.sleep(self.rng.uniform(0, 5))
        driver = self.start()
        self.note("the same command given again")
        return driver

    def on_cluster(self, runs: int) -> int:
        """The study on Slurm with its accidents; the exit code of the last driver."""
        driver = self.start()
        self.note("first start")
        for what, least in zip(self.rng.sample([self.kill_node, self.kill_driver], 2), (self.rng.randint(1, runs // 3), self.rng.randint(runs // 2, 3 * runs // 4))):
            if self.wait_for(least, driver):
                driver = what(driver)
        code = driver.wait()
        self.note(f"the driver ended with exit code {code}")
        return code


def judged(proof: Proof, local: Path, runs: int) -> dict:
    """What was found, and whether it is what must be."""
    table, here, there = job_table(proof.outputs), results(local), results(proof.outputs)
    done = table[table["state"] == "done"]
    different = sorted(run for run in here.keys() | there.keys() if here.get(run) != there.get(run))
    numbers = {"runs": runs, "records": len(there), "jobs": int(table.groupby(["plan", "job", "node", "process"]).ngroups), "starts": int(table["plan"].nunique()), "scores": sum(len(r["scores"]) for r in there.values()),
               "prediction files": sum("predictions.parquet" in r for r in there.values()), "weights": sum("model.safetensors" in r for r in there.values()),
               "runs on each node": {str(node): int(part["run"].nunique()) for node, part in done.groupby("node")}, "runs begun on a GPU": int((table["gpus"] != "").sum()), "runs whose job was killed": int((table["state"] == "running").sum())}
    shared = overlaps(table, proof.died)
    kinds = [event["event"].split(" ")[0] for event in proof.events if "killed" in event["event"]]
    passed = {"every run has a record": len(there) == len(here) == runs, "scores, predictions and weights equal bit for bit": not different and bool(there), "no GPU used twice at a time": not shared and (table["gpus"] != "").all(),
              "both nodes worked": len(numbers["runs on each node"]) == 2, "a node and the driver were killed": sorted(kinds) == ["driver", "node"]}
    return {"numbers": numbers, "passed": {k: bool(v) for k, v in passed.items()}, "different": different, "overlaps": shared}


def written(found: dict) -> str:
    """The report as markdown."""
    lines = ["# A study on a real Slurm, with accidents", "", f"Written by `python tests/cluster_proof.py --seed {found['seed']}` on {found['date']}: `xtransfer run {' '.join(found['study'])}`, {found['numbers']['runs']} runs, on a Slurm of two nodes",
             "started on one machine (tests/slurm.py), each with two stand-in GPUs that jobs get exclusively, against the local executor in another folder. The nodes share one machine's cores: times say nothing about a cluster.", "", "| | |", "|---|---|"]
    lines[4:4] = ["", found["note"]] if "note" in found else []
    lines += [f"| {what} | {'yes' if passed else '**no**'} |" for what, passed in found["passed"].items()]
    lines += ["", "| | |", "|---|---:|", *(f"| {k} | {', '.join(f'{a} {b}' for a, b in v.items()) if isinstance(v, dict) else v} |" for k, v in found["numbers"].items())]
    lines += ["", "| seconds | runs finished | what happened |", "|---:|---:|---|", *(f"| {e['seconds']} | {e['runs finished']} | {e['event']} |" for e in found["events"])]
    return "\n".join(lines + [f"- {what}" for what in (*found["different"], *found["overlaps"])]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", metavar="PATH", help="write PATH.md and PATH.json (default: print only)")
    parser.add_argument("--folder", help="for everything, kept (default: a temporary one, removed at the end)")
    parser.add_argument("study", nargs="*", help="after --: arguments of `xtransfer run` that name a study")
    asked = parser.parse_args()
    study = asked.study or STUDY
    if reason := slurm.missing():
        print(reason, file=sys.stderr)
        return 1
    folder = Path(asked.folder or tempfile.mkdtemp(prefix="cluster-proof-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "XTRANSFER_CACHE": str(folder / "cache")}
    runs = len(chosen_study(make_parser().parse_args(["run", *study])).plan())
    write_profile(folder / "profile", jobs=8)
    proof = Proof(asked.seed, study, folder)
    with slurm.cluster(folder / "slurm"):
        proof.on_cluster(runs)
    local = subprocess.run([*MAIN, "run", *study, "--outputs", str(folder / "local"), *COMMON, "--workers", "2"], capture_output=True, text=True)
    proof.note(f"the local executor ended with exit code {local.returncode}")
    found = {"seed": asked.seed, "study": study, "date": datetime.date.today().isoformat(), **judged(proof, folder / "local", runs), "events": proof.events}
    print(written(found))
    if asked.report:
        Path(asked.report).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{asked.report}.md").write_text(written(found))
        Path(f"{asked.report}.json").write_text(json.dumps(found, indent=1) + "\n")
    if not asked.folder:
        shutil.rmtree(folder)
    return 0 if all(found["passed"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
