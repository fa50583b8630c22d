"""Selection of intermediate tasks: scores and measures with known answers, and what must hold for any numbers."""

import math
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from xtransfer.core import XtransferError
from xtransfer.selection import (
    by_chance, by_measure, by_similarity, by_size, by_type, diversity, diversity_correlation, evaluate_selection, greedy_forward, leep, logme, ndcg, rank_candidates, regret_at)

scores = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1, 100), min_size=1)


def best_evidence(features, column, grid):
    """The highest log evidence per example over a grid of precisions: that of a Gaussian with the covariance F F^T / alpha + 1 / beta."""
    spread, axes = np.linalg.eigh(features @ features.T)
    alpha, beta = np.meshgrid(grid, grid)
    variances = np.maximum(spread, 0) / alpha[..., None] + 1 / beta[..., None]
    found = -0.5 * (np.log(2 * np.pi * variances) + (axes.T @ column) ** 2 / variances).mean(-1)
    covariance = features @ features.T / alpha[3, 5] + np.eye(len(features)) / beta[3, 5]
    assert math.isclose(found[3, 5], stats.multivariate_normal(np.zeros(len(column)), covariance).logpdf(column) / len(column), rel_tol=1e-6)
    return found.max()


@pytest.mark.parametrize("size", [1, 3, 12, 60], ids=["one feature", "few features", "some", "more features than examples"])
def test_logme_is_the_best_evidence_on_a_grid(size):
    random = np.random.default_rng(size)
    labels = random.integers(2, size=40)
    features = random.normal(size=(40, size)) + 0.8 * labels[:, None]
    best = np.mean([best_evidence(features, (labels == k).astype(float), 10 ** np.arange(-2, 4, 0.05)) for k in (0, 1)])
    assert -1e-4 < logme(features, labels) - best < 1e-3  # above every point of the grid (or so, where the best alpha is infinite), and close to the highest


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 4))
def test_logme_properties(seed, classes):
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(classes, size=30)])
    features = random.normal(size=(len(labels), 6)) + np.eye(6)[labels]
    found, order = logme(features, labels), random.permutation(len(labels))
    assert math.isclose(found, logme(features[order], labels[order]), rel_tol=1e-6), "the order of examples"
    assert math.isclose(found, logme(features, [f"name {k}" for k in (labels * 7) % 11]), rel_tol=1e-6), "the names of labels"
    rotation = np.linalg.qr(random.normal(size=(6, 6)))[0]
    assert math.isclose(found, logme(features @ rotation, labels), rel_tol=1e-5), "the axes of the features"
    assert math.isclose(found, logme(np.hstack([features, np.zeros((len(labels), 2))]), labels), rel_tol=1e-6), "features that never vary"


