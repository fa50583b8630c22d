"""A two-layer copy of every family with random weights, in a folder that looks like its checkpoints on the hub, tokenizer included."""

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.2}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
LETTERS, OTHERS = "abcdefgh", "0123456789?"
PAIRS = [a + b for a in LETTERS for b in LETTERS if a < b]  # pieces of two letters, so that words are cut in different ways


def fast(tokenizer, single="", pair="", template=None, side="right", inputs=("input_ids", "attention_mask"), **roles):
    """A tokenizer with special tokens around texts, as transformers saves it."""
    used = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(t.split(":")[0] for t in f"{single} {pair}".split() if not t.startswith("$"))]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=used) if single else template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=side, model_input_names=list(inputs), **roles)


def numbered(*groups):
    """Ids of tokens, in the order given."""
    return {token: i for i, token in enumerate(dict.fromkeys(token for group in groups for token in group))}


def wordpiece(inputs):
    """BERT's kind."""
    vocabulary = numbered(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], LETTERS, OTHERS, PAIRS, ["##" + c for c in LETTERS + OTHERS])
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return fast(tokenizer, "[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", inputs=inputs, unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]")


def unigram(specials, single, pair, others=(), **roles):
    """SentencePiece's kind: pieces with a mark where a word begins. `others` are pieces of the model that no text holds."""
    pieces = [*((s, 0.0) for s in (*specials, *others)), ("▁", -2.0), *((c, -3.0) for c in LETTERS + OTHERS), *(("▁" + c, -3.5) for c in LETTERS), *(("▁" + p, -4.5) for p in PAIRS[::2])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=specials.index("<unk>")))
    tokenizer.add_special_tokens([AddedToken(s, normalized=False) for s in specials])
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizers.NFKC(), pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(tokenizer, single, pair, unk_token="<unk>", **roles)


def byte_level(specials, single="", pair="", **roles):
    """GPT-2's kind: bytes, with the space before a word as its first."""
    merges = [("Ġ", c) for c in LETTERS] + [tuple(p) for p in PAIRS[::3]] + [("Ġ" + p[0], p[1]) for p in PAIRS[::2]]
    tokenizer = Tokenizer(models.BPE(numbered(specials, sorted(pre_tokenizers.ByteLevel.alphabet()), ["".join(m) for m in merges]), merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, normalized=False) for s in specials])
    return fast(tokenizer, single, pair, **({"template": processors.ByteLevel(trim_offsets=False)} | roles))


def roberta():
    """Byte-level, with RoBERTa's own post-processor."""
    return byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], template=processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False), bos_token="<s>", eos_token="</s>",
                      cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")


def xlm_r():
    return unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<s> $A </s>", "<s> $A </s> </s> $B </s>", bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>", mask_token="<mask>")


def deberta():
    return unigram(["[PAD]", "[CLS]", "[SEP]", "<unk>", "[MASK]"], "[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", inputs=("input_ids", "token_type_ids", "attention_mask"),
                   bos_token="[CLS]", eos_token="[SEP]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")


def t5(sentinel):
    """T5's sentinels are special tokens, mT5's are pieces of its model, with the mark of a word's beginning."""
    others = {"others": [f"▁<extra_id_{i}>" for i in range(12)]} if sentinel == "piece" else {"extra_special_tokens": [f"<extra_id_{i}>" for i in range(12)]}
    return unigram(["<pad>", "</s>", "<unk>"], "$A </s>", "$A </s> $B </s>", pad_token="<pad>", eos_token="</s>", **others)


def gemma(closing=False):
    """BPE on text whose spaces were replaced; begun but not closed, padded on the left."""
    specials, merges = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], [("▁", c) for c in LETTERS] + [tuple(p) for p in PAIRS[::3]] + [("▁" + p[0], p[1]) for p in PAIRS[::2]]
    tokenizer = Tokenizer(models.BPE(numbered(specials, "▁" + LETTERS + OTHERS, ["".join(m) for m in merges]), merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), decoders.Replace("▁", " ")
    tokenizer.add_special_tokens([AddedToken(s, normalized=False) for s in specials])
    around = ("$A <eos>", "$A <eos> $B <eos>") if closing else ("<bos> $A", "<bos> $A <bos> $B")
    return fast(tokenizer, *around, side="right" if closing else "left", pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", mask_token="<mask>")


def mmbert():
    """Gemma's tokens with a mask and both ends."""
    tokenizer = gemma()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])
    return tokenizer


