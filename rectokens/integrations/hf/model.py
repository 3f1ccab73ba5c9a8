"""A causal language model with item tokens, saved and loaded as one transformers model."""

from __future__ import annotations

import contextlib
import inspect
from os import PathLike, fspath
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import GenerationConfig as HFGenerationConfig

from rectokens.decoding.model_cache import cache_argument
from rectokens.integrations.hf.configuration import ItemAwareCausalLMConfig
from rectokens.integrations.hf.embeddings import ItemInit
from rectokens.integrations.hf.embeddings import resize_and_initialize as _resize_and_initialize
from rectokens.schemas.compact_csr_trie import CompactCSRTrie

_DOWNLOAD_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)


class ItemAwareCausalLM(PreTrainedModel):  # type: ignore[misc]
    """Wraps a causal LM whose vocabulary was extended by item tokens.

    The wrapped model is ``.model``, the very object that was passed in; the wrapper has no
    weights of its own. ``save_pretrained`` writes ``config.json``, the inner model's generation
    configuration if it has one, and safetensors with keys prefixed ``model.``;
    ``AutoModelForCausalLM.from_pretrained`` restores it once this module is imported.

    Args:
        config: levels, codes, and the inner model's configuration.
        hf_model: the inner model. None builds one with fresh weights from
            ``config.base_model_config``.

    Raises:
        ValueError: neither an inner model nor a configuration to build it from.
    """

    config_class = ItemAwareCausalLMConfig
    supports_gradient_checkpointing = True
    # Whether an attention implementation works is for the inner model to say; it checks for itself.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ItemAwareCausalLMConfig, hf_model: nn.Module | None = None) -> None:
        if hf_model is None and not config.base_model_config:
            raise ValueError(
                "there is no inner model: pass hf_model, or a config whose base_model_config is "
                "the inner model's configuration"
            )
        # What the caller asked for; the constructor of the base class fills in a default.
        attention = config._attn_implementation
        super().__init__(config)
        self.model: Any = hf_model if hf_model is not None else _build(config, attention)
        chosen = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        if chosen is not None:
            # The base class assumed its own default, which not every inner model supports.
            config._attn_implementation = chosen
        self.post_init()

    @classmethod
    def from_causal_lm(
        cls,
        model_name_or_path: str | PathLike[str] | nn.Module,
        item_tokenizer: Any,
        *,
        init_item_embeddings: ItemInit = "mean",
        seed: int = 0,
        **kwargs: Any,
    ) -> Self:
        """Extend a causal LM by item tokens and wrap it.

        A model that is an ``ItemAwareCausalLM`` already (a saved folder, or an object) is not
        wrapped again; its rows are resized, and initialised, only if their number differs.

        Args:
            model_name_or_path: name or folder for ``AutoModelForCausalLM.from_pretrained``, or a
                module, which is changed in place; a bare one needs only
                ``get_input_embeddings``, ``get_output_embeddings`` (may give None) and
                ``resize_token_embeddings(n)``.
            item_tokenizer: an ``ItemAwareTokenizer``: ``vocab_size`` rows, L and K.
            init_item_embeddings: ``"mean"``, the scheme of transformers for new rows, or
                ``"codebook"``, rows of the codes from the RQ codebooks of
                ``item_tokenizer.item_tokenizer``, projected to H at the scale of existing rows
                (see :func:`rectokens.integrations.hf.embeddings.codebook_rows`).
            seed: of that projection.
            **kwargs: for ``from_pretrained`` (``torch_dtype`` is passed on as ``dtype``);
                ignored for a module.

        Raises:
            ValueError: bad initialisation option, or a wrapped model of another L or K.
        """
        inner: Any = model_name_or_path
        if isinstance(inner, (str, PathLike)):
            if "torch_dtype" in kwargs:
                kwargs["dtype"] = kwargs.pop("torch_dtype")
            inner = AutoModelForCausalLM.from_pretrained(fspath(inner), **kwargs)
        if isinstance(inner, cls):
            return inner._refit(item_tokenizer, init_item_embeddings, seed)
        _resize_and_initialize(
            inner, item_tokenizer, init_item_embeddings=init_item_embeddings, seed=seed
        )
        config = ItemAwareCausalLMConfig(
            num_levels=item_tokenizer.num_levels,
            codebook_size=item_tokenizer.codebook_size,
            base_model_config=_config_dict(inner),
        )
        return cls(config, hf_model=inner)

    @staticmethod
    def _resize_and_initialize(hf_model: nn.Module, item_tokenizer: Any, **options: Any) -> None:
        """See :func:`rectokens.integrations.hf.embeddings.resize_and_initialize`."""
        _resize_and_initialize(hf_model, item_tokenizer, **options)

    def _refit(self, item_tokenizer: Any, init_item_embeddings: ItemInit, seed: int) -> Self:
        """Check an already wrapped model against the tokenizer; resize it if need be."""
        for name in ("num_levels", "codebook_size"):
            mine, theirs = getattr(self.config, name), getattr(item_tokenizer, name)
            if mine != theirs:
                raise ValueError(f"the model has {name} {mine}; the item tokenizer has {theirs}")
        if self.get_input_embeddings().weight.shape[0] != item_tokenizer.vocab_size:
            _resize_and_initialize(
                self.model, item_tokenizer, init_item_embeddings=init_item_embeddings, seed=seed
            )
            self._refresh_config()
        return self

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load as transformers does, and give the inner model its generation configuration."""
        options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if name in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if getattr(model.model, "generation_config", None) is not None:
            # Where none was saved, the one made from the configuration stays.
            with contextlib.suppress(OSError):
                model.model.generation_config = HFGenerationConfig.from_pretrained(
                    pretrained_model_name_or_path, **options
                )
        return loaded

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save as transformers does, with the inner model's configurations as they are now."""
        self._refresh_config()
        super().save_pretrained(save_directory, **kwargs)
        generation_config = getattr(self.model, "generation_config", None)
        if generation_config is not None and kwargs.get("is_main_process", True):
            generation_config.save_pretrained(save_directory)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The inner model's forward; arguments that are None are not passed on.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 at real tokens.
            position_ids: (B, T).
            past_key_values: a cache.
            inputs_embeds: (B, T, H), instead of ``input_ids``.
            labels: (B, T), unshifted, -100 where there is no loss; given, the output has a loss.
            use_cache: whether to return a cache.
            **kwargs: anything else that the inner model takes.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **cache_argument(self.model, past_key_values),
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
        }
        return self.model(**{k: v for k, v in named.items() if v is not None}, **kwargs)

    def generate(
        self,
        input_ids: Tensor | None = None,
        trie: CompactCSRTrie | None = None,
        generation_config: Any = None,
        attr_path: str | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate freely, or items of a trie only.

        Args:
            input_ids: prompts (B, T), left-padded.
            trie: over token ids of the extended vocabulary; None generates freely.
            generation_config: with a trie rectokens' ``GenerationConfig``, without one that of
                transformers or None.
            attr_path: with a trie, dotted path of the output layer to compute for children only.
            attention_mask: (B, T).
            **kwargs: with a trie for ``autoregressive_generate``, else for the inner ``generate``.

        Returns:
            With a trie long (B, k, L), token ids, best first; else what the inner ``generate``
            returns.

        Raises:
            ValueError: a trie without a generation configuration or without prompts, or
                ``attr_path`` without a trie.
        """
        if trie is not None:
            if generation_config is None:
                raise ValueError("trie was given without generation_config; expected both")
            if input_ids is None:
                raise ValueError("trie was given without input_ids; expected prompts (B, T)")
            from rectokens.decoding.constrained_decoding import autoregressive_generate

            return autoregressive_generate(
                self.model,
                trie,
                input_ids,
                generation_config,
                attr_path=attr_path,
                attention_mask=attention_mask,
                **kwargs,
            )
        if attr_path is not None:
            raise ValueError(f"attr_path is {attr_path!r}, but there is no trie to constrain by")
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        return self.model.generate(input_ids, **kwargs)

    # Embeddings: all the inner model's ----------------------------------------------------

    def get_input_embeddings(self) -> Any:
        """The inner model's token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the inner model's token embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The inner model's head, or None."""
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the inner model's head."""
        self.model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Resize the inner model's embeddings and head, and note it in the configuration."""
        embeddings = self.model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self._refresh_config()
        return embeddings

    def init_weights(self) -> None:
        """Tie what is tied. The inner model set its weights itself; they may be trained."""
        self.tie_weights(recompute_mapping=False)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the inner forward takes the Trainer's loss arguments (``num_items_in_batch``)."""
        parameters = inspect.signature(self.model.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def _refresh_config(self) -> None:
        config = _config_dict(self.model)
        if config is not None:
            self.config.base_model_config = config


def _config_dict(model: Any) -> dict[str, Any] | None:
    """A model's configuration as a dict; None where it has none."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    as_dict: dict[str, Any] = config.to_dict()
    return as_dict


def _build(config: ItemAwareCausalLMConfig, attention: str | None) -> Any:
    """The inner model with fresh weights, in torch's default dtype.

    That dtype is the one asked for: ``from_pretrained`` sets it around the constructor. The one
    in the inner configuration is what the model was saved in.
    """
    inner_config = AutoConfig.for_model(**(config.base_model_config or {}))
    options = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(
        inner_config, dtype=torch.get_default_dtype(), **options
    )


AutoConfig.register(ItemAwareCausalLMConfig.model_type, ItemAwareCausalLMConfig, exist_ok=True)
AutoModelForCausalLM.register(ItemAwareCausalLMConfig, ItemAwareCausalLM, exist_ok=True)
