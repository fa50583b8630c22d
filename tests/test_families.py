"""Every family goes through every format: train, stop, go on, save, load, predict; and computes what transformers computes from the same weights."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import transformers

import xtransfer.training
from copies import COPIES, build
from xtransfer.backbones import BACKBONES, FAMILIES, Backbone, unsuitable
from xtransfer.core import XtransferError
from xtransfer.encoding import Batch, encode, make_batch
from xtransfer.evaluation import make_evaluator, sentence_vectors
from xtransfer.modeling import StageModel, load_encoder, load_heads, load_tokenizer, save_checkpoint
from xtransfer.objectives import make_corruption
from xtransfer.studies import Mixing, Recipe
from xtransfer.tasks import TASKS, Source, Task, load_examples
from xtransfer.training import Sampler, fit

RECIPE = Recipe(name="test", learning_rate=3e-3, batch_size=3, max_steps=12, max_length=96, stride=8, evaluations=2)
FORMATS = {"sequence_classification": "toy_pair", "multiple_choice": "toy_choice", "token_classification": "toy_tags", "span_extraction": "toy_qa2", "masked_lm": "toy_text", "ranked_retrieval": "toy_ranked"}
CLIPS = ("clip", "clip_text_model", "metaclip_2", "metaclip_2_text_model", "siglip", "siglip_text_model", "siglip2", "siglip2_text_model")
WITHOUT_OBJECTIVE = ("mt5-encoder", "gemma3", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl", "qwen3_vl_text", *CLIPS)
REFUSED = {("span_extraction", name): "reads sequences of 96 tokens" for name in CLIPS} | {("ranked_retrieval", name): "reads sequences of 96 tokens" for name in CLIPS} \
    | {("masked_lm", name): "no way to predict tokens" for name in WITHOUT_OBJECTIVE}
SHAPES = {"mixed": (1, 2, 5, 9, 9, 13, 20, 30, 30), "one-token rows": (1, 1, 1, 1, 1, 7), "one token": (1,), "equal": (6,) * 9, "longest": (1, 3, None, None, None)}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    """One toy task of each format, by format; nothing stays registered."""
    from conftest import TOYS
    from xtransfer.studies import STUDIES, load_declarations

    before = [(registry, dict(registry)) for registry in (TASKS, BACKBONES, STUDIES)]
    load_declarations([str(TOYS)])
    found = {format: TASKS[name] for format, name in FORMATS.items()}
    for registry, entries in before:
        registry._entries = entries
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The backbone of a family's copy, read off its folder."""
    made: dict[str, Backbone] = {}

    def get(name):
        if name not in made:
            found = BACKBONES[str(build(name, tmp_path_factory.mktemp("copy") / name))]
            made[name] = replace(found, family="mt5-encoder") if name == "mt5-encoder" else found  # the one family that a checkpoint of another serves
        return made[name]
    return get


def text_part(whole):
    """The part of a stock model that reads text."""
    transformers.logging.set_verbosity_error()
    base = whole.base_model
    part = getattr(base, "language_model", None) or (base.text_model if hasattr(base, "vision_model") else None) or (base.encoder if base.config.is_encoder_decoder else base)
    return part.eval()


def stock(backbone, name):
    """The copy's weights as transformers' users load them."""
    return text_part(getattr(transformers, COPIES[name][0]).from_pretrained(backbone.folder, dtype=torch.float32))


def batch_of(lengths, words, longest=77):
    """Random tokens; None is a sequence of the longest length."""
    lengths, rng = [longest if n is None else n for n in lengths], np.random.default_rng(0)
    n = len(lengths)
    return Batch(input_ids=torch.from_numpy(rng.integers(6, words, sum(lengths))), lengths=tuple(lengths), example=torch.arange(n), within=torch.zeros(n, dtype=torch.long), sequence=np.arange(n), examples=n, targets={})


def test_every_family_has_a_copy():
    assert set(COPIES) == set(FAMILIES)
    assert {f for _, f in REFUSED} <= set(FAMILIES)


@pytest.mark.parametrize("name", COPIES)
def test_texts_are_laid_out_and_closed(name, copy):
    """Whatever its tokenizer does: batches begin at the left, a text has an end, and words alone are cut as inside a text."""
    backbone = copy(name)
    tokenizer = load_tokenizer(backbone)
    ids, single = tokenizer("ab c", "e")["input_ids"], tokenizer("ab c")["input_ids"]
    assert tokenizer.padding_side == "right" and ids[-1] == single[-1] == tokenizer.eos_token_id or name in ("bert", "distilbert") and ids[-1] == tokenizer.sep_token_id
    assert single == ids[:len(single)] and single[-1] in tokenizer.all_special_ids, "the first text of a pair is closed too"
    rows = [{"id": "", "tokens": ["ab", "c", "ab", "e"], "tags": ["O"] * 4}]
    begins = Task(name="tags", format="token_classification", kind="toy", source=Source(repo="generated"), languages=("en",), load=None, read=dict, labels=("O",))
    encoded = encode(tokenizer, begins, rows, RECIPE)
    inside = tokenizer(" ".join(["x", *rows[0]["tokens"]]))["input_ids"]  # the first word of a text may lack its space, none of these does
    first = encoded.token_targets["word"] == 0
    assert encoded.ids[first.argmax():].tolist() == inside[-(len(encoded.ids) - int(first.argmax())):]


