"""A ladder of sizes, read from YAML: which runs there are, and the commands that train and measure each of them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Rung:
    """One run of the ladder: a name, a seed, flags over the base configuration."""

    name: str
    seed: int
    flags: dict[str, Any]


@dataclass(frozen=True)
class Ladder:
    """What a scaling configuration says.

    base: configuration of train.train_var.  folder: where the runs go.  launch: the words before `-m`.
    flags: over the base, for all sizes.  rungs: the runs, smallest first.  per_tag: prompts a tag of the evaluation, 0
    for none.  evaluate: more options of the evaluation.
    """

    base: Path
    folder: Path
    launch: list[str]
    flags: dict[str, Any]
    rungs: list[Rung]
    per_tag: int = 0
    evaluate: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Ladder:
        """From YAML. Raises FileNotFoundError without the file, ValueError on wrong keys, or two runs of one name."""
        import yaml

        if not path.is_file():
            raise FileNotFoundError(f"--config {path} does not exist")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise ValueError(f"--config {path} must hold base, folder, models and so on, and holds {content!r}")
        known = {"base", "folder", "launch", "flags", "models", "per_tag", "evaluate"}
        wrong = sorted(set(content) - known) + sorted({"base", "folder", "models"} - set(content))
        if wrong:
            raise ValueError(
                f"--config {path} must hold base, folder, models, maybe launch, flags, per_tag, evaluate: {wrong[0]}"
            )
        check_kinds(path, content)
        rungs = []
        for model in content["models"]:
            seeds = model.get("seeds", [0])
            size = {f"transformer.{name}": value for name, value in model.items() if name not in ("seeds", "flags")}
            stem = "-".join(f"{name[0]}{value}" for name, value in model.items() if name in ("depth", "width"))
            rungs += [Rung(f"{stem}-s{seed}", seed, {**size, **model.get("flags", {})}) for seed in seeds]
        check_names(path, rungs)
        return cls(
            Path(content["base"]),
            Path(content["folder"]),
            shlex.split(content.get("launch", "")) or [sys.executable],
            content.get("flags", {}),
            rungs,
            content.get("per_tag", 0),
            content.get("evaluate", {}),
        )

    def check_trainable(self) -> None:
        """Before hours of training: raise ValueError if there are too few sizes for a law, or no base."""
        from evaluation.scaling import LEAST

        sizes = {
            tuple(sorted((name, str(value)) for name, value in rung.flags.items() if name.startswith("transformer.")))
            for rung in self.rungs
        }
        if len(sizes) < LEAST:
            raise ValueError(f"models must be of {LEAST} sizes or more to fit a law, got {len(sizes)}")
        if not self.base.is_file():
            raise ValueError(f"base must be a configuration of train.train_var, and {self.base} does not exist")

    def run_folder(self, rung: Rung) -> Path:
        """Where a run goes."""
        return self.folder / rung.name

    def training(self, rung: Rung) -> list[str]:
        """The command that trains a rung, and resumes it."""
        return [*self.launch, *self.training_words(rung)]

    def training_words(self, rung: Rung) -> list[str]:
        """That command without what launches it, which decides nothing about the run."""
        flags = {**self.flags, **rung.flags, "run.run_dir": self.run_folder(rung), "run.seed": rung.seed}
        words = [f"--{name}={'null' if value is None else value}" for name, value in flags.items()]
        return ["-m", "train.train_var", "--config", str(self.base), *words]

    def evaluation(self, rung: Rung) -> list[str]:
        """The command that measures a trained rung."""
        return [sys.executable, *self.evaluation_words(rung)]

    def evaluation_words(self, rung: Rung) -> list[str]:
        """That command without the interpreter."""
        run = self.run_folder(rung)
        words = ["--model", run, "--suite", "scenes", "--per-tag", self.per_tag, "--work", run / "evaluation"]
        words += [f"--{name}={value}" for name, value in self.evaluate.items()]
        return ["-m", "nextscale", "evaluate", *map(str, words), "--out", str(run / "evaluation.json")]

    def check_finished(self) -> None:
        """Raise ValueError if a run or evaluation that is done was made by another command than this ladder's.

        Those made before commands were kept say nothing.
        """
        for rung in self.rungs:
            run = self.run_folder(rung)
            _check_made(run / "done", self.training_words(rung))
            if self.per_tag and (run / "evaluation.json").exists():
                _check_made(run / "evaluated", self.evaluation_words(rung))


def check_kinds(path: Path, content: dict[str, Any]) -> None:
    """Raise ValueError, naming it, if an entry of a ladder is not of its kind."""
    kinds = {"base": (str, "a file"), "folder": (str, "a folder"), "launch": (str, "a command")}
    kinds |= {"flags": (dict, "options"), "models": (list, "a list of sizes"), "evaluate": (dict, "options")}
    kinds |= {"per_tag": (int, "a number")}
    for name, (kind, words) in kinds.items():
        if name in content and not isinstance(content[name], kind):
            raise ValueError(f"--config {path}: {name} must be {words}, got {content[name]!r}")
    for model in content["models"]:
        sizes = [model[name] for name in ("depth", "width") if name in model] if isinstance(model, dict) else []
        if not sizes or not all(isinstance(size, int) for size in sizes):
            raise ValueError(f"--config {path}: models must be like {{depth: 4, width: 128}}, got {model!r}")
        seeds, flags = model.get("seeds", [0]), model.get("flags", {})
        if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
            raise ValueError(f"--config {path}: seeds of a model must be a list of numbers, got {seeds!r}")
        if not isinstance(flags, dict):
            raise ValueError(f"--config {path}: flags of a model must be options, got {flags!r}")


def check_names(path: Path, rungs: Sequence[Rung]) -> None:
    """Raise ValueError, naming both, if two rungs of a ladder would share a folder."""
    named: dict[str, Rung] = {}
    for rung in rungs:
        other = named.setdefault(rung.name, rung)
        if other is not rung:
            raise ValueError(
                f"--config {path}: models {other.flags} and {rung.flags} are both called {rung.name}, by depth, width "
                "and seed: leave one out, or give it another ladder and folder"
            )


def _check_made(note: Path, words: Sequence[str]) -> None:
    """Raise ValueError unless the command kept in a note, if there is one, is of these words."""
    before = shlex.split(note.read_text(encoding="utf-8")) if note.exists() else []
    if before and sorted(before) != sorted(words):
        lost, new = ([w for w in some if w not in others] for some, others in ((before, words), (words, before)))
        raise ValueError(
            f"{note} is of a run with {shlex.join(lost) or 'no more'}, and the ladder says "
            f"{shlex.join(new) or 'no more'}: give another folder, or remove {note.parent}"
        )
