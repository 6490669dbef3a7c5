"""Turn text into token shards for train_gpt_skip.py.

    ./run.sh tokenize my_texts/ more.jsonl --out data/mine                  # GPT-2 tokens
    ./run.sh tokenize --stdlib --encoding bytes --out data/stdlib           # nothing is downloaded
    ./run.sh tokenize my_texts/ --encoding models/smol/tokenizer.json --out data/smol
    ./run.sh tokenize big.parquet --out data/big --max_tokens 10_000_000

Writes shards in the format of llm.c and modded-nanogpt: 256 little-endian int32 (magic, version, number of
tokens, zeros), then uint16 tokens (uint32 where the vocabulary is beyond 65,536), each document begun by
<|endoftext|>; and `dataset.json`, which says what they hold. They depend on the documents and their order
alone, not on --workers. A document is for validation if the hash of its text, as a fraction, is below
--val_fraction, whatever the other documents are.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import marshal
import math
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

HEADER_INTS = 256
FORMATS = {"<u2": (20240520, 1), "<u4": (20240801, 7)}  # type of the tokens: magic, version
FIRST_SHARD = {"train": 1, "val": 0}  # the numbers that FineWeb's shards have
PIECE_CHARS = 1 << 18  # a longer document is encoded in pieces: bounds memory and the regex's work
CHUNK_BYTES, CHUNK_ITEMS = 1 << 20, 1024  # what a worker gets at a time
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}


class InputError(Exception):
    """What the user can put right; the message says how."""


# --- Encodings ----------------------------------------------------------------------------------------


@functools.cache
def get_encoding(name):
    """A tiktoken.Encoding, "gpt2" or "bytes" (the 256 single bytes, then <|endoftext|>); or, with what is
    used of one, the Hugging Face tokeniser of which `name` is the tokenizer.json."""
    if name == "bytes":
        ranks, special = {bytes([value]): value for value in range(256)}, {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens=special)
    if name.endswith(".json"):
        return TokenizerFile(name)
    if name != "gpt2":
        raise InputError(f"--encoding {name} is not gpt2, bytes or the path of a tokenizer.json")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # of requests or of tiktoken: no network, a proxy, a damaged download
        raise InputError(
            f"the {name} vocabulary could not be downloaded ({type(error).__name__}): "
            "use --encoding bytes, or set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from None


class TokenizerFile:
    """A tokenizer.json, as much like a tiktoken.Encoding as is needed here.

    A document begins with what the file puts before a text (<s>, <|begin_of_text|>) or, if that is nothing,
    with the first of BEGIN that it knows; that token stands where GPT-2 has its <|endoftext|>.
    """

    BEGIN = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<|end_of_text|>", "</s>")

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise InputError(f"{path}: reading it needs tokenizers: pip install tokenizers") from None
        try:
            self.tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # tokenizers raises nothing else
            raise InputError(f"--encoding {path} cannot be read as a tokenizer.json ({error})") from None
        self.tokenizer.no_truncation()  # (the file may say otherwise)
        self.tokenizer.no_padding()
        self.name = path
        self.n_vocab = 1 + max(self.tokenizer.get_vocab().values())  # (ids may have gaps)
        begin = self.tokenizer.encode("").ids + list(map(self.tokenizer.token_to_id, self.BEGIN))
        self.eot_token = next((token for token in begin if token is not None), None)
        if self.eot_token is None:
            raise InputError(f"--encoding {path} has no token that begins a document (of {self.BEGIN})")
        self.tokenizer.encode_special_tokens = True  # those in a text are ordinary text
        self.added = self.tokenizer.get_added_tokens_decoder()
        self.byte_of = byte_alphabet() if "ByteLevel" in str(self.tokenizer.decoder) else None

    def encode_ordinary(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_single_token_bytes(self, token):
        """KeyError where there is no such token."""
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            raise KeyError(token)
        if token in self.added:
            return piece.encode()
        if self.byte_of:
            return bytes(map(self.byte_of.get, piece))
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes.fromhex(piece[3:5])
        return piece.replace("\u2581", " ").encode()


def byte_alphabet():
    """The byte that each character of a byte-level vocabulary stands for: printable ones for themselves, then
    those from 256 on for the others in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def encode_text(encoding, text):
    """Tokens of UTF-8 bytes, in some unsigned dtype; special tokens in them are ordinary text."""
    if encoding.name == "bytes":
        return np.frombuffer(text, np.uint8)  # the same as the Encoding gives, without its regex
    if isinstance(encoding, TokenizerFile):
        return np.array(encoding.encode_ordinary(text.decode()), np.uint32)
    return encoding.encode_to_numpy(text.decode(), disallowed_special=())


