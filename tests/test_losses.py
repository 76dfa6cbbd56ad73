"""Image losses of tokenizer training, against what they are by hand."""

import pytest
import torch
from torch import nn

from tokenizer.losses import (
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    feature_distance,
    hinge_d_loss,
    hinge_g_loss,
    pixel_loss,
)


def test_differences_of_half_precision_images_are_taken_in_float32():
    x, target = (torch.full((1, 3, 2, 2), value, dtype=torch.bfloat16) for value in (1.0, 2**-9))
    assert pixel_loss(x, target, l1=1.0, l2=0.0).item() == 1 - 2**-9  # bfloat16 rounds it to 1
    assert pixel_loss(x, target, l1=0.0, l2=2.0).item() == pytest.approx(2 * (1 - 2**-9) ** 2, abs=1e-6)


def test_features_are_compared_by_their_direction_at_each_place():
    """Squared distances of unit vectors: 2 where they are at right angles, 4 where opposite; layers count alike."""
    x, right = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    x[:, 0], right[:, 1] = 1.0, 1.0
    opposite = torch.randn(2, 7, 2, 2)
    assert feature_distance([x, opposite], [right, -opposite]).item() == pytest.approx((2 + 4) / 2)
    one, other = torch.randn(2, 2, 3, 4, 5)
    loud = other * (torch.rand(2, 1, 4, 5) + 0.1)
    torch.testing.assert_close(feature_distance([one], [loud]), feature_distance([one], [other]))
    dark = torch.zeros(1, 3, 2, 2, requires_grad=True)
    feature_distance([dark], [torch.ones(1, 3, 2, 2)]).backward()
    assert dark.grad.isfinite().all()


class Maps(nn.Sequential):
    """A network whose feature maps are those of all its layers."""

    def forward(self, image):
        maps = [image]
        for layer in self:
            maps.append(layer(maps[-1]))
        return maps[1:]


def test_a_perceptual_network_is_frozen_and_targets_learn_nothing():
    network = Maps(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).train()
    loss = PerceptualLoss(network)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    x, target = (torch.randn(1, 3, 8, 8, requires_grad=True) for _ in range(2))
    loss(x, target).backward()
    assert x.grad.abs().sum() > 0 and target.grad is None


@pytest.mark.parametrize("layers, field", [(1, 16), (2, 34), (3, 70)])
def test_a_patch_is_as_large_as_published(layers, field):
    convolutions = [m for m in PatchDiscriminator(8, layers).net if isinstance(m, nn.Conv2d)]
    seen = 1
    for convolution in reversed(convolutions):
        seen = (seen - 1) * convolution.stride[0] + convolution.kernel_size[0]
    assert seen == field


def test_channels_of_the_adversary_double_up_to_eight_times():
    convolutions = [m for m in PatchDiscriminator(16, 5).net if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [16, 32, 64, 128, 128, 128, 1]


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([-2.0, 1.0, 4.0])
    assert hinge_d_loss(real, fake).item() == pytest.approx((2 / 2 + (2 + 5) / 3) / 2)
    assert hinge_g_loss(fake).item() == pytest.approx(-1)


def test_the_adaptive_weight_is_a_ratio_of_gradients_within_bounds():
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))

    def found(reconstruction, adversary, **bounds):
        pull, push = (torch.tensor(slope) @ weight for slope in (reconstruction, adversary))
        return adaptive_weight(pull, push, weight, **bounds).item()

    assert found([3.0, 4.0], [0.0, 2.0]) == pytest.approx(5 / 2, rel=1e-4)
    assert found([0.3, 0.4], [0.0, 0.0]) == pytest.approx(0.5e4)  # no gradient counts as 1e-4
    assert found([3.0, 4.0], [0.0, 0.0]) == 1e4
    assert found([3.0, 4.0], [0.0, 2.0], high=2.0) == 2 and found([0.0, 0.1], [0.0, 2.0], low=1.0) == 1
