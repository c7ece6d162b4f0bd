"""The check of the GPU kernels' machine code: that it passes, and that it can fail."""

import importlib.util
import json
from pathlib import Path

import pytest

from bench.sass import amd, nvidia, report
from bench.sass.__main__ import NAIVE, main
from bench.sass.budgets import BUDGETS, ROOFLINE, Budget, budget_for
from bench.sass.cache import CACHE, Cache
from bench.sass.checks import defects
from bench.sass.cuda import CODE_FLAGS, describe
from bench.sass.facts import Facts, Work, facts_of
from bench.sass.pool import list_jobs, read_all
from bench.sass.program import Resources
from bench.sass.rows import row_of
from bench.sass.toolchain import installed
from lozo_kernels.bench.deadline import Deadline

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton")

# An update of 16 bf16 elements a thread in two trips of a loop, as nvdisasm prints it; the table is read by other files.
SASS = """
.text.update:
	//## File "/x/tables.py", line 3
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0010*/                   FMUL R9, R9, R8 ;
.L_x_0:
	//## File "/x/weights.py", line 13
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
	//## File "/x/update.py", line 5
        /*0030*/                   FMUL R4, R4, R8 ;
        /*0040*/                   FADD R4, R4, R9 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   IMAD.WIDE.U32 R6, R6, R7, RZ ;
.L_x_1:
	//## File "/x/weights.py", line 20
        /*0070*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
	//## File "/x/update.py", line 6
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
        /*00b0*/                   NOP;
"""
USAGE = "Function update:\n  REG:32 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:576"

AMD = """
	.file	1 "/x" "weights.py"
	.file	2 "/x" "update.py"
update:
	.loc	2 1 0 prologue_end
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_waitcnt lgkmcnt(0)
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 13 9                          ; weights.py:13:9
	global_load_dwordx4 v[0:3], v[20:21], off
	.loc	2 3 9
	v_mul_f32_e32 v0, s6, v0
	s_cbranch_execz .LBB0_2
	v_mul_lo_u32 v4, v4, v5
.LBB0_2:
	.loc	1 20 9
	global_store_dwordx4 v[20:21], v[0:3], off
	s_cbranch_scc0 .LBB0_1
	s_endpgm
.Lfunc_end0:
		.amdhsa_float_denorm_mode_32 3
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 0
    .vgpr_count:     28
    .vgpr_spill_count: 0
"""

JOB = {
    "kernel": "update",
    "triton": "3.9.0",
    "target": "sm_90",
    "dtype": "bfloat16",
    "rank": None,
    "aligned": True,
    "exact": True,
    "naive": False,
    "default": True,
    "tile_elements": 16 * 128,
    "threads": 128,
    "iterations": 2,
    "itemsize": 2,
    "stored_bytes": 2,
    "read_bytes": 2,
    "ahead": False,
    "bytes_per_element": 4,
}
BUDGET = Budget("update", "bfloat16", (1, 64), "*", 16)


def found_in(text, usage=USAGE, budget=BUDGET, **job):
    facts = facts_of(nvidia.functions(text)["update"], nvidia.resources(usage)["update"], Work(32.0))
    described = JOB | job
    return facts, defects(described, facts, row_of(described, facts, budget), budget)


def found_in_amd(text):
    facts = facts_of(amd.blocks(text), amd.resources(text), Work(32.0))
    job = JOB | {"target": "gfx942"}
    return facts, defects(job, facts, row_of(job, facts, BUDGET), BUDGET)


def test_sass_is_followed_through_a_full_tile():
    facts, found = found_in(SASS)
    assert not found
    assert facts.trips == 2
    assert facts.instructions == 2 + 2 * 7 + 1
    assert facts.loop_instructions == 7
    assert facts.loads == facts.stores == {128: 32}
    assert facts.registers == 32 and facts.shared_bytes == 1024


