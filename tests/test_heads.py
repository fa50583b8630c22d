"""Our heads compute what transformers' own heads, or a few plain lines, compute with the same weights."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from copies import COPIES, build
from test_families import copy, stock, tasks  # noqa: F401  fixtures
from xtransfer.backbones import FAMILIES
from xtransfer.encoding import IGNORED, encode, make_batch
from xtransfer.evaluation import make_evaluator
from xtransfer.modeling import StageModel, load_encoder, load_pretrained_head, load_tokenizer, save_checkpoint
from xtransfer.objectives import make_corruption
from xtransfer.studies import Recipe
from xtransfer.tasks import load_examples

RECIPE = Recipe(name="test", learning_rate=0, batch_size=8, max_length=96, stride=8)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ROWS = 12


def subject(backbone, task, **changes):
    """A model with one head, its tokenizer, some rows and their batch; heads with weights large enough to matter."""
    tokenizer = load_tokenizer(backbone)
    model = StageModel(load_encoder(backbone, tokenizer, 0), [task], 0, backbone).eval()
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.heads.parameters():
            parameter += 0.3 * torch.randn_like(parameter) if parameter.numel() > 1 else 0
    rows = load_examples(task, "en", "train").rows
    return model, tokenizer, rows[:ROWS], make_batch(encode(tokenizer, task, rows, replace(RECIPE, **changes)), np.arange(ROWS))


def owner(backbone, name, **changes):
    """transformers' own model for a format, with the copy's weights."""
    transformers.logging.set_verbosity_error()
    return getattr(transformers, name).from_pretrained(backbone.folder, dtype=torch.float32, **changes).eval()


def give(layer, ours):
    """Copy the weights of a layer of ours into one of theirs."""
    with torch.no_grad():
        layer.weight.copy_(ours.weight), layer.bias.copy_(ours.bias)


OWN = {"xlm-roberta": "XLMRoberta", "bert": "Bert"}


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_sequence_classification(name, copy, tasks):  # noqa: F811
    model, tokenizer, rows, batch = subject(copy(name), tasks["sequence_classification"])
    theirs, head = owner(copy(name), f"{OWN[name]}ForSequenceClassification", num_labels=2), model.heads["toy_pair"]
    give(theirs.classifier.dense if name == "xlm-roberta" else theirs.bert.pooler.dense, head.dense)
    give(theirs.classifier.out_proj if name == "xlm-roberta" else theirs.classifier, head.out)
    words = tokenizer([r["text"] for r in rows], [r["text_pair"] for r in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([("yes", "no").index(r["label"]) for r in rows])
    wanted, (loss, logits) = theirs(**words, labels=labels), model(batch, "toy_pair")
    torch.testing.assert_close(logits, wanted.logits, **CLOSE)
    torch.testing.assert_close(loss, wanted.loss, **CLOSE)
    assert logits.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_multiple_choice(name, copy, tasks):  # noqa: F811
    model, tokenizer, rows, batch = subject(copy(name), tasks["multiple_choice"])
    theirs, head = owner(copy(name), f"{OWN[name]}ForMultipleChoice"), model.heads["toy_choice"]
    give(theirs.base_model.pooler.dense, head.dense), give(theirs.classifier, head.out)
    words = tokenizer([r["text"] for r in rows for _ in r["choices"]], [c for r in rows for c in r["choices"]], padding=True, return_tensors="pt")
    wanted = theirs(**{k: v.reshape(len(rows), 3, -1) for k, v in words.items()}, labels=torch.tensor([r["label"] for r in rows]))
    loss, logits = model(batch, "toy_choice")
    torch.testing.assert_close(logits, wanted.logits, **CLOSE)
    torch.testing.assert_close(loss, wanted.loss, **CLOSE)
    assert logits.std(1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", (*OWN, "distilbert", "modernbert", "mt5"))
def test_token_classification(name, copy, tasks):  # noqa: F811
    """Our logits stand in the order of the flat row; theirs are read at the first token of each word."""
    own = {"distilbert": "DistilBert", "modernbert": "ModernBert", "mt5": "MT5"} | OWN
    model, tokenizer, rows, batch = subject(copy(name), tasks["token_classification"])
    theirs = owner(copy(name), f"{own[name]}ForTokenClassification", num_labels=2)
    if name == "modernbert":
        theirs.head = torch.nn.Identity()  # it has one more layer
    give(theirs.classifier, model.heads["toy_tags"].out)
    ids, tags = batch.input_ids.split(batch.lengths), batch.targets["tag"].split(batch.lengths)
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = torch.nn.utils.rnn.pad_sequence(tags, batch_first=True, padding_value=IGNORED)
    inside = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    wanted, (loss, logits) = theirs(input_ids=padded, attention_mask=inside, labels=labels), model(batch, "toy_tags")
    torch.testing.assert_close(logits, wanted.logits[labels != IGNORED], **CLOSE)
    torch.testing.assert_close(loss, wanted.loss, **CLOSE)
    assert len(logits) == sum(len(r["tokens"]) for r in rows)


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_span_extraction(name, copy, tasks):  # noqa: F811
    """Questions that fit into one window, as transformers' tokenizer makes them; no answer is the first token."""
    model, tokenizer, rows, batch = subject(copy(name), tasks["span_extraction"], max_length=120)
    theirs = owner(copy(name), f"{OWN[name]}ForQuestionAnswering")
    give(theirs.qa_outputs, model.heads["toy_qa2"].out)
    words = tokenizer([r["question"] for r in rows], [r["context"] for r in rows], padding=True, return_tensors="pt")
    assert batch.examples == len(batch.lengths) == len(rows) and sorted(batch.lengths) == sorted(words["attention_mask"].sum(1).tolist())
    spans = torch.stack([batch.targets["span"][(batch.example == i).nonzero()[0, 0]] for i in range(len(rows))]).clamp(min=0)
    assert (spans == 0).all(1).any() and not (spans == 0).all()
    for i, row in enumerate(rows):
        if row["answers"]:
            first, last = (words.token_to_chars(i, int(t)) for t in spans[i])
            assert row["context"][first.start:last.end].strip() == row["answers"][0]
    wanted, (loss, logits) = theirs(**words, start_positions=spans[:, 0], end_positions=spans[:, 1]), model(batch, "toy_qa2")
    for row, (example, length) in enumerate(zip(batch.example.tolist(), batch.lengths)):
        torch.testing.assert_close(logits[row, :length, 0], wanted.start_logits[example, :length], **CLOSE)
        torch.testing.assert_close(logits[row, :length, 1], wanted.end_logits[example, :length], **CLOSE)
        assert logits[row, length:].isinf().all()
    mask = (words["attention_mask"] == 0)  # transformers leaves padding in its softmax
    parts = [torch.nn.functional.cross_entropy(found.masked_fill(mask, -torch.inf), spans[:, side]) for side, found in enumerate((wanted.start_logits, wanted.end_logits))]
    torch.testing.assert_close(loss, sum(parts) / 2, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.lm_head])
