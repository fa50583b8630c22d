"""Adapters, gradient checkpointing, bfloat16 and layer mixes: what is trained, what is left alone, what is handed over, in every family."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from copies import COPIES, build
from test_modeling import model_of
from test_training import RECIPE, TRAINED, Killed, data, log_of, trained, weights_equal  # noqa: F401  `data` is a fixture
from xtransfer.adapters import add_adapters, arithmetic, linear_layers, merge_adapters, use_checkpointing
from xtransfer.backbones import BACKBONES
from xtransfer.core import XtransferError
from xtransfer.encoding import encode, make_batch
from xtransfer.modeling import StageModel, load_encoder, load_heads, load_tokenizer, save_checkpoint
from xtransfer.objectives import make_corruption
from xtransfer.studies import Mixing, Recipe
from xtransfer.tasks import TASKS, load_examples
from xtransfer.training import fit, trained_tensors

ADAPTED = replace(RECIPE, lora_rank=4, lora_alpha=8.0)
SHORT = Recipe(name="short", learning_rate=3e-3, batch_size=4, max_steps=3, max_length=60, stride=8, evaluations=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def copy_of(tmp_path_factory):
    """name -> the folder of a family's copy, written once."""
    return cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture
def family(request, toys, copy_of):
    """A stage's model of a family with two heads, tokenizer, encoded data, and how text is corrupted; the second task is text where the family learns from it."""
    backbone = BACKBONES[str(copy_of(request.param))]
    tokenizer, kind = load_tokenizer(backbone), backbone.kind
    tasks = [TASKS["toy_tags"], TASKS["toy_pair" if kind.objective == "none" else "toy_text"]]
    data = {t.name: encode(tokenizer, t, load_examples(t, "en", "train").rows, SHORT) for t in tasks}

    def make(**options):
        model = StageModel(load_encoder(backbone, tokenizer, 0), tasks, 0, backbone, **options)
        return model

    corrupt = None if kind.objective == "none" else make_corruption(tokenizer, kind.objective, SHORT, make().encoder.get_input_embeddings().num_embeddings)
    batches = {n: make_batch(d, np.arange(6)) for n, d in data.items()}
    batches = {n: corrupt(b, 5) if TASKS[n].format == "masked_lm" else b for n, b in batches.items()}
    return backbone, tokenizer, tasks, make, data, corrupt, batches


every_family = pytest.mark.parametrize("family", COPIES, indirect=True)


def fitted(model, data, corrupt, recipe, folder):
    return fit(model, data, lambda: {n: 50.0 for n in data}, recipe, Mixing(kind="uniform"), 0, folder, corrupt)


def logits_of(model, batches):
    model.eval()
    with torch.no_grad():
        return {n: model(b, n)[1] for n, b in batches.items()}


# ---- adapters

@every_family
def test_adapters_train_and_merge_in_every_family(family, tmp_path):
    backbone, tokenizer, tasks, make, data, corrupt, batches = family
    model = make()
    before = {n: p.clone() for n, p in model.named_parameters()}
    names = linear_layers(model)
    assert {0, 1} <= set(names.values()) and not any(n.rpartition(".")[2] in ("lm_head", "head", "transformation") for n in names)
    assert any("decoder" in n for n in names) == (backbone.kind.objective == "spans"), "the decoder of an encoder-decoder is adapted where it is trained"
    fitted(model, data, corrupt, replace(SHORT, lora_rank=2, lora_layers=(1,), weight_decay=0.1), tmp_path / "training")

    adapters = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert len(adapters) == 2 * sum(number == 1 for number in names.values()) and all(p.requires_grad for p in adapters.values())
    plain = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters() if n not in adapters}
    assert set(plain) == set(before)
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in plain.items() if n.startswith("encoder.")), "frozen weights are the same to the bit"
    assert any(not torch.equal(p, before[n]) for n, p in plain.items() if n.startswith("heads.toy_tags"))
    stored = set(load_file(next((tmp_path / "training").glob("best-*")))) | {k.removeprefix("model.") for k in load_file(next((tmp_path / "training").glob("state-*")) / "tensors.safetensors") if k.startswith("model.")}
    assert not any(n.startswith("encoder.") and ".lora_" not in n and not n.endswith("position_ids") for n in stored), "only what is trained is written"

    apart = logits_of(model, batches)
    merge_adapters(model)
    merged = logits_of(model, batches)
    for name, found in merged.items():
        torch.testing.assert_close(found, apart[name], atol=1e-5, rtol=1e-5)
    changed = {n.removeprefix("encoder.").removesuffix(".weight") for n, p in model.named_parameters() if n.startswith("encoder.") and not torch.equal(p, before[n])}
    assert changed and changed <= {n for n, number in names.items() if number == 1}, "only the chosen layer changed"

    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    again = StageModel(load_encoder(backbone, load_tokenizer(backbone, tmp_path / "checkpoint"), 9, tmp_path / "checkpoint"), tasks, 9, backbone)
    load_heads(again, tmp_path / "checkpoint", [t.name for t in tasks])
    for name, found in logits_of(again, batches).items():
        assert torch.equal(found, merged[name]), "a child reads plain weights"


