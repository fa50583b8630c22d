"""What the invented world holds for other families: tokenizers of their custom, pictures of its meanings, captions, backbones, and the head that learns from pictures."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import xtransfer.catalogue  # noqa: F401  fills the registries
from xtransfer.backbones import BACKBONES
from xtransfer.core import XtransferError, digest
from xtransfer.encoding import Batch, encode, make_batch
from xtransfer.image_text import IMAGE_SIZE, ImageTextHead, caption_accuracy
from xtransfer.modeling import StageModel, load_encoder, load_tokenizer
from xtransfer.studies import Recipe
from xtransfer.tasks import TASKS, load_examples
from xtransfer.training import learning_rate
from xtransfer.world import _STYLES, CONVERSE, NOUNS, SENTINELS, SYNONYM, TYPOLOGIES, WORLD_LANGUAGES, Clause, Entity, lexicons, text_of, say, world_tokenizer
from xtransfer.world_backbones import WORLD_BACKBONES
from xtransfer.world_images import CAPTIONS, SIDE, render, same_pictures, seen
from xtransfer.world_meanings import Editor, canonical, zone_of
from xtransfer.world_tasks import SIZES, captions

GIFT = Clause("give", Entity("king", "old"), Entity("cake", "red", count=3), Entity("mar.vin/=bank"), Entity("rope"), Entity("tor.sel/=garden"), Entity("evening"))
RECIPE = Recipe(name="captions", learning_rate=1e-3, batch_size=16, max_length=64)


@pytest.fixture(scope="module")
def drawn():
    """Propositions of the corpus and near misses of them."""
    editor = Editor(11, "corpus/train")
    events = [editor.event() for _ in range(4500)]
    return [*events, *(miss for miss in map(editor.near_miss, events[:2000]) if miss)]


# tokenizers

def test_the_first_tokenizer_is_what_records_were_made_with():
    tokenizer = world_tokenizer()
    assert digest([tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]) == "2335c4f03d8c" and len(tokenizer) == 1338
    assert digest(tokenizer([text_of(say(GIFT, code)) for code in WORLD_LANGUAGES], ["3 ?"] * len(WORLD_LANGUAGES))["input_ids"]) == "6c8bfe48f2f0"


@pytest.mark.parametrize("style", _STYLES)
def test_every_style_has_the_same_pieces_and_survives_saving(style, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, first = world_tokenizer(style), world_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    special = {*tokenizer.all_special_tokens}
    assert set(tokenizer.get_vocab()) - special == set(first.get_vocab()) - {*first.all_special_tokens}
    texts = [text_of(say(GIFT, code)) for code in WORLD_LANGUAGES]
    for pairs in (None, texts[::-1]):
        coded = loaded(texts, pairs, return_offsets_mapping=True)
        assert coded["input_ids"] == tokenizer(texts, pairs)["input_ids"] and not any(loaded.unk_token_id in ids for ids in coded["input_ids"])
    assert loaded.tokenize(texts[3]) == first.tokenize(texts[3])
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id, loaded.mask_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id)
    assert len({loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id}) == 3
    single, pair = {"xlmr": ("<s> {} </s>", "<s> {} </s> </s> {} </s>"), "clip": ("<s> {} </s>", "<s> {} </s> {} </s>")}.get(style, ("{} </s>", "{} </s> {} </s>"))
    words = [" ".join(loaded.convert_ids_to_tokens(ids)) for ids in (loaded("the dog")["input_ids"], loaded("the dog", "a cat")["input_ids"])]
    assert words == [single.format("the dog"), pair.format("the dog", "a cat")]


def test_sentinels_stand_for_spans_and_are_never_said():
    tokenizer = world_tokenizer("mt5")
    ids = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(SENTINELS)])
    assert ids == list(range(len(tokenizer) - 1, len(tokenizer) - 1 - SENTINELS, -1)) and SENTINELS >= 32
    assert tokenizer("the <extra_id_0> .")["input_ids"][1] == ids[0] and tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [0, 1, 2] and tokenizer.bos_token is None


# pictures

def test_a_proposition_has_one_picture_however_it_is_said(drawn):
    editor = Editor(5, "corpus/train")
    for clause in drawn[:300]:
        pictures = {render(editor.reword(clause)).tobytes() for _ in range(6)}
        assert pictures == {render(clause).tobytes()} and render(clause).shape == (SIDE, SIDE, 3) and render(clause).dtype == np.uint8
    assert (render(GIFT) == render(GIFT._replace(patient=GIFT.patient._replace(definite=False)))).all(), "articles cannot be seen"


def test_five_thousand_propositions_have_five_thousand_pictures(drawn):
    many, lost = same_pictures(drawn)
    assert many > 5000 and lost == 0


def test_every_part_of_a_proposition_shows():
    changes = [{"verb": "sell"}, {"agent": Entity("king")}, {"agent": Entity("king", "young")}, {"agent": Entity("person", "old")}, {"patient": GIFT.patient._replace(count=4)}, {"patient": Entity("cake", "blue", 3)},
               {"patient": Entity("bread", "red", 3)}, {"other": Entity("mar.dor/=bank")}, {"other": Entity("mar.vin/=mill")}, {"other": Entity("mar.vin")}, {"other": Entity("mar.vin/tor.sel")}, {"tool": None},
               {"tool": Entity("knife")}, {"place": Entity("garden")}, {"place": Entity("school")}, {"place": None}, {"time": Entity("noon")}, {"time": None}, {"negated": True}, {"agent": GIFT.other, "other": GIFT.agent}]
    pictures = [render(GIFT), *(render(GIFT._replace(**change)) for change in changes)]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    for count in range(2, 9):
        assert (render(GIFT._replace(patient=Entity("cake", count=count))) != render(GIFT._replace(patient=Entity("cake", count=count + 1)))).any()


@pytest.mark.parametrize("verb", [*SYNONYM, *CONVERSE])
def test_other_words_for_the_same_deed(verb):
    clause = Clause(verb, Entity("king"), Entity("cake"), Entity("dog"))
    assert seen(clause) == seen(canonical(clause)) and (render(clause) == render(canonical(clause))).all()


def test_kin_look_alike():
    def far(a, b):  # pixels that differ when one noun stands for the other
        return int((render(Clause("help", Entity(a), Entity("rope"))) != render(Clause("help", Entity(b), Entity("rope")))).any(2).sum())
    own = np.mean([far(kind, member) for kind in NOUNS for member in NOUNS[kind]])
    other = np.mean([far(kind, member) for kind in NOUNS for wrong in NOUNS if wrong != kind for member in NOUNS[wrong]])
    assert own < 0.8 * other


def test_same_pictures_in_another_process_with_another_hash_seed():
    program = ("import hashlib; from xtransfer.world_images import render; from xtransfer.world_meanings import Editor\n"
               "editor = Editor(3, 'corpus/dev'); print(hashlib.sha256(b''.join(render(editor.event()).tobytes() for _ in range(200))).hexdigest())")
    found = {subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout.strip() for seed in ("1", "2")}
    editor = Editor(3, "corpus/dev")
    assert found == {hashlib.sha256(b"".join(render(editor.event()).tobytes() for _ in range(200))).hexdigest()}


# captions

def test_captions_are_of_the_corpus_and_shared_by_languages_as_it_is():
    everything = {split: [row for rows in captions(split).values() for row in rows] for split in ("train", "dev")}
    for split, rows in everything.items():
        assert len(rows) == SIZES["world_captions"][split] == len({row["id"] for row in rows})
        assert {zone_of(row["scene"]) for row in rows if row["scene"].verb != "be"} == {f"corpus/{split}"}
        assert json.dumps(rows[:3]), "rows are plain values"
    assert all(abs(len(captions("train")[code]) / len(everything["train"]) - TYPOLOGIES[code].share) < 0.01 for code in WORLD_LANGUAGES)
    events = [{seen(row["scene"]) for row in rows if row["scene"].verb != "be"} for rows in everything.values()]
    assert not events[0] & events[1]
    assert 0.05 < np.mean([row["scene"].verb == "be" for row in everything["train"]]) < 0.15


def test_two_speakers_describe_each_picture_in_their_own_way():
    told = {}
    for code in WORLD_LANGUAGES:
        for row in captions("dev")[code]:
            told.setdefault(row["id"].rsplit("-", 1)[0], []).append((code, row))
    assert all(len(pair) == CAPTIONS and pair[0][1]["scene"] == pair[1][1]["scene"] for pair in told.values())
    foreign = np.mean([pair[0][0] != pair[1][0] for pair in told.values()])
    by_chance = 1 - sum(t.share ** 2 for t in TYPOLOGIES.values())
    assert abs(foreign - by_chance) < 0.05
    same = [pair for pair in told.values() if pair[0][0] == pair[1][0]]
    assert 0.2 < np.mean([pair[0][1]["text"] != pair[1][1]["text"] for pair in same]) < 0.7


def test_captions_keep_the_contract_and_their_facts_are_plain():
    examples = load_examples(TASKS["world_captions"], "qai", "dev", 20)
    assert all(tuple(row) == ("id", "text", "image") and row["image"].shape == (SIDE, SIDE, 3) for row in examples.rows)
    again, fewer = load_examples(TASKS["world_captions"], "qai", "dev", 20), load_examples(TASKS["world_captions"], "qai", "dev", 19)
    assert examples.facts["fingerprint"] == again.facts["fingerprint"] != fewer.facts["fingerprint"] and json.dumps(examples.facts)
    again = replace(again, rows=[again.rows[0] | {"image": 255 - again.rows[0]["image"]}, *again.rows[1:]])
    assert again.facts["fingerprint"] != examples.facts["fingerprint"], "the picture belongs to the content"


@pytest.mark.parametrize("image, said", [(np.zeros((8, 8, 3)), r"float64 \[8, 8, 3\]"), (np.zeros((8, 16, 3), np.uint8), r"\[8, 16, 3\]"), (np.zeros((8, 8), np.uint8), r"\[8, 8\]"), (None, r"NoneType \[\]"), ("a.png", r"str \[\]")])
def test_what_is_no_picture_is_one_sentence(image, said):
    task = replace(TASKS["world_captions"], name="toy_pictures", read=lambda row: row, load=lambda language, split: [{"id": "0", "text": "a dog", "image": image}])
    with pytest.raises(XtransferError, match=rf"row 0 of task toy_pictures, language en, split dev has an image that is .*{said}; accepted: uint8 \[side, side, 3\]"):
        load_examples(task, "en", "dev")


def test_pictures_travel_with_their_captions():
    rows = load_examples(TASKS["world_captions"], "qab", "dev", 30).rows
    encoded = encode(world_tokenizer("clip"), TASKS["world_captions"], rows, RECIPE)
    chosen = np.array([7, 3, 19, 0])
    batch = make_batch(encoded, chosen)
    assert batch.targets["image"].dtype == torch.uint8 and all((batch.targets["image"][i].numpy() == rows[k]["image"]).all() for i, k in enumerate(chosen))
    assert encoded.examples == 30 and sorted(batch.example.tolist()) == [0, 1, 2, 3]
    with pytest.raises(XtransferError, match="differ in size: 24 x 24, 32 x 32 pixels"):
        encode(world_tokenizer("clip"), TASKS["world_captions"], [*rows, rows[0] | {"image": np.zeros((32, 32, 3), np.uint8)}], RECIPE)


# the head

def of_captions(n, seed=0):
    """A batch of one-token captions of random pictures, in an order of their own."""
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(n))
    images = torch.from_numpy(rng.integers(0, 256, (n, 24, 24, 3), dtype=np.uint8))
    return Batch(input_ids=torch.zeros(n, dtype=torch.long), lengths=(1,) * n, example=order, within=torch.zeros(n, dtype=torch.long), sequence=np.arange(n), examples=n, targets={"image": images})


def test_the_loss_is_that_of_clip():
    torch.manual_seed(0)
    head, batch, states = ImageTextHead(12, 0, 0.0), of_captions(9), torch.randn(9, 12)
    loss, logits = head(states, batch)
    text = torch.empty(9, IMAGE_SIZE)
    text[batch.example] = F.normalize(head.text(states), dim=1)
    plain = text @ F.normalize(head.image(head.images(batch.targets["image"])), dim=1).T / 0.07
    torch.testing.assert_close(logits, plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, (F.cross_entropy(plain, torch.arange(9)) + F.cross_entropy(plain.T, torch.arange(9))) / 2, atol=1e-5, rtol=0)
    head.sharpness.data.fill_(9.0)  # above the bound
    torch.testing.assert_close(head(states, batch)[1], plain * 7, atol=1e-3, rtol=0)


def test_captions_of_one_picture_are_not_wrong_for_each_other():
    head, batch, states = ImageTextHead(12, 0, 0.0), of_captions(6), torch.randn(6, 12)
    images = batch.targets["image"][[0, 1, 0, 2, 1, 0]]
    loss, logits = head(states, replace(batch, targets={"image": images}))
    assert logits.isinf().nonzero().tolist() == [[0, 2], [0, 5], [1, 4], [2, 0], [2, 5], [4, 1], [5, 0], [5, 2]]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in head.parameters())
    lone, _ = head(states, replace(batch, targets={"image": images[:1].expand(6, -1, -1, -1)}))
    assert lone.abs() < 1e-6, "where all captions are of one picture there is nothing to learn"


@pytest.mark.parametrize("name", ("world-xlmr-small", "world-mt5-small", "world-bloom-small", "world-clip-small"))
def test_every_family_learns_to_find_pictures(name):
    backbone = BACKBONES[name]
    tokenizer = load_tokenizer(backbone)
    model, task = StageModel(load_encoder(backbone, tokenizer, 0), [TASKS["world_captions"]], 0, backbone), TASKS["world_captions"]
    encoded = encode(tokenizer, task, load_examples(task, "en", "train", 32).rows, RECIPE)
    before = []
    optimizer, everyone = torch.optim.AdamW(model.parameters(), lr=2e-3), make_batch(encoded, np.arange(32))
    with torch.no_grad():
        flat, padded = (model.eval()(everyone, "world_captions", padded=padded)[1] for padded in (False, True))
        before.append(caption_accuracy(model, "world_captions", encoded))
    torch.testing.assert_close(flat, padded, atol=1e-4, rtol=0)
    model.train()
    for step in range(60):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 60, replace(RECIPE, learning_rate=2e-3))
        loss, _ = model(everyone, "world_captions")
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    with torch.no_grad():
        after = caption_accuracy(model.eval(), "world_captions", encoded)
    assert before[0] < 20 and after > 30, (before, after)  # chance is 3; 56 to 100 were seen, by processor and family


# backbones

@pytest.mark.parametrize("name", WORLD_BACKBONES)
def test_a_backbone_of_the_world_is_what_it_says(name):
    backbone = BACKBONES[name]
    tokenizer = load_tokenizer(backbone)
    model = load_encoder(backbone, tokenizer, 0)
    table = model.get_input_embeddings()
    assert table.num_embeddings == len(tokenizer) and model.config.model_type == backbone.config["model_type"] and model.config.hidden_size == backbone.hidden_size
    assert model.config.num_hidden_layers == backbone.layers and 0 < backbone.retrieval_layer <= backbone.layers and "small" not in name or backbone.hidden_size == 64
    for token in ("pad", "eos", "bos"):
        said = backbone.config.get(f"{token}_token_id")
        assert said is None or said == getattr(tokenizer, f"{token}_token_id"), f"{token} of the configuration and of the tokenizer"
    assert not any(isinstance(part, torch.nn.Dropout) and part.p for part in model.modules())
    if backbone.parameters:
        assert backbone.parameters == round(sum(p.numel() for p in model.parameters()) / 1e6, 3) and backbone.embedding_parameters == round(table.weight.numel() / 1e6, 3)
    assert not backbone.parent or BACKBONES[backbone.parent].hidden_size == backbone.hidden_size
    longest = torch.zeros(1, backbone.max_length, dtype=torch.long)
    states = StageModel(model.eval(), [], 0, backbone).states(Batch(input_ids=longest[0], lengths=(backbone.max_length,), example=torch.zeros(1, dtype=torch.long), within=torch.zeros(1, dtype=torch.long),
                                                                    sequence=np.zeros(1, dtype=np.int64), examples=1, targets={}))
    assert states.shape == (backbone.max_length, backbone.hidden_size) and states.isfinite().all()


def test_languages_of_the_world_are_all_there():
    assert set(lexicons()) == set(WORLD_LANGUAGES) and all(BACKBONES[name].languages == WORLD_LANGUAGES for name in WORLD_BACKBONES if name != "world-xlmr")
