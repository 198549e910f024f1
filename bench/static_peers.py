"""The peers' Triton kernels, compiled and counted as `bench.static` does ours.

Run for sm_80 and sm_90 with FlashRNN 1.0.8 and TorchRL 0.14.1 on Triton 3.8.0, and with TorchRL on
3.9.0; compiled only, never launched. FlashRNN's kernels need block pointers, which Triton has up to
3.8; there its reverse kernel compiles in fp32 and TF32, and in bf16 does not.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from bench import optional

BATCH = 8  # as in `static.plan_for`
FLASHRNN = "flashrnn.flashrnn.triton_fused"
TORCHRL = "torchrl.modules.tensordict_module._rnn_triton"
TRITON_TYPES = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "bf16": "bf16"}


@dataclass(frozen=True)
class Job:
    """A kernel to compile: its function, run-time types, constants, batch tile and warps."""

    peer: str
    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    block_b: int
    warps: int


def why_not(peer: str) -> str | None:
    """Why the kernels of a peer, a key of `JOBS`, cannot be compiled here, or None."""
    module = {"flashrnn": f"{FLASHRNN}.lstm_fw", "torchrl": TORCHRL}[peer]
    if reason := optional.why_not(module, f"pip install {peer}"):
        return reason
    import triton.language as tl

    if peer == "flashrnn" and not hasattr(tl, "make_block_ptr"):
        return "its kernels need block pointers: install triton<=3.8"
    return None


def _flashrnn(kernel: str, cell: str, H: int, dtype: str) -> Iterator[Job]:
    """LSTM and sLSTM, heads of a power of two, one configuration; one head as well as many."""
    states = {"lstm": 2, "slstm": 4}.get(cell)
    if states is None or H & (H - 1) or kernel == "inference":
        return
    import triton.language as tl

    backward = kernel == "reverse"
    module = importlib.import_module(f"{FLASHRNN}.{cell}_{'bw' if backward else 'fw'}")
    fn = getattr(module, f"_{'backward' if backward else 'forward'}_sequence_kernel")
    warps, block_b = 4, 16  # the reverse kernel's are written at its launch
    if not backward:
        config = fn.configs[0]
        fn, warps, block_b = fn.fn, config.num_warps, config.kwargs["siz_B"]
    element = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[TRITON_TYPES[dtype]]
    constants: dict[str, Any] = {
        "T": 1024,
        "NS": states,
        "B": block_b,
        "NH": 1,
        "DH": H,
        "NGI": 4,
        "NGR": 4,
    }
    constants |= {"siz_B": block_b, "DTYPE": element}
    constants |= {"backward_recurrent_clip_val": -1.0} if backward else {"OUTPUT_GATES": True}
    types = {n: f"*{TRITON_TYPES[dtype]}" for n in fn.arg_names if n not in constants}
    yield Job(f"FlashRNN {version('flashrnn')}", fn, types, constants, block_b, warps)


def _torchrl(kernel: str, cell: str, H: int, dtype: str) -> Iterator[Job]:
    """LSTM and GRU: of what its tuner may choose, all with the least batch tile that holds ours.

    Not with 16 columns of weights, which `static.weight_reads` could not tell from a batch tile.
    From 512 units on it launches a kernel for each step: there is no time loop to look into.
    """
    module = importlib.import_module(TORCHRL)
    if cell not in ("gru", "lstm") or H & (H - 1) or not 16 <= H < 512 or dtype == "fp16":
        return
    tuner = getattr(module, f"_{cell}_{'bwd' if kernel == 'reverse' else 'fwd'}_kernel")
    configs = module._prune_large_hidden_configs(tuner.configs, {}, H=H)
    tile = min((c.kwargs["BLOCK_B"] for c in configs if c.kwargs["BLOCK_B"] >= BATCH), default=0)
    for config in configs:
        if config.kwargs["BLOCK_B"] != tile or config.kwargs["BLOCK_K"] <= 16:
            continue
        constants = config.kwargs | {"H": H}
        constants["INPUT_PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
        if kernel != "reverse":
            constants["SAVE_GATES"] = kernel == "forward"
        types = {"B": "i32", "T": "i32", "is_init_ptr": "*i1"}
        for name in tuner.fn.arg_names:
            if name not in types and name not in constants:
                products = name.startswith("w_") and dtype == "bf16"
                types[name] = "*bf16" if products else "*fp32"
        name = f"TorchRL {version('torchrl')}"
        yield Job(name, tuner.fn, types, constants, tile, config.num_warps)


JOBS = {"flashrnn": _flashrnn, "torchrl": _torchrl}


def jobs(peer: str, kernel: str, cell: str, H: int, dtype: str) -> list[Job]:
    """What a peer has of a kernel; arguments as in `static.Row`."""
    return list(JOBS[peer](kernel, cell, H, dtype))


def options(job: Job) -> dict[str, Any]:
    """The compiler's."""
    return {"num_warps": job.warps, "num_stages": 1, "enable_fp_fusion": True}
