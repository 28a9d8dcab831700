"""The GPU emulator on PTX written by hand: memory, warps, barriers, matrices, counts; and planted
bugs, all of which it must find.
"""

import re

import numpy as np
import pytest
import torch
from ptx_kernels import kernel, launch

from tools.gpu_emulator import Fault, Unsupported, load, run, tensor_map

SHARED = ".extern .shared .align 1024 .b8 memory[];"


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def zeros(n, dtype=torch.int32):
    return torch.zeros(n, dtype=dtype)


# ---- memory


def test_vectors_and_narrow_accesses():
    """A vector is its elements in order; bytes and halves are extended by their signs."""
    x = torch.arange(-64, 64, dtype=torch.int32)
    y = torch.zeros_like(x)
    body = """
        shl.b64 %rd50, %rd60, 2;  add.s64 %rd51, %rd0, %rd50;  add.s64 %rd52, %rd1, %rd50;
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd51];
        st.global.v4.b32 [%rd52], {%r4, %r3, %r2, %r1};
    """
    launch(body, x, y)
    assert torch.equal(y.view(-1, 4), x.view(-1, 4).flip(1))

    x = torch.arange(-64, 64, dtype=torch.int8)
    y = zeros(32)
    body = """
        cvt.u64.u32 %rd50, %r0;  add.s64 %rd51, %rd0, %rd50;  add.s64 %rd52, %rd1, %rd60;
        ld.global.s8 %r1, [%rd51+30];  ld.global.u8 %r2, [%rd51+30];
        sub.s32 %r3, %r1, %r2;  st.global.u32 [%rd52], %r3;
    """
    launch(body, x, y)
    assert torch.equal(y, torch.where(x[30:62] < 0, -256, 0).int())


def test_every_space_by_generic_addresses():
    module = ".const .align 4 .b32 table[4] = {10, 20, 30, 40};\n .shared .align 4 .b32 cells[32];"
    y = zeros(32)
    body = """
        .local .align 16 .b8 depot[64];
        mov.u64 %rd1, depot;  cvta.local.u64 %rd2, %rd1;
        st.u32 [%rd2+8], %r0;  ld.local.u32 %r1, [%rd1+8];
        mov.u64 %rd3, cells;  cvta.shared.u64 %rd4, %rd3;  add.s64 %rd4, %rd4, %rd60;
        st.u32 [%rd4], %r1;  cvta.to.shared.u64 %rd5, %rd4;  ld.shared.u32 %r2, [%rd5];
        mov.u64 %rd6, table;  ld.const.u32 %r3, [%rd6+12];
        add.u32 %r4, %r2, %r3;
        add.s64 %rd7, %rd0, %rd60;  st.u32 [%rd7], %r4;
    """
    launch(body, y, module=module)
    assert torch.equal(y, torch.arange(32, dtype=torch.int32) + 40)


def test_addresses_of_32_bits_wrap_around():
    """As compilers expect that split one between a register, then negative, and an instruction."""
    y = zeros(32)
    body = """
        mov.u32 %r1, memory;  shl.b32 %r2, %r0, 2;  add.u32 %r1, %r1, %r2;  sub.u32 %r1, %r1, 128;
        st.shared.u32 [%r1+128], %r0;  ld.shared.u32 %r3, [%r1+128];
        add.s64 %rd7, %rd0, %rd60;  st.global.u32 [%rd7], %r3;
    """
    launch(body, y, module=SHARED, shared=128)
    assert torch.equal(y, torch.arange(32, dtype=torch.int32))


def test_parameters_of_all_kinds():
    y = zeros(8, torch.float64)
    k = kernel(
        """
        ld.param.u64 %rd0, [p0];  ld.param.s16 %r1, [p1];  ld.param.f32 %f1, [p2];
        ld.param.f64 %fd1, [p3];  ld.param.b32 %r2, [p4+4];
        cvt.rn.f64.s32 %fd2, %r1;  cvt.f64.f32 %fd3, %f1;  cvt.rn.f64.u32 %fd4, %r2;
        st.global.v2.f64 [%rd0], {%fd2, %fd3};  st.global.v2.f64 [%rd0+16], {%fd1, %fd4};
        """,
        "u64", "u16", "f32", "f64", "u64",
    )  # fmt: skip
    run(k, (1,), (1,), [y, -7, 0.5, 1e-300, 9 << 32])
    assert y.tolist()[:4] == [-7, 0.5, 1e-300, 9]
    with pytest.raises(TypeError, match="takes 5 arguments, got 1"):
        run(k, (1,), (1,), [y])


STORE = "add.s64 %rd50, %rd0, %rd60; st.global.u32 [%rd50+{offset}], %r0;"


def test_out_of_bounds_says_who_and_where():
    """The missing mask: the last thread stores beyond the tensor.  Neighbouring memory is
    untouched.
    """
    memory = zeros(64)
    body = "mad.lo.u32 %r1, %r0, 4, 0;" + STORE.format(offset=4)
    message = (
        r"access of 4 bytes outside every buffer, byte 128 of p0 \(128 bytes\), "
        r"block \(0, 0, 0\) thread 31\n  k, PTX line \d+: st\.global\.u32 \[%rd50\+4\], %r0"
    )
    with pytest.raises(Fault, match=message):
        launch(body, memory[:32])
    assert not memory.any()
    with pytest.raises(Fault, match=r"byte -4 of p0"):
        launch(STORE.format(offset=-4), memory[16:48])
    with pytest.raises(Fault, match="outside every buffer"):
        launch("mov.u64 %rd0, 0;" + STORE.format(offset=0), memory)


def test_views_end_where_their_last_element_does():
    """Rows of a wider tensor are a buffer up to the last one's end, not up to the storage's."""
    wide = torch.zeros(4, 100, dtype=torch.int32)
    body = "add.s64 %rd50, %rd0, {offset}; st.global.u32 [%rd50], %r0;"
    view = wide[:2, 10:20]
    launch(body.format(offset=4 * 109), view, threads=1)
    with pytest.raises(Fault, match=r"byte 440 of p0 \(440 bytes\)"):
        launch(body.format(offset=4 * 110), view, threads=1)


