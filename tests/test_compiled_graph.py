"""Under torch.compile the seam is gone: the graph has the operations of the untouched model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from networks import hf, timm_vit
from torch import nn

import mitaswap
from mitaswap.surgery.witness import example_input


def operations(model: nn.Module, x: torch.Tensor) -> Counter[str]:
    """What the compiler is given, by kind of operation."""
    seen: Counter[str] = Counter()

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        seen.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(x)
    return seen


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_graph_of_an_identity_swap_is_that_of_the_untouched_model(library: str) -> None:
    model = timm_vit() if library == "timm" else hf("ViT")
    x = example_input(model)
    untouched = operations(model.eval(), x)
    assert any("scaled_dot_product_attention" in name for name in untouched)
    with mitaswap.swap(model, "standard"):
        assert operations(model, x) == untouched
    with mitaswap.swap(model, "linear"):  # the comparison can tell graphs apart
        assert operations(model, x) != untouched
