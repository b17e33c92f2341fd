"""What the families share: embed, run the layers, normalise; then project chosen positions onto the vocabulary."""

import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from memdlm.errors import ConfigError, DataError
from memdlm.models.blocks.chunked_loss import sum_in_chunks, values_in_chunks
from memdlm.models.blocks.key_values import at
from memdlm.models.blocks.layers import RMSNorm, Rotary, SelfInitialising
from memdlm.models.blocks.masks import (
    AttentionPattern,
    BlockDiffusion,
    Full,
    Segmented,
    attention_scores_mask,
    segments_for,
    visible_tokens,
)
from memdlm.models.blocks.names import NameTable, to_published
from memdlm.models.lora.adapters import adapter_config
from memdlm.models.lora.files import save_outer_adapter
from memdlm.models.networks.checking import check_ids, check_positions, check_together, is_index, kind_of
from memdlm.models.networks.requests import Prediction, Request
from memdlm.models.quantisation.four_bit import is_four_bit


class DiffusionPreTrainedModel(PreTrainedModel):
    """Base of every family: what transformers needs to know."""

    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SelfInitialising):
            module.initialise(self.config)


class Backbone(DiffusionPreTrainedModel):
    """ids [B, L] -> hidden states [B, L, D]. A family defines one layer, and may change the embeddings."""

    def build(
        self,
        layer: Callable[[Any, int], nn.Module],
        *,
        norm_bias: bool = False,
        rotated: float | None = None,
        vocab_size: int | None = None,
        padding_index: int | None = None,
        sliding_window: int | None = None,
        after_embedding: Callable[[int], nn.Module] | None = None,
        norm: nn.Module | None = None,
        mixes_positions: bool = False,
    ) -> None:
        """Create the modules; called once by the family's `__init__`.

        `layer` makes the block with a given index. The first `rotated` dimensions of a head are rotated with the
        position (None: all). The embedding of `padding_index` gets no gradient. `norm` replaces the RMS norm behind the
        layers. `mixes_positions` says that attention is not the only place where positions meet.
        """
        config: Any = self.config
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size if vocab_size is None else vocab_size, width, padding_index)
        self.after_embedding = None if after_embedding is None else after_embedding(width)
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(width, config.rms_norm_eps, bias=norm_bias) if norm is None else norm
        self.rotary = Rotary(width=int(config.head_dim if rotated is None else rotated), theta=float(config.rope_theta))
        self.sliding_window = sliding_window
        self.is_cacheable = sliding_window is None and not mixes_positions
        """Whether the keys and values of a finished block stay valid under a block-causal pattern."""
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_pattern: AttentionPattern | None = None,
        output_hidden_states: bool = False,
        request: Request | None = None,
    ) -> BaseModelOutput:
        """Run the layers, or those that `request` names.

        `attention_mask` and `attention_pattern` (default `Full()`) follow the contract of `memdlm.models.blocks.masks`;
        `position_ids` [B or 1, L] defaults to 0..L-1, under `BlockDiffusion` in both halves. With
        `output_hidden_states`, entry 0 is the embeddings, entry i the output of layer i-1, and the last entry the
        final, normalised state.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("pass exactly one of input_ids and inputs_embeds.")
        self._check_inputs(input_ids, inputs_embeds, attention_mask, position_ids)
        request = Request() if request is None else request
        start, stop, cached, queries = request.start_layer, request.stop_layer, request.cached, request.queries
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        is_visible = visible_tokens(attention_mask)
        mask = self._mask(attention_mask, hidden, attention_pattern) if cached is None else cached.is_visible
        if position_ids is None:
            pattern = Full() if attention_pattern is None else attention_pattern
            places = pattern.places(hidden.shape[1], hidden.device)
            position_ids = places if cached is None else cached.columns
        angles = self.rotary.angles(position_ids, hidden)
        if self.after_embedding is not None and start is None:
            hidden = self.after_embedding(hidden, is_visible)
        states, condition = [hidden], self.condition(hidden)
        if queries is not None and start == len(self.layers):
            hidden = at(hidden, queries)
        for layer in self.layers[start:stop]:
            narrowed = queries if layer is self.layers[-1] else None
            hidden = layer(hidden, self.rotary, angles, mask, is_visible, cached, narrowed, *condition)
            if output_hidden_states:
                states.append(hidden)
        if stop is None:
            hidden = self.norm(hidden, *condition)
        states[-1] = hidden
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=tuple(states) if output_hidden_states else None)

    def condition(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return what the layers and the last norm are given beside the text `hidden`; by default nothing."""
        return ()

    def check_pattern(self, pattern: AttentionPattern) -> None:
        """Raise ConfigError for a pattern that this network cannot keep."""
        if isinstance(pattern, BlockDiffusion) and not self.is_cacheable:
            raise ConfigError(
                "block diffusion (block_size) needs a network in which positions meet in attention alone and see any "
                "distance; this one has token mixing or a sliding window."
            )

    def _check_inputs(self, ids: Any, embeds: Any, mask: Any, places: Any) -> None:
        if torch.compiler.is_compiling():
            return  # reading values would break the graph, and the uncompiled call before was checked
        width = self.config.hidden_size
        if embeds is None:
            ids = ids.long() if isinstance(ids, Tensor) and ids.dtype == torch.int32 else ids
            check_ids(ids, "input_ids", dim=2, vocabulary=self.embed_tokens.num_embeddings)
        elif not isinstance(embeds, Tensor) or embeds.dim() != 3 or embeds.shape[-1] != width:
            raise DataError(f"inputs_embeds must be a tensor of shape [B, L, {width}], got {kind_of(embeds)}.")
        text = ids if embeds is None else embeds
        shape = text.shape[:2]
        if shape[1] == 0:
            raise DataError("the text has no tokens; give at least one.")
        if mask is not None and not isinstance(mask, Tensor):
            raise ConfigError(f"attention_mask must be a tensor, or None, got {kind_of(mask)}.")
        if places is not None and not (
            isinstance(places, Tensor) and is_index(places) and places.shape in (shape, (1, shape[1]))
        ):
            raise DataError(
                f"position_ids must be int64 of shape {[*shape]} or {[1, shape[1]]}, got {kind_of(places)}."
            )
        for name, tensor in (("attention_mask", mask), ("position_ids", places)):
            if tensor is not None:
                check_together(tensor, name, text)

    def _mask(
        self, attention_mask: Tensor | None, hidden: Tensor, pattern: AttentionPattern | None
    ) -> Tensor | Segmented | None:
        """Return what the layers' attention takes, for a pass that stands alone."""
        pattern, is_eager = Full() if pattern is None else pattern, self.config._attn_implementation == "eager"
        self.check_pattern(pattern)
        if self.sliding_window is None and not is_eager:
            segments = segments_for(attention_mask, hidden, pattern)
            if segments is not None:
                return segments
        return attention_scores_mask(
            attention_mask, hidden, pattern=pattern, sliding_window=self.sliding_window, additive=is_eager
        )


