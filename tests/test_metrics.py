"""Golden cases, properties, and agreement with independent implementations of the official scorers."""
import random
import re
import string
import unicodedata
from collections import Counter

import pytest

from xtransfer.core import XtransferError
from xtransfer.metrics import (METRICS, accuracy, as_evaluate, average_precision_at_k, chunk_f1, find_chunks, mean_average_precision, mlqa, normalize_mlqa, normalize_squad,
                               pair_f1, retrieval_accuracy, squad, squad_v2, token_accuracy)

# ---------------------------------------------------------------- independent implementations, from the published algorithms


def oracle_chunks(sentences):
    """The start and end rules of seqeval 0.0.12, one condition a line, over a flat list."""
    flat = []
    for sentence in sentences:
        flat += list(sentence) + ["O"]
    flat.append("O")
    previous, previous_type, begin, chunks = "O", "", 0, []
    for i, chunk in enumerate(flat):
        tag, type_ = chunk[0], chunk.split("-")[-1]
        end = start = False
        end |= previous == "E"
        end |= previous == "S"
        end |= previous == "B" and tag == "B"
        end |= previous == "B" and tag == "S"
        end |= previous == "B" and tag == "O"
        end |= previous == "I" and tag == "B"
        end |= previous == "I" and tag == "S"
        end |= previous == "I" and tag == "O"
        end |= previous != "O" and previous != "." and previous_type != type_
        start |= tag == "B"
        start |= tag == "S"
        start |= previous == "E" and tag == "E"
        start |= previous == "E" and tag == "I"
        start |= previous == "S" and tag == "E"
        start |= previous == "S" and tag == "I"
        start |= previous == "O" and tag == "E"
        start |= previous == "O" and tag == "I"
        start |= tag != "O" and tag != "." and previous_type != type_
        if end:
            chunks.append((previous_type, begin, i - 1))
        if start:
            begin = i
        previous, previous_type = tag, type_
    return chunks


def oracle_chunk_f1(predictions, references):
    found, gold = set(oracle_chunks(predictions)), set(oracle_chunks(references))
    correct = len(found & gold)
    precision = correct / len(found) if found else 0
    recall = correct / len(gold) if gold else 0
    return 100 * (2 * precision * recall / (precision + recall) if precision + recall else 0)


def oracle_normalize(text):
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def oracle_f1(prediction, gold):
    words, gold_words = oracle_normalize(prediction).split(), oracle_normalize(gold).split()
    same = sum((Counter(words) & Counter(gold_words)).values())
    if same == 0:
        return 0
    precision, recall = same / len(words), same / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def oracle_squad(predictions, references):
    exact = [max(oracle_normalize(p) == oracle_normalize(g) for g in golds) for p, golds in zip(predictions, references)]
    overlap = [max(oracle_f1(p, g) for g in golds) for p, golds in zip(predictions, references)]
    return 100 * sum(exact) / len(exact), 100 * sum(overlap) / len(overlap)


def oracle_squad_v2(predictions, references):
    exact, overlap = [], []
    for prediction, golds in zip(predictions, references):
        golds = [gold for gold in golds if oracle_normalize(gold)] or [""]
        exact.append(max(int(oracle_normalize(prediction) == oracle_normalize(gold)) for gold in golds))
        scores = []
        for gold in golds:
            words, gold_words = oracle_normalize(prediction).split(), oracle_normalize(gold).split()
            scores.append(int(words == gold_words) if not words or not gold_words else oracle_f1(prediction, gold))
        overlap.append(max(scores))
    return 100 * sum(exact) / len(exact), 100 * sum(overlap) / len(overlap)


ARTICLES = {"en": "a an the", "es": "un una unos unas el la los las", "de": "ein eine einen einem eines einer der die das den dem des", "vi": "của là cái chiếc những"}
MLQA_LANGUAGES = ("ar", "de", "en", "es", "hi", "vi", "zh")


