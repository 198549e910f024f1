"""Run the compiled sweeps in the PTX emulator beside this checkout, races checked, if it is there.

python .ci/ptxsim_check.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
if not (SHARED / "ptxsim").is_dir():
    sys.exit("ptxsim is not here: nothing checked")
sys.path[:0] = [str(SHARED), str(ROOT), str(ROOT / "tests")]

import ptxsim  # noqa: E402
import torch  # noqa: E402
from sweep_oracle import Problem, check_sweeps  # noqa: E402

import fused_rnn.kernels.backward as backward  # noqa: E402
import fused_rnn.kernels.forward as forward  # noqa: E402
from fused_rnn.kernels.plan import LIMITS, make_plan  # noqa: E402


class Emulated:
    """Stands in for a kernel: `kernel[grid](...)` runs its PTX here."""

    def __init__(self, kernel, arch):
        self.kernel, self.arch = kernel, arch

    def __getitem__(self, grid):
        def launch(**arguments):
            stats = ptxsim.triton_launch(
                self.kernel, grid, arch=self.arch, race_check=True, **arguments
            )
            assert not stats.races, "\n".join(stats.races)

        return launch


def check(name, dtype, H, B, T, arch, reverse=(False,), packed=False):
    """Both sweeps of one layer, in the emulator, against the fp64 loop."""
    plan = make_plan(name, H, dtype.itemsize, B, len(reverse), LIMITS[arch])
    check_sweeps(Problem(name, dtype, H, B, T, reverse, packed), plan, "ieee", use_c_seq=True)


if __name__ == "__main__":
    kernels = forward.forward_kernel, backward.backward_kernel
    for arch in (80, 90):
        forward.forward_kernel = Emulated(kernels[0], arch)
        backward.backward_kernel = Emulated(kernels[1], arch)
        for name in ("rnn_tanh", "rnn_relu", "gru", "lstm"):
            check(name, torch.bfloat16, 128, 11, 4, arch)
            check(name, torch.float16, 40, 3, 5, arch, (False, True))
            check(name, torch.float32, 24, 3, 0, arch, (False, True), packed=True)
            print(f"sm_{arch} {name}: numbers right, no race", flush=True)
