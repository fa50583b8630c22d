"""Probes: what a model says of tasks of every format, checked against plain computations, and one probe as a run."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from conftest import TOYS
from xtransfer.core import XtransferError
from xtransfer.encoding import ENCODERS, encode, make_batch
from xtransfer.modeling import StageModel, load_encoder, load_tokenizer, save_checkpoint
from xtransfer.probing import (
    LABELLED, NEGATIVES, english_split, fertility, frozen_states, labelled_features, leep_of_heads, measure_task, source_heads, task_embedding, text_embedding, texts_of, train_head)
from xtransfer.records import EMBEDDINGS_NAME, NOTEBOOK_NAME, RECORD_NAME, load_probes, read_record, run_folder, task_embeddings
from xtransfer.runs import execute, remaining, run_study
from xtransfer.selection import leep
from xtransfer.studies import Cell, Recipe, Run, Stage, Study
from xtransfer.tasks import TASKS, load_examples

RECIPE = Recipe(name="probe", learning_rate=1e-2, batch_size=8, max_steps=30, max_length=96, stride=8, dev_limit=24)
FORMATS = {"toy_pair": "sequence_classification", "toy_choice": "multiple_choice", "toy_tags": "token_classification", "toy_qa": "span_extraction", "toy_qa2": "span_extraction",
           "toy_text": "masked_lm", "toy_retrieval": "retrieval", "toy_mining": "bitext_mining", "toy_ranked": "ranked_retrieval"}
WITH_LABELS = [name for name, format in FORMATS.items() if format in LABELLED]


def by_letter(rows):
    """The same rows with tags that a word's first letter decides, which even random states tell."""
    return [r | {"tags": ["B-LONG" if w[0] in "abcd" else "O" for w in r["tokens"]]} for r in rows]


class World:
    """The toy encoder with random weights, and examples of the toy tasks."""

    def __init__(self):
        from xtransfer.backbones import BACKBONES

        self.backbone = BACKBONES["toy-encoder"]
        self.tokenizer = load_tokenizer(self.backbone)
        self.encoder = load_encoder(self.backbone, self.tokenizer, seed=0)

    def rows(self, name, limit=24):
        task = TASKS[name]
        return load_examples(task, *english_split(task), limit=limit).rows

    def model(self, name):
        return StageModel(self.encoder, [TASKS[name]], 0, self.backbone)

    def encoded(self, name, limit=24):
        return encode(self.tokenizer, TASKS[name], self.rows(name, limit), RECIPE)

    def measure(self, name, rows=None, source=None):
        return measure_task(self.encoder, self.backbone, self.tokenizer, TASKS[name], rows or self.rows(name), RECIPE, source)


@pytest.fixture
def world(toys):
    return World()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_measured_or_named(world, name):
    found = world.measure(name)
    labelled = FORMATS[name] in LABELLED
    assert TASKS[name].format == FORMATS[name] and set(found.values) == ({"logme"} if labelled else set()) and set(found.embeddings) == ({"text", "task"} if labelled else {"text"})
    assert set(found.absent) == {"logme", "leep", "text", "task"} - set(found.values) - set(found.embeddings) and all(found.absent.values())
    assert all(v.dtype == np.float32 and np.isfinite(v).all() and np.linalg.norm(v) > 0 for v in found.embeddings.values()) and len(found.embeddings["text"]) == 16


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name] in ENCODERS])
def test_text_embedding_is_a_mean_of_means(world, name):
    """Over examples, of the mean over their sequences, of the mean over the sequence's tokens: one example at a time, padded the plain way."""
    encoded, model, means = world.encoded(name), StageModel(world.encoder, [], 0, world.backbone).eval(), []
    for example in range(encoded.examples):
        batch = make_batch(encoded, np.array([example]))
        with torch.no_grad():
            means.append(np.mean([part.mean(0).numpy() for part in model.states(batch, padded=True).split(batch.lengths)], axis=0))
    assert np.allclose(text_embedding(frozen_states(model, encoded)), np.mean(means, axis=0), atol=1e-5)


