"""Compiled runs: the same training, everything put back, clear refusals, exact resume."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from training_models import factors, fit, plain, tiny

import minilora
from minilora.kernels import instruction_set
from minilora.running import compiling
from minilora.running.compiling import (
    compile_problem,
    compiled,
    private_cache,
    settle_compile,
)
from minilora.training import loop
from minilora.training.config import TrainConfig

ALLOWED = "autograd_cache_allow_custom_autograd_functions"
needs_compiler = pytest.mark.skipif(compile_problem() is not None, reason=str(compile_problem()))


def one_block():
    """A model of which one block has adapters and is compiled: half the time of `tiny`."""
    return minilora.inject(plain(), r=2, alpha=3, layers=[1])


def cannot(device="cpu"):
    return "InvalidCxxCompiler: No working C++ compiler found"


def test_settle_compile_asks_only_where_it_is_wanted(monkeypatch):
    monkeypatch.setattr(compiling, "compile_problem", cannot)
    cpu = torch.device("cpu")
    assert settle_compile(False, cpu) == (False, None)
    wanted, remark = settle_compile("auto", cpu)
    assert not wanted and "not compiled, since torch.compile does not work here: Inv" in remark
    with pytest.raises(
        RuntimeError, match=r"--compile \(in Python: compile=True\) needs torch.compile"
    ):
        settle_compile(True, cpu)
    with pytest.raises(RuntimeError, match="No working.* install Triton and a C compiler"):
        settle_compile(True, torch.device("cuda"))


def test_compile_problem_says_what_is_missing(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    assert compile_problem.__wrapped__() == "no compiler"


def test_what_runs_on_a_gpu_is_compiled_for_it(monkeypatch):
    """A compiler for CPUs takes long to try there, or is missing."""
    asked = []
    monkeypatch.setattr(compiling, "compile_problem", asked.append)
    assert settle_compile("auto", torch.device("cuda", 1)) == (True, None)
    assert asked == ["cuda"]


def test_config_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="compile must be True, False or 'auto'"):
        TrainConfig(compile="yes")


def test_blocks_that_hold_adapters_are_compiled_else_the_model(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: made.append(forward) or forward)
    one = minilora.inject(plain(), r=2, alpha=3, layers=[1])
    bare = plain()
    for model, every, wanted in (
        (one, False, [one.model.layers[1]]),
        (one, True, list(one.model.layers)),
        (bare, False, [bare]),
    ):
        made.clear()
        with compiled(model, True, every):
            assert [forward.__self__ for forward in made] == wanted


@needs_compiler
def test_a_compiled_run_trains_alike_and_leaves_no_trace():
    """With Inductor, so up to a minute where nothing is in its cache; later tests find it there."""
    torch.compiler.reset()  # variants that other tests made are not counted
    one, two = tiny(), tiny()
    before = {name: dict(module.__dict__) for name, module in two.named_modules()}
    eager = fit(one, max_steps=4, schedule="constant")
    counters.clear()
    quick = fit(two, max_steps=4, schedule="constant", compile=True)
    assert counters["aot_autograd"]["total"] == counters["stats"]["unique_graphs"] > 0
    after = {name: dict(module.__dict__) for name, module in two.named_modules()}
    assert {n: d.keys() for n, d in after.items()} == {n: d.keys() for n, d in before.items()}
    assert not two.compiled_loss
    assert quick.losses == pytest.approx(eager.losses, rel=1e-5)
    trained, expected = factors(two), factors(one)
    for name, value in trained.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    if hasattr(functorch, ALLOWED):  # the next process reads it all
        torch.compiler.reset()
        counters.clear()
        fit(tiny(), max_steps=1, compile=True)
        found = counters["aot_autograd"]
        assert found["autograd_cache_hit"] == found["total"] > 0
        assert not getattr(functorch, ALLOWED)


def test_a_plan_counts_before_blocks_are_compiled(monkeypatch):
    model, seen = one_block(), []

    def forecast(run, monitor):
        seen.append("forward" in run.model.model.layers[1].__dict__)

    monkeypatch.setattr(loop, "forecast", forecast)
    monkeypatch.setattr(compiling, "compile_problem", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    fit(model, max_steps=1, compile=True, plan=True)
    assert seen == [False]


def test_all_blocks_share_one_compiled_variant(monkeypatch):
    """The first one's input, an embedding that is frozen, needs no gradient of its own accord."""
    whole, counts = torch.compile, []
    monkeypatch.setattr(compiling, "compile_problem", lambda device: None)
    for layers in ([1], [1], [0, 1]):  # the loss may be compiled in the first run alone
        torch.compiler.reset()
        counter = CompileCounter()
        monkeypatch.setattr(torch, "compile", functools.partial(whole, backend=counter))
        model = minilora.inject(plain(), r=2, alpha=3, layers=layers)
        fit(model, max_steps=2, schedule="constant", compile=True)
        counts.append(counter.frame_count)
    assert counts[1] == counts[2] > 0


