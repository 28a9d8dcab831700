"""OrchMoE (2401.10559) and its exactly known relatives Polytropon, MHR and C-Poly, literally.

Of OrchMoE only the abstract and three quoted equations could be read: the combination
``Σ_i Σ_j w_i φ_ij x`` over abstract tasks i and skills j, and the task router
``w = W X̂ + b, X̂ = softmax(X Xᵀ/√d) X + X``.  Everything else here is *our reading*: mean over the
tokens and softmax in the router, the task-skill matrix with Gumbel-sigmoid entries and normalised
rows (as in Polytropon, whose authors' line this is), one such matrix per linear.

The relatives are known from code: Polytropon (2202.13914) and MHR (2211.03831) from PEFT's Poly
layer and mttl, C-Poly from its author's branch of PEFT.  They take task ids instead of a router.
"""

import math

import torch
from torch import Tensor, nn

from .averaged import averaged
from .base import LooksLikeBase
from .gated import gated

EPSILON = 1e-12  # PEFT's, under the sum of a row's weights


def task_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    normalize: bool = False,
) -> Tensor:
    """``softmax(mean_t(X̂) Wᵀ + b)``, ``X̂ = softmax(X Xᵀ/√d) X + X``, over the real tokens.

    Args:
        x: ``[batch, length, d]``.
        weight, bias: ``[tasks, d]``, ``[tasks]``.
        mask: ``[batch, length]``, nonzero on real tokens; None if all are.
        causal: our reading for decoders: both the attention and the mean at position t see
            positions up to t only.  Without it the formula sees the whole sequence.
        normalize: X's rows are x divided by its root mean square (our choice); otherwise x itself.

    Returns:
        probabilities of the tasks: ``[batch, tasks]``, or ``[batch, length, tasks]`` if causal.
        The mean over no token is 0.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, weight, bias = x.to(wide), weight.to(wide), bias.to(wide)
    if normalize:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    batch, length, width = x.shape
    mask = torch.ones(batch, length, device=x.device) if mask is None else mask

    def pooled(tokens: Tensor, prefixes: bool) -> Tensor:
        """The mean of X̂ over ``tokens [n, d]``, all of them real."""
        total = x.new_zeros(width)
        for t in range(len(tokens)):
            seen = tokens[: t + 1] if prefixes else tokens
            attention = (seen @ tokens[t] / math.sqrt(width)).softmax(-1)
            total = total + attention @ seen + tokens[t]
        return total / max(len(tokens), 1)

    rows = []
    for b in range(batch):
        ends = range(1, length + 1) if causal else [length]
        means = [pooled(x[b, :end][mask[b, :end] != 0], causal) for end in ends]
        rows.append(torch.stack(means) if causal else means[0])
    return (torch.stack(rows) @ weight.T + bias).softmax(-1)


def gumbel_sigmoid(logits: Tensor, uniform: Tensor | None = None) -> Tensor:
    """``σ(logit + log u − log(1 − u))``, the relaxed Bernoulli at temperature 1; σ without u."""
    if uniform is None:
        return logits.sigmoid()
    epsilon = torch.finfo(uniform.dtype).eps
    u = uniform.clamp(epsilon, 1 - epsilon)
    return (logits + u.log() - (-u).log1p()).sigmoid()


def skill_weights(
    tasks: Tensor, logits: Tensor, private: Tensor | None = None, uniform: Tensor | None = None
) -> Tensor:
    """Weights of the skills: the row of a task id, or rows mixed by the tasks' probabilities.

    ``z = GumbelSigmoid(logits)``, each row divided by its sum over the shared skills.

    Args:
        tasks: ids ``[batch]``, or probabilities ``[batch, tasks]`` or ``[batch, length, tasks]``
            (our reading of OrchMoE: ``w = τ Z``).
        logits: ``[tasks, Q, S]``.
        private: C-Poly's ``[tasks, P]`` weights of the private skills, which are not normalised and
            the same in every split.
        uniform: noise in (0, 1), ``[batch, Q, S]`` for ids and ``[batch, tasks, Q, S]`` for
            probabilities; None for none.

    Returns:
        ``[batch, Q, S + P]`` or ``[batch, length, Q, S + P]``, at least float32.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_ids = not tasks.is_floating_point()
    rows = []
    for b in range(len(tasks)):
        chosen = logits[tasks[b]] if is_ids else logits
        z = gumbel_sigmoid(chosen, None if uniform is None else uniform[b])
        z = z / (z.sum(-1, keepdim=True) + EPSILON)
        if private is not None:
            own = private[tasks[b]] if is_ids else private
            own = own.unsqueeze(-2).expand(*z.shape[:-1], -1)
            z = torch.cat([z, own.to(z.dtype)], -1)
        rows.append(z if is_ids else torch.einsum("...k,kqs->...qs", tasks[b].to(z.dtype), z))
    if rows:
        return torch.stack(rows)
    width = logits.shape[2] + (0 if private is None else private.shape[1])
    return logits.new_zeros(*tasks.shape[: 1 if is_ids else -1], logits.shape[1], width)


