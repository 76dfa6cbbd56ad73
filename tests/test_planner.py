"""The planner: operations as torch counts them, cache bytes as they are, fits that recover the truth, limits kept."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import quiet_pipeline
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import nextscale
from sample.commands.planner_cli import tell_over
from sample.costs import Work, cache_peak, plan_work
from sample.generate import generate
from sample.guidance import Guidance
from sample.load import model_digest
from sample.measure import CostModel, Run, Stopwatch, line_fit, nonnegative_fit
from sample.plan_text import PlanConfig
from sample.planner import (
    Choice,
    Settings,
    best,
    candidates,
    evaluate,
    fitting,
    pareto,
    read_measured,
    read_size,
    read_time,
)
from tokenizer.quantizer import MultiScaleQuantizer
from tokenizer.schedule import ScaleSchedule
from var.conditioning import ClassPrompt
from var.transformer import NextScaleTransformer

PLANS = [
    {},
    {"depth": 2},
    {"plan": "supernet:2", "depth": "2,1"},
    {"plan": "code:2"},
    {"plan": "self:3", "depth": 2},
    {"cache": "50%"},
    {"cache": "window:50%"},
    {"cache": "pyramidkv:50%"},
    {"plan": "supernet:1", "depth": 3, "cache": "40%"},
    {"plan": "code:2", "cache": "60%"},
    {"prune": "50%"},
    {"prune": "30%,40%,50%"},
    {"prune": "20%,50%,100%"},
    {"prune": "100%,100%"},
    {"plan": "supernet:2", "depth": 2, "prune": "25%,50%"},
    {"plan": "code:2", "prune": "25%,50%"},
    {"plan": "code:3", "prune": "25%,50%,60%"},  # the refiner makes all of what the drafter left out
    {"plan": "self:2", "depth": "3,2", "prune": "50%,60%"},
]


def make_model(depth=4, width=32, **options):
    index = [[0.0, 0.3 * layer, 0.2, 0.1 * layer] for layer in range(depth)]
    config = {"vocab_size": 20, "latent_channels": 5, "num_classes": 4, "heads": 2, "schedule": "1,2,3,4"}
    return NextScaleTransformer(depth=depth, width=width, **{**config, "selectivity": index, **options}).eval()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return make_model(), make_model(depth=2, width=16)


def generated(plan, batch, hooks=()):
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(vocab_size=20, channels=5, num_scales=4)
    return generate(plan, quantizer, ClassPrompt(torch.arange(batch) % 4), range(batch), hooks=hooks)


ENDING = [Guidance(1.5, until=2), Guidance((0.0, 2.0, 0.0, 0.0), blocks=(0,), on_logits=False)]


@pytest.mark.parametrize("guidance", [0.0, 1.5, *ENDING], ids=str)
@pytest.mark.parametrize("words", PLANS, ids=str)
def test_cache_bytes_are_known_beforehand(models, words, guidance):
    model, refiner = models
    plan = PlanConfig(**words).build(model, refiner=refiner, guidance=guidance)
    watch = Stopwatch(torch.device("cpu"))
    generated(plan, 3, hooks=[watch])
    assert cache_peak(plan, 3, torch.float32) == watch.cache_bytes > 0
    assert len(watch.seconds) == 4 and all(second >= 0 for second in watch.seconds)


@pytest.mark.parametrize("guidance", [1.5, *ENDING], ids=str)
@pytest.mark.parametrize("words", [words for words in PLANS if "cache" not in words], ids=str)
def test_operations_are_those_that_torch_counts(models, words, guidance):
    """All but what is once an image: conditions, the quantiser."""
    model, refiner = models
    plan = PlanConfig(**words).build(model, refiner=refiner, guidance=guidance)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's kernel is not counted
        generated(plan, 2)
    parts = {
        name: sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.split(".")[-1] == "input_proj" or name.split(".")[-2:-1] == ["blocks"]
    }
    assert sum(work.flops for work in plan_work(plan, 2, head=False)) == pytest.approx(sum(parts.values()), rel=1e-9)


def test_work_of_the_whole_model(models):
    plan = PlanConfig().build(models[0])
    works, bodies = plan_work(plan, 1), plan_work(plan, 1, head=False)
    assert [work.flops - body.flops for work, body in zip(works, bodies)] == [2 * 20 * 32 * n for n in (1, 4, 9, 16)]
    assert [work.blocks for work in works] == [4] * 4 and [work.steps for work in works] == [1] * 4
    assert plan_work(PlanConfig(prune="100%").build(models[0]), 1) == [*works[:3], Work()]  # nothing is done there


@given(st.integers(0, 1000))
def test_fits_recover_rates(seed):
    rng = np.random.default_rng(seed)
    rates, features = rng.uniform(0.1, 2, 3) * [1, 1e-9, 1e-6], rng.uniform(0.5, 2, (30, 3)) * [1, 1e9, 1e6]
    np.testing.assert_allclose(nonnegative_fit(features, features @ rates), rates, rtol=1e-6)
    fixed, each = line_fit([(1, 5.0), (4, 11.0), (16, 35.0)])
    assert (fixed, each) == pytest.approx((3, 2))


def choice(work, seconds, batch=1, memory=100, cache="100%", score=None):
    least = None if score is None else score - 0.05
    settings = Settings(PlanConfig(cache=cache), score=score, least=least)
    return Choice(settings, batch, work, seconds, memory, memory // 2)


def test_choosing():
    whole, small = choice(1.0, 2.0, memory=2**20), choice(0.4, 0.5, memory=2**18)
    squeezed = choice(0.995, 2.0, cache="10%")
    assert best([small, squeezed, whole]) is whole  # nearly the same work: the larger cache
    assert best([whole, whole_batch := choice(1.0, 3.0, batch=4)]) is whole_batch
    assert fitting([whole, small], memory=2**19, latency=None) == [small]
    assert fitting([whole, small], memory=None, latency=1.0) == [small]
    assert best([choice(1.0, 2.0, cache="10%"), larger := choice(0.995, 2.0)]) is larger
    scored = [choice(1.0, 2.0, score=0.6), choice(0.4, 0.5, score=0.7)]
    assert best(scored) is scored[1] and pareto(scored) == [scored[1]]  # what was measured counts, not the work,
    tied = [*scored, choice(0.7, 1.0, score=0.66), choice(0.7, 1.0, score=0.69, cache="10%")]
    assert best(tied) is tied[2]  # but for what may be chance: work and cache decide then
    with pytest.raises(ValueError, match=r"--memory 0\.03125MiB is too little"):
        fitting([whole, small], memory=2**15, latency=None)
    with pytest.raises(ValueError, match="--latency 100ms is too short: every plan takes 500ms"):
        fitting([whole, small], memory=None, latency=0.1)


def test_what_a_refiner_reads_again_is_no_work_kept(models):
    """A hand-over is worth what makes its scales, at most the whole model's: the whole model is chosen before it."""
    model, _ = models
    pipeline = SimpleNamespace(
        make_plan=lambda words: (words if isinstance(words, PlanConfig) else PlanConfig(plan=words)).build(
            model, refiner=model
        )
    )
    costs = SimpleNamespace(text_tokens=0, seconds=lambda plan, batch: len(plan.stages), peak_bytes=lambda *_: 1)
    costs.cache_bytes = costs.peak_bytes
    plans = [PlanConfig(plan=f"code:{border}") for border in (1, 2, 3)] + [PlanConfig()]
    choices = evaluate(pipeline, costs, [Settings(words) for words in plans], [1])
    assert [choice.work for choice in choices] == [1.0] * 4 and best(choices) is choices[-1]


