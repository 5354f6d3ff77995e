"""Which rank does what, for a person, before a run starts.

rank   node   pp   dp   cp   tp   ep   edp
   0      0    0    0    0    0    0     0
   1      0    0    0    0    1    1     0
"""

from collections.abc import Iterator

from ..parallel.config import Layout

FEW = 16  # ranks of which each has a line
DIMENSIONS = {
    "tp": "divide attention and dense layers",
    "cp": "divide the tokens of a row",
    "dp": "read different rows",
    "pp": "divide the layers",
    "ep": "divide the experts",
    "edp": "hold the same experts",
}


def rank_map(layout: Layout, node: int) -> Iterator[str]:
    """One line a rank; of many ranks one line a dimension: how many, how far apart, and the group of rank 0.

    Args:
        node: ranks of a node.
    """
    columns = ("pp", "dp", "cp", "tp", "ep", "edp")
    if layout.world <= FEW:
        yield "".join(f"{name:>6}" for name in ("rank", "node", *columns))
        for rank in range(layout.world):
            place = layout.place(rank)
            yield "".join(f"{number:>6}" for number in (rank, rank // node, *(place[name] for name in columns)))
        return
    nodes = -(-layout.world // node)
    product = " x ".join(f"{name} {getattr(layout, name)}" for name in ("pp", "dp", "cp", "tp"))
    yield f"{layout.world} ranks = {product} on {nodes} nodes of {node}; experts {layout.edp} x {layout.ep}"
    strides = {
        "tp": 1, "cp": layout.tp, "dp": layout.tp * layout.cp, "pp": layout.stage, "ep": 1, "edp": layout.ep,
    }  # fmt: skip
    for name, words in DIMENSIONS.items():
        size, stride = getattr(layout, name), strides[name]
        if size > 1:
            where = "within a node" if size * stride <= node else "across nodes"
            yield f"{name:>4} {size:>5} ranks, {stride} apart ({_some(size, stride)}), {where}, {words}"


def _some(size: int, stride: int) -> str:
    """The group of rank 0."""
    ranks = [str(i * stride) for i in range(size)]
    return ", ".join(ranks if size <= 4 else [*ranks[:2], "...", ranks[-1]])
