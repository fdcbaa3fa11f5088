"""Training: one forward to the loss, the collator and the Trainer."""