class _SkillLinear(LooksLikeBase, nn.Module):
    def __init__(
        self, base, num_skills, num_tasks, rank, alpha, combine, splits, private, device, dtype
    ):
        super().__init__()
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor):
            device = weight.device if device is None else device
            dtype = weight.dtype if dtype is None and weight.is_floating_point() else dtype
        like = {"device": device, "dtype": dtype}
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.num_skills, self.num_tasks, self.rank, self.alpha = num_skills, num_tasks, rank, alpha
        self.combine, self.splits, self.private = combine, splits, private
        experts = num_skills + (0 if private is None else num_tasks)
        self.lora_down = nn.Parameter(torch.empty(experts, rank, self.in_features, **like))
        self.lora_up = nn.Parameter(torch.empty(experts, rank, self.out_features, **like))
        self.skill_logits = nn.Parameter(torch.empty(num_tasks, splits, num_skills, **like))
        if private == "matrix":
            self.private_weights = nn.Parameter(torch.empty(num_tasks, num_tasks, **like))
        self.tasks_from = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform(a=√5) per skill and split, B zero, logits U(-0.001, 0.001) (PEFT)."""
        segment = self.in_features // self.splits
        for e in range(len(self.lora_down)):
            for q in range(self.splits):
                columns = slice(q * segment, (q + 1) * segment)
                nn.init.kaiming_uniform_(self.lora_down[e, :, columns], a=math.sqrt(5))
        nn.init.zeros_(self.lora_up)
        nn.init.uniform_(self.skill_logits, -1e-3, 1e-3)
        if self.private == "matrix":
            nn.init.eye_(self.private_weights)

    def forward(
        self, x: Tensor, tasks: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        if weights is None:
            tasks = self.tasks_from() if tasks is None else tasks
            weights = self._skill_weights(tasks)
            if tasks.dim() == 3 and x.dim() == 2:  # tokens that the model has flattened
                weights = weights.flatten(0, 1)
        arguments = (
            x, None, None, self.lora_down, self.lora_up, weights, self.alpha / self.rank
        )  # fmt: skip
        if self.combine == "sum":
            return gated(*arguments, base_output=self.base(x))
        return averaged(*arguments, splits=self.splits, base_output=self.base(x))

    def _skill_weights(self, tasks: Tensor) -> Tensor:
        logits, uniform, private = self.skill_logits, None, None
        if self.training:
            wide = torch.promote_types(logits.dtype, torch.float32)
            rows = () if not tasks.is_floating_point() else (self.num_tasks,)
            shape = (len(tasks), *rows, self.splits, self.num_skills)
            uniform = torch.rand(shape, dtype=wide, device=logits.device)
        if self.private is not None:
            identity = torch.eye(self.num_tasks, device=logits.device)
            private = self.private_weights if self.private == "matrix" else identity
        weights = skill_weights(tasks, logits, private, uniform)
        return weights.squeeze(-2) if self.splits == 1 else weights


class OrchMoELinear(_SkillLinear):
    """What :class:`moelora_ops.nn.OrchMoELinear` is checked against: same arguments and state."""

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
    """What :class:`moelora_ops.nn.PolytroponLinear` is checked against."""

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