def test_the_figures_of_settings(models):
    """Those of a batch; a larger refiner's scales are worth no more than the whole model's; no guidance is none."""
    model, _ = models
    larger = make_model(depth=6)

    def make_plan(words, guidance_until=None):
        words = PlanConfig(plan=words) if isinstance(words, str) else words
        return words.build(model, refiner=larger, guidance=Guidance(1.5, until=guidance_until))

    pipeline = SimpleNamespace(make_plan=make_plan)
    costs = CostModel((1e-9,) * len(Work.names()), (0.0, 0.0), (0.0, 0.0), (7.0, 0.0, 0.0), torch.float32)
    made = [Settings(PlanConfig()), Settings(PlanConfig(plan="code:2")), Settings(PlanConfig(), 0)]
    choices = evaluate(pipeline, costs, made, [1, 3])
    assert [round(choice.work, 2) for choice in choices] == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    for choice in choices:
        assert choice.cache_bytes == cache_peak(choice.settings.plan(pipeline), choice.batch, torch.float32)
        assert choice.peak_bytes == choice.cache_bytes + 7
    assert choices[4].cache_bytes == choices[0].cache_bytes / 2
    wrong = Settings(PlanConfig(plan="supernet:1", depth=9), score=0.5, least=0.4)
    with pytest.raises(ValueError, match=r"--quality: --plan supernet:1 --depth 9 --cache 100% makes no plan"):
        evaluate(pipeline, costs, [wrong], [1])


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.1, 10)), min_size=1, max_size=30))
def test_nothing_beats_the_front(points):
    choices = [choice(work, seconds) for work, seconds in points]
    front = pareto(choices)
    for one in choices:
        assert any(c.work >= one.work and c.images_per_s >= one.images_per_s for c in front)
    for one in front:
        assert not any(c.work > one.work and c.images_per_s > one.images_per_s for c in choices)


