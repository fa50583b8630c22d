"""Published backbones: facts against models built from published shapes, and every family by folder, from the hub's layout to a stage's checkpoint."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import xtransfer.catalogue  # noqa: F401  fills the registries
from xtransfer.backbones import BACKBONES, FAMILIES, layer_at_fraction, retrieval_layer, unsuitable
from xtransfer.core import XtransferError
from xtransfer.encoding import encode_sentences, make_batch
from xtransfer.languages import LANGUAGE_SETS
from xtransfer.modeling import StageModel, load_encoder, load_tokenizer, save_checkpoint
from xtransfer.tasks import TASKS
from xtransfer.world import world_tokenizer

PUBLISHED = {name: backbone for name, backbone in BACKBONES.items() if backbone.checkpoint}


# ---- facts

def test_every_model_of_the_request_is_declared():
    sizes = {"xlm-r": "base large xl xxl", "mmbert": "small base", "eurobert": "210m 610m 2.1b", "mt5": "small base large xl xxl small-encoder base-encoder large-encoder xl-encoder xxl-encoder",
             "mt0": "small base large xl xxl", "bloom": "560m 1b1 1b7 3b 7b1", "bloomz": "560m 1b1 1b7 3b 7b1", "qwen3": "0.6b 1.7b", "gemma3": "270m 1b 4b", "siglip2": "base large", "metaclip2": "b32 huge"}
    wanted = {f"{family}-{size}" for family, names in sizes.items() for size in names.split()}
    wanted |= {"mbert", "distil-mbert", "mdeberta-v3-base", "mclip-xlm-r-large", "altclip", "altclip-m9", "qwen2.5-vl-3b", "qwen2.5-3b"}
    assert wanted <= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_declaration_is_whole(name):
    b = PUBLISHED[name]
    assert b.license != "unknown" and b.source and b.kind.name in FAMILIES and b.revision and b.checkpoint.count("/") == 1
    assert b.languages or "not listed" in b.note or "not published" in b.note, "no languages, and no word about it"
    assert set(b.languages) <= set(LANGUAGE_SETS["xtreme_r"])
    assert b.retrieval_layer == retrieval_layer(b.layers) and 1 <= b.retrieval_layer < b.layers
    assert b.retrieval_layer == (8 if b.layers == 12 else layer_at_fraction(b.layers))
    assert 0 < b.embedding_parameters < b.parameters
    assert not b.parent or (b.architecture == "vision_text" and BACKBONES[b.parent].architecture in ("encoder", "decoder"))
    assert b.architecture == "vision_text" or not b.parent
    assert json.loads(json.dumps(dict(b.identity))) and "languages" not in b.identity


def test_languages_and_contamination():
    unseen = {name: set(LANGUAGE_SETS["xtreme_r"]) - set(b.languages) for name, b in PUBLISHED.items() if b.languages}
    assert unseen["xlm-r-large"] == unseen["mdeberta-v3-base"] == {"ht", "qu", "wo", "yo"} and unseen["mt5-xl"] == unseen["mt0-xl"] == {"qu", "wo"}
    assert len(unseen["bloom-560m"]) == len(unseen["bloomz-7b1"]) == 29 and len(unseen["eurobert-610m"]) == 35 and unseen["qwen3-0.6b"] == {"qu", "wo", "yo"}
    assert {name for name, b in PUBLISHED.items() if "xP3" in b.contamination} == {name for name in PUBLISHED if name.startswith(("mt0", "bloomz"))}
    assert not PUBLISHED["mt5-base"].contamination and not PUBLISHED["bloom-560m"].contamination


def test_short_towers_refuse_questions_and_take_sentences():
    for name in ("siglip2-base", "metaclip2-huge"):
        assert f"{BACKBONES[name].max_length} positions" in unsuitable(BACKBONES[name], TASKS["xquad"], 384)
        assert unsuitable(BACKBONES[name], TASKS["xnli"], 128) is None and unsuitable(BACKBONES[name], TASKS["tatoeba"], 128) is None
    assert unsuitable(BACKBONES["mclip-xlm-r-large"], TASKS["xquad"], 384) is None


# ---- numbers of parameters, counted on models without memory

def _roberta(width, layers, heads, vocabulary=250002):
    return {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width, "max_position_embeddings": 514, "type_vocab_size": 1}


def _llama(width, inner, layers, heads, groups, vocabulary, **others):
    return {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups, **others}


def _clip(width, layers, heads, vocabulary):
    return {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width}


MT5 = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16), "xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}
MT5 = {size: {"vocab_size": 250112, "d_model": width, "d_ff": inner, "num_layers": layers, "num_decoder_layers": layers, "num_heads": heads} for size, (width, inner, layers, heads) in MT5.items()}
BLOOM = {size: {"vocab_size": 250880, "hidden_size": width, "n_layer": layers, "n_head": heads} for size, width, layers, heads in
         (("560m", 1024, 24, 16), ("1b1", 1536, 24, 16), ("1b7", 2048, 24, 16), ("3b", 2560, 30, 32), ("7b1", 4096, 30, 32))}
XLMR_LARGE = ("XLMRobertaModel", _roberta(1024, 24, 16))
SHAPES = {  # class of transformers and published values of config.json; sources stand with the declarations
    "xlm-r-base": ("XLMRobertaModel", _roberta(768, 12, 12)), "xlm-r-large": XLMR_LARGE, "mclip-xlm-r-large": XLMR_LARGE, "altclip": XLMR_LARGE, "altclip-m9": XLMR_LARGE,
    "xlm-r-xl": ("XLMRobertaXLModel", _roberta(2560, 36, 32, 250880)), "xlm-r-xxl": ("XLMRobertaXLModel", _roberta(4096, 48, 32, 250880)),
    "mbert": ("BertModel", {"vocab_size": 119547}), "distil-mbert": ("DistilBertModel", {"vocab_size": 119547}),
    "mdeberta-v3-base": ("DebertaV2Model", {"vocab_size": 251000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "type_vocab_size": 0, "relative_attention": True,
                                            "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}),
    "mmbert-small": ("ModernBertModel", _llama(384, 1152, 22, 6, 6, 256000, pad_token_id=0)), "mmbert-base": ("ModernBertModel", _llama(768, 1152, 22, 12, 12, 256000, pad_token_id=0)),
    "eurobert-210m": ("EuroBertModel", _llama(768, 3072, 12, 12, 12, 128256)), "eurobert-610m": ("EuroBertModel", _llama(1152, 4096, 26, 18, 6, 128256)), "eurobert-2.1b": ("EuroBertModel", _llama(2304, 6144, 32, 18, 6, 128256)),
    **{f"{name}-{size}": ("MT5ForConditionalGeneration", values) for name in ("mt5", "mt0") for size, values in MT5.items()}, **{f"mt5-{size}-encoder": ("MT5EncoderModel", values) for size, values in MT5.items()},
    **{f"{name}-{size}": ("BloomForCausalLM", values) for name in ("bloom", "bloomz") for size, values in BLOOM.items()},
    **{f"qwen3-{size}": ("Qwen3ForCausalLM", _llama(width, inner, layers, heads, 8, 151936, head_dim=128, tie_word_embeddings=True)) for size, width, inner, layers, heads in
       (("0.6b", 1024, 3072, 28, 16), ("1.7b", 2048, 6144, 28, 16), ("4b", 2560, 9728, 36, 32))},
    "qwen2.5-3b": ("Qwen2ForCausalLM", _llama(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True)), "qwen2.5-vl-3b": ("Qwen2_5_VLTextModel", _llama(2048, 11008, 36, 16, 2, 151936)),
    "qwen3-vl-2b": ("Qwen3VLTextModel", _llama(2048, 6144, 28, 16, 8, 151936, head_dim=128)),
    "gemma3-270m": ("Gemma3ForCausalLM", _llama(640, 2048, 18, 4, 1, 262144)), "gemma3-1b": ("Gemma3ForCausalLM", _llama(1152, 6912, 26, 4, 1, 262144)), "gemma3-4b": ("Gemma3TextModel", _llama(2560, 10240, 34, 8, 4, 262208)),
    "siglip2-base": ("SiglipTextModel", _clip(768, 12, 12, 256000)), "siglip2-large": ("SiglipTextModel", _clip(1024, 24, 16, 256000)), "siglip2-so400m": ("SiglipTextModel", _clip(1152, 27, 16, 256000) | {"intermediate_size": 4304}),
    "metaclip2-b32": ("CLIPTextModel", _clip(512, 12, 8, 901629)), "metaclip2-l14": ("CLIPTextModel", _clip(768, 12, 12, 901629)), "metaclip2-huge": ("CLIPTextModel", _clip(1024, 24, 16, 901629)),
    "metaclip2-mt5-b32": ("CLIPTextModel", _clip(512, 12, 8, 250000)),
}


def test_every_published_backbone_has_a_shape():
    assert set(SHAPES) == set(PUBLISHED)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_published_shape(name):
    kind, values = SHAPES[name]
    loader = getattr(transformers, kind)
    with torch.device("meta"):
        model = loader(loader.config_class(**values))
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    every = sum(p.numel() for p in model.parameters())  # tied tables count once
    tables = sum({id(part.weight): part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Embedding)}.values())
    output = values["vocab_size"] * values["d_model"] if kind == "MT5ForConditionalGeneration" else 0  # its checkpoints hold another table for the output
    b = BACKBONES[name]
    assert (round((every + output) / 1e6, 1), round((tables + output) / 1e6, 1)) == (b.parameters, b.embedding_parameters)
    config = model.config.get_text_config()
    assert (config.hidden_size, config.num_hidden_layers) == (b.hidden_size, b.layers)
    assert not b.config or all(b.config[key] == values[key] for key in values if key in b.config)


def test_counts_agree_with_published_ones():
    """To the digits that the papers and cards give, where embeddings are counted as they are there."""
    published = {"bloom-560m": 559.214592, "bloom-7b1": 7069.016064, "mt5-small": 300, "mt5-base": 580, "mt5-large": 1200, "mt5-xl": 3700, "mt5-xxl": 13000, "mmbert-base": 307, "mmbert-small": 140, "eurobert-610m": 610,
                 "eurobert-2.1b": 2100, "xlm-r-xl": 3500, "xlm-r-xxl": 10700, "mdeberta-v3-base": 276}
    assert all(abs(BACKBONES[name].parameters / count - 1) < 0.03 for name, count in published.items())


# ---- every family: the hub's layout, a folder, our states, our checkpoint

VOCABULARY = len(world_tokenizer())
_IDS = {"pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 2}
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64, **_IDS}
_ROBERTA_SMALL = _SMALL | {"max_position_embeddings": 68, "type_vocab_size": 1}
_GROUPED_SMALL = _SMALL | {"num_key_value_heads": 2, "head_dim": 8}
_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 28, "patch_size": 14}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 3, "eos_token_id": 2, "decoder_start_token_id": 3}
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32}


def _rope(*section):
    return {"rope_parameters": {"rope_type": "default", "mrope_section": list(section), "rope_theta": 1e6}}


TINY = {  # family -> class whose checkpoint the hub holds, its configuration
    "xlm-roberta": ("XLMRobertaForMaskedLM", _ROBERTA_SMALL), "roberta": ("RobertaForMaskedLM", _ROBERTA_SMALL), "xlm-roberta-xl": ("XLMRobertaXLForMaskedLM", _ROBERTA_SMALL),
    "bert": ("BertForMaskedLM", _SMALL), "distilbert": ("DistilBertForMaskedLM", {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64, "pad_token_id": 3}),
    "deberta-v2": ("DebertaV2ForMaskedLM", _SMALL | {"type_vocab_size": 0, "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}),
    "modernbert": ("ModernBertForMaskedLM", _SMALL | {"local_attention": 8, "cls_token_id": 0, "sep_token_id": 2}), "eurobert": ("EuroBertForMaskedLM", _GROUPED_SMALL | {"mask_token_id": 4}),
    "mt5": ("MT5ForConditionalGeneration", _T5), "mt5-encoder": ("MT5EncoderModel", _T5), "t5": ("T5ForConditionalGeneration", _T5), "umt5": ("UMT5ForConditionalGeneration", _T5),
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_IDS}),
    "llama": ("LlamaForCausalLM", _GROUPED_SMALL), "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in _GROUPED_SMALL.items() if k != "head_dim"}), "qwen3": ("Qwen3ForCausalLM", _GROUPED_SMALL),
    "gemma3_text": ("Gemma3ForCausalLM", _GROUPED_SMALL | {"query_pre_attn_scalar": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3ForConditionalGeneration", {"text_config": _GROUPED_SMALL | {"query_pre_attn_scalar": 8, "sliding_window": 4}, "vision_config": _VISION | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4, "image_token_index": 9}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {"text_config": {k: v for k, v in _GROUPED_SMALL.items() if k != "head_dim"} | _rope(1, 1, 2), "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [0]}}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {"text_config": _GROUPED_SMALL | _rope(2, 1, 1), "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}}),
    "clip": ("CLIPModel", {"text_config": _SMALL, "vision_config": _VISION, "projection_dim": 32}), "metaclip_2": ("MetaClip2Model", {"text_config": _SMALL, "vision_config": _VISION, "projection_dim": 32}),
    "siglip": ("SiglipModel", {"text_config": _SMALL, "vision_config": _VISION}), "siglip2": ("Siglip2Model", {"text_config": _SMALL, "vision_config": {k: v for k, v in _VISION.items() if k != "image_size"} | {"num_patches": 4}}),
}
TOWERS = {"gemma3": "gemma3_text", "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text", "clip": "clip_text_model", "metaclip_2": "metaclip_2_text_model", "siglip": "siglip_text_model", "siglip2": "siglip2_text_model"}
SENTENCES = ["7 3", "1 2 3 4 5", "9", "8 8 8", "4 4 4 4 4 4 4 4 4 4 4", "5 6", "6"]


def _published(family, folder):
    """A tiny checkpoint as the hub would hold one of this family, with a tokenizer; the model in memory."""
    kind, values = TINY[family]
    loader = getattr(transformers, kind)
    torch.manual_seed(0)
    model = loader(loader.config_class(**values)).eval()
    for parameter in model.parameters():  # norms and biases must matter as well
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    return model


def _plain_states(model, family, batch):
    """Last states of each sequence alone, by transformers' own class."""
    part = {"mt5": "encoder", "t5": "encoder", "umt5": "encoder", "mt5-encoder": "", "bloom": "transformer", "clip": "text_model", "metaclip_2": "text_model", "siglip": "text_model", "siglip2": "text_model",
            "gemma3": "model.language_model", "qwen2_5_vl": "model.language_model", "qwen3_vl": "model.language_model"}.get(family, getattr(model, "base_model_prefix", ""))
    for name in filter(None, part.split(".")):
        model = getattr(model, name)
    return torch.cat([model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).last_hidden_state[0] for ids in batch.input_ids.split(list(batch.lengths))])


