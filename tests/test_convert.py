"""Official checkpoints in and out: bit-equal round trips, detection from tensors, and one clear line for bad files."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nextscale
from sample import adapters
from sample.checkpoints import read_state, stream, write_pth, write_safetensors
from sample.commands import convert_cli
from sample.convert import convert, convert_back, finished_folder
from sample.load import load_pipeline
from sample.official import Flags, fetch, load_official
from sample.pipeline import NextScalePipeline
from tokenizer.model import MultiScaleVQ
from var.conditioning import ClassPrompt
from var.presets import PRESETS
from var.transformer import NextScaleTransformer

GOLDENS = Path(__file__).parent / "goldens"
State = dict[str, torch.Tensor]


def weights(folder: str, part: str = "") -> State:
    state = load_file(GOLDENS / folder / "weights.safetensors")
    return {key.removeprefix(part): tensor for key, tensor in state.items() if key.startswith(part)}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The tiny official checkpoints as .pth files."""
    states = {
        "vae": weights("vqvae_tiny") | {"quantize.ema_vocab_hit_SV": torch.rand(10, 64)},  # as published: 10 rows
        "other_vae": weights("vqvae_tiny_nin"),
        "var": weights("var_tiny"),
        "saln": weights("var_tiny_saln"),
        "drafter_2": weights("code_tiny", "drafter."),
        "refiner_2": weights("code_tiny", "refiner."),
    }
    for name, state in states.items():
        torch.save(state, tmp_path / f"{name}.pth")
    return {name: tmp_path / f"{name}.pth" for name in states}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


# --- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transformer", ["var", "saln"])
def test_round_trip_of_var_is_bit_equal(files: dict[str, Path], tmp_path: Path, transformer: str) -> None:
    out = tmp_path / "ours"
    convert(out, family="var", vae=files["vae"], transformer=files[transformer], flags=Flags(heads=4))
    convert_back(out, tmp_path / "back")
    assert same(torch.load(tmp_path / "back/vae.pth"), torch.load(files["vae"]))
    assert same(torch.load(tmp_path / "back/transformer.pth"), torch.load(files[transformer]))


def test_round_trip_of_code_is_bit_equal(files: dict[str, Path], tmp_path: Path) -> None:
    drafter, refiner = files["drafter_2"], files["refiner_2"]
    convert(tmp_path / "ours", family="code", vae=files["vae"], transformer=drafter, refiner=refiner)
    convert_back(tmp_path / "ours", tmp_path / "back")
    assert same(torch.load(tmp_path / "back/transformer.pth"), torch.load(drafter))
    assert same(torch.load(tmp_path / "back/refiner.pth"), torch.load(refiner))


def test_folder_and_memory_give_the_official_tokens(files: dict[str, Path], tmp_path: Path) -> None:
    recorded = load_file(GOLDENS / "code_tiny/io.safetensors")
    given = {"vae": files["vae"], "transformer": files["drafter_2"], "refiner": files["refiner_2"]}
    convert(tmp_path / "ours", family="code", **given)
    for pipeline in (load_pipeline(tmp_path / "ours", device="cpu"), NextScalePipeline.from_official(**given)):
        assert pipeline.config.handover == 2  # from the names of the files
        pipeline.set_progress_bar_config(disable=True)
        labels = recorded["labels"].tolist()
        output = pipeline(class_labels=labels, guidance_scale=1.5, top_k=1, top_p=1.0, seed=0, output_type="pt")
        for k, tokens in enumerate(output.tokens):
            assert torch.equal(tokens, recorded[f"ids_scale{k}"])
        torch.testing.assert_close(output.images, recorded["img01"], atol=5e-5, rtol=0)


def test_a_trainers_file_is_searched(files: dict[str, Path], tmp_path: Path) -> None:
    trainer = {
        "config": {"depth": 4},
        "var_wo_ddp": {f"module.{key}": tensor for key, tensor in weights("var_tiny").items()},
        "vae_local": weights("vqvae_tiny"),
        "var_opt": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }
    both = tmp_path / "ar-ckpt-last.pth"
    torch.save({"epoch": 3, "trainer": trainer, "args": {"exp_name": "x"}}, both)
    models = load_official(vae=both, transformer=both)
    plain = load_official(vae=files["vae"], transformer=files["var"])
    for name in ("vqvae", "transformer"):
        assert same(models[name].state_dict(), plain[name].state_dict())


