"""The memory estimate against what small models of many families really hold."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig

import xtransfer.catalogue  # noqa: F401  fills the registries
from conftest import xtransfer as command_line
from xtransfer.backbones import BACKBONES, FAMILIES, Backbone
from xtransfer.core import XtransferError
from xtransfer.encoding import Batch
from xtransfer.memory import HALF, KEPT, Memory, memory_estimate, memory_table, parameter_counts, ways_to_train
from xtransfer.modeling import StageModel
from xtransfer.studies import Recipe
from xtransfer.training import make_optimizer, set_up

WIDTH, LAYERS = 128, 4
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH, "vocab_size": 300, "max_position_embeddings": 600}
T5 = {"d_model": WIDTH, "d_kv": 64, "d_ff": 320, "num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": 2, "vocab_size": 300, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
      "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODELS = {  # family -> configuration in the proportions of its published models; without dropout of attention, which no GPU keeps; bounds of measured / estimated activations
    "xlm-roberta": (SIZES | {"attention_probs_dropout_prob": 0.0}, (0.75, 0.85)),
    "xlm-roberta-xl": (SIZES | {"attention_probs_dropout_prob": 0.0}, (0.7, 0.8)),
    "modernbert": (SIZES | {"intermediate_size": 192, "pad_token_id": 0}, (0.9, 1.1)),
    "eurobert": (SIZES | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, (0.8, 0.95)),
    "qwen3": (SIZES | {"num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 384, "tie_word_embeddings": True}, (1.05, 1.15)),
    "llama": (SIZES | {"num_key_value_heads": 1, "intermediate_size": 345, "tie_word_embeddings": True}, (0.95, 1.1)),
    "gemma3_text": (SIZES | {"num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 768}, (0.95, 1.1)),
    "deberta-v2": (SIZES | {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0},
                   (1.15, 1.25)),
    "mt5-encoder": (T5, (0.75, 1.0)),
    "mt5": (T5, (0.75, 1.0)),
    "bloom": ({"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 2, "vocab_size": 300, "pad_token_id": 3, "hidden_dropout": 0.0, "attention_dropout": 0.0}, (0.3, 0.45)),
    "siglip2_text_model": (SIZES, (0.3, 0.4)),
}
PLAIN = Recipe(name="plain", learning_rate=1e-4, batch_size=8, max_length=64)


def made(family):
    """A small model and the backbone that declares its sizes."""
    kind = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.model_type, **MODELS[family][0])
    loader = getattr(transformers, kind.loader)
    encoder = loader.from_config(config) if kind.loader == "AutoModel" else loader(config)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    count = sum(p.numel() for p in encoder.parameters())
    tables = {id(p): p.numel() for part in encoder.modules() if isinstance(part, torch.nn.Embedding) for p in part.parameters()}
    if (output := encoder.get_output_embeddings()) is not None:
        tables[id(output.weight)] = output.weight.numel()
    backbone = Backbone(name="small", family=family, architecture="encoder_decoder" if kind.objective == "spans" else "decoder" if kind.objective == "causal" else "encoder", layers=LAYERS, hidden_size=WIDTH, retrieval_layer=1,
                        max_length=512, parameters=count / 1e6, embedding_parameters=sum(tables.values()) / 1e6)
    return StageModel(encoder, (), 0, backbone), backbone


def flat(count, length):
    return Batch(input_ids=torch.randint(5, 290, (count * length,)), lengths=(length,) * count, example=torch.arange(count), within=torch.zeros(count, dtype=torch.long), sequence=np.arange(count), examples=count, targets={})


def kept(model, batch, half=False):
    """Bytes that a forward pass keeps for the backward pass, weights excepted, and the states."""
    weights, found, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False) if half else nullcontext():
        states = model.train().states(batch)
    return sum(found.values()), states


@pytest.mark.parametrize(("family", "changed", "tolerance"), [
    *((family, changed, 0.03 if family in ("mt5", "siglip2_text_model") else 0.001 if changed else 0.0) for family in MODELS for changed in ({}, {"freeze_embeddings": True})),
    *((family, {"lora_rank": 4}, 0.21) for family in MODELS), ("xlm-roberta", {"lora_rank": 4, "lora_layers": (0,)}, 0.1), ("xlm-roberta", {"lora_rank": 4}, 0.05)], ids=str)
def test_weights_gradients_and_moments_are_what_training_holds(family, changed, tolerance):
    """Exact, but for what no declaration says: an encoder's share of an encoder-decoder, a projection of SigLIP that nothing reads, the shapes of a layer's matrices for adapters."""
    model, backbone = made(family)
    read = sum(p.numel() for p in model.encoder.parameters())
    recipe = replace(PLAIN, **changed)
    set_up(model, recipe, 0)
    optimizer = make_optimizer(model, recipe)
    model.states(flat(2, 9)).square().sum().backward()
    optimizer.step()
    trained = [p for p in model.parameters() if p.grad is not None]
    gradients = sum(4 * p.grad.numel() for p in trained)
    moments = sum(4 * v.numel() for state in optimizer.state.values() for k, v in state.items() if k != "step")
    found = memory_estimate(backbone, recipe)
    assert found.weights == pytest.approx(4 * read, rel=1e-9) and moments == 2 * gradients
    assert found.gradients == pytest.approx(gradients, rel=max(tolerance, 1e-9)) and found.moments == pytest.approx(moments, rel=max(tolerance, 1e-9))


@pytest.mark.parametrize("family", MODELS)
def test_activations_are_within_the_stated_factor(family):
    model, backbone = made(family)
    low, high = MODELS[family][1]
    for count, length in ((8, 64), (2, 256)):
        recipe = replace(PLAIN, batch_size=count, max_length=length)
        found, counts = memory_estimate(backbone, recipe).activations, parameter_counts(backbone, recipe)
        measured, _ = kept(model, flat(count, length))
        assert low < measured / found < high, measured / found
        half, _ = kept(model, flat(count, length), half=True)
        estimated = memory_estimate(backbone, replace(recipe, precision="bfloat16")).activations
        assert estimated == pytest.approx(HALF * found + 2 * counts.layer * counts.layers) and 0.6 * HALF < (half - 2 * counts.layer * counts.layers) / measured < 1.25 * HALF


@pytest.mark.parametrize("family", MODELS)
def test_what_gradient_checkpointing_keeps(family):
    """Between the passes the inputs of layers, and at its peak one layer in full."""
    model, backbone = made(family)
    recipe = replace(PLAIN, gradient_checkpointing=True)
    set_up(model, recipe, 0)
    measured, _ = kept(model, flat(8, 64))
    inputs = (LAYERS + 2) * WIDTH * 8 * 64 * 4
    plain = memory_estimate(backbone, PLAIN).activations
    assert 0.85 < measured / inputs < 1.45 and memory_estimate(backbone, recipe).activations == pytest.approx(inputs + plain / LAYERS)


def test_an_encoder_decoders_parts():
    for size in ("small", "base", "large", "xl", "xxl"):
        alone, both = BACKBONES[f"mt5-{size}-encoder"], BACKBONES[f"mt5-{size}"]
        assert parameter_counts(both, PLAIN).trained == pytest.approx(parameter_counts(alone, PLAIN).trained, rel=0.01)
        assert parameter_counts(both, PLAIN, writes=True).trained == 1e6 * both.parameters
        assert parameter_counts(both, replace(PLAIN, lora_rank=8)).trained == pytest.approx(parameter_counts(alone, replace(PLAIN, lora_rank=8)).trained, rel=0.02)


def test_predicted_text_needs_logits():
    plain, text = (memory_estimate(BACKBONES["bloom-560m"], PLAIN, writes=writes) for writes in (False, True))
    assert plain.vocabulary == 0 and text.vocabulary == pytest.approx(3 * 4 * 8 * 64 * 250_880, rel=0.01)
    assert memory_estimate(BACKBONES["xlm-r-base"], PLAIN, writes=True).vocabulary == pytest.approx(0.15 * 3 * 4 * 8 * 64 * 250_002, rel=0.01)


def test_processes_share_the_batch_and_sharding_the_weights():
    backbone = BACKBONES["mt5-xl"]
    one, two, divided = memory_estimate(backbone, PLAIN), memory_estimate(backbone, PLAIN, processes=2), memory_estimate(backbone, PLAIN, processes=2, sharded=True)
    assert (two.weights, two.moments, two.activations, two.gradients) == (one.weights, one.moments, one.activations / 2, 2 * one.gradients)
    assert divided.moments == one.moments / 2 and one.weights / 2 < divided.weights < one.weights and divided.total < two.total


def test_every_declared_backbone_has_its_table():
    for name, backbone in BACKBONES.items():
        if backbone.parameters is None:
            with pytest.raises(XtransferError, match=f"{name} does not declare"):
                memory_table(backbone)
            continue
        ways = ways_to_train(backbone, PLAIN)
        assert len(ways) == 5 and all(isinstance(m, Memory) and m.total > 0 for m in ways.values()) and list(ways.values())[-1].total < 72e9, "some number of GPUs is enough"
        assert ways["adapters, frugal"].total < ways["all weights, frugal"].total < ways["all weights"].total
        assert len(memory_table(backbone).splitlines()) == 9 and set(KEPT) == {"flat", "padded"}


def test_the_plan_of_the_readme(tmp_path):
    """The file that the README shows makes a study with adapters in every stage, and its table is the one that is computed."""
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    (example,) = re.findall(r"<!-- example: xxl.py -->\n```python\n(.*?)```", text, re.S)
    (tmp_path / "xxl.py").write_text(example)
    code, out, err = command_line("plan", "stilts-xxl", "--profile", "paper", "--declare", tmp_path / "xxl.py", "--outputs", tmp_path)
    assert code == 0 and "423 runs, 423 to execute" in out and "mt5-xxl-encoder/" in out, err
    for line in memory_table(BACKBONES["mt5-xxl-encoder"]).splitlines()[:7]:
        assert line in text
