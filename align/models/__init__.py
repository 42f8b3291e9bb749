"""Language models: loading, tokenization, batching, log-probs, attention layouts."""
