"""A folder of adapters -> one ordinary model folder, for tools that cannot read adapters.

    python -m core.merge --model runs/sft/model_1 --out merged

No stage needs this: they open the base with its adapters. Merging into 16 bits rounds away what is
smaller than a step of the weights: the command says how much of the adapters' change is left.
"""
from pathlib import Path

from core.adapters import merge_adapters, read_adapters
from core.cli import make_parser, run_stage
from core.models import add_device_flags, open_model, pick_device, pick_dtype
from core.records import InputError
from core.tokens import open_tokenizer, set_stops
from core.unfinished import refuse_existing


def main(args):
    refuse_existing(args.out)
    adapters = read_adapters(args.model)
    if adapters is None:
        raise InputError(f"{args.model}: not a folder of adapters")

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = open_model(adapters.base, device, dtype=dtype)
    kept = merge_adapters(model, adapters)
    partial = Path(args.out).with_name(f".{Path(args.out).name}.partial")
    tokenizer = open_tokenizer(args.model)
    set_stops(model, tokenizer)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(args.out)
    print(f"{args.out}: {kept:.1%} of the adapters' change is left in "
          f"{str(dtype).removeprefix('torch.')}")


def parser():
    p = make_parser(__doc__, prog="core.merge")
    p.add_argument("--model", required=True, help="folder of adapters")
    p.add_argument("--out", required=True, help="folder to write")
    add_device_flags(p)
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
