"""
tools/aot.py and tools/hlo_cost.py: the reading of HLO and of bundles on small texts whose cost is known by hand, and small
programs compiled for v6e here and now, no TPU needed. Each number below can be checked with a pencil.

    python -m pytest -q tests/test_aot.py
"""
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import aot
import hlo_cost
from hlo_cost import Estimate, Module

from chips import CHIPS, RECORD, TPUS

V6E = CHIPS["v6e"]
MS = 1_750_000  # cycles of a millisecond

def cycles(n):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{int(n)}"}}}}'

def hlo(entry, *computations, devices=8):
    """An HLO text; each computation is a list of lines, the first one its name."""
    text = [f"HloModule m, is_scheduled=true, num_partitions={devices}", ""]
    for name, *lines in [*computations, ["ENTRY %main", *entry]]:
        text += [f"{name} (p: f32[]) -> f32[] {{", *[f"  {line}" for line in lines], "}", ""]
    return Module("\n".join(text))

WORK = '%work = f32[128]{0} fusion(%x), kind=kLoop, calls=%loop_body, ' + cycles(MS)  # one millisecond
BODY = ["%loop_body", "%p0 = f32[128]{0} parameter(0)", "ROOT %m = f32[128]{0} multiply(%p0, %p0)"]

# -----------------------------------------------------------------------------
# Shapes

def test_bytes_of_shapes():
    shape = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}, (s64[5]{0}, u32[]{:S(2)}), pred[7]{0}, f8e4m3[16]{0})"
    assert hlo_cost.arrays(shape) == [(6, 12, 1), (1, 4, 0), (5, 40, 0), (1, 4, 2), (7, 7, 0), (16, 16, 0)]
    assert hlo_cost.nbytes(shape) == 12 + 4 + 40 + 4 + 7 + 16
    assert hlo_cost.nbytes(shape, space=0) == 4 + 40 + 7 + 16
    assert hlo_cost.element(shape, "{2,0}") == "s64[5]{0}" and hlo_cost.element("f32[3]{0}", "{}") == "f32[3]{0}"

# -----------------------------------------------------------------------------
# Loops, branches

def loop(name, body, start=0, limit=7, step=1, direction="LT", op="add", swapped=False, fused=False):
    """A while loop in the form libtpu writes: its counter is element 1 of the state, its bounds are constants."""
    compare = f"compare(%n, %c), direction={direction}" if swapped else f"compare(%c, %n), direction={direction}"
    condition = [f"%cond_{name}", "%s = (f32[128]{0}, s32[]) parameter(0)", f"%n = s32[] constant({limit})",
                 "%c = s32[] get-tuple-element(%s), index=1"]
    extra = []
    if fused:
        condition.append(f"ROOT %t = pred[] fusion(%n, %c), kind=kLoop, calls=%test_{name}")
        extra = [[f"%test_{name}", "%limit = s32[] parameter(0)", "%count = s32[] parameter(1)",
                  f"ROOT %t = pred[] compare(%count, %limit), direction={direction}"]]
    else:
        condition.append(f"ROOT %t = pred[] {compare}")
    inside = [f"%body_{name}", "%s = (f32[128]{0}, s32[]) parameter(0)", "%x = f32[128]{0} get-tuple-element(%s), index=0",
              "%c = s32[] get-tuple-element(%s), index=1", f"%k = s32[] constant({step})", *body, f"%next = s32[] {op}(%c, %k)",
              "ROOT %out = (f32[128]{0}, s32[]) tuple(%x, %next)"]
    call = [f"%start_{name} = s32[] constant({start})", f"%first_{name} = s32[] copy(%start_{name})",
            f"%state_{name} = (f32[128]{{0}}, s32[]) tuple(%x, %first_{name})",
            f"%while_{name} = (f32[128]{{0}}, s32[]) while(%state_{name}), condition=%cond_{name}, body=%body_{name}"]
    return call, [condition, inside, *extra]

@pytest.mark.parametrize("trips, form", [
    (7, {}), (8, dict(direction="LE")), (4, dict(start=3)), (4, dict(step=2)), (3, dict(start=1, limit=8, step=3)),
    (5, dict(start=5, limit=0, step=-1, direction="GT")), (5, dict(start=5, limit=0, op="subtract", direction="GT")),
    (6, dict(start=5, limit=0, step=-1, direction="GE")), (7, dict(direction="GT", swapped=True)), (7, dict(direction="NE")),
    (7, dict(fused=True)), (0, dict(start=9)),
])
def test_trip_counts(trips, form):
    call, computations = loop("a", [WORK], **form)
    estimate = Estimate(hlo(["%x = f32[128]{0} parameter(0)", *call], BODY, *computations))
    assert [n for _, n, _ in estimate.loops] == [trips]
    assert estimate.total_ms == pytest.approx(trips)

def test_nested_loops_multiply():
    inner, inner_computations = loop("in", [WORK], limit=4)
    outer, outer_computations = loop("out", inner, limit=3)
    estimate = Estimate(hlo(["%x = f32[128]{0} parameter(0)", *outer], BODY, *inner_computations, *outer_computations))
    assert estimate.total_ms == pytest.approx(12)
    assert [(r.op.name, r.times) for r in estimate.rows] == [("work", 12)]

def test_the_compilers_own_trip_count_comes_first():
    call, computations = loop("a", [WORK])
    call[-1] += ', backend_config={"known_trip_count":{"n":"9"}}'
    assert Estimate(hlo(["%x = f32[128]{0} parameter(0)", *call], BODY, *computations)).total_ms == pytest.approx(9)

@pytest.mark.parametrize("line, instead", [
    ("constant(7)", "parameter(1)"), ("constant(0)", "parameter(2)"), ("add(%c, %k)", "multiply(%c, %k)"), ("add(%c, %k)", "add(%k, %k)"),
])
def test_unknowable_trip_counts_are_listed(line, instead):
    call, computations = loop("a", [WORK])
    call, *computations = [[x.replace(line, instead) for x in lines] for lines in [call, *computations]]
    summary = Estimate(hlo(["%x = f32[128]{0} parameter(0)", *call], BODY, *computations)).summary()
    assert summary["est_ms"]["total"] == pytest.approx(1)
    assert [x["op"] for x in summary["not_estimated"]] == ["while_a"]

def test_a_conditional_costs_its_dearest_branch():
    branch = lambda name, n: [name, "%x = f32[128]{0} parameter(0)", *[WORK.replace("%work", f"%work{i}") for i in range(n)]]
    estimate = Estimate(hlo([
        "%x = f32[128]{0} parameter(0)", "%i = s32[] parameter(1)",
        "%c = f32[128]{0} conditional(%i, %x, %x, %x), branch_computations={%one, %three, %two}", WORK.replace("%work", "%after")],
        BODY, branch("%one", 1), branch("%three", 3), branch("%two", 2)))
    assert estimate.total_ms == pytest.approx(4) and estimate.now == pytest.approx(4)

