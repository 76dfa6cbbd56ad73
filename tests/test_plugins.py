"""Methods of one's own in commands (`--plugin`, `--features MODULE:FUNCTION`): what they do, and what is refused."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import nextscale
from evaluation.report import command_line
from sample.commands.demo import Painter
from sample.commands.parser import Parser
from sample.commands.plan_options import add_plan_options, how_options
from sample.guidance import Guidance
from sample.own_code import Named, module_digest, read_plugin
from sample.pipeline import check_sampling
from sample.plugins import load_plugin, plugged
from sample.rewards import FunctionFeatures, PixelFeatures
from sample.search import Search
from sample.search_steps import make_steps

CODE = """
import torch
from nextscale import Guidance, Hook
from var.eviction import EvictingCache, uniform_budgets


class SameLayout(Hook):
    def __init__(self, scales=2):
        self.scales = scales

    def on_tokens(self, state, k, logits, tokens):
        return tokens[:1].expand_as(tokens).contiguous() if k < self.scales else tokens


class Dropping(Hook):
    def on_scale_end(self, state, k):
        if k == 1 and len(state) > 1:
            state.select(range(len(state) - 1))


class Falling(Guidance):
    def weight(self, k, num_scales):
        return self.scale * (1 - k / num_scales)


class Newest(EvictingCache):
    def keep(self, layer, k, q_BHld, keys_BHSd, budget, scale):
        return torch.arange(keys_BHSd.shape[2] - budget, keys_BHSd.shape[2], device=keys_BHSd.device)


def falling(plan, scale=2.0):
    return plan.replace(guidance=Falling(scale))


def newest(plan, share):
    budgets = uniform_budgets(share, plan.schedule, len(plan.stages[0].model.blocks))
    return plan.replace(new_cache=lambda: Newest(budgets, plan.schedule))


def nothing(plan):
    pass


def missing(plan):
    return plan.nothing


class Missing(Hook):
    def __init__(self, late=False):
        late or self.nothing

    def on_scale_end(self, state, k):
        state.extras["nothing"]


def quarters(images):
    B, h, w, _ = images.shape
    return images.reshape(B, 2, h // 2, 2, w // 2, 3).mean(axis=(2, 4)).reshape(B, 4, 3) / 255


def colour(images):
    return images.mean(axis=(1, 2))


alike, seven = SameLayout(), 7
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module of plugins in it, where the commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("own_")]:  # of another test
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "own_methods.py").write_text(CODE)
    (tmp_path / "own_broken.py").write_text("1 / 0")
    return tmp_path


def drawn(folder, model, *words, n=3):
    """The pixels that `nextscale sample` draws with these words."""
    out = folder / "-".join(word.strip("-").replace(":", "_") for word in words)
    argv = ["sample", "a red star", "--model", str(model), "--n", str(n), "--out", str(out), *words]
    assert nextscale.main(argv) == 0
    return [Image.open(out / f"a-red-star_seed{seed}.png").tobytes() for seed in range(n)]


def test_the_command_draws_what_python_draws(here, text_folder, text_pipeline):
    import own_methods

    plan = text_pipeline.make_plan(top_k=6).replace(guidance=own_methods.Falling(1.5))
    called = text_pipeline(
        "a red star", num_images_per_prompt=3, seed=0, plan=plan, hooks=[own_methods.SameLayout(1)]
    ).images
    words = ["--plugin", "own_methods:SameLayout(1)", "--plugin", "own_methods:falling(scale=1.5)", "--top-k", "6"]
    made = drawn(here, text_folder, *words)
    assert made == [image.tobytes() for image in called]
    assert made != drawn(here, text_folder, "--top-k", "6")


def test_plugins_of_a_file_are_those_of_the_command_line(here, text_folder):
    (here / "how.yaml").write_text("plugin: ['own_methods:SameLayout', 'own_methods:falling(1.5)']\nguidance: 3\n")
    words = ["--plugin", "own_methods:SameLayout", "--plugin", "own_methods:falling(1.5)", "--guidance", "3"]
    assert drawn(here, text_folder, "--plan", "how.yaml") == drawn(here, text_folder, *words)
    (here / "how.yaml").write_text("plugin: own_methods:SameLayout\n")
    one = drawn(here, text_folder, "--plugin", "own_methods:SameLayout")
    assert drawn(here, text_folder, "--plan", "how.yaml", "--top-p", "1") == one


def test_a_policy_of_ones_own_is_the_one_that_does_the_same(here, text_folder):
    own = drawn(here, text_folder, "--plugin", "own_methods:newest(0.4)")
    assert own == drawn(here, text_folder, "--cache", "window:40%")


def test_other_code_under_the_same_name_makes_another_folder(here, text_folder, capsys):
    argv = ["sample", "a red star", "--model", str(text_folder), "--plugin", "own_methods:SameLayout", "--out", "made"]
    assert nextscale.main(argv) == 0
    settings = json.loads((here / "made/settings.json").read_text())
    assert settings["plugin"] == ["own_methods:SameLayout"] and len(settings["plugin_digest"][0]) == 12
    assert nextscale.main(argv) == 0
    (here / "own_methods.py").write_text(CODE + "\n# other\n")
    capsys.readouterr()
    assert nextscale.main(argv) == 2
    assert "plugin_digest" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["made", "made.npz"])
