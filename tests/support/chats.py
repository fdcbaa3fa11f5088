"""Chats, and tokenizers with the habits of the real ones."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.chat_templates import SMOLLM2, SPANS

SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<|User|>"]
SPECIAL += ["<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|pred|>", "<|sep|>", "<|Assistant|>"]
CORPUS = [name for spans in SPANS.values() for name in spans[1:]] * 2
CORPUS += [
    " x x",
    "lines with a vowel? ([0-9])|(dog)\n",
    "Who?\n<|assistant|>\n",
    "é ü 漢字 naïve\n\n",
] * 9


def build_tokenizer(kind):
    """Small, but with the habits of the real ones.

    byte_level: as Llama-3, Qwen and SmolLM2; offsets leave out the leading space.
    punctuation_newline: as OLMo-2; the pattern joins punctuation and newline, and the role tags
    are plain text. byte_fallback: as Gemma and Llama-2; a token per byte of an unknown character.
    """
    special = ["<unk>", "<s>", "</s>", *SPECIAL]
    if kind == "byte_fallback":
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("\n", "isolated"),
                pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            ]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        corpus = [text for text in CORPUS if text.isascii()]
    else:
        tokenizer = Tokenizer(models.BPE())
        pattern = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "punctuation_newline":
            split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
            pattern = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(split, "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        tokenizer.pre_tokenizer = pattern
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind == "byte_level")
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        corpus = CORPUS
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
    )


KINDS = ("byte_level", "punctuation_newline", "byte_fallback")
TOKENIZERS = {}


def get_tokenizer(template=SMOLLM2, kind="byte_level"):
    if kind not in TOKENIZERS:
        TOKENIZERS[kind] = build_tokenizer(kind)
    TOKENIZERS[kind].chat_template = template
    return TOKENIZERS[kind]


def turns(*contents):
    roles = ("system", "user", "assistant")[-len(contents) :]
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]


def decode(tokenizer, ids):
    return tokenizer.decode([i for i in ids if i != -100])


def decode_start(tokenizer, ids):
    """Without the space that Llama-2's tokenizer puts before a text, and takes away again."""
    return decode(tokenizer, ids).removeprefix(" ")


CHAT = turns("SYS", "ASK?", "ANS")
