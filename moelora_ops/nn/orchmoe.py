"""Skills that tasks share: OrchMoE (2401.10559) and its relatives Polytropon, MHR and C-Poly.

Every linear has S skills, which are LoRAs, and a matrix that says which task uses which skill.
Polytropon and its kin know the task of each example; OrchMoE classifies it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, reference
from .base import AdapterLinear, init_stack
from .checks import check_choice, check_count
from .tasks import check_ids

COMBINE = ("sum", "average")
PRIVATE = (None, "matrix", "simple")
_EPSILON = 1e-12  # PEFT's


class _SkillLinear(AdapterLinear):
    """What OrchMoE's and Polytropon's layers share, which is all but the constructor."""

    def __init__(
        self, base, num_skills, num_tasks, rank, alpha, combine, splits, private, device, dtype
    ):
        check_arguments(num_skills, num_tasks, rank, alpha, combine, splits, private)
        super().__init__(base, device, dtype)
        for name in ("in_features", "out_features"):
            if getattr(self, name) % splits:
                raise ValueError(
                    f"splits: wanted a divisor of {name}={getattr(self, name)}, got {splits}"
                )
        self.num_skills, self.num_tasks, self.rank, self.alpha = num_skills, num_tasks, rank, alpha
        self.combine, self.splits, self.private = combine, splits, private
        experts = num_skills + (0 if private is None else num_tasks)
        self.lora_down = self._new_parameter(experts, rank, self.in_features)
        self.lora_up = self._new_parameter(experts, rank, self.out_features)
        self.skill_logits = self._new_parameter(num_tasks, splits, num_skills)
        if private == "matrix":
            self.private_weights = self._new_parameter(num_tasks, num_tasks)
        self.tasks_from = None  # a function without arguments, set by a companion
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise everything anew; the layer is then equal to its base."""
        init_stack(self.lora_down, self.in_features // self.splits)
        nn.init.zeros_(self.lora_up)
        nn.init.uniform_(self.skill_logits, -1e-3, 1e-3)
        if self.private == "matrix":
            nn.init.eye_(self.private_weights)

    def forward(
        self, x: Tensor, tasks: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``.

        Args:
            x: ``[batch, length, in_features]``; or ``[batch * length, in_features]`` with tasks
                per token, as some models flatten it; or ``[batch, in_features]``.
            tasks: whose skills to use; by default what the model's task router or
                :func:`moelora_ops.task_ids` says.  Ids, integers ``[batch]``; or probabilities of
                the tasks, ``[batch, num_tasks]`` or ``[batch, length, num_tasks]``.
            weights: of the skills themselves, instead of tasks, as for
                :func:`moelora_ops.functional.gated` and :func:`~moelora_ops.functional.averaged`.

        Raises:
            TypeError, ValueError: shape, dtype or range of an argument; the message names it.
            RuntimeError: nobody says which tasks.
        """
        if weights is None:
            if tasks is None:
                if self.tasks_from is None:
                    raise RuntimeError(
                        "tasks: wanted ids or probabilities of the tasks, or weights, got none"
                    )
                tasks = self.tasks_from()
            else:
                self._check_tasks(tasks)
            is_flat = self._check_batch(x, tasks)
            weights = self.skill_weights(tasks)
            if is_flat:
                weights = weights.flatten(0, 1)
        elif tasks is not None:
            raise ValueError("weights: replaces tasks; pass either, not both")
        mix = functional.gated if self.combine == "sum" else functional.averaged
        options = {} if self.splits == 1 else {"splits": self.splits}
        return mix(
            x, lora_down=self.lora_down, lora_up=self.lora_up, weights=weights,
            scale=self.alpha / self.rank, **options, **self.base_arguments(x),
        )  # fmt: skip

    def skill_weights(self, tasks: Tensor) -> Tensor:
        """What each skill counts: ``[batch, E]`` or ``[batch, length, E]``; splits: ``[.., Q, E]``.

        At least float32, differentiable with respect to the layer's parameters and probabilities.
        While training every call draws new noise from torch's generator, one number per example,
        task, split and skill.

        Args:
            tasks: see :meth:`forward`.
        """
        tasks = tasks.to(self.skill_logits.device)
        wide = torch.promote_types(self.skill_logits.dtype, torch.float32)
        logits = self.skill_logits.to(wide)
        is_ids = not tasks.is_floating_point()
        if is_ids:
            tasks = tasks.long()
            logits = logits[tasks]
        elif self.training:
            logits = logits.expand(len(tasks), *logits.shape)
        if self.training:
            logits = logits + _logistic_noise(logits)
        gates = logits.sigmoid()
        gates = gates / (gates.sum(-1, keepdim=True) + _EPSILON)
        if not is_ids:
            gates = _times(tasks.to(wide), gates.flatten(-2))
            gates = gates.unflatten(-1, (self.splits, self.num_skills))
        if self.private is not None:
            rows = F.one_hot(tasks, self.num_tasks) if is_ids else tasks
            own = rows.to(wide)
            if self.private == "matrix":
                own = _times(own, self.private_weights.to(wide))
            own = own.unsqueeze(-2)
            gates = torch.cat([gates, own.expand(*gates.shape[:-1], -1)], -1)
        return gates.squeeze(-2) if self.splits == 1 else gates

    def _check_tasks(self, tasks: Tensor) -> None:
        if not isinstance(tasks, Tensor):
            raise TypeError(f"tasks: wanted a tensor, got {type(tasks).__name__}")
        if not tasks.is_floating_point():
            check_ids("tasks", tasks, self.num_tasks)
            if tasks.dim() != 1:
                raise ValueError(f"tasks: wanted ids of shape [batch], got {list(tasks.shape)}")
        elif tasks.dim() not in (2, 3) or tasks.shape[-1] != self.num_tasks:
            raise ValueError(
                f"tasks: wanted probabilities of shape [batch, {self.num_tasks}] or "
                f"[batch, length, {self.num_tasks}], got {list(tasks.shape)}"
            )

    def _check_batch(self, x: Tensor, tasks: Tensor) -> bool:
        """Raise unless `tasks` fit x; returns whether x is flat while they are not."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: wanted a tensor, got {type(x).__name__}")
        own = tasks.shape[: 1 if not tasks.is_floating_point() else -1]
        if x.dim() == 2 and len(own) == 2 and len(x) == own.numel():
            return True
        if x.dim() not in (2, 3) or x.shape[: len(own)] != own or len(own) > x.dim() - 1:
            raise ValueError(
                f"tasks: wanted one per sequence or token of x {list(x.shape)}, got {list(own)}"
            )
        return False

    @classmethod
    def from_reference(cls, layer: reference.OrchMoELinear | reference.PolytroponLinear):
        """The fused layer that shares `layer`'s base and parameters."""
        arguments = {name: getattr(layer, name) for name in cls.arguments}
        fused = cls(layer.base, **arguments, device="meta")
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(fused, name, parameter)
        fused.tasks_from = layer.tasks_from
        return fused.train(layer.training)

    def extra_repr(self) -> str:
        shown = ("in_features", "out_features", *self.arguments)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


class OrchMoELinear(_SkillLinear):
    """A frozen linear with skills weighted by abstract tasks, which a router finds in the input.

    With τ the probabilities of the tasks and Z the task-skill matrix, w = τ Z and

        combine="sum":      y = base(x) + alpha/rank Σ_s w_s B_s A_s x            linear in w
        combine="average":  y = base(x) + alpha/rank (Σ_s w_s B_s) (Σ_s w_s A_s) x      quadratic

    This is a reconstruction.  Of the paper (2401.10559) only the abstract and three quoted
    equations could be read, and no code.  ``"sum"`` follows its quoted Eq. 3, Σ_i Σ_j w_i φ_ij x
    with φ_ij = z_ij times skill j; ``"average"`` follows the authors' line of code (Polytropon,
    C-Poly).  Our reading: Z's entries are Gumbel-sigmoids of learned logits (plain sigmoids in
    eval), its rows are divided by their sums as in PEFT's Poly, noise is drawn per example, and
    every linear has a Z of its own.  The default alpha is MoLA's.  τ comes from a
    :class:`TaskRouter`; see :class:`moelora_ops.OrchMoEConfig`.

    Args:
        base: the frozen layer, see :class:`AdapterLinear`.
        num_skills: S >= 1.
        num_tasks: abstract tasks, >= 1.
        rank: r >= 1 of each skill.
        alpha: the skills are scaled by alpha / rank.
        combine: ``"sum"`` or ``"average"``.
        device, dtype: of the new parameters; by default those of the base.

    Parameters:
        lora_down: ``[S, rank, in_features]``, Kaiming-uniform(a=√5) per skill.
        lora_up: ``[S, rank, out_features]``, zero, so that y = base(x) at first.
        skill_logits: ``[num_tasks, 1, S]``, uniform in ±0.001.

    The state_dict is that of :class:`moelora_ops.reference.OrchMoELinear`.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it.
    """

    arguments = ("num_skills", "num_tasks", "rank", "alpha", "combine")

    def __init__(
        self,
        base: nn.Module,
        num_skills: int,
        num_tasks: int,
        rank: int = 8,
        alpha: float = 16.0,
        combine: str = "sum",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            base, num_skills, num_tasks, rank, alpha, combine, 1, None, device, dtype
        )  # fmt: skip


class PolytroponLinear(_SkillLinear):
    """A frozen linear with skills weighted by the task's id: Polytropon, MHR and C-Poly.

        y = base(x) + alpha/rank (Σ_s w_s B_s) (Σ_s w_s A_s) x,  w the task's row

    With the defaults this is PEFT's Poly layer (Polytropon, 2202.13914): Gumbel-sigmoids of the
    row's logits while training, sigmoids in eval, divided by their sum + 1e-12; noise per example.

    Args:
        base: the frozen layer, see :class:`AdapterLinear`.
        num_skills: S >= 1, shared by the tasks.
        num_tasks: ids are below it.
        rank: r >= 1 of each skill.
        alpha: the skills are scaled by alpha / rank; PEFT and C-Poly have 1 / rank.
        splits: Q of MHR (2211.03831); input and output features fall into Q segments with weights
            of their own.  Divides both.
        private: C-Poly: besides the shared skills every task has a skill of its own, whose weight
            is not normalised: ``"matrix"``, row ``id`` of a learned ``[num_tasks, num_tasks]``
            matrix that starts as the identity; or ``"simple"``, fixed to 1 for its own task.  The
            same in every split.  Formulas as its authors' PEFT branch intends them; as published
            that branch runs for one task and one example only.
        device, dtype: of the new parameters; by default those of the base.

    Parameters, with E = S, or S + num_tasks with private skills, which come last:
        lora_down: ``[E, rank, in_features]``, Kaiming-uniform(a=√5) per skill and segment.
        lora_up: ``[E, rank, out_features]``, zero, so that y = base(x) at first.
        skill_logits: ``[num_tasks, Q, S]``, uniform in ±0.001.
        private_weights: ``[num_tasks, num_tasks]``, only with ``private="matrix"``.

    The state_dict is that of :class:`moelora_ops.reference.PolytroponLinear`.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it.
    """

    arguments = ("num_skills", "num_tasks", "rank", "alpha", "splits", "private")

    def __init__(
        self,
        base: nn.Module,
        num_skills: int,
        num_tasks: int,
        rank: int = 8,
        alpha: float = 1.0,
        splits: int = 1,
        private: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            base, num_skills, num_tasks, rank, alpha, "average", splits, private, device, dtype
        )  # fmt: skip


def check_arguments(num_skills, num_tasks, rank, alpha, combine, splits, private) -> None:
    """The constructors' contract; a whole model's configuration is checked by it as well."""
    for name, value in (
        ("num_skills", num_skills), ("num_tasks", num_tasks), ("rank", rank), ("splits", splits)
    ):  # fmt: skip
        check_count(name, value)
    functional.check_finite("alpha", alpha)
    check_choice("combine", combine, COMBINE)
    check_choice("private", private, PRIVATE)


def _times(tasks: Tensor, table: Tensor) -> Tensor:
    """``[batch, (length,) tasks] @ [(batch,) tasks, F]``, in their dtype under autocast too."""
    with reference.no_autocast(tasks.device.type):
        if table.dim() > tasks.dim():
            return (tasks.unsqueeze(1) @ table).squeeze(1)
        return tasks @ table


def _logistic_noise(like: Tensor) -> Tensor:
    """``log u − log(1 − u)``, u uniform: added to a logit, it makes σ a relaxed Bernoulli."""
    epsilon = torch.finfo(like.dtype).eps
    u = torch.rand(like.shape, dtype=like.dtype, device=like.device).clamp(epsilon, 1 - epsilon)
    return u.log() - (-u).log1p()