# -----------------------------------------------------------------------------
# Collectives. 100 GB/s a ring; two rings for more than two devices.

MB = 1_000_000

@pytest.mark.parametrize("line, payload, ms", [
    ("%c = f32[25000000]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%sum", 100 * MB, 2 * 7 / 8 * 0.5),
    ("%c = f32[25000000]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum", 100 * MB, 2 * 3 / 4 * 0.5),
    ("%c = f32[25000000]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%sum", 100 * MB, 2 * 1 / 2 * 1),
    ("%c = f32[25000000]{0} all-reduce(%x), replica_groups={}, to_apply=%sum", 100 * MB, 2 * 7 / 8 * 0.5),
    ("%c = f32[200000000]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}", 800 * MB, 7 / 8 * 4),
    ("%c = f32[3125000]{0} reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum", 100 * MB, 7 / 8 * 0.5),
    ("%c = f32[25000000]{0} all-to-all(%x), replica_groups=[1,8]<=[8], dimensions={0}", 100 * MB, 1),
    ("%c = f32[3125000]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1", 100 * MB, 7 / 8 * 0.5),
])
def test_collectives_cost_their_bytes(line, payload, ms):
    estimate = Estimate(hlo(["%x = f32[25000000]{0} parameter(0)", line], [
        "%all-reduce-scatter.1", "%p = f32[25000000]{0} parameter(0)",
        "%a = f32[25000000]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%sum", "ROOT %d = f32[3125000]{0} dynamic-slice(%a)"]))
    [row] = estimate.rows
    assert (row.kind, row.bytes) == ("collectives", payload)
    assert estimate.total_ms == pytest.approx(ms)
    summary = estimate.summary()["collectives"]
    kind = "reduce-scatter" if "scatter" in line else line.split("}")[1].split("(")[0].strip()
    assert summary["count"] == 1 and summary["mib"] == pytest.approx(payload / 2**20) and list(summary["kinds"]) == [kind]

START = '%g = ((f32[25000000]{0}), f32[200000000]{0}) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}'
DONE = "%d = f32[200000000]{0} all-gather-done(%g)"  # 800 MB: 3.5 ms

@pytest.mark.parametrize("between, exposed", [(0, 3.5), (2, 1.5), (5, 0)])
def test_work_between_start_and_done_hides_a_collective(between, exposed):
    work = [WORK.replace("%work", f"%work{i}") for i in range(between)]
    estimate = Estimate(hlo(["%x = f32[25000000]{0} parameter(0)", START, *work, DONE], BODY))
    summary = estimate.summary()
    assert summary["collectives"]["ms"] == pytest.approx(3.5) and summary["collectives"]["asynchronous"] == 1
    assert summary["est_ms"]["collectives"] == pytest.approx(exposed)
    assert estimate.now == pytest.approx(between + exposed) == estimate.total_ms

def test_collectives_share_the_links():
    second = [START.replace("%g =", "%g2 ="), DONE.replace("%d =", "%d2 =").replace("%g)", "%g2)")]
    estimate = Estimate(hlo(["%x = f32[25000000]{0} parameter(0)", START, second[0], WORK, DONE, second[1]], BODY))
    assert estimate.total_ms == pytest.approx(7)

def test_a_synchronous_collective_shares_the_links_too():
    reduced = "%r = f32[25000000]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%sum"  # 100 MB: 0.875 ms
    estimate = Estimate(hlo(["%x = f32[25000000]{0} parameter(0)", START, WORK, reduced, DONE], BODY))
    assert [row.exposed_ms for row in estimate.rows if row.kind == "collectives"] == pytest.approx([1.625, 2 * 0.875])
    assert estimate.total_ms == pytest.approx(3.5 + 0.875) == estimate.now
    summary = estimate.summary()["collectives"]
    assert summary["asynchronous"] == 1 and summary["ms"] == pytest.approx(3.5 + 0.875)

def test_a_collective_on_the_sparse_cores_is_one():
    """libtpu wraps it in a call of another thread."""
    gather = "ROOT %a = f32[200000000]{0} all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}"
    call = '%g = ((f32[25000000]{0}), f32[200000000]{0}) call-start(%x), async_execution_thread="sparsecore", to_apply=%gather'
    done = DONE.replace("all-gather-done", "call-done")
    estimate = Estimate(hlo(["%x = f32[25000000]{0} parameter(0)", call, WORK, done], BODY,
                            ["%gather", "%p = f32[25000000]{0} parameter(0)", gather]))
    summary = estimate.summary()
    assert list(summary["collectives"]["kinds"]) == ["all-gather"] and not summary["not_estimated"]
    assert summary["est_ms"]["collectives"] == pytest.approx(2.5) and estimate.total_ms == pytest.approx(3.5)

def test_a_collective_nobody_waits_for_is_counted_in_full():
    assert Estimate(hlo(["%x = f32[25000000]{0} parameter(0)", START, WORK], BODY)).total_ms == pytest.approx(4.5)

def test_a_collective_that_is_carried_through_fusions_is_counted_once():
    """libtpu's asynchronous collective fusion: a start, pieces of it within other fusions (here in a loop of two), an end."""
    gather = "%a = f32[200000000]{0} all-gather(%p), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}"
    p = "%p = f32[25000000]{0} parameter(0)"
    piece = ('%piece = f32[128]{0} fusion(%x), kind=kOutput, calls=%carry, backend_config={"window_config":{"estimated_cycles":"'
             f'{MS}"}},"continuation_config":{{}}}}')
    call, computations = loop("a", [piece], limit=2)
    estimate = Estimate(hlo(
        ["%x = f32[25000000]{0} parameter(0)", "%s = f32[200000000]{0} fusion(%x), kind=kCustom, calls=%begin", *call,
         "%e = f32[200000000]{0} fusion(%x), kind=kCustom, calls=%end"],
        ["%begin", p, gather, 'ROOT %r = f32[200000000]{0} custom-call(%a), custom_call_target="AsyncCollectiveStart"'],
        ["%carry", p, gather, "ROOT %m = f32[128]{0} convolution(%p, %p)"],
        ["%end", p, gather, 'ROOT %r = f32[200000000]{0} custom-call(%a), custom_call_target="AsyncCollectiveDone"'], *computations))
    summary = estimate.summary()
    assert summary["collectives"]["count"] == 1 and summary["collectives"]["ms"] == pytest.approx(3.5)
    assert summary["est_ms"]["matmuls"] == pytest.approx(2) and summary["est_ms"]["collectives"] == pytest.approx(1.5)
    assert not summary["not_estimated"]

