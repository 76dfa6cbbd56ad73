"""A run that is killed at any instant, then started again, is the run that was never stopped: bit for bit on CPU."""

import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader
from training_toys import (
    Rows,
    curve,
    equal,
    final_state,
    in_child,
    in_processes,
    kill_self,
    start_child,
    streamed_rows,
    toy_config,
    toy_run,
    toy_task,
    wait_for,
)

from train.checkpoint import complete_checkpoints, write_checkpoint
from train.config import exit_code
from train.loop import run, start
from train.optimizers import OptimizerConfig
from train.state import resume, save
from train.stream import StreamLoader
from train.workers import leave_signals_to_parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_child(toy_run, folder) == 0
    return folder


def assert_same_run(folder, whole):
    assert curve(folder) == curve(whole)
    assert equal(final_state(folder), final_state(whole))


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"state.pt cannot be written; is the disk full\? \(\[enforce fail"):
        run(toy_task(), toy_config(tmp_path, total_images=32))
    assert not complete_checkpoints(tmp_path / "checkpoints")
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("step", [0, 5, 8, 11])
def test_killed_after_a_step(tmp_path, whole, step):
    assert in_child(toy_run, tmp_path, die=lambda s: s == step and kill_self()) == -signal.SIGKILL
    assert in_child(toy_run, tmp_path) == 0
    assert_same_run(tmp_path, whole)


def test_killed_while_writing_a_checkpoint(tmp_path, whole):
    def second(path):
        if "00000008" in str(path):
            kill_self()

    assert in_child(toy_run, tmp_path, export=second) == -signal.SIGKILL
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step_00000004"]
    assert (tmp_path / "latest" / "weights.pt").exists()
    assert in_child(toy_run, tmp_path) == 0
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    assert_same_run(tmp_path, whole)


def test_killed_again_and_again_at_any_time(tmp_path, whole):
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        child = start_child(toy_run, tmp_path, die=lambda step: time.sleep(0.01))
        wait_for(lambda c=child: (tmp_path / "metrics.jsonl").exists() or not c.is_alive())
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert in_child(toy_run, tmp_path) == 0
    assert_same_run(tmp_path, whole)


def test_killed_with_data_workers(tmp_path, whole):
    assert in_child(toy_run, tmp_path, workers=1, die=lambda s: s == 6 and kill_self()) == -signal.SIGKILL
    assert in_child(toy_run, tmp_path, workers=1) == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_data_goes_on_where_it_was(tmp_path, workers):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"stream": True, "workers": workers, "micro_batch": 4}
    assert in_child(toy_run, whole, **settings) == 0
    assert in_child(toy_run, killed, die=lambda s: s == 6 and kill_self(), **settings) == -signal.SIGKILL
    assert in_child(toy_run, killed, **settings) == 0
    assert_same_run(killed, whole)


@pytest.mark.parametrize("number, stream", [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)])
def test_stopped_by_a_signal(tmp_path, whole, number, stream, capfd):
    def main(argv):
        toy_run(tmp_path, workers=1, stream=stream, die=lambda step: time.sleep(0.05))

    def body():
        os.setsid()
        os._exit(exit_code(main))

    child = start_child(body)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and curve(tmp_path))
    os.killpg(child.pid, number)  # data workers get it too, as from a terminal, from `timeout` or from a scheduler
    time.sleep(0.01)
    os.kill(child.pid, number)  # as a launcher does that forwards what its children already got
    child.join()
    assert child.exitcode == 128 + number
    assert "same command goes on" in capfd.readouterr().err
    kept = complete_checkpoints(tmp_path / "checkpoints")
    assert kept and final_state(tmp_path)["step"] < 12
    assert in_child(toy_run, tmp_path, workers=int(stream), stream=stream) == 0
    if not stream:  # that has an order of its own
        assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("stream", [False, True])
def test_two_processes_resume_bit_equal(tmp_path, stream):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_processes(2, toy_run, whole, stream=stream) == [0, 0]
    assert -signal.SIGKILL in in_processes(2, toy_run, killed, stream=stream, die=lambda s: s == 6 and kill_self())
    assert in_processes(2, toy_run, killed, stream=stream) == [0, 0]
    assert_same_run(killed, whole)


