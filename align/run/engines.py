"""Which engine samples for a section of a run, and what it does not take."""

from align.config import RunConfig
from align.config.decoding import DecodingSection
from align.errors import ConfigError
from align.generation.engines import choose_engine
from align.generation.types import EngineName


def engine_of(config: RunConfig, section: DecodingSection) -> EngineName:
    """The engine that samples for a section.

    Raises:
        ConfigError: it does not take an option of the section, or cannot load a quantized policy.
    """
    assert config.train is not None
    engine = choose_engine(section.engine, base_url=section.base_url)[0]
    wrong = ""
    if engine == "transformers" and section.options:
        wrong = "options, which are of vLLM or of a server"
    elif engine == "server" and section.dtype is not None:
        wrong = "dtype, which the server decides"
    elif engine != "server" and section.served_as is not None:
        wrong = "served_as, which is of a server"
    elif engine == "vllm" and config.train.quantization:
        wrong = "a policy that is quantized on loading, which only the transformers engine samples as it is trained"
    if wrong:
        raise ConfigError(
            f"engine {engine}: found {wrong}", code="engine-option", hint="leave it out, or give another `engine`"
        )
    return engine
