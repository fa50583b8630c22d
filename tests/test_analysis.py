"""Gains and intervals against studies whose truth is known."""
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from xtransfer.analysis import (by_language, chance_level, correlation_with_distance, estimate, headline, negative_transfer_rate, paired_gains, runs_at_chance, score_table, simulate_scores, t_interval,
                                transfer_gain, transfer_gap)
from xtransfer.core import XtransferError
from xtransfer.studies import Contrast

KEYS = {"qa": ("accuracy",), "ner": ("accuracy",), "retrieval": ("accuracy",)}
NLI, MLM = Contrast(treatment="nli", baseline="none"), Contrast(treatment="mlm", baseline="none")


@pytest.fixture(scope="module")
def scores():
    return simulate_scores({"nli": {"qa": 4.0, "ner": 0.0, "retrieval": -6.0}, "mlm": {"qa": 0.0, "ner": 0.5, "retrieval": 9.0}}, retrieval=("retrieval",))


@pytest.fixture(scope="module")
def values(scores):
    return headline(scores, KEYS)


def gain_of(table, treatment, target):
    return table[(table["treatment"] == treatment) & (table["target"] == target)].iloc[0]


# ---------------------------------------------------------------- the interval


def simulated_coverage(seeds, languages, seed_sd, language_sd, truth=2.0, studies=200):
    random, inside, zero_inside = np.random.default_rng(7), 0, 0
    for study in range(studies):
        matrix = truth + random.normal(0, seed_sd, (seeds, 1)) + random.normal(0, language_sd, (1, languages)) + random.normal(0, 1, (seeds, languages))
        row = estimate([matrix], resamples=300, seed=study)
        inside += row["low"] <= truth <= row["high"]
        zero_inside += row["low"] <= 0 <= row["high"]
    return inside / studies, zero_inside / studies


@pytest.mark.parametrize(("seeds", "languages", "seed_sd", "language_sd"), [(3, 6, 1.5, 1.5), (3, 6, 3, 0.3), (3, 6, 0.3, 3), (5, 12, 1, 1), (3, 40, 1, 2)])
def test_coverage(seeds, languages, seed_sd, language_sd):
    inside, _ = simulated_coverage(seeds, languages, seed_sd, language_sd)
    assert 0.90 <= inside <= 0.99


def test_a_large_gain_is_resolved_and_no_gain_is_not():
    _, zero_in_null = simulated_coverage(3, 10, 1, 1, truth=0.0)
    _, zero_in_large = simulated_coverage(3, 10, 1, 1, truth=8.0)
    assert zero_in_null >= 0.90 and zero_in_large <= 0.05


def test_full_pipeline_covers_the_truth():
    inside = total = 0
    for draw in range(40):
        table = transfer_gain(headline(simulate_scores({"nli": {"qa": 3.0, "ner": -1.0}}, draw=draw), KEYS), [NLI], resamples=300)
        for target, truth in {"qa": 3.0, "ner": -1.0, "average": 1.0}.items():
            row = gain_of(table, "nli", target)
            inside, total = inside + (row["low"] <= truth <= row["high"]), total + 1
    assert inside / total >= 0.90


def test_t_interval_is_students():
    from scipy import stats

    sample = [1.0, 4.0, 2.5, 3.0]
    assert t_interval(sample) == pytest.approx(stats.t.interval(0.95, 3, np.mean(sample), stats.sem(sample)))
    assert np.isnan(t_interval([1.0])).all()


def test_the_chosen_interval_is_the_widest_and_can_be_chosen():
    matrix = np.array([[0.0, 1.0, 5.0], [2.0, 3.0, 6.0], [1.0, 1.0, 9.0]])
    row = estimate([matrix])
    widths = {name: row[f"high_{name}"] - row[f"low_{name}"] for name in ("bootstrap", "t_seeds", "t_languages")}
    assert row["method"] == max(widths, key=widths.get) and row["high"] - row["low"] == max(widths.values())
    for name in widths:
        assert estimate([matrix], interval=name)["low"] == row[f"low_{name}"]