class Times(torch.autograd.Function):
    """x times 2, with a gradient that is wrong on purpose."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * 2

    @staticmethod
    def backward(ctx, grad_out):
        return grad_out * ctx.factor, None


@needs_compiler
def test_two_gradients_of_one_forward_are_two_entries_of_the_cache():
    found = []
    for factor in (2, 3, 2):
        torch.compiler.reset()
        x = torch.ones(5, requires_grad=True)
        model = nn.Module()
        model.forward = lambda x, factor=factor: Times.apply(x, factor)
        with compiled(model, True):
            model(x).sum().backward()
        found.append(x.grad.tolist())
    assert found == [[2.0] * 5, [3.0] * 5, [2.0] * 5]


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_compiled_run_over_codes_trains_alike(base, monkeypatch):
    """Traced with open shapes as fit does, one block and without Inductor: some seconds."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(whole, backend="aot_eager"))
    monkeypatch.setattr(compiling, "compile_problem", lambda device: None)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model = plain()
        minilora.quantize(model, base)
        models.append(minilora.inject(model, r=2, alpha=3, layers=[1]))
    eager = fit(models[0], max_steps=2, schedule="constant")
    quick = fit(models[1], max_steps=2, schedule="constant", compile=True)
    assert quick.losses == pytest.approx(eager.losses, rel=1e-5)


def test_compiled_runs_allow_more_variants_than_torch_does(monkeypatch):
    """Else the ninth model of a process would run uncompiled, without a word."""
    from torch._dynamo import config

    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    before = getattr(config, limit)
    with compiled(plain(), True):
        assert getattr(config, limit) >= 64
    assert getattr(config, limit) == before < 64


@needs_compiler
def test_a_block_with_its_own_forward_gets_it_back_also_after_an_error():
    model = tiny()
    own = model.model.layers[0].forward
    model.model.layers[0].forward = own
    with pytest.raises(KeyError), compiled(model, True):
        assert model.compiled_loss and model.model.layers[0].forward is not own
        raise KeyError
    assert model.model.layers[0].forward is own and "forward" not in model.model.layers[1].__dict__
    with compiled(model, False):
        assert not model.compiled_loss


@pytest.fixture
def quick(monkeypatch, pytestconfig):
    """Compile without Inductor, which takes half a minute for three models; --wide uses it."""
    if not pytestconfig.getoption("--wide"):
        traced = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", traced)


@needs_compiler
@pytest.mark.usefixtures("quick")
def test_resume_is_bit_exact_and_keeps_compile(tmp_path):
    whole, half, again = one_block(), one_block(), one_block()
    rest = {"schedule": "constant", "compile": True, "accumulate": 2}
    fit(whole, max_steps=2, **rest)
    fit(half, max_steps=1, out=tmp_path, **rest)
    with pytest.raises(ValueError, match="must keep its settings, but compile was True and is Fal"):
        fit(one_block(), max_steps=2, schedule="constant", accumulate=2, out=tmp_path, resume=True)
    fit(again, max_steps=2, out=tmp_path, resume=True, **rest)
    trained, expected = factors(again), factors(whole)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


