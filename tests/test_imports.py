"""The rooms and the way imports run, read from the source: imports inside functions count too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("tokenizer", "var", "sample", "evaluation", "train", "nextscale")  # a room imports only rooms left of it
KNOWN_TO_VAR = ("tokenizer.schedule", "tokenizer.resize")


def modules():
    """Module name -> (path, is it a package's __init__) of every module in a room."""
    found = {"nextscale": ROOT / "nextscale.py"}
    for room in ROOMS[:-1]:
        for path in (ROOT / room).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(node, module):
    """Names of our modules that `node` or anything in it imports when it runs."""
    if is_type_checking(node):
        return
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module}: relative import"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            yield name
    for child in ast.iter_child_nodes(node):
        yield from imported(child, module)


IMPORTS = {name: set(imported(ast.parse(path.read_text()), name)) - {name} for name, path in MODULES.items()}


def room(module):
    return module.partition(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_to_the_left(module):
    for other in IMPORTS[module]:
        assert ROOMS.index(room(other)) <= ROOMS.index(room(module)), f"{module} imports {other}"
        if room(module) == "var" and room(other) == "tokenizer":
            assert other in KNOWN_TO_VAR, f"{module} imports {other}: var may know schedules and sizes, not tokenizers"


def test_methods_know_nothing_of_commands():
    for module in MODULES:
        if room(module) == "sample" and not module.startswith("sample.commands"):
            assert not any(other.startswith("sample.commands") for other in IMPORTS[module]), module


def test_no_cycles():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which shows the cycle


def test_no_module_is_named_like_a_room():
    for module in MODULES:
        for part in module.split(".")[1:]:
            assert part not in ROOMS, f"{module} would shadow the room {part}"


def test_the_front_door_names_exist():
    import nextscale

    for name, module in nextscale.NAMES.items():
        tree = ast.parse(MODULES[module].read_text())
        assert any(getattr(node, "name", None) == name for node in tree.body), f"{module} has no {name}"
    for module, _ in nextscale.COMMANDS.values():
        assert module in MODULES
