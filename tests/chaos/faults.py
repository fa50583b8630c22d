"""The targeted faults: where a process dies to the file operation, what the disk refuses, and what of the files is damaged."""

import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from drive import SMOKE, Command, differences, leftovers

WORK = r"/\.work-[^/]*"


class Lab:
    """Where the faults are tried: folders, an undisturbed toy study, and its runs by template."""

    def __init__(self, folder):
        self.folder, self.cache, self.logs, self.reference = folder, folder / "cache", folder / "logs", folder / "toys"
        self.number = 0

    def run_of(self, outputs, template):
        """The folder of the first run of a template in an undisturbed study, or in a copy of it."""
        from xtransfer.records import read_record

        for path in sorted(self.reference.glob("*/*/record.json")):
            if read_record(path.parent).template == template:
                return outputs / path.parent.relative_to(self.reference)
        raise LookupError(template)

    def work_of(self, outputs, template):
        place = self.run_of(outputs, template)
        return place.with_name(f".work-{place.name}")

    def begin(self, without, name="trial"):
        """A copy of the undisturbed study, without the runs of some templates."""
        outputs = self.folder / name
        shutil.rmtree(outputs, ignore_errors=True)
        shutil.copytree(self.reference, outputs)
        (outputs / ".whole").unlink(missing_ok=True)
        for template in without:
            shutil.rmtree(self.run_of(outputs, template))
        return outputs

    def command(self, outputs, plan=None, cache=None, *more):
        return Command([*SMOKE, "--outputs", outputs, *more], cache or self.cache, self.logs, plan)


@dataclass(kw_only=True)
class Fault:
    """One fault: what is missing at first, what is interrupted and damaged, with which plan the command is given, and how it is mended before it is given again."""
    name: str
    done: str  # in words
    without: tuple[str, ...] = ("target",)  # templates whose first run is missing from the study
    interrupt: dict | None = None  # plan of a command before the damage
    damage: Callable | None = None  # (lab, outputs, cache)
    plan: dict | None = None
    said: str = ""  # pattern of what the command has to say
    mend: Callable | None = None  # (lab, outputs, cache), what the message says
    fails: bool | None = None  # whether the command has to fail at first; None: it may
    own_cache: bool = False  # an empty one
    more: tuple = ()


def killed(who, event, match, count=1, do="kill", **others):
    return {"who": who, "event": event, "match": match, "count": count, "do": do} | others


def flip(path, at=0.5):
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(len(content) * at))] ^= 4
    path.write_bytes(content)


def cut(path, keep=0.6):
    """Cut a file short."""
    os.truncate(path, int(path.stat().st_size * keep))


def at(place, change):
    """A damage of the files that a pattern names, as seen from the outputs; `place` gets the lab and the outputs."""
    def do(lab, outputs, cache):
        folder, pattern = place(lab, outputs)
        found = sorted(p for p in folder.glob(pattern) if p.is_file())
        assert found, f"nothing matches {pattern} in {folder}"
        for path in found:
            change(path)
    return do


def run(template, pattern):
    return lambda lab, outputs: (lab.run_of(outputs, template), pattern)


def work(template, pattern):
    return lambda lab, outputs: (lab.work_of(outputs, template), pattern)


def remove_run(template, part=""):
    """Mend as the message says: delete a run's folder, or a part of it."""
    return lambda lab, outputs, cache: shutil.rmtree(lab.run_of(outputs, template) / part)


def lost_weights(lab, outputs, cache):
    shutil.rmtree(lab.run_of(outputs, "pretrain") / "checkpoint")


