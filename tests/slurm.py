"""A real Slurm of several nodes on this machine, with stand-in GPUs: a controller and one slurmd per node.

    python tests/slurm.py start    # as root; needs the packages slurm-wlm and munge; writes /etc/slurm
    python tests/slurm.py stop

A stand-in GPU is a file that Slurm hands out to one job at a time, as CUDA_VISIBLE_DEVICES says; torch sees none. The nodes share the machine's cores, so this
proves where jobs run and what they get, not how fast.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

CONF = Path("/etc/slurm")  # Snakemake's plugin forgets SLURM_CONF, so that nothing else will do
FILES = ("slurm.conf", "gres.conf")
MARK = "# written by tests/slurm.py for "  # and the folder of its logs and states
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "sinfo")
PORT, CORES, MEMORY = 17010, 4, 64_000  # the first port; of each node: cores, and MB, both only counted
SPOOL = Path("/var/spool/xtransfer-slurm")  # short, because a socket's path may not be longer than 108 characters
SLURMD_TIMEOUT = 10  # seconds after which a silent node is taken for dead


class SlurmError(Exception):
    """Why there is no cluster, as one sentence."""


def missing() -> str:
    """What this machine lacks for a Slurm of its own, as a sentence; "" when nothing."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"Slurm cannot be started here: {', '.join(absent)} not found; install the packages slurm-wlm and munge."
    if os.geteuid() or not os.access("/etc", os.W_OK):
        return "Slurm cannot be started here: that takes root, who may write /etc/slurm."
    conf = CONF / "slurm.conf"
    if conf.exists() and not conf.read_text().startswith(MARK):
        return f"Slurm cannot be started here: {conf} belongs to another cluster."
    return ""


def alive(pid_file: Path) -> int:
    """The process that a pid file names, 0 when it does not live."""
    try:
        pid = int(pid_file.read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return 0
    return pid if state != "Z" else 0


def running() -> Path | None:
    """The folder of the cluster that runs here."""
    conf = CONF / "slurm.conf"
    first = conf.read_text().splitlines()[0] if conf.exists() else ""
    folder = Path(first.removeprefix(MARK)) if first.startswith(MARK) else None
    return folder if folder and any(alive(p) for p in folder.glob("*.pid")) else None


def said(*command: str) -> str:
    """What a command prints; "" when it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def waited(condition, seconds: float) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def configure(folder: Path, nodes: list[str], gpus: int) -> None:
    """Write Slurm's files for these nodes."""
    host = socket.gethostname()
    lines = [f"{MARK}{folder}", "ClusterName=here", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={PORT}", "SlurmUser=root", "AuthType=auth/munge", "CredType=cred/munge",
             "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core_Memory", "SlurmdParameters=config_overrides",
             "GresTypes=gpu", "ReturnToService=2", f"SlurmdTimeout={SLURMD_TIMEOUT}", "JobRequeue=1", "MinJobAge=600", "KillWait=5", "SchedulerParameters=sched_interval=2,batch_sched_delay=1",
             "AccountingStorageType=accounting_storage/none", "JobAcctGatherType=jobacct_gather/none", "MpiDefault=none",
             f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={SPOOL}/%n", f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd-%n.pid",
             f"SlurmctldLogFile={folder}/slurmctld.log", f"SlurmdLogFile={folder}/slurmd-%n.log"]
    lines += [f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={PORT + 1 + i} CPUs={CORES} CoresPerSocket={CORES} RealMemory={MEMORY} Gres=gpu:{gpus} State=UNKNOWN" for i, n in enumerate(nodes)]
    lines += [f"PartitionName=main Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP"]
    CONF.mkdir(exist_ok=True)
    (CONF / "slurm.conf").write_text("\n".join(lines) + "\n")
    (CONF / "gres.conf").write_text("".join(f"NodeName={n} Name=gpu File=/dev/tty[{gpus * i}-{gpus * (i + 1) - 1}]\n" for i, n in enumerate(nodes)))


def start(folder: str | Path, nodes: int = 2, gpus: int = 2) -> list[str]:
    """Start a cluster whose logs and states lie in a folder, and return its nodes' names.

    Raises: SlurmError when it cannot be started.
    """
    folder = Path(folder).resolve()
    if reason := missing():
        raise SlurmError(reason)
    if there := running():
        raise SlurmError(f"a Slurm already runs here, of {there}; stop it with: python tests/slurm.py stop.")
    names = [f"n{i + 1}" for i in range(nodes)]
    shutil.rmtree(SPOOL, ignore_errors=True)
    for place in (folder / "state", *(SPOOL / name for name in names)):
        place.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "0755", "/run/munge"], check=True)
        subprocess.run(["runuser", "-u", "munge", "--", "munged", "--pid-file", "/run/munge/munged.pid"], check=True)
    configure(folder, names, gpus)
    subprocess.run(["slurmctld"], check=True)
    for name in names:
        start_node(name)
    if not waited(lambda: ready() == names, 30):
        told = (folder / "slurmctld.log").read_text()[-2000:]
        stop()
        raise SlurmError(f"Slurm's nodes did not come up in 30 s; the controller's last words are: {told}")
    return names


