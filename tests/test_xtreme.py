"""The targets of XTREME and XTREME-R: language lists, counts, roles of splits, official files, and what a hub on loopback serves."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

import xtransfer.xtreme_r
from xtransfer.conllu import tagged_sentences
from xtransfer.core import XtransferError
from xtransfer.languages import LANGUAGE_SETS
from xtransfer.metrics import METRICS
from xtransfer.tasks import TASKS, load_examples

TARGETS = {name: name for name in ("xnli", "pawsx", "udpos", "panx", "xquad", "mlqa", "tydiqa", "bucc2018", "tatoeba")} | {"udpos_official": "udpos", "bucc2018_goldpairs": "bucc2018"} \
    | {name: f"xtreme_r/{name.removesuffix('_xr')}" for name in ("xcopa", "udpos_xr", "panx_xr", "xquad_xr", "tatoeba_xr", "lareqa", "mewslix")}
TRAINING = {"xnli": "mnli", "xquad": "squad1", "xquad_xr": "squad1", "mlqa": "squad1", "pawsx": "pawsx", "tydiqa": "tydiqa", "panx": "panx", "panx_xr": "panx", "udpos": "udpos", "udpos_official": "udpos_official",
            "udpos_xr": "udpos_official", "xcopa": "copa", "lareqa": "squad_sentences", "mewslix": "mewslix_wikipedia"}
NO_DEV = {"kk", "th", "tl", "yo"}  # languages of UD-POS
UNPUBLISHED = {  # counts that no source at hand states
    "bucc2018": lambda language, split: (language, split) != ("zh", "dev"),
    "udpos_official": lambda language, split: language in ("de", "fr", "ru", "zh"),
    "udpos_xr": lambda language, split: language in ("de", "fr", "ru", "zh", "lt", "pl", "ro", "uk", "wo"),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """An empty folder for users' files, as the tasks see it."""
    monkeypatch.setenv("XTRANSFER_DATA", str(tmp_path))
    for task in TASKS.values():
        task.load.forget() if hasattr(task.load, "forget") else None
    return tmp_path / "files"


def write(folder, **contents):
    """Files by their name, with __ for a slash."""
    for name, content in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_the_official_languages_its_training_task_and_counts(name):
    task = TASKS[name]
    assert sorted(task.languages) == sorted(LANGUAGE_SETS[TARGETS[name]]) and ("en" not in task.languages or task.languages[0] == "en")
    assert task.trains_on == TRAINING.get(name) and task.description and task.traps and task.source.license and task.source.citation
    assert task.metrics and set(task.headline) <= {key for metric in task.metrics for key in METRICS[metric].keys}
    for split in task.load.splits:
        for language in task.languages if split != "train" else ("en",):
            if split == "dev" and language in NO_DEV and name.startswith("udpos") or UNPUBLISHED.get(name, lambda *_: False)(language, split):
                continue
            assert task.expected_rows.get(f"{language}/{split}", task.expected_rows.get(split)), (language, split)
    if task.trains_on:
        trained = TASKS[task.trains_on]
        assert trained.format == task.format and set(task.labels) <= set(trained.labels) and trained.train_languages == ("en",) and {"train", "dev"} <= set(trained.load.splits)
        assert trained.trains_on == trained.name and trained.expected_rows.get("en/train", trained.expected_rows.get("train"))


def test_roles_and_names_that_keep_numbers_apart():
    assert TASKS["mlqa"].metrics == ("mlqa",) and METRICS["mlqa"].by_language and TASKS["tydiqa"].metrics == ("squad",)
    assert TASKS["xquad"].load.splits == ("test",) and TASKS["lareqa"].load.splits == ("test",) and TASKS["mewslix"].load.splits == ("dev", "test")
    assert not set(TASKS["bucc2018_goldpairs"].headline) & set(TASKS["bucc2018"].headline) and "not BUCC" in TASKS["bucc2018_goldpairs"].source.note
    assert "fused forms" in TASKS["udpos"].source.note and not TASKS["udpos_official"].source.note
    assert TASKS["copa"].continues == "social_iqa" and TASKS["copa"].read is TASKS["xcopa"].read


