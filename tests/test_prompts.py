"""Tasks asked in text: the wordings, the way back to predictions, answers in another language, and models that are asked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import xtransfer.catalogue  # noqa: F401  tasks to be asked
import xtransfer.world_backbones  # noqa: F401
from xtransfer.backbones import BACKBONES, Backbone
from xtransfer.core import XtransferError
from xtransfer.encoding import IGNORED, make_batch
from xtransfer.evaluation import make_evaluator
from xtransfer.languages import LANGUAGES
from xtransfer.metrics import METRICS
from xtransfer.modeling import StageModel, load_encoder, load_tokenizer
from xtransfer.prompting import Interview, answer_limit, choice_scores, encode_prompted, write_answers
from xtransfer.prompts import answer_habits, as_in_context, ask, in_other_language, main_script, pad_punctuation, placed_tags, read_answer, span_text_f1, written_shares
from xtransfer.studies import Recipe, Run, Stage
from xtransfer.tasks import COLUMNS, TASKS, load_examples

ASKED = ("sequence_classification", "multiple_choice", "span_extraction", "token_classification")
LISTED = [name for name, task in TASKS.items() if task.format in ASKED and task.kind != "tagging"]
NLI = {"id": "1", "text": "He sleeps {soundly}.", "text_pair": "He rests.", "label": "entailment"}
RECIPE = Recipe(name="x", learning_rate=1e-3, batch_size=4, max_length=96)
QWEN = Backbone(name="toy-qwen3", architecture="decoder", layers=2, hidden_size=64, retrieval_layer=1, max_length=128, build_tokenizer=BACKBONES["world-bloom"].build_tokenizer,
                config={"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
                        "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3})
FAMILIES = {"mt5": BACKBONES["world-mt5-small"], "bloom": BACKBONES["world-bloom-small"], "qwen3": QWEN}


@pytest.fixture(scope="module", params=FAMILIES)
def asked_model(request):
    """A model of random weights, far enough from zero that its answers differ, and its tokenizer."""
    backbone = FAMILIES[request.param]
    tokenizer = load_tokenizer(backbone)
    model = StageModel(load_encoder(backbone, tokenizer, seed=1), [TASKS["world_xnli@prompted"]], 0, backbone).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if parameter.dim() > 1:
                parameter.add_((0.3 if "embed" in name or model.family.objective == "spans" else 1.5) * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return model, tokenizer, backbone.kind.objective


def rows_of(name, language="en", split="dev", limit=9):
    return load_examples(TASKS[name], language, split, limit).rows


# wordings


@pytest.mark.parametrize("name, example, prompt, answer", [
    ("xnli", NLI, "xnli: premise: He sleeps {soundly}. hypothesis: He rests.", "0"),
    ("mnli", NLI | {"label": "contradiction"}, "xnli: premise: He sleeps {soundly}. hypothesis: He rests.", "2"),
    ("pawsx", NLI | {"label": "0"}, "paws sentence1: He sleeps {soundly}. sentence2: He rests.", "different_meaning"),
    ("qqp", NLI | {"label": "duplicate"}, "paraphrase sentence1: He sleeps {soundly}. sentence2: He rests.", "duplicate"),
    ("masakhanews", NLI | {"text_pair": "", "label": "sports"}, "topic sentence: He sleeps {soundly}.", "sports"),
    ("panx", {"id": "1", "tokens": "rick and morty are cool .".split(), "tags": ["B-PER", "O", "B-PER", "O", "O", "O"]}, "tag: rick and morty are cool .", "PER: rick $$ PER: morty"),
    ("panx", {"id": "1", "tokens": ["It", "rains"], "tags": ["O", "O"]}, "tag: It rains", ""),
    ("xquad", {"id": "1", "question": "Who (1990)?", "context": "In the U.S., François.", "answers": ["U.S.", "the U.S."], "starts": [7, 3]},
     "question: Who ( 1990 ) ? context: In the U . S . , François .", "U . S ."),
    ("squad2", {"id": "1", "question": "Who?", "context": "Nobody.", "answers": [], "starts": []}, "question: Who ? context: Nobody .", ""),
    ("xcopa", {"id": "1", "text": "It rained. What was the effect?", "choices": ["Wet.", "Dry."], "label": 0}, "commonsense question: It rained. What was the effect? choices: (a) Wet. (b) Dry.", "Wet."),
])
def test_wordings_of_mt5(name, example, prompt, answer):
    row = ask(TASKS[name], "", example)
    assert (row["prompt"], row["answer"], row["continued"]) == (prompt, answer, False) and tuple(row) == COLUMNS["prompted"]
    spare = {"span_extraction": pad_punctuation(example.get("context", "")), "token_classification": " ".join(example.get("tokens", ()))}.get(TASKS[name].format, example.get("text"))
    assert row["prompt"][slice(*row["spare"])] == spare


@pytest.mark.parametrize("name, example, prompt, choices, answer", [
    ("xnli", NLI, "He sleeps {soundly}., right?", ["Yes, He rests.", "Also, He rests.", "No, He rests."], "Yes, He rests."),
    ("pawsx", NLI | {"label": "0"}, "He sleeps {soundly}., right?", ["No, He rests.", "Yes, He rests."], "No, He rests."),
    ("hellaswag", {"id": "1", "text": "A man sits.", "choices": ["he sings.", "he falls."], "label": 1}, "A man sits.", ["he sings.", "he falls."], "he falls."),
    ("xquad", {"id": "1", "question": "Who?", "context": "Ann, of course.", "answers": ["Ann"], "starts": [0]}, "Context: Ann, of course.\n\nQuestion: Who?\n\nAnswer:", [], "Ann"),
])
def test_cloze_wordings(name, example, prompt, choices, answer):
    row = ask(TASKS[name], "cloze", example)
    assert (row["prompt"], row["choices"], row["answer"], row["continued"]) == (prompt, choices, answer, True)


# the modifier


@pytest.mark.parametrize("name", LISTED)
def test_a_prompted_task_is_the_same_task_in_another_format(name):
    task, asked = TASKS[name], TASKS[f"{name}@prompted"]
    for same in ("languages", "train_languages", "metrics", "headline", "labels", "expected_rows", "source", "sources", "splits", "kind"):
        assert getattr(asked, same) == getattr(task, same), same
    assert asked.format == "prompted" and asked.trains_on == f"{task.trains_on}@prompted" and asked.continues is None
    assert asked.identity != task.identity and TASKS[asked.trains_on].format == "prompted"


def test_training_and_target_are_asked_alike():
    assert TASKS["xnli@prompted"].trains_on == "mnli@prompted" and TASKS["xquad@prompted-cloze"].trains_on == "squad1@prompted-cloze"
    chained = TASKS["world_mnli@sample-20@prompted"]
    assert chained.trains_on == chained.name and len(load_examples(chained, "en", "train").rows) == 20
    assert len(load_examples(TASKS["world_mnli@prompted@sample-20"], "en", "train").rows) == 20
    run = Run(backbone="world-mt5", stages=(Stage(train=("world_mnli@prompted",), score=("world_xnli@prompted",), recipe=RECIPE, seed=0),))
    assert run.digest != replace(run, stages=(replace(run.stage, train=("world_mnli",)),)).digest


@pytest.mark.parametrize("name, reason", [
    ("udpos@prompted", "one per word"), ("ccg@prompted", "one per word"), ("tatoeba@prompted", "of the format retrieval"), ("xnli@prompted@prompted", "of the format prompted"),
    ("xnli@prompted-closed", "no wording; there are @prompted and @prompted-cloze"), ("masakhanews@prompted-cloze", "kind topic"), ("panx@prompted-cloze", "kind ner"), ("xnli@prompted@shuffled", "no training data of its own|no labels"),
    ("mnli@prompted@shuffled", "has no labels"),
])
def test_what_cannot_be_asked_is_refused(name, reason):
    with pytest.raises(XtransferError, match=reason):
        TASKS[name]


def test_rows_without_label_or_with_a_wrong_one(toys):
    task = TASKS["toy_pair"]
    def with_labels(*labels):
        return replace(task, load=lambda language, split: [row | {"label": label} for row, label in zip(task.load(language, split), labels)])
    from xtransfer.prompts import prompted
    some = load_examples(prompted(with_labels("yes", None, "", "no"), ()), "en", "dev")
    assert (len(some.rows), some.unlabelled) == (2, 2) and [row["reference"] for row in some.rows] == ["yes", "no"]
    with pytest.raises(XtransferError, match="row 1 of task toy_pair@prompted, language en, split dev .*'maybe' is none of yes, no"):
        load_examples(prompted(with_labels("yes", "maybe"), ()), "en", "dev")
    unanswered = replace(TASKS["toy_qa"], load=lambda language, split: [row | {"answers": {"text": [], "answer_start": []}} for row in TASKS["toy_qa"].load(language, split)])
    with pytest.raises(XtransferError, match="no answer, and the task has no unanswerable"):
        load_examples(prompted(unanswered, ()), "en", "dev")


# the way back


@pytest.mark.parametrize("name", ["world_xnli", "world_pawsx", "world_csqa", "world_xquad", "world_squad2", "world_panx"])
@pytest.mark.parametrize("style", ["", "-cloze"])
def test_right_answers_score_everything(name, style):
    if name == "world_panx" and style:
        pytest.skip("has no cloze")
    task = TASKS[f"{name}@prompted{style}"]
    for language in task.languages[:3]:
        rows = load_examples(task, language, "dev").rows
        read = [read_answer(task, row, row["answer"]) for row in rows]
        scores = METRICS[task.metrics[0]].score(read, [row["reference"] for row in rows], language)
        assert min(scores[key] for key in task.headline) > (99 if name == "world_panx" else 99.999), (language, scores)


@pytest.mark.parametrize("answer, context, found", [
    ("U . S .", "In the U.S., it rains", "U.S."), ("2 . 5 %", "about 2.5% of it", "2.5%"), ("« Oui »", "Elle dit «Oui» .", "«Oui»"), ("new york", "In New York", "new york"),
    ("well - known", "a well-known man", "well-known"), ("a b", "ab a  b", "a  b"), ("हिन्दी", "यह हिन्दी है।", "हिन्दी"), ("北京", "在北京。", "北京"), ("", "x", ""), ("c . d", "x", "c . d"),
])
def test_answers_are_read_in_the_spelling_of_the_context(answer, context, found):
    assert as_in_context(answer, context) == found


@pytest.mark.parametrize("text, padded", [("l'été", "l ' été"), ("a_b", "a_b"), ("हिन्दी।", "हिन्दी ।"), ("3½", "3½"), ("x  \n y", "x y"), ("“Hi”…", "“ Hi ” …")])
def test_punctuation_is_padded_and_accents_are_not(text, padded):
    assert pad_punctuation(text) == padded


@pytest.mark.parametrize("written, tags, mentions, placed", [
    ("PER: Ann Lee $$ LOC: Rome", "B-PER I-PER O B-LOC O B-PER", 3, 2), ("PER: Ann $$ PER: Ann", "B-PER O O O O B-PER", 2, 2), ("PER:Ann", "B-PER O O O O O", 1, 1), ("", "O O O O O O", 0, 0),
    ("ORG: Ann", "O O O O O O", 1, 0), ("PER: An", "O O O O O O", 1, 0), ("Ann", "O O O O O O", 1, 0), ("LOC: Rome $$ PER: Ann", "O O O B-LOC O B-PER", 2, 2), ("PER: Ann Lee $$ PER: Ann Lee", "B-PER I-PER O O O O", 2, 1),
    ("PER: Ann Lee in Rome", "B-PER I-PER I-PER I-PER O O", 1, 1), ("PER: $$ LOC: Rome", "O O O B-LOC O O", 2, 1),
])
def test_mentions_find_their_places(written, tags, mentions, placed):
    tokens, labels = "Ann Lee in Rome , Ann".split(), ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    if written == "PER: Ann Lee $$ LOC: Rome":
        written += " $$ PER: Ann"
        placed = 3
    assert placed_tags(written, tokens, labels) == (tags.split(), mentions, placed)


def test_f1_of_mentions_is_that_of_the_paper():
    assert span_text_f1(["PER: a $$ PER: a"], ["PER: a $$ LOC: b"]) == 50 and span_text_f1(["LOC: a"], ["PER: a"]) == 0
    assert span_text_f1(["PER: a: b $$ PER: c", ""], ["PER: c", ""]) == 100  # two colons are no mention
    assert span_text_f1([""], [""]) == 0


# answers in another language


RUSSIAN, GREEK, SPANISH, CHINESE = "денвер бронкос победили 1990 nfl", "η ομάδα νίκησε", "el equipo de madrid ganó la copa", "丹佛野马队 1990 赢了 afc"


@pytest.mark.parametrize("answer, context, elsewhere, expected", [
    ("denver broncos", RUSSIAN, (), True),  # wholly in another script
    ("денвер broncos", RUSSIAN, (), True),  # partly
    ("nfl", RUSSIAN, (), False),  # the context says it so
    ("бронкос", RUSSIAN, (), False),
    ("команда", RUSSIAN, (), False),  # not in the context, but in its script
    ("1990", GREEK, (), False),  # numbers have no script
    ("1990 denver", GREEK, (), True),
    ("", RUSSIAN, ("x",), False),
    ("the team", SPANISH, ("the team of madrid won", "the team"), True),  # the same script, but the same question's English context
    ("the team", SPANISH, (), False),  # nothing to tell it by
    ("team", SPANISH, ("teams won",), False),  # in whole words only
    ("madrid", SPANISH, ("madrid won",), False),  # in its own context as well
    ("equipo ganó", SPANISH, ("the team",), False),
    ("野马", RUSSIAN, (), True),
    ("野馬", CHINESE, ("野馬隊贏了",), True),  # no spaces: anywhere
    ("ブロンコス", CHINESE, (), False),  # kana and Chinese characters count as one script
    ("afc", CHINESE, (), False),
])
def test_other_language_is_told_by_script_and_by_parallel_texts(answer, context, elsewhere, expected):
    assert in_other_language(answer, context, elsewhere) is expected


def test_scripts():
    assert [main_script(t) for t in ("Denver", "Ｄｅｎ", "бронкос", "中文", "かな", "한국", "ไทย", "हिन्दी", "12 %", "")] == ["LATIN", "FULLWIDTH", "CYRILLIC", "CJK", "CJK", "HANGUL", "THAI", "DEVANAGARI", None, None]


def test_shares_of_answers_are_counted_over_all_languages_of_a_question():
    task = TASKS["xquad@prompted"]
    texts = {"en": ("The Denver Broncos won.", "Denver Broncos"), "ru": ("Победили Денвер Бронкос.", "Денвер Бронкос"), "de": ("Die Siegermannschaft gewann.", "Die Siegermannschaft"), "es": ("Ganó el ganador.", "el ganador")}
    rows = {code: {"id": "q", "context": context, "reference": [answer]} for code, (context, answer) in texts.items()}
    parallel = {"q": list(rows.items())}
    def shares(language, *answers):
        return tuple(answer_habits(task, answers, [rows[language]] * len(answers), language, parallel).values())
    assert shares("ru", "Denver Broncos", "Денвер Бронкос", "!", "Ничего") == (25.0, 50.0, 25.0)
    assert shares("es", "Siegermannschaft", "el ganador") == (50.0, 50.0, 0.0)  # German stands in the German context
    assert shares("en", "Denver Broncos.") == (0.0, 0.0, 0.0) and shares("de", "Ｓiegermannschaft") == (0.0, 0.0, 0.0)  # wide letters are the same letters
    assert tuple(answer_habits(task, ["Siegermannschaft"], [rows["es"]], "es", {"q": [("es", rows["es"])]}).values()) == (0.0, 100.0, 0.0)  # unseen without the other languages
    assert answer_habits(TASKS["mlqa@prompted"], ["la ganadora"], [rows["es"] | {"context": "¡Ganadora!"}], "es", {})["outside_context"] == 0  # MLQA's own rules: no articles, no punctuation


def test_shares_of_labels_and_mentions():
    row = {"context": ["Ann", "sleeps"], "answer": "PER: Ann"}
    assert written_shares(TASKS["panx@prompted"], ["PER: Ann $$ LOC: Bonn"], [["B-PER", "O"]], [row], "en", {}) == {"span_text_f1": pytest.approx(200 / 3), "unplaced": 50.0}
    assert written_shares(TASKS["xnli@prompted"], ["0", "no", ""], ["entailment", "", ""], [{}] * 3, "en", {}) == {"no_label": pytest.approx(200 / 3)}


# what a model is shown


def decoded(tokenizer, encoded):
    return [tokenizer.convert_ids_to_tokens(part) for part in np.split(encoded.ids, encoded.starts[1:-1])]


def test_what_is_encoded(asked_model):
    _, tokenizer, objective = asked_model
    task, rows = TASKS["world_csqa@prompted"], rows_of("world_csqa@prompted", limit=4)
    learnt, compared, alone = (encode_prompted(tokenizer, task, rows, RECIPE, objective, wanted) for wanted in ("answer", "choices", "prompt"))
    prompts = decoded(tokenizer, alone)
    assert all(prompt[-1] == "</s>" for prompt in prompts)
    for i, row in enumerate(rows):
        said = [tokenizer.tokenize(choice) + ["</s>"] for choice in row["choices"]]
        right = said[row["reference"]]
        if objective == "causal":
            assert decoded(tokenizer, learnt)[i] == prompts[i] + right
            assert [s for s, e in zip(decoded(tokenizer, compared), compared.example) if e == i] == [prompts[i] + choice for choice in said]
            part = slice(learnt.starts[i], learnt.starts[i + 1])
            following, ids = learnt.token_targets["next"][part], learnt.ids[part]
            assert (following[len(prompts[i]) - 1:-1] == ids[len(prompts[i]):]).all() and set(following[:len(prompts[i]) - 1]) | {following[-1]} == {IGNORED}
        else:
            assert decoded(tokenizer, learnt)[i] == decoded(tokenizer, compared)[i] == prompts[i]
            assert tokenizer.convert_ids_to_tokens([t for t in learnt.sequence_targets["labels"][i] if t != IGNORED]) == right
            assert [tokenizer.convert_ids_to_tokens([t for t in choice if t != IGNORED]) for choice in compared.example_targets["choices"][i]] == said


def test_a_text_that_goes_on_has_no_end_in_between(asked_model):
    _, tokenizer, objective = asked_model
    task, rows = TASKS["world_csqa@prompted-cloze"], rows_of("world_csqa@prompted-cloze", limit=3)
    compared, learnt = (encode_prompted(tokenizer, task, rows, RECIPE, objective, wanted) for wanted in ("choices", "answer"))
    if objective == "causal":
        assert decoded(tokenizer, compared)[1] == tokenizer.tokenize(rows[0]["prompt"]) + tokenizer.tokenize(rows[0]["choices"][1])
        assert decoded(tokenizer, learnt)[0] == tokenizer.tokenize(rows[0]["prompt"]) + tokenizer.tokenize(rows[0]["answer"]) + ["</s>"]
    else:
        assert decoded(tokenizer, compared)[0] == tokenizer.tokenize(rows[0]["prompt"]) + ["</s>"] and tokenizer.eos_token_id not in compared.example_targets["choices"]


@pytest.mark.parametrize("name", ["world_xquad@prompted", "world_xquad@prompted-cloze", "world_xnli@prompted"])
@pytest.mark.parametrize("length", [26, 34])
def test_long_prompts_lose_the_middle_of_their_spare_part(asked_model, name, length):
    _, tokenizer, objective = asked_model
    task, rows, recipe = TASKS[name], rows_of(name, "qab", limit=12), replace(RECIPE, max_length=length, max_answer_length=5)
    whole = encode_prompted(tokenizer, task, rows, replace(recipe, max_length=400), objective, "prompt")
    assert whole.truncated == 0
    shown = {wanted: encode_prompted(tokenizer, task, rows, recipe, objective, wanted) for wanted in ("answer", "prompt")}
    full, cut = decoded(tokenizer, whole), decoded(tokenizer, shown["prompt"])
    shorter = [a != b for a, b in zip(full, cut)]
    assert shown["prompt"].truncated >= sum(shorter) > 0 and max(shown["answer"].lengths) <= length
    kept = 0
    for row, long, short in zip(rows, full, cut):
        before, after = (tokenizer.tokenize(part) for part in (row["prompt"][:row["spare"][0]], row["prompt"][row["spare"][1]:]))
        bare = [t for t in short if t != "</s>"]
        if len(before) + len(after) > len(bare):  # the question alone is too long: its beginning stays
            assert bare == [t for t in before + after][:len(bare)]
            continue
        assert bare[:len(before)] == before and bare[len(bare) - len(after):] == after
        kept += 1
        begin = next((k for k, (a, b) in enumerate(zip(long, short)) if a != b), len(short))
        assert short[begin:] == long[len(long) - len(short) + begin:]  # one run of tokens is missing
    assert kept > 2
    for prompt, answer in zip(cut, decoded(tokenizer, shown["answer"])):
        assert answer[:len(prompt)] == prompt  # the same prompt in training and in scoring


def test_answers_that_a_tokenizer_cannot_write_are_refused(asked_model):
    _, tokenizer, objective = asked_model
    for name in ("world_pawsx@prompted", "world_panx@prompted"):
        with pytest.raises(XtransferError, match="tokenizer cannot write the answers of task"):
            encode_prompted(tokenizer, TASKS[name], rows_of(name), RECIPE, objective)
    with pytest.raises(XtransferError, match="takes a model with a decoder"):
        encode_prompted(tokenizer, TASKS["world_xnli@prompted"], rows_of("world_xnli@prompted"), RECIPE, "masked")
    with pytest.raises(XtransferError, match="leaves no room for the prompts"):
        encode_prompted(tokenizer, TASKS["world_xnli@prompted"], rows_of("world_xnli@prompted"), replace(RECIPE, max_length=6), objective)


def trained_tokenizer(kind):
    """A small tokenizer of the kind that mT5 or BLOOM has, trained on some prompts and answers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [text for name in ("world_xquad@prompted", "world_xquad@prompted-cloze", "world_xnli@prompted-cloze") for row in rows_of(name, limit=60) for text in (row["prompt"], row["answer"])]
    special = ["<pad>", "</s>", "<unk>"]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=kind == "spaced"), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["unigram", "bytes", "spaced"])
