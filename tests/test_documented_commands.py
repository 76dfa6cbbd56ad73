"""Commands in the docs of evaluation parse, and their options make sense."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

import nextscale
from evaluation import evaluate_options as options
from evaluation import run
from sample import cli, search_options
from sample.scene_reward import Caption

DOCS = Path(nextscale.__file__).parent / "docs"


def commands() -> list[list[str]]:
    """Every shell line of the pages, as words, continued lines joined."""
    found = []
    for page in ("reproducing-fid.md", "scaling.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [words for words in found if words]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_documented_commands_parse(words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    if "evaluation.run" in words:
        run.configure(parser)
        run.check(parser.parse_args(words[words.index("evaluation.run") + 1 :]))
        return
    assert words[0] == "nextscale"
    importlib.import_module(nextscale.COMMANDS[words[1]][0]).configure(parser)
    args = parser.parse_intermixed_args(words[2:])
    if words[1] == "evaluate":
        options.check(args)


def bundled_prompts() -> list[str]:
    """What pages and helps draw with the bundled model."""
    pages = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
    text = "\n".join([*(page.read_text(encoding="utf-8") for page in pages), cli.EXAMPLES, search_options.__doc__])
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    asked = [line for line in lines if "--model" not in line or "--model scenes" in line]
    return sorted({prompt for line in asked for prompt in re.findall(r'nextscale sample "([^"]+)"', line)})


def test_the_bundled_model_understands_what_it_is_shown_with():
    prompts = bundled_prompts()
    assert len(prompts) >= 5
    for prompt in prompts:
        Caption.of(prompt)
