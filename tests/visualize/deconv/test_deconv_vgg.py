"""The deconvnet of VGG19: by hand, against autograd, adjointness of every layer, windows against whole maps, captum."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from captum.attr import Deconvolution
from torch import Tensor, nn

from fastnst.models.vgg19 import LAYERS, VGG19
from fastnst.visualize.deconv import windows
from fastnst.visualize.deconv.neurons import Neurons
from fastnst.visualize.deconv.receptive_field import receptive_field
from fastnst.visualize.deconv.vgg import Deconvnet, Recording

CONVOLUTIONAL = LAYERS[: LAYERS.index("pool5") + 1]
NARROW = (6, 8, 8, 10, 10)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=_generator(seed), dtype=torch.float64)


def _net(last: str, channels: Sequence[int] = NARROW, flavour: str = "torchvision") -> VGG19:
    """A VGG19 in fp64 that has every layer, but few channels in each: `channels` per block, 12 from fc6 on."""
    with torch.device("meta"):
        net = VGG19(last, flavour)
    preprocessing = VGG19("conv1_1", flavour, generator=_generator())
    net.mean, net.gain = preprocessing.mean, preprocessing.gain
    inputs = 3
    for name in net.layers:
        if name.startswith("conv"):
            outputs = channels[int(name[4]) - 1]
            setattr(net, name, nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, padding=1))
            inputs = outputs
        elif name.startswith("fc"):
            inputs = 49 * inputs if name == "fc6" else inputs
            setattr(net, name, nn.utils.skip_init(type(net.get_submodule(name)), inputs, 12))
            inputs = 12
    generator = _generator(2)
    for parameter in net.requires_grad_(False).parameters():
        fan_in = parameter[0].numel()
        parameter.normal_(0, (2 / fan_in) ** 0.5 if parameter.ndim > 1 else 0.1, generator=generator)
    return net.double()


@pytest.fixture(scope="module")
def narrow() -> VGG19:
    return _net("fc8")


def _plain(last: str) -> VGG19:
    """One channel in every layer, RGB as it is, no biases; every filter passes on its first input channel."""
    net = _net(last, [1] * 5)
    net.mean.zero_()
    net.gain.fill_(1)
    for parameter in net.parameters():
        parameter.zero_()
        if parameter.ndim == 4:
            parameter[0, 0, 1, 1] = 1
    return net


def _red(rows: Sequence[Sequence[float]]) -> Tensor:
    image = torch.zeros(1, 3, len(rows), len(rows[0]), dtype=torch.float64)
    image[0, 0] = torch.tensor(rows)
    return image


def _with(recording: Recording, layer: str, activations: Tensor) -> Recording:
    return replace(recording, activations={layer: activations})


# By hand.


def test_deconvnet_one_convolution_by_hand() -> None:
    net = _plain("conv1_1")
    net.conv1_1.weight[0, 0] = torch.arange(1.0, 10.0).reshape(3, 3)
    net.conv1_1.weight[0, 1, 1, 1] = 10
    net.conv1_1.bias.fill_(100)
    deconvnet = Deconvnet(net)
    image = _red([[0, 0, 0], [0, 2, 0], [0, 0, 0]])
    projection = deconvnet(image, "conv1_1", [0], activation=(0, 0))[0, 0]
    # The corner sees the 2 through the filter's last entry: 9·2 + 100. That value comes back, the bias does not.
    expected = torch.zeros_like(projection)
    expected[0, :2, :2] = 118 * torch.tensor([[5.0, 6.0], [8.0, 9.0]])
    expected[1, 0, 0] = 118 * 10
    assert torch.equal(projection, expected)
    net.conv1_1.bias.zero_()
    # All nine activations 2·(9, 8, … 1) meet the filter's entries 9, 8, … 1 again in the middle.
    everything = deconvnet(image, "conv1_1", [0], activation="all")[0, 0]
    assert everything[0, 1, 1] == 2 * sum(i * i for i in range(1, 10))


def test_deconvnet_convolution_pooling_convolution_by_hand() -> None:
    net = _plain("relu2_1")
    net.conv1_2.weight.mul_(2)
    net.conv2_1.weight[0, 0] = torch.tensor([[0, 0, 0], [0, 1, -3], [0, 0.5, 0]])
    net.conv2_1.bias.fill_(1)
    deconvnet = Deconvnet(net)
    image = _red([[1, 2, 0, 0], [3, 9, 4, 0], [0, 5, 0, 7], [6, 0, 8, 0]])
    recording = deconvnet.record(image, ["pool1", "conv2_1", "relu2_1"])
    assert recording.activations["pool1"][0, 0].tolist() == [[18, 8], [12, 16]]
    assert recording.activations["conv2_1"][0, 0, 0, 0] == 18 - 3 * 8 + 0.5 * 12 + 1
    # Its 1 becomes (1, -3; 0.5, 0) at the pool, lands where 9, 4 and 6 had been, loses the -3, and is doubled.
    corner = Neurons.at([0], [0], [(0, 0)])
    for layer in ("conv2_1", "relu2_1"):
        projection = deconvnet.project(recording, layer, corner)
        assert torch.equal(projection, _red([[0] * 4, [0, 2, 0, 0], [0] * 4, [1, 0, 0, 0]]))
    linear = deconvnet.project(recording, "conv2_1", corner, rectify=False)
    assert torch.equal(linear, _red([[0] * 4, [0, 2, -6, 0], [0] * 4, [1, 0, 0, 0]]))
    # A negative activation comes back from the convolution, where its sign turns, and not from the ReLU behind it.
    net.conv2_1.bias.fill_(-2)
    recording = deconvnet.record(image, ["conv2_1", "relu2_1"])
    projection = deconvnet.project(recording, "conv2_1", corner)
    assert torch.equal(projection, _red([[0] * 4, [0, 0, 12, 0], [0] * 4, [0] * 4]))
    assert not deconvnet.project(recording, "relu2_1", corner).any()


@pytest.mark.parametrize("activation", ["all", (1, 1)])
def test_deconvnet_switches_to_the_first_of_equal_maxima(activation: str | tuple[int, int]) -> None:
    image = _red([[1.0] * 4] * 4)
    projection = Deconvnet(_plain("pool1"))(image, "pool1", [0], activation=activation)
    lit = [[0, 0], [0, 2], [2, 0], [2, 2]] if activation == "all" else [[2, 2]]
    assert projection[0, 0, 0].nonzero().tolist() == lit


def test_deconvnet_is_zero_outside_the_pooling_of_odd_sizes() -> None:
    image = _red([[float(5 * row + column) for column in range(5)] for row in range(7)])
    projection = Deconvnet(_plain("pool1"))(image, "pool1", [0], activation="all")[0, 0, 0]
    assert projection.nonzero().tolist() == [[row, column] for row in (1, 3, 5) for column in (1, 3)]
    assert torch.equal(projection, torch.where(projection != 0, image[0, 0], 0))
    assert Deconvnet(_plain("pool1"))(image, "pool1", [0])[0, 0, 0].nonzero().tolist() == [[5, 3]]


def test_deconvnet_undoes_preprocessing_without_its_mean() -> None:
    net = _net("conv1_1", [1] * 5, "caffe")
    net.conv1_1.weight.zero_()
    net.conv1_1.weight[0, 0, 1, 1] = 2
    image = _images(1, 3, 4, 4)
    projection = Deconvnet(net)(image, "conv1_1", [0], activation=(1, 2))[0, 0]
    # BGR in 0-255: the net's first channel is blue.
    activation = 2 * 255 * (image[0, 2, 1, 2] - 103.939 / 255) + net.conv1_1.bias
    assert projection.nonzero().tolist() == [[2, 1, 2]]
    torch.testing.assert_close(projection[2, 1, 2], (activation * 2 * 255)[0], rtol=1e-6, atol=0)


# Linearity: the exact adjoint.


def _linear(net: VGG19, images: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The net's linear part on `v`, pooling where the maxima of `images` are; by PyTorch alone."""
    x, v = net.preprocess(images), net.preprocess(v + net.mean)
    outputs = {}
    for name in net.layers:
        layer = net.get_submodule(name)
        if name.startswith("conv"):
            x, v = layer(x), F.conv2d(v, layer.weight, padding=1)  # type: ignore[arg-type]
        elif name.startswith("pool"):
            x, index = F.max_pool2d(x, 2, return_indices=True)
            v = v.flatten(2).gather(2, index.flatten(2)).view(index.shape)
        elif name.startswith("fc"):
            v = F.adaptive_avg_pool2d(v, 7).flatten(1) if name == "fc6" else v
            x, v = layer(x), F.linear(v, layer.weight)  # type: ignore[arg-type]
        else:
            x = F.relu(x)
        outputs[name] = v
    return outputs


