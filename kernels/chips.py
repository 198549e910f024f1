"""What the chips offer that the planner counts on. Plain Python."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one chip offers. Speeds are of the fastest common product, from its data sheet.

    Attributes:
        target: Triton's name of the architecture, e.g. 90 or "gfx942".
        sms: multiprocessors, when no device is there to be asked.
        shared: bytes of shared memory that one program may use.
        sm_shared: bytes of shared memory of one SM.
        clock: GHz.
        l2: MiB.
        memory: bandwidth in TB/s.
        warp: threads of a warp.
        registers: of one thread.
        warps: as many of a program as may use all those registers.
        wide_mma: a plain dot of 64 rows or more becomes wgmma or tcgen05, not mma.sync.
        fp32_mma: tensor cores multiply fp32; else they take it in parts, see `precision.split`.
        wgmma: it becomes wgmma, which takes weights from registers and shared memory.
        fast_tanh: tanh.approx.f32 exists, and inline assembly to reach it.
        groups: programs of a launch can wait for each other.
        hop_us: microseconds of a barrier among 32 of them, release to acquire; see `step_cycles`.
        most_programs: as many of a launch as may wait for each other, if the driver takes fewer
            than the chip has room for.
    """

    target: int | str
    sms: int
    shared: int
    sm_shared: int
    clock: float
    l2: int
    memory: float
    warp: int = 32
    registers: int = 255
    warps: int = 8
    wide_mma: bool = False
    fp32_mma: bool = False
    wgmma: bool = False
    fast_tanh: bool = True
    groups: bool = True
    hop_us: float = 0.855
    most_programs: int | None = None

    def places(self, warps: int, shared: int) -> int:
        """Programs that are resident at once, each of so many warps and bytes of shared memory.

        Registers are counted as if each thread had the most: compiled kernels can only need less.
        """
        by_registers = 65536 // (warps * 32 * 256)
        by_shared = self.sm_shared // (shared + 1024)  # each program takes 1 KiB more
        programs = self.sms * min(by_registers, by_shared)
        return programs if self.most_programs is None else min(programs, self.most_programs)


_K = 1024
LIMITS = {
    limits.target: limits
    for limits in (
        Limits(80, 108, 163 * _K, 164 * _K, clock=1.41, l2=40, memory=2.0),
        Limits(86, 84, 99 * _K, 100 * _K, clock=1.7, l2=6, memory=0.9),
        Limits(89, 144, 99 * _K, 100 * _K, clock=2.5, l2=72, memory=1.0),
        Limits(
            90,
            132,
            227 * _K,
            228 * _K,
            clock=1.755,
            l2=50,
            memory=3.35,
            wide_mma=True,
            wgmma=True,
        ),
        Limits(100, 148, 227 * _K, 228 * _K, clock=1.85, l2=126, memory=8.0, wide_mma=True),
        Limits(120, 188, 99 * _K, 100 * _K, clock=2.6, l2=128, memory=1.8),
        # No groups: Triton lets the releasing wave wait for its own stores only, and nothing
        # proves that those of the other waves have arrived by then.
        Limits(
            "gfx942",
            304,
            64 * _K,
            64 * _K,
            clock=2.1,
            l2=32,
            memory=5.3,
            warp=64,
            registers=512,
            warps=4,
            fp32_mma=True,
            fast_tanh=False,
            groups=False,
        ),
    )
}
