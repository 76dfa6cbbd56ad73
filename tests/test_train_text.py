"""Teaching a text encoder what captions say: the facts asked for, a short training, what it refuses."""

from __future__ import annotations

import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_toys import curve, in_child

from evaluation.scenes import COLOURS, SHAPES, prompt_suite, scene_at
from train import train_text, train_var
from train.config import exit_code
from train.text import load_text_encoder
from train.train_text import COUNTS, FACTS, IGNORED, LONGEST, PLACES, Captions, caption_facts

RUN = ["--run.batch_size=16", "--run.log_every=1", "--run.checkpoint_every=3", "--run.validate_every=100"]
RUN += ["--run.workers=0", "--run.cpu=true", "--run.bar_every=60", "--run.validation_images=32", "--run.precision=no"]
RUN += ["--text.d_model=32", "--text.layers=1", "--text.heads=2", "--text.d_ff=32", "--optimizer.lr=0.01"]


def stage(main, *arguments: str) -> int:
    """Exit code of a stage's command line in a child process."""
    return in_child(lambda: os._exit(exit_code(main, list(arguments))))


def say(facts: torch.Tensor) -> dict[str, object]:
    """The facts of one byte in words; None for what is not said."""
    shape, colour, place, count, other_shape, other_colour = facts.tolist()
    return {
        "shape": SHAPES[shape],
        "colour": (None, *COLOURS)[colour],
        "place": PLACES[place],
        "count": COUNTS[count],
        "other_shape": (None, *SHAPES)[other_shape],
        "other_colour": (None, *COLOURS)[other_colour],
    }


def metadata_of(caption: str) -> dict:
    return next(m for i in range(20000) if (m := scene_at(i, 0).metadata)["prompt"] == caption)


def test_bytes_are_asked_for_the_object_of_their_phrase():
    caption = "a circle left of a square"
    facts_TF = caption_facts(metadata_of(caption))
    circle = {"shape": "circle", "colour": None, "place": "left of", "count": 1}
    square = {"shape": "square", "colour": None, "place": "right of", "count": 1}
    first = {**circle, "other_shape": "square", "other_colour": None}
    second = {**square, "other_shape": "circle", "other_colour": None}
    border = len("a circle")
    assert all(say(row) == first for row in facts_TF[:border])
    assert all(say(row) == second for row in facts_TF[border : len(caption) + 1])
    assert (facts_TF[len(caption) + 1 :] == IGNORED).all()


def test_facts_say_what_captions_say():
    """Every colour, shape, relation and number in a caption is a fact of its bytes, and nothing else is."""
    for metadata in prompt_suite(60, seed=3):
        caption = metadata["prompt"]
        facts_TF = caption_facts(metadata)
        assert facts_TF.shape == (LONGEST, len(FACTS)) and len(caption) < LONGEST
        ends = say(facts_TF[0]), say(facts_TF[len(caption)])
        for name, words in (("colour", COLOURS), ("shape", SHAPES)):
            said = {word for word in words if f" {word}" in caption}
            assert said == {end[name] for end in ends} - {None}, caption
        assert ends[0]["place"] == next((place for place in PLACES[1:] if f" {place} " in caption), None)
        assert (ends[0]["other_shape"] is None) == (len(metadata["include"]) == 1)
        assert ends[0]["count"] == metadata["include"][0]["count"]


def test_captions_name_no_held_out_pair():
    items = Captions(300, seed=5)
    assert not any(scene_at(i, 5, "train").metadata.get("unseen") for i in range(len(items)))
    assert items[7]["caption"] == scene_at(7, 5, "train").caption
    everything = Captions(300, seed=5, split="all")
    assert any(scene_at(i, 5, "all").metadata.get("unseen") for i in range(300))
    assert [everything[i]["caption"] for i in range(300)] == [scene_at(i, 5, "all").caption for i in range(300)]


def test_an_encoder_learns_and_goes_into_a_transformer(tiny_vqvae, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert stage(train_text.main, *RUN, f"--run.run_dir={whole}", "--run.total_images=960") == 0
    losses = [row["loss"] for row in curve(whole)]
    assert losses[-1] < 0.7 * losses[0]
    assert stage(train_text.main, *RUN, f"--run.run_dir={parts}", "--run.total_images=48") == 0
    encoder, tokenizer = load_text_encoder(parts / "latest", torch.float32)
    assert encoder.config.d_model == 32 and len(tokenizer("ring").input_ids) == 5

    tiny_vqvae.save_pretrained(tmp_path / "vqvae")
    more = [f"--tokens.tokenizer={tmp_path}/vqvae", f"--text.pretrained={parts}/latest", "--text.train=false"]
    more += ["--data.source=scenes", "--data.size=8", "--data.num_scenes=24", "--run.total_images=16"]
    more += ["--transformer.conditioning=text", "--transformer.depth=1", "--transformer.width=16"]
    more += [
        "--transformer.heads=2",
        "--transformer.text_length=64",
        "--run.previews=0",
        f"--run.run_dir={tmp_path}/var",
    ]
    assert stage(train_var.main, *RUN[:-5], *more) == 0
    kept, _ = load_text_encoder(tmp_path / "var" / "latest", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), kept.parameters(), strict=True))


def test_micro_batches_do_not_change_what_is_learned(tmp_path):
    """Captions are of different lengths, and each counts alike."""
    rows = []
    for micro in (16, 1):
        folder = tmp_path / str(micro)
        assert (
            stage(
                train_text.main, *RUN, f"--run.run_dir={folder}", "--run.total_images=64", f"--run.micro_batch={micro}"
            )
            == 0
        )
        rows.append([[row[name] for name in ("loss", "knows_shape", "knows_count")] for row in curve(folder)])
    assert rows[0] == [pytest.approx(row, rel=1e-3) for row in rows[1]]


def test_kept_states_move_less(tmp_path):
    first = tmp_path / "first"
    assert stage(train_text.main, *RUN, f"--run.run_dir={first}", "--run.total_images=32") == 0
    moved = {}
    for keep in (0.001, 100):
        folder = tmp_path / f"keep-{keep}"
        more = [f"--text.pretrained={first}/latest", f"--captions.keep={keep}", "--run.total_images=320"]
        assert stage(train_text.main, *RUN, *more, f"--run.run_dir={folder}") == 0
        moved[keep] = curve(folder)[-1]["moved"]
    assert moved[100] < 0.5 * moved[0.001]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--captions.keep=-1"], "captions.keep must be 0 or more, got -1"),
        (["--captions.num_captions=0"], "captions.num_captions must be 1 or more"),
        (["--captions.scene_tags={stars: 1}"], "tag must be one of"),
        (["--text.train=false"], "text.train must be true"),
        (["--captions.keep=1"], "captions.keep 1.0 keeps to an encoder: give text.pretrained"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, capfd):
    assert stage(train_text.main, *RUN, f"--run.run_dir={tmp_path}", *arguments) == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_encoder_that_lacks_weights_is_refused(tiny_text_encoder, tmp_path):
    tokenizer, encoder = tiny_text_encoder
    encoder.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert load_text_encoder(tmp_path)[0].config.d_model == 16
    weights = load_file(file := tmp_path / "text_encoder/model.safetensors")
    lost = next(name for name in weights if "SelfAttention.q" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights: {re.escape(lost)}"):
        load_text_encoder(tmp_path)
