"""What is encoded comes back: answers, tags and texts of real data in every script, decoded from the logits of a model that knows everything.

The data come from the hub on loopback. Its client reads its settings when it is imported, so this file is also the program that a process with those settings runs.
"""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xtransfer.encoding import IGNORED, encode, pair_affixes
from xtransfer.evaluation import predict_answers, predict_tags
from xtransfer.heads import SpanHead
from xtransfer.languages import UDPOS_CONFIGS
from xtransfer.metrics import METRICS, normalize_squad
from xtransfer.sources import Source, hub_loader
from xtransfer.studies import Recipe
from xtransfer.tasks import Task, choices_nested, load_examples, squad_columns, tagging, text_pair

TOKENIZERS = {"xlm-r": "FacebookAI/xlm-roberta-base", "mbert": "google-bert/bert-base-multilingual-cased"}
TYDIQA = {"arabic": "ar", "bengali": "bn", "english": "en", "finnish": "fi", "indonesian": "id", "korean": "ko", "russian": "ru", "swahili": "sw", "telugu": "te"}
PANX = "af ar az bg bn de el en es et eu fa fi fr gu he hi hu id it ja jv ka kk ko ml mr ms my nl pa pl pt qu ro ru sw ta te tl tr uk ur vi yo zh".split()
UPOS = tuple("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split())
ENTITIES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
SAMPLE = 300  # sentences of a language that are tagged


def recipe(max_length, stride, longest_answer=30):
    return Recipe(name="test", learning_rate=0, batch_size=1, max_length=max_length, stride=stride, max_answer_length=longest_answer)


def declared(name, format, repo, config, split, languages, read, labels=(), keep=None):
    """A task over one split of a data set on the hub."""
    source = Source(repo=repo)
    return Task(name=name, format=format, kind="test", source=source, languages=tuple(languages), load=hub_loader(source, config, {"dev": split}, keep), read=read, labels=labels, metrics=("squad_v2",))


QUESTIONS = (
    declared("xquad", "span_extraction", "google/xquad", lambda g: f"xquad.{g}", "validation", "ar de el en es hi ro ru th tr vi zh".split(), squad_columns),
    declared("mlqa", "span_extraction", "facebook/mlqa", lambda g: f"mlqa.{g}.{g}", "validation", "ar de en es hi vi zh".split(), squad_columns),
    declared("tydiqa", "span_extraction", "google-research-datasets/tydiqa", "secondary_task", "validation", TYDIQA.values(), squad_columns, keep=lambda row, g: TYDIQA[row["id"].split("-")[0]] == g),
    declared("squad", "span_extraction", "rajpurkar/squad", None, "validation", ("en",), squad_columns),
    declared("squad train", "span_extraction", "rajpurkar/squad", None, "train[:3000]", ("en",), squad_columns),
)
TAGGED = (
    declared("panx", "token_classification", "unimelb-nlp/wikiann", lambda g: g, f"validation[:{SAMPLE}]", PANX, tagging("tokens", "ner_tags"), ENTITIES),
    declared("udpos", "token_classification", "google/xtreme", lambda g: UDPOS_CONFIGS[g], f"test[:{SAMPLE}]", [g for g in UDPOS_CONFIGS if g not in ("lt", "pl", "uk", "wo", "ro")], tagging("tokens", "pos_tags"), UPOS),
)
NLI = ("entailment", "neutral", "contradiction")
PAIRS = (
    declared("xnli", "sequence_classification", "facebook/xnli", lambda g: g, f"validation[:{SAMPLE}]", "ar bg de el en es fr hi ru sw th tr ur vi zh".split(), text_pair("premise", "hypothesis"), NLI),
    declared("csqa", "multiple_choice", "tau/commonsense_qa", None, "validation", ("en",), choices_nested),
)


class Remembering:
    """A tokenizer that does not tokenise the same texts again for another size of windows."""

    def __init__(self, tokenizer):
        self.tokenizer, self.found = tokenizer, {}

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, pairs=None, **options):
        if pairs is not None or isinstance(texts, str):
            return self.tokenizer(texts, pairs, **options)
        key = (hash(tuple(map(str, texts))), len(texts), str(sorted(options.items())))
        if key not in self.found:
            self.found[key] = self.tokenizer(texts, **options)
        return self.found[key]