KILLS = [
    ("a state begins to be written", "pretrain", "kernel", "mkdir", r"training/part-", 1, {}),
    ("in the middle of the tensors of a state", "pretrain", "kernel", "mkdir", r"training/part-", 2, {"do": "short", "bytes": 9000}),
    ("a state is about to get its name", "pretrain", "kernel", "rename", r"part-\d+ .*state-", 2, {}),
    ("older states are being removed", "pretrain", "kernel", "remove", r"^(tensors.safetensors|progress.json)$", 1, {}),
    ("the training log is opened", "target", "kernel", "open", r"training/log.jsonl", 1, {}),
    ("the checkpoint begins to be written", "pretrain", "kernel", "mkdir", r"checkpoint$", 1, {}),
    ("in the middle of the checkpoint", "pretrain", "kernel", "mkdir", r"checkpoint$", 1, {"do": "short", "bytes": 6000}),
    ("the driver dies while the checkpoint is written", "intermediate", "kernel", "mkdir", r"checkpoint$", 1, {"do": "kill driver"}),
    ("predictions are about to be written", "target", "kernel", "open", r"predictions.parquet", 1, {}),
    ("in the middle of the predictions", "target", "kernel", "open", r"predictions.parquet", 1, {"do": "short", "bytes": 700}),
    ("results are about to be there", "target", "kernel", "rename", r"results.json", 1, {}),
    ("the driver dies when results are there", "target", "kernel", "rename", r"results.json", 1, {"do": "kill driver"}),
    ("papermill writes the notebook", "target", "driver", "open", r"notebook.ipynb", 4, {}),
    ("in the middle of the notebook", "target", "driver", "open", r"notebook.ipynb", 6, {"do": "short", "bytes": 5000}),
    ("the record is about to be there", "target", "driver", "rename", r"record.json", 1, {}),
    ("the checkpoint's card is written", "pretrain", "driver", "open", r"README.md", 1, {}),
    ("training states are cleared", "target", "driver", "remove", r"state-|tensors|progress", 1, {}),
    ("publication clears its notes", "target", "driver", "remove", r"kernel.log|results.json|error.txt", 1, {}),
    ("publication clears its last note", "target", "driver", "remove", r"kernel.log|writer.lock", 2, {}),
    ("the folder is about to get its name", "target", "driver", "rename", WORK + r" ", 1, {}),
    ("the report is written", "target", "driver", "rename", r"reports/", 3, {}),
]
STORE = [
    ("an entry of the store begins", "mkdir", r"/store/\.", 1, {}), ("in the middle of an entry of the store", "mkdir", r"/store/\.", 2, {"do": "short", "bytes": 300}),
    ("the description of an entry is written", "open", r"/store/\..*meta.json", 1, {}), ("an entry is about to get its name", "rename", r"/store/\.", 2, {}),
]
FAULTS = [Fault(name=f"killed: {name}", done=f"kill -9 of the {who} ({event} of `{match}`, number {count}{', ' + str(more) if more else ''}) in a {template} run", without=(template,), plan=killed(who, event, match, count, **more))
          for name, template, who, event, match, count, more in KILLS]
FAULTS += [Fault(name=f"killed: {name}", done=f"kill -9 of the kernel ({event} of `{match}`, number {count}{', ' + str(more) if more else ''}), store empty at first", own_cache=True, plan=killed("kernel", event, match, count, **more)) for name, event, match, count, more in STORE]
FAULTS += [Fault(name=f"killed: {name}", done=f"kill -9 of the driver ({event} of `{match}`, number {count}) while a run whose weights were lost is replaced", without=("intermediate",), damage=lost_weights, plan=killed("driver", event, match, count))
           for name, event, match, count in (("the old record is about to go aside", "rename", r" .*/\.old-", 1), ("between the two renames", "rename", WORK + r" ", 1), ("the replaced record is being removed", "remove", r"^(record.json|notebook.ipynb|log.jsonl|config.json)$", 1))]

FULL = [("a state", "pretrain", killed("kernel", "mkdir", r"training/part-", 1, "full", bytes=5000)), ("the checkpoint", "pretrain", killed("kernel", "mkdir", r"checkpoint$", 1, "full", bytes=4000)),
        ("the predictions", "target", killed("kernel", "open", r"predictions.parquet", 1, "full", bytes=400)), ("the training log", "target", killed("kernel", "open", r"training/.*log.jsonl", 1, "ENOSPC")),
        ("the results", "target", killed("kernel", "open", r"results.json", 1, "ENOSPC")), ("the notebook", "target", killed("driver", "open", r"notebook.ipynb", 3, "ENOSPC")),
        ("the record", "target", killed("driver", "open", r"record.json", 1, "ENOSPC")), ("the final rename", "target", killed("driver", "rename", WORK + r" ", 1, "ENOSPC")), ("the report", "target", killed("driver", "open", r"reports/", 1, "ENOSPC")),
        ("locks", "target", killed("driver", "open", r"\.locks/", 2, "ENOSPC")), ("the output of the kernel", "target", killed("kernel", "open", r"kernel.log", 1, "ENOSPC"))]
