"""The graph page's graph: tiny computations by hand, then the training step of each architecture."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from torch import Tensor, nn

from fastnst.config import LossConfig, load_config
from fastnst.errors import UserError
from fastnst.losses.perceptual import PerceptualLoss
from fastnst.models.transform_net import ARCHITECTURES, NORMS, TransformNet
from fastnst.models.vgg19 import VGG19
from fastnst.run_log.graph import GraphRecorder
from fastnst.run_log.writer import training_graph


class Block(nn.Module):
    """conv, then a threshold that is a buffer."""

    threshold: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(self.conv(x), self.threshold)


class Net(nn.Module):
    """One block, once."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * 2.0


LIKE = torch.empty(())


def placeholder(recorder: GraphRecorder, *shape: int, name: str = "x") -> Tensor:
    return recorder.placeholder(name, shape or (1, 3, 8, 8), like=LIKE)


def nodes(graph: GraphDef) -> dict[str, NodeDef]:
    return {node.name: node for node in graph.node}


def edges(recorder: GraphRecorder) -> dict[str, list[str]]:
    return {node.name: list(node.input) for node in recorder.graph_def().node}


def shapes(node: NodeDef) -> list[list[int]]:
    return [[dim.size for dim in shape.dim] for shape in node.attr["_output_shapes"].list.shape]


# By hand.


def test_graph_recorder_modules_are_scopes_and_tensors_edges() -> None:
    net = Net()
    with GraphRecorder(net) as recorder:
        x = placeholder(recorder, 2, 3, 8, 8, name="image")
        with recorder.scope("net"):
            net(x)
    assert edges(recorder) == {
        "image": [],
        "net/block/conv/weight": [],
        "net/block/conv/bias": [],
        "net/block/conv/convolution": ["image", "net/block/conv/weight", "net/block/conv/bias"],
        "net/block/threshold": [],
        "net/block/maximum": ["net/block/conv/convolution", "net/block/threshold"],
        "net/mul": ["net/block/maximum"],
    }
    graph = nodes(recorder.graph_def())
    assert {name: node.op for name, node in graph.items()} == {
        "image": "Placeholder",
        "net/block/conv/weight": "Parameter",
        "net/block/conv/bias": "Parameter",
        "net/block/conv/convolution": "convolution",
        "net/block/threshold": "Buffer",
        "net/block/maximum": "maximum",
        "net/mul": "mul",
    }
    assert shapes(graph["net/block/conv/convolution"]) == [[2, 4, 6, 6]]
    assert shapes(graph["net/block/threshold"]) == [[]]
    assert graph["net/mul"].attr["dtype"].type == 1  # TensorFlow's DT_FLOAT
    assert graph["net/mul"].attr["other"].f == 2.0
    assert list(graph["net/block/conv/convolution"].attr["stride"].list.i) == [1, 1]


def test_graph_recorder_draws_a_module_in_each_block_that_uses_it() -> None:
    net = Net()
    with GraphRecorder(net) as recorder:
        x = placeholder(recorder)
        y = placeholder(recorder, name="y")
        for name, image in (("first", x), ("second", y)):
            with recorder.scope(name):
                net(image)
    for block in ("first", "second"):
        inputs = [name for node, names in edges(recorder).items() if node.startswith(f"{block}/") for name in names]
        assert f"{block}/block/conv/weight" in inputs
        assert {name.split("/")[0] for name in inputs} == {block, {"first": "x", "second": "y"}[block]}


def test_graph_recorder_draws_equal_computations_once() -> None:
    net = Net()
    with GraphRecorder(net) as recorder:
        x = placeholder(recorder)
        with recorder.scope("first"):
            net(x)
        with recorder.scope("second"):
            (net(x) + 1.0).relu_()
    assert edges(recorder)["second/add"] == ["first/mul"]
    assert [name for name in edges(recorder) if name.startswith("second/")] == ["second/add", "second/relu"]


def test_graph_recorder_distinguishes_views_without_drawing_them() -> None:
    with GraphRecorder() as recorder:
        x = placeholder(recorder)
        x[:, :, 1:] * 2.0
        x[:, :, :-1] * 2.0
        x[:, :, 1:] * 2.0
        first, second = x.split([1, 2], dim=1)
        first.sum(), second.sum(), x.transpose(2, 3).detach().sum()
    assert edges(recorder) == {"x": [], "mul": ["x"], "mul_1": ["x"], "sum": ["x"], "sum_1": ["x"], "sum_2": ["x"]}


