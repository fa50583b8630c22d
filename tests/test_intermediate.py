"""Every intermediate task that is declared: what it promises, and what it reads from real data, from a user's files and from the hub."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import xtransfer.intermediate
import xtransfer.multilingual
import xtransfer.text
from xtransfer.core import XtransferError, digest
from xtransfer.languages import LANGUAGES
from xtransfer.metrics import METRICS
from xtransfer.sources import Loader, Source, hub_commit, hub_rows
from xtransfer.studies import Recipe, Stage
from xtransfer.tasks import TASKS, FoundLabels, Task, load_examples, text_pair
from xtransfer.text import hold_out, language_counts, mix_languages, text_task

DECLARED = list({task.name: task for module in (xtransfer.intermediate, xtransfer.multilingual, xtransfer.text) for task in vars(module).values() if isinstance(task, Task)}.values())
LABELLED = {"sequence_classification", "token_classification"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder; kept rows are let go of afterwards."""
    monkeypatch.setenv("XTRANSFER_DATA", str(tmp_path))
    yield tmp_path
    for task in DECLARED:
        task.load.forget()


def test_the_papers_tasks_are_there():
    names = {task.name for task in DECLARED}
    assert names >= {"anli_plus", "ccg", "cosmos_qa", "commonsense_qa", "hellaswag", "mnli", "qqp", "squad1", "squad2"}
    assert names >= {"farstail", "ocnli", "c3", "jcommonsenseqa", "jnli", "jsquad", "indonli", "arcd", "klue_nli", "masakhanews", "xnli_translated", "pawsx_translated", "wikipedia"}


@pytest.mark.parametrize("task", DECLARED, ids=lambda task: task.name)
def test_declaration_keeps_its_promises(task):
    assert TASKS[task.name] is task and task.trains_on == task.name and (task.continues is None or task.continues in TASKS)
    assert {"train", "dev"} <= set(task.load.splits) and set(task.train_languages) <= set(LANGUAGES) and set(task.languages) <= set(LANGUAGES)
    assert all(source.license not in ("", "unknown") and source.citation for source in task.sources) and task.description
    keys = {key for metric in task.metrics for key in METRICS[metric].keys}
    assert set(task.headline) <= keys and bool(task.headline) == (task.format != "masked_lm")
    if isinstance(task.labels, FoundLabels):
        assert task.identity["labels"] == "found in the data"
    else:
        assert (len(task.labels) >= 2) == (task.format in LABELLED) and len(set(task.labels)) == len(task.labels)
    if task.format != "masked_lm" and task.name != "ccg":
        missing = [(code, split) for code in (*task.train_languages, *task.languages) for split in task.load.splits if not task.expected_rows.get(f"{code}/{split}", task.expected_rows.get(split))]
        assert not missing, "published rows of every split"
    assert digest(task.identity)  # no function hides in it


def test_digests_are_distinct():
    assert len({digest(task.identity) for task in DECLARED}) == len(DECLARED)


def test_anli_plus_has_the_papers_size():
    rows = TASKS["anli_plus"].expected_rows
    assert rows["en/train"] - 785 == 1_104_934 == 392_702 + 549_367 + 16_946 + 45_460 + 100_459  # 785 pairs of SNLI have no label
    assert rows["en/dev"] == 9_815 + 10_000 + 3_200
    assert {s.repo for s in TASKS["anli_plus"].sources} == {"facebook/anli", "nyu-mll/glue", "stanfordnlp/snli"}


def toy(name, labels=("no", "yes"), languages=("en",), expected=None, rows=4, **others):
    load = Loader((Source(repo="generated", note=name),), ("train", "dev"), lambda language, split: [{"id": i, "said": f"{name} {language} {i}", "class": labels[i % len(labels)]} for i in range(rows)])
    return Task(name=name, format="sequence_classification", kind="toy", source=load.sources[0], languages=languages, train_languages=languages, load=load, read=text_pair("said", label="class"),
                metrics=("accuracy",), headline=("accuracy",), labels=labels, trains_on=name, expected_rows=expected or {}, **others)


