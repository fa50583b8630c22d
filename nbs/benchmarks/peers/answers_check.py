"""Windows with random logits for the comparison of answers, and sentences in prime numbers for that of mined pairs."""

import numpy as np
from answers import find_answers


def random_windows(windows, longest, seed=0, questions=None, shortest=20):
    """Windows of made-up contexts with random logits, in the form of both sides.

    Returns a dictionary: contexts, texts by word; examples and features as the example scripts have them; logits [windows, longest, 2], characters, nowhere and owner as this package has them.
    """
    rng = np.random.default_rng(seed)
    questions = questions or max(1, windows * 7 // 10)
    owner = np.sort(np.concatenate([np.arange(questions), rng.integers(questions, size=windows - questions)]))
    logits, characters = np.full((windows, longest, 2), -np.inf, dtype=np.float32), np.full((windows, longest, 2), -1)
    contexts, features, first, last = [], [], [], []
    known = np.array(["".join(rng.choice(list("abcdefgh"), size=rng.integers(1, 9))) for _ in range(1000)])
    for count in np.bincount(owner, minlength=questions).tolist():
        contexts.append(" ".join(known[rng.integers(1000, size=int(rng.integers(shortest, longest)) * count)].tolist()))
    for window, question in enumerate(owner.tolist()):
        size, asked = int(rng.integers(min(shortest, longest - 1), longest + 1)), int(rng.integers(1, 12))
        begins = [0, *(np.flatnonzero(np.frombuffer(contexts[question].encode(), dtype=np.uint8) == 32) + 1).tolist()]
        ends = [*(b - 1 for b in begins[1:]), len(contexts[question])]
        inside = min(max(0, size - asked - 1), len(begins))
        at = int(rng.integers(0, len(begins) - inside + 1))
        size = asked + inside + 1
        characters[window, asked:asked + inside] = np.array([*zip(begins[at:at + inside], ends[at:at + inside])]).reshape(-1, 2)
        logits[window, :size] = rng.normal(size=(size, 2)) * 3
        offsets = [None] * asked + [*zip(begins[at:at + inside], ends[at:at + inside])] + [None]
        features.append({"example_id": f"q{question}", "offset_mapping": offsets})
        first.append(logits[window, :size, 0]), last.append(logits[window, :size, 1])
    return {"contexts": contexts, "examples": [{"id": f"q{i}", "context": text} for i, text in enumerate(contexts)], "features": features, "first": first, "last": last,
            "logits": logits, "characters": characters, "nowhere": np.zeros(windows, dtype=np.int64), "owner": owner}


def ours(made, with_none, max_answer_length=30):
    """This package's answers, by id."""
    from xtransfer.spans import decode_answers

    texts = decode_answers(made["logits"], made["characters"], made["nowhere"], made["owner"], made["contexts"], max_answer_length, with_none)
    return {example["id"]: text for example, text in zip(made["examples"], texts)}


def theirs(made, with_none, max_answer_length=30, n_best=20):
    """The example script's answers, by id."""
    return find_answers(made["examples"], made["features"], made["first"], made["last"], with_none, n_best, max_answer_length)


def differing(made, with_none, n_best=20):
    """Questions on which the two differ though the script could see our answer; and those where its twenty best first and last tokens do not hold the best pair.

    "empty" is what the script writes when it finds nothing; this package writes nothing then.
    """
    mine, other = ours(made, with_none), theirs(made, with_none, n_best=n_best)
    unlike = [i for i in mine if mine[i] != (other[i] if other[i] != "empty" else "")]
    if not unlike:
        return 0, 0
    everything = theirs(made, with_none, n_best=10**6)  # every pair, as this package looks at them
    return sum(mine[i] != (everything[i] if everything[i] != "empty" else "") for i in unlike), len(unlike)


def answers_differ(seed):
    """Questions whose answer differs, over awkward numbers of windows, with and without unanswerable questions; and how many were compared."""
    wrong = counted = 0
    for number, (windows, longest, questions) in enumerate([(1, 13, 1), (7, 17, 7), (31, 64, 19), (13, 31, 2), (53, 128, 37)]):
        made = random_windows(windows, longest, seed + number, questions, shortest=3)
        for with_none in (False, True):
            wrong += differing(made, with_none)[0]
            counted += questions
    return wrong, counted


def pairs_differ(seed):
    """Mined pairs that differ from those of a plain search over all inner products; and how many sentences were compared."""
    from xtransfer.mining import mine_pairs

    rng, wrong, counted = np.random.default_rng(seed), 0, 0
    for source_size, target_size, width in [(1, 1, 3), (7, 1, 5), (13, 31, 8), (211, 97, 16), (509, 1021, 24)]:
        source, target = rng.normal(size=(source_size, width)).astype(np.float32), rng.normal(size=(target_size, width)).astype(np.float32)
        if source_size > 10:
            source[5] = source[3]  # a sentence that occurs twice
        source, target = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (source, target))
        cosine, k = source @ target.T, 4
        near, back = np.argsort(-cosine, axis=1, kind="stable")[:, :k], np.argsort(-cosine.T, axis=1, kind="stable")[:, :k]
        ahead, behind = np.take_along_axis(cosine, near, 1), np.take_along_axis(cosine.T, back, 1)
        ahead, behind = ahead / ((ahead.mean(1)[:, None] + behind.mean(1)[near]) / 2), behind / ((behind.mean(1)[:, None] + ahead_mean(cosine, k)[back]) / 2)
        pairs = [(i, int(near[i, ahead[i].argmax()])) for i in range(source_size)] + [(int(back[j, behind[j].argmax()]), j) for j in range(target_size)]
        values, found, used = np.concatenate((ahead.max(1), behind.max(1))), set(), (set(), set())
        for place in np.argsort(-values, kind="stable").tolist():
            i, j = pairs[place]
            if i not in used[0] and j not in used[1] and values[place] > 0:
                used[0].add(i), used[1].add(j), found.add((i, j))
        wrong += len(found ^ {(i, j) for i, j, _ in mine_pairs(source, target)})
        counted += source_size + target_size
    return wrong, counted


def ahead_mean(cosine, k):
    """The mean cosine of each row's nearest."""
    return np.sort(cosine, axis=1)[:, ::-1][:, :k].mean(1)
