"""The settings of a run on the page, from its config.json: commit, versions, every variable."""
import os
import re
import shlex
import subprocess

from core.settings import meanings, reads
from core.sources import ROOT
from report.tables import plain, shown, table


def preset_values(preset, given):
    """{variable: value} that the files of presets/ give where the environment has only `given`.
    {} where they cannot be read, for want of bash or of the files."""
    try:
        names = list(meanings(preset))
        files = ["generic"] if not reads(preset) else [preset, "generic"]
        script = "".join(f". presets/{file}.sh\n" for file in files) + "".join(
            f'printf "%s\\0" "${{{name}-}}"\n' for name in names)
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
            env={"PATH": os.environ.get("PATH", os.defpath), "TASK": preset, **given})
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(names, done.stdout.split("\0"), strict=False))


def differing(settings, given):
    """Those of the settings that the presets do not give, where the environment has `given`."""
    values = preset_values(settings["TASK"], given)
    return {k: v for k, v in settings.items() if k in values and values[k].split() != v.split()}


def given_variables(settings):
    """{variable: value} that a command has to set to have these settings: those that are neither
    the presets' nor follow from others, as a learning rate does from LORA_RANK."""
    given = differing(settings, {})
    for name in list(given):
        others = {k: v for k, v in given.items() if k != name}
        if name not in differing(settings, others):
            given = others
    return given


def command(settings, given):
    """The command that has these settings, as lines of code in Markdown."""
    words = [f"{name}={shlex.quote(' '.join(value.split()))}" for name, value in given.items()]
    lines = " \\\n".join([*words, f"bash run_ilr.sh {settings['TASK']}"])
    return "".join(f"    {''.join(map(shown, line))}\n" for line in lines.split("\n"))


def settings_section(data):
    """Markdown of `## Settings`, as a list of pieces; [] where there is no config.json."""
    config = data["config"]
    settings = {k: str(v) for k, v in config.get("settings", {}).items()}
    preset = settings.get("TASK", "")
    if not settings:
        return []
    made_by = ["The commit was not recorded"]
    if config.get("commit"):
        made_by = [f"Commit {plain(config['commit'])}; whether files had uncommitted changes is "
                   "not recorded"]
    if versions := config.get("versions"):
        made_by.append(", ".join(f"{plain(name)} {plain(v)}" for name, v in versions.items()))
    text = ["## Settings\n", f"{'. '.join(made_by)}.\n"]
    if not re.fullmatch(r"\w[\w-]*", preset) or not (values := preset_values(preset, {})):
        return [*text, table(["variable", "value"],
                             [[plain(k), plain(v) if v else ""] for k, v in settings.items()])]
    given, said = given_variables(settings), meanings(preset)
    text += ["A command that has these settings, by the presets of this code (OUT, BASES, JOBS and "
             "others that change no result are not recorded):\n",
             command(settings, given)]
    rows = []
    for name in [*given, *(k for k in settings if k not in given)]:
        value, usual = settings[name], values.get(name, "")
        other = name in values and usual.split() != value.split()
        rows.append([plain(name), plain(value) if value else "",
                     (plain(usual) if usual else "*nothing*") if other else "",
                     plain(said.get(name, "")) if said.get(name) else ""])
    return [*text, "All settings, those of the command first:\n",
            table(["variable", "value", "preset, where it differs", "meaning"], rows)]