def test_cdna_is_followed_through_a_full_tile():
    facts, found = found_in_amd(AMD)
    assert not found
    assert facts.trips == 2 and facts.instructions == 1 + 2 * 6 + 1
    assert facts.loads == facts.stores == {128: 32}


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("FADD R4, R4, R9", "FFMA R4, R4, R8, R9", "1 FFMA"),
        ("FADD R4, R4, R9", "FFMA2 R4, R4.F32x2.HI_LO, R8.F32x2.HI_LO, R9.F32x2.HI_LO", "1 FFMA2"),
        ("FADD R4, R4, R9", "FADD.FTZ R4, R4, R9", "subnormal"),
        ("FADD R4, R4, R9", "STL [R1], R4", "local memory"),
        ("FADD R4, R4, R9", "CALL.REL.NOINC `($__cuda_sm20_div_u64)", "calls"),
        ("LDG.E.128", "LDG.E.64", "fewer than 128 bits: 1 LDG.E.64"),
        ("STG.E.128", "STG.E.U16", "fewer than 128 bits: 1 STG.E.U16"),
        ("FADD R4, R4, R9", "STG.E desc[UR4][R8.64], R4", "stores with fewer than 128 bits: 1 STG.E"),
        ("FADD R4, R4, R9", "RED.E.ADD.F32 [R8.64], R4", "stores with fewer than 128 bits: 1 RED"),
        ('File "/x/weights.py", line 13', 'File "/x/update.py", line 13', "loads of weights add up to 0 bytes"),
        ("@!P0 STG.E.128 desc[UR4][R2.64], R4", "NOP", "stores of weights add up to 0 bytes"),
        ("FADD R4, R4, R9 ;", "FADD R4, R4, R9 ;\n /*01*/ FADD R4, R4, R9 ;" * 300, "instructions per element, 16 budgeted"),
        ("FADD R4, R4, R9 ;", "FADD R4, R4, R9 ;\n /*01*/ FADD R4, R4, R9 ;" * 300, "predicted roofline"),
        ("FMUL R9, R9, R8 ;", "NOP;\n.L_x_9:\n /*1*/ FMUL R9, R9, R8 ;\n /*2*/ @P3 BRA `(.L_x_9) ;", "whose trips nobody knows"),
        ("EXIT", "BRX R2", "cannot follow BRX"),
    ],
)
def test_defects_of_sass_are_found(before, after, says):
    assert before in SASS
    if "BRX" in after:
        with pytest.raises(ValueError, match=says):
            found_in(SASS.replace(before, after))
        return
    _, found = found_in(SASS.replace(before, after))
    assert any(says in defect for defect in found), found


@pytest.mark.parametrize("usage", ["STACK:8 SHARED:0 LOCAL:0", "STACK:0 SHARED:0 LOCAL:8"])
def test_stack_and_spills_are_found(usage):
    _, found = found_in(SASS, f"Function update:\n  REG:32 {usage}")
    assert found == ["8 bytes of stack or spilled registers a thread"]


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("v_mul_f32_e32 v0, s6, v0", "v_fma_f32 v0, v1, v2, v3", "1 v_fma_f32"),
        ("v_mul_f32_e32 v0, s6, v0", "v_fmac_f32_e32 v0, v1, v2", "1 v_fmac_f32_e32"),
        ("v_mul_f32_e32 v0, s6, v0", "v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", "1 v_pk_fma_f32"),
        ("v_mul_f32_e32 v0, s6, v0", "v_mad_f32 v0, v1, v2, v3", "1 v_mad_f32"),
        ("v_mul_f32_e32 v0, s6, v0", "scratch_store_dword off, v0, s32", "local memory"),
        ("global_load_dwordx4", "global_load_dwordx2", "1 global_load_dwordx2"),
        ("global_store_dwordx4", "global_store_short", "1 global_store_short"),
        ("denorm_mode_32 3", "denorm_mode_32 0", "mode of the kernel"),
        (".vgpr_spill_count: 0", ".vgpr_spill_count: 3", "12 bytes of stack"),
        ("private_segment_fixed_size: 0", "private_segment_fixed_size: 16", "16 bytes of stack"),
    ],
)
def test_defects_of_cdna_are_found(before, after, says):
    assert before in AMD
    _, found = found_in_amd(AMD.replace(before, after))
    assert any(says in defect for defect in found), found


def test_scalar_registers_that_wait_in_vector_registers_are_not_in_memory():
    spilled = AMD.replace(".sgpr_spill_count: 0", ".sgpr_spill_count: 7")
    assert not found_in_amd(spilled)[1]
    assert found_in_amd(spilled.replace("private_segment_fixed_size: 0", "private_segment_fixed_size: 28"))[1]


