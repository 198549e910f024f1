"""Run the rows of a GPU in the emulator beside this checkout, if it is there.

python .ci/check_emulated.py                              # the quick rows, a minute
python .ci/check_emulated.py --quick --all --limit 600    # all that are small, some minutes
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
if not (SHARED / "fakegpu").is_dir():
    sys.exit("the emulator is not here: nothing checked")
sys.path[:0] = [str(SHARED), str(ROOT)]
os.chdir(ROOT)  # there it finds what it has to know of this checkout

CHILD = "child"

if sys.argv[1:2] == [CHILD]:
    import fakegpu

    fakegpu.install("emulate")
    from fused_rnn.tools.check import child

    del sys.argv[1]
    child.main()
else:
    from fused_rnn.tools.check.command import main

    arguments = sys.argv[1:] or ["--quick", "--limit", "600"]
    sys.exit(main(arguments, command=[sys.executable, __file__, CHILD]))
