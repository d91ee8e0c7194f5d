"""What each linear of a program gets to see on our calibration texts (calibration.toml)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_export.passes import rounding
from mobile_export.prompts import load_prompts, render
from mobile_export.types import Checkpoint, Dims, sample_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

LONGEST = 384
"""Tokens of each text: a tokenizer that knows few words would make thousands of it."""
SHARED = 0.25
"""Weight of a text's first token, and of its mean, in texts: an error there does not average out.

Attention rests on the first token wherever nothing else matters, and averages over the others.
"""
DAMPING = 0.5
"""Times inputs per token; found by measurement, see docs/rounding.md."""
_TINY = 1e-30


@dataclass
class Moments:
    """Of one input: the weighted sum of x x^T over texts, block by block of its K columns."""

    blocks: list[Tensor]
    """fp32 [B, B] each, as `rounding.blocks(K)` cuts the columns."""
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """The inputs fp32 [S, K] of one text.

        Each token is scaled to the same power: the few whose power is huge would be all that counts.
        """
        import torch

        x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True).clamp_min(_TINY))
        heavy = (SHARED * len(x)) ** 0.5
        self.tokens += len(x)
        if len(x) > 1:
            x = torch.cat((x, heavy * x[:1], heavy * x[1:].mean(dim=0, keepdim=True)))
        for columns, block in zip(rounding.blocks(x.shape[1]), self.blocks, strict=True):
            block.addmm_(x[:, columns].T, x[:, columns])

    def factors(self) -> list[rounding.Factor | None]:
        """For `rounding.compensated`; the fewer tokens for the unknowns, the stronger the damping."""
        damping = DAMPING * sum(map(len, self.blocks)) / max(self.tokens, 1)
        return [rounding.factor(block, damping) for block in self.blocks]


def texts(checkpoint: Checkpoint, context: int) -> list[list[int]]:
    """Token ids of each calibration text, cut to LONGEST and to `context`."""
    tokenizer = checkpoint.tokenizer()
    prompts = load_prompts(Path(__file__).parent.parent / "calibration.toml")
    ids = [render(prompt, tokenizer)[1][: min(LONGEST, context)] for prompt in prompts.items]
    return [tokens for tokens in ids if tokens]


def calibrate(module: GraphModule, dims: Dims, texts: list[list[int]]) -> dict[Node, Moments]:
    """Run each text through an fp32 program; what is found is by the node that linears read."""
    import torch
    from torch.fx import Interpreter

    found: dict[Node, Moments] = {}
    reader: dict[Node, Node] = {}

    class Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            if n.target != torch.ops.aten.linear.default:
                return super().run_node(n)
            x = self.fetch_args_kwargs_from_env(n)[0][0]
            source: Any = n.args[0]
            if source not in found:
                sizes = [columns.stop - columns.start for columns in rounding.blocks(x.shape[-1])]
                found[source] = Moments([torch.zeros(size, size) for size in sizes])
            if reader.setdefault(source, n) is n:  # once for q, k and v
                found[source].add(x.reshape(-1, x.shape[-1]))
            head = all(user.op == "output" for user in n.users)
            return x if head else super().run_node(n)  # the largest product of all, and nobody reads it

    start, caches = sample_inputs(dims)[0][1:]
    with torch.no_grad():
        for tokens in texts:
            Watch(module).run(torch.tensor([tokens]), start, caches)
    return found
