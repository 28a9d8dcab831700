"""What an adapted model costs: a training step and a decoding step of LLaMA-shaped models.

    python benchmarks/whole_model.py --device cuda --backend cuda triton --json models.json

The frozen model, MoLA on all seven linears of every layer (ours, the good plain PyTorch layer, the
loop over experts) and PEFT's LoRA of rank 64 on the same linears, in interleaved rounds.  Weights
are random: time does not depend on them.  What ours computes is first held, in float32, to twice
the error of the paper's formula.  Decoding is one token of each sequence with no past, as what
attention reads there is the same for all.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

import moelora_ops
from moelora_ops import backends
from moelora_ops.bench import devices, numerics, report
from moelora_ops.bench.baselines import StackedMoLALinear
from moelora_ops.bench.method import DTYPES, generator
from moelora_ops.bench.runner import BASE, WAITS, Settings, captured, summarize, time_rounds

LORA_RANK = 64
TRAIN, DECODE = "train", "decode"
LORA, STACKED, LOOP = f"peft-lora-r{LORA_RANK}", "stacked", "expert-loop"


@dataclass(frozen=True)
class ModelCase:
    """A model's shape and how many tokens go through it, in what direction."""

    name: str
    direction: str
    batch: int
    length: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: str | int = "2468"
    dtype: str = "bf16"

    def __str__(self) -> str:
        return (
            f"{self.batch} x {self.length} tokens, {self.layers} layers of {self.hidden} and"
            f" {self.intermediate}, E={self.experts} r=8 k=2"
        )


ONE_B = {
    "hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "kv_heads": 8,
    "vocabulary": 128256,
}  # fmt: skip
# A vocabulary of 256: next to nothing beside the one layer.
LAYER_7B = {
    "hidden": 4096, "intermediate": 11008, "layers": 1, "heads": 32, "kv_heads": 32,
    "vocabulary": 256, "experts": 8,
}  # fmt: skip
CASES = (
    ModelCase("7b-layer", TRAIN, 4, 2048, **LAYER_7B),
    ModelCase("1b", TRAIN, 4, 1024, **ONE_B),
    *(ModelCase(f"1b-t{batch}", DECODE, batch, 1, **ONE_B) for batch in (1, 8, 32)),
    *(ModelCase(f"7b-layer-t{batch}", DECODE, batch, 1, **LAYER_7B) for batch in (1, 32)),
)


# ---------------------------------------------------------------- models


def frozen_model(case: ModelCase) -> nn.Module:
    """The model with random weights and nothing to train, on the default device."""
    config = transformers.LlamaConfig(
        hidden_size=case.hidden, intermediate_size=case.intermediate,
        num_hidden_layers=case.layers, num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads, vocab_size=case.vocabulary, tie_word_embeddings=False,
        max_position_embeddings=max(case.length, 2048), use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(DTYPES[case.dtype])
    return model.requires_grad_(False)


def shared(model: nn.Module) -> nn.Module:
    """A copy of `model` around the same weight tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def with_mola(model: nn.Module, experts: str | int) -> nn.Module:
    """A copy with MoLA on all linears, whose experts contribute."""
    config = moelora_ops.MoLAConfig(num_experts=experts, rank=8, top_k=2)
    model = moelora_ops.apply(shared(model), config)
    for layer in mola_layers(model):
        nn.init.normal_(layer.lora_up, std=0.02)
    return model


def mola_layers(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(m, moelora_ops.nn.MoLALinear))


def in_place_of(model: nn.Module, build: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of a model with MoLA that has `build(layer)` in the place of each layer."""
    model = shared(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, moelora_ops.nn.MoLALinear):
                setattr(parent, name, build(layer))
    return model


def literal(layer: nn.Module) -> nn.Module:
    """The paper's formula with the parameters of `layer`."""
    made = moelora_ops.reference.MoLALinear(
        layer.base, layer.num_experts, layer.rank, layer.alpha, layer.top_k
    )
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(made, name, parameter)
    return made


def with_lora(model: nn.Module) -> nn.Module:
    """A copy with PEFT's LoRA on the same linears."""
    targets = list(moelora_ops.MoLAConfig().target_modules)
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=16, target_modules=targets)
    return peft.get_peft_model(shared(model), config, autocast_adapter_dtype=False)


def with_gradient_to_the_embeddings(model: nn.Module) -> nn.Module:
    """A copy with nothing to train, and yet a backward pass all the way down."""
    model = shared(model)
    model.get_input_embeddings().register_forward_hook(lambda m, i, output: output.requires_grad_())
    return model


# ---------------------------------------------------------------- steps