def ready() -> list[str]:
    """The nodes that take jobs."""
    return sorted(line.split()[0] for line in said("sinfo", "-N", "-h", "-o", "%N %t").splitlines() if line.split()[-1] in ("idle", "mix", "alloc"))


def start_node(name: str) -> None:
    """Start the slurmd of a node; after a death of the node, too."""
    subprocess.run(["slurmd", "-N", name], check=True)


def processes() -> dict[int, tuple[int, str, str]]:
    """Processes by id: parent, command, and the node of the job that they belong to."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                around = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            node = next((v[len(b"SLURMD_NODENAME="):].decode() for v in around if v.startswith(b"SLURMD_NODENAME=")), "")
            found[int(entry.name)] = (parent, command, node)
    return found


def of_node(name: str, folder: Path) -> set[int]:
    """The processes of a node: its slurmd, its job steps, and all of their descendants."""
    listed = processes()
    mine = {pid for pid, (_, _, node) in listed.items() if node == name}
    mine |= {listed[pid][0] for pid in mine if listed.get(listed[pid][0], (0, "", ""))[1].startswith("slurmstepd")}
    mine |= {pid for pid in [alive(folder / f"slurmd-{name}.pid")] if pid}
    grown = True
    while grown:
        more = {pid for pid, (parent, _, _) in listed.items() if parent in mine} - mine
        mine, grown = mine | more, bool(more)
    return mine - {os.getpid()}


def kill_node(name: str, folder: Path | None = None) -> int:
    """Let a node die at once: its slurmd and everything that it runs; the number of processes that were killed."""
    folder, killed = folder or running(), 0
    for _ in range(5):  # what was being started while it died
        for pid in of_node(name, folder):
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except OSError:
                pass
        time.sleep(0.05)
    return killed


def stop() -> None:
    """Stop the cluster with all its jobs, and remove its files from /etc/slurm."""
    folder = running()
    if folder:
        subprocess.run(["scancel", "--user", "root"], capture_output=True, timeout=20)
        subprocess.run(["scontrol", "shutdown"], capture_output=True, timeout=20)
        waited(lambda: not running(), 10)
        for name in sorted(path.name for path in SPOOL.glob("*")):
            kill_node(name, folder)
        for path in folder.glob("*.pid"):
            if pid := alive(path):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(SPOOL, ignore_errors=True)
    if (CONF / "slurm.conf").exists() and (CONF / "slurm.conf").read_text().startswith(MARK):
        for name in FILES:
            (CONF / name).unlink(missing_ok=True)
    if munged := alive(Path("/run/munge/munged.pid")):
        os.kill(munged, signal.SIGTERM)


@contextmanager
def cluster(folder: str | Path, nodes: int = 2, gpus: int = 2):
    """A cluster for a while; there is one on a machine at a time, and others wait for it."""
    lock = FileLock("/run/xtransfer-slurm.lock")
    try:
        lock.acquire(timeout=120)
    except Timeout:
        raise SlurmError("another process has used this machine's Slurm for two minutes.") from None
    try:
        yield start(folder, nodes, gpus)
    finally:
        try:
            stop()
        finally:
            lock.release()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "stop", "status"))
    parser.add_argument("--folder", help="for logs and states (default: a new one)")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2, help="stand-in GPUs of each node")
    asked = parser.parse_args()
    try:
        if asked.what == "start":
            folder = asked.folder or tempfile.mkdtemp(prefix="slurm-")
            print(f"nodes {', '.join(start(folder, asked.nodes, asked.gpus))}; logs are in {folder}")
        elif asked.what == "stop":
            stop()
        else:
            print(f"{running() or 'no cluster'}\n{said('sinfo') if running() else ''}")
    except SlurmError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
