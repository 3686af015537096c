"""A model's chat template: a conversation to the text that the model was trained to continue.

Templates are Jinja programs that come with a tokenizer, in `chat_template.jinja` or under `chat_template` in
`tokenizer_config.json`. They are rendered as transformers renders them: in a sandbox, since they are code of strangers, and
with the same extensions and names. transformers itself is not needed, so packages can be talked to on a small device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import TextError, first_line
from .schema import read_json

if TYPE_CHECKING:
    import jinja2

    from .text import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
DEFAULT = "default"  # of several templates, the one that is meant where none is named

Message = Mapping[str, str]  # "role": system, user or assistant; "content"


def chat_files(folder: Path) -> tuple[str, ...]:
    """The names of the files in `folder` that make its chat template; none where it has none.

    Raises:
        TextError: one of them cannot be read.
    """
    if template_source(folder) is None:
        return ()
    return tuple(name for name in (TOKENIZER_CONFIG_FILE, TEMPLATE_FILE) if (folder / name).is_file())


def template_source(folder: Path) -> str | None:
    """The chat template of a folder, None where it has none.

    Raises:
        TextError: a file that might hold it cannot be read.
    """
    return _find(folder)[0]


def stored_templates(folder: Path) -> Any:
    """What a folder's tokenizer_config.json has under `chat_template`: a text, several with names, or None.

    Raises:
        TextError: the file cannot be read.
    """
    return _tokenizer_config(folder).get("chat_template")


class ChatTemplate:
    """Make one with `ChatTemplate.open`."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: Path) -> None:
        """
        Args:
            special_tokens: what the template may name, such as bos_token.
            where: the file that it came from, for messages.
        Raises:
            TextError: `source` is no Jinja template; the message names the line.
        """
        import jinja2

        self.where = where
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TextError(f"{where}: not a chat template (line {error.lineno}: {first_line(error)})") from None

    @classmethod
    def open(cls, folder: Path) -> ChatTemplate:
        """The template of a checkpoint or package.

        Raises:
            TextError: the folder has none, or it cannot be used.
        """
        source, config, where = _find(folder)
        if source is None:
            raise TextError(
                f"{folder}: has no chat template ({TEMPLATE_FILE}, or chat_template in {TOKENIZER_CONFIG_FILE}); put one "
                "there (and export again), or give a plain prompt"
            )
        named = {
            k: v["content"] if isinstance(v, dict) and "content" in v else v
            for k, v in config.items()
            if k.endswith("_token")
        }
        return cls(source, {k: v for k, v in named.items() if isinstance(v, str)}, where)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            add_generation_prompt: end with what an answer begins after.
        Raises:
            TextError: the template refuses the conversation, or fails.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program, and may fail in every way
            raise TextError(f"{self.where}: the chat template refuses the conversation ({first_line(error)})") from None

    def end_of_turn(self, tokenizer: Tokenizer) -> str | None:
        """What follows an answer in a conversation that goes on, to stop at; None where the template does not say.

        It is the token of the tokenizer's own that ends a turn (`<|im_end|>`), or else the text up to the next turn.
        """
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        try:
            text = self.render([question, answer, question])
        except TextError:
            return None
        end = text.rpartition("answer")[2].partition("question")[0]
        return tokenizer.leading_token(end.lstrip()) or end.rstrip() or None


def _find(folder: Path) -> tuple[str | None, dict[str, Any], Path]:
    """The source of a folder's template, if there is one, the tokenizer's configuration, and the template's file."""
    config = _tokenizer_config(folder)
    own, path = folder / TEMPLATE_FILE, folder / TOKENIZER_CONFIG_FILE
    if own.is_file():
        return _read(own), config, own
    source = config.get("chat_template")
    if isinstance(source, list):  # of several, each with its name
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == DEFAULT), None)
    if source is not None and not isinstance(source, str):
        raise TextError(f"{path}: chat_template is no text")
    return source, config, path


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG_FILE
    if not path.is_file():
        return {}
    config = read_json(path, TextError)
    if not isinstance(config, dict):
        raise TextError(f"{path}: holds no JSON object")
    return config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path}: not readable ({first_line(error)})") from None


@cache
def _environment() -> jinja2.Environment:
    """As transformers makes it (utils/chat_template_utils.py), so that a template does here what it does there."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} marks what an assistant said, for training; here it is only a block."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return caller()

    class Dict:
        """`dict` without the attributes that lead out of the sandbox."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class Namespace(jinja2.utils.Namespace):
        """Likewise."""

        def __init__(*args: Any, **values: Any) -> None:  # a template may name a value `self`
            attributes = dict(*args[1:], **values)
            for name in attributes:
                check_name(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the name {name!r} in a namespace begins with an underscore")

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """Unlike Jinja's own, without HTML escapes."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment
