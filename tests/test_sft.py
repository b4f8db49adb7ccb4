"""sft.py: packing, log-probabilities, gradients, token ids, halves, schedule, optimizers,
checkpoints, metrics, continuing."""
import copy
import math

import pytest
import torch
from conftest import assert_same_gradients, check_resume, first_gradients, rows, run, tiny_model
from safetensors.torch import load_file

import generate
import sft
from core.attention import separate
from core.cli import run_stage
from core.decoding import decode
from core.models import open_model
from core.optimizers import cosine_lr
from core.packing import completion_logps, hidden_states, pack
from core.records import InputError, half_of, write_jsonl
from core.training import Training, checkpoint_steps

CPU = torch.device("cpu")
FAMILIES = ["llama", "mistral", "gemma", "gemma2", "qwen3"]
# fp32 logits of size 10 carry an error of about 1e-6 a layer; leaking sequences differ by 0.1 and
# more (FACTS.md)
LOGIT_TOLERANCE = 2e-5


def random_sequences(count, vocab, seed=0, low=3, high=14):
    """(token ids, weights) with random lengths and a random prompt share of weight 0."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        n = int(torch.randint(low, high, (), generator=g))
        prompt = int(torch.randint(1, n, (), generator=g))
        ids = torch.randint(3, vocab, (n,), generator=g).tolist()
        out.append((ids, [0.0] * prompt + [1.0] * (n - prompt)))
    return out


def brute_logps(model, ids, weights):
    """[(log-probability, weight)] of the weighted tokens of one sequence, alone, in float64, by a
    plain loop."""
    logits = copy.deepcopy(model).double()(input_ids=torch.tensor([ids])).logits[0]
    return [(logits[t - 1].log_softmax(-1)[ids[t]], weights[t]) for t in range(1, len(ids))
            if weights[t]]


@pytest.mark.parametrize("family, one_row", [
    *((family, False) for family in FAMILIES),
    *((family, True) for family in FAMILIES if family != "gemma2")])
def test_packing_changes_nothing(family, one_row):
    more = {"attn_implementation": "eager"} if family == "gemma2" else {}
    # windows shorter than a sequence, where the family has them
    more |= {"sliding_window": 4} if family in ("mistral", "gemma2") else {}
    model, sequences = tiny_model(family, **more), random_sequences(9, 24)
    model.train()       # no dropout here; training mode is where a cache leaked
    plain, found = copy.deepcopy(model), {}
    assert not one_row or separate(model)
    for batch in pack(sequences, 60, CPU, model):
        assert len(batch["input_ids"]) == 1 if one_row else batch["input_ids"].numel() <= 60
        logits = model.get_output_embeddings()(hidden_states(model, batch))
        logps, weights, owner = completion_logps(model, batch)
        for i in set(batch["owner"].flatten().tolist()) - {-1}:
            found[i] = logits[batch["owner"] == i], logps[owner == i], weights[owner == i]
    assert sorted(found) == list(range(9))
    for i, (ids, weights) in enumerate(sequences):
        logits, logps, w = found[i]
        alone = plain(input_ids=torch.tensor([ids])).logits[0]
        if family == "gemma2":
            logits = torch.tanh(logits / 2.0) * 2.0
        assert (logits - alone).abs().max() < LOGIT_TOLERANCE
        expected = brute_logps(plain, ids, weights)
        assert w.tolist() == [x for _, x in expected]
        # the reference is float64: the tolerance is that of the fp32 logits, in log-probabilities
        # of the same size
        assert (logps - torch.stack([x for x, _ in expected])).abs().max() < LOGIT_TOLERANCE


def test_pack_holds_every_token_once():
    sequences = random_sequences(40, 24, seed=1) + [(list(range(3, 23)), [1.0] * 20)]
    batches = list(pack(sequences, 40, CPU, tiny_model()))
    assert len(batches) > 3
    got = {}
    for b in batches:
        assert b["input_ids"].shape[0] == 1 or b["input_ids"].numel() <= 40
        for i in set(b["owner"].flatten().tolist()) - {-1}:
            at = b["owner"] == i
            length = len(sequences[i][0])
            assert i not in got and b["position_ids"][at].tolist() == list(range(length))
            got[i] = b["input_ids"][at].tolist(), b["weights"][at].tolist()
        assert b["weights"][b["owner"] == -1].sum() == 0
    assert {i: ids for i, (ids, _) in got.items()} == {i: s[0] for i, s in enumerate(sequences)}
    # the weight at a position is that of predicting the next token; the last position predicts
    # nothing
    assert all(w == sequences[i][1][1:] + [0.0] for i, (_, w) in got.items())


@pytest.mark.parametrize("prompt_weight", [0.0, 0.1])
def test_gradient_is_that_of_the_full_batch_mean(tiny, tokenizer, problems, tmp_path, monkeypatch,
                                                 prompt_weight):
    write_jsonl(tmp_path / "d.jsonl", problems[:6])
    argv = ["--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--batch-size", 6,
            "--epochs", 1, "--prompt-weight", prompt_weight]
    large = first_gradients(monkeypatch, sft, *argv, "--out", tmp_path / "large")
    small = first_gradients(monkeypatch, sft, *argv, "--out", tmp_path / "small",
                            "--micro-tokens", 1)
    middle = first_gradients(monkeypatch, sft, *argv, "--out", tmp_path / "middle",
                             "--micro-tokens", 300)

    model = open_model(tiny / "model", torch.device("cpu")).double()
    total, weight = 0.0, 0.0
    for r in problems[:6]:
        prompt, completion = (tokenizer(r[k], add_special_tokens=False).input_ids
                              for k in ("prompt", "completion"))
        ids = [tokenizer.bos_token_id, *prompt, *completion, tokenizer.eos_token_id]
        logps = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for t in range(1, len(ids)):
            w = prompt_weight if t <= len(prompt) else 1.0
            total, weight = total - w * logps[t - 1, ids[t]], weight + w
    (total / weight).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    for got in (large, small, middle):
        assert_same_gradients(got, expected)
    # metrics are rounded to 6 digits behind the point; the loss itself is fp32
    logged = rows(tmp_path / "large/metrics.jsonl")[0]["loss"]
    assert logged == pytest.approx((total / weight).item(), abs=2e-5)


def test_ids_of_training_are_ids_of_generation(tiny, tokenizer, problems, tmp_path, monkeypatch):
    seen, asked = [], []

    def spy_on_pack(sequences, *args):
        seen.extend(sequences)
        return pack(sequences, *args)

    def spy_on_decode(model, prompts, *args):
        asked.extend(prompts)
        return decode(model, prompts, *args)
    monkeypatch.setattr(sft, "pack", spy_on_pack)
    monkeypatch.setattr(generate, "decode", spy_on_decode)
    write_jsonl(tmp_path / "d.jsonl", problems[:5])
    run(sft, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--epochs", 1, "--out",
        tmp_path / "m")
    run(generate, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--max-new-tokens", 1,
        "--out", tmp_path / "o.jsonl")
    assert len(seen) == len(asked) == 5
    for prompt in asked:
        assert prompt[0] == tokenizer.bos_token_id == 1 and prompt.count(1) == 1
        (ids, weights), = [s for s in seen if s[0][:len(prompt)] == prompt]
        r, = [r for r in problems[:5] if r["prompt"] == tokenizer.decode(prompt[1:])]
        completion = tokenizer(r["completion"], add_special_tokens=False).input_ids
        assert ids == prompt + completion + [tokenizer.eos_token_id]
        assert weights == [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))


def test_learns_completions_by_heart_and_stops(tiny, problems, tmp_path):
    """The whole circle: what was trained on is what greedy decoding says, EOS included."""
    write_jsonl(tmp_path / "d.jsonl", problems[:2])
    run(sft, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--epochs", 120,
        "--lr", 0.02, "--out", tmp_path / "m")
    run(generate, "--model", tmp_path / "m", "--data", tmp_path / "d.jsonl",
        "--max-new-tokens", 60, "--out", tmp_path / "o.jsonl")
    answers = rows(tmp_path / "o.jsonl")
    assert [a["completion"] for a in answers] == [p["completion"] for p in problems[:2]]
    assert not any(a["truncated"] for a in answers)


def test_cosine_lr_is_transformers_schedule():
    from transformers import get_cosine_schedule_with_warmup
    total, warmup = 40, 0.1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 4, total).lr_lambdas[0]
    ours = [cosine_lr(s, total, warmup) for s in range(total)]
    # ours starts at 1/4 where theirs starts at 0: no step is spent at a learning rate of 0. 1e-12:
    # both are float64
    assert ours[:4] == [0.25, 0.5, 0.75, 1.0]
    assert ours[4:] == pytest.approx([theirs(s) for s in range(4, total)], abs=1e-12)
    assert cosine_lr(22, total, warmup) == pytest.approx(0.5, abs=1e-12) and 0 < ours[-1] < 0.01
    assert cosine_lr(0, 1, 0.05) == 1.0


def test_half_of():
    ids = [f"train-0-{i}" for i in range(2000)]
    halves = {i: half_of(0, 1, i) for i in ids}
    assert set(halves.values()) == {1, 2}
    # 2000 fair coins: 1000 +- 4.5 standard deviations of 22
    assert 900 < sum(h == 1 for h in halves.values()) < 1100
    # another round, another seed: half of the problems change sides
    for other in [(0, 2), (1, 1)]:
        assert 900 < sum(half_of(*other, i) != halves[i] for i in ids) < 1100


def test_halves_are_disjoint_and_stable_under_row_shuffling(problems, tmp_path):
    def half(path, k):
        args = sft.parser().parse_args(["--data", str(path), "--out", "x", "--half", str(k),
                                        "--round", "3"])
        return {r["id"] for r in sft.select_records(args)}
    write_jsonl(tmp_path / "a.jsonl", problems)
    write_jsonl(tmp_path / "b.jsonl", problems[::-1])
    first, second = half(tmp_path / "a.jsonl", 1), half(tmp_path / "a.jsonl", 2)
    assert first and second and not first & second
    assert first | second == {p["id"] for p in problems}
    assert (half(tmp_path / "b.jsonl", 1), half(tmp_path / "b.jsonl", 2)) == (first, second)


@pytest.mark.parametrize("optimizer, lr", [
    ("adamw", 0.01), ("adamw8bit", 0.01), ("rmsprop8bit", 0.003), ("muon", 0.01)])
def test_optimizers_lower_the_loss(tiny, problems, tmp_path, optimizer, lr):
    write_jsonl(tmp_path / "d.jsonl", problems[:4])
    run(sft, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--epochs", 8,
        "--optimizer", optimizer, "--lr", lr, "--out", tmp_path / "m")
    losses = [r["loss"] for r in rows(tmp_path / "m/metrics.jsonl")]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]
    before, after = (load_file(d / "model.safetensors") for d in (tiny / "model", tmp_path / "m"))
    assert all((before[k] != after[k]).any() for k in before)       # every weight is free


@pytest.mark.parametrize("one_row", [False, True])
def test_no_attention_needs_a_mask(one_row, monkeypatch):
    model, sequences, masks = tiny_model(), random_sequences(9, 24), []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **more):
        masks.append((attn_mask is not None, is_causal))
        return original(*args, attn_mask=attn_mask, is_causal=is_causal, **more)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    exact = copy.deepcopy(model)
    assert not one_row or separate(model)
    batches = list(pack(sequences, 60, CPU, model))
    assert any((batch["owner"] == -1).any() for batch in batches)       # some rows are padded
    found = {}
    for batch in batches:
        logps, weights, owner = completion_logps(model, batch)
        found.update({i: logps[owner == i] for i in owner.tolist()})
    assert set(masks) == {(False, True)}
    for i, (ids, weights) in enumerate(sequences):
        expected = torch.stack([x for x, _ in brute_logps(exact, ids, weights)])
        # fp32 against float64, as above
        assert (found[i] - expected).abs().max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("optimizer, rank", [
    ("adamw", 0), ("muon", 0), ("adamw8bit", 0), ("adamw", 4)])
def test_interrupted_training_continues_byte_for_byte(tiny, problems, tmp_path, monkeypatch,
                                                      capsys, optimizer, rank):
    write_jsonl(tmp_path / "d.jsonl", problems[:10])
    argv = ["--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--batch-size", 4,
            "--lr", 0.01, "--save-at", 0.5, "--optimizer", optimizer, "--lora-rank", rank]
    check_resume(monkeypatch, capsys, tmp_path, sft, argv, calls=4)


def test_save_at(tiny, problems, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", problems[:8])
    run(sft, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--batch-size", 2,
        "--epochs", 2, "--lr", 0.01, "--save-at", 0.75, 0.25, 0.5, "--out", tmp_path / "m")
    kept = sorted(p.name for p in (tmp_path / "m").glob("checkpoint*"))
    assert kept == ["checkpoint-25", "checkpoint-50", "checkpoint-75"]
    folders = [tiny / "model", *(tmp_path / f"m/checkpoint-{p}" for p in (25, 50, 75)),
               tmp_path / "m"]
    weights = [load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in folders]
    # further and further from the start: checkpoints are of different steps, in order
    distances = [(w - weights[0]).norm().item() for w in weights]
    assert distances == sorted(distances) and len(set(distances)) == 5


def test_more_checkpoints_than_steps(tiny, problems, tmp_path):
    """run_ilr.sh names checkpoint-10 to checkpoint-90, however short the run."""
    write_jsonl(tmp_path / "d.jsonl", problems[:4])
    run(sft, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--batch-size", 2,
        "--epochs", 1, "--save-at", *(k / 10 for k in range(1, 10)), "--out", tmp_path / "m")
    assert len(list((tmp_path / "m").glob("checkpoint-*/model.safetensors"))) == 9


def test_checkpoint_steps():
    assert checkpoint_steps(200, []) == {}
    assert checkpoint_steps(200, [0.3, 0.29, 0.1]) == {
        "checkpoint-30": 60, "checkpoint-29": 58, "checkpoint-10": 20}
    assert checkpoint_steps(2, [0.1, 0.9]) == {"checkpoint-10": 1, "checkpoint-90": 2}
    for total in range(1, 500):     # halves of a step are rounded to the even one
        found = checkpoint_steps(total, [k / 10 for k in range(1, 10)])
        assert list(found.values()) == [max(1, round(total * k * 0.1)) for k in range(1, 10)]


@pytest.mark.parametrize("share", ["0", "1", "0.125", "0.001", "-0.5", "30", "nan", "x"])
def test_shares_that_name_no_checkpoint(share, capsys):
    with pytest.raises(SystemExit) as e:
        sft.parser().parse_args(["--data", "x", "--out", "x", "--save-at", "0.5", share])
    assert e.value.code == 2 and "--save-at" in capsys.readouterr().err


def test_metrics_can_be_read_while_a_training_runs(tiny, problems, tmp_path, monkeypatch, capsys):
    """Its path is printed at the start, and after every step the file holds the step's row."""
    write_jsonl(tmp_path / "d.jsonl", problems[:6])
    original, read = Training.save_state, []

    def save_state(self, step, **more):
        said = [line for line in capsys.readouterr().out.splitlines() if "metrics.jsonl" in line]
        read.append((said, self.folder / "metrics.jsonl", rows(self.folder / "metrics.jsonl")))
        original(self, step, **more)
    monkeypatch.setattr(Training, "save_state", save_state)
    run(sft, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--batch-size", 2,
        "--epochs", 1, "--out", tmp_path / "m")
    (said, path, _), *_ = read
    assert said == [f"metrics: {path}"]
    assert [[r["step"] for r in log] for _, _, log in read] == [[1], [1, 2], [1, 2, 3]]


