"""Training the rows of the embedding table that occur is training all of them, to the bit; and a batch in pieces has the gradient of the whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import xtransfer.training
import xtransfer.vocabulary
from test_families import copy, tasks  # noqa: F401  fixtures
from copies import COPIES
from xtransfer.clipping import clip_divisor, row_norm
from xtransfer.core import XtransferError
from xtransfer.encoding import Encoded, encode, make_batch
from xtransfer.modeling import StageModel, load_encoder, load_tokenizer, save_checkpoint
from xtransfer.pieces import pieces
from xtransfer.studies import Mixing, Recipe
from xtransfer.tasks import load_examples
from xtransfer.training import fit
from xtransfer.vocabulary import ROWS_NAME, Trimmed, decay_rule, occurring_rows, trimmed_vocabulary, whole_because

RECIPE = Recipe(name="test", learning_rate=3e-2, batch_size=4, max_steps=9, max_length=96, stride=8, evaluations=3, weight_decay=0.1, max_grad_norm=0.05, average_checkpoints=2)


class Killed(Exception):
    """Stands for kill -9."""


def large_model(tasks, vocabulary=3001, size=20, seed=0):
    """A tiny model with a large table, of which the toy tokens are a small part."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    torch.manual_seed(seed)
    config = XLMRobertaConfig(vocab_size=vocabulary, hidden_size=size, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, max_position_embeddings=130, pad_token_id=1)
    return StageModel(XLMRobertaModel(config, add_pooling_layer=False), tasks, seed)


def random_encoded(rng, examples=23, vocabulary=3001, most=60):
    """Sequences of random tokens with a label each, of one token, of many, and everything between."""
    lengths = np.concatenate([[1, most], rng.integers(1, most + 1, examples - 2)])
    return Encoded(ids=rng.integers(2, vocabulary, lengths.sum()).astype(np.int32), starts=np.concatenate([[0], np.cumsum(lengths)]), example=np.arange(examples), examples=examples,
                   example_targets={"label": rng.integers(0, 2, examples)})


def trained(model, data, folder, recipe=RECIPE, trim=True, die_at=None, save_seconds=1e9, falling=0.0):
    """Train; the development score is a number that the weights decide, less what makes it fall."""
    scored = []

    def score_dev():
        scored.append(1)
        if len(scored) == die_at:
            raise Killed
        with torch.no_grad():
            return {task: float(model(make_batch(encoded, np.arange(2)), task)[1].sum()) - falling * len(scored) for task, encoded in data.items()}

    return fit(model, data, score_dev, recipe, Mixing(), 0, folder, save_seconds=save_seconds, reads=list(data.values()) if trim else None)


def same(one, two):
    return [name for name, value in one.items() if not torch.equal(value, two[name])] == [] and one.keys() == two.keys()


def compare(make, data, tmp_path, recipe=RECIPE, falling=0.0):
    """Both ways, and all selections; the trained model and its training."""
    found = []
    for trim in (False, True):
        model = make()
        found.append((model, trained(model, data, tmp_path / str(trim), recipe, trim, falling=falling)))
    (whole, plain), (small, trimmed) = found
    assert plain.trimmed is None and trimmed.trimmed is not None and trimmed.vocabulary["trained"] < trimmed.vocabulary["of"]
    assert same(whole.state_dict(), small.state_dict())
    assert plain.progress.dev == trimmed.progress.dev
    for selection in plain.selections:
        assert same(plain.weights(selection), trimmed.weights(selection)), selection
    return small, trimmed


