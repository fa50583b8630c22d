"""Several tasks in one update: the gradient is that of the weighted loss, projection is Algorithm 1 of arXiv 2001.06782, and everything resumes bit for bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import xtransfer.training
from conftest import TOYS
from test_training import Killed, log_of, weights_equal
from xtransfer.backbones import BACKBONES
from xtransfer.core import XtransferError
from xtransfer.encoding import encode, make_batch
from xtransfer.gradients import TaskGradients, draw_shares, expected_shares, mean_cosines, new_agreement, project_conflicts
from xtransfer.modeling import StageModel, load_encoder
from xtransfer.objectives import Corruption
from xtransfer.ranks import Ranks
from xtransfer.records import gradient_cosines, read_record
from xtransfer.runs import run_study
from xtransfer.steps import deciding_tasks
from xtransfer.studies import Cell, Contrast, Mixing, Recipe, Run, Stage, Study
from xtransfer.tasks import TASKS, load_examples
from xtransfer.training import Sampler, fit

TRAINED = ("toy_pair", "toy_choice", "toy_tags", "toy_qa", "toy_text", "toy_ranked")
RECIPE = Recipe(name="joint", learning_rate=3e-3, batch_size=9, max_steps=12, max_length=96, stride=8, evaluations=3, gradients="mean")
HEADS = {"toy_text": "dense.weight", "toy_ranked": "dense.weight"}


def encoded(names):
    tokenizer = BACKBONES["toy-encoder"].build_tokenizer()
    return {n: encode(tokenizer, TASKS[n], load_examples(TASKS[n], "en", "train").rows, RECIPE) for n in names}


def model_of(names, seed=0, still=False):
    backbone = BACKBONES["toy-encoder"]
    if still:
        backbone = replace(backbone, config=dict(backbone.config) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    return StageModel(load_encoder(backbone, backbone.build_tokenizer(), seed), [TASKS[n] for n in names], seed, backbone)


CORRUPT = Corruption(objective="masked", recipe=RECIPE, vocabulary=22, mask=4, sentinels=(), end=2)


def trained(folder, names=TRAINED, recipe=RECIPE, seed=0, die_at=None, monkeypatch=None, still=False, score=None, **others):
    """Train the named tasks; dies when `die_at` batches were made."""
    model, data = model_of(names, seed, still), encoded(names)
    def score_dev():
        return {n: float(model.heads[n].state_dict()[HEADS.get(n, "out.weight")].abs().sum()) for n in names}
    with monkeypatch.context() if monkeypatch else pytest.MonkeyPatch.context() as patched:
        if die_at is not None:
            left, real = iter(range(die_at)), xtransfer.training.make_batch
            def lethal(*given):
                if next(left, None) is None:
                    raise Killed
                return real(*given)
            patched.setattr(xtransfer.training, "make_batch", lethal)
        torch.manual_seed(np.random.randint(1000))  # what the process did before must not matter
        return model, fit(model, data, score or score_dev, recipe, Mixing(kind="uniform"), seed, folder, CORRUPT, **({"save_seconds": 1e9} | others))


# Shares of a batch


@pytest.mark.parametrize(("batch", "probabilities"), [(16, (0.03, 0.27, 0.7)), (9, (1 / 9,) * 9), (32, (0.001, 0.002, 0.997)), (10, (0.3, 0.3, 0.4)), (7, (1.0,)), (12, (0.08, 0.085, 0.835))], ids=str)
def test_shares_are_the_batch_divided_by_the_mixture(batch, probabilities):
    expected, drawn = expected_shares(batch, probabilities), draw_shares(batch, probabilities, 6000, 1)
    wanted = batch * np.array(probabilities)
    assert drawn.min() >= 1 and (drawn.sum(1) == batch).all() and np.abs(drawn - expected).max() < 1, "the whole part is always there, the rest is drawn by lot"
    assert np.abs(drawn.mean(0) - expected).max() < 4 * np.sqrt(0.25 / 6000), "within four standard errors"
    assert np.allclose(expected, wanted) if wanted.min() >= 1 else np.allclose(expected[wanted < 1], 1) and np.ptp((expected / wanted)[expected > 1]) < 1e-9
    assert np.array_equal(drawn[:100], draw_shares(batch, probabilities, 100, 1)), "a function of the seed and the step, whatever the number of steps"


def test_every_epoch_of_every_task_holds_every_example_once():
    sizes = {"a": 100, "b": 37, "c": 1600}
    sampler, seen = Sampler(sizes, replace(RECIPE, max_steps=900), Mixing(kind="temperature"), 3), {name: [] for name in ("a", "b", "c")}
    for step in range(900):
        parts = sampler.parts(step)
        assert [task for task, _ in parts] == list(sizes) and sum(len(numbers) for _, numbers in parts) == 9
        for task, numbers in parts:
            seen[task].extend(numbers.tolist())
    for name, numbers in seen.items():
        whole = len(numbers) // sizes[name] * sizes[name]
        assert whole and all(sorted(numbers[k:k + sizes[name]]) == list(range(sizes[name])) for k in range(0, whole, sizes[name]))


def test_a_budget_is_equal_in_updates_and_examples():
    plain, shared = (Sampler({"a": 50, "b": 70}, replace(RECIPE, max_steps=None, gradients=gradients), Mixing(), 0) for gradients in ("one_task", "mean"))
    assert plain.steps == shared.steps and plain.shares.sum() == shared.shares.sum() == plain.steps * 9


# The gradient of an update


def test_one_task_is_one_task_whatever_the_gradients(toys, tmp_path):
    models = [trained(tmp_path / kind, TRAINED[:1], replace(RECIPE, gradients=kind))[0] for kind in ("one_task", "mean", "pcgrad")]
    assert weights_equal(models[0], models[1]) and weights_equal(models[0], models[2])
    assert log_of(tmp_path / "one_task") == log_of(tmp_path / "mean") == log_of(tmp_path / "pcgrad")


def gradients_of(names, kind, tmp_path, monkeypatch):
    """The gradients that the first update leaves for the optimizer, and those of each task's loss alone, computed plainly."""
    found = {}
    def keep(*given):
        found.update({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
        raise Killed
    recipe, data = replace(RECIPE, gradients=kind), encoded(names)
    model = model_of(names, still=True)
    with monkeypatch.context() as patched:
        patched.setattr("xtransfer.training.clipped_step", keep)
        with pytest.raises(Killed):
            fit(model, data, dict, recipe, Mixing(kind="uniform"), 0, tmp_path, CORRUPT)
    plain, other = {}, model_of(names, still=True).train()
    for task, numbers in Sampler({n: d.examples for n, d in data.items()}, recipe, Mixing(kind="uniform"), 0).parts(0):
        batch = make_batch(data[task], numbers)
        batch = CORRUPT(batch, xtransfer.training.derive_seed(0, "mask", 0)) if task == "toy_text" else batch
        other.zero_grad()
        (other(batch, task)[0] * len(numbers) / 9).backward()
        plain[task] = {k: p.grad.clone() for k, p in other.named_parameters() if p.grad is not None}
    return found, plain


def test_mean_is_the_gradient_of_the_weighted_loss(toys, tmp_path, monkeypatch):
    found, plain = gradients_of(TRAINED, "mean", tmp_path, monkeypatch)
    wanted = {k: sum(part[k] for part in plain.values() if k in part) for k in found}
    assert found.keys() == {k for part in plain.values() for k in part} and len(plain) == len(TRAINED)
    assert max((found[k] - wanted[k]).abs().max() for k in found) < 1e-6 < 1e-3 < max(v.abs().max() for v in found.values())


def algorithm_1(gradients, orders):
    """PCGrad on flat gradients, as the paper writes it."""
    found = [g.copy() for g in gradients]
    for i, own in enumerate(found):
        for j in orders[i]:
            if j != i and own @ gradients[j] < 0:
                own -= own @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
    return found


@pytest.mark.parametrize("tasks", (2, 3, 7))
def test_projection_is_algorithm_1(tasks):
    rng = np.random.default_rng(tasks)
    for trial in range(20):
        gradients = rng.normal(size=(tasks, 9)) + rng.normal() * 0.3
        order = np.random.default_rng(trial)  # the order that the seed stands for
        orders = [order.permutation(tasks) for _ in range(tasks)]
        np.testing.assert_allclose(project_conflicts(gradients @ gradients.T, trial) @ gradients, algorithm_1(gradients, orders), rtol=1e-9, atol=1e-12)


def test_two_gradients_by_hand():
    model = torch.nn.Module()
    model.encoder, parts = torch.nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(1)}), ((1.0, 2.0, 0.0), (0.0, -3.0, 4.0))
    projected = TaskGradients(model, replace(RECIPE, gradients="pcgrad"), 0)
    for a0, a1, b in parts:
        (model.encoder["a"] @ torch.tensor([a0, a1]) + model.encoder["b"][0] * b).backward()
        projected.take()
    projected.give(agreement := new_agreement(("x", "y")), 0)
    # <x, y> = -6, |x|^2 = 5, |y|^2 = 25: x + 6/25 y = (1, 1.28, 0.96), y + 6/5 x = (1.2, -0.6, 4)
    np.testing.assert_allclose(torch.cat([model.encoder["a"].grad, model.encoder["b"].grad]), [2.2, 0.68, 4.96], rtol=1e-6)
    assert mean_cosines(agreement) == [{"tasks": ["x", "y"], "mean": pytest.approx(-6 / np.sqrt(125)), "conflicts": 1.0, "updates": 1}]


