"""PEMT in a model: what stage 1 hands to stage 2, the task sparsity loss, the learned weights."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import sharded
from .adapters import read_adapter
from .balance import check_coefficient
from .companions import COMPANIONS, check_model, companion_name, companions_of, root_of
from .configs import PEMTSource
from .models import METHODS, adapted_layers
from .nn.pemt_source import source_expert
from .reference import Agreement, task_sparsity

_PROMPT = companion_name("prompt")


def pemt_source(source: nn.Module | str | os.PathLike) -> PEMTSource:
    """What stage 1 learned of a source task, for the ``sources`` of :class:`PEMTConfig`.

    Args:
        source: the model after stage 1, or the directory that :func:`moelora_ops.save_adapter`
            wrote of it.  A model's tensors are copied: it may be trained on.  If they are sharded,
            every process that has parts calls.

    Raises:
        ValueError: `source` has other adapters than those of stage 1, or none.
        FileNotFoundError, ImportError: see :func:`moelora_ops.load_adapter`.
    """
    if isinstance(source, nn.Module):
        source = root_of(source)
        layers = list(adapted_layers(source))
        found = {layer.method for layer in layers}
        experts = {
            layer.name: source_expert(
                {name: _copied(t) for name, t in layer.module.named_parameters()},
                *(getattr(layer.module, name) for name in METHODS["pemt_source"].arguments[:3]),
            )
            for layer in layers
            if layer.method == "pemt_source"
        }
        prompt = _copied(companions_of(source)[_PROMPT].target) if experts else None
    else:
        modules, _, tensors = read_adapter(source)
        found = {entry["method"] for entry in modules.values()}
        experts = {
            name: source_expert(
                {key: tensors[f"{name}.{key}"] for key in entry["tensors"]},
                *(entry["arguments"][key] for key in METHODS["pemt_source"].arguments[:3]),
            )
            for name, entry in modules.items()
            if entry["method"] == "pemt_source"
        }
        prompt = tensors.get(f"{COMPANIONS}.{_PROMPT}.target")
    if found != {"pemt_source"}:
        raise ValueError(f"source: wanted PEMT's stage 1, got {sorted(found) or 'no adapters'}")
    if prompt is None:
        raise ValueError("source: has experts of PEMT's stage 1, but no prompt")
    return PEMTSource(prompt, experts)


def _copied(tensor: Tensor) -> Tensor:
    return sharded.gathered(tensor.detach()).clone()


def task_sparsity_loss(
    model: nn.Module,
    coefficient: float = 0.1,
    *,
    attention_mask: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """``coefficient · mean over layers of Σ_e ḡ_e (1 − mean cos(f, o_e))`` of the last forward.

    f is a layer's output behind the target adapter, o_e what source expert e adds, ḡ its weight,
    averaged over the batch.  The loss draws weight towards sources whose outputs point where the
    layer's output does (the authors' code; the paper's formula was not read).

    Call it after a forward in training mode, add it to the loss, go backward once through the sum.
    Gradients reach the gates, f, and through x what is below; experts count as constants.  Gradient
    checkpointing has to be the non-reentrant one; a layer that is called several times in one
    forward counts with its last call.

    Args:
        model: adapted by :func:`moelora_ops.apply` with a :class:`PEMTConfig`, or holding
            :class:`moelora_ops.nn.PEMTLinear` with ``sparsity=True``.
        coefficient: weight of the loss, at least 0; 0.1 in the authors' code.
        attention_mask: ``[batch, length]``, 0 for padding of the encoder's input, with or without
            the prompt's positions; the cosines of padding are left out (our choice).  None: the
            mean runs over every position, as in the authors' code.
        decoder_attention_mask: the same for the decoder's input.

    Returns:
        scalar; part of the autograd graph in training.

    Raises:
        ValueError: `coefficient` is negative or not finite, or a mask does not fit.
        RuntimeError: no layer keeps cosines, or one ran without a graph while training.
    """
    check_coefficient(coefficient)
    losses = []
    for name, layer in _layers(model):
        if layer.agreement.cosines is None:
            continue
        cosines = layer.agreement.cosines
        if torch.is_grad_enabled() and layer.training and not cosines.requires_grad:
            trained = any(p.requires_grad for p in layer.parameters())
            if trained:
                raise RuntimeError(
                    f"task_sparsity_loss: {name} ran without a graph in training mode. Checkpoint "
                    "with use_reentrant=False, or ask under torch.no_grad() for the value alone"
                )
        mask_name, mask = "attention_mask", attention_mask
        if layer.gate_query == "encoder":
            mask_name, mask = "decoder_attention_mask", decoder_attention_mask
        if mask is not None:
            mask = _position_mask(mask_name, mask, layer.agreement, layer.prompt_length)
        losses.append(task_sparsity(layer.agreement, mask))
    if not losses:
        raise RuntimeError(
            "model: no PEMT layer with sparsity=True has run in training mode; call the model first"
        )
    return coefficient * torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


@torch.no_grad()
def source_weights(model: nn.Module) -> dict[str, Tensor]:
    """ḡ ``[E]`` of every PEMT layer's last call, by qualified name: mean weight of each source.

    Raises:
        RuntimeError: no layer has run.
    """
    return {name: layer.agreement.weights.detach().mean(0) for name, layer in _layers(model)}


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    check_model(model)
    layers = [
        (layer.name, layer.module)
        for layer in adapted_layers(model)
        if layer.method == "pemt" and layer.module.agreement is not None
    ]
    if not layers:
        raise RuntimeError("model: no PEMT layer has run yet; call the model first")
    return layers


def _position_mask(name: str, mask: Tensor, agreement: Agreement, prompt_length: int) -> Tensor:
    """bool, True for the positions that count, the prompt among them."""
    wanted = agreement.cosines.shape[:-1]
    if name == "attention_mask" and mask.dim() == 2 and mask.shape[1] + prompt_length == wanted[-1]:
        mask = F.pad(mask, (prompt_length, 0), value=1)
    if mask.shape != wanted:
        raise ValueError(f"{name}: wanted shape {list(wanted)}, got {list(mask.shape)}")
    return mask != 0
