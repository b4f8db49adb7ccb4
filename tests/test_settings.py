"""The settings of run_ilr.sh: what is refused, what --help says, what config.json keeps."""
import json
import re
import sys

import pytest
from conftest import ROOT
from kill_test import TINY, call

from core import settings
from core.records import InputError, write_json

PRESETS = sorted(p.stem for p in (ROOT / "presets").glob("*.sh"))


# ---------------------------------------------------------------- refused before anything is made
@pytest.mark.parametrize("setting", [
    "ALPHA=15", "ROUNDS=two", "JUDGE=Oracle", "JOBS=0", "SEEDS=a", "METHODS=sft", "SFT_LR=fast",
    "CLEAN_START=2", "CHECKPOINTS=100", "CHECKPOINTS=50 30", "JUDGE=ftp://x", "LOAD_IN_4BIT=yes",
    "SECONDS_PER_PAIR=0", "JUDGE=https://user:secret@h/v1", "CHAT_TEMPLATE=1", "DPO_NLL=-1",
    "LABEL_NOISE=1.5", "EVAL=train", "BETA=0", "FLIP_KIND=odd", "PRETRAIN=none", "NPROC=0",
    "SEEDS=08", "SEEDS=0 0", "DPO_SAMPLES=5", "WEAK_ACCURACY=0.0", "ILR_DATE=1 May 2026",
    "ILR_DATE=2026-13-01"])
def test_a_mistyped_setting_is_refused_at_once(setting, tmp_path):
    name, _, value = setting.partition("=")
    refused = call(tmp_path / "run", tmp_path / "bases", **{**TINY, name: value})
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith(f"run_ilr.sh: error: {name} is '{value}': expected ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong, right", [
    ("ROUND", "ROUNDS"), ("METHOD", "METHODS"), ("SEED", "SEEDS"), ("SFT_EPOCH", "SFT_EPOCHS"),
    ("JUDGE_FLIP", "JUDGE_FLIPS"), ("DPO_LOSSS", "DPO_LOSS"), ("RUONDS", "ROUNDS"),
    ("ALPHQ", "ALPHA"), ("rounds", "ROUNDS"), ("TASKS", "TASK"), ("LORA_RANKS", "LORA_RANK")])
def test_a_variable_that_nearly_is_a_setting_is_refused_by_name(wrong, right, tmp_path):
    refused = call(tmp_path / "run", tmp_path / "bases", **{wrong: "1"})
    assert (refused.returncode, refused.stderr) == (
        2, f"run_ilr.sh: error: {wrong} is no setting; {right} is. Unset it if it is not for "
        "this\n")
    assert list(tmp_path.iterdir()) == []


def test_other_variables_of_an_environment_are_nobodys_business(tmp_path):
    usual = ("TERM SHELL USER LOGNAME EDITOR PAGER DISPLAY HOST HOSTNAME MAIL PWD OLDPWD SHLVL "
             "COLUMNS LINES TZ CI DEBUG PYTHONPATH VIRTUAL_ENV CONDA_PREFIX CUDA_VISIBLE_DEVICES "
             "OMP_NUM_THREADS SLURM_JOB_ID HF_HOME HF_TOKEN http_proxy https_proxy no_proxy TMP "
             "TEMP LC_ALL LANGUAGE WANDB_MODE DATA MODEL OUTPUT NAME PORT HOSTTYPE MANPATH REST "
             "PYTHON3 DEST TEXT META MASK test task")
    done = call(tmp_path / "run", tmp_path / "bases", "--dry-run",
                **dict.fromkeys(usual.split(), "1"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given, message", [
    ({"JUDGE": "https://h/v1"}, "JUDGE_MODEL is '': expected the model"),
    ({"WEAK_ACCURACY": "0.5"}, "WEAK_ACCURACY is '0.5': expected 0"),
    ({"ILR_JUDGE_URL": "https://h/v1?key=secret"}, "ILR_JUDGE_URL is"),
    ({"EMBEDDER": "https://u@h/v1"}, "EMBEDDER is"),
    ({"LABEL_NOISE": "0.2", "FLIP_KIND": "systematic"}, "FLIP_KIND is 'systematic'"),
    ({"METHODS": "ilr ensemble"}, "METHODS: ensemble votes"),
    ({"LAUNCH": "srun torchrun"}, "say how many, NPROC")])
