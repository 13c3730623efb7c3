"""The suite `compiled`: what it says where no compiler is installed, and that README and record belong together."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import __main__ as command
from benchmarks import compiled, compiled_report, compiled_run, compilers, optimized
from benchmarks.cases import HEADS
from benchmarks.compiled_programs import MODES, Program


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(compilers, "PACKAGES", {"cuda": "no-such-package", "tpu": "no-such-package"})
    path = tmp_path / "record.json"
    compiled_run.run(["h100", "v5e"], True, path)
    printed = capsys.readouterr().out
    for extra in ("cuda12-local", "tpu"):
        assert f'python -m pip install "jax[{extra}]=={jax.__version__}"' in printed
    record = json.loads(path.read_text())
    assert record["absent"].keys() == {"cuda", "tpu"}
    assert record["programs"] == []


def test_every_function_of_every_head_is_asked_for():
    targets = ("v5e", "h100")
    found = [compiled_report.key(p.record) for p in compiled_run.programs(targets, quick=False)]
    assert set(found) >= set(itertools.product(targets, HEADS, MODES, ("bfloat16", "mixed"), ("jaxent", "dense")))
    assert len(found) == len(set(found))
    # Of the main head's step first, for compilers that take seconds before those that take minutes.
    assert [key[:3] for key in found[:6]] == [("h100", "Llama-3 8B", "value and gradient")] * 5 + [
        ("v5e", "Llama-3 8B", "value and gradient")
    ]
    assert {p.mode for p in compiled_run.programs(targets, quick=True)} == {"value and gradient"}


def test_a_run_adds_to_a_record_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    measured = []

    def measure(program: Program) -> dict[str, Any]:
        measured.append(program)
        return program.record | {"failed": "not compiled"}

    monkeypatch.setattr(compiled_run, "measure", measure)
    monkeypatch.setattr(compilers, "PACKAGES", {"cuda": "optax", "tpu": "optax"})
    path = tmp_path / "record.json"
    compiled_run.run(["h100"], True, path)
    first = len(measured)
    record = compiled_run.run(["h100", "v6e"], True, path)
    assert {program.target for program in measured[first:]} == {"v6e"}
    assert [row["target"] for row in record["programs"]] == [program.target for program in measured]
    assert list(record["devices"]) == ["h100", "v6e"]
    assert all(row["commit"] == record["commit"] for row in record["programs"])
    path.write_text(json.dumps(record | {"programs": record["programs"][1:]}))
    assert compiled_run.run(["h100", "v6e"], True, path)["programs"] == record["programs"]
    monkeypatch.setattr(compiled_report, "version", lambda name: "0")
    with pytest.raises(ValueError, match="other versions of jaxent, jax, jaxlib"):
        compiled_run.run(["h100"], True, path)


@pytest.mark.parametrize("author", ["jaxent", "dense", "dense in float32"])
@pytest.mark.parametrize("mode", MODES)
def test_programs_can_be_traced(mode: Any, author: Any):
    program = Program("GPT-2", mode, author=author, rows=64, chunk_rows=16)
    traced = jax.eval_shape(program.function(), *program.arguments(jax.devices()[0]))
    assert jax.tree.leaves(traced)
    assert program.num_chunks == (4 if author == "jaxent" else 1)


ALLOCATIONS = """BufferAssignment:
allocation 0: size 512, thread-local:
allocation 1: size 1000, parameter 1, shape |bf16[20,25]| at ShapeIndex {}:
allocation 2: size 300, maybe-live-out:
 value: <500 fusion{1} @0> (size=64,offset=0): f32[16]
allocation 3: size 9, color 6, preallocated-temp:
allocation 4: size 70, preallocated-temp:
allocation 5: size 8, color 1, preallocated-temp:
"""


def test_the_memory_of_an_optimised_program_is_that_of_its_allocations():
    assert optimized.main_memory(ALLOCATIONS) == 1370
    assert optimized.main_memory(ALLOCATIONS, "preallocated-temp") == 70


def test_a_program_that_a_compiler_refuses_has_its_reason(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> Any:
        raise optimized.RefusedError("Used 23.48G of 16.00G hbm")

    monkeypatch.setattr(optimized, "optimized", refuse)
    row = compiled.measure(Program("GPT-2", "value", author="dense", target="v5e"))
    assert row["failed"] == "needs 23.48G of 16.00G"


def test_the_command_line_knows_the_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = []
    monkeypatch.setattr(compiled_run, "run", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(command.jax.config, "update", lambda *_: None)
    command.main(["--suite", "compiled", "--device", "v5e", "--device", "h100", "--json", str(tmp_path / "r.json")])
    command.main(["--suite", "compiled", "--quick"])
    assert asked[0] == (["v5e", "h100"], False, tmp_path / "r.json")
    assert asked[1][:2] == (compilers.DEFAULT_TARGETS, True)


def test_the_tables_are_those_of_the_record():
    readme = (command.REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    found = compiled_report.SECTION.search(readme)
    assert found is not None
    assert found[0] == compiled_report.section(command.REPOSITORY, command.REPOSITORY / found[1])


def test_the_record_holds_what_the_formula_says():
    """Numbers that each chip of a pod sends, and temporaries as `plan` gives them."""
    found = compiled_report.SECTION.search(
        (command.REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    )
    assert found is not None
    record = json.loads((command.REPOSITORY / found[1]).read_text())
    assert len(record["scale"]) == 3
    for row in record["scale"]:
        assert row["sent"] == row["formula"]
        assert row["plan_mib"] == pytest.approx(row["temp_mib"], rel=0.05)
    for row in record["programs"]:
        if row.get("plan_mib") is not None:
            assert row["plan_mib"] == pytest.approx(row["temp_mib"], rel=0.05)


def test_the_record_is_whole():
    """Every program that the suite asks for, in its order; compilers refuse none of the library's own."""
    readme = (command.REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    found = compiled_report.SECTION.search(readme)
    assert found is not None
    rows = json.loads((command.REPOSITORY / found[1]).read_text())["programs"]
    asked = [compiled_report.key(p.record) for p in compiled_run.programs(compilers.DEFAULT_TARGETS, quick=False)]
    assert [compiled_report.key(row) for row in rows] == asked
    refused = [row for row in rows if "failed" in row]
    assert {row["author"] for row in refused} <= {"dense", "dense in float32"}
    said = f"{len(rows)} programs; {len(refused)} of dense code need more memory than there is"
    assert said in " ".join(readme.split())
