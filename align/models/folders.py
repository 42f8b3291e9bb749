"""Checks of a local model folder before anything in it is loaded.

Only small files are read: configurations, the headers of the safetensors files, the tokenizer's file names. A hub id
is left to the loader.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import ModelError
from align.io.console import log
from align.io.hashing import digest, fingerprint_source
from align.models.hub import cache_if_away

ADAPTER = "adapter_config.json"
CONFIG = "config.json"
TEXT_PAIR = "text_pair"
"""Key of a model's config.json: whether it reads sentence pairs."""
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json",
)  # fmt: skip
NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt"})
HEADER_BYTES = 8
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings", "embedding", "tok_embeddings"}
)
"""What architectures call their input embedding."""
OWN_CODE = (
    "if you trust that code, set trust_remote_code: true under train.trainer or reward.trainer, or give "
    "--trust-remote-code with a reward model"
)
HEADS = frozenset({"score.weight", "classifier.weight", "classifier.out_proj.weight", "logits_proj.weight"})
"""Last layers of the classification heads of transformers' models."""
IN_ADAPTER = "base_model.model."
"""What the name of a weight begins with in an adapter's file."""
LANGUAGE_MODELS = ("ForCausalLM", "GPT2LMHeadModel")
"""How transformers' names of classes of language models end."""
OF_ADAPTER = (
    "a head comes from the adapter (modules_to_save) or from its base; the adapter of a policy has none: give a model "
    "that was trained as a reward model"
)
MATRIX = 2
"""Dimensions of a linear layer's weight."""
ONE_OUTPUT = (
    "a reward model gives one number per text (num_labels = 1); of a model with several, save one row of its head as a "
    "model of its own (docs/reward-models.md)"
)
WANTED = "give a hub id or a folder with config.json, safetensors weights and a tokenizer"


def check_model_folder(model: str, *, tokenizer: bool = True, rewards: bool = False, head: bool = False) -> None:
    """Raise if a folder cannot be used as a model; the message names the file at fault.

    Args:
        model: folder or hub id; a name that is not a local path and could be a hub id passes.
        tokenizer: the folder must also hold a tokenizer.
        rewards: the model is to give rewards, so a classification head must have one output.
        head: the model is to give rewards without training, so a language model without such a head is refused.

    Raises:
        ModelError: no such folder, a broken or missing configuration, weights that are missing, cut off or pickled,
            no tokenizer, an adapter whose base cannot be used, a head with more than one output, or none.
    """
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_file() or model.startswith((".", "/", "~")) or not model.strip() or "\0" in model:
            found = "a file" if folder.is_file() else "nothing"
            raise ModelError(
                f"{model!r}: found {found}, expected a model folder or a hub id",
                code="model-load",
                hint=WANTED,
            )
        return
    if is_adapter(folder):
        _check_adapter(folder, rewards=rewards)
    else:
        config = _read_object(folder / CONFIG)
        shapes = _check_weights(folder, "model", config)
        if rewards:
            _check_head(folder, shapes)
    if head and _is_language_model(folder):
        raise no_head(model, "score.weight", of_adapter=is_adapter(folder))
    if tokenizer and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder}: no tokenizer, expected one of {', '.join(TOKENIZER_FILES)}",
            code="model-tokenizer",
            hint="save the tokenizer there too: tokenizer.save_pretrained(folder)",
        )


@contextmanager
def loading(model: str, what: str) -> Iterator[None]:
    """Convert what a library raises while it loads ``model`` into one message; the debug log gets the traceback.

    Args:
        model: folder or hub id.
        what: what failed, e.g. ``cannot be loaded as a reward model``.

    Raises:
        ModelError: in place of any exception.
    """
    try:
        with cache_if_away(model):
            yield
    except ModelError:
        raise
    except Exception as error:
        log.debug("%s", model, exc_info=True)
        reason = _reason(error).replace(str(Path(model).absolute()), model)
        hint = OWN_CODE if "custom code" in reason else WANTED
        raise ModelError(f"{model}: {what} ({reason})", code="model-load", hint=hint) from None


def check_vocabulary(model: str, tokens: int, rows: int) -> None:
    """Raise if a tokenizer has more tokens than the model has embeddings.

    Args:
        model: folder or hub id, for the message.
        tokens: size of the tokenizer's vocabulary, added tokens included.
        rows: rows of the model's embedding.

    Raises:
        ModelError: some token ids would have no embedding.
    """
    if tokens > rows:
        raise ModelError(
            f"{model}: the tokenizer has {tokens} tokens, the model embeds {rows}",
            code="model-vocabulary",
            hint="take the tokenizer that belongs to the model, or resize the model's embedding",
        )


