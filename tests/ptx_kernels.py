"""Kernels from a few lines of PTX, for the tests of the GPU emulator."""

from tools.gpu_emulator import load, run


def kernel(body, *parameters, module="", arch="90a", name="k"):
    """A kernel with registers %p, %h (16 bits), %r, %f, %rd, %fd, and parameters p0, p1... of these
    types.
    """
    declared = []
    for i, parameter in enumerate(parameters):
        kind, bracket, count = parameter.partition("[")
        declared.append(f".param .{kind} p{i}{bracket}{count}")
    return load(f"""
        .version 8.6
        .target sm_{arch}
        .address_size 64
        {module}
        .visible .entry {name}({", ".join(declared)})
        {{
            .reg .pred %p<32>;  .reg .b16 %h<32>;  .reg .b32 %r<160>;
            .reg .f32 %f<160>;  .reg .b64 %rd<64>; .reg .f64 %fd<32>;
            {body}
            ret;
        }}""")[name]


def pointers(n):
    """Parameters p0... in %rd0..., plus the thread's number in %r0 and, four times that, in
    %rd60.
    """
    loads = "".join(f"ld.param.u64 %rd{i}, [p{i}];\n" for i in range(n))
    return loads + "mov.u32 %r0, %tid.x;\n mul.wide.u32 %rd60, %r0, 4;\n"


def launch(body, *tensors, threads=32, blocks=1, shared=0, module="", **options):
    k = kernel(pointers(len(tensors)) + body, *["u64"] * len(tensors), module=module)
    return run(k, (blocks,), (threads,), list(tensors), shared=shared, **options)
