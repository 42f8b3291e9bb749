"""Loading a reward model: any backbone with a one-logit classification head, and its tokenizer."""

from pathlib import Path

from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.io.console import log
from align.models.folders import check_model_folder, check_vocabulary, loading, refuse_new_weights

POSITIONS = ("position_embeddings", "wpe", "embed_positions")
"""Names of position embeddings in transformers' models."""


def load_reward_model(
    model: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False, new_head: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with one output and its tokenizer, which pads with end-of-sequence if it has no padding token.

    Args:
        model: folder or hub id.
        dtype: dtype of the weights.
        trust_remote_code: whether code that comes with the model may run.
        new_head: the model may be a backbone without a head; it gets a random one, to train or to ignore.

    Raises:
        ModelError: model or tokenizer cannot be loaded, or the model has no head, or one with several outputs.
    """
    check_model_folder(str(model), rewards=True)
    with loading(str(model), "cannot be loaded as a reward model"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded, found = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    if not new_head:
        refuse_new_weights(str(model), loaded, found["missing_keys"], "a reward model")
    check_vocabulary(str(model), len(tokenizer), loaded.get_input_embeddings().weight.shape[0])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    loaded.config.pad_token_id = tokenizer.pad_token_id
    return loaded, tokenizer


def fitting_length(model: PreTrainedModel, max_length: int) -> int:
    """``max_length``, or the number of position embeddings if the model has fewer (BERT, GPT-2)."""
    sizes = [
        module.num_embeddings
        - (0 if module.padding_idx is None else module.padding_idx + 1)
        - getattr(module, "offset", 0)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in POSITIONS and isinstance(module, nn.Embedding)
    ]
    most = min([max_length, *sizes])
    if most < max_length:
        log.warning("%s: takes %d tokens at most, longer texts are truncated", model.name_or_path, most)
    return most
