"""LLM-JEPA in a loop of Accelerate, over a stream of rows and any number of processes.

accelerate launch [--num_processes 2] examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from datasets import IterableDataset
from torch.utils.data import DataLoader

from llmjepa_kernels import (
    ExampleFormat,
    LLMJEPACollator,
    add_predictor_tokens,
    llm_jepa_loss,
    patch_model,
)
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import small_llama

# Each process packs batches of its own: one that the first had packed could not be cut apart.
accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))

# For a model of the hub: AutoTokenizer.from_pretrained, AutoModelForCausalLM.from_pretrained.
torch.manual_seed(0)
tokenizer = train_tokenizer(grammar.generate(512, seed=0))
model = small_llama(tokenizer, hidden_size=64, num_layers=2)
pred_ids = add_predictor_tokens(model, tokenizer, 1)
patch_model(model)

rows = IterableDataset.from_generator(grammar.generate, gen_kwargs={"count": 1024, "seed": 0})
collator = LLMJEPACollator(tokenizer, ExampleFormat(pred_ids=pred_ids))
model, optimizer, loader = accelerator.prepare(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    DataLoader(rows, batch_size=16, collate_fn=collator),
)

for step, batch in enumerate(loader):
    # The means of the whole step: processes pack different numbers of tokens and pairs.
    pairs = (batch["view_pairs"][..., 0] >= 0).sum()
    tokens = (batch["labels"][:, 1:] != -100).sum()
    tokens, pairs = accelerator.reduce(torch.stack([tokens, pairs]), reduction="sum")
    out = llm_jepa_loss(model, batch, num_items_in_batch=tokens, num_pairs_in_batch=pairs)
    # Processes average their gradients, and these losses are to be added.
    accelerator.backward(out.loss * accelerator.num_processes)
    optimizer.step()
    optimizer.zero_grad()
    if step % 16 == 0:
        ntp_loss = accelerator.reduce(out.ntp_loss.detach(), reduction="sum")
        accelerator.print(f"step {step}: next-token loss {ntp_loss:.2f}")
