"""How fast this package trains, evaluates and searches on a GPU, beside its peers.

One file, made by `make bench-gpu-script`. It needs torch >= 2.11 and transformers >= 5.17 from the machine and carries the rest:

    python gpu_benchmark.py --out FOLDER [--minutes 8] [--device cpu --tiny]

It leaves results.json, table.md and gpu_benchmark.ipynb in FOLDER. A row that fails says how, and the others go on. When time runs out rounds are dropped, not rows.
"""

import argparse
import base64
import gc
import inspect
import io
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
import traceback
import types
import zipfile
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

PAYLOADS = {}  # name -> zip in base64; filled in by build.py
LENGTHS = {}  # lengths.json; filled in by build.py


def unpack():
    """Make the packages that travel with this file importable; those of the machine go first, this project's own excepted."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"})
    if "--device" in sys.argv and "cpu" in sys.argv:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch, Trainer and this file ask whether there is a GPU, and shall hear the same
    folder = tempfile.mkdtemp(prefix="gpu-benchmark-")
    for name, packed in PAYLOADS.items():
        zipfile.ZipFile(io.BytesIO(base64.b64decode(packed))).extractall(Path(folder) / name)
    sys.path.insert(0, str(Path(folder) / "xtransfer"))
    sys.path.append(str(Path(folder) / "accelerate"))
    return folder


FOLDER = unpack()

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.masking_utils import AttentionMaskInterface

import xtransfer.training
from xtransfer.adapters import arithmetic, precision_used
from xtransfer.attention import GROUPED, KERNELS, LengthGroups, attention_way, in_groups, kernel_for
from xtransfer.encoding import Encoded, evaluation_batches, make_batch
from xtransfer.mining import neighbours_both_ways
from xtransfer.modeling import StageModel
from xtransfer.studies import Mixing, Recipe
from xtransfer.tasks import Source, Task, squad_columns, text_pair
from xtransfer.training import fit

try:
    import psutil  # noqa: F401  a compiled package, of which Accelerate asks for numbers only
except ImportError:  # after transformers was imported, which looks for it too
    psutil = sys.modules["psutil"] = types.ModuleType("psutil")
    psutil.cpu_count, psutil.virtual_memory = lambda logical=True: os.cpu_count(), lambda: types.SimpleNamespace(available=2**33, total=2**34)

# ---------------------------------------------------------------- what is measured

SHAPES = {  # of XLM-R. Source: config.json of FacebookAI/xlm-roberta-base and -large
    "large": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 250002, "max_position_embeddings": 514},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 250002, "max_position_embeddings": 514},
    "small": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 50000, "max_position_embeddings": 514},  # of the loss curves alone
    "tiny": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 5000, "max_position_embeddings": 514},
}
COMMON = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "layer_norm_eps": 1e-5}
LONGEST = {"nli": 128, "squad": 384}  # tokens. Source: defaults of transformers' run_xnli.py and run_qa.py
DATASHEET = {"H100 PCIe": (756e12, 2.0e12), "H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}  # dense bfloat16 FLOP/s and bytes/s, NVIDIA's data sheets
TASKS = {
    "nli": Task(name="nli", format="sequence_classification", kind="nli", source=Source(repo="generated"), languages=("en",), load=None, read=text_pair("a"), labels=("entailment", "neutral", "contradiction")),
    "squad": Task(name="squad", format="span_extraction", kind="qa", source=Source(repo="generated"), languages=("en",), load=None, read=squad_columns),
}


def drawn_data(name, count, subwords, longest, seed=0):
    """Sequences of real lengths with token ids of a Zipf distribution, every subword in at least one of them; lists of ids and targets."""
    rng, quantiles = np.random.default_rng(seed), np.array(LENGTHS["lengths"][{"nli": "nli_train", "squad": "squad_train"}.get(name, name)]["quantiles"])
    lengths = np.minimum(rng.choice(quantiles, count), longest).astype(np.int64)
    rank = rng.permutation(subwords) + 5
    weights = 1 / (np.arange(subwords) + 2.7)
    ids = rank[rng.choice(subwords, int(lengths.sum()), p=weights / weights.sum())]
    places = rng.permutation(len(ids))[:subwords]
    ids[places] = rank[:len(places)]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids[starts[:-1]], ids[starts[1:] - 1] = 0, 2
    return ids.astype(np.int32), starts, rng.integers(0, 3, count), np.sort(rng.integers(1, np.maximum(lengths[:, None] - 1, 2), (count, 2)), axis=1)


def encoded_of(name, ids, starts, labels, spans):
    """What the package trains on."""
    count = len(starts) - 1
    targets = {"example_targets": {"label": labels}} if name != "squad" else {"sequence_targets": {"span": spans}, "token_targets": {"characters": np.full((len(ids), 2), -1)}}
    return Encoded(ids=ids, starts=starts, example=np.arange(count), examples=count, **targets)


def rows_of(name, ids, starts, labels, spans):
    """What transformers.Trainer trains on."""
    for i, (a, b) in enumerate(zip(starts, starts[1:])):
        yield {"input_ids": ids[a:b].tolist(), "length": int(b - a)} | ({"labels": int(labels[i])} if name != "squad" else {"start_positions": int(spans[i, 0]), "end_positions": int(spans[i, 1])})


def stage_model(shape, name, device, dropout=0.1, spread=0.02):
    """This package's model with random weights."""
    config = AutoConfig.for_model("xlm-roberta", **SHAPES[shape], **(COMMON | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "initializer_range": spread}))
    torch.manual_seed(0)
    with torch.device(device):
        encoder = AutoModel.from_config(config, dtype=torch.float32, attn_implementation=GROUPED)
        encoder.pooler = None
        return StageModel(encoder, (TASKS[name],), seed=0)