@pytest.mark.parametrize("name,language,split,said", [("bucc2018", "de", "test", "comparable.limsi.fr"), ("udpos_official", "de", "test", "ud-treebanks-v2.5"), ("udpos_xr", "wo", "test", "ud-treebanks-v2.7"),
                                                      ("lareqa", "de", "test", "github.com/google-research-datasets/lareqa"), ("mewslix", "de", "test", "get-mewsli-x.sh")])
def test_missing_files_are_one_sentence_that_says_where_they_come_from(name, language, split, said, files):
    for held in (False, True):
        if held:
            (files / TASKS[name].source.repo.removeprefix("files/")).mkdir(parents=True)
            (files / "ud-treebanks-v2.7").mkdir(exist_ok=True)
        with pytest.raises(XtransferError) as error:
            load_examples(TASKS[name], language, split)
        assert "\n" not in str(error.value) and (said in str(error.value) or held and "no treebank" in str(error.value))


def conllu(*words):
    """A sentence of CoNLL-U from (number, form, tag, head) and an optional column of enhanced dependencies."""
    return "\n".join("\t".join((str(w[0]), w[1], "_", w[2], "_", "_", str(w[3]), "dep", w[4] if len(w) > 4 else "_", "_")) for w in words) + "\n\n"


DU = (("1-2", "du", "_", "_"), (1, "de", "ADP", 3), (2, "le", "DET", 3), (3, "pain", "NOUN", 0))


@pytest.mark.parametrize("language,text,wanted", [
    ("fr", conllu(*DU), [("du", "ADP"), ("pain", "NOUN")]),  # both hang on the noun: the list of French prefers ADP to DET
    ("es", conllu(("1-3", "dámelo", "_", "_"), (1, "da", "VERB", 0), (2, "me", "PRON", 1), (3, "lo", "PRON", 1)), [("dámelo", "VERB")]),
    ("de", conllu((1, "geht", "VERB", 0), ("2-3", "zum", "_", "_"), (2, "zu", "ADP", 4), (3, "dem", "DET", 2), (4, "See", "NOUN", 1)), [("geht", "VERB"), ("zum", "ADP"), ("See", "NOUN")]),
    ("ar", conllu(("1-2", "ab", "_", "_"), (1, "a", "SYM", 3), (2, "b", "X", 3), (3, "c", "NOUN", 0)), [("ab", "X"), ("c", "NOUN")]),  # tags outside of the list come last
    ("cs", conllu((1, "a", "CCONJ", 2), ("1.1", "elided", "VERB", "_"), (2, "b", "NOUN", 0)), [("a", "CCONJ"), ("b", "NOUN")]),
    ("it", conllu(("1-2", "ab", "_", "_"), (1, "a", "PRON", 3, "3:x|2:y"), (2, "b", "DET", 3), (3, "c", "NOUN", 0)), [("ab", "DET"), ("c", "NOUN")]),  # the enhanced graph puts a below b
    ("fa", conllu((1, "می\u200cرود", "VERB", 0), (2, "3 000", "NUM", 1)), [("میرود", "VERB"), ("3000", "NUM")]),
])
def test_fused_forms_take_the_tag_of_the_word_that_stands_highest(language, text, wanted):
    found, = tagged_sentences(text, language)
    assert list(zip(found["tokens"], found["pos_tags"])) == wanted