def test_misaligned_accesses():
    y = zeros(64)
    vector = "add.s64 %rd50, %rd0, {offset}; st.global.v4.b32 [%rd50], {{%r0, %r0, %r0, %r0}};"
    launch(vector.format(offset=16), y, threads=1)
    with pytest.raises(Fault, match="misaligned access of 16 bytes, byte 8 of p0"):
        launch(vector.format(offset=8), y, threads=1)
    with pytest.raises(Fault, match="misaligned access of 4 bytes at byte 2 of shared memory"):
        launch("st.shared.u32 [memory+2], %r0;", y, module=SHARED, shared=64, threads=1)


def test_shared_memory_ends():
    store = (
        "shl.b32 %r1, %r0, 2; mov.u32 %r2, memory; add.u32 %r2, %r2, %r1; st.shared.u32 [%r2], %r0;"
    )
    launch(store, zeros(1), module=SHARED, shared=128)
    with pytest.raises(Fault, match=r"byte 124 of shared memory \(124 bytes\), .* thread 31"):
        launch(store, zeros(1), module=SHARED, shared=124)


def test_uninitialised_shared_memory():
    load_ = "ld.shared.u32 %r1, [memory+8];"
    launch("st.shared.u32 [memory+8], %r0;" + load_, zeros(1), module=SHARED, shared=64, threads=1)
    with pytest.raises(Fault, match="reads byte 8 of shared memory, which nobody has written"):
        launch(load_, zeros(1), module=SHARED, shared=64, threads=1)


def test_two_threads_store_to_one_place():
    """The same value is harmless, different ones are not."""
    launch("mov.u32 %r1, 5; st.global.u32 [%rd0], %r1;", zeros(1))
    with pytest.raises(Fault, match="store different values to byte 0 of p0"):
        launch("st.global.u32 [%rd0], %r0;", zeros(1))


def test_one_nan_is_like_another():
    """Numpy has several where a GPU has one, so threads that store different ones are fine."""
    y = zeros(4)
    body = """
        setp.eq.u32 %p1, %r0, 3;  mov.b32 %f1, 0f7F800000;
        sub.f32 %f2, %f1, %f1;  selp.b32 %r1, %f2, {nan}, %p1;  st.global.u32 [%rd0], %r1;
    """
    launch(body.format(nan="0x7FC00000"), y)
    with pytest.raises(Fault, match="store different values"):
        launch(body.format(nan="0x7FC00001"), y)


# ---- races

# Each thread stores its number, another one's is read.
EXCHANGE = """
    shl.b32 %r1, %r0, 2;  mov.u32 %r2, memory;  add.u32 %r3, %r2, %r1;
    st.shared.u32 [%r3], %r0;
    {first}
    xor.b32 %r4, %r1, 128;  add.u32 %r5, %r2, %r4;  ld.shared.u32 %r6, [%r5];
    {second}
    add.s64 %rd50, %rd0, %rd60;  st.global.u32 [%rd50], %r6;
    st.shared.u32 [%r3], %r6;
"""


def test_missing_barriers():
    options = {"threads": 64, "module": SHARED, "shared": 256}
    y = zeros(64)
    launch(EXCHANGE.format(first="bar.sync 0;", second="bar.sync 0;"), y, **options)
    assert torch.equal(y, torch.arange(64, dtype=torch.int32) ^ 32)
    with pytest.raises(Fault, match=r"race on byte \d+ of shared memory: read by .* thread \d+"):
        launch(EXCHANGE.format(first="", second="bar.sync 0;"), y, **options)
    with pytest.raises(Fault, match=r"race on byte \d+ of shared memory: write by"):
        launch(EXCHANGE.format(first="bar.sync 0;", second=""), y, **options)
    launch(EXCHANGE.format(first="", second=""), y, check_races=False, **options)


def test_a_warp_needs_no_barrier_with_itself():
    body = EXCHANGE.replace("128", "64").format(first="bar.warp.sync -1;", second="")
    y = zeros(32)
    launch(body, y, module=SHARED, shared=128)
    assert torch.equal(y, torch.arange(32, dtype=torch.int32) ^ 16)


def test_races_between_blocks():
    """Each block writes its own word; one of them reads its neighbour's."""
    own = "mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd50, %r1, 4; add.s64 %rd51, %rd0, %rd50;"
    fine = own + "ld.global.u32 %r2, [%rd51]; add.u32 %r2, %r2, 1; st.global.u32 [%rd51], %r2;"
    y = zeros(4)
    launch(fine, y, blocks=4, threads=1)
    assert y.tolist() == [1, 1, 1, 1]
    reads = "setp.eq.u32 %p1, %r1, 1; @%p1 ld.global.u32 %r3, [%rd0+8];"
    with pytest.raises(
        Fault, match=r"block \(1, 0, 0\) reads byte 8 of p0, which block \(2, 0, 0\)"
    ):
        launch(fine + reads, y, blocks=4, threads=1)
    with pytest.raises(Fault, match=r"overwrites byte 0 of p0, which block .* has written"):
        launch(own + "st.global.u32 [%rd51], %r1; bar.sync 0; st.global.u32 [%rd0], %r1;", y,
               blocks=4, threads=1)  # fmt: skip


# ---- asynchronous copies

# Two groups of copies of 16 bytes for each of 64 threads; then what another warp's have brought is
# read.
COPIES = """
    shl.b32 %r1, %r0, 4;  mov.u32 %r2, memory;  add.u32 %r3, %r2, %r1;
    shl.b64 %rd50, %rd60, 2;  add.s64 %rd51, %rd0, %rd50;
    cp.async.cg.shared.global [%r3], [%rd51], 16;
    cp.async.commit_group;
    cp.async.cg.shared.global [%r3+1024], [%rd51+1024], 16, {valid};
    cp.async.commit_group;
    cp.async.wait_group {pending};
    {barrier}
    xor.b32 %r4, %r1, 512;  add.u32 %r5, %r2, %r4;
    ld.shared.v4.b32 {{%r6, %r7, %r8, %r9}}, [%r5+{read}];
    add.s64 %rd52, %rd1, %rd50;  st.global.v4.b32 [%rd52], {{%r6, %r7, %r8, %r9}};
"""


