"""The text of `jaxent train`: tokens lose nothing, the split depends on names, bad input is one clear error."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxent.cli.errors import CommandError
from jaxent.cli.train.corpus import Document, read_corpus, read_documents
from jaxent.cli.train.evaluation import parts
from jaxent.cli.train.tokenizer import PIECE, Tokenizer

CODE = b"def f(x):\n    return x + 1\n\n\nclass Name_of_It(f):\r\n\tpass  # \xc3\xa9 12345\n"
TOKENIZER = Tokenizer.fit([CODE], 270)

code_like = st.lists(
    st.sampled_from([b" ", b"\n", b"\r", b"_", b"aB", b"Ab", b"9", b"+=", b"\xff", b"def"]), max_size=40
)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200) | code_like.map(b"".join))
def test_any_bytes_come_back(text: bytes):
    assert b"".join(PIECE.findall(text)) == text
    (ids,) = TOKENIZER.encode([text])
    assert TOKENIZER.decode(ids) == text
    assert int(np.sum(TOKENIZER.lengths()[ids])) == len(text)


def test_frequent_pieces_have_ids_and_ties_go_to_the_smaller():
    assert Tokenizer.fit([b"bb aa bb cc aa zz"], 258).pieces == (b" aa", b" bb")
    (ids,) = Tokenizer.fit([b"bb aa bb cc aa zz"], 258).encode([b" aa?"])
    assert ids.tolist() == [256, ord("?")]


def test_vocabulary_larger_than_the_corpus():
    with pytest.raises(CommandError, match=r"--vocab-size 400 is larger than the corpus: .* at most 2\d\d different"):
        Tokenizer.fit([CODE], 400)
    with pytest.raises(CommandError, match=r"make at most 258 different tokens$"):
        Tokenizer.fit([b"one two"], 259)


def write(folder: Path, **files: bytes) -> Path:
    for name, text in files.items():
        (folder / name).write_bytes(text)
    return folder


def test_the_split_depends_on_names_alone(tmp_path: Path):
    write(tmp_path, **{f"f{i}": b"text " * (10 + i) for i in range(40)})
    before = read_corpus([str(tmp_path)], 10**6)
    assert before.held_out
    assert len(before.train) + len(before.held_out) == 40
    size = sum(len(d.text) for d in before.train + before.held_out)
    assert sum(len(d.text) for d in before.held_out) <= size / 10
    assert read_corpus([str(tmp_path)], 10**6).digest == before.digest
    write(tmp_path, f0=b"test " * 10)
    after = read_corpus([str(tmp_path)], 10**6)
    assert after.digest != before.digest
    assert [d.name for d in after.held_out] == [d.name for d in before.held_out]


def test_one_file_gives_its_end(tmp_path: Path):
    write(tmp_path, a=bytes(range(1, 101)))
    corpus = read_corpus([str(tmp_path / "a")], 10**6)
    assert corpus.train[0].text + corpus.held_out[0].text == bytes(range(1, 101))
    assert len(corpus.held_out[0].text) == 10


def test_two_large_files_give_the_smaller(tmp_path: Path):
    corpus = read_corpus([str(write(tmp_path, a=b"x" * 100, b=b"y" * 90))], 10**6)
    assert [d.text[:1] for d in corpus.held_out] == [b"y"]


def test_the_byte_cap_keeps_whole_files(tmp_path: Path):
    write(tmp_path, **{f"f{i}": b"x" * 100 for i in range(10)})
    corpus = read_corpus([str(tmp_path)], 450)
    assert sum(len(d.text) for d in corpus.train + corpus.held_out) == 400


def test_the_standard_library_is_the_default():
    corpus = read_corpus([], 10**6)
    assert all(d.name.endswith(".py") and "/test/" not in d.name for d in corpus.train + corpus.held_out)
    assert sum(len(d.text) for d in corpus.train) > 5 * 10**5


def test_a_file_named_twice_counts_once(tmp_path: Path):
    write(tmp_path, a=b"x")
    found = list(read_documents([str(tmp_path / "a"), str(tmp_path)]))
    assert found == [Document((tmp_path / "a").as_posix(), b"x")]


def test_a_folder_may_hold_other_files(tmp_path: Path):
    """Pipes, devices, links that lead nowhere and binary files are passed over; named, a binary file is an error."""
    write(tmp_path, a=b"some text", b=b"PNG\0", c=b"other text")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert [d.name[-1] for d in read_documents([str(tmp_path)])] == ["a", "c"]
    corpus = read_corpus([str(tmp_path)], 1000)
    assert len(corpus.train + corpus.held_out) == 2
    assert corpus.left_out == 1
    with pytest.raises(CommandError, match=r"b is not text"):
        read_corpus([str(tmp_path), str(tmp_path / "b")][::-1], 1000)


@pytest.mark.parametrize("endless", ["/dev/zero", "/dev/urandom"])
def test_an_endless_file_ends(endless: str):
    with pytest.raises(CommandError, match=r"is not text|is longer than"):
        read_corpus([endless], 10**5)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60) | code_like.map(b"".join), st.integers(1, 20))
def test_parts_add_up(text: bytes, size: int):
    cut = list(parts(text, size))
    assert b"".join(cut) == text
    assert all(len(part) <= size for part in cut)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the corpus is empty"),
        ({"a": b"", "b": b""}, "the corpus is empty"),
        ({"a": b"\x89PNG\0\0"}, r"a is not text: it has a zero byte at 4"),
        ({"a": b"x"}, "the corpus is too small"),
        ({"a": b"x" * 2000}, "every file of .* is longer than --max-bytes 1000"),
    ],
)
def test_bad_corpora(tmp_path: Path, files: dict[str, bytes], message: str):
    with pytest.raises(CommandError, match=message):
        read_corpus([str(write(tmp_path, **files))], 1000)


def test_missing_file(tmp_path: Path):
    with pytest.raises(CommandError, match=r"cannot read .*nothing: No such file or directory"):
        read_corpus([str(tmp_path / "nothing")], 1000)


def test_pieces_are_words_blanks_and_punctuation():
    pieces = Counter(PIECE.findall(CODE))
    assert {
        b"def",
        b" f",
        b"(",
        b"\n    ",
        b"return",
        b" +",
        b" #",
        b"\n\n\n",
        b" Name",
        b"_of",
        b"_It",
        b"):",
        b"\r\n\t",
    } <= set(pieces)
