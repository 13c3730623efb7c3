"""What the package exports: names, signatures and docstrings, and the places that list them, all held together."""

import ast
import importlib.metadata
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import jaxent
from jaxent import torch_compat

README, CHANGELOG = (Path(__file__).parents[1].joinpath(f).read_text("utf-8") for f in ("README.md", "CHANGELOG.md"))
pytestmark = pytest.mark.rows  # nothing is compiled

PACKAGES: dict[str, types.ModuleType] = {"jaxent": jaxent, "jaxent.torch_compat": torch_compat}
PUBLIC = {f"{package}.{name}": getattr(module, name) for package, module in PACKAGES.items() for name in module.__all__}
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
CLASSES = [name for name, value in PUBLIC.items() if inspect.isclass(value)]

# The contract: data positional, options by keyword. PyTorch's own signatures are held by test_torch_compat.py.
SIGNATURES = """
self_information(p, *, base=None)
entropy(p, *, axis=-1, base=None, where=None, keepdims=False)
cross_entropy(p, q, *, axis=-1, base=None, where=None, keepdims=False)
kl_divergence(p, q, *, axis=-1, base=None, where=None, keepdims=False)
jensen_shannon_divergence(p, q, *, weight=0.5, axis=-1, base=None, where=None, keepdims=False)
generalized_jensen_shannon_divergence(distributions, *, weights=None, distribution_axis=0, axis=-1, base=None,
    where=None, keepdims=False)
renyi_entropy(p, order, *, axis=-1, base=None, where=None, keepdims=False)
renyi_divergence(p, q, order, *, axis=-1, base=None, where=None, keepdims=False)
tsallis_entropy(p, order, *, axis=-1, where=None, keepdims=False)
perplexity(p, *, axis=-1, where=None, keepdims=False)
total_variation_distance(p, q, *, axis=-1, where=None, keepdims=False)
hellinger_distance(p, q, *, axis=-1, where=None, keepdims=False)
brier_score(probabilities, targets, *, axis=-1, where=None, weights=None, ignore_index=-100, reduction="mean")
joint_entropy(pxy, *, base=None, keepdims=False)
conditional_entropy(pxy, *, axis=-1, base=None, keepdims=False)
mutual_information(pxy, *, base=None, keepdims=False)
conditional_mutual_information(pxyz, *, base=None, keepdims=False)
pointwise_mutual_information(pxy, *, base=None)
normalized_mutual_information(pxy, *, normalizer="mean", keepdims=False)
variation_of_information(pxy, *, base=None, keepdims=False)
self_information_with_logits(logits, *, axis=-1, base=None, where=None)
entropy_with_logits(logits, *, axis=-1, base=None, where=None, keepdims=False)
cross_entropy_with_logits(p_logits, q_logits, *, axis=-1, base=None, where=None, keepdims=False)
kl_divergence_with_logits(p_logits, q_logits, *, axis=-1, base=None, where=None, keepdims=False)
empirical_distribution(labels, num_classes, *, weights=None)

softmax_cross_entropy(logits, targets, *, axis=-1, where=None, weights=None, class_weights=None, ignore_index=-100,
    label_smoothing=0.0, z_loss=0.0, reduction="mean", denominator=None, vocab_axis=None)
nll_loss(log_probs, labels, *, axis=-1, where=None, weights=None, class_weights=None, ignore_index=-100,
    reduction="mean", denominator=None)
sigmoid_cross_entropy(logits, targets, *, where=None, weights=None, pos_weight=None, reduction="mean", denominator=None)
token_statistics(logits, labels=None, *, axis=-1, where=None, ignore_index=-100, top_k=0, vocab_axis=None)

linear_softmax_cross_entropy(hidden, kernel, targets, *, bias=None, where=None, weights=None, class_weights=None,
    ignore_index=-100, label_smoothing=0.0, z_loss=0.0, soft_cap=None, temperature=1.0, reduction="mean",
    denominator=None, with_statistics=False, chunk_rows=None, dtype=None, precision=None, vocab_axis=None)
linear_token_statistics(hidden, kernel, labels=None, *, bias=None, soft_cap=None, temperature=1.0,
    where=None, ignore_index=-100, top_k=0, chunk_rows=None, dtype=None, precision=None, vocab_axis=None)
linear_kl_divergence(hidden_p, kernel_p, hidden_q, kernel_q, *, bias_p=None, bias_q=None, divergence="forward",
    mixture=0.5, soft_cap_p=None, soft_cap_q=None, temperature=1.0, where=None, weights=None, reduction="mean",
    denominator=None, chunk_rows=None, dtype=None, precision=None, vocab_axis=None)
linear_kl_divergence_from_top(hidden, kernel, classes, log_probs, *, tail="bucket", divergence="forward", bias=None,
    soft_cap=None, temperature=1.0, where=None, weights=None, ignore_index=-100, reduction="mean", denominator=None,
    chunk_rows=None, dtype=None, precision=None, vocab_axis=None)
linear_loss(row_loss, hidden, kernel, *row_args, bias=None, params=None, where=None, weights=None, reduction="mean",
    denominator=None, has_aux=False, soft_cap=None, temperature=1.0, chunk_rows=None, dtype=None, precision=None,
    vocab_axis=None)
linear_rows(row_fn, hidden, kernel, *row_args, bias=None, params=None, where=None, soft_cap=None, temperature=1.0,
    chunk_rows=None, dtype=None, precision=None, vocab_axis=None)
plan(num_rows, features, num_classes, *, dtype=float32, kernel_dtype=None, device=None,
    function="linear_softmax_cross_entropy", reduction="mean", chunk_rows=None, flops_per_second=None,
    bytes_per_second=None, **options)

softmax_cross_entropy_gradient(logits, targets, *, axis=-1, where=None, weights=None, class_weights=None,
    ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", denominator=None, vocab_axis=None)
logit_hessian(logits, *, axis=-1)
logit_hessian_product(logits, v, *, axis=-1)
ggn_vector_product(logits_fn, params, v, *, targets=None, axis=-1, where=None, weights=None, class_weights=None,
    ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", denominator=None, vocab_axis=None)
fisher_vector_product(logits_fn, params, targets, v, *, axis=-1, where=None, weights=None, ignore_index=-100,
    label_smoothing=0.0, reduction="mean", denominator=None, vocab_axis=None)
linear_ggn_vector_product(hidden, kernel, v, *, targets=None, bias=None, where=None, weights=None, class_weights=None,
    ignore_index=-100, label_smoothing=0.0, z_loss=0.0, soft_cap=None, temperature=1.0, reduction="mean",
    denominator=None, chunk_rows=None, dtype=None, precision=None, vocab_axis=None)
linear_fisher_vector_product(hidden, kernel, targets, v, *, bias=None, where=None, weights=None, ignore_index=-100,
    label_smoothing=0.0, soft_cap=None, temperature=1.0, reduction="mean", denominator=None, chunk_rows=None,
    dtype=None, precision=None, vocab_axis=None)
linear_gradient_norms(hidden, kernel, targets, *, bias=None, where=None, weights=None, class_weights=None,
    ignore_index=-100, label_smoothing=0.0, z_loss=0.0, soft_cap=None, temperature=1.0, chunk_rows=None,
    dtype=None, precision=None, vocab_axis=None, per="row")
linear_ggn_diagonal(hidden, kernel, targets=None, *, bias=None, where=None, weights=None, class_weights=None,
    ignore_index=-100, label_smoothing=0.0, z_loss=0.0, soft_cap=None, temperature=1.0, reduction="mean",
    denominator=None, chunk_rows=None, dtype=None, precision=None, vocab_axis=None)
gradient_noise_scale(norms, mean_norm, *, where=None, weights=None)
check_gradient(loss_fn, *args, closed_form=None, oracle=None, tolerance=None, second_order=False, **options)
diagnose(logits, targets=None, *, loss=None, axis=-1, where=None, weights=None, class_weights=None, ignore_index=-100,
    label_smoothing=0.0, z_loss=0.0)
checked(loss)

WeightedSum(total="<factory>", weight="<factory>")
WeightedSum.mean(self)
EmpiricalRisk.update(self, losses, weights=None)
EmpiricalRisk.merge(self, other)
EmpiricalRisk.psum(self, axis_name)
EmpiricalRisk.mean(self, base=None)
EmpiricalRisk.perplexity(self)
EmpiricalRisk.bits_per(self, count)
"""


