"""PEMT around the layers of a T5-type model: task prompts, and what reaches which layer how.

The model stays as it is and is called as before.  Hooks do the rest; each is inside or outside of
what gradient checkpointing repeats (a block's ``forward``), as noted:

    encoder stack, outside     the prompt goes before the embedded input, the mask grows with it
    decoder stack, outside     the mask of the encoder's output grows likewise
    cross-attention, inside    its input, the encoder's output, is handed to the W_o of its block,
                               for the decoder's gate
    feed-forward, inside       its input is handed to its W_o, for adapter experts

As both hands happen inside, a recomputed block reads what it got itself, with the right graph.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .companions import Companion, plain_name
from .reference import combine_prompts, no_autocast

# Order of a T5 stack's positional arguments.
_STACK_ARGUMENTS = (
    "input_ids", "attention_mask", "encoder_hidden_states", "encoder_attention_mask",
    "inputs_embeds",
)  # fmt: skip


def t5_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The stacks of a T5-type model, ``"encoder"`` and ``"decoder"``, as far as it has them.

    A stack has ``embed_tokens``, ``is_decoder`` and numbered ``block`` whose ``layer[-1]`` holds
    the feed-forward ``DenseReluDense`` with its second linear ``wo``: T5, T5 v1.1, FLAN-T5, mT5,
    UMT5, LongT5 of transformers.

    Raises:
        ValueError: `model` has no encoder of this kind.
    """
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        if all(hasattr(module, name) for name in ("embed_tokens", "is_decoder", "block")):
            found.setdefault("decoder" if module.is_decoder else "encoder", module)
    if "encoder" not in found:
        raise ValueError(f"model: wanted a T5-type model, got {type(model).__name__}")
    return found