def test_sentences_without_text_go_and_first_lines_stay():
    blank = conllu((1, "_", "NOUN", 0), (2, "_", "VERB", 1), (3, ".", "PUNCT", 1))
    partly = conllu((1, "_", "NOUN", 0), (2, "goes", "VERB", 1), (3, ".", "PUNCT", 1))
    found = tagged_sentences(conllu(*DU) + blank + "# text = x\n" + partly + blank.strip(), "en")
    assert [s["tokens"] for s in found] == [["du", "pain"], ["_", "goes", "."]]
    with pytest.raises(XtransferError, match="x.conllu, the sentence before line 2, is not CoNLL-U"):
        tagged_sentences("1\tword\tNOUN\n", "en", "x.conllu")


def test_treebanks_are_those_of_the_language_and_of_the_right_release(files):
    write(files / "ud-treebanks-v2.5", **{"UD_French-GSD__fr_gsd-ud-test.conllu": conllu(*DU), "UD_French-PUD__fr_pud-ud-test.conllu": conllu(*DU) * 2, "UD_Old_French-SRCMF__fro_srcmf-ud-test.conllu": conllu(*DU),
                                          "UD_Polish-LFG__pl_lfg-ud-test.conllu": conllu(*DU)})
    write(files / "ud-treebanks-v2.7", **{"ud-treebanks-v2.7__UD_Polish-PDB__pl_pdb-ud-test.conllu": conllu(*DU) * 3, "UD_French-GSD__fr_gsd-ud-test.conllu": conllu(*DU) * 7})
    assert [len(load_examples(TASKS[name], "fr", "test").rows) for name in ("udpos_official", "udpos_xr")] == [3, 3]
    assert len(load_examples(TASKS["udpos_xr"], "pl", "test").rows) == 3
    with pytest.raises(XtransferError, match="no treebank .* de_"):
        load_examples(TASKS["udpos_xr"], "de", "test")


@pytest.mark.parametrize("name", ("{pair}/{pair}.training.{end}", "{pair}.test.{end}", "bucc2018/{pair}/{pair}.training.{end}"))
def test_bucc_is_read_from_the_shared_tasks_files_and_from_xtremes(name, files):
    contents = {"fr": "fr-1\tBonjour\tmonde. \nfr-2\tOui\u2028non.\nfr-3\tBonjour.\n", "en": "en-1\tYes.\nen-2\tHello.\nen-3\tHi.\n", "gold": "fr-1\ten-2\nfr-3\ten-2\nfr-3\ten-3\n"}
    write(files / "bucc2018", **{name.format(pair="fr-en", end=end): content for end, content in contents.items()})
    rows = load_examples(TASKS["bucc2018"], "fr", "test").rows
    assert [(r["id"], r["side"], r["match"]) for r in rows] == [("fr-1", "source", "en-2"), ("fr-2", "source", ""), ("fr-3", "source", "en-2 en-3"), *((f"en-{i}", "target", "") for i in (1, 2, 3))]
    assert rows[0]["text"] == "Bonjour\tmonde." and rows[1]["text"] == "Oui\u2028non."
    with pytest.raises(XtransferError, match="fr-en.sample.gold"):
        load_examples(TASKS["bucc2018"], "fr", "dev")
    write(files / "bucc2018", **{name.format(pair="fr-en", end="en"): "en-1 Yes.\n"})
    TASKS["bucc2018"].load.forget()
    with pytest.raises(XtransferError, match="line 1 of .* two columns"):
        load_examples(TASKS["bucc2018"], "fr", "test")