class MaskedDiffusionLM(DiffusionPreTrainedModel):
    """Backbone plus vocabulary projection. `right_shift_logits` says which output predicts which token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    backbone_class: type[Backbone]
    published_names: NameTable = ()
    """Names that published checkpoints and adapters have for our modules, where they differ."""
    right_shift_logits: ClassVar[bool | None] = None
    """Whether the output at position i - 1 predicts token i; None: it does not, but training may teach it that."""

    def __init__(self, config: Any, *, head_bias: bool = False) -> None:
        super().__init__(config)
        self.model = self.backbone_class(config)
        # The table may have more rows than the vocabulary (LLaDA); the projection has as many, as published.
        rows = self.model.embed_tokens.num_embeddings
        self.lm_head = nn.Linear(config.hidden_size, rows, bias=head_bias)
        self.post_init()

    @classmethod
    def published_module_name(cls, path: str) -> str:
        """Return the name that module `path` of this class has in published checkpoints and adapters.

        The projections of a single expert may be asked for too, as `...mlp.experts.3.up_proj`.
        """
        return to_published(path, cls.published_names)

    def predict(self, hidden: Tensor) -> Tensor:
        """Project normalised states [..., D] onto the vocabulary: [..., V]."""
        return self.lm_head(hidden)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the model in the published layout; with an outer adapter, only that, as an ordinary PEFT folder.

        Raises ConfigError for a 4-bit model without an adapter: its packed weights are not a checkpoint.
        """
        if adapter_config(self) is not None:
            if kwargs.get("is_main_process", True):
                save_outer_adapter(self, save_directory, state_dict=kwargs.get("state_dict"))
        elif is_four_bit(self):
            raise ConfigError(
                "a 4-bit model is not saved: keep the checkpoint that it was loaded from, and save the adapter that "
                "is trained on top (add_outer_lora)."
            )
        else:
            super().save_pretrained(save_directory, **kwargs)

    def prepare_new(self) -> None:
        """Do what only a newly created model needs, after its random initialisation; by default nothing."""

    def check_loaded(self, name: str) -> None:
        """Raise CheckpointError for values in the files of `name` that the network cannot have; by default none."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_pattern: AttentionPattern | None = None,
        positions: Tensor | None = None,
        output_hidden_states: bool = False,
        request: Request | None = None,
    ) -> MaskedLMOutput | Prediction:
        """Predict tokens: logits [B, L, V], or what `request` asks for instead.

        `positions` [N] int64 (row * L + column) chooses what is predicted: logits are then [N, V], and nothing
        else reaches the vocabulary projection. The other arguments are those of `Backbone.forward`.
        """
        out = self.model(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_pattern=attention_pattern,
            output_hidden_states=output_hidden_states,
            request=request,
        )
        hidden = out.last_hidden_state
        if positions is not None:
            if not torch.compiler.is_compiling():
                check_positions(positions, hidden)
            hidden = hidden.flatten(0, 1).index_select(0, positions)
        if request is None:
            return MaskedLMOutput(logits=self.predict(hidden), hidden_states=out.hidden_states)
        return self._answer(request, hidden)

    def _answer(self, request: Request, hidden: Tensor) -> Prediction:
        if request.hidden_only or request.stop_layer is not None:
            return Prediction(hidden=hidden)
        if request.per_token is None:
            return Prediction(logits=self.predict(hidden))
        per_token, width = request.per_token, self.lm_head.weight.shape[0]
        if request.weights is None:
            values = values_in_chunks(per_token, hidden, self.predict, width, is_constant=request.is_constant)
            return Prediction(per_token=values)
        parameters = tuple(self.lm_head.parameters())
        total, values = sum_in_chunks(per_token, hidden, self.predict, width, request.weights, parameters)
        return Prediction(per_token=values, total=total)
