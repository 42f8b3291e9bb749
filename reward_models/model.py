"""Loading a reward model: any backbone with a one-logit classification head, and its tokenizer."""

from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.model_folders import check_model_folder, check_vocabulary, loading


def load_reward_model(
    model: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with one output and its tokenizer; where there is no padding token, end-of-sequence pads.

    Raises:
        ModelError: model or tokenizer cannot be loaded, or the model has a head with more than one output.
    """
    check_model_folder(str(model), rewards=True)
    with loading(str(model), "cannot be loaded as a reward model"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    check_vocabulary(str(model), len(tokenizer), loaded.get_input_embeddings().weight.shape[0])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    loaded.config.pad_token_id = tokenizer.pad_token_id
    return loaded, tokenizer
