"""Which tokens of a micro-batch a rank holds, where context and tensor parallelism divide them.

    token            0 1 2 3 4 5 6 7     cp 2: of 2 * cp pieces rank c holds pieces c and 2 cp - 1 - c, so that causal
    context rank     0 0 1 1 1 1 0 0     attention is the same work on every rank
    tensor rank      0 0 0 0 1 1 1 1     tp 2: what a context rank attends for is halved once more between layers

Every rank of the "row" group (cp * tp) then computes on tokens of its own, and the gradients of what all of them hold
add up as those of data-parallel ranks do.

T tokens held here, A tokens that attention computes here (all of one context rank's), W tokens of the micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .gather import gather
from .mesh import Mesh
from .process import all_sum


@dataclass(frozen=True)
class Spread:
    """The division of W tokens over the ranks of a row.

    Attributes:
        mesh: the layout.
        attended_A: int64, index of each attended token in the micro-batch, ascending.
        own_T: int64, of each token held here, ascending.
        order_W: int64, token → its place when all ranks' tokens are laid one rank after another.
    """

    mesh: Mesh
    attended_A: Tensor
    own_T: Tensor
    order_W: Tensor

    @staticmethod
    def pieces(mesh: Mesh) -> int:
        """What the tokens of a micro-batch must be a multiple of."""
        return mesh.layout.pieces

    @classmethod
    def of(cls, mesh: Mesh, tokens: int) -> "Spread":
        """The division of `tokens` tokens, a multiple of `pieces`."""
        assert tokens % cls.pieces(mesh) == 0, f"{tokens} tokens can not be divided by {cls.pieces(mesh)}"
        cp, tp, device = mesh.layout.cp, mesh.layout.tp, mesh.device
        pieces = torch.arange(tokens, device=device).chunk(2 * cp) if cp > 1 else None
        attended = [
            torch.cat([pieces[rank], pieces[2 * cp - 1 - rank]]) if pieces else torch.arange(tokens, device=device)
            for rank in range(cp)
        ]
        held = torch.stack([part for some in attended for part in some.chunk(tp)]) if tokens else None
        order_W = torch.arange(0, device=device) if held is None else held.flatten().argsort()
        mine_A = attended[mesh.place["cp"]]
        return cls(mesh, mine_A, mine_A.chunk(tp)[mesh.place["tp"]] if tokens else mine_A, order_W)

    def gather(self, values_T: Tensor) -> Tensor:
        """Every token's value in the micro-batch's order: [W, ...]. Carries no gradient; collective over the row."""
        return gather(values_T.detach(), self.mesh.group("row"), "a row's tokens")[self.order_W]

    def in_order(self, values_W: Tensor) -> Tensor:
        """The values of all context ranks' attended tokens, one rank after another → in the micro-batch's order."""
        values_P2 = values_W.unflatten(0, (self.mesh.size("cp"), 2, -1))
        return torch.cat([values_P2[:, 0].flatten(0, 1), values_P2[:, 1].flip(0).flatten(0, 1)])

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks of the row, as a new tensor without gradient; collective over the row."""
        return all_sum(values, "sum over a row's ranks", self.mesh.group("row"))