def token_type(encoding):
    return "<u2" if encoding.n_vocab <= 2**16 else "<u4"


@functools.cache
def token_lengths(encoding):
    """(n_vocab,) bytes of text behind each token; none behind <|endoftext|>, nor where there is no token."""
    lengths = np.zeros(encoding.n_vocab, np.uint16)
    for token in range(encoding.n_vocab):
        with contextlib.suppress(KeyError):
            lengths[token] = len(encoding.decode_single_token_bytes(token))
    lengths[encoding.eot_token] = 0
    return lengths


# --- Documents ----------------------------------------------------------------------------------------


def pieces_of(blocks):
    """Yield (UTF-8, draw, does it begin the document) of each piece; `blocks` of text are iterated twice."""
    draw = draw_of(blocks)
    for index, text in enumerate(cut(blocks)):
        yield utf8(text), draw, index == 0


def draw_of(blocks):
    """A document's place in [0, 1): a hash of its text, hence independent of all others."""
    digest = hashlib.blake2b(digest_size=6)
    for block in blocks:
        digest.update(utf8(block))
    return int.from_bytes(digest.digest(), "big") / 2**48


def utf8(text):
    return text.encode(errors="replace")  # JSON can escape a lone surrogate, UTF-8 cannot write it: "?"


def cut(blocks):
    """Pieces of a document, a function of its text alone: not of the blocks that it comes in.

    GPT-2's pattern never matches a non-space together with the space after it: a cut there changes no
    token (some tokenizer.json's do, and may encode a piece's first word in another way). Where there is none
    within reach (in a megabyte of base64, say) the cut falls where it must.
    """
    rest = ""
    for block in blocks:
        text, start = rest + block, 0
        while len(text) - start > 2 * PIECE_CHARS:
            space = re.compile(r"\S[ \n]").search(text, start + PIECE_CHARS, start + 2 * PIECE_CHARS)
            end = space.start() + 1 if space else start + 2 * PIECE_CHARS
            yield text[start:end]
            start = end
        rest = text[start:]
    yield rest


# --- Input --------------------------------------------------------------------------------------------


def read_file(path, skipped):
    """Yield items: a document's pieces, or (line, where) of JSON, which a worker then parses, for speed.

    A file with NUL bytes is not text and is added to `skipped`.
    """
    if path.suffix.lower() == ".jsonl":
        yield from read_jsonl(path)
    elif path.suffix.lower() == ".parquet":
        for text in read_parquet(path):
            yield from pieces_of([text])
    elif is_binary(path):
        skipped.add(path)
    else:
        yield from pieces_of(TextFile(path))


def is_binary(path):
    with open(path, "rb") as file:
        return any(b"\0" in block for block in iter(lambda: file.read(1 << 20), b""))