def test_one_seed_gives_no_verdict(scores):
    table = transfer_gain(headline(scores[scores["seed"] == 0], KEYS), [NLI])
    assert set(table["verdict"]) == {"too few seeds"} and set(table["method"]) == {"languages only"}
    assert np.isfinite(table["low"]).all()


def test_one_seed_and_one_language(scores):
    one = headline(scores[(scores["seed"] == 0) & scores["language"].isin(["en", "de"])], KEYS)
    row = gain_of(transfer_gain(one, [NLI]), "nli", "qa")
    assert np.isnan(row["low"]) and row["verdict"] == "too few seeds" and np.isfinite(row["gain"])


# ---------------------------------------------------------------- what a gain is


def test_gain_is_the_mean_of_paired_differences(values):
    table = transfer_gain(values, [NLI, MLM])
    for treatment in ("nli", "mlm"):
        for target in KEYS:
            wide = values[(values["target"] == target) & (values["language"] != "en")].pivot(index=["seed", "language"], columns="arm", values="value")
            row = gain_of(table, treatment, target)
            assert row["gain"] == pytest.approx((wide[treatment] - wide["none"]).mean())
            assert (row["n_seeds"], row["n_languages"], row["n_pairs"], row["n_missing"], row["n_targets"]) == (3, 6, 18, 0, 1)


def test_averages_weigh_targets_equally_and_retrieval_is_apart(values):
    table = transfer_gain(values, [NLI])
    each = {target: gain_of(table, "nli", target)["gain"] for target in KEYS}
    assert gain_of(table, "nli", "average")["gain"] == pytest.approx(np.mean(list(each.values())))
    without = gain_of(table, "nli", "average_without_retrieval")
    assert without["gain"] == pytest.approx((each["qa"] + each["ner"]) / 2) and without["n_targets"] == 2
    assert "average_without_retrieval" not in set(transfer_gain(values[values["target"] != "retrieval"], [NLI])["target"])
    uneven = values[(values["target"] != "qa") | values["language"].isin(["en", "de"])]  # one zero-shot language still weighs one target
    table = transfer_gain(uneven, [NLI])
    each = {target: gain_of(table, "nli", target)["gain"] for target in KEYS}
    assert gain_of(table, "nli", "average")["gain"] == pytest.approx(np.mean(list(each.values())))


def test_english_is_never_in_the_zero_shot_mean(values):
    moved = values.assign(value=np.where((values["language"] == "en") & (values["arm"] == "nli"), 0.0, values["value"]))
    before, after = transfer_gain(values, [NLI]), transfer_gain(moved, [NLI])
    assert list(before["gain"]) == list(after["gain"]) and (after["english_gain"] < -50).all()


def test_zero_gain_contains_zero():
    same = headline(simulate_scores({"nli": {"qa": 0.0}}, seed_sd=0, language_sd=0), KEYS)
    row = gain_of(transfer_gain(same, [NLI]), "nli", "qa")
    assert row["low"] < 0 < row["high"] and row["verdict"] == "not resolved"
    identical = same.assign(value=same.groupby(["seed", "language"])["value"].transform("first"))
    row = gain_of(transfer_gain(identical, [NLI]), "nli", "qa")
    assert row["gain"] == row["low"] == row["high"] == 0 and row["verdict"] == "not resolved"


def test_order_of_rows_does_not_matter(values):
    shuffled = values.sample(frac=1, random_state=3)
    for function in (lambda v: transfer_gain(v, [NLI, MLM], resamples=200), score_table, transfer_gap, lambda v: correlation_with_distance(by_language(v, [NLI]), resamples=100)):
        pd.testing.assert_frame_equal(function(values), function(shuffled))


def test_swapping_the_arms_flips_the_sign(values):
    forward = gain_of(transfer_gain(values, [NLI]), "nli", "qa")
    backward = gain_of(transfer_gain(values, [Contrast(treatment="none", baseline="nli")]), "none", "qa")
    assert backward["gain"] == pytest.approx(-forward["gain"]) and {forward["verdict"], backward["verdict"]} in ({"helps", "hurts"}, {"not resolved"})


