"""Small things that tests build: a tokenizer, tiny models, pair rows."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = ["good", "bad", "film", "plot", "the", "a", "is", "was", "very", "not", "great", "awful", "fine", "dull"]
WORDS += ["review", ":", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(eos: bool = True, template: bool = True) -> PreTrainedTokenizerFast:
    """A word tokenizer over ``WORDS``."""
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    if eos:
        made.add_special_tokens({"eos_token": "<eos>"})
    if template:
        made.chat_template = TEMPLATE
    return made


def beginning(folder: Path) -> PreTrainedTokenizerFast:
    """Save ``tokenizer()`` like Llama 3's: it begins every text with <bos>, and so does its chat template."""
    made = tokenizer()
    made.add_special_tokens({"bos_token": "<bos>"})
    made._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", made.convert_tokens_to_ids("<bos>"))]
    )
    made.chat_template = "{{ bos_token }}" + TEMPLATE.replace("{% endfor %}", "<eos>{% endfor %}", 1)
    made.save_pretrained(folder)
    return made


def causal(folder: Path, seed: int = 0) -> Path:
    """A random tiny Llama with its tokenizer, saved as a model folder."""
    torch.manual_seed(seed)
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def trained_adapter(base: Path, folder: Path, seed: int) -> Path:
    """Save an adapter of a model folder with random weights, as if it had been trained, and its tokenizer."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), lora).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make_base(folder: Path, *, tied: bool) -> Path:
    """A random tiny Llama whose head is the embedding, or is not."""
    torch.manual_seed(0)
    config = llama_config()
    config.tie_word_embeddings = tied
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def changed_adapter(base: Path, folder: Path, config: PeftConfig) -> Path:
    """An adapter of any kind with weights as if it had been trained before."""
    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def llama_reward(folder: Path, labels: int = 1, words: int = 0) -> Path:
    """A random tiny Llama with a classification head; it embeds ``words`` more words than its tokenizer has."""
    torch.manual_seed(1)
    config = llama_config()
    config.vocab_size += words
    config.num_labels = labels
    config.pad_token_id = 0
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def bert_reward(folder: Path) -> Path:
    """A random tiny encoder with a one-logit head; its tokenizer has no end-of-sequence token."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(WORDS) + 3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_labels=1, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer(eos=False).save_pretrained(folder)
    return folder


def llama_config() -> LlamaConfig:
    """Two layers, 32 wide; weights large enough that positions and neighbors matter."""
    return LlamaConfig(
        vocab_size=len(WORDS) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip


def rows(count: int) -> list[dict[str, object]]:
    """Distinct valid pairs: good things chosen, bad things rejected."""
    return [
        {
            "id": f"p{k}",
            "prompt": f"the {WORDS[k % 6]} film {'very ' * (k // 6)}is",
            "chosen": " good " + "great " * (k % 3) + "film",
            "rejected": " bad " + "awful " * (k % 2) + "plot",
            "margin": round(((k * 7) % 11 - 3) / 2.5, 3),
        }
        for k in range(count)
    ]
