"""The machine code of the main tiles for sm_80 and sm_90, compiled without a GPU."""

import re

import pytest
from triton_cases import INSTALLED, INTERPRETED

if not INSTALLED or INTERPRETED:
    pytest.skip("needs triton, not interpreted", allow_module_level=True)

import aot
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minilora.kernels.triton.tiles import Tile

CASES = {case.key: case for case in aot.listed("chosen_cases")}
# Without --wide each kernel once for each architecture, and what the tests below compare.
FIRST = {(c.launch.kernel.__name__, c.arch): key for key, c in reversed(CASES.items())}
SHORT = {*FIRST.values(), *(key for key in CASES if "decode" in key or ", codes" in key)}

TURNED = "decode_int4 backward int4 int8"  # codes that are written turned over


@pytest.fixture(scope="session")
def compiled(tally, pytestconfig):
    """What a compiler takes seconds a kernel for."""
    keys = None if pytestconfig.getoption("--wide") else SHORT
    rows = aot.rows("chosen_cases", keys=keys)
    found = {f"{r['case']} {r['dtype']} {r['arch']}": r for r in rows}
    tally["kernels compiled ahead of time"] = len(found)
    return found


def test_the_suite_compiles_enough_and_not_too_much():
    assert 40 <= len(CASES) == len(aot.listed("chosen_cases")) <= 150
    assert len(SHORT) < len(CASES) / 2
    kernels = {case.launch.kernel.__name__ for case in aot.listed("all_cases")}
    for arch in aot.ARCHITECTURES:
        chosen = [c for c in aot.listed("chosen_cases") if c.arch == arch]
        assert {c.launch.kernel.__name__ for c in chosen} == kernels


@pytest.mark.parametrize("key", CASES)
def test_machine_code_is_as_required_and_no_worse_than_recorded(compiled, key):
    """Over 5 s: the first one compiles all that are wanted."""
    if key not in compiled:
        pytest.skip("another case of its kernel is compiled; all of them with --wide")
    found = compiled[key]
    assert found["problems"] == ""
    before = aot.recorded()[found["case"], found["dtype"], found["arch"]]
    if before["triton"] != triton.__version__:
        pytest.skip(f"recorded with triton {before['triton']}, this is {triton.__version__}")
    assert aot.worse(found, before) == []


def test_a_spill_a_synchronous_copy_and_a_lost_tensor_core_are_seen():
    case = next(c for c in aot.listed("chosen_cases") if "low_rank_gemm forward" in c.name)
    constants = case.launch.constants | {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
    launch = case.launch._replace(constants=constants, tile=Tile(128, 256, 64, 16, 4, 3))
    spilled = case._replace(launch=launch)
    found = aot.problems(spilled, aot.compile_launch(launch, case.arch))
    assert any("local instructions" in text for text in found)
    good = aot.compile_launch(case.launch, case.arch)
    assert aot.problems(case, good) == []
    halved = good.counts | {"async_copies": good.counts["async_copies"] // 2}
    assert "asynchronous copies" in aot.problems(case, good._replace(counts=halved))[0]
    none = good.counts | dict.fromkeys(("hmma", "imma", "hgmma", "igmma"), 0)
    assert aot.problems(case, good._replace(counts=none)) == ["no tensor-core instruction"]
    assert "registers" in aot.problems(case, good._replace(registers=256))[0]
    assert "shared memory" in aot.problems(case, good._replace(shared=10**6))[0]


def intermediate(launch, number="fp32"):
    """Return what Triton makes of a launch for sm_90, by stage; numbers are f32 or f64."""
    source = ASTSource(launch.kernel, *aot.specialized(launch, number))
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


@pytest.mark.parametrize("kernel", sorted(kernel for kernel, arch in FIRST if arch == 90))
def test_a_kernel_takes_numbers_in_f64(kernel):
    """As Inductor passes them; the machine code then computes in f32 all the same."""
    launch = CASES[FIRST[kernel, 90]].launch
    if "fp64" not in aot.specialized(launch, "fp64")[0].values():
        pytest.skip("takes none")
    code = intermediate(launch, "fp64")["ptx"]
    assert not re.search(r"(mul|fma|add|div)\.(rn\.)?f64", code)


EXACT = [case for case in CASES.values() if (case.arch, case.dtype) == (90, "f32")]


@pytest.mark.parametrize("key", [c.key for c in EXACT if c.launch.kernel.__name__ in aot.LOOPED])
def test_an_f32_product_of_two_tiles_begins_at_zero(key):
    """Not at acc, where each FMA would round. Triton makes `acc + dot` a product from acc on."""
    code = intermediate(CASES[key].launch)["ttir"]
    zeros = re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00>", code)
    begun = re.findall(r"= tt\.dot %\S+, %\S+, (%[\w#]+)", code)
    assert begun
    assert set(begun) <= set(zeros)


def test_a_kernel_that_got_worse_is_seen():
    before = next(iter(aot.recorded().values()))
    assert aot.worse(before, before) == []
    for name, change in (("registers", 1), ("shared", 16), ("instructions", 1)):
        changed = before | {name: int(before[name]) + change}
        assert aot.worse(changed, before) == [f"{name} {before[name]} -> {changed[name]}"]
    fewer = before | {"async_copies": int(before["async_copies"]) - 1}
    assert aot.worse(fewer, before)


def test_decoding_takes_few_instructions_a_weight(compiled):
    """Goals: 8 for NF4 and 6 for INT4; INT4 as int8 codes is wider of it and only held steady."""
    found = {key: r["per_weight"] for key, r in compiled.items() if r["per_weight"] != ""}
    assert len(found) >= 8
    version = next(iter(aot.recorded().values()))["triton"]
    if version != triton.__version__:  # 3.4 takes 6.2 for INT4
        pytest.skip(f"recorded with triton {version}, this is {triton.__version__}")
    for key, count in found.items():
        limit = 8 if "decode_nf4" in key else 9 if "int4 int8" in key else 6
        assert count <= limit or TURNED in key, key


@pytest.mark.xfail(strict=True, reason="10.7 with Triton 3.7.1, where 3.9.0 takes 8.7")
def test_codes_turned_over_take_few_instructions_a_weight():
    rows = {key[0]: row for key, row in aot.recorded().items() if TURNED in key[0]}
    assert all(float(row["per_weight"]) <= 9 for row in rows.values())


def test_a_synchronous_operand_of_the_turned_gradient_is_seen(compiled):
    """Why codes are turned over: as stored, sm_90 copies a third of them asynchronously."""
    stored, turned = (
        compiled[f"int8_gemm backward, codes {how} bf16 sm_90"]
        for how in ("as stored", "turned over")
    )
    assert int(stored["async_copies"]) * 2 < int(turned["async_copies"])


def test_the_table_is_complete_and_clean():
    recorded = aot.recorded()
    assert recorded.keys() >= {
        (case.name, case.dtype, f"sm_{case.arch}") for case in aot.listed("chosen_cases")
    }
    wrong = {key for key, r in recorded.items() if r["problems"] or r["stack"] != "0"}
    assert not wrong & {(case.name, case.dtype, f"sm_{case.arch}") for case in CASES.values()}
    assert not [key for key in wrong if re.search(r"r(16|32) ", key[0])]


@pytest.mark.xfail(strict=True, reason="Triton 3.7.1 spills in 8 rows, where 3.9.0 does in none")
def test_no_row_of_the_table_spills():
    assert not [r for r in aot.recorded().values() if r["problems"] or r["stack"] != "0"]