def test_prefetches_cost_what_is_waited_for():
    size = int(V6E.hbm_bandwidth / 4 * 2e-3)  # floats that take 2 ms
    estimate = Estimate(hlo([
        f"%x = f32[{size}]{{0}} parameter(0)", f"%s = (f32[{size}]{{0:S(1)}}, f32[{size}]{{0}}, u32[]) copy-start(%x)", WORK,
        f"%d = f32[{size}]{{0:S(1)}} copy-done(%s)"], BODY))
    assert estimate.summary()["est_ms"]["copies"] == pytest.approx(1)

# -----------------------------------------------------------------------------
# Kinds, programs without an estimate

@pytest.mark.parametrize("inside, kind", [
    (["%t = f32[8,4]{1,0} transpose(%p), dimensions={1,0}"], "copies"),
    (["%t = f32[8,4]{1,0} transpose(%p), dimensions={1,0}", "%c = bf16[8,4]{1,0} convert(%t)"], "copies"),
    (["%c = bf16[4,8]{1,0} convert(%p)"], "elementwise"),
    (["%t = f32[8,4]{1,0} transpose(%p), dimensions={1,0}", "%a = f32[8,4]{1,0} add(%t, %t)"], "elementwise"),
    (["%a = f32[4,8]{1,0} add(%p, %p)", "%d = f32[4,4]{1,0} convolution(%a, %p), dim_labels=bf_oi->bf"], "matmuls"),
    (["%f = f32[4,4]{1,0} fusion(%p), kind=kOutput, calls=%within"], "matmuls"),
])
def test_kinds(inside, kind):
    estimate = Estimate(hlo(["%x = f32[4,8]{1,0} parameter(0)", "%f = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%inside, " + cycles(MS)],
                            ["%inside", "%p = f32[4,8]{1,0} parameter(0)", *inside],
                            ["%within", "%p = f32[4,8]{1,0} parameter(0)", "ROOT %d = f32[4,4]{1,0} dot(%p, %p)"]))
    assert {k: v for k, v in estimate.summary()["est_ms"].items() if v} == {kind: pytest.approx(1), "total": pytest.approx(1)}

KERNEL = ('%{} = f32[1024]{{0}} custom-call(%{}), custom_call_target="tpu_custom_call", '
          'backend_config={{"custom_call_config":{{"body":"{}"}}}}')

def test_kernels_cost_their_bundles_at_every_call():
    """libtpu writes the program of equal calls once; each call counts. A kernel of another body has its own."""
    calls = [KERNEL.format("a", "x", "QQ=="), KERNEL.format("b", "a", "QQ=="), KERNEL.format("c", "b", "Qg==")]
    module = hlo(["%x = f32[1024]{0} parameter(0)", *calls])
    module.kernels = {"a": "fwd", "b": "fwd", "c": "bwd"}
    summary = Estimate(module, {"a": (2 * MS, 0), "c": (MS, 0)}).summary()
    assert summary["est_ms"]["kernels"] == pytest.approx(5) == summary["lower_bounds_ms"]
    assert {k: (v["calls"], round(v["ms"], 6)) for k, v in summary["kernels"].items()} == {"fwd": (2, 4), "bwd": (1, 1)}
    module.kernels = {}
    without = Estimate(module, {"a": (2 * MS, 0)}).summary()
    assert [x["op"] for x in without["not_estimated"]] == ["c"]

def test_a_kernel_cannot_outrun_its_bytes():
    n = int(V6E.hbm_bandwidth / 4 * 1e-3)  # floats a millisecond
    line = KERNEL.format("a", "x", "QQ==").replace("1024", str(n))
    estimate = Estimate(hlo([f"%x = f32[{n}]{{0}} parameter(0)", line]), {"a": (MS, 0)})
    assert estimate.total_ms == pytest.approx(2)  # in and out
    assert Estimate(hlo([f"%x = f32[{n}]{{0:S(1)}} parameter(0)", line]), {"a": (MS, 0)}).total_ms == pytest.approx(1)  # in is in VMEM
    def moved(line, *blocks):
        return Estimate(hlo([f"%x = f32[{n}]{{0}} parameter(0)", line]), {"a": (1, 0)}, V6E, {"a": blocks}).total_ms
    assert moved(line, 12 * n, 2 * n) == pytest.approx(3.5)  # blocks that come again, and of the result a half
    assert moved(line, 12 * n, None) == pytest.approx(4)  # nobody knows how much of it: all
    line += ", output_to_operand_aliasing={{}: (0, {})}"
    assert moved(line, 12 * n, None) == pytest.approx(3) and moved(line, None, 4 * n) == pytest.approx(1)

def test_what_has_no_estimate_is_listed():
    summary = Estimate(hlo(["%x = f32[1024]{0} parameter(0)", "%s = f32[1024]{0} sort(%x), dimensions={0}, to_apply=%less",
                            "%n = s32[] add(%x, %x)"])).summary()
    assert [(x["op"], x["times"], x["hbm_mib"]) for x in summary["not_estimated"]] == [("s", 1, 8192 / 2**20)]
    assert summary["scalar_ops"] == 1

def test_source_lines():
    line = WORK + ', metadata={op_name="aten__mul" source_file="/home/me/train.py" source_line=7}'
    other = line.replace("%work", "%more").replace("aten__mul", "aten__add")
    estimate = Estimate(hlo(["%x = f32[128]{0} parameter(0)", line, other, WORK.replace("%work", "%rest")], BODY))
    assert estimate.dearest()[0]["source"] == "aten__mul train.py:7"
    assert [(x["line"], round(x["ms"], 6)) for x in estimate.dearest_lines()] == [("train.py:7", 2), ("no source line", 1)]
    add = '%a = f32[1]{0} add(), metadata={op_name="n" source_file="/v/site-packages/t/n.py" source_line=3}'
    within = hlo(["%f = f32[1]{0} fusion(), calls=%c"], ["%c", add])
    assert within.source(within.computations["main"]["f"]) == "n t/n.py:3"
    # what JAX lowered has numbers of another table of lines; a kernel is known by its name
    lowered = hlo([line.replace("%work", "%k").replace("aten__mul", "xla__computation/jit(run)/or")], BODY)
    op = lowered.computations["main"]["k"]
    assert lowered.source(op) == "xla__computation/jit(run)/or"
    lowered.kernels = {"k": "mlp_forward_kernel"}
    assert lowered.source(op) == "mlp_forward_kernel"

# -----------------------------------------------------------------------------
# Bundles

