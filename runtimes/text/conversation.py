"""A conversation on any runtime: every turn feeds only what the text has gained since the last one.

The chat template says what the text of a conversation is. Where that text begins with what the runtime has read, only the rest
is fed. A template may also rewrite what was said before (leave out an answer's reasoning, strip its white space): then the
runtime is reset and reads the new text from its beginning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rmse_edge.chat import ChatTemplate, Message
from rmse_edge.errors import ArgumentError
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import Token
from rmse_edge.runtimes.host.session import Resumed, SessionError
from rmse_edge.runtimes.host.tail import BEGINNING, Tail
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.schema import parse_json, validated
from rmse_edge.text import Tokenizer

from .generate import Generation, TextStream

Read = tuple[str, list[int]]  # text that a runtime has read, and the last tokens of it that were not fed yet


@dataclass(frozen=True)
class Kept:
    """What a session keeps of a conversation, beside the runtime's state."""

    messages: tuple[dict[str, str], ...]
    read: tuple[tuple[str, tuple[Token, ...]], ...]  # text that the runtime has read, and its last tokens, not yet fed


@dataclass
class Conversation:
    """Ask, iterate the answer's spans as those of any `Generation`, then tell `answered`; in turns."""

    runtime: LoopRuntime
    tokenizer: Tokenizer
    template: ChatTemplate
    dials: Dials  # of what is read anew
    generate: Callable[..., Generation]  # takes a prompt, and `tail` and `told` by their names
    messages: list[Message] = field(default_factory=list)
    # Every question is read with all that was said before, from an empty past: of models to which it is one prefix.
    anew: bool = False

    # What the runtime has read: its text, and the last tokens of it that were not fed yet. There may be two ways of seeing
    # it, with those tokens or without. None: it is not known, or not worth going on from.
    _read: list[Read] = field(init=False, default_factory=list)
    _tail: Tail = field(init=False, default=BEGINNING)
    _asked: tuple[Message, str] | None = field(init=False, default=None)  # the question, and the text before its answer
    _base: int = field(init=False, default=0)  # the runtime's position before the question

    def ask(self, question: str) -> Generation:
        """The answer to `question`, still to be made.

        Raises:
            TextError: the template refuses the conversation, or a character is not in the vocabulary.
        """
        message = {"role": "user", "content": question}
        text = self.template.render([*self.messages, message])
        prompt, told = self._rest(text)
        self._asked = message, text
        if told is None:
            self.runtime.reset()
            generation = self.generate(prompt)
        else:
            generation = self.generate(prompt, tail=self._tail, told=told)
        self._base = self.runtime.position
        self._read = []  # until the answer is there
        return generation

    def answered(self, generation: Generation) -> None:
        """The answer is there, or was broken off: what was made of it is what was said."""
        assert self._asked is not None
        if not generation.tokens:
            return  # as if it had not been asked
        question, text = self._asked
        self.messages += [question, {"role": "assistant", "content": generation.text}]
        self._tail = generation.end
        unfed = [*generation.prompt, *generation.tokens][self.runtime.position - self._base :]
        fed = len(generation.tokens) - len(unfed)
        if self.runtime.whole and fed >= 0:
            whole, known = (text + self._text(generation, generation.tokens[:n]) for n in (None, fed))
            self._read = [(whole, unfed), (known, [])]

    @property
    def begun(self) -> bool:
        """Whether anything was answered."""
        return any(message["role"] == "assistant" for message in self.messages)

    def save(self) -> tuple[list[int], Tail, str]:
        """What a session keeps beside the runtime's state: `pending`, `tail` and `chat` of `save_session`.

        A runtime that was broken off, or has been told what came to nothing, reads the conversation anew before.
        """
        if not self._read:
            text = self.template.render(self.messages, add_generation_prompt=False)
            tokens = self.tokenizer.encode(text, special=False)
            self.runtime.reset()
            if len(tokens) > 1:
                self.runtime.feed(tokens[:-1], self.dials, logits="last")
            self._read, self._tail = [(text, tokens[-1:])], BEGINNING
        text, pending = self._read[0]
        return pending, self._tail, json.dumps({"messages": self.messages, "read": self._read})

    def resume(self, session: Resumed) -> None:
        """Go on from a session that is in the runtime already.

        Raises:
            ArgumentError: it is not of a conversation.
            SessionError: its conversation is damaged.
        """
        if not session.chat:
            raise ArgumentError("session", "was saved without a conversation; go on with its text")
        values = parse_json(session.chat, "the session", SessionError, "start a new one")
        kept = validated(Kept, values, "the session", SessionError, "start a new one", "chat")
        self.messages = list(kept.messages)
        self.go_on([(text, list(pending)) for text, pending in kept.read], session.tail)

    @property
    def standing(self) -> tuple[list[Read], Tail]:
        """What the runtime has read, for `go_on` of another conversation on the same state; empty where that is not known."""
        return list(self._read), self._tail

    def go_on(self, read: Sequence[Read], tail: Tail) -> None:
        """The runtime stands where another conversation's `standing` says."""
        self._read, self._tail = list(read), tail

    def _rest(self, text: str) -> tuple[list[int], int | None]:
        """The tokens to feed for `text`, and how many of them are pending; None for those: it is to be read anew."""
        for read, pending in self._read if not self.anew else ():
            if text.startswith(read):
                return pending + self.tokenizer.encode_more(text[len(read) :]), len(pending)
        return self.tokenizer.encode(text, special=False), None

    def _text(self, generation: Generation, tokens: Sequence[int]) -> str:
        """The text of generated tokens, a stop text and the end token included."""
        stream = TextStream(self.tokenizer, tail=generation.tail)
        stream.skip(generation.prompt[generation.told :])
        spans = [span for token in tokens for span in stream.push(token, 1)]
        return "".join(span.text for span in (*spans, *stream.finish()))
