"""The world's English tasks in other languages: as many examples, labels and answers right, no meaning shared, errors as stated."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import xtransfer.catalogue  # noqa: F401  registers tasks and modifiers
import xtransfer.world_variants as variants
from test_world import clauses
from xtransfer.core import XtransferError, digest
from xtransfer.studies import Recipe, Run, Stage
from xtransfer.tasks import MODIFIERS, TASKS, load_examples
from xtransfer.world import SCRIPTS, STEMS, TYPOLOGIES, WH, Entity, lexicons, say, text_of
from xtransfer.world_meanings import Utterance, canonical, relation, zone_of
from xtransfer.world_tasks import DRAWN, ENGLISH_TASKS, NLI_LABELS, SIZES, world_rows
from xtransfer.world_variants import MACHINE, Translator, composed, edits, error_rate, meaning, translations

KINDS = ("native-qaa-qad", "translated-qaa-qad", "roundtrip-qaa-qad", "native-en-qai-qaj", "translated-en-qac")
SMALL = {task: {"train": 90, "dev": 30} for task in ENGLISH_TASKS}


@pytest.fixture
def small(monkeypatch):
    """A world whose English tasks are small, so that every test draws its own."""
    caches = [variants.translations, variants.composed, variants.error_rate, variants.world_rows, *DRAWN.values()]
    def forget():
        for cache in caches:
            cache.cache_clear()
        for task in list(TASKS._variants):
            TASKS._variants.pop(task)
    forget()
    for task, sizes in SMALL.items():
        monkeypatch.setitem(SIZES, task, sizes)
    yield
    forget()


def examples(name, split):
    """The examples of a variant, by language."""
    return {code: load_examples(TASKS[name], code, split) for code in TASKS[name].train_languages}


@pytest.mark.parametrize("task", ENGLISH_TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_examples_in_all_as_in_english_and_the_same_columns(small, task, kind):
    variant = TASKS[f"{task}@{kind}"]
    assert variant.trains_on == variant.name and variant.languages == variant.train_languages and (variant.format, variant.labels, variant.metrics) == (TASKS[task].format, TASKS[task].labels, TASKS[task].metrics)
    for split in ("train", "dev"):
        parts = examples(variant.name, split)
        counts = [len(part.rows) for part in parts.values()]
        assert sum(counts) == SMALL[task][split] and max(counts) - min(counts) <= 1
        assert all(part.repaired == part.dropped == part.unlabelled == 0 and part.note.startswith("synthetic; ") for part in parts.values())
        assert {frozenset(row) for code in parts for row in variant.load(code, split)} == {frozenset(world_rows(task, "en", split)[0])}
    with pytest.raises(XtransferError, match="no test split"):
        load_examples(variant, variant.languages[0], "test")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_as_balanced_as_in_english(small, kind):
    parts = examples(f"world_mnli@{kind}", "train")
    counts = {code: [sum(row["label"] == label for row in part.rows) for label in NLI_LABELS] for code, part in parts.items()}
    assert all(max(n) - min(n) <= (1 if kind.startswith("native") and code != "en" else 12) for code, n in counts.items())
    total = np.sum(list(counts.values()), axis=0)
    assert max(total) - min(total) <= (12 if "-en-" in kind else 2)
    if kind.startswith(("translated", "roundtrip")):
        english = {row["id"]: row["label"] for row in world_rows("world_mnli", "en", "train")}
        for part in examples(f"world_mnli@{kind}", "train").values():
            assert all(row["label"] == english[re.sub("^q..-", "", row["id"])] for row in part.rows)


def test_no_meaning_is_shared_with_english_or_with_targets(small):
    for task in ENGLISH_TASKS:
        for split in ("train", "dev"):
            made, _ = composed(task, split, "qad")
            assert not {meaning(item) for item in made} & {meaning(item) for item in DRAWN[task](task, split)}
            events = [c for c in clauses(list(made)) if c.verb not in ("be", "have", "make", "use", "need") and not any(e and e.noun in WH for e in c[1:7])]
            assert events and {zone_of(c) for c in events} == {f"intermediate/{split}"}  # targets draw from zones of their own
    for target in ("world_xnli", "world_pawsx", "world_udpos", "world_panx", "world_xquad", "world_tatoeba"):
        told = {canonical(c) for c in clauses(list(DRAWN[target](target, "test"))) if c.verb != "be" and not any(e and e.noun in WH for e in c[1:7])}
        assert not told & {canonical(c) for c in events}


def test_a_smaller_share_is_the_beginning_of_a_larger_one_and_does_not_depend_on_the_others(small):
    alone, shared = (load_examples(TASKS[f"world_ccg@native-{codes}"], "qad", "train").rows for codes in ("qad", "qaa-qad"))
    assert alone[:len(shared)] == shared and len(alone) == 2 * len(shared)
    alone, shared = (load_examples(TASKS[f"world_ccg@translated-{codes}"], "qad", "train").rows for codes in ("qad", "qaa-qad"))
    assert shared == alone[1::2]
    mixed = load_examples(TASKS["world_ccg@translated-en-qac"], "en", "train").rows
    assert mixed == load_examples(TASKS["world_ccg"], "en", "train").rows[::2]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_spans_of_whole_words(small, kind):
    answered = 0
    for part in examples(f"world_squad2@{kind}", "train").values():
        for row in part.rows:
            for answer, start in zip(row["answers"], row["starts"], strict=True):
                context, end = row["context"], start + len(answer)
                assert context[start:end] == answer and (start == 0 or context[start - 1] == " ") and context[end] in " ."
                answered += 1
    assert 0.5 < answered / SMALL["world_squad2"]["train"] < 0.85


@pytest.mark.parametrize("path", (("qad",), ("qai",), ("qac", "en"), ("qaj", "en")))
def test_roles_are_those_of_the_english_words(small, path):
    """Every constituent of a translation has the tags of its English words that are still there, and content words are never lost."""
    for _, item, made in translations("world_ccg", "train", path):
        told = {tag: n for tag, n in Counter(variants.say_row("world_ccg", "en", item)["tags"]).items() if tag not in ("NP/N", "S[be]", ".") and not tag.startswith("PP/NP")}
        kept = Counter(variants.say_row("world_ccg", path[-1], made)["tags"])
        assert {tag: kept[tag] for tag in told} == told
    for _, item, made in translations("world_squad2", "train", path):
        right, said = variants.say_row("world_squad2", path[-1], item)["answers"], variants.say_row("world_squad2", path[-1], made)["answers"]
        assert [len(a.split()) - len(b.split()) for a, b in zip(right["text"], said["text"], strict=True)] in ([], [0], [1], [-1])  # an article within a name apart


def test_choices_differ(small):
    for kind in KINDS:
        assert all(len(set(row["choices"])) == 5 for part in examples(f"world_csqa@{kind}", "train").values() for row in part.rows)


def test_without_errors_a_translation_is_what_the_language_says(small, monkeypatch):
    monkeypatch.setattr(variants, "MACHINE", replace(MACHINE, source_order=0.0, wrong_word=0.0, dropped=0.0))
    for path in (("qad",), ("qaj",), ("qaa", "en")):
        for task in ENGLISH_TASKS:
            assert [variants.say_row(task, path[-1], made) for *_, made in translations(task, "dev", path)] == [variants.say_row(task, path[-1], item) for _, item, _ in translations(task, "dev", path)]
            assert error_rate(task, path) == 0
    monkeypatch.setattr(variants, "MACHINE", replace(MACHINE, source_order=1.0, wrong_word=0.0, dropped=0.0))
    variants.translations.cache_clear()
    order = {name: getattr(TYPOLOGIES["en"], name) for name in ("order", "adjective", "adposition", "negation", "wh")}
    for _, item, made in translations("world_ccg", "dev", ("qaj",)):
        assert made.text("") == text_of(say(item.clause, replace(TYPOLOGIES["qaj"], **order), item.passive, item.fronted))


def test_the_round_trip_differs_from_english_by_the_stated_rate():
    task = TASKS["world_ccg@roundtrip-qad"]
    note = load_examples(task, "en", "dev").note
    stated = float(re.search(r"([\d.]+) % \(by qad\)", note)[1])
    pairs = list(zip(task.load("en", "train"), world_rows("world_ccg", "en", "train"), strict=True))
    changed, words = sum(edits(row["tokens"], right["tokens"]) for row, right in pairs), sum(len(right["tokens"]) for _, right in pairs)
    assert 100 * changed / words == pytest.approx(stated, abs=0.06) and 10 < stated < 30 and "labels are those of English" in note
    near, far = (error_rate("world_ccg", (code,), 0, 8) for code in ("qaa", "qaj"))
    assert 0.05 < near < far < 0.4


def test_most_labels_hold_after_translation():
    decided = [(made, item[2]) for _, item, made in translations("world_mnli", "train", ("qai",), 0, 4) if item[1].clause.verb != "be"]
    untrue = np.mean([relation(made[0].clause, made[1].clause) != label for made, label in decided])
    assert 0.02 < untrue < 0.1


def test_native_text_has_no_english_words_but_cognates():
    def stem_words(code):
        words = lexicons()[code]
        return set(words.stems.values())
    cognates = {code: {w for c, w in lexicons()[code].stems.items() if w == c} for code in ("qad", "qai")}
    for code in ("qad", "qai"):
        english = {stem for stem in STEMS if stem not in cognates[code]} | {"the", "never", "with", "from", "who", "what", "where", "when"}
        rows = load_examples(TASKS[f"world_squad2@native-{code}"], code, "dev").rows
        said = {word for row in rows for word in re.findall(r"\w+", row["context"] + " " + row["question"])}
        assert not said & english and (code != "qai" or all(letter in SCRIPTS["Geor"] for word in said for letter in word if not letter.isdigit()))
        assert len(said & stem_words(code)) > 50


def test_the_same_in_every_order_of_asking(small):
    name = "world_csqa@translated-qaa-qad"
    first = {code: part.rows for code, part in examples(name, "train").items()}
    TASKS._variants.pop(name), variants.translations.cache_clear()
    again = {code: load_examples(MODIFIERS["translated"](TASKS["world_csqa"], ("qaa", "qad")), code, "train").rows for code in ("qad", "qaa")}
    assert first == again
    assert Translator(("qad",), 1).sentence(Utterance(DRAWN["world_ccg"]("world_ccg", "dev")[0].clause)) == Translator(("qad",), 1).sentence(Utterance(DRAWN["world_ccg"]("world_ccg", "dev")[0].clause))


def test_wrong_readings_are_never_opposites_and_keep_the_parts(small):
    from xtransfer.world import ANTONYM, CONVERSE, VERBS
    for group in ("social", "handle", "transfer"):
        for verb in VERBS[group]:
            assert all(other in VERBS[group] and other != verb and CONVERSE.get(other, ("", ""))[1] == CONVERSE.get(verb, ("", ""))[1] for other in variants._verb_kin(verb))
    assert variants._verb_kin("be") == [] and variants._verb_kin("make") == [] and variants._verb_kin("help") == ["aid"]
    for _, item, made in translations("world_ccg", "train", ("qaa",)):
        for slot in ("agent", "patient", "other"):
            before, after = (getattr(u.clause, slot) or Entity("") for u in (item, made))
            assert not before.adjective or after.adjective != ANTONYM.get(before.adjective)
            assert before.count == after.count and ("." not in before.noun or before.noun == after.noun)
        assert item.clause.negated == made.clause.negated


def test_names_identities_and_chains(small):
    names = ["world_mnli", *(f"world_mnli@{kind}" for kind in KINDS), "world_mnli@native-qad-qaa", "world_mnli@native-qaa-qad@sample-20", "world_mnli@translated-qaa@shuffled", "world_mnli@native-qaa@prompted"]
    assert len({digest(TASKS[name].identity) for name in names}) == len(names) and all(TASKS[name].name == name for name in names)
    recipe = Recipe(name="x", learning_rate=1e-3, batch_size=4)
    assert all(re.fullmatch(r"world-xlmr/[\w@-]+\.s0-[0-9a-f]{12}", Run(backbone="world-xlmr", stages=(Stage(train=(name,), recipe=recipe, seed=0),)).id) for name in names)
    assert len(load_examples(TASKS[names[-3]], "qad", "train").rows) == 20
    shuffled, plain = (load_examples(TASKS[name], "qaa", "train").rows for name in ("world_mnli@translated-qaa@shuffled", "world_mnli@translated-qaa"))
    assert [r["text"] for r in shuffled] == [r["text"] for r in plain] and [r["label"] for r in shuffled] != [r["label"] for r in plain]


@pytest.mark.parametrize("name, message", [
    ("world_mnli@native", "takes codes of the world's languages, such as @native-qaa-qad"), ("world_mnli@translated-en", "asked for with en"),
    ("world_mnli@native-qaz", "@native-qaz: the world has no language 'qaz'; did you mean"), ("world_mnli@native-de", "has no language 'de'"),
    ("world_mnli@roundtrip-en-qaa", "nothing is translated into 'en'"), ("world_xnli@native-qaa", "ask for world_xnli@in-qaa"), ("world_bucc@native-qaa", "which is not trained"),
    ("world_mnli@sample-20@native-qaa", "comes before other modifiers, not after world_mnli@sample-20"),
    ("mnli@translated-de", "mnli is none of them: for machine translations ask for mnli@mt-de, and for data in other languages there are .*xnli_translated"),
    ("xnli@native-de", "ask for mnli@mt-de"), ("squad1@roundtrip-qaa", "ask for squad1@mt-de.*jsquad"),
])
def test_what_cannot_be_made_is_one_sentence(name, message):
    with pytest.raises(XtransferError, match=message):
        TASKS[name]
