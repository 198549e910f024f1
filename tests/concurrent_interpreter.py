"""Triton's interpreter with all programs of a grid alive at once, as in a cooperative launch.

The interpreter runs one program after the other, so a barrier among programs would never end. Here
each program has a thread, and one thread runs at a time: at every access to memory the seed decides
which program goes on. The same seed gives the same schedule again, and what the interpreter shares
among programs (its builder, its patches of `tl`) is never touched by two of them at once.

A store becomes visible late and out of order, as a GPU permits. Only a release publishes what its
program stored before, and of that only what a `tl.debug_barrier` separates from it, since one
thread executes the atomic for all. What is not modelled: a load that runs early or reads a stale L1
line, so a forgotten acquire or `.cg` is not found.
"""

import contextvars
import ctypes
import inspect
import math
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import triton
from triton.runtime import interpreter

BUILDER = interpreter.interpreter_builder
REAL = {
    name: getattr(BUILDER, f"create_{name}")
    for name in ("masked_load", "masked_store", "atomic_rmw", "atomic_cas")
}
RELEASES = (interpreter._ir.MEM_SEMANTIC.RELEASE, interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
POLLS = 20  # in vain, while nobody else can go on either: then a program is stuck
TRITON = str(Path(triton.__file__).parent)


class Hang(AssertionError):
    """Programs wait for what never happens; the message says which, where and at which step."""


class ProgramError(RuntimeError):
    """A program raised an exception, the cause of this one."""


class Stopped(BaseException):
    """Ends a program's thread: not an Exception, which the interpreter would wrap."""


@contextmanager
def concurrent_grid(seed: int = 0, timeout: float = 60.0) -> Iterator[None]:
    """All programs of a launch within run concurrently, in an order that follows from `seed`.

    Raises from the launch, after all its programs have been stopped:
        ProgramError: if a program raises.
        Hang: if all that are left poll addresses nobody writes to, or after `timeout` seconds.
    """
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1: with a GPU, the interpreter runs on demand only")
    rng = random.Random(seed)

    class Executor(interpreter.GridExecutor):
        def __init__(self, fn: Callable[..., None], *args: Any) -> None:
            super().__init__(fn, *args)
            self.fn = Collector(fn, rng, timeout)

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().__call__(*args, **kwargs)
            except interpreter.InterpreterError as error:
                if isinstance(error.__cause__, Hang | ProgramError):
                    raise error.__cause__ from error.__cause__.__cause__
                raise

    with mock.patch.object(interpreter, "GridExecutor", Executor):
        yield


class Collector:
    """Takes the place of a kernel in the interpreter's loop over the grid: runs all at its end."""

    def __init__(self, fn: Callable[..., None], rng: random.Random, timeout: float) -> None:
        self.fn, self.rng, self.timeout = fn, rng, timeout
        self.__name__, self.__globals__ = fn.__name__, fn.__globals__
        self.__signature__ = inspect.signature(fn)
        self.programs: list[Program] = []

    def __call__(self, **arguments: Any) -> None:
        pace = 10 ** self.rng.uniform(-2, 0)  # some programs are far slower than others
        self.programs.append(Program(BUILDER.grid_idx, partial(self.fn, **arguments), pace))
        if len(self.programs) == math.prod(BUILDER.grid_dim):
            Launch(self.programs, self.rng).run(self.timeout)


class Store:
    def __init__(self, *args: Any) -> None:
        self.args, self.addresses = args, args[0].data
        self.before_barrier = False

    def overlaps(self, addresses: np.ndarray) -> bool:
        mine = self.addresses
        apart = mine.max() < addresses.min() or addresses.max() < mine.min()
        return not apart and bool(np.isin(addresses, mine).any())


class Program:
    def __init__(self, index: tuple[int, ...], run: Callable[[], None], pace: float) -> None:
        self.index, self.run, self.pace = index, run, pace
        self.stores: list[Store] = []  # which the others do not see yet
        self.read: tuple[int, bytes] | None = None  # address and value of the last access
        self.polls = 0  # how often that read gave the same again
        self.waits = False  # for a write to that address
        self.turn = threading.Lock()  # held while it is another program's turn
        self.turn.acquire()
        self.done = False
        self.thread: threading.Thread

    def __str__(self) -> str:
        frames = []
        frame = sys._current_frames().get(self.thread.ident or 0)
        while frame is not None:
            frames.append((frame, frame.f_lineno))
            frame = frame.f_back
        return self.at(frames)

    def at(self, frames: list[tuple[FrameType, int]]) -> str:
        """Its index, its time step and its place in the kernel, given its innermost frame first."""
        text, places = f"program {self.index}", []
        steps: list[object] = []
        for frame, line in frames:
            code = frame.f_code
            # A kernel's module has the interpreter's names, once the interpreter has rewritten it.
            if "interpreter_semantic" in frame.f_globals and TRITON not in code.co_filename:
                places.append(f"{Path(code.co_filename).name}:{line} in {code.co_name}")
                found = (frame.f_locals.get(name) for name in ("step", "t"))
                steps += [x.handle.data.squeeze() if hasattr(x, "handle") else x for x in found]
        step = next((getattr(x, "value", x) for x in steps if x is not None), None)
        text += "" if step is None else f", step {step}"
        return f"{text}, {', called at '.join(places)}" if places else text

    def error(self, error: BaseException) -> ProgramError:
        frames: list[tuple[FrameType, int]] = []
        while True:
            frames[:0] = reversed(list(traceback.walk_tb(error.__traceback__)))
            if not isinstance(error, interpreter.InterpreterError) or error.__cause__ is None:
                break
            error = error.__cause__  # the interpreter wraps once per call of a jit function
        result = ProgramError(f"{self.at(frames)}: {error!r}")
        result.__cause__ = error
        return result


class Launch:
    """The programs of a launch, and whose turn it is. All but `run` is for whose turn it is."""

    def __init__(self, programs: list[Program], rng: random.Random) -> None:
        self.programs, self.rng = programs, rng
        self.current = programs[0]
        self.failure: Exception | None = None
        self.finished = threading.Event()
        # Some schedules switch at each access, some seldom; some delay stores as long as possible.
        self.stay = rng.choice((0.0, 0.5, 0.95))
        self.publishing = rng.choice((0.0, 0.1, 0.5))

    def run(self, timeout: float) -> None:
        """Run all programs to their ends; raise what went wrong."""
        hooks = {f"create_{name}": getattr(self, name) for name in (*REAL, "barrier")}
        if hasattr(BUILDER, "create_atomic_store"):
            hooks["create_atomic_store"] = self.atomic_store
        patch_lang = mock.patch.object(interpreter, "_patch_lang", self.patcher())
        with mock.patch.multiple(BUILDER, **hooks), patch_lang:
            for program in self.programs:
                # The context has numpy's error state and, from Python 3.14 on, warning filters.
                run = partial(contextvars.copy_context().run, self.run_program, program)
                program.thread = threading.Thread(target=run, daemon=True)
                program.thread.start()
            self.turn_over(None)
            if not self.finished.wait(timeout):
                self.failure = Hang(f"still running after {timeout} s: {self.current}")
                # They stop at their next access to memory. A loop without one, after a second.
                for _ in range(10):
                    if self.finished.wait(1):
                        break
                    ident = ctypes.c_ulong(self.current.thread.ident or 0)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Stopped))
            if self.finished.is_set():
                for program in self.programs:
                    program.thread.join()
        if self.failure is not None:
            raise self.failure

    @staticmethod
    def patcher() -> Callable[[Any], Any]:
        """The interpreter's patches of `tl`, once per module: it does them at every call."""
        seen, patch = set(), interpreter._patch_lang

        def patch_once(fn: Any) -> Any:
            if id(fn.__globals__) in seen:
                return interpreter._LangPatchScope()
            seen.add(id(fn.__globals__))
            return patch(fn)

        return patch_once

    def run_program(self, program: Program) -> None:
        try:
            self.await_turn(program)
            program.run()
            self.publish(program, list(program.stores))
        except Stopped:
            pass
        except BaseException as error:
            self.failure = self.failure or program.error(error)
        program.done = True
        self.turn_over(program)

    # Turns

    def await_turn(self, program: Program) -> None:
        program.turn.acquire()
        if self.failure is not None:
            raise Stopped
        BUILDER.grid_idx = program.index

    def turn_over(self, program: Program | None) -> bool:
        """Wake who is next, if that is not `program`; whether it is another."""
        alive = [p for p in self.programs if not p.done]
        if not alive:
            self.finished.set()
            return False
        chosen = self.choose(alive) if self.failure is None else alive[0]
        if chosen is program:
            return False
        self.current = chosen
        chosen.turn.release()
        return True

    def switch(self) -> Program:
        """Perhaps let others run; the program that goes on after that, the caller's."""
        me = self.current
        # Not `self.current is not me`: who was woken may have made that true again by now.
        if self.failure is None and self.turn_over(me):
            self.await_turn(me)
        if self.failure is not None:
            raise Stopped
        return me

    def choose(self, alive: list[Program]) -> Program:
        while self.rng.random() < self.publishing and self.publish_one():
            pass
        while all(p.waits for p in alive):
            if self.publish_one():
                continue
            for p in alive:
                if p.polls < POLLS:
                    return p
            ended = [f"program {p.index} has ended" for p in self.programs if p.done]
            self.failure = Hang("\n".join([f"{p} hangs" for p in alive] + ended))
            return alive[0]
        ready = [p for p in alive if not p.waits]
        if self.current in ready and self.rng.random() < self.stay:
            return self.current
        return self.rng.choices(ready, [p.pace for p in ready])[0]

    # Memory

    def publish(self, program: Program, stores: list[Store]) -> None:
        for store in stores:
            program.stores.remove(store)
            REAL["masked_store"](*store.args)
            self.written(store.addresses)

    def publish_one(self) -> bool:
        """Make some store visible, if there is one left."""
        where = [p for p in self.programs if p.stores]
        if where:
            program = self.rng.choice(where)
            self.publish(program, [self.rng.choice(program.stores)])
        return bool(where)

    def written(self, addresses: np.ndarray) -> None:
        for p in self.programs:
            if p.waits and p.read is not None and (addresses == p.read[0]).any():
                p.waits, p.polls = False, 0

    def access(self, addresses: np.ndarray) -> Program:
        """Before any access: a program sees its own stores, and one address has one order."""
        me = self.switch()
        self.publish(me, [s for s in me.stores if s.overlaps(addresses)])
        return me

    def release(self, program: Program, sem: Any) -> None:
        if sem in RELEASES:
            self.publish(program, [s for s in program.stores if s.before_barrier])

    def note(self, program: Program, addresses: np.ndarray, read: np.ndarray | None) -> None:
        """Note an access: one that reads the same from the same address again is a poll."""
        now = None if read is None or addresses.size > 1 else (addresses.item(), read.tobytes())
        program.waits = now is not None and now == program.read
        program.polls = program.polls + 1 if program.waits else 0
        program.read = now

    # In place of the builder's methods

    def barrier(self) -> None:
        for store in self.current.stores:
            store.before_barrier = True

    def masked_load(self, pointers: Any, *args: Any, **kwargs: Any) -> Any:
        me = self.access(pointers.data)
        result = REAL["masked_load"](pointers, *args, **kwargs)
        self.note(me, pointers.data, result.data)
        return result

    def masked_store(self, *args: Any) -> None:
        store = Store(*args)
        me = self.access(store.addresses)
        self.note(me, store.addresses, None)
        me.stores.append(store)

    def atomic_store(self, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> None:
        me = self.access(pointers.data)
        self.release(me, sem)
        self.note(me, pointers.data, None)
        REAL["masked_store"](pointers, value, mask, None)
        self.written(pointers.data)

    def atomic_rmw(self, op: Any, pointers: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        args = (op, pointers, val, mask, sem, scope)
        return self.atomic("atomic_rmw", pointers, mask.data, sem, args)

    def atomic_cas(self, pointers: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        mask = np.ones_like(pointers.data, dtype=bool)
        return self.atomic("atomic_cas", pointers, mask, sem, (pointers, cmp, val, sem, scope))

    def atomic(self, name: str, pointers: Any, mask: Any, sem: Any, args: tuple[Any, ...]) -> Any:
        me = self.access(pointers.data)
        self.release(me, sem)
        result = REAL[name](*args)
        old = result.data
        new = interpreter._interpreter.load(pointers.data, mask, old, old.dtype)
        if new.tobytes() == old.tobytes():  # it has changed nothing: a read
            self.note(me, pointers.data, old)
        else:
            self.note(me, pointers.data, None)
            self.written(pointers.data)
        return result