def test_graph_recorder_follows_in_place_writes() -> None:
    with GraphRecorder() as recorder:
        x = placeholder(recorder)
        y = x * 2.0
        same = y[:]
        y.add_(1.0)
        same.exp()
        canvas = x.new_zeros(1, 3, 9, 9)
        canvas[:, :, 1:, 1:] = x
        canvas[:, :, 0].fill_(5.0)
        canvas.sum()
    assert edges(recorder) == {
        "x": [],
        "mul": ["x"],
        "add": ["mul"],
        "exp": ["add"],
        "new_zeros": ["x"],
        "copy": ["new_zeros", "x"],
        "fill": ["copy"],
        "sum": ["fill"],
    }


def test_graph_recorder_several_outputs_and_inputs() -> None:
    with GraphRecorder() as recorder:
        x = placeholder(recorder)
        values, places = x.max(dim=1)
        torch.cat([values, places.float(), values])
    assert edges(recorder)["to_copy"] == ["max:1"]
    assert edges(recorder)["cat"] == ["max", "to_copy"]
    largest = nodes(recorder.graph_def())["max"]
    assert shapes(largest) == [[1, 8, 8], [1, 8, 8]]


def test_graph_recorder_puts_constants_where_they_are_used() -> None:
    outside = torch.ones(3, 1, 1)
    with GraphRecorder() as recorder:
        x = placeholder(recorder)
        with recorder.scope("here"):
            x + outside + torch.zeros(1)
    graph = nodes(recorder.graph_def())
    assert {name for name, node in graph.items() if node.op == "Const"} == {"here/constant", "here/zeros"}
    assert list(graph["here/add_1"].input) == ["here/add", "here/zeros"]


def test_graph_recorder_parameter_outside_its_module_opens_its_scope() -> None:
    net = Net()
    with GraphRecorder(net) as recorder:
        x = placeholder(recorder, 1, 4, 8, 8)
        with recorder.scope("backwards"):
            turned = net.block.conv.weight.flip(2, 3).transpose(0, 1)
            F.conv2d(x.relu(), turned).exp()
    assert edges(recorder) == {
        "x": [],
        "backwards/relu": ["x"],
        "backwards/block/conv/weight": [],
        "backwards/block/conv/flip": ["backwards/block/conv/weight"],
        "backwards/block/conv/convolution": ["backwards/relu", "backwards/block/conv/flip"],
        "backwards/block/conv/exp": ["backwards/block/conv/convolution"],
    }


def test_graph_recorder_nested_roots() -> None:
    net = Net()
    with GraphRecorder(net.block, net) as recorder, recorder.scope("inner"):
        net.block(placeholder(recorder))
    assert "inner/conv/convolution" in edges(recorder)


def test_graph_recorder_computes_nothing() -> None:
    net = nn.Conv2d(3, 1000, 3)
    with GraphRecorder(net) as recorder:
        assert net(placeholder(recorder, 1000, 3, 100_000, 100_000)).numel() > 10**15


def test_graph_recorder_cleans_up_after_an_error() -> None:
    net = Net()
    with GraphRecorder(net) as recorder:
        x = placeholder(recorder, 1, 5, 8, 8)
        with pytest.raises(RuntimeError), recorder.scope("broken"):
            net(x)
        with recorder.scope("after"):
            x.exp()
    assert edges(recorder)["after/exp"] == ["x"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)


# The training step.

BLOCKS = {"X_content", "transform_net", "vgg_transformed", "vgg_content", "visualization", "loss"}


def perceptual_loss(last_layer: str = "relu5_1", flavour: str = "torchvision", **keys: object) -> PerceptualLoss:
    config = load_config(environment={}).loss.model_copy(update=keys)
    loss = PerceptualLoss(VGG19(last_layer, flavour), LossConfig.model_validate(config.model_dump()))
    loss.set_style(torch.rand(1, 3, 32, 32))
    return loss


@pytest.fixture(scope="module")
def loss() -> PerceptualLoss:
    return perceptual_loss()