def test_masked_tokens_with_the_head_that_pretraining_left(name, copy, tasks):  # noqa: F811
    model, tokenizer, rows, batch = subject(copy(name), tasks["masked_lm"])
    assert load_pretrained_head(model, copy(name), "toy_text")
    theirs = owner(copy(name), COPIES[name][0])
    batch = make_corruption(tokenizer, "masked", RECIPE, len(tokenizer))(batch, 0)
    loss, logits = model(batch, "toy_text")
    segments = batch.targets["segment"].split(batch.lengths) if "segment" in batch.targets else [None] * len(batch.lengths)
    wanted = []
    for ids, targets, segment in zip(batch.input_ids.split(batch.lengths), batch.targets["masked"].split(batch.lengths), segments):
        found = theirs(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **({} if segment is None or name == "deberta-v2" else {"token_type_ids": segment[None]}))
        wanted.append(found.logits[0][targets != IGNORED])
    torch.testing.assert_close(logits, torch.cat(wanted), atol=1e-5 * max(1.0, float(logits.abs().max())), rtol=1e-5)
    assert torch.isfinite(loss) and logits.std() > 0.1


def test_a_pretrained_head_is_not_made_up(copy, tasks, tmp_path):  # noqa: F811
    """Where a checkpoint has no masked-LM head, or one of another shape, the new head stays."""
    for name, damage in (("xlm-roberta", "lm_head.dense.weight"), ("xlm-roberta", "everything"), ("eurobert", None)):
        folder = build(name, tmp_path / f"{name}-{damage}")
        tensors = load_file(folder / "model.safetensors")
        if damage:
            save_file({k: v for k, v in tensors.items() if k != damage and not (damage == "everything" and k.startswith("lm_head"))}, folder / "model.safetensors", metadata={"format": "pt"})
        backbone = replace(copy(name), folder=str(folder))
        model = subject(backbone, tasks["masked_lm"])[0]
        before = {k: v.clone() for k, v in model.heads.state_dict().items()}
        assert not load_pretrained_head(model, backbone, "toy_text")
        assert all(torch.equal(v, before[k]) for k, v in model.heads.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.objective == "causal"])
