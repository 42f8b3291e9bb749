"""Keep the pairs that are worth training on, and say why another one was dropped."""

import argparse

from datasets import load_dataset

from align import filter_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", help="JSON lines with prompt, chosen, rejected and, if known, margin")
    parser.add_argument("output", help="file to write the kept pairs to")
    parser.add_argument("--keep", type=float, default=0.3, help="share to keep")
    parser.add_argument("--encoder", help="model that embeds the prompts; default: all-MiniLM-L6-v2")
    options = parser.parse_args()

    pairs = load_dataset("json", data_files=options.pairs, split="train")
    result = filter_pairs(pairs, keep=options.keep, model=options.encoder)
    print(result.summary)
    if len(result.dropped):
        print(result.explain(result.dropped["id"][0]))
    result.kept.to_json(options.output)


if __name__ == "__main__":
    main()