def parameters(f: Any) -> list[tuple[str, str, Any]]:
    """Name, kind and default; a dataclass gives a default that it makes anew an object that only prints as one."""
    made = "<factory>"
    return [
        (p.name, p.kind.name, made if repr(p.default) == made else p.default)
        for p in inspect.signature(f).parameters.values()
    ]


@pytest.mark.parametrize("name", sorted({*FUNCTIONS, *CLASSES} - {"jaxent.ShardingWarning"}))
def test_a_printed_signature_is_short(name: str):
    """As `help` opens with it: JAX's unions by their names, and what may be left out as `| None`."""
    printed = str(inspect.signature(PUBLIC[name]))
    assert "Union[" not in printed
    assert "Optional[" not in printed


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - {"jaxent.plan", "jaxent.check_gradient"}))
def test_a_misspelt_keyword_is_named_with_its_function(name: str):
    """By Python itself. `plan` has a longer list to offer, and `check_gradient` hands options on to the loss."""
    required = [p for p in inspect.signature(PUBLIC[name]).parameters.values() if p.kind <= 1 and p.default is p.empty]
    with pytest.raises(
        TypeError, match=rf"{name.split('.')[-1]}\(\) got an unexpected keyword argument 'label_smothing'"
    ):
        PUBLIC[name](*(None for _ in required), label_smothing=0.1)


