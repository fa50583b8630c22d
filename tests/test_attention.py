"""Attention over a flat row: kernels are used when they do what the groups do, and only then; the record says which way it went."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import xtransfer.attention as attention
from test_modeling import FORMATS, SHAPES, model_of, random_batch
from xtransfer.attention import KERNELS, Kernel, LengthGroups, attention_way, flat_attention, in_groups, kernel_for
from xtransfer.backbones import FAMILIES

CPU = torch.device("cpu")


def one_by_one(query, key, value, groups, dropout, scaling):
    """A kernel written plainly: every sequence alone."""
    rows = [x.split(groups.lengths.tolist()) for x in (query, key, value)]
    return torch.cat([F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in parts), dropout_p=dropout, scale=scaling, is_causal=groups.causal)[0].transpose(0, 1) for parts in zip(*rows)])


def raising(*given):
    raise RuntimeError("no kernel image is available for execution on the device")


class _OtherMask(torch.autograd.Function):
    """Drops in the backward pass other weights than in the forward pass."""

    @staticmethod
    def forward(ctx, query, key, value, groups, dropout, scaling):
        ctx.save_for_backward(query, key, value)
        ctx.others = (groups, dropout, scaling)
        return one_by_one(query, key, value, *ctx.others)

    @staticmethod
    def backward(ctx, gradient):
        given = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            found = torch.autograd.grad(one_by_one(*given, *ctx.others), given, gradient)
        return *found, None, None, None


WRONG = {
    "raising": (raising, "raises RuntimeError"),
    "blind to ends": (lambda q, k, v, g, p, s: in_groups(q, k, v, LengthGroups((len(q),), CPU, causal=g.causal), p, s), "differs by"),
    "looking the other way": (lambda q, k, v, g, p, s: in_groups(q, k, v, LengthGroups(g.lengths, CPU, causal=not g.causal), p, s), "differs by"),
    "without gradient": (lambda q, k, v, g, p, s: in_groups(q, k, v.detach(), g, p, s), "raises RuntimeError"),
    "wrong gradient": (lambda q, k, v, g, p, s: in_groups(q.detach() + 0.5 * (q - q.detach()), k, v, g, p, s), "differs by"),
    "a gradient that is no number": (lambda q, k, v, g, p, s: in_groups(q, k, v + 0 * v.abs().sqrt() * (v - v.detach()).sqrt(), g, p, s), "differs by nan"),
    "not a number": (lambda q, k, v, g, p, s: in_groups(q, k, v, g, p, s) * torch.nan, "differs by nan"),
    "without dropout": (lambda q, k, v, g, p, s: in_groups(q, k, v, g, 0.0, s), "drops other weights"),
    "dropout without scale": (lambda q, k, v, g, p, s: in_groups(q, k, v, g, p, s) * (1 - p), "drops other weights"),
    "another mask backwards": (_OtherMask.apply, "drops other weights"),
}


@pytest.fixture
def kernels(monkeypatch):
    """Put other kernels in the place of torch's."""
    def use(**given):
        monkeypatch.setattr(attention, "_known", {})
        monkeypatch.setattr(attention, "KERNELS", {name: Kernel(attend=attend, types=(torch.float32, torch.bfloat16), devices=("cpu",)) for name, attend in given.items()})
    return use


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_is_wrong_is_not_used(name, dtype, causal, kernels):
    attend, reason = WRONG[name]
    kernels(wrong=attend)
    assert kernel_for(CPU, dtype, 8, causal)[0] == "" and f"wrong {reason}" in kernel_for(CPU, dtype, 8, causal)[1]


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("size", (4, 64))
def test_the_first_kernel_that_is_right_is_used(size, dtype, causal, kernels):
    kernels(first=raising, second=one_by_one, third=in_groups)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernel_for(CPU, dtype, size, causal) == ("second", "")
    assert torch.equal(torch.get_rng_state(), before), "a check draws numbers of its own"