def test_rank_0_is_no_adapters(data, tmp_path):  # noqa: F811
    plain, _ = trained(data, tmp_path / "plain")
    none, _ = trained(data, tmp_path / "none", replace(RECIPE, lora_rank=0, lora_alpha=99.0))
    assert weights_equal(plain, none) and trained_tensors(plain).keys() == plain.state_dict().keys()


@pytest.mark.parametrize("moments", [[1], [0, 7, 4], ["dev", 9]], ids=str)
def test_training_with_adapters_is_resumed_bit_for_bit(moments, data, tmp_path, monkeypatch):  # noqa: F811
    straight, done = trained(data, tmp_path / "straight", ADAPTED)
    for moment in moments:
        with pytest.raises(Killed):
            trained(data, tmp_path / "broken", ADAPTED, die_at=moment, monkeypatch=monkeypatch, save_seconds=0)
    again, resumed = trained(data, tmp_path / "broken", ADAPTED)
    assert weights_equal(straight, again) and log_of(tmp_path / "straight") == log_of(tmp_path / "broken")
    for selection in ("best", "last"):
        done.load(straight, selection), resumed.load(again, selection)
        assert weights_equal(straight, again)


def test_best_adapters_come_back(data, tmp_path):  # noqa: F811
    model, done = trained(data, tmp_path, ADAPTED, scores=iter([10.0, 30.0, 20.0]))
    last = {k: v.clone() for k, v in model.state_dict().items()}
    done.load(model, "best")
    assert any(not torch.equal(v, model.state_dict()[k]) for k, v in last.items() if "lora_B" in k)
    done.load(model, "last")
    assert weights_equal(model, type("last", (), {"state_dict": lambda _: last})())


def test_states_with_adapters_are_small(data, tmp_path):  # noqa: F811
    trained(data, tmp_path / "all"), trained(data, tmp_path / "few", ADAPTED)
    model = model_of()
    embeddings = sum(p.numel() for n, p in model.named_parameters() if "embeddings" in n)
    whole, few = (next((tmp_path / name).glob("state-*")) / "tensors.safetensors" for name in ("all", "few"))
    assert not any("embeddings" in key for key in load_file(few)) and whole.stat().st_size - few.stat().st_size > 12 * embeddings, "neither weights nor moments of what is frozen"


def test_adapters_follow_from_the_seed_alone(toys):
    models = []
    for noise, seed in ((1, 3), (2, 3), (1, 4)):
        model = model_of()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        add_adapters(model, ADAPTED, seed)
        assert torch.equal(torch.get_rng_state(), before)
        models.append(model)
    assert weights_equal(models[0], models[1]) and not weights_equal(models[0], models[2])


@pytest.mark.parametrize(("recipe", "config", "said"), [
    ({"lora_rank": 4, "lora_layers": (0, 7)}, {}, r"layer 7, but .* xlm-roberta has the layers 0 to 1\."),
    ({"lora_rank": -1}, {}, "lora_rank -1"),
    ({"lora_layers": (0,)}, {}, "without a lora_rank"),
    ({"lora_rank": 4}, {"num_hidden_layers": 0}, "no linear layers"),
])
def test_adapters_that_cannot_be_are_one_sentence(recipe, config, said, toys):
    with pytest.raises(XtransferError, match=said) as error:
        add_adapters(model_of(**config), replace(RECIPE, **recipe), 0)
    assert "\n" not in str(error.value)


