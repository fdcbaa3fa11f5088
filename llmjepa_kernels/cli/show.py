"""`llmjepa show`: packed rows, as text and as a picture."""

from __future__ import annotations

from io import BytesIO

from llmjepa_kernels.cli.held_out import held_out_samples
from llmjepa_kernels.cli.packed_row import row_figure, row_text, runs_of
from llmjepa_kernels.cli.say import say
from llmjepa_kernels.cli.shared_options import BUILT_IN_SEED
from llmjepa_kernels.cli.show_options import ShowOptions
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.files import write_whole
from llmjepa_kernels.hf.load import load_tokenizer
from llmjepa_kernels.packing import pack


def show(options: ShowOptions) -> None:
    """Prints a table per row.

    Raises:
        ValueError: A sample does not fit the checkpoint or a row.
        OSError: A file or the checkpoint is not there.
    """
    say(f"loading the tokenizer of {options.checkpoint}")
    tokenizer = load_tokenizer(options.checkpoint, trust_remote_code=options.trust_remote_code)
    example_format = ExampleFormat.load(
        options.checkpoint,
        tokenizer,
        num_pred_tokens=options.num_pred_tokens,
        layout=options.layout,
    )
    examples = []
    for place, sample in held_out_samples(
        options.data,
        recipe=options.recipe,
        count=options.samples,
        seed=BUILT_IN_SEED,
        split=None,
    ):
        try:
            examples.append(example_format.example(sample, tokenizer))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    batch = pack(examples, options.max_length, share_prefixes=options.share_prefixes)
    rows = [runs_of(batch, row, tokenizer) for row in range(len(batch["input_ids"]))]
    for number, runs in enumerate(rows):
        print(f"\nrow {number}: {runs[-1].stop} tokens\n{row_text(runs)}", end="")
    if options.output is not None:
        picture = BytesIO()
        row_figure(rows[0]).savefig(picture, dpi=150, bbox_inches="tight")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.output, picture.getvalue())
        print(f"\nrow 0: {options.output}")