def test_a_fused_multiply_add_to_nothing_is_a_multiply():
    """-0 changes no bit of a product, and LLVM multiplies fp16 by fp32 in no other way."""
    assert not found_in(SASS.replace("FADD R4, R4, R9", "FFMA R4, R4, R9, -RZ"))[1]
    product = "v_fma_mix_f32 v2, v5, v119, neg(0) op_sel_hi:[1,0,0]"
    assert not found_in_amd(AMD.replace("v_mul_f32_e32 v0, s6, v0", product))[1]
    assert found_in_amd(AMD.replace("v_mul_f32_e32 v0, s6, v0", product.replace("neg(0)", "v4")))[1]


def test_bounded_kernels_may_fuse_and_kernels_need_a_budget():
    fused = SASS.replace("FADD R4, R4, R9", "FFMA R4, R4, R8, R9")
    assert not found_in(fused, exact=False)[1]
    assert found_in(SASS, budget=None)[1] == ["no budget covers it (bench/sass/budgets.py)"]
    assert defects(JOB, Facts(broken="no such register"), {}, BUDGET) == ["cannot be compiled or followed: no such register"]


@pytest.mark.parametrize(("sums", "due", "says"), [(1, 2, None), (2, 2, "4 fused"), (0, 2, "0 fused"), (1, 1, "2 fused")])
def test_products_written_with_fused_multiply_adds_have_as_many_as_promised(sums, due, says):
    """Each of the two trips has 8 elements; the table's own instructions before the loop count too."""
    fused = "\n".join(["/*01*/ FFMA R4, R4, R8, R9 ;"] * 16 * sums)
    text = SASS.replace("        /*0040*/                   FADD R4, R4, R9 ;", fused)
    _, found = found_in(text, exact=False, fused=due, default=False)
    assert [d for d in found if "fused" in d] == ([f"{says} multiply-adds in fp32 an element, {due} promised"] if says else [])
    one_more = text.replace("FMUL R9, R9, R8", "FFMA R9, R9, R8, R8")
    assert any("multiply-adds" in d for d in found_in(one_more, exact=False, fused=due)[1])


def test_pairs_are_two_fused_multiply_adds():
    assert nvidia.instruction_of("FFMA2", "R4, R4.F32x2.HI_LO, R8.F32x2.HI_LO, R9.F32x2.HI_LO", "").fused == 2
    assert nvidia.instruction_of("FFMA2", "R4, R4.F32x2.HI_LO, R8.F32x2.HI_LO, -RZ", "").fused == 0
    assert amd.instruction_of("v_pk_fma_f32", "v[0:1], v[2:3], v[4:5], v[6:7]", "").fused == 2
    assert amd.instruction_of("v_fma_mix_f32", "v2, v5, v119, v2 op_sel_hi:[1,0,0]", "").fused == 1


def test_required_budgets_are_in_the_table():
    def budget(kernel, rank):
        return budget_for({"kernel": kernel, "dtype": "bfloat16", "target": "sm_90", "rank": rank})

    for rank in range(1, 9):
        assert budget("lowrank_update", rank).instructions <= 16
    assert all(budget("lowrank_merge", rank).instructions <= 28 for rank in range(1, 5))
    assert budget("lowrank_update", 64).instructions <= 22
    assert budget("dense_update", None).instructions <= 25
    assert ROOFLINE["sm_90"] >= 0.95
    assert all(b.instructions > 0 for b in BUDGETS)


def test_loops_of_unknown_length_are_counted_by_the_trip():
    """As CUDA C++ kernels are: a trip of the loop, on the shortest path through it."""
    facts = facts_of(
        nvidia.functions(SASS)["update"], Resources(32, 0, 0), Work(bytes_per_thread=None, sources=("weights.py",), longest=False)
    )
    assert facts.instructions == 6 and facts.loads == facts.stores == {128: 16}
    job = JOB | {"tile_elements": None}
    assert row_of(job, facts, BUDGET)["instr_per_element"] == 0.75
    assert not defects(job, facts, row_of(job, facts, BUDGET), BUDGET)
    narrow = facts_of(
        nvidia.functions(SASS.replace("LDG.E.128", "LDG.E.64"))["update"],
        Resources(32, 0, 0),
        Work(bytes_per_thread=None, sources=("weights.py",), longest=False),
    )
    assert any("by 128 bits" in defect for defect in defects(job, narrow, row_of(job, narrow, BUDGET), BUDGET))