class TextFile:
    """A file's text in blocks, so that a document may be larger than memory."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        with open(self.path, encoding="utf-8-sig", errors="replace", newline="") as file:
            yield from iter(lambda: file.read(PIECE_CHARS), "")


def read_jsonl(path):
    with open(path, "rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield line, f"{path}:{number}"


def read_parquet(path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise InputError(f"{path}: no column `text`, but {', '.join(file.schema_arrow.names)}")
            groups = range(file.num_row_groups)  # one by one, or pyarrow keeps all of them in memory
            batches = (batch for group in groups for batch in file.iter_batches(256, [group], ["text"]))
            rows = (row for batch in batches for row in batch.column(0).to_pylist())
            for number, text in enumerate(rows, 1):
                yield checked(text, f"{path}: row {number}")
    except ArrowException as error:
        raise InputError(f"{path}: {error}") from None


def parse(line, where):
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    return checked(content.get("text") if isinstance(content, dict) else None, where)


def checked(text, where):
    if not isinstance(text, str):
        raise InputError(f"{where}: no `text` that is a string")
    return text


def files_below(folder, unwanted=()):
    """Yield a folder's files, then its subfolders', sorted by name, without hidden ones."""

    def refuse(error):  # os.walk would pass over a folder that it cannot read
        raise error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in unwanted)
        paths = (Path(root, name) for name in sorted(names) if name[0] != ".")
        yield from (path for path in paths if path.is_file())


def input_files(paths, stdlib):
    if not paths and not stdlib:
        raise InputError("no input: give files or folders, or --stdlib")
    for path in paths:
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{path}: no such file or folder")
        yield from files_below(path) if path.is_dir() else [path]
    if stdlib:
        sources = files_below(sysconfig.get_path("stdlib"), NOT_STDLIB)
        yield from (path for path in sources if path.suffix == ".py")


# --- Encoding, in several processes -------------------------------------------------------------------


def chunks(items, bar):
    """Lists of items, bounded in bytes and in number; `bar` counts bytes."""
    chunk, room = [], CHUNK_BYTES
    for item in items:
        chunk.append(item)
        room -= len(item[0])
        bar.update(len(item[0]))
        if room <= 0 or len(chunk) == CHUNK_ITEMS:
            yield chunk
            chunk, room = [], CHUNK_BYTES
    if chunk:
        yield chunk


def encode_chunk(name, chunk):
    """Tokens, as bytes; and of each piece in the chunk its number of tokens and its draw."""
    encoding, tokens, counts, draws = get_encoding(name), [], [], []
    end_of_text = np.array([encoding.eot_token], token_type(encoding))
    for item in chunk:
        for data, draw, begins in [item] if len(item) == 3 else pieces_of([parse(*item)]):
            tokens += [end_of_text[:begins], encode_text(encoding, data)]
            counts.append(begins + tokens[-1].size)
            draws.append(draw)
    return np.concatenate(tokens, dtype=token_type(encoding), casting="unsafe").tobytes(), counts, draws


def serve(name):
    """A worker process: answers the chunks on its standard input until that ends, with its parent."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            chunk = marshal.load(sys.stdin.buffer)
            try:
                answer = encode_chunk(name, chunk)
            except InputError as error:
                answer = str(error)
            marshal.dump(answer, sys.stdout.buffer)
            sys.stdout.flush()


def ask(worker, chunk):
    """What encode_chunk gives, from a worker process."""
    try:
        marshal.dump(chunk, worker.stdin)
        worker.stdin.flush()
        answer = marshal.load(worker.stdout)
    except (EOFError, BrokenPipeError):
        raise InputError("a worker died, out of memory perhaps: try fewer --workers") from None
    if isinstance(answer, str):
        raise InputError(answer)
    return answer


@contextlib.contextmanager
def workers(name, count):
    """Start worker processes; give a function that has an idle one encode a chunk, to be called in threads.

    Over plain pipes, because ProcessPoolExecutor was seen to hang when a worker was killed, and to leave its
    workers behind when it was killed itself. In sessions of their own, workers do not hear Ctrl-C.
    """
    command, pipe = [sys.executable, __file__, "--serve", name], subprocess.PIPE
    start = functools.partial(subprocess.Popen, command, stdin=pipe, stdout=pipe, start_new_session=True)
    processes, idle = [start() for _ in range(count)], queue.SimpleQueue()

    def encode(chunk):
        worker = idle.get()
        try:
            return ask(worker, chunk)
        finally:
            idle.put(worker)

    try:
        for worker in processes:
            idle.put(worker)
        yield encode
    finally:
        for worker in processes:
            worker.kill()
            worker.communicate()  # closes its pipes


