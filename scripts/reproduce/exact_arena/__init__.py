"""An exact world of preference pairs: softmax policies on features, gold rewards that are known."""