BUNDLES = """\
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sphi %s1, %s9_s2 }
   0x2   : > { %v1 = vld [vmem:%s2] }
   0x3 LB: >> { %v2 = vadd %v1 }
   0x4   : >> { %s4_s1 = sadd.s32 2, %s4 }
   0x5   : >> { %p1_p0 = scmp.ge.s32.totalorder %s4_s1, 8 /* loop exit test */ }
   0x6   : >> { %3 = sbr.rel (!%p1_p0) target bundleno = 3 (0x3), region = 2 }
   0x7   :  {}
   0x8   :  { %s3 = smov 1 }
   0x9   :  {}
   0xa   :  {}
   0xb PF: > { %s9_s2 = sadd.s32 1, %s2 }
   0xc   : > { %p2_p3 = scmp.ge.s32.totalorder %s9_s2, 10 /* loop exit test */ }
   0xd   :  { %5 = sbr.rel (!%p2_p3) target bundleno = 1 (0x1), region = 3 }
   0xe LB: > { %v9 = vld [vmem:%s3] }
   0xf   : > { %6 = sbr.rel (!%p9_p9) target bundleno = 14 (0xe), region = 4 }
  0x10   :  { %8 = vsyncpa 1 }
"""

def test_bundles():
    """Inner loop: 4 bundles and 4 in the branch's shadow, to 8 by 2. Outer: 4 more, 10 times. Then one of unknown length."""
    assert hlo_cost.bundle_cycles(BUNDLES) == (1 + 10 * (4 + 4 * 8) + 1 + 3, 1)

def test_products_take_their_time():
    """Four matrix units get three products in four bundles, 10 times, and are done with them after 10 x 3 x 4 cycles."""
    text = textwrap.dedent("""\
           0   :  { %s1 = smov 0 }
         0x1 LB: > { %1 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %2 = vmatmul.bf16.gmra.mxu1 %v1 }
         0x2   : > { %s2 = sadd.s32 1, %s1  ;;  %3 = vmatmul.bf16.vlgmr.msrb.gmra.mxu2 %v1 }
         0x3   : > { %p3 = scmp.ge.s32.totalorder %s2, 10 /* loop exit test */ }
         0x4   : > { %9 = sbr.rel (!%p3) target bundleno = 1 (0x1), region = 4 }
        """)
    assert hlo_cost.bundle_cycles(text) == (120, 0)
    assert hlo_cost.bundle_cycles(text.replace("vmatmul", "vadd")) == (41, 0)


@pytest.mark.parametrize("loop", [1, 77])
def test_bundles_of_regions(loop):
    """
    A grid of 2 x 10: the first region at 1 of 10 steps, the second at 6 of 10, the third under a condition that nothing tells. Where a long
    program was packed, the number of its loop's first bundle may lie behind the branch back to it.
    """
    text = textwrap.dedent("""\
           0   :  { %s0 = smov 0 /* iteration_bounds: (1, 2, 10) */ }
         0x1 LB: > { %s1 = sphi %s0, %s2 /* phi copy :: iteration index, stage = 1 iter bound = 2 */ }
         0x2   : > { %4 = sst [smem:[#allocation7_spill]] %s1  ;;  %p1 = scmp.ne.s32.totalorder %s1, 9 }
         0x3   : > { %9 = sbr.rel (%p1) target bundleno = 20 (0x14), region = 1 }
        """) + "".join(f" {i:#x}   : > {{ %v1 = vld [vmem:%s1] }}\n" for i in range(4, 10)) + textwrap.dedent("""\
         0xa PF: > { %s9 = sld [smem:[#allocation7_spill]]  ;;  %p2 = scmp.ge.s32.totalorder %s9, 4 }
         0xb   : > { %9 = sbr.rel (!%p2) target bundleno = 30 (0x1e), region = 2 }
        """) + "".join(f" {i:#x}   :  {{}}\n" for i in range(12, 19)) + textwrap.dedent("""\
        0x13 PF: > { %9 = sbr.rel (%p9) target bundleno = 40 (0x28), region = 3 }
        0x14   : > { %s2 = sadd.s32 1, %s3 }
        0x15   : > { %p3 = scmp.ge.s32.totalorder %s2, 20 /* loop exit test */ }
        0x16 PF: > { %9 = sbr.rel (!%p3) target bundleno = LOOP (0x1), region = 4 }
        """).replace("LOOP", str(loop))
    assert hlo_cost.region_shares(text) == [(8, 9, pytest.approx(0.1)), (16, 18, pytest.approx(0.6))]
    assert hlo_cost.bundle_cycles(text) == (1 + round(20 * (22 - 5 + 2 * 0.1 + 3 * 0.6)), 0)

# -----------------------------------------------------------------------------
# Memory

def test_largest_buffers():
    """At the fullest moment: 5, in the middle of p's life, though XLA's own list does not count p."""
    text = textwrap.dedent("""\
        BufferAssignment:
        allocation 0: size 400000, parameter 3, shape |f32[100000]| at ShapeIndex {}, maybe-live-out:
         value: <1 x @0> (size=400000,offset=0): f32[100000]{0}
         value: <9 late{} @0> (size=400000,offset=0): f32[100000]{0}
        allocation 1: size 800000, color 1, preallocated-temp:
         value: <2 pair{0} @0> (size=800000,offset=0): f32[200000]{0:S(1)}
        allocation 2: size 5000000000, preallocated-temp:
         value: <3 pair{1} @0> (size=900000,offset=0): f32[225000]{0}
         value: <4 p @0> (size=4400000000,offset=900000): f32[1100000000]{0}
         value: <5 in_place{} @0> (size=900000,offset=0): f32[225000]{0}
         value: <6 before @0> (size=1900000,offset=900000): f32[475000]{0}
         value: <7 tiny{} @0> (size=64,offset=4500000000): f32[16]{0}

        Total bytes used: 5001200000 (4.66GiB)
          BufferLiveRange:
            pair{0}:1-9
            pair{1}:1-5
            before{}:1-3
            p{}:4-8
            in_place{}:5-9
            tiny{}:1-9
            late{}:8-9
          Live ranges at 3 (peak):
            before{}: 1900000 bytes (cumulative: 1900000 bytes)
        """)
    module = hlo(["%x = f32[100000]{0} parameter(0)", "%pair = (f32[200000]{0:S(1)}, f32[225000]{0}) custom-call(%x), "
                  'custom_call_target="f", metadata={op_name="mm" source_file="a.py" source_line=3}'])
    assert hlo_cost.largest_buffers(text, module) == [
        {"buffer": "p", "bytes": 4400000000, "shape": "", "source": ""},
        {"buffer": "pair{1}", "bytes": 900000, "shape": "f32[225000]{0}", "source": "mm a.py:3"},
        {"buffer": "x", "bytes": 400000, "shape": "f32[100000]{0}", "source": ""}]
    assert [b["bytes"] for b in hlo_cost.largest_buffers(text, module, 1)] == [4400000000]
    assert hlo_cost.largest_buffers("no ranges", module) == []