def copies(read=0, pending=0, barrier="bar.sync 0;", valid="16"):
    x, y = torch.arange(512, dtype=torch.int32), zeros(256)
    body = COPIES.format(read=read, pending=pending, barrier=barrier, valid=valid)
    launch(body, x, y, threads=64, module=SHARED, shared=2048)
    return y.view(2, 128).flip(0).reshape(-1).tolist()


def test_cp_async():
    assert copies() == list(range(256))
    assert copies(pending=1) == list(range(256))
    assert copies(read=1024) == list(range(256, 512))
    # Where the source is said to be shorter, zeros follow.
    want = [i if i % 4 < 2 else 0 for i in range(256, 512)]
    assert copies(read=1024, valid="8") == want
    assert copies(read=1024, valid="0") == [0] * 256


def test_lax_wait_group():
    with pytest.raises(
        Fault, match=r"read by .* an asynchronous copy to it has not been waited for"
    ):
        copies(read=1024, pending=1)
    with pytest.raises(Fault, match="another warp has used it since the last barrier"):
        copies(barrier="")


def test_copies_from_beyond_a_tensor():
    x = torch.arange(512, dtype=torch.int32)
    body = COPIES.format(read=0, pending=0, barrier="bar.sync 0;", valid="16")
    with pytest.raises(Fault, match=r"byte 2032 of p0 \(2044 bytes\), .* thread 63"):
        launch(body, x[:511], zeros(256), threads=64, module=SHARED, shared=2048)


# ---- warps


def shuffled(mode, amount, clamp, x):
    """shfl.sync by its definition in the PTX manual, lane by lane."""
    segment, limit = clamp >> 8 & 31, clamp & 31
    result = []
    for lane in range(32):
        last = lane & segment | limit & ~segment
        first = lane & segment
        source = {
            "up": lane - amount, "down": lane + amount, "bfly": lane ^ amount,
            "idx": first | amount & ~segment,
        }[mode]  # fmt: skip
        inside = source >= last if mode == "up" else source <= last
        result.append((x[source if inside else lane], inside))
    return result


@pytest.mark.parametrize("mode", ("up", "down", "bfly", "idx"))
def test_shuffles(mode):
    x = torch.randint(0, 1000, (64,), dtype=torch.int32)
    for amount, width in ((1, 32), (5, 8), (16, 32), (3, 4)):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        y, inside = zeros(64), zeros(64)
        body = f"""
            add.s64 %rd50, %rd0, %rd60;  ld.global.u32 %r1, [%rd50];
            shfl.sync.{mode}.b32 %r2|%p1, %r1, {amount}, {clamp}, -1;  selp.u32 %r3, 1, 0, %p1;
            add.s64 %rd51, %rd1, %rd60;  st.global.u32 [%rd51], %r2;
            add.s64 %rd52, %rd2, %rd60;  st.global.u32 [%rd52], %r3;
        """
        launch(body, x, y, inside, threads=64)
        want = [r for w in x.view(2, 32).tolist() for r in shuffled(mode, amount, clamp, w)]
        assert list(zip(y.tolist(), map(bool, inside.tolist()), strict=True)) == want


def test_votes_and_reductions():
    """On the lanes that are there: those with odd numbers."""
    text = """
        and.b32 %r1, %r0, 1;  setp.eq.u32 %p1, %r1, 1;  setp.gt.u32 %p2, %r0, 20;
        @!%p1 bra DONE;
        vote.sync.ballot.b32 %r2, %p2, 0xAAAAAAAA;
        vote.sync.any.pred %p3, %p2, 0xAAAAAAAA;  selp.u32 %r3, 1, 0, %p3;
        vote.sync.all.pred %p4, !%p2, 0xAAAAAAAA;  selp.u32 %r4, 1, 0, %p4;
        activemask.b32 %r5;
        redux.sync.add.s32 %r6, %r0, 0xAAAAAAAA;  redux.sync.max.u32 %r7, %r0, 0xAAAAAAAA;
        and.b32 %r8, %r0, 7;  match.any.sync.b32 %r9, %r8, 0xAAAAAAAA;
        elect.sync %r10|%p5, 0xAAAAAAAA;  selp.u32 %r11, 1, 0, %p5;
        mad.wide.u32 %rd50, %r0, 32, %rd0;
        st.global.v4.b32 [%rd50], {%r2, %r3, %r4, %r5};
        st.global.v4.b32 [%rd50+16], {%r6, %r7, %r9, %r11};
        DONE:
    """
    y = zeros(32 * 8)
    launch(text, y)
    odd = range(1, 32, 2)
    for lane, row in enumerate(y.view(32, 8).tolist()):
        if lane % 2 == 0:
            assert row == [0] * 8
            continue
        ballot = sum(1 << i for i in odd if i > 20)
        same = sum(1 << i for i in odd if i % 8 == lane % 8)
        want = [ballot, 1, 0, 0xAAAAAAAA, sum(odd), 31, same, int(lane == 1)]
        assert [v % 2**32 for v in row] == want


def test_a_lane_that_is_named_must_be_there():
    text = "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, {mask};"
    launch(text.format(mask="0xFFFF"), zeros(1))
    with pytest.raises(Fault, match="thread 16 is named but not here"):
        launch(text.format(mask="-1"), zeros(1))
    with pytest.raises(Fault, match="calls but is not in the member mask"):
        launch(text.format(mask="0xFF"), zeros(1))


# ---- control