def is_adapter(model: str | Path) -> bool:
    """Whether ``model`` is the folder of an adapter."""
    return (Path(model) / ADAPTER).exists()


def adapter_base(model: str) -> str | None:
    """The base model that an adapter folder names; None if ``model`` is not an adapter folder or names no base.

    Raises:
        ModelError: the adapter's configuration cannot be read.
    """
    base: str | None = adapter_config(model).get("base_model_name_or_path") if is_adapter(model) else None
    return base


def adapter_config(folder: str) -> dict[str, Any]:
    """The peft configuration in an adapter folder.

    Raises:
        ModelError: it cannot be read.
    """
    return _read_object(Path(folder) / ADAPTER)


def reads_sentence_pairs(model: str) -> bool:
    """Whether config.json of a model folder says that it reads prompt and response as a sentence pair."""
    file = Path(model) / CONFIG
    return file.is_file() and _read_object(file).get(TEXT_PAIR) is True


def fingerprint_model(model: str) -> str:
    """Content hash of a model folder, combined with that of its base for an adapter; a hub id is its own."""
    base = adapter_base(model)
    own = fingerprint_source(model)
    return own if base is None else digest([own, fingerprint_model(base)])


def vocabulary_rows(model: str) -> int | None:
    """Number of tokens that a model embeds, from the configuration (an adapter's base's); None if unknown."""
    folder = Path(model)
    if is_adapter(folder):
        saved = saved_vocabulary(model)
        if saved is not None:
            return saved
        return vocabulary_rows(str(_read_object(folder / ADAPTER).get("base_model_name_or_path")))
    if not (folder / CONFIG).exists():
        return None
    config = _read_object(folder / CONFIG)
    nested = config.get("text_config")
    found = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return found if isinstance(found, int) else None


def saved_vocabulary(adapter: str) -> int | None:
    """Tokens of the embedding that an adapter folder holds itself, as after tokens were added; None without one."""
    for file in sorted(Path(adapter).glob("adapter_model*.safetensors")):
        for name, entry in _header(file)[0].items():
            parts = name.split(".")
            if parts[-1] == "weight" and len(entry["shape"]) == 2 and EMBEDDINGS & set(parts[:-1]):
                rows: int = entry["shape"][0]
                return rows
    return None


def _check_adapter(folder: Path, *, rewards: bool) -> None:
    config = _read_object(folder / ADAPTER)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder / ADAPTER}: base_model_name_or_path: found {base!r}, expected the base model",
            code="model-config",
            hint="an adapter is used together with the model that it was trained on",
        )
    shapes = _check_weights(folder, "adapter_model", config)
    if rewards:
        _check_head(folder, shapes)
    try:
        check_model_folder(base, tokenizer=False, rewards=rewards and not any(map(_is_head, shapes)))
    except ModelError as error:
        raise ModelError(
            f"{folder / ADAPTER}: the base model cannot be used: {error.message}", code=error.code, hint=error.hint
        ) from None


def _check_weights(folder: Path, stem: str, config: dict[str, Any]) -> dict[str, list[int]]:
    """Shapes of the weights; raise if safetensors files are missing or incomplete, or there is only a pickle."""
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not files:
        pickles = sorted({file.name for pattern in PICKLES for file in folder.glob(pattern)} - NOT_WEIGHTS)
        if pickles:
            raise ModelError(
                f"{folder / pickles[0]}: found a pickle, which can run code, expected {stem}.safetensors",
                code="model-pickle",
                hint=_conversion(folder, stem, config),
            )
        raise ModelError(
            f"{folder}: no weights, expected {stem}.safetensors",
            code="model-load",
            hint=WANTED,
        )
    if (folder / INDEX).exists() and stem == "model":
        named = _read_object(folder / INDEX).get("weight_map")
        wanted = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing or not wanted:
            raise ModelError(
                f"{folder / INDEX}: {missing[0] + ' is not there' if missing else 'names no file'}",
                code="model-load",
                hint="copy the whole folder again",
            )
    return {name: shape for file in files for name, shape in _read_shapes(file).items()}