def oracle_mlqa_words(text, language):
    """The words that MLQA compares: a character at a time, and articles word by word."""
    kept = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P") and c not in string.punctuation)
    if language == "ar":
        kept = kept.replace("ال", " ")
    for article in ARTICLES.get(language, "").split():
        kept = re.sub(rf"(?<!\w){article}(?!\w)", " ", kept)
    if language == "zh":
        kept = "".join(f" {c} " if "\u4e00" <= c <= "\u9fa5" else c for c in kept)
    return kept.split()


def oracle_mlqa(predictions, references, language):
    exact = overlap = 0.0
    for prediction, golds in zip(predictions, references):
        if prediction is None:
            continue
        words, best = oracle_mlqa_words(prediction, language), 0.0
        for gold in golds:
            gold_words = oracle_mlqa_words(gold, language)
            same = sum((Counter(words) & Counter(gold_words)).values())
            best = max(best, 2 * same / (len(words) + len(gold_words)) if same else 0.0)
        exact += any(words == oracle_mlqa_words(gold, language) for gold in golds)
        overlap += best
    return 100 * exact / len(references), 100 * overlap / len(references)


def oracle_average_precision(targets, ranked, k):
    """Precision at the first place of each right candidate, added up over the places."""
    ranked = ranked[:k] if k else ranked
    places = sorted(ranked.index(t) + 1 for t in set(targets) if t in ranked)
    return sum(number / place for number, place in enumerate(places, 1)) / min(len(targets), k or len(targets))


UPOS = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split()
IOB = ["O"] * 4 + [f"{mark}-{kind}" for mark in "BI" for kind in ("PER", "ORG", "LOC")]
STRANGE = IOB + ["S-PER", "E-PER", "E-LOC", ".", "B-", "S", "E", "I", "B-a-PER"]
WORDS = ["the", "a", "an", "The", "dog", "dog.", "cat", "¿qué?", "北京", "", "an-other", "'s", "«no»", "  ", "3.5"]
SPOKEN = WORDS + ["el", "La", "der", "Die", "einem", "của", "những", "الطرق", "سالم", "،", "。", "北京大学abc", "हिन्दी", "।", "\u00a0", "İ", "ß", "$5", "龥", "龦", "\U0001f600"]


def random_tags(random_source, inventory):
    gold = [[random_source.choice(inventory) for _ in range(random_source.randint(0, 9))] for _ in range(random_source.randint(1, 6))]
    gold[0].append(random_source.choice(inventory))
    predicted = [[tag if random_source.random() < 0.7 else random_source.choice(inventory) for tag in sentence] for sentence in gold]
    return predicted, gold


def random_answer(random_source, words=WORDS):
    return random_source.choice(["", " ", " "]).join(random_source.choice(words) for _ in range(random_source.randint(0, 4)))


# ---------------------------------------------------------------- golden cases


def test_pos_example_of_the_reference():
    gold = [["DET", "NOUN", "NOUN", "VERB", "ADP", "DET", "NOUN", "PUNCT"]]
    predicted = [["DET", "NOUN", "PROPN", "VERB", "ADP", "DET", "NOUN", "PUNCT"]]
    scores = chunk_f1(predicted, gold)
    assert scores["precision"] == pytest.approx(75)
    assert scores["recall"] == pytest.approx(85.7142857)
    assert scores["f1"] == pytest.approx(80)
    assert token_accuracy(predicted, gold)["token_accuracy"] == pytest.approx(87.5)


def test_lenient_iob_and_sentence_borders():
    assert chunk_f1([["I-PER", "I-PER", "O", "I-LOC"]], [["B-PER", "I-PER", "O", "B-LOC"]])["f1"] == 100
    assert find_chunks([["B-PER"], ["I-PER"]]) != find_chunks([["B-PER", "I-PER"]])


def test_single_marked_tags_never_merge():
    for tag in UPOS:
        assert len(find_chunks([[tag, tag]])) == (2 if tag in ("SCONJ", "SYM") else 1), tag


