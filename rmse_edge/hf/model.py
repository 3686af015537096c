"""RMS-E as a Hugging Face model: `from_pretrained`, `save_pretrained`, `generate`.

`RMSEForCausalLM` holds the model of rmse_edge/arch/rmse/model.py and drives it through the `LoopModel` methods that every runtime
uses, so it stops early for real, position by position. Its files are those of `rmse_edge.checkpoint`.

Rows of a batch need not agree on anything: each row has its own position, its own padding (anywhere, left for
generation) and stops at its own depth.
"""

from __future__ import annotations

import inspect
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.utils.hub import cached_file

from rmse_edge.arch.registry import arch_of_model
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import QUANTIZATION_FILE, require_tied, stored_keys
from rmse_edge.errors import CheckpointError, UserError, first_line
from rmse_edge.layers.attention import Attention
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.layers.memory.atlas import Atlas
from rmse_edge.layers.rope import rotary_angles
from rmse_edge.loop.contract import Tensors
from rmse_edge.loop.dials import DIALS
from rmse_edge.loop.drive import run_loop
from rmse_edge.numbers import SEGMENT
from rmse_edge.shards import StoredTensors, check_finite, is_sharded
from rmse_edge.text import Tokenizer
from rmse_edge.vocabulary import TOKENIZER_FILE, unused

from .cache import RMSECache
from .config import RMSEPretrainedConfig
from .inputs import checked_tokens, refuse_arguments, resolve_dials, valid_columns

__all__ = ["RMSECache", "RMSECausalLMOutput", "RMSEForCausalLM", "RMSEPretrainedConfig"]

