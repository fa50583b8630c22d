"""Disturb studies by all means and see that nothing comes of it.

    python tests/chaos/run.py --seed 0 --kills 100 --outputs FOLDER

runs a mini study (--study) once undisturbed and once, or as often as it takes, with `--kills` kills at random moments (of everything, of the driver alone, of a kernel alone, of the fork server), trains in pairs of processes that are killed one by one and together, and then goes through the targeted faults of `faults.py`.
After each the same command must end with records equal to the undisturbed ones, bit for bit but for times; nothing may be half-published; nobody may see a traceback. FOLDER/report.md and report.json say what was done, what was said and how it ended; the exit code is 0 when all is well.
The command can be interrupted and given again; it goes on after the last disturbance. Other seeds make other kills: --seed 1. Parts of it: --only random, pairs, points or faults.
"""

import argparse
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from drive import SMOKE, Command, differences, leftovers, runs_done
from faults import FAULTS, Lab, try_fault, try_point

STUDIES = {  # what is killed at random moments
    "mini": ["run", "stilts", "--profile", "mini", "--seeds", "0", "--set", "max_steps=40", "--set", "dev_limit=50", "--train-limit", "300", "--languages", "en,qaa,qab", "--threads", "1"],  # 66 runs
    "smoke": ["run", "stilts", "--profile", "smoke", "--threads", "1"],  # 8 runs: the arms none and qa of the mini profile, with two targets and retrieval; as often as it takes
}
PARTS = {"everything": ["driver", "server", "kernel", "agent", "rank"], "driver": ["driver"], "kernel": ["kernel"], "fork server": ["server"], "rank": ["rank"], "both ranks": ["rank"], "torchrun": ["agent"]}


class Book:
    """What has been done so far, on disk after every step."""

    def __init__(self, folder, seed):
        self.path = folder / "state.json"
        self.known = json.loads(self.path.read_text()) if self.path.exists() else {"seed": seed, "kills": {}, "rounds": {}, "trials": {}, "seconds": 0.0, "begun": time.strftime("%Y-%m-%d %H:%M")}
        if self.known["seed"] != seed:
            raise SystemExit(f"{folder} was begun with --seed {self.known['seed']}; give that one, or another folder.")
        self.since = time.monotonic()

    def save(self):
        self.known["seconds"] += time.monotonic() - self.since
        self.since = time.monotonic()
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.known, indent=1))
        part.replace(self.path)


def undisturbed(arguments, folder, lab, name):
    """Run a study once without disturbance."""
    if not (folder / ".whole").exists():
        began = time.monotonic()
        ended = Command([*arguments, "--outputs", folder], lab.cache, lab.logs).ended(3600)
        if ended.code:
            raise SystemExit(f"the undisturbed {name} study fails: {ended.err}")
        (folder / ".whole").write_text(f"{time.monotonic() - began:.0f}")
    print(f"undisturbed {name} study: {runs_done(folder)} runs, {(folder / '.whole').read_text()} s", flush=True)
    return folder


def one_kill(command, rng, ways, longest, stage):
    """Wait for a random moment, then kill; None when the command ended before. `stage` of the kills wait until a notebook runs, the others strike any time from the start."""
    way = rng.choice(ways)
    needed = {"kernel": "kernel", "fork server": "server", "rank": "rank", "both ranks": "rank", "torchrun": "agent"}.get(way, "kernel" if rng.random() < stage else None)
    while needed and command.poll() is None and needed not in command.members():
        time.sleep(0.1)
    began, delay = time.monotonic(), rng.uniform(0.0, longest)
    while command.poll() is None and time.monotonic() - began < delay:
        time.sleep(0.05)
    choose = (lambda pids: pids[:1] and [rng.choice(pids)]) if way == "rank" else list
    while command.poll() is None:
        if killed := command.kill(PARTS[way], choose):
            return way, killed
        time.sleep(0.05)  # one notebook has ended, and the next has not begun
    return None


