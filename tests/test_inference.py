"""Statistics against a known truth: how often intervals hold it, how often tests find what is not there, and what cannot be analysed."""
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import xtransfer.catalogue  # declares the tasks of the records
from xtransfer.analysis import headline, paired_gains
from xtransfer.core import XtransferError
from xtransfer.examples import bootstrap_difference, compare_runs, example_counts
from xtransfer.inference import adjust, association, compare_ranks, cvar, equivalence, finite, paired_effect, robustness, robustness_gain, sign_test
from xtransfer.metrics import METRICS
from xtransfer.mixed_models import KnownEffects, first_component, fit_mixed, gain_rows, language_table, multiverse, paired_by_parent, parsed, partial_r2, simulate_study
from xtransfer.records import read_record
from xtransfer.studies import Contrast
from xtransfer.tasks import TASKS

OUTPUTS = Path(__file__).resolve().parents[1] / "outputs" / "world-xlmr"
LANGUAGES = ("en", "de", "es", "fr", "ru", "tr", "zh", "sw", "fi", "hi", "ar")
KEYS = {t: ("accuracy",) for t in ("qa", "ner", "nli", "pos")}
SIZES = {"small": 200, "base": 400, "large": 800}
FACTORS = {arm: {"backbone": b, "family": "toy", "parameters": p, "intermediate": i} for b, p in SIZES.items() for i, arm in (("none", b), ("qa", f"{b} + qa"))}


def study_rows(draw=0, effects=KnownEffects(), covariates=None):
    study, scores = simulate_study({f"{b} + qa": 2.0 for b in SIZES}, FACTORS, LANGUAGES, effects=effects, draw=draw)
    return gain_rows(study, paired_gains(headline(scores, KEYS), study.gains), covariates)


@pytest.fixture(scope="module")
def rows():
    return study_rows(effects=KnownEffects(distance=-10, interaction=-3, language_sd=0.5))


# ---------------------------------------------------------------- examples


def same_stage():
    """Pairs of committed runs that score the same tasks after different intermediate tasks."""
    for last in ("world_panx", "world_udpos", "world_xnli", "world_xquad", "world_tatoeba+world_bucc"):
        found = [sorted(OUTPUTS.glob(f"world_text.{arm}{last}.s0-*/predictions.parquet")) for arm in ("world_ccg.", "world_csqa.")]
        if all(found):
            yield found[0][0].parent, found[1][0].parent


@pytest.mark.parametrize(("first", "second"), list(same_stage()), ids=lambda p: p.name.rsplit(".s", 1)[0].split(".")[-1] if isinstance(p, Path) else "")
def test_difference_of_two_records_is_that_of_their_official_scores(first, second):
    scores = [{(s.task, s.language, s.metric): s.value for s in read_record(folder).scores if s.selection in ("best", "none") and s.split == "test"} for folder in (first, second)]
    for task in sorted({task for task, *_ in scores[0]}):
        for language in ("qaa", "qaj"):
            found = compare_runs(first, second, task, language, resamples=200)
            one, other = (np.mean([of_run[task, language, key] for key in TASKS[task].headline]) for of_run in scores)
            assert abs(found.difference - (one - other)) < 1e-9 and abs(found.treatment - one) < 1e-9
            assert found.low <= found.difference <= found.high and (found.p < 0.05) == (found.low > 0 or found.high < 0) or abs(found.p - 0.05) < 0.02