@pytest.mark.parametrize("vocabulary, size, decay, most, threads", [(3001, 20, 0.1, 60, 1), (2503, 6, 0.0, 1, 2), (4096, 64, 0.3, 120, 1)])
def test_trimmed_is_whole_to_the_bit(vocabulary, size, decay, most, threads, tasks, tmp_path):  # noqa: F811
    data = {"toy_pair": random_encoded(np.random.default_rng(size), vocabulary=vocabulary, most=most)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, fitted = compare(lambda: large_model([tasks["sequence_classification"]], vocabulary, size), data, tmp_path, replace(RECIPE, weight_decay=decay), falling=1000.0)
    finally:
        torch.set_num_threads(before)
    assert fitted.progress.best_step == 3 and fitted.steps == 9
    unseen = np.setdiff1d(np.arange(vocabulary), fitted.trimmed.rows)
    moved = model.encoder.get_input_embeddings().weight[unseen] != large_model([tasks["sequence_classification"]], vocabulary, size).encoder.get_input_embeddings().weight[unseen]
    assert bool(moved.any()) == (decay > 0), "unseen rows shrink with weight decay, and only then"


@pytest.mark.parametrize("name", COPIES)
def test_every_family_can_be_trimmed(name, copy, tasks, tmp_path, monkeypatch):
    """Tied and untied tables, tables that two parts of a model share, whatever a family does between token and state."""
    monkeypatch.setattr(xtransfer.vocabulary, "FEWEST", 1)
    backbone = copy(name)
    tokenizer = load_tokenizer(backbone)
    chosen = [tasks[format] for format in ("sequence_classification", "multiple_choice", "token_classification")]
    data = {task.name: encode(tokenizer, task, [row for row in load_examples(task, "en", "train").rows[:12]], RECIPE) for task in chosen}
    def make():
        return StageModel(load_encoder(backbone, tokenizer, 0), chosen, 0, backbone)
    model, fitted = compare(make, data, tmp_path, replace(RECIPE, max_steps=5, evaluations=2))
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    again = load_encoder(backbone, tokenizer, 0, tmp_path / "checkpoint")
    assert torch.equal(again.get_input_embeddings().weight, model.encoder.get_input_embeddings().weight) and len(again.get_input_embeddings().weight) == fitted.vocabulary["of"]


def test_an_interrupted_training_goes_on(tasks, tmp_path):
    data = {"toy_pair": random_encoded(np.random.default_rng(0))}
    def make():
        return large_model([tasks["sequence_classification"]])
    model, fitted = compare(make, data, tmp_path)
    for moment in (2, 1):
        broken = make()
        with pytest.raises(Killed):
            trained(broken, data, tmp_path / "broken", die_at=moment, save_seconds=0)
    again = make()
    resumed = trained(again, data, tmp_path / "broken")
    assert same(model.state_dict(), again.state_dict()) and same(fitted.weights("best"), resumed.weights("best")) and same(fitted.weights("average"), resumed.weights("average"))


def test_other_tokens_than_before_are_refused(tasks, tmp_path):
    model, data = large_model([tasks["sequence_classification"]]), {"toy_pair": random_encoded(np.random.default_rng(0))}
    with pytest.raises(Killed):
        trained(model, data, tmp_path, die_at=2, save_seconds=0)
    other = {"toy_pair": random_encoded(np.random.default_rng(1))}
    with pytest.raises(XtransferError, match="reads other tokens than when it was interrupted"):
        trained(large_model([tasks["sequence_classification"]]), other, tmp_path)
    assert (tmp_path / ROWS_NAME).exists()


def test_a_token_that_is_not_there_is_an_error(tasks):
    model, rng = large_model([tasks["sequence_classification"]]), np.random.default_rng(0)
    seen, other = random_encoded(rng, vocabulary=100), random_encoded(rng, vocabulary=1900)
    with trimmed_vocabulary(model, [seen], RECIPE, [0.1]):
        model(make_batch(seen, np.arange(3)), "toy_pair")
        with pytest.raises(IndexError):
            model(make_batch(other, np.arange(other.examples)), "toy_pair")
    model(make_batch(other, np.arange(3)), "toy_pair")


def test_a_failure_leaves_the_model_as_it_was(tasks):
    model = large_model([tasks["sequence_classification"]])
    weight, before = model.encoder.get_input_embeddings().weight, {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(Killed), trimmed_vocabulary(model, [random_encoded(np.random.default_rng(0))], RECIPE, [0.1]):
        raise Killed
    assert model.encoder.get_input_embeddings().weight is weight and same(before, model.state_dict()) and model.encoder.get_input_embeddings().padding_idx == 1


def test_who_is_not_trimmed_and_why(tasks, toys):

    model = large_model([tasks["sequence_classification"]])
    assert whole_because(model, RECIPE) is None and whole_because(model, replace(RECIPE, gradients="mean")) is None
    assert "projected" in whole_because(model, replace(RECIPE, gradients="pcgrad")) and "sharded" in whole_because(model, RECIPE, "full")
    assert "predicted" in whole_because(large_model([tasks["masked_lm"]]), RECIPE) and "small" in whole_because(large_model([tasks["sequence_classification"]], 500), RECIPE)
    model.encoder.get_input_embeddings().weight.requires_grad_(False)
    assert "not trained" in whole_because(model, RECIPE)


def test_decay_is_what_the_optimizer_does():
    assert decay_rule(torch.device("cpu")) == "multiplied"
    whole = Trimmed(name="w", rows=torch.tensor([0]), before=torch.rand(3, 2), rates=(0.1, 0.2, 0.3)).whole({"w": torch.zeros(1, 2)}, step=2)["w"]
    assert torch.equal(whole[0], torch.zeros(2)) and whole[1:].abs().sum() > 0


@pytest.mark.parametrize("rows, kept, size", [(2, 1, 1), (7, 7, 3), (5003, 31, 17), (300_007, 5, 2)])
def test_rows_of_zeros_do_not_change_the_norm(rows, kept, size):
    torch.manual_seed(rows)
    gradient, spread = torch.randn(kept, size) * 10 ** torch.randn(kept, 1), torch.zeros(rows, size)
    spread[torch.randperm(rows)[:kept].sort().values] = gradient
    assert torch.equal(row_norm(gradient), row_norm(spread))
    torch.testing.assert_close(row_norm(gradient), torch.linalg.vector_norm(gradient.double()).float(), rtol=3e-7, atol=0)


def test_divisor_is_torchs():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(n, 3)) for n in (5, 50, 2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    norm = torch.nn.utils.get_total_norm([w.grad for w in weights])
    for most in (0.1, 1.0, 100.0):
        torch.testing.assert_close(clip_divisor(weights, weights[1:2], most), ((norm + 1e-6) / most).clamp(min=1.0), rtol=1e-6, atol=0)
    assert clip_divisor([torch.nn.Parameter(torch.zeros(2))], (), 1.0) is None


def test_rows_that_occur():
    encoded = random_encoded(np.random.default_rng(0), vocabulary=2000)
    kept = occurring_rows([encoded], 3001, 1).tolist()
    assert kept == sorted({1, *encoded.ids.tolist(), *range(3001 - xtransfer.vocabulary.FEWEST, 3001)})


@pytest.mark.parametrize("format", ("sequence_classification", "multiple_choice", "token_classification", "span_extraction", "masked_lm"))
@pytest.mark.parametrize("count", (2, 3, 7, 100))
def test_pieces_have_the_gradient_of_the_whole(format, count, tasks):
    """Without dropout; labels, tags and spans are not spread evenly over the pieces."""
    from xtransfer.objectives import Corruption
    from conftest import TOYS
    import runpy

    task, tokenizer = tasks[format], runpy.run_path(str(TOYS))["toy_tokenizer"]()
    model, encoded = large_model([task]).eval(), encode(tokenizer, task, load_examples(task, "en", "train").rows[:13], replace(RECIPE, mask_probability=0.3))
    batch = make_batch(encoded, np.arange(13))
    if format == "masked_lm":
        batch = Corruption(objective="masked", recipe=RECIPE, vocabulary=22, mask=4, sentinels=(), end=2)(batch, 0)
    found = []
    for parts in (1, count):
        model.zero_grad()
        losses = [model(part, task.name)[0] * weight for part, weight in pieces(batch, encoded.example_targets, parts) if weight]
        sum(losses).backward()
        found.append((sum(losses).detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (loss, whole), (summed, parted) = found
    torch.testing.assert_close(loss, summed, atol=1e-6, rtol=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parted[name], atol=1e-6, rtol=1e-4, msg=name)


def test_a_small_memory_is_found_out_by_trying(tasks, tmp_path, monkeypatch):
    """Batches over 100 tokens do not fit: the training goes on in pieces and says so; without dropout its losses are those of whole batches."""
    data = {"toy_pair": random_encoded(np.random.default_rng(3))}
    def make():
        model = large_model([tasks["sequence_classification"]])
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        return model
    model = make()
    model.encoder.config.attention_probs_dropout_prob = 0.0
    for layer in model.encoder.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    straight = trained(model, data, tmp_path / "straight")
    forward = StageModel.forward

    def small(self, batch, task, padded=False):
        if self.training and batch.input_ids.numel() > 100:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, batch, task, padded)
    monkeypatch.setattr(StageModel, "forward", small)
    again = make()
    for layer in again.encoder.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    found = trained(again, data, tmp_path / "pieces")
    assert found.progress.pieces in (2, 4) and found.facts["pieces"] == found.progress.pieces and "pieces" not in straight.facts
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name], atol=2e-3, rtol=1e-3, msg=name)
    monkeypatch.setattr(StageModel, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(XtransferError, match="does not fit into the GPU's memory and cannot be cut \\(its pieces are single examples\\)"):
        trained(make(), data, tmp_path / "never")
