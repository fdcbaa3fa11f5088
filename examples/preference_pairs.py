"""Preference pairs as prefix trees: DPO in which answers share their prompt in one packed row.

The usual way repeats the prompt in front of the chosen and the rejected answer, in two padded
rows. Here the prompt is a segment, both answers are its children, and neither sees the other.

    python examples/preference_pairs.py
"""

import copy
from itertools import pairwise

import torch
from torch.nn.functional import logsigmoid

from llmjepa_kernels import Example, Segment, pack, patch_model
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import small_llama


def preference_example(prompt, chosen, rejected):
    """A prompt that two supervised answers continue; the pair names their last tokens."""
    answers = [Segment(ids, parent=0, labels=ids) for ids in (chosen, rejected)]
    return Example([Segment(prompt), *answers], pairs=[(1, 2)])


def answer_logps(model, batch):
    """log p(answer | prompt) of the chosen and of the rejected answers, each (rows, pairs)."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logps = logps.masked_fill(labels == -100, 0.0)
    # The tokens of an answer are visible until its end: there each answer's sum gathers.
    ends = batch["visible_until"][:, 1:].long()
    sums = logps.new_zeros(len(ends), ends.shape[1] + 2).scatter_add(1, ends, logps)
    pairs = batch["view_pairs"]
    return sums.gather(1, (pairs + 1).flatten(1)).view(pairs.shape).unbind(-1)


def separate_logp(model, prompt, answer):
    """The same of one answer, from a row of its own and any model."""
    ids = torch.tensor([[*prompt, *answer]])
    logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, ids[0, len(prompt) :, None]).sum()


# For a model of the hub: AutoTokenizer.from_pretrained, AutoModelForCausalLM.from_pretrained.
chats = grammar.generate(64, seed=0)
torch.manual_seed(0)
tokenizer = train_tokenizer(chats)
policy = small_llama(tokenizer, hidden_size=64, num_layers=2)
reference = copy.deepcopy(policy).eval()
patch_model(policy)
patch_model(reference)

triples = []  # a description; its own regex, chosen; that of the next one, rejected
for chat, other in pairwise(chats):
    *asked, answer = chat["messages"]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    texts = [turn["content"] + tokenizer.eos_token for turn in (answer, other["messages"][-1])]
    triples.append((prompt, *tokenizer(texts)["input_ids"]))

batch = pack([preference_example(*triple) for triple in triples]).to(policy.device)
rows = sum(2 * len(prompt) + len(a) + len(b) for prompt, a, b in triples)
longest = max(len(prompt) + max(len(a), len(b)) for prompt, a, b in triples)
print(
    f"{len(triples)} pairs take {batch['input_ids'].numel()} tokens as trees, {rows} as separate "
    f"rows, {2 * len(triples) * longest} with padding"
)

with torch.no_grad():
    reference_chosen, reference_rejected = answer_logps(reference, batch)
    alone = torch.stack([separate_logp(reference, prompt, a) for prompt, a, _ in triples])
error = ((reference_chosen[0] - alone) / alone).abs().max()
print(f"largest relative difference from separate rows: {error:.1e}")

optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
for step in range(1, 11):
    chosen, rejected = answer_logps(policy, batch)
    margin = 0.1 * ((chosen - reference_chosen) - (rejected - reference_rejected))
    loss = -logsigmoid(margin).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 2 == 0:
        agreed = (margin > 0).float().mean()
        print(f"step {step:2}: DPO loss {loss:.3f}, chosen answer preferred {agreed:.0%}")
