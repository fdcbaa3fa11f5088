"""LLM-JEPA with LoRA: adapters, and the embedding rows of the [PRED] tokens.

python examples/lora.py
"""

import torch
from peft import LoraConfig, get_peft_model
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

rows = grammar.generate(512, seed=0)

torch.manual_seed(0)
tokenizer = train_tokenizer(rows)
base = small_llama(tokenizer, hidden_size=64, num_layers=2)


def train(model, pred_ids, *, epochs, learning_rate, jepa_weight):
    """The loop of pytorch_loop.py, over the parameters that are not frozen."""
    patch_model(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    collator = LLMJEPACollator(tokenizer, ExampleFormat(pred_ids=pred_ids))
    loader = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collator)
    for epoch in range(epochs):
        for batch in loader:
            out = llm_jepa_loss(model, batch.to(model.device), jepa_weight=jepa_weight)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: next-token loss {out.ntp_loss:.2f}, JEPA loss {out.jepa_loss:.4f}")


# What stands here for a pretrained model, AutoModelForCausalLM.from_pretrained.
print("next-token loss alone, all weights")
train(base, [], epochs=2, learning_rate=1e-2, jepa_weight=0.0)

pred_ids = add_predictor_tokens(base, tokenizer, 1)
before = base.get_input_embeddings().weight.clone()
config = LoraConfig(
    task_type="CAUSAL_LM",
    r=8,
    lora_alpha=16,
    target_modules="all-linear",
    trainable_token_indices=pred_ids,  # keeps tied weights tied, unlike modules_to_save
)
model = get_peft_model(base, config)
print("LLM-JEPA with LoRA")
model.print_trainable_parameters()
train(model, pred_ids, epochs=2, learning_rate=1e-2, jepa_weight=1.0)

merged = model.merge_and_unload()  # a plain model again, for `save_pretrained`
changed = (merged.get_input_embeddings().weight != before).any(dim=1).nonzero().flatten()
print(f"embedding rows that changed: {changed.tolist()}; [PRED] is {pred_ids}")
