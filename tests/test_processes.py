"""Several processes: one group or none, one voice, one training in a folder; what they agree on and average."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from training_toys import (
    curve,
    final_state,
    in_child,
    in_processes,
    kill_self,
    start_child,
    toy_config,
    toy_run,
    toy_task,
    wait_for,
)

from sample.processes import check_group, line_about, process_group
from train import machine, stopping
from train.config import exit_code
from train.loop import start, validation_batches
from train.machine import check_sharding
from train.order import spread_index
from train.session import Meter
from train.state import saved_totals


def test_processes_on_cpus_form_a_group(tmp_path):
    def meet(folder) -> None:
        from accelerate.utils import gather_object

        state = process_group()
        (folder / str(state.process_index)).write_text(str(gather_object([state.process_index])))

    assert in_processes(2, meet, tmp_path) == [0, 0]
    assert [(tmp_path / name).read_text() for name in "01"] == ["[0, 1]"] * 2


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes were launched but do not form a group"):
        check_group(SimpleNamespace(num_processes=1))


@pytest.mark.parametrize("who", ["one", "all"])
def test_an_error_is_printed_once(tmp_path, capfd, who):
    """By the process that meets it; of what all of them meet, by one."""

    def work(argv) -> None:
        state = process_group()
        state.wait_for_everyone()
        if who == "all" or state.process_index == 1:
            raise ValueError("record 7 is bad")

    def told() -> None:
        code, rank = exit_code(work, []), os.environ["RANK"]
        (tmp_path / rank).touch()
        wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())  # process 0 keeps count of who spoke
        os._exit(code)

    assert in_processes(2, told) == [0 if who == "one" else 2, 2]
    error = capfd.readouterr().err
    assert error.count("record 7 is bad\n") == 1
    assert who == "all" or "error (process 1 of 2): record 7 is bad\n" in error


def test_a_process_that_waits_for_one_that_failed_has_nothing_to_add(tmp_path, capfd):
    """The one that failed says why; the others meet a closed connection."""

    def work(argv) -> None:
        state = process_group()
        state.wait_for_everyone()
        if state.process_index == 1:
            raise ValueError("record 7 is bad")
        wait_for(lambda: (tmp_path / "1").exists())
        state.wait_for_everyone()

    def told() -> None:
        code, rank = exit_code(work, []), os.environ["RANK"]
        (tmp_path / rank).touch()
        os._exit(code)

    assert in_processes(2, told) == [2, 2]
    assert capfd.readouterr().err.strip().splitlines() == ["error (process 1 of 2): record 7 is bad"]


def test_one_training_at_a_time_in_a_folder(tmp_path, capfd):
    first = start_child(toy_run, tmp_path, die=lambda step: time.sleep(0.05), total_images=10**6)
    wait_for(lambda: (tmp_path / "checkpoints").is_dir())
    assert in_child(lambda: os._exit(exit_code(lambda _: toy_run(tmp_path)))) == 2
    assert "is being trained by another process: wait for it or stop it" in capfd.readouterr().err
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert in_child(toy_run, tmp_path) == 0  # what is killed holds nothing


@pytest.mark.parametrize(
    ("kind", "message"),
    [(DistributedType.FSDP, "fsdp_version must be 2"), (DistributedType.DEEPSPEED, "DEEPSPEED is not supported")],
)
def test_ways_to_split_parameters_that_are_not_known_are_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        check_sharding(SimpleNamespace(distributed_type=kind, is_fsdp2=False))


def test_releases_that_split_parameters_on_gpus_only_say_so(monkeypatch):
    fsdp = {"distributed_type": DistributedType.FSDP, "is_fsdp2": True}
    on_cpu, on_gpu = (SimpleNamespace(**fsdp, device=torch.device(name)) for name in ("cpu", "cuda"))
    for able in (True, False):
        monkeypatch.setattr(machine, "shards_on_cpus", lambda able=able: able)
        check_sharding(on_gpu)
        if able:
            check_sharding(on_cpu)
    with pytest.raises(ValueError, match="on GPUs only"):
        check_sharding(on_cpu)


def test_processes_on_gpus_look_for_signals_by_the_clock(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    session = start(toy_task(), toy_config(tmp_path))
    looks = []
    for step in range(1, 60):
        session.step, now[0] = step, now[0] + 0.5
        if step >= session.next_look:
            looks.append(step)
            assert stopping.agree(session) is None
    assert looks == [1, 2, 12, 22, 32, 42, 52]  # steps of half a second: every ten
    session.stop_signal = signal.SIGINT
    assert stopping.agree(session) == signal.SIGINT


def test_a_process_whose_launcher_is_gone_stops(tmp_path, monkeypatch):
    session = start(toy_task(), toy_config(tmp_path))
    monkeypatch.setattr(stopping, "PARENT", -1)
    monkeypatch.setattr(stopping, "check_finite", lambda session: None)
    assert stopping.must_stop(session) is None  # nobody launched it: a shell that ended ends no training
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert stopping.must_stop(session) == signal.SIGTERM


@pytest.mark.parametrize("images", [5, 1])
def test_every_image_of_the_validation_counts_once(tmp_path, images):
    settings = {"dropout": 0.0, "total_images": 16, "validate_every": 2, "validation_images": images}
    assert in_child(toy_run, tmp_path / "one", **settings) == 0
    assert in_processes(2, toy_run, tmp_path / "two", **settings) == [0, 0]
    (one,), (two,) = (curve(tmp_path / name, "validation") for name in ("one", "two"))
    seen = [spread_index(i, 16) for i in range(images)]
    assert two["first"] == pytest.approx(one["first"]) == pytest.approx(sum(seen) / images)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_validation_images_keep_their_numbers(tmp_path, micro_batch):
    """What is drawn for one, as the tokens that are masked, goes by its number: not by its batch, nor its process."""
    settings = {"batch_size": 24, "micro_batch": micro_batch, "validation_images": 11}
    session, seen = start(toy_task(), toy_config(tmp_path, **settings)), {}
    for rank in range(3):
        ranked = SimpleNamespace(num_processes=3, process_index=rank)
        part = SimpleNamespace(accelerator=ranked, config=session.config, task=session.task)
        for items, counters, weight in validation_batches(part):
            assert len(items) == len(counters)
            if weight:
                seen |= {number: item["index"] for number, item in zip(counters, items)}
    assert seen == {number: spread_index(number, 16) for number in range(11)}


def test_other_numbers_of_processes_go_on_with_the_same_means(tmp_path):
    """Killed between two logs after four steps by two processes, and gone on with by one."""

    def killed() -> None:
        toy_run(tmp_path / "part", dropout=0.0, log_every=6, die=lambda step: kill_self() if step == 4 else None)

    assert in_processes(2, killed) == [-9, -9]
    assert in_child(toy_run, tmp_path / "part", dropout=0.0, log_every=6) == 0
    assert in_child(toy_run, tmp_path / "whole", dropout=0.0, log_every=6) == 0
    part, whole = (curve(tmp_path / name, "train")[0] for name in ("part", "whole"))
    assert part["step"] == whole["step"] == 6
    assert [part[name] for name in ("loss", "first")] == pytest.approx([whole["loss"], whole["first"]], rel=1e-5)
    assert final_state(tmp_path / "part")["step"] == 12


def test_processes_that_know_other_names_first_agree_on_their_order():
    """As after a resume, where one process alone holds what came before."""

    class Both:
        def reduce(self, value: torch.Tensor) -> torch.Tensor:
            given.append(value)
            return value

    given: list[torch.Tensor] = []
    one, other = (Meter.of({}, torch.device("cpu")) for _ in range(2))
    one.sums = {("loss",): (torch.tensor([1.0]), 1), ("grad_norm",): (torch.tensor([2.0]), 1)}
    other.sums = {("grad_norm", "loss"): (torch.tensor([2.0, 1.0]), 1)}
    assert one.means(Both()) == other.means(Both()) == {"loss": 1.0, "grad_norm": 2.0}
    assert torch.equal(*given)


def test_saved_totals_are_means_over_processes():
    class Both:
        def reduce(self, value: torch.Tensor) -> torch.Tensor:
            return 2 * value

    meter = SimpleNamespace(totals=lambda: {"loss": torch.tensor([3.0, 4.0])})
    session = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2), meter=meter, processes=Both())
    assert saved_totals(session)["loss"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "error, said",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "(2.00 GiB were asked for)",
        ),
        (
            RuntimeError("MPS backend out of memory (MPS allocated: 6 GB). Tried to allocate 5 MB on"),
            "(5 MB were asked for)",
        ),
        (RuntimeError("CUDA error: out of memory"), "out of memory"),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "(7.28 TiB were asked for)"),
        (MemoryError(), "out of memory"),
        (RuntimeError("Invalid buffer size: 24.00 GiB"), "(24.00 GiB were asked for)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
    ],
)
def test_running_out_of_memory_is_told_in_a_line(error, said, capsys):
    def work(arguments):
        raise error

    assert exit_code(work) == 2
    assert said in line_about(error) and "--batch-size" in line_about(error)
    told = capsys.readouterr().err
    assert said in told and "run.micro_batch" in told and told.count("\n") == 1


def test_memory_that_a_cpu_lacks_is_told_in_a_line():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert line_about(caught.value).startswith("out of memory (4000000000000000 bytes were asked for): ")


def test_faults_of_ours_keep_their_traceback(monkeypatch):
    assert line_about(RuntimeError("shapes do not fit")) is None
    assert line_about(ValueError("a\n b")) == "a b"
    monkeypatch.setenv("NEXTSCALE_TRACEBACK", "1")
    assert line_about(ValueError("a")) is None
