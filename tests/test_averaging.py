"""Averages of checkpoints and of runs are the means of the weights that they name, survive interruptions, and are scored as a selection of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import TOYS
from test_joint_training import TRAINED, model_of, trained as trained_once
from test_training import Killed, log_of, weights_equal
from xtransfer.analysis import headline
from xtransfer.averaging import fit_runs
from xtransfer.core import XtransferError
from xtransfer.records import load_records, read_record
from xtransfer.runs import run_study
from xtransfer.studies import Cell, Recipe, Run, Stage, Study
from xtransfer.training import average_tensors, averaged_steps, evaluation_steps, trained_tensors

NAMES = TRAINED[:2]
RECIPE = Recipe(name="averages", learning_rate=3e-3, batch_size=3, max_steps=20, max_length=96, stride=8, evaluations=4, average_checkpoints=3)


def trained(folder, recipe=RECIPE, **others):
    """As in test_joint_training, with as many runs as the recipe says."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("test_joint_training.fit", fit_and_kill)
        return trained_once(folder, NAMES, recipe, **others)


def fit_and_kill(model, data, score_dev, recipe, mixing, seed, folder, corrupt, save_seconds):
    return fit_runs(model, data, score_dev, recipe, mixing, seed, folder, corrupt, save_seconds=save_seconds)


def snapshots(folder, recipe=RECIPE):
    """The weights at every evaluation, taken while they are scored."""
    found = []
    def score():
        found.append({k: v.clone() for k, v in trained_tensors(model).items()})
        return {n: float(len(found)) for n in NAMES}
    model = model_of(NAMES)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("test_joint_training.model_of", lambda *_: model)
        _, fitted = trained(folder, recipe, score=score)
    return found, fitted


def close(one, other):
    return one.keys() == other.keys() and all(torch.allclose(v, other[k], rtol=1e-6, atol=1e-8) for k, v in one.items())


def test_the_mean_of_weights():
    rng = np.random.default_rng(0)
    models = [{"w": torch.tensor(rng.normal(size=5), dtype=torch.float32), "half": torch.tensor(rng.normal(size=3), dtype=torch.bfloat16), "count": torch.tensor(i)} for i in range(5)]
    found = average_tensors(iter(models))
    assert torch.equal(found["w"], torch.stack([m["w"] for m in models]).double().mean(0).float()) and found["half"].dtype == torch.bfloat16 and found["count"] == 4
    assert evaluation_steps(20, RECIPE) == [5, 10, 15, 20] and averaged_steps(20, RECIPE) == (10, 15, 20) and evaluation_steps(2, RECIPE) == [1, 2]


def test_average_is_the_mean_of_the_last_evaluations(toys, tmp_path):
    found, fitted = snapshots(tmp_path)
    assert len(found) == 4 and fitted.selections == ("best", "last", "average") and fitted.facts["averaged_steps"] == [10, 15, 20]
    wanted = {k: torch.stack([s[k] for s in found[1:]]).double().mean(0).float() for k in found[0]}
    assert close(fitted.weights("average"), wanted) and not close(fitted.weights("last"), wanted) and close(fitted.weights("last"), found[-1])
    assert sorted(p.name for p in tmp_path.glob("average-*")) == [f"average-{step:08d}.safetensors" for step in (10, 15, 20)], "only what is needed is kept"
    fitted.load(model := model_of(NAMES), "average")
    assert close(trained_tensors(model), wanted)
    without = trained(tmp_path / "without", replace(RECIPE, average_checkpoints=0))[1]
    assert without.selections == ("best", "last") and close(without.weights("last"), found[-1]) and "averaged_steps" not in without.facts, "averaging changes nothing in the training"