# -----------------------------------------------------------------------------
# The command: cache, totals

def graph(name="g", kind="train", steps=3, tokens=16384):
    return SimpleNamespace(name=name, kind=kind, steps=steps, times=1, tokens=tokens)

def test_unchanged_graphs_are_not_compiled_again(tmp_path, monkeypatch):
    calls = []
    def child(task, tpu, source, text, result, dump, log, env, stdin):
        calls.append(env["LIBTPU_INIT_ARGS"])
        log.write_text("")
        Path(text).write_text("HloModule m")
        Path(result).write_text(json.dumps({"bundles": {}, "compile_s": 1}))
        return 0
    monkeypatch.setattr(aot, "child", child)
    run = lambda flags=("--a=1",), print_="x": aot.compiled("g", TPUS["v6e-8"], tmp_path, list(flags), print_)["cached"]
    assert [run(), run()] == [False, True]
    assert [run(print_="y"), run(print_="y")] == [False, True]  # another program
    assert [run(flags=["--a=2"]), run(flags=["--a=2"])] == [False, True]  # other flags
    monkeypatch.setitem(aot.PINS, "libtpu", "0.0.22")
    assert [run(), run()] == [False, True]  # another compiler
    monkeypatch.setattr(hlo_cost, "COUNT", -1)
    assert [run(), run()] == [False, True]  # another way to count
    (tmp_path / "g.tpu.txt").unlink()
    assert run() is False
    (tmp_path / "g.json").write_text("{half")
    assert run() is False
    assert len(calls) == 7 and calls[:3] == ["--a=1", "--a=1", "--a=2"]

def test_programs_that_were_not_written_are_asked_for_by_name(tmp_path, monkeypatch):
    asked = []
    def child(task, tpu, source, text, result, dump, log, env, stdin):
        asked.append(stdin)
        log.write_text("")
        Path(text).write_text("HloModule m\n\nENTRY %main (x: f32[1024]) -> f32[1024] {\n  %x = f32[1024]{0} parameter(0)\n  "
                              + KERNEL.format("k.77", "x", "QQ==") + "\n}\n")
        Path(result).write_text(json.dumps({"bundles": {"k.77": [9, 0]} if "k.77" in stdin else {}, "unestimated": ["k.77"]}))
        return 0
    monkeypatch.setattr(aot, "child", child)
    assert aot.compiled("g", TPUS["v6e-8"], tmp_path, [], "x")["bundles"] == {"k.77": [9, 0]} and asked == ["", "k.77"]
    assert aot.compiled("g", TPUS["v6e-8"], tmp_path, [], "y")["bundles"] and asked[2:] == ["k.77"]  # remembered

def test_names_of_programs():
    call = '  ROOT swa_fwd.3.2 = f32[8]{0} custom-call(x), custom_call_target="tpu_custom_call"'
    flags = aot.dump_flags("/d", f'{call}\n{call}, metadata={{op_name="xla__a/jit(<lambda>)/pallas_call"}}\n', ["odd.9"])
    names = flags.split("matching_hlo=")[1].split(";")
    assert {"swa_fwd=true", "swa_fwd.71=true", "_lambda_.71=true", "odd.9=true", "sort=true", "fusion.8=true"} <= set(names)
    assert len(flags) < 100_000  # one string of the environment may have 131072

def test_a_compiler_that_dies_is_told_in_one_line(tmp_path, monkeypatch):
    def child(task, *paths, log, env, stdin):
        log.write_text("I1121 fine\nF1121 08:13:51 llo_dumper.cc:244] Check failed: x == y\n*** stack trace ***\n  @ 0x7f\n")
        return -6
    monkeypatch.setattr(aot, "child", child)
    found = aot.compiled("g", TPUS["v6e-8"], tmp_path, [], "x")
    assert "status -6" in found["error"] and "Check failed: x == y" in found["error"]
    assert not (tmp_path / "g.json").exists()

def entry(name, kind, steps, tokens, ms, compiled=True):
    return {"name": name, "kind": kind, "steps": steps, "times": 1, "tokens_per_row": tokens, "compiled": compiled, "fits": True,
            "why": "no", "est_ms": {**dict.fromkeys(hlo_cost.KINDS, 0.0), "total": ms}, "not_estimated": [], "lower_bounds_ms": 0.0,
            "hbm_gib": dict.fromkeys(["arguments", "outputs", "aliased", "temporaries", "code", "untouched", "total"], 0.0),
            "collectives": {"count": 0, "mib": 0.0, "ms": 0.0}}

def test_totals_are_steps_times_milliseconds():
    graphs = [entry("a", "train", 300, 16384, 50.0), entry("b", "train", 100, 16384, 70.0), entry("c", "train", 10, 49152, 200.0),
              entry("v", "val", 2, 262144, 500.0)]
    report = aot.build_report(graphs, TPUS["v6e-8"], "record", [], complete=True)
    assert report["total_est_s"] == pytest.approx(15 + 7 + 2) and report["validation_est_s"] == pytest.approx(1)
    assert report["total_est_s_calibrated"] == pytest.approx([24 / 1.3, 24 / 1.1])
    assert report["step_est_ms"] == {"16384": pytest.approx(55), "49152": pytest.approx(200)}
    text = aot.table(report)
    assert all(x in text for x in ["24.0 s est.", "18.5 to 21.8 s", "31.6", "82.7", "73.8", "31.25", "1.75 GHz", "1638 GB/s"])
    graphs[2]["times"] = 8  # a step in eighths
    assert aot.build_report(graphs, TPUS["v6e-1"], "record", [], complete=True)["total_est_s"] == pytest.approx(15 + 7 + 16)
    missing = [*graphs, entry("d", "train", 1, 49152, 0, compiled=False)]
    for incomplete in (aot.build_report(graphs[:2], TPUS["v6e-8"], "record", [], complete=False),
                       aot.build_report(missing, TPUS["v6e-8"], "record", [], complete=True)):
        assert incomplete["total_est_s"] is None and "No total" in aot.table(incomplete)

