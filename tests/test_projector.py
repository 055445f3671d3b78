"""The projector: its shape, what it costs, and that the costs are counted right."""

import torch
from torch import nn

from manyview.model import backbone, objective
from manyview.model.projector import Projector, cost, describe


def test_shape_and_layers():
    projector = Projector(128, dim=64, hidden=256)
    assert [type(layer) for layer in projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert projector(torch.randn(5, 128)).shape == (5, 64)
    assert projector[0].out_features == projector[3].in_features == 256
    assert Projector(128, dim=64)[0].out_features == 64


def test_a_bias_would_not_move_any_objective():
    """Why there is none: adding a constant to every view changes no loss."""
    z = torch.randn(4, 32, 16, dtype=torch.float64)
    for name in objective.OBJECTIVES:
        loss = objective.create(name)
        torch.testing.assert_close(loss(z + torch.randn(16, dtype=torch.float64)), loss(z), rtol=1e-9, atol=1e-9)


def test_cost_is_counted_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    projector = Projector(8, dim=4, hidden=16)
    counted = cost(net, projector, image_size=10)
    assert counted.backbone_parameters == 3 * 8 * 9
    assert counted.projector_parameters == 8 * 16 + 2 * 16 + 16 * 4
    assert counted.backbone_flops == 2 * 100 * 3 * 8 * 9
    assert counted.projector_flops == 2 * (8 * 16 + 16 * 4)


def test_counting_leaves_the_modules_alone():
    net, projector = backbone.create("resnet10-narrow", image_size=32), Projector(128, 64)
    before = {key: value.clone() for key, value in [*net.state_dict().items(), *projector.state_dict().items()]}
    cost(net, projector, 32)
    for key, value in [*net.state_dict().items(), *projector.state_dict().items()]:
        assert value.device.type == "cpu" and torch.equal(value, before[key])


def test_a_small_projector_is_seen_to_be_small():
    net = backbone.create("resnet50", image_size=64)
    small, wide = (cost(net, Projector(2048, dim), 64).projector_parameters for dim in (256, 8192))
    assert wide > 100 * small
    text = describe(net, Projector(2048, 256), 64)
    assert text.startswith("projector 2048-256-256: 0.59 M parameters (2.5% of the model's)") and "FLOPs" in text
