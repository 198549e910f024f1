"""The types of what a sweep is passed for each extra, and of the extras that compile.

An extra that is off passes None, which is a constant: its code is not there, and the rows of
``python -m bench.static`` are those of a kernel that never heard of it.
"""

# Those of fused_rnn/kernels/extras.py; "none" is the kernel without.
EXTRAS = ("none", "lengths", "reset", "restart", "zoneout", "zones", "drop", "clip")
ALL = ("lengths", "restart", "zones", "drop", "clip")


def types(
    extras: tuple[str, ...], kernel: str, lstm: bool, group: bool, x: str, states: str | None
) -> dict[str, str]:
    """Triton's types of the arguments, by name.

    Args:
        extras: which are on.
        kernel: "inference", "forward" or "reverse".
        lstm: whether there is c.
        group: whether there is more than one program.
        x: type of gates and h.
        states: type of what the reverse sweep reads states of.
    """
    found: dict[str, str] = {}
    if "lengths" in extras:
        found["lengths"] = "*i32"
    if "reset" in extras or "restart" in extras:
        found["reset"] = "*u8"
    if "restart" in extras:
        names = ("restart_h", "drestart_h") + (("restart_c", "drestart_c") if lstm else ())
        found |= {n: "*fp32" if n.startswith("d") else x for n in names}
        found["restart"] = states or x
    if "zones" in extras:
        found |= dict.fromkeys(("zone_h", "zone_c") if lstm else ("zone_h",), "*u8")
    elif "zoneout" in extras:
        found["zoneout"] = "fp32"
    if "drop" in extras:
        found["drop"] = x
    if "clip" in extras:
        found["clip"] = "fp32"
    zoned, fed = {"zoneout", "zones"} & set(extras), {"reset", "lengths", "drop"} & found.keys()
    if zoned:
        found["gates"] = x  # of a cell with one gate, too
    if fed and (kernel == "forward" or group):
        found["fed"] = x
    return found
