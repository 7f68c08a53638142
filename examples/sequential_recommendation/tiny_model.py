"""Makes and trains a small Llama for the prompts of one data set, in seconds and without downloading anything."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .data import MAX_HISTORY, MIN_HISTORY, NUM_CANDIDATES, Dataset, Example
from .prompts import NO_LABEL, TEMPLATES, Choice, Prompts

ENOUGH = 0.15  # mean loss of the last 20 steps below which the model knows the rule, and training stops


def tiny_tokenizer(dataset: Dataset, kind: str = "neutral") -> Any:
    """A tokenizer with a token for each word, sign and newline of the templates and titles; other words are <unk>."""
    split = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    texts = [part for template in TEMPLATES[kind] for part in template] + [",", "\n", *dataset.titles]
    words = dict.fromkeys(["<pad>", "<unk>", "</s>"])
    for text in texts:
        words |= dict.fromkeys(word for word, _ in split.pre_tokenize_str(text))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", padding_side="left"
    )


def tiny_lm(tokenizer: Any, width: int = 64, layers: int = 2, heads: int = 4, seed: int = 0) -> Any:
    """A Llama of this size for the tokenizer, in float32. The seed decides its weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=width**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pretrain(
    lm: Any,
    prompts: Prompts,
    steps: int = 800,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    candidates: int = NUM_CANDIDATES,
) -> list[float]:
    """Trains the whole model on prompts of random items, so that it learns to read the format and to copy titles.

    It learns nothing about any user or group. The right answer follows a rule of this training alone, from which the
    model learns where to look: its first word comes after the last item's in a fixed random order of all first words.
    Training stops when the model knows the rule. Returns the loss of every step; the model is in eval mode afterwards.
    """
    draw = random.Random(f"{seed}/pretrain")
    after = _following(draw, prompts.dataset)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr, weight_decay=0.01)
    losses: list[float] = []
    lm.train()
    for step in trange(steps, desc="tiny language model", leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 30)
        examples = [_example(draw, after, candidates) for _ in range(batch_size)]
        choices = [Choice(draw.randrange(len(TEMPLATES[prompts.kind])), False) for _ in examples]
        loss = _loss(lm, prompts.collate(examples, choices))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if sum(losses[-20:]) < 20 * ENOUGH:
            break
    lm.eval()
    return losses


def _loss(lm: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss over the answers' tokens."""
    mask, labels = batch["attention_mask"], batch["labels"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": positions}
    logits = lm(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)


def _following(draw: random.Random, dataset: Dataset) -> list[list[int]]:
    """item -> the items that may come next, by a random order of all first words."""
    starts: dict[str, list[int]] = {}
    for item, title in enumerate(dataset.titles):
        starts.setdefault(title.split()[0], []).append(item)
    order = list(starts)
    draw.shuffle(order)
    following = {word: starts[after] for word, after in zip(order, order[1:] + order[:1], strict=True)}
    return [following[title.split()[0]] for title in dataset.titles]


def _example(draw: random.Random, after: list[list[int]], num_candidates: int) -> Example:
    """A random example that follows the rule. after: item -> the items that may come next."""
    count = draw.randint(MIN_HISTORY, min(MAX_HISTORY, len(after) - num_candidates))
    drawn = draw.sample(range(len(after)), count + num_candidates)
    history, candidates = drawn[:count], drawn[count:]
    target = draw.choice(after[history[-1]])
    if target in history:
        history[history.index(target)] = candidates[0]
    if target not in candidates:
        candidates[0] = target
    draw.shuffle(candidates)
    return Example("nobody", tuple(history), target, tuple(candidates))
