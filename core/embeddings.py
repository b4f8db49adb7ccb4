"""How similar two texts are: embeddings of a local model or of an endpoint."""
import os
import statistics

from core.distributed import first
from core.endpoint import Endpoint, is_url
from core.models import open_model, open_pretrained, pick_device


def embed(embedder, texts, device):
    """{text: fp32 vector on the CPU} of a list of texts.

    embedder: an endpoint's URL, or a model whose last hidden states are averaged over the first
    1,024 tokens of a text.
    """
    import torch
    if is_url(embedder):
        model = os.environ.get("ILR_EMBEDDER_MODEL", "text-embedding-3-large")
        vectors = first(lambda: Endpoint(embedder, model, "ILR_EMBEDDER").embeddings(texts))
        return {text: torch.tensor(vector) for text, vector in vectors.items()}
    from tqdm import tqdm
    from transformers import AutoTokenizer
    tokenizer, found = open_pretrained(AutoTokenizer, embedder), {}
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = min(tokenizer.model_max_length, 1024)
    device = pick_device(device)
    model = open_model(embedder, device, "AutoModel").eval()
    texts = sorted(texts, key=lambda t: (len(t), t))
    starts = range(0, len(texts), 64)
    for start in tqdm(starts, desc="embed", unit="batch", mininterval=1, leave=False):
        block = texts[start:start + 64]
        batch = tokenizer([t or " " for t in block], padding=True, padding_side="right",
                          truncation=True, max_length=limit, return_tensors="pt").to(device)
        with torch.inference_mode():
            hidden = model(input_ids=batch["input_ids"],
                           attention_mask=batch["attention_mask"]).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        found.update(zip(block, ((hidden * mask).sum(1) / mask.sum(1)).cpu(), strict=True))
    return found


def alike(embedder, pairs, device):
    """Whether the two texts of each pair are equal, or the cosine of their embeddings is above the
    median pair's (the release's experiments/ilr.py)."""
    import torch
    vectors = embed(embedder, sorted({text for pair in pairs for text in pair}), device)
    cosines = [torch.cosine_similarity(vectors[a], vectors[b], dim=0).item() for a, b in pairs]
    median = statistics.median(cosines)
    return first(lambda: [a == b or x > median for (a, b), x in zip(pairs, cosines, strict=True)])