def test_divergence():
    """Each lane loops as often as its number says and takes its own branches; the warp meets
    again.
    """
    text = """
        mov.u32 %r1, 0;  mov.u32 %r2, 0;
        LOOP: setp.ge.u32 %p1, %r1, %r0;  @%p1 bra OUT;
        and.b32 %r3, %r1, 1;  setp.eq.u32 %p2, %r3, 0;
        @%p2 bra EVEN;
        add.u32 %r2, %r2, 100;  bra NEXT;
        EVEN: add.u32 %r2, %r2, 1;
        NEXT: add.u32 %r1, %r1, 1;  bra LOOP;
        OUT: vote.sync.ballot.b32 %r4, %p1, -1;
        add.s64 %rd50, %rd0, %rd60;  st.global.u32 [%rd50], %r2;
        add.s64 %rd50, %rd1, %rd60;  st.global.u32 [%rd50], %r4;
    """
    y, ballot = zeros(48), zeros(48)
    for seed in (None, 0, 1):
        launch(text.replace("-1;", "%r5;").replace("mov.u32 %r2, 0;", """mov.u32 %r2, 0;
            setp.lt.u32 %p5, %r0, 32; selp.b32 %r5, -1, 0xFFFF, %p5;"""), y, ballot, threads=48,
            seed=seed)  # fmt: skip
        assert y.tolist() == [(n + 1) // 2 + n // 2 * 100 for n in range(48)]
        assert ballot.tolist() == [-1] * 32 + [0xFFFF] * 16


def test_guards_and_early_exit():
    text = """
        setp.lt.u32 %p1, %r0, 10;  @%p1 ret;
        setp.gt.u32 %p2, %r0, 20;  mov.u32 %r1, 1;  @%p2 mov.u32 %r1, 2;  @!%p2 add.u32 %r1, %r1, 5;
        bar.sync 0;
        add.s64 %rd50, %rd0, %rd60;  st.global.u32 [%rd50], %r1;
    """
    y = zeros(64)
    launch(text, y, threads=64)
    assert y.tolist() == [0] * 10 + [6] * 11 + [2] * 43


def test_barriers_that_never_fill():
    text = "setp.lt.u32 %p1, %r0, 32; @%p1 bra A; bar.sync 0; bar.sync 0; bra B; A: bar.sync 0; B:"
    with pytest.raises(Fault, match=r"deadlock: .* wait for ever \(line \d+: bar.sync 0"):
        launch(text + "bar.sync 1, 96;", zeros(1), threads=64)
    text = "setp.lt.u32 %p1, %r0, 32; @%p1 bra A; bar.sync 1, 64; A: bar.sync 2, 32;"
    with pytest.raises(Fault, match="deadlock"):
        launch(text, zeros(1), threads=64)
    with pytest.raises(Fault, match="the kernel does not end"):
        launch("A: bra A;", zeros(1), max_branches=1000)


def test_named_barriers():
    """One warp produces, the other consumes; each barrier is for both."""
    text = """
        setp.lt.u32 %p1, %r0, 32;  and.b32 %r1, %r0, 31;  shl.b32 %r1, %r1, 2;
        mov.u32 %r2, memory;  add.u32 %r2, %r2, %r1;  mov.u32 %r3, 0;
        @%p1 bra PRODUCE;
        CONSUME: bar.sync 1, 64;  ld.shared.u32 %r4, [%r2];  add.u32 %r5, %r5, %r4;
        bar.sync 2, 64;  add.u32 %r3, %r3, 1;  setp.lt.u32 %p2, %r3, 3;  @%p2 bra CONSUME;
        add.s64 %rd50, %rd0, %rd60;  st.global.u32 [%rd50+-128], %r5;  ret;
        PRODUCE: add.u32 %r6, %r0, %r3;  st.shared.u32 [%r2], %r6;
        {arrive}  bar.sync 2, 64;  add.u32 %r3, %r3, 1;  setp.lt.u32 %p2, %r3, 3;  @%p2 bra PRODUCE;
    """.replace("mov.u32 %r3, 0;", "mov.u32 %r3, 0; mov.u32 %r5, 0;")
    for arrive in ("bar.sync 1, 64;", "bar.arrive 1, 64;"):
        for seed in (None, 3, 4):
            y = zeros(32)
            text_ = text.replace("{arrive}", arrive)
            launch(text_, y, threads=64, module=SHARED, shared=128, seed=seed)
            assert y.tolist() == [3 * n + 3 for n in range(32)]


def test_unknown_instructions_raise_when_reached():
    """Not before, and never does anything else happen instead."""
    for bad in (
        "frobnicate.u32 %r1, %r0;",
        "add.cc.u32 %r1, %r0, 1;",
        "mov.u32 %r1, %smid;",
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%fd0}, {%fd2}, {%fd3}, {%fd4};",
        "cvt.rz.bf16.f32 %h1, %f0;",
        "ld.global.v8.b32 {%r1, %r2}, [%rd0];",
        "call.uni (%r1), somewhere, (%r0);",
    ):
        launch("bra OVER;" + bad + "OVER:", zeros(1))
        with pytest.raises(Unsupported, match=re.escape(bad.split()[0])):
            launch(bad, zeros(1))


def test_device_assertions():
    text = """
        setp.ne.u32 %p1, %r0, 17;  @%p1 bra FINE;
        {{ .param .b64 param0;  st.param.b64 [param0], %rd0;
           call.uni __assertfail, (param0); }}
        FINE:
    """.replace("{{", "{").replace("}}", "}")
    with pytest.raises(Fault, match=r"device assertion failed, block \(0, 0, 0\) thread 17"):
        launch(text, zeros(1), module=".extern .func __assertfail (.param .b64 p);")


def test_launch_limits():
    for threads in (0, 1025):
        with pytest.raises(Fault, match=f"{threads} threads in a block"):
            launch("", zeros(1), threads=threads)
    text = ".visible .entry k() .maxntid 64, 1, 1 { ret; }"
    run(load(text)["k"], (1,), (64,), [])
    with pytest.raises(Fault, match="compiled for 64"):
        run(load(text)["k"], (1,), (65,), [])


