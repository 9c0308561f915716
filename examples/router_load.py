"""Conversations, turn by turn, as a router sees them: what the demo and the benchmark play."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from examples.random_model import prompt
from examples.router_cluster import Routed, RouterServer


@dataclass(frozen=True, slots=True)
class Talk:
    """So many conversations of so many turns, in tokens.  All take a turn, then all take the next."""

    conversations: int = 5
    turns: int = 4
    first_tokens: int = 1536
    turn_tokens: int = 192
    answer_tokens: int = 8

    @property
    def longest(self) -> int:
        """Tokens of the last prompt with its answer."""
        return self.first_tokens + self.turns * (self.turn_tokens + self.answer_tokens)

    def requests(self) -> int:
        """How many there are."""
        return self.conversations * self.turns


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of one conversation, and its answer."""

    conversation: int
    number: int
    answer: Routed


def play(talk: Talk, router: RouterServer, seed: int, tell: Callable[[str], None] | None = None) -> Iterator[Turn]:
    """One turn after the other, one request at a time; conversations of other seeds have nothing in common.

    What was answered is not part of the next prompt: its tokens are not known from its text.
    """
    texts = [prompt(talk.first_tokens, seed=seed + number) for number in range(talk.conversations)]
    for number in range(talk.turns):
        for conversation, text in enumerate(texts):
            answer = router.complete(text, talk.answer_tokens)
            if tell is not None:
                tell(f"conversation {conversation + 1}, turn {number + 1}: {answer.seconds_to_first_token:.2f} s")
            yield Turn(conversation, number, answer)
            text.extend(prompt(talk.turn_tokens, seed=-1 - seed - conversation - 1000 * number))
