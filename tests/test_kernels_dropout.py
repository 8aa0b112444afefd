"""Dropout's masks: how often they keep, row by row, hashed; and what drawing one costs."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.kernels import dropout_mask, lora_add, row_masks
from minilora.kernels.dropout import hashed_mask, row_seeds


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_mask_keeps_one_minus_p(p):
    x = torch.empty(400, 500, dtype=torch.bfloat16)
    mask = dropout_mask(x, p)
    assert mask.shape == x.shape
    assert mask.dtype == torch.bool
    # 5 standard deviations of a binomial proportion of 200,000 draws
    tolerance = 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float(mask.float().mean()) - (1 - p)) < tolerance
    rows = mask.float().mean(1)  # no row is favoured
    assert float((rows - (1 - p)).abs().max()) < 6 * (p * (1 - p) / 500) ** 0.5


class Passes(TorchDispatchMode):
    """Names the operators that write a matrix of this many elements, and their dtypes."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.size and not func.is_view:
            self.seen.append((func._schema.name.removeprefix("aten::"), out.dtype))
        return out


@pytest.mark.parametrize(
    ("device", "drawn", "applied"),
    [
        ("cpu", ["empty_like", "bernoulli_", "_to_copy"], ["mul", "mul"]),
        ("cuda", ["empty_like", "bernoulli_"], ["mul"]),
    ],
)
def test_dropout_on_cuda_takes_fewer_passes(device, drawn, applied):
    """On fake tensors: nothing is computed, and there need be no device."""
    with FakeTensorMode(), torch.no_grad():
        x, A, B = (torch.empty(s, device=device, dtype=torch.bfloat16) for s in
                   ((96, 40), (4, 40), (50, 4)))  # fmt: skip
        with Passes(x.numel()) as passes:
            mask = dropout_mask(x, 0.1)
        assert [name for name, _ in passes.seen] == drawn
        assert mask.dtype == torch.bool
        y = torch.empty(96, 50, device=device, dtype=torch.bfloat16)
        with Passes(x.numel()) as passes:
            lora_add(y, x, A, B, 1.5, mask, 0.1)
        assert [name for name, _ in passes.seen if name != "_to_copy"] == applied


# --- masks row by row


def masks(seeds, x, p=0.4, calls=2):
    torch.manual_seed(3)
    with row_masks(seeds):
        return [dropout_mask(x, p) for _ in range(calls)]


def test_row_masks_do_not_depend_on_the_rows_beside_them():
    x = torch.randn(5, 7, 11)
    whole = masks([1, 2, 3, 4, 5], x)
    for call in range(2):
        parts = [masks([1, 2], x[:2]), masks([3], x[2:3]), masks([4, 5], x[3:])]
        assert torch.equal(torch.cat([part[call] for part in parts]), whole[call])
        longer = masks([4, 1], torch.randn(2, 9, 11))[call]  # more padding: the same beginning
        assert torch.equal(longer[:, :7], whole[call][[3, 0]])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0][0], whole[0][1])
    flat = masks([1, 2, 3, 4, 5], x.view(35, 11))
    assert torch.equal(flat[0].view(5, 7, 11), whole[0])


def test_row_masks_are_kept_with_the_right_probability():
    mask = masks(list(range(50)), torch.randn(50, 40, 40), p=0.3)[0]
    assert abs(float(mask.float().mean()) - 0.7) < 0.01
    assert abs(float(mask.float().mean((1, 2)).std()) - (0.21 / 1600) ** 0.5) < 0.005


def test_row_masks_end_with_the_block_and_skip_what_has_other_rows():
    x = torch.randn(5, 3)
    outside = masks([], x)[0]
    with pytest.raises(KeyError), row_masks([1]):
        raise KeyError
    torch.manual_seed(3)
    assert torch.equal(dropout_mask(x, 0.4), outside)
    assert torch.equal(masks([1, 2], x)[0], outside)  # 5 rows are not 2 rows' tokens


