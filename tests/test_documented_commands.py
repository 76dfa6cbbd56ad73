"""Commands in the README and the docs parse, and their options make sense together."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import jsonargparse
import pytest

import nextscale
from evaluation import evaluate_options, run
from sample.commands import job, sample_cli, sampling_options, search_options
from sample.scene_reward import Caption

ROOT = Path(nextscale.__file__).parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "sample" / "bundled" / "README.md")
LAUNCHERS = ("python", "torchrun", "accelerate")


def commands() -> list[list[str]]:
    """Every nextscale command and Python module of a page's shell blocks, as words, continued lines joined."""
    found = []
    for page in PAGES:
        variables: dict[str, str] = {}
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                for name, value in variables.items():
                    line = line.replace(f"${name}", value)
                words = shlex.split(line, comments=True)
                if words and re.match(r"\w+=", words[0]):
                    name, _, value = words[0].partition("=")
                    variables[name] = value
                elif words and Path(words[0]).name == "nextscale":
                    found.append(["nextscale", *words[1:]])
                elif words and words[0] in LAUNCHERS and "-m" in words:
                    found.append(words)
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


class Parsed(BaseException):
    """Raised once a command line is read: nothing is done after that."""


@pytest.fixture
def stops_when_parsed(monkeypatch):
    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        if "parse_args" not in vars(parser):
            continue

        def parse(self, *arguments, read=parser.parse_args, **options):
            raise Parsed(read(self, *arguments, **options))

        monkeypatch.setattr(parser, "parse_args", parse)


@pytest.mark.parametrize("words", [words for words in commands() if words[0] != "nextscale"], ids=" ".join)
def test_modules_take_their_options(words, stops_when_parsed, monkeypatch):
    monkeypatch.chdir(ROOT)
    place = words.index("-m")
    if "--config_file" in words[:place]:
        assert Path(words[words.index("--config_file") + 1]).is_file()
    module, arguments = words[place + 1], words[place + 2 :]
    if "configs/var/MINE.yaml" in arguments:
        arguments[arguments.index("configs/var/MINE.yaml")] = "configs/var/scenes.yaml"
    if module == "nextscale":
        return check(arguments)
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(module).main(arguments)
    if module == "evaluation.run":
        run.check(parsed.value.args[0])


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "nextscale"], ids=" ".join)
def test_commands_take_their_options(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpg_bench" / "prompts").mkdir(parents=True)  # of others
    check(words[1:])


def check(words: list[str]) -> None:
    """Raise whatever is said against a `nextscale` command before its model is loaded."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(nextscale.COMMANDS[words[0]][0]).configure(parser)
    args = parser.parse_intermixed_args(words[1:])
    if words[0] == "evaluate":
        evaluate_options.check(args)
    if words[0] in ("sample", "edit"):
        sampling_options.check_sampling(args)
        job.check_out(args.out, npz=words[0] == "sample")
        search_options.search_settings(args)
        search_options.images_of_each(args)


def bundled_prompts() -> list[str]:
    """What pages and helps draw with the bundled model."""
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    text = "\n".join([*pages, sample_cli.EXAMPLES, search_options.__doc__])
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    asked = [line for line in lines if "--model" not in line or "--model scenes" in line]
    return sorted({prompt for line in asked for prompt in re.findall(r'nextscale sample "([^"]+)"', line)})


def test_the_bundled_model_understands_what_it_is_shown_with():
    prompts = bundled_prompts()
    assert len(prompts) >= 5
    for prompt in prompts:
        Caption.of(prompt)
