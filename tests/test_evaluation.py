"""Predictions equal what slow, plain implementations give; labels go by name; nothing depends on how examples are batched."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig

import xtransfer.evaluation as evaluation
from test_modeling import model_of
from xtransfer.core import XtransferError
from xtransfer.encoding import encode, make_batch
from xtransfer.evaluation import Evaluator, RankedEvaluator, predict_answers, predict_tags, score_mining, score_retrieval, sentence_vectors, text_accuracy
from xtransfer.heads import SpanHead
from xtransfer.metrics import METRICS
from xtransfer.mining import NEIGHBOURS, best_threshold, mine_pairs
from xtransfer.objectives import make_corruption
from xtransfer.spans import best_spans
from xtransfer.studies import Recipe
from xtransfer.tasks import TASKS, Examples, load_examples
from xtransfer.vectors import normalized

RECIPE = Recipe(name="test", learning_rate=0, batch_size=4, max_length=96, stride=8, max_answer_length=5)


@pytest.fixture
def tokenizer(toys):
    from xtransfer.backbones import BACKBONES

    return BACKBONES["toy-encoder"].build_tokenizer()


class Stub:
    """A model that gives every token fixed logits, whatever stands around it."""

    def __init__(self, table):
        self.table = table
        self.encoder = type("Encoder", (), {"device": torch.device("cpu")})()

    def __call__(self, batch, task):
        logits = self.table[batch.input_ids]
        return None, logits[batch.targets["tag"] != -100]


def test_tags_from_windows_equal_tags_from_one_window(tokenizer):
    """Where the logits of a word do not depend on its window, windows must not matter; where they do, the word's most central window decides."""
    rows = load_examples(TASKS["toy_tags"], "en", "train").rows
    stub = Stub(torch.from_numpy(np.random.default_rng(0).normal(size=(22, 2))))
    found = [predict_tags(stub, "toy_tags", encode(tokenizer, TASKS["toy_tags"], rows, replace(RECIPE, max_length=n, stride=s))) for n, s in ((96, 8), (8, 2), (6, 0), (11, 5))]
    assert [len(tags) for tags in found[0]] == [len(r["tokens"]) for r in rows]
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0] == [[int(stub.table[tokenizer(w, add_special_tokens=False)["input_ids"][0]].argmax()) for w in r["tokens"]] for r in rows]


def test_the_most_central_window_decides(tokenizer, monkeypatch):
    rows = [{"id": "", "tokens": list("abcdefgh"), "tags": ["O"] * 8}]
    encoded = encode(tokenizer, TASKS["toy_tags"], rows, replace(RECIPE, max_length=7, stride=2))  # windows of 5 words, 2 shared
    class Numbered(Stub):
        def __call__(self, batch, task):
            owner = torch.repeat_interleave(torch.from_numpy(batch.sequence), torch.tensor(batch.lengths))
            return None, torch.nn.functional.one_hot(owner, 4).float()[batch.targets["tag"] != -100]
    assert predict_tags(Numbered(torch.zeros(22, 2)), "toy_tags", encoded) == [[0, 0, 0, 0, 1, 1, 1, 1]]


def test_best_spans_equal_brute_force():
    rng = np.random.default_rng(3)
    for longest in (1, 2, 7, 12):
        logits, inside = rng.normal(size=(20, longest, 2)), rng.random((20, longest)) < 0.7
        for most in (1, 3, 30):
            score, first, last = best_spans(logits, inside, most)
            for w in range(20):
                spans = [(logits[w, a, 0] + logits[w, b, 1], a, b) for a in range(longest) for b in range(a, min(a + most, longest)) if inside[w, a] and inside[w, b]]
                if not spans:
                    assert score[w] == -np.inf
                else:
                    assert (score[w], first[w], last[w]) == max(spans)


class SpanStub(Stub):
    """Gives every token of every window logits by its id; the first token's are set apart."""

    def __init__(self, table, none):
        super().__init__(table)
        self.none, self.heads = none, {"x": SpanHead(1, 2, 0.0)}

    def __call__(self, batch, task):
        longest, rows, begin = batch.lengths[-1], [], 0
        for length in batch.lengths:
            row = torch.full((longest, 2), -torch.inf, dtype=self.table.dtype)
            row[:length] = self.table[batch.input_ids[begin:begin + length]]
            row[0] = self.none
            rows.append(row)
            begin += length
        return None, torch.stack(rows)


