"""Published checkpoints speak for themselves: stock classes open them, and their cards say what the records say, whatever the names are."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from xtransfer.backbones import BACKBONES
from xtransfer.model_cards import CARD_NAME, model_card, yaml_value
from xtransfer.records import read_record, run_folder
from xtransfer.runs import execute, work_folder
from xtransfer.studies import STUDIES

ROOT = Path(__file__).resolve().parents[1]
NASTY = 'x: "y"\n---\n<script>alert(1)</script> | `b` [c](http://d) 𝄞'
FILES = {"config.json", "model.safetensors", "heads.safetensors", "tokenizer.json", "tokenizer_config.json", "checksums.json", CARD_NAME}
STATES = """
import json, pathlib, sys
{snippet}
print(json.dumps({{"states": states[0].tolist(), "modules": [m for m in sys.modules if m.startswith("xtransfer")]}}))
"""


def opened(folder, sentence):
    """States of a sentence from the card's own code, run in a fresh process inside a checkpoint's folder."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / CARD_NAME).read_text(), re.S)
    program = STATES.format(snippet=snippet.replace('"A sentence."', repr(sentence)))
    around = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=folder, capture_output=True, text=True, env=around, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["modules"]
    return torch.tensor(found["states"])


def own_states(model, tokenizer, sentence):
    from xtransfer.encoding import encode_sentences, make_batch

    with torch.no_grad():
        return model.eval().states(make_batch(encode_sentences(tokenizer, [sentence], 64), np.arange(1)))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A pretrained encoder of the world and a target trained from it, on a handful of examples."""
    import xtransfer.catalogue  # noqa: F401

    outputs = tmp_path_factory.mktemp("published")
    study = STUDIES["stilts"].build("smoke").with_limits(train=24, score=12)
    study = study.with_runs(lambda run: replace(run, stages=tuple(replace(s, recipe=replace(s.recipe, max_steps=3, dev_limit=12)) for s in run.stages)))
    target = next(cell.run for cell in study.cells if (cell.arm, cell.target) == ("none", "world_panx"))
    for run in (target.parent, target):
        execute(run, outputs)
    return outputs, target


def parts(card):
    """The head of a card as values, and its text."""
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_checkpoint_is_opened_by_stock_classes_in_a_fresh_process(published):
    from xtransfer.modeling import StageModel, load_encoder, load_tokenizer

    outputs, target = published
    backbone, folder = BACKBONES["world-xlmr"], run_folder(outputs, target) / "checkpoint"
    for run in (target.parent, target):
        assert {p.name for p in (run_folder(outputs, run) / "checkpoint").rglob("*")} == FILES, "safetensors and text only"
    tokenizer = load_tokenizer(backbone, folder)
    model = StageModel(load_encoder(backbone, tokenizer, 7, folder), (), 7)
    sentence = tokenizer.decode(range(20, 29))
    torch.testing.assert_close(opened(folder, sentence), own_states(model, tokenizer, sentence), atol=1e-5, rtol=0)


def test_the_card_says_what_the_records_say(published):
    outputs, target = published
    folder = run_folder(outputs, target)
    record, parent = read_record(folder), read_record(run_folder(outputs, target.parent))
    card = (folder / "checkpoint" / CARD_NAME).read_text(encoding="utf-8")
    assert card == model_card(record, [parent])
    head, text = parts(card)
    assert head["license"] == "apache-2.0" and head["library_name"] == "transformers" and "base_model" not in head and {"en", "qaa"} <= set(head["language"])
    best = {s.language: s.value for s in record.scores if s.selection == "best" and s.metric == "f1"}
    shown = {r["dataset"]["args"]["language"]: r["metrics"][0]["value"] for r in head["model-index"][0]["results"]}
    assert shown == {language: round(value, 2) for language, value in best.items()}
    mean = sum(value for language, value in best.items() if language != "en") / (len(best) - 1)
    assert f"| **zero-shot mean, {len(best) - 1} languages** | {mean:.1f} |" in text and f"| English (en) | {best['en']:.1f} |" in text
    for run in (target.parent, target):
        assert f"`{run.digest}`" in text
    assert "`world_text` train (" in text and "`world_panx` train (24 of 300 rows)" in text and "`world_panx` test (132 of" in text, "what was capped is told"
    assert "Data made by a program: `world_text`, `world_panx`" in text and "`seed-0-" in text and "torch 2." in text
    assert str(outputs) not in card and "no labels" not in text
    _, before = parts((run_folder(outputs, target.parent) / "checkpoint" / CARD_NAME).read_text(encoding="utf-8"))
    assert "This stage scores no target" in before and "model-index" not in (run_folder(outputs, target.parent) / "checkpoint" / CARD_NAME).read_text()


def test_the_hubs_own_reader_accepts_the_head(published):
    from huggingface_hub import ModelCard

    outputs, target = published
    card = ModelCard.load(run_folder(outputs, target) / "checkpoint" / CARD_NAME)
    assert card.data.model_name == target.id and {(r.metric_type, r.dataset_args["language"]) for r in card.data.eval_results} >= {("f1", "en"), ("f1", "qaj")} and card.data.eval_results[0].task_type == "token-classification"
    assert card.data.tags[0] == "xtransfer" and card.data.license == "apache-2.0"


def test_a_publication_that_was_cut_off_is_repeated_with_the_card(published, tmp_path):
    outputs, target = published
    again = tmp_path / "outputs"
    shutil.copytree(outputs, again)
    final, work = run_folder(again, target), work_folder(again, target)
    card = (final / "checkpoint" / CARD_NAME).read_bytes()
    os.rename(final, work)  # killed after the record was written, before the rename
    (work / "checkpoint" / CARD_NAME).unlink()
    execute(target, again)
    assert (final / "checkpoint" / CARD_NAME).read_bytes() == card and not work.exists()
    shutil.rmtree(final / "checkpoint")
    shutil.rmtree(run_folder(again, target.parent))  # its record is gone, and the card tells of what is left
    os.rename(final, work)
    assert execute(target, again, keep_checkpoint=False).run == target.id and not (final / "checkpoint").exists()


def test_names_and_notes_do_not_break_out(published):
    from huggingface_hub import ModelCard

    outputs, target = published
    record = read_record(run_folder(outputs, target))
    task = json.loads(json.dumps(record.stages[-1]["score"][0])) | {"name": NASTY}
    task["source"] |= {"repo": NASTY, "license": NASTY}
    stage = record.stages[-1] | {"score": [task], "train": [task | {"labels": [NASTY]}]}
    nasty = replace(record, run=NASTY, stages=[*record.stages[:-1], stage], scores=[replace(s, task=NASTY) for s in record.scores],
                    data=[d | {"task": NASTY, "note": NASTY, "repo": NASTY, "revision": NASTY} for d in record.data], environment=record.environment | {"platform": NASTY})
    card = model_card(nasty, [])
    head, text = parts(card)
    assert head["license"] == "other" and head["model-index"][0]["name"] == NASTY and head["model-index"][0]["results"][0]["dataset"]["type"] == NASTY and NASTY in head["tags"]
    assert ModelCard(card).data.eval_results[0].task_name == NASTY
    visible = re.sub(r"(`+)[^`](?:.*?[^`])?\1(?!`)", "", re.sub(r"```.*?```", "", text, flags=re.S))  # markup has no meaning inside code
    assert "<script>" not in visible and not re.search(r"(?<!\\)\[c\]\(", visible)
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, block[:300]
    assert widths


@pytest.mark.parametrize("value", [NASTY, "", "no", "1e5", "2026-01-01", "\x00\x7f\x85\u2028\ufeff", ["- a", {"b: c": [None, 1.5, True]}]])
def test_yaml_values_come_back(value):
    assert yaml.safe_load(f"key: {yaml_value(value)}\n") == {"key": value}


def test_hub_parts_are_linked_and_licences_are_not_added_up(published):
    outputs, target = published
    record = read_record(run_folder(outputs, target))
    source = {"repo": "unimelb-nlp/wikiann", "revision": "main", "license": "unknown (text of Wikipedia)", "citation": "", "note": ""}
    stages = [stage | {"train": [task | {"source": source} for task in stage["train"]]} for stage in record.stages]
    head, text = parts(model_card(replace(record, stages=stages, parameters=record.parameters | {"backbone": "xlm-r-large"}), []))
    assert head["base_model"] == ["FacebookAI/xlm-roberta-large"] and head["datasets"] == ["unimelb-nlp/wikiann"]
    assert head["license"] == "other" and "| backbone | `FacebookAI/xlm-roberta-large` | MIT |" in text and "unknown (text of Wikipedia)" in text


@pytest.mark.parametrize("config", [
    {"model_type": "mt5", "num_layers": 1, "num_decoder_layers": 1, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    {"model_type": "bloom", "n_layer": 1, "hidden_size": 16, "n_head": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    {"model_type": "metaclip_2_text_model", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 77, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}], ids=lambda c: c["model_type"])
def test_the_cards_code_opens_other_families(config, toys, published, tmp_path):
    from xtransfer.modeling import StageModel, load_encoder, load_tokenizer, save_checkpoint

    backbone = BACKBONES.register(replace(BACKBONES["toy-encoder"], name="toy-other", config=config, layers=1, max_length=77, architecture="decoder", family="metaclip_2" if "clip" in config["model_type"] else None))
    tokenizer = load_tokenizer(backbone)
    model = StageModel(load_encoder(backbone, tokenizer, 0), (), 0, backbone)
    save_checkpoint(model, tokenizer, tmp_path)
    outputs, target = published
    record = read_record(run_folder(outputs, target))
    assert "clip" not in config["model_type"] or "import AutoTokenizer, MetaClip2TextModel" in model_card(replace(record, parameters={"backbone": "toy-other"}), []), "AutoModel does not know this type"
    (tmp_path / CARD_NAME).write_text(model_card(replace(record, parameters={"backbone": "toy-other"}), []))
    torch.testing.assert_close(opened(tmp_path, "a bc gg"), own_states(model, tokenizer, "a bc gg"), atol=1e-5, rtol=0)


def test_no_code_from_a_checkpoint_is_ever_run():
    """Neither by transformers nor by pickle: no argument trusts remote code, and nothing reads or writes pickles."""
    for path in sorted((ROOT / "xtransfer").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code" or ast.unparse(node.value) == "False", path.name
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("read_pickle", "to_pickle") and not (node.attr in ("load", "save") and getattr(node.value, "id", "") in ("torch", "pickle", "joblib")), path.name
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "joblib", "dill", "cloudpickle"} & set(names), path.name
    for notebook in [*(ROOT / "nbs").rglob("*.ipynb")]:
        text = notebook.read_text()
        assert not re.search(r"trust_remote_code\s*=\s*True|torch\.load\(|import pickle", text), notebook.name
