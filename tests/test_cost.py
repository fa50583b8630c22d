"""What a plan says that runs will take: work that grows as it should, divided by a machine that is given."""

import math
from dataclasses import replace

import pytest

import xtransfer.catalogue  # noqa: F401  fills the registries
from conftest import xtransfer as command_line
from xtransfer.core import XtransferError, digest, read_json, write_json
from xtransfer.cost import H100, MACHINES_NAME, Machine, _measured, corrections, cost_summary, cost_table, estimate, known_of, machine_key, memory_of, seconds_of, this_machine, wall_seconds
from xtransfer.records import study_records
from xtransfer.studies import STUDIES, Recipe, Run, Stage
from xtransfer.tasks import TASKS
from xtransfer.workload import TOKENS, Known, example_tokens, rows_of, with_sizes, workload

RECIPE = Recipe(name="given", learning_rate=1e-5, batch_size=32, epochs=1, max_length=128, evaluations=1, dev_limit=1)
NUMBERS = {"update_seconds": 1e-3, "layer_seconds": 1e-3, "weights_per_second": 1e9, "rates": {"float32": [[64, 1e10], [1024, 4e10]]}, "token_seconds": 1e-6, "python_seconds": 1.5e-3, "disk_bandwidth": 1e9}
GIVEN = Machine(name="given", **NUMBERS)


def run(backbone="xlm-r-base", **changed):
    return Run(backbone=backbone, stages=(Stage(**{"train": ("mnli",), "score": ("xnli",), "recipe": RECIPE, "seed": 0} | changed),))


def close(one, other, tolerance=0.02):
    assert one == pytest.approx(other, rel=tolerance)


def test_training_grows_with_examples_and_epochs():
    alone = {"score": ()}
    for doubled in (run(**alone, train_limit=4000), run(**alone, train_limit=2000, recipe=replace(RECIPE, epochs=2))):
        once, twice = workload(run(**alone, train_limit=2000)), workload(doubled)
        for part in ("updates", "trained", "operations", "calls"):
            close(getattr(twice, part), 2 * getattr(once, part))
    many, few = (workload(run(**alone, train_limit=2000, recipe=replace(RECIPE, batch_size=size))) for size in (8, 32))
    close(many.updates, 4 * few.updates)
    close(many.operations, few.operations)


def test_scoring_grows_with_languages_examples_splits():
    alone = {"train": (), "recipe": replace(RECIPE, max_length=64)}
    def read(**changed):
        return workload(run("xlm-r-base", **alone, score=("tatoeba",), **changed)).read
    close(read(languages=("de", "fr", "es", "nl")), 4 * read(languages=("de",)))
    close(read(languages=("de",), score_limit=400), 4 * read(languages=("de",), score_limit=100))
    close(workload(run(score_splits=("dev", "test"), score_limit=500)).decoded, 2 * workload(run(score_limit=500)).decoded)
    fifteen, three = (workload(run(train_limit=32, languages=some)).read for some in ((), ("en", "de", "sw")))
    close(fifteen, 5 * three)


def test_operations_follow_the_size_of_the_model():
    base, large = (workload(run(name, score=(), train_limit=3200)) for name in ("xlm-r-base", "xlm-r-large"))
    body = [1e6 * (b.parameters - b.embedding_parameters) for b in map(with_sizes, ("xlm-r-base", "xlm-r-large"))]
    assert base.trained == large.trained
    close(large.operations / base.operations, body[1] / body[0], 0.03)
    close(base.operations, 6 * body[0] * base.trained, 0.08)  # attention comes to it
    adapters = workload(run(score=(), train_limit=3200, recipe=replace(RECIPE, lora_rank=8)))
    assert adapters.weights < 0.05 * base.weights and adapters.operations == pytest.approx(base.operations * 2 / 3, rel=0.02)
    again = workload(run(score=(), train_limit=3200, recipe=replace(RECIPE, gradient_checkpointing=True)))
    assert again.operations == pytest.approx(base.operations * 4 / 3, rel=0.02)
    early, last = (workload(Run(backbone=name, stages=(Stage(score=("tatoeba",), recipe=RECIPE, seed=0),))) for name in ("xlm-r-base", "xlm-r-large"))
    assert early.calls / last.calls == pytest.approx(8 / 14)  # the retrieval layers, not all layers


def test_only_rows_that_occur_are_updated_unless_tokens_are_predicted():
    little, much = (workload(run(score=(), train_limit=n)) for n in (100, 100_000))
    whole = 1e6 * with_sizes("xlm-r-base").parameters
    assert little.weights / little.updates < much.weights / much.updates < 0.7 * whole
    text = workload(run(train=("wikipedia",), score=(), train_limit=10))
    close(text.weights / text.updates, whole)


