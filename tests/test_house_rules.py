"""The bars of the house, read off the source: sizes, names, layers of side effects, documents, assets."""

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "talk3d"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in SOURCES if path.name != "__init__.py"]

MAX_MODULES = 95
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_ASSETS_BYTES = 40 * 2**20

BANNED_WORDS = {"opts", "datas", "tmp", "helper", "helpers", "utils", "manager"}
NEVER_IMPORTED = {"torchvision", "torchaudio", "librosa", "hydra", "omegaconf"}
ONLY_IN_ADAPTERS = {"mediapipe", "ai_edge_litert", "transformers", "onnxruntime"}
UNTESTED_ALONE = {"errors.py", "presets.py"}
BELOW_IO = {"models", "ops", "types", "errors.py"}
FILE_METHODS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink", "rename", "touch", "memmap"}
FILE_MODULES = {"av", "safetensors", "shutil", "tempfile", "zipfile", "os"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def parameters(function: Function) -> list[ast.arg]:
    arguments = function.args
    extra = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *extra]
    return [argument for argument in named if argument.arg not in ("self", "cls")]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file calls; a call on an expression starts with a dot."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            parts: list[str] = []
            called = node.func
            while isinstance(called, ast.Attribute):
                parts.append(called.attr)
                called = called.value
            parts.append(called.id if isinstance(called, ast.Name) else "")
            yield node.lineno, ".".join(reversed(parts))


def nothing(found: list[str], rule: str) -> None:
    assert not found, f"{rule}:\n  " + "\n  ".join(found)


def test_the_house_stays_small() -> None:
    assert len(MODULES) <= MAX_MODULES, f"{len(MODULES)} modules, at most {MAX_MODULES}"


def test_files_stay_short() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    nothing([f"{name}: {n}" for name, n in lengths.items() if n > MAX_FILE_LINES], f"a file has at most {MAX_FILE_LINES} lines")


def test_functions_stay_short() -> None:
    found = [
        f"{name_of(path)}:{function.lineno} {function.name}: {length} lines"
        for path in SOURCES
        for function in functions(path)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    ]
    nothing(found, f"a function has at most {MAX_FUNCTION_LINES} lines")


def test_functions_take_few_parameters() -> None:
    found = [
        f"{name_of(path)}:{function.lineno} {function.name}: {count}"
        for path in SOURCES
        for function in functions(path)
        if (count := len(parameters(function))) > MAX_PARAMETERS
    ]
    nothing(found, f"a function has at most {MAX_PARAMETERS} parameters")


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_public_name_is_documented_and_typed(path: Path) -> None:
    found = [] if ast.get_docstring(tree(path)) not in (None, "", "TODO.") else ["the module has no docstring"]
    for name, node in public_definitions(tree(path).body):
        where = f"{path.name}:{node.lineno} {name}"
        if not ast.get_docstring(node):
            found.append(f"{where} has no docstring")
        if isinstance(node, Function):
            found += [f"{where}: {argument.arg} has no type" for argument in parameters(node) if argument.annotation is None]
            found += [f"{where} has no return type"] * (node.returns is None)
    nothing(found, "every public name is documented and typed")


def test_every_setting_is_documented() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    if isinstance(field, ast.AnnAssign) and not documented:
                        found.append(f"{name_of(path)}:{field.lineno} {node.name}.{ast.unparse(field.target)}")
    nothing(found, "a docstring stands under each field of a config")


def test_every_module_has_a_test_file() -> None:
    found = []
    for path in MODULES:
        relative = path.relative_to(PACKAGE)
        if name_of(path) not in UNTESTED_ALONE and not (ROOT / "tests" / relative.parent / f"test_{relative.name}").is_file():
            found.append(f"tests/{(relative.parent / f'test_{relative.name}').as_posix()} for {name_of(path)}")
    nothing(found, "tests mirror the source, missing")


def test_the_map_names_every_module() -> None:
    listed = set(re.findall(r"`([a-z_0-9.]+)`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")))
    dotted = {name_of(path).removesuffix(".py").replace("/", ".") for path in MODULES}
    nothing(sorted(dotted - listed), "ARCHITECTURE.md has a line for each module")


def scopes(path: Path) -> Iterator[tuple[str, set[str]]]:
    """Each function's (and the module's) own names: parameters and what it assigns, without inner functions."""

    def assigned(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function | ast.ClassDef | ast.Lambda):
                continue
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                yield child.id
            yield from assigned(child)

    yield name_of(path), set(assigned(tree(path)))
    for function in functions(path):
        yield f"{name_of(path)}:{function.lineno} {function.name}", set(assigned(function)) | {argument.arg for argument in parameters(function)}


