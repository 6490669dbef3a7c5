"""Fetch FineWeb, tokenized with the gpt2 encoding, from the Hugging Face hub.

    ./run.sh fineweb                                        # the validation and all training shards
    ./run.sh fineweb 8                                      # only the first 8 training shards
    ./run.sh fineweb 8 --dataset kjj0/finewebedu10B-gpt2    # another repo of the same layout

The shards go next to this script, into fineweb10B (the repo's name without -gpt2). Whole ones are not fetched
again: after an interruption the same command carries on, and where all are there it needs no network.
HF_ENDPOINT names a mirror of the hub.

A shard is 256 little-endian int32 (20240520, 1, the number of tokens, zeros), then its tokens as uint16.
"""
import argparse
import json
import os
import re
import shutil
import signal
import struct
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging
from tqdm import tqdm

MAGIC, VERSION, HEADER_BYTES, TOKEN_BYTES = 20240520, 1, 1024, 2
# Training shards a repo. Others are asked of the hub, but a folder that has all of these needs no network.
TRAIN_SHARDS = {"kjj0/fineweb10B-gpt2": 103, "kjj0/fineweb100B-gpt2": 1030, "kjj0/finewebedu10B-gpt2": 99}


class Failure(Exception):
    """What stops the run, in a line that says what to do about it."""


def fail(message):
    raise Failure(message)


def layout(repo):
    """The folder and the file prefix of a repo: fineweb10B and fineweb of kjj0/fineweb10B-gpt2."""
    match = re.fullmatch(r"[\w.-]+/(([A-Za-z_-]+)[\w.-]*)-gpt2", repo)
    if not match:
        fail(f"--dataset {repo}: give OWNER/NAME-gpt2, such as {next(iter(TRAIN_SHARDS))}")
    return match.groups()


def shard_names(repo, prefix, n):
    """The validation shard and the first n training shards, or all of them."""
    most = TRAIN_SHARDS.get(repo)
    if n is None and most is None:
        most = sum(name.startswith(f"{prefix}_train_") for name in on_hub(repo)[1])
    n = most if n is None else n
    if n < 0 or (most is not None and n > most):
        fail(f"N is {n}, but must be 0 to {most or 'the number of training shards'} for {repo}")
    return [f"{prefix}_val_000000.bin", *(f"{prefix}_train_{i:06d}.bin" for i in range(1, n + 1))]


def fault(path):
    """What keeps a file from being a whole shard, or None."""
    if not path.exists():
        return "is not there"
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES or struct.unpack_from("<2i", header) != (MAGIC, VERSION):
        return "does not begin with the header of a shard"
    size, due = path.stat().st_size, HEADER_BYTES + TOKEN_BYTES * struct.unpack_from("<i", header, 8)[0]
    return None if size == due else f"has {size:,} bytes where its header says {due:,}"


def tokens_in(path):
    return (path.stat().st_size - HEADER_BYTES) // TOKEN_BYTES


def refuse_another(folder, repo):
    """Keep the dataset.json of other data, and so what it describes, from being overwritten."""
    path = folder / "dataset.json"
    if path.exists() and f'"source": "{repo}"' not in path.read_text(errors="replace"):
        fail(f"{path} does not describe {repo}: give another --out, or remove it")


def describe(folder, repo, prefix):
    """Write dataset.json in one step, and only where it is news: a finished folder may be read-only."""
    whole = [path for path in sorted(folder.glob(f"{prefix}_*.bin")) if not fault(path)]
    text = json.dumps({"encoding": "gpt2", "vocab_size": 50257, "document_token": 50256, "source": repo,
                       "shards": {path.name: {"tokens": tokens_in(path)} for path in whole}}, indent=2) + "\n"
    path, draft = folder / "dataset.json", folder / ".dataset.json"
    if not path.exists() or path.read_text() != text:
        draft.write_text(text)
        os.replace(draft, path)


def on_hub(repo):
    """A repo's newest commit and {file: bytes}, in one request without retries: no network shows at once."""
    info = HfApi().dataset_info(repo, files_metadata=True, timeout=10)
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings}


