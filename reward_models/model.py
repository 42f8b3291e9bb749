"""Loading a reward model: any backbone with a one-logit classification head, and its tokenizer."""

from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.errors import ModelError


def load_reward_model(model: str | Path, *, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with one output and its tokenizer; where there is no padding token, end-of-sequence pads.

    Raises:
        ModelError: model or tokenizer cannot be loaded, or the model has a head with more than one output.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model}: cannot be loaded as a reward model ({reason})",
            code="model-load",
            hint="give a hub id or a folder with config.json, safetensors weights and a tokenizer",
        ) from None
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "mismatched" not in str(error):
            raise
        raise ModelError(
            f"{model}: its classification head does not have one output",
            code="reward-labels",
            hint="a reward model gives one number per text: num_labels = 1",
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    loaded.config.pad_token_id = tokenizer.pad_token_id
    return loaded, tokenizer
