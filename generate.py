"""A model and prompts -> completions.

    python generate.py --model runs/sft --data problems.jsonl --out answers.jsonl       # greedy
    python generate.py --model runs/sft --data problems.jsonl --out samples.jsonl \\
        --temperature 0.7 --num-samples 6
    python generate.py --model m1 m2 --data a.jsonl b.jsonl --out oa.jsonl ob.jsonl     # in turn

Records keep all their fields; `completion` is replaced (up to EOS; `truncated` if the token limit
cut it off) and `source` is set. With --num-samples above 1 there is a record per sample, numbered
by `sample`. Batches are formed in one fixed order, longest prompt first, and appended as they
finish: if killed, the same command continues at the first incomplete batch. Under torchrun, each
process answers a share of the batches; the result is the same bytes.

Unlike the paper's release: beam search is asked for by name, never implied by a temperature of 0,
and the noise of a sample comes from (seed, id, sample), so that, up to rounding of the logits, an
answer does not depend on the other rows of its batch.
"""
import os
from pathlib import Path

from core.cli import amount, make_parser, positive, run_stage, short, whole
from core.decoding import check_decoding, decode, decode_beams, sample_uniforms
from core.distributed import deal, first, rank
from core.memory import decoding_rows, lacks_memory
from core.models import add_device_flags, count_weights, open_model, pick_device, pick_dtype
from core.records import InputError, half_of, read_jsonl, write_json, write_jsonl
from core.tokens import encode_prompt, open_tokenizer, stop_ids
from core.unfinished import BatchLog, finished, partial_path


def select_records(args, data, half):
    """The records to answer: those of the asked half, of these the first --limit."""
    records = read_jsonl(data, ("id", "prompt"))
    if half:
        records = [r for r in records if half_of(args.seed, args.round, r["id"]) == half]
    if args.limit:
        records = records[:args.limit]
    if not records:
        raise InputError(f"{data}: none of its records is in half {half}")
    return records


def encode_prompts(args, tokenizer, data, records):
    """Token ids of every record's prompt; InputError if one is empty or too long."""
    prompts = [encode_prompt(tokenizer, r["prompt"], r.place) for r in records]
    for r, prompt in zip(records, prompts, strict=True):
        if not prompt:
            raise InputError(f"{data}: the prompt of {r['id']} is empty, and the tokenizer has no "
                             "BOS token to start from")
        if len(prompt) > args.max_prompt_tokens:
            raise InputError(f"{data}: the prompt of {r['id']} has {len(prompt)} tokens; raise "
                             "--max-prompt-tokens")
    return prompts


def rows_at_once(args, model, prompts):
    """How many rows of a batch are decoded at once: all, or the half, quarter, ... that fits."""
    rows, width = len(prompts), max(map(len, prompts))
    fit = decoding_rows(model, width, args.max_new_tokens, args.num_beams, model.device)
    while rows > fit:
        rows = (rows + 1) // 2
    return rows


def answer(args, model, eos, prompts, noise):
    """(completions as token ids, whether each is truncated) of a batch of prompts as token ids.

    noise: for sampling, the `sample_uniforms` of each row; else empty.
    """
    import torch
    rows, completions, truncated = rows_at_once(args, model, prompts), [], []
    while len(completions) < len(prompts):
        part = slice(len(completions), len(completions) + rows)
        more = [model, prompts[part], eos, args.max_new_tokens]
        uniforms = torch.tensor(noise[part], device=model.device) if noise else None
        try:
            found = (decode_beams(*more, args.num_beams) if args.num_beams > 1 else
                     decode(*more, args.temperature, uniforms))
            completions, truncated = completions + found[0], truncated + found[1]
            continue
        except RuntimeError as e:
            if not lacks_memory(e) or rows == 1:
                raise
        rows = (rows + 1) // 2      # the exception, whose frames hold tensors, is deleted by now
        torch.cuda.empty_cache()
    return completions, truncated