def test_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, capfd):
    def main(argv):
        toy_run(tmp_path, bad_step=6)

    assert in_child(lambda: os._exit(exit_code(main))) == 3
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "not finite at step 7" in message and "step_00000004" in message
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step_00000004"]
    assert all(torch.isfinite(v).all() for v in final_state(tmp_path)["model"].values())


def test_what_is_not_finite_is_not_logged(tmp_path, capfd):
    def main(argv):
        toy_run(tmp_path, bad_step=1, log_every=1, checkpoint_every=12)

    assert in_child(lambda: os._exit(exit_code(main))) == 3
    assert "not finite at step 2" in capfd.readouterr().err and "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_settings_of_the_present_command_hold_after_resuming(tmp_path, monkeypatch):
    """EMA decay and betas are not those of the checkpoint, as the rate and the weight decay are not."""
    assert in_child(toy_run, tmp_path, total_images=32) == 0

    def resumed():
        monkeypatch.setattr("training_toys.OptimizerConfig", partial(OptimizerConfig, betas=(0.5, 0.6)))
        session = start(toy_task(), toy_config(tmp_path, ema=0.5))
        resume(session)
        betas = {group["betas"] for optimizer in session.all_optimizers for group in optimizer.param_groups}
        assert session.step == 4 and session.ema.decay == 0.5 and betas == {(0.5, 0.6)}

    assert in_child(resumed) == 0


def test_what_has_no_state_yet_begins_at_its_first_step(tmp_path):
    """A parameter without gradients before the checkpoint is not one Adam step ahead afterwards."""
    folder = tmp_path / "run"

    def saved():
        session = start(toy_task(), toy_config(folder))
        optimizer = session.optimizers["main"][0]
        first, *others = (p for group in optimizer.param_groups for p in group["params"])
        first.grad = torch.ones_like(first)
        optimizer.step()
        assert len(optimizer.state) == 1
        save(session)
        resume(session)
        assert set(optimizer.state) == {first} and others

    assert in_child(saved) == 0


def test_a_kill_between_checkpoint_and_link_is_mended(tmp_path, monkeypatch):
    def killed():
        monkeypatch.setattr("train.state.point_link", lambda *paths: kill_self())
        toy_run(tmp_path, keep=1)

    assert in_child(toy_run, tmp_path, total_images=32, keep=1) == 0
    assert in_child(killed) == -signal.SIGKILL
    assert (tmp_path / "latest").resolve().is_dir()  # the one before is still there
    assert in_child(toy_run, tmp_path, total_images=64, keep=1) == 0
    assert (tmp_path / "latest").resolve().parent.name == "step_00000008"


def test_a_refused_command_leaves_the_configuration(tmp_path):
    notes = tmp_path / "notes"

    def recorded(**changes):
        task = replace(toy_task(), record=lambda: notes.write_text("written"))
        run(task, toy_config(tmp_path, total_images=8, **changes))

    assert in_child(recorded) == 0
    notes.unlink()
    assert in_child(lambda: os._exit(exit_code(lambda argv: recorded(batch_size=16)))) == 2
    assert not notes.exists()


def test_a_run_goes_on_with_what_it_depends_on_alone(tmp_path, capfd):
    def built_on(tokenizer):
        run(replace(toy_task(), depends={"tokenizer": tokenizer}), toy_config(tmp_path, total_images=32))

    assert in_child(built_on, "one") == 0
    assert in_child(built_on, "one") == 0
    assert in_child(lambda: os._exit(exit_code(lambda argv: built_on("other")))) == 2
    assert "was trained with another tokenizer: resume with that one" in capfd.readouterr().err