def test_a_state_of_another_way_of_training_is_one_sentence(data, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(Killed):
        trained(data, tmp_path, ADAPTED, die_at=3, monkeypatch=monkeypatch, save_seconds=0)
    with pytest.raises(XtransferError, match="delete that folder") as error:
        trained(data, tmp_path)
    assert "\n" not in str(error.value)


# ---- gradient checkpointing

def gradients(model, batches, padded):
    """Loss and gradients of every task, with dropout."""
    found = {}
    for name, batch in batches.items():
        model.train().zero_grad()
        torch.manual_seed(3)
        kept = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.__setitem__(0, kept[0] + t.numel()) or t, lambda t: t):
            loss, _ = model(batch, name, padded=padded)
        loss.backward()
        found[name] = loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, kept[0]
    return found


@every_family
@pytest.mark.parametrize("padded", (False, True), ids=("as trained", "padded"))
def test_gradient_checkpointing_changes_memory_alone(family, padded):
    _, _, _, make, _, _, batches = family
    plain, twice = make(), make()
    use_checkpointing(twice, replace(SHORT, gradient_checkpointing=True))
    one, two = gradients(plain, batches, padded), gradients(twice, batches, padded)
    for name in batches:
        assert torch.equal(one[name][0], two[name][0]) and one[name][1].keys() == two[name][1].keys()
        for key, gradient in one[name][1].items():
            assert torch.equal(gradient, two[name][1][key]), key
        assert two[name][2] < 0.8 * one[name][2], "less is kept for the backward pass"


def test_gradient_checkpointing_with_adapters_and_frozen_embeddings(data, tmp_path):  # noqa: F811
    for recipe in (ADAPTED, replace(RECIPE, freeze_embeddings=True)):
        found = [trained(data, tmp_path / f"{recipe.lora_rank}-{checkpointing}", replace(recipe, gradient_checkpointing=checkpointing))[0] for checkpointing in (False, True)]
        assert weights_equal(*found)


def test_a_family_without_gradient_checkpointing_is_one_sentence(toys, monkeypatch):
    model = model_of()
    monkeypatch.setattr(type(model.encoder), "supports_gradient_checkpointing", False)
    with pytest.raises(XtransferError, match="xlm-roberta does not have"):
        use_checkpointing(model, replace(RECIPE, gradient_checkpointing=True))


# ---- precision

