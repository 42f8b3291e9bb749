"""Loading a reward model: a backbone with a one-logit classification head, or an adapter on one, and its tokenizer."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from align.config import RewardSection
from align.errors import ConfigError, ModelError
from align.io.console import log
from align.models.folders import OWN_CODE, TEXT_PAIR, adapter_base, check_model_folder, check_vocabulary, loading
from reward_models.adapters import merged
from reward_models.weights import FoundWeights, check_weights

POSITIONS = ("position_embeddings", "wpe", "embed_positions")
"""Names of position embeddings in transformers' models."""
DTYPES = ("float32", "bfloat16", "float16", "auto")
CLASSIFIERS = ("score", "classifier")
"""What transformers' models call the head that gives the reward; only those of decoders are called ``score``."""
KIND = "cannot be loaded as a reward model"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a finished reward model is loaded, and how it reads a prompt and a response.

    Raises:
        ConfigError: no such dtype.
    """

    dtype: str = "float32"
    """Of the backbone's weights; ``auto`` is the checkpoint's. The head is always in float32."""
    trust_remote_code: bool = False
    """Code that comes with the model may run."""
    text_pair: bool = False
    """An encoder reads prompt and response as a sentence pair, ``tokenizer(prompt, response)``. A model whose
    config.json has ``text_pair: true`` does so in any case."""

    @property
    def suffix(self) -> str:
        """What rewards depend on, to be added to a key; empty where all have their defaults."""
        return "" if self == LoadOptions() else f":{self.dtype}:{self.trust_remote_code}:{self.text_pair}"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}", code="config-option")


DEFAULTS = LoadOptions()


def not_of_a_judge(judge: str) -> ConfigError:
    """The error of options that a judge without a reward model is given."""
    return ConfigError(
        f"judge {judge}: found dtype, trust_remote_code or text_pair, which are of a reward model",
        code="config-option",
        hint="leave them out, or give a reward model",
    )


def load_options(config: RewardSection) -> LoadOptions:
    """How the models of a run are loaded."""
    return LoadOptions(config.dtype or "float32", config.trusts_remote_code, config.text_pair)


def load_reward_model(
    model: str | Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    new_head: bool = False,
    revision: str | None = None,
    attention: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with one output and its tokenizer; an adapter is merged into its base.

    A finished model keeps the padding token of its configuration, which says where a decoder's reward is read. A
    backbone without a head, and a model whose head comes from an adapter, take the tokenizer's, as trl.RewardTrainer
    does; see ``pad_as_trained``.

    Args:
        model: folder or hub id.
        dtype: dtype of the backbone's weights, see ``LoadOptions``.
        trust_remote_code: whether code that comes with the model may run.
        new_head: the model may be a backbone without a head; it gets a random one, to train or to ignore.
        revision: branch, tag or commit of a hub id; None: its main branch.
        attention: ``attn_implementation`` of transformers; None: its default.

    Raises:
        ModelError: model or tokenizer cannot be loaded, it has weights that would not be used, or lacks some, or the
            model has no head, or one with several outputs.
    """
    name = str(model)
    check_model_folder(name, rewards=True, head=not new_head)
    with loading(name, KIND):
        at = {} if revision is None else {"revision": revision}
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **at)
        loaded, found = _load(
            name, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision, attention=attention
        )
    check_weights(name, loaded, found, new_head=new_head)
    check_vocabulary(name, len(tokenizer), loaded.get_input_embeddings().weight.shape[0])
    own_padding = tokenizer.pad_token_id is not None
    if not own_padding:
        tokenizer.pad_token = tokenizer.eos_token
    if found.missing or (found.head_of_adapter and own_padding):
        pad_as_trained(loaded, tokenizer)
    _read_in_float32(loaded)
    return loaded, tokenizer


def check_class(model: str, trust_remote_code: bool) -> None:
    """Refuse a local model, or an adapter's local base, that is of another class than it would be loaded as.

    Raises:
        ModelError: an encoder-decoder, a head that labels tokens, code of the model's own that would not run.
    """
    base = adapter_base(model)
    if base is not None:
        check_class(base, trust_remote_code)
    elif Path(model).is_dir():
        with loading(model, KIND):
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        _check_class(model, config, trust_remote_code)


