"""What the tests share: toy declarations, the command line as a user sees it, and a hub on loopback."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
CACHE = tempfile.TemporaryDirectory(prefix="xtransfer-tests-")  # of tokens and rows, for these tests and the processes that they start; the user's own stays as it is
os.environ["XTRANSFER_CACHE"] = CACHE.name
os.environ.setdefault("XTRANSFER_HUB_WAIT", "0.01")  # where no hub answers, tests do not wait for it

import pytest
import torch

TOYS, REAL = Path(__file__).with_name("toys.py"), Path(__file__).with_name("real.py")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_settings():
    """The package's variables are after a test what they were before, whoever has set them: the test or the package."""
    before = {name: value for name, value in os.environ.items() if name.startswith("XTRANSFER_")}
    yield
    for name in [name for name in os.environ if name.startswith("XTRANSFER_") and name not in before]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def given_machine():
    """Plans take a given machine for this one, so that no test waits until its speed is measured."""
    from xtransfer.core import digest, write_json
    from xtransfer.cost import MACHINES_NAME, machine_key
    from xtransfer.runs import gpu_count, threads_of_run, worker_count
    from xtransfer.seals import with_checksum

    numbers = {"update_seconds": 1e-3, "layer_seconds": 1e-3, "weights_per_second": 1e9, "rates": {"float32": [[64, 1e10], [1024, 4e10]]}, "token_seconds": 1e-6, "python_seconds": 1.5e-3, "disk_bandwidth": 1e9}
    key = machine_key(threads_of_run(worker_count()), worker_count(), gpu_count())
    write_json(Path(CACHE.name) / MACHINES_NAME, with_checksum({digest(key): {"key": key, "machine": numbers}}))
    return numbers


@pytest.fixture
def toys():
    """The toy declarations, registered for one test."""
    import xtransfer.catalogue  # noqa: F401  what it registers stays
    from xtransfer.backbones import BACKBONES
    from xtransfer.studies import STUDIES, load_declarations
    from xtransfer.tasks import TASKS

    before = [(registry, dict(registry)) for registry in (TASKS, BACKBONES, STUDIES)]
    load_declarations([str(TOYS)])
    yield TOYS
    for registry, entries in before:
        registry._entries = entries


MAIN = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from xtransfer.cli import main; sys.exit(main())"


def command(*arguments, environment=None):
    """The command line in a process group of its own, as an open process; it hears Ctrl-C even where the tests themselves run in the background, whose children ignore it."""
    around = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")} | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.Popen([sys.executable, "-c", MAIN, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=around, start_new_session=True)


def finished(process, timeout=300):
    """Exit code, standard output and standard error of a process; nothing of its group survives a timeout."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def xtransfer(*arguments, timeout=300, environment=None):
    """Run the command line to its end."""
    return finished(command(*arguments, environment=environment), timeout)


def hashes(folder):
    """Content of every file below a folder, locks excepted."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file() and ".locks" not in p.parts}


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """A processor on which bfloat16 is faster, as far as the package can see."""
    monkeypatch.setattr("xtransfer.adapters.bfloat16_gain", lambda device: 2.0)


@pytest.fixture(scope="session")
def toy_outputs(tmp_path_factory):
    """The toy study's smoke profile, run once and undisturbed; tests only read it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out, err = xtransfer("run", "toys", "--profile", "smoke", "--declare", TOYS, "--outputs", folder, "--workers", 1, "--threads", 1)
    assert code == 0, out + err
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Environment of a process that sees a hub on loopback and an empty cache.

    XTRANSFER_HUB_SERVER names a script that serves a hub and prints HF_ENDPOINT=... first; with XTRANSFER_REQUIRE_HUB=1 its absence is a failure.
    """
    script = os.environ.get("XTRANSFER_HUB_SERVER")
    if not script:
        if os.environ.get("XTRANSFER_REQUIRE_HUB") == "1":
            pytest.fail("XTRANSFER_REQUIRE_HUB=1, but XTRANSFER_HUB_SERVER names no hub server")
        pytest.skip("XTRANSFER_HUB_SERVER names no hub server")
    server = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    try:
        name, _, endpoint = server.stdout.readline().strip().partition("=")
        assert name == "HF_ENDPOINT" and endpoint.startswith("http://"), f"the hub server {script} printed {name!r}"
        yield {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path_factory.mktemp("hf-home")), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_OFFLINE": "0", "HF_HUB_OFFLINE": "0"}
    finally:
        server.kill()
        server.wait()
