"""Whitening equals its plain definition, is safe with few sentences, and stands beside the scores that were there."""

import time

import numpy as np
import pytest

from xtransfer.evaluation import score_mining, score_retrieval
from xtransfer.metrics import METRICS
from xtransfer.mining import best_threshold, mine_pairs
from xtransfer.tasks import TASKS, Examples
from xtransfer.vectors import normalized
from xtransfer.whitening import SENTENCES_PER_DIRECTION, whitened


def pairs(n, size, seed=0, spread=3.0, rank=None):
    """Vectors of n sentences in two languages, each with an offset of its own and some loud directions."""
    rng = np.random.default_rng(seed)
    meaning = rng.normal(size=(n, rank or size)) @ rng.normal(size=(rank or size, size)) * np.exp(spread * rng.normal(size=size))
    return tuple((meaning + 0.5 * meaning.std(0) * rng.normal(size=meaning.shape) * (rank is None) + 50 * rng.normal(size=size)).astype(np.float32) for _ in range(2))


def reference(first, second):
    """The left singular vectors of all centred sentences: cosines between these are cosines after whitening."""
    stacked = np.concatenate([side.astype(np.float64) - side.astype(np.float64).mean(0) for side in (first, second)])
    return np.linalg.svd(stacked, full_matrices=False)[0][:, :max(1, len(stacked) // SENTENCES_PER_DIRECTION)]


def cosines(vectors):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("n, size", ((200, 16), (40, 64), (3, 20), (33, 17)))
def test_equals_the_singular_vectors(n, size):
    first, second = pairs(n, size, spread=1.0)
    found, wanted = np.concatenate(whitened(first, second)), reference(first, second)
    assert found.dtype == np.float32 and found.shape == wanted.shape
    np.testing.assert_allclose(cosines(found), cosines(wanted), atol=2e-4)
    np.testing.assert_allclose(found.astype(np.float64).T @ found / (2 * n), np.eye(found.shape[1]), atol=1e-3)
    for side in whitened(first, second):
        np.testing.assert_allclose(side.mean(0), 0, atol=1e-3)


def test_blocks_make_no_difference(monkeypatch):
    import xtransfer.whitening as module
    first, second = pairs(50, 12)
    whole = whitened(first, second[:37])
    monkeypatch.setattr(module, "_BLOCK", 7)
    for one, other in zip(whole, whitened(first, second[:37])):
        np.testing.assert_allclose(np.abs(one), np.abs(other), atol=1e-3)


def test_a_common_distortion_changes_nothing_where_all_directions_are_kept():
    first, second = pairs(300, 24, spread=0.5)
    rng = np.random.default_rng(5)
    distortion = rng.normal(size=(24, 24)) @ np.diag(10.0 ** rng.uniform(-1, 1, size=24))
    def nearest(one, two):
        left, right = (normalized(side, False) for side in whitened(one, two))
        return (left @ right.T).argmax(1)
    bent = [(side.astype(np.float64) @ distortion + 7).astype(np.float32) for side in (first, second)]
    assert (nearest(first, second) == nearest(*bent)).mean() > 0.99 and (nearest(*bent) == np.arange(300)).mean() > 0.5
    centred = [(normalized(one, True) @ normalized(two, True).T).argmax(1) for one, two in ((first, second), bent)]
    assert (centred[0] == centred[1]).mean() < 0.8, "whereas centring depends on it"


def test_few_sentences_are_no_disaster():
    """With one direction for each sentence all would be equally far apart; the rule keeps the pairs findable."""
    first, second = pairs(30, 256, spread=0.0, rank=10)
    second = second + np.random.default_rng(1).normal(size=second.shape).astype(np.float32) * 0.5
    left, right = (normalized(side, False) for side in whitened(first, second))
    assert left.shape == (30, 15) and ((left @ right.T).argmax(1) == np.arange(30)).mean() > 0.9
    for one, two in ((np.ones((3, 5)), np.ones((2, 5))), (np.zeros((1, 4)), np.ones((1, 4))), (np.eye(2), np.eye(2))):
        assert all(np.isfinite(side).all() for side in whitened(one.astype(np.float32), two.astype(np.float32)))
    line = np.outer(np.arange(40), np.ones(8)).astype(np.float32)  # one direction only, in eight dimensions
    assert whitened(line, line)[0].shape == (40, 1)
    broken = np.full((4, 3), np.nan, dtype=np.float32)
    assert whitened(broken, broken)[0] is broken


def test_the_same_to_the_bit_and_cheap():
    first, second = pairs(1000, 1024, spread=0.5)
    began = time.process_time()
    once = whitened(first, second)
    assert time.process_time() - began < 20
    assert once[0].shape == (1000, 500) and all(np.array_equal(a, b) for a, b in zip(once, whitened(first, second)))


def test_retrieval_has_three_scores_and_the_first_two_are_what_they_were(toys):
    first, second = pairs(120, 16)
    space = {f"q{i}": v for i, v in enumerate(first)} | {f"d{i}": v for i, v in enumerate(second)}
    rows = [{"id": str(i), "query": f"q{i}", "document": f"d{i}"} for i in range(120)]
    part = Examples(task="toy_retrieval", language="de", split="test", rows=rows, available=120, expected=None)
    scores, kept = score_retrieval(TASKS["toy_retrieval"], [part], lambda sentences: np.array([space[s] for s in sentences]))
    value = {s.metric: s.value for s in scores}
    assert list(value) == ["accuracy", "accuracy_centred", "accuracy_whitened"]
    for suffix, centred in (("", False), ("_centred", True)):
        nearest = (normalized(first, centred) @ normalized(second, centred).T).argmax(1).tolist()
        assert value[f"accuracy{suffix}"] == METRICS["retrieval_accuracy"].compute(nearest, list(range(120)))["accuracy"]
        assert suffix or [int(k["prediction"]) for k in kept] == nearest
    assert value["accuracy_whitened"] > max(value["accuracy"], value["accuracy_centred"])


def test_mining_whitens_development_and_test_pools_together(toys):
    first, second = pairs(160, 16)
    space = {f"s{i}": v for i, v in enumerate(first)} | {f"t{i}": v for i, v in enumerate(second)}
    def pool(numbers, split):
        rows = [{"id": f"{side}{i}", "side": name, "text": f"{side}{i}", "match": f"t{i}" if side == "s" else ""} for side, name in (("s", "source"), ("t", "target")) for i in numbers]
        return Examples(task="toy_mining", language="de", split=split, rows=rows, available=len(rows), expected=None)
    dev, test = pool(range(60), "dev"), pool(range(60, 160), "test")
    scores, kept = score_mining(TASKS["toy_mining"], [(dev, test)], lambda sentences: np.array([space[s] for s in sentences]))
    value = {s.metric: s.value for s in scores}
    assert [m for m in value if m.startswith("f1")] == ["f1", "f1_centred", "f1_whitened"] and {"precision_whitened", "recall_whitened"} <= set(value)
    left, right = (normalized(side, False) for side in whitened(first, second))
    def mined(numbers):
        return [(f"s{numbers[i]}", f"t{numbers[j]}", v) for i, j, v in mine_pairs(left[numbers], right[numbers])]
    threshold = best_threshold(mined(range(60)), {(f"s{i}", f"t{i}") for i in range(60)})
    found = [(i, j) for i, j, v in mined(range(60, 160)) if v >= threshold]
    wanted = METRICS["pair_f1"].compute(found, [(f"s{i}", f"t{i}") for i in range(60, 160)])
    assert {key: value[f"{key}_whitened"] for key in wanted} == wanted and value["f1_whitened"] > value["f1"]
    alone, _ = score_mining(TASKS["toy_mining"], [(dev, dev)], lambda sentences: np.array([space[s] for s in sentences]))
    left, right = (normalized(side, False) for side in whitened(first[:60], second[:60]))
    assert {s.metric for s in alone} == set(value), "scored on development data, the pool is counted once"