def feed_forwards(stack: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each block of a stack with its ``DenseReluDense``."""
    for block in stack.block:
        yield block, block.layer[-1].DenseReluDense


class _TaskPrompt(Companion):
    """A trained prompt before the encoder's input.

    Args:
        length: P, positions of the prompt.
        features: width of the model.
        source_lengths: positions of the frozen source prompts, if any.
        dropout: of the attention to them, while training.

    Parameters:
        target: Π_t ``[P, features]``.
        source_<e>: Π_e ``[P_e, features]``, buffers.
    """

    arguments = ("length", "features", "source_lengths", "dropout")

    def __init__(
        self,
        length: int,
        features: int,
        source_lengths: Sequence[int] = (),
        dropout: float = 0.1,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, value in (
            ("length", length), ("features", features),
            *(("source_lengths", n) for n in source_lengths),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: wanted an int of at least 1, got {value!r}")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: wanted a probability in [0, 1), got {dropout!r}")
        self.length, self.features = length, features
        self.source_lengths, self.dropout = list(source_lengths), dropout
        like = {"device": device, "dtype": dtype}
        self.target = nn.Parameter(torch.zeros(length, features, **like))
        for e, n in enumerate(source_lengths):
            self.register_buffer(f"source_{e}", torch.zeros(n, features, **like))
        self._handles: list = []

    @property
    def sources(self) -> list[Tensor]:
        """Π_e of every source task."""
        return [getattr(self, f"source_{e}") for e in range(len(self.source_lengths))]

    def forward(self) -> Tensor:
        """``Π = Π_t + Σ_e dropout(softmax(Π_t Π_eᵀ)) Π_e``, ``[P, features]``."""
        dropout = self.dropout if self.training else 0.0
        return combine_prompts(self.target, self.sources, dropout)

    def check(self, model: nn.Module) -> None:
        """See :meth:`Companion.check`."""
        width = t5_stacks(model)["encoder"].embed_tokens.weight.shape[1]
        if width != self.features:
            raise ValueError(f"model: wanted embeddings of width {self.features}, got {width}")

    def attach(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        """See :meth:`Companion.attach`; hooks the stacks and the blocks of `layers`."""
        for handle in self._handles:
            handle.remove()
        stacks = t5_stacks(model)
        self._handles = [stacks["encoder"].register_forward_pre_hook(self._begin, with_kwargs=True)]
        if "decoder" in stacks:
            decoder = stacks["decoder"]
            self._handles.append(decoder.register_forward_pre_hook(self._widen, with_kwargs=True))
        own = set(layers.values())
        for stack in stacks.values():
            for block, feed_forward in feed_forwards(stack):
                linear = feed_forward.wo
                if linear not in own:
                    continue
                if linear.residual is True:
                    hook = feed_forward.register_forward_pre_hook(_hand_ffn_input)
                    self._handles.append(hook)
                if getattr(linear, "gate_query", None) == "encoder":
                    hook = _HandEncoderStates(feed_forward)
                    cross_attention = block.layer[1]
                    self._handles.append(
                        cross_attention.register_forward_pre_hook(hook, with_kwargs=True)
                    )

    def _begin(self, encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The prompt before the input's embeddings, ones before its mask."""
        kwargs = {**dict(zip(_STACK_ARGUMENTS, args, strict=False)), **kwargs}
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            if kwargs.get("input_ids") is None:
                return (), kwargs  # the model says what is missing
            embeds = encoder.embed_tokens(kwargs.pop("input_ids"))
        prompt = self().to(embeds.dtype).expand(len(embeds), -1, -1)
        # Autocast refuses to join 16-bit tensors of another dtype than its own.
        with no_autocast(embeds.device.type):
            kwargs["inputs_embeds"] = torch.cat([prompt, embeds], 1)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs["attention_mask"] = self._with_prompt(mask, embeds.shape[1])
        return (), kwargs

    def _widen(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Ones before the mask of the encoder's output, which has the prompt's positions."""
        kwargs = {**dict(zip(_STACK_ARGUMENTS, args, strict=False)), **kwargs}
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[1] != states.shape[1]:
            mask = self._with_prompt(mask, states.shape[1] - self.length)
            kwargs["encoder_attention_mask"] = mask
        return (), kwargs

    def _with_prompt(self, mask: Tensor, length: int) -> Tensor:
        if mask.dim() != 2 or mask.shape[1] != length:
            raise ValueError(
                f"attention_mask: wanted shape [batch, {length}], without the prompt, "
                f"got {list(mask.shape)}"
            )
        return F.pad(mask, (self.length, 0), value=1)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.arguments)


class SourcePrompt(_TaskPrompt):
    """Stage 1: the prompt that is trained with a source task's experts."""


class TargetPrompt(_TaskPrompt):
    """Stage 2: the target task's prompt, which attends to those of the sources."""


class TrainedNorms(Companion):
    """The LayerNorms that stage 2 trains: the model's own parameters, saved with the adapter.

    Args:
        names: qualified names of weights of the model, without torch.compile's wrappers.
        sizes: number of elements of each.

    Before :meth:`attach` it has values of its own.  The model's parameters take them, keep their
    dtype and are its ``state_dict`` from then on, yet not registered a second time: FSDP2 refuses a
    parameter of two modules that it shards apart.
    """

    arguments = ("names", "sizes")

    def __init__(self, names: Sequence[str], sizes: Sequence[int], *, device=None, dtype=None):
        super().__init__()
        if not names or len(names) != len(sizes):
            raise ValueError(f"sizes: wanted one int per name, got {len(sizes)} for {len(names)}")
        self.names, self.sizes = list(names), list(sizes)
        self.weights: nn.ParameterList | None = nn.ParameterList(
            torch.empty(size, device=device, dtype=dtype) for size in sizes
        )
        self._places: list[tuple[nn.Module, str]] = []  # in the model, module and attribute

    def check(self, model: nn.Module) -> None:
        """See :meth:`Companion.check`."""
        present = _plain_parameters(model)
        for name, size in zip(self.names, self.sizes, strict=True):
            got = list(present[name].shape) if name in present else None
            if got != [size]:
                raise ValueError(f"model: wanted a parameter {name} of shape [{size}], got {got}")

    @torch.no_grad()
    def attach(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        """See :meth:`Companion.attach`; the model's norms take the values and are trained."""
        modules = {plain_name(name): m for name, m in model.named_modules(remove_duplicate=False)}
        splits = [name.rpartition(".") for name in self.names]
        self._places = [(modules[holder], attribute) for holder, _, attribute in splits]
        for i, weight in enumerate(self._in_model()):
            if self.weights is not None:
                weight.copy_(self.weights[i])
            weight.requires_grad_()
        self.weights = None

    def _in_model(self) -> list[nn.Parameter]:
        # By state_dict, for which FSDP2 puts back the parameters that it has gathered meanwhile.
        return [module.state_dict(keep_vars=True)[name] for module, name in self._places]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for i, weight in enumerate(self._in_model()):
            destination[f"{prefix}weights.{i}"] = weight if keep_vars else weight.detach()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        for i, weight in enumerate(self._in_model()):
            value = state_dict.get(f"{prefix}weights.{i}")
            if value is not None:
                weight.copy_(value)

    def extra_repr(self) -> str:
        return f"{len(self.names)} norms, {sum(self.sizes)} weights"


def norm_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every LayerNorm or RMSNorm weight of `model` (and bias, if any), by plain name."""
    return {
        plain_name(f"{module_name}.{name}"): parameter
        for module_name, module in model.named_modules()
        if type(module).__name__.lower().endswith(("layernorm", "rmsnorm"))
        for name, parameter in module.named_parameters(recurse=False)
    }


def _plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter for name, parameter in parameters}


class _HandEncoderStates:
    """Hook of a cross-attention: gives its input, the encoder's output, to the block's W_o."""

    def __init__(self, feed_forward: nn.Module):
        self.feed_forward = feed_forward  # and not its linear, which fuse replaces

    def __call__(self, cross_attention: nn.Module, args: tuple, kwargs: dict) -> None:
        states: Iterable = (kwargs.get("key_value_states"), *args[1:2])
        self.feed_forward.wo.encoder_states = next(s for s in states if s is not None)


def _hand_ffn_input(feed_forward: nn.Module, args: tuple) -> None:
    feed_forward.wo.ffn_input = args[0]
