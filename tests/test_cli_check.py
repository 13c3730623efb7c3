"""`jaxent check`: code 0 and a table when all is well, code 1 and the place if not, one line for bad arguments."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxent.cli import main
from jaxent.cli.check import cases, curvature_references, references, second_order
from jaxent.cli.check import plot as gap_plot
from jaxent.cli.check import run as check
from jaxent.cli.check.compiler import RowSums, measure_row_sums
from jaxent.cli.check.run import Products, surviving_bits

FAST = ["check", "nll_loss", "--dtype", "float32"]


def test_a_table_and_code_zero(capsys: pytest.CaptureFixture[str]):
    assert main([*FAST, "--dtype", "float64"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("cpu: ")
    assert lines[1].startswith("float32 products run in float32 here: 23 of 23 bits survive")
    assert lines[4].split()[:3] == ["loss", "dtype", "options"]
    assert [line.split()[:3] for line in lines[5:7]] == [["nll_loss", d, "3"] for d in ("float32", "float64")]
    assert all(line.endswith("agree") for line in lines[5:7])
    assert lines[-1] == "6 losses, options and dtypes: all in bounds"
    assert err == ""


@pytest.mark.grid
def test_json_and_quiet(capsys: pytest.CaptureFixture[str]):
    assert main([*FAST, "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["float32_product_bits"] == {"setting": None, "plain": 23, "linear_losses": 23}
    assert {c["way"] for c in found["comparisons"]} == {"value", "jax.grad", "jax.jvp", "central differences"}
    assert all(c["ulp"] <= c["allowed"] for c in found["comparisons"])
    assert main([*FAST, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def planted(kind: str) -> cases.Case:
    case = next(c for c in cases.cases() if c.loss == "nll_loss")
    if kind == "value":
        return dataclasses.replace(case, function=lambda z: case.function(z) * (1 + 1e-5))
    wrong = jax.custom_jvp(case.function)

    @wrong.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        value, tangent = jax.jvp(case.function, primals, tangents)
        return value, tangent * (1 + 1e-5)

    return dataclasses.replace(case, function=wrong)


@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_a_planted_error_is_found(kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check, "cases", lambda: [planted(kind)])
    assert main(FAST) == 1
    out = capsys.readouterr().out
    assert "OUT OF BOUNDS" in out
    assert f"nll_loss, plain, float32: {'value at loss' if kind == 'value' else 'jax.grad at args[0]['}" in out
    assert main([*FAST, "--quiet"]) == 1
    assert main([*FAST, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_curvature_norms_and_the_names_of_pytorch_are_there():
    names = {c.loss for c in cases.cases()}
    assert {
        "logit_hessian",
        "logit_hessian_product",
        "linear_ggn_vector_product",
        "linear_fisher_vector_product",
    } <= names
    assert {"linear_ggn_diagonal", "linear_gradient_norms", "token_statistics", "linear_token_statistics"} <= names
    assert {f"torch_compat.{name}" for name in ("cross_entropy", "nll_loss", "kl_div")} <= names
    measures = {c.loss for c in cases.cases() if c.option == "sum of rows"}
    assert measures <= {c.loss for c in cases.second_order_cases()}
    # Half precision leaves out what another case has with it.
    for loss in ("softmax_cross_entropy", "linear_softmax_cross_entropy"):
        half = {c.option for c in cases.cases() if c.loss == loss and "bfloat16" in c.dtypes}
        assert {"plain", "everything", "probabilities_everything"} <= half
        assert {"plain", "everything"} <= {c.option for c in cases.cases() if c.loss == loss and "float16" in c.dtypes}


CURVED = ["logit_hessian", "linear_fisher_vector_product", "linear_ggn_diagonal", "linear_gradient_norms"]


@pytest.mark.parametrize("loss", CURVED)
def test_an_error_in_curvature_is_found(loss: str):
    case = [c for c in cases.cases() if c.loss == loss][-1]
    products = Products(None, 23, 23)
    assert all(r.comparison.ok for r in check.run([case], ["float32"], products))
    if loss not in (CURVED[0], CURVED[2]):  # dense, streamed
        return
    off = dataclasses.replace(case, function=lambda *args: case.function(*args) + 1e-5 * jnp.sum(jnp.square(args[-1])))
    assert not all(r.comparison.ok for r in check.run([off], ["float32"], products))


def test_every_loss_is_there():
    names = {(c.loss, c.option) for c in cases.cases()}
    options = {option for loss, option in names if loss == "softmax_cross_entropy"}
    assert options <= {option for loss, option in names if loss == "linear_softmax_cross_entropy"} | {
        *("logits of -inf", "shift of 10000", "loss of 2e-9", "loss of 7e-38", "300 classes", "axis 0")
    }
    assert len(names) == len(list(cases.cases()))
    for module in (references, curvature_references):
        assert not {"jax", "jnp", "jaxent"} & set(vars(module))


@pytest.mark.grid
@pytest.mark.parametrize("option", ["everything", "probabilities_everything"])
def test_all_options_together(option: str):
    (case,) = (c for c in cases.cases() if (c.loss, c.option) == ("softmax_cross_entropy", option))
    products = Products(None, 23, 23)
    results = check.run([case], ["bfloat16", "float32"], products)
    assert [r.dtype for r in results[:: len(results) // 2]] == ["bfloat16", "float32"]
    assert all(r.comparison.ok for r in results), results
    # The oracle is no copy of the loss: without an option it is another number.
    plain = dataclasses.replace(case, function=lambda z: jnp.mean(jax.nn.logsumexp(z, axis=-1)), closed_form=None)
    assert not all(r.comparison.ok for r in check.run([plain], ["float32"], products))


@pytest.mark.slow
def test_everything_on_this_device(capsys: pytest.CaptureFixture[str]):
    assert main(["check"]) == 0
    assert "all in bounds" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# The precision of products


@pytest.mark.parametrize(("bits", "name"), [(23, "float32"), (16, "several bf16 passes"), (10, "TF32"), (7, "bf16")])
def test_the_bits_that_survive(bits: int, name: str):
    def rounded(x: jax.Array) -> jax.Array:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits)

    assert surviving_bits(lambda a, b: jnp.matmul(rounded(a), b, precision="highest")) == bits
    assert surviving_bits(lambda a, b: jnp.matmul(a, rounded(b), precision="highest")) == bits
    assert check.name_of(bits) == name


@pytest.mark.parametrize(
    ("products", "ok"),
    [
        (Products(None, 10, 23), True),
        (Products(None, 10, 10), False),
        (Products("tensorfloat32", 10, 10), True),
        (Products("highest", 10, 23), False),
        (Products("float32", 23, 23), True),
    ],
)
def test_products_with_fewer_bits_than_promised(products: Products, ok: bool):
    assert products.ok == ok
    assert products.sentences()[0].startswith(f"float32 products run in {check.name_of(products.plain)} here: ")
    assert ("OUT OF BOUNDS" in products.sentences()[-1]) != ok


# ----------------------------------------------------------------------------------------------------------------------
# The compiler


def test_row_sums_are_right_here():
    assert measure_row_sums().error < 1e-5
    assert measure_row_sums().sentences() == []


@pytest.mark.grid
@pytest.mark.parametrize("error", [3.06, float("inf")])
def test_wrong_row_sums_are_reported(error: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The losses may all be in bounds: the user's own code is not."""
    monkeypatch.setattr(check, "measure_row_sums", lambda: RowSums(error))
    assert main(FAST) == 1
    told = capsys.readouterr().out.splitlines()[-2:]
    assert f"is off by {error:.3g} here: the compiler of jax {jax.__version__} is at fault" in told[0]
    assert "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=" in told[1]
    assert "0.10.1" in told[1]
    assert main([*FAST, "--quiet"]) == 1
    assert capsys.readouterr().out == ""
    assert main([*FAST, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["compiler"]["ok"]) == (False, False)


def test_the_fault_is_recognised(monkeypatch: pytest.MonkeyPatch):
    """What jax 0.10.2 computes: the small operand where the broadcast one is due."""

    def jit(function: Any) -> Any:
        return lambda z, v: v - (z * z).sum(-1, keepdims=True)

    monkeypatch.setattr(jax, "jit", jit)
    assert measure_row_sums().error > 1
    assert not measure_row_sums().ok


def test_hessian_products_are_checked_where_xla_fuses_them():
    (case,) = (c for c in cases.second_order_cases() if (c.loss, c.option) == ("sigmoid_cross_entropy", "plain"))
    assert second_order.TANGENTS * case.args[0].size > 2**15
    assert all(c.ok for c in second_order.compare(case))

    def wrong(z: jax.Array) -> jax.Array:
        return case.function(z) + 1e-7 * jnp.sum(jnp.square(z)[0])

    (found,) = second_order.compare(dataclasses.replace(case, function=wrong))
    assert not found.ok
    assert found.index[0] == 0


# ----------------------------------------------------------------------------------------------------------------------
# The picture


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", "--plot", str(tmp_path / "gap.png")]) == 0
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == f"{tmp_path / 'gap.png'} written\n"


def test_what_the_picture_shows():
    found = gap_plot.curves()
    np.testing.assert_allclose(found["jaxent"], found["exact"], rtol=3e-7)
    assert found["exact"][-1] < 2e-38
    zeros = found["exact"][found["optax"] == 0]
    assert 1e-8 < zeros.max() < 1e-7


# ----------------------------------------------------------------------------------------------------------------------
# What the user can mend


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["softmax"], "jaxent: no loss is called softmax; there are softmax_cross_entropy, nll_loss, "),
        (["entropy", "--dtype", "float16"], "jaxent: none of these losses is checked in float16; float32 is always"),
        (["--plot", "{}/none/gap.png"], "jaxent: cannot write {}/none/gap.png: No such file or directory"),
        (["--plot", "{}/gap.exe"], "jaxent: cannot draw a .exe file; there are "),
    ],
)
def test_errors_in_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", *(a.format(tmp_path) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message.format(tmp_path))
    assert err.count("\n") == 1


def test_an_unknown_dtype(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["check", "--dtype", "float8"])
    assert "argument --dtype: invalid choice: 'float8'" in capsys.readouterr().err


def test_no_matplotlib(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["check", "--plot", str(tmp_path / "gap.png")]) == 2
    assert "jaxent: matplotlib is not installed" in capsys.readouterr().err