def pad_as_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the model take the tokenizer's padding token for padding, as trl.RewardTrainer does when it trains."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the reward is read at the last token; an encoder's is read at the first, or is pooled."""
    return hasattr(model, CLASSIFIERS[0])


def takes_segments(model: PreTrainedModel) -> bool:
    """Whether the model is told which of two texts a token belongs to."""
    return "token_type_ids" in inspect.signature(model.forward).parameters


def reads_text_pairs(model: PreTrainedModel, *, asked: bool, told: bool = False) -> bool:
    """Whether the model reads prompt and response as a sentence pair: as asked, or as its configuration says.

    Args:
        model: a reward model.
        asked: the user wants it to.
        told: warn where neither says anything of an encoder.

    Raises:
        ConfigError: a decoder is asked to.
    """
    stated = getattr(model.config, TEXT_PAIR, None)
    if asked and is_decoder(model):
        raise ConfigError(
            f"{model.name_or_path}: reads one text (a {type(model).__name__}), expected an encoder for text_pair",
            code="reward-text-pair",
            hint="leave text_pair out: a decoder reads the prompt and what follows",
        )
    if told and not asked and stated is None and not is_decoder(model):
        log.warning(
            "%s: an encoder, which is given prompt and response as one text; if it was trained on sentence pairs, "
            "tokenizer(prompt, response), say so: text_pair", model.name_or_path,
        )  # fmt: skip
    return asked or stated is True


def note_text_pair(model: PreTrainedModel, text_pair: bool) -> None:
    """Keep in an encoder's configuration how it was trained to read."""
    if not is_decoder(model):
        setattr(model.config, TEXT_PAIR, text_pair)


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


def _load(
    name: str, *, dtype: str, trust_remote_code: bool, revision: str | None = None, attention: str | None = None
) -> tuple[PreTrainedModel, FoundWeights]:
    """The model of a folder or hub id and what became of its weights; an adapter's base may be an adapter itself."""
    at = {} if revision is None else {"revision": revision}
    if find_adapter_config_file(name, **at) is not None:
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(name, **at)
        base, found = _load(
            str(config.base_model_name_or_path), dtype=dtype, trust_remote_code=trust_remote_code,
            revision=config.revision, attention=attention,
        )  # fmt: skip
        return merged(name, base, config, found, **at)
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **at)
    _check_class(name, config, trust_remote_code)
    attends = {} if attention is None else {"attn_implementation": attention}
    with _heads_in_float32():
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **attends, **at,
        )  # fmt: skip
    return loaded, FoundWeights.of(loaded, info)


def _check_class(name: str, config: PretrainedConfig, trusted: bool) -> None:
    """Refuse what another class has saved than the one that would be loaded, by config.json alone.

    Raises:
        ModelError: an encoder-decoder, a head that labels tokens, code of the model's own that would not run.
    """
    saved_by = next(iter(config.architectures or ()), "")
    native = getattr(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None), "__name__", "")
    if config.is_encoder_decoder or saved_by.endswith("ForTokenClassification"):
        kind = "is an encoder-decoder" if config.is_encoder_decoder else "gives a number per token"
        raise ModelError(
            f"{name}: {kind} ({saved_by or config.model_type}), expected a decoder or an encoder with one number per "
            "text", code="model-load", hint="give a model that was trained as a reward model",
        )  # fmt: skip
    refs = getattr(config, "auto_map", None) or {}
    own = {auto: str(ref).rpartition(".")[2] for auto, ref in refs.items() if isinstance(ref, str)}
    classifier = own.get("AutoModelForSequenceClassification")
    wanted = classifier or (saved_by if saved_by in own.values() and not hasattr(transformers, saved_by) else "")
    if wanted and native and wanted != (classifier if trusted else native):
        raise ModelError(
            f"{name}: its own code defines {wanted} (auto_map in config.json), expected it to be run; transformers' "
            f"{native} would be another model",
            code="model-load",
            hint=OWN_CODE if classifier else "give a model that transformers' AutoModelForSequenceClassification loads",
        )
    if classifier and not trusted:
        log.warning("%s: its own code (auto_map in config.json) is not run; transformers' %s is", name, native)
    elif saved_by and not (own or hasattr(transformers, saved_by)):
        log.warning("%s: was saved by %s, which transformers does not have; it is read as a %s", name, saved_by, native)


@contextmanager
def _heads_in_float32() -> Iterator[None]:
    """Keep the heads of models that are loaded here in float32, whatever the dtype of their backbones."""
    before = PreTrainedModel._keep_in_fp32_modules_strict
    PreTrainedModel._keep_in_fp32_modules_strict = {*(before or ()), *CLASSIFIERS}
    try:
        yield
    finally:
        PreTrainedModel._keep_in_fp32_modules_strict = before


def _read_in_float32(model: PreTrainedModel) -> None:
    """Let the head compute in float32 where the backbone gives it 16 bits."""
    head = next((layer for name in CLASSIFIERS if (layer := getattr(model, name, None)) is not None), None)
    if isinstance(head, nn.Module) and model.dtype != torch.float32:
        head.float().register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