# ---------------------------------------------------------------- taking turns

class Stop(BaseException):
    """Ends a training loop."""


class Loop:
    """A real training loop in a thread of its own, which goes on for as many steps as it is told to."""

    def __init__(self, run):  # run(loop) trains without end and calls loop.turn() before each step
        self.counts, self.done, self.left, self.stopped, self.error = [], 0, 0, False, None
        self.go, self.ready, self.before = threading.Semaphore(0), threading.Semaphore(0), allocated()
        self.thread = threading.Thread(target=self._main, args=(run,), daemon=True)
        self.thread.start()
        self._wait()

    def _main(self, run):
        try:
            run(self)
        except Stop:
            pass
        except BaseException as error:
            self.error = error
        self.ready.release()

    def _wait(self):
        self.ready.acquire()
        if self.error is not None:
            error, self.error = self.error, RuntimeError("this loop has failed before")
            raise error

    def turn(self):
        """Called by the loop before each step."""
        if self.left == 0:
            self.ready.release()
            self.go.acquire()
            if self.stopped:
                raise Stop
        self.left -= 1

    def window(self, steps):
        """Seconds and real tokens of some steps."""
        self.left = steps
        def run():
            self.go.release()
            self._wait()
        seconds = timed(run)
        tokens = sum(self.counts[self.done:self.done + steps])
        self.done += steps
        return seconds, tokens

    def close(self):
        self.stopped = True
        self.go.release()
        self.thread.join(60)
        tidy()


def allocated():
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def tidy():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(run):
    """Seconds of a call: device events on a GPU, the clock elsewhere."""
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def turns(ways, seconds, rounds=5):
    """Call ways in turns, A B, B A, A B ..., for as many rounds as the time allows; way -> one value per round."""
    found, begun = {name: [] for name in ways}, time.perf_counter()
    for number in range(rounds):
        if number and (time.perf_counter() - begun) * (number + 1) / number > seconds:
            break
        for name in list(ways)[::-1 if number % 2 else 1]:
            found[name].append(ways[name]())
    return found


def spread(values):
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "rounds": len(values)}


class Clock:
    """The time that is left, shared out by weight."""

    def __init__(self, minutes, weights):
        self.end, self.weights = time.monotonic() + 60 * minutes, dict(weights)

    def share(self, name):
        """Seconds for a row; what others did not use goes to those that follow."""
        left, weight = max(1.0, self.end - time.monotonic()), self.weights.pop(name)
        return left * weight / (weight + sum(self.weights.values()))


# ---------------------------------------------------------------- loops

HOOKS = {}  # thread -> loop
_real_make_batch = make_batch


def _counting_make_batch(encoded, examples):
    loop = HOOKS.get(threading.get_ident())
    if loop is not None:
        loop.turn()
    batch = _real_make_batch(encoded, examples)
    if loop is not None:
        loop.counts.append(sum(batch.lengths))
    return batch


xtransfer.training.make_batch = _counting_make_batch  # where `fit` takes its turns; nothing else of it is touched