@pytest.mark.parametrize("name", ["world_xquad@prompted", "world_xquad@prompted-cloze", "world_xnli@prompted-cloze", "world_csqa@prompted-cloze"])
def test_tokenizers_with_spaces_of_their_own(kind, name):
    tokenizer, task, rows = trained_tokenizer(kind), TASKS[name], rows_of(name)
    recipe = replace(RECIPE, max_length=600)
    learnt, asked = (encode_prompted(tokenizer, task, rows, recipe, "causal", wanted) for wanted in ("answer", "prompt"))
    for i, row in enumerate(rows):
        whole, prompt = (part.ids[part.starts[i]:part.starts[i + 1]].tolist() for part in (learnt, asked))
        if row["continued"]:  # prompt and answer are cut as the text that they make together
            assert whole == tokenizer(f"{row['prompt']} {row['answer']}")["input_ids"]
        assert whole[-1] == tokenizer.eos_token_id and read_answer(task, row, tokenizer.decode(whole[len(prompt):], skip_special_tokens=True)) == (
            row["reference"][0] if isinstance(row["reference"], list) else row["reference"])
    written = encode_prompted(tokenizer, task, rows, recipe, "spans")
    for row, labels in zip(rows, written.sequence_targets["labels"]):
        assert tokenizer.decode([t for t in labels if t != IGNORED], skip_special_tokens=True).strip() == row["answer"]
    short = encode_prompted(tokenizer, task, rows, replace(recipe, max_length=64, max_answer_length=8), "causal", "prompt")
    assert short.lengths.max() <= 64 and short.truncated >= (short.lengths < asked.lengths).sum()