def test_settings_that_would_fail_after_days_are_refused_at_once(given, message, tmp_path):
    refused = call(tmp_path / "run", tmp_path / "bases", "saferpaca", **given)
    assert refused.returncode == 2 and message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given, message", [
    ({"LOAD_IN_4BIT": 1, "LORA_RANK": 0}, "LORA_RANK is '0': expected a rank above 0"),
    ({"CLEAN_START": 1, "LABEL_NOISE": 0.1}, "CLEAN_START=1 drops what LABEL_NOISE makes"),
    ({"WEAK_MODEL": ""}, "WEAK_MODEL is '': expected a hub name or a folder"),
    ({"DPO_LOSS": "kto"}, "dpo.py: argument --loss: invalid choice: 'kto'"),
    ({"PYTHON": "nopython"}, "PYTHON is 'nopython': expected a Python interpreter"),
    ({"DECODING": "--max-new-token 5 --bach-size 3"}, "unrecognized arguments: --bach-size")])
def test_what_does_not_fit_together_is_refused_at_once(given, message, tmp_path):
    refused = call(tmp_path / "run", tmp_path / "bases", "gsm8k", **given)
    assert refused.returncode == 2 and message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words, message", [
    (["nothing"], "unknown task nothing"), (["gsm8k", "bird"], "two tasks, gsm8k and bird"),
    (["ROUNDS=2"], "variables go first"), (["--dry"], "unknown option --dry"),
    (["../x"], "unknown task"), (["generic"], "presets/generic.sh is for every task")])
def test_a_mistyped_command_is_refused(words, message, tmp_path):
    refused = call(tmp_path / "run", tmp_path / "bases", *words)
    assert refused.returncode == 2 and message in refused.stderr and list(tmp_path.iterdir()) == []


def test_a_run_that_made_nothing_may_be_begun_anew(tmp_path):
    out, bases, proxy = tmp_path / "run", tmp_path / "bases", "http://127.0.0.1:1"
    failed = call(out, bases, "gsm8k", DATA_DIR=tmp_path / "nowhere", https_proxy=proxy)
    assert failed.returncode == 2 and "run_ilr.sh: DATA_DIR" in failed.stderr
    again = call(out, bases, "gsm8k", DATA_DIR=tmp_path / "elsewhere", https_proxy=proxy)
    assert again.returncode == 2 and "another configuration" not in again.stderr
    assert "elsewhere" in (out / "config.json").read_text()


# ---------------------------------------------------------------- help
def test_every_variable_of_every_preset_is_documented():
    for preset in PRESETS:
        text = (ROOT / "presets" / f"{preset}.sh").read_text()
        names = re.findall(r'^ *([A-Z][A-Z0-9_]*)="?\$\{\1:?-', text, re.M)
        known = settings.meanings(preset)
        assert [n for n in names if not known.get(n)] == [], preset
    assert set(settings.KINDS) <= {n for preset in PRESETS for n in settings.meanings(preset)}


