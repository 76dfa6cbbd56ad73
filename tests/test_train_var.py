"""What a transformer's training takes and refuses: attention backends, labels, cached text states."""

from __future__ import annotations

import copy
import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from training_toys import curve, in_child

import nextscale
from train import cache_text, cache_tokens, export, train_var
from train.config import exit_code
from train.new_classes import relabelled
from train.optimizers import OptimizerConfig
from train.var_objective import VarLossConfig, VarObjective

VECTORS = "conditioner.embedding.weight"
TINY = ["--run.log_every=1", "--run.checkpoint_every=4", "--run.validate_every=4", "--run.workers=0", "--run.cpu=true"]
TINY += ["--run.batch_size=4", "--run.total_images=16", "--run.validation_images=4", "--run.previews=2"]
TINY += ["--run.bar_every=60", "--run.precision=no", "--data.source=scenes", "--data.size=8", "--data.num_scenes=24"]
TINY += ["--transformer.depth=1", "--transformer.width=16", "--transformer.heads=2"]


def stage(main, *arguments: str) -> int:
    """Exit code of a stage's command line in a child process."""
    return in_child(lambda: os._exit(exit_code(main, list(arguments))))


@pytest.fixture(scope="module")
def vqvae_folder(tiny_vqvae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqvae")
    tiny_vqvae.save_pretrained(folder)
    return folder


class Recorder(torch.nn.Module):
    """Stands in for a transformer; keeps what it was called with."""

    gradient_checkpointing = False

    def forward(self, inputs, cond, **passes):
        self.passes = passes


def test_attention_backend_reaches_the_model_in_training(tiny_class_model):
    objective = VarObjective(tiny_class_model, VarLossConfig(), OptimizerConfig())
    objective.transformer, objective.attention = Recorder(), "flex"
    cond = SimpleNamespace(start_BD=torch.empty(1, device="meta"))
    objective.hidden(None, cond, layers=[0])
    assert objective.transformer.passes == {"layers": [0], "attention_backend": "flex"}
    with torch.no_grad():
        objective.hidden(None, cond)
    assert objective.transformer.passes == {}


@pytest.mark.parametrize(("backend", "words"), [("flex", "attention flex cannot train on a CPU"), ("flash", "sdpa")])
def test_attention_backends_that_cannot_train_are_one_line(vqvae_folder, tmp_path, capfd, backend, words):
    arguments = [*TINY, f"--tokens.tokenizer={vqvae_folder}", f"--run.run_dir={tmp_path}", f"--attention={backend}"]
    assert stage(train_var.main, *arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and words in lines[0]


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_class_training_needs_labels(vqvae_folder, tmp_path, capfd, workers):
    from test_data import write_parquet

    path = write_parquet(tmp_path / "some.parquet", 20, label=[0, 1, None, 2] * 5, text=["a thing"] * 20)
    arguments = [*TINY, f"--tokens.tokenizer={vqvae_folder}", f"--run.run_dir={tmp_path}/run", "--data.source=parquet"]
    arguments += [f"--data.path={path}", f"--run.workers={workers}", f"--data.cache_dir={tmp_path}/arrow"]
    streamed = [*arguments, "--data.streaming=true", "--data.stream_val_images=1"]
    for given, words in (
        (arguments, "has no label: class-conditional training needs one"),
        (streamed, "data.num_classes must be given for class-conditional training"),
        ([*streamed, "--data.num_classes=3"], "a row has no label: class-conditional"),
    ):
        assert stage(train_var.main, *given) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
        assert len(errors) == 1 and words in errors[0] and "Traceback" not in errors[0]


def test_a_cache_with_unlabelled_images_trains_no_class_model(tiny_vqvae, tmp_path):
    from train.token_cache import TokenCache, tokenizer_hash, write_shard

    folder = tmp_path / "train"
    folder.mkdir()
    write_shard(folder, 0, np.zeros((2, 21), np.uint16), [{"label": label, "caption": ""} for label in (0, -1)])
    manifest = {"tokenizer_hash": tokenizer_hash(tiny_vqvae), "num_classes": 1, "images": 2, "shard_size": 8}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert len(TokenCache(tmp_path, "train", tiny_vqvae)) == 2
    with pytest.raises(ValueError, match=r"an image of cache .* has no label"):
        TokenCache(tmp_path, "train", tiny_vqvae, labelled=True)
    with pytest.raises(ValueError, match=r"holds no latents: make it again with --cache\.latents=true"):
        TokenCache(tmp_path, "train", tiny_vqvae, latents=True)


# --- cached text states ----------------------------------------------------------------------------------------------

TEXT = ["--transformer.conditioning=text", "--transformer.text_length=32", "--text.train=false"]


def t5():
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    tokenizer = ByT5Tokenizer()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes, is_encoder_decoder=False, use_cache=False))
    return encoder, tokenizer