def test_combined_reads_each_row_by_its_own_task():
    both = xtransfer.intermediate.combined("both", [toy("a", ("x", "y"), expected={"train": 4}), toy("b", ("y", "z"), ("en", "de"), {"train": 5})])
    assert both.labels == ("x", "y", "z") and both.languages == ("en", "de") and both.expected_rows == {"en/train": 9, "de/train": 5}
    english = load_examples(both, "en", "train")
    assert len(english.rows) == 8 and english.capped and english.rows[0]["id"] == "a-0" and english.rows[-1]["text"] == "b en 3" and "a; b" in english.note
    assert {row["id"][0] for row in load_examples(both, "en", "train", limit=2).rows} == {"a", "b"}  # limits take the first rows, which are of all parts
    assert [row["text"] for row in load_examples(both, "de", "dev").rows] == [f"b de {i}" for i in range(4)]


def test_combined_refuses_what_does_not_fit():
    with pytest.raises(XtransferError, match="two or more"):
        xtransfer.intermediate.combined("one", [toy("a")])
    with pytest.raises(XtransferError, match="cannot be one task: mnli has the format"):
        xtransfer.intermediate.combined("odd", [TASKS["mnli"], TASKS["hellaswag"]])
    with pytest.raises(XtransferError, match="metrics"):
        xtransfer.intermediate.combined("odd", [TASKS["squad1"], TASKS["squad2"]])


# ---- CCG: a user's folder ------------------------------------------------------------------------------------------------

COLUMNS = "It\tNP\nrains\tS\\NP\n\n\nYes\tS\n"
LINES = "It rains\tNP S\\NP\nYes\tS\n"


def test_without_the_corpus_planning_works_and_reading_says_where_it_is_from(data):
    assert Stage(train=("ccg",), recipe=Recipe(name="x", learning_rate=1e-5, batch_size=8), seed=0).identity
    with pytest.raises(XtransferError, match="LDC2005T13.*--data"):
        load_examples(TASKS["ccg"], "en", "train")
    with pytest.raises(XtransferError, match="LDC2005T13"):
        len(TASKS["ccg"].labels)


@pytest.mark.parametrize("names", [("ccg.train", "ccg.dev"), ("train.tsv", "dev.tsv")])
@pytest.mark.parametrize("form", ["columns", "lines"])
def test_both_forms_of_ccg_files_read_alike(data, names, form):
    folder = data / "files/ccg"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(COLUMNS if form == "columns" else LINES)
    if form == "lines":
        (folder / "tags_to_id.json").write_text(json.dumps({"S\\NP": 2, "NP": 1, "S": 0}))
    loader, labels = xtransfer.intermediate.tag_files(TASKS["ccg"].source, "ccg")
    task = Task(**{f: getattr(TASKS["ccg"], f) for f in TASKS["ccg"].__dataclass_fields__} | {"load": loader, "labels": labels})
    found = load_examples(task, "en", "train")
    assert [(row["tokens"], row["tags"]) for row in found.rows] == [(["It", "rains"], ["NP", "S\\NP"]), (["Yes"], ["S"])]
    assert list(labels) == (["NP", "S", "S\\NP"] if form == "columns" else ["S", "NP", "S\\NP"]) and labels.index("S\\NP") == 2
    assert found.capped and found.expected == 38_015
    with pytest.raises(XtransferError, match="none of the files ccg.test, test.tsv"):
        load_examples(task, "en", "test")


@pytest.mark.parametrize("content, tags, message", [
    ("It\tNP\nrains\n", None, "line 2 of .*'rains'; it should be a word, a tab and a tag"), ("It\tNP\tx\n", None, "line 1"),
    ("Yes\tS\nIt rains\tNP\n", {"NP": 0, "S": 1}, "line 2 of .* has 2 words and 1 tags"), ("Yes\tSS\n", {"S": 0}, "line 1 of .* has the tag 'SS', which tags_to_id.json lacks"), ("Yes\n", {"S": 0}, "line 1")])
def test_broken_lines_of_ccg_files_are_named(data, content, tags, message):
    folder = data / "files/ccg"
    folder.mkdir(parents=True)
    (folder / "ccg.train").write_text(content)
    if tags:
        (folder / "tags_to_id.json").write_text(json.dumps(tags))
    with pytest.raises(XtransferError, match=message):
        xtransfer.intermediate.tag_files(TASKS["ccg"].source, "ccg")[0]("en", "train")


# ---- forms in which data sets lie on the hub --------------------------------------------------------------------------------

def test_farstail_is_read_as_its_authors_uploaded_it(data):
    folder = data / "azarijafari/FarsTail/data"
    folder.mkdir(parents=True)
    (folder / "Val-word.csv").write_text('premise\thypothesis\tlabel\nیک "متن\tفرض\te\nب\tپ\tn\n', encoding="utf-8")
    assert [row["label"] for row in load_examples(TASKS["farstail"], "fa", "dev").rows] == ["entailment", "neutral"]