@pytest.mark.parametrize("repeat", (0, 90))
def test_answers_are_slices_of_the_context_and_the_best_of_all_windows(repeat, tokenizer):
    task = TASKS["toy_qa2"]
    rows = [r | {"context": "b c " * repeat + r["context"]} for r in load_examples(task, "en", "dev").rows]
    rows = [r | {"starts": [s + 4 * repeat for s in r["starts"]]} for r in rows]
    encoded = encode(tokenizer, task, rows, RECIPE)
    assert (len(encoded.lengths) > len(rows)) == bool(repeat)
    table = torch.from_numpy(np.random.default_rng(1).normal(size=(22, 2)))
    contexts = [r["context"] for r in rows]
    answers = predict_answers(SpanStub(table, -50.0), "x", encoded, contexts, RECIPE, allow_none=True)
    for answer, context in zip(answers, contexts):
        whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = whole["input_ids"], whole["offset_mapping"]
        spans = [(float(table[ids[a], 0] + table[ids[b], 1]), context[places[a][0]:places[b][1]]) for a in range(len(ids)) for b in range(a, min(a + 5, len(ids)))]
        top = max(s for s, _ in spans)
        assert answer in context and answer in {t for s, t in spans if s == pytest.approx(top)}


def test_no_answer_only_where_it_is_allowed_and_scores_higher(tokenizer):
    rows = load_examples(TASKS["toy_qa2"], "en", "dev").rows
    encoded, contexts = encode(tokenizer, TASKS["toy_qa2"], rows, RECIPE), [r["context"] for r in rows]
    table = torch.from_numpy(np.random.default_rng(1).normal(size=(22, 2)))
    sure = predict_answers(SpanStub(table, 50.0), "x", encoded, contexts, RECIPE, allow_none=True)
    forced = predict_answers(SpanStub(table, 50.0), "x", encoded, contexts, RECIPE, allow_none=False)
    free = predict_answers(SpanStub(table, -50.0), "x", encoded, contexts, RECIPE, allow_none=True)
    assert set(sure) == {""} and "" not in forced and forced == free


def test_masks_are_fixed(toys, tokenizer):
    rows = load_examples(TASKS["toy_text"], "en", "dev").rows
    encoded, model = encode(tokenizer, TASKS["toy_text"], rows, RECIPE), model_of(initializer_range=0.5).eval()
    with torch.no_grad():
        corrupt = make_corruption(tokenizer, "masked", RECIPE, 22)
        first = text_accuracy(model, "toy_text", encoded, corrupt)
        torch.manual_seed(77), np.random.seed(5)
        assert text_accuracy(model, "toy_text", encoded, corrupt) == first and 0 <= first <= 100


def test_labels_go_by_name_when_the_head_has_another_order(toys, tokenizer):
    trained = TASKS["toy_pair"]
    turned = replace(trained, name="turned", labels=("no", "yes"), trains_on="toy_pair")
    part = load_examples(trained, "en", "dev")
    model = model_of(initializer_range=0.5).eval()
    with torch.no_grad():  # as many examples on one side of the boundary as on the other
        logits = model(make_batch(encode(tokenizer, trained, part.rows, RECIPE), np.arange(len(part.rows))), "toy_pair")[1]
        model.heads["toy_pair"].out.bias[0] -= (logits[:, 0] - logits[:, 1]).median()
    (one, kept), (two, kept2) = (Evaluator(tokenizer, task, trained, [part], RECIPE).score(model, "best") for task in (trained, turned))
    assert [s.value for s in one] == [s.value for s in two] and [k["prediction"] for k in kept] == [k["prediction"] for k in kept2]
    right = sum(json.loads(k["prediction"]) == r["label"] for k, r in zip(kept, part.rows))
    assert one[0].value == pytest.approx(100 * right / len(part.rows)) and len({k["prediction"] for k in kept}) == 2
    with pytest.raises(XtransferError, match="'perhaps'"):
        Evaluator(tokenizer, replace(turned, labels=("no", "yes", "perhaps")), trained, [part], RECIPE)


