"""`larimar convert`, `export` and `calibrate`: models of other programs in, towers out, and a model with
its scope detector trained.

Everything heavy is imported inside its command, as in cli.py.
"""

import argparse
import sys
from collections.abc import Callable


def convert_formats(made: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """The options of `larimar convert`."""
    single = _format(
        made,
        shared,
        "ibm",
        from_ibm,
        "a Lightning checkpoint of IBM/larimar, with BERT and GPT-2 or GPT-J",
        "Reads a Lightning checkpoint of IBM/larimar without torch, and makes a folder that `larimar "
        "edit --model` takes. Sizes are read off the tensors. All that does not fit is named in one "
        "error, and nothing is written then; what the checkpoint holds and is not used is named at "
        "the end. The tokenizers are those of the base models: folders with tokenizer.json, as "
        "fetched from Hugging Face. <PAD>, <BOS> and <EOS> are added to the decoder's here.",
    )
    single.add_argument("file", metavar="FILE", help="the checkpoint")
    single.add_argument("out", metavar="OUT", help="the folder to make")
    for tower, base, size in (
        ("encoder", "bert-large-cased", "64"),
        ("decoder", "gpt2-large", "64 for GPT-2, 256 for GPT-J"),
    ):
        single.add_argument(
            f"--{tower}-tokenizer",
            required=True,
            metavar="DIR",
            help=f"folder with the {tower}'s tokenizer.json, such as a copy of {base}",
        )
        single.add_argument(
            f"--{tower}-head-size",
            dest=f"{tower}_head",
            type=int,
            metavar="N",
            help=f"width of one attention head of the {tower}; shapes do not tell ({size})",
        )
    single.add_argument(
        "--rotary",
        type=int,
        metavar="N",
        help="how many numbers of a GPT-J head positions rotate (64)",
    )
    single.add_argument(
        "--scope-threshold",
        type=float,
        metavar="X",
        help="cosine from which a query counts as one of the written prompts (0.95; try yours)",
    )


def export_formats(made: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """The options of `larimar export`."""
    single = _format(
        made,
        shared,
        "hf",
        to_huggingface,
        "folders laid out as on Hugging Face",
        "Writes OUT/encoder and OUT/decoder: config.json, model.safetensors (in parts of at most "
        "5 GB) and the tokenizer. The memory and what lies between the towers are ours alone and "
        "stay in our own file.",
    )
    single.add_argument("model", metavar="MODEL", help="a shipped name, an exported file or a run")
    single.add_argument("out", metavar="OUT", help="the folder to make")


def _format(
    made: argparse.ArgumentParser,
    shared: argparse.ArgumentParser,
    name: str,
    command: Callable[[argparse.Namespace], None],
    summary: str,
    description: str,
) -> argparse.ArgumentParser:
    formats = made.add_subparsers(title="formats", metavar="FORMAT", required=True)
    single = formats.add_parser(name, help=summary, description=description, parents=[shared])
    single.set_defaults(command=command)
    return single


def from_ibm(arguments: argparse.Namespace) -> None:
    """larimar convert ibm"""
    from larimar_jax import convert
    from larimar_jax.weights import ibm

    assumptions = {
        name: getattr(arguments, name)
        for name in ("encoder_head", "decoder_head", "rotary", "scope_threshold")
        if getattr(arguments, name) is not None
    }
    left = convert.from_ibm(
        arguments.file,
        arguments.out,
        encoder_tokenizer=arguments.encoder_tokenizer,
        decoder_tokenizer=arguments.decoder_tokenizer,
        assumptions=ibm.Assumptions(**assumptions),
        progress=True,
    )
    for name in left:
        print(f"left: {name}", file=sys.stderr)
    print(f"{arguments.out}: larimar edit PROMPT ANSWER --model {arguments.out}")


def to_huggingface(arguments: argparse.Namespace) -> None:
    """larimar export hf"""
    from larimar_jax import convert

    print("loading the model and writing its towers", file=sys.stderr)
    convert.to_huggingface(arguments.model, arguments.out)
    print(f"{arguments.out}/encoder and {arguments.out}/decoder")


def calibrate_options(made: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """The options of `larimar calibrate`."""
    made.description = (
        "Trains the detector that decides whether a question is about something written: a linear map "
        "of the encoder's output, and the threshold of the cosine after it. The model's other "
        "parameters stay as they are. How far the map goes from the identity, the threshold, and the "
        "error rates that are shown come from relations that it was not fitted on. Sessions of the old "
        "file stay with the old file."
    )
    made.add_argument("model", metavar="MODEL", help="a shipped name, an exported file or a run")
    made.add_argument(
        "--data", required=True, metavar="FILE", help="CounterFact, either schema; for training only"
    )
    made.add_argument("--out", required=True, metavar="FILE", help="the model to write")
    for name, kind, what in (
        ("steps", int, "steps of Adam"),
        ("batch", int, "facts a step"),
        ("rate", float, "learning rate at the start"),
        ("others", float, "weight of questions that ask something else of the same subject"),
        ("found", float, "weight of a paraphrase's finding its own prompt among a batch's"),
        ("folds", int, "parts of the relations, each judged by what was fitted on the rest"),
        ("seed", int, "of batches, and of what else is asked of a subject"),
    ):
        made.add_argument(f"--{name}", type=kind, metavar="N", help=f"{what} (%(default)s)")
    # As `calibrate.Recipe`, which is not imported for --help.
    made.set_defaults(
        command=calibrate, steps=300, batch=256, rate=2e-4, others=0.5, found=0.3, folds=4, seed=0
    )


def calibrate(arguments: argparse.Namespace) -> None:
    """larimar calibrate"""
    from larimar_jax import calibrate as calibration

    names = ("steps", "batch", "rate", "others", "found", "folds", "seed")
    recipe = calibration.Recipe(**{name: getattr(arguments, name) for name in names})
    print("encoding the records' questions, and fitting", file=sys.stderr)
    found = calibration.model(arguments.model, arguments.out, arguments.data, recipe)
    print(f"{'on relations that it was not fitted on':40} {'as encoded':>12} {'projected':>12}")
    for label, name in (
        ("equal error rate, own prompt", "pairwise"),
        ("equal error rate, all prompts", "store"),
        ("at the threshold: paraphrases missed", "missed"),
        ("neighbours taken for it", "neighbours"),
        ("other questions taken for it", "others"),
    ):
        values = (getattr(quality, name) for quality in (found.external, found.internal))
        print(f"{label:40}" + "".join(f" {value:12.1%}" for value in values))
    print(f"{found.share:.0%} of the fitted change; ", end="")
    print(f"threshold {found.threshold:.3f}; written: {arguments.out}")


# name: (what it does, an example, its options), for cli.py.
COMMANDS = {
    "convert": (
        "turn a checkpoint of the authors' code into a model of ours",
        "larimar convert ibm larimar.ckpt models/larimar"
        " --encoder-tokenizer bert-large-cased --decoder-tokenizer gpt2-large",
        convert_formats,
    ),
    "export": (
        "write a model's towers as folders that transformers loads",
        "larimar export hf smol towers",
        export_formats,
    ),
    "calibrate": (
        "train a model's scope detector on questions that mean a fact and on others",
        "larimar calibrate runs/smol --data counterfact-train.json --out smol.safetensors",
        calibrate_options,
    ),
}