def test_each_tpu_has_its_own_figures_and_says_what_is_assumed():
    """The same program, a millisecond of each kind on v6e: the clock, the memory and the links of the chip that was asked for."""
    size = int(V6E.hbm_bandwidth / 4 * 1e-3)
    module = hlo(["%x = f32[25000000]{0} parameter(0)", WORK, f"%s = (f32[{size}]{{0:S(1)}}, f32[{size}]{{0}}, u32[]) copy-start(%x)",
                  f"%d = f32[{size}]{{0:S(1)}} copy-done(%s)",
                  "%c = f32[25000000]{0} all-to-all(%x), replica_groups=[1,8]<=[8], dimensions={0}", KERNEL.format("a", "x", "QQ==")], BODY)
    for name, elementwise, copies, links in (("v6e", 1, 1, 1), ("v5e", 1.75 / 1.5, 2, 2), ("v5p", 1, 1638 / 2765, 1)):
        ms = Estimate(module, {"a": (MS, 0)}, CHIPS[name]).summary()["est_ms"]
        assert (ms["elementwise"], ms["kernels"]) == (pytest.approx(elementwise),) * 2
        assert (ms["copies"], ms["collectives"]) == (pytest.approx(copies), pytest.approx(links))
    reports = [aot.build_report([entry("a", "train", 100, 16384, 50.0)], TPUS[name], "record", [], complete=True) for name in TPUS]
    for report in reports:  # the calibration is of a v6e
        assert bool(report["total_est_s_calibrated"]) == report["tpu"].startswith("v6e")
        text = aot.table(report)
        links = f"of {report['assumptions']['link_bytes_per_s'] / 1e9:.0f} GB/s through" if report["devices"] > 1 else "no links"
        assert f"GiB of {report['hbm_limit_gib']:.2f}" in text and links in text
        assert ("parallel dimension" in text) == report["tpu"].startswith(("v5p", "v4"))

def test_the_table_of_all_tpus():
    fits = aot.build_report([entry("a", "train", 600, 16384, 500.0)], TPUS["v5e-8"], "record", [], complete=True)
    never = [{"name": "a", "kind": "train", "compiled": False, "why": "does not fit: 82.60G of 31.25G hbm"}]
    rows = [aot.row(report) for report in (fits, aot.build_report(never, TPUS["v6e-1"], "record", [], complete=True))]
    assert rows[0].items() >= {"tpu": "v5e-8", "fits": True, "hbm_gib": 0, "hbm_limit_gib": 15.75, "total_est_s": 300, "compiled_graphs": 1,
                               "of": 1}.items()
    assert rows[1].items() >= {"tpu": "v6e-1", "fits": False, "hbm_gib": None, "total_est_s": None, "compiled_graphs": 0, "of": 1}.items()
    lines = aot.table_of_all(rows).splitlines()
    assert "0.00 of 15.75" in lines[1] and "5.0 min" in lines[1] and "16384: 500.0" in lines[1] and "82.60G of 31.25G" in lines[2]
    two = [{**entry(name, "train", 1, 16384, 1.0), "hbm_gib": {"total": 15.0, "code": code}} for name, code in (("a", 0.5), ("b", 1.0))]
    full = aot.build_report(two, TPUS["v5e-8"], "record", [], complete=True)
    assert full["hbm_gib_with_all_code"] == 16 and not full["fits"]  # each fits, but not with the code of the other

@pytest.mark.parametrize("gates", [(), ("xsa",), ("xsa", "gate")])
def test_attentions_calls_can_be_made_again(monkeypatch, gates):
    """Through JSON, and with the operands that they had; those of other kernels are not noted."""
    import jax

    from kernels import dispatch
    from kernels.attention import Band
    from kernels.tpu import attention
    monkeypatch.setattr(dispatch, "lowered", lambda call, shapes, operands, chip: "lowered")
    monkeypatch.setattr(dispatch, "target", None)
    calls = aot.kernels_for(TPUS["v6e-8"])
    band = Band(2, 2, 512, 128, 200, False, 128, **dict.fromkeys(gates, True))
    operands = (("qkv", (2, 6, 512, 128), "bfloat16"), ("documents", (2, 512), "int32"), ("scale", (1,), "float32"),
                *((name, (2, 2, 512), "float32") for name in gates))
    assert dispatch.lowered(attention.attention_forward, band, operands, None) == "lowered"
    dispatch.lowered(attention.attention_forward, "shapes of another kernel", operands, None)
    [call] = json.loads(json.dumps(calls))
    function, arguments, blocks = aot.attention_program(*call)
    found = jax.eval_shape(function, **{name: jax.ShapeDtypeStruct(*x) for name, x in arguments.items()})
    assert call[0] == "attention_forward" and blocks == 2 and found["y"].shape == (2, 512, 256)

# -----------------------------------------------------------------------------
# Fingerprints

def test_the_key_of_an_unchanged_graph_is_that_of_earlier_reports():
    """Reports in records/ keep their keys: what a key is made of may grow for other TPUs only."""
    assert aot.key_of("f" * 64, TPUS["v6e-8"], ["--b=2", "--a=1"]) == "2c9c89e8e5293d692d7f59f3233bff5d5554c5c180fb0888e6d05bb28bd1f37c"
    others = {aot.key_of("f" * 64, tpu, ["--b=2", "--a=1"]) for tpu in TPUS.values()}
    assert len(others | {aot.key_of("e" * 64, TPUS["v6e-8"], ["--b=2", "--a=1"]), aot.key_of("f" * 64, TPUS["v6e-8"], [])}) == len(TPUS) + 2

def test_fingerprints_say_which_graphs_changed(tmp_path, monkeypatch, capsys):
    prints = {"a": "1", "b": "2", "new": "4"}
    monkeypatch.setattr(aot, "trace", lambda *_: {"flags": ["--f"], "fingerprints": prints})
    key = lambda n: aot.key_of(n, TPUS["v6e-8"], ["--f"])
    path = tmp_path / "report.json"
    def write(graphs, topology="v6e:2x4", record=RECORD):
        graphs = [{"name": n, "key": k} for n, k in graphs.items()]
        path.write_text(json.dumps({"preset": "record", "topology": topology, "graphs": graphs} | ({"record": record} if record else {})))
    def compare(*names, complete=True, against=path):
        changed = aot.compare([graph(n) for n in names], TPUS["v6e-8"], "record", tmp_path, against, complete)
        return changed, dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    write({"a": key("1"), "b": key("2")})
    assert compare("a", "b") == (0, {"a": "same", "b": "same", "2": f"of 2 graphs are those of {os.path.relpath(path)}"})
    write({"a": key("1"), "b": key("3"), "old": key("5")})
    changed, told = compare("a", "b", "new")
    assert changed == 3 and told.items() >= {"a": "same", "b": "changed", "new": "not there before", "old": "gone"}.items()
    assert compare("a", complete=False)[0] == 0  # graphs that were not asked for are not gone
    for graphs, topology, record, words in (
            ({"a": None}, "v6e:2x4", RECORD, "has no keys"),
            ({"a": "k"}, "v5e:2x4", RECORD, f"is of #{RECORD}'s record on v5e:2x4, not of #{RECORD}'s record on v6e:2x4"),
            ({"a": "k"}, "v6e:2x4", 60, f"is of #60's record on v6e:2x4, not of #{RECORD}'s"),
            ({"a": "k"}, "v6e:2x4", None, f"is of #60's record on v6e:2x4, not of #{RECORD}'s")):  # before reports named it
        write(graphs, topology, record)
        with pytest.raises(aot.Refused, match=words):
            compare("a")
    for text in ("{half", "[]", '{"graphs": [{}]}', '{"graphs": 3}'):
        path.write_text(text)
        with pytest.raises(aot.Refused, match="report.json is no report"):
            compare("a")
    with pytest.raises(aot.Refused, match="no-such.json is no report.*No such file"):
        compare("a", against=tmp_path / "no-such.json")

