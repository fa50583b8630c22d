"""The answers to multitask and diversity: right where the truth is known, and honest where runs are missing."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_answers_backbones import check as checked

import xtransfer.catalogue  # noqa: F401
from xtransfer.diversity_answer import answer_diversity, diversity_rows, effects, score_array, set_rows, weights_of
from xtransfer.findings import find
from xtransfer.multitask_answer import answer_multitask, find_row, schedule_rows, schedules_sentence, size_rule
from xtransfer.studies import STUDIES
from xtransfer.tasks import TASKS

NOWHERE = Path("no records here")
LANGUAGES = {"mini": ("en", *(f"qa{letter}" for letter in "abcdefghij")), "small": ("en", "de", "es", "ru", "sw", "ar", "fi")}
ANSWER = {"multitask": answer_multitask, "diversity": answer_diversity}


def simulate(study, gain_of, seeds=(0, 1, 2), draw=0, noise=0.5):
    """Scores of a study in which `gain_of(arm, target)` is what an arm adds."""
    random, rows = np.random.default_rng(draw), []
    for arm, target in sorted({(cell.arm, cell.target) for cell in study.cells}):
        for seed in seeds:
            lucky = random.normal(0, 0.3)
            for i, language in enumerate(LANGUAGES[study.profile]):
                value = 60 - i + gain_of(arm, target) + lucky + random.normal(0, noise)
                rows += [{"study": study.name, "profile": study.profile, "backbone": "toy", "arm": arm, "target": target, "seed": seed, "run": f"{arm}.{target}.s{seed}", "task": target, "language": language, "split": "test",
                          "selection": "best" if TASKS[target].trains_on else "none", "metric": key, "value": value, "n": 500, "capped": False} for key in TASKS[target].headline]
    return pd.DataFrame(rows)


def check(answer):
    """All that is asked of every answer, and no number that is none in its sentence either."""
    checked(answer)
    said = [answer.sentence, *(text for section in answer.sections for text in section.text)]
    assert not any("nan" in text.replace("Nan", "").split("multilingual")[0].split() for text in said), said
    return answer


@pytest.mark.parametrize("effect, words, rule", [(3.0, "together is better", "the rule is supported"), (-3.0, "one after the other is better", "the rule is not supported"), (0.0, "not resolved", "not resolved")])
def test_schedules_with_a_known_difference(effect, words, rule):
    study = STUDIES["multitask"].build("mini")
    def gain(arm, target):
        small = "small support" in arm
        return 0.0 if arm == "target only" else 5.0 + effect * (arm.startswith("joint") != small)
    scores = simulate(study, gain)
    findings = find(study, scores)
    answer, table = check(answer_multitask(study, findings, scores, NOWHERE)), schedule_rows(study, findings)
    assert words in answer.sentence.split("instead of one after the other")[1] and rule in answer.sections[2].text[0]
    row = find_row(table, "joint, uniform", "sequential")
    keys = scores["metric"] == [TASKS[t].headline[0] for t in scores["target"]]
    means = scores[keys & (scores["language"] != "en") & ~scores["target"].str.contains("@")].groupby(["arm", "target"])["value"].mean().groupby("arm").mean()
    assert abs(row["gain"] - (means["joint, uniform"] - means["sequential"])) < 1e-9 and row["low"] - 0.3 < effect < row["high"] + 0.3
    found, _ = size_rule(study, findings)
    assert abs(found["gain"][2] - (found["gain"][0] - found["gain"][1])) < 1e-9 and found["low"][2] - 0.5 < 2 * effect < found["high"][2] + 0.5


@pytest.mark.parametrize("p_holm, words", [(0.01, "better than the target alone"), (0.05, "not after Holm's correction (p 0.05)")])
def test_the_best_of_many_is_better_only_after_the_correction(p_holm, words):
    study = STUDIES["multitask"].build("mini")
    findings = find(study, simulate(study, lambda arm, target: 5.0 * (arm != "target only")))
    said = schedules_sentence(study, schedule_rows(study, findings).assign(p_holm=p_holm)).split(";")[0]
    assert words in said and ("better than" in said) == (p_holm < 0.05)


def test_a_slope_counts_seeds_and_not_sets():
    study = STUDIES["diversity"].build("mini")
    scores, luck = simulate(study, lambda arm, target: 0.0, noise=0.1), {0: 1.5, 1: -1.0, 2: 0.5}
    scores["value"] += [luck[seed] * study.factors[arm]["size"] for arm, seed in zip(scores["arm"], scores["seed"])]
    array = score_array(study, find(study, scores))
    rows = effects(array, {"slope": weights_of(~np.isnan(array.values).all(-1), np.where(array.sizes > 0, array.sizes, np.nan))}, resamples=100)
    assert (rows["low"] < 0).all() and (rows["high"] > 0).all() and (rows["p"] > 0.3).all() and abs(rows["gain"] - np.mean(list(luck.values()))).max() < 0.3


@pytest.mark.parametrize("effect, words", [(1.0, "larger sets are more robust"), (-1.0, "larger sets are less robust"), (0.0, "not resolved")])
def test_sets_with_a_known_slope(effect, words):
    study = STUDIES["diversity"].build("mini")
    scores = simulate(study, lambda arm, target: effect * study.factors[arm]["size"])
    answer = check(answer_diversity(study, find(study, scores), scores, NOWHERE))
    assert words in answer.sentence and "without the probes" in answer.sentence


def test_diversity_is_told_from_size():
    study, random = STUDIES["diversity"].build("mini"), np.random.default_rng(0)
    tasks = sorted({task for factors in study.factors.values() for task in factors["tasks"]})
    vectors = {(0, task): random.normal(size=5) for task in tasks}
    for_size = score_array(study, find(study, simulate(study, lambda arm, target: 2.0 * study.factors[arm]["size"])))
    row = diversity_rows(for_size, set_rows(study, for_size, {"TaskEmb": vectors}), ["TaskEmb"]).set_index("figure").loc["mean"]
    assert row["low"] < 0 < row["high"] and row["rho_low"] < row["rho"] < row["rho_high"]


@pytest.mark.parametrize("name", ["multitask", "diversity"])
def test_real_languages_one_seed_and_holes(name):
    study, random = STUDIES[name].build("small"), np.random.default_rng(0)
    one = simulate(study, lambda arm, target: 2.0 if arm not in ("none", "target only") else 0.0, seeds=(0,))
    assert "too few complete seeds" in check(ANSWER[name](study, find(study, one), one, NOWHERE)).sentence
    runs = sorted(set(one["run"]))
    for kept in (set(random.choice(runs, len(runs) // 2, replace=False)), set(runs[:2])):
        half = one[one["run"].isin(kept)]
        assert check(ANSWER[name](study, find(study, half), half, NOWHERE)).sentence


@pytest.mark.parametrize("name", ["multitask", "diversity"])
def test_half_of_the_runs(name):
    study = STUDIES[name].build("mini")
    scores = simulate(study, lambda arm, target: 1.0)
    runs = sorted(set(scores["run"]))
    half = scores[scores["run"].isin(set(np.random.default_rng(1).choice(runs, len(runs) // 2, replace=False)))]
    assert check(ANSWER[name](study, find(study, half), half, NOWHERE)).sentence