@pytest.mark.parametrize("kind", ("xlm-roberta", "bert"))
@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_kernel_every_head_equals_padded(kind, shape, kernels, toys):
    seen = []

    def counted(*given):
        seen.append(given[4])
        return one_by_one(*given)

    kernels(counted=counted)
    model = model_of(kind, initializer_range=0.3).eval()
    model.heads["toy_ranked"].scale.data.fill_(1.0)  # it multiplies rounding errors too
    kernel_for(CPU, torch.float32, 8, False)
    for seed, name in enumerate(FORMATS):
        batch, found = random_batch(SHAPES[shape], name, seed), []
        seen.clear()
        for padded in (False, True):
            model.zero_grad()
            loss, logits = model(batch, name, padded=padded)
            loss.backward()
            found.append((logits.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}))
        assert seen == [0.0] * model.encoder.config.num_hidden_layers, "each layer asked the kernel, once"
        torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
        largest = max(float(g.abs().max()) for g in found[1][1].values())
        for key, gradient in found[0][1].items():
            torch.testing.assert_close(gradient, found[1][1][key], atol=1e-5 * max(1, largest), rtol=0)


def test_a_kernel_is_told_of_dropout_in_training_only(kernels, toys):
    seen = []
    kernels(seen=lambda *given: seen.append(given[4]) or one_by_one(*given))
    kernel_for(CPU, torch.float32, 8, False)
    model, batch = model_of(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0, initializer_range=0.3), random_batch([2, 3, 3, 5, 5, 8, 9, 13], "toy_pair", 0)
    seen.clear()
    model.train()(batch, "toy_pair"), model.eval()(batch, "toy_pair")
    assert seen == [0.3, 0.3, 0.0, 0.0]
    states = {}
    for way, attend in (("groups", raising), ("kernel", one_by_one)):  # the same distribution: the mean over masks is that of the groups
        kernels(way=attend)
        torch.manual_seed(0)
        drawn = torch.stack([model.train().states(batch).detach() for _ in range(400)])
        states[way] = drawn.mean(0), drawn.std(0)
    spread = states["groups"][1].mean()
    assert spread > 0.01 and (states["kernel"][0] - states["groups"][0]).abs().mean() < 0.12 * spread and (states["kernel"][1].mean() / spread - 1).abs() < 0.1


