"""Bytes: what the tables claim is what interpreted launches load and store."""

import pytest
import torch
from sweeps import wide
from triton_cases import INTERPRETED, needs_kernels

needs_kernels()

import traffic  # noqa: E402


def real(*shape, dtype=torch.float32):
    if dtype == torch.int64:
        return torch.tensor([1234])
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.skipif(not INTERPRETED, reason="loads are counted in the interpreter")
@pytest.mark.parametrize(
    ("M", "format"),
    [(5, None), (5, "int8"), (5, "nf4"), (5, "int4"), (130, None), (130, "nf4"),
     wide(130, "int8"), wide(130, "int4")],
)  # fmt: skip
def test_issued_bytes_are_what_an_interpreted_launch_moves(monkeypatch, format, M):
    import aot

    monkeypatch.setattr(aot, "meta", real)  # weights with values: steps, scales and codes of 0
    found = traffic.launches(M, 128, 192, format, arch=80, R=5, make=real)
    kernels = set()
    for launch in found:
        loads, stores = traffic.counted(launch)
        for name in traffic.SMALL:
            loads.pop(name, None)
        moved = sum(loads.values()) + sum(stores.values())
        assert moved == traffic.issued(launch), (launch.kernel.__name__, loads, stores)
        kernels.add(launch.kernel.__name__)
    assert len(kernels) >= 4


@pytest.mark.parametrize("weight", [None, "int8", "nf4", "int4"])
@pytest.mark.parametrize("shape", traffic.SHAPES)
def test_forward_and_backward_move_at_most_045_of_the_eager_paths_bytes(shape, weight):
    ours = sum(map(traffic.compulsory, traffic.launches(*shape, weight)))
    assert ours <= 0.45 * traffic.eager(*shape, weight)


def test_the_table_is_what_the_code_says():
    import csv

    with open(traffic.RESULTS, newline="", encoding="utf-8") as file:
        recorded = list(csv.DictReader(file))
    assert recorded == [{k: str(v) for k, v in line.items()} for line in traffic.rows()]
