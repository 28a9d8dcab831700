"""Modules that belong to a method but to no single linear, such as a router that layers share.

A model's companions hang in ``model.moelora_companions`` (:data:`COMPANIONS`), a ``ModuleDict`` at
its root.  ``apply`` makes them from the configuration, ``save_adapter`` and ``load_adapter`` treat
them like layers.
"""

from typing import Any, ClassVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

COMPANIONS = "moelora_companions"


class Companion(nn.Module):
    """Base class of companions.

    A subclass names its constructor's arguments in :attr:`arguments`, keeps each as an attribute,
    and takes ``device`` and ``dtype`` beside them.  The arguments are plain numbers, strings, bools
    and lists of these, and decide the shape of everything in its ``state_dict``: a file has the
    arguments in json and the tensors beside it, and ``cls(**arguments, device=..., dtype=...)``
    followed by the values gives the same module.  The constructor checks them (``TypeError`` or
    ``ValueError``, naming the argument), since they also come from files.
    """

    arguments: ClassVar[tuple[str, ...]] = ()

    def check(self, model: nn.Module) -> None:
        """Raise ``ValueError`` if :meth:`attach` would fail; called before `model` is changed.

        Args:
            model: its root, with or without layers and companions.
        """

    def attach(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        """Connect with `model`, in which the companion and `layers` are by now.

        Called after every change of layers (``apply``, ``load_adapter``, ``fuse``), so a second
        call replaces what the first one did.  It must not fail: :meth:`check` is there to refuse.
        Links from layers to companions must not be registered submodules (keep them in a tuple):
        each tensor is saved once.

        Args:
            model: its root.
            layers: the adapted layers of the companion's method, by qualified name.
        """


def check_model(model: Any) -> None:
    """Raise ``TypeError`` unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")


def companions_of(model: nn.Module) -> dict[str, Companion]:
    """The companions in `model`, by their names."""
    return dict(getattr(root_of(model), COMPANIONS, {}))


def companion_name(kind: str, place: str = "") -> str:
    """Its name in ``model.moelora_companions``: `kind`, and for one of several its place.

    Args:
        place: qualified name of the module that it serves, such as ``model.layers.3``; its dots
            become slashes, as names of modules have none.
    """
    return f"{kind}/{place.replace('.', '/')}" if place else kind


def plain_name(name: str) -> str:
    """The qualified name without the wrappers of torch.compile and of checkpoints that show."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def root_of(model: nn.Module) -> nn.Module:
    """`model` without the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        inside = model.module if isinstance(model, DistributedDataParallel) else model
        inside = getattr(inside, "_orig_mod", inside)
        if inside is model:
            return model
        model = inside
