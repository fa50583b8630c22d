"""`fit` is a function of its arguments: interrupted anywhere it goes on bit for bit, and damage is one sentence."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import xtransfer.states
import xtransfer.training
from test_modeling import model_of
from xtransfer.core import XtransferError
from xtransfer.encoding import encode
from xtransfer.objectives import Corruption
from xtransfer.seals import taken_notes
from xtransfer.states import sound_state
from xtransfer.studies import Mixing, Recipe
from xtransfer.tasks import TASKS, load_examples
from xtransfer.training import Sampler, fit

RECIPE = Recipe(name="test", learning_rate=3e-3, batch_size=3, max_steps=30, max_length=96, stride=8, evaluations=3)
TRAINED = ("toy_pair", "toy_choice", "toy_tags", "toy_qa", "toy_text", "toy_ranked")


class Killed(Exception):
    """Stands for kill -9."""


@pytest.fixture
def data(toys):
    from xtransfer.backbones import BACKBONES

    tokenizer = BACKBONES["toy-encoder"].build_tokenizer()
    return {n: encode(tokenizer, TASKS[n], load_examples(TASKS[n], "en", "train").rows, RECIPE) for n in TRAINED}


def trained(data, folder, recipe=RECIPE, seed=0, scores=None, die_at=None, monkeypatch=None, save_seconds=1e9):
    """Train all formats; `scores` follow from the weights unless they are given; die before the update that follows step `die_at`."""
    model, corrupt = model_of(seed=seed), Corruption(objective="masked", recipe=recipe, vocabulary=22, mask=4, sentinels=(), end=2)

    def score_dev():
        if die_at == "dev":
            raise Killed
        return {n: float(model.heads[n].state_dict()["dense.weight" if n in ("toy_text", "toy_ranked") else "out.weight"].abs().sum()) for n in TRAINED} if scores is None else {n: next(scores) for n in TRAINED[:1]}

    if isinstance(die_at, int):
        def lethal(batch, *_):
            lethal.calls += 1
            if lethal.calls > die_at:
                raise Killed
            return real(batch, *_)
        real, lethal.calls = xtransfer.training.make_batch, 0
        monkeypatch.setattr(xtransfer.training, "make_batch", lethal)
    try:
        torch.manual_seed(np.random.randint(1000))  # what the process did before must not matter
        return model, fit(model, data, score_dev, recipe, Mixing(kind="uniform"), seed, folder, corrupt, save_seconds=save_seconds)
    finally:
        if isinstance(die_at, int):
            monkeypatch.setattr(xtransfer.training, "make_batch", real)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_equal(one, two):
    return all(torch.equal(a, two.state_dict()[k]) for k, a in one.state_dict().items())


@pytest.mark.parametrize("moments", [[1], [0, 7, 4], ["dev", 9, "dev", 3], [29], [5, 5, 5, 5, 5]], ids=str)
def test_interrupted_training_goes_on_bit_for_bit(moments, data, tmp_path, monkeypatch):
    """Every step saves a state, so that an interruption after k more steps resumes there; "dev" dies while scoring."""
    straight, fitted = trained(data, tmp_path / "straight")
    for moment in moments:
        with pytest.raises(Killed):
            trained(data, tmp_path / "broken", die_at=moment, monkeypatch=monkeypatch, save_seconds=0)
    again, resumed = trained(data, tmp_path / "broken")
    assert weights_equal(straight, again)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "broken")
    assert replace(fitted.progress, seconds=0) == replace(resumed.progress, seconds=0)
    for selection in ("best", "last"):
        fitted.load(straight, selection), resumed.load(again, selection)
        assert weights_equal(straight, again)


def test_resumed_from_the_last_evaluation_when_states_are_rare(data, tmp_path, monkeypatch):
    straight, _ = trained(data, tmp_path / "straight")
    with pytest.raises(Killed):
        trained(data, tmp_path / "broken", die_at=17, monkeypatch=monkeypatch)
    assert [p.name for p in sorted((tmp_path / "broken").glob("state-*"))] == ["state-00000010"]
    again, _ = trained(data, tmp_path / "broken")
    assert weights_equal(straight, again) and log_of(tmp_path / "straight") == log_of(tmp_path / "broken")


def test_the_seed_decides_and_nothing_else(data, tmp_path):
    one, two, other = (trained(data, tmp_path / name, seed=seed)[0] for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert weights_equal(one, two) and not weights_equal(one, other)


def test_mixing_shares_and_epochs():
    sizes, recipe = {"a": 100, "b": 300, "c": 1600}, replace(RECIPE, max_steps=6000, batch_size=7)
    for mixing, shares in ((Mixing(kind="uniform"), (1 / 3, 1 / 3, 1 / 3)), (Mixing(kind="proportional"), (0.05, 0.15, 0.8)), (Mixing(kind="capped", cap=300), (1 / 7, 3 / 7, 3 / 7)),
                           (Mixing(kind="temperature", temperature=2), tuple(np.sqrt([1, 3, 16]) / np.sqrt([1, 3, 16]).sum()))):
        sampler = Sampler(sizes, recipe, mixing, seed=1)
        drawn = (sampler.shares > 0).mean(axis=0)
        assert np.abs(drawn - shares).max() < 4 * np.sqrt(0.25 / 6000), "within four standard errors"
    seen = {name: [] for name in sizes}
    for step in range(900):
        [(task, examples)] = sampler.parts(step)
        seen[task].extend(examples.tolist())
    for name, numbers in seen.items():
        whole = len(numbers) // sizes[name] * sizes[name]
        assert all(sorted(numbers[k:k + sizes[name]]) == list(range(sizes[name])) for k in range(0, whole, sizes[name])), "every epoch holds every example once"


def test_frozen_embeddings_stay_and_the_rest_moves(data, tmp_path):
    before = model_of().state_dict()
    after = trained(data, tmp_path, replace(RECIPE, freeze_embeddings=True, max_steps=5, weight_decay=0.1))[0].state_dict()
    tables = [k for k in before if "embeddings" in k and "LayerNorm" not in k]
    assert len(tables) == 3 and all(torch.equal(before[k], after[k]) for k in tables)
    assert not any(torch.equal(before[k], after[k]) for k in before if k.endswith("query.weight"))


def test_best_and_last_are_the_weights_of_their_steps(data, tmp_path):
    model, fitted = trained(data, tmp_path, scores=iter([10.0, 30.0, 20.0]))
    assert (fitted.progress.best_step, fitted.progress.best_dev, fitted.facts["last_dev"]) == (20, 30.0, 20.0) and [d["step"] for d in fitted.progress.dev] == [10, 20, 30]
    last = {k: v.clone() for k, v in model.state_dict().items()}
    fitted.load(model, "best")
    assert not torch.equal(last["heads.toy_tags.out.weight"], model.state_dict()["heads.toy_tags.out.weight"])
    fitted.load(model, "last")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in last.items())
    assert not list(tmp_path.glob("best-00000010*")), "only the best weights are kept"


def test_masked_text_does_not_decide_beside_supervised_tasks(data, tmp_path):
    _, fitted = trained(data, tmp_path)
    entry = fitted.progress.dev[0]
    assert entry["mean"] == pytest.approx(np.mean([v for n, v in entry["tasks"].items() if n != "toy_text"]))


def test_a_loss_that_is_not_finite_is_one_sentence(data, tmp_path):
    with pytest.raises(XtransferError, match="not finite at step .* learning rate"):
        trained(data, tmp_path, replace(RECIPE, learning_rate=1e30, max_grad_norm=1e30))


DAMAGES = {
    "tensors cut short": lambda folder, state: os.truncate(state / "tensors.safetensors", 1000), "tensors with another bit": lambda folder, state: flip(state / "tensors.safetensors"), "no tensors": lambda folder, state: (state / "tensors.safetensors").unlink(),
    "half of the progress": lambda folder, state: (state / "progress.json").write_text("{"), "progress with another bit": lambda folder, state: flip(state / "progress.json"), "no fingerprints to read": lambda folder, state: (state / "checksums.json").write_bytes(b"\x00"),
    "a seal of nothing": lambda folder, state: (flip(state / "tensors.safetensors"), (state / "checksums.json").write_text("{}")),
    "best weights with another bit": lambda folder, state: flip(next(folder.glob("best-*"))), "no best weights": lambda folder, state: next(folder.glob("best-*")).unlink()}


def flip(path):
    content = bytearray(path.read_bytes())
    content[int(0.8 * len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_not_taken_and_comes_to_the_same(damage, data, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        trained(data, tmp_path / "broken", die_at=13, monkeypatch=monkeypatch, save_seconds=0)
    DAMAGES[damage](tmp_path / "broken", next((tmp_path / "broken").glob("state-*")))
    (straight, whole), (again, resumed) = trained(data, tmp_path / "straight"), trained(data, tmp_path / "broken")
    (said,) = taken_notes(tmp_path / "broken")
    assert "is damaged" in said and said.endswith("trained anew.")
    assert weights_equal(straight, again) and whole.facts == resumed.facts and (tmp_path / "straight" / "log.jsonl").read_bytes() == (tmp_path / "broken" / "log.jsonl").read_bytes()


def test_a_state_of_another_run_is_not_taken(data, tmp_path, monkeypatch):
    """Two runs of the same shape whose folders were given each other's name; in a folder of one's own nobody asks."""
    one, other = (tmp_path / f".work-{name}" / "training" for name in ("one", "other"))
    for seed, folder in enumerate((one, other)):
        with pytest.raises(Killed):
            trained(data, folder, seed=seed, die_at=13, monkeypatch=monkeypatch, save_seconds=0)
    shutil.copytree(one, tmp_path / "mine")
    assert sound_state(one) and sound_state(other) and sound_state(tmp_path / "mine")
    shutil.rmtree(one)
    other.rename(one)
    straight, again = trained(data, tmp_path / "straight")[0], trained(data, one)[0]
    (said,) = taken_notes(one)
    assert "checksums.json is that of other/training, not of one/training" in said and said.endswith("trained anew.") and weights_equal(straight, again)


@pytest.mark.parametrize("damage", ("gone", "garbage", "half a line"))
def test_the_log_comes_from_the_state(damage, data, tmp_path, monkeypatch):
    """A process that is killed while it begins its log anew, or a damaged file, costs no line."""
    with pytest.raises(Killed):
        trained(data, tmp_path / "broken", die_at=13, monkeypatch=monkeypatch, save_seconds=0)
    log = tmp_path / "broken" / "log.jsonl"
    log.unlink() if damage == "gone" else log.write_bytes(bytes(range(256)) if damage == "garbage" else log.read_bytes() + b'{"step": 13, "tasks": {"a": 1}')
    trained(data, tmp_path / "straight"), trained(data, tmp_path / "broken")
    assert log.read_bytes() == (tmp_path / "straight" / "log.jsonl").read_bytes()


def test_a_state_of_another_model_is_one_sentence(data, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        trained(data, tmp_path, die_at=3, monkeypatch=monkeypatch, save_seconds=0)
    data = {n: data[n] for n in TRAINED}
    monkeypatch.setitem(TASKS._entries, "toy_pair", replace(TASKS["toy_pair"], labels=("yes", "no", "perhaps")))
    with pytest.raises(XtransferError, match="delete that folder") as error:
        trained(data, tmp_path)
    assert "\n" not in str(error.value)


def test_a_full_disk_keeps_the_last_state(data, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        trained(data, tmp_path, die_at=3, monkeypatch=monkeypatch, save_seconds=0)
    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(xtransfer.states, "save_file", full)
        with pytest.raises(XtransferError, match="No space left"):
            trained(data, tmp_path, save_seconds=0)
    straight, again = trained(data, tmp_path / "other")[0], trained(data, tmp_path)[0]
    assert weights_equal(straight, again)