def test_loops_inside_the_main_one_have_the_trips_that_are_told():
    text = SASS.replace("FADD R4, R4, R9 ;", "NOP;\n.L_x_9:\n /*1*/ FADD R4, R4, R9 ;\n /*2*/ @P3 BRA `(.L_x_9) ;")
    blocks = nvidia.functions(text)["update"]
    told = facts_of(blocks, Resources(32, 0, 0), Work(32.0, nested=3))
    assert told.instructions == 2 + 2 * (7 - 1 + 3 * 2) + 1 and not told.unknown_loops
    assert facts_of(blocks, Resources(32, 0, 0), Work(32.0)).unknown_loops == 1


def test_kernels_that_only_read_weights_are_followed():
    """Their main loop is the one that loads weights."""
    text = SASS.replace('File "/x/weights.py", line 20', 'File "/x/update.py", line 20')
    waiting = text.replace("FMUL R9, R9, R8 ;", "NOP;\n.L_x_9:\n /*1*/ NANOSLEEP R9 ;\n /*2*/ @P3 BRA `(.L_x_9) ;")
    facts = facts_of(nvidia.functions(waiting)["update"], Resources(32, 0, 0), Work(0, iterations=2))
    assert facts.loads == {128: 32} and not facts.stores and facts.trips == 2
    job = JOB | {"stored_bytes": 0, "exact": False}
    assert not defects(job, facts, row_of(job, facts, BUDGET), BUDGET)


def test_mangled_names_are_understood():
    update = describe("_ZN4lozo22lowrank_update_alignedINS_4bf16ELi4ELi2EEEvNS_6LaunchE")
    found = [update[k] for k in ("kernel", "dtype", "rank", "aligned", "exact")]
    assert found == ["cuda_lowrank_update_2", "bfloat16", 64, True, True]
    merge = describe("_ZN4lozo21lowrank_merge_alignedIfEEvNS_6LaunchE")
    assert [merge[k] for k in ("kernel", "dtype", "rank", "exact")] == ["cuda_lowrank_merge", "float32", None, False]
    for argument, suffix in (("Lb0E", ""), ("Lb1E", "_signs")):
        dense = describe(f"_ZN4lozo22dense_momentum_alignedINS_3f16ELi1E{argument}EEvNS_6LaunchE")
        assert (dense["kernel"], dense["dtype"], dense["exact"]) == (f"cuda_dense_momentum{suffix}", "float16", True)
        other = describe(f"_ZN4lozo16dense_update_anyI{argument}EEvNS_6LaunchE")
        assert (other["kernel"], other["dtype"], other["exact"]) == (f"cuda_dense_update_any{suffix}", "any", True)


def test_cuda_kernels_are_compiled_as_setup_compiles_them():
    setup = (Path(__file__).resolve().parents[1] / "setup.py").read_text()
    assert all(f'"{flag}"' in setup for flag in CODE_FLAGS)


@needs_triton
@pytest.mark.parametrize(
    "chosen",
    [
        ["--target", "sm_90", "gfx942", "--dtype", "bfloat16", "none", "--rank", "4"],
        # The variants for any dtype take longest to compile.
        ["--target", "sm_90", "--kernel", "*_any", "lowrank_merge_0", "--dtype", "bfloat16", "any", "--rank", "16"],
    ],
    ids=["rank 4", "rank 16 and any dtype"],
)
def test_kernels_pass(chosen, capsys, tmp_path):
    """A share of what ``python -m bench.sass`` checks, in which every kernel occurs."""
    out = tmp_path / "sass.json"
    code = main([*chosen, "--no-cuda", "--no-naive", "--output", str(out)])
    assert code == 0, capsys.readouterr().out
    kernels = {row["kernel"] for row in json.loads(out.read_text())["rows"]}
    if "none" in chosen:
        assert {"lowrank_update", "dense_update", "dense_momentum", "factor_momentum", "resample"} <= kernels
        assert {"factor_update", "lowrank_merge", "dense_merge", "contraction", "expansion", "lookup"} <= kernels
        assert {"points_contraction", "points_total", "points_expansion", "points_expansion_own"} <= kernels
    else:
        assert {"lowrank_update_any", "lowrank_merge_any", "dense_update_any", "lowrank_merge_0"} <= kernels