def ours(shape, name, data, batch, device, trimmed=True, precision="bfloat16"):
    """`fit`, as every study calls it."""
    recipe = Recipe(name="benchmark", learning_rate=1e-5, batch_size=batch, max_steps=20000, max_length=LONGEST[name], weight_decay=0.01, evaluations=1, precision=precision)
    def run(loop):
        HOOKS[threading.get_ident()] = loop
        model = stage_model(shape, name, device).train()
        fit(model, {name: encoded_of(name, *data)}, dict, recipe, Mixing(), 0, tempfile.mkdtemp(dir=FOLDER), save_seconds=1e9, **({"reads": ()} if trimmed else {}))
    return Loop(run)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Collator:
    """Pads to a length, or to the longest of a batch, and counts real tokens."""

    def __init__(self, counts, longest=None, multiple=1):
        self.counts, self.longest, self.multiple = counts, longest, multiple

    def __call__(self, rows):
        lengths = [len(r["input_ids"]) for r in rows]
        self.counts.append(sum(lengths))
        width = self.longest or -(-max(lengths) // self.multiple) * self.multiple
        found = {"input_ids": torch.tensor([r["input_ids"] + [1] * (width - n) for r, n in zip(rows, lengths)]), "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long()}
        return found | {key: torch.tensor([r[key] for r in rows]) for key in ("labels", "start_positions", "end_positions") if key in rows[0]}


def exact_float32():
    """Products in float32 keep all their digits; Trainer's torch_compile turns that off for the whole process."""
    try:
        from transformers.utils.import_utils import enable_tf32
        enable_tf32(False)
    except ImportError:
        torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def reset_accelerate():
    """Forget the precision of the last Trainer: Accelerate keeps it for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    for key in [k for k in os.environ if k.startswith("ACCELERATE_")]:
        del os.environ[key]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    exact_float32()


def arguments(**asked):
    """TrainingArguments of this version of transformers, without what it does not know."""
    known = TrainingArguments.__dataclass_fields__
    given = {"output_dir": tempfile.mkdtemp(dir=FOLDER), "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-5, "weight_decay": 0.01, "remove_unused_columns": False,
             "max_steps": 20000, "use_cpu": not torch.cuda.is_available()} | asked
    return TrainingArguments(**{k: v for k, v in given.items() if k in known})


def trainer(shape, name, data, batch, device, kind):
    """transformers.Trainer in the way of the example scripts: "fp32 pad-max" as they ship, "bf16 dynamic" and "bf16 grouped + compiled" as one would tune it."""
    def run(loop):
        reset_accelerate()
        class Turns(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                loop.turn()
        config = AutoConfig.for_model("xlm-roberta", **SHAPES[shape], **COMMON, num_labels=3 if name == "nli" else 2)
        torch.manual_seed(0)
        with torch.device(device):
            model = (AutoModelForSequenceClassification if name == "nli" else AutoModelForQuestionAnswering).from_config(config, dtype=torch.float32)
        options, collator = {}, Collator(loop.counts, LONGEST[name] if kind == "fp32 pad-max" else None, 8)
        if kind != "fp32 pad-max":
            options |= {"bf16": True}
        if kind == "bf16 grouped + compiled":
            if device == "cpu":
                raise RuntimeError("nothing is compiled on a CPU")
            os.environ.update({"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true", "ACCELERATE_DYNAMO_USE_DYNAMIC": "true"})  # a layer is compiled once, for all lengths: minutes less
            options |= {"torch_compile": True, "group_by_length": True, "train_sampling_strategy": "group_by_length"}
        Trainer(model=model, args=arguments(per_device_train_batch_size=batch, **options), train_dataset=Rows(rows_of(name, *data)), data_collator=collator, callbacks=[Turns()]).train()
    return Loop(run)


def by_hand_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, *, hand, **others):
    """Flash attention over a flattened batch; on a CPU, where there is none, sequence by sequence."""
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    if query.is_cuda:
        begins, longest = hand
        half = [x.to(torch.bfloat16) for x in rows]
        return torch.ops.aten._flash_attention_forward(*half, begins, begins, longest, longest, dropout, False, False, scale=scaling)[0][None], None
    return in_groups(*rows, LengthGroups(hand[0].diff().sort().values.tolist(), query.device), dropout, scaling)[None], None


AttentionInterface.register("by_hand", by_hand_attention)
AttentionMaskInterface.register("by_hand", lambda *args, **kwargs: None)


class ByHand(torch.nn.Module):
    """A stock encoder over a flattened batch, with the classification head of XLM-R."""

    def __init__(self, shape, device):
        super().__init__()
        torch.manual_seed(0)
        with torch.device(device):
            config = AutoConfig.for_model("xlm-roberta", **SHAPES[shape], **COMMON)
            self.encoder = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="by_hand")
            self.encoder.pooler = None
            size = config.hidden_size
            self.head = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(size, size), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(size, 3))

    def forward(self, ids, positions, begins, longest, labels):
        states = self.encoder(input_ids=ids[None], position_ids=positions[None], hand=(begins, longest)).last_hidden_state[0]
        return F.cross_entropy(self.head(states[begins[:len(labels)].long()]).float(), labels)


def flattened(data, examples):
    """Token ids, positions, begins, the longest sequence and labels of some examples, shortest first; on the CPU."""
    ids, starts, labels, _ = data
    examples = examples[np.argsort(np.diff(starts)[examples], kind="stable")]
    lengths = np.diff(starts)[examples]
    row = np.concatenate([ids[starts[i]:starts[i + 1]] for i in examples])
    positions = np.concatenate([np.arange(n) for n in lengths]) + 2
    begins = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return torch.from_numpy(row.astype(np.int64)), torch.from_numpy(positions), torch.from_numpy(begins), int(lengths.max()), torch.from_numpy(labels[examples])


def by_hand(shape, data, batch, device):
    """Unpadding by hand: the stock encoder on flattened batches, autocast, fused AdamW, clipping as it is usually written."""
    def run(loop):
        model = ByHand(shape, device).train()
        optimizer, rng, count = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True), np.random.default_rng(1), len(data[1]) - 1
        while True:
            loop.turn()
            *given, longest, labels = flattened(data, rng.choice(count, batch, replace=False))
            loop.counts.append(len(given[0]))
            given = [x.to(device, non_blocking=True) for x in (*given, labels)]
            with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False) if device == "cuda" else nullcontext():
                loss = model(*given[:3], longest, given[3])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
    return Loop(run)


def with_graphs(shape, data, batch, device, bucket=256):
    """The same with the whole step in CUDA graphs, one for each number of tokens rounded up; filled with one more sequence that nothing reads."""
    def run(loop):
        if device != "cuda":
            raise RuntimeError("there are no CUDA graphs on a CPU")
        model = ByHand(shape, device).train()
        optimizer, rng, count = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-5, device=device), weight_decay=0.01, fused=True, capturable=True), np.random.default_rng(1), len(data[1]) - 1
        graphs, pool = {}, torch.cuda.graph_pool_handle()
        longest = LONGEST["nli"]

        def step(static):
            with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
                loss = model(*static[:3], max(longest, bucket), static[3])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss

        def captured(given):
            static, stream = [x.clone() for x in given], torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    optimizer.zero_grad(set_to_none=True)
                    step(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                loss = step(static)
            return graph, static, loss

        while True:
            loop.turn()
            ids, positions, begins, _, labels = flattened(data, rng.choice(count, batch, replace=False))
            loop.counts.append(len(ids))
            tokens = -(-(len(ids) + 1) // bucket) * bucket
            filler = tokens - len(ids)
            given = [torch.cat([ids, torch.ones(filler, dtype=torch.int64)]), torch.cat([positions, torch.arange(filler) + 2]), torch.cat([begins, torch.tensor([tokens], dtype=torch.int32)]), labels]
            given = [x.to(device) for x in given]
            if tokens not in graphs:
                graphs[tokens] = captured(given)
            graph, static, loss = graphs[tokens]
            for mine, new in zip(static, given):
                mine.copy_(new)
            graph.replay()
            loss.item()
    return Loop(run)


# ---------------------------------------------------------------- arithmetic

FORMULA = """A token costs 6 floating-point operations per weight of the linear layers (2 forwards, 4 backwards) and, in attention, 12 per layer, unit of the hidden size and token of its own sequence; embeddings cost none. Only real tokens count.
MFU is that divided by the time of a step and by a peak: the data sheet's for dense bfloat16, or the one measured here with a large product. The roofline of a step is the sum of two times that cannot overlap, because the update waits for the gradient:
the operations at the peak, and the optimizer's bytes at the bandwidth. An update moves 36 bytes per trained weight (the gradient is written, read for its norm and read again, the weight and two moments are read and written, 4 bytes each), and 6 more per weight of the linear layers, which is read in float32 and written in bfloat16 once.
With a trimmed vocabulary fewer weights of the embedding table are trained."""


def linear_weights(shape):
    s = SHAPES[shape]
    return s["num_hidden_layers"] * (4 * s["hidden_size"] ** 2 + 2 * s["hidden_size"] * s["intermediate_size"])


def work(shape, data, batch, rows=None):
    """Mean floating-point operations and optimizer bytes of one step, see FORMULA."""
    s, lengths = SHAPES[shape], np.diff(data[1]).astype(float)
    operations = batch * (6 * linear_weights(shape) * lengths.mean() + 12 * s["num_hidden_layers"] * s["hidden_size"] * (lengths ** 2).mean())
    trained = linear_weights(shape) + (s["vocab_size"] if rows is None else rows) * s["hidden_size"]
    return operations, 36 * trained + 6 * linear_weights(shape)


def measured_peaks(device, tiny):
    """FLOP/s of a large bfloat16 product and bytes/s of a large copy."""
    n, dtype = (8192, torch.bfloat16) if not tiny else (256, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    flat = torch.empty(2**28 if not tiny else 2**20, device=device)
    best = {}
    for name, run, amount in (("flops", lambda: a @ b, 2 * n**3), ("bytes", lambda: flat.clone(), 8 * len(flat))):
        run()
        best[name] = max(10 * amount / timed(lambda: [run() for _ in range(10)]) for _ in range(5))
    return best


# ---------------------------------------------------------------- rows

class Bench:
    """What the rows share: the device, the sizes, the peaks."""

    def __init__(self, device, tiny):
        self.device, self.tiny = device, tiny
        self.batch = 4 if tiny else 32
        self.name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.peaks = measured_peaks(device, tiny)
        sheet = next((values for key, values in DATASHEET.items() if all(part in self.name for part in key.split())), None)
        self.sheet = {"flops": sheet[0], "bytes": sheet[1]} if sheet else dict.fromkeys(("flops", "bytes"))
        self.data = {name: drawn_data(name, 64 if tiny else 16384 if name == "nli" else 8192, 900 if tiny else LENGTHS["subwords"][name], LONGEST[name]) for name in TASKS}

    def shape(self, name):
        return "tiny" if self.tiny else name

    def model_use(self, shape, name, tokens_per_second, trimmed):
        """MFU and share of the roofline at some speed."""
        data = self.data[name]
        operations, moved = work(shape, data, self.batch, len(np.unique(data[0])) if trimmed else None)
        step = self.batch * float(np.diff(data[1]).mean()) / tokens_per_second
        found = {"step_ms": step * 1e3}
        for where, peak in (("measured", self.peaks), ("data sheet", self.sheet)):
            if peak["flops"]:
                found |= {f"MFU, {where} peak": operations / step / peak["flops"], f"share of the roofline, {where}": (operations / peak["flops"] + moved / peak["bytes"]) / step}
        return found


def against(bench, loops, seconds, least=0.1, most=0.8):
    """Two training loops in turns: tokens per second of each round, peak memory in MB, seconds until both were warm."""
    begun, steps, warm, memory = time.perf_counter(), {}, {}, {}
    for name, loop in loops.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loop.window(3)
        warm[name], (taken, _) = time.perf_counter() - started, loop.window(3)
        memory[name] = round((torch.cuda.max_memory_allocated() - loop.others) / 2**20) if torch.cuda.is_available() else None
        window = min(most, max(least, seconds / 25)) if not bench.tiny else 0.0
        steps[name] = max(2, round(window / (taken / 3)))
    left = max(0.0, seconds - (time.perf_counter() - begun))
    rounds = turns({name: lambda loop=loop, name=name: (lambda s, t: t / s)(*loop.window(steps[name])) for name, loop in loops.items()}, left, 2 if bench.tiny else 5)
    return rounds, memory, warm


def train_row(bench, seconds, shape, name, peers):
    """Train one task at one size, against each peer in turn; the batches are drawn from the same data."""
    shape, data = bench.shape(shape), bench.data[name]
    found, trained = [], ours(shape, name, data, bench.batch, bench.device)
    trained.others = trained.before
    try:
        for number, kind in enumerate(peers):
            share, begun = seconds / (len(peers) - number), time.perf_counter()
            try:
                peer = by_hand(shape, data, bench.batch, bench.device) if kind == "by hand, flash" else with_graphs(shape, data, bench.batch, bench.device) if kind == "by hand, CUDA graphs" else trainer(shape, name, data, bench.batch, bench.device, kind)
                peer.others, trained.others = peer.before, trained.before + max(0, allocated() - peer.before)
                try:
                    rounds, memory, warm = against(bench, {"ours": trained, "peer": peer}, share)
                finally:
                    peer.close()
                found.append({"against": kind, "ratio": spread([a / b for a, b in zip(rounds["ours"], rounds["peer"])]), "ours_tokens_per_second": spread(rounds["ours"]), "peer_tokens_per_second": spread(rounds["peer"]), "memory_mb": memory,
                              "seconds_until_warm": {k: round(v, 2) for k, v in warm.items()}, "ours": bench.model_use(shape, name, statistics.median(rounds["ours"]), True), "peer": bench.model_use(shape, name, statistics.median(rounds["peer"]), False)})
            except Exception as error:
                found.append({"against": kind, "error": said(error)})
            tidy()
            seconds -= time.perf_counter() - begun
    finally:
        trained.close()
    return found


def said(error):
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"


TRAINER = ("fp32 pad-max", "bf16 dynamic", "bf16 grouped + compiled")


def row_2(bench, seconds, shape="large"):
    """Train NLI, batch 32."""
    return train_row(bench, seconds, shape, "nli", TRAINER)


def row_3(bench, seconds, shape="large"):
    """Train SQuAD, batch 32."""
    return train_row(bench, seconds, shape, "squad", TRAINER)


def row_4(bench, seconds, shape="large"):
    """Train NLI, against unpadding by hand with flash-attention flattening, and against the same in CUDA graphs (a candidate that the package does not have)."""
    return train_row(bench, seconds, shape, "nli", ("by hand, flash", "by hand, CUDA graphs"))


def row_5(bench, seconds, shape="large"):
    """An update of the embedding table alone, and a whole NLI step, with all rows of the vocabulary and with those that occur."""
    shape, data = bench.shape(shape), bench.data["nli"]
    size, rows = SHAPES[shape]["hidden_size"], {"full": SHAPES[shape]["vocab_size"], "trimmed": len(np.unique(data[0]))}
    ways = {}
    for name, count in rows.items():
        weight = torch.nn.Parameter(torch.randn(count, size, device=bench.device))
        weight.grad = torch.randn_like(weight)
        optimizer = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.01, fused=True)
        optimizer.step()
        ways[name] = lambda optimizer=optimizer: timed(lambda: [optimizer.step() for _ in range(10)]) / 10
    updates = turns(ways, seconds / 4)
    found = [{"against": "the full table, its update alone", "ratio": spread([a / b for a, b in zip(updates["full"], updates["trimmed"])]), "milliseconds": {k: round(1e3 * statistics.median(v), 3) for k, v in updates.items()}, "rows": rows}]
    del ways, weight, optimizer
    tidy()
    loops = {}
    try:
        for name in rows:
            loops[name] = ours(shape, "nli", data, bench.batch, bench.device, trimmed=name == "trimmed")
            loops[name].others = loops[name].before
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            loops[name].window(3)
            loops[name].peak = round((torch.cuda.max_memory_allocated() - loops[name].before) / 2**20) if torch.cuda.is_available() else None
        rounds, _, _ = against(bench, loops, seconds * 0.7)
        found.append({"against": "the full table, a whole NLI step", "ratio": spread([b / a for a, b in zip(rounds["full"], rounds["trimmed"])]), "memory_mb": {name: loop.peak for name, loop in loops.items()}})
    finally:
        for loop in loops.values():
            loop.close()
    return found


def row_6(bench, seconds, shape="base"):
    """Evaluate NLI in the 15 languages of XNLI: one stream sorted by length, against Trainer.predict, language by language as run_xnli does and tuned."""
    shape = bench.shape(shape)
    names = [name for name in LENGTHS["lengths"] if name.startswith("xnli_test_")]
    sets = [drawn_data(name, 8 if bench.tiny else 200, 900 if bench.tiny else 20000, 128, seed=i) for i, name in enumerate(names)]
    tokens = sum(len(s[0]) for s in sets)
    whole = encoded_of("nli", np.concatenate([s[0] for s in sets]), np.concatenate([[0], *(s[1][1:] + before for s, before in zip(sets, np.cumsum([0, *(len(s[0]) for s in sets)])))]), np.concatenate([s[2] for s in sets]), None)
    model, recipe = stage_model(shape, "nli", bench.device).eval(), Recipe(name="benchmark", learning_rate=0.0, batch_size=32, precision="bfloat16")
    config = AutoConfig.for_model("xlm-roberta", **SHAPES[shape], **COMMON, num_labels=3)
    torch.manual_seed(0)
    with torch.device(bench.device):
        stock = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()

    def one_stream():
        found = np.zeros((whole.examples, 3), dtype=np.float32)
        with torch.no_grad(), arithmetic(recipe, torch.device(bench.device)):
            for numbers in evaluation_batches(whole, 32768 if bench.device == "cuda" else 8192):
                found[numbers] = model(make_batch(whole, numbers).to(bench.device), "nli")[1].cpu().numpy()
        return found

    def predict(size, longest, half):
        reset_accelerate()
        used = Trainer(model=stock, args=arguments(per_device_eval_batch_size=size, **({"bf16": True} if half else {})), data_collator=Collator([], longest, 8))
        return lambda: [used.predict(Rows(rows_of("nli", *s))).predictions for s in sets]

    found = []
    for kind, options in (("Trainer.predict per language, fp32, pad-max, batch 8", (8, 128, False)), ("Trainer.predict per language, bf16, dynamic padding, batch 128", (128, None, True))):
        peer = predict(*options)
        one_stream(), peer()
        rounds = turns({"ours": lambda: timed(one_stream), "peer": lambda peer=peer: timed(peer)}, seconds / 2, 2 if bench.tiny else 5)
        found.append({"against": kind, "ratio": spread([b / a for a, b in zip(rounds["ours"], rounds["peer"])]), "ours_tokens_per_second": spread([tokens / s for s in rounds["ours"]]), "peer_tokens_per_second": spread([tokens / s for s in rounds["peer"]])})
    return found


def row_8(bench, seconds):
    """Retrieval among 20,000 x 20,000 vectors of 768, four neighbours both ways: one pass in tiles, against two searches in blocks (XTREME's way on a GPU), faiss where it is installed, and the matrix product alone."""
    n, size, k, device = (300, 32, 4, bench.device) if bench.tiny else (20000, 768, 4, bench.device)
    generator = torch.Generator(device).manual_seed(0)
    source = F.normalize(torch.randn(n, size, device=device, generator=generator), dim=1)
    target = F.normalize(source + 0.5 * F.normalize(torch.randn(n, size, device=device, generator=generator), dim=1), dim=1)

    def two_searches():
        return [torch.cat([(part @ b.T).topk(k, dim=1).indices for part in a.split(4096)]).cpu().numpy() for a, b in ((source, target), (target, source))]

    def one_pass():
        return [indices for _, indices in neighbours_both_ways(source, target, k, torch.device(device))]

    def product():
        for part in source.split(4096):
            part @ target.T

    ways = {"ours": one_pass, "two searches": two_searches, "one product": product}
    try:
        import faiss

        index = [faiss.IndexFlatIP(size) for _ in range(2)]
        if hasattr(faiss, "StandardGpuResources") and device == "cuda":
            index = [faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, i) for i in index]
        vectors = [x.cpu().numpy() for x in (source, target)]
        def faiss_flat():
            for i, x in zip(index, vectors):
                i.reset()
                i.add(x)
            return [index[1].search(vectors[0], k)[1], index[0].search(vectors[1], k)[1]]
        ways["faiss flat"] = faiss_flat
    except ImportError:
        pass
    answers = {name: way() for name, way in ways.items()}
    same = {name: min(float((a == b).mean()) for a, b in zip(answers["ours"], answer)) for name, answer in answers.items() if answer is not None and name != "ours"}
    rounds = turns({name: lambda way=way: timed(way) for name, way in ways.items()}, seconds, 2 if bench.tiny else 7)
    return [{"against": name, "ratio": spread([b / a for a, b in zip(rounds["ours"], rounds[name])]), "seconds": {"ours": statistics.median(rounds["ours"]), name: statistics.median(rounds[name])}, **({"same neighbours": same[name]} if name in same else {})} for name in ways if name != "ours"]


# ---------------------------------------------------------------- quality

def gates(bench, seconds):
    """What has to be equal before a number counts: flat and padded logits in float32, loss curves without dropout, the trimmed vocabulary and the full one; and which way attention and arithmetic went."""
    device, found = torch.device(bench.device), []
    exact_float32()
    for name, shape in (("nli", "large"), ("squad", "large"), ("nli", "base"), ("squad", "base"))[: 2 if bench.tiny else 4]:
        model, worst, largest = stage_model(bench.shape(shape), name, bench.device, spread=0.05).eval(), 0.0, 0.0  # wider than XLM-R's 0.02, so that attention matters to the logits
        data = encoded_of(name, *bench.data[name])
        with torch.no_grad():
            for numbers in (np.arange(1), np.arange(7), np.arange(bench.batch)):
                batch = make_batch(data, numbers).to(device)
                flat, padded = (model(batch, name, padded=way)[1].nan_to_num(neginf=0.0) for way in (False, True))
                worst, largest = max(worst, float((flat - padded).abs().max())), max(largest, float(padded.abs().max()))
        used, words = precision_used(Recipe(name="benchmark", learning_rate=0.0, batch_size=1, precision="bfloat16"), device)
        found.append({"gate": f"{name}, {bench.shape(shape)} shape: flat logits equal padded ones in float32, within 1e-5", "largest difference": worst, "largest logit": largest, "passed": worst <= 1e-5,
                      "attention in float32": attention_way(model.family, model.text.config, device, torch.float32), "attention in training": attention_way(model.family, model.text.config, device, getattr(torch, used)), "arithmetic": words})
        del model
        tidy()
    curves, weights, steps = {}, {}, 6 if bench.tiny else 30
    shape = bench.shape("small")
    small = drawn_data("nli", 256, min(900 if bench.tiny else 20000, SHAPES[shape]["vocab_size"] - 5), 128, seed=1)
    for kind in ("trimmed", "full", "padded"):
        model = stage_model(shape, "nli", bench.device, dropout=0.0, spread=0.2).train()  # so wide that a wrong attention would show in the loss
        if kind == "padded":
            plain = model.layers
            model.layers = lambda batch, every=True, padded=False: plain(batch, every, True)
        recipe, folder = Recipe(name="benchmark", learning_rate=2e-5, batch_size=8, max_steps=steps, max_length=128, weight_decay=0.01, evaluations=1), Path(tempfile.mkdtemp(dir=FOLDER))
        with redirect_stdout(io.StringIO()):
            fit(model, {"nli": encoded_of("nli", *small)}, lambda: {"nli": 0.0}, recipe, Mixing(), 0, folder, save_seconds=1e9, **({"reads": ()} if kind == "trimmed" else {}))
        curves[kind] = [row["loss"] for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in row]
        weights[kind] = {k: v.detach().cpu() for k, v in model.encoder.state_dict().items()}
        shutil.rmtree(folder)
        del model
        tidy()
    for one, other, tolerance in (("trimmed", "padded", 1e-4), ("trimmed", "full", 1e-4)):
        worst = max(abs(a - b) for a, b in zip(curves[one], curves[other]))
        found.append({"gate": f"loss curves of {steps} steps without dropout in float32: {one} and {other}, within {tolerance}", "largest difference": worst, "passed": worst <= tolerance})
    same = all(torch.equal(a, weights["full"][k]) for k, a in weights["trimmed"].items())
    worst = max(float((a - weights["full"][k]).abs().max()) for k, a in weights["trimmed"].items())
    found.append({"gate": f"weights after {steps} steps with a trimmed and a full vocabulary, identical to the bit (where the device's kernels are)", "largest difference": worst, "passed": same})
    return found


def kernels(bench, seconds):
    """Attention alone, forwards and backwards, on one NLI and one SQuAD batch: groups of similar length and each kernel of torch."""
    found, device = [], torch.device(bench.device)
    heads, size = (16, 64) if not bench.tiny else (2, 16)
    for name in ("nli", "squad"):
        lengths = np.sort(np.diff(bench.data[name][1])[:bench.batch])
        groups = LengthGroups(lengths, device)
        dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
        rows = [torch.randn(int(lengths.sum()), heads, size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        weight = torch.randn_like(rows[0])
        def both(attend, rows=rows, groups=groups, weight=weight):
            return lambda: [torch.autograd.grad(attend(*rows, groups, 0.1, None), rows, weight) for _ in range(10)]
        ways = {"groups": both(in_groups)} | {kind: both(kernel.attend) for kind, kernel in KERNELS.items() if device.type in kernel.devices and dtype in kernel.types}
        for way in ways.values():
            way()
        rounds = turns({kind: lambda way=way: timed(way) for kind, way in ways.items()}, seconds / 2)
        found += [{"against": f"groups of similar length, {name}: kernel {kind}", "ratio": spread([a / b for a, b in zip(rounds["groups"], rounds[kind])])} for kind in ways if kind != "groups"]
        found.append({"against": f"{name}: used in {str(dtype).removeprefix('torch.')}", "kernel": " ".join(kernel_for(rows[0].device, dtype, size, False)).strip()})
    return found


# ---------------------------------------------------------------- what comes out

ROWS = (  # name, title, function, options, weight in time; the targets are those of the project's list
    ("gates", "Quality gates", gates, {}, 3, ""),
    ("2", "Train NLI, XLM-R Large shape, batch 32", row_2, {}, 10, ">= 8x / 2.5x / 1.4x; >= 70 % of the roofline"),
    ("3", "Train SQuAD, XLM-R Large shape, batch 32", row_3, {}, 12, ">= 8x / 2x / 1.2x; MFU >= 45 %"),
    ("4", "Unpadding by hand with flash-attention flattening, XLM-R Large shape", row_4, {}, 6, ">= 1.2x"),
    ("5", "Optimizer step, 250k vocabulary, XLM-R Large shape", row_5, {}, 4, ">= 4x on the embedding, >= 1.5x on an NLI step, -35 % memory"),
    ("6", "Evaluate 15 languages of XNLI, XLM-R base shape", row_6, {}, 5, ">= 5x / 2.5x"),
    ("8", "Retrieval 20k x 20k x 768", row_8, {}, 2, ">= 1.4x / 10x; <= 1.8x of one product"),
    ("attention", "Attention kernels", kernels, {}, 1, ""),
    ("2b", "Train NLI, XLM-R base shape, batch 32", row_2, {"shape": "base"}, 6, ""),
    ("3b", "Train SQuAD, XLM-R base shape, batch 32", row_3, {"shape": "base"}, 8, ""),
)


def shown(value):
    """A value as the table shows it."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.3g} [{value['low']:.3g}, {value['high']:.3g}], {value['rounds']} rounds"
    if isinstance(value, dict):
        return "; ".join(f"{k} {shown(v)}" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows):
    """Markdown of one row's findings."""
    if isinstance(rows, str):
        return f"**{rows}**\n"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(shown(row[c]).replace("|", "/") if c in row else "" for c in columns) + " |" for row in rows]) + "\n"


def environment(bench):
    return {"device": bench.name, "torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0], "measured peak, TFLOP/s": round(bench.peaks["flops"] / 1e12, 2), "measured bandwidth, TB/s": round(bench.peaks["bytes"] / 1e12, 3),
            "data sheet, TFLOP/s": bench.sheet["flops"] and bench.sheet["flops"] / 1e12, "data sheet, TB/s": bench.sheet["bytes"] and bench.sheet["bytes"] / 1e12, "batch": bench.batch, "random weights": True}


def figure(results):
    """A bar for each comparison as PNG in base64; None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    bars = [(f"{number}: {row['against']}", row["ratio"]) for number, part in results["rows"].items() if isinstance(part["found"], list) for row in part["found"] if "ratio" in row]
    drawing, axes = pyplot.subplots(figsize=(9, 0.35 * len(bars) + 1))
    for place, (label, ratio) in enumerate(reversed(bars)):
        axes.barh(place, ratio["median"], xerr=[[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]], color="C0")
    axes.set_yticks(range(len(bars)), [label for label, _ in reversed(bars)], fontsize=7)
    axes.axvline(1, color="0.5")
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the peer, median and quartiles")
    data = io.BytesIO()
    drawing.savefig(data, format="png", dpi=90, bbox_inches="tight")
    return base64.b64encode(data.getvalue()).decode()


def notebook(results):
    """The run as an executed notebook: what was run, and what came of it."""
    cells, count = [], [0]
    def text(source):
        cells.append({"cell_type": "markdown", "id": f"cell-{len(cells)}", "metadata": {}, "source": source})
    def code(source, *outputs):
        count[0] += 1
        cells.append({"cell_type": "code", "id": f"cell-{len(cells)}", "metadata": {}, "execution_count": count[0], "source": source,
                      "outputs": [{"output_type": "execute_result", "execution_count": count[0], "metadata": {}, "data": o} for o in outputs]})
    text("# Speed on a GPU\n\nWritten by `gpu_benchmark.py`, which ran the code that is shown. Ratios are tokens per second of this package over those of the peer in the same round, medians with quartiles; rounds alternate (A B, B A). A slower row stays.\n\n" + LENGTHS["about"] + "\n\n" + FORMULA)
    code("environment(bench)", {"text/plain": json.dumps(results["environment"], indent=1)})
    for part in (Loop, turns, against, ours, trainer, ByHand, by_hand, with_graphs, work):
        code(inspect.getsource(part).rstrip())
    for number, part in results["rows"].items():
        text(f"## {number}. {part['title']}\n" + (f"\nTarget: {part['target']}\n" if part["target"] else ""))
        source = inspect.getsource(part["function"]).rstrip() + "\n\n" + part["call"]
        code(source, {"text/markdown": table(part["found"]), "text/plain": json.dumps(part["found"], indent=1, default=str)})
        if part.get("trace"):
            text("```\n" + part["trace"] + "\n```")
    if picture := figure(results):
        code("figure(results)", {"image/png": picture, "text/plain": "figure"})
    return {"cells": cells, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}


def write(results, folder):
    """Write what is known so far; called after every row, so that a killed run loses one row."""
    plain = results | {"rows": {k: {n: v for n, v in part.items() if n != "function"} for k, part in results["rows"].items()}}
    (folder / "results.json").write_text(json.dumps(plain, indent=1, default=str) + "\n")
    parts = [f"# Speed on a GPU\n\n{results['environment']['device']}, torch {results['environment']['torch']}, transformers {results['environment']['transformers']}; {results['seconds']:.0f} s\n"]
    parts += [f"## {number}. {part['title']}\n" + (f"\nTarget: {part['target']}\n" if part["target"] else "") + "\n" + table(part["found"]) for number, part in results["rows"].items()]
    (folder / "table.md").write_text("\n".join(parts))
    (folder / "gpu_benchmark.ipynb").write_text(json.dumps(notebook(results), indent=1, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, table.md and gpu_benchmark.ipynb")
    parser.add_argument("--minutes", type=float, default=8, help="time for everything; fewer mean fewer rounds, not fewer rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that every row works, and measures nothing")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu --tiny shows what the script does")
    begun = time.monotonic()
    asked.out.mkdir(parents=True, exist_ok=True)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = [row for row in ROWS if not (asked.tiny and "shape" in row[3])]  # at toy size there is one shape
    def too_late():
        print(f"stopped: a row did not end; what was measured before it is in {asked.out}", file=sys.stderr, flush=True)
        os._exit(3)
    watch = threading.Timer(60 * asked.minutes * 1.5 + 60, too_late)
    watch.daemon = True
    watch.start()
    bench, clock = Bench(asked.device, asked.tiny), Clock(asked.minutes * 0.92, {row[0]: row[4] for row in rows})
    results = {"environment": environment(bench), "lengths": LENGTHS["about"], "formula": FORMULA, "seconds": 0.0, "rows": {}}
    for name, title, function, options, _, target in rows:
        seconds, started = clock.share(name), time.monotonic()
        exact_float32()
        part = results["rows"][name] = {"title": title, "target": target, "function": function, "call": f"{function.__name__}(bench, {seconds:.0f}{''.join(f', {k}={v!r}' for k, v in options.items())})"}
        try:
            part["found"] = function(bench, seconds, **options)
        except Exception as error:
            part["found"], part["trace"] = said(error), traceback.format_exc()[-3000:]
        tidy()
        part["seconds"], results["seconds"] = round(time.monotonic() - started, 1), time.monotonic() - begun
        print(f"{name}. {title} ({part['seconds']:.0f} s)\n{table(part['found'])}", flush=True)
        write(results, asked.out)
    print(f"{results['seconds']:.0f} s; written to {asked.out}")


if __name__ == "__main__":
    main()
