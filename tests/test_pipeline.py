"""The pipeline: diffusers' conventions hold, a seed names an image, a saved pipeline draws the same images."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from sample.load import assemble, load_pipeline, load_tokenizer, model_digest, model_folder
from sample.pipeline import NextScalePipeline, image_seeds
from sample.plan import Plan, collaborative, plain
from sample.state import Hook
from sample.text import encode_prompts
from var.transformer import NextScaleTransformer

TEXTS = ["a red star", "a blue heart above a cross", "two rings"]


def pixels(pipeline, *args, **options):
    return pipeline(*args, output_type="np", **options).images


def test_output_types_agree(class_pipeline):
    made = {kind: class_pipeline(class_labels=2, seed=7, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert made["pil"].images[0].size == (8, 8)
    assert made["np"].images.shape == (1, 8, 8, 3) and made["np"].images.dtype == np.float32
    assert made["np"].images.min() >= 0 and made["np"].images.max() <= 1
    assert torch.equal(made["pt"].images, torch.from_numpy(made["np"].images).permute(0, 3, 1, 2))
    assert np.array_equal(np.asarray(made["pil"].images[0]), (made["np"].images[0] * 255).round().astype(np.uint8))
    assert np.array_equal(class_pipeline.decode(made["latent"].images, "np"), made["np"].images)
    assert [tuple(ids.shape) for ids in made["pil"].tokens] == [(1, 1), (1, 4), (1, 16)]
    images, seeds, _tokens = class_pipeline(class_labels=2, seed=7, output_type="np", return_dict=False)
    assert seeds == [7] and np.array_equal(images, made["np"].images)


def test_a_batch_is_its_images_one_by_one(class_pipeline, text_pipeline):
    together = class_pipeline(class_labels=[0, 1, 2, 3], seed=20, output_type="np")
    assert together.seeds == [20, 21, 22, 23]
    for i in range(4):
        alone = class_pipeline(class_labels=i, seed=20 + i, output_type="np")
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone.tokens, together.tokens))
        np.testing.assert_allclose(alone.images[0], together.images[i], atol=1e-5)
    together = text_pipeline(TEXTS, seed=[5, 4, 3], output_type="np")
    alone = [text_pipeline(text, seed=seed, output_type="np") for text, seed in zip(TEXTS, (5, 4, 3))]
    np.testing.assert_allclose(np.concatenate([one.images for one in alone]), together.images, atol=1e-5)


def test_one_text_is_encoded_as_one(text_pipeline):
    encoded = text_pipeline.encode_prompt(TEXTS[0])
    assert len(encoded) == 1
    assert np.array_equal(pixels(text_pipeline, encoded, seed=3), pixels(text_pipeline, TEXTS[0], seed=3))


def test_encoded_texts_serve_as_negatives_but_not_for_a_search(text_pipeline):
    from sample.search import Search
    from sample.search_steps import Step

    encoded = text_pipeline.encode_prompt(TEXTS[1:2])
    call = {"seed": 3, "guidance_scale": 2.0}
    expected = pixels(text_pipeline, TEXTS[0], negative_prompt=TEXTS[1], **call)
    assert np.array_equal(pixels(text_pipeline, TEXTS[0], negative_prompt=encoded, **call), expected)
    search = Search(candidates=2, steps=(Step(2, 1, "random"),))
    with pytest.raises(ValueError, match="search needs the texts"):
        text_pipeline(encoded, seed=3, search=search)


def test_a_model_without_some_of_its_weights_is_one_line(class_folder, tmp_path):
    shutil.copytree(class_folder, tmp_path / "more")
    path = tmp_path / "more/transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"depth": 3}))
    with pytest.raises(ValueError, match=r"its NextScaleTransformer lacks the weights blocks\.2"):
        load_pipeline(tmp_path / "more", device="cpu")


@pytest.mark.parametrize("seed", [1.7, [1.5], "one"])
def test_seeds_are_whole_numbers(class_pipeline, seed):
    with pytest.raises((ValueError, TypeError), match="seed must be"):
        class_pipeline(class_labels=[1], seed=seed)


def test_weights_are_cast_before_they_move(class_folder, monkeypatch):
    """Else a device has to hold them in float32 first."""
    moved = []
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *_, **__: moved.append(self.transformer.dtype))
    NextScalePipeline.from_pretrained(class_folder).to("cpu", torch.bfloat16)
    assert moved == [torch.bfloat16]


def test_a_text_encoder_elsewhere_keeps_what_it_wants_in_float32(text_folder):
    encoder = load_pipeline(text_folder, dtype="float16", device="cpu", text_device="cpu").text_encoder
    assert {p.dtype for name, p in encoder.named_parameters() if ".wo." in name} == {torch.float32}
    assert {p.dtype for name, p in encoder.named_parameters() if ".wi." in name} == {torch.float16}


def test_a_refiner_must_know_the_same_classes(class_pipeline, class_folder, tmp_path):
    model = class_pipeline.transformer
    fewer = NextScaleTransformer.from_config(dict(model.config) | {"num_classes": 2})
    NextScalePipeline(fewer, class_pipeline.vqvae).save_pretrained(tmp_path / "fewer")
    with pytest.raises(ValueError, match="class, 5; it has class, 2"):
        load_pipeline(class_folder, device="cpu", refiner=tmp_path / "fewer")


def test_a_refiner_must_have_the_same_phi(class_pipeline, class_folder, tmp_path):
    vqvae = class_pipeline.vqvae
    other = type(vqvae).from_config(vqvae.config, phi_ratio=0.7)
    other.load_state_dict(vqvae.state_dict())
    NextScalePipeline(class_pipeline.transformer, other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        load_pipeline(class_folder, device="cpu", refiner=tmp_path / "other")


def test_images_per_prompt_follow_their_prompt(text_pipeline):
    many = pixels(text_pipeline, TEXTS[:2], num_images_per_prompt=2, seed=1)
    one_by_one = [pixels(text_pipeline, TEXTS[i // 2], seed=1 + i)[0] for i in range(4)]
    np.testing.assert_allclose(many, np.stack(one_by_one), atol=1e-5)
    assert not np.allclose(pixels(text_pipeline, TEXTS[1], seed=1)[0], many[0], atol=1e-3)  # the text matters


def test_generators_name_images(class_pipeline):
    def generator(seed):
        return torch.Generator().manual_seed(seed)

    one = class_pipeline(class_labels=[1, 1], generator=generator(3), output_type="np")
    again = class_pipeline(class_labels=[1, 1], generator=generator(3), output_type="np")
    assert one.seeds == again.seeds and one.seeds[0] != one.seeds[1]
    assert np.array_equal(one.images, again.images)
    listed = class_pipeline(class_labels=[1, 1], generator=[generator(3), generator(3)], output_type="np")
    assert listed.seeds == [one.seeds[0]] * 2
    from_seeds = pixels(class_pipeline, class_labels=[1, 1], seed=one.seeds)
    assert np.array_equal(from_seeds, one.images)
    torch.manual_seed(0)
    fresh = [class_pipeline(class_labels=1).seeds for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_callbacks_see_every_scale_and_may_change_the_image(class_pipeline):
    seen = []

    def watch(pipeline, k, side, tensors):
        seen.append((pipeline is class_pipeline, k, side, tuple(tensors["tokens"].shape), sorted(tensors)))

    watched = pixels(
        class_pipeline,
        class_labels=1,
        seed=3,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["f_hat", "tokens"],
    )
    assert seen == [(True, k, s, (1, s * s), ["f_hat", "tokens"]) for k, s in enumerate((1, 2, 4))]
    assert np.array_equal(watched, pixels(class_pipeline, class_labels=1, seed=3))

    def reset_first(pipeline, k, side, tensors):
        return {"f_hat": tensors["f_hat"] + 5.0} if k == 0 else {}

    plain_run = class_pipeline(class_labels=1, seed=3, output_type="latent")
    changed = class_pipeline(class_labels=1, seed=3, output_type="latent", callback_on_step_end=reset_first)
    assert torch.equal(plain_run.tokens[0], changed.tokens[0])
    assert not torch.equal(plain_run.tokens[2], changed.tokens[2])  # later scales read the changed reconstruction
    assert (changed.images - plain_run.images).mean() > 1

    def reset_in_place(pipeline, k, side, tensors):
        return {"f_hat": tensors["f_hat"].add_(5.0)} if k == 0 else {}

    same = class_pipeline(class_labels=1, seed=3, output_type="latent", callback_on_step_end=reset_in_place)
    assert all(torch.equal(a, b) for a, b in zip(same.tokens, changed.tokens))


def test_diffusers_callbacks_say_what_they_want_to_see(class_pipeline):
    from diffusers.callbacks import PipelineCallback

    class Watch(PipelineCallback):
        seen = ()

        @property
        def tensor_inputs(self):
            return ["tokens"]

        def callback_fn(self, pipeline, step, side, tensors):
            self.seen = (*self.seen, sorted(tensors))
            tensors["tokens"].zero_()  # a copy: only what is returned counts
            return tensors

    watch = Watch(cutoff_step_ratio=None, cutoff_step_index=1)
    found = pixels(class_pipeline, class_labels=1, seed=3, callback_on_step_end=watch)
    assert watch.seen == (["tokens"],) * 3
    assert np.array_equal(found, pixels(class_pipeline, class_labels=1, seed=3))


def test_an_image_does_not_depend_on_torchs_defaults(class_pipeline):
    wanted = class_pipeline(class_labels=1, seed=3, output_type="latent").tokens
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = class_pipeline(class_labels=1, seed=3, output_type="latent").tokens
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_numbers_may_come_in_arrays(class_pipeline):
    listed = {"guidance_scale": [1.0, 2.0, 3.0], "top_k": [5, 4, 3], "seed": [4, 5], "num_images_per_prompt": 2}
    arrays = {name: np.array(value) for name, value in listed.items()}
    wanted, found = (class_pipeline(class_labels=1, output_type="pt", **call) for call in (listed, arrays))
    assert torch.equal(wanted.images, found.images) and wanted.seeds == found.seeds == [4, 5]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f / "tokenizer"), "has no tokenizer/, which its model_index.json names"),
        (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json is no list of a pipeline's parts"),
        (lambda f: (f / "model_index.json").write_text("{}"), "cannot be loaded: KeyError: '_class_name'"),
        (lambda f: cut(f / "text_encoder" / "model.safetensors"), "cannot be loaded: SafetensorError"),
    ],
)
def test_damaged_folders_are_named(text_folder, tmp_path, spoil, message):
    folder = shutil.copytree(text_folder, tmp_path / "model")
    spoil(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_pipeline(folder, device="cpu")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_save_and_load_round_trip(class_pipeline, text_pipeline, class_folder, text_folder):
    for pipeline, folder, what in (
        (class_pipeline, class_folder, {"class_labels": [0, 3]}),
        (text_pipeline, text_folder, {"prompt": TEXTS}),
    ):
        loaded = load_pipeline(folder, device="cpu")
        loaded.set_progress_bar_config(disable=True)
        assert np.array_equal(pixels(loaded, seed=2, **what), pixels(pipeline, seed=2, **what))


def test_a_training_run_loads_by_its_parts(text_pipeline, text_folder, tmp_path):
    export = tmp_path / "checkpoints" / "step_00000010" / "weights"
    export.mkdir(parents=True)
    for part in ("transformer", "vqvae", "text_encoder", "tokenizer"):
        (export / part).symlink_to(text_folder / part)
    (tmp_path / "latest").symlink_to(export)
    assert model_folder(tmp_path) == model_folder(tmp_path / "latest") == export.resolve()
    loaded = load_pipeline(tmp_path, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(pixels(loaded, TEXTS, seed=2), pixels(text_pipeline, TEXTS, seed=2))
    (export / "vqvae").unlink()
    with pytest.raises(FileNotFoundError, match="has no vqvae/config"):
        assemble(export)


def test_a_tokenizer_is_found_wherever_one_would_look(class_folder, tmp_path):
    (tmp_path / "latest").symlink_to(class_folder, target_is_directory=True)
    wanted = load_tokenizer(class_folder / "vqvae").state_dict()
    for place in (class_folder, str(tmp_path)):
        found = load_tokenizer(place)
        assert not found.training and not any(p.requires_grad for p in found.parameters())
        assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in wanted.items())
    assert load_tokenizer("scenes").image_hw == (64, 64)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        load_tokenizer("nowhere")


def test_a_folder_of_one_variant_is_read(class_pipeline, tmp_path):
    class_pipeline.save_pretrained(tmp_path, variant="ema")
    assert not (tmp_path / "transformer/diffusion_pytorch_model.safetensors").exists()
    loaded = load_pipeline(tmp_path, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    call = {"class_labels": 1, "seed": 1}
    assert np.array_equal(pixels(loaded, **call), pixels(class_pipeline, **call))
    class_pipeline.save_pretrained(tmp_path, variant="other")
    with pytest.raises(ValueError, match="transformer holds the variants ema, other, and none is plain"):
        load_pipeline(tmp_path, device="cpu")


def test_sampling_defaults_are_saved(tiny_class_model, tiny_vqvae, tmp_path):
    pipeline = NextScalePipeline(tiny_class_model, tiny_vqvae, sampling={"top_k": 1, "guidance_scale": 3.0})
    pipeline.save_pretrained(tmp_path)
    rights = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert len(rights) == 1  # weights can be read by whom the configuration can
    loaded = load_pipeline(tmp_path, device="cpu")
    for pipe in (pipeline, loaded):
        pipe.set_progress_bar_config(disable=True)
    expected = pixels(pipeline, class_labels=1, seed=1, top_k=1, guidance_scale=3.0)
    assert np.array_equal(pixels(loaded, class_labels=1, seed=1), expected)
    assert np.array_equal(pixels(loaded, class_labels=1, seed=99), expected)  # top_k 1: the seed does not matter
    assert not np.array_equal(pixels(loaded, class_labels=1, seed=99, top_k=0), expected)
    assert model_digest(tmp_path) == model_digest(str(tmp_path))
    with pytest.raises(ValueError, match="sampling must hold only"):
        NextScalePipeline(tiny_class_model, tiny_vqvae, sampling={"guidance": 1})


@pytest.mark.parametrize("how", ["load_pipeline", "to"])
def test_bfloat16_keeps_the_quantiser_and_the_head(text_pipeline, text_folder, how):
    loaded = load_pipeline(text_folder, dtype="bf16" if how == "load_pipeline" else "auto", device="cpu")
    if how == "to":
        loaded.to(torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.dtype == loaded.vqvae.dtype == loaded.text_encoder.dtype == torch.bfloat16
    assert loaded.transformer.head.proj.weight.dtype == torch.float32
    assert torch.equal(loaded.vqvae.quantizer.codebook.weight, text_pipeline.vqvae.quantizer.codebook.weight)
    made = loaded("a red star", seed=1, output_type="np")
    assert made.images.dtype == np.float32 and np.isfinite(made.images).all()


def test_plans_negatives_and_smoothing(text_pipeline):
    plan = plain(text_pipeline.transformer, guidance=2.0, top_k=5)
    wanted = pixels(text_pipeline, TEXTS, seed=1, guidance_scale=2.0, top_k=5)
    assert np.array_equal(pixels(text_pipeline, TEXTS, seed=1, plan=plan), wanted)
    negative = pixels(
        text_pipeline, TEXTS, seed=1, guidance_scale=2.0, top_k=5, negative_prompt="a long list of dull things"
    )
    assert not np.array_equal(negative, wanted)
    listed = pixels(text_pipeline, TEXTS, seed=1, guidance_scale=0.0, negative_prompt=["x", "y", "z"])
    assert np.array_equal(listed, pixels(text_pipeline, TEXTS, seed=1, guidance_scale=0.0))  # nothing pushes away
    smooth = pixels(text_pipeline, TEXTS, seed=1, smooth=True)
    assert smooth.shape == wanted.shape and not np.array_equal(smooth, pixels(text_pipeline, TEXTS, seed=1))


def test_long_prompts_are_cut_with_one_line(text_pipeline, caplog):
    text = "a red star left of a blue heart, above sea"  # 42 bytes and the end mark, for 40
    with caplog.at_level(logging.WARNING, logger="sample.text"):
        cut = pixels(text_pipeline, text, seed=1)
    assert [record.getMessage() for record in caplog.records] == ["prompts are cut at 40 tokens; ignored: 'sea'"]
    assert np.array_equal(cut, pixels(text_pipeline, text[:39], seed=1))


def test_prompts_are_padded_to_the_longest(tiny_text_encoder):
    prompt = encode_prompts(*tiny_text_encoder, ["a", "", "abc"], max_length=40)
    assert prompt.states_BTE.shape == (3, 4, 16)
    assert prompt.mask_BT.sum(dim=1).tolist() == [2, 1, 4]


def test_in_half_precision_a_longer_prompt_beside_it_changes_no_image(text_folder):
    """Padding is rounded along: so it is always as long."""
    pipeline = load_pipeline(text_folder, dtype="bfloat16", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.encode_prompt(["a", "abc"]).mask_BT.shape == (2, 40)
    beside = [
        pipeline(["a star", other], seed=3, output_type="pt") for other in ("a ring", "a star left of a blue cross")
    ]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(beside[0].tokens, beside[1].tokens, strict=True))
    assert load_pipeline(text_folder, device="cpu").encode_prompt(["a", "abc"]).mask_BT.shape == (2, 4)


def test_both_ways_of_loading_bfloat16_agree(text_folder):
    ours = load_pipeline(text_folder, dtype="bfloat16", device="cpu")
    theirs = NextScalePipeline.from_pretrained(text_folder, torch_dtype=torch.bfloat16)
    mine, other = ours.transformer.state_dict(), theirs.transformer.state_dict()
    assert all(torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)
    mine, other = ours.text_encoder.state_dict(), theirs.text_encoder.state_dict()
    assert all(torch.equal(mine[name], other[name].bfloat16()) for name in mine)  # some releases keep T5's wo float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": 1, "guidance_scale": "3"}, r"guidance must be a number, .* got '3' \(str\)"),
        ({"class_labels": 1, "guidance_blocks": [1.5]}, r"guidance blocks must be whole numbers, .* got \(1.5,\)"),
        ({"class_labels": 1, "callback_on_step_end": lambda *_: 3}, "must return .* or nothing, got int"),
        (
            {"class_labels": 1, "callback_on_step_end": lambda *_: {"f_hat": 3}},
            r"must return f_hat as a tensor of shape \(1, 4, 4, 4\), got int",
        ),
        (
            {"class_labels": 1, "callback_on_step_end": lambda *_: {"latents": 3}},
            r"must return .* or nothing, got \['latents'\]",
        ),
        (
            {"class_labels": 1, "callback_on_step_end": print, "callback_on_step_end_tensor_inputs": "f_hat"},
            "must be a list of f_hat, tokens, got 'f_hat'",
        ),
        ({"class_labels": 1, "generator": 5}, "generator must be a torch.Generator, or one an image, got int: 5"),
        ({"class_labels": 1, "guidance_blocks": -1}, "guidance_blocks must be a list of one block or more"),
    ],
)
def test_what_is_of_a_wrong_type_is_named(class_pipeline, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        class_pipeline(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "this is a class model: give class_labels"),
        ({"prompt": "a star"}, "this is a class model: give class_labels"),
        ({"class_labels": 6}, "class_labels must be in 0..4, or 5 for the null class, got 6"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": 1, "num_images_per_prompt": 0}, "num_images_per_prompt must be 1 or more, got 0"),
        ({"class_labels": 1, "output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent, got 'jpeg'"),
        ({"class_labels": 1, "top_k": -1}, "top_k must be 0"),
        ({"class_labels": 1, "top_k": 3.5}, "or a whole number above, got 3.5"),
        ({"class_labels": 1, "top_k": float("inf")}, "or a whole number above, got inf"),
        ({"class_labels": 1, "temperature": 1e-40}, "temperature must be in .*, got 1e-40"),
        ({"class_labels": 1, "guidance_scale": -0.5}, "guidance must be in .*, got -0.5"),
        ({"class_labels": 1, "guidance_scale": float("inf")}, "guidance must be in .*, got inf"),
        ({"class_labels": 1, "guidance_blocks": []}, "guidance_blocks must be a list of one block or more"),
        ({"class_labels": 1, "seed": -1}, "seed must be in"),
        ({"class_labels": 1, "mask_rule": "x"}, "mask_rule must be one of corrected, official, whole, got 'x'"),
        ({"class_labels": 1, "seed": [1, 2]}, "seed must be one or one an image, got 2 for 1 images"),
        ({"class_labels": 1, "seed": 1, "generator": torch.Generator()}, "give seed or generator, not both"),
        ({"class_labels": 1, "negative_prompt": "a"}, "negative_prompt is for text models"),
        (
            {"class_labels": 1, "callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["latents"]},
            "callback_on_step_end_tensor_inputs must be a list of f_hat, tokens, got ['latents']",
        ),
    ],
)
def test_mistakes_are_named(class_pipeline, options, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        class_pipeline(**options)


def test_more_mistakes(class_pipeline, text_pipeline, tmp_path):
    with pytest.raises(TypeError, match="class_labels must be integers, got 1"):
        class_pipeline(class_labels=1.5)
    with pytest.raises(TypeError, match="prompt must be str, got int: 3"):
        text_pipeline([3])
    with pytest.raises(ValueError, match="this is a text model: give prompt"):
        text_pipeline(class_labels=1)
    with pytest.raises(ValueError, match="plan already says how to draw: leave out top_k"):
        text_pipeline("a", plan=plain(text_pipeline.transformer), top_k=3)
    with pytest.raises(ValueError, match="negative_prompt must be one text or one a prompt, got 2 for 3"):
        text_pipeline(TEXTS, negative_prompt=["a", "b"])
    with pytest.raises(FileNotFoundError, match="has no model_index"):
        load_pipeline(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of auto"):
        load_pipeline(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="device 'warp9' cannot be used"):
        load_pipeline(tmp_path, device="warp9")
    with pytest.raises(ValueError, match=r"device 'ipu' cannot be used: .{10,150}$"):  # not what PyTorch says in all
        load_pipeline(tmp_path, device="ipu")


def test_seeds_count_from_the_first():
    assert image_seeds(3, seed=7) == [7, 8, 9]
    assert image_seeds(2, seed=[9, 9]) == [9, 9]


def test_smooth_pictures_keep_the_tokens_of_hooks(class_pipeline):
    class Other(Hook):
        def on_tokens(self, state, k, logits_BlV, tokens_Bl):
            return (tokens_Bl + 1) % 16

    plain, smooth = (
        class_pipeline(class_labels=1, seed=3, hooks=[Other()], smooth=smooth, output_type="latent").images
        for smooth in (False, True)
    )
    torch.testing.assert_close(smooth, plain)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"search": "best"}, "search must be a sample.search.Search, got str: 'best'"),
        ({"hooks": Hook()}, "hooks must be a list"),
        ({"top_k": [1, None, 3]}, "top_k must be a number, or one for each scale, got None"),
        ({"top_k": "5"}, "top_k must be a number, or one for each scale, got '5'"),
        ({"seed": "a"}, "seed must be a whole number, or one an image, got 'a'"),
        ({"class_labels": "cat"}, "class_labels must be integers .*, got 'cat'"),
    ],
)
def test_what_is_no_setting_is_named(class_pipeline, options, message):
    with pytest.raises(TypeError, match=message):
        class_pipeline(**{"class_labels": 1, **options})


def test_all_models_of_a_plan_know_the_same_classes(class_pipeline, text_pipeline, tiny_class_model):
    other = NextScaleTransformer.from_config({**tiny_class_model.config, "num_classes": 7})
    with pytest.raises(ValueError, match="all models of a plan need the same num_classes, got 5 and 7"):
        collaborative(tiny_class_model, other, handover=1)
    with pytest.raises(ValueError, match="plan is of a text model, and the pipeline's is a class model"):
        class_pipeline(class_labels=1, plan=plain(text_pipeline.transformer))
    stage = plain(tiny_class_model).stages[0]
    with pytest.raises(ValueError, match="a stage makes one scale or more"):
        Plan((dataclasses.replace(stage, scales=range(0)), stage))


def test_a_tokenizer_of_another_class_is_refused(tiny_class_model, tiny_vqvae, tmp_path):
    """Its tokens may mean other things: loading it as the usual one would draw and train on the wrong pictures."""
    tiny_vqvae.save_pretrained(tmp_path / "vqvae")
    tiny_class_model.save_pretrained(tmp_path / "transformer")
    config = tmp_path / "vqvae" / "config.json"
    config.write_text(config.read_text().replace('"MultiScaleVQ"', '"FiniteScalar"'))
    for load in (load_tokenizer, load_pipeline):
        with pytest.raises(ValueError, match="vqvae holds a FiniteScalar, not a MultiScaleVQ"):
            load(tmp_path)