@pytest.mark.parametrize(
    ("make_net", "shape", "first"),
    [
        pytest.param(lambda: _net("fc8"), (2, 3, 37, 70), "conv1_1", id="narrow, odd"),
        pytest.param(lambda: _net("fc8", [4] * 5, "caffe"), (1, 3, 256, 300), "pool5", id="averaging of 8x9"),
        pytest.param(lambda: _net("pool2", [64, 128], "caffe"), (1, 3, 17, 22), "conv1_1", id="wide"),
    ],
)
def test_project_layer_is_the_exact_adjoint(make_net: Callable[[], VGG19], shape: tuple[int, ...], first: str) -> None:
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩ for each layer from `first` on, x being any image and y any activations."""
    net = make_net()
    deconvnet = Deconvnet(net)
    images, x = _images(*shape), _images(*shape, seed=3) - 0.5
    recording = deconvnet.record(images, net.layers)
    mapped = _linear(net, images, x)
    for layer in net.layers[net.layers.index(first) :]:
        outputs = mapped[layer]
        y = torch.randn(outputs.shape, generator=_generator(4), dtype=torch.float64)
        adjoint = deconvnet.project_layer(_with(recording, layer, y), layer, rectify=False)
        left, right = (outputs * y).sum(), (x * adjoint).sum()
        assert abs(left - right) <= 1e-10 * outputs.norm() * y.norm(), layer
        assert abs(left) >= 1e-6 * outputs.norm() * y.norm(), layer


# Windows against whole maps.


def _by_whole_maps(deconvnet: Deconvnet, recording: Recording, layer: str, neurons: Neurons) -> Tensor:
    """Project with all but the neuron's activation zero, all channels, all of the map: the definition."""
    projections = []
    activations = recording.activations[layer]
    for index in range(len(neurons)):
        place = [int(neurons.images[index]), int(neurons.maps[index])]
        if neurons.positions is not None and activations.ndim == 4:
            place += neurons.positions[index].tolist()
        alone = torch.zeros_like(activations)
        alone[tuple(place)] = activations[tuple(place)]
        projections.append(deconvnet.project_layer(_with(recording, layer, alone), layer)[place[0]])
    return torch.stack(projections)


