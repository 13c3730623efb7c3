"""Proposals against loops over dictionaries, and no row that sees its own future."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxent.cli.train.ngrams import (
    CANDIDATES,
    CORPUS_ORDERS,
    EVIDENCE,
    FILE_ORDERS,
    LAGS,
    START,
    ContextTable,
    Stream,
    make_rows,
)

documents = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=4).map(
    lambda docs: [np.array(d, np.int32) for d in docs]
)


def context(document: np.ndarray, position: int, order: int) -> tuple[int, ...]:
    """The `order` tokens before a position of the document."""
    past = [START] * order + document[:position].tolist()
    return tuple(past[len(past) - order :])


def contexts(docs: list[np.ndarray], order: int) -> list[tuple[int, ...]]:
    return [context(d, i, order) for d in docs for i in range(len(d))]


@settings(deadline=None, max_examples=60)
@given(documents, st.sampled_from(CORPUS_ORDERS))
def test_tables_count(docs: list[np.ndarray], order: int):
    stream = Stream.of(docs)
    table = ContextTable.count(stream, order)
    expected: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    targets = np.concatenate(docs)
    for c, target in zip(contexts(docs, order), targets.tolist(), strict=True):
        expected[c][target] += 1
    tokens, counts, totals = table.look_up(stream.context(order, within_document=False))
    for row, c in enumerate(contexts(docs, order)):
        total = sum(expected[c].values())
        ranked = sorted(expected[c].items(), key=lambda item: (-item[1], item[0]))[:2] if total >= 2 else []
        assert totals[row] == (total if total >= 2 else 0)
        assert [(t, n) for t, n in zip(tokens[row].tolist(), counts[row].tolist(), strict=True) if n] == ranked


@settings(deadline=None, max_examples=60)
@given(documents)
def test_file_proposals_are_the_last_continuation(docs: list[np.ndarray]):
    tables = [ContextTable.count(Stream.of(docs), order) for order in CORPUS_ORDERS]
    rows = make_rows(docs, tables)
    column = 2 * len(CORPUS_ORDERS)
    for k, order in enumerate(FILE_ORDERS):
        row = 0
        for d in docs:
            last: dict[tuple[int, ...], int] = {}
            for i, token in enumerate(d.tolist()):
                c = context(d, i, order)
                assert bool(rows.offered[row, column + k]) == (c in last)
                if c in last:
                    assert rows.candidates[row, column + k] == last[c]
                last[c] = token
                row += 1


@settings(deadline=None, max_examples=60)
@given(documents, st.data())
def test_no_row_sees_its_target_or_what_comes_later(docs: list[np.ndarray], data: st.DataObject):
    tables = [ContextTable.count(Stream.of([np.arange(4, dtype=np.int32)] * 3), order) for order in CORPUS_ORDERS]
    flat = np.concatenate(docs)
    changed_at = data.draw(st.integers(0, len(flat) - 1))
    other = flat.copy()
    other[changed_at:] = 3 - other[changed_at:]
    changed = np.split(other, np.cumsum([len(d) for d in docs])[:-1])
    a, b = make_rows(docs, tables), make_rows(changed, tables)
    for name in ("lags", "candidates", "offered", "evidence"):
        np.testing.assert_array_equal(getattr(a, name)[: changed_at + 1], getattr(b, name)[: changed_at + 1])


@settings(deadline=None, max_examples=60)
@given(documents)
def test_a_file_alone_and_among_others(docs: list[np.ndarray]):
    tables = [ContextTable.count(Stream.of(docs), order) for order in CORPUS_ORDERS]
    together = make_rows(docs, tables)
    alone = [make_rows([d], tables) for d in docs]
    for name in ("targets", "lags", "candidates", "offered", "evidence"):
        np.testing.assert_array_equal(getattr(together, name), np.concatenate([getattr(a, name) for a in alone]))


def test_shapes_and_lags():
    docs = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    rows = make_rows(docs, [ContextTable.count(Stream.of(docs), order) for order in CORPUS_ORDERS])
    assert rows.targets.tolist() == [5, 6, 7, 8]
    assert rows.lags.shape == (4, LAGS)
    assert rows.lags[2].tolist()[:4] == [6, 5, START, START]
    assert rows.candidates.shape == rows.offered.shape == (4, CANDIDATES)
    assert rows.evidence.shape == (4, EVIDENCE)
    assert rows.evidence.dtype == np.float32


@pytest.mark.parametrize("size", [1, 2, 3, 200_000])
def test_ids_of_any_size(size: int):
    docs = [np.array([size - 1, size - 1, size - 1], np.int32)]
    table = ContextTable.count(Stream.of(docs), 1)
    assert table.tokens.tolist() == [[size - 1, 0]]
