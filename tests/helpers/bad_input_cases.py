"""The table of malformed inputs: name, how it is made, the command that reads it, error code, part of the message."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from tests.helpers.bad_input_makers import (
    CHAT,
    GOOD,
    RUN,
    BadInput,
    Change,
    another_shape,
    config,
    cut,
    deep,
    edit,
    good_parquet,
    lines,
    model,
    more_tokens,
    no_end,
    no_template,
    not_text,
    parquet,
    pickled,
    raw,
    remote_code,
    remove,
    turn,
    twice,
    write_lines,
)

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
TINY = "name: tiny\npairs: {path: pairs.jsonl}\ntrain: {model: policy, methods: {madpo: {loss: madpo}}}\n"


def pairs_from(name: str) -> tuple[str, ...]:
    """The run command with another pair file."""
    return (*RUN, "--set", f"pairs.path={name}")


def setting(*overrides: str) -> tuple[str, ...]:
    """The run command with overrides."""
    return (*RUN, *(part for override in overrides for part in ("--set", override)))


def asked(prompts: str) -> tuple[str, ...]:
    """The run command with an evaluation on these prompts."""
    return setting(f"evaluate.prompts={prompts}", "evaluate.judge=vader")


def nothing(folder: Path) -> None:
    """Change nothing: the command itself is wrong."""


def cases() -> Iterator[tuple[str, BadInput]]:
    """Every case as (kind, case)."""
    yield from (("Pair files", case) for case in pair_cases())
    yield from (("Run files", case) for case in config_cases())
    yield from (("Model folders", case) for case in model_cases())


def pair_cases() -> Iterator[BadInput]:
    """Pair and prompt files."""
    jsonl, csv, table = pairs_from("bad.jsonl"), pairs_from("bad.csv"), pairs_from("bad.parquet")
    made: list[tuple[str, Change, tuple[str, ...], str, str]] = [
        ("no file", nothing, pairs_from("nowhere.jsonl"), "data-missing", "nowhere.jsonl: no such file"),
        ("no file at an absolute path", nothing, pairs_from("/nowhere"), "data-missing", "found nothing, expected"),
        ("a folder called bad.jsonl", lambda f: (f / "bad.jsonl").mkdir(), jsonl, "data-missing", "found a folder"),
        ("a folder that is no dataset", nothing, pairs_from("policy"), "data-unreadable", "policy: not a folder"),
        ("an unknown file type", raw("bad.txt", b"hello"), pairs_from("bad.txt"), "data-missing", "ending in '.txt'"),
        ("a gzip file", raw("bad.jsonl", b"\x1f\x8b\x08\x00rest"), jsonl, "data-encoding", "not UTF-8 (byte 1"),
        ("an empty JSONL file", raw("bad.jsonl", b""), jsonl, "data-empty", "holds no rows"),
        ("blank lines alone", raw("bad.jsonl", b"\n\n \n"), jsonl, "data-empty", "holds no rows"),
        ("Latin-1 text", raw("bad.jsonl", '{"prompt": "é"}'.encode("latin1")), jsonl, "data-encoding", "iconv -f latin1"),
        ("UTF-16 text", raw("bad.jsonl", json.dumps(GOOD).encode("utf-16")), jsonl, "data-encoding", "not UTF-8"),
        ("not JSON", lines("{not json"), jsonl, "data-row", "bad.jsonl:row 2:(row): found invalid JSON"),
        ("a line cut in the middle", lines('{"prompt": "a", "cho'), jsonl, "data-row", "row 2:(row): found invalid JSON"),
        ("a JSON array in one file", lines("[1, 2]"), jsonl, "data-row", "found a JSON list, expected an object"),
        ("JSON nested 100,000 deep", lines(deep(100_000)), jsonl, "data-row", "nested too deeply"),
        ("a key twice", lines('{"prompt":"a","chosen":"b","chosen":"c","rejected":"d"}'), jsonl, "data-row", "'chosen' twice"),
        ("a number of 10,000 digits", lines({**GOOD, "margin": 1} | {}, '{"margin": 1' + "0" * 10_000 + "}"), jsonl, "data-row", "row 3"),
        ("NaN as margin", lines({**GOOD, "margin": float("nan")}), jsonl, "pair-number", "row 2:margin: found nan"),
        ("infinity as margin", lines({**GOOD, "margin": float("inf")}), jsonl, "pair-number", "row 2:margin: found inf"),
        ("a margin beyond floats", lines({**GOOD, "margin": 10**400}), jsonl, "pair-number", "expected a finite number"),
        ("a word as margin", lines({**GOOD, "margin": "big"}), jsonl, "pair-number", "found 'big'"),
        ("true as margin", lines({**GOOD, "margin": True}), jsonl, "pair-number", "found True"),
        ("a negative weight", lines({**GOOD, "weight": -1}), jsonl, "pair-number", "a number that is not negative"),
        ("no column `chosen`", lambda f: write_lines(f / "bad.jsonl", {"prompt": "a", "chosn": "b"}), jsonl, "data-column",
         "no column 'chosen' (did you mean `chosn`?)"),
        ("a mapped column that is not there", lines(), (*jsonl, "--set", "pairs.columns={prompt: question}"), "data-column",
         "column 'question', mapped to 'prompt', is not there"),
        ("no text", lines({**GOOD, "chosen": None}), jsonl, "pair-missing", "row 2:chosen: found nothing"),
        ("blank text", lines({**GOOD, "rejected": " \t "}), jsonl, "pair-empty", "row 2:rejected: found empty text"),
        ("a number as text", lines({**GOOD, "prompt": 7}), jsonl, "pair-type", "row 2:prompt: found 7"),
        ("lists in lists", lines({**GOOD, "chosen": [[["a"]]]}), jsonl, "pair-message", "row 2:chosen[1]: found [['a']]"),
        ("text and messages in one row", lines({**CHAT, "chosen": "hi"}), jsonl, "pair-mixed", "chosen text, rejected messages"),
        ("a text prompt of other conversations", lines({**CHAT, "prompt": "bye", "chosen": CHAT["prompt"] + CHAT["chosen"]}),
         jsonl, "pair-mixed", "a prompt text that the responses do not begin with"),
        ("text rows and message rows", lines(CHAT), jsonl, "pair-mixed", "row 2:prompt: found conversational"),
        ("an unknown role", lines({**CHAT, "chosen": [turn("bot", "hi")]}), jsonl, "pair-role", "found role 'bot'"),
        ("a message without content", lines({**CHAT, "chosen": [{"role": "assistant"}]}), jsonl, "pair-message", "row 2:chosen[1]"),
        ("a picture as content", lines({**CHAT, "chosen": [turn("assistant", [{"type": "image"}])]}), jsonl, "pair-message",
         "expected {type: text"),
        ("a prompt that ends with the assistant", lines({**CHAT, "prompt": CHAT["chosen"]}), jsonl, "pair-role",
         "found a last message by assistant"),
        ("messages as text that is not JSON", lines({**CHAT, "chosen": "[{'role': 'user', 'content': 'a'} {}]"}), jsonl,
         "pair-message", "expected messages as JSON"),
        ("equal responses", lines({**GOOD, "rejected": " yes"}), jsonl, "pair-equal", "found the same as chosen"),
        ("nothing shared, no prompt", lambda f: write_lines(f / "bad.jsonl", {"chosen": "yes", "rejected": "no"}), jsonl,
         "pair-no-prompt", "no shared beginning"),
        ("an id twice", lines({**GOOD, "id": 1}, {**GOOD, "id": 1}), jsonl, "pair-duplicate-id", "row 2 has it too"),
        ("a null character", lines({**GOOD, "chosen": "a\0b"}), jsonl, "pair-text", "found a null character at position 2"),
        ("a lone surrogate", lines('{"prompt": "a", "chosen": "x\\ud800", "rejected": "b"}'), jsonl, "pair-text", "a lone surrogate"),
        ("a text of 10 MB", lines({**GOOD, "chosen": "ab " * 3_500_000}), jsonl, "pair-text", "found 10,500,000 characters"),
        ("a CSV with a header alone", raw("bad.csv", b"prompt,chosen,rejected\n"), csv, "data-empty", "holds no rows"),
        ("a CSV with a column twice", raw("bad.csv", b"prompt,chosen,chosen\na,b,c\n"), csv, "data-column", "'chosen' is there twice"),
        ("a CSV with a row too short", raw("bad.csv", b"prompt,chosen,rejected\na,b\n"), csv, "data-row", "found 2 fields, expected 3"),
        ("a stray quote in a CSV", raw("bad.csv", b'prompt,chosen,rejected\n"a"b,c,d\n'), csv, "data-unreadable", "bad.csv:line 2"),
        ("an unclosed quote in a CSV", raw("bad.csv", b'prompt,chosen,rejected\n"a,b,c\nd,e,f\n'), csv, "data-unreadable", "bad.csv:line"),
        ("a semicolon CSV", raw("bad.csv", b"prompt;chosen;rejected\na;b;c\n"), csv, "data-column", "no column 'chosen'"),
        ("a UTF-8 mark twice", raw("bad.csv", b"\xef\xbb\xbf\xef\xbb\xbfchosen,rejected\na b,a c\n"), csv, "data-column", "no column 'chosen'"),
        ("null bytes in a CSV", raw("bad.csv", b"prompt,chosen,rejected\na,b\0,c\n"), csv, "pair-text", "null character"),
        ("an empty Parquet file", raw("bad.parquet", b""), table, "data-unreadable", "not a readable Parquet file"),
        ("text called .parquet", raw("bad.parquet", b"PAR1 not really"), table, "data-unreadable", "not a readable Parquet"),
        ("a Parquet file cut off", cut("bad.parquet", good_parquet, 0.6), table, "data-unreadable", "not a readable Parquet"),
        ("a Parquet table without rows", parquet({name: pa.array([], pa.string()) for name in GOOD}), table, "data-empty", "holds no rows"),
        ("a Parquet column twice", twice, table, "data-column", "'chosen' is there twice"),
        ("Parquet text that is not UTF-8", not_text, table, "data-encoding", "not UTF-8"),
        ("bytes in a Parquet column", parquet({**{k: [v] for k, v in GOOD.items()}, "chosen": [b"\x01"]}), table, "pair-type",
         "row 1:chosen: found b'\\x01'"),
        ("no prompts file", nothing, asked("nowhere.jsonl"), "data-missing", "nowhere.jsonl: no such file"),
        ("prompts that are numbers", lambda f: write_lines(f / "p.jsonl", {"prompt": 3}), asked("p.jsonl"),
         "prompt-row", "p.jsonl:row 1:prompt: found 3"),
        ("prompts with broken messages", lambda f: write_lines(f / "p.jsonl", {"prompt": [1]}), asked("p.jsonl"),
         "prompt-row", "p.jsonl:row 1:prompt[1]"),
        ("an empty prompts file", raw("p.jsonl", b""), asked("p.jsonl"), "data-empty", "p.jsonl: holds no rows"),
        ("a margin that a loss needs and no pair has", lines(), jsonl, "loss-needs-margin", "needs a `margin` column"),
        ("a margin that a loss needs and one pair lacks", lines({**GOOD, "margin": 1.0}), jsonl, "loss-needs-margin",
         "margin: 1 of 2 pairs have none"),
        ("prompts with a lone surrogate", raw("p.jsonl", b'{"prompt": "a \\ud83d b"}\n'), asked("p.jsonl"),
         "prompt-row", "a lone surrogate"),
    ]  # fmt: skip
    yield from (BadInput(*case) for case in made)


def config_cases() -> Iterator[BadInput]:
    """Run files and overrides."""
    made: list[tuple[str, Change, tuple[str, ...], str, str]] = [
        ("no run file", nothing, ("run", "nowhere.yaml"), "config-file", "nowhere.yaml: cannot be read"),
        ("a folder as run file", nothing, ("run", "policy"), "config-file", "policy: cannot be read (Is a directory)"),
        ("an empty run file", config(""), RUN, "config-yaml", "found NoneType"),
        ("a list as run file", config("- a\n"), RUN, "config-yaml", "found list"),
        ("an unclosed bracket", config("name: [unclosed"), RUN, "config-yaml", "not valid YAML"),
        ("a tab as indentation", config("name: tiny\npairs:\n\tpath: x\n"), RUN, "config-yaml", "line 3"),
        ("bytes that are not UTF-8", raw("run.yaml", b"name: \xff\xfe"), RUN, "config-yaml", "not valid YAML"),
        ("a null byte", raw("run.yaml", b"name: a\0b"), RUN, "config-yaml", "not valid YAML"),
        ("a tag that makes a Python object", config("name: !!python/object/apply:os.system ['true']"), RUN, "config-yaml",
         "could not determine a constructor"),
        ("an alias of nothing", config("name: *nothing"), RUN, "config-yaml", "found undefined alias"),
        ("an anchor inside itself", config("name: &a [*a]"), RUN, "config-yaml", "an anchor that contains itself"),
        ("an anchor bomb (a billion laughs)", config(BOMB), RUN, "config-yaml", "more than 100,000 values"),
        ("brackets nested 10,000 deep", config("name: " + "[" * 10_000), RUN, "config-yaml", "nested deeper than 64"),
        ("a run file of 2 MB", config("name: " + "x" * 2_000_000), RUN, "config-yaml", "2,000,006 characters"),
        ("a key of YAML twice", config(TINY + "name: other\n"), RUN, "config-yaml", "the key 'name' twice (line 4)"),
        ("a list as key", config("[1, 2]: x"), RUN, "config-yaml", "unhashable"),
        ("a date that is none", config("name: 2026-99-99"), RUN, "config-yaml", "not valid YAML"),
        ("a number as key", config(TINY + "7: x\n"), RUN, "config-key", "7"),
        ("an unknown key", config(TINY + "trian: {}\n"), RUN, "config-key", "trian: unknown key (did you mean `train`?)"),
        ("a missing key", config("name: tiny\npairs: {path: p}\ntrain: {methods: {a: {loss: dpo}}}"), RUN, "config-key",
         "train.model: missing key"),
        ("text where a section is wanted", nothing, setting("train=hello"),
         "config-key", "train: expected"),
        ("a section where text is wanted", nothing, setting("name={a: b}"), "config-key", "name: expected a valid string"),
        ("a run name that leaves the folder", nothing, setting("name=../../etc"), "config-key", "name: expected a name"),
        ("a method name that is a path", nothing, setting("train.methods.a/b={loss: dpo}"), "config-key", "expected a name"),
        ("trl's field for a loss", nothing, setting("train.trainer.loss_type=ipo"), "trainer-key",
         "train.trainer.loss_type: has no meaning here"),
        ("a chat template for a reward model alone", nothing, setting("reward={model: policy, trainer: {chat_template_path: t.jinja}}"),
         "trainer-key", "reward.trainer.chat_template_path: has no meaning here"),
        ("another end of text for a reward model", nothing, setting("reward={model: policy, trainer: {eos_token: good}}"),
         "trainer-key", "reward.trainer.eos_token: has no meaning here"),
        ("a reward model's weights in 16 bits", nothing, setting("reward={model: policy, trainer: {model_init_kwargs: {dtype: bfloat16}}}"),
         "trainer-key", "weights are loaded as float32"),
        ("an evaluation without held-out pairs", nothing, setting("train.trainer.eval_steps=20"), "trainer-key",
         "train.trainer.eval_steps: found 20, which has no effect here: nothing is held out without train.eval_pairs"),
        ("pairs that a reward model's training would hold back", nothing,
         setting("reward={model: policy, trainer: {eval_strategy: steps}}"), "trainer-key",
         "reward.trainer.eval_strategy: found 'steps', which has no effect here: a training here holds no pairs back"),
        ("an evaluation without a judge", nothing, setting("evaluate.prompts=p.jsonl"), "config-key", "there is no default judge"),
        ("a judge that does not exist", nothing, setting("evaluate.prompts=p.jsonl", "evaluate.judge=vadr"), "judge-name",
         "judge 'vadr' is not known (did you mean `vader`?)"),
        ("held-out pairs that are not evaluated", nothing,
         setting("train.eval_pairs={share: 0.3}", "train.trainer.eval_strategy=no"), "eval-config",
         "train.trainer.eval_strategy: found no together with train.eval_pairs, expected steps or epoch"),
        ("a metric that is not measured", nothing,
         setting("train.eval_pairs={share: 0.3}", "train.trainer.metric_for_best_model=accurcy"), "eval-config",
         "train.trainer.metric_for_best_model: found 'accurcy', which is not measured"),
        ("a rule that reads held-out pairs, without them", nothing, setting("train.keep={rule: held_out_loss}"),
         "eval-config", "train.keep.rule: found held_out_loss and no train.eval_pairs"),
        ("a rule that reads samples, without a judge", nothing,
         setting("train.eval_pairs={share: 0.3}", "train.eval_samples={every: 2}", "train.keep={rule: win_rate}"),
         "eval-config", "train.keep.rule: found win_rate and no judge"),
        ("a rule that does not exist", nothing, setting("train.keep={rule: best}"), "config-key",
         "train.keep.rule: expected 'held_out_loss', 'win_rate' or 'gold_per_root_kl'"),
        ("held-out pairs that are trained on", nothing, setting("train.eval_pairs={path: pairs.jsonl}"), "eval-overlap",
         "pairs are trained on (by id or by prompt and response)"),
        ("a share and a source of held-out pairs", nothing, setting("train.eval_pairs={path: pairs.jsonl, share: 0.1}"),
         "config-key", "expected `path` (a source of pairs) or `share` (of the run's own), found both"),
        ("a misspelt column of the pair table", nothing, setting("pairs.columns={weigth: w}"), "config-key",
         "'weigth' is not a column of the pair table (did you mean `weight`?)"),
        ("a method called reference", nothing, setting("train.methods.reference={loss: dpo}"), "config-key",
         "the model that is trained from"),
        ("a negative seed", nothing, setting("seed=-1"), "config-key", "seed: expected greater than or equal to 0"),
        ("a seed beyond 32 bits", nothing, setting("seed=99999999999"), "config-key", "seed: expected less than 4294967296"),
        ("a word as number", nothing, setting("seed=many"), "config-key", "seed: expected a valid integer"),
        ("NaN as parameter", nothing, setting("train.methods.madpo.parameters.beta=.nan"), "config-key", "finite number"),
        ("an unknown loss", nothing, setting("train.methods.madpo.loss=madpoo"), "loss-name", "did you mean `madpo`?"),
        ("an unknown parameter", nothing, setting("train.methods.madpo.parameters.bta=1"), "loss-parameter", "did you mean `beta`?"),
        ("a parameter out of range", nothing, setting("train.methods.madpo.parameters.c_max=0.5"), "madpo-parameters", "found 0.5"),
        ("an unknown trainer field", nothing, setting("train.trainer.learning_rat=1"), "trainer-key", "did you mean `learning_rate`?"),
        ("a word as learning rate", nothing, setting("train.trainer.learning_rate=fast"), "trainer-key", "found 'fast', expected a number"),
        ("a negative learning rate", nothing, setting("train.trainer.learning_rate=-1"), "trainer-key", "learning_rate"),
        ("no pair per step", nothing, setting("train.trainer.per_device_train_batch_size=0"), "trainer-key", "per_device_train_batch_size"),
        ("no accumulation step", nothing, setting("train.trainer.gradient_accumulation_steps=0"), "trainer-key", "gradient_accumulation_steps"),
        ("an unknown optimizer", nothing, setting("train.trainer.optim=adamm"), "trainer-key", "adamm"),
        ("an unknown schedule", nothing, setting("train.trainer.lr_scheduler_type=square"), "trainer-key", "square"),
        ("an unknown save strategy", nothing, setting("train.trainer.save_strategy=sometimes"), "trainer-key", "sometimes"),
        ("a field that the program sets", nothing, setting("train.trainer.output_dir=x"), "trainer-key", "set by the program"),
        ("an unknown reporter", nothing, setting("train.trainer.report_to=nothing_like_it"), "trainer-key", "nothing_like_it"),
        ("an unknown adapter field", nothing, setting("train.peft.rr=1"), "peft-key", "train.peft.rr"),
        ("an adapter of rank 0", nothing, setting("train.peft.r=0"), "adapter", "`r` should be a positive integer"),
        ("an adapter on modules that are not there", nothing, setting("train.peft.target_modules=[nothing]"), "adapter", "nothing"),
        ("an override without a value", nothing, setting("seed"), "config-override", "expected key.path=value"),
        ("an override through a value", nothing, setting("name.x=1"), "config-override", "name is a value"),
        ("an output folder that is a file", raw("taken", b""), setting("output_dir=taken"), "output-folder", "taken"),
        ("an unknown log level", nothing, ("--log-level", "loud", *RUN), "config-option", "--log-level loud"),
        ("no report to render", nothing, ("report", "policy"), "report-missing", "holds no report.json"),
        ("a broken report.json", raw("report.json", b"{"), ("report", "."), "report-missing", "report.json"),
    ]  # fmt: skip
    yield from (BadInput(*case) for case in made)


def model_cases() -> Iterator[BadInput]:
    """Model folders, adapters, tokenizers."""
    policy, scorer = (
        setting("train.model=bad-model"),
        ("reward", "score", "pairs.jsonl", "--model", "bad-model", "--output", "o"),
    )
    chat = ("reward", "score", "chat.jsonl", "--model", "bad-model", "--output", "o")

    def conversational(folder: Path) -> None:
        write_lines(folder / "chat.jsonl", CHAT)
        model(no_template)(folder)

    def scored(folder: Path) -> None:
        write_lines(folder / "chat.jsonl", CHAT)
        model(no_template, source="backbone")(folder)

    made: list[tuple[str, Change, tuple[str, ...], str, str]] = [
        ("no such model folder", nothing, setting("train.model=./nowhere"), "model-load", "'./nowhere': found nothing"),
        ("a file as model", nothing, setting("train.model=pairs.jsonl"), "model-load", "found a file, expected a model folder"),
        ("an empty model folder", lambda f: (f / "bad-model").mkdir(), policy, "model-config", "bad-model/config.json: cannot be read"),
        ("no config.json", model(remove("config.json")), policy, "model-config", "config.json: cannot be read"),
        ("a broken config.json", model(lambda f: (f / "config.json").write_text('{"model_type": ')), policy, "model-config",
         "config.json: not valid JSON"),
        ("a list as config.json", model(lambda f: (f / "config.json").write_text("[]")), policy, "model-config", "found a JSON list"),
        ("an unknown model type", model(edit("config.json", model_type="nothing_like_it")), policy, "model-load", "nothing_like_it"),
        ("a model width that does not fit", model(edit("config.json", hidden_size=48)), policy, "model-load", "bad-model: cannot be loaded"),
        ("no tokenizer", model(remove("token*", "special*", "chat*", "vocab*")), policy, "model-tokenizer", "bad-model: no tokenizer"),
        ("a broken tokenizer.json", model(lambda f: (f / "tokenizer.json").write_text("{")), policy, "model-load", "no tokenizer can be loaded"),
        ("a tokenizer with more tokens than the model", model(more_tokens), policy, "model-vocabulary", "the model embeds"),
        ("a tokenizer that can neither pad nor end a text", model(no_end), policy, "model-tokenizer", "neither a padding nor"),
        ("no weights", model(remove("*.safetensors")), policy, "model-load", "no weights, expected model.safetensors"),
        ("weights cut off", model(cut("model.safetensors", lambda f: f / "model.safetensors", 0.5)), policy, "model-load",
         "the file is incomplete"),
        ("weights that are an HTML page", model(raw("model.safetensors", b"<html>404 not found</html>")), policy, "model-load",
         "not a safetensors file"),
        ("a missing shard", model(lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')), policy, "model-load", "model-00002-of-00002.safetensors is not there"),
        ("pickled weights", model(pickled("model", "pytorch_model.bin")), policy, "model-pickle", "convert it: python -c"),
        ("pickled reward weights", model(pickled("model", "pytorch_model.bin"), "backbone"), scorer, "model-pickle",
         "BertForSequenceClassification"),
        ("a pickled adapter", model(pickled("adapter_model", "adapter_model.bin"), "adapter"), policy, "model-pickle", "adapter_model.bin"),
        ("an adapter without its base", model(edit("adapter_config.json", base_model_name_or_path="./gone"), "adapter"), policy,
         "model-load", "the base model cannot be used: './gone'"),
        ("an adapter that names no base", model(edit("adapter_config.json", base_model_name_or_path=None), "adapter"), policy,
         "model-config", "base_model_name_or_path: found None"),
        ("an adapter of another width", model(another_shape, "adapter"), policy, "model-load", "size mismatch"),
        ("an adapter on modules that the base lacks", model(edit("adapter_config.json", target_modules=["gone"]), "adapter"), policy,
         "model-load", "gone"),
        ("an adapter of an unknown kind", model(edit("adapter_config.json", peft_type="NOTHING"), "adapter"), policy, "adapter", "NOTHING"),
        ("a reward model with two outputs", nothing, ("reward", "score", "pairs.jsonl", "--model", "two-labels", "--output", "o"),
         "reward-labels", "two-labels: its classification head has 2 outputs"),
        ("a policy as reward model", nothing, ("reward", "score", "pairs.jsonl", "--model", "policy", "--output", "o"),
         "model-load", "policy: has no weights score.weight, so it is not a reward model"),
        ("conversational pairs, no chat template", scored, chat, "no-chat-template", "no chat template"),
        ("conversational pairs, no chat template, a whole run", conversational, (*policy, "--set", "pairs.path=chat.jsonl"),
         "no-chat-template", "no chat template"),
        ("a model that needs its own code", model(remote_code), policy, "model-load", "bad-model"),
        ("no token of a response within the limit", nothing, ("entangle", "report", "pairs.jsonl", "--model", "policy", "--output", "o",
         "--max-length", "3"), "empty-completion", "within 3 tokens"),
    ]  # fmt: skip
    yield from (BadInput(*case) for case in made)
