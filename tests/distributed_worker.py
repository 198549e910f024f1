"""Run by test_distributed.py in two processes: gradients equal those of one process, by wrapper.

Prints "ok CASE" for each case that holds; an exception ends the run.
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_rnn

B, T, I, H = 4, 5, 3, 6


class Model(nn.Module):
    """A tagger, whose layers are sharded on their own by FSDP."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fused_rnn.FusedGRU(I, H, bidirectional=True, dtype=torch.float64)
        self.second = fused_rnn.FusedLSTM(2 * H, H, 2, dtype=torch.float64)
        self.head = nn.Linear(H, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.second(self.first(x)[0])[0])
        return output


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """The mean over the batch, so that the mean over two halves is the whole's."""
    output: Tensor = model(x)
    return output.square().mean()


def single(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of one process with the whole batch."""
    model = copy.deepcopy(model)
    loss(model, x).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Every parameter has its gradient."""
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad is not None, name
        full = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(full, expected[name], rtol=1e-10, atol=1e-13)


def ddp(rank: int, static_graph: bool) -> None:
    """Also over several steps, as a static graph needs."""
    model = Model()
    wrapped = DistributedDataParallel(copy.deepcopy(model), static_graph=static_graph)
    for _ in range(3):
        x = torch.randn(T, 2 * B, I, dtype=torch.float64)
        expected = single(wrapped.module, x)
        wrapped.zero_grad()
        loss(wrapped, x[:, rank * B : (rank + 1) * B]).backward()
        check(wrapped, expected)
        with torch.no_grad():
            for p in wrapped.parameters():
                p -= 0.1 * p.grad  # type: ignore[operator]


def uneven(rank: int) -> None:
    """One process has a batch more; both end with the same parameters."""
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Join([model]):
        for _ in range(2 + rank):
            optimizer.zero_grad()
            loss(model, torch.randn(T, B, I, dtype=torch.float64)).backward()
            optimizer.step()
    for p in model.parameters():
        mine = p.detach().clone()
        dist.broadcast(mine, src=1)  # the one that ran longer
        torch.testing.assert_close(p.detach(), mine, rtol=0, atol=0)


def empty(rank: int) -> None:
    """One process has no sequence, in every step; all parameters have gradients all the same."""
    wrapped = DistributedDataParallel(Model())
    for _ in range(3):
        x = torch.randn(T, B, I, dtype=torch.float64)
        expected = copy.deepcopy(wrapped.module)
        expected(x).sum().backward()
        wrapped.zero_grad()
        wrapped(x[:, : B * rank]).sum().backward()
        halves = {n: p.grad / 2 for n, p in expected.named_parameters() if p.grad is not None}
        check(wrapped, halves)


def fsdp(rank: int, reshard: bool) -> None:
    """Every layer and the model sharded; with ``reshard`` gathered a second time for backward."""
    model = Model()
    expected_model = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(expected_model.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(T, 2 * B, I, dtype=torch.float64)
        plain.zero_grad()
        loss(expected_model, x).backward()
        optimizer.zero_grad()
        loss(model, x[:, rank * B : (rank + 1) * B]).backward()
        check(model, {n: p.grad for n, p in expected_model.named_parameters()})  # type: ignore[misc]
        optimizer.step()
        plain.step()


def main() -> None:
    """All cases, or those named."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    cases = {
        "ddp": lambda: ddp(rank, static_graph=False),
        "static graph": lambda: ddp(rank, static_graph=True),
        "uneven inputs": lambda: uneven(rank),
        "empty batch": lambda: empty(rank),
        "fsdp": lambda: fsdp(rank, reshard=True),
        "fsdp without resharding": lambda: fsdp(rank, reshard=False),
    }
    for name, case in cases.items():
        torch.manual_seed(0)  # the same parameters and the same batch everywhere
        case()
        dist.barrier()
        if rank == 0:
            print("ok", name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
