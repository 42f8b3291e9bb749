"""Pairwise judges, which prefer one of two responses; a judge that gives scores is one as well.

Names of judges: ``vader`` is the sentiment lexicon; a folder or hub id is a reward model; ``llm:MODEL`` is a language
model that is asked which of two responses is better, ``server:MODEL`` the same by an OpenAI-compatible server;
``yes-no:MODEL`` is asked for each response whether it is good.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from align.data.text import plain
from align.errors import ConfigError, DataError
from align.io.console import progress
from align.models.batching import token_batches
from align.models.folders import fingerprint_model
from reward_models.judges import JUDGES, YES_NO, Judge, make_judge
from reward_models.loading import DEFAULTS, LoadOptions, not_of_a_judge
from reward_models.questions import LANGUAGE_MODEL, QUESTION, REWARD_SERVER, SERVER
from reward_models.score import REWARDS

BATCH_TOKENS = 4096
MAX_LENGTH = 1024
LABELS = (" A", " B")
FIELDS = r"\{prompt\}|\{first\}|\{second\}"
ANSWER = "The better response is Response"
"""Start of the judge's answer; the next token is a label."""


@runtime_checkable
class PairwiseJudge(Protocol):
    """Prefers one of two responses; it is asked in both orders, to cancel position bias."""

    name: str

    def prefer(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> np.ndarray:
        """Preference for the first response, [N] in [0, 1]: 1 the first, 0 the second, 0.5 a tie."""


class ByScore:
    """Prefers the response with the larger score of a judge; equal scores are a tie."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.name = judge.name

    def prefer(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> np.ndarray:
        """1 if the first scores higher, 0 if lower, 0.5 if equal, [N]."""
        found = [numbers_of(self.judge, self.judge.score(prompts, texts), len(texts)) for texts in (first, second)]
        return from_scores(*found)


class RewardModelJudge:
    """A reward model as a judge; not an independent one of policies that were trained on its rewards or margins.

    Args:
        model: folder or hub id.
        max_length: tokens per text; longer ones are cut from the right.
        options: how it is loaded and reads texts.

    Raises:
        ModelError: it cannot be loaded as a reward model.
    """

    def __init__(self, model: str, *, max_length: int = MAX_LENGTH, options: LoadOptions = DEFAULTS) -> None:
        from reward_models.ensemble import EnsembleScorer

        self.name = model
        self.options = options
        self._scorer = EnsembleScorer(model, batch_tokens=BATCH_TOKENS, max_length=max_length, options=options)

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Reward of each, float64 [N]."""
        return self._scorer.score_completions(prompts, completions)


class LanguageModelJudge:
    """A causal language model that reads both responses and names one.

    Its preference is P(A) / (P(A) + P(B)), the probabilities of the two labels as the next token; the question is
    formatted by the chat template if there is one. Texts are never encoded as special tokens, so a response cannot end
    its turn and answer for the judge. If the texts do not fit, the prompt is cut from the left and both responses from
    the right, to the same length; the question itself is never cut.

    Args:
        model: folder or hub id.
        max_length: tokens of one question.
        dtype: dtype of the weights.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: the two labels end in the same token, or the chat template changes the question.
    """

    def __init__(self, model: str, *, max_length: int = MAX_LENGTH, dtype: str = "float32") -> None:
        import torch

        from align.models.loading import load_policy, load_tokenizer

        self.name = LANGUAGE_MODEL + model
        self._tokenizer = load_tokenizer(model)
        self._labels = [self._tokenizer(label, add_special_tokens=False)["input_ids"][-1] for label in LABELS]
        if self._labels[0] == self._labels[1]:
            raise ConfigError(
                f"judge {self.name}: its tokenizer reads {LABELS[0]!r} and {LABELS[1]!r} as the same token",
                code="eval-judge",
                hint="use another language model",
            )
        self._frame = self._pieces()
        self._room = max_length - sum(len(piece) for piece in self._frame)
        self._model = load_policy(model, dtype=dtype).to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def prefer(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> np.ndarray:
        """Probability of the label of the first response relative to both labels, [N]."""
        import torch

        from align.models.tokenization import pad

        rows = [self._question(*texts) for texts in zip(prompts, first, second, strict=True)]
        found = np.empty(len(rows))
        batches = token_batches([len(row) for row in rows], BATCH_TOKENS)
        device = self._model.device
        with torch.inference_mode():
            for batch in progress(batches, what="judging", total=len(batches), unit="batches"):
                padded = pad([rows[k] for k in batch], self._tokenizer.pad_token_id)
                ids, mask = (part.to(device) for part in padded)
                logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                last = torch.tensor([len(rows[k]) - 1 for k in batch], device=device)
                labels = logits[torch.arange(len(batch), device=device), last][:, self._labels].double()
                found[batch] = labels.softmax(dim=-1)[:, 0].cpu().numpy()
        return found

    def _pieces(self) -> list[list[int]]:
        """Token ids of the four pieces of the question around the three texts."""
        from align.models.tokenization import apply_template, encode_prompt

        as_text = self._tokenizer.chat_template is None
        text = QUESTION
        if not as_text:
            turn = [{"role": "user", "content": QUESTION.strip()}]
            text = str(apply_template(turn, self._tokenizer, generation_prompt=True))
        pieces = re.split(FIELDS, text + ANSWER)
        if len(pieces) != 4:
            raise ConfigError(
                f"judge {self.name}: its chat template changes the text of a message",
                code="eval-judge",
                hint="use another language model",
            )
        found = [list(self._tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]
        return [encode_prompt(pieces[0], self._tokenizer), *found[1:]] if as_text else found

    def _question(self, prompt: Any, first: Any, second: Any) -> list[int]:
        asked, one, other = (self._text_ids(plain(text)) for text in (prompt, first, second))
        asked = asked[max(0, len(asked) - max(0, self._room // 3)) :]
        share = max(0, self._room - len(asked)) // 2
        before, between, among, after = self._frame
        return [*before, *asked, *between, *one[:share], *among, *other[:share], *after]

    def _text_ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def prefer_in_both_orders(
    judge: PairwiseJudge, prompts: Sequence[Any], ours: Sequence[Any], theirs: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Preference for ours when it is shown first and when it is shown second, [N] each, in [0, 1].

    A judge that scores single responses does not see the order and is asked once.

    Raises:
        DataError: the judge gives something else than N numbers in [0, 1].
    """
    first = _preferences(judge, judge.prefer(prompts, ours, theirs), len(ours))
    return first, first if isinstance(judge, ByScore) else 1 - _preferences(
        judge, judge.prefer(prompts, theirs, ours), len(ours)
    )


def _preferences(judge: PairwiseJudge, given: Any, count: int) -> np.ndarray:
    values = numbers_of(judge, given, count)
    if (outside := ~((values >= 0) & (values <= 1))).any():
        raise _no_verdict(judge, f"the preference {values[outside][0]} for completion {int(outside.argmax())}", count)
    return values


def numbers_of(judge: Judge | PairwiseJudge, given: Any, count: int) -> np.ndarray:
    """What a judge returned, one number each, float64 [count].

    Raises:
        DataError: it is something else.
    """
    try:
        values = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    except (TypeError, ValueError) as error:
        raise _no_verdict(judge, f"a {type(given).__name__} that is no array", count) from error
    if values.dtype.kind not in "biuf":
        raise _no_verdict(judge, f"{given!r:.60}", count)
    if values.shape != (count,):
        raise _no_verdict(judge, f"an array of shape {values.shape}", count)
    return values.astype(np.float64)


def _no_verdict(judge: Judge | PairwiseJudge, found: str, count: int) -> DataError:
    return DataError(
        f"judge {judge.name}: found {found}, expected {count} preferences in [0, 1], or finite scores",
        code="eval-judge",
        hint="return a list or an array with one number for each completion",
    )


def make_pairwise(
    name: str,
    max_length: int | None = None,
    options: LoadOptions = DEFAULTS,
    dtype: str = "float32",
    *,
    base_url: str | None = None,
    cache: Path | None = None,
) -> PairwiseJudge:
    """The pairwise judge with this name: ``llm:MODEL``, ``server:MODEL`` or a judge that gives scores.

    Args:
        name: name of the judge, see the module.
        max_length: tokens per text of a reward model, or per question of an ``llm:`` judge; None: 1024.
        options: how a reward model is loaded and reads texts.
        dtype: dtype of the weights of an ``llm:`` judge.
        base_url: address of the server of a ``server:`` or ``reward-server:`` judge.
        cache: file that keeps the answers of a ``server:`` judge, so that none is asked for twice.

    Raises:
        ConfigError: there is no such judge, or it takes no ``max_length``.
        ModelError: the model cannot be loaded.
    """
    if name.startswith(LANGUAGE_MODEL):
        if options != DEFAULTS:
            raise not_of_a_judge(name)
        return LanguageModelJudge(name.removeprefix(LANGUAGE_MODEL), max_length=max_length or MAX_LENGTH, dtype=dtype)
    if name.startswith(SERVER):
        from reward_models.server_judge import ServerJudge

        if options != DEFAULTS or max_length is not None:
            raise not_of_a_judge(name)
        return ServerJudge(name.removeprefix(SERVER), base_url=base_url, cache=cache)
    return ByScore(make_score_judge(name, max_length, options, base_url))


def make_score_judge(
    name: str, max_length: int | None = None, options: LoadOptions = DEFAULTS, base_url: str | None = None
) -> Judge:
    """The judge with this name that gives scores: ``vader``, ``yes-no:MODEL`` or a reward model, here or on a server.

    Args:
        name: name of the judge, see the module.
        max_length: tokens per text of a reward model; None: 1024.
        options: how a reward model is loaded and reads texts.
        base_url: address of the server of a ``reward-server:`` judge.

    Raises:
        ConfigError: there is no such judge, it gives no scores, or it takes no ``max_length``.
        ModelError: the model cannot be loaded.
    """
    if name.startswith((LANGUAGE_MODEL, SERVER)):
        raise ConfigError(
            f"judge {name}: only says which of two is better, expected a judge that gives scores",
            code="eval-judge",
            hint="use `align eval compare` with it, or a reward model here",
        )
    if name.startswith(REWARD_SERVER):
        from reward_models.reward_server import RewardServerJudge

        if options != DEFAULTS:
            raise not_of_a_judge(name)
        return RewardServerJudge(name.removeprefix(REWARD_SERVER), base_url=base_url, max_length=max_length)
    asks = name.startswith(f"{YES_NO}:")
    if name not in JUDGES and not asks and ("/" in name or Path(name).is_dir()):
        return RewardModelJudge(name, max_length=max_length or MAX_LENGTH, options=options)
    if options != DEFAULTS:
        raise not_of_a_judge(name)
    if max_length is not None:
        raise ConfigError(
            f"--max-length: found {max_length} for the judge {name}, expected a reward model or llm:MODEL",
            code="eval-judge",
            hint="leave it out",
        )
    return make_judge(name)


def judge_key(name: str, options: LoadOptions = DEFAULTS) -> str:
    """Cache key of the verdicts of a judge: its name, content of its model, revision of the scoring."""
    if name in JUDGES or name.startswith(SERVER):
        return name
    kind = next((kind for kind in (LANGUAGE_MODEL, REWARD_SERVER, f"{YES_NO}:") if name.startswith(kind)), "")
    return f"{kind}{REWARDS}:{fingerprint_model(name.removeprefix(kind))}{options.suffix}"


def from_scores(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Preference for the first, [N], from the scores [N] of both: 1, 0, or 0.5 if they are equal."""
    return 0.5 + 0.5 * np.sign(np.asarray(first) - np.asarray(second))
