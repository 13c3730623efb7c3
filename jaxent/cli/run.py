"""`jaxent train`: from files to a trained model and an account of what was learnt."""

import bz2
import dataclasses
import functools
import lzma
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxent import information
from jaxent.cli import model, report
from jaxent.cli.checkpoint import NAME, Checkpoint
from jaxent.cli.corpus import Corpus, read_corpus
from jaxent.cli.errors import CommandError, require
from jaxent.cli.evaluation import figures, measure
from jaxent.cli.proposals import CORPUS_ORDERS, ContextTable, Rows, Stream, make_rows
from jaxent.cli.storage import make_folder
from jaxent.cli.tokens import Tokenizer
from jaxent.cli.training import Schedule, State, train
from jaxent.gradients import softmax_cross_entropy_gradient
from jaxent.planning import plan

FITTED_SHARE = 0.3  # at most so much of the text trains the model; the rest is counted for its proposals; heuristic
SAMPLE_ROWS = 2048  # of the held-out text, measured at every checkpoint


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of `jaxent train`."""

    paths: tuple[str, ...]
    out: Path
    vocab_size: int
    width: int
    max_bytes: int
    steps: int
    batch_rows: int
    learning_rate: float
    seed: int
    checkpoint_every: int
    resume: bool
    overwrite: bool
    quiet: bool
    as_json: bool

    def settings(self, corpus: Corpus) -> dict[str, Any]:
        """What decides the result to the last bit."""
        names = ("vocab_size", "width", "steps", "batch_rows", "learning_rate", "seed")
        return {"corpus": corpus.digest, **{name: getattr(self, name) for name in names}}


@dataclasses.dataclass(frozen=True)
class Data:
    """The corpus as the model sees it. It is trained on other files than are counted.

    Counts of the very text that is trained on would look like certain knowledge.
    """

    tokenizer: Tokenizer
    tables: tuple[ContextTable, ...]
    counted: Stream
    fitted: Rows
    held_out: Rows

    @classmethod
    def of(cls, corpus: Corpus, vocab_size: int, wanted: int) -> "Data":
        tokenizer = Tokenizer.fit([d.text for d in corpus.train], vocab_size)
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


def run(options: Options) -> None:
    """Trains, or goes on training, and reports."""
    began = time.monotonic()
    require("tqdm", "matplotlib")
    say = _speaker(options)
    corpus = read_corpus(options.paths, options.max_bytes)
    settings = options.settings(corpus)
    make_folder(options.out)
    stored = _stored(options, settings)
    sizes = [sum(len(d.text) for d in part) for part in (corpus.train, corpus.held_out)]
    say(f"corpus     {corpus.source}")
    say(f"           {len(corpus.train):,} files, {sizes[0]:,} bytes to learn from; SHA-256 {corpus.digest[:16]}")
    say(f"           {len(corpus.held_out):,} files, {sizes[1]:,} bytes held out")
    schedule = Schedule(options.steps, options.batch_rows, options.learning_rate, options.seed)
    data = Data.of(corpus, options.vocab_size, options.steps * options.batch_rows)
    say(
        f"tokens     vocabulary {options.vocab_size:,}; {len(data.counted.ids):,} counted, "
        f"{len(data.fitted):,} to train on, {len(data.held_out):,} held out"
    )
    state = _start(options, data, schedule, stored)
    say(
        f"model      {model.count_parameters(state.params):,} parameters; {options.steps:,} steps of "
        f"{options.batch_rows:,} tokens{f', from step {state.step:,}' if state.step else ''}"
    )
    sample = data.held_out.take(np.sort(np.random.default_rng(0).permutation(len(data.held_out))[:SAMPLE_ROWS]))
    lengths = data.tokenizer.lengths()

    def save(state: State) -> None:
        _measure_sample(state, sample, lengths)
        leaves = tuple(np.asarray(leaf) for leaf in jax.tree.leaves(state.optimizer))
        params = {name: np.asarray(value) for name, value in state.params.items()}
        Checkpoint(settings, state.step, data.tokenizer, data.tables, params, leaves, state.history).save(options.out)

    if stored is None:
        save(state)
    with _progress(options, state, schedule) as show:
        train(state, schedule, data.fitted, lengths, every=options.checkpoint_every, at_interval=save, show=show)
    result = {"settings": settings, "source": corpus.source, **_account(state.params, data, corpus, options.batch_rows)}
    result["seconds"] = round(time.monotonic() - began, 1)
    report.save(options.out, result)
    report.draw(options.out, result, state.history)
    if options.as_json:
        report.print_json(result)
    elif not options.quiet:
        report.print_summary(result)
        print(f"\n{options.out / NAME}, report.json and loss.png written after {result['seconds']:.0f} s")


def _speaker(options: Options) -> Callable[[str], None]:
    def say(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr, flush=True)

    return say


def _stored(options: Options, settings: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from; an error for one that must not be replaced or does not fit."""
    path = options.out / NAME
    if not path.exists() or options.overwrite:
        return None
    if not options.resume:
        raise CommandError(f"{path} exists: --resume goes on with it, --overwrite replaces it, --out writes elsewhere")
    stored = Checkpoint.load(path)
    different = [
        f"{name} was {stored.settings.get(name)!s:.16}, is {value!s:.16}"
        for name, value in settings.items()
        if stored.settings.get(name) != value
    ]
    if different:
        raise CommandError(f"{path} is from other settings: {'; '.join(different)}")
    return stored


