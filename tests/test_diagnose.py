"""`diagnose` finds each mistake and its first row and is silent on clean inputs; `checked` says the same in a program.

Expected kinds, counts and indices are written down by hand.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import draw_labels
from jax.experimental import checkify

import jaxent
import jaxent.torch_compat as nn
from jaxent import Finding, checked, diagnose, linear_softmax_cross_entropy, nll_loss, softmax_cross_entropy

INF, NAN = np.inf, np.nan
CLEAN = np.array([[1.5, 0.0, -2.0], [0.5, 0.25, 0.75], [0.0, -1.0, 3.0], [2.0, 2.5, -1.0]], np.float32)
LABELS = np.array([0, 2, 1, 1], np.int32)
SOFT = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.25, 0.25, 0.5]], np.float32)
SOFTMAX = np.exp(CLEAN) / np.exp(CLEAN).sum(-1, keepdims=True)
SURE = np.array([[0.0, -20.0, -25.0], [-30.0, -21.0, 0.0], [-18.0, 0.0, -INF], [-40.0, 0.0, -50.0]], np.float32)


def changed(x: np.ndarray, changes: dict[Any, Any]) -> np.ndarray:
    x = x.copy()
    for at, value in changes.items():
        x[at] = value
    return x


Options = dict[str, Any]
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


def summary(findings: list[Finding]) -> list[tuple[str, int, int, tuple[int, ...]]]:
    return [(f.kind, f.count, f.total, f.first) for f in findings]


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


FLAGS = np.array([[0, 1, 0], [1, 0, 0]], np.uint8)
PAIR = np.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], np.float32)
TABLE = np.array([[0.25, 0.25], [0.5, 0.0]], np.float32)
IMAGES = np.array(np.moveaxis(CLEAN.reshape(2, 2, 3), -1, 1))
# function, arguments, options, and what is found: kind, how many, of how many, the first place
OTHER_MISTAKES: dict[str, tuple[Any, tuple[Any, ...], Options, list[tuple[Any, ...]]]] = {
    "mask_of_255": (None, (CLEAN[:2], FLAGS * 255), {}, [("targets_out_of_range", 2, 6, (0, 1))]),
    "missing": (
        jaxent.sigmoid_cross_entropy,
        (CLEAN[:2], changed(FLAGS.astype(np.float32), {(1, 2): -1.0})),
        {"weights": np.array([[1.0, -1.0, 0.0], [1.0, 1.0, 1.0]], np.float32)},
        [("targets_out_of_range", 1, 5, (1, 2)), ("bad_weights", 1, 5, (0, 1))],
    ),
    "binary_nan": (
        jaxent.sigmoid_cross_entropy,
        (changed(CLEAN[0], {1: NAN}), FLAGS[0]),
        {},
        [("not_finite", 1, 3, (1,))],
    ),
    "binary_none_kept": (
        jaxent.sigmoid_cross_entropy,
        (CLEAN[0], FLAGS[0]),
        {"where": np.zeros(3, bool)},
        [("ignored_rows", 3, 3, (0,))],
    ),
    "logits_for_bce": (nn.BCELoss(), (CLEAN[:2], FLAGS), {}, [("not_probabilities", 2, 6, (0, 0))]),
    "bce_with_logits": (nn.BCEWithLogitsLoss(), (CLEAN[:2], FLAGS * 2), {}, [("targets_out_of_range", 2, 6, (0, 1))]),
    "logits_for_nll": (nll_loss, (CLEAN, LABELS), {}, [("not_log_probabilities", 4, 4, (0,))]),
    "probabilities_for_nll": (nn.nll_loss, (SOFTMAX, LABELS), {}, [("not_log_probabilities", 4, 4, (0,))]),
    "twin_axis": (
        nn.CrossEntropyLoss(ignore_index=7),
        (IMAGES, np.array([[0, 7], [3, 1]])),
        {},
        [("labels_out_of_range", 1, 3, (1, 0))],
    ),
    "kl_div_swapped": (
        nn.kl_div,
        (PAIR, np.log(PAIR)),
        {},
        [("not_normalized", 6, 6, (0, 0)), ("negative_probabilities", 6, 6, (0, 0))],
    ),
    "counts": (jaxent.entropy, (np.array([[3, 5, 2], [1, 0, 0]]),), {}, [("labels_as_probabilities", 2, 2, (0,))]),
    "float_labels": (jaxent.entropy, (np.array([2.0, 0.0, 1.0]),), {}, [("labels_as_probabilities", 1, 1, ())]),
    "table_of_counts": (
        jaxent.mutual_information,
        (np.array([[5.0, 1.0], [2.0, 3.0]], np.float32),),
        {},
        [("labels_as_probabilities", 1, 1, ())],
    ),
    "second_operand": (
        jaxent.kl_divergence,
        (PAIR, changed(PAIR, {(1, 0): -0.25, (0, 0): 0.75})),
        {},
        [("negative_probabilities", 1, 2, (1,)), ("not_normalized", 1, 2, (0,))],
    ),
    "no_room": (
        jaxent.cross_entropy,
        (PAIR, np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], np.float32)),
        {},
        [("infinite_measure", 1, 2, (0,))],
    ),
    "axis_0": (jaxent.perplexity, (changed(PAIR.T, {(0, 1): 0.5}),), {"axis": 0}, [("not_normalized", 1, 2, (1,))]),
    "masked_classes": (
        jaxent.entropy,
        (PAIR,),
        {"where": np.array([True, True, False])},
        [("not_normalized", 2, 2, (0,))],
    ),
    "event": (jaxent.self_information, (np.array([0.5, 1.5], np.float32),), {}, [("not_normalized", 1, 2, (1,))]),
    "probabilities_as_logits": (
        jaxent.kl_divergence_with_logits,
        (SOFTMAX, CLEAN),
        {},
        [("probabilities_as_logits", 4, 4, (0,))],
    ),
    "logits_of_nan": (jaxent.entropy_with_logits, (changed(CLEAN, {(2, 1): NAN}),), {}, [("not_finite", 1, 4, (2,))]),
    "no_labels": (jaxent.token_statistics, (changed(CLEAN, {3: -INF}),), {}, [("fully_masked", 1, 4, (3,))]),
}
TWO = np.array([[0, 1], [2, 2], [1, -100], [0, 2]])
HALVES = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 9.0], [0.5, 0.5]], np.float32)
OTHER_MISTAKES |= {
    "sparse_class": (
        softmax_cross_entropy,
        (CLEAN, jaxent.SparseTargets(changed(TWO, {(3, 1): 3}), HALVES)),
        {},
        [("labels_out_of_range", 1, 4, (3,))],
    ),
    "sparse_masses": (
        softmax_cross_entropy,
        (changed(CLEAN, {(0, 1): -INF}), jaxent.SparseTargets(TWO, changed(HALVES, {(1, 0): 0.5, (3, 0): -0.5}))),
        {},
        [("infinite_loss", 1, 4, (0,)), ("negative_targets", 1, 4, (3,)), ("not_normalized", 1, 4, (1,))],
    ),
}
OTHERS_FINE: dict[str, tuple[Any, tuple[Any, ...], Options]] = {
    "sparse": (softmax_cross_entropy, (CLEAN, jaxent.SparseTargets(TWO, HALVES)), {}),
    "sparse_and_dropped": (
        softmax_cross_entropy,
        (changed(CLEAN, {0: NAN}), jaxent.SparseTargets(changed(TWO, {0: -100}), HALVES)),
        {},
    ),
    "flags": (None, (CLEAN[:2], FLAGS), {}),
    "bools": (None, (CLEAN[:2], FLAGS == 1), {}),
    "fractions": (jaxent.sigmoid_cross_entropy, (CLEAN, SOFT), {}),
    "bad_but_not_kept": (
        jaxent.sigmoid_cross_entropy,
        (changed(CLEAN[:2], {(0, 0): NAN}), changed(FLAGS, {(0, 0): 255})),
        {"where": np.arange(6).reshape(2, 3) > 0},
    ),
    "log_probabilities": (nll_loss, (np.log(SOFTMAX), LABELS), {}),
    "log_probabilities_with_a_removed_class": (
        nll_loss,
        (np.array([[np.log(0.5), -INF, np.log(0.5)], [0.0, -INF, -INF]], np.float32), np.array([0, 0])),
        {},
    ),
    "half": (nll_loss, (np.log(SOFTMAX).astype(ml_dtypes.bfloat16), LABELS), {}),
    "twin": (nn.CrossEntropyLoss(ignore_index=7), (IMAGES, np.array([[0, 7], [2, 1]])), {}),
    "kl_div": (nn.kl_div, (np.log(PAIR), PAIR), {}),
    "kl_div_of_logs": (nn.KLDivLoss(log_target=True), (np.log(PAIR), np.log(PAIR)), {}),
    "one_hot": (jaxent.kl_divergence, (np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)), {}),
    "table": (jaxent.joint_entropy, (TABLE,), {}),
    "masked": (
        jaxent.entropy,
        (np.array([[0.5, 0.5, NAN], [0.25, 0.75, 9.0]], np.float32),),
        {"where": np.array([True, True, False])},
    ),
    "never_infinite": (jaxent.jensen_shannon_divergence, (PAIR, np.eye(3, dtype=np.float32)[:2]), {}),
    "logits": (jaxent.cross_entropy_with_logits, (np.log(PAIR), CLEAN[:2]), {}),
}


# Of each rule one, as a program too.
CHECKED = (
    *("missing", "logits_for_bce", "logits_for_nll", "twin_axis", "second_operand", "no_room", "axis_0"),
    *("masked_classes", "probabilities_as_logits", "no_labels", "sparse_class", "sparse_and_dropped"),
    *("bad_but_not_kept", "log_probabilities_with_a_removed_class", "twin", "masked"),
)


@pytest.mark.parametrize("name", OTHER_MISTAKES)
def test_a_mistake_of_another_loss_is_found(name: str):
    loss, args, options, expected = OTHER_MISTAKES[name]
    assert summary(diagnose(*args, loss=loss, **options)) == expected
    if name in CHECKED:
        says = [str(f) for f in diagnose(*args, loss=loss, **options) if "that are negative:" not in str(f)]
        assert checked_error(loss, args, options) == says[0]


@pytest.mark.parametrize("name", OTHERS_FINE)
def test_valid_inputs_of_other_losses_have_no_finding(name: str):
    loss, args, options = OTHERS_FINE[name]
    assert diagnose(*args, loss=loss, **options) == []
    if name in CHECKED:
        assert checked_error(loss, args, options) is None


def checked_error(loss: Any, args: tuple[Any, ...], options: Options) -> str | None:
    static = {k: v for k, v in options.items() if k == "axis"}
    traced = {k: v for k, v in options.items() if k != "axis"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "kl_div: reduction='mean'", UserWarning)
        program = checkify.checkify(jax.jit(lambda args, traced: checked(loss)(*args, **traced, **static)))
        message = program(args, traced)[0].get()
    return None if message is None else message.split(" (`check` failed)")[0]


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
