"""Looped models of texts as Hugging Face models: `from_pretrained`, `save_pretrained`, `generate`.

`LoopedForCausalLM` holds the model of an architecture and drives it through the `LoopModel` methods that every runtime uses,
so it stops early for real, position by position. Its files are those of `rmse_edge.checkpoint`, which reads them: code that
lies beside a checkpoint is never run.

Rows of a batch need not agree on anything: each row has its own position, its own padding (anywhere, left for
generation) and stops at its own depth.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from rmse_edge.arch.common.kept_batch import call_context
from rmse_edge.arch.registry import Arch, arch_of
from rmse_edge.checkpoint import load_weights, stored_keys
from rmse_edge.errors import UserError
from rmse_edge.info import TextInfo
from rmse_edge.loop.contract import LoopSpec, Tensors
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.drive import run_loop

from .generation import LoopedGeneration
from .inputs import (
    checked_tokens,
    given_cache,
    prefix_lengths,
    refuse_arguments,
    resolve_dials,
    resolve_seed,
    valid_columns,
)
from .known import OWN, text_types
from .loading import HUB, checkpoint_folder, device_of, refuse_rest, require_float32
from .looped_cache import LoopedCache
from .looped_config import LoopedPretrainedConfig, class_name, config_class

SUFFIX = "ForCausalLM"


@dataclass
class LoopedCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and how long each position thought.

    Attributes:
        depth: (B, T) int64, iterations each position executed, 1-based; 0 for padding.
    """

    depth: Tensor | None = None


