"""The options of a command that say how images are made: a plan in words, a YAML file of settings, a refiner."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from sample.own_code import read_plugin


def add_place_options(parser: argparse._ActionsContainer) -> None:
    """Declare --dtype and --device: where a model works, and in how many digits; see `sample.load.resolve_dtype`."""
    words = "float32, bfloat16, float16; auto: bfloat16 on CUDA (float16 on Volta, Turing)"
    parser.add_argument("--dtype", default="auto", help=words)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...")


def add_plan_options(parser: argparse._ActionsContainer) -> None:
    """Declare the settings: what decides how images are drawn, and may be in a file of --plan."""
    parser.add_argument("--guidance", type=by_scale(float), help="strength of guidance; 0 is none")
    parser.add_argument("--top-k", type=by_scale(int), help="draw from the k likeliest tokens; 0 is all")
    parser.add_argument("--top-p", type=by_scale(float), help="then from the likeliest that make up this probability")
    parser.add_argument("--temperature", type=by_scale(float), help="below 1 draws likelier tokens; 1.1,1,1: by scale")
    parser.add_argument(
        "--plan",
        metavar="WORDS",
        help="var; supernet:N, code:N or self:N with N scales before the border; or FILE.yaml of settings",
    )
    parser.add_argument("--depth", help="layers of the plan's subnet, or one number a scale: 4 or 6,4,4")
    parser.add_argument(
        "--cache", help="share of the cache to keep: 10%%, or window:, streaming:, snapkv:, pyramidkv:10%%"
    )
    parser.add_argument(
        "--prune",
        metavar="LIST",
        help="shares of the last scales' tokens to leave out: 50%%, or 40%%,50%%,100%% (FastVAR); or off",
    )
    parser.add_argument("--refiner", metavar="MODEL", help="makes the scales after code:N; it shares the tokenizer")
    parser.add_argument("--aspect", metavar="W:H", help="16:9, 2:3, ... from 3:1 to 1:3 (models with rotary positions)")
    parser.add_argument("--size", help="with or without --aspect: 0.06M, 0.25M, 0.60M or 1M pixels")
    parser.add_argument(
        "--temperature-last", action="store_true", default=None, help="divide by it after top-k and top-p (CoDe)"
    )
    parser.add_argument(
        "--sequential", type=int, metavar="N", help="draw the first N scales token by token (as the model was trained)"
    )
    parser.add_argument(
        "--mask-schedule",
        metavar="LIST",
        help="tokens that each pass over a scale settles, from the first scale on: 1/1,3/1,1,2,5; or off (HMAR)",
    )
    parser.add_argument("--guidance-ramp", choices=["linear", "constant"], help="guidance over the scales")
    parser.add_argument(
        "--guidance-until", type=int, metavar="N", help="guide the first N scales only: those after cost half as much"
    )
    parser.add_argument(
        "--guidance-blocks", type=block_list, metavar="LIST", help="guide hidden states after these blocks: -2 or -5,-1"
    )
    add_plugin_option(parser)


def add_plugin_option(parser: argparse._ActionsContainer) -> None:
    """Declare --plugin; see `sample.plugins`."""
    parser.add_argument(
        "--plugin",
        action="append",
        type=plugin_text,
        metavar="MODULE:NAME",
        help='a hook or a function of the plan of your own; "mine:Fade(0.3, k=2)" with arguments; may be given again',
    )


@cache
def settings() -> tuple[str, ...]:
    """The names of what `add_plan_options` declares."""
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    return tuple(vars(parser.parse_args([])))


def by_scale(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument type: one value, or values for every scale after commas."""

    def read(text: str) -> Any:
        values = [kind(part) for part in text.split(",")]
        return values[0] if len(values) == 1 else values

    read.__name__ = kind.__name__
    return read


def block_list(text: str) -> list[int]:
    """An argument type: block numbers after commas, negative from the end."""
    return [int(part) for part in text.split(",")]


block_list.__name__ = "list of blocks, as -2 or -5,-1,"  # argparse says: invalid ... value


