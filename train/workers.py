"""What processes that load data do first."""

import os
import signal
import threading


def leave_signals_to_parent(worker: int) -> None:
    """For data loading workers: Ctrl-C, and SIGTERM from `timeout` or a scheduler, reach the whole group of processes,
    but the batches of the running step are still needed. A worker ends when its parent says so, or is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not everywhere; there SIGTERM ends a worker, whoever sends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_at_parents_word, daemon=True).start()


def end_at_parents_word() -> None:
    """End this process at the first SIGTERM of its parent, who sends one to workers that are left when it exits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
