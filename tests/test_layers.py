"""Who imports whom is as docs/architecture.md says, and the service needs neither torch nor the exporters."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "app", "exporters")
# The command `fovea` mounts the exporter's where its extra is installed: inside a function, and nowhere else.
DECLARED_EXCEPTIONS = {("app.cli", "exporters.cli")}
# Third parties that one part of the service keeps to itself.
KEPT_APART = {
    "fastapi": ("app.http",),
    "starlette": ("app.http",),
    "uvicorn": ("app.http",),
    "onnxruntime": ("app.runtime",),
    "PIL": ("app.imaging",),
    "simplejpeg": ("app.imaging",),
    "typer": ("app.cli",),
}


def _modules() -> dict[str, Path]:
    """Every module of the three packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _table() -> dict[str, tuple[str, ...]]:
    """The import table of docs/architecture.md, in its order."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- imports:begin -->\n(.*?)<!-- imports:end -->", text, re.DOTALL)
    assert match, "docs/architecture.md has no import table"
    table: dict[str, tuple[str, ...]] = {}
    for line in match[1].strip().splitlines()[2:]:
        name, allowed = (cell.strip() for cell in line.strip("| ").split("|"))
        assert name not in table, f"{name} stands twice in the table"
        table[name] = () if allowed == "-" else tuple(allowed.split())
    return table


MODULES = _modules()
TABLE = _table()
SPLIT = {row for row in TABLE if any(other.startswith(f"{row}.") for other in TABLE)}  # packages with rows for their modules


def _stands_for(row: str, module: str) -> bool:
    """A row is a module, or a package with everything below it unless that has rows of its own."""
    return module == row or (row not in SPLIT and module.startswith(f"{row}."))


def _row_of(module: str) -> str | None:
    return next((row for row in TABLE if _stands_for(row, module)), None)


def _imports(module: str) -> set[str]:
    """Modules and third parties that a module names in any import, wherever it stands."""
    path = MODULES[module]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module} line {node.lineno}: a relative import hides who imports whom"
            assert not node.level, f"{module} line {node.lineno}: a relative import hides who imports whom"
            # `from app.http.routes import classify` names a module, `from app.errors import Overloaded` a thing in one.
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found.update(name if name in MODULES else node.module for name in names)
    return found


def _calls_by_name(module: str) -> list[int]:
    """Lines that import by a name made at run time, which no table could hold."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module", "import_module")
    ]


def _run(code: str) -> None:
    """Run code in a fresh interpreter in which warnings are errors."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_the_table_allows(module: str) -> None:
    """Imports inside functions count; a module of the same row is free."""
    row = _row_of(module)
    assert row is not None, f"{module} is missing in the import table of docs/architecture.md"
    ours = {name for name in _imports(module) if name.partition(".")[0] in PACKAGES}
    forbidden = {
        name
        for name in ours
        if not any(_stands_for(each, name) for each in (row, *TABLE[row])) and (module, name) not in DECLARED_EXCEPTIONS
    }
    assert not forbidden, f"{module} imports {sorted(forbidden)}; row {row} does not allow it"
    assert not _calls_by_name(module)


def test_every_row_is_a_module_and_its_entries_stand_above_it() -> None:
    """So the table is read downwards only: nothing imports in a circle, and no row speaks of what is gone."""
    above: set[str] = set()
    for row, allowed in TABLE.items():
        assert row in MODULES, f"{row} is in the table, but not in the tree"
        assert set(allowed) <= above, f"{row} may import {sorted(set(allowed) - above)}, which does not stand above it"
        above.add(row)


def test_every_entry_of_the_table_is_used() -> None:
    """The table says what is, so that a new dependency between parts is seen where it is reviewed."""
    for row, allowed in TABLE.items():
        used = {name for module in MODULES if _row_of(module) == row for name in _imports(module)}
        unused = [each for each in allowed if not any(_stands_for(each, name) for name in used)]
        assert not unused, f"{row} may import {unused}, but does not"


def test_the_declared_exceptions_exist() -> None:
    """An exception that is not used any more is one too many."""
    for module, name in DECLARED_EXCEPTIONS:
        assert name in _imports(module)


@pytest.mark.parametrize("third_party", sorted(KEPT_APART))
def test_a_third_party_is_imported_by_its_own_part_only(third_party: str) -> None:
    """Only `app.http` knows FastAPI, only `app.runtime` ONNX Runtime, only `app.imaging` Pillow and simplejpeg."""
    users = {
        module
        for module in MODULES
        if module.startswith("app") and any(name.partition(".")[0] == third_party for name in _imports(module))
    }
    strangers = [user for user in users if not user.startswith(KEPT_APART[third_party])]
    assert users, f"nobody imports {third_party}: the test shows nothing"
    assert not strangers


@pytest.mark.parametrize("module", sorted(module for module in MODULES if module.startswith("app.http")))
def test_nothing_private_of_a_web_framework_is_used(module: str) -> None:
    """uvicorn, Starlette and FastAPI may change that with every release, and theirs must not be held back by us."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        private = [name for name in names if name.startswith("_") and not name.endswith("__")]
        assert not private, f"line {node.lineno}: {private}"


def test_app_imports_with_torch_and_onnx_blocked() -> None:
    """Every module of the service, the HTTP application included, in an environment that has only its own extra."""
    modules = sorted(module for module in MODULES if module.startswith("app") and not module.endswith("__main__"))
    assert {"app.http.application", "app.cli", "app.assembly"} <= set(modules)
    _run(
        "import sys, importlib\n"
        "for name in ('torch', 'onnx', 'safetensors', 'timm'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "loaded = [name for name in sys.modules if name.partition('.')[0] == 'exporters']\n"
        "assert not loaded, f'app imported {loaded}'\n"
    )


def test_the_block_on_torch_bites() -> None:
    """What needs torch does fail there, so that the test above could."""
    with pytest.raises(AssertionError, match="torch"):
        _run("import sys; sys.modules['torch'] = None; import models.vit")


def test_the_manifest_pulls_no_torch() -> None:
    """Nor ONNX, NumPy or anything else of this project: it is the contract, and the service reads it first."""
    _run(
        "import sys, models.manifest\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'app', 'exporters'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "others = {name for name in sys.modules if name.startswith('models.')} - {'models.manifest'}\n"
        "assert not others, others\n"
    )


def test_the_service_only_looks_at_clocks_that_nobody_can_set() -> None:
    """Deadlines, costs and quotas would jump with the others."""
    allowed = {"perf_counter", "monotonic"}
    for path in sorted((ROOT / "app").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
                assert node.attr in allowed, f"{path.name}:{node.lineno}: time.{node.attr}"
            if isinstance(node, ast.Import):
                assert not any(alias.name == "datetime" for alias in node.names), path.name
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("time", "datetime"), path.name
