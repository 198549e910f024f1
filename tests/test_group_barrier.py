"""The barrier among programs: its protocol, state by state, and its code, run concurrently."""

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from concurrent_interpreter import Hang, ProgramError, concurrent_grid
from helpers import plan_request
from triton.backends.compiler import GPUTarget

from fused_rnn.kernels import group
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.planner import make_plan

if not triton.knobs.runtime.interpret:
    pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

STEPS = 4  # each of the two counters is used twice


@dataclass(frozen=True)
class Protocol:
    """What the programs do; the defaults are what kernels/group.py does."""

    slots: int = STEPS  # places for the data of a program; step t uses t % slots
    counters: int = 2
    release: bool = True  # an arrival comes after all stores of the program
    reset: bool = False  # the last to arrive sets the counter to 0, which is waited for


class State(NamedTuple):
    programs: tuple[tuple[int, str, int], ...]  # step, what is next, bits of the data read
    counters: tuple[int, ...]
    memory: tuple[tuple[int, ...], ...]  # [program][slot]: the step whose data all can see
    stores: tuple[tuple[int, ...], ...]  # per program: steps whose data is stored, but not visible


class Violation(Exception):
    pass


def put(values, i, value):
    return (*values[:i], value, *values[i + 1 :])


def moves(s: State, p: Protocol) -> Iterator[State]:
    """All states that one program or its memory can make of `s`."""
    programs = len(s.programs)
    for i, (step, action, seen) in enumerate(s.programs):
        for k, stored in enumerate(s.stores[i]):  # one store becomes visible, in any order
            slot = stored % p.slots
            if all(earlier % p.slots != slot for earlier in s.stores[i][:k]):
                yield s._replace(
                    memory=put(s.memory, i, put(s.memory[i], slot, stored)),
                    stores=put(s.stores, i, s.stores[i][:k] + s.stores[i][k + 1 :]),
                )

        def then(*program, i=i):
            return put(s.programs, i, program)

        c = step % p.counters
        if step == STEPS:
            continue
        if action == "write":
            stores = put(s.stores, i, (*s.stores[i], step))
            yield s._replace(programs=then(step, "arrive", 0), stores=stores)
        elif action == "arrive" and not (p.release and s.stores[i]):
            count = s.counters[c] + 1
            count = 0 if p.reset and count == programs else count
            yield s._replace(
                programs=then(step, "wait", 1 << i), counters=put(s.counters, c, count)
            )
        elif action == "wait":
            target = 0 if p.reset else (step // p.counters + 1) * programs
            if s.counters[c] == target:
                yield s._replace(programs=then(step, "read", seen))
        elif action == "read":
            for j in range(programs):  # the loads are in any order, too
                if not seen >> j & 1:
                    found = s.memory[j][step % p.slots]
                    if found != step:
                        late = "late" if found < step else "overwritten"
                        raise Violation(f"{late}: {i} reads step {found} of {j} in step {step}")
                    now = seen | 1 << j
                    done = now == (1 << programs) - 1
                    yield s._replace(
                        programs=then(step + 1, "write", 0) if done else then(step, "read", now)
                    )


def explore(p: Protocol, programs: int) -> int:
    """The number of states that can be reached; raises Violation if one of them is wrong."""
    start = State(
        ((0, "write", 0),) * programs,
        (0,) * p.counters,
        ((-1,) * p.slots,) * programs,
        ((),) * programs,
    )
    known, todo = {start}, [start]
    while todo:
        state = todo.pop()
        after = set(moves(state, p))
        if not after and any(step < STEPS for step, _, _ in state.programs):
            raise Violation(f"deadlock: {state}")
        todo += after - known
        known |= after
    return len(known)


@pytest.mark.parametrize("slots", [STEPS, 2], ids=["fresh", "double_buffered"])
@pytest.mark.parametrize(("programs", "states"), [(2, 100), (3, 1_000)])
def test_protocol(programs, states, slots):
    assert explore(Protocol(slots=slots), programs) > states


WRONG_PROTOCOLS = {
    "no_release": (Protocol(release=False), "late"),
    "one_counter": (Protocol(counters=1), "deadlock"),
    "counter_set_back": (Protocol(counters=1, reset=True), "deadlock"),
    "single_buffered": (Protocol(slots=1), "overwritten"),
}


@pytest.mark.parametrize("programs", [2, 3])
@pytest.mark.parametrize(("protocol", "why"), WRONG_PROTOCOLS.values(), ids=WRONG_PROTOCOLS)
def test_wrong_protocol(protocol, why, programs):
    with pytest.raises(Violation, match=why):
        explore(protocol, programs)


@triton.jit
def exchange_kernel(
    data,  # [SLOTS, groups, PROGRAMS]
    out,  # [groups, PROGRAMS]
    counters,  # [groups, STRIDE]
    T: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ARRIVE: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Each step makes a program's value from those of all programs of its group."""
    program, g = tl.program_id(0), tl.program_id(1)
    counters += g * STRIDE
    at = tl.arange(0, BLOCK)
    value = 10 * g + program
    for t in range(T):
        row = data + (t % SLOTS * tl.num_programs(1) + g) * PROGRAMS
        tl.store(row + program, value)
        ARRIVE(counters, t)
        WAIT(counters, t, PROGRAMS)
        others = tl.load(row + at, mask=at < PROGRAMS, other=0, cache_modifier=".cg")
        value = (3 * value + tl.sum((at + 1) * others)) % 10007
    tl.store(out + g * PROGRAMS + program, value)


def expected(programs, groups, T):
    value = 10 * torch.arange(groups)[:, None] + torch.arange(programs)
    for _ in range(T):
        value = (3 * value + (value * torch.arange(1, programs + 1)).sum(1, keepdim=True)) % 10007
    return value.int()


def exchange(programs, groups, T=4, seed=0, timeout=60.0, slots=None, arrive=None, wait=None):
    slots = slots or T
    data = torch.full((slots, groups, programs), -1, dtype=torch.int32)
    out = torch.full((groups, programs), -1, dtype=torch.int32)
    counters = torch.zeros(groups, 2 * group.LINE.value, dtype=torch.int32)
    with concurrent_grid(seed, timeout):
        exchange_kernel[(programs, groups)](
            data,
            out,
            counters,
            T,
            programs,
            slots,
            counters.shape[1],
            triton.next_power_of_2(programs),
            arrive or group.arrive,
            wait or group.wait,
        )
    return out


@pytest.mark.parametrize("programs", range(2, 9))
def test_exchange(programs):
    for seed in range(10 * programs, 10 * programs + 6):
        groups, slots = 1 + seed % 3, (None, 2)[seed % 2]
        out = exchange(programs, groups, seed=seed, slots=slots)
        assert torch.equal(out, expected(programs, groups, 4)), f"seed {seed}"


@triton.jit
def arrive_without_barrier(counters, step):
    tl.atomic_add(counters + (step % 2) * group.LINE, 1, sem="release", scope="gpu")


@triton.jit
def arrive_relaxed(counters, step):
    tl.debug_barrier()
    tl.atomic_add(counters + (step % 2) * group.LINE, 1, sem="relaxed", scope="gpu")


@triton.jit
def arrive_at_one_counter(counters, step):
    group.arrive(counters, 0)


@triton.jit
def wait_at_one_counter(counters, step, programs):
    group.wait(counters, 0, (step + 1) * programs)


@triton.jit
def wait_for_nobody(counters, step, programs):
    pass


WRONG_KERNELS = {
    "no_block_barrier": {"arrive": arrive_without_barrier},
    "no_release": {"arrive": arrive_relaxed},
    "no_wait": {"wait": wait_for_nobody},
    "one_counter": {"arrive": arrive_at_one_counter, "wait": wait_at_one_counter},
    "single_buffered": {"slots": 1},
}


@pytest.mark.parametrize("wrong", WRONG_KERNELS.values(), ids=WRONG_KERNELS)
def test_wrong_kernel_is_found(wrong):
    def fails(seed):
        try:
            return not torch.equal(exchange(3, 1, seed=seed, **wrong), expected(3, 1, 4))
        except Hang:
            return True

    assert any(fails(seed) for seed in range(20))


def test_same_seed_same_schedule():
    def outcome(seed):
        return exchange(3, 1, seed=seed, arrive=arrive_relaxed).tolist()

    outcomes = [outcome(seed) for seed in range(6)]
    assert outcomes == [outcome(seed) for seed in range(6)]
    assert any(o != outcomes[0] for o in outcomes)


@triton.jit
def arrive_but_once(counters, step):
    if (tl.program_id(0) != 1) | (step != 2):
        group.arrive(counters, step)


@triton.jit
def arrive_and_fail(counters, step):
    if (tl.program_id(0) == 1) & (step == 2):
        tl.arange(0, 3)
    group.arrive(counters, step)


@triton.jit
def arrive_and_loop(counters, step):
    while (tl.program_id(0) == 1) & (step == 2):
        pass
    group.arrive(counters, step)


@pytest.fixture
def no_thread_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.usefixtures("no_thread_left")
def test_missing_arrival():
    with pytest.raises(Hang) as error:
        exchange(3, 1, arrive=arrive_but_once)
    for program in range(3):
        place = (
            r"step 2, group.py:\d+ in wait, called at test_group_barrier.py:\d+ in exchange_kernel"
        )
        error.match(rf"program \({program}, 0, 0\), {place} hangs")


@pytest.mark.usefixtures("no_thread_left")
def test_exception_in_a_program():
    with pytest.raises(ProgramError, match="power of 2") as error:
        exchange(3, 1, arrive=arrive_and_fail)
    error.match(r"program \(1, 0, 0\), step 2, test_group_barrier.py:\d+ in arrive_and_fail")


@pytest.mark.usefixtures("no_thread_left")
def test_loop_without_memory():
    with pytest.raises(Hang, match=r"after 0.5 s: program \(1, 0, 0\), step 2, .*arrive_and_loop"):
        exchange(3, 1, timeout=0.5, arrive=arrive_and_loop)


# ---- block barriers that the compiler brings, or not: read off its code -------------------------

EXCHANGE = """
	st.global.b32 [ %rd1 + 0 ], { %r2 };
	bar.sync 	0;
	@%p1 red.global.gpu.release.add.u32 [ %rd2 + 0 ], %r3;
	@%p3 ld.relaxed.gpu.global.b32 %r13, [ %rd2 + 0 ];
	@%p5 bra 	$L__BB0_2;
	fence.acquire.gpu;
	bar.sync 	0;
	ld.global.cg.b32 { %r15 }, [ %rd5 + 0 ];
	st.global.b32 [ %rd6 + 0 ], { %r15 };
"""
OTHER_LINES = {
    "without_any": lambda lines: [x for x in lines if "bar.sync" not in x],
    "without_the_first": lambda lines: lines[:2] + lines[3:],
    "without_the_second": lambda lines: lines[:7] + lines[8:],
    "first_before_the_store": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "second_before_the_acquire": lambda lines: [*lines[:6], lines[7], lines[6], *lines[8:]],
    "of_some_threads": lambda lines: [re.sub("0;$", "1, 64;", x) for x in lines],
    "predicated": lambda lines: [x.replace("bar", "@%p1 bar") for x in lines],
    "relaxed": lambda lines: [x.replace("release", "relaxed") for x in lines],
    "no_acquire": lambda lines: [x for x in lines if "acquire" not in x],
    "two_releases": lambda lines: [*lines[:4], lines[3], *lines[4:]],
    "a_call": lambda lines: [*lines[:2], "	call.uni somewhere;", *lines[2:]],
    "nothing": lambda lines: [],
}


def test_block_barriers_are_found():
    assert group.memory_order(EXCHANGE) == "sbrpabls"
    assert group.has_block_barriers(EXCHANGE)
    assert group.has_block_barriers(EXCHANGE.replace("fence.acquire", "fence.acq_rel"))  # sm_80


@pytest.mark.parametrize("change", OTHER_LINES.values(), ids=OTHER_LINES)
def test_block_barriers_are_missed(change):
    assert not group.has_block_barriers("\n".join(change(EXCHANGE.splitlines())))


def test_block_barriers_are_kept_where_nothing_is_known():
    target = GPUTarget("cuda", 90, 32)
    with pytest.warns(UserWarning, match="block barriers are kept"):  # the interpreter's kernel
        assert group.needs_block_barriers.__wrapped__(target)
    assert group.needs_block_barriers(GPUTarget("hip", "gfx942", 64))
    assert group.compile_target(torch.device("cpu")) is None
    plan = make_plan(plan_request("lstm", 512, 2, 8, 1), LIMITS[90])
    assert group.sweep_constants(plan, 1, None)["BLOCK_BARRIER"]