def words(name: str) -> set[str]:
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def test_names_say_what_things_are() -> None:
    found = [f"{name_of(path)}: the module's name" for path in SOURCES if words(path.stem) & BANNED_WORDS]
    for path in SOURCES:
        defined = [node for node in ast.walk(tree(path)) if isinstance(node, Function | ast.ClassDef)]
        found += [f"{name_of(path)}:{node.lineno} {node.name}" for node in defined if words(node.name) & BANNED_WORDS]
        found += [f"{where}: {name}" for where, names in scopes(path) for name in sorted(names) if words(name) & BANNED_WORDS]
    nothing(found, f"names never contain {sorted(BANNED_WORDS)}")


def test_names_differ_by_more_than_a_digit() -> None:
    found = []
    for path in SOURCES:
        for where, names in scopes(path):
            stems: dict[str, list[str]] = defaultdict(list)
            for name in sorted(names):
                stems[re.sub(r"\d", "", name)].append(name)
            found += [f"{where}: {', '.join(alike)}" for stem, alike in stems.items() if stem and len(alike) > 1]
    nothing(found, "names in one scope differ by more than a digit")


def test_heavy_and_unwanted_imports_stay_out() -> None:
    found = []
    for path in SOURCES:
        for line, module in imports(path):
            top = module.partition(".")[0]
            if top in NEVER_IMPORTED or (top in ONLY_IN_ADAPTERS and layer(path) != "perception"):
                found.append(f"{name_of(path)}:{line} {module}")
    nothing(found, f"{sorted(NEVER_IMPORTED)} nowhere, {sorted(ONLY_IN_ADAPTERS)} only behind the adapters of perception")


def test_nothing_below_io_opens_a_file() -> None:
    found = []
    for path in SOURCES:
        if layer(path) in BELOW_IO:
            found += [f"{name_of(path)}:{line} {module}" for line, module in imports(path) if module.partition(".")[0] in FILE_MODULES]
            for line, called in calls(path):
                first, _, last = called.rpartition(".")
                if last in FILE_METHODS or (first in {"np", "numpy", "torch"} and last in {"load", "save", "savez", "fromfile"}):
                    found.append(f"{name_of(path)}:{line} {called}")
    nothing(found, "only io and the layers above it touch files")


def test_only_apps_print_parse_or_exit() -> None:
    found = []
    for path in SOURCES:
        if layer(path) != "apps":
            found += [f"{name_of(path)}:{line} {called}" for line, called in calls(path) if called in {"print", "exit", "sys.exit"}]
            found += [
                f"{name_of(path)}:{line} {module}" for line, module in imports(path) if module.partition(".")[0] in {"argparse", "tyro", "rich"}
            ]
    nothing(found, "printing, arguments and exit codes belong to apps")


def test_there_is_no_pickle() -> None:
    """Published files are pickles: `io.pickles` reads them without running them (docs/adr/0007)."""
    banned_modules = {"pickle", "_pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    found = []
    for path in SOURCES:
        found += [f"{name_of(path)}:{line} {module}" for line, module in imports(path) if module.partition(".")[0] in banned_modules]
        found += [f"{name_of(path)}:{line} {called}" for line, called in calls(path) if called in {"torch.load", "torch.save", "eval", "exec"}]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                found.append(f"{name_of(path)}:{node.value.lineno} allow_pickle")
    nothing(found, "no pickle anywhere")


def test_no_path_of_one_machine() -> None:
    places = re.compile("|".join(re.escape(f"/{place}/") for place in ("work", "root", "opt", "home", "mnt", "scratch")))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and (path.suffix in {".py", ".md", ".toml", ".yaml", ".json"} or path.name in {"Makefile", "run"}):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{name}:{number}" for number, line in enumerate(lines, 1) if places.search(line)]
    nothing(found, "no file names a folder of one machine")


def test_assets_are_small_and_each_has_a_card() -> None:
    assets = [path for path in (PACKAGE / "assets").rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc", ".md"}]
    total = sum(path.stat().st_size for path in assets)
    assert total <= MAX_ASSETS_BYTES, f"the assets hold {total / 2**20:.1f} MiB, at most 40"
    nothing([path.name for path in assets if not path.with_suffix(".md").is_file()], "each asset NAME.ext has a card NAME.md")


def test_annotations_can_be_checked_while_running() -> None:
    """The type hook checks methods one by one, so it cannot know `Self`, and protocols only if they say so."""
    found = []
    for path in SOURCES:
        found += [f"{name_of(path)}:{line} {module}" for line, module in imports(path) if module == "typing.Self"]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and "Protocol" in {ast.unparse(base).partition("[")[0] for base in node.bases}:
                marked = any(ast.unparse(decorator).endswith("runtime_checkable") for decorator in node.decorator_list)
                found += [] if marked else [f"{name_of(path)}:{node.lineno} {node.name} is not runtime_checkable"]
    nothing(found, "annotations can be checked while running: the class's name instead of Self, protocols runtime_checkable")