@pytest.mark.parametrize("argv, message", [
    ([], "give either --model, or --init-config"),
    (["--model", "x", "--init-config", "y"], "give either --model, or --init-config"),
    (["--init-config", "y"], "give either --model, or --init-config"),
    (["--model", "x", "--load-in-4bit"], "4 bits cannot be trained"),
    (["--model", "x", "--task", "nothing"], "there is no tasks/nothing.py")])
def test_what_the_arguments_alone_tell(argv, message):
    with pytest.raises(InputError, match=message):
        sft.check(sft.parser().parse_args(["--data", "x", "--out", "x", *argv]))


def test_divergence_is_an_error(tiny, problems, tmp_path, capsys):
    write_jsonl(tmp_path / "d.jsonl", problems[:4])
    argv = ["--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--batch-size", 1,
            "--lr", 1e36, "--out", tmp_path / "m"]
    with pytest.raises(FloatingPointError, match="step 2|gradient norm"):
        run(sft, *argv)
    with pytest.raises(SystemExit) as e:
        run_stage(sft.parser(), sft.main, [str(a) for a in argv])
    assert e.value.code == 1 and not (tmp_path / "m").exists()
    assert "lower --lr" in capsys.readouterr().err.strip().splitlines()[-1]


def test_gradient_checkpointing_changes_nothing(tiny, problems, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", problems[:6])
    argv = ["--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--batch-size", 3,
            "--lr", 1e-3]
    run(sft, *argv, "--out", tmp_path / "a")
    run(sft, *argv, "--out", tmp_path / "b", "--gradient-checkpointing")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    # the same operations in the same order; 1e-6 allows another kernel in the recomputed pass, a
    # step moves by 1e-3
    assert max((a[k] - b[k]).abs().max().item() for k in a) <= 1e-6


def test_unparsable_labels_are_left_out(tiny, problems, tmp_path, capsys):
    bad = [{**p, "completion": "no answer"} for p in problems[:3]]
    write_jsonl(tmp_path / "d.jsonl", bad + problems[3:8])
    args = sft.parser().parse_args(["--data", str(tmp_path / "d.jsonl"), "--out", "x",
                                    "--task", "arithmetic"])
    assert sft.select_records(args) == problems[3:8]
    assert "3 of 8" in capsys.readouterr().out


def test_from_scratch(tiny, problems, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", problems[:4])
    run(sft, "--init-config", tiny / "weak.json", "--tokenizer", tiny / "tokenizer",
        "--data", tmp_path / "d.jsonl", "--epochs", 1, "--out", tmp_path / "m")
    loss, = [r["loss"] for r in rows(tmp_path / "m/metrics.jsonl")]
    # random weights: near the uniform guess over the vocabulary, within a factor that an
    # initializer may add
    vocabulary = open_model(tmp_path / "m", torch.device("cpu")).config.vocab_size
    assert math.log(vocabulary) * 0.7 < loss < math.log(vocabulary) * 1.5
