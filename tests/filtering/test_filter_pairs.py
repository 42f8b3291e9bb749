"""`filter_pairs` and `align filter` from a table to kept and dropped pairs with reasons."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from align.commands.filter import filter_source
from align.config import FilterSection, PairsSection, RunConfig
from align.data.pairs import load_pairs
from align.errors import AlignError, ConfigError, DataError
from align.filtering.filter_pairs import filter_pairs
from align.filtering.selection import robust_scale
from align.reports.filter_page import write_filter_page
from align.run.checks import check_config
from align.run.pipeline import run_pipeline
from tests.filtering.samples import pair, unit
from tests.helpers.builders import causal


def test_a_run_keeps_every_key_of_a_message(tmp_path: Path) -> None:
    """Kept pairs have the keys of the source's messages."""
    policy = str(causal(tmp_path / "policy"))
    np.save(tmp_path / "e.npy", np.eye(4, dtype=np.float32))
    filtering = {"embeddings": str(tmp_path / "e.npy"), "keep": 1.0, "margin": 0.0}
    for more in ({"reasoning_content": "very fine"}, {}):
        table = [
            {"id": str(k), "prompt": [{"role": "user", "content": f"is the {word} good ?"}],
             "chosen": [{"role": "assistant", "content": f"the {word} is very good", **more}],
             "rejected": [{"role": "assistant", "content": f"a {word} was not"}]}
            for k, word in enumerate(("film", "plot", "review", "user"))
        ]  # fmt: skip
        source = tmp_path / "chat.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in table))
        tree = {"name": "r", "output_dir": str(tmp_path), "pairs": {"path": str(source)}, "filter": filtering,
                "train": {"model": policy, "methods": {"dpo": {"loss": "dpo"}}}}  # fmt: skip
        run_pipeline(RunConfig.model_validate(tree), command="", until=("filter",))
        kept = load_pairs(PairsSection(path=str(tmp_path / "r" / "filter" / "kept.parquet")))
        texts = ["id", "prompt", "chosen", "rejected"]
        assert kept.select_columns(texts).to_list() == table


def test_filter_pairs_with_given_embeddings(tmp_path: Path) -> None:
    """Row order does not matter; selection is stratified by group; a doubtful label is dropped."""
    rng = np.random.default_rng(0)
    table = [
        {"id": f"{k:02d}", "prompt": f"question {k} on {w}", "chosen": f"{w} is {k}", "rejected": f"no {w} {k}",
         "margin": float(rng.uniform(0.5, 3)), "margin_std": float(rng.uniform(0.1, 2)), "group": "ab"[k % 2]}
        for k, w in enumerate(["ships", "bread", "stars", "chess", "rivers", "paint", "bees", "trains", "snow", "maps"])
    ]  # fmt: skip
    table[3]["margin"] = -6.0
    vectors, order = unit(10, 4), rng.permutation(10)
    found = []
    for place, rows_of in enumerate((np.arange(10), order)):
        np.save(tmp_path / f"{place}.npy", vectors[rows_of])
        settings_of = FilterSection(
            keep=0.5, per_group=True, drop_doubtful=True, in_spreads=True, embeddings=str(tmp_path / f"{place}.npy")
        )
        pairs = Dataset.from_list([table[k] for k in rows_of])
        made = filter_pairs(pairs, settings_of, tmp_path / f"cache{place}", held_out=[], seed=0)
        found.append({pairs[int(k)]["id"] for k in np.flatnonzero(made.kept)})
    assert found[0] == found[1] and "03" not in found[0]
    assert made.summary["dropped_by_rule"] == {"label_noise": 1} and made.summary["kept"] == 4
    assert {name: count["kept"] for name, count in made.summary["groups"].items()} == {"a": 2, "b": 2}
    no_margin = Dataset.from_list([row | {"margin": None if row["id"] == "02" else row["margin"]} for row in table])
    with pytest.raises(DataError, match="1 of 10 pairs have none"):
        filter_pairs(no_margin, FilterSection(), tmp_path / "cache2", held_out=[], seed=0)
    no_spread = Dataset.from_list([row | {"margin_std": None if row["id"] == "02" else 1.0} for row in table])
    with pytest.raises(DataError, match="margin_std: 1 of 10 pairs have none"):
        filter_pairs(no_spread, FilterSection(in_spreads=True), tmp_path / "cache2", held_out=[], seed=0)
    nobody = FilterSection(method="threshold", minimum=99.0, embeddings=str(tmp_path / "0.npy"))
    with pytest.raises(DataError, match=r"filter-empty.*an importance of 99 or more; the highest is \d"):
        filter_pairs(Dataset.from_list(table), nobody, tmp_path / "cache3", held_out=[], seed=0)
    with pytest.raises(AlignError, match=r"per_group.*; skip: no rule 'all'"):
        filter_pairs(
            no_margin.remove_columns("group"),
            FilterSection(per_group=True, skip=["all"]),
            tmp_path,
            held_out=[],
            seed=0,
        )