@pytest.mark.parametrize("name", COPIES)
def test_flat_equals_padded_equals_stock(name, copy):
    backbone = copy(name)
    tokenizer = load_tokenizer(backbone)
    model, plain = StageModel(load_encoder(backbone, tokenizer, 0), (), 0, backbone).eval(), stock(backbone, name)
    for shape in SHAPES.values():
        batch = batch_of(shape, len(tokenizer), min(backbone.max_length, 128))
        with torch.no_grad():
            flat, padded = model.layers(batch), model.layers(batch, padded=True)
            assert torch.equal(model.states(batch), flat[-1])
            alone = [plain(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], output_hidden_states=True) for ids in batch.input_ids.split(batch.lengths)]
        assert len(flat) == len(padded) == backbone.layers + 1
        for layer, (one, two) in enumerate(zip(flat, padded)):
            wanted = torch.cat([(a.hidden_states[layer] if layer < backbone.layers else a.last_hidden_state)[0] for a in alone])
            scale = max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(one, two, atol=1e-5 * scale, rtol=0)
            torch.testing.assert_close(one, wanted, atol=1e-5 * scale, rtol=0)
    assert flat[-1].std() > 0.1 and (flat[-1] - flat[0]).abs().mean() > 0.05, "the layers do something"


@pytest.mark.parametrize(("name", "back", "ahead"), (("gemma3_text", 7, 0), ("gemma3", 7, 0), ("modernbert", 4, 4)))
def test_windows_slide(name, back, ahead, copy):
    """In the first layer of these copies a token sees no farther than its window, in the second everything."""
    backbone = copy(name)
    tokenizer = load_tokenizer(backbone)
    model = StageModel(load_encoder(backbone, tokenizer, 0), (), 0, backbone).eval()
    batch, changed = batch_of((3, 40), len(tokenizer)), 3 + 20
    ids = batch.input_ids.clone()
    ids[changed] = 6 + (ids[changed] - 5) % (len(tokenizer) - 6)
    for padded in (False, True):
        with torch.no_grad():
            before, after = model.layers(batch, padded=padded), model.layers(replace(batch, input_ids=ids), padded=padded)
        moved = [((a - b).abs().max(1).values > 1e-6).nonzero()[:, 0].tolist() for a, b in zip(before, after)]
        assert moved == [[changed], list(range(changed - ahead, changed + back + 1)), list(range(3 if ahead else changed, 43))]


@dataclass(frozen=True, kw_only=True)
class Journey:
    """One copy trained on all formats that it can learn: at the start, without a break, after one, and from the checkpoint."""
    backbone: Backbone
    tokenizer: object
    fresh: dict[str, torch.Tensor]
    straight: dict[str, torch.Tensor]
    resumed: StageModel
    later: StageModel
    trained: tuple[str, ...]  # formats
    states: list[str]  # what the interrupted training left on disk


class Killed(Exception):
    """Stands for kill -9."""


@pytest.fixture(scope="module")
def journey(tasks, copy, tmp_path_factory):
    made: dict[str, Journey] = {}

    def get(name):
        if name not in made:
            made[name] = travel(copy(name), tasks, tmp_path_factory.mktemp("journey"))
        return made[name]
    return get


def travel(backbone, tasks, folder):
    """Train a mixture of all formats, once straight and once with a break in the middle, and bring the second through a checkpoint."""
    recipe = replace(RECIPE, max_length=min(RECIPE.max_length, backbone.max_length))
    chosen = {format: task for format, task in tasks.items() if unsuitable(backbone, task, RECIPE.max_length) is None}
    tokenizer = load_tokenizer(backbone)
    data = {task.name: encode(tokenizer, task, load_examples(task, "en", "train").rows, recipe) for task in chosen.values()}

    def model(seed=0, source=None):
        return StageModel(load_encoder(backbone, tokenizer, seed, source), list(chosen.values()), seed, backbone)
    vocabulary = model().encoder.get_input_embeddings().num_embeddings
    corrupt = make_corruption(tokenizer, backbone.kind.objective, recipe, vocabulary) if "masked_lm" in chosen else None
    sizes, mixing = {name: encoded.examples for name, encoded in data.items()}, Mixing(kind="uniform")
    seed = next(s for s in itertools.count() if Sampler(sizes, recipe, mixing, s).shares.any(axis=0).all())  # in which every task has its turn

    def run(place, die_after=None):
        trained = model()
        with pytest.MonkeyPatch.context() as patched:
            if die_after is not None:
                left, real = iter(range(die_after)), xtransfer.training.make_batch
                patched.setattr(xtransfer.training, "make_batch", lambda *given: real(*given) if next(left, None) is not None else kill())
            fit(trained, data, lambda: {name: 0.0 for name in data}, recipe, mixing, seed, folder / place, corrupt, save_seconds=1e9)
        return trained

    def kill():
        raise Killed
    straight = run("straight")
    with pytest.raises(Killed):
        run("broken", die_after=8)
    states = [p.name for p in (folder / "broken").glob("state-*")]
    resumed = run("broken")
    save_checkpoint(resumed, tokenizer, folder / "checkpoint")
    tokenizer = load_tokenizer(backbone, folder / "checkpoint")
    later = model(1, folder / "checkpoint")
    assert load_heads(later, folder / "checkpoint", list(data)) == [n for n in data if later.heads[n].state_dict()]
    return Journey(backbone=backbone, tokenizer=tokenizer, fresh=model().state_dict(), straight=straight.state_dict(), resumed=resumed, later=later, trained=tuple(chosen), states=states)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", COPIES)
