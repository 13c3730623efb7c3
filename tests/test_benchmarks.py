"""The benchmarks run, refuse to time what disagrees, tell change from noise; the page on speed has its record."""

import copy
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import __main__ as command
from benchmarks import cases, collectives, harness, limits, pictures, readme, report
from benchmarks.compare import compare
from benchmarks.inputs import Inputs

EFFORT = harness.Effort(rounds=3, seconds=0.0, most_seconds=1.0, sample_seconds=1e-4, compiles=1)
SMALL = (
    cases.Case("dense", 33, 10, "value"),
    cases.Case("dense", 7, 40000, cases.GRADIENT, donated=True),
    cases.Case("linear", 16, 64, cases.GRADIENT, 8, use="RL", kept=0.5),
    cases.Case("linear", 16, 64, cases.GRADIENT, 8, sweep="rows"),
    cases.Case("linear", 32, 64, cases.GRADIENT, 8, sweep="rows"),
    cases.Case("linear", 16, 128, cases.GRADIENT, 8, sweep="classes"),
    cases.Case("linear", 16, 256, cases.GRADIENT, 8, sweep="classes"),
    cases.Case("curvature", 16, 40, "Hessian product", 8),
    cases.Case("curvature", 16, 40, "Gauss-Newton product", 8),
    cases.Case("curvature", 16, 40, "gradient norms", 8),
    cases.Case("sharded", 16, 64, cases.GRADIENT, 8, mesh=(2, 4)),
)


def record_of(some, path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "SUITES", ("all",))
        patch.setattr(command, "cases", lambda suite, quick, at_hand: list(some))
        patch.setattr(command, "QUICK", EFFORT)
        patch.setattr(limits, "COPY_BYTES", {"cpu": 2**16})
        patch.setattr(limits, "PRODUCT_SIZES", {"cpu": ((64, 64, 64),)})
        command.main(["--quick", "--json", str(path)])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return record_of(SMALL, tmp_path_factory.mktemp("record") / "record.json")


def test_the_record_of_one_case(tmp_path):
    assert_complete(record_of(SMALL[:1], tmp_path / "record.json"), SMALL[:1])


def assert_complete(record, some):
    """Every sample, and where it was taken."""
    assert [case["name"] for case in record["cases"]] == [case.name for case in some]
    assert record["versions"].keys() >= {"jaxent", "jax", "optax"}
    assert record["machine"]["cores"] >= 1
    for case in record["cases"]:
        names = [row["contender"] for row in case["rows"]]
        assert names[0].startswith("jaxent")
        assert any(name.startswith("optax") for name in names)
        assert not [name for name in case["left_out"] if name.startswith("optax")]
        for row in case["rows"]:
            assert len(row["samples_ms"]) == 3
            assert row["smallest_ms"] <= row["median_ms"] == np.median(row["samples_ms"])
            assert row["percent_of_limit"] is None or 0 < row["percent_of_limit"] <= 100


@pytest.mark.grid
def test_the_record_of_every_kind_of_case(record):
    assert_complete(record, SMALL)


@pytest.mark.grid
def test_table_has_a_line_for_each_contender(record):
    for case in record["cases"]:
        lines = report.table(case | {"left_out": {}}).splitlines()
        assert len({len(line) for line in lines[1:]}) == 1
        assert len(lines) == 2 + len(case["rows"])


def test_disagreement_is_refused_before_any_time_is_taken():
    def contender(name, *arrays):
        def call():
            raise AssertionError("timed")

        return harness.Contender(name, call, lambda: [np.asarray(a) for a in arrays])

    ours = contender("ours", 1.0, [1.0, 2.0])
    same = [contender(name, 1.0 + 1e-6, [1.0, 2.0]) for name in ("same", "too")]
    tolerance = {"value": 1e-5, "gradient": 1e-4}
    for bad in ((1.001, [1.0, 2.0]), (1.0, [1.0, 2.01]), (1.0, [1.0, np.nan]), (1.0,)):
        kept, refused = harness.agreeing([ours, same[0], contender("bad", *bad), same[1]], tolerance)
        assert [c.name for c in kept] == ["ours", "same", "too"]
        assert list(refused) == ["bad"]
        with pytest.raises(AssertionError, match="ours disagrees"):
            harness.agreeing([ours, contender("bad", *bad)], tolerance)


