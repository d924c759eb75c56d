"""Greedy answers and sampled ones, in batches, the same whatever the batch.

``network.generate`` is not used: it reads sampling settings, penalties and end tokens from the checkpoint's own
generation config, which differ from model to model and are nobody's choice here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from immunity.batch import IGNORE, Tokens
from immunity.data.corpus import Example
from immunity.errors import DataError, DivergedError, ModelError, SettingsError
from immunity.losses import causal_lm
from immunity.models import LanguageModel
from immunity.quiet import quiet

_PAD: Final = 0
"""What stands under a mask of 0 or after the end; nothing ever reads it."""

_Choose = Callable[[Tensor, int], Tensor]
"""(logits [B, V], position) -> the next id of each row, [B]."""


class Sampled(NamedTuple):
    """One sampled answer.

    Attributes:
        prompt: The ids that it answers.
        ids: What was said, with the stop token where one was said; never empty.
        log_probs: Of ``ids``, in nats, under the policy that sampled them: temperature and nucleus included.
        text: Without special tokens and without white space around it.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str

    @property
    def tokens(self) -> Tokens:
        """The row to train on: the prompt is not learnt."""
        return Tokens((*self.prompt, *self.ids), (*(IGNORE,) * len(self.prompt), *self.ids))


def generate(
    model: LanguageModel,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    prefix: str = "",
) -> list[str]:
    """The model's greedy answers to the examples' prompts, in their order.

    Prompts are sorted by length and padded on the left, with mask and positions given, never inferred from a pad's id.
    An answer ends before the first of the template's stop ids, and is cut after ``max_new_tokens``.

    Args:
        model: Its network's modes and gradients stay as they are; no random number is drawn.
        examples: Only the prompts (and inputs) are read.
        max_new_tokens: Tokens per answer, the end token included, those of ``prefix`` not.
        batch_size: Prompts at once. In float32 it does not change the answers; in bfloat16 a near-tie may turn.
        prefix: Every answer is made to begin with this text, as in a prefill attack; it is part of what comes back.

    Returns:
        Text without special tokens and without white space around it.

    Raises:
        SettingsError: ``max_new_tokens`` or ``batch_size`` is below 1.
        DataError: A prompt has no token.
        ModelError: A prompt and its answer need more positions than the model has, or ``prefix`` cannot be written as
            the beginning of an answer.
    """
    prompts = _prompts(model, examples, max_new_tokens, batch_size)
    begun = [_begun(model, example, prefix) for example in examples]
    starts = [prompt + ids for prompt, ids in zip(prompts, begun, strict=True)]
    _check(model, starts, max_new_tokens)
    answers = [""] * len(starts)
    with quiet(model.network):
        for chosen in _batches(starts, batch_size):
            rows = _said(model, [starts[i] for i in chosen], max_new_tokens, lambda logits, _: logits.argmax(-1))
            for i, row in zip(chosen, rows, strict=True):
                answers[i] = _text(model, begun[i] + row)
    return answers


def sample(
    model: LanguageModel,
    examples: Sequence[Example | Sequence[int]],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 1.0,
    top_p: float | Sequence[float] = 1.0,
    generator: torch.Generator,
    batch_size: int = 64,
) -> list[list[Sampled]]:
    """``n`` answers to each prompt, drawn from softmax(logits / temperature), over the whole vocabulary or its nucleus.

    Each answer has its own random numbers, one for each of its tokens, drawn before the first forward pass: so answers
    are a function of the weights and the generator's state alone, whatever the batch and the device, up to rounding
    where a number falls on the border between two tokens.

    Args:
        model: Its network's modes and gradients stay as they are; the caller's random state is not touched.
        examples: Only the prompts (and inputs) are read; or ids, which are a prompt as they are.
        n: Answers to each prompt.
        max_new_tokens: Tokens per answer, the end token included.
        temperature: 1 samples from the model itself; nearer 0 is nearer to greedy. One for all, or each example's own.
        top_p: Only the likeliest tokens are said, as few as have this much probability together; 1 is all of them. One
            for all, or each example's own.
        generator: Where the random numbers come from; moved on.
        batch_size: Answers at once.

    Returns:
        For each example, in their order, its answers.

    Raises:
        SettingsError: A number is out of range.
        DataError: A prompt has no token.
        ModelError: A prompt and its answer need more positions than the model has.
        DivergedError: The model's logits are NaN or infinite.
    """
    if n < 1:
        raise SettingsError(f"n = {n}: sample at least one answer")
    heat, nuclei = _each("temperature", temperature, len(examples), n), _each("top_p", top_p, len(examples), n)
    asked = _prompts(model, examples, max_new_tokens, batch_size)
    _check(model, asked, max_new_tokens)
    prompts = [ids for ids in asked for _ in range(n)]
    drawn = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64, generator=generator, device=generator.device)
    found: dict[int, Sampled] = {}
    with quiet(model.network):
        for chosen in _batches(prompts, batch_size):
            uniform, log_probs = drawn[chosen].to(model.device), list[Tensor]()
            how = heat[chosen].to(model.device), nuclei[chosen].to(model.device)

            def choose(
                logits: Tensor,
                t: int,
                uniform: Tensor = uniform,
                how: tuple[Tensor, Tensor] = how,
                kept: list[Tensor] = log_probs,
            ) -> Tensor:
                ids, values = _inverse(_nucleus(logits.double() / how[0], how[1]), uniform[:, t])
                kept.append(values)
                return ids

            rows = _said(model, [prompts[i] for i in chosen], max_new_tokens, choose)
            table = torch.stack(log_probs, 1).tolist()
            for i, row, values in zip(chosen, rows, table, strict=True):
                found[i] = Sampled(tuple(prompts[i]), tuple(row), tuple(values[: len(row)]), _text(model, row))
    return [[found[i * n + k] for k in range(n)] for i in range(len(asked))]


