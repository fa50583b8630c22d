"""Several processes train as one does: the same loss curves for every format, resumed bit for bit, and nothing left behind when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import together
from conftest import TOYS, finished
from test_runs import gone
from xtransfer.core import XtransferError
from xtransfer.distributed import train
from xtransfer.encoding import make_batch
from xtransfer.ranks import Ranks, check_ranks, cut, meet
from xtransfer.records import NOTEBOOK_NAME
from xtransfer.runs import execute, gpus_of_worker, worker_count
from xtransfer.steps import Step
from xtransfer.studies import STUDIES
from xtransfer.tasks import TASKS, load_examples


def losses(folder):
    return [row for line in (folder / "log.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of what two processes came to."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", together.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank" in line) or done.stderr[-3000:]
    return folder


def states(folder):
    """Tensors of the last state and of the best weights."""
    return {**load_file(max(folder.glob("state-*")) / "tensors.safetensors"), **{f"best.{k}": v for p in folder.glob("best-*") for k, v in load_file(p).items()}}


@pytest.mark.parametrize("case", [*together.EQUAL, *(f"{case} sharded" for case in together.SHARDED)])
def test_two_processes_have_the_loss_curve_of_one(case, pair, tmp_path):
    fitted = together.trained(case.removesuffix(" sharded"), tmp_path)
    alone, two = losses(tmp_path), losses(pair / case)
    assert [(r["step"], r["tokens"], r["learning_rate"]) for r in alone] == [(r["step"], r["tokens"], r["learning_rate"]) for r in two] and len(alone) == fitted.steps
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in alone], rtol=2e-6, atol=1e-7)
    one, other = states(tmp_path), states(pair / case)
    assert one.keys() == other.keys() and all(one[k].shape == v.shape and (v.is_floating_point() <= torch.allclose(v, one[k], rtol=1e-3, atol=1e-5)) for k, v in other.items())


@pytest.mark.parametrize("case", ("dropout", "mixture sharded"))
def test_interrupted_training_goes_on_bit_for_bit(case, pair):
    one, other = states(pair / case), states(pair / f"{case} interrupted")
    assert (pair / case / "log.jsonl").read_text() == (pair / f"{case} interrupted" / "log.jsonl").read_text()
    assert all(torch.equal(v, other[k]) for k, v in one.items() if not k.startswith("generator")) and one.keys() == other.keys()


@pytest.mark.parametrize("count", (1, 2, 3, 7))
def test_shares_are_the_batch(count, toys):
    """Every sequence, token and target of a batch is in one share, beside those that it belongs to."""
    for name in ("toy_pair", "toy_choice", "toy_tags", "toy_qa", "toy_text", "toy_ranked"):
        encoded = together.encode(together.TOY.build_tokenizer(), TASKS[name], load_examples(TASKS[name], "en", "train", 30).rows, together.RECIPE)
        chosen = np.array([7, 3, 11, 5, 2])
        whole, seen = make_batch(encoded, chosen), []
        for rank in range(count):
            places = np.arange(rank, 5, count)
            part = cut(whole, places, encoded.example_targets)
            alone = make_batch(encoded, chosen[places]) if len(places) else part
            assert part.lengths == alone.lengths and part.examples == len(places) and (part.sequence == alone.sequence).all()
            for one, other in ((part.input_ids, alone.input_ids), (part.example, alone.example), (part.within, alone.within), *((part.targets[k], alone.targets[k]) for k in whole.targets)):
                assert torch.equal(one, other)
            seen += part.sequence.tolist()
        assert sorted(seen) == sorted(whole.sequence.tolist())


PARAMETERS = {"backbone": "toy-encoder", "parent": "", "train": ["toy_tags", "toy_text"], "score": [], "score_splits": ["test"], "languages": [], "mixing": {}, "seed": 0, "train_limit": 0, "score_limit": 0, "threads": 1,
              "processes": 2, "sharding": "", "keep_checkpoint": False, "declarations": [str(TOYS)],
              "recipe": {"name": "ranks", "learning_rate": 3e-3, "batch_size": 4, "max_steps": 240, "max_length": 96, "evaluations": 8, "dev_limit": 10}}
NOTEBOOK = "import sys, json; from xtransfer.steps import Step; from xtransfer.distributed import train; train(Step(sys.argv[1], **json.loads(sys.argv[2])))"


def trained(folder, **changes):
    """What the training cell does, in this process."""
    folder.mkdir(exist_ok=True)
    step = Step(folder, **PARAMETERS | changes)
    try:
        return train(step)
    finally:
        step._lock.lock.release()


def ranks_of(folder):
    """The processes that train below a folder, by rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(folder)) and "-m" in (line := process.cmdline()) and "xtransfer.distributed" in line and "RANK" in (around := process.environ()):
                found[int(around["RANK"])] = process.pid
        except psutil.Error:
            pass
    return found