def block_edges(graph: GraphDef) -> set[tuple[str, str]]:
    pairs = {(name.split(":")[0].split("/")[0], node.name.split("/")[0]) for node in graph.node for name in node.input}
    return {(source, target) for source, target in pairs if source != target}


@pytest.mark.parametrize(("architecture", "norm"), [*zip(ARCHITECTURES, itertools.cycle(NORMS), strict=False)])
def test_training_graph_has_blocks_and_layers(loss: PerceptualLoss, architecture: str, norm: str) -> None:
    net = TransformNet(architecture, norm)
    graph = training_graph(net, loss, image_size=64)
    names = [node.name for node in graph.node]
    assert {name.split("/")[0] for name in names} == BLOCKS
    assert names.index("X_content") == 0
    assert {name.split("/")[1] for name in names if name.startswith("loss/")} >= {"content", "style", "tv", "total"}
    assert 200 < len(names) < 1000
    assert len(set(names)) == len(names)

    # Edges come from what was drawn before: there is no cycle, and nothing hangs in the air.
    place = {name: index for index, name in enumerate(names)}
    for node in graph.node:
        assert all(place[name.split(":")[0]] < place[node.name] for name in node.input)
    assert block_edges(graph) == {
        *(("X_content", "transform_net"), ("X_content", "vgg_content"), ("vgg_content", "loss")),
        *(("transform_net", target) for target in ("vgg_transformed", "loss", "visualization")),
        *(("vgg_transformed", target) for target in ("loss", "visualization")),
    }

    layers = {name.rpartition("/")[0] for name in names}
    for name, parameter in net.named_parameters():
        block = name.rpartition(".")[0].replace(".", "/")
        node = graph.node[place[f"transform_net/{name.replace('.', '/')}"]]
        assert shapes(node) == [list(parameter.shape)]
        assert f"visualization/transform_net/{block}" in layers
    for layer in loss.vgg.layers:
        assert f"vgg_transformed/{layer}" in layers
        if layer.startswith("conv"):
            assert f"visualization/vgg_transformed/{layer}" in layers
    assert "vgg_content/relu4_2" in layers
    assert "vgg_content/conv4_3" not in layers
    assert {f"loss/style/relu{block}_1" for block in range(1, 6)} <= layers


def test_training_graph_changes_nothing(loss: PerceptualLoss) -> None:
    net = TransformNet("johnson", "batch").train()
    before = {name: tensor.clone() for name, tensor in [*net.state_dict().items(), *loss.state_dict().items()]}
    state = torch.get_rng_state()
    first = training_graph(net, loss, image_size=64).SerializeToString(deterministic=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert training_graph(net, loss, image_size=64).SerializeToString(deterministic=True) == first
    for name, tensor in [*net.state_dict().items(), *loss.state_dict().items()]:
        assert type(tensor) is Tensor
        assert torch.equal(tensor, before[name])
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*net.modules(), *loss.modules()])


def test_training_graph_has_the_runs_sizes(loss: PerceptualLoss) -> None:
    graph = nodes(training_graph(TransformNet(), loss, image_size=256, batch_size=20))
    assert shapes(graph["X_content"]) == [[20, 3, 256, 256]]
    assert shapes(graph["vgg_content/conv4_2/convolution"]) == [[20, 512, 32, 32]]
    assert shapes(graph["transform_net/out/convolution"]) == [[20, 3, 256, 256]]


def test_training_graph_in_fp64_with_caffe_weights_and_no_content() -> None:
    loss = perceptual_loss("relu2_2", "caffe", content_layers=(), style_layers=("relu2_2",), style_layer_weights=())
    graph = nodes(training_graph(TransformNet().double(), loss.double(), image_size=33, batch_size=1))
    assert graph["X_content"].attr["dtype"].type == 2  # TensorFlow's DT_DOUBLE
    assert {name.split("/")[0] for name in graph} == BLOCKS - {"vgg_content"}
    assert "vgg_transformed/flip" in graph


def test_training_graph_refuses_too_small_images(loss: PerceptualLoss) -> None:
    with pytest.raises(UserError, match="sides of 16 pixels or more"):
        training_graph(TransformNet(), loss, image_size=8)