# ---- atomics

ATOMICS = {
    "add.u32": lambda x: sum(x), "min.s32": min, "max.u32": max, "and.b32": np.bitwise_and.reduce,
    "or.b32": np.bitwise_or.reduce, "xor.b32": np.bitwise_xor.reduce,
}  # fmt: skip


@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name):
    x = torch.randint(1, 1000, (128,), dtype=torch.int32)
    start = x[:1].clone()
    y = start.clone()
    text = f"""
        mov.u32 %r1, %ctaid.x;  mad.lo.u32 %r2, %r1, 32, %r0;  mul.wide.u32 %rd50, %r2, 4;
        add.s64 %rd51, %rd0, %rd50;  ld.global.u32 %r3, [%rd51];
        red.global.{name} [%rd1], %r3;
    """
    launch(text, x, y, blocks=4)
    assert y.item() == ATOMICS[name]([*start.tolist(), *x.tolist()])


def test_atomics_return_what_was_there():
    """Tickets are all different, and which block gets the last one depends on the seed."""
    last_blocks = set()
    for seed in range(8):
        counter, tickets = zeros(1), zeros(8)
        text = """
            mov.u32 %r1, %ctaid.x;  mul.wide.u32 %rd50, %r1, 4;  add.s64 %rd51, %rd1, %rd50;
            atom.global.acq_rel.gpu.add.u32 %r2, [%rd0], 1;  st.global.u32 [%rd51], %r2;
        """
        launch(text, counter, tickets, threads=1, blocks=8, seed=seed)
        assert counter.item() == 8 and sorted(tickets.tolist()) == list(range(8))
        last_blocks.add(tickets.tolist().index(7))
    assert len(last_blocks) > 2


def test_compare_and_swap_as_a_lock():
    """Blocks take turns, each spinning until it has the lock."""
    text = """
        mov.u32 %r9, %ctaid.x;
        AGAIN: atom.global.cas.b32 %r1, [%rd0], 0, 1;  setp.ne.u32 %p1, %r1, 0;  @%p1 bra AGAIN;
        ld.global.u32 %r2, [%rd1];  mul.lo.u32 %r2, %r2, 3;  add.u32 %r2, %r2, 1;
        st.global.u32 [%rd1], %r2;  atom.global.exch.b32 %r3, [%rd0], 0;
    """
    lock, y = zeros(1), zeros(1)
    launch(text, lock, y, threads=1, blocks=6)
    assert lock.item() == 0 and y.item() == (3**6 - 1) // 2


def test_shared_atomics_race_with_plain_accesses():
    text = """
        setp.eq.u32 %p1, %r0, 0;  mov.u32 %r1, 0;  @%p1 st.shared.u32 [memory], %r1;
        {first}
        atom.shared.add.u32 %r2, [memory], %r0;
        {second}
        ld.shared.u32 %r3, [memory];  add.s64 %rd50, %rd0, %rd60;  st.global.u32 [%rd50], %r3;
    """
    options = {"threads": 64, "module": SHARED, "shared": 16}
    y = zeros(64)
    launch(text.format(first="bar.sync 0;", second="bar.sync 0;"), y, **options)
    assert y.tolist() == [sum(range(64))] * 64
    for barriers in (
        {"first": "", "second": "bar.sync 0;"},
        {"first": "bar.sync 0;", "second": ""},
    ):
        with pytest.raises(Fault, match="race on byte 0"):
            launch(text.format(**barriers), y, **options)


# ---- matrices


def numbers(*shape, dtype, seed=0):
    """Of the format's own, so small that products and sums are exact in float32."""
    x = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype) if dtype in (torch.int8, torch.uint8) else (x / 4).to(dtype)


# PTX name, torch type, k, elements per register
MMA = [
    ("bf16", torch.bfloat16, 16, 2), ("bf16", torch.bfloat16, 8, 2), ("f16", torch.float16, 16, 2),
    ("tf32", torch.float32, 8, 1), ("tf32", torch.float32, 4, 1), ("s8", torch.int8, 32, 4),
    ("u8", torch.uint8, 16, 4), ("e4m3", torch.float8_e4m3fn, 32, 4),
    ("e5m2", torch.float8_e5m2, 32, 4),
]  # fmt: skip


