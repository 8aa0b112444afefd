"""Pairs of answers as ids, and what losses over them are in float64, written apart."""

import math

import torch

from minilora.data import Pair


def pair(prompt, first, second, wanted=None):
    """A pair whose answers are learned whole; without a prompt from their second token on."""
    labels = [-100] * len(prompt)
    for answer in (first, second):
        labels += answer if prompt else [-100, *answer[1:]]
    parts = (len(prompt), len(first), len(second))
    return Pair((*prompt, *first, *second), tuple(labels), parts, wanted)


def pairs(count=7, seed=0, vocabulary=61, kto=False, longest=9):
    """Ragged pairs; of labelled answers every third one is not wanted."""
    generator = torch.Generator().manual_seed(seed)

    def ids(least):
        length = int(torch.randint(least, longest, (), generator=generator))
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    return [pair(ids(1), ids(1), ids(1), i % 3 > 0 if kto else None) for i in range(count)]


def log_probs(model, one):
    """Sums of log p over both answers, and their tokens; a pass for each, from whole logits."""
    prompt, first, _ = one.lengths
    ids, labels = list(one.input_ids), list(one.labels)
    found = []
    for start, end in ((prompt, prompt + first), (prompt + first, len(ids))):
        row = torch.tensor([ids[:prompt] + ids[start:end]])
        wanted = torch.tensor(labels[:prompt] + labels[start:end])[1:]
        logits = model(row)
        p = getattr(logits, "logits", logits)[0, :-1].double().softmax(-1)
        at = (wanted != -100).nonzero()[:, 0]
        found.append((p[at, wanted[at]].log().sum(), len(at)))
    return found


def loss(kind, now, before, beta, gamma=1.0, wanted=None, z=0.0, weights=(1.0, 1.0)):
    """The loss of one pair in float64: `now` and `before` are what `log_probs` returns."""
    (c, m), (r, n) = now
    big_c, big_r = before[0][0], before[1][0]
    ratio, other = c - big_c, r - big_r
    if kind == "dpo":
        return torch.log(1 + torch.exp(-beta * (ratio - other)))
    if kind == "ipo":
        return (ratio / m - other / n - 1 / (2 * beta)) ** 2
    if kind == "simpo":
        return torch.log(1 + torch.exp(gamma - beta * (c / m - r / n)))
    if kind == "orpo":
        p, q = torch.exp(c / m), torch.exp(r / n)
        odds = (p / (1 - p)) / (q / (1 - q))
        return -c / m + beta * torch.log(1 + 1 / odds)
    if wanted:
        return weights[0] * (1 - 1 / (1 + torch.exp(-beta * (ratio - z))))
    return weights[1] * (1 - 1 / (1 + torch.exp(-beta * (z - ratio))))


def drift(model, reference, data):
    """KTO's z: how far the model has moved on answers to other prompts."""
    moved = [float(log_probs(model, p)[1][0] - log_probs(reference, p)[1][0]) for p in data]
    return max(0.0, math.fsum(moved) / len(moved))
