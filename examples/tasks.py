"""A mixture of short reasoning tasks: questions by reasoning-gym, batches, loss and accuracy."""

import random
from statistics import mode
from typing import NamedTuple

import reasoning_gym
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Settings of each reasoning-gym task: small enough for a model of 135M parameters, and such that
# no answer is so common that always giving it would do.
TASKS: dict[str, dict] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 1, "max_value": 40},
    "family_relationships": {"max_family_size": 4},
    "word_sequence_reversal": {"min_words": 2, "max_words": 3},
    "number_filtering": {"min_numbers": 2, "max_numbers": 3, "max_decimals": 0},
}

SYSTEM = "Reply with the answer only."
IGNORED = -100  # label of a token that carries no loss


class Example(NamedTuple):
    """One question and its answer as token ids; the answer ends with the end-of-turn token.

    `text` is the question as the task gives it, without the chat around it.
    """

    task: str
    question: list[int]
    answer: list[int]
    text: str = ""


class Batch(NamedTuple):
    """Padded examples.

    Attributes:
        ids: ``[B, L]`` int64, padded on the right.
        mask: ``[B, L]`` int64, 1 on real tokens.
        labels: ``[B, L]``, the *next* token where that is part of an answer, else ``IGNORED``.
        tasks: the name of each example's task.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    tasks: tuple[str, ...] = ()


def make_mixture(
    tokenizer,
    per_task: int,
    held_out_per_task: int,
    length: int,
    seed: int,
    tasks: dict[str, dict] | None = None,
) -> tuple[list[Example], list[Example]]:
    """Examples of every task to learn from, and held-out ones whose questions are not among those.

    Args:
        tokenizer: with a chat template; its end-of-sequence token ends an answer.
        per_task, held_out_per_task: how many of each task; all questions differ.
        length: most tokens of a question with its answer; longer ones are left out.
        seed: another one gives other questions.
        tasks: settings of each task; :data:`TASKS` by default.

    Raises:
        ValueError: a task has not so many different questions of that length.
    """
    training, held_out = [], []
    tasks = TASKS if tasks is None else tasks
    for task, settings in tasks.items():
        count = per_task + held_out_per_task
        examples = make_examples(tokenizer, task, count, length, seed, settings)
        training += examples[:per_task]
        held_out += examples[per_task:]
    return training, held_out


def make_examples(
    tokenizer, task: str, count: int, length: int, seed: int, settings: dict | None = None
) -> list[Example]:
    """`count` examples of one task with different questions, see :func:`make_mixture`."""
    settings = TASKS[task] if settings is None else settings
    examples: dict[str, Example] = {}
    for item in reasoning_gym.create_dataset(task, seed=seed, size=20 * count, **settings):
        text = item["question"].strip()
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        question = tokenizer.encode(prompt, add_special_tokens=False)
        answer = tokenizer.encode(item["answer"], add_special_tokens=False)
        answer.append(tokenizer.eos_token_id)
        if len(question) + len(answer) <= length:
            examples.setdefault(text, Example(task, question, answer, text))
        if len(examples) == count:
            return list(examples.values())
    raise ValueError(
        f"{task}: wanted {count} different examples of at most {length} tokens, got {len(examples)}"
    )


def constant_accuracy(training: list[Example], held_out: list[Example]) -> dict[str, float]:
    """Per task, what always giving the commonest answer of `training` would reach on `held_out`."""
    accuracy = {}
    for task in dict.fromkeys(e.task for e in held_out):
        commonest = mode(tuple(e.answer) for e in training if e.task == task)
        right = [tuple(e.answer) == commonest for e in held_out if e.task == task]
        accuracy[task] = sum(right) / len(right)
    return accuracy


def collate(examples: list[Example], pad: int) -> Batch:
    """Pad on the right to the longest example; labels only where an answer is to be predicted."""
    length = max(len(e.question) + len(e.answer) for e in examples)
    ids = torch.full((len(examples), length), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, e in enumerate(examples):
        start, end = len(e.question), len(e.question) + len(e.answer)
        ids[row, :end] = torch.tensor(e.question + e.answer)
        mask[row, :end] = 1
        labels[row, start - 1 : end - 1] = torch.tensor(e.answer)
    return Batch(ids, mask, labels, tuple(e.task for e in examples))


def batches(examples: list[Example], size: int, steps: int, pad: int, seed: int) -> list[Batch]:
    """`steps` batches of `size` examples: every epoch in a new order."""
    return [collate(group, pad) for group in draw(examples, size, steps, seed)]


def draw(examples: list[Example], size: int, steps: int, seed: int) -> list[list[Example]]:
    """What goes into each batch, see :func:`batches`."""
    shuffle, order = random.Random(seed), []
    while len(order) < size * steps:
        order += shuffle.sample(examples, len(examples))
    return [order[i * size : (i + 1) * size] for i in range(steps)]


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[A, vocabulary]`` and labels ``[A]`` of the A answer tokens."""
    hidden = model.get_decoder()(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)[0]
    wanted = batch.labels != IGNORED
    return model.get_output_embeddings()(hidden[wanted]), batch.labels[wanted]


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answer tokens."""
    logits, labels = answer_logits(model, batch)
    return F.cross_entropy(logits.float(), labels)


class Score(NamedTuple):
    """Of a task: mean loss per answer token, share of the answers that are right in full."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, examples: list[Example], size: int, pad: int) -> dict[str, Score]:
    """Scores per task.

    An answer counts as right if each of its tokens is the most likely one after the right ones
    before it: then, and only then, greedy decoding writes exactly this answer.
    """
    scores = {}
    for task in dict.fromkeys(e.task for e in examples):
        chosen = [e for e in examples if e.task == task]
        losses, right = [], []
        for i in range(0, len(chosen), size):
            group = chosen[i : i + size]
            logits, labels = answer_logits(model, collate(group, pad))
            losses.append(F.cross_entropy(logits.float(), labels, reduction="none"))
            hits = (logits.argmax(-1) == labels).split([len(e.answer) for e in group])
            right += [bool(hit.all()) for hit in hits]
        scores[task] = Score(torch.cat(losses).mean().item(), sum(right) / len(right))
    return scores
