"""What machines can do, from their makers' data sheets: accelerators and networks by name, or from a YAML file.

Dense rates (no structured sparsity). A file has the fields of the dataclass, one a line: `accelerator=mine.yaml`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from .. import ConfigError
from .typed import build, check

M = TypeVar("M", "Accelerator", "Network")


def _positive(group: str, machine: "Accelerator | Network") -> None:
    for field in fields(machine):
        value = getattr(machine, field.name)
        if not isinstance(value, bool):
            fix = "use the data sheet's number, in FLOP/s, bytes or bytes/s"
            check(0 < value < float("inf"), f"{group}.{field.name}", value, "must be positive and finite", fix)


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device, which one rank drives.

    Args:
        bfloat16: peak FLOP/s of matrix products in bfloat16.
        float32: the same in float32 proper (PyTorch's default, no TF32).
        memory: bytes.
        bandwidth: of the memory, bytes/s.
        link: bytes/s that a device sends to its neighbours of one node.
        node: devices of a node.
        cpu: whether attention takes the kernels' CPU form.
    """

    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    node: int = 8
    cpu: bool = False

    def __post_init__(self) -> None:
        _positive("accelerator", self)

    def peak(self, dtype: str) -> float:
        """FLOP/s in `train.dtype`; float16 is as fast as bfloat16."""
        return self.float32 if dtype == "float32" else self.bfloat16


@dataclass(frozen=True, kw_only=True)
class Network:
    """What joins the nodes.

    Args:
        bandwidth: bytes/s that one rank sends to other nodes.
    """

    bandwidth: float

    def __post_init__(self) -> None:
        _positive("network", self)


# SXM modules; L40S is a PCIe 4 card; `cpu` is a guess for one core, to be replaced by a file of one's own.
ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType(
    {
        "B200": Accelerator(bfloat16=2250e12, float32=75e12, memory=180e9, bandwidth=7.7e12, link=900e9),
        "H200": Accelerator(bfloat16=989e12, float32=67e12, memory=141e9, bandwidth=4.8e12, link=450e9),
        "H100": Accelerator(bfloat16=989e12, float32=67e12, memory=80e9, bandwidth=3.35e12, link=450e9),
        "A100": Accelerator(bfloat16=312e12, float32=19.5e12, memory=80e9, bandwidth=2.039e12, link=300e9),
        "L40S": Accelerator(bfloat16=362e12, float32=91.6e12, memory=48e9, bandwidth=864e9, link=32e9),
        "cpu": Accelerator(bfloat16=100e9, float32=50e9, memory=4e9, bandwidth=10e9, link=2e9, node=64, cpu=True),
    }
)
# The line rate of one port a rank.
NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "nvlink": Network(bandwidth=450e9),
        "ib400": Network(bandwidth=50e9),
        "ib200": Network(bandwidth=25e9),
        "eth100": Network(bandwidth=12.5e9),
        "eth25": Network(bandwidth=3.125e9),
        "eth10": Network(bandwidth=1.25e9),
    }
)


def accelerator(name: str) -> Accelerator:
    """The accelerator called `name`, or described by the YAML file of that path.

    Raises:
        ConfigError: neither exists, or the file does not fit.
    """
    return _find("accelerator", name, ACCELERATORS, Accelerator)


def network(name: str) -> Network:
    """The network called `name`, or described by the YAML file of that path.

    Raises:
        ConfigError: neither exists, or the file does not fit.
    """
    return _find("network", name, NETWORKS, Network)


def _find(field: str, name: str, table: Mapping[str, M], cls: type[M]) -> M:
    if name in table:
        return table[name]
    fix = f"use {', '.join(table)}, or a .yaml file with {', '.join(f.name for f in fields(cls))}"
    known = name.endswith((".yaml", ".yml")) and Path(name).is_file()
    check(known, field, name, f"is not a known {field} and no file", fix)
    return build(cls, _read(field, name, fix), field)


def _read(field: str, path: str, fix: str) -> Any:
    """Plain values of a YAML file. OmegaConf's reader takes 989e12 for a number, as plain YAML 1.1 does not."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{field} ({path}) can not be read as YAML ({reason}): {fix}") from error
