"""A small causal language model: pure functions of a dictionary of arrays."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxent.cli.train.ngrams import CANDIDATES, EVIDENCE, LAGS, Rows, Stream
from jaxent.linear import linear_softmax_cross_entropy

Params = dict[str, jax.Array]

PER_TOKEN = frozenset({"embedding", "output", "output_bias"})  # the parameters with one row a token

# Measured on 2 CPU cores at 1024 x 64 x 32768: 64 rows, whose logits stay in the cache, take 0.35 of the time of 1024.
CHUNK_ROWS = 64
HIDDEN = 4  # how many times the width the hidden layers have; heuristic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """`Rows` on the device."""

    targets: jax.Array
    lags: jax.Array
    candidates: jax.Array
    offered: jax.Array
    evidence: jax.Array

    @classmethod
    def of(cls, rows: Rows, place: Callable[[np.ndarray], jax.Array] = jnp.asarray) -> "Batch":
        return cls(*(place(getattr(rows, field.name)) for field in dataclasses.fields(rows)))


def hidden_states(params: Params, batch: Batch) -> jax.Array:
    """The state before each target, `(rows, width)`.

    It is the sum of three predictions: what follows the last token (its embedding), what follows the last `LAGS` tokens
    (two layers on their embeddings and the evidence), and the output vectors of the candidates, each weighed by a gate.
    A gate of `g` raises the candidate's logit by about `g` times its self-information.
    """
    embedded = params["embedding"][batch.lags]
    last = embedded[:, 0]
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(embedded), axis=-1, keepdims=True) + 1e-2)
    context = jnp.reshape(embedded * scale, (len(last), -1))
    x = jnp.concatenate([context, batch.evidence], axis=1)
    x = jax.nn.gelu(x @ params["layer1"] + params["bias1"][None, :])
    x = x + jax.nn.gelu(x @ params["layer2"] + params["bias2"][None, :])
    gates = jnp.concatenate([x, batch.evidence], axis=1) @ params["gates"] + params["gate_bias"][None, :]
    # Candidates that several contexts propose are counted once: the evidence ends with the number of supporters / 4.
    supporters = jnp.maximum(4 * batch.evidence[:, -CANDIDATES:], 1)
    information = -jax.lax.stop_gradient(params["output_bias"])[batch.candidates]
    gates = jnp.where(batch.offered, gates * information / supporters, 0)
    proposed = jnp.einsum("nc,ncd->nd", gates, params["output"][batch.candidates])
    return params["scale"] * last + x @ params["layer3"] + proposed


def loss(params: Params, batch: Batch, shards: int = 1) -> jax.Array:
    """Mean cross-entropy of the batch, in nats per token; `shards` is the number of devices that its rows lie on."""
    return head_loss(hidden_states(params, batch), params["output"], params["output_bias"], batch.targets, shards)


def token_losses(params: Params, batch: Batch, shards: int = 1) -> jax.Array:
    """The self-information of every target, in nats."""
    value = linear_softmax_cross_entropy(
        hidden_states(params, batch),
        params["output"].T,
        batch.targets,
        bias=params["output_bias"],
        reduction="none",
        chunk_rows=CHUNK_ROWS * shards,
    )
    assert isinstance(value, jax.Array)
    return value


def head_loss(hidden: jax.Array, output: jax.Array, bias: jax.Array, targets: jax.Array, shards: int = 1) -> jax.Array:
    """The loss from the hidden states, never holding more logits than those of `CHUNK_ROWS` rows a shard."""
    value = linear_softmax_cross_entropy(hidden, output.T, targets, bias=bias, chunk_rows=CHUNK_ROWS * shards)
    assert isinstance(value, jax.Array)
    return value


def shapes(vocab_size: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter."""
    hidden = HIDDEN * width
    return {
        "embedding": (vocab_size, width),
        "output": (vocab_size, width),
        "output_bias": (vocab_size,),
        "layer1": (LAGS * width + EVIDENCE, hidden),
        "bias1": (hidden,),
        "layer2": (hidden, hidden),
        "bias2": (hidden,),
        "layer3": (hidden, width),
        "gates": (hidden + EVIDENCE, CANDIDATES),
        "gate_bias": (CANDIDATES,),
        "scale": (),
    }


def initial_params(counted: Stream, vocab_size: int, width: int, seed: int) -> dict[str, np.ndarray]:
    """Parameters with which the model already predicts about as well as counts do.

    The output bias is the log-frequency of each token. Output vectors are random directions, drawn together for tokens
    that follow alike ones; an embedding is the mean output vector of what followed the token in the counted text, minus
    the mean over all text. Gates start at one half: a candidate is given the square root of its inverse frequency.
    """
    rng = np.random.default_rng(seed)
    frequency = np.bincount(counted.ids, minlength=vocab_size) + 0.5
    frequency /= frequency.sum()
    random = _unit(rng.standard_normal((vocab_size, width), np.float32))
    before, after = counted.back(1), counted.ids
    followers = _mean_by(before, after, random, vocab_size)
    leaders = _mean_by(after, before, _unit(followers - followers.mean(0)), vocab_size)
    output = _unit(random + 0.5 * _unit(leaders))
    embedding = _mean_by(before, after, output, vocab_size) - frequency @ output

    def dense(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)) / np.sqrt(rows)

    params = {name: np.zeros(shape) for name, shape in shapes(vocab_size, width).items()}
    params |= {"embedding": embedding, "output": output, "output_bias": np.log(frequency)}
    params |= {name: dense(*params[name].shape) for name in ("layer1", "layer2")}
    params |= {"gate_bias": np.full(CANDIDATES, 0.5), "scale": np.array(4.0)}  # heuristic
    return {name: np.asarray(value, np.float32) for name, value in params.items()}


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.sum(np.square(x), axis=1, keepdims=True) + 1e-6)


def _mean_by(key: np.ndarray, value: np.ndarray, vectors: np.ndarray, size: int) -> np.ndarray:
    """For each key the mean vector of its values, drawn towards 0 as if it had two values of 0 more."""
    pairs, counts = np.unique(key.astype(np.int64) * size + value, return_counts=True)
    keys, weights = pairs // size, counts.astype(np.float32)
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    sums = np.zeros((size, vectors.shape[1]), np.float32)
    sums[keys[first]] = np.add.reduceat(vectors[pairs % size] * weights[:, None], first)
    return sums / (np.bincount(keys, weights, size) + 2)[:, None].astype(np.float32)


def count_parameters(params: Params) -> int:
    return sum(p.size for p in params.values())
