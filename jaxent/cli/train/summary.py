"""What a run has learnt: the held-out text under the model, under counts and under compressors, and the loss's cost."""

import bz2
import functools
import lzma
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxent.cli.train import model
from jaxent.cli.train.corpus import Corpus
from jaxent.cli.train.dataset import Dataset
from jaxent.cli.train.evaluation import figures, measure, perplexity
from jaxent.cli.train.mesh import DATA, VOCAB, DeviceMesh
from jaxent.cli.train.ngrams import Rows
from jaxent.costs import plan
from jaxent.empirical import empirical_distribution
from jaxent.gradients import softmax_cross_entropy_gradient
from jaxent.information import cross_entropy, entropy

DENSE_BYTES = 2**27  # of logits, for as many rows of which the gradient is also taken in closed form


def summarize(
    params: model.Params, data: Dataset, corpus: Corpus, batch_rows: int, devices: DeviceMesh
) -> dict[str, Any]:
    text = b"".join(d.text for d in corpus.held_out)
    held = data.held_out.targets
    risk, _ = measure(params, data.held_out, devices)
    bits = _unigram_bits(data)
    return {
        "corpus": {
            "train_files": len(corpus.train),
            "train_bytes": sum(len(d.text) for d in corpus.train),
            "held_out_files": [d.name for d in corpus.held_out],
        },
        "held_out": figures(float(risk.mean()) * len(held), len(text), len(held)),
        "unigram": {name: _units(bits[name], len(held) / len(text)) for name in ("entropy", "code")},
        "compressors": {
            "zlib -9": 8 * len(zlib.compress(text, 9)) / len(text),
            "bz2 -9": 8 * len(bz2.compress(text, 9)) / len(text),
            "lzma -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
        },
        "loss": _loss_figures(params, data.fitted, batch_rows, devices),
    }


def _units(bits: float, tokens_per_byte: float) -> dict[str, float]:
    return {"bits_per_token": bits, "bits_per_byte": bits * tokens_per_byte, "perplexity": perplexity(bits)}


def _unigram_bits(data: Dataset) -> dict[str, float]:
    """Bits per token of the held-out text for codes that ignore the context.

    `entropy` is that of the text's own counts, which no code knew before; `code` has the counts of the training text.
    """
    size = data.tokenizer.size
    seen = empirical_distribution(data.held_out.targets, size)
    known = np.bincount(data.counted.ids, minlength=size) + 0.5
    return {
        "entropy": float(entropy(seen, base=2)),
        "code": float(cross_entropy(seen, jnp.asarray(known / known.sum(), jnp.float32), base=2)),
    }


_head_gradient = jax.jit(jax.grad(model.head_loss, (0, 1, 2)), static_argnums=4)


@jax.jit
def _closed_gradient(params: model.Params, batch: model.Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same from `softmax(z) - onehot(y)`."""
    hidden, output = model.hidden_states(params, batch), params["output"]
    by_logit = softmax_cross_entropy_gradient(hidden @ output.T + params["output_bias"][None, :], batch.targets)
    return by_logit @ output, by_logit.T @ hidden, by_logit.sum(0)


@functools.partial(jax.jit, static_argnums=2)
def _streamed_gradient(params: model.Params, batch: model.Batch, shards: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    hidden = model.hidden_states(params, batch)
    return _head_gradient(hidden, params["output"], params["output_bias"], batch.targets, shards)


@jax.jit
def _largest_differences(expected: Sequence[jax.Array], found: Sequence[jax.Array]) -> jax.Array:
    """In parts of the largest entry of each array."""
    pairs = zip(expected, found, strict=True)
    return jnp.stack([jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a)) for a, b in pairs])


def _loss_figures(params: model.Params, rows: Rows, batch_rows: int, devices: DeviceMesh) -> dict[str, float]:
    """The memory of the loss for one batch, on each device, and the gradient of real rows, two ways."""
    size, width = params["output"].shape
    count = max(1, min(batch_rows, DENSE_BYTES // (4 * size)) // devices.data) * devices.data
    batch = model.Batch.of(rows.take(np.arange(count) % len(rows)), devices.rows)
    streamed = _streamed_gradient(params, batch, devices.data)
    differences = devices.fetch(_largest_differences(_closed_gradient(params, batch), streamed))
    return {
        "temporary_bytes": _temporary_bytes(batch_rows, size, width, devices),
        "dense_logits_bytes": plan(batch_rows, width, size).dense_logits_bytes // devices.mesh.size,
        "gradient_difference": float(np.max(differences)),
    }


@functools.lru_cache
def _temporary_bytes(rows: int, vocab_size: int, width: int, devices: DeviceMesh) -> int:
    """What XLA sets aside on each device for the gradient of the loss of `rows` hidden states."""

    def argument(axis: str, *shape: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=devices.split(axis))

    head = argument(VOCAB, vocab_size, width), argument(VOCAB, vocab_size)
    arguments = argument(DATA, rows, width), *head, argument(DATA, rows, dtype=jnp.int32)
    memory = _head_gradient.lower(*arguments, devices.data).compile().memory_analysis()
    return 0 if memory is None else int(memory.temp_size_in_bytes)
