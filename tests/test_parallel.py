"""Several processes under torchrun, on the CPU with gloo: the results are those of one process,
files of answers byte for byte.

Started by torchrun with a file of jobs, this file does them one after the other, for each start
costs seconds.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Interrupted, interrupt_after, preferences, rows, run, tiny_model

import compare
import dpo
import generate
import sft
from core import distributed, memory, unfinished
from core.records import InputError, write_jsonl
from core.training import Training
from core.unfinished import BatchLog

pytestmark = pytest.mark.slow

STAGES = {"sft": sft, "dpo": dpo, "compare": compare, "generate": generate}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
TRAIN = ["--micro-tokens", 200, "--state-every", 0]


def do(jobs):
    """Each job: (stage, argv, None or what to interrupt (owner, name, calls)) -> how it ended."""
    ends = []
    for stage, argv, cut in jobs:
        with pytest.MonkeyPatch.context() as m:
            if cut:
                owner, name, calls = cut
                owner = {"Training": Training, "BatchLog": BatchLog}[owner]
                interrupt_after(m, owner, name, calls)
            try:
                run(STAGES[stage], *argv)
                ends.append("done")
            except Interrupted:
                ends.append("cut")
                while unfinished.locks:     # as the end of the process would
                    unfinished.locks.popitem()[1].close()
            except InputError as e:
                ends.append(str(e))
    return ends


def do_with(count, jobs, folder):
    """The jobs in `count` processes: how each ended."""
    path = folder / f"jobs_{count}.json"
    path.write_text(json.dumps(jobs, default=str))
    done = subprocess.run([*TORCHRUN, str(count), __file__, path], env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def jobs(out, commands):
    """{name: job} of [(name, stage, argv)]; each writes to its name in the folder `out`."""
    return {name: (stage, [str(a) for a in (*argv, "--out", out / name)], None)
            for name, stage, argv in commands}


def trainings(top, data, out):
    """{name: job} of what one process and several do to the same data."""
    tied, untied = ["--model", top / "model"], ["--model", data / "untied"]
    short = ["--data", data / "short.jsonl", "--epochs", 2, "--lr", 1e-3, *TRAIN]
    pairs = ["--data", data / "pairs.jsonl", "--epochs", 1, "--batch-size", 4, "--lr", 1e-3, *TRAIN]
    judge = ["train", "--task", "arithmetic", "--data", data / "wrong.jsonl", "--gold",
             data / "gold.jsonl", "--lr", 1e-3, "--batch-size", 6, *TRAIN]
    return jobs(out, [
        ("tied", "sft", [*tied, *short, "--batch-size", 6, "--save-at", 0.5]),
        # two records for three processes
        ("few", "sft", [*untied, *short, "--batch-size", 2, "--epochs", 1,
                        "--gradient-checkpointing"]),
        ("exact", "sft", ["--model", data / "small", *short, "--epochs", 1, "--batch-size", 2,
                          "--micro-tokens", 1, "--lora-rank", 4]),
        ("lora", "sft", [*untied, *short, "--batch-size", 6, "--lora-rank", 4]),
        ("half", "sft", [*tied, *short, "--batch-size", 6, "--dtype", "bfloat16"]),
        ("muon", "sft", [*untied, *short, "--batch-size", 6, "--optimizer", "muon"]),
        ("dpo", "dpo", [*tied, *pairs, "--nll-weight", 0.1]),
        ("moved", "dpo", [*untied, "--reference", top / "other", *pairs, "--lora-rank", 4,
                          "--optimizer", "rmsprop"]),
        ("judge", "compare", [*judge, "--model", top / "model", "--epochs", 2]),
        ("stopped", "compare", [*judge, "--model", data / "untied", "--epochs", 3,
                                "--stop-accuracy", 0.01])])


def answers(top, data, out):
    """{file: job} of what must be the same bytes whoever makes it."""
    asked = ["--data", data / "gold.jsonl", "--max-new-tokens", 12, "--batch-size", 3]
    comparing = ["--task", "arithmetic", "--a", data / "gold.jsonl", "--b", data / "wrong.jsonl",
                 "--batch-size", 3]
    return jobs(out, [
        ("greedy.jsonl", "generate", ["--model", top / "model", *asked]),
        ("sampled.jsonl", "generate", ["--model", top / "other", *asked, "--temperature", 0.7,
                                       "--num-samples", 2]),
        ("beams.jsonl", "generate", ["--model", data / "untied", *asked, "--num-beams", 2]),
        ("four.jsonl", "generate", ["--model", top / "other", *asked, "--load-in-4bit"]),
        ("scores.jsonl", "compare", ["score", "--judge", data / "alone/judge", *comparing])])


@pytest.fixture(scope="module")
def done(tiny, tokenizer, problems, tmp_path_factory):
    """(folder, {processes: what they printed}) with alone/, 2/ and 3/, and chain/ that 1, 2 and 3
    processes have made in turn."""
    data = tmp_path_factory.mktemp("parallel")
    tiny_model(seed=3, vocab=len(tokenizer)).save_pretrained(data / "untied")
    # its gradients are too small to be clipped
    tiny_model(seed=4, vocab=len(tokenizer), initializer_range=0.02).save_pretrained(data / "small")
    for name in ("untied", "small"):
        tokenizer.save_pretrained(data / name)
    write_jsonl(data / "gold.jsonl", problems)
    write_jsonl(data / "short.jsonl", problems[:10])
    write_jsonl(data / "wrong.jsonl",
                [{**p, "completion": f"#### {int(p['reference']) + 1}"} for p in problems])
    write_jsonl(data / "pairs.jsonl", preferences(problems[:9]))
    chain, said = data / "chain", {}
    cut = [trainings(tiny, data, chain)["tied"], trainings(tiny, data, chain)["judge"],
           answers(tiny, data, chain)["sampled.jsonl"]]
    stops = [("Training", "log", 1), ("Training", "log", 2), ("BatchLog", "append", 2)]
    cut = [(*job[:2], stop) for job, stop in zip(cut, stops, strict=True)]
    assert do(cut) == ["cut"] * 3
    for count in (1, 2, 3):
        out = data / ("alone" if count == 1 else str(count))
        todo = [*trainings(tiny, data, out).values(), *answers(tiny, data, out).values()]
        if count == 1:
            assert do(todo) == ["done"] * len(todo)
            continue
        todo += [(*job[:2], job[2] if count == 2 else None) for job in cut]
        if count == 2:      # and what several processes refuse, each in one line
            for stage, more in (("sft", ["--optimizer", "adamw8bit"]),
                                ("sft", ["--load-in-4bit", "--lora-rank", "4"]),
                                ("dpo", ["--optimizer", "rmsprop8bit"])):
                file = data / ("pairs.jsonl" if stage == "dpo" else "short.jsonl")
                todo.append((stage, ["--model", tiny / "model", "--data", file, *more,
                                     "--out", out / "refused"], None))
            todo.append(("compare", ["score", "--judge", "oracle", "--task", "arithmetic",
                                     "--a", data / "gold.jsonl", "--b", data / "wrong.jsonl",
                                     "--out", out / "o"], None))
        ends, said[count] = do_with(count, todo, data)
        usual = len(trainings(tiny, data, out)) + len(answers(tiny, data, out))
        assert ends[:usual] == ["done"] * usual
        assert ends[usual:usual + 3] == ["cut" if count == 2 else "done"] * 3
        if count == 2:
            refused = ends[usual + 3:]
            assert "8-bit optimizers" in refused[0]
            assert "--load-in-4bit trains in one process" in refused[1] and "8-bit" in refused[2]
            assert refused[3] == "--judge oracle runs no model here: start it without torchrun"
    return data, said


def weights(folder):
    """What was trained, exactly: adapters, or weights with their remainders."""
    from safetensors.torch import load_file

    from core.models import REMAINDER
    from core.precision import join
    if (folder / "adapter_model.safetensors").exists():
        return load_file(folder / "adapter_model.safetensors")
    found = load_file(folder / "model.safetensors")
    rest = load_file(folder / REMAINDER) if (folder / REMAINDER).exists() else {}
    return {k: join(w, rest[k]) if k in rest else w for k, w in found.items()}


NAMES = ["tied", "few", "exact", "lora", "muon", "dpo", "moved", "judge", "stopped",
         "half"]


def assert_same_training(name, got, expected):
    """Losses to the log's six digits; weights to a share of the learning rate.

    Adam divides each gradient by its own size: one that is nothing but rounding moves its weight as
    far as any other, and 1e-3 * 8 steps is what a weight can move at all. Muon's matrices are made
    orthogonal in bf16, whose 3 digits differ with the order of the sums; so do bf16 gradients, and
    with them their norm by 3%.
    """
    ours, theirs = rows(got / "metrics.jsonl"), rows(expected / "metrics.jsonl")
    loose = {"muon": 20, "half": 300}.get(name, 1)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(abs(a[k] - b[k]) <= loose * 1e-4 * max(1, abs(b[k])) for k in a), (a, b)
    a, b = weights(got), weights(expected)
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max().item() for k in a) <= min(loose, 20) * 2e-4
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in expected.iterdir())
    about = "adapter_config.json" if (got / "adapter_config.json").exists() else "config.json"
    for other in (about, "price.json"):
        assert (got / other).read_bytes() == (expected / other).read_bytes(), other


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_weights_are_those_of_one_process(done, name, count):
    data, said = done
    assert_same_training(name, data / str(count) / name, data / "alone" / name)
    if name == "tied":
        checkpoint = data / str(count) / "tied/checkpoint-50"
        assert "model.safetensors" in {p.name for p in checkpoint.iterdir()}
        assert f"sharded over {count} processes" in said[count]
        assert f"GB in each of {count} processes" in said[count]
    if name in ("lora", "moved", "exact"):
        assert (data / str(count) / name / "adapter_model.safetensors").exists()


def test_weights_are_bitwise_those_of_one_process_where_the_sums_are(done):
    """Two records a batch, one in each micro-batch: a + b in both cases, and nothing is clipped,
    whose norm is summed by shards. The log's loss is summed in float64, and equal to all its
    digits."""
    data, _ = done
    ours, theirs = (rows(data / top / "exact/metrics.jsonl") for top in ("2", "alone"))
    assert all(row["grad_norm"] < 1 for row in theirs)
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]
    two, one = (data / top / "exact/adapter_model.safetensors" for top in ("2", "alone"))
    assert two.read_bytes() == one.read_bytes()
    a = weights(data / "2/exact")
    assert max(b.abs().max().item() for k, b in a.items() if "lora_B" in k) > 1e-5      # it was 0


def test_training_moved_the_weights_far_more_than_the_tolerance(done):
    data, _ = done
    for name in set(NAMES) - {"exact"}:
        start, end = weights(data / "untied"), weights(data / "alone" / name)
        moved = [(end[k] - start.get(k, 0)).abs().max().item() for k in end
                 if k in start or "lora_B" in k]        # which was 0
        assert max(moved) > 2e-3, name


@pytest.mark.parametrize("count", [2, 3])
def test_files_of_answers_are_the_same_bytes(done, tiny, count):
    data, _ = done
    for name in answers(tiny, data, data):
        for more in ("", ".summary" if name == "scores.jsonl" else ".price"):
            several, one = (data / top / (name + more) for top in (str(count), "alone"))
            assert several.read_bytes() == one.read_bytes(), name
        # nothing is left behind
        assert not list((data / str(count)).glob(f".*{name}*"))


def test_what_one_process_began_two_and_then_three_continue(done):
    data, said = done
    assert_same_training("tied", data / "chain/tied", data / "alone/tied")
    assert_same_training("judge", data / "chain/judge", data / "alone/judge")
    # said by the first alone
    assert said[2].count("continuing after step") == 2 == said[3].count("continuing after step")
    chain, alone = (data / top / "sampled.jsonl" for top in ("chain", "alone"))
    assert chain.read_bytes() == alone.read_bytes()
    assert not list((data / "chain").glob(".*"))


def test_the_reference_and_its_order(done):
    """Of two processes that answer blocks in turn, the log is that of one; so are the judge's and
    DPO's numbers at step 1, before any update."""
    data, _ = done
    for name in ("dpo", "moved"):
        for count in (2, 3):
            ours, theirs = (rows(data / top / name / "metrics.jsonl")[0]
                            for top in (str(count), "alone"))
            assert all(ours[k] == pytest.approx(theirs[k], rel=1e-5, abs=1e-5) for k in ours)


