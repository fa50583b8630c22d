"""Answers from the logits of windows, example by example, in the way of postprocess_qa_predictions.

Source: the algorithm of huggingface/transformers, examples/pytorch/question-answering/utils_qa.py, in words of our own: of each window the 20 best first and the 20 best last tokens are paired, pairs that
make no answer are left out, the 20 best pairs of an example are kept, and each becomes a text with a probability.
"""

import numpy as np


def find_answers(examples, features, first_logits, last_logits, with_none=False, n_best=20, max_answer_length=30):
    """The text of each example by its id.

    examples: rows with id and context; features: rows with example_id and offset_mapping (None outside the context), both lists or, as the example script has them, data sets; logits: [features, tokens].
    """
    place = {example["id"]: i for i, example in enumerate(examples)}
    windows = [[] for _ in examples]
    for number, feature in enumerate(features):
        windows[place[feature["example_id"]]].append(number)
    texts, kept = {}, {}
    for example, numbers in zip(examples, windows):
        candidates, none = [], None
        for number in numbers:
            first, last, offsets = first_logits[number], last_logits[number], features[number]["offset_mapping"]
            fullest = features[number].get("token_is_max_context", None)
            nothing = first[0] + last[0]
            if none is None or nothing < none["score"]:
                none = {"offsets": (0, 0), "score": nothing, "first": first[0], "last": last[0]}
            starts = np.argsort(first)[-1:-n_best - 1:-1].tolist()
            ends = np.argsort(last)[-1:-n_best - 1:-1].tolist()
            for a in starts:
                for b in ends:
                    if a >= len(offsets) or b >= len(offsets) or offsets[a] is None or offsets[b] is None:
                        continue
                    if b < a or b - a + 1 > max_answer_length:
                        continue
                    if fullest is not None and not fullest.get(str(a), False):
                        continue
                    candidates.append({"offsets": (offsets[a][0], offsets[b][1]), "score": first[a] + last[b], "first": first[a], "last": last[b]})
        if with_none:
            candidates.append(none)
        best = sorted(candidates, key=lambda c: c["score"], reverse=True)[:n_best]
        if with_none and not any(c["offsets"] == (0, 0) for c in best):
            best.append(none)
        for c in best:
            begin, end = c.pop("offsets")
            c["text"] = example["context"][begin:end]
        if not best or (len(best) == 1 and best[0]["text"] == ""):
            best.insert(0, {"text": "empty", "first": 0.0, "last": 0.0, "score": 0.0})
        scores = np.array([c.pop("score") for c in best])
        shares = np.exp(scores - scores.max())
        for c, share in zip(best, shares / shares.sum()):
            c["probability"] = share
        if with_none:
            spoken = next(c for c in best if c["text"] != "")
            texts[example["id"]] = "" if none["first"] + none["last"] - spoken["first"] - spoken["last"] > 0 else spoken["text"]
        else:
            texts[example["id"]] = best[0]["text"]
        kept[example["id"]] = [{k: float(v) if isinstance(v, np.floating) else v for k, v in c.items()} for c in best]
    return texts
