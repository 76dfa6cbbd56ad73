"""Methods of one's own for the commands: `--plugin MODULE:NAME`, as `sample.reward_names` takes rewards.

NAME is a `Hook` (a class, of which the command makes one, or an object), or a function of a `Plan` that returns a plan.
`MODULE:NAME(0.3, k=2)` gives it these arguments, a function after the plan. MODULE is any that Python can import, in
the current folder, too. A model's own settings never name a plugin: loading a model runs no code that came with it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sample.pipeline import NextScalePipeline


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
        if not all(part.isidentifier() for part in module.split(".")):
            raise ValueError
    except (SyntaxError, ValueError):
        raise ValueError(f"plugin must be MODULE:NAME or MODULE:NAME(0.3, k=2), got {text!r}") from None
    return Named(module, call.func.id, args, options)


def load_plugin(text: str) -> Any:
    """The `Hook` of a text, or what makes another plan of a plan.

    Raises:
        ValueError: if there is none, or it cannot be had with these arguments.
    """
    from sample.state import Hook

    said = read_plugin(text)
    found, options = find_named("plugin", said.module, said.name), dict(said.options)
    if isinstance(found, Hook):
        if said.args or options:
            raise ValueError(f"plugin {text} is an object, which takes no arguments")
        return found
    if not callable(found):
        raise ValueError(f"plugin {text} must be a Hook or a function of a plan, and is a {type(found).__name__}")
    a_class = isinstance(found, type)
    if a_class and not issubclass(found, Hook):
        raise ValueError(f"plugin {text} is a class, and no Hook (sample.state.Hook)")
    try:
        inspect.signature(found).bind(*([] if a_class else ["plan"]), *said.args, **options)
    except TypeError as error:
        raise ValueError(f"plugin {text}: {error}") from None
    return found(*said.args, **options) if a_class else partial(_changed, text, found, said.args, options)


def _changed(text: str, function: Any, args: Sequence[Any], options: dict[str, Any], plan: Any) -> Any:
    from sample.plan import Plan

    changed = function(plan, *args, **options)
    if not isinstance(changed, Plan):
        raise ValueError(f"plugin {text} must return a Plan, and returned {type(changed).__name__}")
    return changed


def plugged(pipeline: NextScalePipeline, call: dict[str, Any], plugins: Sequence[str]) -> dict[str, Any]:
    """Settings of the pipeline's call with its plan as the plugins change it, one after the other, and their hooks.

    Raises:
        ValueError, TypeError: as `load_plugin`; if the settings make no plan, or what a plugin makes of it is none.
    """
    if not plugins:
        return call
    from sample.pipeline import SAMPLING
    from sample.state import Hook

    plan = pipeline.make_plan(**{name: value for name, value in call.items() if name in SAMPLING})
    hooks = []
    for plugin in map(load_plugin, plugins):
        if isinstance(plugin, Hook):
            hooks.append(plugin)
        else:
            plan = plugin(plan)
    return {**{name: value for name, value in call.items() if name not in SAMPLING}, "plan": plan, "hooks": hooks}


def plugin_settings(plugins: Sequence[str]) -> dict[str, Any]:
    """What decides about the images: the texts, and a digest of each one's module; empty without plugins."""
    if not plugins:
        return {}
    return {"plugin": list(plugins), "plugin_digest": [module_digest(read_plugin(text).module) for text in plugins]}


def find_named(option: str, module: str, name: str) -> Any:
    """What an importable module calls `name`; `option` is what it is to the user.

    Raises:
        ValueError: if there is no such module, or nothing of that name in it.
    """
    if os.getcwd() not in sys.path:  # where a user's module is, for a command that is installed
        sys.path.insert(0, os.getcwd())
    try:
        held = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{option} {module}:{name} cannot be imported: {error}") from None
    if not hasattr(held, name):
        raise ValueError(f"{option} {module}:{name} cannot be imported: {module} has no {name}")
    return getattr(held, name)


def module_digest(module: str) -> str | None:
    """Twelve hexadecimal digits of a Python module's file in the current folder; None where that is not its place."""
    path = Path.cwd().joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return None
