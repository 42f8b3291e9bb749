"""Embeddings of prompts: an encoder's, static ones, the user's own."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from align.config import FilterSection
from align.errors import DataError, ModelError
from align.filtering.embeddings import Encoder, read_embeddings
from align.filtering.score_columns import prompt_embeddings
from align.filtering.static_embeddings import StaticEncoder
from tests.filtering.samples import pair
from tests.helpers.bad_input_makers import pickled
from tests.helpers.builders import bert_reward


def test_prompts_are_embedded_as_the_encoder_does(tmp_path: Path) -> None:
    model = str(bert_reward(tmp_path / "model"))
    texts = ["the film is good", "bad", "a plot", "great film", "dull"]
    pairs = Dataset.from_list([pair(text, "a", "b", str(k)) for k, text in enumerate(texts)])
    found, _ = prompt_embeddings(pairs, FilterSection(embedding_model=model), tmp_path / "cache")
    assert np.allclose(found, Encoder(model)(texts), atol=1e-6) and np.allclose(np.linalg.norm(found, axis=1), 1)


@pytest.mark.parametrize("embedding", ["encoder", "static"])
def test_an_encoder_in_a_pickle_is_refused(embedding: str, tmp_path: Path) -> None:
    model = bert_reward(tmp_path / "model")
    pickled("model", "pytorch_model.bin")(model)
    pairs = Dataset.from_list([pair(text, "a", "b", str(k)) for k, text in enumerate(("good film", "bad plot"))])
    settings_of = FilterSection.model_validate({"embedding_model": str(model), "embedding": embedding})
    with pytest.raises(ModelError, match="found a pickle, which can run code") as refused:
        prompt_embeddings(pairs, settings_of, tmp_path / "cache")
    assert refused.value.code == "model-pickle"


def test_static_vectors_are_weighted_means_of_tokens(tmp_path: Path) -> None:
    """One token alone is its centered vector; order does not matter; the table is cached."""
    model = str(bert_reward(tmp_path / "model"))
    encoder = StaticEncoder(model, tmp_path / "table.safetensors")
    words = sorted(encoder.tokenizer.get_vocab())
    alone, ids = Encoder(model)(words), encoder.tokenizer.convert_tokens_to_ids(words)
    good = encoder.tokenizer.convert_tokens_to_ids("good")
    centered = alone[ids.index(good)] - alone.mean(axis=0)
    assert np.allclose(encoder(["good"])[0], centered / np.linalg.norm(centered), atol=1e-4)
    found = encoder(["good bad film", "film good bad", "", "good bad"])
    assert np.allclose(found[0], found[1], atol=1e-6) and not np.allclose(found[0], found[3], atol=1e-2)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    both = encoder.table[[good, encoder.tokenizer.convert_tokens_to_ids("bad")]].sum(axis=0)
    assert np.allclose(found[3], both / np.linalg.norm(both), atol=1e-5)
    written = (tmp_path / "table.safetensors").stat().st_mtime_ns
    assert np.array_equal(StaticEncoder(model, tmp_path / "table.safetensors")(["good"]), encoder(["good"]))
    assert (tmp_path / "table.safetensors").stat().st_mtime_ns == written


def test_embeddings_that_are_not_unit_rows_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "e.npy"
    for values, message in (
        (np.ones((3, 2), dtype=np.float64), "found float64 of shape"),
        (np.ones((2, 2), dtype=np.float32), "expected float32 of"),
        (np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32), "row 3: found a vector of length 1.414"),
        (np.array([[1, 0], [np.nan, 0], [0, 1]], dtype=np.float32), "row 2: found a vector of length nan"),
    ):
        np.save(file, values)
        with pytest.raises(DataError, match=message):
            read_embeddings(str(file), 3)
    file.write_bytes(b"no array")
    with pytest.raises(DataError, match=r"not a .npy file"):
        read_embeddings(str(file), 3)
