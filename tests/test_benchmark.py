"""Folders in the official layout: averages against plain arithmetic, what is partial, what is refused, and the way from records to a folder and back to scores."""

import json
import random

import pandas as pd
import pytest

import xtransfer.catalogue  # noqa: F401  fills the registries
from xtransfer.benchmark import BENCHMARKS, XTREME, XTREME_R, format_scores, read_tags, score_folder
from xtransfer.core import XtransferError, plain, read_json, write_json, write_text
from xtransfer.metrics import METRICS, token_accuracy
from xtransfer.records import Record, Score, run_folder
from xtransfer.studies import Cell, Recipe, Run, Stage, Study
from xtransfer.submission import PREDICTIONS_NAME, choose_runs, format_submission, tatoeba_order, write_submission
from xtransfer.tasks import TASKS, Source, Task, mining_side, sentence_pair, squad_columns, tagging, text_pair

# ---------------------------------------------------------------- the two benchmarks


def test_languages_and_groups():
    assert {name: len(task.languages) for name, task in XTREME.tasks.items()} == {
        "xnli": 15, "pawsx": 7, "udpos": 33, "panx": 40, "xquad": 11, "mlqa": 7, "tydiqa": 9, "bucc2018": 4, "tatoeba": 36}
    assert {name: len(task.languages) for name, task in XTREME_R.tasks.items()} == {
        "xnli": 15, "xcopa": 11, "udpos": 38, "panx": 48, "xquad": 12, "mlqa": 7, "tydiqa": 9, "tatoeba": 41, "mewslix": 11, "lareqa": 11}
    assert XTREME.groups == {"classification": ("xnli", "pawsx"), "tagging": ("udpos", "panx"), "qa": ("xquad", "mlqa", "tydiqa"), "retrieval": ("bucc2018", "tatoeba")}
    assert XTREME_R.groups["retrieval"] == ("tatoeba", "mewslix", "lareqa") and XTREME_R.groups["classification"] == ("xnli", "xcopa")
    for benchmark in BENCHMARKS.values():
        assert sorted(name for group in benchmark.groups.values() for name in group) == sorted(benchmark.tasks)


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_declared_tasks_exist_and_have_the_benchmarks_languages(name):
    for task in BENCHMARKS[name].tasks.values():
        for ours in task.tasks:
            assert set(TASKS[ours].languages) == set(task.languages), ours
            assert set(task.headline) == set(TASKS[ours].headline), ours


# ---------------------------------------------------------------- whole folders, with known scores per language

def squad_text(gold):
    return json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": "", "qas": [{"id": k, "question": "?", "answers": [{"text": t, "answer_start": 0} for t in texts]} for k, texts in gold.items()]}]}]})


def some_files(task, rng):
    """Text of a file of predictions and of labels, and the headline score that they should get, for ten examples."""
    form, size = METRICS[task.metrics[0]].form, 10
    right = rng.randint(1, size)
    good = [i < right for i in range(size)]
    if form == "label" and task.suffix == "jsonl":
        return "".join(json.dumps({"idx": i, "label": i % 2 if ok else 1 - i % 2}) + "\n" for i, ok in enumerate(good)), "".join(json.dumps({"label": i % 2}) + "\n" for i in range(size)), 10 * right
    if form == "label":
        names = list(task.accepted) or [str(i) for i in range(size)]
        gold = [names[i % len(names)] for i in range(size)]
        return "".join(f"{g if ok else names[(i + 1) % len(names)]} \n" for i, (g, ok) in enumerate(zip(gold, good))), "\n".join(gold), 10 * right
    if form == "tags":  # ten sentences of a chunk of two tokens and one that tells the chunks apart
        inside, apart = ("B-PER\nI-PER", "O") if task.name == "panx" else ("NOUN\nNOUN", "VERB")
        wrong = {"panx": "B-LOC\nI-LOC", "udpos": "ADJ\nADJ"}[task.name]
        score = right / size if task.name == "panx" else (right + size) / (2 * size)
        return "".join(f"{inside if ok else wrong}\n{apart}\n\n" for ok in good), "".join(f"{inside}\n{apart}\n\n" for _ in good).rstrip("\n"), 100 * score
    if form == "pairs":
        return "".join(f"x-{i}\t{'e' if ok else 'z'}-{i}\n" for i, ok in enumerate(good)), "".join(f"x-{i}\te-{i}\n" for i in range(size)), 10 * right
    if form == "ranking":
        gold = {f"q{i}": ["right"] for i in range(size)}
        return json.dumps({f"q{i}": ["right", "x"] if ok else ["x", "y", "right"] for i, ok in enumerate(good)}), json.dumps(gold), 100 * (right + (size - right) / 3) / size
    gold = {f"q{i}": ["Wien", "Bonn"] for i in range(size)}  # F1 of the wrong ones is 2/3, their exact match 0
    return json.dumps({f"q{i}": "Bonn" if ok else "Bonn Rom" for i, ok in enumerate(good)}), squad_text(gold), (10 * right + 10 * (right + (size - right) * 2 / 3)) / 2


