"""`diagnose` finds each mistake and its first row and is silent on clean inputs; `checked` says the same in a program.

Expected kinds, counts and indices are written down by hand.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import draw_labels
from diagnosed import CLEAN, INF, LABELS, NAN, SOFT, SOFTMAX, SURE, Options, changed, summary
from jax.experimental import checkify

import jaxent
from jaxent import checked, diagnose, linear_softmax_cross_entropy, nll_loss, softmax_cross_entropy

# name -> logits, targets, options, and what is found: kind, how many, of how many, the first row
MISTAKES: dict[str, tuple[np.ndarray, np.ndarray, Options, list[tuple[str, int, int, int]]]] = {
    "softmax_twice": (SOFTMAX, LABELS, {}, [("probabilities_as_logits", 4, 4, 0)]),
    "softmax_twice_with_padding": (
        changed(SOFTMAX, {0: 7.0}),
        changed(LABELS, {0: -100}),
        {},
        [("probabilities_as_logits", 3, 3, 1)],
    ),
    "typed_percentages": (np.round(SOFTMAX, 2), SOFT, {}, [("probabilities_as_logits", 4, 4, 0)]),
    "above": (CLEAN, changed(LABELS, {2: 7}), {}, [("labels_out_of_range", 1, 4, 2)]),
    "below": (CLEAN, changed(LABELS, {1: -1, 3: -1}), {}, [("labels_out_of_range", 2, 4, 1)]),
    "not_ignored": (CLEAN, changed(LABELS, {1: -100}), {"ignore_index": None}, [("labels_out_of_range", 1, 4, 1)]),
    "one_based": (CLEAN, LABELS + 1, {}, [("labels_one_based", 1, 4, 1)]),
    "zero_and_count": (CLEAN, changed(LABELS, {3: 3}), {}, [("labels_out_of_range", 1, 4, 3)]),
    "nan": (changed(CLEAN, {(1, 2): NAN, (3, 0): NAN}), LABELS, {}, [("not_finite", 2, 4, 1)]),
    "inf": (changed(CLEAN, {(2, 0): INF}), SOFT, {}, [("not_finite", 1, 4, 2)]),
    "masked": (changed(CLEAN, {3: -INF}), LABELS, {}, [("fully_masked", 1, 4, 3)]),
    "masked_by_a_number": (changed(CLEAN, {3: -1e9}), LABELS, {}, [("fully_masked", 1, 4, 3)]),
    "label_masked": (changed(CLEAN, {(1, 2): -INF}), LABELS, {}, [("infinite_loss", 1, 4, 1)]),
    "target_masked": (changed(CLEAN, {(2, 2): -INF}), SOFT, {}, [("infinite_loss", 1, 4, 2)]),
    "smoothing_masked": (
        changed(CLEAN, {(3, 0): -INF}),
        LABELS,
        {"label_smoothing": 0.1},
        [("infinite_loss", 1, 4, 3)],
    ),
    "negative_targets": (CLEAN, changed(SOFT, {(2, 0): -0.5, (2, 1): 1.0}), {}, [("negative_targets", 1, 4, 2)]),
    "targets_of_99_percent": (CLEAN, changed(SOFT, {(0, 0): 0.49}), {}, [("not_normalized", 1, 4, 0)]),
    "targets_of_two": (CLEAN, SOFT * 2, {}, [("not_normalized", 4, 4, 0)]),
    "row_weights": (CLEAN, LABELS, {"weights": np.array([1.0, 0.0, -1.0, 1.0])}, [("bad_weights", 1, 3, 2)]),
    "class_weights": (CLEAN, LABELS, {"class_weights": np.array([1.0, NAN, 1.0])}, [("bad_weights", 2, 4, 2)]),
    "class_of_no_weight": (
        CLEAN,
        LABELS,
        {"class_weights": np.array([1.0, 2.0, 0.0])},
        [("zero_class_weights", 1, 4, 1)],
    ),
    "target_of_no_weight": (
        CLEAN,
        SOFT,
        {"class_weights": np.array([1.0, 0.0, 1.0])},
        [("zero_class_weights", 3, 4, 0)],
    ),
    "large": (changed(CLEAN, {(1, 0): 7e4}), LABELS, {}, [("float16_overflow", 1, 4, 1)]),
    "shifted": (CLEAN - np.float32(1e5), SOFT, {}, [("float16_overflow", 4, 4, 0)]),
    "large_loss": (changed(CLEAN, {(3, 1): -7e4}), LABELS, {}, [("float16_overflow", 1, 4, 3)]),
    "ignored": (CLEAN, changed(LABELS, {...: -100}), {}, [("ignored_rows", 4, 4, 0)]),
    "not_kept": (CLEAN, SOFT, {"where": np.zeros(4, bool)}, [("ignored_rows", 4, 4, 0)]),
    "collapsed": (SURE, changed(LABELS, {...: [0, 2, 1, 1]}), {}, [("collapsed_loss", 4, 4, 0)]),
    "collapsed_one_hot": (SURE, np.eye(3, dtype=np.float32)[LABELS], {}, [("collapsed_loss", 4, 4, 0)]),
    "two": (
        changed(CLEAN, {(1, 2): NAN}),
        changed(LABELS, {3: 9}),
        {},
        [("labels_out_of_range", 1, 4, 3), ("not_finite", 1, 4, 1)],
    ),
}
UNDERFLOWS = np.array([[0.0, -200.0], [0.0, -1e7]], np.float32)
MISTAKES |= {
    "one_has_collapsed": (
        np.concatenate([UNDERFLOWS, [[0.0, -30.0]]]).astype(np.float32),
        np.zeros(3, np.int32),
        {},
        [("collapsed_loss", 1, 3, 2)],
    ),
    "nan_weights": (
        CLEAN,
        LABELS,
        {"weights": np.array([1.0, NAN, -1.0, 1.0])},
        [("bad_weights", 1, 4, 1), ("bad_weights", 1, 4, 2)],
    ),
}
# Near each of the mistakes, and none.
FINE: dict[str, tuple[np.ndarray, np.ndarray, Options]] = {
    "log_probabilities": (np.log(SOFTMAX), LABELS, {}),
    "one_row_in_four": (changed(CLEAN, {0: SOFTMAX[0]}), LABELS, {}),
    "bad_but_ignored": (
        changed(CLEAN, {0: NAN, 1: -INF, 2: INF}),
        changed(LABELS, {0: -100, 2: 99}),
        {"where": np.array([True, False, True, True]), "weights": np.array([1.0, 1.0, 0.0, 1.0])},
    ),
    "padding": (CLEAN, changed(LABELS, {0: -100, 1: -100, 2: -100}), {}),
    "labels_without_zero": (CLEAN, changed(LABELS, {0: 1}), {}),
    "ignored_class": (CLEAN, changed(LABELS, {0: 255}), {"ignore_index": 255}),
    "another_class_masked": (changed(CLEAN, {(0, 1): -INF, (2, 0): -1e9}), LABELS, {}),
    "unused_class_of_no_weight": (CLEAN, changed(LABELS, {1: 0}), {"class_weights": np.array([1.0, 2.0, 0.0])}),
    "sure_but_one": (changed(SURE, {(1, 1): -2.0}), LABELS, {}),
    "sure_of_the_only_class": (np.where(np.eye(3, dtype=bool)[LABELS], 1.5, -1e9), LABELS, {}),
    "sure_and_smoothed": (changed(SURE, {(2, 2): -50.0}), LABELS, {"label_smoothing": 0.1}),
    "sure_and_exact": (np.where(np.eye(3, dtype=bool)[LABELS], 1.5, -INF), LABELS, {}),
    "losses_that_underflow": (UNDERFLOWS, np.zeros(2, np.int32), {}),
    "ten_thousand": (CLEAN * np.float32(1e4), LABELS, {}),
    "shifted": (CLEAN + np.float32(1e4), LABELS, {}),
    "one_row_by_chance": (np.array([[0.25, 0.75]], ml_dtypes.bfloat16), np.array([0]), {}),
    "one_class": (np.ones((4, 1), np.float32), np.zeros(4, np.int32), {}),
    "empty": (np.zeros((0, 3), np.float32), np.zeros(0, np.int32), {}),
    "int8_of_many_classes": (np.zeros((2, 300), np.float32), np.array([0, 127], np.int8), {}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str):
    logits, targets, options, expected = MISTAKES[name]
    assert summary(diagnose(logits, targets, **options)) == [(k, n, of, (first,)) for k, n, of, first in expected]


@pytest.mark.parametrize("name", FINE)
def test_valid_inputs_have_no_finding(name: str):
    logits, targets, options = FINE[name]
    assert diagnose(logits, targets, **options) == []


def test_the_worked_example():
    # Feeding probabilities to a loss that takes logits prints 1.1331 for a label that is wrong as well.
    (finding,) = diagnose(np.array([0.3, 0.3, 0.4]), 1)
    assert (finding.kind, finding.count, finding.first) == ("probabilities_as_logits", 1, ())
    assert str(finding).startswith("probabilities passed as logits: 1 of 1 rows, the only one (they sum to 1). The ")
    assert "nll_loss(log(p), labels)" in str(finding)
    assert [f.kind for f in diagnose(np.array([[0.3, 0.3, 0.4]]), np.array([3]))] == [
        "probabilities_as_logits",
        "labels_one_based",
    ]
    assert diagnose(np.log([[0.3, 0.3, 0.4]]), np.array([2])) == []


def test_a_sentence_names_the_row_and_what_it_holds():
    z, labels = np.moveaxis(CLEAN.reshape(2, 2, 3), -1, 1), changed(LABELS, {2: 5}).reshape(2, 2)
    (finding,) = diagnose(z, labels, axis=1)
    assert finding.first == (1, 0)
    assert str(finding).startswith(
        "labels out of range: 1 of 4 rows, the first at [1, 0] (label 5 of classes 0 to 2). The loss is nan there:"
    )


def clean_problem(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Options]:
    """Logits of many scales and distributions, and small counts in which uniform ones come near to probabilities."""
    batch = ((1,), (2,), (5,), (40,), (3, 4))[rng.integers(5)]
    count = (2, 3, 4, 10, 100)[rng.integers(5)]
    kind = (np.float32, np.float32, np.float16, ml_dtypes.bfloat16)[rng.integers(4)]
    scale = (0.1, 1.0, 3.0)[rng.integers(3)]
    shape = (*batch, count)
    z = (
        rng.normal(size=shape) * scale,
        rng.uniform(size=shape),
        rng.dirichlet(np.ones(count), batch) + 0.1 * rng.normal(size=(*batch, 1)),
        np.log(rng.dirichlet(np.ones(count), batch)),
        rng.normal(size=shape) * scale + 1e4 * (kind != np.float16),
    )[rng.integers(5)]
    labels = draw_labels(rng, batch, count).astype((np.int8, np.uint8, np.int32, np.int64)[rng.integers(4)])
    if rng.random() < 0.3:
        targets = rng.dirichlet(np.ones(count), batch).astype((np.float32, kind)[rng.integers(2)])
        return z.astype(kind), targets, {"label_smoothing": 0.1} if rng.random() < 0.5 else {}
    options: Options = {}
    if rng.random() < 0.3:
        others = np.arange(count) != labels[..., None]
        z[others & (rng.random(shape) < 0.3)] = -np.inf if rng.random() < 0.5 or kind == np.float16 else -1e9
    if rng.random() < 0.3:
        options["class_weights"] = rng.uniform(0.1, 2, count)
    if rng.random() < 0.3:
        options["where"] = rng.random(batch) < 0.7
        options["where"].flat[0] = True
    return z.astype(kind), labels, options


@pytest.mark.grid
def test_silence_on_clean_problems(rng: np.random.Generator):
    alarms = []
    for i in range(200):
        logits, targets, options = clean_problem(rng)
        alarms += [(i, logits, targets, str(f)) for f in diagnose(logits, targets, **options)]
    assert alarms == []


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 1000])
def test_probabilities_of_every_dtype(dtype: Any, count: int, rng: np.random.Generator):
    p = rng.dirichlet(np.ones(count), 8).astype(dtype)
    assert [f.kind for f in diagnose(p, draw_labels(rng, (8,), count))] == ["probabilities_as_logits"]


# ----------------------------------------------------------------------------------------------------------------------
# Inside a program


def error_of(logits: Any, targets: Any, **options: Any) -> str | None:
    static = {k: options.pop(k) for k in ("ignore_index", "label_smoothing") if k in options}
    program = jax.jit(checkify.checkify(lambda z, t, o: checked(softmax_cross_entropy)(z, t, **o, **static)))
    return program(logits, targets, options)[0].get()


@pytest.mark.parametrize(
    "name", ["one_based", "masked", "smoothing_masked", "class_of_no_weight", "targets_of_two", "collapsed", "two"]
)
def test_a_checked_program_says_what_diagnose_says(name: str):
    logits, targets, options, _ = MISTAKES[name]
    message = error_of(logits, targets, **options)
    assert message is not None
    assert message.startswith(str(diagnose(logits, targets, **options)[0]))


@pytest.mark.grid
@pytest.mark.parametrize("name", ["bad_but_ignored", "empty"])
def test_a_checked_program_is_silent_on_what_is_fine(name: str):
    logits, targets, options = FINE[name]
    assert error_of(logits, targets, **options) is None


@pytest.mark.grid
def test_checked_changes_neither_value_nor_gradient(rng: np.random.Generator):
    hidden, kernel = rng.normal(size=(4, 2)).astype(np.float32), rng.normal(size=(2, 3)).astype(np.float32)
    for loss, args in ((nll_loss, (np.log(SOFTMAX),)), (linear_softmax_cross_entropy, (hidden, kernel))):

        def both(args: Any, labels: Any, loss: Any) -> Any:
            return jax.value_and_grad(lambda args: loss(*args, labels, ignore_index=0))(args)

        program = jax.jit(checkify.checkify(functools.partial(both, loss=checked(loss))))
        error, got = program(args, LABELS)
        assert error.get() is None
        jax.tree.map(np.testing.assert_array_equal, got, jax.jit(functools.partial(both, loss=loss))(args, LABELS))
        error, _ = program(args, changed(LABELS, {2: 4}))
        assert (error.get() or "").startswith("labels out of range: 1 of 3 rows, the first at [2]")
    error, _ = program((changed(hidden, {(3, 0): NAN}), kernel), LABELS)
    assert (error.get() or "").startswith("hidden states with nan or inf: 1 of 3 rows, the first at [3] (nan at 0)")


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"diagnose: `targets` must be a concrete array \(inside jit.* got int32\[4\]"):
        jax.jit(lambda y: diagnose(CLEAN, y))(LABELS)
    with pytest.raises(TypeError, match=r"jaxent.diagnose: `logits` must have a floating dtype"):
        diagnose(LABELS, LABELS)
    with pytest.raises(ValueError, match=r"jaxent.diagnose: `targets` must have shape \(4,\)"):
        diagnose(CLEAN, LABELS[:3])
    for no_loss in (jaxent.linear_kl_divergence, jaxent.linear_loss, jaxent.empirical_distribution, len):
        with pytest.raises(TypeError, match=r"jaxent.checked: `loss` must be a loss of logits"):
            checked(no_loss)
    with pytest.raises(TypeError, match=r"jaxent.diagnose: `loss` must be one of logits or distributions"):
        diagnose(CLEAN, LABELS, loss=linear_softmax_cross_entropy)
    with pytest.raises(TypeError, match=r"jaxent.diagnose: `label_smoothing` must be an option of `loss`"):
        diagnose(CLEAN, LABELS, loss=nll_loss, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"jaxent.checked: `vocab_axis` must be None"):
        checked(softmax_cross_entropy)(jnp.asarray(CLEAN), LABELS, vocab_axis="x")
