"""Translations of training data: the mechanism, proven with tiny models of random weights; their quality is the user's choice of model."""

import json
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st

from xtransfer.core import XtransferError
from xtransfer.sources import DATA_VARIABLE
from xtransfer.tasks import COLUMNS, TASKS, Source, Task, choices_nested, load_examples, plain_text, squad_columns, text_pair
from xtransfer.translation import MEMORY_NAME, TRANSLATED, Memory, TranslationModel, Translator, sentences, texts_of, translate_task, translated_example

WORDS = ["<pad>", "</s>", "<unk>", "deu_Latn", "rus_Cyrl", ".", *"abcdefghijklmnopqrst"]


def save_model(folder, start=None):
    """A sequence-to-sequence model with random weights, its tokenizer beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import M2M100Config, M2M100ForConditionalGeneration, MarianConfig, MarianMTModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()] if start is None else [pre_tokenizers.WhitespaceSplit()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=["deu_Latn", "rus_Cyrl"]).save_pretrained(folder)
    torch.manual_seed(3)
    size = {"vocab_size": len(WORDS), "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0 if start is None else 1, "init_std": 1.0, "forced_eos_token_id": None}
    made = MarianMTModel(MarianConfig(**size)) if start is None else M2M100ForConditionalGeneration(M2M100Config(**size))
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """One model for a pair of languages."""
    return TranslationModel(model=save_model(tmp_path_factory.mktemp("models") / "opus-mt-en-de"), codes={}, beams=1, max_tokens=12)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def tasks():
    """A task of every format that can be translated, for one test."""
    import xtransfer.modifiers  # noqa: F401  makes @mt

    before = dict(TASKS._entries)
    rows = {
        "pairs": ("sequence_classification", text_pair("a", "b"), [{"id": f"p{i}", "a": f"{w} b. c", "b": w if i % 2 else "", "label": "x" if i % 3 else "y"} for i, w in enumerate("abcdefghij")]),
        "choices": ("multiple_choice", choices_nested, [{"id": f"c{i}", "question": f"{w} d", "choices": {"label": ["A", "B"], "text": [w, "e f"]}, "answerKey": "B"} for i, w in enumerate("abcd")]),
        "answers": ("span_extraction", squad_columns, [{"id": f"q{i}", "question": f"{w} d", "context": "a b c. d e.\nf g" if i % 2 else "h", "answers": {"text": ["a b c. d e.\nf g" if i % 2 else "h"], "answer_start": [0]}} for i, w in enumerate("abcd")]),
        "texts": ("masked_lm", plain_text(), [{"id": f"t{i}", "text": f"{w} g. h", "text_pair": ""} for i, w in enumerate("abcd")]),
        "tags": ("token_classification", lambda row: row, [{"id": "0", "tokens": ["a"], "tags": ["x"]}]),
    }
    for name, (format, read, found) in rows.items():
        trained = {"labels": ("x", "y"), "metrics": ("accuracy",), "headline": ("accuracy",)} if format == "sequence_classification" else {"metrics": ("squad",)} if format == "span_extraction" else {}
        TASKS.register(Task(name=f"toy_{name}", format=format, kind="toy", source=Source(repo="generated"), languages=("en",), load=lambda language, split, found=found: found, read=read, trains_on=f"toy_{name}", **trained))
    yield TASKS
    TASKS._entries = before
    TASKS._variants.clear()


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@settings(max_examples=200)
@given(st.text(alphabet="ab U.S!?\"。？\n(A", max_size=40))
def test_sentences_joined_are_the_text(text):
    parts = sentences(text)
    assert "".join(parts) == text and len(parts) % 2 == 1 and all(not part.strip() for part in parts[1::2])


def test_paragraphs_are_cut_at_sentences_and_not_after_abbreviations():
    text = "He met Dr. Smith of the U.S. army. They spoke (at length.) Then, e.g. on 3.5 acres, it rained! Why? Nobody knows."
    assert sentences(text)[::2] == ["He met Dr. Smith of the U.S. army.", "They spoke (at length.)", "Then, e.g. on 3.5 acres, it rained!", "Why?", "Nobody knows."]
    assert sentences("他来了。她走了！")[::2] == ["他来了。", "她走了！", ""]


def test_a_batch_translates_like_its_sentences_alone(marian):
    translator = Translator(marian, "de")
    texts = ["a b c d e f", "a", "g h i", "j k l m n o p q r s t a b", "b a", "c", "q r s", "t"]
    together, alone = translator(texts), [translator([text])[0] for text in texts]
    assert together == alone and len({said for said, _ in together}) > 4 and [cut for _, cut in together] == [False] * 3 + [True] + [False] * 4
    assert "<" not in "".join(said for said, _ in together)


def test_the_language_is_told_in_every_way(tmp_path):
    folder = save_model(tmp_path / "nllb", start=1)
    def model(**others):
        return TranslationModel(model=folder, beams=1, max_tokens=8, **({"codes": {"de": "deu_Latn", "ru": "rus_Cyrl"}} | others))
    told = {language: Translator(model(source_code="eng_Latn"), language) for language in ("de", "ru")}
    assert {language: t.first for language, t in told.items()} == {"de": 3, "ru": 4} and "first token deu_Latn" in told["de"].facts["settings"]
    assert told["de"](["a b c"]) != told["ru"](["a b c"]), "the first token of a translation is the language"
    with pytest.raises(XtransferError, match="no language code 'sw'"):
        Translator(model(source_code="eng_Latn"), "sw")
    prefixed = Translator(model(source_prefix="{code} "), "de")
    assert prefixed.first is None and prefixed(["a b"]) == Translator(model(), "de")(["deu_Latn a b"])
    (tmp_path / "opus-en-ru").symlink_to(folder)
    named = Translator(TranslationModel(model=str(tmp_path / "opus-en-{language}"), codes={}, beams=1), "ru")
    assert named.name.endswith("opus-en-ru") and re.fullmatch("local-[0-9a-f]{12}", named.revision) and str(tmp_path) not in json.dumps(named.facts)
    with pytest.raises(XtransferError, match="opus-en-de .*cannot be loaded"):
        Translator(TranslationModel(model=str(tmp_path / "opus-en-{language}"), codes={}), "de")


@pytest.mark.parametrize("name", ["toy_pairs", "toy_choices", "toy_answers", "toy_texts"])
def test_every_format_is_read_back_by_the_modifier(name, tasks, data, marian):
    lines = []
    table = translate_task(tasks[name], ["de"], marian, report=lines.append)
    assert [(row["language"], row["split"]) for row in table] == [("de", "train"), ("de", "dev")] and any("distinct sentences" in line for line in lines)
    folder = data / "files" / "translations" / name / "de"
    assert set(files(folder)) == {"train.jsonl", "dev.jsonl", "translation.json"} and not (folder / MEMORY_NAME).exists()
    before, after = load_examples(tasks[name], "en", "train").rows, load_examples(tasks[f"{name}@mt-de"], "de", "train")
    assert all(tuple(row) == COLUMNS[tasks[name].format] for row in after.rows) and "opus-mt-en-de" in after.note and "beams" in after.note
    kept = {row["id"]: row for row in after.rows}
    assert [row["id"] for row in after.rows] == [row["id"] for row in before if row["id"] in kept]
    translator = Translator(marian, "de")
    for row in before:
        if row["id"] not in kept:
            continue
        now = kept[row["id"]]
        assert {k: now[k] for k in ("label",) if k in row} == {k: row[k] for k in ("label",) if k in row}
        for old, new in zip(texts_of(tasks[name].format, row), texts_of(tasks[name].format, now)):
            parts = sentences(old)
            assert new == "".join(translator([part.strip()])[0][0] if i % 2 == 0 and part.strip() else part for i, part in enumerate(parts)).strip()
        assert all(now["context"][s:s + len(a)] == a for a, s in zip(now.get("answers", ()), now.get("starts", ())))
    said = json.loads((folder / "translation.json").read_text())
    assert list(said) == ["model", "revision", "settings", "train", "dev"] and said["train"].startswith(f"{len(kept)} of {len(before)} examples ({len(before) - len(kept)} lost")


def test_an_answer_that_is_not_in_the_translated_context_is_lost():
    example = {"id": "q", "question": "Wo?", "context": "eins zwei eins", "answers": ["eins", "zwei"], "starts": [10, 5]}
    said = {"Wo?": "Where?", "eins zwei eins": "one two two one one", "eins": "one", "zwei": "2"}
    assert translated_example("span_extraction", example, said.get) == {"id": "q", "question": "Where?", "context": "one two two one one", "answers": ["one"], "starts": [12]}
    assert translated_example("span_extraction", example, (said | {"eins": "1"}).get) is None
    assert translated_example("span_extraction", example | {"answers": [], "starts": []}, said.get)["answers"] == []
    assert translated_example("sequence_classification", {"id": "", "text": "eins", "text_pair": "", "label": "x"}, lambda text: "") is None


def test_interrupted_it_goes_on_and_ends_with_the_same_files(tasks, data, marian, monkeypatch):
    translate_task(tasks["toy_pairs"], ["de", "ru"], marian, batch_size=2, report=lambda line: None)
    place = data / "files" / "translations" / "toy_pairs"
    undisturbed = {language: files(place / language) for language in ("de", "ru")}
    monkeypatch.setenv(DATA_VARIABLE, str(data.parent / "again"))
    place = data.parent / "again" / "files" / "translations" / "toy_pairs"
    given, translate = [], Translator.__call__
    def stopping(self, texts):
        if len(given) in (3, 9):
            given.append(None)
            raise KeyboardInterrupt
        given.append(texts)
        return translate(self, texts)
    monkeypatch.setattr(Translator, "__call__", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            translate_task(tasks["toy_pairs"], ["de", "ru"], marian, batch_size=2, report=lambda line: None)
        left = next(place.glob(f"*/{MEMORY_NAME}"))
        left.write_bytes(left.read_bytes() + b'["half a li')  # what a killed process may leave
    translate_task(tasks["toy_pairs"], ["de", "ru"], marian, batch_size=2, report=lambda line: None)
    assert {language: files(place / language) for language in ("de", "ru")} == undisturbed
    texts = [text for batch in given if batch for text in batch]
    assert len(texts) == 2 * len(set(texts)), "no sentence is translated twice into one language"
    assert [len(t) for t in texts[:len(texts) // 2]] == sorted((len(t) for t in texts[:len(texts) // 2]), reverse=True)
    count = len(given)
    translate_task(tasks["toy_pairs"], ["de", "ru"], marian, report=lambda line: None)
    assert len(given) == count, "what is finished is left alone"
    translate_task(tasks["toy_pairs"], ["de"], marian, limit=3, report=lambda line: None)
    assert len(given) > count and len(load_examples(tasks["toy_pairs@mt-de"], "de", "train").rows) <= 3


def test_a_memory_of_another_model_is_not_used(tmp_path):
    first = Memory(tmp_path / MEMORY_NAME, {"model": "a"})
    first.add({"x": ("y", False)})
    first.close()
    assert Memory(tmp_path / MEMORY_NAME, {"model": "a"}).found == {"x": ("y", False)}
    assert Memory(tmp_path / MEMORY_NAME, {"model": "b"}).found == {} and Memory(tmp_path / MEMORY_NAME, {"model": "a"}).found == {}


def test_mistakes_are_answered_with_a_sentence(tasks, data, marian):
    from dataclasses import replace

    with pytest.raises(XtransferError, match="toy_tags cannot be translated: .*which word became which; formats that can be: sequence"):
        translate_task(tasks["toy_tags"], ["de"], marian)
    with pytest.raises(XtransferError, match="unknown language 'xx'"):
        translate_task(tasks["toy_pairs"], ["xx"], marian)
    with pytest.raises(XtransferError, match="toy_two has training data in en, de; .*toy_two@in-en"):
        translate_task(replace(tasks["toy_pairs"], name="toy_two", train_languages=("en", "de")), ["ru"], marian)
    translate_task(tasks["toy_pairs"], ["de"], marian, report=lambda line: None)
    with pytest.raises(XtransferError, match="holds translations with other settings"):
        translate_task(tasks["toy_pairs"], ["de"], replace(marian, beams=2))
    assert set(TRANSLATED) < set(COLUMNS)


@pytest.mark.slow
def test_the_notebook_translates_a_task_of_the_user(tmp_path, marian):
    import papermill

    from xtransfer.runs import template_path

    declared = tmp_path / "mine.py"
    declared.write_text("""
from xtransfer.tasks import TASKS, Source, Task, text_pair
rows = [{"id": str(i), "text": f"{w} b. c", "label": "x"} for i, w in enumerate("abcd")]
TASKS.register(Task(name="mine", format="sequence_classification", kind="toy", source=Source(repo="generated"), languages=("en",), load=lambda language, split: rows, read=text_pair("text"), labels=("x",), trains_on="mine"))
""")
    done = papermill.execute_notebook(str(template_path("translate")), str(tmp_path / "done.ipynb"), kernel_name="python3", progress_bar=False, cwd=str(tmp_path),
                                      parameters={"task": "mine", "languages": ["de"], "model": marian.model, "beams": 1, "max_tokens": 12, "folder": str(tmp_path / "data"), "declarations": [str(declared)]})
    written = [json.loads(line) for line in (tmp_path / "data/files/translations/mine/de/train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == list("0123") and all(tuple(row) == COLUMNS["sequence_classification"] for row in written)
    shown = json.dumps([cell.get("outputs", []) for cell in done.cells])
    assert "4 of 4 examples" in shown and "distinct sentences" in shown