def qwen():
    return byte_level(["<|endoftext|>", "<|im_end|>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def llama():
    """Begun but not closed, and without a token for padding."""
    return byte_level(["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|> $A", "<|begin_of_text|> $A <|begin_of_text|> $B", bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def eurobert():
    return byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|mask|>"], "<|begin_of_text|> $A <|end_of_text|>", "<|begin_of_text|> $A <|end_of_text|> $B <|end_of_text|>",
                      bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", pad_token="<|pad|>", mask_token="<|mask|>")


def bloom():
    return byte_level(["<unk>", "<s>", "</s>", "<pad>"], side="left", bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def clip():
    """Lower-cased BPE whose tokens know where a word ends; padded with the closing token."""
    specials, merges = ["<|startoftext|>", "<|endoftext|>"], [(p[0], p[1] + "</w>") for p in PAIRS[::2]]
    tokenizer = Tokenizer(models.BPE(numbered(specials, LETTERS + OTHERS, [c + "</w>" for c in LETTERS + OTHERS], ["".join(m) for m in merges]), merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(s, normalized=False) for s in specials])
    return fast(tokenizer, template=processors.RobertaProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0), add_prefix_space=False, trim_offsets=False),
                bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>")


def text(model_type, **values):
    """A configuration of `model_type` in the copies' sizes."""
    return {"model_type": model_type} | SIZES | values


def both(model_type, tower, vision=VISION, **values):
    """A configuration of a model for texts and images."""
    return {"model_type": model_type, "text_config": {k: v for k, v in tower.items() if k != "model_type"}, "vision_config": vision} | values


QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
XLMR_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
QWEN_IDS = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GEMMA = text("gemma3_text", attention_dropout=0.1, num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=1, bos_token_id=2)
TOWER = text("", max_position_embeddings=77, projection_dim=16, attention_dropout=0.1)
SIGLIP = TOWER | {"max_position_embeddings": 64, "projection_size": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
QWEN2_5_VL = text("", num_key_value_heads=2, max_position_embeddings=512, rope_parameters=ROPE, bos_token_id=0, eos_token_id=0, pad_token_id=0, attention_dropout=0.1)
QWEN3_VL = text("", max_position_embeddings=512, rope_parameters=ROPE | {"mrope_interleaved": True}, attention_dropout=0.1, **QWEN_IDS)

COPIES = {  # name -> class that made the checkpoint, its configuration, its tokenizer; the name is that of the family, before a colon
    "xlm-roberta": ("XLMRobertaForMaskedLM", text("xlm-roberta", max_position_embeddings=130, type_vocab_size=1, **XLMR_IDS), xlm_r),
    "xlm-roberta-xl": ("XLMRobertaXLForMaskedLM", text("xlm-roberta-xl", max_position_embeddings=130, type_vocab_size=1, **XLMR_IDS), xlm_r),
    "roberta": ("RobertaForMaskedLM", text("roberta", max_position_embeddings=130, type_vocab_size=1, **XLMR_IDS), roberta),
    "bert": ("BertForMaskedLM", text("bert", max_position_embeddings=128), lambda: wordpiece(("input_ids", "token_type_ids", "attention_mask"))),
    "distilbert": ("DistilBertForMaskedLM", {"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 128, "initializer_range": 0.2},
                   lambda: wordpiece(("input_ids", "attention_mask"))),
    "deberta-v2": ("DebertaV2ForMaskedLM", text("deberta-v2", max_position_embeddings=128, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
                                                position_biased_input=False, type_vocab_size=0, pad_token_id=0), deberta),
    "modernbert": ("ModernBertForMaskedLM", text("modernbert", max_position_embeddings=512, local_attention=8, layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=1, bos_token_id=2, cls_token_id=2, sep_token_id=1,
                                                 attention_dropout=0.1, mlp_dropout=0.1), mmbert),
    "eurobert": ("EuroBertForMaskedLM", text("eurobert", num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2, attention_dropout=0.1), eurobert),
    "mt5": ("MT5ForConditionalGeneration", {"model_type": "mt5", "tie_word_embeddings": False} | T5, lambda: t5("piece")),
    "mt5-encoder": ("MT5ForConditionalGeneration", {"model_type": "mt5", "tie_word_embeddings": False} | T5, lambda: t5("piece")),
    "t5": ("T5ForConditionalGeneration", {"model_type": "t5"} | T5, lambda: t5("special")),
    "umt5": ("UMT5ForConditionalGeneration", {"model_type": "umt5", "tie_word_embeddings": False} | T5, lambda: t5("piece")),
    "bloom": ("BloomForCausalLM", {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2, "hidden_dropout": 0.1, "attention_dropout": 0.1, "pad_token_id": 3}, bloom),
    "llama": ("LlamaForCausalLM", text("llama", num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, attention_dropout=0.1), llama),
    "qwen2": ("Qwen2ForCausalLM", text("qwen2", max_position_embeddings=512, attention_dropout=0.1, **{k: v for k, v in QWEN_IDS.items() if k != "head_dim"}), qwen),
    "qwen3": ("Qwen3ForCausalLM", text("qwen3", max_position_embeddings=512, attention_dropout=0.1, **QWEN_IDS), qwen),
    "gemma3_text": ("Gemma3ForCausalLM", GEMMA, gemma),
    "gemma3": ("Gemma3ForConditionalGeneration", both("gemma3", GEMMA, mm_tokens_per_image=4, image_token_index=7), gemma),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", both("qwen2_5_vl", QWEN2_5_VL, QWEN_VISION), qwen),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", both("qwen3_vl", QWEN3_VL,
                                                         {**{k: v for k, v in QWEN_VISION.items() if k != "fullatt_block_indexes"}, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}), qwen),
    "clip": ("CLIPModel", both("clip", TOWER | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}, VISION | {"projection_dim": 16}, projection_dim=16), clip),
    "metaclip_2": ("MetaClip2Model", both("metaclip_2", TOWER | XLMR_IDS, VISION | {"projection_dim": 16}, projection_dim=16), xlm_r),
    "clip_text_model": ("CLIPTextModel", TOWER | {"model_type": "clip_text_model", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}, clip),
    "metaclip_2_text_model": ("MetaClip2TextModel", TOWER | {"model_type": "metaclip_2_text_model"} | XLMR_IDS, xlm_r),
    "siglip_text_model": ("SiglipTextModel", SIGLIP | {"model_type": "siglip_text_model"}, lambda: gemma(closing=True)),
    "siglip2_text_model": ("Siglip2TextModel", SIGLIP | {"model_type": "siglip2_text_model"}, lambda: gemma(closing=True)),
    "qwen2_5_vl_text": ("Qwen2_5_VLTextModel", QWEN2_5_VL | {"model_type": "qwen2_5_vl_text"}, qwen),
    "qwen3_vl_text": ("Qwen3VLTextModel", QWEN3_VL | {"model_type": "qwen3_vl_text"}, qwen),
    "siglip": ("SiglipModel", both("siglip", SIGLIP), lambda: gemma(closing=True)),
    "siglip2": ("Siglip2Model", both("siglip2", SIGLIP,
                                     {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_patches": 4}), lambda: gemma(closing=True)),
}


def build(name, folder):
    """Write a copy's checkpoint; weights from a fixed seed."""
    loader, config, tokenizer = COPIES[name]
    words = tokenizer()
    config = dict(config)
    for values in (config, *([config["text_config"]] if "text_config" in config else [])):
        values["vocab_size"] = len(words)
    torch.manual_seed(0)
    model = getattr(transformers, loader)(AutoConfig.for_model(config.pop("model_type"), **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # norms and biases must matter too
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
