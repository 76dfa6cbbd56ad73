"""Timing that can be believed: idle gate, interleaved workers, medians and ranges, ceilings measured in the same run.

Other work on a machine turns a run of five seconds into twenty. So every timed run waits until the processors are idle
that it may run on, and is done again when more than 4 % of them was busy with something else meanwhile. What is
compared runs in processes of its own, in turns: A B A B. One thread is timed by its process's own clock, which stands
still while others run: it needs no gate.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")
FOREIGN = 0.04  # share of all processors that others may have used
STAT = Path("/proc/stat")


def own_processors() -> set[int]:
    """The processors that this process may run on (`taskset` can leave it a few of them)."""
    return os.sched_getaffinity(0)


def busy_seconds() -> float:
    """Seconds that this process's processors were busy since the machine started, stolen time included.

    Raises:
        ValueError: on a system that does not tell.
    """
    if not STAT.exists():
        raise ValueError("timing needs /proc/stat to see what else runs: use Linux")
    ticks, mine = 0, {f"cpu{number}" for number in own_processors()}
    for name, *counts in map(str.split, STAT.read_text("utf-8").splitlines()):
        if name in mine:
            user, nice, system, _, _, irq, softirq, steal = map(int, counts[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """What happens meanwhile: `wall_s`, `cpu_s`, and `foreign_share` of its processors that other processes used."""
    found: dict[str, float] = {}
    busy, own, began = busy_seconds(), time.process_time(), time.perf_counter()
    yield found
    found["wall_s"], found["cpu_s"] = time.perf_counter() - began, time.process_time() - own
    foreign = busy_seconds() - busy - found["cpu_s"]
    found["foreign_share"] = max(0.0, foreign) / (found["wall_s"] * len(own_processors()))


def clock() -> float:
    """Seconds that pass for this process: of its own processor time with one thread, else of the world."""
    import torch

    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def wait_until_idle(patience: float, *, window: float = 0.25) -> bool:
    """Wait until nothing runs for a moment; False when `patience` seconds were not enough."""
    until, told = time.perf_counter() + patience, False
    while True:
        with watched() as moment:
            time.sleep(window)
        if moment["foreign_share"] <= FOREIGN:
            return True
        if time.perf_counter() > until:
            return False
        if not told:
            print("waiting for idle processors", file=sys.stderr, flush=True)
            told = True


@dataclass
class Stages:
    """Seconds by stage of a run, taken around functions that `wrap` names. Nested calls count for the outer stage."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    inside: bool = False

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Time attribute `name` of a module, class or object from now on; only for a process that benchmarks."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, began = True, clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[stage] += clock() - began

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """The seconds so far, which begin again."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken


@contextmanager
def without_gpus() -> Iterator[None]:
    """Processes started meanwhile see no GPU: the official code would take one. They must not see it even at import."""
    name = "CUDA_VISIBLE_DEVICES"
    before, os.environ[name] = os.environ.get(name), ""
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C: whoever started them does, and ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


Job = Callable[..., dict[str, Any]]  # a run: what it found out, beside its seconds


class Worker:
    """A process that builds something once and then runs its jobs when asked; with one thread until `begin`.

    Args:
        make: called in the process, gives its jobs by name; must be picklable.
        threads: of torch, when timing has begun.
    """

    def __init__(self, make: Callable[[], dict[str, Job]], threads: int):
        self.gated, self.threads = threads > 1, threads
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with without_gpus(), without_ctrl_c():
            self.process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def built(self) -> None:
        """Wait until it is; before that it takes no calls."""
        self._answer()

    def begin(self) -> None:
        """Take all threads from now on."""
        self.call("threads", self.threads)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:  # nobody wants its job any more: time to give back its semaphores, not for more
            self.process.terminate()
            self.process.join(0.5)
            self.process.kill()
        self.connection.close()
        self.process.join()

    def call(self, job: str, *args: Any) -> dict[str, Any]:
        """Run a job: what it returned, `seconds` by `clock`, what `watched` saw and `peak_mib` of the process.

        Raises:
            RuntimeError: with the job's own error.
        """
        self.connection.send((job, args))
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError("a benchmark process ended: out of memory?") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, make: Callable[[], dict[str, Job]]) -> None:
    import torch

    from sample.measure import peak_memory, reset_peak

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # with all that happens at the end
    torch.set_num_threads(1)
    try:
        jobs = {**make(), "threads": lambda threads: torch.set_num_threads(threads) or {}}
        connection.send({})
    except Exception as error:
        connection.send(error)
        return
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            return
        try:
            reset_peak(torch.device("cpu"))
            with watched() as moment:
                found = jobs[name](*args)
            seconds = moment["cpu_s"] if torch.get_num_threads() == 1 else moment["wall_s"]
            connection.send(
                {**found, **moment, "seconds": seconds, "peak_mib": peak_memory(torch.device("cpu")) / 2**20}
            )
        except Exception as error:
            connection.send(error)


Timed = dict[str, list[dict[str, Any]]]


def begin_timing(workers: Collection[Worker]) -> None:
    """All threads for all workers; said on the terminal, so that whoever watches can keep the machine idle."""
    print("timing begins", file=sys.stderr, flush=True)
    for worker in workers:
        worker.begin()


def end_timing() -> None:
    """Say that it is over."""
    print("timing ended", file=sys.stderr, flush=True)


def interleave(runs: dict[str, tuple[Worker, str, tuple]], rounds: int, *, patience: float, tries: int = 3) -> Timed:
    """Every run in turns, `rounds` times, gated: by name the answers of its rounds.

    A run during which others were busy is done again, up to `tries` times; the least disturbed is kept, and says if it
    was `disturbed` still.
    """
    found: Timed = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (worker, job, args) in runs.items():
            tried: list[dict[str, Any]] = []
            while len(tried) < tries and (not tried or (worker.gated and tried[-1]["foreign_share"] > FOREIGN)):
                if worker.gated:
                    wait_until_idle(patience)
                tried.append(worker.call(job, *args))
            best = min(tried, key=lambda run: run["foreign_share"])
            found[name].append(best | {"disturbed": worker.gated and best["foreign_share"] > FOREIGN})
            print(f"{name}: {found[name][-1]['seconds']:.3f} s", file=sys.stderr, flush=True)
    return found


def ceilings(
    worker: Worker, patience: float, before: dict[str, float] | None = None, tries: int = 3
) -> dict[str, float]:
    """The most of several gated `matmul_ceilings`, the job "ceilings" of a worker, and of those found `before`."""
    best = dict(before or {})
    for _ in range(tries):
        if worker.gated:
            wait_until_idle(patience)
        for dtype, rate in worker.call("ceilings")["gflops"].items():
            best[dtype] = max(best.get(dtype, 0.0), rate)
    return best


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The median of a figure under `name`, and `[lowest, highest]` under `name_range`."""
    return {name: median(values), f"{name}_range": [min(values), max(values)]}