def test_contenders_that_run_out_of_memory_are_named_and_not_timed():
    def results():
        raise MemoryError("4 GiB\nand a trace")

    ours = harness.Contender("ours", lambda: None, lambda: [np.ones(())])
    kept, refused = harness.agreeing([ours, harness.Contender("large", lambda: None, results)], {"value": 1e-5})
    assert kept == [ours]
    assert refused == {"large": "MemoryError: 4 GiB"}


def test_compiled_measures_what_it_compiles():
    x = jnp.ones((64, 64))
    contender = harness.compiled("double", lambda x: 2 * x, x, effort=EFFORT)
    assert contender.results is not None
    np.testing.assert_array_equal(contender.results()[0], 2 * np.ones((64, 64)))
    assert len(contender.compile_seconds) == EFFORT.compiles
    assert min(contender.compile_seconds) > 0
    assert contender.result_bytes == x.nbytes


def test_a_donated_input_takes_the_result():
    x = jnp.ones((64, 64))
    contender = harness.compiled("double", lambda x: (x[0, 0], 2 * x), x, effort=EFFORT, donate=True)
    assert contender.results is not None
    assert contender.result_bytes is not None
    assert contender.result_bytes < x.nbytes
    contender.call()
    contender.call()  # on the first call's result
    np.testing.assert_array_equal(contender.results()[1], 2 * np.ones((64, 64)))


def test_contenders_take_turns(monkeypatch):
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

    order.clear()
    monkeypatch.setattr(harness, "RELAX_BELOW_SECONDS", 1e-4)
    samples = harness.measure([contender("a"), contender("b")], EFFORT)
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3}
    assert order == [*"ab", *"ba", *"ab"]  # long calls: no untimed ones


@pytest.mark.grid
def test_compare_reports_changes_beyond_the_noise(record):
    noise = np.random.default_rng(0)
    before = copy.deepcopy(record)
    for case in before["cases"]:
        for row in case["rows"]:
            row["samples_ms"] = list(100 + noise.standard_normal(15))
    total = sum(len(case["rows"]) for case in record["cases"])
    for factor, changed in ((1.0, 0), (1.03, 0), (1.5, 1), (0.5, 1)):
        after = copy.deepcopy(before)
        row = after["cases"][0]["rows"][0]
        row["samples_ms"] = [factor * s for s in row["samples_ms"]]
        text = compare(before, after)
        assert f"{changed} of {total} rows changed beyond the noise" in text, factor
        if changed:
            assert f"{factor - 1:+.0%}  {SMALL[0].name}: jaxent" in text