def disturb(name, arguments, folder, reference, lab, book, wanted, seed, ways, longest):
    """Kill a study at random moments again and again, until it has been killed often enough and has ended by itself."""
    kills, rounds = book.known["kills"].setdefault(name, []), book.known["rounds"].setdefault(name, [])
    total, began, first = runs_done(reference), time.monotonic(), len(kills)
    while not (len(kills) >= wanted and rounds and rounds[-1]["kills"] == len(kills)):
        command = Command([*arguments, "--outputs", folder], lab.cache, lab.logs)
        rng, struck = random.Random(f"{seed} {name} {len(kills)}"), []
        while len(kills) < wanted and command.poll() is None and (found := one_kill(command, rng, ways, longest, 0.85)):
            way, count = found
            done = runs_done(folder)
            kills.append({"way": way, "processes": count, "runs": done})
            struck.append(kills[-1])
            book.save()
            pace = (time.monotonic() - began) / (len(kills) - first)
            print(f"[{name} {len(kills):>3}/{wanted}] {way:<12} {count} processes killed, {done} of {total} runs done  (about {pace * (wanted - len(kills)) / 60:.0f} min left)", flush=True)
            if way in ("everything", "driver"):
                break
        ended = command.ended(1800)
        for kill in struck:
            kill |= {"code": ended.code, "said": ended.said[-400:], "ugly": ended.ugly}
        if ended.code not in (0, 1, -9):
            rounds.append({"kills": len(kills), "wrong": [f"exit code {ended.code}: {ended.err[-300:]}"]})
        if ended.ugly:
            rounds.append({"kills": len(kills), "wrong": [f"{ended.ugly}: {ended.err[-1500:]}"]})
        if ended.code == 0:
            rounds.append({"kills": len(kills), "runs": runs_done(folder), "wrong": differences(folder, reference) + leftovers(folder) + ([] if command.gone() else ["processes are left"])})
            print(f"[{name}] ended by itself after {len(kills)} kills: {'; '.join(rounds[-1]['wrong']) or 'equal to the undisturbed one'}", flush=True)
            if len(kills) < wanted:
                shutil.rmtree(folder)
        book.save()


def trials(book, lab, seed, points, only):
    """The kills between two system calls, and the targeted faults."""
    rng, done = random.Random(f"{seed} points"), book.known["trials"]
    asked = [(f"point {k + 1}", None) for k in range(points)] * ("points" in only) + [(fault.name, fault) for fault in FAULTS] * ("faults" in only)
    began, fresh = time.monotonic(), 0
    for number, (name, fault) in enumerate(asked, 1):
        chosen = rng.choice(["driver", "kernel"]), rng.choice(["pretrain", "target"]), rng.random()  # drawn also when it was done, so that the next is the same
        if name in done:
            continue
        done[name] = try_point(lab, name, *chosen) if fault is None else try_fault(lab, fault)
        book.save()
        fresh += 1
        left = (time.monotonic() - began) / fresh * (len(asked) - number)
        print(f"[{number:>3}/{len(asked)}] {name}: {done[name]['end']}  (about {left / 60:.0f} min left)", flush=True)


def wrong(known):
    """Everything that is not as it should be."""
    found = [f"{name} after {r['kills']} kills: {line}" for name, rounds in known["rounds"].items() for r in rounds for line in r["wrong"]]
    return found + [f"{name}: {line}" for name, trial in known["trials"].items() for line in trial["wrong"]]


def cell(text):
    return " ".join(str(text).replace("|", "\\|").split())