def test_ccconj_and_sconj_stay_different():  # they are one type in seqeval >= 1.0
    assert chunk_f1([["CCONJ"]], [["SCONJ"]])["f1"] == 0


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The big, dog!", "big dog"), ("¿Qué?", "¿qué"), ("a an the", ""), ("theatre", "theatre"), ("an-other", "another"), ("  x  y ", "x y"), ("THE\u00a0dog", "dog"), ("北京。", "北京。")],
)
def test_normalize_squad(text, normal):
    assert normalize_squad(text) == normal


def test_squad_golden_cases():
    assert squad(["big dog"], [["dog"]])["f1"] == pytest.approx(100 * 2 / 3)
    assert squad(["北京大学"], [["北京"]]) == {"exact_match": 0.0, "f1": 0.0}
    assert squad(["dog dog"], [["dog"]])["f1"] == pytest.approx(100 * 2 / 3)  # bags, not sets
    assert squad([""], [[""]]) == {"exact_match": 100.0, "f1": 0.0}
    assert squad_v2([""], [[""]]) == {"exact_match": 100.0, "f1": 100.0}
    assert squad_v2(["the"], [[]]) == {"exact_match": 100.0, "f1": 100.0}
    assert squad_v2([""], [["the", "dog"]]) == {"exact_match": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("text", "language", "normal"),
    [("الطرق الترابية", "ar", "طرق ترابية"), ("سالم", "ar", "س م"), ("The big, dog!", "en", "big dog"), ("la casa de las flores", "es", "casa de flores"), ("der Hund des Mannes", "de", "hund mannes"),
     ("của những người", "vi", "người"), ("北京2008奥运会ABC。", "zh", "北 京 2008 奥 运 会 abc"), ("¿Qué?", "es", "qué"), ("the Hund", "de", "the hund"), ("दिल्ली।", "hi", "दिल्ली"), ("«A»-b", "en", "ab")],
)
def test_normalize_mlqa(text, language, normal):
    assert normalize_mlqa(text, language) == normal


def test_mlqa_golden_cases():
    assert mlqa(["北京大学"], [["北京"]], "zh")["f1"] == pytest.approx(200 / 3) and squad(["北京大学"], [["北京"]])["f1"] == 0
    assert mlqa(["der Hund"], [["Hund", "Katze"]], "de") == {"exact_match": 100.0, "f1": 100.0}
    assert mlqa(["der Hund"], [["Hund"]], "en")["exact_match"] == 0  # the language is that of the answer
    assert mlqa(["die"], [["der"]], "de") == {"exact_match": 100.0, "f1": 0.0}  # both empty after normalization


@pytest.mark.parametrize("score", [squad, lambda p, r: mlqa(p, r, "en")], ids=["squad", "mlqa"])
def test_an_unanswered_question_scores_0_and_counts(score):
    assert score(["dog", None], [["dog"], ["cat"]]) == {"exact_match": 50.0, "f1": 50.0}
    assert score([None], [["the"]]) == {"exact_match": 0.0, "f1": 0.0}  # an empty answer would match
    assert score([""], [["the"]])["exact_match"] == 100


@pytest.mark.parametrize(
    ("targets", "ranked", "k", "value"),
    [([0, 3], [0, 1, 2, 3], 20, 0.75), ([0, 1, 2], [2, 5, 0, 6], 2, 0.5), ([1], [], 20, 0.0), ([1], [1, 1], None, 1.0), ([1], [2, 2, 1], 20, 1 / 3), (list(range(30)), list(range(30)), 20, 1.0),
     (list(range(4)), [9, 0, 9, 1], None, (1 / 2 + 2 / 4) / 4), ([7], [0] * 20 + [7], 20, 0.0), ([7], [0] * 20 + [7], None, 1 / 21)],
)
def test_average_precision_golden_cases(targets, ranked, k, value):
    assert average_precision_at_k(targets, ranked, k) == pytest.approx(value)


def test_one_right_candidate_gives_the_reciprocal_rank():
    assert mean_average_precision([["a", "b", "c"], ["x"], []], [["c"], ["x"], ["z"]])["map@20"] == pytest.approx(100 * (1 / 3 + 1) / 3)
    assert mean_average_precision([["a"]], [["a", "b"]], k=None) == {"map": 50.0} and METRICS["map"].score([["a"]], [["a", "b"]]) == {"map": 50.0}