def test_every_language_is_scored_apart(toys, tokenizer):
    task, model = TASKS["toy_tags"], model_of(initializer_range=0.5).eval()
    parts = [load_examples(task, language, "test") for language in task.languages]
    together, _ = Evaluator(tokenizer, task, task, parts, RECIPE).score(model, "last")
    alone = [s for part in parts for s in Evaluator(tokenizer, task, task, [part], RECIPE).score(model, "last")[0]]
    assert together == alone and len({s.value for s in together if s.metric == "f1"}) > 1


def test_sentence_vectors_are_means_over_the_stock_models_layer(toys, tokenizer, tmp_path):
    from transformers import AutoModel

    model = model_of(initializer_range=0.3).eval()
    model.encoder.save_pretrained(tmp_path)
    stock, sentences = AutoModel.from_pretrained(tmp_path).eval(), ["a bc", "h", "a bc", "ggg fff e d c b a"]
    found, truncated = sentence_vectors(model, tokenizer, sentences, 1, 32)
    assert truncated == 0 and sentence_vectors(model, tokenizer, sentences, 1, 4)[1] > 0
    for sentence, vector in zip(sentences, found):
        with torch.no_grad():
            states = stock(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True).hidden_states[1][0]
        np.testing.assert_allclose(vector, states.mean(0).numpy(), atol=1e-5)


def test_retrieval_on_constructed_vectors(toys):
    rows = [{"id": str(i), "query": f"q{i}", "document": f"d{i}"} for i in range(40)]
    rng = np.random.default_rng(0)
    meaning, language = rng.normal(size=(40, 16)), 30 * rng.normal(size=16)
    space = {f"q{i}": meaning[i] - language for i in range(40)} | {f"d{i}": meaning[i] + 0.1 * rng.normal(size=16) + language for i in range(40)}
    space |= {"d0": meaning[1] + language, "d1": meaning[0] + language}  # two that change places
    part = Examples(task="toy_retrieval", language="de", split="test", rows=rows, available=40, expected=None)
    scores, kept = score_retrieval(TASKS["toy_retrieval"], [part], lambda sentences: np.array([space[s] for s in sentences]))
    value = {s.metric: s.value for s in scores}
    assert value["accuracy_centred"] == pytest.approx(95) and value["accuracy"] < 80 and all(s.n == 40 and s.selection == "none" for s in scores)
    raw = [max(range(40), key=lambda j: np.dot(space[f"q{i}"], space[f"d{j}"]) / np.linalg.norm(space[f"d{j}"])) for i in range(40)]
    assert [int(k["prediction"]) for k in kept] == raw


def plain_mining(x, y):
    """Margin mining as XTREME describes it, one pair at a time."""
    similarity = [[float(np.dot(a, b)) for b in y] for a in x]
    near_x = [sorted(range(len(y)), key=lambda j: -similarity[i][j])[:4] for i in range(len(x))]
    near_y = [sorted(range(len(x)), key=lambda i: -similarity[i][j])[:4] for j in range(len(y))]
    mean_x = [np.mean([similarity[i][j] for j in near_x[i]]) for i in range(len(x))]
    mean_y = [np.mean([similarity[i][j] for i in near_y[j]]) for j in range(len(y))]

    def margin(i, j):
        return similarity[i][j] / ((mean_x[i] + mean_y[j]) / 2)
    union = [(margin(i, j), i, j) for i in range(len(x)) for j in [max(near_x[i], key=lambda j: margin(i, j))]]
    union += [(margin(i, j), i, j) for j in range(len(y)) for i in [max(near_y[j], key=lambda i: margin(i, j))]]
    kept, used_x, used_y = [], set(), set()
    for value, i, j in sorted(union, key=lambda c: -c[0]):
        if i not in used_x and j not in used_y and value > 0:
            kept.append((i, j, value)), used_x.add(i), used_y.add(j)
    return kept