def encode_in_order(name, work, count):
    """Yield encode_chunk(name, chunk) of each chunk, in order; few are in flight, so memory stays flat."""
    if count == 1:
        yield from map(functools.partial(encode_chunk, name), work)
        return
    pending = deque()
    with ThreadPoolExecutor(count) as pool, workers(name, count) as encode:
        for chunk in work:
            pending.append(pool.submit(encode, chunk))
            if len(pending) > 2 * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# --- Output -------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes the tokens of a split, a new file every `shard_tokens`; `shards` says what each file holds.

    All counts come from the tokens as written: a document counts where its <|endoftext|> is, a byte of text
    where the token that stands for it is. So the shards' counts add up to the whole exactly.
    """

    def __init__(self, folder, stem, number, shard_tokens, encoding):
        self.folder, self.stem, self.number, self.shard_tokens = folder, stem, number, shard_tokens
        self.eot, self.lengths = encoding.eot_token, token_lengths(encoding)
        self.format = FORMATS[token_type(encoding)]
        self.shards, self.file = {}, None

    def write(self, tokens):
        while tokens.size:
            if self.file is None:
                self.open()
            room = self.shard_tokens - self.shard["tokens"]
            self.append(tokens[:room])
            tokens = tokens[room:]
            if self.shard["tokens"] == self.shard_tokens:
                self.close()

    def open(self):
        name = f"{self.stem}_{self.number:06d}.bin"
        self.number += 1
        self.shard = self.shards[name] = {"tokens": 0, "bytes": 0, "documents": 0}
        self.file = open(self.folder / name, "w+b")
        self.file.write(bytes(4 * HEADER_INTS))  # filled in when the count is known

    def append(self, tokens):
        self.file.write(tokens.tobytes())
        self.shard["tokens"] += tokens.size
        self.shard["bytes"] += int(self.lengths[tokens].sum(dtype=np.int64))
        self.shard["documents"] += int((tokens == self.eot).sum())

    def close(self):
        if self.file is None:
            return
        header = np.zeros(HEADER_INTS, "<i4")
        header[:3] = *self.format, self.shard["tokens"]
        with self.file as file:
            file.seek(0)
            file.write(header.tobytes())
            sync(file)
            file.seek(0)
            self.shard["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        self.file = None

    def total(self):
        return {key: sum(s[key] for s in self.shards.values()) for key in ("tokens", "bytes", "documents")}


def sync(file):
    file.flush()
    os.fsync(file.fileno())


def refuse_existing(out, name):
    """No file is overwritten, nor left where the globs for the new shards would find it."""
    for pattern in ("dataset.json", *(f"{name}_{split}_*.bin" for split in FIRST_SHARD)):
        for path in out.glob(pattern):
            raise InputError(f"{path} exists: remove it, or choose another --out")


@contextlib.contextmanager
def scratch(out):
    """A temporary folder inside `out`. A failure leaves nothing: not `out` either, if it was made here."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tokenize_", dir=out) as folder:
            yield Path(folder)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def publish(folder, out, names):
    """Move finished files into place: all of them, or none."""
    with contextlib.ExitStack() as undo:
        for name in names:
            undo.callback((out / name).unlink, missing_ok=True)
            os.rename(folder / name, out / name)
        directory = os.open(out, os.O_RDONLY)
        os.fsync(directory)  # the names, too, are on the disk now
        os.close(directory)
        undo.pop_all()


# --- The dataset --------------------------------------------------------------------------------------


def build(args):
    """Write the dataset that the command line asks for; return what `dataset.json` says."""
    args.files, args.skipped = list(input_files(args.paths, args.stdlib)), set()
    refuse_existing(args.out, args.name)
    get_encoding(args.encoding)  # or say why not, before any work
    with scratch(args.out) as folder:
        writers, *draws = write_shards(args, args.val_fraction, folder)
        fraction = usable_fraction(args.val_fraction, *draws)
        if fraction != args.val_fraction:  # few documents: a split came out empty
            writers, *_ = write_shards(args, fraction, folder)
        dataset = describe(args, fraction, writers)
        with open(folder / "dataset.json", "w") as file:
            file.write(json.dumps(dataset, indent=2) + "\n")
            sync(file)
        refuse_existing(args.out, args.name)  # from another run, meanwhile
        publish(folder, args.out, [*dataset["shards"], "dataset.json"])
    return dataset


def write_shards(args, fraction, folder):
    """Write all shards into `folder`; return the splits' writers, the lowest and the highest draw."""
    encoding = get_encoding(args.encoding)
    writers = {
        split: ShardWriter(folder, f"{args.name}_{split}", number, args.shard_tokens, encoding)
        for split, number in FIRST_SHARD.items()
    }
    left, lowest, highest = args.max_tokens, 1.0, 0.0
    for tokens, draws in encoded(args):
        tokens, draws = tokens[:left], draws[:left]
        left -= tokens.size
        writers["train"].write(tokens[draws >= fraction])
        writers["val"].write(tokens[draws < fraction])
        lowest, highest = min(lowest, draws.min()), max(highest, draws.max())
        if left == 0:
            break
    for writer in writers.values():
        writer.close()
    return writers, float(lowest), float(highest)


