"""Proposals: tokens that followed the same context before, in the corpus and earlier in the same file.

A model of 64 numbers cannot hold every phrase it has read, and a short run cannot teach it to copy. Both are looked up
instead: for each position a few candidate tokens and some evidence for each, from which the model decides how far to
trust them. Everything at a position is computed from earlier positions only.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

LAGS = 8  # how many tokens back the model reads; heuristic
CORPUS_ORDERS = (1, 2, 3)  # contexts of this many tokens, looked up among the counted documents
FILE_ORDERS = (1, 2, 4)  # contexts of this many tokens, looked up in the same file
START = ord("\n")  # stands before the first token of a file
_MIXER = np.uint64(0xBF58476D1CE4E5B9)  # of SplitMix64 (Steele, Lea and Flood, 2014)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Documents one after another; `document` numbers them. No position sees into the document before its own."""

    ids: np.ndarray
    document: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[np.ndarray]) -> "Stream":
        lengths = [len(d) for d in documents]
        return cls(np.concatenate([np.zeros(0, np.int32), *documents]), np.repeat(np.arange(len(documents)), lengths))

    def shifted(self, x: np.ndarray, fill: int, lag: int = 1) -> np.ndarray:
        """`x` of `lag` positions earlier; `fill` where that lies before the document."""
        lag = min(lag, len(x))
        earlier = np.concatenate([np.full(lag, fill, x.dtype), x[: len(x) - lag]])
        document = np.concatenate([np.full(lag, -1), self.document[: len(x) - lag]])
        return np.where(document == self.document, earlier, np.asarray(fill, x.dtype))

    def back(self, lag: int) -> np.ndarray:
        """The token `lag` positions earlier; `START` where there is none."""
        return self.shifted(self.ids, START, lag)

    def context(self, order: int, within_document: bool) -> np.ndarray:
        """A 64-bit hash of the `order` tokens before each position, and of the document's number."""
        key = self.document.astype(np.uint64) if within_document else np.zeros(len(self.ids), np.uint64)
        for part in (np.uint64(0), *(self.back(lag).astype(np.uint64) for lag in range(order, 0, -1))):
            # Each number is added to a mixed key: unmixed, document 1 with token 0 would be document 0 with token 1.
            key = (key + np.uint64(1) + part) * _MIXER
            key ^= key >> np.uint64(29)
        return key


@dataclasses.dataclass(frozen=True)
class ContextTable:
    """What followed each context that occurred at least twice: the two most frequent tokens and their counts."""

    keys: np.ndarray  # uint64, rising
    tokens: np.ndarray  # int32 (contexts, 2)
    counts: np.ndarray  # int32 (contexts, 2)
    totals: np.ndarray  # int32 (contexts,)

    @classmethod
    def count(cls, stream: Stream, order: int) -> "ContextTable":
        key, token = stream.context(order, within_document=False), stream.ids
        by_pair = np.lexsort((token, key))
        key, token = key[by_pair], token[by_pair]
        first = np.flatnonzero(np.concatenate([[True], (key[1:] != key[:-1]) | (token[1:] != token[:-1])]))
        count = np.diff(first, append=len(key))
        key, token = key[first], token[first]
        ranked = np.lexsort((token, -count, key))
        key, token, count = key[ranked], token[ranked], count[ranked]
        best = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        totals = np.add.reduceat(count, best)
        second = np.minimum(best + 1, len(key) - 1)
        has_second = key[second] == key[best]
        has_second &= second > best
        tokens = np.stack([token[best], np.where(has_second, token[second], 0)], 1)
        counts = np.stack([count[best], np.where(has_second, count[second], 0)], 1)
        often = totals >= 2
        return cls(
            key[best][often],
            tokens[often].astype(np.int32),
            counts[often].astype(np.int32),
            totals[often].astype(np.int32),
        )

    def look_up(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens `(n, 2)`, counts `(n, 2)` and totals `(n,)`; counts of 0 for an unknown context."""
        if not len(self.keys):
            return np.zeros((len(keys), 2), np.int32), np.zeros((len(keys), 2), np.int32), np.zeros(len(keys), np.int32)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        known = self.keys[at] == keys
        return self.tokens[at], self.counts[at] * known[:, None], self.totals[at] * known


@dataclasses.dataclass(frozen=True)
class Rows:
    """One row a token: what the model sees, and the token it has to predict."""

    targets: np.ndarray  # int32 (n,)
    lags: np.ndarray  # int32 (n, LAGS), the nearest first
    candidates: np.ndarray  # int32 (n, CANDIDATES)
    offered: np.ndarray  # bool (n, CANDIDATES): whether there is such a candidate
    evidence: np.ndarray  # float32 (n, EVIDENCE)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: np.ndarray | slice) -> "Rows":
        return Rows(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


CANDIDATES = 2 * len(CORPUS_ORDERS) + len(FILE_ORDERS)
EVIDENCE = 4 * len(CORPUS_ORDERS) + 4 * len(FILE_ORDERS) + CANDIDATES


def make_rows(documents: Sequence[np.ndarray], tables: Sequence[ContextTable]) -> Rows:
    """The rows of all tokens of the documents, in order."""
    stream = Stream.of(documents)
    candidates, offered, evidence = [], [], []
    for order, table in zip(CORPUS_ORDERS, tables, strict=True):
        token, count, total = table.look_up(stream.context(order, within_document=False))
        candidates += [token[:, 0], token[:, 1]]
        offered += [count[:, 0] > 0, count[:, 1] > 0]
        share = count / np.maximum(total, 1)[:, None]
        right = _was_right(token[:, 0], count[:, 0] > 0, stream)
        evidence += [np.log1p(total) / 4, share[:, 0], share[:, 1], right]
    for order in FILE_ORDERS:
        before = _previous(stream.context(order, within_document=True))
        known = before >= 0
        token = np.where(known, stream.ids[np.maximum(before, 0)], 0)
        again = np.where(known, before[np.maximum(before, 0)], -1)
        right = _was_right(token, known, stream)
        right_twice = right & stream.shifted(right, False)
        repeated = (again >= 0) & (stream.ids[np.maximum(again, 0)] == token)
        distance = np.where(known, np.log1p(np.arange(len(before)) - before) / 8, 0)
        candidates.append(token)
        offered.append(known)
        evidence += [distance, right, right_twice, repeated]
    ids, there = np.stack(candidates, 1), np.stack(offered, 1)
    supporters = np.sum((ids[:, :, None] == ids[:, None, :]) & there[:, None, :], axis=2) * there
    return Rows(
        stream.ids,
        np.stack([stream.back(lag) for lag in range(1, LAGS + 1)], 1),
        ids,
        there,
        np.concatenate([np.stack(evidence, 1), supporters / 4], 1).astype(np.float32),
    )


def _previous(keys: np.ndarray) -> np.ndarray:
    """The last earlier position with the same key, -1 where there is none."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    before = np.full(len(keys), -1)
    before[order[1:][same]] = order[:-1][same]
    return before


def _was_right(token: np.ndarray, known: np.ndarray, stream: Stream) -> np.ndarray:
    """Whether the candidate of the position before was what came."""
    return stream.shifted(known & (token == stream.ids), False)