def test_data_sets_that_are_scripts_are_read_from_their_conversion(data, monkeypatch):
    import datasets
    import huggingface_hub
    import xtransfer.sources

    asked = []
    def load(repo, config, split, revision):
        asked.append((repo, revision))
        return datasets.Dataset.from_dict({"text": ["read"]})
    info = {"main": SimpleNamespace(sha="a" * 40, siblings=[SimpleNamespace(rfilename="old.py")]), "refs/convert/parquet": SimpleNamespace(sha="b" * 40, siblings=[])}
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=lambda repo, revision, timeout: info[revision]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(data / "cache"))
    monkeypatch.setattr(xtransfer.sources, "_looked_up", {})
    assert hub_commit("some/old", "main") == "b" * 40 and hub_commit("some/new", "main") == "a" * 40
    assert hub_rows(Source(repo="some/old"), None, "train") == [{"text": "read"}] and asked == [("hf://datasets/some/old", "b" * 40)]


# ---- text ----------------------------------------------------------------------------------------------------------------

def test_what_is_held_out_is_not_trained_on():
    rows = [{"text": f"{i % 300}"} for i in range(1000)]
    train, dev = hold_out(rows, "text", seed=1)
    assert len(dev) == 6 and not {r["text"] for r in dev} & {r["text"] for r in train} and len({r["text"] for r in [*train, *dev]}) == 300
    assert (train, dev) == hold_out(rows, "text", seed=1) and dev != hold_out(rows, "text", seed=2)[1]
    with pytest.raises(XtransferError, match="too few to hold some out"):
        hold_out(rows[:1], "text", seed=1)


def test_text_of_a_users_files(data):
    folder = data / "files/mine"
    folder.mkdir(parents=True)
    (folder / "en.txt").write_text("One.\n\nTwo\u2028still two.\nThree.\n", encoding="utf-8")
    (folder / "de.jsonl").write_text('{"body": "Eins."}\n{"body": ""}\n{"body": "Zwei."}\n')
    (folder / "de.dev.jsonl").write_text('{"body": "Drei."}\n')
    source = Source(repo="files/mine", license="mine", citation="none")
    english, german = text_task("mine_en", source, ("en",)), text_task("mine_de", source, ("de",), column="body", temperature=2.0)
    parts = [{row["text"] for row in load_examples(english, "en", split).rows} for split in ("train", "dev")]
    assert parts[0] | parts[1] == {"One.", "Two\u2028still two.", "Three."} and not parts[0] & parts[1]
    assert [row["text"] for split in ("train", "dev") for row in load_examples(german, "de", split).rows] == ["Eins.", "Zwei.", "Drei."]
    assert "language_temperature" in german.identity and "language_temperature" not in english.identity
    (folder / "de.jsonl").write_text('{"body": "Eins."}\nZwei.\n')
    german.load.forget()
    with pytest.raises(XtransferError, match="line 2 of .*de.jsonl is not JSON"):
        load_examples(german, "de", "train")
    with pytest.raises(XtransferError, match="none of the files fr.jsonl, fr.txt"):
        load_examples(text_task("mine_fr", source, ("fr",)), "fr", "train")


def test_long_documents_are_cut_into_blocks_and_nothing_is_lost():
    from xtransfer.encoding import encode
    from xtransfer.world import world_tokenizer

    tokenizer, task = world_tokenizer(), text_task("long", Source(repo="files/long"), ("en",))
    text = " ".join(str(i % 10) for i in range(1000))
    encoded = encode(tokenizer, task, [{"text": text, "text_pair": ""}], Recipe(name="x", learning_rate=1e-3, batch_size=1, max_length=64))
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    kept = encoded.ids[encoded.token_targets["side"] == 1].tolist()
    assert kept == whole and encoded.lengths.max() == 64 and encoded.truncated == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_languages_are_drawn_in_proportion_to_a_power_of_their_size(temperature):
    sizes = {"en": 5000, "de": 700, "sw": 33, "yo": 1}
    counts = language_counts(sizes, temperature)
    assert sum(counts.values()) == sum(sizes.values())
    weights = {code: n ** (1 / temperature) for code, n in sizes.items()}
    assert all(abs(counts[code] - sum(sizes.values()) * w / sum(weights.values())) < 1 for code, w in weights.items())
    with pytest.raises(XtransferError, match="temperature"):
        language_counts(sizes, 0)


