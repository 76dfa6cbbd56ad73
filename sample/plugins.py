"""Methods of one's own for the commands: `--plugin MODULE:NAME`, as `sample.reward_names` takes rewards.

NAME is a `Hook` (a class, of which the command makes one, or an object), or a function of a `Plan` that returns a plan.
`MODULE:NAME(0.3, k=2)` gives it these arguments, a function after the plan. A model's own settings never name a plugin:
loading a model runs no code that came with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from sample.own_code import find_named, read_plugin
from sample.pipeline import SAMPLING, NextScalePipeline
from sample.plan import Plan
from sample.state import GenerationState, Hook


def load_plugin(text: str) -> Any:
    """The hook of a text (a `PluginHook`), or what makes another plan of a plan.

    Raises:
        ValueError: if there is none, or it cannot be had with these arguments.
    """
    said = read_plugin(text)
    found, options = find_named("plugin", said.module, said.name), dict(said.options)
    if isinstance(found, Hook):
        if said.args or options:
            raise ValueError(f"plugin {text} is an object, which takes no arguments")
        return PluginHook(text, found)
    if not callable(found):
        raise ValueError(f"plugin {text} must be a Hook or a function of a plan, and is a {type(found).__name__}")
    a_class = isinstance(found, type)
    if a_class and not issubclass(found, Hook):
        raise ValueError(f"plugin {text} is a class, and no Hook (sample.state.Hook)")
    try:
        inspect.signature(found).bind(*([] if a_class else ["plan"]), *said.args, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"plugin {text}: {error}") from None
    if a_class:
        return PluginHook(text, named(text, found, *said.args, **options))
    return partial(_changed, text, found, said.args, options)


def _changed(text: str, function: Callable, args: Sequence[Any], options: dict[str, Any], plan: Plan) -> Plan:
    changed = named(text, function, plan, *args, **options)
    if not isinstance(changed, Plan):
        raise ValueError(f"plugin {text} must return a Plan, and returned {type(changed).__name__}")
    return changed


def named(text: str, function: Callable, *args: Any, **options: Any) -> Any:
    """What a plugin's function returns. What it raises becomes a ValueError that names the plugin."""
    try:
        return function(*args, **options)
    except Exception as error:
        raise ValueError(f"plugin {text} raised {type(error).__name__}: {error}") from error


class PluginHook(Hook):
    """A plugin's hook, whose mistakes name the plugin; see `sample.state.Hook`."""

    def __init__(self, text: str, hook: Hook):
        self.text, self.hook = text, hook

    def __str__(self) -> str:
        return f"plugin {self.text}"

    def of_images(self, images: Sequence[int]) -> Hook:
        """As the plugin's."""
        return PluginHook(self.text, named(self.text, self.hook.of_images, images))

    def on_start(self, state: GenerationState) -> None:
        """As the plugin's."""
        named(self.text, self.hook.on_start, state)

    def on_scale_begin(self, state: GenerationState, k: int) -> None:
        """As the plugin's."""
        named(self.text, self.hook.on_scale_begin, state, k)

    def on_tokens(
        self, state: GenerationState, k: int, logits_BlV: torch.Tensor, tokens_Bl: torch.Tensor
    ) -> torch.Tensor:
        """As the plugin's."""
        return named(self.text, self.hook.on_tokens, state, k, logits_BlV, tokens_Bl)

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """As the plugin's."""
        named(self.text, self.hook.on_scale_end, state, k)


def plugged(pipeline: NextScalePipeline, call: dict[str, Any], plugins: Sequence[str]) -> dict[str, Any]:
    """Settings of the pipeline's call with its plan as the plugins change it, one after the other, and their hooks.

    Raises:
        ValueError, TypeError: as `load_plugin`; if the settings make no plan, or what a plugin makes of it is none.
    """
    if not plugins:
        return call
    plan = pipeline.make_plan(**{name: value for name, value in call.items() if name in SAMPLING})
    hooks = []
    for plugin in map(load_plugin, plugins):
        if isinstance(plugin, Hook):
            hooks.append(plugin)
        else:
            plan = plugin(plan)
    return {**{name: value for name, value in call.items() if name not in SAMPLING}, "plan": plan, "hooks": hooks}