@pytest.mark.parametrize("shape", ((30, 41), (41, 30), (3, 9), (1, 1), (5, 1)))
def test_mining_equals_a_plain_implementation(shape):
    rng = np.random.default_rng(sum(shape))
    x, y = (normalized(rng.normal(size=(n, 12)) + 1.5, False) for n in shape)
    found, wanted = mine_pairs(x, y), plain_mining(x, y)
    assert [(i, j) for i, j, _ in found] == [(i, j) for i, j, _ in wanted]
    np.testing.assert_allclose([v for *_, v in found], [v for *_, v in wanted], rtol=1e-9)


def test_threshold_is_the_best_on_dev():
    rng = np.random.default_rng(8)
    for _ in range(50):
        values = np.sort(rng.normal(1, 0.2, 15))[::-1]
        candidates = [(i, i, float(v)) for i, v in enumerate(values)]
        gold = {(i, i) for i in range(20) if rng.random() < (0.9 if i < 7 else 0.2)} or {(0, 0)}

        def f1(threshold):
            kept = {(i, j) for i, j, v in candidates if v >= threshold}
            return 2 * len(kept & gold) / (len(kept) + len(gold))
        chosen = best_threshold(candidates, gold)
        assert f1(chosen) == pytest.approx(max(f1(v) for v in values))
        assert not any(v == chosen for v in values[:-1]), "midway between two candidates"
    assert best_threshold([(0, 0, 1.5)], {(0, 0)}) == 1.5


def test_mining_drops_sentences_that_occur_twice_and_takes_the_threshold_from_dev(toys):
    rng = np.random.default_rng(2)
    space = {}

    def pool(name, n, twice=False):
        rows = []
        for i in range(n):
            meaning = rng.normal(size=24)
            for side, noise in (("source", 0.05), ("target", 0.05)):
                space[f"{name}{side}{i}"] = meaning + noise * rng.normal(size=24)
                rows.append({"id": f"{name}-{side}-{i}", "side": side, "text": f"{name}{side}{i}", "match": f"{name}-target-{i}" if side == "source" else ""})
        if twice:
            rows.append({"id": "again", "side": "source", "text": f"{name}source0", "match": ""})
        return Examples(task="toy_mining", language="de", split="test", rows=rows, available=len(rows), expected=None)

    def vectors(sentences):
        return np.array([space[s] for s in sentences])
    dev, test = pool("dev", 20), pool("test", 20, twice=True)
    scores, kept = score_mining(TASKS["toy_mining"], [(dev, test)], vectors)
    value = {s.metric: s.value for s in scores}
    assert value["recall"] == pytest.approx(95) and value["precision"] == 100 and {k["id"] for k in kept} == {f"test-source-{i}" for i in range(1, 20)}
    assert all(s.n == 20 for s in scores) and NEIGHBOURS == 4


class Lookup:
    """A dual encoder whose vectors follow from the last token but one of each sequence."""

    def __init__(self, table):
        self.heads, self.table = {"toy_ranked": self}, torch.nn.functional.normalize(table, dim=1)
        self.encoder = type("Encoder", (), {"device": torch.device("cpu"), "config": PretrainedConfig(hidden_size=table.shape[1])})()

    def eval(self):
        return self

    def states(self, batch):
        return batch.input_ids

    def vectors(self, states, batch):
        return self.table[states[torch.tensor(batch.lengths).cumsum(0) - 2]]


def pool_of(letters, language, relevant):
    """One query and one candidate per letter; `relevant` says what a letter asks for."""
    rows = [{"id": f"q{c}", "side": "query", "text": c, "text_pair": "", "relevant": relevant(c)} for c in letters]
    rows += [{"id": f"{language}-{c}", "side": "candidate", "text": c, "text_pair": "", "relevant": []} for c in letters]
    return Examples(task="toy_ranked", language=language, split="test", rows=rows, available=len(rows), expected=None)