PREFIX = "rmse"  # where the wrapper holds the model; on disk the names have no prefix
STATIC_PREFIX = "abcdef"  # of StopStringCriteria.clean_tokenizer_vocab
SEARCHES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass
class RMSECausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and how long each position thought.

    Attributes:
        depth: (B, T) int64, iterations each position executed, 1-based; 0 for padding.
    """

    depth: Tensor | None = None


class RMSEGenerationConfig(GenerationConfig):
    """A `GenerationConfig` that takes no sampling settings from the model's configuration.

    transformers looks there for them, where `top_k` is the number of experts of a position.
    """

    @classmethod
    def from_model_config(cls, model_config: RMSEPretrainedConfig) -> RMSEGenerationConfig:
        return cls(**{name: getattr(model_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})


class RMSEForCausalLM(PreTrainedModel, GenerationMixin):
    """RMS-E with the interface of a Hugging Face causal language model. It computes in float32.

    Positions stop by the configuration's own thresholds. `max_loops`, `min_loops`, `exit_threshold`, `exit_epsilon`
    and `exit_entropy` override them: as arguments of `forward` and `generate`, or as attributes of a
    `GenerationConfig`. `generate` does greedy search and sampling; other searches raise a `UserError`.
    """

    config_class = RMSEPretrainedConfig
    generation_config_class = RMSEGenerationConfig
    base_model_prefix = PREFIX
    _tied_weights_keys: ClassVar[dict[str, str]] = {f"{PREFIX}.head_proj.weight": f"{PREFIX}.embed.weight"}
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _supports_sdpa = True
    _is_stateful = True  # the ring cannot be rolled back
    generation_config: GenerationConfig
    # What the tokenizer beside the checkpoint has tokens for; `generate` chooses no other id. None: there is no tokenizer.
    token_ids: frozenset[int] | None = None

    def __init__(self, config: RMSEPretrainedConfig) -> None:
        super().__init__(config)
        self._require_float32(torch.get_default_dtype())
        # The tables of temporal_rope come from NumPy, which does not mix with tensors of the meta device.
        on_meta = torch.get_default_device().type == "meta"
        with torch.device("cpu") if on_meta and config.step_encoding == "temporal_rope" else nullcontext():
            self.rmse = RMSE(config.to_rmse())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Fill the buffers that no checkpoint holds. Parameters were initialised by `RMSE` or are read from the file."""
        if isinstance(module, SparseExperts):
            module.get_buffer("load").zero_()
        if isinstance(module, (Attention, Atlas)):
            with torch.device("cpu"):
                tables = module.tables()
            for name, table in tables.items():
                module.get_buffer(name).copy_(table)

    @staticmethod
    def _require_float32(dtype: torch.dtype) -> None:
        if dtype != torch.float32:
            raise UserError(
                f"RMS-E computes in float32, got {dtype}; leave out dtype (weights stored in bfloat16 are widened on "
                "loading), or give dtype=torch.float32"
            )

    # -------------------------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`, but a checkpoint that does not fit is an error, not a warning.

        Raises:
            CheckpointError: a tensor is missing, is not the model's, has another shape, or holds NaN or Inf; a tied head
                has values of its own; shards do not fit their index.
        """
        folder = Path(pretrained_model_name_or_path or "")
        if pretrained_model_name_or_path is not None and (folder / QUANTIZATION_FILE).is_file():
            raise CheckpointError(f"{folder}: a quantised checkpoint; give the float one it was made from")
        shards = folder / (kwargs.get("subfolder") or "")
        if pretrained_model_name_or_path is not None and kwargs.get("variant") is None and is_sharded(shards):
            StoredTensors(shards)  # which checks the index
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        where = str(pretrained_model_name_or_path or "state_dict")
        for kind, meaning in (
            ("missing_keys", "is missing"),
            ("unexpected_keys", "is not part of the model"),
            ("mismatched_keys", "has another shape than config.json asks for"),
        ):
            if found := sorted(key if isinstance(key, str) else key[0] for key in info[kind]):
                raise CheckpointError(f"{where}: tensor {found[0].removeprefix(PREFIX + '.')} {meaning}")
        # transformers unties a head with values of its own, with a warning
        for head, source in arch_of_model(model.rmse).tied(model.rmse.config).items():
            require_tied(where, head, source, model.rmse.get_parameter(head) is model.rmse.get_parameter(source))
        for key, tensor in model.rmse.state_dict().items():
            if tensor.device.type != "meta":  # offloaded by a device_map
                check_finite(where, key, tensor)
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, with the tensor names of `save_checkpoint`; float32 on disk."""
        state = self.state_dict() if state_dict is None else state_dict
        state = {key.removeprefix(PREFIX + "."): tensor for key, tensor in state.items()}
        state = {key: state[key] for key in stored_keys(self.rmse.config, list(state))}
        super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.rmse.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.rmse.head_proj

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError(
            "resize_token_embeddings: the vocabulary is part of the trained model; train with the larger one"
        )

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RMSECache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        max_loops: int | None = None,
        min_loops: int | None = None,
        exit_threshold: float | None = None,
        exit_epsilon: float | None = None,
        exit_entropy: float | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> RMSECausalLMOutput | tuple[Tensor, ...]:
        """Logits of a batch, continuing `past_key_values` if given.

        Args:
            input_ids: (B, T) int64. What stands in padded columns does not matter.
            attention_mask: (B, T) or, with a cache, (B, columns so far + T): 0 for padding, wherever it is.
            labels: (B, T) int64, -100 where ignored. The loss is the mean cross-entropy of the returned logits, of
                positions that stopped where the dials made them stop.
            use_cache: return the cache; by default yes, unless training.
            logits_to_keep: the last so many columns, all with 0, or the columns of a 1-d tensor.
            max_loops, min_loops, exit_threshold, exit_epsilon, exit_entropy: see the class.
            num_items_in_batch: the loss's divisor under gradient accumulation, as `Trainer` gives it.
        Returns:
            logits (B, kept, V), zeros for padding; depth (B, T); loss; past_key_values.
        Raises:
            UserError: an argument this model does not have, or one that does not fit, before anything is computed.
        """
        refuse_arguments(unsupported)
        self._require_float32(self.rmse.embed.weight.dtype)
        if input_ids is None or input_ids.ndim != 2:
            raise UserError("input_ids: expected token numbers of shape (batch, length)")
        given = (max_loops, min_loops, exit_threshold, exit_epsilon, exit_entropy)
        dials = resolve_dials(self.config.to_rmse(), dict(zip(DIALS, given)), input_ids.device)
        cache = RMSECache() if past_key_values is None else past_key_values
        if not isinstance(cache, RMSECache):
            raise UserError(f"past_key_values: got {type(cache).__name__}, expected an RMSECache")
        all_kept = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not (labels.shape == input_ids.shape and all_kept):
            raise UserError("labels: expected the shape of input_ids, and no logits_to_keep")
        valid = valid_columns(input_ids, attention_mask, cache.columns)
        tokens = checked_tokens(input_ids, valid, self.rmse.config.vocab_size)
        cache.allocate(self.rmse, len(tokens), tokens.device)
        # Mixed precision changes which experts run and when a position stops, and buys nothing at this width.
        with torch.autocast(tokens.device.type, enabled=False):
            h, depth = self._think(tokens, valid.cpu().numpy(), cache, dials)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.rmse.head(h[:, kept])["logits"]
        cache.advance(depth)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        keep = not self.training if use_cache is None else use_cache
        output = RMSECausalLMOutput(loss=loss, logits=logits, past_key_values=cache if keep else None, depth=depth)
        return output if return_dict is not False else output.to_tuple()

    def _think(self, tokens: Tensor, valid: np.ndarray, cache: RMSECache, dials: Tensors) -> tuple[Tensor, Tensor]:
        """Run all valid columns through the loop and commit them.

        Every call takes each row's next tokens up to that row's next multiple of 64 positions. Rows that started
        elsewhere are cut elsewhere; `n_valid` of a call says how many each row has.

        Args:
            tokens, valid: (B, T).
        Returns:
            (h (B, T, d), zeros for padding; depth (B, T), 0 for padding).
        """
        config, device = self.rmse.config, tokens.device
        h = torch.zeros(*tokens.shape, config.d_model, device=device)
        depth = torch.zeros(tokens.shape, dtype=torch.int64, device=device)
        order = np.argsort(~valid, axis=1, kind="stable")  # (B, T): each row's valid columns first, in their order
        total = valid.sum(1)
        done = np.zeros_like(total)
        while (done < total).any():
            count = np.minimum(total - done, SEGMENT - cache.position % SEGMENT)  # (B,)
            row = np.arange(count.max())
            columns = np.take_along_axis(order, np.minimum(done[:, None] + row, tokens.shape[1] - 1), 1)  # (B, C)
            cos, sin = rotary_angles(cache.position[:, None] + row, config.rotary_dims, config.rope_theta)
            host = {"cos": cos, "sin": sin, "position": cache.position, "n_valid": count}
            tensors = {name: torch.from_numpy(array).to(device) for name, array in host.items()}
            tensors["tokens"] = tokens.gather(1, torch.from_numpy(columns).to(device))
            tensors |= cache.rings() | cache.memory
            tensors |= self.rmse.prelude(tensors)
            tensors |= run_loop(self.rmse, self.rmse.spec(len(row)), tensors, dials)
            committed = self.rmse.commit(tensors)
            cache.commit(self.rmse, committed["keys"], committed["values"], tensors["h"], count)
            b, c = (torch.from_numpy(i).to(device) for i in np.nonzero(row < count[:, None]))
            here = (b, torch.from_numpy(columns).to(device)[b, c])
            h = h.index_put(here, tensors["h"][b, c])
            depth = depth.index_put(here, tensors["depth"][b, c])
            done = done + count
        return h, depth

    # ----------------------------------------------------------------------------------------------------- generate

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, for greedy search and sampling.

        Raises:
            UserError: another search or another cache was asked for; nothing was computed.
        """
        bound = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs).arguments
        config, _ = self._prepare_generation_config(bound.get("generation_config"), **bound.get("kwargs", {}))
        mode = config.get_generation_mode(bound.get("assistant_model"))
        if mode not in SEARCHES:
            raise UserError(
                f"generate: {mode.value.replace('_', ' ')} is not supported, because the cache is a ring that cannot be "
                "reordered or rolled back; use greedy search or sampling"
            )
        if config.is_assistant:
            raise UserError("generate: RMS-E cannot assist another model, because its cache cannot be rolled back")
        if config.cache_implementation is not None:
            raise UserError(
                f"cache_implementation: got {config.cache_implementation!r}, but RMS-E has its own bounded RMSECache; "
                "leave it out"
            )
        return super().generate(*args, **kwargs)

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Dials that stand in a GenerationConfig go where those given to `generate` go: to `forward`."""
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        attributes = {name: getattr(config, name, None) for name in DIALS}
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
        if model_kwargs.get("past_key_values") is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RMSECache()

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Without a generation_config.json transformers falls back on config.json: see `RMSEGenerationConfig`.

        Here is also where `from_pretrained` says where the model comes from, and so which tokenizer lies beside it.
        """
        super().adjust_generation_fn(*args, **kwargs)
        if getattr(self.generation_config, "_from_model_config", False):
            self.generation_config = RMSEGenerationConfig.from_model_config(self.config)
        given = inspect.signature(GenerationMixin.adjust_generation_fn).bind(self, *args, **kwargs).arguments
        source = given["pretrained_model_name_or_path"]
        if source is not None:
            options = {
                name: given[name] for name in ("cache_dir", "local_files_only", "token", "revision", "subfolder")
            }
            quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
            tokenizer = cached_file(source, TOKENIZER_FILE, **options, **quiet)
            self.token_ids = None if tokenizer is None else frozenset(Tokenizer(tokenizer).ids())


AutoModelForCausalLM.register(RMSEPretrainedConfig, RMSEForCausalLM, exist_ok=True)