@pytest.mark.parametrize("key", ["f1", "precision", "recall"])
def test_chunk_counts_add_up_to_the_official_score(key):
    random = np.random.default_rng(0)
    tags = np.array(["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "NOUN", "SCONJ"])
    sentences = [[tags[random.integers(0, len(tags), n)].tolist() for n in random.integers(1, 9, 60)] for _ in range(1)][0]
    predicted = [[t if random.random() < 0.6 else str(random.choice(tags)) for t in s] for s in sentences]
    above, below = example_counts("chunk_f1", key, predicted, sentences)
    assert abs(100 * above.sum() / below.sum() - METRICS["chunk_f1"].score(predicted, sentences)[key]) < 1e-9 and len(above) == 60


def test_bootstrap_over_examples_holds_the_truth():
    random, inside, false = np.random.default_rng(1), 0, 0
    for trial in range(150):
        hard = random.random(60)
        sides = [[((random.random(60) < 0.9 - 0.6 * hard).astype(float), np.ones(60))] for _ in range(2)]
        found = bootstrap_difference(*sides, resamples=300, seed=trial)
        inside, false = inside + (found.low <= 0 <= found.high), false + (found.p < 0.05)
    assert inside >= 134 and false <= 16  # 0.1 % of binomial outcomes are beyond, at 95 and 5 %


# ---------------------------------------------------------------- tests and intervals


def test_paired_effect_holds_mean_and_standardised_mean():
    random = np.random.default_rng(2)
    found = [paired_effect(random.normal(0.5, 1, n)) for n in (3, 10) for _ in range(100)]
    assert np.mean([e.low <= 0.5 <= e.high for e in found]) > 0.91 and 0.91 < np.mean([e.d_low <= 0.5 <= e.d_high for e in found]) < 0.99
    exact = paired_effect([1, 2, 3, 4])
    assert abs(stats.nct.cdf(exact.d_z * 2, 3, exact.d_low * 2) - 0.975) < 1e-3 and abs(stats.nct.cdf(exact.d_z * 2, 3, exact.d_high * 2) - 0.025) < 1e-3


def test_signs_of_dependent_cells_are_no_independent_evidence():
    random, clusters, naive, clustered = np.random.default_rng(3), np.repeat(np.arange(8), 9), 0, 0
    for _ in range(100):
        cells = np.repeat(random.normal(0, 2, 8), 9) + random.normal(0, 1, 72)
        naive, clustered = naive + (sign_test(cells).p < 0.05), clustered + (sign_test(cells, clusters, resamples=255).p < 0.05)
    assert clustered <= 13 and naive > 30


def test_equivalence_is_rarely_claimed_at_the_margin_and_mostly_where_nothing_is():
    random = np.random.default_rng(4)
    at_margin, nothing = ([equivalence(random.normal(mean, 1, 12), 1.0).verdict for _ in range(150)] for mean in (1.0, 0.0))
    assert at_margin.count("equivalent") <= 16 and nothing.count("equivalent") > 110
    assert equivalence(np.full((3, 4), 0.1) + random.normal(0, 0.05, (3, 4)), 1.0).verdict == "equivalent" and equivalence([0.1, 0.1, 0.1], 1.0).verdict == "equivalent"


def test_corrections_are_the_textbook_ones():
    table = pd.DataFrame({"p": [0.04, 0.01, 0.03]})
    assert adjust(table, "three")["p_adjusted"].round(6).tolist() == [0.06, 0.03, 0.06]
    assert adjust(table, "three", "benjamini_hochberg")["p_adjusted"].round(6).tolist() == [0.04, 0.03, 0.04]


def test_ranks_agree_with_scipy_and_are_rarely_different_by_chance():
    random = np.random.default_rng(5)
    found = [compare_ranks(pd.DataFrame(random.normal(0, 1, (4, 4))), resamples=199, seed=i) for i in range(100)]
    assert np.mean([f.p < 0.05 for f in found]) <= 0.13 and np.mean([f.pairs["p"].min() < 0.05 for f in found]) <= 0.13
    values = pd.DataFrame(random.normal(0, 1, (10, 3)) + [0, 0.5, 1], columns=list("abc"))
    assert abs(compare_ranks(values).p_chi2 - stats.friedmanchisquare(*values.to_numpy().T).pvalue) < 1e-12 and abs(compare_ranks(values).p - compare_ranks(values).p_chi2) < 0.1
    exact = compare_ranks(pd.DataFrame([[1, 2, 3]] * 3))
    assert exact.p == pytest.approx(6 / 6**3) and exact.agreement == 1


def test_robustness_by_hand():
    values = pd.DataFrame({"arm": "a", "target": "t", "seed": np.repeat([0, 1], 3), "language": ["en", "sw", "de"] * 2, "value": [90.0, 40, 70, 90, 50, 60]})
    found = robustness(values).set_index("statistic")
    assert found["value"].round(6).to_dict() == {"mean": 55, "worst": 45, "cvar10": 45, "sd": round((30 + 10) / 2 / math.sqrt(2), 6), "low_resource": 45} and found.loc["worst", "worst_language"] == "sw"
    assert cvar([3, 1, 2] * 5, 0.1) == 1 and cvar(range(25)) == pytest.approx((0 + 1 + 0.5 * 2) / 2.5)
    both = pd.concat([values, values.assign(arm="b", value=values["value"] + 2)])
    gains = robustness_gain(both, [Contrast(treatment="b", baseline="a")]).set_index("statistic")["gain"]
    assert gains.drop("sd").round(9).eq(2).all() and abs(gains["sd"]) < 1e-9


def test_association_is_exact_for_few_languages_and_partial_is_that_of_least_squares():
    random = np.random.default_rng(6)
    table = pd.DataFrame(random.normal(0, 1, (9, 3)), columns=["gain", "distance", "tokens"])
    partial = association(table, "gain", "distance", ["tokens"], resamples=99)
    design = np.column_stack([np.ones(9), table["distance"], table["tokens"]])
    assert partial.slope == pytest.approx(np.linalg.lstsq(design, table["gain"], rcond=None)[0][1])
    few = table.head(6)
    assert association(few, "gain", "distance").exact and association(few, "gain", "distance").p * math.factorial(6) == pytest.approx(round(association(few, "gain", "distance").p * 720))
    false = 0
    for i in range(150):
        confounded = pd.DataFrame({"tokens": (tokens := random.normal(0, 1, 10)), "distance": 0.6 * tokens + random.normal(0, 0.8, 10), "gain": 2 * tokens + random.normal(0, 1, 10)})
        false += association(confounded, "gain", "distance", ["tokens"], resamples=199, seed=i).p < 0.05
    assert false <= 17


# ---------------------------------------------------------------- models


def test_gain_rows_are_complete_zero_shot_gains_with_factors_and_covariates(rows):
    assert len(rows) == 3 * 4 * 10 * 3 and "en" not in set(rows["language"]) and set(rows["log_parameters"].round(6)) == {round(math.log2(p), 6) for p in SIZES.values()}
    assert {"syntactic", "geographic", "family_distance", "same_script", "resource_class", "baseline", "intermediate"} <= set(rows) and set(rows["family"]) == {"toy"}
    more = study_rows(covariates=pd.DataFrame({"language": LANGUAGES, "fertility": range(11)}))
    assert more.loc[more["language"] == "de", "fertility"].eq(1).all()
    with pytest.raises(XtransferError, match="lack a value for ar"):
        study_rows(covariates=pd.DataFrame({"language": LANGUAGES[:-1], "fertility": range(10)}))


def test_mixed_model_finds_what_was_put_in_and_little_else(rows):
    fit = fit_mixed(rows, "gain ~ syntactic * log_parameters")
    terms, per = fit.terms.set_index("term"), fit.scales
    assert fit.converged and fit.n == 360 and fit.variances["levels"].tolist() == [4, 10, 3, 360]
    assert terms.loc["syntactic", "low"] < -10 * per["syntactic"] < terms.loc["syntactic", "high"] < 0
    assert terms.loc["syntactic:log_parameters", "low"] < -3 * per["syntactic"] * per["log_parameters"] < terms.loc["syntactic:log_parameters", "high"]
    assert terms.loc["syntactic", "df"] <= 8 and terms.loc["log_parameters", "df"] <= 8
    nothing = pd.concat([fit_mixed(study_rows(100 + i, KnownEffects(language_size_sd=0.5)), "gain ~ syntactic * log_parameters").terms for i in range(6)])
    assert (nothing.loc[nothing["term"] != "Intercept", "p"] < 0.05).sum() <= 4  # of 18


def test_a_fit_that_fails_claims_nothing(rows, monkeypatch):
    import xtransfer.mixed_models as module
    real = module._fitted
    monkeypatch.setattr(module, "_fitted", lambda *arguments: (real(*arguments)[0], False, ["lbfgs: did not converge"], "powell"))
    fit = fit_mixed(rows, "gain ~ syntactic")
    assert not fit.converged and fit.terms[["low", "high", "p"]].isna().all(axis=None) and fit.warnings[0] == "lbfgs: did not converge"


def test_a_variance_at_zero_is_told():
    fit = fit_mixed(study_rows(3, KnownEffects(seed_sd=0, run_sd=0, language_sd=2)), "gain ~ same_script")
    assert fit.singular == bool(fit.variances["at_zero"].any())


def test_languages_are_the_unit_of_the_multiverse(rows):
    table = multiverse(rows, size="log_parameters", others=["same_script"], resamples=199)  # not baseline: simulated baselines follow from distance
    assert set(table["n"]) == {10} and set(table["effect"]) == {"average", "with size"} and "first component" in set(table["distance"])
    syntactic = table[table["distance"] == "syntactic"].set_index("effect")
    assert syntactic.loc["with size", "high"] < 0 and list(table["distance"][:len(table) // 2]) == sorted(table["distance"][:len(table) // 2])
    by_hand = rows.groupby("language")["gain"].mean()
    assert np.allclose(language_table(rows).set_index("language")["gain"], by_hand)
    explained = partial_r2(rows, "gain ~ syntactic + same_script", "syntactic")
    check = association(language_table(rows), "gain", "syntactic", ["same_script"], resamples=9)
    assert explained.r2 == pytest.approx(check.r**2) and explained.low <= explained.r2 <= explained.high
    assert np.corrcoef(first_component(pd.DataFrame({"a": [0, 1, 2, 3.0], "b": [0, 1.1, 2, 2.9]})), [0, 1, 2, 3])[0, 1] > 0.99


def test_pairs_use_only_what_both_have():
    towers = {f"{m} + {i}" if i != "none" else m: {"backbone": m, "modality": m, "pair": "p", "parameters": 1, "intermediate": i, "intermediate_language": i} for m in ("text", "image") for i in ("none", "en", "sw")}
    study, scores = simulate_study({"text + en": 1.0, "text + sw": 1.0, "image + en": 1.0, "image + sw": 7.0}, towers, LANGUAGES)
    found = gain_rows(study, paired_gains(headline(scores, KEYS), study.gains))
    fit, alone = paired_by_parent(found.drop(index=found.index[(found["modality"] == "text") & (found["target"] == "qa")]))
    term = fit.terms.set_index("term").loc["modality[T.image]:intermediate_language[T.sw]"]
    assert alone == 60 and term["low"] < 6 < term["high"] and term["p"] < 0.05


# ---------------------------------------------------------------- what cannot be analysed


@pytest.mark.parametrize("call", [
    lambda rows: finite([], "x"), lambda rows: finite([1, float("nan")], "x"), lambda rows: finite([1, 1], "x", varying=True), lambda rows: finite(["a", "b"], "x"),
    lambda rows: paired_effect([1.0]), lambda rows: paired_effect([2.0, 2.0]), lambda rows: sign_test([0, 0]), lambda rows: sign_test([1, 2], ["a"]), lambda rows: equivalence([1, 2], 0),
    lambda rows: equivalence([1, float("inf")], 1), lambda rows: compare_ranks(pd.DataFrame([[1, 2], [2, 1]])), lambda rows: compare_ranks(pd.DataFrame([[1, 1, 1]] * 3)), lambda rows: cvar([]), lambda rows: cvar([1], 0),
    lambda rows: adjust(pd.DataFrame({"p": []}), "f"), lambda rows: adjust(pd.DataFrame({"p": [0.1, None]}), "f"), lambda rows: adjust(pd.DataFrame({"p": [2.0]}), "f"), lambda rows: adjust(pd.DataFrame({"p": [0.1]}), "f", "holms"),
    lambda rows: association(pd.DataFrame({"g": [1, 2, 3, 4, 5], "d": [1] * 5}), "g", "d"), lambda rows: association(pd.DataFrame({"g": [1, 2], "d": [1, 3]}), "g", "d"), lambda rows: association(pd.DataFrame({"g": [1, 2]}), "g", "d"),
    lambda rows: association(pd.DataFrame({"g": [1, 2, 3, 4, 6], "d": [1, 2, 5, 4, 3], "o": [2, 4, 10, 8, 6]}), "g", "d", ["o"]), lambda rows: bootstrap_difference([], []),
    lambda rows: bootstrap_difference([(np.ones(3), np.ones(3))], [(np.ones(4), np.ones(4))]), lambda rows: example_counts("squad", "f2", [], []), lambda rows: robustness(pd.DataFrame({"language": ["en"]})),
    lambda rows: fit_mixed(rows, "gain ~ family"), lambda rows: fit_mixed(rows, "gain ~ syntatic"), lambda rows: fit_mixed(rows, "gain"), lambda rows: fit_mixed(rows.head(3), "gain ~ syntactic"),
    lambda rows: fit_mixed(rows[rows["seed"] == 0], "gain ~ syntactic"), lambda rows: fit_mixed(rows.assign(gain=np.nan), "gain ~ syntactic"), lambda rows: fit_mixed(rows.assign(again=rows["syntactic"]), "gain ~ syntactic + again"),
    lambda rows: language_table(rows[rows["language"].isin(["de", "sw"])]), lambda rows: multiverse(rows, ["nearness"]), lambda rows: partial_r2(rows, "gain ~ syntactic", "script"), lambda rows: paired_by_parent(rows), lambda rows: parsed("gain ~ a ** b"),
])
def test_bad_input_is_answered_with_one_sentence(rows, call):
    with pytest.raises(XtransferError) as caught:
        call(rows)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", '".'))