@hypothesis.given(
    layer=st.sampled_from(CONVOLUTIONAL),
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    batch_size=st.sampled_from([1, 2, 16]),
    places=st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3),
)
@hypothesis.settings(max_examples=40)
def test_project_in_windows_agrees_with_whole_maps(
    narrow: VGG19, layer: str, height: int, width: int, batch_size: int, places: list[tuple[int, float, float]]
) -> None:
    smallest = receptive_field(layer).jump
    images = _images(2, 3, max(height, smallest), max(width, smallest))
    deconvnet = Deconvnet(narrow)
    recording = deconvnet.record(images, [layer])
    activations = recording.activations[layer]
    rows, columns = activations.shape[2:]
    # The strategy prefers 0 and 1: borders and corners.
    positions = [(round(y * (rows - 1)), round(x * (columns - 1))) for _, y, x in places]
    chosen = [image for image, _, _ in places]
    maps = [int(activations[p, :, r, c].argmax()) for p, (r, c) in zip(chosen, positions, strict=True)]
    neurons = Neurons.at(chosen, maps, positions)
    expected = _by_whole_maps(deconvnet, recording, layer, neurons)
    scale = 1e-12 * float(expected.abs().max())
    projections = deconvnet.project(recording, layer, neurons, batch_size=batch_size)
    torch.testing.assert_close(projections, expected, rtol=0, atol=scale)
    cropped, corners = deconvnet.project_patches(recording, layer, neurons, batch_size=batch_size)
    side = receptive_field(layer).size
    torch.testing.assert_close(cropped, windows.cut(expected, corners, side), rtol=0, atol=scale)
    # Nothing is left out: put back, the patches are the projections.
    again = torch.zeros_like(expected)
    windows.put_back(cropped, corners, again)
    torch.testing.assert_close(again, expected, rtol=0, atol=scale)


