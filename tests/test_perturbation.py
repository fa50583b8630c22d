"""Perturbed embeddings: the right tokens, the declared length, the direction that hurts, only in training, resumed exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import xtransfer.training
from test_adapters import copy_of, every_family, family  # noqa: F401  fixtures
from test_modeling import model_of, random_batch
from test_training import RECIPE, Killed, data, log_of, trained, weights_equal  # noqa: F401  `data` is a fixture
from xtransfer.core import XtransferError
from xtransfer.perturbation import moved_embeddings, perturbations, perturbed

NOISE, ADVERSARIAL = (replace(RECIPE, perturbation=kind, perturbation_size=0.1) for kind in ("noise", "adversarial"))


@every_family
@pytest.mark.parametrize("padded", (False, True), ids=("as trained", "padded"))
def test_moving_an_embedding_to_another_word_is_reading_that_word(family, padded):  # noqa: F811
    """Some tokens' embeddings are moved to where other tokens' are: the states are those of the other text, and back outside the context."""
    _, _, _, make, _, _, batches = family
    model, batch = make().eval(), batches["toy_tags"]
    rng = np.random.default_rng(0)
    other = torch.where(torch.from_numpy(rng.random(len(batch.input_ids)) < 0.4), torch.from_numpy(rng.integers(5, 40, len(batch.input_ids))), batch.input_ids)
    with torch.no_grad():
        table = model.text.get_input_embeddings()
        before, wanted = model.states(batch, padded=padded), model.states(replace(batch, input_ids=other), padded=padded)
        with moved_embeddings(model, batch, table(other) - table(batch.input_ids)):
            moved = model.states(batch, padded=padded)
        after = model.states(batch, padded=padded)
    assert (wanted - before).abs().max() > 0.1
    torch.testing.assert_close(moved, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(after, before) and not table._forward_hooks


@every_family
@pytest.mark.parametrize("recipe", (NOISE, ADVERSARIAL), ids=lambda r: r.perturbation)
def test_every_family_is_perturbed_in_every_format(family, recipe):  # noqa: F811
    _, _, _, make, _, _, batches = family
    model = make().eval()
    for name, batch in batches.items():
        model.zero_grad()
        delta = perturbations(model, batch, name, recipe, seed=3)
        lengths, mean = delta.norm(dim=1), model.text.get_input_embeddings()(batch.input_ids).norm(dim=1).mean()
        read = lengths > 0  # tokens that the loss does not depend on have no gradient
        assert read.float().mean() > 0.5 and torch.allclose(lengths[read], 0.1 * mean, rtol=1e-4)
        assert recipe is ADVERSARIAL or read.all()
        clean, _ = model(batch, name)
        with perturbed(model, batch, name, recipe, seed=3):
            loss, _ = model(batch, name)
        assert loss != clean and (recipe is NOISE or loss > clean)
        assert all(p.grad is None for p in model.parameters()), "the direction is found without touching the weights' gradients"
        loss.backward()
        assert model.text.get_input_embeddings().weight.grad is not None


def test_noise_follows_from_the_seed_and_is_a_random_direction(toys):
    model, batch = model_of(), random_batch([9] * 40, "toy_pair", 1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = (perturbations(model, batch, "toy_pair", NOISE, seed) for seed in (5, 5, 6))
    assert torch.equal(one, same) and torch.equal(torch.get_rng_state(), before), "dropout's generator has no part in it"
    cosine = torch.nn.functional.cosine_similarity(one, other)
    assert abs(float(cosine.mean())) < 4 / np.sqrt(len(one) * 16) and 0.15 < float(cosine.std()) < 0.35, "1 / sqrt(16) for directions in 16 dimensions"


def test_the_adversary_sees_the_dropout_that_trains_and_leaves_the_generator(toys):
    model, batch = model_of().train(), random_batch([9] * 40, "toy_pair", 1)
    torch.manual_seed(7)
    clean, _ = model(batch, "toy_pair")
    after = torch.get_rng_state()
    torch.manual_seed(7)
    with perturbed(model, batch, "toy_pair", replace(ADVERSARIAL, perturbation_size=1e-3), seed=0):
        loss, _ = model(batch, "toy_pair")
    assert torch.equal(torch.get_rng_state(), after) and 0 < float((loss - clean).detach()) < 0.05


@pytest.mark.parametrize("size", (0.01, 0.05, 0.2))
def test_the_adversarial_loss_is_above_the_clean_one_and_above_noise(size, toys):
    model = model_of(initializer_range=0.3).eval()
    for seed in range(5):
        batch, losses = random_batch(None, "toy_pair", seed), {}
        for recipe in (replace(NOISE, perturbation="none"), NOISE, ADVERSARIAL):
            with torch.no_grad() if recipe is not ADVERSARIAL else torch.enable_grad(), perturbed(model, batch, "toy_pair", replace(recipe, perturbation_size=size), seed):
                losses[recipe.perturbation] = model(batch, "toy_pair")[0].item()
        assert losses["adversarial"] > losses["none"] and losses["adversarial"] > losses["noise"]


@pytest.mark.parametrize("changed", ({"perturbation": "noise"}, {"perturbation": "adversarial"}, {"perturbation_size": 0.5}), ids=str)
def test_size_0_and_no_kind_are_plain_training_to_the_bit(changed, data, tmp_path):  # noqa: F811
    plain, _ = trained(data, tmp_path / "plain")
    same, _ = trained(data, tmp_path / "same", replace(RECIPE, **changed))
    assert weights_equal(plain, same) and log_of(tmp_path / "plain") == log_of(tmp_path / "same")


@pytest.mark.parametrize("recipe", (NOISE, ADVERSARIAL), ids=lambda r: r.perturbation)
def test_perturbed_training_differs_and_is_resumed_bit_for_bit(recipe, data, tmp_path, monkeypatch):  # noqa: F811
    plain, straight = trained(data, tmp_path / "plain")[0], trained(data, tmp_path / "straight", recipe)[0]
    assert not weights_equal(plain, straight)
    for moment in (4, "dev", 9):
        with pytest.raises(Killed):
            trained(data, tmp_path / "broken", recipe, die_at=moment, monkeypatch=monkeypatch, save_seconds=0)
    again, _ = trained(data, tmp_path / "broken", recipe)
    assert weights_equal(straight, again) and log_of(tmp_path / "straight") == log_of(tmp_path / "broken")


@pytest.mark.parametrize("recipe", (NOISE, ADVERSARIAL), ids=lambda r: r.perturbation)
def test_scoring_is_never_perturbed(recipe, data, tmp_path, monkeypatch):  # noqa: F811
    """While development data are scored nothing hangs on the table; every step of training has asked for its perturbation once."""
    asked, tables = [], []
    real = xtransfer.training.perturbed

    def counted(model, batch, task, recipe, seed):
        tables.append(model.text.get_input_embeddings())
        asked.append(seed)
        assert model.training
        return real(model, batch, task, recipe, seed)

    def clean():
        while True:
            assert not tables[-1]._forward_hooks
            yield 50.0
    monkeypatch.setattr(xtransfer.training, "perturbed", counted)
    model, _ = trained(data, tmp_path, recipe, scores=clean())
    assert len(asked) == len(set(asked)) == 30 and not model.text.get_input_embeddings()._forward_hooks


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("recipe", (NOISE, ADVERSARIAL), ids=lambda r: r.perturbation)
def test_with_adapters_bfloat16_and_checkpointing(recipe, data, tmp_path):  # noqa: F811
    recipe = replace(recipe, lora_rank=2, precision="bfloat16", layer_mix=True, max_steps=6)
    found = [trained(data, tmp_path / str(twice), replace(recipe, gradient_checkpointing=twice))[0] for twice in (False, True)]
    assert weights_equal(*found)


@pytest.mark.parametrize(("changed", "said"), [({"perturbation": "noice"}, "did you mean 'noise'"), ({"perturbation": "noise", "perturbation_size": -1.0}, "perturbation_size -1.0")])
def test_a_perturbation_that_there_is_not_is_one_sentence(changed, said, toys):
    with pytest.raises(XtransferError, match=said) as error:
        perturbations(model_of(), random_batch(None, "toy_pair", 0), "toy_pair", replace(RECIPE, **changed), 0)
    assert "\n" not in str(error.value)


def test_an_interrupted_pass_leaves_no_hook(toys):
    model, batch = model_of(), random_batch(None, "toy_pair", 0)
    with pytest.raises(KeyboardInterrupt), perturbed(model, batch, "toy_pair", NOISE, 0):
        raise KeyboardInterrupt
    assert not model.text.get_input_embeddings()._forward_hooks
    with pytest.raises(XtransferError, match="read 0 of"), perturbed(model, batch, "toy_pair", NOISE, 0):
        pass  # a model that does not ask its table
