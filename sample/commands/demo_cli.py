"""`nextscale demo`: its options, and the server of the page. Gradio and torch are imported when it starts."""

from __future__ import annotations

import argparse
import importlib.util

from sample.commands.plan_options import add_plugin_option
from sample.commands.sampling_options import add_model_options, open_model

EXAMPLES = """examples:
  nextscale demo                                           the bundled model
  nextscale demo --model runs/cifar10 --device cuda
  nextscale demo --host 0.0.0.0 --port 8000 --no-browser   for the machines of your network, without a password
  nextscale demo --share                                   a public address for three days, by way of Gradio's servers

The page shows each picture from coarse to fine, and the command that makes it again."""

PLACES = {"dtype": "auto", "fast": "auto", "device": "auto", "offload": "none", "text_device": None}  # unless given


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nextscale demo`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "A page in your browser to draw and edit on (needs Gradio: pip install 'nextscale[demo]')."
    parser.epilog = EXAMPLES
    model = parser.add_argument_group("with what")
    add_model_options(model)
    model.add_argument("--refiner", metavar="MODEL", help="for --plan code:N; it shares the tokenizer")
    model.add_argument("--reward", help="of searches, as of nextscale sample (scenes: scenes)")
    add_plugin_option(model)
    model.add_argument("--most", type=int, default=32, metavar="N", help="images, or candidates, at once (32)")
    where = parser.add_argument_group("for whom")
    where.add_argument("--host", default="127.0.0.1", help="the address to serve (127.0.0.1: this machine only)")
    where.add_argument("--port", type=int, help="its port (the first free one from 7860 on)")
    where.add_argument("--share", action="store_true", help="also under a public address, by way of Gradio's servers")
    where.add_argument("--no-browser", action="store_true", help="open no browser")


def run(args: argparse.Namespace) -> int:
    """Serve the page until interrupted.

    Returns:
        0.

    Raises:
        ValueError, FileNotFoundError: on options that make no sense, naming them; if Gradio is not there.
    """
    if args.most < 1:
        raise ValueError(f"--most must be 1 or more, got {args.most}")
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ValueError(f"--port must be in [1, 65535], got {args.port}")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs Gradio: pip install 'nextscale[demo]', or pip install gradio")

    from sample.commands.demo import Painter
    from sample.commands.demo_page import build, serve
    from sample.plugins import plugged

    _, pipeline = open_model(args)
    given = {name: getattr(args, name) for name, usual in PLACES.items() if getattr(args, name) != usual}
    places = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    places += [f"--plugin={text}" for text in args.plugin or []]
    plugged(pipeline, {}, args.plugin or [])  # what cannot be is said now
    named = {"model": args.model, "refiner": args.refiner, "places": places, "reward": args.reward}
    painter = Painter(pipeline, **named, most=args.most)
    serve(build(painter), host=args.host, port=args.port, share=args.share, browser=not args.no_browser)
    return 0