def _read_shapes(file: Path) -> dict[str, list[int]]:
    """Shapes in the header of a safetensors file; raise if the header does not agree with the size of the file.

    Layout: the header's length (8 bytes, little-endian), the header as JSON with the offsets of every tensor, data.
    """
    size = file.stat().st_size
    try:
        header, length = _header(file)
        shapes = {name: list(entry["shape"]) for name, entry in header.items()}
        ends = [entry["data_offsets"][1] for entry in header.values()]
        expected = HEADER_BYTES + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise ModelError(
            f"{file}: not a safetensors file ({' '.join(str(error).split())})",
            code="model-load",
            hint="copy the file again",
        ) from None
    if size != expected:
        raise ModelError(
            f"{file}: found {size} bytes, expected {expected}: the file is incomplete",
            code="model-load",
            hint="copy the file again",
        )
    return shapes


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """(name of a tensor -> its entry, bytes of the header) of a safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(HEADER_BYTES))
        size = file.stat().st_size
        if length > size:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(stream.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, length


def _check_head(folder: Path, shapes: dict[str, list[int]]) -> None:
    """Count the outputs of a classification head by its weights: what config.json says of labels may be a default."""
    for name, shape in shapes.items():
        if _is_head(name) and len(shape) == MATRIX and shape[0] != 1:
            raise several_outputs(str(folder), shape[0])


def _is_head(name: str) -> bool:
    return name.removeprefix(IN_ADAPTER) in HEADS


def _is_language_model(folder: Path) -> bool:
    """Whether a checked folder, or the base of an adapter without a head, is a language model without a head."""
    if not folder.is_dir():
        return False
    adapted = is_adapter(folder)
    config = _read_object(folder / (ADAPTER if adapted else CONFIG))
    files = folder.glob(f"{'adapter_model' if adapted else 'model'}*.safetensors")
    if any(_is_head(name) for file in files for name in _read_shapes(file)):
        return False
    if adapted:
        return _is_language_model(Path(str(config["base_model_name_or_path"])))
    return str(next(iter(config.get("architectures") or ()), "")).endswith(LANGUAGE_MODELS)


def no_head(model: str, weights: str, *, of_adapter: bool, also: str = "") -> ModelError:
    """The error of a reward model that lacks ``weights``; ``also`` says more of it."""
    return ModelError(
        f"{model}: has no weights {weights}, so it is not a reward model{also}",
        code="model-load",
        hint=OF_ADAPTER if of_adapter else "give a model that was trained as one",
    )


def several_outputs(model: str, count: int) -> ModelError:
    """The error of a head with ``count`` outputs."""
    return ModelError(
        f"{model}: its classification head has {count} outputs, expected one",
        code="reward-labels",
        hint=ONE_OUTPUT,
    )


def refuse_new_weights(model: str, loaded: Any, missing: Iterable[str], kind: str) -> None:
    """Raise if a loaded model has new, random parameters, because its folder has no weights for them.

    Args:
        model: folder or hub id.
        loaded: the model.
        missing: names of parameters without weights in the folder.
        kind: what the model was loaded as.

    Raises:
        ModelError: some parameters are new.
    """
    new = sorted({name for name, _ in loaded.named_parameters()} & set(missing))
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        raise ModelError(
            f"{model}: has no weights {new[0]}{more}, so it is not {kind}",
            code="model-load",
            hint="give a model that was trained as one",
        )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{file}: cannot be read ({error.strerror})",
            code="model-config",
            hint=WANTED,
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{file}: not valid JSON ({' '.join(str(error).split())})",
            code="model-config",
            hint="copy the file again",
        ) from None
    if not isinstance(found, dict):
        raise ModelError(
            f"{file}: found a JSON {type(found).__name__}, expected an object",
            code="model-config",
            hint="copy the file again",
        )
    return found


def _reason(error: Exception) -> str:
    """The first line of an error, and the second if the first ends in a colon."""
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than config.json says"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _conversion(folder: Path, stem: str, config: dict[str, Any]) -> str:
    """Command that converts a trusted pickle to safetensors."""
    if stem == "adapter_model":
        line = (
            f"import torch, safetensors.torch as s; s.save_file(torch.load('{folder}/adapter_model.bin', "
            f"weights_only=True), '{folder}/adapter_model.safetensors')"
        )
    else:
        kind = next(iter(config.get("architectures") or ()), "AutoModelForCausalLM")
        line = f"from transformers import {kind} as M; M.from_pretrained('{folder}').save_pretrained('{folder}')"
    return f'if you trust where it comes from, convert it: python -c "{line}"'
