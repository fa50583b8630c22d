"""Local copies of data and models: what is read is what lies in the folder, whole and under its own digest."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TOYS, xtransfer
from xtransfer.backbones import BACKBONES, read_backbone
from xtransfer.core import XtransferError
from xtransfer.modeling import load_encoder, load_tokenizer
from xtransfer.records import read_record
from xtransfer.sources import DATA_VARIABLE, Source, _content_digest, hub_rows, resolved_revision
from xtransfer.studies import Recipe
from xtransfer.tables import check_card, with_label_names
from xtransfer.tasks import Task, load_examples, nearest_occurrence, text_pair

COPY = Source(repo="me/news")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A local copy of a data set, empty."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    folder = tmp_path / "data" / COPY.repo
    folder.mkdir(parents=True)
    return folder


def test_a_table_that_changed_under_the_same_time_is_read_anew(copy):
    seen = []
    for content in ("text,label\nold,a\n", "text,label\nnew,b\n"):  # as long as the other
        (copy / "test.csv").write_text(content)
        os.utime(copy / "test.csv", (1_700_000_000,) * 2)
        _content_digest.cache_clear()  # it is kept within a process
        seen.append((resolved_revision(COPY), hub_rows(COPY, None, "test")))
    assert [rows for _, rows in seen] == [[{"text": "old", "label": "a"}], [{"text": "new", "label": "b"}]] and seen[0][0] != seen[1][0]


def test_only_an_empty_field_is_missing(copy):
    (copy / "test.csv").write_text("text,label\nNone,NA\nnull,nan\n,N/A\n")
    assert hub_rows(COPY, None, "test") == [{"text": "None", "label": "NA"}, {"text": "null", "label": "nan"}, {"text": None, "label": "N/A"}]


@pytest.mark.parametrize("content, words", [("text,pair,label\na,b,c,d\ne,f,g,h\n", "more fields"), ("text,label,label\na,b,c\n", "'label' twice"), ("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n", "git lfs pull")])
def test_a_csv_that_would_be_read_otherwise_than_it_stands(copy, content, words):
    (copy / "test.csv").write_text(content)
    with pytest.raises(XtransferError, match=words):
        hub_rows(COPY, None, "test")


@pytest.mark.parametrize("place", ("../secret.csv", "../../../../secret.csv", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x.csv", "zip://a::http://127.0.0.1:9/x.zip", "a\\..\\..\\b.csv"))
@pytest.mark.parametrize("card", ("README.md", ".huggingface.yaml"))
def test_a_card_names_no_file_elsewhere(copy, place, card):
    (copy / "test.csv").write_text("text,label\na,b\n")
    said = f"configs:\n- config_name: default\n  data_files:\n  - split: test\n    path:\n    - test.csv\n    - {json.dumps(place)}\n"
    (copy / card).write_text(f"---\n{said}---\n" if card == "README.md" else said)
    with pytest.raises(XtransferError, match="outside its folder"):
        hub_rows(COPY, None, "test")
    (copy / card).write_text((f"---\n{said}---\n" if card == "README.md" else said).replace(json.dumps(place), '"test.*"'))
    check_card(copy)


@pytest.mark.parametrize("text", ("---\n: : :\n---\n", "---\n[]\n---\n", "---\nconfigs: 5\n---\n", "---\nconfigs: [5, {data_files: 7}]\n---\n", "no card at all", "---\n"))
def test_odd_cards(copy, text):
    (copy / "test.csv").write_text("text,label\na,b\n")
    (copy / "README.md").write_text(text)
    try:
        assert hub_rows(COPY, None, "test") == [{"text": "a", "label": "b"}]
    except XtransferError as error:
        assert "\n" not in str(error)


def test_labels_without_a_name():
    import datasets

    names = datasets.ClassLabel(names=["no", "yes"])
    for feature, values, wanted in ((names, [1, -1, None], ["yes", None, None]), (datasets.List(names), [[1, -1, None], None, []], [["yes", None, None], None, []])):
        rows = with_label_names(datasets.Dataset.from_dict({"x": values}, features=datasets.Features({"x": feature})))
        assert [row["x"] for row in rows] == wanted
        for wrong in (2, -2, -100):
            table = datasets.Dataset.from_dict({"x": [wrong] if feature is names else [[wrong]]}).cast_column("x", datasets.Value("int64") if feature is names else datasets.List(datasets.Value("int64")))
            table.info.features = datasets.Features({"x": feature})
            with pytest.raises(ValueError, match=f"the label {wrong}"):
                with_label_names(table)


@pytest.mark.parametrize("error", (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "odd"), KeyError("context"), TypeError("'int' object is not iterable"), RecursionError("too deep"), IndexError("list"), AttributeError("get")))
def test_what_a_loader_meets_in_a_file_is_one_sentence(error):
    def load(language, split):
        raise error
    task = Task(name="odd", format="sequence_classification", kind="check", source=Source(repo="files/odd"), languages=("en",), load=load, read=text_pair("a", "b", "label"), labels=("no", "yes"))
    with pytest.raises(XtransferError, match=f"the test split of task odd in en cannot be read from files/odd: {type(error).__name__}"):
        load_examples(task, "en", "test")


def test_an_answer_does_not_stand_before_its_context():
    assert nearest_occurrence("a bc", "b", -2) == 2 and nearest_occurrence("a bc", "a", -4) == 0


@pytest.mark.parametrize("wrong", ({"batch_size": 0}, {"batch_size": True}, {"batch_size": 1.5}, {"max_steps": 0}, {"max_steps": -1}, {"epochs": -1}, {"mask_probability": 5.0}, {"pair_mask_probability": ("a", "b")}, {"dev_limit": -1}, {"warmup": 2},
                                   {"stride": -1}, {"learning_rate": float("inf")}, {"learning_rate": float("nan")}, {"learning_rate": "1e-5"}, {"max_length": -5}, {"precision": "evil"}, {"selection": "evil"}, {"lora_layers": (-1,)}))
def test_a_recipe_s_numbers_have_ranges(wrong):
    with pytest.raises(XtransferError, match=next(iter(wrong))):
        Recipe(**{"name": "mine", "learning_rate": 1e-5, "batch_size": 8} | wrong)


def test_a_setting_outside_its_range_runs_nothing(tmp_path):
    code, out, err = xtransfer("run", "toys", "--profile", "smoke", "--declare", TOYS, "--outputs", tmp_path / "o", "--set", "batch_size=0")
    assert code == 1 and "batch_size 0" in err and "Traceback" not in err and not list((tmp_path / "o").glob("*/*/record.json")), out + err


@pytest.fixture
def checkpoint(tmp_path, toys):
    """A checkpoint of the toy encoder in a folder, in two files of weights with an index."""
    import transformers

    tokenizer = BACKBONES["toy-encoder"].build_tokenizer()
    folder = tmp_path / "checkpoint"
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64), add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    return folder, weights


def opened(folder):
    read_backbone.cache_clear()
    backbone = read_backbone(str(folder))
    return load_encoder(backbone, load_tokenizer(backbone), 0), backbone


def test_an_index_leads_to_safetensors_of_its_folder_only(checkpoint, tmp_path, monkeypatch):
    folder, weights = checkpoint
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}))
    encoder, _ = opened(folder)
    assert torch.equal(encoder.get_input_embeddings().weight, weights["embeddings.word_embeddings.weight"])
    torch.save(weights, folder / "pytorch_model.bin")
    save_file(weights, tmp_path / "other.safetensors")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was opened"))
    for place in ("pytorch_model.bin", "../other.safetensors", str(tmp_path / "other.safetensors"), 5, None):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, place)}))
        with pytest.raises(XtransferError, match="only safetensors of the same folder"):
            opened(folder)
    for odd in ("[]", "{", '{"weight_map": 5}'):
        index.write_text(odd)
        with pytest.raises(XtransferError):
            opened(folder)


def test_the_fingerprint_of_a_checkpoint_sees_all_of_its_tokenizer(checkpoint):
    folder, _ = checkpoint
    (folder / "part.safetensors").rename(folder / "model.safetensors")
    (folder / "merges.txt").write_text("".join(f"line {i}\n" for i in range(100_000)))
    os.mkfifo(folder / "pipe.json")
    _, before = opened(folder)
    text = (folder / "merges.txt").read_text()
    (folder / "merges.txt").write_text(text.replace("line 54321\n", "line 54312\n"))
    _, after = opened(folder)
    assert before.revision != after.revision


ODD_INSIDE = ("data.0.capped", None), ("data.0.rows", "x"), ("data.0.language", []), ("data.0.task", -1), ("training.truncated", "x"), ("training.truncated", {"a": "b"}), ("environment.packages", float("nan")), ("environment.packages", {"torch": 2})


@pytest.mark.parametrize("place, value", ODD_INSIDE)
def test_the_inside_of_a_record_is_checked_where_it_has_no_checksum(place, value, tmp_path, toy_outputs):
    folder = next(path for path in sorted(toy_outputs.glob("*/*/record.json")) if "toy_pair" in str(path)).parent
    record = json.loads((folder / "record.json").read_text())
    del record["checksum"]
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert read_record(tmp_path).run == record["run"]
    *way, last = place.split(".")
    part = record
    for step in way:
        part = part[int(step) if step.isdecimal() else step]
    part.pop(last) if value is None else part.update({last: value})
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(XtransferError, match=f"damaged: {last}"):
        read_record(tmp_path)