class LoopedForCausalLM(LoopedGeneration, PreTrainedModel):
    """A looped model with the interface of a Hugging Face causal language model. It computes in float32.

    Positions stop by the configuration's own thresholds. The dials (`rmse_edge.loop.dials`), such as `max_loops` and
    `exit_threshold`, override them, where the model has them: as arguments of `forward` and `generate`, or as attributes
    of a `GenerationConfig`. So does `noise_seed`, for models that begin from noise. `generate` does greedy search and
    sampling; other searches raise a `UserError`.
    """

    config_class = LoopedPretrainedConfig
    base_model_prefix = "looped"  # the attribute that holds the model; on disk the names have no prefix
    _supports_sdpa = True
    arch: ClassVar[Arch]

    def __init__(self, config: Any, model: Any = None) -> None:
        """
        Args:
            config: a `LoopedPretrainedConfig`.
            model: the `LoopModel` that it describes; None: one whose weights are drawn.
        """
        super().__init__(config)
        require_float32(self.spoken, torch.get_default_dtype())
        setattr(self, self.base_model_prefix, self._build(config) if model is None else model)
        self.post_init()

    def _build(self, config: Any) -> Any:
        return self.arch.build(config.to_looped())

    @property
    def model(self) -> Any:
        """The `LoopModel`."""
        return getattr(self, self.base_model_prefix)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights were drawn by the architecture, or are read from the file."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        prefix, tied = self.base_model_prefix, self.arch.tied(self.config.to_looped())
        return {f"{prefix}.{name}": f"{prefix}.{source}" for name, source in tied.items()}

    # -------------------------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """The model of a checkpoint: a folder, or an id of the hub. Arguments as of `PreTrainedModel.from_pretrained`, as far
        as they fit; those that name a field of the configuration replace it.

        Raises:
            CheckpointError: a file is missing or damaged; a tensor is missing, is not the model's, has another shape, or
                holds NaN or Inf; a tied head has values of its own.
            UserError: an argument asks for what is not done here.
        """
        source = pretrained_model_name_or_path
        if source is None or args:
            raise UserError("from_pretrained: expected a folder or an id of the hub, and named arguments besides")
        hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
        origin = {name: kwargs.pop(name, None) for name in ("_from_auto", "_from_pipeline")}
        wants_info, generation = kwargs.pop("output_loading_info", False), kwargs.pop("generation_config", None)
        dtypes, device = (
            [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")],
            device_of(kwargs.pop("device_map", None)),
        )
        if not isinstance(config, LoopedPretrainedConfig):
            where = source if config is None else config
            config, kwargs = cls.config_class.from_pretrained(where, return_unused_kwargs=True, **hub, **kwargs)
        for dtype in dtypes:
            require_float32(config.model_type, dtype)
        refuse_rest(config.model_type, kwargs)
        config.name_or_path = str(source)
        model = cls(config, load_weights(checkpoint_folder(source, hub), config.to_looped()))
        defaults = {"force_download": False, "local_files_only": False, "revision": "main", "subfolder": ""}
        given = dict.fromkeys(HUB) | defaults | hub
        model.adjust_generation_fn(
            generation,
            bool(origin["_from_auto"]),
            origin["_from_pipeline"],
            source,
            **given,
            trust_remote_code=False,
        )
        model = model.eval() if device is None else model.eval().to(device)
        # What transformers could not load; here that is an error.
        info: dict[str, Any] = {kind: set() for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return (model, info | {"error_msgs": []}) if wants_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, with the files and tensor names of `save_checkpoint`; float32 on disk."""
        state = self.state_dict() if state_dict is None else state_dict
        state = {key.removeprefix(self.base_model_prefix + "."): tensor for key, tensor in state.items()}
        state = {key: state[key] for key in stored_keys(self.model.config, list(state))}
        super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The table with a row for every token."""
        size = self.config.vocab_size
        tables = [m for m in self.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == size]
        return tables[0] if tables else super().get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The product that gives a logit for every token."""
        size = self.config.vocab_size
        heads = [m for m in self.modules() if isinstance(m, nn.Linear) and m.out_features == size]
        return heads[-1] if heads else None

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError(
            "resize_token_embeddings: the vocabulary is part of the trained model; train with the larger one"
        )

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: LoopedCache | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        max_loops: int | None = None,
        min_loops: int | None = None,
        exit_threshold: float | None = None,
        exit_epsilon: float | None = None,
        exit_entropy: float | None = None,
        exit_cosine: float | None = None,
        exit_kl: float | None = None,
        exit_entropy_change: float | None = None,
        exit_steady: int | None = None,
        exit_gap: float | None = None,
        route: float | None = None,
        noise_seed: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        past_key_values: LoopedCache | None = None,
        **unsupported: Any,
    ) -> LoopedCausalLMOutput | tuple[Tensor, ...]:
        """Logits of a batch, continuing `cache` if given.

        Args:
            input_ids: (B, T) int64. What stands in padded columns does not matter.
            attention_mask: (B, T) or, with a cache, (B, columns so far + T): 0 for padding, wherever it is.
            cache: of an earlier call, which is written into. None: the text begins here.
            labels: (B, T) int64, -100 where ignored. The loss is the mean cross-entropy of the returned logits, of
                positions that stopped where the dials made them stop.
            token_type_ids: (B, T), of models whose texts may have a prefix: 1 for its positions, which see each other whatever
                their order. They are the first of a text; a call that continues one ignores it, as transformers does.
            use_cache: return the cache; by default yes, unless training.
            logits_to_keep: the last so many columns, all with 0, or the columns of a 1-d tensor.
            max_loops, min_loops, exit_threshold and all other dials: see the class.
            noise_seed: of what a model begins from where that is noise, 0 to 2**64 - 1; 0 by default. Every row has the
                noise of its positions, as in `rmse_edge.loop.generator`.
            num_items_in_batch: the loss's divisor under gradient accumulation, as `Trainer` gives it.
            past_key_values: an older name of `cache`.
        Returns:
            logits (B, kept, V), zeros for padding; depth (B, T); loss; cache.
        Raises:
            UserError: an argument this model does not have, or one that does not fit, before anything is computed.
        """
        refuse_arguments(self.spoken, unsupported)
        require_float32(self.spoken, self.dtype)
        if input_ids is None or input_ids.ndim != 2:
            raise UserError("input_ids: expected token numbers of shape (batch, length)")
        own, text = self._settings()
        spec = self.model.spec(min(self.model.call_sizes()))
        given = {
            "max_loops": max_loops,
            "min_loops": min_loops,
            "exit_threshold": exit_threshold,
            "exit_epsilon": exit_epsilon,
            "exit_entropy": exit_entropy,
            "exit_cosine": exit_cosine,
            "exit_kl": exit_kl,
            "exit_entropy_change": exit_entropy_change,
            "exit_steady": exit_steady,
            "exit_gap": exit_gap,
            "route": route,
        }
        dials = resolve_dials(spec, own, given, input_ids.device, getattr(self.model.config, "untrained_loops", None))
        seed = resolve_seed(spec, noise_seed)
        cache = given_cache(cache, past_key_values)
        cache = self.cache_class() if cache is None else cache
        if not isinstance(cache, self.cache_class):
            raise UserError(f"cache: got {type(cache).__name__}, expected {self.cache_class.called}")
        all_kept = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not (labels.shape == input_ids.shape and all_kept):
            raise UserError("labels: expected the shape of input_ids, and no logits_to_keep")
        valid = valid_columns(input_ids, attention_mask, cache.columns)
        if not text.prefix:
            refuse_arguments(self.spoken, {"token_type_ids": token_type_ids})
        prefix = prefix_lengths(token_type_ids, valid, cache.columns > 0)
        tokens = checked_tokens(input_ids, valid, text.vocab_size)
        cache.allocate(self.model, spec, len(tokens), tokens.device)
        cache.require_room(spec, valid.sum(1).cpu().numpy())
        # Mixed precision changes when a position stops, and what a model decides besides.
        with torch.autocast(tokens.device.type, enabled=False):
            h, depth = self._think(spec, tokens, valid.cpu().numpy(), cache, dials, text, seed, prefix)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.head(h[:, kept])["logits"]
            if not bool(valid.all()):
                logits = logits.masked_fill(~valid[:, kept, None], 0.0)
        cache.advance(depth)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, text.vocab_size, num_items_in_batch=num_items_in_batch)
        keep = not self.training if use_cache is None else use_cache
        output = LoopedCausalLMOutput(loss=loss, logits=logits, cache=cache if keep else None, depth=depth)
        return output if return_dict is not False else output.to_tuple()

    def _settings(self) -> tuple[Dials, TextInfo]:
        """The dials of the configuration as it is now, whose settings may have been changed; and what the model reads.

        Raises:
            ConfigError: a setting is out of range.
        """
        model, arch, now = self.model, self.arch, self.config.to_looped()
        names = [f.name for f in dataclasses.fields(now) if f.name.startswith(arch.settings or ("\0",))]
        if changed := {n: getattr(now, n) for n in names if getattr(now, n) != getattr(model.config, n)}:
            model.config = dataclasses.replace(model.config, **changed)
        parts = arch.parts(model)
        return parts["dials"], parts["text"]

    def _think(
        self,
        spec: LoopSpec,
        tokens: Tensor,
        valid: np.ndarray,
        cache: LoopedCache,
        dials: Tensors,
        text: TextInfo,
        seed: int,
        prefix: np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        """Run all valid columns through the loop and commit them.

        Every call takes each row's next tokens, no more than the largest call has, or the first as many as the longest prefix,
        and none beyond the row's segment. Rows
        that started elsewhere are cut elsewhere; `n_valid` of a call says how many each row has.

        Args:
            spec: of any call.
            tokens, valid: (B, T).
            prefix: (B,) of each row, 0 where its text has begun before.
        Returns:
            (what head reads (B, T, d), zeros for padding; depth (B, T), 0 for padding).
        """
        model, device = self.model, tokens.device
        depth = torch.zeros(tokens.shape, dtype=torch.int64, device=device)
        final: Tensor | None = None
        order = np.argsort(~valid, axis=1, kind="stable")  # (B, T): each row's valid columns first, in their order
        total = valid.sum(1)
        done = np.zeros_like(total)
        while (done < total).any():
            most = max(model.call_sizes()) if done.any() else max(*model.call_sizes(), *prefix)
            count = np.minimum(total - done, most)  # (B,)
            if spec.segment is not None:
                count = np.minimum(count, spec.segment - cache.position % spec.segment)
            spec = self._spec(int(count.max()))
            row = np.arange(spec.chunk)
            columns = np.take_along_axis(order, np.minimum(done[:, None] + row, tokens.shape[1] - 1), 1)  # (B, C)
            where = torch.from_numpy(columns).to(device)
            tensors = {"tokens": tokens.gather(1, where)} | cache.tensors()
            tensors |= call_context(spec, text, cache.position, count, seed, device, prefix)
            tensors |= model.prelude(tensors)
            tensors |= run_loop(model, spec, tensors, dials)
            for method in ("coda", "commit"):
                if method in spec.methods:
                    tensors |= getattr(model, method)(tensors)
            cache.commit(model, spec, tensors, count)
            b, c = (torch.from_numpy(i).to(device) for i in np.nonzero(row < count[:, None]))
            y = tensors[spec.final.name]
            final = y.new_zeros(*tokens.shape, y.shape[-1]) if final is None else final
            final = final.index_put((b, where[b, c]), y[b, c])
            depth = depth.index_put((b, where[b, c]), tensors["depth"][b, c])
            done = done + count
        if final is None:  # padding alone
            final = torch.zeros(*tokens.shape, spec.final.shape[-1], device=device)
        return final, depth

    def _spec(self, count: int) -> LoopSpec:
        """The spec of a call for `count` positions: of that many rows or, where the model has fixed sizes, of the next."""
        try:
            return self.model.spec(count)
        except UserError:
            return self.model.spec(min(size for size in self.model.call_sizes() if size >= count))


_made: dict[str, type[LoopedForCausalLM]] = {}


def model_class(model_type: str) -> type[LoopedForCausalLM]:
    """The model class of an architecture, the same each time.

    Raises:
        ConfigError: there is no such architecture.
    """
    if model_type in OWN:
        return getattr(import_module(OWN[model_type].model[0], __package__), OWN[model_type].model[1])
    arch = arch_of(model_type)
    if model_type not in _made or _made[model_type].arch is not arch:
        doc = f"`LoopedForCausalLM` of the architecture {model_type}."
        body = {"__module__": __name__, "__doc__": doc, "config_class": config_class(model_type), "arch": arch}
        _made[model_type] = type(class_name(model_type, SUFFIX), (LoopedForCausalLM,), body)
    return _made[model_type]


def register(model_type: str) -> None:
    """Map the configuration class of an architecture to its model class."""
    if model_type in OWN:
        import_module(
            OWN[model_type].model[0], __package__
        )  # registers at its end; it may be why this module is loaded
    else:
        AutoModelForCausalLM.register(config_class(model_type), model_class(model_type), exist_ok=True)


def __getattr__(name: str) -> Any:
    """The classes by their names, which is how pickle finds them in another process (PEP 562)."""
    if name.endswith(SUFFIX):
        for model_type in text_types():
            if class_name(model_type, SUFFIX) == name:
                return model_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for _name in text_types():
    register(_name)
