"""Text with translations: what is held out, what a limit takes, and the encoder and the study that are made from it."""

import random

import pytest

import xtransfer.parallel_text as parallel_text
from xtransfer.parallel_text import BIBLE, is_held_out, tagged_text, translated_text
from xtransfer.small_backbone import SMALL_XLMR, trained_tokenizer
from xtransfer.sources import Source
from xtransfer.studies import STUDIES
from xtransfer.tasks import load_examples

import xtransfer.catalogue  # noqa: F401  fills the registries

ALPHABETS = {"en": "abcdefgh", "de": "äöüßklmn", "zh": "天地神人水火木金"}


def verses(language, keys, random):
    return [{"verse_id": key, "text": " ".join(random.choice(ALPHABETS[language]) * 2 for _ in range(6))} for key in keys]


@pytest.fixture
def books(monkeypatch):
    """A collection in three languages that do not have the same verses."""
    draw, keys = random.Random(7), [f"Book.{i}.{j}" for i in range(1, 31) for j in range(1, 31)]
    rows = {"en": verses("en", keys[:800], draw), "de": verses("de", keys[100:], draw), "zh": verses("zh", keys[:300], draw)}
    rows["de"][5]["text"] = "  "
    monkeypatch.setattr(parallel_text, "hub_rows", lambda source, config, split: rows[config])
    return rows, translated_text("book", Source(repo="generated", license="CC0"), ("en", "de", "zh"), key="verse_id")


def test_no_verse_of_the_development_split_is_read_in_any_language(books):
    rows, task = books
    read = {(language, split): load_examples(task, language, split).rows for language in task.languages for split in ("train", "dev")}
    trained, held = ({row["id"] for (_, s), part in read.items() if s == split for row in part} for split in ("train", "dev"))
    assert trained and held and not trained & held and all(map(is_held_out, held))
    for language in task.languages:
        assert {row["id"] for split in ("train", "dev") for row in read[language, split]} == {row["verse_id"] for row in rows[language] if row["text"].strip()}


def test_each_verse_stands_beside_its_own_translation(books):
    rows, task = books
    english = {row["verse_id"]: row["text"] for row in rows["en"]}
    for language in task.languages:
        own = {row["verse_id"]: row["text"] for row in rows[language]}
        for row in load_examples(task, language, "train").rows:
            assert row["text"] == own[row["id"]] and row["text_pair"] == ("" if language == "en" else english.get(row["id"], ""))
    assert any(not row["text_pair"] for row in load_examples(task, "de", "train").rows), "verses that English lacks stand alone"


def test_a_limit_takes_verses_from_everywhere_and_others_in_each_language(books):
    _, task = books
    first = {language: [row["id"] for row in load_examples(task, language, "train", 60).rows] for language in ("en", "de")}
    assert all(len({key.split(".")[1] for key in keys}) > 15 for keys in first.values()) and len(set(first["en"]) & set(first["de"])) < 30
    assert first["en"] == [row["id"] for row in load_examples(task, "en", "train", 60).rows], "the same at every reading"


def test_sentences_lose_their_tags_and_nothing_else(monkeypatch):
    rows = {"en": [{"tokens": ["A", "b", "."], "tags": [0, 1, 2]}, {"tokens": [], "tags": []}, {"tokens": ["c"], "tags": [0]}, {"tokens": ["c"], "tags": [1]}], "zh": [{"tokens": ["天", "地"], "tags": [0, 0]}, {"tokens": ["水"], "tags": [1]}]}
    monkeypatch.setattr(parallel_text, "hub_rows", lambda source, config, split: rows[config] if split == "train" else pytest.fail("only training sentences may be read"))
    task = tagged_text("tagged", Source(repo="generated", license="CC0"), ("en", "zh"), lambda language: language)
    assert {row["text"] for split in ("train", "dev") for row in load_examples(task, "en", split).rows} == {"A b .", "c"}
    assert {row["text"] for split in ("train", "dev") for row in load_examples(task, "zh", split).rows} == {"天地", "水"}


def test_the_tokenizer_depends_on_the_text_and_not_on_its_order():
    draw = random.Random(3)
    texts = [row["text"] for language in ALPHABETS for row in verses(language, map(str, range(200)), draw)]
    one, two = trained_tokenizer(texts, 75), trained_tokenizer(draw.sample(texts, len(texts)), 75)
    assert one.get_vocab() == two.get_vocab() and len(one) == 75
    for text in texts[::50]:
        found = one(text, return_offsets_mapping=True)
        assert one.unk_token_id not in found["input_ids"] and {i for a, b in found["offset_mapping"] for i in range(a, b) if text[i] != " "} == {i for i, c in enumerate(text) if c != " "}
    assert one.convert_ids_to_tokens(one("aa", "bb")["input_ids"])[0] == "<s>" and one("aa", "bb")["input_ids"].count(one.sep_token_id) == 3
    assert one.mask_token_id is not None and one.unk_token_id in one("Ω")["input_ids"]


def test_the_small_study_pretrains_once_and_never_on_what_it_scores():
    study = STUDIES["stilts"].build("small")
    plan = study.plan()
    (pretraining,) = [run for run in plan if run.template == "pretrain"]
    assert all(run.stages[0] == pretraining.stage for run in plan) and {cell.seed for cell in study.cells} == {0, 1, 2}
    assert {stage.seed for cell in study.cells for stage in cell.run.stages[1:] if cell.seed == 2} == {2}, "everything after it has the seed of its run"
    assert pretraining.stage.train[0] == BIBLE.name and pretraining.backbone == SMALL_XLMR.name
    assert all("dev" in run.stage.score_splits for run in plan if {"panx", "pawsx_rest"} & set(run.stage.score)), "their test labels are not to be had everywhere"
    assert all(run.stage.recipe.selection == "last" for run in plan if run.stage.train), "so nothing may be selected on development splits"
    for fact in ("Three seeds", "PAN-X without Thai", "stands in for CCG", "verses"):
        assert fact in study.note
