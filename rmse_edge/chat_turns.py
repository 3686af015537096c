"""A chat template as plain text around each message, for hosts that run no Jinja.

Most templates put the same text before and behind every message of a role. Such a template is found out by rendering it:
what stands around made-up messages is read off, and then held against what the template renders of other conversations. A
template that does anything else, such as leaving out what was reasoned before, is none of these, and has no such form.

    begin, then for every message before + content + behind, then `answer` where an answer is to be written
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .chat import ChatTemplate, Message, template_source
from .errors import TextError
from .text import Tokenizer

Around = tuple[str, str]  # the text before and behind a message

FIRST, SECOND, THIRD = "first-message", "second-message", "third-message"
# Whatever may stand in a message: a template that treats one of them in a way of its own is not expressed.
CONTENTS = (
    "hello",
    " white space \n",
    "two\n\nparagraphs",
    "日本語 é 🙂",
    "{{ a }} <b> [c] 'd' \"e\" \\n",
    "<think>\nhm\n</think>\n\nyes",
)


@dataclass(frozen=True)
class Turns:
    begin: str  # of a conversation without a system's message
    system: Around | None  # `begin` included; None: the template has no place for one that could be put so
    user: Around
    assistant: Around
    answer: str  # behind the last question, before an answer that is to be written
    trimmed: bool  # white space around a message is left out
    end: str | None  # where an answer stops; None: the template does not say

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as `ChatTemplate.render` gives it."""
        text = "" if messages[0]["role"] == "system" else self.begin
        for message in messages:
            around: Around | None = getattr(self, message["role"])
            assert around is not None
            before, behind = around
            text += before + (message["content"].strip() if self.trimmed else message["content"]) + behind
        return text + (self.answer if add_generation_prompt else "")


def turns_of(folder: Path) -> Turns | None:
    """The template of a checkpoint or package in this form; None: it has none, or one that cannot be put so.

    Raises:
        TextError: a file of the template's cannot be read.
    """
    if template_source(folder) is None or not (folder / "tokenizer.json").is_file():
        return None
    try:
        template = ChatTemplate.open(folder)
        end = template.end_of_turn(Tokenizer(folder / "tokenizer.json"))
        with_system = _system(template)
    except TextError:  # whoever renders it is told
        return None
    for system in (with_system, None) if with_system is not None else (None,):
        for trimmed in (False, True):
            turns = _read(template, system, trimmed, end)
            if turns is not None and all(_same(template, turns, talk) for talk in _talks(system is not None)):
                return turns
    return None


def _read(template: ChatTemplate, system: Around | None, trimmed: bool, end: str | None) -> Turns | None:
    """What stands around the messages of one conversation; None where it does not repeat itself."""
    talk = [_message("user", FIRST), _message("assistant", SECOND), _message("user", THIRD)]
    try:
        whole, asked = template.render(talk, False), template.render(talk, True)
        answered = template.render(talk[:2], False)
    except TextError:
        return None
    if not asked.startswith(whole) or any(whole.count(content) != 1 for content in (FIRST, SECOND, THIRD)):
        return None
    before, rest = whole.split(FIRST)
    between, rest = rest.split(SECOND)
    after, user_behind = rest.split(THIRD)
    assistant_behind = answered.rpartition(SECOND)[2]
    user_before = after.removeprefix(assistant_behind)
    if not (between.startswith(user_behind) and after.startswith(assistant_behind) and before.endswith(user_before)):
        return None
    return Turns(
        begin=before.removesuffix(user_before),
        system=system and (system[0], system[1].removesuffix(user_before)),
        user=(user_before, user_behind),
        assistant=(between.removeprefix(user_behind), assistant_behind),
        answer=asked.removeprefix(whole),
        trimmed=trimmed,
        end=end,
    )


def _system(template: ChatTemplate) -> Around | None:
    """The text before a system's message, and that behind it up to the first question's content."""
    try:
        text = template.render([_message("system", FIRST), _message("user", SECOND)], False)
    except TextError:
        return None
    if text.count(FIRST) != 1 or text.count(SECOND) != 1:
        return None
    before, rest = text.split(FIRST)
    return before, rest.split(SECOND)[0]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _talks(system: bool) -> Iterator[list[dict[str, str]]]:
    """Conversations of one to six messages, with every content in every place."""
    for shift in range(len(CONTENTS)):
        contents = CONTENTS[shift:] + CONTENTS[:shift]
        talk = [_message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
        for count in range(1, len(talk) + 1):
            yield talk[:count]
            if system:
                yield [_message("system", contents[-1]), *talk[:count]]


def _same(template: ChatTemplate, turns: Turns, talk: Sequence[Message]) -> bool:
    try:
        # An answer follows a question.
        prompts = (False,) if talk[-1]["role"] == "assistant" else (False, True)
        return all(template.render(talk, prompt) == turns.render(talk, prompt) for prompt in prompts)
    except TextError:
        return False
