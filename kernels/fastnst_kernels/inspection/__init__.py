"""Developer tools: record, compile and disassemble kernels without a GPU; minimum cost of each op."""

from fastnst_kernels.inspection.compiled import CompiledKernel, compile_launches, touched_arguments
from fastnst_kernels.inspection.recording import ARCHITECTURES, Architecture, Launch, Operand, record

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CompiledKernel",
    "Launch",
    "Operand",
    "compile_launches",
    "record",
    "touched_arguments",
]