def encoded(args):
    """Yield tokens: (n,) and draws: (n,) float64, of the document of each token."""
    dtype = token_type(get_encoding(args.encoding))
    items = (item for path in args.files for item in read_file(path, args.skipped))
    size = sum(path.stat().st_size for path in args.files)
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:  # on a terminal only
        for tokens, counts, draws in encode_in_order(args.encoding, chunks(items, bar), args.workers):
            yield np.frombuffer(tokens, dtype), np.repeat(draws, counts)


def usable_fraction(fraction, lowest, highest):
    """`fraction`, moved just so far that neither split is empty, given the extreme draws."""
    if lowest > highest:
        raise InputError("no documents found (files with NUL bytes are skipped)")
    if fraction == 0:
        return fraction
    if lowest == highest:
        raise InputError(
            "only one distinct document, which leaves none for validation: "
            "split it into several files, or give --val_fraction 0"
        )
    return min(max(fraction, math.nextafter(lowest, 1)), highest)


def describe(args, fraction, writers):
    """What `dataset.json` says."""
    encoding = get_encoding(args.encoding)
    about = {"encoding": args.encoding, "vocab_size": encoding.n_vocab, "document_token": encoding.eot_token,
             "val_fraction": fraction}
    totals = {split: writer.total() for split, writer in writers.items()}
    shards = {name: shard for writer in writers.values() for name, shard in writer.shards.items()}
    return {**about, **totals, "shards": shards}


def summary(args, dataset):
    """What was written, and what to run next."""
    lines, flags = [], [f"--preset gated --vocab_size {dataset['vocab_size']}"]
    for split in FIRST_SHARD:
        counts = ", ".join(f"{dataset[split][key]:,} {key}" for key in ("documents", "bytes", "tokens"))
        lines.append(f"{split + ':':6} {counts}")
        if dataset[split]["tokens"]:
            flags.append(f"--{split}_files {shlex.quote(f'{args.out}/{args.name}_{split}_*.bin')}")
    if dataset["val_fraction"] != args.val_fraction:
        lines.append(f"note:  --val_fraction {args.val_fraction} left a split empty: one document was moved")
    if args.skipped:
        lines.append(f"note:  {len(args.skipped)} binary files were skipped")
    return "\n".join([*lines, f"next:  ./run.sh {' '.join(flags)}"])


# --- Command line -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def between(kind, low, high):
    """An argparse type: a number in [low, high)."""

    def parse_number(text):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:,}, {high:,})")
        return kind(text)

    parse_number.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse_number


def file_prefix(text):
    if not re.fullmatch(r"\w[\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of letters, digits and _ . - alone")
    return text


def arguments():
    parser = Parser("tokenize_text.py", description="Turn text into token shards.", allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="PATH",
        help=".jsonl (field `text`), .parquet (column `text`), any other file (one UTF-8 document; skipped "
        "if it has NUL bytes), or a folder (with its subfolders, in sorted order, without hidden files)")
    add("--stdlib", action="store_true", help="the source of the running Python's standard library, too")
    add("--out", type=Path, required=True, metavar="DIR",
        help="folder for the shards and dataset.json; no file in it is overwritten")
    add("--encoding", default="gpt2", metavar="NAME",
        help="gpt2: 50257 tokens, vocabulary downloaded once; bytes: 257, no download; or the path of a "
        "Hugging Face tokenizer.json (default: %(default)s)")
    add("--val_fraction", type=between(float, 0, 1), default=0.05, metavar="F",
        help="share of the documents that go to validation, 0: none (default: %(default)s)")
    add("--shard_tokens", type=between(int, 1024, 2**31), default=100_000_000, metavar="N",
        help="tokens a shard, of 2 bytes each, or 4 (default: %(default)s)")
    add("--name", type=file_prefix, default="text", metavar="PREFIX",
        help="what the shards' names begin with (default: %(default)s)")
    add("--workers", type=between(int, 1, 1025), default=os.cpu_count(), metavar="N",
        help="processes; what is written does not depend on it (default: one a CPU, here %(default)s)")
    add("--max_tokens", type=between(int, 1, 2**63), default=2**63 - 1, metavar="N",
        help="stop at N tokens, both splits together, within a document if need be (default: all)")
    return parser


def main(argv=None):
    """Exit status 0; or 2 with one line for what the user can put right; or 130 if interrupted."""
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        print(summary(args, build(args)))
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or args.out}: {error.strerror or error}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted, nothing was written\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # killed: clean up as when interrupted
        main()
