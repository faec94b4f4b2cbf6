"""Who may import whom: ``common`` neither side, guest and host never each other, both only what stands above them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "common", "guest", "host", "lab", "tests", "run_demo")
ALLOWED = {
    "common": {"common"},
    "guest": {"common", "guest"},
    "host": {"common", "host"},
    "lab": {"common", "guest", "host", "lab"},
    "benchmarks": {"benchmarks", "common", "guest", "host", "lab"},
    "run_demo": {"common", "lab"},
}


def sources(package: str) -> list[Path]:
    found = [ROOT / f"{package}.py"] if package == "run_demo" else sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def imported(source: Path) -> set[str]:
    """First names of everything of ours that a file imports, wherever in it, by statement or by name in a string."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(), str(source))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: a relative import"
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in {"import_module", "__import__", "find_spec"}:
                found |= {
                    str(argument.value).partition(".")[0]
                    for argument in node.args
                    if isinstance(argument, ast.Constant)
                }
    return found & set(PACKAGES)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    for source in sources(package):
        beyond = imported(source) - ALLOWED[package]
        assert not beyond, f"{source.relative_to(ROOT)} imports {', '.join(sorted(beyond))}"


def test_every_package_has_a_rule() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders - {"tests"} == set(ALLOWED) - {"run_demo"}
    assert {path.stem for path in ROOT.glob("*.py")} == {"run_demo"}


def test_the_host_needs_no_compiled_code() -> None:
    """Nor does it know the layout of a zone: it works on the RAM object alone (common modules with kernels are out)."""
    for source in sources("host"):
        tree = ast.parse(source.read_text(), str(source))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not modules & {"common.native", "common.layout", "common.segment", "common.mutex", "numba"}, source
