"""Search: one candidate is plain generation, every method is row selection, costs are counted exactly."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import pearsonr

from sample.cluster import POOLINGS, kmeans, own_direction, representatives
from sample.costs import plan_flops
from sample.edit import EditHook
from sample.generate import generate, scale_logits, start
from sample.ledger import Ledger, counted_flops
from sample.plan import Plan, Stage, collaborative, plain
from sample.plan_text import PlanConfig
from sample.rewards import Callback, PixelFeatures
from sample.search import (
    DRAWS,
    POTENTIALS,
    Search,
    SearchHook,
    candidate_seeds,
    choices_of,
    pick,
    search_images,
    weights_of,
)
from sample.search_steps import METHODS, PAPER_SCALES, SLACK, Step, check_steps, descending, fit_budget, make_steps
from sample.search_tree import family_tree
from sample.state import Hook
from tokenizer.schedule import ScaleSchedule
from var.conditioning import ClassPrompt
from var.transformer import NextScaleTransformer

INFINITY = ScaleSchedule.of([1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64])


def brightness(images, prompts):
    return images.mean(axis=(1, 2, 3)) / 255


BRIGHT = Callback(brightness)
STEPS = (Step(0, 4, "cluster"), Step(1, 2, "resample"), Step(2, 1, "best"))


def tokens_of(result):
    return torch.cat(result.tokens, dim=1)


@pytest.fixture(scope="module")
def run(tiny_class_model, tiny_vqvae):
    def run(seeds=(5, 6, 7), plan=None, reward=BRIGHT, **options):
        made = {"candidates": 6, "steps": STEPS, "reward": reward}
        hooks = options.pop("hooks", ())
        prompt = ClassPrompt(torch.tensor([seed % 5 for seed in seeds]))
        plan = plan or plain(tiny_class_model)
        return search_images(
            plan,
            tiny_vqvae.quantizer,
            prompt,
            seeds,
            search=Search(**{**made, **options}),
            prompts=prompt.classes_B.tolist(),
            decode=tiny_vqvae.decode,
            hooks=hooks,
        )

    return run


def plainly(model, vqvae, seeds=(5, 6, 7), plan=None, **options):
    prompt = ClassPrompt(torch.tensor([seed % 5 for seed in seeds]))
    return generate(plan or plain(model), vqvae.quantizer, prompt, seeds, **options)


class Judge:
    """Rewards that are no plain function; images are arrays for each of them."""

    def bright(self, images, prompts):
        return brightness(images, prompts)

    def __call__(self, images, prompts):
        return brightness(images, prompts)


@pytest.mark.parametrize(
    "reward", [brightness, Judge().bright, Judge(), partial(brightness), lambda *given: brightness(*given)]
)
def test_any_function_of_images_and_prompts_is_a_reward(run, reward):
    assert torch.equal(tokens_of(run(reward=reward)), tokens_of(run()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": "scenes"}, "reward must be a function of images, got 'scenes'"),
        ({"features": "dinov2"}, "features must be a function of images, got 'dinov2'"),
        ({"steps": "8 best"}, "steps must be those that make_steps gives"),
        ({"steps": Step(2, 1, "best")}, "steps must be those that make_steps gives"),
        ({"candidates": 2.5}, "candidates must be a whole number, got 2.5"),
    ],
)
def test_settings_of_another_kind(changes, said):
    with pytest.raises(TypeError, match=said):
        Search(**{"candidates": 6, "steps": STEPS, "reward": BRIGHT, **changes})


def test_a_way_of_choosing_that_nothing_explains(run, monkeypatch):
    monkeypatch.setattr("sample.search_steps.HOWS", ("mmr", "best"))
    with pytest.raises(ValueError, match="nothing says how candidates are chosen by 'mmr'"):
        run(steps=(Step(0, 4, "mmr"), Step(2, 1, "best")))


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_candidate_is_plain_generation(run, tiny_class_model, tiny_vqvae, method):
    candidates, steps = make_steps(method, 1, 3)
    wanted = tokens_of(plainly(tiny_class_model, tiny_vqvae))
    assert torch.equal(tokens_of(run(candidates=candidates, steps=steps)), wanted)
    alone = descending(1 / 8, 3)  # one candidate, but all steps take place
    assert torch.equal(tokens_of(run(candidates=alone[0], steps=alone[1])), wanted)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_an_image_does_not_depend_on_its_batch(run, pooling, potential):
    options = {"pooling": pooling, "potential": potential, "features": PixelFeatures(4)}
    together = tokens_of(run(**options))
    alone = torch.cat([tokens_of(run([seed], **options)) for seed in (5, 6, 7)])
    assert torch.equal(together, alone)
    assert torch.equal(tokens_of(run([7, 5], **options)), together[[2, 0]])


def test_candidates_that_are_all_the_same_are_noticed(run, tiny_class_model, recwarn):
    options = {"candidates": 4, "steps": (Step(2, 1, "best"),)}
    with pytest.warns(UserWarning, match="nothing to choose from.*top_p"):
        run(plan=plain(tiny_class_model, top_k=1), **options)
    recwarn.clear()
    run(**options)
    assert not [w for w in recwarn if "nothing to choose" in str(w.message)]


def test_the_same_seed_twice_in_a_batch_is_the_same_image_twice(run):
    first, second = tokens_of(run([5, 5]))
    assert torch.equal(first, second)


def test_best_of_n_is_the_best_of_n_independent_images(run, tiny_class_model, tiny_vqvae):
    best = (Step(2, 1, "best"),)
    found = run([5], candidates=8, steps=best)
    gathered = []

    class Keep(SearchHook):
        def on_scale_end(self, state, k):
            gathered.append(state.f_hat_BCHW)

    search = Search(candidates=8, steps=best, reward=BRIGHT)
    plainly(tiny_class_model, tiny_vqvae, [5], hooks=[Keep(search, [0], tiny_vqvae.decode, Ledger())])
    finals = gathered[-1]
    assert len(finals) == 8 and len(torch.unique(finals.flatten(1), dim=0)) == 8
    scores = BRIGHT(((tiny_vqvae.decode(finals) / 2 + 0.5).clamp(0, 1) * 255).round().byte(), [0] * 8)
    assert found.scores == [pytest.approx(scores.max().item())]
    assert torch.equal(found.f_hat_BCHW[0], finals[scores.argmax()])
    torch.testing.assert_close(found.decoded_BCHW, tiny_vqvae.decode(found.f_hat_BCHW), atol=1e-5, rtol=0)
    prompt = ClassPrompt(torch.zeros(8, dtype=torch.int64))  # class 0, as that of seed 5
    alone = generate(plain(tiny_class_model), tiny_vqvae.quantizer, prompt, candidate_seeds(5, 8))
    torch.testing.assert_close(alone.f_hat_BCHW, finals, atol=1e-5, rtol=0)


def test_more_candidates_score_higher(run):
    seeds = list(range(20))
    for method in ("best", "tts", "resample"):
        few, many = (
            run(seeds, candidates=c, steps=s, sharpness=50.0).scores
            for c, s in (make_steps(method, 2, 3), make_steps(method, 8, 3))
        )
        assert sum(many) > sum(few), method


def test_a_constant_reward_changes_no_frequencies(run, tiny_class_model, tiny_vqvae):
    flat = Callback(lambda images, prompts: [1.0] * len(images))
    found = run([5, 6, 7], candidates=4, steps=(Step(2, 1, "best"),), reward=flat)
    assert torch.equal(tokens_of(found), tokens_of(plainly(tiny_class_model, tiny_vqvae)))


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_search_goes_with_every_plan(run, tiny_class_model, guidance):
    torch.manual_seed(0)
    twin = NextScaleTransformer(**{**tiny_class_model.config, "depth": 2}).eval()
    twin.load_state_dict(tiny_class_model.state_dict())
    wanted = tokens_of(run(plan=plain(tiny_class_model, guidance=guidance)))
    plans = {
        "refiner = drafter": collaborative(tiny_class_model, twin, handover=1, guidance=guidance),
        "late": collaborative(tiny_class_model, twin, handover=2, guidance=guidance),
        "two stages": Plan(
            tuple(
                Stage(tiny_class_model, scales, guidance=plain(twin, guidance=guidance).stages[0].guidance)
                for scales in (range(0, 2), range(2, 3))
            )
        ),
    }
    for name, plan in plans.items():
        assert torch.equal(tokens_of(run(plan=plan)), wanted), name


def test_rounds_go_on_until_it_is_enough(run):
    once = run(candidates=2, steps=(Step(2, 1, "best"),))
    enough = sorted(once.scores)[1]
    found = run(candidates=2, steps=(Step(2, 1, "best"),), rounds=4, enough=enough)
    assert [score >= before for score, before in zip(found.scores, once.scores)] == [True] * 3
    assert sorted(found.rounds)[:2] == [1, 1] and max(found.rounds) > 1
    for i, rounds in enumerate(found.rounds):
        if rounds == 1:
            assert torch.equal(found.f_hat_BCHW[i], once.f_hat_BCHW[i])
    lone = run(candidates=1, steps=(Step(2, 1, "best"),), rounds=3, enough=2.0)
    assert lone.rounds == [3, 3, 3] and lone.ledger.calls["reward"] == 9


def test_a_later_round_is_about_the_images_that_remain(tiny_class_model, tiny_vqvae):
    """What is given, unwanted and shown of an image, in whatever round, is that of the image itself."""
    seeds, unwanted = (5, 6, 7), torch.tensor([4, 3, 2])
    given = torch.full((3, tiny_class_model.schedule.total), -1)
    given[:, 5:9] = torch.tensor([[1], [2], [3]])
    shift, prompts = torch.tensor([0.4, 0.4, -0.4]), []  # the last image is the darkest

    def reward(images, prompts_of):
        prompts.extend(prompts_of)
        return brightness(images, prompts_of)

    def found(images, enough):
        prompt = ClassPrompt(torch.tensor([seeds[i] % 5 for i in images]))
        return search_images(
            plain(tiny_class_model),
            tiny_vqvae.quantizer,
            prompt,
            [seeds[i] for i in images],
            search=Search(
                candidates=3, steps=(Step(2, 1, "best"),), reward=Callback(reward), rounds=3, enough=enough[images[0]]
            ),
            prompts=[f"image {i}" for i in images],
            decode=tiny_vqvae.decode,
            negative=ClassPrompt(unwanted[list(images)]),
            hooks=[EditHook(given[list(images)])],
            show=lambda decoded, rows: decoded + shift[[images[row] for row in rows]].view(-1, 1, 1, 1),
        )

    first = found([0, 1, 2], [0.0])
    enough = [sorted(first.scores)[1]] * 3
    together = found([0, 1, 2], enough)
    assert together.rounds[:2] == [1, 1] and together.rounds[2] > 1
    assert together.ledger.images == 3
    for i in range(3):
        alone = found([i], enough)
        assert torch.equal(tokens_of(alone)[0], tokens_of(together)[i])
        assert (alone.scores[0], alone.rounds[0]) == (pytest.approx(together.scores[i], abs=1e-5), together.rounds[i])
    assert torch.equal(tokens_of(together)[:, 5:9], given[:, 5:9])
    assert prompts[:9] == [f"image {i}" for i in range(3) for _ in range(3)]


def test_every_round_is_another_attempt_and_the_first_of_equals_stays(run):
    seen = []

    class Seen(Hook):
        def on_scale_end(self, state, k):
            seen.extend([state.f_hat_BCHW[0].clone()] * (k == 2))

    flat = Callback(lambda images, prompts: [1.0] * len(images))
    options = {"candidates": 1, "steps": (Step(2, 1, "best"),), "reward": flat}
    found = run([5], rounds=3, enough=2.0, hooks=[Seen()], **options)
    assert len(torch.unique(torch.stack(seen).flatten(1), dim=0)) == 3
    assert torch.equal(found.f_hat_BCHW[0], seen[0]) and found.rounds == [3]
    assert run([5], rounds=3, enough=1.0, **options).rounds == [1]  # which is reached


WORDS = [{"plan": "supernet:1", "depth": 1}, {"plan": "self:2", "depth": 1}]
WORDS += [{"cache": "snapkv:50%"}, {"cache": "window:50%"}, {"prune": "60%"}, {"guidance_until": 2}]


@pytest.mark.parametrize("words", WORDS)
def test_search_goes_with_elastic_decoding(run, class_pipeline, tiny_class_model, tiny_vqvae, words):
    plan = class_pipeline.make_plan(**words)
    together = tokens_of(run(plan=plan))
    assert torch.equal(together, torch.cat([tokens_of(run([seed], plan=plan)) for seed in (5, 6, 7)]))
    one = run(plan=plan, candidates=1, steps=(Step(2, 1, "best"),))
    assert torch.equal(tokens_of(one), tokens_of(plainly(tiny_class_model, tiny_vqvae, plan=plan)))


def test_candidates_that_will_go_hold_no_room_for_later_scales(run):
    """Six candidates run the first scale, four the second, two the third: never six times the whole pyramid."""
    sizes = []

    class Watch(Hook):
        def on_tokens(self, state, k, logits_BlV, tokens_Bl):
            sizes.append(tuple(state.cache.keys[0].shape[::2]))  # rows, with the unconditional half, and tokens
            return tokens_Bl

    found = run(seeds=(5,), hooks=[Watch()])
    assert sizes == [(12, 1), (8, 5), (4, 5)]
    assert torch.equal(tokens_of(found)[0], tokens_of(run())[0])


def test_candidates_can_be_decoded_in_parts(run):
    whole, parts = run(), run(decode_batch=4)
    assert torch.equal(tokens_of(whole), tokens_of(parts)) and whole.ledger.calls == parts.ledger.calls


def test_search_goes_with_editing(run, tiny_class_model):
    schedule = tiny_class_model.schedule
    given = torch.full((3, schedule.total), -1)
    given[:, 5:9] = torch.tensor([[1], [2], [3]])
    found = tokens_of(run(hooks=[EditHook(given)]))
    assert torch.equal(found[:, 5:9], given[:, 5:9])
    alone = tokens_of(run([6], hooks=[EditHook(given[1:2])]))
    assert torch.equal(found[1:2], alone)


def test_enough_is_about_the_finished_image(run):
    resampled = (Step(1, 2, "resample"), Step(2, 1, "random"))
    for candidates, steps in ((4, (Step(2, 1, "random"),)), (4, resampled)):
        search = Search(candidates=candidates, steps=steps, reward=BRIGHT, rounds=2, enough=2.0)
        assert 2 in search.scored
        found = run(candidates=candidates, steps=steps, rounds=2, enough=2.0)
        shown = ((found.decoded_BCHW / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        assert found.scores == pytest.approx(BRIGHT(shown, [0] * 3).tolist(), abs=1e-4) and found.rounds == [2, 2, 2]
        assert {name: 6 * rows for name, rows in search.calls().items() if rows} == found.ledger.calls
    assert run(candidates=4, steps=resampled).scores == [None] * 3  # the finished images were not looked at


def test_a_difference_needs_no_more_than_its_resamplings():
    steps = (Step(0, 4, "resample"), Step(2, 3, "random"), Step(3, 2, "resample"), Step(5, 1, "best"))
    assert Search(candidates=6, steps=steps, reward=BRIGHT, potential="difference").scored == {0, 2, 3, 5}


def test_one_candidate_is_not_looked_at():
    early = Search(candidates=4, steps=(Step(1, 1, "best"), Step(2, 1, "best")), reward=BRIGHT)
    assert early.calls() == {"decoder": 4 + 1, "reward": 4, "features": 0}


@pytest.mark.parametrize(
    "what", [{"sharpness": -0.1}, {"decode_batch": 0}, {"also_score": (3,)}, {"also_score": (-1,)}]
)
def test_settings_at_their_bounds(what):
    name, steps = *what, (Step(2, 1, "best"),)
    with pytest.raises(ValueError, match=name):
        Search(candidates=2, steps=steps, reward=BRIGHT, **what)
    allowed = {"sharpness": 0.0, "decode_batch": 1, "also_score": (0, 2)}[name]
    assert getattr(Search(candidates=2, steps=steps, reward=BRIGHT, **{name: allowed}), name) == allowed


def test_a_difference_needs_the_scale_before_every_resampling(run):
    last = (Step(2, 1, "resample"),)
    search = Search(candidates=4, steps=last, reward=BRIGHT, potential="difference")
    assert search.scored == {1, 2}
    assert search.calls()["reward"] * 3 == run(candidates=4, steps=last, potential="difference").ledger.calls["reward"]


def test_a_budget_is_for_all_rounds(class_pipeline):
    from sample.search_cost import SearchCost

    plan = class_pipeline.make_plan()
    costs = SearchCost.measure(class_pipeline, plan, BRIGHT, None, 1)

    def cost(candidates, steps):
        return costs.relative(Search(candidates=candidates, steps=steps, reward=BRIGHT, rounds=4, enough=2.0))

    candidates, steps = fit_budget("best", 8, 3, cost)
    assert candidates == 2
    search, ledger = Search(candidates=candidates, steps=steps, reward=BRIGHT, rounds=4, enough=2.0), Ledger()
    class_pipeline(class_labels=[1, 2], search=search, hooks=[ledger], output_type="pt")
    assert ledger.total_flops / 2 == pytest.approx(costs.flops(search), rel=1e-3)


# --- accounting ------------------------------------------------------------------------------------------------------


def test_costs_are_counted_exactly(run, tiny_class_model):
    ledger = Ledger()
    run(hooks=[ledger], features=PixelFeatures(2))
    widths = Search(candidates=6, steps=STEPS, reward=BRIGHT).widths(3)
    assert widths == [6, 4, 2]
    assert ledger.images == 3 and ledger.tokens == 3 * (6 * 1 + 4 * 4 + 2 * 16)
    assert ledger.calls == {"decoder": 3 * (6 + 4 + 2), "features": 3 * 6, "reward": 3 * (4 + 2)}
    search = Search(candidates=6, steps=STEPS, reward=BRIGHT, features=PixelFeatures(2))
    assert {name: 3 * rows for name, rows in search.calls().items()} == ledger.calls
    assert Search(candidates=6, steps=(Step(2, 1, "random"),)).calls()["decoder"] == 1  # the image itself
    lone = Search(candidates=1, steps=(Step(2, 1, "best"),), reward=BRIGHT, rounds=2, enough=0.0)
    assert lone.calls() == {"decoder": 1, "reward": 1, "features": 0}
    early = Search(candidates=4, steps=(Step(1, 1, "best"), Step(2, 1, "best")), reward=BRIGHT, enough=0.0)
    assert early.calls()["reward"] == 4 + 1  # the finished image is looked at, too
    assert ledger.model_flops == 3 * plan_flops(plain(tiny_class_model), widths)
    one = ledger.per_image()
    assert one["tokens"] == 54 and one["decoder_calls"] == 12
    assert one["transformer_gflops"] == pytest.approx(plan_flops(plain(tiny_class_model), widths) / 1e9)
    parts = [one[f"{name}_gflops"] for name in ("transformer", "decoder", "reward", "features")]
    assert one["gflops"] == pytest.approx(sum(parts)) and one["total_s"] == pytest.approx(ledger.seconds["total"] / 3)
    assert str(ledger).startswith(f"an image took 54 tokens, {one['gflops']:.2f} GFLOPs, 12 decoder calls")
    assert ledger.flops["decoder"] > 0 and ledger.seconds["total"] > ledger.seconds["decoder"] > 0
    assert ledger.per_image()["tokens"] == 54 and "54 tokens" in str(ledger)


def test_nothing_is_decoded_where_nothing_is_needed(run):
    ledger = Ledger()
    run(hooks=[ledger], reward=None, candidates=6, steps=(Step(0, 3, "cluster"), Step(2, 1, "random")))
    assert ledger.calls == {}  # clustering by the running reconstruction itself


@pytest.mark.parametrize("conditioning", ["class", "text"])
@pytest.mark.parametrize("stages", ["plain", "fewer layers", "late", "smaller cache", "late with a smaller cache"])
def test_counted_flops_are_those_torch_counts(request, tiny_vqvae, conditioning, stages):
    model = request.getfixturevalue(f"tiny_{conditioning}_model")
    twin = NextScaleTransformer(**model.config).eval()
    plan = {
        "plain": plain(model),
        "fewer layers": Plan((Stage(model, range(0, 2)), Stage(model, range(2, 3), layers=[1]))),
        "late": collaborative(model, twin, handover=2),
        "smaller cache": PlanConfig(cache="window:40%").build(model),
        "late with a smaller cache": PlanConfig(plan="code:2", cache="window:40%").build(model, refiner=twin),
    }[stages]
    prompt = ClassPrompt(torch.tensor([1, 2]))
    if conditioning == "text":
        prompt = model.null_prompt(_text_prompt(model))
    state, ledger, counted = start(plan, tiny_vqvae.quantizer, prompt, [1, 2]), Ledger(), 0
    with torch.no_grad():
        for stage in plan.stages:
            with counted_flops() as entering:
                state.enter(stage)
            with counted_flops() as conditions:
                state._condition(stage)
            if state.scale and stage.model is twin:  # the prefill
                counted += entering.get_total_flops() - conditions.get_total_flops()
            for k in stage.scales:
                with counted_flops() as counter:
                    logits = scale_logits(state, k)
                counted += counter.get_total_flops()
                tokens = ledger.on_tokens(state, k, logits, logits.argmax(-1))
                state.advance(k, tokens)
    assert ledger.model_flops == counted
    texts = prompt.mask_BT.shape[1] if conditioning == "text" else 0
    assert 2 * plan_flops(plan, text_tokens=texts) == counted
    if stages == "smaller cache":
        assert plan_flops(plan, text_tokens=texts) < plan_flops(plain(model), text_tokens=texts)


def _text_prompt(model):
    from var.conditioning import TextPrompt

    return TextPrompt(torch.zeros(2, 7, model.config.text_width), torch.ones(2, 7, dtype=torch.bool))


def test_the_papers_schedule_costs_what_the_paper_says():
    widths = Search(candidates=8, steps=descending(1, PAPER_SCALES)[1], reward=BRIGHT).widths(PAPER_SCALES)
    assert widths == [8, 8, 8, 6, 6, 6, 4, 2, 2, 2, 1, 1, 1]  # a step counts from the next scale on
    cost = sum(w * length for w, length in zip(widths, INFINITY.lengths)) / INFINITY.total
    assert cost == pytest.approx(1.39, abs=0.005)


def test_a_budget_picks_the_largest_schedule_that_fits(tiny_class_model):
    plan = plain(tiny_class_model)

    def cost(candidates, steps):
        widths = Search(candidates=candidates, steps=steps, reward=BRIGHT).widths(3)
        return plan_flops(plan, widths) / plan_flops(plan)

    for method in METHODS:
        costs = [cost(*fit_budget(method, budget, 3, cost)) for budget in (1, 2, 4, 8)]
        assert all(0.5 * budget < got <= SLACK * budget for budget, got in zip((1, 2, 4, 8), costs)), method
        assert costs == sorted(costs)
    with pytest.raises(ValueError, match="budget"):
        fit_budget("tts", 0.5, 3, cost)


def test_halving_comes_late():
    """After two thirds and five sixths of the scales, of any pyramid."""
    assert [str(step) for step in make_steps("halving", 2, 7)[1]] == ["best@4:4", "best@5:2", "best@6:1"]
    assert [str(step) for step in make_steps("halving", 1.5, 13)[1]] == ["best@8:3", "best@10:2", "best@12:1"]
    for num_scales in (1, 2, 3, 4, 10):
        check_steps(*make_steps("halving", 2, num_scales), num_scales)


# --- the parts -------------------------------------------------------------------------------------------------------


def test_potentials_read_the_history():
    scores = torch.tensor([[0.1, 0.5, 0.3], [0.4, 0.2, 0.9]])
    found = {name: potential(scores).tolist() for name, potential in POTENTIALS.items()}
    assert found["value"] == pytest.approx([0.3, 0.9])
    assert found["max"] == pytest.approx([0.5, 0.9])
    assert found["sum"] == pytest.approx([0.9, 1.5])
    assert found["difference"] == pytest.approx([-0.2, 0.7])
    assert POTENTIALS["difference"](scores[:, :1]).tolist() == pytest.approx([0.1, 0.4])


def test_resampling_chooses_also_where_as_many_go_on(run):
    """By the scores now, of all candidates: with sharp weights the best one goes on alone."""
    steps = (Step(1, 4, "resample"), Step(2, 1, "best"))
    (choices,) = run([5], candidates=4, steps=steps, sharpness=1e6, pictures=True).choices
    best = max(range(4), key=lambda i: choices[0].scores[i])
    assert choices[0].kept == [best] * 4


def test_the_best_is_the_best_now():
    search = Search(candidates=3, steps=(Step(2, 1, "best"),), reward=BRIGHT)
    history = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 2.0])]
    assert pick(search, search.steps[0], 3, history, None, torch.Generator()) == ([1], None)


def test_what_decides_is_drawn_anew_after_each_scale():
    draws = [torch.rand((), generator=choices_of(seed, scale)).item() for seed in (5, 6) for scale in (0, 1, 2)]
    assert len(set(draws)) == 6 and draws[0] == torch.rand((), generator=choices_of(5, 0)).item()


def test_history_follows_its_candidates(run, tiny_class_model, tiny_vqvae):
    steps = (Step(1, 3, "resample"), Step(2, 1, "best"))
    search = Search(candidates=6, steps=steps, reward=BRIGHT, potential="difference", pictures=True)
    assert search.scored == {0, 1, 2}
    hook = SearchHook(search, [0, 1], tiny_vqvae.decode, Ledger())
    plainly(tiny_class_model, tiny_vqvae, [5, 6], hooks=[hook])
    assert [len(scores) for scores in hook.history] == [2, 2, 2]
    for origin, (resampled, final) in enumerate(hook.choices):
        assert len(resampled.scores) == 6 and len(final.scores) == 3
        survivor = resampled.kept[final.kept[0]]
        assert hook.history[1][origin].item() == pytest.approx(resampled.scores[survivor])
        assert hook.history[2][origin].item() == pytest.approx(max(final.scores))


@settings(max_examples=60)
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12), st.integers(1, 20), st.integers(0, 2**32))
def test_weights_never_overflow_and_draws_stay_inside(potential, keep, seed):
    weights = weights_of(torch.tensor(potential), 10.0)
    assert weights.isfinite().all() and weights.sum() == pytest.approx(1)
    for draw in DRAWS.values():
        rows = draw(weights, keep, torch.Generator().manual_seed(seed))
        assert len(rows) == keep and rows == sorted(rows) and all(weights[row] > 0 for row in rows)
    counts = torch.bincount(torch.tensor(rows), minlength=len(potential))
    assert ((counts - keep * weights).abs() < 1 + 1e-6).all()  # systematic: floor or ceiling


def test_draws_have_the_right_frequencies():
    weights = weights_of(torch.tensor([0.0, 0.1, 0.2]), 10.0)
    for draw in DRAWS.values():
        generator = torch.Generator().manual_seed(1)
        rows = torch.tensor([draw(weights, 4, generator) for _ in range(4000)]).flatten()
        share = torch.bincount(rows, minlength=3) / len(rows)
        torch.testing.assert_close(share.double(), weights, atol=0.015, rtol=0)


def test_kmeans_finds_blobs_and_keeps_one_of_each():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    noise = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(2)) * 0.3
    points = (centres[:, None] + noise).flatten(0, 1)
    for seed in range(5):
        kept, labels = representatives(points, 4, torch.Generator().manual_seed(seed))
        assert sorted(row // 6 for row in kept) == [0, 1, 2, 3]
        assert all(len(set(labels[6 * m : 6 * m + 6])) == 1 for m in range(4))
        for row in kept:
            own = points[6 * (row // 6) : 6 * (row // 6) + 6]
            assert torch.equal(points[row], own[torch.cdist(own, own.mean(0)[None]).argmin()])
    assert representatives(points, 4, torch.Generator().manual_seed(0)) == (
        representatives(points, 4, torch.Generator().manual_seed(0))
    )


@settings(max_examples=40)
@given(st.integers(1, 10), st.integers(1, 10), st.integers(1, 4), st.integers(0, 2**32))
def test_as_many_different_rows_are_kept_as_were_asked_for(points, keep, distinct, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(distinct, 3, generator=generator)[torch.randint(distinct, (points,), generator=generator)]
    if keep > points:
        with pytest.raises(ValueError, match="clusters"):
            kmeans(x, keep, generator)
        return
    kept, labels = representatives(x, keep, generator)
    assert len(set(kept)) == keep == len(kept) and kept == sorted(kept) and len(labels) == points


def test_a_principal_direction_has_a_fixed_sign():
    tokens = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1, 1, 1, 1])
    found = own_direction(tokens)
    again = own_direction(tokens + 1e-6)
    torch.testing.assert_close(found, again, atol=1e-4, rtol=0)
    for image, line in zip(tokens, found):
        assert pearsonr(image[:, 0], line).statistic > 0.95  # along the long axis, the same way round each time
    assert torch.equal(own_direction(torch.ones(2, 4, 3)), torch.zeros(2, 4, dtype=torch.float64))


def test_steps_can_be_written_out():
    candidates, steps = make_steps("16 cluster@1:12, resample@3:4, best", 1, 7)
    assert candidates == 16 and steps == (Step(1, 12, "cluster"), Step(3, 4, "resample"), Step(6, 1, "best"))
    assert [str(step) for step in steps] == ["cluster@1:12", "resample@3:4", "best@6:1"]
    for K in (1, 2, 3, 5, 7, 10, 13):
        for method in METHODS:
            for n in (1, 2, 4, 8):
                made = make_steps(method, n, K)
                check_steps(*made, K)
                assert all(a.scale < b.scale for a, b in pairwise(made[1]))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"reward": None}, "reward"),
        ({"potential": "mean"}, "potential"),
        ({"pooling": "max"}, "pooling"),
        ({"draw": "stratified"}, "draw"),
        ({"sharpness": -1.0}, "sharpness"),
        ({"rounds": 2}, "rounds"),
        ({"decode_batch": 0}, "decode_batch"),
        ({"also_score": (3,)}, "also_score"),
        ({"candidates": 0}, "candidates"),
        ({"steps": ()}, "last step"),
        ({"steps": (Step(2, 2, "best"),)}, "last step"),
        ({"steps": (Step(2, 1, "cluster"),)}, "last step"),
        ({"steps": (Step(1, 1, "best"),)}, "last scale"),
        ({"steps": (Step(1, 7, "random"), Step(2, 1, "best"))}, "more than the 6"),
        ({"steps": (Step(1, 2, "random"), Step(1, 1, "best"))}, "later scales"),
        ({"steps": (Step(1, 2, "vote"), Step(2, 1, "best"))}, "vote"),
        ({"reward": Callback(lambda images, prompts: [float("nan")] * len(images), "broken")}, "broken"),
        ({"reward": Callback(lambda images, prompts: [1.0], "short")}, "short"),
    ],
)
def test_mistakes_are_named(run, options, named):
    with pytest.raises(ValueError, match=named):
        run(**options)


@pytest.mark.parametrize("text", ["greedy", "16 best@1:2", "x cluster@1:2 best", "4 cluster@1 best", ""])
def test_unknown_methods_are_named(text):
    with pytest.raises(ValueError, match="search must be"):
        make_steps(text, 2, 7)


# --- the family tree and the command -------------------------------------------------------------------------------


def test_the_pipeline_searches(class_pipeline):
    search = Search(candidates=4, steps=(Step(2, 1, "best"),), reward=BRIGHT)
    ledger = Ledger()
    output = class_pipeline(class_labels=[1, 2], seed=3, search=search, hooks=[ledger], output_type="pt")
    assert output.seeds == [3, 4] and output.images.shape == (2, 3, 8, 8)
    assert ledger.images == 2 and ledger.calls["decoder"] == 8  # the winners are not decoded again
    torch.testing.assert_close(output.images.mean((1, 2, 3)), torch.tensor(output.search.scores), atol=2e-3, rtol=0)
    alone = class_pipeline(class_labels=2, seed=4, search=search, output_type="pt")
    torch.testing.assert_close(alone.images, output.images[1:], atol=1e-5, rtol=0)
    plain = class_pipeline(class_labels=[1, 2], seed=3, output_type="pt")
    assert plain.search is None and (output.images.mean((1, 2, 3)) >= plain.images.mean((1, 2, 3)) - 1e-6).all()
    with pytest.raises(ValueError, match="smooth"):
        class_pipeline(class_labels=1, search=search, smooth=True)


def test_the_family_tree_shows_every_candidate(run):
    found = run([5], pictures=True)
    tree = family_tree(found.choices[0], "class 0")
    colours = [colour for _, colour in tree.getcolors(maxcolors=2**24)]
    assert (40, 150, 70) in colours and (205, 205, 205) in colours and tree.width > tree.height / 3
    green = (np.asarray(tree) == (40, 150, 70)).all(-1).any(0)
    left = np.flatnonzero(green)
    assert green[left[0] : left[-1]].all()  # lines join what was kept, from the first column to the last
    with pytest.raises(ValueError, match="pictures=True"):
        family_tree(run([5]).choices[0])


@pytest.mark.parametrize(
    "words, said",
    [
        (["best", "--enough", "0.5"], "--enough 0.5 ends the --rounds, and there is one"),
        (["best", "--features", "pixels"], "--features pixels is for steps that cluster"),
        (["best", "--pooling", "pool"], "--pooling pool is for steps that cluster"),
        (["best", "--sharpness", "3"], "--sharpness 3.0 is for steps that resample"),
        (["best", "--draw", "systematic"], "--draw systematic is for steps that resample"),
        (["best", "--also-score", "1"], "--also-score 1 is for steps that resample"),
        (["4 resample@1:2 best", "--also-score", "1"], "--also-score is for potentials of several scores"),
        (["4 resample@1:2 best", "--also-score", "9", "--potential", "max"], "must be scales of 0 to 2, got 9"),
    ],
)
def test_options_that_do_nothing_are_named(class_folder, tmp_path, monkeypatch, capsys, words, said):
    import nextscale

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sample.reward_names.load_reward", lambda name, device: BRIGHT)
    common = ["sample", "--model", str(class_folder), "--class", "1", "--reward", "bright"]
    assert nextscale.main([*common, "--search", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_plain_function_is_a_reward(text_pipeline):
    def bright(images, prompts):
        assert images.dtype == np.uint8 and images.shape[-1] == 3 and set(prompts) == {"a red star"}
        return images.mean(axis=(1, 2, 3))

    candidates, steps = make_steps("best", 3, 3)
    made = text_pipeline("a red star", seed=1, search=Search(candidates=candidates, steps=steps, reward=bright))
    assert np.allclose(made.search.scores, np.asarray(made.images[0]).mean(), atol=1e-3)


def test_the_command_searches(text_folder, tmp_path, monkeypatch, capsys):
    import nextscale

    monkeypatch.chdir(tmp_path)
    code = "def bright(images, prompts):\n    return images.mean(axis=(1, 2, 3)) / 255\n"
    (tmp_path / "rewards_here.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["sample", "a red star", "--model", str(text_folder), "--search", "tts", "--reward", "rewards_here:bright"]
    assert nextscale.main([*words, "--n", "2", "--images", "2", "--show-search", "--out", "found"]) == 0
    printed = capsys.readouterr().out
    assert "16 cluster@0:12 cluster@1:8 best@2:1: an image took" in printed and "reward calls" in printed
    names = sorted(path.name for path in (tmp_path / "found").glob("*.png"))
    assert names == ["a-red-star_grid.png", "a-red-star_seed0.png", "a-red-star_seed1.png"]
    assert (tmp_path / "found/search/a-red-star_seed1.png").is_file()
    for again in ("2 were there already", "1 were there already"):  # a tree that is not there is drawn
        assert nextscale.main([*words, "--n", "2", "--images", "2", "--show-search", "--out", "found"]) == 0
        assert again in capsys.readouterr().out
        (tmp_path / "found/search/a-red-star_seed1.png").unlink()
    assert nextscale.main([*words, "--n", "2", "--images", "2", "--show-search", "--out", "found"]) == 0
    assert (tmp_path / "found/search/a-red-star_seed1.png").is_file()
    assert nextscale.main([*words, "--n", "1", "--out", "one"]) == 0
    assert nextscale.main([*words[:4], "--out", "plain"]) == 0
    one, plain = (Image.open(tmp_path / name / "a-red-star_seed0.png").tobytes() for name in ("one", "plain"))
    assert one == plain
    assert nextscale.main([*words, "--budget", "4", "--out", "cheap"]) == 0
    assert nextscale.main([*words, "--n", "4", "--out", "found"]) == 2  # other settings made what is there
    (tmp_path / "rewards_here.py").write_text(code.replace("return", "return -"))
    assert nextscale.main([*words, "--n", "2", "--images", "2", "--show-search", "--out", "found"]) == 2
    assert "reward_digest" in capsys.readouterr().err  # a reward of the same name that is another
    capsys.readouterr()
    for more, named in (
        (["--search", "greedy"], "search must be"),
        (["--reward", "praise"], "reward must be"),
        (["--budget", "0.1"], "budget"),
        (["--show-scales"], "--show-scales"),
        (["--n", "0"], "--n must be 1"),
        (["--n", "4", "--budget", "4"], "--n 4 and --budget 4 both say how many candidates"),
    ):
        assert nextscale.main([*words, "--out", "bad", *more]) == 2
        assert named in capsys.readouterr().err
    assert nextscale.main([*words[:4], "--rounds", "2"]) == 2
    assert "--rounds needs --search" in capsys.readouterr().err