@pytest.mark.parametrize("study", ["stilts", "families", "diversity", "multitask", "mt5-vs-bloom"])
def test_tokens_are_those_of_the_records(study):
    """Tokens and updates of finished runs are exact; what is counted from declarations alone comes near."""
    mini = STUDIES[study].build("mini")
    records, counted = study_records(mini, "outputs")[0], 0
    for planned in mini.plan():
        training = records[planned.id].training if planned.id in records else {}
        if "steps" in training:
            found = workload(planned)
            assert found.updates == training["steps"] * planned.stage.recipe.average_runs and 0.85 < found.trained / training["tokens"] < 1.15 and not found.assumed, planned.id
            counted += 1
    assert counted > 50


def test_what_nobody_declares_is_said():
    assert not workload(run()).assumed
    TASKS.register(replace(TASKS["mnli"], name="mine", expected_rows={}, trains_on="mine"))
    try:
        found = workload(run(train=("mine",), score=()))
        assert {"rows of mine, train, as 10,000", "tokens of mine, taken as typical of sequence_classification"} <= found.assumed
        known = Known(rows={("mine", "en", "train"): 500, ("mine", "en", "dev"): 40})
        assert workload(run(train=("mine",), score=()), known).updates == 16 and "rows of mine, train, as 10,000" not in workload(run(train=("mine",), score=()), known).assumed
    finally:
        del TASKS._entries["mine"]
    assert rows_of(TASKS["mnli@sample-2k"], "en", "train")[0] == 2000 and rows_of(TASKS["mnli"], "en", "train", 7)[0] == 7


def test_a_limit_cuts_texts_and_windows_contexts():
    assert example_tokens(TASKS["anli"], replace(RECIPE, max_length=64)) == (64, 64)
    whole, cut = example_tokens(TASKS["squad1"], replace(RECIPE, max_length=384)), example_tokens(TASKS["squad1"], RECIPE)
    assert whole[0] == TOKENS["squad1"].tokens + TOKENS["squad1"].question and cut[0] > whole[0] and cut[1] <= 128


def test_seconds_are_work_by_the_machine():
    one = run()
    work, parts = workload(one), seconds_of(one, workload(one), GIVEN)
    assert parts["calls"] == pytest.approx(1e-3 * work.updates + 1e-3 * work.calls / 3) and parts["optimizer"] == pytest.approx(work.weights / 1e9)
    assert parts["arithmetic"] == pytest.approx(work.operations / GIVEN.rate(768)) and 1e10 < GIVEN.rate(768) < 4e10
    faster = seconds_of(one, work, replace(GIVEN, rates={"float32": [[64, 1e11], [1024, 4e11]]}))
    assert faster["arithmetic"] == pytest.approx(parts["arithmetic"] / 10) and faster["calls"] == parts["calls"]
    assert seconds_of(one, work, H100)["arithmetic"] > seconds_of(one, work, H100, precision="bfloat16")["arithmetic"]


def test_wall_time_is_that_of_a_schedule():
    forest = [("root", None, 10.0), *((f"leaf{i}", "root", 4.0) for i in range(4)), ("lone", None, 3.0)]
    assert [wall_seconds(forest, workers) for workers in (1, 2, 4, 100)] == [29.0, 18.0, 14.0, 14.0]  # a parent is waited for, and nothing is faster than the longest path
    with pytest.raises(XtransferError, match="not planned"):
        wall_seconds([("a", "b", 1.0), ("b", "a", 1.0)], 1)


def test_finished_runs_correct_the_estimate(tmp_path):
    """A record of this machine counts, one of another machine does not; what it says of rows and tokens counts in any case."""
    study = STUDIES["stilts"].build("mini")
    records, planned = study_records(study, "outputs")[0], {r.id: r for r in study.plan()}
    name, record = next((n, r) for n, r in records.items() if r.template == "target")
    assert corrections([(planned[name], replace(record, environment=record.environment | {"processor": "another"}))], Known(), GIVEN, 1) == {}
    key = machine_key(1, 1)
    here = replace(record, environment=record.environment | {"processor": key["processor"], "cpus": key["cores"], "threads": 1, "device": "cpu"})
    known = known_of([record])
    parts = seconds_of(planned[name], workload(planned[name], known), GIVEN)
    expected = record.seconds["total"] / (sum(parts.values()) - parts["start"])
    assert corrections([(planned[name], here)], known, GIVEN, 1) == {"target": pytest.approx(expected)} and corrections([(planned[name], here)], known, GIVEN, 2) == {}
    assert workload(planned[name], known).trained == pytest.approx(record.training["tokens"])