def undisturbed(runs: Sequence[dict]) -> list[dict]:
    """The runs that can be believed; all of them if none can; `summary` says so."""
    return [run for run in runs if not run["disturbed"]] or list(runs)


def ratios(name: str, above: Sequence[dict], below: Sequence[dict]) -> dict[str, Any]:
    """How many times longer `above` took than `below`, round by round; nothing without an undisturbed round of both."""
    pairs = [(a, b) for a, b in zip(above, below) if not a["disturbed"] and not b["disturbed"]]
    return spread(name, [a["seconds"] / b["seconds"] for a, b in pairs]) if pairs else {}


def summary(runs: Sequence[dict]) -> dict[str, Any]:
    """Memory, undisturbed rounds, and what share of the processors others had in the worst of them."""
    kept = undisturbed(runs)
    figures = {"peak_rss_mib": max(run["peak_mib"] for run in kept)}
    figures |= {"foreign_share": max(run["foreign_share"] for run in kept), "rounds": len(kept)}
    return figures | {"disturbed": any(run["disturbed"] for run in kept)}


def median_stages(runs: Sequence[dict]) -> dict[str, float]:
    """Median seconds of every stage, as `STAGE_s`, and of what is in none of them, as `rest_s`."""
    names = dict.fromkeys(name for run in runs for name in run.get("stages", {}))
    rest = {"rest_s": median([run["seconds"] - sum(run["stages"].values()) for run in runs])} if names else {}
    return {f"{name}_s": median([run["stages"].get(name, 0.0) for run in runs]) for name in names} | rest


def possible(variants: dict[str, T]) -> tuple[dict[str, T], dict[str, str]]:
    """The variants that this CPU can run at a speed worth timing, and settings that say what was left out.

    Half precision that no instruction multiplies is emulated, slower than float32.
    """
    from tokenizer.precision import native_bfloat16

    if native_bfloat16():
        return variants, {}
    kept = {name: variant for name, variant in variants.items() if name.endswith("float32")}
    why = "this CPU does not multiply bfloat16 in hardware"
    print(f"left out: {', '.join(sorted(set(variants) - set(kept)))}: {why}")
    return kept, {"bfloat16": why}


def matmul_ceilings(size: int = 2048, repeats: int = 3) -> dict[str, Any]:
    """The fastest matrix product of this process in GFLOP/s, by dtype that `possible` keeps, plain and packed."""
    import torch
    from torch import nn

    from sample.fast_cpu import PackedLinear, can_pack
    from tokenizer.precision import native_bfloat16

    best: dict[str, float] = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16) if native_bfloat16() else (torch.float32,):
            x, layer = torch.randn(size, size).to(dtype), nn.Linear(size, size).to(dtype)
            for function in (layer, *([PackedLinear(layer)] if can_pack() else [])):
                function(x)
                for _ in range(repeats):
                    began = clock()
                    function(x)
                    rate = 2 * size**3 / (clock() - began) / 1e9
                    name = str(dtype).removeprefix("torch.")
                    best[name] = max(best.get(name, 0.0), rate)
    return {"gflops": best}