def test_decisions_of_each_format(world):
    """One label for each text, choice or word; for an answer its beginning, and up to four other tokens."""
    wanted = {"toy_pair": lambda rows, task: Counter(task.labels.index(r["label"]) for r in rows), "toy_choice": lambda rows, task: Counter({1: len(rows), 0: 2 * len(rows)}),
              "toy_tags": lambda rows, task: Counter(task.labels.index(t) for r in rows for t in r["tags"])}
    for name in WITH_LABELS:
        rows, task = world.rows(name), TASKS[name]
        features, labels = labelled_features(frozen_states(world.model(name), world.encoded(name)), task)
        counts, answers = Counter(labels.tolist()), sum(bool(r.get("answers")) for r in rows)
        assert features.shape == (len(labels), 16)
        assert counts == wanted[name](rows, task) if name in wanted else counts[1] == answers and answers < counts[0] <= NEGATIVES * answers, name


def test_answer_starts_are_the_states_of_their_tokens(world):
    encoded, model = world.encoded("toy_qa", 5), world.model("toy_qa")
    features, labels = labelled_features(frozen_states(model, encoded), TASKS["toy_qa"])
    with torch.no_grad():
        wanted = []
        for example in range(5):
            batch = make_batch(encoded, np.array([example]))
            states = model.states(batch, padded=True).split(batch.lengths)
            wanted += [states[w][int(span)] for w, span in enumerate(batch.targets["span"][:, 0]) if span >= 0]
    found = features[labels == 1]
    assert len(found) == len(wanted) and all(np.abs(found - w.numpy()).max(1).min() < 1e-5 for w in wanted)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_task_embedding_is_the_diagonal_of_the_fisher_information(world, name):
    """Squared gradients from `backward`, one padded example at a time, averaged over examples and over each row, each matrix of length 1."""
    model, encoded = world.model(name), world.encoded(name, 6)
    train_head(model.heads[name], frozen_states(model, encoded), RECIPE)
    matrices = {key: p for key, p in model.encoder.named_parameters() if key.endswith("weight") and p.ndim == 2 and "embedding" not in key}
    squares = {key: torch.zeros(len(p)) for key, p in matrices.items()}
    for example in range(6):
        model.zero_grad()
        model(make_batch(encoded, np.array([example])), name, padded=True)[0].backward()
        for key, p in matrices.items():
            squares[key] += p.grad.square().mean(1) / 6
    expected = np.concatenate([(s / s.norm()).numpy() for s in squares.values()])
    assert len(matrices) == 2 * 6 and len(expected) == 2 * (4 * 16 + 32 + 16)
    assert np.allclose(task_embedding(model, TASKS[name], encoded), expected, atol=2e-4)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_measuring_changes_nothing_and_depends_on_the_examples_alone(world, name):
    before = {key: value.clone() for key, value in world.encoder.state_dict().items()}
    first = world.measure(name)
    world.measure("toy_tags")
    second = world.measure(name)
    assert all(torch.equal(value, before[key]) for key, value in world.encoder.state_dict().items()) and all(p.grad is None for p in world.encoder.parameters())
    assert first.values == second.values and all(np.array_equal(first.embeddings[k], second.embeddings[k]) for k in ("text", "task"))
    assert first.facts["head_loss"][1] < first.facts["head_loss"][0]


def test_labels_change_what_looks_at_labels(world):
    rows = by_letter(world.rows("toy_tags"))
    turned = [r | {"tags": r["tags"][::-1]} for r in rows]
    own, other = world.measure("toy_tags", rows), world.measure("toy_tags", turned)
    assert np.array_equal(own.embeddings["text"], other.embeddings["text"]) and not np.allclose(own.embeddings["task"], other.embeddings["task"], atol=1e-3)
    assert own.values["logme"][0] > other.values["logme"][0] + 0.1, "the same tags on other words cannot be told"
    single = world.measure("toy_pair", [r | {"label": "yes"} for r in world.rows("toy_pair")])
    assert "one label" in single.absent["logme"] and "task" in single.embeddings


