"""Variants of tasks by name: what they change, what they leave, and what they refuse."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

import xtransfer.modifiers
import xtransfer.multilingual  # noqa: F401  tasks to ask variants of
from xtransfer.core import XtransferError, digest
from xtransfer.studies import Recipe, Run, Stage
from xtransfer.tasks import MODIFIERS, TASKS, load_examples

LABELLED = ("toy_pair", "toy_choice", "toy_tags", "toy_qa", "toy_qa2")
RECIPE = Recipe(name="x", learning_rate=1e-3, batch_size=4)


def rows(name, split="train"):
    return load_examples(TASKS[name], "en", split).rows


def label_of(row):
    """What an example is to be predicted as, in a form that can be counted."""
    return row["label"] if "label" in row else tuple(row["tags"]) if "tags" in row else (tuple(row["answers"]), tuple(row["starts"]))


def distribution(task, examples):
    """What shuffling keeps: labels, positions of the right choice, tags, lengths of answers."""
    if task.format == "token_classification":
        return Counter(tag for row in examples for tag in row["tags"])
    if task.format == "span_extraction":
        return Counter(len(row["answers"][0].split()) if row["answers"] else 0 for row in examples)
    return Counter(row["label"] for row in examples)


@pytest.mark.parametrize("name", LABELLED)
def test_shuffled_changes_labels_of_the_training_split_and_nothing_else(toys, name):
    before, after, task = rows(name), rows(f"{name}@shuffled"), TASKS[name]
    inputs = [column for column in before[0] if column not in ("label", "tags", "answers", "starts")]
    assert [[row[c] for c in inputs] for row in before] == [[row[c] for c in inputs] for row in after]
    assert distribution(task, before) == distribution(task, after)
    changed = sum(label_of(a) != label_of(b) for a, b in zip(before, after)) / len(before)
    assert changed > (0.25 if name == "toy_pair" else 0.45), changed  # a two-way label stays half the time
    assert rows(f"{name}@shuffled", "dev") == rows(name, "dev") and rows(f"{name}@shuffled", "test") == rows(name, "test")
    again = MODIFIERS["shuffled"](task, ())
    assert load_examples(again, "en", "train").rows == after
    assert "shuffled" in load_examples(again, "en", "train").note


def test_shuffled_answers_stand_where_they_say(toys):
    for row in rows("toy_qa2@shuffled"):
        assert all(row["context"][start:start + len(answer)] == answer for answer, start in zip(row["answers"], row["starts"]))
        assert all(start == 0 or row["context"][start - 1] == " " for start in row["starts"])  # whole words


def test_shuffled_choices_are_right_as_often_as_chance(toys):
    task = TASKS["toy_choice"]
    many = replace(task, load=lambda language, split: [row | {"id": str(i)} for i in range(20) for row in task.load(language, split)])
    before, after = load_examples(many, "en", "train").rows, load_examples(MODIFIERS["shuffled"](many, ()), "en", "train").rows
    right = sum(a["label"] == b["label"] for a, b in zip(before, after)) / len(before)
    assert abs(right - 1 / 3) < 0.04, "a control that never gives the right answer tells where it is not"


@pytest.mark.parametrize("name, reason", [("toy_text", "format masked_lm has no labels"), ("toy_retrieval", "not trained"), ("xnli_translated@shuffled-2", "unknown|takes no argument")])
def test_shuffled_refuses_what_has_no_labels(toys, name, reason):
    with pytest.raises(XtransferError, match=reason):
        TASKS[name if "@" in name else f"{name}@shuffled"]


def test_unlabelled_examples_stay_unlabelled(toys):
    task = TASKS["toy_pair"]
    half = replace(task, load=lambda language, split: [row if i % 2 else row | {"label": None} for i, row in enumerate(task.load(language, split))])
    whole, drawn = load_examples(MODIFIERS["shuffled"](half, ()), "en", "train"), load_examples(MODIFIERS["sample"](half, ("20",)), "en", "train")
    assert (len(whole.rows), whole.unlabelled) == (45, 45) and (len(drawn.rows), drawn.unlabelled, drawn.available) == (20, 0, 90)


def test_samples_are_nested_and_say_what_they_are(toys):
    small, large = load_examples(TASKS["toy_qa@sample-10"], "en", "train"), load_examples(TASKS["toy_qa@sample-40"], "en", "train")
    ids = [row["id"] for row in large.rows]
    assert [row["id"] for row in small.rows] == ids[:10] and len(set(ids)) == 40 and ids != [row["id"] for row in rows("toy_qa")][:40]
    assert (small.available, small.note) == (90, "synthetic; random sample of 10 training examples")
    assert rows("toy_qa@sample-10", "dev") == rows("toy_qa", "dev")
    assert load_examples(TASKS["toy_text@sample-5"], "en", "train").available == 90
    published = replace(TASKS["toy_qa"], expected_rows={"train": 90})
    assert load_examples(MODIFIERS["sample"](published, ("10",)), "en", "train").capped


def test_thousands_may_be_written_short(toys):
    with pytest.raises(XtransferError, match="90 training examples with labels in en, fewer than the 2000 that @sample-2k"):
        rows("toy_pair@sample-2k")
    for wrong in ("sample", "sample-x", "sample-0", "sample-1-2", "sample-2m"):
        with pytest.raises(XtransferError, match="takes one number"):
            TASKS[f"toy_pair@{wrong}"]


@pytest.mark.parametrize("name", ["toy_pair", "toy_tags", "toy_text"])
def test_real_and_fake_differ_only_in_the_order_of_words(toys, name):
    task = TASKS[f"{name}@realfake"]
    for split in ("train", "dev"):
        made = load_examples(task, "en", split).rows
        assert task.format == "sequence_classification" and len(made) >= 4
        for real, fake in zip(made[::2], made[1::2]):
            assert (real["label"], fake["label"]) == ("real", "fake") and real["text"] != fake["text"] and sorted(real["text"].split()) == sorted(fake["text"].split())
    assert load_examples(MODIFIERS["realfake"](TASKS[name], ()), "en", "train").rows == load_examples(task, "en", "train").rows


def test_long_and_short_texts_of_realfake(toys):
    task = TASKS["toy_text"]
    texts = ["a b", "a a a a a", " ".join(str(i) for i in range(200)), "one two three four"]
    made = load_examples(MODIFIERS["realfake"](replace(task, load=lambda language, split: [{"id": "x", "text": text} for text in texts]), ()), "en", "train").rows
    assert [len(row["text"].split()) for row in made] == [xtransfer.modifiers.LONGEST_REAL] * 2 + [4] * 2


def test_realfake_needs_words_to_shuffle(toys):
    with pytest.raises(XtransferError, match="finds no text of 4 or more words in the train split of the task toy_qa in en"):
        rows("toy_qa@realfake")


def test_in_chooses_training_languages():
    two = TASKS["xnli_translated@in-de-sw"]
    assert two.train_languages == ("de", "sw") and two.trains_on == two.name == "xnli_translated@in-de-sw" and two.languages == TASKS["xnli_translated"].languages
    assert two.load is TASKS["xnli_translated"].load and two.expected_rows["train"] == 392_702
    for wrong, message in (("in", "takes language codes"), ("in-en", "no language 'en'"), ("in-de-sww", "did you mean 'sw'")):
        with pytest.raises(XtransferError, match=message):
            TASKS[f"xnli_translated@{wrong}"]


def test_config_is_refused_where_it_makes_no_sense(toys):
    carved = TASKS["hellaswag@config-carved"]
    assert carved.read is TASKS["hellaswag"].read and not carved.expected_rows and "configuration carved, which is not the published one" in carved.source.note
    assert carved.sources == (carved.source,) and TASKS["hellaswag@config-carved@sample-20"].source.note.startswith(carved.source.note)
    for name, message in (("mnli@config", "takes the name"), ("toy_pair@config-x", "does not apply"), ("anli_plus@config-x", "does not apply"), ("xnli_translated@config-de", "does not apply"),
                          ("ccg@config-x", "does not apply"), ("mnli@shuffled@config-x", "comes before"), ("mnli@config-a.b", "letters, digits and underscores"), ("mnli@config-a/b", "letters, digits")):
        with pytest.raises(XtransferError, match=message):
            TASKS[name]


@pytest.fixture
def translations(tmp_path, monkeypatch):
    """A folder of translations of the toy pairs into German and Swahili."""
    monkeypatch.setenv("XTRANSFER_DATA", str(tmp_path))
    for code in ("de", "sw"):
        folder = tmp_path / "files/translations/toy_pair" / code
        folder.mkdir(parents=True)
        for split, count in (("train", 6), ("dev", 3)):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({"id": f"{i}", "text": f"{code} {i}", "text_pair": "\u2028", "label": "yes"}, ensure_ascii=False) + "\n" for i in range(count)), encoding="utf-8")
        (folder / "translation.json").write_text(json.dumps({"model": f"some/opus-mt-en-{code}", "sentences": 12}))
    return tmp_path / "files/translations/toy_pair"


def test_translations_are_read_from_the_users_folder(toys, translations):
    task = TASKS["toy_pair@mt-de-sw"]
    assert task.languages == task.train_languages == ("de", "sw") and [s.repo for s in task.sources] == ["files/translations/toy_pair/de", "files/translations/toy_pair/sw"]
    assert len(load_examples(task, "de", "train").rows) == 6 and load_examples(task, "sw", "dev").rows[0]["text"] == "sw 0"
    assert "machine translation: model some/opus-mt-en-sw, sentences 12" in load_examples(task, "sw", "train").note
    sampled = load_examples(TASKS["toy_pair@mt-de-sw@sample-2"], "sw", "train")
    assert len(sampled.rows) == 2 and "opus-mt-en-sw" in sampled.note
    assert digest(task.identity) == digest(MODIFIERS["mt"](TASKS["toy_pair"], ("de", "sw")).identity)


def test_damaged_translations_are_named(toys, translations):
    (translations / "de/train.jsonl").write_text('{"id": "0", "text": "a", "text_pair": "", "label": "yes"}\n{"id": \n')
    with pytest.raises(XtransferError, match="line 2 of .*de/train.jsonl is not JSON"):
        load_examples(TASKS["toy_pair@mt-de"], "de", "train")
    (translations / "sw/train.jsonl").write_text('{"id": "0", "text": "a", "label": "yes"}\n')
    with pytest.raises(XtransferError, match="row 0 of task toy_pair@mt-sw.* lacks the column 'text_pair'"):
        load_examples(TASKS["toy_pair@mt-sw"], "sw", "train")
    (translations / "sw/translation.json").write_text("{}")
    with pytest.raises(XtransferError, match="should name the model"):
        load_examples(TASKS["toy_pair@mt-sw"], "sw", "dev")
    (translations / "sw/translation.json").unlink()
    with pytest.raises(XtransferError, match="none of the files translation.json"):
        load_examples(TASKS["toy_pair@mt-sw"], "sw", "dev")
    with pytest.raises(XtransferError, match="files/translations/toy_pair/ru.*translation notebook"):
        load_examples(TASKS["toy_pair@mt-ru"], "ru", "train")
    for wrong, message in (("mt", "takes language codes"), ("mt-dee", "unknown language 'dee'")):
        with pytest.raises(XtransferError, match=message):
            TASKS[f"toy_pair@{wrong}"]


def test_names_are_safe_and_identities_distinct(toys):
    names = ["toy_qa2", "toy_qa2@shuffled", "toy_qa2@sample-8", "toy_qa2@sample-8@shuffled", "toy_qa2@shuffled@sample-8", "toy_qa2@realfake", "toy_qa2@mt-de"]
    assert [TASKS[name].name for name in names] == names and all(TASKS[name].trains_on == name for name in names)
    assert len({digest(TASKS[name].identity) for name in names}) == len(names)
    for name in names:
        run = Run(backbone="toy-encoder", stages=(Stage(train=(name,), recipe=RECIPE, seed=0),))
        assert re.fullmatch(r"toy-encoder/[\w@-]+\.s0-[0-9a-f]{12}", run.id)
    assert rows("toy_qa2@sample-8@shuffled") != rows("toy_qa2@sample-8")


def test_a_variant_follows_a_task_that_is_declared_again(toys):
    first = TASKS["toy_pair@sample-8"]
    assert TASKS["toy_pair@sample-8"] is first and "toy_pair@sample-8" in TASKS and "toy_pair@sampel-8" not in TASKS and "toy_pair@sample-8" not in list(TASKS)
    TASKS.register(replace(TASKS["toy_pair"], version=2))
    assert TASKS["toy_pair@sample-8"].version == 2


def test_heads_of_variants_are_built_and_trained(toys, tmp_path):
    """Names with @ become parts of a model and of files of weights."""
    from xtransfer.backbones import BACKBONES
    from xtransfer.encoding import encode
    from xtransfer.modeling import StageModel, load_encoder, load_tokenizer
    from xtransfer.studies import Mixing
    from xtransfer.training import fit

    names = ["toy_qa2@sample-8@shuffled", "toy_choice@shuffled", "toy_tags@realfake"]
    backbone = BACKBONES["toy-encoder"]
    tokenizer, recipe = load_tokenizer(backbone), replace(RECIPE, max_steps=6, max_length=96, stride=8, evaluations=1)
    model = StageModel(load_encoder(backbone, tokenizer, seed=0), [TASKS[name] for name in names], seed=0)
    data = {name: encode(tokenizer, TASKS[name], rows(name), recipe) for name in names}
    fitted = fit(model, data, lambda: {name: 1.0 for name in names}, recipe, Mixing(kind="uniform"), 0, tmp_path)
    fitted.load(model, "best")
    assert fitted.steps == 6 and set(model.heads) == set(names)


@pytest.mark.parametrize("name, message", [("mnli@shuffeld", "unknown modifier 'shuffeld'.*did you mean 'shuffled'"), ("mnil@shuffled", "unknown task 'mnil'.*did you mean 'mnli'"), ("mnli@", "unknown modifier ''")])
def test_wrong_names_are_answered_with_the_nearest(name, message):
    with pytest.raises(XtransferError, match=message):
        TASKS[name]


def test_targets_without_training_data_point_to_the_task_that_has_it():
    import xtransfer.xtreme  # noqa: F401

    for modifier in ("shuffled", "sample-10", "realfake", "in-de", "mt-de", "config-x"):
        with pytest.raises(XtransferError, match="it trains on mnli; ask for mnli@"):
            TASKS[f"xnli@{modifier}"]
