"""core/memory.py and core/needs.py: plans against what autograd, optimizers and decoding really
keep; refusals; smaller micro-batches."""
import argparse
import itertools
import re
import weakref

import pytest
import torch
from conftest import assert_same_gradients, first_gradients, preferences, rows, run, tiny_config
from test_compare import train_argv  # noqa: F401  (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import compare
import dpo
import generate
import sft
from core import decoding, judge, memory, needs
from core.adapters import add_lora
from core.attention import separate
from core.cli import run_stage
from core.decoding import decode, decode_beams
from core.models import open_model, to_4bit
from core.optimizers import apply_gradients, make_optimizers
from core.packing import completion_logps, hidden_states, logits_at, pack
from core.records import InputError, write_jsonl
from core.roofline import KNOWN

CPU = torch.device("cpu")
SHAPES = dict([KNOWN["Mistral-7B-v0.1"], KNOWN["gemma-2b"]])       # by family


class Live(TorchDispatchMode):
    """The most bytes, at once, of the storages that operations make; views of those of `there`
    count nothing."""

    def __init__(self, there):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return made

    def gone(self, key):
        self.now -= self.sizes.pop(key)


def most_activations(model, step):
    """The most bytes at once during the second of two micro-batches, step(), less gradients."""
    live = Live([*model.parameters(), *model.buffers()])
    with live:
        for _ in range(2):      # the second one's gradients are added to those that are there
            live.peak = live.now
            step()
    return live.peak - needs.size_of(model.parameters(), trained=True)


def wide(family, dtype):
    more = {} if family == "llama" else {"head_dim": 16}
    config = AutoConfig.for_model(
        family, vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, pad_token_id=0, **more)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


FULL, LORA, QLORA = (0, False), (8, False), (8, True)


@pytest.mark.parametrize("family, dtype, trained", [
    *itertools.product(["llama", "gemma", "gemma2", "gemma3_text", "qwen3"],
                       [torch.float32, torch.bfloat16], [FULL, LORA]),
    ("llama", torch.bfloat16, QLORA)])
def test_activations_are_what_autograd_keeps(family, dtype, trained):
    """Through the functions that trainings call, with and without checkpointing.

    Up to 30% more: families differ in what their norms and MLPs keep.
    """
    model = wide(family, dtype)
    rank, four = trained
    if four:
        to_4bit(model, CPU, dtype)
    if rank:
        add_lora(model, rank)
    one = (list(range(3, 60)) * 2 + [5] * 14, [0] * 100 + [1] * 28)
    batch = next(pack([one] * 8, 1024, CPU, model))
    assert batch["input_ids"].shape == (8, 128)

    def step():
        completion_logps(model, batch)[0].sum().backward()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        found = most_activations(model, step)
        planned = needs.activation_bytes(model, 1024, 128, 28 / 128, checkpointing)
        assert 0.9 * found < planned < 1.3 * found, (checkpointing, planned / found)
    if separate(model):         # one row by sequences; still with checkpointing
        batch = next(pack([one] * 8, 1024, CPU, model))
        found = most_activations(model, step)
        planned = needs.activation_bytes(model, 1024, 128, 28 / 128, True)
        assert 0.9 * found < planned < 1.3 * found, planned / found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_pair_longer_than_a_micro_batch(family):
    """Both sides are there at once, and `eager` attention has the scores of each for itself."""
    model = wide(family, torch.bfloat16)
    side = list(range(3, 131)), [0] * 100 + [1] * 28
    (batch,) = pack([side, side], 1, CPU, model, 2)
    found = most_activations(model, lambda: completion_logps(model, batch)[0].sum().backward())
    args = argparse.Namespace(micro_tokens=1, gradient_checkpointing=False)
    planned = needs.plan(model, 0, args, 28 / 128, 128, 2).activations
    assert 0.9 * found < planned < 1.3 * found, planned / found