FAULTS += [Fault(name=f"full disk: {name}", done=f"no room ({plan['do']}) for {name}, from the first try on", without=(template,), plan=plan, said="" if name == "the output of the kernel" else "No space|[Ff]ile too large|cannot write", fails=name != "the output of the kernel") for name, template, plan in FULL]
FAULTS += [Fault(name="full disk: the store", done="no room for an entry of the store", own_cache=True, plan=killed("kernel", "mkdir", r"/store/\.", 1, "ENOSPC"), fails=False)]


def mounted(size):
    """Put the outputs on a file system of their own, nearly full."""
    def do(lab, outputs, cache):
        aside = outputs.with_name("aside")
        outputs.rename(aside)
        outputs.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", outputs], check=True)
        shutil.copytree(aside, outputs, dirs_exist_ok=True)
        shutil.rmtree(aside)
        free = shutil.disk_usage(outputs).free
        (outputs / "ballast").write_bytes(b"x" * (free - size))
    return do


def protected(part=""):
    """Make a folder one that may only be read."""
    def do(lab, outputs, cache):
        place = cache if part == "cache" else outputs / part
        place.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", place, place], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
    return do


def unprotected(part=""):
    return lambda lab, outputs, cache: subprocess.run(["umount", cache if part == "cache" else outputs / part], check=True)


if os.name == "posix" and os.geteuid() == 0:
    FAULTS += [Fault(name=f"full disk: {size // 1000} kB left", done=f"outputs on a file system of their own with {size // 1000} kB left", without=("pretrain", "target"), damage=mounted(size), said="No space|cannot write", fails=True, mend=lambda lab, outputs, cache: (outputs / "ballast").unlink())
               for size in (8_000, 60_000, 150_000)]
    FAULTS += [Fault(name="read-only: the output folder", done="outputs mounted to be read only", damage=protected(), said="cannot write to the output folder .*[Rr]ead-only", fails=True, mend=unprotected()),
               Fault(name="read-only: a backbone's folder", done="the folder of one backbone mounted to be read only", damage=protected("toy-encoder"), said="[Rr]ead-only", fails=True, mend=unprotected("toy-encoder")),
               Fault(name="read-only: the store", done="an empty store mounted to be read only", own_cache=True, damage=protected("cache"), fails=False, mend=unprotected("cache"))]
FAULTS += [Fault(name="read-only: training states", done="EROFS wherever a state is written", plan=killed("kernel", "mkdir", r"training/part-", 1, "EROFS"), said="[Rr]ead-only", fails=True)]

FINISHED = "the finished run .* is damaged|record.json is damaged"
for what, change in (("cut short", cut), ("with one bit changed", flip), ("emptied", lambda p: p.write_bytes(b"")), ("missing", Path.unlink)):
    FAULTS += [Fault(name=f"damage: record {what}", done=f"record.json of a finished target {what}", without=(), damage=at(run("target", "record.json"), change), said="" if what == "missing" else FINISHED, fails=what != "missing", mend=remove_run("target") if what != "missing" else None)]
    FAULTS += [Fault(name=f"damage: {name} {what}", done=f"{name} of a finished target {what}", without=(), damage=at(run("target", name), change), said=FINISHED, fails=True, mend=remove_run("target"))
               for name in ("predictions.parquet", "log.jsonl", *(("notebook.ipynb",) if what != "with one bit changed" else ()))]
    FAULTS += [Fault(name=f"damage: {name} {what}", done=f"{name} of the run that a missing one starts from {what}", without=("intermediate",), damage=at(run("pretrain", name), change), said="" if (name, what) == ("checkpoint/config.json", "missing") else "damaged", fails=(name, what) != ("checkpoint/config.json", "missing") or None,
                     mend=remove_run("pretrain", "checkpoint")) for name in ("checkpoint/model.safetensors", "checkpoint/config.json")]
    FAULTS += [Fault(name=f"damage: training state, {name} {what}", done=f"the run is killed before it writes its checkpoint, then {name} of its state {what}", without=("pretrain",), interrupt=killed("kernel", "mkdir", r"checkpoint$", 1), damage=at(work("pretrain", f"training/{name}"), change), said="is damaged .* trained anew", fails=False)
               for name in ("state-*/tensors.safetensors", "state-*/progress.json", "best-*.safetensors")]
    FAULTS += [Fault(name=f"damage: unpublished record {what}", done=f"the driver is killed before publication, then record.json in the work folder {what}", interrupt=killed("driver", "rename", WORK + r" "), damage=at(work("target", "record.json"), change), said="" if what == "missing" else "finished but not published", fails=False)]
    FAULTS += [Fault(name=f"damage: unpublished predictions {what}", done=f"the driver is killed before publication, then predictions.parquet in the work folder {what}", interrupt=killed("driver", "rename", WORK + r" "), damage=at(work("target", "predictions.parquet"), change), said="finished but not published", fails=False)]