def test_next_tokens(name, copy, tasks):  # noqa: F811
    model, tokenizer, rows, batch = subject(copy(name), tasks["masked_lm"])
    batch = make_corruption(tokenizer, "causal", RECIPE, len(tokenizer))(batch, 0)
    loss, logits = model(batch, "toy_text")
    ids = batch.input_ids.split(batch.lengths)
    padded, labels = (torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=fill) for fill in (0, IGNORED))
    wanted = owner(copy(name), COPIES[name][0])(input_ids=padded, attention_mask=(labels != IGNORED).long(), labels=labels)
    torch.testing.assert_close(loss, wanted.loss, **CLOSE)
    torch.testing.assert_close(logits, torch.cat([wanted.logits[i, :n - 1] for i, n in enumerate(batch.lengths)]), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.objective == "spans"])
def test_hidden_spans(name, copy, tasks):  # noqa: F811
    model, tokenizer, rows, batch = subject(copy(name), tasks["masked_lm"])
    batch = make_corruption(tokenizer, "spans", RECIPE, len(tokenizer))(batch, 0)
    loss, _ = model(batch, "toy_text")
    ids, labels = batch.input_ids.split(batch.lengths), batch.targets["labels"]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    inside = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    wanted = owner(copy(name), COPIES[name][0])(input_ids=padded, attention_mask=inside, labels=labels)
    torch.testing.assert_close(loss, wanted.loss, **CLOSE)
    shown = [tokenizer.convert_ids_to_tokens(row[row != IGNORED].tolist()) for row in labels]
    assert all(row[0].lstrip("▁") == "<extra_id_0>" and row[-1] == "</s>" for row in shown), "sentinels by their own name, which mT5 marks as the beginning of a word"


def pooled(states, how):
    """One vector of a sequence's states, [length, hidden size]."""
    return {"first": states[0], "last": states[-1], "mean": states.mean(0)}[how]


@torch.no_grad()
@pytest.mark.parametrize("name", ("xlm-roberta", "modernbert", "eurobert", "mt5", "bloom", "qwen3", "gemma3", "siglip2", "metaclip_2"))
def test_heads_on_the_stock_models_states(name, copy, tasks):  # noqa: F811
    """Where transformers has no such head: the formula, one example at a time, on what its model gives."""
    backbone, plain = copy(name), stock(copy(name), name)

    def states(ids):
        return plain(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).last_hidden_state[0]
    for format, task in (("sequence_classification", "toy_pair"), ("multiple_choice", "toy_choice")):
        model, _, rows, batch = subject(backbone, tasks[format], max_length=60)
        logits, head = model(batch, task)[1], model.heads[task]
        for ids, example, within in zip(batch.input_ids.split(batch.lengths), batch.example, batch.within):
            wanted = head.out(torch.tanh(head.dense(pooled(states(ids), backbone.pools))))
            torch.testing.assert_close(logits[example] if format == "sequence_classification" else logits[example, within][None], wanted, atol=3e-5, rtol=1e-4)
    model, _, rows, batch = subject(backbone, tasks["ranked_retrieval"], max_length=60)
    loss, head, place = model(batch, "toy_ranked")[0], model.heads["toy_ranked"], {}
    for ids, example, within in zip(batch.input_ids.split(batch.lengths), batch.example.tolist(), batch.within.tolist()):
        vector = torch.tanh(head.dense(pooled(states(ids), backbone.pools)))
        place[example, within] = vector / vector.norm()
    relevant, losses = batch.targets["relevant"].tolist(), []
    for i in range(batch.examples):
        others = [j for j in range(batch.examples) if j != i and relevant[j][0] not in relevant[i]]
        scores = torch.stack([100 * place[i, 0] @ place[j, 1] for j in (i, *others)])
        losses.append(scores.logsumexp(0) - scores[0])
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=2e-3, rtol=1e-3)


