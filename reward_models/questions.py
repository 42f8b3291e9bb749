"""The question to a language model that compares two responses, and how such judges are named."""

LANGUAGE_MODEL = "llm:"
"""Prefix of a judge that is a local language model."""
SERVER = "server:"
"""Prefix of a judge that is a language model behind an OpenAI-compatible server."""
REWARD_SERVER = "reward-server:"
"""Prefix of a judge that is a reward model behind a vLLM server."""
QUESTION = (
    "Which of two responses to the same prompt is better?\n\nPrompt: {prompt}\n\nResponse A: {first}\n\n"
    "Response B: {second}\n\n"
)
