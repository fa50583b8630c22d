"""Mining and retrieval in the way of XTREME's utils_retrieve.py (itself after LASER): faiss in both directions, then margins pair by pair.

Source: the algorithm of google-research/xtreme, third_party/utils_retrieve.py (knnCPU, score_candidates, mine_bitext with retrieval "max" and margin "ratio"), in words of our own; reading and writing of text files is left out.
"""

import faiss
import numpy as np


def flat_neighbours(queries, pool, k):
    """Cosines and numbers of the k nearest of each query, from a flat faiss index."""
    index = faiss.IndexFlatIP(pool.shape[1])
    index.add(pool)
    return index.search(queries, k)


def margins(queries, pool, near, mean_query, mean_pool):
    """The ratio margin of each candidate, one pair after the other."""
    found = np.zeros(near.shape)
    for i in range(near.shape[0]):
        for j in range(near.shape[1]):
            k = near[i, j]
            found[i, j] = queries[i].dot(pool[k]) / ((mean_query[i] + mean_pool[k]) / 2)
    return found


def mine(source, target, k=4):
    """Pairs one to one by margin, best first: (source, target, margin)."""
    ahead_cosine, ahead = flat_neighbours(source, target, min(k, len(target)))
    behind_cosine, behind = flat_neighbours(target, source, min(k, len(source)))
    mean_source, mean_target = ahead_cosine.mean(axis=1), behind_cosine.mean(axis=1)
    forward, backward = margins(source, target, ahead, mean_source, mean_target), margins(target, source, behind, mean_target, mean_source)
    best_forward = ahead[np.arange(len(source)), forward.argmax(axis=1)]
    best_backward = behind[np.arange(len(target)), backward.argmax(axis=1)]
    pairs = np.stack((np.concatenate((np.arange(len(source)), best_backward)), np.concatenate((best_forward, np.arange(len(target))))), axis=1)
    scores = np.concatenate((forward.max(axis=1), backward.max(axis=1)))
    seen_source, seen_target, found = set(), set(), []
    for i in np.argsort(-scores):
        a, b = pairs[i]
        if a not in seen_source and b not in seen_target:
            seen_source.add(a), seen_target.add(b)
            if scores[i] > 0:
                found.append((int(a), int(b), float(scores[i])))
    return found


def flat_margins(source, target, k=4):
    """The same pairs from the same two searches, with margins and choice in arrays: what a careful user of faiss would write."""
    ahead_cosine, ahead = flat_neighbours(source, target, min(k, len(target)))
    behind_cosine, behind = flat_neighbours(target, source, min(k, len(source)))
    mean_source, mean_target = ahead_cosine.mean(axis=1), behind_cosine.mean(axis=1)
    forward, backward = ahead_cosine / ((mean_source[:, None] + mean_target[ahead]) / 2), behind_cosine / ((mean_target[:, None] + mean_source[behind]) / 2)
    here, there = np.arange(len(source)), np.arange(len(target))
    pairs = np.stack((np.concatenate((here, behind[there, backward.argmax(1)])), np.concatenate((ahead[here, forward.argmax(1)], there))), axis=1)
    scores = np.concatenate((forward.max(1), backward.max(1)))
    seen_source, seen_target, found = set(), set(), []
    for i in np.argsort(-scores).tolist():
        a, b = pairs[i].tolist()
        if a not in seen_source and b not in seen_target and scores[i] > 0:
            seen_source.add(a), seen_target.add(b)
            found.append((a, b, float(scores[i])))
    return found