def test_logme_prefers_features_that_tell():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 40)
    noise = random.normal(size=(120, 8))
    steps = [logme(noise + strength * np.eye(8)[labels], labels) for strength in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert steps == sorted(steps) and steps[-1] - steps[0] > 0.5
    assert logme(noise + 2 * np.eye(8)[labels], random.permutation(labels)) < steps[2]


@pytest.mark.parametrize("features, labels", [(np.ones((3, 2)), [1, 1, 1]), (np.ones((3, 2)), [0, 1]), (np.array([[1.0], [np.nan]]), [0, 1])], ids=["one label", "too few", "not a number"])
def test_logme_refuses(features, labels):
    with pytest.raises(XtransferError, match="LogME needs"):
        logme(features, labels)


def test_leep_by_hand():
    old = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]])
    joint = {("x", 0): 1.4 / 3, ("x", 1): 0.6 / 3, ("y", 0): 0.1 / 3, ("y", 1): 0.9 / 3}
    given_old = {(new, k): joint[new, k] / (joint["x", k] + joint["y", k]) for new, k in joint}
    expected = np.mean([math.log(sum(given_old[new, k] * row[k] for k in (0, 1))) for new, row in zip("xxy", old)])
    assert math.isclose(leep(old, list("xxy")), expected, rel_tol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_leep_properties(seed):
    random = np.random.default_rng(seed)
    labels, old = random.integers(3, size=50), random.dirichlet(np.ones(4), size=50)
    entropy = stats.entropy(np.bincount(labels, minlength=3))
    found = leep(old, labels)
    assert -entropy - 1e-9 <= found <= 0, "no worse than the labels' frequencies (Jensen), no better than certainty"
    assert math.isclose(leep(np.repeat(old[:1], 50, 0), labels), -entropy, abs_tol=1e-9), "a head that always says the same"
    assert math.isclose(found, leep(old[:, [2, 0, 3, 1]], labels), abs_tol=1e-9), "the order of the old labels"
    assert abs(leep(np.eye(3)[labels], [f"label {k}" for k in labels])) < 1e-12, "a head that knows"
    with pytest.raises(XtransferError, match="LEEP needs"):
        leep(2 * old, labels)


@settings(max_examples=100, deadline=None)
@given(scores, st.randoms(use_true_random=False))
def test_regret_and_ndcg_properties(after, random):
    ranking = random.sample(sorted(after), len(after))
    regrets = [regret_at(k, ranking, after) for k in range(1, len(after) + 1)]
    assert regrets == sorted(regrets, reverse=True) and regrets[-1] == 0 and 0 <= regrets[0] < 100
    right = sorted(after, key=after.get, reverse=True)
    assert regret_at(1, right, after) == 0 and math.isclose(ndcg(right, after), 1) and 0 <= ndcg(ranking, after) <= 1 + 1e-12
    assert math.isclose(ndcg(ranking, after), ndcg(ranking, {c: 3 * v + 5 for c, v in after.items()}), abs_tol=1e-6), "neither scale nor level matters"
    assert math.isclose(regret_at(1, ranking, after), regret_at(1, ranking, {c: 0.01 * v for c, v in after.items()}), abs_tol=1e-6), "per cent and shares are the same"


def test_the_right_order_is_the_only_best_one():
    after = {"a": 10.0, "b": 7.0, "c": 5.0, "d": 1.0}
    values = {order: ndcg(order, after) for order in permutations(after)}
    assert max(values, key=values.get) == ("a", "b", "c", "d") and min(values, key=values.get) == ("d", "c", "b", "a") and len({round(v, 9) for v in values.values()}) > 20


@pytest.mark.parametrize("call", [lambda: regret_at(0, ["a"], {"a": 1.0}), lambda: regret_at(1, ["a"], {"a": -1.0}), lambda: regret_at(1, ["a", "b"], {"a": 1.0}), lambda: ndcg(["a", "b"], {"a": 1.0}),
                                  lambda: greedy_forward(["a"], lambda tasks: 0.0, 2), lambda: by_size({"a": 1})("b", "x", 0), lambda: diversity_correlation(pd.DataFrame({"diversity": [1.0], "worst": [1.0]}), ["worst"])])
def test_what_cannot_be_judged_is_refused_in_one_sentence(call):
    with pytest.raises(XtransferError):
        call()


def test_selectors(toys):
    assert [by_type()(c, "toy_qa", 0) for c in ("toy_qa2", "toy_pair", "toy_text")] == [3.0, 2.0, 0.0]  # the toys are of one kind; text is another
    embeddings = {(seed, task): np.array(v) for seed in (0, 1) for task, v in {"a": [1.0, seed], "b": [0.0, 1.0], "x": [1.0, 0.0]}.items()}
    near = by_similarity(embeddings)
    assert math.isclose(near("a", "x", 0), 1) and math.isclose(near("a", "x", 1), 0.5 ** 0.5) and near("b", "x", 0) == 0
    assert rank_candidates(near, ["b", "a", ("a", "b")], "x", seed=1) == ["a", ("a", "b"), "b"]
    equal = [rank_candidates(by_size(dict.fromkeys("abcdef", 1)), list(order), "x") for order in ("abcdef", "fedcba")]
    assert equal[0] == equal[1] != sorted("abcdef"), "ties do not depend on the order in which candidates are listed, nor on the alphabet"


def test_greedy_on_means_takes_the_best_single_ones_and_goes_beyond_where_sets_are_known():
    alone = {"a": 1.0, "b": 3.0, "c": 2.0}
    assert greedy_forward(tuple("abc"), lambda tasks: float(np.mean([alone[t] for t in tasks])), 3) == ("b", "c", "a")
    known = {("a", "b"): 9.0}
    assert greedy_forward(tuple("abc"), lambda tasks: known.get(tasks, float(np.mean([alone[t] for t in tasks]))), 2) == ("b", "a")


def outcomes(seeds=(0, 1, 2), targets=tuple("uvwxyz"), candidates=tuple("abcde"), noise=3.0, seed=0):
    """Scores whose candidates differ by target, and a measure that knows them up to noise."""
    random = np.random.default_rng(seed)
    truth = {(c, t): 60 + random.normal(scale=10) for c in candidates for t in targets}
    table = pd.DataFrame([{"candidate": c, "target": t, "seed": s, "value": v + random.normal(scale=1)} for (c, t), v in truth.items() for s in seeds])
    return table, {(c, t, s): v + random.normal(scale=noise) for (c, t), v in truth.items() for s in seeds}


def test_selection_is_judged_over_targets_and_seeds():
    table, measured = outcomes()
    oracle = by_measure({(r.candidate, r.target, r.seed): r.value for r in table.itertuples()})
    against = by_measure({(r.candidate, r.target, r.seed): -r.value for r in table.itertuples()})
    judged = evaluate_selection({"oracle": [oracle], "measured": [by_measure(measured)], "chance": [by_chance(d) for d in range(40)], "against": [against]}, table, ks=(1, 2, 5)).set_index(["measure", "selector"])
    assert (judged["n_targets"] == 6).all() and (judged["n_seeds"] == 3).all()
    assert judged.loc[("regret@1", "oracle"), ["value", "low", "high"]].tolist() == [0, 0, 0] and judged.loc[("ndcg", "oracle"), "value"] == 1
    assert list(judged.loc["regret@1"].sort_values("value").index) == ["oracle", "measured", "chance", "against"] and list(judged.loc["ndcg"].sort_values("value").index)[::-1] == ["oracle", "measured", "chance", "against"]
    assert (judged.loc["regret@5", "value"] == 0).all(), "all five candidates were trained"
    expected = np.mean([100 * (part["value"].max() - part["value"].mean()) / part["value"].max() for _, part in table.groupby(["target", "seed"])])
    assert abs(judged.loc[("regret@1", "chance"), "value"] - expected) < 1.5, "the mean over draws of a random choice is the mean over candidates"
    assert ((judged["low"] <= judged["value"] + 1e-9) & (judged["value"] <= judged["high"] + 1e-9)).all()
    with pytest.raises(XtransferError, match="two outcomes"):
        evaluate_selection({"oracle": [oracle]}, pd.concat([table, table]))


def test_diversity():
    vectors = {"a": np.array([1.0, 0.0]), "b": np.array([2.0, 0.0]), "c": np.array([0.0, 3.0]), "d": np.array([-1.0, 0.0])}
    assert diversity(("a",), vectors) == 0 and diversity(("a", "b"), vectors) == 0 and diversity(("a", "c"), vectors) == 1 and diversity(("a", "d"), vectors) == 2
    assert math.isclose(diversity(("a", "b", "c"), vectors), 2 / 3) and diversity(("c", "a", "b"), vectors) == diversity(("a", "b", "c"), vectors)


def test_intervals_of_the_diversity_correlation_hold_what_they_promise():
    """Of 60 tables without any relation about 95 % of the intervals hold zero; a strong one is found in all."""
    held = found = 0
    for draw in range(60):
        random = np.random.default_rng(draw)
        table = pd.DataFrame({"diversity": random.random(25), "worst": random.random(25)})
        table["gain"] = table["diversity"] + random.normal(scale=0.15, size=25)
        rows = diversity_correlation(table, ["worst", "gain"], resamples=300).set_index("column")
        held += rows.loc["worst", "low"] <= 0 <= rows.loc["worst", "high"]
        found += rows.loc["gain", "low"] > 0
        if not draw:
            assert math.isclose(rows.loc["worst", "rho"], stats.spearmanr(table["diversity"], table["worst"])[0], abs_tol=1e-12)
    assert held >= 52 and found == 60