def test_pcgrad_projects_the_encoder_and_leaves_the_heads(toys, tmp_path, monkeypatch):
    names = TRAINED[:5]
    found, plain = gradients_of(names, "pcgrad", tmp_path / "a", monkeypatch)
    keys = [k for k in found if k.startswith("encoder.")]
    flat = [np.concatenate([part[k].double().numpy().ravel() if k in part else np.zeros(found[k].numel()) for k in keys]) for part in plain.values()]
    order = np.random.default_rng(xtransfer.training.derive_seed(0, "pcgrad", 0))
    wanted = sum(algorithm_1(flat, [order.permutation(5) for _ in range(5)]))
    got = np.concatenate([found[k].double().numpy().ravel() for k in keys])
    assert np.abs(got - wanted).max() < 1e-6 and np.abs(wanted - sum(flat)).max() > 1e-4, "something conflicts here"
    for task in names:
        assert all(torch.allclose(found[k], plain[task][k], atol=1e-7) for k in plain[task] if k.startswith(f"heads.{task}."))


def test_without_conflict_pcgrad_is_mean(toys, tmp_path, monkeypatch):
    monkeypatch.setattr("xtransfer.gradients.project_conflicts", lambda products, seed: project_conflicts(np.abs(products), seed))
    one, two = (trained(tmp_path / kind, TRAINED[:4], replace(RECIPE, gradients=kind))[0] for kind in ("mean", "pcgrad"))
    assert weights_equal(one, two)


