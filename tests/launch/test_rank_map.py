"""The map of ranks says what the mesh does."""

from turnout.launch.rank_map import rank_map
from turnout.parallel.config import Layout
from turnout.parallel.mesh import ranks_along

SMALL = Layout(pp=2, dp=2, cp=1, tp=2, ep=4, edp=1)
LARGE = Layout(pp=2, dp=4, cp=2, tp=4, ep=8, edp=4)


def test_few_ranks_have_a_line_each():
    head, *lines = rank_map(SMALL, 4)
    names = head.split()
    assert len(lines) == 8
    for rank, line in enumerate(lines):
        found = dict(zip(names, map(int, line.split()), strict=True))
        place = {name: number for name, number in SMALL.place(rank).items() if name in names}
        assert found == {"rank": rank, "node": rank // 4, **place}
    assert names == ["rank", "node", "pp", "dp", "cp", "tp", "ep", "edp"]


def test_many_ranks_have_a_line_a_dimension():
    head, *lines = rank_map(LARGE, 8)
    assert head == "64 ranks = pp 2 x dp 4 x cp 2 x tp 4 on 8 nodes of 8; experts 4 x 8"
    assert [line.split()[0] for line in lines] == ["tp", "cp", "dp", "pp", "ep", "edp"]
    for line in lines:
        name, size, _, stride = line.replace(",", "").split()[:4]
        first = ranks_along(LARGE, name)[0]
        assert (len(first), first[1] - first[0]) == (int(size), int(stride))
        inside = line.split("(")[1].split(")")[0].split(", ")
        assert int(inside[-1]) == first[-1]
        assert ("within a node" in line) == (first[-1] // 8 == 0)
    assert "ep" not in " ".join(rank_map(Layout(dp=32, ep=1, edp=32), 8)).replace("edp", "").split()
