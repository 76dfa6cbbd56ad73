"""Settings shared by every stage, and the command line that reads them: defaults < YAML < flags.

A stage builds one parser out of keyword-only dataclasses and model signatures; a mistyped key is an error. The
resolved configuration is saved beside the run.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from evaluation.report import flat
from sample.files import check_place
from sample.processes import line_about, process_name, speaks

LESS_MEMORY = "fewer at once (run.micro_batch, cache.batch_size) or run.gradient_checkpointing=true take less"


@dataclass(kw_only=True)
class RunConfig:
    """How long, how fast and where a run goes.

    Args:
        run_dir: folder of the run, made if missing; the same folder again resumes it. Training needs one.
        total_images: images to train on, over all processes.
        batch_size: images per optimiser step, over all processes.
        micro_batch: images per forward pass and process; as many as fit the batch when null.
        seed: of the data's order, crops, prompt dropping and initial weights.
        precision: no (float32), bf16 or fp16; what `accelerate launch` says when null. On CUDA the last two also let
            what stays float32, as the head, take TensorFloat-32 (10 bits of mantissa), as VAR's trainer does.
        half_stream: with bf16 or fp16, hold what goes from block to block of a transformer in it as well, as VAR's
            trainer does: less memory to move, fewer digits in the sum over blocks.
        ema: decay of the averaged weights that are validated and exported; 0 turns averaging off.
        log_every: steps between lines of metrics.jsonl.
        validate_every: steps between validations and preview grids.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints to keep.
        validation_images: images a validation looks at, the same each time, from all over the validation data.
        previews: pictures in the grids that a validation draws; 0 draws none.
        workers: data loading processes per training process; 0 loads in the training process.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        compile: compile the parts of fixed shape with torch.compile, on CUDA and on CPUs with a C++ compiler.
        cpu: train on the CPU even if there is a GPU.
        tensorboard: also write a tensorboard log.
        bar_every: seconds between updates of the progress bar.
    """

    run_dir: str = ""
    total_images: int = 1_000_000
    batch_size: int = 64
    micro_batch: int | None = None
    seed: int = 0
    precision: str | bool | None = None
    half_stream: bool = False
    ema: float = 0.999
    log_every: int = 50
    validate_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 2
    validation_images: int = 256
    previews: int = 16
    workers: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    cpu: bool = False
    tensorboard: bool = False
    bar_every: float = 1.0

    def __post_init__(self) -> None:
        counts = ("total_images", "batch_size", "log_every", "validate_every", "checkpoint_every", "keep")
        for name in (*counts, "validation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be 1 or more, got {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"run.micro_batch must be 1 or more, got {self.micro_batch}")
        self.precision = yaml_word(self.precision)
        if self.precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"run.precision must be no, bf16 or fp16, got {self.precision!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"run.ema must be in [0, 1), got {self.ema}")
        for name in ("seed", "workers", "previews", "bar_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return Path(self.run_dir) / "checkpoints"

    @property
    def latest(self) -> Path:
        """The link to the newest weights."""
        return Path(self.run_dir) / "latest"

    @property
    def metrics(self) -> Path:
        """The metrics file, one JSON object per line."""
        return Path(self.run_dir) / "metrics.jsonl"

    def check_named(self) -> None:
        """Raise ValueError unless the run has a folder: a command without a configuration trains nothing."""
        if not self.run_dir:
            raise ValueError("run.run_dir must name the run's folder: give --config FILE, or --run.run_dir=FOLDER")
        check_place("run.run_dir", self.run_dir, folder=True)

    def micro(self, processes: int) -> int:
        """Images per forward pass of one process."""
        return self.micro_batch or max(1, self.batch_size // processes)

    def accumulation(self, processes: int) -> int:
        """Forward passes per optimiser step."""
        return self.batch_size // (self.micro(processes) * processes)

    def check_split(self, processes: int) -> None:
        """Raise ValueError unless batch_size = a whole number x micro_batch x processes."""
        if self.batch_size % (self.micro(processes) * processes):
            raise ValueError(
                f"run.batch_size {self.batch_size} must be a multiple of micro_batch x processes = "
                f"{self.micro(processes)} x {processes}"
            )


def yaml_word(value: str | bool | None) -> str | bool | None:
    """What is meant by a value that YAML reads as false where it says a bare no."""
    return "no" if value is False else value


def base_parser(description: str) -> ArgumentParser:
    """A parser with --config; a stage adds its own dataclasses."""
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; flags go over it")
    return parser


def save_config(parser: ArgumentParser, config: Namespace, run_dir: str) -> None:
    """Write the resolved configuration to RUN_DIR/config.yaml, on the main process; what it changes is printed."""
    from sample.files import write_text

    if os.environ.get("RANK", "0") != "0":
        return
    path, text = Path(run_dir) / "config.yaml", parser.dump(config, skip_unset=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        before, now = (flat(yaml.safe_load(source)) for source in (path.read_text(encoding="utf-8"), text))
        for name in sorted({**before, **now}):
            if before.get(name) != now.get(name):
                print(f"{run_dir}: {name} was {before.get(name)}, is {now.get(name)}", file=sys.stderr)
    write_text(path, text, durable=True)


def exit_code(work: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a stage's `work(argv)`; user mistakes become one line on stderr.

    Returns:
        0; 2 for bad input; 3 for a loss that is not finite; 128 + signal when stopped.
    """
    from safetensors import SafetensorError

    from train.session import NonFiniteError, Stopped

    try:
        work(argv)
    except (
        ArgumentError,
        ValueError,
        TypeError,
        OSError,
        SafetensorError,
    ) as error:  # the last one of a full disk, too
        return _say(error, 2)
    except NonFiniteError as error:
        return _say(error, 3)
    except (RuntimeError, MemoryError) as error:
        if re.match(r"DataLoader worker \(pid.*(killed|exited)", str(error)):
            lost = "a data worker was killed (out of memory?): take fewer run.workers; the same command goes on"
            return _say(ValueError(lost), 2)
        line = line_about(error, LESS_MEMORY)
        if line is None:
            raise
        return _say(ValueError(line), 2)
    except Stopped as stopped:
        return _say(stopped, stopped.code)
    except KeyboardInterrupt:
        return _say(KeyboardInterrupt("interrupted; the same command goes on with what is missing"), 130)
    return 0


def _say(error: BaseException, code: int) -> int:
    """Print an error in one line, in one of the processes that meet it."""
    if speaks(everywhere=code >= 3):
        text = str(error)
        if text.startswith("Caught ") and " in DataLoader worker" in text:  # the traceback of another process
            text = text.rpartition(f"{type(error).__name__}: ")[2]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        print(f"{'' if code > 100 else f'error{process_name()}: '}{' '.join(lines)}", file=sys.stderr)
    return code