# Cosines


def test_cosines_are_those_of_the_gradients_and_are_logged(toys, tmp_path, monkeypatch):
    names = TRAINED[:3]
    _, plain = gradients_of(names, "mean", tmp_path / "one", monkeypatch)
    flat = [torch.cat([part[k].flatten() for k in part if k.startswith("encoder.")]) for part in plain.values()]
    _, fitted = trained(tmp_path / "two", names, replace(RECIPE, max_steps=1, evaluations=1), still=True)
    found = fitted.facts["gradient_cosines"]
    assert [e["tasks"] for e in found] == [["toy_pair", "toy_choice"], ["toy_pair", "toy_tags"], ["toy_choice", "toy_tags"]]
    np.testing.assert_allclose([e["mean"] for e in found], [torch.cosine_similarity(flat[a], flat[b], 0) for a, b in ((0, 1), (0, 2), (1, 2))], atol=1e-5)
    _, fitted = trained(tmp_path / "three", names, replace(RECIPE, max_steps=230))
    lines = [row for row in log_of(tmp_path / "three") if "loss" in row]
    assert len(lines) == 115 and all(len(row["gradient_cosines"]) == 3 for row in lines)
    for number, entry in enumerate(fitted.facts["gradient_cosines"]):
        assert entry["updates"] == 230 and entry["mean"] == pytest.approx(np.mean([row["gradient_cosines"][number]["mean"] for row in lines])) and 0 <= entry["conflicts"] <= 1
    assert "gradient_cosines" not in trained(tmp_path / "four", names, replace(RECIPE, gradients="one_task"))[1].facts


# Resuming, and what is refused


@pytest.mark.parametrize("kind", ("mean", "pcgrad"))
def test_interrupted_training_goes_on_bit_for_bit(kind, toys, tmp_path, monkeypatch):
    recipe = replace(RECIPE, gradients=kind)
    straight, fitted = trained(tmp_path / "straight", recipe=recipe)
    for die_at in (7, 0, 15, 20):  # six batches make an update: after one, none, two and three more
        with pytest.raises(Killed):
            trained(tmp_path / "broken", recipe=recipe, die_at=die_at, monkeypatch=monkeypatch, save_seconds=0)
    again, resumed = trained(tmp_path / "broken", recipe=recipe)
    assert weights_equal(straight, again) and log_of(tmp_path / "straight") == log_of(tmp_path / "broken")
    assert replace(fitted.progress, seconds=0) == replace(resumed.progress, seconds=0) and fitted.facts == resumed.facts


@pytest.mark.usefixtures("fast_bfloat16")
def test_other_ways_of_training_go_with_it(toys, tmp_path):
    for number, changes in enumerate(({"lora_rank": 2}, {"freeze_embeddings": True, "layer_mix": True}, {"perturbation": "adversarial", "perturbation_size": 0.1}, {"precision": "bfloat16", "gradient_checkpointing": True})):
        before, (model, fitted) = model_of(TRAINED[:3]).state_dict(), trained(tmp_path / str(number), TRAINED[:3], replace(RECIPE, gradients="pcgrad", **changes))
        assert all(e["updates"] == 12 for e in fitted.facts["gradient_cosines"]) and all(np.isfinite(e["mean"]) for e in fitted.facts["gradient_cosines"])
        assert all(torch.equal(before[k], v) == ("lora_rank" in changes) for k, v in model.state_dict().items() if k.endswith("query.weight"))


