"""Examples become tokens without loss: windows cover everything, batches hold exactly their examples."""

import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from xtransfer.core import XtransferError
from xtransfer.encoding import IGNORED, _word_windows, encode, encode_sentences, evaluation_batches, make_batch
from xtransfer.studies import Recipe
from xtransfer.tasks import TASKS, load_examples

RECIPE = Recipe(name="test", learning_rate=1e-3, batch_size=4, max_length=96, stride=8)
TRAINED = ("toy_pair", "toy_choice", "toy_tags", "toy_qa", "toy_qa2", "toy_text", "toy_ranked")


@pytest.fixture
def tokenizer(toys):
    from xtransfer.backbones import BACKBONES

    return BACKBONES["toy-encoder"].build_tokenizer()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(9, 30), st.integers(0, 12))
def test_word_windows_cover_every_word_and_cut_none(sizes, room, stride):
    windows = _word_windows(sizes, room, stride)
    assert {w for a, b in windows for w in range(a, b)} == set(range(len(sizes)))
    assert all(sum(sizes[a:b]) <= room for a, b in windows) and all(b > a for a, b in windows)
    assert all(c <= b and c > a and d > b for (a, b), (c, d) in zip(windows, windows[1:])), "windows go on where the last one ended, or before"
    assert all(sum(sizes[c:b]) <= stride for (_, b), (c, _) in zip(windows, windows[1:]))


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=13), seed=st.integers(0, 2**20))
def test_a_batch_holds_exactly_its_examples(lengths, seed):
    from toys import toy_tokenizer

    encoded = encode_sentences(toy_tokenizer(), ["a" * n if n == 1 else " ".join("b" * n) for n in lengths], 32)
    assert encoded.lengths.tolist() == [n + 2 for n in lengths]
    chosen = np.random.default_rng(seed).permutation(len(lengths))[:max(1, seed % len(lengths))]
    batch = make_batch(encoded, chosen)
    assert list(batch.lengths) == sorted(batch.lengths) and sum(batch.lengths) == len(batch.input_ids) and batch.examples == len(chosen)
    begin = np.concatenate([[0], np.cumsum(batch.lengths)])
    for row, (number, place) in enumerate(zip(batch.sequence, batch.example.tolist())):
        assert number == chosen[place]
        assert batch.input_ids[begin[row]:begin[row + 1]].tolist() == encoded.ids[encoded.starts[number]:encoded.starts[number + 1]].tolist()


@pytest.mark.parametrize("name", TRAINED)
def test_evaluation_batches_hold_every_example_once_with_its_targets(name, tokenizer):
    encoded = encode(tokenizer, TASKS[name], load_examples(TASKS[name], "en", "train").rows, RECIPE)
    for tokens in (1, 97, 500, 10**6):
        batches = evaluation_batches(encoded, tokens)
        assert sorted(np.concatenate(batches).tolist()) == list(range(encoded.examples))
        tokens_seen = np.concatenate([make_batch(encoded, b).input_ids.numpy() for b in batches])
        assert sorted(tokens_seen.tolist()) == sorted(encoded.ids.tolist())
        for kind, values in encoded.token_targets.items():
            seen = np.concatenate([make_batch(encoded, b).targets[kind].numpy() for b in batches])
            assert sorted(map(str, seen.tolist())) == sorted(map(str, values.tolist()))


def test_every_word_begins_in_a_window_with_its_tag(tokenizer):
    rng = random.Random(4)
    rows = [{"id": str(i), "tokens": ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 7))) for _ in range(n)], "tags": None} for i, n in enumerate((1, 2, 13, 60, 97))]
    rows = [r | {"tags": [rng.choice(("O", "B-LONG")) for _ in r["tokens"]]} for r in rows]
    rows.append({"id": "odd", "tokens": ["​", "a", "x" * 300], "tags": ["O", "B-LONG", "O"]})
    encoded = encode(tokenizer, TASKS["toy_tags"], rows, Recipe(name="t", learning_rate=0, batch_size=1, max_length=24, stride=8))
    assert encoded.lengths.max() <= 24 and len(encoded.lengths) > len(rows)
    word, tag = encoded.token_targets["word"], encoded.token_targets["tag"]
    owner = encoded.example[np.searchsorted(encoded.starts, np.arange(len(word)), side="right") - 1]
    for i, row in enumerate(rows):
        mine = (owner == i) & (word >= 0)
        assert set(word[mine].tolist()) == set(range(len(row["tokens"])))
        assert all(TASKS["toy_tags"].labels[t] == row["tags"][w] for w, t in zip(word[mine], tag[mine]))
    assert ((tag == IGNORED) == (word < 0)).all()