def test_segments_of_pairs_are_the_tokenizers_own(copy, tasks):  # noqa: F811
    """mBERT reads pairs the way its own tokenizer and model do, in every format."""
    columns = {"sequence_classification": lambda r: [(r["text"], r["text_pair"])], "multiple_choice": lambda r: [(r["text"], c) for c in r["choices"]], "span_extraction": lambda r: [(r["question"], r["context"])],
               "masked_lm": lambda r: [(r["text"], r["text_pair"] or None)]}
    plain = stock(copy("bert"), "bert")
    for format, pairs in columns.items():
        model, tokenizer, rows, batch = subject(copy("bert"), tasks[format], max_length=120)
        places = {(e, w): i for i, (e, w) in enumerate(zip(batch.example.tolist(), batch.within.tolist()))}
        ids, segments = batch.input_ids.split(batch.lengths), batch.targets["segment"].split(batch.lengths)
        with torch.no_grad():
            states = model.states(batch).split(batch.lengths)
            padded = model.states(batch, padded=True).split(batch.lengths)
        for example, row in enumerate(rows):
            for within, pair in enumerate(pairs(row)):
                words, at = tokenizer(*pair, return_tensors="pt"), places[example, within]
                assert ids[at].tolist() == words["input_ids"][0].tolist() and segments[at].tolist() == words["token_type_ids"][0].tolist()
                with torch.no_grad():
                    wanted = plain(**words).last_hidden_state[0]
                torch.testing.assert_close(states[at], wanted, **CLOSE)
                torch.testing.assert_close(padded[at], wanted, **CLOSE)
        assert max(s.max() for s in segments) == 1