def test_pairs():
    scores = pair_f1([("a", "1"), ("a", "1"), ("b", "9")], [("a", "1"), ("b", "2"), ("c", "3")])
    assert scores["precision"] == 50 and scores["recall"] == pytest.approx(100 / 3) and scores["f1"] == pytest.approx(40)
    assert pair_f1([], {("a", "1")})["f1"] == 0


# ---------------------------------------------------------------- agreement with the independent implementations


@pytest.mark.parametrize("inventory", [UPOS, IOB, STRANGE], ids=["upos", "iob", "strange"])
def test_chunk_f1_equals_the_rules(inventory):
    random_source = random.Random(0)
    for _ in range(1000):
        predicted, gold = random_tags(random_source, inventory)
        assert find_chunks(gold) == oracle_chunks(gold)
        assert chunk_f1(predicted, gold)["f1"] == pytest.approx(oracle_chunk_f1(predicted, gold), abs=1e-9)


def test_squad_equals_the_script():
    random_source = random.Random(1)
    for _ in range(500):
        size = random_source.randint(1, 5)
        predictions = [random_answer(random_source) for _ in range(size)]
        golds = [[random_answer(random_source) for _ in range(random_source.randint(1, 3))] for _ in range(size)]
        scores = squad(predictions, golds)
        assert (scores["exact_match"], scores["f1"]) == pytest.approx(oracle_squad(predictions, golds))
        golds = [gold[: random_source.randint(0, 3)] for gold in golds]
        scores = squad_v2(predictions, golds)
        assert (scores["exact_match"], scores["f1"]) == pytest.approx(oracle_squad_v2(predictions, golds))


@pytest.mark.parametrize("language", MLQA_LANGUAGES)
def test_mlqa_equals_the_rules(language):
    random_source = random.Random(4)
    for _ in range(300):
        golds = [[random_answer(random_source, SPOKEN) for _ in range(random_source.randint(1, 3))] for _ in range(random_source.randint(1, 5))]
        predictions = [random_source.choice([random_source.choice(gold).upper(), random_answer(random_source, SPOKEN), None]) for gold in golds]
        scores = mlqa(predictions, golds, language)
        assert (scores["exact_match"], scores["f1"]) == pytest.approx(oracle_mlqa(predictions, golds, language), abs=1e-9)


def test_average_precision_equals_the_rule():
    random_source = random.Random(5)
    for _ in range(1000):
        targets, ranked = random_source.sample(range(15), random_source.randint(1, 8)), [random_source.randint(0, 15) for _ in range(random_source.randint(0, 30))]
        k = random_source.choice([None, 1, 2, 5, 20])
        assert average_precision_at_k(targets, ranked, k) == pytest.approx(oracle_average_precision(targets, ranked, k), abs=1e-12)


# ---------------------------------------------------------------- properties of every metric


def random_input(form, random_source):
    if form == "label":
        size = random_source.randint(1, 20)
        return [random_source.randint(0, 3) for _ in range(size)], [random_source.randint(0, 3) for _ in range(size)]
    if form == "tags":
        return random_tags(random_source, UPOS)
    if form == "answer":
        size = random_source.randint(1, 6)
        return [random_answer(random_source) for _ in range(size)], [[random_answer(random_source) for _ in range(2)] for _ in range(size)]
    if form == "ranking":
        size = random_source.randint(1, 6)
        return [[str(random_source.randint(0, 9)) for _ in range(random_source.randint(0, 25))] for _ in range(size)], [random_source.sample("0123456789", random_source.randint(1, 4)) for _ in range(size)]
    pairs = [[(f"s{random_source.randint(0, 5)}", f"t{random_source.randint(0, 5)}") for _ in range(random_source.randint(1, 8))] for _ in range(2)]
    return pairs[0], pairs[1]


