"""Intuition-MoR1E for a whole model, with the centroids that its scores come from."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..companions import Companion
from ..depth import NumberedLayer
from ..intuition import IntuitionEncoder, check_centroids
from ..nn.checks import check_bool
from ..nn.mor1e import check_arguments, count_experts
from .base import AdapterConfig

ENCODER = "encoder"


@dataclasses.dataclass(frozen=True, eq=False)
class MoR1EConfig(AdapterConfig):
    """Intuition-MoR1E for a whole model (2404.08985): the same layers everywhere.

    Args:
        rank_down, rank_up, token_scale, task_scale, mode: see
            :class:`moelora_ops.nn.MoR1ELinear`.
        centroids: ``[clusters, width]``, from :func:`~moelora_ops.intuition.cluster` (``from
            moelora_ops.intuition import cluster``): the model gets an
            :class:`~moelora_ops.intuition.IntuitionEncoder` with them, as
            ``model.moelora_companions.encoder``, which is saved with the adapter.  None: scores
            come from elsewhere, or there are none.
        learned_map: learn a linear map from clusters to experts, which may then differ in number.
        target_modules, adapter_dtype: see :class:`AdapterConfig`.

    Raises:
        TypeError, ValueError: a field is out of range; the message names it.
    """

    rank_down: int = 4
    rank_up: int = 8
    token_scale: float = 32.0
    task_scale: float = 4.0
    mode: str = "grid"
    centroids: Tensor | None = None
    learned_map: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_arguments(self.rank_down, self.rank_up, self.token_scale, self.task_scale, self.mode)
        check_bool("learned_map", self.learned_map)
        if self.centroids is None:
            if self.learned_map:
                raise ValueError("learned_map: wanted False, as there are no centroids to map")
            return
        check_centroids(self.centroids)
        experts = count_experts(self.rank_down, self.rank_up, self.mode)
        if len(self.centroids) != experts and not self.learned_map:
            raise ValueError(
                f"centroids: wanted {experts}, one per expert, or learned_map=True; "
                f"got {len(self.centroids)}"
            )

    def layer_arguments(self, name: str, layer: NumberedLayer | None) -> dict[str, Any]:
        """Constructor arguments, beside the base, of the adapter called `name` in `layer`."""
        same = ("rank_down", "rank_up", "token_scale", "task_scale", "mode")
        return {field: getattr(self, field) for field in same}

    def companions(
        self,
        model: nn.Module,
        layers: dict[str, dict[str, Any]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Companion]:
        """The encoder, if there are centroids."""
        if self.centroids is None:
            return {}
        experts = count_experts(self.rank_down, self.rank_up, self.mode)
        encoder = IntuitionEncoder(
            *self.centroids.shape, experts if self.learned_map else None, device=device, dtype=dtype
        )
        encoder.centroids.copy_(nn.functional.normalize(self.centroids.double(), dim=-1))
        return {ENCODER: encoder}