def test_lareqa_asks_for_the_sentences_of_all_languages(files):
    def paragraph(word):
        context = f"{word} one. {word} two. {word} one."
        spans = [[0, len(word) + 5], [len(word) + 6, 2 * len(word) + 11], [2 * len(word) + 12, 3 * len(word) + 17]]
        return {"context": context, "sentence_breaks": spans, "qas": [{"id": "q1", "question": f"{word}?", "answers": [{"answer_start": 1, "text": "x"}]}, {"id": "q2", "question": "2?", "answers": [{"answer_start": spans[1][0], "text": "x"}]}]}
    write(files / "lareqa", **{f"xquad-r__{code}.json": json.dumps({"data": [{"paragraphs": [paragraph(code * (i + 1))]}]}) for i, code in enumerate(LANGUAGE_SETS["lareqa"])})
    rows = load_examples(TASKS["lareqa"], "th", "test").rows
    queries = [r for r in rows if r["side"] == "query"]
    assert [r["id"] for r in rows] == ["q1", "q2", "th-0-0", "th-0-1", "th-0-2"] and sorted(queries[1]["relevant"]) == sorted(f"{code}-0-1" for code in LANGUAGE_SETS["lareqa"])
    assert len(queries[0]["relevant"]) == 22 and rows[3]["text"].endswith(" two.") and rows[3]["text_pair"].startswith(rows[2]["text"])
    (files / "lareqa/xquad-r/th.json").write_text('{"data": [{"paragraphs": [{"context": "x", "qas": []}]}]}')
    TASKS["lareqa"].load.forget()
    with pytest.raises(XtransferError, match="th.json is not a file of LAReQA: KeyError 'sentence_breaks'"):
        load_examples(TASKS["lareqa"], "de", "test")


def test_mewslix_reads_the_builders_files(files):
    def context(language, text):
        return {"language": language, "text": text, "sentence_spans": [{"start": 0, "end": 10}, {"start": 11, "end": len(text)}]}

    def mention(i, entity, start, end, text):
        return {"example_id": i, "entity_id": entity, "mention_span": {"start": start, "end": end, "text": text[start:end]}}
    german, english = "Ein Titel.\nIn Bonn regnet es.", "Some head.\nIt rains in Bonn {or so}\nagain."
    entities = [{"entity_id": f"Q{i}", "title": "t", "description": f"Stadt {i}. Am\nRhein. Ende.", "sentence_spans": [{"start": 0, "end": 8}, {"start": 9, "end": 18}], "description_language": "de"} for i in range(3)]
    news = [{"context": context("de", german), "mentions": [mention("a", "Q1", 14, 18, german), mention("b", "Q2", 4, 9, german)]}, {"context": context("en", english), "mentions": [mention("c", "Q0", 23, 27, english)]}]
    pairs = [{"contextual_mention": {"context": context("en", english), "mention": mention(f"w{i}", "Q0", 23, 27, english)}, "entity": entities[0]} for i in range(2)]
    for name, values in {"candidate_set_entities": entities, "wikinews_mentions-dev": news, "wikinews_mentions-test": news, "wikipedia_pairs-train": pairs}.items():
        write(files / "mewslix", **{f"{name}.jsonl": "".join(json.dumps(v) + "\n" for v in values)})
    de, en = (load_examples(TASKS["mewslix"], language, "test").rows for language in ("de", "en"))
    assert [(r["id"], r["text"], r["relevant"]) for r in de] == [("a", "Bonn: In { Bonn } regnet es.", ["Q1"]), ("b", "Titel: Ein { Titel } .", ["Q2"])]
    assert en[0]["text"] == "Bonn: It rains in { Bonn } (or so) again." and [r["id"] for r in en[1:]] == ["Q0", "Q1", "Q2"] and en[1]["text"] == "Stadt 0. Am Rhein."
    rows = load_examples(TASKS["mewslix_wikipedia"], "en", "train").rows
    assert [(r["side"], r["relevant"]) for r in rows] == [("query", ["Q0"]), ("query", ["Q0"]), ("candidate", [])]
    write(files / "mewslix", **{"candidate_set_entities.jsonl": "{broken\n"})
    TASKS["mewslix"].load.forget()
    with pytest.raises(XtransferError, match="line 1 of .*candidate_set_entities.jsonl is damaged"):
        load_examples(TASKS["mewslix"], "en", "dev")


