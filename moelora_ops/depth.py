"""Where in a model's depth a module sits, from its qualified name."""

from typing import NamedTuple

from torch import nn


class NumberedLayer(NamedTuple):
    """One entry of a stack of layers.

    Attributes:
        name: qualified name, such as ``model.layers.3``.
        index: its position, here 3.
        depth: how many layers the stack has.
    """

    name: str
    index: int
    depth: int


def numbered_layer(model: nn.Module, name: str) -> NumberedLayer | None:
    """The numbered layer that holds the module called `name`; None if it is outside every stack.

    The stack is the outermost ``nn.ModuleList`` on the way (``model.layers.3.experts.1.up_proj``
    sits in layer 3); without one, the outermost container with numbered children
    (``nn.Sequential``).
    """
    found = None
    module, path = model, []
    for part in name.split(".") if name else ():  # no name: the model itself
        path.append(part)
        if part.isdecimal():
            layer = NumberedLayer(".".join(path), int(part), len(module._modules))
            if isinstance(module, nn.ModuleList):
                return layer
            found = found or layer
        module = getattr(module, part)
    return found