def everything_in(cache_part, change):
    def do(lab, outputs, cache):
        for path in sorted(p for p in cache.glob(cache_part) if p.is_file()):
            change(path)
    return do


def garbage(path):
    path.write_bytes(random.Random(0).randbytes(5000))


FAULTS += [Fault(name=f"damage: store, {name} {what}", done=f"the store is filled by a killed run, then {name} of every entry {what}", own_cache=True, interrupt=killed("driver", "rename", r"record.json"), damage=everything_in(f"store/*/{name}", change), fails=False)
           for name in ("meta.json", "*.npy") for what, change in (("cut short", cut), ("with one bit changed", flip))]
FAULTS += [Fault(name=f"damage: {name}", done=f"the run is killed in training, then {name} holds random bytes", without=("pretrain",), interrupt=killed("kernel", "mkdir", r"training/part-", 2), damage=at(work("pretrain", pattern), garbage), fails=False)
           for name, pattern in (("training log", "training/log.jsonl"), ("notebook of a run that is not finished", "notebook.ipynb"), ("lock of the writer", ".writer.lock"), ("reason of a failure", "error.txt"))]
FAULTS += [Fault(name="damage: locks", done="all lock files hold random bytes", damage=at(lambda lab, outputs: (outputs / ".locks", "*.lock"), garbage), fails=False),
           Fault(name="damage: a lock that is a folder", done="the lock of every run is a folder", damage=lambda lab, outputs, cache: [(p.unlink(), p.mkdir()) for p in (outputs / ".locks").glob("*.lock")], said="cannot lock", fails=True,
                 mend=lambda lab, outputs, cache: shutil.rmtree(outputs / ".locks")),
           Fault(name="damage: results of a killed run", done="the driver is killed when results are there, then results.json holds random bytes", interrupt=killed("driver", "rename", r"record.json"), damage=at(work("target", "results.json"), garbage), fails=False),
           Fault(name="damage: notes on backbones", done="the notes of the self-check hold random bytes", without=("pretrain",), damage=at(lambda lab, outputs: (outputs / ".checks", "*.json"), garbage), fails=False),
           Fault(name="damage: speed of the machine", done="machine.json holds random bytes", own_cache=True, damage=lambda lab, outputs, cache: (cache.mkdir(parents=True, exist_ok=True), garbage(cache / "machine.json")), fails=False),
           Fault(name="clock: back by a day", done="after 6 seconds the clocks of all processes go back by a day", without=("pretrain", "target"), plan={"back": 86400, "after": 6}, own_cache=True, fails=False)]


def dated_in_the_future(lab, outputs, cache):
    for folder in (outputs, cache):
        for path in folder.rglob("*"):
            with suppress(OSError):
                moment = path.stat().st_mtime + 10 * 86400
                os.utime(path, (moment, moment))


FAULTS += [Fault(name="clock: files of days to come", done="a run is killed in training, and all files are dated ten days from now", without=("pretrain",), own_cache=True, interrupt=killed("kernel", "mkdir", r"training/part-", 2), damage=dated_in_the_future, fails=False)]


def together(lab, outputs, cache):
    """Two studies that share runs, started at once; the second one is waited for here."""
    lab.others = [Command([*SMOKE[:3], profile, *SMOKE[4:], "--outputs", outputs], cache, lab.logs) for profile in ("mini",)]