def test_every_family_is_tried():
    assert set(FAMILIES) == set(TINY) | set(TOWERS.values())


@pytest.mark.parametrize("family", TINY)
def test_family_by_folder(family, tmp_path):
    model = _published(family, tmp_path / "hub")
    backbone = BACKBONES[str(tmp_path / "hub")]
    assert backbone.kind.name == family and (backbone.layers, backbone.hidden_size) == (2, 32) and backbone.revision != "main" and str(tmp_path) not in json.dumps(dict(backbone.identity))
    assert (backbone.architecture == "vision_text") == (family in TOWERS) and backbone.max_length in (64, 68 - 4, 2048)
    tokenizer = load_tokenizer(backbone)
    ours = StageModel(load_encoder(backbone, tokenizer, seed=0), (), 0, backbone).eval()
    batch = make_batch(encode_sentences(tokenizer, SENTENCES, 64), np.arange(len(SENTENCES)))
    with torch.no_grad():
        found, alone = ours.states(batch), _plain_states(model, family, batch)
    assert found.shape == (len(batch.input_ids), 32) and torch.allclose(found, alone, atol=2e-5), (found - alone).abs().max()
    save_checkpoint(ours, tokenizer, tmp_path / "stage")  # what a stage writes is a backbone as well
    later = BACKBONES[str(tmp_path / "stage")]
    assert later.kind.name == TOWERS.get(family, family) and later.max_length == backbone.max_length and later.kind.causal == backbone.kind.causal and later.pools == backbone.pools
    again = StageModel(load_encoder(later, load_tokenizer(later), seed=1), (), 0, later).eval()
    with torch.no_grad():
        assert torch.equal(again.states(batch), found)