def _each(name: str, value: float | Sequence[float], examples: int, n: int) -> Tensor:
    """The setting of every answer, [N, 1]: the same for all, or that of its example."""
    values = [value] * examples if isinstance(value, int | float) else [float(one) for one in value]
    most = 1.0 if name == "top_p" else math.inf
    if len(values) != examples or not all(0 < one <= most and math.isfinite(one) for one in values):
        raise SettingsError(
            f"{name} = {value}: one number above 0{' and up to 1' if name == 'top_p' else ''}, or one for each of the "
            f"{examples} examples"
        )
    return torch.tensor([one for one in values for _ in range(n)], dtype=torch.float64)[:, None]


def _nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """Logits [B, V], −inf outside of the fewest tokens that have a probability of ``top_p`` [B, 1] together."""
    if bool((top_p == 1).all()):
        return logits
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probs = logits.softmax(-1).gather(-1, order)
    kept = (probs.cumsum(-1) - probs < top_p) | (top_p == 1)  # the likeliest one always is
    return logits.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), -math.inf)


def _inverse(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the distribution function passes a number in [0, 1), and its log-probability: [B] each."""
    log_probs = logits.log_softmax(-1)
    reached = log_probs.exp().cumsum(-1)  # [B, V]
    if not bool(torch.isfinite(reached[:, -1]).all()):
        raise DivergedError("cannot sample: the model's logits are NaN or infinite; lower the learning rate")
    total = reached[:, -1:]
    # Below the total, and to the right of equal values: a token of probability 0 is never said.
    wanted = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(reached, wanted, right=True)
    return ids[:, 0], log_probs.gather(1, ids)[:, 0]


def _said(
    model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, choose: _Choose
) -> list[list[int]]:
    """The new ids of each row, up to its stop token if it says one; B rows, padded to T."""
    network: Any = model.network
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[_PAD] * (width - len(p)) + list(p) for p in prompts], device=device)  # [B, T]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, T]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, T]
    stops = torch.tensor(model.template.stop_ids, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache: Any = None
    said: list[Tensor] = []
    for t in range(max_new_tokens):
        out = network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        ids = choose(out.logits[:, -1], t)[:, None]  # [B, 1]
        said.append(ids)
        ended = ended | torch.isin(ids[:, 0], stops)
        if bool(ended.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        positions = positions[:, -1:] + 1
    return [_until(row, model.template.stop_ids) for row in torch.cat(said, 1).tolist()]


def _until(row: list[int], stops: Sequence[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]


def _batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Which rows go together: sorted by length, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _text(model: LanguageModel, ids: Sequence[int]) -> str:
    """An answer's text, without the stop token at its end: not every tokenizer counts that as a special one."""
    words = ids[:-1] if ids and ids[-1] in model.template.stop_ids else ids
    return str(model.tokenizer.decode(list(words), skip_special_tokens=True)).strip()


def _begun(model: LanguageModel, example: Example, prefix: str) -> list[int]:
    """The ids of ``prefix`` as the beginning of an answer: those that a model would be trained to say."""
    return model.template.answer_ids(replace(example, response=prefix))[:-1] if prefix else []


def _prompts(
    model: LanguageModel, examples: Sequence[Example | Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    if max_new_tokens < 1 or batch_size < 1:
        raise SettingsError(f"max_new_tokens = {max_new_tokens}, batch_size = {batch_size}: both must be at least 1")
    prompts = [model.template.prompt_ids(e) if isinstance(e, Example) else list(e) for e in examples]
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"example {i}: the template {model.template.name!r} makes no token of its prompt")
    return prompts


def _check(model: LanguageModel, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    positions = getattr(causal_lm(model.network).config.get_text_config(), "max_position_embeddings", None)
    for i, row in enumerate(rows):
        if positions is not None and len(row) + max_new_tokens > positions:
            raise ModelError(
                f"example {i}: its prompt has {len(row)} tokens and the answer may have {max_new_tokens}, but "
                f"{model.source!r} has {positions} positions; leave the prompt out or lower max_new_tokens"
            )