def test_leep_of_a_head_that_says_the_same_is_the_entropy_and_of_one_that_knows_is_better(world, tmp_path):
    rows, model = by_letter(world.rows("toy_tags")), StageModel(world.encoder, [TASKS["toy_tags"], TASKS["toy_pair"], TASKS["toy_choice"]], 0, world.backbone)
    frozen = frozen_states(model, encode(world.tokenizer, TASKS["toy_tags"], rows, RECIPE))
    with torch.no_grad():
        model.heads["toy_tags"].out.weight.zero_()
    save_checkpoint(model, world.tokenizer, tmp_path / "constant")
    train_head(model.heads["toy_tags"], frozen, replace(RECIPE, max_steps=200))
    save_checkpoint(model, world.tokenizer, tmp_path / "trained")
    tags = np.mean([t == "O" for r in rows for t in r["tags"]])
    entropy = -(tags * math.log(tags) + (1 - tags) * math.log(1 - tags))
    sources = {kind: source_heads(world.encoder, tmp_path / kind, world.backbone, TASKS) for kind in ("constant", "trained")}
    assert set(sources["trained"].heads) == {"toy_tags", "toy_pair"}, "heads of choices have no labels"
    found = {kind: leep_of_heads(source, TASKS["toy_tags"], frozen) for kind, source in sources.items()}
    assert set(found["trained"]) == {"toy_tags"} and math.isclose(found["constant"]["toy_tags"], -entropy, abs_tol=1e-6) and found["trained"]["toy_tags"] > -entropy + 0.1
    measured = world.measure("toy_tags", rows, sources["trained"])
    assert math.isclose(measured.values["leep"][0], found["trained"]["toy_tags"], abs_tol=1e-6) and "leep" not in measured.absent
    assert "no head" in world.measure("toy_choice", source=sources["trained"]).absent["leep"]
    assert source_heads(world.encoder, None, world.backbone, TASKS) is None and source_heads(world.encoder, tmp_path, world.backbone, TASKS) is None


def test_heads_that_mix_layers_are_read_as_they_were_trained(world, tmp_path):
    model, encoded = StageModel(world.encoder, [TASKS["toy_pair"]], 0, world.backbone, layer_mix=True), world.encoded("toy_pair")
    with torch.no_grad():
        model.mixes["toy_pair"].weight.copy_(torch.tensor([9.0, 0.0, 0.0]))
        model.heads["toy_pair"].out.weight.mul_(50)
    save_checkpoint(model, world.tokenizer, tmp_path)
    source, frozen = source_heads(world.encoder, tmp_path, world.backbone, TASKS), frozen_states(model, encoded)
    with torch.no_grad():
        batch = make_batch(encoded, np.arange(encoded.examples))
        probabilities = model.eval()(batch, "toy_pair")[1].softmax(-1).numpy()
    assert math.isclose(leep_of_heads(source, TASKS["toy_pair"], frozen)["toy_pair"], leep(probabilities, batch.targets["label"].numpy()), abs_tol=1e-5)


def test_fertility_counts_letters_of_toy_words(world):
    """Each letter is a token: as many subwords as letters."""
    for name, language in (("toy_tags", "de"), ("toy_pair", "en"), ("toy_qa", "fr")):
        rows = load_examples(TASKS[name], language, "test").rows
        texts = texts_of(TASKS[name], rows, english=False)
        said = [w for text in texts for w in text.split()]
        per_word, per_character, n = fertility(world.tokenizer, texts, language)
        assert n == len(said) and per_character == 1 and math.isclose(per_word, sum(map(len, said)) / len(said))
        assert math.isclose(fertility(world.tokenizer, texts, "zh")[0], 1.0), "Chinese is counted by characters"
    with pytest.raises(XtransferError, match="no word"):
        fertility(world.tokenizer, [" "], "de")