def generate_file(args, model_path, data, out, half):
    """Answer every record of one file (or of one half of it) with one model."""
    settings = {**vars(args), "model": model_path, "data": data, "out": out, "half": half}
    folder = partial_path(__file__, out, settings, [data, model_path])
    records = select_records(args, data, half)

    from tqdm import tqdm
    device = pick_device(args.device)
    tokenizer = open_tokenizer(model_path, args.chat_template)
    prompts = encode_prompts(args, tokenizer, data, records)
    model = open_model(model_path, device, load_in_4bit=args.load_in_4bit,
                       dtype=pick_dtype(args.dtype, device)).eval()
    eos = stop_ids(tokenizer, model)
    # a job is one sample of one record: (index of the record, number of the sample)
    jobs = [(i, s) for i in range(len(records)) for s in range(args.num_samples)]
    jobs.sort(key=lambda job: (-len(prompts[job[0]]), job))
    batches = [jobs[i:i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    seed = [args.seed, args.round] if args.round else args.seed
    check_decoding(model, prompts[0], args.num_beams)
    rows = rows_at_once(args, model, [prompts[i] for i, _ in batches[0]])
    if rows < len(batches[0]) and not rank():
        print(f"note: {short(out)}: memory for {rows} of a batch's {len(batches[0])} rows at once")

    def answer_texts(batch):
        """[record index, sample number, text, truncated, tokens generated] of each job."""
        noise = [sample_uniforms(seed, records[i]["id"], s, args.max_new_tokens).tolist()
                 for i, s in batch if args.temperature > 0]
        ids = [prompts[i] for i, _ in batch]
        completions, truncated = answer(args, model, eos, ids, noise)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        answers = zip(batch, texts, completions, truncated, strict=True)
        return [[i, s, text, cut, len(ids) + (not cut)] for (i, s), text, ids, cut in answers]

    log = BatchLog(folder, [len(b) for b in batches])
    with tqdm(total=len(jobs), initial=len(log.results), desc=f"generate {short(out)}",
              unit="answer", mininterval=1) as bar:
        for answered in deal(batches[log.batches_done:], answer_texts):
            log.append(answered)
            bar.update(len(answered))
    # gc.freeze() in open_tokenizer keeps this frame, with its variables, if something raised there
    weights, model = count_weights(model), None
    if rank():
        return

    # equal prompts of a batch are read once; every beam runs through the model
    read = sum(len(prompts[i]) for batch in batches for i in {i for i, _ in batch})
    write_json(f"{out}.price", {
        "weights": weights, "generated_tokens": args.num_beams * sum(r[4] for r in log.results),
        "read_tokens": read})
    answers = [{**records[i], "completion": text, "source": args.source,
                **({"sample": s} if args.num_samples > 1 else {}), "truncated": cut}
               for i, s, text, cut, _ in sorted(log.results)]
    write_jsonl(out, answers)
    folder.unlink()
    finished(folder)
    print(f"{out}: {len(answers)} completions of {len(records)} prompts, "
          f"{sum(r['truncated'] for r in answers)} cut off at {args.max_new_tokens} tokens")


def check(args):
    given = {"--model": args.model, "--data": args.data, "--half": args.half or [None]}
    for name, values in given.items():
        if len(values) not in (1, len(args.out)):
            raise InputError(f"{name} has {len(values)} values; give one for all, or one for each "
                             f"of the {len(args.out)} of --out")
    if len({os.path.realpath(out) for out in args.out}) < len(args.out):
        raise InputError("--out names one file twice")
    if args.num_samples > 1 and args.temperature == 0:
        raise InputError("--num-samples above 1 needs a --temperature above 0: greedy samples "
                         "are all equal")
    if args.num_beams > 1 and args.temperature > 0:
        raise InputError("--num-beams above 1 goes with --temperature 0")


def main(args):
    check(args)
    halves = args.half or [None]
    for k, out in enumerate(args.out):
        # the first process looks for all: it may have written the file before others look
        if len(args.out) > 1 and first(Path(out).exists):
            print(f"{out} exists and is left as it is")
            continue
        generate_file(args, args.model[k % len(args.model)], args.data[k % len(args.data)], out,
                      halves[k % len(halves)])


def parser():
    p = make_parser(__doc__, prog="generate.py")
    p.add_argument("--model", required=True, nargs="+", help="folders or hub names")
    p.add_argument("--data", required=True, nargs="+", help="records with prompt, or messages")
    p.add_argument("--out", required=True, nargs="+", help="files to write")
    p.add_argument("--temperature", type=amount, default=0.0, help="0 is greedy")
    p.add_argument("--num-samples", type=positive, default=1, help="completions per prompt")
    p.add_argument("--num-beams", type=positive, default=1, help="above 1: beam search")
    p.add_argument("--max-new-tokens", type=positive, default=256, help="more are cut off")
    p.add_argument("--max-prompt-tokens", type=positive, default=4096, help="more are an error")
    p.add_argument("--batch-size", type=positive, default=256, help="rows decoded together")
    p.add_argument("--seed", type=whole, default=0, help="of the sampling noise and the halves")
    p.add_argument("--half", type=int, nargs="+", choices=[1, 2],
                   help="answer the records of one cross-labelling half only")
    p.add_argument("--round", type=whole, default=0, help="each has its own halves and noise")
    p.add_argument("--source", default="model", help="the `source` of the answers")
    p.add_argument("--limit", type=whole, default=0, help="only the first N records (0: all)")
    p.add_argument("--load-in-4bit", action="store_true",
                   help="the model's linear layers in 4 bits (NF4), to save memory")
    p.add_argument("--chat-template", action="store_true",
                   help="prompts in the model's own chat format instead of plain text")
    add_device_flags(p)
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
