"""Reading a module that inductor generated for CUDA: its kernels, and what it launches and stores, in order."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One kernel, launched once."""

    sort: str  # "triton": inductor's; "custom": written by hand in Triton; "extern": torch's; "host": on the CPU
    name: str
    arguments: list[str]  # inputs and buffers by name, and numbers


@dataclass(frozen=True)
class Buffer:
    """A tensor that the graph is given, or makes for itself."""

    device: str
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Source:
    """A Triton kernel as the module has it."""

    function: str  # its name in the text
    text: str

    @property
    def is_custom(self) -> bool:
        """Whether it was written by hand."""
        return "triton_heuristics.user_autotune" in self.text


def kernel_sources(code: str) -> dict[str, Source]:
    """The Triton kernels of a module, by the name under which it launches them."""
    return {
        ast.unparse(node.targets[0]): Source(*map(ast.literal_eval, node.value.args[:2]))
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "async_compile.triton"
    }


def launches(code: str, inputs: Mapping[str, str]) -> list[Launch]:
    """What a module launches; `inputs` has readable names for its arguments."""
    sources, found = kernel_sources(code), []
    for node in _calls(code):
        name = ast.unparse(node.func)
        if name.endswith(".run"):
            name = name.removesuffix(".run")
            sort = "custom" if sources[name].is_custom else "triton"
        elif name.startswith(("extern_kernels.", "torch.ops.", "aten.")) or name.endswith((".copy_", ".item")):
            sort = "extern"
        elif name.startswith("cpp_"):
            sort = "host"
        else:
            continue
        arguments = [
            inputs.get(each.id, each.id) if isinstance(each, ast.Name) else str(each.value)
            for argument in (*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "out"))
            for each in _operands(argument)
        ]
        found.append(Launch(sort, name, arguments))
    return found


def stored(code: str) -> list[Buffer]:
    """What a module allocates; buffers that it uses again count once."""
    prefix = "empty_strided_"
    found = []
    for node in _calls(code):
        name = ast.unparse(node.func)
        if name.startswith(prefix):
            shape, _, dtype = node.args
            found.append(Buffer(name.removeprefix(prefix), list(ast.literal_eval(shape)), ast.unparse(dtype)))
    return found


def _calls(code: str) -> list[ast.Call]:
    """The calls in a module's function `call`, in the order of the text."""
    main = next(node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef) and node.name == "call")
    calls = [node for node in ast.walk(main) if isinstance(node, ast.Call)]
    return sorted(calls, key=lambda node: (node.lineno, node.col_offset))


def _operands(argument: ast.expr) -> list[ast.Name | ast.Constant]:
    """The tensor or number that an argument is; of a view the tensor."""
    if isinstance(argument, ast.Call) and argument.args:
        return _operands(argument.args[0])
    return [argument] if isinstance(argument, (ast.Name, ast.Constant)) else []