def test_mixed_languages_repeat_whole_permutations():
    rows = {"en": [f"e{i}" for i in range(40)], "sw": [f"s{i}" for i in range(4)]}
    assert mix_languages(rows, None, seed=0) == [*rows["en"], *rows["sw"]]
    mixed = mix_languages(rows, 1e9, seed=0)
    english, swahili = mixed[:22], mixed[22:]
    assert len(mixed) == 44 and len(set(english)) == 22 and english != rows["en"][:22]
    assert all(sorted(swahili[i:i + 4]) == rows["sw"] for i in range(0, 20, 4)) and len(set(swahili[20:])) == 2
    assert mixed == mix_languages(rows, 1e9, seed=0) != mix_languages(rows, 1e9, seed=1)
    assert sorted(mix_languages(rows, 1.0, seed=0)) == sorted([*rows["en"], *rows["sw"]])


def test_training_honours_the_language_temperature(monkeypatch, tmp_path):
    """Whatever `train` encodes for training has the languages in the asked proportion."""
    import xtransfer.steps as steps

    task = toy("toy_mixture", languages=("en", "de"), language_temperature=1e9)
    monkeypatch.setitem(TASKS._entries, task.name, task)
    seen = {}
    monkeypatch.setattr("xtransfer.store.stored", lambda tokenizer, what, key, make: make())
    monkeypatch.setattr("xtransfer.store.encode", lambda tokenizer, task, rows, recipe: seen.update({task.name: list(rows)}) or SimpleNamespace(truncated=0))
    monkeypatch.setattr(steps, "make_evaluator", lambda *arguments: SimpleNamespace(reads=[]))
    monkeypatch.setattr(steps, "fit_runs", lambda *arguments, **options: SimpleNamespace(progress=SimpleNamespace(seconds=0.0)))
    sizes = {"en": 30, "de": 10}
    def examples(task, language, split, limit):
        return SimpleNamespace(rows=[{"text": f"{language}{i}"} for i in range(sizes[language])], language=language, split=split, fingerprint=language)
    stage = Stage(train=(task.name,), recipe=Recipe(name="x", learning_rate=1e-3, batch_size=2), seed=3)
    steps.train(SimpleNamespace(stage=stage, tokenizer=SimpleNamespace(mask_token_id=0), examples=examples, truncated={}, seconds={}, folder=tmp_path, model=None, ranks=None))
    drawn = [row["text"][:2] for row in seen[task.name]]
    assert (drawn.count("en"), drawn.count("de")) == (20, 20)


# ---- real data, through a hub --------------------------------------------------------------------------------------------------

PARTIAL = {"mnli/train", "mnli/dev", "qqp/train", "qqp/dev", "snli/train", "anli/dev", "ocnli/train"}  # the stand-in hub has a part of these
ASKED = ["mnli/train", "mnli/dev", "snli/train", "anli/dev", "qqp/train", "qqp/dev", "squad2/dev", "hellaswag/dev", "cosmos_qa/dev", "commonsense_qa/train", "commonsense_qa/dev", "social_iqa/dev",
         "copa/train", "copa/dev", "erg_supertagging/train", "erg_supertagging/dev", "farstail/train", "farstail/dev", "farstail/test", "ocnli/train", "ocnli/dev", "c3/train", "c3/dev", "jcommonsenseqa/train",
         "jnli/dev", "jsquad/dev", "indonli/train", "indonli/test", "klue_nli/dev", "arcd/train", "arcd/dev", "masakhanews/train", "xnli_translated/dev", "pawsx_translated/dev",
         "hellaswag@config-carved/train", "cosmos_qa@config-carved/train", "klue_nli@config-nli_carved/train", "mnli@sample-2k/train", "mnli@realfake/dev", "squad2@config-carved@shuffled/train", "anli_part/train", "anli_part/dev"]
