"""The answers to stilts and multimodal: right where the truth is known, and honest where runs are missing."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_answers_backbones import check

import xtransfer.catalogue  # noqa: F401
from xtransfer.analysis import t_interval
from xtransfer.evidence import Evidence, make_evidence
from xtransfer.family_answer import compare, family_gains
from xtransfer.findings import find
from xtransfer.languages import LANGUAGES
from xtransfer.multimodal_answer import MARGIN, answer_multimodal, data_languages, primary_rows, smaller_than_margin, tower_differences
from xtransfer.stilts_answer import answer_stilts, arm_roles, arm_rows, best_arms
from xtransfer.studies import STUDIES
from xtransfer.tasks import TASKS

NOWHERE = Path("no records here")
REAL, WORLD = ("en", "de", "ru", "sw", "zh"), ("en", *(f"qa{letter}" for letter in "abcdef"))


def part(study, arms, targets):
    """A study with some of its arms and targets."""
    return replace(study, cells=tuple(c for c in study.cells if c.arm in arms and c.target in targets), contrasts=tuple(c for c in study.contrasts if {c.treatment, c.baseline} <= set(arms)))


def simulate(study, gain_of, seeds=(0, 1, 2), splits=("test",), noise=0.3, draw=0):
    """Scores of a study in which `gain_of(arm)` is what an arm adds; retrieval has centred and whitened scores, which it does not move."""
    random, rows, languages = np.random.default_rng(draw), [], WORLD if all(c.target.startswith("world_") for c in study.cells) else REAL
    for cell in (c for c in study.cells if c.seed in seeds):
        trained = bool(cell.run.stage.train)
        for i, language in enumerate(languages):
            value, fixed = 60 - 3 * i + gain_of(cell.arm) + random.normal(0, noise), 70 - 3 * i + random.normal(0, noise)
            for key in TASKS[cell.target].headline:
                for metric, number in ((key, value), *(() if trained else ((f"{key}_centred", fixed), (f"{key}_whitened", fixed)))):
                    rows += [{"study": study.name, "profile": study.profile, "backbone": cell.run.backbone, "arm": cell.arm, "target": cell.target, "seed": cell.seed, "run": cell.run.id, "task": cell.target, "language": language, "split": split,
                              "selection": "best" if trained else "none", "metric": metric, "value": number + 10 * (split == "dev"), "n": 500, "capped": False} for split in splits if split == "test" or "dev" in TASKS[cell.target].splits]
    return pd.DataFrame(rows)


STILTS = part(STUDIES["stilts"].build("mini"), ("none", "nli", "qa", "translated", "qa-shuffled", "longer"), ("world_xnli", "world_panx", "world_tatoeba"))


@pytest.mark.parametrize("truth, best, said, told", [
    ({"qa": 5.0}, "is qa", "one of them raises the average and none lowers it, and it exceeds every control", "- qa, more than every control"),
    ({"qa": 5.0, "qa-shuffled": 5.0}, "is qa", "and it does not exceed every control", "- qa, not told apart from qa-shuffled"),
    ({}, "is ", "none of them raises the average and none lowers it", "nothing that the controls would have to explain")])
def test_arms_with_known_effects(truth, best, said, told):
    scores = simulate(STILTS, lambda arm: truth.get(arm, 0.0))
    findings = find(STILTS, scores)
    answer = check(answer_stilts(STILTS, findings, scores, NOWHERE))
    assert f"the best of three intermediate arms {best}" in answer.sentence and said in answer.sentence
    assert told in " ".join(answer.sections[2].text) and answer.sections[2].heading.startswith("Is it transfer")
    table = answer.sections[0].tables[0].rows.set_index("arm")
    cells = scores[(scores["language"] != "en") & scores["selection"].eq("best") & scores["metric"].isin(["accuracy", "f1"])].groupby("arm")["value"].mean()
    assert abs(table.loc["qa", "gain"] - (cells["qa"] - cells["none"])) < 1e-9 and (table["role"] == "control").sum() == 2 and table.loc[table["role"] == "control", "p_holm"].isna().all()
    if not truth:
        assert "are excluded for all of them" in answer.sentence
    retrieval = next(section for section in answer.sections if section.heading == "Retrieval and geometry")
    assert ("not resolved in the same direction once each language is centred" in retrieval.text[1]) == bool(truth) and retrieval.tables[0].columns == ["arm", "raw", "centred", "whitened"]


def test_the_best_arm_is_chosen_without_the_test_languages(monkeypatch):
    monkeypatch.setattr("xtransfer.evidence.RESAMPLES", 200)
    scores = simulate(STILTS, lambda arm: {"qa": 6.0, "nli": 2.0}.get(arm, 0.0))
    dev = {(c.arm, c.target, c.seed): 90.0 + {("nli", "world_xnli"): 3.0, ("none", "world_panx"): 1.0}.get((c.arm, c.target), 0.0) for c in STILTS.cells if c.run.stage.train}
    evidence = make_evidence(STILTS, scores, dev)
    rows = best_arms(evidence).set_index("target")
    gain = {(arm, target): np.nanmean(evidence.gains[evidence.arms.index(arm), evidence.targets.index(target)]) for arm in ("none", "nli") for target in rows.index if target in evidence.targets}
    assert rows.loc[["world_xnli", "world_panx", "world_tatoeba"], "arm"].tolist() == ["nli", "none", "nli"] and rows.loc["world_panx", "gain"] == 0  # retrieval: the best on average
    assert abs(rows.loc["world_xnli", "gain"] - gain["nli", "world_xnli"]) < 1e-9 and abs(rows.loc["average without retrieval", "gain"] - gain["nli", "world_xnli"] / 2) < 1e-9
    assert set(rows.loc[["world_xnli", "world_panx"], "oracle_arm"]) == {"qa"} and rows.loc["average", "oracle_low"] > rows.loc["average", "high"]


def test_published_designs_and_their_splits():
    study = part(STUDIES["stilts"].build("paper"), ("none", "mnli", "mnli+mlm", "mnli-translated", "mnli-shuffled"), ("xnli", "xquad", "tatoeba"))
    assert list(arm_roles(study).values()).count("intermediate") == 3
    scores = simulate(study, lambda arm: 3.0 if arm == "mnli" else 0.0, splits=("dev", "test"))
    answer = check(answer_stilts(study, find(study, scores), scores, NOWHERE))
    matrix = next(table for table in answer.sections[0].tables if table.name == "matrix")
    assert "on development data (xnli) and test data (xquad and tatoeba)" in matrix.caption and float(matrix.rows.loc[0, "xnli"]) - float(matrix.rows.loc[0, "xquad"]) > 9
    assert not answer.sentence.startswith("In a synthetic world") and "- mnli+mlm over mnli" in " ".join(answer.sections[-1].text) and "It has no control of its own here." in " ".join(answer.sections[-1].text)
    revised = part(STUDIES["stilts-xtreme-r"].build("paper"), ("none", "mnli"), ("xnli", "tatoeba_xr"))
    scores = simulate(revised, lambda arm: 0.0)
    answer = check(answer_stilts(revised, find(revised, scores), scores, NOWHERE))
    assert "the intermediate arm is mnli" in answer.sentence and "stays open" in answer.sections[2].text[0]


def test_stilts_with_holes():
    one = simulate(STILTS, lambda arm: 2.0, seeds=(0,))
    assert "with one seed there is no verdict" in check(answer_stilts(STILTS, find(STILTS, one), one, NOWHERE)).sentence
    full = simulate(STILTS, lambda arm: 2.0 if arm == "qa" else 0.0)
    runs = sorted(set(full["run"]))
    half = full[full["run"].isin(np.random.default_rng(0).choice(runs, len(runs) // 2, replace=False))]
    assert "missing" in check(answer_stilts(STILTS, find(STILTS, half), half, NOWHERE)).sentence
    without = full[full["arm"] != "nli"]
    findings = find(STILTS, without)
    assert arm_rows(STILTS, findings).set_index("arm").loc["nli", "effect"] == "missing" and "one further arm could not be compared yet" in answer_stilts(STILTS, findings, without, NOWHERE).sentence
    trained = full[full["arm"] != "none"]
    assert answer_stilts(STILTS, find(STILTS, trained), trained, NOWHERE).sentence.startswith("No answer yet")


MULTIMODAL = STUDIES["multimodal"].build("mini")
TOWERS = part(MULTIMODAL, tuple(MULTIMODAL.factors), ("world_xnli", "world_panx", "world_tatoeba"))
TOWERS = replace(TOWERS, contrasts=(*TOWERS.gains, *(c for c in TOWERS.contrasts if {c.treatment, c.baseline} <= set(TOWERS.baselines))))  # the answer makes all others itself


def towers(effect, study=TOWERS, **how):
    """Scores in which towers gain so much more from data in other languages."""
    kinds = data_languages(study)
    def gain(arm):
        factors = study.factors[arm]
        return 0.0 if factors["intermediate"] == "none" else 2.0 + effect * (factors["modality"] == "multimodal" and kinds[factors["intermediate"]] == "other languages")
    return simulate(study, gain, **how)


@pytest.mark.parametrize("effect, said", [(4.0, "towers gain more."), (-4.0, "towers gain less."), (0.0, "the two are equivalent")])
def test_towers_with_a_known_difference(effect, said, monkeypatch):
    if effect:
        monkeypatch.setattr("xtransfer.multimodal_answer.tower_model", lambda study, gains: ("No model.", None))
    scores = towers(effect, draw=1)
    answer = check(answer_multimodal(TOWERS, find(TOWERS, scores), scores, NOWHERE))
    table = answer.sections[0].tables[0].rows
    assert said in answer.sentence and "(native and translated)" in answer.sentence and abs(table.loc[0, "gain"] - effect) < 0.5
    named, steps = table.set_index("what"), answer.sections[1].tables[0].rows.set_index(["step", "of"])
    assert abs(named.loc["en (English)", "gain"]) < 0.5 and abs(named.loc["round-trip (English)", "gain"]) < 0.5
    assert abs(steps.loc[("translated − round-trip", "towers − parents"), "gain"] - effect) < 0.7 and abs(steps.loc[("translated − round-trip", "parents"), "gain"]) < 0.7
    assert effect or any(table.name == "mixed-model" for section in answer.sections for table in section.tables)
    measures = next(table for section in answer.sections for table in section.tables if table.name == "retrieval-towers").rows.set_index(["measure", "data"])["gain"]
    assert abs(measures["raw", "other languages"] - effect) < 0.7 and abs(measures["centred", "other languages"]) < 0.5


def test_equivalence_counts_seeds_and_not_cells():
    scores, luck = towers(0.0), {0: 2.5, 1: -2.0, 2: 0.1}
    scores["value"] += [luck[seed] if arm.startswith("world-clip + ") else 0.0 for arm, seed in zip(scores["arm"], scores["seed"])]
    rows = primary_rows(tower_differences(TOWERS, family_gains(TOWERS, find(TOWERS, scores).pairs)))
    tested, (low, high) = smaller_than_margin(rows), t_interval(list(luck.values()), 0.9)
    cells = rows["difference"].mean() + np.array([-1.645, 1.645]) * rows["difference"].std() / np.sqrt(len(rows))
    assert abs(cells).max() < MARGIN  # what independent cells would promise
    assert tested.verdict == "not resolved" and abs((tested.high - tested.low) / (high - low) - 1) < 0.2 and abs(tested.difference - compare(rows)["gain"]) < 1e-9


def test_multimodal_on_real_languages_and_with_holes(monkeypatch):
    monkeypatch.setattr("xtransfer.multimodal_answer.tower_model", lambda study, gains: ("No model.", None))
    small = STUDIES["multimodal"].build("small")
    scores = towers(0.0, small, seeds=(0,))
    answer = check(answer_multimodal(small, find(small, scores), scores, NOWHERE))
    assert "(native)" in answer.sentence and "too few complete seeds for a verdict" in answer.sentence and set(LANGUAGES) >= set(scores["language"])
    full = towers(0.0)
    runs = sorted(set(full["run"]))
    half = full[full["run"].isin(np.random.default_rng(0).choice(runs, len(runs) // 2, replace=False))]
    assert check(answer_multimodal(TOWERS, find(TOWERS, half), half, NOWHERE)).sentence
    parents = full[~full["arm"].str.startswith("world-clip")]
    assert answer_multimodal(TOWERS, find(TOWERS, parents), parents, NOWHERE).sentence.startswith("No answer yet")


def test_a_choice_where_targets_have_few_of_many_languages():
    """Forty languages of which one target has two: samples without either say nothing about it, and the interval rests on the others."""
    study = part(STUDIES["stilts"].build("mini"), ("none", "nli", "qa"), ("world_xnli", "world_panx"))
    random = np.random.default_rng(0)
    gains = np.stack([np.zeros((2, 3, 40)), 2 + random.normal(size=(2, 3, 40)), random.normal(size=(2, 3, 40))])
    gains[:, 1, :, 2:] = np.nan
    dev = np.array([[90.0, 90.0], [95.0, 95.0], [90.0, 90.0]])[..., None] + np.zeros(3)
    e = Evidence(study=study, arms=("none", "nli", "qa"), kinds=("baseline", "single", "single"), targets=("world_xnli", "world_panx"), seeds=(0, 1, 2), gains=gains, dev=dev)
    rows = best_arms(e).set_index("target")
    assert rows.loc["world_panx", "arm"] == rows.loc["world_panx", "oracle_arm"] == "nli"
    assert rows.loc["world_panx", "gain"] == pytest.approx(np.nanmean(gains[1, 1])) and rows.loc["average", "gain"] == pytest.approx((np.nanmean(gains[1, 0]) + np.nanmean(gains[1, 1])) / 2)
    assert (rows["low"] < rows["gain"]).all() and (rows["gain"] < rows["high"]).all() and rows.loc["average", "low"] > 0