@pytest.mark.parametrize("metrics", (("map@20",), ("map@20", "map")))
@pytest.mark.parametrize("tile", (1, 3, 4096))
def test_rankings_are_scored_against_the_pool_of_all_languages(metrics, tile, toys, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "TILE", tile)
    task = replace(TASKS["toy_ranked"], metrics=metrics)
    parts = [pool_of("abcd", "en", lambda c: [f"en-{c}", f"de-{c}"]), pool_of("abcd", "de", lambda c: [f"en-{c}", f"de-{c}"])]
    perfect, kept = RankedEvaluator(tokenizer, task, task, parts, RECIPE).score(Lookup(torch.eye(22)), "best")
    assert [(s.language, s.metric, s.value, s.n) for s in perfect] == [(g, m, 100.0, 4) for g in ("en", "de") for m in metrics]
    assert set(json.loads(kept[0]["prediction"])[:2]) == {"en-a", "de-a"} and len(kept) == 8
    only, _ = RankedEvaluator(tokenizer, task, task, parts, RECIPE, ["de"]).score(Lookup(torch.eye(22)), "best")
    assert only == [s for s in perfect if s.language == "de"]
    table = torch.randn(22, 6, generator=torch.Generator().manual_seed(1))
    scores, kept = RankedEvaluator(tokenizer, task, task, parts, RECIPE).score(Lookup(table), "best")
    unit, ids = torch.nn.functional.normalize(table, dim=1).double(), [f"{g}-{c}" for g in ("en", "de") for c in "abcd"]
    for entry in kept:
        letter = {c: unit[tokenizer(c, add_special_tokens=False)["input_ids"][0]] for c in "abcd"}
        wanted = [float(letter[entry["id"][1:]] @ letter[i[-1]]) for i in ids]
        found = json.loads(entry["prediction"])
        assert sorted(found) == sorted(ids) and [wanted[ids.index(i)] for i in found] == pytest.approx(sorted(wanted, reverse=True), abs=1e-6)
    values = [METRICS[s.metric].score([json.loads(k["prediction"]) for k in kept if k["language"] == s.language], [json.loads(k["reference"]) for k in kept if k["language"] == s.language])[s.metric] for s in scores]
    assert [s.value for s in scores] == values


def test_more_than_twenty_candidates_count_only_without_a_cut(toys, tokenizer):
    task = replace(TASKS["toy_ranked"], metrics=("map@20", "map"))
    rows = [{"id": "q", "side": "query", "text": "a", "text_pair": "", "relevant": ["c0"]}] + [{"id": f"c{i}", "side": "candidate", "text": "a b" if i else "c", "text_pair": "", "relevant": []} for i in range(25)]
    table = torch.zeros(22, 2)
    table[tokenizer.convert_tokens_to_ids("a")] = table[tokenizer.convert_tokens_to_ids("b")] = torch.tensor([1.0, 0.0])
    table[tokenizer.convert_tokens_to_ids("c")] = torch.tensor([-1.0, 0.0])
    part = Examples(task="toy_ranked", language="en", split="test", rows=rows, available=26, expected=None)
    scores, kept = RankedEvaluator(tokenizer, task, task, [part], RECIPE).score(Lookup(table), "best")
    assert {s.metric: s.value for s in scores} == {"map@20": 0.0, "map": pytest.approx(100 / 25)} and len(json.loads(kept[0]["prediction"])) == 20


def test_a_pool_that_does_not_fit_its_queries_is_one_sentence(toys, tokenizer):
    task = TASKS["toy_ranked"]
    with pytest.raises(XtransferError, match="query qa .* fr-a"):
        RankedEvaluator(tokenizer, task, task, [pool_of("a", "en", lambda c: ["en-a", "fr-a"])], RECIPE)
    with pytest.raises(XtransferError, match="asks for the candidates none"):
        RankedEvaluator(tokenizer, task, task, [pool_of("a", "en", lambda c: [])], RECIPE)
    with pytest.raises(XtransferError, match="1 ids stand for several candidates"):
        RankedEvaluator(tokenizer, task, task, [pool_of("aa", "en", lambda c: ["en-a"])], RECIPE)


def test_vectors_do_not_depend_on_tiles_or_batches(toys, tokenizer, monkeypatch):
    task, model = TASKS["toy_ranked"], model_of(initializer_range=0.3).eval()
    parts, scores = [load_examples(task, language, "test") for language in task.languages], []
    for tile in (7, 4096):
        monkeypatch.setattr(evaluation, "TILE", tile)
        scores.append([s.value for s in RankedEvaluator(tokenizer, task, task, parts, RECIPE).score(model, "best")[0]])
    assert scores[0] == pytest.approx(scores[1], abs=0.5) and len(scores[0]) == 3
