"""How similar two texts are: embeddings of a local model or of an endpoint."""
import contextlib
import statistics

from core.distributed import first
from core.endpoint import embedder as endpoint_of
from core.endpoint import is_url
from core.models import open_model, open_pretrained, pick_device
from core.records import InputError


def embed(embedder, texts, device):
    """{text: fp32 vector on the CPU} of a list of texts.

    embedder: an endpoint's URL, or a model whose last hidden states (its encoder's, if it has one)
    are averaged over the first 1,024 tokens of a text, or as many as it has positions for.
    Raises InputError for a model that is none of texts.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence
    if is_url(embedder):
        vectors = first(lambda: endpoint_of(embedder).embeddings(texts))
        return {text: torch.tensor(vector) for text, vector in vectors.items()}
    from tqdm import tqdm
    from transformers import AutoTokenizer
    tokenizer, device = open_pretrained(AutoTokenizer, embedder), pick_device(device)
    model = open_model(embedder, device, auto_class(embedder)).eval()
    if model.config.is_encoder_decoder and hasattr(model, "decoder"):
        model = model.get_encoder()
    limit = min(n for n in (tokenizer.model_max_length, *positions(model), 1024) if n > 0)
    known, found = model.get_input_embeddings().weight.shape[0], {}
    pad = min(max(getattr(model.config, "pad_token_id", None) or 0, 0), known - 1)
    texts = sorted(texts, key=lambda t: (len(t), t))
    starts = range(0, len(texts), 64)
    for start in tqdm(starts, desc="embed", unit="batch", mininterval=1, leave=False):
        block = texts[start:start + 64]
        ids = tokenizer([t or " " for t in block], truncation=True, max_length=limit).input_ids
        ids = [torch.tensor(i or [pad]) for i in ids]       # of no token at all there is no mean
        if max(i.max().item() for i in ids) >= known:
            raise InputError(f"{embedder}: the tokenizer knows tokens that the model does not: "
                             "they do not belong together")
        # padded here: the tokenizer may have no token for it
        mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).to(device)
        ids = pad_sequence(ids, batch_first=True, padding_value=pad).to(device)
        try:
            with torch.inference_mode():
                hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        except (TypeError, ValueError, AttributeError, IndexError) as e:
            raise InputError(f"{embedder}: not a model that gives hidden states of a text "
                             f"({str(e).partition(chr(10))[0]})") from None
        mask = mask[..., None]
        found.update(zip(block, ((hidden * mask).sum(1) / mask.sum(1)).cpu(), strict=True))
    return found


def auto_class(path):
    """The class of transformers that opens an embedder: of T5 and its kin the encoder alone, which
    is all that some folders hold."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig
    with contextlib.suppress(InputError):       # a folder of adapters has no config
        config = open_pretrained(AutoConfig, path)
        if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
            return "AutoModelForTextEncoding"
    return "AutoModel"


def positions(model):
    """How many tokens a model has positions for, as its config and its tables of positions say."""
    import torch
    config = model.config.get_text_config()
    said = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    for name, table in model.named_modules():
        if isinstance(table, torch.nn.Embedding) and ("position" in name or name.endswith("wpe")):
            # RoBERTa and its kin count from behind the padding's place
            behind = -1 if table.padding_idx is None else table.padding_idx
            said.append(table.num_embeddings - behind - 1)
    return [n for n in said if isinstance(n, int)]


def alike(embedder, pairs, device):
    """Whether the two texts of each pair are equal, or the cosine of their embeddings is above the
    median pair's (the release's experiments/ilr.py)."""
    import torch
    vectors = embed(embedder, sorted({text for pair in pairs for text in pair}), device)
    cosines = [torch.cosine_similarity(vectors[a], vectors[b], dim=0).item() for a, b in pairs]
    median = statistics.median(cosines)
    return first(lambda: [a == b or x > median for (a, b), x in zip(pairs, cosines, strict=True)])
