"""Data sets that are only read forwards: tar shards, parquet or Hub data, streamed, sharded and resumed exactly.

Records are shuffled in windows: `window` records are read, permuted by a key of (seed, epoch, window number) and
handed out. A rolling buffer cannot be resumed without its contents; a window is read again from where it began.
"""

import copy
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from train.images import CorruptLog, RowReader
from train.sources import damaged_shard
from train.workers import leave_signals_to_parent


class StreamDataset(IterableDataset):
    """Items of a `datasets.IterableDataset`, split over processes (`for_rank`) and loader workers.

    rows: the undecoded stream.  read: makes an item of a row.  window: records shuffled together, 0 or 1 for none.
    repeat: go on into the next epoch for ever (training); otherwise one epoch.  shards: tar files or patterns it reads,
    of which an error names the damaged one.  The order depends on seed, epoch, rank, world and the number of workers,
    and on nothing else. `state_dict` is right after each item in the process that iterates; with workers, use
    StreamLoader.
    """

    def __init__(
        self,
        rows: Any,
        read: RowReader,
        *,
        window: int,
        repeat: bool,
        seed: int,
        shards: Sequence[str] = (),
    ):
        self.rows, self.read, self.window, self.repeat, self.seed = rows, read, max(window, 1), repeat, seed
        self.shards = shards
        self._start = self._progress = {"epoch": 0, "window": 0, "begin": None, "done": 0}

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the labels, where the source has names."""
        return self.read.classes

    @property
    def num_classes(self) -> int | None:
        """Number of labels; None for numbered labels of which `DataConfig.num_classes` says nothing."""
        return self.read.num_classes

    @property
    def corrupt(self) -> CorruptLog:
        """The unreadable images met so far."""
        return self.read.corrupt

    def for_rank(self, rank: int, world: int) -> "StreamDataset":
        """The part of process `rank` of `world`: whole shards where they divide evenly, else every world-th record."""
        from datasets.distributed import split_dataset_by_node

        if not 0 <= rank < world:
            raise ValueError(f"rank must be in [0, world={world}), not {rank}")
        part = copy.copy(self)
        part.rows = split_dataset_by_node(self.rows, rank, world)
        return part

    def __len__(self) -> int:
        raise TypeError("a stream has no length: set streaming=False for what needs one")

    def state_dict(self) -> dict:
        """Where the latest iteration stands; JSON-able."""
        return copy.deepcopy(self._progress)

    def load_state_dict(self, state: dict) -> None:
        """Make iterations begin after the item at which `state` was taken, instead of at the beginning."""
        self._start = self._progress = copy.deepcopy(state)

    def _epoch_rows(self, epoch: int, begin: dict | None) -> Any:
        rows = self.rows.with_format(None)  # a fresh object: its position is ours alone
        if self.window > 1:
            rows.set_epoch(1 + int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]))  # shuffles shards
        if begin is not None:
            rows.load_state_dict(begin)
        return rows

    def _records(self, rows: Any) -> Iterator[dict]:
        try:
            yield from rows
        except tarfile.TarError as error:
            raise ValueError(f"{damaged_shard(self.shards)} is damaged: {error}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            where = ", ".join(map(str, self.shards))[:200]
            raise ValueError(f"a caption or label in {where} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[dict]:
        at = self._start
        epoch, number, begin, done = at["epoch"], at["window"], at["begin"], at["done"]
        while True:
            rows = self._epoch_rows(epoch, begin)
            records = self._records(rows)
            good, resumed = 0, number > 0 or done > 0
            while window := list(islice(records, self.window)):
                order = np.random.default_rng((self.seed, epoch, number)).permutation(len(window))
                for place in range(done, len(window)):
                    item = self.read(window[order[place] if self.window > 1 else place], epoch)
                    self._progress = {"epoch": epoch, "window": number, "begin": begin, "done": place + 1}
                    if item is not None:
                        good += 1
                        yield item
                number, done, begin = number + 1, 0, rows.state_dict()
            if not self.repeat or (number == 0 and not resumed):  # a worker may have no shard
                return
            if good == 0 and not resumed:
                raise ValueError(
                    f"a whole epoch of the stream gave no image; {self.corrupt.summary() or 'it is all validation'}"
                )
            epoch, number, begin, done = epoch + 1, 0, None, 0


class _Batches(IterableDataset):
    """In each worker: (worker id, progress after the batch, batch). Workers before `turn` begin with an empty turn."""

    def __init__(self, loader: "StreamLoader"):
        self.dataset, self.batch_size = loader.dataset, loader.batch_size
        self.states, self.turn = dict(loader._states), loader._turn

    def __iter__(self) -> Iterator[tuple[int, dict, dict | None]]:
        info = get_worker_info()
        worker = info.id if info else 0
        if worker in self.states:
            self.dataset.load_state_dict(self.states[worker])
        if worker < self.turn:
            yield worker, self.dataset.state_dict(), None
        items = iter(self.dataset)
        while batch := list(islice(items, self.batch_size)):
            yield worker, self.dataset.state_dict(), default_collate(batch)


class StreamLoader:
    """Batches of a StreamDataset from any number of workers. A repeating stream gives full batches, goes on where the
    last iteration stopped, and resumes to the batch; another gives its one epoch each time.

    `state_dict()` belongs to the last batch handed out, not to what workers have read ahead. Raises ValueError when a
    state is loaded that another number of workers or another batch size wrote.
    """

    def __init__(self, dataset: StreamDataset, *, batch_size: int, num_workers: int = 0, pin_memory: bool = False):
        self.dataset, self.batch_size, self.num_workers, self.pin_memory = dataset, batch_size, num_workers, pin_memory
        self._states: dict[int, dict] = {}
        self._turn = 0

    def state_dict(self) -> dict:
        """Where the batches handed out so far end; JSON-able."""
        workers = {str(worker): state for worker, state in self._states.items()}
        return {"workers": workers, "turn": self._turn, **self._layout()}

    def load_state_dict(self, state: dict) -> None:
        """Make the next iteration begin after the batch at which `state` was taken."""
        for name, value in self._layout().items():
            if state[name] != value:
                setting = {"num_workers": "run.workers", "batch_size": "images of a process at once"}[name]
                raise ValueError(
                    f"{setting} must be {state[name]}, as when the stream's position was saved, got {value}"
                )
        self._states = {int(worker): progress for worker, progress in state["workers"].items()}
        self._turn = state["turn"]

    def _layout(self) -> dict[str, int]:
        return {"num_workers": self.num_workers, "batch_size": self.batch_size}

    def __iter__(self) -> Iterator[dict]:
        batches = _Batches(self)
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_parent,
            pin_memory=self.pin_memory,
        )
        for worker, progress, batch in loader:
            if batch is None:
                continue
            if self.dataset.repeat:
                self._states[worker] = progress
                self._turn = (worker + 1) % max(self.num_workers, 1)
            yield batch
