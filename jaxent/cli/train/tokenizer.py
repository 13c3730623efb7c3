"""Tokens: frequent words, blanks and punctuation have an id, everything else is spelt in bytes."""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from jaxent.cli.errors import CommandError

BYTES = 256
# A word may begin with one blank and is cut where its case changes; line ends take the indentation that follows.
# The alternatives cover every byte, so that the pieces always add up to the text.
PIECE = re.compile(
    rb" ?_*(?:[A-Z]+(?![a-z])|[A-Z]?[a-z]+)"
    rb"| ?[0-9]{1,3}"
    rb"|(?:\r?\n[ \t]*)+"
    rb"|[ \t]+(?=[ ])"
    rb"| ?_+"
    rb"| ?[^\sA-Za-z0-9_]+"
    rb"|\s"
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Ids 0 to 255 are the bytes, the next ones `pieces`; the texts of a message's ids, joined, are the message.

    So a code for the ids is a code for the text, and its length in bits per byte is exact.
    """

    pieces: tuple[bytes, ...]

    @classmethod
    def fit(cls, texts: Iterable[bytes], size: int, *, at_most: bool = False, multiple: int = 1) -> "Tokenizer":
        """The `size - 256` most frequent pieces that are longer than a byte; ties go to the smaller text.

        With `at_most`, fewer if there are fewer, so that the number of all tokens is a multiple of `multiple`.
        """
        counts = Counter(itertools.chain.from_iterable(PIECE.findall(text) for text in texts))
        longer = sorted((-n, piece) for piece, n in counts.items() if len(piece) > 1)
        most = BYTES + len(longer)
        if at_most and most < size:
            size = most - most % multiple
            if size < BYTES:
                raise CommandError(f"the text has {most} different tokens, too few to split them into {multiple}")
        if most < size:
            raise CommandError(
                f"--vocab-size {size} is larger than the corpus: its words and the {BYTES} bytes make at most {most} "
                f"different tokens"
            )
        return cls(tuple(piece for _, piece in longer[: size - BYTES]))

    @property
    def size(self) -> int:
        return BYTES + len(self.pieces)

    def texts(self) -> list[bytes]:
        """The text of every id."""
        return [bytes([i]) for i in range(BYTES)] + list(self.pieces)

    def lengths(self) -> np.ndarray:
        """The number of bytes of every id."""
        return np.array([len(text) for text in self.texts()], np.int32)

    def ids(self) -> dict[bytes, int]:
        return {piece: BYTES + i for i, piece in enumerate(self.pieces)}

    def encode(self, texts: Iterable[bytes], ids: dict[bytes, int] | None = None) -> list[np.ndarray]:
        """The ids of each text; `ids` is what `ids()` returns, for whoever calls this often.

        >>> tokenizer = Tokenizer((b"one", b" two"))
        >>> tokenizer.encode([b"one two!"])
        [array([256, 257,  33], dtype=int32)]
        """
        known_ids = self.ids() if ids is None else ids

        def of_text(text: bytes) -> Iterable[int]:
            for piece in PIECE.findall(text):
                if (known := known_ids.get(piece)) is not None:
                    yield known
                else:
                    yield from piece

        return [np.fromiter(of_text(text), np.int32) for text in texts]

    def decode(self, ids: np.ndarray) -> bytes:
        """The text of the ids.

        >>> Tokenizer((b"one", b" two")).decode(np.array([256, 257, 33]))
        b'one two!'
        """
        texts = self.texts()
        return b"".join(texts[i] for i in ids)