FAULTS += [Fault(name="two studies at once", done="the profiles smoke and mini of the toy study, which share runs, are started at the same time on an empty folder", without=("pretrain", "intermediate", "target"), damage=together, fails=False)]


def judge(lab, outputs, before, first, second, pattern="", fails=None):
    """What is wrong at the end of a trial: commands before the one that is tried, this one, and the same again."""
    wrong = [f"{text}: {e.err[-600:]}" for e in (*before, *first, *second) if (text := e.ugly)]
    last = (*first, *second)[-1]
    if last.code != 0:
        wrong.append(f"the same command ends with code {last.code}: {last.err[-600:]}")
    if pattern and not re.search(pattern, first[0].said):
        wrong.append(f"it does not say {pattern!r}, but: {first[0].said[-300:]!r}")
    if fails is not None and (first[0].code == 1) != fails:
        wrong.append(f"the command ended with code {first[0].code} at first")
    return wrong + differences(outputs, lab.reference) + leftovers(outputs)


def shown(lab, *ended):
    return " / ".join(dict.fromkeys(line.replace(str(lab.folder), "...") for e in ended for line in e.said.splitlines() if line.strip()))[-900:]


def try_fault(lab, fault):
    """Try one fault; what came of it, for the report."""
    outputs, cache = lab.begin(fault.without), lab.cache
    lab.others = []
    if fault.own_cache:
        cache = lab.folder / "own-cache"
        shutil.rmtree(cache, ignore_errors=True)
    before = []
    try:
        if fault.interrupt:
            before.append(lab.command(outputs, fault.interrupt, cache, *fault.more).ended())
        if fault.damage:
            fault.damage(lab, outputs, cache)
        command = lab.command(outputs, fault.plan, cache, *fault.more)
        first = [command.ended()]
        happened = fault.plan is None or "do" not in fault.plan or command.fired.exists()
        others = [other.ended() for other in lab.others]
        second = []
        if fault.mend:
            fault.mend(lab, outputs, cache)
        if first[0].code or fault.plan or any(o.code for o in others):
            second.append(lab.command(outputs, None, cache, *fault.more).ended())
        wrong = judge(lab, outputs, before, first, second, fault.said, fault.fails) if not lab.others else judge_two(lab, outputs, [*first, *others, *second])
        if fault.interrupt and before[0].code == 0 or not happened:
            wrong.append("the fault did not happen")
    except Exception as error:  # the tool goes on with the next one
        wrong, first, second, before = [f"{type(error).__name__}: {error}"], [], [], []
    finally:
        for place in (outputs / "toy-encoder", outputs, cache):
            subprocess.run(["umount", place], capture_output=True)
    end = "; ".join(wrong) or f"{'the command ended' if not second else 'the same command, given again, ended'} with equal records"
    return {"done": fault.done, "said": shown(lab, *first), "end": end, "wrong": wrong}


def judge_two(lab, outputs, ended):
    """Two studies at once: no traceback, all ended, and the runs of the first are what they were."""
    wrong = [f"{e.ugly or e.code}: {e.err[-600:]}" for e in ended if e.ugly or e.code]
    return wrong + [line for line in differences(outputs, lab.reference) if "too much" not in line] + leftovers(outputs)


def try_point(lab, name, who, template, share):
    """Kill a process between two file operations, the share of them that are done by then being drawn; what came of it."""
    key = f"{who} {template}"
    known = lab.__dict__.setdefault("operations", {})
    pattern = str(lab.folder) + r"/(trial|cache)/|^[^/]*$"
    if key not in known:  # count them once
        command = lab.command(lab.begin((template,)), killed(who, "any", pattern, 0, "tally"))
        command.ended()
        known[key] = command.fired.stat().st_size
    count = 1 + int(share * known[key])
    outputs = lab.begin((template,))
    command = lab.command(outputs, killed(who, "any", pattern, count))
    first, happened = command.ended(), command.fired.exists()
    second = [lab.command(outputs).ended()] if first.code else []
    wrong = judge(lab, outputs, [], [first], second)
    done = f"kill -9 of the {who} of a {template} run at its file operation {count}" + ("" if happened else ", which there was not")
    return {"done": done, "said": shown(lab, first), "end": "; ".join(wrong) or f"{'the same command, given again, ended' if second else 'the command ended'} with equal records", "wrong": wrong}
