"""Would a step on a pair raise its chosen response? Measure how the gradients of the two responses are entangled."""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from align import measure_entanglement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("pairs", help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--loss", default="dpo")
    parser.add_argument("--count", type=int, default=32, help="pairs to measure")
    options = parser.parse_args()

    pairs = load_dataset("json", data_files=options.pairs, split="train")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
    table = measure_entanglement(
        model, tokenizer, pairs.select(range(min(options.count, len(pairs)))), loss=options.loss
    ).to_pandas()
    print(table[["cosine", "chosen_change", "rejected_change"]].describe())
    print(table["verdict"].value_counts())


if __name__ == "__main__":
    main()
