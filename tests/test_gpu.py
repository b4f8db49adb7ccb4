"""The stages on a CUDA device, in bf16 with their 8-bit optimizers. Skipped without one."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, rows, run

import compare
import dpo
import generate
import sft
from core.models import open_model
from core.packing import completion_logps, pack
from core.records import write_jsonl
from core.tokens import encode_completion, encode_prompt

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"], ["--lora-rank", "4"],
                                  ["--lora-rank", "4", "--load-in-4bit"]], ids=" ".join)
def test_training_and_answers(tiny, problems, tmp_path, more):
    write_jsonl(tmp_path / "d.jsonl", problems[:4])
    run(sft, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--epochs", 60, "--lr",
        0.01, *more, "--out", tmp_path / "m")
    losses = [r["loss"] for r in rows(tmp_path / "m/metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]
    four = ["--load-in-4bit"] if "--load-in-4bit" in more else []
    for how in ([], ["--num-beams", 2], ["--temperature", 0.7, "--num-samples", 2]):
        run(generate, "--model", tmp_path / "m", "--data", tmp_path / "d.jsonl",
            "--max-new-tokens", 16, *four, *how, "--out", tmp_path / f"o{len(how)}.jsonl")
    write_jsonl(tmp_path / "p.jsonl",
                [{"id": p["id"], "prompt": p["prompt"], "chosen": p["completion"],
                  "rejected": "#### 1"} for p in problems[:4]])
    run(dpo, "--model", tmp_path / "m", "--data", tmp_path / "p.jsonl", "--epochs", 4, "--lr",
        1e-3, *more, "--out", tmp_path / "n")
    metrics = rows(tmp_path / "n/metrics.jsonl")
    # bf16 carries 3 digits: the log-probabilities of 60 tokens may be off by a few hundredths,
    # times beta = 0.1
    assert metrics[0]["loss"] == pytest.approx(0.693147, abs=0.02)
    assert metrics[-1]["rewards/margins"] > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_processes(tiny, problems, tmp_path):
    """Sharded by NCCL in bf16, losses are equal but for the order of the sums; answers are the same
    bytes."""
    def start(*argv):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", "2", *map(str, argv)], cwd=ROOT, check=True)
    write_jsonl(tmp_path / "d.jsonl", problems)
    train = ["--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--epochs", 4, "--lr",
             1e-3, "--batch-size", 6]
    start("sft.py", *train, "--out", tmp_path / "two")
    run(sft, *train, "--optimizer", "adamw", "--out", tmp_path / "one")
    two, one = ([r["loss"] for r in rows(tmp_path / f"{name}/metrics.jsonl")]
                for name in ("two", "one"))
    assert two == pytest.approx(one, rel=0.02)      # bf16 carries 3 digits
    start("sft.py", *train, "--lora-rank", 4, "--gradient-checkpointing", "--out",
          tmp_path / "lora")
    for more in ([], ["--load-in-4bit"]):
        answer = ["--model", tmp_path / "lora", "--data", tmp_path / "d.jsonl", "--max-new-tokens",
                  16, "--batch-size", 3, *more]
        start("generate.py", *answer, "--out", tmp_path / f"two{len(more)}.jsonl")
        run(generate, *answer, "--out", tmp_path / f"one{len(more)}.jsonl")
        two, one = (tmp_path / f"{name}{len(more)}.jsonl" for name in ("two", "one"))
        assert two.read_bytes() == one.read_bytes()


def test_the_same_log_probabilities_as_on_the_cpu(tiny, tokenizer, problems):
    sequences, found = [], []
    for r in problems[:6]:
        p, c = encode_prompt(tokenizer, r["prompt"]), encode_completion(tokenizer, r["completion"])
        sequences.append((p + c, [0.0] * len(p) + [1.0] * len(c)))
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32),
                          ("cuda", torch.bfloat16)):
        for row_tokens in (1, 200):
            model = open_model(tiny / "model", torch.device(device)).to(dtype)
            values = torch.zeros(6)
            for batch in pack(sequences, row_tokens, 400, device):
                logps, _, owner = completion_logps(model, batch)
                values.index_add_(0, owner.cpu(), logps.detach().cpu())
            found.append(values)
    # sums over about 60 tokens: fp32 without TF32 to 1e-3, bf16 to 3 digits
    assert all((x - found[0]).abs().max() < 1e-3 for x in found[1:4])
    assert all(((x - found[0]).abs() / found[0].abs()).max() < 0.03 for x in found[4:])


def test_judge(tiny, problems, tmp_path):
    write_jsonl(tmp_path / "gold.jsonl", problems)
    write_jsonl(tmp_path / "1.jsonl",
                [{**p, "completion": f"#### {int(p['reference']) + 1}"} for p in problems])
    run(compare, "train", "--model", tiny / "model", "--task", "arithmetic", "--data",
        tmp_path / "1.jsonl", "--gold", tmp_path / "gold.jsonl", "--batch-size", 8, "--lr", 1e-3,
        "--epochs", 2, "--out", tmp_path / "judge")
    run(compare, "score", "--judge", tmp_path / "judge", "--task", "arithmetic", "--a",
        tmp_path / "gold.jsonl", "--b", tmp_path / "1.jsonl", "--out", tmp_path / "c.jsonl")
    assert all(0 <= c["prob_b"] <= 1 for c in rows(tmp_path / "c.jsonl"))
