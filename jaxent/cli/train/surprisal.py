"""What each token of a text costs, for a terminal: a table, or the text with its surprises marked."""

from collections.abc import Iterable, Sequence

from jaxent.cli.errors import visible
from jaxent.cli.output import has_colours

Pairs = Sequence[tuple[bytes, float]]  # tokens and their bits

# The 256-colour palette from calm to alarming, for up to 1, 2, 4, 8, 12 bits and more.
COLOURS = ((1, 22), (2, 28), (4, 100), (8, 130), (12, 124), (float("inf"), 53))


def by_character(pairs: Iterable[tuple[bytes, float]]) -> list[tuple[bytes, float]]:
    r"""The pairs, with tokens that hold a part of a character joined: their bits add up.

    >>> by_character([(b"\xc3", 3.0), (b"\xa9", 1.0), (b"t", 2.0), (b"\xc3", 9.0), (b"a", 1.0)])
    [(b'\xc3\xa9', 4.0), (b't', 2.0), (b'\xc3', 9.0), (b'a', 1.0)]
    """
    joined: list[tuple[bytes, float]] = []
    for token, bits in pairs:
        if joined and (missing := _missing(joined[-1][0])) and len(token) <= missing and _continues(token):
            before, more = joined.pop()
            token, bits = before + token, more + bits
        joined.append((token, bits))
    return joined


def _continues(token: bytes) -> bool:
    return all(0x80 <= byte < 0xC0 for byte in token)


def _missing(token: bytes) -> int:
    """How many bytes a character that begins in the token still lacks."""
    for back, byte in enumerate(reversed(token[-3:]), start=1):
        if byte >= 0xC2:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF5 else 1
            return max(0, length - back)
        if byte < 0x80:
            return 0
    return 0


def shown(token: bytes) -> str:
    return token.decode("utf-8", "backslashreplace")


def print_table(pairs: Pairs) -> None:
    """One line per token: its text, its bits, and a bar of one block per bit."""
    names = [repr(shown(token)) for token, _ in pairs]
    width = min(40, max(map(len, names)))
    for name, (_, bits) in zip(names, pairs, strict=True):
        blocks = "█" * round(min(bits, 64)) if bits == bits else ""
        print(f"{name:{width}}  {bits:6.2f}  {blocks}".rstrip())


def print_line(pairs: Pairs) -> None:
    """The text itself; the background, or without colours a number, tells how surprising each token is."""
    if not has_colours():
        kept = "\n\t"
        print("".join(f"{visible(shown(token), kept)}[{bits:.1f}]" for token, bits in pairs))
        return
    parts = []
    for token, bits in pairs:
        colour = next((c for limit, c in COLOURS if bits <= limit), COLOURS[-1][1])
        # A coloured line end would colour the rest of the line.
        lines = visible(shown(token), "\n\t").split("\n")
        parts.append("\n".join(f"\x1b[48;5;{colour}m\x1b[97m{line}\x1b[0m" if line else "" for line in lines))
    print("".join(parts))
    legend = [
        f"\x1b[48;5;{c}m\x1b[97m {'more' if limit == float('inf') else f'<= {limit}'} \x1b[0m" for limit, c in COLOURS
    ]
    print("bits: " + "".join(legend))