def test_traced_row_masks_do_not_depend_on_the_rows_beside_them():
    x, p = torch.randn(5, 7, 11), 0.4
    traced = torch.compile(
        lambda x: dropout_mask(x, p), backend="aot_eager", dynamic=True, fullgraph=True
    )

    def drawn(seeds, x):
        torch.manual_seed(3)
        with row_masks(seeds):
            return traced(x)

    whole = drawn([1, 2, 3, 4, 5], x)
    parts = [drawn([1, 2], x[:2]), drawn([3], x[2:3]), drawn([4, 5], x[3:])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(drawn([4, 1], torch.randn(2, 9, 11))[:, :7], whole[[3, 0]])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(drawn([1, 2, 3, 4, 6], x)[4], whole[4])
    wide = drawn(list(range(50)), torch.randn(50, 40, 40))
    assert abs(float(wide.float().mean()) - (1 - p)) < 0.01
    assert abs(float(wide.float().mean((1, 2)).std()) - (p * (1 - p) / 1600) ** 0.5) < 0.005


def test_hashed_masks_of_neighbouring_rows_are_apart():
    """No two lines or columns are alike, of seeds that differ in one bit as those of `fit` do."""
    x = torch.empty(5, 40, 200)
    with row_masks([1, 2, 3, 1 + 2**32, 2**62]):
        lines = hashed_mask(row_seeds(x), 200, 200, 0.5).double() * 2 - 1
    for apart in (lines @ lines.t(), lines.t() @ lines):
        assert float((apart / 200).fill_diagonal_(0).abs().max()) < 6 / 200**0.5


def test_row_masks_of_rows_with_their_own_probability():
    x, p = torch.randn(4, 9, 30), torch.tensor([0.0, 0.3, 0.9, 0.3])[:, None, None]
    whole = masks([1, 2, 3, 4], x, p, calls=1)[0]
    half = masks([3, 4], x[2:], p[2:], calls=1)[0]
    assert torch.equal(whole[2:], half)
    assert whole[0].all()
    assert abs(float(whole[2].float().mean()) - 0.1) < 0.08


def test_a_compiled_mask_multiplies_its_columns_by_32_bits():
    """Inductor folds a product with an index into it, in int32 on a GPU: others did not compile."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda seeds: hashed_mask(seeds, 6, 8, 0.5))(torch.tensor([5])).graph
    views = ("aten.unsqueeze", "aten.slice", "aten.arange", "aten.floor_divide", "aten.remainder")
    factors = [
        node.args[1]
        for node in graph.nodes
        if str(node.target).startswith("aten.mul")
        and str(node.args[0].target).startswith(views)
        and isinstance(node.args[1], int)
    ]
    assert factors and all(-(2**31) <= factor < 2**31 for factor in factors)


# --- where the seeds are


class Copies(TorchDispatchMode):
    """Counts the copies from one device to another."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "aten::_to_copy" and "device" in (kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "each"), [("meta", 0), ("cpu", 1)])
def test_seeds_that_are_on_the_device_are_not_copied_again(device, each):
    """The meta device stands for a GPU, where a copy from the CPU waits for all that was begun."""
    x, graphs = torch.empty(4, 3, 8, device="meta"), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    traced = torch.compile(
        lambda x: dropout_mask(x, 0.1), backend=aot_autograd(fw_compiler=keep), fullgraph=True
    )
    with row_masks([1, 2], device):
        with Copies() as copies:
            assert [row_seeds(x).shape for _ in range(3)] == [(2,)] * 3
        assert copies.count == 3 * each
        traced(x)
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    moved = [n for n in nodes if "_to_copy" in str(n.target) and "device" in n.kwargs]
    assert len(graphs) == 1 and len(moved) == each


def test_seeds_go_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch):
    told, pinned = [], torch.zeros(3, dtype=torch.int64)

    def pin(tensor):
        return pinned.copy_(tensor)

    def to(tensor, device, non_blocking=False):
        told.append((tensor is pinned, device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    gpu = torch.device("cuda", 1)
    with row_masks([5, 6, 7], gpu):
        pass
    assert told == [(True, gpu, True)]
    with row_masks([5, 6, 7]):
        pass
    assert told[1:] == [(False, "cpu", False)]
    assert len(set(pinned.tolist())) == 3