def test_signatures_are_the_contract():
    wanted = re.findall(r"^([\w.]+)(\(.*?\))$", SIGNATURES, flags=re.MULTILINE | re.DOTALL)
    for name, arguments in wanted:
        scope: dict[str, Any] = {"float32": jnp.float32}
        exec(f"def f{arguments}: ...", scope)
        found = (
            getattr(getattr(jaxent, name.split(".")[0]), name.split(".")[1])
            if "." in name
            else PUBLIC["jaxent." + name]
        )
        assert parameters(found) == parameters(scope["f"]), name
    assert {f"jaxent.{name}" for name, _ in wanted} >= {f for f in FUNCTIONS if "torch_compat" not in f}


REDUCED = [
    name
    for name in FUNCTIONS
    if "torch_compat" not in name and "reduction" in inspect.signature(PUBLIC[name]).parameters
]


@pytest.mark.parametrize("name", REDUCED)
def test_overloads_have_the_keywords_of_the_signature(name: str):
    """They tell a type checker that only `"sum_and_weight"` gives a `WeightedSum`."""
    keywords = {p.name for p in inspect.signature(PUBLIC[name]).parameters.values() if p.kind == p.KEYWORD_ONLY}
    for overload in typing.get_overloads(PUBLIC[name]):
        *parameters, options = inspect.signature(overload).parameters.values()
        positional = [p for p in parameters if p.kind != p.KEYWORD_ONLY]
        (typed,) = typing.get_args(options.annotation)
        assert typed.__optional_keys__ == keywords - {p.name for p in parameters}
        assert [p.name for p in positional] == list(inspect.signature(PUBLIC[name]).parameters)[: len(positional)]


# ----------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_else_is_exported(package: str):
    module = PACKAGES[package]
    scope: dict[str, Any] = {}
    exec(f"from {package} import *", scope)
    assert scope.keys() - {"__builtins__"} == set(module.__all__)
    own = {n for n, value in vars(module).items() if getattr(value, "__module__", "").startswith("jaxent")}
    assert {n for n in own if not n.startswith("_")} == set(module.__all__)


