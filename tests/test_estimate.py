"""run_ilr.sh --estimate: memory as the stages plan it, time as it was simulated, disk as it is."""
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run

import generate
import sft
from core import memory
from core.estimate import CARDS, Estimate, estimate
from core.plan import read_plan
from core.records import InputError, write_jsonl
from core.roofline import Made, Model

H100, CPU = CARDS["H100"], torch.device("cpu")
MISTRAL, GEMMA = "mistralai/Mistral-7B-v0.1", "google/gemma-2b"
PACKING = ["--micro-tokens", "4096", "--gradient-checkpointing"]


@pytest.fixture()
def plan(monkeypatch, tmp_path):
    """Commands, as lists of words -> the stages of a plan, named a, b, ..."""
    for name, value in (("OUT", "runs/x"), ("BASES", "bases"), ("NPROC", "1"), ("THREADS", "1"),
                        ("JUDGE_PARTS", "")):
        monkeypatch.setenv(name, value)
    data = ["tasks/gsm8k.py", "--out", "runs/x/data", "--train", "1000", "--gt", "600", "--test",
            "50"]

    def stages(*commands):
        lines = ["\x1f".join([chr(ord("a") + k), *map(str, words)])
                 for k, words in enumerate([data, *commands])]
        monkeypatch.chdir(ROOT)
        return read_plan("\n".join(lines))
    return stages


def costs(stages, card=H100):
    work = Estimate(card)
    return [work.of(stage) for stage in stages], work


@pytest.mark.parametrize("base, rank, seen, milliseconds", [
    (MISTRAL, 0, 2048, 518), (MISTRAL, 64, 2048, 521), (GEMMA, 0, 2048, 184),
    (MISTRAL, 0, 113, 465)])
def test_a_micro_batch_takes_as_long_as_it_was_simulated(base, rank, seen, milliseconds):
    """4,096 tokens, half of them labelled, with checkpointing, on an H100: the sum over every
    operation of a simulation, of rows of 2,048 tokens under a mask, and of GSM8K's sequences each
    for itself (benchmarks/results/simulated_card.md). 5%: the formulas go by a layer's widths."""
    model = Model(Made(base, rank), False, None, False)
    found = model.seconds(H100, 4096, seen, 0.5, 1, train=True, again=True)
    assert 1e3 * found == pytest.approx(milliseconds, rel=0.05)


def test_a_token_takes_as_long_as_it_was_simulated():
    """Mistral-7B after 400 tokens (benchmarks/results/simulated_card.md), 5%: 256 rows 13.2 ms; of
    beams that move 64 of the tokens 16.6. With few rows it takes as long as launching 1,495
    kernels: 7 to 12 ms."""
    model = Model(Made(MISTRAL, 0), False, None, False)
    assert 1e3 * model.token_seconds(H100, 256, 1, 400, 0) == pytest.approx(13.2, rel=0.05)
    assert 1e3 * model.token_seconds(H100, 256, 1, 400, 64) == pytest.approx(16.6, rel=0.05)
    assert 7 < 1e3 * model.token_seconds(H100, 8, 1, 400, 0) < 12
    # the weights are read in any case
    assert model.token_seconds(H100, 8, 1, 400, 0) > model.bytes / H100.memory
    four = Model(Made(MISTRAL, 64), True, None, False)
    assert four.token_seconds(H100, 8, 1, 400, 0) > model.token_seconds(H100, 8, 1, 400, 0)


@pytest.mark.parametrize("base, flags", [
    (MISTRAL, ["--lora-rank", "64"]), (MISTRAL, ["--lora-rank", "0"]),
    (MISTRAL, ["--lora-rank", "64", "--load-in-4bit"]), (GEMMA, ["--optimizer", "rmsprop8bit"])])