class Omniscient:
    """Stands in for a model: its logits are the targets."""

    encoder = SimpleNamespace(device=torch.device("cpu"))
    heads = defaultdict(lambda: SpanHead(4, 2, 0.0))

    def __call__(self, batch, head):
        if "tag" in batch.targets:
            tags = batch.targets["tag"]
            return None, torch.nn.functional.one_hot(tags[tags != IGNORED], 32).float()
        spans = batch.targets["span"].clamp(min=0)  # "not here" is the first token
        logits = torch.zeros(len(spans), batch.lengths[-1], 2)
        for side in (0, 1):
            logits[torch.arange(len(spans)), spans[:, side], side] = 9.0
        return None, logits


def decoded_answers(tokenizer, task, rows, chosen):
    """The text that the package gives for each example, and whether the answer is in one of its windows."""
    encoded = encode(tokenizer, task, rows, chosen)
    spans = encoded.sequence_targets["span"]
    there = np.zeros(encoded.examples, dtype=bool)
    there[encoded.example[(spans >= 0).all(axis=1)]] = True
    return predict_answers(Omniscient(), task.name, encoded, [r["context"] for r in rows], chosen, False), there


def tokens_of_answers(tokenizer, rows):
    """How many tokens of the whole context touch each row's answer, and the text that they cover."""
    contexts = list(dict.fromkeys(r["context"] for r in rows))
    covers = dict(zip(contexts, tokenizer(contexts, return_offsets_mapping=True, add_special_tokens=False, return_attention_mask=False, verbose=False)["offset_mapping"]))
    found = []
    for row in rows:
        start, end = row["starts"][0], row["starts"][0] + len(row["answers"][0])
        touched = [(a, b) for a, b in covers[row["context"]] if a < end and b > start]
        found.append((len(touched), row["context"][touched[0][0]:touched[-1][1]]))
    return found


@cache
def all_rows(name):
    """The examples of a task in all its languages; a question comes once for each of its gold answers."""
    (task,) = (t for t in (*QUESTIONS, *TAGGED, *PAIRS) if t.name == name)
    rows = [row for language in task.languages for row in load_examples(task, language, "dev").rows]
    if task.format != "span_extraction":
        return rows
    return [row | {"number": i, "golds": row["answers"], "answers": [answer], "starts": [start]} for i, row in enumerate(rows) for answer, start in dict.fromkeys(zip(row["answers"], row["starts"]))]


