"""Data flows one way through the package: no module imports one of a wing above its own."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import jaxent
import jaxent.torch_compat
from jaxent import _errors

PACKAGE = Path(__file__).parents[1] / "jaxent"
# The wings from the ground up; the public modules are the files of the package's own folder.
GROUND_UP = "_mesh", "_math", "_arguments", "_engine", "public", "torch_compat _check", "__init__", "cli"
LEVEL = {wing: level for level, wings in enumerate(GROUND_UP) for wing in wings.split()}
GROUND = "_serialization", "_errors", "_typing"  # import nothing of the package, and any module may import them


def wing(path: Path) -> str:
    """The folder of a module, `public` for those of the package's own folder."""
    folder, *rest = path.relative_to(PACKAGE).parts
    if rest:
        return folder
    return {"__init__.py": "__init__", "__main__.py": "cli"}.get(folder, "public")


def imported(path: Path) -> Iterator[Path]:
    """The modules of the package that a file names in an import, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for package, *parts in (name.split(".") for name in names):
            if package == "jaxent":
                yield module_file(parts)


def module_file(parts: list[str]) -> Path:
    """The longest prefix of a dotted name that is a module; the rest are names inside it."""
    while parts:
        for candidate in (PACKAGE.joinpath(*parts).with_suffix(".py"), PACKAGE.joinpath(*parts, "__init__.py")):
            if candidate.exists():
                return candidate
        parts = parts[:-1]
    return PACKAGE / "__init__.py"


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_folder_is_a_wing():
    assert {wing(path) for path in MODULES} == set(LEVEL)


def test_nothing_is_imported_upwards():
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {other.relative_to(PACKAGE)}"
        for path in MODULES
        for other in imported(path)
        if other.stem not in GROUND and LEVEL[wing(other)] > LEVEL[wing(path)]
    ]
    assert not upwards


def test_no_circle_of_imports():
    graph = {path: {other for other in imported(path) if other.name != "__init__.py"} - {path} for path in MODULES}
    while free := [path for path, others in graph.items() if not others]:
        for path in free:
            del graph[path]
        graph = {path: others.difference(free) for path, others in graph.items()}
    assert not graph


def test_no_module_imports_what_another_keeps_private():
    taken = [
        f"{path.relative_to(PACKAGE)}: {node.module}.{alias.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxent")
        for alias in node.names
        if alias.name.startswith("_") and not is_module([*(node.module or "").split(".")[1:], alias.name])
    ]
    assert not taken


def is_module(parts: list[str]) -> bool:
    return module_file(parts) in (PACKAGE.joinpath(*parts).with_suffix(".py"), PACKAGE.joinpath(*parts, "__init__.py"))


def test_modules_are_short():
    long = {str(path.relative_to(PACKAGE)): n for path in MODULES if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_a_function_is_named_in_its_errors_where_it_is_called():
    """Errors are raised without the name of the public function, which `_errors.public` adds."""
    for scope in (jaxent, jaxent.torch_compat):
        for name, function in vars(scope).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                assert function.__code__.co_filename == _errors.__file__, f"{name} lacks @public"
    threaded = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any(a.arg == "function" and a.annotation and ast.unparse(a.annotation) == "str" for a in node.args.args)
    ]
    assert not threaded