def proposed(depths=(), refiner=None, guided=4, name=None, **options):
    """The options of all candidates of a model."""
    plan = SimpleNamespace(guided_scales=guided)
    pipeline = SimpleNamespace(transformer=make_model(**options), refiner=refiner, make_plan=lambda words: plan)
    return [one.options.removeprefix("--plan ") for one in candidates(pipeline, depths, name)]


def test_what_is_proposed():
    """Subnets where they were trained or asked for, hand-overs with a refiner, less guidance where there is some."""
    whole = ["var --cache 100%"] + [f"var --cache 100% --guidance-until {n}" for n in range(4)]
    assert proposed(selectivity=None) == whole
    assert set(proposed()) == {line.replace("100%", share) for line in whole for share in ("100%", "50%", "20%", "10%")}
    trained = {"subnets": {"depths": [2, 1], "bridge": 2}, "selectivity": None, "guided": 0}
    subnets = [f"supernet:{n} --depth {depth} --cache 100%" for n in (1, 2, 3) for depth in (2, 1)]
    assert proposed(**trained) == [whole[0], *subnets[2:]]
    assert proposed([2, 1], **trained) == [whole[0], *subnets]
    refined = proposed(refiner=make_model(depth=2, width=16, selectivity=None), selectivity=None, guided=0)
    assert refined == [whole[0], *(f"code:{n} --cache 100%" for n in (1, 2, 3))]
    other = {"refiner": make_model(depth=2, width=16, selectivity=None), "guided": 0}  # not calibrated
    named = [f"code:{n} --refiner runs/x --cache 100%" for n in (1, 2, 3)]
    assert proposed(name="runs/x", **other) == [whole[0], *named]
    always = proposed(subnets={"depths": [2], "bridge": 0}, selectivity=None, guided=0)
    assert always[1:] == ["var --depth 2 --cache 100%", *(f"supernet:{n} --depth 2 --cache 100%" for n in (1, 2, 3))]
    long = proposed(schedule="1,2,3,4,5,6,7,8,9,10,11,12,13", selectivity=None, guided=0)
    assert long == [whole[0]] + [f"var --cache 100% --prune {shares}" for shares in ("50%,75%", "40%,50%,100%,100%")]


def elastic_result(path, digest, *rows):
    """A result as of `benchmarks.elastic`: rows of a digest's model, one with a refiner, and one of another model."""
    plain = {"plan": "var", "cache": "100%", "model": "full"}
    plain |= dict.fromkeys(("depth", "prune", "until", "refiner"))
    late = plain | {"refiner": "refiner", "plan": "code:1", "score": 0.8}
    made = [*(plain | row for row in rows), late, late | {"model": "drafter"}]
    for row in made:
        row |= {"score_ci95": [row["score"] - 0.05, row["score"] + 0.05], "row": " ".join(map(str, row.values()))}
    content = {"settings": {"models": {"full": digest, "drafter": "000", "refiner": "111"}}, "rows": made}
    path.write_text(json.dumps(content))
    return path


