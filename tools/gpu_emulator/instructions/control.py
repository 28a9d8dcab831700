"""Branches, exits, barriers of threads, fences."""

from ..errors import Fault, Unsupported
from ..program import U32, Decoder, decodes


@decodes("bra")
def _(d: Decoder):
    d.take("uni")
    if d.instruction.target is None:
        raise Unsupported("branch to a label that does not exist")
    return lambda wave, mask: None  # the scheduler branches by the step's target


@decodes("ret", "exit")
def _(d: Decoder):
    d.take("uni")

    def execute(wave, mask):
        wave.exit(mask)
        return True

    return execute


@decodes("trap")
def _(d: Decoder):
    def execute(wave, mask):
        raise Fault(f"trap, {wave.thread_name(wave.active(mask)[0])}")

    return execute


@decodes("bar", "barrier")
def _(d: Decoder):
    d.take("cta")
    if d.take("warp"):
        d.take("sync")
        return lambda wave, mask: None  # lanes of a warp run in step
    d.take("aligned")
    arrives = d.take("arrive") is not None
    if not arrives and d.take("sync") is None:
        raise Unsupported("a barrier that reduces")
    if len(d.operands) > 1 or d.operands[:1] not in ((), ("0",)):
        d.block_barriers_only = False
    barrier = d.read(d.operands[0], U32) if d.operands else None
    expected = d.read(d.operands[1], U32) if len(d.operands) > 1 else None

    if arrives:
        return lambda wave, mask: wave.arrive(mask, wave.values[barrier])

    def execute(wave, mask):
        values = wave.values
        return wave.wait(
            mask,
            0 if barrier is None else values[barrier],
            0 if expected is None else values[expected],
        )

    return execute


@decodes("membar", "fence")
def _(d: Decoder):
    proxy = d.take("proxy")
    if d.take("gpu", "sys", "gl") and not proxy:
        d.global_synchronisation = True
    # Memory is sequentially consistent here, and the proxies see the same; a missing fence is not
    # found.
    d.take_all(
        "async", "async::generic", "alias", "tensormap::generic", "mbarrier_init",
        "acquire", "release", "acq_rel", "sc", "cta", "cluster",
        "global", "shared::cta", "shared::cluster", "async::global", "async::shared::cta",
        "sync_restrict::shared::cta",
    )  # fmt: skip
    return lambda wave, mask: None


@decodes("griddepcontrol", "setmaxnreg", "nanosleep", "pmevent")
def _(d: Decoder):
    d.take_all("wait", "launch_dependents", "inc", "dec", "sync", "aligned")
    return lambda wave, mask: None