def plugin_text(text: str) -> str:
    """An argument type: MODULE:NAME, with arguments or without, as `sample.own_code.read_plugin` reads them."""
    try:
        read_plugin(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def number_or_text(text: str) -> float | str:
    """A number where it is one: a share."""
    try:
        return float(text)
    except ValueError:
        return text


def yes_or_no(text: str) -> bool:
    """true or false, as YAML writes them."""
    known = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


NOTHING = ("", "null", "Null", "NULL", "~")  # how YAML says that there is no value
KINDS: dict[str, Callable[[str], Any]] = {  # what settings of a file are read as; the others are texts
    "depth": by_scale(int),
    "cache": number_or_text,
    "guidance": by_scale(float),
    "top_k": by_scale(int),
    "top_p": by_scale(float),
    "temperature": by_scale(float),
    "temperature_last": yes_or_no,
    "guidance_blocks": block_list,
    "guidance_until": int,
    "sequential": int,
}


def how_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line, and under it the YAML file of --plan, say of `settings`; only what is given.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it holds something else.
    """
    given = {name: getattr(args, name, None) for name in settings()}
    if given["plan"] is not None and given["plan"].endswith((".yaml", ".yml")):
        given = read_settings(Path(given.pop("plan"))) | {k: v for k, v in given.items() if v is not None}
    return {name: value for name, value in given.items() if value is not None}


def plugins_of(args: argparse.Namespace) -> list[str]:
    """The texts of --plugin, or of the file of --plan."""
    return how_options(args).get("plugin", [])


def call_settings(args: argparse.Namespace) -> dict[str, Any]:
    """`how_options` as the pipeline's call names them; without the refiner, which is loaded with the model, and without
    plugins, which `sample.plugins.plugged` puts into the call.
    """
    how = how_options(args)
    for name in ("refiner", "plugin"):
        how.pop(name, None)
    if isinstance(how.get("guidance"), list) and getattr(args, "guidance_ramp", None) is not None:
        raise ValueError(f"--guidance-ramp {args.guidance_ramp} is for one --guidance, which here is given by scale")
    if "guidance" in how:
        how["guidance_scale"] = how.pop("guidance")
    return how


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; see `how_options`. Values are read as on the command line (16:9 is an aspect)."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"--plan {path} is not a file")
    try:
        held = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # texts, and lists of texts
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--plan {path} is not YAML: {' '.join(str(error).split())}") from None
    unknown = sorted(set(held) - set(settings())) if isinstance(held, dict) else [type(held).__name__]
    if unknown:
        raise ValueError(f"--plan {path} may hold {', '.join(settings())}, and has {', '.join(map(str, unknown))}")
    return {name: read_setting(path, name, value) for name, value in held.items() if value not in NOTHING}


def mask_schedule_text(value: Any) -> Any:
    """A mask schedule as on the command line, of YAML's lists: [[1], [1, 3]] and ["1", "1,3"] are 1/1,3."""
    if not isinstance(value, list):
        return value
    scales = [part if isinstance(part, str) else ",".join(map(str, part)) for part in value]
    return "/".join(scales)


def read_setting(path: Path, name: str, value: Any) -> Any:
    """One setting of a YAML file: a text, or a list of texts for all scales."""
    value = mask_schedule_text(value) if name == "mask_schedule" else value
    texts = value if isinstance(value, list) else [value]
    try:
        if not all(isinstance(text, str) for text in texts):
            raise ValueError
        if name == "plugin":
            return [plugin_text(text) for text in texts]
        text = ",".join(texts)
        return KINDS.get(name, str)(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(f"--plan {path}: {name} cannot be {value!r}, see nextscale sample --help") from None


def whole_numbers(name: str, text: str) -> list[int]:
    """The numbers of "1,4".

    Raises:
        ValueError: if one is not a whole number above 0.
    """
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be whole numbers above 0 with commas between them, got {text!r}")
    return [int(part) for part in parts]
