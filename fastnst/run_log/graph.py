"""The graph of a computation for TensorBoard: blocks, layers, operators and the tensors between them.

A dispatch mode records the operators while the computation runs on fake tensors, which have a shape but no values, so
nothing is computed and no memory is used. As in the paper's Figures 4 and 5, each operator is a node within the scopes
in which it ran, each edge a tensor.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.node_def_pb2 import NodeDef

_DTYPES = {
    torch.float32: 1,
    torch.float64: 2,
    torch.int32: 3,
    torch.uint8: 4,
    torch.int16: 5,
    torch.int8: 6,
    torch.int64: 9,
    torch.bool: 10,
    torch.bfloat16: 14,
    torch.float16: 19,
}
"""TensorFlow's numbers for tensor types, `tensorflow/core/framework/types.proto`."""


@dataclass
class _Node:
    name: str
    op: str
    number: int
    inputs: list[str]
    outputs: list[Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    since: int = -1
    """Outside modules: number of the operator that opened `path` by using a parameter; -1 if none did."""


@dataclass(frozen=True)
class _Frame:
    """An open scope: an explicit one, or the call of module `name` (slashes for dots) of the tree `root`."""

    path: str
    root: int | None = None
    name: str = ""


@dataclass(frozen=True)
class _Owned:
    """A parameter or buffer and its module."""

    root: int
    module: str
    leaf: str
    op: str
    tensor: Tensor = field(repr=False)


class GraphRecorder:
    """Records the operators inside its `with` block, without computing them.

    Each call of a module opens a scope with its name (`res1/conv1`) below the current one; parameters and buffers are
    nodes beside its operators. A module used in two blocks is drawn in both, with its parameters: edges of shared
    weights would tie together blocks between which no image flows. Outside modules, an operator that uses a parameter
    opens a scope with the name of that module. A repeated computation is drawn once, and views (slices, transpositions)
    never: an edge shows the size of their base.

    Limits: no gradients, autocast, compiled code or random numbers, and no step may depend on the values of tensors.

    Args:
        roots: networks whose modules open scopes. Pass a network inside another before that one; its names then begin
            at itself.
    """

    def __init__(self, *roots: nn.Module) -> None:
        self._modules: dict[nn.Module, tuple[int, str]] = {}
        self._owned: dict[int, _Owned] = {}
        for root, tree in enumerate(roots):
            for name, module in tree.named_modules():
                if module not in self._modules:
                    self._modules[module] = (root, name.replace(".", "/"))
        for module, (root, name) in self._modules.items():
            for op, tensors in (("Parameter", module.named_parameters), ("Buffer", module.named_buffers)):
                for leaf, tensor in tensors(recurse=False):
                    self._owned.setdefault(id(tensor), _Owned(root, name, leaf, op, tensor))
        self._frames = [_Frame("")]
        self._nodes: dict[str, _Node] = {}
        self._known: dict[str, _Node] = {}
        self._sources: dict[int, str | _Owned] = {}
        self._views: dict[int, str] = {}
        self._writers: dict[int, str] = {}
        self._alive: list[Tensor] = []
        self._paused = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_pre_hook(self._begin).remove)
                stack.callback(module.register_forward_hook(self._end).remove)
            stack.enter_context(torch.no_grad())
            # Parameters stay real tensors; the operators get fakes in their place.
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_DispatchMode(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Draw operators inside below `name`, which may hold slashes."""
        depth = len(self._frames)
        self._frames.append(_Frame(_join(self._frames[-1].path, name)))
        try:
            yield
        finally:
            # After an error, modules have not closed their scopes.
            del self._frames[depth:]

    def placeholder(self, name: str, shape: Sequence[int], *, like: Tensor) -> Tensor:
        """Add an input node: a tensor of that shape and of `like`'s type, channels_last."""
        self._paused = True
        tensor = torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
        self._paused = False
        self._remember(tensor, self._add(_join(self._frames[-1].path, name), "Placeholder", [], [tensor]).name)
        return tensor

    def graph_def(self) -> "GraphDef":
        """Convert to TensorFlow's format; equal computations give equal graphs."""
        from tensorboard.compat.proto.graph_pb2 import GraphDef
        from tensorboard.compat.proto.versions_pb2 import VersionDef

        graph = GraphDef(versions=VersionDef(producer=22))
        for node in self._nodes.values():
            _describe(graph.node.add(name=node.name, op=node.op, input=node.inputs), node)
        return graph

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record one operator that has run."""
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if self._paused or not given:
            return
        namespace, _, name = func._schema.name.partition("::")
        name = name.strip("_")  # relu_ is drawn like relu
        if (namespace, name) == ("fastnst", "norm"):  # one op for both norms
            name = "instance_norm" if _argument(func, args, "per_sample") else "batch_norm"
        sources = [self._source(tensor) for tensor in taken]
        views = [self._views.get(id(tensor), "") for tensor in taken]
        key = repr((namespace, name, sources, views, tree_map(_without_tensors, (args, kwargs))))
        if func.is_view and len(taken) == 1:
            for index, tensor in enumerate(given):
                self._remember(tensor, sources[0])
                self._views[id(tensor)] = f"{key}:{index}"
            return
        node = self._known.get(key)
        if node is None:
            node = self._add_operator(namespace, name, sources, given)
            node.arguments = _plain_arguments(func, args, kwargs)
            if sources:
                self._known[key] = node
        for index, tensor in enumerate(given):
            self._remember(tensor, f"{node.name}:{index}" if index else node.name)
        for tensor in _written(func, args, kwargs):
            if id(tensor) not in self._owned:
                self._remember(tensor, node.name)
                self._writers[_memory(tensor)] = node.name

    def _begin(self, module: nn.Module, _: Any) -> None:
        root, name = self._modules[module]
        self._frames.append(_Frame(_join(self._base(root), name), root, name))

    def _end(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        ended = self._frames.pop()
        assert (ended.root, ended.name) == self._modules[module]

    def _base(self, root: int) -> str:
        """Return the path where a tree's names begin: the innermost scope without the module's own name."""
        top = self._frames[-1]
        if top.root != root or not top.name:
            return top.path
        return top.path[: -len(top.name)].rstrip("/")

    def _source(self, tensor: Tensor) -> str | _Owned:
        """Find the node output, parameter or buffer that a tensor is; an unknown tensor becomes a constant."""
        owned = self._owned.get(id(tensor))
        if owned is not None:
            return owned
        source = self._sources.get(id(tensor))
        if source is None:
            node = self._add(_join(self._frames[-1].path, "constant"), "Const", [], [tensor])
            self._remember(tensor, node.name)
            return node.name
        # Another view may have written into the same memory since.
        writer = self._writers.get(_memory(tensor))
        if writer is not None and (isinstance(source, _Owned) or self._number(writer) > self._number(source)):
            return writer
        return source

    def _add_operator(self, namespace: str, name: str, sources: Sequence[str | _Owned], outputs: list[Tensor]) -> _Node:
        path, since = self._path(sources)
        inputs = [self._node_of(source) if isinstance(source, _Owned) else source for source in sources]
        # TensorBoard draws a Const as a dot beside its consumer.
        op = "Const" if not inputs else name if namespace == "aten" else f"{namespace}::{name}"
        node = self._add(_join(path, name), op, list(dict.fromkeys(inputs)), outputs)
        node.path, node.since = path, since
        return node

    def _path(self, sources: Sequence[str | _Owned]) -> tuple[str, int]:
        """Return the scope of an operator with these inputs, and the number of the operator that opened it."""
        top = self._frames[-1]
        if top.root is not None:
            return top.path, -1
        for source in sources:
            if isinstance(source, _Owned):
                return _join(top.path, source.module), len(self._nodes)
        before = [self._nodes[source.partition(":")[0]] for source in sources if isinstance(source, str)]
        before = [node for node in before if node.since >= 0 and node.path.startswith(top.path)]
        latest = max(before, key=lambda node: node.since, default=None)
        return (top.path, -1) if latest is None else (latest.path, latest.since)

    def _node_of(self, owned: _Owned) -> str:
        """Return the node of a parameter or buffer in the current block."""
        name = _join(self._base(owned.root), owned.module, owned.leaf)
        if name not in self._nodes:
            self._add(name, owned.op, [], [owned.tensor])
        return name

    def _number(self, source: str) -> int:
        return self._nodes[source.partition(":")[0]].number

    def _add(self, name: str, op: str, inputs: list[str], outputs: list[Tensor]) -> _Node:
        unique, count = name, 0
        while unique in self._nodes:
            count += 1
            unique = f"{name}_{count}"
        node = self._nodes[unique] = _Node(unique, op, len(self._nodes), inputs, outputs)
        return node

    def _remember(self, tensor: Tensor, source: str | _Owned) -> None:
        self._sources[id(tensor)] = source
        # Keep it alive, or another tensor may get its id.
        self._alive.append(tensor)


class _DispatchMode(TorchDispatchMode):
    def __init__(self, recorder: GraphRecorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._recorder.record(func, args, kwargs or {}, result)
        return result


def _argument(func: Any, args: tuple[Any, ...], name: str) -> Any:
    return args[[argument.name for argument in func._schema.arguments].index(name)]


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _memory(tensor: Tensor) -> int:
    """Identify the memory that a tensor shares with its views."""
    return int(tensor.untyped_storage()._cdata)


def _without_tensors(leaf: Any) -> Any:
    return "tensor" if isinstance(leaf, Tensor) else leaf


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that the operator overwrites."""
    names = {argument.name for argument in func._schema.arguments if argument.is_write}
    given = zip((argument.name for argument in func._schema.arguments), args, strict=False)
    values = [value for name, value in [*given, *kwargs.items()] if name in names]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _plain_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an operator's arguments that are numbers, bools or strings, by name."""
    names = [argument.name for argument in func._schema.arguments]
    named = dict(zip(names, args, strict=False)) | kwargs
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, bool | int | float | str)
        or (isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value))
    }


def _describe(written: "NodeDef", node: _Node) -> None:
    """Write shapes, type and arguments where TensorBoard looks for them."""
    shapes = written.attr["_output_shapes"].list
    for tensor in node.outputs:
        shape = shapes.shape.add()
        for size in tensor.shape:
            shape.dim.add(size=size)
    number = _DTYPES.get(node.outputs[0].dtype)
    if number is not None:
        written.attr["dtype"].type = number
    for name, value in node.arguments.items():
        attribute = written.attr[name]
        match value:
            case bool():
                attribute.b = value
            case int():
                attribute.i = value
            case float():
                attribute.f = value
            case str():
                attribute.s = value.encode()
            case _:
                attribute.list.i.extend(value)
