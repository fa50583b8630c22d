"""The flat row computes what a padded batch computes, for every head, and checkpoints are what transformers expects."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from xtransfer.core import XtransferError
from xtransfer.encoding import Batch, encode_sentences, make_batch
from xtransfer.modeling import StageModel, load_encoder, load_heads, load_tokenizer, save_checkpoint
from xtransfer.tasks import TASKS

BERT = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 130, "pad_token_id": 1}
FORMATS = {"toy_pair": "label", "toy_choice": "label", "toy_tags": "tag", "toy_qa": "span", "toy_text": "masked", "toy_ranked": "relevant"}
SHAPES = {"random": None, "one-token rows": [1, 1, 1, 5, 1, 7], "one row": [9], "one row of one token": [1], "equal lengths": [6] * 12, "full rows": [128] * 5, "a prime number of rows": [3] * 6 + [128] + [2] * 6}


def model_of(kind="xlm-roberta", seed=0, **config):
    """A tiny model with a head of every format."""
    from xtransfer.backbones import BACKBONES

    backbone = BACKBONES["toy-encoder"]
    backbone = replace(backbone, config=(dict(backbone.config) if kind == "xlm-roberta" else BERT) | config)
    return StageModel(load_encoder(backbone, backbone.build_tokenizer(), seed), [TASKS[n] for n in FORMATS], seed)


def random_batch(lengths, name, seed):
    """Random tokens and targets of given lengths for a head; two sequences make an example of choices or windows."""
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, 60, 17) if lengths is None else np.array(lengths))
    lengths = np.append(lengths, lengths[-1]) if name == "toy_ranked" and len(lengths) % 2 else lengths  # a query and a candidate each
    n, total = len(lengths), int(lengths.sum())
    per = 2 if name == "toy_ranked" else 1 if name != "toy_choice" or n == 1 else n if n % 2 else 2
    order = rng.permutation(n)
    examples = n // per
    targets = {"toy_pair": rng.integers(0, 2, examples), "toy_choice": rng.integers(0, per, examples),
               "toy_tags": np.where(rng.random(total) < 0.5, rng.integers(0, 2, total), -100), "toy_text": np.where(rng.random(total) < 0.3, rng.integers(0, 22, total), -100),
               "toy_qa": np.stack([rng.integers(0, lengths), rng.integers(0, lengths)], axis=1), "toy_ranked": rng.integers(0, 3 * examples, (examples, 2))}[name]
    if name in ("toy_tags", "toy_text"):
        targets[0] = 1
    return Batch(input_ids=torch.from_numpy(rng.integers(0, 22, total)), lengths=tuple(lengths.tolist()), example=torch.from_numpy(order // per), within=torch.from_numpy(order % per),
                 sequence=np.arange(n), examples=examples, targets={FORMATS[name]: torch.from_numpy(targets)})


@pytest.mark.parametrize("kind", ("xlm-roberta", "bert"))
@pytest.mark.parametrize("shape", SHAPES)
def test_flat_equals_padded_for_every_head(kind, shape, toys):
    model = model_of(kind, initializer_range=0.3).eval()
    model.heads["toy_ranked"].scale.data.fill_(1.0)  # it multiplies rounding errors too
    for seed, name in enumerate(FORMATS):
        batch, found = random_batch(SHAPES[shape], name, seed), []
        for padded in (False, True):
            model.zero_grad()
            loss, logits = model(batch, name, padded=padded)
            loss.backward()
            found.append((loss.detach(), logits.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}))
        (loss, logits, gradients), (loss2, logits2, gradients2) = found
        torch.testing.assert_close(loss, loss2, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits, logits2, atol=1e-5, rtol=0)
        largest = max(float(g.abs().max()) for g in gradients2.values())
        assert set(gradients) == set(gradients2), set(gradients) ^ set(gradients2)
        assert largest > 1e-3 or len(batch.lengths) <= 2 and name in ("toy_choice", "toy_qa", "toy_ranked"), "without something to choose from there is no gradient"
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, gradients2[key], atol=1e-5 * max(1, largest), rtol=0)


@pytest.mark.parametrize("kind", ("xlm-roberta", "bert"))
def test_states_equal_the_stock_model_called_as_its_users_call_it(kind, toys, tmp_path):
    from transformers import AutoModel

    model = model_of(kind, initializer_range=0.3).eval()
    model.encoder.save_pretrained(tmp_path)
    stock = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    batch = random_batch([3, 4, 9, 9, 20], "toy_pair", 5)
    ids = batch.input_ids.clone()
    ids[ids == 1] = 7  # XLM-R derives positions from padding tokens
    with torch.no_grad():
        flat, begin = model.states(replace(batch, input_ids=ids)), 0
        for length in batch.lengths:
            alone = stock(input_ids=ids[None, begin:begin + length]).last_hidden_state[0]
            torch.testing.assert_close(flat[begin:begin + length], alone, atol=1e-5, rtol=0)
            begin += length


def test_sequences_do_not_see_each_other(toys):
    model = model_of(initializer_range=0.3).eval()
    batch = random_batch([2, 5, 5, 8, 13, 13, 40, 41, 60], "toy_pair", 1)
    begin = np.concatenate([[0], np.cumsum(batch.lengths)])
    with torch.no_grad():
        before = model.states(batch)
        for changed in range(len(batch.lengths)):
            ids = batch.input_ids.clone()
            inside = slice(begin[changed], begin[changed + 1])
            ids[inside] = (ids[inside] + 3) % 22
            after = model.states(replace(batch, input_ids=ids))
            others = torch.ones(len(ids), dtype=torch.bool)
            others[inside] = False
            torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=0)
            assert (after[inside] - before[inside]).abs().max() > 1e-2


def test_attention_dropout_works_in_training_only(toys):
    batch = random_batch([8] * 40, "toy_pair", 2)
    states = {}
    for p in (0.0, 0.5):
        model = model_of(initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=p)
        with torch.no_grad():
            states[p] = model.eval().states(batch), model.train().states(batch), torch.stack([model.states(batch) for _ in range(60)])
    assert torch.equal(states[0.0][0], states[0.0][1]) and torch.equal(states[0.5][0], states[0.0][0])
    assert (states[0.5][1] - states[0.5][0]).abs().mean() > 0.05
    assert states[0.5][2].std(0).mean() > 0.05 and states[0.0][2].std(0).max() == 0


def test_a_checkpoint_gives_the_same_predictions_and_loads_in_transformers(toys, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    from xtransfer.backbones import BACKBONES

    backbone, model = BACKBONES["toy-encoder"], model_of(initializer_range=0.3).eval()
    save_checkpoint(model, backbone.build_tokenizer(), tmp_path)
    assert not [p.name for p in tmp_path.rglob("*") if p.suffix not in (".json", ".safetensors")]
    tokenizer = load_tokenizer(backbone, tmp_path)
    again = StageModel(load_encoder(backbone, tokenizer, 9, tmp_path), [TASKS[n] for n in FORMATS], 9).eval()
    assert load_heads(again, tmp_path, list(FORMATS)) == list(FORMATS)
    texts = ["a bc", "hhh g ? f", "d"]
    assert encode_sentences(tokenizer, texts, 32).ids.tolist() == encode_sentences(backbone.build_tokenizer(), texts, 32).ids.tolist()
    with torch.no_grad():
        for name in FORMATS:
            batch = random_batch(None, name, 3)
            assert torch.equal(model(batch, name)[1], again(batch, name)[1])
    stock, words = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        flat = model.states(make_batch(encode_sentences(tokenizer, ["a bc gg"], 32), np.arange(1)))
        torch.testing.assert_close(stock.eval()(**words("a bc gg", return_tensors="pt")).last_hidden_state[0], flat, atol=1e-5, rtol=0)


@pytest.mark.parametrize("damage", ("truncated weights", "no weights", "foreign configuration", "other width", "more words", "missing weights"))
def test_a_checkpoint_that_does_not_fit_is_one_sentence(damage, toys, tmp_path):
    import json

    from xtransfer.backbones import BACKBONES

    backbone, model = BACKBONES["toy-encoder"], model_of()
    tokenizer = backbone.build_tokenizer()
    save_checkpoint(model, tokenizer, tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    match damage:
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:500])
        case "no weights":
            weights.unlink()
        case "foreign configuration":
            config.write_text("{}")
        case "other width":
            backbone = replace(backbone, hidden_size=32)
        case "more words":
            tokenizer.add_tokens(["zzz"])
        case "missing weights":  # a layer that the file does not hold would silently be random
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(XtransferError) as error:
        load_encoder(backbone, tokenizer, 0, tmp_path)
    assert "\n" not in str(error.value)


def test_a_head_for_other_labels_is_one_sentence(toys, tmp_path):
    from xtransfer.backbones import BACKBONES

    tokenizer = BACKBONES["toy-encoder"].build_tokenizer()
    save_checkpoint(model_of(), tokenizer, tmp_path)
    wider = replace(TASKS["toy_pair"], labels=("yes", "no", "perhaps"))
    with pytest.raises(XtransferError, match="toy_pair"):
        load_heads(StageModel(model_of().encoder, [wider], 0), tmp_path, ["toy_pair"])


def test_weights_follow_from_the_seed_alone(toys):
    torch.manual_seed(1)
    one = model_of(seed=3).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two, other = model_of(seed=3).state_dict(), model_of(seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert any(not torch.equal(v, other[k]) for k, v in one.items() if k.startswith("heads"))


@settings(deadline=None, max_examples=25)
@given(relevant=st.lists(st.lists(st.integers(-1, 4), min_size=2, max_size=2), min_size=1, max_size=7), seed=st.integers(0, 2**20))
def test_the_in_batch_loss_equals_the_plain_formula(relevant, seed):
    """A query's own candidate against those of the batch that are not right for it, one query at a time."""
    from xtransfer.heads import DualEncoderHead

    relevant, rng = [[abs(first), second] for first, second in relevant], np.random.default_rng(seed)
    n = len(relevant)
    torch.manual_seed(seed)
    head, lengths = DualEncoderHead(8, 0, 0.1), np.sort(rng.integers(1, 9, 2 * n))
    states, order = torch.randn(int(lengths.sum()), 8), rng.permutation(2 * n)
    batch = Batch(input_ids=torch.zeros(len(states), dtype=torch.long), lengths=tuple(lengths.tolist()), example=torch.from_numpy(order // 2), within=torch.from_numpy(order % 2),
                  sequence=np.arange(2 * n), examples=n, targets={"relevant": torch.tensor(relevant)})
    with torch.no_grad():
        loss, logits = head(states, batch)
        first = np.cumsum(lengths) - lengths
        unit = torch.nn.functional.normalize(torch.tanh(head.dense(states[first])), dim=1)
    place = {(e, w): unit[s].double().numpy() for s, (e, w) in enumerate(zip(order // 2, order % 2))}
    losses = []
    for i in range(n):
        wrong = [j for j in range(n) if j != i and relevant[j][0] not in relevant[i]]
        scores = np.array([100 * place[i, 0] @ place[j, 1] for j in (i, *wrong)])
        losses.append(np.log(np.exp(scores - scores[0]).sum()))
        assert {j for j in range(n) if logits[i, j].isinf()} == set(range(n)) - {i, *wrong}
    assert float(loss) == pytest.approx(np.mean(losses), abs=1e-4)


def test_a_head_goes_on_from_the_head_that_its_task_continues(toys, tmp_path):
    """COPA's way: another task's head of the same shape; one of another shape is refused, one that is not there leaves the new head as it is."""
    from xtransfer.backbones import BACKBONES

    before = model_of(seed=1)
    save_checkpoint(before, BACKBONES["toy-encoder"].build_tokenizer(), tmp_path)
    then = StageModel(model_of().encoder, [replace(TASKS["toy_choice"], name="later"), TASKS["toy_pair"]], 5)
    fresh = {k: v.clone() for k, v in then.state_dict().items()}
    assert load_heads(then, tmp_path, {"later": "toy_choice", "toy_pair": "never_trained"}) == ["later"]
    for key, value in then.heads["later"].state_dict().items():
        assert torch.equal(value, before.heads["toy_choice"].state_dict()[key])
    assert all(torch.equal(v, fresh[f"heads.toy_pair.{k}"]) for k, v in then.heads["toy_pair"].state_dict().items())
    with pytest.raises(XtransferError, match="toy_pair .* later"):
        load_heads(then, tmp_path, {"later": "toy_pair"})
