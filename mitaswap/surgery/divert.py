"""Source rewriting: a function compiled again with its attention call going somewhere else."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any, TypeGuard

import torch.nn.functional as F

#: what the calls that replace `scaled_dot_product_attention` are called in the new source
_ATTEND = "_mitaswap_attend"
_FORWARD = "_mitaswap_forward"


def divert(function: Callable[..., Any], attend: Callable[..., Any]) -> Callable[..., Any] | None:
    """`function`, compiled again with its one `scaled_dot_product_attention(...)` as
    `attend(<first argument>, ...)`.

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
    first = definition.args.args[0].arg
    calls[0].func = ast.copy_location(ast.Name(_ATTEND, ast.Load()), calls[0])
    calls[0].args.insert(0, ast.copy_location(ast.Name(first, ast.Load()), calls[0]))
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = (
                None  # not needed to run, and may name what only a type checker imports
            )
    definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
    definition.args.kw_defaults = [d and ast.Constant(None) for d in definition.args.kw_defaults]
    definition.name = _FORWARD  # nested now, it would hide a global of its own name
    tree.body = [_with_attend(definition)]
    ast.increment_lineno(ast.fix_missing_locations(tree), start - 1)
    namespace: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), function.__globals__, namespace)
    new = namespace[_ATTEND](attend)
    new.__code__ = new.__code__.replace(co_name=function.__code__.co_name)
    new.__name__ = function.__name__
    new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    new.__qualname__, new.__doc__ = function.__qualname__, function.__doc__
    return new


def _with_attend(definition: ast.FunctionDef) -> ast.stmt:
    """The definition of a function that takes `attend` and returns the one that is defined: a free
    variable is found without a look at the module.
    """
    (made,) = ast.parse(f"def {_ATTEND}({_ATTEND}): return {definition.name}").body
    assert isinstance(made, ast.FunctionDef)
    made.body.insert(0, definition)
    return made


def _is_attention(node: ast.AST, namespace: dict[str, Any]) -> TypeGuard[ast.Call]:
    if not isinstance(node, ast.Call) or "scaled_dot_product_attention" not in ast.unparse(
        node.func
    ):
        return False
    value: Any = None
    for i, part in enumerate(ast.unparse(node.func).split(".")):
        value = namespace.get(part) if i == 0 else getattr(value, part, None)
    return value is F.scaled_dot_product_attention
