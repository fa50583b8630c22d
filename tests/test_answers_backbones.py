"""The answers to mt5-vs-bloom and similarity-by-size: right where the truth is known, and honest where runs are missing."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import xtransfer.catalogue  # noqa: F401
from xtransfer.analysis import headline, paired_gains, t_interval
from xtransfer.family_answer import answer_families, compare, family_gains, gain_differences, primary_rows
from xtransfer.family_answer import headline_sentence as family_sentence
from xtransfer.findings import find
from xtransfer.language_slopes import across_languages, language_matrices
from xtransfer.languages import LANGUAGES, distance_to_english
from xtransfer.similarity_answer import answer_similarity, language_gains, slope_of
from xtransfer.similarity_answer import headline_sentence as similarity_sentence
from xtransfer.studies import STUDIES
from xtransfer.tasks import TASKS

NOWHERE = Path("no records here")
REAL = ("en", "de", "es", "fr", "hi", "ru", "sw", "tr", "vi", "zh", "ar", "qu")
WORLD = ("en", *(f"qa{letter}" for letter in "abcdefghij"))


def simulate(study, gain_of, seeds=(0, 1, 2), targets=None, draw=0, noise=0.6):
    """Scores of a study in which `gain_of(factors, language)` is what a trained arm adds."""
    random, rows, distance = np.random.default_rng(draw), [], study.distance
    for arm, target, run in sorted({(cell.arm, cell.target, cell.run.stage.train) for cell in study.cells}, key=str):
        if targets and target not in targets:
            continue
        for seed in seeds:
            lucky = random.normal(0, 0.3)
            for language in WORLD if study.profile == "mini" else REAL:
                factors = study.factors[arm]
                value = 60 - 20 * (distance_to_english(language, distance) or 0.5) + (gain_of(factors, language) if factors["intermediate"] != "none" else 0.0) + lucky + random.normal(0, noise)
                for key in TASKS[target].headline:
                    rows.append({"study": study.name, "profile": study.profile, "backbone": factors["backbone"], "arm": arm, "target": target, "seed": seed, "run": f"{arm}.{target}.s{seed}", "task": target, "language": language, "split": "test",
                                 "selection": "best" if run else "none", "metric": key, "value": value, "n": 500, "capped": False})
    return pd.DataFrame(rows)


def check(answer):
    """Every table and figure can be shown, and names are used once."""
    tables = [table for section in answer.sections for table in section.tables]
    assert len({table.name for table in tables}) == len(tables) and len({section.anchor for section in answer.sections}) == len(answer.sections)
    for table in tables:
        assert len(table.body()) == len(table.rows) > 0 and table.to_csv() and table.to_latex()
    for plate in (plate for section in answer.sections for plate in section.figures):
        assert plate.chart._repr_png_() and plate.description
    assert not any("nan" in text for section in answer.sections for text in section.text), [text for section in answer.sections for text in section.text if "nan" in text]
    return answer


def paired(study, scores):
    """All that an answer's first sentence needs of the findings."""
    return SimpleNamespace(pairs=paired_gains(headline(scores), study.gains, allow_partial=True))


def compared(study, scores):
    """The rows of the declared comparison of families, and its result."""
    rows = primary_rows(gain_differences(study, family_gains(study, paired(study, scores).pairs)))
    return rows, compare(rows)


FEW = ("world_xnli", "world_panx", "world_tatoeba")  # targets, to save time


def test_the_answer_on_families():
    study = STUDIES["mt5-vs-bloom"].build("mini")
    scores = simulate(study, lambda f, language: 3.0 * (f["family"] == "mt5") if "shuffled" not in f["intermediate"] else 0.0, targets=FEW)
    answer = check(answer_families(study, find(study, scores), scores, NOWHERE))
    assert "mT5 gains more" in answer.sentence and answer.sentence.startswith("In a synthetic world, over two matched sizes, two intermediate tasks, two trained targets and 10 languages")
    table = answer.sections[0].tables[0].rows.set_index("what")
    assert table.loc["all", "low"] < 3 < table.loc["all", "high"] and table.loc["shuffled labels (control)", "low"] < 0 < table.loc["shuffled labels (control)", "high"]
    assert {"nli", "qa", "world_xnli", "retrieval, raw", "all, at equal baseline"} <= set(table.index) and sum("pretraining text" in name for name in table.index) == 2
    by_hand = scores[(scores["language"] != "en") & scores["target"].isin(FEW[:2]) & (scores["metric"] == [TASKS[t].headline[0] for t in scores["target"]])].groupby("arm")["value"].mean()
    gains = {family: np.mean([by_hand[f"world-{family}{size} + {task}"] - by_hand[f"world-{family}{size}"] for size in ("", "-small") for task in ("nli", "qa")]) for family in ("mt5", "bloom")}
    assert abs(gains["mt5"] - gains["bloom"] - table.loc["all", "gain"]) < 1e-9


@pytest.mark.parametrize("effect, words", [(3.0, "mT5 gains more"), (-3.0, "BLOOM gains more"), (0.0, "the two are not told apart")])
def test_families_with_a_known_difference(effect, words):
    study = STUDIES["mt5-vs-bloom"].build("mini")
    rows, row = compared(study, simulate(study, lambda f, language: effect * (f["family"] == "mt5"), targets=FEW, draw=1))
    assert row["low"] < effect < row["high"] and words in family_sentence(rows, row, ("mT5", "BLOOM"))


