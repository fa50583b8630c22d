"""Starts commands as forks of a process that has imported everything, so that a killed one costs half a second and not ten.

Started once by `drive.py`; each line of its input is a command as JSON, each line of its output the process id, or what became of one that was asked about. The fork server of a command is forked in the same way. Nothing else differs from the command line.
"""

import importlib.util
import json
import os
import signal
import sys
from multiprocessing import forkserver, util

import xtransfer.catalogue  # noqa: F401
import xtransfer.cli
import xtransfer.preload
import xtransfer.runs
import xtransfer.warm

place = importlib.util.spec_from_file_location("chaos_hook", os.path.join(os.path.dirname(os.path.abspath(__file__)), "hook", "sitecustomize.py"))
hook = importlib.util.module_from_spec(place)
place.loader.exec_module(hook)
spawn = util.spawnv_passfds


def fork_server(path, arguments, passed):
    """What multiprocessing starts as a new Python, as a fork of this process; it has nothing open but what it is passed."""
    if "forkserver" not in str(arguments[-1]):
        return spawn(path, arguments, passed)
    pid = os.fork()
    if pid:
        return pid
    try:
        kept = {0, 1, 2, *map(int, passed)}
        for handle in map(int, os.listdir("/proc/self/fd")):
            if handle not in kept:
                try:
                    os.close(handle)
                except OSError:
                    pass
        forkserver._forkserver = forkserver.ForkServer()
        forkserver.main(*passed, [])
    except SystemExit:
        pass
    finally:
        os._exit(0)


def become(asked):
    """Be the command."""
    os.setsid()
    os.environ.clear()
    os.environ.update(asked["environment"])
    for handle, name in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), handle)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hook.begin()
    util.spawnv_passfds = fork_server
    forkserver.ensure_running()  # here and now, while there are no threads; one that replaces a killed one is started in the usual way
    util.spawnv_passfds = spawn
    code = 70
    try:
        code = xtransfer.cli.main(asked["arguments"])
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(code)  # the fork server ends with this process


def main():
    ended = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "arguments" in asked:
            pid = os.fork()
            if pid == 0:
                become(asked)
            print(pid, flush=True)
        else:
            pid = asked["pid"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps(ended.get(pid)), flush=True)


if __name__ == "__main__":
    main()