def test_what_cannot_work_is_one_sentence(toys, tmp_path):
    from types import SimpleNamespace

    with pytest.raises(XtransferError, match="batch of 5 examples has no share for each of 6 tasks"):
        trained(tmp_path, recipe=replace(RECIPE, batch_size=5))
    with pytest.raises(XtransferError, match="train it in one process instead of 2"):
        Ranks.prepare(SimpleNamespace(count=2, sharding=""), None, None, RECIPE)
    with pytest.raises(XtransferError, match="gradients 'pgrad'.*did you mean 'pcgrad'"):
        trained(tmp_path, recipe=replace(RECIPE, gradients="pgrad"))
    with pytest.raises(XtransferError, match="loss of task toy_[a-z]+ is not finite"):
        trained(tmp_path, recipe=replace(RECIPE, learning_rate=1e30, max_grad_norm=1e30))


# A target trained beside other tasks


def test_the_target_decides(toys, tmp_path):
    def scores():
        values = iter([(10.0, 90.0), (30.0, 10.0), (20.0, 95.0)])
        return lambda: dict(zip(TRAINED[:2], next(values)))
    bests = [trained(tmp_path / str(i), TRAINED[:2], score=scores(), deciding=deciding)[1].progress.best_step for i, deciding in enumerate(((), TRAINED[:1], TRAINED[1:2]))]
    assert bests == [12, 8, 12]
    stage = Stage(train=("toy_qa", "toy_pair", "toy_text"), score=("toy_pair",), recipe=RECIPE, seed=0)
    assert deciding_tasks(stage) == ("toy_pair",) and deciding_tasks(replace(stage, score=())) == () and deciding_tasks(replace(stage, score=("toy_retrieval",))) == ()


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """A study whose target is trained after, or together with, another task: the study, its folder, and the record of the joint run."""
    from xtransfer.studies import load_declarations

    load_declarations([str(TOYS)])
    folder, recipe = tmp_path_factory.mktemp("joint"), replace(RECIPE, batch_size=8, max_steps=20, dev_limit=10)
    def cell(arm, *stages):
        return Cell(arm=arm, target="toy_pair", seed=0, run=Run(backbone="toy-encoder", stages=stages))
    multi = Stage(train=("toy_qa", "toy_text"), recipe=replace(recipe, gradients="pcgrad"), seed=0)
    alone, together = (Stage(train=train, score=("toy_pair",), recipe=recipe, mixing=Mixing(kind="uniform"), seed=0) for train in (("toy_pair",), ("toy_pair", "toy_choice")))
    study = Study(name="joint", profile="smoke", question="?", cells=(cell("none", alone), cell("joint", together), cell("multi-joint", multi, together)), contrasts=(Contrast(treatment="joint", baseline="none"),))
    result = run_study(study, folder, workers=1, threads=1, declarations=[str(TOYS)], report=lambda line: None)
    assert not result.failed, result.failed
    return study, folder


def test_a_joint_target_works_end_to_end(joint, toys):
    study, folder = joint
    run = next(cell.run for cell in study.cells if cell.arm == "joint")
    record = read_record(folder / run.id)
    assert record.template == "target" and {(s.task, s.selection) for s in record.scores} == {("toy_pair", "best"), ("toy_pair", "last")} and len({s.language for s in record.scores}) == 3
    devs = [entry["tasks"]["toy_pair"] for entry in record.training["dev"]]
    assert [entry["mean"] for entry in record.training["dev"]] == devs and record.training["best_dev"] == max(devs) and set(record.training["dev"][0]["tasks"]) == {"toy_pair", "toy_choice"}
    lines = [json.loads(line) for line in (folder / run.id / "log.jsonl").read_text().splitlines()]
    assert all(row["gradient_cosines"][0]["tasks"] == ["toy_pair", "toy_choice"] for row in lines if "loss" in row)


def test_cosines_of_a_study_are_a_table(joint, toys):
    study, folder = joint
    table = gradient_cosines(study, folder)
    assert table[["arm", "target", "task", "other", "updates"]].values.tolist() == [
        ["joint", "toy_pair", "toy_pair", "toy_choice", 20], ["multi-joint", "", "toy_qa", "toy_text", 20], ["multi-joint", "toy_pair", "toy_pair", "toy_choice", 20]]
    assert table["mean"].between(-1, 1).all() and table["conflicts"].between(0, 1).all()
