"""Saving and resuming a session: everything that the next step depends on, whatever the number of processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers.models.modeling_utils import ModelMixin
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import Dataset, IterableDataset

from sample.checkpoints import written
from sample.files import write_text
from train.checkpoint import complete_checkpoints, drop_old, point_link, write_checkpoint
from train.session import Meter, Objective, Session, averaged_weights

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def save(session: Session) -> None:
    """Write a checkpoint and swap `latest` to its averaged weights; every process must call it."""
    accelerator, config = session.accelerator, session.config
    state, weights = collect(session), None
    if session.is_sharded:
        with averaged_weights(session):
            weights = get_model_state_dict(session.model, options=FULL)

    def write(folder: Path) -> None:
        with written(folder / "state.pt"):
            torch.save(state, folder / "state.pt")  # before the swap: on a CPU these tensors are the model's own
        averaged = averaged_weights(session) if weights is None else contextlib.nullcontext()
        with averaged, written(folder / "weights"):
            session.task.export(folder / "weights", session.objective, weights)

    if accelerator.is_main_process:
        made = write_checkpoint(config.checkpoints, session.step, write)
        point_link(config.latest, made / "weights")
        drop_old(config.checkpoints, keep=config.keep)
    accelerator.wait_for_everyone()


def collect(session: Session) -> dict:
    """The session as plain tensors and numbers; every process must call it.

    An optimiser that has not stepped yet has no state and is left as None.
    """
    ema = None
    if session.ema is not None:
        ema = session.ema.state_dict()
        ema["shadow_params"] = [_whole(p).cpu() for p in ema["shadow_params"]]
    streams = None if session.stream is None else gather_object([json.dumps(session.stream.state_dict())])
    return {
        "step": session.step,
        "batch_size": session.config.batch_size,
        "depends": dict(session.task.depends),
        "data": data_facts(session.task.train_data),
        "model": get_model_state_dict(session.model, options=FULL),
        "optimizers": [
            get_optimizer_state_dict(session.model, optimizer, options=FULL) if optimizer.state else None
            for optimizer in session.all_optimizers
        ],
        "ema": ema,
        "scaler": session.accelerator.scaler.state_dict() if session.accelerator.scaler else None,
        "meter": saved_totals(session),
        "streams": streams,
    }


def saved_totals(session: Session) -> dict[str, torch.Tensor]:
    """The meter's totals as means over processes, whose number may be another one later. Every process must call it."""
    count, totals = session.accelerator.num_processes, session.meter.totals()
    means = {name: session.processes.reduce(totals[name]).cpu() / count for name in sorted(totals)}
    return {name: means[name] for name in totals}


def resume(session: Session) -> None:
    """Load the newest checkpoint if there is one, and cut metrics.jsonl back to it.

    Raises:
        ValueError: if the checkpoint is of another model, tokenizer or batch size, or a stream of other processes, or
            there was one and it is gone.
    """
    config = session.config
    found = complete_checkpoints(config.checkpoints)
    session.accelerator.wait_for_everyone()
    if not found and os.path.lexists(config.latest):
        raise ValueError(
            f"run.run_dir {config.run_dir} holds a run without its checkpoints, which cannot go on: "
            f"bring {config.checkpoints} back, or give another run.run_dir"
        )
    if found:
        state = read_state(found[-1])
        if state["batch_size"] != config.batch_size:
            raise ValueError(
                f"run.batch_size {config.batch_size} differs from {state['batch_size']} of the run in "
                f"{config.run_dir}: resume with that, or give another run.run_dir"
            )
        check_shapes(session, state["model"])
        for name, value in session.task.depends.items():
            if state.get("depends", {}).get(name, value) != value:  # older runs do not say
                raise ValueError(f"run.run_dir {config.run_dir} was trained with another {name}: resume with that one")
        tell_of_other_data(session, state.get("data", {}))
        restore(session, state)
    if session.accelerator.is_main_process:
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        if found:  # a kill may have come between the checkpoint and its link
            point_link(config.latest, found[-1] / "weights")
        cut_metrics(config.metrics, session.step)


def read_state(checkpoint: Path) -> dict:
    """What `collect` returned when a checkpoint was written.

    Raises:
        ValueError: if its file is damaged.
    """
    try:
        return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, UnpicklingError):
        raise ValueError(
            f"{checkpoint / 'state.pt'} is damaged: remove {checkpoint}, and the same command goes on from "
            "the checkpoint before it"
        ) from None


