"""The house: who may import whom, and rules that can be checked. Limits only tighten."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "memdlm"
MODULES = sorted(SOURCE.rglob("*.py"))
FOUNDATION = {
    *("types", "errors", "options", "randomness", "files", "locks", "outputs", "hub", "templates", "terminal"),
    *("finite", "padding", "strict_json", "version"),
}
MAY_IMPORT = {
    "data": set(),
    "models": set(),
    "diffusion": set(),
    "memory": {"models", "diffusion"},
    "inference": {"models", "diffusion", "memory"},
    "serving": {"data", "models", "diffusion", "memory", "inference"},
    "training": {"data", "models", "diffusion", "memory"},
    "evaluation": {"data", "models", "diffusion", "memory", "inference"},
    "report": {"diffusion", "inference"},
    "workflows": {
        *("data", "models", "diffusion", "memory", "inference", "serving", "training", "evaluation", "report")
    },
    "cli": {
        *("data", "models", "diffusion", "memory", "inference", "serving", "training", "evaluation", "report"),
        "workflows",
    },
}
ROOMS = {
    "models/blocks": set(),
    "models/quantisation": {"models/blocks"},
    "models/lora": {"models/blocks", "models/quantisation"},
    "models/networks": {"models/blocks", "models/quantisation", "models/lora"},
    "models/border": {"models/blocks", "models/lora", "models/networks"},
    "models/hub": {"models/blocks", "models/quantisation", "models/lora", "models/networks"},
    "memory/files": {"memory"},
    "memory": {"memory/files"},
    "serving": set(),
    "serving/http": {"serving"},
    "serving/ray_app": {"serving", "serving/http"},
    "workflows": set(),
    "workflows/runs": {"workflows"},
    "workflows/sessions": {"workflows"},
    "workflows/studies": {"workflows"},
}
"""Within a package, who may import whom. A memory opens and is kept, so those two know each other; their modules form
no cycle."""
MAX_LINES, MAX_FUNCTION = 400, 60


def name_of(path: Path) -> str:
    parts = ["memdlm", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(node: ast.AST, *, typing_too: bool = False, by_name_too: bool = True) -> set[str]:
    """Modules of the package that the code under `node` imports when it runs, those it names to importlib included."""
    found: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not typing_too:
            child.body = [ast.Pass()]
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names if alias.name.split(".")[0] == "memdlm"}
        elif isinstance(child, ast.ImportFrom) and child.module and child.module.split(".")[0] == "memdlm":
            assert child.level == 0
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                found.add(full if full in NAMES else child.module)
        elif by_name_too and isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            found |= {name for name in map(spelled, child.args[:1]) if name.split(".")[0] == "memdlm"}
    return found


def spelled(node: ast.expr) -> str:
    """The name of a module as far as it is written out."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) else node
    return str(first.value).rstrip(".") if isinstance(first, ast.Constant) else ""


def package(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent != SOURCE], ids=name_of)
def test_imports_point_down(path):
    own = package(name_of(path))
    used = {package(name) for name in imports(tree_of(path))} - {""}
    assert used <= MAY_IMPORT[own] | FOUNDATION | {own}, f"{own} may not import {used - MAY_IMPORT[own]}"


def room(name: str) -> str:
    """The folder of a module, as ROOMS has it."""
    path = SOURCE.joinpath(*name.split(".")[1:])
    return (path if path.is_dir() else path.parent).relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent != SOURCE and p.name != "__init__.py"], ids=name_of)
def test_rooms_of_a_package_import_down(path):
    own = room(name_of(path))
    used = {room(each) for each in imports(tree_of(path)) if package(each) == package(name_of(path))} - {own}
    assert used <= ROOMS.get(own, set()), f"{own} may not import {used - ROOMS.get(own, set())}"


def test_every_room_has_its_place():
    assert {room(name_of(path)) for path in MODULES if "/" in room(name_of(path))} == {
        each for each in ROOMS if "/" in each
    }


@pytest.mark.parametrize("name", sorted(FOUNDATION))
def test_the_foundation_stands_on_itself(name):
    used = {package(each) for each in imports(tree_of(SOURCE / f"{name}.py"))}
    assert used <= FOUNDATION


def test_there_is_no_import_cycle():
    graph = {}
    for path in MODULES:
        name = name_of(path)
        graph[name] = {each for each in imports(tree_of(path)) if each != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_import_of_ours_hides_inside_a_function(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            assert not imports(node, by_name_too=False), f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_stay_readable(path):
    text = path.read_text()
    tree = tree_of(path)
    assert ast.get_docstring(tree), "a module says in one line what is here"
    assert len(text.splitlines()) <= MAX_LINES
    assert text.isascii(), "ASCII in code"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"hasattr", "torch.manual_seed"} or path.name == "loading.py", called


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_everything_shown_passes_one_place(path):
    """`print` and rich's Console would let texts steer the terminal, or read markup into names."""
    if path.name in ("output.py", "console.py", "faults.py"):
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"print", "Console", "sys.stdout.write", "sys.stderr.write"}


def test_the_checker_sees_what_it_should():
    upward = ast.parse("from memdlm.training import score")
    hidden = ast.parse("def f():\n    import memdlm.cli.main\n")
    assert {package(each) for each in imports(upward)} == {"training"}
    assert imports(hidden.body[0]) == {"memdlm.cli.main"}
    named = ast.parse("importlib.import_module('memdlm.training.trainer')\nimportlib.import_module(f'memdlm.cli.{x}')")
    assert imports(named) == {"memdlm.training.trainer", "memdlm.cli"}
    assert imports(named, by_name_too=False) == set()
    assert [room(name) for name in ("memdlm.models.hub.loading", "memdlm.memory.files", "memdlm.memory")] == [
        *("models/hub", "memory/files", "memory")
    ]


def test_importing_the_package_does_no_work():
    code = "import sys, memdlm; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_resolves():
    import memdlm

    for name in memdlm.__all__:
        assert getattr(memdlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        memdlm.nonsense  # noqa: B018
    assert importlib.util.find_spec("memdlm") is not None