def table_of_readme() -> dict[str, list[str]]:
    rows = README.split("<!-- api -->\n")[1].split("<!-- api ends -->")[0].splitlines()[2:]
    return {title.strip(): re.findall(r"`(\w+)`", names) for _, title, names, _ in (row.split("|") for row in rows)}


def table_of_contents() -> dict[str, list[str]]:
    """The groups of the package's docstring."""
    blocks = re.findall(r"^(\S[^\n]*)\n\n((?:    \S[^\n]*\n)+)", inspect.getdoc(jaxent) or "", flags=re.MULTILINE)
    for _, lines in blocks:
        assert all(re.fullmatch(r"    \w+ {2,}\S.*", line) for line in lines.splitlines())
    return {
        re.sub(r" \(.*", "", title): re.findall(r"^    (\w+)", lines, flags=re.MULTILINE) for title, lines in blocks
    }


def test_the_lists_of_names_agree():
    contents = table_of_contents()
    assert {title.lower(): names for title, names in contents.items()} == table_of_readme()
    listed = [name for names in contents.values() for name in names]
    assert sorted(listed) == sorted(jaxent.__all__)
    missing = [name for name in listed if f"`{name}`" not in CHANGELOG]
    assert not missing, "not in CHANGELOG.md"
    movers = Path(__file__).parents[1].joinpath("docs", "pytorch.md").read_text("utf-8")
    assert set(re.findall(r"`(\w+)`", movers.split("How the three compare")[0])) == set(torch_compat.__all__)


def test_the_version_is_one():
    assert jaxent.__version__ == importlib.metadata.version("jaxent")
    assert re.findall(r"^## ([\d.]+)", CHANGELOG, flags=re.MULTILINE)[0] == jaxent.__version__


# ----------------------------------------------------------------------------------------------------------------------
# Docstrings

# They return no quantity, which would have a formula and a unit.
VERDICTS = {"jaxent.diagnose", "jaxent.checked"}
UNIT = r"\b(nats|bits|bytes|ulp|in (their|its|the) unit|number|frequencies|examples|probabilities)\b"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_has_its_parts_in_order(name: str):
    doc = inspect.getdoc(PUBLIC[name]) or ""
    summary = doc.split("\n\n")[0]
    assert "\n" not in summary
    assert re.match(r"[A-Z`].*\.$", summary)
    parts = ["**Arguments:**", "**Returns:**", "**Raises:**", "\n>>> "]
    if name not in VERDICTS:
        assert re.search(UNIT, summary), "a unit"
        parts.insert(0, "$")
    places = [doc.find(part) for part in parts]
    assert min(places) > 0, parts[places.index(min(places))]
    assert places == sorted(places)
    told = doc[doc.find("**Arguments:**") : doc.find("**Returns:**")]
    package = name.rpartition(".")[0]
    referred = [PUBLIC.get(f"{package}.{other}") for other in re.findall(r"`(\w+)`", told)]
    elsewhere = {p for f in referred if f for p in inspect.signature(f).parameters}
    for parameter in inspect.signature(PUBLIC[name]).parameters:
        assert parameter[0] == "_" or parameter in elsewhere or f"`{parameter}`" in told, parameter


def undocumented(cls: type) -> Iterator[str]:
    """Fields, methods and properties that neither have a docstring nor are named in that of the class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            name = ast.unparse(node.target)
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        elif isinstance(node, ast.FunctionDef):
            name, told = node.name, ast.get_docstring(node) is not None
        else:
            continue
        if not (told or name.startswith("_") or f"`{name}`" in (inspect.getdoc(cls) or "")):
            yield name


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_and_its_parts_have_docstrings(name: str):
    cls = PUBLIC[name]
    assert re.match(r"[A-Z`]", inspect.getdoc(cls) or "")
    if name.startswith("jaxent.torch_compat."):  # its fields are the arguments of the function it names
        assert ">>> " in (inspect.getdoc(cls) or "")
    else:
        assert not list(undocumented(cls))
