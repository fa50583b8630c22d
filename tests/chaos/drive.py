"""What the chaos tool and its short form in the tests share: commands that are disturbed, processes that are found and killed, and folders that are compared."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
TOYS = HERE.parent / "toys.py"
SMOKE = ["run", "toys", "--profile", "smoke", "--declare", TOYS, "--workers", 1, "--threads", 1]  # the toy study of the tests: pretraining, an intermediate stage, two targets
KEPT = {"record.json", "notebook.ipynb", "predictions.parquet", "embeddings.safetensors", "log.jsonl", "checkpoint"}


@dataclass(kw_only=True)
class Ended:
    """A command that has ended."""
    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """What was said beside the progress: errors, and notes about what was mended."""
        notes = [line for line in self.out.splitlines() if line.startswith("run ") or "damaged" in line]
        return "\n".join([*notes, *self.err.strip().splitlines()])

    @property
    def ugly(self) -> str:
        """A traceback, or nothing."""
        return "a traceback was shown" if "Traceback" in self.out + self.err else ""


def package_environment():
    """The environment of all that is started here: the package that this process has imported, and one thread."""
    import xtransfer

    around = {k: v for k, v in os.environ.items() if not k.startswith(("COVERAGE", "XTRANSFER_CHAOS"))}
    return around | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(xtransfer.__file__).resolve().parents[1])}


class Starter:
    """The process that commands are forked from; see `start.py`."""

    process = None

    @classmethod
    def ask(cls, value):
        if cls.process is None:
            cls.process = subprocess.Popen([sys.executable, str(HERE / "start.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=package_environment())
        cls.process.stdin.write(json.dumps(value) + "\n")
        cls.process.stdin.flush()
        return json.loads(cls.process.stdout.readline())


class Command:
    """The command line as a user gives it, in a session of its own."""

    def __init__(self, arguments, cache, folder, plan=None):
        self.mark, self.folder = uuid.uuid4().hex, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        around = package_environment() | {"XTRANSFER_CACHE": str(cache)}
        around["PYTHONPATH"] = os.pathsep.join([str(HERE / "hook"), around["PYTHONPATH"]])
        if plan is not None:
            path = self.folder / f"plan-{self.mark}.json"
            self.fired = path.with_suffix(".fired")
            path.write_text(json.dumps(plan | {"fired": str(self.fired)}))
            around["XTRANSFER_CHAOS"] = str(path)
        self.out, self.err = self.folder / f"{self.mark}.out", self.folder / f"{self.mark}.err"
        self.pid = Starter.ask({"arguments": [str(a) for a in arguments], "environment": around, "out": str(self.out), "err": str(self.err)})
        self.code, self.seen = None, {}

    def poll(self):
        """The exit code; None while it runs."""
        if self.code is None:
            self.code = Starter.ask({"pid": self.pid})
        return self.code

    def members(self):
        """The living processes of this command by their part in it: driver, server, kernel, agent (torchrun), rank. Those whose parent has died are known from before."""
        found, alive = {}, {}
        for process in psutil.process_iter(["pid", "ppid", "cmdline", "status", "create_time"]):
            if process.info["status"] != psutil.STATUS_ZOMBIE:
                alive[process.info["pid"]] = process.info
        parts = {self.pid: "driver"} if self.pid in alive and self.code is None else {}
        for _ in range(5):  # generations
            for pid, about in alive.items():
                above = parts.get(about["ppid"])
                if pid in parts or above is None:
                    continue
                line = " ".join(about["cmdline"] or ())
                parts[pid] = ("other" if "resource_tracker" in line else "server" if above == "driver" else "kernel" if above == "server" else "agent" if above == "kernel" else "rank" if above == "agent" else "other")
        self.seen |= {(pid, alive[pid]["create_time"]): part for pid, part in parts.items()}
        for (pid, born), part in self.seen.items():
            if pid in alive and alive[pid]["create_time"] == born and not (part == "driver" and self.code is not None):
                found.setdefault(part, []).append(pid)
        return found

    def kill(self, parts, choose=list):
        """Kill the processes with some parts, or those of them that are chosen; returns how many there were."""
        found = self.members()
        pids = choose([pid for part in parts for pid in found.get(part, [])])
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return len(pids)

    def ended(self, timeout=600):
        """Wait for the command and read what it has said; nothing of it survives a timeout."""
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if self.poll() is None:
            self.kill(["driver", "server", "kernel", "agent", "rank", "other"])
            raise TimeoutError(f"a command has not ended after {timeout} s")
        out, err = self.out.read_text(errors="replace"), self.err.read_text(errors="replace")
        self.out.unlink(), self.err.unlink()
        return Ended(code=self.code, out=out, err=err)

    def gone(self, seconds=5.0):
        """Whether nothing of it is left after some seconds."""
        end = time.monotonic() + seconds
        while (left := {k: v for k, v in self.members().items() if k != "other"}) and time.monotonic() < end:
            time.sleep(0.1)
        return not left


def of_file(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def outcome(folder):
    """What must not depend on disturbances: scores, training, data, log, predictions and weights of every run."""
    found = {}
    for path in sorted(Path(folder).glob("*/*/record.json")):
        if path.parent.name.startswith("."):
            continue
        record, place = json.loads(path.read_text()), path.parent
        weights = {p.name: of_file(p) for p in sorted((place / "checkpoint").glob("*")) if p.name != "README.md"}  # a card tells times
        found[record["run"]] = {"scores": record["scores"], "training": record["training"], "data": [d["fingerprint"] for d in record["data"]], "log": of_file(place / "log.jsonl"),
                                "predictions": of_file(place / "predictions.parquet"), "embeddings": of_file(place / "embeddings.safetensors"), "weights": weights}
    return found


def differences(folder, reference):
    """Where the records of a folder are not those of an undisturbed one, in words; [] when all are equal."""
    here, there = outcome(folder), outcome(reference)
    found = [f"{run} is {'missing' if run in there else 'too much'}" for run in here.keys() ^ there.keys()]
    return found + [f"{run}: other {what}" for run in here.keys() & there.keys() for what in here[run] if here[run][what] != there[run][what]]


def leftovers(folder):
    """What a kill has left that is no record: work folders, replaced records, parts of files, and files that do not belong into a record."""
    found = [str(p.relative_to(folder)) for pattern in ("*/.work-*", "*/.old-*", "**/*.part") for p in Path(folder).glob(pattern)]
    return found + [str(p.relative_to(folder)) for run in Path(folder).glob("*/*/record.json") for p in run.parent.iterdir() if p.name not in KEPT]


def runs_done(folder):
    return sum(1 for p in Path(folder).glob("*/*/record.json") if not p.parent.name.startswith("."))
