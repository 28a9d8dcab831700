"""What the tests of both GPU back ends' accounts share."""

from tools.gpu_traffic import report
from tools.gpu_traffic.cases import METHODS, Size, usual

# With few multiprocessors tiles are chosen as for many tokens: one block for all features; features
# in halves and tokens in parts; sizes that are multiples of nothing.
WHOLE, FEW = Size(256, 512, 256), 2
SPLIT, SOME = Size(520, 1040, 328), 10
RAGGED = Size(300, 203, 131, 5, 3)


def case_name(value):
    if not hasattr(value, "method"):
        return str(value)
    strategy = "" if value.strategy == "auto" else f"-{value.strategy}"
    return f"{value.method}-T{value.size.T}{'-dropout' if value.dropout else ''}{strategy}"


def assert_as_executed(recording, call, account, repeated=1.0):
    """Of every launch loads, stores and tensor-core operations; and nothing beside the launches.

    Args:
        repeated: how often tensor cores may compute the same.
    """
    directions = ("forward", "backward") if call.train else ("forward",)
    operator = METHODS[call.method].operator or call.method
    assert [o.name for o in recording.operators] == [f"{operator}_{d}" for d in directions]
    for operator in recording.operators:
        assert operator.torch_kernels == []
        for launch in operator.launches:
            expected, counts = account(launch), launch.counts
            assert expected.loads.moved == counts.loads.fetched, launch.name
            assert expected.stores.moved == counts.stores.fetched, launch.name
            flops = sum(counts.tensor_flops.values())
            assert expected.flops <= flops <= repeated * expected.flops, launch.name
            distinct = counts.loads.distinct_bytes + counts.stores.distinct_bytes
            # It is executed in whole sectors, while rows of a few numbers are up to 16 bytes apart.
            room = 64 * len(counts.traffic) + 3 * 16 * call.size.T
            assert abs(distinct - expected.distinct) <= room, launch.name


def check_grouped(figures):
    """The grouped path moves less for many experts, in less time of the model than the stacked one.

    Args:
        figures: of a call, by operator.
    """
    for direction in ("forward", "backward"):
        stacked, grouped = (
            figures(usual("topk", report.LARGE, E=64, r=16, strategy=s))[f"topk_{direction}"]
            for s in ("stacked", "grouped")
        )
        assert grouped.launches <= report.MOST_LAUNCHES[f"grouped_{direction}"]
        assert grouped.moved < stacked.moved and grouped.flops < stacked.flops / 4
        assert grouped.seconds[1] < stacked.seconds[0]