def test_real_answers_are_read_back(hub):
    import os
    import subprocess
    import sys

    code = """
import xtransfer.catalogue
from xtransfer.metrics import METRICS
from xtransfer.prompts import read_answer
from xtransfer.tasks import TASKS, load_examples
for name, language, split in (('xquad', 'en', 'test'), ('xquad', 'zh', 'test'), ('xquad', 'ar', 'test'), ('mlqa', 'zh', 'dev'), ('panx', 'en', 'dev'), ('panx', 'zh', 'dev'), ('xnli', 'sw', 'test')):
    task = TASKS[name + '@prompted']
    rows = load_examples(task, language, split).rows
    scores = METRICS[task.metrics[0]].score([read_answer(task, row, row['answer']) for row in rows], [row['reference'] for row in rows], language)
    print(name, language, min(scores[key] for key in task.headline))
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | hub, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(scores) == 7 and min(scores) > 99 and sum(score == 100 for score in scores) >= 6, done.stdout  # the same name twice in a Chinese sentence is not told apart


# models


def loss_alone(model, objective, prompt, answer):
    """transformers' own loss of one answer."""
    if objective == "spans":
        return model.encoder(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).loss
    if model.family.attention == "flat":
        model.encoder.set_attn_implementation("sdpa")
    ids = torch.tensor([prompt + answer])
    return model.encoder(input_ids=ids, labels=torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)).loss


