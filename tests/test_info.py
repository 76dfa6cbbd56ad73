"""`nextscale info`: facts of a model folder, without drawing anything."""

from __future__ import annotations

import copy

import nextscale
from sample.commands.info import describe
from sample.pipeline import NextScalePipeline


def test_a_class_model(class_pipeline):
    facts = dict(describe(class_pipeline))
    assert facts["draws"] == "images of 8 x 8 pixels from classes"
    assert facts["prompts"] == "5 classes, 0 to 4, without names"
    assert facts["scales"] == "sides 1, 2, 4: 21 tokens of 16 codes, a cell of 2 pixels"
    assert facts["shapes"] == "this one only" and "calibrate" in facts["--cache"] and "refiner" not in facts
    named = ["cat, felis", "dog", "owl", "newt", "ant"]
    own = NextScalePipeline(class_pipeline.transformer, class_pipeline.vqvae, class_names=named, sampling={"top_k": 3})
    facts = dict(describe(own))
    assert facts["prompts"] == "5 classes, 0 to 4: cat, dog, owl, newt, ant" and facts["defaults"] == "top_k 3"


def test_a_supernet_says_what_it_was_trained_for(tiny_class_model, tiny_vqvae):
    supernet = copy.deepcopy(tiny_class_model)
    assert "--depth" not in dict(describe(NextScalePipeline(supernet, tiny_vqvae)))
    supernet.register_to_config(subnets={"depths": [1], "bridge": 2})
    facts = dict(describe(NextScalePipeline(supernet, tiny_vqvae)))
    assert facts["--depth"] == "trained with 1 layers from scale 2 on, too"


def test_a_text_model_on_the_command_line(text_folder, capsys):
    assert nextscale.main(["info", str(text_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(text_folder)
    facts = {line[:14].strip(): line[16:] for line in lines[1:]}
    assert facts["draws"] == "images of 8 x 8 pixels from texts" and "T5EncoderModel" in facts["text encoder"]
    assert facts["memory"].startswith("one image takes about ")
    assert nextscale.main(["info", "--model", str(text_folder)]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert nextscale.main(["info", "scenes", "--model", str(text_folder)]) == 2
    assert "give one model, and not both 'scenes' and" in capsys.readouterr().err
    assert nextscale.main(["info", "no/such/model"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
