"""When a run ends early: signals, and numbers that are not finite."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import torch

from train.checkpoint import complete_checkpoints
from train.session import NonFiniteError, Session, Stopped

LOOK_EVERY = 5.0  # seconds; launchers kill what has not ended 30 seconds after a signal
PARENT = os.getppid()  # the launcher's process, where there is one


def check_finite(session: Session) -> None:
    """Raise NonFiniteError, in every process, if the loss or a gradient norm since the last log is not finite.

    Under fp16 an overflowing gradient is the scaler's business, so only the loss counts.
    """
    totals = session.meter.totals()
    names = [n for n in totals if n == "loss" or n.startswith("grad_norm")]
    if session.accelerator.scaler is not None:
        names = ["loss"]
    values = [totals[name][0] for name in names]
    bad = session.processes.reduce((~torch.isfinite(torch.stack(values))).any().float())
    if bad.item():
        kept = complete_checkpoints(session.config.checkpoints)
        where = f"the last good checkpoint is {kept[-1].name}" if kept else "there is no checkpoint yet"
        culprits = [name for name, value in zip(names, values) if not torch.isfinite(value)]
        raise NonFiniteError(
            f"not finite at step {session.step}: {', '.join(culprits) or 'another process'}; {where}. "
            "Lower optimizer.lr, lengthen optimizer.warmup, or train in bf16 or float32"
        )


def must_stop(session: Session) -> int | None:
    """The signal to stop for, agreed by all processes; several processes on GPUs look every few seconds.

    A process whose `torchrun` is gone takes that for SIGTERM.

    On a CPU it also checks that the step was finite, which costs nothing there.
    """
    accelerator = session.accelerator
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        check_finite(session)
    if os.environ.get("TORCHELASTIC_RUN_ID") and os.getppid() != PARENT:  # nobody could stop it any more
        session.stop_signal = session.stop_signal or signal.SIGTERM
    if accelerator.num_processes == 1:
        return session.stop_signal
    if not on_cpu and session.step < session.next_look:
        return None
    return agree(session)


def agree(session: Session) -> int | None:
    """The signal that any process got, in all of them; and after how many steps to look again, by process 0's clock."""
    accelerator, (step, since) = session.accelerator, session.looked
    said = torch.zeros(accelerator.num_processes + 1, device=accelerator.device, dtype=torch.int64)
    said[accelerator.process_index] = session.stop_signal or 0
    if accelerator.is_main_process:
        said[-1] = max(1, int(LOOK_EVERY * (session.step - step) / max(time.monotonic() - since, 1e-3)))
    *signals, steps = session.processes.reduce(said).tolist()
    session.looked, session.next_look = (session.step, time.monotonic()), session.step + steps
    return max(signals) or None


def stopped_by(session: Session, number: int) -> Stopped:
    """What to raise once the checkpoint is on disk."""
    return Stopped(
        f"stopped by {signal.Signals(number).name} at {session.images} of {session.config.total_images} images; "
        "the checkpoint is written, the same command goes on from there",
        128 + number,
    )


@contextlib.contextmanager
def catch_signals(session: Session) -> Iterator[None]:
    """Note SIGINT and SIGTERM for the loop to see.

    Every one is noted, not only the first: a launcher forwards the Ctrl-C that its children already got from the
    terminal. To stop at once, send SIGKILL (or Ctrl-\\): the last checkpoint stays whole.
    """

    def note(number: int, frame: object) -> None:
        session.stop_signal = session.stop_signal or number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