@needs_compiler
@pytest.mark.usefixtures("quick")
def test_checkpointed_blocks_compile_too():
    eager, quick = one_block(), one_block()
    a = fit(eager, max_steps=2, checkpointing=True)
    b = fit(quick, max_steps=2, checkpointing=True, compile=True)
    assert b.losses == pytest.approx(a.losses, rel=1e-5)


@needs_compiler
@pytest.mark.skipif(os.name != "posix", reason="no modes here")
def test_what_torch_compiles_lies_in_a_folder_that_is_ours_alone(tmp_path, monkeypatch):
    """torch's own is one of a known name, whoever made it; some seconds, as it compiles."""
    from torch._inductor import config
    from torch._inductor.runtime.runtime_utils import cache_dir, default_cache_dir

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    planted = Path(default_cache_dir())
    planted.mkdir()
    planted.chmod(0o777)
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "ours"))
    ours = tmp_path / "ours" / "compiled" / instruction_set()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    headers = getattr(config, "cpp_cache_precompile_headers", False)  # torch 2.6 has none
    torch._dynamo.reset()
    with private_cache():
        assert torch.compile(lambda x: (x.cos() * 3).tan())(torch.ones(5)).shape == (5,)
        with private_cache():
            assert cache_dir() == str(ours)
        assert not getattr(
            config, "cpp_cache_precompile_headers", False
        )  # they would lie in the planted one
        assert cache_dir() == str(ours)
    assert list(planted.iterdir()) == []
    assert list(ours.rglob("*.so"))
    assert ours.stat().st_mode & 0o777 == 0o700
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert getattr(config, "cpp_cache_precompile_headers", False) == headers
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "users"))
    with private_cache():
        assert cache_dir() == str(tmp_path / "users")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(planted))  # torch's own doing
    tmp_path.chmod(0o777)  # now nothing here is ours alone
    with private_cache():
        inside = Path(cache_dir())
        assert inside.parent == tmp_path and inside.stat().st_mode & 0o777 == 0o700
    assert not inside.exists() and os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(planted)


_ONE = """
import torch
from minilora.running.compiling import private_cache
x = torch.linspace(-3, 3, 64 * 576).reshape(64, 576)
def one(x): return x.tanh() + 1
with private_cache():
    print(float((torch.compile(one)(x) - one(x)).abs().max()))
"""


def test_what_a_processor_can_is_told_apart():
    """In processes of their own, as torch decides once; test_code_for_another… shows why."""
    code = "from minilora.kernels import instruction_set; print(instruction_set())"
    told = [
        subprocess.check_output(
            [sys.executable, "-c", code], env=os.environ | {"ATEN_CPU_CAPABILITY": kind}
        )
        for kind in ("default", "avx2", "avx2")
    ]
    assert told[0] != told[1] == told[2]


@pytest.mark.wide
@needs_compiler
def test_code_for_another_processor_is_not_taken(tmp_path):
    """A home that two kinds of processor share; each compiles, half a minute in all.

    torch's own keys name no processor: code for sixteen numbers at a time gave garbage for eight.
    """
    wide = "avx512f" in minilora.hardware().flags
    for kind in ("avx512", "avx2") if wide else ("avx2", "default"):
        told = subprocess.run(
            [sys.executable, "-c", _ONE], capture_output=True, text=True, check=True, timeout=300,
            env=os.environ | {"MINILORA_CACHE": str(tmp_path), "ATEN_CPU_CAPABILITY": kind,
                              "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"},
        )  # fmt: skip
        assert float(told.stdout) < 1e-5
    assert len(list((tmp_path / "compiled").iterdir())) == 2
