"""Which layers a pipeline's stages hold. No torch here.

    8 layers, pp 2, virtual 2      stage       0      1      2      3
                                   layers      0 1    2 3 4  5 6    7       embedding and head count as a layer each
                                   rank        0      1      0      1

A stage is a run of layers; rank r of the pp pipeline ranks holds stages r, pp + r, 2 pp + r, ... (`parallel.virtual` of
them), so the embedding is always on the first rank and the head on the last.
"""


def split(layers: int, stages: int) -> list[range]:
    """The layers of each stage, at least one each: as even as whole layers allow, the earlier ones larger.

    The embedding counts as one more layer of the first stage, norm and head as one of the last.
    """
    assert 1 <= stages <= layers, f"{layers} layers can not fill {stages} stages"
    load = [1] * stages
    load[0] += 1
    load[-1] += 1
    for _ in range(layers - stages):
        load[load.index(min(load))] += 1
    load[0] -= 1
    load[-1] -= 1
    return [range(sum(load[:stage]), sum(load[: stage + 1])) for stage in range(stages)]


def held(layers: int, pp: int, virtual: int, rank: int) -> dict[int, range]:
    """The stages of pipeline rank `rank`, in order: number → layers."""
    every = split(layers, pp * virtual)
    return {stage: every[stage] for stage in range(rank, pp * virtual, pp)}
