"""`generate` of a looped model: what of transformers' it does, and what it adds. The same for every architecture."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils.hub import cached_file

from rmse_edge.errors import ArgumentError, UserError, first_line
from rmse_edge.loop.dials import DIALS
from rmse_edge.text import Tokenizer
from rmse_edge.vocabulary import TOKENIZER_FILE, unused

from .inputs import given_cache, refuse_arguments
from .looped_cache import LoopedCache

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel as Model
else:
    Model = object

STATIC_PREFIX = "abcdef"  # of StopStringCriteria.clean_tokenizer_vocab
SEARCHES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
SETTINGS = (*DIALS, "noise_seed")  # of `forward`, which a GenerationConfig may hold


class LoopedGenerationConfig(GenerationConfig):
    """A `GenerationConfig` that takes no sampling settings from the model's configuration.

    transformers looks there for them, where RMS-E's `top_k`, for one, is the number of experts of a position.
    """

    @classmethod
    def from_model_config(cls, model_config: Any) -> LoopedGenerationConfig:
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        return cls(**{name: getattr(model_config, name, None) for name in tokens})


class LoopedGeneration(GenerationMixin, Model):
    """`GenerationMixin` for greedy search and sampling with a cache that cannot be rolled back.

    The dials, and the seed of what a model begins from, may be given to `generate` or be attributes of a `GenerationConfig`.
    """

    generation_config_class = LoopedGenerationConfig
    cache_class: ClassVar[type[LoopedCache]] = LoopedCache
    _is_stateful = True  # what is kept cannot be rolled back
    generation_config: GenerationConfig
    # What the tokenizer beside the checkpoint has tokens for; `generate` chooses no other id. None: there is no tokenizer.
    token_ids: frozenset[int] | None = None

    @property
    def spoken(self) -> str:
        """What messages call the model."""
        return str(self.config.model_type)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, for greedy search and sampling.

        Raises:
            UserError: another search or another cache was asked for, or a cache by two names; nothing was computed.
        """
        refuse_arguments(self.spoken, {"cache_params": kwargs.get("cache_params")})  # transformers makes it `cache`
        if "past_key_values" in kwargs:
            kwargs["cache"] = given_cache(kwargs.get("cache"), kwargs.pop("past_key_values"))
        bound = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs).arguments
        if isinstance(source := bound.get("custom_generate"), str):
            raise UserError(f"custom_generate: got {source!r}, but code of a repository is not run; give a function")
        config, _ = self._prepare_generation_config(bound.get("generation_config"), **bound.get("kwargs", {}))
        if config.use_cache is False and kwargs.get("cache") is not None:
            # Every token would be computed from the whole text, behind the same text in the cache.
            raise ArgumentError("use_cache", "got False and a cache; leave out one of them")
        mode = config.get_generation_mode(bound.get("assistant_model"))
        if mode not in SEARCHES:
            raise UserError(
                f"generate: {mode.value.replace('_', ' ')} is not supported, because the cache of a looped model cannot be "
                "reordered or rolled back; use greedy search or sampling"
            )
        if config.is_assistant:
            raise UserError(
                f"generate: {self.spoken} cannot assist another model, because its cache cannot be rolled back"
            )
        if config.cache_implementation is not None:
            raise UserError(
                f"cache_implementation: got {config.cache_implementation!r}, but {self.spoken} has its own "
                f"{self.cache_class.__name__}; leave it out"
            )
        return super().generate(*args, **kwargs)

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Settings that stand in a GenerationConfig go where those given to `generate` go: to `forward`."""
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        attributes = {name: getattr(config, name, None) for name in SETTINGS}
        return config, {name: value for name, value in attributes.items() if value is not None} | model_kwargs

    def prepare_inputs_for_generation(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        """transformers leaves `generate`'s tokenizer, which stop strings need, among the arguments of `forward`."""
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def _get_stopping_criteria(
        self, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None
    ) -> StoppingCriteriaList:
        if generation_config.stop_strings is not None:
            given = generation_config.stop_strings
            stops = [given] if isinstance(given, str) else given
            if not isinstance(stops, list | tuple) or not stops or not all(isinstance(s, str) and s for s in stops):
                raise UserError(f"stop_strings: got {given!r}, expected the text to stop at, or a list of such texts")
            if tokenizer is None:
                raise UserError("stop_strings: give the model's tokenizer, too: generate(..., tokenizer=tokenizer)")
            try:
                tokenizer(STATIC_PREFIX)
            except Exception as error:  # tokenizers raises bare Exception for a word without an [UNK]
                raise UserError(
                    f"stop_strings: transformers measures tokens behind the text {STATIC_PREFIX!r}, which this tokenizer "
                    f"has no tokens for ({first_line(error)}); give a stopping_criteria of your own"
                ) from None
        return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Ids without a token are never chosen: they go first, so that no other processor sees them."""
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if self.token_ids is not None:
            given = generation_config.eos_token_id  # a number, several, or a tensor; -1 stands for none
            eos = [] if given is None else torch.as_tensor(given).flatten().tolist()
            ranges = unused(self.name_or_path, self.token_ids, self.config.vocab_size, eos)
            if ids := [token for first, end in ranges for token in range(first, end)]:
                processors.insert(0, SuppressTokensLogitsProcessor(ids, device=str(self.device)))
        return processors

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if model_kwargs.get("cache") is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is not False:
            model_kwargs["cache"] = self.cache_class()

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Without a generation_config.json transformers falls back on config.json: see `LoopedGenerationConfig`.

        Here is also where `from_pretrained` says where the model comes from, and so which tokenizer lies beside it.
        """
        given = inspect.signature(GenerationMixin.adjust_generation_fn).bind(self, *args, **kwargs)
        given.arguments["trust_remote_code"] = False  # a `generate` of the repository's is not run, either
        super().adjust_generation_fn(*given.args[1:], **given.kwargs)
        if getattr(self.generation_config, "_from_model_config", False):
            self.generation_config = LoopedGenerationConfig.from_model_config(self.config)
        source = given.arguments["pretrained_model_name_or_path"]
        if source is not None:
            names = ("cache_dir", "local_files_only", "token", "revision", "subfolder")
            options = {name: given.arguments[name] for name in names}
            quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
            tokenizer = cached_file(source, TOKENIZER_FILE, **options, **quiet)
            self.token_ids = None if tokenizer is None else frozenset(Tokenizer(tokenizer).ids())
