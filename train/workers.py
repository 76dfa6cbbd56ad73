"""What processes that load data do first."""

import signal


def leave_signals_to_parent(worker: int) -> None:
    """For data loading workers: Ctrl-C, and SIGTERM from `timeout` or a scheduler, reach the whole group of processes,
    but the batches of the running step are still needed. A worker ends when its parent says so, or is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
