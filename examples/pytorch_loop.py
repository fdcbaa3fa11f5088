"""LLM-JEPA in a training loop of your own.

python examples/pytorch_loop.py
"""

import torch
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

# Rows of {"messages": [{"role": "system", …}, {"role": "user", …}, {"role": "assistant", …}]}.
rows = grammar.generate(512, seed=0)

# For a model of the hub: AutoTokenizer.from_pretrained, AutoModelForCausalLM.from_pretrained.
torch.manual_seed(0)
tokenizer = train_tokenizer(rows)
model = small_llama(tokenizer, hidden_size=64, num_layers=2)

# New tokens enlarge the embeddings: add them before the optimizer's first step.
pred_ids = add_predictor_tokens(model, tokenizer, 1)
patch_model(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

collator = LLMJEPACollator(tokenizer, ExampleFormat(pred_ids=pred_ids))
loader = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collator)

for epoch in range(3):
    for batch in loader:
        out = llm_jepa_loss(model, batch.to(model.device), jepa_weight=1.0)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(
        f"epoch {epoch}: next-token loss {out.ntp_loss:.2f}, JEPA loss {out.jepa_loss:.4f}; "
        f"the last batch took {batch['input_ids'].numel()} tokens, plain fine-tuning takes "
        f"{int(batch['sft_tokens'].sum())}"
    )