def test_safetensors_half_precision_and_the_old_format_are_read(files: dict[str, Path], tmp_path: Path) -> None:
    half = {key: t.half() if t.is_floating_point() else t for key, t in weights("var_tiny").items()}
    save_file(half, tmp_path / "half.safetensors")
    torch.save(half, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("half.safetensors", "old.pth"):
        convert(tmp_path / "ours", family="var", vae=files["vae"], transformer=tmp_path / name, overwrite=True)
        convert_back(tmp_path / "ours", tmp_path / "back", overwrite=True)
        assert same(torch.load(tmp_path / "back/transformer.pth"), half)


# --- what the tensors tell ----------------------------------------------------------------------------------------

SIDES = st.lists(st.integers(1, 6), min_size=1, max_size=5).map(sorted)


@settings(max_examples=12)
@given(
    sides=SIDES,
    depth=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_width=st.sampled_from([4, 6]),
    mlp_ratio=st.sampled_from([2.0, 4.0, 2.5]),
    classes=st.integers(1, 9),
    qk_norm=st.booleans(),
    shared=st.booleans(),
)
def test_transformer_config_is_read_off_the_tensors(
    sides: list[int],
    depth: int,
    heads: int,
    head_width: int,
    mlp_ratio: float,
    classes: int,
    qk_norm: bool,
    shared: bool,
) -> None:
    sizes = {
        "depth": depth,
        "width": heads * head_width,
        "heads": heads,
        "mlp_ratio": mlp_ratio,
        "num_classes": classes,
    }
    variant = {"qk_norm": qk_norm, "shared_ada": shared, "vocab_size": 11, "latent_channels": 3}
    model = adapters.VAR.model(**sizes, **variant, schedule=sides)
    state = adapters.to_official(adapters.VAR, model.state_dict(), model.config)
    state |= adapters.VAR.official_buffers(model.config, torch.float32)
    schedule = adapters.read_schedule(state)
    config = adapters.read_config(adapters.VAR, state, schedule=schedule, heads=None if qk_norm else heads)
    assert {key: model.config[key] for key in config} == config
    assert same(adapters.from_official(adapters.VAR, state, config), model.state_dict())
    assert not adapters.kept_buffers(adapters.VAR, state, config)


@settings(max_examples=10)
@given(
    sides=SIDES,
    factors=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    stem=st.sampled_from([32, 64]),
    phis=st.sampled_from([0, 1, 2, 4, 5]),
)
def test_tokenizer_config_is_read_off_the_tensors(sides: list[int], factors: list[int], stem: int, phis: int) -> None:
    channels = [32 * factor for factor in factors]
    sizes = {"channels": channels, "stem_channels": None if stem == channels[0] else stem, "num_phis": phis}
    with torch.device("meta"):
        model = adapters.VQVAE.model(**sizes, vocab_size=7, latent_channels=3, layers_per_block=1, schedule=sides)
    state = adapters.to_official(adapters.VQVAE, model.state_dict(), model.config)
    config = adapters.read_config(adapters.VQVAE, state, schedule=sides)
    assert {key: model.config[key] for key in config} == config
    assert adapters.from_official(adapters.VQVAE, state, config).keys() == model.state_dict().keys()


def test_what_tensors_cannot_tell_is_told(files: dict[str, Path]) -> None:
    given = {"vae": files["vae"], "transformer": files["var"]}
    usual = load_official(**given)["transformer"]
    told = load_official(**given, flags=Flags(norm_eps=0.1, phi_ratio=-0.3, cosine=True))
    assert (usual.config.norm_eps, told["transformer"].config.norm_eps) == (1e-6, 0.1)
    quantizer = told["vqvae"].quantizer
    assert quantizer.cosine and quantizer.phis[0].ratio == 0.3
    hidden = [
        model(None, model.condition(ClassPrompt(torch.tensor([1]))), scales=range(1))
        for model in (usual, told["transformer"])
    ]
    assert not torch.allclose(*hidden, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "pixels", "millions"),
    [("d16", 256, 310.3), ("d20", 256, 600.9), ("d24", 256, 1033.4), ("d30", 256, 2010.0), ("d36", 512, 2353.9)],
)
def test_the_published_sizes_are_detected(name: str, pixels: int, millions: float) -> None:
    """Parameters in millions are those of the official constructors."""
    with torch.device("meta"):
        model = adapters.VAR.model(**PRESETS[name], schedule=f"var{pixels}")
    state = adapters.to_official(adapters.VAR, model.state_dict(), model.config)
    assert sum(tensor.numel() for tensor in state.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    state |= adapters.VAR.official_buffers({"schedule": f"var{pixels}", "width": 1, "depth": 0}, torch.float32)
    config = adapters.read_config(adapters.VAR, state, schedule=adapters.read_schedule(state))
    assert config == {key: model.config[key] for key in config}
    wanted = PRESETS[name].items() - {("drop_path", PRESETS[name]["drop_path"])}
    assert wanted <= config.items() and config["num_classes"] == 1000


def test_known_schedules_without_recorded_levels() -> None:
    state = {"pos_1LC": torch.zeros(1, 680, 1), "lvl_embed.weight": torch.zeros(10, 1)}
    assert adapters.read_schedule(state).text == "1,2,3,4,5,6,8,10,13,16"
    with pytest.raises(ValueError, match="681 tokens fit no known schedule"):
        adapters.read_schedule(state | {"pos_1LC": torch.zeros(1, 681, 1)})


# --- files that cannot be read ------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, ("true",)


def _cut(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    return target


def _saved(target: Path, state: object, **options: int) -> Path:
    torch.save(state, target, **options)
    return target


def _pickled(target: Path, state: object) -> Path:
    target.write_bytes(pickle.dumps(state))
    return target


def _without(state: State, *keys: str) -> State:
    return {key: tensor for key, tensor in state.items() if not key.startswith(keys)}


BAD = {
    "missing": (lambda f, d: d / "no.pth", "no such file: .*no.pth"),
    "folder": (lambda f, d: d, "is a folder"),
    "pointer": (
        lambda f, d: _text(d / "p.pth", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        "is a Git LFS pointer",
    ),
    "web page": (lambda f, d: _text(d / "p.pth", "<!DOCTYPE html><html>404</html>"), "is a web page"),
    "empty": (lambda f, d: _text(d / "p.pth", ""), "is empty"),
    "text": (lambda f, d: _text(d / "p.pth", "hello there"), "not a weight file|damaged"),
    "cut .pth": (lambda f, d: _cut(f["var"], d / "cut.pth"), "damaged or cut short"),
    "cut .safetensors": (
        lambda f, d: _cut(GOLDENS / "var_tiny/weights.safetensors", d / "cut.safetensors"),
        "damaged or cut short",
    ),
    "code": (lambda f, d: _saved(d / "e.pth", weights("var_tiny") | {"x": Evil()}), r"pickle that .*posix\.system"),
    "bare pickle": (lambda f, d: _pickled(d / "e.pkl", Evil()), r"e\.pkl is a pickle that would run .*posix\.system"),
    "new protocol": (lambda f, d: _saved(d / "n.pth", weights("var_tiny"), pickle_protocol=4), "newer pickle protocol"),
    "no positions": (
        lambda f, d: _saved(d / "np.pth", _without(weights("var_tiny"), "pos_1LC")),
        r"np\.pth: VAR transformer checkpoint lacks pos_1LC",
    ),
    "tokenizer": (lambda f, d: f["vae"], "holds no VAR transformer"),
    "no tensors": (lambda f, d: _saved(d / "n.pth", {"a": 1}), "no tensor at all"),
    "hole": (
        lambda f, d: _saved(d / "h.pth", _without(weights("var_tiny"), "blocks.2.")),
        r"lacks blocks\.2\.ada_lin.* and \d+ more",
    ),
    "one missing": (
        lambda f, d: _saved(d / "m.pth", _without(weights("var_tiny"), "word_embed.weight")),
        "lacks word_e",
    ),
    "unknown": (
        lambda f, d: _saved(d / "u.pth", weights("var_tiny") | {"blocks.0.attn.extra": torch.zeros(1)}),
        r"has unknown blocks\.0\.attn\.extra",
    ),
    "shape": (
        lambda f, d: _saved(d / "s.pth", weights("var_tiny") | {"blocks.1.ffn.fc2.bias": torch.zeros(5)}),
        r"blocks\.1\.ffn\.fc2\.bias is \(5,\), expected \(64,\)",
    ),
    "key bias": (
        lambda f, d: _saved(d / "b.pth", weights("var_tiny") | {"blocks.1.attn.zero_k_bias": torch.ones(64)}),
        r"blocks\.1\.attn\.zero_k_bias is not what",
    ),
    "eight bits": (
        lambda f, d: _saved(
            d / "f8.pth", weights("var_tiny") | {"blocks.1.ffn.fc2.bias": torch.zeros(64, dtype=torch.float8_e4m3fn)}
        ),
        r"blocks\.1\.ffn\.fc2\.bias must be float16, bfloat16, float32 or 64, got float8_e4m3fn",
    ),
    "whole numbers": (
        lambda f, d: _saved(d / "i.pth", weights("var_tiny") | {"head.bias": torch.zeros(64, dtype=torch.int64)}),
        r"head\.bias must be float16, bfloat16, float32 or 64, got int64",
    ),
    "flat": (
        lambda f, d: _saved(d / "flat.pth", weights("var_tiny") | {"pos_1LC": torch.zeros(3)}),
        r"flat\.pth: VAR transformer checkpoint: pos_1LC is \(3,\), and has too few dimensions",
    ),
    "nothing": (
        lambda f, d: _saved(d / "no.pth", weights("var_tiny") | {"word_embed.weight": torch.zeros(0, 16)}),
        r"word_embed\.weight is \(0, 16\), and holds nothing",
    ),
    "far block": (
        lambda f, d: _saved(d / "far.pth", weights("var_tiny") | {"blocks.3000000.attn.q_bias": torch.zeros(64)}),
        "blocks are numbered up to 3000000, and there are only 5",
    ),
    "two of one name": (
        lambda f, d: _saved(d / "two.pth", weights("var_tiny") | {"module.head.bias": torch.ones(64)}),
        r"two tensors of the file are head\.bias, as module\.head\.bias is, and differ",
    ),
    "not a number": (
        lambda f, d: _saved(d / "n.pth", weights("var_tiny") | {"blocks.1.ffn.fc2.bias": torch.full((64,), torch.nan)}),
        r"blocks\.1\.ffn\.fc2\.bias holds NaN",
    ),
}


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_clear_line(files: dict[str, Path], tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    bad = make(files, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        convert(tmp_path / "ours", family="var", vae=files["vae"], transformer=bad)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".ours.*"))


@pytest.mark.parametrize(
    ("given", "flags", "message"),
    [
        ({"vae": "other_vae"}, {}, "tokenizer and the transformer do not belong together: vocab_size is 48 and 64"),
        ({"vae": "var"}, {}, "holds no VAR tokenizer"),
        ({}, {"depth": 16}, "depth is given as 16, the transformer has 4 blocks"),
        ({}, {"heads": 8}, "heads is 8, the transformer has 4"),
        ({}, {"schedule": "1,1x3,2x5,2x8"}, "attn_bias_for_masking is not what the scales 1,1x3,2x5,2x8"),
        ({}, {"schedule": "1,2,3"}, "schedule 1,2,3 has 14 tokens, the transformer was built for 30"),
        ({}, {"phi_ratio": 0.0}, "phi_ratio is 0, the tokenizer has 4 phi convolutions"),
        ({}, {"phi_ratio": float("nan")}, r"phi_ratio must be in -1\.\.1, got nan"),
        ({}, {"beta": -1.0}, "beta must be 0 or more, got -1.0"),
        ({"transformer": "saln"}, {"heads": -4}, "heads must be 1 or more, got -4"),
        ({"transformer": "saln"}, {"heads": 7}, "saln.pth: width must be a multiple of heads"),
        ({"vae": "hf://nobody"}, {}, "hf://nobody must be hf://OWNER/NAME/FILE"),
        ({"refiner": "refiner_2"}, {}, "var family needs the files vae, transformer; got vae, transformer, refiner"),
        ({"family": "code"}, {}, "code family needs the files vae, transformer, refiner"),
        ({"family": "code", "refiner": "refiner_2"}, {"handover": 4}, "handover must be in 1..3 scales, got 4"),
        ({"family": "code", "refiner": "var"}, {}, "handover must be given"),
    ],
)
def test_files_that_do_not_fit(
    files: dict[str, Path], tmp_path: Path, given: dict[str, str], flags: dict, message: str
) -> None:
    chosen = {"family": "var", "vae": "vae", "transformer": "var"} | given
    arguments = {name: files.get(value, value) if name != "family" else value for name, value in chosen.items()}
    with pytest.raises(ValueError, match=message) as caught:
        convert(tmp_path / "ours", **arguments, flags=Flags(**flags))
    assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()


def test_an_existing_folder_is_kept(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/mine.txt").touch()
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "ours", family="var", vae=files["vae"], transformer=files["var"])
    assert (tmp_path / "ours/mine.txt").exists()


def test_only_a_converted_folder_is_replaced(files: dict[str, Path], tmp_path: Path) -> None:
    given = {"family": "var", "vae": files["vae"], "transformer": files["var"], "overwrite": True}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(ValueError, match="is no folder that was made by converting"):
        convert(tmp_path / "mine", **given)
    with pytest.raises(ValueError, match=r"is no folder that was made"):
        convert(files["saln"], **given)
    convert(tmp_path / "ours", **given)
    convert_back(tmp_path / "ours", tmp_path / "back")
    given |= {"transformer": tmp_path / "back/transformer.pth"}
    with pytest.raises(ValueError, match=r"back holds .*transformer\.pth, which is read"):
        convert(tmp_path / "back", **given)
    before = {path: path.read_bytes() for path in (tmp_path / "ours").rglob("*.safetensors")}
    with pytest.raises(ValueError, match=r"ours holds .*ours, which is read"):
        convert_back(tmp_path / "ours", tmp_path / "ours", overwrite=True)
    with pytest.raises(ValueError, match="only a model with bitwise True"):
        convert_back(tmp_path / "ours", tmp_path / "back", family="infinity", overwrite=True)
    assert (tmp_path / "back/vae.pth").is_file()
    convert(tmp_path / "ours", **given)
    assert before == {path: path.read_bytes() for path in (tmp_path / "ours").rglob("*.safetensors")}
    assert not list(tmp_path.glob(".*"))


def test_a_training_run_is_written_back(files: dict[str, Path], tmp_path: Path) -> None:
    convert(tmp_path / "run/step-5", family="var", vae=files["vae"], transformer=files["var"])
    (tmp_path / "run/latest").symlink_to("step-5")
    convert_back(tmp_path / "run", tmp_path / "back")
    assert same(torch.load(tmp_path / "back/transformer.pth"), torch.load(files["var"]))
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        convert_back(tmp_path / "nowhere", tmp_path / "other")


def test_a_model_the_official_code_lacks_is_not_written(tmp_path: Path, tiny_vqvae, tiny_text_model) -> None:
    tiny_vqvae.save_pretrained(tmp_path / "ours/vqvae")
    tiny_text_model.save_pretrained(tmp_path / "ours/transformer")
    with pytest.raises(ValueError, match="norm_groups 32"):
        convert_back(tmp_path / "ours", tmp_path / "back")
    with pytest.raises(ValueError, match="conditioning class"):
        adapters.to_official(adapters.VAR, tiny_text_model.state_dict(), tiny_text_model.config)


# --- the command and memory ---------------------------------------------------------------------------------------


def test_command(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def command(*words: object) -> int:
        parser = argparse.ArgumentParser()
        convert_cli.configure(parser)
        return convert_cli.run(parser.parse_args([str(word) for word in words]))

    ours, back = tmp_path / "ours", tmp_path / "back"
    assert command("--from", "var", "--vae", files["vae"], "--transformer", files["var"], "--out", ours) == 0
    assert "depth 4, width 64, heads 4" in capsys.readouterr().out
    assert command("--to", "var", "--model", ours, "--out", back) == 0
    assert same(torch.load(back / "transformer.pth"), torch.load(files["var"]))
    with pytest.raises(ValueError, match="--from code needs --refiner"):
        command("--from", "code", "--vae", files["vae"], "--drafter", files["var"], "--out", ours)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "one of the arguments --from --to is required"),
        ("--from var --to var", "argument --to: not allowed with argument --from"),
        ("--from mvar", "argument --from: invalid choice: 'mvar'"),
        ("--from var --vae vae.pth", "--from var needs --transformer"),
        ("--from code --vae vae.pth --drafter drafter_2.pth", "--from code needs --refiner"),
        (
            "--from var --vae vae.pth --transformer var.pth --refiner refiner_2.pth",
            "--refiner goes with --from code, not",
        ),
        ("--from var --vae vae.pth --transformer var.pth --handover 2", "--handover goes with --from code, not with"),
        (
            "--from var --vae vae.pth --transformer var.pth --text-encoder t5",
            "--text-encoder goes with --from infinity",
        ),
        (
            "--from infinity --vae vae.pth --transformer var.pth --cosine",
            "--cosine goes with --from code or --from hmar or --from var",
        ),
        (
            "--to var --model ours --vae vae.pth",
            "--vae goes with --from code or --from hmar or --from infinity or --from var, not with",
        ),
        ("--to var", "--to needs --model"),
        ("--to var --model nowhere", "model nowhere is no folder"),
        ("--from var --vae vae.pth --transformer var.pth --schedule 1,2,x", "schedule '1,2,x' is not readable"),
        ("--from var --vae vae.pth --transformer var.pth --deep 3", "unrecognized arguments: --deep 3"),
        ("--from var --vae vae.pth --transformer var.pth --phi-ratio half", "invalid float value: 'half'"),
        ("--from var --vae vae.pth --transformer var.pth --depth 16", "depth is given as 16, the transformer has 4"),
        ("--from var --vae no.pth --transformer no.pth", "--vae no.pth does not exist"),
        ("--from var --vae hf://nobody --transformer var.pth", "hf://nobody must be hf://OWNER/NAME/FILE"),
        ("--from var --vae var.pth --transformer var.pth --out /proc/x", "holds no VAR tokenizer"),
        ("--from var --vae vae.pth --transformer var.pth --out /proc/x", "out /proc/x cannot be made: "),
    ],
)
def test_mistakes_on_the_command_line(
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words += "" if "--out" in words else " --out made"
    assert nextscale.main(["convert", *words.split()]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and message in error
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".*"))


def test_hub_repositories_load_by_id(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path], tmp_path: Path) -> None:
    import huggingface_hub

    asked = []

    def download(repo: str, filename: str, revision: str | None) -> str:
        asked.append((repo, filename, revision))
        return str(files[Path(filename).stem])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    official = {"vae": "hf://owner/name@v1/vae.pth", "transformer": "hf://owner/name/sub/var.pth"}
    models = load_official(**official)
    assert asked == [("owner/name", "sub/var.pth", None), ("owner/name", "vae.pth", "v1")]
    convert(tmp_path / "ours", family="var", **official)
    given = {"owner/converted": None, "owner/other": "main"}

    def snapshot(repo: str, *, revision: str | None = None, **_) -> str:
        assert revision == given[repo]
        return str(tmp_path / "ours")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for pipeline in (
        load_pipeline("owner/converted", device="cpu"),
        load_pipeline("owner/other@main", device="cpu"),
        NextScalePipeline.from_pretrained("owner/converted"),
    ):
        assert same(pipeline.transformer.state_dict(), models["transformer"].state_dict())