# ---------------------------------------------------------------- what is missing


def drop(values, **cell):
    return values[~np.logical_and.reduce([values[column] == value for column, value in cell.items()])]


def test_a_missing_cell_is_counted_and_its_pair_left_out(values):
    partial = drop(values, arm="none", target="qa", seed=1, language="sw")
    row = gain_of(transfer_gain(partial, [NLI]), "nli", "qa")
    wide = partial[(partial["target"] == "qa") & (partial["language"] != "en")].pivot(index=["seed", "language"], columns="arm", values="value")
    assert row["gain"] == pytest.approx((wide["nli"] - wide["none"]).dropna().mean())
    assert row["n_missing"] == 1 and row["n_pairs"] == 17 and row["partial"]
    assert not gain_of(transfer_gain(partial, [NLI]), "nli", "ner")["partial"]
    assert gain_of(transfer_gain(partial, [NLI]), "nli", "average")["n_missing"] == 1


def test_a_missing_seed_is_counted(values):
    row = gain_of(transfer_gain(drop(values, arm="nli", target="qa", seed=2), [NLI]), "nli", "qa")
    assert row["n_missing"] == 6 and row["n_seeds"] == 2 and row["n_missing_english"] == 1


def test_a_missing_target_stops_unless_partial_is_allowed(values):
    partial = drop(values, arm="nli", target="qa")
    with pytest.raises(XtransferError, match="nli against none has no complete pair for qa"):
        transfer_gain(partial, [NLI])
    table = transfer_gain(partial, [NLI], allow_partial=True)
    row = gain_of(table, "nli", "qa")
    assert row["verdict"] == "missing" and np.isnan(row["gain"]) and row["n_missing"] == 18
    average = gain_of(table, "nli", "average")
    assert average["n_targets"] == 2 and average["partial"] and average["n_missing"] == 18


def test_a_missing_arm_stops_unless_partial_is_allowed(values):
    partial = drop(values, arm="nli")
    with pytest.raises(XtransferError, match="no scores of arm 'nli'"):
        transfer_gain(partial, [NLI, MLM])
    table = transfer_gain(partial, [NLI, MLM], allow_partial=True)
    assert set(table.loc[table["treatment"] == "nli", "verdict"]) == {"missing"} and "missing" not in set(table.loc[table["treatment"] == "mlm", "verdict"])
    assert by_language(partial, [NLI, MLM], allow_partial=True).query("treatment == 'nli'")["gain"].isna().all()


def test_tables_count_what_is_missing(values):
    partial = drop(values, arm="nli", target="qa", seed=2)
    table = score_table(partial).set_index(["arm", "target"])
    assert table.loc[("nli", "qa"), "n_missing"] == 7 and table.loc[("none", "qa"), "n_missing"] == 0 and table.loc[("nli", "qa"), "n_seeds"] == 2
    assert by_language(partial, [NLI]).query("target == 'qa'")["n_missing"].eq(1).all()


def test_capped_is_carried_to_every_table(values):
    capped = values.assign(capped=(values["target"] == "qa") & (values["arm"] == "none") & (values["language"] == "de"))
    assert gain_of(transfer_gain(capped, [NLI]), "nli", "qa")["capped"] and gain_of(transfer_gain(capped, [NLI]), "nli", "average")["capped"]
    assert not gain_of(transfer_gain(capped, [NLI]), "nli", "ner")["capped"]
    languages = by_language(capped, [NLI])
    assert languages.query("capped")[["target", "language"]].values.tolist() == [["qa", "de"]]
    assert correlation_with_distance(languages, resamples=20).query("capped")["target"].tolist() == ["qa"]
    assert negative_transfer_rate(languages)["capped"].tolist() == [True]
    assert score_table(capped).query("capped")[["arm", "target"]].values.tolist() == [["none", "qa"]]
    assert transfer_gap(capped).query("capped")[["arm", "target"]].values.tolist() == [["none", "qa"]]


# ---------------------------------------------------------------- headline