def test_generic_sets_each_variable_once_with_one_comment():
    text = (ROOT / "presets/generic.sh").read_text()
    names = re.findall(r"^([A-Z][A-Z0-9_]*)=\$\{\1:?-.*?\s# \S", text, re.M)
    assert len(names) == len(set(names)) == len(re.findall(r"^[A-Z][A-Z0-9_]*=\$\{", text, re.M))


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "generic"])
def test_help_says_what_is_true_in_each_preset(preset, tmp_path):
    shown = call(tmp_path / "run", tmp_path / "bases", preset, "--help")
    assert (shown.returncode, shown.stderr) == (0, "") and list(tmp_path.iterdir()) == []
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert "training pairs with an incorrect sample" in lines["JUDGE_WRONG"]
    assert "of these answers" in lines["DPO_TEMPERATURE"]
    assert ("the small one of bases/" in lines["WEAK_MODEL"]) == (preset == "arithmetic")
    assert ("earlier writes no answer" in lines["CHECKPOINTS"]) == (preset == "arithmetic")
    assert ("at SFT_LR it forgets" in lines["CHOSEN_LR"]) == (preset == "arithmetic")
    assert ("0: half" in lines["GT"]) == (preset == "saferpaca")
    assert lines["DPO_TEMPERATURE"].split()[1] == ("1.0" if preset == "saferpaca" else "0.7")


# ---------------------------------------------------------------- config.json
NOW = {"settings": {"ALPHA": "0.15", "ROUNDS": "3", "SEEDS": "0", "METHODS": "ilr",
                    "RETRAINS": "1"}, "commit": "abc", "versions": {"torch": "2.13.0"}}


def config(run, now):
    write_json(run / "config.json", settings.check_config(run, now))


def begun(run, **changes):
    config(run, {**NOW, "settings": {**NOW["settings"], **changes}})
    (run / "seed_0/data").mkdir(parents=True, exist_ok=True)
    (run / "seed_0/data/test.jsonl").write_text("{}\n")
    return json.loads((run / "config.json").read_text())


def test_a_changed_setting_is_refused_and_the_file_kept(tmp_path):
    begun(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(InputError, match="ALPHA was '0.15', is '0.3'"):
        begun(tmp_path, ALPHA="0.3")
    newer = {**NOW, "versions": {"torch": "2.14.0"}}
    with pytest.raises(InputError, match="torch was '2.13.0', is '2.14.0'"):
        config(tmp_path, newer)
    assert (tmp_path / "config.json").read_text() == before


def test_a_start_that_asks_for_more_or_less_takes_nothing_back(tmp_path):
    begun(tmp_path)
    begun(tmp_path, ROUNDS="6", SEEDS="0 1", METHODS="dpo ilr", RETRAINS="3")
    kept = begun(tmp_path, ROUNDS="1", SEEDS="2", METHODS="rft")["settings"]
    assert kept == {"ALPHA": "0.15", "ROUNDS": "6", "SEEDS": "0 1 2", "METHODS": "ilr dpo rft",
                    "RETRAINS": "3"}


def test_settings_of_a_folder_where_nothing_was_made_are_forgotten(tmp_path):
    config(tmp_path, NOW)
    config(tmp_path, {**NOW, "settings": {**NOW["settings"], "ALPHA": "0.3"}})
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["ALPHA"] == "0.3"


def test_a_run_made_from_another_has_no_flag_twice(tmp_path):
    """Settings that become flags of other settings (DTYPE, CHAT_TEMPLATE) are recorded as given."""
    given = dict(DTYPE="bfloat16", CHAT_TEMPLATE=1)
    code = "import json, os, sys; from core import settings as s; " \
           "json.dump(s.configuration('gsm8k'), sys.stdout)"
    python = tmp_path / "python"        # stands for the stages: says what config.json would hold
    python.write_text(f"""#!/bin/sh
case "$*" in *core.stages*) exec {sys.executable} -c "{code}" ;; esac
exec {sys.executable} "$@"
""")
    python.chmod(0o755)
    done = call(tmp_path / "a", tmp_path / "bases", "gsm8k", **{**given, "PYTHON": python})
    made = json.loads(done.stdout)["settings"]
    assert made["DTYPE"] == "bfloat16" and made["CHAT_TEMPLATE"] == "1"
    assert not any("--dtype" in v or "--chat-template" in v for v in made.values())
    assert made["DPO_FLAGS"] == "--optimizer rmsprop8bit"