def test_a_stage_starts_its_head_from_the_parents_head_that_its_task_continues(toys, tmp_path):
    """The chain of Social IqA, COPA and XCOPA, with toy tasks and the code of a notebook."""
    import torch

    from test_modeling import model_of
    from xtransfer.backbones import BACKBONES
    from xtransfer.modeling import save_checkpoint
    from xtransfer.steps import Step

    TASKS.register(replace(TASKS["toy_choice"], name="toy_copa", trains_on="toy_copa", continues="toy_choice"))
    parent = model_of(seed=3)
    (tmp_path / "parent").mkdir(), (tmp_path / "here").mkdir()
    save_checkpoint(parent, BACKBONES["toy-encoder"].build_tokenizer(), tmp_path / "parent")
    asked = {"backbone": "toy-encoder", "declarations": [], "parent": "../parent", "train": ["toy_copa", "toy_pair"], "score": [], "recipe": {"name": "t", "learning_rate": 1e-3, "batch_size": 4}, "mixing": {},
             "seed": 9, "score_splits": ["test"], "languages": [], "train_limit": 0, "score_limit": 0, "threads": 1}
    step = Step(tmp_path / "here", **asked)
    heads = step.model.heads
    assert step.kept_heads == ["toy_copa"] and step.describe().loc["heads kept", ""] == "toy_copa"
    assert all(torch.equal(value.cpu(), parent.heads["toy_choice"].state_dict()[key]) for key, value in heads["toy_copa"].state_dict().items())
    assert not torch.equal(heads["toy_pair"].out.weight.cpu(), parent.heads["toy_pair"].out.weight), "other heads start anew"


COLLECT = '''
import json, re, sys, zlib
from dataclasses import replace

import datasets
import numpy as np

import xtransfer.xtreme_r
from xtransfer.evaluation import score_mining
from xtransfer.sources import data_folder
from xtransfer.tasks import TASKS, load_examples

datasets.disable_progress_bars()
files, asked = data_folder() / "files", json.loads(sys.argv[1])

def served(repo, config):
    return datasets.load_dataset(repo, config, split="validation").to_list()

for language in TASKS["lareqa"].languages:  # the official layout, from the rows with sentence boundaries
    paragraphs = {}
    for row in served("google-research-datasets/lareqa", language):
        paragraph = paragraphs.setdefault(row["context"], {"context": row["context"], "sentence_breaks": row["sentence_breaks"], "qas": []})
        paragraph["qas"].append({"id": row["id"], "question": row["question"], "answers": [{"text": t, "answer_start": s} for t, s in zip(row["answers"]["text"], row["answers"]["answer_start"])]})
    path = files / "lareqa" / "xquad-r" / f"{language}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": [{"paragraphs": list(paragraphs.values())}]}))
bucc = files / "bucc2018" / "zh-en"
bucc.mkdir(parents=True)
for side in ("zh", "en"):
    (bucc / f"zh-en.sample.{side}").write_text("".join(f"{r['id']}\\t{r['text']}\\n" for r in served("local/bucc2018-zh-en-sample", side)))
(bucc / "zh-en.sample.gold").write_text("".join(f"{r['id_zh']}\\t{r['id_en']}\\n" for r in served("local/bucc2018-zh-en-sample", "gold")))

facts, sides = {}, {}
for name, split, languages in asked:
    for language in languages or TASKS[name].languages:
        found = load_examples(TASKS[name], language, split)
        facts[f"{name}/{language}/{split}"] = {k: v for k, v in found.facts.items() if k in ("rows", "available", "expected", "capped", "repaired", "unlabelled")}
        if name == "lareqa":
            queries = [r for r in found.rows if r["side"] == "query"]
            sides[language] = [len(queries), len(found.rows) - len(queries), sorted({len(r["relevant"]) for r in queries})]

def vectors(sentences):
    """Hashed numbers and Latin names, which Chinese and English share."""
    found = np.random.default_rng(len(sentences)).normal(scale=0.01, size=(len(sentences), 512)).astype(np.float32)
    for row, sentence in zip(found, sentences):
        for word in re.findall("[0-9]{2,}|[A-Za-z]{4,}", sentence):
            row[zlib.crc32(word.lower().encode()) % 512] += not word.islower()
    return found

whole = load_examples(TASKS["bucc2018"], "zh", "dev")
paired = {row["match"] for row in whole.rows if row.get("match")}
pool = replace(whole, rows=[row for row in whole.rows if row.get("match") or row["id"] in paired or zlib.crc32(row["id"].encode()) % 12 == 0])
mined, _ = score_mining(TASKS["bucc2018"], [(pool, pool)], vectors)
questions = TASKS["xcopa"].read(TASKS["xcopa"].load("et", "dev")[0])
print(json.dumps({"facts": facts, "sides": sides, "mined": {s.metric: [s.value, s.n] for s in mined}, "xcopa": questions}))
'''
ASKED = [("xnli", "dev", ()), ("xnli", "test", ()), ("pawsx", "dev", ()), ("pawsx", "test", ("en", "de", "zh")), ("panx_xr", "dev", tuple(c for c in TASKS["panx_xr"].languages if c != "th")), ("panx", "train", ("en",)),
         ("xquad_xr", "test", ()), ("mlqa", "dev", ()), ("tydiqa", "dev", ()), ("tydiqa", "test", ()), ("tydiqa", "train", ("en",)), ("tatoeba", "test", ()), ("tatoeba_xr", "test", ()), ("xcopa", "dev", ()),
         ("xcopa", "test", ()), ("bucc2018_goldpairs", "dev", ("zh",)), ("lareqa", "test", ()), ("bucc2018", "dev", ("zh",)), ("squad_sentences", "dev", ()), ("squad_sentences", "train", ())]