@pytest.mark.usefixtures("fast_bfloat16")
@every_family
def test_bfloat16_is_finite_and_close_in_every_family(family, tmp_path):
    _, _, _, make, data, corrupt, batches = family
    model, exact = make(), {}
    for name, batch in batches.items():
        model.eval()
        with torch.no_grad():
            exact[name] = model(batch, name)
    for name, batch in batches.items():
        with torch.no_grad(), arithmetic(replace(SHORT, precision="bfloat16"), CPU):
            loss, logits = model(batch, name)
        assert torch.isfinite(loss) and loss.dtype == logits.dtype == torch.float32
        assert abs(float(loss - exact[name][0])) < 0.05 * float(exact[name][0])
        assert not torch.equal(logits, exact[name][1])
    done = fitted(model, data, corrupt, replace(SHORT, precision="bfloat16"), tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and np.isfinite(done.progress.loss_sum)
    tensors = load_file(tmp_path / f"state-{done.steps:08d}" / "tensors.safetensors")
    assert {v.dtype for k, v in tensors.items() if k.startswith("optimizer.")} == {torch.float32}, "moments too"


@pytest.mark.usefixtures("fast_bfloat16")
def test_scores_are_computed_in_the_recipes_precision_and_training_is_resumed(data, tmp_path, monkeypatch):  # noqa: F811
    recipe, seen = replace(RECIPE, precision="bfloat16"), []
    scores = (seen.append(torch.is_autocast_enabled("cpu")) or 50.0 for _ in range(99))
    trained(data, tmp_path / "scored", recipe, scores=scores)
    assert seen == [True] * 3 and not torch.is_autocast_enabled("cpu")
    straight, _ = trained(data, tmp_path / "straight", recipe)
    with pytest.raises(Killed):
        trained(data, tmp_path / "broken", recipe, die_at=7, monkeypatch=monkeypatch, save_seconds=0)
    assert weights_equal(straight, trained(data, tmp_path / "broken", recipe)[0])


@pytest.mark.parametrize("precision", ("float16", "bf16", "float64"))
def test_another_precision_is_one_sentence(precision):
    with pytest.raises(XtransferError, match="float32, bfloat16"):
        arithmetic(replace(RECIPE, precision=precision), CPU)


# ---- a mix of layers

@every_family
def test_a_layer_mix_reaches_all_layers_and_can_be_the_last(family, tmp_path):
    backbone, tokenizer, tasks, make, data, corrupt, batches = family
    plain, mixed = make().eval(), make(layer_mix=True).eval()
    mix = mixed.mixes["toy_tags"]
    loss, _ = mixed(batches["toy_tags"], "toy_tags")
    states = mixed.layers(batches["toy_tags"])
    assert len(states) == 3 == len(mix.weight)
    loss.backward()
    assert (mix.weight.grad.abs() > 0).all() and mix.scale.grad != 0, "every layer has its say"
    with torch.no_grad():
        mix.weight[-1] = 60.0
    with torch.no_grad():
        torch.testing.assert_close(mixed(batches["toy_tags"], "toy_tags")[1], plain(batches["toy_tags"], "toy_tags")[1], atol=1e-6, rtol=1e-6)

    model = make(layer_mix=True)
    fitted(model, data, corrupt, replace(SHORT, layer_mix=True), tmp_path / "training")
    assert (model.mixes["toy_tags"].weight != 0).all()
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    again = StageModel(load_encoder(backbone, load_tokenizer(backbone, tmp_path / "checkpoint"), 9, tmp_path / "checkpoint"), tasks, 9, backbone, layer_mix=True)
    load_heads(again, tmp_path / "checkpoint", [t.name for t in tasks])
    for name, found in logits_of(again, batches).items():
        assert torch.equal(found, logits_of(model, batches)[name])


# ---- whole runs

@pytest.mark.slow
def test_stages_with_everything_through_papermill(toys, tmp_path):
    """An intermediate stage with adapters, then a target with adapters, bfloat16, noise, a layer mix and checkpointing; a resumed run and a child see plain weights."""
    from transformers import AutoModel

    from xtransfer.records import run_folder
    from xtransfer.runs import execute
    from xtransfer.studies import Run, Stage

    first = Recipe(name="first", learning_rate=3e-3, batch_size=8, max_steps=12, max_length=96, stride=8, evaluations=2, dev_limit=10, lora_rank=4, lora_layers=(0,))
    last = replace(first, lora_layers=(), precision="bfloat16", perturbation="noise", perturbation_size=0.1, layer_mix=True, gradient_checkpointing=True)
    run = Run(backbone="toy-encoder", stages=(Stage(train=("toy_text",), recipe=replace(first, lora_rank=0, lora_layers=()), seed=0), Stage(train=("toy_qa",), recipe=first, seed=0),
                                              Stage(train=("toy_pair",), score=("toy_pair",), recipe=last, seed=0)))
    weights = []
    for depth in (1, 2, 3):
        part = replace(run, stages=run.stages[:depth])
        record = execute(part, tmp_path, declarations=[str(toys)])
        AutoModel.from_pretrained(run_folder(tmp_path, part) / "checkpoint")
        weights.append(load_file(run_folder(tmp_path, part) / "checkpoint" / "model.safetensors"))
    changed = [{k for k in weights[0] if not torch.equal(one[k], two[k])} for one, two in zip(weights, weights[1:])]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    assert changed[0] and all(re.search(r"layer\.0\..*weight", k) for k in changed[0]) and any("layer.1." in k for k in changed[1]) and not any("embeddings" in k for k in changed[1])
    assert {k: record.stages[-1]["recipe"].get(k) for k in ("lora_rank", "precision", "perturbation", "layer_mix")} == {"lora_rank": 4, "precision": "bfloat16", "perturbation": "noise", "layer_mix": True}
    assert record.parameters["recipe"]["gradient_checkpointing"] is True and replace(run, stages=(*run.stages[:2], replace(run.stages[2], recipe=replace(last, gradient_checkpointing=False)))).digest == run.digest
    assert len([s for s in record.scores if s.metric == "accuracy"]) == 2 * len(TASKS["toy_pair"].languages)
