"""A hub that cannot be reached: one request, one warning, then the cache, in place of a minute of retries."""

import logging
from pathlib import Path

import pytest
from huggingface_hub import constants

from align.api import filter_pairs
from align.errors import ModelError
from align.models import hub
from align.models.hub import cache_if_away
from align.models.loading import load_tokenizer
from tests.helpers.builders import rows


class Away:
    """A session whose requests fail as those of a machine without a network do."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def head(self, url: str, timeout: float) -> None:
        self.asked.append(url)
        raise OSError("Temporary failure in name resolution")


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    """The hub is away, and a request beyond the first one fails the test at once."""
    session = Away()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    return session


def test_an_encoder_that_is_not_in_the_cache(away: Away, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="align"), pytest.raises(ModelError) as found:
        filter_pairs(rows(12), model="someone/no-such-encoder")
    assert found.value.code == "model-load"
    assert len(away.asked) == 1 and "someone/no-such-encoder" in away.asked[0]
    assert caplog.text.count("the hub cannot be reached (Temporary failure in name resolution)") == 1
    assert not constants.HF_HUB_OFFLINE


def test_a_tokenizer_that_is_not_in_the_cache(away: Away) -> None:
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load_tokenizer("someone/no-such-model")
    assert len(away.asked) == 1


def test_folders_and_offline_mode_ask_nothing(away: Away, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cache_if_away(str(tmp_path)):
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with cache_if_away("someone/model"):
        pass
    assert not away.asked and constants.HF_HUB_OFFLINE


def test_what_is_no_id_is_left_to_the_loader(away: Away) -> None:
    with cache_if_away("a/b/c"):
        assert not constants.HF_HUB_OFFLINE
    assert hub._unreachable("someone/model") == "Temporary failure in name resolution"