def parts(tokenizer, objective, row, answer, end=True):
    """Prompt and answer as token ids, made by hand."""
    closing = [] if row["continued"] and objective == "causal" else [tokenizer.eos_token_id]
    prompt, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row["prompt"], answer))
    return prompt + closing, said + ([tokenizer.eos_token_id] if end else [])


@torch.no_grad()
@pytest.mark.parametrize("name", ["world_xnli@prompted", "world_xquad@prompted", "world_xquad@prompted-cloze"])
def test_training_loss_is_that_of_transformers(asked_model, name):
    model, tokenizer, objective = asked_model
    rows = rows_of(name, "qaa")
    encoded = encode_prompted(tokenizer, TASKS[name], rows, RECIPE, objective)
    alone, tokens = [], []
    for i, row in enumerate(rows):
        prompt, answer = parts(tokenizer, objective, row, row["answer"])
        alone.append(loss_alone(model, objective, prompt, answer)), tokens.append(len(answer))
        assert torch.allclose(model.heads["world_xnli@prompted"](model, model.states(make_batch(encoded, np.array([i]))), make_batch(encoded, np.array([i])))[0], alone[-1], atol=2e-5)
    together, _ = model(make_batch(encoded, np.arange(len(rows))), "world_xnli@prompted")
    weights = torch.tensor(tokens, dtype=torch.float)
    assert torch.allclose(together, (torch.stack(alone) * weights).sum() / weights.sum(), atol=2e-5)  # the mean over all answers' tokens