def test_all_shards_come_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    (tmp_path / "sub").mkdir()
    index = tmp_path / "sub/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}))
    asked = []

    def download(repo: str, filename: str, revision: str | None) -> str:
        asked.append(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch("hf://owner/name/sub/model.safetensors.index.json") == index
    assert asked == ["sub/model.safetensors.index.json", "sub/1.safetensors", "sub/2.safetensors"]


def test_files_in_half_precision_draw_at_once(files: dict[str, Path], tmp_path: Path) -> None:
    """The head and the quantiser become float32, as `load_pipeline` has them."""
    halved = {}
    for name in ("vae", "var"):
        state = torch.load(files[name], weights_only=True)
        halved[name] = tmp_path / f"{name}-half.pth"
        torch.save(
            {key: v.to(torch.bfloat16) if v.is_floating_point() else v for key, v in state.items()}, halved[name]
        )
    pipeline = NextScalePipeline.from_official(vae=halved["vae"], transformer=halved["var"])
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert next(pipeline.transformer.head.parameters()).dtype == torch.float32
    assert np.isfinite(pipeline(class_labels=1, seed=0, output_type="np").images).all()


def test_one_tensor_in_half_precision_makes_no_model_of_it(files: dict[str, Path], tmp_path: Path) -> None:
    state = weights("var_tiny")
    torch.save(state | {"pos_start": state["pos_start"].bfloat16()}, tmp_path / "mixed.pth")
    transformer = load_official(vae=files["vae"], transformer=tmp_path / "mixed.pth")["transformer"]
    assert {p.dtype for p in transformer.parameters()} == {torch.float32}


def test_a_file_that_holds_itself_is_read(tmp_path: Path) -> None:
    whole = {"model": weights("var_tiny")}
    whole["again"] = whole
    torch.save(whole, tmp_path / "ring.pth")
    assert same(read_state(tmp_path / "ring.pth", adapters.VAR.roots, "VAR"), weights("var_tiny"))


def test_heads_of_a_refiner_without_cosine_attention_are_told(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("drafter_2", "refiner_2"):
        state = torch.load(files[name], weights_only=True)
        torch.save({key: v for key, v in state.items() if "scale_mul" not in key}, tmp_path / f"plain_{name}.pth")
    given = {"vae": files["vae"], "transformer": tmp_path / "plain_drafter_2.pth"}
    given |= {"refiner": tmp_path / "plain_refiner_2.pth"}
    made = load_official(**given, flags=Flags(heads=2, refiner_heads=4))
    assert (made["transformer"].config.heads, made["refiner"].config.heads) == (2, 4)
    with pytest.raises(ValueError, match=r"without QK-norm, \d+ wide, does not tell its heads"):
        load_official(**given, flags=Flags(heads=2))


def test_oblong_scales_have_no_official_file() -> None:
    sizes = {"depth": 1, "width": 8, "heads": 1, "vocab_size": 9, "latent_channels": 3, "schedule": "1x2,2x4"}
    model = NextScaleTransformer(**sizes)
    with pytest.raises(ValueError, match="only a model of square scales can be a VAR transformer; these are 1x2,2x4"):
        adapters.to_official(adapters.VAR, model.state_dict(), model.config)


def test_a_disk_that_is_full_is_named(tmp_path: Path) -> None:
    """What torch says then names neither the file nor the reason."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match=r"full cannot be written; is the disk full\? .*No space left on device"):
        write_pth(Path("/dev/full"), {"x": torch.zeros(2**20)}, [])


def test_conversions_beside_each_other_leave_each_other_alone(tmp_path: Path) -> None:
    left = tmp_path / f".out.partial-{2**22 + 1}"  # of a process that cannot be
    left.mkdir()
    other = tmp_path / ".out.partial-1"
    other.mkdir()
    with finished_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "x").write_text("x")
        assert not left.exists() and other.exists()
    assert (tmp_path / "out/x").read_text() == "x"


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replace = tmp_path / "out", os.replace
    out.mkdir()
    (out / "model_index.json").write_text("old")

    def full(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with (
        pytest.raises(OSError, match="No space left"),
        finished_folder(out, overwrite=True) as folder,
    ):
        (folder / "model_index.json").write_text("new")
    assert (out / "model_index.json").read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_what_a_killed_process_had_moved_away_comes_back(tmp_path: Path) -> None:
    dead = 2**22 + 1
    out, old = tmp_path / "out", tmp_path / f".out.old-{dead}"
    old.mkdir()
    (old / "model_index.json").write_text("old")
    with pytest.raises(ValueError, match="exists already"), finished_folder(out, overwrite=False):
        pass
    assert (out / "model_index.json").read_text() == "old"
    half = tmp_path / f".out.gone-{dead}"
    half.mkdir()  # of one that was killed as it removed the old one
    out.rename(tmp_path / "elsewhere")
    with finished_folder(out, overwrite=False) as folder:
        (folder / "model_index.json").write_text("old")
    assert not half.exists()
    old.mkdir()  # of one that was killed after it had put the new one in place
    with finished_folder(out, overwrite=True) as folder:
        (folder / "model_index.json").write_text("new")
    assert (out / "model_index.json").read_text() == "new" and not old.exists()


def test_a_tokenizer_of_normed_scales_has_no_official_file() -> None:
    sizes = {"channels": [32, 32], "latent_channels": 4, "vocab_size": 16, "schedule": "1,2,4"}
    model = MultiScaleVQ(**sizes, normalize_scales=True)
    with pytest.raises(ValueError, match="only a model with normalize_scales False"):
        adapters.to_official(adapters.VQVAE, model.state_dict(), model.config)


def test_a_hub_that_cannot_be_reached_is_one_line(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import logging

    def unreachable(repo: str, filename: str, revision: str | None) -> str:
        logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError(f"no connection for {repo} {filename}\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    where = "hf://FoundationVision/var/var_d16.pth"
    words = ["--from", "var", "--vae", files["vae"], "--transformer", where, "--out", tmp_path / "made"]
    assert nextscale.main(["convert", *map(str, words)]) == 2
    message = f"{where} could not be had from the Hub: no connection for FoundationVision/var var_d16.pth"
    assert capfd.readouterr().err == f"nextscale: error: {message}\n"
    assert logging.get_verbosity() == logging.WARNING


def test_a_link_is_written_through(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    for _ in range(2):
        convert(tmp_path / "link", family="var", vae=files["vae"], transformer=files["var"], overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/model_index.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_streaming_maps_the_file_anew(files: dict[str, Path], tmp_path: Path) -> None:
    mapped = []

    def make() -> State:
        mapped.append(1)
        return read_state(files["var"], adapters.VAR.roots, adapters.VAR.what)

    state = make()
    size = sum(tensor.nbytes for tensor in state.values())
    mapped.clear()
    assert [key for key, _ in stream(make, budget=size // 4)] == list(state)
    assert 3 <= len(mapped) <= 6
    write_safetensors(tmp_path / "copy.safetensors", make)
    assert same(load_file(tmp_path / "copy.safetensors"), state)


MEASURE = """
import resource, sys
from sample.convert import convert, convert_back
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "back":
    convert_back(sys.argv[2], sys.argv[3])
else:
    convert(sys.argv[3], family="var", vae=sys.argv[1], transformer=sys.argv[2])
print(before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_peak_memory_of_a_large_conversion(files: dict[str, Path], tmp_path: Path) -> None:
    """Peak resident memory of the whole process, mapped pages and imports included, over the size of the file."""
    model = adapters.VAR.model(
        depth=8, width=1024, heads=16, num_classes=1000, vocab_size=64, latent_channels=8, schedule="1,2,3,4"
    )
    state = adapters.to_official(adapters.VAR, model.state_dict(), model.config)
    big = _saved(tmp_path / "big.pth", state | adapters.VAR.official_buffers(model.config, torch.float32))
    del model, state
    size, ours, back = big.stat().st_size, tmp_path / "ours", tmp_path / "back"
    for words in ((files["vae"], big, ours), ("back", ours, back)):
        command = [sys.executable, "-c", MEASURE, *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
        before, peak = map(int, result.stdout.split()[-2:])
        assert peak - before < 0.6 * size, f"{(peak - before) / size:.2f} of the file's {size / 1e6:.0f} MB"
    assert same(torch.load(back / "transformer.pth", mmap=True), torch.load(big, mmap=True))
