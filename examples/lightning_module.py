"""LLM-JEPA in Lightning.

python examples/lightning_module.py
"""

import lightning
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


class LLMJEPAModule(lightning.LightningModule):
    """A causal language model under next-token and JEPA loss."""

    def __init__(self, model: torch.nn.Module, jepa_weight: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.jepa_weight = jepa_weight

    def training_step(self, batch, batch_index):
        """The loss of one packed batch."""
        out = llm_jepa_loss(self.model, batch, jepa_weight=self.jepa_weight)
        self.log_dict({"ntp_loss": out.ntp_loss, "cosine": out.cosine}, batch_size=1)
        if batch_index == 0:
            print(f"epoch {self.current_epoch}: next-token loss {out.ntp_loss:.2f}")
        return out.loss

    def configure_optimizers(self):
        """AdamW over all weights."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


rows = grammar.generate(512, seed=0)

# For a model of the hub: AutoTokenizer.from_pretrained, AutoModelForCausalLM.from_pretrained.
torch.manual_seed(0)
tokenizer = train_tokenizer(rows)
model = small_llama(tokenizer, hidden_size=64, num_layers=2)
pred_ids = add_predictor_tokens(model, tokenizer, 1)
module = LLMJEPAModule(patch_model(model))

collator = LLMJEPACollator(tokenizer, ExampleFormat(pred_ids=pred_ids))
loader = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collator)
trainer = lightning.Trainer(
    max_epochs=3, accelerator="auto", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, loader)