@pytest.mark.parametrize("name", ("toy_qa", "toy_qa2"))
def test_window_offsets_give_the_answer_back(name, tokenizer):
    rows = [r | {"context": r["context"] + " " + "abc " * 60} for r in load_examples(TASKS[name], "de", "train").rows]
    encoded = encode(tokenizer, TASKS[name], rows, RECIPE)
    spans, characters = encoded.sequence_targets["span"], encoded.token_targets["characters"]
    found = set()
    for s, (first, last) in enumerate(spans.tolist()):
        row, window = rows[encoded.example[s]], characters[encoded.starts[s]:encoded.starts[s + 1]]
        if (first, last) != (-1, -1):
            assert row["context"][window[first, 0]:window[last, 1]] == row["answers"][0]
            found.add(int(encoded.example[s]))
    assert found == {i for i, r in enumerate(rows) if r["answers"]}
    covered = [np.zeros(len(r["context"]), dtype=bool) for r in rows]
    for s in range(len(spans)):
        for a, b in characters[encoded.starts[s]:encoded.starts[s + 1]]:
            covered[encoded.example[s]][max(a, 0):max(b, 0)] = True
    assert all(c[[ch != " " for ch in r["context"]]].all() for c, r in zip(covered, rows)), "every character of a context is in a window"


def test_nothing_is_cut_off_without_being_counted(tokenizer):
    short = Recipe(name="t", learning_rate=0, batch_size=1, max_length=16)
    texts = ["a b", " ".join("a" * 13), " ".join("a" * 14), " ".join("a" * 15), " ".join("a" * 40)]
    rows = [{"id": "", "text": t, "text_pair": "", "label": "yes"} for t in texts]
    encoded = encode(tokenizer, TASKS["toy_pair"], rows, short)
    assert encoded.lengths.tolist() == [4, 15, 16, 16, 16] and encoded.truncated == 2
    choices = [{"id": "", "text": "a", "choices": [" ".join("b" * n), "c"], "label": 0} for n in (10, 11, 12, 30)]  # 1 + n + 4 special tokens
    encoded = encode(tokenizer, TASKS["toy_choice"], choices, short)
    assert encoded.truncated == 2, "a choice that fits exactly is not cut; one example counts once"
    pairs = [{"id": "", "text": "a", "text_pair": " ".join("b" * n)} for n in (11, 12)]
    assert encode(tokenizer, TASKS["toy_text"], pairs, short).truncated == 1
    long = [{"id": "", "text": " ".join("a" * 40), "text_pair": ""}]
    encoded = encode(tokenizer, TASKS["toy_text"], long, short)
    assert encoded.truncated == 0 and (encoded.ids == tokenizer("a")["input_ids"][1]).sum() == 40, "running text goes on in the next block"


def test_queries_and_candidates_are_encoded_apart(tokenizer):
    """A training example is a query and its first right candidate; candidates are numbered by their text; a query is cut sooner than a candidate."""
    from xtransfer.encoding import MAX_QUERY, encode_sides

    def row(i, side, text, context="", relevant=()):
        return {"id": i, "side": side, "text": text, "text_pair": context, "relevant": list(relevant)}
    rows = [row("q1", "query", "a", relevant=["c2", "c1"]), row("c1", "candidate", "b c", "d"), row("q2", "query", "h", relevant=["c3"]), row("c2", "candidate", "g"), row("c3", "candidate", "g"),
            row("c4", "candidate", "f")]
    long = Recipe(name="t", learning_rate=0, batch_size=1, max_length=120)
    encoded = encode(tokenizer, TASKS["toy_ranked"], rows, long)
    texts = [tokenizer.decode(encoded.ids[a:b]).replace(" ", "") for a, b in zip(encoded.starts, encoded.starts[1:])]
    assert texts == ["<s>a</s>", "<s>g</s>", "<s>h</s>", "<s>g</s>"] and encoded.examples == 2 and encoded.example.tolist() == [0, 0, 1, 1]
    first, second = encoded.example_targets["relevant"].tolist()
    assert second == [first[0], -1] and first[1] not in (first[0], -1), "c2 and c3 are the same text"
    assert tokenizer.decode(encode_sides(tokenizer, rows[1:2], long).ids).replace(" ", "") == "<s>bc</s></s>d</s>"
    wide = encode_sides(tokenizer, [row("q", "query", "a " * 110), row("c", "candidate", "a " * 110), row("c", "candidate", "a " * 70, "b " * 70)], long)
    assert wide.lengths.tolist() == [MAX_QUERY, 112, 120] and wide.truncated == 2
    with pytest.raises(XtransferError, match="q1 .* c2, c1"):
        encode(tokenizer, TASKS["toy_ranked"], rows[:3], long)
    with pytest.raises(XtransferError, match="q1 .* none"):
        encode(tokenizer, TASKS["toy_ranked"], [row("q1", "query", "a")], long)
