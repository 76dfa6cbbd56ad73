"""Plans in words: neutral settings equal plain decoding, borders and depths are in place, mistakes are named."""

import json
import shutil

import numpy as np
import pytest
import torch

import nextscale
from sample.commands.plan_options import read_settings, settings
from sample.draw import Filter
from sample.generate import generate
from sample.guidance import Guidance
from sample.pipeline import SAMPLING
from sample.plan import Plan, Stage, plain, scale_filters
from sample.plan_text import BASELINES, PlanConfig, read_cache, read_depth, read_plan
from sample.state import Hook
from tokenizer.quantizer import MultiScaleQuantizer
from tokenizer.schedule import ScaleSchedule
from var.conditioning import ClassPrompt
from var.eviction import EvictingCache, uniform_budgets
from var.supernet import equidistant
from var.transformer import NextScaleTransformer

SIDES = "1,2,3,4"  # 30 tokens, of which the last scale may read 14
DEPTH = 4


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    index = [[0.0, 0.3 * layer, 0.2, 0.1 * layer] for layer in range(options.get("depth", DEPTH))]
    config = {"depth": DEPTH, "width": 32, "heads": 2, "vocab_size": 20, "latent_channels": 5, "num_classes": 4}
    model = NextScaleTransformer(**{**config, "schedule": SIDES, "selectivity": index, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def quantizer():
    torch.manual_seed(3)
    return MultiScaleQuantizer(vocab_size=20, channels=5, num_scales=4)


def run(plan, quantizer, seeds=(5, 6, 7, 8), **options):
    return generate(plan, quantizer, ClassPrompt(torch.tensor([s % 4 for s in seeds])), seeds, **options)


def tokens(plan, quantizer, **options):
    return torch.cat(run(plan, quantizer, **options).tokens, dim=1)


NEUTRAL = [
    {},
    {"depth": DEPTH},
    {"depth": "4,4,4,4"},
    {"plan": "supernet:2", "depth": DEPTH},
    {"plan": "self:2", "depth": DEPTH},
    {"plan": "code:1", "depth": "4,4,4"},
    {"cache": "scalekv:100%"},
    {"cache": "snapkv:100%"},
    {"cache": "streaming:100%"},
    {"cache": "window:100%"},
    {"plan": "supernet:2", "depth": "4,4", "cache": "scalekv:100%"},
    {"plan": "self:3", "depth": DEPTH, "cache": "scalekv:100%"},
    {"prune": "off"},
    {"prune": "0%,0%"},
    {"prune": "10%,6%"},  # 0 of 9 tokens, and of 16
    {"plan": "self:3", "depth": DEPTH, "prune": 0.05},
]


@pytest.mark.parametrize("config", NEUTRAL, ids=str)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_neutral_plans_equal_plain_decoding(model, quantizer, config, guidance):
    wanted = tokens(plain(model, guidance=guidance), quantizer)
    assert torch.equal(tokens(PlanConfig(**config).build(model, guidance=guidance), quantizer), wanted)


@pytest.mark.parametrize("config", [{"plan": "self:2", "depth": DEPTH}, {"plan": "code:1", "depth": "4,4,4"}], ids=str)
@pytest.mark.parametrize("scale", [2.0, (0.0, 1.0, 0.0, 2.0)])
def test_guidance_inside_the_blocks_reaches_a_prefill(model, quantizer, config, scale):
    """The keys of a late stage are those of the guided states; each scale has its own weight, or none."""
    guidance = Guidance(scale, blocks=(1, -1), on_logits=False)
    wanted = tokens(plain(model, guidance=guidance), quantizer)
    assert torch.equal(tokens(PlanConfig(**config).build(model, guidance=guidance), quantizer), wanted)
    assert not torch.equal(wanted, tokens(plain(model, guidance=0.0), quantizer))


def test_guided_blocks_are_counted_from_either_end(model, quantizer):
    first, last = (tokens(plain(model, guidance=Guidance(3.0, blocks=(b,))), quantizer) for b in (-DEPTH, -1))
    for block, wanted in ((0, first), (DEPTH - 1, last)):
        assert torch.equal(tokens(plain(model, guidance=Guidance(3.0, blocks=(block,))), quantizer), wanted)
    assert not torch.equal(first, last)


@pytest.mark.parametrize("blocks", [(0,), (-2,)])
def test_guidance_inside_the_blocks_of_oblong_scales_reaches_a_prefill(quantizer, blocks):
    oblong = make_model(schedule="1x1,1x2,2x3,3x4", selectivity=None)
    guidance = Guidance((1.0, 2.0, 0.0, 3.0), blocks=blocks, on_logits=False)
    wanted = tokens(plain(oblong, guidance=guidance), quantizer)
    late = Plan(
        (Stage(oblong, range(3), guidance=guidance), Stage(oblong, range(3, 4), guidance=guidance, recompute=True))
    )
    assert torch.equal(tokens(late, quantizer), wanted)


ENDS = [
    Guidance((1.0, 3.0, 0.0, 0.0)),
    Guidance((0.0, 2.0, 2.0, 0.0), blocks=(1, -1), on_logits=False),
    Guidance(2.0, until=1, ramp="constant", blocks=(0,)),
]
LATE = [
    {},
    {"cache": "window:50%"},
    {"plan": "self:2", "depth": 3},
    {"plan": "code:3", "depth": 2},
    {"prune": "40%,50%"},
]
LATE += [{"plan": "supernet:1", "depth": "4,2,1"}]


class Rows(Hook):
    """Rows of conditions and cache at each scale."""

    def __init__(self):
        self.seen = []

    def on_tokens(self, state, k, logits_BlV, tokens_Bl):
        self.seen.append((len(state.cond.start_BD), len(state.cache.keys[0]) if k < 3 else None))
        return tokens_Bl


@pytest.mark.parametrize("config", LATE, ids=str)
@pytest.mark.parametrize("guidance", ENDS, ids=str)
def test_the_unconditional_half_ends_with_the_guidance(model, quantizer, config, guidance, monkeypatch):
    """After the last guided scale it would change nothing: the tokens are those with it."""
    plan, rows = PlanConfig(**config).build(model, guidance=guidance), Rows()
    made = torch.cat(run(plan, quantizer, hooks=[rows]).tokens, dim=1)
    ends = max(k for k in range(4) if guidance.weight(k, 4)) + 1
    assert plan.guided_scales == ends and [seen[0] for seen in rows.seen] == [8] * ends + [4] * (4 - ends)
    if not config:
        assert [seen[1] for seen in rows.seen[:3]] == [8] * ends + [4] * (3 - ends)
    monkeypatch.setattr(Plan, "guided_scales", 4)
    kept = Rows()
    assert torch.equal(torch.cat(run(plan, quantizer, hooks=[kept]).tokens, dim=1), made)
    assert [seen[0] for seen in kept.seen] == [8] * 4


def test_a_prefill_has_the_unconditional_half_only_where_it_matters(model):
    """After the guidance, for guidance inside the blocks of scales that were guided; never for that of logits."""
    for guidance, doubled in (
        (Guidance(2.0, until=2), False),
        (Guidance(2.0, until=2, blocks=(0,)), True),
        (Guidance(2.0, until=0, blocks=(0,)), False),
    ):
        plan = PlanConfig(plan="self:3", depth=2).build(model, guidance=guidance)
        first, last = plan.stages
        assert plan.doubles(last, 3, prefilling=True) == doubled and not plan.doubles(last, 3)
        assert plan.joins(last) and not plan.joins(first)
    markov = make_model(mask="block_diagonal", selectivity=None)
    own = PlanConfig(plan="self:3", depth=2).build(markov)
    assert not own.joins(own.stages[1])  # no earlier keys are read


def test_where_guidance_ends(model, quantizer):
    until = tokens(plain(model, guidance=Guidance(3.0, until=2)), quantizer)
    assert torch.equal(until, tokens(plain(model, guidance=[0.0, 1.0, 0.0, 0.0]), quantizer))
    assert not torch.equal(until, tokens(plain(model, guidance=3.0), quantizer))
    assert plain(model, guidance=Guidance(3.0, until=0)).guided_scales == 0
    assert plain(model, guidance=Guidance(3.0, until=4)).guided_scales == 4 == plain(model, guidance=1.0).guided_scales
    with pytest.raises(ValueError, match="guidance_until must be at most 4 scales, got 5"):
        plain(model, guidance=Guidance(3.0, until=5))
    for until in (-1, True, 1.0, "2"):
        with pytest.raises(ValueError, match=f"guidance_until must be a number of scales, got {until!r}"):
            Guidance(3.0, until=until)
    assert plain(model, guidance=Guidance(3.0, until=np.int64(2))).guided_scales == 2


@pytest.mark.parametrize("cache", ["100%", "scalekv:100%"])
def test_a_refiner_equal_to_the_drafter_changes_nothing(model, quantizer, cache):
    wanted = tokens(plain(model), quantizer)
    for handover in (1, 2, 3):
        plan = PlanConfig(plan=f"code:{handover}", cache=cache).build(model, refiner=make_model())
        assert torch.equal(tokens(plan, quantizer), wanted)


def test_a_calibration_serves_smaller_sizes(quantizer):
    """A model of several sizes: the first of its scales are those of a smaller picture."""
    large = make_model(positions="rope")
    large.register_to_config(selectivity=[[0.1 * layer] * 4 for layer in range(DEPTH)])
    small = large.check_schedule(ScaleSchedule.of("1,2,3"))
    assert PlanConfig(cache="50%").build(large, schedule=small).stages[0].new_cache().budgets[0][-1] >= 1


class Active(Hook):
    """Which layers hold keys after each scale."""

    def __init__(self):
        self.holding, self.lengths = [], []

    def on_scale_end(self, state, k):
        self.holding.append(tuple(layer for layer, length in enumerate(state.cache.lengths) if length))
        self.lengths.append(tuple(state.cache.lengths))


def test_layers_run_and_hold_keys_where_the_plan_says(model, quantizer):
    active = Active()
    run(PlanConfig(plan="supernet:2", depth="2,1").build(model), quantizer, hooks=[active])
    # of 4 layers: 0 and 3, then 0. A layer holds what is read again: 1 token of its last scale's history, or all 5, 14.
    assert active.lengths == [(1, 1, 1, 1), (5, 1, 1, 5), (14, 0, 0, 5), (14, 0, 0, 0)]


def test_the_last_drafted_scale_is_not_stored(model, quantizer):
    active = Active()
    run(PlanConfig(plan="code:3").build(model, refiner=make_model(depth=2)), quantizer, hooks=[active])
    assert active.lengths == [(1,) * 4, (5,) * 4, (5,) * 4, (14, 14)]


def test_going_deeper_again_recomputes_keys(model, quantizer):
    plan = PlanConfig(depth="4,2,2,4").build(model)
    assert [stage.continues(before) for before, stage in zip(plan.stages, plan.stages[1:])] == [True, False]
    assert tokens(plan, quantizer).shape == (4, 30)


@torch.no_grad()
def test_a_subnet_after_a_bridge_decodes_what_training_predicts(model, quantizer):
    """Teacher forcing with a bridge gives the logits that the cached loop draws from, scale by scale."""
    seen = []

    class Logits(Hook):
        def on_tokens(self, state, k, logits_BlV, tokens_Bl):
            seen.append(logits_BlV)
            return tokens_Bl

    plan = PlanConfig(plan="supernet:2", depth=2).build(model, guidance=0.0)
    state = run(plan, quantizer, hooks=[Logits()])
    cond = model.condition(ClassPrompt(torch.tensor([1, 2, 3, 0])))
    hidden = model(torch.cat(state.inputs, dim=1), cond, layers=equidistant(DEPTH, 2), bridge=2)
    torch.testing.assert_close(torch.cat(seen, dim=1), model.logits(hidden, cond), atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_refiner_decodes_what_it_would_predict_alone(model, quantizer):
    """Hand-over equals recomputation: the refiner's logits are those of a full pass over the same inputs."""
    seen = {}

    class Logits(Hook):
        def on_tokens(self, state, k, logits_BlV, tokens_Bl):
            seen[k] = logits_BlV
            return tokens_Bl

    small = make_model(seed=1, depth=2, width=16)
    for refiner, config in ((small, {"plan": "code:2"}), (model, {"plan": "self:2", "depth": 2})):
        plan = PlanConfig(**config).build(model, refiner=small, guidance=0.0)
        state = run(plan, quantizer, hooks=[Logits()])
        cond = refiner.condition(ClassPrompt(torch.tensor([1, 2, 3, 0])))
        layers = None if refiner is small else equidistant(DEPTH, 2)
        whole = refiner.logits(refiner(torch.cat(state.inputs, dim=1), cond, layers=layers), cond)
        for k in (2, 3):
            begin, end = model.schedule.begins[k], model.schedule.ends[k]
            torch.testing.assert_close(seen[k], whole[:, begin:end], atol=2e-5, rtol=0)


@pytest.mark.parametrize("cache", ["50%", "window:50%", "streaming:50%", "snapkv:50%", "pyramidkv:50%"])
@pytest.mark.parametrize("plan", [{}, {"plan": "supernet:2", "depth": 2}, {"plan": "self:2", "depth": 2}])
def test_compositions_do_not_depend_on_the_batch(model, quantizer, cache, plan):
    composed = PlanConfig(**plan, cache=cache).build(model)
    together = tokens(composed, quantizer)
    alone = torch.cat([tokens(composed, quantizer, seeds=[seed]) for seed in (5, 6, 7, 8)])
    assert torch.equal(together, alone)


class KeepFirst(Hook):
    def on_scale_end(self, state, k):
        if k == 1:
            state.select([2, 0])


def test_search_composes_with_a_compressed_subnet(model, quantizer):
    plan = PlanConfig(plan="supernet:1", depth=2, cache="40%").build(model)
    assert torch.equal(tokens(plan, quantizer, hooks=[KeepFirst()]), tokens(plan, quantizer)[[2, 0]])


def test_settings_by_scale(model, quantizer):
    filters = scale_filters(4, top_k=[1, 2, 3, 4], temperature=1.1, temperature_last=True)
    assert filters[2] == Filter(top_k=3, temperature=1.1, temperature_last=True)
    plan = PlanConfig(plan="self:3", depth=1).build(model, filters=filters)
    assert [stage.filter(k).top_k for stage in plan.stages for k in stage.scales] == [1, 2, 3, 4]
    assert scale_filters(4, top_k=5) == Filter(top_k=5)


def test_words_are_read():
    assert read_plan("code:6") == ("code", 6) and read_plan("var") == ("var", 0)
    assert read_depth("6, 4,4") == (6, 4, 4) == read_depth([6, 4, 4]) and read_depth(4) == (4,)
    assert read_cache("10%") == ("scalekv", 0.1, None) == read_cache(0.1)
    assert read_cache("snapkv:2.5 %") == ("snapkv", 0.025, None)
    assert read_cache("scalekv:10%,window=3") == ("scalekv", 0.1, 3)
    assert read_cache("100%") == read_cache("full") == read_cache(1.0) == ("full", 1.0, None)


def test_a_policy_of_ones_own_has_a_name(class_pipeline, monkeypatch):
    class First(EvictingCache):
        wrong = 0

        def keep(self, layer, k, q, keys, budget, scale):
            return torch.arange(budget + self.wrong).expand(*keys.shape[:2], -1)

    monkeypatch.setitem(BASELINES, "first", (First, uniform_budgets))
    assert class_pipeline(class_labels=1, seed=1, cache="first:50%", output_type="latent").tokens
    for First.wrong in (-1, 1):
        with pytest.raises(ValueError, match=r"First.keep must choose 2 of 5 tokens, got [13]"):
            class_pipeline(class_labels=1, seed=1, cache="first:50%", output_type="latent")


@pytest.mark.parametrize(
    "config, named",
    [
        ({"plan": "code"}, "plan must be"),
        ({"plan": "code:x"}, "plan must be"),
        ({"plan": "supernet:2"}, "needs a depth"),
        ({"plan": "code:2"}, "needs a refiner"),
        ({"plan": "supernet:4", "depth": 2}, "both sides"),
        ({"plan": "code:0", "depth": 2}, "both sides"),
        ({"depth": 5}, "depth must be in 1..4"),
        ({"depth": 0}, "depth must be in 1..4"),
        ({"depth": "2,2"}, "depth must be one"),
        ({"depth": "half"}, "depth must be"),
        ({"cache": "0%"}, "cache must be"),
        ({"cache": "101%"}, "cache must be"),
        ({"cache": "lru:10%"}, "cache must be"),
        ({"cache": "window:10%,window=3"}, "cache must be"),
        ({"cache": "1%"}, "keeps none"),
        ({"cache": "10%,window=4"}, "fewer than its window"),
    ],
    ids=str,
)
def test_mistakes_are_named_in_one_line(model, config, named):
    with pytest.raises(ValueError, match=named) as caught:
        PlanConfig(**config).build(model)
    assert "\n" not in str(caught.value)


def test_models_that_do_not_fit_are_named(model):
    with pytest.raises(ValueError, match="vocab_size"):
        PlanConfig(plan="code:2").build(model, refiner=make_model(vocab_size=21))
    with pytest.raises(ValueError, match="calibrate"):
        PlanConfig(cache="50%").build(make_model(selectivity=None))
    with pytest.raises(ValueError, match="calibrated with other layers"):
        PlanConfig(cache="50%").build(make_model(selectivity=[[0.0] * 4]))
    with pytest.raises(ValueError, match="temperature must be one"):
        scale_filters(4, temperature=[1.0, 1.0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "scenes"}, "model of a stage must be as sample.plan.Stage says, got str"),
        ({"scales": 4}, "scales .* got int"),
        ({"layers": 4}, "layers .* got int"),
        ({"guidance": 0.5}, "guidance .* got float"),
        ({"filters": 0.9}, "filters .* got float"),
        ({"filters": [Filter(), None, None, None]}, "filters .* got list"),
        ({"new_cache": "window"}, "new_cache .* got str"),
        ({"schedule": "1,2,4"}, "schedule .* got str"),
    ],
)
def test_stages_of_other_kinds_are_named(model, changes, said):
    with pytest.raises(TypeError, match=said):
        Plan((Stage(**{"model": model, "scales": range(4), **changes}),))
    with pytest.raises(TypeError, match="stages must be a tuple of Stage, got Stage"):
        Plan(Stage(model, range(4)))


def test_a_compiled_model_is_one(model, quantizer):
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(tokens(plain(compiled), quantizer), tokens(plain(model), quantizer))


def test_what_a_stage_could_not_use_is_refused(model):
    with pytest.raises(ValueError, match="attention_backend must be one of sdpa, flex, grouped, got 'nope'"):
        Plan((Stage(model, range(4), attention_backend="nope"),))
    forgetful = make_model(mask="block_diagonal", selectivity=None)
    with pytest.raises(ValueError, match="new_cache is for models that read earlier scales"):
        Plan((Stage(forgetful, range(4), new_cache=forgetful.new_cache),))


def test_filters_and_guidance_of_ones_own(model, quantizer):
    class Late(Guidance):
        def weight(self, k, num_scales):
            return 2.0 if k == num_scales - 1 else 0.0

    def likeliest(logits_BlV):
        return logits_BlV.masked_fill(logits_BlV < logits_BlV.max(dim=-1, keepdim=True).values, -torch.inf)

    made = Plan((Stage(model, range(4), guidance=Late(), filters=likeliest),))
    same = Plan((Stage(model, range(4), guidance=Guidance([0.0, 0.0, 0.0, 2.0]), filters=Filter(top_k=1)),))
    assert torch.equal(tokens(made, quantizer), tokens(same, quantizer))
    each = Plan((Stage(model, range(4), guidance=Late(), filters=[likeliest, Filter(top_k=1), likeliest, likeliest]),))
    assert torch.equal(tokens(each, quantizer), tokens(same, quantizer))


# --- the command and the pipeline ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(class_folder, tmp_path_factory):
    """The class model's folder, calibrated in a copy."""
    folder = tmp_path_factory.mktemp("calibrated")
    argv = ["calibrate", "--model", str(class_folder), "--class", "0-2", "--out", str(folder), "--device", "cpu"]
    assert nextscale.main(argv) == 0
    return folder


def sampled(folder, out, *options):
    argv = ["sample", "--model", str(folder), "--class", "0-3", "--out", str(out), "--device", "cpu", *options]
    assert nextscale.main(argv) == 0
    return np.load(out)["arr_0"]


def test_calibration_travels_with_the_model(calibrated, class_folder):
    index = json.loads((calibrated / "transformer" / "config.json").read_text())["selectivity"]
    assert len(index) == 2 and len(index[0]) == 3 and all(0 < value < 1 for row in index for value in row[1:])
    assert nextscale.load_pipeline(calibrated, device="cpu").transformer.config.selectivity == index
    assert json.loads((class_folder / "transformer" / "config.json").read_text())["selectivity"] is None


def test_the_same_plan_by_flags_by_file_and_in_the_pipeline(calibrated, tmp_path):
    words = {"plan": "code:1", "depth": 1, "cache": "60%", "temperature": [1.0, 0.9, 0.8], "top_k": 9}
    (tmp_path / "fast.yaml").write_text(json.dumps(words))  # JSON is YAML
    flags = ["--plan", "code:1", "--depth", "1", "--cache", "60%", "--temperature", "1,.9,.8", "--top-k", "9"]
    by_flags = sampled(calibrated, tmp_path / "a.npz", *flags)
    by_file = sampled(calibrated, tmp_path / "b.npz", "--plan", str(tmp_path / "fast.yaml"))
    pipeline = nextscale.load_pipeline(calibrated, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[0, 1, 2, 3], seed=0, output_type="np", **words).images
    assert np.array_equal(by_flags, by_file)
    assert np.array_equal(by_flags, (images * 255).round().astype(np.uint8))
    over = sampled(calibrated, tmp_path / "c.npz", "--plan", str(tmp_path / "fast.yaml"), "--cache", "100%")
    assert over.shape == by_file.shape and not np.array_equal(over, by_file)


def test_the_options_are_what_a_model_may_have_of_its_own_and_what_it_may_not():
    named = {"guidance_scale" if name == "guidance" else name for name in settings()}
    assert named - set(SAMPLING) == {"refiner", "plugin"} and set(SAMPLING) <= named


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("aspect: 16:9\nsize: 0.25M", {"aspect": "16:9", "size": "0.25M"}),  # not 969, as YAML 1.1 has it
        ("guidance: 0,1,2\ntop_k: [5, 4, 3]", {"guidance": [0.0, 1.0, 2.0], "top_k": [5, 4, 3]}),
        ("depth: 4\ncache: 0.5\ntemperature_last: no", {"depth": 4, "cache": 0.5, "temperature_last": False}),
        ("guidance_blocks: 3\ntop_p: null\nplan: code:2", {"guidance_blocks": [3], "plan": "code:2"}),
    ],
)
def test_files_of_settings_are_read_as_the_command_line(tmp_path, text, held):
    (tmp_path / "a.yaml").write_text(text)
    assert read_settings(tmp_path / "a.yaml") == held


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidance: abc", r"a\.yaml: guidance cannot be 'abc'"),
        ("top_k: 1.5", "top_k cannot be '1.5'"),
        ("depth: {a: 1}", "depth cannot be {'a': '1'}"),
        ("temperature_last: perhaps", "temperature_last cannot be 'perhaps'"),
        ("guidance: [1,2", r"a\.yaml is not YAML: while parsing .* line 1"),
        ("plam: var", "may hold .*plan, .* and has plam"),
        ("- var", "and has list"),
    ],
)
def test_mistakes_in_files_of_settings_are_named(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "a.yaml")


