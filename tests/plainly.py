"""The plain way to encode: row by row, every text as often as it occurs, in the tokenizer's own call. The package's arrays must be equal to these."""

from itertools import chain
from typing import Any, Mapping, Sequence

import numpy as np

from xtransfer.encoding import IGNORED, MAX_QUERY, MAX_QUESTION, Encoded, _answer_characters, _answer_tokens, _word_windows, pair_affixes, special_affixes, with_segments, word_prefix


def _flat(
    sequences: Sequence[Sequence[int]],  # token ids of each sequence
    example: Sequence[int] | None = None,  # example of each sequence; None: one each
    **others: Any,  # further fields of Encoded
) -> Encoded:
    """Lay sequences end to end."""
    starts = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(s) for s in sequences], out=starts[1:])
    ids = np.fromiter(chain.from_iterable(sequences), dtype=np.int32, count=starts[-1])
    owner = np.arange(len(sequences)) if example is None else np.asarray(example, dtype=np.int64)
    return Encoded(ids=ids, starts=starts, example=owner, **({"examples": len(sequences)} | others))


def _ids_of_texts(
    tokenizer: Any,  # a fast transformers tokenizer
    texts: Sequence[str],
    pairs: Sequence[str] | None,  # second texts; None when no example has one
    max_length: int,
) -> tuple[list[list[int]], list[int]]:  # token ids with special tokens, numbers of the truncated texts
    """Token ids of texts or pairs of texts."""
    def encode(rows: Sequence[int], **options: Any) -> list[list[int]]:
        second = None if pairs is None else [pairs[i] for i in rows]
        return tokenizer([texts[i] for i in rows], second, return_attention_mask=False, verbose=False, **options)["input_ids"] if rows else []

    ids = encode(range(len(texts)), truncation=False)
    long = [i for i, sequence in enumerate(ids) if len(sequence) > max_length]
    for i, short in zip(long, encode(long, truncation=True, max_length=max_length)):
        ids[i] = short
    return ids, long


def plain_classification(tokenizer: Any, task, rows: Sequence[Mapping[str, Any]], recipe) -> Encoded:
    """One sequence per example; the target is the index of its label."""
    pairs = [r["text_pair"] for r in rows] if any(r["text_pair"] for r in rows) else None
    ids, truncated = _ids_of_texts(tokenizer, [r["text"] for r in rows], pairs, recipe.max_length)
    labels = np.array([task.labels.index(r["label"]) for r in rows], dtype=np.int64)
    return _flat(ids, example_targets={"label": labels}, truncated=len(truncated))


def plain_choices(tokenizer: Any, task, rows: Sequence[Mapping[str, Any]], recipe) -> Encoded:
    """One sequence per choice, `text` paired with the choice; the target is the index of the right choice."""
    owner = [i for i, r in enumerate(rows) for _ in r["choices"]]
    ids, truncated = _ids_of_texts(tokenizer, [rows[i]["text"] for i in owner], [c for r in rows for c in r["choices"]], recipe.max_length)
    return _flat(ids, owner, examples=len(rows), truncated=len({owner[k] for k in truncated}), example_targets={"label": np.array([r["label"] for r in rows], dtype=np.int64)})


