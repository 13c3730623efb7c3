"""What works through which transformation, here and elsewhere: `python -m benchmarks.transformations` runs every cell.

A cell is right if its result is that of the formulas in NumPy. The peers are those that are installed.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxent import linear_softmax_cross_entropy, softmax_cross_entropy

ROWS, FEATURES, CLASSES = 8, 4, 12
RIGHT, WRONG, RAISES, NONE = "yes", "wrong", "raises", "-"
Loss = Callable[..., Any]


# ----------------------------------------------------------------------------------------------------------------------
# The mean loss, its derivatives, and the data


class Data:
    """Hidden states, kernel, labels, and a direction; in float64, as are the formulas."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.h, self.dh = rng.normal(size=(2, ROWS, FEATURES))
        self.w, self.dw = rng.normal(size=(2, FEATURES, CLASSES))
        self.y = rng.integers(0, CLASSES, ROWS).astype(np.int32)

    def logit_gradient(self, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities, and the gradient with respect to the logits."""
        p = np.exp(h @ self.w)
        p /= p.sum(-1, keepdims=True)
        return p, (p - np.eye(CLASSES)[self.y]) / ROWS

    def gradient(self, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, g = self.logit_gradient(h)
        return g @ self.w.T, h.T @ g

    def slope(self) -> np.ndarray:
        by_h, by_w = self.gradient(self.h)
        return np.sum(by_h * self.dh) + np.sum(by_w * self.dw)

    def product(self) -> tuple[np.ndarray, np.ndarray]:
        """The Hessian times the direction."""
        p, g = self.logit_gradient(self.h)
        u = self.dh @ self.w + self.h @ self.dw
        dg = p * (u - np.sum(p * u, -1, keepdims=True)) / ROWS
        return dg @ self.w.T + g @ self.dw.T, self.dh.T @ g + self.h.T @ dg

    def hessian(self) -> np.ndarray:
        """By the kernel."""
        p, _ = self.logit_gradient(self.h)
        curvature = (np.einsum("nk,kl->nkl", p, np.eye(CLASSES)) - np.einsum("nk,nl->nkl", p, p)) / ROWS
        return np.einsum("na,nb,nkl->akbl", self.h, self.h, curvature)

    def batch(self) -> np.ndarray:
        return np.stack([self.h, self.dh])

    def batch_gradient(self) -> tuple[np.ndarray, ...]:
        return tuple(np.stack(x) for x in zip(*map(self.gradient, self.batch()), strict=True))

    def scan_gradient(self) -> tuple[np.ndarray, np.ndarray]:
        by_h, by_w = self.batch_gradient()
        return by_h, by_w.sum(0)


# ----------------------------------------------------------------------------------------------------------------------
# Losses and transformations


def gradient(f: Loss) -> Loss:
    """By hidden states and kernel."""
    return jax.grad(f, argnums=(0, 1))


def through_scan(f: Loss, h: Any, w: Any, y: Any) -> Any:
    def total(h: Any, w: Any) -> Any:
        return jax.lax.scan(lambda c, x: (c + f(x, w, y), None), jnp.zeros(()), h)[0]

    return jax.grad(total, argnums=(0, 1))(h, w)


def exported(f: Loss, *data: Any) -> Any:
    lowered = jax.export.export(jax.jit(gradient(f)), platforms=["cpu", "cuda", "tpu"])(*data)
    return jax.export.deserialize(lowered.serialize()).call(*data)


def over_two_devices(kind: AxisType, split: str) -> tuple[jax.sharding.Mesh, tuple[P, P, P]]:
    """A mesh, and how it splits hidden states, kernel and labels, by rows or by classes."""
    mesh = jax.make_mesh((2,), (split,), axis_types=(kind,), devices=jax.devices()[:2])
    return mesh, (P("rows"), P(), P("rows")) if split == "rows" else (P(), P(None, "classes"), P())


def on_mesh(f: Loss, kind: AxisType, split: str, data: Any) -> Any:
    """The gradient where XLA or the types say what crosses the mesh."""
    mesh, specs = over_two_devices(kind, split)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(data, specs, strict=True)]
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(gradient(f))(*placed))


def in_shard_map(f: Loss, split: str, data: Any) -> Any:
    """The same where each device runs the loss on its own part."""
    mesh, specs = over_two_devices(AxisType.Auto, split)

    def part(*data: Any) -> Any:
        return jax.lax.pmean(f(*data), "rows") if split == "rows" else f(*data, vocab_axis="classes")

    return jax.device_get(jax.jit(gradient(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())))(*data))


@dataclass(frozen=True)
class Transformation:
    """`of_jax(f, data)` and `of_torch(torch, f, data)` should be `wanted(data)`; None where there is no such thing."""

    wanted: Callable[[Data], Any]
    of_jax: Callable[[Loss, Data], Any]
    of_torch: Callable[[Any, Loss, Any], Any] | None = None
    vocab_axis: bool = False
    """Whether the loss has to be told how its classes are split."""


def given(d: Data) -> tuple[jax.Array, ...]:
    return jnp.float32(d.h), jnp.float32(d.w), jnp.asarray(d.y)


def direction(d: Data) -> tuple[jax.Array, jax.Array]:
    return jnp.float32(d.dh), jnp.float32(d.dw)


def sharded(run: Callable[[Loss, Any], Any], vocab_axis: bool = False) -> Transformation:
    return Transformation(lambda d: d.gradient(d.h), lambda f, d: run(f, given(d)), vocab_axis=vocab_axis)


def autograd(torch: Any, f: Loss, t: Any) -> Any:
    return torch.autograd.grad(f(t.h, t.w, t.y), (t.h, t.w))


TRANSFORMATIONS: dict[str, Transformation] = {
    "`grad`": Transformation(lambda d: d.gradient(d.h), lambda f, d: jax.jit(gradient(f))(*given(d)), autograd),
    "`jvp`": Transformation(
        lambda d: d.slope(),
        lambda f, d: jax.jit(lambda h, w, y: jax.jvp(lambda h, w: f(h, w, y), (h, w), direction(d))[1])(*given(d)),
        lambda torch, f, t: torch.func.jvp(lambda h, w: f(h, w, t.y), (t.h, t.w), (t.dh, t.dw))[1],
    ),
    "`jacfwd`": Transformation(
        lambda d: d.gradient(d.h),
        lambda f, d: jax.jit(jax.jacfwd(f, argnums=(0, 1)))(*given(d)),
        lambda torch, f, t: torch.func.jacfwd(lambda h, w: f(h, w, t.y), argnums=(0, 1))(t.h, t.w),
    ),
    "`hessian`": Transformation(
        lambda d: d.hessian(),
        lambda f, d: jax.jit(jax.hessian(f, argnums=1))(*given(d)),
        lambda torch, f, t: torch.autograd.functional.hessian(lambda w: f(t.h, w, t.y), t.w, strict=True),
    ),
    "Hessian-vector product": Transformation(
        lambda d: d.product(),
        lambda f, d: jax.jit(lambda h, w, y: jax.jvp(lambda h, w: gradient(f)(h, w, y), (h, w), direction(d))[1])(
            *given(d)
        ),
        lambda torch, f, t: torch.autograd.functional.hvp(
            lambda h, w: f(h, w, t.y), (t.h, t.w), (t.dh, t.dw), strict=True
        )[1],
    ),
    "`vmap(grad)`": Transformation(
        lambda d: d.batch_gradient(),
        lambda f, d: jax.jit(jax.vmap(gradient(f), (0, None, None)))(jnp.float32(d.batch()), *given(d)[1:]),
        lambda torch, f, t: torch.func.vmap(torch.func.grad(f, argnums=(0, 1)), (0, None, None))(
            torch.stack([t.h, t.dh]), t.w, t.y
        ),
    ),
    "`grad` through `scan`": Transformation(
        lambda d: d.scan_gradient(),
        lambda f, d: jax.jit(lambda h, w, y: through_scan(f, h, w, y))(jnp.float32(d.batch()), *given(d)[1:]),
    ),
    "`checkpoint`": Transformation(
        lambda d: d.gradient(d.h),
        lambda f, d: jax.jit(gradient(jax.checkpoint(f)))(*given(d)),
        lambda torch, f, t: autograd(
            torch,
            lambda *x: importlib.import_module("torch.utils.checkpoint").checkpoint(f, *x, use_reentrant=False),
            t,
        ),
    ),
    "`jax.export` for cpu, cuda, tpu": Transformation(lambda d: d.gradient(d.h), lambda f, d: exported(f, *given(d))),
    "automatic mesh, rows split": sharded(lambda f, data: on_mesh(f, AxisType.Auto, "rows", data)),
    "automatic mesh, classes split": sharded(lambda f, data: on_mesh(f, AxisType.Auto, "classes", data)),
    "explicit mesh, rows split": sharded(lambda f, data: on_mesh(f, AxisType.Explicit, "rows", data)),
    "explicit mesh, classes split": sharded(lambda f, data: on_mesh(f, AxisType.Explicit, "classes", data)),
    "`shard_map`, rows split": sharded(lambda f, data: in_shard_map(f, "rows", data)),
    "`shard_map`, classes split": sharded(lambda f, data: in_shard_map(f, "classes", data), vocab_axis=True),
}


def jaxent_dense(h: Any, w: Any, y: Any, **axis: Any) -> Any:
    return softmax_cross_entropy(h @ w, y, **axis)


def jaxent_fused(h: Any, w: Any, y: Any, **axis: Any) -> Any:
    return linear_softmax_cross_entropy(h, w, y, chunk_rows=2, **axis)


def optax_dense(h: Any, w: Any, y: Any) -> Any:
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(h @ w, y))


def tokamax_best(h: Any, w: Any, y: Any) -> Any:
    importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
    loss = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
    return loss(h, y, w, reduction="mean")


def torch_dense(h: Any, w: Any, y: Any) -> Any:
    return importlib.import_module("torch").nn.functional.cross_entropy(h @ w, y)


def torch_fused(h: Any, w: Any, y: Any) -> Any:
    torch = importlib.import_module("torch")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    return torch.nn.functional.linear_cross_entropy(h, w.T, y, options=options)


# Heading -> package, loss.
COLUMNS: dict[str, tuple[str, Loss]] = {
    "jaxent dense": ("jaxent", jaxent_dense),
    "jaxent fused": ("jaxent", jaxent_fused),
    "optax": ("optax", optax_dense),
    "tokamax": ("tokamax", tokamax_best),  # what it picks for this device
    "torch dense": ("torch", torch_dense),
    "torch `linear_cross_entropy`": ("torch", torch_fused),
}


# ----------------------------------------------------------------------------------------------------------------------
# Cells and table


class Tensors:
    """The data as PyTorch takes it."""

    def __init__(self, torch: Any, data: Data) -> None:
        self.h, self.w = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (data.h, data.w))
        self.dh, self.dw = (torch.tensor(x, dtype=torch.float32) for x in (data.dh, data.dw))
        self.y = torch.tensor(data.y, dtype=torch.int64)


def cell(package: str, f: Loss, transformation: Transformation) -> str:
    data = Data()
    if transformation.vocab_axis and "axis" not in inspect.signature(f).parameters:
        return NONE
    of_torch = transformation.of_torch if package == "torch" else None
    if package == "torch" and of_torch is None:
        return NONE
    try:
        if of_torch is not None:
            torch = importlib.import_module("torch")
            got = of_torch(torch, f, Tensors(torch, data))
            got = [x.detach().numpy() for x in (got if isinstance(got, tuple) else [got])]
        else:
            got = jax.tree.leaves(transformation.of_jax(f, data))
    except Exception:
        return RAISES
    want = jax.tree.leaves(transformation.wanted(data))
    right = all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(got, want, strict=True))
    return RIGHT if right else "silently 0" if not any(np.any(x) for x in got) else WRONG


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def column(name: str) -> list[str]:
    """The cells of a column whose package is installed."""
    package, f = COLUMNS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers'
        return [cell(package, f, transformation) for transformation in TRANSFORMATIONS.values()]


def heading(name: str) -> str:
    """With the version, but for ours."""
    package, _ = COLUMNS[name]
    return name if package == "jaxent" else name.replace(package, f"{package} {installed(package)}")


def table() -> str:
    """In Markdown, of all that are installed."""
    names = [name for name, (package, _) in COLUMNS.items() if installed(package)]
    cells = zip(TRANSFORMATIONS, *map(column, names), strict=True)
    head = ["", *map(heading, names)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    print(table())
