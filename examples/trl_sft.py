"""LLM-JEPA in TRL's SFTTrainer.

python examples/trl_sft.py [DIRECTORY]
"""

import sys
import tempfile

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from llmjepa_kernels import (
    ExampleFormat,
    LLMJEPACollator,
    LLMJEPATrainer,
    add_predictor_tokens,
)
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import small_llama


class LLMJEPASFTTrainer(LLMJEPATrainer, SFTTrainer):
    """The loss and the batches of the first, everything else of the second."""


directory = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
rows = Dataset.from_list(grammar.generate(512, seed=0))  # with "messages"

# For a model of the hub: AutoTokenizer.from_pretrained, AutoModelForCausalLM.from_pretrained.
torch.manual_seed(0)
tokenizer = train_tokenizer(rows)
model = small_llama(tokenizer, hidden_size=64, num_layers=2)
example_format = ExampleFormat(pred_ids=add_predictor_tokens(model, tokenizer, 1))

trainer = LLMJEPASFTTrainer(
    model,
    SFTConfig(
        directory,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        num_train_epochs=2,
        logging_steps=16,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,  # SFTConfig's default is True
        # The collator tokenizes, in the views that the loss compares.
        dataset_kwargs={"skip_prepare_dataset": True},
    ),
    LLMJEPACollator(tokenizer, example_format),
    train_dataset=rows,
    processing_class=tokenizer,
    jepa_weight=1.0,
)
trainer.train()