def test_gradients_reach_the_whole_model(asked_model):
    model, tokenizer, objective = asked_model
    encoded = encode_prompted(tokenizer, TASKS["world_xnli@prompted"], rows_of("world_xnli@prompted"), RECIPE, objective)
    loss, _ = model(make_batch(encoded, np.arange(9)), "world_xnli@prompted")
    loss.backward()
    idle = [name for name, p in model.encoder.named_parameters() if p.grad is None]
    model.zero_grad(set_to_none=True)
    assert not idle and not list(model.heads.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["world_xnli@prompted", "world_csqa@prompted", "world_csqa@prompted-cloze"])
def test_likelihood_of_choices_is_that_of_single_sequences(asked_model, name):
    model, tokenizer, objective = asked_model
    rows = rows_of(name, limit=7)
    rows[3] = rows[3] | {"choices": rows[3]["choices"][:2], "answer": rows[3]["choices"][0]} if name.startswith("world_csqa") else rows[3]
    scores = choice_scores(model, encode_prompted(tokenizer, TASKS[name], rows, replace(RECIPE, max_length=250), objective, "choices"))
    for row, found in zip(rows, scores):
        single = [-loss_alone(model, objective, *parts(tokenizer, objective, row, choice, end=not row["continued"])).item() for choice in row["choices"]]
        assert np.allclose(found[:len(single)], single, atol=2e-5) and np.isneginf(found[len(single):]).all()
    assert np.std(scores[:, 0]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["world_xquad@prompted", "world_xquad@prompted-cloze"])
