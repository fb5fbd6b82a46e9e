"""The emulator's threads, checks and counts: kernels written by hand that part and meet, each fault planted once, and
beside it what looks like it and is none."""

import numpy as np
import pytest

from ptx import Region, Unmodelled, launch, parse
from ptx.contraction import contracted
from ptx.formats import Array
from written_ptx import run

OWN_WORD = "mad.wide.u32 %d9, %r0, 4, %d0;"  # %d9: the thread's word of the first array
OWN_SHARED = "shl.b32 %r9, %r0, 2; mov.b32 %r8, smem; add.s32 %r9, %r8, %r9;"


def words(n: int) -> Array:
    return np.zeros(n, np.uint32)


# Threads that part and meet


def test_threads_take_the_two_ways_of_a_branch_and_meet_again() -> None:
    out = words(64)
    body = f"""{OWN_WORD} and.b32 %r1, %r0, 1; setp.eq.b32 %p1, %r1, 0; @%p1 bra even;
        mov.u32 %r2, 100; bra.uni join;
        even: setp.lt.u32 %p2, %r0, 8; @!%p2 bra large; mov.u32 %r2, 7; bra join;
        large: mov.u32 %r2, 9;
        join: shfl.sync.idx.b32 %r3, %r2, 0, 31, -1; add.s32 %r2, %r2, %r3; st.global.b32 [%d9], %r2;"""
    report = run(body, out, threads=64)
    assert not report.faults
    i = np.arange(64)
    first = np.where(i < 32, 7, 9)  # what each warp's lane 0 has
    assert out.tolist() == (np.where(i % 2, 100, np.where(i < 8, 7, 9)) + first).tolist()