@pytest.mark.parametrize("kind, dtype, k, per", MMA, ids=lambda v: str(v))
def test_mma(kind, dtype, k, per):
    """Fragments as the PTX manual lays them out: lane 4g + q holds row g (+ 8), columns per * q + h
    (+ 4 per * j).
    """
    whole = dtype in (torch.int8, torch.uint8)
    a, b = numbers(16, k, dtype=dtype), numbers(k, 8, dtype=dtype, seed=1)
    c = numbers(16, 8, dtype=torch.int8 if whole else torch.float32, seed=2)
    c = c.int() if whole else c
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    a_bits, b_bits = a.view(bits), b.view(bits)
    registers_a, registers_b = 16 * k // per // 32, 8 * k // per // 32
    fragment_a = torch.zeros(32, registers_a, per, dtype=bits)
    fragment_b = torch.zeros(32, registers_b, per, dtype=bits)
    for lane in range(32):
        g, q = divmod(lane, 4)
        for i in range(registers_a):
            for h in range(per):
                fragment_a[lane, i, h] = a_bits[g + 8 * (i % 2), per * q + h + 4 * per * (i // 2)]
        for i in range(registers_b):
            for h in range(per):
                fragment_b[lane, i, h] = b_bits[per * q + h + 4 * per * i, g]
    fragment_a, fragment_b = (
        f.reshape(32, -1).contiguous().view(torch.int32) for f in (fragment_a, fragment_b)
    )
    out = "s32" if whole else "f32"
    loads = "".join(
        f"mul.lo.u32 %r1, %r0, {4 * n};  cvt.u64.u32 %rd50, %r1;  add.s64 %rd50, %rd50, %rd{i};\n"
        + "".join(f"ld.global.b32 %r{base + j}, [%rd50+{4 * j}];\n" for j in range(n))
        for i, (base, n) in enumerate(((10, registers_a), (20, registers_b)))
    )
    # Lane 4g + q has columns 2q and 2q + 1 of rows g and g + 8 of the result.
    address = """
        shr.u32 %r2, %r0, 2;  and.b32 %r3, %r0, 3;  shl.b32 %r3, %r3, 1;
        mad.lo.u32 %r4, %r2, 8, %r3;  mul.wide.u32 %rd51, %r4, 4;
        add.s64 %rd52, %rd51, %rd2;  add.s64 %rd53, %rd51, %rd3;
    """
    places = [0, 4, 256, 260]

    def listed(first, count):
        return "{" + ", ".join(f"%r{first + j}" for j in range(count)) + "}"

    body = loads + address
    body += "".join(f"ld.global.b32 %r{30 + j}, [%rd52+{p}];\n" for j, p in enumerate(places))
    body += f"mma.sync.aligned.m16n8k{k}.row.col.{out}.{kind}.{kind}.{out} {listed(40, 4)}, "
    body += f"{listed(10, registers_a)}, {listed(20, registers_b)}, {listed(30, 4)};\n"
    body += "".join(f"st.global.b32 [%rd53+{p}], %r{40 + j};\n" for j, p in enumerate(places))
    d = torch.zeros_like(c)
    counts = launch(body, fragment_a, fragment_b, c, d)
    assert torch.equal(d.double(), a.double() @ b.double() + c.double())
    assert counts.tensor_flops == {"mma": 2 * 16 * 8 * k}


def test_ldmatrix_and_stmatrix():
    """Rows are given by the lanes in turn; lane 4g + q gets row g, columns 2q and 2q + 1, or,
    transposed, column g.
    """
    x = torch.arange(4 * 64, dtype=torch.int16)
    body = """
        shl.b32 %r1, %r0, 4;  mov.u32 %r2, memory;  add.u32 %r3, %r2, %r1;
        shl.b64 %rd50, %rd60, 2;  add.s64 %rd51, %rd0, %rd50;  add.s64 %rd52, %rd1, %rd50;
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd51];
        st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
        ldmatrix.sync.aligned.m8n8.x4{load}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r3];
        {between}
        stmatrix.sync.aligned.m8n8.x4{store}.shared.b16 [%r3], {{%r10, %r11, %r12, %r13}};
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
        st.global.v4.b32 [%rd52], {{{result}}};
    """
    stored, loaded = "%r4, %r5, %r6, %r7", "%r10, %r11, %r12, %r13"
    matrices = x.view(4, 8, 8)

    def go(load_="", store="", result=stored):
        y = torch.zeros_like(x)
        text = body.format(load=load_, store=store, result=result, between="")
        launch(text, x, y, module=SHARED, shared=512)
        return y

    assert torch.equal(go(), x) and torch.equal(go(".trans", ".trans"), x)
    assert torch.equal(go(load_=".trans").view(4, 8, 8), matrices.mT)
    assert torch.equal(go(store=".trans").view(4, 8, 8), matrices.mT)
    by_lane = go(result=loaded).view(32, 4, 2)
    for lane in range(32):
        g, q = divmod(lane, 4)
        assert torch.equal(by_lane[lane], matrices[:, g, 2 * q : 2 * q + 2])


def test_matrix_instructions_want_whole_warps():
    text = (
        "setp.lt.u32 %p1, %r0, 16; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [memory];"
    )
    with pytest.raises(Fault, match="not all lanes of the warp"):
        launch(text, zeros(1), module=SHARED, shared=128)


# wgmma: 64 x n x 16 from shared memory, filled by hand with the layout of one swizzle mode.


def swizzled(matrix, span):
    """[rows, k] 16-bit numbers as they lie in shared memory, k along the row of an atom of `span`
    bytes (0: none).
    """
    rows, k = matrix.shape
    out = torch.zeros(rows * k, dtype=torch.int16)
    flat = matrix.contiguous().view(torch.int16)
    for row in range(rows):
        for column in range(k):
            if span:
                offset = row * span + column % (span // 2) * 2 + column // (span // 2) * rows * span
                offset ^= (offset >> 7 & {32: 1, 64: 3, 128: 7}[span]) << 4
            else:  # 8 x 8 matrices, side by side along k first
                offset = (row // 8 * (k // 8) + column // 8) * 128 + row % 8 * 16 + column % 8 * 2
            out[offset // 2] = flat[row, column]
    return out


def descriptor(start, leading, stride, span):
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[span]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def wgmma(a_registers=False, scale=1, wait=True, reuse=False, span=32, n=16):
    a, b = numbers(64, 16, dtype=torch.bfloat16), numbers(n, 16, dtype=torch.bfloat16, seed=1)
    c = numbers(64, n, dtype=torch.float32, seed=2)
    data = torch.cat([swizzled(a, span), swizzled(b, span)])
    stride = 8 * span if span else 256
    da, db = (descriptor(start, 128, stride, span) for start in (0, 2048))
    rows = data.numel() * 2 // 128
    # Warp w and lane 4g + q have rows 16w + g and 16w + g + 8, columns 2q and 2q + 1 of every 8.
    address = """
        shr.u32 %r2, %r0, 5;  and.b32 %r3, %r0, 31;  shr.u32 %r4, %r3, 2;
        mad.lo.u32 %r2, %r2, 16, %r4;  and.b32 %r3, %r3, 3;
    """
    body = f"""
        // {rows} rows of 128 bytes to shared memory, one word a thread
        mov.u32 %r5, 0;  mov.u32 %r6, memory;
        FILL: mad.lo.u32 %r7, %r5, 512, %r6;  shl.b32 %r8, %r0, 2;  add.u32 %r7, %r7, %r8;
        mul.wide.u32 %rd50, %r5, 512;  add.s64 %rd50, %rd50, %rd60;  add.s64 %rd50, %rd50, %rd0;
        ld.global.u32 %r9, [%rd50];  st.shared.u32 [%r7], %r9;
        add.u32 %r5, %r5, 1;  setp.lt.u32 %p1, %r5, {rows // 4};  @%p1 bra FILL;
        bar.sync 0;  fence.proxy.async.shared::cta;  {address}
        mad.lo.u32 %r10, %r2, {n}, 0;  mad.lo.u32 %r10, %r3, 2, %r10;
        mul.wide.u32 %rd51, %r10, 4;  add.s64 %rd52, %rd51, %rd1;  add.s64 %rd53, %rd51, %rd2;
        shl.b32 %r11, %r2, 5;  mad.lo.u32 %r11, %r3, 4, %r11;  cvt.u64.u32 %rd54, %r11;
        add.s64 %rd54, %rd54, %rd3;
        ld.global.u32 %r20, [%rd54];  ld.global.u32 %r21, [%rd54+256];
        ld.global.u32 %r22, [%rd54+16];  ld.global.u32 %r23, [%rd54+272];
    """
    places = [8 * n * 4 * (j % 4 // 2) + j // 4 * 32 + j % 2 * 4 for j in range(n // 2)]
    body += "".join(f"ld.global.f32 %f{j}, [%rd52+{p}];\n" for j, p in enumerate(places))
    accumulators = "{" + ", ".join(f"%f{j}" for j in range(n // 2)) + "}"
    source = "{%r20, %r21, %r22, %r23}" if a_registers else f"{da}"
    flags = "1, 1, 0" if a_registers else "1, 1, 0, 0"
    body += f"""
        wgmma.fence.sync.aligned;  setp.ne.u32 %p2, 0, {scale};
        wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16
            {accumulators}, {source}, {db}, %p2, {flags};
        wgmma.commit_group.sync.aligned;
        {"bar.sync 0; st.shared.u32 [memory+2048], %r0;" if reuse else ""}
        wgmma.wait_group.sync.aligned {0 if wait else 1};
    """
    body += "".join(f"st.global.f32 [%rd53+{p}], %f{j};\n" for j, p in enumerate(places))
    d = torch.full_like(c, float("nan"))
    counts = launch(body, data, c, d, a, threads=128, module=SHARED, shared=data.numel() * 2)
    assert counts.tensor_flops == {"wgmma": 2 * 64 * n * 16}
    return d, a.double() @ b.double().mT, c


@pytest.mark.parametrize("span", (0, 32))
def test_wgmma(span):
    d, product, c = wgmma(span=span)
    assert torch.equal(d.double(), product + c)
    d, product, _ = wgmma(span=span, scale=0)
    assert torch.equal(d.double(), product)
    d, product, c = wgmma(span=span, a_registers=True)
    assert torch.equal(d.double(), product + c)


def test_wgmma_finishes_when_it_is_waited_for():
    d, _, c = wgmma(wait=False)
    assert torch.equal(d, c)
    with pytest.raises(
        Fault, match="an asynchronous operation that reads it has not been waited for"
    ):
        wgmma(reuse=True)


# ---- mbarriers and bulk copies

BULK = """
    setp.eq.u32 %p1, %r0, 0;  mov.u32 %r1, memory;  mov.u32 %r2, 0;  shl.b32 %r3, %r0, 2;
    @%p1 mbarrier.init.shared::cta.b64 [memory+1024], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+1024], {expected};
    @%p1 {load};
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [memory+1024], {parity};
    @!%p2 bra WAIT;
    add.u32 %r4, %r1, %r3;  ld.shared.u32 %r5, [%r4];
    add.s64 %rd50, %rd1, %rd60;  st.global.u32 [%rd50], %r5;
"""
PLAIN = """cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
    [memory], [%rd0], 256, [memory+1024]"""


def bulk(expected=256, parity=0, load_=PLAIN):
    x, y = torch.arange(64, dtype=torch.int32) + 1, zeros(64)
    text = BULK.format(expected=expected, parity=parity, load=load_)
    launch(text, x, y, threads=64, module=SHARED, shared=1040)
    return x, y


def test_bulk_copy_with_an_mbarrier():
    x, y = bulk()
    assert torch.equal(x, y)
    # The phase that came before is over already, and nothing has landed: the old content is read.
    x, y = bulk(parity=1)
    assert (y == -1).all()
    with pytest.raises(Fault, match=r"deadlock: .*mbarrier\.try_wait"):
        bulk(expected=512)
    with pytest.raises(Fault, match="no mbarrier at byte 1032"):
        bulk(load_=PLAIN.replace("[memory+1024]", "[memory+1032]"))
    with pytest.raises(Fault, match="must be a multiple of 16"):
        bulk(load_=PLAIN.replace("256", "252"))
    with pytest.raises(Fault, match="more arrivals than the mbarrier counts"):
        again = "mbarrier.arrive.shared::cta.b64 _, [memory+1024], 1"
        bulk(load_=f"{again}; @%p1 {again}; @%p1 {again.replace(', 1', ', 2')}")


# A box of 8 x 16 numbers at (row, column) goes to shared memory and from there to another place.
BOXES = """
    ld.param.u64 %rd0, [p0];  mov.u32 %r0, %tid.x;  mul.wide.u32 %rd60, %r0, 4;
    setp.eq.u32 %p1, %r0, 0;  shl.b32 %r3, %r0, 2;
    mov.b64 %rd1, p1;  mov.b64 %rd2, p2;
    @%p1 mbarrier.init.shared::cta.b64 [memory+1024], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+1024], 512;
    mov.u32 %r4, {row};  mov.u32 %r5, {column};
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
        [memory], [%rd1, {{%r5, %r4}}], [memory+1024];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [memory+1024], 0;
    @!%p2 bra WAIT;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {{%r5, %r4}}], [memory];
    @%p1 cp.async.bulk.commit_group;
    {wait}
    mov.u32 %r6, 77;  @%p1 st.shared.u32 [memory], %r6;
"""


def boxes(row, column, swizzle=64, wait="@%p1 cp.async.bulk.wait_group.read 0;", rows=20):
    x = torch.arange(rows * 24, dtype=torch.int32).view(rows, 24) + 1
    y = torch.zeros_like(x)
    body = BOXES.format(row=row, column=column, wait=wait)
    k = kernel(body, "u64", *["align 64 .b8[128]"] * 2, module=SHARED)
    maps = [tensor_map(t, (8, 16), swizzle) for t in (x, y)]
    counts = run(k, (1,), (32,), [x, *maps], shared=1040, buffers={"x": x, "y": y})
    return x, y, counts


@pytest.mark.parametrize("swizzle", (0, 64, 128))
@pytest.mark.parametrize("row, column", ((0, 0), (8, 4), (16, 16), (-3, -8)))
def test_tensor_maps(row, column, swizzle):
    """What lies outside the tensor is neither read nor written."""
    x, y, counts = boxes(row, column, swizzle)
    want = torch.zeros_like(x)
    inside = slice(max(row, 0), max(row + 8, 0)), slice(max(column, 0), max(column + 16, 0))
    want[inside] = x[inside]
    assert torch.equal(y, want)
    size = 4 * want.count_nonzero().item()
    assert counts.traffic["x"].loads.bytes == counts.traffic["y"].stores.bytes == size


@pytest.mark.parametrize("shape, box", (((100,), (32,)), ((3, 6, 20), (2, 4, 8))), ids=str)
def test_tensor_maps_of_other_ranks(shape, box):
    """The last box hangs over every edge; it is copied to the place that it came from."""
    x = torch.arange(np.prod(shape), dtype=torch.int32).view(shape) + 1
    y = torch.zeros_like(x)
    corner = [n // b * b for n, b in zip(shape, box, strict=True)]
    rank = len(box)
    text = BOXES.replace("2d", f"{rank}d").replace("%r5, %r4", ", ".join(map(str, corner[::-1])))
    text = text.replace(", 512;", f", {4 * np.prod(box)};")
    text = text.format(row=0, column=0, wait="@%p1 cp.async.bulk.wait_group.read 0;")
    k = kernel(text, "u64", *["align 64 .b8[128]"] * 2, module=SHARED)
    maps = [tensor_map(t, box) for t in (x, y)]
    run(k, (1,), (32,), [x, *maps], shared=1040, buffers={"x": x, "y": y})
    want = torch.zeros_like(x)
    inside = tuple(slice(c, c + b) for c, b in zip(corner, box, strict=True))
    want[inside] = x[inside]
    assert want.any() and torch.equal(y, want)


def test_stores_read_shared_memory_until_they_are_waited_for():
    _, y, _ = boxes(0, 0, wait="")
    assert y[0, 0] == 77


def test_misaligned_tensor_maps():
    x = torch.zeros(8, 10, dtype=torch.int32)
    body = BOXES.format(row=0, column=0, wait="")
    k = kernel(body, "u64", *["align 64 .b8[128]"] * 2, module=SHARED)
    bad = tensor_map(x, (8, 16))
    with pytest.raises(Fault, match="not a multiple of 16 bytes"):
        run(k, (1,), (32,), [x, bad, bad], shared=1040)


# ---- counts


def test_traffic():
    """32 threads with a stride: bytes, sectors of each warp's instruction, distinct ones."""
    x, y = zeros(4096), zeros(64)
    text = """
        mul.lo.u32 %r1, %r0, {stride};  mul.wide.u32 %rd50, %r1, 4;  add.s64 %rd51, %rd0, %rd50;
        ld.global.u32 %r2, [%rd51];  ld.global.u32 %r2, [%rd51];
        add.s64 %rd52, %rd1, %rd60;  setp.lt.u32 %p1, %r0, 10;  @%p1 st.global.u32 [%rd52], %r2;
    """
    for stride, sectors in ((1, 4), (2, 8), (8, 32), (64, 32), (0, 1)):
        counts = launch(text.format(stride=stride), x, y, threads=64)
        loads, stores = counts.traffic["p0"].loads, counts.traffic["p1"].stores
        assert (loads.bytes, loads.instructions) == (2 * 64 * 4, 4)
        assert loads.sectors == 4 * sectors
        assert loads.fetched == 2 * (64 if stride else 1) * 4 and stores.fetched == 40
        assert loads.distinct_sectors == (2 * sectors if stride else 1)
        assert (stores.bytes, stores.sectors, stores.instructions) == (40, 2, 1)
        assert counts.loads == loads and counts.stores == stores
    assert counts.instructions["ld.global.u32"] == 4
    assert counts.instructions["st.global.u32"] == 2  # issued by both warps, active in one
    assert counts.warp_instructions == sum(counts.instructions.values())


def test_traffic_of_many_blocks():
    """More blocks than run at once; what several of them load is distinct once."""
    x, y = zeros(256), zeros(256 * 100)
    text = """
        add.s64 %rd50, %rd0, %rd60;  ld.global.u32 %r1, [%rd50];
        mov.u32 %r2, %ctaid.x;  mad.lo.u32 %r3, %r2, 256, %r0;  mul.wide.u32 %rd51, %r3, 4;
        add.s64 %rd52, %rd1, %rd51;  st.global.u32 [%rd52], %r2;
    """
    for seed in (None, 5):
        counts = launch(text, x, y, threads=256, blocks=100, seed=seed)
        assert torch.equal(y.view(100, 256)[:, 0], torch.arange(100, dtype=torch.int32))
        loads, stores = counts.traffic["p0"].loads, counts.traffic["p1"].stores
        assert loads.bytes == loads.sector_bytes == 100 * 1024 and loads.distinct_bytes == 1024
        assert stores.bytes == stores.sector_bytes == stores.distinct_bytes == 100 * 1024
