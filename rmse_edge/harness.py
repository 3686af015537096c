"""A model of lm-eval, the Language Model Evaluation Harness: any package or checkpoint, on any runtime.

Importing this module registers it as `rmse`. lm-eval looks for models in a list of its own and nowhere else, so its command
does not find one that was not imported before; `rmse-lm-eval` is that command with this import.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, warning_once
from pydantic import Field
from tqdm import tqdm

from .archive import unpacked
from .chat import ChatTemplate, template_source
from .errors import ArgumentError, UserError
from .loop.dials import DIALS
from .numbers import SEGMENT
from .package import MANIFEST
from .runtimes import LoopRuntime, open_runtime
from .runtimes.measure.evaluate import cross_entropy
from .runtimes.text.generate import Generation
from .runtimes.text.sampling import Sampler, Sampling
from .schema import check_value
from .shipped import or_shipped
from .text import Tokenizer

MAX_GEN_TOKS = 256  # of tasks that do not say, as lm-eval's own models have it
GENERATION = ("do_sample", "max_gen_toks", "temperature", "top_k", "top_p", "until")

logger = logging.getLogger("lm_eval.rmse")


@register_model("rmse")
class LoopedLM(TemplateLM):
    """One text at a time; `mean_loops` says what each task took.

    A text is read as `rmse-eval` reads it: one stream through the model's window, in pieces where it is longer than the model
    takes. Its first token is scored where the model has a token to begin with: `prefix_token_id`, else the one that the
    tokenizer puts before a text, the model's `bos_token_id`, or its end token.
    """

    def __init__(
        self,
        package: str = "",
        runtime: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        expert_ram: str | None = None,
        memory: bool = True,
        prefix_token_id: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **dials: float | int,
    ) -> None:
        """
        Args:
            package: a package, as a folder or an archive, a checkpoint folder, or the name of a shipped model.
            runtime, threads, expert_ram: see `open_runtime`.
            device: "cuda" is a wish, since lm-eval gives it where nothing was said: a checkpoint goes there if it can.
            memory: False leaves the neural memory blank.
            max_gen_toks: tokens to generate at most, of tasks that do not say.
            seed: of tasks that sample, and of the noise that some models begin from.
            batch_size: 1; lm-eval gives it, and `max_batch_size`.
            dials: settings of the quality dial, such as exit_threshold; the model's own otherwise.
        Raises:
            UserError: there is no such model, it reads no texts, or a setting does not fit it.
        """
        super().__init__()
        if not package:
            raise ArgumentError("package", "is missing; give a package or a checkpoint folder")
        if str(batch_size) not in ("None", "1", "auto"):
            raise ArgumentError("batch_size", f"got {batch_size}, expected 1: a runtime reads one text at a time")
        unknown = sorted(dials.keys() - DIALS.keys())
        if unknown:
            known = "package, runtime, device, threads, expert_ram, memory, prefix_token_id, max_gen_toks, seed"
            raise ArgumentError(unknown[0], f"is no argument of the model; known: {known}, {', '.join(DIALS)}")
        # lm-eval makes numbers of what looks like some, and leaves the rest as text.
        given: dict[str, tuple[Any, Any]] = {
            "threads": (Annotated[int, Field(ge=1, le=1024)], threads),
            "prefix_token_id": (Annotated[int, Field(ge=0, le=2**31 - 1)], prefix_token_id),
            "max_gen_toks": (Annotated[int, Field(ge=1, le=2**31 - 1)], max_gen_toks),
            "seed": (Annotated[int, Field(ge=0, le=2**64 - 1)], seed),
            **{name: (float, value) for name, value in dials.items()},
        }
        for name, (kind, value) in given.items():
            if value is not None:
                check_value(kind, value, name, UserError)
        if type(memory) is not bool:
            raise ArgumentError("memory", f"got {memory!r}, expected True or False")
        if device is not None and str(device).partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise ArgumentError("device", f"got {device!r}, expected cpu or cuda")
        self.folder = unpacked(or_shipped(str(package)))
        found = open_runtime(self.folder, runtime, self._place(device), threads, expert_ram)
        assert isinstance(found, LoopRuntime)
        self.runtime, self.info = found, found.info
        for name, value in dials.items():
            if name not in self.info.rules and DIALS[name].off not in (None, value):
                raise ArgumentError(name, f"{self.info.name} has no such rule; it has {', '.join(self.info.rules)}")
        self.dials = self.info.dials_with(**dials)
        if not memory and not self.runtime.memory:
            raise ArgumentError("memory", f"{self.info.name} has none; leave it out")
        self.runtime.remember, self.runtime.noise_seed = memory, seed
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.text = Tokenizer(self.folder / "tokenizer.json").fitting(self.info.vocab_size)
        if prefix_token_id is not None and prefix_token_id >= self.info.vocab_size:
            raise ArgumentError(
                "prefix_token_id", f"got {prefix_token_id}, the model has {self.info.vocab_size} tokens"
            )
        self._prefix = prefix_token_id
        # Of every task, loops and count of the positions whose predictions were scored or drawn from.
        self._loops: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2, np.int64))

    def _place(self, device: str | None) -> str:
        import torch

        on_gpu = str(device).startswith("cuda") and torch.cuda.is_available() and not (self.folder / MANIFEST).is_file()
        logger.info("%s runs on the %s", self.folder, "GPU" if on_gpu else "CPU")
        return "cuda" if on_gpu else "cpu"

    # ------------------------------------------------------------------------------------------ what lm-eval asks

    @property
    def eot_token_id(self) -> int | None:
        return next(iter(self.info.language.eos_token_ids), None)

    @property
    def prefix_token_id(self) -> int | None:
        """What a text begins with where nothing stands before it; None: the model has no such token."""
        if self._prefix is not None:
            return self._prefix
        bos = next(iter(self.text.encode("")), self.info.config.get("bos_token_id"))
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int | None:
        """Tokens that are read at most; None: any number."""
        return self.info.longest

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder)

    def get_model_info(self) -> dict[str, Any]:
        """What goes into `config` of the results."""
        for task, found in self.mean_loops.items():
            logger.info("%s: %.2f of %d loops (%d positions)", task, *found.values())
        return {
            "model_num_parameters": self.info.parameters,
            "model_dtype": self.info.quant,
            "model_sha": self.info.fingerprint,
            "runtime": self.info.target,
            "dials": vars(self.dials),
            "mean_loops": self.mean_loops,
        }

    @property
    def mean_loops(self) -> dict[str, dict[str, float]]:
        """Of every task that was run: mean loops of the positions whose predictions were scored or drawn from, the loops that
        there are, and how many positions those were.
        """
        return {
            task: {"mean_loops": float(loops / count), "max_loops": self.info.trained_loops, "positions": int(count)}
            for task, (loops, count) in self._loops.items()
            if count
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text.encode(string, special=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return template_source(self.folder) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = ChatTemplate.open(self.folder).render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()  # the answer's first words, to go on from
        return text[: text.rindex(begun) + len(begun)]

    # ------------------------------------------------------------------------------------------ requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p of the continuation, nats, and whether greedy decoding gives it.

        A context that several requests have, such as the question of a multiple choice, is read once.
        """
        shared: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        for i, request in enumerate(requests):
            before, after = self._pair(*request.args)
            shared[tuple(before)].append((i, after))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for context, rows in shared.items():
                names = [str(requests[i].task_name) for i, _ in rows]
                for (i, _), answer in zip(rows, self._scored(list(context), [after for _, after in rows], names)):
                    answers[i] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, answer)
                    bar.update()
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return [self._scored(context, [after], ["None"])[0] for _, context, after in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each text, nats: of every token but the first, which only stands where there is one to begin with."""
        answers = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            first, *rest = self._begun(self.text.encode(request.args[0]))
            pieces = [([first], rest)]
            if self.max_length is not None:
                windows = get_rolling_token_windows(rest, first, self.max_length, context_len=1)
                pieces = [make_disjoint_window(window) for window in windows]
            name = str(request.task_name)
            answers.append(sum(self._scored(a, [b], [name], rolling=True)[0][0] for a, b in pieces))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a stop text, the model's end token, or `max_gen_toks`."""
        answers = []
        for i, request in enumerate(tqdm(requests, desc="generate_until", disable=disable_tqdm)):
            context, given = request.args
            how = normalize_gen_kwargs(given, self.max_gen_toks)
            if idle := sorted(how.keys() - set(GENERATION)):
                warning_once(logger, f"generation settings that are not known here do nothing: {', '.join(idle)}")
            top_k, top_p = int(how.get("top_k") or 0), float(how.get("top_p") or 1.0)
            sampling = Sampling(float(how.get("temperature", 0.0)), top_k, top_p, self.seed + i)
            prompt = self.text.encode(context) or self._begun([])
            prompt = self._last(prompt, self.max_length and max(1, self.max_length - how["max_gen_toks"] + 1))
            self.runtime.reset()
            generation = Generation(
                self.runtime, self.text, prompt, self.dials, Sampler(sampling), how["max_gen_toks"],
                self.info.language.eos_token_ids, [stop for stop in how["until"] if stop],
                prefix=len(prompt) if self.info.language.prefix else 0,
            )  # fmt: skip
            for _ in (*generation.spans(), *generation.rest()):
                pass
            self._note(str(request.task_name), np.array(generation.depth))
            answers.append(generation.text)
            if not how["do_sample"]:
                self.cache_hook.add_partial("generate_until", request.args, generation.text)
        return answers

    # ------------------------------------------------------------------------------------------ reading

    def _begun(self, ids: list[int]) -> list[int]:
        """A text's tokens behind the one that it begins with."""
        first = self.prefix_token_id
        if first is None or ids[:1] == [first]:
            if not ids:
                raise UserError(f"{self.info.name}: has no token that an empty text begins with; give prefix_token_id")
            return ids
        return [first, *ids]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens to read, and to score behind them."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            first, *after = self._begun(self.text.encode(continuation, special=False))
            before = [first]
            if not after:  # it would be sure, whatever it is
                raise UserError(
                    f"{self.info.name}: has no token to score {continuation!r} behind; give prefix_token_id"
                )
        limit = self.max_length
        if limit is not None and len(after) > limit:
            raise UserError(f"a continuation of {len(after)} tokens; {self.info.name} reads {limit} at most")
        return self._last(before, limit and limit + 1 - len(after)), after

    def _last(self, ids: list[int], count: int | None) -> list[int]:
        if count is None or len(ids) <= count:
            return ids
        warning_once(logger, f"a context is longer than {self.info.name} reads: its first tokens are left out")
        return ids[-count:]

    def _scored(
        self, context: list[int], continuations: Sequence[list[int]], tasks: Sequence[str], rolling: bool = False
    ) -> list[tuple[float, bool]]:
        """log p of each continuation of one context, nats, and whether all its tokens are the likeliest.

        Args:
            rolling: the context is no prompt, and so no prefix either.
        """
        runtime, whole = self.runtime, 0 if rolling or not self.info.language.prefix else len(context)
        runtime.reset()
        fed = None
        for first, last in [(0, whole)] if whole else _aligned(0, len(context)):
            fed = runtime.feed(context[first:last], self.dials, logits="last", prefix=whole if first == 0 else 0)
        assert fed is not None
        again = sum(len(tokens) > 1 for tokens in continuations) > 1
        kept = {name: array.copy() for name, array in runtime.tensors().items()} if again else None
        answers = []
        for tokens, task in zip(continuations, tasks):
            if not tokens:
                answers.append((0.0, True))
                continue
            if kept is not None and runtime.position != len(context):
                runtime.restore(len(context), kept)
            scored = [_losses(fed.logits, tokens[:1])]
            depths = [fed.depth[-1:]]
            for first, last in _aligned(len(context), len(tokens) - 1):
                more = runtime.feed(tokens[first:last], self.dials)
                scored.append(_losses(more.logits, tokens[first + 1 : last + 1]))
                depths.append(more.depth)
            self._note(task, np.concatenate(depths))
            answers.append((-sum(loss for loss, _ in scored), all(greedy for _, greedy in scored)))
        return answers

    def _note(self, task: str, depth: np.ndarray) -> None:
        self._loops[task] += (int(depth.sum()), len(depth))


def _aligned(position: int, count: int) -> Iterator[tuple[int, int]]:
    """Ranges of the next `count` tokens behind `position`, each one call where possible.

    >>> list(_aligned(3, 100))
    [(0, 61), (61, 100)]
    """
    first = 0
    while first < count:
        last = min(count, first + SEGMENT - (position + first) % SEGMENT)
        yield first, last
        first = last


def _losses(logits: np.ndarray, targets: list[int]) -> tuple[float, bool]:
    """(n, V), n targets -> their loss in all, nats, and whether each is the likeliest token."""
    expected = np.array(targets)
    return float(cross_entropy(logits, expected).sum()), bool((logits.argmax(-1) == expected).all())