def test_a_plan_can_be_the_models_own(tiny_class_model, tiny_vqvae, tmp_path):
    own = nextscale.NextScalePipeline(
        tiny_class_model, tiny_vqvae, sampling={"plan": "supernet:1", "depth": 1, "top_k": 5}
    )
    own.save_pretrained(tmp_path)
    again = nextscale.load_pipeline(tmp_path, device="cpu")
    assert [len(stage.active) for stage in again.make_plan().stages] == [2, 1]
    assert [len(stage.active) for stage in again.make_plan("var").stages] == [2]
    assert again.make_plan("var").stages[0].filter(0).top_k == 5


def test_a_calibrated_copy_is_the_model_but_for_its_index(class_folder, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(class_folder, model)
    (model / "official_buffers.safetensors").write_bytes(b"kept")
    argv = ["calibrate", "--model", str(model), "--class", "0", "--device", "cpu", "--out", str(tmp_path / "copy")]
    assert nextscale.main(argv) == 0
    for path in (path for path in model.rglob("*") if path.is_file()):
        same = (tmp_path / "copy" / path.relative_to(model)).read_bytes() == path.read_bytes()
        assert same == (path.parent.name != "transformer" or path.name != "config.json")
    monkeypatch.setattr("sample.load.model_folder", lambda name: model)
    assert nextscale.main(["calibrate", "--model", "you/yours", "--class", "0"]) == 2
    assert "--model you/yours lies in the Hub's cache" in capsys.readouterr().err


def test_a_calibrated_copy_goes_into_a_new_folder(class_folder, tmp_path, capsys):
    argv = ["calibrate", "--model", str(class_folder), "--class", "0", "--out", str(tmp_path / "copy")]
    assert nextscale.main(argv) == 0
    assert "selectivity" in (tmp_path / "copy/transformer/config.json").read_text()
    assert nextscale.main(argv) == 2
    assert "exists already: name another folder" in capsys.readouterr().err
    assert nextscale.main([*argv, "--overwrite"]) == 0


def test_an_interrupted_calibration_leaves_no_copy(class_folder, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sample.selectivity.measure_selectivity", interrupted)
    argv = ["calibrate", "--model", str(class_folder), "--class", "0", "--out", str(tmp_path / "copy")]
    assert nextscale.main(argv) == 130 and not list(tmp_path.iterdir())


def test_a_refiner_by_name_must_share_the_tokenizer(class_folder, calibrated, text_folder, tmp_path, capsys):
    plan = ["--plan", "code:2", "--refiner"]
    same = sampled(class_folder, tmp_path / "a.npz", *plan, str(calibrated))
    assert np.array_equal(same, sampled(class_folder, tmp_path / "b.npz"))  # the refiner is the same model
    pipeline = nextscale.load_pipeline(class_folder, device="cpu")
    with torch.no_grad():
        pipeline.vqvae.quantizer.codebook.weight.add_(1)
    pipeline.save_pretrained(tmp_path / "other")
    argv = ["sample", "--model", str(class_folder), "--class", "0", "--out", str(tmp_path / "c.npz"), *plan]
    capsys.readouterr()
    assert nextscale.main([*argv, str(tmp_path / "other")]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert nextscale.main([*argv, str(text_folder)]) == 2


@pytest.mark.parametrize(
    "options, named",
    [
        (["--plan", "codes:3"], "plan must be var, supernet:N, code:N or self:N"),
        (["--plan", "supernet:1", "--depth", "3"], "depth must be in 1..2"),
        (["--cache", "60%"], "nextscale calibrate --model"),
        (["--plan", "missing.yaml"], "missing.yaml is not a file"),
        (["--temperature", "1,2"], "temperature must be one"),
        (["--refiner", "MODEL"], "makes the scales after code:N: give --plan code:N"),
    ],
    ids=str,
)
def test_the_command_says_what_is_wrong_in_one_line(class_folder, tmp_path, capsys, options, named):
    options = [str(class_folder) if word == "MODEL" else word for word in options]
    argv = ["sample", "--model", str(class_folder), "--class", "0", "--out", str(tmp_path / "x.npz"), *options]
    assert nextscale.main(argv) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