def align(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align.cli", "filter", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.model
def test_command_line(assets: Path, tmp_path: Path) -> None:
    """Kept and dropped are a partition with scores and reasons; the kept file is a valid pair file; text is escaped."""
    topics = ["ships", "bread", "stars", "chess", "rivers", "paint", "bees", "trains", "snow", "maps"]
    rows = [
        pair(f"Tell me about {t}", f"{t} are well worth knowing, here is why.", f"No idea about {t} at all.", f"id{k}")
        | {"margin": float(k) - 3, "group": "ab"[k % 2]}
        for k, t in enumerate(topics)
    ]
    rows.append(rows[2] | {"id": "id99"})
    rows[4]["prompt"] += " <script>alert(1)</script>"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = str(assets / "minilm")
    done = align(
        "run", "pairs.jsonl", "--output", "out", "--keep", "0.5", "--embedding-model", encoder, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    kept, dropped = (Dataset.from_parquet(str(tmp_path / "out" / f"{name}.parquet")) for name in ("kept", "dropped"))
    assert len(kept) == 5 and len(dropped) == 6 and set(kept["id"]) | set(dropped["id"]) == {row["id"] for row in rows}
    assert all(dropped["reason"]) and {"quality", "diversity", "importance", "margin"} <= set(kept.column_names)
    reasons = dict(zip(dropped["id"], dropped["reason"], strict=True))
    assert reasons["id99"] == "duplicate: same as id2"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "Content-Security-Policy" in page
    checked = subprocess.run(
        [sys.executable, "-m", "align.cli", "data", "check", "out/kept.parquet"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert checked.returncode == 0
    explained = align("explain", "out", "id99", folder=tmp_path)
    assert explained.returncode == 0 and json.loads(explained.stdout)["reason"] == "duplicate: same as id2"
    for arguments, message in (
        (["run", "pairs.jsonl", "--output", "o", "--method", "best", "--keep", "0"], "--keep: found 0"),
        (["run", "pairs.jsonl", "--output", "o", "--skip", "all"], "skip: no rule 'all'"),
        (["run", "pairs.jsonl", "--output", "o", "--method", "threshold"], "needs `minimum`"),
        (["run", "pairs.jsonl", "--output", "o", "--ood-model", "x"], "give both or neither"),
        (["run", "pairs.jsonl", "--output", "o", "--embedding-model", "nowhere"], "cannot be loaded as an encoder"),
        (["explain", "out", "nobody"], "no pair has id 'nobody'"),
        (["explain", "nowhere", "x"], "holds no filter.json"),
    ):
        wrong = align(*arguments, folder=tmp_path)
        assert wrong.returncode == 2 and message in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.model
def test_several_scorers_on_the_command_line(assets: Path, tmp_path: Path) -> None:
    """Each scorer is a column; shuffled words are less fluent; quality is the mean of the scaled columns."""
    sentence = "The best way to learn to cook is to begin with simple meals and to taste everything."
    salad = "begin taste The and cook best everything is to meals learn way with to to simple to."
    table = [
        pair(f"How do I learn it, question {k}?", f"{sentence} {k}", "I do not know that.", f"{k}") for k in range(4)
    ]
    table.append(pair("How do I learn it, at last?", salad, "I do not know that.", "salad"))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    np.save(tmp_path / "e.npy", unit(5, 8))
    scorers = [word for name in ("screen", "fluency", "rubric", "yes_no") for word in ("--quality-scorer", name)]
    done = align(
        "run", "pairs.jsonl", "--output", "out", "--embeddings", "e.npy", "--keep", "1", "--skip", "near_duplicate",
        "--quality-model", str(assets / "smollm2"), *scorers, folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept = Dataset.from_parquet(str(tmp_path / "out" / "kept.parquet")).to_pandas().set_index("id")
    assert kept["quality_fluency"].idxmin() == "salad" and (kept["quality_fluency"] < 0).all()
    assert kept["quality_rubric"].between(1, 5).all() and kept["quality_yes_no"].between(0, 1).all()
    names = [f"quality_{name}" for name in ("screen", "fluency", "rubric", "yes_no")]
    mean = np.mean([robust_scale(kept[name].to_numpy()) for name in names], axis=0)
    assert np.allclose(kept["quality"], mean, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "greedy", "per_group": True}, "per_group: found method greedy, expected top"),
        ({"minimum": 99.0}, "minimum: found method top, expected threshold"),
        ({"method": "greedy", "minimum": 1.0}, "minimum: found method greedy, expected threshold"),
        ({"method": "threshold", "minimum": 0.0, "keep": 0.5}, "keep: found method threshold"),
        ({"method": "threshold", "minimum": 0.0, "per_group": True}, "per_group: found method threshold, expected top"),
        ({"quality_model": "x"}, "quality_model: found no scorer that uses it"),
        ({"quality_scorers": ["rubric"]}, "quality_scorers: rubric: found no quality_model"),
        ({"embeddings": "e.npy", "embedding": "static"}, "embedding: found embeddings"),
        ({"held_out": "x", "skip": ["contamination"]}, "held_out: found the rule contamination in skip"),
        ({"language": "en", "skip": ["language"]}, "language: found the rule language in skip"),
        ({"drop_doubtful": True, "skip": ["label_noise"]}, "drop_doubtful: found the rule label_noise in skip"),
    ],
)
def test_options_that_nothing_uses_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """By the check of a run, and by the command before it reads the pairs."""
    tree = {"name": "r", "output_dir": str(tmp_path), "pairs": {"path": "nowhere.jsonl"}, "filter": options,
            "train": {"model": "nowhere", "methods": {"dpo": {"loss": "dpo"}}}}  # fmt: skip
    with pytest.raises(ConfigError, match=f"filter-option.*{message}"):
        check_config(RunConfig.model_validate(tree))
    source, cache = PairsSection(path="nowhere.jsonl"), tmp_path / "parts"
    with pytest.raises(ConfigError, match=f"filter-option.*{message}"):
        filter_source(source, FilterSection.model_validate(options), tmp_path, seed=0, cache=cache)


def test_what_took_all_pairs_is_said_and_written(tmp_path: Path) -> None:
    rows = [pair(f"question {k}", "write to jo@example.org", f"no {k}", f"{k}") for k in range(3)]
    rows += [pair("question 4", "yes", "YES", "4"), pair("question 5", "yes", "no", "5")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    output.mkdir()
    (output / "kept.parquet").write_text("of an earlier filter")
    source = PairsSection(path=str(tmp_path / "pairs.jsonl"))
    message = "found 1 of 5 pairs that pass the rules, expected at least 2; the rules dropped: pii 3, same_text 1"
    with pytest.raises(DataError, match=f"filter-empty.*{message}"):
        filter_source(source, FilterSection(), output, seed=0, cache=output / "parts")
    dropped = pq.read_table(output / "dropped.parquet").to_pydict()
    assert dropped["id"] == ["0", "1", "2", "4"] and not (output / "kept.parquet").exists()
    assert dropped["reason"] == ["pii: seems to contain: e-mail address"] * 3 + [
        "same_text: chosen and rejected differ in case or white space only"
    ]


def test_diversity_of_one_prompt_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "align")
    rows = [
        pair("which is better ?", f"film {k} is good", f"plot {k} is bad", f"{k}") | {"margin": k} for k in range(8)
    ]
    np.save(tmp_path / "e.npy", np.tile(unit(1, 4), (8, 1)))
    settings = FilterSection(embeddings=str(tmp_path / "e.npy"), quality=0.0)
    found = filter_pairs(Dataset.from_list(rows), settings, tmp_path / "cache", held_out=[], seed=0)
    assert found.summary["no_effect"] == ["diversity"] and np.flatnonzero(found.kept).tolist() == [4, 5, 6, 7]
    assert "diversity: found the same value for all pairs that pass the rules (equal prompts?)" in caplog.text
    write_filter_page(tmp_path / "page.html", found, "pairs")
    sentence = "Diversity is the same for all pairs that pass the rules, so it does not count."
    assert sentence in (tmp_path / "page.html").read_text()


def test_weights_of_zero_that_drop_pairs_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing ranks the pairs, so the smallest ids are kept; a broken rule does not hide it."""
    caplog.set_level(logging.WARNING, "align")
    rows = [pair(f"question {k}", f"film {k} is good", f"plot {k} is bad", f"{k}") | {"margin": k} for k in range(8)]
    rows[7]["rejected"] = rows[7]["chosen"].upper()
    np.save(tmp_path / "e.npy", unit(8, 4))
    settings = FilterSection(embeddings=str(tmp_path / "e.npy"), margin=0.0, quality=0.0, diversity=0.0, keep=3 / 7)
    found = filter_pairs(Dataset.from_list(rows), settings, tmp_path / "cache", held_out=[], seed=0)
    assert np.flatnonzero(found.kept).tolist() == [0, 1, 2]
    assert "importance: found the same value for all 7 pairs that pass the rules, so the 3 kept ones" in caplog.text


def test_columns_of_the_user_are_in_both_tables(tmp_path: Path) -> None:
    """Unchanged and in their rows, whichever pairs are kept."""
    own = [{"source": f"s{k}", "votes": k, "meta": {f"key {k % 2}": [k]}} for k in range(8)]
    rows = [pair(f"question {k}", f"film {k} is good", f"plot {k} is bad", f"{k}") | own[k] for k in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(tmp_path / "e.npy", unit(8, 4))
    settings = FilterSection(embeddings=str(tmp_path / "e.npy"), quality=0.0)
    source = PairsSection(path=str(tmp_path / "pairs.jsonl"))
    filter_source(source, settings, tmp_path / "out", seed=0, cache=tmp_path / "parts")
    tables = [pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist() for name in ("kept", "dropped")]
    assert [len(table) for table in tables] == [4, 4]
    for row in [*tables[0], *tables[1]]:
        found = {"source": row["source"], "votes": row["votes"], "meta": json.loads(row["meta"])}
        assert found == own[int(row["id"])]
    assert load_pairs(PairsSection(path=str(tmp_path / "out" / "kept.parquet")))["id"][:] == [
        r["id"] for r in tables[0]
    ]
