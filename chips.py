"""
What the TPUs have that people can get, in one table: kernels, MFU, `aot` and run_tpu.sh read it. And which of them this machine is.

run_tpu.sh asks the system's Python before there is an environment, so that this file needs nothing but Python 3.8.
"""
from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

MiB, GiB = 2**20, 2**30
RECORD = 89  # the record that this checkout trains; reports of others in records/ are not of it


class Refused(Exception):
    """A TPU that this project cannot use, or not now: one line that says why and the way out."""


@dataclass(frozen=True)
class Chip:
    """
    One chip. Peak, HBM bandwidth, links and cores are of Google's pages (docs.cloud.google.com/tpu/docs/v6e, v5e, v5p, v4), but v4's
    links, which are of the paper (arXiv:2304.01433). HBM and VMEM are what libtpu 0.0.21 says when a program asks for too much.
    """
    name: str
    pci: str  # device id; the vendor is 0x1ae0
    bf16_flops: float  # FLOP/s, all cores
    clock_hz: float  # the peak over what the compiler counts a cycle for a product: 524288 FLOP on v6e, 131072 a core on the others
    hbm_bytes: int  # granted to programs, a little less than there is
    hbm_bandwidth: float  # bytes/s
    vmem_bytes: int  # of a core; libtpu keeps 64 KiB of it
    cores: int  # they show as one device. XLA splits its work over both, a kernel only along a dimension that is "parallel"
    links: int  # to other chips
    link_bytes_per_s: float  # of a link, one way: Google's "bidirectional bandwidth" over 2 x links
    compares_int16: bool = False  # a kernel may compare 16-bit integers, two to a lane
    megacore: str | None = None  # chip_config_name, where libtpu would show each core as a device without it

    @property
    def generation(self) -> int:
        """As torch_xla counts it, which sets libtpu's flags by it."""
        return int(self.name[1])

    @property
    def flop_per_cycle(self) -> float:
        """Of all cores."""
        return self.bf16_flops / self.clock_hz


CHIPS = {chip.name: chip for chip in (
    Chip("v6e", pci="0x006f", bf16_flops=918e12, clock_hz=1.75e9, hbm_bytes=int(31.25 * GiB), hbm_bandwidth=1638e9,
         vmem_bytes=128 * MiB, cores=1, links=4, link_bytes_per_s=100e9, compares_int16=True),
    Chip("v5e", pci="0x0063", bf16_flops=197e12, clock_hz=1.5e9, hbm_bytes=int(15.75 * GiB), hbm_bandwidth=819e9,
         vmem_bytes=128 * MiB, cores=1, links=4, link_bytes_per_s=50e9),
    Chip("v5p", pci="0x0062", bf16_flops=459e12, clock_hz=1.75e9, hbm_bytes=int(95.74 * GiB), hbm_bandwidth=2765e9,
         vmem_bytes=64 * MiB, cores=2, links=6, link_bytes_per_s=100e9),
    Chip("v4", pci="0x005e", bf16_flops=275e12, clock_hz=1.05e9, hbm_bytes=int(30.75 * GiB), hbm_bandwidth=1228e9,
         vmem_bytes=16 * MiB, cores=2, links=6, link_bytes_per_s=50e9, megacore="megacore"),
)}
# Known by their PCI id, and refused: libtpu 0.0.21 or this project's kernels have nothing for them.
OTHERS = {"0x0027": "v2 or v3", "0x0056": "v4 lite", "0x0076": "7x"}


@dataclass(frozen=True)
class Tpu:
    """A machine's chips as Google sells them, one host each. Where a chip has two cores, the name counts cores."""
    name: str
    chip: Chip
    chips: int  # as many devices
    topology: str  # as libtpu calls it. All are meshes without wrap-around, where a corner has two links
    bounds: tuple[int, int, int]  # chips of a host
    trains: bool = True  # else refused: its VMEM does not hold the record's kernels

    @property
    def devices(self) -> int:
        return self.chips

    @property
    def description(self) -> dict:
        """What jax.experimental.topologies.get_topology_desc takes."""
        known = {"platform": "tpu", "topology_name": self.topology, "chips_per_host_bounds": self.bounds}
        return known if self.chip.megacore is None else {**known, "chip_config_name": self.chip.megacore}


TPUS = {tpu.name: tpu for tpu in (
    Tpu("v6e-8", CHIPS["v6e"], 8, "v6e:2x4", (2, 4, 1)),
    Tpu("v6e-4", CHIPS["v6e"], 4, "v6e:2x2", (2, 2, 1)),
    Tpu("v6e-1", CHIPS["v6e"], 1, "v6e:1x1", (1, 1, 1)),
    Tpu("v5e-8", CHIPS["v5e"], 8, "v5e:2x4", (2, 4, 1)),
    Tpu("v5e-4", CHIPS["v5e"], 4, "v5e:2x2", (2, 2, 1)),
    Tpu("v5e-1", CHIPS["v5e"], 1, "v5e:1x1", (1, 1, 1)),
    Tpu("v5p-8", CHIPS["v5p"], 4, "v5p:2x2x1", (2, 2, 1)),
    Tpu("v4-8", CHIPS["v4"], 4, "v4:2x2x1", (2, 2, 1), trains=False),
)}


def tpu_named(name: str) -> Tpu:
    """Of TPUS; Google's "v5litepod-8" is "v5e-8"."""
    tpu = TPUS.get(name.lower().replace("v5litepod", "v5e"))
    if tpu is None:
        near = difflib.get_close_matches(name, TPUS, 1, 0.7)
        raise Refused(f"no TPU {name!r} here: " + (f"did you mean {near[0]}? " if near else "") + f"There are {', '.join(TPUS)}")
    return tpu

# -----------------------------------------------------------------------------
# This machine's

# Google's virtual disks and network cards have its vendor id too, in each of its VMs. (Class 0x12 is an accelerator, 0xff unassigned.)
NOT_TPUS, TPU_CLASSES = ("0x001f", "0x0042"), ("0x12", "0xff")


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def ids_on_bus(sys_root: str = "/sys") -> list[str]:
    """The PCI device id of each TPU chip of this machine."""
    found = []
    for device in sorted(Path(sys_root).glob("bus/pci/devices/*")):
        if read(device / "vendor").lower() == "0x1ae0":
            pci, kind = read(device / "device").lower(), read(device / "class").lower()
            known = pci in OTHERS or pci in (chip.pci for chip in CHIPS.values())
            if known or (pci and pci not in NOT_TPUS and (not kind or kind.startswith(TPU_CLASSES))):
                found.append(pci)
    return found


def this_chip(sys_root: str = "/sys") -> Chip | None:
    """The chip of this machine, None without one; Refused where the table does not have it."""
    ids = sorted(set(ids_on_bus(sys_root)))
    if not ids:
        return None
    chips = {chip.pci: chip for chip in CHIPS.values()}
    if len(ids) > 1 or ids[0] not in chips:
        names = [chips[pci].name if pci in chips else OTHERS.get(pci, f"an unknown chip (PCI 1ae0:{pci[2:]})") for pci in ids]
        raise Refused(f"this machine's TPU is {' and '.join(names)}: {supported()}")
    return chips[ids[0]]


def supported() -> str:
    return f"the record trains on {', '.join(tpu.name for tpu in TPUS.values() if tpu.trains)}"
