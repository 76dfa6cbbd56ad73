"""A training small enough for a test, and child processes to run it in: a forked child can be killed for real."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from train.config import RunConfig
from train.loop import run
from train.optimizers import Branch, OptimizerConfig
from train.session import Objective, Task
from train.stream import StreamDataset

# A test process's own: below those that systems hand out, of which gloo takes many, and apart from other processes'.
PORTS = count(10000 + 64 * os.getpid() % 22000)


class Rows(Dataset):
    """Item i is made of i alone."""

    def __init__(self, n: int = 37):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(6, generator=generator), "index": index}


class ToyObjective(Objective):
    """Regression through a dropout, with a buffer that every step changes and a second branch that joins half-way."""

    find_unused = True

    def __init__(self, dropout: float = 0.3, bad_step: int | None = None, die: Callable[[int], None] | None = None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 6))
        self.late = nn.Linear(6, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.bad_step, self.die = bad_step, die

    def branches(self) -> dict[str, Branch]:
        config = OptimizerConfig(lr=0.01, weight_decay=0.1)
        named = list(self.named_parameters())
        return {
            "main": Branch(config, [(n, p) for n, p in named if n.startswith("net")]),
            "late": Branch(config, [(n, p) for n, p in named if n.startswith("late")]),
        }

    def forward(self, batch, clock):
        loss = (self.net(batch["x"]) - batch["x"].flip(1)).square().mean()
        if self.training and self.bad_step == clock.step:
            loss = loss * float("nan")
        metrics = {"first": batch["index"].float().mean()}
        if self.training:
            metrics["counter"] = torch.tensor(list(batch["counter"])).float().mean()
        if clock.progress >= 0.5:
            loss = loss + self.late(batch["x"]).square().mean()
        return loss, metrics

    def after_step(self, batch, metrics, clock, processes):
        self.seen += processes.reduce(metrics["first"].clone())
        if self.die is not None:
            self.die(clock.step)


def toy_config(folder: Path, **changes) -> RunConfig:
    """12 steps of 8 images, a checkpoint every 4, a log every 3."""
    settings = {"total_images": 96, "batch_size": 8, "log_every": 3, "checkpoint_every": 4, "validate_every": 6}
    settings |= {"workers": 0, "cpu": True, "precision": "no", "validation_images": 8, "bar_every": 60, "ema": 0.9}
    return RunConfig(run_dir=str(folder), **{**settings, **changes})


def streamed_rows(n: int = 37) -> StreamDataset:
    """The items of `Rows` as a stream of 4 shards, in windows of 5."""
    from datasets import Dataset as Table

    rows = Table.from_dict({"index": list(range(n))}).to_iterable_dataset(num_shards=4)
    return StreamDataset(rows, lambda row, epoch: Rows()[row["index"]], window=5, repeat=True, seed=0)


def toy_run(
    folder: Path, *, export=None, die=None, bad_step=None, dropout: float = 0.3, stream: bool = False, **changes
) -> None:
    """Train the toy. `export(folder)` stands in for writing weights; `die(step)` is called after every step."""
    task = toy_task(export=export, stream=stream, dropout=dropout, bad_step=bad_step, die=die)
    run(task, toy_config(folder, **changes))


def toy_task(*, export=None, stream: bool = False, **options) -> Task:
    """The toy, as `run` takes it."""
    torch.manual_seed(0)

    def write(path: Path, objective: ToyObjective, weights: dict | None) -> None:
        path.mkdir()
        torch.save(weights or objective.state_dict(), path / "weights.pt")
        if export is not None:
            export(path)

    objective, data = ToyObjective(**options), streamed_rows() if stream else Rows()
    return Task(objective=objective, train_data=data, val_data=Rows(16), prepare=dict, export=write)


def kill_self() -> None:
    """SIGKILL: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def start_child(work: Callable, *arguments, **settings) -> multiprocessing.Process:
    """`work` in a forked child with one thread, which does not know what accelerate found out for its parent."""

    def body() -> None:
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own is shared with all forks, and a killed one may die with it
        AcceleratorState._reset_state(reset_partial_state=True)
        work(*arguments, **settings)

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    return child


def in_child(work: Callable, *arguments, **settings) -> int:
    """Exit code of `work` in a forked child; -9 when it was killed."""
    child = start_child(work, *arguments, **settings)
    child.join(120)
    return child.exitcode


def is_free(port: int) -> bool:
    """Whether nobody listens at a port of this machine."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def in_processes(number: int, work: Callable, *arguments, **settings) -> list[int]:
    """Exit codes of `work` in `number` processes joined by gloo."""
    port = next(filter(is_free, PORTS))

    def body(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        work(*arguments, **settings)

    children = [start_child(body, rank) for rank in range(number)]
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


def curve(folder: Path, kind: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl without their timings."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    untimed = [{k: v for k, v in row.items() if k not in ("images_per_s", "data_wait")} for row in rows]
    return [row for row in untimed if kind in (None, row["kind"])]


def final_state(folder: Path) -> dict:
    """state.pt of the newest checkpoint."""
    newest = sorted((Path(folder) / "checkpoints").glob("step_*"))[-1]
    return torch.load(newest / "state.pt", weights_only=True)


def equal(a, b) -> bool:
    """Bit-equality of nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Poll until `condition()`; fails the test after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
