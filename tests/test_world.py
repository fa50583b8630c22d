"""The invented world: deterministic, covered by its tokenizer, without leaks between splits and without giveaway words."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from xtransfer.languages import LANGUAGES
from xtransfer.metrics import METRICS
from xtransfer.tasks import TASKS, load_examples
from xtransfer.world import DISTANCE_WEIGHTS, TYPOLOGIES, WH, WORLD_LANGUAGES, Entity, typological_distance, world_tokenizer
from xtransfer.world_meanings import Utterance, zone_of
from xtransfer.world_tasks import DRAWN, NLI_LABELS, SIZES, SUPERTAGS, WORLD_TASKS, sentences, supertag, world_rows

TARGETS = ("world_xnli", "world_pawsx", "world_udpos", "world_panx", "world_xquad")
TEXTS = ("text", "text_pair", "premise", "hypothesis", "sentence1", "sentence2", "context", "question", "source_sentence", "target_sentence")


def texts(row):
    """Every sentence or list of words in a row."""
    found = [row[c] for c in TEXTS if row.get(c)]
    return found + ([" ".join(row["tokens"])] if "tokens" in row else []) + (list(row["choices"]["text"]) if "choices" in row else [])


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer()


def test_distance_is_what_the_parameters_say_and_independent_of_corpus_share():
    assert abs(sum(DISTANCE_WEIGHTS.values()) - 1) < 1e-9 and abs(sum(t.share for t in TYPOLOGIES.values()) - 1) < 1e-9
    invented = [c for c in WORLD_LANGUAGES if c != "en"]
    distances = [typological_distance(c) for c in invented]
    assert [LANGUAGES[c].distances["typological"] for c in invented] == distances and typological_distance("en") == 0
    assert abs(np.corrcoef(distances, [TYPOLOGIES[c].share for c in invented])[0, 1]) < 0.1
    assert min(distances) < 0.2 and max(distances) > 0.9 and len(invented) == 10


def test_same_world_in_another_process_with_another_hash_seed():
    program = ("import hashlib, json; from xtransfer.world_tasks import WORLD_TASKS, world_rows; from xtransfer.tasks import TASKS\n"
               "rows = [world_rows(t, TASKS[t].languages[-1], 'dev') for t in WORLD_TASKS]\n"
               "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())")
    seen = {subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout.strip()
            for seed in ("1", "2")}
    here = hashlib.sha256(json.dumps([world_rows(t, TASKS[t].languages[-1], "dev") for t in WORLD_TASKS]).encode()).hexdigest()
    assert seen == {here}


@pytest.mark.parametrize("name", WORLD_TASKS)
def test_examples_keep_the_contract_and_every_word_is_in_the_vocabulary(name, tokenizer):
    task = TASKS[name]
    assert set(task.headline) <= {key for metric in task.metrics for key in METRICS[metric].keys}
    for language in task.languages:
        for split in [s for s in SIZES[name] if s != "train"]:
            examples = load_examples(task, language, split)
            assert not examples.repaired and not examples.dropped and len({row["id"] for row in examples.rows}) == len(examples.rows)
            said = [t for row in world_rows(name, language, split)[:60] for t in texts(row)]
            assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(said)["input_ids"])


def clauses(drawn):
    """Every proposition in a drawn example, however nested."""
    if isinstance(drawn, Utterance):
        return [drawn.clause]
    return [c for part in drawn for c in clauses(part)] if isinstance(drawn, (list, tuple)) and not isinstance(drawn, Entity) else []


def test_every_event_is_of_the_zone_of_its_split():
    # zones are disjoint sets of propositions; questions, qualities and what everybody knows are no events
    for name, draw in DRAWN.items():
        group = "target" if name in TARGETS + ("world_tatoeba",) else "intermediate"
        for split in SIZES[name]:
            events = [c for c in clauses(list(draw(name, split)))
                      if c.verb not in ("be", "have", "make", "use", "need") and not any(e and e.noun in WH for e in c[1:7])]
            assert len(events) > 100 and {zone_of(c) for c in events} == {f"{group}/{split}"}
    mined = {s: {row["text"] for row in world_rows("world_bucc", "qaa", s)} for s in ("dev", "test")}
    assert not mined["dev"] & mined["test"]


@pytest.mark.parametrize("language", WORLD_LANGUAGES)
def test_answers_stand_where_the_rows_say(language):
    for row in world_rows("world_xquad", language, "test"):
        for answer, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert answer and row["context"][start:start + len(answer)] == answer


def test_languages_say_the_same_meanings():
    for name, column in (("world_xnli", "label"), ("world_pawsx", "label")):
        assert len({tuple(row[column] for row in world_rows(name, c, "test")) for c in WORLD_LANGUAGES}) == 1
    tags = [sorted(t for row in world_rows("world_panx", c, "dev") for t in row["ner_tags"] if t != "O") for c in WORLD_LANGUAGES]
    assert all(t == tags[0] for t in tags)


def test_labels_are_balanced():
    for split in ("train", "dev"):
        labels = [row["label"] for row in world_rows("world_mnli", "en", split)]
        assert max(labels.count(l) for l in NLI_LABELS) - min(labels.count(l) for l in NLI_LABELS) <= 1
    empty = [not row["answers"]["text"] for row in world_rows("world_squad2", "en", "train")]
    assert 0.3 < np.mean(empty) < 0.37
    keys = [row["answerKey"] for row in world_rows("world_csqa", "en", "train")]
    assert all(0.17 < keys.count(k) / len(keys) < 0.23 for k in "ABCDE")
    assert all(len(row["choices"]["text"]) == 5 == len(set(row["choices"]["text"])) for row in world_rows("world_csqa", "en", "dev"))


def test_supertags_do_not_follow_from_the_word():
    tags = {}
    for utterance in sentences("world_ccg", "dev"):
        for word in utterance.words("en"):
            assert supertag(word, utterance) in SUPERTAGS
            tags.setdefault(word.text, set()).add(supertag(word, utterance))
    assert len(tags["brush"]) >= 2 and len(tags["doctor"]) >= 2 and len(tags["in"]) >= 2


def test_tokenizer_aligns_words_and_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for language in WORLD_LANGUAGES:
        row = world_rows("world_panx", language, "dev")[0]
        text = world_rows("world_xnli", language, "dev")[0]["premise"]
        coded = loaded(text, return_offsets_mapping=True)
        assert coded["input_ids"] == tokenizer(text)["input_ids"] and loaded.unk_token_id not in coded["input_ids"]
        joined = "".join(text[a:b] for a, b in coded["offset_mapping"])
        assert joined == text.replace(" ", "")
        words = loaded(row["tokens"], is_split_into_words=True)
        assert [w for w in dict.fromkeys(words.word_ids()) if w is not None] == list(range(len(row["tokens"])))
    pair = loaded("the dog", "a cat")["input_ids"]
    assert loaded.convert_ids_to_tokens(pair) == ["<s>", "the", "dog", "</s>", "</s>", "a", "cat", "</s>"]
    assert [loaded.bos_token_id, loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id] == [0, 1, 2, 3]
    assert loaded.mask_token_id == len(loaded) - 1


def test_the_hypothesis_alone_gives_nothing_away():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, dev = (world_rows("world_mnli", "en", split) for split in ("train", "dev"))
    count = CountVectorizer(ngram_range=(1, 2))
    seen = count.fit_transform([row["hypothesis"] for row in train])
    model = LogisticRegression(C=0.1, max_iter=100).fit(seen, [row["label"] for row in train])
    assert model.score(count.transform([row["hypothesis"] for row in dev]), [row["label"] for row in dev]) < 1 / 3 + 0.08
