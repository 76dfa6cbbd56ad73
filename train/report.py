"""What a run tells: the progress bar, metrics.jsonl, tensorboard, preview grids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from train.session import Meter, Session


def progress_bar(session: Session) -> tqdm:
    """Images done, images per second and time left, on the main process."""
    return tqdm(
        total=session.config.total_images,
        initial=session.images,
        unit="img",
        unit_scale=True,
        smoothing=0.05,
        desc=Path(session.config.run_dir).name,
        disable=not session.accelerator.is_main_process,
        mininterval=session.config.bar_every,
    )


def open_tensorboard(session: Session) -> None:
    """Start the tensorboard log at the session's image count; what an earlier, cut-off run logged after it is hidden.

    Raises:
        ValueError: if tensorboard is not installed.
    """
    if not session.config.tensorboard or not session.accelerator.is_main_process:
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("run.tensorboard needs the package: pip install tensorboard, or leave it off") from None
    session.writer = SummaryWriter(str(Path(session.config.run_dir) / "tensorboard"), purge_step=session.images + 1)


def log_training(session: Session, *, images_per_s: float, data_wait: float) -> str:
    """Write the means since the last log and start anew; returns the bar's text. Every process must call it.

    Args:
        data_wait: share of the time that this process waited for batches to train on; validation and checkpoints count
            as time, not as waiting.
    """
    means = session.meter.means(session.processes)
    session.meter = Meter()
    rates = {f"lr_{name}": group[0].param_groups[0]["lr"] for name, group in session.optimizers.items()}
    figures = {**means, **rates, **session.objective.statistics()}
    figures |= {"images_per_s": round(images_per_s, 3), "data_wait": round(data_wait, 5)}
    write_metrics(session, "train", figures)
    return f"loss {means['loss']:.4f}"


def write_metrics(session: Session, kind: str, figures: Mapping[str, float]) -> None:
    """Append one line to metrics.jsonl, and to the tensorboard log, on the main process."""
    if not session.accelerator.is_main_process:
        return
    row = {"kind": kind, "step": session.step, "images": session.images, **figures}
    with session.config.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if session.writer is not None:
        for name, value in figures.items():
            session.writer.add_scalar(f"{kind}/{name}", value, session.images)
        session.writer.flush()


def write_pictures(session: Session, pictures: Mapping[str, torch.Tensor]) -> None:
    """Write (n, 3, h, w) pictures in [-1, 1] as one PNG grid each, 8 to a row."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import make_image_grid

    folder = Path(session.config.run_dir) / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in pictures.items():
        columns = min(8, len(images))
        images = images[: len(images) // columns * columns].float().cpu().clamp(-1, 1)
        shown = VaeImageProcessor().postprocess(images, output_type="pil")
        grid = make_image_grid(shown, len(images) // columns, columns)
        grid.save(folder / f"{name}_{session.images:09d}.png")