def kill(folder, choose):
    """Wait until a training has saved a state, then kill one of the processes below its folder."""
    end = time.monotonic() + 120
    while not list((folder / "training").glob("state-*")) and time.monotonic() < end:
        time.sleep(0.02)
    found = ranks_of(folder)
    assert set(found) == {0, 1}
    os.kill(choose(found), signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    trained(folder)
    return folder


def test_a_killed_rank_is_one_sentence_and_training_goes_on_bit_for_bit(undisturbed, tmp_path):
    killer = threading.Thread(target=kill, args=(tmp_path, lambda found: found[1]))
    killer.start()
    with pytest.raises(XtransferError, match=r"^rank 1 of 2 was killed \(SIGKILL\); training goes on from its last state when the same is asked again\. [^\n]*ranks.log\.$"):
        trained(tmp_path)
    killer.join()
    assert gone(tmp_path)
    fitted = trained(tmp_path)
    assert fitted.steps == 240 and (tmp_path / "training" / "log.jsonl").read_text() == (undisturbed / "training" / "log.jsonl").read_text()
    one, two = states(undisturbed / "training"), states(tmp_path / "training")
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items() if not k.startswith("generator"))
    assert trained(tmp_path).progress == fitted.progress, "what is finished is not started again"


def test_a_killed_notebook_leaves_no_rank(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", NOTEBOOK, str(tmp_path), json.dumps(PARAMETERS)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path, start_new_session=True)
    kill(tmp_path, lambda found: process.pid)
    assert finished(process)[0] == -signal.SIGKILL and gone(tmp_path)


def test_what_a_rank_says_is_the_sentence(tmp_path):
    with pytest.raises(XtransferError, match="^the loss of task toy_[a-z]+ is not finite at step .*; lower the learning rate"):
        trained(tmp_path, recipe=PARAMETERS["recipe"] | {"learning_rate": 1e30, "max_grad_norm": 1e30})


def test_started_by_hand_the_number_of_processes_has_to_agree(tmp_path):
    (tmp_path / "parameters.json").write_text(json.dumps(PARAMETERS | {"processes": 3}))
    done = subprocess.run([sys.executable, "-m", "xtransfer.distributed", str(tmp_path / "parameters.json")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr == "xtransfer: 3 processes were asked for, and this is one of 1; start them with `torchrun --nproc_per_node 3`.\n"


def test_what_accelerate_would_do_silently_is_refused(monkeypatch):
    for action, words in ((lambda: meet(2), "one of 1"), (lambda: meet(2, "full"), "among several GPUs"), (lambda: check_ranks(2, "ful", 2), "did you mean 'full'"), (lambda: check_ranks(0, "", 0), "from 1"), (lambda: check_ranks(3, "", 2), "shows 2")):
        with pytest.raises(XtransferError, match=words):
            action()
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO, device=torch.device("cpu")))
    with pytest.raises(XtransferError, match="2 processes of the type MULTI_CPU on cpu were asked for, but Accelerate made 1 of the type NO"):
        meet(2)
    with pytest.raises(XtransferError, match="1 process was asked for, and this is one of 2"):
        meet()


def test_perturbation_is_refused(toys):
    with pytest.raises(XtransferError, match="train it in one process instead of 2"):
        Ranks.prepare(SimpleNamespace(count=2, sharding=""), None, None, together.replace(together.RECIPE, perturbation="noise"))


def test_a_record_says_how_many_processes_it_took(tmp_path, toys):
    run = STUDIES["toys"].build("smoke").plan()[0]
    record = execute(run, tmp_path, declarations=[str(TOYS)], processes=2)
    assert record.status == "complete" and record.parameters["processes"] == 2 == record.environment["processes"] and record.digest == run.digest
    assert {(d["task"], d["split"]) for d in record.data} == {("toy_text", "train"), ("toy_text", "dev")} and record.training["steps"] == 40 and record.seconds["start"] > 0
    notebook = json.loads((tmp_path / run.id / NOTEBOOK_NAME).read_text())
    assert "step 40 of 40" in json.dumps(notebook["cells"])
    assert not {"parameters.json", "training"} & {p.name for p in (tmp_path / run.id).iterdir()}


@pytest.mark.parametrize(("visible", "worker", "processes", "shown"), [("0,1,2,3", 1, 2, "2,3"), ("4,5", 0, 2, "4,5"), ("0,1", 3, 1, "1")])
def test_each_run_has_gpus_of_its_own(visible, worker, processes, shown, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of_worker(worker, processes) == {"CUDA_VISIBLE_DEVICES": shown} and worker_count(2) == len(visible.split(",")) // 2


def test_two_processes_train_the_same_rows_of_the_vocabulary(tmp_path, monkeypatch):
    """The notebook's own process, which has trained nothing, puts the full table together from what the ranks wrote; rows that nothing reads have decayed."""
    monkeypatch.setattr("xtransfer.vocabulary.FEWEST", 1)  # as the declaration does in the ranks: the toy vocabulary is small
    trimming = tmp_path / "trimming.py"
    trimming.write_text("import xtransfer.vocabulary\nxtransfer.vocabulary.FEWEST = 1\n")
    changes = {"train": ["toy_pair"], "declarations": [str(TOYS), str(trimming)], "recipe": PARAMETERS["recipe"] | {"max_steps": 6, "evaluations": 2, "weight_decay": 0.3, "average_checkpoints": 2}}
    one, two = (trained(tmp_path / str(count), processes=count, **changes) for count in (1, 2))
    assert one.vocabulary == two.vocabulary and one.vocabulary["trained"] < one.vocabulary["of"] == 22 and torch.equal(one.trimmed.rows, two.trimmed.rows)
    unseen = np.setdiff1d(np.arange(22), one.trimmed.rows)
    for selection in ("last", "average"):
        alone, together_ = (fitted.weights(selection)[one.trimmed.name] for fitted in (one, two))
        assert torch.equal(alone[unseen], together_[unseen]) and not torch.equal(alone[unseen], one.trimmed.before[unseen])
        assert alone.shape == together_.shape == (22, alone.shape[1])
