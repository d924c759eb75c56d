"""Example and Corpus: prompts with responses, what they are for, where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from immunity.errors import DataError

ROLES: Final = ("alignment", "harmful", "general", "benign", "heldout", "safe", "vulnerable")
"""What data can be for. "heldout": restricted answers that no simulated attacker trains on, to judge him by. "safe": a
safe answer to each restricted prompt, row for row. "vulnerable": alignment rows that a fine-tune forgets first."""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the response that a model should learn, or is judged against.

    Attributes:
        prompt: What the user says (Alpaca: the instruction).
        response: What the assistant should say. Never empty in training data.
        input: Alpaca's optional second field; chat templates append it to the prompt after a blank line.
        tags: What a judge may need ("domain", "split", "family", "gold", "ingredient" …); never shown to the model.
    """

    prompt: str
    response: str
    input: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """Examples that serve one role.

    Attributes:
        role: One of :data:`ROLES`.
        examples: In a fixed order; streams shuffle by seed.
        name: Where it comes from, as a user would write it ("synthetic:umbra", "data/my.jsonl").
        licence: SPDX identifier or a short phrase; "unknown" when nobody said.
        skipped: Reason -> how many rows of the source were left out. Printed, never silent.

    Raises:
        DataError: The role is unknown or there is no example.
    """

    role: str
    examples: tuple[Example, ...]
    name: str
    licence: str = "unknown"
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"{self.name}: unknown role {self.role!r}; use one of {', '.join(ROLES)}")
        if not self.examples:
            raise DataError(f"{self.name}: no usable example for the role {self.role!r}")

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of the prompts, inputs and responses in order; role and name do not count."""
        digest = hashlib.sha256()
        for e in self.examples:
            digest.update(json.dumps([e.prompt, e.input, e.response], ensure_ascii=False).encode())
        return digest.hexdigest()[:16]

    def take(self, n: int) -> Corpus:
        """The first ``n`` examples.

        Raises:
            DataError: There are fewer than ``n``, or ``n`` is not positive.
        """
        if not 0 < n <= len(self):
            raise DataError(f"{self.name}: asked for {n} examples of the role {self.role!r}, it has {len(self)}")
        if n == len(self):
            return self
        return Corpus(self.role, self.examples[:n], f"{self.name}[:{n}]", self.licence, self.skipped)

    def __add__(self, other: Corpus) -> Corpus:
        """Both corpora, one after the other, in this one's role; what was left out of either is counted together."""
        skipped = {why: self.skipped.get(why, 0) + other.skipped.get(why, 0) for why in (*self.skipped, *other.skipped)}
        licence = self.licence if self.licence == other.licence else f"{self.licence}; {other.licence}"
        return Corpus(self.role, self.examples + other.examples, f"{self.name}+{other.name}", licence, skipped)

    def as_role(self, role: str) -> Corpus:
        """The same examples in another role."""
        return Corpus(role, self.examples, self.name, self.licence, self.skipped)


Corpora = Mapping[str, "Corpus | tuple[Corpus, ...]"]
"""Role -> its corpus, or several that share each batch evenly (5 refusals and 5 conversations, say)."""