@pytest.mark.parametrize("runs", (1, 3))
def test_averages_survive_interruptions(runs, toys, tmp_path, monkeypatch):
    recipe = replace(RECIPE, average_runs=runs)
    straight, fitted = trained(tmp_path / "straight", recipe)
    for die_at in (3, 9, 0, 5, 17) if runs > 1 else (3, 8, 6):
        with pytest.raises(Killed):
            trained(tmp_path / "broken", recipe, die_at=die_at, monkeypatch=monkeypatch, save_seconds=0)
    again, resumed = trained(tmp_path / "broken", recipe)
    assert weights_equal(straight, again) and fitted.facts == resumed.facts and log_of(tmp_path / "straight") == log_of(tmp_path / "broken")
    for selection in ("best", "last", "average"):
        one, other = fitted.weights(selection), resumed.weights(selection)
        assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def test_runs_begin_alike_and_differ_in_order_and_dropout(toys, tmp_path):
    begun, recipe = [], replace(RECIPE, average_runs=3)
    def note(model, data, score_dev, recipe, mixing, seed, folder, corrupt, ranks, label, **others):
        begun.append((seed, label, {k: v.clone() for k, v in model.state_dict().items()}))
        return real(model, data, score_dev, recipe, mixing, seed, folder, corrupt, ranks=ranks, label=label, **others)
    import xtransfer.averaging
    real = xtransfer.averaging.fit
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(xtransfer.averaging, "fit", note)
        model, fitted = trained(tmp_path / "three", recipe)
    assert len({seed for seed, *_ in begun}) == 3 and [label for _, label, _ in begun] == ["run 1 of 3", "run 2 of 3", "run 3 of 3"]
    assert all(torch.equal(v, begun[0][2][k]) for *_, weights in begun for k, v in weights.items()), "same heads, same encoder"
    alone = trained(tmp_path / "one")[1]
    for selection in ("best", "last", "average"):
        each = [run.weights(selection) for run in fitted.runs]
        assert close(each[0], alone.weights(selection)) and not close(each[1], each[2]), "the first run is what it would be alone"
        assert close(fitted.weights(selection), {k: torch.stack([e[k] for e in each]).double().mean(0).float() for k in each[0]})
    assert close(trained_tensors(model), fitted.weights("last"))
    facts = fitted.facts
    assert len(facts["runs"]) == 3 and facts["tokens"] == sum(run["tokens"] for run in facts["runs"]) and facts["best_dev"] == pytest.approx(np.mean([run["best_dev"] for run in facts["runs"]])) and facts["steps"] == 20
    assert [row["step"] for row in log_of(tmp_path / "three") if "dev" in row] == list(range(5, 61, 5)) and {row["run"] for row in log_of(tmp_path / "three")} == {1, 2, 3}


def test_what_cannot_be_averaged_is_one_sentence(toys, tmp_path):
    for changes, words in (({"average_checkpoints": 5}, "at 5 evaluations .*evaluated 4 times"), ({"average_checkpoints": -1}, "average_checkpoints -1"), ({"average_checkpoints": 0, "selection": "average"}, "say how many"),
                           ({"lora_rank": 2}, "Leave out average_checkpoints or lora_rank"), ({"lora_rank": 2, "average_checkpoints": 0, "average_runs": 2}, "leave out lora_rank"), ({"average_runs": 0}, "average_runs 0")):
        with pytest.raises(XtransferError, match=words) as error:
            trained(tmp_path, replace(RECIPE, **changes))
        assert "\n" not in str(error.value) and not list(tmp_path.glob("state-*")), "said before training begins"


def test_averages_of_a_study(toys, tmp_path):
    """An intermediate stage that hands over an average of checkpoints, then a target that averages checkpoints and runs, through the templates."""
    recipe = replace(RECIPE, dev_limit=10)
    handed = Stage(train=("toy_choice",), recipe=replace(recipe, selection="average", max_steps=8, evaluations=2, average_checkpoints=2), seed=0)
    target = Stage(train=("toy_pair",), score=("toy_pair",), recipe=replace(recipe, max_steps=8, evaluations=2, average_checkpoints=2, average_runs=2), seed=0)
    cell = Cell(arm="choice", target="toy_pair", seed=0, run=Run(backbone="toy-encoder", stages=(handed, target)))
    study = Study(name="averages", profile="smoke", question="?", cells=(cell,), contrasts=())
    result = run_study(study, tmp_path, workers=1, threads=1, declarations=[str(TOYS)], report=lambda line: None)
    assert not result.failed, result.failed
    record = read_record(tmp_path / cell.run.id)
    assert len(record.training["runs"]) == 2 and record.training["averaged_steps"] == [4, 8] and {s.selection for s in record.scores} == {"best", "last", "average"}
    assert {p.name for p in (tmp_path / cell.run.id).iterdir()} == {"record.json", "notebook.ipynb", "log.jsonl", "predictions.parquet"}, "the weights that were needed are gone"
    table = headline(load_records(study, tmp_path), selection="average")
    assert len(table) == 3 and sorted(table["value"]) == sorted(s.value for s in record.scores if s.selection == "average")
    card = (tmp_path / cell.run.parent.id / "checkpoint" / "README.md").read_text()
    assert "average of the weights after 4, 8 of 8 updates" in card
