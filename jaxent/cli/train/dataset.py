"""The corpus in tokens: which of them are counted, which train the model, which are held out."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxent.cli.errors import CommandError
from jaxent.cli.train.corpus import Corpus
from jaxent.cli.train.ngrams import CORPUS_ORDERS, ContextTable, Rows, Stream, make_rows
from jaxent.cli.train.tokenizer import Tokenizer

FITTED_SHARE = 0.3  # at most this much of the text trains the model; the rest is counted for its proposals; heuristic


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The corpus as the model sees it. It is trained on other files than are counted.

    Counts of the very text that is trained on would look like certain knowledge.
    """

    tokenizer: Tokenizer
    tables: tuple[ContextTable, ...]
    counted: Stream
    fitted: Rows
    held_out: Rows

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Tokenizer, wanted: int) -> "Dataset":
        counted, fitted = _cut(tokenizer.encode([d.text for d in corpus.train]), wanted)
        stream = Stream.of(counted)
        tables = tuple(ContextTable.count(stream, order) for order in CORPUS_ORDERS)
        held_out = make_rows(tokenizer.encode([d.text for d in corpus.held_out]), tables)
        return cls(tokenizer, tables, stream, make_rows(fitted, tables), held_out)


def _cut(documents: Sequence[np.ndarray], wanted: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first documents to count and the last ones to fit; the one between is cut."""
    total = sum(map(len, documents))
    start = total - max(1, min(wanted, int(FITTED_SHARE * total)))
    if start < 1:
        raise CommandError("the corpus is too small: it has a single token to learn from")
    counted, fitted, position = [], [], 0
    for document in documents:
        cut = min(max(start - position, 0), len(document))
        counted += [document[:cut]] if cut else []
        fitted += [document[cut:]] if cut < len(document) else []
        position += len(document)
    return counted, fitted