def test_the_baseline_is_the_newest_report_of_this_record(tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "ROOT", tmp_path)
    ours = dict(record=RECORD)
    for day, content in enumerate((ours | dict(mark="old"), ours | dict(mark="new"), ours | dict(preset="rehearsal"),
                                   ours | dict(topology="v5e:2x4"), dict(record=60), {})):
        folder = tmp_path / f"records/2026-01-0{day}_Some"
        folder.mkdir(parents=True)
        graphs = [{"name": "a", "key": content.pop("mark", "another's")}]
        (folder / "report.json").write_text(json.dumps(dict(preset="record", topology="v6e:2x4", graphs=graphs) | content))
    report, keys = aot.baseline(None, TPUS["v6e-8"], "record")
    assert report.parent.name == "2026-01-01_Some" and keys == {"a": "new"}
    with pytest.raises(aot.Refused, match=f"no report of #{RECORD}'s rehearsal on v5e-8 in records/.*--against"):
        aot.baseline(None, TPUS["v5e-8"], "rehearsal")

# -----------------------------------------------------------------------------
# Bad input

def test_unknown_graph_gets_the_nearest_name():
    graphs = [graph("odd_16384_ws3"), graph("val_262144_ws3")]
    assert aot.select(graphs, "all") == graphs and aot.select(graphs, "val_262144_ws3,odd_16384_ws3")[0].name == "val_262144_ws3"
    with pytest.raises(aot.Refused, match="no graph 'odd_16834_ws3': did you mean 'odd_16384_ws3'"):
        aot.select(graphs, "odd_16834_ws3")
    with pytest.raises(aot.Refused, match="got no name"):
        aot.select(graphs, ",")

@pytest.mark.parametrize("installed, message", [
    (None, "no libtpu here.*libtpu==0.0.21"), ("0.0.17", "libtpu 0.0.17 is not libtpu==0.0.21.*jax 0.7.0"),
])
def test_versions(installed, message, monkeypatch):
    def version(name):
        if name != "libtpu":
            return aot.PINS[name] + "+cpu"
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(aot.Refused, match=message):
        aot.check_versions()

