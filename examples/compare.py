"""Let two policies answer the same prompts and ask a judge which is better."""

import argparse

from datasets import load_dataset

from align import compare_policies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("a", help="policy: folder or hub id")
    parser.add_argument("b", help="policy to compare it with")
    parser.add_argument("prompts", help="JSON lines with prompt")
    parser.add_argument("--judge", required=True, help="reward model that neither policy was trained on, or llm:MODEL")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--page", help="HTML file with the samples side by side")
    options = parser.parse_args()

    prompts = load_dataset("json", data_files=options.prompts, split="train")["prompt"]
    result = compare_policies(options.a, options.b, prompts, judge=options.judge, max_new_tokens=options.max_new_tokens)
    print(f"{options.a} wins {result.win_rate:.2f} of the prompts, 95% interval {result.interval}")
    if options.page:
        result.write_page(options.page)


if __name__ == "__main__":
    main()
