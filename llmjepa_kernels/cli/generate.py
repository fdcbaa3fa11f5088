"""`llmjepa generate`: a checkpoint answers a prompt, or chats."""

from __future__ import annotations

import sys

from transformers import TextStreamer, set_seed
from transformers.utils import logging

from llmjepa_kernels.cli.checkpoint import load_checkpoint
from llmjepa_kernels.cli.device import chosen_device
from llmjepa_kernels.cli.generate_options import GenerateOptions
from llmjepa_kernels.cli.say import say
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.evaluation.answer import answer


def generate(options: GenerateOptions) -> None:
    """Prints answers as they are made.

    Raises:
        ValueError: An option is wrong, or a prompt does not fit the checkpoint.
        OSError: The model is not there.
    """
    device = chosen_device(options.device)
    logging.disable_progress_bar()  # of reading weights
    say(f"loading {options.checkpoint}")
    model, tokenizer = load_checkpoint(options.checkpoint, options, device)
    example_format = ExampleFormat.load(options.checkpoint)
    if options.system is not None and example_format.template == "plain":
        raise ValueError(f"--system has no place in the plain format of {options.checkpoint}")
    set_seed(options.seed)

    def reply(messages: list[dict[str, str]]) -> str:
        return answer(
            model,
            tokenizer,
            messages,
            example_format,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            streamer=TextStreamer(
                tokenizer,
                skip_prompt=True,
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            ),
        )

    begin = [] if options.system is None else [{"role": "system", "content": options.system}]
    if options.prompt is None and sys.stdin is None:
        raise ValueError("expected a prompt, from --prompt or standard input, which is closed")
    if options.prompt is not None or not sys.stdin.isatty():
        prompt = sys.stdin.read().strip() if options.prompt is None else options.prompt
        if not prompt:
            raise ValueError("expected a prompt, from --prompt or standard input, got none")
        reply([*begin, {"role": "user", "content": prompt}])
        return
    messages = list(begin)
    while prompt := _line():
        question = {"role": "user", "content": prompt}
        said = reply([*messages, question])
        if not said.strip():
            print("(no answer; the question is forgotten)")
        elif example_format.template != "plain":  # which has no turns
            messages += [question, {"role": "assistant", "content": said}]


def _line() -> str:
    """What the user types; empty at the end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
