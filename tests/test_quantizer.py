"""The multi-scale residual quantiser: its four verbs agree with each other and with the published rules."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tokenizer.model import MultiScaleVQ
from tokenizer.quantizer import MultiScaleQuantizer, phi_index
from tokenizer.schedule import ScaleSchedule

SQUARE = ScaleSchedule.of("1,2,3,4")
OBLONG = ScaleSchedule.of("1x1,1x2,2x3,3x5")


def make(schedule, *, vocab_size=32, channels=6, **options):
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(vocab_size=vocab_size, channels=channels, num_scales=len(schedule), **options)
    return quantizer, torch.randn(3, channels, *schedule.latent_hw)


@pytest.mark.parametrize(
    "num_phis, num_scales, chosen",
    [
        (4, 10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (4, 14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (4, 7, [0, 0, 1, 2, 2, 3, 3]),
        (1, 5, [0, 0, 0, 0, 0]),
        (4, 1, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
        (5, 3, [0, 2, 4]),
        (5, 7, [0, 0, 1, 2, 3, 4, 4]),
    ],
)
def test_the_official_choice_of_phi(num_phis, num_scales, chosen):
    assert [phi_index(num_phis, k, num_scales) for k in range(num_scales)] == chosen


@pytest.mark.parametrize("schedule", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("num_phis", [0, 1, 4])
@pytest.mark.parametrize("cosine", [False, True])
def test_the_verbs_rebuild_what_training_sees(schedule, num_phis, cosine):
    quantizer, f = make(schedule, num_phis=num_phis, cosine=cosine)
    trained = quantizer(f, schedule)
    ids = quantizer.encode(f, schedule)
    assert all(torch.equal(a, b) for a, b in zip(ids, trained.ids))
    sums = quantizer.partial_sums(ids, schedule)
    torch.testing.assert_close(sums[-1], trained.f_hat_BCHW, atol=1e-6, rtol=0)
    inputs = quantizer.teacher_inputs(ids, schedule)
    assert inputs.shape == (3, schedule.total - schedule.lengths[0], 6)
    stepwise = [quantizer.next_input(sums[k], k + 1, schedule) for k in range(len(schedule) - 1)]
    assert torch.equal(torch.cat(stepwise, 1), inputs)


def test_one_convolution_a_scale_serves_other_schedules():
    """By the same rule as shared ones: a third scale of three is the last of five."""
    own, other = ScaleSchedule.of("1,2,3,4,5"), ScaleSchedule.of("2,4,5")
    quantizer, f = make(own, num_phis=0)
    assert len(quantizer.phis) == 5
    for phi in quantizer.phis[1:4:2]:  # which are not asked
        phi.weight.data.fill_(torch.nan)
    sums = quantizer.partial_sums(quantizer.encode(f, other), other)
    assert len(sums) == 3 and sums[-1].isfinite().all()
    sized, f = make(own, normalize_scales=True)
    with pytest.raises(ValueError, match="at most 5 scales"):
        sized.encode(f, ScaleSchedule.of("1,2,3,4,5,5"))


def test_arithmetic_stays_float32_whatever_the_weights_are():
    quantizer, f = make(SQUARE)
    wanted = copy.deepcopy(quantizer).bfloat16().float().encode(f, SQUARE)
    assert all(torch.equal(a, b) for a, b in zip(quantizer.bfloat16().encode(f, SQUARE), wanted))
    rounded = f.bfloat16()
    wanted = quantizer.encode(rounded.float(), SQUARE)
    assert all(torch.equal(a, b) for a, b in zip(quantizer.encode(rounded, SQUARE), wanted))


def test_the_sign_of_the_blend_is_ignored():
    (one, f), (other, _) = make(SQUARE, phi_ratio=0.3), make(SQUARE, phi_ratio=-0.3)
    assert torch.equal(one(f, SQUARE).f_hat_BCHW, other(f, SQUARE).f_hat_BCHW)


@pytest.mark.parametrize("schedule", [SQUARE, OBLONG], ids=["square", "oblong"])
def test_the_code_of_a_scale_is_what_it_changes_at_its_own_size(schedule):
    quantizer, f = make(schedule)
    ids = quantizer.encode(f, schedule)
    sums = [quantizer.start(3, schedule), *quantizer.partial_sums(ids, schedule)]
    for k in range(len(schedule)):
        before, after = (quantizer.next_input(sums[i], k, schedule) for i in (k, k + 1))
        torch.testing.assert_close(quantizer.scale_code(ids[k], k, schedule), after - before, atol=1e-5, rtol=0)


def no_noise(schedule, batch=3, channels=6):
    return [torch.zeros(batch, channels, *hw) for hw in schedule.sides]


@pytest.mark.parametrize("schedule", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("options", [{}, {"normalize_scales": True}, {"cosine": True}])
def test_correcting_no_noise_is_encoding(schedule, options):
    quantizer, f = make(schedule, **options)
    labels, inputs = quantizer.corrected(f, schedule, no_noise(schedule))
    assert all(torch.equal(a, b) for a, b in zip(labels, quantizer.encode(f, schedule)))
    torch.testing.assert_close(inputs, quantizer.teacher_inputs(labels, schedule), atol=1e-6, rtol=0)


def test_later_tokens_undo_wrong_codes():
    quantizer, f = make(SQUARE)
    noise = no_noise(SQUARE)
    noise[1] += 100.0  # the second scale's codes are wrong whatever the latents
    labels, inputs = quantizer.corrected(f, SQUARE, noise)
    clean = quantizer.encode(f, SQUARE)
    assert torch.equal(labels[0], clean[0]) and torch.equal(
        labels[1], clean[1]
    )  # labels of that scale are the true ones
    assert not torch.equal(labels[2], clean[2])
    assert torch.equal(inputs[:, :4], quantizer.teacher_inputs(clean, SQUARE)[:, :4])
    z = F.adaptive_avg_pool2d(f - quantizer.partial_sums(clean, SQUARE)[0], 2)
    distances = torch.cdist(
        (z + 100.0 * z.square().mean((1, 2, 3), keepdim=True).sqrt()).flatten(2).mT, quantizer.codebook.weight[None]
    )
    shown = distances.argmin(-1)  # what entered the reconstruction
    aware = [labels[0], shown, *labels[2:]]
    naive = [clean[0], shown, *clean[2:]]
    errors = [(quantizer.partial_sums(ids, SQUARE)[-1] - f).square().mean() for ids in (aware, naive)]
    assert errors[0] < errors[1]


def test_every_token_is_the_nearest_code_of_the_remaining_residual():
    quantizer, f = make(SQUARE)
    rest = f
    for k, ids_Bl in enumerate(quantizer.encode(f, SQUARE)):
        z = rest if k == 3 else F.adaptive_avg_pool2d(rest, SQUARE.sides[k])
        distances = torch.cdist(z.flatten(2).transpose(1, 2), quantizer.codebook.weight[None])
        assert torch.equal(distances.argmin(-1), ids_Bl)
        rest = rest - quantizer.spread(quantizer.lookup(ids_Bl, k, SQUARE), k, SQUARE)


def test_the_gradient_reaches_encoder_codebook_and_phi():
    quantizer, f = make(SQUARE)
    f.requires_grad_()
    output = quantizer(f, SQUARE)
    (output.loss + output.f_hat_BCHW.square().mean()).backward()
    assert f.grad.abs().sum() > 0
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_the_loss_pulls_latents_by_beta_and_codes_by_one(beta):
    """Equation 5 of VAR: a mean over the scales of the distances of the sums so far; each side stands still once."""
    quantizer, f = make(SQUARE, phi_ratio=0.0, **({} if beta == 0.25 else {"beta": beta}))  # VAR's is the default
    f.requires_grad_()
    output = quantizer(f, SQUARE)
    codes = quantizer.codebook.weight
    pull, push = torch.autograd.grad(output.loss, (f, codes))
    sums = [0]
    for k, ids in enumerate(output.ids):
        sums.append(sums[-1] + quantizer.spread(quantizer.lookup(ids, k, SQUARE), k, SQUARE))
    distances = torch.stack([(f_hat - f.detach()).square().mean() for f_hat in sums[1:]])
    assert output.loss.item() == pytest.approx((1 + beta) * distances.mean().item(), rel=1e-5)
    torch.testing.assert_close(push, torch.autograd.grad(distances.mean(), codes)[0])
    gaps = torch.stack([f - f_hat.detach() for f_hat in sums[1:]])
    torch.testing.assert_close(pull, beta * 2 * gaps.mean(dim=0) / f.numel())


@pytest.mark.parametrize("options", [{}, {"normalize_scales": True}])
def test_residuals_for_restarts_are_what_codes_were_searched_for(options):
    quantizer, f = make(SQUARE, **options)
    if options:
        quantizer.scale_rms_K.copy_(torch.tensor([0.2, 0.5, 2.0, 4.0]))
    output = quantizer(f.requires_grad_(), SQUARE)
    for residual_NC, ids in zip(output.residuals_NC, output.ids):
        assert not residual_NC.requires_grad
        assert torch.equal(torch.cdist(residual_NC, quantizer.codebook.weight).argmin(dim=1), ids.flatten())


def test_a_code_is_chosen_by_its_angle_whatever_its_length():
    quantizer, f = make(SQUARE, cosine=True)
    before = [quantizer.choose(f, k, SQUARE) for k in range(4)]
    with torch.no_grad():
        quantizer.codebook.weight.mul_(torch.rand(32, 1) + 0.1)
    assert all(torch.equal(quantizer.choose(f, k, SQUARE), before[k]) for k in range(4))


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from(["1,2,4", "1x2,2x3", "2,2,5"]), st.booleans())
def test_each_added_code_is_what_lookup_says(seed, spec, normalize):
    schedule = ScaleSchedule.of(spec)
    quantizer, _ = make(schedule, normalize_scales=normalize)
    if normalize:
        quantizer.scale_rms_K.copy_(torch.arange(len(schedule)) + 0.5)
    generator = torch.Generator().manual_seed(seed)
    for k, length in enumerate(schedule.lengths):
        ids = torch.randint(32, (2, length), generator=generator)
        one_hot = F.one_hot(ids, 32).float()
        torch.testing.assert_close(quantizer.blend(one_hot, k, schedule), quantizer.lookup(ids, k, schedule))


def test_model_round_trip_and_sizes(tmp_path):
    model = MultiScaleVQ(
        channels=[8, 16],
        layers_per_block=1,
        latent_channels=4,
        vocab_size=16,
        schedule="1,2x3",
        norm_groups=4,
        patch=2,
    ).eval()
    image = torch.rand(2, 3, 8, 12) * 2 - 1
    ids = model.image_to_tokens(image)
    model.save_pretrained(tmp_path)
    again = MultiScaleVQ.from_pretrained(tmp_path)
    assert again.schedule == model.schedule and again.image_hw == (8, 12)
    assert all(torch.equal(a, b) for a, b in zip(again.image_to_tokens(image), ids))
    assert torch.equal(again.tokens_to_image(ids), model.tokens_to_image(ids))
    with pytest.raises(ValueError, match=r"image is \(8, 8\) pixels"):
        model.image_to_tokens(image[..., :8])


def test_noise_is_in_units_of_what_it_disturbs():
    """Latents and codes ten times as large go wrong at the same places."""
    (quantizer, f), generator = make(SQUARE, phi_ratio=0.0), torch.Generator().manual_seed(0)
    noise = [torch.randn(3, quantizer.channels, h, w, generator=generator) for h, w in SQUARE.sides]
    ids, inputs = quantizer.corrected(f, SQUARE, noise)
    with torch.no_grad():
        quantizer.codebook.weight.mul_(10)
    large_ids, large_inputs = quantizer.corrected(10 * f, SQUARE, noise)
    assert all(torch.equal(a, b) for a, b in zip(large_ids, ids))
    torch.testing.assert_close(large_inputs, 10 * inputs, rtol=1e-4, atol=1e-4)


def test_an_image_is_disturbed_by_itself():
    """The noise of self-correction is in units of the image's own size: a batch says nothing about its rows."""
    (quantizer, f), generator = make(SQUARE), torch.Generator().manual_seed(0)
    f = f * torch.tensor([0.1, 1.0, 10.0]).view(-1, 1, 1, 1)
    noise = [torch.randn(3, quantizer.channels, h, w, generator=generator) for h, w in SQUARE.sides]
    ids, inputs = quantizer.corrected(f, SQUARE, noise)
    for row in range(3):
        alone_ids, alone_inputs = quantizer.corrected(f[row : row + 1], SQUARE, [n[row : row + 1] for n in noise])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone_ids, ids))
        torch.testing.assert_close(alone_inputs[0], inputs[row])


def test_images_whose_latents_are_not_finite_have_no_tokens(tiny_vqvae):
    image = torch.full((1, 3, *tiny_vqvae.image_hw), torch.nan)
    with pytest.raises(ValueError, match="latents are not finite"):
        tiny_vqvae.image_to_tokens(image)


def test_no_images_have_no_tokens(tiny_vqvae):
    f_BCHW = torch.zeros(0, tiny_vqvae.config.latent_channels, *tiny_vqvae.schedule.latent_hw)
    ids = tiny_vqvae.quantizer.encode(f_BCHW, tiny_vqvae.schedule)
    assert [tuple(tokens.shape) for tokens in ids] == [(0, n) for n in tiny_vqvae.schedule.lengths]