def whole_folder(folder, benchmark, seed=0, leave_out=()):
    """A complete pair of folders; returns the headline of every task and language."""
    rng, wanted = random.Random(seed), {}
    for name, task in benchmark.tasks.items():
        for language in task.languages:
            if (name, language) not in leave_out and name not in leave_out:
                predictions, labels, wanted[name, language] = some_files(task, rng)
                write_text(folder / "predictions" / name / f"test-{language}.{task.suffix}", predictions)
                write_text(folder / "labels" / name / f"test-{language}.{task.suffix}", labels)
    return wanted


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_complete_folder(name, tmp_path):
    benchmark = BENCHMARKS[name]
    wanted = whole_folder(tmp_path, benchmark)
    result = score_folder(tmp_path / "predictions", tmp_path / "labels", name, strict=True)
    assert result["partial"] == {} and result["notes"] == [] and list(result["tasks"]) == list(benchmark.tasks)
    number = {task: mean(wanted[task, code] for code in benchmark.tasks[task].languages) for task in benchmark.tasks}
    for task, scores in result["tasks"].items():
        declared = benchmark.tasks[task]
        assert scores["avg_metric"] == pytest.approx(number[task], abs=1e-9)
        assert scores["avg_metric"] == pytest.approx(mean(scores[f"avg_{key}"] for key in declared.headline), abs=1e-9)
        for code, found in scores["languages"].items():
            assert mean(found[key] for key in declared.headline) == pytest.approx(wanted[task, code], abs=1e-9), (task, code)
        others = mean(wanted[task, code] for code in declared.languages if code != "en")
        assert scores["avg_non_en"] == pytest.approx(others, abs=1e-9)
        assert ("transfer_gap" in scores) == ("en" in declared.languages)
        if "en" in declared.languages:
            assert scores["transfer_gap"] == pytest.approx(wanted[task, "en"] - others, abs=1e-9)
    assert result["groups"] == pytest.approx({group: mean(number[t] for t in tasks) for group, tasks in benchmark.groups.items()}, abs=1e-9)
    assert result["all_task"] == pytest.approx(mean(number.values()), abs=1e-9)
    assert result["all_task_without_retrieval"] == pytest.approx(mean(number[t] for t in number if t not in benchmark.groups["retrieval"]), abs=1e-9)
    if name == "xtreme":
        assert "official_code" not in result
    else:
        official = result["official_code"]
        assert official["all_task_official_code"] == pytest.approx(mean(number[t] for t in number if t != "lareqa"), abs=1e-9)
        assert official["groups"]["multi_choice"] == pytest.approx(number["xcopa"]) and official["groups"]["retrieval"] == pytest.approx((number["tatoeba"] + number["mewslix"]) / 2)
    json.dumps(result)
    shown = format_scores(result, languages=True)
    assert f"{number['xnli']:.1f}" in shown and f"{result['all_task']:.1f}" in shown and "partial" not in shown


def test_partial_folder_is_scored_over_what_is_there(tmp_path):
    wanted = whole_folder(tmp_path, XTREME, leave_out=("mlqa", ("xnli", "sw"), ("xnli", "en")))
    (tmp_path / "labels" / "udpos" / "test-af.tsv").unlink()
    result = score_folder(tmp_path / "predictions", tmp_path / "labels", "xtreme")
    assert result["partial"] == {"xnli": "13 of 15 languages; missing predictions: en, sw; missing labels: en, sw", "udpos": "32 of 33 languages; missing labels: af",
                                 "mlqa": "not scored: no folder mlqa in the predictions and the labels"}
    assert result["tasks"]["xnli"]["avg_metric"] == pytest.approx(mean(v for (task, _), v in wanted.items() if task == "xnli")) and "transfer_gap" not in result["tasks"]["xnli"]
    assert set(result["groups"]) == {"retrieval"} and "all_task" not in result and "all_task_without_retrieval" not in result
    assert "13/15" in format_scores(result) and "missing predictions: en, sw" in format_scores(result)
    with pytest.raises(XtransferError, match="xtreme is not complete: xnli: 13 of 15 languages; missing predictions: en, sw"):
        score_folder(tmp_path / "predictions", tmp_path / "labels", "xtreme", strict=True)