@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("name", ["7B", "2B", "judge"])
def test_activations_at_full_width(name, rank):
    """The widths of Mistral-7B and gemma-2b, four layers, 2 rows of 2,048 tokens, without memory
    for any of it: within 10%."""
    family = "gemma" if name == "2B" else "mistral"
    shape = {**SHAPES[family], "num_hidden_layers": 4}
    auto = AutoModelForSequenceClassification if name == "judge" else AutoModelForCausalLM
    with FakeTensorMode():
        model = auto.from_config(AutoConfig.for_model(family, **shape), dtype=torch.bfloat16)
        if rank:
            add_lora(model, rank)
        ids = torch.zeros(2, 2048, dtype=torch.long)
        batch = {"input_ids": ids, "units": None}
        some = torch.zeros(1 if name == "judge" else 2048, dtype=torch.long)    # half the tokens

        def loss():
            if name == "judge":
                return model.score(hidden_states(model, batch)[some, some]).float().sum()
            logits = logits_at(model, batch, some, some).float()
            return (logits.gather(1, some[:, None])[:, 0] - logits.logsumexp(1)).sum()
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            found = most_activations(model.train(), lambda: loss().backward())
            labelled = 0 if name == "judge" else 0.5
            planned = needs.activation_bytes(model, 4096, 2048, labelled, checkpointing)
            assert planned == pytest.approx(found, rel=0.1), checkpointing


@pytest.mark.parametrize("name, rank, dtype", [
    ("adamw", 0, "float32"), ("muon", 0, "float32"), ("adamw", 4, "float32"),
    ("adamw", 0, "bfloat16"), ("rmsprop", 0, "bfloat16"), ("adamw", 4, "bfloat16")])
def test_fixed_parts_are_what_training_keeps(tiny, capsys, name, rank, dtype):
    dtype = getattr(torch, dtype)
    model = open_model(tiny / "model", CPU, dtype=dtype, trains="adapters" if rank else "weights")
    if rank:
        add_lora(model, rank)
    optimizers = make_optimizers(model, name, 1e-3, CPU)
    args = sft.parser().parse_args(["--data", "x", "--out", "x", "--micro-tokens", "1"])
    capsys.readouterr()
    memory.check_memory(model, optimizers, args, CPU, [([5], [1.0])])
    said = dict(re.findall(r"([a-z]+) ([0-9.e+-]+)", capsys.readouterr().out.partition(": ")[2]))
    said = {name: float(value) * 1e9 for name, value in said.items() if name != "of"}
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.ones_like(p)
    apply_gradients(model, optimizers, 1e-3)
    kept = {"weights": size(model.parameters()), "gradients": size(trained),
            "remainders": size(p.low_bits for p in trained if hasattr(p, "low_bits")),
            "optimizer": size(x for o in optimizers for s in o.state.values() for x in s.values()
                              if torch.is_tensor(x) and x.numel() > 1)}
    exact = dtype == torch.bfloat16 and not rank
    assert (kept["remainders"] > 0) == exact == ("remainders" in said)
    # three digits are printed
    assert {name: said.get(name, 0) for name in kept} == pytest.approx(kept, rel=0.006)

    for p in trained:
        p.grad = torch.ones_like(p)
    there = [*model.parameters(), *(p.grad for p in trained)]
    with Live([*there, *(x for o in optimizers for s in o.state.values() for x in s.values()
                         if torch.is_tensor(x))]) as live:
        apply_gradients(model, optimizers, 1e-3)
    if exact:       # the largest parameter in fp32; every remainder is replaced by a new one
        assert 0.7 * said["step"] < live.peak < 1.05 * said["step"] + kept["remainders"]


