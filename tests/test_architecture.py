"""The house holds: imports run downward, siblings are strangers, imports are cheap, files short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mitaswap"

#: from the ground up; a part may import what lies on lower levels, and the files of its own part
LEVELS: list[set[str]] = [
    {"floor"},
    {"operators", "kernels", "figures"},
    {"mechanisms"},
    {"surgery", "models", "data", "stats", "placement"},
    {"checkpoint"},
    {"evaluation", "train", "benchmark"},
    {"studies", "report"},
    {"cli"},
]
FLOOR = {"errors", "registry", "spec", "tokens", "results"}
HEIGHT = {part: height for height, level in enumerate(LEVELS) for part in level}
#: the package's own front door and `python -m mitaswap`
DOORS = {"__init__", "__main__"}

MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = sorted(
    path
    for folder in ("mitaswap", "tests", "benchmarks", "examples", "tools")
    for path in (ROOT / folder).rglob("*.py")
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(name: str) -> str:
    """The part of the house that a top-level name of the package belongs to."""
    return "floor" if name in FLOOR else name


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Top-level names under mitaswap that the source of `module` imports, wherever in the file.

    Lazy imports and those for type checkers count too. Importing a public name from `mitaswap`
    itself yields that name (the front door stands above all), but the version belongs to nobody.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: from . import x, from ..spec import Spec
                home = module.split(".")[: None if is_package and node.level == 1 else -node.level]
                if is_package and node.level > 1:
                    home = module.split(".")[: 1 - node.level]
                base = ".".join([*home, base]).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("mitaswap.") and name != "mitaswap.__version__":
                yield name.split(".")[1]


def wrongs(part: str, imports: Iterator[str]) -> list[str]:
    """The imports that `part` must not make: upward, sideways, or of something without a level."""
    if part in DOORS:
        return []
    found = []
    for name in imports:
        other = part_of(name)
        if other == part:
            continue
        if other not in HEIGHT:
            found.append(f"{name}: not a part of the house (add it to LEVELS, or import the file)")
        elif HEIGHT[other] >= HEIGHT[part]:
            way = "sideways" if HEIGHT[other] == HEIGHT[part] else "upward"
            found.append(f"{name}: {way}")
    return found


def test_every_part_has_a_level() -> None:
    parts = {part_of(path.relative_to(PACKAGE).parts[0].removesuffix(".py")) for path in MODULES}
    assert "mechanisms" in parts, "the package is where this test looks for it"
    assert parts - DOORS <= HEIGHT.keys(), "a new part needs a level in LEVELS (and in the design)"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downward(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    part = part_of(relative.parts[0].removesuffix(".py"))
    is_package = path.name == "__init__.py"
    module = ".".join(["mitaswap", *relative.with_suffix("").parts]).removesuffix(".__init__")
    assert wrongs(part, imported(path.read_text(encoding="utf-8"), module, is_package)) == []


@pytest.mark.parametrize(
    ("source", "module", "wrong"),
    [
        ("from mitaswap.surgery import swap", "mitaswap.mechanisms.mita", "surgery: upward"),
        ("import mitaswap.models.timm", "mitaswap.surgery.swap", "models: sideways"),
        ("def f():\n  from mitaswap.cli import app", "mitaswap.stats.overlap", "cli: upward"),
        ("if T:\n  from mitaswap.train import x", "mitaswap.evaluation", "train: sideways"),
        ("from ..cli import app", "mitaswap.figures.matrix", "cli: upward"),
        ("from .. import studies", "mitaswap.figures.matrix", "studies: upward"),
        ("from . import cli", "mitaswap.spec", "cli: upward"),
        ("from mitaswap import figures", "mitaswap.operators.pool", "figures: sideways"),
        ("from mitaswap.helpers import x", "mitaswap.cli", "helpers: not a part"),
        ("from mitaswap import load", "mitaswap.cli", "load: not a part"),
    ],
    ids=lambda value: str(value).replace("\n", " "),
)
def test_import_check_sees(source: str, module: str, wrong: str) -> None:
    """Negative control of the check."""
    (found,) = wrongs(part_of(module.split(".")[1]), imported(source, module))
    assert found.startswith(wrong)


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        (
            "from mitaswap.spec import Spec\nfrom mitaswap.errors import x",
            "mitaswap.registry",
            False,
        ),
        ("from mitaswap.mechanisms._base import Card", "mitaswap.mechanisms.mita", False),
        ("from ._base import Card", "mitaswap.mechanisms", True),
        ("from ..errors import MitaswapError", "mitaswap.mechanisms", True),
        ("import torch, os.path\nfrom pathlib import Path", "mitaswap.spec", False),
    ],
    ids=lambda value: str(value).replace("\n", " "),
)
def test_import_check_allows(source: str, module: str, is_package: bool) -> None:
    assert wrongs(part_of(module.split(".")[1]), imported(source, module, is_package)) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_named_after_what_is_in_them(path: Path) -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert path.stem.strip("_") not in vague and path.parent.name not in vague


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_library_neither_prints_nor_swallows(path: Path) -> None:
    """Only the CLI prints; nothing catches everything (a bare `except:` eats Ctrl-C)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and not n.type]
    assert bare == [], "lines with a bare except"
    if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in {"cli", "__main__"}:
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert prints == [], "lines that print"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_lives_there(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = {"torch", "torchvision", "timm", "transformers", "triton", "pandas", "matplotlib", "typer"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import mitaswap", HEAVY),
        (
            "import mitaswap\nmitaswap.Spec.parse('mita(m=4)'), mitaswap.TokenLayout(1, (2, 2))",
            HEAVY,
        ),
        ("import mitaswap.results", {"torch", "timm", "transformers", "triton"}),
        ("import mitaswap.figures", {"torch", "timm", "transformers", "triton"}),
        (
            "from mitaswap.figures import FIGURES\nFIGURES.names()",
            {"torch", "timm", "transformers", "triton"},
        ),
        ("import mitaswap.report", {"torch", "timm", "transformers", "triton"}),
        ("import mitaswap.mechanisms", {"timm", "transformers", "triton"}),
        (
            "from mitaswap.mechanisms import MECHANISMS\nMECHANISMS.names()",
            {"timm", "transformers", "triton"},
        ),
        ("import mitaswap.cli", {"torch", "timm", "transformers", "triton"}),
    ],
    ids=lambda value: value.replace("\n", "; ") if isinstance(value, str) else "",
)
def test_importing_is_cheap(statement: str, absent: set[str]) -> None:
    assert loaded_by(statement) & absent == set()


def test_import_cost_check_sees_torch() -> None:
    """Negative control: what is loaded shows."""
    assert "torch" in loaded_by("import mitaswap.mechanisms")


def test_public_names_exist() -> None:
    """Each public name comes from the module that the front door says, and nothing else does."""
    import mitaswap

    for name in mitaswap.__all__:
        assert getattr(mitaswap, name) is not None
    assert set(dir(mitaswap)) == set(mitaswap.__all__)
    with pytest.raises(AttributeError, match="module 'mitaswap' has no attribute 'swop'"):
        _ = mitaswap.swop
