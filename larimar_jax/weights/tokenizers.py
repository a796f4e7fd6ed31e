"""Text ↔ token ids, for both towers, over the `tokenizers` library."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, SupportsInt

import numpy as np
import tokenizers as hf
from jaxtyping import Bool, Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from larimar_jax.weights import tokenizer_files
from larimar_jax.weights.fill import WeightsError
from larimar_jax.weights.gguf import open_gguf

# Names that families give to their special tokens, in order of preference.
_BOS = ("<BOS>", "<s>", "<|begin_of_text|>", "[CLS]", "<|endoftext|>")
_EOS = ("<EOS>", "</s>", "<|end_of_text|>", "[SEP]", "<|endoftext|>")
_PAD = ("<PAD>", "[PAD]", "<pad>", "<|im_end|>")


class TextTooLong(ValueError):
    """A text that has more tokens than there is room for."""


class TokenBatch(NamedTuple):
    """N texts, right-padded to S tokens; the mask is True on real tokens."""

    ids: Int[np.ndarray, "N S"]
    mask: Bool[np.ndarray, "N S"]


def bucket(length: int, multiple: int = 8) -> int:
    """The smallest positive multiple that holds `length`: few shapes mean few compilations."""
    return max(1, -(-length // multiple)) * multiple


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with the ids that a tower needs.

    bos, eos, pad: ids. prefix and suffix: what `encode` puts around each text, such as [CLS] and
    [SEP]; empty for a decoder, whose framing depends on the use.
    """

    backend: hf.Tokenizer
    bos: int
    eos: int
    pad: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __post_init__(self):
        # A file may say to pad and to cut, as MiniLM's does at 128; here the caller decides.
        self.backend.no_padding()
        self.backend.no_truncation()

    @classmethod
    def from_file(
        cls,
        path: str | pathlib.Path,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
    ) -> "Tokenizer":
        """A Hugging Face tokenizer.json. Token names not given are found among the usual ones.

        Raises:
          FileNotFoundError: no such file.
          WeightsError: a file that is no tokenizer, or a special token that it does not have.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer file at {path}")
        with _library(f"{path} cannot be read as a tokenizer"):
            backend = hf.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        return cls.framing(backend, str(path), bos=bos, eos=eos, pad=pad)

    @classmethod
    def framing(
        cls,
        backend: hf.Tokenizer,
        path: str,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
    ) -> "Tokenizer":
        """A backend with what its post-processor puts around a text as prefix and suffix.

        Raises:
          WeightsError: a special token that it does not have.
        """
        backend.no_truncation()
        backend.no_padding()
        # Seen on one text; it differs between files.
        with _library(f"the tokenizer of {path} cannot encode a letter"):
            framed = backend.encode("a").ids
            plain = backend.encode("a", add_special_tokens=False).ids
        places = (i for i in range(len(framed) + 1) if framed[i : i + len(plain)] == plain)
        begin = next(places, 0)
        return cls(
            backend,
            *_specials(backend, path, bos, eos, pad),
            prefix=tuple(framed[:begin]),
            suffix=tuple(framed[begin + len(plain) :]),
        )

    @classmethod
    def from_gguf(
        cls,
        path: str | pathlib.Path,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
    ) -> "Tokenizer":
        """The tokenizer inside a GGUF file; its post-processing adds nothing.

        The file's own bos and eos are not taken: an instruct model names its chat turns there.

        Raises:
          FileNotFoundError: no such file.
          WeightsError: a damaged file, or a tokenizer of another kind.
        """
        backend = tokenizer_files.from_gguf(open_gguf(str(path)).metadata, str(path))
        return cls(backend, *_specials(backend, str(path), bos, eos, pad))

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> "Tokenizer":
        """A byte-level BPE of at most `vocabulary` tokens, `<PAD>`, `<BOS>` and `<EOS>` included.

        For towers that bring no tokenizer. The same texts give the same tokenizer.

        Raises:
          ValueError: no room for the 256 bytes and the three special tokens.
        """
        specials = ["<PAD>", "<BOS>", "<EOS>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocabulary < len(alphabet) + len(specials):
            raise ValueError(f"a vocabulary of {vocabulary} is too small; 259 is the least")
        backend = hf.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=specials,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, *_specials(backend, "the trained tokenizer", None, None, None))

    def framed(self) -> "Tokenizer":
        """The same tokenizer, whose `encode` puts bos and eos around each text."""
        return dataclasses.replace(self, prefix=(self.bos,), suffix=(self.eos,))

    def with_specials(self, names: Sequence[str]) -> "Tokenizer":
        """The same tokenizer with pad, bos and eos of these names, appended where missing (§2).

        Args:
          names: of pad, bos and eos, in this order, which is that of their new ids.
        """
        backend = hf.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([n for n in names if backend.token_to_id(n) is None])
        pad, bos, eos = map(backend.token_to_id, names)
        return dataclasses.replace(self, backend=backend, bos=bos, eos=eos, pad=pad)

    def following(self, text: str) -> list[int]:
        """The tokens of a text that follows another one after a blank."""
        # SentencePiece's tokenizers put that blank there by themselves.
        return self.ids(text) if self._puts_a_blank else self.ids(" " + text)

    @functools.cached_property
    def _puts_a_blank(self) -> bool:
        return self.backend.encode("a", add_special_tokens=False).tokens[:1] in (["▁a"], ["▁"])

    def ids(self, text: str) -> list[int]:
        """The text's own tokens, nothing around them."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode(
        self,
        texts: Sequence[str],
        length: int | None = None,
        *,
        truncate: bool = False,
        multiple: int = 8,
    ) -> TokenBatch:
        """Texts as a tower takes them: prefix, tokens, suffix, padding on the right.

        Args:
          texts: N texts.
          length: S; None takes the smallest multiple of `multiple` that holds the longest text.
          truncate: cut a text that is too long (prefix and suffix stay).

        Raises:
          TextTooLong: a text exceeds `length`; the message names it. With truncate, only where
            `length` does not hold prefix and suffix.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one text")
        around = len(self.prefix) + len(self.suffix)
        bodies = [
            encoding.ids
            for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
        if length is None:
            length = bucket(max(map(len, bodies), default=0) + around, multiple)
        if bodies and around > length:
            raise TextTooLong(
                f"{around} tokens stand around every text, the limit is {length}; raise the length"
            )
        ids = np.full((len(bodies), length), self.pad, np.int32)
        mask = np.zeros((len(bodies), length), bool)
        for row, (text, body) in enumerate(zip(texts, bodies, strict=True)):
            if len(body) + around > length and not truncate:
                shown = text if len(text) <= 60 else text[:57] + "..."
                raise TextTooLong(
                    f"text {row} ({shown!r}) has {len(body) + around} tokens, the limit is"
                    f" {length}; split it, or cut it with truncate=True"
                )
            full = [*self.prefix, *body[: length - around], *self.suffix]
            ids[row, : len(full)] = full
            mask[row, : len(full)] = True
        return TokenBatch(ids, mask)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of some tokens; special ones leave nothing.

        What is no UTF-8 becomes U+FFFD, and nothing beside it changes: as bytes are added, the text
        only grows behind an unfinished character.
        """
        ids = [int(i) for i in ids]
        if self._bytes:
            ids = self._mended(ids)
        return self.backend.decode(ids, skip_special_tokens=True)

    @functools.cached_property
    def _bytes(self) -> tuple[int, ...]:
        """The ids of the 256 bytes that SentencePiece spells unknown characters with, or none."""
        ids = tuple(self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        evidence = None not in ids and self.backend.decode([ids[b] for b in "é".encode()]) == "é"
        return ids if evidence else ()

    @functools.cached_property
    def _byte_of(self) -> dict[int, int]:
        return {token: byte for byte, token in enumerate(self._bytes)}

    def _mended(self, ids: list[int]) -> list[int]:
        """The same text in ids that spell U+FFFD themselves.

        The library makes U+FFFD of all bytes in a row where the last are unfinished: characters
        that were there already, and the line's end that a stop waits for, would be lost.
        """
        mended = []
        for is_byte, run in itertools.groupby(ids, self._byte_of.__contains__):
            if is_byte:
                text = bytes(self._byte_of[i] for i in run).decode("utf-8", "replace")
                run = (self._bytes[byte] for byte in text.encode())
            mended += run
        return mended

    @functools.cached_property
    def vocab_size(self) -> int:
        """1 + the largest id, special tokens included: the rows that a table needs."""
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        return 1 + max(ids, default=-1)

    def to_json(self) -> str:
        """All of it as text, for a checkpoint."""
        names = ("bos", "eos", "pad", "prefix", "suffix")
        fields = {name: getattr(self, name) for name in names}
        return json.dumps({**fields, "backend": self.backend.to_str()})

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """What `to_json` wrote."""
        fields = json.loads(text)
        backend = hf.Tokenizer.from_str(fields.pop("backend"))
        around = {name: tuple(fields.pop(name)) for name in ("prefix", "suffix")}
        return cls(backend, **fields, **around)

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of `to_json`: two tokenizers with the same hash do the same."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()


@contextlib.contextmanager
def _library(what: str) -> Iterator[None]:
    """What the library raises for a bad file, as a WeightsError that begins with `what`."""
    try:
        yield
    except BaseException as error:
        # It raises bare Exception; and its panics are not even that.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise WeightsError(f"{what} ({error}); it is damaged or of another format") from error


def _specials(
    backend: hf.Tokenizer, path: str, bos: str | None, eos: str | None, pad: str | None
) -> tuple[int, int, int]:
    """Ids of bos, eos and pad; where nothing is meant for padding, eos is (the mask tells)."""

    def find(role: str, given: str | None, usual: Sequence[str]) -> int | None:
        for name in usual if given is None else (given,):
            if (found := backend.token_to_id(name)) is not None:
                return found
        if given is None and role == "pad":
            return None
        raise WeightsError(
            f"{path} has no {role} token {given or 'among ' + ', '.join(usual)}; name the token"
            f" with {role}=…"
        )

    first, last = find("bos", bos, _BOS), find("eos", eos, _EOS)
    padding = find("pad", pad, _PAD)
    return first, last, last if padding is None else padding
