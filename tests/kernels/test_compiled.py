"""Every kernel launch compiles for GPUs that are not there, into code without register spills.

An op runs on CPU tensors with recorders in place of its kernels. Each launch is then compiled ahead of time as Triton's
launcher would: specialised on its arguments' types, on which are divisible by 16, and on which are 1.
"""

import itertools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, LAYOUTS, parameters, randn

from fastnst_kernels import gram, instance_norm, max_pool, normalization, runtime, style_loss

triton = pytest.importorskip("triton")

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
_ARCHITECTURES = (80, 90)


class _Recorder:
    """Stands where a kernel stood and notes its launches."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self._launches.append((self._kernel, args, options))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(runtime, "implementation", lambda _: "triton")
    for module in (normalization, gram, max_pool):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, _Recorder(getattr(module, name), recorded))
    return recorded


def _compile(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], architecture: int) -> Any:
    """The compiled kernel, specialised on its arguments as a launch would."""
    named = dict(zip(kernel.arg_names, args, strict=False))
    num_warps = options["num_warps"]
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        value = named.get(name, options.get(name))
        if name in options or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif type(value) is int:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def _disassemble(compiled: Any, option: str, folder: Path) -> str:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _norm(x: torch.Tensor) -> None:
    weight, bias = parameters(x.shape[1])
    dy = torch.empty_like(x)
    mean, rstd = normalization.moments(x, per_sample=False, eps=1e-5, running=(weight, bias), momentum=0.1)
    normalization.apply(x, weight, bias, mean, rstd, dy, True)
    normalization.backward(dy, x, weight, bias, mean, rstd, True, True)
    instance_norm(x, weight, bias)


def _gram(x: torch.Tensor) -> None:
    c = x.shape[1]
    target = torch.zeros(c, c)
    leaf = x.detach().requires_grad_()
    style_loss(leaf, target).backward(torch.ones(x.shape[0]))
    gram.gram_matrix(leaf).backward(torch.zeros(x.shape[0], c, c))


def _pool(x: torch.Tensor) -> None:
    leaf = x.detach().requires_grad_()
    y, switches = max_pool.max_pool2d_switches(leaf)
    y.backward(torch.empty_like(y))
    torch.ops.fastnst.gather_switches(x, switches, 2, 2)
    max_pool.max_pool2d_switches(x, 3, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", [_norm, _gram, _pool])
def test_compiles_without_spills(run, dtype, launches, tmp_path):
    """Both formats at a size of the networks' own, 64 channels of 64 × 64, for Ampere and Hopper."""
    for layout in ("channels_last", "contiguous"):
        run(LAYOUTS[layout](randn((2, 64, 64, 64), dtype)))
    assert launches
    seen = set()
    for (kernel, args, options), architecture in itertools.product(launches, _ARCHITECTURES):
        compiled = _compile(kernel, args, options, architecture)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        usage = _disassemble(compiled, "-res-usage", tmp_path)
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        case = f"{kernel.fn.__name__} {options} for sm_{architecture}: {registers} registers"
        assert stack == local == 0, f"{case}, {stack} + {local} bytes spilled"