@pytest.mark.parametrize("layer", ["relu1_1", "conv2_2", "pool3", "relu4_4", "pool5", "fc6", "relu7", "fc8"])
def test_project_one_map_agrees_with_all_others_zero(narrow: VGG19, layer: str) -> None:
    deconvnet = Deconvnet(narrow)
    recording = deconvnet.record(_images(2, 3, 47, 66), [layer])
    images, maps = [0, 1, 1], [5, 0, 3]
    everywhere = Neurons.every_position(images, maps)
    strongest = Neurons.strongest(recording.activations[layer], images, maps)
    for neurons in (everywhere, strongest):
        expected = _by_whole_maps(deconvnet, recording, layer, neurons)
        for batch_size in (1, 2, 16):
            actual = deconvnet.project(recording, layer, neurons, batch_size=batch_size)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
        assert expected.flatten(1).any(1).sum() >= 1


# A peer.


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations:UserWarning")
@pytest.mark.parametrize("layer", ["conv1_2", "relu1_2", "relu2_2"])
def test_project_agrees_with_captum(layer: str) -> None:
    """On relu2_2 the pool's switches, too: PyTorch's backward goes to the first maximum as well."""
    net = VGG19(layer, "caffe", generator=_generator()).double()
    preprocessing = nn.Identity()
    preprocessing.register_forward_pre_hook(lambda _, inputs: net.preprocess(inputs[0]))
    modules: list[nn.Module] = [preprocessing]
    for name in net.layers:
        kind = {"relu": nn.ReLU(), "pool": nn.MaxPool2d(2)}.get(name[:4])
        modules.append(kind or net.get_submodule(name))
    images = _images(2, 3, 12, 15)
    deconvnet = Deconvnet(net)
    recording = deconvnet.record(images, [layer])
    # Of maps that are all zero there is nothing to compare.
    maps = recording.activations[layer].amax((2, 3)).topk(3).indices.flatten()
    neurons = Neurons.strongest(recording.activations[layer], [0, 0, 0, 1, 1, 1], maps)
    actual = deconvnet.project(recording, layer, neurons)
    assert neurons.positions is not None
    peer = Deconvolution(nn.Sequential(*modules))
    for index, place in enumerate(zip(neurons.maps.tolist(), *neurons.positions.T.tolist(), strict=True)):
        image = neurons.images[index : index + 1]
        # captum starts from a gradient of 1 where the deconvnet starts from the activation.
        value = recording.activations[layer][(int(image), *place)]
        assert value > 0
        expected = value * peer.attribute(images[image].requires_grad_(), target=place)[0]
        torch.testing.assert_close(actual[index], expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
