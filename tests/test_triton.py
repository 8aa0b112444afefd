"""The kernels without a GPU: the interpreter's own process, lowering by torch.compile, reasons.

Triton decides when it is imported whether to interpret, so the files that run kernels skip here
and run in a process with TRITON_INTERPRET=1; on a machine with CUDA they run here as well.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from triton_cases import INSTALLED, INTERPRETED

from minilora.kernels import check_backend
from minilora.kernels.triton import problem as triton_problem

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process itself")
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton 3.4 or newer is not installed")


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_triton
def test_kernels_pass_in_the_interpreter(tmp_path, tally, pytestconfig):
    """Over 5 s: the interpreter runs each program of each launch as numpy."""
    report = tmp_path / "report.xml"
    files = sorted(TESTS.glob("test_triton_*.py"))
    wide = ["--wide"] if pytestconfig.getoption("--wide") else []
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *wide, *files,
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    cases = ElementTree.parse(report).getroot().iter("testcase")
    ran = [case for case in cases if case.find("skipped") is None]
    assert {case.get("classname").split(".")[-1] for case in ran} >= {
        file.stem for file in files if file.stem != "test_triton_aot"
    }
    tally["interpreter tests"] = len(ran)


LOWERED = """
import torch, triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from minilora.kernels.triton.lora import lora_dense
from minilora.kernels.triton.stored import lora_stored

class Driver:  # what a GPU would answer: the analysis of mutated arguments compiles to TTIR
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

def linear(x, w, A, B, seed):
    return [lora_dense(x, w.t(), None, A, B, 2.0, seed, 0.1)]

def over_int8(x, codes, bits, A, B, seed):
    return [lora_stored(x, [codes, bits], None, A, B, 2.0, "int8", 0, "int8", "int8", seed, 0.1)]

def show(joint):
    for node in joint.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            written = ",".join(node.kwargs["tensors_to_clone"])
            print(getattr(kernel, "fn", kernel).__name__, written)
        elif "minilora" in str(node.target):
            print("opaque", node.target)

with FakeTensorMode():
    x = torch.empty(512, 256, dtype=torch.float16, requires_grad=True)
    w = torch.empty(384, 256, dtype=torch.float16)
    A, B = torch.empty(16, 256, requires_grad=True), torch.empty(384, 16, requires_grad=True)
    seed = torch.empty(1, dtype=torch.int64)
    show(aot_export_joint_simple(linear, (x, w, A, B, seed), trace_joint=True))
    stored = torch.empty(384, 256, dtype=torch.int8), torch.empty(384, dtype=torch.int32)
    show(aot_export_joint_simple(over_int8, (x, *stored, A, B, seed), trace_joint=True))
"""


@needs_triton
def test_forward_and_backward_lower_to_the_kernels_in_one_graph():
    """What Inductor is given: every launch by name, and the only arguments each one writes."""
    done = python("-c", LOWERED)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split("\n")[:-1] == [
        "shrink s_ptr",
        "low_rank_gemm y_ptr",
        "expand_grad grad_s_ptr,partial_ptr",
        "sum_partials out_ptr",
        "sum_partials out_ptr",
        "tall_product partial_ptr",
        "sum_partials out_ptr",
        "low_rank_gemm y_ptr",
        "quantize_shrink p_ptr,t_ptr,s_ptr",
        "int8_gemm y_ptr",
        "quantize_shrink p_ptr,t_ptr,s_ptr",
        "tall_product partial_ptr",
        "sum_partials out_ptr",
        "tall_product partial_ptr",
        "sum_partials out_ptr",
        "decode_int8 out_ptr",
        "int8_gemm y_ptr",
    ]


DYNAMIC = """
import sys
import torch, triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget
from minilora.kernels.triton.lora import lora_dense
from minilora.kernels.triton.stored import lora_stored
sys.path.insert(0, "benchmarks")  # PYTHONSAFEPATH leaves it out
from aot import stored_weight

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])