def test_every_format_is_trained_resumed_saved_and_predicted_or_refused(name, format, tasks, copy, journey):
    if (format, name) in REFUSED:
        reason = unsuitable(copy(name), tasks[format], RECIPE.max_length)
        assert REFUSED[format, name] in reason and "\n" not in reason
        if format == "masked_lm":
            tokenizer = load_tokenizer(copy(name))
            with pytest.raises(XtransferError, match=f"toy_text .* {name} has no way"):
                StageModel(load_encoder(copy(name), tokenizer, 0), [tasks[format]], 0, copy(name))
            with pytest.raises(XtransferError, match="predicts no tokens"):
                make_corruption(tokenizer, FAMILIES[name].objective, RECIPE, len(tokenizer))
        return
    found, task = journey(name), tasks[format]
    assert format in found.trained and found.states == ["state-00000006"]
    weights, head = found.resumed.state_dict(), f"heads.{task.name}."
    own = [k for k in weights if k.startswith(head)]
    assert bool(own) == (format != "masked_lm" or FAMILIES[name].objective == "masked"), "decoders predict with what they have"
    assert all(torch.equal(weights[k], found.straight[k]) for k in weights), "interrupted training goes on bit for bit"
    for part in (own, [k for k in weights if k.startswith("encoder.")]):
        assert not part or any(not torch.equal(weights[k], found.fresh[k]) for k in part) and all(weights[k].isfinite().all() for k in part)
    evaluator = make_evaluator(found.tokenizer, task, task, [load_examples(task, "en", "dev")], replace(RECIPE, max_length=min(RECIPE.max_length, found.backbone.max_length)))
    scores, predictions = evaluator.score(found.resumed, "last")
    assert (scores, predictions) == evaluator.score(found.later, "last")
    assert scores and all(0 <= s.value <= 100 for s in scores) and (len(predictions) == 23 or format == "masked_lm" or format == "ranked_retrieval" and len(predictions) == 28)


@pytest.mark.slow
@pytest.mark.parametrize("name", COPIES)
def test_vectors_are_means_over_the_stock_models_layer(name, copy, journey):
    backbone, sentences = copy(name), ["a bc", "h", "a bc", "ggg fff e d c b a"]
    tokenizer, plain = load_tokenizer(backbone), stock(backbone, name)
    fresh = StageModel(load_encoder(backbone, tokenizer, 0), (), 0, backbone)
    found, truncated = sentence_vectors(fresh, tokenizer, sentences, backbone.retrieval_layer, 32)
    assert truncated == 0 and found.shape == (4, 32)
    for sentence, vector in zip(sentences, found):
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        with torch.no_grad():
            wanted = plain(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states[backbone.retrieval_layer][0].mean(0)
        np.testing.assert_allclose(vector, wanted.numpy(), atol=1e-5 * max(1, float(wanted.abs().max())))
    trained = journey(name)
    one, two = (sentence_vectors(model, trained.tokenizer, sentences, backbone.retrieval_layer, 32)[0] for model in (trained.resumed, trained.later))
    assert np.array_equal(one, two) and not np.array_equal(one, found)


@pytest.mark.parametrize("name", COPIES)
def test_dropout_is_on_in_training_only_and_gives_no_nan(name, copy, tasks):
    backbone = copy(name)
    tokenizer = load_tokenizer(backbone)
    model = StageModel(load_encoder(backbone, tokenizer, 0), [tasks["sequence_classification"]], 0, backbone)
    for shape in ("mixed", "one-token rows", "one token"):
        batch = batch_of(SHAPES[shape], len(tokenizer))
        batch = replace(batch, targets={"label": torch.zeros(batch.examples, dtype=torch.long)})
        with torch.no_grad():
            still, again = (model.eval().states(batch) for _ in range(2))
            noisy, other = (model.train().states(batch) for _ in range(2))
        assert torch.equal(still, again) and noisy.isfinite().all()
        if shape == "mixed":
            assert not torch.equal(noisy, other) and not torch.equal(noisy, still)
        loss, _ = model(batch, "toy_pair")
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
