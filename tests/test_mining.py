"""One pass over tiles finds what sorting all cosines finds; pairs, thresholds and answers are those of plain implementations; a model that is stopped gives the states of one that is not."""

import numpy as np
import pytest
import torch

import xtransfer.evaluation as evaluation
import xtransfer.mining as mining
import xtransfer.vectors as vectors
from copies import COPIES
from test_families import SHAPES, batch_of, copy  # noqa: F401  (a fixture)
from test_modeling import model_of
from xtransfer.core import XtransferError
from xtransfer.mining import NEIGHBOURS, best_threshold, mine_pairs, nearest, neighbours_both_ways
from xtransfer.modeling import StageModel, blocks_of, load_encoder, load_tokenizer
from xtransfer.spans import ROWS, answer_texts, best_spans, decode_answers, window_answers
from xtransfer.studies import Recipe
from xtransfer.tasks import TASKS, load_examples
from xtransfer.vectors import normalized, room_for, taken

# The plain ways


def plain_neighbours(queries, pool):
    """The nearest of each query by two products, one per direction."""
    k = min(NEIGHBOURS, len(pool))
    cosine = queries @ pool.T
    near = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosine, near, 1), near


def plain_mine_pairs(source, target, neighbours=plain_neighbours):
    """Margin mining with numpy, one pair at a time."""
    (ahead, forward), (behind, backward) = neighbours(source, target), neighbours(target, source)
    mean_source, mean_target = ahead.mean(1), behind.mean(1)
    ahead, behind = ahead / ((mean_source[:, None] + mean_target[forward]) / 2), behind / ((mean_target[:, None] + mean_source[backward]) / 2)
    pairs = list(enumerate(np.take_along_axis(forward, ahead.argmax(1)[:, None], 1)[:, 0].tolist()))
    pairs += [(i, j) for j, i in enumerate(np.take_along_axis(backward, behind.argmax(1)[:, None], 1)[:, 0].tolist())]
    values = np.concatenate((ahead.max(1), behind.max(1)))
    found, used_source, used_target = [], set(), set()
    for place in np.argsort(-values, kind="stable").tolist():
        i, j = pairs[place]
        if i not in used_source and j not in used_target and values[place] > 0:
            used_source.add(i), used_target.add(j)
            found.append((i, j, float(values[place])))
    return found


def plain_threshold(candidates, gold):
    """The best cut, one candidate at a time."""
    best, threshold, right = 0.0, 0.0, 0
    for count, (source, target, value) in enumerate(candidates, start=1):
        right += (source, target) in gold
        precision, recall = right / count, right / max(1, len(gold))
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        if f1 > best:
            best, threshold = f1, (value + candidates[count][2]) / 2 if count < len(candidates) else value
    return threshold


def plain_answers(logits, characters, nowhere, example, contexts, most, allow_none):
    """Every pair of every window: of equal scores the first window, in it the shortest span, of those the first."""
    texts, best, none = [""] * len(contexts), [-np.inf] * len(contexts), [np.inf] * len(contexts)
    logits = logits.astype(np.float64)
    for w, i in enumerate(example.tolist()):
        none[i] = min(none[i], logits[w, nowhere[w]].sum())
        length = logits.shape[1]
        for extra in range(min(most, length)):
            for a in range(length - extra):
                b = a + extra
                if characters[w, a, 0] >= 0 and characters[w, b, 0] >= 0 and logits[w, a, 0] + logits[w, b, 1] > best[i]:
                    best[i], texts[i] = logits[w, a, 0] + logits[w, b, 1], contexts[i][characters[w, a, 0]:characters[w, b, 1]].strip()
    return ["" if allow_none and n > b else text for n, b, text in zip(none, best, texts)]


def units(n, size, seed, dtype=np.float32):
    found = np.random.default_rng(seed).normal(size=(n, size)) + 0.5
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(dtype)


@pytest.fixture(params=(64, 100, 2048))
def tile(request, monkeypatch):
    """Tiles of several sizes, one of which is no multiple of a chunk; strips of two tiles."""
    monkeypatch.setattr(mining, "TILE", {"cpu": request.param, "cuda": request.param})
    monkeypatch.setattr(mining, "STRIP", 2)
    return request.param