def report(known, arguments):
    """The report, for people."""
    kills, bad = known["kills"], wrong(known)
    counts = {name: {way: sum(k["way"] == way for k in found) for way in PARTS} for name, found in kills.items()}
    lines = ["# Disturbed studies", "", f"`python tests/chaos/run.py --seed {known['seed']} --study {arguments.study} --kills {arguments.kills} --pairs {arguments.pairs} --points {arguments.points} --outputs FOLDER`, begun {known['begun']}, {known['seconds'] / 60:.0f} minutes.", "",
             f"**{sum(map(len, kills.values()))} kills at random moments, {sum(n.startswith('point') for n in known['trials'])} between two chosen file operations, {sum(not n.startswith('point') for n in known['trials'])} targeted faults; " + (f"{len(bad)} things are wrong.**" if bad else "every study ended with records equal to the undisturbed ones.**"), ""]
    lines += [f"- {line}" for line in bad] + [""] * bool(bad)
    lines += ["Equal means: scores, training facts, development scores and fingerprints of the data in every record; the bytes of predictions, training log and weights. Times, throughput and memory differ. No work folder, replaced record or part of a file may be left, no process, and no message may be a traceback.", "",
              "## Kills at random moments", "", f"The study is `xtransfer {' '.join(STUDIES[arguments.study])}`; pairs are the toy study of the tests with `--processes 2`. Nobody waits after a kill: the same command is given again at once, while orphans may still be alive.", ""]
    for name, found in counts.items():
        rounds = known["rounds"].get(name, [])
        lines += [f"**{name}**: " + ", ".join(f"{n} of {way}" for way, n in found.items() if n) + ". " + "; ".join(f"a study of {r.get('runs', '?')} runs ended after kill {r['kills']}: {'; '.join(r['wrong']) or 'equal'}" for r in rounds) + ".", ""]
    said = {}
    for found in kills.values():
        for kill in found:
            for line in kill.get("said", "").replace(str(arguments.outputs.resolve()), "...").splitlines():
                kind = cell(line)[:300]
                said.setdefault(kill["way"], {}).setdefault("".join("#" if c.isdigit() else c for c in kind), kind)
    lines += ["What was said after them, one of each kind:", ""] + [f"- {way}: {line}" for way, kinds in said.items() for line in list(kinds.values())[:4]] + [""]
    sentences = {}  # a sentence without its paths -> its first form
    def numbers(text):
        """Which sentences were said, by number."""
        kinds = [re.sub(r"\S*/\S+|\d+", "#", part) for part in text.split(" / ") if part]
        for kind, part in zip(kinds, [part for part in text.split(" / ") if part]):
            sentences.setdefault(kind, cell(part))
        return ", ".join(str(list(sentences).index(kind) + 1) for kind in dict.fromkeys(kinds)) or "-"

    for title, chosen in (("Kills between two file operations", [n for n in known["trials"] if n.startswith("point")]), ("Targeted faults", [n for n in known["trials"] if not n.startswith("point")])):
        if chosen:
            lines += [f"## {title}", "", "| | what was done | said | how it ended |", "|---|---|---|---|"]
            lines += [f"| {name} | {cell(t['done'])} | {numbers(t['said'])} | {cell(t['end'])} |" for name, t in ((n, known["trials"][n]) for n in chosen)] + [""]
    lines += ["## What was said in these trials", "", "Each sentence as it was first said; where it names runs, files or numbers, it named others later.", ""] * bool(sentences) + [f"{number}. {sentence}" for number, sentence in enumerate(sentences.values(), 1)] + [""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=100, help="kills of the study")
    parser.add_argument("--study", choices=list(STUDIES), default="mini", help="mini: 66 runs, again and again; smoke: 8 runs, again and again")
    parser.add_argument("--pairs", type=int, default=8, help="kills of the study that trains in pairs")
    parser.add_argument("--points", type=int, default=20, help="kills between two file operations")
    parser.add_argument("--longest", type=float, default=9.0, help="the most seconds between the start of a notebook and a kill")
    parser.add_argument("--outputs", type=Path, required=True, help="folder for the studies and the report")
    parser.add_argument("--only", nargs="*", default=["random", "pairs", "points", "faults"])
    asked = parser.parse_args()
    folder = asked.outputs.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    book = Book(folder, asked.seed)
    lab = Lab(folder)
    try:
        if "points" in asked.only or "faults" in asked.only:
            lab.reference = undisturbed(SMOKE, folder / "toys", lab, "toy")
            trials(book, lab, asked.seed, asked.points, asked.only)
        if "random" in asked.only:
            reference = undisturbed(STUDIES[asked.study], folder / asked.study, lab, asked.study)
            disturb(asked.study, STUDIES[asked.study], folder / f"{asked.study}-disturbed", reference, lab, book, asked.kills, asked.seed, ["everything", "driver", "driver", "kernel", "fork server"], asked.longest)
        if "pairs" in asked.only:
            pairs = [*SMOKE, "--processes", 2]
            reference = undisturbed(pairs, folder / "pairs", lab, "paired")
            disturb("pairs", pairs, folder / "pairs-disturbed", reference, lab, book, asked.pairs, asked.seed, ["rank", "both ranks", "torchrun", "kernel", "driver", "everything"], 3.0)
    finally:
        book.save()
        (folder / "report.md").write_text(report(book.known, asked))
        (folder / "report.json").write_text(json.dumps(book.known, indent=1))
    bad = wrong(book.known)
    print("\n".join(bad) or "everything is equal.", f"\nreport: {folder / 'report.md'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