def test_a_run_goes_on_with_the_frozen_weights_it_began_with_alone(tmp_path, capfd):
    """They are in no checkpoint: others would be exported beside what was trained on these."""

    def on(value):
        task = toy_task()
        task.objective.ground = torch.nn.Parameter(torch.full((3,), value), requires_grad=False)
        run(task, toy_config(tmp_path, total_images=32))

    assert in_child(on, 1.0) == 0
    assert in_child(on, 1.0) == 0
    assert in_child(lambda: os._exit(exit_code(lambda argv: on(2.0)))) == 2
    assert "was trained with another start_from: resume with that one" in capfd.readouterr().err


def test_a_run_that_goes_on_with_other_data_says_so(tmp_path, capfd):
    def over(count, images):
        run(replace(toy_task(), train_data=Rows(count)), toy_config(tmp_path, total_images=images))

    assert in_child(over, 37, 32) == 0
    assert in_child(over, 37, 64) == 0
    assert "training data" not in capfd.readouterr().err
    assert in_child(over, 30, 96) == 0
    assert "images of the training data was 37, is 30: from here on the run sees other images" in capfd.readouterr().err


def test_a_killed_data_worker_is_one_line(capfd):
    def work(argv):
        raise RuntimeError("DataLoader worker (pid 9721) is killed by signal: Killed. ")

    assert exit_code(work, []) == 2
    assert capfd.readouterr().err.startswith("error: a data worker was killed (out of memory?): take fewer run.workers")

    def other(argv):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):  # ours: with its traceback
        exit_code(other, [])


@pytest.mark.parametrize("stream", [False, True])
def test_loaders_that_are_left_end_with_their_process(stream):
    """Their workers let SIGTERM pass, but not that of their own parent."""

    def leave():
        global kept
        rows = streamed_rows() if stream else Rows()
        options = {"batch_size": 2, "num_workers": 1}
        own = {} if stream else {"worker_init_fn": leave_signals_to_parent}
        kept = iter((StreamLoader if stream else DataLoader)(rows, **options, **own))
        next(kept)

    began = time.monotonic()
    assert in_child(leave) == 0 and time.monotonic() - began < 60


def test_a_damaged_checkpoint_is_named(tmp_path, capfd):
    assert in_child(toy_run, tmp_path, total_images=64) == 0
    newest = complete_checkpoints(tmp_path / "checkpoints")[-1]
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:200])
    assert in_child(lambda: os._exit(exit_code(lambda argv: toy_run(tmp_path)))) == 2
    assert f"is damaged: remove {newest}" in capfd.readouterr().err
    shutil.rmtree(newest)
    assert in_child(toy_run, tmp_path) == 0


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path, capfd):
    assert in_child(toy_run, tmp_path, total_images=32) == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    assert in_child(lambda: os._exit(exit_code(lambda argv: toy_run(tmp_path)))) == 2
    assert "holds a run without its checkpoints" in capfd.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    "settings, words",
    [({"precision": "fp16"}, "run.precision fp16 needs a GPU"), ({"half_stream": True}, "run.half_stream needs")],
)
def test_precisions_that_do_nothing_are_refused(tmp_path, settings, words, capfd):
    assert in_child(lambda: os._exit(exit_code(lambda argv: toy_run(tmp_path, **settings)))) == 2
    assert words in capfd.readouterr().err


def test_another_batch_size_or_model_is_refused(tmp_path, capfd):
    assert in_child(toy_run, tmp_path) == 0
    assert in_child(lambda: os._exit(exit_code(lambda argv: toy_run(tmp_path, batch_size=16)))) == 2
    assert "run.batch_size 16 differs from 8" in capfd.readouterr().err


def test_only_the_newest_checkpoints_stay(tmp_path, whole):
    assert [path.name for path in complete_checkpoints(whole / "checkpoints")] == ["step_00000008", "step_00000012"]
    assert (whole / "latest").resolve() == (whole / "checkpoints" / "step_00000012" / "weights").resolve()


def test_incomplete_checkpoints_are_ignored_by_name(tmp_path):
    for name in (".tmp-step_00000009", "step_abc", "notes"):
        (tmp_path / name).mkdir()
    write_checkpoint(tmp_path, 3, lambda folder: (folder / "x").write_text("1"))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000003"]
    assert not (tmp_path / ".tmp-step_00000009").exists()