def test_pins_are_those_of_requirements():
    pins = dict(re.findall(r"^([\w-]+)(?:\[.*?\])?==(\S+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert {k: v for k, v in aot.PINS.items() if k != "libtpu"} == {k: pins[k] for k in aot.PINS if k != "libtpu"}

def test_a_held_lock_names_its_process(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    monkeypatch.setattr(aot, "LOCK", str(lock))
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD", raising=False)
    aot.check_lock()
    lock.write_text("")
    aot.check_lock()
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys\nf = open(sys.argv[1], 'w')\nfcntl.lockf(f, fcntl.LOCK_EX)\n"
                               "print(flush=True)\nsys.stdin.read()", str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(aot.Refused, match=f"(?s)held by process {holder.pid} .*fcntl.*wait for it"):
            aot.check_lock()
        monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        aot.check_lock()
    finally:
        holder.communicate()

def test_no_disk(tmp_path):
    aot.check_disk(tmp_path, gib=0)
    with pytest.raises(aot.Refused, match="no disk: .* GiB free .*set --out or TMPDIR"):
        aot.check_disk(tmp_path, gib=1e9)

@pytest.mark.parametrize("error, message", [
    ("INTERNAL: Mosaic failed to compile TPU kernel: Unsupported version: expected <= 7 but got 8",
     "pytorch/xla#9614.*install jax==0.7.0 jaxlib==0.7.0"),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.12G of 31.25G hbm. Exceeded hbm capacity by 8.87G.",
     "does not fit: 40.12G of 31.25G hbm; to turn: fewer tokens.*train_bs_schedule"),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 140.00M of 128.00M vmem.", "128.00M vmem; to turn: smaller blocks"),
    ("INVALID_ARGUMENT: something\n  else", "INVALID_ARGUMENT: something else"),
])
def test_errors_of_the_compiler(error, message):
    line = aot.why_not(error, "train")
    assert re.search(message, line) and "\n" not in line

def test_bad_input_is_one_line(tmp_path, capsys):
    for options, message in ((["--tpu", "v5e-9"], "no TPU 'v5e-9' here: did you mean v5e-8"), (["--tpu", "v4-8"], "v4-8: .* 16 MiB"),
                             (["--tpu", "v2-8"], "no TPU 'v2-8' here: .*There are v6e-8, v6e-4")):
        with pytest.raises(aot.Refused, match=message):
            aot.main(options)
    for options, message in ((["--tpu", "all", "--explain", "A"], "name it"), (["--against", "x"], "--against is for --fingerprints")):
        with pytest.raises(SystemExit):
            aot.main(options)
        assert message in capsys.readouterr().err
    with pytest.raises(aot.Refused, match="no preset 'nope': there are record, rehearsal"):
        aot.listing("nope")
    with pytest.raises(aot.Refused, match="no graph 'nope': did you mean"):
        aot.main(["--graphs", "nope", "--out", str(tmp_path)])
    done = subprocess.run([sys.executable, ROOT / "tools/aot.py", "--tpu", "nope"], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and done.stderr.startswith("aot: no TPU 'nope'") and done.stderr.count("\n") == 1

# -----------------------------------------------------------------------------
# Compiled for v6e. The programs are written by jax in a process of its own: how many CPU devices jax has is decided once.

compiles = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")

@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    out = tmp_path_factory.mktemp("programs")
    subprocess.run([sys.executable, ROOT / "tests/programs/small.py", out], check=True, capture_output=True,
                   env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return out

def entry_of(programs, name, flags=()):
    found = aot.compiled(name, TPUS["v6e-8"], programs, list(flags), "any")
    return aot.assess(graph(name), found, TPUS["v6e-8"], programs)

@compiles
def test_a_matmul_costs_its_floor_and_an_all_reduce_its_bytes(programs):
    e = entry_of(programs, "matmul")
    floor = 1e3 * 2 * 4096**3 / V6E.bf16_flops
    assert floor <= e["est_ms"]["matmuls"] <= 1.15 * floor
    assert e["collectives"]["count"] == 1 and e["collectives"]["mib"] == pytest.approx(2)
    assert e["collectives_ms"] == pytest.approx(2 * 7 / 8 * 2**21 / 200e9 * 1e3)
    assert e["hbm_gib"]["arguments"] == pytest.approx((32 + 32 + 2) / 1024, rel=0.01)
    assert e["hbm_gib"]["outputs"] == pytest.approx((32 + 2) / 1024, rel=0.01)  # the product stays split by rows
    assert e["fits"] and e["not_estimated"] == [] and any("dot_general" in op["source"] for op in e["dearest_ops"])

@compiles
def test_a_loop_of_n_bodies_costs_n_bodies(programs):
    source = programs / "loop.hlo.pb"
    source.write_bytes(aot.donate(source.read_bytes(), [0]))
    e = entry_of(programs, "loop")
    assert e["hbm_gib"]["aliased"] == e["hbm_gib"]["outputs"] == pytest.approx(8 / 1024)  # 2048 x 2048 in bf16
    floor = 7e3 * 2 * 2048**3 / V6E.bf16_flops
    assert [x["trips"] for x in e["loops"]] == [7]
    assert floor <= e["est_ms"]["matmuls"] <= 1.4 * floor
    [matmul] = [op for op in e["dearest_ops"] if op["kind"] == "matmuls"]
    assert matmul["times"] == 7 and matmul["ms"] == pytest.approx(e["est_ms"]["matmuls"])

@compiles
def test_a_buffer_of_40_gib_does_not_fit(programs):
    e = entry_of(programs, "planted")
    assert not e["compiled"] and "does not fit" in e["why"] and "train_bs_schedule" in e["why"]
    assert "40.0 GiB" in e["why"] or any(b["bytes"] >= 40 * 2**30 for b in e["largest_buffers"])

@compiles
def test_kernels_cost_their_trips_at_every_call(programs):
    e = entry_of(programs, "kernels")
    short, long, looped = (e["kernels"][f"{name}_kernel"] for name in ("short", "long", "looped"))
    assert (short["calls"], long["calls"], looped["calls"]) == (1, 1, 3)
    assert long["ms"] / short["ms"] == pytest.approx(2, rel=0.1)
    # 256 x 128 floats are 32 registers; two exponentials of each go through one unit, one at a time
    assert 32 * 64 / MS <= short["ms"] <= 4 * 32 * 64 / MS
    assert 3 * 16 * 64 / MS <= looped["ms"] <= 3 * 4 * 16 * 64 / MS
    assert e["kernels_ms"] == pytest.approx(short["ms"] + long["ms"] + looped["ms"]) and not e["not_estimated"]
    # in and out, a block at each of 32, 64 and 16 places in turn
    found = json.loads((programs / "kernels.json").read_text())
    assert {found["kernel_names"][call]: n for call, n in found["kernel_bytes"].items()} == {
        f"{name}_kernel": [places * 256 * 128 * 4] * 2 for name, places in (("short", 32), ("long", 64), ("looped", 16))}

@compiles
def test_flags_reach_the_compiler(programs):
    e = entry_of(programs, "matmul", ["--xla_no_such_flag=1"])
    assert not e["compiled"] and "xla_no_such_flag" in e["why"] and "\n" not in e["why"]

@compiles
def test_the_fingerprint_is_of_what_is_computed(programs, tmp_path):
    """Not of source lines, in the graph or in its kernels, or the module's name; of donated buffers, too."""
    source, moved = programs / "kernels.hlo.pb", programs / "moved/kernels.hlo.pb"
    moved.write_bytes(moved.read_bytes().replace(b"jit__lambda", b"jit__lambdb"))
    (tmp_path / "donated").write_bytes(aot.donate(source.read_bytes(), [0]))
    aot.child("fingerprints", source, moved, tmp_path / "donated", programs / "matmul.hlo.pb", log=tmp_path / "log",
              env={"JAX_PLATFORMS": "cpu"})
    prints = (tmp_path / "log").read_text().split()[-4:]
    assert source.read_bytes() != moved.read_bytes()
    assert prints[0] == prints[1] and len(set(prints)) == 3

@compiles
def test_a_graph_of_the_rehearsal(tmp_path, monkeypatch, capsys):
    """From tracing to the report, with all that is promised of the command; on a TPU of 4 chips, where rows take turns."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000")
    def run(*options):
        status = aot.main(["--tpu", "v6e-4", "--preset", "rehearsal", "--out", str(tmp_path), *options])
        return status, *capsys.readouterr()
    listed = [line.split() for line in run("--list")[1].splitlines()]
    name, steps = next((line[0], int(line[2])) for line in listed if line[0].startswith("update_odd"))
    status, out, _ = run("--graphs", name)
    assert status == 0
    report = json.loads((tmp_path / "report.json").read_text())
    [e] = report["graphs"]
    assert (report["tpu"], report["topology"], report["devices"]) == ("v6e-4", "v6e:2x2", 4) and "through the 4 chips" in out
    assert e["name"] == name and e["steps"] == steps and e["compiled"] and e["fits"] and not e["cached"] and len(e["key"]) == 64
    assert "--xla_tpu_prefer_async_allgather_to_allreduce=true" in report["flags"]  # torch_xla's own
    assert any("windowed_einsum" in flag for flag in report["flags"])  # the caller's
    gib = e["hbm_gib"]
    assert gib["total"] == pytest.approx(sum(gib[k] for k in ("arguments", "outputs", "temporaries", "code", "untouched")) - gib["aliased"])
    assert gib["aliased"] > 0.9 * gib["outputs"] > 0  # weights and state exist once
    assert e["est_ms"]["total"] == pytest.approx(sum(e["est_ms"][k] for k in hlo_cost.KINDS)) and e["est_ms"]["matmuls"] > 0
    assert e["collectives"]["mib"] > 1 and {"reduce-scatter", "all-gather"} <= set(e["collectives"]["kinds"])
    assert any("muon_xla.py:" in op["source"] for op in e["dearest_ops"])
    assert name in out and "No total" in out
    assert {f"{name}.hlo.pb", f"{name}.tpu.txt", "report.json"} <= {p.name for p in tmp_path.iterdir()}
    _, out, said = run("--graphs", name, "--json")
    assert "unchanged" in said and json.loads(out)["graphs"][0] == {**e, "cached": True}
    _, out, _ = run("--explain", name)
    assert "dearest operations" in out and "largest buffers" in out and "muon_xla.py:" in out
    status, out, _ = run("--graphs", name, "--fingerprints", "--against", str(tmp_path / "report.json"))
    assert status == 0 and f"{name:34} same" in out and "1 of 1 graphs" in out
