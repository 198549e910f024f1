"""The sweep of random cases on a CPU: its cases, its tables from made-up lines, a tiny run."""

import dataclasses
from pathlib import Path

import pytest
import torch

from bench import records, report, sweep_cpu
from bench.cases import SETS, Case
from bench.providers import PROVIDERS, CompiledLoop, Fused, TorchNN
from bench.run import contender

CPU = torch.device("cpu")
MACHINE = records.Machine("cpu", "Some CPU", 1, None, "2.13.0", None, None, None, "abc")
CASE = Case("lstm", "fp32", T=4, B=3, I=17, H=18)
TINY = ["--cases", "2", "--groups", "random", "--seconds", "0", "--dtypes", "fp32"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def line(case: Case, ratio: float, ours: bool, **more) -> records.Line:
    """A made-up line: torch.nn takes 2 ms."""
    facts = {"shapes": "random", "mode": "train", "machine": MACHINE, "timer": "none"} | more
    who, ms = ("fused_rnn", 2 / ratio) if ours else ("torch.nn", 2.0)
    return records.Line(
        **dataclasses.asdict(case),
        **facts,
        provider=who,
        detail="the engine" if ours else "",
        ms=ms,
        p20=ms,
        p80=ms,
        samples=6,
        ratio=ratio if ours else 1.0,
        baseline="torch.nn",
    )


def made_up(case: Case, *ratios: float, **more) -> list[records.Line]:
    """A pair of lines for each ratio."""
    return [line(case, ratio, ours, **more) for ratio in ratios for ours in (False, True)]


def cells(table: str) -> list[list[str]]:
    """The body of a table."""
    return [[c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


# Cases


def test_cases_are_those_of_their_seed():
    found = sweep_cpu.random_cases(72, seed=3)
    assert found == sweep_cpu.random_cases(72, seed=3)
    assert found[:10] == sweep_cpu.random_cases(10, seed=3)
    assert not set(found) & set(sweep_cpu.random_cases(72, seed=4))


def test_cases_are_ordinary_and_of_every_kind():
    found = sweep_cpu.random_cases(2000, seed=0)
    for name, low, high in (("T", 1, 64), ("B", 1, 32), ("I", 16, 256), ("H", 16, 256)):
        sizes = {getattr(case, name) for case in found}
        assert (min(sizes), max(sizes)) == (low, high), name
    for name in ("cell", "dtype", "packed", "layers", "bidirectional"):
        values = [getattr(case, name) for case in found]
        expected = {"cell": 4, "dtype": 4}.get(name, 2)
        assert len(set(values)) == expected, name
        assert min(values.count(value) for value in set(values)) > 100, name
    assert sum(case.dtype == "fp32" for case in found) > 1000
    assert sum(case.T < 8 for case in found) > 800  # the logarithm is uniform
    assert {case.dtype for case in sweep_cpu.random_cases(50, 0, ["fp16", "bf16"])} == {
        "fp16",
        "bf16",
    }


def test_work_has_the_shapes_of_the_readme_too():
    args = sweep_cpu.parser().parse_args(["--cases", "3", "--threads", "1", "2", "1"])
    work = sweep_cpu.plan_work(args)
    readme = list(SETS["cpu"].make())
    assert len(work) == 2 * 2 * (3 + len(readme)) == len(set(work))
    assert [w[2] for w in work if w[0] == 2 and w[1] == "cpu" and w[3] == "train"] == readme


def test_a_stack_is_built_named_and_left_to_those_who_have_one():
    case = dataclasses.replace(CASE, layers=2, bidirectional=True)
    assert str(case) == "lstm fp32 T=4 B=3 I=17 H=18 layers=2 bidirectional"
    assert case.layer(CPU).num_layers == 2
    assert line(case, 1.0, True).where == "4, 3, 17, 18, 2 layers, bidirectional"
    one_way = dataclasses.replace(CASE, layers=2)
    assert CompiledLoop().why_not(one_way, "train", CPU) == "it has one layer"
    assert TorchNN().why_not(one_way, "train", CPU) is None
    assert "one layer" in Fused().why_not(one_way, "sweep", CPU)
    assert Fused().detail(case, CPU) == Fused().detail(dataclasses.replace(case, layers=1), CPU)


# Results


@pytest.mark.parametrize("mode", sweep_cpu.MODES)
@pytest.mark.parametrize("packed", [False, True])
def test_right_results_agree(mode, packed):
    """Packed inputs of fewer sequences than steps have different numbers of rows."""
    case = dataclasses.replace(CASE, T=9, packed=packed, layers=2)
    found = {p.name: contender(p, case, mode, CPU) for p in (TorchNN(), Fused())}
    for _ in range(3):
        sweep_cpu.agree(
            case,
            {name: out for name, (_, out, _) in found.items()},
            {name: run for name, (run, _, _) in found.items()},
        )


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_wrong_results_do_not_agree(wrong, place):
    """The output of the call that records, a result that is timed, and another one."""
    right = [torch.ones(3), torch.ones(4), torch.ones(5)]
    mine = [t * wrong if i == place else t for i, t in enumerate(right)]
    outputs = {"torch.nn": right[0], "ours": mine[0]}
    runs = {"torch.nn": lambda: tuple(right[1:]), "ours": lambda: tuple(mine[1:])}
    with pytest.raises(sweep_cpu.WrongResult, match=rf"result {place} of ours for lstm fp32 T=4"):
        sweep_cpu.agree(CASE, outputs, runs)
    sweep_cpu.agree(CASE, {"torch.nn": right[0]}, {"torch.nn": runs["torch.nn"]})


def test_gradients_that_are_zero_agree():
    zero = torch.zeros(3)
    both = {"torch.nn": zero, "ours": zero}
    sweep_cpu.agree(CASE, both, {name: lambda: (zero, zero) for name in both})


def test_a_run_ends_at_a_wrong_result_before_it_takes_a_time(monkeypatch):
    layer = Fused.layer

    def wrong(self, plain, case):
        module, forward = layer(self, plain, case)
        return module, lambda x: forward(x) * 1.01

    monkeypatch.setattr(Fused, "layer", wrong)
    monkeypatch.setattr("bench.timing.interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(sweep_cpu.WrongResult, match="of fused_rnn for"):
        sweep_cpu.main([*TINY, "--threads", "1"])


def test_a_run_ends_at_a_contender_that_fails(monkeypatch):
    def broken(*_):
        raise ValueError("broken")

    monkeypatch.setattr(Fused, "layer", broken)
    with pytest.raises(RuntimeError, match=r"fused_rnn cannot run .*: FAILED, ValueError: broken"):
        sweep_cpu.main([*TINY, "--threads", "1"])


# Tables


def test_the_distribution_by_hand():
    lines = made_up(CASE, 0.5, 0.94, 1.0, 2.0)
    lines += made_up(dataclasses.replace(CASE, T=1), 0.25)
    quantiles = ["0.50", "0.57", "0.83", "0.97", "1.25", "1.85", "2.00"]
    assert cells(sweep_cpu.distribution(sweep_cpu.pairs(lines))) == [
        ["random", "sequences", "train, 1 thread", "4", "25%", "50%", "50%", "0.98", *quantiles],
        ["random", "single steps", "train, 1 thread", "1", "100%", "100%", "0%", *["0.25"] * 8],
    ]


def test_the_distribution_has_modes_threads_and_groups_apart():
    two = dataclasses.replace(MACHINE, threads=2)
    lines = made_up(CASE, 0.5) + made_up(CASE, 2.0, machine=two, mode="forward")
    lines += made_up(CASE, 4.0, shapes="cpu")
    rows = cells(sweep_cpu.distribution(sweep_cpu.pairs(lines)))
    assert [(row[0], row[2], row[3], row[7]) for row in rows] == [
        ("random", "all", "2", "1.00"),
        ("random", "train, 1 thread", "1", "0.50"),
        ("random", "forward, 2 threads", "1", "2.00"),
        ("cpu", "all", "1", "4.00"),
        ("cpu", "train, 1 thread", "1", "4.00"),
    ]


def test_means_by_hand():
    gru = dataclasses.replace(CASE, cell="gru", dtype="bf16", T=16, packed=True, layers=2)
    lines = made_up(CASE, 1.0, 4.0) + made_up(gru, 0.5)
    lines += made_up(dataclasses.replace(CASE, T=1), 0.1)
    assert cells(sweep_cpu.means(sweep_cpu.pairs(lines))) == [
        ["T", "1", "0.10 (1)"],
        ["T", "2 to 15", "2.00 (2)"],
        ["T", "16 to 64", "0.50 (1)"],
        ["cell", "GRU", "0.50 (1)"],
        ["cell", "LSTM", "2.00 (2)"],
        ["type", "fp32", "2.00 (2)"],
        ["type", "bf16", "0.50 (1)"],
        ["lengths", "equal", "2.00 (2)"],
        ["lengths", "packed", "0.50 (1)"],
        ["layers", "1", "2.00 (2)"],
        ["layers", "2", "0.50 (1)"],
        ["directions", "1", "1.26 (3)"],
    ]


def test_the_worst_come_first_with_what_ran():
    rows = cells(
        sweep_cpu.worst(sweep_cpu.pairs(made_up(CASE, *(n / 10 for n in range(12, 0, -1)))))
    )
    assert [row[0] for row in rows] == [f"{n / 10:.2f}" for n in range(1, 11)]
    case = ["LSTM", "fp32", "4, 3, 17, 18", "train, 1 thread"]
    assert rows[4][1:] == [*case, "2.000", "4.000", "the engine"]


def test_lines_that_are_no_pairs_are_refused():
    lines = made_up(CASE, 1.0, 2.0)
    other = line(dataclasses.replace(CASE, B=4), 1.0, True)
    for bad in (lines[:3], lines[1:3], lines[::-1], [lines[0], other], [lines[0], lines[0]]):
        with pytest.raises(ValueError, match="do not come in pairs"):
            sweep_cpu.tables(bad)


def test_one_is_an_edge_of_the_histogram():
    for ratios in ([0.3, 2.0], [1.0], [0.999, 1.001], [0.01, 300.0]):
        edges = sweep_cpu._edges(ratios)
        assert 1.0 in edges
        assert edges[0] <= min(ratios) <= max(ratios) <= edges[-1]
        assert len(edges) < 50


# The command


def test_a_tiny_run(tmp_path, capsys):
    picture = tmp_path / "pictures" / "sweep.png"
    flags = ["--out", str(tmp_path / "lines"), "--plot", str(picture)]
    assert sweep_cpu.main([*TINY, "--threads", "1", "2", *flags]) == 0
    printed = capsys.readouterr().out
    assert "**torch.nn's time over that of fused_rnn**" in printed
    assert picture.stat().st_size > 1000
    (path,) = (tmp_path / "lines").iterdir()
    lines = records.read([path])
    expected = sweep_cpu.random_cases(2, 0, ["fp32"])
    assert len(lines) == 2 * 2 * 2 * 2
    assert {x.seed for x in lines} == {0}
    assert {x.machine.threads for x in lines} == {1, 2}
    assert {(x.cell, x.T, x.layers) for x in lines} == {(c.cell, c.T, c.layers) for c in expected}
    for ours in lines[1::2]:
        assert ours.detail
        assert ours.difference < 1e-5
    assert sweep_cpu.main(["--read", str(path.parent)]) == 0
    assert capsys.readouterr().out == printed


def test_torch_nn_beside_itself(capsys):
    assert sweep_cpu.main([*TINY, "--threads", "1", "--modes", "forward", "--null"]) == 0
    printed = capsys.readouterr().out
    assert "**torch.nn's time over that of torch.nn, again**" in printed
    assert "fused_rnn**" not in printed
    assert PROVIDERS["torch.nn"].name == "torch.nn"


def test_what_runs_is_told_for_the_mode(monkeypatch):
    """An engine may be chosen by whether gradients are recorded."""
    monkeypatch.setattr(Fused, "detail", lambda *_: str(torch.is_grad_enabled()))
    for mode, expected in (("forward", "False"), ("train", "True")):
        args = sweep_cpu.parser().parse_args(TINY)
        found = list(sweep_cpu.lines_of("random", CASE, mode, MACHINE, args))
        assert found[1].detail == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cases", "0"], "argument --cases: must be at least 1"),
        (["--threads", "0"], "argument --threads: must be at least 1"),
        (["--seconds", "nan"], "argument --seconds: must be in"),
        (["--seed", "one"], "argument --seed: invalid int value"),
        (["--dtypes", "tf32"], "argument --dtypes: invalid choice"),
        (["--modes", "sweep"], "argument --modes: invalid choice"),
        (["--groups", "grid"], "argument --groups: invalid choice"),
    ],
)
def test_bad_options_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep_cpu.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_lines_of_old_have_one_layer_and_no_seed():
    lines = records.read(report.files([Path(report.RESULTS)]))
    assert {(x.layers, x.seed) for x in lines} == {(1, None)}