def size(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def test_weights_in_4_bits():
    """Two a byte, and their scales, which are no parameters."""
    import bitsandbytes as bnb
    layer = bnb.nn.Linear4bit(1024, 1024, bias=False, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    scales = [state.absmax, state.offset, state.state2.absmax]
    # beside these two tables of 1 kB
    assert needs.size_of([layer.weight]) == pytest.approx(size([layer.weight, *scales]), rel=0.002)


def test_state_in_8_bits():
    """Of the embedding in 32 bits; beside the 8 are scales, a fp32 number for 256 values."""
    import bitsandbytes as bnb
    for kind in ("AdamW8bit", "RMSprop8bit"):
        layers = torch.nn.Embedding(128, 64), torch.nn.Linear(64, 128, bias=False)
        bnb.optim.GlobalOptimManager.get_instance().register_module_override(
            layers[0], "weight", {"optim_bits": 32})
        params = [layer.weight for layer in layers]
        optimizer = getattr(bnb.optim, kind)(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        kept = size(x for s in optimizer.state.values() for name, x in s.items()
                    if name.startswith("state"))
        assert needs.state_bytes(kind, params, params[0]) == kept


@pytest.mark.parametrize("family, more", [
    ("mistral", {}), ("llama", dict(num_key_value_heads=8)), ("mistral", dict(sliding_window=40)),
    ("gemma2", dict(sliding_window=40, head_dim=16))])      # its attention is `eager`
def test_decoding_fits_what_is_planned(family, more, monkeypatch):
    """The plan of a row is at least what decoding needs, and at most twice: mostly prompt, mostly
    answer, longer than the window."""
    monkeypatch.setattr(decoding, "SLACK", 8)
    monkeypatch.setattr(needs, "SLACK", 8)
    config = tiny_config(family, **{**dict(
        vocab=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2), **more})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for prompt, new, beams in itertools.product((60, 8), (40, 4), (1, 3)):
        # each padded otherwise
        prompts = [[3 + i] * (prompt - i) for i in range(4)]
        with Live([*model.parameters(), *model.buffers()]) as live:
            if beams > 1:
                decode_beams(model, prompts, [-1], new, beams)
            else:
                decode(model, prompts, [-1], new)
        planned = 4 * beams * needs.row_bytes(model.config, 2, prompt, new, beams)
        assert live.peak <= planned <= 2 * live.peak, (prompt, new, beams, planned / live.peak)


def test_the_cache_of_beams_is_there_once(monkeypatch):
    """Shared prompts of 60 tokens, 4 beams, 40 answer tokens: beside the cache, which holds 100
    tokens of every beam, a search holds less than two layers' of it, and one row's prompt."""
    config = tiny_config("mistral", vocab=32, hidden_size=128, intermediate_size=64,
                         num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = [[3 + i] * 60 for i in range(4)]
    with Live([*model.parameters(), *model.buffers()]) as live:
        decode_beams(model, prompts, [-1], 40, 4)
    layer = 4 * 4 * 100 * 2 * 128 * 4       # rows, tokens, keys and values, bytes
    assert 8 * layer < live.peak < 10 * layer, live.peak / layer


def test_decoding_rows(monkeypatch):
    """Mistral-7B: a token's keys and values are 131 kB. 256 prompts of 4 beams and 400 tokens are
    54 GB of cache: they fit 80 GB beside the weights, not 76; a window keeps little more than its
    tokens."""
    with torch.device("meta"):
        config = AutoConfig.for_model("mistral", **SHAPES["mistral"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    monkeypatch.setattr(memory, "device_bytes", lambda device: 76e9)
    assert 192 <= memory.decoding_rows(model, 150, 250, 4, CPU) < 256
    monkeypatch.setattr(memory, "device_bytes", lambda device: 80e9)
    rows = {beams: memory.decoding_rows(model, 150, 250, beams, CPU) for beams in (1, 2, 4)}
    # alone, a prompt's reading takes more
    assert 256 <= rows[4] < 300 and rows[1] < 4 * rows[4] == pytest.approx(2 * rows[2], rel=0.02)
    long = memory.decoding_rows(model, 4000, 250, 1, CPU)
    config.sliding_window = None
    assert memory.decoding_rows(model, 4000, 8000, 1, CPU) < long
    config.sliding_window = 4096
    assert memory.decoding_rows(model, 4000, 8000, 1, CPU) == memory.decoding_rows(
        model, 4000, 96 + needs.SLACK, 1, CPU)
    monkeypatch.setattr(memory, "device_bytes", lambda device: 10e9)
    assert memory.decoding_rows(model, 150, 250, 4, CPU) == 1


@pytest.mark.parametrize("gigabytes, message", [
    (100, None), (70, "--gradient-checkpointing would"),
    (60.9, r"--gradient-checkpointing --micro-tokens \d+ would"),
    (50, "none of this stage's flags")])
def test_a_judge_of_seven_billion_weights(monkeypatch, gigabytes, message):
    """compare.py train of Mistral-7B's shape: no adapters there to fall back on."""
    check_large(monkeypatch, compare,
                ["train", "--model", "m", "--task", "gsm8k", "--data", "x", "--gold", "x", "--out",
                 "x"], gigabytes, message, 0.0)


@pytest.mark.parametrize("gigabytes, more, message", [
    (100, [], None), (80, [], r"--gradient-checkpointing would"),
    (60.9, ["--gradient-checkpointing"], r"--gradient-checkpointing --micro-tokens \d+ would"),
    (30, [], "--gradient-checkpointing --lora-rank 64 would"),
    (14, [], "--gradient-checkpointing --lora-rank 64 --load-in-4bit would"),
    (4, [], "none of this stage's flags")])
def test_seven_billion_weights(monkeypatch, gigabytes, more, message):
    check_large(monkeypatch, sft, ["--model", "m", "--data", "x", "--out", "x", *more], gigabytes,
                message, 0.5)


def check_large(monkeypatch, stage, argv, gigabytes, message, labelled):
    n = int(200 * labelled)
    sequences = [([5] * 200, [0.0] * (200 - n) + [1.0] * n)]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("mistral", **SHAPES["mistral"]), dtype=torch.bfloat16)
    optimizer = type("AdamW8bit", (), {"param_groups": [{"params": list(model.parameters())}]})()
    monkeypatch.setattr(memory, "device_bytes", lambda device: gigabytes * 1e9)
    args = stage.parser().parse_args(argv)
    if message:
        parts = "weights 14.5 [+] remainders 14.5 [+] gradients 14.5 [+] optimizer 15.3 [+] act"
        with pytest.raises(InputError, match=f"memory: {parts}.* of {gigabytes} GB: .*{message}"):
            memory.check_memory(model, [optimizer], args, CPU, sequences)
    else:
        memory.check_memory(model, [optimizer], args, CPU, sequences)


def out_of_memory(monkeypatch, stage, function, most,
                  message="CUDA out of memory. Tried to allocate 1 GiB"):
    """Let a forward pass, stage.function, fail where a micro-batch has more than `most` tokens.

    Returns the sizes that it is given.
    """
    original, sizes = getattr(stage, function), []

    def limited(model, batch, *more):
        if torch.is_grad_enabled():      # what computes no gradients takes little
            sizes.append(batch["input_ids"].numel())
            if sizes[-1] > most:
                raise torch.OutOfMemoryError(message)
        return original(model, batch, *more)
    monkeypatch.setattr(stage, function, limited)
    return sizes


@pytest.fixture()
def trainings(tiny, problems, train_argv, tmp_path):  # noqa: F811
    """(stage, (module, name) of its forward function, the command line of one short training)."""
    write_jsonl(tmp_path / "d.jsonl", problems[:8])
    write_jsonl(tmp_path / "p.jsonl", preferences(problems[:6]))
    return ((sft, (sft, "completion_logps"),
             ["--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--epochs", 1]),
            (dpo, (dpo, "sequence_logps"),
             ["--model", tiny / "model", "--data", tmp_path / "p.jsonl", "--epochs", 1]),
            (compare, (judge, "judge_logits"), [*train_argv, "--batch-size", 64, "--epochs", 1]))


def test_a_smaller_micro_batch_changes_no_gradient(trainings, tmp_path, monkeypatch, capsys):
    for stage, function, argv in trainings:
        whole = first_gradients(monkeypatch, stage, *argv, "--out",
                                tmp_path / f"{stage.__name__}_whole")
        with monkeypatch.context() as m:
            sizes = out_of_memory(m, *function, 300)
            parts = first_gradients(m, stage, *argv, "--out", tmp_path / f"{stage.__name__}_parts")
        if stage is compare:        # its head starts at 0, and so do all other gradients
            whole, parts = ({k: v for k, v in x.items() if k == "score.weight"}
                            for x in (whole, parts))
        assert_same_gradients(parts, whole)
        assert sum(n > 300 for n in sizes) >= 3 and sizes[-1] <= 300
        assert len([n for n in sizes if n <= 300]) > 2
        assert "out of memory: going on with --micro-tokens 256" in capsys.readouterr().out


def test_a_failed_try_holds_no_tensors(trainings, tmp_path, monkeypatch):
    """When the next try begins, the graph of the one that failed, here in its backward pass, is
    gone."""
    for stage, function, argv in trainings:
        original, made, held = getattr(*function), [], []

        def watched(model, batch, *more, original=original, made=made, held=held):
            result = original(model, batch, *more)
            if not torch.is_grad_enabled():
                return result
            held.append(sum(ref() is not None for ref in made))
            tensor = next(t for t in (result if isinstance(result, tuple) else (result,))
                          if t.requires_grad)
            made.append(weakref.ref(tensor))
            if batch["input_ids"].numel() > 300:
                def fail(gradient):
                    raise torch.OutOfMemoryError("CUDA out of memory")
                tensor.register_hook(fail)
            return result
        with monkeypatch.context() as m:
            m.setattr(*function, watched)
            run(stage, *argv, "--out", tmp_path / stage.__name__)
        assert len(held) > 4 and held[:3] == [0, 0, 0], (stage, held)


def test_memory_that_never_suffices_is_an_error(tiny, problems, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "d.jsonl", problems[:4])
    argv = ["--model", str(tiny / "model"), "--data", str(tmp_path / "d.jsonl"), "--out",
            str(tmp_path / "m")]
    out_of_memory(monkeypatch, sft, "completion_logps", 0)
    with pytest.raises(SystemExit) as e:
        run_stage(sft.parser(), sft.main, argv)
    assert e.value.code == 1 and "out of memory" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "m").exists()


def test_other_errors_are_not_taken_for_lack_of_memory(tiny, problems, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "d.jsonl", problems[:4])
    out_of_memory(monkeypatch, sft, "completion_logps", 0,
                  "an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        run(sft, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--out", tmp_path / "m")


def test_a_run_that_lacked_memory_ends_like_one_that_had_it(tiny, problems, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "d.jsonl", problems[:8])
    argv = ["--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--epochs", 2,
            "--batch-size", 4, "--lr", 1e-3]
    run(sft, *argv, "--out", tmp_path / "a")
    with monkeypatch.context() as m:
        out_of_memory(m, sft, "completion_logps", 200)
        run(sft, *argv, "--out", tmp_path / "b")
    a, b = (rows(tmp_path / x / "metrics.jsonl") for x in "ab")
    # fp32 sums in another order, four steps of 1e-3: losses to 5 digits
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-5)
    assert len(a) == 4


@pytest.mark.parametrize("more", [[], ["--num-beams", 2], ["--temperature", 1, "--num-samples", 2]])
def test_a_batch_too_large_to_decode_is_answered_in_halves(tiny, problems, tmp_path, monkeypatch,
                                                           more):
    write_jsonl(tmp_path / "d.jsonl", problems[:9])
    argv = ["--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--max-new-tokens", 8, *more]
    run(generate, *argv, "--out", tmp_path / "a.jsonl")
    name, sizes = "decode_beams" if "--num-beams" in more else "decode", []
    original = getattr(generate, name)

    def limited(model, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, prompts, *rest)
    monkeypatch.setattr(generate, name, limited)
    run(generate, *argv, "--out", tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert max(sizes) > 3 and sum(n for n in sizes if n <= 3) == sizes[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_bytes_of_a_gpu():
    device = torch.device("cuda", 0)
    before = memory.device_bytes(device)
    held = torch.empty(1 << 28, device=device)
    assert before == pytest.approx(memory.device_bytes(device), rel=0.02) and held.numel()


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gpt_neox", "mamba", "phi", "mixtral"])
def test_other_families_have_a_plan_too(family):
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert needs.activation_bytes(model, 1024, 256, 0.5, True) > 1e6
    assert needs.row_bytes(config, 2, 100, 100) > 1e5


def test_device_bytes_of_this_machine():
    assert 5e8 < memory.device_bytes(CPU) < 1e14
