"""`align trust` end to end on a tiny model, its features against single sequences, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset

from align.config import TrainSection
from align.errors import DataError, ModelError
from align.io.files import read_json
from align.io.stage import read_manifest
from align.models.layout import choose_layout
from align.trust.features import mean_difference, pair_features
from align.trust.measure import check_margins, margin_source
from align.trust.sentences import sentences, setting
from tests.helpers.builders import rows, trained_adapter
from tests.models.test_logps import make_batch, tiny

LENGTHS = [(6, 5, 8), (1, 3, 2), (12, 4, 4), (3, 1, 9)]


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
def test_features_against_single_sequences(family: str, layout: str) -> None:
    """Mean over the response's own tokens, padding and packing change nothing."""
    batch = make_batch(LENGTHS, same_start=1)
    plain = tiny(family)
    expected = []
    for k, (prompt, *lengths) in enumerate(LENGTHS):
        means = []
        for side, length in enumerate(lengths):
            ids = batch["input_ids"][k + side * len(LENGTHS), : prompt + length][None]
            with torch.no_grad():
                means.append(plain(ids, output_hidden_states=True).hidden_states[-1][0, prompt:].mean(dim=0))
        expected.append(means[0] - means[1])
    model = tiny(family)
    chosen = choose_layout(model, batch, layout)  # type: ignore[arg-type]
    found = mean_difference(model, batch, chosen)
    assert torch.allclose(found.double(), torch.stack(expected).double(), atol=1e-5)


def test_another_adapter_has_other_features(tiny_policy: Path, tmp_path: Path) -> None:
    """Two adapters of the same shape on one base, in one cache."""
    pairs = Dataset.from_list(rows(6))
    adapters = [trained_adapter(tiny_policy, tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)]
    one, other = (pair_features(pairs, str(adapter), tmp_path / "cache", max_length=64) for adapter in adapters)
    alone = pair_features(pairs, str(adapters[1]), tmp_path / "alone", max_length=64)
    assert np.array_equal(other, alone) and not np.allclose(one, other, atol=0.1)


def test_features_are_those_of_the_tokens_that_training_keeps(tiny_policy: Path, tmp_path: Path) -> None:
    """Under keep_end the last three words of each prompt are left; without a limit, all of them."""
    long = [
        {"id": f"p{k}", "prompt": "the film was " * (k + 3), "chosen": " good film", "rejected": " bad plot"}
        for k in range(4)
    ]
    cut = [row | {"prompt": "the film was"} for row in long]

    def features(table: list[dict[str, str]], name: str, **options: Any) -> np.ndarray:
        return pair_features(Dataset.from_list(table), str(tiny_policy), tmp_path / name, **options)

    kept = features(long, "a", max_length=6, truncation="keep_end")
    assert np.allclose(kept, features(cut, "b", max_length=64), atol=1e-5)
    every = features(long, "a", max_length=None)
    assert np.allclose(every, features(long, "b", max_length=64), atol=1e-5)
    assert not np.allclose(every, kept, atol=1e-2)