def test_written_together_is_written_alone(asked_model, name):
    model, tokenizer, objective = asked_model
    rows, recipe = rows_of(name, "qab", limit=11), replace(RECIPE, max_answer_length=12)
    task = TASKS[name]
    encoded = encode_prompted(tokenizer, task, rows, recipe, objective, "prompt")
    together = write_answers(model, tokenizer, encoded, answer_limit(task, recipe))
    assert together == [write_answers(model, tokenizer, encode_prompted(tokenizer, task, [row], recipe, objective, "prompt"), answer_limit(task, recipe))[0] for row in rows]
    greedy = []
    for i in range(3):  # and what transformers' forward pass gives, one token after the other
        prompt, answer = encoded.ids[encoded.starts[i]:encoded.starts[i + 1]].tolist(), []
        while len(answer) < answer_limit(task, recipe) and tokenizer.eos_token_id not in answer:
            if objective == "spans":
                logits = model.encoder(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[model.encoder.config.decoder_start_token_id, *answer]])).logits
            else:
                logits = model.encoder(input_ids=torch.tensor([prompt + answer])).logits
            answer.append(int(logits[0, -1].argmax()))
        greedy.append(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    assert together[:3] == greedy and len(set(together)) > 1


def test_checkpoints_that_recommend_sampling_write_the_same(asked_model):
    model, tokenizer, objective = asked_model
    task, rows = TASKS["world_xquad@prompted"], rows_of("world_xquad@prompted", limit=4)
    encoded = encode_prompted(tokenizer, task, rows, RECIPE, objective, "prompt")
    before = write_answers(model, tokenizer, encoded, 8)
    kept = model.encoder.generation_config
    try:
        model.encoder.generation_config = type(kept)(**(kept.to_diff_dict() | {"do_sample": True, "temperature": 3.0, "repetition_penalty": 1.8, "num_beams": 3, "no_repeat_ngram_size": 1}))
        assert write_answers(model, tokenizer, encoded, 8) == before
    finally:
        model.encoder.generation_config = kept


def test_states_are_flat_again_after_writing(asked_model):
    model, tokenizer, objective = asked_model
    encoded = encode_prompted(tokenizer, TASKS["world_xnli@prompted"], rows_of("world_xnli@prompted"), RECIPE, objective)
    batch = make_batch(encoded, np.arange(9))
    with torch.no_grad():
        before = model(batch, "world_xnli@prompted")[0]
        write_answers(model, tokenizer, encode_prompted(tokenizer, TASKS["world_xnli@prompted"], rows_of("world_xnli@prompted"), RECIPE, objective, "prompt"), 3)
        assert torch.equal(model(batch, "world_xnli@prompted")[0], before)


@torch.no_grad()
def test_evaluator_scores_as_the_original_task_does(asked_model):
    model, tokenizer, objective = asked_model
    for name in ("world_xnli", "world_csqa", "world_xquad"):
        task, languages = TASKS[f"{name}@prompted"], TASKS[name].languages[:2]
        examples = [load_examples(task, language, "dev", 8) for language in languages]
        evaluator = make_evaluator(tokenizer, task, task, examples, RECIPE)
        scores, kept = evaluator.score(model, "none")
        originals = [load_examples(TASKS[name], language, "dev", 8).rows for language in languages]
        gold = [row.get("label", row.get("answers")) for rows in originals for row in rows]
        import json
        assert [json.loads(k["reference"]) for k in kept] == gold
        predictions = [json.loads(k["prediction"]) for k in kept]
        for n, language in enumerate(languages):
            part = slice(8 * n, 8 * n + 8)
            own = METRICS[task.metrics[0]].score(predictions[part], gold[part], language)
            assert {s.metric: s.value for s in scores if s.language == language and s.metric in own} == own
        extra = {s.metric for s in scores} - {"accuracy", "exact_match", "f1"}
        writes = name == "world_xquad" or (name == "world_xnli" and objective == "spans")
        assert extra == ({"other_language", "outside_context", "empty_answer"} if name == "world_xquad" else {"no_label"} if writes else set())
        assert ("written" in kept[0]) == writes and evaluator.headline(model) == pytest.approx(np.mean([s.value for s in scores if s.metric in task.headline]))


def test_a_label_that_is_none_counts_as_wrong(monkeypatch):
    import xtransfer.prompting as prompting
    backbone = FAMILIES["mt5"]
    tokenizer, task = load_tokenizer(backbone), TASKS["world_xnli@prompted"]
    model = StageModel(load_encoder(backbone, tokenizer, seed=1), [task], 0, backbone)
    examples = [load_examples(task, "en", "dev", 4)]
    right = [row["answer"] for row in examples[0].rows]
    monkeypatch.setattr(prompting, "write_answers", lambda *_: [right[0], "dog", "", right[3] + " ."])
    scores, kept = make_evaluator(tokenizer, task, task, examples, RECIPE).score(model, "none")
    assert {s.metric: s.value for s in scores} == {"accuracy": 25.0, "no_label": 75.0} and [k["written"] for k in kept] == [right[0], "dog", "", right[3] + " ."]


def test_an_interview_learns_what_it_is_taught():
    backbone = FAMILIES["mt5"]
    tokenizer, task, rows = load_tokenizer(backbone), TASKS["world_xquad@prompted"], rows_of("world_xquad@prompted", limit=4)
    model = StageModel(load_encoder(backbone, tokenizer, seed=1), [task], 0, backbone)
    batch, optimizer = make_batch(encode_prompted(tokenizer, task, rows, RECIPE, "spans"), np.arange(4)), torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        model(batch, task.name)[0].backward(), optimizer.step(), optimizer.zero_grad()
    model.eval()
    answers, written = Interview(tokenizer, task, rows, RECIPE).answers(model)
    assert answers == [row["reference"][0] for row in rows] and METRICS["squad"].score(answers, [row["reference"] for row in rows])["exact_match"] == 100


# a stage of the mini world


def stage_of(folder, backbone, train=(), score=(), steps=6):
    from xtransfer.steps import Step
    recipe = {"name": "x", "learning_rate": 1e-3, "batch_size": 8, "max_steps": steps, "max_length": 96, "evaluations": 1, "dev_limit": 8, "max_answer_length": 6}
    return Step(folder=folder, backbone=backbone, parent="", train=list(train), score=list(score), score_splits=["test"], languages=["en", "qaa"], recipe=recipe, mixing={}, seed=0, train_limit=24, score_limit=6,
                threads=1, declarations=[])


@pytest.mark.parametrize("backbone", ["world-mt5-small", "world-bloom-small"])
def test_a_stage_trains_and_scores_prompted_tasks(tmp_path, backbone):
    from xtransfer.steps import close, score, train
    step = stage_of(tmp_path, backbone, ("world_xquad@prompted", "world_xnli@prompted"), ("world_xquad@prompted", "world_xnli@prompted", "world_xquad@prompted-cloze"))
    train(step)
    table = score(step)
    close(step, keep_checkpoint=False)
    assert {s.selection for s in step.scores if s.task == "world_xquad@prompted-cloze"} == {"none"}  # not trained here: asked as it is
    assert {s.selection for s in step.scores if s.task == "world_xquad@prompted"} == {"best", "last"}
    assert set(table.columns.get_level_values("metric")) >= {"accuracy", "exact_match", "f1", "other_language", "outside_context", "empty_answer"}
    assert {(s.task, s.language) for s in step.scores if s.task != "world_xquad@prompted-cloze"} == {(t, code) for t in ("world_xquad@prompted", "world_xnli@prompted") for code in ("en", "qaa")}
    assert "world_xquad@prompted/test" in step.truncated and len(step.predictions) == 2 * 2 * 2 * 6 + 2 * 6


def test_a_decoder_is_asked_without_training(tmp_path):
    from xtransfer.steps import close, score
    step = stage_of(tmp_path, "world-bloom-small", score=("world_xnli@prompted", "world_xquad@prompted-cloze"))
    score(step)
    close(step, keep_checkpoint=False)
    assert {s.selection for s in step.scores} == {"none"} and {s.metric for s in step.scores if s.task == "world_xnli@prompted"} == {"accuracy"}
    assert step.fitted is None and (tmp_path / "results.json").exists()


@pytest.mark.parametrize("code", list(LANGUAGES)[:50])
def test_every_script_of_the_benchmarks_has_a_name(code):
    """The rule by script can tell a language's script from Latin wherever it is another one."""
    letters = {"Arab": "ا", "Beng": "ক", "Cyrl": "д", "Deva": "क", "Geor": "ა", "Grek": "α", "Gujr": "ક", "Guru": "ਕ", "Hang": "한", "Hani": "中", "Hebr": "א", "Jpan": "の", "Latn": "a", "Mlym": "ക", "Mymr": "က", "Taml": "க",
               "Telu": "క", "Thai": "ก"}
    script = main_script(letters[LANGUAGES[code].script])
    assert script and (script == "LATIN") == (LANGUAGES[code].script == "Latn")