@needs_triton
def test_rows_and_report(capsys, tmp_path):
    out = tmp_path / "sass.json"
    chosen = ["--target", "sm_90", "--dtype", "bfloat16", "--rank", "4", "--kernel", "lowrank_update", "naive_dense_randn"]
    assert main([*chosen, "--no-cuda", "--json", "--output", str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    assert document["versions"]["triton"] and "commit" in document
    update, randn = document["rows"]
    fields = {
        "kernel",
        "target",
        "dtype",
        "rank",
        "registers",
        "spill_bytes",
        "vector_bits",
        "instr_per_element",
        "predicted_roofline",
    }
    assert fields <= set(update)
    assert (update["kernel"], update["rank"], update["vector_bits"], update["naive"]) == ("lowrank_update", 4, 128, False)
    assert randn["naive"] and randn["instr_per_element"] > 2 * update["instr_per_element"] and randn["predicted_roofline"] < 0.5

    picture = tmp_path / "sass.png"
    assert report.main([str(out), "--picture", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "lowrank_update" in table and "H200" in table
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert report.main([str(out), "--markdown"]) == 0
    assert "| naive_dense_randn | sm_90 | bfloat16 |" in capsys.readouterr().out


SPILLS = """
import dataclasses
import triton, triton.language as tl
from bench.sass import naive

def compilations(vendor):
    few = [c for c in naive.compilations(vendor) if c.kernel == "naive_lowrank_narrow" and c.dtype == "float32" and c.rank == 16]
    return [dataclasses.replace(c, kernel="squeezed", options=c.options | {"maxnreg": 32}) for c in few]
"""


@needs_triton
def test_compiled_defects_are_found(tmp_path, monkeypatch):
    """Naive kernels, held to the rules that they are spared, break them."""
    (tmp_path / "squeezed.py").write_text(SPILLS)
    monkeypatch.syspath_prepend(tmp_path)
    cache = Cache(CACHE)
    jobs = [
        job | {"target": "sm_90", "naive": False, "default": True}
        for catalogue in (NAIVE, "squeezed")
        for job in list_jobs(catalogue, ["nvidia"], cache, installed())
        if job["kernel"] == "squeezed" or (job["dtype"] == "bfloat16" and job["rank"] in (None, 4))
    ]
    found = {}
    budget = Budget("*", "*", (1, 64), "*", 16)
    for job, facts in zip(jobs, read_all(jobs, cache, 2, lambda: None, installed()), strict=True):
        found[job["kernel"]] = " / ".join(defects(job, facts, row_of(job, facts, budget), budget))
    assert "fused multiply-adds" in found["naive_lowrank_loop"] and "fewer than 128" not in found["naive_lowrank_loop"]
    assert "accessed with fewer than 128 bits" in found["naive_lowrank_narrow"]
    assert "instructions per element, 16 budgeted" in found["naive_dense_randn"]
    assert "accessed with fewer than 128 bits" in found["naive_dense_scalar"]
    assert "stack or spilled registers" in found["squeezed"]


@needs_triton
def test_time_that_is_over_leaves_kernels_out_and_says_so(capsys, tmp_path, monkeypatch):
    """What was read before stays in the cache, and the next run goes on from there."""
    chosen = ["--target", "sm_90", "--kernel", "lowrank_update", "--dtype", "bfloat16", "--rank", "1", "4", "--default"]
    places = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "sass.json")]
    chosen += ["--no-cuda", "--no-naive", "--jobs", "1", *places]
    assert main([*chosen, "--seconds", "1"]) == 75
    assert "2 of 2 Triton kernels are not checked: the time was over" in capsys.readouterr().err
    asked = iter([False, True])
    monkeypatch.setattr(Deadline, "over", lambda self: setattr(self, "passed", next(asked)) or self.passed)
    assert main(chosen) == 75
    document = json.loads((tmp_path / "sass.json").read_text())
    assert [row["rank"] for row in document["rows"]] == [4]  # what has a goal comes first
    assert document["complete"] is False and document["remarks"] == ["1 of 2 Triton kernels are not checked: the time was over"]
    assert str(tmp_path) not in document["command"]


def test_filters_that_fit_nothing_are_an_error(capsys):
    assert main(["--kernel", "no_such_kernel", "--no-cuda"]) == 2
    assert "no kernel fits" in capsys.readouterr().err