SIDES = ((1, 1), (1, 7), (7, 1), (3, 2), (64, 64), (65, 63), (211, 509), (509, 211), (701, 130))


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("k", (1, 4, 11))
@pytest.mark.parametrize("sides", SIDES)
def test_neighbours_equal_sorting_all_cosines(sides, k, ties, tile):
    rng = np.random.default_rng(sum(sides) + k)
    one, two = (rng.integers(-1, 2, size=(n, 3)).astype(np.float64) if ties else units(n, 24, n + i, np.float64) for i, n in enumerate(sides))
    cosine = one @ two.T
    for (values, places), every in zip(neighbours_both_ways(one, two, k), (cosine, cosine.T)):
        wanted = np.argsort(-every, axis=1, kind="stable")[:, :k]
        assert values.shape == places.shape == wanted.shape and (places == wanted).all()
        np.testing.assert_allclose(values, np.take_along_axis(every, wanted, 1), rtol=1e-12, atol=1e-12)
    assert (nearest(one, two) == cosine.argmax(1)).all()


def test_everything_equal_gives_the_lowest_numbers(tile):
    (_, forward), (_, backward) = neighbours_both_ways(np.ones((300, 2), dtype=np.float32), np.ones((260, 2), dtype=np.float32), 4)
    assert (forward == np.arange(4)).all() and (backward == np.arange(4)).all()


def test_growing_cosines_and_tensors_and_half_precision(tile):
    """Every tile brings better ones than all before: nothing may be kept too long."""
    angle = np.linspace(1.5, 0.1, 601)
    pool = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    (values, places), _ = neighbours_both_ways(np.array([[1.0, 0.0]]), pool, 4)
    assert places.tolist() == [[600, 599, 598, 597]]
    (_, again), _ = neighbours_both_ways(torch.tensor([[1.0, 0.0]]), torch.from_numpy(pool).float(), 4)
    assert again.tolist() == places.tolist()
    (rounded, _), _ = neighbours_both_ways(np.array([[1.0, 0.0]], dtype=np.float16), pool.astype(np.float16), 4)
    assert rounded.dtype == np.float32 and np.allclose(rounded, values, atol=2e-3)


def test_what_is_no_number_is_nobodys_neighbour(tile):
    one, two = units(300, 8, 0), units(140, 8, 1)
    one[7], two[139] = np.nan, np.inf
    (values, places), (behind, backward) = neighbours_both_ways(one, two, 4)
    kept = np.delete(np.arange(300), 7)
    (wanted, near), (others, back) = neighbours_both_ways(one[kept], two[:139], 4)
    assert (places[kept] == near).all() and np.allclose(values[kept], wanted, atol=1e-6) and np.isnan(values[7]).all() and np.isnan(behind[139]).all()
    assert (backward[:139] == kept[back]).all() and np.allclose(behind[:139], others, atol=1e-6)
    left, right = mine_pairs(one[kept], two[:139]), mine_pairs(one, two)  # matrix products of other shapes: last digits may differ, and on some processors do
    assert {(int(kept[i]), j) for i, j, _ in left} == {(i, j) for i, j, _ in right} and np.allclose(sorted(v for *_, v in left), sorted(v for *_, v in right), atol=1e-5)
    assert mine_pairs(one * np.nan, two) == [] and (nearest(one * np.nan, two) == 0).all()


