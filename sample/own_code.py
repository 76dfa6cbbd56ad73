"""Code of the user's that a command is told by name: MODULE:NAME, any module that Python can import, the current
folder's, too. Nothing heavy is imported here.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Named:
    """What `MODULE:NAME(...)` says.

    Attributes:
        module, name: what to import.
        args, options: what it is called with; numbers, texts, lists and the like.
    """

    module: str
    name: str
    args: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


def read_plugin(text: str) -> Named:
    """Named("mine", "Falling", (0.3,)) of "mine:Falling(0.3)". Nothing is imported.

    Raises:
        ValueError: if it is not MODULE:NAME or MODULE:NAME(arguments), these written out.
    """
    module, _, rest = text.strip().partition(":")
    try:
        found = ast.parse(rest.strip(), mode="eval").body
        call = found if isinstance(found, ast.Call) else ast.Call(found, [], [])
        args = tuple(ast.literal_eval(argument) for argument in call.args)
        options = tuple((keyword.arg, ast.literal_eval(keyword.value)) for keyword in call.keywords)
        if not isinstance(call.func, ast.Name) or any(name is None for name, _ in options):
            raise ValueError
        if not all(part.isidentifier() for part in module.split(".")) or len(dict(options)) < len(options):
            raise ValueError
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # of ast, on odd arguments
        raise ValueError(f"plugin must be MODULE:NAME or MODULE:NAME(0.3, k=2), got {text!r}") from None
    return Named(module, call.func.id, args, options)


def find_named(option: str, module: str, name: str) -> Any:
    """What an importable module calls `name`; `option` is what it is to the user.

    Raises:
        ValueError: if there is no such module, it fails, or nothing has that name in it.
    """
    look_here()
    try:
        held = importlib.import_module(module)
    except Exception as error:
        kind = "" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: "
        raise ValueError(f"{option} {module}:{name} cannot be imported: {kind}{error}") from error
    if not hasattr(held, name):
        raise ValueError(f"{option} {module}:{name} cannot be imported: {module} has no {name}")
    return getattr(held, name)


def look_here() -> None:
    """Let modules of the current folder be found, as Python's own `-m` does, for a command that is installed."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def module_digest(module: str) -> str | None:
    """Twelve hexadecimal digits of a Python module's file, not of what it imports; None if there is no such file."""
    look_here()
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # of a package that is not one, a module without a specification
        return None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return None
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:12]


def plugin_settings(plugins: Sequence[str], call: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """What decides about the images: the texts, a digest of each one's module and, with hooks, which may look at all of
    a batch, its size; empty without plugins.

    Args:
        call: as `sample.plugins.plugged` made it.
    """
    if not plugins:
        return {}
    digests = [module_digest(read_plugin(text).module) for text in plugins]
    together = {"batch_size": batch_size} if call.get("hooks") else {}
    return {"plugin": list(plugins), "plugin_digest": digests, **together}