def test_features_are_cached_and_a_stopped_pass_resumes(tiny_policy: Path, tmp_path: Path) -> None:
    """A stopped pass resumes: a planted row survives, the missing rows are computed."""
    pairs = Dataset.from_list(rows(12))
    whole = pair_features(pairs, str(tiny_policy), tmp_path, max_length=64)
    assert np.isfinite(whole).all()
    (file,) = tmp_path.glob("*.npy")
    partial = np.array(whole)
    partial[3] = 7.0
    partial[8:] = np.nan
    file.unlink()
    np.save(file.with_suffix(".partial.npy"), partial)
    resumed = pair_features(pairs, str(tiny_policy), tmp_path, max_length=64)
    assert (resumed[3] == 7.0).all()
    assert np.delete(resumed, 3, axis=0) == pytest.approx(np.delete(whole, 3, axis=0), abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert (pair_features(pairs, str(tiny_policy), tmp_path, max_length=64) == resumed).all()


def test_a_tokenizer_that_does_not_fit_is_named(tiny_policy: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from tests.helpers.builders import llama_config, tokenizer

    config = llama_config()
    config.vocab_size = 9
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model-vocabulary.*the tokenizer has 21 tokens, the model embeds 9"):
        pair_features(Dataset.from_list(rows(3)), str(tmp_path), tmp_path / "cache", max_length=64)


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    from tests.helpers.builders import causal, tokenizer

    causal(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer(template=False).save_pretrained(tmp_path)
    turns = {role: [{"role": role, "content": text}] for role, text in (("user", "the film"), ("assistant", "good"))}
    pairs = Dataset.from_list(
        [{"id": "p", "prompt": turns["user"], "chosen": turns["assistant"], "rejected": turns["assistant"]}]
    )
    with pytest.raises(ModelError, match="no-chat-template"):
        pair_features(pairs, str(tmp_path), tmp_path / "cache", max_length=64)


GOOD = [float(k % 7) - 2 for k in range(60)]


@pytest.mark.parametrize(
    ("margins", "origin", "code", "message"),
    [
        (GOOD[:49], "outside", "trust-too-few", "found 49 pairs, expected at least 50"),
        ([1.5] * 60, "outside", "trust-margins", "the same margin"),
        ([abs(m) + 0.1 for m in GOOD], "outside", "trust-margins", "agrees with the label of every pair"),
        ([-abs(m) - 0.1 for m in GOOD], "outside", "trust-margins", "contradicts the label of every pair"),
        ([None, *GOOD[1:]], "outside", "trust-margins", "found 1 of 60 pairs without a margin (first: p0)"),
        (None, "outside", "trust-margins", "no `margin` column"),
        (GOOD, "in-sample", "trust-in-sample", "expected cross-fitted or outside ones"),
    ],
)
def test_bad_margins_are_refused(margins: list[float | None] | None, origin: str, code: str, message: str) -> None:
    columns: dict[str, list[object]] = {"id": [f"p{k}" for k in range(len(margins or GOOD))]}
    if margins is not None:
        columns["margin"] = list(margins)
    with pytest.raises(DataError) as caught:
        check_margins(Dataset.from_dict(columns), origin, "pairs.jsonl", allow_in_sample=False)
    assert caught.value.code == code and message in str(caught.value) and "do: " in str(caught.value)


def test_in_sample_margins_pass_if_allowed() -> None:
    pairs = Dataset.from_dict({"id": [str(k) for k in range(60)], "margin": GOOD})
    check_margins(pairs, "in-sample", "here", allow_in_sample=True)
    check_margins(pairs, "cross-fitted", "here", allow_in_sample=False)


def test_the_origin_of_the_margins_is_read_from_the_run(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "metrics.json").write_text('{"margins": "in-sample"}')
    assert margin_source(tmp_path / "pairs" / "pairs.parquet") == "in-sample"
    assert margin_source(tmp_path / "pairs") == "in-sample"
    assert margin_source(tmp_path / "elsewhere" / "deep" / "pairs.parquet") == "unknown"


@pytest.mark.parametrize(
    ("trust", "strength", "message"),
    [
        (0.0, 0.0, "Train with plain DPO"),
        (0.0, 1.0, "Train with MADPO at full strength"),
        (1.0, 0.0, "Train with soft labels"),
        (0.25, 0.5, "Train on a mix: 25% margins, 75% labels, the labels' part weighted by MADPO at 50% strength"),
    ],
)
def test_the_verdict_names_the_method(trust: float, strength: float, message: str) -> None:
    found = {
        "slope": 0.5, "chosen": {"trust": trust, "strength": strength}, "interval": {"trust": [0.0, 0.5]},
        "decided": True, "pairs": 60,
    }  # fmt: skip
    assert setting(found).startswith(message) and "a trust from 0 to 0.5" in setting(found)
    assert "contradict" in setting(found | {"slope": 0.0})
    for slope in (0.0, 0.5):
        assert setting(found | {"decided": False, "slope": slope}).startswith(
            "These data cannot tell; plain DPO is the default: on 60 pairs"
        )


def align(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


def write_rows(file: Path, count: int = 60, **fields: object) -> None:
    file.write_text("".join(json.dumps(row | fields) + "\n" for row in rows(count)))


@pytest.mark.slow
def test_command_line(tiny_policy: Path, tmp_path: Path) -> None:
    """JSON, page and sentences; the second call reads the features from the cache and gives the same numbers."""
    write_rows(tmp_path / "pairs.jsonl", group="<b>films</b>")
    command = ("trust", "pairs.jsonl", "--model", str(tiny_policy), "--output", "out", "--margins", "outside")
    done = align(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "out" / "trust.json")
    assert 0 <= found["chosen"]["trust"] <= 1 and len(found["grid"]) == 19 and found["pairs"] == 60
    assert found["sentences"] == sentences(found, "outside")
    assert found["sentences"]["verdict"] in done.stdout and "Traceback" not in done.stderr
    page = (tmp_path / "out" / "trust.html").read_text()
    assert "<script" not in page and "<b>films" not in page and page.count("<svg") >= 2
    again = align(*command, folder=tmp_path)
    assert "features: found in" in again.stderr
    other = read_json(tmp_path / "out" / "trust.json")
    assert {k: v for k, v in other.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}
    wrong = align(*command[:-1], "guessed", folder=tmp_path)
    assert wrong.returncode == 2 and "expected one of outside, cross-fitted, in-sample" in wrong.stderr


@pytest.mark.slow
def test_trust_auto_trains_with_the_measured_numbers(tiny_policy: Path, tmp_path: Path) -> None:
    """The stage comes between margins and training, and the manifest of the training records its parameters."""
    write_rows(tmp_path / "pairs.jsonl")
    tree = {
        "name": "auto",
        "pairs": {"path": "pairs.jsonl"},
        "train": {
            "model": str(tiny_policy),
            "trust": "auto",
            "methods": {
                "ours": {"loss": "trust", "parameters": {"beta": 0.2}},
                "fixed": {"loss": "trust", "parameters": {"trust": 0.125}},
                "dpo": {"loss": "dpo"},
            },
            "trainer": {"max_steps": 1, "per_device_train_batch_size": 2, "bf16": False, "report_to": "none"},
        },
    }
    (tmp_path / "auto.yaml").write_text(yaml.safe_dump(tree))
    done = align("train", "auto.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    root = tmp_path / "runs" / "auto"
    measured = read_json(root / "trust" / "parameters.json")
    chosen = read_json(root / "trust" / "trust.json")["chosen"]
    assert measured["trust"] == chosen["trust"] and measured["strength"] == chosen["strength"]
    manifest = read_manifest(root / "train-ours")
    assert manifest is not None and manifest["inputs"]["trust"] == measured
    assert read_json(root / "train-ours" / "history.json")["loss"]["parameters"] == measured | {"beta": 0.2}
    assert read_json(root / "train-fixed" / "history.json")["loss"]["parameters"]["trust"] == 0.125
    assert "trust" not in (read_manifest(root / "train-dpo") or {})["inputs"]
    again = align("train", "auto.yaml", folder=tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stderr


def test_trust_is_auto_or_absent() -> None:
    methods = {"ours": {"loss": "trust"}}
    assert TrainSection(model="m", methods=methods).trust is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="auto"):
        TrainSection(model="m", methods=methods, trust="always")  # type: ignore[arg-type]