def test_segments_of_the_real_tokenizer(hub):
    """mBERT's published tokenizer on pairs in several scripts, one of them too long."""
    code = """
import torch
from transformers import BertConfig, BertModel
import xtransfer.catalogue
from xtransfer.backbones import BACKBONES
from xtransfer.encoding import encode, make_batch
from xtransfer.modeling import StageModel, load_tokenizer
from xtransfer.studies import Recipe
from xtransfer.tasks import TASKS
import numpy as np
tokenizer = load_tokenizer(BACKBONES['mbert'])
rows = [{'id': '', 'text': a, 'text_pair': b, 'label': 'neutral'} for a, b in (('Hello world!', 'Guten Tag'), ('北京是中国的首都', 'مرحبا بالعالم'), ('ನಮಸ್ಕಾರ', 'Привет, мир'), ('x', 'y z ' * 40))]
encoded = encode(tokenizer, TASKS['xnli'], rows, Recipe(name='t', learning_rate=0, batch_size=4, max_length=64))
words = tokenizer([r['text'] for r in rows], [r['text_pair'] for r in rows], truncation=True, max_length=64)
print(encoded.ids.tolist() == sum(words['input_ids'], []), encoded.token_targets['segment'].tolist() == sum(words['token_type_ids'], []), encoded.truncated)
torch.manual_seed(0)
stock = BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.3), add_pooling_layer=False).eval()
batch = make_batch(encoded, np.arange(4))
with torch.no_grad():
    wanted = stock(**tokenizer.pad(words, return_tensors='pt')).last_hidden_state
    found = StageModel(stock, (), 0, BACKBONES['mbert']).states(batch).split(batch.lengths)
print(all(torch.allclose(f, wanted[i, :len(f)], atol=1e-5) for f, i in zip(found, batch.example.tolist())))
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | hub, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True", "1", "True"]


@pytest.mark.parametrize("name", ("xlm-roberta", "bert", "deberta-v2", "modernbert", "eurobert", "mt5", "bloom", "qwen3", "llama", "siglip2"))
def test_predictions_of_a_checkpoint_that_is_read_by_hand(name, copy, tasks, tmp_path):  # noqa: F811
    """What we predict is what anybody gets from the files: transformers for the encoder and the tokenizer, two matrices for the head."""
    backbone, recipe = copy(name), replace(RECIPE, max_length=60)
    chosen = [tasks["sequence_classification"], tasks["token_classification"]]
    tokenizer = load_tokenizer(backbone)
    model = StageModel(load_encoder(backbone, tokenizer, 0), chosen, 0, backbone)
    with torch.no_grad():
        torch.manual_seed(2)
        for parameter in model.heads.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    parts = {task.name: load_examples(task, "en", "dev") for task in chosen}
    with torch.no_grad():  # as many predictions of one label as of the other
        for task in chosen:
            encoded = encode(tokenizer, task, parts[task.name].rows, recipe)
            logits = model.eval()(make_batch(encoded, np.arange(encoded.examples)), task.name)[1]
            margins = (logits[:, 0] - logits[:, 1]).unique()  # ascending
            model.heads[task.name].out.bias[0] -= margins[len(margins) // 2 - 1:][:2].mean()  # between two of them: none is decided by rounding
    predicted = {task.name: [json.loads(p["prediction"]) for p in make_evaluator(tokenizer, task, task, [parts[task.name]], recipe).score(model, "last")[1]] for task in chosen}
    assert all(len({str(p) for p in found}) > 1 for found in predicted.values()), "nothing can be told from constant predictions"
    save_checkpoint(model, tokenizer, tmp_path)

    words, head = transformers.AutoTokenizer.from_pretrained(tmp_path), load_file(tmp_path / "heads.safetensors")
    plain = getattr(transformers, transformers.AutoConfig.from_pretrained(tmp_path).architectures[0]).from_pretrained(tmp_path).eval()
    plain = plain.get_encoder() if plain.config.is_encoder_decoder else plain.base_model if FAMILIES[name].causal else plain

    def states(**given):
        return plain(**given).last_hidden_state[0]
    with torch.no_grad():
        for row, found in zip(parts["toy_pair"].rows, predicted["toy_pair"]):
            vector = pooled(states(**words(row["text"], row["text_pair"], return_tensors="pt")), backbone.pools)
            logits = torch.tanh(vector @ head["toy_pair.dense.weight"].T + head["toy_pair.dense.bias"]) @ head["toy_pair.out.weight"].T + head["toy_pair.out.bias"]
            assert found == ("yes", "no")[int(logits.argmax())]
        for row, found in zip(parts["toy_tags"].rows, predicted["toy_tags"]):
            spaced = [" " + w if FAMILIES[name].causal or name in ("modernbert", "eurobert", "siglip2") else w for w in row["tokens"]]  # byte-level and Gemma's tokens
            given = words(spaced, is_split_into_words=True, return_tensors="pt")
            numbers = given.word_ids(0)
            first = [numbers.index(w) for w in range(len(spaced))]
            logits = states(**given)[first] @ head["toy_tags.out.weight"].T + head["toy_tags.out.bias"]
            assert found == [("O", "B-LONG")[i] for i in logits.argmax(1).tolist()]


@pytest.mark.parametrize("text", ("masked", "next"))
def test_text_loss_in_pieces_is_that_of_the_whole_in_training_only(text, toys, monkeypatch):
    """Where the logits of all predicted tokens are too many to be held, loss and gradients are the same and scoring still sees all logits."""
    from together import BLOOM, STILL
    from xtransfer.tasks import TASKS

    backbone, task = (STILL, TASKS["toy_text"]) if text == "masked" else (BLOOM, TASKS["world_text"])
    tokenizer = backbone.build_tokenizer()
    model = StageModel(load_encoder(backbone, tokenizer, 0), (task,), 0, backbone)
    encoded = encode(tokenizer, task, load_examples(task, task.train_languages[0], "train", 13).rows, RECIPE)
    vocabulary = model.encoder.get_input_embeddings().num_embeddings
    batch = make_corruption(tokenizer, backbone.kind.objective, RECIPE, vocabulary)(make_batch(encoded, np.arange(13)), 0)
    found = {}
    for tokens in (10**6, 7, 1):
        monkeypatch.setattr("xtransfer.heads.LARGEST_LOGITS", tokens * vocabulary)
        model.zero_grad()
        loss, logits = model.train()(batch, task.name)
        loss.backward()
        found[tokens] = loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(logits), len(model.eval()(batch, task.name)[1])
    predicted = found[10**6][2]
    assert predicted > 7 and predicted % 7 and [found[n][2:] for n in (10**6, 7, 1)] == [(predicted, predicted), (0, predicted), (0, predicted)]
    for tokens in (7, 1):
        torch.testing.assert_close(found[tokens][0], found[10**6][0], atol=1e-6, rtol=0)
        assert found[tokens][1].keys() == found[10**6][1].keys()
        for name, gradient in found[tokens][1].items():
            torch.testing.assert_close(gradient, found[10**6][1][name], atol=1e-6, rtol=1e-5)