def test_precision_that_a_model_asked_for_does_not_reach_cosines():
    one, two = units(200, 768, 0), units(200, 768, 1)
    wanted = neighbours_both_ways(one, two, 4)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = neighbours_both_ways(one, two, 4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(np.array_equal(a, b) for x, y in zip(wanted, found) for a, b in zip(x, y))


@pytest.mark.parametrize("sides", (*SIDES, (5, 1)))
@pytest.mark.parametrize("centred", (False, True))
def test_mined_pairs_equal_the_plain_way(sides, centred, tile):
    rng = np.random.default_rng(sum(sides))
    meaning = rng.normal(size=(max(sides), 48))
    one, two = (normalized((meaning[rng.permutation(max(sides))[:n]] + 0.4 * rng.normal(size=(n, 48)) + 1.5).astype(np.float32), centred) for n in sides)
    found, wanted = mine_pairs(one, two), plain_mine_pairs(one, two)
    if centred and min(sides) < 3:
        return  # one or two sentences around their mean: margins are quotients of rounding errors
    assert [(i, j) for i, j, _ in found] == [(i, j) for i, j, _ in wanted]
    np.testing.assert_allclose([v for *_, v in found], [v for *_, v in wanted], atol=1e-6, rtol=1e-6)


def test_sentences_twice_on_one_side_and_rows_in_another_order(tile):
    """Copies have equal cosines, so the first of them is mined; the order of the others' rows changes nothing but numbers."""
    one, two = units(90, 16, 3, np.float64), units(130, 16, 4, np.float64)
    doubled = np.concatenate([one, one])
    assert {i for i, *_ in mine_pairs(doubled, two[:40])} <= set(range(180))
    assert [(i, j) for i, j, _ in mine_pairs(doubled, two)] == [(i, j) for i, j, _ in plain_mine_pairs(doubled, two)]
    turned = np.random.default_rng(0).permutation(130)
    assert sorted((i, int(turned[j])) for i, j, _ in mine_pairs(one, two[turned])) == sorted((i, j) for i, j, _ in mine_pairs(one, two))


def test_thresholds_equal_the_plain_way():
    rng = np.random.default_rng(5)
    for n in (0, 1, 2, 3, 7, 40, 101):
        for share in (0.0, 0.3, 0.9, 1.0):
            candidates = [(i, i, float(v)) for i, v in enumerate(np.sort(np.round(rng.normal(1, 0.3, n), 1))[::-1])]
            for gold in ({(i, i) for i in range(n + 5) if rng.random() < share}, {(i, i) for i in range(n)}, {("a", "b")}, set()):
                assert best_threshold(candidates, gold) == plain_threshold(candidates, gold)


def test_vectors_of_a_file_are_mined_in_strips(tmp_path, monkeypatch):
    """Large arrays live in temporary files, are read strip by strip and give what arrays in memory give; a full disk is one sentence."""
    raw = (np.random.default_rng(0).normal(size=(900, 32)).astype(np.float32) + 1, np.random.default_rng(1).normal(size=(700, 32)).astype(np.float32))
    wanted = [[normalized(side, centred) for side in raw] for centred in (False, True)]
    monkeypatch.setattr(vectors, "IN_MEMORY", 10_000)
    monkeypatch.setattr(vectors, "BLOCK", 130)
    monkeypatch.setattr(mining, "TILE", {"cpu": 128})
    monkeypatch.setattr(mining, "STRIP", 2)
    most = []
    real = mining._block
    monkeypatch.setattr(mining, "_block", lambda found, begin, size, device: most.append(size) or real(found, begin, size, device))
    for centred in (False, True):
        stored = [normalized(side, centred) for side in raw]
        assert all(isinstance(side, np.memmap) for side in stored) and all(np.array_equal(a, b) for a, b in zip(stored, wanted[centred]))
        assert mine_pairs(*stored) == mine_pairs(*wanted[centred])
    assert max(most) == 256
    order = np.random.default_rng(2).permutation(900)
    assert np.array_equal(taken(raw[0], order), raw[0][order]) and isinstance(taken(raw[0], order), np.memmap)
    monkeypatch.setattr(vectors.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")), raising=False)
    with pytest.raises(XtransferError, match="900 vectors of 32 numbers need .* No space left") as error:
        room_for(900, 32)
    assert "\n" not in str(error.value)


def test_a_device_that_finds_something_else_is_not_used(monkeypatch):
    """Stands for a GPU: the search on it is tried on little and compared."""
    wanted, real = neighbours_both_ways(units(50, 8, 0), units(40, 8, 1), 4), mining._search
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for broken in (lambda found: (_ for _ in ()).throw(RuntimeError("no kernel image")), lambda found: tuple((values, places + 1) for values, places in found)):
        asked = []

        def search(source, target, k, device):
            asked.append(device.type)
            found = real(source, target, k, torch.device("cpu"))
            return broken(found) if device.type == "cuda" else found
        monkeypatch.setattr(mining, "_search", search)
        assert mining._device() == torch.device("cpu") and "cuda" in asked
        assert all(np.array_equal(a, b) for x, y in zip(wanted, neighbours_both_ways(units(50, 8, 0), units(40, 8, 1), 4)) for a, b in zip(x, y))
    asked = []
    monkeypatch.setattr(mining, "_search", lambda source, target, k, device: asked.append(device.type) or real(source, target, k, torch.device("cpu")))
    assert mining._device() == torch.device("cuda")


# Answers


def windows_of(rng, sizes, longest, ties=False, dtype=np.float32):
    """Random windows of some examples, with the question before the context and nothing after it."""
    example = np.repeat(np.arange(len(sizes)), sizes)
    n = len(example)
    lengths = rng.integers(1, longest + 1, n)
    lengths[rng.integers(n)] = longest
    logits = rng.integers(-2, 3, size=(n, longest, 2)).astype(dtype) if ties else rng.normal(size=(n, longest, 2)).astype(dtype)
    characters = np.full((n, longest, 2), -1)
    for w in range(n):
        begin = int(rng.integers(0, lengths[w] + 1))  # as long as the window: no context in it
        place = np.cumsum(rng.integers(1, 4, size=2 * (lengths[w] - begin))).reshape(-1, 2)
        characters[w, begin:lengths[w]] = place
        logits[w, lengths[w]:] = -np.inf
    nowhere = np.where(rng.random(n) < 0.5, 0, lengths - 1)
    return logits, characters, nowhere, example, ["".join(rng.choice(list("ab cd"), 4 * longest)) for _ in sizes]


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("allow_none", (False, True))
@pytest.mark.parametrize("longest", (1, 2, 3, 13, 31, 47))
def test_answers_equal_every_pair_of_every_window(longest, allow_none, ties):
    rng = np.random.default_rng(longest)
    for most in (1, 2, 5, 30):
        for sizes in ([1], [1, 1, 3, 1, 7], [2] * 5):
            given = windows_of(rng, sizes, longest, ties)
            wanted = plain_answers(*given, most, allow_none)
            assert decode_answers(*given, most, allow_none) == wanted
            cut = int(rng.integers(len(given[3]) + 1))
            parts = [window_answers(*(a[part] for a in given[:4]), most) for part in (slice(0, cut), slice(cut, None))]
            assert answer_texts(parts, given[4], allow_none) == wanted, "in whatever batches"


def test_long_windows_and_more_than_a_block_of_them():
    rng = np.random.default_rng(0)
    given = windows_of(rng, [1, 2], 512)
    assert decode_answers(*given, 30, False) == plain_answers(*given, 30, False)
    given = windows_of(rng, [1, 2, 1, 3] * 90, 9, ties=True)
    assert len(given[3]) > 2 * ROWS and decode_answers(*given, 4, True) == plain_answers(*given, 4, True)


def test_what_is_no_number_is_no_answer():
    given = windows_of(np.random.default_rng(0), [2, 1], 9)
    for none in (False, True):
        assert decode_answers(np.full_like(given[0], np.nan), *given[1:], 30, none) == ["", ""]
    score, first, last = best_spans(np.full((2, 3, 2), -np.inf), np.ones((2, 3), dtype=bool), 30)
    assert (score == -np.inf).all() and (first == 0).all() and (last == 0).all()


# Stopping at a layer


def counted(model):
    """How often each block ran, by its number."""
    ran = []
    for i, block in enumerate(blocks_of(model.text, model.encoder.config.get_text_config().num_hidden_layers)):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    return ran


@pytest.mark.parametrize("name", COPIES)
def test_a_stopped_model_gives_the_states_of_all_layers_bit_for_bit(name, copy):  # noqa: F811
    backbone = copy(name)
    tokenizer = load_tokenizer(backbone)
    model = StageModel(load_encoder(backbone, tokenizer, 0), (), 0, backbone).eval()
    ran = counted(model)
    for shape in SHAPES.values():
        batch = batch_of(shape, len(tokenizer), min(backbone.max_length, 128))
        for padded in (False, True):
            with torch.no_grad():
                every = model.layers(batch, padded=padded)
                for layer in range(backbone.layers + 1):
                    ran.clear()
                    assert torch.equal(model.states(batch, layer=layer, padded=padded), every[layer])
                    assert set(ran) == set(range(layer)), "what comes after is not computed"
                assert torch.equal(model.states(batch, layer=-2, padded=padded), every[-2])
                with pytest.raises(IndexError):
                    model.states(batch, layer=backbone.layers + 1, padded=padded)
    assert not any(block._forward_pre_hooks for block in model.modules()), "nothing stays behind"


@pytest.mark.parametrize("name", ("xlm-roberta", "qwen3", "mt5", "clip"))
def test_gradients_pass_a_stop_and_recomputed_activations_go_without(name, copy):  # noqa: F811
    backbone = copy(name)
    tokenizer = load_tokenizer(backbone)
    model = StageModel(load_encoder(backbone, tokenizer, 0), (), 0, backbone).eval()
    batch = batch_of((2, 5, 9), len(tokenizer))

    def gradients(states):
        model.zero_grad(set_to_none=True)
        states.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    whole, stopped = gradients(model.layers(batch)[1]), gradients(model.states(batch, layer=1))
    assert whole.keys() >= stopped.keys() and stopped and all(torch.equal(stopped[n], whole[n]) for n in stopped)
    model.encoder.gradient_checkpointing_enable()
    assert blocks_of(model.text, backbone.layers) is not None and blocks_of(model.train().text, backbone.layers) is None
    torch.manual_seed(0)
    recomputed = model.layers(batch)[1]
    torch.manual_seed(0)
    assert torch.equal(model.states(batch, layer=1), recomputed)


def test_a_model_whose_layers_are_not_a_list_computes_all(copy):  # noqa: F811
    backbone = copy("bert")
    tokenizer = load_tokenizer(backbone)
    model = StageModel(load_encoder(backbone, tokenizer, 0), (), 0, backbone).eval()
    batch = batch_of((2, 5, 9), len(tokenizer))
    with torch.no_grad():
        wanted = model.states(batch, layer=1)
        layers = model.text.encoder.layer
        layers[1] = layers[0]  # one layer used twice, as in ALBERT
        assert blocks_of(model.text, backbone.layers) is None
        assert torch.equal(model.states(batch, layer=1), wanted)


# One stream


@pytest.fixture
def streams(monkeypatch):
    """What was cut into batches for evaluation, and the tokens of each of its examples in the order in which they are read."""
    seen, real = [], evaluation.evaluation_batches

    def cut(encoded, *given):
        batches = real(encoded, *given)
        sizes = np.add.reduceat(encoded.lengths, encoded.first_sequence[:-1])
        seen.append((encoded.examples, sizes[np.concatenate(batches)]))
        return batches
    monkeypatch.setattr(evaluation, "evaluation_batches", cut)
    return seen


RECIPE = Recipe(name="test", learning_rate=0, batch_size=4, max_length=96, stride=8, max_answer_length=5)


@pytest.mark.parametrize("name", ("toy_pair", "toy_choice", "toy_tags", "toy_qa", "toy_ranked"))
def test_all_languages_of_a_task_are_one_stream_ordered_by_length(name, toys, streams):
    task, model = TASKS[name], model_of()
    parts = [load_examples(task, language, "test") for language in task.languages]
    evaluator = evaluation.make_evaluator(load_tokenizer(evaluation_backbone()), task, task, parts, RECIPE)
    evaluator.score(model, "last")
    asked = sum(len(part.rows) if name != "toy_ranked" else sum(row["side"] == "query" for row in part.rows) for part in parts)
    pool = [sum(row["side"] == "candidate" for part in parts for row in part.rows)] if name == "toy_ranked" else []
    assert len(parts) > 1 and [count for count, _ in streams] == [asked, *pool] and all((np.diff(sizes) <= 0).all() for _, sizes in streams)


def evaluation_backbone():
    from xtransfer.backbones import BACKBONES

    return BACKBONES["toy-encoder"]


@pytest.mark.parametrize("name", ("toy_retrieval", "toy_mining"))
def test_sentences_of_all_languages_are_one_stream_too(name, toys, streams, tmp_path):
    from xtransfer.steps import Step, score

    step = Step(folder=tmp_path, backbone="toy-encoder", parent="", train=[], score=[name], score_splits=["test"], languages=[], recipe={"name": "x", "learning_rate": 1e-3, "batch_size": 8, "max_steps": 1}, mixing={}, seed=0,
                train_limit=None, score_limit=None, threads=1, declarations=[])
    streams.clear()
    table = score(step)
    columns = ("text",) if name == "toy_mining" else ("query", "document")
    parts = [load_examples(TASKS[name], language, split) for language in TASKS[name].languages for split in (("dev", "test") if name == "toy_mining" else ("test",))]
    assert [count for count, _ in streams] == [len({row[c] for part in parts for row in part.rows for c in columns})] and (np.diff(streams[0][1]) <= 0).all()
    assert len(table) == len(TASKS[name].languages) > 1
