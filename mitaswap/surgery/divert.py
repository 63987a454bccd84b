"""Source rewriting: a function compiled again with its attention call going somewhere else."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F


def divert(function: Callable[..., Any], method: str) -> Callable[..., Any] | None:
    """`function`, compiled again with its one `scaled_dot_product_attention(...)` as `<first
    argument>.method(...)`.

    Returns:
        The new function in the same module's namespace, with the same line numbers; None where that
        is not possible: no source, decorated, a closure, or not exactly one such call.
    """
    if not isinstance(function, types.FunctionType) or function.__code__.co_freevars:
        return None
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        return None
    calls = [node for node in ast.walk(tree) if _is_attention(node, function.__globals__)]
    if len(calls) != 1:
        return None
    calls[0].func = ast.copy_location(  # type: ignore[attr-defined]
        ast.Attribute(ast.Name(definition.args.args[0].arg, ast.Load()), method, ast.Load()),
        calls[0],
    )
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = (
                None  # not needed to run, and may name what only a type checker imports
            )
    definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
    definition.args.kw_defaults = [d and ast.Constant(None) for d in definition.args.kw_defaults]
    ast.increment_lineno(ast.fix_missing_locations(tree), start - 1)
    namespace: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), function.__globals__, namespace)
    new = namespace[definition.name]
    new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    new.__qualname__, new.__doc__ = function.__qualname__, function.__doc__
    return new


def _is_attention(node: ast.AST, namespace: dict[str, Any]) -> bool:
    if not isinstance(node, ast.Call) or "scaled_dot_product_attention" not in ast.unparse(
        node.func
    ):
        return False
    value: Any = None
    for i, part in enumerate(ast.unparse(node.func).split(".")):
        value = namespace.get(part) if i == 0 else getattr(value, part, None)
    return value is F.scaled_dot_product_attention