def test_two_sided_rows_give_the_side_that_is_asked_for(world):
    rows = load_examples(TASKS["toy_mining"], "de", "test").rows
    english, foreign = (texts_of(TASKS["toy_mining"], rows, english=e) for e in (True, False))
    assert set(english) == {r["text"] for r in rows if r["side"] == "target"} and set(foreign) == {r["text"] for r in rows if r["side"] == "source"}
    assert english_split(TASKS["toy_retrieval"]) == ("de", "dev") and english_split(TASKS["toy_qa"]) == ("en", "train")


def test_a_recipe_that_cannot_train_a_head_is_refused(world):
    with pytest.raises(XtransferError, match="learning rate above 0"):
        train_head(world.model("toy_pair").heads["toy_pair"], [], replace(RECIPE, learning_rate=0.0))


MEASURED = ("toy_pair", "toy_tags", "toy_choice", "toy_qa2", "toy_text", "toy_retrieval")


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A study of probes alone: of the pretrained model, and of the same after two labelled tasks; executed through papermill."""
    import xtransfer.catalogue  # noqa: F401
    from xtransfer.studies import load_declarations

    load_declarations([str(TOYS)])
    folder, training = tmp_path_factory.mktemp("probes"), replace(RECIPE, learning_rate=3e-3, max_steps=10, evaluations=1)
    start, between = Stage(train=("toy_text",), recipe=training, seed=0), Stage(train=("toy_pair", "toy_tags"), recipe=training, seed=0)
    probe = Stage(measure=MEASURED, recipe=RECIPE, seed=0)
    runs = {"none": Run(backbone="toy-encoder", stages=(start, probe)), "both": Run(backbone="toy-encoder", stages=(start, between, probe))}
    study = Study(name="probes", profile="smoke", question="?", cells=(), contrasts=(), probes=tuple(Cell(arm=arm, target="", seed=0, run=run) for arm, run in runs.items()))
    outcome = run_study(study, folder, workers=1, threads=1, declarations=[str(TOYS)], report=lambda line: None)
    assert not outcome.failed, outcome.failed
    return study, folder


def test_a_probe_is_a_run_like_others(probed, toys):
    study, folder = probed
    assert sorted(run.template for run in study.plan()) == ["intermediate", "pretrain", "probe", "probe"]
    assert not remaining(study, folder) and all((run_folder(folder, run) / "checkpoint").exists() == (run.template != "probe") for run in study.plan())
    for cell in study.probes:
        place = run_folder(folder, cell.run)
        record = read_record(place)
        assert {p.name for p in place.iterdir()} == {NOTEBOOK_NAME, RECORD_NAME, EMBEDDINGS_NAME}
        assert record.template == "probe" and record.parameters["measure"] == list(MEASURED) and not record.training.get("steps") and record.tokens_per_second is None and record.seconds["measure"] > 0
        assert record.stages[-1]["measure"] and {s.selection for s in record.scores} == {"none"} and set(record.training["measured"]) == set(MEASURED)
        assert {(d["task"], d["split"]) for d in record.data} >= {("toy_pair", "train"), ("toy_pair", "test"), ("toy_retrieval", "dev"), ("toy_retrieval", "test")} and not any(d["capped"] for d in record.data)
        assert set(load_file(place / EMBEDDINGS_NAME)) == {f"{t}/text" for t in MEASURED} | {f"{t}/task" for t in MEASURED if TASKS[t].format in LABELLED}
        shown = json.dumps(json.loads((place / NOTEBOOK_NAME).read_text())["cells"])
        assert shown.count("image/png") == 2 and "not applicable" in shown
    again = execute(study.probes[0].run, folder, keep_checkpoint=False, declarations=[str(TOYS)])
    assert again.ended == read_record(run_folder(folder, study.probes[0].run)).ended, "a finished probe is left alone"


def test_probes_as_tables(probed, toys):
    study, folder = probed
    table = load_probes(study, folder)
    english = table[table["split"] == "train"]
    assert set(table["arm"]) == {"none", "both"} and not table["value"].isna().any() and set(table["metric"]) == {"logme", "leep", "fertility", "subwords_per_character"}
    assert {(r.arm, r.task) for r in english[english["metric"] == "leep"].itertuples()} == {("both", "toy_pair"), ("both", "toy_tags")}, "only where the parent has a head of the format"
    assert {(r.arm, r.task) for r in english[english["metric"] == "logme"].itertuples()} == {(arm, t) for arm in ("none", "both") for t in MEASURED if TASKS[t].format in LABELLED}
    fertile = table[table["metric"] == "fertility"]
    assert {(r.task, r.language) for r in fertile.itertuples()} == {(t, g) for t in MEASURED if t != "toy_text" for g in TASKS[t].languages} and (fertile["split"] == "test").all()
    assert fertile.groupby(["task", "language"])["value"].nunique().eq(1).all(), "fertility is the tokenizer's, whatever the model learned"
    assert (english["n"] >= RECIPE.dev_limit * (english["metric"] == "logme")).all()
    for kind, tasks in (("text", MEASURED), ("task", [t for t in MEASURED if TASKS[t].format in LABELLED])):
        own, trained = task_embeddings(study, folder, kind), task_embeddings(study, folder, kind, arm="both")
        assert set(own) == set(trained) == {(0, t) for t in tasks} and all(not np.allclose(own[k], trained[k], atol=1e-4) for k in own)
    with pytest.raises(XtransferError, match="'non'.*did you mean 'none'"):
        task_embeddings(study, folder, "text", arm="non")
    with pytest.raises(XtransferError, match="declares no probes"):
        load_probes(replace(study, probes=()), folder)
    with pytest.raises(XtransferError, match="none of its 2 probes"):
        load_probes(study, folder / "elsewhere")


def test_what_a_backbone_has_no_room_for_is_named(toys, tmp_path, monkeypatch):
    from xtransfer.backbones import BACKBONES
    from xtransfer.runs import run_parameters
    from xtransfer.steps import Step, measure

    BACKBONES.register(replace(BACKBONES["toy-encoder"], name="toy-narrow", max_length=64))
    untested = TASKS.register(replace(TASKS["toy_pair"], load=lambda language, split, load=TASKS["toy_pair"].load: load(language, split) if split != "test" else []))
    run = Run(backbone="toy-narrow", stages=(Stage(measure=("toy_qa", untested.name), recipe=RECIPE, seed=0),))
    monkeypatch.setattr("xtransfer.steps.require_checks", lambda *a, **k: [])
    steps = []
    for seed in (0, 1):
        step = Step(folder=tmp_path, lock="", **(run_parameters(run) | {"seed": seed}))
        measure(step)
        steps.append(step)
    step = steps[0]
    assert "64 positions" in step.measured["toy_qa"]["not_applicable"]["task"] and set(step.embeddings) == {"toy_pair/text", "toy_pair/task"}
    assert {(s.task, s.metric) for s in step.scores} == {("toy_qa", "fertility"), ("toy_qa", "subwords_per_character"), ("toy_pair", "fertility"), ("toy_pair", "subwords_per_character"), ("toy_pair", "logme")}
    assert {(s.task, s.split) for s in step.scores if s.metric == "fertility"} == {("toy_qa", "test"), ("toy_pair", "dev")}, "what has no test split is counted on dev"
    assert step.measured["toy_pair"]["examples"] == RECIPE.dev_limit == next(s.n for s in step.scores if s.metric == "logme")
    assert not np.allclose(steps[0].embeddings["toy_pair/text"], steps[1].embeddings["toy_pair/text"]), "another seed has other random weights"
