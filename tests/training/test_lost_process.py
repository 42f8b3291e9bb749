"""Which errors of a process mean that another process is gone."""

import pytest

from align.distributed import lost_process


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv",
        "Application timeout caused pair closure",
        "Connection closed by peer [127.0.0.1]:4242",
        "Socket closed [127.0.0.1]:4242",
    ],
)
def test_messages_of_gloo(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the error itself or as its cause; a single process cannot lose another."""
    outer = ValueError("the step failed")
    outer.__cause__ = RuntimeError(message)
    assert lost_process(outer) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for error in (RuntimeError(message), outer):
        found = lost_process(error)
        assert found is not None and found.code == "process-lost" and "process 1 of 2" in str(found)
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_process(ValueError(message)) is None