def test_without_lareqa_the_official_view_remains(tmp_path):
    whole_folder(tmp_path, XTREME_R, leave_out=("lareqa",))
    result = score_folder(tmp_path / "predictions", tmp_path / "labels", "xtreme-r")
    assert "all_task" not in result and "retrieval" not in result["groups"]
    assert result["official_code"]["all_task_official_code"] == pytest.approx(mean(s["avg_metric"] for s in result["tasks"].values()))
    assert "all_task_without_retrieval" in result and "nine tasks of the official code" in format_scores(result)


def test_windows_line_ends_change_nothing(tmp_path):
    whole_folder(tmp_path, XTREME)
    before = score_folder(tmp_path / "predictions", tmp_path / "labels", "xtreme")
    for path in (tmp_path / "predictions").rglob("*.tsv"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert score_folder(tmp_path / "predictions", tmp_path / "labels", "xtreme") == before


# ---------------------------------------------------------------- single files


def score_one(folder, task, predictions, labels, benchmark="xtreme", language="de", suffix=None):
    """The result for one file of predictions and one of labels."""
    declared = BENCHMARKS[benchmark].tasks[task]
    for side, content in (("predictions", predictions), ("labels", labels)):
        path = folder / side / task / f"test-{language}.{suffix if suffix and side == 'predictions' else declared.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return score_folder(folder / "predictions", folder / "labels", benchmark)


def one_score(*arguments, **others):
    result = score_one(*arguments, **others)
    (scores,) = [scores["languages"] for scores in result["tasks"].values()]
    (found,) = scores.values()
    return found, result["notes"]


def test_tags_are_read_as_the_official_code_reads_them(tmp_path):
    write_text(tmp_path / "tags", "\nDET\n \nX\n\n\nVERB\n")
    assert read_tags(tmp_path / "tags") == ([[], ["DET"], ["X"], [], ["VERB"]], [1, 2, 4, 6, 7])
    scores, _ = one_score(tmp_path, "udpos", "DET\nNOUN\n\n\nX\n", "DET\nVERB\n\n\nX\n\n")  # the empty sentence is on both sides
    assert scores["f1"] == pytest.approx(200 / 3) and scores["token_accuracy"] == token_accuracy([["DET", "NOUN"], ["X"]], [["DET", "VERB"], ["X"]])["token_accuracy"]


def test_missing_and_unknown_ids_are_counted(tmp_path):
    scores, notes = one_score(tmp_path, "tydiqa", '{"a": "dog", "z": "x"}', squad_text({"a": ["the dog"], "b": ["the"]}), language="en")
    assert scores == {"exact_match": 50.0, "f1": 50.0} and notes == ["tydiqa, language en: 1 of 2 examples lack a prediction and score 0; 1 of 2 ids are unknown to the labels."]
    scores, notes = one_score(tmp_path / "r", "mewslix", '{"a": ["Q2", "Q1", "Q1"]}', '{"a": ["Q1 "], "b": ["Q3"]}', benchmark="xtreme-r")
    assert scores == {"map@20": 25.0} and len(notes) == 1
    ranked = ["Q0"] * 20 + ["Q1"]
    assert one_score(tmp_path / "s", "mewslix", json.dumps({"a": ranked}), '{"a": ["Q1"]}', benchmark="xtreme-r")[0] == {"map@20": 0.0}  # only twenty count
    assert one_score(tmp_path / "t", "lareqa", json.dumps({"a": ranked}), '{"a": ["Q1", "Q0"]}', benchmark="xtreme-r")[0] == {"map@20": 50.0}


def test_mlqa_is_scored_by_the_rules_of_the_language(tmp_path):
    labels = squad_text({"a": ["Hund"]})
    assert one_score(tmp_path / "de", "mlqa", '{"a": "der Hund"}', labels)[0]["exact_match"] == 100
    assert one_score(tmp_path / "en", "mlqa", '{"a": "der Hund"}', labels, language="en")[0]["exact_match"] == 0
    assert one_score(tmp_path / "x", "xquad", '{"a": "the Hund"}', labels)[0]["exact_match"] == 100  # English articles in every language


def test_an_empty_file_of_mined_pairs_scores_0(tmp_path):
    assert one_score(tmp_path, "bucc2018", "", "de-1\ten-1\n")[0] == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


REFUSED = {
    "lines": ("xnli", "neutral\n", "neutral\nneutral\n", r"xnli, language de: 1 lines of predictions in .*test-de.tsv for 2 labels"),
    "blank labels": ("xnli", "neutral\nneutral\n", "neutral\n\n", "line 2 of .*labels.* is blank, and 1 of its 2 lines are"),
    "blank line": ("xnli", "neutral\n\n", "neutral\n", "line 2 of the predictions is blank"),
    "label": ("xnli", "neutral\nentailement\n", "neutral\nneutral\n", "line 2 of .* is 'entailement'; did you mean 'entailment'.*accepted: contradiction, entailment, neutral"),
    "header": ("pawsx", "label\n1\n", "0\n1\n", "line 1 of .* is 'label'.*accepted: 0, 1"),
    "array": ("tatoeba", "[669]\n", "669\n", r"line 1 of .* is '\[669\]', which is no row number"),
    "tag": ("udpos", "DET\nNUON\n", "DET\nNOUN\n", "line 2 of .* is 'NUON'; did you mean 'NOUN'"),
    "columns": ("panx", "Wien B-LOC\n", "B-LOC\n", "line 1 of .* has several columns: 'Wien B-LOC'"),
    "sentences": ("udpos", "DET\n\nNOUN\n", "DET\nNOUN\n", "2 sentences in .* for 1 in"),
    "two blank lines": ("udpos", "DET\n\n\nNOUN\n", "DET\n\nNOUN\n", "3 sentences in .* for 2 in .*; line 3 of .*predictions.* is blank, which makes a sentence without tokens"),
    "sentence length": ("panx", "O\n\nO\nO\n", "O\n\nO\n", "sentence 2 has 2 tags from line 3 of .* but 1 from line 3"),
    "shifted sentence": ("udpos", "DET\n\n\nX\n", "DET\n\nX\n\nX\n", "sentence 2 has 0 tags.*line 3 of .* is blank"),
    "no tab": ("bucc2018", "de-1 en-1\n", "de-1\ten-1\n", "line 1 of .*predictions.* is not two ids with one tab between them: 'de-1 en-1'"),
    "no tab in labels": ("bucc2018", "de-1\ten-1\n", "de-1\n", "line 1 of .*labels"),
    "no gold pair": ("bucc2018", "de-1\ten-1\n", "", "no gold pair"),
    "empty": ("xnli", "", "", "cannot be scored: accuracy: nothing to score"),
    "JSON": ("xquad", '{"a": "x",}', squad_text({"a": ["x"]}), "is no valid JSON"),
    "not an object": ("xquad", '["x"]', squad_text({"a": ["x"]}), "holds a list; it has to be an object"),
    "layout": ("xquad", '{"a": "x"}', '{"a": ["x"]}', "is not in SQuAD's layout"),
    "no text": ("mlqa", '{"a": null}', squad_text({"a": ["x"]}), "question a .* is None, which is no text"),
    "no id": ("mlqa", '{"b": "x"}', squad_text({"a": ["x"]}), "no id of .* is in .*; the labels ask for ids such as 'a', the predictions have 'b'"),
    "stripped answers": ("xquad", '{"a": "x"}', squad_text({"a": [""], "b": []}), "none of the 2 questions in .* has an answer, so that nothing can be scored"),
    "one stripped answer": ("xquad", '{"a": "x"}', squad_text({"a": ["x"], "b": []}), "question b has no gold answer"),
    "encoding": ("xnli", "neutral\né\n".encode("latin-1"), "neutral\nneutral\n", "is not in UTF-8"),
    "byte order mark": ("xnli", b"\xef\xbb\xbfneutral\n", "neutral\n", "byte order mark"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_files(case, tmp_path):
    task, predictions, labels, told = REFUSED[case]
    with pytest.raises(XtransferError, match=told) as caught:
        score_one(tmp_path, task, predictions, labels)
    message = str(caught.value)
    assert message.endswith((".", "?")) and "\n" not in message and (task in message)


REFUSED_R = {
    "xcopa without label": ("xcopa", '{"idx": 0}\n', '{"label": 0}\n', "line 1 of .* is no JSON object with a `label`", "it"),
    "xcopa as text": ("xcopa", '{"label": "0"}\n', '{"label": 0}\n', "line 1 of .* is '0'", "it"),
    "ranking as text": ("lareqa", '{"a": "x"}', '{"a": ["x"]}', "example a of .*predictions.* has 'x' where a list of candidate ids", "de"),
    "no target": ("mewslix", '{"a": ["x"]}', '{"a": []}', "example a of .*labels", "de"),
}


@pytest.mark.parametrize("case", list(REFUSED_R))
def test_refused_files_of_xtreme_r(case, tmp_path):
    task, predictions, labels, told, language = REFUSED_R[case]
    with pytest.raises(XtransferError, match=told):
        score_one(tmp_path, task, predictions, labels, benchmark="xtreme-r", language=language)


def test_refused_folders(tmp_path):
    with pytest.raises(XtransferError, match="unknown benchmark 'xtrem'; did you mean 'xtreme'"):
        score_folder(tmp_path, tmp_path, "xtrem")
    with pytest.raises(XtransferError, match="the folder of predictions .*absent does not exist"):
        score_folder(tmp_path / "absent", tmp_path, "xtreme")
    (tmp_path / "p" / "xlni").mkdir(parents=True), (tmp_path / "l" / "xnli").mkdir(parents=True)
    with pytest.raises(XtransferError, match="no task of xtreme in common: the first has xlni, the second xnli.*did you mean 'xnli'"):
        score_folder(tmp_path / "p", tmp_path / "l", "xtreme")
    (tmp_path / "p" / "xnli").mkdir()
    with pytest.raises(XtransferError, match="no file of xtreme in common; expected are files such as xnli/test-en.tsv"):
        score_folder(tmp_path / "p", tmp_path / "l", "xtreme")
    with pytest.raises(XtransferError, match="xnli, language de: found .*test-de.txt where test-de.tsv is expected"):
        score_one(tmp_path / "s", "xnli", "neutral\n", "neutral\n", suffix="txt")


def test_folders_and_files_of_nothing_are_noted(tmp_path):
    (tmp_path / "predictions" / "paws-x").mkdir(parents=True)
    (tmp_path / "predictions" / "xquad").mkdir()
    write_text(tmp_path / "predictions" / "xquad" / "test-ro.json", "{}")
    _, notes = one_score(tmp_path, "xquad", '{"a": "x"}', squad_text({"a": ["x"]}))
    assert len(notes) == 2 and "paws-x in the predictions is no task of xtreme; did you mean 'pawsx'?" in notes[0] and "test-ro.json" in notes[1]


# ---------------------------------------------------------------- from records to a folder

RECIPE = Recipe(name="toy", learning_rate=1e-5, batch_size=8)
ENGLISH = {"de": ["It rains.", "Go!", "it rains", "All is well."], "fr": ["b", "a", "C"]}
POOL = [{"id": f"{side}-{i}", "side": name, "text": f"{side} {i}", "match": f"en-{i}" if name == "source" and i < 3 else ""} for side, name in (("de", "source"), ("en", "target")) for i in range(5)]


def no_data(language, split):
    raise AssertionError("the predictions of trained tasks hold all that is needed")


@pytest.fixture
def small_tasks():
    """Tasks with official names whose data are here."""
    before = dict(TASKS)
    shared = {"source": Source(repo="generated"), "languages": ("en", "de", "fr")}

    def declare(name, format, read, load=no_data, trained=True, **others):
        TASKS.register(Task(name=name, format=format, kind="toy", read=read, load=load, trains_on=name if trained else None, **(shared | others)))
    declare("xnli", "sequence_classification", text_pair("a", "b"), metrics=("accuracy",), headline=("accuracy",), labels=("entailment", "neutral", "contradiction"))
    declare("udpos_official", "token_classification", tagging(), metrics=("chunk_f1", "token_accuracy"), headline=("f1",), labels=("DET", "NOUN"))
    declare("xcopa", "multiple_choice", text_pair("a", "b"), metrics=("accuracy",), headline=("accuracy",))
    declare("mlqa", "span_extraction", squad_columns, metrics=("mlqa",), headline=("exact_match", "f1"))
    declare("tatoeba", "retrieval", sentence_pair("english", "foreign"), trained=False, metrics=("retrieval_accuracy",), headline=("accuracy",), languages=("de", "fr"),
            load=lambda language, split: [{"id": str(i), "english": f" {s}\n", "foreign": f"{language} {i}"} for i, s in enumerate(ENGLISH[language])])
    declare("bucc2018", "bitext_mining", mining_side, trained=False, metrics=("pair_f1",), headline=("f1",), languages=("de",), load=lambda language, split: POOL)
    yield
    TASKS._entries = before


KEPT = {  # target -> language -> predictions and references
    "xnli": {"en": (["neutral", "entailment"], ["neutral", "neutral"]), "de": (["contradiction"] * 3, ["contradiction", "neutral", "neutral"])},
    "udpos_official": {"en": ([["DET", "NOUN"], ["NOUN"]], [["DET", "NOUN"], ["DET"]]), "de": ([["NOUN", "NOUN", "DET"]], [["NOUN", "DET", "DET"]])},
    "xcopa": {"it": ([0, 1, 1], [0, 1, 0])},
    "mlqa": {"en": (["the dog", ""], [["dog"], ["a cat", "cats"]]), "zh": (["北京大学"], [["北京"]]), "de": (["Zeile\nzwei", "“x”"], [["Zeile zwei"], ["x"]])},
    "tatoeba": {"de": ([0, 1, 0, 3], [0, 1, 2, 3]), "fr": ([2, 1, 0], [0, 1, 2])},
    "bucc2018": {"de": ([("de-0", "en-0"), ("de-4", "en-4")], [("de-0", "en-0"), ("de-1", "en-1"), ("de-2", "en-2")])},
}


def write_record(outputs, run, target, dev, kept, selection, capped=()):
    """A finished run, as the notebooks would leave it."""
    scores, rows, data = [], [], []
    place = {"task": target, "split": "test", "selection": selection}
    for language, (predictions, references) in kept.items():
        mined = TASKS[target].format == "bitext_mining"
        for name in TASKS[target].metrics:
            scores += [Score(**place, language=language, metric=key, value=value, n=len(references)) for key, value in METRICS[name].score(predictions, references, language).items()]
            if run.stage.train:
                scores += [Score(**(place | {"selection": "last"}), language=language, metric=key, value=100.0, n=len(references)) for key in METRICS[name].keys]
        for i, prediction in enumerate(predictions):
            values = {"id": prediction[0], "prediction": prediction[1], "reference": ""} if mined else {"id": f"{language}-{i}", "prediction": json.dumps(prediction), "reference": json.dumps(references[i])}
            rows.append(place | {"language": language} | values)
        data.append({"task": target, "language": language, "split": "test", "rows": len(predictions), "available": 99, "expected": None, "capped": language in capped, "note": "synthetic"})
    record = Record(run=run.id, digest=run.digest, parent=None, template=run.template, backbone={}, stages=[], parameters={}, data=data, environment={},
                    training={"best_dev": dev, "last_dev": -dev} if run.stage.train else {}, seconds={}, tokens_per_second=None, peak_memory_mb=0.0, scores=scores, started="", ended="")
    write_json(run_folder(outputs, run) / "record.json", plain(record))
    later = []
    for row in rows if run.stage.train else []:  # perfect, so that taking them by mistake shows
        right = json.loads(row["reference"])
        later.append(row | {"selection": "last", "prediction": json.dumps(right[0] if TASKS[target].format == "span_extraction" else right)})
    pd.DataFrame(rows + later).to_parquet(run_folder(outputs, run) / PREDICTIONS_NAME)
    return record


DEV = {("none", "xnli"): (60, 61), ("qa", "xnli"): (70, 71), ("none", "udpos_official"): (50, 50), ("qa", "udpos_official"): (20, 90), ("none", "mlqa"): (30, 31), ("qa", "mlqa"): (10, 11)}


def make_study(outputs, targets=("xnli", "udpos_official", "mlqa", "tatoeba", "bucc2018"), capped=()):
    """A study of two arms and two seeds with all its records."""
    cells, records = [], {}
    for arm in ("none", "qa"):
        for seed in (0, 1):
            before = (Stage(train=("mlqa",), recipe=RECIPE, seed=seed),) if arm == "qa" else ()
            untrained = [t for t in targets if TASKS[t].trains_on is None]
            for target in targets:
                last = Stage(train=(target,), score=(target,), recipe=RECIPE, seed=seed) if target not in untrained else Stage(score=(target,), recipe=RECIPE, seed=seed)
                run = Run(backbone="world-xlmr", stages=(*before, last))
                cells.append(Cell(arm=arm, target=target, seed=seed, run=run))
                records[run.id] = write_record(outputs, run, target, DEV.get((arm, target), (0, 0))[seed], KEPT[target], "best" if target not in untrained else "none", capped)
    return Study(name="toys", profile="mini", question="", cells=tuple(cells), contrasts=()), records


def test_runs_are_chosen_on_english_development_scores(small_tasks, tmp_path):
    study, records = make_study(tmp_path)
    chosen = {c.task.name: (c.cell.arm, c.cell.seed, c.english_dev) for c in choose_runs(study, records, XTREME)}
    assert chosen == {"xnli": ("qa", 0, 70.5), "udpos": ("qa", 0, 55.0), "mlqa": ("none", 0, 30.5), "tatoeba": ("none", 0, None), "bucc2018": ("none", 0, None)}  # means over targets: none 47, qa 45.3
    assert {(c.cell.arm, c.cell.seed) for c in choose_runs(study, records, XTREME, arm="qa", seed=1)} == {("qa", 1)}
    assert {c.task.name: c.cell.arm for c in choose_runs(study, records, XTREME, selection="last")} == {"xnli": "none", "udpos": "none", "mlqa": "qa", "tatoeba": "qa", "bucc2018": "qa"}
    some = {cell.run.id: records[cell.run.id] for cell in study.cells if (cell.arm, cell.seed) != ("qa", 0)}
    assert {c.task.name: (c.cell.arm, c.cell.seed) for c in choose_runs(study, some, XTREME)}["xnli"] == ("qa", 1)
    for asked, told in (({"arm": "non"}, "arm 'non'.*did you mean 'none'.*it has: none, qa"), ({"seed": 7}, "seed 7.*it has: 0, 1")):
        with pytest.raises(XtransferError, match=told):
            choose_runs(study, records, XTREME, **asked)
    with pytest.raises(XtransferError, match="has no record of a task of xtreme yet"):
        choose_runs(study, {}, XTREME)
    with pytest.raises(XtransferError, match="scores no task of xtreme-r: its targets are tatoeba; the benchmark takes xnli"):
        choose_runs(make_study(tmp_path / "t", ("tatoeba",))[0], {}, XTREME_R)
    retrieval, found = make_study(tmp_path / "r", ("tatoeba",))
    with pytest.raises(XtransferError, match="name one of: none, qa"):
        choose_runs(retrieval, found, XTREME)
    assert choose_runs(retrieval, found, XTREME, arm="qa")[0].cell.arm == "qa"


def test_a_written_submission_scores_what_the_records_say(small_tasks, tmp_path):
    study, records = make_study(tmp_path / "outputs", capped=("fr",))
    summary = write_submission(study, tmp_path / "outputs", "xtreme", tmp_path / "submission", labels=True)
    result = score_folder(summary["predictions"], summary["labels"], "xtreme")
    found = {(row["task"], code, key): value for name, row in summary["tasks"].items() for code, scores in result["tasks"][name]["languages"].items() for key, value in scores.items()}
    wanted = {(s.task, s.language, s.metric): s.value for row in summary["tasks"].values() for s in records[row["run"]].scores if s.selection != "last"}
    assert found == pytest.approx(wanted, abs=1e-12) and set(summary["tasks"]) == {"xnli", "udpos", "mlqa", "tatoeba", "bucc2018"}
    assert result["notes"] == [] and summary["partial"]["tatoeba"].endswith("; capped: fr 3 of 99 rows") and summary["partial"]["pawsx"] == "no run of study toys that could be chosen scores pawsx"
    assert summary["partial"]["mlqa"] == "3 of 7 languages; missing: ar, es, hi, vi" and "xnli: synthetic." in summary["notes"]
    assert read_json(tmp_path / "submission" / "submission.json")["tasks"] == summary["tasks"]
    shown = format_submission(summary)
    assert "udpos" in shown and summary["tasks"]["udpos"]["run"] in shown and "capped: fr 3 of 99" in shown
    last = write_submission(study, tmp_path / "outputs", "xtreme", tmp_path / "last", selection="last", labels=True)
    assert [score_folder(last["predictions"], last["labels"], "xtreme")["tasks"][name]["avg_metric"] for name in ("xnli", "udpos", "mlqa")] == [100, 100, 100]


def test_official_forms_of_the_files(small_tasks, tmp_path):
    study, _ = make_study(tmp_path / "outputs")
    write_submission(study, tmp_path / "outputs", "xtreme", tmp_path / "s", labels=True)

    def text(*path):
        return (tmp_path / "s").joinpath(*path).read_text()
    assert text("predictions", "xnli", "test-en.tsv") == "neutral\nentailment\n"
    assert text("predictions", "udpos", "test-en.tsv") == "DET\nNOUN\n\nNOUN\n\n" and text("labels", "udpos", "test-de.tsv") == "NOUN\nDET\nDET\n\n"
    assert json.loads(text("predictions", "mlqa", "test-de.json")) == {"de-0": "Zeile\nzwei", "de-1": "“x”"}
    assert text("predictions", "bucc2018", "test-de.tsv") == "de-0\ten-0\nde-4\ten-4\n" and text("labels", "bucc2018", "test-de.tsv") == "de-0\ten-0\nde-1\ten-1\nde-2\ten-2\n"
    # English sorted by code points: "All is well." 3, "Go!" 1, "It rains." 0, "it rains" 2; the other file keeps its order
    assert tatoeba_order(ENGLISH["de"]) == [3, 1, 0, 2]
    assert text("labels", "tatoeba", "test-de.tsv") == "3\n1\n0\n2\n" and text("predictions", "tatoeba", "test-de.tsv") == "3\n1\n0\n0\n"
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["labels", "predictions", "submission.json"]
    study, _ = make_study(tmp_path / "r", ("xcopa",))
    write_submission(study, tmp_path / "r", "xtreme-r", tmp_path / "t")
    assert (tmp_path / "t" / "predictions" / "xcopa" / "test-it.jsonl").read_text() == '{"label": 0}\n{"label": 1}\n{"label": 1}\n' and not (tmp_path / "t" / "labels").exists()


def test_no_pair_mined_makes_an_empty_file(small_tasks, tmp_path):
    run = Run(backbone="world-xlmr", stages=(Stage(score=("bucc2018",), recipe=RECIPE, seed=0),))
    write_record(tmp_path, run, "bucc2018", 0, {"de": ([], KEPT["bucc2018"]["de"][1])}, "none")
    write_text(run_folder(tmp_path, run) / "keep", "")
    pd.DataFrame(columns=["task", "language", "split", "selection", "id", "prediction", "reference"]).to_parquet(run_folder(tmp_path, run) / PREDICTIONS_NAME)
    study = Study(name="toys", profile="mini", question="", cells=(Cell(arm="none", target="bucc2018", seed=0, run=run),), contrasts=())
    summary = write_submission(study, tmp_path, "xtreme", tmp_path / "s", labels=True)
    assert (tmp_path / "s" / "predictions" / "bucc2018" / "test-de.tsv").read_text() == ""
    assert score_folder(summary["predictions"], summary["labels"], "xtreme")["tasks"]["bucc2018"]["avg_f1"] == 0


def test_refused_submissions(small_tasks, tmp_path):
    study, _ = make_study(tmp_path / "outputs", ("xnli",))
    chosen = next(cell.run for cell in study.cells if (cell.arm, cell.seed) == ("qa", 0))
    with pytest.raises(XtransferError, match="unknown selection 'lsat'; did you mean 'last'"):
        write_submission(study, tmp_path / "outputs", "xtreme", tmp_path / "s", selection="lsat")
    (tmp_path / "used").mkdir(), write_text(tmp_path / "used" / "x", "")
    with pytest.raises(XtransferError, match="used exists and is not empty"):
        write_submission(study, tmp_path / "outputs", "xtreme", tmp_path / "used")
    path = run_folder(tmp_path / "outputs", chosen) / PREDICTIONS_NAME
    pd.read_parquet(path).iloc[1:].to_parquet(path)
    with pytest.raises(XtransferError, match="keeps 1 predictions of xnli in en, its record says 2"):
        write_submission(study, tmp_path / "outputs", "xtreme", tmp_path / "s")
    path.unlink()
    with pytest.raises(XtransferError, match="keeps no predictions"):
        write_submission(study, tmp_path / "outputs", "xtreme", tmp_path / "s")
    (path.parent / "record.json").unlink()
    summary = write_submission(study, tmp_path / "outputs", "xtreme", tmp_path / "t")
    assert summary["tasks"]["xnli"]["seed"] == 1 and summary["notes"][0].startswith("1 results of study toys")