def test_a_job_has_every_image_once(here, text_folder, out, capsys):
    argv = ["sample", "a red star", "--model", str(text_folder), "--n", "4", "--plugin", "own_methods:Dropping"]
    for _ in range(2):  # nothing is left that the same command could make whole
        assert nextscale.main([*argv, "--out", out]) == 2
        assert "drops, copies or moves images" in capsys.readouterr().err
        assert not list(here.glob("made*"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("own_methods", "must be MODULE:NAME"),
        ("own_methods:falling(scale)", "must be MODULE:NAME"),
        ("own_methods:falling(**{})", "must be MODULE:NAME"),
        ("own_methods:a.b", "must be MODULE:NAME"),
        ("own_methods:falling({[1]: 2})", "must be MODULE:NAME"),
        ("own_methods:falling(scale=1, scale=2)", "must be MODULE:NAME"),
        ("own_broken:falling", "cannot be imported: ZeroDivisionError"),
        ("own_methods:missing", "raised AttributeError"),
        ("own_methods:Missing", "raised AttributeError"),
        ("own_methods:Missing(late=True)", "raised KeyError"),
        ("builtins:max", "no signature found"),
        ("../own:falling", "must be MODULE:NAME"),
        ("own_methods:rising", "own_methods has no rising"),
        ("own_nothing:rising", "No module named 'own_nothing'"),
        ("own_methods:falling(1, 2)", "too many positional arguments"),
        ("own_methods:SameLayout(rows=3)", "unexpected keyword argument 'rows'"),
        ("own_methods:newest", "missing a required argument: 'share'"),
        ("own_methods:Falling", "is a class, and no Hook"),
        ("own_methods:seven", "is a int"),
        ("own_methods:alike(1)", "takes no arguments"),
        ("own_methods:nothing", "must return a Plan, and returned NoneType"),
    ],
)
def test_what_is_no_plugin_is_told_in_a_line(here, text_folder, text, said, capsys):
    argv = ["sample", "a red star", "--model", str(text_folder), "--out", "made", "--plugin", text]
    assert nextscale.main(argv) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and said in told[0] and "plugin" in told[0]
    assert not (here / "made").exists()


def test_an_object_is_the_hook_itself(here):
    import own_methods

    assert load_plugin("own_methods:alike").hook is own_methods.alike


def test_without_plugins_a_call_stays_as_it_is(text_pipeline):
    call = {"top_k": 3, "negative_prompt": "a blue ring"}
    assert plugged(text_pipeline, call, []) is call


def test_a_plan_is_replaced_in_all_stages(text_pipeline):
    plan = text_pipeline.make_plan(plan="supernet:1", depth=1)
    changed = plan.replace(guidance=Guidance(3.0))
    assert [stage.guidance.scale for stage in changed.stages] == [3.0, 3.0]
    assert [(s.scales, s.layers) for s in changed.stages] == [(s.scales, s.layers) for s in plan.stages]
    assert plan.stages[0].guidance.scale != 3.0


def test_a_models_own_settings_name_no_code():
    with pytest.raises(ValueError, match="sampling must hold only"):
        check_sampling({"plugin": "own_methods:falling"})


def test_a_model_is_evaluated_with_plugins(here, tmp_path):
    words = ["--model", "scenes", "--suite", "scenes", "--per-tag", "1", "--bootstrap", "0", "--metrics", "fd-scenes"]
    argv = ["evaluate", *words, "--plugin", "own_methods:falling(0.5)", "--work", "work", "--out", "found.json"]
    assert nextscale.main(argv) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["settings"]["plugin"] == ["own_methods:falling(0.5)"]
    assert "--plugin 'own_methods:falling(0.5)'" in found["command"]
    assert found["settings"].get("batch_size") is None  # nothing looks at a batch
    hooked = [*argv[:-6], "--plugin", "own_methods:SameLayout", "--work", "hooked", "--batch-size", "4"]
    assert nextscale.main(hooked) == 0
    assert json.loads((tmp_path / "hooked/settings.json").read_text())["batch_size"] == 4
    assert nextscale.main([*hooked[:-1], "3"]) == 2
    for _ in range(2):
        assert nextscale.main([*argv[:-6], "--plugin", "own_methods:Dropping", "--work", "other"]) == 2


def test_a_run_is_measured_with_plugins(here, class_folder, capsys):
    from evaluation import run

    words = ["--model", str(class_folder), "--suite", "classes", "--per-class", "2", "--shard", "3", "--bootstrap", "0"]
    rows = []
    for more in (["--plugin", "own_methods:falling(9.0)"], []):
        assert run.main([*words, *more, "--npz", f"made{len(more)}.npz", "--out", "found.json"]) == 0
        rows.append(json.loads((here / "found.json").read_text()))
    assert rows[0]["settings"]["cautions"][0] == "plugin own_methods:falling(9.0) is none of the suite's"
    assert (here / "made2.npz").read_bytes() != (here / "made0.npz").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        run.main([*words, "--plugin", "own_methods:Dropping"])
    assert stopped.value.code == 2 and "drops, copies or moves images" in capsys.readouterr().err