def measure_answers(tokenizer):
    """For each window size and task: how answers come back, and what is wrong."""
    result = {}
    for task in QUESTIONS:
        rows = all_rows(task.name)
        expected = tokens_of_answers(tokenizer, rows)
        for max_length, stride in ((384, 128), (128, 64)):
            chosen = recipe(max_length, stride)
            overlap = min(stride, (max_length - 68) // 2)
            texts, there = decoded_answers(tokenizer, task, rows, chosen)
            long = [i for i, (size, _) in enumerate(expected) if size > 30]
            again, _ = decoded_answers(tokenizer, task, [rows[i] for i in long], recipe(max_length, stride, longest_answer=max_length))
            counts = Counter(answers=len(rows), long=len(long), windowless=int((~there).sum()))
            counts["windowless although short"] = sum(not t and size <= overlap + 1 for t, (size, _) in zip(there, expected))
            for i, (text, (size, covered)) in enumerate(zip(texts, expected)):
                if size <= 30:
                    gold = rows[i]["answers"][0]
                    counts["other text than the tokens'"] += text != covered.strip()
                    counts["exact" if text == gold else "normalised" if normalize_squad(text) == normalize_squad(gold) else "wider"] += 1
                counts["outer space"] += text != text.strip()
            counts["long, other text than the tokens'"] = sum(text != expected[i][1].strip() for i, text in zip(long, again) if there[i])
            right = {r["number"] for r, text in zip(rows, texts) if METRICS["squad"].compute([text], [r["golds"]])["exact_match"]}
            result[f"{task.name} {max_length}"] = counts | {"best exact match": 100 * len(right) / (1 + rows[-1]["number"])}
    return result


def measure_tags(tokenizer):
    """For each window size and task: sentences, windows, and sentences whose tags do not come back."""
    result = {}
    for task in TAGGED:
        rows = all_rows(task.name)
        for max_length, stride in ((256, 128), (24, 8)):
            encoded = encode(tokenizer, task, rows, recipe(max_length, stride))
            tags = [[task.labels[i] for i in found] for found in predict_tags(Omniscient(), task.name, encoded)]
            result[f"{task.name} {max_length}"] = {"sentences": len(rows), "windows": len(encoded.lengths), "cut words": encoded.truncated, "longest": int(encoded.lengths.max()),
                                                   "lost": sum(t != r["tags"] for t, r in zip(tags, rows))}
    return result


def bare(text):
    """A text without white space, as tokenizers may space it in their own way."""
    return "".join(text.split())


def measure_texts(tokenizer):
    """For each length and task: sequences, those that do not hold their texts, and examples that are said and ought to be cut."""
    result = {}
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str
    special = sum(map(len, pair_affixes(tokenizer)))
    for task in PAIRS:
        rows = all_rows(task.name)
        texts = [[(r["text"], c) for c in r["choices"]] if "choices" in r else [(r["text"], r["text_pair"])] for r in rows]
        flat = [pair for pairs in texts for pair in pairs]
        distinct = list(dict.fromkeys(text for pair in flat for text in pair))
        size = dict(zip(distinct, map(len, tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"])))
        sizes = [max(size[a] + size[b] for a, b in pairs) + special for pairs in texts]
        for max_length in (256, 32):
            encoded = encode(tokenizer, task, rows, recipe(max_length, 8))
            parts = [encoded.ids[a:b].tolist() for a, b in zip(encoded.starts, encoded.starts[1:])]
            fits = [i for i, (a, b) in enumerate(flat) if len(parts[i]) < max_length and tokenizer.unk_token_id not in parts[i]]
            back = tokenizer.batch_decode([parts[i] for i in fits], skip_special_tokens=True)
            wrong = sum(bare(text) != bare(normal(flat[i][0]) + normal(flat[i][1])) for i, text in zip(fits, back))
            result[f"{task.name} {max_length}"] = {"sequences": len(parts), "decoded": len(fits), "wrong": wrong, "cut": encoded.truncated, "to be cut": sum(s > max_length for s in sizes),
                                                   "longest": int(encoded.lengths.max())}
    return result


MEASURES = {"answers": measure_answers, "tags": measure_tags, "texts": measure_texts}


@pytest.fixture(scope="module")
def measured(hub):
    """What the program below prints."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=dict(os.environ) | hub)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# Of all gold answers with the recipe's 30 tokens at most: the text of the tokens is the answer; it is the same after the
# scorer's normalization ("(118)" for "118"); a token covers more than the answer ("Japanese" for "Japan", "计算问题的" for "计算问题"). And those of more than 30 tokens, which cannot be predicted.
ANSWERS = {
    "xlm-r": {"xquad": (13823, 355, 39, 63), "mlqa": (3965, 91, 82, 61), "tydiqa": (5005, 270, 245, 346), "squad": (17437, 471, 52, 55), "squad train": (2801, 189, 8, 2)},
    "mbert": {"xquad": (14014, 0, 14, 252), "mlqa": (4063, 0, 44, 92), "tydiqa": (5199, 0, 238, 429), "squad": (17926, 0, 50, 39), "squad train": (2988, 0, 10, 2)},
}
# The share of questions with a gold answer that a model which knows everything can give: exact match, SQuAD's rules.
HIGHEST = {"xlm-r": {"xquad": 99.29, "mlqa": 96.59, "tydiqa": 92.24, "squad": 99.98}, "mbert": {"xquad": 98.14, "mlqa": 96.76, "tydiqa": 91.22, "squad": 99.97}}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_answer_decodes_to_the_text_of_its_tokens(name, measured):
    for task, counts in measured["answers"][name].items():
        assert counts["other text than the tokens'"] == counts["long, other text than the tokens'"] == counts["outer space"] == 0, task
        assert counts["windowless although short"] == 0, "an answer that is shorter than the overlap of two windows is in one of them"
        assert counts["windowless"] == 0 or task.endswith(" 128") and counts["windowless"] <= counts["long"], task


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_keeps_a_perfect_model_from_the_gold_answer(name, measured):
    for max_length in (384, 128):
        found = {task: measured["answers"][name][f"{task} {max_length}"] for task in ANSWERS[name]}
        assert {task: tuple(counts.get(kind, 0) for kind in ("exact", "normalised", "wider", "long")) for task, counts in found.items()} == ANSWERS[name]
        assert all(sum(ANSWERS[name][task]) == counts["answers"] for task, counts in found.items())
        assert {task: round(found[task]["best exact match"], 2) for task in HIGHEST[name]} == HIGHEST[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tag_sequence_comes_back(name, measured):
    for task, counts in measured["tags"][name].items():
        assert counts["lost"] == 0 and counts["longest"] <= int(task.split()[1]), task
    found = measured["tags"][name]
    assert found["panx 24"]["sentences"] == 12_600 and found["udpos 24"]["sentences"] == 8_868, "300 of each language, all of the smaller ones"
    assert found["udpos 24"]["windows"] > 2 * found["udpos 24"]["sentences"] and found["udpos 256"]["cut words"] == found["panx 256"]["cut words"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_sequences_hold_their_texts_and_what_is_cut_is_counted(name, measured):
    for task, counts in measured["texts"][name].items():
        assert counts["wrong"] == 0 and counts["cut"] == counts["to be cut"] and counts["longest"] <= int(task.split()[1]), task
        assert counts["decoded"] >= (0.95 if task.endswith("256") else 0.2) * counts["sequences"], task


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer whose tokens hold the space before a word, and that drops zero-width characters."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", "<unk>", *("▁" + c for c in "abcdefgh?")]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex("[\u200b-\u200d\u00ad]"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("answer", ["c", "b c", "c\u200b", "\u00ad\u200cd", " e", "e ", "a", "h"])
def test_spaces_and_zero_width_characters_around_an_answer_do_no_harm(answer, spaced):
    context = "a b c\u200b \u00ad\u200cd e f g h"
    row = {"id": "0", "question": "a ?", "context": context, "answers": [answer], "starts": [context.index(answer)]}
    texts, there = decoded_answers(spaced, QUESTIONS[0], [row], recipe(128, 8))
    assert there.all() and [text.strip("\u00ad\u200b\u200c") for text in texts] == [answer.strip(" \u00ad\u200b\u200c")] and texts[0] == texts[0].strip()


def test_an_answer_of_nothing_but_zero_width_characters_is_in_no_window(spaced):
    rows = [{"id": "0", "question": "a ?", "context": "a\u200b b", "answers": ["\u200b"], "starts": [1]}]
    assert not decoded_answers(spaced, QUESTIONS[0], rows, recipe(128, 8))[1].any()


def test_words_that_become_no_token_keep_their_tags(spaced):
    words = ["\u200c", "a", "\u00ad\u200b", "b" * 3, "\u200d", "c"]
    rows = [{"id": "0", "tokens": words * 5, "tags": [UPOS[i % 17] for i in range(30)]}, {"id": "1", "tokens": ["\u00ad"], "tags": ["X"]}]
    encoded = encode(spaced, TAGGED[1], rows, recipe(9, 3))
    assert [[UPOS[i] for i in found] for found in predict_tags(Omniscient(), "udpos", encoded)] == [r["tags"] for r in rows] and len(encoded.lengths) > 5


if __name__ == "__main__":
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    tokenizers = {name: Remembering(AutoTokenizer.from_pretrained(repo)) for name, repo in TOKENIZERS.items()}
    print(json.dumps({kind: {name: measure(tokenizer) for name, tokenizer in tokenizers.items()} for kind, measure in MEASURES.items()}))
