"""Neurons: how they are selected, and which are refused."""

import pytest
import torch

from fastnst.errors import UserError
from fastnst.visualize.deconv.neurons import Neurons, check_maps


def test_neurons_every_position() -> None:
    neurons = Neurons.every_position([0, 0, 1], [4, 5, 6])
    assert (neurons.images.tolist(), neurons.maps.tolist(), neurons.positions) == ([0, 0, 1], [4, 5, 6], None)
    assert neurons.maps.dtype == neurons.images.dtype == torch.int64
    assert len(neurons) == 3


def test_neurons_at_keeps_positions() -> None:
    neurons = Neurons.at([1, 0], torch.tensor([2, 3], dtype=torch.int32), [(4, 5), (6, 7)])
    assert neurons.maps.tolist() == [2, 3]
    assert neurons.positions is not None
    assert neurons.positions.tolist() == [[4, 5], [6, 7]]
    assert neurons.positions.dtype == torch.int64


def test_neurons_strongest_finds_the_first_of_each_maps_maxima() -> None:
    activations = torch.zeros(2, 3, 4, 5)
    activations[0, 1, 3, 2] = 7
    activations[1, 1, 0, 4] = activations[1, 1, 2, 0] = 8
    activations[1, 2] = -1
    activations[1, 2, 2, 1] = -0.5
    activations = activations.contiguous(memory_format=torch.channels_last)
    neurons = Neurons.strongest(activations, [0, 1, 1, 0], [1, 1, 2, 0])
    assert neurons.positions is not None
    assert neurons.positions.tolist() == [[3, 2], [0, 4], [2, 1], [0, 0]]


def test_neurons_strongest_without_positions() -> None:
    neurons = Neurons.strongest(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), [0, 1], [1, 0])
    assert neurons.positions is not None
    assert neurons.positions.tolist() == [[0, 0], [0, 0]]


def test_neurons_empty() -> None:
    for neurons in (Neurons.at([], [], []), Neurons.strongest(torch.rand(1, 2, 3, 4), [], [])):
        assert len(neurons) == 0
        assert neurons.positions is not None
        assert tuple(neurons.positions.shape) == (0, 2)


def test_neurons_slice() -> None:
    neurons = Neurons.at([0, 1, 2], [3, 4, 5], [(0, 1), (2, 3), (4, 5)])[1:3]
    assert (neurons.images.tolist(), neurons.maps.tolist()) == ([1, 2], [4, 5])
    assert neurons.positions is not None
    assert neurons.positions.tolist() == [[2, 3], [4, 5]]
    assert Neurons.every_position([0, 1], [2, 3])[:1].positions is None


def test_neurons_refuses_unequal_lengths() -> None:
    with pytest.raises(UserError, match=r"images \[2\] and maps \[1\] do not pair up"):
        Neurons.every_position([0, 1], [2])
    for positions, shape in (([(0, 0)], "1, 2"), ([(0, 0, 0)] * 2, "2, 3")):
        with pytest.raises(UserError, match=rf"positions are \[{shape}\], expected \[2, 2\]"):
            Neurons.at([0, 1], [2, 3], positions)


@pytest.mark.parametrize("number", [-1, 256])
def test_check_maps_names_the_range(number: int) -> None:
    check_maps("relu3_4", [0, 255], 256)
    with pytest.raises(UserError, match=rf"^relu3_4 has no map {number}; its maps are 0 … 255$"):
        check_maps("relu3_4", [3, number], 256)
