"""Does to a process what the plan in XTRANSFER_CHAOS says, at the moment that it says; Python imports this by itself in every process that has this folder in PYTHONPATH.

A plan is a JSON file: `who` ("driver", "kernel", "rank" or "any"), `event` ("open", "rename", "mkdir", "remove" or "any"), `match` (a pattern of paths), `count` (which of the matching events of a process), and `do`:
"kill" the process, "kill driver", "tally" (one byte for every event), "short" (it dies where the next files reach `bytes` bytes), "full" (files cannot grow beyond `bytes` bytes), or the name of an error such as ENOSPC that the system then answers with.
`back` sets the clock back by so many seconds, `after` seconds after the start. Everything happens once: what was done is noted beside the plan.
"""

import json
import os
import re
import resource
import signal
import sys

EVENTS = {"open": "open", "os.rename": "rename", "os.mkdir": "mkdir", "os.remove": "remove", "os.rmdir": "remove"}


def role():
    """Which part of a study this process is."""
    return "rank" if "XTRANSFER_AGENT" in os.environ else "kernel" if "JPY_PARENT_PID" in os.environ else "driver"


def paths_of(event, arguments):
    """The paths that an event changes, as text."""
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return ""
    return " ".join(os.fsdecode(a) for a in arguments[:2 if event == "os.rename" else 1] if isinstance(a, (str, bytes)))


def strike(plan, path):
    """Do what is planned, once for all processes."""
    import errno

    try:
        os.close(os.open(plan["fired"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        if plan["do"] in ("kill", "kill driver", "short"):
            return
    if plan["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif plan["do"] == "kill driver":
        os.kill(int(os.environ["XTRANSFER_CHAOS_DRIVER"]), signal.SIGKILL)
    elif plan["do"] in ("short", "full"):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["bytes"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if plan["do"] == "short":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    else:
        number = getattr(errno, plan["do"])
        raise OSError(number, os.strerror(number), path)


def watch(plan):
    """Wait for the planned event."""
    pattern, seen, busy = re.compile(plan["match"]), [], []

    def hook(event, arguments):
        kind = EVENTS.get(event)
        if kind is None or busy or plan["event"] not in (kind, "any") or plan["who"] not in (role(), "any"):
            return
        path = paths_of(event, arguments)
        if not path or not pattern.search(path):
            return
        seen.append(path)
        busy.append(True)
        try:
            if plan["do"] == "tally":
                with open(plan["fired"], "ab") as file:
                    file.write(b".")
            elif len(seen) == plan["count"] or len(seen) > plan["count"] and plan["do"].startswith("E"):
                strike(plan, path)
        finally:
            busy.clear()

    sys.addaudithook(hook)


def set_back(seconds, after):
    """A clock that jumps back."""
    import datetime
    import time

    begun, real, real_ns = time.monotonic(), time.time, time.time_ns

    def jump():
        return seconds if time.monotonic() - begun > after else 0

    class Backwards(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)

    time.time, time.time_ns, datetime.datetime = lambda: real() - jump(), lambda: real_ns() - int(jump() * 1e9), Backwards


def begin():
    """Read the plan, if there is one."""
    if os.environ.get("XTRANSFER_CHAOS"):
        os.environ.setdefault("XTRANSFER_CHAOS_DRIVER", str(os.getpid()))
        with open(os.environ["XTRANSFER_CHAOS"]) as found:
            asked = json.load(found)
        if "back" in asked:
            set_back(asked["back"], asked["after"])
        if "do" in asked:
            watch(asked)


begin()
