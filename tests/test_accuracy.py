"""The accuracy suite: what is due is the definition, what is amiss is seen, and the page has its record."""

import json
import re

import mpmath
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import accuracy, accuracy_cases, accuracy_report, pictures

CASES = {case.name: case for case in accuracy_cases.cases()}


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e-3, 1.0, 1e3])
def test_expected_values_are_the_definition(size):
    case = accuracy_cases.sized(size)
    with mpmath.workdps(60):
        z = [mpmath.mpf(float(x)) for x in case.logits[0]]
        v = [mpmath.mpf(float(x)) for x in case.tangent[0]]
        total = mpmath.fsum(mpmath.exp(x) for x in z)
        p = [mpmath.exp(x) / total for x in z]
        step = mpmath.fsum(a * b for a, b in zip(p, v, strict=True))
        expected = {
            "value": [-mpmath.log(p[0])],
            "gradient": [p[0] - 1, *p[1:]],
            "curvature": [a * (b - step) for a, b in zip(p, v, strict=True)],
        }
    due = case.due()
    assert float(expected["value"][0]) == pytest.approx(size, rel=1)
    for quantity in accuracy_cases.QUANTITIES:
        numbers = expected[quantity]
        np.testing.assert_allclose(np.ravel(due[quantity][0]).astype(float), [float(x) for x in numbers], rtol=1e-14)


def test_edges_are_as_documented():
    for name in ("a row of nan that `where` drops", "a row of nan that is ignored"):
        value, gradient = (CASES[name].due()[q][0] for q in ("value", "gradient"))
        assert np.isfinite(value)
        assert not gradient[2].any()
    for name in ("label 300 of 4 classes", "a logit of +inf", "the label at +inf", "a logit of nan", "a row of -inf"):
        value, gradient = (CASES[name].due()[q][0] for q in ("value", "gradient"))
        assert np.isnan(value)
        assert np.isnan(gradient[2]).all()
        assert np.isfinite(gradient[:2]).all()
    value, gradient = (CASES["the label at -inf"].due()[q][0] for q in ("value", "gradient"))
    assert value == np.inf
    assert gradient[2, 3] == -1


def test_what_is_amiss_is_seen():
    def verdict(got, due, size=0.0):
        return accuracy.score(np.array(got), np.array(due, accuracy_cases.WIDE), np.array(size))["verdict"]

    inf, nan = np.inf, np.nan
    assert [verdict(*x) for x in ((1.0, 1.0), (nan, nan), (inf, inf), (0.6, 1.0), (0.0, 0.0))] == ["right"] * 5
    assert [verdict(*x) for x in ((0.0, 1e-30), (1.0, nan), (1.0, inf), (-inf, inf), (1e-3, 0.0))] == ["wrong"] * 5
    assert verdict(1e-9, 0.0, 1.0) == "right"  # terms of size 1 cancel
    assert verdict([nan, 1.0], [1.0, 1.0]) == "nan"
    assert accuracy.score(ValueError("no"), np.zeros(()), np.zeros(()))["verdict"] == "raises"
    ulp = accuracy.score(np.array([1, 1 + 2**-22], np.float32), np.ones(2, accuracy_cases.WIDE), np.zeros(2))["ulp"]
    assert ulp == [0, 2]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    chosen = [CASES[name] for name in ("plain", "a row of nan that `where` drops", "label 300 of 4 classes")]
    chosen.append(accuracy_cases.sized(1e-9))
    path = tmp_path_factory.mktemp("repository") / "benchmarks" / "record.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "cases", lambda: iter(chosen))
        patch.setattr(accuracy, "PEERS", accuracy.PEERS[:3])
        command.main(["--suite", "accuracy", "--json", str(path)])
    return path


def test_the_suite_tells_exact_from_rounded(record):
    read = json.loads(record.read_text())
    ours, from_hidden, optax = (read["scores"][name] for name in ("jaxent", "jaxent, from hidden", "optax"))
    for scores in (ours, from_hidden):
        assert scores["results"] == 9
        assert set(scores["down_to"].values()) == {1e-36}
        assert (scores["nan"], scores["wrong"], scores["raises"]) == (0, 0, 0)
        assert max(scores[q]["largest"] for q in accuracy_cases.QUANTITIES) < 32
    assert optax["down_to"]["value"] is None
    assert max(read["sizes"]["optax"]["value"]) > 1e6
    assert optax["nan"] > 0  # nan in a row that is masked after its loss reaches the gradient
    assert any(line.startswith("label 300") for line in read["amiss"]["optax"])


def test_the_pages_are_written_from_their_record(record):
    repository = record.parents[1]
    (repository / accuracy_report.CHART).parent.mkdir(parents=True)
    for page in accuracy_report.PAGES:
        (repository / page).write_text("before\n<!-- accuracy: none -->\n<!-- accuracy ends -->\nafter\n")
    command.accuracy_report.update(repository, record)
    for page in accuracy_report.PAGES:
        text = (repository / page).read_text()
        assert text.startswith("before\n<!-- accuracy: benchmarks/record.json -->\n")
        assert_belongs_to_its_record(text, repository, page)
    assert "| jaxent | 0 of 9 | " in (repository / accuracy_report.README).read_text()


def assert_belongs_to_its_record(text, repository, page):
    (match,) = accuracy_report.SECTION.finditer(text)
    record = repository / match[1]
    assert match[0] == accuracy_report.section(repository, record, page)
    (chart,) = re.findall(r"^!\[.*\]\((.*)\)$", match[0], flags=re.MULTILINE)
    assert f"Source\0{pictures.source(record)}".encode() in (repository / page.parent / chart).read_bytes()


@pytest.mark.parametrize("page", accuracy_report.PAGES)
def test_the_scoreboard_in_the_documentation_is_that_of_its_record(page):
    text = (command.REPOSITORY / page).read_text(encoding="utf-8")
    if any(command.RESULTS.glob("*-accuracy.json")):
        assert_belongs_to_its_record(text, command.REPOSITORY, page)
    else:
        assert [match[1] for match in accuracy_report.SECTION.finditer(text)] == ["none"]