def plain_tagging(tokenizer: Any, task, rows: Sequence[Mapping[str, Any]], recipe) -> Encoded:
    """One sequence per window of words; the target of a word's first subword is its tag, all others are IGNORED."""
    before, after = special_affixes(tokenizer)
    room = recipe.max_length - len(before) - len(after)
    space = word_prefix(tokenizer)
    encodings = tokenizer([[space + word for word in r["tokens"]] for r in rows], is_split_into_words=True, add_special_tokens=False, return_attention_mask=False, verbose=False)
    index = {label: i for i, label in enumerate(task.labels)}
    sequences, owner, words, tags, truncated = [], [], [], [], 0
    for i, row in enumerate(rows):
        pieces: list[list[int]] = [[] for _ in row["tokens"]]
        for token, word in zip(encodings["input_ids"][i], encodings.word_ids(i)):
            pieces[word].append(token)
        truncated += any(len(p) > room for p in pieces)
        pieces = [p[:room] or [tokenizer.unk_token_id] for p in pieces]
        for first, last in _word_windows([len(p) for p in pieces], room, min(recipe.stride, room // 2)):
            begins = [w if k == 0 else -1 for w in range(first, last) for k in range(len(pieces[w]))]
            sequences.append(before + [t for w in range(first, last) for t in pieces[w]] + after)
            begins = [-1] * len(before) + begins + [-1] * len(after)
            owner.append(i), words.extend(begins)
            tags.extend(IGNORED if w < 0 else index[row["tags"][w]] for w in begins)
    return _flat(sequences, owner, examples=len(rows), truncated=truncated, token_targets={"tag": np.array(tags, dtype=np.int64), "word": np.array(words, dtype=np.int64)})


def _token_windows(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First token and token after the last of each window; neighbours share `stride` tokens."""
    return [(a, min(a + room, length)) for a in range(0, max(length - stride, 1), room - stride)]


def plain_questions(tokenizer: Any, task, rows: Sequence[Mapping[str, Any]], recipe) -> Encoded:
    """One sequence per window of the context."""
    before, between, after = pair_affixes(tokenizer)
    room = recipe.max_length - MAX_QUESTION - len(before) - len(between) - len(after)
    if room < 8:
        raise XtransferError(f"question answering with max_length {recipe.max_length} leaves no room for the context; use at least {recipe.max_length + 8 - room}.")
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    questions = tokenizer([r["question"] for r in rows], **options)["input_ids"]
    place = {context: i for i, context in enumerate(dict.fromkeys(r["context"] for r in rows))}
    contexts = tokenizer(list(place), return_offsets_mapping=True, **options)
    covers = [np.array(offsets, dtype=np.int64).reshape(-1, 2) for offsets in contexts["offset_mapping"]]
    sequences, owner, spans, characters = [], [], [], []
    for i, row in enumerate(rows):
        context = place[row["context"]]
        ids, begin = contexts["input_ids"][context], before + questions[i][:MAX_QUESTION] + between
        answer = _answer_characters(row, covers[context])
        for a, b in _token_windows(len(ids), recipe.max_length - len(begin) - len(after), min(recipe.stride, room // 2)):
            window = np.full((len(begin) + b - a + len(after), 2), -1)
            window[len(begin):len(begin) + b - a] = covers[context][a:b]
            owner.append(i), sequences.append(begin + ids[a:b] + after), characters.append(window), spans.append(_answer_tokens(window, *answer))
    return _flat(sequences, owner, examples=len(rows), truncated=sum(len(q) > MAX_QUESTION for q in questions), sequence_targets={"span": np.array(spans, dtype=np.int64).reshape(-1, 2)},
                 token_targets={"characters": np.concatenate(characters)})


def plain_text(tokenizer: Any, task, rows: Sequence[Mapping[str, Any]], recipe) -> Encoded:
    """Blocks of running text, and pairs of a text and its translation."""
    before, after = special_affixes(tokenizer)
    room = recipe.max_length - len(before) - len(after)
    single, double = [i for i, r in enumerate(rows) if not r["text_pair"]], [i for i, r in enumerate(rows) if r["text_pair"]]
    sequences, sides, owner, truncated = [], [], [], 0
    if single:
        ids = tokenizer([rows[i]["text"] for i in single], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        blocks = [(i, tokens[k:k + room]) for i, tokens in zip(single, ids) for k in range(0, max(len(tokens), 1), room)]
        owner += [i for i, _ in blocks]
        sequences += [before + block + after for _, block in blocks]
        sides += [[0] * len(before) + [1] * len(block) + [0] * len(after) for _, block in blocks]
    if double:
        options = {"truncation": True, "max_length": recipe.max_length, "return_attention_mask": False}
        pairs = tokenizer([rows[i]["text"] for i in double], [rows[i]["text_pair"] for i in double], **options)
        owner += double
        sequences += pairs["input_ids"]
        sides += [[0 if s is None else s + 1 for s in pairs.sequence_ids(k)] for k in range(len(double))]
        truncated = sum(bool(e.overflowing) for e in pairs.encodings)
    order = np.argsort(owner, kind="stable")
    flat_sides = np.fromiter(chain.from_iterable(sides[k] for k in order), dtype=np.int64)
    return _flat([sequences[k] for k in order], [owner[k] for k in order], examples=len(rows), truncated=truncated, token_targets={"side": flat_sides})


def plain_sentences(
    tokenizer: Any,
    sentences: Sequence[str],
    max_length: int,  # tokens
) -> Encoded:
    """One sequence per sentence, nothing to predict."""
    ids, truncated = _ids_of_texts(tokenizer, list(sentences), None, max_length)
    return _flat(ids, truncated=len(truncated))


def plain_sides(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],  # examples of ranked_retrieval
    recipe,  # max_length, of a candidate; a query has MAX_QUERY tokens at most
) -> Encoded:
    """One sequence per row, query or candidate, nothing to predict."""
    limits = {"query": min(MAX_QUERY, recipe.max_length), "candidate": recipe.max_length}
    ids: list[list[int]] = [[] for _ in rows]
    truncated = 0
    for side, limit in limits.items():
        for paired in (False, True):
            chosen = [i for i, r in enumerate(rows) if r["side"] == side and bool(r["text_pair"]) == paired]
            found, cut = _ids_of_texts(tokenizer, [rows[i]["text"] for i in chosen], [rows[i]["text_pair"] for i in chosen] if paired else None, limit)
            truncated += len(cut)
            for i, sequence in zip(chosen, found):
                ids[i] = sequence
    return with_segments(tokenizer, _flat(ids, truncated=truncated))


def plain_ranked(tokenizer: Any, task, rows: Sequence[Mapping[str, Any]], recipe) -> Encoded:
    """Two sequences per query, its own and that of its first right candidate; the target is the numbers of all its right candidates, the first one's first."""
    queries, candidates = [r for r in rows if r["side"] == "query"], {r["id"]: r for r in rows if r["side"] == "candidate"}
    if lost := next((q for q in queries if not q["relevant"] or set(q["relevant"]) - set(candidates)), None):
        raise XtransferError(f"query {lost['id']} of task {task.name} asks for the candidates {', '.join(lost['relevant']) or 'none'}, which are not among the {len(candidates)} of its split.")
    asked = list(dict.fromkeys(q["relevant"][0] for q in queries))
    sides = plain_sides(tokenizer, [*queries, *(candidates[i] for i in asked)], recipe)
    sequences, place = [s.tolist() for s in np.split(sides.ids, sides.starts[1:-1])], {i: len(queries) + k for k, i in enumerate(asked)}
    number: dict[tuple[str, str], int] = {}
    numbers = [[number.setdefault((candidates[i]["text"], candidates[i]["text_pair"]), len(number)) for i in q["relevant"]] for q in queries]
    relevant = np.full((len(queries), max(map(len, numbers))), -1, dtype=np.int64)
    for row, found in zip(relevant, numbers):
        row[:len(found)] = found
    pairs = [sequences[k] for i, q in enumerate(queries) for k in (i, place[q["relevant"][0]])]
    return _flat(pairs, np.repeat(np.arange(len(queries)), 2), examples=len(queries), truncated=sides.truncated, example_targets={"relevant": relevant})


PLAIN = {"sequence_classification": plain_classification, "multiple_choice": plain_choices, "token_classification": plain_tagging, "span_extraction": plain_questions, "masked_lm": plain_text,
         "ranked_retrieval": plain_ranked}


def plainly(tokenizer, task, rows, recipe):
    """What `encode` must return."""
    return with_segments(tokenizer, PLAIN[task.format](tokenizer, task, rows, recipe))
