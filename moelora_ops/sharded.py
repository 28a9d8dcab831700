"""Models that several processes train together: who holds their parameters, and in which pieces.

The wrappers and tensors are those of torch.distributed, which costs a second to import and so is
only looked up: a model that has none of them has not imported it.
"""

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def is_sharded(value: Any) -> bool:
    """Whether `value` is a ``DTensor``, of which this process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """All of `tensor`.  Of a ``DTensor`` every process that has a part must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_first(tensor: Tensor) -> bool:
    """Whether this process is the first of those that share `tensor`."""
    return not is_sharded(tensor) or not any(tensor.device_mesh.get_coordinate())


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, the whole, into `tensor` or the part of it that this process holds."""
    if is_sharded(tensor):
        # Each process has read all of it, so none needs to be sent anything.
        value = sys.modules["torch.distributed.tensor"].distribute_tensor(
            value.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements,
            src_data_rank=None,
        )  # fmt: skip
    tensor.copy_(value)


def check_not_managed(model: nn.Module, what: str) -> None:
    """Raise ``ValueError`` if something in `model` keeps an account of its parameters.

    It would not hear of new ones: they would be trained in each process apart from the others.

    Args:
        what: was going to be done, for the message.
    """
    managers = [("DistributedDataParallel", DistributedDataParallel)]
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        managers += [
            ("fully_shard", fsdp.FSDPModule),
            ("FullyShardedDataParallel", fsdp.FullyShardedDataParallel),
        ]
    for module in model.modules():
        for name, kind in managers:
            if isinstance(module, kind):
                raise ValueError(
                    f"model: is under {name}, which would not learn of new parameters; {what} "
                    "before it"
                )


def check_not_flat(model: nn.Module) -> None:
    """Raise ``ValueError`` if `model` has FullyShardedDataParallel, which flattens parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"model: {name or 'it'} is wrapped by FullyShardedDataParallel, which flattens "
                "parameters; shard it with torch.distributed.fsdp.fully_shard"
            )
