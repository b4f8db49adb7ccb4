"""A model folder of this project -> one ordinary model folder in one type.

    python core/merge.py --model runs/sft/model_1 --out merged        # adapters and their base
    python core/merge.py --model runs/sft/model_1 --out small --dtype bfloat16

For tools that cannot read adapters; the stages open a base with its adapters themselves. Also
rounds a model that learned in fp32 to 16 bits. Merging into 16 bits rounds away what is smaller
than a step of the weights: the command says how much of the adapters' change is left.
"""
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.adapters import merge_adapters, read_adapters
from core.cli import make_parser, run_stage
from core.models import add_device_flags, open_model, pick_device, pick_dtype
from core.tokens import open_tokenizer, set_stops
from core.unfinished import refuse_existing


def main(args):
    refuse_existing(args.out)
    adapters = read_adapters(args.model)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = open_model(adapters.base if adapters else args.model, device, dtype=dtype)
    said = f"{args.out}: in {str(dtype).removeprefix('torch.')}"
    if adapters:
        said += f": {merge_adapters(model, adapters):.1%} of the adapters' change is left"
    partial = Path(args.out).with_name(f".{Path(args.out).name}.partial")
    tokenizer = open_tokenizer(args.model)
    set_stops(model, tokenizer)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(args.out)
    print(said)


def parser():
    p = make_parser(__doc__, prog="core/merge.py")
    p.add_argument("--model", required=True, help="folder or hub name")
    p.add_argument("--out", required=True, help="folder to write")
    add_device_flags(p)
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
