"""The quick start runs: its Python as it stands, its commands as far as the options."""

import argparse
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

import nextscale

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "quickstart.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands():
    lines = [line.partition(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line.partition("-m nextscale")[2] or line)[0 if "-m nextscale" in line else 1 :]
            for line in lines if "nextscale sample" in line]  # fmt: skip


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_commands_parse(argv):
    from sample.commands.sample_cli import configure

    parser = argparse.ArgumentParser(exit_on_error=False)
    configure(parser)
    assert argv[0] == "sample"
    args = parser.parse_args(argv[1:])
    assert args.prompt or args.prompts or args.classes


def test_options_exist():
    from sample.commands import demo_cli, sample_cli

    parser = argparse.ArgumentParser(conflict_handler="resolve")
    for command in (sample_cli, demo_cli):
        command.configure(parser)
    for option in re.findall(r"--[a-z][a-z-]+", TEXT):
        assert option in {*parser._option_string_actions, "--help"}, option


def test_python_runs(text_pipeline, text_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sample.load.load_pipeline", lambda name, **_: text_pipeline)
    first = commands()[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert nextscale.main([*first, "--model", str(text_folder), "--device", "cpu"]) == 0
        names = {}
        for block in blocks("python"):
            exec(block, names)
    assert (tmp_path / "star.png").exists()
    assert "'prompt': 'a red star left of a blue heart'" in printed.getvalue()
    assert "[7, 8, 9, 10]" in printed.getvalue()