SECRET = ["commonsense_qa/test", "copa/test", "ocnli/test"]
PROGRAM = """
import json, sys
import xtransfer.intermediate, xtransfer.modifiers, xtransfer.multilingual, xtransfer.text
from collections import Counter
from xtransfer.core import XtransferError
from xtransfer.tasks import TASKS, load_examples
TASKS.register(xtransfer.intermediate.combined("anli_part", [TASKS["anli@config-carved"], TASKS["snli@config-carved"], TASKS["mnli"]]))
found = {}
for name in json.loads(sys.argv[1]):
    task, _, split = name.partition("/")
    task = TASKS[task]
    try:
        examples = load_examples(task, task.train_languages[0], split)
        found[name] = examples.facts | {"first": examples.rows[0], "labels": Counter(str(row.get("label")) for row in examples.rows)}
    except XtransferError as error:
        found[name] = str(error)
found["tags"] = len(TASKS["erg_supertagging"].labels)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def real(hub, tmp_path_factory):
    """Facts, first example and label counts of everything that is asked for, or the sentence that refused it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(ASKED + SECRET)], capture_output=True, text=True, env=dict(os.environ) | hub | {"XTRANSFER_DATA": str(tmp_path_factory.mktemp("no-data"))})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_split_at_hand_is_read_and_partial_ones_say_so(real):
    refused = {name: said for name, said in real.items() if name in ASKED and isinstance(said, str)}
    assert not refused
    for name in (n for n in ASKED if "@" not in n and "part" not in n):
        assert real[name]["capped"] == (name in PARTIAL), name
        assert real[name]["expected"] and (real[name]["available"] == real[name]["expected"]) == (name not in PARTIAL), name


def test_secret_labels_are_answered_with_a_sentence(real):
    for name, count in zip(SECRET, (1140, 500, 3000)):
        assert f"none of the {count} rows of the test split" in real[name] and f"{count} have no label" in real[name]


def test_labels_are_mapped_by_name(real):
    first = {name: real[name]["first"] for name in ASKED}
    assert (first["mnli/dev"]["text"], first["mnli/dev"]["label"]) == ("right that's that's supposedly", "neutral")
    assert first["ocnli/train"]["text_pair"] == "全国政协委员无权提出建议" and first["ocnli/train"]["label"] == "contradiction"  # "members have no right to make suggestions"
    assert first["jnli/dev"]["label"] == "neutral" and real["jnli/dev"]["labels"] == {"neutral": 1350, "contradiction": 735, "entailment": 349}
    assert first["indonli/train"]["label"] == first["klue_nli/dev"]["label"] == "contradiction" and first["farstail/train"]["label"] == "entailment"
    assert first["qqp/train"]["label"] == "duplicate" and first["masakhanews/train"]["label"] == "health"


def test_right_choices_are_the_right_ones(real):
    def right(name):
        first = real[name]["first"]
        return first["choices"][first["label"]]
    assert right("hellaswag/dev").startswith("he starts pulling up roofing") and real["hellaswag/dev"]["first"]["text"] == "A man is sitting on a roof."
    assert right("cosmos_qa/dev") == "He wants to get married to a different person ." and right("commonsense_qa/train") == "ignore"
    assert right("copa/train") == "The sun was rising." and real["copa/train"]["first"]["text"].endswith("What was the cause?") and right("copa/dev") == "Water flowed from the spout."
    assert right("c3/train") == "喜剧片" and right("jcommonsenseqa/train") == "絵本"


def test_answers_and_tags(real):
    assert real["squad2/dev"]["first"]["answers"][0] == "France" and (real["arcd/train"]["dropped"], real["arcd/train"]["rows"]) == (3, 690)
    assert real["arcd/train"]["first"]["question"][0] == "-"  # the spaces around it are gone
    assert real["tags"] == 856 and real["erg_supertagging/train"]["first"]["tags"][1] == "n_-_c_le" and "stand-in" in real["erg_supertagging/train"]["note"]


def test_variants_of_real_tasks_say_what_they_are(real):
    assert real["hellaswag@config-carved/train"]["rows"] == 8042 and "not the published" in real["hellaswag@config-carved/train"]["note"]
    assert real["klue_nli@config-nli_carved/train"]["rows"] == 2499
    sample = real["mnli@sample-2k/train"]
    assert (sample["rows"], sample["available"], sample["expected"], sample["capped"]) == (2000, 9443, 392_702, True) and "random sample" in sample["note"]
    assert real["mnli@realfake/dev"]["labels"]["real"] == real["mnli@realfake/dev"]["labels"]["fake"] > 1000 and "made from 9443 of 392702" in real["mnli@realfake/dev"]["note"]
    assert "shuffled" in real["squad2@config-carved@shuffled/train"]["note"]


def test_anli_plus_of_the_parts_at_hand(real):
    assert real["anli_part/train"]["rows"] == 2_597 + 40_000 + 9_443 and real["anli_part/dev"]["rows"] == 601 + 2_000 + 7_469
    assert real["anli_part/train"]["first"]["label"] in TASKS["anli"].labels and "configuration carved" in real["anli_part/train"]["note"]