@pytest.mark.parametrize("name", list(METRICS))
def test_properties(name):
    metric, random_source = METRICS[name], random.Random(2)
    for _ in range(50):
        predictions, references = random_input(metric.form, random_source)
        scores = metric.score(predictions, references, "de")
        assert set(scores) == set(metric.keys)
        assert all(0 <= value <= 100 and type(value) is float for value in scores.values())
        if metric.form == "pairs":
            shuffled = metric.score(random_source.sample(predictions, len(predictions)), random_source.sample(references, len(references)))
        else:
            order = random_source.sample(range(len(references)), len(references))
            shuffled = metric.score([predictions[i] for i in order], [references[i] for i in order], "de")
        assert shuffled == pytest.approx(scores)


@pytest.mark.parametrize("name", list(METRICS))
def test_identity_scores_100(name):
    metric = METRICS[name]
    perfect = {"label": ([0, 1], [0, 1]), "tags": ([["NOUN", "VERB"]], [["NOUN", "VERB"]]), "answer": (["dog"], [["dog"]]), "pairs": ([(1, 2)], [(1, 2)]), "ranking": ([["a", "b"]], [["b", "a"]])}[metric.form]
    assert all(value == 100 for value in metric.score(*perfect, "de").values())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS[name].form != "pairs"])
def test_empty_and_misaligned_input_is_refused(name):
    with pytest.raises(XtransferError, match="nothing to score"):
        METRICS[name].score([], [], "de")
    one = {"label": 0, "tags": ["NOUN"], "answer": "x", "ranking": ["a"]}[METRICS[name].form]
    gold = ["x"] if METRICS[name].form == "answer" else one
    with pytest.raises(XtransferError, match="2 predictions for 1 references"):
        METRICS[name].score([one, one], [gold], "de")


def test_other_refusals():
    with pytest.raises(XtransferError, match="no gold pair"):
        pair_f1([(1, 2)], [])
    with pytest.raises(XtransferError, match="sentence 1 has 1 predicted tags for 2 tokens"):
        chunk_f1([["X"], ["X"]], [["X"], ["X", "X"]])
    with pytest.raises(XtransferError, match="empty tag"):
        chunk_f1([[""]], [["X"]])
    with pytest.raises(XtransferError, match="no sentence has a token"):
        token_accuracy([[]], [[]])
    with pytest.raises(XtransferError, match="squad_v2"):
        squad(["x"], [[]])
    with pytest.raises(XtransferError, match="list of gold answers"):
        squad_v2(["x"], ["x"])
    with pytest.raises(XtransferError, match="'fr'.*MLQA's languages are: ar, de, en, es, hi, vi, zh"):
        METRICS["mlqa"].score(["x"], [["x"]], "fr")
    with pytest.raises(XtransferError, match="no rules for answers in ''"):
        METRICS["mlqa"].score(["x"], [["x"]])
    with pytest.raises(XtransferError, match="example 0 is 3, which is no text"):
        squad([3], [["x"]])
    with pytest.raises(XtransferError, match="at least one right candidate"):
        mean_average_precision([["a"]], [[]])
    with pytest.raises(XtransferError, match="a text where a list"):
        mean_average_precision(["a"], [["a"]])
    with pytest.raises(XtransferError, match="different types"):
        accuracy(["0"], [0])
    with pytest.raises(XtransferError, match="did you mean 'chunk_f1'"):
        METRICS["chunk-f1"]
    assert retrieval_accuracy([0, 2], [0, 1])["accuracy"] == 50


# ---------------------------------------------------------------- the evaluate adapter


@pytest.mark.parametrize("name", list(METRICS))
def test_as_evaluate_gives_the_same_numbers(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric, random_source = METRICS[name], random.Random(3)
    predictions, references = random_input(metric.form, random_source)
    wanted = metric.score(predictions, references, "de")
    if metric.form == "pairs":
        predictions, references = [predictions], [references]
    spoken = {"language": "de"} if metric.by_language else {}
    assert as_evaluate(name).compute(predictions=predictions, references=references, **spoken) == pytest.approx(wanted)


def test_as_evaluate_takes_label_names():
    assert as_evaluate("accuracy").compute(predictions=["a", "b"], references=["a", "c"]) == {"accuracy": 50.0}
