"""What a prompt becomes before a model reads it, and what ends a text: the same for `rmse-run` and for `rmse-serve`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmse_edge.errors import UserError
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.host.tail import BEGINNING, Tail
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.text import Tokenizer, TokenNumbers

from .conversation import Conversation
from .generate import Generation
from .sampling import Sampler, Sampling
from .speculation import Speculation

if TYPE_CHECKING:
    from rmse_edge.chat import ChatTemplate

    from .librarian import Librarian

MAX_NEW_TOKENS = 256  # where nobody says how many


def open_tokenizer(folder: Path, vocab_size: int, needed: bool = True) -> Tokenizer | TokenNumbers:
    """The tokenizer of a checkpoint or package; a model without one reads and writes ids, unless it is `needed`.

    Raises:
        TextError: it is not there, damaged, or another model's.
    """
    path = folder / "tokenizer.json"
    return Tokenizer(path).fitting(vocab_size) if needed or path.is_file() else TokenNumbers()


def begin_of_text(config: dict[str, Any]) -> list[int]:
    """What an empty prompt starts from.

    Raises:
        UserError: the model has no such token.
    """
    bos = config.get("bos_token_id")
    if bos is None:
        raise UserError("the prompt is empty and the model has no begin-of-text token; give at least one character")
    return [bos]


@dataclass
class Writer:
    """One text or one conversation on a runtime: everything but what is said."""

    runtime: LoopRuntime
    tokenizer: Tokenizer | TokenNumbers
    dials: Dials
    sampler: Sampler = field(default_factory=lambda: Sampler(Sampling()))
    max_new_tokens: int = MAX_NEW_TOKENS  # of each answer
    stop: Sequence[str] = ()
    ignore_eos: bool = False  # go on after the model's end tokens, and after what its template ends a turn with
    prefix: bool | None = None  # whether a prompt is one; None: where the model knows prefixes
    librarian: Librarian | None = None
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        if self.speculation is not None:
            self.speculation.check(self.runtime)

    @property
    def prefixed(self) -> bool:
        """Whether the positions of a prompt see each other whatever their order."""
        return self.runtime.info.language.prefix if self.prefix is None else self.prefix

    def generate(self, prompt: Sequence[int], tail: Tail = BEGINNING, told: int = 0) -> Generation:
        """What follows these tokens, still to be made. Arguments as of `Generation`."""
        # A text that goes on has begun, and a prefix is a beginning.
        prefix = len(prompt) if self.prefixed and not self.runtime.position else 0
        eos = () if self.ignore_eos else self.runtime.info.language.eos_token_ids
        self.runtime.noise_seed = self.sampler.sampling.seed
        return Generation(
            self.runtime, self.tokenizer, prompt, self.dials, self.sampler, self.max_new_tokens, eos, self.stop,
            self.librarian, tail, told, prefix, self.speculation,
        )  # fmt: skip

    def begun(self, prompt: str | Sequence[int], shown: bool = False) -> Generation:
        """A new text that begins with a prompt.

        Args:
            shown: whether the prompt's text stands before what is written.
        Raises:
            TextError: the tokenizer has no token for a character.
            UserError: the prompt is empty, and the model has no token to begin with.
        """
        if isinstance(prompt, str):
            assert isinstance(self.tokenizer, Tokenizer)
            return self.generate(self.tokenizer.encode(prompt) or begin_of_text(self.runtime.info.config))
        # Text goes on from the prompt. Numbers begin anew, unless they are shown behind it.
        anew = isinstance(self.tokenizer, TokenNumbers) and not shown
        return self.generate(prompt, told=len(prompt) if anew else 0)

    def conversation(self, template: ChatTemplate) -> Conversation:
        """Turns by a chat template. An answer also ends at what the template puts after one."""
        assert isinstance(self.tokenizer, Tokenizer)
        if not self.ignore_eos and (end := template.end_of_turn(self.tokenizer)):
            self.stop = [*self.stop, end]
        return Conversation(self.runtime, self.tokenizer, template, self.dials, self.generate, anew=self.prefixed)