def test_windows_are_left_to_the_groups_where_they_matter(kernels):
    asked = []
    kernels(kernel=lambda *given: asked.append(1) or one_by_one(*given))
    kernel_for(CPU, torch.float32, 8, True)
    torch.manual_seed(0)
    lengths = (1, 2, 5, 9)
    query, key, value = (torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2))
    groups = LengthGroups(lengths, CPU, causal=True)
    wide, plain, narrow = (flat_attention(None, query, key, value, None, groups=groups, sliding_window=window)[0] for window in (9, None, 3))
    assert len(asked) == 2 + 4 and torch.allclose(wide, plain) and (narrow - plain).abs().max() > 0.1  # the check itself asks four times
    alone = in_groups(*(x.repeat_interleave(4 // x.shape[1], 1)[0].transpose(0, 1) for x in (query, key, value)), groups, window=3)
    assert torch.equal(narrow[0], alone)
    back = torch.arange(9)[:, None] - torch.arange(9)
    last = F.scaled_dot_product_attention(*(x[:, :, -9:] for x in (query, key, value)), attn_mask=(back >= 0) & (back < 3), enable_gqa=True)
    torch.testing.assert_close(narrow[:, -9:], last.transpose(1, 2), atol=1e-6, rtol=0)


def test_in_autocast_a_kernel_computes_in_half_precision(kernels, toys):
    kinds = []
    kernels(kernel=lambda *given: kinds.append(given[0].dtype) or one_by_one(*given))
    model, batch = model_of().eval(), random_batch(None, "toy_pair", 0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch, "toy_pair")
    assert kinds[-2:] == [torch.bfloat16] * 2


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_of_torch_take_what_they_are_given_and_have_gradients(name, causal):
    """On torch's meta device shapes are computed and arguments bound as on a GPU; nothing is calculated."""
    meta, lengths = torch.device("meta"), (1, 3, 64)
    groups = LengthGroups(lengths, meta, causal=causal)
    rows = [torch.empty(sum(lengths), 4, 64, device=meta, dtype=KERNELS[name].types[0], requires_grad=True) for _ in range(3)]
    out = KERNELS[name].attend(*rows, groups, 0.1, 0.125)
    assert out.shape == rows[0].shape and out.dtype == rows[0].dtype and out.grad_fn is not None
    assert groups.begins.dtype == torch.int32 and groups.begins.shape == (4,)
    schema = {"flash": torch.ops.aten._flash_attention_forward.default, "memory-efficient": torch.ops.aten._efficient_attention_forward.default}[name]._schema
    given = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    assert given == {"flash": ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask"],
                     "memory-efficient": ["query", "key", "value", "bias", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "custom_mask_type", "compute_log_sumexp"]}[name]
    assert "scale" in [argument.name for argument in schema.arguments if argument.kwarg_only]


def test_the_way_is_said_in_words(kernels, toys):
    from transformers import AutoConfig

    model = model_of()
    def way(family="xlm-roberta", config=model.text.config):
        return attention_way(FAMILIES[family], config, CPU, torch.float32)

    assert way() == "flat, groups of similar length"
    kernels(flash=one_by_one)
    assert way() == "flat, variable-length kernel (flash)"
    assert "window of" in way("gemma3_text", AutoConfig.for_model("gemma3_text"))
    for name, family in FAMILIES.items():
        assert way(name, AutoConfig.for_model(family.model_type).get_text_config()).startswith("flat" if family.attention == "flat" else f"padded in groups of similar length: family {name} ")
    assert "ALiBi" in way("bloom") and "relative bias" in way("mt5") and "positions" in way("siglip")
    kernels(flash=raising)
    assert attention_way(FAMILIES["bert"], model.text.config, torch.device("cuda"), torch.float32) == "flat, groups of similar length (flash is not for torch.float32 on cuda)"


def test_a_record_says_how_it_was_computed(toys, tmp_path, monkeypatch):
    from xtransfer.steps import Step, close, train
    from test_distributed import PARAMETERS

    monkeypatch.setattr("xtransfer.adapters.bfloat16_gain", lambda device: 0.25)
    recipe = replace_in(PARAMETERS, precision="bfloat16")
    step = Step(tmp_path, **recipe)
    assert step.describe().loc[["arithmetic", "attention"], ""].tolist() == ["bfloat16 asked for, float32 used: measured 4.0 times faster here", "flat, groups of similar length"]
    train(step)
    close(step, keep_checkpoint=False)
    import json

    training = json.loads((tmp_path / "results.json").read_text())["training"]
    assert training["attention"] == "flat, groups of similar length" and training["arithmetic"].endswith("4.0 times faster here") and training["steps"] > 0


def replace_in(parameters, **recipe):
    return parameters | {"recipe": parameters["recipe"] | recipe}


def test_one_process_trains_without_accelerate():
    import subprocess
    import sys

    program = ("import sys\nfor name in ('accelerate', 'pandas', 'pyarrow', 'IPython', 'datasets', 'matplotlib', 'peft', 'papermill'): sys.modules[name] = None\n"
               "import torch\nfrom xtransfer.ranks import meet\nfrom xtransfer.training import fit\nassert meet().count == 1 and fit\nprint('trained')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "trained\n", done.stderr[-2000:]


SHAPES_THAT_PASS = """
import torch
import xtransfer.attention
def update(rows):
    torch.nn.functional.gelu(torch.ones(rows, 1024, requires_grad=True)).sum().backward()
def memory():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
update(400)
before = memory()
for rows in range(300, 400):
    update(rows)
print(memory() - before)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available() or not Path("/proc/self/status").exists(), reason="torch was built without oneDNN, or the system does not tell a process's memory")
def test_a_shape_that_passed_leaves_no_memory_behind():
    def growth(**own):
        given = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
        return int(subprocess.run([sys.executable, "-c", SHAPES_THAT_PASS], env={**given, **own}, capture_output=True, text=True, check=True).stdout)

    assert growth() < growth(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024") / 3  # the user's own value stands