def test_memory_grows_with_the_model_and_the_batch():
    small, wide = (memory_of(r, workload(r), gpu=True) for r in (run(score=(), train_limit=64), run("xlm-r-large", score=(), train_limit=64)))
    more = memory_of(big := run(score=(), train_limit=64, recipe=replace(RECIPE, batch_size=128)), workload(big), gpu=True)
    assert small < more < wide and wide > 16e6 * with_sizes("xlm-r-large").parameters
    assert memory_of(run(score=()), workload(run(score=()))) > small + 5e8  # main memory holds the program and the data as well


def test_a_measurement_is_kept_for_this_machine_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XTRANSFER_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr("xtransfer.cost._measured", lambda threads, workers: [NUMBERS, NUMBERS | {"update_seconds": 3e-3}])
    assert this_machine(1, 2) is None and not (tmp_path / MACHINES_NAME).exists()
    found = this_machine(1, 2, measuring=lambda: asked.append(1))
    assert found.update_seconds == 2e-3 and found.rate(64) == 1e10 and this_machine(1, 2) == found and asked == [1]
    assert this_machine(2, 1) is None  # other threads, another measurement
    (tmp_path / MACHINES_NAME).write_text("{")
    assert this_machine(1, 2, measuring=lambda: asked.append(2)) == found and asked == [1, 2]


@pytest.mark.parametrize("wrong", ({"update_seconds": "text"}, {"update_seconds": 0}, {"update_seconds": math.nan}, {"weights_per_second": math.inf}, {"layer_seconds": -1.0}, {"token_seconds": 1e300}, {"rates": {}}, {"rates": None}), ids=str)
def test_numbers_that_nobody_has_measured_are_measured(wrong, tmp_path, monkeypatch):
    monkeypatch.setenv("XTRANSFER_CACHE", str(tmp_path))
    monkeypatch.setattr("xtransfer.cost._measured", lambda threads, workers: [NUMBERS])
    found = this_machine(1, 1, measuring=lambda: None)
    kept = read_json(tmp_path / MACHINES_NAME)
    kept[digest(machine_key(1, 1))]["machine"] |= wrong
    write_json(tmp_path / MACHINES_NAME, kept)
    assert this_machine(1, 1) is None and this_machine(1, 1, measuring=lambda: None) == found == this_machine(1, 1)


def test_the_plan_prints_the_estimate(tmp_path, given_machine):
    code, out, err = command_line("plan", "stilts", "--profile", "smoke", "--outputs", tmp_path / "runs")
    assert code == 0 and "8 runs, 8 to execute" in out and "measured once" not in out and "GPU-hours" in out, out + err
    table = {line.split()[1]: line.split() for line in out.splitlines() if line.split()[1:2] and line.split()[1] in ("pretrain", "intermediate", "target", "retrieval") and line.split()[0].isdecimal()}
    assert {template: cells[0] for template, cells in table.items()} == {"pretrain": "1", "intermediate": "1", "target": "4", "retrieval": "2"}


def test_this_machine_can_be_measured(tmp_path):
    """The process that a plan starts, once for real; and a plan without it still lists the runs."""
    found, = _measured(1, 1)
    assert set(found) == set(NUMBERS) and all(value > 0 for name, value in found.items() if name != "rates")
    widths, rates = zip(*found["rates"]["float32"])
    assert list(widths) == sorted(widths) and min(rates) > 1e6 and Machine(name="here", **found).rate(100) > 0
    code, out, err = command_line("plan", "stilts", "--profile", "smoke", "--outputs", tmp_path, environment={"XTRANSFER_CACHE": str(tmp_path), "PYTHONPATH": str(broken(tmp_path))})
    assert code == 0 and "8 runs, 8 to execute" in out and "no estimate: the speed of this machine cannot be measured" in out, out + err


def broken(folder):
    """A folder in which torch is not what it should be."""
    (folder / "path").mkdir()
    (folder / "path" / "torch.py").write_text("raise ImportError('no torch here')")
    return folder / "path"


def test_a_study_of_two_thousand_runs_is_counted():
    paper = STUDIES["mt5-vs-bloom"].build("paper")
    found = estimate(paper, paper.plan(), "nowhere", GIVEN, 1, 4)
    assert found.wall >= found.total / 4 and min(found.seconds) > 0 and "assumed" in cost_table(found) and "not measured" in cost_summary(found, 4)
    assert found.others["float32"] > found.others["bfloat16"]
