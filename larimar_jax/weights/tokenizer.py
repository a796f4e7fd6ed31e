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

from larimar_jax.weights.key_table import WeightsError

# Names that families give to their special tokens, in order of preference.
_USUAL = {
    "bos": ("<BOS>", "<s>", "<|begin_of_text|>", "[CLS]", "<|endoftext|>"),
    "eos": ("<EOS>", "</s>", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
    "pad": ("<PAD>", "[PAD]", "<pad>", "<|im_end|>"),
}


class TextTooLong(ValueError):
    """A text that has more tokens than there is room for."""


class TokenBatch(NamedTuple):
    """N texts, right-padded to S tokens; the mask is True on real tokens."""

    ids: Int[np.ndarray, "N S"]
    mask: Bool[np.ndarray, "N S"]


def bucket(length: int, multiple: int = 8) -> int:
    """Return the smallest positive multiple that holds `length`: few shapes, few compilations."""
    return max(1, -(-length // multiple)) * multiple


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with the ids that a tower needs.

    bos, eos, pad: ids. prefix and suffix: the ids that `encode` puts around each text, such as [CLS]
    and [SEP]; empty for a decoder, whose framing depends on the use.
    """

    backend: hf.Tokenizer
    bos: int
    eos: int
    pad: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __post_init__(self):
        # A file may pad and cut, as MiniLM's does at 128; here the caller decides.
        self.backend.no_padding()
        self.backend.no_truncation()

    @classmethod
    def from_file(cls, path: str | pathlib.Path, **specials: str | None) -> "Tokenizer":
        """Read a Hugging Face tokenizer.json; `specials` as in `from_backend`.

        Raises:
          FileNotFoundError: no such file.
          WeightsError: a file that is no tokenizer, or a special token that it does not have.
        """
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"there is no tokenizer file at {path}")
        text = pathlib.Path(path).read_bytes()
        with library_errors(path):
            backend = hf.Tokenizer.from_buffer(text)
        return cls.from_backend(backend, path, **specials)

    @classmethod
    def from_backend(
        cls, backend: hf.Tokenizer, path: object, **specials: str | None
    ) -> "Tokenizer":
        """Wrap a backend; what its post-processor puts around a text is prefix and suffix.

        Args:
          specials: names of the tokens `bos`, `eos` and `pad`; None takes a usual name.

        Raises:
          WeightsError: a special token that it does not have.
        """
        backend.no_truncation()
        backend.no_padding()
        with library_errors(path):
            framed = backend.encode("a").ids
            plain = backend.encode("a", add_special_tokens=False).ids
            backend.encode("ꙮ")  # what a vocabulary without a token for the unknown cannot
        places = (i for i in range(len(framed) + 1) if framed[i : i + len(plain)] == plain)
        begin = next(places, 0)
        ids = {role: _special(backend, path, role, specials.get(role)) for role in _USUAL}
        # Where no token is meant for padding, it is eos: the mask tells.
        ids["pad"] = ids["eos"] if ids["pad"] is None else ids["pad"]
        around = {"prefix": framed[:begin], "suffix": framed[begin + len(plain) :]}
        return cls(backend, **ids, **{name: tuple(tokens) for name, tokens in around.items()})

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> "Tokenizer":
        """Train a byte-level BPE of at most `vocabulary` tokens, with `<PAD>`, `<BOS>` and `<EOS>`.

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
        return cls.from_backend(backend, "the trained tokenizer")

    def framed(self) -> "Tokenizer":
        """Return the same tokenizer with an `encode` that puts bos and eos around each text."""
        return dataclasses.replace(self, prefix=(self.bos,), suffix=(self.eos,))

    def with_specials(self, names: Sequence[str], spare: Sequence[str] = ()) -> "Tokenizer":
        """Return the same tokenizer with pad, bos and eos of these names, appended if missing (§2).

        Args:
          names: of pad, bos and eos, in this order, which is that of their new ids.
          spare: tokens without a use that take the place of missing names, where the tokenizer has
            them.
        """
        backend = hf.Tokenizer.from_str(self.backend.to_str())
        missing = [backend.token_to_id(name) is None for name in (*spare, *names)]
        if spare and not any(missing[: len(spare)]) and all(missing[len(spare) :]):
            names = spare
        # Those that are there too: a decoded text spells no special token.
        backend.add_special_tokens(list(names))
        pad, bos, eos = map(backend.token_to_id, names)
        return dataclasses.replace(self, backend=backend, bos=bos, eos=eos, pad=pad)

    def following(self, text: str) -> list[int]:
        """Return the tokens of a text that follows another text after a blank."""
        # SentencePiece's tokenizers put that blank there by themselves.
        return self.ids(text) if self._puts_a_blank else self.ids(" " + text)

    @functools.cached_property
    def _puts_a_blank(self) -> bool:
        return self.backend.encode("a", add_special_tokens=False).tokens[:1] in (["▁a"], ["▁"])

    def ids(self, text: str) -> list[int]:
        """Return the text's own tokens, without prefix and suffix."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode(
        self,
        texts: Sequence[str],
        length: int | None = None,
        *,
        truncate: bool = False,
        multiple: int = 8,
    ) -> TokenBatch:
        """Encode texts as a tower takes them: prefix, tokens, suffix, padding on the right.

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
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        bodies = [encoding.ids for encoding in encodings]
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
        """Return the text of tokens; special tokens leave nothing.

        Bytes that are no UTF-8 become U+FFFD, and nothing beside them changes: as bytes are added,
        the text only grows behind an unfinished character.
        """
        ids = [int(i) for i in ids]
        if self._bytes:
            # The library makes U+FFFD of all bytes in a row where the last are unfinished: characters
            # that were there already, and the line's end that a stop waits for, would be lost.
            runs = itertools.groupby(ids, self._bytes.__contains__)
            ids = [i for is_byte, run in runs for i in (self._mended(run) if is_byte else run)]
        return self.backend.decode(ids, skip_special_tokens=True)

    @functools.cached_property
    def _bytes(self) -> dict[int, int]:
        """The byte of each id that SentencePiece spells unknown characters with, or nothing."""
        ids = [self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        spelled = None not in ids and self.backend.decode([ids[b] for b in "é".encode()]) == "é"
        return {token: byte for byte, token in enumerate(ids)} if spelled else {}

    def _mended(self, run: Iterable[int]) -> Iterable[int]:
        """Return ids of the same bytes, with U+FFFD spelled out."""
        text = bytes(self._bytes[i] for i in run).decode("utf-8", "replace")
        return (self.backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode())

    def words(self) -> list[str]:
        """Return the tokens that are a word of two letters or more after a blank."""
        texts = (self.decode([token]) for token in range(self.vocab_size))
        return [text[1:] for text in texts if text[:1] == " " and text[1:].isalpha() and text[2:]]

    @functools.cached_property
    def vocab_size(self) -> int:
        """1 + the largest id, special tokens included: the rows that a table needs."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def to_json(self) -> str:
        """Return all of it as text, for a checkpoint."""
        names = ("bos", "eos", "pad", "prefix", "suffix")
        fields = {name: getattr(self, name) for name in names}
        return json.dumps({**fields, "backend": self.backend.to_str()})

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Return what `to_json` wrote."""
        fields = json.loads(text)
        backend = hf.Tokenizer.from_str(fields.pop("backend"))
        around = {name: tuple(fields.pop(name)) for name in ("prefix", "suffix")}
        return cls(backend, **fields, **around)

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of `to_json`: two tokenizers with the same hash do the same."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()


@contextlib.contextmanager
def library_errors(path: object) -> Iterator[None]:
    """Turn what the library raises for a bad file into a WeightsError about `path`."""
    try:
        yield
    except WeightsError:
        raise
    except BaseException as error:
        # It raises bare Exception; and its panics are not even that.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise WeightsError(
            f"{path} cannot be read as a tokenizer ({error}); it is damaged or of another format"
        ) from error


def _special(backend: hf.Tokenizer, path: object, role: str, name: str | None) -> int | None:
    names = _USUAL[role] if name is None else (name,)
    ids = [i for i in map(backend.token_to_id, names) if i is not None]
    if ids or (name is None and role == "pad"):
        return ids[0] if ids else None
    raise WeightsError(f"{path} has no {role} token {name or 'among ' + ', '.join(names)}")