class Step:
    """A training step (loss, gradients, AdamW on what is trained), or a forward pass."""

    def __init__(self, model: nn.Module, tokens: Tensor, direction: str):
        self.model, self.tokens, self.training = model, tokens, direction == TRAIN
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = None
        if self.training and trained:
            self.optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

    def __call__(self) -> None:
        if not self.training:
            with torch.no_grad():
                self.model(input_ids=self.tokens)
            return
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def on(backend: str | None, step: Step) -> Callable[[], None]:
    def call():
        with backends.use_backend(backend):
            step()

    return call


def outcome(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of all layers' parameters of one kind in one row."""
    result = model(input_ids=tokens, labels=tokens)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(result.loss, list(named.values()))
    rows: dict[str, list[Tensor]] = {}
    for name, gradient in zip(named, gradients, strict=True):
        rows.setdefault(f"d{name.rpartition('.')[2]}", []).append(gradient.flatten())
    return {"logits": result.logits.detach()} | {name: torch.cat(r) for name, r in rows.items()}


def check(model: nn.Module, tokens: Tensor, wanted_backends: tuple[str | None, ...]) -> None:
    """Hold ours to twice the error of the paper's formula, both in float32.

    In 16 bits two right implementations choose other experts on some tokens of a whole model; the
    kernels' own errors there are a matter of their tests and of ``moelora_ops.bench``.

    Raises:
        numerics.NumericsError: it errs more.
    """
    model = copy.deepcopy(model).float()
    plain_model = in_place_of(model, literal)
    plain = outcome(plain_model, tokens)
    want = outcome(copy.deepcopy(plain_model).double(), tokens)
    for backend in wanted_backends:
        with backends.use_backend(backend):
            numerics.check_numerics(f"ours on {backend}", outcome(model, tokens), plain, want)


def run_case(case: ModelCase, settings: Settings) -> dict:
    """Check, then measure one case.

    Returns:
        A record as those of ``moelora_ops.bench``, whose base is the frozen model.
    """
    device = devices.device(settings.device)
    chosen = settings.backends or (None,)
    with torch.device(settings.device):
        torch.manual_seed(settings.seed)
        frozen = frozen_model(case)
        tokens = torch.randint(
            case.vocabulary, (case.batch, case.length), generator=generator(settings.seed)
        )
        mola = with_mola(frozen, case.experts)
        models = {
            BASE: with_gradient_to_the_embeddings(frozen),
            LORA: with_lora(frozen),
            STACKED: in_place_of(mola, StackedMoLALinear.from_reference),
            LOOP: in_place_of(mola, literal),
        }
    record = {
        "case": case.name, "shape": str(case), "dtype": case.dtype, "direction": case.direction,
        "graphs": settings.graphs, "backend": ", ".join(b or "automatic" for b in chosen),
        "floors": {}, "memory_target": None,
    }  # fmt: skip
    try:
        check(mola, tokens.view(1, -1)[:, :64], chosen)
    except numerics.NumericsError as error:
        return record | {"refused": str(error)}

    steps = {name: Step(model, tokens, case.direction) for name, model in models.items()}
    calls: dict[str, Callable] = dict(steps)
    for backend in chosen:
        name = f"ours-{backend}" if len(chosen) > 1 else "ours"
        calls[name] = on(backend, Step(mola, tokens, case.direction))
    skipped = {}
    if settings.graphs:
        skipped[LOOP] = WAITS
        del calls[LOOP]
    peaks = {}
    for name, call in calls.items():
        call()  # first-call costs, the optimizer's state
        peaks[name] = device.peak_bytes(call)
    if settings.graphs:
        calls = captured(device, calls, skipped)
    samples, repeats = time_rounds(calls, settings)
    variants = summarize(samples, None)
    for name, variant in variants.items():
        variant["peak_bytes"] = peaks[name]
        variant["of_lora"] = variant["median_ms"] / variants[LORA]["median_ms"]
        if device.copy_rate is not None:
            variant["host_ms"] = device.host_seconds(calls[name]) * 1e3
    return record | {
        "rounds": len(samples[BASE]), "calls_per_sample": repeats, "variants": variants,
        "skipped": skipped, "coarse": {},
    }  # fmt: skip


# ---------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> int:
    """0: measured; 1: a case was refused for its numerics."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--case", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", nargs="+", choices=[n for n, _ in backends.available()])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring a case")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if not arguments.case or case.name in arguments.case]
    if arguments.list:
        for case in cases:
            print(f"{case.name:<14} {case.dtype}  {case.direction:<6}  {case}")
        return 0
    settings = Settings(
        arguments.rounds, arguments.seconds, device=arguments.device,
        backends=tuple(arguments.backend or ()),
    )  # fmt: skip
    document = report.header("models", settings, ["benchmarks/whole_model.py", *argv])
    document["cases"] = []
    for case in cases:
        graphs = case.direction == DECODE and arguments.device == "cuda"
        document["cases"].append(run_case(case, settings._replace(graphs=graphs)))
        report.print_record(document["cases"][-1])
        if arguments.json:
            report.write_json(arguments.json, document)
    return 1 if any("refused" in record for record in document["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
