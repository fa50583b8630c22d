"""Every family passes its self-check, every fault that is put in is found by the check that is there for it, and nothing is left behind."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, normalizers, processors
from transformers import AttentionInterface

import copies
import xtransfer.attention
import xtransfer.catalogue  # noqa: F401  fills the registries
import xtransfer.checks
import xtransfer.tokenizer_checks
from conftest import TOYS
from xtransfer.attention import GROUPED
from xtransfer.backbones import BACKBONES, FAMILIES, read_backbone
from xtransfer.checks import MODEL_CHECKS, require_checks, self_check
from xtransfer.core import XtransferError
from xtransfer.languages import LANGUAGES
from xtransfer.modeling import StageModel, load_encoder, load_tokenizer
from xtransfer.studies import Mixing, Recipe
from xtransfer.tasks import TASKS
from xtransfer.tokenizer_checks import SENTENCES, TOKENIZER_CHECKS, Fault, Subject

RECIPE = Recipe(name="toy", learning_rate=1e-3, batch_size=4, max_steps=3, evaluations=1, mask_probability=0.3)
ALL = (*TOKENIZER_CHECKS, *MODEL_CHECKS)
EVERY = list(copies.COPIES)


@pytest.fixture(scope="session")
def declared(tmp_path_factory):
    """The declaration of a copy by name; its checkpoint is written when it is first asked for."""
    found = {}
    def of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("copy")
            found[name] = replace(read_backbone(str(copies.build(name, folder))), family=name, pad_token="<|end_of_text|>" if name == "llama" else None)
        return found[name]
    return of


@pytest.fixture
def families():
    """Families that a test declares are gone after it."""
    before = dict(FAMILIES)
    yield FAMILIES
    FAMILIES._entries = before


def subject(backbone, **others):
    tokenizer = load_tokenizer(backbone)
    return Subject(backbone, tokenizer, load_encoder(backbone, tokenizer, 0), RECIPE, **others)


def failing(s):
    """Name -> check, of those that fail."""
    found = self_check(s.backbone, s.tokenizer, s.encoder, s.recipe)
    assert tuple(check.name for check in found) == ALL
    assert all(check.found and "\n" not in check.found + check.advice and bool(check.advice) != check.passed for check in found)
    return {check.name: check for check in found if not check.passed}


@pytest.mark.parametrize("name", EVERY)
def test_every_family_passes(name, declared):
    assert failing(subject(declared(name))) == {}


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.startswith("world-")] + ["toy-encoder"])
def test_backbones_of_the_world_pass(name, toys):
    assert failing(subject(BACKBONES[name])) == {}


def test_there_is_a_sentence_for_every_script():
    assert {language.script for code, language in LANGUAGES.items() if not code.startswith("qa")} <= set(SENTENCES)
    assert all(len(text.split()) > 3 for text in SENTENCES.values())


# ---- faults that are put in

def family(s, **changes):
    """The same with a family that is declared otherwise."""
    FAMILIES.register(replace(s.family, name="wrong", **changes))
    return replace(s, backbone=replace(s.backbone, family="wrong"))


def changed(s, **changes):
    return replace(s, backbone=replace(s.backbone, **changes))


def told(s, **roles):
    """The same with special tokens of the tokenizer set otherwise."""
    for role, token in roles.items():
        setattr(s.tokenizer, role, token)
    return s


def plain(s):
    """A tokenizer that puts nothing around texts."""
    s.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return s


def normalized(s, *steps):
    """A tokenizer that changes texts before it cuts them."""
    s.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*steps, *([s.tokenizer.backend_tokenizer.normalizer] if s.tokenizer.backend_tokenizer.normalizer else [])])
    return s


def shifted_offsets(s):
    """A tokenizer whose tokens cover characters behind their own."""
    class Shifted(type(s.tokenizer)):
        def __call__(self, *arguments, **options):
            found = super().__call__(*arguments, **options)
            if options.get("return_offsets_mapping"):
                found["offset_mapping"] = [(a + 40, b + 40) for a, b in found["offset_mapping"]]
            return found
    s.tokenizer.__class__ = Shifted
    return s


def layers(s):
    """The layers of the text part."""
    return next(part for part in s.model.text.modules() if isinstance(part, torch.nn.ModuleList))


def frozen(s):
    layers(s)[1].requires_grad_(False)
    return s


def disconnected(s):
    """The result of the first layer passes no gradient back."""
    layers(s)[0].register_forward_hook(lambda part, inputs, output: (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach())
    return s


def weight(s, value):
    """One number among the weights is another."""
    with torch.no_grad():
        next(p for p in layers(s)[0].parameters() if p.ndim > 1)[0, 0] = value
    return s


def deaf_to_padding(s):
    """A model that does not respect its mask."""
    forward = s.model.text.forward
    def without(*arguments, **named):
        return forward(*arguments, **{k: torch.ones_like(v) if k == "attention_mask" else v for k, v in named.items()})
    s.model.text.forward = without
    del s.__dict__["model"]
    return s


def endless(s):
    s.encoder.config.decoder_start_token_id = None
    return s


FAULTS = {  # what is wrong -> the copy, how it is made, the check that finds it, and what its advice holds
    "padding side of BLOOM": ("bloom", lambda s: told(s, padding_side="left"), "padding side", "right"),
    "padding side of BERT": ("bert", lambda s: told(s, padding_side="left"), "padding side", "right"),
    "no padding token": ("xlm-roberta", lambda s: told(s, pad_token=None), "padding token", 'Backbone(pad_token="...")'),
    "no padding token in LLaMA": ("llama", lambda s: told(s, pad_token=None), "padding token", "<|end_of_text|>"),
    "padding is the unknown token": ("bloom", lambda s: told(s, pad_token="<unk>"), "padding token", "Backbone(pad_token"),
    "padding of XLM-R is another token": ("xlm-roberta", lambda s: told(s, pad_token="</s>"), "padding id", "row 1"),
    "no special tokens": ("xlm-roberta", plain, "pairs", "separates pairs"),
    "first token ordinary": ("bert", plain, "special tokens", 'pooling="mean"'),
    "no closing token": ("bloom", plain, "special tokens", "closing=True"),
    "no closing token in mT5": ("mt5", plain, "special tokens", "closing=True"),
    "first token of a decoder": ("qwen3", lambda s: changed(s, pooling="first"), "special tokens", 'pooling="last"'),
    "letters that are lost": ("xlm-roberta", lambda s: normalized(s, normalizers.Replace(Regex(r"\bbeings\b|\bи\b"), "")), "words", "word_ids()"),
    "characters that are elsewhere": ("deberta-v2", shifted_offsets, "offsets", "alignment"),
    "characters that no token covers": ("roberta", lambda s: normalized(s, normalizers.Replace(Regex("[aeiou]"), "")), "offsets", "alignment"),
    "more tokens than rows": ("qwen2", lambda s: (s.tokenizer.add_tokens(["zzz"]), s)[1], "vocabulary", "Backbone(tokenizer=...)"),
    "no mask token": ("bert", lambda s: told(s, mask_token=None), "tokens for text", 'objective="none"'),
    "mask token is the unknown token": ("xlm-roberta", lambda s: told(s, mask_token="<unk>"), "tokens for text", "mask token"),
    "no sentinels": ("mt5", lambda s: replace(s, tokenizer=copies.unigram(["<pad>", "</s>", "<unk>"], "$A </s>", "$A </s> $B </s>", pad_token="<pad>", eos_token="</s>")), "tokens for text", 'objective="none"'),
    "float16 parameters": ("bloom", lambda s: replace(s, encoder=s.encoder.half()), "parameters", "torch.float32"),
    "bfloat16 parameters": ("gemma3_text", lambda s: replace(s, encoder=s.encoder.bfloat16()), "parameters", 'precision="bfloat16"'),
    "a weight that is no number": ("mt5", lambda s: weight(s, torch.nan), "parameters", "damaged"),
    "a weight that overflows": ("mt5", lambda s: weight(s, torch.inf), "parameters", "float16"),
    "layers": ("bert", lambda s: changed(s, layers=3), "sizes", "layers=2"),
    "hidden size": ("mt5", lambda s: changed(s, hidden_size=64), "sizes", "hidden_size=32"),
    "retrieval layer": ("bloom", lambda s: changed(s, retrieval_layer=3), "sizes", "retrieval_layer=1"),
    "length of XLM-R, whose positions begin at 2": ("xlm-roberta", lambda s: changed(s, max_length=130), "max_length", "max_length=128"),
    "length of a text tower": ("siglip2", lambda s: changed(s, max_length=65), "max_length", "max_length=64"),
    "a decoder declared to look both ways": ("qwen3", lambda s: family(s, causal=False), "direction", "causal=True"),
    "BLOOM declared to look both ways": ("bloom", lambda s: family(s, causal=False), "direction", "causal=True"),
    "an encoder declared to look backwards": ("bert", lambda s: family(s, causal=True, pooling="last"), "direction", "causal=False"),
    "positions of XLM-R from 0": ("xlm-roberta", lambda s: family(s, positions="from_zero"), "positions", 'positions="after_padding"'),
    "positions of RoBERTa from 0": ("roberta", lambda s: family(s, positions="from_zero"), "positions", 'positions="after_padding"'),
    "positions of BERT after padding": ("bert", lambda s: changed(family(s, positions="after_padding"), max_length=100), "positions", 'positions="from_zero"'),
    "a flat row for BLOOM": ("bloom", lambda s: family(s, attention="flat"), "padding", 'attention="padded"'),
    "padding that is seen": ("deberta-v2", deaf_to_padding, "padding", "mask"),
    "a frozen layer": ("xlm-roberta", frozen, "gradients", "requires_grad_"),
    "a frozen layer of BLOOM": ("bloom", frozen, "gradients", "requires_grad_"),
    "a disconnected layer": ("mt5", disconnected, "gradients", "connected"),
    "a disconnected layer of Qwen": ("qwen2", disconnected, "gradients", "connected"),
    "a decoder that does not begin": ("t5", endless, "loss on text", "other checks"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_its_check(fault, declared, families):
    name, spoil, check, advice = FAULTS[fault]
    found = failing(spoil(subject(declared(name))))
    assert check in found, f"found are {found}"
    assert advice in found[check].advice + found[check].found, found[check]


@pytest.mark.parametrize("name", EVERY)
def test_padding_and_templates_in_every_family(name, declared):
    """The two faults that need no weights, for each kind of tokenizer."""
    for spoil, check in ((lambda s: told(s, padding_side="left"), "padding side"), (lambda s: told(s, pad_token=None), "padding token"), (plain, "pairs"), (plain, "special tokens")):
        s = subject(declared(name))
        assert isinstance(TOKENIZER_CHECKS[check](s), str)
        with pytest.raises(Fault):
            TOKENIZER_CHECKS[check](spoil(s))


COUNTED = [name for name in copies.COPIES if name.startswith(("xlm", "roberta", "bert", "distil", "clip", "metaclip", "siglip"))]  # they have a table of positions; rotary ones count distances alone


@pytest.mark.parametrize("name", COUNTED)
def test_shifted_positions_in_every_family_that_has_a_table(name, declared, families):
    s = subject(changed(subject(declared(name)), max_length=60).backbone)
    right = s.family.positions
    assert isinstance(MODEL_CHECKS["positions"](s), str)
    s.model.position_offset += 1 if right == "from_zero" else -1
    with pytest.raises(Fault) as fault:
        MODEL_CHECKS["positions"](s)
    assert f'positions="{right}"' in fault.value.advice and s.model.position_offset > 0


@pytest.mark.parametrize("name", ["roberta", "eurobert", "bloom", "llama", "qwen2"])
def test_words_without_the_space_that_byte_level_tokenizers_want(name, declared, monkeypatch):
    s = subject(declared(name))
    assert "' '" in TOKENIZER_CHECKS["words alone"](s)
    monkeypatch.setattr(xtransfer.tokenizer_checks, "word_prefix", lambda tokenizer: "")
    assert set(failing(s)) == {"words alone"}


@pytest.mark.parametrize("name", ["xlm-roberta", "bert", "modernbert", "qwen3"])
def test_attention_that_does_not_keep_sequences_apart(name, declared, monkeypatch):
    def everything(module, query, key, value, attention_mask, scaling=None, dropout=0.0, *, groups, **others):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=groups.causal).transpose(1, 2), None
    monkeypatch.setitem(AttentionInterface._global_mapping, GROUPED, everything)
    found = failing(subject(declared(name)))
    assert "padding" in found and 'attention="padded"' in found["padding"].advice


@pytest.mark.parametrize("name", ["modernbert", "gemma3_text"])
def test_a_window_that_is_not_respected(name, declared, monkeypatch):
    monkeypatch.setattr(xtransfer.attention, "_window", lambda length, window, causal, device: torch.ones(1, 1, length, length, dtype=torch.bool).tril(0 if causal else length))
    assert "longest" in failing(subject(declared(name)))


def losing(what):
    """A `save_checkpoint` that does not write everything."""
    kept = xtransfer.checks.save_checkpoint
    def save(model, tokenizer, folder):
        if what == "a token":
            tokenizer = tokenizer.__class__.from_pretrained(tokenizer.name_or_path) if tokenizer.name_or_path else tokenizer
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        kept(model, tokenizer, folder)
        path = Path(folder) / ("heads.safetensors" if what == "a head" else "model.safetensors")
        tensors = load_file(path)
        matrices = [name for name, value in tensors.items() if value.ndim > 1]
        if what == "a layer's tensor":
            del tensors[next(name for name in matrices if "1" in name)]
        elif what == "a bit":
            tensors[matrices[0]][-1, -1] += 1e-3
        elif what == "half of the bits":
            tensors = {name: value.half().float() for name, value in tensors.items()}
        elif what == "a head":
            tensors = {name: value for name, value in tensors.items() if not name.startswith("check_labels")}
        save_file(tensors, path, metadata={"format": "pt"})
    return save


LOST = [(name, what) for name in ("xlm-roberta", "mt5", "bloom", "qwen2_5_vl") for what in ("a layer's tensor", "a bit", "half of the bits", "a head")]


@pytest.mark.parametrize(("name", "what"), [*LOST, ("xlm-roberta", "a token"), ("mt5", "a token")])  # where we close texts ourselves, nothing is lost
def test_a_checkpoint_that_loses_something(name, what, declared, monkeypatch):
    monkeypatch.setattr(xtransfer.checks, "save_checkpoint", losing(what))
    found = failing(subject(declared(name)))
    assert set(found) == {"round trip"} and {"a layer's tensor": "lack", "a token": "tokenizer"}.get(what, "tensors") in found["round trip"].found


def test_half_precision_that_the_environment_asks_for(declared, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    found = failing(subject(declared("mt5")))
    assert set(found) == {"arithmetic"} and "ACCELERATE_MIXED_PRECISION" in found["arithmetic"].found


def test_what_the_checkpoint_was_stored_in_is_said(declared, tmp_path):
    backbone = read_backbone(str(copies.build("bloom", tmp_path / "half")))
    encoder = load_encoder(backbone, load_tokenizer(backbone), 0)
    encoder.half().save_pretrained(tmp_path / "half")
    s = subject(replace(read_backbone(str(tmp_path / "half")), revision="new"))
    assert failing(s) == {} and "float16" in MODEL_CHECKS["parameters"](s) and {p.dtype for p in s.encoder.parameters()} == {torch.float32}


# ---- nothing is left behind

@pytest.mark.parametrize("name", ["xlm-roberta", "mt5", "bloom", "gemma3", "deberta-v2"])
def test_nothing_is_left_behind(name, declared):
    s = subject(declared(name))
    s.encoder.train()
    frozen_one = next(iter(s.encoder.parameters())).requires_grad_(False)
    before, way = {k: v.clone() for k, v in s.encoder.state_dict().items()}, s.encoder.config._attn_implementation
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    files = sorted(Path(s.backbone.folder).iterdir())
    self_check(s.backbone, s.tokenizer, s.encoder, s.recipe)
    assert torch.equal(torch.get_rng_state(), generators[0]) and np.random.get_state()[1].tolist() == generators[1] and random.getstate() == generators[2]
    assert all(torch.equal(v, before[k]) for k, v in s.encoder.state_dict().items()) and s.encoder.state_dict().keys() == before.keys()
    assert s.encoder.config._attn_implementation == way and all(part.training for part in s.encoder.modules())
    assert not frozen_one.requires_grad and all(p.grad is None and not p._post_accumulate_grad_hooks for p in s.encoder.parameters())
    assert sum(p.requires_grad for p in s.encoder.parameters()) == len(list(s.encoder.parameters())) - 1 and sorted(Path(s.backbone.folder).iterdir()) == files


@pytest.mark.parametrize("name", ["xlm-roberta", "mt5", "bloom", "deberta-v2"])
def test_training_after_a_check_is_training_without_one(name, declared, toys, tmp_path):
    from xtransfer.encoding import encode
    from xtransfer.objectives import make_corruption
    from xtransfer.tasks import load_examples
    from xtransfer.training import fit

    tasks, ends = [TASKS["toy_pair"], TASKS["toy_text"]], []
    for checked in (False, True):
        s = subject(declared(name))
        if checked:
            assert all(check.passed for check in self_check(s.backbone, s.tokenizer, s.encoder, RECIPE))
        data = {task.name: encode(s.tokenizer, task, load_examples(task, "en", "train", 12).rows, RECIPE) for task in tasks}
        model = StageModel(s.encoder, tasks, 0, s.backbone)
        corrupt = make_corruption(s.tokenizer, s.family.objective, RECIPE, s.encoder.get_input_embeddings().num_embeddings)
        fit(model, data, lambda: {task.name: 1.0 for task in tasks}, replace(RECIPE, max_steps=6), Mixing(kind="uniform"), 0, tmp_path / str(checked), corrupt)
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


# ---- once per backbone

def required(s, notes, **others):
    return require_checks(s.backbone, s.tokenizer, s.encoder, others.pop("recipe", s.recipe), notes=notes, **others)


def test_what_passed_is_noted_once(declared, tmp_path, monkeypatch):
    s, notes = subject(declared("xlm-roberta")), tmp_path / ".checks"
    first, (note,) = required(s, notes), notes.iterdir()
    assert all(check.passed for check in first) and tuple(check.name for check in first) == ALL
    fresh = subject(declared("xlm-roberta"))
    def never(*arguments, **named):
        raise AssertionError("it was checked again")
    with monkeypatch.context() as patch:
        patch.setattr(xtransfer.checks, "self_check", never)
        assert required(fresh, notes) == first
        fresh.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=3)  # leaves settings behind in the tokenizer
        assert required(fresh, notes) == first
        for other in (changed(fresh, note="x", languages=("en",)), replace(fresh, recipe=replace(RECIPE, learning_rate=1.0))):  # what no answer depends on
            assert required(other, notes) == first
        for other in (changed(fresh, retrieval_layer=2), told(subject(declared("xlm-roberta")), padding_side="left"), replace(fresh, recipe=replace(RECIPE, precision="bfloat16"))):
            with pytest.raises(AssertionError):
                required(other, notes)
    for damage in ("{", "[1]", '[{"name": "x"}]'):
        note.write_text(damage)
        assert required(fresh, notes) == first and json.loads(note.read_text())


def test_what_fails_is_one_sentence_and_not_noted(declared, families, tmp_path):
    s, notes = family(subject(declared("xlm-roberta")), positions="from_zero"), tmp_path / ".checks"
    for _ in range(2):
        with pytest.raises(XtransferError) as error:
            required(s, notes)
        said = str(error.value)
        assert "\n" not in said and s.backbone.name in said and "'positions'" in said and 'positions="after_padding"' in said and said.endswith(".")
        assert not notes.exists()


@pytest.mark.parametrize("where", ["a file", "nowhere"])
def test_notes_that_cannot_be_written_cost_another_check(where, declared, tmp_path):
    (tmp_path / "file").write_text("mine")
    s = subject(declared("bert"))
    assert len(required(s, {"a file": tmp_path / "file" / ".checks", "nowhere": None}[where])) == len(ALL) and (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_that_cannot_be_written_is_said_before_training(declared, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(XtransferError, match="round trip"):
        required(subject(declared("bert")), None, folder=tmp_path / "file" / "training")


TWO = """
import sys, torch
from xtransfer.backbones import read_backbone
from xtransfer.checks import require_checks
from xtransfer.modeling import load_encoder, load_tokenizer
from xtransfer.studies import Recipe
torch.set_num_threads(1)
b = read_backbone(sys.argv[1]); t = load_tokenizer(b)
print(len(require_checks(b, t, load_encoder(b, t, 0), Recipe(name="r", learning_rate=1.0, batch_size=1), sys.argv[2], sys.argv[3])))
"""


def test_two_processes_at_once(declared, tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", TWO, declared("distilbert").folder, str(tmp_path / "run" / "training"), str(tmp_path / ".checks")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == str(len(ALL)), err
    (note,) = (tmp_path / ".checks").iterdir()
    assert len(json.loads(note.read_text())) == len(ALL) and not list(tmp_path.glob("run/training/*"))


# ---- where it is used

def step_parameters(**changes):
    from xtransfer.runs import run_parameters
    from xtransfer.studies import STUDIES

    run = next(run for run in STUDIES["toys"].build("smoke").plan() if run.parent is None)
    return run_parameters(run, declarations=[str(TOYS)]) | changes


def test_a_stage_begins_with_a_check(toys, tmp_path):
    from xtransfer.steps import CHECKPOINT_NAME, RESULTS_NAME, Step, close

    (tmp_path / ".locks").mkdir()
    folder = tmp_path / "toy-encoder" / ".work-run"
    folder.mkdir(parents=True)
    step = Step(folder, **step_parameters())
    assert [check.name for check in step.checks] == list(ALL) and len(list((tmp_path / ".checks").iterdir())) == 1
    assert step.describe().loc["self-check", ""] == f"{len(ALL)} checks passed"
    close(step, True)
    assert json.loads((folder / RESULTS_NAME).read_text())["training"]["self_check"] == list(ALL)
    child = tmp_path / "toy-encoder" / ".work-child"
    child.mkdir()
    assert Step(child, **step_parameters(parent=f"../.work-run/{CHECKPOINT_NAME}")).checks == []  # its weights come from a stage
    alone = tmp_path / "elsewhere" / "deeper" / "run"
    alone.mkdir(parents=True)
    assert len(Step(alone, **step_parameters()).checks) == len(ALL) and not (tmp_path / "elsewhere" / ".checks").exists()


def test_a_backbone_that_fails_is_not_trained(toys, tmp_path):
    from xtransfer.steps import Step

    def without_padding():
        tokenizer = BACKBONES["toy-encoder"].build_tokenizer()
        tokenizer.pad_token = None
        return tokenizer

    mine = tmp_path / "mine.py"
    mine.write_text("")
    BACKBONES.register(replace(BACKBONES["toy-encoder"], name="toy-unpadded", build_tokenizer=without_padding))
    with pytest.raises(XtransferError, match=r"toy-unpadded fails the self-check 'padding token': .*Backbone\(pad_token"):
        Step(tmp_path, **step_parameters(backbone="toy-unpadded", declarations=[str(mine)]))


def test_records_say_that_it_passed(toy_outputs):
    records = [json.loads(path.read_text()) for path in toy_outputs.glob("*/*/record.json")]
    for record in records:
        assert record["training"].get("self_check") == (list(ALL) if record["parent"] is None else None)
    assert sum(record["parent"] is None for record in records) == 1 and len(list((toy_outputs / ".checks").iterdir())) == 1


def test_the_command_prints_what_was_found(declared, capsys, tmp_path):
    from xtransfer.cli import main

    assert main(["check", "world-xlmr"]) == 0
    table = capsys.readouterr().out
    assert f"{len(ALL)} of {len(ALL)} checks passed" in table and "FAILED" not in table and all(name in table for name in ALL)
    llama = copies.build("llama", tmp_path)  # as published: no token for padding
    assert main(["check", str(llama)]) == 1
    table = capsys.readouterr().out
    assert "FAILED  padding token" in table and 'Backbone(pad_token="...")' in table and f"{len(ALL) - 1} of {len(ALL)} checks passed" in table
    assert main(["check", "world-xlmrr"]) == 1 and "world-xlmr" in capsys.readouterr().err
