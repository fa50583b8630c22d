"""What the tests of data parallel training run, alone or in several processes: `torchrun together.py FOLDER` trains every case together and leaves what came of it."""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file

import toys  # noqa: F401  declares the toy tasks
import xtransfer.catalogue
import xtransfer.states
import xtransfer.training
from xtransfer.backbones import BACKBONES, Backbone
from xtransfer.encoding import encode
from xtransfer.evaluation import make_evaluator
from xtransfer.image_text import caption_accuracy
from xtransfer.modeling import StageModel, load_encoder
from xtransfer.objectives import make_corruption
from xtransfer.prompting import encode_prompted
from xtransfer.ranks import Ranks, meet
from xtransfer.studies import Mixing, Recipe
from xtransfer.tasks import TASKS, load_examples
from xtransfer.training import fit
from xtransfer.world import world_tokenizer

RECIPE = Recipe(name="ranks", learning_rate=3e-3, batch_size=5, max_steps=8, max_length=96, stride=8, evaluations=2, weight_decay=0.1, warmup=0.3, adam_epsilon=1e-3)  # the usual epsilon makes a full step of what is rounding error in a gradient of zero
SIZES = {"layers": 1, "hidden_size": 16, "retrieval_layer": 1, "max_length": 128}
MT5 = Backbone(name="ranks-mt5", architecture="encoder_decoder", build_tokenizer=partial(world_tokenizer, "mt5"), **SIZES,
               config={"model_type": "mt5", "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0})
BLOOM = Backbone(name="ranks-bloom", architecture="decoder", build_tokenizer=partial(world_tokenizer, "bloom"), **SIZES,
                 config={"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3})
TOY = BACKBONES["toy-encoder"]
STILL = replace(TOY, config=dict(TOY.config) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2})  # weights large enough for every example to have a loss of its own
SUPERVISED = ("toy_pair", "toy_choice", "toy_tags", "toy_qa", "toy_text")
CASES = {  # name -> backbone, tasks, changes of the recipe
    **{name: (STILL, (name,), {}) for name in (*SUPERVISED, "toy_ranked")},
    "captions": (replace(STILL, build_tokenizer=world_tokenizer), ("world_captions",), {}),
    "next": (BLOOM, ("world_text",), {}), "spans": (MT5, ("world_text",), {}), "answers": (BLOOM, ("world_xnli@prompted",), {}), "written": (MT5, ("world_xnli@prompted",), {}),
    "mixture": (STILL, (*SUPERVISED, "toy_ranked"), {"max_steps": 14}),
    "one example": (STILL, ("toy_tags", "toy_text", "toy_ranked"), {"batch_size": 1}),
    "adapters": (STILL, ("toy_pair",), {"lora_rank": 2, "layer_mix": True}),
    "checkpointing": (STILL, ("toy_pair",), {"gradient_checkpointing": True}),
    "dropout": (TOY, ("toy_pair", "toy_tags"), {"max_steps": 14}),
}
EQUAL = tuple(case for case in CASES if case != "dropout")  # cases whose losses do not depend on the number of processes
SHARDED = tuple(case for case in EQUAL if case not in SUPERVISED)


class Killed(Exception):
    """Stands for kill -9."""


def trained(case, folder, ranks=None, die_at=None, save_seconds=1e9):
    """Train a case, or go on with it; dies before the update that follows step `die_at`."""
    backbone, names, changes = CASES[case]
    recipe, tokenizer, tasks = replace(RECIPE, **changes), backbone.build_tokenizer(), [TASKS[name] for name in names]
    model = StageModel(load_encoder(backbone, tokenizer, 0), tasks, 0, backbone, recipe.layer_mix)
    for head in model.heads.values():
        if hasattr(head, "scale"):
            head.scale.data.fill_(1.0)  # it multiplies rounding errors too
    rows = {task.name: load_examples(task, task.train_languages[0], "train", 30).rows for task in tasks}
    data = {task.name: encode_prompted(tokenizer, task, rows[task.name], recipe, backbone.kind.objective) if task.format == "prompted" else encode(tokenizer, task, rows[task.name], recipe) for task in tasks}
    corrupt = make_corruption(tokenizer, backbone.kind.objective, recipe, model.encoder.get_input_embeddings().num_embeddings) if any(t.format == "masked_lm" for t in tasks) else None
    evaluators = {task.name: make_evaluator(tokenizer, task, task, [load_examples(task, task.train_languages[0], "dev", 12)], recipe) for task in tasks if task.format != "image_text"}
    real, calls = xtransfer.training.make_batch, []

    def lethal(*given):
        calls.append(1)
        if die_at is not None and len(calls) > die_at:
            raise Killed
        return real(*given)

    def score_dev():
        return {name: evaluators[name].headline(model) if name in evaluators else caption_accuracy(model, name, data[name]) for name in data}

    xtransfer.training.make_batch = lethal
    try:
        return fit(model, data, score_dev, recipe, Mixing(kind="uniform"), 0, folder, corrupt, save_seconds, ranks)
    finally:
        xtransfer.training.make_batch = real


def interrupted(case, folder, ranks, moments=(3, 0, 5)):
    """A training that dies again and again, every step having saved a state; the first rank is slow to write, so that the others begin again before it has."""
    xtransfer.states.save_file = lambda *given: (time.sleep(0.1), save_file(*given))
    for moment in moments:
        try:
            trained(case, folder, ranks, die_at=moment, save_seconds=0)
        except Killed:
            pass
    xtransfer.states.save_file = save_file
    trained(case, folder, ranks)


def shards(ranks):
    """Ranks that shard weights. Accelerate does so on GPUs only; told that these are some, it shards on the CPU as well."""
    PartialState().distributed_type = ranks.accelerator.state.distributed_type = DistributedType.FSDP
    ranks.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
    ranks.accelerator._models.clear()
    return Ranks(accelerator=ranks.accelerator, sharding="full")


def main(folder):
    """Every case together, then the same with sharded weights."""
    torch.set_num_threads(1)
    ranks = meet(2)
    for case in CASES:
        trained(case, folder / case, ranks)
    interrupted("dropout", folder / "dropout interrupted", ranks)
    for case in SHARDED:
        trained(case, folder / f"{case} sharded", shards(ranks))
    for moment in (3, None):
        try:
            trained("mixture", folder / "mixture sharded interrupted", shards(ranks), die_at=moment, save_seconds=0)
        except Killed:
            pass


if __name__ == "__main__":
    main(Path(sys.argv[1]))
