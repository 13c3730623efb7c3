"""The benchmarks run, refuse to time what disagrees, and tell a change from noise."""

import copy
import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import cases, harness, limits, report

EFFORT = harness.Effort(rounds=3, seconds=0.0, most_seconds=1.0, sample_seconds=1e-4, compiles=1)
SMALL = (cases.Case("dense", 33, 10, "value"), cases.Case("dense", 7, 40000, "value and gradient"))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "record.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "cases", lambda suite, quick: list(SMALL))
        patch.setattr(command, "QUICK", EFFORT)
        patch.setattr(limits, "COPY_BYTES", 2**16)
        patch.setattr(limits, "PRODUCT_SIZES", ((64, 64, 64),))
        command.main(["--suite", "dense", "--quick", "--json", str(path)])
    return json.loads(path.read_text())


def test_record_holds_every_sample_and_where_it_was_taken(record):
    assert [case["name"] for case in record["cases"]] == [case.name for case in SMALL]
    assert record["versions"].keys() >= {"jaxent", "jax", "optax"}
    assert record["machine"]["cores"] >= 1
    for case in record["cases"]:
        names = [row["contender"] for row in case["rows"]]
        assert names[0] == "jaxent"
        assert any(name.startswith("optax") for name in names)
        for row in case["rows"]:
            assert len(row["samples_ms"]) == 3
            assert row["smallest_ms"] <= row["median_ms"] == np.median(row["samples_ms"])


def test_table_has_a_line_for_each_contender(record):
    for case in record["cases"]:
        lines = report.table(case).splitlines()
        assert len({len(line) for line in lines[1:]}) == 1
        assert len(lines) == 2 + len(case["rows"])


def test_disagreement_is_refused_before_any_time_is_taken():
    def contender(name, *arrays):
        def call():
            raise AssertionError("timed")

        return harness.Contender(name, call, lambda: [np.asarray(a) for a in arrays])

    ours = contender("ours", 1.0, [1.0, 2.0])
    tolerance = {"value": 1e-5, "gradient": 1e-4}
    harness.check_agreement([ours, contender("same", 1.0 + 1e-6, [1.0, 2.0])], tolerance)
    for bad in ((1.001, [1.0, 2.0]), (1.0, [1.0, 2.01]), (1.0, [1.0, np.nan]), (1.0,)):
        with pytest.raises(AssertionError, match="bad"):
            harness.check_agreement([ours, contender("bad", *bad)], tolerance)


def test_compiled_measures_what_it_compiles():
    x = jnp.ones((64, 64))
    contender = harness.compiled("double", lambda x: 2 * x, x, effort=EFFORT)
    assert contender.results is not None
    np.testing.assert_array_equal(contender.results()[0], 2 * np.ones((64, 64)))
    assert contender.compile_seconds is not None
    assert contender.compile_seconds > 0


def test_contenders_take_turns():
    order = []

    def contender(name):
        def call():
            order.append(name)
            time.sleep(1e-3)

        return harness.Contender(name, call)

    samples = harness.measure([contender("a"), contender("b")], EFFORT)
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3}
    rounds = order[-12:]  # an untimed and a timed call of each, three times
    assert rounds == [*"aabb", *"bbaa", *"aabb"]


@pytest.mark.parametrize(("factor", "changed"), [(1.0, 0), (1.03, 0), (1.5, 1), (0.5, 1)])
def test_compare_reports_changes_beyond_the_noise(record, factor, changed):
    noise = np.random.default_rng(0)
    before = copy.deepcopy(record)
    for case in before["cases"]:
        for row in case["rows"]:
            row["samples_ms"] = list(100 + noise.standard_normal(15))
    after = copy.deepcopy(before)
    row = after["cases"][0]["rows"][0]
    row["samples_ms"] = [factor * s for s in row["samples_ms"]]
    text = report.compare(before, after)
    total = sum(len(case["rows"]) for case in record["cases"])
    assert f"{changed} of {total} rows changed beyond the noise" in text
    if changed:
        assert f"{factor - 1:+.0%}  {SMALL[0].name}: jaxent" in text


def test_limits_bind_where_they_should():
    device = limits.Limits(copy_bytes_per_second=1e10, product_flops_per_second={"float32": 1e11})
    dense = cases.Case("dense", 1000, 1000, "value and gradient")
    linear = cases.Case("linear", 1000, 1000, "value and gradient", hidden=100)
    assert device.binding(dense) == "bytes moved"
    assert device.seconds(dense) == pytest.approx(2 * 4e6 / 1e10)
    assert device.binding(linear) == "matrix products"
    assert device.seconds(linear) == pytest.approx(3 * 2 * 1e8 / 1e11)
