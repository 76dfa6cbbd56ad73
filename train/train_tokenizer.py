"""Train a tokenizer: `accelerate launch -m train.train_tokenizer --config configs/tokenizer/scenes.yaml`.

Flags go over the file (`--run.seed=1 --optimizer.lr=1e-4`); the same command again resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from sample.load import load_tokenizer
from tokenizer.model import MultiScaleVQ
from train.config import RunConfig, base_parser, exit_code, save_config
from train.data import DataConfig, build_dataset
from train.loop import run
from train.optimizers import OptimizerConfig
from train.order import spread_index
from train.prepare import as_floats, image_format
from train.session import Task
from train.state import settings_of
from train.token_cache import unusual
from train.tokenizer_objective import TokenizerLossConfig, TokenizerObjective


def parser():
    """The command line: run, data, tokenizer, loss, optimizer, adversary."""
    made = base_parser("Train a multi-scale tokenizer.")
    made.add_class_arguments(RunConfig, "run")
    made.add_class_arguments(DataConfig, "data")
    made.add_class_arguments(MultiScaleVQ, "tokenizer")
    made.add_argument("--start_from", type=str | None, default=None, help="folder of a tokenizer to begin with")
    made.add_class_arguments(TokenizerLossConfig, "loss")
    made.add_class_arguments(OptimizerConfig, "optimizer")
    made.add_class_arguments(OptimizerConfig, "adversary")
    return made


def export_weights(folder: Path, objective: TokenizerObjective, weights: dict | None) -> None:
    """Write `folder/vqvae` in diffusers layout, float32 and contiguous."""
    copy = MultiScaleVQ.from_config(objective.vqvae.config)
    state = objective.vqvae.state_dict()
    if weights is not None:
        state = {name.removeprefix("vqvae."): w for name, w in weights.items() if name.startswith("vqvae.")}
    copy.load_state_dict(state)
    copy.save_pretrained(folder / "vqvae")


def begin_with(vqvae: MultiScaleVQ, folder: str, *, same_tokens: bool = False) -> None:
    """Copy the weights of the tokenizer in `folder`; a codebook or phis of another size, and new statistics, stay.

    Args:
        same_tokens: the quantiser must fit, too, and its settings be the same.

    Raises:
        ValueError: if its convolutions are of another shape; the message names the first one.
    """
    source = load_tokenizer(folder)
    if same_tokens and unusual(source) != unusual(vqvae):
        theirs, ours = (unusual(one).strip() or "the usual settings" for one in (source, vqvae))
        raise ValueError(f"start_from {folder!r} makes other tokens: it has {theirs}, and tokenizer.* say {ours}")
    given, own = source.state_dict(), vqvae.state_dict()  # `own` shares memory with the weights
    for name, tensor in own.items():
        fits = name in given and given[name].shape == tensor.shape
        if not fits and (same_tokens or not name.startswith("quantizer.")):
            raise ValueError(f"start_from {folder!r} does not fit: {name} is missing or of another shape")
        if fits:
            tensor.copy_(given[name])


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and train.

    Raises:
        ValueError: on settings that do not fit together.
    """
    made = parser()
    config = made.parse_args(argv)
    torch.manual_seed(config.run.seed)  # before the tokenizer below draws its first weights
    built = made.instantiate(config)
    run_config: RunConfig = built.run
    run_config.check_named()
    device = torch.device("cpu" if run_config.cpu or not torch.cuda.is_available() else "cuda")
    vqvae = built.tokenizer.to(memory_format=image_format(device))
    data: DataConfig = built.data
    if tuple(data.hw) != vqvae.image_hw:
        raise ValueError(
            f"data.size {data.hw} must be {vqvae.image_hw}: stride {vqvae.stride} times the last scale of "
            f"tokenizer.schedule {vqvae.schedule.text}"
        )
    if config.start_from is not None:
        begin_with(vqvae, config.start_from, same_tokens=built.loss.decoder_only)
    elif built.loss.decoder_only:
        raise ValueError("loss.decoder_only=true trains the decoder of a finished tokenizer: give start_from")
    objective = TokenizerObjective(vqvae, built.loss, built.optimizer, built.adversary)
    unreadable = Path(run_config.run_dir) / "unreadable_images.txt"
    val_data = build_dataset(data, "val", seed=run_config.seed, corrupt_log=unreadable)
    chosen = [spread_index(i, len(val_data)) for i in range(min(run_config.previews or 1, len(val_data)))]
    shown = torch.stack([val_data[i]["image"] for i in chosen])

    def preview(trained: TokenizerObjective) -> dict[str, torch.Tensor]:
        image = as_floats({"image": shown.to(trained.vqvae.device)})["image"]
        rebuilt = trained.vqvae(image).reconstruction
        rows = zip(image.split(8), rebuilt.float().split(8))
        return {"reconstructions": torch.cat([half for pair in rows for half in pair])}

    task = Task(
        objective=objective,
        train_data=build_dataset(data, "train", seed=run_config.seed, corrupt_log=unreadable),
        val_data=val_data,
        prepare=as_floats,
        export=export_weights,
        preview=preview if run_config.previews else None,
        record=partial(save_config, made, config, run_config.run_dir),
        depends=settings_of("tokenizer", vqvae, without=("beta",)) | {"optimizer.name": built.optimizer.name},
    )
    run(task, run_config)


if __name__ == "__main__":
    sys.exit(exit_code(main))
