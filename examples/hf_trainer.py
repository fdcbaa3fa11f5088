"""LLM-JEPA in the Trainer of Transformers.

python examples/hf_trainer.py [DIRECTORY]
"""

import sys
import tempfile

import torch
from transformers import TrainingArguments

from llmjepa_kernels import (
    ExampleFormat,
    LLMJEPACollator,
    LLMJEPATrainer,
    add_predictor_tokens,
)
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import small_llama

directory = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()

# Rows with "messages": a list, or a Dataset of the library datasets.
rows = grammar.generate(512, seed=0)
held_out = grammar.generate(64, seed=0, split="heldout")

# For a model of the hub: AutoTokenizer.from_pretrained, AutoModelForCausalLM.from_pretrained.
torch.manual_seed(0)
tokenizer = train_tokenizer(rows)
model = small_llama(tokenizer, hidden_size=64, num_layers=2)
example_format = ExampleFormat(pred_ids=add_predictor_tokens(model, tokenizer, 1))

trainer = LLMJEPATrainer(
    model,
    TrainingArguments(
        directory,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        num_train_epochs=2,
        logging_steps=16,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    ),
    LLMJEPACollator(tokenizer, example_format),
    train_dataset=rows,
    eval_dataset=held_out,
    processing_class=tokenizer,
    jepa_weight=1.0,
)
trainer.train()
metrics = trainer.evaluate()
print(
    f"held out: next-token loss {metrics['eval_ntp_loss']:.3f}, cosine {metrics['eval_cosine']:.3f}"
)

trainer.save_model()
print(f"saved to {directory}; next: llmjepa evaluate {directory}")