def test_a_search_has_the_plugins_and_features_of_ones_own(here, text_folder):
    search = ["--search", "8 cluster@0:4 cluster@1:2 best", "--reward", "own_rewards:bright"]
    (here / "own_rewards.py").write_text("def bright(images, prompts):\n    return images.mean(axis=(1, 2, 3))\n")

    def found(*words):
        out = here / str(abs(hash(words)))
        argv = ["sample", "a red star", "--model", str(text_folder), *search, *words, "--images", "2"]
        assert nextscale.main([*argv, "--out", str(out)]) == 0
        settings = json.loads((out / "settings.json").read_text())
        return settings, [Image.open(out / f"a-red-star_seed{seed}.png").tobytes() for seed in range(2)]

    settings, plain = found("--features", "own_methods:quarters")
    assert len(settings["features_digest"]) == 12
    assert found("--features", "own_methods:quarters", "--plugin", "own_methods:falling(9.0)")[1] != plain
    assert found("--features", "own_methods:colour")[0]["features"] == "own_methods:colour"


def test_features_of_ones_own_are_pooled_as_those_of_a_name(text_pipeline):
    def patches(images):
        assert images.dtype == np.uint8 and images.shape[1:] == (8, 8, 3)
        return PixelFeatures(2)(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    candidates, steps = make_steps("8 cluster@0:4 cluster@1:2 random", 1, 3)
    call = {"num_images_per_prompt": 2, "seed": 0, "output_type": "latent"}
    own, named = (
        text_pipeline("a red star", **call, search=Search(candidates=candidates, steps=steps, features=features))
        for features in (patches, PixelFeatures(2))
    )
    assert torch.equal(own.images, named.images)


def test_the_page_draws_with_its_plugins_and_visitors_name_none(here, text_pipeline, text_folder, tmp_path):
    painter = Painter(text_pipeline, model=str(text_folder), places=["--plugin=own_methods:SameLayout(3)"])
    words = painter.words("sample", "a red star", n=2, seed=0, settings={})
    assert "--plugin=own_methods:SameLayout(3)" in words
    one, other = list(painter.draw(words))[-1].images
    assert one.tobytes() == other.tobytes()
    dropping = Painter(text_pipeline, model=str(text_folder), places=["--plugin=own_methods:Dropping"])
    with pytest.raises(ValueError, match="drops, copies or moves images"):
        list(dropping.draw(dropping.words("sample", "a red star", n=2, seed=0, settings={})))
    with pytest.raises(ValueError, match="settings must be of"):
        painter.words("sample", "a red star", n=2, seed=0, settings={"plugin": "own_methods:falling"})


VALUES = st.recursive(
    st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True).map(lambda name: f"{name}_")


@given(NAMES, NAMES, st.lists(VALUES, max_size=3), st.dictionaries(NAMES, VALUES, max_size=3))
def test_what_is_written_is_read(module, name, args, options):
    inside = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in options.items())])
    assert read_plugin(f"{module}:{name}({inside})") == Named(module, name, tuple(args), tuple(options.items()))


@given(st.lists(st.sampled_from(["a:b", "a:b(1, 2)", "a.c:b('x y', k=[1])"]), min_size=1, max_size=3))
def test_a_result_names_the_plugins_as_they_are_given(plugins):
    import shlex

    command = shlex.split(command_line("x", {"plugin": plugins}, {"plugin": None}))
    parser = Parser()
    add_plan_options(parser)
    assert how_options(parser.parse_words(command[1:])) == {"plugin": plugins}
    assert how_options(argparse.Namespace(plugin=plugins)) == {"plugin": plugins}


def test_a_digest_is_of_the_file_that_is_imported(here, monkeypatch):
    other = here / "elsewhere"
    other.mkdir()
    (other / "own_twice.py").write_text("first = 1")
    (here / "own_twice.py").write_text("second = 2")
    before = module_digest("own_twice")
    monkeypatch.syspath_prepend(other)
    import own_twice

    assert own_twice.first and before != module_digest("own_twice")
    assert module_digest("own_nowhere") is None and module_digest("own_twice.part") is None
    (other / "own_twice.py").write_text("first = 3")
    assert module_digest("own_twice") != before


def test_features_must_be_rows_of_numbers():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for wrong in (lambda x: [1.0, 2.0], lambda x: [[1.0]], lambda x: [[1.0], [float("nan")]], lambda x: "no"):
        with pytest.raises(ValueError, match="features"):
            FunctionFeatures(wrong)(images)
    with pytest.raises(ValueError, match="raised ZeroDivisionError"):
        FunctionFeatures(lambda x: 1 // 0)(images)
