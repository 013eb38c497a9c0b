"""The reference sampler: no cache, no batching tricks, a full forward pass at every token. Everything must equal it."""

import torch

from vision_ar.generator import Generator
from vision_ar.interfaces import FREE, AttentionPattern, Tokens
from vision_ar.layers.noise import keyed_gumbel


def plain_sample(generator: Generator, label: int | None, seed: int, law, scale_of=None, forced=None) -> torch.Tensor:
    """Write one sequence (T,) with next-token prediction; `scale_of(progress)` gives the guidance scale."""
    spec, backbone = generator.spec, generator.backbone
    ids = torch.zeros(1, spec.seq_len, dtype=torch.int64)
    vocabulary = torch.arange(spec.vocab_size)

    def logits_at(t: int, condition: torch.Tensor | None) -> torch.Tensor:
        tokens = Tokens.of(spec, ids=ids, labels=condition).columns(0, t)
        hidden = backbone(backbone.embed(tokens), backbone.place(tokens), AttentionPattern())
        return generator.heads["token"](hidden[:, -1])[0]

    with torch.no_grad():
        for t in range(spec.seq_len):
            logits = logits_at(t, None if label is None else torch.tensor([label]))
            scale = 1.0 if scale_of is None else scale_of(t / (spec.seq_len - 1))
            if scale != 1:
                uncond = logits_at(t, None)
                logits = uncond + torch.tensor(scale) * (logits - uncond)
            scores = law(logits) + keyed_gumbel(torch.tensor(seed), torch.tensor(t), vocabulary)
            decided = FREE if forced is None else int(forced[t])
            ids[0, t] = scores.argmax() if decided == FREE else decided
    return ids[0]