def test_limits_bind_where_they_should():
    device = limits.Limits(1e10, 4e10, {"float32": 1e11})
    dense = cases.Case("dense", 1000, 1000, "value and gradient")
    linear = cases.Case("linear", 1000, 1000, "value and gradient", hidden=100)
    assert device.binding(dense) == "bytes moved"
    assert device.seconds(dense) == pytest.approx(2 * 4e6 / 1e10)
    assert device.binding(linear) == "matrix products"
    assert device.seconds(linear) == pytest.approx(3 * 2 * 1e8 / 1e11)
    alone = harness.Contender("alone", lambda: None)
    products = device.at_own_shapes("float32", limits.Bound(((alone,),), flops=linear.flops()), 2e-3)
    assert products.seconds(linear) == pytest.approx(2e-3)
    for bytes_moved, rate in ((dense.bytes_moved(), dense.bytes_moved() / 1e-4), (dense.bytes_moved() // 10**4, 1e10)):
        copied = device.at_own_shapes("float32", limits.Bound(((alone,),), bytes=bytes_moved), 1e-4)
        assert copied.copy_bytes_per_second == pytest.approx(rate)
    for case in (dense, linear):  # whoever is faster than the limit raises it
        limit = device.seconds(case)
        assert device.reached(case, limit / 2).seconds(case) == pytest.approx(limit / 2)
        assert device.reached(case, limit * 2).seconds(case) == pytest.approx(limit)


def test_the_products_alone_are_each_at_the_fastest_that_anyone_has():
    case = cases.Case("linear", 16, 64, cases.GRADIENT, 8)
    alone = limits.bound(case, Inputs(case), EFFORT)
    for group in alone.groups:
        assert len(group) >= 2
    names = [contender.name for contender in alone.contenders]
    assert len(set(names)) == len(names)
    best = dict.fromkeys(names, 3.0) | {"logits, h turned": 1.0, "by kernel, h' z": 0.5}
    assert alone.seconds(best) == 4.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_of_a_product_is_the_same_product(dtype):
    case = cases.Case("linear", 16, 64, cases.GRADIENT, 8, dtype)
    hidden, kernel, _ = Inputs(case).arrays
    logits = (hidden @ kernel).astype(dtype)
    for forms in limits.PRODUCTS_ALONE.values():
        first, *others = (np.asarray(form(hidden, kernel, logits), np.float32) for form in forms.values())
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-5, atol=1e-5)


def test_collectives_are_counted_with_their_loops():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def sums(x):
        return jax.lax.scan(lambda carry, row: (carry + jnp.sum(jnp.sin(row * carry)), None), 0.0, x)[0]

    x = jax.device_put(jnp.ones((5, 64)), NamedSharding(mesh, P(None, "x")))
    found = collectives.collectives(jax.jit(sums).lower(x).compile().as_text() or "")
    assert [(c.kind, c.shape, c.times, c.devices) for c in found] == [("all-reduce", (), 5, 8)]
    assert sum(c.sent for c in found) == pytest.approx(5 * 4 * 2 * 7 / 8)


@pytest.mark.grid
def test_meshes_report_what_they_send(record):
    rows = next(case["rows"] for case in record["cases"] if case["case"]["suite"] == "sharded")
    sent = {row["peer"]: row["sent_mib"] for row in rows}
    assert sent["jaxent, one device"] is None
    least = (
        4 * 2 * (16 // 2 * 8) * 3 / 4 / 2**20
    )  # the gradient with respect to hidden, added over four devices of the classes
    for kind in ("automatic", "explicit", "shard_map"):
        assert sent[f"jaxent, {kind}"] >= least


@pytest.mark.grid
def test_growth_is_the_exponent(record):
    grown = copy.deepcopy(record)
    for case in report.sweep(grown, "rows"):
        for row in case["rows"]:
            row["median_ms"], row["temp_mib"] = case["case"]["rows"] ** 1.5, 3.0
    lines = report.growth(grown).splitlines()
    assert lines[1].startswith("jaxent, N = 16 32 ")
    assert lines[1].split()[-2:] == ["N^1.50", "N^0.00"]


def test_what_plan_says_is_compared_with_what_was_measured():
    found = (("a", 3.0, 4.0), ("b", 5.0, 4.0), ("c", None, 1.0), ("d", 4.0, 4.0))
    read = {"cases": [{"name": n, "planned_ms": p, "rows": [{"median_ms": m}]} for n, p, m in found]}
    assert report.planned(read) == "`plan` by measured time: median 1.00, least 0.75 (a), most 1.25 (b)"
    assert report.planned({"cases": read["cases"][2:3]}) == ""
    linear = cases.Case("linear", 64, 128, cases.GRADIENT, 32, use="RL", kept=0.5)
    planned = command.planned_ms(linear, limits.Limits(1e9, 1e10, {"float32": 1e9}))
    work, passes = 6 * 32 * 32 * 128 / 1e9, 12 * 32 * 128 / 1e10
    assert planned == pytest.approx(1e3 * (work + passes), rel=1e-3)
    assert command.planned_ms(cases.Case("dense", 64, 128, "value"), limits.Limits(1e9, 1e10, {})) is None


def test_rows_that_do_not_count_are_those_that_a_case_says():
    case = cases.Case("linear", 40, 16, cases.GRADIENT, 4, use="fine-tuning", kept=0.3)
    labels = case.data()[2]
    assert np.sum(labels != cases.IGNORED) == case.rows_kept == 12
    assert case.flops() == 6 * 12 * 4 * 16
    assert "30% of the rows kept (fine-tuning)" in case.name


@pytest.mark.grid
def test_findings_name_who_is_faster(record):
    changed = copy.deepcopy(record)
    for case in changed["cases"]:
        for row in case["rows"]:
            row["ratio"] = row["ratio_of_smallest"] = 1.0
    changed["cases"][0]["rows"][1]["ratio"] = changed["cases"][0]["rows"][1]["ratio_of_smallest"] = 1.25
    text = report.findings(changed)
    assert re.search(rf"1\.25 x \S.*: {re.escape(SMALL[0].name)}", text)
    assert text.count(" x ") == 1
    assert "compile time by optax's, dense" in text


@pytest.mark.grid
def test_pictures_are_drawn_from_what_there_is(record, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    drawn = pictures.draw(record, path)
    assert [path.name for path in drawn] == ["record-vocabulary.png", "record-rows.png", "record-limit.png"]
    assert all(path.stat().st_size > 10000 for path in drawn)
    without = record | {"cases": [case for case in record["cases"] if case["case"]["sweep"] != "rows"]}
    assert [path.name for path in pictures.draw(without, path)] == ["record-vocabulary.png", "record-limit.png"]


def test_heads_are_scaled_to_the_memory():
    def heads(gib):
        at_hand = cases.Resources("cpu", 1, 2, gib * 2**30)
        return {case.head: case.rows for case in cases.cases("linear", False, at_hand) if case.head}

    assert heads(64).keys() == cases.HEADS.keys()
    assert all(rows >= cases.LEAST_HEAD_ROWS for rows in heads(64).values())
    assert heads(5).keys() == {"GPT-2", "Qwen2.5-0.5B"}


def assert_belongs_to_its_record(text, repository):
    """The section of the page between the marks, and the chart that it shows."""
    (match,) = readme.SECTION.finditer(text)
    record = repository / match[1]
    assert match[0] == readme.section(repository, record)
    (chart,) = re.findall(r"^!\[.*\]\((.*)\)$", match[0], flags=re.MULTILINE)
    assert f"Source\0{pictures.source(record)}".encode() in (repository / readme.PAGE.parent / chart).read_bytes()


@pytest.mark.grid
def test_the_page_is_written_from_the_record(record, tmp_path):
    path = tmp_path / "benchmarks" / "record.json"
    path.parent.mkdir()
    changed = copy.deepcopy(record)
    for case in changed["cases"]:
        case["case"]["donated"] = False
    path.write_text(json.dumps(changed))
    (tmp_path / readme.CHART).parent.mkdir(parents=True)
    (tmp_path / readme.PAGE).write_text("before\n<!-- speed: none -->\n<!-- speed ends -->\nafter\n")
    readme.update(tmp_path, path)
    text = (tmp_path / readme.PAGE).read_text()
    assert text.startswith("before\n<!-- speed: benchmarks/record.json -->\n")
    assert text.endswith("<!-- speed ends -->\nafter\n")
    ours = changed["cases"][1]["rows"][0]
    assert f"| 7, -, 40000 | {report.number(ours['median_ms'])} | {ours['percent_of_limit']:.0f}% |" in text
    assert_belongs_to_its_record(text, tmp_path)

    changed["date"] = "1999-12-31"
    path.write_text(json.dumps(changed))  # another record: neither table nor chart is its own
    with pytest.raises(AssertionError):
        assert_belongs_to_its_record(text, tmp_path)
    with pytest.raises(AssertionError):
        assert_belongs_to_its_record(readme.SECTION.sub(lambda _: readme.section(tmp_path, path), text), tmp_path)
    readme.update(tmp_path, path)
    assert_belongs_to_its_record((tmp_path / readme.PAGE).read_text(), tmp_path)


def test_the_speed_in_the_documentation_is_that_of_its_record():
    text = (command.REPOSITORY / readme.PAGE).read_text(encoding="utf-8")
    if any(command.RESULTS.glob("*.json")):
        assert_belongs_to_its_record(text, command.REPOSITORY)
    else:
        assert [match[1] for match in readme.SECTION.finditer(text)] == ["none"]
