"""ImageNet's class names: a name means one class, or the error says which it could be."""

import re

import pytest

import nextscale
from sample.classes import CLASSES, class_names, find_class, parse_classes, synsets, worth_keeping


def test_the_list_is_imagenets():
    names = class_names()
    assert len(names) == CLASSES and all(all(n == n.strip() and n for n in each) for each in names)
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 388: "giant panda", 985: "daisy"}
    known |= {9: "ostrich", 88: "macaw", 417: "balloon", 555: "fire engine", 817: "sports car", 980: "volcano"}
    assert {label: names[label][0] for label in known} == known
    assert names[999] == ("toilet tissue", "toilet paper", "bathroom tissue")


def test_every_usual_name_finds_its_class():
    assert [find_class(names[0]) for names in class_names()] == list(range(CLASSES))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("golden retriever", 207),
        ("  Golden-Retriever ", 207),
        ("a goldfish", 1),
        ("Carassius auratus", 1),
        ("toilet paper", 999),
        ("harp", 594),  # the harmonica's further name
        ("crane bird", 134),
        ("crane (machine)", 517),
        ("retriever golden", 207),  # words of one class alone
        ("null", 1000),
    ],
)
def test_names_are_found(name, label):
    assert find_class(name) == label


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("crane", {"134 crane (bird)", "517 crane (machine)"}),
        ("Cardigan", {"264 Cardigan (dog)", "474 cardigan (garment)"}),
        ("panda", {"387 lesser panda", "388 giant panda"}),
        ("golden retreiver", {"207 golden retriever"}),
        ("sportscar", {"817 sports car"}),
    ],
)
def test_candidates_are_listed(name, candidates):
    with pytest.raises(ValueError) as raised:
        find_class(name)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 400
    assert all(candidate in message for candidate in candidates)


def test_long_lists_are_cut_and_nonsense_has_no_hint():
    with pytest.raises(ValueError, match=r"could be one of .* and \d+ more: say which"):
        find_class("dog")
    with pytest.raises(ValueError, match="is no ImageNet class; names are listed in"):
        find_class("qwertyuiop")


def test_classes_on_the_command_line():
    assert parse_classes("3", 10) == [3]
    assert parse_classes("0, 3,7-9", 10) == [0, 3, 7, 8, 9]
    assert parse_classes("all", 4) == [0, 1, 2, 3]
    assert parse_classes("null,2", 10) == [10, 2]
    assert parse_classes("golden retriever, tabby,5", 1000) == [207, 281, 5]
    for text, classes in (("cat", 10), ("", 10), ("3,", 1000), ("-1", 1000), ("1.5", 1000), ("9-3", 10)):
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            parse_classes(text, classes)


def test_a_models_own_names():
    own = ["cat, felis catus", "big_dog", "dog"]
    assert parse_classes("cat, Felis catus, big dog, dog, 1, null", 3, own) == [0, 0, 1, 2, 1, 3]
    with pytest.raises(ValueError, match=r"class 'horse' is no class of this model; it has 0 cat, 1 big_dog, 2 dog"):
        parse_classes("horse", 3, own)
    with pytest.raises(ValueError, match="did you mean 0 cat"):
        parse_classes("catt", 3, own)
    assert parse_classes("golden", 1000, [*(f"c{i}" for i in range(999)), "golden"]) == [999]  # and not the retriever


def test_synsets_are_not_kept_as_names():
    assert len(synsets()) == CLASSES and synsets()[0] == "n01440764"
    assert worth_keeping(synsets()) is None and worth_keeping(None) is None and worth_keeping(("a", "b")) == ["a", "b"]


def test_sampling_by_name(tmp_path, capsys, tiny_vqvae):
    from sample.pipeline import NextScalePipeline
    from var.transformer import NextScaleTransformer

    sizes = {"vocab_size": 16, "latent_channels": 4, "schedule": "1,2,4"}
    model = NextScaleTransformer(depth=1, width=16, heads=1, num_classes=1000, **sizes)
    model.init_weights()
    NextScalePipeline(model, tiny_vqvae).save_pretrained(tmp_path / "model")

    def sample(name):
        words = ["--model", tmp_path / "model", "--device", "cpu", "--class", name, "--out", tmp_path / "out"]
        return nextscale.main(["sample", *map(str, words)]), capsys.readouterr().err

    assert sample("golden retriever")[0] == 0
    assert len(list((tmp_path / "out").glob("*207*_seed0.png"))) == 1
    assert sample("1000")[0] == 0
    code, message = sample("crane")
    assert code == 2 and message.count("\n") == 1 and "134 crane (bird), 517 crane (machine)" in message
    code, message = sample("goldn retriever")
    assert code == 2 and "did you mean 207 golden retriever?" in message


def test_names_that_look_like_ranges_or_words_are_names():
    own = ["3-5", "all", "cat", "cat, dog", "null", "7"]
    assert [parse_classes(name, 6, own) for name in own[:5]] == [[0], [1], [2], [3], [4]]
    assert parse_classes("3-5, all,cat", 6, own) == [0, 1, 2]
    assert parse_classes("0-2", 6, own) == [0, 1, 2] and parse_classes("5", 6, own) == [5]  # numbers are numbers
    assert parse_classes("all", 3, ["a", "b", "c"]) == [0, 1, 2]