@pytest.mark.parametrize(("name", "family"), [("metaclip2-b32", "metaclip_2")])
def test_a_clip_tower_is_loaded_as_one_that_automodel_opens(name, family, tmp_path):
    from dataclasses import replace

    model = _published(family, tmp_path / "hub")
    small = replace(BACKBONES[name], folder=str(tmp_path / "hub"), hidden_size=32, layers=2, config=dict(BACKBONES[name].config) | {k: v for k, v in _SMALL.items()} | {"hidden_act": "quick_gelu"})
    tokenizer = load_tokenizer(small)
    ours = StageModel(load_encoder(small, tokenizer, seed=0), (), 0, small).eval()
    batch = make_batch(encode_sentences(tokenizer, SENTENCES, 64), np.arange(len(SENTENCES)))
    with torch.no_grad():
        assert torch.allclose(ours.states(batch), _plain_states(model, family, batch), atol=2e-5)
    save_checkpoint(ours, tokenizer, tmp_path / "stage")
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "stage")).__name__ == "CLIPTextModel"


@pytest.mark.parametrize("name", ["mclip-xlm-r-large", "altclip"])
def test_towers_inside_a_checkpoint_of_another_layout(name, tmp_path):
    """XLM-R's tensors under a prefix, among others, beside a configuration that transformers does not know."""
    from dataclasses import replace

    declared = BACKBONES[name]
    torch.manual_seed(0)
    inner = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**_ROBERTA_SMALL), add_pooling_layer=False).eval()
    tensors = {declared.weights_prefix + key: value.clone() for key, value in inner.state_dict().items()} | {"LinearTransformation.weight": torch.ones(4, 32), f"{declared.weights_prefix}embeddings.position_ids": torch.arange(68)[None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "M-CLIP", "modelBase": "xlm-roberta-large", "numDims": 4, "transformerDimensions": 32}))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    world_tokenizer().save_pretrained(tmp_path / "tokenizer")
    small = replace(declared, folder=str(tmp_path), tokenizer=str(tmp_path / "tokenizer"), hidden_size=32, layers=2, config={"model_type": "xlm-roberta", **_ROBERTA_SMALL})
    tokenizer = load_tokenizer(small)
    ours = StageModel(load_encoder(small, tokenizer, seed=0), (), 0, small).eval()
    batch = make_batch(encode_sentences(tokenizer, SENTENCES, 64), np.arange(len(SENTENCES)))
    with torch.no_grad():
        assert torch.allclose(ours.states(batch), torch.cat([inner(input_ids=ids[None]).last_hidden_state[0] for ids in batch.input_ids.split(list(batch.lengths))]), atol=2e-5)
    save_checkpoint(ours, tokenizer, tmp_path / "stage")
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "stage")).__name__ == "XLMRobertaModel" and set(load_file(tmp_path / "stage" / "model.safetensors")) == set(inner.state_dict())
    del tensors[f"{declared.weights_prefix}encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(XtransferError, match="lack encoder.layer.1.output.dense.weight"):
        load_encoder(small, tokenizer, seed=0)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(XtransferError, match="holds no weights as safetensors"):
        load_encoder(small, tokenizer, seed=0)


# ---- what cannot be resolved says so in one sentence

def _folder(path, config):
    path.mkdir()
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def test_a_name_that_is_nothing():
    with pytest.raises(XtransferError, match=r"unknown backbone 'xlm-r-larg'; did you mean 'xlm-r-large'\?"):
        BACKBONES["xlm-r-larg"]
    with pytest.raises(XtransferError, match="there is no folder './models/mine'"):
        BACKBONES["./models/mine"]


def test_folders_that_are_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(XtransferError, match="holds no checkpoint: it has no config.json"):
        BACKBONES[str(tmp_path / "empty")]
    with pytest.raises(XtransferError, match="config.json is not JSON"):
        BACKBONES[_folder(tmp_path / "broken", "{")]
    with pytest.raises(XtransferError, match="does not say how large"):
        BACKBONES[_folder(tmp_path / "bare", {"model_type": "bert"})]


def test_models_that_are_not_supported(tmp_path):
    with pytest.raises(XtransferError, match=r"model_type 'berts', which is no declared family; did you mean 'bert'\?"):
        BACKBONES[_folder(tmp_path / "unknown", {"model_type": "berts", "num_hidden_layers": 2, "hidden_size": 8})]
    with pytest.raises(XtransferError, match=r"needs code that comes with it \(modeling_new.NewModel\), and code from a hub is never run here"):
        BACKBONES[_folder(tmp_path / "code", {"model_type": "new", "auto_map": {"AutoModel": "modeling_new.NewModel"}, "num_hidden_layers": 2, "hidden_size": 8})]
    with_code = _folder(tmp_path / "euro", {"model_type": "eurobert", "auto_map": {"AutoModel": "modeling_eurobert.EuroBertModel"}, "num_hidden_layers": 2, "hidden_size": 8, "max_position_embeddings": 64})
    assert BACKBONES[with_code].kind.name == "eurobert"  # transformers has this one itself, and runs its own code


# ---- the hub

def _asked(environment, code):
    """What a fresh process prints, which sees that hub."""
    done = subprocess.run([sys.executable, "-c", "from xtransfer.core import XtransferError\nimport xtransfer.catalogue\nfrom xtransfer.backbones import BACKBONES\n" + code],
                          capture_output=True, text=True, env=dict(os.environ) | environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


REFUSED = "try: BACKBONES[{!r}]\nexcept XtransferError as error: print(error)\n"


def test_hub_ids(hub):
    out = _asked(hub, "from xtransfer.backbones import read_backbone\nfor name in ('FacebookAI/xlm-roberta-large', 'google-bert/bert-base-multilingual-cased', 'distilbert/distilbert-base-multilingual-cased'):\n"
                      "    read, declared = read_backbone(name), BACKBONES[name]\n"
                      "    print(declared.name, read.name, all(getattr(read, f) == getattr(declared, f) for f in ('layers', 'hidden_size', 'retrieval_layer', 'max_length', 'kind', 'architecture', 'checkpoint')))\n"
                      "from xtransfer.modeling import load_tokenizer\n"
                      "print(load_tokenizer(BACKBONES['FacebookAI/xlm-roberta-base'])('Hello world!')['input_ids'])\n")
    assert out.splitlines() == ["xlm-r-large FacebookAI--xlm-roberta-large True", "mbert google-bert--bert-base-multilingual-cased True", "distil-mbert distilbert--distilbert-base-multilingual-cased True", "[0, 35378, 8999, 38, 2]"]


def test_hub_ids_that_do_not_exist(hub):
    assert "the hub has no model 'nobody/nothing'" in _asked(hub, REFUSED.format("nobody/nothing"))
    assert "model_type 'canine', which is no declared family" in _asked(hub, REFUSED.format("google/canine-s"))


def test_no_network(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    assert "the hub does not answer and its cache holds no config.json of 'google/byt5-small'" in _asked(offline, REFUSED.format("google/byt5-small"))
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    assert "the hub does not answer and its cache holds no config.json of 'google/byt5-small'" in _asked(unreachable, REFUSED.format("google/byt5-small"))


# ---- what a reader is shown

@pytest.mark.parametrize("name", BACKBONES)
def test_card(name):
    from test_cards import check_markdown, plain
    from xtransfer.cards import backbone_card, refusals

    b = BACKBONES[name]
    card = backbone_card(b)
    check_markdown(card)
    said = plain(card)
    assert said.startswith(f"# {name}\n") and f"`{b.kind.name}`" in said and b.license in said and b.revision in said and (b.checkpoint or "random") in said and f"`{b.kind.loader}`".removeprefix("`") in said
    assert f"hidden_states[{b.retrieval_layer}]" in said and f"{b.max_length:,} tokens" in said and b.source in said and b.contamination[1:] in said and b.note[1:] in said and b.parent in said
    assert all((f" ({code})" in said) == bool(b.checkpoint and b.languages and code not in b.languages) for code in LANGUAGE_SETS["xtreme_r"])
    assert all(f"`{kind}`: {reason}." in said for kind, reason in refusals(b).items())
    assert set(refusals(b)) >= ({"span_extraction", "ranked_retrieval"} if b.max_length < 128 else set())
    assert ("prompted" in refusals(b)) == (b.kind.objective not in ("causal", "spans")) and ("masked_lm" in refusals(b)) == (b.kind.objective == "none")


def test_show_and_ls(tmp_path, capsys):
    from xtransfer.cli import main

    assert main(["show", "bloomz-560m"]) == 0
    assert "Fine-tuned on xP3" in capsys.readouterr().out
    folder = _folder(tmp_path / "mine", {"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 96, "max_position_embeddings": 128})
    assert main(["show", folder]) == 0 and main(["show", "FacebookAI/xlm-roberta-large"]) == 0
    out = capsys.readouterr().out
    assert "6 layers of 96" in out and "hidden_states[4]" in out and "\n# xlm-r-large\n" in "\n" + out
    assert main(["show", str(tmp_path)]) == 1 and main(["show", "mt5-bse"]) == 1
    refused = capsys.readouterr().err.splitlines()
    assert len(refused) == 2 and "has no config.json" in refused[0] and "did you mean 'mt5-base'?" in refused[1]
    assert main(["ls", "backbones"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(BACKBONES) and {line.split()[0] for line in lines if "contaminated" in line} == {name for name, b in BACKBONES.items() if b.contamination}