def test_memory_is_what_the_training_would_print(plan, base, flags, monkeypatch, capsys):
    words = ["sft.py", "--model", base, "--data", "runs/x/data/gt.jsonl", "--out", "runs/x/m",
             *PACKING, *flags]
    (_, cost), work = costs(plan(words))
    args = sft.parser().parse_args(words[1:])
    built = work.model(Made(base, args.lora_rank), args.load_in_4bit, None, False)
    kind = "RMSprop8bit" if "rmsprop8bit" in flags else "AdamW8bit"
    optimizer = type(kind, (), {"param_groups": [{"params": built.trained}]})()
    monkeypatch.setattr(memory, "device_bytes", lambda device: 1e12)
    prompt, answer, longest = work.lengths
    sequences = [([5] * (n + answer), [0.0] * n + [1.0] * answer)
                 for n in (*[prompt] * 999, longest)]
    memory.check_memory(built.model, [optimizer], args, CPU, sequences)
    said = re.search(r"= ([\d.]+) of", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(cost.memory / 1e9, rel=0.005)       # three digits
    assert cost.words.endswith("600 records x 2")


def test_prompts_at_once_are_those_of_generate(plan, monkeypatch):
    """4 beams of Mistral-7B on 80 GB: 256 prompts do not fit beside the weights."""
    words = ["generate.py", "--model", MISTRAL, "--data", "runs/x/data/unlab.jsonl", "--out",
             "runs/x/a.jsonl", "--num-beams", "4", "--batch-size", "256"]
    (_, cost), work = costs(plan(words))
    built = work.model(Made(MISTRAL, 0), False, None, False)
    monkeypatch.setattr(memory, "device_bytes", lambda device: H100.bytes)
    args = generate.parser().parse_args(words[1:])
    rows = generate.rows_at_once(args, built.model, [[5] * 234] * 256)
    assert 32 <= rows < 256 and f"{rows} of 256 prompts at once" in cost.words
    assert 0.4 * H100.bytes < cost.memory < 0.95 * H100.bytes
    # a quarter of the rows, four times the calls, each of which reads the weights
    small = H100._replace(bytes=H100.bytes / 3)
    (_, slower), _ = costs(plan(words), small)
    assert slower.memory < cost.memory < slower.memory * 4 and slower.seconds > cost.seconds


def test_counts_follow_the_files(plan):
    """Halves, samples, the pairs that DPO keeps, checkpoints, and what a folder was made from."""
    m, d = "runs/x/m", "runs/x/data"
    stages = plan(
        ["sft.py", "--model", GEMMA, "--data", f"{d}/gt.jsonl", "--out", m, "--lora-rank", "8",
         "--save-at", "0.5"],
        ["generate.py", "--model", f"{m}/checkpoint-50", "--data", f"{d}/unlab.jsonl", "--out",
         "runs/x/s.jsonl", "--num-samples", "6", "--temperature", "1"],
        ["compare.py", "train", "--model", GEMMA, "--task", "gsm8k", "--gold", f"{d}/gt.jsonl",
         "--data", "runs/x/s.jsonl", "--out", "runs/x/j"],
        ["compare.py", "score", "--judge", "runs/x/j", "--task", "gsm8k", "--a", "runs/x/s.jsonl",
         "--out", "runs/x/c.jsonl"],
        ["refine.py", "--method", "pairs", "--task", "gsm8k", "--max-replace", "0.15",
         "--comparisons", "runs/x/c.jsonl", "--out", "runs/x/p.jsonl"],
        ["dpo.py", "--model", m, "--data", "runs/x/p.jsonl", "--out", "runs/x/d", "--lora-rank",
         "8"],
        ["sft.py", "--model", GEMMA, "--data", f"{d}/unlab.jsonl", "--half", "1", "--out",
         "runs/x/h"])
    found, work = costs(stages)
    words = [cost.words for cost in found]
    assert words == ["", "gemma-2b + LoRA 8, 600 records x 2", "gemma-2b + LoRA 8, 2,400 answers",
                     "gemma-2b, 1,920 questions x 5, at most",
                     "gemma-2b, 1,200 pairs in both orders, at most", "",
                     "gemma-2b + LoRA 8, 180 pairs x 2", "gemma-2b, 200 records x 2"]
    weights = 2.506e9
    assert found[7].disk == pytest.approx(4 * weights, rel=0.01)     # bf16, and remainders
    assert found[1].disk == 2 * found[6].disk < 0.01 * found[7].disk        # a checkpoint
    assert found[7].memory > 3 * found[1].memory / 2
    assert work.fetched == {GEMMA: pytest.approx(2 * weights, rel=0.01)}


@pytest.mark.parametrize("more", [["--lora-rank", 4], ["--dtype", "bfloat16"]])
def test_disk_is_what_a_training_leaves(plan, tiny, problems, tmp_path, more):
    write_jsonl(tmp_path / "d.jsonl", problems[:8])
    words = ["sft.py", "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--out",
             tmp_path / "m", "--save-at", "0.5", *more]
    (_, cost), _ = costs(plan(words))
    assert "8 records" in cost.words       # those of the file
    run(sft, *words[1:])
    left = sum(p.stat().st_size for p in (tmp_path / "m").rglob("*.safetensors"))
    # headers of a few kB
    assert cost.disk <= left < cost.disk + 16_384


def test_what_does_not_fit_and_what_is_not_known(plan, capsys):
    stages = plan(["sft.py", "--model", MISTRAL, "--data", "runs/x/data/gt.jsonl", "--out",
                   "runs/x/m", *PACKING],
                  ["sft.py", "--model", "no/such-model", "--data", "runs/x/data/gt.jsonl", "--out",
                   "runs/x/n"],
                  ["generate.py", "--model", "runs/x/n", "--data", "runs/x/data/test.jsonl",
                   "--out", "runs/x/a.jsonl"])
    estimate(stages, "H100")
    said = capsys.readouterr().out
    assert "simulated; an H200 took" in said and "DOES NOT FIT" not in said
    assert said.count("not counted, there is no config of no/such-model here") == 2
    estimate(stages, "4090")
    assert "b: Mistral-7B-v0.1, 600 records x 2; DOES NOT FIT\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="--estimate=T4: expected one of H100 A100 4090"):
        estimate(stages, "T4")


def test_configs_come_from_folders_too(plan, tiny):
    """A model folder, and the JSON of a base model that a plan trains."""
    stages = plan(["sft.py", "--init-config", tiny / "strong.json", "--tokenizer",
                   tiny / "tokenizer", "--data", "runs/x/data/gt.jsonl", "--out", "bases/strong",
                   "--optimizer", "muon", "--dtype", "float32"],
                  ["sft.py", "--model", "bases/strong", "--data", "runs/x/data/gt.jsonl", "--out",
                   "runs/x/m"],
                  ["generate.py", "--model", tiny / "model", "--data", "runs/x/data/test.jsonl",
                   "--out", "runs/x/a.jsonl"])
    (_, base, tuned, answers), work = costs(stages)
    assert base.words == tuned.words and base.disk == tuned.disk > 0 < answers.memory
    assert not work.fetched


def run_ilr(*words, **variables):
    return subprocess.run(["bash", "run_ilr.sh", *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable, **variables})


def test_of_a_preset(tmp_path):
    """Every model stage has a line, the totals are of these lines, and nothing is written."""
    given = {"ROUNDS": "1", "OUT": str(tmp_path / "run")}
    done = run_ilr("gsm8k", "--dry-run", "--estimate=A100", **given)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^ *([\d.]+) +([\d.]+) +([\d.]+)  (.*)$", done.stdout, re.M)
    numbers = list(zip(*lines, strict=True))[:3]
    most, disk, hours = (list(map(float, column)) for column in numbers)
    assert most[-1] == max(most[:-1]) < 80
    assert disk[-1] == pytest.approx(sum(disk[:-1]), abs=0.05 * len(lines))     # rounded
    assert hours[-1] == pytest.approx(sum(hours[:-1]), abs=0.005 * len(lines))
    names = [line[3].partition(":")[0] for line in lines[:-1]]
    planned = run_ilr("gsm8k", "--dry-run", **given).stdout
    model = re.findall(r"^# \[.*\] (\S+)\n\S+ (?:sft|dpo|generate|compare)\.py", planned, re.M)
    assert names == model and not (tmp_path / "run").exists()


def test_of_the_default_task(tmp_path):
    """Its base models are not there yet: it says so, and ends well."""
    made = {"BASES": str(tmp_path / "bases"), "OUT": str(tmp_path / "run")}
    done = run_ilr("--estimate", "--dry-run", **made)
    assert done.returncode == 0 and "not counted, there is no config" in done.stdout, done.stderr
    assert "one H100" in done.stdout and not list(tmp_path.iterdir())


def test_dpo_reads_its_pairs_once_more(plan):
    """For the reference: more than SFT on as many tokens, beside what every stage takes."""
    pair = ["--model", GEMMA, "--data", "runs/x/data/gt.jsonl", "--lora-rank", "8"]
    (_, tuned, preferred, none), _ = costs(plan(
        ["sft.py", *pair, "--out", "runs/x/m", "--epochs", "2"],
        ["dpo.py", *pair, "--out", "runs/x/d", "--epochs", "1"],
        ["generate.py", *pair[:4], "--limit", "1", "--out", "runs/x/a.jsonl"]))
    assert preferred.seconds - none.seconds > 1.1 * (tuned.seconds - none.seconds) > 1