@pytest.fixture(scope="module")
def served(hub, tmp_path_factory):
    """What one process reads from the hub, and from official files that it writes from the hub's rows."""
    around = dict(os.environ) | hub | {"XTRANSFER_DATA": str(tmp_path_factory.mktemp("data")), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COLLECT, json.dumps(ASKED)], capture_output=True, text=True, env=around, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_served_splits_have_the_published_counts_in_every_language(served):
    facts = served["facts"]
    assert len(facts) == sum(len(languages or TASKS[name].languages) for name, _, languages in ASKED)
    wrong = {key: f for key, f in facts.items() if f["expected"] is None or f["available"] != f["expected"] or f["capped"] or f["unlabelled"]}
    assert not wrong, wrong


def test_lareqas_candidates_are_the_published_ones(served):
    counts = {"ar": 1222, "de": 1276, "el": 1234, "en": 1180, "es": 1215, "hi": 1244, "ru": 1219, "th": 852, "tr": 1167, "vi": 1209, "zh": 1196}
    found = served["sides"]
    assert {language: found[language][1] for language in counts} == counts and all(found[language][0] == 1190 for language in counts)
    assert all(min(found[language][2]) == 11 for language in counts), "every question has a right sentence in every language"


def test_mining_real_files_finds_pairs(served):
    """What Chinese and English share in writing finds some of the 257 pairs among 2,000 sentences: files, ids, mining and threshold fit together. By chance it would be none."""
    f1, n = served["mined"]["f1"]
    assert n == 257 and 4 < f1 < 100, served["mined"]


def test_xcopa_asks_as_copa_does(served):
    assert served["xcopa"]["text"] == "Mees keeras kraani lahti. What was the effect?" and served["xcopa"]["label"] == 1 and len(served["xcopa"]["choices"]) == 2


@pytest.mark.parametrize("name", ["tatoeba", "tatoeba_xr", "bucc2018", "xcopa"])
def test_english_is_a_sentence_where_a_task_is_not_scored_in_it(name):
    """Its training language, by default, which a test split need not have."""
    with pytest.raises(XtransferError, match=f"task {name} has no language 'en'"):
        load_examples(TASKS[name], "en", "test")
