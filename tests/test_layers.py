"""Data flows one way through the package: no module imports one of its own layer or of a layer above."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jaxent"
LAYERS = (
    ("_arrays", "_exports", "_numerics", "_options", "_sharding"),  # arguments, records, safe arithmetic, meshes
    ("_layout", "_softmax", "_ways", "risk"),  # chunks, the softmax of a row, ways to a gradient, sums
    ("_labels",),
    ("_rows",),  # the row losses
    ("_differences", "_forms", "_measures", "_reduction", "_streaming", "_targets"),  # the engine; forms of arguments
    ("_heads", "_suspicions", "_torch_rules", "information", "losses", "planning"),  # what is made of one row function
    ("_torch_functional", "diagnose", "gradients", "linear"),
    ("_torch_linear", "checking", "curvature", "gradient_norms"),
    ("torch_compat",),
    ("__init__",),
    ("cli",),
)


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file names in an import, anywhere in it; `__init__` for the package itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for package, *rest in (name.split(".") for name in names):
            if package == "jaxent":
                module = rest[0] if rest else "__init__"
                yield module if any(module in layer for layer in LAYERS) else "__init__"


def test_nothing_is_imported_upwards():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert set(level) == {path.stem for path in PACKAGE.glob("*.py")} | {"cli"}
    upwards = [
        f"{path.stem} imports {name}"
        for path in PACKAGE.glob("*.py")
        for name in imported(path)
        if level[name] >= level[path.stem]
    ]
    assert not upwards
