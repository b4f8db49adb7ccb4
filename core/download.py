"""Files from the network, each checked by its hash."""
import hashlib

from core.cli import short
from core.records import InputError, write_jsonl

RELEASE = ("https://raw.githubusercontent.com/HelloElwin/iterative-label-refinement/"
           "3ab48d3fe2702c79434bdb4f25a87b66d8c14f8c/data/")      # one commit of the release


def download(url, digest, file):
    """The bytes behind a URL, with a progress bar.

    digest(bytes) says whether they are the expected ones. file: what the error message tells the
    user to get by hand. Raises InputError if there is no network or the bytes are not the expected.
    """
    from urllib.request import urlopen

    from tqdm import tqdm
    chunks = []
    try:
        with urlopen(url, timeout=30) as reply:
            size = int(reply.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=f"download {short(url)}") as bar:
                while chunk := reply.read(1 << 16):
                    chunks.append(chunk)
                    bar.update(len(chunk))
    except OSError as e:
        raise InputError(f"{url}: {e}; put {file} into a folder and name it with --data-dir "
                         "(run_ilr.sh: DATA_DIR)") from None
    data = b"".join(chunks)
    if not digest(data):
        raise InputError(f"{url}: it is not the file that is expected here (its hash differs)")
    return data


def from_release(path, task, split, blob):
    """Write a dataset of the paper's release, an Arrow file there, to `path` as JSON Lines.

    blob: the name git gives the file, which is the SHA-1 of a header and the content.
    """
    try:
        import pyarrow.ipc
    except ImportError:
        raise InputError(f"{path}: missing; put it there, "
                         "or `pip install pyarrow` to read the paper's release") from None

    def is_blob(data):
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest() == blob
    data = download(f"{RELEASE}{task}/{split}/data-00000-of-00001.arrow", is_blob, path.name)
    write_jsonl(path, pyarrow.ipc.open_stream(data).read_all().to_pylist())