for format, way in ((None, ""), ("int8", "int8"), ("int4", "int8"), ("int4", "dequantize"),
                    ("nf4", "dequantize")):
    def linear(x, A, B, seed, *parts):
        if format is None:
            return [lora_dense(x, parts[0].t(), None, A, B, 2.0, seed, 0.1)]
        options = format, 0 if format == "int8" else 64, way, way
        return [lora_stored(x, list(parts), None, A, B, 2.0, *options, seed, 0.1)]

    for M in map(int, sys.argv[1:]):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        x = torch.empty(M, 256, dtype=torch.float16, requires_grad=True)
        x = mode.from_tensor(x, symbolic_context=sizes)
        with mode:
            A = torch.empty(16, 256, requires_grad=True)
            B = torch.empty(384, 16, requires_grad=True)
            seed = torch.empty(1, dtype=torch.int64)
            parts = [torch.empty(384, 256, dtype=torch.float16)]
            if format is not None:
                parts = [torch.empty(t.shape, dtype=t.dtype)
                         for t in stored_weight(format, 384, 256).parts]
            aot_export_joint_simple(linear, (x, A, B, seed, *parts), trace_joint=True)
        if mode.shape_env.replacements:
            print(format, way, M, mode.shape_env.replacements)
"""


@needs_triton
def test_a_compiled_graph_serves_batches_of_other_sizes(pytestconfig):
    """No size of a batch becomes a constant of the graph, which each new size would rebuild."""
    sizes = (5, 40, 512, 20000) if pytestconfig.getoption("--wide") else (5, 512)
    done = python("-c", DYNAMIC, *sizes)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == ""


def test_what_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr("minilora.kernels.triton.version", lambda: None)
    with pytest.raises(
        RuntimeError,
        match=r"backend='triton' cannot run: triton is not installed \(torch's CUDA builds bring "
        r"theirs\); use backend='auto' or 'torch'",
    ):
        check_backend("triton")
    monkeypatch.setattr("minilora.kernels.triton.version", lambda: (3, 3))
    with pytest.raises(
        RuntimeError, match=r"need triton 3\.4, which torch 2\.8 brings, found 3\.3;"
    ):
        check_backend("triton")
    monkeypatch.setattr("minilora.kernels.triton.version", lambda: (3, 4))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: there is no CUDA device"):
        check_backend("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match="need compute capability 8.0, this device has 7.5"):
        check_backend("triton")
    capabilities = {None: (9, 0), torch.device("cuda:0"): (9, 0), torch.device("cuda:1"): (7, 0)}
    monkeypatch.setattr("torch.cuda.get_device_capability", capabilities.__getitem__)
    assert triton_problem(torch.device("cuda:0")) is None
    assert triton_problem(torch.device("cuda:1")) == (  # the tensors' device, not the current one
        "the kernels need compute capability 8.0, this device has 7.0"
    )
    assert triton_problem() is None
    check_backend("triton")


def test_an_input_off_the_gpu_raises_with_the_reason(monkeypatch):
    from minilora.kernels import FrozenLinear, dense_forward, dense_grad_x, triton_lora_linear

    monkeypatch.setattr("minilora.kernels.triton.version", lambda: (3, 4))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    base = FrozenLinear((torch.zeros(3, 2), None), dense_forward, dense_grad_x)
    with pytest.raises(
        RuntimeError,
        match="backend='triton' cannot run: the input is on cpu, and kernels run on CUDA",
    ):
        triton_lora_linear(torch.zeros(4, 2), base, torch.zeros(1, 2), torch.zeros(3, 1), 1.0)


def test_a_machine_without_triton_imports_and_trains():
    code = """
import sys
sys.modules["triton"] = None  # what an import of a missing package meets
import torch, minilora
from minilora.kernels.triton import version
assert version() is None
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
minilora.inject(model, r=2, alpha=3, targets="all-linear", exclude=[])
model(torch.randn(3, 4)).sum().backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_triton
def test_the_gpu_benchmark_says_that_it_needs_a_device(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a CUDA device, and torch sees none; nothing was timed" in capsys.readouterr().out


@needs_triton
def test_the_gpu_benchmark_checks_every_shape_it_times():
    import gpu_layers

    assert {case[:3] for case in gpu_layers.cases()} >= set(gpu_layers.SHAPES)


@needs_triton
@pytest.mark.parametrize("four_bit", [False, True])
def test_the_gpu_benchmark_gives_peft_the_same_work(monkeypatch, four_bit):
    """PEFT's branch in bf16, and 4-bit weights that bitsandbytes decodes to bf16."""
    pytest.importorskip("peft")
    if four_bit:
        pytest.importorskip("bitsandbytes")
    import gpu_layers

    monkeypatch.setattr(gpu_layers, "DEVICE", "cpu")
    model = gpu_layers.peft(128, 64, four_bit)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2
    assert {p.dtype for p in trained} == {torch.bfloat16}
    if four_bit:
        assert model.base_model.model[0].base_layer.weight.quant_state.dtype == torch.bfloat16