def test_loops_of_different_lengths_end_together() -> None:
    out = words(32)
    body = f"""{OWN_WORD} mov.u32 %r1, 0; mov.u32 %r2, 0;
        loop: setp.gt.u32 %p1, %r1, %r0; @%p1 bra end;
        inner: add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1; and.b32 %r3, %r1, 1; setp.eq.b32 %p2, %r3, 1; @%p2 bra inner;
        bra loop;
        end: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; st.global.b32 [%d9], %r2;"""
    report = run(body, out)
    assert not report.faults
    wanted = [sum(range((i // 2 + 1) * 2)) for i in range(32)]
    assert out.tolist() == wanted
    (shuffle,) = (n for n, i in zip(report.issued, report.kernel.code, strict=True) if i.opcode.startswith("shfl"))
    assert shuffle == 1  # by all at once


def test_threads_may_end_before_others() -> None:
    out = words(32)
    report = run(f"{OWN_WORD} setp.lt.u32 %p1, %r0, 5; @%p1 ret; st.global.b32 [%d9], %r0;", out)
    assert not report.faults and out.tolist() == [0] * 5 + list(range(5, 32))


def test_a_guard_keeps_the_other_threads_registers() -> None:
    out = words(32)
    run(f"{OWN_WORD} mov.u32 %r1, 5; setp.lt.u32 %p1, %r0, 3; @!%p1 mov.u32 %r1, 6; st.global.b32 [%d9], %r1;", out)
    assert out.tolist() == [5] * 3 + [6] * 29


def test_a_copy_of_a_register_stays_when_the_register_changes() -> None:
    out = words(32)
    body = "setp.lt.u32 %p1, %r0, 3; mov.u32 %r1, %r0; mov.u32 %r2, %r1; @%p1 mov.u32 %r1, 99;"
    run(f"{OWN_WORD} {body} st.global.b32 [%d9], %r2;", out)
    assert out.tolist() == list(range(32))


def test_programs_know_their_numbers() -> None:
    out = words(3 * 600)  # of more than a batch of threads
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ntid.x; mad.lo.s32 %r4, %r1, %r3, %r0;
        mad.wide.u32 %d9, %r4, 4, %d0; mad.lo.s32 %r5, %r1, 1000, %r2; st.global.b32 [%d9], %r5;"""
    assert not run(body, out, threads=3, programs=600).faults
    assert out.tolist() == np.repeat(np.arange(600) * 1000 + 600, 3).tolist()


def test_inline_assembly_has_registers_of_its_own() -> None:
    out = words(1)
    body = """mov.u32 %r1, 3;
        { .reg .b32 tmp; mov.u32 tmp, 4; { .reg .b32 tmp; mov.u32 tmp, 9; } add.s32 %r1, %r1, tmp; }
        { .reg .b32 tmp; mov.u32 tmp, 50; add.s32 %r1, %r1, tmp; } st.global.b32 [%d0], %r1;"""
    run(body, out, threads=1)
    assert out.tolist() == [57]


# Memory


@pytest.mark.parametrize(
    ("address", "there"),
    [("[%d9]", True), ("[%d9+4]", False), ("[%d9+-4]", False), ("[%d9+1099511627776]", False), ("[%d8]", False)],
)
def test_bounds_of_global_memory(address: str, there: bool) -> None:
    """[%d9 + 2^40] is where the second array lies, which has another number of words; %d8 is 0."""
    for line in (f"ld.global.b32 %r1, {address};", f"st.global.b32 {address}, %r0;"):
        report = run(f"{OWN_WORD} mov.b64 %d8, 0; {line}", words(32), words(3))
        assert report.kinds == (set() if there else {"bounds"}), line


def test_an_access_out_of_bounds_leaves_memory_alone() -> None:
    both = words(8)
    report = run(f"{OWN_WORD} setp.lt.u32 %p1, %r0, 8; @!%p1 st.global.b32 [%d9], %r0;", both[:4])
    assert report.kinds == {"bounds"} and not both.any()


def test_bounds_of_shared_memory() -> None:
    body = f"{OWN_SHARED} st.shared.b32 [%r9], %r0;"
    assert not run(body, shared=128).faults
    assert run(body, shared=124).kinds == {"bounds"}
    assert run(f"{OWN_SHARED} st.shared.b32 [%r9+-4], %r0;", shared=128).kinds == {"bounds"}


def test_alignment_is_of_all_that_is_accessed_at_once() -> None:
    given = words(40)
    body = "mad.wide.u32 %d9, %r0, {}, %d0; ld.global.v{}.b32 {}, [%d9];"
    four, two = "{%r1, %r2, %r3, %r4}", "{%r1, %r2}"
    assert not run(body.format(16, 4, four), given, threads=8).faults
    assert run(body.format(8, 4, four), given, threads=8).kinds == {"alignment"}
    assert not run(body.format(8, 2, two), given, threads=8).faults
    assert run(body.format(4, 2, two), given, threads=8).kinds == {"alignment"}
    shared = "{} st.shared.v2.b32 [smem+{}], {{%r0, %r0}};"
    only = "setp.eq.b32 %p1, %r0, 0; @%p1"
    assert not run(shared.format(only, 8), shared=64).faults
    assert run(shared.format(only, 4), shared=64).kinds == {"alignment"}


def test_shared_memory_is_noise_before_it_is_written() -> None:
    body = f"{OWN_SHARED} {OWN_WORD} {{}} bar.sync 0; ld.shared.b32 %r1, [%r9]; st.global.b32 [%d9], %r1;"
    outs = [words(32) for _ in range(2)]
    for seed, out in enumerate(outs):
        assert run(body.format(""), out, shared=128, seed=seed).kinds == {"unwritten"}
    assert (outs[0] != outs[1]).all()
    assert not run(body.format("st.shared.b32 [%r9], %r0;"), outs[0], shared=128).faults
    half = "cvt.u16.u32 %h1, %r0; st.shared.b16 [%r9], %h1;"
    assert run(body.format(half), outs[0], shared=128).kinds == {"unwritten"}


def test_registers_are_noise_before_they_are_written() -> None:
    outs = [words(32) for _ in range(2)]
    for seed, out in enumerate(outs):
        run(f"{OWN_WORD} setp.lt.u32 %p1, %r0, 9; @%p1 mov.u32 %r1, 1; st.global.b32 [%d9], %r1;", out, seed=seed)
    assert (outs[0] == outs[1]).sum() == 9


# Barriers and exchanges


@pytest.mark.parametrize(
    ("body", "faulty"),
    [
        ("bar.sync 0;", False),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra on; mov.u32 %r1, 1; on: bar.sync 0;", False),
        ("setp.lt.u32 %p1, %r0, 48; @%p1 bar.sync 0;", True),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", True),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra on; bar.sync 0; bra end; on: bar.sync 0; end: mov.u32 %r1, 1;", True),
    ],
)
def test_a_barrier_is_reached_by_all_threads_of_a_program_at_one_place(body: str, faulty: bool) -> None:
    report = run(body, threads=64, programs=2)
    assert report.kinds == ({"barrier"} if faulty else set())


@pytest.mark.parametrize("exchange", ["shfl.sync.bfly.b32 %r1, %r0, 1, 31, {}", "redux.sync.min.u32 %r1, %r0, {}"])
def test_all_lanes_of_a_mask_take_part(exchange: str) -> None:
    some = "setp.lt.u32 %p1, %r0, 16; @%p1 "
    assert not run(exchange.format("-1") + ";", threads=64).faults
    assert run(some + exchange.format("-1") + ";", threads=64).kinds == {"absent"}
    assert not run(some + exchange.format("0xffff") + ";", threads=64).faults
    assert run(exchange.format("0xffff") + ";", threads=64).kinds == {"absent"}  # those that it does not name


def test_a_lane_that_is_not_there_gives_noise() -> None:
    body = f"{OWN_WORD} setp.lt.u32 %p1, %r0, 1; @%p1 shfl.sync.idx.b32 %r1, %r0, 5, 31, 1; st.global.b32 [%d9], %r1;"
    outs = [words(32) for _ in range(2)]
    for seed, out in enumerate(outs):
        run(body, out, seed=seed)
    assert outs[0][0] != outs[1][0]


NEIGHBOUR = f"{OWN_SHARED} st.shared.b32 [%r9], %r0; {{}} xor.b32 %r9, %r9, {{}}; ld.shared.b32 %r1, [%r9];"


@pytest.mark.parametrize("distance", [4, 128])  # a lane of the same warp; of another
def test_a_barrier_lies_between_a_store_and_another_thread_s_load(distance: int) -> None:
    assert not run(NEIGHBOUR.format("bar.sync 0;", distance), threads=64, shared=256).faults
    assert run(NEIGHBOUR.format("", distance), threads=64, shared=256).kinds == {"race"}
    twice = NEIGHBOUR.format("bar.sync 0;", distance) + f"{OWN_SHARED} {{}} st.shared.b32 [%r9], %r1;"
    assert run(twice.format(""), threads=64, shared=256).kinds == {"race"}
    assert not run(twice.format("bar.sync 0;"), threads=64, shared=256).faults


@pytest.mark.parametrize("last", ["bar.sync 0;", ""])
def test_programs_that_pass_other_numbers_of_barriers(last: str) -> None:
    """Each as often as its number says; without the last barrier a thread may store before its neighbour has read."""
    body = f"""{OWN_SHARED} mov.u32 %r1, %ctaid.x; loop: st.shared.b32 [%r9], %r0; bar.sync 0; xor.b32 %r2, %r9, 128;
        ld.shared.b32 %r3, [%r2]; {last} sub.s32 %r1, %r1, 1; setp.gt.s32 %p1, %r1, 0; @%p1 bra loop;"""
    report = run(body, threads=64, programs=4, shared=256)
    assert report.kinds == (set() if last else {"race"})
    assert report.totals()["barriers"] == 2 * 7 * (2 if last else 1)


def test_a_race_is_found_whichever_thread_ran_first() -> None:
    """The second warp reads what the first wrote long before, or has yet to write."""
    for condition in ("lt", "ge"):
        body = f"{OWN_SHARED} setp.{condition}.u32 %p1, %r0, 32; @%p1 bra on; ld.shared.b32 %r1, [%r9]; bra end;"
        body += "on: xor.b32 %r9, %r9, 128; st.shared.b32 [%r9], %r0; end: mov.u32 %r1, 1;"
        assert "race" in run(body, threads=64, shared=256).kinds


def test_global_memory_is_ordered_within_a_program_by_its_barriers() -> None:
    body = f"{OWN_WORD} st.global.b32 [%d9], %r0; {{}} xor.b64 %d9, %d9, 4; ld.global.b32 %r1, [%d9];"
    assert run(body.format(""), words(64), threads=64).kinds == {"race"}
    assert not run(body.format("bar.sync 0;"), words(64), threads=64).faults


def test_nothing_orders_programs() -> None:
    number = "mov.u32 %r1, %ctaid.x; setp.eq.b32 %p1, %r0, 0; setp.eq.b32 %p2, %r1, {}; and.pred %p1, %p1, %p2;"
    read_other = number.format(0) + "@%p1 st.global.b32 [%d0], %r0; bar.sync 0;" + number.format(1)
    assert run(read_other + "@%p1 ld.global.b32 %r2, [%d0];", words(1), programs=2).kinds == {"race"}
    assert not run(read_other + "@%p1 ld.global.b32 %r2, [%d0+4];", words(2), programs=2).faults
    store = "mov.u32 %r1, %ctaid.x; setp.eq.b32 %p1, %r0, 0; @%p1 st.global.b32 [%d0], {};"
    assert run(store.format("%r1"), words(1), programs=2).kinds == {"conflict"}
    assert run(store.format("%r1"), words(1), programs=9000).kinds == {"conflict"}  # of several batches
    assert not run(store.format("%r0"), words(1), programs=2).faults


def test_threads_that_store_to_one_place_store_one_value() -> None:
    out = words(1)
    assert not run("mov.u32 %r1, 7; st.global.b32 [%d0], %r1;", out).faults
    outs = [words(1), words(1)]
    for seed, out in enumerate(outs):
        assert run("st.global.b32 [%d0], %r0;", out, seed=seed).kinds == {"conflict"}
    assert [int(out[0]) for out in outs] == [31, 0]
    assert run("st.shared.b32 [smem], %r0;", shared=16).kinds == {"conflict"}
    read = "mov.u32 %r1, 7; st.shared.b32 [smem], %r1; ld.shared.b32 %r2, [smem];"
    assert run(read, shared=16).kinds == {"race"}  # of copies, which others read
    overlap = (
        "cvt.u16.u32 %h1, %r0; setp.eq.b32 %p1, %r0, 0; @%p1 st.global.b32 [%d0], %r0; st.global.b16 [%d0+2], %h1;"
    )
    assert run(overlap, words(1)).kinds == {"race"}


def test_an_endless_loop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx.grid.MOST_STEPS", 1000)
    assert run("loop: bra loop;").kinds == {"endless"}


# Counts


@pytest.mark.parametrize(
    ("stride", "offset", "many", "sectors"),
    [
        (4, 0, "", 4),
        (4, 4, "", 5),
        (8, 0, "", 8),
        (32, 0, "", 32),
        (0, 0, "", 1),
        (16, 0, ".v4", 16),
        (32, 16, ".v4", 32),
    ],
)
def test_sectors_of_a_warp_s_access(stride: int, offset: int, many: str, sectors: int) -> None:
    registers = "{%r1, %r2, %r3, %r4}" if many else "%r1"
    body = f"mad.wide.u32 %d9, %r0, {stride}, %d0; ld.global{many}.b32 {registers}, [%d9+{offset}];"
    report = run(body, words(1024), threads=64)
    second = len(np.unique((np.arange(64) * stride + offset)[32:] // 32)) if not many else sectors
    assert report.totals()["load_sectors"] == sectors + second
    touched = np.unique((np.arange(64) * stride + offset) // 32)
    assert report.bytes_from_memory == 32 * len(touched) and report.bytes_to_memory == 0
    assert report.totals()["load_bytes"] == 64 * (16 if many else 4)


def test_a_tensor_may_start_within_a_sector() -> None:
    text = EXCHANGE.replace("BODY", "st.global.v4.b32 [%d1+16], {%r0, %r0, %r0, %r0};").replace("%tid.x", "%ctaid.x")
    region = Region("words", (1 << 40) + 16, words(8).view(np.uint8))
    report = launch(parse(text), (1,), [np.array([region.base], np.uint64)], [region])
    assert not report.faults and report.bytes_to_memory == 32
    assert region.stored.tolist() == [False, True]
    late = Region("words", 1 << 40, words(8).view(np.uint8), 20)
    assert launch(parse(text), (1,), [np.array([late.base], np.uint64)], [late]).kinds == {"bounds"}


@pytest.mark.parametrize(
    ("stride", "many", "passes"), [(4, "", 1), (128, "", 32), (8, "", 2), (0, "", 1), (16, ".v4", 4), (32, ".v4", 8)]
)
def test_passes_over_the_banks_of_shared_memory(stride: int, many: str, passes: int) -> None:
    registers = "{%r0, %r0, %r0, %r0}" if many else "%r0"
    body = f"mul.lo.u32 %r9, %r0, {stride}; st.shared{many}.b32 [%r9], {registers};"
    totals = run(body, shared=4096).totals()
    assert totals["bank_passes"] == passes and totals["bank_conflicts"] == passes - (4 if many else 1)


def test_instructions_are_counted_by_warps_and_by_threads() -> None:
    body = "setp.lt.u32 %p1, %r0, 8; @%p1 bra on; mov.u32 %r1, 1; on: mov.u32 %r2, 1;"
    report = run(body, threads=64)
    counted = {
        i.text: (int(n), int(m)) for i, n, m in zip(report.kernel.code, report.issued, report.lanes, strict=True)
    }
    assert counted["mov.u32 %r1, 1"] == (2, 56) and counted["mov.u32 %r2, 1"] == (2, 64)
    assert counted["@%p1 bra on"] == (2, 8)


# Text


def test_only_one_kernel_alone_is_modelled() -> None:
    text = ".visible .entry {}()\n{}\n.reqntid 32\n{{ ret; }}\n"
    assert parse(text.format("one", "")).threads == 32
    for wrong in (
        text.format("one", "") + text.format("two", ""),
        ".func (.reg .b32 a) f() { ret; }" + text.format("one", ""),
        ".func (.reg .b32 a) f()\n;\n" + text.format("one", ""),
        text.format("one", ".reqnctapercluster 2, 1, 1"),
        text.format("one", "").replace(".reqntid 32", ""),
        text.format("one", "").replace(".reqntid 32", ".reqntid 32, 2"),
        ".shared .align 4 .b8 a[4];\n" + text.format("one", ""),
        text.format("one", "").replace("ret;", ".local .align 4 .b8 a[4]; ret;"),
        text.format("one", "").replace("ret;", "@%p1;"),
        text.format("one", "").replace("()", "(.param .align 4 .b8 a[4])"),
    ):
        with pytest.raises(Unmodelled):
            launch(parse(wrong), (1,), [], [])


def test_a_fault_says_where() -> None:
    text = """.file 1 "/some/where/kernels.py"
        .visible .entry one(.param .u64 .ptr .global .align 1 p) .reqntid 32 { .reg .b64 %d<2>; .reg .b32 %r<2>;
        ld.param.b64 %d1, [p];
        .loc 1 12 3 // kernels.py:12:3 @[ kernels.py:40:7 ]
        ld.global.b32 %r1, [%d1]; ret; }"""
    report = launch(parse(text), (1,), [np.zeros(1, np.uint64)], [])
    assert report.faults == [
        "bounds: 4 bytes of global memory, 32 times [kernels.py:12 in kernels.py:40 ld.global.b32 %r1, [%d1]]"
    ]


# Contraction

EXCHANGE = """.visible .entry one(.param .u64 .ptr .global .align 1 p) .reqntid 32 { .reg .b64 %d<2>; .reg .b32 %r<9>;
    ld.param.b64 %d1, [p]; mov.u32 %r0, %tid.x; cvt.rn.f32.u32 %r1, %r0; div.rn.f32 %r1, %r1, 0f40E00000; BODY
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; add.f32 %r4, %r2, %r3; ret; }"""


@pytest.mark.parametrize(
    ("body", "contracts"),
    [
        ("mul.f32 %r2, %r1, %r1;", True),
        ("mul.rn.f32 %r2, %r1, %r1;", False),
        ("fma.rn.f32 %r2, %r1, %r1, 0f00000000;", False),
        ("mul.f32 %r2, %r1, %r1; mov.b32 %r1, %r0;", False),  # another %r1 by then
        ("mul.f32 %r2, %r1, %r1; on: ", False),
    ],
)
def test_products_without_a_rounding_are_contracted(body: str, contracts: bool) -> None:
    kernel = contracted(parse(EXCHANGE.replace("BODY", body)))
    assert (kernel.code[-2].opcode == "contracted.add.f32") == contracts


def test_lanes_that_contract_before_an_exchange_hold_other_sums() -> None:
    """Each pair of lanes stores its sum to one place."""
    store = "shr.u32 %r5, %r0, 1; mad.wide.u32 %d0, %r5, 4, %d1; st.global.b32 [%d0], %r4; ret;"

    def kinds(body: str, contract: bool) -> set[str]:
        kernel = parse(EXCHANGE.replace("BODY", body).replace("ret;", store))
        region = Region("sums", 1 << 40, words(16).view(np.uint8))
        pointer = [np.array([1 << 40], np.uint64)]
        return launch(contracted(kernel) if contract else kernel, (1,), pointer, [region]).kinds

    assert kinds("mul.f32 %r2, %r1, %r1;", False) == set()
    assert kinds("mul.f32 %r2, %r1, %r1;", True) == {"conflict"}
    assert kinds("mul.rn.f32 %r2, %r1, %r1;", True) == set()
