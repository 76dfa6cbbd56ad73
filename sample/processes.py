"""The processes that a launcher (`accelerate launch`, `torchrun`) started: they must form a group, on CPUs as well."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


SHORT_OF_MEMORY = r"out of memory|can't allocate memory|not enough memory|Invalid buffer size|STATUS_ALLOC_FAILED"
LESS_MEMORY = "fewer images at once (--batch-size) take less, on a GPU --offload, too, where the command has them"


def works_on_cpu(device: object = "auto") -> bool:
    """Whether a process works on its CPU: asked for, or all there is. Without being told, accelerate forms no group."""
    import torch

    return str(device) == "cpu" or not torch.accelerator.is_available()


def check_group(state: PartialState | Accelerator) -> None:
    """Raise ValueError unless the processes that were launched know of each other: each would do all of the work."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise ValueError(
            f"{launched} processes were launched but do not form a group of that size: launch one process a GPU or, "
            "for CPUs alone, with torchrun --nproc_per_node N and the command's setting for the CPU"
        )


def process_group(device: object = "auto") -> PartialState:
    """This process among those that were launched, for work on `device`; the first call in a process decides.

    Raises:
        ValueError: if they do not form a group.
    """
    from accelerate import PartialState

    state = PartialState(cpu=works_on_cpu(device))
    check_group(state)
    return state


def speaks(*, everywhere: bool = False) -> bool:
    """Whether this process is the one to print an error: the first that has one, which may be any.

    Args:
        everywhere: all processes meet it: then the one of rank 0. So it is before they know of each other.
    """
    rank, dist = os.environ.get("RANK", "0"), sys.modules.get("torch.distributed")
    if everywhere or dist is None or not dist.is_available() or not dist.is_initialized():
        return rank == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("nextscale/said", 1) == 1
    except RuntimeError:  # what keeps count is gone
        return True


def follows(error: RuntimeError) -> bool:
    """Whether an error says no more than that another process has ended, which tells why itself."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def process_name() -> str:
    """Which process speaks, to go into a message: (process 1 of 2) after a space; nothing in that of rank 0."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (process {rank} of {os.environ.get('WORLD_SIZE', '?')})"


def lacks_memory(error: BaseException) -> str | None:
    """That memory ran out, and what was asked for, if an error says so, of whatever device; else None."""
    text = str(error)
    said = isinstance(error, RuntimeError) and re.search(SHORT_OF_MEMORY, text)
    if not said and not isinstance(error, MemoryError):
        return None
    wanted = re.search(r"(?:allocate|buffer size:) ([\d.]+ \w+)", text)
    return "out of memory" + (f" ({wanted[1]} were asked for)" if wanted else "")


def line_about(error: Exception, less_memory: str = LESS_MEMORY) -> str | None:
    """An error as one line for the user; None for a fault of ours, whose traceback is needed.

    Args:
        less_memory: what to do where memory ran out.
    """
    lacking = lacks_memory(error)
    ours = isinstance(error, RuntimeError) and not follows(error) and lacking is None
    if ours or os.environ.get("NEXTSCALE_TRACEBACK"):
        return None
    return " ".join((f"{lacking}: {less_memory}" if lacking else str(error)).split())


def tell(caution: str | None) -> None:
    """A caution on stderr, if there is one, by one process; the work is done anyway."""
    from accelerate import PartialState

    if caution is not None and PartialState().is_main_process:
        print(f"nextscale: caution: {caution}", file=sys.stderr)
