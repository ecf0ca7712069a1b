"""lamina.integrations.tensor_parallel: a layer divided between two ranks gives what the whole one gives."""

import copy

import pytest
import torch
from tolerances import INT8_LAYER_SQNR_DB, assert_exact, assert_lossy
from torch import nn

import lamina

SECONDS = 240


class MLP(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(40, hidden), nn.GELU(), nn.Linear(hidden, 24)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def run(rank: int, rendezvous: str) -> None:
    """What each of the two ranks does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for check in CHECKS:
        check(rank, mesh)
    torch.distributed.destroy_process_group()


def parallel(module: nn.Module, mesh, plan, **options) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    return parallelize_module(copy.deepcopy(module), mesh, plan, **options)


def styles():
    from lamina.integrations.tensor_parallel import ColwiseParallel, RowwiseParallel

    return ColwiseParallel, RowwiseParallel


def check_columns(rank: int, mesh) -> None:
    """Each rank has the bits of its outputs, also where two do not divide them, and of all of them if asked."""
    from torch.distributed.tensor import Replicate

    colwise, _ = styles()
    for outputs in (32, 33, 1):
        torch.manual_seed(outputs)
        whole = lamina.nn.Int8Linear.from_float(nn.Linear(40, outputs), "gelu")
        x = torch.randn(3, 5, 40)
        expected = whole(x)
        part = expected[..., : -(-outputs // 2)] if rank == 0 else expected[..., -(-outputs // 2) :]
        assert_exact(parallel(whole, mesh, colwise())(x), part.contiguous())
        assert_exact(parallel(whole, mesh, colwise(output_layouts=Replicate()))(x), expected)


def check_mlp(rank: int, mesh) -> None:
    colwise, rowwise = styles()
    for hidden, dtype in ((64, torch.float32), (67, torch.float32), (64, torch.bfloat16)):
        torch.manual_seed(hidden)
        dense = MLP(hidden).to(dtype)
        whole = copy.deepcopy(dense)
        lamina.swap_(whole, lamina.Int8Dynamic())
        divided = parallel(whole, mesh, {"up": colwise(), "down": rowwise()})
        x = torch.randn(3, 5, 40, dtype=dtype)
        y = divided(x)
        assert y.dtype == dtype
        least = INT8_LAYER_SQNR_DB - 3  # two layers
        assert_lossy(y, dense.double()(x.double()), min_sqnr_db=least)
        assert_lossy(y, whole(x), min_sqnr_db=least)
        assert (divided.up.out_features, divided.down.in_features) == ((hidden + 1 - rank) // 2,) * 2


def check_rows(rank: int, mesh) -> None:
    """With a static scale nothing but float32 sums differs; bias and activation come once, after the sum."""
    from torch.distributed.tensor import Shard

    _, rowwise = styles()
    torch.manual_seed(1)
    for activation in (None, "relu", "gelu"):
        whole = lamina.nn.Int8Linear.from_float(nn.Linear(50, 20), activation, input_scale=0.03)
        x = torch.randn(4, 50)
        mine = x[:, 25 * rank : 25 * rank + 25].contiguous()
        assert_lossy(parallel(whole, mesh, rowwise())(mine), whole(x), min_sqnr_db=120)
        scattered = parallel(whole, mesh, rowwise(output_layouts=Shard(0)))(mine)
        assert_lossy(scattered, whole(x)[2 * rank : 2 * rank + 2], min_sqnr_db=120)


def check_other_layers(rank: int, mesh) -> None:
    colwise, rowwise = styles()
    torch.manual_seed(2)
    linear = nn.Linear(64, 48)
    lamina.prune.magnitude_(linear, 0.5, "4x4")
    x = torch.randn(3, 64)
    mine = x[:, 32 * rank : 32 * rank + 32].contiguous()
    for whole, least in (
        (lamina.nn.SparseLinear.from_float(linear, "relu", pattern="4x1"), 110),
        (lamina.nn.SparseInt8Linear.from_float(linear), INT8_LAYER_SQNR_DB),
        (lamina.nn.Int8WeightOnlyLinear.from_float(linear), 90),
    ):
        expected = whole(x)
        columns = parallel(whole, mesh, colwise())(x)
        assert_lossy(columns, expected[:, 24 * rank : 24 * rank + 24], min_sqnr_db=110)
        assert_lossy(parallel(whole, mesh, rowwise())(mine), expected, min_sqnr_db=least)
    # What is not lamina's is torch's.
    dense = parallel(linear, mesh, rowwise())
    assert_lossy(dense(mine), linear(x), min_sqnr_db=110)
    try:
        parallel(lamina.nn.Int4WeightOnlyLinear.from_float(linear), mesh, colwise())
    except NotImplementedError as error:
        assert str(error) == "Int4WeightOnlyLinear: its weight cannot be divided among ranks"  # noqa: PT017
    else:
        raise AssertionError("int4 was divided")


def check_weights_come_from_the_first_rank(rank: int, mesh) -> None:
    colwise, _ = styles()
    torch.manual_seed(3)
    first = lamina.nn.Int8Linear.from_float(nn.Linear(40, 32))
    torch.manual_seed(3 + rank)
    own = lamina.nn.Int8Linear.from_float(nn.Linear(40, 32))
    x = torch.ones(2, 40)
    rows = slice(16 * rank, 16 * rank + 16)
    assert_exact(parallel(own, mesh, colwise())(x), first(x)[:, rows].contiguous())
    assert_exact(parallel(own, mesh, colwise(), src_data_rank=None)(x), own(x)[:, rows].contiguous())


def check_gradients(rank: int, mesh) -> None:
    """The straight-through gradient for the input, as the whole model has it, on every rank."""
    colwise, rowwise = styles()
    torch.manual_seed(4)
    whole = MLP(64)
    lamina.swap_(whole, lamina.Int8Dynamic())
    divided = parallel(whole, mesh, {"up": colwise(), "down": rowwise()})
    x = torch.randn(3, 40)
    ours, truth = x.clone().requires_grad_(), x.clone().requires_grad_()
    divided(ours).sum().backward()
    whole(truth).sum().backward()
    assert_lossy(ours.grad, truth.grad, min_sqnr_db=INT8_LAYER_SQNR_DB)


CHECKS = (
    check_columns,
    check_mlp,
    check_rows,
    check_other_layers,
    check_weights_come_from_the_first_rank,
    check_gradients,
)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_subprocess_two_ranks(tmp_path):
    context = torch.multiprocessing.spawn(run, (str(tmp_path / "rendezvous"),), nprocs=2, join=False)
    try:
        assert context.join(timeout=SECONDS, grace_period=5) or context.join(timeout=SECONDS, grace_period=5)
    finally:
        for process in context.processes:
            process.kill()
