"""`diagnose` and `checked` of binary losses, log-probabilities, PyTorch's losses, measures and sparse targets."""

import functools
import warnings
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from diagnosed import CLEAN, INF, LABELS, NAN, SOFT, SOFTMAX, Options, changed, summary
from jax.experimental import checkify

import jaxent
import jaxent.torch_compat as nn
from jaxent import checked, diagnose, nll_loss, softmax_cross_entropy

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
    "no_room_of_another_order": (
        functools.partial(jaxent.renyi_divergence, order=2),
        (PAIR[0], np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], np.float32)),
        {"where": np.array([[True], [True]])},
        [("infinite_measure", 1, 2, (0,))],
    ),
    "infinite": (jaxent.entropy, (np.array([INF, 1.0]),), {}, [("negative_probabilities", 1, 1, ())]),
    "forecasts": (
        jaxent.brier_score,
        (1.5 * SOFT, np.array([-100, 4, 1, 2])),
        {"where": np.array([True, True, False, True]), "weights": np.array([1.0, 1.0, 1.0, -1.0])},
        [("not_normalized", 2, 2, (1,)), ("labels_out_of_range", 1, 2, (1,)), ("bad_weights", 1, 2, (3,))],
    ),
    "forecast_counts": (jaxent.brier_score, (3 * FLAGS, SOFT[:2]), {}, [("labels_as_probabilities", 2, 2, (0,))]),
    "outcomes": (jaxent.brier_score, (SOFT, -SOFT), {}, [("negative_targets", 4, 4, (0,))]),
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
    "no_rows": (jaxent.entropy, (PAIR[:0],), {}),
    "no_forecasts": (jaxent.brier_score, (PAIR[:0], np.zeros(0, int)), {}),
    "forecast_not_kept": (jaxent.brier_score, (changed(SOFT, {0: NAN}), changed(LABELS, {0: -100})), {}),
    "never_infinite": (jaxent.jensen_shannon_divergence, (PAIR, np.eye(3, dtype=np.float32)[:2]), {}),
    "logits": (jaxent.cross_entropy_with_logits, (np.log(PAIR), CLEAN[:2]), {}),
}


# Of each rule one, as a program too.
CHECKED = (
    *("missing", "logits_for_bce", "logits_for_nll", "twin_axis", "second_operand", "no_room", "axis_0"),
    *("masked_classes", "probabilities_as_logits", "no_labels", "sparse_class", "sparse_and_dropped"),
    *("forecasts", "forecast_not_kept", "no_rows", "no_forecasts"),
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


def test_operands_of_a_measure_broadcast():
    with pytest.raises(
        ValueError, match=r"diagnose: `q` must broadcast against `p`, float32\[2,3\], got float32\[2,2\]"
    ):
        diagnose(PAIR, TABLE, loss=jaxent.kl_divergence)
