"""The processes that a launcher (`accelerate launch`, `torchrun`) started: they must form a group, on CPUs as well."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


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