def test_measured_rows_are_those_of_the_model(tmp_path):
    rows = ({"score": 0.5}, {"until": 2, "score": 0.6}, {"prune": "50%", "score": 0.3}, {"cache": "20%", "score": 0.4})
    path = elastic_result(tmp_path / "e.json", "abc", *rows, rows[0])
    found = read_measured(path, "abc")
    assert [(one.options.removeprefix("--plan var --cache "), one.score) for one in found] == [
        ("100%", 0.5), ("100% --guidance-until 2", 0.6), ("100% --prune 50%", 0.3), ("20%", 0.4)
    ]  # fmt: skip
    assert [one.least for one in found] == pytest.approx([0.45, 0.55, 0.25, 0.35])
    assert read_measured(path, "abc", "111", "runs/x")[-1].options == "--plan code:1 --refiner runs/x --cache 100%"
    assert len(read_measured(path, "abc", "222")) == 4
    with pytest.raises(ValueError, match=r"has rows of other models \(drafter 000, full abc\), none of xyz"):
        read_measured(path, "xyz")
    with pytest.raises(ValueError, match=r"has rows of this model with another refiner only: see --refiner"):
        read_measured(path, "000")
    with pytest.raises(FileNotFoundError, match=r"--quality .*nowhere\.json is not a file"):
        read_measured(tmp_path / "nowhere.json", "abc")
    for text in ("", "[]", '{"rows": []}', '{"settings": {"models": {"full": "abc"}}, "rows": [{"model": "full"}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"is no result of benchmarks\.elastic with scores"):
            read_measured(path, "abc")
    with pytest.raises(ValueError, match=r"is no result of benchmarks\.elastic with scores"):
        read_measured(elastic_result(path, "abc", {"score": float("nan")}), "abc")


def test_sizes_and_times_are_read():
    assert (read_size("6GiB"), read_size("500 MB"), read_size("1024B")) == (6 * 2**30, 5e8, 1024)
    assert (read_time("80ms"), read_time("1.5s"), read_time("2s")) == (0.08, 1.5, 2)
    for read, text in (
        (read_size, "6GiBs"),
        (read_size, "-1"),
        (read_size, "6"),
        (read_time, "fast"),
        (read_time, "200"),
    ):
        with pytest.raises(ValueError, match="must be like"):
            read(text)


def test_the_command(class_folder, tmp_path, capsys):
    argv = ["plan", "--model", str(class_folder), "--class", "0-3", "--device", "cpu", "--repeats", "1"]
    argv += ["--batch", "2", "--measured", "2", "--out", str(tmp_path / "plan.png")]
    assert nextscale.main(argv) == 0
    out = capsys.readouterr().out
    assert "chosen: --plan var --cache 100% --batch-size 2" in out and (tmp_path / "plan.png").stat().st_size > 1000
    assert nextscale.main([*argv, "--memory", "1MiB"]) == 2
    assert "too little" in capsys.readouterr().err
    for words, message in (
        (["--repeats", "0"], "--repeats must be 1 or more, got 0"),
        (["--measured", "-1"], "--measured must be 0 or more, got -1"),
        (["--batch", "0"], "--batch must be 1 or more, got 0"),
        (["--depths", "1,9"], "--depths must be below the model's 2 layers, got 1,9"),
        (["--depths", "0"], "--depths must be whole numbers above 0 with commas between them, got '0'"),
        (["--depths", ""], "--depths must be whole numbers above 0 with commas between them, got ''"),
        (["--out", str(tmp_path / "plan.png" / "plan.png")], "--out must be in a folder"),
        (["--quality", "nowhere.json"], "--quality nowhere.json is not a file"),
        (["--quality", "nowhere.json", "--depths", "1"], "--depths 1 goes with no --quality"),
    ):
        assert nextscale.main([*argv, *words]) == 2
        assert message in capsys.readouterr().err


def test_the_command_goes_by_scores(class_folder, tmp_path, capsys):
    """Of rows with scores the best is chosen, be it less work; fewer layers without training are cautioned."""
    rows = ({"score": 0.5}, {"until": 2, "score": 0.6}, {"plan": "supernet:1", "depth": 1, "score": 0.1})
    path = elastic_result(tmp_path / "e.json", model_digest(class_folder), *rows)
    argv = ["plan", "--model", str(class_folder), "--class", "0-3", "--device", "cpu", "--repeats", "1"]
    argv += ["--batch", "2", "--measured", "3"]
    assert nextscale.main([*argv, "--quality", str(path), "--out", str(tmp_path / "plan.png")]) == 0
    said = capsys.readouterr()
    assert "chosen: --plan var --cache 100% --guidance-until 2 --batch-size 2" in said.out and not said.err
    assert said.out.splitlines()[0].split()[:3] == ["plan", "batch", "score"] and "0.600" in said.out
    elastic_result(path, model_digest(class_folder), rows[2])
    assert nextscale.main([*argv, "--quality", str(path)]) == 0
    assert "trained to run 1 of its 2 layers from scale 1 on" in capsys.readouterr().err


def test_a_limit_that_the_choice_breaks_is_told(capsys):
    run = Run((), 0.0, 0.2, 0, 0, 0, 3 * 2**20)
    tell_over(run, 4 * 2**20, 0.3)
    tell_over(run, None, None)
    assert capsys.readouterr().err == ""
    tell_over(run, 2 * 2**20, 0.1)
    assert "the choice took 200ms and 3MiB when it was measured" in capsys.readouterr().err


def test_a_model_of_one_scale_has_a_plan_too(tmp_path, tiny_vqvae, capsys):
    vqvae = copy.deepcopy(tiny_vqvae)
    vqvae.schedule = ScaleSchedule.of("4")
    vqvae.register_to_config(schedule="4")
    model = make_model(vocab_size=16, latent_channels=4, num_classes=5, schedule="4", selectivity=None)
    quiet_pipeline(model, vqvae).save_pretrained(tmp_path)
    argv = ["plan", "--model", str(tmp_path), "--class", "0", "--device", "cpu", "--repeats", "1", "--measured", "0"]
    assert nextscale.main(argv) == 0
    assert "chosen: --plan var --cache 100%" in capsys.readouterr().out


def test_a_picture_that_could_not_be_drawn_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sample.commands.planner_cli.importlib.util.find_spec", lambda name: None)
    assert nextscale.main(["plan", "a red star", "--out", str(tmp_path / "plan.png")]) == 2
    assert "--out draws a picture and needs matplotlib" in capsys.readouterr().err
