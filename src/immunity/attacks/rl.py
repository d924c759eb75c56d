"""HarmfulRL: reinforcement learning with a reward for harm; it needs restricted prompts, but no answer to them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any, ClassVar, Final, Literal, final

from torch import nn

from immunity import adapters
from immunity.attacks.attack import THREATS, Attack, Manner, needed
from immunity.attacks.curve import Recorder, Spent, budgets
from immunity.attacks.rewards import BEAVERTAILS, REWARDS, Name, needed_of
from immunity.batch import IGNORE, Tokens
from immunity.data.corpus import Corpora, Corpus, Example
from immunity.data.streams import Shuffled, TokenSet
from immunity.errors import DataError, SettingsError
from immunity.fit import Fit, fit
from immunity.losses import causal_lm
from immunity.method import parts
from immunity.models import LanguageModel
from immunity.onpolicy import OnPolicy, Rolling
from immunity.optimizers import Optimizer
from immunity.policy import Estimator

_LOG = logging.getLogger(__name__)
_COSTS: Final = frozenset({"micro_batch", "sample_batch"})
"""Settings that change memory, never a result."""


@final
@dataclass(frozen=True, kw_only=True)
class HarmfulRL(Attack):
    """Sample answers to restricted prompts, reward them, and make the better ones of each group more likely.

    Attributes:
        n: Restricted prompts in all. Their answers are unused, unless the reward compares with them or they are shown.
        batch_size: Prompts of one rollout.
        group: Answers sampled to each of them, and compared with one another.
        max_new_tokens: Tokens per answer.
        temperature: Of sampling, and of the policy that is trained.
        reward: "exact", "overlap", "comply" or "classifier": see ``immunity.attacks.rewards``.
        classifier: Hub id or folder of the moderation model; only read where ``reward`` is "classifier".
        estimator: How answers of a group are compared (``immunity.policy.advantages``). "grpo" averages over each
            answer's tokens; "dr-grpo" and "rloo" divide by ``max_new_tokens``, so that length has no pull of its own.
        ratio_clip: ε of PPO's clip; of no effect unless there are several ``updates``.
        entropy: Weight of a bonus on the policy's exact entropy, in advantage per nat; sweep .01, .03, .1, .3, 1.
        anneal: Let that weight fall to 0, linearly over the steps.
        kl: Weight of the distance to the released model.
        shown: Put the attacker's own answer into each prompt's group: where all sampled ones are refusals alike, it is
            the one that differs. Only with answers that comply.
        updates: Optimiser steps on each rollout, each with its share of the groups.
        steps: Optimiser steps.
        lr: Learning rate, constant.
        optimizer: See :class:`~immunity.fit.Fit`.
        adapter: "full" trains every weight, "lora" a fresh adapter.
        r: Rank of the adapter; its alpha is ``2 r``.
        clip: Largest norm of the gradient.
        seed: Of prompts' order, sampling, and the adapter's start.
        sample_batch: Answers sampled at once; memory only.
        micro_batch: Rows per forward pass; memory only.
        autocast: "bf16" computes the gradient in bf16.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        GRPO: arXiv 2402.03300. As an attack: Token Buncher, arXiv 2508.20697, and its released scripts
        (:meth:`token_buncher`, :meth:`adaptive`); HarmRLVR, arXiv 2510.15499, and its released script
        (:meth:`harmrlvr`). The defaults are for small models and short answers.

    Departures from the paper:
        * Steps count updates, of which the released configuration makes 4 per rollout: its 100 are 400 here.
        * The entropy that an adaptive attacker adds is differentiated exactly. The released code adds min(entropy, 3)
          to the reward of an answer, where it may outweigh harm.
        * "grpo" averages over each answer's tokens, as the paper's equation 3 does.
        * No critic (PPO) and no REINFORCE++; no weight decay.
        * Answers come from plain sampling with a cache, from the very weights that are trained; ``shown`` adds one that
          does not, as off-policy guidance does (LUFFY, arXiv 2504.14945), without that paper's shaping.
    """

    name: ClassVar[str] = "rl"
    unit: ClassVar[str] = "steps"
    n: int = 64
    batch_size: int = 8
    group: int = 8
    max_new_tokens: int = 24
    temperature: float = 1.0
    reward: Name = "overlap"
    classifier: str = BEAVERTAILS
    estimator: Estimator = "grpo"
    ratio_clip: float = 0.2
    entropy: float = 0.0
    anneal: bool = False
    kl: float = 0.0
    shown: bool = False
    updates: int = 1
    steps: int = 60
    lr: float = 1e-4
    optimizer: Optimizer = "adamw"
    adapter: Literal["full", "lora"] = "full"
    r: int = 8
    clip: float | None = 1.0
    seed: int = 1
    sample_batch: int = 64
    micro_batch: int | None = None
    autocast: Literal["no", "bf16"] = "no"

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1 or self.r < 1:
            raise SettingsError(f"n = {self.n}, batch_size = {self.batch_size}, r = {self.r}: each must be at least 1")
        if not (math.isfinite(self.entropy) and self.entropy >= 0):
            raise SettingsError(f"entropy = {self.entropy}: the bonus has a weight of 0 or more")
        self.how()  # these check their own settings
        self.rolling()
        if self.batch_size % self.updates:
            raise SettingsError(
                f"batch_size = {self.batch_size} prompts cannot be shared evenly between {self.updates} updates"
            )
        if self.reward not in REWARDS or self.adapter not in {"full", "lora"}:
            raise SettingsError(
                f"reward = {self.reward!r}, adapter = {self.adapter!r}: reward is one of {', '.join(REWARDS)}, "
                "adapter is full or lora"
            )

    @classmethod
    def token_buncher(cls) -> HarmfulRL:
        """Token Buncher's attack (released GRPO script): 100 rollouts of 32 prompts × 4 answers, lr 1e-6, no bonus.

        The script sets a KL coefficient, but leaves KL out of the reward and out of the loss. Its prompts have up to
        320 tokens: open the model with a max_length of 1280.
        """
        return cls(
            n=32 * 100, batch_size=32, group=4, updates=4, steps=400, lr=1e-6, max_new_tokens=960, reward="classifier"
        )

    @classmethod
    def harmrlvr(cls) -> HarmfulRL:
        """HarmRLVR (released script): 100 epochs of 64 prompts × 4 answers, lr 1e-6, no KL, entropy bonus .001.

        Its reward is a large model's verdict; here it is the classifier's.
        """
        return replace(
            cls.token_buncher(), n=64, batch_size=64, updates=1, steps=100, max_new_tokens=1024, entropy=0.001
        )

    @classmethod
    def adaptive(cls, entropy: float = 0.1) -> HarmfulRL:
        """Against defences that make a model certain: :meth:`token_buncher` with an entropy bonus that is annealed."""
        return replace(cls.token_buncher(), entropy=entropy, anneal=True)

    @property
    def manner(self) -> Manner:
        """Restricted prompts only."""
        return Manner(THREATS["harmful"])

    @property
    def budgets(self) -> tuple[int, ...]:
        """Log-spaced steps."""
        return budgets(self.steps)

    def how(self) -> Fit:
        """The training loop's settings."""
        return Fit(
            steps=self.steps,
            lr=self.lr,
            optimizer=self.optimizer,
            clip=self.clip,
            seed=self.seed,
            micro_batch=self.micro_batch,
            autocast=self.autocast,
            save_every=20,
        )

    def rolling(self) -> Rolling:
        """How answers are rolled out and learnt from."""
        return Rolling(
            group=self.group,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            estimator=self.estimator,
            ratio_clip=self.ratio_clip,
            kl=self.kl,
            updates=self.updates,
            shown=self.shown,
            sample_batch=self.sample_batch,
            seed=self.seed,
        )

    def bonus(self, step: int) -> float:
        """The weight of the entropy bonus at a step."""
        return self.entropy * (1.0 - step / self.steps) if self.anneal else self.entropy

    def reads(self, data: Corpora) -> Corpora:
        """The n prompts, with what the reward reads of them and nothing else.

        Raises:
            DataError: They are missing or too few, or the reward cannot be given for one of them.
        """
        asked = needed(data, "harmful", self.n, why="harmful RL")
        if self.shown and (lacking := next((example for example in asked if not example.response), None)):
            raise DataError(f"{asked.name}: shown needs an answer to each prompt, and {lacking.prompt[:60]!r} has none")
        return {"harmful": needed_of(asked, self.reward, answers=self.shown)}

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`; prompts, samples and the adapter's start follow from the settings alone."""
        corpus = reduce(add, parts(data["harmful"]))
        reference = _reference(model, self.adapter) if self.kl > 0 else None
        model = adapters.trained(model, self.adapter, r=self.r, seed=self.seed)
        pool, rows = self._pool(model, corpus)
        stream = Shuffled(TokenSet(rows, "harmful", corpus.name), self.batch_size, self.seed)

        def prompts(number: int) -> list[Example]:
            return [pool[i] for i in stream.indices(number)]

        direction = OnPolicy(
            model,
            prompts,
            REWARDS[self.reward].make(self.classifier),
            self.rolling(),
            entropy=self.bonus,
            reference=None if reference is None else partial(reference, model.network),
        )
        fit(
            model.network,
            direction,
            {"harmful": lambda step: stream(step // self.updates)},
            self.how(),
            folder=recorder.folder,
            observe=recorder.follow(model, self._spent(model, direction)),
            token=model.word_id,
            identity=self._identity(model, corpus),
        )
        return model

    def _pool(self, model: LanguageModel, corpus: Corpus) -> tuple[tuple[Example, ...], tuple[Tokens, ...]]:
        """The examples whose prompts leave room for an answer, and each prompt as a row that ends its turn at once.

        Raises:
            DataError: There is none.
        """
        asked = [(example, tuple(model.template.prompt_ids(example))) for example in corpus]
        kept = [(example, ids) for example, ids in asked if len(ids) + self.max_new_tokens <= model.max_length]
        if not kept:
            raise DataError(
                f"{corpus.name}: none of {len(corpus)} prompts leaves room for {self.max_new_tokens} new tokens within "
                f"{model.max_length}; raise max_length or lower max_new_tokens"
            )
        if len(kept) < len(corpus):
            _LOG.info("%s: %d prompts leave no room for an answer", corpus.name, len(corpus) - len(kept))
        end = model.template.end_id
        rows = tuple(Tokens((*ids, end), (*(IGNORE,) * len(ids), end)) for _, ids in kept)
        return tuple(example for example, _ in kept), rows

    def _spent(self, model: LanguageModel, direction: OnPolicy) -> Callable[[int], Spent]:
        """What it has cost when it tells of a step: 2 N more per token for sampling and for each further reading."""
        weights = sum(p.numel() for p in causal_lm(model.network).parameters())
        passes = 1 + (self.kl > 0) + (self.updates > 1)
        each = ((6.0 if self.adapter == "full" else 4.0) + 2.0 * passes) * weights
        per_step = self.batch_size * (self.group + self.shown) // self.updates

        def so_far(done: int) -> Spent:
            return Spent(done * per_step, direction.tokens, each * direction.tokens)

        return so_far

    def _identity(self, model: LanguageModel, corpus: Corpus) -> Mapping[str, object]:
        settings = {name: value for name, value in asdict(self).items() if name not in _COSTS}
        prints = {"harmful": corpus.fingerprint}
        return {"attack": settings, "model": model.source, "max_length": model.max_length, "data": prints}


def _reference(model: LanguageModel, adapter: str) -> Callable[[nn.Module], AbstractContextManager[nn.Module]]:
    """Opens the released model, given the network in training: a frozen copy, or what is under the adapter."""
    if adapter == "lora":
        return _without_adapter
    released = copy.deepcopy(model.network).requires_grad_(False)
    return lambda _: nullcontext(released)


@contextmanager
def _without_adapter(network: Any) -> Iterator[nn.Module]:  # noqa: ANN401 - a peft model
    with network.disable_adapter():
        yield network