def test_headline_averages_keys_and_chooses_split_and_selection(scores):
    rows = scores[scores["target"] == "qa"].assign(metric="f1")
    both = pd.concat([rows, rows.assign(metric="exact_match", value=rows["value"] - 10), rows.assign(selection="last", value=0.0), rows.assign(split="dev", value=1.0)])
    table = headline(both, {"qa": ("exact_match", "f1")})
    assert table["value"].to_numpy() == pytest.approx(headline(rows, {"qa": ("f1",)})["value"].to_numpy() - 5)
    assert (headline(both, {"qa": ("f1",)}, selection="last")["value"] == 0).all() and (headline(both, {"qa": ("f1",)}, split="dev")["value"] == 1).all()


def test_headline_refuses_what_would_be_another_quantity(scores):
    qa = scores[scores["target"] == "qa"]
    with pytest.raises(XtransferError, match="not all headline keys"):
        headline(pd.concat([qa, qa.iloc[:5].assign(metric="f1")]), {"qa": ("accuracy", "f1")})
    with pytest.raises(XtransferError, match="more than one value"):
        headline(pd.concat([qa, qa.iloc[:1]]), KEYS)
    with pytest.raises(XtransferError, match="not a number"):
        headline(qa.assign(value=float("nan")), KEYS)
    with pytest.raises(XtransferError, match="no scores with split 'tset'"):
        headline(qa, KEYS, split="tset")
    with pytest.raises(XtransferError, match="unknown task 'qa'"):
        headline(qa)
    with pytest.raises(XtransferError, match="pass headline"):
        transfer_gain(qa, [NLI])
    with pytest.raises(XtransferError, match="no contrasts"):
        transfer_gain(headline(qa, KEYS), [])


# ---------------------------------------------------------------- languages


def test_by_language_and_negative_rate(values):
    table = by_language(values, [NLI]).set_index(["target", "language"])
    wide = values[(values["target"] == "qa") & (values["language"] == "sw")].pivot(index="seed", columns="arm", values="value")
    assert table.loc[("qa", "sw"), "gain"] == pytest.approx((wide["nli"] - wide["none"]).mean()) and table.loc[("qa", "sw"), "distance"] == 0.5405
    rate = negative_transfer_rate(by_language(values, [NLI])).iloc[0]
    zero_shot = table[table.index.get_level_values("language") != "en"]
    assert rate["rate"] == pytest.approx((zero_shot["gain"] < 0).mean()) and rate["n_cells"] == 18 and rate["worst_gain"] == zero_shot["gain"].min()


def test_correlation_needs_languages_and_distances(values):
    languages = by_language(values, [NLI])
    assert correlation_with_distance(languages[languages["language"].isin(["en", "de", "es", "ru"])])["rho"].isna().all()
    rising = languages.assign(gain=languages["distance"])
    row = correlation_with_distance(rising, resamples=50).iloc[0]
    assert row["rho"] == pytest.approx(1) and row["n_languages"] == 6
    holes = rising.assign(distance=rising["distance"].where(rising["language"] != "sw"))
    assert correlation_with_distance(holes, resamples=50)["n_without_distance"].eq(1).all()
    with pytest.raises(XtransferError, match="unknown distance"):
        by_language(values, [NLI], distance="sintactic")


def test_runs_at_chance(values):
    assert chance_level("no such task") == 0
    flat = values.assign(value=np.where(values["arm"] == "nli", 50.5, 90.0))
    found = runs_at_chance(flat, chance={target: 50 for target in KEYS})
    assert set(found["arm"]) == {"nli"} and len(found) == 9


def test_no_torch():
    check = "import sys, xtransfer.analysis; print([m for m in ('torch', 'transformers', 'datasets', 'evaluate') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_pairs_list_what_was_expected(values):
    pairs = paired_gains(drop(values, arm="nli", target="qa", seed=0, language="ja"), [NLI])
    assert len(pairs) == 3 * 3 * 7 and pairs.loc[~pairs["complete"], ["target", "seed", "language"]].values.tolist() == [["qa", 0, "ja"]]