def fetch(repo, commit, name, incoming, folder):
    """Put one whole shard into the folder. What is not one gets a second chance, past the hub's cache."""
    if (folder / name).exists():
        tqdm.write(f"{name} {fault(folder / name)}: fetching it again")
    for again in (False, True):
        path = Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit, local_dir=incoming,
                                    force_download=again))
        wrong = fault(path)
        if not wrong:
            return os.replace(path, folder / name)
        path.unlink()
    fail(f"{name} of {repo} {wrong}, twice: removed; try later, or another HF_ENDPOINT")


def fetch_all(repo, commit, sizes, incoming, workers):
    """Fetch the files of sizes, several at a time, with a bar on a terminal and elsewhere a line a shard."""
    folder, landed = incoming.parent, 0
    bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        names = {pool.submit(fetch, repo, commit, name, incoming, folder): name for name in sizes}
        pending = set(names)
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for job in finished:
                if job.exception():  # those under way still land, the others do not start
                    pool.shutdown(cancel_futures=True)
                job.result()
                landed += sizes[names[job]]
                if bar.disable:
                    print(f"{names[job]}: {tokens_in(folder / names[job]):,} tokens", flush=True)
            bar.update(landed + bytes_under_way(incoming) - bar.n)


def bytes_under_way(incoming):
    """Read off the disk, which holds for each way that the hub's client downloads."""
    total = 0
    for path in incoming.rglob("*.incomplete"):
        with suppress(FileNotFoundError):  # it has just become whole
            total += path.stat().st_size
    return total


def fetch_missing(repo, missing, folder, workers):
    """Ask the hub for the missing files, and fetch them by way of a folder beside them."""
    commit, sizes = on_hub(repo)
    absent = [name for name in missing if name not in sizes]
    if absent:
        fail(f"{repo} has no file {absent[0]}: check --dataset and N")
    incoming = folder / ".incoming"
    shutil.rmtree(incoming, ignore_errors=True)  # a killed run's: the client resumes no other process's files
    incoming.mkdir(parents=True)
    try:
        fetch_all(repo, commit, {name: sizes[name] for name in missing}, incoming, workers)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def download(repo, n=None, out=None, workers=4):
    folder, prefix = layout(repo)
    folder = out or Path(__file__).resolve().parent / folder
    refuse_another(folder, repo)
    names = shard_names(repo, prefix, n)
    missing = [name for name in names if fault(folder / name)]
    if missing:
        fetch_missing(repo, missing, folder, workers)
    describe(folder, repo, prefix)
    print(f"{folder}: {len(names)} shards, {sum(tokens_in(folder / name) for name in names):,} tokens")


def explain(error, repo):
    """What an error of the hub's client, or of the disk, means here and what to do about it."""
    again = "run the same command again: whole shards are kept"
    match error:
        case RepositoryNotFoundError():
            return f"{ENDPOINT} has no dataset {repo}, or not for you: check --dataset, or run hf auth login"
        case HfHubHTTPError():
            return f"{ENDPOINT} answered {error.response.status_code} about {repo}: try later, {again}"
        case HTTPError() | ConnectionError() | TimeoutError() | LocalEntryNotFoundError() | JSONDecodeError():
            cause = error.__cause__ or error
            return f"cannot reach {ENDPOINT} ({cause}): check the network and HF_ENDPOINT, then {again}"
        case RuntimeError():
            return f"the hub's xet client: {error}: set HF_HUB_DISABLE_XET=1 to do without it, and {again}"
    return f"{error}: mend that, then {again}"


def parse(argv):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.error = fail  # one line, without the usage
    parser.add_argument("n", metavar="N", type=int, nargs="?", help="training shards (default: all)")
    parser.add_argument("--dataset", metavar="REPO", default=next(iter(TRAIN_SHARDS)), help="(%(default)s)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the shards go instead")
    parser.add_argument("--workers", metavar="W", type=int, default=4, choices=range(1, 17),
                        help="shards at a time, 1 to 16 (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        args = parse(argv)
        return download(args.dataset, args.n, args.out, args.workers)
    except Failure as failure:
        message = str(failure)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        message = explain(error, args.dataset)
    print("fineweb.py:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a kill is always safe; Ctrl-C would wait for the threads
    sys.exit(main())
