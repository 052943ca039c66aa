"""What a bi-encoder's folder has beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from sgpt_jax.folder.card import write_model_card
from sgpt_jax.folder.settings import ModelSettings, write_settings
from sgpt_jax.text.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from sgpt_jax.bi_encoder import BiEncoder

# What a model card says of weights that were int8.
DEQUANTISED = (
    "The weights are the dequantised copy of int8 weights, one scale for each output channel, that the model was used "
    "with: another rounding of the base model's than its own files have."
)


def save_settings(
    model: BiEncoder,
    folder: Any,
    *,
    training: Mapping[str, object] | None = None,
    results: Mapping[str, object] | None = None,
    note: str = "",
    only_here: bool = False,
) -> None:
    """Writes tokenizer, how vectors are made, and the model card.

    Args:
        model: whose.
        folder, training, results: see `BiEncoder.save_pretrained`.
        note: for the model card, a paragraph on the weights.
        only_here: sentence-transformers does not load the folder; then the card does not show how.
    """
    folder = epath.Path(folder)
    save_tokenizer(model.text.tokenizer, folder)
    settings = ModelSettings(
        pooling=model.pooling,
        brackets=model.text.brackets,
        max_seq_length=model.text.max_seq_length,
        modules=model.modules,
        prompts=model.text.prompts,
        default_prompt_name=model.text.default_prompt_name,
        include_prompt=model.include_prompt,
        truncate_dim=model.truncate_dim,
        similarity=model.similarity_name,
    )
    write_settings(folder, settings, model.decoder.config.hidden_dim)
    write_model_card(
        folder,
        settings,
        model.dimension,
        base_model=model.name,
        license=model.license,
        training=training,
        results=results,
        note=note,
        only_here=only_here,
    )