def start(count, *words):
    return subprocess.Popen([*TORCHRUN, str(count), *map(str, words)], cwd=ROOT, env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_bad_input_is_one_line_of_the_first_process(tiny, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"id": 1}\n')
    process = start(2, "sft.py", "--model", tiny / "model", "--data", tmp_path / "broken.jsonl",
                    "--out", tmp_path / "m")
    out, err = process.communicate(timeout=120)
    # torchrun's own exit code is always 1
    assert process.returncode == 1 and re.findall(r"exitcode +: 2 ", err)
    # "another process": where one is slow
    said = [line for line in err.splitlines()
            if line.startswith("sft.py: error:") and "another process" not in line]
    assert said == [f"sft.py: error: {tmp_path}/broken.jsonl:1: field 'prompt' is missing"]
    assert list(tmp_path.iterdir()) == [tmp_path / "broken.jsonl"]


def test_one_process_killed_ends_the_run_and_it_continues(done, tiny, tmp_path):
    data, _ = done
    argv = [*map(str, ["--model", tiny / "model", "--data", data / "short.jsonl", "--epochs", 20,
                       "--batch-size", 6, "--lr", 1e-4, *TRAIN])]
    process = start(2, "sft.py", *argv, "--out", tmp_path / "m")
    begun = time.monotonic()
    while not (states := list(tmp_path.glob(".m.partial/state.pt"))):
        assert process.poll() is None and time.monotonic() - begun < 120
        time.sleep(0.02)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)],
                              capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    killed = time.monotonic()
    os.kill(int(children[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 60
    assert "sft.py: error: process 0 of 2: another process has failed" in err and "SIGKILL" in err
    assert states[0].exists() and not (tmp_path / "m").exists()
    # nobody is left behind
    assert subprocess.run(["ps", "-p", children[0]], capture_output=True).returncode != 0
    assert do([("sft", [*argv, "--out", tmp_path / "whole"], None)]) == ["done"]
    ends, said = do_with(3, [("sft", [*argv, "--out", tmp_path / "m"], None)], tmp_path)
    assert ends == ["done"] and "continuing after step" in said
    assert_same_training("m", tmp_path / "m", tmp_path / "whole")


def test_run_ilr_starts_model_stages_by_torchrun():
    def commands(**settings):
        done = subprocess.run(["bash", "run_ilr.sh", "gsm8k-70b", "--dry-run"], cwd=ROOT,
                              capture_output=True, text=True,
                              env={**os.environ, "ROUNDS": "1", **settings})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()
    one, eight = commands(), commands(NPROC="8")
    torchrun, many = "python -m torch.distributed.run --standalone --nproc-per-node 8 ", 0
    for a, b in zip(one, eight, strict=True):
        if re.match(r"python (sft|dpo|generate|compare)", a):
            many += 1
            # shards of 16 bits, and optimizers that know them; answers are of 4-bit weights in both
            if re.match(r"python (sft|dpo)", a):
                a = a.replace(" --load-in-4bit", "").replace("rmsprop8bit", "rmsprop")
            assert b == a.replace("python ", torchrun, 1)
        else:
            assert a == b
    assert many > 10 and any("generate.py" in b and "--load-in-4bit" in b for b in eight)


def test_run_ilr_does_not_ignore_what_is_to_start_several():
    """LAUNCH without NPROC would train in one process, on 4-bit weights and with 8-bit optimizers,
    and say nothing."""
    launch = "srun torchrun --nnodes 2 --nproc-per-node 8"
    done = subprocess.run(["bash", "run_ilr.sh", "gsm8k-70b", "--dry-run"], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "LAUNCH": launch})
    assert (done.returncode, done.stdout) == (2, "")
    assert "LAUNCH starts several processes" in done.stderr


def test_run_ilr_shows_the_line_of_the_stage_that_failed(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    settings = {"NPROC": "2", "PYTHON": sys.executable, "OUT": str(tmp_path / "run"),
                "WEAK_MODEL": nowhere, "STRONG_MODEL": nowhere,
                "TRAIN": "40", "GT": "20", "TEST": "5"}
    done = subprocess.run(["bash", "run_ilr.sh"], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, **settings})
    assert done.returncode == 2
    shown = [line for line in done.stderr.splitlines() if "another process" not in line]
    assert len(shown) == 2
    assert shown[0].startswith(f"sft.py: error: {tmp_path}/nowhere: not a model")
    assert shown[1] == "run_ilr.sh: error: stage seed_0/weak/train failed (exit 2)"


def test_another_optimizer_does_not_continue(done, tiny, tmp_path):
    """--optimizer auto is another one with another number of processes on a GPU."""
    import torch
    data, _ = done
    job = ("sft", ["--model", tiny / "model", "--data", data / "short.jsonl", "--batch-size", 6,
                   *TRAIN, "--out", tmp_path / "m"])
    assert do([(*job, ("Training", "log", 2))]) == ["cut"]
    state, = tmp_path.glob(".m.*/state.pt")
    torch.save({**torch.load(state), "kinds": ["AdamW8bit"]}, state)
    end, = do([(*job, None)])
    assert end.startswith(str(state.parent)) and "begun with AdamW8bit" in end


def test_shares_are_even_and_complete(monkeypatch):
    """Dealt out there and back: all of the items, each once, and sums of sorted costs that differ
    by less than the largest."""
    model = type("Sharded", (), {"within_forward": True})()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "3")
    costs, shares = sorted([17, 3, 99, 40, 41, 8, 8, 25, 60, 77, 1], reverse=True), []
    for me in range(3):
        monkeypatch.setenv("RANK", str(me))
        shares.append(distributed.own_share(costs, model))
        # a model that is whole: everybody's own
        assert distributed.own_share(costs, object()) == costs
    assert sorted(sum(shares, []), reverse=True) == costs
    assert max(map(sum, shares)) - min(map(sum, shares)) < max(costs)


def test_memory_of_one_process_of_eight(monkeypatch, capsys):
    """The estimate of a 7B model with AdamW: 4 times 29 GB, all in fp32, in eight parts, beside
    what is gathered in 16 bits, which does not get smaller."""
    import argparse

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model("mistral", hidden_size=4096, intermediate_size=14336,
                                  num_hidden_layers=32, num_attention_heads=32,
                                  num_key_value_heads=8, vocab_size=32000,
                                  tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.compute_dtype = torch.bfloat16
    args = argparse.Namespace(micro_tokens=4096, gradient_checkpointing=True, lora_rank=0)
    sequences = [([5] * 200, [0.0] * 100 + [1.0] * 100)]
    for key, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "8"), ("RANK", "0"),
                       ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(memory, "device_bytes", lambda device: 80e9)
    memory.check_memory(model, [torch.optim.AdamW(model.parameters())], args,
                         torch.device("cuda"), sequences)
    said = capsys.readouterr().out
    parts = re.findall(r"(weights|gradients|optimizer|gathered) ([\d.e-]+)", said)
    found = {name: float(value) for name, value in parts}
    assert found["weights"] == found["gradients"] == pytest.approx(28.97 / 8, rel=0.01)
    assert found["optimizer"] == pytest.approx(2 * 28.97 / 8, rel=0.01)
    # 218 million weights a layer, thrice, and embeddings and head of 131 million each, at 2 bytes;
    # and a layer's gradients at 4, as they are summed
    assert found["gathered"] == pytest.approx(2 * (3 * 0.218 + 2 * 0.131) + 4 * 0.218, rel=0.01)
    monkeypatch.setattr(memory, "device_bytes", lambda device: 8e9)
    with pytest.raises(InputError,
                       match="--lora-rank 64 would make it fit|more processes would make it fit"):
        memory.check_memory(model, [torch.optim.AdamW(model.parameters())], args,
                             torch.device("cuda"), sequences)


def test_the_paper_estimates_in_the_docs():
    done = subprocess.run([sys.executable, "benchmarks/processes.py", "--paper"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs/several-gpus.md").read_text(encoding="utf-8")
    assert all(table in page for table in done.stdout.strip().split("\n\n"))


if __name__ == "__main__":
    with distributed.processes("test_parallel.py"):
        print(json.dumps(do(json.loads(Path(sys.argv[1]).read_text()))))