def hashes(objective: Objective) -> dict[str, str]:
    """What an objective stands on as `Task.depends` wants it: SHA-256 of its `foundations`."""
    found = {}
    for option, tensors in objective.foundations().items():
        digest = hashlib.sha256()
        for name, tensor in tensors:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        found[option] = digest.hexdigest()
    return found


def data_facts(data: Dataset) -> dict[str, Any]:
    """What tells training data from other, as far as that is known at once: how many images, and a cache's manifest."""
    manifest = json.loads(json.dumps(getattr(data, "manifest", {})))
    return ({} if isinstance(data, IterableDataset) else {"images": len(data)}) | manifest


def tell_of_other_data(session: Session, before: Mapping[str, Any]) -> None:
    """A line on stderr if a run goes on with other training data: nothing forbids it, and it should not go unseen."""
    now = data_facts(session.task.train_data)
    for name in sorted({*before, *now} if before else ()):
        was, found = str(before.get(name)), str(now.get(name))
        if was != found:
            session.accelerator.print(
                f"run.run_dir {session.config.run_dir}: {name} of the training data was {was[:80]}, is {found[:80]}: "
                "from here on the run sees other images, or in another order",
                file=sys.stderr,
            )
            return


def settings_of(name: str, model: ModelMixin, without: Collection[str] = ()) -> dict[str, Any]:
    """A model's settings as `Task.depends` wants them, so that no run goes on as another model of the same shapes."""
    own = {key: value for key, value in model.config.items() if not key.startswith("_") and key not in without}
    return {f"{name}.{key}": json.loads(json.dumps(value)) for key, value in own.items()}


def check_shapes(session: Session, saved: dict[str, torch.Tensor]) -> None:
    """Raise ValueError, naming the first difference, unless the saved weights are of this very model."""
    frozen = {name for name, p in session.objective.named_parameters() if not p.requires_grad}
    here = {name: tuple(v.shape) for name, v in session.objective.state_dict().items() if name not in frozen}
    there = {name: tuple(v.shape) for name, v in saved.items()}
    for name in {**there, **here}:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"run.run_dir {session.config.run_dir} holds a run of another model: {name} is "
                f"{there.get(name, 'missing')} there, {here.get(name, 'missing')} here; give another run.run_dir"
            )


def restore(session: Session, state: dict) -> None:
    """Bring the session to the state that `collect` returned."""
    set_model_state_dict(session.model, state["model"], options=FULL)
    for optimizer, saved in zip(session.all_optimizers, state["optimizers"], strict=True):
        if saved is not None:
            restore_optimizer(session, optimizer, saved)
    if session.ema is not None and state["ema"] is not None:
        shadow = state["ema"].pop("shadow_params")
        session.ema.load_state_dict({**state["ema"], "decay": session.config.ema})
        for mine, saved in zip(session.ema.shadow_params, shadow, strict=True):
            mine.copy_(_like(saved, mine))
    if session.accelerator.scaler and state["scaler"]:
        session.accelerator.scaler.load_state_dict(state["scaler"])
    if session.stream is not None:
        count = session.accelerator.num_processes
        before = len(state["streams"] or ())
        if before != count:
            raise ValueError(
                f"streamed data goes on with as many processes as it was saved with, {before}; these are {count}"
            )
        session.stream.load_state_dict(json.loads(state["streams"][session.accelerator.process_index]))
    session.step = state["step"]
    # The saved sums are means over processes. One process holds those of as many as there are now.
    share = session.accelerator.num_processes if session.accelerator.is_main_process else 0
    totals = {name: share * pair for name, pair in state["meter"].items()}
    session.meter = Meter.of(totals, session.accelerator.device)


def restore_optimizer(session: Session, optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Bring an optimiser to its saved state; its settings stay those of the present configuration."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    states = {name: saved["state"].get(name, {}) for group in saved["param_groups"] for name in group["params"]}
    set_optimizer_state_dict(session.model, optimizer, {**saved, "state": states}, options=FULL)  # torch 2.6 wants all
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    # What had no gradient yet has no state; torch has made some, of a first step that was none.
    begun = {parameter for name, parameter in session.objective.named_parameters() if name in saved["state"]}
    for parameter in [p for p in optimizer.state if p not in begun]:
        del optimizer.state[parameter]
    for own in optimizer.state.values():  # copies: what lies in the mapped file holds all of it, deleted or not
        on_cpu = {n: v for n, v in own.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
        own.update({name: value.clone() for name, value in on_cpu.items()})


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, and a last line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept), durable=True)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if not hasattr(target, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