def clip(whole: bool = False):
    """A random CLIP text encoder with a tokenizer of single letters; `whole`: as a part of a CLIP model."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=32, **sizes, **ends)
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    if not whole:
        return CLIPTextModel(config), tokenizer
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=config.to_dict(), vision_config=vision)), tokenizer


@pytest.fixture(scope="module", params=[t5, clip, partial(clip, whole=True)], ids=["t5", "clip", "whole clip"])
def encoder_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(5)
    for component in request.param():
        component.save_pretrained(folder)
    return folder


def text_run(vqvae_folder, folder, *arguments: str) -> int:
    given = [*TINY, *TEXT, f"--tokens.tokenizer={vqvae_folder}", f"--run.run_dir={folder}", *arguments]
    return stage(train_var.main, *given)


def encode_texts(vqvae_folder, encoder_folder, cache, *arguments: str) -> int:
    given = [*TINY, *TEXT, f"--tokens.tokenizer={vqvae_folder}", f"--text.pretrained={encoder_folder}"]
    return stage(cache_text.main, *given, f"--text.cache={cache}", "--encode.file_size=7", *arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--run.run_dir="], "run.run_dir must name the run's folder"),
        (["--run.total_image=8"], "run.total_image"),
        (["--transformer.depth=0"], "depth must be 1 or more, got 0"),
        (["--transformer.heads=0"], "width must be a multiple of heads"),
        (["--progressive.coarse=9"], "progressive.coarse must be below the model's 3 scales, got 9"),
        (["--optimizer.clip=-1"], "clip must be 0 or more, got -1"),
        (["--progressive.until=0.5"], "progressive.first must be at most the model's 3 scales, or none joins; got 5"),
        (["--optimizer.betas=[0.9,1.5]"], "betas must be in [0, 1), got 1.5"),
        (["--optimizer.momentum=2"], "momentum must be in [0, 1), got 2"),
        (["--optimizer.end=-1"], "end is the last rate over the peak, in [0, 1], got -1"),
        (["--optimizer.weight_decay_end=-1"], "weight_decay_end must be 0 or more"),
        (["--run.validation_images=0"], "run.validation_images must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(vqvae_folder, tmp_path, capfd, arguments, words):
    given = [*TINY, f"--tokens.tokenizer={vqvae_folder}", f"--run.run_dir={tmp_path}/run", *arguments]
    assert stage(train_var.main, *given) == 2
    error = capfd.readouterr().err
    assert words in error.replace("\n", " ") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("cached", [False, True])
def test_the_folders_names_are_the_classes_names(vqvae_folder, tmp_path, capfd, cached):
    for name in ("cat", "big_dog"):
        for split, count in (("train", 8), ("val", 4)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (30 * i, 99, 9)).save(tmp_path / "data" / split / name / f"{i}.png")
    data = ["--data.source=folder", f"--data.path={tmp_path}/data", "--data.size=8"]
    given = [*TINY, f"--tokens.tokenizer={vqvae_folder}", f"--run.run_dir={tmp_path}/run"]
    if not cached:
        given += data
    if cached:  # then the run's configuration tells what the cache was made of
        where = [f"--cache.folder={tmp_path}/cache", f"--cache.tokenizer={vqvae_folder}", "--cache.workers=0"]
        assert stage(cache_tokens.main, *data, *where) == 0
        given += [f"--tokens.cache={tmp_path}/cache"]
    assert stage(train_var.main, *given) == 0
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]
    assert (saved["source"], saved["path"]) == ("folder", f"{tmp_path}/data")
    model, out = f"{tmp_path}/run/latest", f"{tmp_path}/out"
    capfd.readouterr()
    assert nextscale.main(["sample", "--model", model, "--device", "cpu", "--class", "big dog", "--out", out]) == 0
    assert nextscale.main(["sample", "--model", model, "--device", "cpu", "--class", "horse", "--out", out]) == 2
    assert "it has 0 big_dog, 1 cat" in capfd.readouterr().err


def test_what_labels_and_tokens_mean_does_not_change(vqvae_folder, tiny_vqvae, tmp_path, capfd):
    """A run goes on with the same class names only, and so does what starts from it, on the same tokens only."""
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(16):
            Image.new("RGB", (8, 8), (9 * i, 99, 9)).save(tmp_path / "data" / name / f"{i}.png")
    given = [*TINY, "--data.source=folder", f"--data.path={tmp_path}/data", "--data.size=8", "--data.val_fraction=0.2"]
    tokens, run = f"--tokens.tokenizer={vqvae_folder}", f"--run.run_dir={tmp_path}/run"
    assert stage(train_var.main, *given, tokens, run) == 0
    (tmp_path / "data/cat").rename(tmp_path / "data/zebra")
    capfd.readouterr()
    assert stage(train_var.main, *given, tokens, run, "--run.total_images=32") == 2
    assert "was trained with another list of classes" in capfd.readouterr().err
    small = [word for word in given if not word.startswith("--transformer.")]
    start, other = f"--start_from={tmp_path}/run/latest/transformer", f"--run.run_dir={tmp_path}/on"
    assert stage(train_var.main, *small, tokens, start, other) == 2
    assert "knows the classes cat, dog, and the data has dog, zebra" in capfd.readouterr().err
    anew = [*small, tokens, start, f"--run.run_dir={tmp_path}/anew", "--new_classes=true"]
    assert stage(train_var.main, *anew, "--run.total_images=8") == 0
    assert stage(train_var.main, *anew) == 0  # and goes on
    index = json.loads((tmp_path / "anew/latest/model_index.json").read_text())
    assert index["class_names"] == ["dog", "zebra"]
    (tmp_path / "data/zebra").rename(tmp_path / "data/cat")
    assert stage(train_var.main, *small, tokens, start, other) == 0
    assert stage(train_var.main, *given, tokens, "--new_classes=true", f"--run.run_dir={tmp_path}/no") == 2
    assert "new_classes=true is for a class model to fine-tune" in capfd.readouterr().err
    assert exit_code(export.main, ["--model", f"{tmp_path}/run", "--out", f"{tmp_path}/out"]) == 0  # in bfloat16
    start = f"--start_from={tmp_path}/out/transformer"
    assert stage(train_var.main, *small, tokens, start, f"--run.run_dir={tmp_path}/exported") == 0
    changed = copy.deepcopy(tiny_vqvae)
    changed.quantizer.codebook.weight.data.add_(1.0)
    changed.save_pretrained(tmp_path / "other")
    tokens = f"--tokens.tokenizer={tmp_path}/other"
    assert stage(train_var.main, *small, tokens, start, f"--run.run_dir={tmp_path}/no") == 2
    assert "tokens.tokenizer makes others" in capfd.readouterr().err


def test_a_class_model_takes_other_classes(tiny_class_model):
    """Those of a known name keep their vector, others begin as the null class; all else is the same."""
    made = relabelled(tiny_class_model, 4, ["owl", "Big_dog", "emu"], ["cat", "big dog"])  # the fourth has no name
    own_CD, new_CD = (model.state_dict()[VECTORS] for model in (tiny_class_model, made))
    assert new_CD.shape == (5, own_CD.shape[1]) and made.config.num_classes == 4
    assert torch.equal(new_CD[1], own_CD[1]) and all(torch.equal(new_CD[i], own_CD[-1]) for i in (0, 2, 3, 4))
    assert not torch.equal(own_CD[1], own_CD[-1])
    for name, weight in tiny_class_model.state_dict().items():
        assert name == VECTORS or torch.equal(weight, made.state_dict()[name])
    numbered = relabelled(tiny_class_model, 2, None, ["cat", "dog"]).state_dict()[VECTORS]
    assert all(torch.equal(vector_D, own_CD[-1]) for vector_D in numbered)


def test_new_classes_need_a_training_of_the_whole_model(vqvae_folder, tmp_path, capfd):
    given = [*TINY, f"--tokens.tokenizer={vqvae_folder}", "--transformer.mask=block_diagonal", "--transformer.depth=2"]
    assert stage(train_var.main, *given, f"--run.run_dir={tmp_path}/base") == 0
    more = [f"--start_from={tmp_path}/base", "--new_classes=true", "--masked.layers=1", f"--run.run_dir={tmp_path}/no"]
    assert stage(train_var.main, *given, *more) == 2
    assert "new_classes=true trains all of a model" in capfd.readouterr().err


def test_a_model_to_start_from_keeps_its_sizes(vqvae_folder, tmp_path, capfd):
    """Other sizes are refused, stochastic depth is taken, and config.yaml says what is trained."""
    from var.transformer import NextScaleTransformer

    given = [*TINY, f"--tokens.tokenizer={vqvae_folder}"]
    assert stage(train_var.main, *given, f"--run.run_dir={tmp_path}/base") == 0
    start = f"--start_from={tmp_path}/base/latest/transformer"
    model = NextScaleTransformer.from_pretrained(tmp_path / "base/latest/transformer")
    small = [word for word in given if not word.startswith("--transformer.")]
    assert stage(train_var.main, *small, start, f"--run.run_dir={tmp_path}/on", "--transformer.drop_path=0.3") == 0
    again = NextScaleTransformer.from_pretrained(tmp_path / "on/latest/transformer")
    assert again.config.drop_path == 0.3
    run = [f"--start_from={tmp_path}/base", f"--run.run_dir={tmp_path}/of-a-run"]
    assert stage(train_var.main, *small, *run, "--run.total_images=4") == 0
    assert stage(train_var.main, *small, "--start_from=nowhere", f"--run.run_dir={tmp_path}/no") == 2
    assert "start_from nowhere has no config.json, nor a transformer folder with one" in capfd.readouterr().err
    written = yaml.safe_load((tmp_path / "on/config.yaml").read_text())["transformer"]
    assert written["width"] == model.config.width and written["drop_path"] == 0.3
    assert stage(train_var.main, *small, start, f"--run.run_dir={tmp_path}/no", "--transformer.depth=7") == 2
    assert "transformer.depth 7 is not that of start_from" in capfd.readouterr().err


def test_cached_texts_train_as_the_encoder_does(vqvae_folder, encoder_folder, tmp_path):
    """With float32 states up to rounding (texts are encoded in other batches), with float16 up to its rounding."""
    from sample.load import load_pipeline

    assert text_run(vqvae_folder, tmp_path / "plain", f"--text.pretrained={encoder_folder}") == 0
    plain = [row["loss"] for row in curve(tmp_path / "plain")]
    for dtype, rel in (("float32", 1e-5), ("float16", 1e-3)):
        cache, folder = tmp_path / f"cache-{dtype}", tmp_path / dtype
        assert encode_texts(vqvae_folder, encoder_folder, cache, f"--encode.dtype={dtype}") == 0
        assert text_run(vqvae_folder, folder, f"--text.cache={cache}") == 0
        assert [row["loss"] for row in curve(folder)] == pytest.approx(plain, rel=rel)
    one, other = (load_pipeline(tmp_path / name, device="cpu") for name in ("plain", "float32"))
    a, b = (pipeline.encode_prompt(["a red ring", "a star"]) for pipeline in (one, other))
    assert torch.equal(a.states_BTE, b.states_BTE) and torch.equal(a.mask_BT, b.mask_BT)


def test_a_frozen_encoder_is_what_a_run_depends_on():
    from train.text_source import TextSource

    (one, tokenizer), (other, _) = t5(), t5()
    told = [TextSource(width=16, tokenizer=tokenizer, frozen=encoder).depends() for encoder in (one, one, other)]
    assert told[0] == told[1] != told[2]
    assert TextSource(width=16, tokenizer=tokenizer, trained=one).depends() == {} == TextSource(width=16).depends()


def test_text_cache_goes_on_adds_and_refuses(vqvae_folder, tmp_path, capfd):
    """A deleted file is made again and nothing else is; new captions add files; others are refused."""
    from train.text_cache import TextCache

    for name in ("encoder", "other"):
        for component in t5():
            component.save_pretrained(tmp_path / name)
    cache = tmp_path / "cache"
    assert encode_texts(vqvae_folder, tmp_path / "encoder", cache) == 0
    files = sorted(cache.glob("0*.safetensors"))
    before, count = [file.stat().st_mtime_ns for file in files], len(TextCache(cache))
    assert len(files) == -(-count // 7)
    files[0].unlink()
    assert text_run(vqvae_folder, tmp_path / "run", f"--text.cache={cache}") == 2
    assert "lacks the caption 'a " in capfd.readouterr().err
    assert encode_texts(vqvae_folder, tmp_path / "encoder", cache) == 0
    assert [file.stat().st_mtime_ns for file in files[1:]] == before[1:] and len(TextCache(cache)) == count
    assert encode_texts(vqvae_folder, tmp_path / "encoder", cache, "--data.num_scenes=60") == 0
    assert len(TextCache(cache)) > count
    assert encode_texts(vqvae_folder, tmp_path / "other", cache) == 2
    assert "was made with another encoder" in capfd.readouterr().err
    assert encode_texts(vqvae_folder, tmp_path / "nowhere", files[1] / "cache") == 2
    assert "text.cache must be in a folder, got" in capfd.readouterr().err
    for argument, words in (
        (f"--text.pretrained={tmp_path}/other", "was made with another encoder"),
        ("--transformer.text_length=48", "was made with another text_length (32, not 48)"),
        ("--text.train=true", "text.cache holds the states of a frozen encoder"),
    ):
        assert text_run(vqvae_folder, tmp_path / "run", f"--text.cache={cache}", argument) == 2
        assert words in capfd.readouterr().err.splitlines()[-1]


def test_encoders_that_cannot_be_are_one_line(vqvae_folder, tmp_path, capfd):
    from transformers import ViTConfig, ViTModel

    for component in clip():
        component.save_pretrained(tmp_path / "clip")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    clip()[1].save_pretrained(tmp_path / "vit")
    for folder, words, more in (
        ("nowhere", "could not be read", ()),
        ("vit", "is no text encoder but a vit model", ()),
        ("clip", "transformer.text_length must be at most 32", ("--transformer.text_length=64",)),
    ):
        assert text_run(vqvae_folder, tmp_path / "run", f"--text.pretrained={tmp_path / folder}", *more) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
        assert len(lines) == 1 and words in lines[0]


def test_captions_are_listed_without_images(tmp_path):
    from test_data import config, picture, write_parquet

    from train.data import build_dataset

    path = write_parquet(tmp_path / "some.parquet", 3, text=[["a", "b"], ["c"], []])
    table = build_dataset(config("parquet", path, tmp_path))
    assert [table.captions(i) for i in range(3)] == [("a", "b"), ("c",), ("",)]
    (tmp_path / "big_dog").mkdir()
    picture(0).save(tmp_path / "big_dog" / "0.png")
    assert build_dataset(config("folder", str(tmp_path), tmp_path)).captions(0) == ("big dog",)


def test_states_that_do_not_fit_the_dtype_are_refused():
    def read(captions, device):
        return {"states": torch.full((1, 3, 4), 1e6), "mask": torch.tensor([[True, True, False]])}

    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r"float16 cannot hold the states of 'a ring'"):
        cache_text.encode(accelerator, read, ["a ring"], cache_text.EncodeConfig())
    (states,) = cache_text.encode(accelerator, read, ["a ring"], cache_text.EncodeConfig(dtype="bfloat16"))
    assert states.shape == (2, 4) and states.dtype == torch.bfloat16