def _start(options: Options, data: Data, schedule: Schedule, stored: Checkpoint | None) -> State:
    if stored is None:
        params = model.initial_params(data.counted, options.vocab_size, options.width, 4 * options.width, options.seed)
        return State(0, params, schedule.optimizer().init(params), {})
    params = stored.jax_params()
    structure = jax.tree.structure(jax.eval_shape(schedule.optimizer().init, params))
    if structure.num_leaves != len(stored.optimizer):
        raise CommandError(f"{options.out / NAME} is from another version of optax: --overwrite starts again")
    return State(stored.step, params, structure.unflatten(map(jnp.asarray, stored.optimizer)), stored.history)


def _measure_sample(state: State, sample: Rows, lengths: np.ndarray) -> None:
    """Adds the cost of the held-out sample to the history, once a step."""
    if state.history.get("held_step", [-1])[-1] == state.step:
        return
    risk, _ = measure(state.params, sample)
    bits = float(risk.bits_per(int(np.sum(lengths[sample.targets], dtype=np.int64))))
    state.history.setdefault("held_step", []).append(state.step)
    state.history.setdefault("held_byte", []).append(bits)


@contextmanager
def _progress(options: Options, state: State, schedule: Schedule) -> Iterator[Callable[[int, float, float], None]]:
    """A bar on a terminal, nothing in a pipe."""
    if options.quiet or not sys.stderr.isatty():
        yield lambda tokens, bits, per_byte: None
        return
    from tqdm import tqdm

    total, done = schedule.steps * schedule.batch_rows, state.step * schedule.batch_rows
    with tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc="train", dynamic_ncols=True) as bar:

        def show(tokens: int, bits: float, per_byte: float) -> None:
            bar.set_postfix_str(f"{bits:.3f} bits/token, {per_byte:.3f} bits/byte", refresh=False)
            bar.update(tokens)

        yield show


def _account(params: model.Params, data: Data, corpus: Corpus, batch_rows: int) -> dict[str, Any]:
    """What the model, counts and compressors make of the held-out text, and what the loss cost."""
    text = b"".join(d.text for d in corpus.held_out)
    held = data.held_out.targets
    seen = information.empirical_distribution(held, data.tokenizer.size)
    known = np.bincount(data.counted.ids, minlength=data.tokenizer.size) + 0.5
    unigram = {
        "entropy": information.entropy(seen, base=2),
        "code": information.cross_entropy(seen, jnp.asarray(known / known.sum(), jnp.float32), base=2),
    }
    risk, _ = measure(params, data.held_out)
    return {
        "corpus": {
            "train_files": len(corpus.train),
            "train_bytes": sum(len(d.text) for d in corpus.train),
            "held_out_files": [d.name for d in corpus.held_out],
        },
        "held_out": figures(risk, len(text)),
        "unigram": {
            name: {
                "bits_per_token": float(bits),
                "bits_per_byte": float(bits) * len(held) / len(text),
                "perplexity": 2 ** float(bits),
            }
            for name, bits in unigram.items()
        },
        "compressors": {
            "zlib -9": 8 * len(zlib.compress(text, 9)) / len(text),
            "bz2 -9": 8 * len(bz2.compress(text, 9)) / len(text),
            "lzma -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
        },
        "loss": _loss_figures(params, data.fitted, batch_rows),
    }


_head_gradient = jax.jit(jax.grad(model.head_loss, (0, 1, 2)))


@functools.lru_cache
def _temporary_bytes(rows: int, vocab_size: int, width: int) -> int:
    """What XLA sets aside for the gradient of the loss of `rows` hidden states."""
    shapes = ((rows, width), (vocab_size, width), (vocab_size,))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = _head_gradient.lower(*arguments, jax.ShapeDtypeStruct((rows,), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    return 0 if memory is None else int(memory.temp_size_in_bytes)


def _loss_figures(params: model.Params, rows: Rows, batch_rows: int) -> dict[str, float]:
    """The memory of the loss for one batch, and how far `jax.grad` is from `softmax(z) - onehot(y)` on real rows."""
    output, bias = params["output"], params["output_bias"]
    batch = model.Batch.of(rows.take(slice(0, 2 * model.CHUNK_ROWS)))
    hidden = model.hidden_states(params, batch)
    by_logit = softmax_cross_entropy_gradient(hidden @ output.T + bias[None, :], batch.targets)
    closed = (by_logit @ output, by_logit.T @ hidden, by_logit.sum(0))
    pairs = list(zip(closed, _head_gradient(hidden, output, bias, batch.targets), strict=True))
    return {
        "temporary_bytes": _temporary_bytes(batch_rows, *output.shape),
        "dense_logits_bytes": plan(batch_rows, output.shape[1], len(bias)).dense_logits_bytes,
        "gradient_difference": max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) for a, b in pairs),
    }
