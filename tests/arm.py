"""Programs for 64-bit ARM, emulated."""

from __future__ import annotations

import os
from pathlib import Path

COMPILER = "aarch64-linux-gnu-"  # how the names of its tools begin
SYSTEM = Path("/usr/aarch64-linux-gnu")  # its C library
QEMU = "qemu-aarch64"
CPUS = ("cortex-a72", "neoverse-n1")  # without and with instructions for dot products

# What /proc/cpuinfo says on each: part, features.
KNOWN = {
    "cortex-a72": ("0xd08", "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
    "neoverse-n1": (
        "0xd0c",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
}


def emulated(cpu: str, system: Path = SYSTEM) -> list[str]:
    """The command before a program: it finds files of `system` in place of this machine's."""
    return [QEMU, "-L", str(system), "-cpu", cpu]


def make_system(cpu: str, folder: Path) -> Path:
    """A system that says what processor it has: programs that ask are otherwise told of the machine they are emulated on."""
    part, features = KNOWN[cpu]
    (folder / "proc").mkdir(parents=True)
    (folder / "lib").symlink_to(SYSTEM / "lib")
    (folder / "proc" / "cpuinfo").write_text(
        "".join(
            f"processor\t: {core}\nBogoMIPS\t: 100.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
            f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 3\n\n"
            for core in range(os.cpu_count() or 1)
        )
    )
    return folder
