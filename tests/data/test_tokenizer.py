"""The small tokenizer of one's own data."""

import pytest
from transformers import AutoTokenizer

from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.chat import chat_example, chat_prompt
from llmjepa_kernels.data.tokenizer import train_tokenizer
from tests.support.chats import turns

CHAT = turns("SYS", "ASK", "ANS")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(grammar.generate(500), vocab_size=400)


def test_tokenizer_encodes_everything_and_round_trips(tokenizer, tmp_path):
    assert len(tokenizer) == 400
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    for key, value in special.items():
        assert getattr(loaded, key) == getattr(tokenizer, key) == value
    for text in (" lines  with\n\ta vowel", "é 漢字 🦜 \x00", r"\b(~([A-Z])){2,}\b & it 's"):
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == loaded.decode(ids) == text
    messages = turns("SYS", "é🦜", "ANS")
    assert chat_example(messages, loaded) == chat_example(messages, tokenizer)


def test_tokenizer_template(tokenizer):
    example = chat_example(CHAT, tokenizer)
    decoded = [tokenizer.decode(segment.input_ids) for segment in example.segments]
    assert decoded == [
        "<|bos|><|system|>SYS<|eos|><|user|>ASK",
        "<|eos|><|assistant|>ANS<|eos|>",
        "<|bos|><|assistant|>ANS",
    ]
    labels = example.segments[1].labels
    assert labels[:2] == [-100, -100]
    assert labels[-1] == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)
    assert prompt["input_ids"] == chat_prompt(CHAT, tokenizer)


def test_tokenizer_is_the_same_every_time(tokenizer):
    again = train_tokenizer(iter(grammar.generate(500)), vocab_size=400)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_tokenizer_needs_room_for_every_byte():
    with pytest.raises(ValueError, match="vocab_size must be at least 262, got 261"):
        train_tokenizer(grammar.generate(5), vocab_size=261)
    assert len(train_tokenizer(grammar.generate(5), vocab_size=262)) == 262