def test_families_count_seeds_and_not_cells():
    study = STUDIES["mt5-vs-bloom"].build("mini")
    scores = simulate(study, lambda f, language: 0.0, targets=FEW[:2])
    luck = {0: 3.0, 1: -2.0, 2: 1.0}  # of mT5's trained runs, so that hundreds of cells are three observations
    scores["value"] += [luck[seed] if arm.startswith("world-mt5") and "+" in arm else 0.0 for arm, seed in zip(scores["arm"], scores["seed"])]
    row, (low, high) = compared(study, scores)[1], t_interval([3.0, -2.0, 1.0])
    assert row["low"] < 0 < row["high"] and row["p"] > 0.3 and abs((row["high"] - row["low"]) / (high - low) - 1) < 0.3


@pytest.mark.parametrize("slope, words", [(-8.0, "languages that are like English gain more"), (8.0, "languages that are unlike English gain more"), (0.0, "no dependence on similarity is resolved")])
def test_similarity_with_a_known_slope(slope, words):
    study = STUDIES["similarity-by-size"].build("mini")
    change = -slope / 2  # by which the slope differs between small and large
    scores = simulate(study, lambda f, language: 2.0 + (slope + (change if "small" not in f["backbone"] else 0.0)) * distance_to_english(language, "typological"), targets=FEW)
    matrices = language_matrices(language_gains(study, paired(study, scores)), "size")
    distance = np.array([distance_to_english(code, "typological") for code in matrices.languages])
    found, changed = slope_of(matrices, distance), slope_of(matrices, distance, response="with_size")
    doublings = np.mean([np.log2(study.factors[b]["parameters"] / study.factors[f"{b}-small"]["parameters"]) for b in ("world-mt5", "world-xlmr")])
    assert found.low < slope + change / 2 < found.high and changed.low - 0.5 < change / doublings < changed.high + 0.5
    sentence = similarity_sentence(study, matrices, found, changed, distance)
    assert words in sentence and (slope == 0) == ("a change with size is not resolved" in sentence) and (slope != 0) == ("the dependence weakens with size" in sentence)


def test_size_is_compared_within_families():
    study = STUDIES["similarity-by-size"].build("mini")
    scores = simulate(study, lambda f, language: (6.0 if f["family"] == "mt5" else 0.0) * distance_to_english(language, "typological"), targets=FEW[:2])  # a difference of families, whose sizes differ too
    rows = language_gains(study, paired(study, scores))
    matrices = language_matrices(rows, "size")
    distance = np.array([distance_to_english(code, "typological") for code in matrices.languages])
    found = across_languages(matrices.with_size, distance, resamples=99)
    assert abs(rows.groupby("family")["size"].mean()).max() < 1e-9 and found.low < 0 < found.high


def test_the_baseline_of_other_seeds_has_no_part_in_the_gain():
    study, slopes = STUDIES["similarity-by-size"].build("mini"), {"own_baseline": [], "other_baseline": []}
    for draw in range(4):
        scores = simulate(study, lambda f, language: 1.0, targets=FEW[:1], draw=draw, noise=8.0)
        scores["value"] += [20 * distance_to_english(language, "typological") for language in scores["language"]]  # all languages alike, so that there is nothing but noise
        matrices = language_matrices(language_gains(study, paired(study, scores)))
        for name, values in slopes.items():
            values.append(across_languages(matrices.gain, matrices[name], resamples=99).slope)
    assert np.mean(slopes["own_baseline"]) < -0.5 and np.mean(slopes["other_baseline"]) > np.mean(slopes["own_baseline"]) + 0.3


@pytest.mark.parametrize("name, answer", [("mt5-vs-bloom", answer_families), ("similarity-by-size", answer_similarity)])
def test_real_languages_one_seed_and_holes(name, answer):
    study, random = STUDIES[name].build("small"), np.random.default_rng(0)
    one = simulate(study, lambda f, language: 2.0, seeds=(0,))
    told = check(answer(study, find(study, one), one, NOWHERE))
    assert "no verdict" in told.sentence or "too few complete seeds for a verdict" in told.sentence
    three = simulate(study, lambda f, language: 2.0 + (3.0 if f["family"] == "mt5" else 0.0))
    full = check(answer(study, find(study, three), three, NOWHERE))
    if name == "mt5-vs-bloom":
        both = sum({"mt5", "bloom"} <= LANGUAGES[code].seen_by for code in REAL[1:])
        assert "that both families saw" in full.sentence and full.sections[0].tables[0].rows.iloc[0]["languages"] == both and "mT5 gains more" in full.sentence
        assert {"seen by mT5 only", "seen by neither", "prompted instead of a head"} <= set(full.sections[0].tables[0].rows["what"])
    else:
        universe = next(table for table in full.sections[2].tables if table.name == "multiverse").rows
        assert set(universe["distance"]) == {"syntactic", "phonological", "inventory", "family", "geographic", "first component"} and {"none", "all", "text in pretraining", "same script", "baseline of other seeds"} <= set(universe["covariates"])
    runs = sorted(set(three["run"]))
    kept = set(random.choice(runs, len(runs) // 2, replace=False))
    half = three[three["run"].isin(kept)]
    check(answer(study, find(study, half), half, NOWHERE))
